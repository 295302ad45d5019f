import type { Instruction, InstructionForm, InstructionTable } from './decode.js'
import { DEVICE_NOT_AVAILABLE, GuestFault, generalProtection, invalidOpcode } from './outcome.js'
import { littleEndian, type Processor, toBytes } from './processor.js'

// CR0, CR4 (Intel SDM vol. 3A, "Control Registers").
const CR0_EM = 1n << 2n
const CR0_TS = 1n << 3n
const CR4_OSFXSR = 1n << 9n

/** MXCSR bits that every processor with this table's instructions has, DAZ included. */
const MXCSR_MASK = 0xffff
const XMM_SIZE = 16

type Run = (cpu: Processor, instruction: Instruction) => void
/** How a result of 16 bytes comes from the operands' and the immediate one. */
type Operation = (destination: Uint8Array, source: Uint8Array, immediate: number) => Uint8Array

/** #UD and #NM ("Exceptions and Interrupts", of every SSE instruction's page). */
function requireSse(cpu: Processor): void {
  const { cr0, cr4 } = cpu.special
  if ((cr0 & CR0_EM) !== 0n || (cr4 & CR4_OSFXSR) === 0n) throw invalidOpcode()
  if ((cr0 & CR0_TS) !== 0n) throw new GuestFault(DEVICE_NOT_AVAILABLE)
}

const sse =
  (run: Run): Run =>
  (cpu, instruction) => {
    requireSse(cpu)
    run(cpu, instruction)
  }

/** The low bytes of the operand that ModRM.rm names. */
function source(cpu: Processor, instruction: Instruction, size: number): Uint8Array {
  const { rm } = instruction
  if (rm !== undefined) return cpu.fpu.xmm(rm).subarray(0, size)
  return cpu.read(cpu.address(instruction), size)
}

/** All 16 bytes of it, aligned where they are in memory. */
function alignedSource(cpu: Processor, instruction: Instruction): Uint8Array {
  if (instruction.rm === undefined && cpu.linear(cpu.address(instruction), XMM_SIZE, 'read') % 16n !== 0n) {
    throw generalProtection()
  }
  return source(cpu, instruction, XMM_SIZE)
}

/** An instruction that computes its destination, an XMM register, from 16 bytes each. */
function compute(name: string, operation: Operation, immediate?: 1): InstructionForm {
  return {
    name,
    ...(immediate === undefined ? {} : { immediate }),
    run: sse((cpu, instruction) => {
      const operand = alignedSource(cpu, instruction)
      const { reg } = instruction
      cpu.fpu.setXmm(reg, operation(cpu.fpu.xmm(reg), operand, instruction.immediate))
    }),
  }
}

const bitwise = (name: string, operation: (destination: number, source: number) => number) =>
  compute(name, (destination, operand) => destination.map((byte, i) => operation(byte, operand[i]!)))

/** The parts of a register, as unsigned numbers. @param size - bytes of one */
function split(bytes: Uint8Array, size: number): bigint[] {
  return Array.from({ length: bytes.length / size }, (_, i) =>
    littleEndian(bytes.subarray(i * size, (i + 1) * size)),
  )
}

function join(parts: readonly bigint[], size: number): Uint8Array {
  return Uint8Array.from(parts.flatMap((part) => [...toBytes(part, size)]))
}

/** An instruction that does the same with every part. */
const lanes = (name: string, size: number, operation: (destination: bigint, source: bigint) => bigint) =>
  compute(name, (destination, operand) => {
    const operands = split(operand, size)
    return join(
      split(destination, size).map((part, i) => operation(part, operands[i]!)),
      size,
    )
  })

const signed = (size: number, value: bigint) => BigInt.asIntN(size * 8, value)
const add = (name: string, size: number) => lanes(name, size, (a, b) => a + b)
const subtract = (name: string, size: number) => lanes(name, size, (a, b) => a - b)
/** All ones where the comparison holds. */
const equal = (name: string, size: number) => lanes(name, size, (a, b) => (a === b ? -1n : 0n))
const greater = (name: string, size: number) =>
  lanes(name, size, (a, b) => (signed(size, a) > signed(size, b) ? -1n : 0n))

