import { execFileSync } from 'node:child_process'
import fs, { openSync, readFileSync, statSync, truncateSync, writeFileSync, writeSync } from 'node:fs'
import { open, rm } from 'node:fs/promises'
import { constants, totalmem } from 'node:os'
import { join } from 'node:path'
import fc from 'fast-check'
import { afterEach, describe, expect, it, vi } from 'vitest'
import { binding } from '../../src/binding.js'
import type { PageRuns } from '../../src/memory/guest-ram.js'
import { MachineRam, MemoryImage } from '../../src/memory/machine-ram.js'
import { openMemory, type SnapshotProgress, writeMemory } from '../../src/snapshot/memory-file.js'
import { difference, pattern, withCode } from '../backends/disks.js'
import { makeFolder } from '../helpers/folders.js'
import { bytesOf, closing, makeRam, PAGE } from './records.js'

const MIB = 2 ** 20

afterEach(() => vi.restoreAllMocks())

const newFile = () => join(makeFolder(), 'memory')
/** Bytes that a file takes. */
const allocated = (path: string) => statSync(path).blocks * 512

/** The image that a file with these bytes is, of which those pages differ that are given. */
function imageOf(bytes: Uint8Array, changed?: PageRuns, contents?: Uint8Array<ArrayBuffer>): MemoryImage {
  const path = newFile()
  const fd = openSync(path, 'w+')
  truncateSync(path, bytes.length)
  for (let at = 0; at < bytes.length; at += PAGE) {
    const page = bytes.subarray(at, at + PAGE)
    if (page.some((byte) => byte !== 0)) writeSync(fd, page, 0, PAGE, at)
  }
  try {
    return closing(MemoryImage.ofFile(fd, bytes.length, changed, contents))
  } finally {
    fs.closeSync(fd)
  }
}

