import fc from 'fast-check'
import { beforeEach, describe, expect, it, vi } from 'vitest'
import { GuestMemory } from '../../src/memory/guest-memory.js'
import { VirtioEntropy, type VirtioEntropyOptions } from '../../src/virtio/entropy.js'
import { COMMON_FEATURES } from '../../src/virtio/features.js'
import {
  encode,
  eventually,
  linked,
  REGISTERS,
  type UsedChain,
  VIRTQ_DESC_F_INDIRECT,
  VIRTQ_DESC_F_WRITE,
  VirtioDriver,
  type VirtioDriverOptions,
} from '../helpers/virtio-driver.js'
import { pattern } from './devices.js'

const MIB = 2 ** 20
const MILLISECOND = 1e6
const SECOND = 1e9
/** What is given at most for one request. */
const MAX_REQUEST = 65536
/** What the tests' sources fill with. */
const FILLED = 0xa5
/** Of which a tenth of a second's can be had at once: 100 bytes. */
const RATE = 1000
const BURST = 100

// A queue is served for a certain time and then in another turn: in here it takes none.
beforeEach(() => {
  vi.spyOn(performance, 'now').mockReturnValue(0)
})

/** Fills with {@link FILLED}, and counts. */
class CountingSource {
  readonly views: Uint8Array[] = []
  readonly fill = (bytes: Uint8Array) => {
    this.views.push(bytes)
    bytes.fill(FILLED)
  }

  get bytes(): number {
    return this.views.reduce((sum, { length }) => sum + length, 0)
  }
}

function setUp(options?: VirtioEntropyOptions, driverOptions?: VirtioDriverOptions) {
  const driver = new VirtioDriver(new VirtioEntropy(options), driverOptions).initialize()
  return { driver, queue: driver.queue(0) }
}

/** One that gives {@link BURST} bytes at once and then {@link RATE} a second. */
function slow() {
  const source = new CountingSource()
  return { source, ...setUp({ source: source.fill, bytesPerSecond: RATE }) }
}

/** What is used once all that is done has come through. */
async function usedNow(driver: VirtioDriver): Promise<UsedChain[]> {
  await new Promise(setImmediate)
  return driver.queue(0).used()
}

