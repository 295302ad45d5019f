import { closeSync, openSync, readFileSync, writeSync } from 'node:fs'
import { dirname } from 'node:path'

const FILE = 0o100000
const FOLDER = 0o040000
const LINK = 0o120000

/**
 * Writes an initramfs: a cpio archive in the `newc` format, see the kernel's
 * Documentation/driver-api/early-userspace/buffer-format.rst. Folders come by themselves.
 */
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
    this.#entry(path, FOLDER | 0o755, new Uint8Array())
  }

  file(path: string, content: string | Uint8Array, permissions = 0o644): void {
    this.#entry(path, FILE | permissions, Buffer.from(content))
  }

  link(path: string, target: string): void {
    this.#entry(path, LINK | 0o777, Buffer.from(target))
  }

  /** Takes a file of the host along. */
  copy(path: string, source: string, permissions?: number): void {
    this.file(path, readFileSync(source), permissions)
  }

  /** Writes the end of the archive. */
  finish(): void {
    this.#record('TRAILER!!!', 0, new Uint8Array())
  }

  [Symbol.dispose](): void {
    closeSync(this.#fd)
  }

  #entry(path: string, mode: number, content: Uint8Array): void {
    if (this.#paths.has(path)) return
    const folder = dirname(path)
    if (folder !== '/' && folder !== '.') this.folder(folder)
    this.#paths.add(path)
    this.#record(path.replace(/^\//, ''), mode, content)
  }

  #record(name: string, mode: number, content: Uint8Array): void {
    const nameBytes = Buffer.from(`${name}\0`)
    const fields = [++this.#inode, mode, 0, 0, 1, 0, content.length, 0, 0, 0, 0, nameBytes.length, 0]
    const header = `070701${fields.map((field) => field.toString(16).padStart(8, '0')).join('')}`
    this.#write(Buffer.concat([Buffer.from(header), nameBytes]))
    this.#write(content)
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
