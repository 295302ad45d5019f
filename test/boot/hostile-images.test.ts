import fc from 'fast-check'
import { describe, expect, it } from 'vitest'
import { IMAGE_FORMATS, type LoadOptions, loadImage } from '../../src/boot/index.js'
import { NodevisorError } from '../../src/errors.js'
import {
  bootOptions,
  concat,
  MIB,
  makeElf,
  makeMultibootHeader,
  pattern,
  textModule,
} from '../helpers/images.js'
import { addSections, makeMultiboot2Header, makeNote, protocolFaultsOf, pvhNote } from './protocols.js'

const CODE = concat(makeMultibootHeader({ flags: 7 }), pattern(200))
const segments = [
  { paddr: 0x10_0000n, vaddr: 0xc010_0000n, bytes: CODE, memsz: 0x3000n },
  { paddr: 0x20_0000n, bytes: pattern(50) },
]

const MULTIBOOT2_TAGS = [
  { type: 1, fields: [1, 3, 6] },
  { type: 4, fields: [3] },
  { type: 10, fields: [0x10_0000, 0xffff_ffff, 4096, 1] },
]

/** Its header is 8-aligned in the file: the ELF headers before it take 84 or 120 bytes. */
function multiboot2Kernel(bits: 32 | 64): Uint8Array {
  const bytes = concat(
    new Uint8Array(bits === 32 ? 4 : 0),
    makeMultiboot2Header({ tags: MULTIBOOT2_TAGS }),
    pattern(16),
  )
  const segment = { paddr: 0x10_0000n, vaddr: 0xc010_0000n, bytes, memsz: 0x3000n }
  return addSections(bits, makeElf(bits, { segments: [segment] }), [{ bytes: pattern(20) }])
}

function pvhKernel(bits: 32 | 64): Uint8Array {
  const note = { type: 4, paddr: 0n, bytes: concat(makeNote('GNU', 3, pattern(8)), pvhNote(0x10_0010)) }
  return makeElf(bits, { segments: [note, { paddr: 0x10_0000n, bytes: pattern(80) }] })
}

const VALID: Record<string, Uint8Array> = {
  ELF32: makeElf(32, { segments: segments.map((segment) => ({ ...segment, bytes: pattern(80) })) }),
  ELF64: makeElf(64, { segments: segments.map((segment) => ({ ...segment, bytes: pattern(80) })) }),
  'Multiboot ELF32': makeElf(32, { segments }),
  'Multiboot ELF64': makeElf(64, { segments }),
  'Multiboot with address fields': concat(
    makeMultibootHeader({
      flags: 0x1_0007,
      headerAddr: 0x10_0000,
      loadAddr: 0x10_0000,
      loadEndAddr: 0x10_0040,
      bssEndAddr: 0x10_1000,
      entryAddr: 0x10_0030,
    }),
    pattern(100),
  ),
  'Multiboot 2 ELF32': multiboot2Kernel(32),
  'Multiboot 2 ELF64': multiboot2Kernel(64),
  'Multiboot 2 with an address tag': concat(
    makeMultiboot2Header({
      tags: [
        { type: 2, fields: [0x10_0000, 0x10_0000, 0x10_0080, 0x10_1000] },
        { type: 3, fields: [0x10_0060] },
        ...MULTIBOOT2_TAGS,
      ],
    }),
    pattern(100),
  ),
  'PVH ELF32': pvhKernel(32),
  'PVH ELF64': pvhKernel(64),
}

/** Numbers at which arithmetic goes wrong. */
const edge = fc.oneof(
  fc.constantFrom(0n, 1n, 0x10_0000n, 2n ** 31n, 2n ** 32n - 1n, 2n ** 53n, 2n ** 63n, 2n ** 64n - 1n),
  fc.bigInt({ min: 0n, max: 2n ** 64n - 1n }),
  fc.bigInt({ min: 0n, max: 0x200n }),
  fc.bigInt({ min: 0n, max: 0x100_0000n }),
)
const edge32 = edge.map((value) => Number(BigInt.asUintN(32, value)))

