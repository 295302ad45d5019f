import { rm } from 'node:fs/promises'
import { setImmediate as nextTurn } from 'node:timers/promises'
import { crc32 } from 'node:zlib'
import { invalidArgument, NodevisorError } from '../errors.js'
import { isZero } from '../memory/is-zero.js'
import { type BlockBackend, isDiskSize } from '../virtio/block-backend.js'
import { ClusterMap } from './cluster-map.js'
import { COPY_PIECE, DiskFile, zeros } from './disk-file.js'
import { CLUSTER_SIZE } from './overlay-header.js'
import { RangeLocks } from './range-locks.js'
import { type Request, Requests } from './requests.js'
import type { Preserver } from './shared-disk.js'

const MAGIC = Buffer.from('nodevisor undo log\n')
const VERSION = 1

// Offsets in the header; numbers are little-endian, what is not named is zero.
const VERSION_OFFSET = 20
const DISK_SIZE_OFFSET = 24
const STATE_OFFSET = 32
const HEADER_CHECKSUM_OFFSET = 60
const HEADER_SIZE = 64

/** Something is missing in the log. */
const STATE_BROKEN = 1

// Offsets in what is before the bytes of a record.
const OFFSET_OFFSET = 0
const LENGTH_OFFSET = 8
const KIND_OFFSET = 12
const BYTES_CHECKSUM_OFFSET = 16
const RECORD_CHECKSUM_OFFSET = 20
const RECORD_HEADER_SIZE = 24

/** The bytes follow. */
const KIND_BYTES = 0
/** They were all zero. */
const KIND_ZEROS = 1

/** Clusters of a record, at most. */
const RECORD_CLUSTERS = COPY_PIECE / CLUSTER_SIZE

/** Records that are read without a turn of the event loop in between. */
const RECORDS_PER_TURN = 64

/** What a part of a disk was. */
interface UndoRecord {
  readonly offset: number
  readonly length: number
  /** undefined: zeros. */
  readonly bytes: Uint8Array | undefined
}

/**
 * Makes a disk able to return to what it was when the log was begun: a file that is only appended to, with what was on
 * the disk before it was overwritten, each cluster once. Attach it to a {@link SharedDisk}. docs/disks.md has the
 * format.
 *
 * It is there for the process that is killed at any moment (`kill -9`), with what it has written in the host's page
 * cache; so nothing waits for a flush. Where the host itself crashes, parts of the log may be missing though the disk
 * has the writes that they were to undo: {@link rollBack} refuses it, or goes back in part.
 */
export class UndoLog implements Preserver {
  readonly #base: BlockBackend
  readonly #file: DiskFile
  /** Clusters that are in the log. */
  readonly #map = new ClusterMap()
  /** Clusters that are getting into the log. */
  readonly #locks = new RangeLocks()
  readonly #requests = new Requests()
  /** The last append: one at a time, or a crash could leave a gap. */
  #append: Promise<void> = Promise.resolve()
  #end = HEADER_SIZE
  #error: NodevisorError | undefined
  /** Done when the file says that it is broken. */
  #givingUp: Promise<void> | undefined

  private constructor(base: BlockBackend, file: DiskFile) {
    this.#base = base
    this.#file = file
  }

  /**
   * Begins a log in a new file, and flushes the disk. No request of the disk may be under way until the log is
   * attached: pause the machine.
   *
   * @param base - the disk that the old bytes are read from: the {@link SharedDisk.inner} of what it is attached to
   * @throws `ERR_DISK_OPEN` where the file is there already or could not be made, `ERR_DISK_IO`
   */
  static async create(path: string, base: BlockBackend): Promise<UndoLog> {
    // An overlay would lose after a crash what it was not flushed for.
    await base.flush()
    const file = await DiskFile.create(path, 0, 0o600, path)
    try {
      await file.write(0, [encodeHeader(base.size, 0)])
      return new UndoLog(base, file)
    } catch (error) {
      await Promise.all([file.close(), rm(path, { force: true })])
      throw error
    }
  }

