import { randomBytes } from 'node:crypto'
import { constants } from 'node:os'
import { Readable, type Writable } from 'node:stream'
import { pipeline } from 'node:stream/promises'
import { getSystemErrorMap } from 'node:util'
import { closest } from 'fastest-levenshtein'
import { type ErrorFacts, invalidArgument, NodevisorError, show } from '../errors.js'
import {
  AGENT_VERSION,
  END,
  encodeFrame,
  encodeHello,
  FRAME,
  type Frame,
  FrameReader,
  HelloFinder,
  isAnswer,
  MAX_PAYLOAD,
  TOKEN_SIZE,
  words,
} from './agent-frames.js'
import { AgentInput, AgentOutput, Collector, OUTPUT_WINDOW } from './agent-streams.js'
import type { ConsolePort } from './console-port.js'

/** The console port that the agent opens. */
export const AGENT_PORT_NAME = 'org.nodevisor.agent'

/** How many the agent has at a time; others wait. */
const MAX_CHANNELS = 64
/** Credit that an agent can have given, far more than it has room for. */
const MAX_CREDIT = 2 ** 30
const STDIN = 0
const STDOUT = 1
const SIGKILL = 9
const MAX_SIGNAL = 64
const MAX_STATUS = 255
const MAX_ERRNO = 4095
/** Permissions of a new file where none are given: those that the agent's umask leaves of 0o666. */
const DEFAULT_MODE = 0xffff_ffff
const MAX_MODE = 0o7777

/** ms: kernels boot in seconds, on slow hosts in tens of them. */
const DEFAULT_AGENT_TIMEOUT = 60_000
/** How long a program that was killed may take to end, in ms. */
const KILL_TIMEOUT = 10_000
/** The longest time a timer of Node.js can have, in ms. */
const MAX_TIMEOUT = 0x7fff_ffff
const DEFAULT_MAX_OUTPUT = 16 * 1024 * 1024
const DEFAULT_MAX_SIZE = 64 * 1024 * 1024

/** How long to wait for the agent. */
export interface AgentOptions {
  /** Milliseconds that the agent may take to answer, which includes booting: 60 000 unless given. */
  readonly agentTimeout?: number
  /** Ends the call with `ERR_ABORTED`; what it started in the guest is killed. */
  readonly signal?: AbortSignal
}

/** How to run a program in the guest. */
export interface SpawnOptions extends AgentOptions {
  /** Variables, beside those that the agent has; undefined unsets one. */
  readonly env?: Readonly<Record<string, string | undefined>>
  /** Its folder: the agent's unless given. */
  readonly cwd?: string
  /** Milliseconds from its start on, after which its process group is killed. */
  readonly timeout?: number
}

/** What a program in the guest gets and gives. */
export interface ExecOptions extends SpawnOptions {
  /** Its standard input: empty unless given. */
  readonly input?: string | Uint8Array | AsyncIterable<string | Uint8Array>
  /** Most bytes kept of stdout, and of stderr: 16 MiB unless given. The rest is dropped: `truncated`. */
  readonly maxOutput?: number
  /** Of `stdout` and `stderr`: `utf8` unless given. */
  readonly encoding?: BufferEncoding | 'buffer'
  /** Whether to throw `ERR_EXEC_FAILED`, with the result as fields, unless it exits with 0. */
  readonly check?: boolean
}

/** How a program in the guest ended. */
export interface GuestExit {
  /** Its exit status; null if a signal ended it. */
  readonly exitCode: number | null
  /** The signal that ended it: `SIGKILL` for instance; null if it exited. */
  readonly signal: string | null
  /** It was killed because its `timeout` was over. */
  readonly timedOut: boolean
}

/** What a program in the guest has done. */
export interface ExecResult<Output = string> extends GuestExit {
  readonly stdout: Output
  readonly stderr: Output
  /** There was more output than `maxOutput`. */
  readonly truncated: boolean
}

/** How to read a file in the guest. */
export interface ReadFileOptions extends AgentOptions {
  /** Most bytes to read, since a guest's files may have no end: 64 MiB unless given. */
  readonly maxSize?: number
}

