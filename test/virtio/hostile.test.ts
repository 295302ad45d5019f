import fc from 'fast-check'
import { beforeEach, describe, expect, it, vi } from 'vitest'
import { VIRTIO_F_EVENT_IDX, VIRTIO_F_INDIRECT_DESC, VIRTIO_F_VERSION_1 } from '../../src/virtio/features.js'
import { type QueueLayout, queueParts } from '../../src/virtio/virtqueue.js'
import { guestWith } from '../devices/guest.js'
import {
  type Descriptor,
  encode,
  eventually,
  REGISTERS,
  STATUS,
  VIRTQ_DESC_F_INDIRECT,
  VIRTQ_DESC_F_NEXT,
  VIRTQ_DESC_F_WRITE,
  VirtioDriver,
} from '../helpers/virtio-driver.js'
import { answer, answeringDevice, deviceWith, HoldingDevice, invert, pattern } from './devices.js'

const MIB = 2 ** 20
const RAM_END = 2 ** 32 + MIB
const READY = STATUS.ACKNOWLEDGE | STATUS.DRIVER | STATUS.FEATURES_OK | STATUS.DRIVER_OK
const NEXT = VIRTQ_DESC_F_NEXT
const WRITE = VIRTQ_DESC_F_WRITE
const INDIRECT = VIRTQ_DESC_F_INDIRECT

/** Good memory for a buffer that nothing else uses. */
const BUFFER = 0x8_0000
const TABLE = 0x9_0000

beforeEach(() => {
  vi.spyOn(performance, 'now').mockReturnValue(0)
})

/** A driver of a device that counts what it gets, and answers at once. */
function counting(size = 8) {
  const counted = { requests: 0 }
  const device = deviceWith([
    {
      handle(chain) {
        counted.requests++
        return answer(chain)
      },
    },
  ])
  const driver = new VirtioDriver(device).initialize({ sizes: [size] })
  return { driver, counted, queue: driver.queue(0) }
}

/** What a driver that broke a rule gets: the device asks for a reset, says why, and works again after one. */
async function expectNeedsReset(driver: VirtioDriver, why: RegExp) {
  expect(driver.status).toBe(READY | STATUS.DEVICE_NEEDS_RESET)
  expect(driver.transport.function.problem).toMatch(why)
  expect(driver.interruptStatus & 2, 'a configuration change notification').toBe(2)
  expect(driver.failures).toEqual([])
  const { interrupts } = driver
  for (let i = 0; i < 100; i++) driver.notify(0)
  expect(driver.interrupts, 'once is enough').toBe(interrupts)
  await driver.reset()
  driver.initialize()
  const { data } = await driver.request(0, [{ bytes: pattern(4) }, { length: 4 }])
  expect([...data]).toEqual([...invert(pattern(4))])
}

/** Makes one chain available and expects that the device never gets it. */
async function expectRefused(descriptors: readonly Descriptor[], why: RegExp, table?: readonly Descriptor[]) {
  const { driver, counted, queue } = counting()
  if (table !== undefined) driver.memory.write(TABLE, encode(table))
  queue.addRaw(descriptors)
  driver.notify(0)
  expect(counted.requests).toBe(0)
  expect(queue.usedIdx).toBe(0)
  await expectNeedsReset(driver, why)
}

describe('hostile input 1: descriptor numbers beyond the queue', () => {
  it.each([8, 9, 255, 32_768, 65_535])('head %d of a queue of 8', async (head) => {
    const { driver, counted, queue } = counting()
    queue.makeAvailable(head)
    driver.notify(0)
    expect(counted.requests).toBe(0)
    await expectNeedsReset(driver, new RegExp(`^chain ${head} was made available`))
  })

  it.each([8, 65_535])('next %d of a queue of 8', (next) =>
    expectRefused([{ address: BUFFER, length: 1, flags: NEXT, next }], /followed by number/),
  )

  it.each([2, 65_535])('next %d of an indirect table of 2', (next) =>
    expectRefused([{ address: TABLE, length: 32, flags: INDIRECT }], /followed by number/, [
      { address: BUFFER, length: 1, flags: NEXT, next },
      { address: BUFFER, length: 1 },
    ]),
  )

  it('requests before the bad one are answered', async () => {
    const { driver, counted, queue } = counting()
    queue.add([{ bytes: pattern(4) }, { length: 4 }])
    queue.makeAvailable(99)
    queue.kick()
    expect(counted.requests).toBe(1)
    expect(queue.used()).toHaveLength(1)
    await expectNeedsReset(driver, /chain 99/)
  })
})

