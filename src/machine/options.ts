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
import type { BlockBackend } from '../virtio/block-backend.js'
import type { ConsoleSize } from '../virtio/console.js'
import type { VirtioEntropyOptions } from '../virtio/entropy.js'
import type { VirtioDevice } from '../virtio/virtio-device.js'

/** A file's path, or what is in it: bytes, or a readable stream of them (Node's or the web's), which is read once. */
export type ImageSource = string | URL | Uint8Array | AsyncIterable<Uint8Array>

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
  /** Linux's initramfs, see `docs/linux.md`: an image, or several, one after the other. */
  readonly initrd?: ImageSource | readonly ImageSource[]
  /** Whether a bzImage is unpacked on the host, which is much quicker than if it does so itself: yes unless given. */
  readonly unpack?: boolean
  /**
   * Whether the command line gets a `virtio_mmio.device=…` for each virtio device, which Linux finds them by where it has
   * no ACPI: yes unless given, but for images that start in real mode, which get no command line.
   */
  readonly virtioParameters?: boolean
}

/** A disk: an image file, memory or a backend of yours, perhaps with an overlay. See `docs/disks.md`. */
export interface DiskOptions {
  /** A raw image, or a block device of the host. */
  readonly file?: string | URL
  /** In place of a file: bytes of an empty disk (or text such as `'16M'`), or what is on it (a copy is made). */
  readonly memory?: number | string | Uint8Array
  /** In place of a file: a backend of your own. The machine closes it. */
  readonly backend?: BlockBackend
  /** The guest may not write. */
  readonly readOnly?: boolean
  /**
   * Where writes go, so that what is below stays as it is: a file that keeps them (made if there is none), or `true` for
   * nowhere: they last as long as the machine.
   */
  readonly overlay?: boolean | string | URL
  /** The serial number that the guest reads: up to 20 characters of ASCII. */
  readonly serial?: string
  /** Request queues, up to 16: 1 unless given. */
  readonly queues?: number
}

/** The virtio console. See `docs/virtio.md`. */
export interface ConsoleOptions {
  /** Names of further ports, beside the console itself. */
  readonly ports?: readonly string[]
  /** The size that the guest is told: 80×25 unless given. */
  readonly size?: ConsoleSize
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
  /** Disks (virtio-blk), in the order in which the guest sees them; a path or bytes are short for `{ file }`, `{ memory }`. */
  readonly disks?: readonly (string | URL | Uint8Array | DiskOptions)[]
  /** A console (virtio-console): {@link VirtualMachine.console}. None unless given. */
  readonly console?: boolean | ConsoleOptions
  /**
   * Whether there is a port for the agent in a Linux guest, which {@link VirtualMachine.exec} needs: no unless given. It
   * is one of the virtio console, which the machine then has. See `docs/linux.md`.
   */
  readonly agent?: boolean
  /** A source of random numbers (virtio-rng). None unless given. */
  readonly rng?: boolean | VirtioEntropyOptions
  /** Virtio devices of yours. See `docs/virtio.md`. */
  readonly virtio?: readonly VirtioDevice[]
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
  readonly disks: readonly DiskOptions[]
  readonly console: ConsoleOptions | undefined
  readonly agent: boolean
  readonly rng: VirtioEntropyOptions | undefined
  readonly virtio: readonly VirtioDevice[]
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
  'disks',
  'console',
  'agent',
  'rng',
  'virtio',
  'irqchip',
  'firmwareTables',
  'fwCfg',
  'hugePages',
] as const
const KERNEL_KEYS = [
  'image',
  'format',
  'mode',
  'at',
  'cmdline',
  'modules',
  'initrd',
  'unpack',
  'virtioParameters',
] as const
const MODULE_KEYS = ['image', 'cmdline'] as const
const DISK_KEYS = ['file', 'memory', 'backend', 'readOnly', 'overlay', 'serial', 'queues'] as const
const BACKEND_METHODS = ['read', 'write', 'flush', 'close'] as const
const BACKEND_EXTRAS = ['discard', 'writeZeroes'] as const
const CONSOLE_KEYS = ['ports', 'size'] as const
const SIZE_KEYS = ['columns', 'rows'] as const
const RNG_KEYS = ['source', 'bytesPerSecond'] as const
const DEFAULT_MEMORY = '64M'

