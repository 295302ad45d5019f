import { hex, NodevisorError, show } from '../errors.js'
import { HIGH_MEMORY_START, MMIO_HOLE_END } from '../memory/layout.js'
import type { BootImage, BootOptions } from './boot-image.js'
import { placeHandover } from './handover.js'
import { longModeHandover } from './long-mode.js'
import { Placement } from './placement.js'
import { protectedModeHandover } from './protected-mode.js'
import { realModeState } from './real-mode.js'

/** Where a BIOS loads a boot sector, and a real-mode image goes unless told otherwise. */
export const BOOT_SECTOR_ADDRESS = 0x7c00
/** Where other flat images go unless told otherwise: above the PC's legacy area. */
export const FLAT_ADDRESS = HIGH_MEMORY_START

/** Real mode's addresses end here: the A20 line is on, but nothing is to be loaded past it. */
const REAL_MODE_END = 0x10_0000

/**
 * Loads a binary without headers, to be started at its first byte in the mode and at the address that
 * `options` say.
 *
 * @throws `ERR_INVALID_ARGUMENT` for an address that the mode cannot start at, and for a command line or
 *   modules in real mode; `ERR_IMAGE_TOO_LARGE`, `ERR_BOOT_NO_ROOM`
 */
export function loadFlat(image: Uint8Array, options: BootOptions): BootImage {
  const { mode = 'real', memorySize } = options
  const { at = mode === 'real' ? BOOT_SECTOR_ADDRESS : FLAT_ADDRESS } = options
  const addressEnd = mode === 'real' ? REAL_MODE_END : mode === 'protected' ? MMIO_HOLE_END : 2 ** 53
  if (!Number.isSafeInteger(at) || at < 0 || at >= addressEnd) {
    throw new NodevisorError(
      'ERR_INVALID_ARGUMENT',
      `Expected an address from 0 to ${hex(addressEnd - 1)} for at in ${mode} mode but received ${at}`,
      { argument: 'at', received: at },
    )
  }
  if (mode === 'real') {
    if (options.cmdline !== '' || options.modules.length > 0) {
      const [argument, received] =
        options.cmdline !== '' ? ['cmdline', options.cmdline] : ['modules', options.modules]
      throw new NodevisorError(
        'ERR_INVALID_ARGUMENT',
        'Expected no command line and no modules in real mode, which has no way to pass them, but received ' +
          `${show(received)} for ${argument}; use mode 'protected' or 'long', or leave it out`,
        { argument, received },
      )
    }
    if (at + image.length > REAL_MODE_END) {
      throw new NodevisorError(
        'ERR_IMAGE_TOO_LARGE',
        `Expected a real-mode image to end at or below 1 MiB but it takes ${image.length} bytes at ${hex(at)}; ` +
          'load the rest of it from the guest',
        { address: at, size: image.length },
      )
    }
  }

  const placement = new Placement(memorySize)
  const size = BigInt(image.length)
  placement.claim([{ name: 'the kernel', address: BigInt(at), bytes: image, size }], 'choose a lower `at`')
  const state = (() => {
    switch (mode) {
      case 'real':
        return realModeState(placement, at)
      case 'protected':
        return protectedModeHandover(placement, at, placeHandover(placement, options, mode))
      case 'long':
        return longModeHandover(placement, memorySize, BigInt(at), placeHandover(placement, options, mode))
    }
  })()
  return { format: 'flat', mode, entry: at, segments: placement.segments, state }
}
