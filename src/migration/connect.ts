import { once } from 'node:events'
import { connect } from 'node:net'
import { Duplex } from 'node:stream'
import tls, { type ConnectionOptions, type TlsOptions } from 'node:tls'
import { invalidArgument, NodevisorError } from '../errors.js'
import { failed, IDLE_LIMIT } from './protocol.js'

/** Where a machine is to go: `host:port`, or a stream whose other end is received from. */
export type MigrationTarget = string | { readonly host: string; readonly port: number } | Duplex

interface Address {
  readonly host: string
  readonly port: number
}

/**
 * Checks a {@link MigrationTarget}.
 *
 * @throws `ERR_INVALID_ARGUMENT`
 */
export function checkTarget(to: MigrationTarget): Address | Duplex {
  if (to instanceof Duplex) return checkStream('to', to)
  const address = typeof to === 'string' ? parseAddress(to) : to
  const { host, port } = (address ?? {}) as Partial<Address>
  const isPort = Number.isInteger(port) && port! > 0 && port! < 65536
  if (typeof host === 'string' && host !== '' && isPort) return { host, port: port! }
  throw invalidArgument('to', "'host:port', { host, port } or a Duplex", to)
}

/** Checks a stream that machines go through: one of bytes. @throws `ERR_INVALID_ARGUMENT` */
export function checkStream(name: string, stream: unknown): Duplex {
  const isBytes = stream instanceof Duplex && !stream.readableObjectMode && !stream.writableObjectMode
  if (isBytes && stream.readableEncoding === null) return stream
  throw invalidArgument(name, 'a Duplex of bytes', stream)
}

/** `host:port`; an IPv6 address is in brackets. undefined for what is neither. */
function parseAddress(text: string): Address | undefined {
  const [, bracketed, plain, port] = /^(?:\[([^\]]+)\]|([^:]*)):(\d{1,5})$/.exec(text) ?? []
  const host = bracketed ?? plain
  return host === undefined ? undefined : { host, port: Number(port) }
}

/**
 * Connects, by TLS if there are options for that.
 *
 * @throws `ERR_MIGRATION_FAILED`
 */
export async function connectTo(
  to: Address | Duplex,
  options: ConnectionOptions | undefined,
  signal: AbortSignal,
): Promise<Duplex> {
  if (options === undefined && to instanceof Duplex) return to
  const stream =
    options === undefined
      ? connect(to as Address)
      : to instanceof Duplex
        ? tls.connect({ ...options, socket: to })
        : tls.connect({ ...options, ...to })
  return opened(stream, options === undefined ? 'connect' : 'secureConnect', to, signal)
}

/**
 * The receiving end of a connection, by TLS if there are options for that.
 *
 * @throws `ERR_MIGRATION_FAILED`
 */
export async function secured(
  from: Duplex,
  options: TlsOptions | undefined,
  signal: AbortSignal,
): Promise<Duplex> {
  if (options === undefined) return from
  const server = tls.createServer({ handshakeTimeout: IDLE_LIMIT, ...options })
  const gone = new AbortController()
  const leave = () => gone.abort(new Error('the other side closed the connection'))
  from.once('close', leave)
  try {
    const stop = AbortSignal.any([signal, gone.signal])
    const error = once(server, 'tlsClientError', { signal: stop }).then(([cause]) => Promise.reject(cause))
    const secure = once(server, 'secureConnection', { signal: stop })
    server.emit('connection', from)
    const [stream] = (await Promise.race([secure, error])) as [Duplex]
    error.catch(() => {})
    return stream
  } catch (cause) {
    from.destroy()
    throw connectError(cause, 'a TLS connection', signal, gone.signal)
  } finally {
    from.off('close', leave)
    // Ends the waits that are left.
    gone.abort()
  }
}

async function opened(
  stream: Duplex,
  event: string,
  to: Address | Duplex,
  signal: AbortSignal,
): Promise<Duplex> {
  const what = to instanceof Duplex ? 'a TLS connection' : `a connection to ${to.host}:${to.port}`
  const limit = AbortSignal.timeout(IDLE_LIMIT)
  const gone = new AbortController()
  const leave = () => gone.abort(new Error('the other side closed the connection'))
  stream.once('close', leave)
  try {
    await once(stream, event, { signal: AbortSignal.any([signal, limit, gone.signal]) })
    return stream
  } catch (cause) {
    // Errors that come later are nobody's.
    stream.on('error', () => {})
    stream.destroy()
    if (to instanceof Duplex) to.destroy()
    throw connectError(cause, what, signal, limit, gone.signal)
  } finally {
    stream.off('close', leave)
  }
}

function connectError(error: unknown, what: string, ...signals: readonly AbortSignal[]): NodevisorError {
  if (error instanceof NodevisorError) return error
  const cause = signals.find(({ aborted }) => aborted)?.reason ?? error
  const why = cause instanceof Error ? cause.message : String(cause)
  return failed(`Expected ${what} but there is none: ${why}`, { cause })
}
