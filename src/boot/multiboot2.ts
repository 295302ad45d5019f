import { hex, type NodevisorError } from '../errors.js'
import { basicMemory, makeMemoryMap, writeMemoryRange } from '../memory/memory-map.js'
import type { BootImage, BootOptions } from './boot-image.js'
import { ELF_REMEDY, type ElfFile, isElf, parseElf } from './elf.js'
import { type PlacedSections, placeSections } from './elf-sections.js'
import { type PlacedModule, packTexts, placeModules } from './handover.js'
import { formatError, truncatedError, viewOf } from './image-reading.js'
import {
  addressError,
  BOOT_LOADER_NAME,
  claimByAddresses,
  claimElf,
  type LoadAddresses,
  writeTextFramebuffer,
} from './multiboot-common.js'
import { alignUp, Placement, STRUCTURE_ZONES } from './placement.js'
import { checkEntryInKernel, protectedModeState } from './protected-mode.js'

// Multiboot2 Specification 2.0: https://www.gnu.org/software/grub/manual/multiboot2/multiboot.html
// Names of constants are those of its multiboot2.h (4.4.1).

// 3.1 OS image format: the header.
/** The header, its tags included, lies within this many bytes … */
const MULTIBOOT_SEARCH = 32768
/** … at a multiple of this. */
const MULTIBOOT_HEADER_ALIGN = 8
const MULTIBOOT2_HEADER_MAGIC = 0xe852_50d6
/** 32-bit protected mode of x86. */
const MULTIBOOT_ARCHITECTURE_I386 = 0

// Offsets in the header (3.1.2).
const HEADER_MAGIC = 0
const HEADER_ARCHITECTURE = 4
const HEADER_LENGTH = 8
const HEADER_CHECKSUM = 12
/** Bytes of the header without its tags. */
const HEADER_SIZE = 16

// 3.1.3 General tag structure of the header: u16 type, u16 flags, u32 size.
const HEADER_TAG_SIZE = 8
const MULTIBOOT_TAG_ALIGN = 8
/** In `flags`: a loader that does not know the tag may ignore it. */
const MULTIBOOT_HEADER_TAG_OPTIONAL = 1

// 3.1.4 to 3.1.13: types of the header's tags.
const MULTIBOOT_HEADER_TAG_END = 0
const MULTIBOOT_HEADER_TAG_INFORMATION_REQUEST = 1
const MULTIBOOT_HEADER_TAG_ADDRESS = 2
const MULTIBOOT_HEADER_TAG_ENTRY_ADDRESS = 3
const MULTIBOOT_HEADER_TAG_CONSOLE_FLAGS = 4
const MULTIBOOT_HEADER_TAG_FRAMEBUFFER = 5
const MULTIBOOT_HEADER_TAG_MODULE_ALIGN = 6
const MULTIBOOT_HEADER_TAG_EFI_BS = 7
const MULTIBOOT_HEADER_TAG_ENTRY_ADDRESS_EFI32 = 8
const MULTIBOOT_HEADER_TAG_ENTRY_ADDRESS_EFI64 = 9
const MULTIBOOT_HEADER_TAG_RELOCATABLE = 10

// 3.1.9 Flags tag.
const MULTIBOOT_CONSOLE_FLAGS_CONSOLE_REQUIRED = 1
const MULTIBOOT_CONSOLE_FLAGS_EGA_TEXT_SUPPORTED = 2

/**
 * Tags that ask for nothing: a framebuffer's mode is a wish, and the answer is the text screen (3.1.10);
 * modules are on pages of their own anyway (3.1.11); and the EFI tags hold on EFI platforms alone (3.1.7,
 * 3.1.8, 3.1.12).
 */
