import type { Device, DeviceState, PortRange } from '../bus/device.js'
import { StateReader } from './state.js'

// IBM PS/2 Hardware Interface Technical Reference, 1988, "System Control Port A"; 82371AB (PIIX4), Intel, April 1997,
// 4.2.6.2 "PORT92".

/** System control port A. */
export const SYSTEM_CONTROL_PORT = 0x92

/** Going from 0 to 1 resets the processor. */
const FAST_INIT = 0x01
const FAST_A20 = 0x02

/** How to make a {@link SystemControl}. */
export interface SystemControlOptions {
  /** The guest resets the machine. */
  onReset(): void
}

/** Port 0x92: fast reset, and a bit for address line 20, which is always open, as KVM cannot mask it. */
export class SystemControl implements Device {
  readonly name = 'system-control'
  readonly ports: PortRange = { base: SYSTEM_CONTROL_PORT, length: 1 }
  readonly maxAccessSize = 1
  readonly #onReset: () => void
  #register = FAST_A20

  constructor({ onReset }: SystemControlOptions) {
    this.#onReset = onReset
  }

  read(): number {
    return this.#register
  }

  write(_offset: number, value: number): void {
    // FAST_INIT is not kept: the reset it causes clears it.
    this.#register = value & FAST_A20
    if ((value & FAST_INIT) !== 0) this.#onReset()
  }

  saveState(): DeviceState {
    return { register: this.#register }
  }

  restoreState(state: DeviceState): void {
    this.#register = new StateReader(this.name, state).byte('register') & FAST_A20
  }
}
