import fc from 'fast-check'
import { beforeEach, describe, expect, it, vi } from 'vitest'
import { MemoryDisk } from '../../src/backends/memory-disk.js'
import {
  VIRTIO_BLK_F_BLK_SIZE,
  VIRTIO_BLK_F_DISCARD,
  VIRTIO_BLK_F_FLUSH,
  VIRTIO_BLK_F_MQ,
  VIRTIO_BLK_F_RO,
  VIRTIO_BLK_F_SEG_MAX,
  VIRTIO_BLK_F_TOPOLOGY,
  VIRTIO_BLK_F_WRITE_ZEROES,
  VIRTIO_BLK_S_IOERR,
  VIRTIO_BLK_S_OK,
  VIRTIO_BLK_S_UNSUPP,
  VIRTIO_BLK_T_DISCARD,
  VIRTIO_BLK_T_FLUSH,
  VIRTIO_BLK_T_GET_ID,
  VIRTIO_BLK_T_IN,
  VIRTIO_BLK_T_OUT,
  VIRTIO_BLK_T_WRITE_ZEROES,
  VirtioBlock,
  type VirtioBlockOptions,
} from '../../src/virtio/block.js'
import type { BlockBackend } from '../../src/virtio/block-backend.js'
import { COMMON_FEATURES } from '../../src/virtio/features.js'
import {
  type AddOptions,
  encode,
  eventually,
  linked,
  REGISTERS,
  type RequestPart,
  STATUS,
  type UsedChain,
  VIRTQ_DESC_F_WRITE,
  VirtioDriver,
  type VirtioDriverOptions,
} from '../helpers/virtio-driver.js'
import { pattern } from './devices.js'

const SECTOR = 512
const MIB = 2 ** 20
const SECTORS = 64
const DISK_SIZE = SECTORS * SECTOR
const HEADER_SIZE = 16
/** What a driver finds where the device has written nothing. */
const UNTOUCHED = 0xee
const UNMAP = 1

// A queue is served for a certain time and then in another turn: in here it takes none.
beforeEach(() => {
  vi.spyOn(performance, 'now').mockReturnValue(0)
})

/** A request as the backend got it. */
interface Call {
  readonly kind: 'read' | 'write' | 'flush' | 'discard' | 'writeZeroes'
  readonly offset?: number
  readonly length?: number
  readonly mayDiscard?: boolean
}

/** A request that is under way in a {@link TestDisk}. */
interface HeldCall extends Call {
  readonly buffers: readonly Uint8Array[]
  /** Does it. */
  finish(): void
  fail(error: unknown): void
}

/** Plain bytes. It notes what it is asked to do, and does it at once or when the test says so. */
class TestDisk implements BlockBackend {
  readonly size: number
  readonly readOnly: boolean
  readonly blockSize: number
  readonly content: Uint8Array
  readonly calls: Call[] = []
  /** What is under way, in the order in which it came. */
  readonly held: HeldCall[] = []
  /** Requests are under way until the test ends them. */
  holds = false
  /** Called with each request before it is done. */
  onCall: ((call: Call) => void) | undefined

  constructor({ size = DISK_SIZE, readOnly = false, blockSize = SECTOR } = {}) {
    this.size = size
    this.readOnly = readOnly
    this.blockSize = blockSize
    this.content = pattern(Math.min(size, DISK_SIZE))
  }

  read(offset: number, buffers: readonly Uint8Array[]) {
    return this.#start({ kind: 'read', offset, length: lengthOf(buffers) }, buffers, () => {
      let at = offset
      for (const buffer of buffers) {
        buffer.set(this.content.subarray(at, at + buffer.length))
        at += buffer.length
      }
    })
  }

  write(offset: number, buffers: readonly Uint8Array[]) {
    return this.#start({ kind: 'write', offset, length: lengthOf(buffers) }, buffers, () => {
      let at = offset
      for (const buffer of buffers) {
        this.content.set(buffer, at)
        at += buffer.length
      }
    })
  }

  flush() {
    return this.#start({ kind: 'flush' }, [], () => {})
  }

  discard(offset: number, length: number) {
    return this.#start({ kind: 'discard', offset, length }, [], () => {
      this.content.fill(0xdd, offset, offset + length)
    })
  }

  writeZeroes(offset: number, length: number, mayDiscard: boolean) {
    return this.#start({ kind: 'writeZeroes', offset, length, mayDiscard }, [], () => {
      this.content.fill(0, offset, offset + length)
    })
  }

  async close() {}

  /** Takes the oldest request that is under way, or the one with this index. */
  next(index = 0): HeldCall {
    const [call] = this.held.splice(index, 1)
    if (call === undefined) throw new Error(`Expected a request ${index} to be under way`)
    return call
  }

  #start(call: Call, buffers: readonly Uint8Array[], act: () => void): Promise<void> | undefined {
    this.calls.push(call)
    this.onCall?.(call)
    if (!this.holds) {
      act()
      return undefined
    }
    return new Promise((done, fail) => {
      const finish = () => {
        act()
        done()
      }
      this.held.push({ ...call, buffers, finish, fail })
    })
  }
}

/** The least that a backend can be. */
function withoutOptionalMethods(disk: TestDisk): BlockBackend {
  return {
    size: disk.size,
    readOnly: false,
    read: (offset, buffers) => disk.read(offset, buffers),
    write: (offset, buffers) => disk.write(offset, buffers),
    flush: () => disk.flush(),
    close: () => disk.close(),
  }
}

function lengthOf(buffers: readonly Uint8Array[]): number {
  return buffers.reduce((sum, { length }) => sum + length, 0)
}

interface SetUpOptions extends Omit<VirtioBlockOptions, 'backend'> {
  /** Features of the device that the driver does not want. */
  readonly without?: bigint
  readonly size?: number
  readonly driverOptions?: VirtioDriverOptions
}

/** A driver that has initialised a disk. */
function driverOf(
  backend: BlockBackend,
  { without = 0n, size = 64, driverOptions, ...options }: SetUpOptions = {},
) {
  const device = new VirtioBlock({ backend, ...options })
  const driver = new VirtioDriver(device, driverOptions)
  driver.initialize({ features: driver.offered & ~without, sizes: device.queues.map(() => size) })
  return { device, driver }
}

function setUp(options: SetUpOptions & ConstructorParameters<typeof TestDisk>[0] = {}) {
  const { readOnly, blockSize, ...others } = options
  const disk = new TestDisk({
    ...(readOnly === undefined ? {} : { readOnly }),
    ...(blockSize === undefined ? {} : { blockSize }),
  })
  return { disk, ...driverOf(disk, others) }
}

/** 5.2.6: struct virtio_blk_req up to its data. */
function header(type: number, sector: number | bigint = 0): Uint8Array {
  const view = new DataView(new ArrayBuffer(HEADER_SIZE))
  view.setUint32(0, type, true)
  view.setBigUint64(8, BigInt(sector), true)
  return new Uint8Array(view.buffer)
}

/** 5.2.6: struct virtio_blk_discard_write_zeroes. */
function segment(sector: number | bigint, sectors: number, flags = 0): Uint8Array {
  const view = new DataView(new ArrayBuffer(16))
  view.setBigUint64(0, BigInt(sector), true)
  view.setUint32(8, sectors, true)
  view.setUint32(12, flags, true)
  return new Uint8Array(view.buffer)
}

const STATUS_PART: RequestPart = { length: 1 }

const inParts = (sector: number | bigint, length: number): RequestPart[] => [
  { bytes: header(VIRTIO_BLK_T_IN, sector) },
  { length },
  STATUS_PART,
]

const outParts = (sector: number | bigint, bytes: Uint8Array): RequestPart[] => [
  { bytes: header(VIRTIO_BLK_T_OUT, sector) },
  { bytes },
  STATUS_PART,
]

const segmentParts = (type: number, ...segments: Uint8Array[]): RequestPart[] => [
  { bytes: header(type) },
  { bytes: Buffer.concat(segments) },
  STATUS_PART,
]

const FLUSH_PARTS: RequestPart[] = [{ bytes: header(VIRTIO_BLK_T_FLUSH) }, STATUS_PART]

