import { NodevisorError } from '../errors.js'
import type { BlockBackend } from '../virtio/block-backend.js'
import { totalLength } from './buffer-list.js'
import { OverlayDisk } from './overlay-disk.js'
import { checkRange, closedError, type Request, Requests, settle } from './requests.js'

/** Keeps what was on a disk before that is written. */
export interface Preserver {
  /**
   * Keeps what these bytes are, unless it has done so already: they are written when this is done. It never fails:
   * what cannot be kept is the loss of who wants it back, not of who writes.
   */
  preserve(offset: number, length: number): Request
}

/**
 * A disk that can be copied while it is in use: all goes to the inner disk, but {@link view} gives what is on it now,
 * which stays readable whatever is written afterwards (copy-before-write).
 *
 * As long as there are no views and nothing is attached, it costs a comparison or two a request.
 */
export class SharedDisk implements BlockBackend {
  readonly size: number
  readonly readOnly: boolean
  readonly blockSize?: number
  readonly discard?: (offset: number, length: number) => Request
  readonly writeZeroes?: (offset: number, length: number, mayDiscard: boolean) => Request
  /** Where the bytes are. Closed together with this disk and its views. */
  readonly inner: BlockBackend
  readonly #preservers = new Set<Preserver>()
  /** Those that began while somebody else used the inner disk, too: else it counts them itself. */
  readonly #requests = new Requests()
  /** This disk, until it is closed, and the views: the last one closes the inner disk. */
  #users = 1
  #closed: Promise<void> | undefined