describe('hostile input 2: chains without an end', () => {
  it.each([1, 2, 8])('a cycle of %d', (length) =>
    expectRefused(
      Array.from({ length }, (_, i) => ({ address: BUFFER, length: 1, flags: NEXT, next: (i + 1) % length })),
      /no end/,
    ),
  )

  it.each([1, 2, 1024])('a cycle of %d in an indirect table', (length) =>
    expectRefused(
      [{ address: TABLE, length: 16 * length, flags: INDIRECT }],
      /no end/,
      Array.from({ length }, (_, i) => ({ address: BUFFER, length: 1, flags: NEXT, next: (i + 1) % length })),
    ),
  )
})

describe('hostile input 3: an available index that jumps', () => {
  it.each([9, 100, 32_768, 65_535])('by %d in a queue of 8', async (jump) => {
    const { driver, counted, queue } = counting()
    await driver.request(0, [{ length: 1 }])
    queue.availIdx += jump
    driver.notify(0)
    expect(counted.requests).toBe(1)
    await expectNeedsReset(driver, new RegExp(`^${jump} chains were made available in a queue of 8`))
  })

  it('while requests are under way, and back', async () => {
    const device = new HoldingDevice()
    const driver = new VirtioDriver(device).initialize({ sizes: [4] })
    const queue = driver.queue(0)
    queue.add([{ length: 1 }])
    queue.add([{ length: 1 }])
    driver.notify(0)
    queue.availIdx = 1
    driver.notify(0)
    expect(driver.status).toBe(READY | STATUS.DEVICE_NEEDS_RESET)
    expect(device.taken).toBe(2)
    device.finishAll()
    await eventually(() => queue.usedIdx === 2, 'what was under way to end as usual')
    expect(driver.failures).toEqual([])
  })
})

describe('hostile input 4: addresses that are not memory', () => {
  it.each<[string, number | bigint, number]>([
    ['in the hole', 3 * MIB, 1],
    ['into the hole', 2 * MIB - 1, 2],
    ['across the hole', 2 * MIB - 1, 2 ** 32 - 2 * MIB + 2],
    ['past the end', RAM_END - 1, 2],
    ['at the end', RAM_END, 1],
    ['from 0 to far beyond', 0, 0xffff_ffff],
    ['at 2^53', 2n ** 53n, 1],
    ['around 2^53', 2n ** 53n - 1n, 2],
    ['at 2^63', 2n ** 63n, 16],
    ['around 2^64', 2n ** 64n - 1n, 2],
    ['around 2^64 into RAM', 2n ** 64n - 16n, 4096],
  ])('a buffer %s', async (_, address, length) => {
    await expectRefused([{ address, length }], /not all RAM/)
    await expectRefused([{ address, length, flags: WRITE }], /not all RAM/)
    const inTable = [{ address, length, flags: WRITE }]
    await expectRefused([{ address: TABLE, length: 16, flags: INDIRECT }], /not all RAM/, inTable)
  })

  it.each<[string, number | bigint]>([
    ['in the hole', 3 * MIB],
    ['into the hole', 2 * MIB - 16],
    ['past the end', RAM_END - 16],
    ['around 2^64', 2n ** 64n - 16n],
  ])('an indirect table %s', (_, address) =>
    expectRefused([{ address, length: 32, flags: INDIRECT }], /not all in RAM/),
  )

  it.each<[string, number]>([
    ['across the border of two stretches', MIB - 16],
    ['in the hole', 3 * MIB],
    ['past the end', RAM_END - 16],
    ['beyond 2^53', 2 ** 60],
    ['at the end of 64 bits', 2 ** 64 - 4096],
  ])('each part of a queue %s', (_, address) => {
    const driver = new VirtioDriver(answeringDevice()).initialize({ sizes: [0], driverOk: false })
    const good = driver.layOut(16)
    for (const part of ['descriptors', 'driver', 'device'] as const) {
      driver.writeQueue(0, { ...good, [part]: address })
      expect(driver.queueReady(0), part).toBe(false)
    }
    driver.writeQueue(0, good)
    expect(driver.queueReady(0)).toBe(true)
  })
})

