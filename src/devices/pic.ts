import type { Device, DeviceState, PortRange } from '../bus/device.js'
import type { ExternalInterrupts } from '../interrupts/external-interrupts.js'
import { StateReader } from './state.js'

// 8259A Programmable Interrupt Controller, Intel, December 1988 (231468-003); ELCR: 82371AB (PIIX4), Intel, April
// 1997, 4.2.5 "Interrupt Controller registers". "IR" is an input, as there.

const MASTER_PORT = 0x20
const SLAVE_PORT = 0xa0
/** Edge/level control registers: master, then slave. */
const ELCR_PORT = 0x4d0
/** The ports of the pair. */
export const PIC_PORTS: readonly PortRange[] = [
  { base: MASTER_PORT, length: 2 },
  { base: SLAVE_PORT, length: 2 },
  { base: ELCR_PORT, length: 2 },
]
/** The region of the ELCR; regions 0 and 1 are the chips. */
const ELCR_REGION = 2

/** The master's input that the slave is on. */
const CASCADE = 2
/** What INTA gives when the input went away meanwhile. */
const SPURIOUS = 7
const INPUTS = 8
/** Lines 0, 1, 2, 8 and 13 are always edge-triggered (PIIX4, ELCR1 and ELCR2). */
const ELCR_MASKS = [0xf8, 0xde] as const

const ICW1 = 0x10
const ICW1_IC4 = 0x01
const ICW1_SNGL = 0x02
const ICW2_BASE = 0xf8
const ICW4_AEOI = 0x02
const ICW4_SFNM = 0x10
const OCW3 = 0x08
const OCW3_RIS = 0x01
const OCW3_RR = 0x02
const OCW3_POLL = 0x04
const OCW3_SMM = 0x20
const OCW3_ESMM = 0x40
const POLL_PENDING = 0x80

/** OCW2's three highest bits: R, SL, EOI. */
const OCW2_CLEAR_ROTATE_AEOI = 0
const OCW2_EOI = 1
const OCW2_SPECIFIC_EOI = 3
const OCW2_SET_ROTATE_AEOI = 4
const OCW2_ROTATE_EOI = 5
const OCW2_SET_PRIORITY = 6
const OCW2_ROTATE_SPECIFIC_EOI = 7

/** The fields of a chip's state, all bytes. */
const STATE_FIELDS = [
  'lines',
  'irr',
  'imr',
  'isr',
  'elcr',
  'base',
  'top',
  'expected',
  'flags',
  'rotateOnAutoEoi',
] as const

/** One 8259A. */
class Chip {
  /** Levels of the inputs. */
  lines = 0
  /** Requests: latched edges, and levels. */
  irr = 0
  imr = 0
  isr = 0
  elcr = 0
  /** Vector of input 0. */
  base = 0
  /** The input that has the first priority. */
  top = 0
  /** Which of ICW2 to ICW4 comes next; 0 for none. */
  expected = 0
  autoEoi = false
  rotateOnAutoEoi = false
  specialMask = false
  specialFullyNested = false
  #hasIcw4 = false
  #single = false
  #readIsr = false
  #poll = false
  /** Bit of the input that a slave is on, or 0. */
  readonly #cascade: number
  /** The inputs that may be level-triggered. */
  readonly #elcrMask: number

  constructor(cascade: number, elcrMask: number) {
    this.#cascade = cascade
    this.#elcrMask = elcrMask
  }

