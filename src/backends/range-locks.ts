interface Lock {
  readonly first: number
  readonly end: number
  readonly released: Promise<void>
}

/** Locks on ranges of numbers, given in the order in which they are asked for where they overlap. */
export class RangeLocks {
  readonly #locks = new Set<Lock>()

  /** Waits for those that overlap it. @returns what releases it */
  async acquire(first: number, end: number): Promise<() => void> {
    const before: Promise<void>[] = []
    for (const lock of this.#locks) if (lock.first < end && first < lock.end) before.push(lock.released)
    let release!: () => void
    const released = new Promise<void>((resolve) => {
      release = resolve
    })
    const lock: Lock = { first, end, released }
    this.#locks.add(lock)
    await Promise.all(before)
    return () => {
      this.#locks.delete(lock)
      release()
    }
  }
}
