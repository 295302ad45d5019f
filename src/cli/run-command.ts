import { createWriteStream, readFileSync, type WriteStream } from 'node:fs'
import { finished } from 'node:stream/promises'
import type {
  ConsolePort,
  CpuMode,
  CpuModelName,
  CpuOptions,
  DiskOptions,
  ExecutionMode,
  Irqchip,
  NamedImageFormat,
  SerialPort,
  VirtioDeviceInfo,
} from '../index.js'
import { NodevisorError, type RunResult, VirtualMachine } from '../index.js'
import type { CheckpointOption } from './arguments.js'
import { Checkpoints, takeFirst } from './checkpoints.js'
import { type Control, listenForControl } from './control.js'
import { EXIT_STATUS, statusOfError, statusOfOutcome } from './exit-status.js'
import { reportText } from './report-text.js'
import { say } from './say.js'
import { connectInput, followSize } from './terminal.js'

/** VIRTIO 1.2, 5.3. */
const VIRTIO_CONSOLE = 3

/** How a machine is run, as the command line says. */
export interface RunMachineOptions {
  readonly console?: boolean
  readonly timeout?: number
  readonly serial?: string
  readonly screen?: boolean
  readonly stats?: boolean
  readonly json?: boolean
  /** Path of a socket to be told by. */
  readonly control?: string
  /** Checkpoints to take while it runs. */
  readonly checkpoint?: CheckpointOption
}

/** The options of `nodevisor run`, as the command line gives them. */
export interface RunCommandOptions extends RunMachineOptions {
  readonly format?: string
  readonly mode?: string
  readonly at?: number
  readonly memory: string
  readonly cpus: number
  readonly cmdline?: string
  readonly module?: readonly string[]
  readonly initrd?: readonly string[]
  /** False with `--no-unpack`. */
  readonly unpack: boolean
  readonly execution: string
  readonly irqchip: string
  readonly cpu?: string
  readonly fwCfg?: readonly string[]
  readonly disk?: readonly string[]
  readonly rng?: boolean
}

/** `nodevisor run IMAGE`: boots it and says how it ended. @returns the exit status */
export async function runCommand(image: string, options: RunCommandOptions): Promise<number> {
  let vm: VirtualMachine | undefined
  try {
    vm = await createMachine(image, options)
    if (options.cpu !== undefined) warnOfCpu(vm)
    if (options.checkpoint !== undefined) await takeFirst(vm, options.checkpoint)
    return await runMachine(vm, options)
  } catch (error) {
    return sayWhy(error)
  } finally {
    await vm?.close()
  }
}

/** Says why it did not come to a run. @returns the exit status */
export function sayWhy(error: unknown): number {
  say(error instanceof Error ? error.message : String(error))
  return statusOfError(error instanceof NodevisorError ? error.code : undefined)
}

/** Whether a machine that was not created here has a virtio console. */
export function hasConsole(vm: VirtualMachine): boolean {
  return vm.virtioDevices.some(({ deviceType }) => deviceType === VIRTIO_CONSOLE)
}

function createMachine(image: string, options: RunCommandOptions): Promise<VirtualMachine> {
  const { format, mode, at, cmdline, module: modules, initrd, unpack } = options
  return VirtualMachine.create({
    kernel: {
      image,
      // What the command line allows more than the types is refused by create(), with the choices.
      ...(format === undefined ? {} : { format: format as NamedImageFormat }),
      ...(mode === undefined ? {} : { mode: mode as CpuMode }),
      ...(at === undefined ? {} : { at }),
      ...(cmdline === undefined ? {} : { cmdline }),
      ...(modules === undefined ? {} : { modules }),
      ...(initrd === undefined ? {} : { initrd }),
      ...(unpack ? {} : { unpack }),
    },
    memory: options.memory,
    cpus: options.cpus,
    execution: options.execution as ExecutionMode,
    irqchip: options.irqchip as Irqchip,
    ...(options.disk === undefined ? {} : { disks: options.disk.map(parseDisk) }),
    console: options.console === true,
    rng: options.rng === true,
    ...(options.cpu === undefined ? {} : { cpu: parseCpu(options.cpu) }),
    ...(options.fwCfg === undefined ? {} : { fwCfg: Object.fromEntries(options.fwCfg.map(readFwCfg)) }),
  })
}

/** `model,+feature,-feature`, as QEMU has it. What of it there is not is refused by create(). */
function parseCpu(text: string): CpuOptions {
  const [first = '', ...rest] = text.split(',')
  const isModel = !/^[+-]/.test(first)
  const changes = isModel ? rest : [first, ...rest]
  const features = Object.fromEntries(changes.map((change) => [change.slice(1), change.startsWith('+')]))
  const wrong = changes.find((change) => !/^[+-]./.test(change))
  if (wrong !== undefined) throw invalidOption('--cpu', 'features as +name or -name behind the model', wrong)
  return { ...(isModel ? { model: first as CpuModelName } : {}), features }
}

function warnOfCpu(vm: VirtualMachine): void {
  const { ignored } = vm.cpu
  if (ignored.length === 0) return
  say(`this host's KVM does not honour --cpu for: ${ignored.join(', ')}`)
}

