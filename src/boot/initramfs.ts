import { constants, type Dirent } from 'node:fs'
import { type FileHandle, open, readdir, readlink, stat } from 'node:fs/promises'
import { join, posix } from 'node:path'
import { fileURLToPath } from 'node:url'
import { promisify } from 'node:util'
import { invalidArgument, NodevisorError, show } from '../errors.js'
import {
  type CpioEntry,
  cpioSize,
  isTrailer,
  makeCpio,
  S_IFBLK,
  S_IFCHR,
  S_IFDIR,
  S_IFLNK,
  S_IFMT,
  S_IFREG,
} from './cpio.js'

/** What is at a path of an initramfs. `mode` is its permissions, `0o755` for instance. */
export type InitramfsEntry =
  /** The content of a file: executable if it begins like a script or an ELF file. */
  | string
  | Uint8Array
  | { readonly content: string | Uint8Array; readonly mode?: number }
  /** A file of the host, with its permissions there unless `mode` is given. */
  | { readonly file: string | URL; readonly mode?: number }
  /** A symbolic link to this path. */
  | { readonly link: string }
  /** A device node, of a character device unless `type` says otherwise. */
  | {
      readonly device: readonly [major: number, minor: number]
      readonly type?: 'character' | 'block'
      readonly mode?: number
    }
  /** A folder of the host with all that is below it; with `true`, an empty one. */
  | { readonly folder: string | URL | true; readonly mode?: number }

/** What an initramfs is made of. */
export type InitramfsSource =
  /** Paths in the initramfs, which begin with `/`, and what is there. */
  | Readonly<Record<`/${string}`, InitramfsEntry>>
  /** A folder of the host with all that is below it. */
  | { readonly folder: string | URL }
  /** Files of the host, which have the same paths in the initramfs. */
  | readonly string[]

/** How {@link initramfs} makes it. */
export interface InitramfsOptions {
  /** Whether to pack it with gzip: no unless given. */
  readonly gzip?: boolean
  /** The largest archive to make, in bytes, unpacked: 2 GiB - 1, which is also the most, unless given. */
  readonly maxSize?: number
}

/** What a Uint8Array can hold everywhere, and a machine takes. */
const MAX_SIZE = 2 ** 31 - 1
/** More than any system has: each costs memory here. */
const MAX_ENTRIES = 1_000_000
/** Linux skips what has longer names, or links to them, without a word (init/initramfs.c). */
const PATH_MAX = 4096
const MAX_DEVICE_MAJOR = 0xfff
const MAX_DEVICE_MINOR = 0xf_ffff
const PERMISSIONS = 0o7777
const EXECUTABLE = 0o755
const NOT_EXECUTABLE = 0o644
const ELF_MAGIC = Buffer.from('\x7fELF', 'latin1')
const SCRIPT_MAGIC = Buffer.from('#!')

const ENTRY_KINDS = ['content', 'file', 'link', 'device', 'folder'] as const
const ENTRY_EXPECTED =
  'text, a Uint8Array, { content }, { file }, { link }, { device: [major, minor] } or { folder }'

/** An entry before its content was read. */
interface PlannedEntry {
  readonly mode: number
  readonly size: number
  readonly device?: readonly [number, number]
  readonly content: Uint8Array | HostFile
}

interface HostFile {
  readonly path: string
  /** Whether a link there is followed. */
  readonly follow: boolean
}

/**
 * Makes an initramfs, which Linux unpacks into its first root file system: a cpio archive in the `newc` format.
 *
 * Everything belongs to root, and the same files give the same bytes: entries are sorted, and times are 0. Folders that
 * a path needs come by themselves. What is named by its path wins over what is there in a folder of the host.
 *
 * @example
 * await initramfs({
 *   '/init': '#!/bin/sh\nexec /bin/sh\n',
 *   '/bin': { folder: './bin' },
 *   '/bin/sh': { link: 'busybox' },
 *   '/dev/console': { device: [5, 1], mode: 0o600 },
 * })
 * @throws `ERR_INVALID_ARGUMENT`, `ERR_UNKNOWN_OPTION`, `ERR_IMAGE_READ` for a file that cannot be read or changes its
 *   size meanwhile, `ERR_IMAGE_TOO_LARGE`
 */