describe('hostile input 5: queues that cannot be', () => {
  function fresh() {
    const driver = new VirtioDriver(answeringDevice()).initialize({ sizes: [0], driverOk: false })
    return { driver, good: driver.layOut(16) }
  }

  it('parts that are not aligned', () => {
    const { driver, good } = fresh()
    for (const [part, offsets] of [
      ['descriptors', [1, 2, 4, 8]],
      ['driver', [1]],
      ['device', [1, 2]],
    ] as const) {
      for (const offset of offsets) {
        driver.writeQueue(0, { ...good, [part]: BUFFER + offset })
        expect(driver.queueReady(0), `${part} at ${offset}`).toBe(false)
      }
    }
  })

  it('parts that overlap', () => {
    fc.assert(
      fc.property(fc.nat(80), fc.nat(80), fc.nat(80), (descriptors, driverRing, device) => {
        const { driver } = fresh()
        const layout: QueueLayout = {
          size: 16,
          descriptors: BUFFER + 16 * descriptors,
          driver: BUFFER + 4 * driverRing,
          device: BUFFER + 4 * device,
        }
        driver.writeQueue(0, layout)
        const apart = queueParts(layout).every((part, i, parts) =>
          parts.every(
            (other, j) =>
              i === j ||
              part.address + part.length <= other.address ||
              other.address + other.length <= part.address,
          ),
        )
        expect(driver.queueReady(0)).toBe(apart)
      }),
    )
  })

  it('ready without addresses', () => {
    const { driver } = fresh()
    driver.write(REGISTERS.QueueSel, 0)
    driver.write(REGISTERS.QueueNum, 16)
    driver.write(REGISTERS.QueueReady, 1)
    expect(driver.queueReady(0)).toBe(false)
    driver.driverOk()
    driver.notify(0)
    expect(driver.status).toBe(READY)
    expect(driver.failures).toEqual([])
  })
})

describe('hostile input 6: sizes that a queue cannot have', () => {
  it.each([0, 3, 6, 255, 257, 512, 32_768, 65_536, 65_537, 0x8000_0000, 0xffff_ffff])('%d of 256', (size) => {
    const driver = new VirtioDriver(answeringDevice({ maxSize: 256 })).initialize({
      sizes: [0],
      driverOk: false,
    })
    driver.writeQueue(0, { ...driver.layOut(16), size })
    expect(driver.queueReady(0)).toBe(false)
  })
})

describe('hostile input 7: queue registers written after DRIVER_OK', () => {
  it('have no effect', async () => {
    const { driver } = counting()
    const other = driver.layOut(4)
    driver.writeQueue(0, other)
    for (const ready of [0, 1, 0]) driver.write(REGISTERS.QueueReady, ready)
    expect(driver.queueReady(0)).toBe(true)
    const { data } = await driver.request(0, [{ bytes: pattern(4) }, { length: 4 }])
    expect([...data]).toEqual([...invert(pattern(4))])
    expect(driver.memory.readUint16(other.device + 2), 'the other ring').toBe(0)
  })

  it('nor do they between QueueReady and DRIVER_OK, but by way of QueueReady 0', async () => {
    const driver = new VirtioDriver(answeringDevice()).initialize({ driverOk: false })
    driver.write(REGISTERS.QueueSel, 0)
    driver.write(REGISTERS.QueueDescLow, 3 * MIB)
    driver.write(REGISTERS.QueueNum, 3)
    driver.driverOk()
    const { data } = await driver.request(0, [{ bytes: pattern(4) }, { length: 4 }])
    expect([...data]).toEqual([...invert(pattern(4))])
  })
})

describe('hostile input 8: queues that are not there', () => {
  it.each([1, 2, 1024, 65_536, 0x7fff_ffff, 0x8000_0000, 0xffff_ffff])('number %d', async (index) => {
    const { driver, counted } = counting()
    driver.write(REGISTERS.QueueSel, index)
    expect(driver.read(REGISTERS.QueueNumMax)).toBe(0)
    expect(driver.read(REGISTERS.QueueReady)).toBe(0)
    for (const register of [REGISTERS.QueueNum, REGISTERS.QueueDescLow, REGISTERS.QueueReady]) {
      driver.write(register, 1)
    }
    driver.write(REGISTERS.QueueNotify, index)
    expect(counted.requests).toBe(0)
    expect(driver.status).toBe(READY)
    await driver.request(0, [{ length: 1 }])
    expect(driver.failures).toEqual([])
  })
})