// By name, so that a counterexample can be read.
const COMMAND_LINES = { none: '', short: 'a command line', long: 'x'.repeat(70_000) }
const MODULES = {
  none: [],
  short: [textModule('module', 'its text')],
  long: [textModule('x'.repeat(9000), '')],
}

const anyOptions = fc.record({
  memorySize: fc.constantFrom(4096, 0x8000, 0xa0000, MIB, 2 * MIB, 16 * MIB, 4096 * MIB, 6000 * MIB),
  cmdline: fc.constantFrom('none', 'short', 'long'),
  modules: fc.constantFrom('none', 'short', 'long'),
  format: fc.constantFrom(undefined, ...IMAGE_FORMATS),
})

interface HostileOptions {
  readonly memorySize?: number
  readonly cmdline?: keyof typeof COMMAND_LINES
  readonly modules?: keyof typeof MODULES
  readonly format?: LoadOptions['format']
  readonly at?: number
  readonly mode?: LoadOptions['mode']
}

/** Loads an image that may be anything. It may fail with an error of this library; else all must be well. */
function loadHostile(image: Uint8Array, options: HostileOptions = {}): 'refused' | 'loaded' {
  const { cmdline = 'none', modules = 'none', ...rest } = options
  const all = { ...bootOptions(), ...rest, cmdline: COMMAND_LINES[cmdline], modules: MODULES[modules] }
  try {
    const loaded = loadImage(image, all)
    expect(protocolFaultsOf(loaded, all.memorySize)).toEqual([])
    return 'loaded'
  } catch (error) {
    if (!(error instanceof NodevisorError)) throw error
    expect(error.message).toMatch(/^Expected .* but .*/)
    return 'refused'
  }
}

describe.each(Object.entries(VALID))('26: %s', (_, valid) => {
  it('loads when it is whole, as it is named or detected', () => {
    expect(loadHostile(valid)).toBe('loaded')
  })

  it('is loaded soundly or refused with an error of its own wherever it is cut off', () => {
    for (let length = 0; length < valid.length; length++) loadHostile(valid.subarray(0, length))
  })

  it('is loaded soundly or refused with an error of its own whatever bytes are damaged', () => {
    const damage = fc.array(fc.tuple(fc.nat(Math.min(valid.length, 256) - 1), fc.nat(255)), {
      minLength: 1,
      maxLength: 6,
    })
    fc.assert(
      fc.property(damage, anyOptions, (changes, options) => {
        const image = valid.slice()
        for (const [at, byte] of changes) image[at] = byte
        loadHostile(image, options)
      }),
      { numRuns: 1500 },
    )
  })

  it('is loaded soundly or refused with an error of its own whatever words are replaced', () => {
    const damage = fc.array(fc.tuple(fc.nat((Math.min(valid.length, 256) >> 2) - 2), edge, fc.boolean()), {
      minLength: 1,
      maxLength: 4,
    })
    fc.assert(
      fc.property(damage, anyOptions, (changes, options) => {
        const image = valid.slice()
        const view = new DataView(image.buffer)
        for (const [word, value, wide] of changes) {
          if (wide) view.setBigUint64(word * 4, value, true)
          else view.setUint32(word * 4, Number(BigInt.asUintN(32, value)), true)
        }
        loadHostile(image, options)
      }),
      { numRuns: 1500 },
    )
  })
})

