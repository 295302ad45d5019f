// LZMA2, as in the .xz format. LZMA: "LZMA specification", Igor Pavlov, https://7-zip.org/sdk.html. The chunks of
// LZMA2: https://github.com/tukaani-project/xz/blob/master/src/liblzma/lzma/lzma2_decoder.c

// Control bytes of chunks.
const CONTROL_END = 0x00
const CONTROL_COPY_RESET_DICTIONARY = 0x01
const CONTROL_COPY = 0x02
/** From here on: a chunk of LZMA. Bits 5 and 6 say what is reset before it, bits 0 to 4 are of its size. */
const CONTROL_LZMA = 0x80
const RESET_STATE = 1
const RESET_STATE_AND_PROPERTIES = 2
const RESET_ALL = 3

/** A probability is a number of this many bits. */
const PROBABILITY_BITS = 11
const PROBABILITY_HALF = 1 << (PROBABILITY_BITS - 1)
/** How quickly it follows what was seen. */
const ADAPTATION = 5
/** Below it, the range takes another byte. */
const RANGE_TOP = 2 ** 24

const STATES = 12
const FIRST_NON_LITERAL_STATE = 7
const MAX_POSITION_STATES = 16
const MIN_MATCH = 2
/** Lengths from here on share their distance slots. */
const LENGTH_STATES = 4
const DISTANCE_SLOTS = 64
/** From this slot on, a distance has its low bits from elsewhere … */
const FIRST_MODELED_SLOT = 4
/** … and from this on, some of them with no probability at all. */
const FIRST_DIRECT_SLOT = 14
const ALIGN_BITS = 4
const LITERAL_CODER = 0x300
/** `lc` + `lp` of LZMA2. */
const MAX_LITERAL_BITS = 4

// Where in the array of probabilities each group begins.
const IS_MATCH = 0
const IS_REP = IS_MATCH + STATES * MAX_POSITION_STATES
const IS_REP_G0 = IS_REP + STATES
const IS_REP_G1 = IS_REP_G0 + STATES
const IS_REP_G2 = IS_REP_G1 + STATES
const IS_REP0_LONG = IS_REP_G2 + STATES
const DISTANCE_SLOT = IS_REP0_LONG + STATES * MAX_POSITION_STATES
const DISTANCE_SPECIAL = DISTANCE_SLOT + LENGTH_STATES * DISTANCE_SLOTS
const DISTANCE_ALIGN = DISTANCE_SPECIAL + 128
const MATCH_LENGTH = DISTANCE_ALIGN + (1 << ALIGN_BITS)
// In a length coder: two choices, then lengths of 3 bits, again of 3 bits (both by position), and of 8.
const LENGTH_CHOICE_2 = 1
const LENGTH_LOW = 2
const LENGTH_MID = LENGTH_LOW + MAX_POSITION_STATES * 8
const LENGTH_HIGH = LENGTH_MID + MAX_POSITION_STATES * 8
const LENGTH_CODER = LENGTH_HIGH + 256
const REP_LENGTH = MATCH_LENGTH + LENGTH_CODER
const LITERAL = REP_LENGTH + LENGTH_CODER
const PROBABILITIES = LITERAL + (LITERAL_CODER << MAX_LITERAL_BITS)

/**
 * Unpacks LZMA2 into a buffer that holds all of it, and so is the dictionary, too.
 *
 * Errors are of class `Error`, and say why.
 */
export class Lzma2Decoder {
  readonly #input: Uint8Array
  readonly #output: Uint8Array
  readonly #probabilities = new Uint16Array(PROBABILITIES)
  #from: number
  #to: number
  /** Where the dictionary begins: no match does before it. -1 until there is one. */
  #dictionaryStart = -1
  #hasProperties = false
  #needsStateReset = true
  #range = 0
  #code = 0
  #state = 0
  #reps: [number, number, number, number] = [0, 0, 0, 0]
  #lc = 0
  #literalPositionMask = 0
  #positionMask = 0

  /**
   * @param from - where in `input` to begin
   * @param to - where in `output` to begin
   */
  constructor(input: Uint8Array, from: number, output: Uint8Array, to: number) {
    this.#input = input
    this.#output = output
    this.#from = from
    this.#to = to
  }

