import type { Segment, SpecialRegisters } from '../kvm/registers.js'
import type { Instruction, InstructionTable, SegmentName } from './decode.js'
import {
  isCode,
  isConforming,
  isNull,
  markAccessed,
  nullSegment,
  readSegment,
  rpl,
  selectorError,
  TYPE_CODE,
  TYPE_WRITABLE,
} from './descriptors.js'
import {
  BREAKPOINT,
  DEBUG_EXCEPTION,
  GuestFault,
  generalProtection,
  invalidOpcode,
  OVERFLOW,
  Refusal,
  SEGMENT_NOT_PRESENT,
  STACK_FAULT,
} from './outcome.js'
import { FLAGS, littleEndian, type Processor } from './processor.js'

// Intel SDM vol. 3A, "IDT Descriptors" and "64-Bit Mode IDT".
const GATE_SIZE = 8
const GATE_SIZE_64 = 16
/** Byte with type, DPL and P. */
const GATE_ACCESS_BYTE = 5
const TASK_GATE = 0x5
const INTERRUPT_GATE_16 = 0x6
const TRAP_GATE_16 = 0x7
const INTERRUPT_GATE = 0xe
const TRAP_GATE = 0xf
/** Of an error code: it is about a gate of the IDT. */
const ERROR_IDT = 2

/** Flags that `iret` takes from the stack, whatever the privilege level. */
const IRET_FLAGS =
  FLAGS.CF |
  FLAGS.PF |
  FLAGS.AF |
  FLAGS.ZF |
  FLAGS.SF |
  FLAGS.TF |
  FLAGS.DF |
  FLAGS.OF |
  FLAGS.NT |
  FLAGS.RF |
  FLAGS.AC |
  FLAGS.ID

/**
 * "INT n/INTO/INT3/INT1 - Call to Interrupt Procedure".
 *
 * KVM delivers the interrupt: it pushes the frame, switches stacks and raises the faults of that. Checked here is what
 * it would find out too late, with `rip` already behind the instruction: the gate.
 */
function softwareInterrupt(cpu: Processor, vector: number): void {
  if (!cpu.protectedMode || cpu.virtual8086) {
    throw new Refusal('software interrupts are finished in protected and long mode only')
  }
  checkGate(cpu, vector)
  cpu.raise({ kind: 'software-interrupt', vector })
}

function checkGate(cpu: Processor, vector: number): void {
  const { idt } = cpu.special
  const size = cpu.longMode ? GATE_SIZE_64 : GATE_SIZE
  const error = vector * 8 + ERROR_IDT
  if (vector * size + size - 1 > idt.limit) throw generalProtection(error)
  const access = cpu.readTable(idt.base + BigInt(vector * size + GATE_ACCESS_BYTE), 1)[0]!
  const type = access & 0x1f
  const known = cpu.longMode
    ? [INTERRUPT_GATE, TRAP_GATE]
    : [TASK_GATE, INTERRUPT_GATE_16, TRAP_GATE_16, INTERRUPT_GATE, TRAP_GATE]
  if (!known.includes(type) || ((access >> 5) & 3) < cpu.cpl) throw generalProtection(error)
  if ((access & 0x80) === 0) throw new GuestFault(SEGMENT_NOT_PRESENT, error)
  if (type === TASK_GATE) throw new Refusal('it leads to a task gate, and tasks are not switched here')
  // On PVM, KVM pushes 32 bits each for them too.
  if (type <= TRAP_GATE_16) throw new Refusal('it leads to a 16-bit gate, which KVM does not deliver through')
}

/** "INTO": only outside 64-bit mode, where the opcode is invalid. */
function interruptOnOverflow(cpu: Processor): void {
  if (cpu.codeSize === 64) throw invalidOpcode()
  if (cpu.flag('OF')) softwareInterrupt(cpu, OVERFLOW)
}

/** Takes values off the stack, once all is known to go well. */
class StackReader {
  offset: bigint
  readonly #cpu: Processor
  readonly #size: number
  readonly #mask: number

