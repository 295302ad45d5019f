import { type ErrorCode, invalidArgument, NodevisorError, show } from '../errors.js'
import { bytesOfText, decode, type OutputLog } from './output-log.js'

/**
 * How far back, in bytes, a search for a regular expression starts when output was added. It bounds the work:
 * every addition is searched once, with at most this much of what was searched before.
 */
const REGEXP_WINDOW = 64 * 1024

/** Characters of output that an error shows. */
const TAIL_LENGTH = 200

/** The longest time a timer of Node.js can have, in ms. */
const MAX_TIMEOUT = 0x7fff_ffff

/** How long to wait. */
export interface WaitOptions {
  /** Milliseconds, up to 2^31 - 1; without end unless given. */
  readonly timeout?: number
  /** Ends the wait with `ERR_ABORTED`. */
  readonly signal?: AbortSignal
}

/** What was waited for, found. */
export interface OutputMatch {
  /** What matched. */
  readonly text: string
  /** The output before it, from the end of the previous match on. */
  readonly before: string
  /** The capture groups of a regular expression, the first at index 0; empty for a string. */
  readonly groups: readonly (string | undefined)[]
  /** The named capture groups of a regular expression. */
  readonly namedGroups: Readonly<Record<string, string | undefined>>
}

/** A match and where it lies in the log. */
interface Found extends Omit<OutputMatch, 'before'> {
  readonly start: number
  readonly end: number
}

/** Looks for a match from `from` on, when nothing up to `searched` matched. */
type Finder = (log: OutputLog, from: number, searched: number) => Found | undefined

interface Waiter {
  readonly find: Finder
  readonly from: number
  searched: number
  resolve(match: OutputMatch): void
  reject(code: ErrorCode, why: string, facts?: Record<string, unknown>): void
}

/** Those who wait for something to appear in a guest's output. */
export class OutputWaiters {
  readonly #log: OutputLog
  readonly #place: string
  readonly #waiters = new Set<Waiter>()
  /** End of the last match. */
  #matched = 0
  #closed: string | undefined

  /** @param place - where the output is, for errors: `the serial port` */
  constructor(log: OutputLog, place: string) {
    this.#log = log
    this.#place = place
  }

  /** See `SerialPort.waitFor`. */
  async waitFor(pattern: string | RegExp, options: WaitOptions = {}): Promise<OutputMatch> {
    const find = finderFor(pattern)
    const { timeout, signal } = checkOptions(options)
    const name = typeof pattern === 'string' ? show(pattern) : String(pattern)
    const error = (code: ErrorCode, why: string, facts: Record<string, unknown> = {}) => {
      const output = this.#log.text(this.#log.end - 4 * TAIL_LENGTH).slice(-TAIL_LENGTH)
      const tail = output === '' ? 'there was no output' : `output ends with ${JSON.stringify(output)}`
      const message = `Expected ${name} on ${this.#place} but ${why}; ${tail}`
      return new NodevisorError(code, message, { pattern, output, ...facts })
    }
    const aborted = () => error('ERR_ABORTED', 'the wait was aborted', { cause: signal?.reason })
    if (signal?.aborted) throw aborted()

    let timer: NodeJS.Timeout | undefined
    let onAbort: (() => void) | undefined
    let waiter: Waiter | undefined
    try {
      return await new Promise<OutputMatch>((resolve, reject) => {
        waiter = {
          find,
          from: this.#matched,
          searched: this.#matched,
          resolve,
          reject: (code, why, facts) => reject(error(code, why, facts)),
        }
        if (this.#search(waiter)) return
        if (this.#closed !== undefined) {
          reject(error('ERR_SERIAL_ENDED', `${this.#closed} before it came`))
          return
        }
        this.#waiters.add(waiter)
        if (timeout !== undefined) {
          const expired = () =>
            reject(error('ERR_TIMEOUT', `it did not come within ${timeout} ms`, { timeout }))
          timer = setTimeout(expired, timeout)
        }
        onAbort = () => reject(aborted())
        signal?.addEventListener('abort', onAbort)
      })
    } finally {
      clearTimeout(timer)
      if (onAbort !== undefined) signal?.removeEventListener('abort', onAbort)
      if (waiter !== undefined) this.#waiters.delete(waiter)
    }
  }

  /** Output was added. */
  search(): void {
    for (const waiter of this.#waiters) {
      if (this.#search(waiter)) this.#waiters.delete(waiter)
    }
  }

  /** Rejects all who wait in vain. @param why - a clause: `the run ended with halt` */
  endOfRun(why: string): void {
    this.search()
    for (const waiter of this.#waiters) waiter.reject('ERR_SERIAL_ENDED', `${why} before it came`)
    this.#waiters.clear()
  }

  /** As {@link OutputWaiters.endOfRun}, and for all who come later, unless the output has it already. */
  close(why: string): void {
    this.endOfRun(why)
    this.#closed ??= why
  }

  #search(waiter: Waiter): boolean {
    const log = this.#log
    const from = Math.max(waiter.from, log.start)
    const found = waiter.find(log, from, Math.max(from, waiter.searched))
    waiter.searched = log.end
    if (found === undefined) return false
    this.#matched = Math.max(this.#matched, found.end)
    const { start, end, ...match } = found
    waiter.resolve({ ...match, before: log.text(from, start) })
    return true
  }
}

function finderFor(pattern: unknown): Finder {
  if (typeof pattern === 'string' && pattern !== '') return stringFinder(pattern)
  if (pattern instanceof RegExp) return regExpFinder(pattern)
  throw invalidArgument('pattern', 'a non-empty string or a RegExp', pattern)
}

/** UTF-8 can be searched as bytes; a match may begin in what was searched before. */
function stringFinder(pattern: string): Finder {
  const needle = Buffer.from(pattern)
  return (log, from, searched) => {
    const first = Math.max(from, searched - needle.length + 1)
    const index = log.bytes(first).indexOf(needle)
    if (index < 0) return undefined
    const start = first + index
    return { start, end: start + needle.length, text: pattern, groups: [], namedGroups: {} }
  }
}

function regExpFinder(pattern: RegExp): Finder {
  // Own flags: `g` makes lastIndex count, which `y` and the caller's object must not.
  const regExp = new RegExp(pattern.source, `${pattern.flags.replace(/[gy]/g, '')}g`)
  return (log, from, searched) => {
    const first = Math.max(from, searched - REGEXP_WINDOW)
    const bytes = log.bytes(first)
    const text = decode(bytes)
    // Inside the output one character goes before the search, so that ^ and \b see that it is not the start.
    regExp.lastIndex = first === from ? 0 : 1
    const match = regExp.exec(text)
    if (match === null) return undefined
    const start = bytesOfText(bytes, match.index)
    const end = bytesOfText(bytes, match.index + match[0].length)
    return {
      start: first + start,
      end: first + end,
      text: match[0],
      groups: match.slice(1),
      namedGroups: { ...match.groups },
    }
  }
}

function checkOptions(options: unknown): WaitOptions {
  if (typeof options !== 'object' || options === null) {
    throw invalidArgument('options', 'an object { timeout, signal }', options)
  }
  const { timeout, signal } = options as WaitOptions
  if (timeout !== undefined && !(typeof timeout === 'number' && timeout >= 0 && timeout <= MAX_TIMEOUT)) {
    throw invalidArgument('timeout', `a number of milliseconds from 0 to ${MAX_TIMEOUT}`, timeout)
  }
  if (signal !== undefined && !(signal instanceof AbortSignal)) {
    throw invalidArgument('signal', 'an AbortSignal', signal)
  }
  return options
}
