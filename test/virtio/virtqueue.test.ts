import fc from 'fast-check'
import { beforeEach, describe, expect, it, vi } from 'vitest'
import { ScatterList } from '../../src/virtio/descriptor-chain.js'
import { VIRTIO_F_EVENT_IDX, VIRTIO_F_INDIRECT_DESC, VIRTIO_F_VERSION_1 } from '../../src/virtio/features.js'
import type { Virtqueue } from '../../src/virtio/virtqueue.js'
import { eventually, memoryWithEdges, type RequestPart, VirtioDriver } from '../helpers/virtio-driver.js'
import { answer, answeringDevice, deviceWith, HoldingDevice, invert, pattern } from './devices.js'

const MIB = 2 ** 20
const WITHOUT_EVENT_IDX = VIRTIO_F_VERSION_1 | VIRTIO_F_INDIRECT_DESC

// A queue is served for a certain time and then in another turn: in here it takes none.
beforeEach(() => {
  vi.spyOn(performance, 'now').mockReturnValue(0)
})

/** A driver of a device that answers at once. */
function answering(options: { size?: number; features?: bigint } = {}) {
  const { size = 64, features } = options
  const driver = new VirtioDriver(answeringDevice({ maxSize: 32768 }))
  return driver.initialize({ sizes: [size], ...(features === undefined ? {} : { features }) })
}

const joined = (buffers: readonly Uint8Array[]) => [...Buffer.concat(buffers)]

