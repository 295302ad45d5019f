import { execFileSync, execSync } from 'node:child_process'
import fs, { chmodSync, readFileSync, statSync, truncateSync, writeFileSync } from 'node:fs'
import { constants } from 'node:os'
import { join } from 'node:path'
import fc from 'fast-check'
import { afterEach, describe, expect, it, vi } from 'vitest'
import { FileDisk } from '../../src/backends/file-disk.js'
import { Flushes } from '../../src/backends/requests.js'
import { binding, type NativeFileIo } from '../../src/binding.js'
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
  withCode,
  zeroOrNothing,
} from './disks.js'

const MIB = 2 ** 20
const { EAGAIN, EOPNOTSUPP } = constants.errno

afterEach(() => vi.restoreAllMocks())

const openDisk = async (path: string, readOnly = false) => closing(await FileDisk.open({ path, readOnly }))

/** An error as Node.js has it. */
const systemError = (code: string) => Object.assign(new Error(`${code}: told so`), { code })

type Callback = (error: Error | null, count?: number) => void
type VectorCall = (fd: number, buffers: Uint8Array[], position: number, callback: Callback) => void

/** Has one of Node.js's transfers do something else. */
function replace(name: 'readv' | 'writev', replacement: (original: VectorCall) => VectorCall) {
  const original = fs[name].bind(fs) as unknown as VectorCall
  return vi.spyOn(fs, name).mockImplementation(replacement(original) as never)
}

/** Has file systems take one system call as if they had it in another way. */
function replaceNative(name: 'preadvNowait' | 'pwritevNowait', replacement: NativeFileIo['preadvNowait']) {
  return vi.spyOn(binding().fileIo, name).mockImplementation(replacement)
}

/** Only the first bytes of what is asked for are transferred. */
const inPieces = (original: VectorCall): VectorCall => {
  return (fd, [first], position, callback) => original(fd, [first!.subarray(0, 700)], position, callback)
}

