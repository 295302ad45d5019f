import { describe, expect, it } from 'vitest'
import type { BootImage } from '../../src/boot/boot-image.js'
import { isMultiboot2, loadMultiboot2 } from '../../src/boot/multiboot2.js'
import {
  bootOptions,
  concat,
  errorOf,
  faultsOf,
  MIB,
  makeElf,
  pattern,
  peek,
  segmentNamed,
  textModule,
} from '../helpers/images.js'
import {
  addSections,
  type HeaderTagSpec,
  type Multiboot2HeaderSpec,
  makeMultiboot2Header,
  SECTION_FIELDS,
  type SectionSpec,
} from './protocols.js'

const CODE = pattern(100)
const GIB = 2 ** 30
const ENTRY = 0x10_1000

/** The header as it begins a segment of an ELF file, whose own headers end at a multiple of 4 or 8. */
const inElf = (bits: 32 | 64, header: Uint8Array) => concat(new Uint8Array(bits === 32 ? 4 : 0), header)

/** An ELF kernel: its header in a segment at 0x100000, its code at 0x101000, where it starts. */
function elfKernel(bits: 32 | 64 = 32, header: Multiboot2HeaderSpec = {}, base = 0n) {
  const code = { paddr: BigInt(ENTRY), vaddr: base + BigInt(ENTRY), bytes: CODE }
  const first = {
    paddr: 0x10_0000n,
    vaddr: base + 0x10_0000n,
    bytes: inElf(bits, makeMultiboot2Header(header)),
  }
  return makeElf(bits, { segments: [first, code], entry: code.vaddr })
}

const withTags = (...tags: readonly HeaderTagSpec[]) => elfKernel(32, { tags })

interface AddressSpec {
  readonly headerAddr?: number
  readonly loadAddr?: number
  readonly loadEndAddr?: number
  readonly bssEndAddr?: number
  readonly entryAddr?: number
}

/** A kernel with an address tag: 16 bytes, then the header of 64, then code; it goes to 0x100000. */
function addressedKernel(spec: AddressSpec = {}) {
  const { headerAddr = 0x10_0010, loadAddr = 0x10_0000, loadEndAddr = 0, bssEndAddr = 0 } = spec
  const address = { type: 2, fields: [headerAddr, loadAddr, loadEndAddr, bssEndAddr] }
  const entry = { type: 3, fields: [spec.entryAddr ?? 0x10_0050] }
  return concat(pattern(16), makeMultiboot2Header({ tags: [address, entry] }), CODE)
}

const ADDRESSED_SIZE = 16 + 64 + 100

interface Tag {
  readonly type: number
  /** What follows type and size. */
  readonly body: DataView
}

/** The boot information that EBX points to. Fails where a tag is not where one has to be. */
function information(image: BootImage) {
  const at = Number(image.state.registers.rbx)
  expect(at % 8).toBe(0)
  const total = peek(image, at, 8).getUint32(0, true)
  expect(peek(image, at, 8).getUint32(4, true)).toBe(0)
  const tags: Tag[] = []
  let offset = 8
  for (;;) {
    const head = peek(image, at + offset, 8)
    const [type, size] = [head.getUint32(0, true), head.getUint32(4, true)]
    tags.push({ type, body: peek(image, at + offset + 8, size - 8) })
    const next = Math.ceil((offset + size) / 8) * 8
    const padding = peek(image, at + offset + size, next - offset - size)
    for (let index = 0; index < padding.byteLength; index++) expect(padding.getUint8(index)).toBe(0)
    offset = next
    if (type === 0) break
  }
  expect(offset).toBe(total)
  expect(segmentNamed(image, 'boot information')).toMatchObject({ address: at, size: total })
  const tag = (type: number) => {
    const found = tags.filter((tag) => tag.type === type)
    expect(found, `tags of type ${type}`).toHaveLength(1)
    return found[0]!.body
  }
  return { tags, types: tags.map(({ type }) => type), tag }
}

/** A body of words. */
const wordsOf = (body: DataView) =>
  Array.from({ length: body.byteLength >> 2 }, (_, index) => body.getUint32(index * 4, true))

