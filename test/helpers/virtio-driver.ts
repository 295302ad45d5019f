/**
 * A virtio driver for tests: what a guest's driver does, through the registers of virtio-mmio and rings in
 * memory, over plain buffers instead of a machine. It keeps to the rules (VIRTIO 1.2, 2.7 and 3.1.1) unless a
 * test breaks them.
 */

import type { AccessSize, DeviceState, Doorbell } from '../../src/bus/device.js'
import { GuestMemory } from '../../src/memory/guest-memory.js'
import { VIRTIO_F_EVENT_IDX } from '../../src/virtio/features.js'
import type { VirtioDevice } from '../../src/virtio/virtio-device.js'
import { VirtioMmio } from '../../src/virtio/virtio-mmio.js'
import { type QueueLayout, queueParts } from '../../src/virtio/virtqueue.js'
import { CountingLine, FakeClock } from '../devices/guest.js'

/** VIRTIO 1.2, 4.2.2: offsets of the registers. */
export const REGISTERS = {
  MagicValue: 0x000,
  Version: 0x004,
  DeviceID: 0x008,
  VendorID: 0x00c,
  DeviceFeatures: 0x010,
  DeviceFeaturesSel: 0x014,
  DriverFeatures: 0x020,
  DriverFeaturesSel: 0x024,
  QueueSel: 0x030,
  QueueNumMax: 0x034,
  QueueNum: 0x038,
  QueueReady: 0x044,
  QueueNotify: 0x050,
  InterruptStatus: 0x060,
  InterruptACK: 0x064,
  Status: 0x070,
  QueueDescLow: 0x080,
  QueueDescHigh: 0x084,
  QueueDriverLow: 0x090,
  QueueDriverHigh: 0x094,
  QueueDeviceLow: 0x0a0,
  QueueDeviceHigh: 0x0a4,
  SHMSel: 0x0ac,
  SHMLenLow: 0x0b0,
  SHMLenHigh: 0x0b4,
  SHMBaseLow: 0x0b8,
  SHMBaseHigh: 0x0bc,
  ConfigGeneration: 0x0fc,
  Config: 0x100,
} as const

/** 2.1: the status field. */
export const STATUS = {
  ACKNOWLEDGE: 1,
  DRIVER: 2,
  DRIVER_OK: 4,
  FEATURES_OK: 8,
  DEVICE_NEEDS_RESET: 64,
  FAILED: 128,
} as const

/** 2.7.5: flags of a descriptor. */
export const VIRTQ_DESC_F_NEXT = 1
export const VIRTQ_DESC_F_WRITE = 2
export const VIRTQ_DESC_F_INDIRECT = 4

const MIB = 2 ** 20
const DESCRIPTOR_SIZE = 16
const DEFAULT_QUEUE_SIZE = 64
/** Turns of the event loop in which a device has to be done: some seconds. */
const MAX_TURNS = 1_000_000
/** Of the queues' rings, and behind them of what is in the requests. */
const RINGS_START = 0x1000

/**
 * RAM of a guest that has seen every edge: 1 MiB from 0, 1 MiB behind it in a buffer of its own, a hole, and
 * 1 MiB from 4 GiB on. The buffers are detached by `close()`.
 */
export function memoryWithEdges(): GuestMemory {
  const regions = [0, MIB, 2 ** 32].map((start) => ({ start, buffer: new ArrayBuffer(MIB) }))
  return new GuestMemory(regions, () => {
    structuredClone(null, { transfer: regions.map(({ buffer }) => buffer) })
  })
}

/** Waits, one turn of the event loop after the other, for what does not depend on time. */
export async function eventually(
  condition: () => boolean,
  what = 'what was waited for',
  turns = MAX_TURNS,
): Promise<void> {
  for (let turn = 0; turn < turns; turn++) {
    if (condition()) return
    await new Promise(setImmediate)
  }
  throw new Error(`Expected ${what} within ${turns} turns of the event loop`)
}