/** What the device put, or left, into the writable part: the data, and the status behind it. */
function answerIn({ length, buffers }: UsedChain) {
  const bytes = Buffer.concat(buffers)
  return { used: length, status: bytes.at(-1), data: Uint8Array.from(bytes.subarray(0, -1)) }
}

async function send(driver: VirtioDriver, parts: readonly RequestPart[], options?: AddOptions) {
  // What the device does not write is to be seen.
  const written = parts.map((part) => {
    if ('bytes' in part) return part
    const address = part.address ?? driver.allocate(part.length)
    driver.memory.fill(address, part.length, UNTOUCHED)
    return { ...part, address }
  })
  return answerIn(await driver.request(0, written, options))
}

/** Bytes in several parts. @param lengths - of all but the last, which has the rest */
function cut(bytes: Uint8Array, lengths: readonly number[]): Uint8Array[] {
  const parts: Uint8Array[] = []
  let rest = bytes
  for (const length of lengths) {
    parts.push(rest.subarray(0, length))
    rest = rest.subarray(length)
  }
  return [...parts, rest]
}

/** A request in buffers of any lengths: the device is not to care (2.7.4.1). */
function cutParts(
  readable: Uint8Array,
  writable: number,
  readableLengths: readonly number[],
  writableLengths: readonly number[],
): RequestPart[] {
  const room = cut(new Uint8Array(writable), writableLengths)
  return [
    ...cut(readable, readableLengths).map((bytes) => ({ bytes })),
    ...room.map(({ length }) => ({ length })),
  ]
}

/** `toEqual` takes long for many bytes. */
function expectSame(received: Uint8Array, expected: Uint8Array): void {
  if (Buffer.compare(received, expected) === 0) return
  const at = expected.findIndex((byte, i) => byte !== received[i])
  expect({ length: received.length, at, byte: received[at] }).toEqual({
    length: expected.length,
    at,
    byte: expected[at],
  })
}

/** The disk still works. */
async function expectHealthy(driver: VirtioDriver): Promise<void> {
  expect(driver.failures).toEqual([])
  expect(driver.status & STATUS.DEVICE_NEEDS_RESET).toBe(0)
  expect(await send(driver, inParts(1, SECTOR))).toMatchObject({
    used: SECTOR + 1,
    status: VIRTIO_BLK_S_OK,
  })
}

describe('a disk', () => {
  it('is a block device of its size, as the configuration space says', () => {
    const { driver } = setUp()
    expect(driver.read(REGISTERS.DeviceID)).toBe(2)
    const config = new DataView(driver.readConfig(0, 60).buffer)
    expect(config.getBigUint64(0, true)).toBe(64n)
    expect({
      sizeMax: config.getUint32(8, true),
      segMax: config.getUint32(12, true),
      geometry: config.getUint32(16, true),
      blkSize: config.getUint32(20, true),
      physicalBlockExp: config.getUint8(24),
      alignmentOffset: config.getUint8(25),
      minIoSize: config.getUint16(26, true),
      optIoSize: config.getUint32(28, true),
      writeback: config.getUint8(32),
      numQueues: config.getUint16(34, true),
      maxDiscardSectors: config.getUint32(36, true),
      maxDiscardSeg: config.getUint32(40, true),
      discardSectorAlignment: config.getUint32(44, true),
      maxWriteZeroesSectors: config.getUint32(48, true),
      maxWriteZeroesSeg: config.getUint32(52, true),
      writeZeroesMayUnmap: config.getUint8(56),
    }).toEqual({
      sizeMax: 0,
      segMax: 254,
      geometry: 0,
      blkSize: 512,
      physicalBlockExp: 0,
      alignmentOffset: 0,
      minIoSize: 1,
      optIoSize: 0,
      writeback: 0,
      numQueues: 1,
      maxDiscardSectors: 2097152,
      maxDiscardSeg: 16,
      discardSectorAlignment: 1,
      maxWriteZeroesSectors: 65536,
      maxWriteZeroesSeg: 16,
      writeZeroesMayUnmap: 1,
    })
  })

  it('tells of the blocks that its backend works in, and of its queues', () => {
    const { driver } = setUp({ blockSize: 4096, queues: 4 })
    const config = new DataView(driver.readConfig(0, 60).buffer)
    expect(config.getUint32(20, true)).toBe(512)
    expect(config.getUint8(24)).toBe(3)
    expect(config.getUint16(26, true)).toBe(8)
    expect(config.getUint16(34, true)).toBe(4)
    expect(config.getUint32(44, true)).toBe(8)
    expect([0, 1, 2, 3, 4].map((index) => driver.queueMax(index))).toEqual([256, 256, 256, 256, 0])
  })

  it('tells the capacity of a disk beyond 2 TiB', () => {
    const { driver } = driverOf(new TestDisk({ size: 2 ** 50 }))
    expect(new DataView(driver.readConfig(0, 8).buffer).getBigUint64(0, true)).toBe(2n ** 41n)
  })

  const ALWAYS =
    COMMON_FEATURES |
    VIRTIO_BLK_F_SEG_MAX |
    VIRTIO_BLK_F_BLK_SIZE |
    VIRTIO_BLK_F_FLUSH |
    VIRTIO_BLK_F_TOPOLOGY
  it.each<[string, () => VirtioBlockOptions, bigint]>([
    [
      'discard and zeros',
      () => ({ backend: new TestDisk() }),
      VIRTIO_BLK_F_DISCARD | VIRTIO_BLK_F_WRITE_ZEROES,
    ],
    ['neither for a backend without', () => ({ backend: withoutOptionalMethods(new TestDisk()) }), 0n],
    [
      'nothing that writes for one to be read only',
      () => ({ backend: new TestDisk({ readOnly: true }) }),
      VIRTIO_BLK_F_RO,
    ],
    [
      'several queues',
      () => ({ backend: new TestDisk({ readOnly: true }), queues: 2 }),
      VIRTIO_BLK_F_RO | VIRTIO_BLK_F_MQ,
    ],
  ])('offers %s', (_, options, special) => {
    expect(new VirtioDriver(new VirtioBlock(options())).offered).toBe(ALWAYS | special)
  })

  it.each<[string, Partial<Record<keyof BlockBackend | 'serial' | 'queues', unknown>>]>([
    ['size of the backend of disk', { size: 1000 }],
    ['size of the backend of disk', { size: -512 }],
    ['size of the backend of disk', { size: 2 ** 60 }],
    ['blockSize of the backend of disk', { blockSize: 256 }],
    ['blockSize of the backend of disk', { blockSize: 1536 }],
    ['serial of disk', { serial: 'x'.repeat(21) }],
    ['serial of disk', { serial: 'dïsk' }],
    ['serial of disk', { serial: 5 }],
    ['queues of disk', { queues: 0 }],
    ['queues of disk', { queues: 17 }],
    ['queues of disk', { queues: 1.5 }],
  ])('refuses a bad %s: %o', (name, { size = 512, blockSize = 512, serial = '', queues = 1 }) => {
    const backend = Object.defineProperties(new TestDisk(), {
      size: { value: size },
      blockSize: { value: blockSize },
    })
    expect(() => new VirtioBlock({ backend, serial, queues } as VirtioBlockOptions)).toThrow(
      expect.objectContaining({ code: 'ERR_INVALID_ARGUMENT', message: expect.stringContaining(name) }),
    )
  })
})

