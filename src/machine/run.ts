import { copyExit, type VcpuExit } from '../kvm/exits.js'
import type { MachineParts } from './builder.js'
import type { StepMode } from './dispatcher.js'
import { drainRequests } from './drain.js'
import { type Execution, type Runner, releaseExecution } from './execution.js'
import { HaltWatch } from './halt-watch.js'
import { tellPaused } from './machine-state.js'
import { makeReport, type RunReport } from './report.js'
import { type Outcome, wantsReport } from './result.js'
import type { VirtualCpu } from './virtual-cpu.js'

/** How a {@link Run} ended. */
export interface RunEnd {
  readonly outcome: Outcome | undefined
  readonly stepped: VcpuExit | undefined
}

/** One run or step: the vCPUs that are on their way, and the promise of its end. */
export class Run {
  readonly startTime = performance.now()
  endTime = this.startTime
  readonly postedBefore: number
  /** What is known of the guest, where the run ended badly. */
  report: RunReport | undefined
  readonly over: Promise<RunEnd>
  readonly #parts: MachineParts
  readonly #execution: Execution
  /** All vCPUs of the machine. */
  readonly #cpus: readonly VirtualCpu[]
  readonly #runners = new Map<VirtualCpu, Runner>()
  readonly #haltWatch: HaltWatch | undefined
  readonly #mode: StepMode
  #stepped: VcpuExit | undefined
  #resolve!: (end: RunEnd) => void
  /** How often {@link hold} was called without {@link letGo}. */
  #holds = 0
  /** Of those who hold: settles once the machine stands still. */
  #stillness: PromiseWithResolvers | undefined
  #isStill = false
  #hasEnded = false

