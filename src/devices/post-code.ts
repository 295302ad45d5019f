import type { Device, DeviceState, PortRange } from '../bus/device.js'
import { StateReader } from './state.js'

/** Where a PC shows how far it got; also the traditional port for a short delay. */
export const POST_CODE_PORT = 0x80

/** How many codes are kept. */
export const POST_CODES_KEPT = 64

/**
 * The port of the power-on self test codes. Keeps the last {@link POST_CODES_KEPT}; reads give the last one,
 * as the unused DMA page register behind this port does (IBM PC AT Technical Reference, 1984, system board).
 */
export class PostCode implements Device {
  readonly name = 'post-code'
  readonly ports: PortRange = { base: POST_CODE_PORT, length: 1, posted: true }
  readonly maxAccessSize = 1
  #codes: number[] = []

  /** The codes that the guest wrote, oldest first. */
  get codes(): readonly number[] {
    return [...this.#codes]
  }

  read(): number {
    return this.#codes.at(-1) ?? 0
  }

  write(_offset: number, value: number): void {
    if (this.#codes.length === POST_CODES_KEPT) this.#codes.shift()
    this.#codes.push(value)
  }

  saveState(): DeviceState {
    return { codes: Uint8Array.from(this.#codes) }
  }

  restoreState(state: DeviceState): void {
    this.#codes = [...new StateReader(this.name, state).bytes('codes', 0, POST_CODES_KEPT)]
  }
}
