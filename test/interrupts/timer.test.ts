import { describe, expect, it, onTestFinished } from 'vitest'
import { NodevisorError } from '../../src/errors.js'
import { type Clock, TimerFds } from '../../src/interrupts/timer.js'

const HOUR = 3600e9

function setUp(onError?: (error: unknown) => void): TimerFds {
  const clock = new TimerFds(onError)
  onTestFinished(() => clock.close())
  return clock
}

/** A timer, and the promise of its first expirations. */
function timerOf(clock: Clock) {
  let resolve!: (expirations: number) => void
  const expired = new Promise<number>((done) => {
    resolve = done
  })
  return { timer: clock.timer(resolve), expired }
}

/** Resolves once everything that had expired before has been told: a timer that expires last. */
async function settle(clock: TimerFds): Promise<void> {
  const { timer, expired } = timerOf(clock)
  clock.start()
  timer.arm(1)
  await expired
  await new Promise(setImmediate)
}

describe('a timer', () => {
  it('expires after its delay', async () => {
    const clock = setUp()
    clock.start()
    const { timer, expired } = timerOf(clock)
    const before = clock.now()
    timer.arm(2e6)
    expect(await expired).toBe(1)
    expect(clock.now() - before).toBeGreaterThanOrEqual(2e6)
  })

  it.each([0, -1, 0.25, Number.NEGATIVE_INFINITY])('expires at once with a delay of %d', async (delay) => {
    const clock = setUp()
    clock.start()
    const { timer, expired } = timerOf(clock)
    timer.arm(delay)
    expect(await expired).toBe(1)
  })

  it('expires again with every interval', async () => {
    const clock = setUp()
    clock.start()
    let total = 0
    await new Promise<void>((resolve) => {
      const timer = clock.timer((expirations) => {
        total += expirations
        if (total < 5) return
        timer.disarm()
        resolve()
      })
      timer.arm(1, 100_000)
    })
    expect(total).toBeGreaterThanOrEqual(5)
  })

  it('expires once with an interval of 0 or less', async () => {
    for (const interval of [0, -5]) {
      const clock = setUp()
      let calls = 0
      clock.timer(() => calls++).arm(1, interval)
      await settle(clock)
      await settle(clock)
      expect(calls).toBe(1)
    }
  })

  it('that is disarmed, or armed anew for later, does not expire', async () => {
    const clock = setUp()
    const calls: string[] = []
    const [disarmed, later, never] = ['disarmed', 'later', 'never'].map((name) =>
      clock.timer(() => calls.push(name)),
    )
    disarmed!.arm(1)
    disarmed!.disarm()
    later!.arm(1)
    later!.arm(HOUR)
    never!.disarm()
    await settle(clock)
    expect(calls).toEqual([])
  })

  it('takes delays up to the largest number', async () => {
    const clock = setUp()
    let calls = 0
    const timer = clock.timer(() => calls++)
    for (const delay of [2 ** 53, 2 ** 63, Number.MAX_VALUE, Number.POSITIVE_INFINITY])
      timer.arm(delay, delay)
    await settle(clock)
    expect(calls).toBe(0)
  })

  it.each([Number.NaN, undefined, '5', 5n])('refuses %s as a time', (time) => {
    const timer = setUp().timer(() => {})
    const error = expect.objectContaining({ code: 'ERR_INVALID_ARGUMENT' })
    expect(() => timer.arm(time as number)).toThrow(error)
    if (time !== undefined) expect(() => timer.arm(1, time as number)).toThrow(error)
    expect(() => timer.arm(time as number)).toThrow(NodevisorError)
  })

  it('may arm, disarm and stop from within its callback', async () => {
    const clock = setUp()
    clock.start()
    const expirations: number[] = []
    await new Promise<void>((resolve) => {
      const timer = clock.timer((count) => {
        expirations.push(count)
        if (expirations.length < 3) {
          timer.arm(1)
          return
        }
        timer.disarm()
        clock.stop()
        resolve()
      })
      timer.arm(1)
    })
    expect(expirations).toEqual([1, 1, 1])
  })
})

describe('the timers of a machine', () => {
  it('that stands still do not call back; what has expired comes at once as it goes on', async () => {
    const clock = setUp()
    const counts: number[] = []
    const timer = clock.timer((count) => {
      counts.push(count)
      timer.disarm()
    })
    timer.arm(1, 1000)
    const until = clock.now() + 1e6
    while (clock.now() < until);
    await new Promise(setImmediate)
    expect(counts).toEqual([])
    await settle(clock)
    expect(counts).toHaveLength(1)
    expect(counts[0]).toBeGreaterThanOrEqual(1000)
  })

  it('that was stopped wait for its next start', async () => {
    const clock = setUp()
    clock.start()
    let calls = 0
    clock.timer(() => calls++).arm(1)
    clock.stop()
    const other = setUp()
    await settle(other)
    expect(calls).toBe(0)
    await settle(clock)
    expect(calls).toBe(1)
  })

  it('tell what their callbacks throw, and go on', async () => {
    const errors: unknown[] = []
    const clock = setUp((error) => errors.push(error))
    const cause = new Error('faulty device')
    clock
      .timer(() => {
        throw cause
      })
      .arm(1)
    await settle(clock)
    expect(errors).toEqual([cause])
  })

  it('33: may be closed twice and while armed; arming is nothing then', async () => {
    const clock = setUp()
    clock.start()
    let calls = 0
    const timer = clock.timer(() => calls++)
    timer.arm(1)
    clock.close()
    clock.close()
    timer.arm(1)
    timer.disarm()
    clock.start()
    await settle(setUp())
    expect(calls).toBe(0)
  })

  it('share a clock that does not go back', () => {
    const clock = setUp()
    let before = clock.now()
    for (let i = 0; i < 1000; i++) {
      const now = clock.now()
      expect(now).toBeGreaterThanOrEqual(before)
      before = now
    }
  })
})
