import fc from 'fast-check'
import { collectGarbage } from '../helpers/memory.js'
import type { FuzzTarget } from './target.js'

/** Operations in a run, at most. */
const MAX_RUN = 512
/** Runs between two looks at how far it is. */
const BATCH = 100
/** Bytes that the heap may have grown by in the end, for what the engine itself has compiled and cached. */
const MAX_GROWTH = 32 * 2 ** 20

export interface FuzzOptions {
  /** How many, at least. */
  readonly operations: number
  readonly seed: number
  /** Of a failure that was found before, with its seed: plays that alone. */
  readonly path?: string
  /** Called now and then with how many operations are done, and the seed of the next batch. */
  onProgress?(operations: number, seed: number): void
}

export interface FuzzFailure {
  /** Of the batch that failed. */
  readonly seed: number
  readonly path: string
  /** The shortest run that fails. */
  readonly operations: readonly number[]
  readonly error: unknown
}

export interface FuzzReport {
  /** Done. */
  readonly operations: number
  readonly failure?: FuzzFailure
}

/** Does random operations to a target until one goes wrong, or enough are done. */
export async function fuzz(
  target: FuzzTarget,
  { operations, seed, path, onProgress }: FuzzOptions,
): Promise<FuzzReport> {
  let done = 0
  const property = fc.asyncProperty(
    // A word stands for an operation whatever is in it: only whole operations can be left out.
    fc.array(fc.noShrink(fc.nat(0xffff_ffff)), { minLength: 1, maxLength: MAX_RUN, size: 'max' }),
    async (words) => {
      done += words.length
      await target.run(words)
    },
  )
  const { now } = performance
  // Devices stop for a while when they have used much of the host's time: here all runs have to be the same.
  performance.now = () => 0
  try {
    let heap: number | undefined
    for (let batch = 0; batch === 0 || (done < operations && path === undefined); batch++) {
      const batchSeed = (seed + batch) | 0
      const replay = path === undefined ? {} : { path, endOnFailure: true }
      onProgress?.(done, batchSeed)
      const result = await fc.check(property, { seed: batchSeed, numRuns: BATCH, unbiased: true, ...replay })
      if (result.failed) {
        const failure = {
          seed: batchSeed,
          path: result.counterexamplePath ?? '',
          operations: result.counterexample?.[0] ?? [],
          error: result.errorInstance,
        }
        return { operations: done, failure }
      }
      heap ??= heapUsed()
    }
    const growth = heapUsed() - heap!
    if (growth > MAX_GROWTH)
      throw new Error(`Expected no more than ${MAX_GROWTH} bytes of growth, not ${growth}`)
    return { operations: done }
  } finally {
    performance.now = now
  }
}

/** Bytes of JavaScript that is still in use. */
function heapUsed(): number {
  collectGarbage()
  return process.memoryUsage().heapUsed
}
