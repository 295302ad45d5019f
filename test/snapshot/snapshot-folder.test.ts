import { execFileSync } from 'node:child_process'
import fs, {
  cpSync,
  existsSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  renameSync,
  rmSync,
  statSync,
  symlinkSync,
  truncateSync,
  writeFileSync,
} from 'node:fs'
import { open } from 'node:fs/promises'
import { join } from 'node:path'
import { afterEach, describe, expect, it, onTestFinished, vi } from 'vitest'
import type { MachineRam, MemoryImage } from '../../src/memory/machine-ram.js'
import {
  checkHost,
  readSnapshot,
  type SnapshotInfo,
  type WriteSnapshotOptions,
  writeSnapshot,
} from '../../src/snapshot/snapshot-folder.js'
import { type DiskRecord, MAX_STATE_SIZE } from '../../src/snapshot/state-file.js'
import { difference, pattern, withCode } from '../backends/disks.js'
import { makeFolder } from '../helpers/folders.js'
import { bytesOf, closing, jsonOf, MEMORY_SIZE, makeFacts, makeRam, PAGE, seal } from './records.js'

const MIB = 2 ** 20
const DISKS: readonly DiskRecord[] = [{ kind: 'file' }, { kind: 'copy' }]

afterEach(() => vi.restoreAllMocks())

const writeDisks = async () => DISKS

/** A full snapshot of this image. */
function write(
  path: string,
  image: MemoryImage,
  options: Partial<WriteSnapshotOptions> = {},
): Promise<SnapshotInfo> {
  return writeSnapshot(path, makeFacts(), image, { writeDisks, ...options })
}

/** An image with something on each of its pages. */
function makeImage(): MemoryImage {
  const { ram, bytes } = makeRam()
  bytes.set(pattern(MEMORY_SIZE))
  return closing(ram.capture())
}

/** Reads a snapshot, and closes its memory after the test. */
async function read(path: string) {
  const { record, memory } = await readSnapshot(path)
  return { record, memory: closing(memory) }
}

/** Makes something else of what the state file of a snapshot says. */
function edit(
  path: string,
  change: (json: { parent?: unknown; id?: string; [key: string]: unknown }) => void,
): void {
  const file = join(path, 'state')
  const json = JSON.parse(jsonOf(readFileSync(file)))
  change(json)
  writeFileSync(file, seal(JSON.stringify(json)))
}

/** What handles of files have in common, to spy on. */
async function handles(): Promise<fs.promises.FileHandle> {
  const handle = await open('/dev/null')
  await handle.close()
  return Object.getPrototypeOf(handle) as fs.promises.FileHandle
}

const systemError = (code: string) => Object.assign(new Error(`${code}: as if`), { code })

