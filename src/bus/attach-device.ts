import { invalidArgument } from '../errors.js'
import { CASCADE_IRQ, IO_APIC_PINS } from '../wiring.js'
import { type Bus, type BusKind, checkRange } from './bus.js'
import type { Device, MmioRange, PortRange } from './device.js'

const MAX_IRQ = IO_APIC_PINS - 1

/** What a device claims, in the order in which it counts its regions. */
export interface DeviceRanges {
  readonly ports: readonly PortRange[]
  /** Regions go on counting after the ports. */
  readonly mmio: readonly MmioRange[]
}

/**
 * Checks an object that wants to be a device: a user's may come from JavaScript.
 *
 * @throws `ERR_INVALID_ARGUMENT` naming the property that is wrong
 */
export function checkDevice(device: unknown): DeviceRanges {
  if (typeof device !== 'object' || device === null) {
    throw invalidArgument('device', 'an object with a name and ports or mmio', device)
  }
  const { name, maxAccessSize, irq } = device as Partial<Device>
  if (typeof name !== 'string' || name === '') {
    throw invalidArgument('device.name', 'a non-empty string', name)
  }
  if (maxAccessSize !== undefined && maxAccessSize !== 1 && maxAccessSize !== 2 && maxAccessSize !== 4) {
    throw invalidArgument(`maxAccessSize of device ${name}`, '1, 2 or 4', maxAccessSize)
  }
  if (irq !== undefined && !(Number.isInteger(irq) && irq >= 0 && irq <= MAX_IRQ && irq !== CASCADE_IRQ)) {
    throw invalidArgument(
      `irq of device ${name}`,
      `an integer from 0 to ${MAX_IRQ}, but not ${CASCADE_IRQ}`,
      irq,
    )
  }
  for (const method of ['read', 'write', 'attach', 'saveState', 'restoreState'] as const) {
    const value = (device as Partial<Device>)[method]
    if (value !== undefined && typeof value !== 'function') {
      throw invalidArgument(`${method} of device ${name}`, 'a function or undefined', value)
    }
  }
  const ranges = {
    ports: checkRanges('port', (device as Partial<Device>).ports, `ports of device ${name}`),
    mmio: checkRanges('mmio', (device as Partial<Device>).mmio, `mmio of device ${name}`),
  }
  if (ranges.ports.length + ranges.mmio.length === 0) {
    throw invalidArgument(`ports and mmio of device ${name}`, 'at least one range', 'none')
  }
  return ranges
}

/**
 * Checks a device and gives it all the ranges it claims.
 *
 * @returns those ranges
 * @throws `ERR_INVALID_ARGUMENT` as {@link checkDevice} does, before anything is attached
 * @throws `ERR_BUS_OVERLAP`; ranges before the one in question stay attached
 */
export function attachDevice(device: Device, ports: Bus, mmio: Bus): DeviceRanges {
  const ranges = checkDevice(device)
  let region = 0
  for (const range of ranges.ports) ports.attach(device, range, region++)
  for (const range of ranges.mmio) mmio.attach(device, range, region++)
  return ranges
}

function checkRanges(kind: BusKind, ranges: unknown, argument: string): readonly PortRange[] {
  if (ranges === undefined) return []
  if (!Array.isArray(ranges)) {
    checkRange(kind, ranges, argument)
    return [ranges]
  }
  ranges.forEach((range, index) => {
    checkRange(kind, range, `${argument} [${index}]`)
  })
  return ranges
}
