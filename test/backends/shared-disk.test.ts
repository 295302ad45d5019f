import fs from 'node:fs'
import fc from 'fast-check'
import { afterEach, describe, expect, it, vi } from 'vitest'
import { FileDisk } from '../../src/backends/file-disk.js'
import { MemoryDisk } from '../../src/backends/memory-disk.js'
import { OverlayDisk } from '../../src/backends/overlay-disk.js'
import { SharedDisk } from '../../src/backends/shared-disk.js'
import { binding } from '../../src/binding.js'
import type { BlockBackend } from '../../src/virtio/block-backend.js'
import {
  actions,
  closing,
  compareWithBytes,
  difference,
  expectClosed,
  HeldDisk,
  makeImage,
  pattern,
  performChange,
  readBytes,
  SlowDisk,
  withCode,
  zeroOrNothing,
} from './disks.js'

const CLUSTER = 4096
const SIZE = 61 * 512
const CONTENT = pattern(SIZE)

afterEach(() => vi.restoreAllMocks())

const share = (inner: BlockBackend) => closing(new SharedDisk(inner))
const viewOf = async (disk: SharedDisk) => closing(await disk.view())

/** The part of the bytes that begins with this cluster. */
const cluster = (bytes: Uint8Array, index: number) => bytes.slice(index * CLUSTER, (index + 1) * CLUSTER)

/** Lets all promises go on that can. */
const settled = () => new Promise((resolve) => setImmediate(resolve))

/** Files that are opened from now on cannot be written to while it is full. */
function limitSpace(): { isFull: boolean } {
  const space = { isFull: false }
  const { pwritevNowait } = binding().fileIo
  const writev = fs.writev.bind(fs)
  vi.spyOn(binding().fileIo, 'pwritevNowait').mockImplementation((...args) => {
    return space.isFull ? -11 : pwritevNowait(...args)
  })
  vi.spyOn(fs, 'writev').mockImplementation(((...args: Parameters<typeof writev>) => {
    const error = Object.assign(new Error('ENOSPC: no space left on device'), { code: 'ENOSPC' })
    if (space.isFull) args[3](error, 0, [])
    else writev(...args)
  }) as never)
  return space
}