/** How to write a file in the guest. */
export interface WriteFileOptions extends AgentOptions {
  /** Its permissions, `0o755` for instance. Unless given, those of a file that is there stay. */
  readonly mode?: number
}

const AGENT_KEYS = ['agentTimeout', 'signal'] as const
const SPAWN_KEYS = [...AGENT_KEYS, 'env', 'cwd', 'timeout'] as const
const EXEC_KEYS = [...SPAWN_KEYS, 'input', 'maxOutput', 'encoding', 'check'] as const
const READ_KEYS = [...AGENT_KEYS, 'maxSize'] as const
const WRITE_KEYS = [...AGENT_KEYS, 'mode'] as const

/** What the agent does for somebody: a program or a file, until EXIT. */
class Channel {
  /** 0 until the agent was told of it. */
  id = 0
  /** Type and payload of the frame that opens it. */
  readonly type: number
  readonly request: Buffer
  readonly input: AgentInput
  readonly stdout: AgentOutput
  readonly stderr: AgentOutput
  /** How the agent says that it ended. */
  readonly ended: Promise<{ readonly kind: number; readonly value: number }>
  /** Bytes of input that the agent takes. */
  inputCredit = 0
  /** Signals that are to be sent. */
  readonly signals = new Set<number>()
  /** Whoever asked for it does not wait any more. */
  settled = false
  onOpen: (() => void) | undefined
  #resolve!: (end: { readonly kind: number; readonly value: number }) => void
  #reject!: (error: Error) => void

  constructor(type: number, request: Buffer, changed: () => void) {
    this.type = type
    this.request = request
    this.input = new AgentInput(changed)
    this.stdout = new AgentOutput(changed)
    this.stderr = new AgentOutput(changed)
    this.ended = new Promise((resolve, reject) => {
      this.#resolve = resolve
      this.#reject = reject
    })
    // A program may end before its owner comes to await that: no unhandledRejection.
    this.ended.catch(() => {})
  }

  end(kind: number, value: number): void {
    this.#finish()
    this.#resolve({ kind, value })
  }

  fail(error: Error): void {
    this.#finish()
    this.#reject(error)
  }

  #finish(): void {
    this.settled = true
    this.stdout.finish()
    this.stderr.finish()
    // Whoever pipes into it shall stop.
    this.input.destroy()
  }
}

/** A program in the guest. */
export class GuestProcess {
  /** Its standard input. Ending it, or destroying it, closes that of the program. */
  readonly stdin: Writable
  /** Its standard output. A program whose output is not read has to wait once there are 256 KiB of it. */
  readonly stdout: Readable
  /** Its standard error, as {@link stdout}. */
  readonly stderr: Readable
  /**
   * Resolves when it has ended and all that it printed has come. The streams end, too, also where this rejects:
   * with `ERR_EXEC_FAILED` (it could not be started; `errnoName` says why), `ERR_AGENT_MISSING`, `ERR_AGENT_FAILED`,
   * `ERR_ABORTED`, `ERR_TIMEOUT` (it was killed and did not end) or `ERR_CLOSED`.
   */
  readonly exited: Promise<GuestExit>
  readonly #kill: (signal: number) => void

  /** @internal */
  constructor(
    streams: { readonly input: Writable; readonly stdout: Readable; readonly stderr: Readable },
    exited: Promise<GuestExit>,
    kill: (signal: number) => void,
  ) {
    this.stdin = streams.input
    this.stdout = streams.stdout
    this.stderr = streams.stderr
    this.exited = exited
    this.#kill = kill
    exited.catch(() => {})
  }

  /**
   * Sends a signal to its process group: `SIGTERM` unless given. Once it has ended, nothing happens.
   *
   * @throws `ERR_INVALID_ARGUMENT`
   */
  kill(signal: NodeJS.Signals | number = 'SIGTERM'): void {
    const number = typeof signal === 'number' ? signal : constants.signals[signal]
    if (!Number.isInteger(number) || number < 1 || number > MAX_SIGNAL) {
      throw invalidArgument('signal', `the name of a signal, or a number from 1 to ${MAX_SIGNAL},`, signal)
    }
    this.#kill(number)
  }
}

interface Waiter {
  resolve(): void
  reject(error: Error): void
}

