import { hex } from '../errors.js'
import { basicMemory, MEMORY_RANGE_SIZE, makeMemoryMap, writeMemoryRange } from '../memory/memory-map.js'
import type { BootImage, BootOptions } from './boot-image.js'
import { isElf, parseElf } from './elf.js'
import { packTexts, placeModules } from './handover.js'
import { formatError, truncatedError, viewOf } from './image-reading.js'
import { BOOT_LOADER_NAME, claimByAddresses, claimElf, writeTextFramebuffer } from './multiboot-common.js'
import { alignUp, Placement, STRUCTURE_ZONES } from './placement.js'
import { checkEntryInKernel, protectedModeState } from './protected-mode.js'

// Multiboot Specification 0.6.96: https://www.gnu.org/software/grub/manual/multiboot/multiboot.html

// 3.1 OS image format: the header.
/** The header lies within this many bytes … */
const MULTIBOOT_SEARCH = 8192
/** … at a multiple of this. */
const MULTIBOOT_HEADER_ALIGN = 4
const MULTIBOOT_HEADER_MAGIC = 0x1bad_b002

// Offsets in the header (3.1.1 to 3.1.3).
const HEADER_MAGIC = 0
const HEADER_FLAGS = 4
const HEADER_CHECKSUM = 8
const HEADER_HEADER_ADDR = 12
const HEADER_LOAD_ADDR = 16
const HEADER_LOAD_END_ADDR = 20
const HEADER_BSS_END_ADDR = 24
const HEADER_ENTRY_ADDR = 28
/** Bytes of the header without its optional fields, with the address fields, and with the graphics fields. */
const HEADER_SIZE = 12
const HEADER_SIZE_WITH_ADDRESSES = 32
const HEADER_SIZE_WITH_GRAPHICS = 48

// 3.1.2 The magic fields: `flags`.
/** The graphics fields are valid. They are a wish; the answer is always the text screen. */
const MULTIBOOT_VIDEO_MODE = 1 << 2
/** The address fields are valid, and hold instead of those of an executable's own header. */
const MULTIBOOT_AOUT_KLUDGE = 1 << 16
/** Bits 0 to 15 are requirements. Those known: page-aligned modules, memory information, video mode. */
const REQUIRED_FLAGS = 0xffff
const KNOWN_REQUIRED_FLAGS = 0x7

// 3.2 Machine state.
/** In EAX: a Multiboot loader was here. */
export const MULTIBOOT_BOOTLOADER_MAGIC = 0x2bad_b002

// 3.3 Boot information format: offsets and bits of `flags`.
const INFO_FLAGS = 0
const INFO_MEM_LOWER = 4
const INFO_MEM_UPPER = 8
const INFO_CMDLINE = 16
const INFO_MODS_COUNT = 20
const INFO_MODS_ADDR = 24
const INFO_MMAP_LENGTH = 44
const INFO_MMAP_ADDR = 48
const INFO_BOOT_LOADER_NAME = 64
const INFO_FRAMEBUFFER_ADDR = 88
/** 116, and so that what follows is aligned to 8. */
const INFO_SIZE = 120

const INFO_HAS_MEMORY = 1 << 0
const INFO_HAS_CMDLINE = 1 << 2
const INFO_HAS_MODS = 1 << 3
const INFO_HAS_MMAP = 1 << 6
const INFO_HAS_BOOT_LOADER_NAME = 1 << 9
const INFO_HAS_FRAMEBUFFER = 1 << 12

// A module's entry: mod_start, mod_end, string, reserved.
const MODULE_SIZE = 16

// An entry of the memory map: size (of the rest), base_addr, length, type.
const MMAP_ENTRY_SIZE_FIELD = 4
const MMAP_ENTRY_SIZE = MMAP_ENTRY_SIZE_FIELD + MEMORY_RANGE_SIZE

interface MultibootHeader {
  /** Where in the image it is. */
  readonly offset: number
  readonly flags: number
}

