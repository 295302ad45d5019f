import { hex } from '../errors.js'
import type { GuestMemory } from '../memory/guest-memory.js'
import { DescriptorChain, type GuestBuffer } from './descriptor-chain.js'

// VIRTIO 1.2, 2.7.5: struct virtq_desc { le64 addr; le32 len; le16 flags; le16 next; }
const VIRTQ_DESC_SIZE = 16
const DESC_LENGTH = 8
const DESC_FLAGS = 12
const DESC_NEXT = 14
const VIRTQ_DESC_F_NEXT = 1
const VIRTQ_DESC_F_WRITE = 2
const VIRTQ_DESC_F_INDIRECT = 4

// 2.7.6: struct virtq_avail { le16 flags; le16 idx; le16 ring[]; le16 used_event; }, in 16-bit words
const AVAIL_FLAGS = 0
const AVAIL_IDX = 1
const AVAIL_RING = 2
const VIRTQ_AVAIL_F_NO_INTERRUPT = 1

// 2.7.8: struct virtq_used { le16 flags; le16 idx; struct { le32 id; le32 len; } ring[]; le16 avail_event; }
const USED_FLAGS = 0
const USED_IDX = 1
/** In 32-bit words, of which flags and idx are one. */
const USED_RING = 1
const VIRTQ_USED_F_NO_NOTIFY = 1

/** The most descriptors a queue can have (2.7). */
export const MAX_QUEUE_SIZE = 32768
/** Alignment of the parts of a queue, in bytes (2.7). */
const DESC_ALIGNMENT = 16
const AVAIL_ALIGNMENT = 2
const USED_ALIGNMENT = 4

/**
 * The most descriptors in an indirect table. The specification has the queue's size (2.7.5.3.1), but Linux makes longer
 * ones in small queues; this is QEMU's limit.
 */
const MAX_INDIRECT = 1024

/** Where the driver put a queue, as guest-physical addresses. */
export interface QueueLayout {
  /** Number of descriptors: a power of two. */
  readonly size: number
  /** The Descriptor Area: the table. */
  readonly descriptors: number
  /** The Driver Area: the available ring. */
  readonly driver: number
  /** The Device Area: the used ring. */
  readonly device: number
}

/** Descriptor table, available ring and used ring of a queue, with their bytes and alignment (2.7). */
export function queueParts({ size, descriptors, driver, device }: QueueLayout) {
  return [
    { address: descriptors, length: VIRTQ_DESC_SIZE * size, alignment: DESC_ALIGNMENT },
    { address: driver, length: 6 + 2 * size, alignment: AVAIL_ALIGNMENT },
    { address: device, length: 6 + 8 * size, alignment: USED_ALIGNMENT },
  ] as const
}

/** The driver broke a rule of queues; `message` is a clause that says which. */
export class VirtqueueError extends Error {}

/** What of a queue is not in guest memory. */
export interface VirtqueueState {
  /** Index of the next entry of the available ring. */
  readonly nextAvail: number
  /** Index of the next entry of the used ring. */
  readonly nextUsed: number
}

/**
 * The device's side of a split virtqueue (VIRTIO 1.2, 2.7).
 *
 * Guest and device look at the rings at the same time: indices and flags are read and written by `Atomics`, which also
 * keep what is written before them, before them.
 */
export class Virtqueue {
  /** Which of the device's queues it is. */
  readonly index: number
  /** Number of descriptors. */
  readonly size: number
  readonly #memory: GuestMemory
  readonly #eventIdx: boolean
  readonly #descriptors: DataView
  readonly #avail: Uint16Array
  readonly #used: Uint16Array
  readonly #usedRing: Uint32Array
  readonly #interrupt: () => void
  #nextAvail: number
  #nextUsed: number
  /** `nextUsed` when the driver was last interrupted, or decided not to be. */
  #signalledUsed: number
  #inFlight = 0
  #dead = false

