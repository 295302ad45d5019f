/** All of a vCPU's state, as bytes that KVM gave and takes back: Linux, Documentation/virt/kvm/api.rst. */

import { NodevisorError } from '../errors.js'
import { decodeMsrs, encodeMsrs, type MsrEntry } from './msrs.js'
import { REGS_SIZE, SREGS_SIZE } from './registers.js'
import type { Vcpu } from './vcpu.js'
import { DEBUGREGS_SIZE, LAPIC_SIZE, VCPU_EVENTS_SIZE, XCRS_SIZE } from './vcpu-state.js'

/** The state of one vCPU: the kernel's structs, by the names of their ioctls. */
export interface VcpuSnapshot {
  /** KVM_MP_STATE_*. */
  readonly mpState: number
  readonly regs: Uint8Array
  readonly sregs: Uint8Array
  readonly debugRegs: Uint8Array
  readonly xsave: Uint8Array
  /** Empty where the host's KVM has none. */
  readonly xcrs: Uint8Array
  /** Empty without a local APIC in KVM. */
  readonly lapic: Uint8Array
  /** `struct kvm_msr_entry`, one after the other. */
  readonly msrs: Uint8Array
  readonly events: Uint8Array
}

/** What of a vCPU there is to keep, on this host and in this VM. */
export interface VcpuParts {
  /** `struct kvm_msr_entry` without values, for each MSR that KVM gives: see {@link readableMsrs}. */
  readonly msrs: Uint8Array
  /** Bytes of KVM_GET_XSAVE2's area. */
  readonly xsaveSize: number
  readonly hasXcrs: boolean
  readonly hasLapic: boolean
  /** Whether a guest's TSC can be set, and is not the host's. */
  readonly hasOwnTsc: boolean
  /** Whether the processor is QEMU's, to which a TSS that is in use, as KVM says it is, has no I/O permissions. */
  readonly wantsIdleTss: boolean
}

/** Bytes of each struct; `msrs` and `xsave` are as large as they are. */
export const VCPU_STRUCT_SIZES = {
  regs: REGS_SIZE,
  sregs: SREGS_SIZE,
  debugRegs: DEBUGREGS_SIZE,
  events: VCPU_EVENTS_SIZE,
} as const

export const VCPU_OPTIONAL_STRUCT_SIZES = { xcrs: XCRS_SIZE, lapic: LAPIC_SIZE } as const

export const MSR_ENTRY_SIZE = 16
/** Where an entry has its value. */
const MSR_VALUE = 8
export const MAX_MP_STATE = 4

const IA32_TSC = 0x10
/** In ticks of the TSC: it means something only once that is set. */
const IA32_TSC_DEADLINE = 0x6e0
/** The type of TR in `struct kvm_sregs`: the seventh segment, of 24 bytes each. */
const TR_TYPE = 6 * 24 + 14
/** Bit 1 of the type (Intel SDM vol. 3, "TSS Descriptor in 64-bit Mode"). */
const TSS_BUSY = 2
const NO_BYTES = new Uint8Array()

/** MSRs that KVM keeps for a guest and does not list (KVM_GET_MSR_INDEX_LIST): Intel SDM vol. 4. */
const UNLISTED_MSRS: readonly number[] = [
  // MTRRs: variable ones, fixed ones, default type.
  ...range(0x200, 0x10),
  ...[0x250, 0x258, 0x259, ...range(0x268, 8), 0x2ff],
  // Machine checks: CTL, STATUS, ADDR and MISC of up to 32 banks.
  ...range(0x400, 4 * 32),
]

/**
 * The MSRs of a vCPU that KVM gives, in the order in which they are to be set: what counts in ticks of the TSC comes after
 * that.
 *
 * @param list - KVM_GET_MSR_INDEX_LIST; some in there do not go with the vCPU's CPUID
 * @returns `struct kvm_msr_entry`, one after the other, without values
 */
export function readableMsrs(vcpu: Vcpu, list: Iterable<number>): Uint8Array {
  const others = new Set([...list, ...UNLISTED_MSRS])
  others.delete(IA32_TSC)
  others.delete(IA32_TSC_DEADLINE)
  const readable = [IA32_TSC, ...others, IA32_TSC_DEADLINE]
  for (;;) {
    const { length } = vcpu.getMsrs(readable)
    if (length === readable.length) return encodeMsrs(readable.map((index) => ({ index, value: 0n })))
    readable.splice(length, 1)
  }
}