describe('a request', () => {
  it('reads', async () => {
    const { disk, driver } = setUp()
    expect(await send(driver, inParts(3, 2 * SECTOR))).toEqual({
      used: 2 * SECTOR + 1,
      status: VIRTIO_BLK_S_OK,
      data: pattern(DISK_SIZE).slice(3 * SECTOR, 5 * SECTOR),
    })
    expect(disk.calls).toEqual([{ kind: 'read', offset: 3 * SECTOR, length: 2 * SECTOR }])
  })

  it('writes', async () => {
    const { disk, driver } = setUp()
    const bytes = pattern(2 * SECTOR, 9)
    expect(await send(driver, outParts(62, bytes))).toEqual({
      used: 1,
      status: VIRTIO_BLK_S_OK,
      data: new Uint8Array(0),
    })
    const expected = pattern(DISK_SIZE)
    expected.set(bytes, 62 * SECTOR)
    expectSame(disk.content, expected)
    expect(disk.calls).toEqual([{ kind: 'write', offset: 62 * SECTOR, length: 2 * SECTOR }])
  })

  it('flushes, and is done when the flush is', async () => {
    const { disk, driver } = setUp()
    disk.holds = true
    const queue = driver.queue(0)
    queue.add(FLUSH_PARTS)
    queue.kick()
    expect(disk.calls).toEqual([{ kind: 'flush' }])
    expect(queue.used()).toEqual([])
    disk.next().finish()
    const [chain] = await queue.settled()
    expect(answerIn(chain!)).toMatchObject({ used: 1, status: VIRTIO_BLK_S_OK })
  })

  it('asks for the serial number', async () => {
    const { driver } = setUp({ serial: 'nodevisor-0' })
    const parts = [{ bytes: header(VIRTIO_BLK_T_GET_ID) }, { length: 20 }, STATUS_PART]
    const { used, status, data } = await send(driver, parts)
    expect({ used, status }).toEqual({ used: 21, status: VIRTIO_BLK_S_OK })
    expect(Buffer.from(data).toString('latin1')).toBe('nodevisor-0'.padEnd(20, '\0'))
  })

  it('gets as much of the serial number as it has room for, and no more than there is', async () => {
    const { driver } = setUp({ serial: '01234567890123456789' })
    const ask = (length: number) =>
      send(driver, [{ bytes: header(VIRTIO_BLK_T_GET_ID) }, { length }, STATUS_PART])
    expect(await ask(4)).toEqual({
      used: 5,
      status: VIRTIO_BLK_S_OK,
      data: Uint8Array.from(Buffer.from('0123')),
    })
    const longer = await ask(24)
    expect([...longer.data.subarray(20)]).toEqual([UNTOUCHED, UNTOUCHED, UNTOUCHED, UNTOUCHED])
    // There is a gap before the status.
    expect(longer).toMatchObject({ used: 20, status: VIRTIO_BLK_S_OK })
  })

  it.each<[string, number, number[], number[]]>([
    ['header and data in one buffer', 2, [], [2 * SECTOR]],
    ['data and status in one buffer', 2, [16], []],
    ['all that is read in one, all that is written in one', 2, [], []],
    ['a header in pieces', 2, [1, 3, 4, 7], [2 * SECTOR]],
    ['data in odd pieces', 2, [16, 1, 510, 3], [1, 511, 13, 0, 498]],
    ['empty buffers in between', 2, [0, 16, 0, 5, 0], [0, 100, 0, 0]],
    ['mostly a byte each, as many as SEG_MAX allows', 1, Array(16 + 237).fill(1), Array(237).fill(1)],
    ['no data', 0, [16], []],
  ])('may come in any shape: %s', async (_, sectors, readableLengths, writableLengths) => {
    const bytes = pattern(sectors * SECTOR, 5)
    for (const indirect of [false, true, 1]) {
      const { disk, driver } = setUp({ size: 256 })
      const out = cutParts(Buffer.concat([header(VIRTIO_BLK_T_OUT, 7), bytes]), 1, readableLengths, [])
      if (indirect === false && out.length > 256) continue
      expect(await send(driver, out, { indirect })).toMatchObject({ used: 1, status: VIRTIO_BLK_S_OK })
      expect(disk.content.subarray(7 * SECTOR, (7 + sectors) * SECTOR)).toEqual(bytes)
      const into = cutParts(
        header(VIRTIO_BLK_T_IN, 7),
        bytes.length + 1,
        fitting(readableLengths, HEADER_SIZE),
        writableLengths,
      )
      expect(await send(driver, into, { indirect })).toEqual({
        used: bytes.length + 1,
        status: VIRTIO_BLK_S_OK,
        data: bytes,
      })
    }
  })

  it('fails with more segments than SEG_MAX allows', async () => {
    const { driver } = setUp({ size: 256 })
    const pieces = Array(SECTOR).fill(1)
    const into = cutParts(header(VIRTIO_BLK_T_IN, 7), SECTOR + 1, [16], pieces)
    expect(await send(driver, into, { indirect: true })).toMatchObject({ status: VIRTIO_BLK_S_IOERR })
  })

  it('may lie across the border between two stretches of RAM, and above 4 GiB', async () => {
    const { disk, driver } = setUp()
    const bytes = pattern(2 * SECTOR, 3)
    const across = [
      { bytes: header(VIRTIO_BLK_T_OUT, 4), address: MIB - 3 },
      { bytes, address: 2 ** 32 + MIB - bytes.length },
      { length: 1, address: 2 ** 32 },
    ]
    expect(await send(driver, across)).toMatchObject({ used: 1, status: VIRTIO_BLK_S_OK })
    expect(disk.content.subarray(4 * SECTOR, 6 * SECTOR)).toEqual(bytes)
    const back = await send(driver, [
      { bytes: header(VIRTIO_BLK_T_IN, 4), address: 2 ** 32 + 8 },
      // Data and status: the border is in the data.
      { length: bytes.length + 1, address: MIB - 700 },
    ])
    expect(back).toEqual({ used: bytes.length + 1, status: VIRTIO_BLK_S_OK, data: bytes })
  })

  it('may have 32 MiB', async () => {
    const disk = new TestDisk({ size: 2 ** 30 })
    const { driver } = driverOf(disk)
    const room = Array.from({ length: 32 }, () => ({ length: MIB, address: MIB }))
    const parts = [{ bytes: header(VIRTIO_BLK_T_IN) }, ...room, STATUS_PART]
    expect(answerIn(await driver.request(0, parts))).toMatchObject({
      used: 32 * MIB + 1,
      status: VIRTIO_BLK_S_OK,
    })
    expect(disk.calls).toEqual([{ kind: 'read', offset: 0, length: 32 * MIB }])
  })

  it('may have the whole disk', async () => {
    const { disk, driver } = setUp()
    expectSame((await send(driver, inParts(0, DISK_SIZE))).data, pattern(DISK_SIZE))
    expect(await send(driver, outParts(0, pattern(DISK_SIZE, 1)))).toMatchObject({ status: VIRTIO_BLK_S_OK })
    expectSame(disk.content, pattern(DISK_SIZE, 1))
  })

  it('is done in place: the backend gets guest memory itself', async () => {
    const { disk, driver } = setUp()
    disk.holds = true
    const queue = driver.queue(0)
    const [from, to] = [0x80000, 0x90000]
    queue.add([{ bytes: header(VIRTIO_BLK_T_OUT) }, { bytes: pattern(SECTOR), address: from }, { length: 1 }])
    queue.add([{ bytes: header(VIRTIO_BLK_T_IN) }, { length: SECTOR, address: to }, { length: 1 }])
    queue.kick()
    const [write, read] = [disk.next(), disk.next()]
    for (const [call, address] of [
      [write, from],
      [read, to],
    ] as const) {
      const guest = driver.memory.view(address, SECTOR)
      expect(call.buffers).toHaveLength(1)
      expect(call.buffers[0]!.buffer === guest.buffer).toBe(true)
      expect(call.buffers[0]!.byteOffset).toBe(guest.byteOffset)
      expect(call.buffers[0]!.length).toBe(SECTOR)
      call.finish()
    }
    await queue.settled()
  })

  it('of a type that nobody knows is not supported', async () => {
    const { disk, driver } = setUp()
    for (const type of [2, 3, 5, 7, 9, 10, 12, 14, 15, 24, 0x8000_0000, 0xffff_ffff]) {
      const answer = await send(driver, [{ bytes: header(type) }, { length: 8 }, STATUS_PART])
      expect(answer).toEqual({
        used: 0,
        status: VIRTIO_BLK_S_UNSUPP,
        data: new Uint8Array(8).fill(UNTOUCHED),
      })
    }
    expect(disk.calls).toEqual([])
    await expectHealthy(driver)
  })

  it('says no more than what it wrote without a gap', async () => {
    const { driver } = setUp()
    const wide = (bytes: Uint8Array) => send(driver, [{ bytes }, { length: 9 }])
    const write = Buffer.concat([header(VIRTIO_BLK_T_OUT), pattern(SECTOR)])
    for (const bytes of [write, header(VIRTIO_BLK_T_FLUSH), header(77), header(VIRTIO_BLK_T_IN)]) {
      const { used, data } = await wide(bytes)
      expect({ used, data }).toEqual({ used: 0, data: new Uint8Array(8).fill(UNTOUCHED) })
    }
  })
})

