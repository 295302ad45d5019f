import type { Device, DeviceHost, DeviceState, PortRange } from '../bus/device.js'
import { type InterruptLine, unconnectedLine } from '../interrupts/interrupt-line.js'
import type { Clock, Timer } from '../interrupts/timer.js'
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
const SECONDS_ALARM = 0x01
const MINUTES = 0x02
const MINUTES_ALARM = 0x03
const HOURS = 0x04
const HOURS_ALARM = 0x05
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

/** Update in progress: read-only. */
const A_UIP = 0x80
/** Rate selection: the periodic interrupt. */
const A_RS = 0x0f
/** 32768 Hz time base, 1024 Hz periodic rate: as firmware leaves it. */
const A_RESET = 0x26
/** The clock stands still and may be set. */
const B_SET = 0x80
/** Interrupt enables: periodic, alarm, update ended. */
const B_PIE = 0x40
const B_AIE = 0x20
const B_UIE = 0x10
/** Data mode: binary, not BCD. */
const B_DM = 0x04
const B_24_HOURS = 0x02
/** Flags, which reading clears: any that is enabled; periodic, alarm, update ended. At the places of the enables. */
const C_IRQF = 0x80
const C_PF = 0x40
const C_AF = 0x20
const C_UF = 0x10
const C_FLAGS = C_PF | C_AF | C_UF
/** Valid RAM and time. */
const D_VRT = 0x80
const HOURS_PM = 0x80
/** An alarm register with both of these set agrees with anything. */
const ALARM_ANY = 0xc0

const BASE_MEMORY = 0x15
const EXTENDED_MEMORY = 0x17
const EXTENDED_MEMORY_COPY = 0x30
const MEMORY_ABOVE_16M = 0x34
const MEMORY_ABOVE_4G = 0x5b

const CMOS_SIZE = 128
const TIME_BASE_HZ = 32_768
const NS_PER_SECOND = 1e9
const NS_PER_MS = 1e6
const KIB = 1024
const CHUNK = 64 * KIB

/**
 * How long the clock seems to stand still after register A was read. A clear UIP promises 244 µs in which the
 * registers belong together; guests are slow, so they get more.
 */
const HOLD_MS = 2
/** How long an update seems to take: 2 ms (1984 µs, and 244 µs before it). */
const UPDATE_MS = 2

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
 * all that a snapshot keeps of the time.
 *
 * Set it with SET, as drivers do. Without SET each register takes effect at once, so that a day the present
 * month does not have is carried into the next.
 *
 * The flags of register C are found out when it is read, or when one that is enabled becomes due: a clock that nobody
 * listens to costs nothing.
 */
export class Rtc implements Device {
  readonly name = 'rtc'
  readonly irq = 8
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
  #interrupt: InterruptLine = unconnectedLine
  #clock: Clock | undefined
  #periodicTimer: Timer | undefined
  #secondTimer: Timer | undefined
  /** ns of the machine's clock: since when periods count that register C has not told of. */
  #periodStart = 0
  /** The guest's second up to which register C has told of updates and alarms. */
  #secondSeen = 0

  constructor({ memorySize, now = Date.now }: RtcOptions) {
    this.#now = now
    this.#cmos[REGISTER_A] = A_RESET
    this.#cmos[REGISTER_B] = B_24_HOURS
    this.#cmos[REGISTER_D] = D_VRT
    this.#storeMemorySize(memorySize)
    this.#secondSeen = this.#second
  }

