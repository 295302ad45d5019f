import { readdirSync, readFileSync, truncateSync, writeFileSync } from 'node:fs'
import { dirname, join } from 'node:path'
import { pathToFileURL } from 'node:url'
import type { Worker } from 'node:worker_threads'
import { describe, expect, it } from 'vitest'
import {
  type BlockBackend,
  type DiskOptions,
  FileDisk,
  MemoryDisk,
  type NodevisorError,
  VirtualMachine,
  type VirtualMachineOptions,
} from '../../src/index.js'
import { difference, makeImage, pattern } from '../backends/disks.js'
import { HLT, program } from '../helpers/code.js'
import { times } from '../helpers/guests.js'
import { RUN_LIMIT } from '../helpers/limits.js'
import { boot, EXECUTIONS, errorWith, until, vcpuThreads } from './boot.js'
import { startWorker } from './programs.js'
import {
  blockLines,
  bootVirtio,
  expectWritten,
  linesOf,
  MACHINES,
  ONE_REQUEST,
  readDisk,
  SECTOR,
  SUCCESS,
  sectorPattern,
  virtioGuest,
} from './virtio-guest.js'

const VIRTIO_BLK_S_OK = 0
const VIRTIO_BLK_S_IOERR = 1

/** The begin of an image, as the guest prints it. */
const BEGIN = 'this is a disk!!'

/** An image in a folder of its own: text, then anything. */
function image(sectors = 128): { readonly path: string; readonly before: Uint8Array } {
  const before = pattern(sectors * SECTOR)
  before.set(Buffer.from(BEGIN))
  return { path: makeImage(before), before }
}

/** Options as a JavaScript program may pass them. */
const create = (disks: unknown, options: object = {}) =>
  VirtualMachine.create({
    kernel: { image: program(HLT), mode: 'long' },
    memory: '4M',
    disks,
    ...options,
  } as VirtualMachineOptions)

const openFiles = () => readdirSync('/proc/self/fd').length

/** What each method of a backend does in place of what it is for, if anything. */
type Instead = Partial<Record<'read' | 'write' | 'flush' | 'close', () => Promise<void> | undefined>>

/** A backend of one's own that is not one of the package's classes: 64 KiB in an array. */
function ownBackend(instead: Instead = {}, bytes = new Uint8Array(64 * 1024)) {
  const each = (
    offset: number,
    buffers: readonly Uint8Array[],
    action: (part: Uint8Array, buffer: Uint8Array) => void,
  ) => {
    let at = offset
    for (const buffer of buffers) {
      action(bytes.subarray(at, at + buffer.length), buffer)
      at += buffer.length
    }
  }
  const calls = { close: 0 }
  const backend: BlockBackend = {
    size: bytes.length,
    readOnly: false,
    read(offset, buffers) {
      if (instead.read) return instead.read()
      each(offset, buffers, (part, buffer) => buffer.set(part))
      return undefined
    },
    write(offset, buffers) {
      if (instead.write) return instead.write()
      each(offset, buffers, (part, buffer) => part.set(buffer))
      return undefined
    },
    flush: () => instead.flush?.(),
    async close() {
      calls.close++
      await instead.close?.()
    },
  }
  return { backend, bytes, calls }
}

describe.each(MACHINES)('with irqchip %s, %s,', (irqchip, execution, wait) => {
  it('what a guest writes to an image is in the file, byte for byte', async () => {
    const { path, before } = image(2048)
    const vm = await bootVirtio(`${wait} block`, {
      irqchip,
      execution,
      disks: [{ file: path, serial: 'WD-12345678901234567' }],
    })
    expect(await linesOf(vm)).toEqual(
      blockLines(0, { sectors: 2048, begin: BEGIN, serial: 'WD-12345678901234567' }),
    )
    await vm.close()
    expectWritten(before, readFileSync(path))
  })

  it('several disks of all kinds are driven one after the other', async () => {
    const [raw, readOnly, base] = [image(), image(256), image(512)]
    const own = ownBackend()
    const overlay = join(dirname(base.path), 'changes')
    const vm = await bootVirtio(`${wait} block`, {
      irqchip,
      execution,
      disks: [
        raw.path,
        { file: readOnly.path, readOnly: true, queues: 2 },
        { file: base.path, overlay },
        { memory: '1M' },
        raw.before,
        { backend: own.backend },
      ],
    })
    expect(await linesOf(vm)).toEqual([
      ...blockLines(0, { sectors: 128, begin: BEGIN }),
      ...blockLines(1, { sectors: 256, begin: BEGIN, readOnly: true, queues: 2 }),
      ...blockLines(2, { sectors: 512, begin: BEGIN }),
      ...blockLines(3, { sectors: 2048 }),
      ...blockLines(4, { sectors: 128, begin: BEGIN }),
      ...blockLines(5, { sectors: 128, clears: false }),
    ])
    await vm.close()
    expectWritten(raw.before, readFileSync(raw.path))
    expect(difference(readFileSync(readOnly.path), readOnly.before)).toBe(undefined)
    expect(difference(readFileSync(base.path), base.before)).toBe(undefined)
    expect(own.bytes.subarray(SECTOR, 2 * SECTOR)).toEqual(sectorPattern(1))
    expect(own.calls.close).toBe(1)
  })
})

