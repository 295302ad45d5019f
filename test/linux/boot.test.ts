import { mkdirSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { expect, it, onTestFinished } from 'vitest'
import { initramfs, inspectHost, VirtualMachine } from '../../src/index.js'
import { runProgram } from '../../src/linux/debian-packages.js'
import { PVM_PARAMETERS } from '../../src/linux/ready-made.js'
import { BOOT_LIMIT, kernelNamed } from './linux.js'

it('boots the tiny Linux from an ext4 root to its first process', { timeout: BOOT_LIMIT }, async () => {
  const folder = mkdtempSync(join(tmpdir(), 'nodevisor-linux-root-'))
  onTestFinished(() => rmSync(folder, { recursive: true }))
  const root = join(folder, 'root')
  mkdirSync(join(root, 'dev'), { recursive: true })
  writeFileSync(join(root, 'init'), 'no program')
  const file = join(folder, 'root.img')
  const signal = new AbortController().signal
  await runProgram('mke2fs', ['-q', '-t', 'ext4', '-d', root, file, '16M'], { signal })

  const vm = await VirtualMachine.create({
    kernel: {
      image: (await kernelNamed('tiny')).image,
      // Without an init in it, so that the root is the disk's.
      initrd: await initramfs({ '/dev/console': { device: [5, 1], mode: 0o600 } }),
      cmdline: `console=ttyS0 console=hvc0 root=/dev/vda init=/init panic=-1 ${
        inspectHost().kind === 'pvm' ? PVM_PARAMETERS : ''
      }`,
    },
    memory: '128M',
    disks: [{ file }],
    console: true,
    rng: true,
  })
  onTestFinished(() => vm.close())
  const run = vm.run()
  await vm.console.waitFor('Run /init as init process', { timeout: BOOT_LIMIT * 0.75 })
  // DRIVER_OK
  for (const device of vm.virtioDevices) expect(device.status & 4, device.name).toBe(4)
  // What is not a program is no init: the kernel says so, and gives up.
  expect(await run).toMatchObject({ reason: 'reset' })
  expect(vm.console.output).toContain('Kernel panic - not syncing: ')
  for (const line of [
    'Unpacking initramfs...',
    'printk: console [ttyS0] enabled',
    'printk: console [hvc0] enabled',
    '[vda] 32768 512-byte logical blocks',
    'VFS: Mounted root (ext4 filesystem)',
  ]) {
    expect(vm.serial.output).toContain(line)
  }
})