const IGNORED_HEADER_TAGS: readonly number[] = [
  MULTIBOOT_HEADER_TAG_FRAMEBUFFER,
  MULTIBOOT_HEADER_TAG_MODULE_ALIGN,
  MULTIBOOT_HEADER_TAG_EFI_BS,
  MULTIBOOT_HEADER_TAG_ENTRY_ADDRESS_EFI32,
  MULTIBOOT_HEADER_TAG_ENTRY_ADDRESS_EFI64,
]

/** Bytes of the tags whose fields are read. */
const HEADER_TAG_SIZES: ReadonlyMap<number, number> = new Map([
  [MULTIBOOT_HEADER_TAG_ADDRESS, 24],
  [MULTIBOOT_HEADER_TAG_ENTRY_ADDRESS, 12],
  [MULTIBOOT_HEADER_TAG_CONSOLE_FLAGS, 12],
  [MULTIBOOT_HEADER_TAG_RELOCATABLE, 24],
])

// 3.3 I386 machine state.
/** In EAX: a Multiboot 2 loader was here. */
export const MULTIBOOT2_BOOTLOADER_MAGIC = 0x36d7_6289

// 3.6 Boot information: total_size, reserved, tags of u32 type, u32 size.
const INFO_SIZE = 8
const TAG_SIZE = 8
const MULTIBOOT_TAG_TYPE_END = 0
const MULTIBOOT_TAG_TYPE_CMDLINE = 1
const MULTIBOOT_TAG_TYPE_BOOT_LOADER_NAME = 2
const MULTIBOOT_TAG_TYPE_MODULE = 3
const MULTIBOOT_TAG_TYPE_BASIC_MEMINFO = 4
const MULTIBOOT_TAG_TYPE_MMAP = 6
const MULTIBOOT_TAG_TYPE_FRAMEBUFFER = 8
const MULTIBOOT_TAG_TYPE_ELF_SECTIONS = 9
const MULTIBOOT_TAG_TYPE_ACPI_NEW = 15
/** The last type of the specification, too. */
const MULTIBOOT_TAG_TYPE_LOAD_BASE_ADDR = 21

// 3.6.8 Memory map: entry_size, entry_version, entries.
const MMAP_ENTRIES = 8
/** A range and a reserved word. */
const MMAP_ENTRY_SIZE = 24
const MMAP_ENTRY_VERSION = 0

/** 3.6.12 Framebuffer info: addr, pitch, width, height, bpp, type, two reserved bytes. */
const FRAMEBUFFER_SIZE = 24

const ADDRESS_TAG = 'the address tag of the Multiboot 2 header'
const ENTRY_REMEDY = 'correct the entry address tag of the Multiboot 2 header: a physical address'

interface Multiboot2Header {
  /** Where in the image it is. */
  readonly offset: number
  readonly architecture: number
  /** Bytes, its tags included; unchecked. */
  readonly length: number
}

interface HeaderTag {
  readonly type: number
  readonly optional: boolean
  /** Where in the image it is. */
  readonly offset: number
  readonly size: number
}

/** What a header's tags ask for. */
interface HeaderRequests {
  readonly addresses: LoadAddresses | undefined
  readonly entryAddr: number | undefined
  readonly relocatable: Relocatable | undefined
}

/** The relocatable header tag (3.1.13). */
interface Relocatable {
  readonly optional: boolean
  readonly minAddr: number
  readonly maxAddr: number
  readonly align: number
}

/**
 * Whether an image has a Multiboot 2 header that tells how to load it: any in an ELF file, else one with an
 * address tag. (A boot sector with an ELF kernel behind it has the kernel's header, but is not loaded by it.)
 */
export function isMultiboot2(image: Uint8Array): boolean {
  const header = findHeader(image)
  if (header === undefined) return false
  return (
    isElf(image) || readTags(image, header).tags.some(({ type }) => type === MULTIBOOT_HEADER_TAG_ADDRESS)
  )
}