describe('the entropy device', () => {
  it('is one: of type 4, with one queue, and nothing but that', () => {
    const { driver } = setUp()
    expect(driver.read(REGISTERS.DeviceID)).toBe(4)
    expect([driver.queueMax(0), driver.queueMax(1)]).toEqual([64, 0])
    expect(driver.offered).toBe(COMMON_FEATURES)
  })

  it('fills requests with bytes that differ from one to the next, and between machines', async () => {
    const { driver } = setUp()
    const answers = [
      await driver.request(0, [{ length: 64 }]),
      await driver.request(0, [{ length: 64 }]),
      await setUp().driver.request(0, [{ length: 64 }]),
    ]
    expect(answers.map(({ length }) => length)).toEqual([64, 64, 64])
    expect(new Set(answers.map(({ data }) => Buffer.from(data).toString('hex'))).size).toBe(3)
    // Of 64 random bytes, never all but a few are the same.
    for (const { data } of answers) expect(new Set(data).size).toBeGreaterThan(16)
  })

  it.each([
    ['direct', false],
    ['indirect', true],
  ])('fills all buffers of a request, and no byte beside them: %s', async (_, indirect) => {
    const source = new CountingSource()
    const { driver } = setUp({ source: source.fill })
    const buffers = [
      { address: 0x80000, length: 1 },
      { address: 0x80002, length: 300 },
      // Across two stretches of RAM.
      { address: MIB - 7, length: 20 },
      { address: 2 ** 32 + MIB - 5, length: 5 },
    ]
    const { length, data } = await driver.request(0, [...buffers, { length: 0 }], { indirect })
    expect(length).toBe(326)
    expect(data.every((byte) => byte === FILLED)).toBe(true)
    for (const beside of [0x7ffff, 0x80001, 0x80002 + 300, MIB - 8, MIB + 13, 2 ** 32 + MIB - 6]) {
      expect(driver.memory.readUint8(beside)).toBe(0)
    }
  })

  it('has its source fill guest memory itself', async () => {
    const source = new CountingSource()
    const { driver } = setUp({ source: source.fill })
    await driver.request(0, [{ address: 0x80000, length: 32 }])
    const guest = driver.memory.view(0x80000, 32)
    const [view] = source.views
    expect(view!.buffer === guest.buffer).toBe(true)
    expect([view!.byteOffset, view!.length]).toEqual([guest.byteOffset, 32])
  })

  it('does not care for what the driver wrote', async () => {
    const source = new CountingSource()
    const { driver } = setUp({ source: source.fill })
    const bytes = pattern(16)
    expect(await driver.request(0, [{ bytes, address: 0x80000 }, { length: 8 }])).toMatchObject({ length: 8 })
    expect(driver.memory.read(0x80000, 16)).toEqual(bytes)
    expect(source.bytes).toBe(8)
  })

  it('gives back a request without room as it is', async () => {
    const source = new CountingSource()
    const { driver } = setUp({ source: source.fill })
    expect(await driver.request(0, [{ bytes: pattern(16) }])).toMatchObject({ length: 0 })
    expect(await driver.request(0, [{ length: 0 }])).toMatchObject({ length: 0 })
    expect(source.bytes).toBe(0)
    expect(await driver.request(0, [{ length: 8 }])).toMatchObject({ length: 8 })
  })

  it.each<[string, object]>([
    ['source of rng', { source: 'urandom' }],
    ['bytesPerSecond of rng', { bytesPerSecond: 0 }],
    ['bytesPerSecond of rng', { bytesPerSecond: Number.NaN }],
    ['bytesPerSecond of rng', { bytesPerSecond: Number.POSITIVE_INFINITY }],
    ['bytesPerSecond of rng', { bytesPerSecond: '1M' }],
  ])('refuses a bad %s: %o', (name, options) => {
    expect(() => new VirtioEntropy(options)).toThrow(
      expect.objectContaining({ code: 'ERR_INVALID_ARGUMENT', message: expect.stringContaining(name) }),
    )
  })

  it('stops the machine if its source throws, at once or when a request has waited', async () => {
    const source = new CountingSource()
    let broken = true
    const fill = (bytes: Uint8Array) => {
      if (broken) throw new Error('no entropy left')
      source.fill(bytes)
    }
    const failed = expect.objectContaining({ code: 'ERR_DEVICE_FAILED', device: 'rng' })
    const { driver, queue } = setUp({ source: fill, bytesPerSecond: RATE })
    queue.add([{ length: 8 }])
    queue.kick()
    expect(driver.failures).toEqual([failed])

    broken = false
    const late = setUp({ source: fill, bytesPerSecond: RATE })
    await late.driver.request(0, [{ length: BURST }])
    late.queue.add([{ length: 8 }])
    late.queue.kick()
    broken = true
    late.driver.clock.advance(SECOND)
    await eventually(() => late.driver.failures.length > 0)
    expect(late.driver.failures).toEqual([failed])
  })
})