/**
 * The agent in a Linux guest, which runs programs and moves files: `guests/linux-agent`, over a port of the virtio
 * console. See `docs/linux.md`.
 *
 * The guest is not trusted. What comes is checked, each stream has a window of credit that the agent cannot overrun,
 * and an agent that breaks the protocol loses its connection; the next call begins another.
 */
export class GuestAgent {
  readonly #port: ConsolePort
  #state: 'idle' | 'connecting' | 'connected' = 'idle'
  #token = Buffer.alloc(0)
  #finder: HelloFinder | undefined
  #reader = new FrameReader()
  /** A HELLO that the port has not taken. */
  #helloUnderWay = false
  #helloAgain = false
  /** Answers that are yet to come. */
  #answersDue = 0
  readonly #waiters = new Set<Waiter>()
  /** Those that the agent knows, in the order in which they get their turns. */
  readonly #channels = new Map<number, Channel>()
  /** Those that it is to be told of. */
  readonly #opening: Channel[] = []
  #lastId = 0
  #flushing = false
  #closed: string | undefined
  /** Why the last connection ended. */
  #failure: Error | undefined

  /** @internal */
  constructor(port: ConsolePort) {
    this.#port = port
    port.on('data', (bytes: Buffer) => this.#receive(bytes))
    port.on('drain', () => this.#flush())
    port.on('guestClose', () => this.#guestClosed())
    port.on('close', () => this.close('its console port was destroyed'))
  }

  /**
   * Waits until the agent answers. The other methods do so by themselves.
   *
   * @throws `ERR_AGENT_MISSING`, `ERR_AGENT_FAILED`, `ERR_ABORTED`, `ERR_CLOSED`, `ERR_INVALID_ARGUMENT`,
   *   `ERR_UNKNOWN_OPTION`
   */
  async connected(options: AgentOptions = {}): Promise<void> {
    checkOptions(options, AGENT_KEYS)
    await this.#connected(options)
  }

  /**
   * Runs a program in the guest, to its end. A status other than 0 is no error, unless `check` is set.
   *
   * @param command - text for `/bin/sh -c`, or a program (with a path, or to be looked for in `PATH`) and its arguments
   * @throws as {@link GuestProcess.exited}; `ERR_EXEC_FAILED` also where `check` is set and it failed, and where `input`
   *   did; `ERR_INVALID_ARGUMENT`, `ERR_UNKNOWN_OPTION`
   */
  exec(
    command: string | readonly string[],
    options: ExecOptions & { readonly encoding: 'buffer' },
  ): Promise<ExecResult<Buffer>>
  exec(command: string | readonly string[], options?: ExecOptions): Promise<ExecResult>
  async exec(
    command: string | readonly string[],
    options: ExecOptions = {},
  ): Promise<ExecResult<string | Buffer>> {
    checkOptions(options, EXEC_KEYS)
    const { input = '', maxOutput = DEFAULT_MAX_OUTPUT, encoding = 'utf8', check = false, ...rest } = options
    checkSize('maxOutput', maxOutput)
    if (encoding !== 'buffer' && !Buffer.isEncoding(encoding)) {
      throw invalidArgument('encoding', "an encoding such as 'utf8', or 'buffer',", encoding)
    }
    if (typeof check !== 'boolean') throw invalidArgument('check', 'true or false', check)
    const source = readableOf('input', input)
    const { channel, program } = this.#spawn(command, rest)
    const outputs = [program.stdout, program.stderr].map((stream) => collect(stream, maxOutput))
    this.#feed(channel, source, 'ERR_EXEC_FAILED', `input for ${describeCommand(command)}`)
    const exit = await program.exited
    // They have ended, but give their last bytes only now.
    await Promise.all(outputs.map(({ ended }) => ended))
    const [stdout, stderr] = outputs.map(({ collector }) =>
      encoding === 'buffer' ? collector.bytes : collector.bytes.toString(encoding),
    )
    const truncated = outputs.some(({ collector }) => collector.truncated)
    const result = { ...exit, stdout: stdout!, stderr: stderr!, truncated }
    if (check && exit.exitCode !== 0) throw failedCheck(command, result)
    return result
  }

  /**
   * Starts a program in the guest, and gives its streams: see {@link exec}. What goes wrong rejects
   * {@link GuestProcess.exited}.
   *
   * @throws `ERR_INVALID_ARGUMENT`, `ERR_UNKNOWN_OPTION`
   */
  spawn(command: string | readonly string[], options: SpawnOptions = {}): GuestProcess {
    return this.#spawn(command, options).program
  }

  /**
   * Reads a file in the guest.
   *
   * @throws `ERR_GUEST_FILE` with `errnoName`, or where it is longer than `maxSize`; `ERR_AGENT_MISSING`,
   *   `ERR_AGENT_FAILED`, `ERR_ABORTED`, `ERR_CLOSED`, `ERR_INVALID_ARGUMENT`, `ERR_UNKNOWN_OPTION`
   */
  async readFile(path: string, options: ReadFileOptions = {}): Promise<Buffer> {
    checkOptions(options, READ_KEYS)
    const { maxSize = DEFAULT_MAX_SIZE } = options
    checkSize('maxSize', maxSize)
    const request = encodeRequest('path', [OUTPUT_WINDOW], [checkPath(path)])
    const channel = this.#open(FRAME.READ, request, options)
    channel.stderr.resume()
    const { collector, ended } = collect(channel.stdout, maxSize, () => {
      this.#kill(channel, SIGKILL)
      const message = `Expected at most ${maxSize} bytes in the guest's file ${show(path)}; set maxSize for more`
      channel.fail(new NodevisorError('ERR_GUEST_FILE', message, { path }))
    })
    checkFileEnd(path, 'read', await channel.ended)
    await ended
    return collector.bytes
  }

  /**
   * Writes a file in the guest, in place of one that may be there.
   *
   * @throws as {@link readFile}; `ERR_GUEST_FILE` also where `data` fails
   */
  async writeFile(
    path: string,
    data: string | Uint8Array | AsyncIterable<string | Uint8Array>,
    options: WriteFileOptions = {},
  ): Promise<void> {
    checkOptions(options, WRITE_KEYS)
    const { mode = DEFAULT_MODE } = options
    if (mode !== DEFAULT_MODE && (!Number.isInteger(mode) || mode < 0 || mode > MAX_MODE)) {
      throw invalidArgument('mode', 'permissions from 0 to 0o7777', mode)
    }
    const request = encodeRequest('path', [mode], [checkPath(path)])
    const source = readableOf('data', data)
    const channel = this.#open(FRAME.WRITE, request, options)
    channel.stdout.resume()
    channel.stderr.resume()
    this.#feed(channel, source, 'ERR_GUEST_FILE', `data for the guest's file ${show(path)}`)
    checkFileEnd(path, 'written', await channel.ended)
  }

  /** A run has ended, and another may follow. @param why - a clause: `the run ended with halt` @internal */
  endOfRun(why: string): void {
    this.#fail('ERR_AGENT_FAILED', `Expected the agent in the guest to go on but ${why}`)
  }

  /** There will be no agent any more. @internal */
  close(why: string): void {
    if (this.#closed !== undefined) return
    this.#closed = why
    this.#fail('ERR_CLOSED', `Expected an agent in the guest but ${why}`)
  }

  #spawn(
    command: string | readonly string[],
    options: SpawnOptions,
  ): { readonly channel: Channel; readonly program: GuestProcess } {
    checkOptions(options, SPAWN_KEYS)
    const { timeout } = options
    checkTimeout('timeout', timeout)
    const channel = this.#open(FRAME.SPAWN, encodeCommand(command, options), options)
    let timedOut = false
    let timer: NodeJS.Timeout | undefined
    if (timeout !== undefined) {
      channel.onOpen = () => {
        timer = setTimeout(() => {
          timedOut = true
          this.#kill(channel, SIGKILL)
          const error = () =>
            new NodevisorError(
              'ERR_TIMEOUT',
              `Expected ${describeCommand(command)} to end in ${timeout} ms, and then when it was killed, but it did not`,
            )
          timer = setTimeout(() => channel.fail(error()), KILL_TIMEOUT)
        }, timeout)
      }
    }
    const exited = channel.ended
      .finally(() => clearTimeout(timer))
      .then(({ kind, value }) => {
        if (kind === END.FAILED) {
          const { name, text } = describeErrno(value)
          const what = `Expected ${describeCommand(command)} to start in the guest but it did not: ${text} (${name})`
          throw new NodevisorError('ERR_EXEC_FAILED', what, { errno: value, errnoName: name })
        }
        const exitCode = kind === END.EXITED ? value : null
        return { exitCode, signal: exitCode === null ? nameOfSignal(value) : null, timedOut }
      })
    const program = new GuestProcess(channel, exited, (signal) => this.#kill(channel, signal))
    return { channel, program }
  }

  /** Sends input, and ends what gets it where the input fails. */
  #feed(channel: Channel, source: Readable, code: 'ERR_EXEC_FAILED' | 'ERR_GUEST_FILE', what: string): void {
    pipeline(source, channel.input).catch((cause: unknown) => {
      // That a program does not read all of it is the program's own business.
      if (channel.settled) return
      this.#kill(channel, SIGKILL)
      channel.fail(new NodevisorError(code, `Expected ${what} but it failed; see the cause`, { cause }))
    })
  }

  #open(type: number, request: Buffer, options: AgentOptions): Channel {
    const channel = new Channel(type, request, () => this.#flush())
    const { signal } = options
    const abort = () => {
      this.#kill(channel, SIGKILL)
      channel.fail(aborted(signal!))
    }
    signal?.addEventListener('abort', abort, { once: true })
    const stopListening = () => signal?.removeEventListener('abort', abort)
    channel.ended.then(stopListening, stopListening)
    this.#connected(options).then(
      () => {
        // The agent may have failed right after its answer.
        if (this.#state !== 'connected') return channel.fail(this.#failure!)
        this.#opening.push(channel)
        this.#flush()
      },
      (error: Error) => channel.fail(error),
    )
    return channel
  }

  #kill(channel: Channel, signal: number): void {
    if (channel.settled) return
    channel.signals.add(signal)
    this.#flush()
  }

  async #connected({ agentTimeout = DEFAULT_AGENT_TIMEOUT, signal }: AgentOptions): Promise<void> {
    if (this.#closed !== undefined) {
      throw new NodevisorError('ERR_CLOSED', `Expected an agent in the guest but ${this.#closed}`)
    }
    if (signal?.aborted) throw aborted(signal)
    if (this.#state === 'connected') return
    if (this.#state === 'idle') this.#connect()
    // What came for nobody may have gone to one that could not answer.
    else if (this.#waiters.size === 0 && !this.#helloUnderWay) this.#sendHello()
    let timer: NodeJS.Timeout | undefined
    let abort: (() => void) | undefined
    let waiter: Waiter | undefined
    try {
      await new Promise<void>((resolve, reject) => {
        waiter = { resolve, reject }
        this.#waiters.add(waiter)
        timer = setTimeout(() => reject(this.#missing(agentTimeout)), agentTimeout)
        abort = () => reject(aborted(signal!))
        signal?.addEventListener('abort', abort, { once: true })
      })
    } finally {
      clearTimeout(timer)
      signal?.removeEventListener('abort', abort!)
      this.#waiters.delete(waiter!)
    }
  }

  #missing(timeout: number): NodevisorError {
    const seen = this.#port.guestOpen
      ? `something in the guest has opened the port '${AGENT_PORT_NAME}' but does not answer: is it the agent?`
      : `nothing in the guest has opened the port '${AGENT_PORT_NAME}': is the agent in the initramfs and started by ` +
        'init, does the kernel have CONFIG_VIRTIO_CONSOLE, and is vm.run() under way?'
    return new NodevisorError(
      'ERR_AGENT_MISSING',
      `Expected an agent in the guest within ${timeout} ms but ${seen}`,
    )
  }

  #connect(): void {
    this.#state = 'connecting'
    this.#token = randomBytes(TOKEN_SIZE)
    this.#finder = new HelloFinder(this.#token)
    this.#answersDue = 0
    this.#sendHello()
  }

  /** One at a time: a guest that opens and closes its port without end must not fill the port's buffer. */
  #sendHello(): void {
    if (this.#helloUnderWay) {
      this.#helloAgain = true
      return
    }
    this.#helloUnderWay = true
    this.#answersDue += 1
    this.#port.write(encodeHello(this.#token), () => {
      this.#helloUnderWay = false
      const again = this.#helloAgain && this.#state === 'connecting'
      this.#helloAgain = false
      if (again) this.#sendHello()
    })
  }

  #guestClosed(): void {
    if (this.#state === 'connected') {
      this.#fail(
        'ERR_AGENT_FAILED',
        'Expected the agent in the guest to go on but it closed its port; did it crash?',
      )
    } else if (this.#state === 'connecting') {
      // Whoever read the HELLO, or a part of it, has gone.
      this.#sendHello()
    }
  }

  #receive(bytes: Buffer): void {
    let rest = bytes
    if (this.#state === 'connecting') {
      const answer = this.#finder!.search(bytes)
      if (answer === undefined) return
      rest = answer.rest
      if (!this.#answered(answer.version)) return
    }
    if (this.#state !== 'connected') return
    const reader = this.#reader
    for (const frame of reader.read(rest)) {
      const problem = frame === undefined ? 'a frame is too long' : this.#handle(frame)
      if (problem !== undefined) {
        const why = `Expected the agent in the guest to keep to its protocol but ${problem}`
        this.#fail('ERR_AGENT_FAILED', why)
      }
      // What else there is belongs to a connection that is over.
      if (this.#reader !== reader) return
    }
    for (const { stdout, stderr } of this.#channels.values()) {
      stdout.deliver()
      stderr.deliver()
    }
  }

  #answered(version: number): boolean {
    if (version !== AGENT_VERSION) {
      this.#fail(
        'ERR_AGENT_FAILED',
        `Expected an agent of version ${AGENT_VERSION} in the guest but it is of version ${version}; build it anew`,
      )
      return false
    }
    this.#state = 'connected'
    this.#answersDue -= 1
    this.#finder = undefined
    this.#reader = new FrameReader()
    for (const { resolve } of this.#waiters) resolve()
    return true
  }

  /** @returns a clause that says what is wrong with it */
  #handle(frame: Frame): string | undefined {
    const { type, channel: id, payload } = frame
    if (type === FRAME.HELLO && this.#answersDue > 0 && isAnswer(frame, this.#token)) {
      this.#answersDue -= 1
      return undefined
    }
    if (type === FRAME.FAULT) return `it says: ${show(payload.toString('latin1').replace(/[^ -~]/g, '?'))}`
    const channel = this.#channels.get(id)
    if (channel === undefined) return `it sent a frame of type ${type} for channel ${id}, which is not open`
    switch (type) {
      case FRAME.STDOUT:
      case FRAME.STDERR: {
        const stream = type === FRAME.STDOUT ? channel.stdout : channel.stderr
        if (channel.settled) stream.destroy()
        if (payload.length === 0) return 'it sent output without bytes'
        return stream.accept(payload) ? undefined : 'it sent more output than it had credit for'
      }
      case FRAME.CREDIT: {
        if (payload.length !== 8) return `it sent CREDIT of ${payload.length} bytes`
        const [stream, bytes] = [payload.readUInt32LE(0), payload.readUInt32LE(4)]
        if (stream !== STDIN || bytes === 0 || channel.inputCredit + bytes > MAX_CREDIT) {
          return `it gave credit of ${bytes} bytes for stream ${stream}`
        }
        channel.inputCredit += bytes
        this.#flush()
        return undefined
      }
      case FRAME.EXIT: {
        if (payload.length !== 8) return `it sent EXIT of ${payload.length} bytes`
        const [kind, value] = [payload.readUInt32LE(0), payload.readUInt32LE(4)]
        if (!isEnd(kind, value)) return `it sent EXIT of kind ${kind} with ${value}`
        this.#channels.delete(id)
        channel.end(kind, value)
        this.#flush()
        return undefined
      }
      default:
        return `it sent a frame of type ${type}`
    }
  }

  #fail(code: 'ERR_AGENT_FAILED' | 'ERR_CLOSED', message: string): void {
    this.#state = 'idle'
    this.#reader = new FrameReader()
    const channels = [...this.#channels.values(), ...this.#opening.splice(0)]
    this.#channels.clear()
    this.#failure = new NodevisorError(code, message)
    const error = () => new NodevisorError(code, message)
    for (const { reject } of this.#waiters) reject(error())
    for (const channel of channels) channel.fail(error())
  }

  /** Sends what there is to send, as long as the port takes it: nothing piles up behind a guest that does not read. */
  #flush(): void {
    if (this.#flushing) return
    this.#flushing = true
    try {
      while (this.#state === 'connected' && !this.#port.writableNeedDrain && !this.#port.destroyed) {
        const frame = this.#nextFrame()
        if (frame === undefined) break
        this.#port.write(frame)
      }
    } finally {
      this.#flushing = false
    }
  }

  #nextFrame(): Buffer | undefined {
    while (this.#opening.length > 0 && this.#channels.size < MAX_CHANNELS) {
      const channel = this.#opening.shift()!
      if (channel.settled) continue
      this.#lastId += 1
      channel.id = this.#lastId
      this.#channels.set(channel.id, channel)
      channel.onOpen?.()
      return encodeFrame(channel.type, channel.id, channel.request)
    }
    for (const channel of this.#channels.values()) {
      const frame = frameOf(channel)
      if (frame === undefined) continue
      // The others come first next time.
      this.#channels.delete(channel.id)
      this.#channels.set(channel.id, channel)
      return frame
    }
    return undefined
  }
}