describe('hostile input 9: steps out of order', () => {
  it('status bits before those that come first', () => {
    const driver = new VirtioDriver(answeringDevice())
    for (const status of [2, 4, 8, 14, 64, 0x42]) {
      driver.status = status
      expect(driver.status, `${status}`).toBe(0)
    }
    driver.status = STATUS.ACKNOWLEDGE | STATUS.FEATURES_OK | STATUS.DRIVER_OK
    expect(driver.status).toBe(STATUS.ACKNOWLEDGE)
  })

  it('features after FEATURES_OK', () => {
    const driver = new VirtioDriver(answeringDevice())
    driver.negotiate(VIRTIO_F_VERSION_1)
    driver.write(REGISTERS.DriverFeaturesSel, 0)
    driver.write(REGISTERS.DriverFeatures, 0xffff_ffff)
    expect(driver.transport.function.negotiated).toBe(VIRTIO_F_VERSION_1)
  })

  it('features before there is a driver, and words that are not there', () => {
    const driver = new VirtioDriver(answeringDevice())
    driver.write(REGISTERS.DriverFeatures, 0xffff_ffff)
    expect(driver.transport.function.negotiated).toBe(0n)
    driver.status = STATUS.ACKNOWLEDGE | STATUS.DRIVER
    for (const select of [4, 5, 0x8000_0000, 0xffff_ffff]) {
      driver.write(REGISTERS.DriverFeaturesSel, select)
      driver.write(REGISTERS.DriverFeatures, 0xffff_ffff)
    }
    expect(driver.transport.function.negotiated).toBe(0n)
  })

  it('notifications before DRIVER_OK', () => {
    const device = new HoldingDevice()
    const driver = new VirtioDriver(device).initialize({ driverOk: false })
    driver.queue(0).add([{ length: 1 }])
    driver.notify(0)
    expect(device.taken).toBe(0)
  })

  it('resets over and over with requests under way: no more than one generation of them is', async () => {
    const device = new HoldingDevice()
    const driver = new VirtioDriver(device)
    for (let i = 0; i < 1000; i++) {
      driver.status = 0
      driver.negotiate()
      const queue = driver.setupQueue(0, {
        layout: { size: 4, descriptors: TABLE, driver: TABLE + 64, device: TABLE + 128 },
      })
      for (let n = 0; n < 4; n++) queue.addRaw([{ address: BUFFER, length: 1, flags: WRITE }], n)
      driver.driverOk()
      driver.notify(0)
    }
    expect(device.taken).toBe(4)
    device.finishAll()
    await eventually(() => device.taken === 8, 'the last driver to be served')
    device.finishAll()
    await driver.reset()
    expect(driver.failures).toEqual([])
  })
})

describe('hostile input 10: accesses of any width, anywhere', () => {
  it('read all ones where nothing is, and change nothing', () => {
    const driver = new VirtioDriver(answeringDevice({ config: new Uint8Array(6) }))
    const { mmio } = guestWith(driver.transport)
    const { base, length } = driver.transport.mmio
    const registers: Set<number> = new Set(Object.values(REGISTERS))
    const isThere = (offset: number) =>
      offset >= REGISTERS.Config ? offset < REGISTERS.Config + 6 : registers.has(offset - (offset % 4))
    const before = driver.transport.saveState()
    fc.assert(
      fc.property(fc.nat(length - 1), fc.integer({ min: 1, max: 8 }), (offset, size) => {
        const view = new DataView(new ArrayBuffer(8))
        mmio.readInto(view, 0, base + offset, size)
        const covered = Array.from({ length: size }, (_, i) => offset + i)
        for (const [i, at] of covered.entries()) if (!isThere(at)) expect(view.getUint8(i)).toBe(0xff)
        if (!covered.some(isThere)) mmio.writeFrom(new DataView(new ArrayBuffer(8)), 0, base + offset, size)
        expect(driver.transport.saveState()).toEqual(before)
      }),
    )
  })

  it('never throw, whatever is written to whichever register', () => {
    fc.assert(
      fc.property(
        fc.array(
          fc.tuple(
            fc.oneof(fc.constantFrom(...Object.values(REGISTERS)), fc.nat(0xfff)),
            fc.constantFrom(1 as const, 2 as const, 4 as const),
            fc.option(fc.oneof(fc.nat(16), fc.nat(0xffff_ffff))),
          ),
          { maxLength: 50 },
        ),
        (accesses) => {
          const driver = new VirtioDriver(answeringDevice({ config: new Uint8Array(6) })).initialize()
          for (const [offset, size, value] of accesses) {
            if (value !== null) driver.write(offset, value % 256 ** size, size)
            const read = driver.read(offset, size)
            expect(Number.isInteger(read) && read >= 0 && read <= 0xffff_ffff).toBe(true)
          }
          expect(driver.failures).toEqual([])
        },
      ),
    )
  })
})

