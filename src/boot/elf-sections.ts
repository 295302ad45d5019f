import { hex } from '../errors.js'
import { type ElfFile, readAddress } from './elf.js'
import { formatError, truncatedError, viewOf } from './image-reading.js'
import { alignUp, MODULE_ZONES, type Placement } from './placement.js'

// System V ABI, "Sections": https://refspecs.linuxfoundation.org/elf/gabi4+/ch4.sheader.html

const SHT_NULL = 0
const SHT_NOBITS = 8
/** The section is part of a segment. */
const SHF_ALLOC = 1n << 1n

/** What a section that no segment loads is aligned to: enough for symbols, the widest thing in one. */
const SECTION_ALIGNMENT = 16

/** The section headers of a kernel whose sections all are in memory. */
export interface PlacedSections {
  /** `e_shnum`. */
  readonly count: number
  /** `e_shentsize`, in bytes. */
  readonly entrySize: number
  /** `e_shstrndx`. */
  readonly stringTable: number
  /** The section headers, with `sh_addr` of what has been placed. */
  readonly headers: Uint8Array
}

/** A section to be placed. */
interface LooseSection {
  readonly bytes: Uint8Array
  /** From the first of them on. */
  readonly offset: number
  /** Of its header, from the first header on. */
  readonly header: number
}

/**
 * Places the sections that no segment loads (symbols, names, debug information), all in one piece.
 *
 * @returns undefined for a file without section headers, which is none the worse for it
 * @throws `ERR_IMAGE_FORMAT`, `ERR_IMAGE_TRUNCATED`, `ERR_IMAGE_TOO_LARGE`
 */
export function placeSections(
  image: Uint8Array,
  { bits, layout }: ElfFile,
  placement: Placement,
): PlacedSections | undefined {
  const file = viewOf(image)
  const tableOffset = readAddress(file, layout, layout.e_shoff)
  const count = file.getUint16(layout.e_shnum, true)
  if (tableOffset === 0n || count === 0) return undefined
  const entrySize = file.getUint16(layout.e_shentsize, true)
  if (entrySize !== layout.sectionHeaderSize) {
    throw formatError(
      `section headers of ${layout.sectionHeaderSize} bytes in an ELF${bits} file`,
      `e_shentsize ${entrySize}`,
      'link the kernel again, or strip its sections (strip --strip-section-headers)',
      { field: 'e_shentsize' },
    )
  }
  const tableSize = BigInt(count * entrySize)
  if (tableOffset + tableSize > BigInt(image.length)) {
    throw truncatedError('the section headers (e_shoff, e_shnum)', tableOffset, tableSize, image.length)
  }

  const headers = image.slice(Number(tableOffset), Number(tableOffset + tableSize))
  const view = viewOf(headers)
  const loose: LooseSection[] = []
  let size = 0
  let fileBytes = 0
  for (let index = 0; index < count; index++) {
    const header = index * entrySize
    const type = view.getUint32(header + layout.sh_type, true)
    const flags = readAddress(view, layout, header + layout.sh_flags)
    const address = readAddress(view, layout, header + layout.sh_addr)
    const offset = readAddress(view, layout, header + layout.sh_offset)
    const length = readAddress(view, layout, header + layout.sh_size)
    if (type === SHT_NULL || type === SHT_NOBITS || length === 0n) continue
    if ((flags & SHF_ALLOC) !== 0n || address !== 0n) continue
    if (offset + length > BigInt(image.length)) {
      throw truncatedError(`section ${index} (sh_offset, sh_size)`, offset, length, image.length)
    }
    fileBytes += Number(length)
    // Sections that share bytes could make of a small file one that fills the guest's memory, and the host's.
    if (fileBytes > image.length) {
      throw formatError(
        'sections that do not overlap in the file',
        `${hex(fileBytes)} bytes of them up to section ${index} in a file of ${hex(image.length)}`,
        'link the kernel again',
        { field: 'sh_size', section: index },
      )
    }
    loose.push({ bytes: image.subarray(Number(offset), Number(offset + length)), offset: size, header })
    size = alignUp(size + Number(length), SECTION_ALIGNMENT)
  }

  if (size > 0) {
    const fill = () => {
      const bytes = new Uint8Array(size)
      for (const section of loose) bytes.set(section.bytes, section.offset)
      return bytes
    }
    const code = 'ERR_IMAGE_TOO_LARGE'
    const base = placement.place({ name: 'ELF sections', size, zones: MODULE_ZONES, fill, code })
    // Below 3 GiB: in the lower half of a 64-bit field whose upper half is zero.
    for (const section of loose) view.setUint32(section.header + layout.sh_addr, base + section.offset, true)
  }
  const stringTable = file.getUint16(layout.e_shstrndx, true)
  return { count, entrySize, stringTable, headers }
}
