import { hex } from '../errors.js'
import { HIGH_MEMORY_START } from '../memory/layout.js'
import { formatError, truncatedError, viewOf } from './image-reading.js'

// The Linux/x86 Boot Protocol, "The Real-Mode Kernel Header":
// https://docs.kernel.org/arch/x86/boot.html#the-real-mode-kernel-header

// Offsets in the image, and in boot_params, which has a copy.
export const SETUP_SECTS = 0x1f1
const SYSSIZE = 0x1f4
export const VID_MODE = 0x1fa
export const BOOT_FLAG = 0x1fe
const JUMP = 0x200
export const HEADER = 0x202
export const VERSION = 0x206
export const TYPE_OF_LOADER = 0x210
export const LOADFLAGS = 0x211
export const CODE32_START = 0x214
export const RAMDISK_IMAGE = 0x218
export const RAMDISK_SIZE = 0x21c
export const CMD_LINE_PTR = 0x228
export const INITRD_ADDR_MAX = 0x22c
export const XLOADFLAGS = 0x236
export const CMDLINE_SIZE = 0x238
const PAYLOAD_OFFSET = 0x248
const PAYLOAD_LENGTH = 0x24c
export const SETUP_DATA = 0x250
const PREF_ADDRESS = 0x258
const INIT_SIZE = 0x260
/** Where the header of protocol 2.12 ends … */
export const HEADER_END = 0x268
/** … and what no header reaches: boot_params has other things from here on. */
const HEADER_LIMIT = 0x290

export const BOOT_FLAG_MAGIC = 0xaa55
/** "HdrS". */
export const HEADER_MAGIC = 0x5372_6448
/** The first protocol with `xloadflags`, and so with a 64-bit entry point that can be told. */
export const PROTOCOL_2_12 = 0x020c

/** `loadflags`: the protected-mode code goes above 1 MiB, so this is no zImage. */
export const LOADED_HIGH = 1 << 0
/** `xloadflags`: there is a 64-bit entry point at 0x200. */
export const XLF_KERNEL_64 = 1 << 0
/** `xloadflags`: kernel, initrd, boot_params and command line may lie above 4 GiB. */
export const XLF_CAN_BE_LOADED_ABOVE_4G = 1 << 1

const SECTOR_SIZE = 512
/** What `setup_sects` 0 stands for. */
const DEFAULT_SETUP_SECTS = 4

/** What a kernel says of itself. */
export interface SetupHeader {
  /** The header itself, from {@link SETUP_SECTS} on, as boot_params takes it. */
  readonly bytes: Uint8Array
  /** Bytes that a command line may have, without the zero that ends it. */
  readonly cmdlineSize: number
  /** The last address that a byte of the initrd may have, unless it may lie above 4 GiB. */
  readonly initrdAddrMax: number
  readonly canBeLoadedAbove4G: boolean
}

/** A bzImage. */
export interface BzImage extends SetupHeader {
  /** The protected-mode code, which has the 64-bit entry point, too. */
  readonly code: Uint8Array
  /** The kernel proper, compressed, and behind it four bytes with its size; empty where there is none. */
  readonly payload: Uint8Array
  /** Guest-physical address that it wants to be loaded at. */
  readonly prefAddress: bigint
  /** Bytes of memory from there on that the kernel needs to start. */
  readonly initSize: number
}

/** Whether an image begins like a bzImage. */
export function isBzImage(image: Uint8Array): boolean {
  if (image.length < VERSION) return false
  const view = viewOf(image)
  return view.getUint16(BOOT_FLAG, true) === BOOT_FLAG_MAGIC && view.getUint32(HEADER, true) === HEADER_MAGIC
}

/**
 * Reads and checks a bzImage. Nothing is copied, nothing unpacked.
 *
 * @throws `ERR_IMAGE_FORMAT`, `ERR_IMAGE_TRUNCATED`
 */
