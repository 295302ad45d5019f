import type { AccessSize, Device, DeviceState, PortRange } from '../bus/device.js'
import { StateReader } from './state.js'

// ACPI 6.5, 4.8.3.2.1 "PM1 Control Registers"

/** Where QEMU has PM1a_CNT: what small kernels write 0x2000 to, to power off. */
export const POWER_CONTROL_PORT = 0x604

/** "Setting this bit causes the system to sequence into the sleeping state"; write-only, reads as 0. */
const SLP_EN = 1 << 13

/** How to make a {@link PowerControl}. */
export interface PowerControlOptions {
  /** The guest powers the machine off. */
  onPowerOff(): void
  /** First of the two ports; 0x604 unless given. */
  readonly port?: number
}

/** The PM1a control register of ACPI. Soft-off is the only sleeping state: SLP_TYP does not matter. */
export class PowerControl implements Device {
  readonly name = 'power-control'
  readonly ports: PortRange
  readonly maxAccessSize = 2
  readonly #onPowerOff: () => void
  #register = 0

  constructor({ onPowerOff, port = POWER_CONTROL_PORT }: PowerControlOptions) {
    this.ports = { base: port, length: 2 }
    this.#onPowerOff = onPowerOff
  }

  read(offset: number): number {
    return this.#register >> (8 * offset)
  }

  write(offset: number, value: number, size: AccessSize): void {
    const shift = 8 * offset
    const mask = (size === 1 ? 0xff : 0xffff) << shift
    const written = (value << shift) & mask
    this.#register = ((this.#register & ~mask) | written) & ~SLP_EN
    if ((written & SLP_EN) !== 0) this.#onPowerOff()
  }

  saveState(): DeviceState {
    return { register: this.#register }
  }

  restoreState(state: DeviceState): void {
    this.#register = new StateReader(this.name, state).uint('register', 0xffff) & ~SLP_EN
  }
}