describe('hostile input 11: memory that changes while it is used', () => {
  it('a copy stays as it was read, and buffers where they were described', () => {
    const device = new HoldingDevice()
    const driver = new VirtioDriver(device).initialize()
    const queue = driver.queue(0)
    for (const indirect of [false, true]) {
      const parts = [
        { bytes: pattern(4), address: BUFFER },
        { length: 4, address: BUFFER + 64 },
      ]
      queue.add(parts, { indirect })
      queue.kick()
      const { chain } = device.held.pop()!
      const header = chain.read(4)
      driver.memory.fill(BUFFER, 4, 0xee)
      driver.memory.fill(queue.layout.descriptors, 16 * queue.layout.size, 0xff)
      driver.memory.fill(0x2000, 0x1000, 0xff)
      expect(header).toEqual(pattern(4))
      expect([chain.readable.length, chain.writable.length]).toEqual([4, 4])
      expect(chain.write(Uint8Array.of(1, 2, 3, 4))).toBe(4)
      expect(driver.memory.read(BUFFER + 64, 4)).toEqual(Uint8Array.of(1, 2, 3, 4))
    }
  })

  it('a table that its own chain describes as room is read before it is written', async () => {
    const { driver, counted, queue } = counting()
    driver.memory.write(
      TABLE,
      encode([
        { address: BUFFER, length: 64, flags: NEXT, next: 1 },
        { address: TABLE, length: 64, flags: WRITE },
      ]),
    )
    queue.addRaw([{ address: TABLE, length: 32, flags: INDIRECT }])
    driver.notify(0)
    expect(counted.requests).toBe(1)
    expect(queue.usedEntry(0)).toEqual({ id: 0, length: 64 })
    expect(driver.memory.read(TABLE, 64)).toEqual(new Uint8Array(64).fill(0xff))
  })
})

describe('hostile input 12: flags and lengths that make no sense', () => {
  it('something to be read behind something to be written', async () => {
    const wrong = [
      { address: BUFFER, length: 1, flags: NEXT | WRITE, next: 1 },
      { address: BUFFER, length: 1 },
    ]
    await expectRefused(wrong, /behind something to be written/)
    await expectRefused(
      [{ address: TABLE, length: 32, flags: INDIRECT }],
      /behind something to be written/,
      wrong,
    )
  })

  it('indirect inside indirect', () =>
    expectRefused([{ address: TABLE, length: 16, flags: INDIRECT }], /indirect table has an indirect/, [
      { address: TABLE, length: 16, flags: INDIRECT },
    ]))

  it('indirect with a next one', () =>
    expectRefused([{ address: TABLE, length: 16, flags: INDIRECT | NEXT, next: 1 }], /has a next one/))

  it.each([0, 1, 15, 17, 31, 1025 * 16, 0xffff_fff0])('an indirect table of %d bytes', (length) =>
    expectRefused(
      [{ address: TABLE, length, flags: INDIRECT }],
      new RegExp(`indirect table has ${length} bytes`),
    ),
  )

  it('a wrong direction is the request of a device that finds nothing there', async () => {
    const { driver, counted, queue } = counting()
    queue.addRaw([{ address: BUFFER, length: 16, flags: WRITE }])
    queue.addRaw([{ address: BUFFER, length: 16 }], 1)
    driver.notify(0)
    expect(counted.requests).toBe(2)
    expect([queue.usedEntry(0), queue.usedEntry(1)]).toEqual([
      { id: 0, length: 0 },
      { id: 1, length: 0 },
    ])
    expect(driver.status).toBe(READY)
  })

  it('flags that do not exist are ignored', async () => {
    const { driver, queue } = counting()
    queue.addRaw([{ address: BUFFER, length: 1, flags: 0xfff8 | WRITE }])
    driver.notify(0)
    expect(queue.usedIdx).toBe(1)
    expect(driver.status).toBe(READY)
  })

  it('much more than there is RAM, by the same buffer again and again, costs no memory', () => {
    const lengths: number[] = []
    const device = deviceWith([
      {
        handle(chain) {
          lengths.push(chain.readable.length, chain.read(16).length)
          return 0
        },
      },
    ])
    const driver = new VirtioDriver(device).initialize()
    const table = Array.from({ length: 1024 }, (_, i) => ({
      address: 0,
      length: 2 * MIB,
      flags: i < 1023 ? NEXT : 0,
      next: (i + 1) % 1024,
    }))
    driver.memory.write(TABLE, encode(table))
    driver.queue(0).addRaw([{ address: TABLE, length: 16 * 1024, flags: INDIRECT }])
    driver.notify(0)
    expect(lengths).toEqual([2 ** 31, 16])
  })
})

