import { invalidArgument } from '../errors.js'
import type { BootImage, BootOptions } from './boot-image.js'
import { type BootParams, placeBootParams } from './boot-params.js'
import { type ElfFile, isElf, parseElf, physicalEntry } from './elf.js'
import { elfNotes } from './elf-notes.js'
import { formatError } from './image-reading.js'
import { longModeState } from './long-mode.js'
import { Placement } from './placement.js'
import {
  BOOT_FLAG,
  BOOT_FLAG_MAGIC,
  CMDLINE_SIZE,
  HEADER,
  HEADER_END,
  HEADER_MAGIC,
  INITRD_ADDR_MAX,
  LOADED_HIGH,
  LOADFLAGS,
  PROTOCOL_2_12,
  parseBzImage,
  SETUP_SECTS,
  type SetupHeader,
  VERSION,
  XLF_CAN_BE_LOADED_ABOVE_4G,
  XLF_KERNEL_64,
  XLOADFLAGS,
} from './setup-header.js'

// The Linux/x86 Boot Protocol, "64-bit Boot Protocol": https://docs.kernel.org/arch/x86/boot.html#id1

/** The selectors __BOOT_CS and __BOOT_DS. */
const BOOT_SELECTORS = { code: 0x10, data: 0x18 }
/** The 64-bit entry point of a bzImage: this far from the start of its protected-mode code. */
const ENTRY_64 = 0x200

// The notes of a vmlinux: include/linux/build-salt.h (since Linux 4.19), xen/include/public/elfnote.h (CONFIG_XEN).
const LINUX_NOTE_NAME = 'Linux'
const LINUX_ELFNOTE_BUILD_SALT = 0x100
const XEN_NOTE_NAME = 'Xen'
const XEN_ELFNOTE_GUEST_OS = 6

/** A vmlinux has no header to copy; these are its numbers since Linux 3.8. */
const VMLINUX_CMDLINE_SIZE = 2047
const VMLINUX_INITRD_ADDR_MAX = 0x7fff_ffff

/**
 * Whether an image is a 64-bit Linux `vmlinux`: an ELF file with a note of its own (any since Linux 4.19), or with the
 * one in which a kernel tells Xen its name.
 *
 * @throws `ERR_IMAGE_FORMAT`, `ERR_IMAGE_TRUNCATED` for a damaged ELF file
 */
export function isVmlinux(image: Uint8Array): boolean {
  if (!isElf(image)) return false
  const elf = parseElf(image)
  if (elf.bits !== 64) return false
  for (const { name, type, descriptor } of elfNotes(elf)) {
    if (name === LINUX_NOTE_NAME && type === LINUX_ELFNOTE_BUILD_SALT) return true
    if (name !== XEN_NOTE_NAME || type !== XEN_ELFNOTE_GUEST_OS) continue
    if (new TextDecoder('latin1').decode(descriptor).replace(/\0.*$/s, '') === 'linux') return true
  }
  return false
}

/**
 * Loads a Linux `vmlinux` by its 64-bit entry point, startup_64, with the address of boot_params in RSI.
 *
 * @throws `ERR_IMAGE_FORMAT`, `ERR_IMAGE_TRUNCATED`, `ERR_IMAGE_TOO_LARGE`, `ERR_BOOT_NO_ROOM`, and
 *   `ERR_INVALID_ARGUMENT` for a command line that is too long
 */
export function loadVmlinux(image: Uint8Array, options: BootOptions): BootImage {
  return start('linux', parseElf(image), options, vmlinuxHeader())
}

/**
 * Loads a bzImage by the 64-bit boot protocol: what its payload unpacked to (`options.payload`) as a `vmlinux` is
 * loaded; without that, its own code, which unpacks the payload in the guest.
 *
 * @throws as {@link loadVmlinux}
 */
export function loadBzImage(image: Uint8Array, options: BootOptions): BootImage {
  const bzImage = parseBzImage(image)
  if (options.payload !== undefined) return start('bzimage', parseElf(options.payload), options, bzImage)

  const { code, prefAddress, initSize } = bzImage
  if (code.length <= ENTRY_64) {
    throw formatError(
      `protected-mode code of more than ${ENTRY_64} bytes, where its 64-bit entry point is`,
      `${code.length}`,
      'copy the kernel again',
      { field: 'syssize' },
    )
  }
  const placement = beginPlacement(options)
  const size = Math.max(initSize, code.length)
  const kernel = { name: 'the kernel', address: prefAddress, bytes: code, size: BigInt(size) }
  placement.claim([kernel], 'take a kernel that is built for a lower address (CONFIG_PHYSICAL_START)')
  const address = Number(prefAddress)
  const params = { header: bzImage, kernelEnd: address + size, code32Start: address }
  return finish('bzimage', placement, address + ENTRY_64, options, params)
}

function start(
  format: 'bzimage' | 'linux',
  elf: ElfFile,
  options: BootOptions,
  header: SetupHeader,
): BootImage {
  if (elf.bits !== 64) {
    throw formatError('a 64-bit kernel (ELF64)', 'a 32-bit one', 'boot its vmlinux by PVH (CONFIG_PVH)', {
      field: 'EI_CLASS',
    })
  }
  const placement = beginPlacement(options)
  placement.claim(elf.segments, 'take a kernel that is built for a lower address (CONFIG_PHYSICAL_START)')
  const kernelEnd = Math.max(...placement.segments.map(({ address, size }) => address + size))
  return finish(format, placement, Number(physicalEntry(elf)), options, { header, kernelEnd })
}

function beginPlacement({ memorySize, modules }: BootOptions): Placement {
  if (modules.length > 0) {
    throw invalidArgument('modules', 'none for Linux, which takes an initrd,', modules)
  }
  return new Placement(memorySize)
}

function finish(
  format: 'bzimage' | 'linux',
  placement: Placement,
  entry: number,
  options: BootOptions,
  params: BootParams,
): BootImage {
  const rsi = BigInt(placeBootParams(placement, options, params))
  const state = longModeState(placement, options.memorySize, BigInt(entry), { rsi }, BOOT_SELECTORS)
  return { format, mode: 'long', entry, segments: placement.segments, state }
}

/** The header that the build puts before a vmlinux, with what a kernel looks at in its boot_params. */
function vmlinuxHeader(): SetupHeader {
  const bytes = new Uint8Array(HEADER_END)
  const view = new DataView(bytes.buffer)
  view.setUint16(BOOT_FLAG, BOOT_FLAG_MAGIC, true)
  view.setUint32(HEADER, HEADER_MAGIC, true)
  view.setUint16(VERSION, PROTOCOL_2_12, true)
  view.setUint8(LOADFLAGS, LOADED_HIGH)
  view.setUint32(INITRD_ADDR_MAX, VMLINUX_INITRD_ADDR_MAX, true)
  view.setUint16(XLOADFLAGS, XLF_KERNEL_64 | XLF_CAN_BE_LOADED_ABOVE_4G, true)
  view.setUint32(CMDLINE_SIZE, VMLINUX_CMDLINE_SIZE, true)
  return {
    bytes: bytes.subarray(SETUP_SECTS),
    cmdlineSize: VMLINUX_CMDLINE_SIZE,
    initrdAddrMax: VMLINUX_INITRD_ADDR_MAX,
    canBeLoadedAbove4G: true,
  }
}
