/** The guest `interrupts`, the machines it runs in, and devices for it. */

import type { Device, DeviceHost, VirtualMachine, VirtualMachineOptions } from '../../src/index.js'
import { boot, EXECUTIONS } from '../machine/boot.js'
import { imageOf } from './guests.js'

/** Where interrupt controllers can be. */
export const IRQCHIPS = ['split', 'full'] as const

/** Every kind of machine with interrupt controllers: `irqchip`, `execution`. */
export const MACHINES = IRQCHIPS.flatMap((irqchip) =>
  EXECUTIONS.map((execution) => [irqchip, execution] as const),
)

/** The guest's options for one of its tests. */
export function interruptsGuest(cmdline: string): VirtualMachineOptions['kernel'] {
  return { image: imageOf({ image: 'interrupts.elf' }), cmdline }
}

/** A machine with the guest, that is closed when the test is over. */
export function bootInterrupts(
  cmdline: string,
  options: Partial<VirtualMachineOptions>,
): Promise<VirtualMachine> {
  return boot(interruptsGuest(cmdline), options)
}

/** How the guest ends when all went well. */
export const SUCCESS = { reason: 'debug-exit', code: 16 }

/** The device that the guest knows: at port 0x500, on `irq`. */
export function deviceAt500(irq: number, make: (host: DeviceHost) => Pick<Device, 'read' | 'write'>): Device {
  let handlers: Pick<Device, 'read' | 'write'> = {}
  return {
    name: 'tested',
    irq,
    ports: { base: 0x500, length: 1 },
    attach(host) {
      handlers = make(host)
    },
    read: (offset, size, region) => handlers.read?.(offset, size, region) ?? 0,
    write: (offset, value, size, region) => handlers.write?.(offset, value, size, region),
  }
}
