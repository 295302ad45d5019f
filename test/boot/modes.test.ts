import { describe, expect, it } from 'vitest'
import type { BootImage } from '../../src/boot/boot-image.js'
import { loadFlat } from '../../src/boot/flat.js'
import { bootTranslate } from '../../src/boot/long-mode.js'
import {
  bootOptions,
  errorOf,
  faultsOf,
  MIB,
  pattern,
  peek,
  peekText,
  segmentNamed,
  textModule,
} from '../helpers/images.js'

const GIB = 2 ** 30
const load = (mode: 'protected' | 'long', options = {}) =>
  loadFlat(pattern(64), bootOptions({ mode, ...options }))

/** Walks the page tables as a processor does; checks that each level is present, writable and supervisor's. */
function walk(image: BootImage, virtual: bigint): bigint | undefined {
  const index = (shift: bigint) => Number((virtual >> shift) & 511n)
  let table = Number(image.state.specialRegisters.cr3)
  for (const shift of [39n, 30n, 21n]) {
    const entry = peek(image, table + index(shift) * 8, 8).getBigUint64(0, true)
    if ((entry & 1n) === 0n) return undefined
    expect(entry & 0xfffn).toBe(shift === 21n ? 0x83n : 0x3n)
    if (shift === 21n) return (entry & ~0x1f_ffffn) | (virtual & 0x1f_ffffn)
    table = Number(entry & ~0xfffn)
  }
  return undefined
}

/** A descriptor of the GDT that the state names, taken apart. */
function descriptor(image: BootImage, selector: number) {
  const { gdt } = image.state.specialRegisters
  expect(selector + 7).toBeLessThanOrEqual(gdt.limit)
  const raw = peek(image, Number(gdt.base) + selector, 8).getBigUint64(0, true)
  const field = (at: number, bits: number) => Number((raw >> BigInt(at)) & ((1n << BigInt(bits)) - 1n))
  const g = field(55, 1)
  const limit = field(0, 16) | (field(48, 4) << 16)
  return {
    base: BigInt(field(16, 24) + field(56, 8) * 2 ** 24),
    limit: g === 1 ? limit * 0x1000 + 0xfff : limit,
    type: field(40, 4),
    s: field(44, 1),
    dpl: field(45, 2),
    present: field(47, 1) === 1,
    avl: field(52, 1),
    l: field(53, 1),
    db: field(54, 1),
    g,
  }
}