describe('a snapshot on disk', () => {
  it('gives back the machine and its memory', async () => {
    const path = join(makeFolder(), 'snapshot')
    const image = makeImage()
    const before = Date.now()
    const info = await write(path, image)
    const { record, memory } = await read(path)
    expect(record).toEqual({
      id: info.id,
      created: record.created,
      nodevisor: JSON.parse(readFileSync(new URL('../../package.json', import.meta.url), 'utf8')).version,
      ...makeFacts(),
      disks: DISKS,
      memory: { size: MEMORY_SIZE, pages: 'all' },
    })
    expect(Date.parse(record.created)).toBeGreaterThanOrEqual(before)
    expect(difference(bytesOf(memory), pattern(MEMORY_SIZE))).toBeUndefined()
  })

  it('is a folder of the files that the page says, and tells what it takes', async () => {
    const folder = makeFolder()
    const { ram, bytes } = makeRam()
    bytes.fill(1, 0, 3 * PAGE)
    const info = await write(join(folder, 'snapshot'), closing(ram.capture()), {
      writeDisks: async (unfinished) => {
        // Not yet where it will be, and on the same file system.
        expect(unfinished).toMatch(/\/snapshot\.[0-9a-f]{16}\.new$/)
        expect(readdirSync(unfinished)).not.toContain('state')
        writeFileSync(join(unfinished, 'disk1.raw'), pattern(512))
        return DISKS
      },
    })
    expect(info).toEqual({ path: join(folder, 'snapshot'), id: info.id, bytes: info.bytes, pages: 3 })
    expect(readdirSync(folder)).toEqual(['snapshot'])
    expect(readdirSync(info.path).sort()).toEqual(['disk1.raw', 'memory', 'state'])
    const blocks = readdirSync(info.path).map((name) => statSync(join(info.path, name)).blocks)
    expect(info.bytes).toBe(blocks.reduce((sum, count) => sum + count) * 512)
    expect(statSync(join(info.path, 'memory')).size).toBe(MEMORY_SIZE)
    // For nobody else: it has what the guest had in memory.
    expect(statSync(info.path).mode & 0o777).toBe(0o700)
  })

  it('is durable before it is there: the files, the folder, and the name', async () => {
    const events: string[] = []
    const path = join(makeFolder(), 'snapshot')
    const prototype = await handles()
    const sync = prototype.sync
    vi.spyOn(prototype, 'sync').mockImplementation(async function (this: fs.promises.FileHandle) {
      const name = fs.readlinkSync(`/proc/self/fd/${this.fd}`).replace(/\.[0-9a-f]{16}\.new/, '.new')
      events.push(`${name.slice(path.length - 'snapshot'.length)} ${existsSync(path)}`)
      return sync.call(this)
    })
    await write(path, makeImage())
    expect(events).toEqual([
      'snapshot.new/memory false',
      'snapshot.new/state false',
      'snapshot.new false',
      expect.stringMatching(/^ true$/),
    ])
  })
})