  /** Unpacks up to the end mark. */
  run(): { readonly inputEnd: number; readonly outputEnd: number } {
    for (;;) {
      const control = this.#nextByte()
      if (control === CONTROL_END) return { inputEnd: this.#from, outputEnd: this.#to }
      if (control >= CONTROL_LZMA) this.#unpackChunk(control)
      else if (control === CONTROL_COPY_RESET_DICTIONARY || control === CONTROL_COPY) this.#copyChunk(control)
      else throw new Error(`a chunk has the control byte ${control}`)
    }
  }

  #nextByte(): number {
    if (this.#from >= this.#input.length) throw new Error('it ends in the middle of a chunk')
    return this.#input[this.#from++]!
  }

  #nextUint16(): number {
    return (this.#nextByte() << 8) | this.#nextByte()
  }

  #checkOutput(size: number): void {
    if (size > this.#output.length - this.#to) throw new Error('it unpacks to more than its size')
    if (this.#dictionaryStart === -1) throw new Error('its first chunk does not begin a dictionary')
  }

  #copyChunk(control: number): void {
    const size = this.#nextUint16() + 1
    if (control === CONTROL_COPY_RESET_DICTIONARY) this.#resetDictionary()
    this.#checkOutput(size)
    if (size > this.#input.length - this.#from) throw new Error('it ends in the middle of a chunk')
    this.#output.set(this.#input.subarray(this.#from, this.#from + size), this.#to)
    this.#from += size
    this.#to += size
  }

  #resetDictionary(): void {
    this.#dictionaryStart = this.#to
    this.#needsStateReset = true
  }

  #unpackChunk(control: number): void {
    const size = (((control & 0x1f) << 16) | this.#nextUint16()) + 1
    const packedSize = this.#nextUint16() + 1
    const reset = (control >> 5) & 3
    if (reset === RESET_ALL) this.#resetDictionary()
    if (reset >= RESET_STATE_AND_PROPERTIES) this.#setProperties(this.#nextByte())
    if (reset >= RESET_STATE) this.#resetState()
    if (this.#needsStateReset || !this.#hasProperties) throw new Error('a chunk begins without a state')
    this.#checkOutput(size)
    const end = this.#from + packedSize
    if (end > this.#input.length) throw new Error('it ends in the middle of a chunk')

    this.#startRange()
    this.#unpackSymbols(this.#to + size)
    if (this.#from !== end || this.#code !== 0) throw new Error('a chunk does not end where it says')
  }

  /** `lc` + 9 × (`lp` + 5 × `pb`). */
  #setProperties(byte: number): void {
    const lc = byte % 9
    const lp = Math.floor(byte / 9) % 5
    const pb = Math.floor(byte / 45)
    if (pb > 4 || lc + lp > MAX_LITERAL_BITS) throw new Error(`a chunk has the properties ${byte}`)
    this.#lc = lc
    this.#literalPositionMask = (1 << lp) - 1
    this.#positionMask = (1 << pb) - 1
    this.#hasProperties = true
  }

  #resetState(): void {
    this.#probabilities.fill(PROBABILITY_HALF)
    this.#state = 0
    this.#reps = [0, 0, 0, 0]
    this.#needsStateReset = false
  }

  #startRange(): void {
    if (this.#nextByte() !== 0) throw new Error('a chunk does not begin with 0')
    this.#range = 0xffff_ffff
    this.#code = 0
    for (let count = 0; count < 4; count++) this.#code = ((this.#code << 8) | this.#nextByte()) >>> 0
  }

  /** Literals and matches, up to `end` of the output. */
  #unpackSymbols(end: number): void {
    const output = this.#output
    while (this.#to < end) {
      const positionState = (this.#to - this.#dictionaryStart) & this.#positionMask
      const state = this.#state
      if (this.#bit(IS_MATCH + state * MAX_POSITION_STATES + positionState) === 0) {
        output[this.#to] = this.#literal()
        this.#to++
        this.#state = state < 4 ? 0 : state < 10 ? state - 3 : state - 6
        continue
      }
      const length = this.#match(positionState)
      const distance = this.#reps[0] + 1
      if (distance > this.#to - this.#dictionaryStart) throw new Error('a match begins before its dictionary')
      if (length > end - this.#to) throw new Error('a match goes on behind its chunk')
      const stop = this.#to + length
      // What is copied may overlap with what it is copied to, and then repeats.
      for (let at = this.#to; at < stop; at++) output[at] = output[at - distance]!
      this.#to = stop
    }
    // The byte that the last symbol may have left to be taken.
    this.#normalize()
  }

  /** A bit by its probability, which it changes. */
  #bit(index: number): number {
    this.#normalize()
    const probability = this.#probabilities[index]!
    const bound = (this.#range >>> PROBABILITY_BITS) * probability
    if (this.#code < bound) {
      this.#range = bound
      this.#probabilities[index] = probability + (((1 << PROBABILITY_BITS) - probability) >> ADAPTATION)
      return 0
    }
    this.#range -= bound
    this.#code -= bound
    this.#probabilities[index] = probability - (probability >> ADAPTATION)
    return 1
  }

  #normalize(): void {
    if (this.#range >= RANGE_TOP) return
    this.#range = (this.#range << 8) >>> 0
    this.#code = ((this.#code << 8) | this.#nextByte()) >>> 0
  }

  /** Bits of a number, the highest first, by a tree of probabilities. */
  #tree(first: number, bits: number): number {
    let node = 1
    for (let count = 0; count < bits; count++) node = (node << 1) | this.#bit(first + node)
    return node - (1 << bits)
  }

  /** The same, the lowest first. */
  #reverseTree(first: number, bits: number): number {
    let node = 1
    let value = 0
    for (let count = 0; count < bits; count++) {
      const bit = this.#bit(first + node)
      node = (node << 1) | bit
      value |= bit << count
    }
    return value
  }

  /** Bits that are as likely 0 as 1. */
  #directBits(bits: number): number {
    let value = 0
    for (let count = 0; count < bits; count++) {
      this.#normalize()
      this.#range >>>= 1
      const isOne = this.#code >= this.#range
      if (isOne) this.#code -= this.#range
      value = ((value << 1) | (isOne ? 1 : 0)) >>> 0
    }
    return value
  }

  #literal(): number {
    const position = this.#to - this.#dictionaryStart
    const previous = position === 0 ? 0 : this.#output[this.#to - 1]!
    const coder = ((position & this.#literalPositionMask) << this.#lc) | (previous >> (8 - this.#lc))
    const first = LITERAL + LITERAL_CODER * coder
    let symbol = 1
    if (this.#state >= FIRST_NON_LITERAL_STATE) {
      // Behind a match: the byte that would have continued it says what is likely, while it is right.
      const distance = this.#reps[0] + 1
      if (distance > position) throw new Error('a match begins before its dictionary')
      let matched = this.#output[this.#to - distance]!
      while (symbol < 0x100) {
        const expected = (matched >> 7) & 1
        matched <<= 1
        const bit = this.#bit(first + ((1 + expected) << 8) + symbol)
        symbol = (symbol << 1) | bit
        if (bit !== expected) break
      }
    }
    while (symbol < 0x100) symbol = (symbol << 1) | this.#bit(first + symbol)
    return symbol & 0xff
  }

  /** A match: its distance becomes the first of the last distances. @returns its length */
  #match(positionState: number): number {
    const state = this.#state
    const afterLiteral = state < FIRST_NON_LITERAL_STATE
    if (this.#bit(IS_REP + state) === 0) {
      const length = this.#length(MATCH_LENGTH, positionState)
      const [rep0, rep1, rep2] = this.#reps
      this.#reps = [this.#distance(length), rep0, rep1, rep2]
      this.#state = afterLiteral ? 7 : 10
      return length
    }
    const [rep0, rep1, rep2, rep3] = this.#reps
    if (this.#bit(IS_REP_G0 + state) === 0) {
      if (this.#bit(IS_REP0_LONG + state * MAX_POSITION_STATES + positionState) === 0) {
        this.#state = afterLiteral ? 9 : 11
        return 1
      }
    } else if (this.#bit(IS_REP_G1 + state) === 0) this.#reps = [rep1, rep0, rep2, rep3]
    else if (this.#bit(IS_REP_G2 + state) === 0) this.#reps = [rep2, rep0, rep1, rep3]
    else this.#reps = [rep3, rep0, rep1, rep2]
    const length = this.#length(REP_LENGTH, positionState)
    this.#state = afterLiteral ? 8 : 11
    return length
  }

  #length(coder: number, positionState: number): number {
    if (this.#bit(coder) === 0) return MIN_MATCH + this.#tree(coder + LENGTH_LOW + positionState * 8, 3)
    if (this.#bit(coder + LENGTH_CHOICE_2) === 0) {
      return MIN_MATCH + 8 + this.#tree(coder + LENGTH_MID + positionState * 8, 3)
    }
    return MIN_MATCH + 16 + this.#tree(coder + LENGTH_HIGH, 8)
  }

  /** A distance, counted from 0. */
  #distance(length: number): number {
    const lengthState = Math.min(length - MIN_MATCH, LENGTH_STATES - 1)
    const slot = this.#tree(DISTANCE_SLOT + lengthState * DISTANCE_SLOTS, 6)
    if (slot < FIRST_MODELED_SLOT) return slot
    const bits = (slot >> 1) - 1
    const base = ((2 | (slot & 1)) << bits) >>> 0
    if (slot < FIRST_DIRECT_SLOT) return base + this.#reverseTree(DISTANCE_SPECIAL + base - slot, bits)
    const high = this.#directBits(bits - ALIGN_BITS) * (1 << ALIGN_BITS)
    return base + high + this.#reverseTree(DISTANCE_ALIGN, ALIGN_BITS)
  }
}