describe('a chain', () => {
  it('is answered, and the used ring says which and how much', async () => {
    const driver = answering()
    const queue = driver.queue(0)
    const head = queue.add([{ bytes: Uint8Array.of(1, 2, 3) }, { length: 8 }])
    expect(queue.kick()).toBe(true)
    expect(queue.usedIdx).toBe(1)
    expect(queue.usedEntry(0)).toEqual({ id: head, length: 3 })
    expect(queue.used()).toEqual([
      {
        head,
        length: 3,
        buffers: [Uint8Array.of(254, 253, 252, 0, 0, 0, 0, 0)],
        data: Buffer.of(254, 253, 252),
      },
    ])
  })

  it.each([
    ['direct', false],
    ['indirect', true],
    ['direct with an indirect rest', 2],
  ] as const)('has its parts put together in order: %s', async (_, indirect) => {
    const driver = answering()
    const lengths = [1, 0, 4096, 3, 17]
    const parts: RequestPart[] = [
      ...lengths.map((length, i) => ({ bytes: pattern(length, i) })),
      ...lengths.map((length) => ({ length })),
    ]
    const { length, buffers } = await driver.request(0, parts, { indirect })
    const sent = joined(lengths.map((length, i) => pattern(length, i)))
    expect(length).toBe(sent.length)
    expect(buffers.map((buffer) => buffer.length)).toEqual(lengths)
    expect(joined(buffers)).toEqual([...invert(Uint8Array.from(sent))])
  })

  it('may have nothing to be read, nothing to be written, or neither', async () => {
    const driver = answering()
    expect(await driver.request(0, [{ length: 4 }])).toMatchObject({ length: 0 })
    expect(await driver.request(0, [{ bytes: pattern(4) }])).toMatchObject({ length: 0, buffers: [] })
    expect(await driver.request(0, [{ length: 0 }])).toMatchObject({ length: 0 })
    expect(driver.failures).toEqual([])
    expect(driver.status).toBe(15)
  })

  it('may lie across the border between two stretches of RAM, and above 4 GiB', async () => {
    const driver = answering()
    const bytes = pattern(1000)
    const across = await driver.request(0, [
      { bytes, address: MIB - 100 },
      { length: 1000, address: 2 ** 32 + 5 },
    ])
    expect([...across.data]).toEqual([...invert(bytes)])
    const back = await driver.request(0, [
      { bytes, address: 2 ** 32 + MIB - 1000 },
      { length: 1000, address: MIB - 999 },
    ])
    expect([...back.data]).toEqual([...invert(bytes)])
  })

  it('may have its indirect table across the border between two stretches of RAM', async () => {
    const driver = new VirtioDriver(answeringDevice(), { heap: { start: MIB - 4096, end: MIB + 8192 } })
    driver.initialize({ sizes: [8] })
    const lengths = Array.from({ length: 200 }, () => 2)
    const parts = [...lengths.map((length, i) => ({ bytes: pattern(length, i) })), { length: 400 }]
    const { data } = await driver.request(0, parts, { indirect: true })
    expect(driver.layOut(2).descriptors).toBeLessThan(MIB)
    expect([...data]).toEqual([
      ...invert(Uint8Array.from(joined(lengths.map((length, i) => pattern(length, i))))),
    ])
  })

  it('may be longer than the queue with an indirect table, up to 1024 descriptors', async () => {
    const driver = answering({ size: 2 })
    const parts = Array.from({ length: 1023 }, (_, i) => ({ bytes: Uint8Array.of(i & 0xff) }))
    const { length } = await driver.request(0, [...parts, { length: 2000 }], { indirect: true })
    expect(length).toBe(1023)
  })

  it('gives a device no more than it asks for', () => {
    const seen: number[][] = []
    const device = deviceWith([
      {
        handle(chain) {
          seen.push([...chain.read(2)], [...chain.read(2, 3)], [...chain.read(9, 4)], [...chain.read(9, 7)])
          return chain.write(Uint8Array.of(1, 2, 3, 4, 5), 2)
        },
      },
    ])
    const driver = new VirtioDriver(device).initialize()
    const queue = driver.queue(0)
    queue.add([{ bytes: Uint8Array.of(10, 11, 12) }, { bytes: Uint8Array.of(13, 14) }, { length: 4 }])
    queue.kick()
    expect(seen).toEqual([[10, 11], [13, 14], [14], []])
    expect(joined(queue.used()[0]!.buffers)).toEqual([0, 0, 1, 2])
  })

  it('is one row of bytes, however it is cut', () => {
    const memory = memoryWithEdges()
    fc.assert(
      fc.property(
        fc.array(fc.nat(40), { maxLength: 8 }),
        fc.nat(330),
        fc.uint8Array({ maxLength: 330 }),
        fc.constantFrom(0x100, MIB - 50, 2 ** 32),
        (lengths, offset, bytes, start) => {
          let address = start
          const buffers = lengths.map((length) => {
            const buffer = { address, length }
            // One byte of nobody's between two.
            address += length + 1
            return buffer
          })
          memory.fill(start, address - start, 0xee)
          const list = new ScatterList(memory, buffers)
          const total = lengths.reduce((sum, length) => sum + length, 0)
          expect(list.length).toBe(total)
          const expected = new Uint8Array(total).fill(0xee)
          const room = Math.max(0, Math.min(bytes.length, total - offset))
          expected.set(bytes.subarray(0, room), room > 0 ? offset : 0)
          expect(list.copyFrom(bytes, offset)).toBe(room)
          const copy = new Uint8Array(total)
          expect(list.copyTo(copy)).toBe(total)
          expect(copy).toEqual(expected)
          expect(joined(list.views(offset))).toEqual([...expected.subarray(offset)])
          for (const { address, length } of buffers) expect(memory.readUint8(address + length)).toBe(0xee)
        },
      ),
    )
  })
})

