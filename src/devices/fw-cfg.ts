import type { AccessSize, Device, DeviceHost, DeviceState, PortRange } from '../bus/device.js'
import { invalidArgument, NodevisorError, show } from '../errors.js'
import type { GuestMemory } from '../memory/guest-memory.js'
import { MMIO_HOLE_START } from '../memory/layout.js'
import { MEMORY_RANGE_SIZE, makeMemoryMap, writeMemoryRange } from '../memory/memory-map.js'
import { StateReader } from './state.js'

// QEMU, docs/specs/fw_cfg.rst; keys and control bits: include/standard-headers/linux/qemu_fw_cfg.h

/** The selector register: 16 bits, write-only. The data register, 8 bits, overlaps its upper half. */
export const FW_CFG_PORT = 0x510
const DATA_OFFSET = 1
/** The DMA address register: 64 bits, big-endian. Its lower half, written last, starts the operation. */
export const FW_CFG_DMA_PORT = 0x514
const DMA_REGION = 1
const DMA_ADDRESS_LOW = 4

/** What the DMA address register reads as, to show that it is there. */
const FW_CFG_DMA_SIGNATURE = ascii('QEMU CFG')

const FW_CFG_SIGNATURE = 0x00
const FW_CFG_ID = 0x01
const FW_CFG_UUID = 0x02
const FW_CFG_RAM_SIZE = 0x03
const FW_CFG_NB_CPUS = 0x05
const FW_CFG_MAX_CPUS = 0x0f
const FW_CFG_CMDLINE_SIZE = 0x14
const FW_CFG_CMDLINE_DATA = 0x15
const FW_CFG_FILE_DIR = 0x19
const FW_CFG_FILE_FIRST = 0x20
/** Asks to write the item, which none of these allows. */
const FW_CFG_WRITE_CHANNEL = 0x4000

// FW_CFG_ID bits
const FW_CFG_VERSION = 0x01
const FW_CFG_VERSION_DMA = 0x02

// FW_CFG_DMA_CONTROL bits; the upper 16 bits are the key to select
const FW_CFG_DMA_CTL_ERROR = 0x01
const FW_CFG_DMA_CTL_READ = 0x02
const FW_CFG_DMA_CTL_SKIP = 0x04
const FW_CFG_DMA_CTL_SELECT = 0x08
const FW_CFG_DMA_CTL_WRITE = 0x10
const FW_CFG_DMA_CTL_KEY_SHIFT = 16

// struct fw_cfg_dma_access: big-endian
const DMA_LENGTH = 4
const DMA_BUFFER = 8
const DMA_ACCESS_SIZE = 16

/** Zeros that a DMA read gets past an item's end, at most: or it fills all of memory, over and over. */
const MAX_DMA_PADDING = 0x1_0000

// struct fw_cfg_file: big-endian
const DIRECTORY_ENTRY = 4
const FILE_ENTRY_SIZE = 64
const FILE_SELECT = 4
const FILE_NAME = 8
/** FW_CFG_MAX_FILE_PATH without the terminating NUL. */
const MAX_FILE_NAME = 55
/** The keys up to the write channel's, less those of the machine's own files. */
const MAX_FILES = FW_CFG_WRITE_CHANNEL - FW_CFG_FILE_FIRST - 1
const RESERVED_PREFIX = 'etc/'

const E820_FILE = 'etc/e820'

const UUID_SIZE = 16
const NOTHING = new Uint8Array(0)

/** How to make an {@link FwCfg}. */
export interface FwCfgOptions {
  /** Bytes of guest RAM. */
  readonly memorySize: number
  readonly cpus: number
  /** The kernel's command line. */
  readonly cmdline: string
  /** Files for the guest by name, as {@link checkFwCfgFiles} gives them. */
  readonly files: ReadonlyMap<string, Uint8Array>
}

/**
 * QEMU's firmware configuration device: named pieces of data that the guest reads by key, byte after byte or
 * by DMA. Nothing in it can be written.
 */
export class FwCfg implements Device {
  readonly name = 'fw-cfg'
  readonly ports: readonly PortRange[] = [
    { base: FW_CFG_PORT, length: 2 },
    { base: FW_CFG_DMA_PORT, length: 8 },
  ]

  readonly #items: ReadonlyMap<number, Uint8Array>
  #memory: GuestMemory | undefined
  #selector = FW_CFG_SIGNATURE
  /** Where the data register reads next, at most at the item's end. */
  #offset = 0
  #dmaAddressHigh = 0

  constructor(options: FwCfgOptions) {
    this.#items = makeItems(options)
  }

