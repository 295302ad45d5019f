import { describe, expect, it } from 'vitest'
import { KERNEL_NAMES } from '../../src/linux/kernels.js'
import { BOOT_LIMIT, bootLinux, HAS_USER_SPACE, kernelNamed, PROMPT, type } from './linux.js'

const CASES = KERNEL_NAMES.flatMap((name) => [1, 2, 4].map((cpus) => [name, cpus] as const))

describe.runIf(HAS_USER_SPACE)('Linux', { timeout: BOOT_LIMIT }, () => {
  it.each(CASES)('%s boots to a shell with %i vCPUs, and switches off behind it', async (name, cpus) => {
    const { vm, run } = await bootLinux(await kernelNamed(name), { cpus })
    await type(vm, 'echo $((6 * 7)) $(nproc) $(cat /sys/class/misc/hw_random/rng_current)')
    // The tiny kernel is for one processor.
    const processors = name === 'tiny' ? 1 : cpus
    expect(await type(vm, 'cat /proc/consoles; tty')).toMatch(
      new RegExp(`\\)\r\n42 ${processors} virtio_rng\\.0\r\n.*$`),
    )
    expect(await type(vm, 'exit')).toMatch(/hvc0 .*\r\n/)
    expect(await run).toMatchObject({ reason: 'power-off' })
  })

  it('follows the size of the terminal, and takes Ctrl-C', async () => {
    const { vm, run } = await bootLinux(await kernelNamed('debian'))
    vm.console.resize({ columns: 100, rows: 30 })
    await type(vm, 'stty size')
    expect(await type(vm, 'until stty size | grep 132; do sleep 0.1; done')).toContain('\r\n30 100\r\n')
    vm.console.resize({ columns: 132, rows: 43 })
    await vm.console.waitFor('\r\n43 132\r\n')
    // Its own words, not their echo: until then the shell has the terminal, and Ctrl-C would be its own.
    await type(vm, "echo 'run'ning; sleep 1000")
    await vm.console.waitFor('running\r\n')
    vm.console.write('\x03')
    await type(vm, 'echo status $?')
    expect(await type(vm, 'exit')).toContain('\r\nstatus 130\r\n')
    expect(await run).toMatchObject({ reason: 'power-off' })
  })

  it('has its console on the serial port, too', async () => {
    const { vm, run } = await bootLinux(await kernelNamed('tiny'), {
      console: false,
      agent: false,
      rng: false,
      cmdline: 'console=ttyS0',
    })
    await vm.serial.waitFor(PROMPT)
    vm.serial.write('tty\n')
    expect((await vm.serial.waitFor(PROMPT)).before).toContain('/dev/ttyS0\r\n')
    vm.serial.write('exit\n')
    expect(await run).toMatchObject({ reason: 'power-off' })
  })
})
