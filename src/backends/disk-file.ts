import fs from 'node:fs'
import { resolve } from 'node:path'
import { getSystemErrorName } from 'node:util'
import { binding, type NativeFileIo } from '../binding.js'
import { type ErrorFacts, invalidArgument, NodevisorError } from '../errors.js'
import { BufferCursor, totalLength } from './buffer-list.js'
import { closedError, Flushes, type Request } from './requests.js'

/** The most buffers that one system call takes (IOV_MAX of Linux). */
const IOV_MAX = 1024

/**
 * Bytes up to which a transfer is tried on the JavaScript thread: copying them takes some 30 µs, about what it takes
 * to have it done by another thread.
 */
const NOWAIT_MAX = 2 ** 18

/** How often in a row a call is made again that was interrupted. */
const MAX_INTERRUPTIONS = 16

/** Bytes that are copied, or made zero, at a time. */
export const COPY_PIECE = 2 ** 20

// linux/falloc.h
const FALLOC_FL_KEEP_SIZE = 0x01
const FALLOC_FL_PUNCH_HOLE = 0x02
const FALLOC_FL_ZERO_RANGE = 0x10

let sharedZeros: Uint8Array | undefined

/** Zeros to write from, at most 1 MiB: nobody writes to them. */
export function zeros(length: number): Uint8Array {
  sharedZeros ??= new Uint8Array(COPY_PIECE)
  return sharedZeros.subarray(0, length)
}

/** Which file it is, and whether somebody has written to it since: plain data, to be kept and compared. */
export interface FileIdentity {
  /** Absolute. */
  readonly path: string
  /** Bytes of the file. */
  readonly size: number
  /** When it was written last: nanoseconds since 1970, in decimal, as the file system has them. */
  readonly modified: string
}

type VectorCall = (
  fd: number,
  buffers: readonly NodeJS.ArrayBufferView[],
  position: number,
  callback: (error: NodeJS.ErrnoException | null, count: number) => void,
) => void

/** One direction of transfers. */
interface Direction {
  readonly name: 'read' | 'write'
  readonly now: NativeFileIo['preadvNowait']
  readonly later: VectorCall
  /** The file system has said that it cannot do it without waiting. */
  waits: boolean
}

/**
 * A file that disks keep their bytes in: regular, or a block device, and locked.
 *
 * What is in the page cache is read and written at once; the rest is left to libuv's threads.
 */
export class DiskFile {
  readonly path: string
  readonly readOnly: boolean
  /** Bytes it had when it was opened. */
  readonly size: number
  readonly #handle: fs.promises.FileHandle
  readonly #read: Direction
  readonly #write: Direction
  /** Modes of fallocate that the file system has said it does not have. */
  readonly #missing = new Set<number>()
  readonly #flushes = new Flushes(() => this.#flush())
  #flushFailure: unknown
  #closing = false
  /** When it was written last before {@link release}; undefined while it is locked. */
  #released: bigint | undefined

  private constructor(handle: fs.promises.FileHandle, path: string, size: number, readOnly: boolean) {
    const { fileIo } = binding()
    this.#handle = handle
    this.path = path
    this.size = size
    this.readOnly = readOnly
    this.#read = { name: 'read', now: fileIo.preadvNowait, later: fs.readv, waits: false }
    this.#write = { name: 'write', now: fileIo.pwritevNowait, later: fs.writev, waits: false }
  }

  /**
   * Opens a file that exists and locks it: for itself, or with other readers if it is to be read only.
   *
   * @throws `ERR_DISK_OPEN` with the system's error as `cause`; `ERR_DISK_IN_USE`
   */
  static async open(path: string, readOnly: boolean): Promise<DiskFile> {
    checkPath(path)
    try {
      // Before it is opened: that alone makes some devices do things, and waits where it is a FIFO.
      checkKind(await fs.promises.stat(path), path)
      const handle = await fs.promises.open(path, readOnly ? 'r' : 'r+')
      return await DiskFile.#adopt(handle, path, readOnly)
    } catch (error) {
      throw openError(error, path, readOnly)
    }
  }

