import { hex } from '../errors.js'
import type { GuestAddress, Port } from './types.js'

/**
 * Why KVM_RUN returned: `struct kvm_run`, decoded once (Linux, Documentation/virt/kvm/api.rst, section 5).
 *
 * The objects are the vCPU's own and are used again for its next exit: copy what you want to keep.
 */
export type VcpuExit =
  | IoExit
  | MmioExit
  | DebugExit
  | InternalErrorExit
  | FailEntryExit
  | SystemEventExit
  | MsrExit
  | IoapicEoiExit
  | PlainExit

/** KVM_EXIT_IO: the guest executed `in`, `out` or a string form of them. */
export interface IoExit {
  readonly kind: 'io'
  readonly direction: 'in' | 'out'
  readonly port: Port
  /** Bytes of one access: 1, 2 or 4. */
  readonly size: number
  /** Accesses; more than 1 for `rep ins` and `rep outs`. */
  readonly count: number
  /** Where the data is in the vCPU's `kvmRun`: `size * count` bytes. */
  readonly dataOffset: number
  /** The data itself, in place: what was written, or where to put what is read. */
  readonly data: Uint8Array
}

/** KVM_EXIT_MMIO: the guest accessed memory where no RAM is. */
export interface MmioExit {
  readonly kind: 'mmio'
  readonly direction: 'read' | 'write'
  readonly address: GuestAddress
  /** Bytes, 1 to 8. */
  readonly size: number
  /** Where the data is in the vCPU's `kvmRun`. */
  readonly dataOffset: number
  /** The data itself, in place. */
  readonly data: Uint8Array
}

/** KVM_EXIT_DEBUG: a breakpoint or single step that KVM_SET_GUEST_DEBUG asked for. */
export interface DebugExit {
  readonly kind: 'debug'
  readonly exception: number
  readonly pc: bigint
  readonly dr6: bigint
  readonly dr7: bigint
}

/** KVM_EXIT_INTERNAL_ERROR: KVM gave up, mostly at an instruction its emulator does not know. */
export interface InternalErrorExit {
  readonly kind: 'internal-error'
  /** KVM_INTERNAL_ERROR_*: 1 is EMULATION. */
  readonly suberror: number
  readonly data: readonly bigint[]
  /** The bytes of the instruction that could not be emulated, where KVM hands them over. */
  readonly instruction: Uint8Array | undefined
}

/** KVM_EXIT_FAIL_ENTRY: the processor refused the vCPU's state. */
export interface FailEntryExit {
  readonly kind: 'fail-entry'
  /** The processor's own code. */
  readonly hardwareReason: bigint
  readonly cpu: number
}

/** KVM_EXIT_SYSTEM_EVENT. */
export interface SystemEventExit {
  readonly kind: 'system-event'
  /** KVM_SYSTEM_EVENT_*: 1 SHUTDOWN, 2 RESET, 3 CRASH. */
  readonly type: number
}

/** KVM_EXIT_X86_RDMSR or KVM_EXIT_X86_WRMSR: only where KVM_CAP_X86_USER_SPACE_MSR was enabled. */
export interface MsrExit {
  readonly kind: 'rdmsr' | 'wrmsr'
  readonly index: number
  readonly value: bigint
}

/** KVM_EXIT_IOAPIC_EOI: with a split irqchip, a local APIC has ended a level-triggered interrupt. */
export interface IoapicEoiExit {
  readonly kind: 'ioapic-eoi'
  readonly vector: number
}

/** An exit that says nothing more than its reason. */
export interface PlainExit {
  readonly kind:
    | 'halt'
    | 'shutdown'
    | 'interrupted'
    | 'again'
    | 'irq-window-open'
    | 'signal'
    | 'hypercall'
    | 'dirty-ring-full'
    | 'other'
  /** KVM_EXIT_*. */
  readonly reason: number
}

