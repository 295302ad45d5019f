// A process, or a worker, that uses a disk until somebody ends it.
import { parentPort, workerData } from 'node:worker_threads'
import { FileDisk } from '../../src/backends/file-disk.js'
import { OverlayDisk } from '../../src/backends/overlay-disk.js'
import { SharedDisk } from '../../src/backends/shared-disk.js'
import { UndoLog } from '../../src/backends/undo-log.js'
import type { BlockBackend } from '../../src/virtio/block-backend.js'
import { type StampedDisk, WRITES_AT_ONCE, writeStamps } from './crash-writes.js'

/** What to do: the argument of a process, as JSON, or a worker's data. */
export interface DiskTask extends StampedDisk {
  readonly path: string
  /** The base of an overlay; none for a raw image. */
  readonly base?: string | undefined
  /** The undo log to begin. */
  readonly undoLog?: string
  /** The number of the first write. */
  readonly first: number
}

export async function openDisk({ path, base }: Pick<DiskTask, 'path' | 'base'>): Promise<BlockBackend> {
  if (base === undefined) return FileDisk.open({ path })
  return OverlayDisk.open({ base: await FileDisk.open({ path: base, readOnly: true }), path })
}

/** Writes and flushes, and tells each number up to which all is flushed. */
async function writeForEver(task: DiskTask): Promise<void> {
  let disk = await openDisk(task)
  if (task.undoLog !== undefined) {
    const shared = new SharedDisk(disk)
    shared.attach(await UndoLog.create(task.undoLog, disk))
    disk = shared
  }
  for (let first = task.first; ; first += WRITES_AT_ONCE) {
    await writeStamps(disk, task, first)
    await disk.flush()
    process.send!(first + WRITES_AT_ONCE - 1)
  }
}

/** Has requests of every kind under way all the time. */
async function keepBusy(task: DiskTask): Promise<void> {
  const disk = await openDisk(task)
  const buffers = [new Uint8Array(disk.size / 2)]
  const forEver = async (request: () => Promise<void> | undefined) => {
    for (;;) await request()
  }
  for (let i = 0; i < 4; i++) {
    void forEver(() => disk.discard!(0, disk.size / 2))
    void forEver(() => disk.writeZeroes!(disk.size / 2, disk.size / 2, i % 2 === 0))
    void forEver(() => disk.write(0, buffers))
    void forEver(() => disk.read(0, buffers))
    void forEver(() => disk.flush())
  }
  await disk.writeZeroes!(0, 512, true)
  parentPort!.postMessage('busy')
}

if (parentPort !== null && workerData?.path !== undefined) await keepBusy(workerData as DiskTask)
else if (process.send !== undefined && process.argv[2]?.startsWith('{'))
  await writeForEver(JSON.parse(process.argv[2]))
