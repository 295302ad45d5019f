import { describe, expect, it } from 'vitest'
import { fuzz } from './engine.js'
import { TARGETS } from './targets.js'

/** A few seconds for all: `npm run fuzz` does more. */
const OPERATIONS = 30_000

const randomSeed = () => Math.floor(Math.random() * 2 ** 31)

describe.each(Object.entries(TARGETS))('fuzzing %s', (name, make) => {
  it('finds nothing wrong', { timeout: 120_000 }, async () => {
    const { operations, failure } = await fuzz(make(), { operations: OPERATIONS, seed: randomSeed() })
    if (failure !== undefined) {
      const { seed, path, error } = failure
      const again = `npm run fuzz -- --target ${name} --seed ${seed} --path ${path}`
      throw new Error(`${(error as Error).message}; to see it again: ${again}`, { cause: error })
    }
    expect(operations).toBeGreaterThanOrEqual(OPERATIONS)
  })
})

describe('the fuzzer', () => {
  /** Goes wrong where a word that ends in 77 comes some time after one that ends in 5. */
  const fragile = {
    async run(operations: readonly number[]) {
      let isBroken = false
      for (const operation of operations) {
        if (operation % 10 === 5) isBroken = true
        if (isBroken && operation % 100 === 77) throw new Error('it broke')
      }
    },
  }

  it('finds what goes wrong, leaves out what does not matter, and can do it again', async () => {
    const { failure } = await fuzz(fragile, { operations: 1_000_000, seed: 1 })
    expect(failure!.operations.slice(0, 2).map((operation) => operation % 10)).toEqual([5, 7])
    expect(failure!.operations.length).toBeLessThan(5)
    expect(failure!.error).toMatchObject({ message: 'it broke' })
    const { seed, path } = failure!
    const again = await fuzz(fragile, { operations: 1_000_000, seed, path })
    expect(again.failure!.operations).toEqual(failure!.operations)
  })

  it('does the same with the same seed, and as much as it is asked for', async () => {
    const runs = async (seed: number) => {
      const seen: number[] = []
      const target = { run: async (operations: readonly number[]) => void seen.push(...operations) }
      const { operations } = await fuzz(target, { operations: 60_000, seed })
      expect(operations).toBe(seen.length)
      expect(operations).toBeGreaterThanOrEqual(60_000)
      return seen
    }
    const first = await runs(7)
    expect(await runs(7)).toEqual(first)
    expect(await runs(8)).not.toEqual(first)
  })

  it('sees memory that is kept', async () => {
    const kept: unknown[] = []
    const leaky = {
      run: async () => {
        kept.push(Array.from({ length: 50_000 }, Math.random))
      },
    }
    await expect(fuzz(leaky, { operations: 80_000, seed: 1 })).rejects.toThrow(/growth/)
  })
})
