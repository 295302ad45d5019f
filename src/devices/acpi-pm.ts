import type { AccessSize, Device, DeviceHost, DeviceState, PortRange } from '../bus/device.js'
import { type InterruptLine, unconnectedLine } from '../interrupts/interrupt-line.js'
import type { Clock, Timer } from '../interrupts/timer.js'
import { SCI_IRQ } from '../wiring.js'
import { StateReader } from './state.js'

// ACPI 6.5, 4.8.1 "Fixed Hardware Features", 4.8.3 "Fixed Hardware Registers" and 4.8.4 "Generic Hardware Registers"; at
// QEMU's ports.

/** PM1a_EVT_BLK: PM1 status, then PM1 enable, 16 bits each. */
export const PM1_EVENT_PORT = 0x600
/** PM1a_CNT_BLK: what small kernels write 0x2000 to, to power off. */
export const PM1_CONTROL_PORT = 0x604
/** PM_TMR_BLK: 32 bits. */
export const PM_TIMER_PORT = 0x608
/** GPE0_BLK: GPE0 status, then GPE0 enable, 8 bits each. */
export const GPE0_PORT = 0x620

const EVENT_REGION = 0
const CONTROL_REGION = 1
const TIMER_REGION = 2
const GPE_REGION = 3
/** PM1 enable is the upper half of the event block, … */
const ENABLE_SHIFT = 16
/** … GPE0 enable that of its block. */
const GPE_ENABLE_SHIFT = 8
const GPE_MASK = 0xff

// 4.8.3.1.1 "PM1 Status Registers" and 4.8.3.1.2 "PM1 Enable Registers": bit n enables what bit n tells
/** The timer's most significant bit has changed. */
const TMR_STS = 1 << 0
/** The firmware has released the global lock: never, as there is none. */
const GBL_EN = 1 << 5
const PWRBTN_STS = 1 << 8
/** What can be enabled. That GBL_EN sticks tells a guest that the global lock exists. */
const ENABLES = TMR_STS | GBL_EN | PWRBTN_STS

// 4.8.3.2.1 "PM1 Control Registers"
/** Events give SCIs, not SMIs: always, as there is no SMI_CMD port. */
const SCI_EN = 1 << 0
const BM_RLD = 1 << 1
const SLP_TYP = 7 << 10
/** "Setting this bit causes the system to sequence into the sleeping state"; write-only, reads as 0. */
const SLP_EN = 1 << 13

// 4.8.2.1 "Power Management Timer"
const PM_TIMER_HZ = 3_579_545
const NS_PER_SECOND = 1e9
/** What the counter counts to: TMR_VAL_EXT is set in the FADT. */
const TIMER_PERIOD = 2 ** 32
/** Ticks from one change of the most significant bit to the next. */
const CARRY_PERIOD = TIMER_PERIOD / 2

/** How to make an {@link AcpiPm}. */
export interface AcpiPmOptions {
  /** The guest powers the machine off. */
  onPowerOff(): void
}

/**
 * The hardware of ACPI: power button, soft-off, power management timer, and eight general-purpose events (GPEs), which
 * methods in the DSDT handle.
 *
 * Soft-off is the only sleeping state, so SLP_TYP does not matter: small kernels write SLP_EN alone. The
 * machine is in ACPI mode from the start.
 */
export class AcpiPm implements Device {
  readonly name = 'acpi-pm'
  readonly irq = SCI_IRQ
  readonly ports: readonly PortRange[] = [
    { base: PM1_EVENT_PORT, length: 4 },
    { base: PM1_CONTROL_PORT, length: 2 },
    { base: PM_TIMER_PORT, length: 4 },
    { base: GPE0_PORT, length: 2 },
  ]

  readonly #onPowerOff: () => void
  #sci: InterruptLine = unconnectedLine
  #clock: Clock | undefined
  #carryTimer: Timer | undefined
  /** PM1 status, but for TMR_STS, which follows from the clock. */
  #status = 0
  #enable = 0
  #control = 0
  #gpeStatus = 0
  #gpeEnable = 0
  /** The counter minus the machine's clock in ticks: it begins at 0, and goes on in a snapshot. */
  #timerOffset = 0
  /** How many changes of the counter's most significant bit the guest has been told of. */
  #carriesSeen = 0

  constructor({ onPowerOff }: AcpiPmOptions) {
    this.#onPowerOff = onPowerOff
  }

  attach(host: DeviceHost): void {
    this.#sci = host.interrupt
    this.#clock = host.clock
    this.#carryTimer = host.clock.timer(() => this.#update())
    this.#timerOffset = -this.#clockTicks
  }