describe('the rate of the entropy device', () => {
  it('is 1 MiB a second unless given, of which a tenth can be had at once', async () => {
    const { driver } = setUp()
    const first = await driver.request(0, [{ length: MAX_REQUEST }])
    const second = await driver.request(0, [{ length: MAX_REQUEST }])
    expect(first.length).toBe(MAX_REQUEST)
    expect(second.length).toBe(Math.floor(MIB / 10) - MAX_REQUEST)
  })

  it('lets a request of more than what is left have what is left', async () => {
    const { driver } = slow()
    expect(await driver.request(0, [{ length: 60 }])).toMatchObject({ length: 60 })
    expect(await driver.request(0, [{ length: 500 }])).toMatchObject({ length: BURST - 60 })
  })

  it('lets requests wait once nothing is left, and serves them in their order as time passes', async () => {
    const { source, driver, queue } = slow()
    await driver.request(0, [{ length: BURST }])
    const heads = [20, 10, 30].map((length) => queue.add([{ length }]))
    queue.kick()
    expect(await usedNow(driver)).toEqual([])
    driver.clock.advance(19 * MILLISECOND)
    expect(await usedNow(driver)).toEqual([])
    expect(source.bytes).toBe(BURST)
    driver.clock.advance(2 * MILLISECOND)
    const used = await usedNow(driver)
    expect(used.map(({ head, length }) => [head, length])).toEqual([[heads[0], 20]])
    driver.clock.advance(SECOND)
    used.push(...(await usedNow(driver)))
    expect(used.map(({ head }) => head)).toEqual(heads)
    expect(used.every(({ length }) => length > 0)).toBe(true)
  })

  it('does not let a request that came later put off those before it', async () => {
    const { driver, queue } = slow()
    await driver.request(0, [{ length: BURST }])
    const head = queue.add([{ length: 40 }])
    queue.kick()
    for (let i = 0; i < 20; i++) {
      driver.clock.advance(2 * MILLISECOND)
      queue.add([{ length: 40 }])
      queue.kick()
    }
    driver.clock.advance(MILLISECOND)
    expect((await usedNow(driver))[0]).toMatchObject({ head, length: 40 })
  })

  it('wakes a huge request when there is something worth giving, not for every byte', async () => {
    const { driver, queue } = slow()
    await driver.request(0, [{ length: BURST }])
    queue.add([{ length: 5000 }])
    queue.kick()
    driver.clock.advance(SECOND)
    const [chain] = await usedNow(driver)
    expect(chain!.length).toBeGreaterThanOrEqual(BURST / 2)
    expect(chain!.length).toBeLessThanOrEqual(BURST)
  })

  it('does not add up over a pause to more than can be had at once', async () => {
    const { driver } = slow()
    driver.clock.advance(3600 * SECOND)
    expect(await driver.request(0, [{ length: 5000 }])).toMatchObject({ length: BURST })
  })

  it('holds for requests without room, too: they cost the host something', async () => {
    const { driver, queue } = slow()
    let done = 0
    for (let i = 0; i < 3 * BURST; i++) {
      queue.add([{ length: 0 }])
      queue.kick()
      done += queue.used().length
      if (queue.freeDescriptors === 0) break
    }
    expect(done).toBe(BURST)
    driver.clock.advance(SECOND)
    expect((await usedNow(driver)).length).toBeGreaterThan(0)
  })

  it('is not got round by resets', async () => {
    const { source, driver } = slow()
    await driver.request(0, [{ length: BURST }])
    for (let i = 0; i < 10; i++) {
      await driver.reset()
      driver.initialize()
      driver.queue(0).add([{ length: BURST }])
      driver.queue(0).kick()
    }
    expect(await usedNow(driver)).toEqual([])
    expect(source.bytes).toBe(BURST)
    driver.clock.advance(SECOND)
    expect(await usedNow(driver)).toHaveLength(1)
  })

  it('holds for any requests at any times, and each gets something, in its turn', async () => {
    const step = fc.oneof(
      fc.record({ length: fc.integer({ min: 1, max: 300 }) }),
      fc.record({ pause: fc.integer({ min: 1, max: 200 * MILLISECOND }) }),
    )
    const rate = fc.integer({ min: 1, max: 100_000 })
    await fc.assert(
      fc.asyncProperty(rate, fc.array(step, { maxLength: 60 }), async (bytesPerSecond, steps) => {
        const source = new CountingSource()
        const { driver, queue } = setUp({ source: source.fill, bytesPerSecond })
        const atOnce = Math.max(1, bytesPerSecond / 10)
        const asked: { head: number; length: number }[] = []
        const used: UsedChain[] = []
        let elapsed = 0
        for (const step of steps) {
          if ('length' in step) {
            asked.push({ head: queue.add([{ length: step.length }]), length: step.length })
            queue.kick()
          } else {
            driver.clock.advance(step.pause)
            elapsed += step.pause
          }
          used.push(...(await usedNow(driver)))
          const given = used.reduce((sum, { length }) => sum + length, 0)
          expect(source.bytes).toBe(given)
          // A byte for what does not come out even.
          expect(given).toBeLessThanOrEqual(atOnce + (elapsed / SECOND) * bytesPerSecond + 1)
        }
        driver.clock.advance(100 * SECOND)
        used.push(...(await usedNow(driver)))
        expect(used.map(({ head }) => head)).toEqual(asked.map(({ head }) => head))
        used.forEach(({ length }, i) => {
          expect(length).toBeGreaterThan(0)
          expect(length).toBeLessThanOrEqual(asked[i]!.length)
        })
      }),
      { numRuns: 50 },
    )
  })
})

