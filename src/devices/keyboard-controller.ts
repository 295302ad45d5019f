import type { AccessSize, Device, DeviceHost, DeviceState, PortRange } from '../bus/device.js'
import { type InterruptLine, unconnectedLine } from '../interrupts/interrupt-line.js'
import { StateReader } from './state.js'

// IBM PC AT Technical Reference, March 1984, "Keyboard Controller" (8042), and for the bits that PS/2 changed
// IBM PS/2 Hardware Interface Technical Reference, "Keyboard and Auxiliary Device Controller"

/** Output buffer (read), input buffer (write). */
export const KEYBOARD_DATA_PORT = 0x60
/** Status register (read), command (write). */
export const KEYBOARD_COMMAND_PORT = 0x64

/** The region of {@link KEYBOARD_DATA_PORT}. */
const DATA_REGION = 0

const STATUS_OUTPUT_BUFFER_FULL = 0x01
/** The self test has passed. */
const STATUS_SYSTEM_FLAG = 0x04
/** The last write was a command, not data. */
const STATUS_COMMAND = 0x08
/** The keyboard's lock is open. */
const STATUS_NOT_INHIBITED = 0x10
/** The keyboard did not answer. */
const STATUS_TIMEOUT = 0x40

const COMMAND_READ_COMMAND_BYTE = 0x20
const COMMAND_WRITE_COMMAND_BYTE = 0x60
const COMMAND_DISABLE_AUX = 0xa7
const COMMAND_ENABLE_AUX = 0xa8
const COMMAND_SELF_TEST = 0xaa
const COMMAND_INTERFACE_TEST = 0xab
const COMMAND_DISABLE_KEYBOARD = 0xad
const COMMAND_ENABLE_KEYBOARD = 0xae
const COMMAND_READ_OUTPUT_PORT = 0xd0
const COMMAND_WRITE_OUTPUT_PORT = 0xd1
/** 0xf0 to 0xff pull those of the four lowest output lines low whose bit is 0; 0xfe resets the machine. */
const COMMAND_PULSE_OUTPUT_PORT = 0xf0

const COMMAND_BYTE_INTERRUPT = 0x01
const COMMAND_BYTE_SYSTEM_FLAG = 0x04
const COMMAND_BYTE_KEYBOARD_DISABLED = 0x10
const COMMAND_BYTE_AUX_DISABLED = 0x20
const COMMAND_BYTE_TRANSLATE = 0x40

/** Low resets the machine. */
const OUTPUT_PORT_NOT_RESET = 0x01
const OUTPUT_PORT_A20 = 0x02
/** Both clock and data lines high, no reset, A20 open. */
const OUTPUT_PORT_RESET_VALUE = 0xcf

const SELF_TEST_PASSED = 0x55
const INTERFACE_TEST_PASSED = 0x00
/** What the controller gives in place of an answer that does not come. */
const RESEND = 0xfe

/** How to make a {@link KeyboardController}. */
export interface KeyboardControllerOptions {
  /** The guest resets the machine: command 0xfe, or bit 0 of the output port. */
  onReset(): void
}

/**
 * The keyboard controller of a PC, an i8042, with no keyboard and no mouse attached: a byte for the keyboard
 * times out. Commands it does not know are ignored.
 *
 * A20 is a bit of the output port and nothing more; address line 20 is always open, as KVM cannot mask it.
 */
export class KeyboardController implements Device {
  readonly name = 'keyboard-controller'
  readonly irq = 1
  readonly ports: readonly PortRange[] = [
    { base: KEYBOARD_DATA_PORT, length: 1 },
    { base: KEYBOARD_COMMAND_PORT, length: 1 },
  ]
  readonly maxAccessSize = 1

  readonly #onReset: () => void
  #interrupt: InterruptLine = unconnectedLine
  #status = STATUS_SYSTEM_FLAG | STATUS_NOT_INHIBITED
  #output = 0
  #commandByte = COMMAND_BYTE_TRANSLATE | COMMAND_BYTE_SYSTEM_FLAG
  #outputPort = OUTPUT_PORT_RESET_VALUE
  /** The command that the next byte of data belongs to; 0 for none. */
  #pending = 0

