import { createHash } from 'node:crypto'
import type { CpuMode, ImageFormat } from '../boot/boot-image.js'
import type { DeviceState } from '../bus/device.js'
import type { CpuOptions } from '../cpu/cpu-model.js'
import { findFeature } from '../cpu/features.js'
import { CPU_MODELS } from '../cpu/models.js'
import { checkFwCfgFiles } from '../devices/fw-cfg.js'
import { hex, invalidArgument, NodevisorError } from '../errors.js'
import type { CpuidEntry } from '../kvm/cpuid.js'
import type { HostKind } from '../kvm/host.js'
import {
  MAX_MP_STATE,
  MSR_ENTRY_SIZE,
  VCPU_OPTIONAL_STRUCT_SIZES,
  VCPU_STRUCT_SIZES,
} from '../kvm/vcpu-snapshot.js'
import type { BootInfo, Hardware } from '../machine/hardware.js'
import type { CpuChoice } from '../machine/host.js'
import type { Irqchip } from '../machine/interrupts.js'
import type { MachineState, NamedState } from '../machine/machine-state.js'
import type { ConsoleOptions, ExecutionMode } from '../machine/options.js'
import type { VirtualCpuState } from '../machine/virtual-cpu.js'
import type { PageRuns } from '../memory/guest-ram.js'
import { PAGE_SIZE, type RamRegion, ramRegions } from '../memory/layout.js'
import { NO_PAGES } from '../memory/page-runs.js'
import type { ConsoleSize } from '../virtio/console.js'
import {
  anyText,
  boolean,
  bytes,
  bytesUpTo,
  type Decoder,
  integer,
  list,
  object,
  objectOf,
  oneOf,
  optional,
  text,
} from './decoders.js'
import { fromJson, toJson } from './plain-data.js'

/** The machine that a snapshot was taken on. */
export interface SnapshotHost {
  readonly kind: HostKind
  /** The processor's own name. */
  readonly processor: string
  /** Features of the processor that a host needs to restore it, by the names of {@link CpuFeature}. */
  readonly features: readonly string[]
}

/** Where a disk's bytes are; the rest is the business of whoever opens the disk. */
export type DiskRecord = { readonly kind: string } & { readonly [key: string]: DeviceState }

/** The snapshot of which one has only the changes. */
export interface SnapshotParent {
  /** Of its folder, seen from the folder of the one that has the changes. */
  readonly path: string
  readonly id: string
}

/** What the file `state` of a snapshot says. */
export interface SnapshotRecord {
  /** A random UUID. */
  readonly id: string
  /** When it was taken: ISO 8601, UTC. */
  readonly created: string
  /** The version of nodevisor that wrote it. */
  readonly nodevisor: string
  readonly host: SnapshotHost
  readonly hardware: Hardware
  readonly execution: ExecutionMode
  readonly state: MachineState
  /** One for each of the hardware's disks. */
  readonly disks: readonly DiskRecord[]
  readonly memory: {
    /** Bytes of RAM, and of the file `memory`. */
    readonly size: number
    /** The pages that are in the file; the others are the parent's. */
    readonly pages: 'all' | PageRuns
  }
  /** There is one where the file does not have all pages. */
  readonly parent?: SnapshotParent
}

/** Bytes of the longest state file: what is read from a file of somebody's must not take all of the heap. */
export const MAX_STATE_SIZE = 2 ** 25

const VERSION = 1
const VERSION_LINE = /^nodevisor snapshot ([1-9][0-9]{0,8}) /
const HEADER = /^nodevisor snapshot 1 sha256:([0-9a-f]{64}) ([1-9][0-9]{0,9})$/
const MAX_HEADER_SIZE = 128

