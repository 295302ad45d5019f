import fs, { existsSync, readFileSync, statSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { afterEach, describe, expect, it, vi } from 'vitest'
import { saveContents } from '../../src/backends/disk-contents.js'
import { FileDisk } from '../../src/backends/file-disk.js'
import { MemoryDisk } from '../../src/backends/memory-disk.js'
import { OverlayDisk } from '../../src/backends/overlay-disk.js'
import { SharedDisk } from '../../src/backends/shared-disk.js'
import { makeFolder } from '../helpers/folders.js'
import { closing, difference, pattern, withCode } from './disks.js'

const MIB = 2 ** 20

afterEach(() => vi.restoreAllMocks())

const newPath = () => join(makeFolder(), 'contents.img')

describe('saveContents', () => {
  it.each([512, 65536 + 512, MIB, 3 * MIB + 1536])('copies a disk of %i bytes', async (size) => {
    const path = newPath()
    await saveContents(new MemoryDisk({ bytes: pattern(size) }), path)
    expect(difference(readFileSync(path), pattern(size))).toBeUndefined()
    // It is a disk, and nobody has it open.
    closing(await FileDisk.open({ path }))
  })

  it('leaves zeros out, and nothing else', async () => {
    const size = 16 * MIB
    const bytes = new Uint8Array(size)
    for (const at of [0, 65536, 3 * MIB - 1, 5 * MIB + 4 * 65536, size - 1]) bytes[at] = 1
    const path = newPath()
    await saveContents(new MemoryDisk({ bytes }), path)
    expect(difference(readFileSync(path), bytes)).toBeUndefined()
    expect(statSync(path).blocks * 512).toBeLessThanOrEqual(5 * 65536)
  })

  it('makes it durable', async () => {
    const sync = vi.spyOn(fs, 'fdatasync')
    await saveContents(new MemoryDisk({ bytes: pattern(MIB) }), newPath())
    expect(sync).toHaveBeenCalledTimes(1)
  })

  it('copies a view while the disk goes on', async () => {
    const disk = closing(new SharedDisk(new MemoryDisk({ bytes: pattern(4 * MIB) })))
    const view = closing(await disk.view())
    const path = newPath()
    const saving = saveContents(view, path)
    for (let at = 0; at < 4 * MIB; at += 65536) await disk.write(at, [new Uint8Array(65536)])
    await saving
    expect(difference(readFileSync(path), pattern(4 * MIB))).toBeUndefined()
  })

  it('copies an overlay as it reads', async () => {
    const disk = closing(await OverlayDisk.open({ base: new MemoryDisk({ bytes: pattern(MIB) }) }))
    await disk.write(4096, [pattern(512, 2)])
    const path = newPath()
    await saveContents(disk, path)
    const expected = pattern(MIB)
    expected.set(pattern(512, 2), 4096)
    expect(difference(readFileSync(path), expected)).toBeUndefined()
  })

  it('writes over nothing, and leaves no half of a file', async () => {
    const path = newPath()
    writeFileSync(path, 'precious')
    const disk = new MemoryDisk({ bytes: pattern(4 * MIB) })
    await expect(saveContents(disk, path)).rejects.toThrow(withCode('ERR_DISK_OPEN', /EEXIST/))
    expect(readFileSync(path, 'utf8')).toBe('precious')
    const { read } = disk
    vi.spyOn(disk, 'read').mockImplementation((offset, buffers) => {
      return offset < MIB ? read.call(disk, offset, buffers) : Promise.reject(new Error('a bad sector'))
    })
    const other = newPath()
    await expect(saveContents(disk, other)).rejects.toThrow('a bad sector')
    expect(existsSync(other)).toBe(false)
  })
})
