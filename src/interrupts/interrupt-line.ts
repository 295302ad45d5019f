/** A line on which a device interrupts the guest. */
export interface InterruptLine {
  /** Raises the line once (an edge). Never throws; a line that leads nowhere ignores it. */
  trigger(): void
}

/** The line of a machine without an interrupt controller: it leads nowhere. */
export const unconnectedLine: InterruptLine = { trigger() {} }
