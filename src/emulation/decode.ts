import { invalidOpcode, Refusal } from './outcome.js'
import type { Processor } from './processor.js'

/** How code is read: CS's default operand and address size in bits, or 64-bit mode. */
export type CodeSize = 16 | 32 | 64

/** A segment register that holds code or data. */
export type SegmentName = 'es' | 'cs' | 'ss' | 'ds' | 'fs' | 'gs'

/** One form of an instruction. */
export interface InstructionForm {
  /** The mnemonic, as the manual has it, in lower case. */
  readonly name: string
  /** Bytes of the immediate operand. */
  readonly immediate?: 1 | 2
  /** Whether the LOCK prefix may be before it, if it writes memory. */
  readonly lockable?: boolean
  /** Executes it. Absent where only the name is known. */
  readonly run?: (cpu: Processor, instruction: Instruction) => void
}

/**
 * Instruction forms by what the manual's column "Opcode" says: a mandatory prefix (`NP` for none of 66, F2 and F3),
 * the opcode, then one of
 *
 * - `/0` to `/7`: ModRM.reg is part of the opcode; followed by `m` or `r` where only memory or only a register will do
 * - `m` or `r` alone
 * - a ModRM byte that is an opcode byte, as in `0F 01 CA`
 *
 * A form without mandatory prefix takes any.
 */
export type InstructionTable = Readonly<Record<string, InstructionForm>>

/** Where a memory operand is: registers by number, to be added up. */
export interface MemoryOperand {
  readonly segment: SegmentName
  /** Which register, or `rip`: the address of the next instruction. */
  readonly base: number | 'rip' | undefined
  readonly index: number | undefined
  readonly scale: number
  readonly displacement: bigint
}

/** A decoded instruction. */
export interface Instruction {
  readonly form: InstructionForm
  /** Bytes. */
  readonly length: number
  readonly operandSize: 2 | 4 | 8
  readonly addressSize: 2 | 4 | 8
  /** ModRM.reg with REX.R, or 0. */
  readonly reg: number
  /** The register that ModRM.rm names with REX.B; `undefined` where the operand is in memory or there is none. */
  readonly rm: number | undefined
  readonly memory: MemoryOperand | undefined
  readonly immediate: number
  /** REX.W. */
  readonly wide: boolean
  /** A REX prefix is there: byte registers 4 to 7 are then SPL to DIL, not AH to BH. */
  readonly rex: boolean
}

/** SDM vol. 2A, "Instruction Format": a longer instruction is an invalid one. */
const MAX_INSTRUCTION_LENGTH = 15

const SEGMENT_PREFIXES: ReadonlyMap<number, SegmentName> = new Map([
  [0x26, 'es'],
  [0x2e, 'cs'],
  [0x36, 'ss'],
  [0x3e, 'ds'],
  [0x64, 'fs'],
  [0x65, 'gs'],
])
const LOCK = 0xf0
const REPNE = 0xf2
const REP = 0xf3
const OPERAND_SIZE = 0x66
const ADDRESS_SIZE = 0x67

const REX_W = 8
const REX_R = 4
const REX_X = 2
const REX_B = 1

/** The one-byte opcodes with a ModRM byte that any table here has: `bound`, `arpl`, x87. */
const HAS_MODRM = (opcode: number) => opcode === 0x62 || opcode === 0x63 || (opcode >= 0xd8 && opcode <= 0xdf)
/** The opcodes after 0F without one (SDM vol. 2D, "Two-byte Opcode Map"). */
const HAS_NO_MODRM_0F = (opcode: number) =>
  (opcode >= 0x04 && opcode <= 0x0b) ||
  (opcode >= 0x30 && opcode <= 0x37) ||
  opcode === 0x77 ||
  (opcode >= 0x80 && opcode <= 0x8f) ||
  [0xa0, 0xa1, 0xa2, 0xa8, 0xa9, 0xaa].includes(opcode) ||
  (opcode >= 0xc8 && opcode <= 0xcf)

/** BX+SI, BX+DI, BP+SI, BP+DI, SI, DI, BP, BX (SDM vol. 2A, "16-Bit Addressing Forms with the ModR/M Byte"). */
const ADDRESSING_16: readonly (readonly [base: number, index?: number])[] = [
  [3, 6],
  [3, 7],
  [5, 6],
  [5, 7],
  [6],
  [7],
  [5],
  [3],
]
const RSP = 4
const RBP = 5

