import type { DeviceState } from '../bus/device.js'
import { invalidArgument } from '../errors.js'
import { type BlockBackend, SECTOR_SIZE, VIRTIO_BLK_ID_BYTES } from './block-backend.js'
import type { DescriptorChain } from './descriptor-chain.js'
import type { VirtioDevice, VirtioDriver, VirtioQueueOptions } from './virtio-device.js'

// VIRTIO 1.2, 5.2.3: Feature bits
export const VIRTIO_BLK_F_SEG_MAX = 1n << 2n
export const VIRTIO_BLK_F_RO = 1n << 5n
export const VIRTIO_BLK_F_BLK_SIZE = 1n << 6n
export const VIRTIO_BLK_F_FLUSH = 1n << 9n
export const VIRTIO_BLK_F_TOPOLOGY = 1n << 10n
export const VIRTIO_BLK_F_MQ = 1n << 12n
export const VIRTIO_BLK_F_DISCARD = 1n << 13n
export const VIRTIO_BLK_F_WRITE_ZEROES = 1n << 14n

// 5.2.6: Device Operation
export const VIRTIO_BLK_T_IN = 0
export const VIRTIO_BLK_T_OUT = 1
export const VIRTIO_BLK_T_FLUSH = 4
export const VIRTIO_BLK_T_GET_ID = 8
export const VIRTIO_BLK_T_DISCARD = 11
export const VIRTIO_BLK_T_WRITE_ZEROES = 13
export const VIRTIO_BLK_S_OK = 0
export const VIRTIO_BLK_S_IOERR = 1
export const VIRTIO_BLK_S_UNSUPP = 2

const DEVICE_TYPE = 2
const QUEUE_SIZE = 256
const MAX_QUEUES = 16

// struct virtio_blk_req { le32 type; le32 reserved; le64 sector; u8 data[]; u8 status; }
const HEADER_SIZE = 16
const HEADER_SECTOR = 8
// struct virtio_blk_discard_write_zeroes { le64 sector; le32 num_sectors; le32 flags; }, with unmap as bit 0
const SEGMENT_SIZE = 16
const SEGMENT_SECTORS = 8
const SEGMENT_FLAGS = 12
const SEGMENT_UNMAP = 1

// 5.2.4: struct virtio_blk_config
const CONFIG_SIZE = 60
const CAPACITY = 0
const SEG_MAX = 12
const BLK_SIZE = 20
const PHYSICAL_BLOCK_EXP = 24
const MIN_IO_SIZE = 26
const NUM_QUEUES = 34
const MAX_DISCARD_SECTORS = 36
const MAX_DISCARD_SEG = 40
const DISCARD_SECTOR_ALIGNMENT = 44
const MAX_WRITE_ZEROES_SECTORS = 48
const MAX_WRITE_ZEROES_SEG = 52
const WRITE_ZEROES_MAY_UNMAP = 56

/** The longest read or write, in bytes: far beyond any driver's, and what a hostile one can take. */
const MAX_TRANSFER = 32 * 2 ** 20
const MAX_SEGMENTS = 16
const DISCARD_LIMIT = 2 ** 30 / SECTOR_SIZE
/** A file system that cannot make zeros has to write them. */
const WRITE_ZEROES_LIMIT = MAX_TRANSFER / SECTOR_SIZE

/** How to make a {@link VirtioBlock}. */
export interface VirtioBlockOptions {
  readonly backend: BlockBackend
  /** How errors and statistics call it. */
  readonly name?: string
  /** Its serial number, up to 20 bytes of ASCII; empty unless given. */
  readonly serial?: string
  /** Request queues, 1 to 16, so that vCPUs need not share one; 1 unless given. */
  readonly queues?: number
}

/** A request that cannot be carried out: its status. */
class Refusal {
  readonly status: number
  constructor(status: number) {
    this.status = status
  }
}

const IOERR = new Refusal(VIRTIO_BLK_S_IOERR)
const UNSUPP = new Refusal(VIRTIO_BLK_S_UNSUPP)

