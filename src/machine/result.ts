import type { NodevisorError } from '../errors.js'
import type { Registers } from '../kvm/registers.js'
import type { RunReport } from './report.js'

/** How often the guest left for the host, by kind of exit. */
export interface ExitCounts {
  /** Port accesses (`in`, `out`); a `rep outs` counts once for each time KVM hands some of it over. */
  io: number
  /** Accesses to memory that is not RAM. */
  mmio: number
  hlt: number
  shutdown: number
  /** Debug exceptions, while single-stepping. */
  debug: number
  /** The guest was interrupted by the host: a time slice, a signal, a stop. Its own doing is none of it. */
  interrupted: number
  /**
   * Instructions that KVM's emulator lacks and nodevisor executed: only on PVM hosts, which emulate all kernel code.
   * Each takes some tens of microseconds.
   */
  finished: number
  /** Any other. */
  other: number
  /** Writes that KVM collected without an exit ({@link PortRange.posted}). */
  posted: number
}

/** What ended a run. Match on `reason`. */
export type Outcome =
  /** The guest wrote `code` to the debug-exit port 0xf4. */
  | { readonly reason: 'debug-exit'; readonly code: number }
  /** Every running vCPU executed `hlt`, and nothing can wake it. */
  | { readonly reason: 'halt' }
  /** Triple fault. `registers` are those of vCPU `vcpu` afterwards. */
  | { readonly reason: 'shutdown'; readonly vcpu: number; readonly registers: Registers }
  /** The guest asked for a reset, through that device. */
  | { readonly reason: 'reset'; readonly by: string }
  | { readonly reason: 'power-off' }
  /** The machine goes on in another process: `migrate()` moved it. */
  | { readonly reason: 'migrated' }
  /** The host ended the run: it can go on with another `run()`. `cause` is the signal's reason. */
  | {
      readonly reason: 'stopped'
      readonly by: 'abort' | 'timeout' | 'stop' | 'close' | 'device'
      readonly cause?: unknown
    }
  /** Something that the machine cannot go on from: `error.code` says what. */
  | { readonly reason: 'failed'; readonly error: NodevisorError; readonly vcpu?: number }

/** Every `reason` that an {@link Outcome} can have. */
export type Reason = Outcome['reason']

/** What was counted and timed during a run. */
export interface RunFacts {
  /** Exits of this run. */
  readonly exits: ExitCounts
  /** From `run()` to its end, in milliseconds. */
  readonly durationMs: number
  /** From `run()` to the first byte the guest sent over serial in its life, in milliseconds. */
  readonly firstOutputMs?: number
  /** What is known of the guest where the run ended in `shutdown` or `failed`, or was stopped by its timeout. */
  readonly report?: RunReport
}

/** What `run()` gives. */
export type RunResult = Outcome & RunFacts

/** Counts of 0. */
export function noExits(): ExitCounts {
  return { io: 0, mmio: 0, hlt: 0, shutdown: 0, debug: 0, interrupted: 0, finished: 0, other: 0, posted: 0 }
}

/** Whether a machine whose run ended so can run again. */
export function canGoOn(outcome: Outcome): boolean {
  return outcome.reason === 'stopped' || outcome.reason === 'halt' || outcome.reason === 'debug-exit'
}

/** Whether somebody will ask what the guest was doing. */
export function wantsReport(outcome: Outcome): boolean {
  const { reason } = outcome
  return reason === 'shutdown' || reason === 'failed' || (reason === 'stopped' && outcome.by === 'timeout')
}

/** An outcome as a clause: `the guest halted`. */
export function describeOutcome(outcome: Outcome): string {
  switch (outcome.reason) {
    case 'debug-exit':
      return `the guest ended the run with debug-exit ${outcome.code}`
    case 'halt':
      return 'the guest halted'
    case 'shutdown':
      return 'the guest shut down (triple fault)'
    case 'reset':
      return `the guest asked for a reset (${outcome.by})`
    case 'power-off':
      return 'the guest powered off'
    case 'migrated':
      return 'the machine was moved to another process'
    case 'stopped':
      return `the run was stopped (${outcome.by})`
    case 'failed':
      return `the machine failed: ${outcome.error.message}`
  }
}
