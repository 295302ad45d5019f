import type { Device, DeviceHost, DeviceState, PortRange } from '../bus/device.js'
import { type InterruptLine, unconnectedLine } from '../interrupts/interrupt-line.js'
import type { Clock, Timer } from '../interrupts/timer.js'
import { StateReader } from './state.js'

// 82C54 CHMOS Programmable Interval Timer, Intel, October 1994 (231244-006); port B: IBM PC AT Technical Reference,
// 1984, "System Control Port".

const PIT_PORT = 0x40
/** Offset of the control word register. */
const CONTROL = 3
/** System control port B: gate and output of counter 2, the speaker, the refresh toggle. */
const PORT_B = 0x61
const PORT_B_REGION = 1
/** The ports of the timer, and port B. */
export const PIT_PORTS: readonly PortRange[] = [
  { base: PIT_PORT, length: 4 },
  { base: PORT_B, length: 1 },
]

/** 14.31818 MHz / 12, in Hz. */
export const PIT_FREQUENCY = 105_000_000 / 88
const NS_PER_TICK = 1e9 / PIT_FREQUENCY

const SELECT_READ_BACK = 3
const ACCESS_LATCH = 0
const ACCESS_LOW = 1
const ACCESS_HIGH = 2
const ACCESS_BOTH = 3
const READ_BACK_NO_COUNT = 0x20
const READ_BACK_NO_STATUS = 0x10
const STATUS_OUT = 0x80
const STATUS_NULL_COUNT = 0x40

const PORT_B_GATE2 = 0x01
/** The gate, the speaker, and two enables of checks that nothing here ever fails. */
const PORT_B_WRITABLE = 0x0f
const PORT_B_REFRESH = 0x10
const PORT_B_OUT2 = 0x20
/** The refresh request of a PC toggles with each of counter 1's: 18 ticks. */
const REFRESH_NS = 18 * NS_PER_TICK

/** The host wakes up for no shorter period: interrupts of a faster counter are lost. */
const MIN_PERIOD_NS = 100_000
/** Interrupts that were late are made up for, up to this many. */
const MAX_LATE = 1000
/** The longest that a counter can have counted, in ns: some 292 years. */
const MAX_ELAPSED = 2 ** 63

/**
 * One of the three counters. Times are in ns of the machine's clock.
 *
 * A count takes effect at once. On the chip that takes a tick, and in modes 2 and 3 the rest of the cycle, unless a
 * control word was written before, as drivers do.
 */
class Counter {
  mode = 0
  bcd = false
  access = ACCESS_BOTH
  /** The count register: 1 to 65536 (10000 in BCD); 0 for nothing written since the control word. */
  written = 0
  /** What the counting element was loaded with; 0 before it was. */
  initial = 0
  /** What was written has not been loaded. */
  nullCount = true
  gate: boolean
  /** How long it had counted when it last began to count. */
  #counted = 0
  /** When that was. */
  #since = 0
  /** Bytes of a count half written, and the low byte. */
  #writeHigh = false
  #low = 0
  #readHigh = false
  #latched: number | undefined
  #latchedStatus: number | undefined
  readonly #now: () => number

  constructor(now: () => number, gate: boolean) {
    this.#now = now
    this.gate = gate
  }

  /** From one output pulse to the next in modes 2 and 3; to the end of the count in others. */
  get period(): number {
    return this.initial * NS_PER_TICK
  }

  /** How long it has counted from `initial`. */
  get elapsed(): number {
    return this.#counted + (this.isCounting ? Math.max(0, this.#now() - this.#since) : 0)
  }

  get isPeriodic(): boolean {
    return this.mode === 2 || this.mode === 3
  }

  /** In modes 1 and 5 the gate's rising edge starts the count, and its level is nothing to it. */
  get isTriggered(): boolean {
    return this.mode === 1 || this.mode === 5
  }

  get isCounting(): boolean {
    return this.initial > 0 && (this.gate || this.isTriggered)
  }

  /** OUT ("Mode Definitions"). */
  get out(): boolean {
    if (this.initial === 0) return this.mode !== 0
    const ticks = this.#ticks
    switch (this.mode) {
      case 0:
      case 1:
        return ticks >= this.initial
      case 2:
        return !this.gate || ticks % this.initial !== this.initial - 1
      case 3:
        return !this.gate || ticks % this.initial < Math.ceil(this.initial / 2)
      default:
        return ticks !== this.initial
    }
  }

  control(value: number): void {
    const access = (value >> 4) & 3
    if (access === ACCESS_LATCH) {
      this.latchCount()
      return
    }
    this.access = access
    // Modes 6 and 7 are 2 and 3.
    const mode = (value >> 1) & 7
    this.mode = mode > 5 ? mode - 4 : mode
    this.bcd = (value & 1) !== 0
    this.written = 0
    this.initial = 0
    this.nullCount = true
    this.#writeHigh = false
    this.#readHigh = false
    this.#latched = undefined
    this.#latchedStatus = undefined
  }