describe('hostile input 13: a malformed chain', () => {
  it('is met once, does not block what is under way, and does not stay after a reset', async () => {
    const device = new HoldingDevice()
    const driver = new VirtioDriver(device).initialize({ sizes: [8] })
    const queue = driver.queue(0)
    queue.add([{ bytes: pattern(2) }, { length: 2 }])
    queue.addRaw([{ address: 3 * MIB, length: 1 }], 5)
    queue.add([{ length: 1 }])
    driver.notify(0)
    expect(device.taken).toBe(1)
    for (let i = 0; i < 1000; i++) driver.notify(0)
    expect(device.taken).toBe(1)
    device.finishAll()
    await eventually(() => queue.usedIdx === 1, 'the request before to end')
    await driver.reset()
    driver.initialize({ sizes: [8] })
    const answered = driver.request(0, [{ bytes: pattern(2) }, { length: 2 }])
    device.finishAll()
    expect((await answered).length).toBe(2)
  })

  it('of a queue whose device takes buffers by itself ends in the same way', async () => {
    const device = deviceWith([{ available: (queue) => void queue.pop() }, { handle: answer }])
    const driver = new VirtioDriver(device).initialize()
    driver.queue(0).makeAvailable(77)
    driver.queue(0).makeAvailable(99)
    driver.notify(0)
    driver.queue(1).add([{ length: 1 }])
    driver.notify(1)
    expect(driver.queue(1).usedIdx, 'no queue of the device is served').toBe(0)
    await driver.reset()
    driver.initialize()
    await driver.request(1, [{ length: 1 }])
    expect(driver.failures).toEqual([])
  })
})

describe('hostile input 14: submissions without end', () => {
  it('have no more requests under way than the queue has descriptors', async () => {
    const device = new HoldingDevice()
    const driver = new VirtioDriver(device).initialize({ sizes: [8] })
    const queue = driver.queue(0)
    let most = 0
    let finished = 0
    for (let i = 0; i < 5000; i++) {
      // The same descriptor, though it is under way; no further ahead than the device looks.
      if (((queue.availIdx - device.taken) & 0xffff) < 8)
        queue.addRaw([{ address: BUFFER, length: 1, flags: WRITE }])
      driver.notify(0)
      most = Math.max(most, device.held.length)
      if (i % 3 === 0 && device.held.length > 0) {
        device.held.shift()!.finish()
        finished++
        await new Promise(setImmediate)
      }
    }
    expect(most).toBe(8)
    expect(finished).toBeGreaterThan(1000)
    expect(driver.status).toBe(READY)
  })

  it('at once end in other turns of the event loop as well', async () => {
    const { driver, counted, queue } = counting(8)
    // Each look at the clock is a quarter of a millisecond later.
    let now = 0
    vi.spyOn(performance, 'now').mockImplementation(() => {
      now += 0.25
      return now
    })
    for (let i = 0; i < 8; i++) queue.add([{ length: 1 }])
    driver.notify(0)
    expect(counted.requests).toBe(4)
    expect(driver.interrupts, 'for those that are done').toBe(1)
    driver.notify(0)
    expect(counted.requests, 'the rest has its turn already').toBe(4)
    await queue.settled()
    expect(counted.requests).toBe(8)
  })
})