describe('a queue', () => {
  it.each([1, 2, 16, 1024, 32768])(
    'of %d descriptors goes round, and round the 16-bit indices',
    async (size) => {
      // The rings of the largest have 832 KiB.
      const driver = answering({ size })
      driver.skipTo(65_530)
      const queue = driver.queue(0)
      const parts = (seed: number) =>
        size === 1 ? [{ bytes: pattern(4, seed) }] : [{ bytes: pattern(4, seed) }, { length: 4 }]
      for (let i = 0; i < 12; i++) {
        const { data } = await driver.request(0, parts(i))
        expect([...data]).toEqual(size === 1 ? [] : [...invert(pattern(4, i))])
      }
      expect(queue.usedIdx).toBe(6)
      expect(driver.status).toBe(15)
    },
  )

  it('takes every descriptor at once', async () => {
    const driver = answering({ size: 16 })
    const queue = driver.queue(0)
    const heads = Array.from({ length: 8 }, (_, i) => queue.add([{ bytes: pattern(2, i) }, { length: 2 }]))
    expect(queue.freeDescriptors).toBe(0)
    queue.kick()
    const used = queue.used()
    expect(used.map(({ head }) => head)).toEqual(heads)
    expect(used.map(({ data }) => [...data])).toEqual(heads.map((_, i) => [...invert(pattern(2, i))]))
  })

  it('takes what was made available before the driver was ready', () => {
    const driver = new VirtioDriver(answeringDevice()).initialize({ driverOk: false })
    const queue = driver.queue(0)
    queue.add([{ bytes: pattern(3) }, { length: 3 }])
    expect(queue.used()).toEqual([])
    driver.driverOk()
    expect(queue.used()).toMatchObject([{ length: 3 }])
  })

  it('is served in the order of the available ring, and used in that in which requests end', async () => {
    const device = new HoldingDevice()
    const driver = new VirtioDriver(device).initialize()
    const queue = driver.queue(0)
    const heads = [1, 2, 3].map((i) => queue.add([{ bytes: Uint8Array.of(i) }, { length: 1 }]))
    queue.kick()
    expect(device.held.map(({ chain }) => chain.head)).toEqual(heads)
    device.held[2]!.finish()
    device.held[0]!.finish()
    await eventually(() => queue.usedIdx === 2)
    const first = queue.used()
    expect(first.map(({ head, data }) => [head, ...data])).toEqual([
      [heads[2], 252],
      [heads[0], 254],
    ])
    device.held[1]!.finish()
    const [last] = await queue.settled()
    expect([last!.head, ...last!.data]).toEqual([heads[1], 253])
  })

  it('serves some requests at once and others later', async () => {
    const late: (() => void)[] = []
    const device = deviceWith([
      {
        handle(chain) {
          if (chain.read(1)[0] === 0) return answer(chain)
          return new Promise((resolve) => late.push(() => resolve(answer(chain))))
        },
      },
    ])
    const driver = new VirtioDriver(device).initialize()
    const queue = driver.queue(0)
    const [slow, fast] = [1, 0].map((byte) => queue.add([{ bytes: Uint8Array.of(byte) }, { length: 1 }]))
    queue.kick()
    expect(queue.used().map(({ head }) => head)).toEqual([fast])
    for (const finish of late) finish()
    expect((await queue.settled()).map(({ head }) => head)).toEqual([slow])
  })

  it('gives out no more chains than it has descriptors, and goes on as they come back', async () => {
    const device = new HoldingDevice()
    const driver = new VirtioDriver(device).initialize({ sizes: [4] })
    const queue = driver.queue(0)
    for (let i = 0; i < 4; i++) queue.add([{ length: 1 }])
    queue.kick()
    expect(device.taken).toBe(4)
    // What a driver may not do: the descriptors are all under way.
    for (let i = 0; i < 4; i++) queue.makeAvailable(i)
    driver.notify(0)
    expect(device.taken).toBe(4)
    device.held.shift()!.finish()
    await eventually(() => device.taken === 5)
    device.finishAll()
    await eventually(() => device.taken === 8, 'the rest to be taken')
  })

  it('does what a plain model of a driver expects, whatever the order of things', async () => {
    const action = fc.oneof(
      fc.record({
        do: fc.constant('add' as const),
        out: fc.array(fc.nat(20), { maxLength: 3 }),
        room: fc.array(fc.nat(20), { maxLength: 3 }),
        indirect: fc.boolean(),
      }),
      fc.record({ do: fc.constantFrom('kick' as const, 'ring' as const, 'take' as const, 'turn' as const) }),
      fc.record({ do: fc.constant('finish' as const), which: fc.nat() }),
    )
    await fc.assert(
      fc.asyncProperty(
        fc.array(action, { minLength: 1, maxLength: 80 }),
        fc.constantFrom(1, 2, 4, 16),
        fc.boolean(),
        fc.constantFrom(0, 65_520, 65_535),
        async (actions, size, eventIdx, start) => {
          const device = new HoldingDevice()
          const driver = new VirtioDriver(device)
          const features = WITHOUT_EVENT_IDX | (eventIdx ? VIRTIO_F_EVENT_IDX : 0n)
          driver.initialize({ features, sizes: [size] })
          driver.skipTo(start)
          const queue = driver.queue(0)
          const expected = new Map<number, { data: number[] }>()
          let answered = 0
          const check = () => {
            for (const { head, data } of queue.used()) {
              expect([...data]).toEqual(expected.get(head)!.data)
              expected.delete(head)
              answered++
            }
          }
          let added = 0
          for (const step of actions) {
            if (step.do === 'add') {
              const count = step.out.length + step.room.length
              if (count === 0 || (step.indirect ? 1 : count) > queue.freeDescriptors) continue
              const out = step.out.map((length, i) => pattern(length, added * 3 + i))
              const parts = [...out.map((bytes) => ({ bytes })), ...step.room.map((length) => ({ length }))]
              const head = queue.add(parts, { indirect: step.indirect })
              const room = step.room.reduce((sum, length) => sum + length, 0)
              expect(expected.has(head)).toBe(false)
              expected.set(head, {
                data: joined(out)
                  .slice(0, room)
                  .map((byte) => byte ^ 0xff),
              })
              added++
            } else if (step.do === 'kick') queue.kick()
            else if (step.do === 'ring') driver.notify(0)
            else if (step.do === 'take') check()
            else if (step.do === 'turn') await new Promise(setImmediate)
            else if (step.do === 'finish' && device.held.length > 0) {
              device.held.splice(step.which % device.held.length, 1)[0]!.finish()
            }
          }
          queue.kick()
          const allAnswered = () => {
            device.finishAll()
            check()
            return answered === added
          }
          await eventually(allAnswered, 'all requests to be answered', 1000)
          expect(expected.size).toBe(0)
          expect(device.taken).toBe(added)
          expect(queue.usedIdx).toBe((start + added) & 0xffff)
          expect(driver.failures).toEqual([])
        },
      ),
      { numRuns: 150 },
    )
  })
})

