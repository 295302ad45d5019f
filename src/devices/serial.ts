import type { AccessSize, Device, DeviceHost, DeviceState, PortRange } from '../bus/device.js'
import { type InterruptLine, unconnectedLine } from '../interrupts/interrupt-line.js'
import { ByteQueue } from './byte-queue.js'
import { StateReader } from './state.js'

// PC16550D Universal Asynchronous Receiver/Transmitter with FIFOs, National Semiconductor, June 1995
// (SNLS378B), section "Registers"; its chapters are named after the registers, which the comments refer to.

/** The first serial port of a PC. */
export const COM1 = 0x3f8
const COM1_IRQ = 4

/** Receiver buffer (read), transmitter holding register (write); divisor latch, low byte, with DLAB. */
const RBR_THR_DLL = 0
/** Interrupt enable; divisor latch, high byte, with DLAB. */
const IER_DLM = 1
/** Interrupt identification (read), FIFO control (write). */
const IIR_FCR = 2
const LCR = 3
const MCR = 4
const LSR = 5
const MSR = 6
const SCR = 7

const IER_ERBFI = 0x01
const IER_ETBEI = 0x02
const IER_ELSI = 0x04
const IER_EDSSI = 0x08

/** No interrupt pending; then the four kinds, first priority first. */
const IIR_NONE = 0x01
const IIR_LINE_STATUS = 0x06
const IIR_DATA_AVAILABLE = 0x04
const IIR_CHARACTER_TIMEOUT = 0x0c
const IIR_THR_EMPTY = 0x02
const IIR_MODEM_STATUS = 0x00
const IIR_FIFOS_ENABLED = 0xc0

const FCR_FIFO_ENABLE = 0x01
const FCR_RCVR_FIFO_RESET = 0x02
/** Where the trigger level is; 1, 4, 8 or 14 bytes. */
const FCR_TRIGGER_SHIFT = 6
const TRIGGER_LEVELS = [1, 4, 8, 14] as const
/** The bits of FCR that stay. */
const FCR_STORED = 0xc9

const LCR_DLAB = 0x80

const MCR_DTR = 0x01
const MCR_RTS = 0x02
const MCR_OUT1 = 0x04
const MCR_OUT2 = 0x08
const MCR_LOOP = 0x10
const MCR_STORED = 0x1f

const LSR_DR = 0x01
const LSR_OE = 0x02
const LSR_THRE = 0x20
const LSR_TEMT = 0x40

/** The four delta bits: DCTS, DDSR, TERI, DDCD. */
const MSR_TERI = 0x04
const MSR_CTS = 0x10
const MSR_DSR = 0x20
const MSR_RI = 0x40
const MSR_DCD = 0x80

/** 115200 / 12 = 9600 baud, as firmware leaves it. */
const RESET_DIVISOR = 12
const FIFO_SIZE = 16
/** Bytes on their way from the host to the receiver: a wire that can wait. */
const WIRE_SIZE = 1024

/** The guest's end of a serial line, for a {@link SerialBackend}. */
export interface SerialGuest {
  /**
   * Sends bytes to the guest.
   *
   * @returns how many were taken, from the first on; once there is room for the others,
   *   {@link SerialBackend.receiveReady} is called
   */
  receive(bytes: Uint8Array): number
  /** {@link SerialBackend.ready} has become true. May be called when nothing changed. */
  transmitReady(): void
}

/** The host's end of a serial line. Its methods must not throw: that would stop the machine. */
export interface SerialBackend {
  /** Called once, by the UART that is made with this backend. */
  connect(guest: SerialGuest): void
  /** Takes a byte from the guest, also while not {@link SerialBackend.ready}: bounding it is the backend's. */
  transmit(byte: number): void
  /** False holds back a guest that looks at LSR.THRE before it sends. */
  readonly ready: boolean
  /** There is room again, after {@link SerialGuest.receive} took less than it was given. */
  receiveReady(): void
}

