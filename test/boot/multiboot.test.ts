import { describe, expect, it } from 'vitest'
import type { BootImage } from '../../src/boot/boot-image.js'
import { loadMultiboot } from '../../src/boot/multiboot.js'
import {
  bootOptions,
  concat,
  errorOf,
  faultsOf,
  MIB,
  type MultibootHeaderSpec,
  makeElf,
  makeMultibootHeader,
  pattern,
  peek,
  peekText,
  segmentNamed,
  textModule,
} from '../helpers/images.js'

const CODE = pattern(100)
const GIB = 2 ** 30

/** An ELF kernel with a header at the start of its segment. */
function elfKernel(bits: 32 | 64 = 32, header: MultibootHeaderSpec = {}, vaddr = 0x10_0000n) {
  const bytes = concat(makeMultibootHeader(header), CODE)
  return makeElf(bits, { segments: [{ paddr: 0x10_0000n, vaddr, bytes }], entry: vaddr + 48n })
}

/** A kernel with address fields: 16 bytes, then the header, then code; it goes to 0x100000. */
function addressedKernel(header: MultibootHeaderSpec = {}) {
  const fields = { headerAddr: 0x10_0010, loadAddr: 0x10_0000, entryAddr: 0x10_0040 }
  return concat(pattern(16), makeMultibootHeader({ flags: 0x1_0003, ...fields, ...header }), CODE)
}

const ADDRESSED_SIZE = 16 + 48 + 100

/** The boot information that EBX points to. */
function information(image: BootImage) {
  const at = Number(image.state.registers.rbx)
  const view = peek(image, at, 116)
  const u32 = (offset: number) => view.getUint32(offset, true)
  const memoryMap: [number, bigint, bigint][] = []
  for (let entry = u32(48); entry < u32(48) + u32(44); ) {
    const fields = peek(image, entry, 24)
    memoryMap.push([fields.getUint32(20, true), fields.getBigUint64(4, true), fields.getBigUint64(12, true)])
    entry += fields.getUint32(0, true) + 4
  }
  const modules = Array.from({ length: u32(20) }, (_, index) => {
    const fields = peek(image, u32(24) + index * 16, 16)
    return {
      start: fields.getUint32(0, true),
      end: fields.getUint32(4, true),
      cmdline: peekText(image, fields.getUint32(8, true)),
      reserved: fields.getUint32(12, true),
    }
  })
  return { at, view, u32, memoryMap, modules }
}