describe('a device that takes buffers when it needs them', () => {
  function taking() {
    let queue: Virtqueue | undefined
    let calls = 0
    const device = deviceWith([
      {
        available(given) {
          queue = given
          calls++
        },
      },
    ])
    const driver = new VirtioDriver(device).initialize()
    driver.notify(0)
    return { driver, queue: queue!, rings: driver.queue(0), calls: () => calls }
  }

  it('is told that there are some, and gets them one after the other', () => {
    const { rings, queue, calls } = taking()
    const before = calls()
    const heads = [rings.add([{ length: 4 }]), rings.add([{ length: 4 }])]
    rings.kick()
    expect(calls()).toBe(before + 1)
    expect([queue.pop()?.head, queue.pop()?.head, queue.pop()]).toEqual([...heads, undefined])
    expect(queue.inFlight).toBe(2)
  })

  it('can put the last one back, and gets it again', () => {
    const { rings, queue } = taking()
    rings.add([{ length: 4 }])
    const second = rings.add([{ length: 4 }])
    queue.pop()
    expect(queue.pop()?.head).toBe(second)
    queue.unpop()
    expect(queue.inFlight).toBe(1)
    expect(queue.pop()?.head).toBe(second)
  })

  it('shows its answers at once, and interrupts when it says so', () => {
    const { driver, rings, queue } = taking()
    rings.add([{ length: 4 }])
    rings.add([{ length: 4 }])
    for (const byte of [1, 2]) {
      const chain = queue.pop()!
      queue.push(chain, chain.write(Uint8Array.of(byte)))
    }
    expect(rings.used().map(({ data }) => [...data])).toEqual([[1], [2]])
    expect(driver.interrupts).toBe(0)
    rings.usedEvent = 0
    queue.notify()
    expect(driver.interrupts).toBe(1)
    queue.notify()
    expect(driver.interrupts, 'there is nothing new').toBe(1)
  })
})

