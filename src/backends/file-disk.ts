import { invalidArgument, NodevisorError } from '../errors.js'
import { type BlockBackend, isDiskSize, SECTOR_SIZE } from '../virtio/block-backend.js'
import { totalLength } from './buffer-list.js'
import { DiskFile, type FileIdentity } from './disk-file.js'
import { checkRange, type Request, Requests } from './requests.js'

/** Bytes of a page of the page cache: a write of less may have to read the rest first. */
const PAGE_CACHE_BLOCK = 4096

/** Which file a {@link FileDisk} is. */
export interface FileDiskOptions {
  /** A raw image, or a block device. It has to exist; its size is the disk's, a multiple of 512. */
  readonly path: string
  /** Only read it. Any number of machines can, at the same time. false unless given. */
  readonly readOnly?: boolean
}

/**
 * A disk whose bytes are those of a file, one to one: a raw image.
 *
 * While it is open the file is locked, against all who ask: other disks in this or another process, and QEMU.
 */
export class FileDisk implements BlockBackend {
  readonly size: number
  readonly readOnly: boolean
  readonly blockSize = PAGE_CACHE_BLOCK
  readonly #file: DiskFile
  readonly #requests = new Requests()
  #closed: Promise<void> | undefined

  private constructor(file: DiskFile) {
    this.#file = file
    this.size = file.size
    this.readOnly = file.readOnly
  }

  /**
   * Opens and locks the file.
   *
   * @throws `ERR_DISK_OPEN` where that is not possible, `ERR_DISK_IN_USE` where somebody else has it open,
   *   `ERR_DISK_FORMAT` where its size is not that of a disk
   */
  static async open(options: FileDiskOptions): Promise<FileDisk> {
    const { path, readOnly = false } = options
    if (typeof readOnly !== 'boolean') throw invalidArgument('readOnly', 'a boolean', readOnly)
    const file = await DiskFile.open(path, readOnly)
    if (isDiskSize(file.size)) return new FileDisk(file)
    await file.close()
    const size = Math.max(Math.ceil(file.size / SECTOR_SIZE), 1) * SECTOR_SIZE
    throw new NodevisorError(
      'ERR_DISK_FORMAT',
      `Expected a multiple of ${SECTOR_SIZE} bytes above 0 for the size of '${path}' but it has ${file.size}: ` +
        `"truncate -s ${size} ${path}" makes it one`,
      { path, size: file.size },
    )
  }

  /** The file, as it was named. */
  get path(): string {
    return this.#file.path
  }

  read(offset: number, buffers: readonly Uint8Array[]): Request {
    checkRange(this.size, offset, totalLength(buffers))
    return this.#requests.start(() => this.#file.read(offset, buffers))
  }

  write(offset: number, buffers: readonly Uint8Array[]): Request {
    checkRange(this.size, offset, totalLength(buffers))
    return this.#requests.start(() => this.#file.write(offset, buffers))
  }

  /** Rejects for ever once it has: what the host could not write may be lost. */
  flush(): Request {
    return this.#requests.start(() => this.#file.flush())
  }

  /** Gives the space back to the file system where it takes it; what is there afterwards is zero, or as before. */
  discard(offset: number, length: number): Request {
    checkRange(this.size, offset, length)
    return this.#requests.start(() => this.#file.discard(offset, length))
  }

  writeZeroes(offset: number, length: number, mayDiscard: boolean): Request {
    checkRange(this.size, offset, length)
    return this.#requests.start(() => this.#file.writeZeroes(offset, length, mayDiscard))
  }

  /** Which file it is, and when it was written last. Flushes before. */
  async identity(): Promise<FileIdentity> {
    await this.flush()
    return this.#file.identity()
  }

  /** Lets others open the file, until {@link reclaim}: see {@link DiskFile.release}. @internal */
  release(): void {
    this.#file.release()
  }

  /** @throws `ERR_DISK_IN_USE`, as {@link DiskFile.reclaim} @internal */
  reclaim(): void {
    this.#file.reclaim()
  }

  close(): Promise<void> {
    this.#closed ??= this.#close()
    return this.#closed
  }

  async #close(): Promise<void> {
    this.#file.abandon()
    await this.#requests.close()
    await this.#file.close()
  }
}