/** Reads a vCPU that is out of the guest, with nothing left to finish. */
export function saveVcpu({ native }: Vcpu, parts: VcpuParts): VcpuSnapshot {
  // First: what INIT and SIPI have left to do is done with it.
  const mpState = native.getMpState()
  const read = (size: number, get: (bytes: Uint8Array) => void) => {
    const bytes = new Uint8Array(size)
    get(bytes)
    return bytes
  }
  const msrs = parts.msrs.slice()
  native.getMsrs(msrs)
  return {
    mpState,
    regs: read(REGS_SIZE, (bytes) => native.getRegs(bytes)),
    sregs: read(SREGS_SIZE, (bytes) => native.getSregs(bytes)),
    debugRegs: read(DEBUGREGS_SIZE, (bytes) => native.getDebugRegs(bytes)),
    xsave: read(parts.xsaveSize, (bytes) => native.getXsave(bytes)),
    xcrs: parts.hasXcrs ? read(XCRS_SIZE, (bytes) => native.getXcrs(bytes)) : NO_BYTES,
    lapic: parts.hasLapic ? read(LAPIC_SIZE, (bytes) => native.getLapic(bytes)) : NO_BYTES,
    msrs,
    events: read(VCPU_EVENTS_SIZE, (bytes) => native.getVcpuEvents(bytes)),
  }
}

/**
 * Gives a vCPU, with the CPUID of the one that was saved, its state. The order is that of what depends on what: the
 * local APIC's mode is a special register, its deadline an MSR, and events come into what all of them make.
 *
 * @param elapsed - ns since it was saved: the TSC has gone on meanwhile
 * @throws `ERR_SYSCALL` for a state that KVM refuses, `ERR_SNAPSHOT_STATE` for an MSR that it refuses
 */
export function restoreVcpu(vcpu: Vcpu, saved: VcpuSnapshot, parts: VcpuParts, elapsed: number): void {
  const { native } = vcpu
  native.setSregs(parts.wantsIdleTss ? withIdleTss(saved.sregs) : saved.sregs)
  native.setRegs(saved.regs)
  native.setXsave(saved.xsave)
  if (parts.hasXcrs) native.setXcrs(saved.xcrs)
  native.setDebugRegs(saved.debugRegs)
  native.setMpState(saved.mpState)
  if (parts.hasLapic) native.setLapic(saved.lapic)
  restoreMsrs(vcpu, saved.msrs, parts.hasOwnTsc ? elapsed : undefined)
  native.setVcpuEvents(saved.events)
}

/** TR with the type of a TSS that is not busy, which KVM reports as busy again. */
function withIdleTss(sregs: Uint8Array): Uint8Array {
  const idle = sregs.slice()
  idle[TR_TYPE]! &= ~TSS_BUSY
  return idle
}

/** @param elapsed - undefined where the TSC is not to be set */
function restoreMsrs(vcpu: Vcpu, saved: Uint8Array, elapsed: number | undefined): void {
  const msrs = saved.slice()
  const view = new DataView(msrs.buffer)
  if (msrs.length < MSR_ENTRY_SIZE || view.getUint32(0, true) !== IA32_TSC) {
    setMsrs(vcpu, msrs)
  } else if (elapsed === undefined) {
    setMsrs(vcpu, msrs.subarray(MSR_ENTRY_SIZE))
  } else {
    const ticks = BigInt(Math.round((elapsed * vcpu.getTscKhz()) / 1e6))
    view.setBigUint64(MSR_VALUE, view.getBigUint64(MSR_VALUE, true) + ticks, true)
    setMsrs(vcpu, msrs)
  }
}

/** KVM stops at the first MSR that it refuses, which does no harm if it has that value anyway. */
function setMsrs(vcpu: Vcpu, entries: Uint8Array): void {
  for (let at = 0; at < entries.length; ) {
    at += vcpu.native.setMsrs(entries.subarray(at)) * MSR_ENTRY_SIZE
    if (at >= entries.length) return
    const [refused] = decodeMsrs(entries.subarray(at), 1) as [MsrEntry]
    const [current] = vcpu.getMsrs([refused.index])
    if (current?.value !== refused.value) {
      throw new NodevisorError(
        'ERR_SNAPSHOT_STATE',
        `Expected a snapshot that this host's KVM can take but it refuses the MSR 0x${refused.index.toString(16)} as ` +
          `0x${refused.value.toString(16)}; restore it on a host like the one that it was taken on`,
        { msr: refused.index, value: refused.value },
      )
    }
    at += MSR_ENTRY_SIZE
  }
}

function range(first: number, count: number): number[] {
  return Array.from({ length: count }, (_, index) => first + index)
}