describe('used buffer notifications', () => {
  it('come once for what was done together', () => {
    const driver = answering()
    const queue = driver.queue(0)
    for (let i = 0; i < 10; i++) queue.add([{ length: 1 }])
    queue.kick()
    expect(driver.interrupts).toBe(1)
    expect(driver.acknowledge()).toBe(1)
    expect(driver.interruptStatus).toBe(0)
  })

  it('come for each request that is done by itself', async () => {
    const device = new HoldingDevice()
    const driver = new VirtioDriver(device).initialize({ features: WITHOUT_EVENT_IDX })
    const queue = driver.queue(0)
    for (let i = 0; i < 3; i++) queue.add([{ length: 1 }])
    queue.kick()
    expect(driver.interrupts).toBe(0)
    for (let i = 1; i <= 3; i++) {
      device.held.shift()!.finish()
      await eventually(() => queue.usedIdx === i)
      expect(driver.interrupts).toBe(i)
    }
  })

  it('come once the ring shows what they are for', async () => {
    const seen: number[] = []
    const device = new HoldingDevice()
    const driver: VirtioDriver = new VirtioDriver(device, {
      onInterrupt: () => seen.push(driver.queue(0).usedIdx, driver.interruptStatus),
    }).initialize()
    driver.queue(0).add([{ length: 1 }])
    driver.queue(0).kick()
    device.finishAll()
    await driver.settled()
    expect(seen).toEqual([1, 1])
  })

  it('do not come while VIRTQ_AVAIL_F_NO_INTERRUPT is set', async () => {
    const driver = answering({ features: WITHOUT_EVENT_IDX })
    const queue = driver.queue(0)
    queue.availFlags = 1
    await driver.request(0, [{ length: 1 }])
    expect(driver.interrupts).toBe(0)
    queue.availFlags = 0
    await driver.request(0, [{ length: 1 }])
    expect(driver.interrupts).toBe(1)
  })

  it('come despite that flag where used_event was negotiated in its place', async () => {
    const driver = answering()
    driver.queue(0).availFlags = 1
    await driver.request(0, [{ length: 1 }])
    expect(driver.interrupts).toBe(1)
  })

  it.each([0, 65_533, 65_534, 65_535, 32_767])(
    'come when used_event is reached, from index %d on',
    (start) => {
      const driver = answering()
      driver.skipTo(start)
      const queue = driver.queue(0)
      queue.usedEvent = start + 3
      for (const interrupts of [0, 0, 0, 1, 1, 1]) {
        queue.add([{ length: 1 }])
        queue.kick()
        expect(driver.interrupts).toBe(interrupts)
      }
    },
  )

  it('come when used_event is passed by several at once', () => {
    const driver = answering()
    driver.skipTo(65_534)
    const queue = driver.queue(0)
    queue.usedEvent = 0
    for (let i = 0; i < 5; i++) queue.add([{ length: 1 }])
    queue.kick()
    expect(driver.interrupts).toBe(1)
    queue.usedEvent = 0
    for (let i = 0; i < 5; i++) queue.add([{ length: 1 }])
    queue.kick()
    expect(driver.interrupts, 'it lies behind by now').toBe(1)
  })

  it('agree with vring_need_event of VIRTIO 1.2, 2.7.7.2', () => {
    fc.assert(
      fc.property(fc.nat(65_535), fc.integer({ min: 1, max: 16 }), fc.nat(65_535), (start, count, event) => {
        const driver = answering()
        driver.skipTo(start)
        const queue = driver.queue(0)
        queue.usedEvent = event
        for (let i = 0; i < count; i++) queue.add([{ length: 1 }])
        driver.notify(0)
        const passed = Array.from({ length: count }, (_, i) => (start + i) & 0xffff)
        expect(driver.interrupts).toBe(passed.includes(event) ? 1 : 0)
      }),
      {
        examples: [
          [65_535, 2, 0],
          [65_535, 1, 65_535],
          [0, 1, 65_535],
        ],
      },
    )
  })
})