/** "PUNPCKLBW…", "PUNPCKHBW…", "UNPCKLPS…": parts of both operands in turn, from their lower or upper halves. */
const interleave = (name: string, size: number, half: 'low' | 'high') =>
  compute(name, (destination, operand) => {
    const from = half === 'low' ? 0 : XMM_SIZE / size / 2
    const [first, second] = [split(destination, size), split(operand, size)]
    return join(
      first.slice(from, from + XMM_SIZE / size / 2).flatMap((part, i) => [part, second[from + i]!]),
      size,
    )
  })

/** "PSHUFD", "PSHUFLW", "PSHUFHW": parts of the source, two bits of the immediate operand each. */
const shuffle = (name: string, size: number, from: number) =>
  compute(
    name,
    (_, operand, immediate) => {
      const parts = split(operand, size)
      const chosen = [0, 2, 4, 6].map((shift) => parts[from + ((immediate >> shift) & 3)]!)
      parts.splice(from, 4, ...chosen)
      return join(parts, size)
    },
    1,
  )

/** "SHUFPS" and "SHUFPD": the lower half of the result from the destination, the upper from the source. */
const shufflePacked = (name: string, size: number) =>
  compute(
    name,
    (destination, operand, immediate) => {
      const count = XMM_SIZE / size
      const bits = count / 2
      const [first, second] = [split(destination, size), split(operand, size)]
      const parts = first.map((_, i) => {
        const selected = (immediate >> (i * bits)) & (count - 1)
        return (i < count / 2 ? first : second)[selected]!
      })
      return join(parts, size)
    },
    1,
  )

/** A shift of every part by the immediate operand: 0F 71 to 73. */
function shift(
  name: string,
  size: number,
  operation: (part: bigint, count: bigint) => bigint,
): InstructionForm {
  return {
    name,
    immediate: 1,
    run: sse((cpu, { rm, immediate }) => {
      const parts = split(cpu.fpu.xmm(rm!), size)
      cpu.fpu.setXmm(
        rm!,
        join(
          parts.map((part) => operation(part, BigInt(immediate))),
          size,
        ),
      )
    }),
  }
}

/** Loads `size` bytes; the rest of the register becomes 0. */
const loadZeroing = (size: number) =>
  sse((cpu, instruction) => {
    const result = new Uint8Array(XMM_SIZE)
    result.set(source(cpu, instruction, size))
    cpu.fpu.setXmm(instruction.reg, result)
  })

/** Between registers, "MOVSS" and "MOVSD" leave the rest of the destination as it is. */
const loadScalar = (size: number) =>
  sse((cpu, instruction) => {
    const result = instruction.rm === undefined ? new Uint8Array(XMM_SIZE) : cpu.fpu.xmm(instruction.reg)
    result.set(source(cpu, instruction, size))
    cpu.fpu.setXmm(instruction.reg, result)
  })

/** Stores the low bytes; in a register, the rest stays, or becomes 0 where `zeroing`. */
const store = (size: number, zeroing = false) =>
  sse((cpu, instruction) => {
    const { reg, rm } = instruction
    const value = cpu.fpu.xmm(reg).subarray(0, size)
    if (rm === undefined) cpu.write(cpu.address(instruction), value)
    else {
      const result = zeroing ? new Uint8Array(XMM_SIZE) : cpu.fpu.xmm(rm)
      result.set(value)
      cpu.fpu.setXmm(rm, result)
    }
  })

/** Replaces half of the destination: "MOVLPS", "MOVHPS", "MOVHLPS", "MOVLHPS". */
const loadHalf = (at: 0 | 8, from: 0 | 8 = 0) =>
  sse((cpu, instruction) => {
    const { reg, rm } = instruction
    const half = rm === undefined ? source(cpu, instruction, 8) : cpu.fpu.xmm(rm).subarray(from, from + 8)
    const result = cpu.fpu.xmm(reg)
    result.set(half, at)
    cpu.fpu.setXmm(reg, result)
  })

const storeHalf = (from: 0 | 8) =>
  sse((cpu, instruction) => {
    const half = cpu.fpu.xmm(instruction.reg).subarray(from, from + 8)
    cpu.write(cpu.address(instruction), half)
  })