describe('discard and write zeroes', () => {
  it('give up and clear the sectors of every segment, one after the other', async () => {
    const { disk, driver } = setUp()
    disk.holds = true
    const queue = driver.queue(0)
    queue.add(segmentParts(VIRTIO_BLK_T_DISCARD, segment(1, 2), segment(63, 1), segment(10, 0)))
    queue.kick()
    expect(disk.calls).toEqual([{ kind: 'discard', offset: SECTOR, length: 2 * SECTOR }])
    disk.next().finish()
    await eventually(() => disk.held.length > 0)
    disk.next().finish()
    await eventually(() => disk.held.length > 0)
    expect(queue.used()).toEqual([])
    disk.next().finish()
    const [chain] = await queue.settled()
    expect(answerIn(chain!)).toMatchObject({ used: 1, status: VIRTIO_BLK_S_OK })
    expect(disk.calls.slice(1)).toEqual([
      { kind: 'discard', offset: 63 * SECTOR, length: SECTOR },
      { kind: 'discard', offset: 10 * SECTOR, length: 0 },
    ])
  })

  it('clear with and without leave to give the space back', async () => {
    const { disk, driver } = setUp()
    const parts = segmentParts(VIRTIO_BLK_T_WRITE_ZEROES, segment(0, 1, UNMAP), segment(2, 3))
    expect(await send(driver, parts)).toMatchObject({ used: 1, status: VIRTIO_BLK_S_OK })
    expect(disk.calls).toEqual([
      { kind: 'writeZeroes', offset: 0, length: SECTOR, mayDiscard: true },
      { kind: 'writeZeroes', offset: 2 * SECTOR, length: 3 * SECTOR, mayDiscard: false },
    ])
    const expected = pattern(DISK_SIZE)
    expected.fill(0, 0, SECTOR)
    expected.fill(0, 2 * SECTOR, 5 * SECTOR)
    expectSame(disk.content, expected)
  })

  it.each([
    ['discard', VIRTIO_BLK_T_DISCARD],
    ['write zeroes', VIRTIO_BLK_T_WRITE_ZEROES],
  ])('take 16 segments, in any shape: %s', async (_, type) => {
    const { disk, driver } = setUp()
    const segments = Array.from({ length: 16 }, (_, i) => segment(2 * i, 1))
    const parts = cutParts(Buffer.concat([header(type), ...segments]), 1, [7, 20, 100], [])
    expect(await send(driver, parts, { indirect: true })).toMatchObject({ status: VIRTIO_BLK_S_OK })
    expect(disk.calls.map(({ offset }) => offset)).toEqual(segments.map((_, i) => 2 * i * SECTOR))
  })

  it('are not supported where the driver has not negotiated them, or the backend cannot', async () => {
    const disk = new TestDisk()
    const both = VIRTIO_BLK_F_DISCARD | VIRTIO_BLK_F_WRITE_ZEROES
    for (const { driver } of [
      driverOf(disk, { without: both }),
      driverOf(withoutOptionalMethods(disk)),
      driverOf(new TestDisk({ readOnly: true })),
    ]) {
      for (const type of [VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES]) {
        expect(await send(driver, segmentParts(type, segment(0, 1)))).toMatchObject({
          used: 1,
          status: VIRTIO_BLK_S_UNSUPP,
        })
      }
    }
    expect(disk.calls).toEqual([])
  })

  it('stop at the first segment that fails', async () => {
    const { disk, device, driver } = setUp()
    disk.holds = true
    const queue = driver.queue(0)
    queue.add(segmentParts(VIRTIO_BLK_T_DISCARD, segment(0, 1), segment(1, 1)))
    queue.kick()
    disk.next().fail(new Error('worn out'))
    const [chain] = await queue.settled()
    expect(answerIn(chain!)).toMatchObject({ used: 1, status: VIRTIO_BLK_S_IOERR })
    expect(disk.calls).toHaveLength(1)
    expect(device.errors).toBe(1)
  })
})

describe('requests under way', () => {
  it('are done in the order in which the backend is', async () => {
    const { disk, driver } = setUp()
    disk.holds = true
    const queue = driver.queue(0)
    const heads = [0, 1, 2, 3].map((sector) => queue.add(inParts(sector, SECTOR)))
    queue.kick()
    expect(disk.held.map(({ offset }) => offset)).toEqual([0, SECTOR, 2 * SECTOR, 3 * SECTOR])
    expect(queue.used()).toEqual([])
    const order = [2, 0, 3, 1]
    const held = disk.held.splice(0)
    const used: UsedChain[] = []
    for (const index of order) {
      held[index]!.finish()
      await eventually(() => {
        used.push(...queue.used())
        return used.at(-1)?.head === heads[index]
      })
    }
    expect(used.map(({ head }) => head)).toEqual(order.map((index) => heads[index]))
    used.forEach((chain, i) => {
      const { data, ...rest } = answerIn(chain)
      expect(rest).toEqual({ used: SECTOR + 1, status: VIRTIO_BLK_S_OK })
      expect(data).toEqual(disk.content.slice(order[i]! * SECTOR, (order[i]! + 1) * SECTOR))
    })
  })

  it('of several queues are of no concern to each other', async () => {
    const { disk, driver } = setUp({ queues: 3 })
    disk.holds = true
    const [first, second, third] = [driver.queue(0), driver.queue(1), driver.queue(2)]
    first.add(outParts(0, pattern(SECTOR, 1)))
    second.add(inParts(8, SECTOR))
    third.add(FLUSH_PARTS)
    for (const queue of [first, second, third]) queue.kick()
    expect(disk.calls.map(({ kind }) => kind)).toEqual(['write', 'read', 'flush'])
    disk.next(1).finish()
    expect(answerIn((await second.settled())[0]!).data).toEqual(
      pattern(DISK_SIZE).slice(8 * SECTOR, 9 * SECTOR),
    )
    expect([...first.used(), ...third.used()]).toEqual([])
    disk.next(1).finish()
    disk.next().finish()
    expect(answerIn((await third.settled())[0]!).status).toBe(VIRTIO_BLK_S_OK)
    expect(answerIn((await first.settled())[0]!).status).toBe(VIRTIO_BLK_S_OK)
  })

  it('fill the queue, and the next one goes on when one is done', async () => {
    const { disk, driver } = setUp({ size: 8 })
    disk.holds = true
    const queue = driver.queue(0)
    for (let sector = 0; sector < 8; sector++) queue.add(inParts(sector, SECTOR), { indirect: true })
    queue.kick()
    expect(disk.held).toHaveLength(8)
    disk.next(5).finish()
    await eventually(() => queue.used().length === 1)
    queue.add(inParts(20, SECTOR), { indirect: true })
    queue.kick()
    await eventually(() => disk.held.length === 8)
    expect(disk.held.at(-1)).toMatchObject({ kind: 'read', offset: 20 * SECTOR })
    for (const call of disk.held.splice(0)) call.finish()
    expect(await queue.settled()).toHaveLength(8)
  })

  it('may be done by promises of a kind of their own', async () => {
    const { disk, driver } = setUp()
    let finish: (() => void) | undefined
    const read = disk.read.bind(disk)
    const thenable = (offset: number, buffers: readonly Uint8Array[]) => ({
      // biome-ignore lint/suspicious/noThenProperty: what it is about
      then(done: () => void) {
        finish = () => {
          read(offset, buffers)
          done()
        }
      },
    })
    disk.read = thenable as unknown as typeof disk.read
    const queue = driver.queue(0)
    queue.add(inParts(0, SECTOR))
    queue.kick()
    await eventually(() => finish !== undefined)
    expect(queue.used()).toEqual([])
    finish!()
    const [chain] = await queue.settled()
    expect(answerIn(chain!)).toMatchObject({ used: SECTOR + 1, status: VIRTIO_BLK_S_OK })
  })

  it('are as many as there are however they come: reads, writes and flushes over two queues', async () => {
    const command = fc.record({
      queue: fc.integer({ min: 0, max: 1 }),
      kind: fc.constantFrom('read', 'write', 'flush'),
      order: fc.nat(),
    })
    await fc.assert(
      fc.asyncProperty(fc.array(command, { minLength: 1, maxLength: 20 }), async (commands) => {
        const { disk, driver } = setUp({ queues: 2 })
        disk.holds = true
        const before = disk.content.slice()
        const requests = commands.map(({ queue, kind, order }, sector) => {
          const parts =
            kind === 'read'
              ? inParts(sector, SECTOR)
              : kind === 'write'
                ? outParts(sector, pattern(SECTOR, 100 + sector))
                : FLUSH_PARTS
          return { queue, kind, order, sector, head: driver.queue(queue).add(parts) }
        })
        driver.queue(0).kick()
        driver.queue(1).kick()
        // By queue: the first one was served first.
        const taken = [...requests].sort((a, b) => a.queue - b.queue)
        const pending = taken.map((request, i) => ({ ...request, call: disk.held[i]! }))
        expect(disk.held.splice(0)).toHaveLength(requests.length)
        const finished = pending.sort((a, b) => a.order - b.order)
        for (const { call } of finished) call.finish()
        const used = [await driver.queue(0).settled(), await driver.queue(1).settled()]
        for (const queue of [0, 1]) {
          expect(used[queue]!.map(({ head }) => head)).toEqual(
            finished.filter((request) => request.queue === queue).map(({ head }) => head),
          )
        }
        const expected = before.slice()
        for (const { queue, kind, sector, head } of requests) {
          const answer = answerIn(used[queue]!.find((chain) => chain.head === head)!)
          expect(answer.status).toBe(VIRTIO_BLK_S_OK)
          if (kind === 'read') {
            expect(answer.data).toEqual(before.slice(sector * SECTOR, (sector + 1) * SECTOR))
          }
          if (kind === 'write') expected.set(pattern(SECTOR, 100 + sector), sector * SECTOR)
        }
        expectSame(disk.content, expected)
      }),
      { numRuns: 50 },
    )
  })
})

