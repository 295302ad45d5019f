/** How a PC's interrupt lines are wired to its controllers. */

/** Inputs of the I/O APIC; its global system interrupts begin at 0 (Intel 82093AA datasheet, 3.2.2). */
export const IO_APIC_PINS = 24
/** Lines that the two PICs take, too. */
export const ISA_IRQS = 16
/** The timer's line; the I/O APIC has it on {@link ioApicPin another input}, as everywhere since MP 1.4. */
export const TIMER_IRQ = 0
const TIMER_PIN = 2
/** The input of the master PIC that the slave PIC takes: no device can have it. */
export const CASCADE_IRQ = 2
/** ACPI's System Control Interrupt: where PIIX4 and QEMU have it. */
export const SCI_IRQ = 9
/** ACPI's general-purpose event of a new VM generation ID. */
export const GENERATION_GPE = 0

/** Lines that no device of a PC has, in the order in which others get them: first those that a PIC takes, too. */
export const FREE_IRQS: readonly number[] = [5, 10, 11, 16, 17, 18, 19, 20, 21, 22, 23]

/** The input of the I/O APIC that a line leads to. */
export function ioApicPin(irq: number): number {
  return irq === TIMER_IRQ ? TIMER_PIN : irq
}
