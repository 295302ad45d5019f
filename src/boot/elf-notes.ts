import type { ElfFile } from './elf.js'
import { viewOf } from './image-reading.js'
import { alignUp } from './placement.js'

// System V ABI, "Note Section": https://refspecs.linuxfoundation.org/elf/gabi4+/ch5.pheader.html#note_section

// Offsets in a note. Its name follows, and then its descriptor.
const N_NAMESZ = 0
const N_DESCSZ = 4
const N_TYPE = 8
const NOTE_HEADER_SIZE = 12

/** Bytes of notes that are looked at: true kernels have hundreds, hostile files the same ones often. */
const NOTES_LIMIT = 0x1_0000

/** A note of an ELF file. */
export interface ElfNote {
  /** Without the zero that ends it. */
  readonly name: string
  readonly type: number
  readonly descriptor: Uint8Array
}

/** The notes in the first 64 KiB of an ELF file's PT_NOTE segments; a damaged one ends its segment. */
export function* elfNotes({ noteSegments }: ElfFile): Generator<ElfNote> {
  let left = NOTES_LIMIT
  for (const segment of noteSegments) {
    const bytes = segment.bytes.subarray(0, left)
    left -= bytes.length
    const view = viewOf(bytes)
    // Words of 4 bytes in both classes, whatever the ABI says, unless the segment says otherwise.
    const alignment = segment.alignment === 8n ? 8 : 4
    for (let at = 0; at + NOTE_HEADER_SIZE <= bytes.length; ) {
      const nameStart = at + NOTE_HEADER_SIZE
      const nameEnd = nameStart + view.getUint32(at + N_NAMESZ, true)
      const start = alignUp(nameEnd, alignment)
      const end = start + view.getUint32(at + N_DESCSZ, true)
      if (end > bytes.length) break
      const name = new TextDecoder('latin1').decode(bytes.subarray(nameStart, nameEnd))
      yield {
        name: name.replace(/\0$/, ''),
        type: view.getUint32(at + N_TYPE, true),
        descriptor: bytes.subarray(start, end),
      }
      at = alignUp(end, alignment)
    }
  }
}
