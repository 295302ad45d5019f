import { describe, expect, it } from 'vitest'
import type { VirtualMachine } from '../../src/index.js'
import {
  debugExit,
  dword,
  flat,
  HLT,
  IN_AL_DX,
  movAx,
  movDx,
  movEax,
  OUT_DX_AL,
  OUT_DX_AX,
  outPort,
  print,
  program,
  storeEax,
} from '../helpers/code.js'
import { imageOf } from '../helpers/guests.js'
import { RUN_LIMIT } from '../helpers/limits.js'
import { boot, EXECUTIONS, errorWith } from './boot.js'

const RSDP = 0xe0000
const text = (vm: VirtualMachine, address: number, length: number) =>
  Buffer.from(vm.memory.read(address, length)).toString('latin1')

/** The ACPI tables by signature, found as an operating system does. */
function acpiTables(vm: VirtualMachine): Map<string, number> {
  const xsdt = Number(vm.memory.readUint32(RSDP + 24))
  const count = (vm.memory.readUint32(xsdt + 4) - 36) / 8
  const addresses = Array.from({ length: count }, (_, i) => vm.memory.readUint32(xsdt + 36 + 8 * i))
  return new Map(addresses.map((address) => [text(vm, address, 4), address]))
}

describe('firmware tables', () => {
  it.each(['full', 'split'] as const)(
    'are in memory in a machine with interrupt controllers (%s)',
    async (irqchip) => {
      const vm = await boot(program(HLT), { irqchip, cpus: 3 })
      expect(text(vm, RSDP, 8)).toBe('RSD PTR ')
      const tables = acpiTables(vm)
      expect([...tables.keys()].sort()).toEqual(['APIC', 'FACP'])
      // MADT: entries of type 0 are processors.
      const madt = tables.get('APIC')!
      const ids: number[] = []
      for (
        let at = madt + 44;
        at < madt + vm.memory.readUint32(madt + 4);
        at += vm.memory.readUint8(at + 1)
      ) {
        if (vm.memory.readUint8(at) === 0) ids.push(vm.memory.readUint8(at + 3))
      }
      expect(ids).toEqual(vm.vcpus.map(({ unsafeVcpu }) => unsafeVcpu.id))
      expect(Buffer.from(vm.memory.read(0xf0000, 0x10000)).includes('_MP_')).toBe(true)
    },
  )

  it.each([
    ['where there are no interrupt controllers', { irqchip: 'none' as const }],
    ['where they are not wanted', { irqchip: 'full' as const, firmwareTables: false }],
    ['where there is no room', { irqchip: 'full' as const, memory: '512K' }],
  ])('are not there %s', async (_where, options) => {
    const vm = await boot(program(HLT), options)
    if (vm.memory.contains(RSDP, 8)) expect(text(vm, RSDP, 8)).not.toBe('RSD PTR ')
  })

  it('are there for the asking', async () => {
    const vm = await boot(program(HLT), { irqchip: 'none', firmwareTables: true })
    expect(text(vm, RSDP, 8)).toBe('RSD PTR ')
    await expect(boot(program(HLT), { firmwareTables: true, memory: '512K' })).rejects.toThrow(
      errorWith('ERR_BOOT_NO_ROOM', /1 MiB.*firmwareTables: false/),
    )
  })

  it('do not overwrite a kernel, nor it them: an error names both and says what to do', async () => {
    const kernel = { image: new Uint8Array(0x100), at: 0xe0000 }
    await expect(boot(kernel, { irqchip: 'full' })).rejects.toThrow(
      errorWith('ERR_BOOT_NO_ROOM', /kernel takes 0x100 bytes at 0xe0000.*firmwareTables: false/),
    )
    await boot(kernel, { irqchip: 'full', firmwareTables: false })
    await boot(kernel)
  })

  it('come with the size of conventional memory, by which kernels look for an MP table', async () => {
    expect((await boot(program(HLT), { irqchip: 'full' })).memory.readUint16(0x413)).toBe(640)
    expect((await boot(program(HLT))).memory.readUint16(0x413)).toBe(0)
  })

  it('are pointed out to a PVH kernel', async () => {
    const vm = await boot(imageOf({ image: 'hello-pvh.elf' }))
    expect(vm.irqchip).toBe('full')
    const startInfo = Number(vm.vcpus[0]!.registers.rbx)
    expect(vm.memory.readUint32(startInfo + 32)).toBe(RSDP)
  })

  it('are copied to a Multiboot 2 kernel: the RSDP, in a tag', async () => {
    const vm = await boot(imageOf({ image: 'hello-multiboot2.elf' }))
    const info = Number(vm.vcpus[0]!.registers.rbx)
    const size = vm.memory.readUint32(info)
    const tags = new Map<number, number>()
    for (let at = info + 8; at < info + size; at += Math.ceil(vm.memory.readUint32(at + 4) / 8) * 8) {
      tags.set(vm.memory.readUint32(at), at)
    }
    expect(vm.memory.read(tags.get(15)! + 8, 36)).toEqual(vm.memory.read(RSDP, 36))
  })
})