/**
 * Loads a Multiboot 2 kernel: by its address tag if it has one, else as the ELF file it is. An ELF64 file,
 * too, starts in 32-bit protected mode, at the physical address of its entry, as with GRUB.
 *
 * A relocatable kernel is not moved: it is loaded where it is linked, if its tag allows that.
 *
 * @throws `ERR_IMAGE_FORMAT`, `ERR_IMAGE_TRUNCATED`, `ERR_IMAGE_TOO_LARGE`, `ERR_BOOT_NO_ROOM`
 */
export function loadMultiboot2(image: Uint8Array, options: BootOptions): BootImage {
  const header = findHeader(image)
  if (header === undefined) {
    throw formatError(
      `a Multiboot 2 header (magic ${hex(MULTIBOOT2_HEADER_MAGIC)}, aligned to 8, in the first 32768 bytes)`,
      'none with a right checksum',
      "keep its section first in the linker script, or name the image's true format",
      { field: 'magic' },
    )
  }
  checkHeader(image, header)
  const { tags, fault } = readTags(image, header)
  if (fault !== undefined) throw fault
  const requests = readRequests(image, tags)

  const placement = new Placement(options.memorySize)
  const { entry, elf } = claimKernel(image, header, requests, placement)
  const loadBase = placement.segments[0]!.address
  checkRelocation(requests.relocatable, placement)

  const modules = placeModules(placement, options.modules)
  const sections = elf && placeSections(image, elf, placement)
  const information = makeInformation(options, modules, sections, requests.relocatable && loadBase)
  const info = placement.place({
    name: 'boot information',
    size: information.length,
    zones: STRUCTURE_ZONES,
    fill: () => information,
  })
  const state = protectedModeState(placement, entry, {
    rax: BigInt(MULTIBOOT2_BOOTLOADER_MAGIC),
    rbx: BigInt(info),
  })
  return { format: 'multiboot2', mode: 'protected', entry, segments: placement.segments, state }
}

/** The first header in the image whose checksum is right (3.1.1, 3.1.2). */
function findHeader(image: Uint8Array): Multiboot2Header | undefined {
  const view = viewOf(image)
  const last = Math.min(image.length, MULTIBOOT_SEARCH) - HEADER_SIZE
  for (let offset = 0; offset <= last; offset += MULTIBOOT_HEADER_ALIGN) {
    if (view.getUint32(offset + HEADER_MAGIC, true) !== MULTIBOOT2_HEADER_MAGIC) continue
    const architecture = view.getUint32(offset + HEADER_ARCHITECTURE, true)
    const length = view.getUint32(offset + HEADER_LENGTH, true)
    const checksum = view.getUint32(offset + HEADER_CHECKSUM, true)
    const sum = MULTIBOOT2_HEADER_MAGIC + architecture + length + checksum
    if (sum % 2 ** 32 === 0) return { offset, architecture, length }
  }
  return undefined
}

function checkHeader(image: Uint8Array, { offset, architecture, length }: Multiboot2Header): void {
  if (architecture !== MULTIBOOT_ARCHITECTURE_I386) {
    throw formatError(
      'architecture 0 (i386) in the Multiboot 2 header',
      `${architecture}`,
      'it is 0 for a 64-bit kernel too; correct it, and the checksum',
      { field: 'architecture', architecture },
    )
  }
  if (length < HEADER_SIZE + HEADER_TAG_SIZE) {
    const expected = 'a header_length of at least 24 bytes: a Multiboot 2 header and its end tag'
    throw formatError(expected, `${length}`, 'let it count the tags, and correct the checksum', {
      field: 'header_length',
    })
  }
  if (offset + length > image.length) {
    throw truncatedError('a Multiboot 2 header', BigInt(offset), BigInt(length), image.length)
  }
  if (offset + length > MULTIBOOT_SEARCH) {
    const expected = `a Multiboot 2 header of ${length} bytes within the first ${MULTIBOOT_SEARCH}`
    throw formatError(expected, `one at offset ${offset}`, 'move its section to the front', {
      field: 'magic',
    })
  }
}

