import type { Device } from '../bus/device.js'
import { invalidArgument } from '../errors.js'
import type { VirtioMmioDevice } from '../firmware/index.js'
import { VIRTIO_MMIO_START } from '../memory/layout.js'
import type { VirtioDevice } from '../virtio/virtio-device.js'
import { VIRTIO_MMIO_SIZE, VirtioMmio } from '../virtio/virtio-mmio.js'
import { FREE_IRQS } from '../wiring.js'

/**
 * Gives each virtio device a place and a line of its own: edges on a line that devices share could be lost.
 *
 * @param others - devices that have lines already
 * @throws `ERR_INVALID_ARGUMENT` for more devices than there are lines
 */
export function placeVirtioDevices(
  devices: readonly VirtioDevice[],
  others: readonly Device[],
): VirtioMmio[] {
  const free = FREE_IRQS.filter((irq) => others.every((other) => other.irq !== irq))
  if (devices.length > free.length) {
    const expected = `at most ${free.length} virtio devices (disks, console, rng and your own), one for each free line,`
    throw invalidArgument('disks, console, rng and virtio', expected, devices.length)
  }
  return devices.map(
    (device, index) => new VirtioMmio(device, VIRTIO_MMIO_START + index * VIRTIO_MMIO_SIZE, free[index]!),
  )
}

/** What ACPI says of the devices. */
export function describeForFirmware(devices: readonly VirtioMmio[]): VirtioMmioDevice[] {
  return devices.map(({ mmio, irq }) => ({
    address: mmio.base,
    size: mmio.length,
    gsi: irq,
    trigger: 'edge',
  }))
}

/** What Linux takes on its command line, where it is built to (CONFIG_VIRTIO_MMIO_CMDLINE_DEVICES). */
export function virtioParameters(devices: readonly VirtioMmio[]): string[] {
  return devices.map(
    ({ mmio, irq }) => `virtio_mmio.device=${mmio.length / 1024}K@0x${mmio.base.toString(16)}:${irq}`,
  )
}