  setInput(input: number, asserted: boolean): void {
    const bit = 1 << input
    if ((this.elcr & bit) !== 0) this.irr = asserted ? this.irr | bit : this.irr & ~bit
    else if (asserted && (this.lines & bit) === 0) this.irr |= bit
    // An edge of a device stays latched, as its pulse has no length; a slave's INT that falls was withdrawn.
    else if (!asserted) this.irr &= ~(bit & this.#cascade)
    this.lines = asserted ? this.lines | bit : this.lines & ~bit
  }

  setElcr(value: number): void {
    this.elcr = value & this.#elcrMask
    this.irr = (this.irr & ~this.elcr) | (this.lines & this.elcr)
  }

  /** The input to be served next; -1 for none. */
  get request(): number {
    const wanted = this.#first(this.irr & ~this.imr)
    if (wanted === INPUTS) return -1
    const input = (wanted + this.top) % INPUTS
    const inService = this.#first(this.#countedInService)
    // Special fully nested mode: a slave in service is "not locked out from the master's priority logic".
    const nests = this.specialFullyNested && wanted === inService && (this.#cascade & (1 << input)) !== 0
    return wanted < inService || nests ? input : -1
  }

  /** Inputs in service, but for those that are masked in the special mask mode. */
  get #countedInService(): number {
    return this.specialMask ? this.isr & ~this.imr : this.isr
  }

  /** INTA, or poll. */
  acknowledge(input: number): void {
    const bit = 1 << input
    if ((this.elcr & bit) === 0) this.irr &= ~bit
    if (!this.autoEoi) this.isr |= bit
    else if (this.rotateOnAutoEoi) this.top = (input + 1) % INPUTS
  }

  /** Whether this read is the one that the poll command announced. */
  takePoll(): boolean {
    const poll = this.#poll
    this.#poll = false
    return poll
  }

  read(offset: number): number {
    if (offset !== 0) return this.imr
    return this.#readIsr ? this.isr : this.irr
  }

  write(offset: number, value: number): void {
    if (offset !== 0) this.#writeData(value)
    else if ((value & ICW1) !== 0) this.#initialize(value)
    else if ((value & OCW3) !== 0) this.#writeOcw3(value)
    else this.#writeOcw2(value >> 5, value & 0x07)
  }

  save(): DeviceState {
    return {
      ...Object.fromEntries(
        STATE_FIELDS.map((field) => [field, Number(field === 'flags' ? this.#flags : this[field])]),
      ),
    }
  }

  /** @param name - for errors */
  restore(name: string, state: DeviceState): void {
    const saved = new StateReader(name, state)
    const fields = Object.fromEntries(STATE_FIELDS.map((field) => [field, saved.byte(field)])) as Record<
      (typeof STATE_FIELDS)[number],
      number
    >
    const top = saved.uint('top', INPUTS - 1)
    const expected = saved.uint('expected', 4)
    const { rotateOnAutoEoi, flags, base, elcr, ...registers } = fields
    Object.assign(this, registers, {
      top,
      expected,
      base: base & ICW2_BASE,
      rotateOnAutoEoi: rotateOnAutoEoi !== 0,
    })
    this.setElcr(elcr)
    this.#flags = flags
  }

  /** ICW1 (fig. 7): edges have to come anew, masks and priorities are cleared. */
  #initialize(icw1: number): void {
    this.irr &= this.elcr
    this.imr = 0
    this.isr = 0
    this.top = 0
    this.autoEoi = false
    this.rotateOnAutoEoi = false
    this.specialMask = false
    this.specialFullyNested = false
    this.#readIsr = false
    this.#poll = false
    this.#hasIcw4 = (icw1 & ICW1_IC4) !== 0
    this.#single = (icw1 & ICW1_SNGL) !== 0
    this.expected = 2
  }

  #writeData(value: number): void {
    switch (this.expected) {
      case 2:
        this.base = value & ICW2_BASE
        this.expected = this.#single ? (this.#hasIcw4 ? 4 : 0) : 3
        break
      case 3: // ICW3: the wiring, which is a PC's whatever is written.
        this.expected = this.#hasIcw4 ? 4 : 0
        break
      case 4:
        this.autoEoi = (value & ICW4_AEOI) !== 0
        this.specialFullyNested = (value & ICW4_SFNM) !== 0
        this.expected = 0
        break
      default:
        this.imr = value
    }
  }

  #writeOcw2(command: number, level: number): void {
    switch (command) {
      case OCW2_CLEAR_ROTATE_AEOI:
      case OCW2_SET_ROTATE_AEOI:
        this.rotateOnAutoEoi = command === OCW2_SET_ROTATE_AEOI
        break
      case OCW2_EOI:
      case OCW2_ROTATE_EOI: {
        // Special mask mode: an IS bit that is masked "will not be cleared by a non-specific EOI".
        const first = this.#first(this.#countedInService)
        if (first === INPUTS) break
        const input = (first + this.top) % INPUTS
        this.isr &= ~(1 << input)
        if (command === OCW2_ROTATE_EOI) this.top = (input + 1) % INPUTS
        break
      }
      case OCW2_SPECIFIC_EOI:
      case OCW2_ROTATE_SPECIFIC_EOI:
        this.isr &= ~(1 << level)
        if (command === OCW2_ROTATE_SPECIFIC_EOI) this.top = (level + 1) % INPUTS
        break
      case OCW2_SET_PRIORITY:
        this.top = (level + 1) % INPUTS
    }
  }

  #writeOcw3(value: number): void {
    if ((value & OCW3_POLL) !== 0) this.#poll = true
    if ((value & OCW3_RR) !== 0) this.#readIsr = (value & OCW3_RIS) !== 0
    if ((value & OCW3_ESMM) !== 0) this.specialMask = (value & OCW3_SMM) !== 0
  }