describe.each(EXECUTIONS)('a disk (%s)', (execution) => {
  const guest = { execution, irqchip: 'none' as const }

  it.each([
    ['a path', (path: string) => path],
    ['a file: URL', (path: string) => pathToFileURL(path)],
    ['a file', (path: string) => ({ file: path })],
    ['a file by URL', (path: string) => ({ file: pathToFileURL(path) })],
    ['a file below a throw-away overlay', (path: string) => ({ file: path, overlay: true })],
    [
      'a file below an overlay by URL',
      (path: string) => ({ file: path, overlay: pathToFileURL(`${path}.new`) }),
    ],
    ['a file read only', (path: string) => ({ file: path, readOnly: true })],
    ['bytes', (path: string) => readFileSync(path)],
    ['a copy of bytes', (path: string) => ({ memory: readFileSync(path) })],
  ])('may be given as %s', async (_how, disk) => {
    const { path, before } = image()
    const { status, bytes } = await readDisk({ ...guest, disks: [disk(path)] }, 0, 128)
    expect(status).toBe(VIRTIO_BLK_S_OK)
    expect(difference(bytes, before)).toBe(undefined)
  })

  it.each([
    ['64K', 128],
    ['1.5 MiB', 3072],
    [16 * 1024, 32],
    ['1T', 2 ** 31],
  ])('of memory %j has %d sectors, all zero', async (memory, sectors) => {
    const vm = await bootVirtio('block', { ...guest, disks: [{ memory }] })
    expect(await linesOf(vm)).toEqual(blockLines(0, { sectors }))
    const { status, bytes } = await readDisk({ ...guest, disks: [{ memory }] }, sectors - 8, 8)
    expect({ status, zero: bytes.every((byte) => byte === 0) }).toEqual({
      status: VIRTIO_BLK_S_OK,
      zero: true,
    })
  })

  it('keeps the bytes it is given as they are', async () => {
    const { before } = image()
    const bytes = before.slice()
    const vm = await bootVirtio('block', { ...guest, disks: [bytes] })
    await linesOf(vm)
    expect(difference(bytes, before)).toBe(undefined)
  })

  it('with an overlay shows a second machine what the first one wrote, and leaves its base alone', async () => {
    const { path, before } = image()
    const overlay = join(dirname(path), 'changes')
    const disks = [{ file: path, overlay }]
    const vm = await bootVirtio('block', { ...guest, disks })
    expect(await linesOf(vm)).toEqual(blockLines(0, { sectors: 128, begin: BEGIN }))
    await vm.close()
    expect(difference(readFileSync(path), before)).toBe(undefined)
    expectWritten(before, (await readDisk({ ...guest, disks }, 0, 128)).bytes)
    // Without the overlay, and with another one, it is as it was.
    expect(difference((await readDisk({ ...guest, disks: [path] }, 0, 128)).bytes, before)).toBe(undefined)
    const other = [{ file: path, overlay: join(dirname(path), 'other') }]
    expect(difference((await readDisk({ ...guest, disks: other }, 0, 128)).bytes, before)).toBe(undefined)
    expect(readdirSync(dirname(path)).sort()).toEqual(['changes', 'disk.img', 'other'])
  })

  it('with a throw-away overlay forgets what was written, and leaves nothing behind', async () => {
    const { path, before } = image()
    const disks = [{ file: path, overlay: true }]
    for (let round = 0; round < 2; round++) {
      const vm = await bootVirtio('block', { ...guest, disks })
      expect(await linesOf(vm)).toEqual(blockLines(0, { sectors: 128, begin: BEGIN }))
      await vm.close()
    }
    expect(difference(readFileSync(path), before)).toBe(undefined)
    expect(difference((await readDisk({ ...guest, disks }, 0, 128)).bytes, before)).toBe(undefined)
    expect(readdirSync(dirname(path))).toEqual(['disk.img'])
  })

  it('may be the base of several machines at once, each with an overlay', async () => {
    const { path, before } = image()
    const machines = await Promise.all(
      [1, 2, 3].map(() => bootVirtio('block', { ...guest, disks: [{ file: path, overlay: true }] })),
    )
    const lines = blockLines(0, { sectors: 128, begin: BEGIN })
    expect(await Promise.all(machines.map(linesOf))).toEqual(machines.map(() => lines))
    await Promise.all(machines.map((vm) => vm.close()))
    expect(difference(readFileSync(path), before)).toBe(undefined)
  })

  it.each<[string, (path: string) => DiskOptions]>([
    ['an image', (file) => ({ file, readOnly: true })],
    ['an overlay', (file) => ({ file, overlay: true, readOnly: true })],
    ['memory', (file) => ({ memory: readFileSync(file), readOnly: true })],
    ['a backend', (file) => ({ backend: new MemoryDisk({ bytes: readFileSync(file) }), readOnly: true })],
  ])('that is read only refuses writes: %s', async (_what, disk) => {
    const { path, before } = image()
    const vm = await bootVirtio('block', { ...guest, disks: [disk(path)] })
    expect(await linesOf(vm)).toEqual(blockLines(0, { sectors: 128, begin: BEGIN, readOnly: true }))
    expect(difference(readFileSync(path), before)).toBe(undefined)
  })

  it('that is cut short on the host fails requests of the guest, and nothing else', async () => {
    const { path } = image()
    const vm = await bootVirtio('block', { ...guest, disks: [path] })
    truncateSync(path, 0)
    expect(await vm.run({ timeout: RUN_LIMIT })).toMatchObject({ reason: 'debug-exit', code: 1 })
    expect(vm.serial.output).toMatch(/\nFAILED.*status of a read expected 0 got 1\n$/)
    const [{ errors, lastError, status, problem }] = vm.virtioDevices as [VirtualMachine['virtioDevices'][0]]
    expect(errors).toBeGreaterThan(0)
    expect(lastError).toEqual(errorWith('ERR_DISK_IO'))
    expect({ status, problem }).toEqual({ status: 15, problem: undefined })
  })
})