describe.each([32, 64] as const)('26: an ELF%d file with random headers', (bits) => {
  const segment = fc.record({
    bytes: fc.uint8Array({ maxLength: 64 }),
    paddr: edge,
    vaddr: fc.option(edge, { nil: 0x10_0000n }),
  })
  const lyingSegment = fc.record(
    {
      bytes: fc.uint8Array({ maxLength: 64 }),
      paddr: edge,
      vaddr: edge,
      memsz: edge,
      filesz: edge,
      offset: edge,
    },
    { requiredKeys: ['bytes', 'paddr'] },
  )

  it('is loaded soundly or refused with an error of its own', () => {
    const lies = fc.record(
      { entry: edge, phoff: edge, phnum: fc.nat(0xffff), phentsize: fc.nat(0xffff), type: fc.nat(4) },
      { requiredKeys: [] },
    )
    const spec = fc.tuple(fc.array(fc.oneof(segment, lyingSegment), { maxLength: 5 }), lies)
    fc.assert(
      fc.property(spec, anyOptions, ([segments, header], options) => {
        loadHostile(makeElf(bits, { segments, ...header }), options)
      }),
      { numRuns: 3000 },
    )
  })

  it('is loaded soundly when its headers are true and its segments anywhere', () => {
    const inMemory = fc.record({
      bytes: fc.uint8Array({ minLength: 1, maxLength: 64 }),
      paddr: fc.bigInt({ min: 0n, max: BigInt(2 * MIB) }),
      memsz: fc.bigInt({ min: 64n, max: BigInt(MIB) }),
    })
    let loaded = 0
    fc.assert(
      fc.property(fc.array(inMemory, { minLength: 1, maxLength: 4 }), anyOptions, (segments, options) => {
        const image = makeElf(bits, { segments })
        if (loadHostile(image, { ...options, format: 'elf' }) === 'loaded') loaded++
      }),
      { numRuns: 1500 },
    )
    expect(loaded).toBeGreaterThan(10)
  })
})

it('26: a Multiboot kernel with random address fields is loaded soundly or refused with an error of its own', () => {
  const near = fc.integer({ min: 0x10_0000, max: 0x10_0100 })
  const field = fc.oneof(near, near, near, edge32)
  const fields = fc.record({
    headerAddr: field,
    loadAddr: field,
    loadEndAddr: fc.oneof(fc.constant(0), field),
    bssEndAddr: fc.oneof(fc.constant(0), field),
    entryAddr: field,
  })
  let loaded = 0
  fc.assert(
    fc.property(fields, fc.nat(64), fc.nat(300), anyOptions, (header, before, after, options) => {
      const image = concat(
        new Uint8Array(before * 4),
        makeMultibootHeader({ flags: 0x1_0000, ...header }),
        pattern(after),
      )
      if (loadHostile(image, { ...options, format: 'multiboot' }) === 'loaded') loaded++
    }),
    { numRuns: 5000 },
  )
  expect(loaded).toBeGreaterThan(10)
})

it('26: a Multiboot 2 kernel with random tags is loaded soundly or refused with an error of its own', () => {
  const near = fc.integer({ min: 0x10_0000, max: 0x10_0200 })
  const field = fc.oneof(near, near, near, fc.nat(4), edge32)
  const tag = fc.record(
    {
      type: fc.oneof(fc.nat(12), fc.nat(0xffff)),
      optional: fc.boolean(),
      fields: fc.array(field, { maxLength: 6 }),
      size: fc.oneof(fc.nat(40), edge32),
    },
    { requiredKeys: ['type'] },
  )
  const loadAddr = fc.oneof({ weight: 3, arbitrary: fc.constant(0xffff_ffff) }, near)
  const end = fc.oneof({ weight: 3, arbitrary: fc.constant(0) }, field)
  const address = fc.record({
    type: fc.constant(2),
    fields: fc.tuple(near, loadAddr, end, end),
  })
  const entry = fc.record({ type: fc.constant(3), fields: fc.tuple(near) })
  const ignored = fc.record({ type: fc.constantFrom(5, 6, 7, 8, 9), optional: fc.boolean() })
  const tags = fc.oneof(
    fc.tuple(address, entry, ignored),
    fc.tuple(address, entry, tag),
    fc.array(fc.oneof(tag, address, entry, ignored), { maxLength: 8 }),
  )
  const lyingHeader = fc.record(
    { tags, end: fc.boolean(), length: fc.nat(300), architecture: fc.nat(4) },
    { requiredKeys: ['tags'] },
  )
  const header = fc.oneof({ weight: 2, arbitrary: fc.record({ tags }) }, lyingHeader)
  let loaded = 0
  fc.assert(
    fc.property(fc.nat(64), header, fc.nat(300), anyOptions, (before, spec, after, options) => {
      const image = concat(new Uint8Array(before * 8), makeMultiboot2Header(spec), pattern(after))
      if (loadHostile(image, { ...options, format: 'multiboot2' }) === 'loaded') loaded++
    }),
    { numRuns: 4000 },
  )
  expect(loaded).toBeGreaterThan(10)
})

