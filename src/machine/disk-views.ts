import { OverlayDisk } from '../backends/overlay-disk.js'
import type { DiskView, SharedDisk } from '../backends/shared-disk.js'
import type { BlockBackend } from '../virtio/block-backend.js'
import { closeDisks } from './disks.js'

/** What is on the disks of a machine that stands still, for as long as somebody reads it. All of them, or none. */
export function viewDisks(disks: readonly SharedDisk[]): Promise<DiskView[]> {
  return openAll(disks, (disk) => disk.view())
}

/** Disks that are as the views, and keep what is written to themselves. All of them, or none. */
export function openCopies(views: readonly DiskView[]): Promise<OverlayDisk[]> {
  return openAll(views, async (view) => {
    const base = view.share()
    try {
      return await OverlayDisk.open({ base })
    } catch (error) {
      await base.close()
      throw error
    }
  })
}

async function openAll<Source, Disk extends BlockBackend>(
  sources: readonly Source[],
  open: (source: Source) => Promise<Disk>,
): Promise<Disk[]> {
  const opened: Disk[] = []
  try {
    for (const source of sources) opened.push(await open(source))
    return opened
  } catch (error) {
    await closeDisks(opened)
    throw error
  }
}