describe('a FileDisk', () => {
  const compare = (list: Parameters<typeof compareWithBytes>[1]) => {
    const content = pattern(61 * 512)
    const path = makeImage(content)
    return compareWithBytes(
      { open: () => FileDisk.open({ path }), content, discardRule: zeroOrNothing },
      list,
    )
  }

  it('holds what plain bytes hold, whatever is done to it', async () => {
    await fc.assert(fc.asyncProperty(actions(61), compare))
  })

  it('holds it where nothing is in the page cache', async () => {
    const read = replaceNative('preadvNowait', () => -EAGAIN)
    replaceNative('pwritevNowait', () => -EAGAIN)
    await fc.assert(fc.asyncProperty(actions(61), compare), { numRuns: 30 })
    expect(read).toHaveBeenCalled()
  })

  it('holds it where the file system takes all in pieces', async () => {
    const { preadvNowait } = binding().fileIo
    replaceNative('preadvNowait', (fd, buffers, offset) => {
      return preadvNowait(fd, [buffers.find(({ length }) => length > 0)!.subarray(0, 300)], offset)
    })
    replace('readv', inPieces)
    const write = replace('writev', inPieces)
    await fc.assert(fc.asyncProperty(actions(61), compare), { numRuns: 30 })
    expect(write).toHaveBeenCalled()
  })

  it('holds it where the file system has no way to make bytes zero', async () => {
    const fallocate = vi.spyOn(binding().fileIo, 'fallocate').mockResolvedValue(-EOPNOTSUPP)
    await fc.assert(fc.asyncProperty(actions(61), compare), { numRuns: 30 })
    expect(fallocate).toHaveBeenCalled()
  })

  it('is the bytes of its file', async () => {
    const path = makeImage(pattern(4 * 512))
    const disk = await openDisk(path)
    expect([disk.size, disk.readOnly]).toEqual([2048, false])
    expect(difference(await readBytes(disk, 512, 512), pattern(2048).slice(512, 1024))).toBeUndefined()
    await disk.write(1024, [new Uint8Array(100).fill(1), new Uint8Array(412).fill(2)])
    await disk.flush()
    const bytes = readFileSync(path)
    expect(bytes).toHaveLength(2048)
    expect([bytes[1024], bytes[1123], bytes[1124], bytes[1535]]).toEqual([1, 1, 2, 2])
  })

  it('transfers more buffers than a system call takes, and more bytes than are tried at once', async () => {
    const disk = await openDisk(makeImage(4 * MIB))
    const bytes = pattern(3 * MIB)
    const pieces = (of: Uint8Array) =>
      Array.from({ length: of.length / 512 }, (_, i) => of.subarray(512 * i, 512 * (i + 1)))
    await disk.write(512, pieces(bytes))
    const back = new Uint8Array(3 * MIB)
    await disk.read(512, pieces(back))
    expect(difference(back, bytes)).toBeUndefined()
    const few = new Uint8Array(2000 * 100)
    await disk.read(512, [...pieces(few.subarray(0, 199680)), few.subarray(199680, 199680)])
    expect(difference(few.subarray(0, 199680), bytes.subarray(0, 199680))).toBeUndefined()
  })

  it('gives the space of what is discarded back, and keeps that of zeros that are to stay', async () => {
    const path = makeImage(pattern(4 * MIB))
    const disk = await openDisk(path)
    const blocks = () => statSync(path).blocks
    await disk.flush()
    const full = blocks()
    await disk.writeZeroes(0, MIB, false)
    expect(blocks()).toBe(full)
    await disk.discard(MIB, MIB)
    expect(blocks()).toBe(full - MIB / 512)
    await disk.writeZeroes(2 * MIB, MIB, true)
    expect(blocks()).toBe(full - (2 * MIB) / 512)
    expect(statSync(path).size).toBe(4 * MIB)
    expect(difference(await readBytes(disk, 0, 3 * MIB), new Uint8Array(3 * MIB))).toBeUndefined()
    expect(difference(await readBytes(disk, 3 * MIB, MIB), pattern(4 * MIB).slice(3 * MIB))).toBeUndefined()
  })

  it('asks a file system that cannot do without waiting only once, for reads and writes each', async () => {
    const disk = await (async () => {
      replaceNative('preadvNowait', () => -EOPNOTSUPP)
      replaceNative('pwritevNowait', () => -EOPNOTSUPP)
      return openDisk(makeImage(4096))
    })()
    for (let i = 0; i < 3; i++) {
      await disk.write(512, [pattern(512, i)])
      expect(difference(await readBytes(disk, 512, 512), pattern(512, i))).toBeUndefined()
    }
    expect(binding().fileIo.preadvNowait).toHaveBeenCalledTimes(1)
    expect(binding().fileIo.pwritevNowait).toHaveBeenCalledTimes(1)
  })

  it('waits only for what is missing in the page cache', async () => {
    replaceNative('preadvNowait', (fd, [first], offset) => fs.readSync(fd, first!, 0, 1000, offset))
    const read = replace('readv', (original) => original)
    const disk = await openDisk(makeImage(pattern(8192)))
    expect(difference(await readBytes(disk, 512, 4096), pattern(8192).slice(512, 4608))).toBeUndefined()
    expect(read.mock.calls[0]![2]).toBe(1512)
  })

  it('reads what is in the page cache at once, where the file system can', async () => {
    const path = makeImage(pattern(4096))
    const disk = await openDisk(path)
    const bytes = new Uint8Array(4096)
    const fd = fs.openSync(path, 'r')
    const canRead = binding().fileIo.preadvNowait(fd, [bytes], 0) === 4096
    fs.closeSync(fd)
    const request = disk.read(0, [bytes])
    expect(request === undefined).toBe(canRead)
    await request
    expect(difference(bytes, pattern(4096))).toBeUndefined()
  })
})

