/** How long a queue is served without a look at anything else, in ms: others wait meanwhile. */
export const MAX_SERVICE = 1

/** What is left for another turn of the event loop: done once there, however often it is asked for before. */
export class LaterTurn {
  readonly #action: () => void
  #pending = false

  constructor(action: () => void) {
    this.#action = action
  }

  /** It was asked for, and has not been done. */
  get pending(): boolean {
    return this.#pending
  }

  schedule(): void {
    if (this.#pending) return
    this.#pending = true
    setImmediate(() => {
      this.#pending = false
      this.#action()
    })
  }
}
