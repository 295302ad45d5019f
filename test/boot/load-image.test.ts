import { describe, expect, it } from 'vitest'
import { IMAGE_FORMATS, type LoadOptions, loadImage } from '../../src/boot/index.js'
import { bootOptions, concat, errorOf, makeElf, makeMultibootHeader, pattern } from '../helpers/images.js'
import { makeMultiboot2Header, pvhNote } from './protocols.js'

const elf = (bits: 32 | 64, multiboot = false) => {
  const bytes = multiboot ? concat(makeMultibootHeader(), pattern(64)) : pattern(64)
  return makeElf(bits, { segments: [{ paddr: 0x10_0000n, bytes }] })
}
const ADDRESSED = concat(
  makeMultibootHeader({ flags: 0x1_0000, headerAddr: 0x10_0000, loadAddr: 0x10_0000, entryAddr: 0x10_0030 }),
  pattern(64),
)

const ADDRESSED_2 = concat(
  makeMultiboot2Header({
    tags: [
      { type: 2, fields: [0x10_0000, 0x10_0000, 0, 0] },
      { type: 3, fields: [0x10_0040] },
    ],
  }),
  pattern(64),
)

/** An ELF64 kernel that speaks several boot protocols; its headers are 8-aligned in the file. */
function polyglot(...protocols: readonly ('multiboot' | 'multiboot2' | 'pvh')[]) {
  const bytes = concat(
    ...(protocols.includes('multiboot') ? [makeMultibootHeader()] : []),
    ...(protocols.includes('multiboot2') ? [makeMultiboot2Header()] : []),
    pattern(64),
  )
  const note = { type: 4, paddr: 0n, bytes: pvhNote(0x10_0000) }
  const notes = protocols.includes('pvh') ? [note] : []
  return makeElf(64, { segments: [{ paddr: 0x10_0000n, bytes }, ...notes] })
}

const load = (image: Uint8Array, options: Partial<LoadOptions> = {}) =>
  loadImage(image, { ...bootOptions(), ...options })

describe('the format of an image', () => {
  it.each([
    ['an ELF32 file', elf(32), 'elf', 'protected'],
    ['an ELF64 file', elf(64), 'elf', 'long'],
    ['an ELF32 file with a Multiboot header', elf(32, true), 'multiboot', 'protected'],
    ['an ELF64 file with a Multiboot header', elf(64, true), 'multiboot', 'protected'],
    ['a file with the address fields of a Multiboot header', ADDRESSED, 'multiboot', 'protected'],
    ['an ELF file with a Multiboot 2 header', polyglot('multiboot2'), 'multiboot2', 'protected'],
    ['an ELF file with a PVH note', polyglot('pvh'), 'pvh', 'protected'],
    [
      'an ELF file with both Multiboot headers',
      polyglot('multiboot', 'multiboot2'),
      'multiboot',
      'protected',
    ],
    ['an ELF file with Multiboot 1 and PVH', polyglot('multiboot', 'pvh'), 'multiboot', 'protected'],
    ['an ELF file with Multiboot 2 and PVH', polyglot('multiboot2', 'pvh'), 'multiboot2', 'protected'],
    ['an ELF file with none of them', polyglot(), 'elf', 'long'],
    ['a file with a Multiboot 2 address tag', ADDRESSED_2, 'multiboot2', 'protected'],
    [
      'a file with both Multiboot headers and addresses',
      concat(ADDRESSED, ADDRESSED_2),
      'multiboot',
      'protected',
    ],
    ['a file with a Multiboot 2 header alone', makeMultiboot2Header(), 'flat', 'real'],
    ['a single byte', Uint8Array.of(0xf4), 'flat', 'real'],
    [
      'a boot sector with a Multiboot ELF file behind it',
      concat(new Uint8Array(512), elf(32, true)),
      'flat',
      'real',
    ],
  ] as const)('of %s is detected', (_, image, format, mode) => {
    expect(load(image)).toMatchObject({ format, mode })
  })

  it.each([
    ['ELF32', elf(32), 'elf', 'elf', 'protected'],
    ['ELF32', elf(32), 'elf32', 'elf', 'protected'],
    ['ELF64', elf(64), 'elf64', 'elf', 'long'],
    ['Multiboot ELF64', elf(64, true), 'elf', 'elf', 'long'],
    ['Multiboot ELF64', elf(64, true), 'elf64', 'elf', 'long'],
    ['Multiboot ELF64', elf(64, true), 'multiboot', 'multiboot', 'protected'],
    ['ELF64', elf(64), 'flat', 'flat', 'real'],
    ['Multiboot', ADDRESSED, 'flat', 'flat', 'real'],
    ['Multiboot', ADDRESSED, 'multiboot', 'multiboot', 'protected'],
    ...(['multiboot', 'multiboot2', 'pvh'] as const).map(
      (name) => ['all of them', polyglot('multiboot', 'multiboot2', 'pvh'), name, name, 'protected'] as const,
    ),
    ['all of them', polyglot('multiboot', 'multiboot2', 'pvh'), 'elf64', 'elf', 'long'],
  ] as const)('of a file that is %s can be named', (_, image, name, format, mode) => {
    expect(load(image, { format: name })).toMatchObject({ format, mode })
  })

  it.each([
    ['ELF64', 'elf32', elf(64)],
    ['ELF32', 'elf64', elf(32)],
    ['ELF32', 'multiboot', elf(32)],
    ['flat', 'elf', pattern(64)],
    ['flat', 'multiboot', pattern(64)],
    ['ELF64', 'multiboot2', elf(64)],
    ['flat', 'multiboot2', pattern(64)],
    ['ELF64', 'pvh', elf(64)],
    ['flat', 'pvh', pattern(64)],
  ])('of a file that is %s may not be named %s', (_, format, image) => {
    expect(errorOf(() => load(image, { format })).code).toBe('ERR_IMAGE_FORMAT')
  })

  it.each([
    ['elf-64', 'elf64'],
    ['multiboot3', 'multiboot'],
    ['multiboot-2', 'multiboot2'],
    ['PHV', 'pvh'],
    ['ELF', 'elf'],
    ['flta', 'flat'],
  ])('%s is unknown, and the error names %s as the nearest', (format, nearest) => {
    const error = errorOf(() => load(pattern(8), { format }))
    expect(error).toMatchObject({ code: 'ERR_INVALID_ARGUMENT', argument: 'format', received: format })
    expect(error.message).toContain(`did you mean '${nearest}'?`)
    for (const name of IMAGE_FORMATS) expect(error.message).toContain(`'${name}'`)
  })

  it.each([7, null, {}, ''])('%o is none', (format) => {
    expect(errorOf(() => load(pattern(8), { format: format as string })).code).toBe('ERR_INVALID_ARGUMENT')
  })
})

