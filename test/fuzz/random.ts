/** Numbers that follow from one word: an operation of a fuzz run is the same wherever in the run it is. */
export class Random {
  #state: number

  constructor(seed: number) {
    // Small seeds, and 0, need to be spread out first (the finaliser of MurmurHash3).
    let word = seed ^ 0x9e37_79b9
    word = Math.imul(word ^ (word >>> 16), 0x85eb_ca6b)
    word = Math.imul(word ^ (word >>> 13), 0xc2b2_ae35)
    this.#state = (word ^ (word >>> 16)) >>> 0 || 1
  }

  /** 32 bits: xorshift32 (Marsaglia, "Xorshift RNGs"). */
  word(): number {
    let state = this.#state
    state ^= state << 13
    state ^= state >>> 17
    state ^= state << 5
    this.#state = state >>> 0
    return this.#state
  }

  /** An integer from 0 to `count` - 1. */
  below(count: number): number {
    return this.word() % count
  }

  oneIn(count: number): boolean {
    return this.below(count) === 0
  }

  pick<T>(items: readonly T[]): T {
    return items[this.below(items.length)]!
  }

  bytes(length: number): Uint8Array {
    const bytes = new Uint8Array(length)
    for (let at = 0; at < length; at++) bytes[at] = this.word()
    return bytes
  }
}