describe('writing memory', () => {
  it('takes the space of the pages that have something in them, each at its offset in RAM', async () => {
    const { ram, bytes } = makeRam(64 * MIB)
    for (const page of [0, 5000, 64 * 256 - 1]) bytes.set(pattern(PAGE, page + 1), page * PAGE)
    // Touched, and zero again.
    bytes.fill(1, MIB, 3 * MIB).fill(0, MIB, 3 * MIB)
    const path = newFile()
    expect(await writeMemory(path, closing(ram.capture()), undefined)).toBe(3)
    expect(difference(readFileSync(path), bytes)).toBeUndefined()
    expect(allocated(path)).toBeLessThanOrEqual(64 * 1024)
  })

  it('writes what was there when the image was taken, whatever the guest writes meanwhile', async () => {
    const { ram, bytes } = makeRam(8 * MIB)
    bytes.set(pattern(8 * MIB))
    const image = closing(ram.capture())
    const path = newFile()
    const onProgress = () => bytes.fill(0xee)
    await writeMemory(path, image, undefined, { onProgress })
    expect(difference(readFileSync(path), pattern(8 * MIB))).toBeUndefined()
    expect(bytes[0]).toBe(0xee)
  })

  it('writes only the pages that are asked for', async () => {
    const { ram, bytes } = makeRam(4 * MIB)
    bytes.set(pattern(4 * MIB))
    bytes.fill(0, 7 * PAGE, 8 * PAGE)
    const path = newFile()
    expect(await writeMemory(path, closing(ram.capture()), Uint32Array.of(2, 1, 7, 2, 1023, 1))).toBe(3)
    const expected = new Uint8Array(4 * MIB)
    for (const page of [2, 8, 1023]) expected.set(bytes.subarray(page * PAGE, (page + 1) * PAGE), page * PAGE)
    expect(difference(readFileSync(path), expected)).toBeUndefined()
    expect(allocated(path)).toBeLessThanOrEqual(3 * PAGE + PAGE)
  })

  it('writes an image that is a file with holes, and pages that differ from it', async () => {
    const base = new Uint8Array(8 * MIB)
    for (const page of [0, 1, 700, 2047]) base.set(pattern(PAGE, page + 1), page * PAGE)
    const contents = new Uint8Array(4 * PAGE)
    contents.set(pattern(3 * PAGE, 77))
    // One in place of another, one in a hole, one next to it, and one that is zero now.
    const image = imageOf(base, Uint32Array.of(1, 1, 300, 2, 700, 1), contents)
    const expected = base.slice()
    expected.set(contents.subarray(0, PAGE), PAGE)
    expected.set(contents.subarray(PAGE, 3 * PAGE), 300 * PAGE)
    expected.fill(0, 700 * PAGE, 701 * PAGE)
    const path = newFile()
    const seen: SnapshotProgress[] = []
    expect(await writeMemory(path, image, undefined, { onProgress: (at) => seen.push(at) })).toBe(5)
    expect(difference(readFileSync(path), expected)).toBeUndefined()
    expect(allocated(path)).toBeLessThanOrEqual(6 * PAGE)
    // Holes are not looked at.
    expect(seen.at(-1)!.total).toBeLessThanOrEqual(8 * PAGE)
  })

  it('does the same on a file system that does not know its holes', async () => {
    const base = pattern(2 * MIB)
    base.fill(0, MIB)
    const image = imageOf(base)
    vi.spyOn(binding().fileIo, 'seekData').mockReturnValue(-constants.errno.EINVAL)
    const path = newFile()
    expect(await writeMemory(path, image, undefined)).toBe(256)
    expect(difference(readFileSync(path), base)).toBeUndefined()
    expect(allocated(path)).toBeLessThanOrEqual(MIB + PAGE)
  })

  it('goes on where the system writes less than it was given', async () => {
    const { ram, bytes } = makeRam(MIB)
    bytes.set(pattern(MIB))
    const handle = await open('/dev/null')
    const prototype = Object.getPrototypeOf(handle) as typeof handle
    await handle.close()
    const write = prototype.write as (...values: unknown[]) => Promise<unknown>
    const spy = vi.spyOn(prototype, 'write').mockImplementation(function (
      this: unknown,
      ...[buffer, offset, length, position]: unknown[]
    ) {
      return write.call(this, buffer, offset, Math.min(length as number, 100_000), position)
    } as never)
    const path = newFile()
    await writeMemory(path, closing(ram.capture()), undefined)
    expect(spy.mock.calls.length).toBe(11)
    expect(difference(readFileSync(path), bytes)).toBeUndefined()
  })

  it('says how far it is', async () => {
    const { ram, bytes } = makeRam(4 * MIB)
    bytes.fill(1, 0, 3 * MIB + PAGE)
    const seen: SnapshotProgress[] = []
    await writeMemory(newFile(), closing(ram.capture()), undefined, { onProgress: (at) => seen.push(at) })
    const total = 3 * MIB + PAGE
    expect(seen).toEqual([0, MIB, 2 * MIB, 3 * MIB, total].map((done) => ({ done, total })))
  })

  it('of no memory that was touched, says that too', async () => {
    const { ram } = makeRam(MIB)
    const path = newFile()
    const onProgress = vi.fn()
    expect(await writeMemory(path, closing(ram.capture()), undefined, { onProgress })).toBe(0)
    expect(onProgress.mock.calls).toEqual([[{ done: 0, total: 0 }]])
    expect(statSync(path).size).toBe(MIB)
  })

  it('ends with the reason of a signal', async () => {
    const { ram, bytes } = makeRam(4 * MIB)
    bytes.fill(1)
    const controller = new AbortController()
    const seen: number[] = []
    const onProgress = ({ done }: SnapshotProgress) => {
      seen.push(done)
      if (done === MIB) controller.abort(new Error('enough'))
    }
    const image = closing(ram.capture())
    const { signal } = controller
    await expect(writeMemory(newFile(), image, undefined, { onProgress, signal })).rejects.toThrow('enough')
    expect(seen).toEqual([0, MIB])
  })

  it('is durable when it is done', async () => {
    const handle = await open('/dev/null')
    const datasync = vi.spyOn(Object.getPrototypeOf(handle) as typeof handle, 'datasync')
    await handle.close()
    await writeMemory(newFile(), closing(makeRam(PAGE).ram.capture()), undefined)
    expect(datasync).toHaveBeenCalledOnce()
  })

  it('touches no file that is there', async () => {
    const path = newFile()
    writeFileSync(path, 'mine')
    await expect(writeMemory(path, closing(makeRam(PAGE).ram.capture()), undefined)).rejects.toThrow('EEXIST')
    expect(readFileSync(path, 'utf8')).toBe('mine')
  })
})

