import fs, { closeSync, openSync, readdirSync, readFileSync, statSync, writeSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { crc32 } from 'node:zlib'
import fc from 'fast-check'
import { afterEach, describe, expect, it, vi } from 'vitest'
import { FileDisk } from '../../src/backends/file-disk.js'
import { MemoryDisk } from '../../src/backends/memory-disk.js'
import { OverlayDisk } from '../../src/backends/overlay-disk.js'
import { binding } from '../../src/binding.js'
import type { BlockBackend } from '../../src/virtio/block-backend.js'
import { makeFolder } from '../helpers/folders.js'
import {
  actions,
  closing,
  compareWithBytes,
  difference,
  expectClosed,
  makeImage,
  pattern,
  readBytes,
  wholeClusters,
  withCode,
} from './disks.js'

const MIB = 2 ** 20
const CLUSTER = 4096
/** What a page of the map is about. */
const MAP_PAGE_SPAN = 128 * MIB

afterEach(() => vi.restoreAllMocks())

const newPath = () => join(makeFolder(), 'changes.overlay')
const openDisk = async (base: BlockBackend, path?: string) => closing(await OverlayDisk.open({ base, path }))

/** A disk that has the same bytes everywhere, answers later, and is never written. */
class UniformDisk implements BlockBackend {
  readonly readOnly = true
  readonly size: number
  readonly #byte: number
  reads = 0
  /** Reads under way wait for it. */
  gate: Promise<void> = Promise.resolve()

  constructor(size: number, byte: number) {
    this.size = size
    this.#byte = byte
  }

  async read(_offset: number, buffers: readonly Uint8Array[]): Promise<void> {
    this.reads += 1
    await this.gate
    for (const buffer of buffers) buffer.fill(this.#byte)
  }

  async write(): Promise<void> {
    throw new Error('The base was written')
  }

  flush(): undefined {}

  async close(): Promise<void> {}
}

describe('an OverlayDisk', () => {
  const size = 61 * 512
  const content = pattern(size)
  const discardRule = wholeClusters(CLUSTER, size)
  type Actions = Parameters<typeof compareWithBytes>[1]

  it('holds what plain bytes hold, whatever is done to it', async () => {
    const compare = async (list: Actions) => {
      const path = newPath()
      const base = () => new MemoryDisk({ bytes: content })
      await compareWithBytes(
        { open: () => OverlayDisk.open({ base: base(), path }), content, discardRule },
        list,
      )
    }
    await fc.assert(fc.asyncProperty(actions(61), compare))
  })

  it('holds it where nothing is in the page cache, or can be made zero', async () => {
    vi.spyOn(binding().fileIo, 'preadvNowait').mockReturnValue(-11)
    vi.spyOn(binding().fileIo, 'fallocate').mockResolvedValue(-95)
    const compare = async (list: Actions) => {
      const path = newPath()
      const base = () => new MemoryDisk({ bytes: content })
      await compareWithBytes(
        { open: () => OverlayDisk.open({ base: base(), path }), content, discardRule },
        list,
      )
    }
    await fc.assert(fc.asyncProperty(actions(61), compare), { numRuns: 30 })
  })

  it('holds it over another overlay, over a file', async () => {
    const compare = async (list: Actions) => {
      const image = makeImage(content)
      const folder = makeFolder()
      const open = async () => {
        const base = await FileDisk.open({ path: image, readOnly: true })
        const middle = await OverlayDisk.open({ base, path: join(folder, 'middle') })
        // Something of each of the three.
        await middle.write(CLUSTER, [content.slice(CLUSTER, 3 * CLUSTER)])
        return OverlayDisk.open({ base: middle, path: join(folder, 'top') })
      }
      await compareWithBytes({ open, content, discardRule }, list)
      expect(difference(readFileSync(image), content)).toBeUndefined()
    }
    await fc.assert(fc.asyncProperty(actions(61), compare), { numRuns: 30 })
  })

  it('holds it where it is discarded in the end', async () => {
    const compare = async (list: Actions) => {
      const open = () => OverlayDisk.open({ base: new MemoryDisk({ bytes: content }) })
      await compareWithBytes({ open, content, discardRule, forgets: true }, list)
    }
    await fc.assert(fc.asyncProperty(actions(61), compare), { numRuns: 30 })
  })

  it('holds it on both sides of a border between pages of its map', async () => {
    const start = MAP_PAGE_SPAN - 30 * 512
    const bytes = new Uint8Array(2 * MAP_PAGE_SPAN + 512)
    bytes.set(content, start)
    const base = new MemoryDisk({ bytes })
    vi.spyOn(base, 'close').mockResolvedValue()
    const rule = wholeClusters(CLUSTER, bytes.length)
    const compare = async (list: Actions) => {
      const path = newPath()
      const open = () => OverlayDisk.open({ base, path })
      await compareWithBytes({ open, content, start, discardRule: rule }, list)
    }
    await fc.assert(fc.asyncProperty(actions(61), compare), { numRuns: 50 })
  })

  it('leaves the base alone, and reads as that until it is written', async () => {
    const base = new MemoryDisk({ bytes: content })
    const disk = await openDisk(base, newPath())
    expect([disk.size, disk.readOnly, disk.blockSize]).toEqual([size, false, CLUSTER])
    expect(difference(await readBytes(disk, 0, size), content)).toBeUndefined()
    await disk.write(512, [new Uint8Array(512)])
    await disk.discard(2 * CLUSTER, CLUSTER)
    await disk.writeZeroes(3 * CLUSTER, CLUSTER, true)
    await disk.flush()
    expect(difference(await readBytes(base, 0, size), content)).toBeUndefined()
  })

  it('reads what is next to each other together, and does not copy', async () => {
    const base = new MemoryDisk({ size: 64 * CLUSTER })
    const disk = await openDisk(base, newPath())
    await disk.write(8 * CLUSTER, [pattern(8 * CLUSTER)])
    const read = vi.spyOn(base, 'read')
    const bytes = new Uint8Array(32 * CLUSTER)
    await disk.read(512, [bytes.subarray(0, 100), bytes.subarray(100)])
    expect(read.mock.calls.map(([offset, buffers]) => [offset, buffers.map(({ length }) => length)])).toEqual(
      [
        [512, [100, 8 * CLUSTER - 612]],
        [16 * CLUSTER, [16 * CLUSTER + 512]],
      ],
    )
    for (const [, buffers] of read.mock.calls) expect(buffers[0]!.buffer).toBe(bytes.buffer)
  })

  it('reads the base only for clusters that are written in part and not there yet', async () => {
    const base = new MemoryDisk({ bytes: content })
    const read = vi.spyOn(base, 'read')
    const disk = await openDisk(base, newPath())
    await disk.write(0, [pattern(2 * CLUSTER)])
    expect(read).not.toHaveBeenCalled()
    await disk.write(512, [pattern(512)])
    expect(read).not.toHaveBeenCalled()
    await disk.write(2 * CLUSTER + 1024, [pattern(2 * CLUSTER)])
    expect(read.mock.calls.map(([offset, buffers]) => [offset, buffers[0]!.length])).toEqual([
      [2 * CLUSTER, 1024],
      [4 * CLUSTER + 1024, CLUSTER - 1024],
    ])
  })

  it('loses none of many writes to the same cluster at once', async () => {
    const base = new UniformDisk(CLUSTER * 4, 9)
    let open!: () => void
    base.gate = new Promise((resolve) => {
      open = resolve
    })
    const disk = await openDisk(base, newPath())
    const writes = [6, 1, 4, 2, 9, 12].map((sector) =>
      disk.write(sector * 512, [new Uint8Array(512).fill(sector)]),
    )
    const read = readBytes(disk, 3 * 512, 512)
    open()
    await Promise.all([...writes, read])
    const expected = new Uint8Array(CLUSTER * 4).fill(9)
    for (const sector of [6, 1, 4, 2, 9, 12]) expected.fill(sector, sector * 512, (sector + 1) * 512)
    expect(difference(await readBytes(disk, 0, CLUSTER * 4), expected)).toBeUndefined()
    expect((await read)[0]).toBe(9)
  })

  it('does not show the base again where something was discarded, nor after it was opened again', async () => {
    const path = newPath()
    const disk = await openDisk(new MemoryDisk({ bytes: content }), path)
    await disk.discard(0, size)
    expect(difference(await readBytes(disk, 0, size), new Uint8Array(size))).toBeUndefined()
    await disk.close()
    const again = await openDisk(new MemoryDisk({ bytes: content }), path)
    expect(difference(await readBytes(again, 0, size), new Uint8Array(size))).toBeUndefined()
  })

  it('takes as much of the file system as was written', async () => {
    const path = newPath()
    const disk = await openDisk(new UniformDisk(2 ** 36, 1), path)
    await disk.write(2 ** 35, [pattern(4 * CLUSTER)])
    await disk.flush()
    expect(statSync(path).size).toBeGreaterThan(2 ** 36)
    expect(statSync(path).blocks * 512).toBeLessThan(16 * CLUSTER)
    await disk.discard(2 ** 35, 4 * CLUSTER)
    await disk.flush()
    expect(statSync(path).blocks * 512).toBeLessThan(12 * CLUSTER)
  })

  it('27: is quick to open, to discard and to read over a TiB, and takes little memory', async () => {
    const size = 2 ** 40
    const path = newPath()
    const before = process.memoryUsage()
    const disk = await openDisk(new UniformDisk(size, 1), path)
    await disk.discard(CLUSTER, size - 2 * CLUSTER)
    await disk.flush()
    await disk.close()
    const again = await openDisk(new UniformDisk(size, 1), path)
    for (const [offset, byte] of [
      [0, 1],
      [CLUSTER, 0],
      [size / 2, 0],
      [size - CLUSTER - 512, 0],
      [size - CLUSTER, 1],
    ] as const) {
      expect((await readBytes(again, offset, 512))[0], `at ${offset}`).toBe(byte)
    }
    const { arrayBuffers } = process.memoryUsage()
    expect(arrayBuffers - before.arrayBuffers).toBeLessThan(4 * MIB)
  })

  it('16: gives the event loop its turn in a read of many runs', async () => {
    const disk = await openDisk(new MemoryDisk({ size: 4096 * CLUSTER }), newPath())
    for (let i = 0; i < 1024; i += 2) await disk.write(i * CLUSTER, [new Uint8Array(CLUSTER).fill(i)])
    let turns = 0
    const count = () => {
      turns += 1
      immediate = setImmediate(count)
    }
    let immediate = setImmediate(count)
    const bytes = await readBytes(disk, 0, 1024 * CLUSTER)
    clearImmediate(immediate)
    expect(turns).toBeGreaterThan(10)
    for (let i = 0; i < 1024; i++) expect(bytes[i * CLUSTER]).toBe(i % 2 === 0 ? i & 0xff : 0)
  })
})

describe('what an OverlayDisk preserves', () => {
  it('stays when the base changes, and after it was opened again', async () => {
    const size = MAP_PAGE_SPAN + 2 * MIB + 512
    const content = new Uint8Array(size)
    const start = MAP_PAGE_SPAN - 3 * MIB
    content.set(pattern(5 * MIB + 512), start)
    content.fill(0, start + MIB, start + 2 * MIB)
    const base = new MemoryDisk({ bytes: content })
    const close = vi.spyOn(base, 'close').mockResolvedValue()
    const path = newPath()
    const made = await OverlayDisk.open({ base, path })
    await made.write(start + CLUSTER, [pattern(CLUSTER, 2)])
    content.set(pattern(CLUSTER, 2), start + CLUSTER)
    await made.preserve(start + 512, 512)
    await made.close()
    const disk = await openDisk(base, path)
    // Again, and more: with what was written, and both sides of a border between pages of the map.
    await disk.preserve(start, size - start)
    expect(disk.preserve(start, size - start)).toBeUndefined()
    await base.write(start, [pattern(size - start, 3)])
    const rest = (bytes: Uint8Array) => difference(bytes, content.slice(start))
    expect(rest(await readBytes(disk, start, size - start))).toBeUndefined()
    await disk.close()
    const again = await openDisk(base, path)
    expect(rest(await readBytes(again, start, size - start))).toBeUndefined()
    await again.close()
    close.mockRestore()
  })

  it('27: lies on the disk', async () => {
    const disk = await openDisk(new MemoryDisk({ size: MIB }))
    expect(() => disk.preserve(0, MIB + 512)).toThrow(withCode('ERR_INVALID_ARGUMENT'))
    await disk.close()
    await expect(disk.preserve(0, 512)).rejects.toThrow(withCode('ERR_CLOSED'))
  })
})

describe('the file of an overlay', () => {
  const size = 40 * CLUSTER
  const makeOverlay = async () => {
    const path = newPath()
    const disk = await OverlayDisk.open({ base: new MemoryDisk({ size }), path })
    await disk.write(CLUSTER, [pattern(3 * CLUSTER)])
    await disk.close()
    return path
  }

  it('is as docs/disks.md says', async () => {
    const file = readFileSync(await makeOverlay())
    expect(file.subarray(0, 20).toString()).toBe('nodevisor overlay\n\0\0')
    expect([file.readUInt32LE(20), file.readUInt32LE(24), file.readBigUInt64LE(32)]).toEqual([
      1,
      CLUSTER,
      BigInt(size),
    ])
    expect(file.readUInt32LE(4092)).toBe(crc32(file.subarray(0, 4092)))
    expect([...file.subarray(4096, 4102)]).toEqual([0b1110, 0, 0, 0, 0, 0])
    expect(file).toHaveLength(8192 + size)
    expect(
      difference(file.subarray(8192 + CLUSTER, 8192 + 4 * CLUSTER), pattern(3 * CLUSTER)),
    ).toBeUndefined()
  })

  it('has its name only when it is complete, and leaves nothing else', async () => {
    const path = newPath()
    const folder = join(path, '..')
    let names: string[] = []
    const original = fs.fdatasync.bind(fs)
    vi.spyOn(fs, 'fdatasync').mockImplementationOnce((fd, callback) => {
      names = readdirSync(folder)
      original(fd, callback)
    })
    await openDisk(new MemoryDisk({ size }), path)
    expect(names).toHaveLength(1)
    expect(names).not.toContain('changes.overlay')
    expect(readdirSync(folder)).toEqual(['changes.overlay'])
  })

  it('is not there if it could not be made', async () => {
    const path = newPath()
    const error = Object.assign(new Error('ENOSPC'), { code: 'ENOSPC' })
    vi.spyOn(fs, 'fdatasync').mockImplementationOnce((_fd, callback) => callback(error))
    const base = new MemoryDisk({ size })
    await expect(OverlayDisk.open({ base, path })).rejects.toThrow(withCode('ERR_DISK_IO', /ENOSPC/))
    expect(readdirSync(join(path, '..'))).toEqual([])
    // The base is still the caller's.
    expect(await readBytes(base, 0, 512)).toHaveLength(512)
  })

  it('is made by one of two who ask for it at once; the other finds it in use', async () => {
    const path = newPath()
    const results = await Promise.allSettled(
      Array.from({ length: 4 }, () => openDisk(new MemoryDisk({ size }), path)),
    )
    expect(results.filter(({ status }) => status === 'fulfilled')).toHaveLength(1)
    for (const result of results) {
      if (result.status === 'rejected') expect(result.reason).toEqual(withCode('ERR_DISK_IN_USE'))
    }
    expect(readdirSync(join(path, '..'))).toEqual(['changes.overlay'])
  })

  it('is locked', async () => {
    const path = await makeOverlay()
    const disk = await openDisk(new MemoryDisk({ size }), path)
    const again = OverlayDisk.open({ base: new MemoryDisk({ size }), path })
    await expect(again).rejects.toThrow(withCode('ERR_DISK_IN_USE'))
    await expect(FileDisk.open({ path, readOnly: true })).rejects.toThrow(withCode('ERR_DISK_IN_USE'))
    await disk.close()
    await openDisk(new MemoryDisk({ size }), path)
  })

  it('28: is refused with any byte of its header changed', async () => {
    const path = await makeOverlay()
    const original = readFileSync(path)
    const fd = openSync(path, 'r+')
    for (let offset = 0; offset < 4096; offset++) {
      writeSync(fd, Uint8Array.of(original[offset]! ^ (1 << (offset % 8))), 0, 1, offset)
      await expect(OverlayDisk.open({ base: new MemoryDisk({ size }), path })).rejects.toThrow(
        withCode('ERR_DISK_FORMAT', /overlay/),
      )
      writeSync(fd, original, offset, 1, offset)
    }
    closeSync(fd)
    const disk = await openDisk(new MemoryDisk({ size }), path)
    expect(difference(await readBytes(disk, CLUSTER, 3 * CLUSTER), pattern(3 * CLUSTER))).toBeUndefined()
  })

  it('28: is refused if its header is right but says what cannot be', async () => {
    const path = await makeOverlay()
    const header = readFileSync(path).subarray(0, 4096)
    const rewrite = (change: () => void) => {
      change()
      header.writeUInt32LE(crc32(header.subarray(0, 4092)), 4092)
      const fd = openSync(path, 'r+')
      writeSync(fd, header, 0, 4096, 0)
      closeSync(fd)
      return expect(OverlayDisk.open({ base: new MemoryDisk({ size }), path })).rejects
    }
    await (await rewrite(() => header.writeUInt32LE(2, 20))).toThrow(
      withCode('ERR_DISK_FORMAT', /version 1.*2/),
    )
    header.writeUInt32LE(1, 20)
    for (const clusterSize of [0, 512, 2 ** 32 - 1]) {
      const refused = rewrite(() => header.writeUInt32LE(clusterSize, 24))
      await refused.toThrow(withCode('ERR_DISK_FORMAT', /clusters/))
    }
    header.writeUInt32LE(CLUSTER, 24)
    for (const baseSize of [0n, 512n, 2n ** 63n, 2n ** 64n - 1n]) {
      const refused = rewrite(() => header.writeBigUInt64LE(baseSize, 32))
      await refused.toThrow(withCode('ERR_DISK_FORMAT', /base/))
    }
  })

  it('28: is refused over a base of another size', async () => {
    const path = await makeOverlay()
    for (const other of [512, size - 512, size + 512, 2 * size]) {
      const base = new MemoryDisk({ size: other })
      await expect(OverlayDisk.open({ base, path })).rejects.toThrow(
        withCode('ERR_DISK_FORMAT', new RegExp(`${size} bytes but the base has ${other}`)),
      )
    }
  })

  it('28: is refused if it was cut off or extended', async () => {
    for (const change of [-1, -size, 1, 512]) {
      const path = await makeOverlay()
      fs.truncateSync(path, 8192 + size + change)
      const base = new MemoryDisk({ size })
      await expect(OverlayDisk.open({ base, path })).rejects.toThrow(withCode('ERR_DISK_FORMAT', /cut off/))
    }
  })

  it.each(['', 'x', 'nodevisor overlay\n', 'QFI\xfb'.padEnd(70000, '\0')])(
    '28: is refused if it is %j',
    async (text) => {
      const path = makeImage(Buffer.from(text, 'latin1'))
      await expect(OverlayDisk.open({ base: new MemoryDisk({ size }), path })).rejects.toThrow(
        withCode('ERR_DISK_FORMAT', /overlay/),
      )
      // It is somebody's.
      expect(readFileSync(path, 'latin1')).toBe(text)
    },
  )

  it('28: may have any map: clusters are of the overlay or of the base', async () => {
    const path = await makeOverlay()
    await fc.assert(
      fc.asyncProperty(fc.uint8Array({ minLength: 5, maxLength: 4096 }), async (map) => {
        const fd = openSync(path, 'r+')
        writeSync(fd, new Uint8Array(4096), 0, 4096, 4096)
        writeSync(fd, map, 0, map.length, 4096)
        closeSync(fd)
        const data = readFileSync(path).subarray(8192)
        const disk = await OverlayDisk.open({ base: new UniformDisk(size, 7), path })
        const bytes = await readBytes(disk, 0, size)
        for (let cluster = 0; cluster < 40; cluster++) {
          const isThere = ((map[cluster >> 3]! >> (cluster & 7)) & 1) === 1
          expect(bytes[cluster * CLUSTER + 1]).toBe(isThere ? data[cluster * CLUSTER + 1] : 7)
        }
        await disk.close()
      }),
      { numRuns: 50 },
    )
  })

  it('rejects reads when it is truncated while it is open', async () => {
    const path = await makeOverlay()
    const disk = await openDisk(new MemoryDisk({ size }), path)
    await readBytes(disk, CLUSTER, 512)
    fs.truncateSync(path, 8192 + CLUSTER)
    await expect(readBytes(disk, 2 * CLUSTER, 512)).rejects.toThrow(withCode('ERR_DISK_IO', /truncated/))
    expect((await readBytes(disk, 20 * CLUSTER, 512))[0]).toBe(0)
  })

  it('says what keeps it from being made', async () => {
    const base = new MemoryDisk({ size })
    const path = join(makeFolder(), 'none', 'changes')
    await expect(OverlayDisk.open({ base, path })).rejects.toThrow(
      withCode('ERR_DISK_OPEN', /none\/changes.*ENOENT/),
    )
    const tooLarge = new UniformDisk(2 ** 53 - 512, 0)
    await expect(OverlayDisk.open({ base: tooLarge, path: newPath() })).rejects.toThrow(
      withCode('ERR_DISK_OPEN'),
    )
    await expect(OverlayDisk.open({ base: tooLarge })).rejects.toThrow(withCode('ERR_DISK_OPEN'))
  })
})

describe('an overlay without a path', () => {
  it('leaves nothing behind, whether it is closed or not', async () => {
    const ours = () => readdirSync(tmpdir()).filter((name) => /^nodevisor-.*\.overlay$/.test(name))
    const before = ours()
    const disk = await openDisk(new MemoryDisk({ size: MIB }))
    await disk.write(0, [pattern(MIB)])
    expect(ours()).toEqual(before)
    expect(difference(await readBytes(disk, 0, MIB), pattern(MIB))).toBeUndefined()
  })

  it('has nothing to make durable', async () => {
    const disk = await openDisk(new MemoryDisk({ size: MIB }))
    const sync = vi.spyOn(fs, 'fdatasync')
    await disk.write(0, [pattern(MIB)])
    expect(disk.flush()).toBeUndefined()
    await disk.close()
    expect(sync).not.toHaveBeenCalled()
  })
})

describe('an OverlayDisk whose base fails', () => {
  const failing = () => {
    const base = new UniformDisk(MIB, 3)
    return { base, read: vi.spyOn(base, 'read') }
  }

  it('rejects the request, and does not keep the cluster locked', async () => {
    const { base, read } = failing()
    const disk = await openDisk(base, newPath())
    read.mockRejectedValueOnce(new Error('base is broken'))
    await expect(disk.write(512, [pattern(512)])).rejects.toThrow('base is broken')
    await disk.write(512, [pattern(512)])
    expect(difference((await readBytes(disk, 0, 1024)).subarray(512), pattern(512))).toBeUndefined()
    expect((await readBytes(disk, 0, 512))[0]).toBe(3)
  })

  it('rejects where the base throws, once the rest of the request is over', async () => {
    const { base, read } = failing()
    const disk = await openDisk(base, newPath())
    await disk.write(CLUSTER, [pattern(CLUSTER)])
    let finish!: () => void
    read.mockReturnValueOnce(
      new Promise((resolve) => {
        finish = resolve
      }),
    )
    read.mockImplementationOnce(() => {
      throw new Error('base throws')
    })
    let isOver = false
    const request = disk.read(0, [new Uint8Array(3 * CLUSTER)])!.catch((error) => {
      isOver = true
      return error
    })
    await new Promise(setImmediate)
    expect(isOver).toBe(false)
    finish()
    expect(await request).toHaveProperty('message', 'base throws')
  })
})

describe('a read of an OverlayDisk that needs its map from the file', () => {
  const size = 2 * MAP_PAGE_SPAN
  const start = MAP_PAGE_SPAN - CLUSTER
  const secondPage = 2 * 4096
  const buffers = () => [new Uint8Array(2 * CLUSTER)]

  it('fails if that does, once the rest of the request is over', async () => {
    const path = newPath()
    await (await OverlayDisk.open({ base: new UniformDisk(size, 1), path })).close()
    const readv = fs.readv.bind(fs)
    vi.spyOn(binding().fileIo, 'preadvNowait').mockReturnValue(-11)
    vi.spyOn(fs, 'readv').mockImplementation(((...args: Parameters<typeof readv>) => {
      if (args[2] === secondPage) args[3](Object.assign(new Error('EIO'), { code: 'EIO' }), 0, [])
      else readv(...args)
    }) as never)
    const base = new UniformDisk(size, 1)
    const disk = await openDisk(base, path)
    let open!: () => void
    base.gate = new Promise((resolve) => {
      open = resolve
    })
    let isOver = false
    const request = disk.read(start, buffers())!.catch((error) => {
      isOver = true
      return error
    })
    await vi.waitFor(() => expect(base.reads).toBe(1))
    await new Promise((resolve) => setImmediate(resolve))
    expect(isOver).toBe(false)
    open()
    expect(await request).toEqual(withCode('ERR_DISK_IO', /EIO/))
    // Only this part of the disk cannot be told.
    expect((await readBytes(disk, start, CLUSTER))[0]).toBe(1)
  })

  it('fails if a part before that does', async () => {
    const path = newPath()
    await (await OverlayDisk.open({ base: new UniformDisk(size, 1), path })).close()
    vi.spyOn(binding().fileIo, 'preadvNowait').mockReturnValue(-11)
    const base = new UniformDisk(size, 1)
    const disk = await openDisk(base, path)
    vi.spyOn(base, 'read').mockRejectedValueOnce(new Error('base is broken'))
    await expect(disk.read(start, buffers())).rejects.toThrow('base is broken')
    await disk.read(start, buffers())
  })
})

describe('the map of an OverlayDisk', () => {
  it('is loaded once where many requests need it, and does not undo what was done meanwhile', async () => {
    const size = 3 * MAP_PAGE_SPAN
    const path = newPath()
    await (await OverlayDisk.open({ base: new UniformDisk(size, 1), path })).close()
    const readv = fs.readv.bind(fs)
    const held: (() => void)[] = []
    vi.spyOn(binding().fileIo, 'preadvNowait').mockReturnValue(-11)
    const loads = vi.spyOn(fs, 'readv').mockImplementation(((...args: Parameters<typeof readv>) => {
      if (args[2] === 2 * 4096) held.push(() => readv(...args))
      else readv(...args)
    }) as never)
    const disk = await openDisk(new UniformDisk(size, 1), path)
    loads.mockClear()
    const reads = [0, 1, 2].map((i) => readBytes(disk, MAP_PAGE_SPAN + i * CLUSTER, 512))
    await disk.discard(0, size)
    expect(held).toHaveLength(1)
    held[0]!()
    await Promise.all(reads)
    expect((await readBytes(disk, MAP_PAGE_SPAN, 512))[0]).toBe(0)
  })

  it('has no bit for a write that a flush under way does not cover', async () => {
    const path = newPath()
    const disk = await openDisk(new MemoryDisk({ size: MIB }), path)
    const mapAt: number[] = []
    const { fdatasync } = fs
    vi.spyOn(fs, 'fdatasync').mockImplementation(async (fd, callback) => {
      mapAt.push(readFileSync(path)[4096]!)
      if (mapAt.length === 1) await disk.write(CLUSTER, [pattern(CLUSTER)])
      fdatasync(fd, callback)
    })
    await disk.write(0, [pattern(CLUSTER)])
    await disk.flush()
    expect(mapAt).toEqual([0, 0b01])
    await disk.flush()
    expect(mapAt).toEqual([0, 0b01, 0b01, 0b11])
  })

  it('has no bit for a write that is under way', async () => {
    const path = newPath()
    const { writev } = fs
    let finish: (() => void) | undefined
    vi.spyOn(binding().fileIo, 'pwritevNowait').mockReturnValue(-11)
    vi.spyOn(fs, 'writev').mockImplementation(((...args: Parameters<typeof writev>) => {
      if (args[2] === 8192) finish = () => writev(...args)
      else writev(...args)
    }) as never)
    const disk = await openDisk(new MemoryDisk({ bytes: new Uint8Array(MIB).fill(5) }), path)
    await disk.write(CLUSTER, [pattern(CLUSTER)])
    const write = disk.write(0, [pattern(CLUSTER)])
    await vi.waitFor(() => expect(finish).toBeDefined())
    await disk.flush()
    expect(readFileSync(path)[4096]).toBe(0b10)
    expect((await readBytes(disk, 0, 512))[0]).toBe(5)
    finish!()
    await write
    await disk.flush()
    expect(readFileSync(path)[4096]).toBe(0b11)
  })

  it('is written by the next flush if one could not', async () => {
    const path = newPath()
    const writev = fs.writev.bind(fs)
    let failures = 1
    vi.spyOn(fs, 'writev').mockImplementation(((...args: Parameters<typeof writev>) => {
      if (args[2] !== 4096 || failures === 0) return writev(...args)
      failures -= 1
      args[3]!(Object.assign(new Error('ENOSPC'), { code: 'ENOSPC' }), 0, [])
    }) as never)
    vi.spyOn(binding().fileIo, 'pwritevNowait').mockReturnValue(-11)
    const disk = await openDisk(new MemoryDisk({ size: MIB }), path)
    await disk.write(0, [pattern(MIB)])
    await expect(disk.flush()).rejects.toThrow(withCode('ERR_DISK_IO', /ENOSPC/))
    await disk.flush()
    await disk.close()
    const again = await openDisk(new MemoryDisk({ size: MIB }), path)
    expect(difference(await readBytes(again, 0, MIB), pattern(MIB))).toBeUndefined()
  })
})

describe('closing an OverlayDisk', () => {
  it('keeps what was written but not flushed, and closes the base', async () => {
    const path = newPath()
    const base = new MemoryDisk({ size: MIB })
    const close = vi.spyOn(base, 'close')
    const disk = await openDisk(base, path)
    const write = disk.write(512, [pattern(MIB - 512)])
    await disk.close()
    await disk.close()
    await write
    expect(close).toHaveBeenCalledTimes(1)
    const again = await openDisk(new MemoryDisk({ size: MIB }), path)
    expect(difference(await readBytes(again, 512, MIB - 512), pattern(MIB - 512))).toBeUndefined()
  })

  it('34: ends all requests after it', async () => {
    const disk = await openDisk(new MemoryDisk({ size: MIB }), newPath())
    await disk.close()
    await expectClosed(disk)
  })

  it('says so if it could not keep all, and gives everything back', async () => {
    const base = new MemoryDisk({ size: MIB })
    const close = vi.spyOn(base, 'close')
    const path = newPath()
    const disk = await OverlayDisk.open({ base, path })
    await disk.write(0, [pattern(512)])
    const error = Object.assign(new Error('EIO'), { code: 'EIO' })
    vi.spyOn(fs, 'fdatasync').mockImplementation((_fd, callback) => callback(error))
    await expect(disk.close()).rejects.toThrow(withCode('ERR_DISK_IO', /EIO/))
    expect(close).toHaveBeenCalledTimes(1)
    await openDisk(new MemoryDisk({ size: MIB }), path)
  })
})

describe('opening an OverlayDisk', () => {
  it.each([{}, { base: undefined }, { base: {} }, { base: { size: 513, read: () => undefined } }])(
    '27: refuses %o',
    async (options) => {
      await expect(OverlayDisk.open(options as never)).rejects.toThrow(withCode('ERR_INVALID_ARGUMENT'))
    },
  )

  it('27: refuses a path that is none', async () => {
    const base = new MemoryDisk({ size: MIB })
    for (const path of ['', 'a\0b', 7]) {
      await expect(OverlayDisk.open({ base, path: path as string })).rejects.toThrow(
        withCode('ERR_INVALID_ARGUMENT'),
      )
    }
  })
})
