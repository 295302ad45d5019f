import { fileURLToPath } from 'node:url'
import { FileDisk } from '../backends/file-disk.js'
import { MemoryDisk } from '../backends/memory-disk.js'
import { OverlayDisk } from '../backends/overlay-disk.js'
import { invalidArgument, NodevisorError } from '../errors.js'
import { type BlockBackend, isDiskSize } from '../virtio/block-backend.js'
import { type DiskOptions, parseSize } from './options.js'

/**
 * Opens the disks of a machine: all of them, or none.
 *
 * @throws `ERR_DISK_OPEN`, `ERR_DISK_FORMAT`, `ERR_DISK_IN_USE`, `ERR_INVALID_ARGUMENT`
 */
export async function openDisks(disks: readonly DiskOptions[]): Promise<BlockBackend[]> {
  const opened: BlockBackend[] = []
  try {
    for (const [index, disk] of disks.entries()) opened.push(await openDisk(disk, index))
    return opened
  } catch (error) {
    // Backends of the caller's are the machine's from now on, and so are those that were not come to.
    const others = disks.slice(opened.length + 1).flatMap(({ backend }) => backend ?? [])
    await Promise.allSettled([...opened, ...others].map(async (backend) => backend.close()))
    throw error
  }
}

/** Closes disks, whatever comes of it. */
export async function closeDisks(backends: readonly BlockBackend[]): Promise<void> {
  await Promise.allSettled(backends.map(async (backend) => backend.close()))
}

async function openDisk(disk: DiskOptions, index: number): Promise<BlockBackend> {
  const { overlay = false, readOnly = false } = disk
  // What is below an overlay is never written.
  const base = await openBase(disk, readOnly || overlay !== false, index)
  if (overlay === false) return readOnly ? asReadOnly(base) : base
  try {
    const backend = await OverlayDisk.open({ base, path: overlay === true ? undefined : pathOf(overlay) })
    return readOnly ? asReadOnly(backend) : backend
  } catch (error) {
    await base.close()
    throw error
  }
}

async function openBase(disk: DiskOptions, readOnly: boolean, index: number): Promise<BlockBackend> {
  const { file, memory, backend } = disk
  if (file !== undefined) return FileDisk.open({ path: pathOf(file), readOnly })
  if (memory instanceof Uint8Array) return new MemoryDisk({ bytes: memory })
  if (memory === undefined) return backend!
  const size = parseSize(memory)
  if (!isDiskSize(size)) {
    const expected = "bytes, a multiple of 512, as a number or as text such as '16M', or what is on the disk,"
    throw invalidArgument(`disks[${index}].memory`, expected, memory)
  }
  return new MemoryDisk({ size })
}

/** The same disk, which the guest may not write. */
export function asReadOnly(backend: BlockBackend): BlockBackend {
  if (backend.readOnly) return backend
  const { size, blockSize } = backend
  return {
    size,
    readOnly: true,
    ...(blockSize === undefined ? {} : { blockSize }),
    read: (offset, buffers) => backend.read(offset, buffers),
    write: () =>
      Promise.reject(new NodevisorError('ERR_INVALID_ARGUMENT', 'Expected no write to a read-only disk')),
    flush: () => backend.flush(),
    close: () => backend.close(),
  }
}

function pathOf(place: string | URL): string {
  return typeof place === 'string' ? place : fileURLToPath(place)
}
