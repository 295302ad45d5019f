import fc from 'fast-check'
import { describe, expect, it } from 'vitest'
import { Bus, type Mapping } from '../../src/bus/bus.js'
import type { AccessSize, Device } from '../../src/bus/device.js'
import { NodevisorError } from '../../src/errors.js'

type Access = readonly ['read' | 'write', offset: number, size: number, region: number, value?: number]

/** A device that notes what reaches it and reads as the bytes 0x10, 0x11, … of its offsets. */
function recorder(name: string, maxAccessSize?: AccessSize): Device & { readonly accesses: Access[] } {
  const accesses: Access[] = []
  return {
    name,
    ...(maxAccessSize === undefined ? {} : { maxAccessSize }),
    accesses,
    read(offset, size, region) {
      accesses.push(['read', offset, size, region])
      return [0, 1, 2, 3].slice(0, size).reduce((sum, i) => sum + (0x10 + offset + i) * 2 ** (8 * i), 0)
    },
    write(offset, value, size, region) {
      accesses.push(['write', offset, size, region, value])
    },
  }
}

function read(bus: Bus, address: number, size: number): number[] {
  const view = new DataView(new ArrayBuffer(size + 2))
  bus.readInto(view, 1, address, size)
  expect([view.getUint8(0), view.getUint8(size + 1)], 'bytes around the access').toEqual([0, 0])
  return [...new Uint8Array(view.buffer, 1, size)]
}

function write(bus: Bus, address: number, bytes: readonly number[]): void {
  const view = new DataView(Uint8Array.from([0xee, ...bytes, 0xee]).buffer)
  bus.writeFrom(view, 1, address, bytes.length)
}

function thrown(action: () => void): NodevisorError {
  try {
    action()
  } catch (error) {
    expect(error).toBeInstanceOf(NodevisorError)
    return error as NodevisorError
  }
  throw new Error('Expected an exception but there was none')
}

describe('attaching', () => {
  it('a device gets offsets and the index of the range', () => {
    const bus = new Bus('port')
    const device = recorder('two ranges')
    bus.attach(device, { base: 0x70, length: 2 }, 0)
    bus.attach(device, { base: 0x3f8, length: 8 }, 1)
    bus.write(0x3fb, 0x80, 1)
    expect(bus.read(0x71, 1)).toBe(0x11)
    expect(device.accesses).toEqual([
      ['write', 3, 1, 1, 0x80],
      ['read', 1, 1, 0],
    ])
  })

  it.each([
    [{ base: 0x3f8, length: 8 }, 'the same range'],
    [{ base: 0x3ff, length: 1 }, 'its last port'],
    [{ base: 0x3f0, length: 9 }, 'its first port'],
    [{ base: 0, length: 0x1_0000 }, 'all around it'],
  ])('an overlap is refused, naming both devices and ranges: %o (%s)', (range) => {
    const bus = new Bus('port')
    bus.attach(recorder('first'), { base: 0x3f8, length: 8 }, 0)
    const error = thrown(() => bus.attach(recorder('second'), range, 0))
    expect(error.code).toBe('ERR_BUS_OVERLAP')
    expect(error.message).toContain('second')
    expect(error.message).toContain('first has ports 0x3f8 to 0x3ff')
    expect(error).toMatchObject({ device: 'second', otherDevice: 'first', range })
    expect(bus.mappings).toHaveLength(1)
  })

  it('ranges that touch are no overlap', () => {
    const bus = new Bus('mmio')
    for (const base of [0x2000, 0x1000, 0x3000]) bus.attach(recorder('page'), { base, length: 0x1000 }, 0)
    expect(bus.mappings.map(({ range }) => range.base)).toEqual([0x1000, 0x2000, 0x3000])
  })

  it.each([
    [{ base: 0.5, length: 1 }, 'base'],
    [{ base: -1, length: 1 }, 'base'],
    [{ base: 0x1_0000, length: 1 }, 'base'],
    [{ base: Number.NaN, length: 1 }, 'base'],
    [{ base: 0, length: 0 }, 'length'],
    [{ base: 0xffff, length: 2 }, 'length'],
    [{ base: 0, length: 1.5 }, 'length'],
    [{ base: 0, length: 1, posted: 'yes' }, 'posted'],
    [undefined, 'an object { base, length }'],
  ])('a bad range is refused: %o', (range, what) => {
    const error = thrown(() => new Bus('port').attach(recorder('device'), range as never, 0))
    expect(error.code).toBe('ERR_INVALID_ARGUMENT')
    expect(error.message).toContain(what)
  })

  it('31: an MMIO range that ends beyond 2^53 is refused, the last one below it works', () => {
    const bus = new Bus('mmio')
    expect(thrown(() => bus.attach(recorder('far'), { base: 2 ** 53 - 8, length: 9 }, 0)).code).toBe(
      'ERR_INVALID_ARGUMENT',
    )
    bus.attach(recorder('far'), { base: 2 ** 53 - 8, length: 8 }, 0)
    expect(bus.read(2 ** 53 - 8, 4)).toBe(0x13121110)
  })

  it('mappingAt finds the range an address lies in', () => {
    const bus = new Bus('port')
    const device = recorder('serial')
    const range = { base: 0x3f8, length: 1, posted: true }
    bus.attach(device, range, 0)
    expect(bus.mappingAt(0x3f8)).toMatchObject({
      device,
      range,
      region: 0,
      posted: true,
      reads: 0,
      writes: 0,
    })
    expect(bus.mappingAt(0x3f7)).toBeUndefined()
    expect(bus.mappingAt(0x3f9)).toBeUndefined()
  })
})

