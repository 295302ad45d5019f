import type { Device, DeviceState, MmioRange } from '../bus/device.js'
import { IO_APIC_ADDRESS, LOCAL_APIC_ADDRESS } from '../memory/layout.js'
import { IO_APIC_PINS } from '../wiring.js'
import { StateReader } from './state.js'

// 82093AA I/O Advanced Programmable Interrupt Controller, Intel, May 1996 (290566-001); the messages that it sends:
// Intel SDM vol. 3A, "Message Signalled Interrupts".

const IOREGSEL = 0x00
const IOWIN = 0x10
const WINDOW_SIZE = 0x20

/** Where the registers are. */
export const IO_APIC_RANGE: MmioRange = { base: IO_APIC_ADDRESS, length: WINDOW_SIZE }

const IOAPICID = 0x00
const IOAPICVER = 0x01
const IOAPICARB = 0x02
const IOREDTBL = 0x10
const ID_MASK = 0x0f00_0000
/** Version 0x11, and the highest entry of the redirection table. */
const VERSION = 0x11 | ((IO_APIC_PINS - 1) << 16)

// The lower half of a redirection table entry (3.2.4).
const VECTOR = 0xff
const DELIVERY_MODE = 0x700
const DELIVERY_FIXED = 0
const DELIVERY_LOWEST_PRIORITY = 0x100
const DELIVERY_EXTINT = 0x700
const DESTINATION_LOGICAL = 1 << 11
const REMOTE_IRR = 1 << 14
const TRIGGER_LEVEL = 1 << 15
const MASKED = 1 << 16
/** Delivery status (12) and remote IRR (14) are read-only; delivery is immediate. */
const WRITABLE = 0x1_afff
/** What a message is made of, but for the destination. */
const MESSAGE = VECTOR | DELIVERY_MODE | DESTINATION_LOGICAL | TRIGGER_LEVEL
/** The upper half: the destination. */
const DESTINATION_SHIFT = 24

const MSI_DESTINATION_SHIFT = 12
const MSI_DESTINATION_LOGICAL = 1 << 2
const MSI_LEVEL_ASSERT = 1 << 14
const MSI_TRIGGER_LEVEL = 1 << 15

/** An interrupt as a write to the local APICs' address. */
export interface InterruptMessage {
  readonly address: number
  readonly data: number
}

/** How to make an {@link IoApic}. */
export interface IoApicOptions {
  /** Delivers an interrupt to the local APICs. */
  deliver(message: InterruptMessage): void
  /**
   * The messages of level-triggered inputs have changed: an end of interrupt for one of their vectors is to reach
   * {@link IoApic.endOfInterrupt}.
   *
   * A masked input's is among them: its last interrupt may not have been ended yet.
   *
   * @param messages - by input, and then, by input again, those that were sent and have not been ended: an entry may
   *   change before its interrupt is. Undefined where none is to be waited for
   */
  onLevelMessages(messages: readonly (InterruptMessage | undefined)[]): void
}

/** The I/O APIC of a PC: 24 inputs, each of which becomes a message to the local APICs, as its entry says. */
export class IoApic implements Device {
  readonly name = 'io-apic'
  readonly mmio = IO_APIC_RANGE

  readonly #deliver: IoApicOptions['deliver']
  readonly #onLevelMessages: IoApicOptions['onLevelMessages']
  #select = 0
  #id = 0
  /** Levels of the inputs, a bit each. */
  #lines = 0
  readonly #low = new Uint32Array(IO_APIC_PINS).fill(MASKED)
  readonly #high = new Uint32Array(IO_APIC_PINS)
  /** What each input sent last. */
  readonly #sent: (InterruptMessage | undefined)[] = new Array(IO_APIC_PINS).fill(undefined)

  constructor({ deliver, onLevelMessages }: IoApicOptions) {
    this.#deliver = deliver
    this.#onLevelMessages = onLevelMessages
  }

