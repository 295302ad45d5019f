import * as fc from 'fast-check'
import { describe, expect, it } from 'vitest'
import { SSE } from '../../src/emulation/sse.js'
import { DATA, isEmulated, isPvm, runGuest } from './guest.js'
import { encode, makeRunner } from './native.js'

const REX = [0, 0x41, 0x44, 0x45, 0x48, 0x4d]
/** A byte that makes results differ: equal ones, extreme ones, any. */
const byte = fc.oneof(fc.constantFrom(0, 0x7f, 0x80, 0xff), fc.integer({ min: 0, max: 255 }))
const bytes = (length: number) =>
  fc.array(byte, { minLength: length, maxLength: length }).map((list) => Uint8Array.from(list))

const control = ['NP 0F AE /2 m', 'NP 0F AE /3 m']
const forms = Object.keys(SSE)
  .filter((key) => !control.includes(key))
  .flatMap((key) =>
    (['r', 'm'] as const)
      .filter((kind) => !/ [rm]$/.test(key) || key.endsWith(kind))
      .map((kind) => ({ key, kind, name: SSE[key]!.name })),
  )

describe.runIf(isPvm)(
  'an SSE instruction at privilege level 0 does what the processor does at level 3',
  () => {
    it.each(forms)('$name: $key, with $kind', ({ key, kind, name }) => {
      const variants = fc.record({
        rex: fc.constantFrom(...REX),
        immediate: fc.oneof(fc.integer({ min: 0, max: 20 }), fc.integer({ min: 0, max: 255 })),
        // Elsewhere it raises #GP, which at level 3 PVM makes an #UD of.
        misalignment: /^mov|lddqu/.test(name) ? fc.constantFrom(0, 1, 8) : fc.constant(0),
      })
      const states = fc.record({
        xmm: bytes(256),
        data: bytes(64),
        rax: fc.bigInt({ min: 0n, max: 2n ** 64n - 1n }),
      })
      fc.assert(
        fc.property(variants, fc.array(states, { minLength: 3, maxLength: 3 }), (variant, inputs) => {
          const code = encode(key, SSE, kind, variant.rex, variant.immediate)
          const [emulated, native] = [makeRunner(0, code), makeRunner(3, code)]
          for (const { xmm, data, rax } of inputs) {
            const rbx = BigInt(DATA + variant.misalignment)
            const input = {
              registers: { rax, rcx: ~rax & (2n ** 64n - 1n), rbx, r8: rax, r9: 9n, r11: rbx },
              xmm,
              data,
            }
            expect(emulated(input)).toEqual(native(input))
          }
        }),
        { numRuns: 4, endOnFailure: true },
      )
    })
  },
)

const CR0 = 0x8001_0033n
const CR0_EM = 1n << 2n
const CR0_TS = 1n << 3n
const CR4_PAE = 1n << 5n
/** `xorps xmm0, xmm0`. */
const XORPS = [0x0f, 0x57, 0xc0]

describe.skipIf(isEmulated)('an SSE instruction', () => {
  it.each([
    ['#UD without CR4.OSFXSR', 6, XORPS, { cr4: CR4_PAE }],
    ['#UD with CR0.EM', 6, XORPS, { cr0: CR0 | CR0_EM }],
    ['#NM with CR0.TS', 7, XORPS, { cr0: CR0 | CR0_TS }],
    ['#GP where its operand is not aligned', 13, [0x0f, 0x57, 0x03], {}],
    ['#GP for reserved bits of MXCSR', 13, [0x0f, 0xae, 0x53, 0x0f], {}],
  ])('raises %s', (_, vector, code, special) => {
    const { vectors } = runGuest({
      code,
      special,
      registers: { rbx: BigInt(DATA + 1) },
      memory: { [DATA + 16]: [0, 0, 1, 0] },
    })
    expect(vectors).toEqual([vector])
  })

  it('takes MXCSR from memory, and brings it there', () => {
    // ldmxcsr [rbx]; xorps xmm0, xmm0; stmxcsr [rbx + 4]
    const { view } = runGuest({
      code: [0x0f, 0xae, 0x13, ...XORPS, 0x0f, 0xae, 0x5b, 0x04],
      registers: { rbx: BigInt(DATA) },
      memory: { [DATA]: [0xa0, 0x5f] },
    })
    expect(view.getUint32(DATA + 4, true)).toBe(0x5fa0)
  })

  it('works outside long mode', () => {
    // movd xmm0, eax; pshufd xmm0, xmm0, 0; movups [ebx], xmm0
    const { view } = runGuest({
      mode: 'protected',
      code: [0x66, 0x0f, 0x6e, 0xc0, 0x66, 0x0f, 0x70, 0xc0, 0x00, 0x0f, 0x11, 0x03],
      registers: { rax: 0x1234_5678n, rbx: BigInt(DATA) },
    })
    expect([0, 4, 8, 12].map((at) => view.getUint32(DATA + at, true))).toEqual(Array(4).fill(0x1234_5678))
  })
})