/** A zero-terminated text to the end of a body. */
function textOf(body: DataView, offset = 0): string {
  const bytes = new Uint8Array(body.buffer, body.byteOffset + offset, body.byteLength - offset)
  expect(bytes.indexOf(0)).toBe(bytes.length - 1)
  return new TextDecoder().decode(bytes.subarray(0, -1))
}

function memoryMapOf(image: BootImage) {
  const body = information(image).tag(6)
  expect(wordsOf(body).slice(0, 2)).toEqual([24, 0])
  return Array.from({ length: (body.byteLength - 8) / 24 }, (_, index) => {
    const at = 8 + index * 24
    expect(body.getUint32(at + 20, true)).toBe(0)
    return [body.getUint32(at + 16, true), body.getBigUint64(at, true), body.getBigUint64(at + 8, true)]
  })
}

const load = (image: Uint8Array, options = {}) => loadMultiboot2(image, bootOptions(options))

describe('a Multiboot 2 kernel', () => {
  it('starts in protected mode with the magic number in EAX and its boot information in EBX', () => {
    const image = load(elfKernel())
    expect(image).toMatchObject({ format: 'multiboot2', mode: 'protected', entry: ENTRY })
    const { registers, specialRegisters } = image.state
    expect(registers).toMatchObject({ rax: 0x36d7_6289n, rip: BigInt(ENTRY), rflags: 2n })
    expect(specialRegisters).toMatchObject({ cr0: 0x31n, cr3: 0n, cr4: 0n, efer: 0n })
    expect(faultsOf(image, 16 * MIB)).toEqual([])
  })

  it('finds one tag of each kind that this machine has, and no others', () => {
    expect(information(load(elfKernel())).types).toEqual([1, 2, 4, 6, 8, 0])
  })

  it('finds the command line exactly as it was given', () => {
    for (const cmdline of ['', ' a  b ', 'ä="x y"', '1234567', '12345678', 'x'.repeat(100_000)]) {
      expect(textOf(information(load(elfKernel(), { cmdline })).tag(1))).toBe(cmdline)
    }
  })

  it('finds the name of its loader', () => {
    expect(textOf(information(load(elfKernel())).tag(2))).toBe('nodevisor')
  })

  it('finds modules on pages of their own, with first byte, byte after the last, and text', () => {
    const modules = [textModule('one', 'mod 1'), textModule('', ''), textModule('x'.repeat(5000), 'mod 3')]
    const image = load(withTags({ type: 6 }), { modules })
    const found = information(image).tags.filter(({ type }) => type === 3)
    expect(found).toHaveLength(3)
    found.forEach(({ body }, index) => {
      const [start, end] = [body.getUint32(0, true), body.getUint32(4, true)]
      const { bytes, cmdline } = modules[index]!
      expect(segmentNamed(image, `module ${index}`)).toMatchObject({ address: start, bytes })
      expect(start % 4096).toBe(0)
      expect(end - start).toBe(bytes.length)
      expect(textOf(body, 8)).toBe(cmdline)
    })
    expect(faultsOf(image, 16 * MIB)).toEqual([])
  })

  it.each([
    [2 * MIB, 640, 1024],
    [16 * MIB, 640, 15 * 1024],
    [5 * GIB, 640, 3 * 1024 * 1024 - 1024],
  ])('with %d bytes of memory finds %d KiB of lower and %d KiB of upper', (memorySize, lower, upper) => {
    expect(wordsOf(information(load(elfKernel(), { memorySize })).tag(4))).toEqual([lower, upper])
  })

  it('finds a memory map with low RAM, the reserved areas, and RAM on both sides of the hole', () => {
    expect(memoryMapOf(load(elfKernel(), { memorySize: 5 * GIB }))).toEqual([
      [1, 0n, 0xa_0000n],
      [2, 0xa_0000n, 0x6_0000n],
      [1, 0x10_0000n, 0xbff0_0000n],
      [2, 0xc000_0000n, 0x4000_0000n],
      [1, 0x1_0000_0000n, 0x8000_0000n],
    ])
  })

  it('finds little memory as it is', () => {
    const addresses = { headerAddr: 0x8010, loadAddr: 0x8000, entryAddr: 0x8050 }
    const image = load(addressedKernel(addresses), { memorySize: 0x4_0000 })
    expect(wordsOf(information(image).tag(4))).toEqual([256, 0])
    expect(memoryMapOf(image)).toEqual([
      [1, 0n, 0x4_0000n],
      [2, 0xa_0000n, 0x6_0000n],
      [2, 0xc000_0000n, 0x4000_0000n],
    ])
    expect(faultsOf(image, 0x4_0000)).toEqual([])
  })

  it('finds the text screen, whatever framebuffer its header prefers', () => {
    for (const kernel of [elfKernel(), withTags({ type: 5, fields: [1024, 768, 32] })]) {
      const body = information(load(kernel)).tag(8)
      expect(wordsOf(body)).toEqual([0xb8000, 0, 160, 80, 25, 0x0210])
    }
  })

  it('finds the ACPI root pointer that its machine has, and only then', () => {
    const rsdp = pattern(36)
    const { tag } = information(load(elfKernel(), { rsdp }))
    expect([...new Uint8Array(tag(15).buffer)]).toEqual([...rsdp])
    expect(information(load(elfKernel(), { rsdp: undefined })).types).not.toContain(15)
  })

  it('has its boot information elsewhere when it lies where that would be', () => {
    const bytes = concat(inElf(32, makeMultiboot2Header()), CODE)
    const kernel = makeElf(32, { segments: [{ paddr: 0x1000n, bytes, memsz: 0x9_f000n }], entry: 0x1030n })
    const image = load(kernel)
    expect(image.state.registers.rbx).toBe(0x10_0000n)
    expect(faultsOf(image, 16 * MIB)).toEqual([])
  })
})

