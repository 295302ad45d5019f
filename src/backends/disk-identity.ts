import type { BlockBackend } from '../virtio/block-backend.js'
import type { FileIdentity } from './disk-file.js'
import { FileDisk } from './file-disk.js'
import { MemoryDisk } from './memory-disk.js'
import { OverlayDisk } from './overlay-disk.js'
import { SharedDisk } from './shared-disk.js'

/**
 * Which disk it is, as plain data: enough to open it again, and to see whether its files were written since.
 *
 * What is on `memory`, `temporary-overlay` and `custom` disks is nowhere to be found again: save their contents.
 */
export type DiskIdentity =
  | ({ readonly kind: 'file' } & FileIdentity)
  | ({ readonly kind: 'overlay'; readonly base: DiskIdentity } & FileIdentity)
  | { readonly kind: 'temporary-overlay'; readonly base: DiskIdentity }
  | { readonly kind: 'memory' }
  | { readonly kind: 'custom'; readonly size: number }

/** The identity of a disk and what is below it. Flushes them; nothing may write to them meanwhile. */
export async function diskIdentity(disk: BlockBackend): Promise<DiskIdentity> {
  if (disk instanceof SharedDisk) return diskIdentity(disk.inner)
  if (disk instanceof FileDisk) return { kind: 'file', ...(await disk.identity()) }
  if (disk instanceof MemoryDisk) return { kind: 'memory' }
  if (!(disk instanceof OverlayDisk)) return { kind: 'custom', size: disk.size }
  const file = await disk.identity()
  const base = await diskIdentity(disk.base)
  return file === undefined ? { kind: 'temporary-overlay', base } : { kind: 'overlay', ...file, base }
}
