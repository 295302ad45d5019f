import { writeSync } from 'node:fs'
import { GuestRam, type GuestRamOptions, type PageRuns } from './guest-ram.js'
import { isZero } from './is-zero.js'
import { PAGE_SIZE } from './layout.js'
import { countPages, NO_PAGES, uniteRuns } from './page-runs.js'

/** Bytes that are copied at a time. */
const PIECE_SIZE = 2 ** 20

/**
 * A file that machines and images of them read copy-on-write. Whoever is the only one left may write into it.
 */
class MemoryBase {
  users = 0
  /** Whether the file is ours, and not a snapshot that somebody keeps. */
  readonly isWritable: boolean

  constructor(isWritable: boolean) {
    this.isWritable = isWritable
  }
}

/** What was in a machine's RAM at a moment: a file, and pages that differ from it. */
export class MemoryImage {
  /** Bytes. */
  readonly size: number
  /** Pages that are not as in the file, … */
  readonly changed: PageRuns
  /** … and what is in them, one after the other. */
  readonly contents: Uint8Array
  /** @internal */
  readonly base: MemoryBase
  readonly #ram: GuestRam
  #closed = false

  /** @internal */
  constructor(ram: GuestRam, base: MemoryBase, changed: PageRuns, contents: Uint8Array) {
    this.size = ram.size
    this.base = base
    this.changed = changed
    this.contents = contents
    this.#ram = ram
    base.users++
  }

  /**
   * The image that a file is. It is read where it is needed, so it has to stay as it is.
   *
   * @param fd - open for reading; a duplicate of it is kept
   */
  static ofFile(
    fd: number,
    size: number,
    changed: PageRuns = NO_PAGES,
    contents = new Uint8Array(),
  ): MemoryImage {
    return new MemoryImage(
      new GuestRam({ size, copyOnWriteOf: fd }),
      new MemoryBase(false),
      changed,
      contents,
    )
  }

  /** The file, to be read. */
  get fd(): number {
    return this.#ram.fd
  }

  close(): void {
    if (this.#closed) return
    this.#closed = true
    this.base.users--
    this.#ram.close()
  }
}

/** Which pages have changed, for one who asks for it now and then. */
export class PageChanges {
  /** Those that have changed since {@link take} and are in the base by now. */
  settled: PageRuns = NO_PAGES
  readonly #ram: MachineRam

  /** @internal */
  constructor(ram: MachineRam) {
    this.#ram = ram
  }

  /** The pages that may have changed since the last call, or since {@link MachineRam.trackChanges}. */
  take(): PageRuns {
    const changes = this.#ram.changesSince(this.settled)
    this.settled = NO_PAGES
    return changes
  }

  close(): void {
    this.#ram.untrack(this)
  }
}

/** A machine's RAM, of which images can be taken and which can return to them. */
export class MachineRam {
  readonly ram: GuestRam
  readonly #isHuge: boolean
  /** What is below this RAM, once an image was taken of it or it was made from one. */
  #base: MemoryBase | undefined
  readonly #changes = new Set<PageChanges>()
  /** Of {@link takeChanges}. */
  readonly #own = this.trackChanges()
  #closed = false

  private constructor(ram: GuestRam, isHuge: boolean, base: MemoryBase | undefined) {
    this.ram = ram
    this.#isHuge = isHuge
    this.#base = base
    if (base !== undefined) base.users++
  }

  /** @throws as {@link GuestRam} */
  static create(options: GuestRamOptions): MachineRam {
    return new MachineRam(new GuestRam(options), options.hugePages !== undefined, undefined)
  }

  /** RAM that is as an image, at no cost but for the pages in which that differs from its file. */
  static from(image: MemoryImage): MachineRam {
    const ram = new GuestRam({ size: image.size, copyOnWriteOf: image.fd })
    writePages(ram, image.changed, image.contents)
    return new MachineRam(ram, false, image.base)
  }