export function parseBzImage(image: Uint8Array): BzImage {
  if (image.length < HEADER_END) {
    throw truncatedError('the setup header of a bzImage', 0n, BigInt(HEADER_END), image.length)
  }
  if (!isBzImage(image)) {
    throw formatError(
      `a bzImage (${hex(BOOT_FLAG_MAGIC)} at ${hex(BOOT_FLAG)}, "HdrS" at ${hex(HEADER)})`,
      'another file',
      "take the file that is called vmlinuz or bzImage, or name the image's true format",
      { field: 'header' },
    )
  }
  const view = viewOf(image)
  checkKind(view)

  // The jump leads past the header; its offset counts from the byte behind it.
  const headerEnd = HEADER + view.getUint8(JUMP + 1)
  if (headerEnd < HEADER_END || headerEnd > HEADER_LIMIT) {
    throw formatError(
      `a setup header that ends from ${hex(HEADER_END)} to ${hex(HEADER_LIMIT)}`,
      `a jump to ${hex(headerEnd)}`,
      'copy or build the kernel again',
      { field: 'jump' },
    )
  }
  const start = ((view.getUint8(SETUP_SECTS) || DEFAULT_SETUP_SECTS) + 1) * SECTOR_SIZE
  const size = view.getUint32(SYSSIZE, true) * 16
  if (start + size > image.length) {
    const what = 'the protected-mode code (setup_sects, syssize)'
    throw truncatedError(what, BigInt(start), BigInt(size), image.length, 'copy the kernel again')
  }
  const code = image.subarray(start, start + size)
  const prefAddress = view.getBigUint64(PREF_ADDRESS, true)
  return {
    bytes: image.subarray(SETUP_SECTS, Math.min(headerEnd, image.length)),
    cmdlineSize: view.getUint32(CMDLINE_SIZE, true),
    initrdAddrMax: view.getUint32(INITRD_ADDR_MAX, true),
    canBeLoadedAbove4G: (view.getUint16(XLOADFLAGS, true) & XLF_CAN_BE_LOADED_ABOVE_4G) !== 0,
    code,
    payload: readPayload(view, code),
    prefAddress: prefAddress === 0n ? BigInt(HIGH_MEMORY_START) : prefAddress,
    initSize: view.getUint32(INIT_SIZE, true),
  }
}

/** Checks that it is a kernel that the 64-bit boot protocol can start. */
function checkKind(view: DataView): void {
  const version = view.getUint16(VERSION, true)
  if (version < PROTOCOL_2_12) {
    throw formatError(
      'boot protocol 2.12 or newer',
      `${version >> 8}.${String(version & 0xff).padStart(2, '0')}`,
      'take Linux 3.8 or newer',
      { field: 'version', version },
    )
  }
  if ((view.getUint8(LOADFLAGS) & LOADED_HIGH) === 0) {
    throw formatError('a bzImage (LOADED_HIGH in loadflags)', 'a zImage', 'build a bzImage (make bzImage)', {
      field: 'loadflags',
    })
  }
  if ((view.getUint16(XLOADFLAGS, true) & XLF_KERNEL_64) === 0) {
    throw formatError(
      'a 64-bit kernel (XLF_KERNEL_64 in xloadflags)',
      'a 32-bit one',
      'build it with CONFIG_64BIT, or boot its vmlinux by PVH (CONFIG_PVH)',
      { field: 'xloadflags' },
    )
  }
}

function readPayload(view: DataView, code: Uint8Array): Uint8Array {
  const offset = view.getUint32(PAYLOAD_OFFSET, true)
  const length = view.getUint32(PAYLOAD_LENGTH, true)
  if (offset + length > code.length) {
    throw formatError(
      `a payload in the ${hex(code.length)} bytes of protected-mode code`,
      `${hex(length)} bytes at ${hex(offset)}`,
      'copy or build the kernel again',
      { field: 'payload_length', offset, length },
    )
  }
  return code.subarray(offset, offset + length)
}