/** The header's tags up to its end tag, or up to the first damaged one, and then what is wrong with it. */
function readTags(
  image: Uint8Array,
  header: Multiboot2Header,
): { readonly tags: readonly HeaderTag[]; readonly fault?: NodevisorError } {
  const view = viewOf(image)
  const end = Math.min(header.offset + header.length, image.length, MULTIBOOT_SEARCH)
  const tags: HeaderTag[] = []
  let offset = header.offset + HEADER_SIZE
  while (offset + HEADER_TAG_SIZE <= end) {
    const type = view.getUint16(offset, true)
    const optional = (view.getUint16(offset + 2, true) & MULTIBOOT_HEADER_TAG_OPTIONAL) !== 0
    const size = view.getUint32(offset + 4, true)
    if (type === MULTIBOOT_HEADER_TAG_END) return { tags }
    const least = HEADER_TAG_SIZES.get(type) ?? HEADER_TAG_SIZE
    const most = end - offset
    if (size < least || size > most) {
      const expected = `${least} to ${most} bytes in the Multiboot 2 header tag of type ${type}`
      const remedy = 'correct it: tags are 8-aligned, and their size is without the padding'
      return {
        tags,
        fault: formatError(expected, `a size of ${size}`, remedy, { field: 'size', type, offset }),
      }
    }
    tags.push({ type, optional, offset, size })
    offset = alignUp(offset + size, MULTIBOOT_TAG_ALIGN)
  }
  const expected = 'an end tag (type 0, size 8) within header_length of the Multiboot 2 header'
  const remedy = 'add it, aligned to 8, and let header_length count it'
  return { tags, fault: formatError(expected, 'none', remedy, { field: 'header_length' }) }
}

function readRequests(image: Uint8Array, tags: readonly HeaderTag[]): HeaderRequests {
  const view = viewOf(image)
  let addresses: LoadAddresses | undefined
  let entryAddr: number | undefined
  let relocatable: Relocatable | undefined
  for (const tag of tags) {
    const { type, optional, offset } = tag
    const field = (index: number) => view.getUint32(offset + HEADER_TAG_SIZE + index * 4, true)
    switch (type) {
      case MULTIBOOT_HEADER_TAG_INFORMATION_REQUEST:
        if (!optional) checkInformationRequest(view, tag)
        break
      case MULTIBOOT_HEADER_TAG_ADDRESS:
        addresses = {
          headerAddr: field(0),
          loadAddr: field(1),
          loadEndAddr: field(2),
          bssEndAddr: field(3),
          source: ADDRESS_TAG,
        }
        break
      case MULTIBOOT_HEADER_TAG_ENTRY_ADDRESS:
        entryAddr = field(0)
        break
      case MULTIBOOT_HEADER_TAG_CONSOLE_FLAGS:
        checkConsoleFlags(field(0))
        break
      case MULTIBOOT_HEADER_TAG_RELOCATABLE:
        relocatable = { optional, minAddr: field(0), maxAddr: field(1), align: field(2) }
        break
      default:
        if (!optional && !IGNORED_HEADER_TAGS.includes(type)) {
          throw formatError(
            'no required tags in the Multiboot 2 header but those of types 1 to 10',
            `one of type ${type}`,
            'set bit 0 of its flags if the kernel can do without',
            { field: 'type', type },
          )
        }
    }
  }
  return { addresses, entryAddr, relocatable }
}

/**
 * Required information of a type that the specification has is no error where this machine has none of it
 * (VBE, EFI, …): as 3.1.4 says, asking for it does not guarantee that there is any.
 */
