import { readFileSync } from 'node:fs'
import { connect, createServer, type Server, type Socket } from 'node:net'
import { createInterface } from 'node:readline'
import {
  type MigrationProgress,
  type MigrationResult,
  NodevisorError,
  type VirtualMachine,
} from '../index.js'

/** Files of a TLS connection, as the command line names them. */
export interface TlsFiles {
  readonly cert?: string
  readonly key?: string
  readonly ca?: string
}

/** What a machine that runs is asked for: a line of JSON. */
export type ControlRequest =
  | { readonly migrate: { readonly to: string; readonly tls?: TlsFiles } }
  /** After a migration of which nobody knows how it ended. */
  | { readonly resume: true }

/** What it answers: lines of JSON, the last of which is a result or an error. */
export type ControlAnswer =
  | { readonly progress: MigrationProgress }
  | { readonly result: MigrationResult | null }
  | { readonly error: { readonly code: string; readonly message: string } }

/** The socket that a machine is told by. */
export interface Control {
  /** Answers what is asked for, then removes the socket. */
  close(): Promise<void>
}

const MAX_REQUEST_SIZE = 65536
/** Only the user's own processes may connect. */
const OWNER_ONLY = 0o177

/** The bytes of files, as node:tls has them. */
export function readTls(files: TlsFiles): { cert?: Buffer; key?: Buffer; ca?: Buffer } {
  return Object.fromEntries(
    Object.entries(files).map(([name, file]) => {
      try {
        return [name, readFileSync(file)]
      } catch (cause) {
        throw new NodevisorError(
          'ERR_INVALID_ARGUMENT',
          `Expected a file that can be read for --tls-${name} but received ${file} (${(cause as Error).message})`,
          { cause },
        )
      }
    }),
  )
}

/**
 * Listens at a Unix socket for what a machine is to do.
 *
 * @throws `ERR_INVALID_ARGUMENT` where there cannot be one
 */
export async function listenForControl(path: string, vm: VirtualMachine): Promise<Control> {
  /** Those that have not asked for anything yet. */
  const silent = new Set<Socket>()
  const requests = new Set<Promise<void>>()
  const server = createServer((socket) => {
    silent.add(socket)
    const request = serve(socket, vm, () => silent.delete(socket)).finally(() => requests.delete(request))
    requests.add(request)
  })
  await listen(server, path)
  return {
    async close() {
      server.close()
      // What others have asked for is over, with the run.
      for (const socket of silent) socket.destroy()
      await Promise.all(requests)
    },
  }
}

async function listen(server: Server, path: string): Promise<void> {
  const before = process.umask(OWNER_ONLY)
  try {
    await new Promise<void>((resolve, reject) => {
      server.once('error', reject)
      server.listen(path, resolve)
      // The socket is there already.
      process.umask(before)
    })
  } catch (cause) {
    const isThere = (cause as NodeJS.ErrnoException).code === 'EADDRINUSE'
    const remedy = isThere ? 'remove it, if no machine uses it' : 'choose another path'
    throw new NodevisorError(
      'ERR_INVALID_ARGUMENT',
      `Expected a path where a socket can be for --control but received ${path} (${(cause as Error).message}): ${remedy}`,
      { cause },
    )
  } finally {
    process.umask(before)
  }
}

/** Answers one request. Whoever hangs up gives it up. */
async function serve(socket: Socket, vm: VirtualMachine, onAsked: () => void): Promise<void> {
  const gone = new AbortController()
  socket.on('error', () => {})
  socket.once('close', () => gone.abort(new Error('whoever asked for it has left')))
  const answer = (line: ControlAnswer) => {
    if (socket.writable) socket.write(`${JSON.stringify(line)}\n`)
  }
  try {
    const line = await readLine(socket)
    onAsked()
    const request = parseRequest(line)
    if ('resume' in request) {
      vm.resume()
      answer({ result: null })
    } else {
      const { to, tls } = request.migrate
      const onProgress = (progress: MigrationProgress) => answer({ progress })
      const options = { signal: gone.signal, onProgress, ...(tls === undefined ? {} : { tls: readTls(tls) }) }
      answer({ result: await vm.migrate(to, options) })
    }
  } catch (error) {
    const code = error instanceof NodevisorError ? error.code : ''
    answer({ error: { code, message: error instanceof Error ? error.message : String(error) } })
  }
  onAsked()
  await new Promise<void>((resolve) => {
    if (socket.destroyed) resolve()
    else socket.once('close', () => resolve()).end(() => socket.destroy())
  })
}

async function readLine(socket: Socket): Promise<string> {
  let text = ''
  try {
    for await (const chunk of socket.iterator({ destroyOnReturn: false })) {
      text += String(chunk)
      const end = text.indexOf('\n')
      if (end >= 0) return text.slice(0, end)
      if (text.length > MAX_REQUEST_SIZE) break
    }
  } finally {
    // What comes next is for nobody, but its end has to be seen.
    socket.resume()
  }
  throw new NodevisorError('ERR_INVALID_ARGUMENT', 'Expected a request on a line of its own')
}

function parseRequest(line: string): ControlRequest {
  let request: unknown
  try {
    request = JSON.parse(line)
  } catch {
    // Refused below.
  }
  const { resume, migrate } = Object(request) as { resume?: unknown; migrate?: unknown }
  if (resume === true) return { resume }
  const { to, tls = {} } = Object(migrate) as { to?: unknown; tls?: unknown }
  const files = Object.entries(Object(tls) as object)
  const isFile = ([name, file]: [string, unknown]) =>
    ['cert', 'key', 'ca'].includes(name) && typeof file === 'string'
  if (typeof to === 'string' && files.every(isFile)) {
    return { migrate: { to, ...(files.length === 0 ? {} : { tls: Object.fromEntries(files) }) } }
  }
  throw new NodevisorError(
    'ERR_INVALID_ARGUMENT',
    'Expected { "migrate": { "to": "host:port" } } or { "resume": true }',
  )
}

/**
 * Asks a machine that runs elsewhere for something.
 *
 * @param onProgress - called with what it says meanwhile
 * @returns the last line of its answer; undefined where it left without one
 */
export async function ask(
  path: string,
  request: ControlRequest,
  onProgress: (progress: MigrationProgress) => void = () => {},
): Promise<Exclude<ControlAnswer, { progress: unknown }> | undefined> {
  const socket = connect(path)
  try {
    await new Promise<void>((resolve, reject) => socket.once('connect', resolve).once('error', reject))
    socket.write(`${JSON.stringify(request)}\n`)
    for await (const line of createInterface({ input: socket })) {
      const answer = JSON.parse(line) as ControlAnswer
      if (!('progress' in answer)) return answer
      onProgress(answer.progress)
    }
    return undefined
  } finally {
    socket.destroy()
  }
}