/** KVM_EXIT_* of linux/kvm.h. */
export const KVM_EXIT_IO = 2
const KVM_EXIT_HYPERCALL = 3
const KVM_EXIT_DEBUG = 4
const KVM_EXIT_HLT = 5
export const KVM_EXIT_MMIO = 6
const KVM_EXIT_IRQ_WINDOW_OPEN = 7
const KVM_EXIT_SHUTDOWN = 8
const KVM_EXIT_FAIL_ENTRY = 9
const KVM_EXIT_INTR = 10
const KVM_EXIT_INTERNAL_ERROR = 17
const KVM_EXIT_SYSTEM_EVENT = 24
const KVM_EXIT_IOAPIC_EOI = 26
const KVM_EXIT_X86_RDMSR = 29
const KVM_EXIT_X86_WRMSR = 30
const KVM_EXIT_DIRTY_RING_FULL = 31

/** Offsets in `struct kvm_run`. */
const EXIT_REASON = 8
const UNION = 32
const KVM_INTERNAL_ERROR_EMULATION = 1
const KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES = 1n

const EINTR = 4
const KVM_EXIT_IO_OUT = 1

const PLAIN: ReadonlyMap<number, PlainExit> = new Map(
  (
    [
      [KVM_EXIT_HYPERCALL, 'hypercall'],
      [KVM_EXIT_HLT, 'halt'],
      [KVM_EXIT_IRQ_WINDOW_OPEN, 'irq-window-open'],
      [KVM_EXIT_SHUTDOWN, 'shutdown'],
      [KVM_EXIT_INTR, 'signal'],
      [KVM_EXIT_DIRTY_RING_FULL, 'dirty-ring-full'],
    ] as const
  ).map(([reason, kind]) => [reason, { kind, reason }]),
)
const INTERRUPTED: PlainExit = { kind: 'interrupted', reason: KVM_EXIT_INTR }
const AGAIN: PlainExit = { kind: 'again', reason: KVM_EXIT_INTR }

class ReusedIoExit implements IoExit {
  readonly kind = 'io'
  direction: 'in' | 'out' = 'out'
  port = 0 as Port
  size = 1
  count = 1
  dataOffset = 0
  readonly #run: DataView

  constructor(run: DataView) {
    this.#run = run
  }

  get data(): Uint8Array {
    return new Uint8Array(this.#run.buffer, this.dataOffset, this.size * this.count)
  }
}

class ReusedMmioExit implements MmioExit {
  readonly kind = 'mmio'
  direction: 'read' | 'write' = 'write'
  address = 0 as GuestAddress
  size = 1
  readonly dataOffset = UNION + 8
  readonly #run: DataView

  constructor(run: DataView) {
    this.#run = run
  }

  get data(): Uint8Array {
    return new Uint8Array(this.#run.buffer, this.dataOffset, this.size)
  }
}

/** Decodes the exits of one vCPU, without allocating for port and memory accesses. */
export class ExitDecoder {
  readonly #run: DataView
  readonly #io: ReusedIoExit
  readonly #mmio: ReusedMmioExit

  constructor(run: DataView) {
    this.#run = run
    this.#io = new ReusedIoExit(run)
    this.#mmio = new ReusedMmioExit(run)
  }

  /** @param errno - what KVM_RUN returned: 0, EINTR or EAGAIN */
  decode(errno: number): VcpuExit {
    if (errno !== 0) return errno === EINTR ? INTERRUPTED : AGAIN
    const run = this.#run
    const reason = run.getUint32(EXIT_REASON, true)
    if (reason === KVM_EXIT_IO) {
      const io = this.#io
      io.direction = run.getUint8(UNION) === KVM_EXIT_IO_OUT ? 'out' : 'in'
      io.size = run.getUint8(UNION + 1)
      io.port = run.getUint16(UNION + 2, true) as Port
      io.count = run.getUint32(UNION + 4, true)
      io.dataOffset = run.getUint32(UNION + 8, true)
      return io
    }
    if (reason === KVM_EXIT_MMIO) {
      const mmio = this.#mmio
      // Two halves: an address is a number, and the union holds 64 bits.
      mmio.address = (run.getUint32(UNION, true) + run.getUint32(UNION + 4, true) * 2 ** 32) as GuestAddress
      mmio.size = run.getUint32(UNION + 16, true)
      mmio.direction = run.getUint8(UNION + 20) !== 0 ? 'write' : 'read'
      return mmio
    }
    return PLAIN.get(reason) ?? this.#rare(reason)
  }