describe('the header of a Multiboot 2 kernel', () => {
  it('lies at a multiple of 8 within the first 32768 bytes, with all of its tags', () => {
    const headerAt = (offset: number) => {
      const tags = [
        { type: 2, fields: [0x10_0000 + offset, 0xffff_ffff, 0, 0] },
        { type: 3, fields: [0x10_0000] },
      ]
      return load(concat(new Uint8Array(offset), makeMultiboot2Header({ tags }), CODE))
    }
    expect(headerAt(32768 - 64).entry).toBe(0x10_0000)
    expect(headerAt(8).entry).toBe(0x10_0000)
    for (const offset of [1, 2, 4, 12, 32767, 32768, 32768 - 56]) {
      expect(errorOf(() => headerAt(offset))).toMatchObject({ code: 'ERR_IMAGE_FORMAT', field: 'magic' })
    }
  })

  it('26: is none when its checksum or magic is wrong', () => {
    for (const header of [{ checksum: 0 }, { magic: 0xe852_50d7 }, { checksum: 0x17ad_af19 }]) {
      const error = errorOf(() => load(elfKernel(32, header)))
      expect(error).toMatchObject({ code: 'ERR_IMAGE_FORMAT', field: 'magic' })
      expect(isMultiboot2(elfKernel(32, header))).toBe(false)
    }
  })

  it('may have something like a header before it', () => {
    const decoy = makeMultiboot2Header({ checksum: 1 })
    const bytes = concat(inElf(32, decoy), makeMultiboot2Header(), CODE)
    expect(load(makeElf(32, { segments: [{ paddr: 0x10_0000n, bytes }] })).format).toBe('multiboot2')
  })

  it('26: is refused when it is for another architecture, with a hint for 64-bit kernels', () => {
    const error = errorOf(() => load(elfKernel(64, { architecture: 4 })))
    expect(error).toMatchObject({ code: 'ERR_IMAGE_FORMAT', field: 'architecture', architecture: 4 })
    expect(error.message).toContain('64-bit')
  })

  it.each([
    ['shorter than itself', { length: 15 }],
    ['without room for an end tag', { length: 16 }],
    ['that leaves out the end tag', { length: 24, tags: [{ type: 6 }] }],
    ['without an end tag', { end: false, tags: [{ type: 6 }] }],
  ])('26: is refused with a length %s', (_, header) => {
    const error = errorOf(() => load(elfKernel(32, header)))
    expect(error).toMatchObject({ code: 'ERR_IMAGE_FORMAT', field: 'header_length' })
  })

  it('26: is refused with a length past the end of the file or of the search', () => {
    expect(errorOf(() => load(elfKernel(32, { length: 5000 }))).code).toBe('ERR_IMAGE_TRUNCATED')
    expect(errorOf(() => load(elfKernel(32, { length: 0xffff_fff8 }))).code).toBe('ERR_IMAGE_TRUNCATED')
    const long = concat(elfKernel(32, { length: 33_000 }), new Uint8Array(40_000))
    expect(errorOf(() => load(long))).toMatchObject({ code: 'ERR_IMAGE_FORMAT', field: 'magic' })
  })

  it.each([
    ['smaller than a tag', { type: 6, size: 7 }],
    ['of zero', { type: 6, size: 0 }],
    ['past the end', { type: 6, size: 0xffff_ffff }],
    ['too small for an address tag', { type: 2, fields: [0, 0, 0] }],
    ['too small for an entry address tag', { type: 3 }],
    ['too small for console flags', { type: 4 }],
    ['too small for a relocatable tag', { type: 10, fields: [0, 0, 0] }],
  ])('26: is refused with a tag whose size is %s', (_, tag) => {
    const error = errorOf(() => load(withTags(tag)))
    expect(error).toMatchObject({ code: 'ERR_IMAGE_FORMAT', field: 'size', type: tag.type })
  })

  it('has each tag at a multiple of 8, whatever the size of that before it', () => {
    const error = errorOf(() => load(withTags({ type: 3, fields: [0x10_1008] }, { type: 77 })))
    expect(error).toMatchObject({ code: 'ERR_IMAGE_FORMAT', field: 'type', type: 77 })
  })

  it('ends at its end tag, whatever follows', () => {
    const tags = [{ type: 0 }, { type: 77 }]
    expect(load(withTags(...tags)).format).toBe('multiboot2')
  })
})