/** `file[,ro][,overlay[=file]]`. A file's name may have commas that none of these words follows. */
function parseDisk(text: string): DiskOptions {
  const [, file, words] = /^(.+?)((?:,(?:ro|overlay(?:=[^,]+)?))*)$/.exec(text) ?? []
  if (file === undefined) throw invalidOption('--disk', 'file[,ro][,overlay[=file]]', text)
  const given = words!.split(',').slice(1)
  const overlay = given.find((word) => word.startsWith('overlay'))
  return {
    file,
    readOnly: given.includes('ro'),
    ...(overlay === undefined ? {} : { overlay: overlay.slice('overlay='.length) || true }),
  }
}

/** `name=file`. */
function readFwCfg(text: string): [name: string, content: Uint8Array] {
  const [, name, file] = /^([^=]+)=(.+)$/.exec(text) ?? []
  if (name === undefined || file === undefined) throw invalidOption('--fw-cfg', 'name=file', text)
  try {
    return [name, readFileSync(file)]
  } catch (error) {
    throw invalidOption('--fw-cfg', 'a file that can be read', `${file} (${(error as Error).message})`)
  }
}

function invalidOption(option: string, expected: string, received: string): NodevisorError {
  return new NodevisorError(
    'ERR_INVALID_ARGUMENT',
    `Expected ${expected} for ${option} but received ${received}`,
  )
}

/** Runs a machine with the terminal at its serial port or console, and says how it ended. @returns the exit status */
export async function runMachine(vm: VirtualMachine, options: RunMachineOptions): Promise<number> {
  const hasConsole = options.console === true
  // With --json the output is in the object, unless standard output is asked for by name.
  const { serial = options.json ? 'json' : hasConsole ? 'none' : 'stdio' } = options
  const outputs = [await openOutput(vm.serial, serial)]
  if (hasConsole && !options.json) outputs.push(toStdout(vm.console))
  const control: Control | undefined =
    options.control === undefined ? undefined : await listenForControl(options.control, vm)
  const left = new AbortController()
  const leave = () => left.abort()
  const input = hasConsole ? vm.console : serial === 'stdio' || serial === 'json' ? vm.serial : undefined
  const terminal = input === undefined ? undefined : connectInput(input, leave)
  const size = hasConsole ? followSize(vm.console) : undefined
  const signals = ['SIGINT', 'SIGTERM', 'SIGHUP'] as const
  for (const signal of signals) process.on(signal, leave)
  for (const output of outputs) output?.stream.on('error', leave)
  const checkpoints = options.checkpoint === undefined ? undefined : new Checkpoints(vm, options.checkpoint)
  let result: RunResult
  try {
    result = await vm.run({
      signal: left.signal,
      ...(options.timeout === undefined ? {} : { timeout: options.timeout }),
    })
  } finally {
    terminal?.close()
    size?.close()
    for (const signal of signals) process.off(signal, leave)
    await checkpoints?.stop()
    await control?.close()
  }
  // What is read of a machine is read before it is closed.
  const report = reportOf(vm, result, hasConsole)
  const screen =
    options.screen === true ? (process.stdout.isTTY ? vm.screen.ansi() : vm.screen.text()) : undefined
  const devices = vm.virtioDevices
  await vm.close()
  for (const output of outputs) await output?.done()
  if (screen !== undefined && !options.json) await print(process.stdout, `${screen}\n`)
  if (options.stats) await print(process.stderr, statistics(report))
  if (options.json) await print(process.stdout, `${JSON.stringify(report)}\n`)
  else explain(result, devices)
  return statusOfOutcome(result)
}

interface Output {
  readonly stream: WriteStream | NodeJS.WriteStream
  /** All that the guest sent has been written. */
  done(): Promise<void>
}

function toStdout(port: SerialPort | ConsolePort): Output {
  port.pipe(process.stdout, { end: false })
  // Nothing more can be written once the reader has gone: then the port does not come to its end.
  const gone = new Promise<void>((resolve) => process.stdout.once('error', () => resolve()))
  const ended = finished(port, { writable: false }).catch(ignore)
  return { stream: process.stdout, done: () => Promise.race([ended, gone]) }
}

async function openOutput(port: SerialPort, serial: string): Promise<Output | undefined> {
  if (serial === 'none' || serial === 'json') return undefined
  if (serial === 'stdio') return toStdout(port)
  const file = createWriteStream(serial)
  await new Promise<void>((resolve, reject) => {
    file.once('open', () => resolve())
    file.once('error', (cause) =>
      reject(
        new NodevisorError(
          'ERR_INVALID_ARGUMENT',
          `Expected a writable file for --serial but: ${cause.message}`,
          {
            cause,
          },
        ),
      ),
    )
  })
  port.pipe(file)
  return { stream: file, done: () => finished(file).then(ignore, ignore) }
}

function print(stream: NodeJS.WriteStream, text: string): Promise<void> {
  return new Promise((resolve) => stream.write(text, () => resolve()))
}

function ignore(): void {}

