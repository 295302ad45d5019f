import fc from 'fast-check'
import { describe, expect, it } from 'vitest'
import type { Device, DeviceState, Range } from '../../src/bus/device.js'
import { AcpiPm } from '../../src/devices/acpi-pm.js'
import { DebugConsole } from '../../src/devices/debug-console.js'
import { DebugExit } from '../../src/devices/debug-exit.js'
import { FwCfg } from '../../src/devices/fw-cfg.js'
import { IoApic } from '../../src/devices/io-apic.js'
import { KeyboardController } from '../../src/devices/keyboard-controller.js'
import { Pic } from '../../src/devices/pic.js'
import { Pit } from '../../src/devices/pit.js'
import { PostCode } from '../../src/devices/post-code.js'
import { ResetControl } from '../../src/devices/reset-control.js'
import { Rtc } from '../../src/devices/rtc.js'
import { Uart } from '../../src/devices/serial.js'
import { SystemControl } from '../../src/devices/system-control.js'
import { TextScreen } from '../../src/devices/text-screen.js'
import { guestWith, hostOf, RecordingBackend } from './guest.js'

const NOW = Date.UTC(2024, 1, 29, 13, 45, 59)

/** Every device, made afresh, with what the outside saw of it. */
const devices: Record<string, (events: unknown[]) => Device> = {
  serial: (events) => {
    const backend = new RecordingBackend()
    backend.transmit = (byte) => events.push(byte)
    return new Uart({ backend })
  },
  'debug-exit': (events) => new DebugExit({ onExit: (value) => events.push(value) }),
  'post-code': () => new PostCode(),
  'debug-console': (events) => new DebugConsole({ backend: { transmit: (byte) => events.push(byte) } }),
  'keyboard-controller': (events) => new KeyboardController({ onReset: () => events.push('reset') }),
  'system-control': (events) => new SystemControl({ onReset: () => events.push('reset') }),
  'reset-control': (events) => new ResetControl({ onReset: () => events.push('reset') }),
  'acpi-pm': (events) => new AcpiPm({ onPowerOff: () => events.push('off') }),
  'fw-cfg': () =>
    new FwCfg({
      memorySize: 2 ** 20,
      cpus: 1,
      cmdline: 'quiet',
      files: new Map([['opt/a', Uint8Array.of(1)]]),
    }),
  pic: (events) => {
    const pic = new Pic({ onInterrupt: () => events.push('INTR') })
    for (const irq of [0, 4, 8, 14]) pic.setInput(irq, true)
    return pic
  },
  'io-apic': (events) => {
    const ioApic = new IoApic({
      deliver: (message) => events.push(message),
      onLevelMessages: (messages) => events.push([...messages]),
    })
    for (const pin of [0, 2, 9, 23]) ioApic.setInput(pin, true)
    return ioApic
  },
  pit: () => new Pit(),
  rtc: () => new Rtc({ memorySize: 2 ** 27, now: () => NOW }),
  'text-screen': () => new TextScreen(),
}

function setUp(make: (events: unknown[]) => Device) {
  const events: unknown[] = []
  const interrupts: unknown[] = []
  const device = make(events)
  device.attach?.(
    hostOf({
      interrupt: {
        trigger: () => interrupts.push('edge'),
        setLevel: (asserted) => interrupts.push(`level ${asserted}`),
      },
    }),
  )
  const guest = guestWith(device)
  return { device, events, interrupts, bus: device.ports === undefined ? guest.mmio : guest.bus }
}

/** Accesses of every width from just before the device's first port, or address, to just behind its last. */
function accessesOf(device: Device) {
  const ranges = [device.ports ?? device.mmio ?? []].flat() as Range[]
  const address = fc.oneof(
    ...ranges.map(({ base, length }) => fc.integer({ min: Math.max(0, base - 3), max: base + length })),
  )
  return fc.array(
    fc.record({
      address,
      size: fc.integer({ min: 1, max: 8 }),
      bytes: fc.option(fc.uint8Array({ minLength: 8, maxLength: 8 })),
    }),
    { maxLength: 60 },
  )
}

type Accesses = readonly { address: number; size: number; bytes: Uint8Array | null }[]

function play({ bus }: ReturnType<typeof setUp>, sequence: Accesses): number[][] {
  return sequence.map(({ address, size, bytes }) => {
    const view = new DataView(new ArrayBuffer(8))
    if (bytes === null) bus.readInto(view, 0, address, size)
    else bus.writeFrom(new DataView(bytes.slice().buffer), 0, address, size)
    return [...new Uint8Array(view.buffer)]
  })
}

describe.each(Object.entries(devices))('%s', (_name, make) => {
  it('10, 24: any accesses, of any width at any offset, are harmless', () => {
    fc.assert(
      fc.property(accessesOf(make([])), (sequence) => {
        // The bus throws ERR_DEVICE_FAILED for exceptions and for reads that are no integer.
        const machine = setUp(make)
        play(machine, sequence)
        expect(machine.bus.unclaimed.addresses.length).toBeLessThanOrEqual(256)
      }),
    )
  })

  it('every read fits the width it was asked for', () => {
    fc.assert(
      fc.property(accessesOf(make([])), (sequence) => {
        const { device } = setUp(make)
        const read = device.read!.bind(device)
        device.read = (offset, size, region) => {
          const value = read(offset, size, region)
          expect(Number.isInteger(value) && value >= 0 && value <= 0xffff_ffff).toBe(true)
          return value
        }
        play({ ...setUp(() => device) }, sequence)
      }),
    )
  })

  it('made again from its state it goes on in the same way', () => {
    const accesses = accessesOf(make([]))
    fc.assert(
      fc.property(accesses, accesses, (before, after) => {
        const original = setUp(make)
        play(original, before)
        const state = original.device.saveState?.() as DeviceState
        const copy = setUp(make)
        copy.device.restoreState?.(structuredClone(state))
        expect(copy.device.saveState?.()).toEqual(state)
        for (const { events, interrupts } of [original, copy]) {
          events.length = 0
          // A device made again puts its line where it was: what it did to it is not what the other has done.
          interrupts.length = 0
        }
        expect(play(copy, after)).toEqual(play(original, after))
        expect(copy.events).toEqual(original.events)
        expect(copy.interrupts).toEqual(original.interrupts)
        expect(copy.device.saveState?.()).toEqual(original.device.saveState?.())
      }),
    )
  })

  it('its state does not change with it', () => {
    fc.assert(
      fc.property(accessesOf(make([])), (sequence) => {
        const machine = setUp(make)
        const state = machine.device.saveState?.()
        const copy = structuredClone(state)
        play(machine, sequence)
        expect(state).toEqual(copy)
      }),
    )
  })
})
