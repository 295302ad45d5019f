// `npm run test:lab`: runs the tests where KVM is true kvm_amd, in a Debian kernel on the AMD-V that QEMU's software
// CPU emulates. Needs no /dev/kvm. Arguments go to vitest; `--exec COMMAND` runs something else in the lab.
import { appendFileSync, readdirSync, statSync } from 'node:fs'
import { mkdtemp, rm } from 'node:fs/promises'
import { availableParallelism, tmpdir } from 'node:os'
import { dirname, join, relative } from 'node:path'
import { fileURLToPath } from 'node:url'
import { Listr } from 'listr2'
import {
  cachedKernel as cachedLinux,
  KERNEL_NAMES,
  kernelCache,
  type LinuxKernel,
  makeKernel,
} from '../src/linux/kernels.js'
import { findProgram, LAB_HOME, type LabExtras, packLab } from './lab/contents.js'
import { cachedKernel, downloadKernel, type LabKernel } from './lab/kernel.js'
import { EVENTS, initScript, runLab, shellQuote } from './lab/machine.js'
import { makingIn } from './making.js'
import type { TestEvent } from './test-events.js'

const ROOT = fileURLToPath(new URL('..', import.meta.url))
/** How many labs run at the same time, each with some of the test files: there is one processor in each. */
const MAX_LABS = 2
/** MiB: the file system is in memory, beside Node.js and the guests. */
const MEMORY = 3072
/** The whole lab, in ms. */
const TIME_LIMIT = 45 * 60_000
/** JavaScript takes 20 to 50 times as long in there. */
const TEST_LIMIT = 160_000
/**
 * So long without a word, in ms, and the lab hangs: an emulated processor in an emulated processor sometimes does. A test
 * has two tries before there is one.
 */
const STALL_LIMIT = 2 * TEST_LIMIT + 30_000
/** How often the tests that a lab did not get to are given to another one. */
const MAX_ATTEMPTS = 4
/** How many labs a test file may be running in when they hang. */
const MAX_HANGS = 2
/** Take the ready-made kernels into the lab. */
const LINUX_TESTS = 'test/linux/'
/** Not run unless named. */
const ONLY_BY_NAME = [
  // Dozens of processes that end in the middle of a run: it takes minutes in here, and now and then an emulated processor
  // hangs in it for good.
  'test/machine/hostile-node.test.ts',
  // Nothing of KVM's in them, but many minutes of JavaScript.
  'test/backends/',
  'test/fuzz/',
  'test/virtio/',
  // Needs kernels that take minutes to make.
  LINUX_TESTS,
]
/** What a shell says of a process that was killed for its time. */
const TIMED_OUT = 124
const FAILED = 125

/** Programs that are needed, with the Debian packages that have them. */
const PROGRAMS: Readonly<Record<string, string>> = {
  'qemu-system-x86_64': 'qemu-system-x86',
  busybox: 'busybox-static',
}
/** The same, of those that the tests of Linux use in the lab. */
const LINUX_PROGRAMS: Readonly<Record<string, string>> = { mke2fs: 'e2fsprogs', e2fsck: 'e2fsprogs' }

interface State {
  kernel?: LabKernel
  extras?: LabExtras
  status?: number
  results?: readonly LabResult[]
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
  /** Whether a test failed in a file that has come to its end, or outside of any. */
  hasFailed = false
  /** Tests that passed at another try. */
  readonly retried: string[] = []

  constructor(files: readonly string[]) {
    this.#files = files
  }