describe('a snapshot that cannot be written', () => {
  /** Expects that it fails for this reason, and leaves nothing. */
  async function expectFailure(attempt: (path: string) => Promise<unknown>, message: RegExp): Promise<void> {
    const folder = makeFolder()
    await expect(attempt(join(folder, 'snapshot'))).rejects.toThrow(withCode('ERR_SNAPSHOT_WRITE', message))
    expect(readdirSync(folder)).toEqual([])
  }

  it('leaves nothing if a disk fails', async () => {
    const failure = new Error('no such disk')
    const attempt = (path: string) =>
      write(path, makeImage(), {
        writeDisks: async (folder) => {
          writeFileSync(join(folder, 'disk0.raw'), 'half')
          throw failure
        },
      })
    await expectFailure(attempt, /was not written \(no such disk\)/)
    await expect(attempt(join(makeFolder(), 'again'))).rejects.toThrow(
      expect.objectContaining({ cause: failure }),
    )
  })

  it('leaves nothing if the disk is full', async () => {
    const write_ = vi.spyOn(await handles(), 'write')
    const attempt = (path: string) => {
      write_.mockRejectedValue(systemError('ENOSPC'))
      return write(path, makeImage())
    }
    await expectFailure(attempt, /ENOSPC.*: free some space/)
  })

  const canMount = process.getuid?.() === 0 && existsSync('/usr/bin/mount')
  it.skipIf(!canMount)('leaves nothing on a file system that really is full (needs root)', async () => {
    const folder = makeFolder()
    try {
      execFileSync('mount', ['-t', 'tmpfs', '-o', 'size=1m', 'nodevisor-test', folder], { stdio: 'ignore' })
    } catch {
      // Root of a container that may not mount: the test before has to do.
      return
    }
    onTestFinished(() => void execFileSync('umount', [folder]))
    await expect(write(join(folder, 'snapshot'), makeImage())).rejects.toThrow(
      withCode('ERR_SNAPSHOT_WRITE', /ENOSPC/),
    )
    expect(readdirSync(folder)).toEqual([])
    // There is room for one that is smaller.
    const { ram, bytes } = makeRam()
    bytes.fill(1, 0, MIB / 4)
    await write(join(folder, 'snapshot'), closing(ram.capture()))
    expect(difference(readFileSync(join(folder, 'snapshot/memory')), bytes)).toBeUndefined()
  })

  it('leaves nothing if it is aborted, before or meanwhile', async () => {
    await expectFailure((path) => write(path, makeImage(), { signal: AbortSignal.abort() }), /aborted/)
    const controller = new AbortController()
    const attempt = (path: string) =>
      write(path, makeImage(), {
        signal: controller.signal,
        onProgress: ({ done }) => done >= MIB && controller.abort(new Error('enough')),
      })
    await expectFailure(attempt, /enough/)
    const late = new AbortController()
    const withDisks = async () => {
      late.abort(new Error('too late'))
      return DISKS
    }
    await expectFailure(
      (path) => write(path, makeImage(), { signal: late.signal, writeDisks: withDisks }),
      /too late/,
    )
  })

  it('leaves nothing if the name cannot be made durable', async () => {
    const sync = vi.spyOn(await handles(), 'sync')
    const attempt = (path: string) => {
      // The two files and the folder, then the folder that it is in.
      for (let i = 0; i < 3; i++) sync.mockResolvedValueOnce()
      sync.mockRejectedValueOnce(systemError('EIO'))
      return write(path, makeImage())
    }
    await expectFailure(attempt, /EIO/)
  })

  it('leaves nothing if it could not be read again', async () => {
    const attempt = (path: string) => write(path, makeImage(), { writeDisks: async () => [] })
    await expectFailure(attempt, /Expected 2 disks/)
  })

  it('leaves nothing if a device has what no file can have', async () => {
    const facts = makeFacts([Number.NaN])
    const attempt = (path: string) => writeSnapshot(path, facts, makeImage(), { writeDisks })
    await expectFailure(attempt, /plain data/)
  })

  it.each([
    ['a file', (path: string) => writeFileSync(path, 'mine')],
    ['an empty folder', (path: string) => mkdirSync(path)],
    ['a link to nowhere', (path: string) => symlinkSync('/nowhere', path)],
  ])('touches nothing where %s is', async (_, make) => {
    const folder = makeFolder()
    const path = join(folder, 'snapshot')
    make(path)
    const disks = vi.fn(writeDisks)
    await expect(write(path, makeImage(), { writeDisks: disks })).rejects.toThrow(
      withCode('ERR_SNAPSHOT_WRITE', /Expected nothing at .* choose another path/),
    )
    expect(disks).not.toHaveBeenCalled()
    expect(readdirSync(folder)).toEqual(['snapshot'])
  })

  it('says what to do where its path leads nowhere', async () => {
    const folder = makeFolder()
    writeFileSync(join(folder, 'file'), '')
    const failed = (message: RegExp) => withCode('ERR_SNAPSHOT_WRITE', message)
    await expect(write(join(folder, 'none/snapshot'), makeImage())).rejects.toThrow(failed(/make the folder/))
    await expect(write(join(folder, 'file/snapshot'), makeImage())).rejects.toThrow(failed(/through folders/))
    await expect(write(join(folder, 'x'.repeat(250)), makeImage())).rejects.toThrow(failed(/shorter name/))
    expect(readdirSync(folder)).toEqual(['file'])
  })
})

