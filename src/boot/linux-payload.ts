import { promisify } from 'node:util'
import { hex, NodevisorError } from '../errors.js'
import { isElf } from './elf.js'
import { formatError, viewOf } from './image-reading.js'
import { LZ4_LEGACY_MAGIC, unpackLz4Legacy } from './lz4.js'
import { parseBzImage } from './setup-header.js'
import { unpackXz, XZ_MAGIC } from './xz.js'

/** The payload's size, unpacked, is in its last four bytes, whatever it is packed with. */
const SIZE_FIELD = 4
/** The largest kernel: all that its page tables map of it (KERNEL_IMAGE_SIZE in asm/page_64_types.h). */
const KERNEL_IMAGE_SIZE = 2 ** 30

/** A way in which a payload may be packed: a magic number, and how it is unpacked to `size` bytes. */
interface Compression {
  readonly name: string
  /** The first bytes, as a little-endian number of `magicSize` bytes. */
  readonly magic: number
  readonly magicSize: 2 | 3 | 4
  /** Missing for those that only the kernel itself can unpack. */
  readonly unpack?: (packed: Uint8Array, size: number) => Uint8Array | Promise<Uint8Array>
}

// boot.rst, "payload_offset"; lib/decompress.c
const COMPRESSIONS: readonly Compression[] = [
  { name: 'gzip', magic: 0x8b1f, magicSize: 2, unpack: unpackGzip },
  { name: 'LZ4', magic: LZ4_LEGACY_MAGIC, magicSize: 4, unpack: withoutSize(unpackLz4Legacy) },
  { name: 'Zstandard', magic: 0xfd2f_b528, magicSize: 4, unpack: withoutSize(unpackZstandard) },
  { name: 'XZ', magic: XZ_MAGIC, magicSize: 4, unpack: withoutSize(unpackXz) },
  { name: 'bzip2', magic: 0x68_5a42, magicSize: 3 },
  { name: 'LZMA', magic: 0x00_005d, magicSize: 3 },
  { name: 'LZO', magic: 0x4f5a_4c89, magicSize: 4 },
]

/**
 * Unpacks a bzImage's payload, the kernel proper as an ELF file, on the host: much faster than the guest's first
 * instructions would.
 *
 * @param memorySize - bytes of guest RAM: more than fits is not unpacked
 * @returns undefined for a bzImage without a payload, which is started as it is
 * @throws `ERR_IMAGE_FORMAT`, `ERR_IMAGE_TRUNCATED`, `ERR_IMAGE_TOO_LARGE`
 */
export async function unpackPayload(image: Uint8Array, memorySize: number): Promise<Uint8Array | undefined> {
  const { payload, initSize } = parseBzImage(image)
  if (payload.length === 0 || isElf(payload)) return payload.length === 0 ? undefined : payload
  const { name, unpack } = findCompression(payload)
  if (unpack === undefined) {
    throw formatError(
      `a payload packed with ${supportedNames().join(', ')}`,
      name,
      'build the kernel with one of these, take its vmlinux, or let it unpack itself (unpack: false)',
      { field: 'payload', compression: name },
    )
  }

  const size = viewOf(payload).getUint32(payload.length - SIZE_FIELD, true)
  if (size === 0 || size > initSize || size > KERNEL_IMAGE_SIZE) {
    const limit = Math.min(initSize, KERNEL_IMAGE_SIZE)
    throw formatError(
      `a payload that unpacks to 1 to ${limit} bytes (init_size)`,
      `${size}`,
      'copy the kernel again',
      { field: 'payload', size, initSize, compression: name },
    )
  }
  if (size > memorySize) {
    throw new NodevisorError(
      'ERR_IMAGE_TOO_LARGE',
      `Expected a kernel that fits into the machine's ${memorySize} bytes of memory but it unpacks to ${size}; ` +
        `give the machine more memory`,
      { size, memorySize },
    )
  }
  let unpacked: Uint8Array
  try {
    unpacked = await unpack(payload, size)
    if (unpacked.length !== size) throw new Error(`it unpacks to ${unpacked.length} bytes, not ${size}`)
  } catch (cause) {
    throw damagedError(name, cause)
  }
  if (isElf(unpacked)) return unpacked
  throw formatError('an ELF file in the payload', `another file of ${size} bytes`, 'copy the kernel again', {
    field: 'payload',
    compression: name,
  })
}

function supportedNames(): string[] {
  return COMPRESSIONS.filter(({ unpack }) => unpack !== undefined).map(({ name }) => name)
}

function findCompression(payload: Uint8Array): Compression {
  const magic = payload.length < 2 * SIZE_FIELD ? 0 : viewOf(payload).getUint32(0, true)
  const found = COMPRESSIONS.find((one) => (magic & (2 ** (8 * one.magicSize) - 1)) >>> 0 === one.magic)
  if (found !== undefined) return found
  throw formatError(
    `a payload packed with ${supportedNames().join(', ')}`,
    `one of ${payload.length} bytes that begins with ${hex(magic)}`,
    'copy the kernel again, or let it unpack itself (unpack: false)',
    { field: 'payload' },
  )
}

function damagedError(compression: string, cause: unknown): NodevisorError {
  const why = cause instanceof Error ? cause.message : String(cause)
  return new NodevisorError(
    'ERR_IMAGE_FORMAT',
    `Expected an intact payload but its ${compression} data is damaged: ${why}; copy the kernel again`,
    { field: 'payload', compression, cause },
  )
}

/** For formats without a size of their own, behind which the kernel's build has put it. */
function withoutSize(unpack: NonNullable<Compression['unpack']>): NonNullable<Compression['unpack']> {
  return (packed, size) => unpack(packed.subarray(0, packed.length - SIZE_FIELD), size)
}

/** gzip ends with the size itself. */
async function unpackGzip(packed: Uint8Array, size: number): Promise<Uint8Array> {
  const { gunzip } = await import('node:zlib')
  return promisify(gunzip)(packed, { maxOutputLength: size })
}

async function unpackZstandard(packed: Uint8Array, size: number): Promise<Uint8Array> {
  const { ZSTDDecoder } = await import('zstddec')
  const decoder = new ZSTDDecoder()
  await decoder.init()
  const unpacked = decoder.decode(packed, size)
  // The decoder says nothing of why: no bytes, for a wrong checksum too.
  if (unpacked.length === 0) throw new Error('the decoder refused it')
  return unpacked
}
