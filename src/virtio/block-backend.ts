/** Bytes of a sector: capacities and offsets of virtio-blk count in them (VIRTIO 1.2, 5.2.4). */
export const SECTOR_SIZE = 512

/** Whether a disk can have that many bytes. */
export function isDiskSize(size: unknown): size is number {
  return Number.isSafeInteger(size) && (size as number) > 0 && (size as number) % SECTOR_SIZE === 0
}

/** Longest serial number of a disk, in bytes (VIRTIO 1.2, 5.2.6: VIRTIO_BLK_T_GET_ID). */
export const VIRTIO_BLK_ID_BYTES = 20

/**
 * What a disk is on the host's side: bytes that can be read and written from any sector on, in any order, with many
 * requests at a time. Files, memory and copy-on-write overlays are backends; so is anything else of this shape.
 *
 * All offsets and lengths are in bytes, multiples of 512, and lie within {@link size}: the device checks them. Buffers
 * are guest memory itself, which the guest may change at any time; they stay valid until the request is done.
 *
 * Each method starts a request and returns a promise that settles when it is done; `undefined` says that it is done
 * already. A request that fails rejects (or throws): the guest gets VIRTIO_BLK_S_IOERR. Requests may be done in any
 * order; those that overlap have no order among themselves until one is done.
 */
export interface BlockBackend {
  /** Bytes, a multiple of 512; does not change. */
  readonly size: number
  /** The guest is told so, and {@link write} and the like are never called. */
  readonly readOnly: boolean
  /** Bytes of the blocks that it works in: smaller writes cost a read. 512 unless given; a power of two. */
  readonly blockSize?: number
  /** Fills the buffers from `offset` on. */
  read(offset: number, buffers: readonly Uint8Array[]): Promise<void> | undefined
  /** Writes the buffers from `offset` on. Not durable before a {@link flush} that starts after it was done. */
  write(offset: number, buffers: readonly Uint8Array[]): Promise<void> | undefined
  /** Makes durable what was written: it survives the end of this process, and of the host. */
  flush(): Promise<void> | undefined
  /** Gives up the bytes, which then read as anything. The guest is not offered it where it is missing. */
  discard?(offset: number, length: number): Promise<void> | undefined
  /**
   * Makes the bytes zero, without having to write them. The guest is not offered it where it is missing.
   *
   * @param mayDiscard - the space may be given back
   */
  writeZeroes?(offset: number, length: number, mayDiscard: boolean): Promise<void> | undefined
  /** Waits for the requests under way, then gives back what it holds. May be called twice. */
  close(): Promise<void>
}