  constructor(cpu: Processor, size: number) {
    this.#cpu = cpu
    this.#size = size
    this.#mask = stackBits(cpu, cpu.special.ss)
    this.offset = BigInt.asUintN(this.#mask, cpu.registers.rsp)
  }

  pop(): bigint {
    const value = littleEndian(this.#cpu.read({ segment: 'ss', offset: this.offset }, this.#size))
    this.skip(BigInt(this.#size))
    return value
  }

  skip(bytes: bigint): void {
    this.offset = BigInt.asUintN(this.#mask, this.offset + bytes)
  }
}

/** Bits of the stack pointer that count. */
function stackBits(cpu: Processor, ss: Segment): 16 | 32 | 64 {
  if (cpu.codeSize === 64) return 64
  return ss.db === 1 ? 32 : 16
}

/** The code segment that a far return leads to, with its checks. */
function returnSegment(cpu: Processor, selector: number, rip: bigint): Segment {
  if (isNull(selector)) throw generalProtection()
  const error = selectorError(selector)
  const cs = readSegment(cpu, selector)
  if (cs === undefined || !isCode(cs) || rpl(selector) < cpu.cpl) throw generalProtection(error)
  if (isConforming(cs) ? cs.dpl > rpl(selector) : cs.dpl !== rpl(selector)) throw generalProtection(error)
  if (cpu.longMode && cs.l === 1 && cs.db === 1) throw generalProtection(error)
  if (!cs.present) throw new GuestFault(SEGMENT_NOT_PRESENT, error)
  const in64 = cpu.longMode && cs.l === 1
  if (in64 ? !cpu.canonical(rip) : rip > BigInt(cs.limit)) throw generalProtection()
  return cs
}

/** The stack segment of an outer privilege level, with its checks. */
function outerStack(cpu: Processor, selector: number, level: number): Segment {
  if (isNull(selector)) throw generalProtection()
  const error = selectorError(selector)
  const ss = readSegment(cpu, selector)
  const writableData =
    ss !== undefined && ss.s === 1 && (ss.type & (TYPE_CODE | TYPE_WRITABLE)) === TYPE_WRITABLE
  if (!writableData || rpl(selector) !== level || ss.dpl !== level) throw generalProtection(error)
  if (!ss.present) throw new GuestFault(STACK_FAULT, error)
  return ss
}

/**
 * What `iret` and a far `ret` have in common: to CS:rip, and where that is less privileged, to the stack that lies
 * behind them.
 *
 * @param release - bytes of arguments that a far `ret` takes off both stacks
 * @param rflags - what the flags become
 */
function returnTo(
  cpu: Processor,
  stack: StackReader,
  target: { selector: number; rip: bigint; rflags: bigint; release: bigint },
): void {
  const { selector, rip, release } = target
  const cs = returnSegment(cpu, selector, rip)
  stack.skip(release)
  if (rpl(selector) === cpu.cpl) {
    setStackPointer(cpu, cpu.special.ss, stack.offset)
    cpu.setSpecial({ cs: markAccessed(cpu, cs) })
  } else {
    const rsp = stack.pop()
    const ss = outerStack(cpu, Number(stack.pop() & 0xffffn), rpl(selector))
    const dropped = droppedSegments(cpu, rpl(selector))
    setStackPointer(cpu, ss, rsp + release)
    // KVM tells the privilege level by the stack segment's.
    cpu.setSpecial({ cs: markAccessed(cpu, cs), ss: markAccessed(cpu, ss), ...dropped })
  }
  cpu.registers.rip = rip
  cpu.registers.rflags = target.rflags
}

function setStackPointer(cpu: Processor, ss: Segment, value: bigint): void {
  const bits = stackBits(cpu, ss)
  const { registers } = cpu
  registers.rsp =
    bits === 16 ? ((registers.rsp >> 16n) << 16n) | (value & 0xffffn) : BigInt.asUintN(bits, value)
}

/** Data segments that the outer level may not have are taken from it. */
function droppedSegments(cpu: Processor, level: number): Partial<SpecialRegisters> {
  const dropped: Partial<Record<SegmentName, Segment>> = {}
  for (const name of ['ds', 'es', 'fs', 'gs'] as const) {
    const segment = cpu.special[name]
    const shared = isCode(segment) && isConforming(segment)
    if (!segment.unusable && !shared && segment.dpl < level) dropped[name] = nullSegment(segment)
  }
  return dropped
}

/** "IRET/IRETD/IRETQ - Interrupt Return", of protected and compatibility mode: KVM has the others. */
function interruptReturn(cpu: Processor, { operandSize }: Instruction): void {
  if (!cpu.protectedMode || cpu.virtual8086 || cpu.codeSize === 64) {
    throw new Refusal('it is finished in protected mode only')
  }
  if (cpu.flag('NT')) {
    if (cpu.longMode) throw generalProtection()
    throw new Refusal('it returns to another task, and tasks are not switched here')
  }
  const stack = new StackReader(cpu, operandSize)
  const rip = stack.pop()
  const selector = Number(stack.pop() & 0xffffn)
  const popped = stack.pop()
  const { cpl } = cpu
  if ((popped & FLAGS.VM) !== 0n && cpl === 0 && !cpu.longMode) {
    throw new Refusal('it returns to virtual-8086 mode, which is not known here')
  }
  let taken = IRET_FLAGS
  if (BigInt(cpl) <= (cpu.registers.rflags & FLAGS.IOPL) >> 12n) taken |= FLAGS.IF
  if (cpl === 0) taken |= FLAGS.IOPL | FLAGS.VIF | FLAGS.VIP
  if (operandSize === 2) taken &= 0xffffn
  const rflags = (cpu.registers.rflags & ~taken) | (popped & taken)
  returnTo(cpu, stack, { selector, rip, rflags, release: 0n })
  cpu.unmaskNmi()
}

/** "RET - Return From Procedure", far: KVM has it within a privilege level. */
function farReturn(cpu: Processor, { operandSize, immediate }: Instruction): void {
  if (!cpu.protectedMode || cpu.virtual8086) throw new Refusal('it is finished in protected mode only')
  const stack = new StackReader(cpu, operandSize)
  const rip = stack.pop()
  const selector = Number(stack.pop() & 0xffffn)
  returnTo(cpu, stack, { selector, rip, rflags: cpu.registers.rflags, release: BigInt(immediate) })
}

/** Calls to interrupt procedures and far returns. */
export const INTERRUPTS: InstructionTable = {
  CC: { name: 'int3', run: (cpu) => softwareInterrupt(cpu, BREAKPOINT) },
  CD: {
    name: 'int',
    immediate: 1,
    run: (cpu, { immediate }) => softwareInterrupt(cpu, immediate),
  },
  CE: { name: 'into', run: interruptOnOverflow },
  F1: {
    name: 'int1',
    run: (cpu) => cpu.raise({ kind: 'trap', vector: DEBUG_EXCEPTION }),
  },
  CF: { name: 'iret', run: interruptReturn },
  CA: { name: 'retf', immediate: 2, run: farReturn },
  CB: { name: 'retf', run: farReturn },
}
