import fc from 'fast-check'
import { describe, expect, it } from 'vitest'
import { bytesOfText, decode, OUTPUT_KEPT, OutputLog } from '../../src/backends/output-log.js'

const append = (log: OutputLog, bytes: Iterable<number>) => {
  for (const byte of bytes) log.append(byte)
}

describe('OutputLog', () => {
  it('starts empty', () => {
    const log = new OutputLog()
    expect([log.start, log.end, log.text(0)]).toEqual([0, 0, ''])
  })

  it('23: keeps the last MiB, at the positions it had', () => {
    const log = new OutputLog()
    const total = 2 * OUTPUT_KEPT + 1234
    for (let i = 0; i < total; i++) log.append((i * 7) & 0xff)
    expect([log.start, log.end]).toEqual([total - OUTPUT_KEPT, total])
    const kept = log.bytes(0)
    expect(kept).toHaveLength(OUTPUT_KEPT)
    expect(kept.every((byte, i) => byte === (((log.start + i) * 7) & 0xff))).toBe(true)
    expect([...log.bytes(total - 3, total - 1)]).toEqual([total - 3, total - 2].map((i) => (i * 7) & 0xff))
    expect(log.bytes(0, log.start)).toHaveLength(0)
    expect(log.bytes(total)).toHaveLength(0)
  })

  it('gives the same bytes at every size it grows through', () => {
    const log = new OutputLog()
    for (let i = 0; i < 5000; i++) {
      log.append(i & 0xff)
      if (i % 97 === 0 || i === 1024) {
        expect([...log.bytes(i - 3)]).toEqual(
          [i - 3, i - 2, i - 1, i].filter((at) => at >= 0).map((at) => at & 0xff),
        )
      }
    }
  })

  it('gives copies, which do not change later', () => {
    const log = new OutputLog()
    append(log, [1, 2, 3])
    const copy = log.bytes(0)
    for (let i = 0; i < OUTPUT_KEPT; i++) log.append(9)
    expect([...copy]).toEqual([1, 2, 3])
  })

  it('leaves a character that has not arrived in full out of the text', () => {
    const log = new OutputLog()
    append(log, [0x41, 0xe2, 0x9c])
    expect(log.text(0)).toBe('A')
    log.append(0x93)
    expect(log.text(0)).toBe('A✓')
  })
})

describe('bytesOfText', () => {
  it('counts back what decode makes of any bytes', () => {
    // Pieces that UTF-8 can go wrong in, so that the sequences are not all noise.
    const piece = fc.oneof(
      fc.string({ unit: 'grapheme', maxLength: 3 }).map((text) => [...new TextEncoder().encode(text)]),
      fc.constantFrom(
        [0xef, 0xbb, 0xbf],
        [0xc0, 0x80],
        [0xe0, 0x80, 0x80],
        [0xed, 0xa0, 0x80],
        [0xf0, 0x9f, 0x98],
        [0xf4, 0x90, 0x80, 0x80],
        [0xe2, 0xe2, 0x9c, 0x93],
        [0xf8, 0x88],
        [0x80],
        [0xff],
      ),
      fc.array(fc.nat(255), { maxLength: 3 }),
    )
    fc.assert(
      fc.property(fc.array(piece, { maxLength: 12 }), (pieces) => {
        const bytes = Uint8Array.from(pieces.flat())
        const text = decode(bytes)
        for (let units = 0; units <= text.length; units++) {
          const before = text.charCodeAt(units - 1)
          if (before >= 0xd800 && before < 0xdc00) continue // in the middle of a pair
          const at = bytesOfText(bytes, units)
          expect(new TextDecoder('utf-8', { ignoreBOM: true }).decode(bytes.subarray(0, at))).toBe(
            text.slice(0, units),
          )
          expect(decode(bytes.subarray(at))).toBe(text.slice(units))
        }
      }),
      { numRuns: 1000 },
    )
  })
})
