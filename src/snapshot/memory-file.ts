import { open } from 'node:fs/promises'
import { constants, totalmem } from 'node:os'
import { setImmediate } from 'node:timers/promises'
import { binding, systemError } from '../binding.js'
import { NodevisorError } from '../errors.js'
import type { PageRuns } from '../memory/guest-ram.js'
import { isZero } from '../memory/is-zero.js'
import { PAGE_SIZE } from '../memory/layout.js'
import { MemoryImage, piecesOf } from '../memory/machine-ram.js'
import { countPages, NO_PAGES, uniteRuns } from '../memory/page-runs.js'
import { openFile, readFully, writeFully } from './files.js'
import { damaged } from './state-file.js'

/** How far the memory of a snapshot has been written. */
export interface SnapshotProgress {
  /** Bytes of memory that are done with, … */
  readonly done: number
  /** … of so many. Memory that was never touched does not count. */
  readonly total: number
}

export interface WriteMemoryOptions {
  /** Called again and again; at the end with `done` equal to `total`. */
  readonly onProgress?: ((progress: SnapshotProgress) => void) | undefined
  /** Ends it early: its reason is thrown. */
  readonly signal?: AbortSignal | undefined
}

/** A file of memory, and which pages are in there. */
export interface MemoryFile {
  readonly path: string
  readonly pages: 'all' | PageRuns
}

/** Bytes of memory that are read at a time, and the multiple that they begin at. */
const PIECE_SIZE = 2 ** 20
/** Holes that are looked for before others get a turn. */
const SEEKS_PER_TURN = 1024
/** Reads under way at a time. */
const READS = 64

/** A part of memory. */
interface Stretch {
  readonly offset: number
  readonly length: number
}

/**
 * Writes memory into a new file, in which each page is where it is in RAM, and which is as long. Pages of zeros take no
 * space. What fails throws errors of Node.js, and leaves a file that is not whole.
 *
 * The image has to stay open until this is done; its machine may run.
 *
 * @param pages - those to write; undefined for all
 * @returns how many pages there are that are not just zeros
 */
export async function writeMemory(
  path: string,
  image: MemoryImage,
  pages: PageRuns | undefined,
  { onProgress, signal }: WriteMemoryOptions = {},
): Promise<number> {
  const file = await open(path, 'wx')
  try {
    await file.truncate(image.size)
    const runs = pages ?? uniteRuns(await dataOf(image), image.changed)
    const total = countPages(runs) * PAGE_SIZE
    const readPiece = readerOf(image)
    const buffer = new Uint8Array(PIECE_SIZE)
    let done = 0
    let written = 0
    onProgress?.({ done, total })
    for (const stretches of byPiece(runs)) {
      signal?.throwIfAborted()
      const start = stretches[0]!.offset
      const last = stretches.at(-1)!
      const piece = buffer.subarray(0, last.offset + last.length - start)
      await readPiece(start, piece)
      const parts = stretches.flatMap((stretch) => withoutZeros(piece, start, stretch))
      await settled(
        parts.map(({ offset, length }) =>
          writeFully(file, piece.subarray(offset - start, offset - start + length), offset),
        ),
      )
      written += bytesIn(parts) / PAGE_SIZE
      done += bytesIn(stretches)
      onProgress?.({ done, total })
    }
    await file.datasync()
    return written
  } finally {
    await file.close()
  }
}

/**
 * Memory as files have it. The first file stays open, and is read when its pages are needed; it must not change, and an
 * end that goes missing ends the process. Of the others all pages are read now.
 *
 * @param size - bytes of RAM, and of each file
 * @param files - the first has all pages; each of the others those that differ from what is before
 * @throws `ERR_SNAPSHOT_DAMAGED`, `ERR_MEMORY_SIZE` for more than this host has, and errors of Node.js
 */
export async function openMemory(size: number, files: readonly MemoryFile[]): Promise<MemoryImage> {
  const host = totalmem()
  if (size > host) throw tooLarge(size, `this host's ${host}`)
  const [full, ...increments] = files
  const changed = increments.reduce((all, { pages }) => uniteRuns(all, runsOf(pages, size)), NO_PAGES)
  const contents = allocate(countPages(changed) * PAGE_SIZE)
  for (const { path, pages } of increments) {
    await withMemory(path, size, (fd) => readPages(fd, runsOf(pages, size), changed, contents))
  }
  return withMemory(full!.path, size, async (fd) => MemoryImage.ofFile(fd, size, changed, contents))
}

function tooLarge(size: number, limit: string, cause?: unknown): NodevisorError {
  return new NodevisorError(
    'ERR_MEMORY_SIZE',
    `Expected a snapshot with at most ${limit} bytes of memory but it has ${size}; restore it on a larger host`,
    { received: size, cause },
  )
}

function allocate(length: number) {
  try {
    return new Uint8Array(length)
  } catch (cause) {
    throw tooLarge(length, 'what Node.js has for changed pages in', cause)
  }
}

/** Opens a file of memory for as long as something is done with it. */
async function withMemory<T>(path: string, size: number, use: (fd: number) => Promise<T>): Promise<T> {
  const file = await openFile(path).catch((cause: NodeJS.ErrnoException) => {
    throw cause.code === 'ENOENT' ? damaged(path, 'it is not there', { cause }) : cause
  })
  try {
    const stats = await file.stat()
    if (stats.size !== size) throw damaged(path, `expected ${size} bytes but it has ${stats.size}`)
    return await use(file.fd)
  } finally {
    await file.close()
  }
}