describe('without VIRTIO_BLK_F_FLUSH', () => {
  const without = VIRTIO_BLK_F_FLUSH

  it('a write is done only when it has been flushed', async () => {
    const { disk, driver } = setUp({ without })
    disk.holds = true
    const queue = driver.queue(0)
    queue.add(outParts(0, pattern(SECTOR, 2)))
    queue.kick()
    expect(disk.calls.map(({ kind }) => kind)).toEqual(['write'])
    disk.next().finish()
    await eventually(() => disk.held.length > 0)
    expect(disk.calls.map(({ kind }) => kind)).toEqual(['write', 'flush'])
    expect(queue.used()).toEqual([])
    disk.next().finish()
    const [chain] = await queue.settled()
    expect(answerIn(chain!)).toMatchObject({ used: 1, status: VIRTIO_BLK_S_OK })
  })

  it('every change is flushed, and nothing else', async () => {
    const { disk, driver } = setUp({ without })
    await send(driver, outParts(0, pattern(SECTOR)))
    await send(driver, segmentParts(VIRTIO_BLK_T_WRITE_ZEROES, segment(0, 1), segment(1, 1)))
    await send(driver, segmentParts(VIRTIO_BLK_T_DISCARD, segment(0, 1)))
    await send(driver, inParts(0, SECTOR))
    const kinds = ['write', 'flush', 'writeZeroes', 'writeZeroes', 'flush', 'discard', 'flush', 'read']
    expect(disk.calls.map(({ kind }) => kind)).toEqual(kinds)
  })

  it('a write whose flush fails has failed', async () => {
    const { disk, device, driver } = setUp({ without })
    disk.onCall = ({ kind }) => {
      if (kind === 'flush') throw new Error('no space left')
    }
    expect(await send(driver, outParts(0, pattern(SECTOR)))).toMatchObject({ status: VIRTIO_BLK_S_IOERR })
    expect(device.errors).toBe(1)
  })

  it('a device that was made again from its state flushes, too', async () => {
    const { disk, driver } = setUp({ without })
    driver.transport.restoreState(structuredClone(driver.transport.saveState()))
    expect(await send(driver, outParts(0, pattern(SECTOR)))).toMatchObject({ status: VIRTIO_BLK_S_OK })
    expect(disk.calls.map(({ kind }) => kind)).toEqual(['write', 'flush'])
  })

  it('with it, again, a write is not flushed', async () => {
    const { disk, driver } = setUp({ without })
    await driver.reset()
    driver.initialize()
    expect(await send(driver, outParts(0, pattern(SECTOR)))).toMatchObject({ status: VIRTIO_BLK_S_OK })
    expect(disk.calls.map(({ kind }) => kind)).toEqual(['write'])
  })
})

describe('a backend that fails', () => {
  const failure = new Error('Input/output error')
  const kinds: [string, readonly RequestPart[], number][] = [
    ['read', inParts(0, SECTOR), 0],
    ['write', outParts(0, pattern(SECTOR)), 1],
    ['flush', FLUSH_PARTS, 1],
    ['discard', segmentParts(VIRTIO_BLK_T_DISCARD, segment(0, 1)), 1],
    ['write zeroes', segmentParts(VIRTIO_BLK_T_WRITE_ZEROES, segment(0, 1)), 1],
  ]

  it.each(kinds)('by throwing gives the guest an error: %s', async (_, parts, used) => {
    const { disk, device, driver } = setUp()
    disk.onCall = () => {
      throw failure
    }
    expect(await send(driver, parts)).toMatchObject({ used, status: VIRTIO_BLK_S_IOERR })
    expect(device).toMatchObject({ errors: 1, lastError: failure })
    disk.onCall = undefined
    await expectHealthy(driver)
    expect(device.errors).toBe(1)
  })

  it.each(kinds)('by rejecting gives the guest an error: %s', async (_, parts, used) => {
    const { disk, device, driver } = setUp()
    disk.holds = true
    const queue = driver.queue(0)
    queue.add(parts)
    queue.kick()
    disk.next().fail(failure)
    const [chain] = await queue.settled()
    expect(answerIn(chain!)).toMatchObject({ used, status: VIRTIO_BLK_S_IOERR })
    expect(device).toMatchObject({ errors: 1, lastError: failure })
    disk.holds = false
    await expectHealthy(driver)
  })

  it('is not blamed for what the guest did wrong', async () => {
    const { device, driver } = setUp()
    expect(await send(driver, inParts(SECTORS, SECTOR))).toMatchObject({ status: VIRTIO_BLK_S_IOERR })
    expect(device).toMatchObject({ errors: 0, lastError: undefined })
  })
})

