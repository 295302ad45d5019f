import { randomUUID } from 'node:crypto'
import type { NodevisorError } from '../errors.js'
import type { PageRuns } from '../memory/guest-ram.js'
import { isZero } from '../memory/is-zero.js'
import { PAGE_SIZE } from '../memory/layout.js'
import type { MachineRam, MemoryImage } from '../memory/machine-ram.js'
import { countPages } from '../memory/page-runs.js'
import { packageVersion, type SnapshotFacts } from '../snapshot/snapshot-folder.js'
import { type DiskRecord, encodeState } from '../snapshot/state-file.js'
import { ImagePages, withoutEqual } from './image-pages.js'
import {
  brokenProtocol,
  type Connection,
  FRAME,
  type Frame,
  failed,
  type OutgoingFrame,
  otherSidesError,
  PIECE_SIZE,
  PROTOCOL_VERSION,
  recordFrames,
  u32,
} from './protocol.js'

/** How far a machine has been moved. Bytes are of guest memory. */
export interface MigrationProgress {
  /** 0 while all of memory is sent; then rounds of what has changed meanwhile. */
  readonly round: number
  /** Bytes of this round that are done, … */
  readonly done: number
  /** … of so many. Pages that are zero cost nothing. */
  readonly total: number
}

/** What it took to move a machine. */
export interface MigrationResult {
  /** Bytes of guest memory that were sent. */
  readonly bytes: number
  /** How often what had changed meanwhile was sent while the guest ran. */
  readonly rounds: number
  /** From the call to the end, in milliseconds. */
  readonly durationMs: number
  /** How long the guest stood still, but for its other end's `run()`, in milliseconds. */
  readonly downtimeMs: number
}

/** What is needed of a machine to move it. */
export interface MigrationSource {
  readonly ram: MachineRam
  /** Does something while the machine stands still. */
  whileStill<Result>(action: () => Promise<Result>): Promise<Result>
  /** All of it but memory and disks; it stands still. */
  save(): SnapshotFacts
  /** Which disks it has; flushes them. */
  describeDisks(): Promise<DiskRecord[]>
  /** It stands still, and will do nothing more here, or with the files of its disks, unless it {@link stays}. */
  leave(): Promise<DiskRecord[]>
  /** It goes on here. @throws where it cannot any more */
  stays(): Promise<void>
  /** It goes on there. */
  left(): void
  /** It may go on there, or not. */
  unsure(): void
}

/** How long a guest may stand still for the sake of the last pages, in ms. */
const DOWNTIME_GOAL = 20
const MAX_ROUNDS = 30
/** Rounds without any getting smaller: more of them would not help. */
const MAX_VAIN_ROUNDS = 3

const PIECE_PAGES = PIECE_SIZE / PAGE_SIZE

/**
 * Sends a machine: first its memory while it runs, then what changes in the meantime, then, while it stands still, the
 * rest. When it throws, the machine goes on here, or {@link MigrationSource.unsure} was called.
 */
export async function sendMachine(
  connection: Connection,
  source: MigrationSource,
  onProgress: (progress: MigrationProgress) => void,
  signal: AbortSignal,
): Promise<MigrationResult> {
  const abort = () => connection.fail(abortError(signal))
  if (signal.aborted) abort()
  signal.addEventListener('abort', abort, { once: true })
  // Once it is the other side's, it is too late.
  const commit = () => signal.removeEventListener('abort', abort)
  try {
    return await new Sender(connection, source, onProgress, commit).send()
  } finally {
    commit()
  }
}

class Sender {
  readonly #connection: Connection
  readonly #source: MigrationSource
  readonly #onProgress: (progress: MigrationProgress) => void
  readonly #commit: () => void
  readonly #startTime = performance.now()
  /** What the other side says next. */
  #answer: Promise<Frame>
  #round = 0
  /** Bytes of memory, and how long they took, in ms. */
  #bytes = 0
  #sendTime = 0
  #downtime = 0

  constructor(
    connection: Connection,
    source: MigrationSource,
    onProgress: (progress: MigrationProgress) => void,
    commit: () => void,
  ) {
    this.#connection = connection
    this.#source = source
    this.#onProgress = onProgress
    this.#commit = commit
    this.#answer = this.#listen()
  }

