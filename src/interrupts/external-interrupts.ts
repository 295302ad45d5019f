/**
 * Where a vCPU takes interrupts from that do not come through its local APIC: the INTR pin. The machine asks between
 * exits and hands the vector to KVM (KVM_INTERRUPT).
 */
export interface ExternalInterrupts {
  /** Whether the pin is up. */
  readonly pending: boolean
  /** The vCPU takes the interrupt. @returns its vector */
  acknowledge(): number
}

const VECTORS = 256

/** Vectors that were asked for by number, first come, first served; one that waits already is not queued again. */
export class VectorQueue implements ExternalInterrupts {
  readonly #waiting = new Set<number>()

  get pending(): boolean {
    return this.#waiting.size > 0
  }

  acknowledge(): number {
    const [vector] = this.#waiting
    this.#waiting.delete(vector!)
    return vector!
  }

  /** The vectors, in their order. */
  get waiting(): readonly number[] {
    return [...this.#waiting]
  }

  clear(): void {
    this.#waiting.clear()
  }

  /** @param vector - 0 to 255 */
  push(vector: number): void {
    if (Number.isInteger(vector) && vector >= 0 && vector < VECTORS) this.#waiting.add(vector)
  }
}