describe('a SharedDisk', () => {
  it.each([0, 1, 2])('holds what plain bytes hold, with %i views', async (views) => {
    const compare = async (list: Parameters<typeof compareWithBytes>[1]) => {
      const image = makeImage(CONTENT)
      const open = async () => {
        const disk = new SharedDisk(await FileDisk.open({ path: image }))
        const taken = await Promise.all(Array.from({ length: views }, () => disk.view()))
        const closeDisk = disk.close.bind(disk)
        disk.close = async () => {
          await closeDisk()
          for (const view of taken) await view.close()
        }
        return disk
      }
      await compareWithBytes({ open, content: CONTENT, discardRule: zeroOrNothing }, list)
    }
    await fc.assert(fc.asyncProperty(actions(61), compare), { numRuns: 40 })
  })

  it('hands requests on as they are while it has no views', async () => {
    const inner = new HeldDisk(CONTENT)
    const disk = share(inner)
    const buffers = [pattern(512, 2)]
    for (const name of ['read', 'write'] as const) {
      const request = Promise.resolve()
      const method = vi.spyOn(inner, name).mockReturnValueOnce(request)
      expect(disk[name](512, buffers)).toBe(request)
      expect(method).toHaveBeenLastCalledWith(512, buffers)
      method.mockRestore()
    }
    await (await disk.view()).close()
    const request = Promise.resolve()
    vi.spyOn(inner, 'write').mockReturnValueOnce(request)
    expect(disk.write(512, buffers)).toBe(request)
  })

  it('is what the inner disk is', async () => {
    const inner: BlockBackend = {
      size: 512,
      readOnly: true,
      read: () => undefined,
      write: () => undefined,
      flush: () => undefined,
      close: async () => {},
    }
    const plain = share(inner)
    expect([plain.size, plain.readOnly, plain.blockSize]).toEqual([512, true, undefined])
    expect([plain.discard, plain.writeZeroes]).toEqual([undefined, undefined])
    const disk = share(await FileDisk.open({ path: makeImage(CONTENT) }))
    expect([disk.size, disk.readOnly, disk.blockSize]).toEqual([SIZE, false, 4096])
    const view = await viewOf(disk)
    expect([view.size, view.readOnly, view.blockSize]).toEqual([SIZE, true, 4096])
  })

  it('writes at once what its views have', async () => {
    const disk = share(new MemoryDisk({ bytes: CONTENT }))
    await viewOf(disk)
    expect(disk.write(512, [pattern(512, 2)])).toBeInstanceOf(Promise)
    await disk.write(512, [pattern(512, 2)])
    expect(disk.write(1024, [pattern(512, 2)])).toBeUndefined()
    expect(disk.write(CLUSTER, [pattern(512, 2)])).toBeInstanceOf(Promise)
  })

  it('34: ends all requests after it was closed', async () => {
    const disk = new SharedDisk(new MemoryDisk({ bytes: CONTENT }))
    await disk.close()
    await disk.close()
    await expectClosed(disk as Parameters<typeof expectClosed>[0])
    await expect(disk.view()).rejects.toThrow(withCode('ERR_CLOSED'))
  })

  it('27: refuses what lies beyond it, before a view keeps any of it', async () => {
    const disk = share(new MemoryDisk({ bytes: CONTENT }))
    await viewOf(disk)
    expect(() => disk.write(SIZE, [new Uint8Array(512)])).toThrow(withCode('ERR_INVALID_ARGUMENT'))
    expect(() => disk.discard!(0, SIZE + 512)).toThrow(withCode('ERR_INVALID_ARGUMENT'))
    expect(() => disk.writeZeroes!(7, 512, true)).toThrow(withCode('ERR_INVALID_ARGUMENT'))
  })
})

