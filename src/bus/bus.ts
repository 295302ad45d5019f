import { hex, invalidArgument, NodevisorError, show } from '../errors.js'
import type { AccessSize, Device, MmioRange, PortRange, Range } from './device.js'

/** What a bus maps: I/O ports or guest-physical addresses. */
export type BusKind = 'port' | 'mmio'

/** How many ports or bytes a bus has: x86 has 2^16 ports; addresses are numbers, so they end at 2^53. */
export const BUS_SIZE: Readonly<Record<BusKind, number>> = { port: 0x1_0000, mmio: 2 ** 53 }

/** Distinct unclaimed addresses remembered; a guest that scans the bus must not grow the process. */
const MAX_UNCLAIMED_ADDRESSES = 256

/** A claimed range and what happened there. The bus keeps the counts up to date. */
export interface Mapping {
  readonly device: Device
  readonly range: Range
  /** The index that the device counts this range by. */
  readonly region: number
  /** Writes here may be collected by KVM (coalesced PIO or MMIO). */
  readonly posted: boolean
  /** Accesses that reached the device here, after splitting. */
  readonly reads: number
  readonly writes: number
}

/** Accesses that no device claimed: one for each gap that an access touched. */
export interface UnclaimedAccesses {
  readonly reads: number
  readonly writes: number
  /** The first 256 distinct addresses, in the order of their first access. */
  readonly addresses: readonly { readonly address: number; readonly reads: number; readonly writes: number }[]
  /** Accesses to further addresses: counted in `reads` and `writes`, listed nowhere. */
  readonly leftOut: number
}

interface MutableMapping extends Mapping {
  readonly start: number
  readonly end: number
  readonly maxAccessSize: number
  reads: number
  writes: number
  /** The listener for posted ranges has been told. */
  reported: boolean
}

/**
 * Maps ranges of ports or of guest-physical addresses to devices.
 *
 * Lookup is a cache of the last hit before a binary search: a machine costs no table, and an access no
 * allocation. What nobody claims reads as all ones and ignores writes.
 */
export class Bus {
  readonly kind: BusKind
  /** In ascending order, not overlapping. */
  readonly #mappings: MutableMapping[] = []
  #last: MutableMapping | undefined
  #unclaimedReads = 0
  #unclaimedWrites = 0
  #unclaimedLeftOut = 0
  readonly #unclaimed = new Map<number, { reads: number; writes: number }>()
  #postedAfter = 0
  #onPosted: ((mapping: Mapping) => void) | undefined

  constructor(kind: BusKind) {
    this.kind = kind
  }

  /** Every claimed range, in ascending order. */
  get mappings(): readonly Mapping[] {
    return this.#mappings
  }

  /** What nobody claimed so far. */
  get unclaimed(): UnclaimedAccesses {
    return {
      reads: this.#unclaimedReads,
      writes: this.#unclaimedWrites,
      addresses: [...this.#unclaimed].map(([address, counts]) => ({ address, ...counts })),
      leftOut: this.#unclaimedLeftOut,
    }
  }

  /**
   * Gives a range to a device.
   *
   * @param region - what the device knows this range by
   * @throws `ERR_INVALID_ARGUMENT` for a range that is empty or leaves the bus
   * @throws `ERR_BUS_OVERLAP` where another device (or the same) has part of it already
   */
  attach(device: Device, range: PortRange | MmioRange, region: number): void {
    checkRange(this.kind, range, `the ${this.kind} range of ${device.name}`)
    const start = range.base
    const end = start + range.length
    const index = this.#indexAfter(start)
    for (const other of [this.#mappings[index - 1], this.#mappings[index]]) {
      if (other !== undefined && start < other.end && other.start < end) {
        throw new NodevisorError(
          'ERR_BUS_OVERLAP',
          `Expected free ${describeRange(this.kind, range)} for ${device.name} but ${other.device.name} ` +
            `has ${describeRange(this.kind, other.range)}; move or leave out one of them`,
          {
            bus: this.kind,
            device: device.name,
            range,
            otherDevice: other.device.name,
            otherRange: other.range,
          },
        )
      }
    }
    this.#mappings.splice(index, 0, {
      device,
      range,
      region,
      posted: range.posted === true,
      start,
      end,
      maxAccessSize: device.maxAccessSize ?? 4,
      reads: 0,
      writes: 0,
      reported: false,
    })
  }

  /** The claimed range that `address` lies in. */
  mappingAt(address: number): Mapping | undefined {
    return this.#find(address)
  }

