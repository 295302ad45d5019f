import { readFileSync } from 'node:fs'
import { Readable } from 'node:stream'
import fc from 'fast-check'
import { describe, expect, it } from 'vitest'
import { detectFormat, type LoadOptions, loadImage } from '../../src/boot/index.js'
import { unpackPayload } from '../../src/boot/linux-payload.js'
import { unpackXz } from '../../src/boot/xz.js'
import { NodevisorError } from '../../src/errors.js'
import type { VirtualMachineOptions } from '../../src/index.js'
import { imageOf } from '../helpers/guests.js'
import {
  bootOptions,
  concat,
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
import { boot, errorWith } from '../machine/boot.js'
import { LINUX_NOTE, makeBzImage, makeSelfUnpacked, makeVmlinux, PACKERS } from './linux-images.js'
import { makeNote, pvhNote } from './protocols.js'

const MEMORY = 32 * MIB
const load = (image: Uint8Array, options: Partial<LoadOptions> = {}) =>
  loadImage(image, { ...bootOptions({ memorySize: MEMORY }), ...options })

/** What boot_params of a loaded image has, and the registers that the protocol names. */
function paramsOf(image: ReturnType<typeof load>) {
  const address = Number(image.state.registers.rsi)
  const word = (offset: number) => peek(image, address + offset, 4).getUint32(0, true)
  const wide = (offset: number) => Number(peek(image, address + offset, 8).getBigUint64(0, true))
  return {
    address,
    word,
    wide,
    byte: (offset: number) => peek(image, address + offset, 1).getUint8(0),
    cmdline: peekText(image, word(0x228)),
    initrd: { address: word(0x218) + word(0xc0) * 2 ** 32, size: word(0x21c) + word(0xc4) * 2 ** 32 },
  }
}

/** The error that a promise is rejected with; fails if it is not. */
async function rejection(promise: Promise<unknown>): Promise<NodevisorError> {
  const error = await promise.then(
    () => undefined,
    (reason: unknown) => reason,
  )
  if (error instanceof NodevisorError) return error
  throw error ?? new Error('Expected an error but there was none')
}

describe('the format of an image', () => {
  const note = (name: string, type: number, text: string) => makeNote(name, type, Buffer.from(text))
  it.each([
    ['a bzImage', makeBzImage(), 'bzimage'],
    ['a vmlinux', makeVmlinux(), 'linux'],
    [
      'a vmlinux that has a PVH entry point, too',
      makeVmlinux({ notes: concat(pvhNote(0x100_0000), LINUX_NOTE) }),
      'linux',
    ],
    ['a vmlinux older than 4.19 for Xen', makeVmlinux({ notes: note('Xen', 6, 'linux\0') }), 'linux'],
    [
      'another PVH kernel for Xen',
      makeVmlinux({ notes: concat(note('Xen', 6, 'linux-like\0'), pvhNote(0x100_0000)) }),
      'pvh',
    ],
    ['a kernel with another note of that name', makeVmlinux({ notes: note('Linux', 0x101, 'x\0') }), 'elf'],
    ['a kernel without notes', makeVmlinux({ notes: new Uint8Array(0) }), 'elf'],
    ['a boot sector without the magic number', makeBzImage({ magic: 0x5372_6449 }), 'flat'],
  ])('of %s is detected', (_, image, format) => {
    expect(detectFormat(image)).toBe(format)
  })

  it('can be named: a vmlinux as PVH or ELF, any ELF64 kernel as Linux', () => {
    const image = makeVmlinux({ notes: concat(pvhNote(0x100_0000), LINUX_NOTE) })
    expect(load(image, { format: 'pvh' })).toMatchObject({ format: 'pvh', mode: 'protected' })
    expect(load(image, { format: 'elf' })).toMatchObject({ format: 'elf', mode: 'long' })
    const plain = makeVmlinux({ notes: new Uint8Array(0) })
    expect(load(plain, { format: 'linux' })).toMatchObject({ format: 'linux', mode: 'long' })
  })

  it('as PVH, too, gets an initrd: it is the first module', () => {
    const image = makeVmlinux({ notes: pvhNote(0x100_0000) })
    const loaded = load(image, { initrd: pattern(5), modules: [textModule('second', '')] })
    expect([...segmentNamed(loaded, 'module 0').bytes]).toEqual([...pattern(5)])
    expect(Buffer.from(segmentNamed(loaded, 'module 1').bytes).toString()).toBe('second')
  })
})

describe.each([
  ['vmlinux', makeVmlinux(), undefined],
  ['unpacked bzImage', makeBzImage({ payload: makeVmlinux() }), makeVmlinux()],
  ['bzImage that unpacks itself', makeBzImage(), undefined],
] as const)('a %s', (name, image, payload) => {
  const entry = name === 'bzImage that unpacks itself' ? 0x100_0200 : 0x100_0000

  it('starts in long mode as the 64-bit boot protocol has it', () => {
    const loaded = load(image, { payload })
    expect(faultsOf(loaded, MEMORY)).toEqual([])
    expect(loaded).toMatchObject({ mode: 'long', entry })
    const { registers, specialRegisters } = loaded.state
    expect(registers).toMatchObject({ rip: BigInt(entry), rflags: 2n })
    expect(specialRegisters).toMatchObject({ cs: { selector: 0x10, l: 1 }, ds: { selector: 0x18 } })
    expect(specialRegisters).toMatchObject({ es: { selector: 0x18 }, ss: { selector: 0x18 } })
    // __BOOT_CS and __BOOT_DS, flat, in the GDT itself.
    const gdt = Number(specialRegisters.gdt.base)
    expect(peek(loaded, gdt + 0x10, 8).getBigUint64(0, true)).toBe(0x00af_9b00_0000_ffffn)
    expect(peek(loaded, gdt + 0x18, 8).getBigUint64(0, true)).toBe(0x00cf_9300_0000_ffffn)
  })

  it('finds the memory map, command line, RSDP and screen in boot_params', () => {
    const params = paramsOf(load(image, { payload, cmdline: 'console=ttyS0', rsdpAddress: 0xe0000 }))
    expect(params.cmdline).toBe('console=ttyS0')
    expect(params.wide(0x70)).toBe(0xe0000)
    expect(params.byte(0x1e8)).toBe(4)
    const ranges = [0, 1, 2, 3].map((index) => {
      const at = 0x2d0 + index * 20
      return [params.wide(at), params.wide(at + 8), params.word(at + 16)]
    })
    expect(ranges).toEqual([
      [0, 0xa0000, 1],
      [0xa0000, 0x60000, 2],
      [MIB, MEMORY - MIB, 1],
      [0xc000_0000, 0x4000_0000, 2],
    ])
    expect(params.word(0x1e0)).toBe((MEMORY - MIB) / 1024)
    expect([params.byte(0x06), params.byte(0x07), params.byte(0x0e), params.byte(0x0f)]).toEqual([
      3, 80, 25, 1,
    ])
    expect([params.byte(0x210), params.word(0x202), params.word(0x1fa) & 0xffff]).toEqual([
      0xff, 0x5372_6448, 0xffff,
    ])
  })

  it('finds 32 random bytes, each time others', () => {
    const seeds = [1, 2].map(() => {
      const loaded = load(image, { payload })
      const at = paramsOf(loaded).wide(0x250)
      expect([peek(loaded, at, 8).getBigUint64(0, true), peek(loaded, at + 8, 4).getUint32(0, true)]).toEqual(
        [0n, 9],
      )
      expect(peek(loaded, at + 12, 4).getUint32(0, true)).toBe(32)
      return Buffer.from(peek(loaded, at + 16, 32).buffer).toString('hex')
    })
    expect(seeds[0]).not.toBe(seeds[1])
  })

  it('finds its initrd behind the kernel, on a page of its own', () => {
    const loaded = load(image, { payload, initrd: pattern(5000) })
    const { initrd } = paramsOf(loaded)
    const kernelEnd = name === 'bzImage that unpacks itself' ? 0x110_0000 : 0x102_0000
    expect(initrd).toEqual({ address: kernelEnd, size: 5000 })
    expect([...segmentNamed(loaded, 'initrd').bytes]).toEqual([...pattern(5000)])
  })

  it('finds its initrd before the kernel where there is no room behind it', () => {
    const initrd = new Uint8Array(15 * MIB)
    const loaded = load(image, { payload, initrd, memorySize: 18 * MIB })
    expect(paramsOf(loaded).initrd).toEqual({ address: MIB, size: 15 * MIB })
  })

  it('finds none without one', () => {
    expect(paramsOf(load(image, { payload })).initrd).toEqual({ address: 0, size: 0 })
  })

  it.each([
    [
      'an initrd that is larger than memory',
      { initrd: new Uint8Array(31 * MIB) },
      'ERR_IMAGE_TOO_LARGE',
      /initrd/,
    ],
    [
      'a command line over cmdline_size',
      { cmdline: 'x'.repeat(2048) },
      'ERR_INVALID_ARGUMENT',
      /2047 bytes.*2048/,
    ],
    ['a command line with a zero', { cmdline: 'a\0b' }, 'ERR_INVALID_ARGUMENT', /NUL/],
    ['modules', { modules: [textModule('x', '')] }, 'ERR_INVALID_ARGUMENT', /initrd/],
    ['a load address', { at: 0x10_0000 }, 'ERR_INVALID_ARGUMENT', /load address/],
    ['another mode', { mode: 'protected' }, 'ERR_INVALID_ARGUMENT', /'long'/],
    [
      'too little memory for the kernel',
      { memorySize: 16 * MIB },
      'ERR_IMAGE_TOO_LARGE',
      /1[67] MiB of memory/,
    ],
    ['no memory', { memorySize: 0 }, 'ERR_MEMORY_SIZE', /memory size/],
  ] as const)('is refused with %s', (_, options, code, message) => {
    const error = errorOf(() => load(image, { payload, ...options }))
    expect(error.code).toBe(code)
    expect(error.message).toMatch(message)
  })

  it('takes a command line of exactly cmdline_size', () => {
    const cmdline = 'y'.repeat(2047)
    expect(paramsOf(load(image, { payload, cmdline })).cmdline).toBe(cmdline)
  })
})

it('an initrd goes above 4 GiB only for a kernel that can take it there', () => {
  const initrd = new Uint8Array(0x2000)
  const place = (xloadflags: number) =>
    load(makeBzImage({ xloadflags, initrdAddrMax: 0x10_0fff, initSize: 0x400 }), {
      initrd,
      memorySize: 0xc000_0000 + 16 * MIB,
    })
  expect(paramsOf(place(3)).initrd).toEqual({ address: 2 ** 32, size: 0x2000 })
  expect(errorOf(() => place(1))).toMatchObject({ code: 'ERR_IMAGE_TOO_LARGE', structure: 'initrd' })
})

it('an initrd is refused for a format that has no place for it', () => {
  const image = makeElf(64, { segments: [{ paddr: 0x10_0000n, bytes: pattern(64) }] })
  const error = errorOf(() => load(image, { initrd: pattern(4) }))
  expect(error).toMatchObject({ code: 'ERR_INVALID_ARGUMENT', argument: 'initrd' })
  expect(error.message).toContain('module')
})

describe('a bzImage is refused, and the error says why:', () => {
  it.each([
    ['a 32-bit kernel', { xloadflags: 0 }, /64-bit kernel.*32-bit one.*CONFIG_64BIT/],
    ['a protocol that is too old', { version: 0x20b }, /2\.12 or newer.*2\.11.*Linux 3\.8/],
    ['a zImage', { loadflags: 0 }, /zImage.*make bzImage/],
    ['a header that is shorter than its protocol', { jump: 0x40 }, /jump to 0x242/],
    ['a header that runs into boot_params', { jump: 0xff }, /jump to 0x301/],
    [
      'a payload past the end of the code',
      { payloadOffset: 0x300, payloadLength: 0x101 },
      /0x101 bytes at 0x300/,
    ],
    ['code without an entry point', { code: pattern(0x200) }, /64-bit entry point/],
  ] as const)('%s', (_, spec, message) => {
    const error = errorOf(() => load(makeBzImage(spec), { format: 'bzimage' }))
    expect(error.code).toBe('ERR_IMAGE_FORMAT')
    expect(error.message).toMatch(message)
  })

  it('another file that is named so', () => {
    const error = errorOf(() => load(new Uint8Array(4096), { format: 'bzimage' }))
    expect(error.message).toMatch(/HdrS.*vmlinuz/)
  })

  it.each([
    ['past RAM', { prefAddress: 2n ** 63n }],
    ['in the MMIO hole', { prefAddress: 0xc000_0000n }],
    ['that needs more memory than there is', { initSize: 0xffff_ffff }],
  ])('a kernel %s', (_, spec) => {
    expect(errorOf(() => load(makeBzImage(spec))).code).toBe('ERR_IMAGE_TOO_LARGE')
  })
})

describe.each(PACKERS)('a payload packed with $name', ({ pack, available }) => {
  const kernel = makeVmlinux({ size: 5000 })
  // Calls and jumps among its bytes, which the x86 filter of xz changes, and repetitions for all.
  const code = Uint8Array.from({ length: 5000 }, (_, at) =>
    at % 7 === 0 ? 0xe8 : at % 11 < 4 ? 0 : (at * at) & 0xff,
  )
  kernel.set(code, kernel.length - LINUX_NOTE.length - 5000)
  const packed = available ? pack(kernel) : new Uint8Array(0)
  const image = makeBzImage({ payload: packed })

  it.skipIf(!available)('is unpacked to what it was', async () => {
    expect(Buffer.from((await unpackPayload(image, MEMORY))!).equals(kernel)).toBe(true)
  })

  it.skipIf(!available)('is not unpacked to more than memory, or than init_size', async () => {
    expect(await rejection(unpackPayload(image, 4096))).toMatchObject({ code: 'ERR_IMAGE_TOO_LARGE' })
    const small = makeBzImage({ payload: packed, initSize: 4096 })
    const error = await rejection(unpackPayload(small, MEMORY))
    expect(error).toMatchObject({ code: 'ERR_IMAGE_FORMAT', initSize: 4096, size: kernel.length })
  })

  it.skipIf(!available)('is refused where its size is not what it says', async () => {
    for (const size of [kernel.length - 1, kernel.length + 1, 1]) {
      const lying = packed.slice()
      new DataView(lying.buffer).setUint32(lying.length - 4, size, true)
      const error = await rejection(unpackPayload(makeBzImage({ payload: lying }), MEMORY))
      expect(error).toMatchObject({ code: 'ERR_IMAGE_FORMAT', field: 'payload' })
    }
  })

  it.skipIf(!available)('is refused with an error of its own wherever it is cut off', async () => {
    const step = Math.ceil(packed.length / 300)
    for (let length = 0; length < packed.length - 4; length += step) {
      const cut = concat(packed.subarray(0, length), packed.subarray(packed.length - 4))
      const error = await rejection(
        unpackPayload(makeBzImage({ payload: cut, payloadLength: Math.max(cut.length, 1) }), MEMORY),
      )
      expect(error.code).toBe('ERR_IMAGE_FORMAT')
    }
  })

  it.skipIf(!available)(
    'unpacks to its size or is refused with an error of its own, whatever bytes are damaged',
    async () => {
      const damage = fc.array(fc.tuple(fc.nat(packed.length - 5), fc.integer({ min: 1, max: 255 })), {
        minLength: 1,
        maxLength: 4,
      })
      await fc.assert(
        fc.asyncProperty(damage, async (changes) => {
          const damaged = packed.slice()
          for (const [at, flip] of changes) damaged[at]! ^= flip
          try {
            const unpacked = await unpackPayload(makeBzImage({ payload: damaged }), MEMORY)
            // Where nothing checks the data, the damage may be in the data alone.
            expect(unpacked).toHaveLength(kernel.length)
          } catch (error) {
            if (!(error instanceof NodevisorError)) throw error
            expect(error.code).toBe('ERR_IMAGE_FORMAT')
          }
        }),
        { numRuns: 300 },
      )
    },
  )
})

it.skipIf(!PACKERS[4]!.available)('xz data that is damaged anywhere is noticed (needs xz)', () => {
  const bytes = pattern(3000)
  const packed = PACKERS[4]!.pack(bytes).slice(0, -4)
  expect([...unpackXz(packed, bytes.length)]).toEqual([...bytes])
  // The first six bytes are the magic number, which was looked at before.
  for (let at = 6; at < packed.length; at++) {
    const damaged = packed.slice()
    damaged[at]! ^= 0x10
    expect(() => unpackXz(damaged, bytes.length), `byte ${at}`).toThrow(Error)
  }
})

it.skipIf(!PACKERS[4]!.available)(
  "xz's x86 filter is undone wherever calls and jumps may overlap (needs xz)",
  () => {
    const choices = [0xe8, 0xe9, 0x00, 0xff, 0x00, 0xff, 0x01, 0x7f]
    let state = 1
    const bytes = Uint8Array.from({ length: 100_000 }, () => {
      state = (Math.imul(state, 1_103_515_245) + 12_345) >>> 0
      return choices[state >>> 29]!
    })
    const packed = PACKERS[4]!.pack(bytes).slice(0, -4)
    expect(Buffer.from(unpackXz(packed, bytes.length)).equals(bytes)).toBe(true)
  },
)

describe('a payload', () => {
  it.each([
    ['bzip2', [0x42, 0x5a, 0x68, 0x39]],
    ['LZMA', [0x5d, 0, 0, 0x80]],
    ['LZO', [0x89, 0x4c, 0x5a, 0x4f]],
  ])('packed with %s is refused by name', async (name, magic) => {
    const payload = concat(Uint8Array.from(magic), pattern(40))
    const error = await rejection(unpackPayload(makeBzImage({ payload }), MEMORY))
    expect(error).toMatchObject({ code: 'ERR_IMAGE_FORMAT', compression: name })
    expect(error.message).toMatch(
      new RegExp(`gzip, LZ4, Zstandard, XZ but received ${name}; .*unpack: false`),
    )
  })

  it('of an unknown kind is refused, and so is one that is no kernel', async () => {
    const unknown = await rejection(unpackPayload(makeBzImage({ payload: pattern(40) }), MEMORY))
    expect(unknown.message).toMatch(/begins with 0x160f0801/)
    const text = makeBzImage({ payload: PACKERS[0]!.pack(Buffer.from('no kernel')) })
    expect((await rejection(unpackPayload(text, MEMORY))).message).toMatch(/ELF file in the payload/)
  })

  it('that is not packed is taken as it is, and where there is none, the image starts as it is', async () => {
    const kernel = makeVmlinux()
    expect([...(await unpackPayload(makeBzImage({ payload: kernel }), MEMORY))!]).toEqual([...kernel])
    expect(await unpackPayload(makeBzImage(), MEMORY)).toBeUndefined()
  })

  it('with a 32-bit kernel is refused', () => {
    const payload = makeElf(32, { segments: [{ paddr: 0x10_0000n, bytes: pattern(64) }] })
    expect(errorOf(() => load(makeBzImage(), { payload })).message).toMatch(/64-bit kernel \(ELF64\)/)
  })
})

describe('26: a hostile bzImage', () => {
  /** Loads both ways. It may fail with an error of this library; else all must be well. */
  async function loadHostile(image: Uint8Array, format?: 'bzimage'): Promise<void> {
    for (const unpack of [true, false]) {
      try {
        const payload = unpack ? await unpackPayload(image, MEMORY) : undefined
        const loaded = load(image, { payload, format, initrd: pattern(100) })
        expect(faultsOf(loaded, MEMORY)).toEqual([])
      } catch (error) {
        if (!(error instanceof NodevisorError)) throw error
        expect(error.message).toMatch(/^Expected .* but .*/s)
      }
    }
  }
  const image = makeBzImage({ payload: PACKERS[0]!.pack(makeVmlinux()) })

  it('is refused wherever it is cut off', async () => {
    for (let length = 1; length < image.length; length++) {
      const cut = image.subarray(0, length)
      const error = errorOf(() => load(cut, { format: 'bzimage' }))
      expect(['ERR_IMAGE_TRUNCATED', 'ERR_IMAGE_FORMAT'], `${length} bytes`).toContain(error.code)
      expect((await rejection(unpackPayload(cut, MEMORY))).code).toBe(error.code)
    }
  })

  it('is loaded soundly or refused with an error of its own whatever words of its header are replaced', async () => {
    const edge = fc.oneof(
      fc.constantFrom(0, 1, 0x7fff_ffff, 0x8000_0000, 0xffff_ffff, 0x10_0000, 0x100_0000),
      fc.nat(0x2000),
      fc.nat(0xffff_ffff),
    )
    const damage = fc.array(fc.tuple(fc.integer({ min: 0x1f1, max: 0x267 }), edge), {
      minLength: 1,
      maxLength: 4,
    })
    await fc.assert(
      fc.asyncProperty(damage, fc.constantFrom(undefined, 'bzimage' as const), async (changes, format) => {
        const damaged = image.slice()
        const view = new DataView(damaged.buffer)
        for (const [at, value] of changes) view.setUint32(at, value, true)
        await loadHostile(damaged, format)
      }),
      { numRuns: 1500 },
    )
  })
})

type Kernel = Exclude<VirtualMachineOptions['kernel'], string | URL | Uint8Array | AsyncIterable<Uint8Array>>

describe('a machine', () => {
  const path = imageOf({ image: 'hello-linux.elf' })
  const kernel = new Uint8Array(readFileSync(path))
  const vmlinuz = makeBzImage({ payload: PACKERS[0]!.pack(kernel) })

  /** Runs a kernel to its end; what it printed, line by line. */
  async function linesOf(options: Kernel, machine: Partial<VirtualMachineOptions> = {}) {
    const vm = await boot(options, { memory: '16M', ...machine })
    expect(await vm.run({ timeout: 15_000 })).toMatchObject({ reason: 'debug-exit', code: 16 })
    return { format: vm.boot.format, irqchip: vm.irqchip, lines: vm.serial.output.trimEnd().split('\n') }
  }
  const fnv = (bytes: Uint8Array) =>
    bytes.reduce((hash, byte) => Math.imul(hash ^ byte, 0x0100_0193) >>> 0, 0x811c_9dc5).toString(16)

  it.each(PACKERS)('starts a bzImage packed with $name', async ({ pack, available }) => {
    if (!available) return
    const { format, lines } = await linesOf({
      image: makeBzImage({ payload: pack(kernel) }),
      cmdline: 'quiet',
    })
    expect(format).toBe('bzimage')
    expect(lines).toContain('command line: quiet')
    expect(lines).toContain('random seed: 32 bytes')
  })

  it('lets a bzImage unpack itself, if told so or if it has nothing to be unpacked', async () => {
    const image = makeSelfUnpacked(kernel)
    for (const unpack of [true, false]) {
      const { format, lines } = await linesOf({ image, unpack, cmdline: 'alone' })
      expect(format).toBe('bzimage')
      expect(lines).toContain('command line: alone')
    }
  })

  it('has interrupt controllers and ACPI tables for Linux, and tells of memory above 4 GiB', async () => {
    const { irqchip, lines } = await linesOf({ image: path })
    expect(irqchip).toBe('full')
    expect(lines).toContain('ACPI: yes')
    const without = await linesOf({ image: path }, { irqchip: 'none' })
    expect(without.lines).toContain('ACPI: no')
  })

  it('adds virtio devices to the command line, which may not become too long by them', async () => {
    const { lines } = await linesOf({ image: path, cmdline: 'a' }, { rng: true })
    expect(lines).toContainEqual(expect.stringMatching(/^command line: a virtio_mmio\.device=/))
    const long = boot({ image: path, cmdline: 'x'.repeat(2040) }, { memory: '16M', rng: true })
    await expect(long).rejects.toEqual(errorWith('ERR_INVALID_ARGUMENT', /virtioParameters: false/))
  })

  it('hands over initrds one after the other, each at a multiple of 4 bytes', async () => {
    const { lines } = await linesOf({ image: vmlinuz, initrd: [pattern(5), pattern(3), pattern(4)] })
    const whole = concat(pattern(5), new Uint8Array(3), pattern(3), new Uint8Array(1), pattern(4))
    expect(lines).toContain(`initrd: 16 bytes, hash 0x${fnv(whole)}`)
  })

  it.each([
    [
      'Node streams',
      () => Readable.from([kernel.subarray(0, 100), kernel.subarray(100)]),
      () => Readable.from([pattern(9)]),
    ],
    ['web streams', () => new Blob([kernel]).stream(), () => new Blob([pattern(9)]).stream()],
  ])('reads kernel and initrd from %s', async (_, makeKernel, makeInitrd) => {
    const { lines } = await linesOf({ image: makeKernel(), initrd: makeInitrd() })
    expect(lines).toContain(`initrd: 9 bytes, hash 0x${fnv(pattern(9))}`)
  })

  it('refuses a stream that gives text, that fails, or that was read already', async () => {
    const failing = new Readable({ read: () => failing.destroy(new Error('the line is dead')) })
    const used = Readable.from([kernel])
    for await (const _ of used);
    for (const [stream, message] of [
      [Readable.from(['text']), /not bytes/],
      [failing, /the line is dead/],
      [used, /once only|aborted|destroyed|closed/i],
    ] as const) {
      await expect(boot({ image: stream })).rejects.toEqual(errorWith('ERR_IMAGE_READ', message))
    }
  })

  it.each([
    [{ image: path, initrd: 7 }, /Expected a path.* for kernel.initrd but received 7/],
    [{ image: path, unpack: 1 }, /true or false for kernel.unpack/],
    [{ image: path, unpack: false }, /'linux', which is not packed/],
  ])('refuses %o', async (options, message) => {
    await expect(boot(options as unknown as Kernel)).rejects.toEqual(
      errorWith('ERR_INVALID_ARGUMENT', message),
    )
  })
})
