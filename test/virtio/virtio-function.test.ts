import fc from 'fast-check'
import { beforeEach, describe, expect, it, vi } from 'vitest'
import { NodevisorError } from '../../src/errors.js'
import { VIRTIO_F_EVENT_IDX, VIRTIO_F_INDIRECT_DESC, VIRTIO_F_VERSION_1 } from '../../src/virtio/features.js'
import type { VirtioDevice, VirtioDriver as VirtioDriverOfDevice } from '../../src/virtio/virtio-device.js'
import { VirtioFunction } from '../../src/virtio/virtio-function.js'
import { eventually, REGISTERS, STATUS, VirtioDriver } from '../helpers/virtio-driver.js'
import { answer, answeringDevice, deviceWith, HoldingDevice, invert, pattern } from './devices.js'

const { ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK, DEVICE_NEEDS_RESET, FAILED } = STATUS
const READY = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK

beforeEach(() => {
  vi.spyOn(performance, 'now').mockReturnValue(0)
})

describe('the status field', () => {
  it('goes through the steps of initialisation', () => {
    const driver = new VirtioDriver(answeringDevice())
    expect(driver.status).toBe(0)
    driver.status = ACKNOWLEDGE
    expect(driver.status).toBe(ACKNOWLEDGE)
    driver.status = ACKNOWLEDGE | DRIVER
    expect(driver.status).toBe(ACKNOWLEDGE | DRIVER)
    driver.negotiate()
    expect(driver.status).toBe(ACKNOWLEDGE | DRIVER | FEATURES_OK)
    driver.driverOk()
    expect(driver.status).toBe(READY)
  })

  it('has its bits set in order only, and none taken back but by a reset', () => {
    fc.assert(
      fc.property(fc.array(fc.nat(255), { maxLength: 12 }), (values) => {
        const driver = new VirtioDriver(answeringDevice())
        let before = 0
        for (const value of values) {
          driver.status = value
          const { status } = driver
          if (value === 0) expect(status).toBe(0)
          else expect(status & before).toBe(before)
          // Without features FEATURES_OK cannot be set, so DRIVER_OK cannot.
          expect([0, ACKNOWLEDGE, ACKNOWLEDGE | DRIVER]).toContain(status & ~FAILED)
          if (value !== 0) expect(status & ~(before | value)).toBe(0)
          before = status
        }
      }),
    )
  })

  it('keeps FAILED, and the device rests', async () => {
    const device = new HoldingDevice()
    const driver = new VirtioDriver(device).initialize()
    driver.status = READY | FAILED
    expect(driver.status).toBe(READY | FAILED)
    driver.queue(0).add([{ length: 1 }])
    driver.notify(0)
    expect(device.taken).toBe(0)
    await driver.reset()
    expect(driver.status).toBe(0)
  })

  it('shows DEVICE_NEEDS_RESET when the device gives up, and says so with an interrupt', () => {
    const device = new HoldingDevice()
    const driver = new VirtioDriver(device).initialize()
    device.driver!.needsReset('it is tired')
    expect(driver.status).toBe(READY | DEVICE_NEEDS_RESET)
    expect(driver.transport.function.problem).toBe('it is tired')
    expect(driver.acknowledge()).toBe(2)
    expect(driver.interrupts).toBe(1)
    device.driver!.needsReset('once more')
    expect(driver.interrupts).toBe(1)
    driver.queue(0).add([{ length: 1 }])
    driver.notify(0)
    expect(device.taken, 'it takes nothing any more').toBe(0)
    driver.initialize()
    expect(driver.status).toBe(READY)
    expect(driver.transport.function.problem).toBeUndefined()
  })

  it('does not let a device of before a reset give up the driver of after it', () => {
    const device = new HoldingDevice()
    const driver = new VirtioDriver(device).initialize()
    const old = device.driver!
    driver.initialize()
    old.needsReset('too late')
    old.configChanged()
    expect(driver.status).toBe(READY)
    expect(driver.interrupts).toBe(0)
  })
})