// Above what any KVM has: KVM_MAX_VCPUS, KVM_MAX_CPUID_ENTRIES, MSRs, the area of XSAVE.
const MAX_CPUS = 4096
const MAX_CPUID_ENTRIES = 256
const MAX_MSRS = 8192
const MAX_FEATURES = 8192
const MIN_XSAVE_SIZE = 4096
const MAX_XSAVE_SIZE = 2 ** 16
const MAX_APIC_ID = 0xffff_fffe
/** Pages are counted in 32 bits, with some to spare. */
const MAX_MEMORY_SIZE = 2 ** 43
const MAX_PAGES = MAX_MEMORY_SIZE / PAGE_SIZE
const GENERATION_ID_SIZE = 16
/** The last moment that a Date can stand for, in ms since 1970. */
const MAX_TIME = 8.64e15
/** Elements of a list that has no bound of its own. */
const MANY = 2 ** 20
/** Ports of a virtio console, beside the console itself. */
const MAX_PORTS = 30
/** Queues of a disk. */
const MAX_QUEUES = 16

/**
 * The bytes of a state file. `docs/snapshots.md` describes them.
 *
 * @throws `ERR_SNAPSHOT_WRITE` for a device's state, or a disk's record, that is no plain data, and for more than
 *   {@link MAX_STATE_SIZE} bytes
 */
export function encodeState(record: SnapshotRecord): Uint8Array {
  const body = encodeBody(record)
  const header = Buffer.from(`nodevisor snapshot ${VERSION} sha256:${checksumOf(body)} ${body.length}\n`)
  const size = header.length + body.length
  if (size > MAX_STATE_SIZE) throw tooLarge()
  return Buffer.concat([header, body])
}

function encodeBody(record: SnapshotRecord): Buffer {
  const { hardware, state, memory } = record
  const { pages } = memory
  try {
    const json = toJson(
      {
        ...record,
        hardware: {
          ...hardware,
          fwCfgFiles: Array.from(hardware.fwCfgFiles, ([name, content]) => ({ name, bytes: content })),
        },
        state: { ...state, clock: hex(state.clock) },
        memory: { ...memory, pages: pages === 'all' ? pages : [...pairsOf(pages)] },
      },
      'snapshot',
    )
    return Buffer.from(`${JSON.stringify(json, null, 1)}\n`)
  } catch (cause) {
    // A string, or its base64, that is longer than Node.js can have.
    if (!(cause instanceof NodevisorError)) throw tooLarge(cause)
    throw new NodevisorError(
      'ERR_SNAPSHOT_WRITE',
      `${cause.message}; correct the saveState() of the device that it is of`,
      { cause },
    )
  }
}

function tooLarge(cause?: unknown): NodevisorError {
  return new NodevisorError(
    'ERR_SNAPSHOT_WRITE',
    `Expected at most ${MAX_STATE_SIZE / 2 ** 20} MiB of state but there is more; give the guest large files on a disk, ` +
      'not through fwCfg, and if it has changes only, take a full snapshot',
    { cause },
  )
}

/**
 * Reads a state file; nothing in it is taken on trust.
 *
 * @param name - what errors call it
 * @throws `ERR_SNAPSHOT_DAMAGED`, `ERR_SNAPSHOT_VERSION`
 */
export function decodeState(file: Uint8Array, name = 'state'): SnapshotRecord {
  const body = checkHeader(file, name)
  let parsed: unknown
  try {
    parsed = JSON.parse(new TextDecoder('utf-8', { fatal: true, ignoreBOM: true }).decode(body))
  } catch (cause) {
    throw damaged(name, `expected JSON after its first line (${(cause as Error).message})`, { cause })
  }
  try {
    return checkTogether(decodeRecord(fromJson(parsed, 'snapshot'), 'snapshot'))
  } catch (cause) {
    if (!(cause instanceof NodevisorError)) throw cause
    throw damaged(name, cause.message, { cause })
  }
}

/** What is told of a snapshot that is not whole. */
export function damaged(
  name: string,
  what: string,
  facts: { readonly cause?: unknown } = {},
): NodevisorError {
  return new NodevisorError(
    'ERR_SNAPSHOT_DAMAGED',
    `'${name}' is damaged: ${what}; restore it from a copy, or take another snapshot`,
    { path: name, ...facts },
  )
}

