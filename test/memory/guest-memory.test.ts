import { describe, expect, it } from 'vitest'
import { NodevisorError } from '../../src/errors.js'
import { GuestMemory } from '../../src/memory/guest-memory.js'

/** Two stretches of RAM with a hole between them, the second above 4 GiB. */
function memoryWithHole() {
  let closed = 0
  const memory = new GuestMemory(
    [
      { start: 0, buffer: new ArrayBuffer(0x2000) },
      { start: 2 ** 32, buffer: new ArrayBuffer(0x1000) },
    ],
    () => closed++,
  )
  return { memory, closed: () => closed }
}

/** RAM seen through several windows of 1 MiB, as a machine's is; counts how many were opened. */
function windowedMemory(size: number) {
  const all = new ArrayBuffer(size)
  const opened: [number, number][] = []
  const memory = new GuestMemory([
    {
      start: 0,
      size,
      map(offset, length) {
        opened.push([offset, length])
        // A buffer of its own, kept in step by copying back would be no view: only reads are compared.
        return all.slice(offset, offset + length)
      },
    },
  ])
  return { memory, opened, bytes: new Uint8Array(all) }
}

const codeOf = (action: () => unknown) => {
  try {
    action()
  } catch (error) {
    if (error instanceof NodevisorError) return error.code
    throw error
  }
  return 'nothing thrown'
}

describe('guest memory', () => {
  it('reads back what was written, little-endian', () => {
    const { memory } = memoryWithHole()
    memory.writeUint8(0x10, 0xab)
    memory.writeUint16(0x20, 0x1234)
    memory.writeUint32(0x30, 0xdead_beef)
    memory.writeBigUint64(0x40, 0x0123_4567_89ab_cdefn)
    expect(memory.readUint8(0x10)).toBe(0xab)
    expect(memory.readUint16(0x20)).toBe(0x1234)
    expect(memory.readUint32(0x30)).toBe(0xdead_beef)
    expect(memory.readBigUint64(0x40)).toBe(0x0123_4567_89ab_cdefn)
    expect([...memory.read(0x40, 8)]).toEqual([0xef, 0xcd, 0xab, 0x89, 0x67, 0x45, 0x23, 0x01])
  })

  it('takes unaligned addresses', () => {
    const { memory } = memoryWithHole()
    memory.writeUint32(0x101, 0x1122_3344)
    expect(memory.readUint32(0x101)).toBe(0x1122_3344)
    expect(memory.readUint8(0x104)).toBe(0x11)
  })

  it('gives a copy with read, and the bytes themselves with view', () => {
    const { memory } = memoryWithHole()
    const copy = memory.read(0x100, 4)
    const view = memory.view(0x100, 4)
    memory.write(0x100, Uint8Array.of(1, 2, 3, 4))
    expect([...copy]).toEqual([0, 0, 0, 0])
    expect([...view]).toEqual([1, 2, 3, 4])
    view[0] = 9
    expect(memory.readUint8(0x100)).toBe(9)
  })

  it('fills', () => {
    const { memory } = memoryWithHole()
    memory.fill(0x10, 4, 0xff)
    expect([...memory.read(0xf, 6)]).toEqual([0, 0xff, 0xff, 0xff, 0xff, 0])
    memory.fill(0x11, 2)
    expect([...memory.read(0xf, 6)]).toEqual([0, 0xff, 0, 0, 0xff, 0])
  })

  it('says what RAM there is', () => {
    const { memory } = memoryWithHole()
    expect(memory.regions).toEqual([
      { start: 0, size: 0x2000 },
      { start: 2 ** 32, size: 0x1000 },
    ])
    expect(memory.size).toBe(0x3000)
  })

  it('reaches RAM above 4 GiB', () => {
    const { memory } = memoryWithHole()
    memory.writeBigUint64(2 ** 32 + 0xff8, 5n)
    expect(memory.readBigUint64(2 ** 32 + 0xff8)).toBe(5n)
  })

  it('knows what it contains', () => {
    const { memory } = memoryWithHole()
    expect(memory.contains(0)).toBe(true)
    expect(memory.contains(0x1fff)).toBe(true)
    expect(memory.contains(0x2000)).toBe(false)
    expect(memory.contains(0x1fff, 2)).toBe(false)
    expect(memory.contains(0, 0x2000)).toBe(true)
    expect(memory.contains(2 ** 32 - 1, 2)).toBe(false)
    expect(memory.contains(2 ** 32, 0x1000)).toBe(true)
    expect(memory.contains(-1)).toBe(false)
    expect(memory.contains(0.5)).toBe(false)
    expect(memory.contains(0, -1)).toBe(false)
    expect(memory.contains(0, Number.NaN)).toBe(false)
    expect(memory.contains(2 ** 53, 1)).toBe(false)
  })

  it('takes lengths of 0 inside RAM', () => {
    const { memory } = memoryWithHole()
    expect(memory.read(0x1000, 0)).toHaveLength(0)
    expect(memory.view(0x1000, 0)).toHaveLength(0)
    memory.write(0x1000, new Uint8Array())
  })

  it('opens windows only over what is looked at', () => {
    const { memory, opened } = windowedMemory(4 * 2 ** 20)
    expect(opened).toEqual([])
    memory.readUint8(3 * 2 ** 20 + 5)
    memory.readUint8(3 * 2 ** 20 + 6)
    expect(opened).toEqual([[3 * 2 ** 20, 2 ** 20]])
  })

  it('reads across windows', () => {
    const { memory, bytes } = windowedMemory(2 * 2 ** 20 + 0x3000)
    const edge = 2 ** 20
    bytes.set([1, 2, 3, 4, 5, 6, 7, 8], edge - 3)
    expect(memory.readUint16(edge - 1)).toBe(0x0403)
    expect(memory.readUint32(edge - 3)).toBe(0x0403_0201)
    expect(memory.readBigUint64(edge - 3)).toBe(0x0807_0605_0403_0201n)
    expect([...memory.read(edge - 3, 8)]).toEqual([1, 2, 3, 4, 5, 6, 7, 8])
    expect([...memory.view(edge - 3, 8)]).toEqual([1, 2, 3, 4, 5, 6, 7, 8])
    // The last window is a short one.
    expect(Buffer.from(bytes).equals(memory.read(0, bytes.length))).toBe(true)
  })

  it('writes across windows', () => {
    const { memory } = windowedMemory(2 * 2 ** 20)
    const edge = 2 ** 20
    memory.writeUint16(edge - 1, 0x0201)
    expect(memory.readUint16(edge - 1)).toBe(0x0201)
    memory.writeUint32(edge - 2, 0x0807_0605)
    expect(memory.readUint32(edge - 2)).toBe(0x0807_0605)
    memory.writeBigUint64(edge - 5, 0x1122_3344_5566_7788n)
    expect(memory.readBigUint64(edge - 5)).toBe(0x1122_3344_5566_7788n)
    memory.fill(edge - 2, 4, 7)
    expect([...memory.read(edge - 3, 6)]).toEqual([0x66, 7, 7, 7, 7, 0x11])
  })
})

