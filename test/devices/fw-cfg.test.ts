import fc from 'fast-check'
import { describe, expect, it } from 'vitest'
import { checkFwCfgFiles, FwCfg } from '../../src/devices/fw-cfg.js'
import { GuestMemory } from '../../src/memory/guest-memory.js'
import { errorOf } from '../helpers/images.js'
import { guestMemory, guestWith, hostOf } from './guest.js'

const MIB = 2 ** 20
const GIB = 2 ** 30
const READ = 0x02
const SKIP = 0x04
const SELECT = 0x08
const WRITE = 0x10
const ACCESS = 0x1000
const BUFFER = 0x2000

function setUp({
  memorySize = 128 * MIB,
  cpus = 3,
  cmdline = 'root=/dev/vda',
  files = {} as Record<string, string | Uint8Array>,
  memory = guestMemory(),
} = {}) {
  const device = new FwCfg({ memorySize, cpus, cmdline, files: checkFwCfgFiles(files) })
  device.attach(hostOf({ memory }))
  const guest = guestWith(device)
  const select = (key: number) => guest.outw(0x510, key)
  const next = (count: number) => Buffer.from(Array.from({ length: count }, () => guest.inb(0x511)))
  const item = (key: number, count: number) => {
    select(key)
    return next(count)
  }
  /** As a driver does it: the directory, then the file by its key. */
  const directory = () => {
    const count = item(0x19, 4).readUInt32BE()
    return Array.from({ length: count }, () => {
      const entry = next(64)
      const name = entry.subarray(8).toString('latin1')
      return {
        size: entry.readUInt32BE(),
        key: entry.readUInt16BE(4),
        name: name.slice(0, name.indexOf('\0')),
      }
    })
  }
  const file = (name: string) => {
    const { key, size } = directory().find((entry) => entry.name === name)!
    return item(key, size)
  }
  /** Starts an operation as a 32-bit driver does it. @returns the control word afterwards */
  const dma = (control: number, length = 0, buffer = BUFFER, access = ACCESS) => {
    const struct = Buffer.alloc(16)
    struct.writeUInt32BE(control >>> 0)
    struct.writeUInt32BE(length, 4)
    struct.writeBigUInt64BE(BigInt(buffer), 8)
    memory.write(access, struct)
    start(access)
    return Buffer.from(memory.read(access, 4)).readUInt32BE()
  }
  const start = (address: number | bigint) => {
    const register = Buffer.alloc(8)
    register.writeBigUInt64BE(BigInt(address))
    guest.outl(0x514, register.readUInt32LE())
    guest.outl(0x518, register.readUInt32LE(4))
  }
  return { device, memory, select, next, item, directory, file, dma, start, ...guest }
}

describe('items', () => {
  it('are found as the specification says: signature, features, then what the machine is', () => {
    const { item } = setUp({ cpus: 300, memorySize: 5 * GIB })
    expect(item(0, 6).toString('latin1')).toBe('QEMU\0\0')
    expect(item(1, 4).readUInt32LE(), 'traditional and DMA').toBe(3)
    expect(item(2, 16)).toEqual(Buffer.alloc(16))
    expect(item(3, 8).readBigUInt64LE()).toBe(BigInt(5 * GIB))
    expect(item(5, 2).readUInt16LE()).toBe(300)
    expect(item(0x0f, 2).readUInt16LE()).toBe(300)
  })

  it('have the command line, with its NUL', () => {
    const { item } = setUp({ cmdline: 'naïve' })
    const size = item(0x14, 4).readUInt32LE()
    expect(item(0x15, size + 1).toString('utf8')).toBe('naïve\0\0')
    expect(size).toBe(7)
  })

  it('that do not exist, or are read past their end, are zeros for ever', () => {
    const { item, next } = setUp()
    for (const key of [0x04, 0x21, 0x3fff, 0x8000, 0xffff]) expect(item(key, 8)).toEqual(Buffer.alloc(8))
    item(0, 4)
    expect(next(1000)).toEqual(Buffer.alloc(1000))
  })

  it('begin anew when they are selected, also for writing; writes to them are lost', () => {
    const { item, outb, next } = setUp()
    expect(item(0, 2).toString()).toBe('QE')
    expect(item(0x4000, 2).toString()).toBe('QE')
    outb(0x511, 0x58)
    outb(0x510, 0x58)
    expect(next(2).toString()).toBe('MU')
    expect(item(0, 4).toString()).toBe('QEMU')
  })

  it('the selector cannot be read, and a wide read of it takes no data', () => {
    const { select, inb, inw, next } = setUp()
    select(0)
    expect([inb(0x510), inw(0x510)]).toEqual([0, 0])
    expect(next(4).toString()).toBe('QEMU')
  })
})