describe('a Multiboot kernel', () => {
  it('starts in protected mode with the magic number in EAX and its boot information in EBX', () => {
    const image = loadMultiboot(elfKernel(), bootOptions())
    expect(image).toMatchObject({ format: 'multiboot', mode: 'protected', entry: 0x10_0030 })
    const { registers, specialRegisters } = image.state
    expect(registers).toMatchObject({ rax: 0x2bad_b002n, rip: 0x10_0030n, rflags: 2n })
    expect(specialRegisters).toMatchObject({ cr0: 0x31n, efer: 0n })
    expect(information(image).at % 4).toBe(0)
    expect(faultsOf(image, 16 * MIB)).toEqual([])
  })

  it('finds the fields that flags say are valid, and no others', () => {
    const { u32, view } = information(loadMultiboot(elfKernel(), bootOptions()))
    expect(u32(0)).toBe(0b1_0010_0100_1101)
    // boot_device, syms, drives, config_table, apm_table, vbe: not valid, and zero.
    for (const offset of [12, 28, 32, 36, 40, 52, 56, 60, 68, 72, 76, 80, 84]) expect(u32(offset)).toBe(0)
    expect(view.byteLength).toBe(116)
  })

  it('finds the command line exactly as it was given', () => {
    for (const cmdline of ['', ' a  b ', 'ä="x y"', 'x'.repeat(100_000)]) {
      const image = loadMultiboot(elfKernel(), bootOptions({ cmdline }))
      expect(peekText(image, information(image).u32(16))).toBe(cmdline)
    }
  })

  it('finds the name of its loader', () => {
    const image = loadMultiboot(elfKernel(), bootOptions())
    expect(peekText(image, information(image).u32(64))).toBe('nodevisor')
  })

  it('finds modules on pages of their own, with first byte, byte after the last, and text', () => {
    const modules = [textModule('one', 'mod 1'), textModule('', ''), textModule('x'.repeat(5000), 'mod 3')]
    const image = loadMultiboot(elfKernel(), bootOptions({ modules }))
    const found = information(image).modules
    expect(found).toHaveLength(3)
    found.forEach(({ start, end, cmdline, reserved }, index) => {
      const segment = segmentNamed(image, `module ${index}`)
      expect(segment).toMatchObject({ address: start, bytes: modules[index]!.bytes })
      expect(start % 4096).toBe(0)
      expect(segment.size % 4096).toBe(0)
      expect(end - start).toBe(modules[index]!.bytes.length)
      expect(cmdline).toBe(modules[index]!.cmdline)
      expect(reserved).toBe(0)
    })
    expect(faultsOf(image, 16 * MIB)).toEqual([])
  })

  it('finds no modules when there are none', () => {
    expect(information(loadMultiboot(elfKernel(), bootOptions())).modules).toEqual([])
  })

  it('finds the text screen: 80 by 25 cells of two bytes at 0xb8000', () => {
    const { view, u32 } = information(loadMultiboot(elfKernel(32, { flags: 7 }), bootOptions()))
    expect(view.getBigUint64(88, true)).toBe(0xb8000n)
    expect([u32(96), u32(100), u32(104)]).toEqual([160, 80, 25])
    expect([view.getUint8(108), view.getUint8(109)]).toEqual([16, 2])
  })

  it.each([
    [2 * MIB, 640, 1024],
    [16 * MIB, 640, 15 * 1024],
    [5 * GIB, 640, 3 * 1024 * 1024 - 1024],
  ])('with %d bytes of memory finds %d KiB of lower and %d KiB of upper', (memorySize, lower, upper) => {
    const { u32 } = information(loadMultiboot(elfKernel(), bootOptions({ memorySize })))
    expect([u32(4), u32(8)]).toEqual([lower, upper])
  })

  it('finds little memory as it is', () => {
    const kernel = addressedKernel({ headerAddr: 0x8010, loadAddr: 0x8000, entryAddr: 0x8040 })
    const image = loadMultiboot(kernel, bootOptions({ memorySize: 0x4_0000 }))
    const { u32, memoryMap } = information(image)
    expect([u32(4), u32(8)]).toEqual([256, 0])
    expect(memoryMap).toEqual([
      [1, 0n, 0x4_0000n],
      [2, 0xa_0000n, 0x6_0000n],
      [2, 0xc000_0000n, 0x4000_0000n],
    ])
    expect(faultsOf(image, 0x4_0000)).toEqual([])
  })

  it('finds a memory map with low RAM, the reserved areas, and RAM on both sides of the hole', () => {
    const { memoryMap } = information(loadMultiboot(elfKernel(), bootOptions({ memorySize: 5 * GIB })))
    expect(memoryMap).toEqual([
      [1, 0n, 0xa_0000n],
      [2, 0xa_0000n, 0x6_0000n],
      [1, 0x10_0000n, 0xbff0_0000n],
      [2, 0xc000_0000n, 0x4000_0000n],
      [1, 0x1_0000_0000n, 0x8000_0000n],
    ])
  })

  it('has its boot information elsewhere when it lies where that would be', () => {
    const bytes = concat(makeMultibootHeader(), CODE)
    const kernel = makeElf(32, { segments: [{ paddr: 0x1000n, bytes, memsz: 0x9_f000n }], entry: 0x1030n })
    const image = loadMultiboot(kernel, bootOptions())
    expect(information(image).at).toBe(0x10_0000)
    expect(faultsOf(image, 16 * MIB)).toEqual([])
  })

  it.each([3, 4, 15])('is refused when it requires what bit %d of flags stands for', (bit) => {
    const error = errorOf(() => loadMultiboot(elfKernel(32, { flags: 1 << bit }), bootOptions()))
    expect(error).toMatchObject({ code: 'ERR_IMAGE_FORMAT', field: 'flags' })
    expect(error.message).toContain(`0x${(1 << bit).toString(16)}`)
  })

  it('may wish for what bits 17 to 31 of flags stand for', () => {
    expect(loadMultiboot(elfKernel(32, { flags: 0xfffe_0003 }), bootOptions()).format).toBe('multiboot')
  })

  it('has its header at a multiple of 4 within the first 8192 bytes', () => {
    const headerAt = (offset: number) => {
      const headerAddr = 0x10_0000 + offset
      const header = makeMultibootHeader({
        flags: 0x1_0000,
        headerAddr,
        loadAddr: 0x10_0000,
        entryAddr: 0x10_0000,
      }).subarray(0, 32)
      return loadMultiboot(concat(new Uint8Array(offset), header, CODE), bootOptions())
    }
    expect(headerAt(8192 - 32).entry).toBe(0x10_0000)
    expect(headerAt(4).entry).toBe(0x10_0000)
    for (const offset of [1, 2, 3, 8191, 8192]) {
      expect(errorOf(() => headerAt(offset))).toMatchObject({ code: 'ERR_IMAGE_FORMAT', field: 'magic' })
    }
    expect(errorOf(() => headerAt(8192 - 28))).toMatchObject({ code: 'ERR_IMAGE_FORMAT', field: 'magic' })
  })

  it('26: is refused when the checksum of its header is wrong', () => {
    const error = errorOf(() => loadMultiboot(elfKernel(32, { checksum: 0 }), bootOptions()))
    expect(error).toMatchObject({ code: 'ERR_IMAGE_FORMAT', field: 'magic' })
  })

  it('may have something like a header before its header', () => {
    const decoy = makeMultibootHeader({ checksum: 1 })
    const bytes = concat(decoy, makeMultibootHeader(), CODE)
    const kernel = makeElf(32, { segments: [{ paddr: 0x10_0000n, bytes }] })
    expect(loadMultiboot(kernel, bootOptions()).format).toBe('multiboot')
  })

  it('is refused when it is neither ELF nor has address fields', () => {
    const error = errorOf(() => loadMultiboot(concat(makeMultibootHeader(), CODE), bootOptions()))
    expect(error).toMatchObject({ code: 'ERR_IMAGE_FORMAT', field: 'flags' })
  })
})

