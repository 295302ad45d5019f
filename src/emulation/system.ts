import type { Segment } from '../kvm/registers.js'
import type { Instruction, InstructionTable } from './decode.js'
import { isCode, isConforming, readSegment, rpl, TYPE_READABLE, TYPE_WRITABLE } from './descriptors.js'
import { generalProtection, invalidOpcode } from './outcome.js'
import { littleEndian, type Processor } from './processor.js'

// CR4 (Intel SDM vol. 3A, "Control Registers").
const CR4_TSD = 1n << 2n
const CR4_PGE = 1n << 7n
const CR4_PCIDE = 1n << 17n
const CR4_OSXSAVE = 1n << 18n

const IA32_TIME_STAMP_COUNTER = 0x10
const IA32_TSC_AUX = 0xc000_0103

const RAX = 0
const RCX = 1
const RDX = 2

/** "INVPCID - Invalidate Process-Context Identifier": types. */
const INVPCID_ADDRESS = 0n
const INVPCID_CONTEXT = 1n
const INVPCID_ALL_NON_GLOBAL = 3n

/** System segment types that LAR and LSL know ("System-Segment and Gate-Descriptor Types"). */
const TYPES_WITH_LIMIT = [1, 2, 3, 9, 11]
const TYPES_WITH_LIMIT_64 = [2, 9, 11]
const GATE_TYPES = [4, 5, 12]
const GATE_TYPES_64 = [12]

function supervisorOnly(cpu: Processor): void {
  if (cpu.cpl !== 0) throw generalProtection()
}

/** "CLAC - Clear AC Flag in EFLAGS Register", and STAC. */
function setAlignmentCheck(cpu: Processor, value: boolean): void {
  if (cpu.cpl !== 0) throw invalidOpcode()
  cpu.setFlags({ AC: value })
}

/**
 * "INVPCID - Invalidate Process-Context Identifier". Every type invalidates everything: that is always allowed.
 */
function invalidateContext(cpu: Processor, instruction: Instruction): void {
  supervisorOnly(cpu)
  const type = cpu.register(instruction.reg, cpu.codeSize === 64 ? 8 : 4)
  const descriptor = littleEndian(cpu.read(cpu.address(instruction), 16))
  const pcid = descriptor & 0xfffn
  const address = descriptor >> 64n
  if (type > INVPCID_ALL_NON_GLOBAL) throw generalProtection()
  if (type <= INVPCID_CONTEXT) {
    if ((descriptor & 0xffff_ffff_ffff_f000n) !== 0n) throw generalProtection()
    if (pcid !== 0n && (cpu.special.cr4 & CR4_PCIDE) === 0n) throw generalProtection()
    if (type === INVPCID_ADDRESS && !cpu.canonical(address)) throw generalProtection()
  }
  // KVM_SET_SREGS drops the roots of the shadow page tables where CR4 changes, and only there: with the next entry
  // they are synchronised with the guest's.
  cpu.vcpu.setSregs({ ...cpu.special, cr4: cpu.special.cr4 ^ CR4_PGE })
  cpu.vcpu.setSregs(cpu.special)
}

/** "XGETBV - Get Value of Extended Control Register". */
function getExtendedControl(cpu: Processor): void {
  if ((cpu.special.cr4 & CR4_OSXSAVE) === 0n) throw invalidOpcode()
  const index = cpu.register(RCX, 4)
  if (index > 1n) throw generalProtection()
  const xcr0 = cpu.xcr0()
  setPair(cpu, index === 0n ? xcr0 : xcr0 & cpu.fpu.inUse)
}

/** "RDTSCP - Read Time-Stamp Counter and Processor ID". */
function readTimeStamp(cpu: Processor): void {
  if ((cpu.special.cr4 & CR4_TSD) !== 0n && cpu.protectedMode) supervisorOnly(cpu)
  const [counter, aux] = cpu.vcpu.getMsrs([IA32_TIME_STAMP_COUNTER, IA32_TSC_AUX])
  setPair(cpu, counter!.value)
  cpu.setRegister(RCX, 4, aux?.value ?? 0n)
}

/** EDX:EAX, their upper halves cleared. */
function setPair(cpu: Processor, value: bigint): void {
  cpu.setRegister(RAX, 4, value)
  cpu.setRegister(RDX, 4, value >> 32n)
}

