/** A line on which a device interrupts the guest. Neither method throws; a line that leads nowhere ignores both. */
export interface InterruptLine {
  /** Raises the line once: an edge. */
  trigger(): void
  /** Holds the line up, or lets it down: a level, for a device that interrupts until it was served. */
  setLevel(asserted: boolean): void
}

/** The line of a machine without an interrupt controller: it leads nowhere. */
export const unconnectedLine: InterruptLine = { trigger() {}, setLevel() {} }