describe('opening memory', () => {
  const SIZE = 16 * PAGE

  /** A file of so many pages in which those have this byte. */
  function makeFile(pages: Readonly<Record<number, number>>, size = SIZE): string {
    const path = newFile()
    const bytes = new Uint8Array(size)
    for (const [page, byte] of Object.entries(pages)) bytes.fill(byte, +page * PAGE, (+page + 1) * PAGE)
    writeFileSync(path, bytes)
    return path
  }

  it('has of each page what the last file says that has it, zeros too', async () => {
    const image = closing(
      await openMemory(SIZE, [
        { path: makeFile({ 0: 1, 1: 2, 2: 3, 9: 4 }), pages: 'all' },
        { path: makeFile({ 1: 12, 2: 13, 3: 99 }), pages: Uint32Array.of(1, 2, 15, 1) },
        { path: makeFile({ 0: 21 }), pages: Uint32Array.of(0, 1, 2, 1) },
      ]),
    )
    const firsts = Array.from({ length: 16 }, (_, page) => bytesOf(image)[page * PAGE]!)
    expect(firsts).toEqual([21, 12, 0, 0, 0, 0, 0, 0, 0, 4, 0, 0, 0, 0, 0, 0])
  })

  it('gives back what was written, whatever has changed since', async () => {
    const page = fc.nat(63)
    const change = fc.tuple(page, fc.nat(255))
    await fc.assert(
      fc.asyncProperty(
        fc.array(fc.array(change, { maxLength: 20 }), { minLength: 1, maxLength: 4 }),
        async (steps) => {
          const folder = makeFolder()
          const ram = MachineRam.create({ size: 64 * PAGE })
          const files = []
          try {
            const bytes = new Uint8Array(ram.ram.buffer())
            for (const [index, changes] of steps.entries()) {
              for (const [at, byte] of changes) bytes.fill(byte, at * PAGE, (at + 1) * PAGE)
              const image = ram.capture()
              const pages = ram.takeChanges()
              const path = join(folder, `${index}`)
              await writeMemory(path, image, index === 0 ? undefined : pages)
              files.push({ path, pages: index === 0 ? ('all' as const) : pages })
              image.close()
            }
            const opened = await openMemory(64 * PAGE, files)
            expect(difference(bytesOf(opened), bytes)).toBeUndefined()
            // Once more, as a whole: from a file with changes over it.
            const whole = join(folder, 'whole')
            await writeMemory(whole, opened, undefined)
            expect(difference(readFileSync(whole), bytes)).toBeUndefined()
            opened.close()
          } finally {
            ram.close()
            await rm(folder, { recursive: true })
          }
        },
      ),
      { numRuns: 30 },
    )
  })

  it.each([
    ['shorter', SIZE - 1],
    ['longer', SIZE + 1],
    ['empty', 0],
  ])('refuses a file that is %s', async (_, size) => {
    const fine = { path: makeFile({}), pages: 'all' as const }
    const path = makeFile({})
    truncateSync(path, size)
    const expected = withCode('ERR_SNAPSHOT_DAMAGED', new RegExp(`expected ${SIZE} bytes but it has ${size}`))
    await expect(openMemory(SIZE, [{ path, pages: 'all' }])).rejects.toThrow(expected)
    await expect(openMemory(SIZE, [fine, { path, pages: Uint32Array.of(0, 1) }])).rejects.toThrow(expected)
  })

  it('refuses a file that is not there', async () => {
    await expect(openMemory(SIZE, [{ path: newFile(), pages: 'all' }])).rejects.toThrow(
      withCode('ERR_SNAPSHOT_DAMAGED', /it is not there/),
    )
  })

  it('does not wait for a FIFO', async () => {
    const path = newFile()
    execFileSync('mkfifo', [path])
    await expect(openMemory(SIZE, [{ path, pages: 'all' }])).rejects.toThrow('to be a file')
  })

  it('refuses more memory than there is', async () => {
    const size = Math.ceil(totalmem() / PAGE) * PAGE * 2
    const path = newFile()
    writeFileSync(path, '')
    truncateSync(path, size)
    await expect(openMemory(size, [{ path, pages: 'all' }])).rejects.toThrow(withCode('ERR_MEMORY_SIZE'))
  })

  it('keeps one file open, until the image is closed', async () => {
    const open = () => fs.readdirSync('/proc/self/fd').length
    const before = open()
    const image = await openMemory(SIZE, [
      { path: makeFile({}), pages: 'all' },
      { path: makeFile({}), pages: Uint32Array.of(0, 1) },
    ])
    expect(open()).toBe(before + 1)
    image.close()
    expect(open()).toBe(before)
  })
})
