import { describe, expect, it } from 'vitest'
import type { BootImage } from '../../src/boot/boot-image.js'
import { isPvh, loadPvh } from '../../src/boot/pvh.js'
import {
  bootOptions,
  concat,
  type ElfSegmentSpec,
  errorOf,
  faultsOf,
  MIB,
  makeElf,
  pattern,
  peek,
  peekText,
  segmentNamed,
  textModule,
} from '../helpers/images.js'
import { makeNote, protocolFaultsOf, pvhNote, words } from './protocols.js'

const GIB = 2 ** 30
const PT_NOTE = 4
const ENTRY = 0x10_0040
const KERNEL: ElfSegmentSpec = { paddr: 0x10_0000n, bytes: pattern(200) }

/** A kernel with the bytes of its PT_NOTE segments. */
function kernelWith(bits: 32 | 64, ...notes: readonly Uint8Array[]) {
  const segments = notes.map((bytes) => ({ type: PT_NOTE, paddr: 0n, bytes }))
  return makeElf(bits, { segments: [KERNEL, ...segments] })
}

const elfKernel = (bits: 32 | 64 = 64) => kernelWith(bits, pvhNote(ENTRY))
const load = (image: Uint8Array, options = {}) => loadPvh(image, bootOptions(options))
/** An entry of 64 bits. */
const wide = (entry: bigint) => words(Number(entry & 0xffff_ffffn), Number(entry >> 32n))

/** The start information that EBX points to. */
function startInfo(image: BootImage) {
  const at = Number(image.state.registers.rbx)
  expect(at % 8).toBe(0)
  const view = peek(image, at, 56)
  const u32 = (offset: number) => view.getUint32(offset, true)
  const u64 = (offset: number) => Number(view.getBigUint64(offset, true))
  const modules = Array.from({ length: u32(12) }, (_, index) => {
    const entry = peek(image, u64(16) + index * 32, 32)
    return {
      address: Number(entry.getBigUint64(0, true)),
      size: Number(entry.getBigUint64(8, true)),
      cmdline: peekText(image, Number(entry.getBigUint64(16, true))),
      reserved: entry.getBigUint64(24, true),
    }
  })
  const memoryMap = Array.from({ length: u32(48) }, (_, index) => {
    const entry = peek(image, u64(40) + index * 24, 24)
    expect(entry.getUint32(20, true)).toBe(0)
    return [entry.getUint32(16, true), entry.getBigUint64(0, true), entry.getBigUint64(8, true)]
  })
  return { u32, u64, modules, memoryMap }
}