describe.each(EXECUTIONS)('a backend of your own (%s)', (execution) => {
  const guest = { execution, irqchip: 'none' as const }
  const broken = new Error('the tape is torn')

  it.each<[string, Instead]>([
    ['at once', {}],
    ['with promises', { flush: () => new Promise((done) => setImmediate(done)) }],
  ])('serves a guest %s', async (_how, instead) => {
    const { backend, bytes, calls } = ownBackend(instead)
    const vm = await bootVirtio('block', { ...guest, disks: [{ backend, serial: 'own' }] })
    expect(await linesOf(vm)).toEqual(blockLines(0, { sectors: 128, serial: 'own', clears: false }))
    expect(bytes.subarray(127 * SECTOR)).toEqual(sectorPattern(127))
    expect(calls.close).toBe(0)
    await vm.close()
    await vm.close()
    expect(calls.close).toBe(1)
  })

  it('may answer in any order', async () => {
    const waiting: (() => void)[] = []
    const disk = new MemoryDisk({ size: 64 * 1024 })
    const later = (action: () => void) =>
      new Promise<void>((done) => {
        waiting.push(() => {
          action()
          done()
        })
        if (waiting.length === 1) {
          setImmediate(() => {
            for (const finish of waiting.splice(0).reverse()) finish()
          })
        }
      })
    const backend: BlockBackend = {
      size: disk.size,
      readOnly: false,
      read: (offset, buffers) => later(() => disk.read(offset, buffers)),
      write: (offset, buffers) => later(() => disk.write(offset, buffers)),
      flush: () => undefined,
      close: () => disk.close(),
    }
    const vm = await bootVirtio('block', { ...guest, disks: [{ backend }] })
    expect(await linesOf(vm)).toEqual(blockLines(0, { sectors: 128, clears: false }))
  })

  it.each<[string, () => Promise<void>]>([
    [
      'throws',
      () => {
        throw broken
      },
    ],
    ['rejects', () => Promise.reject(broken)],
    ['rejects later', () => new Promise((_, reject) => setImmediate(() => reject(broken)))],
  ])(
    'that %s gives the guest an error, which vm.virtioDevices has, and the machine goes on',
    async (_how, read) => {
      const { backend } = ownBackend({ read })
      const vm = await boot({ image: ONE_REQUEST, mode: 'long' }, { ...guest, disks: [{ backend }] })
      await vm.close()
      expect((await readDisk({ ...guest, disks: [{ backend }] }, 0, 1)).status).toBe(VIRTIO_BLK_S_IOERR)

      const failing = await bootVirtio('block', { ...guest, disks: [{ backend }] })
      expect(await failing.run({ timeout: RUN_LIMIT })).toMatchObject({ reason: 'debug-exit', code: 1 })
      // The id, then the first read.
      expect(failing.serial.output).toMatch(/\nFAILED.*status of a read expected 0 got 1\n$/)
      expect(failing.virtioDevices[0]).toMatchObject({ errors: 1, lastError: broken, status: 15 })
    },
  )

  it.each<[string, () => Promise<void>]>([
    ['rejects', () => Promise.reject(broken)],
    [
      'throws',
      () => {
        throw broken
      },
    ],
  ])('whose close() %s is closed like others', async (_how, close) => {
    const first = { ...ownBackend().backend, close }
    const second = ownBackend()
    const vm = await boot(
      { image: program(HLT), mode: 'long' },
      {
        ...guest,
        disks: [{ backend: first }, { backend: second.backend }],
      },
    )
    await vm.close()
    expect(second.calls.close).toBe(1)
    expect(() => vm.memory.readUint8(0)).toThrow(errorWith('ERR_CLOSED'))
  })

  it('with a request under way holds close() up until it is done, and writes into memory that is there', async () => {
    const events: string[] = []
    let finish = () => {}
    let closeCalled = false
    const started = new Promise<void>((isStarted) => {
      finish = () => isStarted()
    })
    let request: Promise<void> | undefined
    const backend: BlockBackend = {
      size: 64 * 1024,
      readOnly: false,
      read(_offset, buffers) {
        const signal = finish
        request = new Promise((done) => {
          finish = () => {
            for (const buffer of buffers) buffer.fill(0x5a)
            events.push(`read ${buffers.reduce((sum, { length }) => sum + length, 0)}`)
            done()
          }
        })
        signal()
        return request
      },
      write: () => undefined,
      flush: () => undefined,
      async close() {
        closeCalled = true
        await request
        events.push('backend closed')
      },
    }
    const vm = await bootVirtio('block', { ...guest, disks: [{ backend }] })
    const run = vm.run({ timeout: RUN_LIMIT })
    await started
    const closing = [vm.close(), vm.close()]
    void closing[0]!.then(() => events.push('machine closed'))
    expect(await run).toMatchObject({ reason: 'stopped', by: 'close' })
    await until(() => closeCalled)
    for (let turn = 0; turn < 5; turn++) await new Promise((resolve) => setImmediate(resolve))
    expect(events).toEqual([])
    finish()
    await Promise.all(closing)
    await vm.close()
    expect(events).toEqual(['read 512', 'backend closed', 'machine closed'])
  })

  it('that does not wait in close() does no harm with an answer after it', async () => {
    let finish: (() => void) | undefined
    const { backend } = ownBackend({
      read: () =>
        new Promise((done) => {
          finish = done
        }),
    })
    const vm = await bootVirtio('block', { ...guest, disks: [{ backend }] })
    const run = vm.run({ timeout: RUN_LIMIT })
    await until(() => finish !== undefined)
    await vm.close()
    expect(await run).toMatchObject({ reason: 'stopped', by: 'close' })
    finish!()
    // An exception that nobody takes would come by then, and end the test.
    await new Promise((resolve) => setImmediate(resolve))
  })
})

