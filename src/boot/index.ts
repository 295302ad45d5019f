import { closest } from 'fastest-levenshtein'
import { invalidArgument, NodevisorError, show } from '../errors.js'
import type { BootImage, BootOptions, CpuMode } from './boot-image.js'
import { isElf, loadElf } from './elf.js'
import { loadFlat } from './flat.js'
import { isVmlinux, loadBzImage, loadVmlinux } from './linux.js'
import { isMultiboot, loadMultiboot } from './multiboot.js'
import { isMultiboot2, loadMultiboot2 } from './multiboot2.js'
import { isPvh, loadPvh } from './pvh.js'
import { isBzImage } from './setup-header.js'

export type {
  BootImage,
  BootModule,
  BootOptions,
  BootSegment,
  CpuMode,
  CpuState,
  ImageFormat,
} from './boot-image.js'

/** The formats that an image can be named as. */
export const IMAGE_FORMATS = [
  'flat',
  'elf',
  'elf32',
  'elf64',
  'multiboot',
  'multiboot2',
  'pvh',
  'bzimage',
  'linux',
] as const

/** The name of an image format: `elf32` and `elf64` are `elf` that insists on a class. */
export type NamedImageFormat = (typeof IMAGE_FORMATS)[number]

/** The modes that a flat image can start in. */
export const CPU_MODES: readonly CpuMode[] = ['real', 'protected', 'long']

/** What {@link loadImage} is told. */
export interface LoadOptions extends BootOptions {
  /** One of {@link IMAGE_FORMATS}; detected when undefined. */
  readonly format?: string | undefined
}

/**
 * Makes of a kernel image what a machine needs to start it: bytes at addresses and a vCPU state.
 *
 * Without a format, an ELF file is `multiboot` if it has a Multiboot 1 header, else `multiboot2` if it has a
 * Multiboot 2 header, else `linux` if it is a 64-bit `vmlinux`, else `pvh` if it has a note with a PVH entry point, else
 * `elf`. Any other file is `bzimage` if it has a Linux setup header, else `multiboot` if it has a Multiboot 1 header with address fields, else `multiboot2` if it has a Multiboot 2
 * header with an address tag, else `flat`.
 *
 * So a kernel that speaks a boot protocol is told what that protocol tells. Where it speaks several, each would
 * do, but the order has to be certain: Multiboot 1 first, so that a kernel starts here as with QEMU's `-kernel`;
 * PVH last, since a kernel that has its note beside a Multiboot header has it for Xen, and Linux starts everywhere by
 * its 64-bit entry point, but not by PVH where KVM has no paging in 32-bit mode (PVM). To have another, name it.
 *
 * The image's bytes are not copied: segments refer to them.
 *
 * @throws `ERR_INVALID_ARGUMENT` for options that contradict the format, `ERR_MEMORY_SIZE`, `ERR_IMAGE_FORMAT`,
 *   `ERR_IMAGE_TRUNCATED`, `ERR_IMAGE_TOO_LARGE`, `ERR_BOOT_NO_ROOM`
 */
export function loadImage(image: Uint8Array, options: LoadOptions): BootImage {
  if (!(image instanceof Uint8Array)) throw invalidArgument('image', 'a Uint8Array', image)
  if (image.length === 0) {
    throw new NodevisorError('ERR_IMAGE_FORMAT', 'Expected a kernel image but received an empty one', {
      imageSize: 0,
    })
  }
  checkChoice('mode', CPU_MODES, options.mode)
  checkChoice('format', IMAGE_FORMATS, options.format)

  const format = (options.format as NamedImageFormat | undefined) ?? detectFormat(image)
  if (options.at !== undefined && format !== 'flat') {
    throw new NodevisorError(
      'ERR_INVALID_ARGUMENT',
      `Expected no load address (at) for an image of format '${format}', which has its own, but received ` +
        `${show(options.at)}; leave it out, or name the format 'flat'`,
      { argument: 'at', received: options.at, format },
    )
  }
  if (options.initrd !== undefined && !INITRD_FORMATS.includes(format)) {
    throw new NodevisorError(
      'ERR_INVALID_ARGUMENT',
      `Expected an initrd only for Linux (${INITRD_FORMATS.join(', ')}) but the image is of format '${format}'; ` +
        'hand it over as a module',
      { argument: 'initrd', format },
    )
  }
  const loaded = LOADERS[format](image, options)
  if (options.mode !== undefined && options.mode !== loaded.mode) {
    throw new NodevisorError(
      'ERR_INVALID_ARGUMENT',
      `Expected mode '${loaded.mode}' or none for this image of format '${format}' but received ` +
        `'${options.mode}'; leave it out, or name another format`,
      { argument: 'mode', received: options.mode, format },
    )
  }
  return loaded
}

type Loader = (image: Uint8Array, options: BootOptions) => BootImage

const LOADERS: Readonly<Record<NamedImageFormat, Loader>> = {
  flat: loadFlat,
  elf: loadElf,
  elf32: (image, options) => loadElf(image, options, 32),
  elf64: (image, options) => loadElf(image, options, 64),
  multiboot: loadMultiboot,
  multiboot2: loadMultiboot2,
  pvh: loadPvh,
  bzimage: loadBzImage,
  linux: loadVmlinux,
}

/** Formats that Linux comes in, which has a place for an initrd. */
const INITRD_FORMATS: readonly NamedImageFormat[] = ['bzimage', 'linux', 'pvh']

/** What an image is taken for when no format is named. @throws `ERR_IMAGE_*` for an ELF file that is damaged */
export function detectFormat(image: Uint8Array): NamedImageFormat {
  if (isBzImage(image)) return 'bzimage'
  if (isMultiboot(image)) return 'multiboot'
  if (isMultiboot2(image)) return 'multiboot2'
  if (isVmlinux(image)) return 'linux'
  if (isPvh(image)) return 'pvh'
  return isElf(image) ? 'elf' : 'flat'
}

function checkChoice(name: string, choices: readonly string[], received: unknown): void {
  if (received === undefined || choices.includes(received as string)) return
  const expected = choices.map((choice) => `'${choice}'`).join(', ')
  const nearest =
    typeof received === 'string' ? `; did you mean '${closest(received.toLowerCase(), choices)}'?` : ''
  throw new NodevisorError(
    'ERR_INVALID_ARGUMENT',
    `Expected one of ${expected} for ${name} but received ${show(received)}${nearest}`,
    { argument: name, received },
  )
}
