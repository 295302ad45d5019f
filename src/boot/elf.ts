import { hex } from '../errors.js'
import type { BootImage, BootOptions } from './boot-image.js'
import { placeHandover } from './handover.js'
import { formatError, truncatedError, viewOf } from './image-reading.js'
import { bootTranslate, longModeHandover } from './long-mode.js'
import { type ClaimedSegment, Placement } from './placement.js'
import { protectedModeHandover } from './protected-mode.js'

// System V ABI, "ELF Header" and "Program Header": https://refspecs.linuxfoundation.org/elf/gabi4+/contents.html

/** `e_ident`: 0x7f, "ELF", as a little-endian number. */
const ELF_MAGIC = 0x464c_457f
const EI_CLASS = 4
const EI_DATA = 5
const EI_VERSION = 6
const ELFCLASS32 = 1
const ELFCLASS64 = 2
const ELFDATA2LSB = 1
const EV_CURRENT = 1
/** Bytes of `e_ident`. */
const EI_NIDENT = 16

const ET_EXEC = 2
const ET_DYN = 3
const EM_386 = 3
const EM_X86_64 = 62
const PT_LOAD = 1
const PT_NOTE = 4
/** `e_phnum` says that the true number is elsewhere, since it does not fit into 16 bits. */
const PN_XNUM = 0xffff

/** The two classes of ELF files: where their fields are, and how wide. */
export interface ElfLayout {
  readonly bits: 32 | 64
  readonly machine: number
  readonly machineName: string
  readonly headerSize: number
  readonly e_entry: number
  readonly e_phoff: number
  readonly e_phentsize: number
  readonly e_phnum: number
  readonly e_shoff: number
  readonly e_shentsize: number
  readonly e_shnum: number
  readonly e_shstrndx: number
  readonly programHeaderSize: number
  readonly p_offset: number
  readonly p_vaddr: number
  readonly p_paddr: number
  readonly p_filesz: number
  readonly p_memsz: number
  readonly p_align: number
  readonly sectionHeaderSize: number
  readonly sh_type: number
  readonly sh_flags: number
  readonly sh_addr: number
  readonly sh_offset: number
  readonly sh_size: number
}

const ELF32: ElfLayout = {
  bits: 32,
  machine: EM_386,
  machineName: 'EM_386 (3)',
  headerSize: 52,
  e_entry: 24,
  e_phoff: 28,
  e_phentsize: 42,
  e_phnum: 44,
  e_shoff: 32,
  e_shentsize: 46,
  e_shnum: 48,
  e_shstrndx: 50,
  programHeaderSize: 32,
  p_offset: 4,
  p_vaddr: 8,
  p_paddr: 12,
  p_filesz: 16,
  p_memsz: 20,
  p_align: 28,
  sectionHeaderSize: 40,
  sh_type: 4,
  sh_flags: 8,
  sh_addr: 12,
  sh_offset: 16,
  sh_size: 20,
}

const ELF64: ElfLayout = {
  bits: 64,
  machine: EM_X86_64,
  machineName: 'EM_X86_64 (62)',
  headerSize: 64,
  e_entry: 24,
  e_phoff: 32,
  e_phentsize: 54,
  e_phnum: 56,
  e_shoff: 40,
  e_shentsize: 58,
  e_shnum: 60,
  e_shstrndx: 62,
  programHeaderSize: 56,
  p_offset: 8,
  p_vaddr: 16,
  p_paddr: 24,
  p_filesz: 32,
  p_memsz: 40,
  p_align: 48,
  sectionHeaderSize: 64,
  sh_type: 4,
  sh_flags: 8,
  sh_addr: 16,
  sh_offset: 24,
  sh_size: 32,
}

/** What a user can do about a segment outside RAM. */
export const ELF_REMEDY = 'link the kernel lower (AT() in a linker script sets p_paddr, where it is loaded)'

const FLAT_HINT = "name its true format ('flat' for a binary without headers)"
const RELINK_HINT = 'link the kernel again, for x86'

/** A checked ELF executable. */
export interface ElfFile {
  readonly bits: 32 | 64
  /** Where its class has its fields. */
  readonly layout: ElfLayout
  /** `e_entry`, as the file has it; see {@link physicalEntry}. */
  readonly virtualEntry: bigint
  /** PT_LOAD segments at their physical addresses. */
  readonly segments: readonly ProgramSegment[]
  /** PT_NOTE segments that lie in the file. */
  readonly noteSegments: readonly NoteSegment[]
}

/** A PT_LOAD segment, also with its virtual address. */
export interface ProgramSegment extends ClaimedSegment {
  readonly virtual: bigint
}

/** A PT_NOTE segment. */
export interface NoteSegment {
  readonly bytes: Uint8Array
  /** `p_align`. */
  readonly alignment: bigint
}

