import type { NativeVm } from '../binding.js'
import { invalidArgument } from '../errors.js'
import type { EventFd } from '../interrupts/event-fd.js'
import { GuestRam } from '../memory/guest-ram.js'
import { CAPABILITIES, type CapabilityName } from './capabilities.js'
import { Struct } from './structs.js'
import { Vcpu } from './vcpu.js'

/** KVM_MEM_*: flags of a memory slot. */
export const MEMORY_FLAGS = { LOG_DIRTY_PAGES: 1, READONLY: 2 } as const

/** A memory slot: `size` bytes of guest-physical memory that are `ram` from `offset` on. */
export interface MemoryRegion {
  readonly slot: number
  readonly guestAddress: number
  /** Bytes, a multiple of the page size; 0 removes the slot. */
  readonly size: number
  readonly ram?: GuestRam
  /** Bytes into `ram`; 0 unless given. */
  readonly offset?: number
  /** {@link MEMORY_FLAGS}; 0 unless given. */
  readonly flags?: number
}

/** An interrupt that the kernel raises when an eventfd is signalled. */
export interface IrqfdOptions {
  readonly eventFd: EventFd
  readonly gsi: number
  /** Signalled when the guest acknowledges a level interrupt. */
  readonly resample?: EventFd
  /** Takes the connection back. */
  readonly deassign?: boolean
}

/** A doorbell: the guest's write signals an eventfd and does not leave the kernel. */
export interface IoeventfdOptions {
  readonly eventFd: EventFd
  /** A port or a guest-physical address. */
  readonly address: number
  /** Bytes of the write: 0 (any), 1, 2, 4 or 8. */
  readonly length: number
  readonly pio?: boolean
  /** Only writes of this value. */
  readonly datamatch?: bigint
  /** Takes the doorbell back. */
  readonly deassign?: boolean
}

/** Where an interrupt line (a GSI) leads: to a message to the local APICs, or to an input of KVM's irqchip. */
export type GsiRoute =
  /** `address` is 0xfeexxxxx, see the Intel SDM vol. 3A, "Message Signalled Interrupts". */
  | { readonly gsi: number; readonly address: number; readonly data: number }
  /** `irqchip` is 0 for the master PIC, 1 for the slave, 2 for the IOAPIC. */
  | { readonly gsi: number; readonly irqchip: number; readonly pin: number }

/** Ports or addresses whose writes KVM collects in a ring, without an exit each. */
export interface CoalescedZone {
  readonly address: number
  readonly size: number
  readonly pio: boolean
}

const KVM_IRQFD_FLAG_DEASSIGN = 1
const KVM_IRQFD_FLAG_RESAMPLE = 2
const KVM_IOEVENTFD_FLAG_DATAMATCH = 1
const KVM_IOEVENTFD_FLAG_PIO = 2
const KVM_IOEVENTFD_FLAG_DEASSIGN = 4
/** Bytes of `struct kvm_irqchip`, `struct kvm_pit_state2` and `struct kvm_clock_data`. */
export const IRQCHIP_SIZE = 520
export const PIT_STATE2_SIZE = 112
export const CLOCK_DATA_SIZE = 48
const MSI_SIZE = 32
const ROUTING_ENTRY_SIZE = 48
const KVM_IRQ_ROUTING_IRQCHIP = 1
const KVM_IRQ_ROUTING_MSI = 2
const ENABLE_CAP_SIZE = 104

const msi = new Struct(MSI_SIZE)

/**
 * One virtual machine: the ioctls of a VM file descriptor, one method each.
 *
 * Made by {@link Kvm.createVm}. Every method throws `ERR_CLOSED` after {@link Vm.close} and `ERR_SYSCALL` where KVM
 * refuses.
 */
export class Vm {
  /** The addon's object. @internal */
  readonly native: NativeVm

  /** @internal */
  constructor(native: NativeVm) {
    this.native = native
  }

  /** KVM_CHECK_EXTENSION. 0 means that there is no such thing. */
  checkExtension(capability: CapabilityName | number): number {
    return this.native.checkExtension(capabilityNumber(capability))
  }

  /** KVM_ENABLE_CAP. */
  enableCap(capability: CapabilityName | number, args: readonly bigint[] = [], flags = 0): void {
    const { bytes, view } = new Struct(ENABLE_CAP_SIZE)
    view.setUint32(0, capabilityNumber(capability), true)
    view.setUint32(4, flags, true)
    for (const [i, value] of args.slice(0, 4).entries()) view.setBigUint64(8 + i * 8, value, true)
    this.native.enableCap(bytes)
  }

  /** KVM_SET_USER_MEMORY_REGION. */
  setUserMemoryRegion(region: MemoryRegion): void {
    const { slot, guestAddress, size, ram, offset = 0, flags = 0 } = region
    if (size !== 0 && !(ram instanceof GuestRam)) throw invalidArgument('ram', 'a GuestRam', ram)
    this.native.setUserMemoryRegion(slot, flags, guestAddress, size, ram?.native, offset)
  }

  /**
   * KVM_GET_DIRTY_LOG.
   *
   * @param bitmap - one bit a page of the slot, rounded up to whole 8 bytes, to be filled: 1 for pages written since
   *   the last call
   */
  getDirtyLog(slot: number, bitmap: Uint8Array): void {
    this.native.getDirtyLog(slot, bitmap)
  }

  /** KVM_CLEAR_DIRTY_LOG. */
  clearDirtyLog(slot: number, firstPage: number, pages: number, bitmap: Uint8Array): void {
    this.native.clearDirtyLog(slot, firstPage, pages, bitmap)
  }

