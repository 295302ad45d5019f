import { once } from 'node:events'
import { readdirSync, readFileSync } from 'node:fs'
import { describe, expect, it } from 'vitest'
import { inspectHost } from '../../src/index.js'
import { KERNEL_NAMES } from '../../src/linux/kernels.js'
import { collectGarbage } from '../helpers/memory.js'
import { BOOT_LIMIT, bootLinux, HAS_USER_SPACE, kernelNamed } from './linux.js'

/**
 * Linux reads the time when it starts, and counts ticks from there until its clock drivers are up. Where that takes
 * seconds, because the processor is emulated, its clock is off by then.
 */
const IS_CLOCK_SET = inspectHost().kind !== 'emulated'

/** Bytes: what JavaScript holds, and the guests' memory that is in this process. */
function memoryInUse(): number {
  collectGarbage()
  const { heapUsed, arrayBuffers } = process.memoryUsage()
  const shared = Number(/RssShmem:\s+(\d+)/.exec(readFileSync('/proc/self/status', 'utf8'))![1])
  return heapUsed + arrayBuffers + shared * 1024
}
const openFiles = () => readdirSync('/proc/self/fd').length
const threads = () => readdirSync('/proc/self/task').length

describe.runIf(HAS_USER_SPACE)('Programs in Linux', { timeout: BOOT_LIMIT }, () => {
  it('run a hundred times, each with its output and status', async () => {
    const { vm, run } = await bootLinux(await kernelNamed('tiny'))
    for (let i = 0; i < 100; i++) {
      const result = await vm.exec(`read line; echo "$line $X"; echo error ${i} >&2; exit ${i}`, {
        input: `input ${i}\n`,
        env: { X: `x${i}` },
      })
      expect(result).toMatchObject({
        stdout: `input ${i} x${i}\n`,
        stderr: `error ${i}\n`,
        exitCode: i,
        signal: null,
      })
    }
    expect((await vm.exec('kill -9 $$')).signal).toBe('SIGKILL')
    expect(await vm.exec('sleep 1000', { timeout: 100 })).toMatchObject({ timedOut: true })
    vm.stop()
    await run
  })

  it('take files in and out, unchanged', async () => {
    const { vm, run } = await bootLinux(await kernelNamed('debian'), { cpus: 2 })
    const bytes = new Uint8Array(3 << 20).map((_, i) => (i * i) >> 7)
    await vm.writeFile('/tmp/file', bytes, { mode: 0o640 })
    expect((await vm.exec('stat -c "%a %s" /tmp/file')).stdout).toBe(`640 ${bytes.length}\n`)
    expect(Buffer.compare(await vm.readFile('/tmp/file'), bytes)).toBe(0)
    vm.stop()
    await run
  })

  it.each(KERNEL_NAMES)('see the time of the host (%s)', async (name) => {
    const { vm, run } = await bootLinux(await kernelNamed(name))
    const { stdout } = await vm.exec('cat /sys/devices/system/clocksource/clocksource0/current_clocksource')
    expect(stdout.trim()).toBe(inspectHost().kind === 'emulated' ? 'kvm-clock' : 'tsc')
    const clock = vm.spawn(['sh', '-c', 'while read line; do adjtimex | grep time.tv; done'])
    // How far the guest's clock is ahead, in ms: from the moment it was asked, and from the one it had answered.
    let most = Number.POSITIVE_INFINITY
    let least = Number.NEGATIVE_INFINITY
    for (let i = 0; i < 50; i++) {
      const asked = Date.now()
      clock.stdin.write('\n')
      const [answer] = await once(clock.stdout, 'data')
      // Date.now() is rounded down.
      const answered = Date.now() + 1
      const [seconds, microseconds] = String(answer).match(/\d+/g)!.map(Number)
      const guest = seconds! * 1000 + microseconds! / 1000
      most = Math.min(most, guest - asked)
      least = Math.max(least, guest - answered)
    }
    clock.stdin.end()
    await clock.exited
    vm.stop()
    await run
    if (IS_CLOCK_SET) {
      expect(least).toBeLessThanOrEqual(10)
      expect(most).toBeGreaterThanOrEqual(-10)
    }
    expect(least - most, "it goes as fast as the host's").toBeLessThanOrEqual(10)
  })

  it('leave nothing behind after ten boots', async () => {
    const kernel = await kernelNamed('tiny')
    const once = async () => {
      const { vm, run } = await bootLinux(kernel)
      expect((await vm.exec('echo hello')).stdout).toBe('hello\n')
      vm.stop()
      await run
      await vm.close()
    }
    await once()
    await once()
    const before = { files: openFiles(), threads: threads(), memory: memoryInUse() }
    for (let i = 0; i < 10; i++) await once()
    const { memory, ...others } = before
    expect({ files: openFiles(), threads: threads() }).toEqual(others)
    // A kernel and its archive alone take 20 MiB.
    expect(memoryInUse() - memory).toBeLessThan(10 << 20)
  })
})