/** Whether an image begins like an ELF file. */
export function isElf(image: Uint8Array): boolean {
  return image.length >= 4 && viewOf(image).getUint32(0, true) === ELF_MAGIC
}

/**
 * Loads an ELF32 executable in protected mode (EM_386) or an ELF64 one in long mode (EM_X86_64).
 *
 * A 32-bit kernel starts at the physical address of its entry, since paging is off. A 64-bit kernel starts at
 * its virtual entry where the boot page tables lead from there to the physical one; else at the physical one.
 *
 * @param bits - the class to insist on; either when undefined
 * @throws `ERR_IMAGE_FORMAT`, `ERR_IMAGE_TRUNCATED`, `ERR_IMAGE_TOO_LARGE`, `ERR_BOOT_NO_ROOM`
 */
export function loadElf(image: Uint8Array, options: BootOptions, bits?: 32 | 64): BootImage {
  const elf = parseElf(image)
  if (bits !== undefined && bits !== elf.bits) {
    throw formatError(`an ELF${bits} file`, `an ELF${elf.bits} one`, `name it 'elf${elf.bits}' or 'elf'`, {
      field: 'EI_CLASS',
    })
  }
  const placement = new Placement(options.memorySize)
  placement.claim(elf.segments, ELF_REMEDY)
  const physical = physicalEntry(elf)
  const entry = Number(physical)

  if (elf.bits === 32) {
    const handover = placeHandover(placement, options, 'protected')
    const state = protectedModeHandover(placement, entry, handover)
    return { format: 'elf', mode: 'protected', entry, segments: placement.segments, state }
  }
  const mapped = bootTranslate(elf.virtualEntry, options.memorySize) === physical
  const rip = mapped ? elf.virtualEntry : physical
  const handover = placeHandover(placement, options, 'long')
  const state = longModeHandover(placement, options.memorySize, rip, handover)
  return { format: 'elf', mode: 'long', entry, segments: placement.segments, state }
}

/**
 * Reads and checks an ELF executable. Nothing is copied, and nothing said about RAM.
 *
 * @throws `ERR_IMAGE_FORMAT`, `ERR_IMAGE_TRUNCATED`
 */
export function parseElf(image: Uint8Array): ElfFile {
  const view = viewOf(image)
  const layout = checkIdentification(image, view)
  checkHeader(view, layout)

  const segments: ProgramSegment[] = []
  const noteSegments: NoteSegment[] = []
  for (const [index, at] of programHeaders(view, layout).entries()) {
    const type = view.getUint32(at, true)
    if (type === PT_NOTE) noteSegments.push(...readNoteSegment(image, view, layout, at))
    if (type !== PT_LOAD) continue
    const segment = readSegment(image, view, layout, index, at)
    if (segment.size > 0n) segments.push(segment)
  }
  if (segments.length === 0) {
    throw formatError('a PT_LOAD segment', 'none', 'link it as an executable', { field: 'e_phnum' })
  }

  const virtualEntry = readAddress(view, layout, layout.e_entry)
  return { bits: layout.bits, layout, virtualEntry, segments, noteSegments }
}

function checkIdentification(image: Uint8Array, view: DataView): ElfLayout {
  if (!isElf(image)) {
    const first = [...image.subarray(0, 4)].map((byte) => byte.toString(16).padStart(2, '0')).join(' ')
    throw formatError('an ELF file (7f 45 4c 46)', `one that begins with ${first}`, FLAT_HINT, {
      field: 'e_ident',
    })
  }
  if (image.length < EI_NIDENT) throw truncatedError('e_ident', 0n, BigInt(EI_NIDENT), image.length)

  const elfClass = view.getUint8(EI_CLASS)
  if (elfClass !== ELFCLASS32 && elfClass !== ELFCLASS64) {
    throw formatError('ELF class 1 (32-bit) or 2 (64-bit)', `${elfClass}`, RELINK_HINT, { field: 'EI_CLASS' })
  }
  if (view.getUint8(EI_DATA) !== ELFDATA2LSB) {
    const received = `${view.getUint8(EI_DATA)}`
    throw formatError('ELF data encoding 1 (little-endian)', received, RELINK_HINT, { field: 'EI_DATA' })
  }
  if (view.getUint8(EI_VERSION) !== EV_CURRENT) {
    const received = `${view.getUint8(EI_VERSION)}`
    throw formatError('ELF version 1', received, RELINK_HINT, { field: 'EI_VERSION' })
  }
  const layout = elfClass === ELFCLASS32 ? ELF32 : ELF64
  if (image.length < layout.headerSize) {
    throw truncatedError('the ELF header', 0n, BigInt(layout.headerSize), image.length)
  }
  return layout
}

