import { describe, expect, it } from 'vitest'
import type { Registers, SpecialRegisters } from '../../src/index.js'
import { debugExit, HLT, movAx, movCx, program, SPIN } from '../helpers/code.js'
import { boot, EXECUTIONS, errorWith, until } from './boot.js'

describe('the registers of a vCPU', () => {
  it('are what the guest made of them', async () => {
    const vm = await boot(program(movAx(0x1234), movCx(0x5678), HLT))
    await vm.run()
    const { rax, rcx, rip } = vm.vcpus[0]!.registers
    expect({ rax, rcx, rip }).toEqual({ rax: 0x1234n, rcx: 0x5678n, rip: 0x7c07n })
  })

  it('are live: reading a field reads the vCPU, also through an object taken before', async () => {
    const vm = await boot(program(movAx(0x1234), HLT))
    const { registers } = vm.vcpus[0]!
    expect(registers.rax).toBe(0n)
    await vm.run()
    expect(registers.rax).toBe(0x1234n)
  })

  it('are written one at a time, by assigning a field', async () => {
    const vm = await boot(program(SPIN, debugExit(9)))
    vm.vcpus[0]!.registers.rip = 0x7c02n
    vm.vcpus[0]!.registers.r15 = 2n ** 64n - 1n
    expect(await vm.run()).toMatchObject({ reason: 'debug-exit', code: 9 })
    expect(vm.vcpus[0]!.registers.r15).toBe(0xffff_ffff_ffff_ffffn)
  })

  it('are written several at a time, by assigning an object with some of them', async () => {
    const vm = await boot(program(HLT))
    const before = { ...vm.vcpus[0]!.registers }
    vm.vcpus[0]!.registers = { rax: 1n, rsp: 0x6000n } as Registers
    expect({ ...vm.vcpus[0]!.registers }).toEqual({ ...before, rax: 1n, rsp: 0x6000n })
  })

  it('copy to a plain object that stays as it is', async () => {
    const vm = await boot(program(movAx(1), HLT))
    const copy = { ...vm.vcpus[0]!.registers }
    await vm.run()
    expect(copy.rax).toBe(0n)
    expect(Object.keys(copy)).toHaveLength(18)
  })

  it('refuse a number, and say how to write it', async () => {
    const vm = await boot(program(HLT))
    const registers = vm.vcpus[0]!.registers as unknown as Record<string, unknown>
    const error = errorWith('ERR_INVALID_ARGUMENT', 'for register rax but received 5; write 5n')
    expect(() => {
      registers.rax = 5
    }).toThrow(error)
    expect(() => {
      vm.vcpus[0]!.registers = { rax: 5 } as unknown as Registers
    }).toThrow(error)
  })

  it.each([-1n, 2n ** 64n, '1', null, undefined])('refuse %s', async (value) => {
    const vm = await boot(program(HLT))
    const registers = vm.vcpus[0]!.registers as unknown as Record<string, unknown>
    expect(() => {
      registers.rbx = value
    }).toThrow(errorWith('ERR_INVALID_ARGUMENT', 'for register rbx'))
    expect(registers.rbx).toBe(0n)
  })

  it('name the nearest register for one that is misspelt, and change nothing', async () => {
    const vm = await boot(program(HLT))
    expect(() => {
      vm.vcpus[0]!.registers = { rax: 7n, ripp: 0n } as unknown as Registers
    }).toThrow(errorWith('ERR_UNKNOWN_OPTION', "'ripp'; did you mean 'rip'"))
    expect(vm.vcpus[0]!.registers.rax).toBe(0n)
    expect(() => {
      ;(vm.vcpus[0]!.registers as unknown as Record<string, bigint>).ripp = 0n
    }).toThrow(TypeError)
  })
})