/** What a channel has to send. */
function frameOf(channel: Channel): Buffer | undefined {
  const { id, signals, input } = channel
  for (const signal of signals) {
    signals.delete(signal)
    return encodeFrame(FRAME.KILL, id, words(signal))
  }
  for (const [index, output] of [channel.stdout, channel.stderr].entries()) {
    const credit = output.takeCredit()
    if (credit > 0) return encodeFrame(FRAME.CREDIT, id, words(STDOUT + index, credit))
  }
  const bytes = input.take(channel.inputCredit)
  if (bytes === undefined) return undefined
  channel.inputCredit -= bytes.length
  return encodeFrame(FRAME.STDIN, id, bytes)
}

function isEnd(kind: number, value: number): boolean {
  if (kind === END.EXITED) return value <= MAX_STATUS
  return (
    value >= 1 &&
    ((kind === END.SIGNALED && value <= MAX_SIGNAL) || (kind === END.FAILED && value <= MAX_ERRNO))
  )
}

/** Reads a stream to its end. `tooLong` is called when there is more than is kept. */
function collect(
  stream: Readable,
  limit: number,
  tooLong?: () => void,
): { readonly collector: Collector; readonly ended: Promise<void> } {
  const collector = new Collector(limit)
  const ended = new Promise<void>((resolve) => {
    stream.on('close', resolve)
  })
  stream.on('data', (chunk: Buffer) => {
    const wasTruncated = collector.truncated
    collector.add(chunk)
    if (collector.truncated && !wasTruncated) tooLong?.()
  })
  return { collector, ended }
}