/** @returns what is behind the first line */
function checkHeader(file: Uint8Array, name: string): Uint8Array {
  const all = Buffer.from(file.buffer, file.byteOffset, file.length)
  const end = all.subarray(0, MAX_HEADER_SIZE).indexOf('\n')
  const header = all.subarray(0, Math.max(0, end)).toString('latin1')
  const version = VERSION_LINE.exec(header)?.[1]
  if (version === undefined) throw damaged(name, 'expected it to begin as a snapshot of nodevisor does')
  if (version !== `${VERSION}`) {
    throw new NodevisorError(
      'ERR_SNAPSHOT_VERSION',
      `Expected a snapshot of version ${VERSION} but '${name}' is of version ${version}: restore it with the nodevisor ` +
        'that took it',
      { path: name, expected: VERSION, received: Number(version) },
    )
  }
  const fields = HEADER.exec(header)
  if (fields === null) throw damaged(name, 'expected a checksum and a length in its first line')
  const body = all.subarray(end + 1)
  if (body.length !== Number(fields[2])) {
    throw damaged(name, `expected ${fields[2]} bytes after its first line but received ${body.length}`)
  }
  if (checksumOf(body) !== fields[1]) throw damaged(name, 'its checksum is wrong')
  return body
}

function checksumOf(body: Uint8Array): string {
  return createHash('sha256').update(body).digest('hex')
}

function* pairsOf(pages: PageRuns): Generator<readonly [first: number, count: number]> {
  for (let i = 0; i < pages.length; i += 2) yield [pages[i]!, pages[i + 1]!]
}

const uint32 = integer(0, 0xffff_ffff)
const someText = text(/^./s, 'text that is not empty')
const uuid = text(/^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$/, 'a UUID in lower case')

const isoTime: Decoder<string> = (value, at) => {
  const time = typeof value === 'string' ? new Date(value) : undefined
  if (time !== undefined && !Number.isNaN(time.getTime()) && time.toISOString() === value) return value
  throw invalidArgument(at, "a time as '2000-01-01T00:00:00.000Z'", value)
}

const uint64: Decoder<bigint> = (value, at) => {
  if (typeof value === 'string' && /^0x(0|[1-9a-f][0-9a-f]{0,15})$/.test(value)) return BigInt(value)
  throw invalidArgument(at, 'hexadecimal text of up to 64 bits', value)
}

/** Whatever a device has saved: the device itself looks at it. */
const anyState: Decoder<DeviceState> = (value, at) => {
  if (value !== undefined) return value
  throw invalidArgument(at, 'a state', value)
}

const decodeHost = object<SnapshotHost>({
  kind: oneOf('hardware', 'pvm', 'emulated'),
  processor: anyText,
  features: list(someText, MAX_FEATURES),
})

const decodeBoot = object<BootInfo>({
  format: oneOf<ImageFormat>('flat', 'elf', 'multiboot', 'multiboot2', 'pvh', 'bzimage', 'linux'),
  mode: oneOf<CpuMode>('real', 'protected', 'long'),
  entry: integer(0, Number.MAX_SAFE_INTEGER),
})

/** No longer than any is: that of an unknown one is compared with all others. */
const featureName = text(/^[\w.-]{1,64}$/, 'names of CPU features')

const decodeFeatures: Decoder<NonNullable<CpuOptions['features']>> = (value, at) => {
  for (const [feature, isWanted] of Object.entries(objectOf(value, at))) {
    findFeature(featureName(feature, at))
    boolean(isWanted, `${at}.${feature}`)
  }
  return value as NonNullable<CpuOptions['features']>
}

const count = integer(1, MAX_CPUS)
const model = oneOf(...CPU_MODELS)
const decodeCpuOptions = object<CpuOptions>({
  model: optional(model),
  features: optional(decodeFeatures),
  sockets: optional(count),
  cores: optional(count),
  threads: optional(count),
})

const decodeCpu: Decoder<CpuChoice> = (value, at) =>
  typeof value === 'object' ? decodeCpuOptions(value, at) : optional(model)(value, at)

const decodeCpuid = list(
  list(
    object<CpuidEntry>({
      function: uint32,
      index: uint32,
      flags: uint32,
      eax: uint32,
      ebx: uint32,
      ecx: uint32,
      edx: uint32,
    }),
    MAX_CPUID_ENTRIES,
  ),
  MAX_CPUS,
)

