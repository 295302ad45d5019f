import { randomFillSync } from 'node:crypto'
import { NodevisorError } from '../errors.js'
import { HIGH_MEMORY_START, MMIO_HOLE_END, MMIO_HOLE_START, PAGE_SIZE, ramRegions } from '../memory/layout.js'
import { basicMemory, MEMORY_RANGE_SIZE, makeMemoryMap, writeMemoryRange } from '../memory/memory-map.js'
import type { BootOptions } from './boot-image.js'
import { packTexts } from './handover.js'
import { viewOf } from './image-reading.js'
import { alignUp, type Placement, STRUCTURE_ZONES, type Zone } from './placement.js'
import {
  CMD_LINE_PTR,
  CODE32_START,
  RAMDISK_IMAGE,
  RAMDISK_SIZE,
  SETUP_DATA,
  SETUP_SECTS,
  type SetupHeader,
  TYPE_OF_LOADER,
  VID_MODE,
} from './setup-header.js'

// Zero Page: https://docs.kernel.org/arch/x86/zero-page.html. struct boot_params, struct setup_data: bootparam.h and
// setup_data.h in arch/x86/include/uapi/asm of Linux.

const BOOT_PARAMS_SIZE = 0x1000
const ACPI_RSDP_ADDR = 0x070
const EXT_RAMDISK_IMAGE = 0x0c0
const EXT_RAMDISK_SIZE = 0x0c4
const ALT_MEM_K = 0x1e0
const E820_ENTRIES = 0x1e8
const E820_TABLE = 0x2d0

// struct screen_info, at the start: include/uapi/linux/screen_info.h.
const EXT_MEM_K = 0x02
const ORIG_VIDEO_MODE = 0x06
const ORIG_VIDEO_COLS = 0x07
const ORIG_VIDEO_EGA_BX = 0x0a
const ORIG_VIDEO_LINES = 0x0e
const ORIG_VIDEO_IS_VGA = 0x0f
const ORIG_VIDEO_POINTS = 0x10

/** `type_of_loader` of a loader without a number of its own. */
const LOADER_UNDEFINED = 0xff
/** `vid_mode`: what the screen shows already. */
const VIDEO_MODE_NORMAL = 0xffff
/** What a BIOS says of a VGA's memory: 256 KiB. */
const VGA_MEMORY_256K = 3

// struct setup_data: next, type, len, and then the data.
const SETUP_DATA_TYPE = 8
const SETUP_DATA_LEN = 12
const SETUP_DATA_HEADER_SIZE = 16
/** Random bytes, which the kernel mixes into its own and erases. */
const SETUP_RNG_SEED = 9
const RNG_SEED_SIZE = 32

/** What a kernel is told beside what {@link BootOptions} says. */
export interface BootParams {
  readonly header: SetupHeader
  /** End of the memory that the kernel needs to start: the initrd goes behind it where it can. */
  readonly kernelEnd: number
  /** Where a bzImage's own code was loaded; undefined where it is not. */
  readonly code32Start?: number
}

/** Guest memory that something takes. */
interface Placed {
  readonly address: number
  /** In bytes; 0 for nothing. */
  readonly size: number
}

/**
 * Places the initrd and boot_params with all that it points to: command line and random seed.
 *
 * @returns the address of boot_params
 * @throws `ERR_INVALID_ARGUMENT` for a command line that is too long, `ERR_IMAGE_TOO_LARGE` for such an initrd,
 *   `ERR_BOOT_NO_ROOM`
 */