function checkHeader(view: DataView, layout: ElfLayout): void {
  const type = view.getUint16(16, true)
  if (type === ET_DYN) {
    throw formatError(
      'an executable at a fixed address (ET_EXEC)',
      'a position-independent one (ET_DYN)',
      'link it with -no-pie -static',
      { field: 'e_type' },
    )
  }
  if (type !== ET_EXEC) {
    throw formatError('e_type 2 (ET_EXEC)', `${type}`, 'link it as an executable', { field: 'e_type' })
  }
  const machine = view.getUint16(18, true)
  if (machine !== layout.machine) {
    const hint = 'compile the kernel for x86, with -m32 for ELF32 or -m64 for ELF64'
    const expected = `e_machine ${layout.machineName} in an ELF${layout.bits} file`
    throw formatError(expected, `${machine}`, hint, { field: 'e_machine' })
  }
}

/** Offsets of the program headers, all of which lie in the file. */
function programHeaders(view: DataView, layout: ElfLayout): number[] {
  const count = view.getUint16(layout.e_phnum, true)
  if (count === 0 || count === PN_XNUM) {
    throw formatError('1 to 65534 program headers', `e_phnum ${count}`, 'link it as an executable', {
      field: 'e_phnum',
    })
  }
  const entrySize = view.getUint16(layout.e_phentsize, true)
  if (entrySize !== layout.programHeaderSize) {
    const expected = `program headers of ${layout.programHeaderSize} bytes in an ELF${layout.bits} file`
    throw formatError(expected, `e_phentsize ${entrySize}`, RELINK_HINT, { field: 'e_phentsize' })
  }
  const offset = readAddress(view, layout, layout.e_phoff)
  const size = BigInt(count * entrySize)
  if (offset + size > BigInt(view.byteLength)) {
    throw truncatedError('the program headers (e_phoff, e_phnum)', offset, size, view.byteLength)
  }
  return Array.from({ length: count }, (_, index) => Number(offset) + index * entrySize)
}

function readSegment(
  image: Uint8Array,
  view: DataView,
  layout: ElfLayout,
  index: number,
  at: number,
): ProgramSegment {
  const name = `kernel segment ${index}`
  const offset = readAddress(view, layout, at + layout.p_offset)
  const virtual = readAddress(view, layout, at + layout.p_vaddr)
  const address = readAddress(view, layout, at + layout.p_paddr)
  const fileSize = readAddress(view, layout, at + layout.p_filesz)
  const size = readAddress(view, layout, at + layout.p_memsz)

  if (fileSize > size) {
    const expected = `p_filesz of at most p_memsz (${hex(size)}) in program header ${index}`
    throw formatError(expected, hex(fileSize), RELINK_HINT, { field: 'p_filesz', segment: name })
  }
  for (const [field, start] of [
    ['p_paddr', address],
    ['p_vaddr', virtual],
  ] as const) {
    if (start + size > 1n << BigInt(layout.bits)) {
      const expected = `${field} + p_memsz of at most 2^${layout.bits} in program header ${index}`
      throw formatError(expected, `${hex(start)} + ${hex(size)}`, RELINK_HINT, { field, segment: name })
    }
  }
  if (offset + fileSize > BigInt(image.length)) {
    throw truncatedError(`${name} (p_offset, p_filesz)`, offset, fileSize, image.length)
  }
  const bytes = image.subarray(Number(offset), Number(offset + fileSize))
  return { name, address, virtual, bytes, size }
}

/** A PT_NOTE segment, or none where it does not lie in the file: what is not loaded does no harm. */
function readNoteSegment(image: Uint8Array, view: DataView, layout: ElfLayout, at: number): NoteSegment[] {
  const offset = readAddress(view, layout, at + layout.p_offset)
  const size = readAddress(view, layout, at + layout.p_filesz)
  if (offset + size > BigInt(image.length)) return []
  const bytes = image.subarray(Number(offset), Number(offset + size))
  return [{ bytes, alignment: readAddress(view, layout, at + layout.p_align) }]
}

/**
 * The guest-physical address of `e_entry`: translated by the segment that has it at a virtual address (as GRUB
 * does), or as it is where a kernel gives a physical one (as Linux does).
 *
 * @throws `ERR_IMAGE_FORMAT` where no segment has it
 */
export function physicalEntry({ virtualEntry: entry, segments }: ElfFile): bigint {
  const byVirtual = segments.find(({ virtual, size }) => entry >= virtual && entry < virtual + size)
  if (byVirtual !== undefined) return entry - byVirtual.virtual + byVirtual.address
  if (segments.some(({ address, size }) => entry >= address && entry < address + size)) return entry
  throw formatError(
    'an entry point in a PT_LOAD segment',
    `e_entry ${hex(entry)}`,
    'name the first instruction in the linker script (ENTRY(_start))',
    { field: 'e_entry', entry },
  )
}

/** An address, offset or size: 32 or 64 bits, as the class has it. */
export function readAddress(view: DataView, layout: ElfLayout, at: number): bigint {
  return layout.bits === 32 ? BigInt(view.getUint32(at, true)) : view.getBigUint64(at, true)
}
