import { join } from 'node:path'
import { saveContents } from '../backends/disk-contents.js'
import { type DiskIdentity, diskIdentity } from '../backends/disk-identity.js'
import { FileDisk } from '../backends/file-disk.js'
import { OverlayDisk } from '../backends/overlay-disk.js'
import type { DiskView, SharedDisk } from '../backends/shared-disk.js'
import { NodevisorError } from '../errors.js'
import type { DiskRecord } from '../snapshot/state-file.js'
import type { BlockBackend } from '../virtio/block-backend.js'
import { asReadOnly, closeDisks } from './disks.js'

/** How disks of a snapshot are opened. */
export interface RecordedDiskOptions {
  /** Whether what is written is kept nowhere, and the disks' files stay as they are. */
  readonly overlay: boolean
  /** Whether files must not have changed since: not where somebody else has made them what they were. */
  readonly unchanged: boolean
}

/** The disks of a machine that stands still, on their way into a snapshot. */
export class DiskRecording {
  readonly #disks: readonly RecordedDisk[]

  private constructor(disks: readonly RecordedDisk[]) {
    this.#disks = disks
  }

  /** Looks at disks, and keeps what is on those that nobody could open again. All of them, or none. */
  static async begin(disks: readonly SharedDisk[]): Promise<DiskRecording> {
    const recorded: RecordedDisk[] = []
    try {
      for (const disk of disks) {
        const identity = await diskIdentity(disk)
        recorded.push({ disk, identity, view: canOpen(identity) ? undefined : await disk.view() })
      }
      return new DiskRecording(recorded)
    } catch (error) {
      await closeDisks(recorded.flatMap(({ view }) => view ?? []))
      throw error
    }
  }

  /** What a snapshot says of the disks. Contents go into files of its folder; the machine may run meanwhile. */
  async write(folder: string): Promise<DiskRecord[]> {
    const records: DiskRecord[] = []
    for (const [index, { disk, identity, view }] of this.#disks.entries()) {
      const { readOnly } = disk
      if (view === undefined) {
        // Plain data all through, which types of named fields do not say.
        records.push({ ...(identity as object), kind: identity.kind, readOnly })
        continue
      }
      const file = `disk${index}.raw`
      await saveContents(view, join(folder, file))
      records.push({ kind: 'contents', file, size: disk.size, readOnly })
    }
    return records
  }

  async close(): Promise<void> {
    await closeDisks(this.#disks.flatMap(({ view }) => view ?? []))
  }
}

/** In the snapshot's folder, and nowhere else. */
const CONTENTS_NAME = /^disk\d+\.raw$/

interface RecordedDisk {
  readonly disk: SharedDisk
  readonly identity: DiskIdentity
  readonly view: DiskView | undefined
}

/**
 * Opens the disks of a snapshot: all of them, or none.
 *
 * @param folder - the snapshot's
 * @throws `ERR_SNAPSHOT_MISMATCH` for one that has changed, `ERR_DISK_*`
 */
export async function openRecordedDisks(
  records: readonly DiskRecord[],
  folder: string,
  options: RecordedDiskOptions,
): Promise<BlockBackend[]> {
  const opened: BlockBackend[] = []
  try {
    for (const record of records) opened.push(await openRecord(record, folder, options))
    return opened
  } catch (error) {
    await closeDisks(opened)
    throw error
  }
}

async function openRecord(
  record: DiskRecord,
  folder: string,
  { overlay, unchanged }: RecordedDiskOptions,
): Promise<BlockBackend> {
  const readOnly = record.readOnly === true
  if (record.kind === 'contents') {
    const file = textOf(record, 'file')
    if (!CONTENTS_NAME.test(file)) throw unknownDisk(record)
    // An overlay, too, where nobody writes: the next snapshot is to have the contents, and not to name this one's file.
    const disk = await overlayOver(await FileDisk.open({ path: join(folder, file), readOnly: true }))
    return readOnly ? asReadOnly(disk) : disk
  }
  const disk = await openIdentity(record, readOnly || overlay)
  try {
    const identity = await diskIdentity(disk)
    if (!isSame(record, identity, unchanged)) throw changedDisk(record)
  } catch (error) {
    await disk.close()
    throw error
  }
  return overlay && !readOnly ? overlayOver(disk) : disk
}

async function openIdentity(record: DiskRecord, readOnly: boolean): Promise<BlockBackend> {
  if (record.kind === 'file') return FileDisk.open({ path: textOf(record, 'path'), readOnly })
  if (record.kind !== 'overlay') throw unknownDisk(record)
  const base = await openIdentity(recordOf(record, 'base'), true)
  try {
    return await OverlayDisk.open({ base, path: textOf(record, 'path') })
  } catch (error) {
    await base.close()
    throw error
  }
}

async function overlayOver(base: BlockBackend): Promise<BlockBackend> {
  try {
    return await OverlayDisk.open({ base })
  } catch (error) {
    await base.close()
    throw error
  }
}

/** Whether the disk is in files that can be opened again. */
export function canOpen(identity: DiskIdentity): boolean {
  if (identity.kind === 'file') return true
  return identity.kind === 'overlay' && canOpen(identity.base)
}

/** Whether a disk, and what is below it, is the one of a record. */
function isSame(record: DiskRecord, identity: DiskIdentity, unchanged: boolean): boolean {
  if (record.kind !== identity.kind || (identity.kind !== 'file' && identity.kind !== 'overlay')) return false
  if (record.size !== identity.size) return false
  if (unchanged && record.modified !== identity.modified) return false
  return identity.kind === 'file' || isSame(recordOf(record, 'base'), identity.base, true)
}

function textOf(record: DiskRecord, key: string): string {
  const value = record[key]
  if (typeof value === 'string' && value !== '' && !value.includes('\0')) return value
  throw unknownDisk(record)
}

function recordOf(record: DiskRecord, key: string): DiskRecord {
  const value = record[key]
  const isRecord = typeof value === 'object' && value !== null && 'kind' in value
  if (isRecord) return value as DiskRecord
  throw unknownDisk(record)
}

function unknownDisk(record: DiskRecord): NodevisorError {
  return new NodevisorError(
    'ERR_SNAPSHOT_DAMAGED',
    `Expected a disk that is a file, an overlay or in the snapshot but received one of kind '${record.kind}'`,
    { disk: record },
  )
}

function changedDisk(record: DiskRecord): NodevisorError {
  return new NodevisorError(
    'ERR_SNAPSHOT_MISMATCH',
    `Expected the disk '${String(record.path)}' as it was when the snapshot was taken but it has been written since, and a ` +
      'guest that goes on with it would destroy what is on it; put back a copy of that time, or pass other disks',
    { disk: record },
  )
}