const decodeFwCfgFiles: Decoder<ReadonlyMap<string, Uint8Array>> = (value, at) => {
  const files = list(
    object<{ name: string; bytes: Uint8Array }>({
      name: text(/^[ -~]{1,64}$/, 'the name of a file'),
      bytes: bytesUpTo(0, MAX_STATE_SIZE),
    }),
    MANY,
  )(value, at)
  const byName = new Map(files.map(({ name, bytes }) => [name, bytes]))
  if (byName.size !== files.length) throw invalidArgument(at, 'files of different names', value)
  return checkFwCfgFiles(Object.fromEntries(byName))
}

const decodePorts: Decoder<string[]> = (value, at) => {
  const ports = list(text(/^[^/\0]{1,255}$/, 'the name of a port'), MAX_PORTS)(value, at)
  if (new Set(ports).size !== ports.length) throw invalidArgument(at, 'ports of different names', value)
  return ports
}

const characters = integer(1, 0xffff)
const decodeConsole = object<ConsoleOptions>({
  ports: optional(decodePorts),
  size: optional(object<ConsoleSize>({ columns: characters, rows: characters })),
})

const decodeDisks = list(
  object<Hardware['disks'][number]>({
    serial: optional(text(/^[ -~]{0,20}$/, 'up to 20 characters of ASCII')),
    queues: optional(integer(1, MAX_QUEUES)),
  }),
  MANY,
)

const bytesPerSecond: Decoder<number> = (value, at) => {
  if (typeof value === 'number' && value >= 1) return value
  throw invalidArgument(at, 'a number of at least 1', value)
}

const decodeMemorySize: Decoder<number> = (value, at) => {
  const size = integer(PAGE_SIZE, MAX_MEMORY_SIZE)(value, at)
  if (size % PAGE_SIZE === 0) return size
  throw invalidArgument(at, `a multiple of ${PAGE_SIZE}`, value)
}

const decodeHardware = object<Hardware>({
  boot: decodeBoot,
  memorySize: decodeMemorySize,
  hugePages: optional(oneOf('2M', '1G')),
  cpu: decodeCpu,
  cpuid: decodeCpuid,
  apicIds: list(integer(0, MAX_APIC_ID), MAX_CPUS),
  irqchip: oneOf<Irqchip>('full', 'split', 'none'),
  generationId: optional(integer(0, Number.MAX_SAFE_INTEGER)),
  cmdline: anyText,
  fwCfgFiles: decodeFwCfgFiles,
  disks: decodeDisks,
  console: optional(decodeConsole),
  agent: boolean,
  rng: optional(object<NonNullable<Hardware['rng']>>({ bytesPerSecond: optional(bytesPerSecond) })),
})

const decodeVcpu = object<MachineState['vcpus'][number]>({
  state: oneOf<VirtualCpuState>('parked', 'runnable', 'halted'),
  mpState: integer(0, MAX_MP_STATE),
  regs: bytes(VCPU_STRUCT_SIZES.regs),
  sregs: bytes(VCPU_STRUCT_SIZES.sregs),
  debugRegs: bytes(VCPU_STRUCT_SIZES.debugRegs),
  events: bytes(VCPU_STRUCT_SIZES.events),
  xsave: bytesUpTo(MIN_XSAVE_SIZE, MAX_XSAVE_SIZE),
  xcrs: bytes(0, VCPU_OPTIONAL_STRUCT_SIZES.xcrs),
  lapic: bytes(0, VCPU_OPTIONAL_STRUCT_SIZES.lapic),
  msrs: bytesUpTo(0, MAX_MSRS * MSR_ENTRY_SIZE, MSR_ENTRY_SIZE),
})

const decodeMachineState = object<MachineState>({
  time: integer(0, MAX_TIME),
  vcpus: list(decodeVcpu, MAX_CPUS),
  clock: uint64,
  interrupts: anyState,
  devices: list(object<NamedState>({ name: anyText, state: anyState }), MANY),
})

