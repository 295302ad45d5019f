/** Guests of a few bytes, all in real mode at 0x7c00 unless said otherwise. */

import { DEBUG_EXIT_PORT } from './qemu.js'

/** The port that {@link countedOuts} writes to. */
export const COUNTED_PORT = 0x10
/** Where flat real-mode images start. */
export const ENTRY = 0x7c00
/** How many `out`s there are in one turn of the loop of {@link countedOuts}: so many that the loop costs nothing. */
export const OUTS_PER_TURN = 32

const HLT = 0xf4
const OUT_IMM8_AL = 0xe6
const MOV_AL = 0xb0

/** `out`s to {@link COUNTED_PORT}, 32 × ecx of them, and then debug-exit with 0x10. */
export function countedOuts(): Uint8Array {
  const outs = Array.from({ length: OUTS_PER_TURN }, () => [OUT_IMM8_AL, COUNTED_PORT]).flat()
  const back = 0x100 - (outs.length + 4)
  return Uint8Array.of(
    ...outs,
    ...[0x66, 0x49], // dec %ecx
    ...[0x75, back], // jnz to the start
    ...[MOV_AL, 0x10],
    ...[OUT_IMM8_AL, DEBUG_EXIT_PORT],
    HLT,
  )
}

/** `out` to {@link COUNTED_PORT} for ever. */
export function endlessOuts(): Uint8Array {
  return Uint8Array.of(OUT_IMM8_AL, COUNTED_PORT, 0xeb, 0xfc)
}

export function halt(): Uint8Array {
  return Uint8Array.of(HLT)
}

/** Where {@link firmware} has to be: the end of the first MiB. */
export const FIRMWARE_ADDRESS = 0xf0000

/**
 * Debug-exit with 0x10, as 64 KiB that start at their first byte, or at a PC's reset vector when they are a PC's
 * firmware. So QEMU can run the same file, with nothing of its own before it.
 */
export function firmware(): Uint8Array {
  const image = new Uint8Array(0x10000)
  image.set([MOV_AL, 0x10, OUT_IMM8_AL, DEBUG_EXIT_PORT, HLT])
  image.set([0xea, 0x00, 0x00, 0x00, 0xf0], 0xfff0) // ljmp $0xf000, $0
  return image
}

/** `hlt`, with a reset vector as {@link firmware}. */
export function haltFirmware(): Uint8Array {
  const image = firmware()
  image.set([HLT, 0xeb, 0xfd]) // hlt; jmp to the start
  return image
}