  /**
   * @param layout - checked: parts that are aligned, and each in one stretch of RAM
   * @param eventIdx - VIRTIO_F_EVENT_IDX was negotiated
   * @param interrupt - sends a used buffer notification
   */
  constructor(
    memory: GuestMemory,
    index: number,
    layout: QueueLayout,
    eventIdx: boolean,
    interrupt: () => void,
    state: VirtqueueState = { nextAvail: 0, nextUsed: 0 },
  ) {
    const [descriptors, driver, device] = queueParts(layout)
    const bytes = ({ address, length }: { address: number; length: number }) => memory.view(address, length)
    const table = bytes(descriptors)
    const avail = bytes(driver)
    const used = bytes(device)
    this.#memory = memory
    this.index = index
    this.size = layout.size
    this.#eventIdx = eventIdx
    this.#interrupt = interrupt
    this.#descriptors = new DataView(table.buffer, table.byteOffset, table.length)
    this.#avail = new Uint16Array(avail.buffer, avail.byteOffset, avail.length / 2)
    this.#used = new Uint16Array(used.buffer, used.byteOffset, used.length / 2)
    this.#usedRing = new Uint32Array(used.buffer, used.byteOffset, USED_RING + 2 * layout.size)
    this.#nextAvail = state.nextAvail
    this.#nextUsed = state.nextUsed
    this.#signalledUsed = state.nextUsed
  }

  /** Chains that were taken and not given back. */
  get inFlight(): number {
    return this.#inFlight
  }

  /** The driver has reset the device, or the machine is closed: no chain comes, and what is given back goes nowhere. */
  get dead(): boolean {
    // Views are empty once the machine is closed.
    return this.#dead || this.#avail.length === 0
  }

  /** See {@link dead}. @internal */
  kill(): void {
    this.#dead = true
  }

