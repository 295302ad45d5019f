import { randomBytes, randomUUID } from 'node:crypto'
import { lstat, mkdir, readdir, realpath, rename, rm, stat, writeFile } from 'node:fs/promises'
import { createRequire } from 'node:module'
import { basename, dirname, join, relative, resolve } from 'node:path'
import { fileURLToPath } from 'node:url'
import { syncPath } from '../backends/sync-path.js'
import { NodevisorError } from '../errors.js'
import type { PageRuns } from '../memory/guest-ram.js'
import type { MemoryImage } from '../memory/machine-ram.js'
import { packageRoot } from '../package-root.js'
import { openFile, readFully } from './files.js'
import { openMemory, type WriteMemoryOptions, writeMemory } from './memory-file.js'
import {
  type DiskRecord,
  damaged,
  decodeState,
  encodeState,
  MAX_STATE_SIZE,
  type SnapshotHost,
  type SnapshotParent,
  type SnapshotRecord,
} from './state-file.js'

/** A snapshot that is on disk. */
export interface SnapshotInfo {
  /** Of its folder: absolute. */
  readonly path: string
  /** A random UUID. */
  readonly id: string
  /** Bytes that it takes on disk. */
  readonly bytes: number
  /** Pages of memory in there that are not just zeros. */
  readonly pages: number
}

/** What a snapshot says beside what is found out as it is written. */
export type SnapshotFacts = Pick<SnapshotRecord, 'host' | 'hardware' | 'execution' | 'state'>

export interface WriteSnapshotOptions extends WriteMemoryOptions {
  /** To write only the pages that have changed since another snapshot, which is needed from then on. */
  readonly changes?: { readonly pages: PageRuns; readonly parent: SnapshotParent } | undefined
  /**
   * Writes those disks that are in no file of the user's, and tells where each disk's bytes are.
   *
   * @param folder - where to: not yet the snapshot's
   */
  writeDisks(folder: string): Promise<readonly DiskRecord[]>
}

const STATE = 'state'
const MEMORY = 'memory'
/** The longest chain of snapshots that have only the changes, the full one included. */
const MAX_CHAIN = 64
/** Bytes that `st_blocks` counts in. */
const BLOCK_SIZE = 512

/**
 * Writes a snapshot: its folder is there once it is whole and durable, and there is none if it fails.
 *
 * @param path - of a folder that does not exist
 * @param image - memory; it has to stay open until this is done, and its machine may run
 * @throws `ERR_SNAPSHOT_WRITE`, with the `cause`
 */
export async function writeSnapshot(
  path: string,
  facts: SnapshotFacts,
  image: MemoryImage,
  options: WriteSnapshotOptions,
): Promise<SnapshotInfo> {
  const target = resolve(path)
  // What there is to be removed if it fails.
  let folder: string | undefined
  try {
    await checkFree(target)
    options.signal?.throwIfAborted()
    const parent = await parentOf(target, image.size, options)
    const unfinished = `${target}.${randomBytes(8).toString('hex')}.new`
    // Memory has secrets.
    await mkdir(unfinished, 0o700)
    folder = unfinished
    const pages = await writeMemory(join(folder, MEMORY), image, options.changes?.pages, options)
    const record: SnapshotRecord = {
      id: randomUUID(),
      created: new Date().toISOString(),
      nodevisor: packageVersion(),
      ...facts,
      disks: await options.writeDisks(folder),
      memory: { size: image.size, pages: options.changes?.pages ?? 'all' },
      ...(parent === undefined ? {} : { parent }),
    }
    const state = encodeState(record)
    // Better now than when it is needed.
    decodeState(state)
    await writeFile(join(folder, STATE), state, { flag: 'wx' })
    const bytes = await syncFiles(folder)
    options.signal?.throwIfAborted()
    await rename(folder, target)
    folder = target
    await syncPath(dirname(target))
    return { path: target, id: record.id, bytes, pages }
  } catch (cause) {
    throw writeError(target, cause, folder === undefined ? undefined : await remove(folder))
  }
}

/** A snapshot that was read. */
export interface SnapshotContents {
  readonly record: SnapshotRecord
  readonly memory: MemoryImage
  /** Absolute paths of its folder, and of those that it has the changes of. */
  readonly chain: readonly string[]
}

