import { fileURLToPath } from 'node:url'
import { invalidArgument, NodevisorError } from '../errors.js'
import type { SnapshotProgress } from '../snapshot/memory-file.js'
import { checkHost, readSnapshot } from '../snapshot/snapshot-folder.js'
import type { SnapshotHost, SnapshotParent } from '../snapshot/state-file.js'
import type { MachineParts } from './builder.js'
import { openRecordedDisks, type RecordedDiskOptions } from './disk-records.js'
import { openHost } from './host.js'
import { checkBoolean, checkObject } from './options.js'
import type { SavedMachine } from './saved-machine.js'

/** How a snapshot is written. */
export interface SnapshotFileOptions {
  /**
   * Only the pages that have changed since the last snapshot that this machine was written to, or was restored from,
   * which is needed from then on: false unless given.
   */
  readonly incremental?: boolean
  /** Called again and again; at the end with `done` equal to `total`. */
  readonly onProgress?: (progress: SnapshotProgress) => void
  /** Gives it up. */
  readonly signal?: AbortSignal
}

/** How a checkpoint is taken. */
export type CheckpointOptions = Omit<SnapshotFileOptions, 'incremental'>

const CHECKPOINT_KEYS = ['onProgress', 'signal'] as const
const SNAPSHOT_KEYS = ['incremental', ...CHECKPOINT_KEYS] as const

/** Checks what a user passed. */
export function checkSnapshotFileOptions(options: SnapshotFileOptions): void {
  checkObject('options', options, SNAPSHOT_KEYS)
  const { incremental, ...others } = options
  checkBoolean('incremental', incremental)
  checkCheckpointOptions(others)
}

/** Checks what a user passed. */
export function checkCheckpointOptions(options: CheckpointOptions): void {
  checkObject('options', options, CHECKPOINT_KEYS)
  const { onProgress, signal } = options
  if (onProgress !== undefined && typeof onProgress !== 'function') {
    throw invalidArgument('onProgress', 'a function', onProgress)
  }
  if (signal !== undefined && !(signal instanceof AbortSignal)) {
    throw invalidArgument('signal', 'an AbortSignal', signal)
  }
}

/** The path of a snapshot, as a user passed it. */
export function checkSnapshotPath(path: unknown): string {
  if (path instanceof URL && path.protocol === 'file:') return fileURLToPath(path)
  if (typeof path === 'string' && path !== '') return path
  throw invalidArgument('path', 'a path or a file: URL', path)
}

/** What a snapshot says of the host it is taken on. */
export function describeHost({ host, cpu }: Pick<MachineParts, 'host' | 'cpu'>): SnapshotHost {
  return { kind: host.kind, processor: host.processor, features: cpu.features }
}

/** A snapshot of a folder, ready to make a machine of. */
export interface ReadSnapshot {
  readonly saved: SavedMachine
  /** What the machine's next incremental snapshot builds on. */
  readonly parent: SnapshotParent
  /** Absolute paths of its folder, and of those that it has the changes of. */
  readonly chain: readonly string[]
  close(): void
}

/**
 * Reads a snapshot that this host can go on with.
 *
 * @throws `ERR_SNAPSHOT_*`
 */
export async function readSnapshotFolder(
  path: string,
  diskOptions: RecordedDiskOptions,
): Promise<ReadSnapshot> {
  const { record, memory, chain } = await readSnapshot(path)
  try {
    const { hardware, execution, state, disks, id } = record
    const host = openHost()
    const cpu = host.describeCpu(undefined, hardware.apicIds.length, hardware.irqchip !== 'none')
    checkHost(record, { kind: host.kind, features: cpu.features })
    if (hardware.disks.length !== disks.length) throw otherDisks(path)
    const openDisks = () => openRecordedDisks(disks, path, diskOptions)
    return {
      saved: { hardware, execution, state, memory, openDisks },
      parent: { path, id },
      chain,
      close: () => memory.close(),
    }
  } catch (error) {
    memory.close()
    throw error
  }
}

function otherDisks(path: string): NodevisorError {
  return new NodevisorError(
    'ERR_SNAPSHOT_DAMAGED',
    `Expected a record for each disk in the snapshot '${path}' but there are more or fewer; take it again`,
    { path },
  )
}