/** How to make a {@link Uart}. */
export interface UartOptions {
  readonly backend: SerialBackend
  /** First of the eight ports; COM1 unless given. */
  readonly base?: number
  /** `serial` unless given. */
  readonly name?: string
  /** Interrupt line; 4 unless given, that of COM1. */
  readonly irq?: number
}

/**
 * A serial port: an NS16550A.
 *
 * The line has no speed. A byte is sent when THR is written, and the divisor latch, the word length and the
 * parity are only stored. Received bytes wait outside the FIFO until the guest looks (reads LSR or RBR, or
 * has enabled the interrupt), so that a driver which resets the FIFOs as it starts loses no input. The
 * time-out interrupt therefore does not wait four characters: what is below the trigger level times out at
 * once. The chip's INTR pin is modelled, not the gate that PCs put behind it with OUT2.
 *
 * Writes to the first port may be posted. That is sound though it is also DLL: LCR, like every other register,
 * is not posted, and posted writes reach the device before the next other access.
 */
export class Uart implements Device, SerialGuest {
  readonly name: string
  readonly irq: number
  readonly ports: readonly PortRange[]
  readonly maxAccessSize = 1

  readonly #backend: SerialBackend
  #interrupt: InterruptLine = unconnectedLine

  #ier = 0
  #fcr = 0
  #lcr = 0
  #mcr = 0
  #scr = 0
  #divisor = RESET_DIVISOR
  #overrun = false
  #modemDelta = 0
  /** THR became empty and nobody was told. */
  #thrEmptyPending = false
  /** The backend was not ready; THR becomes empty when it is. */
  #thrFull = false
  /** The level of INTR. */
  #intr = false
  readonly #fifo = new ByteQueue(FIFO_SIZE)
  readonly #wire = new ByteQueue(WIRE_SIZE)
  /** The backend has bytes that the wire had no room for. */
  #backendWaits = false

  constructor({ backend, base = COM1, name = 'serial', irq = COM1_IRQ }: UartOptions) {
    this.name = name
    this.irq = irq
    this.ports = [
      { base, length: 1, posted: true },
      { base: base + 1, length: 7 },
    ]
    this.#backend = backend
    backend.connect(this)
  }

  attach(host: DeviceHost): void {
    this.#interrupt = host.interrupt
  }

  read(offset: number, _size: AccessSize, region: number): number {
    const value = this.#readRegister(offset + region)
    this.#update()
    this.#callForInput()
    return value
  }

  write(offset: number, value: number, _size: AccessSize, region: number): void {
    this.#writeRegister(offset + region, value)
    this.#update()
    this.#callForInput()
  }