describe('opening a FileDisk', () => {
  it('says which file there is not, and how to make one', async () => {
    const path = join(makeFolder(), 'none.img')
    await expect(FileDisk.open({ path })).rejects.toThrow(
      withCode('ERR_DISK_OPEN', /none\.img.*ENOENT.*truncate/),
    )
    await expect(FileDisk.open({ path })).rejects.toHaveProperty('cause.code', 'ENOENT')
  })

  it('22: refuses what is no file or block device, and does not wait for it', async () => {
    const folder = makeFolder()
    execFileSync('mkfifo', [join(folder, 'fifo')])
    const open = (path: string) => FileDisk.open({ path, readOnly: true })
    await expect(open(folder)).rejects.toThrow(withCode('ERR_DISK_OPEN', /a directory/))
    await expect(open(join(folder, 'fifo'))).rejects.toThrow(withCode('ERR_DISK_OPEN', /a FIFO/))
    await expect(open('/dev/null')).rejects.toThrow(withCode('ERR_DISK_OPEN', /a character device/))
  })

  it.skipIf(process.getuid!() === 0)('says that a file may not be written', async () => {
    const path = makeImage(4096)
    chmodSync(path, 0o444)
    await expect(FileDisk.open({ path })).rejects.toThrow(withCode('ERR_DISK_OPEN', /EACCES.*read-only/))
    expect((await openDisk(path, true)).size).toBe(4096)
  })

  it.each([0, 1, 511, 513, 4097])('27: refuses %i bytes, and says how to make them a disk', async (size) => {
    const path = makeImage(pattern(size))
    const error = await FileDisk.open({ path }).catch((reason) => reason)
    expect(error).toEqual(withCode('ERR_DISK_FORMAT'))
    execSync(/"(truncate .*)"/.exec(error.message)![1]!)
    const disk = await openDisk(path)
    expect(disk.size).toBe(Math.max(Math.ceil(size / 512), 1) * 512)
    expect(difference((await readBytes(disk, 0, disk.size)).subarray(0, size), pattern(size))).toBeUndefined()
  })

  it.each([{}, { path: '' }, { path: 'a\0b' }, { path: 7 }, { path: '/dev/null', readOnly: 'yes' }])(
    '27: refuses %o',
    async (options) => {
      await expect(FileDisk.open(options as never)).rejects.toThrow(withCode('ERR_INVALID_ARGUMENT'))
    },
  )

  it('leaves no file open where it fails', async () => {
    const path = makeImage(513)
    const count = () => fs.readdirSync('/proc/self/fd').length
    const before = count()
    for (let i = 0; i < 5; i++) await FileDisk.open({ path }).catch(() => undefined)
    expect(count()).toBe(before)
  })
})

describe('the lock of a FileDisk', () => {
  it('keeps others out while it can be written', async () => {
    const path = makeImage(4096)
    const disk = await openDisk(path)
    await expect(FileDisk.open({ path })).rejects.toThrow(withCode('ERR_DISK_IN_USE', /overlay/))
    await expect(FileDisk.open({ path, readOnly: true })).rejects.toThrow(
      withCode('ERR_DISK_IN_USE', /read-only/),
    )
    await disk.close()
    await (await FileDisk.open({ path })).close()
  })

  it('lets readers share it, and keeps writers out', async () => {
    const path = makeImage(4096)
    const first = await openDisk(path, true)
    const second = await openDisk(path, true)
    await first.close()
    await expect(FileDisk.open({ path })).rejects.toThrow(withCode('ERR_DISK_IN_USE'))
    expect(difference(await readBytes(second, 0, 512), new Uint8Array(512))).toBeUndefined()
    await second.close()
    await (await FileDisk.open({ path })).close()
  })
})

