import { makeMemoryMap, writeMemoryRange } from '../memory/memory-map.js'
import type { BootImage, BootOptions } from './boot-image.js'
import { ELF_REMEDY, type ElfFile, isElf, parseElf } from './elf.js'
import { elfNotes } from './elf-notes.js'
import { packTexts, placeModules } from './handover.js'
import { formatError, viewOf } from './image-reading.js'
import { alignUp, Placement, STRUCTURE_ZONES } from './placement.js'
import { CR0_ET, CR0_PE } from './processor.js'
import { checkEntryInKernel, protectedModeEntry, protectedModeState } from './protected-mode.js'

// The "x86/HVM direct boot ABI" of Xen: https://xenbits.xen.org/docs/unstable/misc/pvh.html

// xen/include/public/elfnote.h
const XEN_ELFNOTE_NAME = 'Xen'
/** The note whose descriptor is the physical address of the 32-bit entry point. */
const XEN_ELFNOTE_PHYS32_ENTRY = 18

// xen/include/public/arch-x86/hvm/start_info.h: struct hvm_start_info.
const XEN_HVM_START_MAGIC_VALUE = 0x336e_c578
/** The first version with a memory map. */
const START_INFO_VERSION = 1
const START_INFO_MAGIC = 0
const START_INFO_VERSION_FIELD = 4
const START_INFO_NR_MODULES = 12
const START_INFO_MODLIST_PADDR = 16
const START_INFO_CMDLINE_PADDR = 24
const START_INFO_RSDP_PADDR = 32
const START_INFO_MEMMAP_PADDR = 40
const START_INFO_MEMMAP_ENTRIES = 48
const START_INFO_SIZE = 56

// struct hvm_modlist_entry.
const MODLIST_PADDR = 0
const MODLIST_SIZE = 8
const MODLIST_CMDLINE_PADDR = 16
const MODLIST_ENTRY_SIZE = 32

/** struct hvm_memmap_table_entry: a range and a reserved word. */
const MEMMAP_ENTRY_SIZE = 24

/**
 * Whether an image is an ELF file with a PVH entry point.
 *
 * @throws `ERR_IMAGE_FORMAT`, `ERR_IMAGE_TRUNCATED` for a damaged ELF file
 */
export function isPvh(image: Uint8Array): boolean {
  return isElf(image) && findEntryNote(parseElf(image)) !== undefined
}

/**
 * Loads an ELF kernel, of either class, by Xen's PVH boot protocol: it starts in 32-bit protected mode, at
 * the entry point in its note, with the address of `hvm_start_info` in EBX. `e_entry` does not matter.
 *
 * @throws `ERR_IMAGE_FORMAT`, `ERR_IMAGE_TRUNCATED`, `ERR_IMAGE_TOO_LARGE`, `ERR_BOOT_NO_ROOM`
 */
export function loadPvh(image: Uint8Array, options: BootOptions): BootImage {
  const elf = parseElf(image)
  const descriptor = findEntryNote(elf)
  if (descriptor === undefined) {
    throw formatError(
      "an ELF note XEN_ELFNOTE_PHYS32_ENTRY (name 'Xen', type 18) in a PT_NOTE segment",
      'none',
      "keep its section (.note.*) in the linker script, or name the image 'elf'",
      { field: 'n_type' },
    )
  }
  const placement = new Placement(options.memorySize)
  placement.claim(elf.segments, ELF_REMEDY)
  const entry = readEntry(descriptor)
  checkEntryInKernel(entry, placement, 'desc', 'let XEN_ELFNOTE_PHYS32_ENTRY have its physical address')

  const startInfo = placeStartInfo(placement, options)
  // PE is to be the only writable bit set in CR0 (ET cannot be cleared), and 0 the base in TR.
  const state = protectedModeState(
    placement,
    entry,
    { rbx: BigInt(startInfo) },
    { cr0: CR0_PE | CR0_ET, tssBase: 0 },
  )
  return { format: 'pvh', mode: 'protected', entry, segments: placement.segments, state }
}

/** The descriptor of the note with the entry point. */
function findEntryNote(elf: ElfFile): Uint8Array | undefined {
  for (const { name, type, descriptor } of elfNotes(elf)) {
    if (name === XEN_ELFNOTE_NAME && type === XEN_ELFNOTE_PHYS32_ENTRY) return descriptor
  }
  return undefined
}

/** The entry point: 4 bytes says the ABI, 8 has Linux's 64-bit kernel. */
function readEntry(descriptor: Uint8Array): number {
  const view = viewOf(descriptor)
  if (view.byteLength === 4) return view.getUint32(0, true)
  if (view.byteLength === 8) return protectedModeEntry(view.getBigUint64(0, true), 'PVH', 'desc')
  throw formatError(
    'a descriptor of 4 or 8 bytes in the note XEN_ELFNOTE_PHYS32_ENTRY',
    `${view.byteLength} bytes`,
    'make it a .long with the physical address of the entry point',
    { field: 'n_descsz' },
  )
}

/** Places modules and `hvm_start_info` with all that it points to, and returns its address. */
function placeStartInfo(placement: Placement, options: BootOptions): number {
  const initrd = options.initrd === undefined ? [] : [{ bytes: options.initrd, cmdline: '' }]
  const modules = placeModules(placement, [...initrd, ...options.modules])
  const memoryMap = makeMemoryMap(options.memorySize)
  const texts = packTexts([options.cmdline, ...modules.map(({ cmdline }) => cmdline)])

  const modlistOffset = START_INFO_SIZE
  const memmapOffset = modlistOffset + modules.length * MODLIST_ENTRY_SIZE
  const textsOffset = memmapOffset + memoryMap.length * MEMMAP_ENTRY_SIZE
  const size = alignUp(textsOffset + texts.bytes.length, 8)

  return placement.place({
    name: 'boot information',
    size,
    zones: STRUCTURE_ZONES,
    fill: (address) => {
      const bytes = new Uint8Array(size)
      const view = viewOf(bytes)
      const setAddress = (at: number, value: number) => view.setBigUint64(at, BigInt(value), true)
      const text = (index: number) => address + textsOffset + texts.offsets[index]!

      view.setUint32(START_INFO_MAGIC, XEN_HVM_START_MAGIC_VALUE, true)
      view.setUint32(START_INFO_VERSION_FIELD, START_INFO_VERSION, true)
      setAddress(START_INFO_CMDLINE_PADDR, text(0))
      setAddress(START_INFO_RSDP_PADDR, options.rsdpAddress ?? 0)

      view.setUint32(START_INFO_NR_MODULES, modules.length, true)
      // An address of 0 stands for "not present".
      setAddress(START_INFO_MODLIST_PADDR, modules.length === 0 ? 0 : address + modlistOffset)
      modules.forEach((module, index) => {
        const entry = modlistOffset + index * MODLIST_ENTRY_SIZE
        setAddress(entry + MODLIST_PADDR, module.address)
        setAddress(entry + MODLIST_SIZE, module.size)
        setAddress(entry + MODLIST_CMDLINE_PADDR, text(index + 1))
      })

      setAddress(START_INFO_MEMMAP_PADDR, address + memmapOffset)
      view.setUint32(START_INFO_MEMMAP_ENTRIES, memoryMap.length, true)
      memoryMap.forEach((range, index) => {
        writeMemoryRange(view, memmapOffset + index * MEMMAP_ENTRY_SIZE, range)
      })
      bytes.set(texts.bytes, textsOffset)
      return bytes
    },
  })
}