  /**
   * Tells when a posted range is worth a coalesced zone: once for each, after its `writes`-th write reached
   * the device. There is one listener; a second replaces the first.
   *
   * @returns ends the subscription
   */
  onPosted(writes: number, listener: (mapping: Mapping) => void): () => void {
    this.#postedAfter = writes
    this.#onPosted = listener
    return () => {
      if (this.#onPosted === listener) this.#onPosted = undefined
    }
  }

  /**
   * The guest reads `size` bytes at `address`; they are stored, little-endian, at `offset` of `view`.
   *
   * @param size - bytes, 1 to 8; KVM splits MMIO at page ends, so 3, 5, 6 and 7 do occur
   * @throws `ERR_DEVICE_FAILED` when the device throws or gives anything but an integer
   */
  readInto(view: DataView, offset: number, address: number, size: number): void {
    const mapping = this.#find(address)
    if (mapping !== undefined && isWhole(mapping, address, size)) {
      store(view, offset, size, this.#readDevice(mapping, address, size))
    } else {
      this.#readPieces(view, offset, address, size)
    }
  }

  /**
   * The guest writes the `size` bytes at `offset` of `view`, little-endian, to `address`.
   *
   * @param size - bytes, 1 to 8; KVM splits MMIO at page ends, so 3, 5, 6 and 7 do occur
   * @throws `ERR_DEVICE_FAILED` when the device throws
   */
  writeFrom(view: DataView, offset: number, address: number, size: number): void {
    const mapping = this.#find(address)
    if (mapping !== undefined && isWhole(mapping, address, size)) {
      this.#writeDevice(mapping, address, load(view, offset, size), size)
    } else {
      this.#writePieces(view, offset, address, size)
    }
  }

  /** As {@link Bus.readInto}, with the value as a number. */
  read(address: number, size: AccessSize): number {
    const mapping = this.#find(address)
    if (mapping !== undefined && isWhole(mapping, address, size)) {
      return mask(this.#readDevice(mapping, address, size), size)
    }
    const view = new DataView(new ArrayBuffer(4))
    this.#readPieces(view, 0, address, size)
    return load(view, 0, size)
  }

  /** As {@link Bus.writeFrom}, with the value as a number; bits beyond `size` bytes are ignored. */
  write(address: number, value: number, size: AccessSize): void {
    const mapping = this.#find(address)
    if (mapping !== undefined && isWhole(mapping, address, size)) {
      this.#writeDevice(mapping, address, mask(value, size), size)
      return
    }
    const view = new DataView(new ArrayBuffer(4))
    store(view, 0, size, value)
    this.#writePieces(view, 0, address, size)
  }

  #find(address: number): MutableMapping | undefined {
    const last = this.#last
    if (last !== undefined && address >= last.start && address < last.end) return last
    const mapping = this.#mappings[this.#indexAfter(address) - 1]
    if (mapping === undefined || address >= mapping.end) return undefined
    this.#last = mapping
    return mapping
  }

  /** The index of the first mapping that starts after `address`. */
  #indexAfter(address: number): number {
    let low = 0
    let high = this.#mappings.length
    while (low < high) {
      const middle = (low + high) >>> 1
      if (this.#mappings[middle]!.start <= address) low = middle + 1
      else high = middle
    }
    return low
  }

  #readPieces(view: DataView, offset: number, address: number, size: number): void {
    for (let done = 0; done < size; ) {
      const at = address + done
      const mapping = this.#find(at)
      if (mapping === undefined) {
        const end = done + this.#gapSize(at, size - done)
        this.#unclaimedReads++
        const counts = this.#unclaimedAt(at)
        if (counts !== undefined) counts.reads++
        while (done < end) view.setUint8(offset + done++, 0xff)
      } else {
        const piece = pieceSize(mapping, at, size - done)
        store(view, offset + done, piece, this.#readDevice(mapping, at, piece))
        done += piece
      }
    }
  }

  #writePieces(view: DataView, offset: number, address: number, size: number): void {
    for (let done = 0; done < size; ) {
      const at = address + done
      const mapping = this.#find(at)
      if (mapping === undefined) {
        done += this.#gapSize(at, size - done)
        this.#unclaimedWrites++
        const counts = this.#unclaimedAt(at)
        if (counts !== undefined) counts.writes++
      } else {
        const piece = pieceSize(mapping, at, size - done)
        this.#writeDevice(mapping, at, load(view, offset + done, piece), piece)
        done += piece
      }
    }
  }

  /** Of `size` bytes from the unclaimed `address` on, those before the next mapping. */
  #gapSize(address: number, size: number): number {
    const next = this.#mappings[this.#indexAfter(address)]
    return next === undefined ? size : Math.min(size, next.start - address)
  }