  async send(): Promise<MigrationResult> {
    const { ram } = this.#source
    const changes = ram.trackChanges()
    let image: MemoryImage | undefined
    try {
      const disks = await this.#source.describeDisks()
      const first = await this.#source.whileStill(async () => {
        const facts = this.#source.save()
        image = ram.capture()
        changes.take()
        return { facts, image }
      })
      await this.#connection.send({ type: FRAME.HELLO, parts: [u32(PROTOCOL_VERSION)] })
      await this.#sendRecord(FRAME.RECORD, first.facts, disks)
      await this.#expect(FRAME.READY)
      let sent = new ImagePages(first.image)
      await this.#sendPages(sent, Uint32Array.of(0, ram.ram.size / PAGE_SIZE))
      let fewest = Number.POSITIVE_INFINITY
      for (let vain = 0; ; ) {
        // What has changed since can then get into the base, and does not come again.
        image?.close()
        const before = sent
        const rest = await this.#source.whileStill(async () => {
          const stillSince = performance.now()
          image = ram.capture()
          sent = new ImagePages(image)
          const runs = withoutEqual(changes.take(), before, sent)
          const pages = countPages(runs)
          vain = pages < fewest ? 0 : vain + 1
          fewest = Math.min(fewest, pages)
          const isLast = this.#round >= MAX_ROUNDS || vain >= MAX_VAIN_ROUNDS || this.#isQuick(pages)
          this.#round++
          if (!isLast) return runs
          await this.#finish(sent, runs)
          this.#downtime = performance.now() - stillSince
          return undefined
        })
        if (rest === undefined) break
        await this.#sendPages(sent, rest)
      }
      return {
        bytes: this.#bytes,
        rounds: this.#round - 1,
        durationMs: performance.now() - this.#startTime,
        downtimeMs: this.#downtime,
      }
    } finally {
      changes.close()
      image?.close()
    }
  }

  /** Whether that many pages are sent before anybody notices. */
  #isQuick(pages: number): boolean {
    return pages * PAGE_SIZE * this.#sendTime <= DOWNTIME_GOAL * this.#bytes
  }

  /** The machine stands still: all that is left. */
  async #finish(image: ImagePages, runs: PageRuns): Promise<void> {
    const source = this.#source
    let isTheirs = false
    try {
      const disks = await source.leave()
      await this.#sendPages(image, runs)
      await this.#sendRecord(FRAME.STATE, source.save(), disks)
      await this.#expect(FRAME.PREPARED)
      this.#connection.check()
      this.#commit()
      isTheirs = true
      await this.#connection.send({ type: FRAME.GO })
      await this.#expect(FRAME.RUNNING)
      source.left()
    } catch (error) {
      if (isTheirs) {
        source.unsure()
      } else {
        // So that the other side closes the disks.
        this.#connection.close()
        await source.stays()
      }
      throw error
    }
  }

  async #sendRecord(type: number, facts: SnapshotFacts, disks: readonly DiskRecord[]): Promise<void> {
    const record = encodeState({
      ...facts,
      id: randomUUID(),
      created: new Date().toISOString(),
      nodevisor: packageVersion(),
      disks,
      memory: { size: this.#source.ram.ram.size, pages: 'all' },
    })
    for (const frame of recordFrames(type, record)) await this.#connection.send(frame)
  }

  async #sendPages(image: ImagePages, runs: PageRuns): Promise<void> {
    const total = countPages(runs) * PAGE_SIZE
    let done = 0
    for (let i = 0; i < runs.length; i += 2) {
      const end = runs[i]! + runs[i + 1]!
      for (let first = runs[i]!; first < end; first += PIECE_PAGES) {
        const count = Math.min(PIECE_PAGES, end - first)
        const bytes = await image.read(first, count)
        // The other side's memory begins as zeros.
        const frames = [...framesOf(first, bytes)].filter(
          ({ type }) => this.#round > 0 || type === FRAME.PAGES,
        )
        const start = performance.now()
        if (frames.length > 0) await this.#connection.send(...frames)
        this.#sendTime += performance.now() - start
        for (const { type, parts } of frames) if (type === FRAME.PAGES) this.#bytes += parts![1]!.length
        done += bytes.length
        this.#onProgress({ round: this.#round, done, total })
      }
    }
  }

  async #expect(type: number): Promise<void> {
    const frame = await this.#connection.within(this.#answer)
    if (frame.type !== type) throw brokenProtocol(`a frame of kind ${type}`, `one of kind ${frame.type}`)
    if (type !== FRAME.RUNNING) this.#answer = this.#listen()
  }

  /** Hears of an error also while there is something to send. */
  #listen(): Promise<Frame> {
    const answer = this.#connection.receive(Number.POSITIVE_INFINITY).then((frame) => {
      if (frame.type !== FRAME.ERROR) return frame
      throw otherSidesError(frame)
    })
    answer.catch((error) => this.#connection.fail(error))
    return answer
  }
}

/** Pages as frames: runs of those that are zero, and of the others. */
function* framesOf(first: number, bytes: Buffer): Generator<OutgoingFrame> {
  const count = bytes.length / PAGE_SIZE
  const zeroAt = (page: number) => isZero(bytes.subarray(page * PAGE_SIZE, (page + 1) * PAGE_SIZE))
  for (let start = 0; start < count; ) {
    const zero = zeroAt(start)
    let end = start + 1
    while (end < count && zeroAt(end) === zero) end++
    yield zero
      ? { type: FRAME.ZERO, parts: [u32(first + start, end - start)] }
      : {
          type: FRAME.PAGES,
          parts: [u32(first + start), bytes.subarray(start * PAGE_SIZE, end * PAGE_SIZE)],
        }
    start = end
  }
}

function abortError({ reason: cause }: AbortSignal): NodevisorError {
  const why = cause instanceof Error ? cause.message : String(cause)
  return failed(`The move was given up: ${why}`, { cause })
}