describe('features', () => {
  const OWN = (1n << 0n) | (1n << 23n) | (1n << 50n) | (1n << 127n)

  it('are those of the device, of queues and of the transport', () => {
    const driver = new VirtioDriver(answeringDevice({ features: OWN }))
    expect(driver.offered).toBe(OWN | VIRTIO_F_INDIRECT_DESC | VIRTIO_F_EVENT_IDX | VIRTIO_F_VERSION_1)
  })

  it('are told to the device as they were negotiated', () => {
    const device = new HoldingDevice()
    new VirtioDriver(device).initialize({ features: VIRTIO_F_VERSION_1 | VIRTIO_F_EVENT_IDX })
    expect(device.driver!.features).toBe(VIRTIO_F_VERSION_1 | VIRTIO_F_EVENT_IDX)
  })

  it('are accepted in every combination that is offered, with VIRTIO_F_VERSION_1 alone', () => {
    const bits = [0n, 23n, 28n, 29n, 32n, 50n, 127n, 1n, 24n, 33n, 64n].map((bit) => 1n << bit)
    const offered = bits.slice(0, 7).reduce((all, bit) => all | bit, 0n)
    fc.assert(
      fc.property(fc.subarray(bits), (chosen) => {
        const features = chosen.reduce((all, bit) => all | bit, 0n)
        const driver = new VirtioDriver(answeringDevice({ features: OWN }))
        driver.negotiate(features)
        const accepted = (features & VIRTIO_F_VERSION_1) !== 0n && (features & ~offered) === 0n
        expect(driver.status & FEATURES_OK).toBe(accepted ? FEATURES_OK : 0)
        driver.driverOk()
        expect(driver.status & DRIVER_OK).toBe(accepted ? DRIVER_OK : 0)
      }),
    )
  })

  it('can be chosen again after a refusal', () => {
    const driver = new VirtioDriver(answeringDevice())
    driver.negotiate(1n << 3n)
    expect(driver.status).toBe(ACKNOWLEDGE | DRIVER)
    driver.negotiate()
    expect(driver.status).toBe(ACKNOWLEDGE | DRIVER | FEATURES_OK)
  })

  it('are forgotten by a reset', () => {
    const driver = new VirtioDriver(answeringDevice()).initialize()
    driver.status = 0
    driver.status = ACKNOWLEDGE
    driver.status = ACKNOWLEDGE | DRIVER
    driver.status = ACKNOWLEDGE | DRIVER | FEATURES_OK
    expect(driver.status).toBe(ACKNOWLEDGE | DRIVER)
  })
})

describe('queue set-up', () => {
  it('is for queues that the device has', () => {
    const driver = new VirtioDriver(deviceWith([{ maxSize: 8, handle: answer }, { handle: answer }]))
    expect([0, 1, 2, 0xffff_ffff].map((index) => driver.queueMax(index))).toEqual([8, 256, 0, 0])
  })

  it('may leave queues out', () => {
    const device = new HoldingDevice({ queues: 3 })
    const driver = new VirtioDriver(device).initialize({ sizes: [4, 0, 8] })
    expect(device.driver!.queues.map((queue) => queue?.size)).toEqual([4, undefined, 8])
    expect([0, 1, 2].map((index) => driver.queueReady(index))).toEqual([true, false, true])
    driver.notify(1)
    expect(driver.status).toBe(READY)
  })

  it('can be taken back until the driver is ready', () => {
    const driver = new VirtioDriver(answeringDevice()).initialize({ driverOk: false })
    driver.write(REGISTERS.QueueSel, 0)
    driver.write(REGISTERS.QueueReady, 0)
    expect(driver.queueReady(0)).toBe(false)
    driver.setupQueue(0, { size: 2 })
    driver.driverOk()
    expect(driver.queueReady(0)).toBe(true)
  })

  it('has an effect between FEATURES_OK and DRIVER_OK only', () => {
    const driver = new VirtioDriver(answeringDevice())
    driver.status = ACKNOWLEDGE | DRIVER
    driver.writeQueue(0, driver.layOut(4))
    expect(driver.queueReady(0)).toBe(false)
  })

  it('keeps the queues apart', async () => {
    const device = new HoldingDevice({ queues: 2 })
    const driver = new VirtioDriver(device).initialize()
    driver.queue(1).add([{ bytes: Uint8Array.of(1) }, { length: 1 }])
    driver.queue(1).kick()
    expect(device.taken).toBe(1)
    driver.queue(0).add([{ bytes: Uint8Array.of(2) }, { length: 1 }])
    driver.queue(0).kick()
    device.finishAll()
    expect((await driver.queue(0).settled()).map(({ data }) => [...data])).toEqual([[253]])
    expect((await driver.queue(1).settled()).map(({ data }) => [...data])).toEqual([[254]])
  })
})