  /**
   * What is in memory now, while nobody writes into it. Of ordinary pages nothing is copied but those that have changed
   * since the last image, if somebody still uses that.
   */
  capture(): MemoryImage {
    if (this.#isHuge) return this.#copyAll()
    if (this.#base === undefined) {
      this.ram.freeze()
      this.#base = new MemoryBase(true)
      this.#base.users++
      return this.#image(NO_PAGES, new Uint8Array())
    }
    const changed = this.ram.privatePages()
    if (changed.length === 0 || this.#base.users > 1 || !this.#base.isWritable) {
      return this.#image(changed, readPages(this.ram, changed))
    }
    // Nobody else reads the file: it can be as memory is.
    for (const { offset, length } of piecesOf(changed)) {
      writeAll(this.ram.fd, new Uint8Array(this.ram.buffer(offset, length)), offset)
    }
    this.ram.discard(changed)
    this.#settle(changed)
    return this.#image(NO_PAGES, new Uint8Array())
  }

  /** The pages that may have changed since the last call, or since the machine was made. */
  takeChanges(): PageRuns {
    return this.#own.take()
  }

  /** The same for somebody else, who asks at moments of his own. */
  trackChanges(): PageChanges {
    const changes = new PageChanges(this)
    this.#changes.add(changes)
    return changes
  }

  /** @internal */
  untrack(changes: PageChanges): void {
    this.#changes.delete(changes)
  }

  /** @internal */
  changesSince(settled: PageRuns): PageRuns {
    if (this.#isHuge || this.#base === undefined) return Uint32Array.of(0, this.ram.size / PAGE_SIZE)
    return uniteRuns(settled, this.ram.privatePages())
  }

  /** Gives {@link takeChanges} pages back, for the next time. */
  addChanges(pages: PageRuns): void {
    this.#own.settled = uniteRuns(this.#own.settled, pages)
  }

  /** Whether {@link restore} can take the image: it is of this RAM, or this RAM was made from it. */
  canRestore(image: MemoryImage): boolean {
    return this.#isHuge ? image.size === this.ram.size : image.base === this.#base
  }

  /** Back to an image, at the cost of the pages that have changed since. */
  restore(image: MemoryImage): void {
    if (this.#isHuge) {
      copyFile(image, this.ram)
    } else {
      const changed = this.ram.privatePages()
      this.ram.discard(changed)
      this.#settle(changed)
    }
    writePages(this.ram, image.changed, image.contents)
  }

  close(): void {
    if (this.#closed) return
    this.#closed = true
    if (this.#base !== undefined) this.#base.users--
    this.ram.close()
  }

  #settle(changed: PageRuns): void {
    for (const changes of this.#changes) changes.settled = uniteRuns(changes.settled, changed)
  }

  #image(changed: PageRuns, contents: Uint8Array): MemoryImage {
    const ram = new GuestRam({ size: this.ram.size, copyOnWriteOf: this.ram.fd })
    return new MemoryImage(ram, this.#base!, changed, contents)
  }

  /** Copies on write of huge pages would take more of them, which may not be there: that ends a process. */
  #copyAll(): MemoryImage {
    const copy = new GuestRam({ size: this.ram.size })
    for (let offset = 0; offset < copy.size; offset += PIECE_SIZE) {
      const piece = Buffer.from(this.ram.buffer(offset, Math.min(PIECE_SIZE, copy.size - offset)))
      if (!isZero(piece)) writeAll(copy.fd, piece, offset)
    }
    copy.freeze()
    return new MemoryImage(copy, new MemoryBase(false), NO_PAGES, new Uint8Array())
  }
}

/** What is in pages, one after the other. */
export function readPages(ram: GuestRam, runs: PageRuns): Uint8Array {
  const contents = new Uint8Array(countPages(runs) * PAGE_SIZE)
  let done = 0
  for (const { offset, length } of piecesOf(runs)) {
    contents.set(new Uint8Array(ram.buffer(offset, length)), done)
    done += length
  }
  return contents
}

function writePages(ram: GuestRam, runs: PageRuns, contents: Uint8Array): void {
  let done = 0
  for (const { offset, length } of piecesOf(runs)) {
    new Uint8Array(ram.buffer(offset, length)).set(contents.subarray(done, done + length))
    done += length
  }
}

/** All of an image's file into RAM. */
function copyFile(image: MemoryImage, ram: GuestRam): void {
  const file = new GuestRam({ size: image.size, copyOnWriteOf: image.fd })
  try {
    for (let offset = 0; offset < image.size; offset += PIECE_SIZE) {
      const length = Math.min(PIECE_SIZE, image.size - offset)
      new Uint8Array(ram.buffer(offset, length)).set(new Uint8Array(file.buffer(offset, length)))
    }
  } finally {
    file.close()
  }
}

/** Runs of pages as bytes. */
export function* piecesOf(runs: PageRuns): Generator<{ readonly offset: number; readonly length: number }> {
  for (let i = 0; i < runs.length; i += 2) {
    yield { offset: runs[i]! * PAGE_SIZE, length: runs[i + 1]! * PAGE_SIZE }
  }
}

function writeAll(fd: number, bytes: Uint8Array, position: number): void {
  for (let written = 0; written < bytes.length; ) {
    written += writeSync(fd, bytes, written, bytes.length - written, position + written)
  }
}