/**
 * Whether an image has a Multiboot header that tells how to load it: any in an ELF file, else one with address
 * fields. (A boot sector with an ELF kernel behind it has the kernel's header, but is not to be loaded by it.)
 */
export function isMultiboot(image: Uint8Array): boolean {
  const header = findHeader(image)
  return header !== undefined && (isElf(image) || (header.flags & MULTIBOOT_AOUT_KLUDGE) !== 0)
}

/**
 * Loads a Multiboot 1 kernel: by its address fields if it has them, else as the ELF file it is. An ELF64 file,
 * too, starts in 32-bit protected mode, at the physical address of its entry, as with GRUB.
 *
 * @throws `ERR_IMAGE_FORMAT`, `ERR_IMAGE_TRUNCATED`, `ERR_IMAGE_TOO_LARGE`, `ERR_BOOT_NO_ROOM`
 */
export function loadMultiboot(image: Uint8Array, options: BootOptions): BootImage {
  const header = findHeader(image)
  if (header === undefined) {
    throw formatError(
      `a Multiboot header (magic ${hex(MULTIBOOT_HEADER_MAGIC)}, aligned to 4, in the first 8192 bytes)`,
      'none with a right checksum',
      "keep its section first in the linker script, or name the image's true format",
      { field: 'magic' },
    )
  }
  checkHeader(image, header)

  const placement = new Placement(options.memorySize)
  const entry =
    (header.flags & MULTIBOOT_AOUT_KLUDGE) !== 0
      ? claimByAddressFields(image, header, placement)
      : claimElfFile(image, header, placement)

  const info = placeInformation(placement, options)
  const state = protectedModeState(placement, entry, {
    rax: BigInt(MULTIBOOT_BOOTLOADER_MAGIC),
    rbx: BigInt(info),
  })
  return { format: 'multiboot', mode: 'protected', entry, segments: placement.segments, state }
}

/** The first header in the image whose checksum is right (3.1). */
function findHeader(image: Uint8Array): MultibootHeader | undefined {
  const view = viewOf(image)
  const last = Math.min(image.length, MULTIBOOT_SEARCH) - HEADER_SIZE
  for (let offset = 0; offset <= last; offset += MULTIBOOT_HEADER_ALIGN) {
    if (view.getUint32(offset + HEADER_MAGIC, true) !== MULTIBOOT_HEADER_MAGIC) continue
    const flags = view.getUint32(offset + HEADER_FLAGS, true)
    const checksum = view.getUint32(offset + HEADER_CHECKSUM, true)
    if ((MULTIBOOT_HEADER_MAGIC + flags + checksum) % 2 ** 32 === 0) return { offset, flags }
  }
  return undefined
}

function checkHeader(image: Uint8Array, { offset, flags }: MultibootHeader): void {
  const unknown = flags & REQUIRED_FLAGS & ~KNOWN_REQUIRED_FLAGS
  if (unknown !== 0) {
    throw formatError(
      'no required flags in the Multiboot header but bits 0 to 2',
      hex(unknown),
      'clear them, and correct the checksum',
      { field: 'flags', flags },
    )
  }
  const size =
    (flags & MULTIBOOT_VIDEO_MODE) !== 0
      ? HEADER_SIZE_WITH_GRAPHICS
      : (flags & MULTIBOOT_AOUT_KLUDGE) !== 0
        ? HEADER_SIZE_WITH_ADDRESSES
        : HEADER_SIZE
  if (offset + size > image.length) {
    throw truncatedError('a Multiboot header', BigInt(offset), BigInt(size), image.length)
  }
  if (offset + size > MULTIBOOT_SEARCH) {
    const expected = `a Multiboot header of ${size} bytes within the first ${MULTIBOOT_SEARCH}`
    throw formatError(expected, `one at offset ${offset}`, 'move its section to the front', {
      field: 'magic',
    })
  }
}