describe('a reset', () => {
  it('puts everything back to how it was', async () => {
    const device = new HoldingDevice()
    const driver = new VirtioDriver(device).initialize()
    await driver.reset()
    expect(device.resets).toBe(1)
    expect(driver.status).toBe(0)
    expect(driver.queueReady(0)).toBe(false)
    expect(driver.doorbells).toEqual([])
    expect(driver.interruptStatus).toBe(0)
    driver.notify(0)
    expect(device.taken).toBe(0)
  })

  it('is not told to a device that was not started', () => {
    const device = new HoldingDevice()
    const driver = new VirtioDriver(device)
    driver.status = 0
    driver.negotiate()
    driver.status = 0
    expect(device.resets).toBe(0)
  })

  it('forgets interrupts that nobody acknowledged', async () => {
    const driver = new VirtioDriver(answeringDevice()).initialize()
    await driver.request(0, [{ length: 1 }])
    expect(driver.interruptStatus).toBe(1)
    driver.status = 0
    expect(driver.interruptStatus).toBe(0)
  })

  it('is complete when no request of before is under way, and what they end with goes nowhere', async () => {
    const device = new HoldingDevice()
    const driver = new VirtioDriver(device).initialize()
    const queue = driver.queue(0)
    for (let i = 0; i < 2; i++) queue.add([{ bytes: pattern(4) }, { length: 4 }])
    queue.kick()
    driver.status = 0
    expect(driver.status).toBe(DEVICE_NEEDS_RESET)
    device.held[0]!.finish()
    await new Promise(setImmediate)
    expect(driver.status).toBe(DEVICE_NEEDS_RESET)
    device.held[1]!.finish()
    await eventually(() => driver.status === 0, 'the device to be reset')
    expect([queue.usedIdx, queue.usedEntry(0), queue.usedEntry(1)]).toEqual([
      0,
      { id: 0, length: 0 },
      { id: 0, length: 0 },
    ])
    expect(driver.interrupts).toBe(0)
    expect(driver.failures).toEqual([])
  })

  it('lets a driver begin that does not wait, and serves it when the requests of before are done', async () => {
    const device = new HoldingDevice()
    const driver = new VirtioDriver(device).initialize()
    driver.queue(0).add([{ length: 1 }])
    driver.queue(0).kick()
    const [old] = device.held.splice(0)
    driver.status = 0
    driver.negotiate()
    const queue = driver.setupQueue(0)
    driver.driverOk()
    expect(driver.status).toBe(READY)
    queue.add([{ bytes: Uint8Array.of(7) }, { length: 1 }])
    driver.notify(0)
    expect(device.held).toHaveLength(0)
    old!.finish()
    await eventually(() => device.held.length === 1, 'the new request to be taken')
    device.finishAll()
    expect((await queue.settled()).map(({ data }) => [...data])).toEqual([[248]])
  })

  it('needs no answers of a device that takes buffers when it needs them', () => {
    const device = deviceWith([{ available: (queue) => void queue.pop() }])
    const driver = new VirtioDriver(device).initialize()
    driver.queue(0).add([{ length: 1 }])
    driver.notify(0)
    driver.status = 0
    expect(driver.status).toBe(0)
  })
})