describe('hostile input 17: requests beyond the disk, or beyond reason', () => {
  it.each<[string, number | bigint, number]>([
    ['the first sector behind the disk', SECTORS, SECTOR],
    ['the last sector and one more', SECTORS - 1, 2 * SECTOR],
    ['more than the whole disk', 0, DISK_SIZE + SECTOR],
    ['a sector that is 2^55: 2^64 in bytes', 2n ** 55n, SECTOR],
    ['a sector that is 2^55 + 1: 512 in bytes of 64 bits', 2n ** 55n + 1n, SECTOR],
    ['sector 2^32', 2n ** 32n, SECTOR],
    ['sector 2^53', 2n ** 53n, SECTOR],
    ['sector 2^63', 2n ** 63n, SECTOR],
    ['sector 2^64 - 1', 2n ** 64n - 1n, SECTOR],
    ['sector 2^64 - 1 and two of them: the sum is 1', 2n ** 64n - 1n, 2 * SECTOR],
    ['half a sector', 0, SECTOR / 2],
    ['one byte', 0, 1],
    ['a sector and a byte', 0, SECTOR + 1],
    ['no byte, from behind the disk on', SECTORS + 1, 0],
  ])('%s can be neither read nor written', async (_, sector, length) => {
    const { disk, driver } = setUp()
    expect(await send(driver, inParts(sector, length))).toEqual({
      used: length === 0 ? 1 : 0,
      status: VIRTIO_BLK_S_IOERR,
      data: new Uint8Array(length).fill(UNTOUCHED),
    })
    expect(await send(driver, outParts(sector, pattern(length)))).toMatchObject({
      used: 1,
      status: VIRTIO_BLK_S_IOERR,
    })
    expect(disk.calls).toEqual([])
    expectSame(disk.content, pattern(DISK_SIZE))
    await expectHealthy(driver)
  })

  it('more than 32 MiB is refused, whatever the size of the disk', async () => {
    const disk = new TestDisk({ size: 2 ** 40 })
    const { driver } = driverOf(disk)
    const queue = driver.queue(0)
    // 32 MiB and a sector, of which each MiB is the same.
    const room = Array.from({ length: 32 }, () => ({ length: MIB, address: MIB }))
    const rest = { length: SECTOR + 1, address: MIB }
    const read = await driver.request(0, [{ bytes: header(VIRTIO_BLK_T_IN) }, ...room, rest])
    expect(read.length).toBe(0)
    expect(read.buffers.at(-1)!.at(-1)).toBe(VIRTIO_BLK_S_IOERR)
    const chunks = Array.from({ length: 33 }, () => ({ address: MIB, length: MIB }))
    driver.memory.write(0x80000, header(VIRTIO_BLK_T_OUT))
    const descriptors = [
      { address: 0x80000, length: HEADER_SIZE },
      ...chunks,
      { address: 0x90000, length: 1, flags: VIRTQ_DESC_F_WRITE },
    ]
    queue.addRaw(linked(descriptors))
    driver.notify(0)
    expect(queue.usedEntry(1)).toEqual({ id: 0, length: 1 })
    expect(driver.memory.readUint8(0x90000)).toBe(VIRTIO_BLK_S_IOERR)
    expect(disk.calls).toEqual([])
  })

  it('2 GiB in 1024 descriptors of the same memory are refused without being looked at', async () => {
    const { disk, driver } = setUp()
    const table = encode(
      linked(
        Array.from({ length: 1024 }, () => ({ address: 0, length: 2 * MIB, flags: VIRTQ_DESC_F_WRITE })),
      ),
    )
    const at = 2 ** 32
    driver.memory.write(at, table)
    // No header, and 2 GiB to be written: the status is the last byte of all.
    driver.queue(0).addRaw([{ address: at, length: table.length, flags: 4 }])
    driver.notify(0)
    expect(driver.queue(0).usedEntry(0)).toEqual({ id: 0, length: 0 })
    expect(driver.memory.readUint8(2 * MIB - 1)).toBe(VIRTIO_BLK_S_IOERR)
    expect(disk.calls).toEqual([])
  })

  it.each([0, 1, 4, 8, 15])('a header of %i bytes is an error', async (length) => {
    const { disk, device, driver } = setUp()
    for (const type of [VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID]) {
      const parts = [{ bytes: header(type).subarray(0, length) }, { length: SECTOR }, STATUS_PART]
      expect(await send(driver, parts)).toEqual({
        used: 0,
        status: VIRTIO_BLK_S_IOERR,
        data: new Uint8Array(SECTOR).fill(UNTOUCHED),
      })
    }
    expect(disk.calls).toEqual([])
    expect(device.errors).toBe(0)
    await expectHealthy(driver)
  })

  it('a request without room for a status is not carried out', async () => {
    const { disk, driver } = setUp()
    const write = [{ bytes: header(VIRTIO_BLK_T_OUT) }, { bytes: pattern(SECTOR, 1) }]
    for (const parts of [write, [{ bytes: header(VIRTIO_BLK_T_FLUSH) }, { length: 0 }]]) {
      expect(await driver.request(0, parts)).toMatchObject({ length: 0 })
    }
    expect(disk.calls).toEqual([])
    await expectHealthy(driver)
  })

  it('a disk to be read only is never written', async () => {
    const { disk, driver } = setUp({ readOnly: true })
    const refused = [
      outParts(0, pattern(SECTOR, 1)),
      outParts(0, new Uint8Array(0)),
      segmentParts(VIRTIO_BLK_T_DISCARD, segment(0, 1)),
      segmentParts(VIRTIO_BLK_T_WRITE_ZEROES, segment(0, 1)),
    ]
    for (const parts of refused) expect((await send(driver, parts)).status).not.toBe(VIRTIO_BLK_S_OK)
    expect(await send(driver, FLUSH_PARTS)).toMatchObject({ status: VIRTIO_BLK_S_OK })
    expect(disk.calls).toEqual([])
    await expectHealthy(driver)
  })

  it('a driver that takes no notice of VIRTIO_BLK_F_RO writes as little', async () => {
    const { disk, driver } = setUp({ readOnly: true, without: VIRTIO_BLK_F_RO | VIRTIO_BLK_F_FLUSH })
    expect(await send(driver, outParts(0, pattern(SECTOR, 1)))).toMatchObject({ status: VIRTIO_BLK_S_IOERR })
    expect(disk.calls).toEqual([])
  })

  const ERROR = VIRTIO_BLK_S_IOERR
  it.each<[string, Uint8Array[], number]>([
    ['no segment', [], ERROR],
    ['17 segments', Array.from({ length: 17 }, (_, i) => segment(i, 1)), ERROR],
    ['half a segment', [segment(0, 1).subarray(0, 8)], ERROR],
    ['a segment and a byte', [segment(0, 1), Uint8Array.of(0)], ERROR],
    ['0xffffffff sectors', [segment(0, 0xffff_ffff)], ERROR],
    ['as many sectors as there are and one', [segment(0, SECTORS + 1)], ERROR],
    ['the last sector and one', [segment(SECTORS - 1, 2)], ERROR],
    ['no sector, from behind the disk on', [segment(SECTORS + 1, 0)], ERROR],
    ['sector 2^55, which is 0 in bytes of 64 bits', [segment(2n ** 55n, 1)], ERROR],
    ['sector 2^64 - 1', [segment(2n ** 64n - 1n, 1)], ERROR],
    ['sectors whose end is 0 in 64 bits', [segment(2n ** 64n - 1n, 1), segment(2n ** 64n - 8n, 8)], ERROR],
    ['one good segment before a bad one', [segment(0, 1), segment(SECTORS, 1)], ERROR],
    ['an unknown flag', [segment(0, 1, 2)], VIRTIO_BLK_S_UNSUPP],
    ['the highest flag', [segment(0, 1), segment(1, 1, 0x8000_0000)], VIRTIO_BLK_S_UNSUPP],
    ['an unknown flag behind a bad sector', [segment(SECTORS, 1), segment(0, 1, 4)], VIRTIO_BLK_S_UNSUPP],
  ])('discard and write zeroes change nothing for %s', async (_, segments, status) => {
    const { disk, driver } = setUp()
    for (const type of [VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES]) {
      expect(await send(driver, segmentParts(type, ...segments))).toMatchObject({ used: 1, status })
    }
    expect(disk.calls).toEqual([])
    await expectHealthy(driver)
  })

  it('discard does not know the flag to unmap', async () => {
    const { disk, driver } = setUp()
    for (const sector of [0, SECTORS]) {
      const parts = segmentParts(VIRTIO_BLK_T_DISCARD, segment(0, 1), segment(sector, 1, UNMAP))
      expect(await send(driver, parts)).toMatchObject({ status: VIRTIO_BLK_S_UNSUPP })
    }
    expect(disk.calls).toEqual([])
  })

  it('a segment has no more sectors than the configuration space allows', async () => {
    const disk = new TestDisk({ size: 2 ** 40 })
    const { driver } = driverOf(disk)
    const limits = new DataView(driver.readConfig(0, 60).buffer)
    for (const [type, limit] of [
      [VIRTIO_BLK_T_DISCARD, limits.getUint32(36, true)],
      [VIRTIO_BLK_T_WRITE_ZEROES, limits.getUint32(48, true)],
    ] as const) {
      expect(await send(driver, segmentParts(type, segment(0, limit + 1)))).toMatchObject({ status: ERROR })
      expect(disk.calls).toEqual([])
      expect(await send(driver, segmentParts(type, segment(8, limit)))).toMatchObject({ status: 0 })
      expect(disk.calls.splice(0)).toMatchObject([{ offset: 8 * SECTOR, length: limit * SECTOR }])
    }
  })
})