describe('accesses', () => {
  it('10: unclaimed reads give all ones at every width, unclaimed writes are ignored', () => {
    for (const bus of [new Bus('port'), new Bus('mmio')]) {
      for (let size = 1; size <= 8; size++) {
        expect(read(bus, 0x1234, size)).toEqual(Array(size).fill(0xff))
        write(bus, 0x1234, Array(size).fill(0))
      }
      expect(bus.unclaimed).toEqual({
        reads: 8,
        writes: 8,
        addresses: [{ address: 0x1234, reads: 8, writes: 8 }],
        leftOut: 0,
      })
    }
  })

  it('10: a scan of the whole port space is counted, and remembered up to 256 addresses', () => {
    const bus = new Bus('port')
    for (let port = 0; port < 0x1_0000; port++) bus.read(port, 1)
    bus.read(0, 1)
    const { reads, addresses, leftOut } = bus.unclaimed
    expect(reads).toBe(0x1_0001)
    expect(addresses).toHaveLength(256)
    expect(addresses[0]).toEqual({ address: 0, reads: 2, writes: 0 })
    expect(leftOut).toBe(0x1_0000 - 256)
  })

  it('31: addresses up to 2^64 are unclaimed, not wrapped', () => {
    const bus = new Bus('mmio')
    bus.attach(recorder('low'), { base: 0, length: 0x1000 }, 0)
    for (const address of [2 ** 53, 2 ** 63, 2 ** 64 - 2048, 2 ** 64]) {
      for (let size = 1; size <= 8; size++) {
        expect(read(bus, address, size)).toEqual(Array(size).fill(0xff))
        write(bus, address, Array(size).fill(0))
      }
    }
  })

  it('an access wider than the device takes is split, lowest address first', () => {
    const bus = new Bus('port')
    const narrow = recorder('narrow', 1)
    bus.attach(narrow, { base: 0x100, length: 8 }, 0)
    bus.write(0x102, 0x0403_0201, 4)
    expect(narrow.accesses).toEqual([
      ['write', 2, 1, 0, 1],
      ['write', 3, 1, 0, 2],
      ['write', 4, 1, 0, 3],
      ['write', 5, 1, 0, 4],
    ])
    expect(bus.read(0x100, 2)).toBe(0x1110)
  })

  it('an access of 8 bytes is two of 4, low half first', () => {
    const bus = new Bus('mmio')
    const device = recorder('device')
    bus.attach(device, { base: 0x1000, length: 16 }, 0)
    expect(read(bus, 0x1004, 8)).toEqual([0x14, 0x15, 0x16, 0x17, 0x18, 0x19, 0x1a, 0x1b])
    write(bus, 0x1000, [1, 0, 0, 0x80, 2, 0, 0, 0xff])
    expect(device.accesses).toEqual([
      ['read', 4, 4, 0],
      ['read', 8, 4, 0],
      ['write', 0, 4, 0, 0x8000_0001],
      ['write', 4, 4, 0, 0xff00_0002],
    ])
  })

  it('10: the odd widths that KVM makes at the end of a page are split', () => {
    const bus = new Bus('mmio')
    const device = recorder('device')
    bus.attach(device, { base: 0, length: 16 }, 0)
    expect(read(bus, 1, 3)).toEqual([0x11, 0x12, 0x13])
    expect(read(bus, 0, 7)).toEqual([0x10, 0x11, 0x12, 0x13, 0x14, 0x15, 0x16])
    expect(device.accesses.map(([, offset, size]) => [offset, size])).toEqual([
      [1, 2],
      [3, 1],
      [0, 4],
      [4, 2],
      [6, 1],
    ])
  })

  it('10: an access across devices and a gap reaches each device, and ones fill the gap', () => {
    const bus = new Bus('port')
    const left = recorder('left')
    const right = recorder('right')
    bus.attach(left, { base: 0x10, length: 1 }, 0)
    bus.attach(right, { base: 0x12, length: 1 }, 0)
    expect(bus.read(0x10, 4)).toBe(0xff10ff10)
    bus.write(0x0f, 0x0403_0201, 4)
    expect(left.accesses.at(-1)).toEqual(['write', 0, 1, 0, 2])
    expect(right.accesses.at(-1)).toEqual(['write', 0, 1, 0, 4])
    expect(bus.unclaimed.addresses.map(({ address }) => address)).toEqual([0x11, 0x13, 0x0f])
  })

  it('10: an access past the last port is cut there', () => {
    const bus = new Bus('port')
    bus.attach(recorder('last'), { base: 0xffff, length: 1 }, 0)
    expect(bus.read(0xffff, 4)).toBe(0xffffff10)
  })

  it('bits of a value beyond its size are masked', () => {
    const bus = new Bus('port')
    let value = 0
    const device: Device = { name: 'wide', read: () => value }
    bus.attach(device, { base: 0, length: 4 }, 0)
    for (value of [-1, 0xffff_ffff, 2 ** 52 - 1]) {
      expect(bus.read(0, 1)).toBe(0xff)
      expect(bus.read(0, 2)).toBe(0xffff)
      expect(bus.read(0, 4)).toBe(0xffff_ffff)
    }
  })

  it('a device without handlers reads as all ones, ignores writes, and is not unclaimed', () => {
    const bus = new Bus('port')
    bus.attach({ name: 'silent' }, { base: 0, length: 4 }, 0)
    bus.write(0, 5, 4)
    expect(bus.read(0, 2)).toBe(0xffff)
    expect(bus.unclaimed).toMatchObject({ reads: 0, writes: 0 })
    expect(bus.mappings[0]).toMatchObject({ reads: 1, writes: 1 })
  })

  it('accesses of every width at every address do what a flat memory does', () => {
    const layout = fc
      .array(
        fc.record({ gap: fc.nat(6), length: fc.integer({ min: 1, max: 9 }), max: fc.constantFrom(1, 2, 4) }),
        {
          maxLength: 8,
        },
      )
      .map((parts) => {
        let at = 0
        return parts.map(({ gap, length, max }) => {
          const base = at + gap
          at = base + length
          return { base, length, max: max as AccessSize }
        })
      })
    const accesses = fc.array(
      fc.record({
        address: fc.nat(90),
        bytes: fc.uint8Array({ minLength: 1, maxLength: 8 }),
        write: fc.boolean(),
      }),
      { maxLength: 40 },
    )
    fc.assert(
      fc.property(layout, accesses, (ranges, sequence) => {
        const bus = new Bus('mmio')
        const model = new Uint8Array(128).fill(0xff)
        const claimed = new Set<number>()
        for (const { base, length, max } of [...ranges].reverse()) {
          const bytes = new DataView(new ArrayBuffer(length))
          bus.attach(
            {
              name: 'memory',
              maxAccessSize: max,
              read: (offset, size) =>
                size === 1
                  ? bytes.getUint8(offset)
                  : size === 2
                    ? bytes.getUint16(offset, true)
                    : bytes.getUint32(offset, true),
              write: (offset, value, size) => {
                if (size > max) throw new Error('too wide')
                if (size === 1) bytes.setUint8(offset, value)
                else if (size === 2) bytes.setUint16(offset, value, true)
                else bytes.setUint32(offset, value, true)
              },
            },
            { base, length },
            0,
          )
          for (let i = 0; i < length; i++) {
            model[base + i] = 0
            claimed.add(base + i)
          }
        }
        for (const { address, bytes, write: isWrite } of sequence) {
          if (isWrite) {
            write(bus, address, [...bytes])
            bytes.forEach((byte, i) => {
              if (claimed.has(address + i)) model[address + i] = byte
            })
          } else {
            expect(read(bus, address, bytes.length)).toEqual([
              ...model.subarray(address, address + bytes.length),
            ])
          }
        }
      }),
    )
  })
})

