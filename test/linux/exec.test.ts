import { once } from 'node:events'
import { readdirSync, readFileSync } from 'node:fs'
import { describe, expect, it } from 'vitest'
import { BOOT_LIMIT, bootLinux, HAS_USER_SPACE, kernelNamed } from './linux.js'

/** Bytes of this process in memory. */
const residentSize = () => Number(/VmRSS:\s+(\d+)/.exec(readFileSync('/proc/self/status', 'utf8'))![1]) * 1024
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
        signal: undefined,
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

  it('see the time of the host, from 10 ms before they were asked to 10 ms after they answered', async () => {
    for (const name of ['tiny', 'debian'] as const) {
      const { vm, run } = await bootLinux(await kernelNamed(name))
      const { stdout } = await vm.exec('cat /sys/devices/system/clocksource/clocksource0/current_clocksource')
      expect(stdout.trim()).toMatch(/kvm-clock|tsc/)
      const clock = vm.spawn(['sh', '-c', 'while read line; do date +%s.%N; done'])
      for (let i = 0; i < 20; i++) {
        const before = Date.now()
        clock.stdin.write('\n')
        const [answer] = await once(clock.stdout, 'data')
        // Date.now() is rounded down.
        const after = Date.now() + 1
        const guest = Number(answer) * 1000
        const duration = `${name}, which took ${after - before} ms to answer`
        expect(guest, duration).toBeGreaterThanOrEqual(before - 10)
        expect(guest, duration).toBeLessThanOrEqual(after + 10)
      }
      clock.stdin.end()
      await clock.exited
      vm.stop()
      await run
      await vm.close()
    }
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
    const before = { files: openFiles(), threads: threads() }
    const sizes: number[] = []
    for (let i = 0; i < 10; i++) {
      await once()
      sizes.push(residentSize())
    }
    expect({ files: openFiles(), threads: threads() }).toEqual(before)
    // A machine has 256 MiB, of which this Linux touches 40, and its archive takes 3.
    expect(Math.max(...sizes.slice(5)) - Math.max(...sizes.slice(0, 5))).toBeLessThan(30 << 20)
  })
})