  /**
   * Makes a file of `size` bytes that all read as zero and take no space, locked. There must be none of that name.
   *
   * @param name - what errors call it
   * @throws `ERR_DISK_OPEN` with the system's error as `cause`
   */
  static async create(path: string, size: number, mode: number, name: string): Promise<DiskFile> {
    try {
      const handle = await fs.promises.open(path, 'wx+', mode)
      try {
        await handle.truncate(size)
      } catch (error) {
        await Promise.all([handle.close(), fs.promises.rm(path, { force: true })])
        throw error
      }
      return await DiskFile.#adopt(handle, name, false)
    } catch (error) {
      throw openError(error, name, false)
    }
  }

  static async #adopt(handle: fs.promises.FileHandle, path: string, readOnly: boolean): Promise<DiskFile> {
    try {
      lock(handle.fd, path, readOnly)
      const stats = await handle.stat()
      checkKind(stats, path)
      const size = stats.isBlockDevice()
        ? check(binding().fileIo.blockDeviceSize(handle.fd), 'ioctl')
        : stats.size
      return new DiskFile(handle, path, size, readOnly)
    } catch (error) {
      await handle.close()
      throw error
    }
  }

  /** Fills the buffers from `offset` on. Fails where the file ends before. */
  read(offset: number, buffers: readonly Uint8Array[]): Request {
    return this.#transfer(this.#read, offset, buffers)
  }

  write(offset: number, buffers: readonly Uint8Array[]): Request {
    return this.#transfer(this.#write, offset, buffers)
  }

  /** Makes durable what was written before. Once that has failed it fails for ever. */
  flush(): Request {
    return this.readOnly ? undefined : this.#flushes.request()
  }

  /** Gives the space back, if the file system can. */
  async discard(offset: number, length: number): Promise<void> {
    await this.#allocate(FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, length)
  }

  /** Makes the bytes zero; writes them where the file system has no other way. */
  async writeZeroes(offset: number, length: number, mayDiscard: boolean): Promise<void> {
    const mode = mayDiscard ? FALLOC_FL_PUNCH_HOLE : FALLOC_FL_ZERO_RANGE
    if (await this.#allocate(mode | FALLOC_FL_KEEP_SIZE, offset, length)) return
    const end = offset + length
    for (let position = offset; position < end; position += COPY_PIECE) {
      // It can take minutes, and whoever closes the disk waits for it.
      if (this.#closing) throw closedError()
      await this.write(position, [zeros(Math.min(COPY_PIECE, end - position))])
    }
  }

  /** Which file it is, as it is now. Of a block device the time says nothing. */
  async identity(): Promise<FileIdentity> {
    const { mtimeNs } = await this.#handle.stat({ bigint: true })
    return { path: resolve(this.path), size: this.size, modified: String(mtimeNs) }
  }

  /**
   * Lets others open the file: nothing can be written here until {@link reclaim}. It has to be flushed, and nothing may
   * be under way.
   */
  release(): void {
    const { fd } = this.#handle
    this.#released = fs.fstatSync(fd, { bigint: true }).mtimeNs
    check(binding().fileIo.unlock(fd), 'fcntl(F_OFD_SETLK)')
  }

  /**
   * Takes a {@link release} back.
   *
   * @throws `ERR_DISK_IN_USE` where somebody else has the file open now, or has written to it meanwhile
   */
  reclaim(): void {
    if (this.#released === undefined) return
    const { fd } = this.#handle
    lock(fd, this.path, this.readOnly)
    if (fs.fstatSync(fd, { bigint: true }).mtimeNs !== this.#released) {
      check(binding().fileIo.unlock(fd), 'fcntl(F_OFD_SETLK)')
      throw new NodevisorError(
        'ERR_DISK_IN_USE',
        `'${this.path}' was written by another machine or program since it was let go; go on there`,
        { path: this.path },
      )
    }
    this.#released = undefined
  }

  /** Soon to be closed: what takes long ends early, and fails. */
  abandon(): void {
    this.#closing = true
  }

  /** Nothing may be under way. */
  async close(): Promise<void> {
    await this.#handle.close()
  }

  #transfer(direction: Direction, offset: number, buffers: readonly Uint8Array[]): Request {
    const length = totalLength(buffers)
    if (length === 0) return undefined
    if (this.#released !== undefined && direction === this.#write)
      return Promise.reject(this.#releasedError())
    let done = 0
    if (length <= NOWAIT_MAX && !direction.waits) {
      const result = direction.now(this.#handle.fd, buffers, offset)
      if (result === length) return undefined
      if (result > 0) done = result
      else if (result < 0 && isUnsupported(result)) direction.waits = true
      // Whatever else it says, the call that may wait says it again.
    }
    return this.#finish(direction, offset, buffers, length, done)
  }

  /** Transfers what is missing after the first `done` bytes. */
  async #finish(
    direction: Direction,
    offset: number,
    buffers: readonly Uint8Array[],
    length: number,
    done: number,
  ): Promise<void> {
    let interruptions = 0
    for (let position = done; position < length; ) {
      const cursor = new BufferCursor(buffers)
      cursor.skip(position)
      const parts = cursor.take(length - position, IOV_MAX)
      try {
        const count = await call(direction.later, this.#handle.fd, parts, offset + position)
        if (count === 0) throw this.#endError(offset + position)
        position += count
        interruptions = 0
      } catch (error) {
        interruptions += 1
        if (!isInterruption(error) || interruptions > MAX_INTERRUPTIONS) {
          throw this.#error(direction.name, error, { offset, length })
        }
      }
    }
  }

  async #flush(): Promise<void> {
    // The kernel reports an error of writing back once, and then takes the pages for clean: they may be lost.
    if (this.#flushFailure !== undefined) throw this.#flushFailure
    for (let interruptions = 0; ; interruptions++) {
      try {
        await new Promise<void>((resolve, reject) => {
          fs.fdatasync(this.#handle.fd, (error) => (error === null ? resolve() : reject(error)))
        })
        return
      } catch (error) {
        if (isInterruption(error) && interruptions < MAX_INTERRUPTIONS) continue
        this.#flushFailure = this.#error('flush', error, {})
        throw this.#flushFailure
      }
    }
  }

  /** Whether fallocate() has done it; otherwise the file system cannot, at all or for this range. */
  async #allocate(mode: number, offset: number, length: number): Promise<boolean> {
    if (length === 0) return true
    if (this.#released !== undefined) throw this.#releasedError()
    if (this.#missing.has(mode)) return false
    const result = await binding().fileIo.fallocate(this.#handle.fd, mode, offset, length)
    if (result === 0) return true
    if (isUnsupported(result)) {
      this.#missing.add(mode)
      return false
    }
    // A block device with larger blocks than the range has.
    if (errnoName(result) === 'EINVAL') return false
    throw this.#error('fallocate', systemCallError('fallocate', result), { offset, length })
  }

  #releasedError(): NodevisorError {
    return new NodevisorError('ERR_DISK_IN_USE', `'${this.path}' was let go, for another machine to open`, {
      path: this.path,
    })
  }

  #endError(offset: number): NodevisorError {
    return new NodevisorError(
      'ERR_DISK_IO',
      `Expected '${this.path}' to have ${this.size} bytes but it ends before offset ${offset}: something has ` +
        'truncated it since it was opened; restore it before it is used again',
      { path: this.path, offset },
    )
  }

  #error(request: string, cause: unknown, facts: ErrorFacts): NodevisorError {
    if (cause instanceof NodevisorError) return cause
    return new NodevisorError('ERR_DISK_IO', `A ${request} of '${this.path}' failed: ${messageOf(cause)}`, {
      path: this.path,
      ...facts,
      cause,
    })
  }
}

function call(
  later: VectorCall,
  fd: number,
  buffers: readonly Uint8Array[],
  position: number,
): Promise<number> {
  return new Promise((resolve, reject) => {
    later(fd, buffers, position, (error, count) => (error === null ? resolve(count) : reject(error)))
  })
}

function checkPath(path: string): void {
  if (typeof path !== 'string' || path === '' || path.includes('\0')) {
    throw invalidArgument('path', 'the path of a disk image', path)
  }
}

/** Refuses what is not made of bytes at offsets. */
function checkKind(stats: fs.Stats, path: string): void {
  if (stats.isFile() || stats.isBlockDevice()) return
  const kind = stats.isDirectory()
    ? 'a directory'
    : stats.isCharacterDevice()
      ? 'a character device'
      : stats.isFIFO()
        ? 'a FIFO'
        : 'a socket'
  throw new NodevisorError(
    'ERR_DISK_OPEN',
    `Expected a file or a block device for a disk but '${path}' is ${kind}: make an image with ` +
      '"truncate -s 1G disk.img"',
    { path },
  )
}

function lock(fd: number, path: string, readOnly: boolean): void {
  const result = binding().fileIo.lock(fd, !readOnly)
  if (result === 0) return
  if (errnoName(result) === 'EAGAIN' || errnoName(result) === 'EACCES') {
    throw new NodevisorError(
      'ERR_DISK_IN_USE',
      readOnly
        ? `'${path}' is in use: a machine or another program has it open for writing; close it there first, or ` +
            'open it read-only there, too'
        : `'${path}' is in use: a machine or another program has it open; close it there first, or open it ` +
            'read-only everywhere and give each machine an overlay of its own',
      { path },
    )
  }
  check(result, 'fcntl(F_OFD_SETLK)')
}

/** The result of a system call of the addon's. */
function check(result: number, syscall: string): number {
  if (result < 0) throw systemCallError(syscall, result)
  return result
}

function systemCallError(syscall: string, result: number): NodeJS.ErrnoException {
  const code = errnoName(result)
  return Object.assign(new Error(`${code}: ${syscall}`), { code, errno: result, syscall })
}

function errnoName(result: number): string {
  return getSystemErrorName(result)
}

function isUnsupported(result: number): boolean {
  const name = errnoName(result)
  return name === 'ENOTSUP' || name === 'EOPNOTSUPP' || name === 'ENOSYS' || name === 'ENODEV'
}

function isInterruption(error: unknown): boolean {
  const { code } = error as NodeJS.ErrnoException
  return code === 'EINTR' || code === 'EAGAIN'
}

function messageOf(error: unknown): string {
  return error instanceof Error ? error.message : String(error)
}

const REMEDIES: Readonly<Record<string, string>> = {
  ENOENT: 'correct the path; "truncate -s 1G disk.img" makes an image',
  EACCES: 'change its permissions, or open it read-only',
  EPERM: 'change its permissions, or open it read-only',
  EROFS: 'open it read-only, or copy it to where it can be written',
  EEXIST: 'choose another name',
  ENOSPC: 'free some space, or put it on another disk',
  EFBIG: 'put it on a file system for larger files',
  ENOLCK: 'put it on a file system that has locks',
  EMFILE: 'close machines that are done, or raise "ulimit -n"',
}

/** What a disk could not be opened for, as the user is told. */
export function openError(cause: unknown, path: string, readOnly: boolean): NodevisorError {
  if (cause instanceof NodevisorError) return cause
  const { code = '' } = cause as NodeJS.ErrnoException
  const remedy = REMEDIES[code] ?? 'see the cause'
  const wanted = readOnly ? 'reading' : 'reading and writing'
  return new NodevisorError(
    'ERR_DISK_OPEN',
    `'${path}' could not be opened for ${wanted} (${code === '' ? messageOf(cause) : code}): ${remedy}`,
    { path, cause },
  )
}
