import type { InterruptLine } from './interrupt-line.js'

/** Puts a level on an input of the interrupt controllers. */
export type LineSink = (gsi: number, asserted: boolean) => void

/**
 * The wires between devices and interrupt controllers, by global system interrupt (ACPI 6.5, 5.2.13). A wire that
 * several devices share is up as long as one of them holds it up.
 */
export class IrqLines {
  readonly #sink: LineSink
  /** How many sources hold each wire up. */
  readonly #holders: number[]

  /** @param count - wires */
  constructor(count: number, sink: LineSink) {
    this.#sink = sink
    this.#holders = new Array<number>(count).fill(0)
  }

  /** How many wires there are. */
  get count(): number {
    return this.#holders.length
  }

  /** Another source on a wire. */
  line(gsi: number): InterruptLine {
    const holders = this.#holders
    const sink = this.#sink
    let held = false
    return {
      trigger() {
        // A wire that is up already has no edge to give.
        if (holders[gsi] !== 0) return
        sink(gsi, true)
        sink(gsi, false)
      },
      setLevel(asserted) {
        if (asserted === held) return
        held = asserted
        holders[gsi]! += asserted ? 1 : -1
        if (holders[gsi] === (asserted ? 1 : 0)) sink(gsi, asserted)
      },
    }
  }
}