function checkInformationRequest(view: DataView, { offset, size }: HeaderTag): void {
  const unknown: number[] = []
  for (let at = HEADER_TAG_SIZE; at + 4 <= size; at += 4) {
    const type = view.getUint32(offset + at, true)
    if (type > MULTIBOOT_TAG_TYPE_LOAD_BASE_ADDR) unknown.push(type)
  }
  if (unknown.length === 0) return
  const shown = unknown.slice(0, 8).join(', ') + (unknown.length > 8 ? ', …' : '')
  throw formatError(
    'a Multiboot 2 information request for tags of types 1 to 21',
    `one that requires ${shown}`,
    'set bit 0 of its flags if the kernel can do without',
    { field: 'mbi_tag_types', types: unknown },
  )
}

function checkConsoleFlags(flags: number): void {
  if ((flags & MULTIBOOT_CONSOLE_FLAGS_CONSOLE_REQUIRED) === 0) return
  if ((flags & MULTIBOOT_CONSOLE_FLAGS_EGA_TEXT_SUPPORTED) !== 0) return
  throw formatError(
    'a kernel that can use the EGA text screen (bit 1 of console_flags), the only one here,',
    `console_flags ${hex(flags)}, which require another`,
    'clear bit 0 if it can do without',
    { field: 'console_flags', flags },
  )
}

/** Claims the kernel's memory. With its entry comes the ELF file, where it was loaded as one. */
function claimKernel(
  image: Uint8Array,
  { offset }: Multiboot2Header,
  { addresses, entryAddr }: HeaderRequests,
  placement: Placement,
): { readonly entry: number; readonly elf?: ElfFile } {
  if (addresses !== undefined) {
    if (entryAddr === undefined) {
      throw formatError(
        'an entry address tag beside the address tag in the Multiboot 2 header',
        'none',
        'add it (type 3), or leave out the address tag if the kernel is an ELF file',
        { field: 'entry_addr' },
      )
    }
    claimByAddresses(image, offset, withLoadAddress(addresses, offset), placement)
    checkEntryInKernel(entryAddr, placement, 'entry_addr', ENTRY_REMEDY)
    return { entry: entryAddr }
  }
  if (!isElf(image)) {
    throw formatError(
      'an ELF file, or an address tag in the Multiboot 2 header',
      'none in a file that is not ELF',
      "link the kernel as ELF, add the tag (type 2), or name it 'flat'",
      { field: 'type' },
    )
  }
  const elf = parseElf(image)
  if (entryAddr === undefined) return { entry: claimElf(elf, placement), elf }
  placement.claim(elf.segments, ELF_REMEDY)
  checkEntryInKernel(entryAddr, placement, 'entry_addr', ENTRY_REMEDY)
  return { entry: entryAddr, elf }
}

/** Replaces the `load_addr` -1, which stands for "from the image's first byte on" (3.1.5). */
function withLoadAddress(addresses: LoadAddresses, headerOffset: number): LoadAddresses {
  if (addresses.loadAddr !== 0xffff_ffff) return addresses
  const loadAddr = addresses.headerAddr - headerOffset
  if (loadAddr < 0) {
    const expected = `at least ${hex(headerOffset)}, the header's offset in the file, for load_addr -1`
    throw addressError('header_addr', expected, addresses.headerAddr, ADDRESS_TAG)
  }
  return { ...addresses, loadAddr }
}

/** Checks that a relocatable kernel may stay where it is linked; it is all that has been placed so far. */
function checkRelocation(relocatable: Relocatable | undefined, placement: Placement): void {
  if (relocatable === undefined || relocatable.optional) return
  const { minAddr, maxAddr, align } = relocatable
  const start = placement.segments[0]!.address
  const last = placement.segments.at(-1)!
  const end = last.address + last.size
  if (start >= minAddr && end - 1 <= maxAddr && (align === 0 || start % align === 0)) return
  throw formatError(
    `a kernel from ${hex(minAddr)} to ${hex(maxAddr)} at a multiple of ${hex(align)}, as its relocatable ` +
      'header tag says,',
    `one from ${hex(start)} to ${hex(end - 1)}`,
    'link it there (it is not moved), or set bit 0 of the flags of the tag',
    { field: 'min_addr', minAddr, maxAddr, align, start },
  )
}

