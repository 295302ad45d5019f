/** The first look, in ms after the start … */
const FIRST_DELAY = 1
/** … and the longest time between two. */
const MAX_DELAY = 1000

/**
 * Notices that a machine has ended its work with `cli; hlt`. With a local APIC in KVM that makes no exit: KVM waits for
 * what will never come. So now and then all vCPUs are taken out of the guest and looked at: soon after the start, where
 * small kernels end, then less and less often.
 */
export class HaltWatch {
  readonly #begin: () => void
  #delay = FIRST_DELAY
  #timer: NodeJS.Timeout | undefined
  #checking = false

  /** @param begin - takes the vCPUs out of the guest */
  constructor(begin: () => void) {
    this.#begin = begin
  }

  /** Whether vCPUs are to leave the guest to be looked at. */
  get checking(): boolean {
    return this.#checking
  }

  /** The vCPUs run, or run again. */
  start(): void {
    this.#timer = setTimeout(() => {
      this.#checking = true
      this.#begin()
    }, this.#delay)
  }

  /** They have not ended: the next look is later. */
  again(): void {
    this.#checking = false
    this.#delay = Math.min(2 * this.#delay, MAX_DELAY)
    this.start()
  }

  stop(): void {
    clearTimeout(this.#timer)
    this.#checking = false
  }
}