describe.each(['protected', 'long'] as const)('the start in %s mode', (mode) => {
  it('has a GDT in memory that says what the segment registers hold', () => {
    const image = load(mode)
    for (const name of ['cs', 'ds', 'es', 'fs', 'gs', 'ss', 'tr'] as const) {
      const register = image.state.specialRegisters[name]
      expect(register, name).toMatchObject(descriptor(image, register.selector))
    }
    expect(peek(image, Number(image.state.specialRegisters.gdt.base), 8).getBigUint64(0, true)).toBe(0n)
  })

  it('has a TSS without an I/O bitmap', () => {
    const image = load(mode)
    const { base, limit } = image.state.specialRegisters.tr
    expect(limit).toBe(0x67)
    expect(peek(image, Number(base) + 0x66, 2).getUint16(0, true)).toBeGreaterThan(limit)
  })

  it('has flat segments, no IDT, no LDT, and interrupts off', () => {
    const { registers, specialRegisters } = load(mode).state
    expect(specialRegisters.cs).toMatchObject({ selector: 0x08, base: 0n, limit: 0xffff_ffff })
    expect(specialRegisters.ds).toMatchObject({ selector: 0x10, base: 0n, limit: 0xffff_ffff })
    expect(specialRegisters.idt).toEqual({ base: 0n, limit: 0 })
    expect(specialRegisters.ldt.unusable).toBe(true)
    expect(registers.rflags).toBe(2n)
  })

  it('has an empty stack of 16 KiB, aligned as the ABI wants it at the entry of a function', () => {
    const image = load(mode)
    const stack = segmentNamed(image, 'stack')
    const wordSize = mode === 'long' ? 8 : 4
    const sp = Number(image.state.registers.rsp)
    expect(stack.size).toBe(0x4000)
    expect((sp + wordSize) % 16).toBe(0)
    expect(sp).toBeGreaterThan(stack.address + stack.size - 64)
    expect(sp + wordSize).toBeLessThanOrEqual(stack.address + stack.size)
  })

  it('halts the processor when the first function returns', () => {
    const image = load(mode)
    const sp = Number(image.state.registers.rsp)
    const returnAddress = peek(image, sp, 4).getUint32(0, true)
    const code = peek(image, returnAddress, 4)
    expect(code.getUint32(0, false)).toBe(0xfaf4_ebfd)
  })

  it('passes memory size, command line and modules in RDI, RSI, RDX and RCX', () => {
    const modules = [textModule('first', 'a b'), textModule('', ''), textModule('x'.repeat(5000), 'ü')]
    const image = load(mode, { cmdline: ' root=/dev/ram  größe=1 ', modules })
    expect(faultsOf(image, 16 * MIB)).toEqual([])
    const { rdi, rsi, rdx, rcx } = image.state.registers
    expect(rdi).toBe(BigInt(16 * MIB))
    expect(peekText(image, Number(rsi))).toBe(' root=/dev/ram  größe=1 ')
    expect(rcx).toBe(3n)
    const table = peek(image, Number(rdx), 3 * 24)
    const field = (at: number) => Number(table.getBigUint64(at, true))
    modules.forEach((module, index) => {
      const start = field(index * 24)
      expect(start % 4096).toBe(0)
      expect(segmentNamed(image, `module ${index}`)).toMatchObject({ address: start, bytes: module.bytes })
      expect(field(index * 24 + 8)).toBe(module.bytes.length)
      expect(peekText(image, field(index * 24 + 16))).toBe(module.cmdline)
    })
  })

  it('has an empty command line and no module table when there is nothing to pass', () => {
    const image = load(mode)
    expect(peekText(image, Number(image.state.registers.rsi))).toBe('')
    expect(image.state.registers).toMatchObject({ rdx: 0n, rcx: 0n })
  })

  it('keeps modules and structures out of the memory of the kernel', () => {
    const image = loadFlat(
      pattern(0x20_0000),
      bootOptions({ mode, at: 0x1000, modules: [textModule('m', '')] }),
    )
    expect(faultsOf(image, 16 * MIB)).toEqual([])
    expect(segmentNamed(image, 'stack').address).toBeGreaterThanOrEqual(0x20_1000)
  })

  it('refuses a command line with NUL, which the guest would see the half of', () => {
    expect(errorOf(() => load(mode, { cmdline: 'a\0b' })).code).toBe('ERR_INVALID_ARGUMENT')
    expect(errorOf(() => load(mode, { modules: [textModule('', 'a\0b')] })).code).toBe('ERR_INVALID_ARGUMENT')
  })

  it('27: refuses a command line that memory has no room for', () => {
    const error = errorOf(() => load(mode, { memorySize: 2 * MIB, cmdline: 'x'.repeat(3 * MIB) }))
    expect(error).toMatchObject({ code: 'ERR_BOOT_NO_ROOM', structure: 'boot information' })
  })

  it('27: refuses a module that memory has no room for', () => {
    const module = { bytes: new Uint8Array(16 * MIB), cmdline: '' }
    const error = errorOf(() => load(mode, { modules: [textModule('', ''), module] }))
    expect(error).toMatchObject({ code: 'ERR_IMAGE_TOO_LARGE', structure: 'module 1' })
  })

  it('26: reports that there is no room when the kernel covers all of RAM', () => {
    const error = errorOf(() => loadFlat(pattern(MIB), bootOptions({ mode, at: 0, memorySize: MIB })))
    expect(error.code).toBe('ERR_BOOT_NO_ROOM')
  })
})

