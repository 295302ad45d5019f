/** What all benchmarks share: samples and medians, interleaving, processes, the C program. */

import { execFile, execFileSync, fork } from 'node:child_process'
import { once } from 'node:events'
import { mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { basename, join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { promisify } from 'node:util'

/** What a benchmark gets from the runner. */
export interface Context {
  /** How often each contestant runs: `full`, or less where the results need not be good. */
  rounds(full: number): number
  /** Runs the C program of baseline.c and gives what it prints. */
  baseline(...args: (string | number)[]): Promise<number>
  /** The C program, for benchmarks that start it themselves. */
  readonly baselinePath: string
  /** A directory for files, removed at the end. */
  readonly directory: string
}

/** The value in the middle, or the mean of the two there. */
export function median(values: readonly number[]): number {
  return percentile(values, 50)
}

/** The value that `percent` of all values do not exceed; between two values, what lies proportionally between. */
export function percentile(values: readonly number[], percent: number): number {
  if (values.length === 0) throw new Error('Expected at least one sample')
  const sorted = [...values].sort((a, b) => a - b)
  const at = ((sorted.length - 1) * percent) / 100
  const below = sorted[Math.floor(at)]!
  return below + (sorted[Math.ceil(at)]! - below) * (at - Math.floor(at))
}

/**
 * Runs the contestants in turn, forth and back (A B C, C B A, …), so that what else the host does hits all of them
 * alike.
 *
 * @param contestants - each measures once and gives the figure, or several of them
 * @returns the figures of each, one a round. A first round, which warms up caches and compilers, is left out.
 */
export async function interleave<Name extends string, Sample = number>(
  rounds: number,
  contestants: Readonly<Record<Name, () => Sample | Promise<Sample>>>,
): Promise<Record<Name, Sample[]>> {
  const names = Object.keys(contestants) as Name[]
  const samples = Object.fromEntries(names.map((name) => [name, []])) as unknown as Record<Name, Sample[]>
  for (let round = 0; round <= rounds; round++) {
    for (const name of names) {
      const sample = await contestants[name]()
      if (round > 0) samples[name].push(sample)
    }
    names.reverse()
  }
  return samples
}

/** Nanoseconds that a call takes. */
export async function time(call: () => unknown): Promise<number> {
  const start = process.hrtime.bigint()
  await call()
  return Number(process.hrtime.bigint() - start)
}

export function sleep(milliseconds: number): Promise<void> {
  return new Promise((resolve) => setTimeout(resolve, milliseconds))
}

/** The built package: what a user imports. */
export const PACKAGE = new URL('../dist/index.js', import.meta.url).href

/** The same for `nodevisor/kvm`. */
export const METAL_PACKAGE = new URL('../dist/kvm/index.js', import.meta.url).href

/** A kernel of `guests/`. */
export function guestPath(file: string): string {
  return fileURLToPath(new URL(`../build/guests/${file}`, import.meta.url))
}

/** Starts a module of this folder in a process of its own, which sends a message. */
export function startProcess(file: string, args: readonly (string | number)[] = [], options: string[] = []) {
  const path = fileURLToPath(new URL(file, import.meta.url))
  const child = fork(path, args.map(String), { execArgv: [...process.execArgv, ...options] })
  const exit = once(child, 'exit')
  return {
    child,
    exit,
    /** The next message. */
    async message<Message>(): Promise<Message> {
      const ended = exit.then(([status]) => {
        throw new Error(`Expected a message from ${file} but it ended with status ${status}`)
      })
      const [received] = await Promise.race([once(child, 'message'), ended])
      return received as Message
    },
  }
}

/** Compiles a C program of this folder. @returns its path */
export function compile(source: string, directory: string): string {
  const path = join(directory, basename(source, '.c'))
  const from = fileURLToPath(new URL(source, import.meta.url))
  execFileSync(process.env.CC ?? 'cc', ['-O2', '-Wall', '-Wextra', '-o', path, from], { stdio: 'inherit' })
  return path
}

/** Compiles the C program and gives what benchmarks need, to `use`. */
export async function withContext(quick: boolean, use: (context: Context) => Promise<void>): Promise<void> {
  const directory = mkdtempSync(join(tmpdir(), 'nodevisor-bench-'))
  try {
    const baselinePath = compile('baseline.c', directory)
    const run = promisify(execFile)
    await use({
      directory,
      baselinePath,
      rounds: (full) => (quick ? Math.max(1, Math.round(full / 5)) : full),
      async baseline(...args) {
        return Number((await run(baselinePath, args.map(String))).stdout)
      },
    })
  } finally {
    rmSync(directory, { recursive: true, force: true })
  }
}
