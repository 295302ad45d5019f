import type { Registers, SpecialRegisters } from '../kvm/registers.js'
import type { Vcpu } from '../kvm/vcpu.js'
import type { GuestMemory } from '../memory/guest-memory.js'
import type { ExitRecord } from './exit-log.js'
import type { VirtualCpu, VirtualCpuState } from './virtual-cpu.js'

/** What the code segment and the control registers make of the processor. */
export type ProcessorMode = 'real' | 'virtual-8086' | 'protected' | 'compatibility' | 'long'

/** An exception or interrupt that a vCPU was taking when it left the guest. */
export interface PendingException {
  readonly vector: number
  /** `#PF`, `#GP`, …; undefined for vectors that have no name. */
  readonly name: string | undefined
  readonly errorCode: number | undefined
}

/** One vCPU at the end of a run. */
export interface VcpuReport {
  readonly vcpu: number
  readonly state: VirtualCpuState
  readonly mode: ProcessorMode
  readonly registers: Registers
  readonly specialRegisters: SpecialRegisters
  /** Up to 16 bytes at `rip`: fewer, or none, where no RAM is or nothing is mapped. */
  readonly code: Uint8Array
  readonly exception: PendingException | undefined
  /** KVM has reset the vCPU since, as it does on AMD-V after a triple fault: the registers are those after reset. */
  readonly wasReset: boolean
}

/** What is known of a machine whose run ended badly. */
export interface RunReport {
  /** The vCPU that it ended on, if one did. */
  readonly vcpu: number | undefined
  /** vCPUs that were started, the one that it ended on first; at most 16. */
  readonly vcpus: readonly VcpuReport[]
  /** The last 64 exits of all vCPUs, the oldest first. Interruptions by the host are not among them. */
  readonly lastExits: readonly ExitRecord[]
}

const MAX_VCPUS = 16
const CODE_LENGTH = 16
const CR0_PE = 1n
const EFER_LMA = 1n << 10n
const RFLAGS_VM = 1n << 17n
/** Where a processor starts after reset (Intel SDM vol. 3A, "First Instruction Executed"). */
const RESET_CS_BASE = 0xffff_0000n
const RESET_RIP = 0xfff0n

/** Intel SDM vol. 3A, "Exceptions and Interrupts", by vector. */
const EXCEPTIONS: readonly (string | undefined)[] = [
  ...[
    '#DE',
    '#DB',
    'NMI',
    '#BP',
    '#OF',
    '#BR',
    '#UD',
    '#NM',
    '#DF',
    undefined,
    '#TS',
    '#NP',
    '#SS',
    '#GP',
    '#PF',
  ],
  ...[
    undefined,
    '#MF',
    '#AC',
    '#MC',
    '#XM',
    '#VE',
    '#CP',
    undefined,
    undefined,
    undefined,
    undefined,
    undefined,
  ],
  ...[undefined, '#HV', '#VC', '#SX'],
]

/** Looks at the vCPUs, which are out of the guest. */
export function makeReport(
  cpus: readonly VirtualCpu[],
  memory: GuestMemory,
  culprit: number | undefined,
  lastExits: readonly ExitRecord[],
): RunReport {
  const first = cpus.filter(({ index }) => index === culprit)
  const others = cpus.filter(({ index, state }) => index !== culprit && state !== 'parked')
  const vcpus = [...first, ...others].slice(0, MAX_VCPUS).map((cpu) => reportOf(cpu, memory))
  return { vcpu: culprit, vcpus, lastExits }
}

function reportOf(cpu: VirtualCpu, memory: GuestMemory): VcpuReport {
  const vcpu = cpu.unsafeVcpu
  const registers = vcpu.getRegs()
  const specialRegisters = vcpu.getSregs()
  const mode = modeOf(registers, specialRegisters)
  return {
    vcpu: cpu.index,
    state: cpu.state,
    mode,
    registers,
    specialRegisters,
    code: codeAt(vcpu, memory, linearRip(registers, specialRegisters, mode)),
    exception: exceptionOf(vcpu),
    wasReset: isAtResetVector(registers, specialRegisters),
  }
}

/** The mode that a processor's registers mean (Intel SDM vol. 3A, "Modes of Operation"). */
export function modeOf({ rflags }: Registers, { cr0, efer, cs }: SpecialRegisters): ProcessorMode {
  if ((cr0 & CR0_PE) === 0n) return 'real'
  if ((efer & EFER_LMA) !== 0n) return cs.l === 1 ? 'long' : 'compatibility'
  return (rflags & RFLAGS_VM) !== 0n ? 'virtual-8086' : 'protected'
}

/** Whether a processor is about to execute its first instruction after reset, or INIT. */
export function isAtResetVector({ rip }: Registers, { cs }: SpecialRegisters): boolean {
  return rip === RESET_RIP && cs.base === RESET_CS_BASE
}

/** The linear address of a vCPU's next instruction. */
export function linearRipOf(vcpu: Vcpu): bigint {
  const registers = vcpu.getRegs()
  const special = vcpu.getSregs()
  return linearRip(registers, special, modeOf(registers, special))
}

function linearRip({ rip }: Registers, { cs }: SpecialRegisters, mode: ProcessorMode): bigint {
  return mode === 'long' ? rip : (cs.base + rip) & 0xffff_ffffn
}

function codeAt(vcpu: Vcpu, memory: GuestMemory, linear: bigint): Uint8Array {
  const bytes: number[] = []
  while (bytes.length < CODE_LENGTH) {
    const { valid, physicalAddress } = vcpu.translate(linear + BigInt(bytes.length))
    const address = Number(physicalAddress)
    if (!valid || !memory.contains(address)) break
    bytes.push(memory.readUint8(address))
  }
  return Uint8Array.from(bytes)
}

function exceptionOf(vcpu: Vcpu): PendingException | undefined {
  const { exception } = vcpu.getVcpuEvents()
  if (!exception.injected && !exception.pending) return undefined
  return {
    vector: exception.nr,
    name: EXCEPTIONS[exception.nr],
    errorCode: exception.hasErrorCode ? exception.errorCode : undefined,
  }
}