describe('files', () => {
  it('are listed by name, with the machine’s own, and have what they were given', () => {
    const { directory, file } = setUp({
      files: { 'opt/b': 'text', zz: new Uint8Array(0), 'opt/B': Uint8Array.of(0, 255) },
    })
    expect(directory().map(({ name, size, key }) => [name, size, key])).toEqual([
      ['etc/e820', 60, 0x20],
      ['opt/B', 2, 0x21],
      ['opt/b', 4, 0x22],
      ['zz', 0, 0x23],
    ])
    expect(file('opt/b').toString()).toBe('text')
    expect([...file('opt/B')]).toEqual([0, 255])
  })

  it('come back as they were, whatever their names and contents', () => {
    const name = fc
      .stringMatching(/^[ -~]{1,55}$/)
      .filter((name) => !name.startsWith('etc/') && name !== '__proto__')
    fc.assert(
      fc.property(fc.dictionary(name, fc.uint8Array({ maxLength: 100 }), { maxKeys: 20 }), (files) => {
        const { directory, file } = setUp({ files })
        const names = directory().map((entry) => entry.name)
        expect(names).toEqual([...Object.keys(files), 'etc/e820'].sort())
        for (const [name, bytes] of Object.entries(files)) expect([...file(name)]).toEqual([...bytes])
      }),
      { numRuns: 50 },
    )
  })

  it.each([
    [
      GIB,
      [
        [0, 0xa0000, 1],
        [0xa0000, 0x60000, 2],
        [MIB, GIB - MIB, 1],
      ],
    ],
    [
      5 * GIB,
      [
        [0, 0xa0000, 1],
        [0xa0000, 0x60000, 2],
        [MIB, 3 * GIB - MIB, 1],
        [4 * GIB, 2 * GIB, 1],
      ],
    ],
    [
      0x8000,
      [
        [0, 0x8000, 1],
        [0xa0000, 0x60000, 2],
      ],
    ],
  ])('etc/e820 has the memory map of %d bytes', (memorySize, expected) => {
    const map = setUp({ memorySize }).file('etc/e820')
    const entries = Array.from({ length: map.length / 20 }, (_, i) => [
      Number(map.readBigUInt64LE(20 * i)),
      Number(map.readBigUInt64LE(20 * i + 8)),
      map.readUInt32LE(20 * i + 16),
    ])
    expect(entries).toEqual(expected)
  })

  it('are copies: what happens to the bytes later does not matter', () => {
    const bytes = Uint8Array.of(1)
    const { file } = setUp({ files: { 'opt/a': bytes } })
    bytes[0] = 2
    expect([...file('opt/a')]).toEqual([1])
  })

  it.each([
    ['', 'is empty', 'opt/name'],
    ['etc/e820', "would be taken for one of the machine's own", 'opt/e820'],
    ['opt/ü', 'has other characters', 'opt/opt/'],
    ['opt/a\0b', 'has other characters', 'opt/opt/ab'],
    ['n'.repeat(56), 'has 56', `opt/${'n'.repeat(51)}`],
  ])('with the name %j are refused, with a better one', (name, fault, better) => {
    const error = errorOf(() => checkFwCfgFiles({ [name]: '' }))
    expect(error).toMatchObject({ code: 'ERR_INVALID_ARGUMENT', argument: 'fwCfg', received: name })
    expect(error.message).toContain(`which ${fault}; name it for example '${better}'`)
    expect(checkFwCfgFiles({ [better]: '' }).size).toBe(1)
  })

  it.each([[undefined], [null], ['text'], [[]], [new Map()], [new Uint8Array(1)], [7]])(
    'given as %o are refused',
    (files) => {
      const error = errorOf(() => checkFwCfgFiles(files))
      expect(error.message).toMatch(/^Expected an object of contents by name, .* for fwCfg but received/)
    },
  )

  it('with a content that is neither text nor bytes, or too many of them, are refused', () => {
    expect(errorOf(() => checkFwCfgFiles({ 'opt/a': 1 })).message).toBe(
      "Expected a string or a Uint8Array for fwCfg['opt/a'] but received 1",
    )
    const many = (count: number) =>
      Object.fromEntries(Array.from({ length: count }, (_, i) => [`opt/${i}`, '']))
    expect(errorOf(() => checkFwCfgFiles(many(0x3fe0))).message).toContain('at most 16351 files')
    const { directory } = setUp({ files: many(0x3fdf) })
    expect(directory().at(-1)!.key).toBe(0x3fff)
  })
})