describe('a tag in the header of a Multiboot 2 kernel', () => {
  it.each([11, 77, 0xffff])('of the unknown type %d is refused when it is required', (type) => {
    const error = errorOf(() => load(withTags({ type })))
    expect(error).toMatchObject({ code: 'ERR_IMAGE_FORMAT', field: 'type', type })
    expect(error.message).toContain(`type ${type}`)
    expect(load(withTags({ type, optional: true, fields: [1, 2] })).format).toBe('multiboot2')
  })

  it.each([
    ['framebuffer', { type: 5, fields: [0, 0, 0] }],
    ['module alignment', { type: 6 }],
    ['EFI boot services', { type: 7 }],
    ['EFI i386 entry address', { type: 8, fields: [0x1234] }],
    ['EFI amd64 entry address', { type: 9, fields: [0x1234] }],
  ])('for %s changes nothing', (_, tag) => {
    const image = load(withTags(tag))
    expect(image.entry).toBe(ENTRY)
    expect(information(image).types).toEqual([1, 2, 4, 6, 8, 0])
  })

  it('may require information of any type that the specification has', () => {
    const fields = Array.from({ length: 22 }, (_, type) => type)
    expect(load(withTags({ type: 1, fields })).format).toBe('multiboot2')
  })

  it('that requires information of other types is refused, and the error names them', () => {
    const error = errorOf(() => load(withTags({ type: 1, fields: [1, 22, 6, 4711] })))
    expect(error).toMatchObject({ code: 'ERR_IMAGE_FORMAT', field: 'mbi_tag_types', types: [22, 4711] })
    expect(error.message).toContain('22, 4711')
    expect(load(withTags({ type: 1, optional: true, fields: [22, 4711] })).format).toBe('multiboot2')
  })

  it('that requires a console is refused unless the kernel can use the text screen', () => {
    const error = errorOf(() => load(withTags({ type: 4, fields: [1] }, { type: 5, fields: [0, 0, 0] })))
    expect(error).toMatchObject({ code: 'ERR_IMAGE_FORMAT', field: 'console_flags', flags: 1 })
    for (const flags of [0, 2, 3]) expect(load(withTags({ type: 4, fields: [flags] })).entry).toBe(ENTRY)
  })

  it('with an entry address wins over the entry point of the ELF file', () => {
    expect(load(withTags({ type: 3, fields: [0x10_1008] })).entry).toBe(0x10_1008)
  })

  it.each([0, 0xf_ffff, 0x10_1064, 0xffff_ffff])(
    '26: with the entry address %d, outside the kernel, is refused',
    (entryAddr) => {
      const error = errorOf(() => load(withTags({ type: 3, fields: [entryAddr] })))
      expect(error).toMatchObject({ code: 'ERR_IMAGE_FORMAT', field: 'entry_addr', received: entryAddr })
    },
  )

  it('that says relocatable lets the kernel find its load address: where it is linked', () => {
    const { tag } = information(load(withTags({ type: 10, fields: [0x10_0000, 0xffff_ffff, 4096, 1] })))
    expect(wordsOf(tag(21))).toEqual([0x10_0000])
  })

  it.each([
    ['min_addr', [0x20_0000, 0xffff_ffff, 4096, 0]],
    ['max_addr', [0, 0x10_1062, 4096, 0]],
    ['align', [0, 0xffff_ffff, 0x20_0000, 0]],
  ])('that says relocatable is refused when %s forbids where the kernel is linked', (_, fields) => {
    const error = errorOf(() => load(withTags({ type: 10, fields })))
    expect(error).toMatchObject({ code: 'ERR_IMAGE_FORMAT', field: 'min_addr', start: 0x10_0000 })
    const { tag } = information(load(withTags({ type: 10, optional: true, fields })))
    expect(wordsOf(tag(21))).toEqual([0x10_0000])
  })

  it('that says relocatable may allow no more than where the kernel is linked', () => {
    const fields = [0x10_0000, 0x10_1063, 0, 2]
    expect(load(withTags({ type: 10, fields })).entry).toBe(ENTRY)
  })
})