/** What `--json` prints. */
interface Report {
  readonly reason: RunResult['reason']
  /** The value of debug-exit; null for other reasons. */
  readonly code: number | null
  readonly by?: string
  readonly error?: { readonly code: string; readonly message: string }
  readonly registers?: unknown
  readonly vcpu?: number
  /** {@link RunReport}, with all numbers of 64 bits as hexadecimal text. */
  readonly report?: unknown
  readonly format: string
  readonly mode: string
  /** The last MiB of what the guest sent. */
  readonly serial: string
  readonly screen: string
  readonly debugConsole: string
  /** The last MiB of what the guest wrote to its virtio console; null without one. */
  readonly console: string | null
  readonly virtioDevices: unknown
  readonly postCodes: readonly number[]
  readonly exits: RunResult['exits']
  readonly unclaimed: { readonly ports: unknown; readonly mmio: unknown }
  readonly durationMs: number
  readonly firstOutputMs: number | null
}

function reportOf(vm: VirtualMachine, result: RunResult, hasConsole: boolean): Report {
  const { unclaimedPorts, unclaimedMmio } = vm.statistics
  return {
    reason: result.reason,
    code: result.reason === 'debug-exit' ? result.code : null,
    ...('by' in result ? { by: result.by } : {}),
    ...('vcpu' in result && result.vcpu !== undefined ? { vcpu: result.vcpu } : {}),
    ...(result.reason === 'failed'
      ? { error: { code: result.error.code, message: result.error.message } }
      : {}),
    ...(result.reason === 'shutdown' ? { registers: printable(result.registers) } : {}),
    ...(result.report === undefined ? {} : { report: printable(result.report) }),
    format: vm.boot.format,
    mode: vm.boot.mode,
    serial: vm.serial.output,
    screen: vm.screen.text(),
    debugConsole: vm.debugConsole.output,
    console: hasConsole ? vm.console.output : null,
    virtioDevices: printable(vm.virtioDevices),
    postCodes: vm.postCodes,
    exits: result.exits,
    unclaimed: { ports: unclaimedPorts, mmio: unclaimedMmio },
    durationMs: result.durationMs,
    firstOutputMs: result.firstOutputMs ?? null,
  }
}

/** The same with text for what JSON has no type for. */
function printable(value: unknown): unknown {
  if (typeof value === 'bigint') return `0x${value.toString(16)}`
  if (value instanceof Uint8Array) return Buffer.from(value).toString('hex')
  if (Array.isArray(value)) return value.map(printable)
  if (typeof value !== 'object' || value === null) return value
  if (value instanceof Error) return value.message
  return Object.fromEntries(Object.entries(value).map(([key, part]) => [key, printable(part)]))
}

function statistics(report: Report): string {
  const exits = Object.entries(report.exits)
    .filter(([, count]) => count > 0)
    .map(([kind, count]) => `${count} ${kind}`)
  const first = report.firstOutputMs === null ? 'none' : `after ${report.firstOutputMs.toFixed(1)} ms`
  const lines = [
    ['ended by', report.code === null ? report.reason : `${report.reason}, value ${report.code}`],
    ['image', `${report.format}, ${report.mode} mode`],
    ['duration', `${report.durationMs.toFixed(1)} ms`],
    ['first output', first],
    ['exits', exits.join(', ') || 'none'],
    ['unclaimed ports', unclaimed(report.unclaimed.ports)],
    ['unclaimed memory', unclaimed(report.unclaimed.mmio)],
  ]
  return lines.map(([name, value]) => `${`${name}:`.padEnd(18)}${value}\n`).join('')
}

function unclaimed(accesses: unknown): string {
  const { reads, writes, addresses } = accesses as {
    reads: number
    writes: number
    addresses: readonly { address: number }[]
  }
  if (reads + writes === 0) return 'none'
  const shown = addresses.slice(0, 8).map(({ address }) => `0x${address.toString(16)}`)
  return `${reads} reads, ${writes} writes (${shown.join(', ')}${addresses.length > shown.length ? ', …' : ''})`
}

/** Says how it ended, where the exit status alone would leave one wondering. */
function explain(result: RunResult, devices: readonly VirtioDeviceInfo[]): void {
  for (const { name, problem, errors = 0, lastError } of devices) {
    if (problem !== undefined) say(`${name} needs a reset, as its driver broke a rule: ${problem}`)
    if (errors > 0) say(`${name}: ${errors} requests failed, the last one with: ${lastError}`)
  }
  if (result.reason === 'migrated') say('the machine was moved, and goes on there')
  if (result.reason === 'failed') say(result.error.message)
  if (result.reason === 'shutdown') {
    say(
      `vCPU ${result.vcpu} shut down: a triple fault (an exception that no handler took), ` +
        `rip 0x${result.registers.rip.toString(16)}`,
    )
  }
  if (result.reason === 'stopped' && result.by === 'timeout') {
    say(`timed out after ${(result.durationMs / 1000).toFixed(1)} s`)
  }
  if (result.report !== undefined) process.stderr.write(reportText(result.report))
  if (statusOfOutcome(result) === EXIT_STATUS.interrupted) say('left')
}