function readableOf(name: string, data: unknown): Readable {
  if (typeof data === 'string') return Readable.from([Buffer.from(data)])
  if (data instanceof Uint8Array) return Readable.from([data])
  if (data instanceof Readable) return data
  if (typeof data === 'object' && data !== null && Symbol.asyncIterator in data) {
    return Readable.from(data as AsyncIterable<unknown>)
  }
  throw invalidArgument(name, 'text, a Uint8Array or a readable stream', data)
}

function encodeCommand(command: string | readonly string[], { env = {}, cwd = '' }: SpawnOptions): Buffer {
  const list: readonly string[] = typeof command === 'string' ? ['/bin/sh', '-c', command] : command
  const isText = (part: unknown) => typeof part === 'string' && !part.includes('\0')
  if (!Array.isArray(list) || list.length === 0 || list[0] === '' || !list.every(isText)) {
    throw invalidArgument('command', 'text, or an array of a program and its arguments,', command)
  }
  if (!isText(cwd)) throw invalidArgument('cwd', 'the path of a folder', cwd)
  if (typeof env !== 'object' || env === null) throw invalidArgument('env', 'an object', env)
  const variables = Object.entries(env).map(([name, value]) => {
    if (name === '' || /[=\0]/.test(name)) throw invalidArgument('env', "names without '='", name)
    if (value === undefined) return name
    if (!isText(value)) throw invalidArgument(`env.${name}`, 'text', value)
    return `${name}=${value}`
  })
  const credits = [OUTPUT_WINDOW, OUTPUT_WINDOW]
  const strings = [cwd, ...list, ...variables]
  return encodeRequest('command', [...credits, list.length, variables.length], strings)
}

