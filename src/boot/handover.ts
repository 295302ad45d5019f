import { NodevisorError } from '../errors.js'
import { MMIO_HOLE_START, PAGE_SIZE } from '../memory/layout.js'
import type { BootModule, BootOptions } from './boot-image.js'
import { alignUp, MODULE_ZONES, type Placement, STRUCTURE_ZONES } from './placement.js'

// An entry of the module table, the same in protected and in long mode: three 64-bit numbers.
/** Offset of the guest-physical address of the module's first byte. */
export const MODULE_START = 0
/** Offset of its size in bytes. */
export const MODULE_SIZE = 8
/** Offset of the guest-physical address of its text, zero-terminated. */
export const MODULE_CMDLINE = 16
/** Bytes of an entry. */
export const MODULE_ENTRY_SIZE = 24

/**
 * What a flat or ELF kernel is told, in this order: the first four arguments of a C function, and the registers
 * RDI, RSI, RDX, RCX (which are those arguments in the x86-64 ABI).
 */
export interface Handover {
  /** Bytes of RAM; in protected mode, of RAM below 4 GiB. */
  readonly memorySize: number
  /** Address of the zero-terminated command line; never 0. */
  readonly cmdline: number
  /** Address of the module table; 0 without modules. */
  readonly modules: number
  readonly moduleCount: number
}

/** A module in guest memory. */
export interface PlacedModule {
  readonly address: number
  /** In bytes. */
  readonly size: number
  readonly cmdline: string
}

/**
 * Places command line, modules and module table.
 *
 * @throws `ERR_IMAGE_TOO_LARGE` where the modules do not fit, `ERR_BOOT_NO_ROOM` where the rest does not
 */
export function placeHandover(
  placement: Placement,
  options: BootOptions,
  mode: 'protected' | 'long',
): Handover {
  const { memorySize } = options
  const modules = placeModules(placement, options.modules)
  const texts = packTexts([options.cmdline, ...modules.map(({ cmdline }) => cmdline)])
  const textsOffset = modules.length * MODULE_ENTRY_SIZE
  const size = textsOffset + texts.bytes.length
  const address = placement.place({
    name: 'boot information',
    size,
    zones: STRUCTURE_ZONES,
    fill: (at) => {
      const bytes = new Uint8Array(size)
      const view = new DataView(bytes.buffer)
      modules.forEach((module, index) => {
        const entry = index * MODULE_ENTRY_SIZE
        const cmdline = at + textsOffset + texts.offsets[index + 1]!
        view.setBigUint64(entry + MODULE_START, BigInt(module.address), true)
        view.setBigUint64(entry + MODULE_SIZE, BigInt(module.size), true)
        view.setBigUint64(entry + MODULE_CMDLINE, BigInt(cmdline), true)
      })
      bytes.set(texts.bytes, textsOffset)
      return bytes
    },
  })
  return {
    memorySize: mode === 'long' ? memorySize : Math.min(memorySize, MMIO_HOLE_START),
    cmdline: address + textsOffset,
    modules: modules.length === 0 ? 0 : address,
    moduleCount: modules.length,
  }
}

/**
 * Places each module on pages of its own, the first at or above 1 MiB where there is room.
 *
 * @throws `ERR_IMAGE_TOO_LARGE`
 */
export function placeModules(placement: Placement, modules: readonly BootModule[]): PlacedModule[] {
  return modules.map(({ bytes, cmdline }, index) => {
    const address = placement.place({
      name: `module ${index}`,
      // An empty module, too, gets an address of its own.
      size: alignUp(Math.max(bytes.length, 1), PAGE_SIZE),
      zones: MODULE_ZONES,
      fill: () => bytes,
      code: 'ERR_IMAGE_TOO_LARGE',
    })
    return { address, size: bytes.length, cmdline }
  })
}

/** Texts in UTF-8, zero-terminated, one after the other. */
export interface PackedTexts {
  readonly bytes: Uint8Array
  /** Where each begins. */
  readonly offsets: readonly number[]
}

/**
 * Packs command lines.
 *
 * @throws `ERR_INVALID_ARGUMENT` for one with a NUL character: the guest would see only what is before it
 */
export function packTexts(texts: readonly string[]): PackedTexts {
  const offsets: number[] = []
  let size = 0
  const encoded = texts.map((text) => {
    const nul = text.indexOf('\0')
    if (nul !== -1) {
      throw new NodevisorError(
        'ERR_INVALID_ARGUMENT',
        `Expected a command line without NUL, which would end it for the guest, but received one at ${nul}`,
        { argument: 'cmdline', received: text },
      )
    }
    const bytes = new TextEncoder().encode(text)
    offsets.push(size)
    size += bytes.length + 1
    return bytes
  })
  const bytes = new Uint8Array(size)
  encoded.forEach((text, index) => {
    bytes.set(text, offsets[index]!)
  })
  return { bytes, offsets }
}
