import { CASCADE_IRQ, ISA_IRQS, ioApicPin, SCI_IRQ } from '../wiring.js'

/** Pins that belong to the machine: timer, keyboard, serial port, RTC and SCI. */
export const RESERVED_PINS: readonly number[] = [0, 1, 2, 4, 8, SCI_IRQ]

// MPS INTI flags, the same in ACPI 6.5, 5.2.12.5 and in MP 1.4, 4.3.4
/** As the bus has it; on ISA edge-triggered and active-high. */
const CONFORMS = 0
const ACTIVE_HIGH = 0b01
const LEVEL_TRIGGERED = 0b11 << 2

/** A virtio-mmio device, as a guest has to be told of it. */
export interface VirtioMmioDevice {
  /** Guest-physical address of its registers, below 4 GiB. */
  readonly address: number
  /** Bytes of its registers. */
  readonly size: number
  /** Its global system interrupt: a pin of the I/O APIC. Active-high. */
  readonly gsi: number
  /** `edge` unless given. */
  readonly trigger?: 'edge' | 'level'
}

/** An interrupt on its way to the I/O APIC. */
export interface InterruptRoute {
  /** Number on the ISA bus; also above 15, for what is wired to the I/O APIC only. */
  readonly irq: number
  readonly pin: number
  /** MPS INTI flags. */
  readonly flags: number
}

/** All interrupts that are wired: the ISA bus's, and what virtio devices have besides; in ascending order. */
export function interruptRoutes(virtio: readonly VirtioMmioDevice[]): InterruptRoute[] {
  const flags = new Map<number, number>()
  for (let irq = 0; irq < ISA_IRQS; irq++) flags.set(irq, CONFORMS)
  flags.delete(CASCADE_IRQ)
  flags.set(SCI_IRQ, ACTIVE_HIGH | LEVEL_TRIGGERED)
  for (const { gsi, trigger } of virtio) {
    flags.set(gsi, trigger === 'level' ? ACTIVE_HIGH | LEVEL_TRIGGERED : CONFORMS)
  }
  return [...flags].map(([irq, flags]) => ({ irq, pin: ioApicPin(irq), flags })).sort((a, b) => a.irq - b.irq)
}

/** Whether an ISA interrupt is what an OS assumes: on the pin of its number, and as its bus has it. */
export function isIdentity({ irq, pin, flags }: InterruptRoute): boolean {
  return irq === pin && flags === CONFORMS
}

/** Whether the interrupt is one of the ISA bus's 16. */
export function isIsa({ irq }: InterruptRoute): boolean {
  return irq < ISA_IRQS
}
