import type { Duplex } from 'node:stream'
import { invalidArgument, NodevisorError } from '../errors.js'
import { PAGE_SIZE } from '../memory/layout.js'
import { MAX_STATE_SIZE } from '../snapshot/state-file.js'

/** Of what the two sides say to one another. The source says it first. */
export const PROTOCOL_VERSION = 1

/** Kinds of frames: the source's, then the target's. */
export const FRAME = {
  /** u32: {@link PROTOCOL_VERSION}. */
  HELLO: 1,
  /** A part of a state file as of `docs/snapshots.md`: a part of less than {@link PIECE_SIZE} bytes is the last. */
  RECORD: 2,
  /** u32: number of the first page; then what is in it and in those behind it. */
  PAGES: 3,
  /** u32, u32: number of the first page, and how many there are that are zero. */
  ZERO: 4,
  /** As RECORD: the machine as it has to go on. */
  STATE: 5,
  /** The machine is the target's from now on. */
  GO: 6,
  /** The machine in RECORD can be had. */
  READY: 16,
  /** The machine in STATE is there, and waits. */
  PREPARED: 17,
  /** It is the target's. */
  RUNNING: 18,
  /** JSON: `{ code, message }`. Nothing comes after it. */
  ERROR: 19,
} as const

/** What a frame has behind its header. */
export interface Frame {
  readonly type: number
  readonly payload: Buffer
}

/** A frame to be sent: its payload may be in several parts. */
export interface OutgoingFrame {
  readonly type: number
  readonly parts?: readonly Uint8Array[]
}

/** The most bytes of memory, or of a record, in one frame. */
export const PIECE_SIZE = 2 ** 20
/** u32 type, u32 length of the payload, little-endian. */
const HEADER_SIZE = 8
const MAX_ERROR_SIZE = 2 ** 14

const U32 = 4
/** Bytes that the payload of each kind may have. */
const PAYLOADS: ReadonlyMap<number, { readonly min: number; readonly max: number; readonly unit?: number }> =
  new Map([
    [FRAME.HELLO, { min: U32, max: U32 }],
    [FRAME.RECORD, { min: 0, max: PIECE_SIZE }],
    [FRAME.PAGES, { min: U32 + PAGE_SIZE, max: U32 + PIECE_SIZE, unit: PAGE_SIZE }],
    [FRAME.ZERO, { min: 2 * U32, max: 2 * U32 }],
    [FRAME.STATE, { min: 0, max: PIECE_SIZE }],
    [FRAME.GO, { min: 0, max: 0 }],
    [FRAME.READY, { min: 0, max: 0 }],
    [FRAME.PREPARED, { min: 0, max: 0 }],
    [FRAME.RUNNING, { min: 0, max: 0 }],
    [FRAME.ERROR, { min: 0, max: MAX_ERROR_SIZE }],
  ])

/** How long the other side may let one wait, in ms. */
export const IDLE_LIMIT = 30_000
/** How long the other side has to read an error, and to close, in ms. */
const LINGER_LIMIT = 2000

const NO_BYTES = Buffer.alloc(0)

/** Frames over a stream. What fails it once ends every wait, with the same error. */
export class Connection {
  readonly #stream: Duplex
  readonly #idleLimit: number
  #failure: unknown
  /** Waits that {@link fail} ends. */
  readonly #waits = new Set<(error: unknown) => void>()
  #wakeReader: (() => void) | undefined
  #closed = false

