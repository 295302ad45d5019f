import { crc32 } from 'node:zlib'
import { NodevisorError } from '../errors.js'
import { MAP_PAGE_SIZE } from './cluster-map.js'

/**
 * Bytes that are in the overlay or in the base as a whole: a page, which is what guests write, so that hardly any write
 * has to copy the rest of a cluster from the base.
 */
export const CLUSTER_SIZE = 4096

/** Bytes of the header; the map follows. */
export const HEADER_SIZE = 4096

const VERSION = 1
const MAGIC = Buffer.from('nodevisor overlay\n')

// Offsets in the header; numbers are little-endian, what is not named is zero.
const VERSION_OFFSET = 20
const CLUSTER_SIZE_OFFSET = 24
const BASE_SIZE_OFFSET = 32
const CHECKSUM_OFFSET = HEADER_SIZE - 4

/** Where things are in an overlay's file. */
export interface OverlayLayout {
  /** Clusters of the disk; the last may be cut off. */
  readonly clusters: number
  /** Offset of the disk's first byte. */
  readonly dataOffset: number
  /** Bytes of the whole file. */
  readonly fileSize: number
}

/** The layout of an overlay over `baseSize` bytes. */
export function layoutOf(baseSize: number): OverlayLayout {
  const clusters = Math.ceil(baseSize / CLUSTER_SIZE)
  const dataOffset = HEADER_SIZE + Math.ceil(clusters / 8 / MAP_PAGE_SIZE) * MAP_PAGE_SIZE
  return { clusters, dataOffset, fileSize: dataOffset + baseSize }
}

/** The header of an overlay over `baseSize` bytes. */
export function encodeHeader(baseSize: number): Uint8Array {
  const header = Buffer.alloc(HEADER_SIZE)
  MAGIC.copy(header)
  header.writeUInt32LE(VERSION, VERSION_OFFSET)
  header.writeUInt32LE(CLUSTER_SIZE, CLUSTER_SIZE_OFFSET)
  header.writeBigUInt64LE(BigInt(baseSize), BASE_SIZE_OFFSET)
  header.writeUInt32LE(checksumOf(header), CHECKSUM_OFFSET)
  return header
}

/**
 * Checks that a file with this header and size is an overlay over `baseSize` bytes.
 *
 * @throws `ERR_DISK_FORMAT`
 */
export function checkHeader(path: string, bytes: Uint8Array, fileSize: number, baseSize: number): void {
  const header = Buffer.from(bytes.buffer, bytes.byteOffset, bytes.length)
  const refuse = (message: string) => {
    throw new NodevisorError('ERR_DISK_FORMAT', message, { path })
  }
  if (!header.subarray(0, MAGIC.length).equals(MAGIC)) {
    refuse(
      `'${path}' is not an overlay of nodevisor: name one, or a file that does not exist yet to make one`,
    )
  }
  const version = header.readUInt32LE(VERSION_OFFSET)
  if (version !== VERSION) {
    refuse(
      `Expected an overlay of version ${VERSION} but '${path}' has ${version}: open it with the nodevisor that made it`,
    )
  }
  if (header.readUInt32LE(CHECKSUM_OFFSET) !== checksumOf(header)) {
    refuse(`The header of the overlay '${path}' is damaged: restore the file from a copy`)
  }
  const clusterSize = header.readUInt32LE(CLUSTER_SIZE_OFFSET)
  if (clusterSize !== CLUSTER_SIZE) {
    refuse(
      `Expected clusters of ${CLUSTER_SIZE} bytes but those of the overlay '${path}' have ${clusterSize}`,
    )
  }
  const size = header.readBigUInt64LE(BASE_SIZE_OFFSET)
  if (size !== BigInt(baseSize)) {
    refuse(
      `The overlay '${path}' was made over ${size} bytes but the base has ${baseSize}: give it the base that it ` +
        'was made over, unchanged',
    )
  }
  const expected = layoutOf(baseSize).fileSize
  if (fileSize !== expected) {
    refuse(
      `Expected the overlay '${path}' to have ${expected} bytes but it has ${fileSize}: it was cut off or extended; ` +
        'restore it from a copy',
    )
  }
}

function checksumOf(header: Buffer): number {
  return crc32(header.subarray(0, CHECKSUM_OFFSET))
}