/** A stretch of the disk, in bytes. */
interface Extent {
  readonly offset: number
  readonly length: number
  readonly mayDiscard: boolean
}

/**
 * A disk: virtio-blk (VIRTIO 1.2, 5.2). The backend reads and writes guest memory in place.
 *
 * A driver that does not negotiate VIRTIO_BLK_F_FLUSH has no way to ask for durability, so each of its writes
 * is flushed (5.2.6.2).
 */
export class VirtioBlock implements VirtioDevice {
  readonly name: string
  readonly deviceType = DEVICE_TYPE
  readonly features: bigint
  readonly queues: readonly VirtioQueueOptions[]
  readonly config: Uint8Array
  /** Requests that the backend failed. */
  errors = 0
  /** Why it failed the last of them. */
  lastError: unknown
  readonly #backend: BlockBackend
  readonly #id = new Uint8Array(VIRTIO_BLK_ID_BYTES)
  #negotiated = 0n

  /** @throws `ERR_INVALID_ARGUMENT` */
  constructor({ backend, name = 'disk', serial = '', queues = 1 }: VirtioBlockOptions) {
    const { size, readOnly, blockSize = SECTOR_SIZE } = backend
    if (!Number.isSafeInteger(size) || size < 0 || size % SECTOR_SIZE !== 0) {
      throw invalidArgument(`size of the backend of ${name}`, 'a multiple of 512 bytes', size)
    }
    if (!Number.isInteger(blockSize) || blockSize < SECTOR_SIZE || (blockSize & (blockSize - 1)) !== 0) {
      throw invalidArgument(`blockSize of the backend of ${name}`, 'a power of two from 512 on', blockSize)
    }
    if (typeof serial !== 'string' || !/^[\x20-\x7e]{0,20}$/.test(serial)) {
      throw invalidArgument(`serial of ${name}`, 'up to 20 characters of ASCII', serial)
    }
    if (!Number.isInteger(queues) || queues < 1 || queues > MAX_QUEUES) {
      throw invalidArgument(`queues of ${name}`, `an integer from 1 to ${MAX_QUEUES}`, queues)
    }
    this.name = name
    this.#backend = backend
    this.#id.set(Buffer.from(serial, 'latin1'))
    const canDiscard = !readOnly && backend.discard !== undefined
    const canZero = !readOnly && backend.writeZeroes !== undefined
    this.features =
      VIRTIO_BLK_F_SEG_MAX |
      VIRTIO_BLK_F_BLK_SIZE |
      VIRTIO_BLK_F_FLUSH |
      VIRTIO_BLK_F_TOPOLOGY |
      (readOnly ? VIRTIO_BLK_F_RO : 0n) |
      (queues > 1 ? VIRTIO_BLK_F_MQ : 0n) |
      (canDiscard ? VIRTIO_BLK_F_DISCARD : 0n) |
      (canZero ? VIRTIO_BLK_F_WRITE_ZEROES : 0n)
    this.queues = Array.from({ length: queues }, () => ({
      maxSize: QUEUE_SIZE,
      handle: (chain) => this.#handle(chain),
    }))
    this.config = makeConfig(size, blockSize, queues)
  }

  start({ features }: VirtioDriver): void {
    this.#negotiated = features
  }

  /** Nothing but what was negotiated, which is the transport's to keep. */
  saveState(): DeviceState {
    return null
  }

  restoreState(): void {}

  #handle(chain: DescriptorChain): number | Promise<number> {
    const dataSize = chain.writable.length - 1
    // Nowhere to put a status.
    if (dataSize < 0) return 0
    const header = chain.read(HEADER_SIZE)
    if (!isRequest(chain, header)) return answer(chain, IOERR)
    const view = new DataView(header.buffer)
    const type = view.getUint32(0, true)
    const filled = filledBytes(type, dataSize)
    let work: Promise<void> | undefined | Refusal
    try {
      work = this.#start(chain, type, readUint64(view, HEADER_SECTOR))
    } catch (error) {
      work = this.#failed(error)
    }
    if (work === undefined || work instanceof Refusal) return answer(chain, work, filled)
    // A user's backend may have promises of its own kind.
    return Promise.resolve(work).then(
      () => answer(chain, undefined, filled),
      (error) => answer(chain, this.#failed(error)),
    )
  }

