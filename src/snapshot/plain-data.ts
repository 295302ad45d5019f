import type { DeviceState } from '../bus/device.js'
import { invalidArgument } from '../errors.js'

/** What JSON has in place of bytes: `{ "base64": "…" }`. */
const BYTES_KEY = 'base64'
/** Fields of that name, which get a colon more so that nobody takes them for bytes. */
const LIKE_BYTES_KEY = /^:*base64$/
/** How deep lists and objects may lie in one another: nothing that reads them may run out of stack. */
const MAX_DEPTH = 64

/**
 * Plain data as JSON can have it. Fields that are undefined are left out.
 *
 * @param name - what errors call the value
 * @throws `ERR_INVALID_ARGUMENT` for what is no plain data
 */
export function toJson(root: unknown, name: string): unknown {
  const walk = walker(name, (value, at, part): unknown => {
    if (value === null || typeof value === 'boolean' || typeof value === 'string') return value
    if (typeof value === 'number' && Number.isFinite(value)) return value
    if (value instanceof Uint8Array) {
      return { [BYTES_KEY]: Buffer.from(value.buffer, value.byteOffset, value.length).toString('base64') }
    }
    // Not map(), which would leave gaps as they are.
    if (Array.isArray(value)) return Array.from(value, (element: unknown, index) => part(element, index))
    if (typeof value === 'object' && isPlain(value)) {
      return Object.fromEntries(
        Object.entries(value)
          .filter(([, field]) => field !== undefined)
          .map(([key, field]) => [LIKE_BYTES_KEY.test(key) ? `:${key}` : key, part(field, key)]),
      )
    }
    const expected =
      'plain data (null, booleans, finite numbers, text, Uint8Arrays, lists and objects of those)'
    throw invalidArgument(at(), expected, value)
  })
  return walk(root)
}

/**
 * The reverse of {@link toJson}.
 *
 * @throws `ERR_INVALID_ARGUMENT` for what that cannot have given
 */
export function fromJson(root: unknown, name: string): DeviceState {
  const walk = walker(name, (value, at, part): DeviceState => {
    if (typeof value === 'number' && !Number.isFinite(value))
      throw invalidArgument(at(), 'a finite number', value)
    if (typeof value !== 'object' || value === null) return value as DeviceState
    if (Array.isArray(value)) return value.map(part)
    if (Object.hasOwn(value, BYTES_KEY)) return bytesOf(value, at)
    return Object.fromEntries(
      Object.entries(value).map(([key, field]) => [
        LIKE_BYTES_KEY.test(key) ? key.slice(1) : key,
        part(field, key),
      ]),
    )
  })
  return walk(root)
}

type Part<T> = (value: unknown, key: string | number) => T

/**
 * A function that goes through a value, with its parts, to a bounded depth.
 *
 * @param visit - what to make of a value; `at` tells where it is, for errors, and `part` goes on with what is in it
 */
function walker<T>(
  name: string,
  visit: (value: unknown, at: () => string, part: Part<T>) => T,
): (root: unknown) => T {
  const path: (string | number)[] = []
  const at = () =>
    path.reduce<string>((all, key) => `${all}${typeof key === 'number' ? `[${key}]` : `.${key}`}`, name)
  const part: Part<T> = (value, key) => {
    path.push(key)
    if (path.length > MAX_DEPTH)
      throw invalidArgument(at(), `plain data at most ${MAX_DEPTH} levels deep`, value)
    const result = visit(value, at, part)
    path.pop()
    return result
  }
  return (root) => visit(root, at, part)
}

function bytesOf(value: object, at: () => string): Uint8Array {
  const { [BYTES_KEY]: text } = value as { readonly [BYTES_KEY]: unknown }
  if (typeof text === 'string' && Object.keys(value).length === 1) {
    const bytes = Buffer.from(text, 'base64')
    // Node.js passes over what is no base64.
    if (bytes.toString('base64') === text) return new Uint8Array(bytes)
  }
  throw invalidArgument(at(), `bytes as { "${BYTES_KEY}": "…" }`, text)
}

function isPlain(value: object): boolean {
  const prototype = Object.getPrototypeOf(value)
  return prototype === Object.prototype || prototype === null
}