  /**
   * Makes the disk what it was when the log was begun, and flushes it. The log stays; to do it again changes nothing.
   * A record that ends early is the one that a crash has cut off: what it was to undo was never written.
   *
   * @throws `ERR_DISK_FORMAT` where the file is not a complete log of such a disk: then nothing was written;
   *   `ERR_DISK_OPEN`, `ERR_DISK_IN_USE` for the log; `ERR_DISK_IO`
   */
  static async rollBack(path: string, disk: BlockBackend): Promise<void> {
    if (disk.readOnly) throw invalidArgument('disk', 'a disk that can be written', disk)
    const file = await DiskFile.open(path, true)
    try {
      await checkHeader(file, disk.size)
      await readRecords(file, disk.size, () => undefined)
      await readRecords(file, disk.size, (record) => writeBack(record, disk))
      await disk.flush()
    } finally {
      await file.close()
    }
  }

  /** Why the log is incomplete, and cannot be used to go back; undefined as long as it can. */
  get error(): NodevisorError | undefined {
    return this.#error
  }

  preserve(offset: number, length: number): Request {
    if (this.#givingUp !== undefined) return this.#givingUp
    const first = Math.floor(offset / CLUSTER_SIZE)
    const end = Math.ceil((offset + length) / CLUSTER_SIZE)
    if (this.#map.hasAll(first, end)) return undefined
    const giveUp = (error: unknown) => this.#giveUp(error)
    return this.#requests.start(() => this.#preserve(first, end).catch(giveUp))?.catch(giveUp)
  }

  /** Closes the file, which stays. Detach the log before: nothing is undone of what is written afterwards. */
  async close(): Promise<void> {
    await this.#requests.close()
    await this.#file.close()
  }

  async #preserve(first: number, end: number): Promise<void> {
    for (let start = first; start < end; ) {
      const stop = Math.min(end, start - (start % RECORD_CLUSTERS) + RECORD_CLUSTERS)
      const release = await this.#locks.acquire(start, stop)
      try {
        for (let run = start; run < stop; ) {
          const runEnd = this.#map.runEnd(run, stop)
          if (!this.#map.has(run)) await this.#log(run, runEnd)
          run = runEnd
        }
      } finally {
        release()
      }
      start = stop
    }
  }

  /** Appends a record of these clusters. */
  async #log(first: number, end: number): Promise<void> {
    const offset = first * CLUSTER_SIZE
    const bytes = new Uint8Array(Math.min(end * CLUSTER_SIZE, this.#base.size) - offset)
    await this.#base.read(offset, [bytes])
    const record = encodeRecord(offset, bytes)
    this.#append = this.#append.then(async () => {
      await this.#file.write(this.#end, record)
      for (const { length } of record) this.#end += length
    })
    await this.#append
    this.#map.add(first, end)
  }

  #giveUp(cause: unknown): Promise<void> {
    this.#givingUp ??= this.#markBroken(cause)
    return this.#givingUp
  }

  /** Has the file itself say that something is missing, before the disk is written. */
  async #markBroken(cause: unknown): Promise<void> {
    const reason = cause instanceof Error ? cause.message : String(cause)
    this.#error = new NodevisorError(
      'ERR_DISK_IO',
      `The undo log '${this.#file.path}' is incomplete, because something could not be kept (${reason}): free some ` +
        'space where it is, and begin another one',
      { path: this.#file.path, cause },
    )
    try {
      await this.#file.write(0, [encodeHeader(this.#base.size, STATE_BROKEN)])
    } catch {
      // Who uses the log in this process looks at the error; there is nobody else to tell.
    }
  }
}

function encodeHeader(diskSize: number, state: number): Uint8Array {
  const header = Buffer.alloc(HEADER_SIZE)
  MAGIC.copy(header)
  header.writeUInt32LE(VERSION, VERSION_OFFSET)
  header.writeBigUInt64LE(BigInt(diskSize), DISK_SIZE_OFFSET)
  header.writeUInt32LE(state, STATE_OFFSET)
  header.writeUInt32LE(crc32(header.subarray(0, HEADER_CHECKSUM_OFFSET)), HEADER_CHECKSUM_OFFSET)
  return header
}

function encodeRecord(offset: number, bytes: Uint8Array): Uint8Array[] {
  const isEmpty = isZero(bytes)
  const header = Buffer.alloc(RECORD_HEADER_SIZE)
  header.writeBigUInt64LE(BigInt(offset), OFFSET_OFFSET)
  header.writeUInt32LE(bytes.length, LENGTH_OFFSET)
  header.writeUInt32LE(isEmpty ? KIND_ZEROS : KIND_BYTES, KIND_OFFSET)
  header.writeUInt32LE(isEmpty ? 0 : crc32(bytes), BYTES_CHECKSUM_OFFSET)
  header.writeUInt32LE(crc32(header.subarray(0, RECORD_CHECKSUM_OFFSET)), RECORD_CHECKSUM_OFFSET)
  return isEmpty ? [header] : [header, bytes]
}

