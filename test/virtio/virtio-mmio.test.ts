import fc from 'fast-check'
import { beforeEach, describe, expect, it, vi } from 'vitest'
import type { AccessSize } from '../../src/bus/device.js'
import { VIRTIO_MMIO_SIZE } from '../../src/virtio/virtio-mmio.js'
import { REGISTERS, VirtioDriver } from '../helpers/virtio-driver.js'
import { answer, answeringDevice, deviceWith, HoldingDevice, invert, pattern } from './devices.js'

const ALL_ONES = 0xffff_ffff
const SIZES: readonly AccessSize[] = [1, 2, 4]

beforeEach(() => {
  vi.spyOn(performance, 'now').mockReturnValue(0)
})

/** A device whose configuration space the driver writes. */
function configurable(length: number) {
  const writes: [offset: number, value: number, size: number][] = []
  const config = Uint8Array.from({ length }, (_, i) => 0x10 + i)
  const device = deviceWith([{ handle: answer }], {
    config,
    writeConfig: (offset, value, size) => writes.push([offset, value, size]),
  })
  return { driver: new VirtioDriver(device), writes, config }
}

describe('the registers', () => {
  it('say what is there (4.2.2)', () => {
    const driver = new VirtioDriver(answeringDevice())
    expect(driver.read(REGISTERS.MagicValue)).toBe(0x74726976)
    expect(driver.read(REGISTERS.Version)).toBe(2)
    expect(driver.read(REGISTERS.DeviceID)).toBe(0x3f)
    expect(driver.read(REGISTERS.VendorID)).toBe(Buffer.from('NDVR').readUInt32LE())
    expect(driver.transport.mmio.length).toBe(VIRTIO_MMIO_SIZE)
  })

  it('give features 32 bits at a time, and none beyond the last', () => {
    const driver = new VirtioDriver(answeringDevice({ features: (1n << 5n) | (1n << 63n) | (1n << 96n) }))
    const words = [0, 1, 2, 3, 4, 5, 0xffff_ffff].map((select) => {
      driver.write(REGISTERS.DeviceFeaturesSel, select)
      return driver.read(REGISTERS.DeviceFeatures)
    })
    expect(words).toEqual([0x3000_0020, 0x8000_0001, 0, 1, 0, 0, 0])
  })

  it('have no shared memory regions: their length is all ones', () => {
    const driver = new VirtioDriver(answeringDevice())
    driver.write(REGISTERS.SHMSel, 0)
    expect([REGISTERS.SHMLenLow, REGISTERS.SHMLenHigh].map((offset) => driver.read(offset))).toEqual([
      ALL_ONES,
      ALL_ONES,
    ])
  })

  it('are reached by 32-bit accesses only', () => {
    const driver = new VirtioDriver(answeringDevice())
    expect(driver.read(REGISTERS.MagicValue, 1)).toBe(ALL_ONES)
    expect(driver.read(REGISTERS.MagicValue, 2)).toBe(ALL_ONES)
    expect(driver.read(REGISTERS.MagicValue + 2, 4)).toBe(ALL_ONES)
    driver.write(REGISTERS.Status, 1, 1)
    driver.write(REGISTERS.Status, 1, 2)
    driver.write(REGISTERS.Status + 1, 1, 4)
    expect(driver.status).toBe(0)
  })

  it('take addresses of 64 bits', async () => {
    const driver = new VirtioDriver(answeringDevice()).initialize({ driverOk: false })
    driver.write(REGISTERS.QueueSel, 0)
    driver.write(REGISTERS.QueueReady, 0)
    const start = 2 ** 32 + 0x8000
    driver.setupQueue(0, {
      layout: { size: 8, descriptors: start, driver: start + 0x1000, device: start + 0x2000 },
    })
    driver.driverOk()
    const { data } = await driver.request(0, [{ bytes: pattern(3) }, { length: 3 }])
    expect([...data]).toEqual([...invert(pattern(3))])
    expect(driver.memory.readUint16(start + 0x2002)).toBe(1)
  })
})

