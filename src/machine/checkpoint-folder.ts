import { constants, promises as fs, ftruncateSync, writeSync } from 'node:fs'
import { basename, dirname, join, resolve } from 'node:path'
import { diskIdentity } from '../backends/disk-identity.js'
import type { SharedDisk } from '../backends/shared-disk.js'
import { syncPath } from '../backends/sync-path.js'
import { UndoLog } from '../backends/undo-log.js'
import { binding, systemError } from '../binding.js'
import { NodevisorError } from '../errors.js'
import { readError, type SnapshotInfo, writeError } from '../snapshot/snapshot-folder.js'
import { damaged } from '../snapshot/state-file.js'
import type { BlockBackend } from '../virtio/block-backend.js'
import { canOpen } from './disk-records.js'
import { closeDisks } from './disks.js'
import { type ReadSnapshot, readSnapshotFolder } from './snapshot-files.js'

/** The longest chain of checkpoints, the full one included: the longer, the more there is in it that is out of date. */
const MAX_CHAIN = 16

const CURRENT = 'current'
const LOCK = 'lock'
const UNDO = 'undo'
/** What replaces a file gets its name when it is complete. */
const NEW = '.new'
/** The name of a snapshot, one that is being written included. */
const SNAPSHOT_NAME = /^(\d{6,15})(\.[0-9a-f]+\.new)?$/
const UNDO_NAME = /^(\d{6,15})-disk\d+(\.new)?$/
/** What the first checkpoint leaves if it does not come to its end; `options` is the command's. */
const BEGINNING = /^(lock|undo|(current|options)\.new|options|000001(\.[0-9a-f]+\.new)?)$/
const CURRENT_CONTENT = /^(\d{6,15})\n$/
const MAX_CURRENT_SIZE = 16
const EAGAIN = -11

/** What a checkpoint is taken of. */
export interface CheckpointSource {
  readonly disks: readonly SharedDisk[]
  /** Path of the snapshot that an incremental one would have the changes since. */
  readonly lastWritten: string | undefined
  /** Gives it up. */
  readonly signal: AbortSignal | undefined
  /**
   * Writes a snapshot.
   *
   * @param onStill - to be called at the moment that it is of, while the machine stands still
   */
  write(path: string, incremental: boolean, onStill: () => Promise<void>): Promise<SnapshotInfo>
}

/** A log that keeps what a disk is at a checkpoint. */
interface AttachedLog {
  readonly disk: SharedDisk
  readonly log: UndoLog
}

/**
 * A folder with checkpoints of a machine, of which the last one that is whole counts: its number is in the file
 * `current`. It is a snapshot, `000002` say, with those that it has the changes of, and for each disk in a file an undo
 * log, `undo/000002-disk0`, that takes the disk back to that moment. docs/snapshots.md has the format.
 *
 * The file `lock` is locked as long as somebody uses the folder.
 */
export class CheckpointFolder {
  /** Absolute. */
  readonly path: string
  readonly #lock: fs.FileHandle
  /** Of the last checkpoint that is whole: 0 before the first. */
  #number: number
  /** Numbers of the snapshots that the last one needs, itself included. */
  #chain: readonly number[] = []
  #logs: readonly AttachedLog[] = []

  private constructor(path: string, lock: fs.FileHandle, number: number) {
    this.path = path
    this.#lock = lock
    this.#number = number
  }

  /**
   * Begins a folder, which is made if there is none.
   *
   * @throws `ERR_SNAPSHOT_WRITE` where it is in use, or has anything in it
   */
  static async create(folder: string): Promise<CheckpointFolder> {
    const path = resolve(folder)
    try {
      await makeFolder(path)
      const names = await fs.readdir(path)
      const isCheckpointed = names.includes(CURRENT)
      if (!isCheckpointed && !names.every((name) => BEGINNING.test(name))) throw notEmpty(path)
      const lock = await lockFolder(path, 'ERR_SNAPSHOT_WRITE')
      try {
        // As it is now that nobody else writes there.
        if (isCheckpointed || (await fs.readdir(path)).includes(CURRENT)) throw ofAnotherMachine(path)
        await makeFolder(join(path, UNDO))
        return new CheckpointFolder(path, lock, 0)
      } catch (error) {
        await lock.close()
        throw error
      }
    } catch (cause) {
      throw writeError(path, cause, undefined)
    }
  }

  /**
   * Opens the folder of a machine that is gone.
   *
   * @throws `ERR_SNAPSHOT_READ` where it is in use, or has no checkpoint that is whole; `ERR_SNAPSHOT_DAMAGED`
   */
  static async open(folder: string): Promise<CheckpointFolder> {
    const path = resolve(folder)
    try {
      // First, as the lock makes a file.
      await readCurrent(path)
      const lock = await lockFolder(path, 'ERR_SNAPSHOT_READ')
      try {
        return new CheckpointFolder(path, lock, await readCurrent(path))
      } catch (error) {
        await lock.close()
        throw error
      }
    } catch (cause) {
      throw readError(path, cause)
    }
  }

