import { totalmem } from 'node:os'
import { fileURLToPath } from 'node:url'
import { closest } from 'fastest-levenshtein'
import type { CpuMode } from '../boot/boot-image.js'
import type { NamedImageFormat } from '../boot/index.js'
import type { Device } from '../bus/device.js'
import type { CpuOptions } from '../cpu/cpu-model.js'
import type { CpuModelName } from '../cpu/models.js'
import { checkFwCfgFiles } from '../devices/fw-cfg.js'
import { invalidArgument, NodevisorError, show } from '../errors.js'
import { PAGE_SIZE } from '../memory/layout.js'

/** A file's path, or what is in it. */
export type ImageSource = string | URL | Uint8Array

/** A module: a file that the guest gets beside the kernel. */
export interface ModuleOptions {
  readonly image: ImageSource
  /** The text beside it; the path as given when there is none. */
  readonly cmdline?: string
}

/** What to boot, and how. */
export interface KernelOptions {
  /** The kernel image. */
  readonly image: ImageSource
  /** Its format; detected when not given. */
  readonly format?: NamedImageFormat
  /** Mode a flat image starts in: `real` unless given. */
  readonly mode?: CpuMode
  /** Guest-physical address of a flat image: 0x7c00 in real mode, otherwise 0x100000, unless given. */
  readonly at?: number
  /** The kernel's command line. */
  readonly cmdline?: string
  readonly modules?: readonly (ImageSource | ModuleOptions)[]
}

/** Where KVM_RUN runs. See `docs/execution.md`. */
export type ExecutionMode = 'auto' | 'inline' | 'threads'

/** What {@link VirtualMachine.create} takes. */
export interface VirtualMachineOptions {
  /** What to boot: an image, or an image and how. */
  readonly kernel: ImageSource | KernelOptions
  /** RAM: bytes, or text such as `'64M'` (powers of 1024); a multiple of 4 KiB. 64 MiB unless given. */
  readonly memory?: number | string
  /** Virtual processors: 1 unless given. */
  readonly cpus?: number
  /** The processor that the guest sees: a model, or a model and what differs. `host` unless given; see `docs/cpu.md`. */
  readonly cpu?: CpuModelName | CpuOptions
  /**
   * `inline` runs the guest on the JavaScript thread, for the fastest exits; `threads` gives each vCPU a thread;
   * `auto` (unless given) runs the first machine with one vCPU inline and all others in threads.
   */
  readonly execution?: ExecutionMode
  /** Devices of yours, beside the machine's own. */
  readonly devices?: readonly Device[]
  /**
   * Where the interrupt controllers are. `full`: all in KVM. `split`: the local APICs in KVM, and PIC, IOAPIC and PIT
   * are devices here, which is quicker to create. `none`: there are none, `hlt` ends the run, and
   * {@link VirtualCpu.interrupt} interrupts. `auto` (unless given): `none` for flat and plain ELF images with one vCPU,
   * else `full`.
   */
  readonly irqchip?: 'auto' | 'full' | 'split' | 'none'
  /**
   * Whether the guest finds ACPI and MP tables from 0xe0000 to 1 MiB: yes unless given, in a machine that has interrupt
   * controllers and at least 1 MiB of RAM.
   */
  readonly firmwareTables?: boolean
  /** Files that the guest reads through fw_cfg (`opt/…` by custom), by name: text, or bytes. */
  readonly fwCfg?: Readonly<Record<string, string | Uint8Array>>
  /** Back RAM with huge pages of this size, which the administrator reserved. */
  readonly hugePages?: '2M' | '1G'
}

/** Options after the checks, with nothing left out. */
export interface CheckedOptions {
  readonly kernel: KernelOptions
  readonly memorySize: number
  readonly cpus: number
  readonly cpu: CpuModelName | CpuOptions | undefined
  readonly execution: ExecutionMode
  readonly devices: readonly Device[]
  readonly hugePages: '2M' | '1G' | undefined
  readonly irqchip: 'auto' | 'full' | 'split' | 'none'
  readonly firmwareTables: boolean | undefined
  readonly fwCfgFiles: ReadonlyMap<string, Uint8Array>
}

const MACHINE_KEYS = [
  'kernel',
  'memory',
  'cpus',
  'cpu',
  'execution',
  'devices',
  'irqchip',
  'firmwareTables',
  'fwCfg',
  'hugePages',
] as const
const KERNEL_KEYS = ['image', 'format', 'mode', 'at', 'cmdline', 'modules'] as const
const MODULE_KEYS = ['image', 'cmdline'] as const
const DEFAULT_MEMORY = '64M'

/** Checks what a user passed; nothing has been touched when this throws. */
export function checkOptions(options: VirtualMachineOptions): CheckedOptions {
  checkObject('options', options, MACHINE_KEYS)
  const { kernel, memory = DEFAULT_MEMORY, cpus = 1, execution = 'auto', devices = [], hugePages } = options
  const { cpu, irqchip = 'auto', firmwareTables, fwCfg = {} } = options
  if (!Number.isInteger(cpus) || cpus < 1) {
    throw invalidArgument('cpus', 'an integer of at least 1', cpus)
  }
  checkChoice('execution', ['auto', 'inline', 'threads'], execution)
  checkChoice('irqchip', ['auto', 'full', 'split', 'none'], irqchip)
  if (firmwareTables !== undefined && typeof firmwareTables !== 'boolean') {
    throw invalidArgument('firmwareTables', 'true or false', firmwareTables)
  }
  if (hugePages !== undefined) checkChoice('hugePages', ['2M', '1G'], hugePages)
  if (!Array.isArray(devices)) throw invalidArgument('devices', 'an array of devices', devices)
  return {
    kernel: checkKernel(kernel),
    memorySize: parseMemorySize(memory),
    cpus,
    cpu,
    execution,
    devices,
    hugePages,
    irqchip,
    firmwareTables,
    fwCfgFiles: checkFwCfgFiles(fwCfg),
  }
}