  /** @returns whether it counts from something else now */
  write(value: number): boolean {
    if (this.access === ACCESS_BOTH && !this.#writeHigh) {
      this.#low = value
      this.#writeHigh = true
      if (this.mode !== 0) return false
      // "Writing the first byte disables counting. OUT is set low immediately" (mode 0).
      this.initial = 0
      return true
    }
    this.#writeHigh = false
    const count =
      this.access === ACCESS_LOW ? value : this.access === ACCESS_HIGH ? value << 8 : (value << 8) | this.#low
    const decoded = this.bcd ? fromBcd(count) : count
    this.written = decoded === 0 ? (this.bcd ? 10_000 : 0x1_0000) : decoded
    this.nullCount = true
    if (this.isTriggered) return false
    this.#load()
    return true
  }

  read(): number {
    if (this.#latchedStatus !== undefined) {
      const status = this.#latchedStatus
      this.#latchedStatus = undefined
      return status
    }
    const count = this.#latched ?? this.#count
    const high = this.access === ACCESS_HIGH || (this.access === ACCESS_BOTH && this.#readHigh)
    if (this.access === ACCESS_BOTH) this.#readHigh = !this.#readHigh
    if (!this.#readHigh) this.#latched = undefined
    return high ? count >> 8 : count & 0xff
  }

  latchCount(): void {
    this.#latched ??= this.#count
  }

  latchStatus(): void {
    this.#latchedStatus ??=
      (this.out ? STATUS_OUT : 0) |
      (this.nullCount ? STATUS_NULL_COUNT : 0) |
      (this.access << 4) |
      (this.mode << 1) |
      Number(this.bcd)
  }

  /** "Gate Pin Operations": modes 0 and 4 count while it is up, 1 and 5 start as it rises, 2 and 3 do both. */
  setGate(gate: boolean): void {
    if (gate === this.gate) return
    this.#counted = this.elapsed
    this.#since = this.#now()
    this.gate = gate
    if (gate && (this.isPeriodic || this.isTriggered) && this.written > 0) this.#load()
  }

  save(): DeviceState {
    return {
      mode: this.mode,
      bcd: this.bcd,
      access: this.access,
      written: this.written,
      initial: this.initial,
      nullCount: this.nullCount,
      elapsed: this.elapsed,
      gate: this.gate,
      low: this.#low,
      writeHigh: this.#writeHigh,
      readHigh: this.#readHigh,
      latched: this.#latched ?? -1,
      latchedStatus: this.#latchedStatus ?? -1,
    }
  }

  /** @returns how to take the state, once all of it was checked */
  restore(name: string, state: DeviceState): () => void {
    const saved = new StateReader(name, state)
    const mode = saved.uint('mode', 5)
    const bcd = saved.boolean('bcd')
    const access = saved.integer('access', ACCESS_LOW, ACCESS_BOTH)
    const written = saved.uint('written', bcd ? 10_000 : 0x1_0000)
    const initial = saved.uint('initial', bcd ? 10_000 : 0x1_0000)
    const nullCount = saved.boolean('nullCount')
    const elapsed = saved.uint('elapsed', MAX_ELAPSED)
    const gate = saved.boolean('gate')
    const low = saved.byte('low')
    const writeHigh = saved.boolean('writeHigh')
    const readHigh = saved.boolean('readHigh')
    const latched = saved.integer('latched', -1, 0xffff)
    const latchedStatus = saved.integer('latchedStatus', -1, 0xff)
    return () => {
      Object.assign(this, { mode, bcd, access, written, initial, nullCount, gate })
      this.#counted = elapsed
      this.#since = this.#now()
      this.#low = low
      this.#writeHigh = writeHigh
      this.#readHigh = readHigh
      this.#latched = latched < 0 ? undefined : latched
      this.#latchedStatus = latchedStatus < 0 ? undefined : latchedStatus
    }
  }

  /** From the count register into the counting element, which begins to count where the gate lets it. */
  #load(): void {
    this.initial = this.written
    this.nullCount = false
    this.#counted = 0
    this.#since = this.#now()
  }

  get #ticks(): number {
    return Math.floor(this.elapsed / NS_PER_TICK)
  }

  /** The counting element, as it would be read. */
  get #count(): number {
    const { initial } = this
    if (initial === 0) return 0
    const ticks = this.#ticks
    const modulus = this.bcd ? 10_000 : 0x1_0000
    let count: number
    if (this.mode === 2) {
      count = initial - (ticks % initial)
    } else if (this.mode === 3) {
      // By twos, from an even number: an odd count is loaded "minus one", and its high half is a tick longer.
      const half = Math.ceil(initial / 2)
      const phase = ticks % initial
      count = initial - (initial % 2) - 2 * (phase < half ? phase : phase - half)
    } else count = (((initial - ticks) % modulus) + modulus) % modulus
    count %= modulus
    return this.bcd ? toBcd(count) : count
  }
}

