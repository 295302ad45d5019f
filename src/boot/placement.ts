import { type ErrorCode, hex, NodevisorError } from '../errors.js'
import {
  HIGH_MEMORY_START,
  LOW_MEMORY_END,
  MMIO_HOLE_END,
  MMIO_HOLE_START,
  PAGE_SIZE,
  type RamRegion,
  ramRegions,
} from '../memory/layout.js'
import type { BootSegment } from './boot-image.js'

/** A part of an image, with the addresses that it claims: unchecked, of any size. */
export interface ClaimedSegment {
  readonly name: string
  readonly address: bigint
  readonly bytes: Uint8Array
  /** Bytes of memory; at least `bytes.length`. */
  readonly size: bigint
}

/** A range of addresses to look for free memory in, `end` excluded. */
export interface Zone {
  readonly start: number
  readonly end: number
}

/** What is to be placed wherever there is room. */
export interface PlaceRequest {
  readonly name: string
  /** Bytes of memory, at least 1. */
  readonly size: number
  /** Where to look, the preferred place first. */
  readonly zones: readonly Zone[]
  /** What its address is a multiple of, a power of two; a page unless given. */
  readonly alignment?: number
  /** Makes its bytes, given its address; without it, all are zero. */
  readonly fill?: (address: number) => Uint8Array
  /** The error when there is no room. */
  readonly code?: ErrorCode
}

const LOW_MEMORY: Zone = { start: PAGE_SIZE, end: LOW_MEMORY_END }
/** Up to the MMIO hole: 32-bit code reaches it. */
const HIGH_MEMORY: Zone = { start: HIGH_MEMORY_START, end: MMIO_HOLE_START }

/** Where page tables, descriptors, stack and boot information go: low memory, or else above 1 MiB. */
export const STRUCTURE_ZONES: readonly Zone[] = [LOW_MEMORY, HIGH_MEMORY]
/** Where modules go: above 1 MiB, or else in low memory. */
export const MODULE_ZONES: readonly Zone[] = [HIGH_MEMORY, LOW_MEMORY]

const MIB = 0x10_0000n

/** Pages can name every address below this one (SDM vol. 3A, 4.5: 47 bits of the canonical lower half). */
const MAX_ADDRESS = 2 ** 47

/**
 * Who takes which guest memory at boot: first the image, where it says; then everything else, where there is
 * room. What it has placed lies in RAM and does not overlap.
 */
export class Placement {
  readonly #memorySize: number
  readonly #ram: readonly RamRegion[]
  /** In ascending order. */
  readonly #segments: BootSegment[] = []

  /**
   * @param memorySize - bytes of guest RAM
   * @throws `ERR_MEMORY_SIZE` for less than a page, a part of a page, or more than a page table can name
   */
  constructor(memorySize: number) {
    if (
      !Number.isSafeInteger(memorySize) ||
      memorySize < PAGE_SIZE ||
      memorySize % PAGE_SIZE !== 0 ||
      memorySize > MAX_ADDRESS - (MMIO_HOLE_END - MMIO_HOLE_START)
    ) {
      throw new NodevisorError(
        'ERR_MEMORY_SIZE',
        `Expected a multiple of ${PAGE_SIZE} bytes below 2^47 for the memory size but received ${memorySize}`,
        { memorySize },
      )
    }
    this.#memorySize = memorySize
    // A machine with little memory has the text screen's own besides: not a place for code.
    this.#ram = ramRegions(memorySize).filter(({ start }) => start === 0 || start >= MMIO_HOLE_END)
  }

  /** What has been placed, in ascending order of addresses. */
  get segments(): readonly BootSegment[] {
    return this.#segments
  }

  /**
   * Takes the memory that an image asks for. To be called once, before anything else is placed.
   *
   * @param remedy - what a user can do about an address outside RAM, for the error message
   * @throws `ERR_IMAGE_TOO_LARGE` for a segment that does not lie in RAM, `ERR_IMAGE_FORMAT` for two that
   *   overlap
   */
  claim(segments: readonly ClaimedSegment[], remedy: string): void {
    for (const { name, address, bytes, size } of segments) {
      const end = address + size
      const region = this.#ram.find((ram) => address >= ram.start && end <= ram.start + ram.size)
      if (region === undefined) {
        const ram = this.#ram.map(({ start, size }) => `${hex(start)} to ${hex(start + size - 1)}`)
        const more = `give the machine at least ${(end + MIB - 1n) / MIB} MiB of memory, or `
        throw new NodevisorError(
          'ERR_IMAGE_TOO_LARGE',
          `Expected ${name} to lie in guest RAM (${ram.join(', ')}) but it takes ${size} bytes at ` +
            `${hex(address)}; ${end <= MMIO_HOLE_START ? more : ''}${remedy}`,
          { segment: name, address, size, memorySize: this.#memorySize },
        )
      }
      this.#segments.push({ name, address: Number(address), bytes, size: Number(size) })
    }
    // Sorted once: an ELF file may have 65534 segments, and comparing each pair would take minutes.
    this.#segments.sort((a, b) => a.address - b.address)
    this.#segments.forEach((segment, index) => {
      const next = this.#segments[index + 1]
      if (next !== undefined && segment.address + segment.size > next.address) {
        throw new NodevisorError(
          'ERR_IMAGE_FORMAT',
          `Expected segments that do not overlap but ${segment.name} takes ${hex(segment.size)} bytes at ` +
            `${hex(segment.address)} and ${next.name} begins at ${hex(next.address)}; check the linker script`,
          { segment: segment.name, overlaps: next.name, address: next.address },
        )
      }
    })
  }

  /**
   * Places something in the first free memory.
   *
   * @returns its address
   * @throws `ERR_BOOT_NO_ROOM`, or `code` where that is given
   */
  place({ name, size, zones, alignment = PAGE_SIZE, fill, code = 'ERR_BOOT_NO_ROOM' }: PlaceRequest): number {
    const address = this.#findFree(size, zones, alignment)
    if (address === undefined) {
      const within = zones.map(({ start, end }) => `${hex(start)} to ${hex(end - 1)}`)
      throw new NodevisorError(
        code,
        `Expected ${size} bytes of free memory for the ${name} (in ${within.join(' or ')}) but the machine's ` +
          `${this.#memorySize} bytes leave no such gap; give the machine more memory`,
        { structure: name, size, memorySize: this.#memorySize },
      )
    }
    const segment = { name, address, bytes: fill?.(address) ?? new Uint8Array(0), size }
    const after = this.#segments.findIndex((other) => other.address > address)
    this.#segments.splice(after === -1 ? this.#segments.length : after, 0, segment)
    return address
  }

  #findFree(size: number, zones: readonly Zone[], alignment: number): number | undefined {
    for (const zone of zones) {
      for (const ram of this.#ram) {
        const end = Math.min(zone.end, ram.start + ram.size)
        let candidate = alignUp(Math.max(zone.start, ram.start), alignment)
        for (const taken of this.#segments) {
          if (taken.address >= candidate + size) break
          candidate = Math.max(candidate, alignUp(taken.address + taken.size, alignment))
        }
        if (candidate + size <= end) return candidate
      }
    }
    return undefined
  }
}

/** The next multiple of `alignment`, which is a power of two. */
export function alignUp(value: number, alignment: number): number {
  return Math.ceil(value / alignment) * alignment
}
