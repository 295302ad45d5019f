/** Feature bits that belong to queues and transport, not to a type of device (VIRTIO 1.2, 6). */

/** Descriptors may refer to a table of descriptors. */
export const VIRTIO_F_INDIRECT_DESC = 1n << 28n
/** Driver and device say at which index they want to be notified next. */
export const VIRTIO_F_EVENT_IDX = 1n << 29n
/** The device follows the specification from 1.0 on. Nothing here speaks to older drivers. */
export const VIRTIO_F_VERSION_1 = 1n << 32n

/** What every device here offers. */
export const COMMON_FEATURES = VIRTIO_F_INDIRECT_DESC | VIRTIO_F_EVENT_IDX | VIRTIO_F_VERSION_1

/** Bits that a type of device may use for itself (VIRTIO 1.2, 2.2). */
export function isDeviceFeature(bit: number): boolean {
  return (bit >= 0 && bit <= 23) || (bit >= 50 && bit <= 127)
}