describe('a device that fails', () => {
  it('32: an exception becomes ERR_DEVICE_FAILED with the facts and the cause', () => {
    const bus = new Bus('port')
    const cause = new TypeError('boom')
    const fail = () => {
      throw cause
    }
    bus.attach({ name: 'bad', read: fail, write: fail }, { base: 0x300, length: 8 }, 2)

    const onRead = thrown(() => bus.read(0x302, 2))
    expect(onRead.message).toBe(
      'Expected no exception from bad.read for 2 bytes at port 0x302 but received TypeError: boom',
    )
    expect(onRead.cause).toBe(cause)
    expect(onRead).toMatchObject({
      code: 'ERR_DEVICE_FAILED',
      device: 'bad',
      bus: 'port',
      access: 'read',
      address: 0x302,
      offset: 2,
      region: 2,
      size: 2,
    })
    expect(thrown(() => bus.write(0x300, 0xab, 1))).toMatchObject({ access: 'write', value: 0xab, cause })
  })

  it('32: so does one that is no Error, and one from a property', () => {
    const bus = new Bus('port')
    bus.attach(
      {
        name: 'odd',
        get read(): never {
          throw 'a string'
        },
      },
      { base: 0, length: 1 },
      0,
    )
    expect(thrown(() => bus.read(0, 1))).toMatchObject({ code: 'ERR_DEVICE_FAILED', cause: 'a string' })
  })

  it.each([undefined, null, '1', 1n, Number.NaN, Number.POSITIVE_INFINITY, 1.5, {}])(
    '32: a read that gives %s is an error',
    (value) => {
      const bus = new Bus('port')
      bus.attach({ name: 'bad', read: () => value as number }, { base: 0, length: 8 }, 0)
      const error = thrown(() => bus.read(0, 1))
      expect(error.code).toBe('ERR_DEVICE_FAILED')
      expect(error.message).toContain('Expected a number from bad.read')
      expect(error).toMatchObject({ device: 'bad', access: 'read', address: 0, size: 1 })
    },
  )

  it('32: an asynchronous handler is an error, and its own rejection does not end the process', async () => {
    const bus = new Bus('mmio')
    const rejecting = async () => {
      throw new Error('too late')
    }
    bus.attach(
      { name: 'later', read: rejecting as never, write: rejecting as never },
      { base: 0, length: 8 },
      0,
    )
    expect(thrown(() => bus.write(0, 1, 4)).message).toContain('synchronous later.write')
    expect(thrown(() => bus.read(0, 4)).message).toContain('an object of Promise')
    // vitest fails a run in which a rejection goes unhandled.
    await new Promise(setImmediate)
  })
})

