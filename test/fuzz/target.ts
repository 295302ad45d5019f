/** Something that can be fuzzed. */
export interface FuzzTarget {
  /**
   * Does one operation for each word, from a fresh start.
   *
   * @throws what is wrong, if anything is
   */
  run(operations: readonly number[]): Promise<void>
}

/** Turns of the event loop in which what is under way has to come to its end. */
const MAX_TURNS = 1000

/** Waits for what needs a few turns of the event loop at most. */
export async function untilTrue(condition: () => boolean, what: string): Promise<void> {
  for (let turn = 0; !condition(); turn++) {
    if (turn === MAX_TURNS) throw new Error(`Expected ${what} within ${MAX_TURNS} turns of the event loop`)
    await new Promise(setImmediate)
  }
}

export function expectEqual<T>(actual: T, expected: T, what: string): void {
  if (actual !== expected) throw new Error(`Expected ${what} to be ${expected} but it is ${actual}`)
}

export function expectNoFailures(failures: readonly unknown[]): void {
  if (failures.length > 0) throw new Error('Expected the device not to fail', { cause: failures[0] })
}