  receive(bytes: Uint8Array): number {
    let taken = 0
    while (taken < bytes.length && this.#wire.push(bytes[taken]!)) taken++
    this.#backendWaits = taken < bytes.length
    this.#update()
    return taken
  }

  transmitReady(): void {
    if (!this.#backend.ready || !this.#thrFull) return
    this.#thrFull = false
    this.#thrEmptyPending = true
    this.#update()
  }

  saveState(): DeviceState {
    return {
      ier: this.#ier,
      fcr: this.#fcr,
      lcr: this.#lcr,
      mcr: this.#mcr,
      scr: this.#scr,
      divisor: this.#divisor,
      overrun: this.#overrun,
      modemDelta: this.#modemDelta,
      thrEmptyPending: this.#thrEmptyPending,
      thrFull: this.#thrFull,
      intr: this.#intr,
      fifo: this.#fifo.toBytes(),
      wire: this.#wire.toBytes(),
    }
  }

  restoreState(state: DeviceState): void {
    const saved = new StateReader(this.name, state)
    const fcr = saved.byte('fcr') & FCR_STORED
    const fifo = saved.bytes('fifo', 0, (fcr & FCR_FIFO_ENABLE) !== 0 ? FIFO_SIZE : 1)
    const wire = saved.bytes('wire', 0, WIRE_SIZE)
    const fields = {
      ier: saved.uint('ier', 0x0f),
      lcr: saved.byte('lcr'),
      mcr: saved.uint('mcr', MCR_STORED),
      scr: saved.byte('scr'),
      divisor: saved.uint('divisor', 0xffff),
      overrun: saved.boolean('overrun'),
      modemDelta: saved.uint('modemDelta', 0x0f),
      thrEmptyPending: saved.boolean('thrEmptyPending'),
      thrFull: saved.boolean('thrFull'),
      intr: saved.boolean('intr'),
    }
    this.#ier = fields.ier
    this.#fcr = fcr
    this.#lcr = fields.lcr
    this.#mcr = fields.mcr
    this.#scr = fields.scr
    this.#divisor = fields.divisor
    this.#overrun = fields.overrun
    this.#modemDelta = fields.modemDelta
    this.#thrEmptyPending = fields.thrEmptyPending
    this.#thrFull = fields.thrFull
    this.#intr = fields.intr
    this.#fifo.load(fifo)
    this.#wire.load(wire)
    this.#interrupt.setLevel(fields.intr)
    this.transmitReady()
    this.#callForInput()
  }

  #readRegister(register: number): number {
    switch (register) {
      case RBR_THR_DLL:
        if (this.#dlab) return this.#divisor & 0xff
        this.#fillFifo()
        return this.#fifo.shift()
      case IER_DLM:
        return this.#dlab ? this.#divisor >> 8 : this.#ier
      case IIR_FCR: {
        const identification = this.#identify()
        if (identification === IIR_THR_EMPTY) this.#thrEmptyPending = false
        return identification | (this.#fifosEnabled ? IIR_FIFOS_ENABLED : 0)
      }
      case LCR:
        return this.#lcr
      case MCR:
        return this.#mcr
      case LSR: {
        this.#fillFifo()
        const status =
          (this.#fifo.length > 0 ? LSR_DR : 0) |
          (this.#overrun ? LSR_OE : 0) |
          (this.#transmitterEmpty ? LSR_THRE | LSR_TEMT : 0)
        this.#overrun = false
        return status
      }
      case MSR: {
        const status = this.#modemStatus | this.#modemDelta
        this.#modemDelta = 0
        return status
      }
      default:
        return this.#scr
    }
  }

  #writeRegister(register: number, value: number): void {
    switch (register) {
      case RBR_THR_DLL:
        if (this.#dlab) this.#divisor = (this.#divisor & 0xff00) | value
        else this.#transmit(value)
        break
      case IER_DLM:
        if (this.#dlab) this.#divisor = (this.#divisor & 0x00ff) | (value << 8)
        else this.#writeIer(value & 0x0f)
        break
      case IIR_FCR:
        this.#writeFcr(value)
        break
      case LCR:
        this.#lcr = value
        break
      case MCR:
        this.#writeMcr(value & MCR_STORED)
        break
      case SCR:
        this.#scr = value
        break
      // LSR and MSR: writing is "not recommended as this operation is only used for factory testing".
    }
  }

  #transmit(byte: number): void {
    // INTR falls as THR is filled, and rises as it empties: drivers that send from a handler need that edge.
    this.#thrEmptyPending = false
    this.#driveIntr()
    if ((this.#mcr & MCR_LOOP) !== 0) {
      if (this.#fifo.length < this.#fifoCapacity) this.#fifo.push(byte)
      else this.#overflow(byte)
    } else {
      this.#backend.transmit(byte)
    }
    this.#awaitThrEmpty()
  }

  /** With FIFOs the byte that did not fit is lost, without them the one before it (LSR, bit 1). */
  #overflow(byte: number): void {
    this.#overrun = true
    if (this.#fifosEnabled) return
    this.#fifo.clear()
    this.#fifo.push(byte)
  }

  #writeIer(value: number): void {
    const enabled = value & ~this.#ier
    this.#ier = value
    if ((enabled & IER_ETBEI) !== 0) this.#awaitThrEmpty()
  }

  #awaitThrEmpty(): void {
    this.#thrEmptyPending = this.#transmitterEmpty
    this.#thrFull = !this.#transmitterEmpty
  }

  #writeFcr(value: number): void {
    const toggled = ((value ^ this.#fcr) & FCR_FIFO_ENABLE) !== 0
    // "This bit must be a 1 when other FCR bits are written to or they will not be programmed".
    const programmed = (value & FCR_FIFO_ENABLE) !== 0
    if (toggled || (programmed && (value & FCR_RCVR_FIFO_RESET) !== 0)) this.#fifo.clear()
    this.#fcr = programmed ? value & FCR_STORED : 0
  }

  #writeMcr(value: number): void {
    const before = this.#modemStatus
    this.#mcr = value
    const after = this.#modemStatus
    const changed = (before ^ after) >> 4
    // RI alone reports one edge only: the one to inactive (MSR, bit 2).
    const ringEnded = (before & ~after & MSR_RI) !== 0
    this.#modemDelta |= (changed & ~MSR_TERI) | (ringEnded ? MSR_TERI : 0)
  }

  /** Moves received bytes into the FIFO; in loopback the receiver is cut off from the wire. */
  #fillFifo(): void {
    if ((this.#mcr & MCR_LOOP) !== 0) return
    while (this.#wire.length > 0 && this.#fifo.length < this.#fifoCapacity)
      this.#fifo.push(this.#wire.shift())
  }

  /** Asks for more input before the wire has run dry; the backend then calls {@link Uart.receive}. */
  #callForInput(): void {
    if (!this.#backendWaits || this.#wire.length > WIRE_SIZE / 2) return
    this.#backendWaits = false
    this.#backend.receiveReady()
  }

  #update(): void {
    // Before the next byte comes: without FIFOs each makes an edge.
    this.#driveIntr()
    if ((this.#ier & IER_ERBFI) === 0 || this.#wire.length === 0) return
    this.#fillFifo()
    this.#driveIntr()
  }

  #driveIntr(): void {
    const intr = this.#identify() !== IIR_NONE
    if (intr !== this.#intr) this.#interrupt.setLevel(intr)
    this.#intr = intr
  }

  /** The pending interrupt of the first priority (IIR, "Interrupt Control Functions"). */
  #identify(): number {
    const ier = this.#ier
    if ((ier & IER_ELSI) !== 0 && this.#overrun) return IIR_LINE_STATUS
    if ((ier & IER_ERBFI) !== 0 && this.#fifo.length > 0) {
      return this.#fifo.length >= this.#triggerLevel ? IIR_DATA_AVAILABLE : IIR_CHARACTER_TIMEOUT
    }
    if ((ier & IER_ETBEI) !== 0 && this.#thrEmptyPending) return IIR_THR_EMPTY
    if ((ier & IER_EDSSI) !== 0 && this.#modemDelta !== 0) return IIR_MODEM_STATUS
    return IIR_NONE
  }

  get #dlab(): boolean {
    return (this.#lcr & LCR_DLAB) !== 0
  }

  get #fifosEnabled(): boolean {
    return (this.#fcr & FCR_FIFO_ENABLE) !== 0
  }

  get #fifoCapacity(): number {
    return this.#fifosEnabled ? FIFO_SIZE : 1
  }

  get #triggerLevel(): number {
    return this.#fifosEnabled ? TRIGGER_LEVELS[(this.#fcr >> FCR_TRIGGER_SHIFT) as 0 | 1 | 2 | 3] : 1
  }

  get #transmitterEmpty(): boolean {
    return (this.#mcr & MCR_LOOP) !== 0 || this.#backend.ready
  }

  /** The four modem inputs: a peer that is always there, or in loopback the four outputs (MCR, bit 4). */
  get #modemStatus(): number {
    const mcr = this.#mcr
    if ((mcr & MCR_LOOP) === 0) return MSR_CTS | MSR_DSR | MSR_DCD
    return (
      ((mcr & MCR_RTS) !== 0 ? MSR_CTS : 0) |
      ((mcr & MCR_DTR) !== 0 ? MSR_DSR : 0) |
      ((mcr & MCR_OUT1) !== 0 ? MSR_RI : 0) |
      ((mcr & MCR_OUT2) !== 0 ? MSR_DCD : 0)
    )
  }
}