/** Checks what a user passed; nothing has been touched when this throws. */
export function checkOptions(options: VirtualMachineOptions): CheckedOptions {
  checkObject('options', options, MACHINE_KEYS)
  const { kernel, memory = DEFAULT_MEMORY, cpus = 1, execution = 'auto', devices = [], hugePages } = options
  const { cpu, irqchip = 'auto', firmwareTables, fwCfg = {}, agent = false } = options
  if (!Number.isInteger(cpus) || cpus < 1) {
    throw invalidArgument('cpus', 'an integer of at least 1', cpus)
  }
  checkExecution(execution)
  checkChoice('irqchip', ['auto', 'full', 'split', 'none'], irqchip)
  checkBoolean('firmwareTables', firmwareTables)
  checkBoolean('agent', agent)
  if (hugePages !== undefined) checkChoice('hugePages', ['2M', '1G'], hugePages)
  if (!Array.isArray(devices)) throw invalidArgument('devices', 'an array of devices', devices)
  const { disks = [], console = false, rng = false, virtio = [] } = options
  if (!Array.isArray(disks)) throw invalidArgument('disks', 'an array of paths or { file, … }', disks)
  if (!Array.isArray(virtio)) throw invalidArgument('virtio', 'an array of virtio devices', virtio)
  return {
    kernel: checkKernel(kernel),
    memorySize: parseMemorySize(memory),
    cpus,
    cpu,
    execution,
    devices,
    disks: disks.map(checkDisk),
    // The agent's port is one of the console.
    console: checkConsole(agent && console === false ? true : console),
    agent,
    rng: checkRng(rng),
    virtio,
    hugePages,
    irqchip,
    firmwareTables,
    fwCfgFiles: checkFwCfgFiles(fwCfg),
  }
}

/** Checks where KVM_RUN is to run. */
export function checkExecution(execution: unknown): asserts execution is ExecutionMode {
  checkChoice('execution', ['auto', 'inline', 'threads'], execution)
}

function checkKernel(kernel: ImageSource | KernelOptions): KernelOptions {
  if (isSource(kernel)) {
    checkSource('kernel', kernel)
    return { image: kernel }
  }
  checkObject('kernel', kernel, KERNEL_KEYS, 'a path, a Uint8Array or { image, … }')
  checkSource('kernel.image', kernel.image)
  checkString('kernel.cmdline', kernel.cmdline)
  checkBoolean('kernel.virtioParameters', kernel.virtioParameters)
  checkBoolean('kernel.unpack', kernel.unpack)
  const { modules, initrd } = kernel
  if (modules !== undefined && !Array.isArray(modules)) {
    throw invalidArgument('kernel.modules', 'an array of paths, Uint8Arrays or { image, cmdline }', modules)
  }
  if (initrd !== undefined) for (const image of listOf(initrd)) checkSource('kernel.initrd', image)
  return kernel
}

/** Checks a disk, and gives its options, whichever way they were given. */
export function checkDisk(disk: string | URL | Uint8Array | DiskOptions, index: number): DiskOptions {
  const name = `disks[${index}]`
  if (disk instanceof Uint8Array) return { memory: disk }
  if (typeof disk === 'string' || disk instanceof URL) {
    checkPath(name, disk)
    return { file: disk }
  }
  checkObject(name, disk, DISK_KEYS, 'a path, a Uint8Array or { file, … }')
  const { file, memory, backend, overlay, readOnly } = disk
  const given = [file, memory, backend].filter((source) => source !== undefined)
  if (given.length !== 1) {
    throw invalidArgument(name, 'exactly one of file, memory and backend', `${given.length} of them`)
  }
  if (file !== undefined) checkPath(`${name}.file`, file)
  if (backend !== undefined) checkBackend(`${name}.backend`, backend)
  if (typeof overlay !== 'boolean' && overlay !== undefined) checkPath(`${name}.overlay`, overlay)
  checkBoolean(`${name}.readOnly`, readOnly)
  return disk
}

/** Its size is looked at by whoever gets it. */
function checkBackend(name: string, backend: unknown): void {
  const methods = (backend ?? {}) as Readonly<Record<string, unknown>>
  const isMissing = BACKEND_METHODS.some((method) => typeof methods[method] !== 'function')
  const isWrong = (method: string) => methods[method] !== undefined && typeof methods[method] !== 'function'
  if (!isMissing && !BACKEND_EXTRAS.some(isWrong)) return
  const expected = `an object with the methods ${BACKEND_METHODS.join(', ')}, and perhaps ${BACKEND_EXTRAS.join(', ')},`
  throw invalidArgument(name, expected, backend)
}

