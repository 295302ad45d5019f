import { statSync } from 'node:fs'
import { join, relative } from 'node:path'
import { describe, expect, it } from 'vitest'
import { diskIdentity } from '../../src/backends/disk-identity.js'
import { FileDisk } from '../../src/backends/file-disk.js'
import { MemoryDisk } from '../../src/backends/memory-disk.js'
import { OverlayDisk } from '../../src/backends/overlay-disk.js'
import { SharedDisk } from '../../src/backends/shared-disk.js'
import { makeFolder } from '../helpers/folders.js'
import { closing, makeImage, pattern, withCode } from './disks.js'

const SIZE = 61 * 512
const modified = (path: string) => String(statSync(path, { bigint: true }).mtimeNs)

describe('diskIdentity', () => {
  it('is the path, the size and the time of a file', async () => {
    const path = makeImage(pattern(SIZE))
    const name = relative(process.cwd(), path)
    const disk = closing(await FileDisk.open({ path: name }))
    expect(disk.path).toBe(name)
    const identity = await diskIdentity(disk)
    expect(identity).toEqual({ kind: 'file', path, size: SIZE, modified: modified(path) })
    expect(JSON.parse(JSON.stringify(identity))).toEqual(identity)
    expect(await diskIdentity(disk)).toEqual(identity)
    await disk.close()
    await expect(diskIdentity(disk)).rejects.toThrow(withCode('ERR_CLOSED'))
    const again = closing(await FileDisk.open({ path, readOnly: true }))
    expect(await diskIdentity(again)).toEqual(identity)
  })

  it('is another one after the file was written', async () => {
    const path = makeImage(pattern(SIZE))
    const disk = closing(await FileDisk.open({ path }))
    const before = await diskIdentity(disk)
    // Times have steps, and none may be over.
    await expect
      .poll(async () => {
        await disk.write(0, [pattern(512, 2)])
        return diskIdentity(disk)
      })
      .not.toEqual(before)
  })

  it('is that of all that lies below an overlay', async () => {
    const image = makeImage(pattern(SIZE))
    const path = join(makeFolder(), 'changes')
    const base = await FileDisk.open({ path: image, readOnly: true })
    const middle = await OverlayDisk.open({ base, path })
    const disk = closing(await OverlayDisk.open({ base: middle }))
    expect([middle.path, middle.base, disk.path, disk.base]).toEqual([path, base, undefined, middle])
    await middle.write(0, [pattern(512, 2)])
    const identity = await diskIdentity(disk)
    expect(identity).toEqual({
      kind: 'temporary-overlay',
      base: {
        kind: 'overlay',
        path,
        size: statSync(path).size,
        modified: modified(path),
        base: { kind: 'file', path: image, size: SIZE, modified: modified(image) },
      },
    })
    // All is flushed: closing it changes nothing any more.
    await disk.close()
    expect(identity).toHaveProperty('base.modified', modified(path))
  })

  it('says what there is of disks without a file', async () => {
    const memory = new MemoryDisk({ size: SIZE })
    expect(await diskIdentity(memory)).toEqual({ kind: 'memory' })
    expect(await diskIdentity(new SharedDisk(memory))).toEqual({ kind: 'memory' })
    const { size } = memory
    const custom = { size, readOnly: true, read() {}, write() {}, flush() {}, close: async () => {} } as const
    expect(await diskIdentity(custom as never)).toEqual({ kind: 'custom', size: SIZE })
  })
})