async function checkHeader(file: DiskFile, diskSize: number): Promise<void> {
  const { path } = file
  const header = Buffer.alloc(HEADER_SIZE)
  if (file.size >= HEADER_SIZE) await file.read(0, [header])
  if (!header.subarray(0, MAGIC.length).equals(MAGIC)) {
    throw formatError(path, `'${path}' is not an undo log of nodevisor: name one`)
  }
  const version = header.readUInt32LE(VERSION_OFFSET)
  if (version !== VERSION) {
    throw formatError(
      path,
      `Expected an undo log of version ${VERSION} but '${path}' has ${version}: use the nodevisor that made it`,
    )
  }
  if (header.readUInt32LE(HEADER_CHECKSUM_OFFSET) !== crc32(header.subarray(0, HEADER_CHECKSUM_OFFSET))) {
    throw formatError(path, `The header of the undo log '${path}' is damaged: restore the disk from a copy`)
  }
  const size = header.readBigUInt64LE(DISK_SIZE_OFFSET)
  if (size !== BigInt(diskSize)) {
    throw formatError(
      path,
      `The undo log '${path}' is about a disk of ${size} bytes but this one has ${diskSize}: give it the disk that ` +
        'it was made for',
    )
  }
  if (header.readUInt32LE(STATE_OFFSET) !== 0) {
    throw formatError(
      path,
      `The undo log '${path}' is incomplete, something could not be kept: restore the disk from a copy`,
    )
  }
}

/**
 * All records that were written to their ends, in order. What they are about lies within the disk.
 *
 * @throws `ERR_DISK_FORMAT` at the first one that is damaged
 */
async function readRecords(
  file: DiskFile,
  diskSize: number,
  visit: (record: UndoRecord) => Request,
): Promise<void> {
  const header = Buffer.alloc(RECORD_HEADER_SIZE)
  let position = HEADER_SIZE
  for (let count = 1; position + RECORD_HEADER_SIZE <= file.size; count++) {
    if (count % RECORDS_PER_TURN === 0) await nextTurn()
    await file.read(position, [header])
    const offset = Number(header.readBigUInt64LE(OFFSET_OFFSET))
    const length = header.readUInt32LE(LENGTH_OFFSET)
    const kind = header.readUInt32LE(KIND_OFFSET)
    const isSound =
      header.readUInt32LE(RECORD_CHECKSUM_OFFSET) === crc32(header.subarray(0, RECORD_CHECKSUM_OFFSET)) &&
      kind <= KIND_ZEROS &&
      isDiskSize(length) &&
      length <= COPY_PIECE &&
      offset % CLUSTER_SIZE === 0 &&
      (offset + length === diskSize || (offset + length < diskSize && length % CLUSTER_SIZE === 0))
    if (!isSound) throw damageError(file.path, position)
    const start = position + RECORD_HEADER_SIZE
    position = kind === KIND_ZEROS ? start : start + length
    if (position > file.size) return
    let bytes: Uint8Array | undefined
    if (kind === KIND_BYTES) {
      bytes = new Uint8Array(length)
      await file.read(start, [bytes])
    }
    const checksum = bytes === undefined ? 0 : crc32(bytes)
    if (header.readUInt32LE(BYTES_CHECKSUM_OFFSET) !== checksum) throw damageError(file.path, start)
    await visit({ offset, length, bytes })
  }
}

function writeBack({ offset, length, bytes }: UndoRecord, disk: BlockBackend): Request {
  if (bytes !== undefined) return disk.write(offset, [bytes])
  if (disk.writeZeroes !== undefined) return disk.writeZeroes(offset, length, true)
  return disk.write(offset, [zeros(length)])
}

function damageError(path: string, position: number): NodevisorError {
  return formatError(path, `The undo log '${path}' is damaged at ${position}: restore the disk from a copy`)
}

function formatError(path: string, message: string): NodevisorError {
  return new NodevisorError('ERR_DISK_FORMAT', message, { path })
}