describe("a device's failure", () => {
  const boom = new Error('boom')
  const throwing = () => {
    throw boom
  }

  it.each<[string, VirtioDevice]>([
    ['an exception in handle', deviceWith([{ handle: throwing }])],
    ['a promise that rejects', deviceWith([{ handle: () => Promise.reject(boom) }])],
    ['an exception in available', deviceWith([{ available: throwing }])],
    ['an exception in start', deviceWith([{ handle: answer }], { start: throwing })],
  ])('stops the machine with ERR_DEVICE_FAILED: %s', async (_, device) => {
    const driver = new VirtioDriver(device).initialize()
    driver.queue(0).add([{ length: 1 }])
    driver.notify(0)
    await eventually(() => driver.failures.length > 0, 'the machine to be stopped')
    const [failure] = driver.failures as NodevisorError[]
    expect(failure).toBeInstanceOf(NodevisorError)
    expect(failure).toMatchObject({ code: 'ERR_DEVICE_FAILED', device: 'tested', cause: boom })
    expect(failure!.message).toContain('boom')
  })

  it.each([-1, 2, 0.5, Number.NaN, '1', undefined])(
    '%s as bytes written into 1 byte is one',
    async (written) => {
      for (const value of [written, Promise.resolve(written)]) {
        const driver = new VirtioDriver(deviceWith([{ handle: () => value as number }])).initialize()
        driver.queue(0).add([{ length: 1 }])
        driver.notify(0)
        await eventually(() => driver.failures.length > 0, 'the machine to be stopped')
        expect(driver.failures).toMatchObject([
          { code: 'ERR_DEVICE_FAILED', cause: { code: 'ERR_INVALID_ARGUMENT' } },
        ])
      }
    },
  )

  it('is thrown to who accesses it: writeConfig and reset', () => {
    const device = deviceWith([{ handle: answer }], {
      config: new Uint8Array(4),
      writeConfig: throwing,
      reset: throwing,
    })
    const driver = new VirtioDriver(device).initialize()
    expect(() => driver.write(REGISTERS.Config, 1)).toThrow(boom)
    expect(() => {
      driver.status = 0
    }).toThrow(boom)
  })

  it('does not follow from requests that end when the machine is closed', async () => {
    const device = new HoldingDevice()
    const driver = new VirtioDriver(device).initialize({ features: VIRTIO_F_VERSION_1 })
    for (let i = 0; i < 2; i++) driver.queue(0).add([{ length: 1 }])
    driver.notify(0)
    driver.memory.close()
    for (const { settle } of device.held) settle(0)
    await new Promise(setImmediate)
    driver.notify(0)
    expect(driver.failures).toEqual([])
  })
})

describe('a virtio device that is none', () => {
  const queues = [{ handle: answer }]
  const good = { name: 'tested', deviceType: 1, queues }
  it.each<[string, unknown]>([
    ['virtio device', undefined],
    ['name of a virtio device', { ...good, name: '' }],
    ['deviceType of tested', { ...good, deviceType: 0 }],
    ['deviceType of tested', { ...good, deviceType: 1.5 }],
    ['features of tested', { ...good, features: 1 }],
    ['features of tested', { ...good, features: 1n << 32n }],
    ['features of tested', { ...good, features: 1n << 128n }],
    ['features of tested', { ...good, features: -1n }],
    ['config of tested', { ...good, config: [1] }],
    ['queues of tested', { ...good, queues: [] }],
    ['queues of tested', { ...good, queues: undefined }],
    ['queue 0 of tested', { ...good, queues: [{}] }],
    ['queue 0 of tested', { ...good, queues: [null] }],
    ['queue 0 of tested', { ...good, queues: [{ handle: answer, available() {} }] }],
    ['maxSize of queue 0 of tested', { ...good, queues: [{ handle: answer, maxSize: 3 }] }],
    ['maxSize of queue 0 of tested', { ...good, queues: [{ handle: answer, maxSize: 0 }] }],
    ['maxSize of queue 0 of tested', { ...good, queues: [{ handle: answer, maxSize: 65536 }] }],
  ])('is refused with the name of what is wrong: %s', (argument, device) => {
    expect(() => new VirtioFunction(device as VirtioDevice)).toThrow(
      expect.objectContaining({ code: 'ERR_INVALID_ARGUMENT', argument }),
    )
  })
})

