import { realpath } from 'node:fs/promises'
import { sep } from 'node:path'
import { diskIdentity } from '../backends/disk-identity.js'
import { FileDisk } from '../backends/file-disk.js'
import { OverlayDisk } from '../backends/overlay-disk.js'
import type { SharedDisk } from '../backends/shared-disk.js'
import type { DeviceState } from '../bus/device.js'
import { NodevisorError, show } from '../errors.js'
import { openRecordedDisks } from '../machine/disk-records.js'
import { objectOf, text } from '../snapshot/decoders.js'
import type { DiskRecord } from '../snapshot/state-file.js'
import type { BlockBackend } from '../virtio/block-backend.js'
import { failed } from './protocol.js'

/** How long the other side may take to let go of the disks' files, in ms, and how often to look. */
const RECLAIM_LIMIT = 5000
const RECLAIM_INTERVAL = 20

/** How many overlays may lie over one another. */
const MAX_OVERLAYS = 16

const absolutePath = text(/^\/[^\0]{0,4095}$/s, 'an absolute path')

/** What the other side has to know of the disks, which are flushed. Nothing may write to them meanwhile. */
export function describeDisks(disks: readonly SharedDisk[]): Promise<DiskRecord[]> {
  return Promise.all(
    disks.map(async (disk) => {
      const identity = (await diskIdentity(disk)) as DiskRecord
      return { ...identity, diskSize: disk.size, readOnly: disk.readOnly }
    }),
  )
}

/**
 * Refuses disks of which a snapshot has a view: what the other side writes would show there.
 *
 * @throws `ERR_MIGRATION_FAILED`
 */
export function checkNotKept(disks: readonly SharedDisk[]): void {
  const index = disks.findIndex((disk) => disk.isKept)
  if (index < 0) return
  throw failed(
    `Expected disks that nothing else depends on but a snapshot or a copy of this machine reads disk${index}; close those first`,
    { disk: index },
  )
}

/** Lets the other side open the disks' files. They have to be flushed. */
export function releaseDisks(disks: readonly SharedDisk[]): void {
  for (const file of disks.flatMap(writtenFiles)) file.release()
}

/**
 * Takes {@link releaseDisks} back. The other side may need a moment to close them.
 *
 * @throws `ERR_DISK_IN_USE`
 */
export async function reclaimDisks(disks: readonly SharedDisk[]): Promise<void> {
  for (const end = performance.now() + RECLAIM_LIMIT; ; ) {
    try {
      reclaimDisksNow(disks)
      return
    } catch (error) {
      if (performance.now() > end) throw error
      await new Promise((resolve) => setTimeout(resolve, RECLAIM_INTERVAL))
    }
  }
}

/** The same, or not at all. @throws `ERR_DISK_IN_USE` */
export function reclaimDisksNow(disks: readonly SharedDisk[]): void {
  for (const file of disks.flatMap(writtenFiles)) file.reclaim()
}

/** What holds a lock that keeps the other side out. */
function writtenFiles(disk: BlockBackend | SharedDisk): (FileDisk | OverlayDisk)[] {
  if ('inner' in disk) return writtenFiles(disk.inner)
  if (disk instanceof FileDisk) return disk.readOnly ? [] : [disk]
  if (!(disk instanceof OverlayDisk)) return []
  return [...(disk.path === undefined ? [] : [disk]), ...writtenFiles(disk.base)]
}

/**
 * Refuses disks that cannot be had here.
 *
 * @param folders - where the other side may name files: it may be anyone
 * @throws `ERR_SNAPSHOT_MISMATCH`
 */
export function checkDisks(records: readonly DiskRecord[], folders: readonly string[]): void {
  for (const [index, record] of records.entries()) {
    checkKind(record, `disk${index}`)
    if (folders.length > 0) continue
    throw new NodevisorError(
      'ERR_SNAPSHOT_MISMATCH',
      `Expected disks for a machine that has some (${records.length}): name the folders in which their files may be as ` +
        'diskFolders, or pass others as disks',
    )
  }
}

function checkKind(record: { readonly [key: string]: DeviceState }, at: string, depth = 0): void {
  const { kind } = record
  const isOverlay = kind === 'overlay'
  if ((kind !== 'file' && !isOverlay) || depth > MAX_OVERLAYS) {
    throw new NodevisorError(
      'ERR_SNAPSHOT_MISMATCH',
      `Expected disks in files that both sides can open but ${at} is of kind '${kind}'; pass others as disks where the ` +
        'machine is received',
      { disk: at },
    )
  }
  if (isOverlay) checkKind(objectOf(record.base, `${at}.base`), `${at}.base`, depth + 1)
}

/**
 * Opens the disks of a machine that another process had, as it has left them: all of them, or none.
 *
 * @throws `ERR_DISK_*`, `ERR_SNAPSHOT_MISMATCH`
 */
export async function openMovedDisks(
  records: readonly DiskRecord[],
  folders: readonly string[],
  overlay: boolean,
): Promise<BlockBackend[]> {
  checkDisks(records, folders)
  const allowed = await Promise.all(folders.map((folder) => realpath(folder)))
  for (const record of records) {
    for (const path of pathsOf(record)) await checkPath(path, allowed)
  }
  return openRecordedDisks(records, '', { overlay, unchanged: true })
}

/** Of a disk that {@link checkDisks} has seen. */
function pathsOf(record: { readonly [key: string]: DeviceState }): DeviceState[] {
  return [
    record.path!,
    ...(record.kind === 'overlay' ? pathsOf(objectOf(record.base, 'the base of a disk')) : []),
  ]
}

/** The file is there, as an overlay must not be made, and in one of the folders. */
async function checkPath(path: DeviceState, folders: readonly string[]): Promise<void> {
  let real: string
  try {
    real = await realpath(absolutePath(path, 'the path of a disk'))
  } catch (cause) {
    throw new NodevisorError(
      'ERR_DISK_OPEN',
      `Expected the disk ${show(path)} to be here, too, but it cannot be opened: mount where it is under the same path, ` +
        'or pass others as disks',
      { path, cause },
    )
  }
  if (folders.some((folder) => real.startsWith(folder.endsWith(sep) ? folder : `${folder}${sep}`))) return
  throw new NodevisorError(
    'ERR_SNAPSHOT_MISMATCH',
    `Expected a disk in one of the diskFolders (${folders.join(', ')}) but the other side names ${show(real)}`,
    { path: real },
  )
}