describe('a Multiboot 2 kernel in an ELF file', () => {
  it.each([32, 64] as const)(
    'starts at the physical address of its entry and in 32-bit mode, as ELF%d',
    (bits) => {
      const base = bits === 32 ? 0xc000_0000n : 0xffff_ffff_8000_0000n
      const image = load(elfKernel(bits, {}, base))
      expect(image).toMatchObject({ format: 'multiboot2', mode: 'protected', entry: ENTRY })
      expect(faultsOf(image, 16 * MIB)).toEqual([])
    },
  )

  it('is refused when it is ELF64 and starts above 4 GiB', () => {
    const bytes = concat(makeMultiboot2Header(), CODE)
    const kernel = makeElf(64, { segments: [{ paddr: 0x1_0000_0000n, bytes }] })
    const error = errorOf(() => load(kernel, { memorySize: 4 * GIB }))
    expect(error).toMatchObject({ code: 'ERR_IMAGE_FORMAT', field: 'e_entry', entry: 0x1_0000_0000n })
  })

  it('is loaded by the address tag of its header when it has one, and then has no sections', () => {
    const tags = [
      { type: 2, fields: [0x20_0000, 0x20_0000, 0, 0] },
      { type: 3, fields: [0x20_0010] },
    ]
    const kernel = addSections(32, elfKernel(32, { tags }), [{ bytes: pattern(10) }])
    const image = load(kernel)
    expect(image.entry).toBe(0x20_0010)
    expect(segmentNamed(image, 'the kernel').address).toBe(0x20_0000)
    expect(information(image).types).not.toContain(9)
  })

  it('26: is refused when it is truncated', () => {
    const kernel = elfKernel()
    expect(errorOf(() => load(kernel.subarray(0, kernel.length - 1))).code).toBe('ERR_IMAGE_TRUNCATED')
  })

  it('is refused when it is neither ELF nor has an address tag', () => {
    const kernel = concat(makeMultiboot2Header(), CODE)
    expect(errorOf(() => load(kernel))).toMatchObject({ code: 'ERR_IMAGE_FORMAT', field: 'type' })
    expect(isMultiboot2(kernel)).toBe(false)
  })
})