describe('available buffer notifications', () => {
  it('are not wanted while the device looks by itself (VIRTQ_USED_F_NO_NOTIFY), and then again', () => {
    const flags: number[] = []
    const device = deviceWith([
      {
        handle(chain) {
          flags.push(driver.queue(0).usedFlags)
          return answer(chain)
        },
      },
    ])
    const driver: VirtioDriver = new VirtioDriver(device).initialize({ features: WITHOUT_EVENT_IDX })
    const queue = driver.queue(0)
    queue.add([{ length: 1 }])
    expect(queue.kick()).toBe(true)
    expect(flags).toEqual([1])
    expect(queue.usedFlags).toBe(0)
  })

  it('never touch the flags where avail_event was negotiated', async () => {
    const flags: number[] = []
    const device = deviceWith([
      {
        handle(chain) {
          flags.push(driver.queue(0).usedFlags)
          return answer(chain)
        },
      },
    ])
    const driver: VirtioDriver = new VirtioDriver(device).initialize()
    await driver.request(0, [{ length: 1 }])
    expect([...flags, driver.queue(0).usedFlags]).toEqual([0, 0])
  })

  it.each([0, 65_534, 65_535])('are wanted from avail_event on, from index %d on', async (start) => {
    const driver = answering()
    driver.skipTo(start)
    const queue = driver.queue(0)
    expect(queue.availEvent).toBe(start)
    for (let i = 1; i <= 3; i++) {
      queue.add([{ length: 1 }])
      expect(queue.kick()).toBe(true)
      expect(queue.availEvent).toBe((start + i) & 0xffff)
    }
  })

  it.each([
    ['flags', WITHOUT_EVENT_IDX],
    ['avail_event', WITHOUT_EVENT_IDX | VIRTIO_F_EVENT_IDX],
  ])('are not needed for what comes while others are served: %s', (_, features) => {
    let more = 3
    const kicks: boolean[] = []
    const device = deviceWith([
      {
        handle(chain) {
          // Another vCPU's doing.
          if (more-- > 0) {
            driver.queue(0).add([{ length: 1 }])
            kicks.push(driver.queue(0).kick())
          }
          return answer(chain)
        },
      },
    ])
    const driver: VirtioDriver = new VirtioDriver(device).initialize({ features })
    driver.queue(0).add([{ length: 1 }])
    driver.queue(0).kick()
    expect(kicks).toEqual([false, false, false])
    expect(driver.queue(0).used()).toHaveLength(4)
  })

  it('are not missed between the last look and the wish to be notified', () => {
    let more = 3
    const device = answeringDevice()
    const driver: VirtioDriver = new VirtioDriver(device, {
      // Served and shown, but the device does not want to be told yet.
      onInterrupt() {
        if (more-- > 0) driver.queue(0).add([{ length: 1 }])
      },
    }).initialize({ features: WITHOUT_EVENT_IDX })
    driver.queue(0).add([{ length: 1 }])
    driver.queue(0).kick()
    expect(driver.queue(0).used()).toHaveLength(4)
  })
})
