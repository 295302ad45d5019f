import type { InterruptLine } from '../interrupts/interrupt-line.js'
import type { Clock } from '../interrupts/timer.js'
import type { GuestMemory } from '../memory/guest-memory.js'

/** Bytes in one access to a device. */
export type AccessSize = 1 | 2 | 4

/** Where something is mapped: `length` ports or bytes, from `base` on. */
export interface Range {
  readonly base: number
  readonly length: number
}

/** Ports that a device claims. */
export interface PortRange extends Range {
  /**
   * Writes to these ports may reach the device late (milliseconds) but in order: KVM then collects them
   * without leaving the guest (coalesced PIO). For chatty, write-only registers.
   */
  readonly posted?: boolean
}

/** Guest-physical addresses that a device claims; RAM there is hidden only if it was never mapped. */
export interface MmioRange extends Range {
  /** As {@link PortRange.posted}, through coalesced MMIO. */
  readonly posted?: boolean
}

/** A device's state as plain data: what `structuredClone` and JSON can carry. */
export type DeviceState =
  | null
  | boolean
  | number
  | string
  | Uint8Array
  | readonly DeviceState[]
  | { readonly [key: string]: DeviceState }

/** A register that is written to say that there is work. */
export interface Doorbell {
  /** The claimed range that it is in, by index. */
  readonly region: number
  /** Bytes from the start of the range. */
  readonly offset: number
  readonly size: AccessSize
  /** The value that is written. */
  readonly value: number
}

/** What a machine gives to a device that asks for it. */
export interface DeviceHost {
  /** Guest memory, bounds-checked. */
  readonly memory: GuestMemory
  /** The line on which the device interrupts the guest: that of {@link Device.irq}, else one that leads nowhere. */
  readonly interrupt: InterruptLine
  /** Timers that call back while the machine runs. */
  readonly clock: Clock
  /**
   * Lets the machine take writes to a doorbell without stopping the vCPU that writes. They then come as calls of `ring`,
   * soon after, one for several of them perhaps; where the machine has no way to do so they still come as writes.
   *
   * @returns ends that
   */
  doorbell(doorbell: Doorbell, ring: () => void): () => void
  /**
   * Lets the event loop turn soon, because what the device has begun (a promise, a file's read) may be done by then. A
   * guest that runs on the JavaScript thread would go on for some milliseconds before.
   */
  yield(): void
  /** Ends the run with reason `stopped`, once the current access is done. */
  stop(): void
  /** Ends the run with reason `failed`: for what goes wrong outside of an access, where nobody is to throw to. */
  fail(error: unknown): void
}

/**
 * A device on the port or memory bus. Any object of this shape will do.
 *
 * A device sees offsets, never where it is mapped. Handlers are synchronous; an exception in one stops the
 * machine with `ERR_DEVICE_FAILED`, and no other machine.
 *
 * Accesses wider than {@link Device.maxAccessSize}, and 8-byte MMIO accesses, arrive in pieces, lowest address
 * first. So do accesses that begin in one device and end in another.
 */
export interface Device {
  /** Shown in errors and statistics. */
  readonly name: string
  /** Ports claimed, in the order that `region` counts them. */
  readonly ports?: PortRange | readonly PortRange[]
  /** Addresses claimed; `region` goes on counting after the ports. */
  readonly mmio?: MmioRange | readonly MmioRange[]
  /**
   * The interrupt line, by global system interrupt: 0 to 15 are the IRQs of a PC, 16 to 23 lead to the I/O APIC alone.
   * 5, 10 and 11, and 16 to 23, are free; virtio devices get what is left of them.
   */
  readonly irq?: number
  /** The widest access the device takes, in bytes; 4 unless given. */
  readonly maxAccessSize?: AccessSize
  /**
   * The guest reads. Without this method it reads all ones.
   *
   * @param offset - bytes from the start of the claimed range
   * @param region - index of the claimed range, 0 for the first
   * @returns the value; bits beyond `size` bytes are ignored
   */
  read?(offset: number, size: AccessSize, region: number): number
  /**
   * The guest writes. Without this method writes are ignored.
   *
   * @param value - unsigned, below 2^(8·size)
   */
  write?(offset: number, value: number, size: AccessSize, region: number): void
  /** Called once, before the guest's first instruction. */
  attach?(host: DeviceHost): void
  /** The whole state, to make the same device from it again. Snapshots need it. */
  saveState?(): DeviceState
  /** Takes a state that `saveState` of an equal device gave. */
  restoreState?(state: DeviceState): void
}
