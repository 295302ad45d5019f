// `npm run test:lab`: runs the tests where KVM is true kvm_amd, in a Debian kernel on the AMD-V that QEMU's software
// CPU emulates. Needs no /dev/kvm. Arguments go to vitest; `--exec COMMAND` runs something else in the lab.
import { appendFileSync, readdirSync } from 'node:fs'
import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { Listr } from 'listr2'
import { findProgram, packLab } from './lab/contents.js'
import { cachedKernel, downloadKernel, type LabKernel } from './lab/kernel.js'
import { EVENTS, initScript, runLab, shellQuote } from './lab/machine.js'
import type { TestEvent } from './test-events.js'

const ROOT = fileURLToPath(new URL('..', import.meta.url))
/** MiB: the file system is in memory, beside Node.js and the guests. */
const MEMORY = 3072
/** The whole lab, in ms. */
const TIME_LIMIT = 45 * 60_000
/** JavaScript takes 20 to 50 times as long in there. */
const TEST_LIMIT = 240_000
/** So long without a word, in ms, and the lab hangs: an emulated processor in an emulated processor sometimes does. */
const STALL_LIMIT = 300_000
/** How often the tests that a lab did not get to are given to another one. */
const MAX_ATTEMPTS = 4
/** How many labs a test file may be running in when they hang. */
const MAX_HANGS = 2
/** Not run unless named. */
const ONLY_BY_NAME = [
  // Dozens of processes that end in the middle of a run: it takes minutes in here, and now and then an emulated processor
  // hangs in it for good.
  'test/machine/hostile-node.test.ts',
  // Nothing of KVM's in them, but many minutes of JavaScript.
  'test/backends/',
  'test/fuzz/',
  'test/virtio/',
]
/** What a shell says of a process that was killed for its time. */
const TIMED_OUT = 124
const FAILED = 125

const PROGRAMS: Readonly<Record<string, string>> = {
  'qemu-system-x86_64': 'qemu-system-x86',
  busybox: 'busybox-static',
}

interface State {
  kernel?: LabKernel
  status?: number
}

/**
 * What the tests have come to. A file counts when it has come to its end: what a lab that hangs had begun is for the
 * next one.
 */
class Progress {
  readonly #files: readonly string[]
  readonly #finished = new Set<string>()
  readonly #pending = new Map<string, string[]>()
  readonly #failing = new Set<string>()
  readonly #hangs = new Map<string, number>()
  readonly #counts = { passed: 0, failed: 0, skipped: 0 }
  #file = ''
  #lastTest = 'nothing'
  /** Whether a test failed in a file that has come to its end, or outside of any. */
  hasFailed = false

  constructor(files: readonly string[]) {
    this.#files = files
  }

  /** Files that have not come to their end. */
  get left(): string[] {
    return this.#files.filter((file) => !this.#finished.has(file))
  }