describe('saved state', () => {
  const json = (state: unknown) => JSON.parse(JSON.stringify(state))

  it('goes on where it was, in the middle of the rings', async () => {
    const first = new VirtioDriver(answeringDevice()).initialize({ sizes: [4] })
    for (let i = 0; i < 6; i++) await first.request(0, [{ bytes: Uint8Array.of(i) }, { length: 1 }])
    const state = json(first.transport.saveState())
    const { memory } = first
    const second = new VirtioDriver(answeringDevice(), { memory })
    second.transport.restoreState(state)
    expect(second.transport.saveState()).toEqual(state)
    expect(second.status).toBe(READY)
    expect(second.interruptStatus, 'nobody has acknowledged it').toBe(1)
    expect(second.doorbells.map(({ value }) => value)).toEqual([0])
    // The guest's driver is the same; only the device is another one.
    const queue = first.queue(0)
    queue.add([{ bytes: pattern(5) }, { length: 5 }])
    second.doorbells[0]!.ring()
    expect(queue.used().map(({ data }) => [...data])).toEqual([[...invert(pattern(5))]])
  })

  it('keeps the interrupt of a request that is served by the restored device at once', () => {
    const first = new VirtioDriver(answeringDevice()).initialize()
    first.queue(0).add([{ length: 1 }])
    const state = json(first.transport.saveState())
    const second = new VirtioDriver(answeringDevice(), { memory: first.memory })
    second.transport.restoreState(state)
    expect(first.queue(0).used()).toHaveLength(1)
    expect(second.interrupts).toBe(1)
    expect(second.interruptStatus).toBe(1)
  })

  it('can be taken of every state that a driver can get the device into', () => {
    fc.assert(
      fc.property(
        fc.array(
          fc.tuple(
            fc.constantFrom(...Object.values(REGISTERS)),
            fc.oneof(fc.constantFrom(0, 1, 2, 3, 11, 15, 0x80, 0xffff_ffff, 65536), fc.nat(0xffff_ffff)),
          ),
          { maxLength: 40 },
        ),
        fc.boolean(),
        (writes, negotiated) => {
          const make = () => new VirtioDriver(answeringDevice({ maxSize: 4, config: new Uint8Array(8) }))
          const first = make()
          if (negotiated) first.negotiate()
          for (const [offset, value] of writes) first.write(offset, value)
          const state = first.transport.saveState()
          const second = make()
          second.transport.restoreState(json(state))
          expect(second.transport.saveState()).toEqual(state)
        },
      ),
    )
  })

  it('has what the device saves of its own', () => {
    let restored: unknown
    const make = () =>
      deviceWith([{ handle: answer }], {
        saveState: () => ({ lamp: 'on' }),
        restoreState: (state) => {
          restored = state
        },
      })
    const state = json(new VirtioDriver(make()).initialize().transport.saveState())
    new VirtioDriver(make()).transport.restoreState(state)
    expect(restored).toEqual({ lamp: 'on' })
  })

  it('is not to be had while requests are under way, also of before a reset', async () => {
    const device = new HoldingDevice()
    const driver = new VirtioDriver(device).initialize()
    driver.queue(0).add([{ length: 1 }])
    driver.notify(0)
    const running = expect.objectContaining({ code: 'ERR_RUNNING' })
    expect(() => driver.transport.saveState()).toThrow(running)
    driver.status = 0
    expect(() => driver.transport.saveState()).toThrow(running)
    device.finishAll()
    await new Promise(setImmediate)
    expect(driver.transport.saveState()).toMatchObject({ function: { status: 0 } })
  })

  it.each<[string, object]>([
    ['queueSel', { queueSel: -1 }],
    ['interruptStatus', { interruptStatus: 4 }],
    ['function', { function: undefined }],
    ['status', { function: { status: 256 } }],
    ['queues', { function: { queues: [] } }],
    ['size', { function: { queues: [{ size: -1 }] } }],
    ['addresses', { function: { queues: [{ addresses: [1] }] } }],
    ['nextAvail', { function: { queues: [{ nextAvail: 65536 }] } }],
  ])('of something else is refused: %s', (field, damage) => {
    const driver = new VirtioDriver(answeringDevice()).initialize()
    const state = json(driver.transport.saveState())
    expect(() => driver.transport.restoreState(merge(state, damage) as never)).toThrow(
      expect.objectContaining({
        code: 'ERR_INVALID_ARGUMENT',
        argument: expect.stringMatching(`^${field} of the state|^the state of tested`),
      }),
    )
    expect(driver.status, 'nothing was changed').toBe(READY)
  })

  it('with a ring outside of RAM leaves that queue out', () => {
    const driver = new VirtioDriver(answeringDevice()).initialize()
    const state = json(driver.transport.saveState())
    state.function.queues[0].addresses = [0, 0x7fff_ffff, 0, 0, 0x1000, 0]
    driver.transport.restoreState(state)
    expect(driver.queueReady(0)).toBe(false)
    driver.notify(0)
    expect(driver.failures).toEqual([])
  })
})

