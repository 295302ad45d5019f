import type { Instruction, InstructionTable } from './decode.js'
import { XSTATE_BV, XSTATE_SSE, XSTATE_X87 } from './fpu-area.js'
import { DEVICE_NOT_AVAILABLE, GuestFault, generalProtection, invalidOpcode, Refusal } from './outcome.js'
import type { Pointer, Processor } from './processor.js'

// CR0, CR4 (Intel SDM vol. 3A, "Control Registers").
const CR0_TS = 1n << 3n
const CR4_OSXSAVE = 1n << 18n

const IA32_XSS = 0xda0
/** CPUID leaf of the extended state's components, one a subleaf. */
const CPUID_XSTATE = 0xd
/** ECX of a subleaf: the component belongs to the supervisor; in the compacted format it starts at 64 bytes. */
const COMPONENT_SUPERVISOR = 1
const COMPONENT_ALIGNED = 2

const XSTATE_AVX = 1n << 2n

// Layout of an area (SDM vol. 1, "XSAVE Area").
const HEADER_SIZE = 64
const XCOMP_BV = 520
const EXTENDED_REGION = XSTATE_BV + HEADER_SIZE
const ALIGNMENT = 64n
/** In XCOMP_BV: the format is the compacted one. */
const COMPACTED = 1n << 63n

const MXCSR = 24
const MXCSR_INITIAL = 0x1f80
const MXCSR_MASK = 0xffff
/** FCW to FDP, and ST0 to ST7: the x87 component. */
const X87_PARTS = [
  [0, 24],
  [32, 128],
] as const
const FCW_INITIAL = 0x37f
const XMM0 = 160
const XMM_SIZE = 16

/** A component of the extended region. */
interface Component {
  readonly bit: bigint
  /** In the standard format. */
  readonly offset: number
  readonly size: number
  readonly aligned: boolean
}

/** What XSAVE and its relatives work on. */
interface Area {
  readonly pointer: Pointer
  /** Components that are asked for and enabled: RFBM, the requested-feature bitmap. */
  readonly requested: bigint
  readonly components: readonly Component[]
}

/** The checks that all of them make. */
function prepare(cpu: Processor, instruction: Instruction): Area {
  if ((cpu.special.cr4 & CR4_OSXSAVE) === 0n) throw invalidOpcode()
  const pointer = cpu.address(instruction)
  if ((cpu.special.cr0 & CR0_TS) !== 0n) throw new GuestFault(DEVICE_NOT_AVAILABLE)
  if (cpu.linear(pointer, 1, 'read') % ALIGNMENT !== 0n) throw generalProtection()
  const { rax, rdx } = cpu.registers
  const asked = ((rdx & 0xffff_ffffn) << 32n) | (rax & 0xffff_ffffn)
  return { pointer, requested: cpu.xcr0() & asked, components: components(cpu) }
}

/** The components that the vCPU's CPUID lists: KVM's own area has them at the same offsets. */
function components(cpu: Processor): Component[] {
  return (
    cpu.vcpu
      .getCpuid()
      .filter((leaf) => leaf.function === CPUID_XSTATE && leaf.index >= 2 && leaf.eax !== 0)
      // The CPUID is whatever the vCPU was given.
      .filter(({ eax, ebx }) => ebx >= EXTENDED_REGION && ebx + eax <= cpu.fpu.bytes.length)
      .filter(({ ecx }) => (ecx & COMPONENT_SUPERVISOR) === 0)
      .map(({ index, eax, ebx, ecx }) => ({
        bit: 1n << BigInt(index),
        offset: ebx,
        size: eax,
        aligned: (ecx & COMPONENT_ALIGNED) !== 0,
      }))
      .sort((a, b) => (a.bit < b.bit ? -1 : 1))
  )
}

/** Where the components are in the compacted format ("Compacted Format of the Extended Region of an XSAVE Area"). */
function compact(list: readonly Component[], present: bigint): Component[] {
  let offset = EXTENDED_REGION
  return list
    .filter(({ bit }) => (present & bit) !== 0n)
    .map((component) => {
      if (component.aligned) offset = Math.ceil(offset / Number(ALIGNMENT)) * Number(ALIGNMENT)
      const placed = { ...component, offset }
      offset += component.size
      return placed
    })
}