describe('a view of a SharedDisk', () => {
  const steps = fc.array(
    fc.oneof(
      {
        weight: 6,
        arbitrary: actions(61, 1).filter((list) => list.length === 1 && list[0]!.kind !== 'reopen'),
      },
      { weight: 2, arbitrary: fc.constant('take' as const) },
      {
        weight: 4,
        arbitrary: fc.record({ view: fc.nat(), sector: fc.nat(60), count: fc.integer({ min: 1, max: 61 }) }),
      },
      { weight: 1, arbitrary: fc.record({ close: fc.nat() }) },
    ),
    { maxLength: 40 },
  )

  it('reads what was there when it was taken, whatever is under way', async () => {
    const run = async (seed: number, list: typeof steps extends fc.Arbitrary<infer T> ? T : never) => {
      const disk = new SharedDisk(new SlowDisk(CONTENT, seed))
      const model = CONTENT.slice()
      const views: { view: BlockBackend; content: Uint8Array }[] = []
      const reads: Promise<void>[] = []
      let changes: { from: number; to: number; done: Promise<void> }[] = []
      const settleChanges = async () => {
        await Promise.all(changes.map(({ done }) => done))
        changes = []
      }
      const check = async ({ view, content }: (typeof views)[number], from: number, to: number) => {
        expect(difference(await readBytes(view, from, to - from), content.slice(from, to))).toBeUndefined()
      }
      for (const step of list) {
        if (step === 'take') {
          await settleChanges()
          views.push({ view: await disk.view(), content: model.slice() })
        } else if (Array.isArray(step)) {
          const action = step[0]!
          if (action.kind === 'flush' || action.kind === 'reopen') continue
          const from = action.sector * 512
          const to = from + action.count * 512
          if (changes.some((other) => other.from < to && from < other.to)) await settleChanges()
          changes.push({ from, to, done: performChange(disk, model, action) })
        } else if (views.length > 0 && 'close' in step) {
          const [{ view }] = views.splice(step.close % views.length, 1) as [(typeof views)[number]]
          reads.push(view.close())
        } else if (views.length > 0 && 'view' in step) {
          const { view, sector, count } = step
          reads.push(check(views[view % views.length]!, sector * 512, Math.min((sector + count) * 512, SIZE)))
        }
      }
      const last = views.map((view) => check(view, 0, SIZE))
      await Promise.all([...reads, ...last, settleChanges()])
      expect(difference(await readBytes(disk, 0, SIZE), model)).toBeUndefined()
      await disk.close()
      // The disk is closed, they are not.
      for (const view of views) {
        await check(view, 0, SIZE)
        await view.view.close()
      }
    }
    await fc.assert(fc.asyncProperty(fc.integer(), steps, run), { numRuns: 200 })
  })

  it('never reads what was written while it read the disk', async () => {
    const inner = new HeldDisk(CONTENT)
    const disk = share(inner)
    const view = await viewOf(disk)
    const read = readBytes(view, 0, 3 * CLUSTER)
    const readOfDisk = inner.take('read')
    const write = disk.write(CLUSTER + 512, [new Uint8Array(512)])
    // The view keeps the cluster first.
    await settled()
    inner.take('read').finish()
    await vi.waitFor(() => expect(inner.held).toEqual(['write']))
    inner.take('write').finish()
    await write
    // Only now the read gets its bytes, with those of the write among them.
    readOfDisk.finish()
    await settled()
    for (const _ of [...inner.held]) inner.take('read').finish()
    expect(difference(await read, CONTENT.slice(0, 3 * CLUSTER))).toBeUndefined()
    // What was not written comes from the disk still.
    inner.reads.length = 0
    const again = readBytes(view, 0, 3 * CLUSTER)
    inner.take('read').finish()
    inner.take('read').finish()
    expect(difference(await again, CONTENT.slice(0, 3 * CLUSTER))).toBeUndefined()
    expect(inner.reads).toEqual([
      [0, CLUSTER],
      [2 * CLUSTER, CLUSTER],
    ])
  })

  it('has a cluster before any of many writes to it is done', async () => {
    const inner = new HeldDisk(CONTENT)
    const disk = share(inner)
    const view = await viewOf(disk)
    const writes = [1, 3, 5].map((sector) => disk.write(sector * 512, [new Uint8Array(512)]))
    await settled()
    expect(inner.held).toEqual(['read'])
    inner.take('read').finish()
    await vi.waitFor(() => expect(inner.held).toEqual(['write', 'write', 'write']))
    for (let i = 0; i < 3; i++) inner.take('write').finish()
    await Promise.all(writes)
    expect(difference(await readBytes(view, 0, CLUSTER), cluster(CONTENT, 0))).toBeUndefined()
  })

  it('keeps each cluster once, and nothing any more when it is closed', async () => {
    const inner = new MemoryDisk({ bytes: CONTENT })
    const disk = share(inner)
    const [first, second] = [await viewOf(disk), await viewOf(disk)]
    const read = vi.spyOn(inner, 'read')
    await disk.write(512, [pattern(CLUSTER, 2)])
    await disk.write(0, [pattern(2 * CLUSTER, 3)])
    expect(read.mock.calls.map(([offset, [bytes]]) => [offset, bytes!.length])).toEqual([
      [0, 2 * CLUSTER],
      [0, 2 * CLUSTER],
    ])
    await first.close()
    read.mockClear()
    await disk.write(2 * CLUSTER, [pattern(512, 2)])
    expect(read).toHaveBeenCalledTimes(1)
    await second.close()
    read.mockClear()
    expect(disk.write(3 * CLUSTER, [pattern(512, 2)])).toBeUndefined()
    expect(read).not.toHaveBeenCalled()
  })

  it('takes no space for zeros', async () => {
    const disk = share(new MemoryDisk({ size: 64 * 2 ** 20 }))
    const write = vi.spyOn(binding().fileIo, 'pwritevNowait')
    const later = vi.spyOn(fs, 'writev')
    const view = await viewOf(disk)
    await disk.discard!(CLUSTER, disk.size - CLUSTER)
    await disk.write(0, [pattern(512)])
    expect(write).not.toHaveBeenCalled()
    expect(later).not.toHaveBeenCalled()
    expect(difference(await readBytes(view, 0, CLUSTER), new Uint8Array(CLUSTER))).toBeUndefined()
  })

  it('lies below the disks of many machines, which do not see each other, nor the disk them', async () => {
    const image = makeImage(CONTENT)
    const disk = new SharedDisk(await FileDisk.open({ path: image }))
    const view = await disk.view()
    const children = await Promise.all(
      [view, view.share(), view.share()].map(async (base) => closing(await OverlayDisk.open({ base }))),
    )
    const written = children.map((_, i) => pattern(CLUSTER, i + 10))
    await Promise.all(children.map((child, i) => child.write(512, [written[i]!])))
    await disk.write(0, [pattern(SIZE, 5)])
    await disk.close()
    for (const [i, child] of children.entries()) {
      const expected = CONTENT.slice()
      expected.set(written[i]!, 512)
      expect(difference(await readBytes(child, 0, SIZE), expected)).toBeUndefined()
      // The image is in use until the last one is closed.
      await expect(FileDisk.open({ path: image })).rejects.toThrow(withCode('ERR_DISK_IN_USE'))
      await child.close()
    }
    expect(difference(fs.readFileSync(image), pattern(SIZE, 5))).toBeUndefined()
    closing(await FileDisk.open({ path: image }))
  })

  it('is refused writes, and ends all requests after it was closed', async () => {
    const disk = share(new MemoryDisk({ bytes: CONTENT }))
    const view = await disk.view()
    await expect(view.write()).rejects.toThrow(withCode('ERR_INVALID_ARGUMENT', /read-only/))
    expect(view.flush()).toBeUndefined()
    const other = view.share()
    await view.close()
    await view.close()
    await expect(view.read(0, [new Uint8Array(512)])).rejects.toThrow(withCode('ERR_CLOSED'))
    await expect(view.flush()).rejects.toThrow(withCode('ERR_CLOSED'))
    expect(() => view.share()).toThrow(withCode('ERR_CLOSED'))
    expect(difference(await readBytes(other, 0, SIZE), CONTENT)).toBeUndefined()
    await other.close()
  })

  it('is not there if it could not be made, and the disk goes on', async () => {
    const disk = share(new MemoryDisk({ bytes: CONTENT }))
    vi.spyOn(fs.promises, 'open').mockRejectedValueOnce(
      Object.assign(new Error('ENOSPC'), { code: 'ENOSPC' }),
    )
    await expect(disk.view()).rejects.toThrow(withCode('ERR_DISK_OPEN', /ENOSPC/))
    expect(disk.write(0, [pattern(512)])).toBeUndefined()
    const inner = vi.spyOn(disk.inner, 'close')
    await disk.close()
    expect(inner).toHaveBeenCalledTimes(1)
  })
})

