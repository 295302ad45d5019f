import type { AccessSize, DeviceState } from '../bus/device.js'
import type { Clock } from '../interrupts/timer.js'
import type { DescriptorChain } from './descriptor-chain.js'
import type { Virtqueue } from './virtqueue.js'

/** A queue that a device has. */
export interface VirtioQueueOptions {
  /** The most descriptors it can have: a power of two, up to 32768. 256 unless given. */
  readonly maxSize?: number
  /**
   * Serves one request of the driver's, in the order in which they were made available. Other requests are served
   * while a promise is pending, and may be done before.
   *
   * @returns how many bytes it wrote into the chain, from the start of its writable part on
   */
  handle?(chain: DescriptorChain): number | Promise<number>
  /**
   * In place of {@link handle}, for a device that takes buffers when it has a use for them: the driver has made some
   * available, and {@link Virtqueue.pop} gives them.
   */
  available?(queue: Virtqueue): void
}

/** What a virtio device gets when its driver is ready. */
export interface VirtioDriver {
  /** The features that were negotiated. */
  readonly features: bigint
  /** By index; undefined where the driver has not set the queue up. */
  readonly queues: readonly (Virtqueue | undefined)[]
  /** Timers that call back while the machine runs. */
  readonly clock: Clock
  /**
   * Lets the event loop turn soon, for what the device has begun: a guest that runs on the JavaScript thread would go on
   * for some milliseconds before. Promises that `handle` gives do so by themselves.
   */
  yield(): void
  /** Tells the driver that {@link VirtioDevice.config} has changed. */
  configChanged(): void
  /** Gives the driver up, because it broke a rule: it has to reset the device. @param why - a clause */
  needsReset(why: string): void
}

/**
 * A virtio device, whatever transport it is reached through (VIRTIO 1.2). Any object of this shape will do: status,
 * features, queues and interrupts are the transport's business.
 *
 * An exception in one of its methods, or a promise that rejects, stops the machine with `ERR_DEVICE_FAILED`.
 */
export interface VirtioDevice {
  /** Shown in errors and statistics. */
  readonly name: string
  /** Its device type (VIRTIO 1.2, 5). */
  readonly deviceType: number
  /** Feature bits of its own type (0 to 23 and 50 to 127); those of queues and transport are added. None unless given. */
  readonly features?: bigint
  /** At least one. */
  readonly queues: readonly VirtioQueueOptions[]
  /** Its configuration space, little-endian as the driver reads it. */
  readonly config?: Uint8Array
  /** The driver writes into the configuration space. Without this method that is ignored. */
  writeConfig?(offset: number, value: number, size: AccessSize): void
  /** The driver is ready (DRIVER_OK), and the queues can be used until {@link reset}. */
  start?(driver: VirtioDriver): void
  /** The driver has gone. Requests under way need no answer. */
  reset?(): void
  /** The device's own state; that of transport and queues is theirs. Snapshots need it. */
  saveState?(): DeviceState
  /** Takes a state that `saveState` of an equal device gave. */
  restoreState?(state: DeviceState): void
}