function encodeRequest(name: string, numbers: readonly number[], strings: readonly string[]): Buffer {
  const request = Buffer.concat([words(...numbers), ...strings.map((text) => Buffer.from(`${text}\0`))])
  if (request.length <= MAX_PAYLOAD) return request
  const expected = `at most ${MAX_PAYLOAD} bytes, with the variables of env,`
  throw invalidArgument(name, expected, `${request.length} bytes`)
}

function checkPath(path: unknown): string {
  if (typeof path === 'string' && path !== '' && !path.includes('\0')) return path
  throw invalidArgument('path', 'the path of a file in the guest', path)
}

function checkOptions(options: unknown, keys: readonly string[]): void {
  if (typeof options !== 'object' || options === null) throw invalidArgument('options', 'an object', options)
  for (const key of Object.keys(options)) {
    if (keys.includes(key)) continue
    throw new NodevisorError(
      'ERR_UNKNOWN_OPTION',
      `Expected only ${keys.join(', ')} in options but received '${key}'; did you mean '${closest(key, [...keys])}'?`,
      { argument: 'options', received: key },
    )
  }
  const { agentTimeout, signal } = options as AgentOptions
  checkTimeout('agentTimeout', agentTimeout)
  if (signal !== undefined && !(signal instanceof AbortSignal)) {
    throw invalidArgument('signal', 'an AbortSignal', signal)
  }
}

