/** FPU and SSE state, `struct kvm_fpu`. */
export interface FpuState {
  /** ST0 to ST7, 16 bytes each. */
  readonly fpr: Uint8Array
  readonly fcw: number
  readonly fsw: number
  /** Abridged tag word, as FXSAVE has it. */
  readonly ftwx: number
  readonly lastOpcode: number
  readonly lastIp: bigint
  readonly lastDp: bigint
  /** XMM0 to XMM15, 16 bytes each. */
  readonly xmm: Uint8Array
  readonly mxcsr: number
}

export const FPU_SIZE = 416

export function decodeFpu(view: DataView): FpuState {
  const bytes = new Uint8Array(view.buffer, view.byteOffset, FPU_SIZE)
  return {
    fpr: bytes.slice(0, 128),
    fcw: view.getUint16(128, true),
    fsw: view.getUint16(130, true),
    ftwx: view.getUint8(132),
    lastOpcode: view.getUint16(134, true),
    lastIp: view.getBigUint64(136, true),
    lastDp: view.getBigUint64(144, true),
    xmm: bytes.slice(152, 408),
    mxcsr: view.getUint32(408, true),
  }
}

export function encodeFpu(view: DataView, fpu: FpuState): void {
  const bytes = new Uint8Array(view.buffer, view.byteOffset, FPU_SIZE)
  bytes.set(fpu.fpr.subarray(0, 128), 0)
  view.setUint16(128, fpu.fcw, true)
  view.setUint16(130, fpu.fsw, true)
  view.setUint8(132, fpu.ftwx)
  view.setUint16(134, fpu.lastOpcode, true)
  view.setBigUint64(136, fpu.lastIp, true)
  view.setBigUint64(144, fpu.lastDp, true)
  bytes.set(fpu.xmm.subarray(0, 256), 152)
  view.setUint32(408, fpu.mxcsr, true)
}

/** Events on their way into the guest, `struct kvm_vcpu_events`. */
export interface VcpuEvents {
  readonly exception: {
    readonly injected: boolean
    readonly nr: number
    readonly hasErrorCode: boolean
    readonly pending: boolean
    readonly errorCode: number
  }
  readonly interrupt: {
    readonly injected: boolean
    readonly nr: number
    readonly soft: boolean
    /** KVM_X86_SHADOW_INT_*: 1 after `mov ss`, 2 after `sti`. */
    readonly shadow: number
  }
  readonly nmi: { readonly injected: boolean; readonly pending: number; readonly masked: boolean }
  readonly sipiVector: number
  /** KVM_VCPUEVENT_VALID_*: which of the optional parts are meant when set. */
  readonly flags: number
  readonly smi: {
    readonly smm: boolean
    readonly pending: boolean
    readonly insideNmi: boolean
    readonly latchedInit: boolean
  }
  readonly tripleFaultPending: boolean
  readonly exceptionPayload: bigint | undefined
}

export const VCPU_EVENTS_SIZE = 64

export function decodeVcpuEvents(view: DataView): VcpuEvents {
  const flag = (at: number) => view.getUint8(at) !== 0
  return {
    exception: {
      injected: flag(0),
      nr: view.getUint8(1),
      hasErrorCode: flag(2),
      pending: flag(3),
      errorCode: view.getUint32(4, true),
    },
    interrupt: { injected: flag(8), nr: view.getUint8(9), soft: flag(10), shadow: view.getUint8(11) },
    nmi: { injected: flag(12), pending: view.getUint8(13), masked: flag(14) },
    sipiVector: view.getUint32(16, true),
    flags: view.getUint32(20, true),
    smi: { smm: flag(24), pending: flag(25), insideNmi: flag(26), latchedInit: flag(27) },
    tripleFaultPending: flag(28),
    exceptionPayload: flag(55) ? view.getBigUint64(56, true) : undefined,
  }
}

