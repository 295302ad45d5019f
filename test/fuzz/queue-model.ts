import { type Address, FuzzMemory } from './memory.js'

const DESC_F_NEXT = 1
const DESC_F_WRITE = 2
const DESC_F_INDIRECT = 4
const MAX_INDIRECT = 1024

/** A stretch of {@link FuzzMemory.expected}. */
export interface Stretch {
  readonly index: number
  readonly length: number
}

export interface ModelChain {
  readonly head: number
  readonly readable: readonly Stretch[]
  readonly writable: readonly Stretch[]
}

/** Where a queue is, as indices of {@link FuzzMemory.expected}. */
export interface ModelLayout {
  readonly size: number
  readonly descriptors: number
  readonly driver: number
  readonly device: number
}

/** What stands in the way of a chain. */
export class Malformed extends Error {}

/** What a device answers. */
export interface ModelDevice {
  /** @returns bytes written; undefined for later */
  handle(chain: ModelChain): number | undefined
  interrupt(): void
}

/**
 * A split queue as VIRTIO 1.2, 2.7 has it, written a second time: what a device does with it, in memory that
 * says what RAM has to be.
 */
export class ModelQueue {
  inFlight = 0
  readonly layout: ModelLayout
  readonly #memory: FuzzMemory
  readonly #eventIdx: boolean
  readonly #device: ModelDevice
  #nextAvail = 0
  #nextUsed = 0
  #signalled = 0
  #full = false

  constructor(memory: FuzzMemory, layout: ModelLayout, eventIdx: boolean, device: ModelDevice) {
    this.#memory = memory
    this.layout = layout
    this.#eventIdx = eventIdx
    this.#device = device
  }

  /** How many chains may still be made available. */
  get room(): number {
    return this.layout.size - ((this.#availIdx - this.#nextAvail) & 0xffff)
  }

  /** @throws Malformed */
  serve(): void {
    const { layout } = this
    do {
      if (!this.#eventIdx) this.#set16(layout.device, 1)
      while (this.inFlight < layout.size && this.#waiting() > 0) {
        const chain = this.#chain()
        this.#nextAvail = (this.#nextAvail + 1) & 0xffff
        this.inFlight++
        const written = this.#device.handle(chain)
        if (written !== undefined) this.#push(chain, written)
      }
      this.#notify()
      this.#full = this.inFlight >= layout.size
      if (this.#full) return
      if (this.#eventIdx) this.#set16(layout.device + 4 + 8 * layout.size, this.#nextAvail)
      else this.#set16(layout.device, 0)
    } while (this.#waiting() > 0)
  }

  /** A request that took longer is done. @returns whether the queue is to be served */
  finish(chain: ModelChain, written: number): boolean {
    this.#push(chain, written)
    this.#notify()
    return this.#full
  }

  get #availIdx(): number {
    return this.#get16(this.layout.driver + 2)
  }

  #waiting(): number {
    const waiting = (this.#availIdx - this.#nextAvail) & 0xffff
    if (waiting > this.layout.size) throw new Malformed('too many')
    return waiting
  }

  #push({ head }: ModelChain, written: number): void {
    const { device, size } = this.layout
    const { expected } = this.#memory
    const entry = device + 4 + 8 * (this.#nextUsed % size)
    expected.setUint32(entry, head, true)
    expected.setUint32(entry + 4, written, true)
    this.#nextUsed = (this.#nextUsed + 1) & 0xffff
    this.#set16(device + 2, this.#nextUsed)
    this.inFlight--
  }

  #notify(): void {
    const { driver, size } = this.layout
    let wanted = (this.#get16(driver) & 1) === 0
    if (this.#eventIdx) {
      const usedEvent = this.#get16(driver + 4 + 2 * size)
      wanted = false
      for (let at = this.#signalled; at !== this.#nextUsed; at = (at + 1) & 0xffff)
        wanted ||= at === usedEvent
    }
    if (wanted && this.#signalled !== this.#nextUsed) this.#device.interrupt()
    this.#signalled = this.#nextUsed
  }

  #chain(): ModelChain {
    const { driver, size, descriptors } = this.layout
    const head = this.#get16(driver + 4 + 2 * (this.#nextAvail % size))
    if (head >= size) throw new Malformed('head')
    const readable: Stretch[] = []
    const writable: Stretch[] = []
    let entry = this.#descriptor(descriptors + 16 * head)
    let seen = 1
    while ((entry.flags & DESC_F_INDIRECT) === 0) {
      addTo(readable, writable, entry)
      if ((entry.flags & DESC_F_NEXT) === 0) return { head, readable, writable }
      if (entry.next >= size) throw new Malformed('next')
      if (seen++ === size) throw new Malformed('cycle')
      entry = this.#descriptor(descriptors + 16 * entry.next)
    }
    const count = entry.length / 16
    if ((entry.flags & DESC_F_NEXT) !== 0 || !Number.isInteger(count)) throw new Malformed('indirect')
    const table = count < 1 || count > MAX_INDIRECT ? -1 : FuzzMemory.indexOf(entry.address, entry.length)
    if (table < 0) throw new Malformed('table')
    for (let at = 0, left = count; ; left--) {
      if (left === 0) throw new Malformed('cycle')
      const inner = this.#descriptor(table + 16 * at)
      if ((inner.flags & DESC_F_INDIRECT) !== 0) throw new Malformed('nested')
      addTo(readable, writable, inner)
      if ((inner.flags & DESC_F_NEXT) === 0) return { head, readable, writable }
      if (inner.next >= count) throw new Malformed('next')
      at = inner.next
    }
  }

  #descriptor(index: number) {
    const { expected } = this.#memory
    return {
      address: { low: expected.getUint32(index, true), high: expected.getUint32(index + 4, true) },
      length: expected.getUint32(index + 8, true),
      flags: this.#get16(index + 12),
      next: this.#get16(index + 14),
    }
  }

  #get16(index: number): number {
    return this.#memory.expected.getUint16(index, true)
  }

  #set16(index: number, value: number): void {
    this.#memory.expected.setUint16(index, value, true)
  }
}

function addTo(
  readable: Stretch[],
  writable: Stretch[],
  { address, length, flags }: { address: Address; length: number; flags: number },
): void {
  const isWritable = (flags & DESC_F_WRITE) !== 0
  if (!isWritable && writable.length > 0) throw new Malformed('order')
  if (length === 0) {
    // Nothing is there, so it may be anywhere below 2^53.
    if (address.high >= 2 ** 21) throw new Malformed('address')
    return
  }
  const index = FuzzMemory.indexOf(address, length)
  if (index < 0) throw new Malformed('address')
  const list = isWritable ? writable : readable
  list.push({ index, length })
}