function checkTimeout(name: string, timeout: unknown): void {
  const isTime = typeof timeout === 'number' && timeout >= 0 && timeout <= MAX_TIMEOUT
  if (timeout === undefined || isTime) return
  throw invalidArgument(name, `a number of milliseconds from 0 to ${MAX_TIMEOUT}`, timeout)
}

function checkSize(name: string, size: unknown): void {
  if (Number.isInteger(size) && (size as number) >= 0 && (size as number) <= MAX_CREDIT) return
  throw invalidArgument(name, `a number of bytes from 0 to ${MAX_CREDIT}`, size)
}

function checkFileEnd(
  path: string,
  verb: string,
  { kind, value }: { readonly kind: number; readonly value: number },
): void {
  if (kind === END.EXITED && value === 0) return
  const { name, text } = describeErrno(value)
  throw new NodevisorError(
    'ERR_GUEST_FILE',
    `Expected the guest's file ${show(path)} to be ${verb} but it was not: ${text} (${name})`,
    { path, errno: value, errnoName: name },
  )
}

function failedCheck(command: string | readonly string[], result: GuestExit & ErrorFacts): NodevisorError {
  const { exitCode, signal, timedOut, stderr } = result
  const how =
    exitCode === null
      ? `was ended by ${signal}${timedOut ? ', its time being over' : ''}`
      : `exited with ${exitCode}`
  const message = `Expected ${describeCommand(command)} to exit with 0 but it ${how}; stderr: ${show(String(stderr).trim())}`
  return new NodevisorError('ERR_EXEC_FAILED', message, result)
}

function describeCommand(command: string | readonly string[]): string {
  return show(typeof command === 'string' ? command : command.join(' '))
}

function describeErrno(errno: number): { readonly name: string; readonly text: string } {
  // libuv's numbers are the negative ones of the host, which is Linux on x86, as the guest is.
  const [name, text] = getSystemErrorMap().get(-errno) ?? [`errno ${errno}`, 'an unknown error']
  return { name, text }
}

function nameOfSignal(number: number): string {
  const found = Object.entries(constants.signals).find(([, value]) => value === number)
  return found?.[0] ?? `signal ${number}`
}

function aborted(signal: AbortSignal): NodevisorError {
  return new NodevisorError('ERR_ABORTED', 'Expected an answer of the guest but the call was aborted', {
    cause: signal.reason,
  })
}
