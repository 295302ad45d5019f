import { randomBytes } from 'node:crypto'
import type { Instruction, InstructionTable } from './decode.js'
import { rpl } from './descriptors.js'
import { BOUND_RANGE_EXCEEDED, GuestFault, generalProtection, invalidOpcode } from './outcome.js'
import { littleEndian, type Processor, toBytes } from './processor.js'

/** Of CRC32C, its bits reversed: "CRC32 - Accumulate CRC32 Value". */
const CRC32C_POLYNOMIAL = 0x82f6_3b78

const RAX = 0
const RBX = 3
const RCX = 1
const RDX = 2

/** "POPCNT - Return the Count of Number of Bits Set to 1". */
function popcnt(cpu: Processor, instruction: Instruction): void {
  const { operandSize, reg } = instruction
  const source = cpu.readRm(instruction, operandSize)
  let count = 0n
  for (let rest = source; rest !== 0n; rest &= rest - 1n) count++
  cpu.setRegister(reg, operandSize, count)
  cpu.setFlags({ OF: false, SF: false, ZF: source === 0n, AF: false, CF: false, PF: false })
}

/** "CRC32 - Accumulate CRC32 Value". @param size - bytes of the source */
function crc32(cpu: Processor, instruction: Instruction, size: number): void {
  const { reg, rm, rex, wide } = instruction
  const source =
    size > 1
      ? cpu.readRm(instruction, size)
      : rm === undefined
        ? littleEndian(cpu.read(cpu.address(instruction), 1))
        : cpu.byteRegister(rm, rex)
  let crc = Number(cpu.register(reg, 4))
  for (const byte of toBytes(source, size)) {
    crc ^= byte
    for (let bit = 0; bit < 8; bit++) crc = (crc & 1) !== 0 ? (crc >>> 1) ^ CRC32C_POLYNOMIAL : crc >>> 1
  }
  cpu.setRegister(reg, wide ? 8 : 4, BigInt(crc >>> 0))
}

/**
 * "CMPXCHG8B/CMPXCHG16B - Compare and Exchange Bytes".
 *
 * Memory is read, then written: not in one step, as another vCPU sees it.
 */
function compareAndExchange(cpu: Processor, instruction: Instruction): void {
  const size = instruction.wide ? 8 : 4
  const pointer = cpu.address(instruction)
  if (instruction.wide && pointer.offset % 16n !== 0n) throw generalProtection()
  const bits = BigInt(size * 8)
  const expected = (cpu.register(RDX, size) << bits) | cpu.register(RAX, size)
  const replacement = (cpu.register(RCX, size) << bits) | cpu.register(RBX, size)
  const current = littleEndian(cpu.read(pointer, size * 2))
  const equal = current === expected
  // Memory is written either way, so that a page it may not be written to faults.
  cpu.write(pointer, toBytes(equal ? replacement : current, size * 2))
  cpu.setFlags({ ZF: equal })
  if (equal) return
  cpu.setRegister(RAX, size, current)
  cpu.setRegister(RDX, size, current >> bits)
}

/** "ADCX - Unsigned Integer Addition of Two Operands With Carry Flag", and ADOX with the overflow flag. */
function addWithFlag(cpu: Processor, instruction: Instruction, flag: 'CF' | 'OF'): void {
  const size = instruction.wide ? 8 : 4
  const carry = cpu.flag(flag) ? 1n : 0n
  const sum = cpu.register(instruction.reg, size) + cpu.readRm(instruction, size) + carry
  cpu.setRegister(instruction.reg, size, sum)
  cpu.setFlags({ [flag]: sum >> BigInt(size * 8) !== 0n })
}

/** "RDRAND - Read Random Number", and RDSEED: always successful, from the host's random numbers. */
function random(cpu: Processor, { operandSize, rm }: Instruction): void {
  cpu.setRegister(rm!, operandSize, littleEndian(randomBytes(operandSize)))
  cpu.setFlags({ CF: true, OF: false, SF: false, ZF: false, AF: false, PF: false })
}

