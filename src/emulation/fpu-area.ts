import type { Vcpu } from '../kvm/vcpu.js'

/** State components (Intel SDM vol. 1, "XSAVE-Supported Features and State-Component Bitmaps"). */
export const XSTATE_X87 = 1n << 0n
export const XSTATE_SSE = 1n << 1n

/** Bytes that every vCPU's state fits into; KVM takes of it what it needs, AMX included. */
const AREA_SIZE = 0x4000
/** Offsets in the legacy region ("FXSAVE - Save x87 FPU, MMX Technology, and SSE State", SDM vol. 2A). */
const FCW = 0
const FSW = 2
const FTW = 4
const MXCSR = 24
const ST0 = 32
const XMM0 = 160
const REGISTER_SIZE = 16
/** Offset of XSTATE_BV, the first field of the header ("XSAVE Header"). */
export const XSTATE_BV = 512

/** FSW ("x87 FPU Status Register"). */
export const FSW_C1 = 1 << 9
const FSW_TOP_SHIFT = 11
const FSW_TOP = 7 << FSW_TOP_SHIFT

/** The FPU and SSE state of a vCPU: its XSAVE area, in the standard format. */
export class FpuArea {
  readonly bytes: Uint8Array
  readonly view: DataView
  readonly #vcpu: Vcpu
  #changed = false

  constructor(vcpu: Vcpu) {
    this.#vcpu = vcpu
    this.bytes = vcpu.getXsave(AREA_SIZE)
    this.view = new DataView(this.bytes.buffer)
  }

  /** Components that are not in their initial configuration. */
  get inUse(): bigint {
    return this.view.getBigUint64(XSTATE_BV, true)
  }

  set inUse(components: bigint) {
    this.view.setBigUint64(XSTATE_BV, components, true)
    this.#changed = true
  }

  /** x87 control word. */
  get fcw(): number {
    return this.view.getUint16(FCW, true)
  }

  set fcw(value: number) {
    this.view.setUint16(FCW, value, true)
    this.inUse |= XSTATE_X87
  }

  /** x87 status word. */
  get fsw(): number {
    return this.view.getUint16(FSW, true)
  }

  set fsw(value: number) {
    this.view.setUint16(FSW, value, true)
    this.inUse |= XSTATE_X87
  }

  /** Which physical x87 registers are not empty, a bit each. */
  get ftw(): number {
    return this.view.getUint8(FTW)
  }

  set ftw(value: number) {
    this.view.setUint8(FTW, value)
    this.inUse |= XSTATE_X87
  }

  /** Number of the physical register that is ST(0). */
  get top(): number {
    return (this.fsw & FSW_TOP) >> FSW_TOP_SHIFT
  }

  /** Makes another physical register ST(0). The area has the registers by their place in the stack: they move. */
  rotate(by: number): void {
    const stack = this.bytes.slice(ST0, ST0 + 8 * REGISTER_SIZE)
    for (let i = 0; i < 8; i++) {
      const from = ((i + by + 8) % 8) * REGISTER_SIZE
      this.bytes.set(stack.subarray(from, from + REGISTER_SIZE), ST0 + i * REGISTER_SIZE)
    }
    this.fsw = (this.fsw & ~FSW_TOP) | (((this.top + by) & 7) << FSW_TOP_SHIFT)
  }

  /** The 80 bits of ST(i). */
  st(i: number): Uint8Array {
    return this.bytes.slice(ST0 + i * REGISTER_SIZE, ST0 + i * REGISTER_SIZE + 10)
  }

  setSt(i: number, value: Uint8Array): void {
    this.bytes.set(value, ST0 + i * REGISTER_SIZE)
    this.ftw |= 1 << ((this.top + i) & 7)
  }

  isEmpty(i: number): boolean {
    return (this.ftw & (1 << ((this.top + i) & 7))) === 0
  }

  free(i: number): void {
    this.ftw &= ~(1 << ((this.top + i) & 7))
  }

  get mxcsr(): number {
    return this.view.getUint32(MXCSR, true)
  }

  set mxcsr(value: number) {
    this.view.setUint32(MXCSR, value, true)
    // KVM_SET_XSAVE takes MXCSR only along with a component of SSE's.
    this.inUse |= XSTATE_SSE
  }

  /** A copy of an XMM register. */
  xmm(number: number): Uint8Array {
    return this.bytes.slice(XMM0 + number * REGISTER_SIZE, XMM0 + (number + 1) * REGISTER_SIZE)
  }

  /** Writes the low bytes of an XMM register. */
  setXmm(number: number, value: Uint8Array): void {
    this.bytes.set(value, XMM0 + number * REGISTER_SIZE)
    this.inUse |= XSTATE_SSE
  }

  /** KVM_SET_XSAVE, if anything was written. */
  commit(): void {
    if (this.#changed) this.#vcpu.setXsave(this.bytes)
  }
}