  attach(host: DeviceHost): void {
    this.#memory = host.memory
  }

  read(offset: number, size: AccessSize, region: number): number {
    if (region === DMA_REGION) return readLittleEndian(FW_CFG_DMA_SIGNATURE, offset, size)
    if (offset !== DATA_OFFSET) return 0
    const item = this.#item
    return this.#offset < item.length ? item[this.#offset++]! : 0
  }

  write(offset: number, value: number, size: AccessSize, region: number): void {
    if (region === DMA_REGION) this.#writeDmaAddress(offset, value, size)
    // A byte there, to either port, is data.
    else if (size === 2) this.#select(value)
  }

  saveState(): DeviceState {
    return { selector: this.#selector, offset: this.#offset, dmaAddressHigh: this.#dmaAddressHigh }
  }

  restoreState(state: DeviceState): void {
    const saved = new StateReader(this.name, state)
    const selector = saved.uint('selector', 0xffff)
    const offset = saved.uint('offset', this.#itemOf(selector).length)
    this.#dmaAddressHigh = saved.uint('dmaAddressHigh', 0xffff_ffff)
    this.#selector = selector
    this.#offset = offset
  }

  get #item(): Uint8Array {
    return this.#itemOf(this.#selector)
  }

  #itemOf(selector: number): Uint8Array {
    return this.#items.get(selector & ~FW_CFG_WRITE_CHANNEL) ?? NOTHING
  }