  /** The first of the inputs by priority, counted from `top`; 8 when there is none. */
  #first(inputs: number): number {
    for (let priority = 0; priority < INPUTS; priority++) {
      if ((inputs & (1 << ((priority + this.top) % INPUTS))) !== 0) return priority
    }
    return INPUTS
  }

  get #flags(): number {
    const flags = [
      this.autoEoi,
      this.specialMask,
      this.specialFullyNested,
      this.#hasIcw4,
      this.#single,
      this.#readIsr,
      this.#poll,
    ]
    return flags.reduce((bits, flag, i) => bits | (Number(flag) << i), 0)
  }

  set #flags(bits: number) {
    const flag = (i: number) => (bits & (1 << i)) !== 0
    this.autoEoi = flag(0)
    this.specialMask = flag(1)
    this.specialFullyNested = flag(2)
    this.#hasIcw4 = flag(3)
    this.#single = flag(4)
    this.#readIsr = flag(5)
    this.#poll = flag(6)
  }
}

/** How to make a {@link Pic}. */
export interface PicOptions {
  /** INTR went up: the boot vCPU is to be interrupted. */
  onInterrupt(): void
}

/**
 * The two interrupt controllers of a PC, each an 8259A, the slave on input 2 of the master. Their INTR pin goes to the
 * boot vCPU, through LINT0 of its local APIC if it has one.
 */
export class Pic implements Device, ExternalInterrupts {
  readonly name = 'pic'
  readonly ports = PIC_PORTS
  readonly maxAccessSize = 1

  readonly #onInterrupt: () => void
  readonly #master = newMaster()
  readonly #slave = newSlave()
  #pending = false

  constructor({ onInterrupt }: PicOptions) {
    this.#onInterrupt = onInterrupt
  }

  /** Whether INTR is up. */
  get pending(): boolean {
    return this.#pending
  }

  /** Puts a level on IRQ 0 to 15; 2 is not an input of the pair. */
  setInput(irq: number, asserted: boolean): void {
    if (irq === CASCADE) return
    if (irq < INPUTS) this.#master.setInput(irq, asserted)
    else this.#slave.setInput(irq - INPUTS, asserted)
    this.#update()
  }

  /** INTA. @returns the vector */
  acknowledge(): number {
    const master = this.#master
    const input = this.#take(master)
    const chip = input === CASCADE ? this.#slave : master
    const request = chip === master ? input : this.#take(chip)
    this.#update()
    return chip.base + (request >= 0 ? request : SPURIOUS)
  }

  read(offset: number, _size: number, region: number): number {
    if (region === ELCR_REGION) return this.#chip(offset).elcr
    const chip = this.#chip(region)
    if (!chip.takePoll()) return chip.read(offset)
    const input = this.#take(chip)
    this.#update()
    return input >= 0 ? POLL_PENDING | input : 0
  }

  write(offset: number, value: number, _size: number, region: number): void {
    if (region === ELCR_REGION) this.#chip(offset).setElcr(value)
    else this.#chip(region).write(offset, value)
    this.#update()
  }

  saveState(): DeviceState {
    return { master: this.#master.save(), slave: this.#slave.save() }
  }

  restoreState(state: DeviceState): void {
    const { master, slave } = (state ?? {}) as { readonly [chip: string]: DeviceState }
    // Both are checked before either is taken.
    newMaster().restore('the master of pic', master ?? null)
    newSlave().restore('the slave of pic', slave ?? null)
    this.#master.restore(this.name, master!)
    this.#slave.restore(this.name, slave!)
    this.#update()
  }

  #chip(index: number): Chip {
    return index === 0 ? this.#master : this.#slave
  }

  /** A chip's INTA. @returns the input that is now in service; -1 for none */
  #take(chip: Chip): number {
    const input = chip.request
    if (input >= 0) chip.acknowledge(input)
    // INT falls with it, even if it rises again at once (automatic EOI): the master needs that edge.
    if (chip === this.#slave) this.#master.setInput(CASCADE, false)
    return input
  }

  #update(): void {
    this.#master.setInput(CASCADE, this.#slave.request >= 0)
    const pending = this.#master.request >= 0
    const rises = pending && !this.#pending
    this.#pending = pending
    if (rises) this.#onInterrupt()
  }
}

function newMaster(): Chip {
  return new Chip(1 << CASCADE, ELCR_MASKS[0])
}

function newSlave(): Chip {
  return new Chip(0, ELCR_MASKS[1])
}