describe('a view that could not keep something', () => {
  const broken = withCode('ERR_DISK_IO', /forked.*ENOSPC.*TMPDIR/s)

  it('fails from then on and says why; the disk and other views go on', async () => {
    const space = limitSpace()
    const disk = share(new MemoryDisk({ bytes: CONTENT }))
    const view = await viewOf(disk)
    await disk.write(0, [pattern(512, 2)])
    space.isFull = true
    await disk.write(CLUSTER, [pattern(512, 3)])
    space.isFull = false
    // Also what it has.
    await expect(view.read(0, [new Uint8Array(512)])).rejects.toThrow(broken)
    await expect(view.share().read(2 * CLUSTER, [new Uint8Array(512)])).rejects.toThrow(broken)
    const expected = CONTENT.slice()
    expected.set(pattern(512, 2), 0)
    expected.set(pattern(512, 3), CLUSTER)
    expect(difference(await readBytes(disk, 0, SIZE), expected)).toBeUndefined()
    const later = await viewOf(disk)
    expect(disk.write(0, [pattern(SIZE - 512, 4)])).toBeInstanceOf(Promise)
    expect(difference(await readBytes(later, 0, SIZE), expected)).toBeUndefined()
    await view.close()
  })

  it('fails a read that was under way then', async () => {
    const space = limitSpace()
    const inner = new HeldDisk(CONTENT)
    const disk = share(inner)
    const view = await viewOf(disk)
    const read = expect(view.read(0, [new Uint8Array(CLUSTER)])).rejects.toThrow(broken)
    const readOfDisk = inner.take('read')
    space.isFull = true
    const write = disk.write(0, [pattern(CLUSTER, 2)])
    await settled()
    inner.take('read').finish()
    await vi.waitFor(() => expect(inner.held).toEqual(['write']))
    inner.take('write').finish()
    await write
    readOfDisk.finish()
    await read
  })

  it('does so where the disk could not be read, too', async () => {
    const disk = share(new MemoryDisk({ bytes: CONTENT }))
    const view = await viewOf(disk)
    vi.spyOn(disk.inner, 'read').mockImplementationOnce(() => {
      throw new Error('a bad sector')
    })
    await disk.write(0, [pattern(512, 2)])
    await expect(view.read(0, [new Uint8Array(512)])).rejects.toThrow(withCode('ERR_DISK_IO', /a bad sector/))
    expect(difference(await readBytes(disk, 0, 512), pattern(512, 2))).toBeUndefined()
  })
})