  /** KVM_SET_TSS_ADDR: three pages that VT-x needs for real mode, outside the guest's memory. */
  setTssAddr(address: number): void {
    this.native.setTssAddr(address)
  }

  /** KVM_SET_IDENTITY_MAP_ADDR: one page that VT-x needs for real mode. Before the first vCPU. */
  setIdentityMapAddr(address: number): void {
    this.native.setIdentityMapAddr(address)
  }

  /** KVM_SET_BOOT_CPU_ID. Before the first vCPU. */
  setBootCpuId(id: number): void {
    this.native.setBootCpuId(id)
  }

  /** KVM_CREATE_VCPU. */
  createVcpu(id: number): Vcpu {
    return new Vcpu(this.native.createVcpu(id), id)
  }

  /** KVM_CREATE_IRQCHIP: PIC, IOAPIC and a local APIC for every vCPU, in the kernel. Before the first vCPU. */
  createIrqchip(): void {
    this.native.createIrqchip()
  }

  /** KVM_GET_IRQCHIP. @param chip - 0 master PIC, 1 slave PIC, 2 IOAPIC. @returns `struct kvm_irqchip` */
  getIrqchip(chip: number): Uint8Array {
    const { bytes, view } = new Struct(IRQCHIP_SIZE)
    view.setUint32(0, chip, true)
    this.native.getIrqchip(bytes)
    return bytes
  }

  /** KVM_SET_IRQCHIP. */
  setIrqchip(struct: Uint8Array): void {
    this.native.setIrqchip(struct)
  }

  /** KVM_CREATE_PIT2: the timer chip in the kernel. @param flags - 1: port 0x61 is ours, KVM_PIT_SPEAKER_DUMMY */
  createPit2(flags = 0): void {
    this.native.createPit2(flags)
  }

  /** KVM_GET_PIT2. @returns `struct kvm_pit_state2` */
  getPit2(): Uint8Array {
    const { bytes } = new Struct(PIT_STATE2_SIZE)
    this.native.getPit2(bytes)
    return bytes
  }

  /** KVM_SET_PIT2. */
  setPit2(struct: Uint8Array): void {
    this.native.setPit2(struct)
  }

  /** KVM_IRQ_LINE. */
  irqLine(gsi: number, level: boolean): void {
    this.native.irqLine(gsi, level ? 1 : 0)
  }

  /** KVM_SET_GSI_ROUTING: replaces all routes. */
  setGsiRouting(routes: readonly GsiRoute[]): void {
    const { bytes, view } = new Struct(ROUTING_ENTRY_SIZE * routes.length)
    for (const [i, route] of routes.entries()) {
      const at = i * ROUTING_ENTRY_SIZE
      view.setUint32(at, route.gsi, true)
      if ('irqchip' in route) {
        view.setUint32(at + 4, KVM_IRQ_ROUTING_IRQCHIP, true)
        view.setUint32(at + 16, route.irqchip, true)
        view.setUint32(at + 20, route.pin, true)
      } else {
        view.setUint32(at + 4, KVM_IRQ_ROUTING_MSI, true)
        view.setBigUint64(at + 16, BigInt(route.address), true)
        view.setUint32(at + 24, route.data, true)
      }
    }
    this.native.setGsiRouting(bytes)
  }

  /** KVM_SIGNAL_MSI. @returns how many vCPUs it was delivered to; 0 when the guest blocked it, or there is none */
  signalMsi(address: number, data: number): number {
    const { bytes, view } = msi.clear()
    view.setBigUint64(0, BigInt(address), true)
    view.setUint32(8, data, true)
    return this.native.signalMsi(bytes)
  }

  /** KVM_IRQFD. */
  irqfd(options: IrqfdOptions): void {
    const flags =
      (options.deassign ? KVM_IRQFD_FLAG_DEASSIGN : 0) | (options.resample ? KVM_IRQFD_FLAG_RESAMPLE : 0)
    this.native.irqfd(options.eventFd.fd, options.gsi, flags, options.resample?.fd ?? 0)
  }

  /** KVM_IOEVENTFD. */
  ioeventfd(options: IoeventfdOptions): void {
    const flags =
      (options.pio ? KVM_IOEVENTFD_FLAG_PIO : 0) |
      (options.datamatch === undefined ? 0 : KVM_IOEVENTFD_FLAG_DATAMATCH) |
      (options.deassign ? KVM_IOEVENTFD_FLAG_DEASSIGN : 0)
    this.native.ioeventfd(options.eventFd.fd, options.address, options.length, flags, options.datamatch ?? 0n)
  }

  /** KVM_REGISTER_COALESCED_MMIO. */
  registerCoalesced(zone: CoalescedZone): void {
    this.native.coalescedZone(true, zone.address, zone.size, zone.pio)
  }

  /** KVM_UNREGISTER_COALESCED_MMIO. */
  unregisterCoalesced(zone: CoalescedZone): void {
    this.native.coalescedZone(false, zone.address, zone.size, zone.pio)
  }

  /** KVM_GET_CLOCK. @returns `struct kvm_clock_data` */
  getClock(): Uint8Array {
    const { bytes } = new Struct(CLOCK_DATA_SIZE)
    this.native.getClock(bytes)
    return bytes
  }

  /** KVM_SET_CLOCK. */
  setClock(struct: Uint8Array): void {
    this.native.setClock(struct)
  }

  /** Gives the VM back to the host, once its vCPUs are closed too. */
  close(): void {
    this.native.close()
  }
}

/** The number of a capability given by name or number. */
export function capabilityNumber(capability: CapabilityName | number): number {
  const number = typeof capability === 'number' ? capability : CAPABILITIES[capability]
  if (number === undefined)
    throw invalidArgument('capability', 'a number or a name of CAPABILITIES', capability)
  return number
}