  attach(host: DeviceHost): void {
    this.#interrupt = host.interrupt
    this.#clock = host.clock
    this.#periodStart = host.clock.now()
    this.#periodicTimer = host.clock.timer(() => this.#look())
    this.#secondTimer = host.clock.timer(() => {
      this.#look()
      this.#armSeconds()
    })
  }

  /** Whether the guest has masked the NMI; shown only. */
  get nmiDisabled(): boolean {
    return this.#nmiDisabled
  }

  read(offset: number): number {
    if (offset !== DATA_OFFSET) return 0xff
    if (this.#index === REGISTER_A) {
      if (this.#isUpdating) return this.#cmos[REGISTER_A]! | A_UIP
      this.#heldTime = this.#time
      this.#heldUntil = this.#now() + HOLD_MS
    }
    if (this.#index === REGISTER_C) return this.#takeFlags()
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
        this.#look()
        this.#cmos[REGISTER_A] = value & ~A_UIP
        this.#periodStart = this.#clock?.now() ?? 0
        this.#armPeriodic()
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
    this.#cmos[REGISTER_A] = cmos[REGISTER_A]! & ~A_UIP
    this.#cmos[REGISTER_D] = D_VRT
    this.#heldUntil = Number.NEGATIVE_INFINITY
    this.#secondSeen = this.#second
    this.#periodStart = this.#clock?.now() ?? 0
    this.#update()
    this.#armPeriodic()
    this.#armSeconds()
  }

  get #set(): boolean {
    return (this.#cmos[REGISTER_B]! & B_SET) !== 0
  }

  /** The last milliseconds of a second: guests wait for the update to begin, or to end. */
  get #isUpdating(): boolean {
    return !this.#set && ((this.#time % 1000) + 1000) % 1000 >= 1000 - UPDATE_MS
  }

  get #time(): number {
    return this.#now() + this.#offset
  }

  get #shownTime(): number {
    return this.#now() < this.#heldUntil ? this.#heldTime : this.#time
  }

  #writeB(value: number): void {
    const wasSet = this.#set
    this.#look()
    // Latch before B changes: what the guest does not set stays, in the format it knows.
    if (!wasSet && (value & B_SET) !== 0) this.#latch()
    const before = this.#cmos[REGISTER_B]!
    // "The SET bit going high clears the UIE bit."
    this.#cmos[REGISTER_B] = (value & B_SET) !== 0 ? value & ~B_UIE : value
    if (wasSet && !this.#set) this.#startClock()
    this.#look()
    if (((before ^ value) & B_PIE) !== 0) this.#armPeriodic()
    this.#armSeconds()
  }

  /** The guest's time in whole seconds. */
  get #second(): number {
    return Math.floor(this.#time / 1000)
  }

  /** ns from one periodic interrupt to the next; 0 for none (table 5, 32768 Hz time base). */
  get #period(): number {
    const rate = this.#cmos[REGISTER_A]! & A_RS
    if (rate === 0) return 0
    // Rates 1 and 2 are those of 8 and 9.
    return (2 ** ((rate < 3 ? rate + 7 : rate) - 1) / TIME_BASE_HZ) * NS_PER_SECOND
  }

  /** Finds out what has become due since it last was. */
  #look(): void {
    const period = this.#period
    const periods = period === 0 ? 0 : Math.floor(((this.#clock?.now() ?? 0) - this.#periodStart) / period)
    if (periods > 0) {
      this.#periodStart += periods * period
      this.#cmos[REGISTER_C]! |= C_PF
    }
    const second = this.#second
    if (second !== this.#secondSeen && !this.#set) {
      this.#cmos[REGISTER_C]! |= C_UF
      if (this.#alarmSince(second)) this.#cmos[REGISTER_C]! |= C_AF
    }
    this.#secondSeen = second
    this.#update()
  }

  /** Whether the alarm went off after the last second that was looked at, up to this one. */
  #alarmSince(second: number): boolean {
    // A day has every time of day; and a guest that was away for longer gets one alarm.
    const first = Math.max(this.#secondSeen + 1, second - 86_399)
    for (let at = first; at <= second; at++) if (this.#isAlarm(at * 1000)) return true
    return false
  }

  #isAlarm(time: number): boolean {
    return (
      [
        [SECONDS_ALARM, SECONDS],
        [MINUTES_ALARM, MINUTES],
        [HOURS_ALARM, HOURS],
      ] as const
    ).every(([alarm, register]) => {
      const wanted = this.#cmos[alarm]!
      return (wanted & ALARM_ANY) === ALARM_ANY || wanted === this.#encode(time, register)
    })
  }

  /** Register C, which reading clears. */
  #takeFlags(): number {
    this.#look()
    const flags = this.#cmos[REGISTER_C]!
    this.#cmos[REGISTER_C] = 0
    this.#interrupt.setLevel(false)
    return flags
  }

  /** IRQF, and the line, which is up as long as an enabled flag is set. */
  #update(): void {
    const flags = this.#cmos[REGISTER_C]! & C_FLAGS
    const asserted = (flags & this.#cmos[REGISTER_B]!) !== 0
    this.#cmos[REGISTER_C] = flags | (asserted ? C_IRQF : 0)
    this.#interrupt.setLevel(asserted)
  }

  #armPeriodic(): void {
    const period = this.#period
    if (period === 0 || (this.#cmos[REGISTER_B]! & B_PIE) === 0) this.#periodicTimer?.disarm()
    else this.#periodicTimer?.arm(period - (((this.#clock?.now() ?? 0) - this.#periodStart) % period), period)
  }

  /** Wakes up at the next second of the guest's, if somebody waits for it. */
  #armSeconds(): void {
    if (this.#set || (this.#cmos[REGISTER_B]! & (B_UIE | B_AIE)) === 0) this.#secondTimer?.disarm()
    else this.#secondTimer?.arm((1000 - (((this.#time % 1000) + 1000) % 1000)) * NS_PER_MS)
  }

  #writeData(value: number): void {
    // What has become due until now did so by the registers as they were.
    this.#look()
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
    // A clock that was set has not run meanwhile.
    this.#secondSeen = this.#second
    this.#armSeconds()
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