  /** Those of a lab's files that have not come to their end. */
  leftOf(files: readonly string[]): string[] {
    return files.filter((file) => !this.#finished.has(file))
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
        if (event.state === 'passed' && event.retries > 0) this.retried.push(event.name)
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
   * A lab with these files hung: one that it had begun and not ended is tried once more in another lab, as it need not
   * have been the cause; a second time it is.
   *
   * @returns those that it had begun
   */
  takeHang(files: readonly string[]): string[] {
    const begun = files.filter((file) => this.#pending.has(file))
    for (const file of begun) {
      const hangs = (this.#hangs.get(file) ?? 0) + 1
      this.#hangs.set(file, hangs)
      if (hangs < MAX_HANGS) continue
      this.#finished.add(file)
      publish(this.#pending.get(file)!)
      const event: TestEvent = { event: 'error', message: `${file} hung in ${hangs} labs` }
      this.take(event, JSON.stringify(event))
    }
    for (const file of begun) this.#pending.delete(file)
    return begun
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

/** Divides test files among labs, the largest first, as those tend to take longest. */
function divide(files: readonly string[]): string[][] {
  const sizeOf = (file: string) => statSync(join(ROOT, file)).size
  const count = Math.max(1, Math.min(MAX_LABS, availableParallelism(), files.length))
  const parts = Array.from({ length: count }, (): string[] => [])
  for (const [index, file] of files.toSorted((a, b) => sizeOf(b) - sizeOf(a)).entries()) {
    parts[index % count]!.push(file)
  }
  return parts
}

function checkPrograms(needed: Readonly<Record<string, string>>): void {
  const missing = Object.keys(needed).filter((program) => findProgram(program) === undefined)
  if (missing.length === 0) return
  const packages = [...new Set(missing.map((program) => needed[program]))].join(' ')
  throw new Error(`${missing.join(' and ')} not found; on Debian: apt-get install ${packages}`)
}

/** What the tests of Linux need in the lab: the kernels where they are made here, and what makes and checks ext4. */
function linuxExtras(kernels: readonly LinuxKernel[]): LabExtras {
  const cache = `${LAB_HOME}/.cache/nodevisor/linux`
  return {
    folders: Object.fromEntries(
      kernels.map(({ image }) => {
        const folder = dirname(image)
        return [`${cache}/${relative(kernelCache(), folder)}`, folder]
      }),
    ),
    programs: Object.keys(LINUX_PROGRAMS),
  }
}

/** A shell command, and what it finds in its environment. */
interface LabCommand {
  readonly command: string
  readonly environment: Readonly<Record<string, string>>
}

function testCommand(files: readonly string[], options: readonly string[]): LabCommand {
  const vitest = [
    ...['node', 'node_modules/vitest/vitest.mjs', 'run'],
    ...['--maxWorkers', '1', '--no-cache'],
    // QEMU's VMRUN does not load the interrupt shadow (svm_helper.c: int_state): an interrupt that comes with an exit
    // between a guest's `sti` and `hlt` is taken before the `hlt`, which then waits for what has been.
    ...['--retry', '1'],
  ]
  return {
    command: [...vitest, ...options, ...files].map(shellQuote).join(' '),
    environment: {
      NODEVISOR_TEST_EVENTS: EVENTS,
      NODEVISOR_TEST_LIMIT: String(TEST_LIMIT),
      NODEVISOR_TEST_LINUX: '1',
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

/** What every lab needs, and who listens. */
interface LabPlace {
  readonly kernel: LabKernel
  readonly extras: LabExtras
  /** Where its file system goes. */
  readonly folder: string
  readonly stop: AbortSignal
  readonly onBoot: () => void
  readonly onEvent: (event: TestEvent) => void
}

interface LabResult {
  /** The command's exit status; undefined if the lab hung, or was stopped. */
  readonly status: number | undefined
  readonly output: string[]
}

/** Boots a lab for one command. */
function runInLab(command: string, place: LabPlace): Promise<LabResult> {
  return oneLab({ command, environment: {} }, 'initramfs', place)
}

/** Runs test files in a lab, and in another one those that are left if it hangs. */
async function runTests(
  job: {
    readonly files: readonly string[]
    readonly progress: Progress
    readonly options: readonly string[]
  },
  number: number,
  place: LabPlace,
): Promise<LabResult> {
  const { files, progress, options } = job
  const output: string[] = []
  for (let attempt = 1; attempt <= MAX_ATTEMPTS && !place.stop.aborted; attempt++) {
    let lastTest = 'nothing'
    const listener = (event: TestEvent, line: string) => {
      progress.take(event, line)
      if (event.event === 'test') lastTest = event.name
      place.onEvent(event)
    }
    const command = testCommand(progress.leftOf(files), options)
    const result = await oneLab(command, `initramfs-${number}-${attempt}`, place, listener)
    output.push(...result.output)
    if (result.status !== undefined) return { status: result.status, output }
    const hung = progress.takeHang(files)
    if (hung.length > 0) output.push(`The lab hung in ${hung.join(' and ')}, after: ${lastTest}`)
    const { length } = progress.leftOf(files)
    // What hung for good has been counted as an error.
    if (length === 0) return { status: 0, output }
    output.push(`Another lab gets the ${length} files that are left.`)
  }
  return { status: undefined, output }
}

/** Boots one lab. */
async function oneLab(
  { command, environment }: LabCommand,
  name: string,
  { kernel, extras, folder, stop, onBoot }: LabPlace,
  onEvent?: (event: TestEvent, line: string) => void,
): Promise<LabResult> {
  const initramfs = join(folder, name)
  packLab(initramfs, ROOT, kernel, initScript(command, environment), extras)
  const stalled = new AbortController()
  let watchdog: NodeJS.Timeout | undefined
  const alive = () => {
    clearTimeout(watchdog)
    watchdog = setTimeout(() => stalled.abort(), STALL_LIMIT)
  }
  alive()
  const signal = AbortSignal.any([stop, stalled.signal])
  const output: string[] = []
  try {
    const status = await runLab({
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
        const event = parseEvent(line)
        if (event !== undefined) onEvent?.(event, line)
      },
    })
    return { status, output }
  } catch (error) {
    if (signal.aborted) return { status: undefined, output }
    throw error
  } finally {
    clearTimeout(watchdog)
    await rm(initramfs, { force: true })
  }
}

async function main(args: readonly string[]): Promise<number> {
  const exec = args[0] === '--exec' ? args.slice(1).join(' ') : undefined
  const options = args.filter((arg) => arg.startsWith('-'))
  const files = exec === undefined ? testFiles(args.filter((arg) => !arg.startsWith('-'))) : []
  const isLinux = files.some((file) => file.startsWith(LINUX_TESTS))
  const progress = new Progress(files)
  const folder = await mkdtemp(join(tmpdir(), 'nodevisor-lab-'))
  const stop = new AbortController()
  const timer = setTimeout(() => stop.abort(), TIME_LIMIT)
  for (const signal of ['SIGINT', 'SIGTERM'] as const) process.once(signal, () => stop.abort())

  const tasks = new Listr<State>(
    [
      {
        title: 'looking for programs',
        task: () => checkPrograms(isLinux ? { ...PROGRAMS, ...LINUX_PROGRAMS } : PROGRAMS),
      },
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
        title: 'getting the kernels of the tests',
        enabled: () => isLinux,
        task: async (state, task) => {
          const making = makingIn(task, stop.signal)
          const kernels: LinuxKernel[] = []
          for (const name of KERNEL_NAMES) {
            kernels.push((await cachedLinux(name)) ?? (await makeKernel(name, making)))
          }
          state.extras = linuxExtras(kernels)
          task.title = kernels.map(({ name, version }) => `${name} ${version}`).join(', ')
        },
      },
      {
        title: 'running the labs',
        task: async (state, task) => {
          const started = performance.now()
          const seconds = () => `${Math.round((performance.now() - started) / 1000)} s`
          const onBoot = () => {
            task.title = `running, booted after ${seconds()}`
          }
          const onEvent = (event: TestEvent) => {
            // Where nobody watches, a line for each file is enough.
            if (process.stdout.isTTY || event.event === 'file-end') task.output = String(progress)
          }
          const jobs =
            exec === undefined
              ? divide(files).map((part) => ({ files: part, progress, options }))
              : [{ command: exec }]
          const place = {
            kernel: state.kernel!,
            extras: state.extras ?? {},
            folder,
            stop: stop.signal,
            onBoot,
            onEvent,
          }
          const results = await Promise.all(
            jobs.map((job, index) =>
              'command' in job ? runInLab(job.command, place) : runTests(job, index, place),
            ),
          )
          task.title = `the labs ran for ${seconds()}`
          state.results = results
          const statuses = results.map(({ status }) => status ?? (stop.signal.aborted ? TIMED_OUT : FAILED))
          state.status = statuses.find((status) => status !== 0) ?? 0
          // Also where the lab in which it failed hung afterwards.
          if (state.status === 0 && progress.hasFailed) state.status = 1
        },
      },
    ],
    { fallbackRenderer: 'simple' },
  )
  try {
    const { status = FAILED, results = [] } = await tasks.run({})
    for (const { output } of results) console.log(output.join('\n'))
    for (const name of progress.retried) console.log(`passed at the second try: ${name}`)
    if (stop.signal.aborted) console.error('The lab was stopped before its end.')
    else if (status === FAILED) console.error('A lab ended without a word of the command.')
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