describe('hostile input 20: a huge request', () => {
  it('for 4 GiB, over descriptors of the same memory, gets no more than 64 KiB', () => {
    const CHUNK = 4 * MIB
    const memory = new GuestMemory([{ start: 0, buffer: new ArrayBuffer(2 * CHUNK) }])
    const source = new CountingSource()
    const { driver, queue } = setUp({ source: source.fill, bytesPerSecond: 2 ** 40 }, { memory })
    const table = encode(
      linked(
        Array.from({ length: 1024 }, () => ({ address: CHUNK, length: CHUNK, flags: VIRTQ_DESC_F_WRITE })),
      ),
    )
    memory.write(0x80000, table)
    const before = process.memoryUsage().arrayBuffers
    queue.addRaw([{ address: 0x80000, length: table.length, flags: VIRTQ_DESC_F_INDIRECT }])
    driver.notify(0)
    // The indirect table is copied; nothing is, or is made, that is as long as the request.
    expect(process.memoryUsage().arrayBuffers - before).toBeLessThan(MIB)
    expect(queue.usedEntry(0)).toEqual({ id: 0, length: MAX_REQUEST })
    expect(source.bytes).toBe(MAX_REQUEST)
    expect(source.views.every(({ buffer }) => buffer === memory.view(0, 1).buffer)).toBe(true)
    expect(memory.readUint8(CHUNK + MAX_REQUEST)).toBe(0)
    expect(driver.failures).toEqual([])
  })

  it('that waits is served like any other', async () => {
    const { source, driver, queue } = slow()
    await driver.request(0, [{ length: BURST }])
    queue.addRaw(
      linked(Array.from({ length: 64 }, () => ({ address: MIB, length: MIB, flags: VIRTQ_DESC_F_WRITE }))),
    )
    driver.notify(0)
    driver.clock.advance(SECOND)
    await eventually(() => queue.usedIdx === 2)
    expect(queue.usedEntry(1).length).toBeLessThanOrEqual(BURST)
    expect(source.bytes).toBeLessThanOrEqual(2 * BURST)
  })
})

describe('hostile input 14: requests without end', () => {
  it('wait in no greater number than there are descriptors', async () => {
    const { source, driver, queue } = slow()
    await driver.request(0, [{ length: BURST }])
    const { requests } = driver.transport.function.statistics
    queue.writeDescriptor(0, { address: 0x80000, length: 10, flags: VIRTQ_DESC_F_WRITE })
    for (let i = 0; i < 128; i++) {
      if (i === 64) driver.notify(0)
      queue.makeAvailable(0)
    }
    for (let i = 0; i < 10; i++) driver.notify(0)
    await new Promise(setImmediate)
    expect(driver.transport.function.statistics.requests - requests).toBe(64)
    await eventually(() => {
      driver.clock.advance(100 * MILLISECOND)
      return queue.usedIdx === 129
    })
    expect(source.bytes).toBeLessThanOrEqual(BURST + 128 * 10)
    expect(driver.failures).toEqual([])
  })
})

describe('hostile input 9: a reset while requests wait', () => {
  it('gives them up: nothing is written any more', async () => {
    const { source, driver, queue } = slow()
    await driver.request(0, [{ length: BURST }])
    const heads = [0x80000, 0x80100].map((address) => queue.add([{ length: 50, address }]))
    expect(heads).toHaveLength(2)
    queue.kick()
    const { interrupts } = driver
    const { device, size } = queue.layout
    const ring = driver.memory.read(device, 6 + 8 * size)
    driver.status = 0
    await eventually(() => driver.status === 0)
    driver.clock.advance(10 * SECOND)
    await new Promise(setImmediate)
    expect(driver.memory.read(device, ring.length)).toEqual(ring)
    expect(driver.memory.read(0x80000, 512).every((byte) => byte === 0)).toBe(true)
    expect(driver.interrupts).toBe(interrupts)
    expect(source.bytes).toBe(BURST)

    driver.initialize()
    expect(await driver.request(0, [{ length: 50 }])).toMatchObject({ length: 50 })
  })
})

describe('the state of an entropy device', () => {
  it('cannot be saved while requests wait, and otherwise makes one that goes on', async () => {
    const { driver, queue } = slow()
    await driver.request(0, [{ length: BURST }])
    queue.add([{ length: 10 }])
    queue.kick()
    expect(() => driver.transport.saveState()).toThrow(expect.objectContaining({ code: 'ERR_RUNNING' }))
    driver.clock.advance(SECOND)
    expect(await usedNow(driver)).toHaveLength(1)
    driver.transport.restoreState(structuredClone(driver.transport.saveState()))
    expect(await driver.request(0, [{ length: 10 }])).toMatchObject({ length: 10 })
  })
})
