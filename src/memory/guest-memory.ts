import { hex, invalidArgument, NodevisorError } from '../errors.js'

/** Host memory that stands for guest RAM from a guest-physical address on. */
export interface MappedRegion {
  readonly start: number
  readonly buffer: ArrayBuffer
}

interface Region {
  readonly start: number
  readonly end: number
  readonly bytes: Uint8Array
  readonly view: DataView
}

/**
 * Guest-physical memory: typed, bounds-checked access to RAM. Numbers are little-endian.
 *
 * Addresses are bytes from 0, as `number`. An access that leaves RAM throws `ERR_OUT_OF_RANGE` and changes
 * nothing; one after the machine was closed throws `ERR_CLOSED`.
 */
export class GuestMemory {
  readonly #regions: readonly Region[]
  readonly #onClose: (() => void) | undefined
  #closed = false

  /**
   * @param regions - in ascending order, not overlapping
   * @param onClose - detaches the buffers
   */
  constructor(regions: readonly MappedRegion[], onClose?: () => void) {
    this.#regions = regions.map(({ start, buffer }) => ({
      start,
      end: start + buffer.byteLength,
      bytes: new Uint8Array(buffer),
      view: new DataView(buffer),
    }))
    this.#onClose = onClose
  }

  /** The stretches of RAM: first address and bytes of each, in ascending order. */
  get regions(): readonly { readonly start: number; readonly size: number }[] {
    return this.#regions.map(({ start, end }) => ({ start, size: end - start }))
  }

  /** Bytes of RAM. */
  get size(): number {
    return this.#regions.reduce((sum, { start, end }) => sum + end - start, 0)
  }

  /** Whether `length` bytes from `address` on are all RAM. */
  contains(address: number, length = 1): boolean {
    if (!Number.isSafeInteger(address) || !Number.isSafeInteger(length) || address < 0 || length < 0)
      return false
    let at = address
    const end = address + length
    for (const region of this.#regions) {
      if (at >= region.start && at < region.end) at = Math.min(end, region.end)
      if (at === end) return true
    }
    return at === end
  }

  readUint8(address: number): number {
    const region = this.#find(address, 1)
    return region.view.getUint8(address - region.start)
  }

  readUint16(address: number): number {
    const region = this.#find(address, 2)
    return region.view.getUint16(address - region.start, true)
  }

  readUint32(address: number): number {
    const region = this.#find(address, 4)
    return region.view.getUint32(address - region.start, true)
  }

  readBigUint64(address: number): bigint {
    const region = this.#find(address, 8)
    return region.view.getBigUint64(address - region.start, true)
  }

  writeUint8(address: number, value: number): void {
    checkUint('value', value, 0xff)
    const region = this.#find(address, 1)
    region.view.setUint8(address - region.start, value)
  }

  writeUint16(address: number, value: number): void {
    checkUint('value', value, 0xffff)
    const region = this.#find(address, 2)
    region.view.setUint16(address - region.start, value, true)
  }

  writeUint32(address: number, value: number): void {
    checkUint('value', value, 0xffff_ffff)
    const region = this.#find(address, 4)
    region.view.setUint32(address - region.start, value, true)
  }

  writeBigUint64(address: number, value: bigint): void {
    if (typeof value !== 'bigint' || value < 0n || value > 0xffff_ffff_ffff_ffffn) {
      throw invalidArgument('value', 'a bigint from 0n to 2n**64n - 1n', value)
    }
    const region = this.#find(address, 8)
    region.view.setBigUint64(address - region.start, value, true)
  }

  /** A copy of `length` bytes. */
  read(address: number, length: number): Uint8Array {
    this.#check(address, length)
    const copy = new Uint8Array(length)
    this.#forEachPiece(address, length, (bytes, from, done) => {
      copy.set(bytes.subarray(from, from + Math.min(bytes.length - from, length - done)), done)
    })
    return copy
  }

  /** Copies `bytes` into guest memory. */
  write(address: number, bytes: Uint8Array): void {
    if (!(bytes instanceof Uint8Array)) throw invalidArgument('bytes', 'a Uint8Array', bytes)
    this.#check(address, bytes.length)
    this.#forEachPiece(address, bytes.length, (target, from, done) => {
      target.set(bytes.subarray(done, done + target.length - from), from)
    })
  }

  /** Sets `length` bytes to `value`. */
  fill(address: number, length: number, value = 0): void {
    checkUint('value', value, 0xff)
    this.#check(address, length)
    this.#forEachPiece(address, length, (bytes, from, done) => {
      bytes.fill(value, from, from + Math.min(bytes.length - from, length - done))
    })
  }

  /**
   * The guest's own bytes, not a copy: they change as the guest runs. Empty once the machine is closed.
   *
   * @throws `ERR_OUT_OF_RANGE` also where the bytes do not lie in one stretch of RAM
   */
  view(address: number, length: number): Uint8Array {
    this.#check(address, length)
    if (length === 0) return new Uint8Array(0)
    const region = this.#find(address, length)
    return region.bytes.subarray(address - region.start, address - region.start + length)
  }

  /** Detaches every view of guest memory. Called by the machine. */
  close(): void {
    if (this.#closed) return
    this.#closed = true
    this.#onClose?.()
  }

  #find(address: number, length: number): Region {
    if (this.#closed) throw closedError()
    for (const region of this.#regions) {
      if (address >= region.start && address + length <= region.end && Number.isInteger(address))
        return region
    }
    throw this.#outOfRange(address, length)
  }

  #check(address: number, length: number): void {
    if (this.#closed) throw closedError()
    if (!this.contains(address, length)) throw this.#outOfRange(address, length)
  }

  #forEachPiece(
    address: number,
    length: number,
    use: (bytes: Uint8Array, from: number, done: number) => void,
  ): void {
    let done = 0
    for (const region of this.#regions) {
      const at = address + done
      if (done < length && at >= region.start && at < region.end) {
        use(region.bytes, at - region.start, done)
        done += Math.min(length - done, region.end - at)
      }
    }
  }

  #outOfRange(address: unknown, length: unknown): NodevisorError {
    if (typeof address !== 'number' || !Number.isSafeInteger(address) || address < 0) {
      const hint = typeof address === 'bigint' ? '; convert it with Number(address)' : ''
      return invalidArgument('address', `an integer from 0 to 2^53 - 1${hint}`, address)
    }
    if (typeof length !== 'number' || !Number.isSafeInteger(length) || length < 0) {
      return invalidArgument('length', 'an integer of at least 0', length)
    }
    const ram = this.regions.map(({ start, size }) => `${hex(start)} to ${hex(start + size - 1)}`).join(', ')
    return new NodevisorError(
      'ERR_OUT_OF_RANGE',
      `Expected an address range within guest RAM (${ram}) but received ${length} bytes at ${hex(address)}`,
      { address, length },
    )
  }
}

function closedError(): NodevisorError {
  return new NodevisorError(
    'ERR_CLOSED',
    'Expected an open machine but it was closed; read its memory before close()',
  )
}

function checkUint(name: string, value: unknown, max: number): void {
  if (typeof value !== 'number' || !Number.isInteger(value) || value < 0 || value > max) {
    throw invalidArgument(name, `an integer from 0 to ${hex(max)}`, value)
  }
}