export async function initramfs(
  source: InitramfsSource,
  options: InitramfsOptions = {},
): Promise<Uint8Array> {
  const { gzip = false, maxSize = MAX_SIZE } = options
  const unknown = Object.keys(options).find((key) => key !== 'gzip' && key !== 'maxSize')
  if (unknown !== undefined) throw unknownKey('options', unknown, ['gzip', 'maxSize'])
  if (typeof gzip !== 'boolean') throw invalidArgument('gzip', 'true or false', gzip)
  if (!Number.isInteger(maxSize) || maxSize < 1 || maxSize > MAX_SIZE) {
    throw invalidArgument('maxSize', `an integer from 1 to ${MAX_SIZE}`, maxSize)
  }

  const tree = new Tree(maxSize)
  // The shallow first, so that a path in a folder wins over what that has there.
  const wanted = entriesOf(source).sort(([a], [b]) => depth(a) - depth(b))
  for (const [path, entry] of wanted) await addEntry(tree, path, entry)
  const archive = makeCpio(await tree.read())
  if (!gzip) return archive
  const zlib = await import('node:zlib')
  return promisify(zlib.gzip)(archive)
}

/** A source as paths without a slash at the start, and what is there. */
function entriesOf(source: InitramfsSource): (readonly [path: string, entry: InitramfsEntry])[] {
  if (Array.isArray(source)) {
    return source.map((file: unknown, index) => {
      if (typeof file !== 'string') throw invalidArgument(`source[${index}]`, 'the path of a file', file)
      return [checkPath(`/${file}`), { file }] as const
    })
  }
  if (typeof source !== 'object' || source === null || ArrayBuffer.isView(source)) {
    throw invalidArgument('source', "{ '/path': entry, … }, { folder } or an array of paths", source)
  }
  const keys = Object.keys(source)
  if ('folder' in source && keys.length === 1) return [['', source as InitramfsEntry]]
  const seen = new Set<string>()
  return Object.entries(source).map(([key, entry]) => {
    if (!key.startsWith('/')) throw invalidArgument('source', "paths that begin with '/'", key)
    const path = checkPath(key)
    if (seen.has(path)) throw invalidArgument('source', 'each path once', key)
    seen.add(path)
    return [path, entry as InitramfsEntry]
  })
}

/** A path in its shortest form, without the slash at the start. */
function checkPath(path: string): string {
  if (path.includes('\0') || path.split('/').includes('..')) {
    throw invalidArgument('source', "a path without '..' and NUL", path)
  }
  const name = posix.normalize(path).replace(/^\/+|\/+$/g, '')
  if (Buffer.byteLength(name) >= PATH_MAX || isTrailer(name)) {
    throw invalidArgument(
      'source',
      `a path of less than ${PATH_MAX} bytes that does not end the archive`,
      path,
    )
  }
  return name
}

function depth(path: string): number {
  return path === '' ? 0 : path.split('/').length
}

async function addEntry(tree: Tree, path: string, entry: InitramfsEntry): Promise<void> {
  if (typeof entry === 'string' || entry instanceof Uint8Array) {
    tree.addContent(path, entry, undefined)
    return
  }
  const kind = kindOf(path, entry)
  const mode = 'mode' in entry ? checkMode(path, entry.mode) : undefined
  switch (kind) {
    case 'content': {
      const { content } = entry as { content: unknown }
      if (typeof content !== 'string' && !(content instanceof Uint8Array)) {
        throw invalidArgument(`/${path}`, 'text or a Uint8Array as content', content)
      }
      tree.addContent(path, content, mode)
      return
    }
    case 'file':
      await tree.addHostFile(path, hostPath(path, (entry as { file: unknown }).file), mode)
      return
    case 'link': {
      const { link } = entry as { link: unknown }
      if (typeof link !== 'string') throw invalidArgument(`/${path}`, 'the path that it links to', link)
      tree.addLink(path, link)
      return
    }
    case 'device':
      tree.addDevice(path, entry as { device: unknown; type?: unknown }, mode)
      return
    case 'folder': {
      const { folder } = entry as { folder: unknown }
      tree.addFolder(path, mode ?? EXECUTABLE)
      if (folder !== true) await tree.addHostFolder(path, hostPath(path, folder))
      return
    }
  }
}

function kindOf(path: string, entry: unknown): (typeof ENTRY_KINDS)[number] {
  const kinds = typeof entry === 'object' && entry !== null ? ENTRY_KINDS.filter((kind) => kind in entry) : []
  const [kind] = kinds
  if (kind === undefined || kinds.length > 1) throw invalidArgument(`/${path}`, ENTRY_EXPECTED, entry)
  const known = [kind, ...(kind === 'link' ? [] : ['mode']), ...(kind === 'device' ? ['type'] : [])]
  const unknown = Object.keys(entry as object).find((key) => !known.includes(key))
  if (unknown !== undefined) throw unknownKey(`/${path}`, unknown, known)
  return kind
}

