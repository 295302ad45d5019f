import type { Device, DeviceState, PortRange } from '../bus/device.js'
import { HIGH_MEMORY_START, MMIO_HOLE_END, ramRegions } from '../memory/layout.js'
import { StateReader } from './state.js'

// MC146818A Real-Time Clock plus RAM, Motorola, 1984; the rest of the CMOS as in IBM PC AT Technical
// Reference, 1984, "Real-Time Clock/Complementary Metal Oxide Semiconductor RAM", and as QEMU fills it.

/** Index register; bit 7 masks the NMI. Write-only. */
export const RTC_INDEX_PORT = 0x70
/** Offset of the data register (0x71). */
const DATA_OFFSET = 1
const INDEX_MASK = 0x7f
const INDEX_NMI_DISABLE = 0x80

const SECONDS = 0x00
const MINUTES = 0x02
const HOURS = 0x04
const DAY_OF_WEEK = 0x06
const DAY_OF_MONTH = 0x07
const MONTH = 0x08
const YEAR = 0x09
const REGISTER_A = 0x0a
const REGISTER_B = 0x0b
const REGISTER_C = 0x0c
const REGISTER_D = 0x0d
const CENTURY = 0x32
const CLOCK_REGISTERS: readonly number[] = [
  SECONDS,
  MINUTES,
  HOURS,
  DAY_OF_WEEK,
  DAY_OF_MONTH,
  MONTH,
  YEAR,
  CENTURY,
]

/** Update in progress: read-only, and never set here. */
const A_UIP = 0x80
/** 32768 Hz time base, 1024 Hz periodic rate: as firmware leaves it. */
const A_RESET = 0x26
/** The clock stands still and may be set. */
const B_SET = 0x80
/** Data mode: binary, not BCD. */
const B_DM = 0x04
const B_24_HOURS = 0x02
/** Valid RAM and time. */
const D_VRT = 0x80
const HOURS_PM = 0x80

const BASE_MEMORY = 0x15
const EXTENDED_MEMORY = 0x17
const EXTENDED_MEMORY_COPY = 0x30
const MEMORY_ABOVE_16M = 0x34
const MEMORY_ABOVE_4G = 0x5b

const CMOS_SIZE = 128
const KIB = 1024
const CHUNK = 64 * KIB

/**
 * How long the clock seems to stand still after register A was read. A clear UIP promises 244 µs in which the
 * registers belong together; guests are slow, so they get more.
 */
const HOLD_MS = 2

/** The largest time a Date can have, in ms from 1970. */
const MAX_TIME = 8_640_000_000_000_000

/** How to make an {@link Rtc}. */
export interface RtcOptions {
  /** Bytes of guest RAM; the CMOS tells the guest. */
  readonly memorySize: number
  /** The host's clock: UTC, in ms from 1970. `Date.now` unless given. */
  readonly now?: () => number
}

/**
 * The real-time clock and CMOS of a PC. It shows UTC; a guest that sets it moves it by an offset, which is
 * all that a snapshot keeps of the time. Alarms are stored but nothing interrupts.
 *
 * Set it with SET, as drivers do. Without SET each register takes effect at once, so that a day the present
 * month does not have is carried into the next.
 */
export class Rtc implements Device {
  readonly name = 'rtc'
  readonly ports: PortRange = { base: RTC_INDEX_PORT, length: 2 }
  readonly maxAccessSize = 1

  readonly #now: () => number
  #index = 0
  #nmiDisabled = false
  /** The guest's clock minus the host's, in ms. */
  #offset = 0
  /** Memory; the clock registers in it count only while SET is 1. */
  readonly #cmos = new Uint8Array(CMOS_SIZE)
  #heldTime = 0
  /** The host's time up to which `#heldTime` is shown. */
  #heldUntil = Number.NEGATIVE_INFINITY

  constructor({ memorySize, now = Date.now }: RtcOptions) {
    this.#now = now
    this.#cmos[REGISTER_A] = A_RESET
    this.#cmos[REGISTER_B] = B_24_HOURS
    this.#cmos[REGISTER_D] = D_VRT
    this.#storeMemorySize(memorySize)
  }

  /** Whether the guest has masked the NMI; shown only. */
  get nmiDisabled(): boolean {
    return this.#nmiDisabled
  }

  read(offset: number): number {
    if (offset !== DATA_OFFSET) return 0xff
    if (this.#index === REGISTER_A) {
      this.#heldTime = this.#time
      this.#heldUntil = this.#now() + HOLD_MS
    }
    if (this.#set || !CLOCK_REGISTERS.includes(this.#index)) return this.#cmos[this.#index]!
    return this.#encode(this.#shownTime, this.#index)
  }

  write(offset: number, value: number): void {
    if (offset !== DATA_OFFSET) {
      this.#index = value & INDEX_MASK
      this.#nmiDisabled = (value & INDEX_NMI_DISABLE) !== 0
      return
    }
    switch (this.#index) {
      case REGISTER_A:
        this.#cmos[REGISTER_A] = value & ~A_UIP
        break
      case REGISTER_B:
        this.#writeB(value)
        break
      case REGISTER_C:
      case REGISTER_D:
        break // read-only
      default:
        this.#writeData(value)
    }
  }

  saveState(): DeviceState {
    return {
      index: this.#index,
      nmiDisabled: this.#nmiDisabled,
      offset: this.#offset,
      cmos: this.#cmos.slice(),
    }
  }

  restoreState(state: DeviceState): void {
    const saved = new StateReader(this.name, state)
    const index = saved.uint('index', INDEX_MASK)
    const nmiDisabled = saved.boolean('nmiDisabled')
    const offset = saved.integer('offset', -MAX_TIME, MAX_TIME)
    const cmos = saved.bytes('cmos', CMOS_SIZE, CMOS_SIZE)
    this.#index = index
    this.#nmiDisabled = nmiDisabled
    this.#offset = offset
    this.#cmos.set(cmos)
    this.#heldUntil = Number.NEGATIVE_INFINITY
  }

  get #set(): boolean {
    return (this.#cmos[REGISTER_B]! & B_SET) !== 0
  }

  get #time(): number {
    return this.#now() + this.#offset
  }

