import { attachDevice } from '../../src/bus/attach-device.js'
import { Bus } from '../../src/bus/bus.js'
import type { Device, DeviceHost } from '../../src/bus/device.js'
import type { SerialBackend, SerialGuest } from '../../src/devices/serial.js'
import type { InterruptLine } from '../../src/interrupts/interrupt-line.js'
import type { Clock, Timer } from '../../src/interrupts/timer.js'
import { GuestMemory } from '../../src/memory/guest-memory.js'
import { ramRegions } from '../../src/memory/layout.js'

/** The port instructions and memory accesses of a guest that has these devices. */
export function guestWith(...devices: Device[]) {
  const bus = new Bus('port')
  const mmio = new Bus('mmio')
  for (const device of devices) attachDevice(device, bus, mmio)
  return {
    bus,
    mmio,
    inb: (port: number) => bus.read(port, 1),
    inw: (port: number) => bus.read(port, 2),
    inl: (port: number) => bus.read(port, 4),
    outb: (port: number, value: number) => bus.write(port, value, 1),
    outw: (port: number, value: number) => bus.write(port, value, 2),
    outl: (port: number, value: number) => bus.write(port, value, 4),
    readl: (address: number) => mmio.read(address, 4),
    writel: (address: number, value: number) => mmio.write(address, value, 4),
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

/** A clock that stands still until it is told, and calls back in the right order. */
export class FakeClock implements Clock {
  #now = 1_000_000_000
  readonly #timers = new Set<{ at: number; interval: number; onExpire: (expirations: number) => void }>()

  now(): number {
    return this.#now
  }

  timer(onExpire: (expirations: number) => void): Timer {
    const timer = { at: Number.POSITIVE_INFINITY, interval: 0, onExpire }
    this.#timers.add(timer)
    return {
      arm: (delay, interval = 0) => {
        timer.at = this.#now + Math.max(1, Math.ceil(delay))
        timer.interval = Math.ceil(interval)
      },
      disarm: () => {
        timer.at = Number.POSITIVE_INFINITY
      },
    }
  }

  /** Lets time pass, timer after timer. */
  advance(nanoseconds: number): void {
    const end = this.#now + nanoseconds
    for (;;) {
      const [next] = [...this.#timers].sort((a, b) => a.at - b.at)
      if (next === undefined || next.at > end) break
      this.#now = next.at
      next.at = next.interval > 0 ? next.at + next.interval : Number.POSITIVE_INFINITY
      next.onExpire(1)
    }
    this.#now = end
  }

  /** Lets time pass at once, as on a host that was busy: each timer calls back once, with what it has missed. */
  jump(nanoseconds: number): void {
    this.#now += nanoseconds
    for (const timer of this.#timers) {
      if (timer.at > this.#now) continue
      const expirations = timer.interval > 0 ? 1 + Math.floor((this.#now - timer.at) / timer.interval) : 1
      timer.at = timer.interval > 0 ? timer.at + expirations * timer.interval : Number.POSITIVE_INFINITY
      timer.onExpire(expirations)
    }
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
  clock = new FakeClock() as Clock,
} = {}): DeviceHost {
  return {
    memory,
    interrupt,
    clock,
    doorbell: () => () => {},
    yield() {},
    stop() {},
    fail(error) {
      throw error
    },
  }
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