describe('an option', () => {
  it('`mode` that contradicts the format is refused', () => {
    for (const [image, mode] of [
      [elf(32), 'long'],
      [elf(64), 'protected'],
      [elf(64, true), 'long'],
      [ADDRESSED, 'real'],
      [ADDRESSED_2, 'real'],
      [polyglot('multiboot2'), 'long'],
      [polyglot('pvh'), 'long'],
    ] as const) {
      const error = errorOf(() => load(image, { mode }))
      expect(error).toMatchObject({ code: 'ERR_INVALID_ARGUMENT', argument: 'mode', received: mode })
    }
  })

  it('`mode` that agrees with the format is taken', () => {
    expect(load(elf(32), { mode: 'protected' }).mode).toBe('protected')
    expect(load(elf(64), { mode: 'long' }).mode).toBe('long')
    expect(load(ADDRESSED, { mode: 'protected' }).mode).toBe('protected')
  })

  it('`mode` that does not exist is refused, with the nearest', () => {
    const error = errorOf(() => load(pattern(8), { mode: 'reel' as 'real' }))
    expect(error).toMatchObject({ code: 'ERR_INVALID_ARGUMENT', argument: 'mode' })
    expect(error.message).toContain("did you mean 'real'?")
  })

  it('`at` is for flat images alone', () => {
    for (const image of [elf(32), elf(64), elf(32, true), ADDRESSED, ADDRESSED_2, polyglot('pvh')]) {
      expect(errorOf(() => load(image, { at: 0x20_0000 }))).toMatchObject({
        code: 'ERR_INVALID_ARGUMENT',
        argument: 'at',
      })
    }
    expect(load(elf(64), { at: 0x20_0000, format: 'flat', mode: 'long' }).entry).toBe(0x20_0000)
  })
})

it('26: a damaged ELF file that names no format is refused as one', () => {
  const truncated = polyglot('pvh').subarray(0, 100)
  expect(errorOf(() => load(truncated)).code).toBe('ERR_IMAGE_TRUNCATED')
})

it('refuses an empty image', () => {
  for (const format of [undefined, ...IMAGE_FORMATS]) {
    expect(errorOf(() => load(new Uint8Array(0), { format })).code).toBe('ERR_IMAGE_FORMAT')
  }
})

it('refuses what is not bytes', () => {
  for (const image of ['kernel.elf', new ArrayBuffer(8), undefined]) {
    const error = errorOf(() => load(image as unknown as Uint8Array))
    expect(error).toMatchObject({ code: 'ERR_INVALID_ARGUMENT', argument: 'image' })
  }
})
