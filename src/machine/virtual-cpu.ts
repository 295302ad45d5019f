import { invalidArgument, NodevisorError, show } from '../errors.js'
import type { VcpuExit } from '../kvm/exits.js'
import { REGISTER_NAMES, type Registers, type SpecialRegisters } from '../kvm/registers.js'
import type { Vcpu } from '../kvm/vcpu.js'
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
}

/** One processor of a machine: its registers while the machine stands still. */
export class VirtualCpu {
  /** From 0: the vCPU that the machine boots on. */
  readonly index: number
  /** KVM's vCPU itself. What is done to it behind the machine's back is up to you. */
  readonly unsafeVcpu: Vcpu
  readonly #owner: CpuOwner
  readonly #registers: Registers
  #state: VirtualCpuState
  /** An access of the last exit still has to reach the guest's registers. */
  #incomplete = false
  /** An exit that {@link settle} came upon: handled before the guest goes on. */
  #pending: VcpuExit | undefined

  /** @internal */
  constructor(owner: CpuOwner, index: number, vcpu: Vcpu) {
    this.#owner = owner
    this.index = index
    this.unsafeVcpu = vcpu
    this.#state = index === 0 ? 'runnable' : 'parked'
    this.#registers = liveRegisters(owner, vcpu)
  }

  get state(): VirtualCpuState {
    return this.#state
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
   *
   * @throws `ERR_RUNNING` if this vCPU runs already, `ERR_CLOSED`
   */
  start(registers: Partial<Registers> = {}): void {
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
    this.#state = 'runnable'
    this.#owner.cpuStarted(this)
  }

  /** The vCPU executed `hlt`. @internal */
  halted(): void {
    this.#state = 'halted'
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
    if (!this.#incomplete) return undefined
    this.#incomplete = false
    const exit = this.unsafeVcpu.complete()
    if (exit.kind === 'interrupted' || exit.kind === 'again') return undefined
    this.#pending = exit
    return exit
  }
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