function checkPath(name: string, path: unknown): void {
  const isPath = (typeof path === 'string' && path !== '') || path instanceof URL
  if (!isPath) throw invalidArgument(name, 'a path or a file: URL', path)
  checkSource(name, path, 'a path or a file: URL')
}

function checkConsole(console: boolean | ConsoleOptions): ConsoleOptions | undefined {
  if (typeof console === 'boolean') return console ? {} : undefined
  checkObject('console', console, CONSOLE_KEYS, 'true, false or { ports, size }')
  const { ports = [], size } = console
  if (!Array.isArray(ports)) throw invalidArgument('console.ports', 'an array of names', ports)
  for (const [index, port] of ports.entries()) {
    if (typeof port !== 'string' || port === '' || ports.indexOf(port) !== index) {
      throw invalidArgument(`console.ports[${index}]`, 'a name that no other port has', port)
    }
  }
  if (size !== undefined) checkObject('console.size', size, SIZE_KEYS, '{ columns, rows }')
  return console
}

function checkRng(rng: boolean | VirtioEntropyOptions): VirtioEntropyOptions | undefined {
  if (typeof rng === 'boolean') return rng ? {} : undefined
  checkObject('rng', rng, RNG_KEYS, 'true, false or { source, bytesPerSecond }')
  return rng
}

/** A module's options, whichever way they were given. */
export function checkModule(module: ImageSource | ModuleOptions, index: number): Required<ModuleOptions> {
  const name = `kernel.modules[${index}]`
  const { image, cmdline } = isSource(module) ? { image: module, cmdline: undefined } : module
  if (!isSource(module)) checkObject(name, module, MODULE_KEYS, 'a path, a Uint8Array or { image, cmdline }')
  checkSource(`${name}.image`, image)
  checkString(`${name}.cmdline`, cmdline)
  return {
    image,
    cmdline: cmdline ?? (typeof image === 'string' || image instanceof URL ? describeSource(image) : ''),
  }
}

/** How a source is called in errors. */
export function describeSource(source: ImageSource): string {
  if (source instanceof Uint8Array) return `the image of ${source.length} bytes`
  if (source instanceof URL) return fileURLToPath(source)
  return typeof source === 'string' ? source : 'a stream'
}

/** The elements of an array, or the one that there is. */
export function listOf<Element>(given: Element | readonly Element[]): readonly Element[] {
  return Array.isArray(given) ? given : [given as Element]
}

const UNITS: Readonly<Record<string, number>> = { '': 1, K: 2 ** 10, M: 2 ** 20, G: 2 ** 30, T: 2 ** 40 }

/**
 * Bytes of RAM from a number or text such as `'64M'`.
 *
 * @throws `ERR_INVALID_ARGUMENT` for what is no size, `ERR_MEMORY_SIZE` for one that a machine cannot have
 */
export function parseMemorySize(memory: number | string): number {
  const size = parseSize(memory)
  if (!Number.isFinite(size)) {
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

/** Bytes from a number, or from text such as `'64M'`; NaN for what is none. */
export function parseSize(text: unknown): number {
  if (typeof text !== 'string') return typeof text === 'number' ? text : Number.NaN
  const match = /^(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?$/i.exec(text.trim())
  if (match === null) return Number.NaN
  return Number(match[1]) * UNITS[match[2]!.toUpperCase()]!
}

function isSource(value: unknown): value is ImageSource {
  return typeof value === 'string' || value instanceof URL || value instanceof Uint8Array || isStream(value)
}

function isStream(value: unknown): value is AsyncIterable<Uint8Array> {
  return typeof value === 'object' && value !== null && Symbol.asyncIterator in value
}

function checkSource(
  name: string,
  source: unknown,
  expected = 'a path, a Uint8Array, a readable stream or a file: URL',
): asserts source is ImageSource {
  if (!isSource(source)) throw invalidArgument(name, expected, source)
  if (!(source instanceof URL)) return
  try {
    fileURLToPath(source)
  } catch {
    throw invalidArgument(name, expected, source.href)
  }
}

/** Checks that a value, if given, is true or false. */
export function checkBoolean(name: string, value: unknown): void {
  if (value !== undefined && typeof value !== 'boolean') throw invalidArgument(name, 'true or false', value)
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