/** A part of a request: bytes for the device, or room (`length`) for what the device writes. */
export type RequestPart =
  | { readonly bytes: Uint8Array; readonly address?: number }
  | { readonly length: number; readonly address?: number }

/** A descriptor, in full. */
export interface Descriptor {
  readonly address: number | bigint
  readonly length: number
  readonly flags?: number
  readonly next?: number
}

export interface AddOptions {
  /** Through a table of descriptors; `true` for all, a number for all but so many before it. */
  readonly indirect?: boolean | number
}

/** A chain as it is in the table. */
interface PendingChain {
  readonly descriptors: readonly number[]
  readonly writable: readonly { readonly address: number; readonly length: number }[]
}

/** A chain that the device is done with. */
export interface UsedChain {
  readonly head: number
  /** What the device says that it wrote, in bytes. */
  readonly length: number
  /** What is in the request's writable part, buffer by buffer, written or not. */
  readonly buffers: readonly Uint8Array[]
  /** The first `length` bytes of that, as one. */
  readonly data: Uint8Array
}

/** What {@link VirtioDriver.skipTo} knows of the transport's state. */
interface SavedState {
  readonly function: { readonly queues: readonly { nextAvail: number; nextUsed: number }[] }
}

/** The driver's side of one queue. */
export class DriverQueue {
  readonly index: number
  readonly layout: QueueLayout
  /** Of the next chain in the available ring; what the device sees of it is in memory. */
  nextAvail = 0
  /** Of the next chain in the used ring. */
  nextUsed = 0
  readonly #driver: VirtioDriver
  readonly #free: number[]
  readonly #pending = new Map<number, PendingChain>()
  /** `nextAvail` at the last kick. */
  #kicked = 0

  constructor(driver: VirtioDriver, index: number, layout: QueueLayout) {
    this.#driver = driver
    this.index = index
    this.layout = layout
    this.#free = Array.from({ length: layout.size }, (_, i) => i)
    for (const { address, length } of queueParts(layout)) driver.memory.fill(address, length)
  }

  /** Chains that the device has, or is to get. */
  get inFlight(): number {
    return this.#pending.size
  }

  /** Descriptors that no chain uses. */
  get freeDescriptors(): number {
    return this.#free.length
  }

  // 2.7.6 and 2.7.8: the fields of the rings. The device's own are to be changed by hostile drivers only.

  get availFlags(): number {
    return this.#driver.memory.readUint16(this.layout.driver)
  }
  /** 1 is VIRTQ_AVAIL_F_NO_INTERRUPT. */
  set availFlags(value: number) {
    this.#driver.memory.writeUint16(this.layout.driver, value)
  }
  get availIdx(): number {
    return this.#driver.memory.readUint16(this.layout.driver + 2)
  }
  set availIdx(value: number) {
    this.#driver.memory.writeUint16(this.layout.driver + 2, value & 0xffff)
  }
  get usedEvent(): number {
    return this.#driver.memory.readUint16(this.layout.driver + 4 + 2 * this.layout.size)
  }
  /** The device interrupts when it has used the entry with this index (VIRTIO_F_EVENT_IDX). */
  set usedEvent(value: number) {
    this.#driver.memory.writeUint16(this.layout.driver + 4 + 2 * this.layout.size, value & 0xffff)
  }
  /** 1 is VIRTQ_USED_F_NO_NOTIFY. */
  get usedFlags(): number {
    return this.#driver.memory.readUint16(this.layout.device)
  }
  get usedIdx(): number {
    return this.#driver.memory.readUint16(this.layout.device + 2)
  }
  get availEvent(): number {
    return this.#driver.memory.readUint16(this.layout.device + 4 + 8 * this.layout.size)
  }