function unknownKey(name: string, key: string, known: readonly string[]): NodevisorError {
  return new NodevisorError(
    'ERR_UNKNOWN_OPTION',
    `Expected only ${known.join(', ')} for ${name} but received '${key}'`,
    { argument: name, received: key },
  )
}

function checkMode(path: string, mode: unknown): number | undefined {
  if (mode === undefined) return undefined
  if (typeof mode === 'number' && Number.isInteger(mode) && mode >= 0 && mode <= PERMISSIONS) return mode
  throw invalidArgument(`/${path}`, 'permissions from 0 to 0o7777 as mode', mode)
}

function hostPath(path: string, given: unknown): string {
  if (given instanceof URL && given.protocol === 'file:') return fileURLToPath(given)
  if (typeof given === 'string' && given !== '') return given
  throw invalidArgument(
    `/${path}`,
    'a path or a file: URL of the host',
    given instanceof URL ? given.href : given,
  )
}

/** What goes into an archive, by path. */
class Tree {
  readonly #entries = new Map<string, PlannedEntry>()
  readonly #maxSize: number

  constructor(maxSize: number) {
    this.#maxSize = maxSize
  }

  addContent(path: string, content: string | Uint8Array, mode: number | undefined): void {
    const bytes = typeof content === 'string' ? Buffer.from(content) : content
    const isProgram = [ELF_MAGIC, SCRIPT_MAGIC].some((magic) => magic.equals(bytes.subarray(0, magic.length)))
    const permissions = mode ?? (isProgram ? EXECUTABLE : NOT_EXECUTABLE)
    this.#add(path, { mode: S_IFREG | permissions, size: bytes.length, content: bytes })
  }

  addLink(path: string, target: string): void {
    const content = Buffer.from(target)
    if (content.length === 0 || content.length >= PATH_MAX || content.includes(0)) {
      throw invalidArgument(`/${path}`, `a link to a path of 1 to ${PATH_MAX - 1} bytes`, target)
    }
    this.#add(path, { mode: S_IFLNK | 0o777, size: content.length, content })
  }

  addDevice(path: string, entry: { device: unknown; type?: unknown }, mode = 0o600): void {
    const { device, type = 'character' } = entry
    const [major, minor] = Array.isArray(device) && device.length === 2 ? device : []
    if (!isNumberUpTo(MAX_DEVICE_MAJOR, major) || !isNumberUpTo(MAX_DEVICE_MINOR, minor)) {
      throw invalidArgument(`/${path}`, 'a device as [major, minor], up to 4095 and 1048575,', device)
    }
    if (type !== 'character' && type !== 'block') {
      throw invalidArgument(`/${path}`, "'character' or 'block' as type", type)
    }
    const content = new Uint8Array(0)
    const kind = type === 'block' ? S_IFBLK : S_IFCHR
    this.#add(path, { mode: kind | mode, size: 0, content, device: [major, minor] })
  }

  addFolder(path: string, mode: number): void {
    // The root is there already, before anything is unpacked into it.
    if (path !== '') this.#add(path, { mode: S_IFDIR | mode, size: 0, content: new Uint8Array(0) })
  }

  /** Adds a file of the host; links on the way to it are followed. */
  async addHostFile(path: string, file: string, mode: number | undefined): Promise<void> {
    const found = await reading(file, () => stat(file))
    if (!found.isFile()) throw readError(file, 'it is not a regular file')
    const permissions = mode ?? found.mode & PERMISSIONS
    this.#add(path, { mode: S_IFREG | permissions, size: found.size, content: { path: file, follow: true } })
  }