export function encodeVcpuEvents(view: DataView, events: VcpuEvents): void {
  const flag = (at: number, value: boolean) => view.setUint8(at, value ? 1 : 0)
  flag(0, events.exception.injected)
  view.setUint8(1, events.exception.nr)
  flag(2, events.exception.hasErrorCode)
  flag(3, events.exception.pending)
  view.setUint32(4, events.exception.errorCode, true)
  flag(8, events.interrupt.injected)
  view.setUint8(9, events.interrupt.nr)
  flag(10, events.interrupt.soft)
  view.setUint8(11, events.interrupt.shadow)
  flag(12, events.nmi.injected)
  view.setUint8(13, events.nmi.pending)
  flag(14, events.nmi.masked)
  view.setUint32(16, events.sipiVector, true)
  view.setUint32(20, events.flags, true)
  flag(24, events.smi.smm)
  flag(25, events.smi.pending)
  flag(26, events.smi.insideNmi)
  flag(27, events.smi.latchedInit)
  flag(28, events.tripleFaultPending)
  flag(55, events.exceptionPayload !== undefined)
  view.setBigUint64(56, events.exceptionPayload ?? 0n, true)
}

/** Debug registers, `struct kvm_debugregs`. */
export interface DebugRegisters {
  /** DR0 to DR3. */
  readonly db: readonly [bigint, bigint, bigint, bigint]
  readonly dr6: bigint
  readonly dr7: bigint
}

export const DEBUGREGS_SIZE = 128

export function decodeDebugRegisters(view: DataView): DebugRegisters {
  const at = (i: number) => view.getBigUint64(i * 8, true)
  return { db: [at(0), at(1), at(2), at(3)], dr6: at(4), dr7: at(5) }
}

export function encodeDebugRegisters(view: DataView, registers: DebugRegisters): void {
  for (const [i, value] of [...registers.db, registers.dr6, registers.dr7].entries()) {
    view.setBigUint64(i * 8, value, true)
  }
}

/** KVM_GUESTDBG_*: what {@link GuestDebug.control} is made of. */
export const GUEST_DEBUG = {
  ENABLE: 1 << 0,
  SINGLESTEP: 1 << 1,
  USE_SW_BP: 1 << 16,
  USE_HW_BP: 1 << 17,
  INJECT_DB: 1 << 18,
  INJECT_BP: 1 << 19,
  BLOCKIRQ: 1 << 20,
} as const

/** What of the guest leads to a debug exit, `struct kvm_guest_debug`. */
export interface GuestDebug {
  /** {@link GUEST_DEBUG} flags, or 0 for none. */
  readonly control: number
  /** DR0 to DR7 with USE_HW_BP. */
  readonly debugRegisters?: readonly bigint[]
}

export const GUEST_DEBUG_SIZE = 72

export function encodeGuestDebug(view: DataView, debug: GuestDebug): void {
  view.setUint32(0, debug.control, true)
  for (const [i, value] of (debug.debugRegisters ?? []).slice(0, 8).entries()) {
    view.setBigUint64(8 + i * 8, value, true)
  }
}

/** Extended control registers, `struct kvm_xcrs`. */
export interface XcrEntry {
  readonly xcr: number
  readonly value: bigint
}

const MAX_XCRS = 16
export const XCRS_SIZE = 8 + MAX_XCRS * 16 + 128

export function decodeXcrs(view: DataView): XcrEntry[] {
  const count = Math.min(view.getUint32(0, true), MAX_XCRS)
  return Array.from({ length: count }, (_, i) => ({
    xcr: view.getUint32(8 + i * 16, true),
    value: view.getBigUint64(16 + i * 16, true),
  }))
}

export function encodeXcrs(view: DataView, xcrs: readonly XcrEntry[]): void {
  view.setUint32(0, xcrs.length, true)
  for (const [i, { xcr, value }] of xcrs.slice(0, MAX_XCRS).entries()) {
    view.setUint32(8 + i * 16, xcr, true)
    view.setBigUint64(16 + i * 16, value, true)
  }
}

/** What a vCPU does, `KVM_MP_STATE_*`. */
export const MP_STATES = {
  runnable: 0,
  uninitialized: 1,
  'init-received': 2,
  halted: 3,
  'sipi-received': 4,
} as const

/** What a vCPU waits for, if anything: the names of `KVM_MP_STATE_*`. */
export type MpState = keyof typeof MP_STATES

/** What a guest-virtual address stands for, `struct kvm_translation`. */
export interface Translation {
  readonly physicalAddress: bigint
  readonly valid: boolean
  readonly writeable: boolean
  readonly usermode: boolean
}

export const TRANSLATION_SIZE = 24
export const LAPIC_SIZE = 1024
