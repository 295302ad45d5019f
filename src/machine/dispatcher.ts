import type { Bus } from '../bus/bus.js'
import type { FinishResult } from '../emulation/index.js'
import { hex, NodevisorError } from '../errors.js'
import {
  describeExit,
  type InternalErrorExit,
  type IoExit,
  type MmioExit,
  type VcpuExit,
} from '../kvm/exits.js'
import type { Vcpu } from '../kvm/vcpu.js'
import { ExitLog } from './exit-log.js'
import type { PostedWrites } from './posted-writes.js'
import { isAtResetVector, linearRipOf, modeOf } from './report.js'
import { type ExitCounts, noExits, type Outcome } from './result.js'
import type { VirtualCpu } from './virtual-cpu.js'

/** KVM_SYSTEM_EVENT_* of linux/kvm.h. */
const KVM_SYSTEM_EVENT_SHUTDOWN = 1
const KVM_SYSTEM_EVENT_RESET = 2
/** KVM_INTERNAL_ERROR_* of linux/kvm.h. */
const KVM_INTERNAL_ERROR_EMULATION = 1

/** How far {@link Dispatcher.dispatch} goes on. */
export type StepMode =
  /** Until something ends the run. */
  | 'run'
  /** To the next exit that the guest causes. */
  | 'exit'
  /** To the next debug exit, or the next access: an instruction that accesses a device makes no debug exit. */
  | 'instruction'

/** What a {@link Dispatcher} takes exits to. */
export interface DispatcherOptions {
  readonly ports: Bus
  readonly mmio: Bus
  readonly posted: PostedWrites
  /** Takes the vector of a KVM_EXIT_IOAPIC_EOI. */
  endOfInterrupt(vector: number): void
  /** Executes what KVM's emulator could not; only on hosts where it has to emulate a guest's kernel. */
  readonly finish: ((vcpu: Vcpu, bytes: Uint8Array) => FinishResult) | undefined
}

/**
 * Handles exits, the same for every way of execution: takes each to its device, counts it, and decides whether the
 * guest goes on.
 */
export class Dispatcher {
  counts: ExitCounts = noExits()
  mode: StepMode = 'run'
  /** What ended the run. The first one stands. */
  outcome: Outcome | undefined
  /** The exit at which a step ended. */
  stepped: { readonly cpu: VirtualCpu; readonly exit: VcpuExit } | undefined
  /** The last exits. */
  readonly log = new ExitLog()
  /** Called when {@link end} was: other vCPUs may be in the guest. */
  onEnd: () => void = () => {}
  readonly #ports: Bus
  readonly #mmio: Bus
  readonly #posted: PostedWrites
  readonly #endOfInterrupt: DispatcherOptions['endOfInterrupt']
  readonly #finish: DispatcherOptions['finish']

  constructor({ ports, mmio, posted, endOfInterrupt, finish }: DispatcherOptions) {
    this.#ports = ports
    this.#mmio = mmio
    this.#posted = posted
    this.#endOfInterrupt = endOfInterrupt
    this.#finish = finish
  }

  /** Whether the machine should leave the guest. */
  get ending(): boolean {
    return this.outcome !== undefined || this.stepped !== undefined
  }

  /** Prepares for a run or a step. */
  begin(mode: StepMode): void {
    this.counts = noExits()
    this.mode = mode
    this.outcome = undefined
    this.stepped = undefined
  }

  /** Ends the run, once the exit under way is handled. The first call counts. */
  end(outcome: Outcome): void {
    if (this.outcome !== undefined) return
    this.outcome = outcome
    this.onEnd()
  }

  /** Ends the run because of an exception. */
  fail(error: unknown, vcpu?: number): void {
    this.end({ reason: 'failed', error: asNodevisorError(error), ...(vcpu === undefined ? {} : { vcpu }) })
  }

  /** @returns whether the vCPU shall enter the guest again */
  dispatch(cpu: VirtualCpu, exit: VcpuExit): boolean {
    try {
      if (this.#posted.active) this.#posted.drain()
      switch (exit.kind) {
        case 'io':
          this.counts.io++
          cpu.accessed()
          this.#io(cpu.unsafeVcpu.kvmRun, exit)
          break
        case 'mmio':
          this.counts.mmio++
          cpu.accessed()
          this.#access(cpu.unsafeVcpu.kvmRun, exit)
          break
        case 'ioapic-eoi':
          this.counts.other++
          this.#endOfInterrupt(exit.vector)
          break
        case 'internal-error':
          if (this.#internalError(cpu, exit)) return !this.ending && cpu.canEnter
          break
        case 'interrupted':
        case 'again':
        case 'signal':
        case 'irq-window-open':
          this.counts.interrupted++
          return !this.ending
        default:
          this.#end(cpu, exit)
      }
    } catch (error) {
      this.fail(error, cpu.index)
    }
    this.log.record(cpu.index, exit, cpu.unsafeVcpu.kvmRun)
    if (this.mode !== 'run') this.stepped ??= { cpu, exit }
    return !this.ending && cpu.canEnter
  }

  #io(run: DataView, exit: IoExit): void {
    const { port, size, count, dataOffset } = exit
    if (exit.direction === 'out') {
      for (let i = 0; i < count; i++) this.#ports.writeFrom(run, dataOffset + i * size, port, size)
    } else {
      for (let i = 0; i < count; i++) this.#ports.readInto(run, dataOffset + i * size, port, size)
    }
  }

  #access(run: DataView, exit: MmioExit): void {
    if (exit.direction === 'write') this.#mmio.writeFrom(run, exit.dataOffset, exit.address, exit.size)
    else this.#mmio.readInto(run, exit.dataOffset, exit.address, exit.size)
  }