/** The segment that a selector operand stands for, if this privilege level may see it. */
function visibleSegment(cpu: Processor, instruction: Instruction): Segment | undefined {
  if (!cpu.protectedMode || cpu.virtual8086) throw invalidOpcode()
  const selector = Number(cpu.readRm(instruction, 2))
  const segment = readSegment(cpu, selector)
  if (segment === undefined || (isCode(segment) && isConforming(segment))) return segment
  return Math.max(cpu.cpl, rpl(selector)) > segment.dpl ? undefined : segment
}

/** "LAR - Load Access Rights Byte". */
function loadAccessRights(cpu: Processor, instruction: Instruction): void {
  const segment = visibleSegment(cpu, instruction)
  const types = cpu.longMode
    ? [...TYPES_WITH_LIMIT_64, ...GATE_TYPES_64]
    : [...TYPES_WITH_LIMIT, ...GATE_TYPES]
  const known = segment !== undefined && (segment.s === 1 || types.includes(segment.type))
  cpu.setFlags({ ZF: known })
  if (!known) return
  const { type, s, dpl, present, avl, l, db, g, limit } = segment
  const low = (type << 8) | (s << 12) | (dpl << 13) | (Number(present) << 15)
  const limitBits = ((g === 1 ? limit >>> 12 : limit) >> 16) & 0xf
  const high = (limitBits << 16) | (avl << 20) | (l << 21) | (db << 22) | (g << 23)
  cpu.setRegister(instruction.reg, instruction.operandSize, BigInt(low | high))
}

/** "LSL - Load Segment Limit". */
function loadLimit(cpu: Processor, instruction: Instruction): void {
  const segment = visibleSegment(cpu, instruction)
  const types = cpu.longMode ? TYPES_WITH_LIMIT_64 : TYPES_WITH_LIMIT
  const known = segment !== undefined && (segment.s === 1 || types.includes(segment.type))
  cpu.setFlags({ ZF: known })
  if (known) cpu.setRegister(instruction.reg, instruction.operandSize, BigInt(segment.limit))
}

/** "VERR/VERW - Verify a Segment for Reading or Writing". */
function verify(cpu: Processor, instruction: Instruction, access: 'read' | 'write'): void {
  const segment = visibleSegment(cpu, instruction)
  const allowed =
    segment !== undefined &&
    segment.s === 1 &&
    (access === 'read'
      ? !isCode(segment) || (segment.type & TYPE_READABLE) !== 0
      : !isCode(segment) && (segment.type & TYPE_WRITABLE) !== 0)
  cpu.setFlags({ ZF: allowed })
}

function undefinedOpcode(): never {
  throw invalidOpcode()
}

/** Instructions about the processor itself. */
export const SYSTEM: InstructionTable = {
  '0F 01 CA': { name: 'clac', run: (cpu) => setAlignmentCheck(cpu, false) },
  '0F 01 CB': { name: 'stac', run: (cpu) => setAlignmentCheck(cpu, true) },
  '66 0F 38 82 m': { name: 'invpcid', run: invalidateContext },
  '0F 01 D0': { name: 'xgetbv', run: getExtendedControl },
  '0F 01 F9': { name: 'rdtscp', run: readTimeStamp },
  // KVM does not offer it to guests.
  '0F 01 FD': { name: 'rdpru', run: undefinedOpcode },
  // The host's caches hold what the guest's would: writing back only has to make the faults of a read.
  '66 0F AE /6 m': {
    name: 'clwb',
    run: (cpu, instruction) => void cpu.read(cpu.address(instruction), 1),
  },
  // KVM takes both for a `nop`: `mwait` may end for any reason.
  '0F 01 C8': { name: 'monitor', run: supervisorOnly },
  '0F 01 C9': { name: 'mwait', run: supervisorOnly },
  '0F 00 /4': { name: 'verr', run: (cpu, instruction) => verify(cpu, instruction, 'read') },
  '0F 00 /5': { name: 'verw', run: (cpu, instruction) => verify(cpu, instruction, 'write') },
  '0F 02': { name: 'lar', run: loadAccessRights },
  '0F 03': { name: 'lsl', run: loadLimit },
  '0F B9': { name: 'ud1', run: undefinedOpcode },
  '0F FF': { name: 'ud0', run: undefinedOpcode },
}