describe('what a device is given', () => {
  it('is the ready queues, the features, a clock, and a way to say that its configuration changed', () => {
    let given: VirtioDriverOfDevice | undefined
    const device = deviceWith([{ handle: answer }], {
      config: new Uint8Array(4),
      start: (driver) => {
        given = driver
      },
    })
    const driver = new VirtioDriver(device).initialize({ sizes: [8] })
    expect(given).toMatchObject({ features: driver.features, clock: driver.clock })
    expect(given!.queues.map((queue) => queue?.size)).toEqual([8])
    const generation = driver.read(REGISTERS.ConfigGeneration)
    given!.configChanged()
    expect(driver.read(REGISTERS.ConfigGeneration)).not.toBe(generation)
    expect(driver.acknowledge()).toBe(2)
  })

  it('is counted: notifications, requests and interrupts', async () => {
    const driver = new VirtioDriver(answeringDevice()).initialize()
    await driver.request(0, [{ length: 1 }])
    await driver.request(0, [{ length: 1 }])
    driver.initialize()
    await driver.request(0, [{ length: 1 }])
    expect(driver.transport.function.statistics).toEqual({ notifications: 3, requests: 3, interrupts: 3 })
  })
})

/** A copy of `state` with the fields of `damage`, in depth; lists go on by index. */
function merge(state: unknown, damage: unknown): unknown {
  if (Array.isArray(damage)) {
    if (damage.length === 0) return []
    return damage.map((item, index) => merge((state as unknown[])[index], item))
  }
  if (typeof damage !== 'object' || damage === null || typeof state !== 'object') return damage
  const copy: Record<string, unknown> = { ...(state as object) }
  for (const [key, value] of Object.entries(damage)) {
    copy[key] = Array.isArray(value) && !Array.isArray(copy[key]) ? value : merge(copy[key], value)
    if (key === 'addresses') copy[key] = value
  }
  return copy
}