  /** Puts a level on an input, 0 to 23. */
  setInput(pin: number, asserted: boolean): void {
    const bit = 1 << pin
    const rises = asserted && (this.#lines & bit) === 0
    this.#lines = asserted ? this.#lines | bit : this.#lines & ~bit
    const entry = this.#low[pin]!
    if (isLevel(entry)) this.#serveLevel(pin)
    // "Edge sensitive interrupts on a masked interrupt pin are ignored" (3.2.4, bit 16).
    else if (rises && (entry & MASKED) === 0) this.#send(pin)
  }

  /** A local APIC has ended an interrupt of a vector (broadcast of level-triggered ones). */
  endOfInterrupt(vector: number): void {
    for (let pin = 0; pin < IO_APIC_PINS; pin++) {
      const entry = this.#low[pin]!
      if ((entry & REMOTE_IRR) === 0 || (entry & VECTOR) !== vector) continue
      this.#low[pin] = entry & ~REMOTE_IRR
      this.#serveLevel(pin)
    }
  }

  read(offset: number): number {
    if (offset === IOREGSEL) return this.#select
    if (offset !== IOWIN) return 0
    switch (this.#select) {
      case IOAPICID:
      case IOAPICARB:
        return this.#id
      case IOAPICVER:
        return VERSION
      default: {
        const index = this.#select - IOREDTBL
        if (index < 0 || index >= 2 * IO_APIC_PINS) return 0
        return (index % 2 === 0 ? this.#low : this.#high)[index >> 1]!
      }
    }
  }

  write(offset: number, value: number): void {
    if (offset === IOREGSEL) this.#select = value & 0xff
    if (offset !== IOWIN) return
    if (this.#select === IOAPICID) this.#id = value & ID_MASK
    const index = this.#select - IOREDTBL
    if (index < 0 || index >= 2 * IO_APIC_PINS) return
    this.#writeEntry(index >> 1, index % 2 === 0, value)
  }

  saveState(): DeviceState {
    return {
      select: this.#select,
      id: this.#id,
      lines: this.#lines,
      low: [...this.#low],
      high: [...this.#high],
    }
  }

  restoreState(state: DeviceState): void {
    const saved = new StateReader(this.name, state)
    const select = saved.byte('select')
    const id = saved.uint('id', ID_MASK) & ID_MASK
    const lines = saved.uint('lines', 2 ** IO_APIC_PINS - 1)
    const low = saved.uints('low', IO_APIC_PINS, 0xffff_ffff)
    const high = saved.uints('high', IO_APIC_PINS, 0xffff_ffff)
    this.#select = select
    this.#id = id
    this.#lines = lines
    this.#low.set(low.map((entry) => entry & (WRITABLE | (isLevel(entry) ? REMOTE_IRR : 0))))
    this.#high.set(high)
    for (let pin = 0; pin < IO_APIC_PINS; pin++) this.#sent[pin] = this.#message(pin)
    this.#onLevelMessages(this.#levelMessages())
  }

  #writeEntry(pin: number, isLow: boolean, value: number): void {
    const before = this.#low[pin]!
    const destinationBefore = this.#high[pin]! >>> DESTINATION_SHIFT
    if (isLow) this.#low[pin] = (value & WRITABLE) | (isLevel(value) ? before & REMOTE_IRR : 0)
    else this.#high[pin] = value
    const after = this.#low[pin]!
    const changed =
      ((before ^ after) & MESSAGE) !== 0 || destinationBefore !== this.#high[pin]! >>> DESTINATION_SHIFT
    if (changed && (isLevel(before) || isLevel(after))) this.#onLevelMessages(this.#levelMessages())
    if (isLevel(after)) this.#serveLevel(pin)
  }

  /** Sends a level that is up, unless it was sent and has not been ended. */
  #serveLevel(pin: number): void {
    const entry = this.#low[pin]!
    if ((this.#lines & (1 << pin)) === 0 || (entry & (MASKED | REMOTE_IRR)) !== 0) return
    this.#low[pin] = entry | REMOTE_IRR
    this.#send(pin)
  }

  #send(pin: number): void {
    // What INTR of the 8259A is for: no local APIC takes it as a message.
    if ((this.#low[pin]! & DELIVERY_MODE) === DELIVERY_EXTINT) return
    const message = this.#message(pin)
    this.#sent[pin] = message
    this.#deliver(message)
  }

  #message(pin: number): InterruptMessage {
    const low = this.#low[pin]!
    const destination = this.#high[pin]! >>> DESTINATION_SHIFT
    const logical = (low & DESTINATION_LOGICAL) !== 0 ? MSI_DESTINATION_LOGICAL : 0
    const level = isLevel(low) ? MSI_TRIGGER_LEVEL | MSI_LEVEL_ASSERT : 0
    return {
      address: LOCAL_APIC_ADDRESS + (destination << MSI_DESTINATION_SHIFT) + logical,
      data: (low & (VECTOR | DELIVERY_MODE)) | level,
    }
  }

  #levelMessages(): (InterruptMessage | undefined)[] {
    const messages = Array.from(this.#low, (entry, pin) => (isLevel(entry) ? this.#message(pin) : undefined))
    const sent = Array.from(this.#low, (entry, pin) =>
      (entry & REMOTE_IRR) !== 0 ? this.#sent[pin] : undefined,
    )
    return [...messages, ...sent]
  }
}

/** Other delivery modes are edge-triggered "even if programmed as level" (3.2.4, bits 10:8). */
function isLevel(entry: number): boolean {
  const mode = entry & DELIVERY_MODE
  return (entry & TRIGGER_LEVEL) !== 0 && (mode === DELIVERY_FIXED || mode === DELIVERY_LOWEST_PRIORITY)
}