  /** Whether a snapshot is one of this folder, and so will be removed. */
  has(snapshot: string): boolean {
    return dirname(snapshot) === this.path
  }

  /**
   * Takes a checkpoint, which counts from then on. If that fails, the last one still does, and the machine can go on.
   *
   * @throws `ERR_SNAPSHOT_WRITE` with the `cause`, or what the source throws that is not about files
   */
  async add({ disks, lastWritten, signal, write }: CheckpointSource): Promise<SnapshotInfo> {
    const number = this.#number + 1
    const path = this.#snapshotPath(number)
    const isIncremental = lastWritten === this.#snapshotPath(this.#number) && this.#chain.length < MAX_CHAIN
    const logs: AttachedLog[] = []
    let info: SnapshotInfo
    try {
      // What an earlier one has left that failed.
      await this.#clean()
      info = await write(path, isIncremental, async () => {
        for (const [index, disk] of await disksInFiles(disks)) {
          logs.push(await attachLog(disk, this.#logPath(number, index)))
        }
      })
      for (const { log } of logs) if (log.error !== undefined) throw log.error
      signal?.throwIfAborted()
      await this.#setCurrent(number)
    } catch (error) {
      await closeLogs(logs)
      // What is still there then is looked for by the next one.
      await this.#clean().catch(() => {})
      throw asWriteError(path, error)
    }
    const before = this.#logs
    this.#logs = logs
    this.#number = number
    this.#chain = isIncremental ? [...this.#chain, number] : [number]
    await closeLogs(before)
    try {
      await syncPath(this.path)
      await this.#clean()
    } catch (cause) {
      throw notCleaned(path, cause)
    }
    return info
  }

  /**
   * Reads the last checkpoint. When its disks are opened, they are taken back to it.
   *
   * @throws `ERR_SNAPSHOT_*`
   */
  async read(): Promise<ReadSnapshot> {
    const path = this.#snapshotPath(this.#number)
    const read = await readSnapshotFolder(path, { overlay: false, unchanged: false })
    this.#chain = await this.#numbersOf(read.chain)
    const openDisks = async () => {
      const disks = await read.saved.openDisks()
      try {
        for (const [index, disk] of await disksInFiles(disks)) {
          await UndoLog.rollBack(this.#logPath(this.#number, index), disk)
        }
        return disks
      } catch (error) {
        await closeDisks(disks)
        throw error
      }
    }
    return { ...read, saved: { ...read.saved, openDisks } }
  }

  /**
   * Begins the logs of the last checkpoint anew, for the machine that was made of it. Its disks are as {@link read} has
   * opened them.
   *
   * @throws `ERR_SNAPSHOT_READ`, `ERR_DISK_*`
   */
  async goOn(disks: readonly SharedDisk[]): Promise<void> {
    const logs: AttachedLog[] = []
    this.#logs = logs
    try {
      await this.#clean()
      for (const [index, disk] of await disksInFiles(disks)) {
        const path = this.#logPath(this.#number, index)
        logs.push(await attachLog(disk, `${path}${NEW}`))
        await fs.rename(`${path}${NEW}`, path)
      }
    } catch (cause) {
      throw readError(this.#snapshotPath(this.#number), cause)
    }
  }

  /** Leaves the folder to others, as it is. Disks must not be written any more, nor checkpoints be under way. */
  async close(): Promise<void> {
    await closeLogs(this.#logs)
    await this.#lock.close()
  }

  #snapshotPath(number: number): string {
    return join(this.path, nameOf(number))
  }

  #logPath(number: number, disk: number): string {
    return join(this.path, UNDO, `${nameOf(number)}-disk${disk}`)
  }

  /** From then on that checkpoint is the one that counts, whatever happens to this process. */
  async #setCurrent(number: number): Promise<void> {
    const path = join(this.path, CURRENT)
    await fs.writeFile(`${path}${NEW}`, `${nameOf(number)}\n`)
    await syncPath(`${path}${NEW}`)
    await fs.rename(`${path}${NEW}`, path)
  }

  /** Removes what the last checkpoint does not need. */
  async #clean(): Promise<void> {
    const removeOthers = async (folder: string, pattern: RegExp, kept: readonly number[]) => {
      for (const name of await fs.readdir(folder)) {
        const [, digits, isUnfinished] = pattern.exec(name) ?? []
        if (digits === undefined || (isUnfinished === undefined && kept.includes(Number(digits)))) continue
        await fs.rm(join(folder, name), { recursive: true, force: true })
      }
    }
    await removeOthers(this.path, SNAPSHOT_NAME, this.#chain)
    await removeOthers(join(this.path, UNDO), UNDO_NAME, [this.#number])
  }

  /** Which of these snapshots are in this folder. */
  async #numbersOf(snapshots: readonly string[]): Promise<number[]> {
    const path = await fs.realpath(this.path)
    return snapshots
      .filter((snapshot) => dirname(snapshot) === path && SNAPSHOT_NAME.test(basename(snapshot)))
      .map((snapshot) => Number.parseInt(basename(snapshot), 10))
  }
}

function nameOf(number: number): string {
  return String(number).padStart(6, '0')
}

/** Those disks that a recovered machine finds again as they were left: they have to be taken back. By their index. */
async function disksInFiles<Disk extends BlockBackend>(disks: readonly Disk[]): Promise<[number, Disk][]> {
  const found: [number, Disk][] = []
  for (const [index, disk] of disks.entries()) {
    if (!disk.readOnly && canOpen(await diskIdentity(disk))) found.push([index, disk])
  }
  return found
}

async function attachLog(disk: SharedDisk, path: string): Promise<AttachedLog> {
  const log = await UndoLog.create(path, disk.inner)
  disk.attach(log)
  return { disk, log }
}

async function closeLogs(logs: readonly AttachedLog[]): Promise<void> {
  for (const { disk, log } of logs) disk.detach(log)
  await Promise.allSettled(logs.map(({ log }) => log.close()))
}

async function makeFolder(path: string): Promise<void> {
  await fs.mkdir(path).catch((error: NodeJS.ErrnoException) => {
    if (error.code !== 'EEXIST') throw error
  })
}

async function readCurrent(folder: string): Promise<number> {
  const path = join(folder, CURRENT)
  const file = await fs.open(path, constants.O_RDONLY | constants.O_NONBLOCK).catch((error) => {
    throw error.code === 'ENOENT' ? noCheckpoint(folder, error) : error
  })
  try {
    const { buffer, bytesRead } = await file.read(Buffer.alloc(MAX_CURRENT_SIZE + 1), 0)
    const [, digits] = CURRENT_CONTENT.exec(buffer.toString('latin1', 0, bytesRead)) ?? []
    if (Number(digits) > 0) return Number(digits)
    throw damaged(path, 'expected the number of a checkpoint, with six digits or more, and a newline')
  } finally {
    await file.close()
  }
}

/** Locks a folder, for as long as the file is open, and says there who does. */
async function lockFolder(
  folder: string,
  code: 'ERR_SNAPSHOT_READ' | 'ERR_SNAPSHOT_WRITE',
): Promise<fs.FileHandle> {
  const file = await fs.open(join(folder, LOCK), constants.O_RDWR | constants.O_CREAT, 0o644)
  try {
    const result = binding().fileIo.lock(file.fd, true)
    if (result === EAGAIN) throw inUse(code, folder, await readLock(file))
    if (result < 0) throw systemError('fcntl(F_OFD_SETLK)', -result)
    // At once, for those that come next.
    ftruncateSync(file.fd)
    writeSync(file.fd, `${process.pid}\n`)
    return file
  } catch (error) {
    await file.close()
    throw error
  }
}

/** The number of the process that has the lock. */
async function readLock(file: fs.FileHandle): Promise<string> {
  const { buffer, bytesRead } = await file.read(Buffer.alloc(MAX_CURRENT_SIZE), 0)
  return /^\d+/.exec(buffer.toString('latin1', 0, bytesRead))?.[0] ?? 'unknown'
}

function asWriteError(path: string, error: unknown): NodevisorError {
  const isOfMachine = error instanceof NodevisorError && !error.code.startsWith('ERR_DISK_')
  return isOfMachine ? error : writeError(path, error, undefined)
}

function inUse(
  code: 'ERR_SNAPSHOT_READ' | 'ERR_SNAPSHOT_WRITE',
  path: string,
  processId: string,
): NodevisorError {
  return new NodevisorError(
    code,
    `Expected a folder of checkpoints that nobody uses but process ${processId} uses '${path}'; end that first, or choose ` +
      'another folder',
    { path, process: processId },
  )
}

function notEmpty(path: string): NodevisorError {
  return new NodevisorError(
    'ERR_SNAPSHOT_WRITE',
    `Expected an empty folder for checkpoints but there is something in '${path}'; choose another one`,
    { path },
  )
}

function ofAnotherMachine(path: string): NodevisorError {
  return new NodevisorError(
    'ERR_SNAPSHOT_WRITE',
    `Expected an empty folder for checkpoints but '${path}' has those of another machine; recover that one, or choose ` +
      'another folder',
    { path },
  )
}

function noCheckpoint(path: string, cause: unknown): NodevisorError {
  return new NodevisorError(
    'ERR_SNAPSHOT_READ',
    `Expected a folder with checkpoints but '${path}' has none that is whole; correct the path, or start the machine anew`,
    { path, cause },
  )
}

function notCleaned(path: string, cause: unknown): NodevisorError {
  const reason = cause instanceof Error ? cause.message : String(cause)
  return new NodevisorError(
    'ERR_SNAPSHOT_WRITE',
    `The checkpoint '${path}' is whole but what it replaces could not be removed (${reason}); see the cause: the folder ` +
      'grows until that is possible',
    { path, cause },
  )
}
