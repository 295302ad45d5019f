import { alignUp } from './placement.js'

// The initramfs buffer format, "newc": https://docs.kernel.org/driver-api/early-userspace/buffer-format.html

// File types in a mode: sys/stat.h.
/** The bits that say the type. */
export const S_IFMT = 0o170000
export const S_IFCHR = 0o020000
export const S_IFDIR = 0o040000
export const S_IFBLK = 0o060000
export const S_IFREG = 0o100000
export const S_IFLNK = 0o120000

const MAGIC = '070701'
const TRAILER = 'TRAILER!!!'
/** The magic number and 13 numbers of 8 hexadecimal digits. */
const HEADER_SIZE = 110
const ALIGNMENT = 4
/** What cpio pads an archive to. */
const ARCHIVE_BLOCK = 512

/** A file of an archive. */
export interface CpioEntry {
  /** Its path, without a slash at the start. */
  readonly name: string
  /** Type and permissions. */
  readonly mode: number
  /** A file's content, or what a link points to; empty for others. */
  readonly content: Uint8Array
  /** Major and minor number of a device node. */
  readonly device?: readonly [major: number, minor: number]
}

/** The last one of an archive. */
export const TRAILER_ENTRY: CpioEntry = { name: TRAILER, mode: 0, content: new Uint8Array(0) }

/** Whether a name would end the archive. */
export function isTrailer(name: string): boolean {
  return name === TRAILER
}

/** Bytes of an archive. */
export function cpioSize(entries: readonly { readonly name: string; readonly size: number }[]): number {
  const all = [...entries, { name: TRAILER, size: 0 }]
  return alignUp(
    all.reduce((sum, { name, size }) => sum + headerSize(name) + alignUp(size, ALIGNMENT), 0),
    ARCHIVE_BLOCK,
  )
}

/**
 * Makes an archive. Everything belongs to root, has the time 0 and an inode number that says which entry it is, so that
 * the same entries give the same bytes.
 */
export function makeCpio(entries: readonly CpioEntry[]): Uint8Array {
  const size = cpioSize(entries.map(({ name, content }) => ({ name, size: content.length })))
  const archive = Buffer.alloc(size)
  let at = 0
  const add = (entry: CpioEntry, inode: number) => {
    const header = cpioHeader(entry, inode)
    archive.set(header, at)
    archive.set(entry.content, at + header.length)
    at += header.length + alignUp(entry.content.length, ALIGNMENT)
  }
  entries.forEach((entry, index) => {
    add(entry, index + 1)
  })
  add(TRAILER_ENTRY, 0)
  return archive
}

/** What comes before an entry's content, with zeros up to a multiple of {@link ALIGNMENT}. */
export function cpioHeader({ name, mode, content, device = [0, 0] }: CpioEntry, inode: number): Uint8Array {
  const header = Buffer.alloc(headerSize(name))
  // Its name and its `.`, as on a file system: Linux takes no notice, but tools do.
  const links = (mode & S_IFMT) === S_IFDIR ? 2 : 1
  const [major, minor] = device
  const nameSize = Buffer.byteLength(name) + 1
  // ino, mode, uid, gid, nlink, mtime, filesize, maj, min, rmaj, rmin, namesize, chksum
  const fields = [inode, mode, 0, 0, links, 0, content.length, 0, 0, major, minor, nameSize, 0]
  header.write(`${MAGIC}${fields.map((field) => field.toString(16).padStart(8, '0')).join('')}${name}`)
  return header
}

/** Bytes of a header with the name behind it, and the zero that ends that. */
function headerSize(name: string): number {
  return alignUp(HEADER_SIZE + Buffer.byteLength(name) + 1, ALIGNMENT)
}
