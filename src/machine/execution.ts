import { binding, type NativeInlineLoop, type NativeVcpuThread, systemError } from '../binding.js'
import type { VcpuExit } from '../kvm/exits.js'
import type { ExecutionMode } from './options.js'
import type { VirtualCpu } from './virtual-cpu.js'

/** One vCPU on its way through a run. */
export interface Runner {
  readonly cpu: VirtualCpu
  /** Whether the run is to end before the guest is entered again. */
  readonly ending: boolean
  /** @returns whether the vCPU shall enter the guest again */
  handle(exit: VcpuExit): boolean
  /** KVM_RUN failed. */
  fail(error: unknown): void
  /** The vCPU is out of the guest and will not enter it again by itself. Called once. */
  done(): void
}

/** A way to run vCPUs: where KVM_RUN runs. All that is decided about exits is the {@link Runner}'s. */
export interface Execution {
  readonly mode: Exclude<ExecutionMode, 'auto'>
  /** Lets a vCPU run until its runner says no or is ending. */
  start(runner: Runner): void
  /** Takes a vCPU out of the guest soon; whether it goes on is the runner's to say. */
  kick(runner: Runner): void
}

/** A slice in which JavaScript has run ends after this long, in ms: what it caused needs the event loop to turn. */
const SLICE_WITH_EXITS = 2

/**
 * KVM_RUN on the JavaScript thread, in slices between the turns of the event loop. A slice ends as soon as the loop
 * has work.
 */
class InlineExecution implements Execution {
  readonly mode = 'inline'
  readonly #runners: Runner[] = []
  #loop: NativeInlineLoop | undefined
  #leave = new Int32Array(1)
  #next = 0
  #inSlice = false

  start(runner: Runner): void {
    if (this.#loop === undefined) {
      this.#loop = new (binding().InlineLoop)(() => this.#slice())
      this.#leave = new Int32Array(this.#loop.control())
    }
    this.#runners.push(runner)
    this.#loop.start()
  }

  /** The guest is not being run while this is: the next slice, or the one under way, looks at the runner first. */
  kick(): void {}

  /** Ends the slice under way, if one is, and gives what was begun in it a moment. */
  yield(): void {
    if (!this.#inSlice) return
    this.#leave[0] = 1
    this.#loop!.linger()
  }

  #slice(): void {
    this.#inSlice = true
    try {
      this.#runSlice()
    } finally {
      this.#inSlice = false
    }
  }

  #runSlice(): void {
    const loop = this.#loop!
    const leave = this.#leave
    this.#next = (this.#next + 1) % this.#runners.length
    const runner = this.#runners[this.#next]!
    let limited = false
    try {
      if (!runner.ending) {
        if (!loop.target(runner.cpu.unsafeVcpu.native)) return
        if (this.#runners.length > 1) {
          loop.limit(SLICE_WITH_EXITS)
          limited = true
        }
        while (runner.handle(runner.cpu.enter())) {
          if (leave[0] !== 0) return
          if (!limited) {
            loop.limit(SLICE_WITH_EXITS)
            limited = true
          }
        }
      }
    } catch (error) {
      runner.fail(error)
    }
    this.#runners.splice(this.#runners.indexOf(runner), 1)
    if (this.#runners.length === 0) loop.stop()
    runner.done()
  }
}

/** KVM_RUN on a thread for each vCPU. Exits are handled on the JavaScript thread. */
class ThreadedExecution implements Execution {
  readonly mode = 'threads'
  readonly #threads = new Map<Runner, NativeVcpuThread>()

  start(runner: Runner): void {
    const { cpu } = runner
    const vcpu = cpu.unsafeVcpu
    const thread = new (binding().VcpuThread)(vcpu.native, (errno) => {
      const failed = errno !== 0 && !INTERRUPTIONS.has(errno)
      if (failed) runner.fail(systemError('KVM_RUN', errno))
      else if (runner.handle(vcpu.decodeExit(errno))) {
        this.#resume(runner, thread)
        return
      }
      this.#done(runner, thread)
    })
    this.#threads.set(runner, thread)
    const pending = cpu.takePending()
    // As for every exit: the caller goes on before the run can be over.
    if (runner.ending || (pending !== undefined && !runner.handle(pending))) {
      setImmediate(() => this.#done(runner, thread))
    } else {
      this.#resume(runner, thread)
    }
  }

  kick(runner: Runner): void {
    this.#threads.get(runner)?.kick()
  }

  #resume(runner: Runner, thread: NativeVcpuThread): void {
    try {
      runner.cpu.entering()
      thread.resume()
    } catch (error) {
      runner.fail(error)
      setImmediate(() => this.#done(runner, thread))
    }
  }

  #done(runner: Runner, thread: NativeVcpuThread): void {
    thread.stop()
    this.#threads.delete(runner)
    runner.done()
  }
}

/** EINTR and EAGAIN: KVM_RUN has not failed. */
const INTERRUPTIONS: ReadonlySet<number> = new Set([4, 11])

// One of each in an environment: module scope is the environment's.
const inline = new InlineExecution()
const threaded = new ThreadedExecution()
let inlineRuns = 0

/**
 * Lets the event loop turn before a guest that runs on the JavaScript thread goes on. Guests on threads of their own do
 * not keep it from turning.
 */
export function yieldToLoop(): void {
  inline.yield()
}

/** The way to execute a machine that starts to run now. Give it back with {@link releaseExecution}. */
export function acquireExecution(mode: ExecutionMode, cpus: number): Execution {
  const execution =
    mode === 'inline' || (mode === 'auto' && cpus === 1 && inlineRuns === 0) ? inline : threaded
  if (execution === inline) inlineRuns++
  return execution
}

/** The run that {@link acquireExecution} was for is over. */
export function releaseExecution(execution: Execution): void {
  if (execution === inline) inlineRuns--
}