const decodeDiskRecord: Decoder<DiskRecord> = (value, at) => {
  const record = objectOf(value, at)
  anyText(Object.hasOwn(record, 'kind') ? record.kind : undefined, `${at}.kind`)
  return record as DiskRecord
}

/** Pairs of first page and number of pages, in ascending order. */
const decodeRuns: Decoder<PageRuns> = (value, at) => {
  if (!Array.isArray(value)) throw invalidArgument(at, "'all' or a list of pairs", value)
  const runs = new Uint32Array(value.length * 2)
  let end = 0
  for (const [index, pair] of value.entries()) {
    const isPair = Array.isArray(pair) && pair.length === 2
    const [first, pages] = isPair ? pair : []
    if (
      !Number.isInteger(first) ||
      !Number.isInteger(pages) ||
      first < end ||
      pages < 1 ||
      first + pages > MAX_PAGES
    ) {
      const expected = 'the first of some pages behind the run before, and how many they are,'
      throw invalidArgument(`${at}[${index}]`, expected, pair)
    }
    runs.set(pair, index * 2)
    end = first + pages
  }
  return runs
}

const decodeRecord = object<SnapshotRecord>({
  id: uuid,
  created: isoTime,
  nodevisor: someText,
  host: decodeHost,
  hardware: decodeHardware,
  execution: oneOf<ExecutionMode>('auto', 'inline', 'threads'),
  state: decodeMachineState,
  disks: list(decodeDiskRecord, MANY),
  memory: object<SnapshotRecord['memory']>({
    size: decodeMemorySize,
    pages: (value, at) => (value === 'all' ? value : decodeRuns(value, at)),
  }),
  parent: optional(
    object<SnapshotParent>({ path: text(/^[^\0]{1,4096}$/s, 'the path of a folder'), id: uuid }),
  ),
})

/** Checks what of a record has to go together. */
function checkTogether(record: SnapshotRecord): SnapshotRecord {
  const { hardware, state, disks, memory, parent } = record
  const { apicIds, cpuid, irqchip, generationId } = hardware
  const regions = ramRegions(hardware.memorySize)
  const ramSize = regions.reduce((sum, { size }) => sum + size, 0)
  const pages = memory.pages === 'all' ? NO_PAGES : memory.pages
  const end = pages.length === 0 ? 0 : pages.at(-2)! + pages.at(-1)!
  const holdsId = ({ start, size }: RamRegion) =>
    generationId! >= start && generationId! + GENERATION_ID_SIZE <= start + size
  const rules: readonly (readonly [isKept: boolean, at: string, expected: string, received: unknown])[] = [
    [apicIds.length > 0, 'hardware.apicIds', 'at least one vCPU', apicIds],
    [new Set(apicIds).size === apicIds.length, 'hardware.apicIds', 'an id of its own for each vCPU', apicIds],
    [cpuid.length === apicIds.length, 'hardware.cpuid', `a list for each of ${apicIds.length} vCPUs`, cpuid],
    [state.vcpus.length === apicIds.length, 'state.vcpus', `${apicIds.length} vCPUs`, state.vcpus],
    [
      state.vcpus.every(({ lapic }) => (lapic.length === 0) === (irqchip === 'none')),
      'state.vcpus',
      'local APICs where there is an irqchip, and only there,',
      irqchip,
    ],
    [
      generationId === undefined || regions.some(holdsId),
      'hardware.generationId',
      'an address in RAM',
      generationId,
    ],
    [!hardware.agent || hardware.console !== undefined, 'hardware.agent', 'no agent without a console', true],
    [disks.length === hardware.disks.length, 'disks', `${hardware.disks.length} disks`, disks],
    [memory.size === ramSize, 'memory.size', `${ramSize} bytes`, memory.size],
    [end * PAGE_SIZE <= memory.size, 'memory.pages', `pages of ${memory.size} bytes`, end],
    [
      (memory.pages === 'all') === (parent === undefined),
      'parent',
      'one where pages are missing, and only there,',
      parent,
    ],
  ]
  for (const [isKept, at, expected, received] of rules) {
    if (!isKept) throw invalidArgument(`snapshot.${at}`, expected, received)
  }
  return record
}
