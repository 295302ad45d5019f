// A test file for vitest that boots Linux once, and tests programs in it: vitest run examples/linux.test.ts
import { VirtualMachine } from 'nodevisor'
import { readyMadeLinux } from 'nodevisor/linux'
import { afterAll, beforeAll, expect, it } from 'vitest'

let vm: VirtualMachine

// The first time, the kernel is compiled: that takes some minutes.
beforeAll(async () => {
  const { kernel } = await readyMadeLinux()
  vm = await VirtualMachine.create({ kernel, memory: '256M', agent: true, disks: [{ memory: '64M' }] })
  vm.run().catch(() => undefined)
  await vm.agent.connected()
}, 900_000)

afterAll(() => vm?.close())

it('runs Linux', async () => {
  const { stdout, exitCode } = await vm.exec('uname -sm')
  expect({ stdout, exitCode }).toEqual({ stdout: 'Linux x86_64\n', exitCode: 0 })
})

it('sorts lines', async () => {
  const { stdout } = await vm.exec(['sort', '-n'], { input: '10\n9\n1\n' })
  expect(stdout).toBe('1\n9\n10\n')
})

it('runs a script of the host', async () => {
  await vm.writeFile('/tmp/greet', '#!/bin/sh\necho "Hello, $1, from $PLACE"\n', { mode: 0o755 })
  const { stdout } = await vm.exec(['/tmp/greet', 'host'], { env: { PLACE: 'the guest' } })
  expect(stdout).toBe('Hello, host, from the guest\n')
})

it('says what went wrong', async () => {
  const { stderr, exitCode } = await vm.exec('cat /no/such/file')
  expect(exitCode).toBe(1)
  expect(stderr).toContain('No such file')
})

it('keeps files on a disk', async () => {
  await vm.exec('mke2fs /dev/vda && mount /dev/vda /mnt', { check: true })
  await vm.writeFile('/mnt/data', new Uint8Array(100_000).fill(7))
  await vm.exec('umount /mnt && mount /dev/vda /mnt', { check: true })
  expect((await vm.readFile('/mnt/data')).equals(Buffer.alloc(100_000, 7))).toBe(true)
})
