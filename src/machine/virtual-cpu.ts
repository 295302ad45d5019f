import { invalidArgument, NodevisorError, show } from '../errors.js'
import type { ExternalInterrupts } from '../interrupts/external-interrupts.js'
import type { VcpuExit } from '../kvm/exits.js'
import { REGISTER_NAMES, type Registers, type SpecialRegisters } from '../kvm/registers.js'
import type { Vcpu } from '../kvm/vcpu.js'
import type { MpState } from '../kvm/vcpu-state.js'
import { checkObject } from './options.js'

/**
 * What a vCPU is doing: `parked` until it is started, `runnable`, or `halted` by `hlt` with nothing to wake it.
 */
export type VirtualCpuState = 'parked' | 'runnable' | 'halted'

/** What a vCPU needs of the machine it belongs to. */
export interface CpuOwner {
  /** Throws `ERR_CLOSED` or `ERR_RUNNING` unless registers can be accessed now. */
  checkStopped(): void
  /** The vCPU became runnable. */
  cpuStarted(cpu: VirtualCpu): void
  /** Interrupts the vCPU with a vector. */
  interrupt(cpu: VirtualCpu, vector: number): void
  /** What interrupts the vCPU past its local APIC. */
  externalOf(index: number): ExternalInterrupts | undefined
  /** Whether vCPUs have a local APIC in KVM, which also holds those that halted or wait to be started. */
  readonly hasLocalApic: boolean
}

/** The local APIC refuses what is below (Intel SDM vol. 3A, "Valid Interrupt Vectors"). */
const FIRST_APIC_VECTOR = 16
/** Offsets in `struct kvm_run`. */
const REQUEST_INTERRUPT_WINDOW = 0
const READY_FOR_INTERRUPT_INJECTION = 12
const IF_FLAG = 13
const MAX_VECTOR = 255
/** No KVM_VCPUEVENT_VALID_*: what others may have changed meanwhile stays as it is. */
const NOTHING_ELSE = 0
/** RFLAGS.IF: interrupts are let in. */
const RFLAGS_IF = 1n << 9n

/** One processor of a machine: its registers while the machine stands still. */
export class VirtualCpu {
  /** From 0: the vCPU that the machine boots on. */
  readonly index: number
  /** KVM's vCPU itself. What is done to it behind the machine's back is up to you. */
  readonly unsafeVcpu: Vcpu
  readonly #owner: CpuOwner
  readonly #registers: Registers
  readonly #external: ExternalInterrupts | undefined
  #state: VirtualCpuState
  /** KVM was asked for an exit as soon as the guest lets interrupts in. */
  #windowRequested = false
  /** An access of the last exit still has to reach the guest's registers. */
  #incomplete = false
  /** An exit that {@link settle} came upon: handled before the guest goes on. */
  #pending: VcpuExit | undefined

  /** @internal */
  constructor(owner: CpuOwner, index: number, vcpu: Vcpu) {
    this.#owner = owner
    this.index = index
    this.unsafeVcpu = vcpu
    this.#external = owner.externalOf(index)
    this.#state = index === 0 ? 'runnable' : 'parked'
    this.#registers = liveRegisters(owner, vcpu)
  }

  /** What it does; with a local APIC, as of when it was last out of the guest. */
  get state(): VirtualCpuState {
    return this.#state
  }

  /** Whether entering the guest makes sense: a local APIC waits there for what wakes the vCPU. @internal */
  get canEnter(): boolean {
    return this.#owner.hasLocalApic || this.#state === 'runnable'
  }

  /**
   * Interrupts the guest with a vector, as soon as it lets interrupts in: without an irqchip as its INTR pin would, in
   * the order of calls; else as a message to its local APIC. A vector that waits already is not asked for twice. The
   * machine may run; a vCPU that has halted goes on, with the next `run()` if the machine stands still.
   *
   * @param vector - 0 to 255; a local APIC takes none below 16
   * @throws `ERR_INVALID_ARGUMENT`, `ERR_CLOSED`
   */
  interrupt(vector: number): void {
    const min = this.#owner.hasLocalApic ? FIRST_APIC_VECTOR : 0
    if (!Number.isInteger(vector) || vector < min || vector > MAX_VECTOR) {
      throw invalidArgument('vector', `an integer from ${min} to ${MAX_VECTOR}`, vector)
    }
    this.#owner.interrupt(this, vector)
  }

