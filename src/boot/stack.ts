import { type Placement, STRUCTURE_ZONES, type Zone } from './placement.js'

/** Bytes of stack that a kernel in protected or long mode starts with. */
const STACK_SIZE = 0x4000
/** What a function's arguments, and so the stack above its return address, are aligned to (System V ABI). */
const STACK_ALIGNMENT = 16

/**
 * Places a stack and pushes what a caller would have, so that a kernel may begin with a C function.
 *
 * @param wordSize - bytes of a word: 4 in protected, 8 in long mode
 * @param words - what is on the stack, from its top (lowest address) on: return address, then arguments
 * @returns the stack pointer: aligned as at a function's entry (System V ABI, i386 2.2.2, x86-64 3.2.2)
 */
export function placeStack(placement: Placement, wordSize: 4 | 8, words: readonly number[]): number {
  const argumentBytes = (words.length - 1) * wordSize
  const top = STACK_SIZE - Math.ceil(argumentBytes / STACK_ALIGNMENT) * STACK_ALIGNMENT - wordSize
  const address = placement.place({
    name: 'stack',
    size: STACK_SIZE,
    zones: STRUCTURE_ZONES,
    fill: () => {
      const bytes = new Uint8Array(STACK_SIZE)
      const view = new DataView(bytes.buffer)
      words.forEach((word, index) => {
        const at = top + index * wordSize
        if (wordSize === 4) view.setUint32(at, word, true)
        else view.setBigUint64(at, BigInt(word), true)
      })
      return bytes
    },
  })
  return address + top
}

/** Bytes of stack that a real-mode image has for sure. */
const REAL_MODE_STACK_SIZE = 0x400
/** Where boot sectors put their stack: just below 0x7c00, and free from there down to 0x500. */
const REAL_MODE_STACK_TOP = 0x7c00

/** Where a real-mode stack goes; interrupt vectors and the BIOS data area, below 0x500, are spared. */
const REAL_MODE_ZONES: readonly Zone[] = [
  { start: REAL_MODE_STACK_TOP - REAL_MODE_STACK_SIZE, end: REAL_MODE_STACK_TOP },
  { start: 0x500, end: 0xa0000 },
]

/** Places an empty stack for real mode: `ss`, and `sp` at its end. */
export function placeRealModeStack(placement: Placement): { readonly ss: number; readonly sp: number } {
  const size = REAL_MODE_STACK_SIZE
  const address = placement.place({ name: 'stack', size, zones: REAL_MODE_ZONES, alignment: STACK_ALIGNMENT })
  const ss = address + size < 0x10000 ? 0 : address >> 4
  return { ss, sp: address + size - ss * 16 }
}