/** The boot information (3.6): its tags refer to nothing in it, so it can be made before it is placed. */
function makeInformation(
  options: BootOptions,
  modules: readonly PlacedModule[],
  sections: PlacedSections | undefined,
  loadBase: number | undefined,
): Uint8Array {
  const { lower, upper } = basicMemory(options.memorySize)
  const tags = [
    makeTag(MULTIBOOT_TAG_TYPE_CMDLINE, packText(options.cmdline)),
    makeTag(MULTIBOOT_TAG_TYPE_BOOT_LOADER_NAME, packText(BOOT_LOADER_NAME)),
    ...modules.map(({ address, size, cmdline }) =>
      makeTag(MULTIBOOT_TAG_TYPE_MODULE, packWords(address, address + size), packText(cmdline)),
    ),
    makeTag(MULTIBOOT_TAG_TYPE_BASIC_MEMINFO, packWords(lower, upper)),
    makeTag(MULTIBOOT_TAG_TYPE_MMAP, packMemoryMap(options.memorySize)),
    makeTag(MULTIBOOT_TAG_TYPE_FRAMEBUFFER, packFramebuffer()),
  ]
  if (sections !== undefined) {
    const { count, entrySize, stringTable, headers } = sections
    // 3.6.7: the text has num, entsize and shndx in 16 bits, but multiboot2.h, and so every loader, in 32.
    tags.push(makeTag(MULTIBOOT_TAG_TYPE_ELF_SECTIONS, packWords(count, entrySize, stringTable), headers))
  }
  if (options.rsdp !== undefined) tags.push(makeTag(MULTIBOOT_TAG_TYPE_ACPI_NEW, options.rsdp))
  if (loadBase !== undefined) tags.push(makeTag(MULTIBOOT_TAG_TYPE_LOAD_BASE_ADDR, packWords(loadBase)))
  tags.push(makeTag(MULTIBOOT_TAG_TYPE_END))

  const size = INFO_SIZE + tags.reduce((sum, { length }) => sum + length, 0)
  return concatenate([packWords(size, 0), ...tags], size)
}

/** A tag (3.6.2) with padding, so that the next is aligned; its `size` is without. */
function makeTag(type: number, ...parts: readonly Uint8Array[]): Uint8Array {
  const size = TAG_SIZE + parts.reduce((sum, { length }) => sum + length, 0)
  return concatenate([packWords(type, size), ...parts], alignUp(size, MULTIBOOT_TAG_ALIGN))
}

function concatenate(parts: readonly Uint8Array[], size: number): Uint8Array {
  const bytes = new Uint8Array(size)
  let at = 0
  for (const part of parts) {
    bytes.set(part, at)
    at += part.length
  }
  return bytes
}

function packText(text: string): Uint8Array {
  return packTexts([text]).bytes
}

/** Numbers as 32-bit words. */
function packWords(...values: readonly number[]): Uint8Array {
  const bytes = new Uint8Array(values.length * 4)
  const view = viewOf(bytes)
  values.forEach((value, index) => {
    view.setUint32(index * 4, value, true)
  })
  return bytes
}

function packMemoryMap(memorySize: number): Uint8Array {
  const memoryMap = makeMemoryMap(memorySize)
  const bytes = new Uint8Array(MMAP_ENTRIES + memoryMap.length * MMAP_ENTRY_SIZE)
  bytes.set(packWords(MMAP_ENTRY_SIZE, MMAP_ENTRY_VERSION))
  memoryMap.forEach((range, index) => {
    writeMemoryRange(viewOf(bytes), MMAP_ENTRIES + index * MMAP_ENTRY_SIZE, range)
  })
  return bytes
}

function packFramebuffer(): Uint8Array {
  const bytes = new Uint8Array(FRAMEBUFFER_SIZE)
  writeTextFramebuffer(viewOf(bytes), 0)
  return bytes
}