/** "PMOVMSKB", "MOVMSKPS", "MOVMSKPD": the highest bit of every part. */
const signMask = (size: number) =>
  sse((cpu, { reg, rm }) => {
    const bits = split(cpu.fpu.xmm(rm!), size).map((part) => part >> BigInt(size * 8 - 1))
    const mask = bits.reduce((value, bit, i) => value | (bit << BigInt(i)), 0n)
    cpu.setRegister(reg, 8, mask)
  })

/** "MOVD/MOVQ - Move Doubleword and Quadword", from a general-purpose register or memory. */
const loadInteger = sse((cpu, instruction) => {
  const size = instruction.wide ? 8 : 4
  cpu.fpu.setXmm(instruction.reg, toBytes(cpu.readRm(instruction, size), XMM_SIZE))
})

const storeInteger = sse((cpu, instruction) => {
  const size = instruction.wide ? 8 : 4
  cpu.writeRm(instruction, size, littleEndian(cpu.fpu.xmm(instruction.reg).subarray(0, size)))
})

/** "LDMXCSR - Load MXCSR Register". */
const loadControl = sse((cpu, instruction) => {
  const value = Number(cpu.readRm(instruction, 4))
  if ((value & ~MXCSR_MASK) !== 0) throw generalProtection()
  cpu.fpu.mxcsr = value
})

const bits = (size: number) => BigInt(size * 8)
/** A shift by as many bits as a part has, or more, leaves nothing: or only the sign. */
const shiftRight = (size: number) => (part: bigint, count: bigint) =>
  count < bits(size) ? part >> count : 0n
const shiftLeft = (size: number) => (part: bigint, count: bigint) => (count < bits(size) ? part << count : 0n)
const shiftSigned = (size: number) => (part: bigint, count: bigint) => signed(size, part) >> count

