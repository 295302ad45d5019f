import { rm } from 'node:fs/promises'
import { isZero } from '../memory/is-zero.js'
import type { BlockBackend } from '../virtio/block-backend.js'
import { COPY_PIECE, DiskFile } from './disk-file.js'

/** Bytes that are left out of the file where they are all zero. */
const HOLE_SIZE = 65536

/**
 * Copies all that is on a disk to a new raw image, where zeros take no space, and makes its bytes durable; its name is
 * once the folder is synced. The disk must not change meanwhile: pause the machine, or copy a {@link DiskView}.
 *
 * @throws `ERR_DISK_OPEN` where the file is there already or could not be made, `ERR_DISK_IO`; no file is left then
 */
export async function saveContents(disk: BlockBackend, path: string): Promise<void> {
  const file = await DiskFile.create(path, disk.size, 0o666, path)
  try {
    const piece = new Uint8Array(COPY_PIECE)
    for (let offset = 0; offset < disk.size; offset += COPY_PIECE) {
      const bytes = piece.subarray(0, disk.size - offset)
      await disk.read(offset, [bytes])
      await writeSparse(file, offset, bytes)
    }
    await file.flush()
  } catch (error) {
    await Promise.all([file.close(), rm(path, { force: true })])
    throw error
  }
  await file.close()
}

/** Writes what is not zero, neighbours together. */
async function writeSparse(file: DiskFile, offset: number, bytes: Uint8Array): Promise<void> {
  const isHole = (at: number) => isZero(bytes.subarray(at, at + HOLE_SIZE))
  for (let start = 0; start < bytes.length; ) {
    let end = start
    while (end < bytes.length && !isHole(end)) end += HOLE_SIZE
    await file.write(offset + start, [bytes.subarray(start, end)])
    // What ended this was a hole, or there is no more.
    start = end + HOLE_SIZE
  }
}