  #unclaimedAt(address: number): { reads: number; writes: number } | undefined {
    let counts = this.#unclaimed.get(address)
    if (counts === undefined) {
      if (this.#unclaimed.size >= MAX_UNCLAIMED_ADDRESSES) {
        this.#unclaimedLeftOut++
        return undefined
      }
      counts = { reads: 0, writes: 0 }
      this.#unclaimed.set(address, counts)
    }
    return counts
  }

  #readDevice(mapping: MutableMapping, address: number, size: AccessSize): number {
    const { device } = mapping
    let value: number
    mapping.reads++
    try {
      if (device.read === undefined) return 0xffff_ffff
      value = device.read(address - mapping.start, size, mapping.region)
    } catch (cause) {
      throw this.#threw(mapping, 'read', address, size, cause, {})
    }
    if (!Number.isInteger(value)) {
      ignoreRejection(value)
      throw new NodevisorError(
        'ERR_DEVICE_FAILED',
        `Expected a number from ${device.name}.read, an integer, for ${describeAccess(this.kind, address, size)} ` +
          `but received ${show(value)}`,
        this.#facts(mapping, 'read', address, size),
      )
    }
    return value
  }

  #writeDevice(mapping: MutableMapping, address: number, value: number, size: AccessSize): void {
    const { device } = mapping
    let result: unknown
    mapping.writes++
    try {
      result = device.write?.(address - mapping.start, value, size, mapping.region)
    } catch (cause) {
      throw this.#threw(mapping, 'write', address, size, cause, { value })
    }
    if (result instanceof Promise) {
      // Its rejection would end the process, where an exception only stops the machine.
      ignoreRejection(result)
      throw new NodevisorError(
        'ERR_DEVICE_FAILED',
        `Expected a synchronous ${device.name}.write for ${describeAccess(this.kind, address, size)} ` +
          `but received a Promise; queue what takes time and return`,
        { ...this.#facts(mapping, 'write', address, size), value },
      )
    }
    if (mapping.posted && !mapping.reported && mapping.writes >= this.#postedAfter) {
      this.#report(mapping)
    }
  }

  #report(mapping: MutableMapping): void {
    if (this.#onPosted === undefined) return
    mapping.reported = true
    this.#onPosted(mapping)
  }

  #threw(
    mapping: MutableMapping,
    access: 'read' | 'write',
    address: number,
    size: number,
    cause: unknown,
    more: { readonly value?: number },
  ): NodevisorError {
    return new NodevisorError(
      'ERR_DEVICE_FAILED',
      `Expected no exception from ${mapping.device.name}.${access} for ` +
        `${describeAccess(this.kind, address, size)} but received ` +
        `${cause instanceof Error ? `${cause.name}: ${cause.message}` : show(cause)}`,
      { ...this.#facts(mapping, access, address, size), ...more, cause },
    )
  }

  #facts(mapping: MutableMapping, access: 'read' | 'write', address: number, size: number) {
    return {
      device: mapping.device.name,
      bus: this.kind,
      access,
      address,
      offset: address - mapping.start,
      region: mapping.region,
      size,
    }
  }
}

/**
 * Checks that a value is a range that lies on the bus.
 *
 * @param argument - what the error calls it
 * @throws `ERR_INVALID_ARGUMENT`
 */
export function checkRange(kind: BusKind, range: unknown, argument: string): asserts range is Range {
  if (typeof range !== 'object' || range === null) {
    throw invalidArgument(argument, 'an object { base, length }', range)
  }
  const { base, length, posted } = range as Partial<PortRange>
  const limit = BUS_SIZE[kind]
  if (!Number.isInteger(base) || base! < 0 || base! >= limit) {
    throw invalidArgument(`base of ${argument}`, `an integer from 0 to ${hex(limit - 1)}`, base)
  }
  if (!Number.isInteger(length) || length! < 1 || length! > limit - base!) {
    throw invalidArgument(`length of ${argument}`, `an integer from 1 to ${hex(limit - base!)}`, length)
  }
  if (posted !== undefined && typeof posted !== 'boolean') {
    throw invalidArgument(`posted of ${argument}`, 'a boolean', posted)
  }
}

/** Whether the device takes the access as it is. */
function isWhole(mapping: MutableMapping, address: number, size: number): size is AccessSize {
  return size <= mapping.maxAccessSize && size !== 3 && address + size <= mapping.end
}

/** The widest access that the device takes at `address`, of `left` bytes still to do. */
function pieceSize(mapping: MutableMapping, address: number, left: number): AccessSize {
  const room = Math.min(left, mapping.maxAccessSize, mapping.end - address)
  return room >= 4 ? 4 : room >= 2 ? 2 : 1
}

function load(view: DataView, offset: number, size: AccessSize): number {
  if (size === 1) return view.getUint8(offset)
  return size === 2 ? view.getUint16(offset, true) : view.getUint32(offset, true)
}

/** DataView takes numbers modulo 2^(8·size): that is the masking. */
function store(view: DataView, offset: number, size: AccessSize, value: number): void {
  if (size === 1) view.setUint8(offset, value)
  else if (size === 2) view.setUint16(offset, value, true)
  else view.setUint32(offset, value, true)
}

function mask(value: number, size: AccessSize): number {
  if (size === 1) return value & 0xff
  return size === 2 ? value & 0xffff : value >>> 0
}

function ignoreRejection(value: unknown): void {
  if (value instanceof Promise) value.catch(() => {})
}

function describeRange(kind: BusKind, { base, length }: Range): string {
  const noun = kind === 'port' ? (length === 1 ? 'port' : 'ports') : length === 1 ? 'address' : 'addresses'
  return length === 1 ? `${noun} ${hex(base)}` : `${noun} ${hex(base)} to ${hex(base + length - 1)}`
}

function describeAccess(kind: BusKind, address: number, size: number): string {
  return `${size === 1 ? '1 byte' : `${size} bytes`} at ${kind === 'port' ? 'port' : 'address'} ${hex(address)}`
}