describe('interrupts', () => {
  it('say why they came, until each cause is acknowledged', async () => {
    const device = new HoldingDevice()
    const driver = new VirtioDriver(device).initialize()
    driver.queue(0).add([{ length: 1 }])
    driver.notify(0)
    device.finishAll()
    await driver.settled()
    device.driver!.configChanged()
    expect(driver.interrupts).toBe(2)
    expect(driver.interruptStatus).toBe(3)
    driver.write(REGISTERS.InterruptACK, 1)
    expect(driver.interruptStatus).toBe(2)
    driver.write(REGISTERS.InterruptACK, 0xffff_fffd)
    expect(driver.interruptStatus).toBe(2)
    driver.write(REGISTERS.InterruptACK, 2)
    expect(driver.interruptStatus).toBe(0)
  })

  it('are edges also while a cause is not acknowledged', async () => {
    const driver = new VirtioDriver(answeringDevice()).initialize()
    await driver.request(0, [{ length: 1 }])
    await driver.request(0, [{ length: 1 }])
    expect(driver.interrupts).toBe(2)
  })
})

describe('the configuration space', () => {
  it('is read little-endian, in any width that is aligned', () => {
    const { driver } = configurable(8)
    const at = (offset: number, size: AccessSize) => driver.read(REGISTERS.Config + offset, size)
    expect([at(0, 1), at(7, 1), at(2, 2), at(4, 4)]).toEqual([0x10, 0x17, 0x1312, 0x1716_1514])
    expect(driver.readConfig(2, 3)).toEqual(Uint8Array.of(0x12, 0x13, 0x14))
  })

  it('gives all ones, and takes nothing, outside of it and where it is not aligned', () => {
    fc.assert(
      fc.property(
        fc.nat(12),
        fc.nat({ max: VIRTIO_MMIO_SIZE - REGISTERS.Config - 1 }),
        fc.constantFrom(...SIZES),
        fc.boolean(),
        (length, anywhere, size, near) => {
          const { driver, writes, config } = configurable(length)
          const offset = near ? anywhere % 16 : anywhere
          const inside = offset % size === 0 && offset + size <= length
          const value = driver.read(REGISTERS.Config + offset, size)
          const bytes = Buffer.alloc(4)
          bytes.writeUInt32LE(value)
          if (inside)
            expect([...bytes.subarray(0, size)]).toEqual([...config.subarray(offset, offset + size)])
          else expect(value).toBe(ALL_ONES)
          driver.write(REGISTERS.Config + offset, 7, size)
          expect(writes).toEqual(inside ? [[offset, 7, size]] : [])
        },
      ),
    )
  })

  it('is written in any state: a guest may have something to say before its driver is there', () => {
    const { driver, writes } = configurable(4)
    driver.write(REGISTERS.Config, 1)
    driver.initialize()
    driver.write(REGISTERS.Config + 2, 2, 2)
    expect(writes).toEqual([
      [0, 1, 4],
      [2, 2, 2],
    ])
  })

  it('may be missing', () => {
    const driver = new VirtioDriver(answeringDevice())
    expect(driver.read(REGISTERS.Config, 1)).toBe(ALL_ONES)
    driver.write(REGISTERS.Config, 1)
  })

  it('has a generation that is another one after each change', () => {
    const device = new HoldingDevice()
    const driver = new VirtioDriver(device).initialize()
    const generations = [0, 1, 2].map(() => {
      device.driver!.configChanged()
      return driver.read(REGISTERS.ConfigGeneration)
    })
    expect(new Set(generations).size).toBe(3)
  })
})

describe('doorbells', () => {
  it('are there for each queue that is ready, from DRIVER_OK until the reset', () => {
    const driver = new VirtioDriver(new HoldingDevice({ queues: 3 })).initialize({
      sizes: [4, 0, 4],
      driverOk: false,
    })
    expect(driver.doorbells).toEqual([])
    driver.driverOk()
    expect(driver.doorbells).toMatchObject([
      { region: 0, offset: REGISTERS.QueueNotify, size: 4, value: 0 },
      { region: 0, offset: REGISTERS.QueueNotify, size: 4, value: 2 },
    ])
    driver.driverOk()
    expect(driver.doorbells).toHaveLength(2)
    driver.status = 0
    expect(driver.doorbells).toEqual([])
  })

  it('do what a write of QueueNotify does', () => {
    const device = new HoldingDevice({ queues: 2 })
    const driver = new VirtioDriver(device).initialize()
    driver.useDoorbells = true
    driver.queue(1).add([{ bytes: Uint8Array.of(5) }])
    expect(driver.queue(1).kick()).toBe(true)
    expect(device.held.map(({ chain }) => [...chain.read(9)])).toEqual([[5]])
  })

  it('that ring late, after a reset, do nothing', () => {
    const device = new HoldingDevice()
    const driver = new VirtioDriver(device).initialize()
    driver.queue(0).add([{ length: 1 }])
    const { ring } = driver.doorbells[0]!
    driver.status = 0
    ring()
    expect(device.taken).toBe(0)
  })
})
