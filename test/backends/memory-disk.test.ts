import fc from 'fast-check'
import { describe, expect, it } from 'vitest'
import { MemoryDisk } from '../../src/backends/memory-disk.js'
import {
  actions,
  compareWithBytes,
  difference,
  expectClosed,
  pattern,
  readBytes,
  withCode,
  zeroOrNothing,
} from './disks.js'

const MIB = 2 ** 20

describe('MemoryDisk', () => {
  it('holds what plain bytes hold, whatever is done to it', async () => {
    // A border between chunks is in the middle of what is used.
    const size = 2 * 65536 + 512
    const start = 65536 - 30 * 512
    await fc.assert(
      fc.asyncProperty(actions(61), async (list) => {
        const content = pattern(61 * 512)
        const all = new Uint8Array(size)
        all.set(content, start)
        const open = () => new MemoryDisk({ bytes: all })
        await compareWithBytes({ open, content, start, discardRule: zeroOrNothing, forgets: true }, list)
      }),
    )
  })

  it('has the content that it is given, and leaves that alone', async () => {
    const bytes = pattern(3 * 512)
    const disk = new MemoryDisk({ bytes })
    expect([disk.size, disk.readOnly]).toEqual([1536, false])
    expect(difference(await readBytes(disk, 512, 1024), bytes.slice(512))).toBeUndefined()
    disk.write(0, [new Uint8Array(512).fill(1)])
    expect(difference(bytes, pattern(3 * 512))).toBeUndefined()
  })

  it('is done at once', () => {
    const disk = new MemoryDisk({ size: MIB })
    const buffers = [new Uint8Array(512)]
    expect(disk.write(0, buffers)).toBeUndefined()
    expect(disk.read(0, buffers)).toBeUndefined()
    expect(disk.flush()).toBeUndefined()
    expect(disk.discard(0, 512)).toBeUndefined()
    expect(disk.writeZeroes(0, 512)).toBeUndefined()
  })

  it('takes memory for what is written, and gives it back', async () => {
    const disk = new MemoryDisk({ size: 2 ** 50 })
    expect(difference(await readBytes(disk, 2 ** 50 - 512, 512), new Uint8Array(512))).toBeUndefined()
    disk.write(2 ** 40, [new Uint8Array(MIB)])
    expect(disk.allocated).toBe(0)
    disk.write(2 ** 40, [pattern(MIB)])
    disk.write(2 ** 49, [pattern(512)])
    expect(disk.allocated).toBe(MIB + 65536)
    disk.discard(2 ** 40, MIB - 512)
    expect(disk.allocated).toBe(2 * 65536)
    disk.discard(2 ** 40 + MIB - 512, 512)
    expect(disk.allocated).toBe(65536)
    // All of it at once: a loop over its chunks would not end.
    disk.writeZeroes(0, 2 ** 50)
    expect(disk.allocated).toBe(0)
    expect(difference(await readBytes(disk, 2 ** 49, 512), new Uint8Array(512))).toBeUndefined()
  })

  it('takes no memory for what is zero in its content', () => {
    const bytes = new Uint8Array(4 * MIB)
    bytes[3 * MIB] = 1
    expect(new MemoryDisk({ bytes }).allocated).toBe(65536)
  })

  it.each([
    {},
    { size: 512, bytes: new Uint8Array(512) },
    { size: 0 },
    { size: -512 },
    { size: 511 },
    { size: 2 ** 53 },
    { size: Number.NaN },
    { size: '512' as unknown as number },
    { bytes: new Uint8Array(0) },
    { bytes: new Uint8Array(513) },
    { bytes: [] as unknown as Uint8Array },
  ])('27: refuses %o', (options) => {
    expect(() => new MemoryDisk(options)).toThrow(withCode('ERR_INVALID_ARGUMENT'))
  })

  it('17: refuses what is not on the disk', () => {
    const disk = new MemoryDisk({ size: 4096 })
    const one = [new Uint8Array(512)]
    for (const offset of [-512, 1, 4096, 2 ** 53, Number.NaN]) {
      expect(() => disk.read(offset, one)).toThrow(withCode('ERR_INVALID_ARGUMENT'))
      expect(() => disk.write(offset, one)).toThrow(withCode('ERR_INVALID_ARGUMENT'))
      expect(() => disk.discard(offset, 512)).toThrow(withCode('ERR_INVALID_ARGUMENT'))
      expect(() => disk.writeZeroes(offset, 512)).toThrow(withCode('ERR_INVALID_ARGUMENT'))
    }
    expect(() => disk.read(0, [new Uint8Array(5000)])).toThrow(withCode('ERR_INVALID_ARGUMENT'))
    expect(() => disk.discard(512, -512)).toThrow(withCode('ERR_INVALID_ARGUMENT'))
    expect(disk.read(4096, [])).toBeUndefined()
  })

  it('34: rejects requests after close(), which may be called twice', async () => {
    const disk = new MemoryDisk({ size: 4096 })
    await disk.close()
    await disk.close()
    await expectClosed(disk)
  })
})