  take(event: TestEvent, line: string): void {
    switch (event.event) {
      case 'file':
        this.#file = event.file
        this.#pending.set(event.file, [line])
        this.#failing.delete(event.file)
        break
      case 'file-end':
        this.#finished.add(event.file)
        if (this.#failing.has(event.file)) this.hasFailed = true
        publish([...(this.#pending.get(event.file) ?? []), line])
        this.#pending.delete(event.file)
        break
      case 'test':
        this.#counts[event.state]++
        this.#lastTest = event.name
        if (event.state === 'failed') this.#failing.add(event.name.split(' > ')[0]!)
        this.#pending.get(event.name.split(' > ')[0]!)?.push(line)
        break
      case 'error':
        this.#counts.failed++
        this.hasFailed = true
        publish([line])
        break
      default:
        publish([line])
    }
  }

  /**
   * A lab hung: a file that it had begun and not ended is tried once more in another one, as it need not have been the
   * cause; a second time it is.
   *
   * @returns those files
   */
  takeHang(): string[] {
    const begun = [...this.#pending.keys()]
    for (const file of begun) {
      const hangs = (this.#hangs.get(file) ?? 0) + 1
      this.#hangs.set(file, hangs)
      if (hangs < MAX_HANGS) continue
      this.#finished.add(file)
      publish(this.#pending.get(file)!)
      const event: TestEvent = { event: 'error', message: `${file} hung in ${hangs} labs` }
      this.take(event, JSON.stringify(event))
    }
    this.#pending.clear()
    return begun
  }

  /** The test that ended last. */
  get lastTest(): string {
    return this.#lastTest
  }

  toString(): string {
    const { passed, failed, skipped } = this.#counts
    const files = `${this.#finished.size} of ${this.#files.length} files`
    return `${files}, ${passed} passed, ${failed} failed, ${skipped} skipped: ${this.#file}`
  }
}

/** Hands events on to whoever started this, see test-events.ts. */
function publish(lines: readonly string[]): void {
  const path = process.env.NODEVISOR_TEST_EVENTS
  if (path) appendFileSync(path, lines.map((line) => `${line}\n`).join(''))
}

/** The test files whose names have one of the texts in them, or all. */
function testFiles(filters: readonly string[]): string[] {
  return readdirSync(join(ROOT, 'test'), { recursive: true, encoding: 'utf8' })
    .map((file) => `test/${file}`)
    .filter((file) => file.endsWith('.test.ts') && !file.startsWith('test/package/'))
    .filter((file) =>
      filters.length === 0
        ? !ONLY_BY_NAME.some((name) => file.startsWith(name))
        : filters.some((filter) => file.includes(filter)),
    )
    .sort()
}

function checkPrograms(): void {
  const missing = Object.keys(PROGRAMS).filter((program) => findProgram(program) === undefined)
  if (missing.length === 0) return
  const packages = missing.map((program) => PROGRAMS[program]).join(' ')
  throw new Error(`${missing.join(' and ')} not found; on Debian: apt-get install ${packages}`)
}

/** A shell command, and what it finds in its environment. */
interface LabCommand {
  readonly command: string
  readonly environment: Readonly<Record<string, string>>
}

function testCommand(files: readonly string[], options: readonly string[]): LabCommand {
  const vitest = [
    ...['node', 'node_modules/vitest/vitest.mjs', 'run'],
    ...['--maxWorkers', '2', '--no-cache'],
  ]
  return {
    command: [...vitest, ...options, ...files].map(shellQuote).join(' '),
    environment: {
      NODEVISOR_TEST_EVENTS: EVENTS,
      NODEVISOR_TEST_LIMIT: String(TEST_LIMIT),
      CI: 'true',
      NO_COLOR: '1',
    },
  }
}

function parseEvent(line: string): TestEvent | undefined {
  try {
    return JSON.parse(line) as TestEvent
  } catch {
    return undefined
  }
}

/** Boots one lab. @returns the command's exit status; undefined if the lab hung, or was stopped */
async function oneLab(
  kernel: LabKernel,
  initramfs: string,
  stop: AbortSignal,
  onBoot: () => void,
  onEvent: (line: string) => void,
  output: string[],
): Promise<number | undefined> {
  const stalled = new AbortController()
  let watchdog: NodeJS.Timeout | undefined
  const alive = () => {
    clearTimeout(watchdog)
    watchdog = setTimeout(() => stalled.abort(), STALL_LIMIT)
  }
  alive()
  const signal = AbortSignal.any([stop, stalled.signal])
  try {
    return await runLab({
      kernel,
      initramfs,
      memory: MEMORY,
      signal,
      onBoot,
      onOutput: (line) => {
        alive()
        output.push(line)
      },
      onEvent: (line) => {
        alive()
        onEvent(line)
      },
    })
  } catch (error) {
    if (signal.aborted) return undefined
    throw error
  } finally {
    clearTimeout(watchdog)
  }
}

async function main(args: readonly string[]): Promise<number> {
  const exec = args[0] === '--exec' ? args.slice(1).join(' ') : undefined
  const options = args.filter((arg) => arg.startsWith('-'))
  const progress = new Progress(
    exec === undefined ? testFiles(args.filter((arg) => !arg.startsWith('-'))) : [],
  )
  const folder = await mkdtemp(join(tmpdir(), 'nodevisor-lab-'))
  const stop = new AbortController()
  const timer = setTimeout(() => stop.abort(), TIME_LIMIT)
  for (const signal of ['SIGINT', 'SIGTERM'] as const) process.once(signal, () => stop.abort())
  const output: string[] = []

  const tasks = new Listr<State>(
    [
      { title: 'looking for programs', task: checkPrograms },
      {
        title: 'getting a kernel',
        task: async (state, task) => {
          const kernel =
            (await cachedKernel()) ??
            (await downloadKernel(stop.signal, (text) => {
              task.title = text
            }))
          state.kernel = kernel
          task.title = `kernel ${kernel.version}`
        },
      },
      {
        title: 'running the lab',
        task: async (state, task) => {
          const started = performance.now()
          const seconds = () => `${Math.round((performance.now() - started) / 1000)} s`
          for (let attempt = 1; attempt <= MAX_ATTEMPTS && !stop.signal.aborted; attempt++) {
            const { command, environment } =
              exec === undefined ? testCommand(progress.left, options) : { command: exec, environment: {} }
            const initramfs = join(folder, `initramfs-${attempt}`)
            task.title = `packing the project`
            const packed = packLab(initramfs, ROOT, state.kernel!, initScript(command, environment))
            task.title = `booting ${packed}`
            const status = await oneLab(
              state.kernel!,
              initramfs,
              stop.signal,
              () => {
                task.title = `running, booted after ${seconds()}`
              },
              (line) => {
                const event = parseEvent(line)
                if (event === undefined) return
                progress.take(event, line)
                // Where nobody watches, a line for each file is enough.
                if (process.stdout.isTTY || event.event === 'file-end') task.output = String(progress)
              },
              output,
            )
            const hung = status === undefined ? progress.takeHang() : []
            if (hung.length > 0)
              output.push(`The lab hung in ${hung.join(' and ')}, after: ${progress.lastTest}`)
            // A lab that hung has the rest done by another; what vitest then says is of the rest.
            if (status !== undefined || exec !== undefined || progress.left.length === 0) {
              state.status = status ?? (exec === undefined ? 0 : FAILED)
              break
            }
            output.push(`Another lab gets the ${progress.left.length} files that are left.`)
          }
          task.title = `the lab ran for ${seconds()}`
          state.status ??= stop.signal.aborted ? TIMED_OUT : FAILED
          // Also where the lab in which it failed hung afterwards.
          if (state.status === 0 && progress.hasFailed) state.status = 1
        },
      },
    ],
    { fallbackRenderer: 'simple' },
  )
  try {
    const { status = FAILED } = await tasks.run({})
    console.log(output.join('\n'))
    if (stop.signal.aborted) console.error('The lab was stopped before its end.')
    else if (status === FAILED) console.error('The lab ended without a word of the command.')
    return status
  } catch (error) {
    // Listr has shown which step failed; what follows says why.
    console.error(error instanceof Error ? error.message : error)
    return FAILED
  } finally {
    clearTimeout(timer)
    await rm(folder, { recursive: true, force: true })
  }
}

process.exitCode = await main(process.argv.slice(2))
