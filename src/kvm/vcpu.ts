import type { NativeVcpu } from '../binding.js'
import { type CpuidEntry, decodeCpuid, encodeCpuid } from './cpuid.js'
import { ExitDecoder, type VcpuExit } from './exits.js'
import { decodeMsrs, encodeMsrs, type MsrEntry } from './msrs.js'
import {
  decodeRegisters,
  decodeSpecialRegisters,
  encodeRegisters,
  encodeSpecialRegisters,
  REGS_SIZE,
  type Registers,
  type SpecialRegisters,
  SREGS_SIZE,
} from './registers.js'
import { Struct } from './structs.js'
import {
  DEBUGREGS_SIZE,
  type DebugRegisters,
  decodeDebugRegisters,
  decodeFpu,
  decodeVcpuEvents,
  decodeXcrs,
  encodeDebugRegisters,
  encodeFpu,
  encodeGuestDebug,
  encodeVcpuEvents,
  encodeXcrs,
  FPU_SIZE,
  type FpuState,
  GUEST_DEBUG_SIZE,
  type GuestDebug,
  LAPIC_SIZE,
  MP_STATES,
  type MpState,
  TRANSLATION_SIZE,
  type Translation,
  VCPU_EVENTS_SIZE,
  type VcpuEvents,
  XCRS_SIZE,
  type XcrEntry,
} from './vcpu-state.js'

const regs = new Struct(REGS_SIZE)
const sregs = new Struct(SREGS_SIZE)
const fpu = new Struct(FPU_SIZE)
const events = new Struct(VCPU_EVENTS_SIZE)
const debugregs = new Struct(DEBUGREGS_SIZE)
const guestDebug = new Struct(GUEST_DEBUG_SIZE)
const xcrs = new Struct(XCRS_SIZE)
const translation = new Struct(TRANSLATION_SIZE)

/**
 * One virtual processor: the ioctls of a vCPU file descriptor, one method each, named after them.
 *
 * Made by {@link Vm.createVcpu}. Every method throws `ERR_CLOSED` after {@link Vcpu.close}, `ERR_RUNNING` while
 * another thread is in the guest, and `ERR_SYSCALL` where KVM refuses.
 */
export class Vcpu {
  readonly id: number
  /** `struct kvm_run` and its data page, shared with the kernel. Detached by {@link close}. */
  readonly kvmRun: DataView
  /** The addon's object. @internal */
  readonly native: NativeVcpu
  readonly #decoder: ExitDecoder

  /** @internal */
  constructor(native: NativeVcpu, id: number) {
    this.native = native
    this.id = id
    this.kvmRun = new DataView(native.kvmRun())
    this.#decoder = new ExitDecoder(this.kvmRun)
  }

  /**
   * KVM_RUN: runs the guest on the calling thread until it exits. Nothing else runs in this thread meanwhile.
   *
   * @returns why it returned. The object is used again by the next call.
   */
  run(): VcpuExit {
    return this.#decoder.decode(this.native.run())
  }

  /**
   * Finishes the port or memory access of the last exit (a read's data reaches its register, `rip` moves on)
   * and returns before the guest's next instruction.
   *
   * @returns `interrupted`, or the next exit where the same instruction makes more than one
   */
  complete(): VcpuExit {
    return this.#decoder.decode(this.native.complete())
  }

  /** Decodes the exit of a KVM_RUN that another thread made. */
  decodeExit(errno: number): VcpuExit {
    return this.#decoder.decode(errno)
  }

  /** KVM_GET_REGS. */
  getRegs(): Registers {
    this.native.getRegs(regs.bytes)
    return decodeRegisters(regs.view)
  }

  /** KVM_SET_REGS. */
  setRegs(registers: Registers): void {
    encodeRegisters(regs.view, registers)
    this.native.setRegs(regs.bytes)
  }

  /** KVM_GET_SREGS. */
  getSregs(): SpecialRegisters {
    this.native.getSregs(sregs.bytes)
    return decodeSpecialRegisters(sregs.view)
  }

  /** KVM_SET_SREGS. */
  setSregs(special: SpecialRegisters): void {
    encodeSpecialRegisters(sregs.view, special)
    this.native.setSregs(sregs.bytes)
  }

  /** KVM_GET_FPU. */
  getFpu(): FpuState {
    this.native.getFpu(fpu.bytes)
    return decodeFpu(fpu.view)
  }

  /** KVM_SET_FPU. */
  setFpu(state: FpuState): void {
    encodeFpu(fpu.clear().view, state)
    this.native.setFpu(fpu.bytes)
  }

  /** KVM_GET_XSAVE or KVM_GET_XSAVE2. @param size - bytes of the area: KVM_CAP_XSAVE2's value, at least 4096 */
  getXsave(size = 4096): Uint8Array {
    const area = new Uint8Array(size)
    this.native.getXsave(area)
    return area
  }