describe.each([32, 64] as const)('a PVH kernel in an ELF%d file', (bits) => {
  it('starts in 32-bit protected mode at the entry point of its note', () => {
    const image = load(elfKernel(bits))
    expect(image).toMatchObject({ format: 'pvh', mode: 'protected', entry: ENTRY })
    expect(image.state.registers).toMatchObject({ rip: BigInt(ENTRY), rflags: 2n })
    expect(image.state.specialRegisters.cs).toMatchObject({ base: 0n, limit: 0xffff_ffff, db: 1, l: 0 })
    expect(protocolFaultsOf(image, 16 * MIB)).toEqual([])
  })

  it('finds CR0, CR4, EFER and TR as the protocol has them', () => {
    const { specialRegisters } = load(elfKernel(bits)).state
    expect(specialRegisters).toMatchObject({ cr0: 0x11n, cr3: 0n, cr4: 0n, efer: 0n })
    expect(specialRegisters.tr).toMatchObject({ base: 0n, limit: 0x67, type: 11 })
  })

  it('finds the same TR in its GDT', () => {
    const image = load(elfKernel(bits))
    const { gdt, tr } = image.state.specialRegisters
    const descriptor = peek(image, Number(gdt.base) + tr.selector, 8).getBigUint64(0, true)
    expect(descriptor).toBe(0x0000_8b00_0000_0067n)
  })

  it('is one whatever its e_entry', () => {
    const segments = [KERNEL, { type: PT_NOTE, paddr: 0n, bytes: pvhNote(ENTRY) }]
    expect(load(makeElf(bits, { segments, entry: 0n })).entry).toBe(ENTRY)
  })

  it('may have its entry point in 8 bytes', () => {
    expect(load(kernelWith(bits, makeNote('Xen', 18, wide(BigInt(ENTRY))))).entry).toBe(ENTRY)
  })

  it('may have other notes and segments of notes before that with the entry point', () => {
    const others = [
      makeNote('GNU', 18, words(1)),
      makeNote('Xen', 17, words(2)),
      makeNote('', 18, words(3)),
      makeNote('Xenon', 18, pattern(7)),
      makeNote('Xen', 1, new Uint8Array(0)),
    ]
    const kernel = kernelWith(bits, makeNote('GNU', 3, pattern(20)), concat(...others, pvhNote(ENTRY)))
    expect(load(kernel).entry).toBe(ENTRY)
  })

  it('may have notes aligned to 8 in a segment that says so', () => {
    const bytes = concat(
      makeNote('GNU', 5, pattern(12), { alignment: 8 }),
      makeNote('Xen', 18, words(ENTRY), { alignment: 8 }),
    )
    const kernel = kernelWith(bits, bytes)
    const programHeader = bits === 32 ? 52 + 32 : 64 + 56
    new DataView(kernel.buffer).setUint32(programHeader + (bits === 32 ? 28 : 48), 8, true)
    expect(load(kernel).entry).toBe(ENTRY)
  })

  it.each([
    ['no segment of notes', []],
    ['an empty one', [new Uint8Array(0)]],
    ['a cut one', [pvhNote(ENTRY).subarray(0, 19)]],
    ['a name of another', [makeNote('Ken', 18, words(ENTRY))]],
    ['another type', [makeNote('Xen', 19, words(ENTRY))]],
    ['a name that goes on', [makeNote('Xen', 18, words(ENTRY), { namesz: 0xffff_ffff })]],
    ['a descriptor that goes on', [makeNote('Xen', 18, words(ENTRY), { descsz: 0xffff_ffff })]],
  ])('26: is none with %s', (_, notes) => {
    const kernel = kernelWith(bits, ...notes)
    expect(isPvh(kernel)).toBe(false)
    const error = errorOf(() => load(kernel))
    expect(error).toMatchObject({ code: 'ERR_IMAGE_FORMAT', field: 'n_type' })
    expect(error.message).toContain('PHYS32_ENTRY')
  })

  it.each([
    ['past the end', { offset: 0xffff_ff00n }],
    ['longer than the file', { filesz: 0xffff_ffffn }],
  ])('26: is none when its notes lie %s', (_, lie) => {
    const note = { type: PT_NOTE, paddr: 0n, bytes: pvhNote(ENTRY), ...lie }
    expect(isPvh(makeElf(bits, { segments: [KERNEL, note] }))).toBe(false)
  })

  it.each([0, 3, 5, 12])('26: is refused with an entry point of %d bytes', (size) => {
    const error = errorOf(() => load(kernelWith(bits, makeNote('Xen', 18, pattern(size)))))
    expect(error).toMatchObject({ code: 'ERR_IMAGE_FORMAT', field: 'n_descsz' })
  })

  it.each([0, 0xf_ffff, 0x10_00c8, 0xffff_ffff])(
    '26: is refused with the entry point %d, outside the kernel',
    (entry) => {
      const error = errorOf(() => load(kernelWith(bits, pvhNote(entry))))
      expect(error).toMatchObject({ code: 'ERR_IMAGE_FORMAT', field: 'desc', received: entry })
    },
  )

  it('26: is refused with an entry point at 4 GiB or above', () => {
    for (const entry of [2n ** 32n, 2n ** 64n - 1n]) {
      const error = errorOf(() => load(kernelWith(bits, makeNote('Xen', 18, wide(entry)))))
      expect(error).toMatchObject({ code: 'ERR_IMAGE_FORMAT', field: 'desc', entry })
    }
  })

  it('26: is looked for in the first 64 KiB of notes, however many segments there are', () => {
    // Each segment is the whole of a file that is full of notes.
    const notes = new Uint8Array(3 * MIB)
    const segment = { type: PT_NOTE, paddr: 0n, bytes: new Uint8Array(0) }
    const segments = Array.from({ length: 60_000 }, (_, index) =>
      index === 0 ? { ...segment, bytes: notes } : { ...segment, offset: 0n, filesz: BigInt(3 * MIB) },
    )
    expect(isPvh(makeElf(bits, { segments: [KERNEL, ...segments] }))).toBe(false)
    const behind = (size: number) => concat(makeNote('GNU', 1, new Uint8Array(size - 16)), pvhNote(ENTRY))
    const [far, farther] = [behind(0x1_0000 - 20), behind(0x1_0000 - 16)]
    expect([isPvh(kernelWith(bits, far)), isPvh(kernelWith(bits, farther))]).toEqual([true, false])
  })
})