describe('a FileDisk whose host fails', () => {
  it('rejects requests beyond the end of a file that was truncated meanwhile', async () => {
    const path = makeImage(pattern(MIB))
    const disk = await openDisk(path)
    truncateSync(path, 8192 + 100)
    expect(difference(await readBytes(disk, 4096, 4096), pattern(MIB).slice(4096, 8192))).toBeUndefined()
    for (const [offset, length] of [
      [MIB - 512, 512],
      [4096, 8192],
      [0, MIB],
    ] as const) {
      const request = disk.read(offset, [new Uint8Array(length)])
      await expect(request).rejects.toThrow(withCode('ERR_DISK_IO', /truncated/))
    }
  })

  it('rejects with the cause', async () => {
    replaceNative('pwritevNowait', () => -EAGAIN)
    replace('writev', () => (_fd, _buffers, _position, callback) => callback(systemError('ENOSPC')))
    const disk = await openDisk(makeImage(4096))
    const error = await disk.write(512, [pattern(512)])!.catch((reason) => reason)
    expect(error).toEqual(withCode('ERR_DISK_IO', /ENOSPC/))
    expect(error).toMatchObject({ offset: 512, length: 512, cause: { code: 'ENOSPC' } })
  })

  it('30: tries again what was interrupted, but not for ever', async () => {
    replaceNative('preadvNowait', () => -constants.errno.EINTR)
    let interruptions = 5
    const read = replace('readv', (original) => (fd, buffers, position, callback) => {
      interruptions -= 1
      if (interruptions >= 0) callback(systemError(interruptions % 2 === 0 ? 'EINTR' : 'EAGAIN'))
      else original(fd, buffers, position, callback)
    })
    const disk = await openDisk(makeImage(pattern(4096)))
    expect(difference(await readBytes(disk, 0, 4096), pattern(4096))).toBeUndefined()
    expect(read).toHaveBeenCalledTimes(6)
    interruptions = Number.POSITIVE_INFINITY
    await expect(readBytes(disk, 0, 512)).rejects.toThrow(withCode('ERR_DISK_IO', /EINTR|EAGAIN/))
  })

  it('fails every flush after one that failed: what was not written may be lost', async () => {
    const disk = await openDisk(makeImage(4096))
    const sync = vi
      .spyOn(fs, 'fdatasync')
      .mockImplementationOnce((_fd, callback) => callback(systemError('EIO') as never))
    await expect(disk.flush()).rejects.toThrow(withCode('ERR_DISK_IO', /flush.*EIO/))
    await expect(disk.flush()).rejects.toThrow(withCode('ERR_DISK_IO', /flush.*EIO/))
    expect(sync).toHaveBeenCalledTimes(1)
  })

  it('rejects what is not on the disk, and does not let the file grow', async () => {
    const path = makeImage(4096)
    const disk = await openDisk(path)
    for (const offset of [-512, 1, 4096, 2 ** 53, Number.NaN]) {
      expect(() => disk.write(offset, [new Uint8Array(512)])).toThrow(withCode('ERR_INVALID_ARGUMENT'))
      expect(() => disk.read(offset, [new Uint8Array(512)])).toThrow(withCode('ERR_INVALID_ARGUMENT'))
      expect(() => disk.discard(offset, 512)).toThrow(withCode('ERR_INVALID_ARGUMENT'))
      expect(() => disk.writeZeroes(offset, 512, true)).toThrow(withCode('ERR_INVALID_ARGUMENT'))
    }
    expect(() => disk.write(0, [new Uint8Array(4097)])).toThrow(withCode('ERR_INVALID_ARGUMENT'))
    expect(statSync(path).size).toBe(4096)
  })

  it('does not write to a file that is to be read only', async () => {
    const path = makeImage(pattern(4096))
    const disk = await openDisk(path, true)
    await expect(disk.write(0, [new Uint8Array(512)])).rejects.toThrow(withCode('ERR_DISK_IO'))
    await expect(disk.discard(0, 4096)).rejects.toThrow(withCode('ERR_DISK_IO'))
    expect(disk.flush()).toBeUndefined()
    expect(difference(new Uint8Array(readFileSync(path)), pattern(4096))).toBeUndefined()
  })
})

describe('flushes of a FileDisk', () => {
  it('share a system call where they wait for the same one, which begins after they were asked for', async () => {
    const disk = await openDisk(makeImage(4096))
    const begun: (() => void)[] = []
    vi.spyOn(fs, 'fdatasync').mockImplementation((_fd, callback) => void begun.push(() => callback(null)))
    const first = disk.flush()
    const others = Promise.all(Array.from({ length: 100 }, () => disk.flush()))
    expect(begun).toHaveLength(1)
    begun[0]!()
    await first
    await vi.waitFor(() => expect(begun).toHaveLength(2))
    const last = disk.flush()
    begun[1]!()
    await others
    await vi.waitFor(() => expect(begun).toHaveLength(3))
    begun[2]!()
    await last
  })
})

