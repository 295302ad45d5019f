import { closeSync, openSync, readFileSync, writeSync } from 'node:fs'
import { dirname } from 'node:path'
import { type CpioEntry, cpioHeader, S_IFDIR, S_IFLNK, S_IFREG, TRAILER_ENTRY } from '../../src/boot/cpio.js'

/** Writes an initramfs, one entry after the other, as it may be large. Folders come by themselves. */
export class Initramfs implements Disposable {
  readonly #fd: number
  readonly #paths = new Set<string>()
  #inode = 0
  #size = 0

  constructor(path: string) {
    this.#fd = openSync(path, 'wx')
  }

  /** Bytes written. */
  get size(): number {
    return this.#size
  }

  /** Entries written, folders included. */
  get count(): number {
    return this.#paths.size
  }

  has(path: string): boolean {
    return this.#paths.has(path)
  }

  folder(path: string): void {
    this.#entry(path, S_IFDIR | 0o755, new Uint8Array())
  }

  file(path: string, content: string | Uint8Array, permissions = 0o644): void {
    this.#entry(path, S_IFREG | permissions, Buffer.from(content))
  }

  link(path: string, target: string): void {
    this.#entry(path, S_IFLNK | 0o777, Buffer.from(target))
  }

  /** Takes a file of the host along. */
  copy(path: string, source: string, permissions?: number): void {
    this.file(path, readFileSync(source), permissions)
  }

  /** Writes the end of the archive. */
  finish(): void {
    this.#record(TRAILER_ENTRY)
  }

  [Symbol.dispose](): void {
    closeSync(this.#fd)
  }

  #entry(path: string, mode: number, content: Uint8Array): void {
    if (this.#paths.has(path)) return
    const folder = dirname(path)
    if (folder !== '/' && folder !== '.') this.folder(folder)
    this.#paths.add(path)
    this.#record({ name: path.replace(/^\//, ''), mode, content })
  }

  #record(entry: CpioEntry): void {
    this.#write(cpioHeader(entry, ++this.#inode))
    this.#write(entry.content)
  }

  /** Writes bytes, and zeros up to a multiple of four. */
  #write(bytes: Uint8Array): void {
    for (let written = 0; written < bytes.length; ) {
      written += writeSync(this.#fd, bytes, written)
    }
    const padding = -bytes.length & 3
    if (padding > 0) writeSync(this.#fd, new Uint8Array(padding))
    this.#size += bytes.length + padding
  }
}