it.each([32, 64] as const)(
  '26: a Multiboot 2 kernel in ELF%d with random sections is loaded soundly or refused with its own error',
  (bits) => {
    const kernel = multiboot2Kernel(bits)
    const section = fc.record(
      {
        bytes: fc.uint8Array({ maxLength: 64 }),
        type: fc.nat(9),
        flags: fc.bigInt({ min: 0n, max: 7n }),
        address: edge,
        offset: edge,
        size: edge,
      },
      { requiredKeys: [] },
    )
    const lies = fc.record(
      { shoff: edge, shnum: fc.nat(0xffff), shentsize: fc.nat(70) },
      { requiredKeys: [] },
    )
    let loaded = 0
    fc.assert(
      fc.property(fc.array(section, { maxLength: 6 }), lies, anyOptions, (sections, header, options) => {
        const image = addSections(bits, kernel, sections, header)
        if (loadHostile(image, { ...options, format: 'multiboot2' }) === 'loaded') loaded++
      }),
      { numRuns: 2000 },
    )
    expect(loaded).toBeGreaterThan(20)
  },
)

it.each([32, 64] as const)(
  '26: a PVH kernel in ELF%d with random notes is loaded soundly or refused with an error of its own',
  (bits) => {
    const size = fc.oneof(fc.nat(24), edge32)
    const note = fc
      .record({
        name: fc.constantFrom('Xen', 'Xen', 'GNU', ''),
        type: fc.constantFrom(18, 18, 3),
        descriptor: fc.uint8Array({ maxLength: 12 }),
        lies: fc.record({ namesz: size, descsz: size }, { requiredKeys: [] }),
      })
      .map(({ name, type, descriptor, lies }) => makeNote(name, type, descriptor, lies))
    const truth = fc.integer({ min: 0xf_fff0, max: 0x10_0060 }).map(pvhNote)
    const anyNote = fc.oneof(note, { weight: 3, arbitrary: truth })
    const bytes = fc.array(anyNote, { maxLength: 4 }).map((all) => concat(...all))
    const lyingSegment = fc.record({ bytes, offset: edge, filesz: edge }, { requiredKeys: ['bytes'] })
    const segment = fc.oneof(fc.record({ bytes }), lyingSegment)
    let loaded = 0
    fc.assert(
      fc.property(fc.array(segment, { maxLength: 3 }), anyOptions, (noteSegments, options) => {
        const kernel = { paddr: 0x10_0000n, bytes: pattern(80) }
        const segments = [kernel, ...noteSegments.map((spec) => ({ ...spec, type: 4, paddr: 0n }))]
        if (loadHostile(makeElf(bits, { segments }), { ...options, format: 'pvh' }) === 'loaded') loaded++
      }),
      { numRuns: 2000 },
    )
    expect(loaded).toBeGreaterThan(10)
  },
)

it('26: random bytes are loaded soundly or refused with an error of its own', () => {
  const magic = fc.constantFrom([], [0x7f, 0x45, 0x4c, 0x46, 1, 1, 1], [0x7f, 0x45, 0x4c, 0x46, 2, 1, 1])
  fc.assert(
    fc.property(magic, fc.uint8Array({ maxLength: 400 }), anyOptions, (start, rest, options) => {
      loadHostile(concat(Uint8Array.from(start), rest), options)
    }),
    { numRuns: 3000 },
  )
})

it('31: a flat image at any address in any mode is loaded soundly or refused with an error of its own', () => {
  const at = fc.oneof(
    fc.nat(32 * MIB),
    fc.nat(2 * MIB),
    fc.double(),
    edge.map((value) => Number(value)),
  )
  const mode = fc.constantFrom('real', 'protected', 'long', undefined)
  fc.assert(
    fc.property(at, mode, fc.integer({ min: 1, max: 0x2_0000 }), anyOptions, (at, mode, size, options) => {
      loadHostile(new Uint8Array(size), { ...options, at, mode, format: 'flat' })
    }),
    { numRuns: 2000 },
  )
})