describe('fw_cfg', () => {
  /** Selects an item and prints its first bytes. */
  const printItem = (key: number, length: number) =>
    program(
      flat.movDx(0x510),
      flat.movEax(key),
      [0x66, 0xef], // out dx, ax
      ...Array.from({ length }, () => [flat.movDx(0x511), IN_AL_DX, flat.movDx(0x3f8), OUT_DX_AL]).flat(),
      debugExit(0),
    )

  it.each([
    ['its signature', 0x00, 'QEMU'],
    ['the number of processors', 0x05, '\x02\x00'],
    ['the command line', 0x15, 'root=me'],
    ['files, by name, behind its own', 0x21, 'hello'],
  ])('gives the guest %s', async (_what, key, expected) => {
    const vm = await boot(
      { image: printItem(key, expected.length), mode: 'long', cmdline: 'root=me' },
      { cpus: 2, fwCfg: { 'opt/a': 'hello', 'opt/b': Uint8Array.of(1) } },
    )
    expect(await vm.run({ timeout: RUN_LIMIT })).toMatchObject({ reason: 'debug-exit' })
    expect(vm.serial.output).toBe(expected)
  })

  it.each([
    [{ '': 'x' }, /name of 1 to 55/],
    [{ 'etc/e820': 'x' }, /etc\//],
    [{ 'opt/a': 5 }, /opt\/a/],
    ['opt/a', /object/],
  ])('refuses %j', async (fwCfg, message) => {
    await expect(boot(program(HLT), { fwCfg: fwCfg as never })).rejects.toThrow(
      errorWith('ERR_INVALID_ARGUMENT', message),
    )
  })
})

describe('the processor', () => {
  /** mov eax, leaf; xor ecx, ecx; cpuid; mov [0x600], eax … edx */
  const cpuid = (leaf: number) =>
    program(
      movEax(leaf),
      [0x66, 0x31, 0xc9, 0x0f, 0xa2],
      storeEax(0x600),
      [0x66, 0x89, 0x1e, 0x04, 0x06, 0x66, 0x89, 0x0e, 0x08, 0x06, 0x66, 0x89, 0x16, 0x0c, 0x06],
      debugExit(0),
    )
  const AVX = 1 << 28

  it('has the features it was told to, or the machine says which the host does not honour', async () => {
    const vm = await boot(cpuid(1), { cpu: { features: { avx: false } } })
    await vm.run()
    const sees = (vm.memory.readUint32(0x608) & AVX) !== 0
    expect(vm.cpu.features.includes('avx')).toBe(sees)
    expect(vm.cpu.ignored.includes('avx')).toBe(sees)
  })

  it('shows a local APIC where the machine has one', async () => {
    const APIC = 1 << 9
    for (const [irqchip, expected] of [
      ['none', 0],
      ['split', APIC],
      ['full', APIC],
    ] as const) {
      const vm = await boot(cpuid(1), { irqchip })
      await vm.run()
      expect(vm.memory.readUint32(0x60c) & APIC, irqchip).toBe(expected)
      expect(vm.cpu.features.includes('apic')).toBe(expected !== 0)
    }
  })

  it('has the topology it was told to', async () => {
    const vm = await boot(cpuid(1), { cpus: 4, cpu: { sockets: 2, cores: 2 } })
    await vm.run({ timeout: RUN_LIMIT })
    expect(vm.cpu.topology).toEqual({ sockets: 2, cores: 2, threads: 1 })
    expect((vm.memory.readUint32(0x604) >>> 16) & 0xff).toBe(2)
  })

  it.each([
    ['a model that there is not', 'x86-64-v9', /x86-64-v/],
    ['a feature that is misspelt', { features: { avx22: false } }, /did you mean 'avx2'/],
    ['a topology that does not fit', { sockets: 3 }, /3/],
  ])('is refused with %s', async (_what, cpu, message) => {
    await expect(boot(program(HLT), { cpu: cpu as never, cpus: 2 })).rejects.toThrow(
      errorWith('ERR_INVALID_ARGUMENT', message),
    )
  })

  it('is refused without long mode for a kernel that starts in it', async () => {
    await expect(
      boot({ image: program(HLT), mode: 'long' }, { cpu: { features: { lm: false } } }),
    ).rejects.toThrow(errorWith('ERR_INVALID_ARGUMENT', /'lm'/))
  })
})

describe.each(EXECUTIONS)('the power button (%s)', (execution) => {
  it.each(['full', 'split'] as const)('interrupts a guest that has it enabled (%s)', async (irqchip) => {
    const HANDLER = 0x80
    const image = new Uint8Array(0x100)
    image.set(
      program(
        [0xfa], // cli
        // [4 * 0x71] = 0:0x7c80
        [0x66, 0xc7, 0x06, 0xc4, 0x01, ...dword(0x7c00 + HANDLER)],
        ...[
          [0x20, 0x11],
          [0x21, 0x20],
          [0x21, 0x04],
          [0x21, 0x01],
          [0x21, 0xfb],
          [0xa0, 0x11],
          [0xa1, 0x70],
          [0xa1, 0x02],
          [0xa1, 0x01],
          [0xa1, 0xfd],
          // IRQ 9 is level-triggered.
        ].map(([port, value]) => outPort(port!, value!)),
        outPort(0x4d1, 0x02),
        movDx(0x602),
        movAx(0x100), // PWRBTN_EN
        OUT_DX_AX,
        print('ready'),
        [0xfb, 0xf4], // sti; hlt
      ),
    )
    image.set(program(debugExit(9)), HANDLER)
    const vm = await boot(image, { execution, irqchip })
    const run = vm.run({ timeout: RUN_LIMIT })
    await vm.serial.waitFor('ready')
    vm.pressPowerButton()
    expect(await run).toMatchObject({ reason: 'debug-exit', code: 9 })
  })
})

it('a machine that was closed has no power button', async () => {
  const vm = await boot(program(HLT))
  await vm.close()
  expect(() => vm.pressPowerButton()).toThrow(errorWith('ERR_CLOSED'))
})