  /** Adds what is below a folder of the host. Links stay links, wherever they point to. */
  async addHostFolder(path: string, folder: string): Promise<void> {
    for (const entry of await reading(folder, () => readdir(folder, { withFileTypes: true }))) {
      await this.#addHostEntry(
        path === '' ? entry.name : `${path}/${entry.name}`,
        join(folder, entry.name),
        entry,
      )
    }
  }

  async #addHostEntry(path: string, source: string, entry: Dirent): Promise<void> {
    checkPath(`/${path}`)
    if (entry.isSymbolicLink()) {
      this.addLink(path, await reading(source, () => readlink(source)))
    } else if (entry.isDirectory()) {
      const { mode } = await reading(source, () => stat(source))
      this.addFolder(path, mode & PERMISSIONS)
      await this.addHostFolder(path, source)
    } else if (entry.isFile()) {
      const { size, mode } = await reading(source, () => stat(source))
      const content = { path: source, follow: false }
      this.#add(path, { mode: S_IFREG | (mode & PERMISSIONS), size, content })
    } else {
      throw readError(source, 'it is neither a file, a folder nor a link; name it as { device } if it is one')
    }
  }

  #add(path: string, entry: PlannedEntry): void {
    if (path === '') throw invalidArgument('/', 'a folder', 'something else')
    if (entry.size > this.#maxSize) throw tooLarge(entry.size, this.#maxSize)
    this.#entries.set(path, entry)
    if (this.#entries.size > MAX_ENTRIES) {
      throw new NodevisorError(
        'ERR_IMAGE_TOO_LARGE',
        `Expected an initramfs of at most ${MAX_ENTRIES} files but there are more; name fewer`,
        { limit: MAX_ENTRIES },
      )
    }
  }

  /** All entries with their contents, sorted, each behind its folder. */
  async read(): Promise<CpioEntry[]> {
    this.#completeFolders()
    // Not by locale: the same everywhere.
    const planned = [...this.#entries].sort(([a], [b]) => (a < b ? -1 : 1))
    const size = cpioSize(planned.map(([name, entry]) => ({ name, size: entry.size })))
    if (size > this.#maxSize) throw tooLarge(size, this.#maxSize)
    const entries: CpioEntry[] = []
    for (const [name, { mode, content, size, device }] of planned) {
      const bytes = content instanceof Uint8Array ? content : await readHostFile(content, size)
      entries.push({ name, mode, content: bytes, ...(device === undefined ? {} : { device }) })
    }
    return entries
  }

  #completeFolders(): void {
    for (const path of [...this.#entries.keys()]) {
      for (let folder = posix.dirname(path); folder !== '.'; folder = posix.dirname(folder)) {
        const there = this.#entries.get(folder)
        if (there === undefined) this.addFolder(folder, EXECUTABLE)
        else if ((there.mode & S_IFMT) !== S_IFDIR) {
          throw invalidArgument(
            'source',
            `a folder at /${folder}, since there is /${path},`,
            'something else',
          )
        }
      }
    }
  }
}

function isNumberUpTo(limit: number, value: unknown): value is number {
  return typeof value === 'number' && Number.isInteger(value) && value >= 0 && value <= limit
}

/** Reads a file that has had `size` bytes, and no more than these. */
async function readHostFile({ path, follow }: HostFile, size: number): Promise<Uint8Array> {
  return await reading(path, async () => {
    // It may have become a link, or a FIFO that has no writer, since it was looked at.
    const flags = constants.O_RDONLY | constants.O_NONBLOCK | (follow ? 0 : constants.O_NOFOLLOW)
    const file = await open(path, flags)
    try {
      if (!(await file.stat()).isFile()) throw readError(path, 'it is not a regular file any more')
      return await readExactly(file, size, path)
    } finally {
      await file.close()
    }
  })
}

async function readExactly(file: FileHandle, size: number, path: string): Promise<Uint8Array> {
  const bytes = new Uint8Array(size)
  for (let done = 0; done < size; ) {
    const { bytesRead } = await file.read(bytes, done, size - done, done)
    if (bytesRead === 0) throw readError(path, `it has become shorter than its ${size} bytes`)
    done += bytesRead
  }
  return bytes
}

async function reading<Result>(path: string, action: () => Promise<Result>): Promise<Result> {
  try {
    return await action()
  } catch (cause) {
    if (cause instanceof NodevisorError) throw cause
    throw readError(path, cause instanceof Error ? cause.message : show(cause), cause)
  }
}

function readError(path: string, why: string, cause?: unknown): NodevisorError {
  return new NodevisorError('ERR_IMAGE_READ', `Expected to read ${path} for the initramfs but: ${why}`, {
    path,
    cause,
  })
}

function tooLarge(size: number, limit: number): NodevisorError {
  return new NodevisorError(
    'ERR_IMAGE_TOO_LARGE',
    `Expected an initramfs of at most ${limit} bytes (maxSize) but it takes ${size}; name fewer or smaller files`,
    { size, limit },
  )
}
