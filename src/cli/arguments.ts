import { InvalidArgumentError } from 'commander'

/** An integer in decimal or, with 0x, hexadecimal. */
export function parseInteger(text: string): number {
  const value = /^(0x[0-9a-f]+|\d+)$/i.test(text) ? Number(text) : Number.NaN
  if (!Number.isSafeInteger(value)) {
    throw new InvalidArgumentError(`Expected a number such as 4 or 0x7c00 but received '${text}'.`)
  }
  return value
}

const UNITS: Readonly<Record<string, number>> = { ms: 1, '': 1000, s: 1000, m: 60_000, h: 3_600_000 }

/** A duration in milliseconds. A number alone counts seconds. */
export function parseDuration(text: string): number {
  const match = /^(\d+(?:\.\d+)?)(ms|s|m|h|)$/.exec(text)
  const milliseconds = match === null ? Number.NaN : Number(match[1]) * UNITS[match[2]!]!
  if (!Number.isFinite(milliseconds) || milliseconds > 2 ** 31 - 1) {
    throw new InvalidArgumentError(
      `Expected a duration such as 500ms, 5s or 2m, at most 24 days, but received '${text}'.`,
    )
  }
  return milliseconds
}

/** How often, in ms, and into which folder checkpoints are taken. */
export interface CheckpointOption {
  readonly every: number
  readonly dir: string
}

/** The shortest time between two checkpoints, in ms: with less, nothing else would be done. */
const MIN_EVERY = 100

/** A duration of at least 100 ms. */
export function parseEvery(text: string): number {
  const every = parseDuration(text)
  if (every >= MIN_EVERY) return every
  throw new InvalidArgumentError(`Expected a duration of at least ${MIN_EVERY}ms but received '${text}'.`)
}

/** `every=5s,dir=DIR`. The folder's name may have commas. */
export function parseCheckpoint(text: string): CheckpointOption {
  const [, every, dir] = /^every=([^,]*),dir=(.+)$/s.exec(text) ?? []
  if (every !== undefined && dir !== undefined) return { every: parseEvery(every), dir }
  throw new InvalidArgumentError(
    `Expected every=TIME,dir=DIR, such as every=5s,dir=checkpoints, but received '${text}'.`,
  )
}

/** Collects an option that may be given several times. */
export function collect(value: string, before: readonly string[] = []): readonly string[] {
  return [...before, value]
}

/** Where a command listens. */
export interface ListenAddress {
  readonly host: string
  readonly port: number
}

/** `host:port`, or one of them: without a host it is this one's own, without connections from others. */
export function parseListenAddress(text: string): ListenAddress {
  const [, bracketed, plain, port] = /^(?:(?:\[([^\]]+)\]|([^:]*)):)?(\d{1,5})$/.exec(text) ?? []
  if (port === undefined || Number(port) > 65535) {
    throw new InvalidArgumentError(`Expected HOST:PORT but received '${text}'.`)
  }
  return { host: bracketed || plain || '127.0.0.1', port: Number(port) }
}
