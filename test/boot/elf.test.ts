import { describe, expect, it } from 'vitest'
import { loadElf } from '../../src/boot/elf.js'
import {
  bootOptions,
  ELF_SIZES,
  type ElfSpec,
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

const CODE = pattern(100)
const load = (bits: 32 | 64, spec: ElfSpec, options = {}) =>
  loadElf(makeElf(bits, spec), bootOptions(options))
const simple = (paddr = 0x10_0000n): ElfSpec => ({ segments: [{ paddr, bytes: CODE }] })

describe.each([32, 64] as const)('an ELF%d kernel', (bits) => {
  const mode = bits === 32 ? 'protected' : 'long'
  /** The biggest number that an address or a size can be. */
  const max = 2n ** BigInt(bits) - 1n

  it(`is loaded at its physical addresses and starts in ${mode} mode`, () => {
    const image = load(bits, {
      segments: [
        { paddr: 0x10_0000n, bytes: CODE },
        { paddr: 0x20_0010n, bytes: pattern(3), memsz: 0x5000n },
      ],
      entry: 0x10_0020n,
    })
    expect(image).toMatchObject({ format: 'elf', mode, entry: 0x10_0020 })
    expect(image.state.registers.rip).toBe(0x10_0020n)
    expect(segmentNamed(image, 'kernel segment 0')).toMatchObject({
      address: 0x10_0000,
      bytes: CODE,
      size: 100,
    })
    expect(segmentNamed(image, 'kernel segment 1')).toMatchObject({ address: 0x20_0010, size: 0x5000 })
    expect(faultsOf(image, 16 * MIB)).toEqual([])
  })

  it('is not copied: its segments are parts of the image', () => {
    const bytes = makeElf(bits, { segments: [{ paddr: 0x10_0000n, bytes: CODE, memsz: 0x80_0000n }] })
    const segment = segmentNamed(loadElf(bytes, bootOptions()), 'kernel segment 0')
    expect(segment.bytes.buffer).toBe(bytes.buffer)
    expect(segment.bytes).toHaveLength(100)
  })

  it('may lie anywhere in a Buffer that holds more', () => {
    const padded = Buffer.concat([Buffer.alloc(3), makeElf(bits, simple()), Buffer.alloc(5)])
    const image = loadElf(padded.subarray(3, -5), bootOptions())
    expect([...segmentNamed(image, 'kernel segment 0').bytes]).toEqual([...CODE])
  })

  it('loads no program header but PT_LOAD, and none that takes no memory', () => {
    const note = { type: 4, paddr: 0xffff_0000n, bytes: CODE }
    const empty = { paddr: 0xffff_0000n, bytes: new Uint8Array(0) }
    const image = load(bits, { segments: [{ paddr: 0x10_0000n, bytes: CODE }, note, empty] })
    expect(image.segments.filter(({ name }) => name.includes('kernel'))).toHaveLength(1)
  })

  it('may have a segment of bss alone', () => {
    const bss = { paddr: 0x20_0000n, bytes: new Uint8Array(0), memsz: 0x1000n }
    const image = load(bits, { segments: [{ paddr: 0x10_0000n, bytes: CODE }, bss] })
    expect(segmentNamed(image, 'kernel segment 1')).toMatchObject({ size: 0x1000 })
    expect(segmentNamed(image, 'kernel segment 1').bytes).toHaveLength(0)
  })

  it('may give the physical address of its entry', () => {
    const image = load(bits, {
      segments: [{ paddr: 0x10_0000n, vaddr: 0xc010_0000n, bytes: CODE }],
      entry: 0x10_0004n,
    })
    expect(image.entry).toBe(0x10_0004)
    expect(image.state.registers.rip).toBe(0x10_0004n)
  })

  it('is told of its command line and modules', () => {
    const image = load(bits, simple(), { cmdline: 'quiet', modules: [textModule('data', 'name')] })
    const { rsi, rdx, rcx } = image.state.registers
    expect(peekText(image, Number(rsi))).toBe('quiet')
    expect(rcx).toBe(1n)
    const cmdline = peek(image, Number(rdx), 24).getBigUint64(16, true)
    expect(peekText(image, Number(cmdline))).toBe('name')
  })

  it('26: has its boot structures elsewhere when its segments are where they would be', () => {
    const image = load(bits, {
      segments: [
        { paddr: 0n, bytes: CODE, memsz: 0x5000n },
        { paddr: 0x6000n, bytes: CODE, memsz: 0x9_0000n },
      ],
    })
    expect(faultsOf(image, 16 * MIB)).toEqual([])
    expect(segmentNamed(image, 'boot information').address).toBe(0x5000)
    expect(segmentNamed(image, 'stack').address).toBeGreaterThan(0x9_6000)
  })

  it('26: is refused when its segments leave no room for boot structures', () => {
    const all = { paddr: 0n, bytes: CODE, memsz: BigInt(16 * MIB) }
    expect(errorOf(() => load(bits, { segments: [all] })).code).toBe('ERR_BOOT_NO_ROOM')
  })

  it('26: is refused as truncated wherever its headers are cut off', () => {
    const image = makeElf(bits, simple())
    const { header, program } = ELF_SIZES[bits]
    for (let length = 4; length < header + program + CODE.length; length++) {
      expect(errorOf(() => loadElf(image.subarray(0, length), bootOptions())).code, `${length} bytes`).toBe(
        'ERR_IMAGE_TRUNCATED',
      )
    }
  })

  it('26: refuses an ELF whose program headers lie past its end', () => {
    for (const phoff of [BigInt(ELF_SIZES[bits].header + 101), 0x1000n, max, max - 10n]) {
      const error = errorOf(() => load(bits, { ...simple(), phoff }))
      expect(error).toMatchObject({ code: 'ERR_IMAGE_TRUNCATED', offset: phoff })
    }
  })

  it('26: refuses more program headers than the file has room for', () => {
    const error = errorOf(() => load(bits, { ...simple(), phnum: 65534 }))
    expect(error.code).toBe('ERR_IMAGE_TRUNCATED')
    expect(error.size).toBe(BigInt(65534 * ELF_SIZES[bits].program))
  })

  it('26: loads or refuses 65534 program headers without hanging', () => {
    const segments = Array.from({ length: 65534 }, (_, index) => ({
      paddr: BigInt(0x10_0000 + (65534 - index) * 16),
      bytes: new Uint8Array(0),
      memsz: 16n,
    }))
    const image = load(bits, { segments })
    expect(image.segments.length).toBeGreaterThan(65534)
    expect(errorOf(() => load(bits, { segments: [...segments.slice(1), segments[1]!] })).code).toBe(
      'ERR_IMAGE_FORMAT',
    )
  })

  it.each([0, 0xffff])('26: refuses an ELF with e_phnum %d', (phnum) => {
    expect(errorOf(() => load(bits, { ...simple(), phnum }))).toMatchObject({
      code: 'ERR_IMAGE_FORMAT',
      field: 'e_phnum',
    })
  })

  it('26: refuses program headers of another size', () => {
    const sizes = [0, 1, ELF_SIZES[bits].program - 1, ELF_SIZES[bits].program + 8, 0xffff]
    for (const phentsize of sizes) {
      expect(errorOf(() => load(bits, { ...simple(), phentsize }))).toMatchObject({
        code: 'ERR_IMAGE_FORMAT',
        field: 'e_phentsize',
      })
    }
  })

  it('26: refuses a segment whose bytes lie past the end of the file', () => {
    const at = (offset: bigint, filesz: bigint) => ({
      segments: [{ paddr: 0x10_0000n, bytes: CODE, offset, filesz, memsz: max - 0x10_0000n }],
    })
    const end = BigInt(makeElf(bits, simple()).length)
    for (const [offset, filesz] of [
      [end - 99n, 100n],
      [end, 1n],
      [max, 1n],
      [max, max - 0x10_0000n],
      [0n, end + 1n],
    ] as const) {
      const error = errorOf(() => load(bits, at(offset, filesz)))
      expect(error).toMatchObject({ code: 'ERR_IMAGE_TRUNCATED', offset, size: filesz })
    }
  })

  it('26: refuses a segment with more bytes in the file than in memory', () => {
    const error = errorOf(() => load(bits, { segments: [{ paddr: 0x10_0000n, bytes: CODE, memsz: 99n }] }))
    expect(error).toMatchObject({ code: 'ERR_IMAGE_FORMAT', field: 'p_filesz' })
  })

  it('26: refuses addresses and sizes whose sum overflows', () => {
    const physical = { paddr: max - 0xfffn, bytes: CODE, memsz: 0x1001n }
    expect(errorOf(() => load(bits, { segments: [physical] }))).toMatchObject({
      code: 'ERR_IMAGE_FORMAT',
      field: 'p_paddr',
    })
    const virtual = { paddr: 0x10_0000n, vaddr: max, bytes: CODE }
    expect(errorOf(() => load(bits, { segments: [virtual] }))).toMatchObject({
      code: 'ERR_IMAGE_FORMAT',
      field: 'p_vaddr',
    })
    const upToTheEnd = { paddr: 0x10_0000n, vaddr: max - 99n, bytes: CODE }
    expect(load(bits, { segments: [upToTheEnd] }).entry).toBe(0x10_0000)
  })

  it.each([16n * 0x10_0000n, 16n * 0x10_0000n - 99n, 0xc000_0000n, 0xfee0_0000n])(
    '26: refuses a segment outside RAM, at %d',
    (paddr) => {
      const error = errorOf(() => load(bits, simple(paddr)))
      expect(error).toMatchObject({
        code: 'ERR_IMAGE_TOO_LARGE',
        address: paddr,
        segment: 'kernel segment 0',
      })
      expect(error.message).toContain('AT()')
    },
  )

  it('26: refuses a huge bss without allocating it', () => {
    const memsz = max - 0x10_0000n
    const error = errorOf(() => load(bits, { segments: [{ paddr: 0x10_0000n, bytes: CODE, memsz }] }))
    expect(error).toMatchObject({ code: 'ERR_IMAGE_TOO_LARGE', size: memsz })
  })

  it('26: refuses segments that overlap', () => {
    const segments = [
      { paddr: 0x10_0000n, bytes: CODE, memsz: 0x1001n },
      { paddr: 0x10_1000n, bytes: CODE },
    ]
    expect(errorOf(() => load(bits, { segments }))).toMatchObject({
      code: 'ERR_IMAGE_FORMAT',
      segment: 'kernel segment 0',
      overlaps: 'kernel segment 1',
    })
  })

  it('26: refuses an entry outside every segment', () => {
    for (const entry of [0n, 0xf_ffffn, 0x10_0064n, max]) {
      expect(errorOf(() => load(bits, { ...simple(), entry }))).toMatchObject({
        code: 'ERR_IMAGE_FORMAT',
        field: 'e_entry',
        entry,
      })
    }
  })

  it('26: refuses an ELF without a segment to load', () => {
    const segments = [{ type: 4, paddr: 0x10_0000n, bytes: CODE }]
    expect(errorOf(() => load(bits, { segments })).code).toBe('ERR_IMAGE_FORMAT')
  })

  it('refuses a position-independent one, and says how to link it', () => {
    const error = errorOf(() => load(bits, { ...simple(), type: 3 }))
    expect(error).toMatchObject({ code: 'ERR_IMAGE_FORMAT', field: 'e_type' })
    expect(error.message).toContain('-no-pie -static')
  })

  it.each([
    ['e_type', { type: 1 }],
    ['e_machine', { machine: bits === 32 ? 62 : 3 }],
    ['e_machine', { machine: 183 }],
    ['EI_CLASS', { elfClass: 0 }],
    ['EI_CLASS', { elfClass: 3 }],
    ['EI_DATA', { data: 2 }],
    ['EI_VERSION', { version: 0 }],
  ])('26: refuses another %s: %o', (field, lie) => {
    expect(errorOf(() => load(bits, { ...simple(), ...lie }))).toMatchObject({
      code: 'ERR_IMAGE_FORMAT',
      field,
    })
  })

  it('is refused where the other class was named', () => {
    const other = bits === 32 ? 64 : 32
    const error = errorOf(() => loadElf(makeElf(bits, simple()), bootOptions(), other))
    expect(error).toMatchObject({ code: 'ERR_IMAGE_FORMAT', field: 'EI_CLASS' })
    expect(loadElf(makeElf(bits, simple()), bootOptions(), bits).mode).toBe(mode)
  })
})

it('refuses what is no ELF file', () => {
  for (const bytes of [[0x7f], [0x7f, 0x45, 0x4c, 0x47], [0]]) {
    const error = errorOf(() => loadElf(Uint8Array.from(bytes), bootOptions()))
    expect(error).toMatchObject({ code: 'ERR_IMAGE_FORMAT', field: 'e_ident' })
  }
})

it('starts a higher-half ELF32 kernel at its physical address, since paging is off', () => {
  const image = load(32, {
    segments: [{ paddr: 0x10_0000n, vaddr: 0xc010_0000n, bytes: CODE }],
    entry: 0xc010_0010n,
  })
  expect(image.entry).toBe(0x10_0010)
  expect(image.state.registers.rip).toBe(0x10_0010n)
})

it('starts a higher-half ELF64 kernel at its virtual address, which the page tables map', () => {
  const image = load(64, {
    segments: [{ paddr: 0x10_0000n, vaddr: 0xffff_ffff_8010_0000n, bytes: CODE }],
    entry: 0xffff_ffff_8010_0010n,
  })
  expect(image.entry).toBe(0x10_0010)
  expect(image.state.registers.rip).toBe(0xffff_ffff_8010_0010n)
  expect(faultsOf(image, 16 * MIB)).toEqual([])
})

it.each([0xffff_8000_0010_0000n, 0xffff_ffff_8000_0000n, 0x20_0000n])(
  'starts an ELF64 kernel at its physical address when the page tables do not lead there from %d',
  (vaddr) => {
    const image = load(64, { segments: [{ paddr: 0x10_0000n, vaddr, bytes: CODE }], entry: vaddr + 4n })
    expect(image.entry).toBe(0x10_0004)
    expect(image.state.registers.rip).toBe(0x10_0004n)
  },
)

it('loads an ELF64 kernel above 4 GiB', () => {
  const memorySize = 4 * 2 ** 30
  const image = load(64, simple(0x1_0000_0000n), { memorySize })
  expect(image.state.registers.rip).toBe(0x1_0000_0000n)
  expect(faultsOf(image, memorySize)).toEqual([])
})

it.each([2n ** 53n, 2n ** 53n + 1n, 2n ** 63n, 2n ** 64n - 100n])(
  '31: refuses an ELF64 segment at %d without rounding it',
  (paddr) => {
    expect(errorOf(() => load(64, simple(paddr)))).toMatchObject({
      code: 'ERR_IMAGE_TOO_LARGE',
      address: paddr,
    })
  },
)