/**
 * Reads a snapshot, and the ones of which it has only the changes. Files of memory stay open, and must not change.
 *
 * @param path - of its folder
 * @throws `ERR_SNAPSHOT_READ` with the `cause`, `ERR_SNAPSHOT_DAMAGED`, `ERR_SNAPSHOT_VERSION`, `ERR_MEMORY_SIZE` for more
 *   memory than this host has
 */
export async function readSnapshot(path: string): Promise<SnapshotContents> {
  try {
    const chain = await readChain(path)
    const { record } = chain[0]!
    const files = chain.map(({ folder, record: { memory } }) => ({
      path: join(folder, MEMORY),
      pages: memory.pages,
    }))
    const memory = await openMemory(record.memory.size, files.reverse())
    return { record, memory, chain: chain.map(({ folder }) => folder) }
  } catch (cause) {
    throw readError(path, cause)
  }
}

/**
 * Checks that a host can go on with what another one began.
 *
 * @throws `ERR_SNAPSHOT_HOST`, with `missing` for features
 */
export function checkHost(
  record: Pick<SnapshotRecord, 'host'>,
  host: Pick<SnapshotHost, 'kind' | 'features'>,
): void {
  const { kind, processor, features } = record.host
  if (kind !== host.kind) {
    throw new NodevisorError(
      'ERR_SNAPSHOT_HOST',
      `Expected a host of the kind '${kind}', as the snapshot's, but this one is '${host.kind}': registers of one mean ` +
        'nothing to the other; restore it on a host of its kind',
      { expected: kind, received: host.kind },
    )
  }
  const missing = features.filter((feature) => !host.features.includes(feature))
  if (missing.length === 0) return
  throw new NodevisorError(
    'ERR_SNAPSHOT_HOST',
    `Expected a processor with all that the snapshot's guest was shown (on: ${processor}) but this one lacks ` +
      `${missing.join(', ')}; restore it on a host that has them, or take one of a machine with a smaller CPU model`,
    { missing },
  )
}

/** A snapshot's folder, and what it says. */
interface Link {
  readonly folder: string
  readonly record: SnapshotRecord
}

/** A snapshot, and behind it those that it has the changes of: the full one comes last. */
async function readChain(path: string): Promise<Link[]> {
  const chain: Link[] = []
  let folder = await realpath(path)
  for (;;) {
    const record = decodeState(await readState(folder), join(folder, STATE))
    const child = chain.at(-1)
    if (child !== undefined) checkLink(child, { folder, record })
    if (chain.some(({ record: { id } }) => id === record.id)) {
      throw damaged(folder, 'it is among those of which it has the changes')
    }
    chain.push({ folder, record })
    if (record.parent === undefined) return chain
    if (chain.length === MAX_CHAIN) throw damaged(path, `expected at most ${MAX_CHAIN} snapshots in a chain`)
    folder = await realpath(resolve(folder, record.parent.path))
  }
}

function checkLink(child: Link, { folder, record }: Link): void {
  const { parent, memory } = child.record
  if (record.id !== parent!.id) {
    throw damaged(
      child.folder,
      `expected the snapshot ${parent!.id}, of which it has the changes, in '${folder}' but there is ${record.id}`,
    )
  }
  if (record.memory.size !== memory.size) {
    throw damaged(
      child.folder,
      `expected ${memory.size} bytes of memory in '${folder}' but it has ${record.memory.size}`,
    )
  }
}

async function readState(folder: string): Promise<Uint8Array> {
  const path = join(folder, STATE)
  const file = await openFile(path)
  try {
    const { size } = await file.stat()
    if (size > MAX_STATE_SIZE)
      throw damaged(path, `expected at most ${MAX_STATE_SIZE} bytes but it has ${size}`)
    const bytes = new Uint8Array(size)
    await readFully(file.fd, bytes, 0)
    return bytes
  } finally {
    await file.close()
  }
}

async function checkFree(path: string): Promise<void> {
  const isThere = await lstat(path).then(
    () => true,
    (error: NodeJS.ErrnoException) => {
      if (error.code === 'ENOENT') return false
      throw error
    },
  )
  if (!isThere) return
  throw new NodevisorError(
    'ERR_SNAPSHOT_WRITE',
    `Expected nothing at '${path}' but something is there; choose another path, or remove it`,
    { path },
  )
}