describe('hostile input 11: requests that are changed under way', () => {
  /** Everything of chain 0 that the guest can still reach. */
  function spoil(driver: VirtioDriver, headerAddress: number, length: number) {
    driver.memory.fill(headerAddress, length, 0xff)
    driver.queue(0).addRaw(
      linked([
        { address: 0, length: 1 },
        { address: 8, length: 2 },
        { address: 9, length: 1 },
      ]),
    )
  }

  it('a header that is changed once the write has begun changes nothing', async () => {
    const { disk, driver } = setUp()
    disk.holds = true
    const [at, status] = [0x80000, 0x90000]
    const bytes = pattern(SECTOR, 4)
    const queue = driver.queue(0)
    queue.add([
      { bytes: header(VIRTIO_BLK_T_OUT, 5), address: at },
      { bytes, address: at + HEADER_SIZE },
      { length: 1, address: status },
    ])
    driver.memory.writeUint8(status, UNTOUCHED)
    disk.onCall = () => {
      driver.memory.write(at, header(VIRTIO_BLK_T_IN, 2n ** 64n - 1n))
      // The chain as well: another length, and no room for the status.
      queue.writeDescriptor(1, { address: 0, length: 3 })
      queue.writeDescriptor(2, { address: 0, length: 0 })
    }
    queue.kick()
    expect(disk.calls).toEqual([{ kind: 'write', offset: 5 * SECTOR, length: SECTOR }])
    disk.next().finish()
    const [chain] = await queue.settled()
    expect(chain!.length).toBe(1)
    expect(driver.memory.readUint8(status)).toBe(VIRTIO_BLK_S_OK)
    const expected = pattern(DISK_SIZE)
    expected.set(bytes, 5 * SECTOR)
    expectSame(disk.content, expected)
  })

  it('a read whose type is changed is answered as a read', async () => {
    const { disk, driver } = setUp()
    disk.onCall = () => spoil(driver, 0x80000, HEADER_SIZE)
    const queue = driver.queue(0)
    queue.add([
      { bytes: header(VIRTIO_BLK_T_IN, 5), address: 0x80000 },
      { length: SECTOR, address: 0x90000 },
      { length: 1, address: 0xa0000 },
    ])
    queue.kick()
    expect(queue.usedEntry(0)).toEqual({ id: 0, length: SECTOR + 1 })
    expect(driver.memory.readUint8(0xa0000)).toBe(VIRTIO_BLK_S_OK)
    expect(driver.memory.read(0x90000, SECTOR)).toEqual(disk.content.slice(5 * SECTOR, 6 * SECTOR))
    expect(disk.calls).toEqual([{ kind: 'read', offset: 5 * SECTOR, length: SECTOR }])
  })

  it.each([
    ['discard', VIRTIO_BLK_T_DISCARD],
    ['write zeroes', VIRTIO_BLK_T_WRITE_ZEROES],
  ])(
    'segments that are changed while the first is under way stay as they were checked: %s',
    async (_, type) => {
      const { disk, driver } = setUp()
      disk.holds = true
      const at = 0x80000
      const segments = Buffer.concat([segment(1, 1), segment(3, 1)])
      const queue = driver.queue(0)
      queue.add([{ bytes: header(type), address: at }, { bytes: segments, address: at + 16 }, STATUS_PART])
      queue.kick()
      driver.memory.fill(at, 16 + segments.length, 0xff)
      disk.next().finish()
      await eventually(() => disk.held.length > 0)
      disk.next().finish()
      const [chain] = await queue.settled()
      expect(answerIn(chain!)).toMatchObject({ used: 1, status: VIRTIO_BLK_S_OK })
      expect(disk.calls.map(({ offset, length }) => [offset, length])).toEqual([
        [SECTOR, SECTOR],
        [3 * SECTOR, SECTOR],
      ])
    },
  )
})

describe('hostile input 12: requests in wrong directions', () => {
  it('data in the wrong direction is not touched', async () => {
    const { disk, driver } = setUp()
    // To be read from the disk into what the device may only read: so there is no room for anything.
    const into = [{ bytes: header(VIRTIO_BLK_T_IN) }, { bytes: pattern(SECTOR, 1) }, STATUS_PART]
    expect(await send(driver, into)).toMatchObject({ used: 1, status: VIRTIO_BLK_S_OK })
    // To be written to the disk from what the device may only write: so there is nothing.
    const out = [{ bytes: header(VIRTIO_BLK_T_OUT) }, { length: SECTOR }, STATUS_PART]
    expect(await send(driver, out)).toEqual({
      used: 0,
      status: VIRTIO_BLK_S_OK,
      data: new Uint8Array(SECTOR).fill(UNTOUCHED),
    })
    expect(disk.calls.every(({ length }) => length === 0)).toBe(true)
    expectSame(disk.content, pattern(DISK_SIZE))
    await expectHealthy(driver)
  })

  it('a header that is there to be written is none', async () => {
    const { disk, driver } = setUp()
    expect(await send(driver, [{ length: HEADER_SIZE }, { length: SECTOR }, STATUS_PART])).toMatchObject({
      used: 0,
      status: VIRTIO_BLK_S_IOERR,
    })
    expect(disk.calls).toEqual([])
    await expectHealthy(driver)
  })

  it('something to be read behind the status makes the device want a reset', async () => {
    const { disk, driver } = setUp()
    driver.queue(0).add([{ bytes: header(VIRTIO_BLK_T_OUT) }, STATUS_PART, { bytes: pattern(SECTOR) }])
    driver.queue(0).kick()
    expect(driver.status & STATUS.DEVICE_NEEDS_RESET).toBe(STATUS.DEVICE_NEEDS_RESET)
    expect(disk.calls).toEqual([])
    await driver.reset()
    driver.initialize()
    await expectHealthy(driver)
  })

  it('a read into rings and its own header harms nobody but the guest', async () => {
    const { driver } = setUp()
    const { layout } = driver.queue(0)
    driver.queue(0).addRaw(
      linked([
        { address: layout.descriptors, length: HEADER_SIZE },
        { address: layout.descriptors, length: 1, flags: VIRTQ_DESC_F_WRITE },
        { address: layout.driver, length: 2 * SECTOR, flags: VIRTQ_DESC_F_WRITE },
      ]),
    )
    driver.notify(0)
    expect(driver.failures).toEqual([])
    await driver.reset()
    driver.initialize()
    await expectHealthy(driver)
  })
})

describe('hostile input 13: requests that are refused', () => {
  it('give their descriptors back, however many there are', async () => {
    const { disk, driver } = setUp({ size: 4 })
    for (let round = 0; round < 100; round++) {
      await send(driver, inParts(2n ** 63n, SECTOR))
      await send(driver, [{ bytes: header(VIRTIO_BLK_T_OUT).subarray(0, 3) }, STATUS_PART])
      await driver.request(0, [{ bytes: header(99) }])
    }
    expect(driver.queue(0).freeDescriptors).toBe(4)
    expect(disk.calls).toEqual([])
    await expectHealthy(driver)
  })
})

describe('hostile input 14: submissions without end', () => {
  it('of one chain are under way no more often than there are descriptors', async () => {
    const { disk, driver } = setUp({ size: 8 })
    disk.holds = true
    const queue = driver.queue(0)
    driver.memory.write(0x80000, header(VIRTIO_BLK_T_IN))
    queue.addRaw(
      linked([
        { address: 0x80000, length: HEADER_SIZE },
        { address: 0x90000, length: SECTOR + 1, flags: VIRTQ_DESC_F_WRITE },
      ]),
    )
    // As many again as the device has taken, of which none was used: the ring has room for that.
    for (let i = 1; i < 16; i++) {
      if (i === 8) driver.notify(0)
      queue.makeAvailable(0)
    }
    for (let round = 1; round <= 200; round++) {
      for (let i = 0; i < 5; i++) driver.notify(0)
      expect(disk.held).toHaveLength(8)
      disk.next(round % 8).finish()
      await eventually(() => queue.usedIdx === round)
      queue.makeAvailable(0)
    }
    await eventually(() => {
      for (const call of disk.held.splice(0)) call.finish()
      return queue.usedIdx === queue.nextAvail
    })
    expect(driver.failures).toEqual([])
    await driver.reset()
    disk.holds = false
    driver.initialize()
    await expectHealthy(driver)
  })
})

