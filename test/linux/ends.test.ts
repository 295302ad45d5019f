import { describe, expect, it } from 'vitest'
import { initramfs } from '../../src/index.js'
import { KERNEL_NAMES } from '../../src/linux/kernels.js'
import { BOOT_LIMIT, bootLinux, HAS_USER_SPACE, kernelNamed } from './linux.js'

describe.runIf(HAS_USER_SPACE)('Linux', { timeout: BOOT_LIMIT }, () => {
  it.each(KERNEL_NAMES)('%s ends a run by a reboot', async (name) => {
    const { vm, run } = await bootLinux(await kernelNamed(name))
    await expect(vm.exec('reboot -f')).rejects.toMatchObject({ code: 'ERR_AGENT_FAILED' })
    expect(await run).toMatchObject({ reason: 'reset' })
  })

  it.each([
    ['tiny', 'switch-off'],
    ['debian', 'poweroff -f'],
  ] as const)('%s ends a run by %s', async (name, command) => {
    const { vm, run } = await bootLinux(await kernelNamed(name))
    await expect(vm.exec(command)).rejects.toMatchObject({ code: 'ERR_AGENT_FAILED' })
    expect(await run).toMatchObject({ reason: 'power-off' })
  })

  it.each(KERNEL_NAMES)('%s ends a run by a panic', async (name) => {
    const { vm, run } = await bootLinux(await kernelNamed(name), {
      more: await initramfs({ '/init': '#!/bin/busybox sh\nexit 3\n' }),
      cmdline: 'console=ttyS0',
    })
    expect(await run).toMatchObject({ reason: 'reset' })
    expect(vm.serial.output).toContain(
      'Kernel panic - not syncing: Attempted to kill init! exitcode=0x00000300',
    )
  })
})
