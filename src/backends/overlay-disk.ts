import { randomBytes } from 'node:crypto'
import { link, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { dirname, join } from 'node:path'
import { setImmediate as nextTurn } from 'node:timers/promises'
import { invalidArgument, NodevisorError } from '../errors.js'
import { isZero } from '../memory/is-zero.js'
import { type BlockBackend, isDiskSize, SECTOR_SIZE } from '../virtio/block-backend.js'
import { BufferCursor, totalLength } from './buffer-list.js'
import { CLUSTERS_PER_PAGE, ClusterMap, MAP_PAGE_SIZE, type SavedPage } from './cluster-map.js'
import { COPY_PIECE, DiskFile, type FileIdentity, openError, zeros } from './disk-file.js'
import { CLUSTER_SIZE, checkHeader, encodeHeader, HEADER_SIZE, layoutOf } from './overlay-header.js'
import { RangeLocks } from './range-locks.js'
import { begin, checkRange, Flushes, type Request, Requests, settle } from './requests.js'
import { syncPath } from './sync-path.js'

/** Runs of clusters that a read has under way at a time, and between which the event loop has no turn. */
const MAX_RUNS = 64

/** Bytes of the disk that a page of the map is about: what is done in one piece does not cross their borders. */
const PIECE_SIZE = CLUSTERS_PER_PAGE * CLUSTER_SIZE

/** Clusters that {@link OverlayDisk.preserve} copies at a time. */
const COPY_CLUSTERS = COPY_PIECE / CLUSTER_SIZE

const NO_BYTES = new Uint8Array(0)

/** What an {@link OverlayDisk} lies over, and where it is kept. */
export interface OverlayDiskOptions {
  /** What is read where nothing was written. It is never written, and closed together with the overlay. */
  readonly base: BlockBackend
  /**
   * The file with what was written; made if there is none, and valid only together with the same base. Unless given,
   * what was written is discarded when the disk is closed; it takes space in the folder for temporary files.
   */
  readonly path?: string | undefined
}

/**
 * A disk that reads as another one until it is written to, and keeps what is written for itself.
 *
 * The file is sparse: a header, a map with a bit for each cluster that is in the file, and the clusters, each at its
 * offset on the disk. docs/disks.md has the format. What makes it survive a crash at any moment: a cluster's data is
 * written first, and its bit only by the next flush, after that data is durable. So a bit that is set always stands
 * for the data of a flush, and a bit that is missing for a write that was never flushed.
 */
export class OverlayDisk implements BlockBackend {
  readonly size: number
  readonly readOnly = false
  readonly blockSize = CLUSTER_SIZE
  readonly #base: BlockBackend
  readonly #file: DiskFile
  readonly #map: ClusterMap
  /** Where the disk's first byte is in the file. */
  readonly #dataOffset: number
  readonly #kept: boolean
  readonly #requests = new Requests()
  /** Clusters that are getting into the overlay. */
  readonly #locks = new RangeLocks()
  readonly #flushes = new Flushes(() => this.#save())
  #closed: Promise<void> | undefined

  private constructor(
    base: BlockBackend,
    file: DiskFile,
    map: ClusterMap,
    dataOffset: number,
    kept: boolean,
  ) {
    this.#base = base
    this.#file = file
    this.#map = map
    this.#dataOffset = dataOffset
    this.#kept = kept
    this.size = base.size
  }

  /**
   * Opens the overlay's file and locks it, or makes one. The base stays the caller's if that fails.
   *
   * @throws `ERR_DISK_OPEN` where that is not possible, `ERR_DISK_IN_USE` where somebody else has it open,
   *   `ERR_DISK_FORMAT` where the file is not an overlay over this base
   */
  static async open(options: OverlayDiskOptions): Promise<OverlayDisk> {
    const { base, path } = options
    if (typeof base?.read !== 'function' || !isDiskSize(base.size)) {
      throw invalidArgument('base', `a disk with a multiple of ${SECTOR_SIZE} bytes`, base)
    }
    if (path === undefined) return OverlayDisk.#makeTemporary(base)
    try {
      return await OverlayDisk.#openFile(base, path)
    } catch (error) {
      if (!isCausedBy(error, 'ENOENT')) throw error
    }
    try {
      return await OverlayDisk.#makeFile(base, path)
    } catch (error) {
      if (!isCausedBy(error, 'EEXIST')) throw error
    }
    // Somebody else has made it in the meantime.
    return OverlayDisk.#openFile(base, path)
  }

  static async #openFile(base: BlockBackend, path: string): Promise<OverlayDisk> {
    const file = await DiskFile.open(path, false)
    try {
      const header = new Uint8Array(HEADER_SIZE)
      if (file.size >= HEADER_SIZE) await file.read(0, [header])
      checkHeader(path, header, file.size, base.size)
    } catch (error) {
      await file.close()
      throw error
    }
    const map = new ClusterMap((index, bytes) => file.read(HEADER_SIZE + index * MAP_PAGE_SIZE, [bytes]))
    return new OverlayDisk(base, file, map, layoutOf(base.size).dataOffset, true)
  }

  static async #makeFile(base: BlockBackend, path: string): Promise<OverlayDisk> {
    const { fileSize, dataOffset } = layoutOf(base.size)
    // It gets its name when it is complete, so that there never is a half of one.
    const unfinished = `${path}.${randomBytes(6).toString('hex')}.new`
    const file = await DiskFile.create(unfinished, fileSize, 0o666, path)
    try {
      await file.write(0, [encodeHeader(base.size)])
      await file.flush()
      await link(unfinished, path)
      await rm(unfinished)
      await syncPath(dirname(path))
    } catch (error) {
      await Promise.all([file.close(), rm(unfinished, { force: true })])
      throw openError(error, path, false)
    }
    return new OverlayDisk(base, file, new ClusterMap(), dataOffset, true)
  }

  static async #makeTemporary(base: BlockBackend): Promise<OverlayDisk> {
    const path = join(tmpdir(), `nodevisor-${randomBytes(6).toString('hex')}.overlay`)
    // Nobody opens it again, so it needs neither header nor map.
    const file = await DiskFile.create(path, base.size, 0o600, path)
    try {
      await rm(path)
    } catch (error) {
      await file.close()
      throw openError(error, path, false)
    }
    return new OverlayDisk(base, file, new ClusterMap(), 0, false)
  }

  /** What it lies over. */
  get base(): BlockBackend {
    return this.#base
  }

  /** The file with what was written, as it was named; undefined where that is discarded in the end. */
  get path(): string | undefined {
    return this.#kept ? this.#file.path : undefined
  }

  read(offset: number, buffers: readonly Uint8Array[]): Request {
    const length = totalLength(buffers)
    checkRange(this.size, offset, length)
    return this.#requests.start(() => this.#readRuns(offset, offset + length, new BufferCursor(buffers)))
  }

  write(offset: number, buffers: readonly Uint8Array[]): Request {
    const length = totalLength(buffers)
    checkRange(this.size, offset, length)
    return this.#requests.start(() => this.#write(offset, buffers, length))
  }

  flush(): Request {
    return this.#requests.start(() => (this.#kept ? this.#flushes.request() : undefined))
  }

  /** What was given up reads as zeros, and does not show the base again. */
  discard(offset: number, length: number): Request {
    checkRange(this.size, offset, length)
    return this.#requests.start(() => {
      const [first, end] = this.#wholeClusters(offset, offset + length)
      return first < end ? this.#clear(first, end, true) : undefined
    })
  }

  writeZeroes(offset: number, length: number, mayDiscard: boolean): Request {
    checkRange(this.size, offset, length)
    return this.#requests.start(() => this.#writeZeroes(offset, offset + length, mayDiscard))
  }

  /**
   * Takes what the base has in these clusters into the overlay, where that is not done yet. Afterwards the base may be
   * changed there: the overlay still reads as before, and so do reads that are under way.
   */
  preserve(offset: number, length: number): Request {
    checkRange(this.size, offset, length)
    const first = Math.floor(offset / CLUSTER_SIZE)
    const end = Math.ceil((offset + length) / CLUSTER_SIZE)
    return this.#requests.start(() => (this.#map.hasAll(first, end) ? undefined : this.#preserve(first, end)))
  }

  /** Which file the overlay is, and when it was written last. Flushes before. undefined where {@link path} is. */
  async identity(): Promise<FileIdentity | undefined> {
    await this.flush()
    return this.#kept ? this.#file.identity() : undefined
  }

  /** Lets others open the file, until {@link reclaim}: see {@link DiskFile.release}. @internal */
  release(): void {
    this.#file.release()
  }

  /** @throws `ERR_DISK_IN_USE`, as {@link DiskFile.reclaim} @internal */
  reclaim(): void {
    this.#file.reclaim()
  }

  /** Flushes if it has to: a cluster that no flush has covered would be lost. */
  close(): Promise<void> {
    this.#closed ??= this.#close()
    return this.#closed
  }

  async #close(): Promise<void> {
    this.#file.abandon()
    await this.#requests.close()
    const results = await Promise.allSettled([this.#kept && this.#map.hasChanged ? this.#save() : undefined])
    results.push(...(await Promise.allSettled([this.#file.close(), this.#base.close()])))
    for (const result of results) if (result.status === 'rejected') throw result.reason
  }

  /** Reads from the overlay or the base, whichever has it, run by run. */
  #readRuns(offset: number, end: number, buffers: BufferCursor): Request {
    const pending: Promise<void>[] = []
    let position = offset
    for (let runs = 0; position < end; runs++) {
      const cluster = Math.floor(position / CLUSTER_SIZE)
      const load = runs === MAX_RUNS ? nextTurn() : this.#map.load(cluster)
      if (load !== undefined) {
        return settle([...pending, load])?.then(() => this.#readRuns(position, end, buffers))
      }
      const runEnd = this.#map.runEnd(cluster, Math.ceil(end / CLUSTER_SIZE)) * CLUSTER_SIZE
      const stop = Math.min(runEnd, end)
      const part = buffers.take(stop - position)
      const start = position
      const request = this.#map.has(cluster)
        ? this.#file.read(this.#dataOffset + start, part)
        : this.#readBaseRun(start, stop, part)
      if (request !== undefined) pending.push(request)
      position = stop
    }
    return settle(pending)
  }

  /** Reads clusters that only the base has; those that {@link preserve} takes meanwhile once more, from the overlay. */
  #readBaseRun(offset: number, end: number, buffers: readonly Uint8Array[]): Request {
    return begin(() => this.#base.read(offset, buffers))?.then(() => {
      const first = Math.floor(offset / CLUSTER_SIZE)
      const last = Math.ceil(end / CLUSTER_SIZE)
      const isAsBefore = !this.#map.has(first) && this.#map.runEnd(first, last) === last
      return isAsBefore ? undefined : this.#readRuns(offset, end, new BufferCursor(buffers))
    })
  }

  #write(offset: number, buffers: readonly Uint8Array[], length: number): Request {
    if (length === 0) return undefined
    const end = offset + length
    const cluster = Math.floor(offset / CLUSTER_SIZE)
    const endCluster = Math.ceil(end / CLUSTER_SIZE)
    if (this.#map.hasAll(cluster, endCluster)) return this.#file.write(this.#dataOffset + offset, buffers)
    return this.#writeClusters(offset, end, new BufferCursor(buffers))
  }

  /** Writes, and takes the clusters into the overlay that are not in there. */
  async #writeClusters(offset: number, end: number, buffers: BufferCursor): Promise<void> {
    for (let start = offset; start < end; ) {
      const stop = Math.min(end, start - (start % PIECE_SIZE) + PIECE_SIZE)
      await this.#writePiece(start, stop, buffers.take(stop - start))
      start = stop
    }
  }

  async #writePiece(start: number, stop: number, buffers: readonly Uint8Array[]): Promise<void> {
    const first = Math.floor(start / CLUSTER_SIZE)
    const end = Math.ceil(stop / CLUSTER_SIZE)
    const release = await this.#locks.acquire(first, end)
    try {
      await this.#map.load(first)
      // Only its first and its last cluster may be covered in part.
      const [head, tail] = await Promise.all([
        this.#map.has(first) ? NO_BYTES : this.#readBase(first * CLUSTER_SIZE, start),
        this.#map.has(end - 1) ? NO_BYTES : this.#readBase(stop, Math.min(end * CLUSTER_SIZE, this.size)),
      ])
      await this.#file.write(this.#dataOffset + start - head.length, [head, ...buffers, tail])
      this.#map.add(first, end)
    } finally {
      release()
    }
  }

  async #readBase(offset: number, end: number): Promise<Uint8Array> {
    if (offset === end) return NO_BYTES
    const bytes = new Uint8Array(end - offset)
    await this.#base.read(offset, [bytes])
    return bytes
  }

  async #preserve(first: number, end: number): Promise<void> {
    for (let start = first; start < end; ) {
      const stop = Math.min(end, start - (start % COPY_CLUSTERS) + COPY_CLUSTERS)
      await this.#preservePiece(start, stop)
      start = stop
    }
  }

  async #preservePiece(first: number, end: number): Promise<void> {
    const release = await this.#locks.acquire(first, end)
    try {
      await this.#map.load(first)
      for (let start = first; start < end; ) {
        const stop = this.#map.runEnd(start, end)
        if (!this.#map.has(start)) await this.#copyFromBase(start, stop)
        start = stop
      }
    } finally {
      release()
    }
  }

  async #copyFromBase(first: number, end: number): Promise<void> {
    const offset = first * CLUSTER_SIZE
    const bytes = await this.#readBase(offset, Math.min(end * CLUSTER_SIZE, this.size))
    if (isZero(bytes)) await this.#file.writeZeroes(this.#dataOffset + offset, bytes.length, true)
    else await this.#file.write(this.#dataOffset + offset, [bytes])
    this.#map.add(first, end)
  }

  async #writeZeroes(offset: number, end: number, mayDiscard: boolean): Promise<void> {
    const [first, last] = this.#wholeClusters(offset, end)
    if (first >= last) {
      await this.#write(offset, [zeros(end - offset)], end - offset)
      return
    }
    const start = first * CLUSTER_SIZE
    const stop = Math.min(last * CLUSTER_SIZE, this.size)
    await this.#write(offset, [zeros(start - offset)], start - offset)
    await this.#clear(first, last, mayDiscard)
    await this.#write(stop, [zeros(end - stop)], end - stop)
  }

  /** Makes clusters zero, in the overlay. */
  async #clear(first: number, end: number, mayDiscard: boolean): Promise<void> {
    const release = await this.#locks.acquire(first, end)
    try {
      await this.#map.load(first)
      await this.#map.load(end - 1)
      const start = first * CLUSTER_SIZE
      const length = Math.min(end * CLUSTER_SIZE, this.size) - start
      await this.#file.writeZeroes(this.#dataOffset + start, length, mayDiscard)
      this.#map.add(first, end)
    } finally {
      release()
    }
  }

  /** The clusters that lie within a range of bytes. The disk's last one may be cut off. */
  #wholeClusters(offset: number, end: number): [first: number, end: number] {
    const last = end === this.size ? Math.ceil(end / CLUSTER_SIZE) : Math.floor(end / CLUSTER_SIZE)
    return [Math.ceil(offset / CLUSTER_SIZE), last]
  }

  async #save(): Promise<void> {
    const pages = this.#map.takeChanged()
    try {
      await this.#file.flush()
      if (pages.length === 0) return
      await this.#writeMap(pages)
      await this.#file.flush()
    } catch (error) {
      this.#map.putBack(pages)
      throw error
    }
  }

  /** Writes pages of the map, neighbours together. */
  async #writeMap(pages: readonly SavedPage[]): Promise<void> {
    for (let i = 0; i < pages.length; ) {
      const { index } = pages[i]!
      const neighbours: Uint8Array[] = []
      while (pages[i]?.index === index + neighbours.length) neighbours.push(pages[i++]!.bytes)
      await this.#file.write(HEADER_SIZE + index * MAP_PAGE_SIZE, neighbours)
    }
  }
}

function isCausedBy(error: unknown, code: string): boolean {
  const cause = error instanceof NodevisorError ? error.cause : undefined
  return (cause as NodeJS.ErrnoException | undefined)?.code === code
}