describe('31: addresses that are none', () => {
  const accesses: [string, (memory: GuestMemory, address: never) => unknown][] = [
    ['readUint8', (memory, address) => memory.readUint8(address)],
    ['readUint16', (memory, address) => memory.readUint16(address)],
    ['readUint32', (memory, address) => memory.readUint32(address)],
    ['readBigUint64', (memory, address) => memory.readBigUint64(address)],
    ['writeUint8', (memory, address) => memory.writeUint8(address, 0)],
    ['writeUint16', (memory, address) => memory.writeUint16(address, 0)],
    ['writeUint32', (memory, address) => memory.writeUint32(address, 0)],
    ['writeBigUint64', (memory, address) => memory.writeBigUint64(address, 0n)],
    ['read', (memory, address) => memory.read(address, 1)],
    ['write', (memory, address) => memory.write(address, Uint8Array.of(0))],
    ['fill', (memory, address) => memory.fill(address, 1)],
    ['view', (memory, address) => memory.view(address, 1)],
  ]

  it.each(accesses)('%s refuses numbers over 2^53, fractions and what is no number', (_name, access) => {
    const { memory } = memoryWithHole()
    for (const address of [2 ** 53, 2 ** 64, -1, 0.5, Number.NaN, Infinity, '0', null, undefined, {}]) {
      expect([address, codeOf(() => access(memory, address as never))]).toEqual([
        address,
        'ERR_INVALID_ARGUMENT',
      ])
    }
  })

  it.each(accesses)('%s refuses a bigint, and says how to convert it', (_name, access) => {
    const { memory } = memoryWithHole()
    for (const address of [0n, 5n, 2n ** 63n]) {
      expect(() => access(memory, address as never)).toThrow(
        expect.objectContaining({
          code: 'ERR_INVALID_ARGUMENT',
          message: expect.stringContaining('Number(address)'),
        }),
      )
    }
  })

  it.each(accesses)('%s refuses what lies outside RAM, and says where RAM is', (_name, access) => {
    const { memory } = memoryWithHole()
    for (const address of [0x2000, 2 ** 32 - 1, 2 ** 32 + 0x1000, 2 ** 53 - 1]) {
      expect(() => access(memory, address as never)).toThrow(
        expect.objectContaining({
          code: 'ERR_OUT_OF_RANGE',
          address,
          message: expect.stringContaining('0x0 to 0x1fff, 0x100000000 to 0x100000fff'),
        }),
      )
    }
  })

  it('refuses accesses that begin in RAM and leave it, and changes nothing', () => {
    const { memory } = memoryWithHole()
    memory.fill(0x1ff0, 0x10, 0x55)
    expect(codeOf(() => memory.readUint16(0x1fff))).toBe('ERR_OUT_OF_RANGE')
    expect(codeOf(() => memory.readUint32(0x1ffd))).toBe('ERR_OUT_OF_RANGE')
    expect(codeOf(() => memory.readBigUint64(0x1ff9))).toBe('ERR_OUT_OF_RANGE')
    expect(codeOf(() => memory.writeUint16(0x1fff, 0))).toBe('ERR_OUT_OF_RANGE')
    expect(codeOf(() => memory.writeUint32(0x1ffd, 0))).toBe('ERR_OUT_OF_RANGE')
    expect(codeOf(() => memory.writeBigUint64(0x1ff9, 0n))).toBe('ERR_OUT_OF_RANGE')
    expect(codeOf(() => memory.write(0x1ff0, new Uint8Array(0x11)))).toBe('ERR_OUT_OF_RANGE')
    expect(codeOf(() => memory.fill(0x1ff0, 0x11))).toBe('ERR_OUT_OF_RANGE')
    expect(memory.read(0x1ff0, 0x10)).toEqual(new Uint8Array(0x10).fill(0x55))
  })

  it('refuses lengths that are none, and does not try to allocate enormous ones', () => {
    const { memory } = memoryWithHole()
    for (const length of [-1, 0.5, Number.NaN, '1', 2 ** 53, undefined, 1n]) {
      expect(codeOf(() => memory.read(0, length as never))).toBe('ERR_INVALID_ARGUMENT')
      expect(codeOf(() => memory.view(0, length as never))).toBe('ERR_INVALID_ARGUMENT')
      expect(codeOf(() => memory.fill(0, length as never))).toBe('ERR_INVALID_ARGUMENT')
    }
    expect(codeOf(() => memory.read(0, 2 ** 53 - 1))).toBe('ERR_OUT_OF_RANGE')
    expect(codeOf(() => memory.read(0x1000, 2 ** 40))).toBe('ERR_OUT_OF_RANGE')
  })

  it('refuses values that do not fit, and bytes that are none', () => {
    const { memory } = memoryWithHole()
    for (const value of [-1, 256, 1.5, Number.NaN, '1', 1n]) {
      expect(codeOf(() => memory.writeUint8(0, value as never))).toBe('ERR_INVALID_ARGUMENT')
      expect(codeOf(() => memory.fill(0, 1, value as never))).toBe('ERR_INVALID_ARGUMENT')
    }
    expect(codeOf(() => memory.writeUint16(0, 0x1_0000))).toBe('ERR_INVALID_ARGUMENT')
    expect(codeOf(() => memory.writeUint32(0, 2 ** 32))).toBe('ERR_INVALID_ARGUMENT')
    for (const value of [-1n, 2n ** 64n, 1]) {
      expect(codeOf(() => memory.writeBigUint64(0, value as never))).toBe('ERR_INVALID_ARGUMENT')
    }
    for (const bytes of [[1], 'a', new Uint16Array(1), new ArrayBuffer(1), undefined]) {
      expect(codeOf(() => memory.write(0, bytes as never))).toBe('ERR_INVALID_ARGUMENT')
    }
  })

  it('refuses a view that would go across the hole', () => {
    const memory = new GuestMemory([
      { start: 0, buffer: new ArrayBuffer(0x1000) },
      { start: 0x1000, buffer: new ArrayBuffer(0x1000) },
    ])
    memory.writeUint32(0xffe, 0x0403_0201)
    expect([...memory.read(0xffe, 4)]).toEqual([1, 2, 3, 4])
    expect(codeOf(() => memory.view(0xffe, 4))).toBe('ERR_OUT_OF_RANGE')
  })
})

describe('closed guest memory', () => {
  it('throws ERR_CLOSED for every access, and is closed once', () => {
    const { memory, closed } = memoryWithHole()
    memory.close()
    memory.close()
    expect(closed()).toBe(1)
    expect(codeOf(() => memory.readUint8(0))).toBe('ERR_CLOSED')
    expect(codeOf(() => memory.readUint32(0x10_0000))).toBe('ERR_CLOSED')
    expect(codeOf(() => memory.writeUint8(0, 0))).toBe('ERR_CLOSED')
    expect(codeOf(() => memory.read(0, 1))).toBe('ERR_CLOSED')
    expect(codeOf(() => memory.write(0, new Uint8Array()))).toBe('ERR_CLOSED')
    expect(codeOf(() => memory.fill(0, 1))).toBe('ERR_CLOSED')
    expect(codeOf(() => memory.view(0, 1))).toBe('ERR_CLOSED')
  })
})
