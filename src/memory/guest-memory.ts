import { hex, invalidArgument, NodevisorError } from '../errors.js'

/**
 * Host memory that stands for guest RAM from a guest-physical address on: a buffer, or a way to get buffers over parts
 * of it.
 */
export type MappedRegion =
  | { readonly start: number; readonly buffer: ArrayBuffer }
  | {
      readonly start: number
      readonly size: number
      /** `length` bytes from `offset` on, in place. */
      map(offset: number, length: number): ArrayBuffer
    }

/**
 * Bytes in one buffer of a mapped region. V8 counts buffers as memory of JavaScript's and collects garbage for them:
 * so there are only those for what has been looked at.
 */
const WINDOW_SIZE = 2 ** 20

interface Window {
  readonly start: number
  readonly end: number
  readonly bytes: Uint8Array
  readonly view: DataView
}

function openWindow(start: number, buffer: ArrayBuffer): Window {
  return {
    start,
    end: start + buffer.byteLength,
    bytes: new Uint8Array(buffer),
    view: new DataView(buffer),
  }
}

/** One stretch of RAM, seen through windows. */
class Region {
  readonly start: number
  readonly end: number
  readonly #windowSize: number
  readonly #windows: (Window | undefined)[] = []
  readonly #map: (offset: number, length: number) => ArrayBuffer

  constructor(mapped: MappedRegion) {
    this.start = mapped.start
    if ('buffer' in mapped) {
      const { start, buffer } = mapped
      this.end = start + buffer.byteLength
      this.#windowSize = buffer.byteLength
      this.#map = () => buffer
      this.#windows[0] = openWindow(start, buffer)
    } else {
      this.end = mapped.start + mapped.size
      this.#windowSize = WINDOW_SIZE
      this.#map = (offset, length) => mapped.map(offset, length)
    }
  }

