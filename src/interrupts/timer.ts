import { binding, type NativeTimerFd } from '../binding.js'
import { invalidArgument } from '../errors.js'

/** A device's timer: real time on the host's monotonic clock, in nanoseconds. */
export interface Timer {
  /**
   * Lets it expire `delay` from now, and then every `interval` if given. Replaces what it was armed with.
   *
   * @param delay - ns, at least 1; anything less is 1
   * @param interval - ns; 0, or less, for once
   * @throws `ERR_INVALID_ARGUMENT` for what is no number
   */
  arm(delay: number, interval?: number): void
  /** Lets it not expire. */
  disarm(): void
}

/** Makes timers: the machine's, or a fake in tests. */
export interface Clock {
  /** ns, from some moment on; never goes back. */
  now(): number
  /** @param onExpire - called with the number of expirations since the last call, at least 1 */
  timer(onExpire: (expirations: number) => void): Timer
}

/** What timerfd_settime takes: some 292 years. */
const MAX_DELAY = 2 ** 63 - 2 ** 12

/**
 * The timers of one machine, over timerfds. They expire while the machine stands still, too, but tell so only while
 * it is listened: what has expired in between comes at once, as a number.
 */
export class TimerFds implements Clock {
  readonly #timers = new Set<TimerFd>()
  readonly #onError: (error: unknown) => void
  #listening = false

  /** @param onError - takes what a timer's callback throws; unless given, that is an uncaught exception */
  constructor(
    onError: (error: unknown) => void = (error) => {
      throw error
    },
  ) {
    this.#onError = onError
  }

  now(): number {
    return Number(process.hrtime.bigint())
  }

  timer(onExpire: (expirations: number) => void): Timer {
    const guarded = (expirations: number) => {
      try {
        onExpire(expirations)
      } catch (error) {
        this.#onError(error)
      }
    }
    const timer = new TimerFd(guarded, () => this.#listening)
    this.#timers.add(timer)
    return timer
  }

  /** From now on timers call back, and keep the event loop alive. */
  start(): void {
    this.#listening = true
    for (const timer of this.#timers) timer.listen()
  }

  /** Timers do not call back any more. */
  stop(): void {
    this.#listening = false
    for (const timer of this.#timers) timer.unlisten()
  }

  close(): void {
    this.#listening = false
    for (const timer of this.#timers) timer.close()
    this.#timers.clear()
  }
}

class TimerFd implements Timer {
  readonly #onExpire: (expirations: number) => void
  readonly #isStarted: () => boolean
  /** Made when it is armed first: most machines arm none. */
  #native: NativeTimerFd | undefined
  #closed = false

  constructor(onExpire: (expirations: number) => void, isStarted: () => boolean) {
    this.#onExpire = onExpire
    this.#isStarted = isStarted
  }

  arm(delay: number, interval = 0): void {
    checkTime('delay', delay)
    checkTime('interval', interval)
    if (this.#closed) return
    if (this.#native === undefined) {
      this.#native = new (binding().TimerFd)()
      if (this.#isStarted()) this.listen()
    }
    this.#native.arm(clamp(delay), interval > 0 ? clamp(interval) : 0)
  }

  disarm(): void {
    this.#native?.arm(0, 0)
  }

  listen(): void {
    const native = this.#native
    native?.listen(() => {
      const expirations = native.read()
      if (expirations > 0) this.#onExpire(expirations)
    })
  }

  unlisten(): void {
    this.#native?.unlisten()
  }

  close(): void {
    this.#closed = true
    this.#native?.close()
    this.#native = undefined
  }
}

function checkTime(name: string, nanoseconds: number): void {
  if (typeof nanoseconds === 'number' && !Number.isNaN(nanoseconds)) return
  throw invalidArgument(name, 'a number of nanoseconds', nanoseconds)
}

function clamp(nanoseconds: number): number {
  return Math.min(Math.max(Math.ceil(nanoseconds), 1), MAX_DELAY)
}