  /** @internal */
  get state(): VirtqueueState {
    return { nextAvail: this.#nextAvail, nextUsed: this.#nextUsed }
  }

  /**
   * Takes the next chain that the driver made available, if there is one. Each is to be given back with {@link push}.
   *
   * No more than {@link size} chains are out at a time, whatever the driver says.
   *
   * @throws VirtqueueError for a malformed chain; the queue is of no use any more
   */
  pop(): DescriptorChain | undefined {
    if (this.dead || this.#inFlight >= this.size || this.#waiting() === 0) return undefined
    const head = this.#avail[AVAIL_RING + (this.#nextAvail & (this.size - 1))]!
    if (head >= this.size) {
      throw new VirtqueueError(`chain ${head} was made available in a queue of ${this.size} descriptors`)
    }
    const chain = this.#chain(head)
    this.#nextAvail = (this.#nextAvail + 1) & 0xffff
    this.#inFlight++
    return chain
  }

  /** Puts a chain that was taken back: it comes again with the next {@link pop}. Only the last one can be. */
  unpop(): void {
    this.#nextAvail = (this.#nextAvail - 1) & 0xffff
    this.#inFlight--
  }

  /**
   * Gives a chain back to the driver, which is told of it by {@link notify}.
   *
   * @param written - bytes written into its writable part
   */
  push(chain: DescriptorChain, written: number): void {
    this.#inFlight--
    if (this.dead) return
    const slot = USED_RING + 2 * (this.#nextUsed & (this.size - 1))
    this.#usedRing[slot] = chain.head
    this.#usedRing[slot + 1] = written
    this.#nextUsed = (this.#nextUsed + 1) & 0xffff
    // After the entry, and before what notify() reads: the driver writes and reads these two the other way round.
    Atomics.store(this.#used, USED_IDX, this.#nextUsed)
  }

  /** Interrupts the driver if it wants to know of what was pushed since the last time (2.7.10). */
  notify(): void {
    const from = this.#signalledUsed
    const to = this.#nextUsed
    if (from === to || this.dead) return
    this.#signalledUsed = to
    if (this.#eventIdx) {
      const usedEvent = Atomics.load(this.#avail, AVAIL_RING + this.size)
      // vring_need_event: `used_event` is one of the entries between (2.7.10.1).
      if (((to - usedEvent - 1) & 0xffff) >= ((to - from) & 0xffff)) return
    } else if ((Atomics.load(this.#avail, AVAIL_FLAGS) & VIRTQ_AVAIL_F_NO_INTERRUPT) !== 0) return
    this.#interrupt()
  }

  /** The device looks by itself for now: notifications would only cost an exit each (2.7.10). */
  suppressNotifications(): void {
    if (!this.dead && !this.#eventIdx) Atomics.store(this.#used, USED_FLAGS, VIRTQ_USED_F_NO_NOTIFY)
  }

  /**
   * The device wants to be told of the next chain.
   *
   * @returns false if there is one already, of which it may not be told
   * @throws VirtqueueError
   */
  wantNotifications(): boolean {
    if (this.dead) return true
    if (this.#eventIdx) Atomics.store(this.#used, 2 * (USED_RING + 2 * this.size), this.#nextAvail)
    else Atomics.store(this.#used, USED_FLAGS, 0)
    return this.#waiting() === 0
  }

  /** How many chains the driver has made available that were not taken. */
  #waiting(): number {
    const waiting = (Atomics.load(this.#avail, AVAIL_IDX) - this.#nextAvail) & 0xffff
    if (waiting > this.size) {
      throw new VirtqueueError(`${waiting} chains were made available in a queue of ${this.size} descriptors`)
    }
    return waiting
  }

  #chain(head: number): DescriptorChain {
    const readable: GuestBuffer[] = []
    const writable: GuestBuffer[] = []
    let table = this.#descriptors
    let size = this.size
    let indirect = false
    let at = head
    for (let left = size; left > 0; left--) {
      const offset = at * VIRTQ_DESC_SIZE
      // Each field is read once.
      const address = table.getUint32(offset, true) + table.getUint32(offset + 4, true) * 2 ** 32
      const length = table.getUint32(offset + DESC_LENGTH, true)
      const flags = table.getUint16(offset + DESC_FLAGS, true)
      const next = table.getUint16(offset + DESC_NEXT, true)
      if ((flags & VIRTQ_DESC_F_INDIRECT) !== 0) {
        if (indirect) throw new VirtqueueError('an indirect table has an indirect descriptor')
        if ((flags & VIRTQ_DESC_F_NEXT) !== 0)
          throw new VirtqueueError('an indirect descriptor has a next one')
        size = length / VIRTQ_DESC_SIZE
        if (!Number.isInteger(size) || size < 1 || size > MAX_INDIRECT) {
          throw new VirtqueueError(`an indirect table has ${length} bytes`)
        }
        const bytes = this.#indirectTable(address, length)
        table = new DataView(bytes.buffer, bytes.byteOffset, bytes.length)
        indirect = true
        at = 0
        left = size + 1
        continue
      }
      const isWritable = (flags & VIRTQ_DESC_F_WRITE) !== 0
      if (!isWritable && writable.length > 0) {
        throw new VirtqueueError('a chain has something to be read behind something to be written')
      }
      if (!this.#memory.contains(address, length)) {
        throw new VirtqueueError(`a descriptor has ${length} bytes at ${hex(address)}, which is not all RAM`)
      }
      if (length > 0) (isWritable ? writable : readable).push({ address, length })
      if ((flags & VIRTQ_DESC_F_NEXT) === 0)
        return new DescriptorChain(this.#memory, head, readable, writable)
      if (next >= size) throw new VirtqueueError(`a descriptor is followed by number ${next} of ${size}`)
      at = next
    }
    throw new VirtqueueError('a chain is longer than its table, so it has no end')
  }

  /** A copy: the guest may change it while it is read. */
  #indirectTable(address: number, length: number): Uint8Array {
    if (!this.#memory.contains(address, length)) {
      throw new VirtqueueError(`an indirect table of ${length} bytes at ${hex(address)} is not all in RAM`)
    }
    return this.#memory.read(address, length)
  }
}
