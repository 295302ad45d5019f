import type { Instruction, InstructionTable } from './decode.js'
import { FSW_C1 } from './fpu-area.js'
import { DEVICE_NOT_AVAILABLE, FLOATING_POINT_ERROR, GuestFault } from './outcome.js'
import { littleEndian, type Processor, toBytes } from './processor.js'

// CR0 (Intel SDM vol. 3A, "Control Registers").
const CR0_MP = 1n << 1n
const CR0_EM = 1n << 2n
const CR0_TS = 1n << 3n

// FSW (SDM vol. 1, "x87 FPU Status Register").
const FSW_IE = 1 << 0
const FSW_DE = 1 << 1
const FSW_SF = 1 << 6
const FSW_ES = 1 << 7
const FSW_B = 1 << 15
/** All exceptions, of which the control word masks the first six. */
const FSW_EXCEPTIONS = 0xff
const MASKABLE = 0x3f

/** The real indefinite ("Indefinite Values"): what a masked invalid operation results in. */
const INDEFINITE = 0xffff_c000_0000_0000_0000n
const INTEGER_BIT = 1n << 63n
const QUIET_BIT = 1n << 62n
const EXPONENT_BIAS = 16383

const RAX = 0

/** "FLD1/FLDL2T/FLDL2E/FLDPI/FLDLG2/FLDLN2/FLDZ - Load Constant", rounded to nearest. */
const CONSTANTS = {
  fld1: 0x3fff_8000_0000_0000_0000n,
  fldl2t: 0x4000_d49a_784b_cd1b_8afen,
  fldl2e: 0x3fff_b8aa_3b29_5c17_f0bcn,
  fldpi: 0x4000_c90f_daa2_2168_c235n,
  fldlg2: 0x3ffd_9a20_9a84_fbcf_f799n,
  fldln2: 0x3ffe_b172_17f7_d1cf_79acn,
  fldz: 0n,
} as const

/** How floating-point numbers in memory are made up (SDM vol. 1, "Floating-Point Data Types"). */
interface FloatFormat {
  readonly bytes: number
  readonly exponentBits: number
  readonly fractionBits: number
}

const SINGLE: FloatFormat = { bytes: 4, exponentBits: 8, fractionBits: 23 }
const DOUBLE: FloatFormat = { bytes: 8, exponentBits: 11, fractionBits: 52 }

/** #NM where the FPU is not to be used. */
function requireX87(cpu: Processor): void {
  if ((cpu.special.cr0 & (CR0_EM | CR0_TS)) !== 0n) throw new GuestFault(DEVICE_NOT_AVAILABLE)
}

/** #MF where an instruction before left an exception that is not masked. */
function requireNoError(cpu: Processor): void {
  if ((cpu.fpu.fsw & FSW_ES) !== 0) throw new GuestFault(FLOATING_POINT_ERROR)
}

/** What an instruction does that first waits for the one before. */
function waiting(
  run: (cpu: Processor, instruction: Instruction) => void,
): (cpu: Processor, instruction: Instruction) => void {
  return (cpu, instruction) => {
    requireX87(cpu)
    requireNoError(cpu)
    run(cpu, instruction)
  }
}

/** Sets exceptions in the status word. @returns whether all are masked, and the instruction goes on */
function flagExceptions({ fpu }: Processor, flags: number): boolean {
  const masked = (flags & MASKABLE & ~fpu.fcw) === 0
  fpu.fsw |= flags | (masked ? 0 : FSW_ES | FSW_B)
  return masked
}

/** Pushes a number of 80 bits. */
function push(cpu: Processor, value: bigint): void {
  const { fpu } = cpu
  const overflow = !fpu.isEmpty(7)
  fpu.fsw = overflow ? fpu.fsw | FSW_C1 : fpu.fsw & ~FSW_C1
  if (overflow && !flagExceptions(cpu, FSW_IE | FSW_SF)) return
  fpu.rotate(-1)
  fpu.setSt(0, toBytes(overflow ? INDEFINITE : value, 10))
}

/** Takes ST(0) off the stack. */
function pop({ fpu }: Processor): void {
  fpu.free(0)
  fpu.rotate(1)
}