  windowAt(address: number): Window {
    const index = Math.floor((address - this.start) / this.#windowSize)
    let window = this.#windows[index]
    if (window === undefined) {
      const offset = index * this.#windowSize
      const length = Math.min(this.#windowSize, this.end - this.start - offset)
      window = openWindow(this.start + offset, this.#map(offset, length))
      this.#windows[index] = window
    }
    return window
  }

  /** Bytes that may lie in more than one window. */
  view(address: number, length: number): Uint8Array {
    const window = this.windowAt(address)
    if (address + length <= window.end) {
      return window.bytes.subarray(address - window.start, address - window.start + length)
    }
    return new Uint8Array(this.#map(address - this.start, length))
  }
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
    this.#regions = regions.map((region) => new Region(region))
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
    const window = this.#window(address, 1)
    return window.view.getUint8(address - window.start)
  }

  readUint16(address: number): number {
    const window = this.#window(address, 2)
    if (window === undefined) return this.#readScratch(address, 2).getUint16(0, true)
    return window.view.getUint16(address - window.start, true)
  }

  readUint32(address: number): number {
    const window = this.#window(address, 4)
    if (window === undefined) return this.#readScratch(address, 4).getUint32(0, true)
    return window.view.getUint32(address - window.start, true)
  }

  readBigUint64(address: number): bigint {
    const window = this.#window(address, 8)
    if (window === undefined) return this.#readScratch(address, 8).getBigUint64(0, true)
    return window.view.getBigUint64(address - window.start, true)
  }

  writeUint8(address: number, value: number): void {
    checkUint('value', value, 0xff)
    const window = this.#window(address, 1)
    window.view.setUint8(address - window.start, value)
  }

  writeUint16(address: number, value: number): void {
    checkUint('value', value, 0xffff)
    const window = this.#window(address, 2)
    if (window !== undefined) {
      window.view.setUint16(address - window.start, value, true)
      return
    }
    const scratch = new DataView(new ArrayBuffer(2))
    scratch.setUint16(0, value, true)
    this.write(address, new Uint8Array(scratch.buffer))
  }

  writeUint32(address: number, value: number): void {
    checkUint('value', value, 0xffff_ffff)
    const window = this.#window(address, 4)
    if (window !== undefined) {
      window.view.setUint32(address - window.start, value, true)
      return
    }
    const scratch = new DataView(new ArrayBuffer(4))
    scratch.setUint32(0, value, true)
    this.write(address, new Uint8Array(scratch.buffer))
  }

  writeBigUint64(address: number, value: bigint): void {
    if (typeof value !== 'bigint' || value < 0n || value > 0xffff_ffff_ffff_ffffn) {
      throw invalidArgument('value', 'a bigint from 0n to 2n**64n - 1n', value)
    }
    const window = this.#window(address, 8)
    if (window !== undefined) {
      window.view.setBigUint64(address - window.start, value, true)
      return
    }
    const scratch = new DataView(new ArrayBuffer(8))
    scratch.setBigUint64(0, value, true)
    this.write(address, new Uint8Array(scratch.buffer))
  }

  /** A copy of `length` bytes. */
  read(address: number, length: number): Uint8Array {
    this.#check(address, length)
    const copy = new Uint8Array(length)
    this.#forEachPiece(address, length, (piece, done) => copy.set(piece, done))
    return copy
  }

  /** Copies `bytes` into guest memory. */
  write(address: number, bytes: Uint8Array): void {
    if (!(bytes instanceof Uint8Array)) throw invalidArgument('bytes', 'a Uint8Array', bytes)
    this.#check(address, bytes.length)
    this.#forEachPiece(address, bytes.length, (piece, done) => {
      piece.set(bytes.subarray(done, done + piece.length))
    })
  }

  /** Sets `length` bytes to `value`. */
  fill(address: number, length: number, value = 0): void {
    checkUint('value', value, 0xff)
    this.#check(address, length)
    this.#forEachPiece(address, length, (piece) => {
      piece.fill(value)
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
    const region = this.#regions.find(({ start, end }) => address >= start && address + length <= end)
    if (region === undefined) throw this.#outOfRange(address, length)
    return region.view(address, length)
  }

  /**
   * The guest's own bytes, as {@link view} gives them, but in as many pieces as they lie in: that costs no mapping, and
   * they may lie in several stretches of RAM.
   */
  pieces(address: number, length: number): Uint8Array[] {
    this.#check(address, length)
    const pieces: Uint8Array[] = []
    this.#forEachPiece(address, length, (piece) => {
      pieces.push(piece)
    })
    return pieces
  }

  /** Detaches every view of guest memory. Called by the machine. */
  close(): void {
    if (this.#closed) return
    this.#closed = true
    this.#onClose?.()
  }

  /** The window that the bytes lie in; undefined where they are RAM but lie in more than one. */
  #window(address: number, length: 1): Window
  #window(address: number, length: number): Window | undefined
  #window(address: number, length: number): Window | undefined {
    if (this.#closed) throw closedError()
    for (const region of this.#regions) {
      if (address >= region.start && address < region.end && Number.isInteger(address)) {
        const window = region.windowAt(address)
        if (address + length <= window.end) return window
      }
    }
    this.#check(address, length)
    return undefined
  }

  #readScratch(address: number, length: number): DataView {
    return new DataView(this.read(address, length).buffer)
  }

  #check(address: number, length: number): void {
    if (this.#closed) throw closedError()
    // contains() has a default for the length that a caller forgot.
    if (length === undefined || !this.contains(address, length)) throw this.#outOfRange(address, length)
  }

  /** The pieces of host memory that `length` bytes are in, which are all RAM. `done` are the bytes before a piece. */
  #forEachPiece(address: number, length: number, use: (piece: Uint8Array, done: number) => void): void {
    for (let done = 0; done < length; ) {
      const at = address + done
      const region = this.#regions.find(({ start, end }) => at >= start && at < end)!
      const window = region.windowAt(at)
      const piece = window.bytes.subarray(at - window.start, at - window.start + length - done)
      use(piece, done)
      done += piece.length
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