  #rare(reason: number): VcpuExit {
    const run = this.#run
    switch (reason) {
      case KVM_EXIT_DEBUG:
        return {
          kind: 'debug',
          exception: run.getUint32(UNION, true),
          pc: run.getBigUint64(UNION + 8, true),
          dr6: run.getBigUint64(UNION + 16, true),
          dr7: run.getBigUint64(UNION + 24, true),
        }
      case KVM_EXIT_INTERNAL_ERROR:
        return this.#internalError()
      case KVM_EXIT_FAIL_ENTRY:
        return {
          kind: 'fail-entry',
          hardwareReason: run.getBigUint64(UNION, true),
          cpu: run.getUint32(UNION + 8, true),
        }
      case KVM_EXIT_SYSTEM_EVENT:
        return { kind: 'system-event', type: run.getUint32(UNION, true) }
      case KVM_EXIT_IOAPIC_EOI:
        return { kind: 'ioapic-eoi', vector: run.getUint8(UNION) }
      case KVM_EXIT_X86_RDMSR:
      case KVM_EXIT_X86_WRMSR:
        return {
          kind: reason === KVM_EXIT_X86_RDMSR ? 'rdmsr' : 'wrmsr',
          index: run.getUint32(UNION + 12, true),
          value: run.getBigUint64(UNION + 16, true),
        }
      default:
        return { kind: 'other', reason }
    }
  }

  #internalError(): InternalErrorExit {
    const run = this.#run
    const suberror = run.getUint32(UNION, true)
    const count = Math.min(run.getUint32(UNION + 4, true), 16)
    const data = Array.from({ length: count }, (_, i) => run.getBigUint64(UNION + 8 + i * 8, true))
    // struct emulation_failure: flags, then a length byte and up to 15 bytes of the instruction.
    const hasBytes =
      suberror === KVM_INTERNAL_ERROR_EMULATION &&
      count >= 3 &&
      ((data[0] ?? 0n) & KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES) !== 0n
    const length = hasBytes ? Math.min(run.getUint8(UNION + 16), 15) : 0
    const instruction = hasBytes ? new Uint8Array(run.buffer, UNION + 17, length).slice() : undefined
    return { kind: 'internal-error', suberror, data, instruction }
  }
}

/** An exit as one line of text, for errors and traces. */
export function describeExit(exit: VcpuExit): string {
  switch (exit.kind) {
    case 'io':
      return `${exit.direction} port ${hex(exit.port)}, ${exit.count} × ${exit.size} bytes`
    case 'mmio':
      return `${exit.direction} ${exit.size} bytes at ${hex(exit.address)}`
    case 'debug':
      return `debug exception ${exit.exception} at ${hex(exit.pc)}`
    case 'internal-error': {
      const bytes =
        exit.instruction &&
        Buffer.from(exit.instruction)
          .toString('hex')
          .replace(/(..)(?=.)/g, '$1 ')
      return `KVM internal error ${exit.suberror}${bytes === undefined ? '' : ` at the instruction bytes ${bytes}`}`
    }
    case 'fail-entry':
      return `entry failed for hardware reason ${hex(exit.hardwareReason)}`
    case 'system-event':
      return `system event ${exit.type}`
    case 'rdmsr':
    case 'wrmsr':
      return `${exit.kind} ${hex(exit.index)}`
    case 'ioapic-eoi':
      return `end of interrupt ${hex(exit.vector)}`
    default:
      return `${exit.kind} (KVM exit reason ${exit.reason})`
  }
}

/** An exit that stays as it is when the vCPU exits again. */
export function copyExit(exit: VcpuExit): VcpuExit {
  if (exit.kind === 'io') {
    const { kind, direction, port, size, count, dataOffset } = exit
    return { kind, direction, port, size, count, dataOffset, data: exit.data.slice() }
  }
  if (exit.kind === 'mmio') {
    const { kind, direction, address, size, dataOffset } = exit
    return { kind, direction, address, size, dataOffset, data: exit.data.slice() }
  }
  return exit
}