describe('hostile input 15: buffers that are something else as well', () => {
  it.each(['descriptors', 'driver', 'device'] as const)('the ring itself: %s', async (part) => {
    const { driver, queue } = counting()
    const { length } = queueParts(queue.layout).find(({ address }) => address === queue.layout[part])!
    for (const value of [0x00, 0xff, 0xfe, 0xaa]) {
      driver.memory.fill(BUFFER, length, value)
      queue.addRaw([{ address: BUFFER, length, flags: NEXT, next: 3 }], 2)
      queue.writeDescriptor(3, { address: queue.layout[part], length, flags: WRITE })
      for (let i = 0; i < 3; i++) driver.notify(0)
    }
    expect(driver.failures).toEqual([])
    await driver.reset()
    driver.initialize()
    await driver.request(0, [{ length: 1 }])
  })

  it('the registers of the device, which are not RAM', () =>
    expectRefused([{ address: 0xd000_0000, length: 4, flags: WRITE }], /not all RAM/))
})

describe('hostile input 16: storms', () => {
  it('notifications for nothing neither interrupt nor reach the device', () => {
    const { driver, counted, queue } = counting()
    for (let i = 0; i < 10_000; i++) driver.notify(0)
    for (let i = 0; i < 10_000; i++) driver.doorbells[0]!.ring()
    expect([driver.interrupts, counted.requests, queue.usedIdx]).toEqual([0, 0, 0])
  })

  it.each([
    ['with avail_event', VIRTIO_F_VERSION_1 | VIRTIO_F_INDIRECT_DESC | VIRTIO_F_EVENT_IDX],
    ['with flags', VIRTIO_F_VERSION_1],
  ])('a driver that always has one more request does not keep the event loop, %s', async (_, features) => {
    let now = 0
    vi.spyOn(performance, 'now').mockImplementation(() => {
      now += 0.01
      return now
    })
    let served = 0
    let more = true
    const device = deviceWith([
      {
        handle(chain) {
          served++
          // Another vCPU's doing, which never stops, unless the device never does.
          if (more && served < 100_000) driver.queue(0).addRaw([{ address: BUFFER, length: 1, flags: WRITE }])
          return answer(chain)
        },
      },
      { handle: answer },
    ])
    const driver: VirtioDriver = new VirtioDriver(device).initialize({ features })
    driver.queue(0).addRaw([{ address: BUFFER, length: 1, flags: WRITE }])
    driver.notify(0)
    const first = served
    expect(first).toBeLessThan(200)
    for (let turn = 0; turn < 20; turn++) {
      driver.notify(0)
      expect((await driver.request(1, [{ length: 1 }])).length).toBe(0)
      await new Promise(setImmediate)
    }
    expect(served, 'it is served, too').toBeGreaterThan(first)
    more = false
    await eventually(() => driver.queue(0).usedIdx === driver.queue(0).availIdx, 'the last to be served')
  })

  it('of configuration writes change nothing but what the device takes', () => {
    const driver = new VirtioDriver(answeringDevice({ config: new Uint8Array(4) })).initialize()
    for (let i = 0; i < 10_000; i++) driver.write(REGISTERS.Config, i)
    expect(driver.interrupts).toBe(0)
    expect(driver.read(REGISTERS.Config)).toBe(0)
  })
})

it('nothing is written outside of what a driver described', () => {
  const { driver, queue } = counting()
  driver.memory.fill(BUFFER, 4096, 0x55)
  driver.memory.fill(BUFFER + 4096, 4096, 0xee)
  queue.addRaw([
    { address: BUFFER, length: 4096, flags: NEXT, next: 1 },
    { address: BUFFER + 4096 + 100, length: 50, flags: WRITE },
  ])
  driver.notify(0)
  expect(queue.usedEntry(0)).toEqual({ id: 0, length: 50 })
  const expected = new Uint8Array(4096).fill(0xee).fill(0xaa, 100, 150)
  expect(driver.memory.read(BUFFER + 4096, 4096)).toEqual(expected)
})
