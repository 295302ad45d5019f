import type { Device, DeviceState, PortRange } from '../bus/device.js'

// QEMU, hw/misc/debugexit.c: https://github.com/qemu/qemu/blob/master/hw/misc/debugexit.c

/** Where test kernels put QEMU's isa-debug-exit (`iobase=0xf4,iosize=0x4`). */
export const DEBUG_EXIT_PORT = 0xf4
const DEBUG_EXIT_PORTS = 4

/** How to make a {@link DebugExit}. */
export interface DebugExitOptions {
  /** Ends the run. QEMU would exit with status `(value << 1) | 1`; here the value is given as it is. */
  onExit(value: number): void
  /** First of the four ports; 0xf4 unless given. */
  readonly port?: number
}

/** QEMU's isa-debug-exit: a write of any size to any of its ports ends the run. It reads as 0. */
export class DebugExit implements Device {
  readonly name = 'debug-exit'
  readonly ports: PortRange
  readonly #onExit: (value: number) => void

  constructor({ onExit, port = DEBUG_EXIT_PORT }: DebugExitOptions) {
    this.ports = { base: port, length: DEBUG_EXIT_PORTS }
    this.#onExit = onExit
  }

  read(): number {
    return 0
  }

  write(_offset: number, value: number): void {
    this.#onExit(value)
  }

  /** It has no state. */
  saveState(): DeviceState {
    return null
  }

  restoreState(): void {}
}