  /** An entry of the used ring, whether or not it is one already. */
  usedEntry(slot: number): { id: number; length: number } {
    const at = this.layout.device + 4 + 8 * (slot & (this.layout.size - 1))
    return { id: this.#driver.memory.readUint32(at), length: this.#driver.memory.readUint32(at + 4) }
  }

  /** The driver's part of {@link VirtioDriver.skipTo}. */
  skipTo(index: number): void {
    this.availIdx = index
    this.usedEvent = index
    this.#driver.memory.writeUint16(this.layout.device + 2, index)
    this.nextAvail = index
    this.nextUsed = index
    this.#kicked = index
  }

  writeDescriptor(index: number, descriptor: Descriptor): void {
    this.#driver.memory.write(this.layout.descriptors + DESCRIPTOR_SIZE * index, encode([descriptor]))
  }

  /** Makes a chain available that starts at `head`, whatever that is. */
  makeAvailable(head: number): void {
    const slot = this.nextAvail & (this.layout.size - 1)
    this.#driver.memory.writeUint16(this.layout.driver + 4 + 2 * slot, head)
    this.nextAvail = (this.nextAvail + 1) & 0xffff
    this.availIdx = this.nextAvail
  }

  /** Writes a chain of descriptors as they are given, from descriptor `head` on, and makes it available. */
  addRaw(descriptors: readonly Descriptor[], head = 0): void {
    descriptors.forEach((descriptor, i) => {
      this.writeDescriptor(head + i, descriptor)
    })
    this.makeAvailable(head)
  }

  /** Makes a request available to the device, which {@link kick} tells of it. @returns its head */
  add(parts: readonly RequestPart[], { indirect = false }: AddOptions = {}): number {
    const buffers = parts.map((part) => {
      const writable = !('bytes' in part)
      const length = writable ? part.length : part.bytes.length
      const address = part.address ?? this.#driver.allocate(length)
      if (!writable) this.#driver.memory.write(address, part.bytes)
      return { address, length, flags: writable ? VIRTQ_DESC_F_WRITE : 0 }
    })
    const direct = indirect === true ? 0 : indirect === false ? buffers.length : indirect
    const chain: Descriptor[] = buffers.slice(0, direct)
    if (direct < buffers.length) {
      const table = encode(linked(buffers.slice(direct), 0))
      const address = this.#driver.allocate(table.length, DESCRIPTOR_SIZE)
      this.#driver.memory.write(address, table)
      chain.push({ address, length: table.length, flags: VIRTQ_DESC_F_INDIRECT })
    }
    if (chain.length > this.#free.length) {
      throw new Error(`Expected ${chain.length} free descriptors but there are ${this.#free.length}`)
    }
    const indices = this.#free.splice(0, chain.length)
    chain.forEach(({ flags = 0, ...descriptor }, i) => {
      const next = indices[i + 1]
      this.writeDescriptor(
        indices[i]!,
        next === undefined
          ? { ...descriptor, flags }
          : { ...descriptor, flags: flags | VIRTQ_DESC_F_NEXT, next },
      )
    })
    const head = indices[0]!
    this.#pending.set(head, {
      descriptors: indices,
      writable: buffers.filter(({ flags }) => flags === VIRTQ_DESC_F_WRITE),
    })
    this.makeAvailable(head)
    return head
  }

  /** Whether the device wants to know of what was added since the last kick (2.7.10). */
  get wantsKick(): boolean {
    if (this.#kicked === this.nextAvail) return false
    if ((this.#driver.features & VIRTIO_F_EVENT_IDX) === 0n) return (this.usedFlags & 1) === 0
    return ((this.nextAvail - this.availEvent - 1) & 0xffff) < ((this.nextAvail - this.#kicked) & 0xffff)
  }

  /** Tells the device of what was added, if it wants to know. @returns whether it did */
  kick(): boolean {
    const wanted = this.wantsKick
    this.#kicked = this.nextAvail
    if (wanted) this.#driver.notify(this.index)
    return wanted
  }

  /** What the device has used since the last call, in its order. Their descriptors are free again. */
  used(): UsedChain[] {
    const chains: UsedChain[] = []
    for (; this.nextUsed !== this.usedIdx; this.nextUsed = (this.nextUsed + 1) & 0xffff) {
      const { id, length } = this.usedEntry(this.nextUsed)
      const chain = this.#pending.get(id)
      if (chain === undefined) throw new Error(`Expected a chain under way to be used but it was ${id}`)
      this.#pending.delete(id)
      this.#free.push(...chain.descriptors)
      const buffers = chain.writable.map(({ address, length }) => this.#driver.memory.read(address, length))
      chains.push({ head: id, length, buffers, data: Buffer.concat(buffers).subarray(0, length) })
    }
    // With VIRTIO_F_EVENT_IDX, otherwise nobody looks at it: an interrupt for the next one.
    if (chains.length > 0) this.usedEvent = this.nextUsed
    this.#driver.releaseUnused()
    return chains
  }

  /** Waits until all that was added is used. @returns what was, since the last call of {@link used} */
  async settled(): Promise<UsedChain[]> {
    const chains: UsedChain[] = []
    await eventually(() => {
      chains.push(...this.used())
      return this.inFlight === 0
    }, `${this.inFlight} chains of queue ${this.index} to be used`)
    return chains
  }
}

export interface VirtioDriverOptions {
  readonly memory?: GuestMemory
  /** Where `allocate` takes memory from. Bytes 0x1000 to 0x100000 unless given. */
  readonly heap?: { readonly start: number; readonly end: number }
  readonly irq?: number
  /** An edge on the interrupt line. */
  onInterrupt?(): void
}

export interface InitializeOptions {
  /** What is negotiated: exactly these bits. All that is offered, unless given. */
  readonly features?: bigint
  /** Descriptors of each queue; as many as it can have but no more than 64, unless given. 0 leaves it out. */
  readonly sizes?: readonly number[]
  /** False stops before DRIVER_OK: for tests of what comes before it. */
  readonly driverOk?: boolean
}

/** A driver, and all that a device sees of a machine. */
export class VirtioDriver {
  readonly transport: VirtioMmio
  readonly memory: GuestMemory
  readonly clock = new FakeClock()
  readonly line = new CountingLine()
  /** What stopped the machine. */
  readonly failures: unknown[] = []
  /** How often the device ended the run with reason `stopped`. */
  stops = 0
  /** Those that are registered at the moment. */
  readonly doorbells: (Doorbell & { readonly ring: () => void })[] = []
  /** Notifications come by the doorbell, where there is one, and not by the register. */
  useDoorbells = false
  readonly queues: (DriverQueue | undefined)[] = []
  /** What was negotiated. */
  features = 0n
  readonly #heap: { readonly start: number; readonly end: number }
  #ringsEnd: number
  #allocated: number

  constructor(
    device: VirtioDevice,
    {
      memory = memoryWithEdges(),
      heap = { start: RINGS_START, end: MIB },
      irq = 5,
      onInterrupt,
    }: VirtioDriverOptions = {},
  ) {
    this.memory = memory
    this.#heap = heap
    this.#ringsEnd = heap.start
    this.#allocated = heap.start
    this.transport = new VirtioMmio(device, 0xd000_0000, irq)
    const { line } = this
    this.transport.attach({
      memory,
      clock: this.clock,
      interrupt: {
        trigger() {
          line.trigger()
          onInterrupt?.()
        },
        setLevel: (asserted) => line.setLevel(asserted),
      },
      doorbell: (doorbell, ring) => {
        const entry = { ...doorbell, ring }
        this.doorbells.push(entry)
        return () => {
          const at = this.doorbells.indexOf(entry)
          if (at < 0) throw new Error('Expected a doorbell to be given back once')
          this.doorbells.splice(at, 1)
        }
      },
      yield() {},
      stop: () => {
        this.stops++
      },
      fail: (error) => {
        this.failures.push(error)
      },
    })
  }

  /** Edges on the interrupt line so far. */
  get interrupts(): number {
    return this.line.count
  }

  read(offset: number, size: AccessSize = 4): number {
    return this.transport.read(offset, size)
  }

  write(offset: number, value: number, size: AccessSize = 4): void {
    this.transport.write(offset, value, size)
  }

  get status(): number {
    return this.read(REGISTERS.Status)
  }
  set status(value: number) {
    this.write(REGISTERS.Status, value)
  }

  get interruptStatus(): number {
    return this.read(REGISTERS.InterruptStatus)
  }

  /** What an interrupt handler does first. @returns why it was called */
  acknowledge(): number {
    const status = this.interruptStatus
    this.write(REGISTERS.InterruptACK, status)
    return status
  }

  /** What the device offers: 128 bits. */
  get offered(): bigint {
    let features = 0n
    for (let select = 3; select >= 0; select--) {
      this.write(REGISTERS.DeviceFeaturesSel, select)
      features = (features << 32n) | BigInt(this.read(REGISTERS.DeviceFeatures))
    }
    return features
  }

  /** The driver's first steps, up to FEATURES_OK, whether or not the device accepts it (3.1.1, 1 to 5). */
  negotiate(features = this.offered): void {
    this.status = STATUS.ACKNOWLEDGE
    this.status = STATUS.ACKNOWLEDGE | STATUS.DRIVER
    for (let select = 0; select < 4; select++) {
      this.write(REGISTERS.DriverFeaturesSel, select)
      this.write(REGISTERS.DriverFeatures, Number((features >> BigInt(32 * select)) & 0xffff_ffffn))
    }
    this.features = features
    this.status = STATUS.ACKNOWLEDGE | STATUS.DRIVER | STATUS.FEATURES_OK
  }

  /** Resets the device and makes it ready, with all its queues (3.1.1). */
  initialize({ features, sizes, driverOk = true }: InitializeOptions = {}): this {
    this.status = 0
    if (this.status !== 0) throw new Error('Expected a device that is reset at once: await reset() first')
    this.#forget()
    this.negotiate(features)
    if ((this.status & STATUS.FEATURES_OK) === 0) throw new Error('Expected the device to accept features')
    for (let index = 0; ; index++) {
      const max = this.queueMax(index)
      if (max === 0) break
      const size = sizes?.[index] ?? Math.min(max, DEFAULT_QUEUE_SIZE)
      if (size > 0) this.setupQueue(index, { size })
    }
    if (driverOk) this.driverOk()
    return this
  }

  /** Says that the driver is ready. */
  driverOk(): void {
    this.status = STATUS.ACKNOWLEDGE | STATUS.DRIVER | STATUS.FEATURES_OK | STATUS.DRIVER_OK
  }

  /** Resets the device, and waits until it is. */
  async reset(): Promise<void> {
    this.status = 0
    await eventually(() => this.status === 0, 'the device to be reset')
    this.#forget()
  }

  /** QueueNumMax: 0 for a queue that is not there. */
  queueMax(index: number): number {
    this.write(REGISTERS.QueueSel, index)
    return this.read(REGISTERS.QueueNumMax)
  }

  /** Whether the device has a queue that is ready. */
  queueReady(index: number): boolean {
    this.write(REGISTERS.QueueSel, index)
    return this.read(REGISTERS.QueueReady) === 1
  }

  /** Writes a queue's registers, QueueReady last. */
  writeQueue(index: number, { size, descriptors, driver, device }: QueueLayout): void {
    this.write(REGISTERS.QueueSel, index)
    this.write(REGISTERS.QueueNum, size)
    const parts = [
      [REGISTERS.QueueDescLow, descriptors],
      [REGISTERS.QueueDriverLow, driver],
      [REGISTERS.QueueDeviceLow, device],
    ] as const
    for (const [register, address] of parts) {
      this.write(register, address % 2 ** 32)
      this.write(register + 4, Math.floor(address / 2 ** 32))
    }
    this.write(REGISTERS.QueueReady, 1)
  }

  /** Sets a queue up in memory of its own, or where `layout` says, and expects it to be ready. */
  setupQueue(
    index: number,
    { size = DEFAULT_QUEUE_SIZE, layout = this.layOut(size) }: { size?: number; layout?: QueueLayout } = {},
  ): DriverQueue {
    this.writeQueue(index, layout)
    if (!this.queueReady(index)) throw new Error(`Expected queue ${index} to be ready`)
    const queue = new DriverQueue(this, index, layout)
    this.queues[index] = queue
    return queue
  }

  /** Memory for a queue's parts. */
  layOut(size: number): QueueLayout {
    const [descriptors, driver, device] = queueParts({ size, descriptors: 0, driver: 0, device: 0 }).map(
      ({ length, alignment }) => this.allocate(length, alignment),
    ) as [number, number, number]
    this.#ringsEnd = this.#allocated
    return { size, descriptors, driver, device }
  }

  /** Puts all indices of a running device's idle queues where so many chains would have brought them. */
  skipTo(index: number): void {
    for (const queue of this.queues) queue?.skipTo(index)
    const state = structuredClone(this.transport.saveState()) as unknown as SavedState
    for (const queue of state.function.queues) Object.assign(queue, { nextAvail: index, nextUsed: index })
    this.transport.restoreState(state as unknown as DeviceState)
  }

  queue(index: number): DriverQueue {
    const queue = this.queues[index]
    if (queue === undefined) throw new Error(`Expected queue ${index} to be set up`)
    return queue
  }

  /** Says that there is work in a queue. */
  notify(index: number): void {
    const doorbell = this.doorbells.find(({ value }) => value === index)
    if (this.useDoorbells && doorbell !== undefined) doorbell.ring()
    else this.write(REGISTERS.QueueNotify, index)
  }

  /** Sends one request and waits until all that are under way in its queue are used. */
  async request(index: number, parts: readonly RequestPart[], options?: AddOptions): Promise<UsedChain> {
    const queue = this.queue(index)
    const head = queue.add(parts, options)
    queue.kick()
    const chains = await queue.settled()
    return chains.find((chain) => chain.head === head)!
  }

  /** Waits until every queue's chains are used. */
  async settled(): Promise<void> {
    for (const queue of this.queues) await queue?.settled()
  }

  /** The configuration space, or a part of it, as a driver without a better way reads it: byte for byte. */
  readConfig(offset: number, length: number): Uint8Array {
    return Uint8Array.from({ length }, (_, i) => this.read(REGISTERS.Config + offset + i, 1))
  }

  /** Memory for a request: given back when no request is under way. */
  allocate(length: number, alignment = 1): number {
    const address = Math.ceil(this.#allocated / alignment) * alignment
    if (address + length > this.#heap.end) {
      throw new Error(`Expected ${length} bytes left of the heap; take chains back with used()`)
    }
    this.#allocated = address + length
    return address
  }

  /** Takes back the memory of requests, if none is under way. */
  releaseUnused(): void {
    if (this.queues.every((queue) => queue === undefined || queue.inFlight === 0)) {
      this.#allocated = this.#ringsEnd
    }
  }

  #forget(): void {
    this.queues.length = 0
    this.#ringsEnd = this.#heap.start
    this.#allocated = this.#heap.start
  }
}

/** Descriptors as a table has them. */
export function encode(descriptors: readonly Descriptor[]): Uint8Array {
  const table = new DataView(new ArrayBuffer(DESCRIPTOR_SIZE * descriptors.length))
  descriptors.forEach(({ address, length, flags = 0, next = 0 }, i) => {
    table.setBigUint64(DESCRIPTOR_SIZE * i, BigInt(address), true)
    table.setUint32(DESCRIPTOR_SIZE * i + 8, length, true)
    table.setUint16(DESCRIPTOR_SIZE * i + 12, flags, true)
    table.setUint16(DESCRIPTOR_SIZE * i + 14, next, true)
  })
  return new Uint8Array(table.buffer)
}

/** Descriptors one behind the other, the first of them at `start` of the table. */
export function linked(descriptors: readonly Descriptor[], start = 0): Descriptor[] {
  return descriptors.map((descriptor, i) =>
    i === descriptors.length - 1
      ? descriptor
      : { ...descriptor, flags: (descriptor.flags ?? 0) | VIRTQ_DESC_F_NEXT, next: start + i + 1 },
  )
}