  constructor(inner: BlockBackend) {
    const { size, readOnly, blockSize } = inner
    this.inner = inner
    this.size = size
    this.readOnly = readOnly
    if (blockSize !== undefined) this.blockSize = blockSize
    if (inner.discard !== undefined) {
      this.discard = (offset, length) => {
        if (this.#isAlone) return inner.discard!(offset, length)
        return this.#change(offset, length, () => inner.discard!(offset, length))
      }
    }
    if (inner.writeZeroes !== undefined) {
      this.writeZeroes = (offset, length, mayDiscard) => {
        if (this.#isAlone) return inner.writeZeroes!(offset, length, mayDiscard)
        return this.#change(offset, length, () => inner.writeZeroes!(offset, length, mayDiscard))
      }
    }
  }

  read(offset: number, buffers: readonly Uint8Array[]): Request {
    if (this.#isAlone) return this.inner.read(offset, buffers)
    return this.#requests.start(() => this.inner.read(offset, buffers))
  }

  write(offset: number, buffers: readonly Uint8Array[]): Request {
    if (this.#isAlone) return this.inner.write(offset, buffers)
    return this.#change(offset, totalLength(buffers), () => this.inner.write(offset, buffers))
  }

  flush(): Request {
    if (this.#isAlone) return this.inner.flush()
    return this.#requests.start(() => this.inner.flush())
  }

  /**
   * What is on the disk now. No request of this disk may be under way from the call until it resolves: pause the
   * machine. The view keeps what is overwritten in an unlinked file in the folder for temporary files.
   *
   * @throws `ERR_DISK_OPEN` where that file could not be made, `ERR_CLOSED`
   */
  async view(): Promise<DiskView> {
    if (this.#closed !== undefined) throw closedError()
    this.#users += 1
    const base: BlockBackend = {
      size: this.size,
      readOnly: true,
      read: (offset, buffers) => this.inner.read(offset, buffers),
      write: refuseWrite,
      flush: () => undefined,
      close: () => this.#release(),
    }
    let overlay: OverlayDisk
    try {
      overlay = await OverlayDisk.open({ base })
    } catch (error) {
      await this.#release()
      throw error
    }
    const bytes = new PreservedBytes(overlay, this.inner.blockSize, () => this.detach(bytes))
    this.attach(bytes)
    return new DiskView(bytes)
  }

  /** Whether somebody relies on what is overwritten being kept: a view, or what was attached. */
  get isKept(): boolean {
    return this.#users > 1 || this.#preservers.size > 0
  }

  /** Has it keep what is overwritten from now on. No request may be under way: pause the machine. */
  attach(preserver: Preserver): void {
    this.#preservers.add(preserver)
  }

  /** It need not keep what is overwritten from now on. What it has under way goes on. */
  detach(preserver: Preserver): void {
    this.#preservers.delete(preserver)
  }

  /**
   * Waits for the requests under way, and closes the inner disk, or flushes it where views are left: the last of them
   * closes it.
   */
  close(): Promise<void> {
    this.#closed ??= this.#close()
    return this.#closed
  }

  async #close(): Promise<void> {
    await this.#requests.close()
    try {
      if (this.#users > 1) await this.inner.flush()
    } finally {
      await this.#release()
    }
  }

  async #release(): Promise<void> {
    this.#users -= 1
    if (this.#users === 0) await this.inner.close()
  }

  /** Whether requests can go straight to the inner disk. */
  get #isAlone(): boolean {
    return this.#users === 1 && this.#preservers.size === 0 && this.#closed === undefined
  }

  #change(offset: number, length: number, request: () => Request): Request {
    checkRange(this.size, offset, length)
    return this.#requests.start(() => {
      const pending: Promise<void>[] = []
      for (const preserver of this.#preservers) {
        const preserving = preserver.preserve(offset, length)
        if (preserving !== undefined) pending.push(preserving)
      }
      const preserved = settle(pending)
      return preserved === undefined ? request() : preserved.then(request)
    })
  }
}

/**
 * What was on a {@link SharedDisk} at some moment, to be read only. Put an overlay over it to write.
 *
 * Once something could not be kept (the folder for temporary files is full, say), all its requests fail with
 * `ERR_DISK_IO`: the disk goes on instead.
 */
export class DiskView implements BlockBackend {
  readonly size: number
  readonly readOnly = true
  readonly blockSize?: number
  readonly #bytes: PreservedBytes
  readonly #requests = new Requests()
  #closed: Promise<void> | undefined

  /** @internal */
  constructor(bytes: PreservedBytes) {
    this.#bytes = bytes
    this.size = bytes.size
    if (bytes.blockSize !== undefined) this.blockSize = bytes.blockSize
    bytes.retain()
  }

  /**
   * The same view for somebody else, to be closed on its own: the last one closed gives everything back.
   *
   * @throws `ERR_CLOSED`
   */
  share(): DiskView {
    if (this.#closed !== undefined) throw closedError()
    return new DiskView(this.#bytes)
  }

  read(offset: number, buffers: readonly Uint8Array[]): Request {
    checkRange(this.size, offset, totalLength(buffers))
    return this.#requests.start(() => this.#bytes.read(offset, buffers))
  }

  write(): Request {
    return refuseWrite()
  }

  flush(): Request {
    return this.#requests.start(() => undefined)
  }

  close(): Promise<void> {
    this.#closed ??= this.#close()
    return this.#closed
  }

  async #close(): Promise<void> {
    await this.#requests.close()
    await this.#bytes.release()
  }
}

/** An overlay over a disk that goes on being written: everything is preserved there first. */
class PreservedBytes implements Preserver {
  readonly size: number
  readonly blockSize: number | undefined
  readonly #overlay: OverlayDisk
  readonly #detach: () => void
  #users = 0
  #failure: NodevisorError | undefined

  constructor(overlay: OverlayDisk, blockSize: number | undefined, detach: () => void) {
    this.size = overlay.size
    this.blockSize = blockSize
    this.#overlay = overlay
    this.#detach = detach
  }

  retain(): void {
    this.#users += 1
  }

  async release(): Promise<void> {
    this.#users -= 1
    if (this.#users > 0) return
    this.#detach()
    await this.#overlay.close()
  }

  preserve(offset: number, length: number): Request {
    if (this.#failure !== undefined) return undefined
    return this.#overlay.preserve(offset, length)?.catch((error) => {
      this.#failure ??= lostError(error)
    })
  }

  read(offset: number, buffers: readonly Uint8Array[]): Request {
    if (this.#failure !== undefined) return Promise.reject(this.#failure)
    return this.#overlay.read(offset, buffers)?.then(() => {
      // It may have read what was written instead.
      if (this.#failure !== undefined) throw this.#failure
    })
  }
}

function refuseWrite(): Promise<never> {
  return Promise.reject(new NodevisorError('ERR_INVALID_ARGUMENT', 'Expected no write to a read-only disk'))
}

function lostError(cause: unknown): NodevisorError {
  const reason = cause instanceof Error ? cause.message : String(cause)
  return new NodevisorError(
    'ERR_DISK_IO',
    `What was on the disk when the machine was forked is lost, because it could not be kept (${reason}): free ` +
      'some space in the folder for temporary files (TMPDIR, else /tmp), and fork again',
    { cause },
  )
}
