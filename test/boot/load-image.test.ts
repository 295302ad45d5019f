import { describe, expect, it } from 'vitest'
import { IMAGE_FORMATS, type LoadOptions, loadImage } from '../../src/boot/index.js'
import { bootOptions, concat, errorOf, makeElf, makeMultibootHeader, pattern } from '../helpers/images.js'

const elf = (bits: 32 | 64, multiboot = false) => {
  const bytes = multiboot ? concat(makeMultibootHeader(), pattern(64)) : pattern(64)
  return makeElf(bits, { segments: [{ paddr: 0x10_0000n, bytes }] })
}
const ADDRESSED = concat(
  makeMultibootHeader({ flags: 0x1_0000, headerAddr: 0x10_0000, loadAddr: 0x10_0000, entryAddr: 0x10_0030 }),
  pattern(64),
)

const load = (image: Uint8Array, options: Partial<LoadOptions> = {}) =>
  loadImage(image, { ...bootOptions(), ...options })

describe('the format of an image', () => {
  it.each([
    ['an ELF32 file', elf(32), 'elf', 'protected'],
    ['an ELF64 file', elf(64), 'elf', 'long'],
    ['an ELF32 file with a Multiboot header', elf(32, true), 'multiboot', 'protected'],
    ['an ELF64 file with a Multiboot header', elf(64, true), 'multiboot', 'protected'],
    ['a file with the address fields of a Multiboot header', ADDRESSED, 'multiboot', 'protected'],
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
  ] as const)('of a file that is %s can be named', (_, image, name, format, mode) => {
    expect(load(image, { format: name })).toMatchObject({ format, mode })
  })

  it.each([
    ['ELF64', 'elf32', elf(64)],
    ['ELF32', 'elf64', elf(32)],
    ['ELF32', 'multiboot', elf(32)],
    ['flat', 'elf', pattern(64)],
    ['flat', 'multiboot', pattern(64)],
  ])('of a file that is %s may not be named %s', (_, format, image) => {
    expect(errorOf(() => load(image, { format })).code).toBe('ERR_IMAGE_FORMAT')
  })

  it.each([
    ['elf-64', 'elf64'],
    ['multiboot2', 'multiboot'],
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
    for (const image of [elf(32), elf(64), elf(32, true), ADDRESSED]) {
      expect(errorOf(() => load(image, { at: 0x20_0000 }))).toMatchObject({
        code: 'ERR_INVALID_ARGUMENT',
        argument: 'at',
      })
    }
    expect(load(elf(64), { at: 0x20_0000, format: 'flat', mode: 'long' }).entry).toBe(0x20_0000)
  })
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