describe.each([32, 64] as const)('the sections of a Multiboot 2 kernel in an ELF%d file', (bits) => {
  const fields = SECTION_FIELDS[bits]
  const SHF_ALLOC = 2n
  const SYMBOLS = pattern(50)
  const NAMES = new TextEncoder().encode('\0.symtab\0.shstrtab\0')

  const withSections = (sections: readonly SectionSpec[], lies = {}) =>
    addSections(bits, elfKernel(bits), sections, lies)

  /** The tag of ELF sections: the table, and `sh_addr` of each. */
  function sectionsOf(image: BootImage) {
    const body = information(image).tag(9)
    const [num, entsize, shndx] = wordsOf(body)
    expect(entsize).toBe(fields.header)
    expect(body.byteLength).toBe(12 + num! * entsize!)
    const addresses = Array.from({ length: num! }, (_, index) => {
      const at = 12 + index * entsize! + fields.addr
      return bits === 32 ? BigInt(body.getUint32(at, true)) : body.getBigUint64(at, true)
    })
    return { num, shndx, addresses }
  }

  it('are all in memory, and their headers say where', () => {
    const loaded = { bytes: pattern(8), flags: SHF_ALLOC, address: 0x10_1000n }
    const kernel = withSections([loaded, { bytes: SYMBOLS }, { bytes: NAMES }])
    const image = load(kernel, { modules: [textModule('module', '')] })
    const { num, shndx, addresses } = sectionsOf(image)
    expect([num, shndx]).toEqual([4, 3])
    expect(addresses.slice(0, 2)).toEqual([0n, 0x10_1000n])
    for (const [index, bytes] of [
      [2, SYMBOLS],
      [3, NAMES],
    ] as const) {
      expect(addresses[index]! % 16n).toBe(0n)
      const found = peek(image, Number(addresses[index]), bytes.length)
      expect([...new Uint8Array(found.buffer)]).toEqual([...bytes])
    }
    expect(faultsOf(image, 16 * MIB)).toEqual([])
  })

  it('are left as they are in the image of the caller', () => {
    const kernel = withSections([{ bytes: SYMBOLS }])
    const before = kernel.slice()
    load(kernel)
    expect(kernel).toEqual(before)
  })

  it('need no memory when they are empty, without bytes in the file, or loaded', () => {
    const size = 2n ** 31n
    const kernel = withSections([
      { type: 8, size },
      { type: 0, size },
      { size: 0n, offset: size },
      { flags: SHF_ALLOC, size },
      { address: 0x10_0000n, size },
    ])
    const image = load(kernel)
    expect(image.segments.some(({ name }) => name === 'ELF sections')).toBe(false)
    expect(sectionsOf(image).addresses).toEqual([0n, 0n, 0n, 0n, 0n, 0x10_0000n])
  })

  it.each([{ shnum: 0 }, { shoff: 0n }])('are not mentioned when there are none: %o', (lies) => {
    expect(information(load(withSections([], lies))).types).not.toContain(9)
  })

  it('26: are refused when their headers are of another size', () => {
    const error = errorOf(() => load(withSections([], { shentsize: 39 })))
    expect(error).toMatchObject({ code: 'ERR_IMAGE_FORMAT', field: 'e_shentsize' })
  })

  it.each([{ shoff: 0xffff_ffffn }, { shnum: 0xffff }])(
    '26: are refused when %o lies past the end',
    (lies) => {
      expect(errorOf(() => load(withSections([], lies))).code).toBe('ERR_IMAGE_TRUNCATED')
    },
  )

  it.each([{ offset: 0xffff_ffffn }, { size: 0xffff_ffffn }])(
    '26: are refused when %o of one lies past the end',
    (lie) => {
      const error = errorOf(() => load(withSections([{ bytes: SYMBOLS, ...lie }])))
      expect(error.code).toBe('ERR_IMAGE_TRUNCATED')
    },
  )

  it('26: are refused when they share bytes so as to fill memory', () => {
    const sections = Array.from({ length: 60_000 }, () => ({ offset: 0n, size: 2_000_000n }))
    const error = errorOf(() => load(withSections(sections), { memorySize: 3 * GIB }))
    expect(error).toMatchObject({ code: 'ERR_IMAGE_FORMAT', field: 'sh_size' })
  })

  it('27: are refused when memory has no room for them', () => {
    const error = errorOf(() =>
      load(withSections([{ bytes: new Uint8Array(2 * MIB) }]), { memorySize: 2 * MIB }),
    )
    expect(error).toMatchObject({ code: 'ERR_IMAGE_TOO_LARGE', structure: 'ELF sections' })
  })
})