/** Registers that the mode has: outside 64-bit mode, XMM8 to XMM15 are left alone. */
const xmmBytes = (cpu: Processor) => (cpu.codeSize === 64 ? 16 : 8) * XMM_SIZE

const at = ({ segment, offset }: Pointer, displacement: number): Pointer => ({
  segment,
  offset: offset + BigInt(displacement),
})

/** Something to be copied into the guest's area. */
type Piece = readonly [offset: number, bytes: Uint8Array]

/** The pieces of the legacy region. */
function legacyPieces(cpu: Processor, { wide }: Instruction, saved: bigint, withMxcsr: boolean): Piece[] {
  const { bytes } = cpu.fpu
  const pieces: Piece[] = []
  if ((saved & XSTATE_X87) !== 0n) {
    for (const [offset, size] of X87_PARTS) pieces.push([offset, bytes.slice(offset, offset + size)])
    // Without REX.W, the upper halves of FIP and FDP are segment selectors, which new processors save as 0.
    if (!wide) for (const offset of [12, 20]) pieces[0]![1].fill(0, offset, offset + 4)
  }
  if (withMxcsr) pieces.push([MXCSR, bytes.slice(MXCSR, MXCSR + 8)])
  if ((saved & XSTATE_SSE) !== 0n) pieces.push([XMM0, bytes.slice(XMM0, XMM0 + xmmBytes(cpu))])
  return pieces
}

/** Writes all pieces, or none where one of them faults. */
function writePieces(cpu: Processor, { pointer }: Area, pieces: readonly Piece[]): void {
  for (const [offset, bytes] of pieces) cpu.probe(at(pointer, offset), bytes.length, 'write')
  for (const [offset, bytes] of pieces) cpu.write(at(pointer, offset), bytes)
}

function word(value: bigint): Uint8Array {
  const bytes = new Uint8Array(8)
  new DataView(bytes.buffer).setBigUint64(0, value, true)
  return bytes
}

function readWord(cpu: Processor, { pointer }: Area, offset: number): bigint {
  return new DataView(cpu.read(at(pointer, offset), 8).buffer).getBigUint64(0, true)
}

/** "XSAVE - Save Processor Extended States", and XSAVEOPT, which may save as much. */
function save(cpu: Processor, instruction: Instruction): void {
  const area = prepare(cpu, instruction)
  const { requested } = area
  const { fpu } = cpu
  const withMxcsr = (requested & (XSTATE_SSE | XSTATE_AVX)) !== 0n
  const pieces = legacyPieces(cpu, instruction, requested, withMxcsr)
  for (const { bit, offset, size } of area.components) {
    if ((requested & bit) !== 0n) pieces.push([offset, fpu.bytes.slice(offset, offset + size)])
  }
  const inUse = (readWord(cpu, area, XSTATE_BV) & ~requested) | (fpu.inUse & requested)
  writePieces(cpu, area, [...pieces, [XSTATE_BV, word(inUse)]])
}

/** "XSAVEC - Save Processor Extended States With Compaction". */
function saveCompacted(cpu: Processor, instruction: Instruction): void {
  const area = prepare(cpu, instruction)
  const { requested } = area
  const { fpu } = cpu
  const mxcsrInUse = fpu.mxcsr === MXCSR_INITIAL ? 0n : XSTATE_SSE
  const saved = requested & (fpu.inUse | mxcsrInUse)
  const pieces = legacyPieces(cpu, instruction, saved, (saved & XSTATE_SSE) !== 0n)
  const placed = compact(area.components, requested)
  for (const { bit, offset, size } of placed.filter(({ bit }) => (saved & bit) !== 0n)) {
    const from = area.components.find((component) => component.bit === bit)!.offset
    pieces.push([offset, fpu.bytes.slice(from, from + size)])
  }
  pieces.push([XSTATE_BV, word(saved)], [XCOMP_BV, word(requested | COMPACTED)])
  writePieces(cpu, area, pieces)
}