/** @param contents - of `all`, which the pages are among */
async function readPages(fd: number, pages: PageRuns, all: PageRuns, contents: Uint8Array): Promise<void> {
  const reads: Promise<void>[] = []
  // Where in `all`, and in its contents, the page is that comes next.
  let run = 0
  let before = 0
  for (let i = 0; i < pages.length; i += 2) {
    const [first, count] = [pages[i]!, pages[i + 1]!]
    while (all[run]! + all[run + 1]! <= first) {
      before += all[run + 1]!
      run += 2
    }
    const at = (before + first - all[run]!) * PAGE_SIZE
    reads.push(readFully(fd, contents.subarray(at, at + count * PAGE_SIZE), first * PAGE_SIZE))
    if (reads.length === READS) await settled(reads.splice(0))
  }
  await settled(reads)
}

/** Waits for all of them, even if one fails: then nobody uses the file any more. */
async function settled(operations: readonly Promise<void>[]): Promise<void> {
  await Promise.allSettled(operations)
  await Promise.all(operations)
}

function runsOf(pages: 'all' | PageRuns, size: number): PageRuns {
  return pages === 'all' ? Uint32Array.of(0, size / PAGE_SIZE) : pages
}

/** The pages of an image's file in which something was ever written, as far as its file system knows. */
async function dataOf({ fd, size }: MemoryImage): Promise<PageRuns> {
  const { seekData, seekHole } = binding().fileIo
  const runs: number[] = []
  let end = 0
  for (let offset = 0, seeks = 0; offset < size; seeks++) {
    if (seeks % SEEKS_PER_TURN === SEEKS_PER_TURN - 1) await setImmediate()
    const data = seekData(fd, offset)
    if (data === -constants.errno.ENXIO) break
    // This file system does not know its holes.
    if (data === -constants.errno.EINVAL) return runsOf('all', size)
    if (data < 0) throw systemError('lseek', -data)
    const hole = seekHole(fd, data)
    if (hole < 0) throw systemError('lseek', -hole)
    // Blocks of a file system may be smaller than pages.
    const first = Math.max(end, Math.floor(data / PAGE_SIZE))
    end = Math.ceil(Math.min(hole, size) / PAGE_SIZE)
    if (end > first) runs.push(first, end - first)
    offset = hole
  }
  return Uint32Array.from(runs)
}

/** Reads an image, in ascending order. */
function readerOf({
  fd,
  changed,
  contents,
}: MemoryImage): (start: number, piece: Uint8Array) => Promise<void> {
  // The first run of changed pages that the next piece may have, and where its contents are.
  let run = 0
  let at = 0
  return async (start, piece) => {
    const end = start + piece.length
    const parts: { readonly start: number; readonly bytes: Uint8Array }[] = []
    for (; run < changed.length; run += 2) {
      const runStart = changed[run]! * PAGE_SIZE
      const runLength = changed[run + 1]! * PAGE_SIZE
      const from = Math.max(start, runStart)
      const to = Math.min(end, runStart + runLength)
      if (to > from) {
        parts.push({ start: from, bytes: contents.subarray(at + from - runStart, at + to - runStart) })
      }
      if (runStart + runLength > end) break
      at += runLength
    }
    const covered = parts.reduce((sum, { bytes }) => sum + bytes.length, 0)
    if (covered < piece.length) await readFully(fd, piece, start)
    for (const part of parts) piece.set(part.bytes, part.start - start)
  }
}

/** Runs of pages, cut up so that each element is about one piece of memory. */
function* byPiece(runs: PageRuns): Generator<readonly Stretch[]> {
  let stretches: Stretch[] = []
  let pieceEnd = 0
  for (const run of piecesOf(runs)) {
    const runEnd = run.offset + run.length
    for (let offset = run.offset; offset < runEnd; ) {
      if (offset >= pieceEnd) {
        if (stretches.length > 0) yield stretches
        stretches = []
        pieceEnd = (Math.floor(offset / PIECE_SIZE) + 1) * PIECE_SIZE
      }
      const length = Math.min(runEnd, pieceEnd) - offset
      stretches.push({ offset, length })
      offset += length
    }
  }
  if (stretches.length > 0) yield stretches
}

/** The parts of a stretch of memory whose pages are not just zeros. */
function withoutZeros(piece: Uint8Array, start: number, { offset, length }: Stretch): Stretch[] {
  const parts: Stretch[] = []
  for (let at = offset; at < offset + length; at += PAGE_SIZE) {
    if (isZero(piece.subarray(at - start, at - start + PAGE_SIZE))) continue
    const last = parts.at(-1)
    if (last !== undefined && last.offset + last.length === at) {
      parts[parts.length - 1] = { offset: last.offset, length: last.length + PAGE_SIZE }
    } else {
      parts.push({ offset: at, length: PAGE_SIZE })
    }
  }
  return parts
}

function bytesIn(stretches: readonly Stretch[]): number {
  return stretches.reduce((sum, { length }) => sum + length, 0)
}