  #start(chain: DescriptorChain, type: number, sector: number): Promise<void> | undefined | Refusal {
    const { readOnly } = this.#backend
    const dataSize = chain.writable.length - 1
    switch (type) {
      case VIRTIO_BLK_T_IN:
        if (!this.#isTransfer(sector, dataSize)) return IOERR
        return this.#backend.read(sector * SECTOR_SIZE, chain.writable.views(0, dataSize))
      case VIRTIO_BLK_T_OUT: {
        const length = chain.readable.length - HEADER_SIZE
        if (readOnly || !this.#isTransfer(sector, length)) return IOERR
        return this.#durable(this.#backend.write(sector * SECTOR_SIZE, chain.readable.views(HEADER_SIZE)))
      }
      case VIRTIO_BLK_T_FLUSH:
        return readOnly ? undefined : this.#backend.flush()
      case VIRTIO_BLK_T_GET_ID:
        chain.write(this.#id.subarray(0, dataSize))
        return undefined
      case VIRTIO_BLK_T_DISCARD:
        return this.#discard(chain)
      case VIRTIO_BLK_T_WRITE_ZEROES:
        return this.#writeZeroes(chain)
      default:
        return UNSUPP
    }
  }

  #discard(chain: DescriptorChain): Promise<void> | undefined | Refusal {
    if ((this.#negotiated & VIRTIO_BLK_F_DISCARD) === 0n) return UNSUPP
    const extents = this.#extents(chain, DISCARD_LIMIT, 0)
    if (extents instanceof Refusal) return extents
    return this.#durable(each(extents, ({ offset, length }) => this.#backend.discard!(offset, length)))
  }

  #writeZeroes(chain: DescriptorChain): Promise<void> | undefined | Refusal {
    if ((this.#negotiated & VIRTIO_BLK_F_WRITE_ZEROES) === 0n) return UNSUPP
    const extents = this.#extents(chain, WRITE_ZEROES_LIMIT, SEGMENT_UNMAP)
    if (extents instanceof Refusal) return extents
    return this.#durable(
      each(extents, ({ offset, length, mayDiscard }) =>
        this.#backend.writeZeroes!(offset, length, mayDiscard),
      ),
    )
  }

  /**
   * The segments of a discard or write zeroes request.
   *
   * @param limit - sectors in one of them
   * @param knownFlags - any other makes the request unsupported, whatever else is wrong with it (5.2.6.2)
   */
  #extents(chain: DescriptorChain, limit: number, knownFlags: number): Extent[] | Refusal {
    const count = (chain.readable.length - HEADER_SIZE) / SEGMENT_SIZE
    if (!Number.isInteger(count) || count < 1 || count > MAX_SEGMENTS) return IOERR
    const bytes = chain.read(count * SEGMENT_SIZE, HEADER_SIZE)
    const view = new DataView(bytes.buffer)
    const extents: Extent[] = []
    let allValid = true
    for (let at = 0; at < bytes.length; at += SEGMENT_SIZE) {
      const sector = readUint64(view, at)
      const sectors = view.getUint32(at + SEGMENT_SECTORS, true)
      const flags = view.getUint32(at + SEGMENT_FLAGS, true)
      if ((flags & ~knownFlags) !== 0) return UNSUPP
      const length = sectors * SECTOR_SIZE
      if (sectors > limit || !this.#isWithin(sector, length)) allValid = false
      extents.push({ offset: sector * SECTOR_SIZE, length, mayDiscard: (flags & SEGMENT_UNMAP) !== 0 })
    }
    return allValid ? extents : IOERR
  }

  #isTransfer(sector: number, length: number): boolean {
    return (
      length >= 0 && length <= MAX_TRANSFER && length % SECTOR_SIZE === 0 && this.#isWithin(sector, length)
    )
  }

  #isWithin(sector: number, length: number): boolean {
    return sector <= (this.#backend.size - length) / SECTOR_SIZE
  }

  #durable(work: Promise<void> | undefined): Promise<void> | undefined {
    if ((this.#negotiated & VIRTIO_BLK_F_FLUSH) !== 0n) return work
    return work === undefined ? this.#backend.flush() : work.then(() => this.#backend.flush())
  }

  #failed(error: unknown): Refusal {
    this.errors++
    this.lastError = error
    return IOERR
  }
}

/** Bytes of the data, before the status, that a request fills if it succeeds: from the start on. */
function filledBytes(type: number, dataSize: number): number {
  if (type === VIRTIO_BLK_T_IN) return dataSize
  return type === VIRTIO_BLK_T_GET_ID ? Math.min(dataSize, VIRTIO_BLK_ID_BYTES) : 0
}

/**
 * Writes the status.
 *
 * @param filled - bytes of the data that were written, from the start on
 * @returns bytes written from the start on without a gap: a driver takes them all for the device's (2.7.8.2)
 */
function answer({ writable }: DescriptorChain, refusal: Refusal | undefined, filled = 0): number {
  const dataSize = writable.length - 1
  writable.copyFrom(Uint8Array.of(refusal?.status ?? VIRTIO_BLK_S_OK), dataSize)
  const written = refusal === undefined ? filled : 0
  return written === dataSize ? writable.length : written
}

/** One after the other. */
function each<T>(
  items: readonly T[],
  start: (item: T) => Promise<void> | undefined,
): Promise<void> | undefined {
  let last: Promise<void> | undefined
  for (const item of items) last = last === undefined ? start(item) : last.then(() => start(item))
  return last
}

/** More segments than SEG_MAX allows would only be there to cost the host memory while the request is under way. */
function isRequest({ readable, writable }: DescriptorChain, header: Uint8Array): boolean {
  return header.length === HEADER_SIZE && readable.segments + writable.segments <= QUEUE_SIZE
}

/** Numbers beyond 2^53 become others as large: all are beyond any disk. */
function readUint64(view: DataView, at: number): number {
  return view.getUint32(at, true) + view.getUint32(at + 4, true) * 2 ** 32
}

function makeConfig(size: number, blockSize: number, queues: number): Uint8Array {
  const config = new Uint8Array(CONFIG_SIZE)
  const view = new DataView(config.buffer)
  const sectorsInBlock = blockSize / SECTOR_SIZE
  view.setBigUint64(CAPACITY, BigInt(size / SECTOR_SIZE), true)
  // A chain has two more descriptors, for header and status.
  view.setUint32(SEG_MAX, QUEUE_SIZE - 2, true)
  view.setUint32(BLK_SIZE, SECTOR_SIZE, true)
  view.setUint8(PHYSICAL_BLOCK_EXP, Math.log2(sectorsInBlock))
  view.setUint16(MIN_IO_SIZE, Math.min(sectorsInBlock, 0xffff), true)
  view.setUint16(NUM_QUEUES, queues, true)
  view.setUint32(MAX_DISCARD_SECTORS, DISCARD_LIMIT, true)
  view.setUint32(MAX_DISCARD_SEG, MAX_SEGMENTS, true)
  view.setUint32(DISCARD_SECTOR_ALIGNMENT, sectorsInBlock, true)
  view.setUint32(MAX_WRITE_ZEROES_SECTORS, WRITE_ZEROES_LIMIT, true)
  view.setUint32(MAX_WRITE_ZEROES_SEG, MAX_SEGMENTS, true)
  view.setUint8(WRITE_ZEROES_MAY_UNMAP, 1)
  return config
}
