import { truncateSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import fc from 'fast-check'
import { expect, onTestFinished } from 'vitest'
import { type BlockBackend, SECTOR_SIZE } from '../../src/virtio/block-backend.js'
import { makeFolder } from '../helpers/folders.js'

/** An image with these bytes, or of so many zeros. */
export function makeImage(content: Uint8Array | number, folder = makeFolder()): string {
  const path = join(folder, 'disk.img')
  writeFileSync(path, typeof content === 'number' ? '' : content)
  if (typeof content === 'number') truncateSync(path, content)
  return path
}

/** Closes it after the test, should that not have done so. */
export function closing<T extends BlockBackend>(disk: T): T {
  onTestFinished(() => disk.close().catch(() => undefined))
  return disk
}

/** Bytes that tell where they are from. */
export function pattern(length: number, seed = 1): Uint8Array {
  const bytes = new Uint8Array(length)
  for (let i = 0, state = seed; i < length; i++) {
    state = (Math.imul(state, 1103515245) + 12345) >>> 0
    bytes[i] = state >>> 24
  }
  return bytes
}

export async function readBytes(disk: BlockBackend, offset: number, length: number): Promise<Uint8Array> {
  // Not zeros, so that a read that leaves bytes alone is seen.
  const bytes = new Uint8Array(length).fill(0xa5)
  await disk.read(offset, [bytes])
  return bytes
}

/** Where two lists of bytes differ first; undefined if they do not. To compare them with `toEqual` takes seconds a MiB. */
export function difference(actual: Uint8Array, expected: Uint8Array): string | undefined {
  if (Buffer.compare(actual, expected) === 0) return undefined
  if (actual.length !== expected.length) return `${actual.length} bytes, not ${expected.length}`
  const index = actual.findIndex((byte, i) => byte !== expected[i])
  return `at ${index}: ${actual[index]}, not ${expected[index]}`
}

/** An error with this code, and a message that says this. */
export const withCode = (code: string, message = /./) =>
  expect.objectContaining({ name: 'NodevisorError', code, message: expect.stringMatching(message) })

interface Part {
  readonly sector: number
  readonly count: number
}

type Action =
  | (Part & { readonly kind: 'read' | 'discard'; readonly cuts: readonly number[] })
  | (Part & { readonly kind: 'write'; readonly cuts: readonly number[]; readonly seed: number })
  | (Part & { readonly kind: 'zero'; readonly mayDiscard: boolean })
  | { readonly kind: 'flush' }
  | { readonly kind: 'reopen' }

/** Random requests to so many sectors. */
export function actions(sectors: number, maxLength = 40): fc.Arbitrary<Action[]> {
  const part = fc
    .tuple(fc.nat(sectors - 1), fc.integer({ min: 1, max: 24 }))
    .map(([sector, count]) => ({ sector, count: Math.min(count, sectors - sector) }))
  const cuts = fc.array(fc.nat(24 * SECTOR_SIZE), { maxLength: 5 })
  const action: fc.Arbitrary<Action> = fc.oneof(
    {
      weight: 6,
      arbitrary: fc
        .record({ part, cuts, seed: fc.integer() })
        .map((r) => ({ kind: 'write' as const, ...r, ...r.part })),
    },
    {
      weight: 3,
      arbitrary: fc.record({ part, cuts }).map((r) => ({ kind: 'read' as const, ...r, ...r.part })),
    },
    { weight: 1, arbitrary: part.map((p) => ({ kind: 'discard' as const, cuts: [], ...p })) },
    {
      weight: 2,
      arbitrary: fc
        .record({ part, mayDiscard: fc.boolean() })
        .map((r) => ({ kind: 'zero' as const, mayDiscard: r.mayDiscard, ...r.part })),
    },
    { weight: 1, arbitrary: fc.constant({ kind: 'flush' as const }) },
    { weight: 1, arbitrary: fc.constant({ kind: 'reopen' as const }) },
  )
  return fc.array(action, { maxLength })
}

/** Views of the same bytes, cut at these places; some are empty. */
function split(bytes: Uint8Array, cuts: readonly number[]): Uint8Array[] {
  const places = [0, ...cuts.map((cut) => Math.min(cut, bytes.length)).sort((a, b) => a - b), bytes.length]
  return places.slice(1).map((place, i) => bytes.subarray(places[i]!, place))
}

/** What a disk may do with what is discarded. */
export type DiscardRule = (before: Uint8Array, offset: number) => readonly Uint8Array[]

/** All of it becomes zero, or nothing changes. */
export const zeroOrNothing: DiscardRule = (before) => [before, new Uint8Array(before.length)]

/** Whole clusters become zero, wherever they are; the rest stays. */
export function wholeClusters(clusterSize: number, diskSize: number): DiscardRule {
  return (before, offset) => {
    const after = before.slice()
    const end = offset + before.length
    const stop = end === diskSize ? end : end - (end % clusterSize)
    const start = Math.ceil(offset / clusterSize) * clusterSize
    if (start < stop) after.fill(0, start - offset, stop - offset)
    return [after]
  }
}

interface ModelOptions {
  /** Opens the disk; called again after it was closed. */
  open(): BlockBackend | Promise<BlockBackend>
  /** What is there first, from `start` on. */
  readonly content: Uint8Array
  /** The part of the disk that the requests are about. */
  readonly start?: number
  readonly discardRule: DiscardRule
  /** What was closed is gone. */
  readonly forgets?: boolean
}

/**
 * Does what the actions say to a disk and to plain bytes, and compares. Requests are under way together as long as
 * they do not overlap.
 */
export async function compareWithBytes(options: ModelOptions, list: readonly Action[]): Promise<void> {
  const { start = 0, discardRule } = options
  const model = options.content.slice()
  let disk = await options.open()
  let pending: { readonly from: number; readonly to: number; readonly done: Promise<void> }[] = []
  const settle = async () => {
    const all = pending
    pending = []
    await Promise.all(all.map(({ done }) => done))
  }
  try {
    for (const action of list) {
      if (action.kind === 'flush') {
        pending.push({ from: 0, to: 0, done: Promise.resolve(disk.flush()) })
      } else if (action.kind === 'reopen') {
        if (options.forgets) continue
        await settle()
        await disk.close()
        disk = await options.open()
      } else {
        const from = action.sector * SECTOR_SIZE
        const to = from + action.count * SECTOR_SIZE
        if (pending.some((other) => other.from < to && from < other.to)) await settle()
        if (action.kind === 'discard') await settle()
        pending.push({ from, to, done: perform(disk, model, start, from, to, action, discardRule) })
      }
    }
    await settle()
    expect(difference(await readBytes(disk, start, model.length), model)).toBeUndefined()
  } finally {
    await disk.close()
  }
}

async function perform(
  disk: BlockBackend,
  model: Uint8Array,
  start: number,
  from: number,
  to: number,
  action: Exclude<Action, { kind: 'flush' | 'reopen' }>,
  discardRule: DiscardRule,
): Promise<void> {
  const part = model.subarray(from, to)
  if (action.kind === 'read') {
    const bytes = new Uint8Array(part.length).fill(0xa5)
    await disk.read(start + from, split(bytes, action.cuts))
    expect(difference(bytes, part)).toBeUndefined()
  } else if (action.kind !== 'discard') {
    await performChange(disk, model, action, start)
  } else {
    await disk.discard!(start + from, part.length)
    const after = await readBytes(disk, start + from, part.length)
    const allowed = discardRule(part.slice(), start + from)
    expect(allowed.map((bytes) => difference(after, bytes))).toContain(undefined)
    part.set(after)
  }
}

/** Expects a closed disk to refuse every kind of request. */
export async function expectClosed(
  disk: BlockBackend & Required<Pick<BlockBackend, 'discard' | 'writeZeroes'>>,
): Promise<void> {
  const buffers = [new Uint8Array(512)]
  await expect(disk.read(0, buffers)).rejects.toThrow(withCode('ERR_CLOSED'))
  await expect(disk.write(0, buffers)).rejects.toThrow(withCode('ERR_CLOSED'))
  await expect(disk.flush()).rejects.toThrow(withCode('ERR_CLOSED'))
  await expect(disk.discard(0, 512)).rejects.toThrow(withCode('ERR_CLOSED'))
  await expect(disk.writeZeroes(0, 512, true)).rejects.toThrow(withCode('ERR_CLOSED'))
}

/** Does a change to a disk, from `start` on, and to plain bytes; a discard has to make zeros. Reads change nothing. */
export async function performChange(
  disk: BlockBackend,
  model: Uint8Array,
  action: Exclude<Action, { kind: 'flush' | 'reopen' }>,
  start = 0,
): Promise<void> {
  const from = action.sector * SECTOR_SIZE
  const part = model.subarray(from, from + action.count * SECTOR_SIZE)
  if (action.kind === 'write') {
    part.set(pattern(part.length, action.seed))
    await disk.write(start + from, split(part.slice(), action.cuts))
  } else if (action.kind === 'zero') {
    part.fill(0)
    await disk.writeZeroes!(start + from, part.length, action.mayDiscard)
  } else if (action.kind === 'discard') {
    part.fill(0)
    await disk.discard!(start + from, part.length)
  }
}

/** A disk in memory whose requests take some turns of the event loop, and do one half before and one after. */
export class SlowDisk implements BlockBackend {
  readonly size: number
  readonly readOnly = false
  readonly #bytes: Uint8Array
  #random: number

  constructor(content: Uint8Array, seed: number) {
    this.size = content.length
    this.#bytes = content.slice()
    this.#random = seed
  }

  async read(offset: number, buffers: readonly Uint8Array[]): Promise<void> {
    let position = offset
    for (const buffer of buffers) {
      const start = position
      await this.#inHalves(buffer.length, (from, to) => {
        buffer.set(this.#bytes.subarray(start + from, start + to), from)
      })
      position += buffer.length
    }
  }

  async write(offset: number, buffers: readonly Uint8Array[]): Promise<void> {
    const bytes = Buffer.concat(buffers)
    await this.#inHalves(bytes.length, (from, to) => {
      this.#bytes.set(bytes.subarray(from, to), offset + from)
    })
  }

  async discard(offset: number, length: number): Promise<void> {
    await this.#inHalves(length, (from, to) => this.#bytes.fill(0, offset + from, offset + to))
  }

  async writeZeroes(offset: number, length: number): Promise<void> {
    await this.discard(offset, length)
  }

  flush(): undefined {}

  async close(): Promise<void> {}

  async #inHalves(length: number, transfer: (from: number, to: number) => void): Promise<void> {
    await this.#wait()
    transfer(0, length >>> 1)
    await this.#wait()
    transfer(length >>> 1, length)
  }

  async #wait(): Promise<void> {
    this.#random = (Math.imul(this.#random, 1103515245) + 12345) >>> 0
    for (let turns = this.#random >>> 29; turns > 0; turns--) await new Promise(setImmediate)
  }
}