export function placeBootParams(placement: Placement, options: BootOptions, params: BootParams): number {
  const cmdline = packTexts([options.cmdline]).bytes
  checkCmdline(cmdline.length - 1, params.header)
  const initrd = placeInitrd(placement, options, params)

  const setupDataOffset = alignUp(BOOT_PARAMS_SIZE + cmdline.length, 8)
  const size = setupDataOffset + SETUP_DATA_HEADER_SIZE + RNG_SEED_SIZE
  return placement.place({
    name: 'boot information',
    size,
    zones: STRUCTURE_ZONES,
    fill: (address) => {
      const bytes = new Uint8Array(size)
      const view = viewOf(bytes)
      bytes.set(params.header.bytes, SETUP_SECTS)
      view.setUint8(TYPE_OF_LOADER, LOADER_UNDEFINED)
      view.setUint16(VID_MODE, VIDEO_MODE_NORMAL, true)
      if (params.code32Start !== undefined) view.setUint32(CODE32_START, params.code32Start % 2 ** 32, true)
      view.setUint32(CMD_LINE_PTR, address + BOOT_PARAMS_SIZE, true)
      writeInitrd(view, initrd)
      writeScreenInfo(view)
      writeMemory(view, options.memorySize)
      view.setBigUint64(ACPI_RSDP_ADDR, BigInt(options.rsdpAddress ?? 0), true)
      bytes.set(cmdline, BOOT_PARAMS_SIZE)

      view.setBigUint64(SETUP_DATA, BigInt(address + setupDataOffset), true)
      view.setUint32(setupDataOffset + SETUP_DATA_TYPE, SETUP_RNG_SEED, true)
      view.setUint32(setupDataOffset + SETUP_DATA_LEN, RNG_SEED_SIZE, true)
      randomFillSync(bytes, setupDataOffset + SETUP_DATA_HEADER_SIZE, RNG_SEED_SIZE)
      return bytes
    },
  })
}

/** Linux cuts off what is too long, and says nothing. */
function checkCmdline(length: number, { cmdlineSize }: SetupHeader): void {
  if (length <= cmdlineSize) return
  throw new NodevisorError(
    'ERR_INVALID_ARGUMENT',
    `Expected a command line of at most ${cmdlineSize} bytes, what this kernel takes, but received ${length} ` +
      '(virtio_mmio.device=… for each virtio device included); shorten it, or leave those out ' +
      '(virtioParameters: false), as ACPI tells the same',
    { argument: 'cmdline', received: length, limit: cmdlineSize },
  )
}

/** Behind the kernel, so that it may use the memory before it; else wherever there is room. */
function placeInitrd(placement: Placement, options: BootOptions, { header, kernelEnd }: BootParams): Placed {
  const { initrd, memorySize } = options
  if (initrd === undefined || initrd.length === 0) return { address: 0, size: 0 }
  const lowEnd = Math.min(MMIO_HOLE_START, header.initrdAddrMax + 1)
  const ramEnd = Math.max(...ramRegions(memorySize).map(({ start, size }) => start + size))
  const zones: Zone[] = [
    { start: kernelEnd, end: lowEnd },
    { start: HIGH_MEMORY_START, end: lowEnd },
  ]
  if (header.canBeLoadedAbove4G && ramEnd > MMIO_HOLE_END) zones.push({ start: MMIO_HOLE_END, end: ramEnd })
  const address = placement.place({
    name: 'initrd',
    size: alignUp(initrd.length, PAGE_SIZE),
    zones,
    fill: () => initrd,
    code: 'ERR_IMAGE_TOO_LARGE',
  })
  return { address, size: initrd.length }
}

/** Both fields have a second one for bits 32 to 63. */
function writeInitrd(view: DataView, { address, size }: Placed): void {
  view.setUint32(RAMDISK_IMAGE, address % 2 ** 32, true)
  view.setUint32(EXT_RAMDISK_IMAGE, Math.floor(address / 2 ** 32), true)
  view.setUint32(RAMDISK_SIZE, size % 2 ** 32, true)
  view.setUint32(EXT_RAMDISK_SIZE, Math.floor(size / 2 ** 32), true)
}

/** The text screen: mode 3, 80×25 characters of 16 lines. */
function writeScreenInfo(view: DataView): void {
  view.setUint8(ORIG_VIDEO_MODE, 3)
  view.setUint8(ORIG_VIDEO_COLS, 80)
  view.setUint16(ORIG_VIDEO_EGA_BX, VGA_MEMORY_256K, true)
  view.setUint8(ORIG_VIDEO_LINES, 25)
  view.setUint8(ORIG_VIDEO_IS_VGA, 1)
  view.setUint16(ORIG_VIDEO_POINTS, 16, true)
}

function writeMemory(view: DataView, memorySize: number): void {
  const { upper } = basicMemory(memorySize)
  view.setUint16(EXT_MEM_K, Math.min(upper, 0xffff), true)
  view.setUint32(ALT_MEM_K, upper, true)
  const memoryMap = makeMemoryMap(memorySize)
  view.setUint8(E820_ENTRIES, memoryMap.length)
  memoryMap.forEach((range, index) => {
    writeMemoryRange(view, E820_TABLE + index * MEMORY_RANGE_SIZE, range)
  })
}
