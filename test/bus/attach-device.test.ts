import { describe, expect, it } from 'vitest'
import { attachDevice, checkDevice } from '../../src/bus/attach-device.js'
import { Bus } from '../../src/bus/bus.js'
import type { Device } from '../../src/bus/device.js'

const ports = { base: 0x10, length: 1 }

describe('checkDevice', () => {
  it('gives the ranges, single or in arrays', () => {
    expect(checkDevice({ name: 'one', ports })).toEqual({ ports: [ports], mmio: [] })
    expect(checkDevice({ name: 'many', ports: [ports], mmio: [ports, ports] })).toEqual({
      ports: [ports],
      mmio: [ports, ports],
    })
  })

  it.each([
    [null, 'device'],
    ['serial', 'device'],
    [{ ports }, 'device.name'],
    [{ name: '', ports }, 'device.name'],
    [{ name: 7, ports }, 'device.name'],
    [{ name: 'x' }, 'ports and mmio of device x'],
    [{ name: 'x', ports: [], mmio: [] }, 'ports and mmio of device x'],
    [{ name: 'x', ports: 0x10 }, 'ports of device x'],
    [{ name: 'x', ports: [ports, { base: 0x1_0000, length: 1 }] }, 'base of ports of device x [1]'],
    [{ name: 'x', ports: { base: 0x10 } }, 'length of ports of device x'],
    [{ name: 'x', mmio: { base: '0x1000', length: 4 } }, 'base of mmio of device x'],
    [{ name: 'x', ports, maxAccessSize: 8 }, 'maxAccessSize of device x'],
    [{ name: 'x', ports, read: 5 }, 'read of device x'],
    [{ name: 'x', ports, write: {} }, 'write of device x'],
    [{ name: 'x', ports, attach: 'no' }, 'attach of device x'],
    [{ name: 'x', ports, saveState: 1 }, 'saveState of device x'],
  ])('refuses %o', (device, argument) => {
    expect(() => checkDevice(device)).toThrow(
      expect.objectContaining({ code: 'ERR_INVALID_ARGUMENT', argument: expect.stringContaining(argument) }),
    )
  })
})

describe('attachDevice', () => {
  it('counts regions through the ports, then through the addresses', () => {
    const regions: number[] = []
    const device: Device = {
      name: 'both',
      ports: [ports, { base: 0x20, length: 1 }],
      mmio: { base: 0x1000, length: 4 },
      write: (_offset, _value, _size, region) => {
        regions.push(region)
      },
    }
    const [port, mmio] = [new Bus('port'), new Bus('mmio')]
    attachDevice(device, port, mmio)
    port.write(0x10, 0, 1)
    port.write(0x20, 0, 1)
    mmio.write(0x1000, 0, 4)
    expect(regions).toEqual([0, 1, 2])
  })

  it('refuses a device that claims the same port twice', () => {
    const device: Device = { name: 'twice', ports: [ports, ports] }
    expect(() => attachDevice(device, new Bus('port'), new Bus('mmio'))).toThrow(
      expect.objectContaining({ code: 'ERR_BUS_OVERLAP' }),
    )
  })
})