describe('a Multiboot 2 kernel with an address tag', () => {
  const loadWith = (spec: AddressSpec = {}) => load(addressedKernel(spec))

  it('is loaded to its end and without bss when their fields are zero', () => {
    const image = loadWith()
    expect(image.entry).toBe(0x10_0050)
    expect(segmentNamed(image, 'the kernel')).toMatchObject({ address: 0x10_0000, size: ADDRESSED_SIZE })
    expect([...segmentNamed(image, 'the kernel').bytes.subarray(0, 16)]).toEqual([...pattern(16)])
    expect(faultsOf(image, 16 * MIB)).toEqual([])
  })

  it('is loaded from where load_addr is in the file, to load_end_addr, with bss to bss_end_addr', () => {
    const image = loadWith({ loadAddr: 0x10_0004, loadEndAddr: 0x10_0060, bssEndAddr: 0x10_2000 })
    const kernel = segmentNamed(image, 'the kernel')
    expect(kernel).toMatchObject({ address: 0x10_0004, size: 0x1ffc })
    expect([...kernel.bytes.subarray(0, 12)]).toEqual([...pattern(16).subarray(4)])
    expect(kernel.bytes).toHaveLength(0x5c)
  })

  it('is loaded from its first byte when load_addr is -1', () => {
    expect(segmentNamed(loadWith({ loadAddr: -1 }), 'the kernel')).toMatchObject({
      address: 0x10_0000,
      size: ADDRESSED_SIZE,
    })
  })

  it('is refused without an entry address tag', () => {
    const tags = [{ type: 2, fields: [0x10_0000, 0x10_0000, 0, 0] }]
    const error = errorOf(() => load(concat(makeMultiboot2Header({ tags }), CODE)))
    expect(error).toMatchObject({ code: 'ERR_IMAGE_FORMAT', field: 'entry_addr' })
  })

  it.each([
    ['load_addr', { loadAddr: 0x10_0014 }],
    ['load_addr', { headerAddr: 0 }],
    ['load_addr', { loadAddr: 0xf_fffc }],
    ['load_addr', { loadAddr: 0 }],
    ['header_addr', { loadAddr: -1, headerAddr: 15 }],
    ['load_end_addr', { loadEndAddr: 0xf_ffff }],
    ['bss_end_addr', { bssEndAddr: 0x10_0000 + ADDRESSED_SIZE - 1 }],
    ['bss_end_addr', { loadEndAddr: 0x10_0060, bssEndAddr: 0x10_005f }],
    ['entry_addr', { entryAddr: 0xf_ffff }],
    ['entry_addr', { entryAddr: 0x10_0000 + ADDRESSED_SIZE }],
    ['entry_addr', { entryAddr: 0xffff_ffff }],
  ])('26: is refused when %s is a lie: %o', (field, lie) => {
    const error = errorOf(() => loadWith(lie))
    expect(error).toMatchObject({ code: 'ERR_IMAGE_FORMAT', field })
    expect(error.message).toContain('address tag of the Multiboot 2 header')
  })

  it('26: is refused as truncated when load_end_addr lies past its end', () => {
    for (const loadEndAddr of [0x10_0001 + ADDRESSED_SIZE, 0xffff_ffff]) {
      expect(errorOf(() => loadWith({ loadEndAddr })).code).toBe('ERR_IMAGE_TRUNCATED')
    }
    expect(loadWith({ loadEndAddr: 0x10_0000 + ADDRESSED_SIZE }).entry).toBe(0x10_0050)
  })

  it('26: is refused when it does not fit into RAM, without allocating its bss', () => {
    const error = errorOf(() => loadWith({ bssEndAddr: 0xffff_ffff }))
    expect(error).toMatchObject({ code: 'ERR_IMAGE_TOO_LARGE', address: 0x10_0000n })
  })
})

it('27: refuses a module or a command line that memory has no room for', () => {
  const modules = [{ bytes: new Uint8Array(16 * MIB), cmdline: '' }]
  expect(errorOf(() => load(elfKernel(), { modules }))).toMatchObject({
    code: 'ERR_IMAGE_TOO_LARGE',
    structure: 'module 0',
  })
  expect(errorOf(() => load(elfKernel(), { cmdline: 'x'.repeat(16 * MIB) }))).toMatchObject({
    code: 'ERR_BOOT_NO_ROOM',
    structure: 'boot information',
  })
})

it('refuses a command line with NUL, which the guest would see the half of', () => {
  expect(errorOf(() => load(elfKernel(), { cmdline: 'a\0b' })).code).toBe('ERR_INVALID_ARGUMENT')
})
