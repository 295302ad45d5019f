import { truncateSync, writeFileSync } from 'node:fs'
import { dirname, join } from 'node:path'
import { setTimeout } from 'node:timers/promises'
import { describe, expect, it, onTestFinished } from 'vitest'
import { VirtualMachine } from '../../src/index.js'
import { makeFolder } from '../helpers/folders.js'
import { move } from '../migration/machines.js'
import { BOOT_LIMIT, bootLinux, HAS_USER_SPACE, kernelNamed, programsArchive } from './linux.js'

const CHECK = { check: true, timeout: BOOT_LIMIT }
/** Makes a file that depends on nothing, and takes a while. */
const LINES = 300_000

/** What is done to a Linux in the middle of its work. @returns the machine that goes on with it */
const KINDS: readonly ((vm: VirtualMachine) => Promise<VirtualMachine>)[] = [
  async (vm) => {
    await vm.pause()
    vm.resume()
    return vm
  },
  (vm) => vm.fork(),
  async (vm) => {
    await using snapshot = await vm.snapshot()
    const [copy] = await snapshot.spawn()
    return copy!
  },
  async (vm) => {
    const path = join(makeFolder(), 'snapshot')
    await vm.pause()
    await vm.snapshot(path)
    await vm.close()
    return VirtualMachine.restore(path)
  },
]

describe.runIf(HAS_USER_SPACE)('Linux that is interrupted', { timeout: BOOT_LIMIT }, () => {
  it.each([
    ['tiny', 1],
    ['debian', 2],
  ] as const)('while it writes a file, writes the same (%s, %d vCPUs)', async (name, cpus) => {
    const file = join(makeFolder(), 'disk.img')
    writeFileSync(file, '')
    truncateSync(file, 64 << 20)
    const more = await programsArchive(['mke2fs', 'e2fsck'])
    const booted = await bootLinux(await kernelNamed(name), { disks: [{ file }], more, cpus })
    let { vm, run } = booted
    await vm.exec('/sbin/mke2fs -q -t ext4 /dev/vda && mkdir -p /mnt && mount -t ext4 /dev/vda /mnt', CHECK)
    const { stdout: expected } = await vm.exec(`seq 1 ${LINES} | sha256sum`, CHECK)
    await vm.exec(`(seq 1 ${LINES} > /mnt/file; sync; touch /mnt/done) > /dev/null 2>&1 < /dev/null &`, CHECK)
    // Moving first: disks of copies are in no file.
    const moved = (machine: VirtualMachine) => move(machine, { diskFolders: [dirname(file)] })
    const interruptions = [moved, moved, ...Array.from({ length: 3 }, () => KINDS).flat()]
    for (const [index, interrupt] of interruptions.entries()) {
      await setTimeout(20 * index)
      const next = await interrupt(vm)
      if (next === vm) continue
      onTestFinished(() => next.close())
      await vm.close()
      await run
      vm = next
      run = vm.run()
    }
    await vm.exec('while [ ! -e /mnt/done ]; do sleep 0.1; done', CHECK)
    expect((await vm.exec('sha256sum < /mnt/file', CHECK)).stdout).toBe(expected)
    await vm.exec('umount /mnt && /sbin/e2fsck -fn /dev/vda', CHECK)
    vm.stop()
    await run
  })

  it('knows what time it is, and returns as often as it is asked to', async () => {
    const { vm, run } = await bootLinux(await kernelNamed('debian'))
    /** How far the guest's clock is ahead of the host's, in s: at least and at most, as asking takes time. */
    const differenceTo = async (machine: VirtualMachine) => {
      const before = Date.now() / 1000
      const time = Number((await machine.exec('date +%s', CHECK)).stdout)
      return { least: time - Date.now() / 1000, most: time + 1 - before }
    }
    const clock = await differenceTo(vm)
    await vm.exec('echo before > /tmp/said', CHECK)
    const snapshot = await vm.snapshot()
    onTestFinished(() => snapshot.close())
    await setTimeout(3000)
    const [copy] = await snapshot.spawn()
    onTestFinished(() => copy!.close())
    const copyRun = copy!.run()
    const after = await differenceTo(copy!)
    expect(after.least).toBeLessThan(clock.most + 1)
    expect(after.most).toBeGreaterThan(clock.least - 1)
    for (let i = 0; i < 3; i++) {
      await copy!.exec(`echo ${i} > /tmp/said`, CHECK)
      await copy!.reset(snapshot)
      expect((await copy!.exec('cat /tmp/said', CHECK)).stdout).toBe('before\n')
    }
    expect((await vm.exec('cat /tmp/said', CHECK)).stdout).toBe('before\n')
    vm.stop()
    copy!.stop()
    await Promise.all([run, copyRun])
  })
})