describe('the special registers of a vCPU', () => {
  it('are those of the mode that the image starts in', async () => {
    const real = (await boot(program(HLT))).vcpus[0]!.specialRegisters
    expect(real.cr0 & 1n).toBe(0n)
    expect(real.cs).toMatchObject({ base: 0n, limit: 0xffff, selector: 0 })
    const long = (await boot({ image: program(HLT), mode: 'long' })).vcpus[0]!.specialRegisters
    expect(long.cs.l).toBe(1)
    expect(long.efer & 0x500n).toBe(0x500n)
  })

  it('are a copy, and written by assigning an object with some of them', async () => {
    const vm = await boot(program(HLT))
    const [cpu] = vm.vcpus
    const before = cpu!.specialRegisters
    before.cr2 = 0x1000n
    expect(cpu!.specialRegisters.cr2).toBe(0n)
    const ds = { ...before.ds, base: 0x5000n, selector: 0x500 }
    cpu!.specialRegisters = { cr2: 0x2000n, ds } as SpecialRegisters
    expect(cpu!.specialRegisters).toEqual({ ...before, cr2: 0x2000n, ds })
  })

  it.each([
    [{ cr0: 1 }, 'ERR_INVALID_ARGUMENT', 'for register cr0 but received 1; write 1n'],
    [{ cs: { base: 0n } }, 'ERR_INVALID_ARGUMENT', 'for cs.limit but received undefined'],
    [{ cs: null }, 'ERR_INVALID_ARGUMENT', 'an object for cs'],
    [{ gdt: { base: 0n, limit: 1.5 } }, 'ERR_INVALID_ARGUMENT', 'for gdt.limit but received 1.5'],
    [{ interruptBitmap: [0n] }, 'ERR_INVALID_ARGUMENT', 'interruptBitmap.1'],
    [{ cr9: 0n }, 'ERR_UNKNOWN_OPTION', "did you mean 'cr"],
    [null, 'ERR_INVALID_ARGUMENT', 'specialRegisters'],
  ] as const)('%# refuse what is wrong and say what', async (values, code, message) => {
    const vm = await boot(program(HLT))
    const before = vm.vcpus[0]!.specialRegisters
    expect(() => {
      vm.vcpus[0]!.specialRegisters = values as unknown as SpecialRegisters
    }).toThrow(errorWith(code, message))
    expect(vm.vcpus[0]!.specialRegisters).toEqual(before)
  })

  it('that no processor allows are ERR_SYSCALL, with what KVM said', async () => {
    const vm = await boot(program(HLT))
    expect(() => {
      // Long mode active without paging.
      vm.vcpus[0]!.specialRegisters = { efer: 0x400n } as SpecialRegisters
    }).toThrow(
      expect.objectContaining({
        code: 'ERR_SYSCALL',
        syscall: 'KVM_SET_SREGS',
        errno: 22,
        errnoName: 'EINVAL',
      }),
    )
  })
})

describe.each(EXECUTIONS)('while a machine runs (%s)', (execution) => {
  it('its registers cannot be accessed, its memory can', async () => {
    const vm = await boot(program(SPIN), { execution })
    const [cpu] = vm.vcpus
    const { registers } = cpu!
    const run = vm.run()
    const error = errorWith('ERR_RUNNING', 'stop or pause it first')
    expect(() => cpu!.registers).toThrow(error)
    expect(() => registers.rax).toThrow(error)
    expect(() => {
      registers.rax = 0n
    }).toThrow(error)
    expect(() => {
      cpu!.registers = { rax: 0n } as Registers
    }).toThrow(error)
    expect(() => cpu!.specialRegisters).toThrow(error)
    expect(() => {
      cpu!.specialRegisters = { cr2: 0n } as SpecialRegisters
    }).toThrow(error)
    expect(vm.memory.readUint16(0x7c00)).toBe(0xfeeb)
    vm.stop()
    await run
    expect(registers.rip).toBe(0x7c00n)
  })

  it('a guest takes what the host writes into its memory', async () => {
    // mov al, [0x500]; test al, al; jz to the start; out 0xf4, al
    const image = Uint8Array.of(0xa0, 0x00, 0x05, 0x84, 0xc0, 0x74, 0xf9, 0xe6, 0xf4)
    const vm = await boot(image, { execution })
    const run = vm.run()
    let turns = 0
    await until(() => ++turns > 3)
    vm.memory.writeUint8(0x500, 42)
    expect(await run).toMatchObject({ reason: 'debug-exit', code: 42 })
  })
})

it('34: the registers of a closed machine are ERR_CLOSED', async () => {
  const vm = await boot(program(HLT), { cpus: 2, irqchip: 'none' })
  const [cpu, parked] = vm.vcpus
  const { registers } = cpu!
  await vm.close()
  const error = errorWith('ERR_CLOSED')
  expect(() => cpu!.registers).toThrow(error)
  expect(() => registers.rax).toThrow(error)
  expect(() => cpu!.specialRegisters).toThrow(error)
  expect(() => {
    cpu!.registers = {} as Registers
  }).toThrow(error)
  expect(() => parked!.start({ rip: 0x7c00n })).toThrow(error)
})