/** What a new snapshot says of the one whose changes it has, which must be there now. */
async function parentOf(
  target: string,
  memorySize: number,
  { changes }: WriteSnapshotOptions,
): Promise<SnapshotParent | undefined> {
  if (changes === undefined) return undefined
  const { parent } = changes
  const chain = await readChain(parent.path)
  const [{ folder, record }] = chain as [Link]
  if (record.id !== parent.id || record.memory.size !== memorySize) {
    throw new Error(`Expected the snapshot ${parent.id} in '${folder}' but there is another one`)
  }
  if (chain.length === MAX_CHAIN) {
    throw new Error(`Expected fewer than ${MAX_CHAIN} snapshots on top of each other; take a full one`)
  }
  const from = join(await realpath(dirname(target)), basename(target))
  return { path: relative(from, folder), id: parent.id }
}

/** Makes a folder and all that is in it durable, and gives the bytes that this takes. */
async function syncFiles(folder: string): Promise<number> {
  let bytes = 0
  for (const name of await readdir(folder)) {
    const path = join(folder, name)
    await syncPath(path)
    bytes += (await stat(path)).blocks * BLOCK_SIZE
  }
  await syncPath(folder)
  return bytes
}

/** @returns the folder, if it is still there */
async function remove(folder: string): Promise<string | undefined> {
  return rm(folder, { recursive: true, force: true }).then(
    () => undefined,
    () => folder,
  )
}

/** The version of this package. */
export function packageVersion(): string {
  const path = fileURLToPath(new URL('package.json', packageRoot()))
  return (createRequire(import.meta.url)(path) as { readonly version: string }).version
}

const WRITE_REMEDIES: Readonly<Record<string, string>> = {
  ENOENT: 'make the folder that it is to be in',
  ENOTDIR: 'choose a path that leads through folders',
  EACCES: 'change the permissions of the folder that it is to be in',
  EPERM: 'change the permissions of the folder that it is to be in',
  EROFS: 'write it to where it can be written',
  ENOSPC: 'free some space, or write it to another disk',
  EDQUOT: 'free some space, or write it to another disk',
  EFBIG: 'write it to a file system for larger files',
  ENAMETOOLONG: 'choose a shorter name',
}

const READ_REMEDIES: Readonly<Record<string, string>> = {
  ENOENT: 'correct the path, and keep the snapshots of which it has only the changes',
  ENOTDIR: 'name the folder of a snapshot',
  EACCES: 'change its permissions',
  EPERM: 'change its permissions',
  EMFILE: 'close machines that are done, or raise "ulimit -n"',
}

/**
 * What a snapshot could not be written for, as the user is told.
 *
 * @param left - the unfinished folder, if it could not be removed
 */
export function writeError(path: string, cause: unknown, left: string | undefined): NodevisorError {
  if (cause instanceof NodevisorError && cause.code === 'ERR_SNAPSHOT_WRITE' && left === undefined)
    return cause
  const remedy = WRITE_REMEDIES[codeOf(cause)] ?? 'see the cause, and take it again'
  const rest = left === undefined ? '' : `; remove '${left}', which could not be removed`
  return new NodevisorError(
    'ERR_SNAPSHOT_WRITE',
    `The snapshot '${path}' was not written (${messageOf(cause)}): ${remedy}${rest}`,
    { path, cause },
  )
}

/** What a snapshot could not be read for, as the user is told. */
export function readError(path: string, cause: unknown): NodevisorError {
  if (cause instanceof NodevisorError) return cause
  const remedy = READ_REMEDIES[codeOf(cause)] ?? 'see the cause'
  return new NodevisorError(
    'ERR_SNAPSHOT_READ',
    `The snapshot '${path}' could not be read (${messageOf(cause)}): ${remedy}`,
    { path, cause },
  )
}

function codeOf(error: unknown): string {
  return (error as NodeJS.ErrnoException | undefined)?.code ?? ''
}

function messageOf(error: unknown): string {
  return error instanceof Error ? error.message : String(error)
}