describe('closing a SharedDisk', () => {
  it('closes the inner disk at once if there is no view', async () => {
    const inner = new MemoryDisk({ bytes: CONTENT })
    const close = vi.spyOn(inner, 'close')
    const disk = new SharedDisk(inner)
    await (await disk.view()).close()
    expect(close).not.toHaveBeenCalled()
    await disk.close()
    expect(close).toHaveBeenCalledTimes(1)
  })

  it('waits for requests and flushes; the last view closes the inner disk', async () => {
    const inner = new HeldDisk(CONTENT)
    const flush = vi.spyOn(inner, 'flush')
    const disk = new SharedDisk(inner)
    const [first, second] = [await disk.view(), await disk.view()]
    const write = disk.write(0, [pattern(512, 2)])
    let isClosed = false
    const closed = disk.close().then(() => {
      isClosed = true
    })
    await settled()
    inner.take('read').finish()
    inner.take('read').finish()
    await vi.waitFor(() => expect(inner.held).toEqual(['write']))
    expect([flush.mock.calls.length, isClosed]).toEqual([0, false])
    inner.take('write').finish()
    await write
    await closed
    expect(flush).toHaveBeenCalledTimes(1)
    expect(difference(await readBytes(first, 0, CLUSTER), cluster(CONTENT, 0))).toBeUndefined()
    await first.close()
    expect(inner.isClosed).toBe(false)
    await second.close()
    expect(inner.isClosed).toBe(true)
  })

  it('leaves the views their disk if it could not be flushed', async () => {
    const inner = new MemoryDisk({ bytes: CONTENT })
    const close = vi.spyOn(inner, 'close')
    const disk = new SharedDisk(inner)
    const view = await disk.view()
    vi.spyOn(inner, 'flush').mockRejectedValueOnce(new Error('EIO'))
    await expect(disk.close()).rejects.toThrow('EIO')
    expect(difference(await readBytes(view, 0, SIZE), CONTENT)).toBeUndefined()
    await view.close()
    expect(close).toHaveBeenCalledTimes(1)
  })
})