function only32(cpu: Processor): void {
  if (cpu.codeSize === 64) throw invalidOpcode()
}

/** "DAA - Decimal Adjust AL After Addition". */
function decimalAdjust(cpu: Processor): void {
  only32(cpu)
  const al = Number(cpu.register(RAX, 2) & 0xffn)
  const adjustLow = (al & 0xf) > 9 || cpu.flag('AF')
  const adjustHigh = al > 0x99 || cpu.flag('CF')
  const result = (al + (adjustLow ? 6 : 0) + (adjustHigh ? 0x60 : 0)) & 0xff
  cpu.setRegister(RAX, 2, (cpu.register(RAX, 2) & 0xff00n) | BigInt(result))
  let ones = 0
  for (let rest = result; rest !== 0; rest &= rest - 1) ones++
  const parity = ones % 2 === 0
  cpu.setFlags({ AF: adjustLow, CF: adjustHigh, SF: result >= 0x80, ZF: result === 0, PF: parity })
}

/** "AAA - ASCII Adjust After Addition" with 1, and AAS, after subtraction, with -1. */
function asciiAdjust(cpu: Processor, sign: 1n | -1n): void {
  only32(cpu)
  const ax = cpu.register(RAX, 2)
  const adjust = (ax & 0xfn) > 9n || cpu.flag('AF')
  cpu.setRegister(RAX, 2, (adjust ? ax + sign * 0x106n : ax) & 0xff0fn)
  cpu.setFlags({ AF: adjust, CF: adjust })
}

/** "ARPL - Adjust RPL Field of Segment Selector". */
function adjustPrivilegeLevel(cpu: Processor, instruction: Instruction): void {
  if (!cpu.protectedMode || cpu.virtual8086) throw invalidOpcode()
  const destination = cpu.readRm(instruction, 2)
  const level = BigInt(rpl(Number(cpu.register(instruction.reg, 2))))
  const raises = (destination & 3n) < level
  if (raises) cpu.writeRm(instruction, 2, (destination & ~3n) | level)
  cpu.setFlags({ ZF: raises })
}

/** "BOUND - Check Array Index Against Bounds". */
function checkBounds(cpu: Processor, instruction: Instruction): void {
  const { operandSize, reg } = instruction
  const bits = operandSize * 8
  const bounds = littleEndian(cpu.read(cpu.address(instruction), operandSize * 2))
  const index = BigInt.asIntN(bits, cpu.register(reg, operandSize))
  if (index < BigInt.asIntN(bits, bounds) || index > BigInt.asIntN(bits, bounds >> BigInt(bits))) {
    throw new GuestFault(BOUND_RANGE_EXCEEDED)
  }
}

/** Integer instructions. */
export const INTEGER: InstructionTable = {
  'F3 0F B8': { name: 'popcnt', run: popcnt },
  'F2 0F 38 F0': { name: 'crc32', run: (cpu, instruction) => crc32(cpu, instruction, 1) },
  'F2 0F 38 F1': {
    name: 'crc32',
    run: (cpu, instruction) => crc32(cpu, instruction, instruction.operandSize),
  },
  '0F C7 /1 m': { name: 'cmpxchg16b', lockable: true, run: compareAndExchange },
  '66 0F 38 F6': { name: 'adcx', run: (cpu, instruction) => addWithFlag(cpu, instruction, 'CF') },
  'F3 0F 38 F6': { name: 'adox', run: (cpu, instruction) => addWithFlag(cpu, instruction, 'OF') },
  '0F C7 /6 r': { name: 'rdrand', run: random },
  '0F C7 /7 r': { name: 'rdseed', run: random },
  '27': { name: 'daa', run: decimalAdjust },
  '37': { name: 'aaa', run: (cpu) => asciiAdjust(cpu, 1n) },
  '3F': { name: 'aas', run: (cpu) => asciiAdjust(cpu, -1n) },
  '63': { name: 'arpl', run: adjustPrivilegeLevel },
  '62 m': { name: 'bound', run: checkBounds },
}