describe('DMA', () => {
  it('shows that it is there', () => {
    const { inb, inl, inw } = setUp()
    const text = Buffer.alloc(8)
    text.writeUInt32LE(inl(0x514))
    text.writeUInt32LE(inl(0x518), 4)
    expect(text.toString()).toBe('QEMU CFG')
    expect([inb(0x51b), inw(0x517)]).toEqual([0x47, 0x2055])
  })

  it('selects and reads in one operation, and goes on where it was', () => {
    const { dma, memory, next } = setUp({ files: { 'opt/a': 'abcdefgh' } })
    memory.fill(BUFFER, 16, 0xee)
    expect(dma(((0x21 << 16) | SELECT | READ) >>> 0, 3)).toBe(0)
    expect(Buffer.from(memory.read(BUFFER, 4)).toString('latin1')).toBe('abc\xee')
    expect(next(1).toString()).toBe('d')
    expect(dma(SKIP, 2)).toBe(0)
    expect(dma(READ, 4)).toBe(0)
    expect(Buffer.from(memory.read(BUFFER, 5)).toString('latin1')).toBe('gh\0\0\xee')
    expect(next(2), 'the end was reached').toEqual(Buffer.alloc(2))
  })

  it('selects without more, does nothing without more, and prefers reading to all else', () => {
    const { dma, memory, next } = setUp()
    expect(dma((0x15 << 16) | SELECT, 0xffff_ffff)).toBe(0)
    expect(next(4).toString()).toBe('root')
    expect(dma(0, 0xffff_ffff)).toBe(0)
    expect(next(1).toString()).toBe('=')
    expect(dma(READ | SKIP | WRITE, 1)).toBe(0)
    expect(memory.readUint8(BUFFER)).toBe('/'.charCodeAt(0))
  })

  it('fails when it is to write', () => {
    const { dma, item, memory } = setUp()
    memory.write(BUFFER, Buffer.from('XXXX'))
    expect(dma(((0x4000 << 16) | SELECT | WRITE) >>> 0, 4)).toBe(1)
    expect(item(0, 4).toString()).toBe('QEMU')
  })

  it('4, 15: a buffer outside RAM sets the error bit and changes nothing', () => {
    const { dma, memory } = setUp()
    const before = memory.read(0x3000, MIB - 0x3000)
    for (const [length, buffer] of [
      [4, MIB - 3],
      [1, MIB],
      [4, 0xfee0_0000],
      [0xffff_ffff, 0],
      [1, Number.MAX_SAFE_INTEGER],
      [1, 2 ** 63],
      [2, 2 ** 64 - 2048],
    ] as const) {
      expect(dma(SELECT | READ, length, buffer), `${length} bytes at ${buffer}`).toBe(1)
    }
    expect(memory.read(0x3000, MIB - 0x3000)).toEqual(before)
    expect(dma(SELECT | READ, 4, MIB - 4)).toBe(0)
    expect(Buffer.from(memory.read(MIB - 4, 4)).toString()).toBe('QEMU')
  })

  it('4: the struct may be anywhere: in no RAM, across its end, across a hole', () => {
    const hole = [
      { start: 0, buffer: new ArrayBuffer(0x4000) },
      { start: 0x8000, buffer: new ArrayBuffer(0x1000) },
    ]
    const { memory, start } = setUp({ memory: new GuestMemory(hole) })
    for (const address of [0x3ffd, 0x5000, 0x8fff, 0xffff_fff0, 2n ** 53n, 2n ** 64n - 1n]) start(address)
    for (const address of [0x3ffc, 0x3ff1, 0x8ff8]) {
      start(address)
      expect(memory.readUint32(address)).toBe(0x0100_0000)
    }
  })

  it('the struct may be its own buffer', () => {
    const { dma } = setUp()
    expect(dma(SELECT | READ, 16, ACCESS)).toBe(0)
  })

  it('12: huge lengths end at once', () => {
    const memory = guestMemory(16 * MIB)
    const { dma, device } = setUp({ memory })
    expect(dma(SKIP, 0xffff_ffff)).toBe(0)
    expect(device.saveState()).toMatchObject({ offset: 4 })
    memory.fill(0x10_0000, 8 * MIB, 0xee)
    expect(dma(SELECT | READ, 8 * MIB, 0x10_0000), 'nobody reads so far past the end').toBe(1)
    expect(memory.readUint8(0x10_0000)).toBe(0xee)
    expect(dma(SELECT | READ, 0x1_0004, 0x10_0000)).toBe(0)
    expect([memory.readUint8(0x10_0004), memory.readUint8(0x11_0003), memory.readUint8(0x11_0004)]).toEqual([
      0, 0, 0xee,
    ])
  })

  it('a 32-bit address needs one write only: the upper half is 0 after an operation', () => {
    const { outl, memory, start } = setUp()
    start(0x1_0000_1000)
    memory.writeUint32(ACCESS, 0xffff_ffff)
    memory.fill(ACCESS + 4, 12)
    outl(0x518, 0x0010_0000)
    expect(memory.readUint32(ACCESS)).toBe(0)
  })

  it('10: other widths and offsets start nothing', () => {
    const { outb, outl, outw, memory } = setUp()
    memory.fill(0, 0x10000, 0xee)
    for (let port = 0x512; port < 0x51e; port++) {
      outb(port, 0)
      outw(port, 0)
      if (port !== 0x518) outl(port, 0)
    }
    expect(memory.readUint32(0)).toBe(0xeeee_eeee)
  })

  it('11, 12: any operation does what the specification says, and touches nothing else', () => {
    const file = Uint8Array.from({ length: 300 }, (_, i) => (i * 7) & 0xff)
    const ramEnd = 0x2_0800
    const operation = fc.record({
      key: fc.constantFrom(0, 0x21, 0x4021, 0x3000),
      flags: fc.nat(0xff),
      length: fc.oneof(fc.integer({ min: 1, max: 0x800 }), fc.integer({ min: 1, max: 0xffff_ffff })),
      buffer: fc.oneof(
        fc.bigInt(0x1000n, 0x1020n),
        fc.bigInt(0x2_0000n, 0x2_1000n),
        fc.bigInt(0n, 2n ** 64n - 1n),
      ),
    })
    fc.assert(
      fc.property(fc.array(operation, { minLength: 1, maxLength: 10 }), (operations) => {
        const memory = guestMemory(ramEnd)
        const { start } = setUp({ files: { 'opt/a': file }, memory })
        const model = { item: Buffer.from('QEMU') as Uint8Array, offset: 0 }
        for (const { key, flags, length, buffer } of operations) {
          const before = Buffer.alloc(ramEnd, 0xee)
          before.writeUInt32BE(key * 0x1_0000 + flags, ACCESS)
          before.writeUInt32BE(length, ACCESS + 4)
          before.writeBigUInt64BE(buffer, ACCESS + 8)
          memory.write(0, before)
          start(ACCESS)

          if ((flags & SELECT) !== 0) {
            model.item = key === 0 ? Buffer.from('QEMU') : key === 0x3000 ? new Uint8Array(0) : file
            model.offset = 0
          }
          const available = Math.min(length, model.item.length - model.offset)
          let failed = (flags & READ) === 0 && (flags & WRITE) !== 0
          if ((flags & READ) !== 0) {
            failed = buffer + BigInt(length) > ramEnd || length - available > 0x1_0000
            if (!failed) {
              before.fill(0, Number(buffer), Number(buffer) + length)
              before.set(model.item.subarray(model.offset, model.offset + available), Number(buffer))
            }
          }
          if (!failed && (flags & (READ | SKIP)) !== 0) model.offset += available
          before.writeUInt32BE(failed ? 1 : 0, ACCESS)
          expect(before.equals(memory.read(0, ramEnd)), 'memory is as the model says').toBe(true)
        }
      }),
    )
  })
})

it('its state comes back exactly, and only a state that this device can have', () => {
  const { device, item, next, outl } = setUp({ files: { 'opt/a': 'abc' } })
  item(0x21, 1)
  outl(0x514, 0x0100_0000)
  const copy = setUp({ files: { 'opt/a': 'abc' } })
  copy.device.restoreState(structuredClone(device.saveState()))
  expect(copy.device.saveState()).toEqual({ selector: 0x21, offset: 1, dmaAddressHigh: 1 })
  expect(copy.next(3)).toEqual(next(3))
  const bad = { selector: 0x21, offset: 4, dmaAddressHigh: 0 }
  expect(() => copy.device.restoreState(bad)).toThrow('offset of the state of fw-cfg')
  expect(copy.device.saveState(), 'nothing has changed').toEqual({
    selector: 0x21,
    offset: 3,
    dmaAddressHigh: 1,
  })
})

it('without guest memory DMA does nothing', () => {
  const device = new FwCfg({ memorySize: MIB, cpus: 1, cmdline: '', files: new Map() })
  guestWith(device).outl(0x518, 0)
  expect(device.saveState()).toEqual({ selector: 0, offset: 0, dmaAddressHigh: 0 })
})
