import * as fc from 'fast-check'
import { describe, expect, it } from 'vitest'
import { DATA, isEmulated, isPvm, runGuest } from './guest.js'
import { makeRunner } from './native.js'

const FNINIT = [0xdb, 0xe3]
const FLD1 = [0xd9, 0xe8]
const FLDPI = [0xd9, 0xeb]
const FILD_WORD = [0xdf, 0x03]
/** `fstp tword [rbx + 16]`. */
const STORE = [0xdb, 0x7b, 0x10]
/** `fnstsw ax`. */
const FNSTSW = [0xdf, 0xe0]
/** `fldcw [rbx + 48]`: a control word. */
const FLDCW = [0xd9, 0x6b, 0x30]

const data = fc.record({
  start: fc.oneof(
    fc.uint8Array({ minLength: 16, maxLength: 16 }),
    // Infinity, signaling and quiet NaN, denormal, zero: 64 bits, and 32 of them.
    fc
      .constantFrom(
        0x7ff0_0000_0000_0000n,
        0x7ff0_0000_0000_0001n,
        0xfff8_0000_0000_0000n,
        1n,
        0x8000_0000_0000_0000n,
        0x7f80_0001n,
        0x7f80_0000n,
        0x8000_0001n,
        0x0040_0000n,
      )
      .map((bits) => {
        const bytes = new Uint8Array(16)
        new DataView(bytes.buffer).setBigUint64(0, bits, true)
        return bytes
      }),
  ),
  // Denormal operands are masked: not all processors agree on what a load does where they are not.
  control: fc.constantFrom(0x37f, 0x37e, 0x342, 0x27f),
})

describe.runIf(isPvm)(
  'an x87 instruction at privilege level 0 does what the processor does at level 3',
  () => {
    it.each([
      ['fld1, fldl2t, fldl2e', [...FNINIT, 0xd9, 0xe8, 0xd9, 0xe9, 0xd9, 0xea]],
      ['fldpi, fldlg2, fldln2, fldz', [...FNINIT, 0xd9, 0xeb, 0xd9, 0xec, 0xd9, 0xed, 0xd9, 0xee]],
      ['fld dword', [...FNINIT, ...FLDCW, 0xd9, 0x03, ...FNSTSW]],
      ['fld qword', [...FNINIT, ...FLDCW, 0xdd, 0x03, ...FNSTSW]],
      ['fld tword, fstp tword', [...FNINIT, ...FLDCW, 0xdb, 0x2b, ...STORE, ...FNSTSW]],
      ['fild word, dword, qword', [...FNINIT, ...FILD_WORD, 0xdb, 0x03, 0xdf, 0x2b]],
      ['fld st1', [...FNINIT, ...FLD1, ...FILD_WORD, 0xd9, 0xc1]],
      ['fld st1 of an empty stack', [...FNINIT, ...FLDCW, 0xd9, 0xc1, ...FNSTSW]],
      ['fst st2, fstp st1', [...FNINIT, ...FLD1, ...FILD_WORD, 0xdd, 0xd2, 0xdd, 0xd9]],
      ['fxch st1', [...FNINIT, ...FLD1, ...FILD_WORD, 0xd9, 0xc9]],
      ['fxch with an empty register', [...FNINIT, ...FLD1, 0xd9, 0xc9, ...FNSTSW]],
      ['ffree st0, then fstp tword of it', [...FNINIT, ...FLDCW, ...FLD1, 0xdd, 0xc0, ...STORE, ...FNSTSW]],
      ['fchs, fabs', [...FNINIT, ...FLDPI, 0xd9, 0xe0, ...FILD_WORD, 0xd9, 0xe1]],
      ['fincstp, fdecstp', [...FNINIT, ...FLDPI, 0xd9, 0xf7, 0xd9, 0xf7, ...FLD1, 0xd9, 0xf6]],
      ['nine loads', [...FNINIT, ...FLDCW, ...Array(9).fill(FILD_WORD).flat(), ...FNSTSW]],
      ['emms, fnop', [...FNINIT, ...FLD1, 0x0f, 0x77, 0xd9, 0xd0]],
      ['fnclex', [...FNINIT, 0xd9, 0xc0, 0xdb, 0xe2, ...FNSTSW]],
      ['fwait with an error pending', [...FNINIT, ...FLDCW, 0xd9, 0xc0, 0x9b]],
    ])('%s', (_, code) => {
      const [emulated, native] = [makeRunner(0, code), makeRunner(3, code)]
      fc.assert(
        fc.property(data, ({ start, control }) => {
          const bytes = new Uint8Array(64)
          bytes.set(start)
          new DataView(bytes.buffer).setUint16(48, control, true)
          const input = { registers: { rbx: BigInt(DATA) }, xmm: new Uint8Array(256), data: bytes }
          expect(emulated(input)).toEqual(native(input))
        }),
        { numRuns: 40, endOnFailure: true },
      )
    })
  },
)

const CR0_EM = 1n << 2n
const CR0_TS = 1n << 3n
const CR0 = 0x8001_0033n

describe.skipIf(isEmulated)('the FPU', () => {
  it.each([
    ['fldz', [0xd9, 0xee], CR0_TS],
    ['fldz', [0xd9, 0xee], CR0_EM],
    ['fnstsw ax', FNSTSW, CR0_TS],
    ['fwait', [0x9b], CR0_TS],
  ])('is not available to %s', (_, code, bits) => {
    expect(runGuest({ code, special: { cr0: CR0 | bits } }).vectors).toEqual([7])
  })

  it('is available to fwait although CR0.EM is set', () => {
    expect(runGuest({ code: [0x9b], special: { cr0: CR0 | CR0_EM } }).vectors).toEqual([])
  })

  it('raises #MF where an error waits', () => {
    // fninit; fldcw; fld st0 of an empty stack; fld1
    const { vectors } = runGuest({
      code: [...FNINIT, ...FLDCW, 0xd9, 0xc0, ...FLD1],
      registers: { rbx: BigInt(DATA) },
      memory: { [DATA + 48]: [0x7e, 0x03] },
    })
    expect(vectors).toEqual([16])
  })

  it('works in real mode', () => {
    // fldpi; fstp tword [0xd000]
    const { view } = runGuest({ mode: 'real', code: [...FNINIT, ...FLDPI, 0xdb, 0x3e, 0x00, 0xd0] })
    expect(view.getUint16(DATA + 8, true)).toBe(0x4000)
    expect(view.getBigUint64(DATA, true)).toBe(0xc90f_daa2_2168_c235n)
  })
})