/** The 80 bits of ST(i); `undefined` for an empty one, where the exception is not masked. */
function readStack(cpu: Processor, i: number): bigint | undefined {
  const { fpu } = cpu
  fpu.fsw &= ~FSW_C1
  if (!fpu.isEmpty(i)) return littleEndian(fpu.st(i))
  return flagExceptions(cpu, FSW_IE | FSW_SF) ? INDEFINITE : undefined
}

/** A number of 32 or 64 bits as one of 80, and the exceptions of loading it: every one has an exact counterpart. */
function extend(bits: bigint, format: FloatFormat): { value: bigint; flags: number } {
  const { exponentBits, fractionBits, bytes } = format
  const bias = 2 ** (exponentBits - 1) - 1
  const sign = (bits >> BigInt(bytes * 8 - 1)) << 79n
  const exponent = Number(BigInt.asUintN(exponentBits, bits >> BigInt(fractionBits)))
  const fraction = BigInt.asUintN(fractionBits, bits) << BigInt(63 - fractionBits)
  const compose = (biased: number, significand: bigint) => sign | (BigInt(biased) << 64n) | significand

  if (exponent === 2 ** exponentBits - 1) {
    const signaling = fraction !== 0n && (fraction & QUIET_BIT) === 0n
    const quiet = signaling ? QUIET_BIT : 0n
    return { value: compose(0x7fff, INTEGER_BIT | fraction | quiet), flags: signaling ? FSW_IE : 0 }
  }
  if (exponent !== 0) {
    return { value: compose(exponent - bias + EXPONENT_BIAS, INTEGER_BIT | fraction), flags: 0 }
  }
  if (fraction === 0n) return { value: sign, flags: 0 }
  let shift = 0
  let significand = fraction
  for (; (significand & INTEGER_BIT) === 0n; shift++) significand <<= 1n
  return { value: compose(1 - bias + EXPONENT_BIAS - shift, significand), flags: FSW_DE }
}

/** "FLD - Load Floating-Point Value", of 32 or 64 bits. */
function loadFloat(cpu: Processor, instruction: Instruction, format: FloatFormat): void {
  const bits = littleEndian(cpu.read(cpu.address(instruction), format.bytes))
  const { value, flags } = extend(bits, format)
  if (flagExceptions(cpu, flags)) push(cpu, value)
}

/** "FILD - Load Integer". */
function loadInteger(cpu: Processor, instruction: Instruction, size: number): void {
  const integer = BigInt.asIntN(size * 8, littleEndian(cpu.read(cpu.address(instruction), size)))
  if (integer === 0n) {
    push(cpu, 0n)
    return
  }
  const magnitude = integer < 0n ? -integer : integer
  const highestBit = magnitude.toString(2).length - 1
  const sign = integer < 0n ? 1n << 79n : 0n
  const exponent = BigInt(EXPONENT_BIAS + highestBit) << 64n
  push(cpu, sign | exponent | (magnitude << BigInt(63 - highestBit)))
}

/** "FST/FSTP - Store Floating-Point Value", to a register. */
function storeToRegister(cpu: Processor, { rm }: Instruction): boolean {
  const value = readStack(cpu, 0)
  if (value === undefined) return false
  cpu.fpu.setSt(rm! & 7, toBytes(value, 10))
  return true
}

/** "FXCH - Exchange Register Contents". */
function exchange(cpu: Processor, { rm }: Instruction): void {
  const other = rm! & 7
  const [first, second] = [readStack(cpu, 0), readStack(cpu, other)]
  if (first === undefined || second === undefined) return
  cpu.fpu.setSt(0, toBytes(second, 10))
  cpu.fpu.setSt(other, toBytes(first, 10))
}

/** Changes the sign bit of ST(0): "FABS - Absolute Value", "FCHS - Change Sign". */
function changeSign(cpu: Processor, change: (value: bigint) => bigint): void {
  const value = readStack(cpu, 0)
  if (value !== undefined) cpu.fpu.setSt(0, toBytes(change(value), 10))
}

/** "FINCSTP - Increment Stack-Top Pointer", and FDECSTP: tags and contents stay. */
function turnStack({ fpu }: Processor, by: 1 | -1): void {
  fpu.fsw &= ~FSW_C1
  fpu.rotate(by)
}

const loadConstant = (name: keyof typeof CONSTANTS) => ({
  name,
  run: waiting((cpu) => push(cpu, CONSTANTS[name])),
})

