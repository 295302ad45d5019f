import type { AccessSize, Device, DeviceState, PortRange } from '../bus/device.js'
import { StateReader } from './state.js'

// Intel 82371FB/82371SB (PIIX/PIIX3) datasheet, April 1997, "RC: Reset Control Register", I/O address 0CF9h

/** The reset control register. It lies in the middle of the PCI configuration address register. */
export const RESET_CONTROL_PORT = 0xcf9
/** First port of CONFIG_ADDRESS (PCI Local Bus Specification 3.0, 3.2.2.3.2); four bytes. */
const CONFIG_ADDRESS_PORT = 0xcf8
const RESET_CONTROL_OFFSET = RESET_CONTROL_PORT - CONFIG_ADDRESS_PORT

/** System reset: 1 for a hard reset, 0 for a soft one. */
const SYS_RST = 0x02
/** Going from 0 to 1 resets the processor. */
const RST_CPU = 0x04

/** How to make a {@link ResetControl}. */
export interface ResetControlOptions {
  /** The guest resets the machine. */
  onReset(): void
}

/**
 * The reset control register at 0xcf9, and nothing where a PCI host bridge would be.
 *
 * It claims all of CONFIG_ADDRESS, because only an access of one byte to 0xcf9 is meant for it: a wider one is
 * a probe for PCI, must not reset the machine, and reads as all ones, which tells the guest that there is none.
 */
export class ResetControl implements Device {
  readonly name = 'reset-control'
  readonly ports: PortRange = { base: CONFIG_ADDRESS_PORT, length: 4 }
  readonly #onReset: () => void
  #register = 0

  constructor({ onReset }: ResetControlOptions) {
    this.#onReset = onReset
  }

  read(offset: number, size: AccessSize): number {
    return offset === RESET_CONTROL_OFFSET && size === 1 ? this.#register : 0xffff_ffff
  }

  write(offset: number, value: number, size: AccessSize): void {
    if (offset !== RESET_CONTROL_OFFSET || size !== 1) return
    // RST_CPU is not kept: the reset it causes clears it.
    this.#register = value & SYS_RST
    if ((value & RST_CPU) !== 0) this.#onReset()
  }

  saveState(): DeviceState {
    return { register: this.#register }
  }

  restoreState(state: DeviceState): void {
    this.#register = new StateReader(this.name, state).byte('register') & SYS_RST
  }
}
