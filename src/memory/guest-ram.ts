import { binding, type NativeGuestRam } from '../binding.js'
import { invalidArgument } from '../errors.js'
import { PAGE_SIZE } from './layout.js'

/** How RAM is made. */
export interface GuestRamOptions {
  /** Bytes, a multiple of the page size. */
  readonly size: number
  /** Use huge pages of this size, reserved by the administrator beforehand; ordinary pages if undefined. */
  readonly hugePages?: '2M' | '1G' | undefined
}

const HUGE_PAGE_SIZES = { '2M': 2 ** 21, '1G': 2 ** 30 } as const

/** Memory of the host, in a memfd, that memory slots can point to. Pages come as they are touched. */
export class GuestRam {
  /** Bytes. */
  readonly size: number
  /** The addon's object. @internal */
  readonly native: NativeGuestRam

  /** @throws `ERR_MEMORY_SIZE` where the host cannot give that much, or no huge pages */
  constructor(options: GuestRamOptions) {
    const { size, hugePages } = options
    if (!Number.isSafeInteger(size) || size <= 0 || size % PAGE_SIZE !== 0) {
      throw invalidArgument('size', `a multiple of ${PAGE_SIZE} above 0`, size)
    }
    if (hugePages !== undefined && !Object.hasOwn(HUGE_PAGE_SIZES, hugePages)) {
      throw invalidArgument('hugePages', "'2M' or '1G'", hugePages)
    }
    const hugePageSize = hugePages === undefined ? 0 : HUGE_PAGE_SIZES[hugePages]
    const rounded = hugePageSize === 0 ? size : Math.ceil(size / hugePageSize) * hugePageSize
    this.size = size
    this.native = new (binding().GuestRam)(rounded, hugePageSize)
  }

  /** The memfd. Whoever maps it sees what the guest sees. */
  get fd(): number {
    return this.native.fd()
  }

  /** `length` bytes from `offset` on, in place: no copy. Detached by {@link close}. */
  buffer(offset = 0, length = this.size - offset): ArrayBuffer {
    return this.native.buffer(offset, length)
  }

  /** Detaches every buffer. The host's memory is freed with the last VM that has a slot here. */
  close(): void {
    this.native.close()
  }
}
