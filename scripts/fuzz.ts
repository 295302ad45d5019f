// `npm run fuzz [-- --target NAME] [--operations N] [--seed S] [--path P]`: random operations to virtio's
// queues, registers and devices, and a look at everything after each. All targets in turn, unless one is
// named. A failure is printed with the seed and path that show it again.
import { parseArgs } from 'node:util'
import { Worker } from 'node:worker_threads'
import { fuzz } from '../test/fuzz/engine.js'
import { TARGETS } from '../test/fuzz/targets.js'

const DEFAULT_OPERATIONS = 1_000_000
/** How often there is a line about how far it is, in ms. */
const REPORT_INTERVAL = 10_000
/** So long in one batch, which takes less than a second, and something hangs: in ms. */
const HANG_LIMIT = 120_000

function usage(message: string): never {
  const names = Object.keys(TARGETS).join('|')
  console.error(
    `fuzz: ${message}\nusage: npm run fuzz -- [--target ${names}] [--operations N] [--seed S] [--path P]`,
  )
  process.exit(2)
}

function parse() {
  try {
    return parseArgs({
      options: {
        target: { type: 'string' },
        operations: { type: 'string', default: String(DEFAULT_OPERATIONS) },
        seed: { type: 'string', default: String(Math.floor(Math.random() * 2 ** 31)) },
        path: { type: 'string' },
      },
    }).values
  } catch (error) {
    return usage((error as Error).message)
  }
}

/**
 * Ends the process when no batch begins any more: nothing on this thread could, for a device that hangs.
 *
 * @returns to be called when one begins, with its seed
 */
function watch(target: string): { began(seed: number): void; end(): Promise<number> } {
  const shared = new Int32Array(new SharedArrayBuffer(8))
  const worker = new Worker(
    `
    const { workerData: { shared, target, limit } } = require('node:worker_threads')
    const { writeSync } = require('node:fs')
    for (;;) {
      const batch = Atomics.load(shared, 0)
      if (batch < 0) break
      if (Atomics.wait(shared, 0, batch, limit) !== 'timed-out') continue
      writeSync(2, \`\${target}: HANGS with seed \${Atomics.load(shared, 1)}\\n\`)
      process.kill(process.pid, 'SIGKILL')
    }
    `,
    { eval: true, workerData: { shared, target, limit: HANG_LIMIT } },
  )
  return {
    began(seed) {
      Atomics.store(shared, 1, seed)
      Atomics.add(shared, 0, 1)
      Atomics.notify(shared, 0)
    },
    end() {
      Atomics.store(shared, 0, -1)
      Atomics.notify(shared, 0)
      return worker.terminate()
    },
  }
}

/** @returns whether nothing went wrong */
async function fuzzOne(name: string, operations: number, seed: number, path?: string): Promise<boolean> {
  const start = process.hrtime.bigint()
  let reported = start
  const rate = (done: number) => {
    const seconds = Number(process.hrtime.bigint() - start) / 1e9
    return `${done} operations in ${seconds.toFixed(1)} s, ${Math.round(done / seconds)}/s`
  }
  console.log(`${name}: seed ${seed}`)
  const watchdog = watch(name)
  try {
    const report = await fuzz(TARGETS[name]!(), {
      operations,
      seed,
      ...(path === undefined ? {} : { path }),
      onProgress(done, batchSeed) {
        watchdog.began(batchSeed)
        const now = process.hrtime.bigint()
        if (now - reported < BigInt(REPORT_INTERVAL) * 1_000_000n) return
        reported = now
        console.log(`${name}: ${rate(done)}`)
      },
    })
    const { failure } = report
    if (failure === undefined) {
      console.log(`${name}: nothing wrong in ${rate(report.operations)}`)
      return true
    }
    console.error(failure.error)
    console.error(`${name}: FAILED with operations ${failure.operations.join(' ')}`)
    console.error(`again: npm run fuzz -- --target ${name} --seed ${failure.seed} --path ${failure.path}`)
    return false
  } finally {
    await watchdog.end()
  }
}

const { target, operations, seed, path } = parse()
if (target !== undefined && !Object.hasOwn(TARGETS, target)) usage(`there is no target ${target}`)
if (!/^[1-9]\d*$/.test(operations)) usage(`${operations} is no number of operations`)
if (!/^-?\d+$/.test(seed)) usage(`${seed} is no seed`)
if (path !== undefined && target === undefined) usage('a path is one of a target')
const names = target === undefined ? Object.keys(TARGETS) : [target]
for (const name of names) {
  if (await fuzzOne(name, Number(operations), Number(seed), path)) continue
  process.exitCode = 1
  break
}