  /** Presses the power button. A guest that enabled it gets an interrupt; any sees it in PM1 status. */
  pressPowerButton(): void {
    this.#status |= PWRBTN_STS
    this.#update()
  }

  /** Raises a general-purpose event, 0 to 7. A guest that enabled it gets an interrupt; any sees it in GPE0 status. */
  raiseGpe(gpe: number): void {
    this.#gpeStatus |= 1 << gpe
    this.#update()
  }

  read(offset: number, _size: AccessSize, region: number): number {
    return this.#readRegion(region) >>> (8 * offset)
  }

  write(offset: number, value: number, size: AccessSize, region: number): void {
    const shift = 8 * offset
    const mask = size === 4 ? 0xffff_ffff : ((1 << (8 * size)) - 1) << shift
    const written = (value << shift) & mask
    if (region === EVENT_REGION) this.#writeEvents(written, mask)
    else if (region === CONTROL_REGION) this.#writeControl(written, mask)
    else if (region === GPE_REGION) this.#writeGpes(written, mask)
  }

  saveState(): DeviceState {
    return {
      status: this.#pm1Status,
      enable: this.#enable,
      control: this.#control,
      timer: this.#ticks % TIMER_PERIOD,
      gpeStatus: this.#gpeStatus,
      gpeEnable: this.#gpeEnable,
    }
  }

  restoreState(state: DeviceState): void {
    const saved = new StateReader(this.name, state)
    const status = saved.uint('status', 0xffff)
    const enable = saved.uint('enable', 0xffff)
    const control = saved.uint('control', 0xffff)
    const timer = saved.uint('timer', TIMER_PERIOD - 1)
    const gpeStatus = saved.uint('gpeStatus', GPE_MASK)
    const gpeEnable = saved.uint('gpeEnable', GPE_MASK)
    this.#status = status & PWRBTN_STS
    this.#enable = enable & ENABLES
    this.#control = control & (BM_RLD | SLP_TYP)
    this.#gpeStatus = gpeStatus
    this.#gpeEnable = gpeEnable
    this.#timerOffset = timer - this.#clockTicks
    this.#carriesSeen = this.#carries - ((status & TMR_STS) !== 0 ? 1 : 0)
    this.#update()
  }

  get #clockTicks(): number {
    return Math.floor(((this.#clock?.now() ?? 0) * PM_TIMER_HZ) / NS_PER_SECOND)
  }

  /** The counter, without end. */
  get #ticks(): number {
    return this.#clockTicks + this.#timerOffset
  }

  get #carries(): number {
    return Math.floor(this.#ticks / CARRY_PERIOD)
  }

  get #pm1Status(): number {
    return this.#status | (this.#carries !== this.#carriesSeen ? TMR_STS : 0)
  }

  #readRegion(region: number): number {
    if (region === EVENT_REGION) return (this.#pm1Status | (this.#enable << ENABLE_SHIFT)) >>> 0
    if (region === CONTROL_REGION) return this.#control | SCI_EN
    if (region === TIMER_REGION) return this.#ticks % TIMER_PERIOD
    return this.#gpeStatus | (this.#gpeEnable << GPE_ENABLE_SHIFT)
  }

  /** A 1 clears a status bit; an enable bit keeps what was written. */
  #writeEvents(written: number, mask: number): void {
    this.#status &= ~written
    if ((written & TMR_STS) !== 0) this.#carriesSeen = this.#carries
    const enableMask = mask >>> ENABLE_SHIFT
    this.#enable = (this.#enable & ~enableMask) | ((written >>> ENABLE_SHIFT) & ENABLES)
    this.#update()
  }

  #writeGpes(written: number, mask: number): void {
    this.#gpeStatus &= ~written
    const enableMask = mask >>> GPE_ENABLE_SHIFT
    this.#gpeEnable = (this.#gpeEnable & ~enableMask) | (written >>> GPE_ENABLE_SHIFT)
    this.#update()
  }

  #writeControl(written: number, mask: number): void {
    this.#control = ((this.#control & ~mask) | written) & (BM_RLD | SLP_TYP)
    if ((written & SLP_EN) !== 0) this.#onPowerOff()
  }

  /** The SCI is up as long as an event that is enabled is not cleared. */
  #update(): void {
    const status = this.#pm1Status
    this.#sci.setLevel(((status & this.#enable) | (this.#gpeStatus & this.#gpeEnable)) !== 0)
    if ((this.#enable & ~status & TMR_STS) !== 0) {
      const ticks = (this.#carries + 1) * CARRY_PERIOD - this.#ticks
      this.#carryTimer?.arm((ticks * NS_PER_SECOND) / PM_TIMER_HZ)
    } else {
      this.#carryTimer?.disarm()
    }
  }
}
