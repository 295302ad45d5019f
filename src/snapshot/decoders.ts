import type { DeviceState } from '../bus/device.js'
import { hex, invalidArgument } from '../errors.js'

/**
 * Makes what the program uses of a value that was read, or throws `ERR_INVALID_ARGUMENT`.
 *
 * @param at - what errors call the value
 */
export type Decoder<T> = (value: DeviceState | undefined, at: string) => T

/** A value that may be missing: then it is undefined. */
export function optional<T>(decode: Decoder<T>): Decoder<T | undefined> {
  return (value, at) => (value === undefined ? undefined : decode(value, at))
}

/** An integer from `min` to `max`. */
export function integer(min: number, max: number): Decoder<number> {
  return (value, at) => {
    if (typeof value === 'number' && Number.isInteger(value) && value >= min && value <= max) return value
    throw invalidArgument(at, `an integer from ${min} to ${max > 9 ? hex(max) : max}`, value)
  }
}

export const boolean: Decoder<boolean> = (value, at) => {
  if (typeof value === 'boolean') return value
  throw invalidArgument(at, 'a boolean', value)
}

export const anyText: Decoder<string> = (value, at) => {
  if (typeof value === 'string') return value
  throw invalidArgument(at, 'text', value)
}

/** Text of a certain form, which errors call `expected`. */
export function text(form: RegExp, expected: string): Decoder<string> {
  return (value, at) => {
    if (typeof value === 'string' && form.test(value)) return value
    throw invalidArgument(at, expected, value)
  }
}

/** One of these words. */
export function oneOf<T extends string>(...choices: readonly T[]): Decoder<T> {
  return (value, at) => {
    if (choices.includes(value as T)) return value as T
    throw invalidArgument(at, `one of ${choices.map((choice) => `'${choice}'`).join(', ')}`, value)
  }
}

/** Bytes: as many as one of these numbers says. */
export function bytes(...sizes: readonly number[]): Decoder<Uint8Array> {
  return (value, at) => {
    if (value instanceof Uint8Array && sizes.includes(value.length)) return value
    throw invalidArgument(at, `${sizes.join(' or ')} bytes`, value)
  }
}

/** From `min` to `max` bytes, a multiple of `unit`. */
export function bytesUpTo(min: number, max: number, unit = 1): Decoder<Uint8Array> {
  return (value, at) => {
    const isBytes = value instanceof Uint8Array
    if (isBytes && value.length >= min && value.length <= max && value.length % unit === 0) return value
    throw invalidArgument(at, `${min} to ${max} bytes${unit === 1 ? '' : `, a multiple of ${unit},`}`, value)
  }
}

/** A list of at most `max` values, all of one kind. */
export function list<T>(decode: Decoder<T>, max: number): Decoder<T[]> {
  return (value, at) => {
    if (!Array.isArray(value) || value.length > max)
      throw invalidArgument(at, `a list of at most ${max}`, value)
    return value.map((element: DeviceState, index) => decode(element, `${at}[${index}]`))
  }
}

/** An object with these fields, and no others. */
export function object<T extends object>(
  fields: {
    readonly [Key in keyof Required<T>]: Decoder<T[Key]>
  },
): Decoder<T> {
  return (value, at) => {
    const given = objectOf(value, at)
    for (const key of Object.keys(given)) {
      if (!Object.hasOwn(fields, key))
        throw invalidArgument(at, `only ${Object.keys(fields).join(', ')}`, key)
    }
    const decoded: Partial<T> = {}
    for (const key of Object.keys(fields) as (keyof T & string)[]) {
      const part = fields[key](Object.hasOwn(given, key) ? given[key] : undefined, `${at}.${key}`)
      if (part !== undefined) decoded[key] = part
    }
    return decoded as T
  }
}

/** An object, whatever its fields are. */
export function objectOf(
  value: DeviceState | undefined,
  at: string,
): { readonly [key: string]: DeviceState } {
  const isObject = typeof value === 'object' && value !== null
  if (isObject && !Array.isArray(value) && !(value instanceof Uint8Array)) {
    return value as { readonly [key: string]: DeviceState }
  }
  throw invalidArgument(at, 'an object', value)
}