describe('wrong disks are refused, and nothing stays open', () => {
  const header = Buffer.alloc(8192, 'not an overlay')

  it.each<[string, (path: string) => unknown, string, RegExp]>([
    ['no list', (path) => path, 'ERR_INVALID_ARGUMENT', /an array of paths or \{ file, … \} for disks/],
    ['a number', () => [5], 'ERR_INVALID_ARGUMENT', /a path, a Uint8Array or \{ file, … \} for disks\[0\]/],
    ['nothing', () => [undefined], 'ERR_INVALID_ARGUMENT', /for disks\[0\] but received undefined/],
    ['an empty path', () => [''], 'ERR_INVALID_ARGUMENT', /a path or a file: URL for disks\[0\]/],
    ['a path with a zero', () => ['a\0b'], 'ERR_INVALID_ARGUMENT', /path/],
    ['a http: URL', () => [new URL('http://x/y')], 'ERR_INVALID_ARGUMENT', /file: URL/],
    [
      'no source',
      () => [{ readOnly: true }],
      'ERR_INVALID_ARGUMENT',
      /exactly one of file, memory and backend/,
    ],
    [
      'two sources',
      (file) => [{ file, memory: 512 }],
      'ERR_INVALID_ARGUMENT',
      /exactly one of .* '2 of them'/,
    ],
    ['a key misspelt', (file) => [{ file, readonly: true }], 'ERR_UNKNOWN_OPTION', /did you mean 'readOnly'/],
    [
      'text for readOnly',
      (file) => [{ file, readOnly: 'ro' }],
      'ERR_INVALID_ARGUMENT',
      /disks\[0\]\.readOnly/,
    ],
    ['a number for overlay', (file) => [{ file, overlay: 5 }], 'ERR_INVALID_ARGUMENT', /disks\[0\]\.overlay/],
    ['an empty overlay', (file) => [{ file, overlay: '' }], 'ERR_INVALID_ARGUMENT', /disks\[0\]\.overlay/],
    ['bytes as file', (file) => [{ file: readFileSync(file) }], 'ERR_INVALID_ARGUMENT', /disks\[0\]\.file/],
    ['a file that is not there', (file) => [file, `${file}.no`], 'ERR_DISK_OPEN', /\.no'/],
    ['a directory', (file) => [file, dirname(file)], 'ERR_DISK_OPEN', /directory/],
    ['a device that is no disk', (file) => [file, '/dev/null'], 'ERR_DISK_OPEN', /\/dev\/null/],
    ['a file of 1000 bytes', (file) => [file, sized(file, 1000)], 'ERR_DISK_FORMAT', /truncate -s 1024/],
    ['an empty file', (file) => [file, sized(file, 0)], 'ERR_DISK_FORMAT', /truncate -s 512/],
    ['the same file twice', (file) => [file, file], 'ERR_DISK_IN_USE', /disk\.img/],
    [
      'a file twice, once read only',
      (file) => [{ file, readOnly: true }, file],
      'ERR_DISK_IN_USE',
      /disk\.img/,
    ],
    [
      'an overlay in a folder that is not there',
      (file) => [{ file, overlay: `${file}/x/y` }],
      'ERR_DISK_OPEN',
      /x\/y/,
    ],
    [
      'an overlay that is none',
      (file) => [{ file, overlay: filed(file, header) }],
      'ERR_DISK_FORMAT',
      /overlay/,
    ],
    ['its base as overlay', (file) => [{ file, overlay: file }], 'ERR_DISK_IN_USE', /disk\.img/],
    [
      'memory of text',
      () => [{ memory: '16Q' }],
      'ERR_INVALID_ARGUMENT',
      /disks\[0\]\.memory but received '16Q'/,
    ],
    ['memory of 1000 bytes', () => [{ memory: 1000 }], 'ERR_INVALID_ARGUMENT', /a multiple of 512/],
    ['no memory', () => [{ memory: 0 }], 'ERR_INVALID_ARGUMENT', /a multiple of 512/],
    ['less than no memory', () => [{ memory: -512 }], 'ERR_INVALID_ARGUMENT', /a multiple of 512/],
    ['no bytes', (file) => [file, new Uint8Array(0)], 'ERR_INVALID_ARGUMENT', /512/],
    ['100 bytes', (file) => [file, new Uint8Array(100)], 'ERR_INVALID_ARGUMENT', /512/],
    ['queues 0', (file) => [{ file, queues: 0 }], 'ERR_INVALID_ARGUMENT', /1 to 16 for queues of disk0/],
    ['queues 17', (file) => [{ file, queues: 17 }], 'ERR_INVALID_ARGUMENT', /1 to 16 for queues of disk0/],
    ['a half queue', (file) => [{ file, queues: 1.5 }], 'ERR_INVALID_ARGUMENT', /queues of disk0/],
    [
      'a long serial',
      (file) => [{ file, serial: 'x'.repeat(21) }],
      'ERR_INVALID_ARGUMENT',
      /up to 20 characters/,
    ],
    ['a serial of letters', (file) => [{ file, serial: 'ü' }], 'ERR_INVALID_ARGUMENT', /of ASCII for serial/],
    ['a serial number', (file) => [{ file, serial: 7 }], 'ERR_INVALID_ARGUMENT', /serial of disk0/],
    ['no backend', (file) => [file, { backend: null }], 'ERR_INVALID_ARGUMENT', /disks\[1\]\.backend/],
    ['an empty backend', (file) => [file, { backend: {} }], 'ERR_INVALID_ARGUMENT', /disks\[1\]\.backend/],
    [
      'an empty backend below an overlay',
      (file) => [file, { backend: {}, overlay: true }],
      'ERR_INVALID_ARGUMENT',
      /disks\[1\]\.backend/,
    ],
    [
      'a backend of 100 bytes',
      (file) => [file, { backend: { ...ownBackend().backend, size: 100 } }],
      'ERR_INVALID_ARGUMENT',
      /512/,
    ],
    [
      'a backend that cannot flush',
      (file) => [file, { backend: { ...ownBackend().backend, flush: undefined } }],
      'ERR_INVALID_ARGUMENT',
      /disks\[1\]\.backend/,
    ],
    [
      'twelve disks',
      (file) => [file, ...Array.from({ length: 11 }, () => ({ memory: 512 }))],
      'ERR_INVALID_ARGUMENT',
      /at most 11 virtio devices/,
    ],
  ])('%s', async (_what, disks, code, message) => {
    const { path, before } = image()
    // What the first machine of a process opens stays open.
    await (await create([image().path])).close()
    const given = disks(path)
    const open = openFiles()
    await expect(create(given)).rejects.toEqual(errorWith(code as NodevisorError['code'], message))
    expect(openFiles()).toBe(open)
    await (await create([path])).close()
    expect(difference(readFileSync(path), before)).toBe(undefined)
  })

  it('an overlay over a base of another size', async () => {
    const [small, large] = [image(128), image(256)]
    const overlay = join(dirname(small.path), 'changes')
    await (await create([{ file: small.path, overlay }])).close()
    await expect(create([{ file: large.path, overlay }])).rejects.toEqual(errorWith('ERR_DISK_FORMAT'))
    await (await create([{ file: small.path, overlay }, large.path])).close()
  })

  it('an image that another machine may write to, until that one is closed', async () => {
    const { path } = image()
    const overlay = join(dirname(path), 'changes')
    const vm = await create([path])
    for (const disk of [path, { file: path, readOnly: true }, { file: path, overlay }]) {
      await expect(create([disk])).rejects.toEqual(errorWith('ERR_DISK_IN_USE', path))
    }
    await vm.close()
    const readers = await Promise.all([1, 2].map(() => create([{ file: path, readOnly: true }])))
    await expect(create([path])).rejects.toEqual(errorWith('ERR_DISK_IN_USE', path))
    await Promise.all(readers.map((reader) => reader.close()))
    await (await create([path])).close()
  })

  it('an overlay that another machine uses', async () => {
    const { path } = image()
    const overlay = join(dirname(path), 'changes')
    const vm = await create([{ file: path, overlay }])
    await expect(create([{ file: path, overlay }])).rejects.toEqual(errorWith('ERR_DISK_IN_USE', 'changes'))
    await vm.close()
    await (await create([{ file: path, overlay }])).close()
  })

  it.each([
    ['the kernel is not there', { kernel: '/nowhere/at/all' }, 'ERR_IMAGE_READ'],
    ['the kernel is no ELF file', { kernel: { image: program(HLT), format: 'elf' } }, 'ERR_IMAGE_FORMAT'],
    ['there are too many vCPUs', { cpus: 100_000 }, 'ERR_INVALID_ARGUMENT'],
    ['a virtio device is none', { virtio: [{}] }, 'ERR_INVALID_ARGUMENT'],
    ['a console port has a bad name', { console: { ports: ['a/b'] } }, 'ERR_INVALID_ARGUMENT'],
    [
      'a device has the place of another',
      { devices: [{ name: 'mine', mmio: { base: 0xfeb0_0000, length: 4 } }] },
      'ERR_BUS_OVERLAP',
    ],
    [
      'a device throws as it is attached',
      {
        devices: [
          {
            name: 'mine',
            ports: { base: 0x500, length: 1 },
            attach() {
              throw new RangeError('no room')
            },
          },
        ],
      },
      undefined,
    ],
  ] as const)('disks of a machine that cannot be, as %s, are closed', async (_why, options, code) => {
    const { path } = image()
    const base = image()
    const own = ownBackend()
    const overlay = join(dirname(path), 'changes')
    await (await create([path])).close()
    const disks = [path, { file: base.path, overlay }, { backend: own.backend }]
    const open = openFiles()
    await expect(create(disks, options)).rejects.toEqual(
      code === undefined ? new RangeError('no room') : errorWith(code),
    )
    expect(openFiles()).toBe(open)
    expect(own.calls.close).toBe(1)
    await (await create(disks)).close()
  })

  it('a disk of a closed machine may be opened by itself', async () => {
    const { path } = image()
    await (await create([path])).close()
    await (await FileDisk.open({ path })).close()
  })
})

describe.each(EXECUTIONS)('33: a worker that ends in the middle of disk I/O (%s)', (execution) => {
  it('leaves no files, threads or locks behind', async () => {
    const { path, before } = image(2048)
    const base = image(2048)
    const options = {
      kernel: virtioGuest('no-event-idx block bench-block-rand=100000000,8'),
      memory: '16M',
      execution,
      disks: [
        { file: path, queues: 2 },
        { file: base.path, overlay: true },
      ],
      console: true,
      rng: true,
    }
    const cycle = async (turns: number) => {
      const worker: Worker = startWorker({ code: new Uint8Array(0), machines: 1, options })
      await new Promise((resolve, reject) => {
        // The image begins with what the worker waits for.
        worker.once('message', resolve)
        worker.once('error', reject)
      })
      for (let turn = 0; turn < turns; turn++) await new Promise((resolve) => setTimeout(resolve, 1))
      expect(await worker.terminate()).toBe(1)
    }
    await cycle(0)
    await until(() => vcpuThreads() === 0)
    const open = openFiles()
    for (let i = 0; i < times(10); i++) await cycle(3 * i)
    await until(() => vcpuThreads() === 0)
    expect(openFiles()).toBeLessThanOrEqual(open)
    const disk = await FileDisk.open({ path })
    expect(disk.size).toBe(before.length)
    await disk.close()
    expect(difference(readFileSync(base.path), base.before)).toBe(undefined)
  })

  it('does not disturb the disk of a machine of the main thread', async () => {
    const workers = [image(256), image(256)]
    const { path, before } = image(256)
    const vm = await bootVirtio('block reset block', { execution, irqchip: 'none', disks: [path] })
    const ends = workers.map(async (disk) => {
      const worker = startWorker({
        code: new Uint8Array(0),
        options: {
          kernel: virtioGuest('block bench-block-rand=100000000,8'),
          memory: '16M',
          execution,
          disks: [disk.path],
        },
      })
      await new Promise((resolve) => worker.once('message', resolve))
      await worker.terminate()
    })
    const lines = blockLines(0, { sectors: 256, begin: BEGIN })
    expect(await linesOf(vm)).toEqual([...lines, ...lines])
    await Promise.all(ends)
    await vm.close()
    expect(readFileSync(path).subarray(0, SECTOR)).toEqual(Buffer.from(before.subarray(0, SECTOR)))
    expect(readFileSync(path).subarray(SECTOR, 2 * SECTOR)).toEqual(Buffer.from(sectorPattern(1)))
  })
})

/** A file of so many bytes beside another one. */
function sized(beside: string, bytes: number): string {
  return filed(beside, new Uint8Array(bytes))
}

function filed(beside: string, bytes: Uint8Array): string {
  const path = join(dirname(beside), 'other')
  writeFileSync(path, bytes)
  return path
}

it('a closed machine still says what its disks were', async () => {
  const vm = await bootVirtio('block', { disks: [{ memory: '64K' }], irqchip: 'none' })
  expect(await vm.run({ timeout: RUN_LIMIT })).toMatchObject(SUCCESS)
  await vm.close()
  expect(vm.virtioDevices).toMatchObject([{ name: 'disk0', deviceType: 2, errors: 0 }])
})
