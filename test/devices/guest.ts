import { attachDevice } from '../../src/bus/attach-device.js'
import { Bus } from '../../src/bus/bus.js'
import type { Device, DeviceHost } from '../../src/bus/device.js'
import type { SerialBackend, SerialGuest } from '../../src/devices/serial.js'
import type { InterruptLine } from '../../src/interrupts/interrupt-line.js'
import { GuestMemory } from '../../src/memory/guest-memory.js'
import { ramRegions } from '../../src/memory/layout.js'

/** The port instructions of a guest that has these devices. */
export function guestWith(...devices: Device[]) {
  const bus = new Bus('port')
  for (const device of devices) attachDevice(device, bus, new Bus('mmio'))
  return {
    bus,
    inb: (port: number) => bus.read(port, 1),
    inw: (port: number) => bus.read(port, 2),
    inl: (port: number) => bus.read(port, 4),
    outb: (port: number, value: number) => bus.write(port, value, 1),
    outw: (port: number, value: number) => bus.write(port, value, 2),
    outl: (port: number, value: number) => bus.write(port, value, 4),
  }
}

/** A line that counts its edges. */
export class CountingLine implements InterruptLine {
  count = 0
  asserted = false
  trigger(): void {
    this.count++
  }
  setLevel(asserted: boolean): void {
    if (asserted && !this.asserted) this.count++
    this.asserted = asserted
  }
}

export function guestMemory(size = 1024 * 1024): GuestMemory {
  return new GuestMemory(
    ramRegions(size).map((ram) => ({ start: ram.start, buffer: new ArrayBuffer(ram.size) })),
  )
}

/** What a machine gives to its devices. */
export function hostOf({
  memory = guestMemory(),
  interrupt = new CountingLine() as InterruptLine,
} = {}): DeviceHost {
  return { memory, interrupt, stop() {} }
}

/** A host's end of a serial line that notes everything. */
export class RecordingBackend implements SerialBackend {
  ready = true
  readonly sent: number[] = []
  roomCalls = 0
  guest!: SerialGuest

  get text(): string {
    return String.fromCharCode(...this.sent)
  }

  connect(guest: SerialGuest): void {
    this.guest = guest
  }

  transmit(byte: number): void {
    this.sent.push(byte)
  }

  receiveReady(): void {
    this.roomCalls++
  }
}
