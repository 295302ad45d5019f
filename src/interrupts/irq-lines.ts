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
  /** Wires with an edge to give once the controllers are ready. */
  #deferred: Set<number> | undefined

  /** @param count - wires */
  constructor(count: number, sink: LineSink) {
    this.#sink = sink
    this.#holders = new Array<number>(count).fill(0)
  }

  /** How many wires there are. */
  get count(): number {
    return this.#holders.length
  }

  /** From now on edges wait: the controllers are about to be given another state, in which they would be lost. */
  deferEdges(): void {
    this.#deferred ??= new Set()
  }

  /** Gives the edges that have waited. */
  releaseEdges(): void {
    const deferred = this.#deferred ?? []
    this.#deferred = undefined
    for (const gsi of deferred) this.#pulse(gsi)
  }

  /** Another source on a wire. */
  line(gsi: number): InterruptLine {
    const holders = this.#holders
    const sink = this.#sink
    let held = false
    return {
      trigger: () => {
        if (this.#deferred === undefined) this.#pulse(gsi)
        else this.#deferred.add(gsi)
      },
      setLevel(asserted) {
        if (asserted === held) return
        held = asserted
        holders[gsi]! += asserted ? 1 : -1
        if (holders[gsi] === (asserted ? 1 : 0)) sink(gsi, asserted)
      },
    }
  }
  #pulse(gsi: number): void {
    // A wire that is up already has no edge to give.
    if (this.#holders[gsi] !== 0) return
    this.#sink(gsi, true)
    this.#sink(gsi, false)
  }
}