describe('posted ranges', () => {
  it('the listener hears once of each range that was written often enough', () => {
    const bus = new Bus('port')
    const heard: Mapping[] = []
    bus.attach(recorder('chatty'), { base: 0xe9, length: 1, posted: true }, 0)
    bus.attach(recorder('other'), { base: 0x100, length: 1 }, 0)
    bus.onPosted(3, (mapping) => heard.push(mapping))
    for (let i = 0; i < 10; i++) {
      bus.write(0xe9, i, 1)
      bus.write(0x100, i, 1)
      expect(heard).toHaveLength(i < 2 ? 0 : 1)
    }
    expect(heard[0]).toBe(bus.mappingAt(0xe9))
  })

  it('a range that was busy before anybody listened is told of with its next write', () => {
    const bus = new Bus('port')
    const heard: Mapping[] = []
    bus.attach(recorder('chatty'), { base: 0xe9, length: 1, posted: true }, 0)
    for (let i = 0; i < 10; i++) bus.write(0xe9, i, 1)
    const stop = bus.onPosted(3, (mapping) => heard.push(mapping))
    bus.write(0xe9, 0, 1)
    expect(heard).toHaveLength(1)
    stop()
  })

  it('nobody is told after unsubscribing', () => {
    const bus = new Bus('port')
    bus.attach(recorder('chatty'), { base: 0xe9, length: 1, posted: true }, 0)
    const stop = bus.onPosted(1, () => expect.unreachable())
    stop()
    bus.write(0xe9, 0, 1)
  })
})