  /** @returns whether the guest goes on, as if KVM had executed the instruction */
  #internalError(cpu: VirtualCpu, exit: InternalErrorExit): boolean {
    const vcpu = cpu.unsafeVcpu
    const bytes = exit.suberror === KVM_INTERNAL_ERROR_EMULATION ? exit.instruction : undefined
    const finished = bytes === undefined ? undefined : this.#finish?.(vcpu, bytes)
    if (finished?.finished) {
      this.counts.finished++
      warnOfFinishing()
      if (this.mode === 'instruction') {
        // What single-stepping would have ended with.
        const debug = { kind: 'debug', exception: 1, pc: linearRipOf(vcpu), dr6: 0n, dr7: 0n } as const
        this.stepped ??= { cpu, exit: debug }
      }
      return true
    }
    this.counts.other++
    // After INIT the boot processor starts where a PC has its firmware, which would start the machine again.
    if (isAtResetVector(vcpu.getRegs(), vcpu.getSregs())) this.end({ reason: 'reset', by: 'INIT' })
    else this.fail(emulationError(cpu, exit, finished), cpu.index)
    return false
  }

  /** Exits after which this vCPU does not go on by itself. */
  #end(cpu: VirtualCpu, exit: VcpuExit): void {
    switch (exit.kind) {
      case 'halt':
        this.counts.hlt++
        cpu.halted()
        break
      case 'shutdown':
        this.counts.shutdown++
        this.end({ reason: 'shutdown', vcpu: cpu.index, registers: cpu.unsafeVcpu.getRegs() })
        break
      case 'debug':
        this.counts.debug++
        if (this.mode === 'run') this.#unhandled(cpu, exit)
        break
      case 'system-event':
        this.counts.other++
        if (exit.type === KVM_SYSTEM_EVENT_SHUTDOWN) this.end({ reason: 'power-off' })
        else if (exit.type === KVM_SYSTEM_EVENT_RESET) this.end({ reason: 'reset', by: 'system event' })
        else this.#unhandled(cpu, exit)
        break
      case 'fail-entry':
        this.counts.other++
        this.fail(
          new NodevisorError(
            'ERR_GUEST_ENTRY',
            `The processor refused to enter the guest (hardware reason ${hex(exit.hardwareReason)}): check the ` +
              `special registers of vCPU ${cpu.index}, which no mode of the processor allows as they are`,
            { hardwareReason: exit.hardwareReason, registers: cpu.unsafeVcpu.getRegs() },
          ),
          cpu.index,
        )
        break
      default:
        this.counts.other++
        this.#unhandled(cpu, exit)
    }
  }

  #unhandled(cpu: VirtualCpu, exit: VcpuExit): void {
    this.fail(
      new NodevisorError(
        'ERR_GUEST_EXIT',
        `Expected an exit that this machine handles but got: ${describeExit(exit)}`,
        {
          exit,
          registers: cpu.unsafeVcpu.getRegs(),
        },
      ),
      cpu.index,
    )
  }
}

/** What KVM's emulator gave up at. @param finished - what came of trying to execute it here */
function emulationError(
  cpu: VirtualCpu,
  exit: InternalErrorExit,
  finished: FinishResult | undefined,
): NodevisorError {
  const vcpu = cpu.unsafeVcpu
  const registers = vcpu.getRegs()
  const mode = modeOf(registers, vcpu.getSregs())
  const where = `rip ${hex(registers.rip)}, ${mode} mode`
  const name = finished?.mnemonic
  const what = name === undefined ? '' : ` (${name})`
  const why =
    finished === undefined || finished.finished
      ? 'KVM could not execute it: it is mostly a jump to memory that is not RAM'
      : `KVM's emulator lacks it, and it could not be executed here: ${finished.why}. On this kind of host (PVM) all ` +
        'kernel code is emulated; a kernel has to do without such instructions, or run where KVM has VT-x or AMD-V'
  return new NodevisorError('ERR_GUEST_EMULATION', `${describeExit(exit)}${what}, ${where}: ${why}`, {
    suberror: exit.suberror,
    instruction: exit.instruction,
    ...(name === undefined ? {} : { mnemonic: name }),
    mode,
    registers,
  })
}

/** Once in an environment. */
let hasWarned = false

function warnOfFinishing(): void {
  if (hasWarned) return
  hasWarned = true
  process.emitWarning(
    "a guest executes instructions in kernel mode that this host's KVM (PVM) cannot emulate; they are executed by " +
      'nodevisor, which is slow: see exits.finished of the result',
    { code: 'NODEVISOR_SLOW_INSTRUCTIONS' },
  )
}

function asNodevisorError(error: unknown): NodevisorError {
  if (error instanceof NodevisorError) return error
  return new NodevisorError(
    'ERR_DEVICE_FAILED',
    `The machine could not go on: ${error instanceof Error ? error.message : String(error)}`,
    { cause: error },
  )
}
