import type { SerialBackend } from '../devices/serial.js'
import { GuestPort } from './guest-port.js'

/**
 * A machine's serial port, as a stream: see {@link GuestPort}. To be held back, a guest has to look at the
 * UART's THRE bit before it sends, as drivers do.
 */
export class SerialPort extends GuestPort implements SerialBackend {
  constructor() {
    super('the serial port')
  }

  /** A byte from the guest. @internal */
  transmit(byte: number): void {
    this.log.append(byte)
  }
}