describe('the start in protected mode', () => {
  it('has paging off and 32-bit code', () => {
    const { specialRegisters } = load('protected').state
    expect(specialRegisters).toMatchObject({ cr0: 0x31n, cr3: 0n, cr4: 0n, efer: 0n })
    expect(specialRegisters.cs).toMatchObject({ db: 1, l: 0, type: 11 })
  })

  it('passes on the stack, as arguments of a C function, what it passes in registers', () => {
    const image = load('protected', { cmdline: 'x', modules: [textModule('m', 'y')] })
    const { rsp, rdi, rsi, rdx, rcx } = image.state.registers
    const stack = peek(image, Number(rsp), 20)
    const words = [4, 8, 12, 16].map((at) => BigInt(stack.getUint32(at, true)))
    expect(words).toEqual([rdi, rsi, rdx, rcx])
  })

  it('counts as memory what lies below 4 GiB', () => {
    const image = load('protected', { memorySize: 5 * GIB })
    expect(image.state.registers.rdi).toBe(0xc000_0000n)
  })
})

describe('the start in long mode', () => {
  it('has paging, write protection and SSE on, and leaves the rest to the kernel', () => {
    const { specialRegisters } = load('long').state
    expect(specialRegisters).toMatchObject({ cr0: 0x8001_0033n, cr4: 0x620n, efer: 0x500n })
    expect(specialRegisters.cs).toMatchObject({ db: 0, l: 1, type: 11 })
  })

  it('counts all memory', () => {
    expect(load('long', { memorySize: 5 * GIB }).state.registers.rdi).toBe(BigInt(5 * GIB))
  })

  it.each([4096 * 64, 16 * MIB, 4 * GIB, 5 * GIB + 4096, 600 * GIB])(
    'maps with %d bytes of RAM the first 4 GiB, all RAM and the last 2 GiB, and nothing else',
    (memorySize) => {
      const image = load('long', { memorySize, at: 0x8000 })
      expect(faultsOf(image, memorySize)).toEqual([])
      const ramEnd = memorySize > 0xc000_0000 ? memorySize + GIB : memorySize
      const end = BigInt(Math.max(Math.ceil(ramEnd / (2 * MIB)) * 2 * MIB, 4 * GIB))
      for (const address of [0n, 0x1234n, 0xfee0_0000n, 0xffff_ffffn, end / 2n, end - 1n]) {
        expect(walk(image, address)).toBe(address)
      }
      expect(walk(image, end)).toBeUndefined()
      for (const offset of [0n, 0x10_0000n, 0x4000_0000n, 0x7fff_ffffn]) {
        expect(walk(image, 0xffff_ffff_8000_0000n + offset)).toBe(offset)
      }
      for (const hole of [0xffff_ffff_7fff_ffffn, 0xffff_8000_0000_0000n, 0x7fff_ffff_ffffn]) {
        expect(walk(image, hole)).toBeUndefined()
      }
      for (const address of [
        0n,
        end - 1n,
        end,
        0xffff_ffff_7fff_ffffn,
        0xffff_ffff_8000_0000n,
        2n ** 64n - 1n,
      ]) {
        expect(bootTranslate(address, memorySize)).toBe(walk(image, address))
      }
    },
  )

  it('has its structures from 0x1000 on: boot information, page tables, descriptors, stack', () => {
    const image = load('long', { cmdline: 'x' })
    expect(image.segments.map(({ name, address, size }) => [name, address, size])).toEqual([
      ['boot information', 0x1000, 2],
      ['page tables', 0x2000, 0x7000],
      ['descriptors', 0x9000, 0x1000],
      ['stack', 0xa000, 0x4000],
      ['the kernel', 0x10_0000, 64],
    ])
  })
})