describe('a Multiboot kernel in an ELF file', () => {
  it('starts at the physical address of its entry, as ELF32', () => {
    const image = loadMultiboot(elfKernel(32, {}, 0xc010_0000n), bootOptions())
    expect(image.state.registers.rip).toBe(0x10_0030n)
  })

  it('starts at the physical address of its entry and in 32-bit mode, as ELF64', () => {
    const image = loadMultiboot(elfKernel(64, {}, 0xffff_ffff_8010_0000n), bootOptions())
    expect(image).toMatchObject({ format: 'multiboot', mode: 'protected', entry: 0x10_0030 })
    expect(image.state.registers.rip).toBe(0x10_0030n)
    expect(faultsOf(image, 16 * MIB)).toEqual([])
  })

  it('is refused when it is ELF64 and starts above 4 GiB', () => {
    const bytes = concat(makeMultibootHeader(), CODE)
    const kernel = makeElf(64, { segments: [{ paddr: 0x1_0000_0000n, bytes }] })
    const error = errorOf(() => loadMultiboot(kernel, bootOptions({ memorySize: 4 * GIB })))
    expect(error).toMatchObject({ code: 'ERR_IMAGE_FORMAT', field: 'e_entry', entry: 0x1_0000_0000n })
  })

  it('is loaded by the address fields of its header when it has them', () => {
    const fields = { headerAddr: 0x20_0000, loadAddr: 0x20_0000, entryAddr: 0x20_0030 }
    const image = loadMultiboot(elfKernel(32, { flags: 0x1_0003, ...fields }), bootOptions())
    expect(image.entry).toBe(0x20_0030)
    const kernel = segmentNamed(image, 'the kernel')
    expect(kernel.address).toBe(0x20_0000)
    expect(new DataView(kernel.bytes.buffer, kernel.bytes.byteOffset).getUint32(0, true)).toBe(0x1bad_b002)
  })

  it('26: is refused when it is truncated', () => {
    const kernel = elfKernel()
    const error = errorOf(() => loadMultiboot(kernel.subarray(0, kernel.length - 1), bootOptions()))
    expect(error.code).toBe('ERR_IMAGE_TRUNCATED')
  })
})