describe('flushes', () => {
  it('are one at a time, whenever they are asked for', async () => {
    let underWay = 0
    let count = 0
    const flushes = new Flushes(async () => {
      underWay += 1
      count += 1
      expect(underWay).toBe(1)
      await new Promise((resolve) => setImmediate(resolve))
      underWay -= 1
      if (count === 2) throw new Error('the second fails')
    })
    const first = flushes.request()
    const afterFirst = first.then(() => flushes.request())
    const second = flushes.request()
    await first
    await expect(second).rejects.toThrow('the second fails')
    await expect(afterFirst).rejects.toThrow('the second fails')
    await flushes.request()
    expect(count).toBe(3)
  })
})

describe('closing a FileDisk', () => {
  it('waits for what is under way', async () => {
    const path = makeImage(8 * MIB)
    const disk = await openDisk(path)
    let done = 0
    const count = () => {
      done += 1
    }
    const requests = [
      disk.write(0, [pattern(4 * MIB)])!.then(count),
      disk.read(4 * MIB, [new Uint8Array(4 * MIB)])!.then(count),
      disk.discard(6 * MIB, MIB)!.then(count),
      disk.flush()!.then(count),
    ]
    await disk.close()
    expect(done).toBe(4)
    await Promise.all(requests)
    expect(
      difference(new Uint8Array(readFileSync(path)).subarray(0, 4 * MIB), pattern(4 * MIB)),
    ).toBeUndefined()
  })

  it('34: may be done twice, and ends all requests after it', async () => {
    const disk = await openDisk(makeImage(4096))
    await Promise.all([disk.close(), disk.close()])
    await disk.close()
    await expectClosed(disk)
  })

  it('ends zeros that have to be written one by one', async () => {
    vi.spyOn(binding().fileIo, 'fallocate').mockResolvedValue(-EOPNOTSUPP)
    const writes = replace('writev', () => (_fd, [bytes], _position, callback) => {
      setImmediate(callback, null, bytes!.length)
    })
    const disk = await openDisk(makeImage(2 ** 40))
    const request = expect(disk.writeZeroes(0, 2 ** 40, true)).rejects.toThrow(withCode('ERR_CLOSED'))
    await vi.waitFor(() => expect(writes.mock.calls.length).toBeGreaterThan(2))
    await disk.close()
    await request
  })
})

describe('the size of a block device', () => {
  it('is an error for what is none', () => {
    const path = makeImage(4096)
    writeFileSync(path, 'no device')
    const fd = fs.openSync(path, 'r')
    expect(binding().fileIo.blockDeviceSize(fd)).toBe(-constants.errno.ENOTTY)
    fs.closeSync(fd)
  })

  it.skipIf(!canMakeLoopDevices())('is that of the device', async () => {
    const path = makeImage(pattern(4 * MIB))
    const device = execFileSync('losetup', ['--find', '--show', path], { encoding: 'utf8' }).trim()
    try {
      const disk = await openDisk(device)
      expect(disk.size).toBe(4 * MIB)
      expect(
        difference(await readBytes(disk, MIB, 4096), pattern(4 * MIB).slice(MIB, MIB + 4096)),
      ).toBeUndefined()
      await disk.writeZeroes(MIB, 1024, true)
      await disk.write(MIB + 1024, [pattern(512, 9)])
      await disk.flush()
      await disk.close()
      expect(
        difference(
          new Uint8Array(readFileSync(path).subarray(MIB, MIB + 1536)),
          Uint8Array.from([...new Uint8Array(1024), ...pattern(512, 9)]),
        ),
      ).toBeUndefined()
    } finally {
      execFileSync('losetup', ['--detach', device])
    }
  })
})

function canMakeLoopDevices(): boolean {
  try {
    execFileSync('losetup', ['--find'], { stdio: 'ignore' })
    return process.getuid!() === 0
  } catch {
    return false
  }
}