/** x87: control, loads, and what needs no arithmetic. */
export const X87: InstructionTable = {
  '9B': {
    name: 'fwait',
    run: (cpu) => {
      const { cr0 } = cpu.special
      if ((cr0 & CR0_MP) !== 0n && (cr0 & CR0_TS) !== 0n) throw new GuestFault(DEVICE_NOT_AVAILABLE)
      requireNoError(cpu)
    },
  },
  'D9 /5 m': {
    name: 'fldcw',
    run: waiting((cpu, instruction) => {
      // Bit 6 is reserved and always 1.
      cpu.fpu.fcw = (Number(cpu.readRm(instruction, 2)) & 0x1f3f) | 0x40
      const { fpu } = cpu
      const unmasked = fpu.fsw & MASKABLE & ~fpu.fcw
      fpu.fsw = unmasked !== 0 ? fpu.fsw | FSW_ES | FSW_B : fpu.fsw & ~(FSW_ES | FSW_B)
    }),
  },
  'DF E0': {
    name: 'fnstsw',
    run: (cpu) => {
      requireX87(cpu)
      cpu.setRegister(RAX, 2, BigInt(cpu.fpu.fsw))
    },
  },
  'DB E2': {
    name: 'fnclex',
    run: (cpu) => {
      requireX87(cpu)
      cpu.fpu.fsw &= ~(FSW_EXCEPTIONS | FSW_B)
    },
  },
  'D9 D0': { name: 'fnop', run: waiting(() => {}) },
  'D9 E8': loadConstant('fld1'),
  'D9 E9': loadConstant('fldl2t'),
  'D9 EA': loadConstant('fldl2e'),
  'D9 EB': loadConstant('fldpi'),
  'D9 EC': loadConstant('fldlg2'),
  'D9 ED': loadConstant('fldln2'),
  'D9 EE': loadConstant('fldz'),
  'D9 /0 m': { name: 'fld', run: waiting((cpu, instruction) => loadFloat(cpu, instruction, SINGLE)) },
  'DD /0 m': { name: 'fld', run: waiting((cpu, instruction) => loadFloat(cpu, instruction, DOUBLE)) },
  'DB /5 m': {
    name: 'fld',
    run: waiting((cpu, instruction) => push(cpu, littleEndian(cpu.read(cpu.address(instruction), 10)))),
  },
  'D9 /0 r': {
    name: 'fld',
    run: waiting((cpu, { rm }) => {
      const value = readStack(cpu, rm! & 7)
      if (value !== undefined) push(cpu, value)
    }),
  },
  'DF /0 m': { name: 'fild', run: waiting((cpu, instruction) => loadInteger(cpu, instruction, 2)) },
  'DB /0 m': { name: 'fild', run: waiting((cpu, instruction) => loadInteger(cpu, instruction, 4)) },
  'DF /5 m': { name: 'fild', run: waiting((cpu, instruction) => loadInteger(cpu, instruction, 8)) },
  'DB /7 m': {
    name: 'fstp',
    run: waiting((cpu, instruction) => {
      const value = readStack(cpu, 0)
      if (value === undefined) return
      cpu.write(cpu.address(instruction), toBytes(value, 10))
      pop(cpu)
    }),
  },
  'DD /2 r': { name: 'fst', run: waiting((cpu, instruction) => void storeToRegister(cpu, instruction)) },
  'DD /3 r': {
    name: 'fstp',
    run: waiting((cpu, instruction) => {
      if (storeToRegister(cpu, instruction)) pop(cpu)
    }),
  },
  'DD /0 r': { name: 'ffree', run: waiting((cpu, { rm }) => cpu.fpu.free(rm! & 7)) },
  'D9 /1 r': { name: 'fxch', run: waiting(exchange) },
  'D9 E0': { name: 'fchs', run: waiting((cpu) => changeSign(cpu, (value) => value ^ (1n << 79n))) },
  'D9 E1': { name: 'fabs', run: waiting((cpu) => changeSign(cpu, (value) => value & ~(1n << 79n))) },
  'D9 F6': { name: 'fdecstp', run: waiting((cpu) => turnStack(cpu, -1)) },
  'D9 F7': { name: 'fincstp', run: waiting((cpu) => turnStack(cpu, 1)) },
  'NP 0F 77': {
    name: 'emms',
    run: waiting(({ fpu }) => {
      fpu.rotate(-fpu.top)
      fpu.ftw = 0
    }),
  },
}