/** SSE and SSE2: moves, logic, integers. What KVM knows itself (MOVUPS, MOVDQA, …) is not here. */
export const SSE: InstructionTable = {
  'NP 0F AE /2 m': { name: 'ldmxcsr', run: loadControl },
  'NP 0F AE /3 m': {
    name: 'stmxcsr',
    run: sse((cpu, instruction) => cpu.writeRm(instruction, 4, BigInt(cpu.fpu.mxcsr))),
  },

  '66 0F 6E': { name: 'movd', run: loadInteger },
  '66 0F 7E': { name: 'movd', run: storeInteger },
  'F3 0F 7E': { name: 'movq', run: loadZeroing(8) },
  '66 0F D6': { name: 'movq', run: store(8, true) },
  'F3 0F 10': { name: 'movss', run: loadScalar(4) },
  'F3 0F 11': { name: 'movss', run: store(4) },
  'F2 0F 10': { name: 'movsd', run: loadScalar(8) },
  'F2 0F 11': { name: 'movsd', run: store(8) },
  'NP 0F 12 m': { name: 'movlps', run: loadHalf(0) },
  '66 0F 12 m': { name: 'movlpd', run: loadHalf(0) },
  'NP 0F 12 r': { name: 'movhlps', run: loadHalf(0, 8) },
  'NP 0F 13 m': { name: 'movlps', run: storeHalf(0) },
  '66 0F 13 m': { name: 'movlpd', run: storeHalf(0) },
  'NP 0F 16 m': { name: 'movhps', run: loadHalf(8) },
  '66 0F 16 m': { name: 'movhpd', run: loadHalf(8) },
  'NP 0F 16 r': { name: 'movlhps', run: loadHalf(8) },
  'NP 0F 17 m': { name: 'movhps', run: storeHalf(8) },
  '66 0F 17 m': { name: 'movhpd', run: storeHalf(8) },
  'F2 0F F0 m': { name: 'lddqu', run: loadZeroing(XMM_SIZE) },
  'NP 0F 50 r': { name: 'movmskps', run: signMask(4) },
  '66 0F 50 r': { name: 'movmskpd', run: signMask(8) },
  '66 0F D7 r': { name: 'pmovmskb', run: signMask(1) },

  'NP 0F 54': bitwise('andps', (a, b) => a & b),
  '66 0F 54': bitwise('andpd', (a, b) => a & b),
  '66 0F DB': bitwise('pand', (a, b) => a & b),
  'NP 0F 55': bitwise('andnps', (a, b) => ~a & b),
  '66 0F 55': bitwise('andnpd', (a, b) => ~a & b),
  '66 0F DF': bitwise('pandn', (a, b) => ~a & b),
  'NP 0F 56': bitwise('orps', (a, b) => a | b),
  '66 0F 56': bitwise('orpd', (a, b) => a | b),
  '66 0F EB': bitwise('por', (a, b) => a | b),
  'NP 0F 57': bitwise('xorps', (a, b) => a ^ b),
  '66 0F 57': bitwise('xorpd', (a, b) => a ^ b),
  '66 0F EF': bitwise('pxor', (a, b) => a ^ b),

  '66 0F FC': add('paddb', 1),
  '66 0F FD': add('paddw', 2),
  '66 0F FE': add('paddd', 4),
  '66 0F D4': add('paddq', 8),
  '66 0F F8': subtract('psubb', 1),
  '66 0F F9': subtract('psubw', 2),
  '66 0F FA': subtract('psubd', 4),
  '66 0F FB': subtract('psubq', 8),
  '66 0F 74': equal('pcmpeqb', 1),
  '66 0F 75': equal('pcmpeqw', 2),
  '66 0F 76': equal('pcmpeqd', 4),
  '66 0F 64': greater('pcmpgtb', 1),
  '66 0F 65': greater('pcmpgtw', 2),
  '66 0F 66': greater('pcmpgtd', 4),
  '66 0F DA': lanes('pminub', 1, (a, b) => (a < b ? a : b)),
  '66 0F DE': lanes('pmaxub', 1, (a, b) => (a > b ? a : b)),
  '66 0F F4': lanes('pmuludq', 8, (a, b) => BigInt.asUintN(32, a) * BigInt.asUintN(32, b)),

  '66 0F 60': interleave('punpcklbw', 1, 'low'),
  '66 0F 61': interleave('punpcklwd', 2, 'low'),
  '66 0F 62': interleave('punpckldq', 4, 'low'),
  '66 0F 6C': interleave('punpcklqdq', 8, 'low'),
  '66 0F 68': interleave('punpckhbw', 1, 'high'),
  '66 0F 69': interleave('punpckhwd', 2, 'high'),
  '66 0F 6A': interleave('punpckhdq', 4, 'high'),
  '66 0F 6D': interleave('punpckhqdq', 8, 'high'),
  'NP 0F 14': interleave('unpcklps', 4, 'low'),
  '66 0F 14': interleave('unpcklpd', 8, 'low'),
  'NP 0F 15': interleave('unpckhps', 4, 'high'),
  '66 0F 15': interleave('unpckhpd', 8, 'high'),
  '66 0F 70': shuffle('pshufd', 4, 0),
  'F2 0F 70': shuffle('pshuflw', 2, 0),
  'F3 0F 70': shuffle('pshufhw', 2, 4),
  'NP 0F C6': shufflePacked('shufps', 4),
  '66 0F C6': shufflePacked('shufpd', 8),

  '66 0F 71 /2 r': shift('psrlw', 2, shiftRight(2)),
  '66 0F 72 /2 r': shift('psrld', 4, shiftRight(4)),
  '66 0F 73 /2 r': shift('psrlq', 8, shiftRight(8)),
  '66 0F 71 /4 r': shift('psraw', 2, shiftSigned(2)),
  '66 0F 72 /4 r': shift('psrad', 4, shiftSigned(4)),
  '66 0F 71 /6 r': shift('psllw', 2, shiftLeft(2)),
  '66 0F 72 /6 r': shift('pslld', 4, shiftLeft(4)),
  '66 0F 73 /6 r': shift('psllq', 8, shiftLeft(8)),
  '66 0F 73 /3 r': shift('psrldq', XMM_SIZE, (whole, count) => whole >> (count * 8n)),
  '66 0F 73 /7 r': shift('pslldq', XMM_SIZE, (whole, count) => whole << (count * 8n)),
}
