/** The frames that host and agent exchange. The protocol is described in `guests/linux-agent/README.md`. */

export const AGENT_VERSION = 1

/** Types of frames. */
export const FRAME = {
  HELLO: 1,
  SPAWN: 2,
  STDIN: 3,
  STDOUT: 4,
  STDERR: 5,
  CREDIT: 6,
  KILL: 7,
  READ: 8,
  WRITE: 9,
  EXIT: 10,
  FAULT: 11,
} as const

/** How a channel ended: the first word of EXIT. */
export const END = { EXITED: 0, SIGNALED: 1, FAILED: 2 } as const

const HEADER_SIZE = 8
/** Most bytes of payload in a frame. */
export const MAX_PAYLOAD = 65536

const MAGIC = Buffer.from('nodevisor agent\0')
/** Random bytes in HELLO, by which its answer is known. */
export const TOKEN_SIZE = 16

/** A frame from the agent. Its payload is only there until the next. */
export interface Frame {
  readonly type: number
  readonly channel: number
  readonly payload: Buffer
}

/** A frame as bytes. */
export function encodeFrame(type: number, channel: number, ...parts: readonly Uint8Array[]): Buffer {
  const length = parts.reduce((sum, part) => sum + part.length, 0)
  return Buffer.concat([words(type + length * 0x100, channel), ...parts])
}

/** Numbers of 32 bits, as they are in payloads. */
export function words(...values: readonly number[]): Buffer {
  const bytes = Buffer.alloc(4 * values.length)
  for (const [index, value] of values.entries()) bytes.writeUInt32LE(value, 4 * index)
  return bytes
}

/**
 * What a host begins with. The zeros complete a frame that an earlier host may have begun; between frames they are
 * ignored.
 */
export function encodeHello(token: Uint8Array): Buffer {
  const hello = encodeFrame(FRAME.HELLO, 0, MAGIC, token, words(AGENT_VERSION))
  return Buffer.concat([Buffer.alloc(HEADER_SIZE + MAX_PAYLOAD), hello])
}

/** Finds the answer to a HELLO in whatever else comes. It keeps no more than a part of one answer. */
export class HelloFinder {
  readonly #start: Buffer
  #tail = Buffer.alloc(0)

  constructor(token: Uint8Array) {
    const frame = encodeFrame(FRAME.HELLO, 0, MAGIC, token, words(0))
    this.#start = frame.subarray(0, frame.length - 4)
  }

  /** @returns the version of the agent, and the bytes behind its answer; undefined if that has not come yet */
  search(bytes: Buffer): { readonly version: number; readonly rest: Buffer } | undefined {
    const all = Buffer.concat([this.#tail, bytes])
    const end = all.indexOf(this.#start) + this.#start.length
    if (end < this.#start.length || all.length < end + 4) {
      // A copy: the bytes may be part of a large buffer.
      this.#tail = Buffer.from(all.subarray(Math.max(0, all.length - this.#start.length - 3)))
      return undefined
    }
    return { version: all.readUInt32LE(end), rest: all.subarray(end + 4) }
  }
}

/** Whether this is the answer to a HELLO with that token. */
export function isAnswer({ payload }: Frame, token: Uint8Array): boolean {
  return payload.length === MAGIC.length + TOKEN_SIZE + 4 && payload.indexOf(token) === MAGIC.length
}

/** Makes frames of bytes. It has room for one frame, and never more. */
export class FrameReader {
  readonly #frame = Buffer.allocUnsafe(HEADER_SIZE + MAX_PAYLOAD)
  #length = 0;

  /** @returns undefined where a frame claims to be longer than any may be */
  *read(bytes: Buffer): Generator<Frame | undefined, void> {
    for (let rest = bytes; rest.length > 0; ) {
      rest = this.#fill(rest, HEADER_SIZE)
      if (this.#length < HEADER_SIZE) return
      const length = this.#frame.readUIntLE(1, 3)
      if (length > MAX_PAYLOAD) {
        yield undefined
        return
      }
      rest = this.#fill(rest, HEADER_SIZE + length)
      if (this.#length < HEADER_SIZE + length) return
      this.#length = 0
      yield {
        type: this.#frame[0]!,
        channel: this.#frame.readUInt32LE(4),
        payload: this.#frame.subarray(HEADER_SIZE, HEADER_SIZE + length),
      }
    }
  }

  /** Completes the frame up to `size`. @returns what is left of the bytes */
  #fill(bytes: Buffer, size: number): Buffer {
    const missing = Math.max(0, size - this.#length)
    const part = bytes.subarray(0, missing)
    this.#frame.set(part, this.#length)
    this.#length += part.length
    return bytes.subarray(part.length)
  }
}
