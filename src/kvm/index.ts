/**
 * The metal: KVM's ioctls as typed methods, for people who want no machine around them.
 *
 * @module
 */
export { ERROR_CODES, type ErrorCode, NodevisorError } from '../errors.js'
export { EventFd } from '../interrupts/event-fd.js'
export { GuestRam, type GuestRamOptions, type PageRuns } from '../memory/guest-ram.js'
export { CAPABILITIES, type CapabilityName } from './capabilities.js'
export type { CpuidEntry } from './cpuid.js'
export {
  type DebugExit,
  describeExit,
  type FailEntryExit,
  type InternalErrorExit,
  type IoapicEoiExit,
  type IoExit,
  type MmioExit,
  type MsrExit,
  type PlainExit,
  type SystemEventExit,
  type VcpuExit,
} from './exits.js'
export { type HostInfo, type HostKind, inspectHost } from './host.js'
export { Kvm } from './kvm.js'
export type { MsrEntry } from './msrs.js'
export type { DescriptorTable, Registers, Segment, SpecialRegisters } from './registers.js'
export type { GuestAddress, Port } from './types.js'
export { Vcpu } from './vcpu.js'
export {
  type DebugRegisters,
  type FpuState,
  GUEST_DEBUG,
  type GuestDebug,
  MP_STATES,
  type MpState,
  type Translation,
  type VcpuEvents,
  type XcrEntry,
} from './vcpu-state.js'
export {
  type CoalescedZone,
  type GsiRoute,
  type IoeventfdOptions,
  type IrqfdOptions,
  MEMORY_FLAGS,
  type MemoryRegion,
  Vm,
} from './vm.js'
