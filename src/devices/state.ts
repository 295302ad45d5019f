import type { DeviceState } from '../bus/device.js'
import { hex, invalidArgument } from '../errors.js'

/**
 * Reads a device's saved state, field by field. It may come from a file that something else wrote, so every
 * field is checked: a device never holds a value that its guest could not have put there.
 *
 * Every method throws `ERR_INVALID_ARGUMENT` for a field that is missing, of another type or out of range.
 */
export class StateReader {
  readonly #device: string
  readonly #fields: { readonly [key: string]: DeviceState }

  /** @param device - the device's name, for errors */
  constructor(device: string, state: DeviceState) {
    if (typeof state !== 'object' || state === null || Array.isArray(state) || state instanceof Uint8Array) {
      throw invalidArgument(`the state of ${device}`, 'an object that its saveState() gave', state)
    }
    this.#device = device
    this.#fields = state as { readonly [key: string]: DeviceState }
  }

  /** An integer from 0 to `max`. */
  uint(key: string, max: number): number {
    return this.integer(key, 0, max)
  }

  /** An integer from `min` to `max`. */
  integer(key: string, min: number, max: number): number {
    const value = this.#fields[key]
    if (typeof value !== 'number' || !Number.isInteger(value) || value < min || value > max) {
      throw this.#error(key, `an integer from ${min} to ${max > 9 ? hex(max) : max}`, value)
    }
    return value
  }

  /** An unsigned byte. */
  byte(key: string): number {
    return this.uint(key, 0xff)
  }

  /** A field of any kind, for a reader of its own. */
  value(key: string): DeviceState {
    const value = this.#fields[key]
    if (value === undefined) throw this.#error(key, 'a value', value)
    return value
  }

  /** An unsigned number of up to `width` bits, saved as hexadecimal text: `0x…`. */
  bits(key: string, width: number): bigint {
    const value = this.#fields[key]
    if (
      typeof value === 'string' &&
      /^0x[0-9a-f]{1,64}$/.test(value) &&
      BigInt(value) < 1n << BigInt(width)
    ) {
      return BigInt(value)
    }
    throw this.#error(key, `hexadecimal text of up to ${width} bits`, value)
  }

  boolean(key: string): boolean {
    const value = this.#fields[key]
    if (typeof value !== 'boolean') throw this.#error(key, 'a boolean', value)
    return value
  }

  /** A copy of the bytes, from `min` to `max` of them. */
  bytes(key: string, min: number, max: number): Uint8Array {
    const value = this.#fields[key]
    if (!(value instanceof Uint8Array) || value.length < min || value.length > max) {
      const count = min === max ? `${min}` : `${min} to ${max}`
      throw this.#error(key, `a Uint8Array of ${count} bytes`, value)
    }
    return value.slice()
  }

  /** A list of `length` unsigned integers up to `max`. */
  uints(key: string, length: number, max: number): number[] {
    const values = this.list(key, length)
    if (
      values.every((value) => Number.isInteger(value) && (value as number) >= 0 && (value as number) <= max)
    ) {
      return values as number[]
    }
    throw this.#error(key, `integers from 0 to ${hex(max)}`, values)
  }

  /** A list of at most `most` unsigned integers up to `max`. */
  uintsUpTo(key: string, most: number, max: number): number[] {
    return this.uints(key, this.#lengthOf(key, most), max)
  }

  /** A list of `length` copies of `size` bytes each. */
  byteLists(key: string, length: number, size: number): Uint8Array[] {
    return this.list(key, length).map((value) => {
      if (value instanceof Uint8Array && value.length === size) return value.slice()
      throw this.#error(key, `a list of Uint8Arrays of ${size} bytes`, value)
    })
  }

  /** A list of at most `most` objects, each with a reader of its own. */
  objects(key: string, most: number): StateReader[] {
    return this.list(key, this.#lengthOf(key, most)).map((value) => new StateReader(this.#device, value))
  }

  /** A list of `length` values of any kind. */
  list(key: string, length: number): readonly DeviceState[] {
    const value = this.#fields[key]
    if (!Array.isArray(value) || value.length !== length) throw this.#error(key, `a list of ${length}`, value)
    return value as readonly DeviceState[]
  }

  #lengthOf(key: string, most: number): number {
    const value = this.#fields[key]
    if (Array.isArray(value) && value.length <= most) return value.length
    throw this.#error(key, `a list of at most ${most}`, value)
  }

  #error(key: string, expected: string, value: unknown) {
    return invalidArgument(`${key} of the state of ${this.#device}`, expected, value)
  }
}