/**
 * The timer of a PC, an 82C54, and port 0x61: counter 0 interrupts, counter 2 measures (and would make the speaker
 * sound). For machines without KVM's own.
 *
 * Counters are computed from the host's clock when they are looked at; only counter 0 needs a timer. Interrupts that
 * the host was late for come at twice the rate until they are made up for.
 */
export class Pit implements Device {
  readonly name = 'pit'
  readonly irq = 0
  readonly ports = PIT_PORTS
  readonly maxAccessSize = 1

  #interrupt: InterruptLine = unconnectedLine
  #clock: Clock | undefined
  #timer: Timer | undefined
  #lateTimer: Timer | undefined
  #late = 0
  #portB = 0
  readonly #counters: readonly [Counter, Counter, Counter]

  constructor() {
    const now = () => this.#clock?.now() ?? 0
    this.#counters = [new Counter(now, true), new Counter(now, true), new Counter(now, false)]
  }

  attach(host: DeviceHost): void {
    this.#interrupt = host.interrupt
    this.#clock = host.clock
    this.#timer = host.clock.timer((expirations) => this.#expired(expirations))
    this.#lateTimer = host.clock.timer(() => this.#makeUp())
  }

  read(offset: number, _size: number, region: number): number {
    if (region === PORT_B_REGION) return this.#readPortB()
    return offset === CONTROL ? 0xff : this.#counters[offset]!.read()
  }

  write(offset: number, value: number, _size: number, region: number): void {
    if (region === PORT_B_REGION) {
      this.#portB = value & PORT_B_WRITABLE
      this.#counters[2].setGate((value & PORT_B_GATE2) !== 0)
    } else if (offset === CONTROL) {
      this.#control(value)
    } else if (this.#counters[offset]!.write(value) && offset === 0) {
      this.#arm()
    }
  }

  saveState(): DeviceState {
    return {
      portB: this.#portB,
      late: this.#late,
      counters: this.#counters.map((counter) => counter.save()),
    }
  }

  restoreState(state: DeviceState): void {
    const saved = new StateReader(this.name, state)
    const portB = saved.uint('portB', PORT_B_WRITABLE)
    const late = saved.uint('late', MAX_LATE)
    const counters = saved.list('counters', 3)
    const takers = this.#counters.map((counter, i) => counter.restore(`counter ${i} of pit`, counters[i]!))
    for (const take of takers) take()
    this.#portB = portB
    this.#arm()
    this.#late = late
    if (late > 0) this.#armLate()
  }

  #control(value: number): void {
    const select = value >> 6
    if (select !== SELECT_READ_BACK) {
      const counter = this.#counters[select]!
      counter.control(value)
      if (select === 0 && !counter.isCounting) this.#disarm()
      return
    }
    for (const [i, counter] of this.#counters.entries()) {
      if ((value & (2 << i)) === 0) continue
      if ((value & READ_BACK_NO_COUNT) === 0) counter.latchCount()
      if ((value & READ_BACK_NO_STATUS) === 0) counter.latchStatus()
    }
  }

  #readPortB(): number {
    const refresh = Math.floor((this.#clock?.now() ?? 0) / REFRESH_NS) % 2 === 1 ? PORT_B_REFRESH : 0
    return this.#portB | refresh | (this.#counters[2].out ? PORT_B_OUT2 : 0)
  }

  #arm(): void {
    this.#disarm()
    const counter = this.#counters[0]
    if (!counter.isCounting || this.#clock === undefined) return
    const { elapsed } = counter
    if (counter.isPeriodic) {
      const period = this.#interruptPeriod
      this.#timer!.arm(period - (elapsed % period), period)
    } else if (elapsed < counter.period) {
      this.#timer!.arm(counter.period - elapsed)
    }
  }

  /** ns from one interrupt to the next. */
  get #interruptPeriod(): number {
    return Math.max(this.#counters[0].period, MIN_PERIOD_NS)
  }

  #disarm(): void {
    this.#late = 0
    this.#timer?.disarm()
    this.#lateTimer?.disarm()
  }

  #expired(expirations: number): void {
    this.#interrupt.trigger()
    if (expirations === 1) return
    if (this.#late === 0) this.#armLate()
    this.#late = Math.min(this.#late + expirations - 1, MAX_LATE)
  }

  /** One more between each two. */
  #armLate(): void {
    const period = this.#interruptPeriod
    this.#lateTimer?.arm(period / 2, period)
  }

  #makeUp(): void {
    if (this.#late > 0) {
      this.#late--
      this.#interrupt.trigger()
    }
    if (this.#late === 0) this.#lateTimer?.disarm()
  }
}

/** Digits above 9, which no one promises anything for, count as they are. */
function fromBcd(value: number): number {
  return [12, 8, 4, 0].reduce((sum, shift) => sum * 10 + ((value >> shift) & 0xf), 0) % 10_000
}

function toBcd(value: number): number {
  return [1000, 100, 10, 1].reduce((bcd, unit) => (bcd << 4) | (Math.floor(value / unit) % 10), 0)
}