function checkKernel(kernel: ImageSource | KernelOptions): KernelOptions {
  if (isSource(kernel)) {
    checkSource('kernel', kernel)
    return { image: kernel }
  }
  checkObject('kernel', kernel, KERNEL_KEYS, 'a path, a Uint8Array or { image, … }')
  checkSource('kernel.image', kernel.image)
  checkString('kernel.cmdline', kernel.cmdline)
  const { modules } = kernel
  if (modules !== undefined && !Array.isArray(modules)) {
    throw invalidArgument('kernel.modules', 'an array of paths, Uint8Arrays or { image, cmdline }', modules)
  }
  return kernel
}

/** A module's options, whichever way they were given. */
export function checkModule(module: ImageSource | ModuleOptions, index: number): Required<ModuleOptions> {
  const name = `kernel.modules[${index}]`
  const { image, cmdline } = isSource(module) ? { image: module, cmdline: undefined } : module
  if (!isSource(module)) checkObject(name, module, MODULE_KEYS, 'a path, a Uint8Array or { image, cmdline }')
  checkSource(`${name}.image`, image)
  checkString(`${name}.cmdline`, cmdline)
  return { image, cmdline: cmdline ?? (image instanceof Uint8Array ? '' : describeSource(image)) }
}

/** How a source is called in errors. */
export function describeSource(source: ImageSource): string {
  if (source instanceof Uint8Array) return `the image of ${source.length} bytes`
  return typeof source === 'string' ? source : fileURLToPath(source)
}

const UNITS: Readonly<Record<string, number>> = { '': 1, K: 2 ** 10, M: 2 ** 20, G: 2 ** 30, T: 2 ** 40 }

/**
 * Bytes of RAM from a number or text such as `'64M'`.
 *
 * @throws `ERR_INVALID_ARGUMENT` for what is no size, `ERR_MEMORY_SIZE` for one that a machine cannot have
 */
export function parseMemorySize(memory: number | string): number {
  const size = typeof memory === 'string' ? parseSize(memory) : memory
  if (typeof size !== 'number' || !Number.isFinite(size)) {
    throw invalidArgument('memory', "a number of bytes or text such as '64M' or '1G'", memory)
  }
  const host = totalmem()
  if (!Number.isSafeInteger(size) || size < PAGE_SIZE || size % PAGE_SIZE !== 0 || size > host) {
    throw new NodevisorError(
      'ERR_MEMORY_SIZE',
      `Expected a multiple of 4 KiB, from 4 KiB up to this host's ${Math.floor(host / 2 ** 20)} MiB, for memory ` +
        `but received ${show(memory)}`,
      { argument: 'memory', received: memory, hostMemory: host },
    )
  }
  return size
}

function parseSize(text: string): number {
  const match = /^(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?$/i.exec(text.trim())
  if (match === null) return Number.NaN
  return Number(match[1]) * UNITS[match[2]!.toUpperCase()]!
}

function isSource(value: unknown): value is ImageSource {
  return typeof value === 'string' || value instanceof URL || value instanceof Uint8Array
}

function checkSource(name: string, source: unknown): asserts source is ImageSource {
  const expected = 'a path, a file: URL or a Uint8Array'
  if (!isSource(source)) throw invalidArgument(name, expected, source)
  if (!(source instanceof URL)) return
  try {
    fileURLToPath(source)
  } catch {
    throw invalidArgument(name, expected, source.href)
  }
}

function checkString(name: string, value: unknown): void {
  if (value !== undefined && typeof value !== 'string') throw invalidArgument(name, 'a string', value)
}

/** Checks that a value is an object with no key but those, and names the nearest for one that is misspelt. */
export function checkObject(
  name: string,
  value: unknown,
  keys: readonly string[],
  expected = 'an object',
): asserts value is object {
  const isBytes = ArrayBuffer.isView(value) || value instanceof ArrayBuffer
  if (typeof value !== 'object' || value === null || Array.isArray(value) || isBytes) {
    throw invalidArgument(name, expected, value)
  }
  for (const key of Object.keys(value)) {
    if (keys.includes(key)) continue
    throw new NodevisorError(
      'ERR_UNKNOWN_OPTION',
      `Expected only ${keys.join(', ')} in ${name} but received '${key}'; did you mean '${closest(key, [...keys])}'?`,
      { argument: name, received: key },
    )
  }
}

function checkChoice(name: string, choices: readonly string[], received: unknown): void {
  if (choices.includes(received as string)) return
  const nearest = typeof received === 'string' ? `; did you mean '${closest(received, [...choices])}'?` : ''
  throw new NodevisorError(
    'ERR_INVALID_ARGUMENT',
    `Expected one of ${choices.map((choice) => `'${choice}'`).join(', ')} for ${name} but received ` +
      `${show(received)}${nearest}`,
    { argument: name, received },
  )
}