describe('hostile input 9: a reset with requests under way', () => {
  it('is over when they are, and the rings stay as they were', async () => {
    const { disk, driver } = setUp()
    disk.holds = true
    const queue = driver.queue(0)
    queue.add(inParts(0, SECTOR))
    queue.add(outParts(4, pattern(SECTOR, 8)))
    queue.kick()
    const { interrupts } = driver
    driver.status = 0
    expect(driver.status).not.toBe(0)
    const ringSize = 6 + 8 * queue.layout.size
    const ring = driver.memory.read(queue.layout.device, ringSize)
    disk.next().finish()
    await new Promise(setImmediate)
    expect(driver.status).not.toBe(0)
    disk.next().fail(new Error('too late'))
    await eventually(() => driver.status === 0)
    expect(driver.memory.read(queue.layout.device, ringSize)).toEqual(ring)
    expect(driver.interrupts).toBe(interrupts)
    disk.holds = false
    driver.initialize()
    await expectHealthy(driver)
  })

  it('waits for all segments of a discard', async () => {
    const { disk, driver } = setUp()
    disk.holds = true
    driver.queue(0).add(segmentParts(VIRTIO_BLK_T_DISCARD, segment(0, 1), segment(1, 1)))
    driver.queue(0).kick()
    driver.status = 0
    disk.next().finish()
    await eventually(() => disk.held.length > 0)
    expect(driver.status).not.toBe(0)
    disk.next().finish()
    await eventually(() => driver.status === 0)
    expect(disk.calls).toHaveLength(2)
  })
})

describe('random requests', () => {
  const sector = fc.oneof(
    { weight: 8, arbitrary: fc.bigInt(0n, BigInt(SECTORS)) },
    { weight: 1, arbitrary: fc.bigInt(0n, 2n ** 64n - 1n) },
  )
  const sectors = fc.integer({ min: 0, max: 12 })
  const cuts = fc.array(fc.nat(700), { maxLength: 6 })
  const request = fc.record({
    kind: fc.constantFrom('read', 'write', 'zero', 'discard', 'flush'),
    sector,
    sectors,
    seed: fc.nat(255),
    mayDiscard: fc.boolean(),
    indirect: fc.boolean(),
    readableCuts: cuts,
    writableCuts: cuts,
  })

  it.each([
    ['in memory', () => new MemoryDisk({ bytes: pattern(DISK_SIZE) })],
    ['at once', () => new TestDisk()],
  ])('read what was written, from a disk %s', async (_, makeDisk) => {
    await fc.assert(
      fc.asyncProperty(fc.array(request, { maxLength: 40 }), async (requests) => {
        // The border between two stretches of RAM is in the midst of what is allocated.
        const { driver, device } = driverOf(makeDisk(), {
          driverOptions: { heap: { start: MIB - 0x1000, end: 2 * MIB } },
        })
        const content = pattern(DISK_SIZE)
        /** Discarded bytes read as anything. */
        const known = new Uint8Array(DISK_SIZE).fill(1)
        for (const { kind, sector, sectors, seed, mayDiscard, indirect, ...cuts } of requests) {
          const length = sectors * SECTOR
          const isWithin = sector + BigInt(sectors) <= BigInt(SECTORS)
          const start = isWithin ? Number(sector) * SECTOR : 0
          const bytes = pattern(length, seed)
          const readable = Buffer.concat(
            kind === 'read'
              ? [header(VIRTIO_BLK_T_IN, sector)]
              : kind === 'write'
                ? [header(VIRTIO_BLK_T_OUT, sector), bytes]
                : kind === 'flush'
                  ? [header(VIRTIO_BLK_T_FLUSH, sector)]
                  : kind === 'zero'
                    ? [header(VIRTIO_BLK_T_WRITE_ZEROES), segment(sector, sectors, mayDiscard ? UNMAP : 0)]
                    : [header(VIRTIO_BLK_T_DISCARD), segment(sector, sectors)],
          )
          const writable = kind === 'read' ? length + 1 : 1
          const parts = cutParts(
            readable,
            writable,
            fitting(cuts.readableCuts, readable.length),
            fitting(cuts.writableCuts, writable),
          )
          const { used, status, data } = await send(driver, parts, { indirect })
          const succeeds = isWithin || kind === 'flush'
          expect(status).toBe(succeeds ? VIRTIO_BLK_S_OK : VIRTIO_BLK_S_IOERR)
          expect(used).toBe(succeeds || writable === 1 ? writable : 0)
          if (!succeeds || kind === 'flush') continue
          if (kind === 'read') {
            const isSame = data.every((byte, i) => known[start + i] === 0 || byte === content[start + i])
            expect(isSame).toBe(true)
          } else {
            content.set(kind === 'write' ? bytes : new Uint8Array(length), start)
            known.fill(kind === 'discard' ? 0 : 1, start, start + length)
          }
        }
        const { data } = await send(driver, inParts(0, DISK_SIZE))
        const knownOnly = (bytes: Uint8Array) => bytes.map((byte, i) => byte * known[i]!)
        expectSame(knownOnly(data), knownOnly(content))
        expect(device.errors).toBe(0)
        expect(driver.failures).toEqual([])
      }),
      { numRuns: 60 },
    )
  })

  it('of any shape never harm the host, and nothing outside of them changes', async () => {
    const hostile = fc.record({
      type: fc.oneof(fc.constantFrom(0, 1, 4, 8, 11, 13), fc.integer({ min: 0, max: 20 })),
      sector: fc.oneof(fc.bigInt(0n, 70n), fc.bigInt(0n, 2n ** 64n - 1n)),
      headerLength: fc.oneof({ weight: 4, arbitrary: fc.constant(16) }, { weight: 1, arbitrary: fc.nat(20) }),
      payload: fc.uint8Array({ maxLength: 600 }),
      writable: fc.array(fc.nat(1100), { maxLength: 4 }),
      indirect: fc.boolean(),
    })
    await fc.assert(
      fc.asyncProperty(fc.array(hostile, { maxLength: 20 }), async (requests) => {
        const { disk, driver } = setUp()
        disk.onCall = ({ offset = 0, length = 0 }) => {
          expect(offset % SECTOR).toBe(0)
          expect(length % SECTOR).toBe(0)
          expect(offset >= 0 && length >= 0 && offset + length <= DISK_SIZE).toBe(true)
        }
        // Everything behind what is allocated here is the guest's, and no part of a request.
        const bystander = driver.memory.read(0x80000, 0x80000)
        for (const { type, sector, headerLength, payload, writable, indirect } of requests) {
          const bytes = Buffer.concat([header(type, sector), new Uint8Array(4)]).subarray(0, headerLength)
          const parts = [{ bytes }, { bytes: payload }, ...writable.map((length) => ({ length }))]
          const chain = await driver.request(0, parts, { indirect })
          expect(chain.length).toBeLessThanOrEqual(lengthOf(chain.buffers))
        }
        expect(Buffer.compare(driver.memory.read(0x80000, 0x80000), bystander)).toBe(0)
        expect(driver.transport.function.statistics).toMatchObject({ requests: requests.length })
        disk.onCall = undefined
        await expectHealthy(driver)
      }),
      { numRuns: 100 },
    )
  })
})

/** Lengths of parts, as long as they fit into `total`. */
function fitting(lengths: readonly number[], total: number): number[] {
  const fit: number[] = []
  let left = total
  for (const length of lengths) {
    if (length > left) break
    fit.push(length)
    left -= length
  }
  return fit
}