const hexByte = (byte: number) => byte.toString(16).toUpperCase().padStart(2, '0')

/** What comes before the opcode. */
interface Prefixes {
  segment: SegmentName | undefined
  lock: boolean
  repeat: typeof REPNE | typeof REP | undefined
  operandSize: boolean
  addressSize: boolean
  rex: number
}

/** Decodes one instruction (SDM vol. 2A, "Instruction Format"). */
export class Decoder {
  readonly #codeSize: CodeSize
  readonly #byteAt: (index: number) => number
  readonly #prefixes: Prefixes = {
    segment: undefined,
    lock: false,
    repeat: undefined,
    operandSize: false,
    addressSize: false,
    rex: 0,
  }
  #length = 0

  /** @param byteAt - the bytes of the code, from the instruction on; may throw where there are no more */
  constructor(codeSize: CodeSize, byteAt: (index: number) => number) {
    this.#codeSize = codeSize
    this.#byteAt = byteAt
  }

  /**
   * @throws {@link Refusal} for an instruction that the table has not
   * @throws {@link GuestFault} for one that no processor has
   */
  decode(table: InstructionTable): Instruction {
    const prefixes = this.#prefixes
    let opcodeByte = this.#readPrefixes()
    // In 64-bit mode always, elsewhere where `les`, `lds` and `bound` would name a register: VEX and EVEX.
    if (opcodeByte === 0xc4 || opcodeByte === 0xc5 || opcodeByte === 0x62) {
      if (this.#codeSize === 64 || this.#byteAt(this.#length) >= 0xc0) {
        throw new Refusal('instructions with a VEX or EVEX prefix (AVX, BMI) are not known here')
      }
    }
    let opcode = hexByte(opcodeByte)
    let hasModrm = HAS_MODRM(opcodeByte)
    if (opcodeByte === 0x0f) {
      opcodeByte = this.#next()
      opcode += ` ${hexByte(opcodeByte)}`
      hasModrm = !HAS_NO_MODRM_0F(opcodeByte)
      if (opcodeByte === 0x38 || opcodeByte === 0x3a) {
        opcode += ` ${hexByte(this.#next())}`
        hasModrm = true
      }
    }
    const { rex } = prefixes
    const addressSize = this.#addressSize()
    const modrm = hasModrm ? this.#next() : undefined
    const form = lookUp(table, this.#mandatoryPrefix(), opcode, modrm)
    if (form === undefined) throw new Refusal(`opcode ${opcode} is not known here`)
    const reg = (((modrm ?? 0) >> 3) & 7) | ((rex & REX_R) !== 0 ? 8 : 0)
    const inMemory = modrm !== undefined && modrm < 0xc0
    const memory = inMemory ? this.#memoryOperand(modrm, addressSize) : undefined
    const rm = modrm === undefined || inMemory ? undefined : (modrm & 7) | ((rex & REX_B) !== 0 ? 8 : 0)
    let immediate = 0
    for (let i = 0; i < (form.immediate ?? 0); i++) immediate |= this.#next() << (8 * i)
    if (prefixes.lock && !(form.lockable === true && inMemory)) throw invalidOpcode()
    return {
      form,
      length: this.#length,
      operandSize: this.#operandSize(),
      addressSize,
      reg,
      rm,
      memory,
      immediate,
      wide: (rex & REX_W) !== 0,
      rex: rex !== 0,
    }
  }

  #next(): number {
    if (this.#length === MAX_INSTRUCTION_LENGTH) throw new Refusal('it is longer than 15 bytes')
    return this.#byteAt(this.#length++)
  }

  /** @returns the first byte of the opcode */
  #readPrefixes(): number {
    const prefixes = this.#prefixes
    for (;;) {
      const byte = this.#next()
      const segment = SEGMENT_PREFIXES.get(byte)
      if (this.#codeSize === 64 && byte >= 0x40 && byte <= 0x4f) {
        prefixes.rex = byte
        continue
      }
      if (segment !== undefined) prefixes.segment = segment
      else if (byte === LOCK) prefixes.lock = true
      else if (byte === REPNE || byte === REP) prefixes.repeat = byte
      else if (byte === OPERAND_SIZE) prefixes.operandSize = true
      else if (byte === ADDRESS_SIZE) prefixes.addressSize = true
      else return byte
      // REX counts only right before the opcode.
      prefixes.rex = 0
    }
  }

  /** F2 and F3 go before 66, which then is about the operand's size. */
  #mandatoryPrefix(): string {
    const { repeat, operandSize } = this.#prefixes
    if (repeat !== undefined) return hexByte(repeat)
    return operandSize ? hexByte(OPERAND_SIZE) : 'NP'
  }

  #operandSize(): 2 | 4 | 8 {
    const { rex, operandSize } = this.#prefixes
    if ((rex & REX_W) !== 0) return 8
    return operandSize === (this.#codeSize === 16) ? 4 : 2
  }

  #addressSize(): 2 | 4 | 8 {
    const { addressSize } = this.#prefixes
    if (this.#codeSize === 64) return addressSize ? 4 : 8
    return addressSize === (this.#codeSize === 16) ? 4 : 2
  }

  #displacement(size: 0 | 1 | 2 | 4): bigint {
    let value = 0n
    for (let i = 0; i < size; i++) value |= BigInt(this.#next()) << BigInt(8 * i)
    return BigInt.asIntN(size * 8, value)
  }

  #memoryOperand(modrm: number, addressSize: 2 | 4 | 8): MemoryOperand {
    const mod = modrm >> 6
    const rm = modrm & 7
    if (addressSize === 2) {
      // Without displacement, BP alone means an address of 16 bits.
      const absolute = mod === 0 && rm === 6
      const [base, index] = absolute ? [] : ADDRESSING_16[rm]!
      const displacement = this.#displacement(absolute ? 2 : ([0, 1, 2] as const)[mod as 0 | 1 | 2])
      return { segment: this.#segment(base === RBP), base, index, scale: 1, displacement }
    }
    const { rex } = this.#prefixes
    const displacementSize = ([0, 1, 4] as const)[mod as 0 | 1 | 2]
    if (rm !== RSP) {
      if (mod === 0 && rm === RBP) {
        const base = this.#codeSize === 64 ? 'rip' : undefined
        const displacement = this.#displacement(4)
        return { segment: this.#segment(false), base, index: undefined, scale: 1, displacement }
      }
      const base = rm | ((rex & REX_B) !== 0 ? 8 : 0)
      const displacement = this.#displacement(displacementSize)
      return { segment: this.#segment(base === RBP), base, index: undefined, scale: 1, displacement }
    }
    const sib = this.#next()
    const index = ((sib >> 3) & 7) | ((rex & REX_X) !== 0 ? 8 : 0)
    const withoutBase = mod === 0 && (sib & 7) === RBP
    const base = withoutBase ? undefined : (sib & 7) | ((rex & REX_B) !== 0 ? 8 : 0)
    return {
      segment: this.#segment(base === RSP || base === RBP),
      base,
      index: index === RSP ? undefined : index,
      scale: 1 << (sib >> 6),
      displacement: this.#displacement(withoutBase ? 4 : displacementSize),
    }
  }

  #segment(onStack: boolean): SegmentName {
    const { segment } = this.#prefixes
    // 64-bit mode knows two overrides; the other segments start at 0 there.
    const counts = this.#codeSize !== 64 || segment === 'fs' || segment === 'gs'
    return counts && segment !== undefined ? segment : onStack ? 'ss' : 'ds'
  }
}

function lookUp(
  table: InstructionTable,
  prefix: string,
  opcode: string,
  modrm: number | undefined,
): InstructionForm | undefined {
  const suffixes = ['']
  if (modrm !== undefined) {
    const extension = ` /${(modrm >> 3) & 7}`
    const operand = modrm < 0xc0 ? ' m' : ' r'
    suffixes.unshift(` ${hexByte(modrm)}`, extension + operand, extension, operand)
  }
  for (const start of [`${prefix} ${opcode}`, opcode]) {
    for (const suffix of suffixes) {
      const key = start + suffix
      if (Object.hasOwn(table, key)) return table[key]
    }
  }
  return undefined
}
