import fc from 'fast-check'
import { describe, expect, it } from 'vitest'
import { IMAGE_FORMATS, type LoadOptions, loadImage } from '../../src/boot/index.js'
import { NodevisorError } from '../../src/errors.js'
import {
  bootOptions,
  concat,
  faultsOf,
  MIB,
  makeElf,
  makeMultibootHeader,
  pattern,
  textModule,
} from '../helpers/images.js'

const CODE = concat(makeMultibootHeader({ flags: 7 }), pattern(200))
const segments = [
  { paddr: 0x10_0000n, vaddr: 0xc010_0000n, bytes: CODE, memsz: 0x3000n },
  { paddr: 0x20_0000n, bytes: pattern(50) },
]

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
    expect(faultsOf(loaded, all.memorySize)).toEqual([])
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
    expect(loaded).toBeGreaterThan(50)
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
  expect(loaded).toBeGreaterThan(50)
})

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
