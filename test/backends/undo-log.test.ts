import fs, { copyFileSync, existsSync, readFileSync, statSync, truncateSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { crc32 } from 'node:zlib'
import fc from 'fast-check'
import { afterEach, describe, expect, it, vi } from 'vitest'
import { FileDisk } from '../../src/backends/file-disk.js'
import { MemoryDisk } from '../../src/backends/memory-disk.js'
import { OverlayDisk } from '../../src/backends/overlay-disk.js'
import { SharedDisk } from '../../src/backends/shared-disk.js'
import { UndoLog } from '../../src/backends/undo-log.js'
import { binding } from '../../src/binding.js'
import type { BlockBackend } from '../../src/virtio/block-backend.js'
import { makeFolder } from '../helpers/folders.js'
import {
  actions,
  closing,
  difference,
  makeImage,
  pattern,
  performChange,
  readBytes,
  withCode,
} from './disks.js'

const CLUSTER = 4096
const SIZE = 61 * 512
const CONTENT = pattern(SIZE)
// Some of it is zero: clusters 2 and 3.
CONTENT.fill(0, 2 * CLUSTER, 4 * CLUSTER)

afterEach(() => vi.restoreAllMocks())

type Actions = ReturnType<typeof actions> extends fc.Arbitrary<infer T> ? T : never

const newPath = () => join(makeFolder(), 'undo.log')

/** A disk over `inner` with a new log. */
async function begin(inner: BlockBackend, path = newPath()) {
  const log = await UndoLog.create(path, inner)
  const disk = closing(new SharedDisk(inner))
  disk.attach(log)
  return { log, disk, path }
}

/** A complete log of some writes. */
async function makeLog(): Promise<string> {
  const { log, disk, path } = await begin(new MemoryDisk({ bytes: CONTENT }))
  await disk.write(512, [pattern(512, 2)])
  await disk.writeZeroes!(0, 4 * CLUSTER, true)
  await disk.discard!(SIZE - 512, 512)
  await log.close()
  return path
}

/** Rolls a disk of other bytes back. @returns what is on it then */
async function rollBackOther(path: string): Promise<Uint8Array> {
  const disk = new MemoryDisk({ bytes: pattern(SIZE, 9) })
  await UndoLog.rollBack(path, disk)
  return readBytes(disk, 0, SIZE)
}

/** A record, as docs/disks.md has it. */
function encodeRecord(offset: number, length: number, kind: number, bytes: Uint8Array): Buffer {
  const header = Buffer.alloc(24)
  header.writeBigUInt64LE(BigInt(offset), 0)
  header.writeUInt32LE(length, 8)
  header.writeUInt32LE(kind, 12)
  header.writeUInt32LE(crc32(bytes), 16)
  header.writeUInt32LE(crc32(header.subarray(0, 20)), 20)
  return Buffer.concat([header, bytes])
}

describe('an UndoLog', () => {
  it('takes a disk back after a crash at any moment', async () => {
    const property = async (before: Actions, after: Actions, turns: number, cut: number, nowait: boolean) => {
      if (!nowait) {
        vi.spyOn(binding().fileIo, 'preadvNowait').mockReturnValue(-11)
        vi.spyOn(binding().fileIo, 'pwritevNowait').mockReturnValue(-11)
      }
      const image = makeImage(CONTENT)
      const inner = await FileDisk.open({ path: image })
      const model = CONTENT.slice()
      for (const action of before) {
        if (action.kind !== 'flush' && action.kind !== 'reopen') await performChange(inner, model, action)
      }
      const { log, disk, path } = await begin(inner)
      const start = await readBytes(inner, 0, SIZE)
      const pending = after.map(async (action) => {
        if (action.kind === 'flush' || action.kind === 'reopen') return
        await performChange(disk, new Uint8Array(SIZE), action)
      })
      for (let i = 0; i < turns; i++) await new Promise(setImmediate)
      // First the image: the log may only have more than it needs.
      const [imageCopy, logCopy] = [`${image}.copy`, `${path}.copy`]
      copyFileSync(image, imageCopy)
      copyFileSync(path, logCopy)
      const next = encodeRecord(0, CLUSTER, 0, pattern(CLUSTER, 7))
      fs.appendFileSync(logCopy, next.subarray(0, cut))
      await Promise.all(pending)
      await disk.close()
      await log.close()
      vi.restoreAllMocks()
      for (const [from, by] of [
        [imageCopy, logCopy],
        [image, path],
      ] as const) {
        const again = await FileDisk.open({ path: from })
        await UndoLog.rollBack(by, again)
        expect(difference(await readBytes(again, 0, SIZE), start)).toBeUndefined()
        await again.close()
      }
      expect(log.error).toBeUndefined()
    }
    await fc.assert(
      fc.asyncProperty(
        actions(61, 10),
        actions(61, 20),
        fc.nat(12),
        fc.nat(24 + CLUSTER - 1),
        fc.boolean(),
        property,
      ),
      { numRuns: 60 },
    )
  })

  it('takes an overlay back to what was not flushed when the log was begun', async () => {
    const folder = makeFolder()
    const open = () =>
      OverlayDisk.open({ base: new MemoryDisk({ bytes: CONTENT }), path: join(folder, 'changes') })
    const inner = closing(await open())
    await inner.write(512, [pattern(512, 2)])
    await inner.write(5 * CLUSTER, [pattern(512, 2)])
    const start = await readBytes(inner, 0, SIZE)
    const { disk, path } = await begin(inner)
    await disk.write(0, [pattern(3 * CLUSTER, 3)])
    // What a process leaves that is killed.
    copyFileSync(join(folder, 'changes'), join(folder, 'copy'))
    const base = new MemoryDisk({ bytes: CONTENT })
    const copy = closing(await OverlayDisk.open({ base, path: join(folder, 'copy') }))
    copyFileSync(path, join(folder, 'log'))
    await UndoLog.rollBack(join(folder, 'log'), copy)
    expect(difference(await readBytes(copy, 0, SIZE), start)).toBeUndefined()
  })

  it('can go back again and again, and to a disk that has no way to make zeros', async () => {
    const path = await makeLog()
    const disk = new MemoryDisk({ bytes: pattern(SIZE, 9) })
    const plain: BlockBackend = {
      size: SIZE,
      readOnly: false,
      read: (offset, buffers) => disk.read(offset, buffers),
      write: (offset, buffers) => disk.write(offset, buffers),
      flush: () => disk.flush(),
      close: () => disk.close(),
    }
    const flush = vi.spyOn(disk, 'flush')
    for (const target of [plain, disk]) {
      await UndoLog.rollBack(path, target)
      expect(flush).toHaveBeenCalledTimes(1)
      flush.mockClear()
      const back = await readBytes(disk, 0, SIZE)
      expect(difference(back.slice(0, 4 * CLUSTER), CONTENT.slice(0, 4 * CLUSTER))).toBeUndefined()
    }
  })

  it('gives up when it cannot keep something; the disk goes on', async () => {
    const { writev } = fs
    let isFull = false
    vi.spyOn(binding().fileIo, 'pwritevNowait').mockReturnValue(-11)
    vi.spyOn(fs, 'writev').mockImplementation(((...args: Parameters<typeof writev>) => {
      const error = Object.assign(new Error('ENOSPC: told so'), { code: 'ENOSPC' })
      // What is there already can be written again.
      if (isFull && args[2]! > 0) args[3]!(error, 0, [])
      else writev(...args)
    }) as never)
    const { log, disk, path } = await begin(new MemoryDisk({ bytes: CONTENT }))
    await disk.write(0, [pattern(512, 2)])
    expect(log.error).toBeUndefined()
    isFull = true
    await Promise.all([1, 2, 3].map((i) => disk.write(i * CLUSTER, [pattern(512, 2)])))
    expect(log.error).toEqual(withCode('ERR_DISK_IO', /undo\.log.*ENOSPC/))
    isFull = false
    await disk.write(5 * CLUSTER, [pattern(512, 2)])
    for (const i of [0, 1, 2, 3, 5]) {
      expect(difference(await readBytes(disk, i * CLUSTER, 512), pattern(512, 2))).toBeUndefined()
    }
    await log.close()
    await expect(rollBackOther(path)).rejects.toThrow(withCode('ERR_DISK_FORMAT', /incomplete/))
  })

  it('says that it is incomplete before the write that it does not have', async () => {
    const { writev } = fs
    let mark: (() => void) | undefined
    vi.spyOn(binding().fileIo, 'pwritevNowait').mockReturnValue(-11)
    vi.spyOn(fs, 'writev')
      .mockImplementationOnce(writev)
      .mockImplementation(((...args: Parameters<typeof writev>) => {
        mark = () => writev(...args)
      }) as never)
    const inner = new MemoryDisk({ bytes: CONTENT })
    const { disk, path } = await begin(inner)
    vi.spyOn(inner, 'read').mockImplementation(() => Promise.reject(new Error('a bad sector')))
    const states: number[] = []
    vi.spyOn(inner, 'write').mockImplementation(() => {
      states.push(readFileSync(path).readUInt32LE(32))
      return undefined
    })
    const writes = [0, 0, 1].map((i) => disk.write(i * CLUSTER, [pattern(512, 2)]))
    await vi.waitFor(() => expect(mark).toBeDefined())
    writes.push(disk.write(0, [pattern(512, 2)]))
    mark!()
    await Promise.all(writes)
    expect(states).toEqual([1, 1, 1, 1])
  })

  it('fails no write where it is closed before it is detached', async () => {
    const { log, disk } = await begin(new MemoryDisk({ bytes: CONTENT }))
    await log.close()
    await disk.write(0, [pattern(512, 2)])
    expect(log.error).toEqual(withCode('ERR_DISK_IO', /closed/))
    expect(difference(await readBytes(disk, 0, 512), pattern(512, 2))).toBeUndefined()
  })

  it('keeps nothing any more when it is detached', async () => {
    const { log, disk, path } = await begin(new MemoryDisk({ bytes: CONTENT }))
    disk.detach(log)
    expect(disk.write(0, [pattern(512, 2)])).toBeUndefined()
    await log.close()
    expect(statSync(path).size).toBe(64)
  })

  it('needs a new file, and leaves none if it could not begin', async () => {
    const base = new MemoryDisk({ bytes: CONTENT })
    const path = await makeLog()
    const before = readFileSync(path)
    await expect(UndoLog.create(path, base)).rejects.toThrow(withCode('ERR_DISK_OPEN', /EEXIST/))
    expect(readFileSync(path).equals(before)).toBe(true)
    vi.spyOn(binding().fileIo, 'pwritevNowait').mockReturnValue(-11)
    vi.spyOn(fs, 'writev').mockImplementation(((...args: Parameters<typeof fs.writev>) => {
      args[3]!(Object.assign(new Error('ENOSPC'), { code: 'ENOSPC' }), 0, [])
    }) as never)
    const other = newPath()
    await expect(UndoLog.create(other, base)).rejects.toThrow(withCode('ERR_DISK_IO', /ENOSPC/))
    expect(existsSync(other)).toBe(false)
  })
})

describe('the file of an UndoLog', () => {
  it('is as docs/disks.md says', async () => {
    const file = readFileSync(await makeLog())
    expect(file.subarray(0, 20).toString()).toBe('nodevisor undo log\n\0')
    expect([file.readUInt32LE(20), file.readBigUInt64LE(24), file.readUInt32LE(32)]).toEqual([
      1,
      BigInt(SIZE),
      0,
    ])
    expect(file.readUInt32LE(60)).toBe(crc32(file.subarray(0, 60)))
    const records = [
      encodeRecord(0, CLUSTER, 0, CONTENT.subarray(0, CLUSTER)),
      encodeRecord(CLUSTER, 3 * CLUSTER, 0, CONTENT.subarray(CLUSTER, 4 * CLUSTER)),
      encodeRecord(7 * CLUSTER, SIZE - 7 * CLUSTER, 0, CONTENT.subarray(7 * CLUSTER)),
    ]
    expect(difference(file.subarray(64), Buffer.concat(records))).toBeUndefined()
  })

  it('has each cluster once, and no bytes of zeros', async () => {
    const { log, disk, path } = await begin(new MemoryDisk({ bytes: CONTENT }))
    for (let i = 0; i < 3; i++) await disk.write(2 * CLUSTER + 512, [pattern(CLUSTER, i + 2)])
    await log.close()
    const record = encodeRecord(2 * CLUSTER, 2 * CLUSTER, 1, new Uint8Array())
    expect(difference(readFileSync(path).subarray(64), record)).toBeUndefined()
  })

  it('may be cut off anywhere after its header', async () => {
    const path = await makeLog()
    const file = readFileSync(path)
    // After the header, and each of the records.
    const ends = [64, 64 + 24 + CLUSTER, 64 + 48 + 4 * CLUSTER, file.length]
    for (const [i, end] of ends.entries()) {
      for (const length of [end, end + 1, end + 23, end + 24, (ends[i + 1] ?? 0) - 1]) {
        if (length < end || length > file.length) continue
        writeFileSync(path, file.subarray(0, length))
        const back = await rollBackOther(path)
        const expected = pattern(SIZE, 9)
        const undone = [0, CLUSTER, 4 * CLUSTER, 4 * CLUSTER][i]!
        expected.set(CONTENT.subarray(0, undone))
        if (i === 3) expected.set(CONTENT.subarray(7 * CLUSTER), 7 * CLUSTER)
        expect(difference(back, expected), `${length} bytes`).toBeUndefined()
      }
    }
  })

  it('28: is refused with any other damage, before anything is written', async () => {
    const path = await makeLog()
    const file = readFileSync(path)
    const disk = new MemoryDisk({ bytes: CONTENT })
    const write = vi.spyOn(disk, 'write')
    const zero = vi.spyOn(disk, 'writeZeroes')
    const refused = async (bytes: Uint8Array, message = /./) => {
      writeFileSync(path, bytes)
      await expect(UndoLog.rollBack(path, disk)).rejects.toThrow(withCode('ERR_DISK_FORMAT', message))
    }
    const headers = [0, 64, 64 + 24 + CLUSTER, 64 + 48 + 4 * CLUSTER]
    const damaged = headers.flatMap((start, i) =>
      Array.from({ length: i === 0 ? 64 : 24 }, (_, j) => start + j),
    )
    for (const at of [...damaged, 100, 5000, file.length - 1]) {
      const bytes = Buffer.from(file)
      bytes[at]! ^= 0x10
      await refused(bytes)
    }
    await refused(file.subarray(0, 63), /not an undo log/)
    await refused(new Uint8Array(0), /not an undo log/)
    const header = file.subarray(0, 64)
    const none = new Uint8Array()
    for (const record of [
      encodeRecord(8 * CLUSTER, CLUSTER, 1, none),
      encodeRecord(0, SIZE + 512, 1, none),
      encodeRecord(512, CLUSTER, 1, none),
      encodeRecord(0, CLUSTER + 512, 1, none),
      encodeRecord(0, 100, 1, none),
      encodeRecord(0, 0, 1, none),
      encodeRecord(0, CLUSTER, 2, none),
      encodeRecord(0, CLUSTER, 1, pattern(512)).subarray(0, 24),
      encodeRecord(2 ** 60, CLUSTER, 1, none),
    ]) {
      await refused(Buffer.concat([header, encodeRecord(0, CLUSTER, 1, none), record]), /damaged at (88|112)/)
    }
    const large = new MemoryDisk({ size: 2 ** 32 })
    const { log, path: largePath } = await begin(large)
    await log.close()
    fs.appendFileSync(largePath, encodeRecord(0, 2 ** 31, 0, none))
    await expect(UndoLog.rollBack(largePath, large)).rejects.toThrow(
      withCode('ERR_DISK_FORMAT', /damaged at 64/),
    )
    expect(write).not.toHaveBeenCalled()
    expect(zero).not.toHaveBeenCalled()
  })

  it('28: is refused whatever bytes it has', async () => {
    const path = await makeLog()
    const header = readFileSync(path).subarray(0, 64)
    const rollBack = async (bytes: Uint8Array) => {
      writeFileSync(path, Buffer.concat([header, bytes]))
      // What is shorter than a record is one that was cut off.
      if (bytes.length < 24) await rollBackOther(path)
      else await expect(rollBackOther(path)).rejects.toThrow(withCode('ERR_DISK_FORMAT'))
    }
    await fc.assert(fc.asyncProperty(fc.uint8Array({ maxLength: 100 }), rollBack))
  })

  it('27: is refused for other disks, and those that cannot be written', async () => {
    const path = await makeLog()
    await expect(UndoLog.rollBack(path, new MemoryDisk({ size: 512 }))).rejects.toThrow(
      withCode('ERR_DISK_FORMAT', /of 31232 bytes but this one has 512/),
    )
    const disk = closing(await FileDisk.open({ path: makeImage(CONTENT), readOnly: true }))
    await expect(UndoLog.rollBack(path, disk)).rejects.toThrow(withCode('ERR_INVALID_ARGUMENT'))
    await expect(rollBackOther(`${path}.not`)).rejects.toThrow(withCode('ERR_DISK_OPEN', /ENOENT/))
  })

  it('is in use while it is written', async () => {
    const { log, path } = await begin(new MemoryDisk({ bytes: CONTENT }))
    await expect(rollBackOther(path)).rejects.toThrow(withCode('ERR_DISK_IN_USE'))
    await log.close()
    truncateSync(path, 64)
    expect(difference(await rollBackOther(path), pattern(SIZE, 9))).toBeUndefined()
  })
})
