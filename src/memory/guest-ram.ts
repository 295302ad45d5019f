import { binding, type NativeGuestRam } from '../binding.js'
import { invalidArgument } from '../errors.js'
import { PAGE_SIZE } from './layout.js'

/** How RAM is made. */
export interface GuestRamOptions {
  /** Bytes, a multiple of the page size. */
  readonly size: number
  /** Use huge pages of this size, reserved by the administrator beforehand; ordinary pages if undefined. */
  readonly hugePages?: '2M' | '1G' | undefined
  /**
   * A file descriptor: the RAM reads as this file until it is written, and the file is never written. The file must be
   * of at least `size` bytes, and stay so: a part that goes missing ends the process with SIGBUS.
   */
  readonly copyOnWriteOf?: number | undefined
}

/** Pages of RAM: pairs of first page and number of pages, in ascending order. */
export type PageRuns = Uint32Array

const HUGE_PAGE_SIZES = { '2M': 2 ** 21, '1G': 2 ** 30 } as const

/**
 * Memory of the host that memory slots can point to: a memfd, or a copy-on-write mapping of a file. Pages come as they
 * are touched.
 */
export class GuestRam {
  /** Bytes. */
  readonly size: number
  /** The addon's object. @internal */
  readonly native: NativeGuestRam
  #isCopyOnWrite: boolean

  /** @throws `ERR_MEMORY_SIZE` where the host cannot give that much, or no huge pages */
  constructor(options: GuestRamOptions) {
    const { size, hugePages, copyOnWriteOf } = options
    if (!Number.isSafeInteger(size) || size <= 0 || size % PAGE_SIZE !== 0) {
      throw invalidArgument('size', `a multiple of ${PAGE_SIZE} above 0`, size)
    }
    if (hugePages !== undefined && !Object.hasOwn(HUGE_PAGE_SIZES, hugePages)) {
      throw invalidArgument('hugePages', "'2M' or '1G'", hugePages)
    }
    const hugePageSize = hugePages === undefined ? 0 : HUGE_PAGE_SIZES[hugePages]
    const rounded = hugePageSize === 0 ? size : Math.ceil(size / hugePageSize) * hugePageSize
    this.size = size
    this.native = new (binding().GuestRam)(rounded, hugePageSize, copyOnWriteOf ?? -1)
    this.#isCopyOnWrite = copyOnWriteOf !== undefined
  }

  /** Whether what is written stays in this mapping, and the file behind it as it is. */
  get isCopyOnWrite(): boolean {
    return this.#isCopyOnWrite
  }

  /** The file behind it. Unless it {@link isCopyOnWrite}, whoever maps it sees what the guest sees. */
  get fd(): number {
    return this.native.fd()
  }

  /** `length` bytes from `offset` on, in place: no copy. Detached by {@link close}. */
  buffer(offset = 0, length = this.size - offset): ArrayBuffer {
    return this.native.buffer(offset, length)
  }

  /**
   * From now on the file behind it keeps what is in there, and what is written stays in this mapping, at the same
   * addresses. It takes as long as the pages that were touched need to be unmapped.
   */
  freeze(): void {
    if (this.#isCopyOnWrite) return
    this.native.copyOnWrite()
    this.#isCopyOnWrite = true
  }

  /** The pages that are not the file's any more, whoever wrote them: the guest, a device or a system call. */
  privatePages(): PageRuns {
    return this.native.privatePages()
  }

  /** Lets pages be the file's again: what was written there is gone. */
  discard(runs: PageRuns): void {
    this.native.discard(runs)
  }

  /** Detaches every buffer. The host's memory is freed with the last VM that has a slot here. */
  close(): void {
    this.native.close()
  }
}