  constructor(parts: MachineParts, execution: Execution, mode: StepMode, cpus: readonly VirtualCpu[]) {
    this.#parts = parts
    this.#execution = execution
    this.#mode = mode
    this.#cpus = cpus
    this.postedBefore = parts.posted.count
    this.over = new Promise((resolve) => {
      this.#resolve = resolve
    })
    parts.dispatcher.begin(mode)
    parts.dispatcher.onEnd = () => {
      this.#kickAll()
      if (this.#isStill) this.#finish()
    }
    if (mode === 'run' && parts.interrupts.irqchip !== 'none') {
      this.#haltWatch = new HaltWatch(() => this.#kickAll())
    }
    this.#startDevices()
  }

  /** Whether all vCPUs are out of the guest and no device does anything: see {@link hold}. */
  get isStill(): boolean {
    return this.#isStill
  }

  /** Lets a vCPU run. */
  add(cpu: VirtualCpu): void {
    const { dispatcher } = this.#parts
    const isInterrupted = () => this.#holds > 0 || this.#haltWatch?.checking === true
    const runner: Runner = {
      cpu,
      get ending() {
        return dispatcher.ending || isInterrupted()
      },
      handle: (exit) => dispatcher.dispatch(cpu, exit) && !isInterrupted(),
      fail: (error) => dispatcher.fail(error, cpu.index),
      done: () => this.#done(cpu),
    }
    this.#runners.set(cpu, runner)
    this.#execution.start(runner)
  }

  /** An interrupt waits for a vCPU: it looks when it enters the guest again. */
  interrupt(cpu: VirtualCpu): void {
    const runner = this.#runners.get(cpu)
    if (runner !== undefined) this.#execution.kick(runner)
    else if (cpu.state === 'halted') {
      cpu.wake()
      if (!this.#isStill) this.add(cpu)
    }
  }

  /** A vCPU that was parked or halted is runnable now. */
  started(cpu: VirtualCpu): void {
    if (!this.#isStill) this.add(cpu)
  }

  /**
   * Lets the machine stand still, until {@link letGo}: all vCPUs are out of the guest, at an instruction boundary, and
   * device requests are done. Resolves also when the run ends meanwhile.
   *
   * @throws `ERR_TIMEOUT` where a device is not done: the machine goes on
   */
  async hold(): Promise<void> {
    if (this.#hasEnded) return
    this.#holds++
    if (this.#stillness === undefined) {
      this.#stillness = promiseWithResolvers()
      this.#kickAll()
    }
    await this.#stillness.promise
  }

  /** Takes one {@link hold} back. */
  letGo(): void {
    if (this.#hasEnded) return
    this.#holds--
    if (this.#holds > 0) return
    this.#stillness = undefined
    this.#isStill = false
    tellPaused(this.#cpus)
    this.#startDevices()
    for (const device of this.#parts.virtio) device.function.resume()
    for (const cpu of this.#cpus) if (cpu.canEnter) this.add(cpu)
  }

  /** Ends the run from outside. */
  end(outcome: Outcome): void {
    this.#parts.dispatcher.end(outcome)
  }

  /** Nothing of the run keeps the event loop alive any more. */
  release(): void {
    this.#haltWatch?.stop()
    this.#parts.clock.stop()
    releaseExecution(this.#execution)
  }

  #kickAll(): void {
    for (const runner of this.#runners.values()) this.#execution.kick(runner)
  }

  #done(cpu: VirtualCpu): void {
    const { dispatcher } = this.#parts
    this.#runners.delete(cpu)
    try {
      const { stepped, mode } = dispatcher
      // What comes next is decoded into the same object.
      if (stepped?.cpu === cpu) this.#stepped = copyExit(stepped.exit)
      const next = cpu.settle()
      // The end of the instruction that made the access, which has been reported.
      if (mode === 'instruction' && next?.kind === 'debug') cpu.takePending()
      if (this.#runners.size > 0) return
      if (this.#holds > 0 && this.#canStandStill) {
        void this.#standStill()
        return
      }
      if (this.#goesOn()) {
        for (const other of this.#cpus) if (other.canEnter) this.add(other)
        return
      }
    } catch (error) {
      dispatcher.fail(error, cpu.index)
    }
    // A vCPU that halted is done without an outcome: the machine has ended when the last one has.
    if (this.#cpus.every(({ state }) => state !== 'runnable')) dispatcher.end({ reason: 'halt' })
    this.#finish()
  }

  #finish(): void {
    if (this.#hasEnded) return
    this.#hasEnded = true
    const { dispatcher } = this.#parts
    try {
      this.#stopDevices()
    } catch (error) {
      dispatcher.fail(error)
    }
    this.endTime = performance.now()
    // Now, as the machine may be closed before whoever waits for the run gets on.
    const { outcome } = dispatcher
    if (outcome !== undefined && wantsReport(outcome)) this.report = this.#report(outcome)
    this.#resolve({ outcome: dispatcher.outcome, stepped: this.#stepped })
    if (this.#isStill) for (const device of this.#parts.virtio) device.function.resume()
    this.#isStill = false
    this.#stillness?.resolve()
  }

  #startDevices(): void {
    const { posted, doorbells, clock } = this.#parts
    posted.start(this.#mode === 'run')
    doorbells.start(this.#mode === 'run' && this.#execution.mode === 'threads')
    clock.start()
    this.#haltWatch?.start()
  }

  #stopDevices(): void {
    const { posted, doorbells } = this.#parts
    posted.stop()
    doorbells.stop()
  }

  /** Without a local APIC a vCPU that halted has left the guest for good: then the run is over. */
  get #canStandStill(): boolean {
    if (this.#parts.dispatcher.ending) return false
    return this.#parts.interrupts.irqchip !== 'none' || this.#cpus.some(({ state }) => state === 'runnable')
  }

  /** All vCPUs are out of the guest, and are to stay there. */
  async #standStill(): Promise<void> {
    const { dispatcher, virtio, clock } = this.#parts
    for (const device of virtio) device.function.suspend()
    this.#haltWatch?.stop()
    try {
      for (const cpu of this.#cpus) this.#completeExits(cpu)
      this.#stopDevices()
    } catch (error) {
      dispatcher.fail(error)
    }
    try {
      await drainRequests(this.#parts)
    } catch (error) {
      const stillness = this.#stillness
      this.#holds = 1
      this.letGo()
      stillness?.reject(error)
      return
    }
    clock.stop()
    this.#isStill = true
    if (dispatcher.ending) this.#finish()
    else this.#stillness?.resolve()
  }

  /** The end of an access may be the next exit: an instruction can make several. */
  #completeExits(cpu: VirtualCpu): void {
    const { dispatcher } = this.#parts
    for (let exit = cpu.takePending(); exit !== undefined; exit = cpu.takePending()) {
      if (!dispatcher.dispatch(cpu, exit)) return
      cpu.settle()
    }
  }

  #report(outcome: Outcome): RunReport {
    const { memory, dispatcher } = this.#parts
    const culprit = 'vcpu' in outcome ? outcome.vcpu : undefined
    return makeReport(this.#cpus, memory, culprit, dispatcher.log.records)
  }

  /** All vCPUs are out of the guest: whether that was to see if they would ever wake, and they would. */
  #goesOn(): boolean {
    const watch = this.#haltWatch
    if (watch?.checking !== true || this.#parts.dispatcher.ending) return false
    if (this.#cpus.every((cpu) => cpu.isAsleepForGood)) {
      this.end({ reason: 'halt' })
      return false
    }
    watch.again()
    return true
  }
}

interface PromiseWithResolvers {
  readonly promise: Promise<void>
  resolve(): void
  reject(error: unknown): void
}

/** Promise.withResolvers, which Node.js 20 lacks. */
function promiseWithResolvers(): PromiseWithResolvers {
  let resolve!: () => void
  let reject!: (error: unknown) => void
  const promise = new Promise<void>((done, failed) => {
    resolve = done
    reject = failed
  })
  return { promise, resolve, reject }
}