  #select(key: number): void {
    this.#selector = key
    this.#offset = 0
  }

  #writeDmaAddress(offset: number, value: number, size: AccessSize): void {
    if (size !== 4) return
    const half = swapBytes(value)
    if (offset !== DMA_ADDRESS_LOW) {
      // An access in the middle of the register is none of its two halves.
      if (offset === 0) this.#dmaAddressHigh = half
      return
    }
    const address = this.#dmaAddressHigh * 2 ** 32 + half
    this.#dmaAddressHigh = 0
    if (this.#memory !== undefined) this.#access(this.#memory, address)
  }

  /** One DMA operation. Its outcome replaces the control word, where there is memory for it. */
  #access(memory: GuestMemory, address: number): void {
    if (!memory.contains(address, DMA_LENGTH)) return
    const succeeded = memory.contains(address, DMA_ACCESS_SIZE) && this.#transfer(memory, address)
    memory.writeUint32(address, swapBytes(succeeded ? 0 : FW_CFG_DMA_CTL_ERROR))
  }

  #transfer(memory: GuestMemory, address: number): boolean {
    // A copy: another vCPU may write to it meanwhile.
    const access = new DataView(memory.read(address, DMA_ACCESS_SIZE).buffer)
    const control = access.getUint32(0)
    const length = access.getUint32(DMA_LENGTH)
    const buffer = Number(access.getBigUint64(DMA_BUFFER))
    if ((control & FW_CFG_DMA_CTL_SELECT) !== 0) this.#select(control >>> FW_CFG_DMA_CTL_KEY_SHIFT)
    const item = this.#item
    const available = Math.min(length, item.length - this.#offset)
    if ((control & FW_CFG_DMA_CTL_READ) !== 0) {
      if (!memory.contains(buffer, length) || length - available > MAX_DMA_PADDING) return false
      memory.write(buffer, item.subarray(this.#offset, this.#offset + available))
      memory.fill(buffer + available, length - available)
    } else if ((control & FW_CFG_DMA_CTL_WRITE) !== 0) {
      return false
    } else if ((control & FW_CFG_DMA_CTL_SKIP) === 0) {
      return true
    }
    this.#offset += available
    return true
  }
}

/**
 * Checks the files that a user wants the guest to have.
 *
 * @param files - an object: contents by name. Text is stored as UTF-8, without a NUL; bytes are copied
 * @throws `ERR_INVALID_ARGUMENT` for what is no such object, and for a name that a guest could not find
 */
export function checkFwCfgFiles(files: unknown): ReadonlyMap<string, Uint8Array> {
  if (typeof files !== 'object' || files === null || !isPlain(files)) {
    throw invalidArgument('fwCfg', "an object of contents by name, such as { 'opt/name': 'text' },", files)
  }
  const checked = new Map<string, Uint8Array>()
  for (const [name, content] of Object.entries(files)) {
    checkName(name)
    if (typeof content === 'string') checked.set(name, new TextEncoder().encode(content))
    else if (content instanceof Uint8Array) checked.set(name, content.slice())
    else throw invalidArgument(`fwCfg['${name}']`, 'a string or a Uint8Array', content)
  }
  if (checked.size > MAX_FILES) throw invalidArgument('fwCfg', `at most ${MAX_FILES} files`, checked.size)
  return checked
}

function isPlain(value: object): boolean {
  const prototype = Object.getPrototypeOf(value)
  return prototype === Object.prototype || prototype === null
}

function checkName(name: string): void {
  const fault = faultOfName(name)
  if (fault === undefined) return
  throw new NodevisorError(
    'ERR_INVALID_ARGUMENT',
    `Expected a name of 1 to ${MAX_FILE_NAME} printable ASCII characters, not beginning with ` +
      `'${RESERVED_PREFIX}', for a file of fwCfg but received ${show(name)}, which ${fault}; ` +
      `name it for example 'opt/${suggestName(name)}'`,
    { argument: 'fwCfg', received: name },
  )
}

function faultOfName(name: string): string | undefined {
  if (name === '') return 'is empty'
  if (!/^[ -~]*$/.test(name)) return 'has other characters'
  if (name.length > MAX_FILE_NAME) return `has ${name.length}`
  if (name.startsWith(RESERVED_PREFIX)) return "would be taken for one of the machine's own"
  return undefined
}

/** What is left of a name when it has become a good one. */
function suggestName(name: string): string {
  const printable = name.slice(name.startsWith(RESERVED_PREFIX) ? RESERVED_PREFIX.length : 0)
  return printable.replace(/[^ -~]/g, '').slice(0, MAX_FILE_NAME - 'opt/'.length) || 'name'
}

function makeItems({ memorySize, cpus, cmdline, files }: FwCfgOptions): Map<number, Uint8Array> {
  const cmdlineData = new TextEncoder().encode(`${cmdline}\0`)
  const items = new Map<number, Uint8Array>([
    [FW_CFG_SIGNATURE, ascii('QEMU')],
    [FW_CFG_ID, littleEndian(FW_CFG_VERSION | FW_CFG_VERSION_DMA, 4)],
    // What QEMU has for a machine without one.
    [FW_CFG_UUID, new Uint8Array(UUID_SIZE)],
    [FW_CFG_RAM_SIZE, littleEndian(memorySize, 8)],
    [FW_CFG_NB_CPUS, littleEndian(cpus, 2)],
    [FW_CFG_MAX_CPUS, littleEndian(cpus, 2)],
    [FW_CFG_CMDLINE_SIZE, littleEndian(cmdlineData.length, 4)],
    [FW_CFG_CMDLINE_DATA, cmdlineData],
  ])
  const all = [...files, [E820_FILE, makeE820(memorySize)] as const]
  all.sort(([a], [b]) => (a < b ? -1 : 1))
  const directory = new Uint8Array(DIRECTORY_ENTRY + all.length * FILE_ENTRY_SIZE)
  const view = new DataView(directory.buffer)
  view.setUint32(0, all.length)
  all.forEach(([name, content], index) => {
    const entry = DIRECTORY_ENTRY + index * FILE_ENTRY_SIZE
    const key = FW_CFG_FILE_FIRST + index
    view.setUint32(entry, content.length)
    view.setUint16(entry + FILE_SELECT, key)
    directory.set(ascii(name), entry + FILE_NAME)
    items.set(key, content)
  })
  return items.set(FW_CFG_FILE_DIR, directory)
}

/** The memory map, as QEMU's `struct e820_entry` has it: RAM, and the adapters' and the firmware's area. */
function makeE820(memorySize: number): Uint8Array {
  const ranges = makeMemoryMap(memorySize).filter(({ start }) => start !== MMIO_HOLE_START)
  const bytes = new Uint8Array(ranges.length * MEMORY_RANGE_SIZE)
  const view = new DataView(bytes.buffer)
  ranges.forEach((range, index) => {
    writeMemoryRange(view, index * MEMORY_RANGE_SIZE, range)
  })
  return bytes
}

function ascii(text: string): Uint8Array {
  return Uint8Array.from(text, (character) => character.charCodeAt(0))
}

function littleEndian(value: number, size: number): Uint8Array {
  return Uint8Array.from({ length: size }, (_, i) => Math.floor(value / 2 ** (8 * i)) & 0xff)
}

function readLittleEndian(bytes: Uint8Array, offset: number, size: number): number {
  let value = 0
  for (let i = size - 1; i >= 0; i--) value = value * 0x100 + bytes[offset + i]!
  return value
}

/** A 32-bit number in the other byte order. */
function swapBytes(value: number): number {
  return ((value << 24) | ((value & 0xff00) << 8) | ((value >>> 8) & 0xff00) | (value >>> 24)) >>> 0
}
