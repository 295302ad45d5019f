// `npm run test:lab`: runs the tests where KVM is true kvm_amd, in a Debian kernel on the AMD-V that QEMU's software
// CPU emulates. Needs no /dev/kvm. Arguments go to vitest; `--exec COMMAND` runs something else in the lab.
import { appendFileSync } from 'node:fs'
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
const TIME_LIMIT = 20 * 60_000
/** JavaScript takes 20 to 50 times as long in there. */
const TEST_TIMEOUT = 240_000
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

/** What the tests have come to. */
class Progress {
  #files = 0
  #file = ''
  readonly #started = new Set<string>()
  readonly #counts = { passed: 0, failed: 0, skipped: 0 }

  take(event: TestEvent): void {
    if (event.event === 'start') this.#files = event.files
    else if (event.event === 'file') {
      this.#file = event.file
      this.#started.add(event.file)
    } else if (event.event === 'test') this.#counts[event.state]++
    else if (event.event === 'error') this.#counts.failed++
  }

  toString(): string {
    const { passed, failed, skipped } = this.#counts
    const files = `file ${this.#started.size} of ${this.#files}`
    return `${files}, ${passed} passed, ${failed} failed, ${skipped} skipped: ${this.#file}`
  }
}

function checkPrograms(): void {
  const missing = Object.keys(PROGRAMS).filter((program) => findProgram(program) === undefined)
  if (missing.length === 0) return
  const packages = missing.map((program) => PROGRAMS[program]).join(' ')
  throw new Error(`${missing.join(' and ')} not found; on Debian: apt-get install ${packages}`)
}

/** The shell command to run, and what it finds in its environment. */
function commandOf(args: readonly string[]): { command: string; environment: Record<string, string> } {
  if (args[0] === '--exec') return { command: args.slice(1).join(' '), environment: {} }
  const vitest = [
    ...['node', 'node_modules/vitest/vitest.mjs', 'run'],
    ...['--testTimeout', String(TEST_TIMEOUT), '--hookTimeout', String(TEST_TIMEOUT)],
    ...['--maxWorkers', '2', '--no-cache'],
  ]
  return {
    command: [...vitest, ...args].map(shellQuote).join(' '),
    environment: { NODEVISOR_TEST_EVENTS: EVENTS, CI: 'true', NO_COLOR: '1' },
  }
}

function parseEvent(line: string): TestEvent | undefined {
  try {
    return JSON.parse(line) as TestEvent
  } catch {
    return undefined
  }
}

async function main(args: readonly string[]): Promise<number> {
  const { command, environment } = commandOf(args)
  const folder = await mkdtemp(join(tmpdir(), 'nodevisor-lab-'))
  const initramfs = join(folder, 'initramfs')
  const stop = new AbortController()
  const timer = setTimeout(() => stop.abort(), TIME_LIMIT)
  for (const signal of ['SIGINT', 'SIGTERM'] as const) process.once(signal, () => stop.abort())
  const output: string[] = []
  const progress = new Progress()

  const tasks = new Listr<State>(
    [
      { title: 'looking for programs', task: checkPrograms },
      {
        title: 'getting a kernel',
        task: async (state, task) => {
          const kernel =
            (await cachedKernel()) ?? (await downloadKernel(stop.signal, (text) => (task.title = text)))
          state.kernel = kernel
          task.title = `kernel ${kernel.version}`
        },
      },
      {
        title: 'packing the project',
        task: (state, task) => {
          task.title = `packed ${packLab(initramfs, ROOT, state.kernel!, initScript(command, environment))}`
        },
      },
      {
        title: 'booting',
        task: async (state, task) => {
          const started = performance.now()
          let shown = 0
          const seconds = () => `${Math.round((performance.now() - started) / 1000)} s`
          const status = await runLab({
            kernel: state.kernel!,
            initramfs,
            memory: MEMORY,
            signal: stop.signal,
            onBoot: () => {
              task.title = `running, booted after ${seconds()}`
            },
            onOutput: (line) => output.push(line),
            onEvent: (line) => {
              const event = parseEvent(line)
              if (event === undefined) return
              if (process.env.NODEVISOR_TEST_EVENTS)
                appendFileSync(process.env.NODEVISOR_TEST_EVENTS, `${line}\n`)
              progress.take(event)
              // Where nobody watches, a line for each file is enough.
              if (process.stdout.isTTY || event.event === 'file' || shown++ === 0)
                task.output = String(progress)
            },
          }).catch((error: unknown) => {
            if (stop.signal.aborted) return undefined
            throw error
          })
          task.title = `the lab ran for ${seconds()}`
          state.status = status ?? (stop.signal.aborted ? TIMED_OUT : FAILED)
        },
      },
    ],
    { fallbackRenderer: 'simple' },
  )
  try {
    const { status = FAILED } = await tasks.run({})
    console.log(output.join('\n'))
    if (status === TIMED_OUT && stop.signal.aborted) console.error('The lab was stopped before its end.')
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