  get #shownTime(): number {
    return this.#now() < this.#heldUntil ? this.#heldTime : this.#time
  }

  #writeB(value: number): void {
    const wasSet = this.#set
    // Latch before B changes: what the guest does not set stays, in the format it knows.
    if (!wasSet && (value & B_SET) !== 0) this.#latch()
    this.#cmos[REGISTER_B] = value
    if (wasSet && !this.#set) this.#startClock()
  }

  #writeData(value: number): void {
    if (this.#set || !CLOCK_REGISTERS.includes(this.#index)) {
      this.#cmos[this.#index] = value
      return
    }
    this.#latch()
    this.#cmos[this.#index] = value
    this.#startClock()
  }

  /** Puts the time into the clock registers. */
  #latch(): void {
    const time = this.#time
    for (const register of CLOCK_REGISTERS) this.#cmos[register] = this.#encode(time, register)
  }

  /** Goes on from the time in the clock registers; the day of the week follows from the date. */
  #startClock(): void {
    const cmos = this.#cmos
    const value = (register: number) => this.#decode(cmos[register]!)
    const date = new Date(0)
    date.setUTCFullYear(value(CENTURY) * 100 + value(YEAR), value(MONTH) - 1, value(DAY_OF_MONTH))
    date.setUTCHours(this.#decodeHours(cmos[HOURS]!), value(MINUTES), value(SECONDS))
    this.#offset = Math.round(date.getTime() - this.#now())
    this.#heldUntil = Number.NEGATIVE_INFINITY
  }

  #encode(time: number, register: number): number {
    const date = new Date(time)
    switch (register) {
      case SECONDS:
        return this.#encodeNumber(date.getUTCSeconds())
      case MINUTES:
        return this.#encodeNumber(date.getUTCMinutes())
      case HOURS:
        return this.#encodeHours(date.getUTCHours())
      case DAY_OF_WEEK:
        return this.#encodeNumber(date.getUTCDay() + 1)
      case DAY_OF_MONTH:
        return this.#encodeNumber(date.getUTCDate())
      case MONTH:
        return this.#encodeNumber(date.getUTCMonth() + 1)
      case YEAR:
        return this.#encodeNumber(Math.abs(date.getUTCFullYear()) % 100)
      default:
        return this.#encodeNumber(Math.floor(Math.abs(date.getUTCFullYear()) / 100))
    }
  }

  #encodeNumber(value: number): number {
    if ((this.#cmos[REGISTER_B]! & B_DM) !== 0) return value & 0xff
    return ((Math.floor(value / 10) << 4) | (value % 10)) & 0xff
  }

  #decode(byte: number): number {
    return (this.#cmos[REGISTER_B]! & B_DM) !== 0 ? byte : (byte >> 4) * 10 + (byte & 0x0f)
  }

  /** With 12 hours, midnight is 12 AM and noon 12 PM. */
  #encodeHours(hours: number): number {
    if ((this.#cmos[REGISTER_B]! & B_24_HOURS) !== 0) return this.#encodeNumber(hours)
    return this.#encodeNumber(hours % 12 === 0 ? 12 : hours % 12) | (hours >= 12 ? HOURS_PM : 0)
  }

  #decodeHours(byte: number): number {
    if ((this.#cmos[REGISTER_B]! & B_24_HOURS) !== 0) return this.#decode(byte)
    return (this.#decode(byte & ~HOURS_PM) % 12) + ((byte & HOURS_PM) !== 0 ? 12 : 0)
  }

  #storeMemorySize(memorySize: number): void {
    const above4G = ramRegions(memorySize).find(({ start }) => start === MMIO_HOLE_END)?.size ?? 0
    const below4G = memorySize - above4G
    const extended = Math.max(0, below4G - HIGH_MEMORY_START)
    this.#storeSize(BASE_MEMORY, 2, Math.min(below4G, 640 * KIB) / KIB)
    this.#storeSize(EXTENDED_MEMORY, 2, extended / KIB)
    this.#storeSize(EXTENDED_MEMORY_COPY, 2, extended / KIB)
    this.#storeSize(MEMORY_ABOVE_16M, 2, Math.max(0, below4G - 16 * KIB * KIB) / CHUNK)
    this.#storeSize(MEMORY_ABOVE_4G, 3, above4G / CHUNK)
  }

  /** Stores a size, little-endian: the largest number there is room for, when it is larger. */
  #storeSize(register: number, bytes: number, size: number): void {
    const value = Math.min(Math.floor(size), 2 ** (8 * bytes) - 1)
    for (let i = 0; i < bytes; i++) this.#cmos[register + i] = (value >> (8 * i)) & 0xff
  }
}