/** "XRSTOR - Restore Processor Extended States". */
function restore(cpu: Processor, instruction: Instruction): void {
  const area = prepare(cpu, instruction)
  const { pointer, requested } = area
  const header = cpu.read(at(pointer, XSTATE_BV), HEADER_SIZE)
  const present = readWord(cpu, area, XSTATE_BV)
  const layout = readWord(cpu, area, XCOMP_BV)
  const isCompacted = (layout & COMPACTED) !== 0n
  const enabled = cpu.xcr0()
  const inLayout = layout & ~COMPACTED
  const valid = isCompacted
    ? (inLayout & ~enabled) === 0n && (present & ~inLayout) === 0n
    : layout === 0n && (present & ~enabled) === 0n
  if (!valid || header.subarray(16, isCompacted ? HEADER_SIZE : 24).some((byte) => byte !== 0)) {
    throw generalProtection()
  }
  const { fpu } = cpu
  restoreMxcsr(cpu, area, isCompacted ? present : undefined)
  if ((requested & XSTATE_X87) !== 0n) {
    for (const [offset, size] of X87_PARTS) {
      const loaded = (present & XSTATE_X87) !== 0n
      fpu.bytes.set(loaded ? cpu.read(at(pointer, offset), size) : new Uint8Array(size), offset)
      if (!loaded && offset === 0) fpu.fcw = FCW_INITIAL
    }
    fpu.inUse |= XSTATE_X87
  }
  if ((requested & XSTATE_SSE) !== 0n) {
    const size = xmmBytes(cpu)
    const loaded = (present & XSTATE_SSE) !== 0n
    fpu.bytes.set(loaded ? cpu.read(at(pointer, XMM0), size) : new Uint8Array(size), XMM0)
    fpu.inUse |= XSTATE_SSE
  }
  const placed = isCompacted ? compact(area.components, inLayout) : area.components
  for (const { bit, offset: to, size } of area.components) {
    if ((requested & bit) === 0n) continue
    const from = (present & bit) !== 0n ? placed.find((component) => component.bit === bit) : undefined
    if (from === undefined) fpu.inUse &= ~bit
    else {
      fpu.bytes.set(cpu.read(at(pointer, from.offset), size), to)
      fpu.inUse |= bit
    }
  }
}

/** @param present - XSTATE_BV, where the format is compacted: in the standard one, MXCSR is always there */
function restoreMxcsr(cpu: Processor, { pointer, requested }: Area, present: bigint | undefined): void {
  const wanted = requested & (present === undefined ? XSTATE_SSE | XSTATE_AVX : XSTATE_SSE)
  if (wanted === 0n) return
  if (present !== undefined && (present & XSTATE_SSE) === 0n) {
    cpu.fpu.mxcsr = MXCSR_INITIAL
    return
  }
  const value = new DataView(cpu.read(at(pointer, MXCSR), 4).buffer).getUint32(0, true)
  if ((value & ~MXCSR_MASK) !== 0) throw generalProtection()
  cpu.fpu.mxcsr = value
}

/** XSAVES and XRSTORS do the same with the supervisor's components, which KVM does not give to userspace. */
function withoutSupervisorState(cpu: Processor): void {
  if (cpu.cpl !== 0) throw generalProtection()
  const [supervisor] = cpu.vcpu.getMsrs([IA32_XSS])
  if (supervisor !== undefined && supervisor.value !== 0n) throw new Refusal('IA32_XSS is not 0')
}

/** XSAVE and XRSTOR in their forms. With REX.W they have the same opcodes, and names that end in 64. */
export const XSAVE: InstructionTable = {
  'NP 0F AE /4 m': { name: 'xsave', run: save },
  'NP 0F AE /6 m': { name: 'xsaveopt', run: save },
  'NP 0F C7 /4 m': { name: 'xsavec', run: saveCompacted },
  'NP 0F AE /5 m': { name: 'xrstor', run: restore },
  'NP 0F C7 /5 m': {
    name: 'xsaves',
    run: (cpu, instruction) => {
      withoutSupervisorState(cpu)
      saveCompacted(cpu, instruction)
    },
  },
  'NP 0F C7 /3 m': {
    name: 'xrstors',
    run: (cpu, instruction) => {
      withoutSupervisorState(cpu)
      const layout = new DataView(cpu.read(at(cpu.address(instruction), XCOMP_BV), 8).buffer)
      if ((layout.getBigUint64(0, true) & COMPACTED) === 0n) throw generalProtection()
      restore(cpu, instruction)
    },
  },
}
