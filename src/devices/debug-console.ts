import type { Device, DeviceState, PortRange } from '../bus/device.js'

// The "port E9 hack" of Bochs: https://bochs.sourceforge.io/doc/docbook/user/bochsrc.html (port_e9_hack)

/** Where Bochs and QEMU (`-debugcon`, `isa-debugcon`) have it. */
export const DEBUG_CONSOLE_PORT = 0xe9

/** The host's end of the debug console. */
export interface DebugConsoleBackend {
  /** Takes a byte from the guest. It must not throw, and bounding what is kept is its business. */
  transmit(byte: number): void
}

/** How to make a {@link DebugConsole}. */
export interface DebugConsoleOptions {
  readonly backend: DebugConsoleBackend
  /** 0xe9 unless given. */
  readonly port?: number
}

/** The debug console: every byte written is output. It reads as 0xe9, which is how a guest detects it. */
export class DebugConsole implements Device {
  readonly name = 'debug-console'
  readonly ports: PortRange
  readonly maxAccessSize = 1
  readonly #backend: DebugConsoleBackend

  constructor({ backend, port = DEBUG_CONSOLE_PORT }: DebugConsoleOptions) {
    this.ports = { base: port, length: 1, posted: true }
    this.#backend = backend
  }

  read(): number {
    return DEBUG_CONSOLE_PORT
  }

  write(_offset: number, value: number): void {
    this.#backend.transmit(value)
  }

  /** It has no state. */
  saveState(): DeviceState {
    return null
  }

  restoreState(): void {}
}
