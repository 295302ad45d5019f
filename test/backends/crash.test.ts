import { type ChildProcess, fork } from 'node:child_process'
import { once } from 'node:events'
import fs, { readFileSync, rmSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { Worker } from 'node:worker_threads'
import fc from 'fast-check'
import { afterEach, describe, expect, it, onTestFinished, vi } from 'vitest'
import { MemoryDisk } from '../../src/backends/memory-disk.js'
import { OverlayDisk } from '../../src/backends/overlay-disk.js'
import { UndoLog } from '../../src/backends/undo-log.js'
import { binding } from '../../src/binding.js'
import { SECTOR_SIZE } from '../../src/virtio/block-backend.js'
import { makeFolder } from '../helpers/folders.js'
import {
  DurableWrites,
  mix,
  type StampedDisk,
  untouched,
  WRITES_AT_ONCE,
  writeStamps,
} from './crash-writes.js'
import { type DiskTask, openDisk } from './disk-process.js'
import { difference, makeImage, readBytes } from './disks.js'

const PROCESS = new URL('./disk-process.ts', import.meta.url)
const TSX = ['--import', 'tsx']

afterEach(() => vi.restoreAllMocks())

function startProcess(task: DiskTask): ChildProcess {
  const child = fork(PROCESS, [JSON.stringify(task)], { execArgv: TSX })
  onTestFinished(() => void child.kill('SIGKILL'))
  return child
}

/** Kills a process after so many of its flushes. @returns the last write that a flush has covered */
async function killAfter(task: DiskTask, flushes: number): Promise<number> {
  const child = startProcess(task)
  const exit = once(child, 'exit')
  let last = 0
  let count = 0
  child.on('message', (number: number) => {
    last = number
    count += 1
    if (count === flushes) child.kill('SIGKILL')
  })
  const [code, signal] = await exit
  expect([code, signal]).toEqual([null, 'SIGKILL'])
  return last
}

describe('a process that is killed while it writes', () => {
  it.each(['raw image', 'overlay'])('leaves all that was flushed in its %s', async (kind) => {
    const disk = { zoneSectors: 4001, seed: 1 }
    const image = makeImage(untouched(disk))
    const place = kind === 'overlay' ? { path: join(makeFolder(), 'changes'), base: image } : { path: image }
    const durable = new DurableWrites(disk)
    const flushes = fc.sample(fc.integer({ min: 1, max: 300 }), 3)
    let writes = 0
    for (let round = 0; writes < 5000; round++) {
      const first = durable.last + 1 + WRITES_AT_ONCE - (durable.last % WRITES_AT_ONCE)
      // The numbers in between are of no write.
      durable.last = first - 1
      const last = await killAfter({ ...disk, ...place, first }, flushes[round] ?? 200)
      durable.flushed(last)
      writes += last - first + 1
      const backend = await openDisk(place)
      expect(await durable.check(backend), `after flushes: ${flushes}`).toEqual([])
      await backend.close()
    }
  })
})

describe('a process that is killed while it has an undo log', () => {
  it.each(['raw image', 'overlay'])('leaves a log that takes its %s back', async (kind) => {
    const disk = { zoneSectors: 4001, seed: 1 }
    const content = untouched(disk)
    const image = makeImage(content)
    const folder = makeFolder()
    const place = kind === 'overlay' ? { path: join(folder, 'changes'), base: image } : { path: image }
    for (const flushes of fc.sample(fc.integer({ min: 1, max: 300 }), 3)) {
      const undoLog = join(folder, `undo-${flushes}`)
      await killAfter({ ...disk, ...place, first: 1, undoLog }, flushes)
      const backend = await openDisk(place)
      const differs = async () => difference(await readBytes(backend, 0, content.length), content)
      expect(await differs()).toBeDefined()
      await UndoLog.rollBack(undoLog, backend)
      expect(await differs(), `after ${flushes} flushes`).toBeUndefined()
      await backend.close()
      rmSync(undoLog)
    }
  })
})

describe('a host whose power goes', () => {
  interface Change {
    readonly offset: number
    readonly bytes: Uint8Array
  }

  /**
   * A file as a host may leave it whose power goes: all that a finished fdatasync() had to cover, and any sectors of
   * what was written since.
   */
  class VolatileFile {
    readonly #durable: Buffer
    #changes: Change[] = []
    /** Called whenever something has happened to the file. */
    onEvent: () => void = () => undefined

    constructor(path: string) {
      this.#durable = readFileSync(path)
      const { writev, fdatasync } = fs
      const { fallocate } = binding().fileIo
      // As on most file systems.
      vi.spyOn(binding().fileIo, 'pwritevNowait').mockReturnValue(-95)
      vi.spyOn(fs, 'writev').mockImplementation(((
        fd: number,
        buffers: Uint8Array[],
        offset: number,
        callback: Parameters<typeof writev>[3],
      ) => {
        const change = { offset, bytes: Buffer.concat(buffers) }
        writev(fd, buffers, offset, (...results) => {
          this.#change(change)
          callback(...results)
        })
      }) as never)
      vi.spyOn(fs, 'fdatasync').mockImplementation((fd, callback) => {
        const covered = this.#changes.slice()
        this.onEvent()
        fdatasync(fd, (error) => {
          for (const { offset, bytes } of covered) this.#durable.set(bytes, offset)
          this.#changes = this.#changes.filter((change) => !covered.includes(change))
          this.onEvent()
          callback(error)
        })
      })
      vi.spyOn(binding().fileIo, 'fallocate').mockImplementation(async (fd, mode, offset, length) => {
        const result = await fallocate(fd, mode, offset, length)
        this.#change({ offset, bytes: new Uint8Array(length) })
        return result
      })
    }

    powerCut(seed: number): Uint8Array {
      const file = Buffer.from(this.#durable)
      for (const [i, { offset, bytes }] of this.#changes.entries()) {
        for (let at = 0; at < bytes.length; at += SECTOR_SIZE) {
          const survives = mix(seed, mix(i, at)) % 2 === 0
          if (survives) file.set(bytes.subarray(at, at + SECTOR_SIZE), offset + at)
        }
      }
      return file
    }

    #change(change: Change): void {
      this.#changes.push(change)
      this.onEvent()
    }
  }

  it('leaves all that was flushed in an overlay, and nothing that was never written', async () => {
    let cuts = 0
    const run = async (seed: number, batches: number, cutAt: number) => {
      const disk: StampedDisk = { zoneSectors: 101, seed }
      const path = join(makeFolder(), 'changes')
      const base = () => new MemoryDisk({ bytes: untouched(disk) })
      await (await OverlayDisk.open({ base: base(), path })).close()
      const file = new VolatileFile(path)
      const overlay = await OverlayDisk.open({ base: base(), path })
      const durable = new DurableWrites(disk)
      let cut: { readonly file: Uint8Array; readonly durable: DurableWrites } | undefined
      let events = 0
      file.onEvent = () => {
        events += 1
        if (events === cutAt) cut = { file: file.powerCut(seed), durable: durable.copy() }
      }
      const flushes: Promise<void>[] = []
      for (let batch = 0; batch < batches; batch++) {
        const first = batch * WRITES_AT_ONCE + 1
        const writes = writeStamps(overlay, disk, first)
        // Covers none of these writes, but begins while they are under way.
        if (mix(batch, seed) % 2 === 0) flushes.push(overlay.flush()!)
        await writes
        // Some go on while the next writes do.
        const flush = overlay.flush()!.then(() => durable.flushed(first + WRITES_AT_ONCE - 1))
        flushes.push(flush)
        if (mix(seed, batch) % 3 > 0) await flush
      }
      await Promise.all(flushes)
      await overlay.close()
      vi.restoreAllMocks()
      if (cut === undefined) return
      cuts += 1
      writeFileSync(path, cut.file)
      const after = await OverlayDisk.open({ base: base(), path })
      expect(await cut.durable.check(after)).toEqual([])
      await after.close()
    }
    await fc.assert(
      fc.asyncProperty(fc.integer(), fc.integer({ min: 1, max: 8 }), fc.integer({ min: 1, max: 60 }), run),
      { numRuns: 60 },
    )
    expect(cuts).toBeGreaterThan(20)
  })
})

describe('a worker that is terminated while requests are under way', () => {
  it.each(['raw image', 'overlay'])('33: ends, and leaves its %s to others', async (kind) => {
    const image = makeImage(2 ** 22)
    const place = kind === 'overlay' ? { path: join(makeFolder(), 'changes'), base: image } : { path: image }
    for (let i = 0; i < 3; i++) {
      const workerData: DiskTask = { ...place, zoneSectors: 1, seed: 1, first: 1 }
      // A worker does not load TypeScript by itself, whatever its flags.
      const load = `import('tsx/esm/api').then(({ tsImport }) => tsImport('${PROCESS}', '${import.meta.url}'))`
      const worker = new Worker(load, { eval: true, workerData })
      onTestFinished(() => void worker.terminate())
      expect(await once(worker, 'message')).toEqual(['busy'])
      expect(await worker.terminate()).toBe(1)
      await (await openDisk(place)).close()
    }
  })
})