  /**
   * The general-purpose registers, live: reading a field reads the vCPU, assigning one writes it. Assigning an object
   * sets the fields it has.
   *
   * @throws `ERR_RUNNING` while the machine runs, `ERR_CLOSED` afterwards
   */
  get registers(): Registers {
    this.#owner.checkStopped()
    return this.#registers
  }

  set registers(values: Partial<Registers>) {
    this.#owner.checkStopped()
    setRegisters(this.unsafeVcpu, values)
  }

  /**
   * Segment, table and control registers: a copy. Assigning an object sets the fields it has.
   *
   * @throws `ERR_RUNNING` while the machine runs, `ERR_CLOSED` afterwards
   */
  get specialRegisters(): SpecialRegisters {
    this.#owner.checkStopped()
    return this.unsafeVcpu.getSregs()
  }

  set specialRegisters(values: Partial<SpecialRegisters>) {
    this.#owner.checkStopped()
    const current = this.unsafeVcpu.getSregs()
    checkObject('specialRegisters', values, Object.keys(current))
    for (const [name, value] of Object.entries(values)) {
      checkLike(name, value, current[name as keyof SpecialRegisters])
    }
    this.unsafeVcpu.setSregs({ ...current, ...values })
  }

  /**
   * Lets a parked or halted vCPU run, from `registers` on if given. If the machine runs, the vCPU joins in; otherwise
   * it does with the next `run()`. It starts in the mode and with the segments that the kernel's own vCPU started with.
   * (A machine with an irqchip has to stand still; there, guests start vCPUs themselves, with INIT and SIPI.)
   *
   * @throws `ERR_RUNNING` if this vCPU runs already, `ERR_CLOSED`
   */
  start(registers: Partial<Registers> = {}): void {
    if (this.#owner.hasLocalApic) this.#owner.checkStopped()
    if (this.#state === 'runnable') {
      throw new NodevisorError(
        'ERR_RUNNING',
        `Expected a parked or halted vCPU but vCPU ${this.index} is runnable`,
        {
          vcpu: this.index,
        },
      )
    }
    setRegisters(this.unsafeVcpu, registers)
    if (this.#owner.hasLocalApic) this.unsafeVcpu.setMpState('runnable')
    this.#state = 'runnable'
    this.#owner.cpuStarted(this)
  }

  /** The vCPU executed `hlt`, and is not about to be woken. @internal */
  halted(): void {
    const willWake = this.#external?.pending && this.unsafeVcpu.kvmRun.getUint8(IF_FLAG) !== 0
    if (!willWake) this.#state = 'halted'
  }

  /** Whether, out of the guest, nothing that this vCPU does can wake it, or another. @internal */
  get isAsleepForGood(): boolean {
    if (this.#state === 'parked') return true
    if (this.#state === 'runnable') return false
    const { nmi, interrupt } = this.unsafeVcpu.getVcpuEvents()
    if (nmi.pending !== 0 || nmi.injected || interrupt.injected) return false
    return (this.unsafeVcpu.getRegs().rflags & RFLAGS_IF) === 0n
  }

  /** A `run()` after `hlt` goes on behind it. @internal */
  wake(): void {
    if (this.#state === 'halted') this.#state = 'runnable'
  }

  /** The last exit was a port or memory access. @internal */
  accessed(): void {
    this.#incomplete = true
  }

  /** The next exit: the one left over, or the one that running the guest leads to. @internal */
  enter(): VcpuExit {
    const pending = this.takePending()
    if (pending !== undefined) return pending
    this.entering()
    return this.unsafeVcpu.run()
  }

  /** The guest is about to be entered, which finishes the access of the last exit. @internal */
  entering(): void {
    this.#incomplete = false
    const external = this.#external
    if (external !== undefined && (external.pending || this.#windowRequested)) this.#offer(external)
  }

  /** Hands an interrupt that waits to KVM, or asks for an exit as soon as the guest lets interrupts in. */
  #offer(external: ExternalInterrupts): void {
    const { kvmRun } = this.unsafeVcpu
    if (external.pending && kvmRun.getUint8(READY_FOR_INTERRUPT_INJECTION) !== 0) {
      // KVM has room for one; it sets this again with the next exit.
      kvmRun.setUint8(READY_FOR_INTERRUPT_INJECTION, 0)
      this.#inject(external.acknowledge())
    }
    this.#windowRequested = external.pending
    kvmRun.setUint8(REQUEST_INTERRUPT_WINDOW, this.#windowRequested ? 1 : 0)
  }

  /** The vCPU takes a vector as soon as it is in the guest. */
  #inject(vector: number): void {
    const vcpu = this.unsafeVcpu
    if (!this.#owner.hasLocalApic) {
      vcpu.interrupt(vector)
      return
    }
    // Beside a local APIC, what KVM_INTERRUPT leaves is in no state that KVM gives until the guest has taken it: a
    // snapshot in between would lose it.
    const { interrupt, ...events } = vcpu.getVcpuEvents()
    vcpu.setVcpuEvents({
      ...events,
      flags: NOTHING_ELSE,
      interrupt: { ...interrupt, injected: true, nr: vector, soft: false },
    })
    if (vcpu.getMpState() === 'halted') vcpu.setMpState('runnable')
  }

  /** Whether an exit is left over, to be handled before the guest goes on. @internal */
  get hasPending(): boolean {
    return this.#pending !== undefined
  }

  /** The vCPU was given another state. @internal */
  restored(state: VirtualCpuState): void {
    this.#state = state
    this.#incomplete = false
    this.#pending = undefined
    this.#windowRequested = false
    const { kvmRun } = this.unsafeVcpu
    kvmRun.setUint8(REQUEST_INTERRUPT_WINDOW, 0)
    // As of another guest: the next exit sets it.
    kvmRun.setUint8(READY_FOR_INTERRUPT_INJECTION, 0)
  }

  /** The exit left over, if any. @internal */
  takePending(): VcpuExit | undefined {
    const pending = this.#pending
    this.#pending = undefined
    return pending
  }

  /**
   * Finishes the access of the last exit, so that registers and memory are what the guest sees next.
   *
   * @returns the exit that this led to, if it led to one; it is also left over for the next {@link enter}
   * @internal
   */
  settle(): VcpuExit | undefined {
    const exit = this.#settle()
    if (this.#owner.hasLocalApic) this.#state = STATE_OF[this.unsafeVcpu.getMpState()]
    return exit
  }

  #settle(): VcpuExit | undefined {
    if (!this.#incomplete) return undefined
    this.#incomplete = false
    const exit = this.unsafeVcpu.complete()
    if (exit.kind === 'interrupted' || exit.kind === 'again') return undefined
    this.#pending = exit
    return exit
  }
}

/** What KVM calls the states of a vCPU that has a local APIC. */
const STATE_OF: Readonly<Record<MpState, VirtualCpuState>> = {
  runnable: 'runnable',
  uninitialized: 'parked',
  'init-received': 'parked',
  'sipi-received': 'runnable',
  halted: 'halted',
}

function setRegisters(vcpu: Vcpu, values: Partial<Registers>): void {
  checkObject('registers', values, REGISTER_NAMES)
  for (const [name, value] of Object.entries(values)) checkRegister(name, value)
  vcpu.setRegs({ ...vcpu.getRegs(), ...values })
}

function checkRegister(name: string, value: unknown): void {
  if (typeof value === 'bigint' && value >= 0n && value < 2n ** 64n) return
  const hint = typeof value === 'number' ? `; write ${value}n` : ''
  throw new NodevisorError(
    'ERR_INVALID_ARGUMENT',
    `Expected a bigint from 0n to 2n**64n - 1n for register ${name} but received ${show(value)}${hint}`,
    { argument: name, received: value },
  )
}

/** Checks that a special register's new value has the type, and all the fields, of the one it has. */
function checkLike(name: string, value: unknown, like: unknown): void {
  if (typeof like === 'bigint') checkRegister(name, value)
  else if (typeof like === 'number') {
    if (typeof value !== 'number' || !Number.isInteger(value) || value < 0 || value > 0xffff_ffff) {
      throw invalidArgument(name, 'an integer from 0 to 0xffffffff', value)
    }
  } else if (typeof like === 'boolean') {
    if (typeof value !== 'boolean') throw invalidArgument(name, 'a boolean', value)
  } else {
    if (typeof value !== 'object' || value === null) throw invalidArgument(name, 'an object', value)
    for (const [key, part] of Object.entries(like as object)) {
      checkLike(`${name}.${key}`, (value as Record<string, unknown>)[key], part)
    }
  }
}

/** An object whose fields are the vCPU's registers. */
function liveRegisters(owner: CpuOwner, vcpu: Vcpu): Registers {
  const registers = {} as Registers
  for (const name of REGISTER_NAMES) {
    Object.defineProperty(registers, name, {
      enumerable: true,
      get() {
        owner.checkStopped()
        return vcpu.getRegs()[name]
      },
      set(value: bigint) {
        owner.checkStopped()
        checkRegister(name, value)
        vcpu.setRegs({ ...vcpu.getRegs(), [name]: value })
      },
    })
  }
  return Object.seal(registers)
}
