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

/** Debug-exit with 0x10, again and again. */
export function endlessExits(): Uint8Array {
  return Uint8Array.of(MOV_AL, 0x10, OUT_IMM8_AL, DEBUG_EXIT_PORT, 0xeb, 0xfc)
}

/** The same, and before each but the first a byte is written to 16 pages, of which no two are side by side. */
export function pageWriter(): Uint8Array {
  return Uint8Array.of(
    ...[MOV_AL, 0x10],
    ...[OUT_IMM8_AL, DEBUG_EXIT_PORT],
    ...[0xb8, 0x00, 0x10], // mov $0x1000, %ax
    ...[0x8e, 0xc0], // 1: mov %ax, %es
    ...[0x26, 0xa2, 0x00, 0x00], // mov %al, %es:0
    ...[0x05, 0x00, 0x02], // add $0x200, %ax
    ...[0x3d, 0x00, 0x30], // cmp $0x3000, %ax
    ...[0x75, 0xf2], // jne 1b
    ...[0xeb, 0xe9], // jmp to the start
  )
}

/** Pages that {@link busyWriter} writes, one after the other, for ever: 1 MiB. */
const BUSY_START = 0x200000
const BUSY_END = BUSY_START + 2 ** 20

/**
 * In long mode: writes to each page of 1 MiB, for ever. R9 is the longest time between two of these writes, in cycles of
 * the TSC.
 */
export function busyWriter(): Uint8Array {
  return Uint8Array.of(
    ...[0x45, 0x31, 0xc9], // xor %r9d, %r9d
    ...[0x0f, 0x31], // rdtsc
    ...[0x48, 0xc1, 0xe2, 0x20], // shl $32, %rdx
    ...[0x48, 0x09, 0xd0], // or %rdx, %rax
    ...[0x49, 0x89, 0xc0], // mov %rax, %r8
    ...[0xbf, ...dword(BUSY_START)], // 1: mov $BUSY_START, %edi
    ...[0x0f, 0x31], // 2: rdtsc
    ...[0x48, 0xc1, 0xe2, 0x20], // shl $32, %rdx
    ...[0x48, 0x09, 0xd0], // or %rdx, %rax
    ...[0x48, 0x89, 0xc1], // mov %rax, %rcx
    ...[0x4c, 0x29, 0xc1], // sub %r8, %rcx
    ...[0x49, 0x89, 0xc0], // mov %rax, %r8
    ...[0x4c, 0x39, 0xc9], // cmp %r9, %rcx
    ...[0x76, 0x03], // jbe 3f
    ...[0x49, 0x89, 0xc9], // mov %rcx, %r9
    ...[0x48, 0x89, 0x07], // 3: mov %rax, (%rdi)
    ...[0x81, 0xc7, ...dword(0x1000)], // add $0x1000, %edi
    ...[0x81, 0xff, ...dword(BUSY_END)], // cmp $BUSY_END, %edi
    ...[0x75, 0xd5], // jne 2b
    ...[0xeb, 0xce], // jmp 1b
  )
}

function dword(value: number): number[] {
  return [value & 0xff, (value >> 8) & 0xff, (value >> 16) & 0xff, value >>> 24]
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