interface HeldRequest {
  readonly kind: 'read' | 'write'
  finish(): void
}

/** A disk in memory whose reads and writes are done, all at once, when the test says so. */
export class HeldDisk implements BlockBackend {
  readonly size: number
  readonly readOnly = false
  /** Offset and length of the reads. */
  readonly reads: [number, number][] = []
  isClosed = false
  readonly #bytes: Uint8Array
  readonly #held: HeldRequest[] = []

  constructor(content: Uint8Array) {
    this.size = content.length
    this.#bytes = content.slice()
  }

  /** What is under way. */
  get held(): string[] {
    return this.#held.map(({ kind }) => kind)
  }

  /** The first request of this kind that is under way. */
  take(kind: HeldRequest['kind']): HeldRequest {
    const index = this.#held.findIndex((request) => request.kind === kind)
    expect(index, `a ${kind} under way`).not.toBe(-1)
    return this.#held.splice(index, 1)[0]!
  }

  read(offset: number, buffers: readonly Uint8Array[]): Promise<void> {
    this.reads.push([offset, Buffer.concat(buffers).length])
    return this.#hold('read', () => {
      let position = offset
      for (const buffer of buffers) {
        buffer.set(this.#bytes.subarray(position, position + buffer.length))
        position += buffer.length
      }
    })
  }

  write(offset: number, buffers: readonly Uint8Array[]): Promise<void> {
    return this.#hold('write', () => this.#bytes.set(Buffer.concat(buffers), offset))
  }

  flush(): undefined {}

  async close(): Promise<void> {
    this.isClosed = true
  }

  #hold(kind: HeldRequest['kind'], transfer: () => void): Promise<void> {
    return new Promise((resolve) => {
      const finish = () => {
        transfer()
        resolve()
      }
      this.#held.push({ kind, finish })
    })
  }
}