describe('a Multiboot kernel with address fields', () => {
  const load = (header: MultibootHeaderSpec = {}) => loadMultiboot(addressedKernel(header), bootOptions())

  it('is loaded to its end and without bss when their fields are zero', () => {
    const image = load()
    expect(image.entry).toBe(0x10_0040)
    expect(segmentNamed(image, 'the kernel')).toMatchObject({ address: 0x10_0000, size: ADDRESSED_SIZE })
    expect([...segmentNamed(image, 'the kernel').bytes.subarray(0, 16)]).toEqual([...pattern(16)])
    expect(faultsOf(image, 16 * MIB)).toEqual([])
  })

  it('is loaded from where load_addr is in the file, to load_end_addr, with bss to bss_end_addr', () => {
    const image = load({ loadAddr: 0x10_0004, loadEndAddr: 0x10_0050, bssEndAddr: 0x10_2000 })
    const kernel = segmentNamed(image, 'the kernel')
    expect(kernel).toMatchObject({ address: 0x10_0004, size: 0x1ffc })
    expect([...kernel.bytes.subarray(0, 12)]).toEqual([...pattern(16).subarray(4)])
    expect(kernel.bytes).toHaveLength(0x4c)
    expect(faultsOf(image, 16 * MIB)).toEqual([])
  })

  it.each([
    ['load_addr', { loadAddr: 0x10_0014 }],
    ['load_addr', { headerAddr: 0 }],
    ['load_addr', { loadAddr: 0xf_fffc }],
    ['load_addr', { loadAddr: 0 }],
    ['load_end_addr', { loadEndAddr: 0xf_ffff }],
    ['load_end_addr', { loadEndAddr: 1 }],
    ['bss_end_addr', { bssEndAddr: 0x10_0000 + ADDRESSED_SIZE - 1 }],
    ['bss_end_addr', { loadEndAddr: 0x10_0050, bssEndAddr: 0x10_004f }],
    ['entry_addr', { entryAddr: 0xf_ffff }],
    ['entry_addr', { entryAddr: 0x10_0000 + ADDRESSED_SIZE }],
    ['entry_addr', { loadEndAddr: 0x10_0000 }],
    ['entry_addr', { entryAddr: 0xffff_ffff }],
  ])('26: is refused when %s is a lie: %o', (field, lie) => {
    expect(errorOf(() => load(lie))).toMatchObject({ code: 'ERR_IMAGE_FORMAT', field })
  })

  it('26: is refused as truncated when load_end_addr lies past its end', () => {
    for (const loadEndAddr of [0x10_0001 + ADDRESSED_SIZE, 0xffff_ffff]) {
      expect(errorOf(() => load({ loadEndAddr })).code).toBe('ERR_IMAGE_TRUNCATED')
    }
    expect(load({ loadEndAddr: 0x10_0000 + ADDRESSED_SIZE }).entry).toBe(0x10_0040)
  })

  it('26: is refused as truncated when the file ends within its header', () => {
    for (const end of [28, 44]) {
      const image = addressedKernel().subarray(0, end)
      expect(errorOf(() => loadMultiboot(image, bootOptions())).code).toBe('ERR_IMAGE_TRUNCATED')
    }
  })

  it('26: is refused when it does not fit into RAM, without allocating its bss', () => {
    const error = errorOf(() => load({ bssEndAddr: 0xffff_ffff }))
    expect(error).toMatchObject({ code: 'ERR_IMAGE_TOO_LARGE', address: 0x10_0000n })
  })
})

it('27: refuses a module that memory has no room for', () => {
  const modules = [{ bytes: new Uint8Array(16 * MIB), cmdline: '' }]
  expect(errorOf(() => loadMultiboot(elfKernel(), bootOptions({ modules })))).toMatchObject({
    code: 'ERR_IMAGE_TOO_LARGE',
    structure: 'module 0',
  })
})

it('27: refuses a Multiboot command line that memory has no room for', () => {
  const cmdline = 'x'.repeat(16 * MIB)
  expect(errorOf(() => loadMultiboot(elfKernel(), bootOptions({ cmdline })))).toMatchObject({
    code: 'ERR_BOOT_NO_ROOM',
    structure: 'boot information',
  })
})