function claimElfFile(image: Uint8Array, { flags }: MultibootHeader, placement: Placement): number {
  if (!isElf(image)) {
    throw formatError(
      'an ELF file, or address fields in the Multiboot header (bit 16 of its flags)',
      `flags ${hex(flags)} in a file that is not ELF`,
      "link the kernel as ELF, set the fields, or name it 'flat'",
      { field: 'flags', flags },
    )
  }
  return claimElf(parseElf(image), placement)
}

/** Loads by the header's address fields (3.1.3), all of which are physical addresses. */
function claimByAddressFields(image: Uint8Array, { offset }: MultibootHeader, placement: Placement): number {
  const view = viewOf(image)
  const field = (at: number) => view.getUint32(offset + at, true)
  const source = 'the address fields of the Multiboot header'
  const addresses = {
    headerAddr: field(HEADER_HEADER_ADDR),
    loadAddr: field(HEADER_LOAD_ADDR),
    loadEndAddr: field(HEADER_LOAD_END_ADDR),
    bssEndAddr: field(HEADER_BSS_END_ADDR),
    source,
  }
  claimByAddresses(image, offset, addresses, placement)
  const entryAddr = field(HEADER_ENTRY_ADDR)
  checkEntryInKernel(entryAddr, placement, 'entry_addr', `correct ${source}`)
  return entryAddr
}

/** Places modules and boot information (3.3), and returns the information's address. */
function placeInformation(placement: Placement, options: BootOptions): number {
  const modules = placeModules(placement, options.modules)
  const memoryMap = makeMemoryMap(options.memorySize)
  const texts = packTexts([options.cmdline, BOOT_LOADER_NAME, ...modules.map(({ cmdline }) => cmdline)])

  const modulesOffset = INFO_SIZE
  const memoryMapOffset = modulesOffset + modules.length * MODULE_SIZE
  const textsOffset = memoryMapOffset + memoryMap.length * MMAP_ENTRY_SIZE
  const size = alignUp(textsOffset + texts.bytes.length, 8)

  return placement.place({
    name: 'boot information',
    size,
    zones: STRUCTURE_ZONES,
    fill: (address) => {
      const bytes = new Uint8Array(size)
      const view = new DataView(bytes.buffer)
      const set = (at: number, value: number) => view.setUint32(at, value, true)
      const text = (index: number) => address + textsOffset + texts.offsets[index]!

      set(
        INFO_FLAGS,
        INFO_HAS_MEMORY |
          INFO_HAS_CMDLINE |
          INFO_HAS_MODS |
          INFO_HAS_MMAP |
          INFO_HAS_BOOT_LOADER_NAME |
          INFO_HAS_FRAMEBUFFER,
      )
      const { lower, upper } = basicMemory(options.memorySize)
      set(INFO_MEM_LOWER, lower)
      set(INFO_MEM_UPPER, upper)
      set(INFO_CMDLINE, text(0))
      set(INFO_BOOT_LOADER_NAME, text(1))

      set(INFO_MODS_COUNT, modules.length)
      set(INFO_MODS_ADDR, address + modulesOffset)
      modules.forEach((module, index) => {
        const entry = modulesOffset + index * MODULE_SIZE
        set(entry, module.address)
        set(entry + 4, module.address + module.size)
        set(entry + 8, text(index + 2))
      })

      set(INFO_MMAP_LENGTH, memoryMap.length * MMAP_ENTRY_SIZE)
      set(INFO_MMAP_ADDR, address + memoryMapOffset)
      memoryMap.forEach((range, index) => {
        const entry = memoryMapOffset + index * MMAP_ENTRY_SIZE
        set(entry, MEMORY_RANGE_SIZE)
        writeMemoryRange(view, entry + MMAP_ENTRY_SIZE_FIELD, range)
      })

      writeTextFramebuffer(view, INFO_FRAMEBUFFER_ADDR)
      bytes.set(texts.bytes, textsOffset)
      return bytes
    },
  })
}