describe('the start information of a PVH kernel', () => {
  it('is of version 1, without flags', () => {
    const { u32 } = startInfo(load(elfKernel()))
    expect([u32(0), u32(4), u32(8), u32(52)]).toEqual([0x336e_c578, 1, 0, 0])
  })

  it('has the command line exactly as it was given', () => {
    for (const cmdline of ['', ' a  b ', 'ä="x y"', 'x'.repeat(100_000)]) {
      const image = load(elfKernel(), { cmdline })
      expect(peekText(image, startInfo(image).u64(24))).toBe(cmdline)
    }
  })

  it('has modules on pages of their own, with address, size and text', () => {
    const modules = [textModule('one', 'mod 1'), textModule('', ''), textModule('x'.repeat(5000), 'mod 3')]
    const image = load(elfKernel(), { modules })
    const found = startInfo(image).modules
    expect(found).toHaveLength(3)
    found.forEach(({ address, size, cmdline, reserved }, index) => {
      const { bytes, cmdline: text } = modules[index]!
      expect(segmentNamed(image, `module ${index}`)).toMatchObject({ address, bytes })
      expect(address % 4096).toBe(0)
      expect([size, cmdline, reserved]).toEqual([bytes.length, text, 0n])
    })
    expect(protocolFaultsOf(image, 16 * MIB)).toEqual([])
  })

  it('has no module list when there are no modules', () => {
    const { u32, u64 } = startInfo(load(elfKernel()))
    expect([u32(12), u64(16)]).toEqual([0, 0])
  })

  it('has the address of the ACPI root pointer, or 0', () => {
    expect(startInfo(load(elfKernel())).u64(32)).toBe(0)
    expect(startInfo(load(elfKernel(), { rsdpAddress: 0xe_0000 })).u64(32)).toBe(0xe_0000)
  })

  it('has a memory map with low RAM, the reserved areas, and RAM on both sides of the hole', () => {
    expect(startInfo(load(elfKernel(), { memorySize: 5 * GIB })).memoryMap).toEqual([
      [1, 0n, 0xa_0000n],
      [2, 0xa_0000n, 0x6_0000n],
      [1, 0x10_0000n, 0xbff0_0000n],
      [2, 0xc000_0000n, 0x4000_0000n],
      [1, 0x1_0000_0000n, 0x8000_0000n],
    ])
  })

  it('lies elsewhere when the kernel lies where it would be', () => {
    const kernel = { ...KERNEL, paddr: 0x1000n, memsz: 0x9_f000n }
    const note = { type: PT_NOTE, paddr: 0n, bytes: pvhNote(0x1000) }
    const image = load(makeElf(64, { segments: [kernel, note] }))
    expect(image.state.registers.rbx).toBe(0x10_0000n)
    expect(protocolFaultsOf(image, 16 * MIB)).toEqual([])
  })
})

it('a PVH start differs from what VT-x wants in CR0.NE alone, which KVM sets', () => {
  expect(faultsOf(load(elfKernel()), 16 * MIB)).toEqual(['cr0-fixed: NE is 0'])
})

it('a file that is not ELF is no PVH kernel', () => {
  expect(isPvh(pattern(100))).toBe(false)
  expect(errorOf(() => load(pattern(100)))).toMatchObject({ code: 'ERR_IMAGE_FORMAT', field: 'e_ident' })
})

it('27: refuses modules and command lines of a PVH kernel that memory has no room for', () => {
  const modules = [{ bytes: new Uint8Array(16 * MIB), cmdline: '' }]
  expect(errorOf(() => load(elfKernel(), { modules }))).toMatchObject({
    code: 'ERR_IMAGE_TOO_LARGE',
    structure: 'module 0',
  })
  expect(errorOf(() => load(elfKernel(), { cmdline: 'x'.repeat(16 * MIB) }))).toMatchObject({
    code: 'ERR_BOOT_NO_ROOM',
    structure: 'boot information',
  })
  expect(errorOf(() => load(elfKernel(), { cmdline: 'a\0b' })).code).toBe('ERR_INVALID_ARGUMENT')
})