  constructor({ onReset }: KeyboardControllerOptions) {
    this.#onReset = onReset
  }

  /** Whether the guest has switched address line 20 on; shown only. */
  get a20(): boolean {
    return (this.#outputPort & OUTPUT_PORT_A20) !== 0
  }

  attach(host: DeviceHost): void {
    this.#interrupt = host.interrupt
  }

  read(_offset: number, _size: AccessSize, region: number): number {
    if (region !== DATA_REGION) return this.#status
    this.#status &= ~(STATUS_OUTPUT_BUFFER_FULL | STATUS_TIMEOUT)
    return this.#output
  }

  write(_offset: number, value: number, _size: AccessSize, region: number): void {
    if (region === DATA_REGION) {
      this.#status &= ~STATUS_COMMAND
      this.#data(value)
    } else {
      this.#status |= STATUS_COMMAND
      this.#command(value)
    }
  }

  saveState(): DeviceState {
    return {
      status: this.#status,
      output: this.#output,
      commandByte: this.#commandByte,
      outputPort: this.#outputPort,
      pending: this.#pending,
    }
  }

  restoreState(state: DeviceState): void {
    const saved = new StateReader(this.name, state)
    const [status, output, commandByte, outputPort, pending] = (
      ['status', 'output', 'commandByte', 'outputPort', 'pending'] as const
    ).map((key) => saved.byte(key)) as [number, number, number, number, number]
    this.#status = status
    this.#output = output
    this.#commandByte = commandByte
    this.#outputPort = outputPort
    this.#pending = pending
  }

  #command(command: number): void {
    this.#pending = 0
    switch (command) {
      case COMMAND_READ_COMMAND_BYTE:
        this.#reply(this.#commandByte)
        break
      case COMMAND_WRITE_COMMAND_BYTE:
      case COMMAND_WRITE_OUTPUT_PORT:
        this.#pending = command
        break
      case COMMAND_DISABLE_AUX:
        this.#commandByte |= COMMAND_BYTE_AUX_DISABLED
        break
      case COMMAND_ENABLE_AUX:
        this.#commandByte &= ~COMMAND_BYTE_AUX_DISABLED
        break
      case COMMAND_SELF_TEST:
        this.#status |= STATUS_SYSTEM_FLAG
        this.#reply(SELF_TEST_PASSED)
        break
      case COMMAND_INTERFACE_TEST:
        this.#reply(INTERFACE_TEST_PASSED)
        break
      case COMMAND_DISABLE_KEYBOARD:
        this.#commandByte |= COMMAND_BYTE_KEYBOARD_DISABLED
        break
      case COMMAND_ENABLE_KEYBOARD:
        this.#commandByte &= ~COMMAND_BYTE_KEYBOARD_DISABLED
        break
      case COMMAND_READ_OUTPUT_PORT:
        this.#reply(this.#outputPort)
        break
      default:
        if (command >= COMMAND_PULSE_OUTPUT_PORT && (command & OUTPUT_PORT_NOT_RESET) === 0) this.#onReset()
    }
  }

  #data(value: number): void {
    const command = this.#pending
    this.#pending = 0
    if (command === COMMAND_WRITE_COMMAND_BYTE) {
      this.#commandByte = value
      this.#status = (this.#status & ~STATUS_SYSTEM_FLAG) | (value & COMMAND_BYTE_SYSTEM_FLAG)
    } else if (command === COMMAND_WRITE_OUTPUT_PORT) {
      this.#outputPort = value
      if ((value & OUTPUT_PORT_NOT_RESET) === 0) this.#onReset()
    } else {
      // A byte for the keyboard also switches its interface on again.
      this.#commandByte &= ~COMMAND_BYTE_KEYBOARD_DISABLED
      this.#reply(RESEND, STATUS_TIMEOUT)
    }
  }

  #reply(byte: number, status = 0): void {
    this.#output = byte
    this.#status = (this.#status & ~STATUS_TIMEOUT) | STATUS_OUTPUT_BUFFER_FULL | status
    if ((this.#commandByte & COMMAND_BYTE_INTERRUPT) !== 0) this.#interrupt.trigger()
  }
}