  constructor(stream: Duplex, idleLimit = IDLE_LIMIT) {
    this.#stream = stream
    this.#idleLimit = idleLimit
    stream.on('readable', this.#onReadable)
    stream.on('error', this.#onError)
    stream.on('end', this.#onEnd)
    stream.on('close', this.#onEnd)
  }

  /** From now on nothing works any more, and what waits rejects. */
  fail(error: unknown): void {
    this.#failure ??= error
    for (const reject of [...this.#waits]) reject(this.#failure)
  }

  /** Throws what it failed for, if it has. */
  check(): void {
    if (this.#failure !== undefined) throw this.#failure
  }

  /** Sends frames, one right after the other. Resolves when there is room for more. */
  async send(...frames: readonly OutgoingFrame[]): Promise<void> {
    await this.#wait(this.#idleLimit, (settle) => {
      this.#stream.cork()
      const chunks = frames.flatMap(({ type, parts = [] }) => [headerOf(type, parts), ...parts])
      for (const [index, chunk] of chunks.entries()) {
        if (index < chunks.length - 1) this.#stream.write(chunk)
        else this.#stream.write(chunk, (error) => settle(error ?? undefined))
      }
      this.#stream.uncork()
    })
  }

  /**
   * The next frame: of a kind that there is, and as long as that may be.
   *
   * @param idleLimit - ms without a byte from the other side
   */
  async receive(idleLimit = this.#idleLimit): Promise<Frame> {
    const header = await this.#read(HEADER_SIZE, idleLimit)
    const type = header.readUInt32LE(0)
    const length = header.readUInt32LE(4)
    const bounds = PAYLOADS.get(type)
    if (bounds === undefined) throw brokenProtocol('a frame of a known kind', `one of kind ${type}`)
    const { min, max, unit = 1 } = bounds
    if (length < min || length > max || (length - min) % unit !== 0) {
      throw brokenProtocol(`${min} to ${max} bytes in a frame of kind ${type}`, `${length}`)
    }
    return { type, payload: length === 0 ? NO_BYTES : await this.#read(length, idleLimit) }
  }

  /** Waits for what depends on the other side, for as long as that may be idle at most. */
  async within<Result>(promise: Promise<Result>): Promise<Result> {
    const timer = setTimeout(() => this.fail(idleError(this.#idleLimit)), this.#idleLimit)
    try {
      return await promise
    } finally {
      clearTimeout(timer)
    }
  }

  /** Lets the other side read what was sent to it, then closes. */
  async end(): Promise<void> {
    const stream = this.#stream
    if (!this.#closed && !stream.destroyed) {
      stream.off('readable', this.#onReadable)
      stream.end()
      // What has come meanwhile is for nobody; left unread, it would take back what was sent.
      stream.resume()
      await new Promise<void>((resolve) => {
        const timer = setTimeout(resolve, LINGER_LIMIT)
        const done = () => {
          clearTimeout(timer)
          resolve()
        }
        if (stream.readableEnded) done()
        stream.once('end', done).once('close', done)
      })
    }
    this.close()
  }

  close(): void {
    if (this.#closed) return
    this.#closed = true
    this.fail(failed('Expected an open connection but it was closed'))
    const stream = this.#stream
    stream.off('readable', this.#onReadable)
    stream.off('end', this.#onEnd)
    stream.off('close', this.#onEnd)
    // `error` is listened to for ever: one that comes now is nobody's.
    stream.destroy()
  }

  readonly #onReadable = () => {
    this.#wakeReader?.()
  }

  readonly #onError = (cause: unknown) => {
    const why = cause instanceof Error ? cause.message : String(cause)
    this.fail(failed(`Expected a connection that holds but it failed: ${why}`, { cause }))
  }

  readonly #onEnd = () => {
    this.fail(failed('Expected a connection that holds but the other side closed it'))
  }

  async #read(length: number, idleLimit: number): Promise<Buffer> {
    for (;;) {
      this.check()
      const bytes = this.#stream.read(length) as unknown
      if (bytes !== null) {
        if (!(bytes instanceof Uint8Array)) {
          throw invalidArgument('the stream', 'one of bytes, with no encoding set,', bytes)
        }
        if (bytes.length === length) return Buffer.from(bytes.buffer, bytes.byteOffset, length)
      }
      if (this.#stream.readableEnded || this.#stream.destroyed) this.#onEnd()
      await this.#wait(idleLimit, (settle) => {
        this.#wakeReader = () => settle()
      })
    }
  }

  #wait(limit: number, begin: (settle: (error?: unknown) => void) => void): Promise<void> {
    return new Promise((resolve, reject) => {
      if (this.#failure !== undefined) {
        reject(this.#failure)
        return
      }
      const timer = Number.isFinite(limit) ? setTimeout(() => this.fail(idleError(limit)), limit) : undefined
      const settle = (error?: unknown) => {
        clearTimeout(timer)
        this.#waits.delete(settle)
        if (error === undefined) resolve()
        else reject(this.#failure ?? error)
      }
      this.#waits.add(settle)
      begin(settle)
    })
  }
}

/** What a record is sent in: frames of one kind. */
export function recordFrames(type: number, record: Uint8Array): OutgoingFrame[] {
  const frames: OutgoingFrame[] = []
  for (let at = 0; at <= record.length; at += PIECE_SIZE) {
    frames.push({ type, parts: [record.subarray(at, at + PIECE_SIZE)] })
  }
  return frames
}

/** The rest of a record, whose first frame has come. */
export async function receiveRecord(connection: Connection, first: Frame): Promise<Buffer> {
  const parts = [first.payload]
  let size = first.payload.length
  while (parts.at(-1)!.length === PIECE_SIZE) {
    const frame = await connection.receive()
    if (frame.type !== first.type)
      throw brokenProtocol('the rest of a record', `a frame of kind ${frame.type}`)
    size += frame.payload.length
    if (size > MAX_STATE_SIZE) throw brokenProtocol(`a record of at most ${MAX_STATE_SIZE} bytes`, `${size}`)
    parts.push(frame.payload)
  }
  return Buffer.concat(parts)
}

/** Numbers of 32 bits, as frames have them. */
export function u32(...values: readonly number[]): Uint8Array {
  const bytes = Buffer.alloc(U32 * values.length)
  for (const [index, value] of values.entries()) bytes.writeUInt32LE(value, U32 * index)
  return bytes
}

/** The frame for what went wrong here. */
export function errorFrame(error: unknown): OutgoingFrame {
  const code = error instanceof NodevisorError ? error.code : ''
  const message = error instanceof Error ? error.message : String(error)
  // JSON makes at most six bytes of a character.
  const text = JSON.stringify({ code, message: message.slice(0, 2000) })
  return { type: FRAME.ERROR, parts: [Buffer.from(text)] }
}

/** What the other side says went wrong there: anything may be in it. */
export function otherSidesError({ payload }: Frame): NodevisorError {
  let said: { readonly code?: unknown; readonly message?: unknown } = {}
  try {
    said = Object(JSON.parse(payload.toString())) as typeof said
  } catch {
    // Then it has said nothing.
  }
  const remoteCode = printable(said.code)
  const remoteMessage = printable(said.message)
  return failed(`The other side could not take the machine: ${remoteMessage || 'it does not say why'}`, {
    remoteCode,
    remoteMessage,
  })
}

/** It will be shown on terminals. */
function printable(text: unknown): string {
  return typeof text === 'string' ? text.replace(/\p{C}+/gu, ' ') : ''
}

/** The error for what the other side should not have sent. */
export function brokenProtocol(expected: string, received: string): NodevisorError {
  return failed(
    `Expected ${expected} from the other side but received ${received}: is it a nodevisor that moves a machine?`,
  )
}

/** A machine could not be moved. */
export function failed(message: string, facts: { readonly [fact: string]: unknown } = {}): NodevisorError {
  return new NodevisorError('ERR_MIGRATION_FAILED', message, facts)
}

function idleError(limit: number): NodevisorError {
  return failed(`Expected something from the other side within ${limit / 1000} s but there was nothing`)
}

function headerOf(type: number, parts: readonly Uint8Array[]): Uint8Array {
  return u32(
    type,
    parts.reduce((sum, { length }) => sum + length, 0),
  )
}