describe('a snapshot that has only the changes', () => {
  /** A full one, and two on top of it, in one folder; what was in memory at the last. */
  async function makeChain(
    folder: string,
  ): Promise<{ infos: SnapshotInfo[]; ram: MachineRam; bytes: Uint8Array }> {
    const { ram, bytes } = makeRam()
    const infos: SnapshotInfo[] = []
    bytes.fill(1, 0, 100 * PAGE)
    for (const name of ['full', 'second', 'third']) {
      bytes.fill(infos.length + 10, infos.length * PAGE, (infos.length + 2) * PAGE)
      bytes.fill(0, (infos.length + 50) * PAGE, (infos.length + 51) * PAGE)
      const image = ram.capture()
      const pages = ram.takeChanges()
      const parent = infos.at(-1)
      const changes = parent === undefined ? undefined : { pages, parent }
      infos.push(await write(join(folder, name), image, { changes }))
      image.close()
    }
    return { infos, ram, bytes }
  }

  it('gives back all of memory with those below it', async () => {
    const { infos, bytes } = await makeChain(makeFolder())
    const { record, memory } = await read(infos[2]!.path)
    expect(difference(bytesOf(memory), bytes)).toBeUndefined()
    expect(record.parent).toEqual({ path: '../second', id: infos[1]!.id })
    expect(infos.map(({ pages }) => pages)).toEqual([99, 2, 2])
  })

  it('can be moved with them, and be opened through a link', async () => {
    const folder = makeFolder()
    const { bytes } = await makeChain(folder)
    const elsewhere = join(makeFolder(), 'moved')
    renameSync(folder, elsewhere)
    mkdirSync(folder)
    const link = join(folder, 'link')
    symlinkSync(join(elsewhere, 'third'), link)
    expect(difference(bytesOf((await read(link)).memory), bytes)).toBeUndefined()
  })

  it('is not written where the other one is not', async () => {
    const folder = makeFolder()
    const { infos, ram } = await makeChain(folder)
    const image = closing(ram.capture())
    const attempt = (parent: { path: string; id: string }) =>
      write(join(folder, 'new'), image, { changes: { pages: ram.takeChanges(), parent } })
    const failed = withCode('ERR_SNAPSHOT_WRITE')
    await expect(attempt({ path: join(folder, 'none'), id: infos[0]!.id })).rejects.toThrow(failed)
    await expect(attempt({ path: infos[0]!.path, id: infos[1]!.id })).rejects.toThrow(failed)
    expect(readdirSync(folder).sort()).toEqual(['full', 'second', 'third'])
  })

  it('says which one is missing, or another', async () => {
    const folder = makeFolder()
    const { infos } = await makeChain(folder)
    renameSync(infos[1]!.path, join(folder, 'away'))
    await expect(readSnapshot(infos[2]!.path)).rejects.toThrow(
      withCode('ERR_SNAPSHOT_READ', /ENOENT.*second.*keep the snapshots of which it has only the changes/),
    )
    cpSync(infos[0]!.path, infos[1]!.path, { recursive: true })
    await expect(readSnapshot(infos[2]!.path)).rejects.toThrow(
      withCode('ERR_SNAPSHOT_DAMAGED', new RegExp(`${infos[1]!.id}, .* but there is ${infos[0]!.id}`)),
    )
  })

  it('is refused with another size of memory below', async () => {
    const { infos } = await makeChain(makeFolder())
    edit(infos[0]!.path, (json) => {
      json.memory = { size: 2 * MEMORY_SIZE, pages: 'all' }
      ;(json.hardware as Record<string, unknown>).memorySize = 2 * MEMORY_SIZE
    })
    await expect(readSnapshot(infos[2]!.path)).rejects.toThrow(
      withCode('ERR_SNAPSHOT_DAMAGED', /bytes of memory/),
    )
  })

  it('is refused as one that has the changes of itself', async () => {
    const { infos } = await makeChain(makeFolder())
    edit(infos[1]!.path, (json) => {
      json.parent = { path: '../third', id: infos[2]!.id }
    })
    await expect(readSnapshot(infos[2]!.path)).rejects.toThrow(
      withCode('ERR_SNAPSHOT_DAMAGED', /among those of which it has the changes/),
    )
  })

  it('can be the last of 64, and is neither written nor read beyond', async () => {
    const folder = makeFolder()
    const { ram, bytes } = makeRam()
    bytes[0] = 1
    const image = closing(ram.capture())
    const pages = Uint32Array.of(0, 1)
    const pathOf = (index: number) => join(folder, `${index}`)
    const idOf = (index: number) => `00000000-0000-4000-8000-${`${index}`.padStart(12, '0')}`
    const add = (index: number) => {
      cpSync(pathOf(2), pathOf(index), { recursive: true })
      edit(pathOf(index), (json) => {
        json.id = idOf(index)
        json.parent = { path: `../${index - 1}`, id: index === 3 ? second.id : idOf(index - 1) }
      })
    }
    const parent = await write(pathOf(1), image)
    const second = await write(pathOf(2), image, { changes: { pages, parent } })
    for (let index = 3; index <= 63; index++) add(index)
    const last = await write(pathOf(64), image, {
      changes: { pages, parent: { path: pathOf(63), id: idOf(63) } },
    })
    expect(bytesOf((await read(last.path)).memory)[0]).toBe(1)
    await expect(write(pathOf(65), image, { changes: { pages, parent: last } })).rejects.toThrow(
      withCode('ERR_SNAPSHOT_WRITE', /take a full one/),
    )
    rmSync(last.path, { recursive: true })
    add(64)
    add(65)
    await expect(readSnapshot(pathOf(65))).rejects.toThrow(
      withCode('ERR_SNAPSHOT_DAMAGED', /at most 64 snapshots/),
    )
  })
})