  /** KVM_SET_XSAVE. */
  setXsave(area: Uint8Array): void {
    this.native.setXsave(area)
  }

  /** KVM_GET_XCRS. */
  getXcrs(): XcrEntry[] {
    this.native.getXcrs(xcrs.bytes)
    return decodeXcrs(xcrs.view)
  }

  /** KVM_SET_XCRS. */
  setXcrs(entries: readonly XcrEntry[]): void {
    encodeXcrs(xcrs.clear().view, entries)
    this.native.setXcrs(xcrs.bytes)
  }

  /** KVM_GET_MSRS. Ends at the first index that KVM does not have: compare the lengths. */
  getMsrs(indices: readonly number[]): MsrEntry[] {
    const bytes = encodeMsrs(indices.map((index) => ({ index, value: 0n })))
    return decodeMsrs(bytes, this.native.getMsrs(bytes))
  }

  /** KVM_SET_MSRS. @returns how many were set: KVM stops at the first that it refuses */
  setMsrs(entries: readonly MsrEntry[]): number {
    return this.native.setMsrs(encodeMsrs(entries))
  }

  /** KVM_GET_CPUID2. */
  getCpuid(): CpuidEntry[] {
    return decodeCpuid(this.native.getCpuid2())
  }

  /** KVM_SET_CPUID2. */
  setCpuid(entries: readonly CpuidEntry[]): void {
    this.native.setCpuid2(encodeCpuid(entries))
  }

  /** KVM_GET_MP_STATE. */
  getMpState(): MpState {
    const number = this.native.getMpState()
    return (Object.keys(MP_STATES) as MpState[]).find((name) => MP_STATES[name] === number) ?? 'runnable'
  }

  /** KVM_SET_MP_STATE. */
  setMpState(state: MpState): void {
    this.native.setMpState(MP_STATES[state])
  }

  /** KVM_GET_VCPU_EVENTS. */
  getVcpuEvents(): VcpuEvents {
    this.native.getVcpuEvents(events.bytes)
    return decodeVcpuEvents(events.view)
  }

  /** KVM_SET_VCPU_EVENTS. */
  setVcpuEvents(state: VcpuEvents): void {
    encodeVcpuEvents(events.clear().view, state)
    this.native.setVcpuEvents(events.bytes)
  }

  /** KVM_GET_DEBUGREGS. */
  getDebugRegs(): DebugRegisters {
    this.native.getDebugRegs(debugregs.bytes)
    return decodeDebugRegisters(debugregs.view)
  }

  /** KVM_SET_DEBUGREGS. */
  setDebugRegs(registers: DebugRegisters): void {
    encodeDebugRegisters(debugregs.clear().view, registers)
    this.native.setDebugRegs(debugregs.bytes)
  }

  /** KVM_SET_GUEST_DEBUG: single-step, breakpoints. */
  setGuestDebug(debug: GuestDebug): void {
    encodeGuestDebug(guestDebug.clear().view, debug)
    this.native.setGuestDebug(guestDebug.bytes)
  }

  /** KVM_GET_LAPIC: the 1024 bytes of the local APIC's register page. */
  getLapic(): Uint8Array {
    const registers = new Uint8Array(LAPIC_SIZE)
    this.native.getLapic(registers)
    return registers
  }

  /** KVM_SET_LAPIC. */
  setLapic(registers: Uint8Array): void {
    this.native.setLapic(registers)
  }

  /** KVM_INTERRUPT: queues an external interrupt. Only without an in-kernel irqchip. */
  interrupt(vector: number): void {
    this.native.interrupt(vector)
  }

  /** KVM_NMI. */
  nmi(): void {
    this.native.nmi()
  }

  /** KVM_TRANSLATE: walks the guest's page tables. */
  translate(linearAddress: bigint): Translation {
    const { view, bytes } = translation.clear()
    view.setBigUint64(0, linearAddress, true)
    this.native.translate(bytes)
    return {
      physicalAddress: view.getBigUint64(8, true),
      valid: view.getUint8(16) !== 0,
      writeable: view.getUint8(17) !== 0,
      usermode: view.getUint8(18) !== 0,
    }
  }

  /** KVM_GET_TSC_KHZ. */
  getTscKhz(): number {
    return this.native.getTscKhz()
  }

  /** KVM_SET_TSC_KHZ. */
  setTscKhz(khz: number): void {
    this.native.setTscKhz(khz)
  }

  /** KVM_KVMCLOCK_CTRL: tells the guest that it was paused. */
  kvmclockCtrl(): void {
    this.native.kvmclockCtrl()
  }

  /** Gives the vCPU back to the host. Its VM lives on until it and its other vCPUs are closed. */
  close(): void {
    this.native.close()
  }
}