describe('a snapshot that cannot be read', () => {
  const unreadable = (message: RegExp) => withCode('ERR_SNAPSHOT_READ', message)

  it('is not there', async () => {
    const path = join(makeFolder(), 'none')
    await expect(readSnapshot(path)).rejects.toThrow(unreadable(/ENOENT.*: correct the path/))
    await expect(readSnapshot(path)).rejects.toThrow(
      expect.objectContaining({ cause: expect.objectContaining({ code: 'ENOENT' }) }),
    )
  })

  it('is a file, or another folder', async () => {
    const folder = makeFolder()
    writeFileSync(join(folder, 'file'), '')
    await expect(readSnapshot(join(folder, 'file'))).rejects.toThrow(
      unreadable(/name the folder of a snapshot/),
    )
    await expect(readSnapshot(folder)).rejects.toThrow(unreadable(/ENOENT/))
  })

  it.each<[what: string, code: string, damage: (path: string) => void]>([
    ['without its memory', 'ERR_SNAPSHOT_DAMAGED', (path) => rmSync(join(path, 'memory'))],
    [
      'with memory that was cut off',
      'ERR_SNAPSHOT_DAMAGED',
      (path) => truncateSync(join(path, 'memory'), PAGE),
    ],
    [
      'with a folder for memory',
      'ERR_SNAPSHOT_READ',
      (path) => {
        rmSync(join(path, 'memory'))
        mkdirSync(join(path, 'memory'))
      },
    ],
    ['without its state', 'ERR_SNAPSHOT_READ', (path) => rmSync(join(path, 'state'))],
    ['with no state in that file', 'ERR_SNAPSHOT_DAMAGED', (path) => truncateSync(join(path, 'state'), 0)],
    [
      'with a FIFO for state',
      'ERR_SNAPSHOT_READ',
      (path) => {
        rmSync(join(path, 'state'))
        execFileSync('mkfifo', [join(path, 'state')])
      },
    ],
    [
      'of another version',
      'ERR_SNAPSHOT_VERSION',
      (path) => writeFileSync(join(path, 'state'), 'nodevisor snapshot 2 x\n'),
    ],
  ])('is one %s: %s', async (_, code, damage) => {
    const path = join(makeFolder(), 'snapshot')
    await write(path, makeImage())
    damage(path)
    await expect(readSnapshot(path)).rejects.toThrow(withCode(code))
  })
})

describe('the state of a snapshot', () => {
  it('is not even read if there is more than there can be', async () => {
    const path = join(makeFolder(), 'snapshot')
    await write(path, makeImage())
    truncateSync(join(path, 'state'), MAX_STATE_SIZE + 1)
    await expect(readSnapshot(path)).rejects.toThrow(
      withCode('ERR_SNAPSHOT_DAMAGED', /at most 33554432 bytes/),
    )
  })
})

describe('the host of a snapshot', () => {
  const host = { kind: 'hardware', processor: 'A', features: ['sse2', 'avx2', 'avx512f'] } as const

  it('may be any other of its kind with its features', () => {
    checkHost({ host }, { kind: 'hardware', features: ['avx512f', 'sse2', 'avx2', 'amx_tile'] })
  })

  it('has to be of the same kind', () => {
    expect(() => checkHost({ host }, { ...host, kind: 'pvm' })).toThrow(
      withCode('ERR_SNAPSHOT_HOST', /kind 'hardware'.* is 'pvm'/),
    )
  })

  it('has to have all features: the others are listed', () => {
    const check = () => checkHost({ host }, { kind: 'hardware', features: ['sse2'] })
    expect(check).toThrow(withCode('ERR_SNAPSHOT_HOST', /lacks avx2, avx512f/))
    expect(check).toThrow(expect.objectContaining({ missing: ['avx2', 'avx512f'] }))
  })
})
