import { describe, expect, it } from 'vitest'
import { CR4_OSFXSR, CR4_OSXSAVE, DATA, type Ended, isEmulated, offers, runGuest } from './guest.js'

const CR4_PAE = 1n << 5n
const special = { cr4: CR4_PAE | CR4_OSFXSR | CR4_OSXSAVE }

/** `xor ecx, ecx; mov eax, …; xor edx, edx; xsetbv`. */
const setXcr0 = (value: number) => [0x31, 0xc9, 0xb8, value, 0, 0, 0, 0x31, 0xd2, 0x0f, 0x01, 0xd1]
const XGETBV = [0x0f, 0x01, 0xd0]
/** `mov eax, …`: what is asked for. */
const ask = (components: number) => [0xb8, components, 0, 0, 0]
// Of [rbx], and of [rsi].
const XSAVE = [0x0f, 0xae, 0x23]
const XSAVEC = [0x0f, 0xc7, 0x23]
const XRSTOR = [0x0f, 0xae, 0x2b]
const XRSTOR_RSI = [0x0f, 0xae, 0x2e]
/** `pcmpeqd xmm3, xmm3`: all ones. */
const ONES_TO_XMM3 = [0x66, 0x0f, 0x76, 0xdb]
const ZERO_XMM3 = [0x66, 0x0f, 0xef, 0xdb]
/** `fld1`. */
const FLD1 = [0xd9, 0xe8]
const FNINIT = [0xdb, 0xe3]

const XSTATE_BV = 512
const XCOMP_BV = 520
const XMM3 = 160 + 3 * 16
const registers = { rbx: BigInt(DATA), rsi: BigInt(DATA + 0x1000) }

const ones = Array(16).fill(0xff)
const bytesAt = ({ bytes }: Ended, at: number, length = 16) => [...bytes.slice(at, at + length)]

describe.runIf(!isEmulated && offers('xsave'))('extended state', () => {
  it('xgetbv reads what xsetbv wrote', () => {
    const { registers } = runGuest({
      code: [...setXcr0(7), ...XGETBV],
      special,
      registers: { rax: 2n ** 64n - 1n, rdx: 2n ** 64n - 1n },
    })
    expect(registers).toMatchObject({ rax: 7n, rdx: 0n })
  })

  it('xgetbv knows no register but the first two', () => {
    // mov ecx, 2; xgetbv
    expect(runGuest({ code: [0xb9, 2, 0, 0, 0, ...XGETBV], special }).vectors).toEqual([13])
  })

  it.each([
    ['xgetbv', XGETBV],
    ['xsave', XSAVE],
    ['xrstor', XRSTOR],
  ])('%s is invalid without CR4.OSXSAVE', (_, code) => {
    expect(runGuest({ code, registers }).vectors).toEqual([6])
  })

  it('xsave saves what is asked for, and xrstor brings it back', () => {
    const ended = runGuest({
      code: [
        ...setXcr0(3),
        ...[...FNINIT, ...FLD1, ...ONES_TO_XMM3],
        ...[...ask(3), ...XSAVE],
        ...[...FNINIT, ...ZERO_XMM3],
        ...[...ask(3), ...XRSTOR],
        ...[0x0f, 0x11, 0x1e], // movups [rsi], xmm3
        ...[0xdb, 0x7e, 0x10], // fstp tword [rsi + 16]
      ],
      special,
      registers,
      memory: {
        [DATA]: Array(1024)
          .fill(0)
          .map((_, i) => (i >= XSTATE_BV && i < 576 ? 0 : 0xaa)),
      },
    })
    expect(ended.view.getBigUint64(DATA + XSTATE_BV, true)).toBe(3n)
    expect(bytesAt(ended, DATA + XMM3)).toEqual(ones)
    expect(ended.view.getUint32(DATA + 24, true)).toBe(0x1f80)
    // What belongs to no component stays as it was.
    expect(bytesAt(ended, DATA + 416)).toEqual(Array(16).fill(0xaa))
    expect(bytesAt(ended, DATA + 0x1000)).toEqual(ones)
    expect(ended.view.getUint16(DATA + 0x1018, true)).toBe(0x3fff)
  })

  it('xsave of one component leaves the other in memory, and its bit', () => {
    const ended = runGuest({
      code: [...setXcr0(3), ...ONES_TO_XMM3, ...ask(1), ...XSAVE],
      special,
      registers,
      memory: { [DATA + XSTATE_BV]: [2] },
    })
    expect(ended.view.getUint8(DATA + XSTATE_BV) & 2).toBe(2)
    expect(bytesAt(ended, DATA + XMM3)).toEqual(Array(16).fill(0))
  })

  it('xrstor makes components initial that the area has not', () => {
    const ended = runGuest({
      code: [
        ...setXcr0(3),
        ...[...FNINIT, ...FLD1, ...ONES_TO_XMM3],
        ...[...ask(3), ...XRSTOR],
        ...[0x0f, 0x11, 0x1e], // movups [rsi], xmm3
        ...[0xdd, 0x7e, 0x10], // fnstsw [rsi + 16]
        ...[0xd9, 0x7e, 0x12], // fnstcw [rsi + 18]
      ],
      special,
      registers,
      memory: { [DATA + 24]: [0x80, 0x1f], [DATA + 0x1000]: Array(32).fill(0x55) },
    })
    expect(bytesAt(ended, DATA + 0x1000)).toEqual(Array(16).fill(0))
    expect(ended.view.getUint16(DATA + 0x1010, true)).toBe(0)
    expect(ended.view.getUint16(DATA + 0x1012, true)).toBe(0x37f)
  })

  it.each([
    ['an area that is not aligned', {}, 32],
    ['components that are not enabled', { [DATA + XSTATE_BV]: [8] }, 0],
    ['a header with reserved bits', { [DATA + XCOMP_BV + 8]: [1] }, 0],
    ['reserved bits of MXCSR', { [DATA + 24]: [0, 0, 1] }, 0],
    ['a compacted format that is none', { [DATA + XCOMP_BV]: [1] }, 0],
  ])('xrstor raises #GP for %s', (_, memory, offset) => {
    const { vectors } = runGuest({
      code: [...setXcr0(3), ...ask(3), ...XRSTOR],
      special,
      registers: { rbx: BigInt(DATA + offset) },
      memory,
    })
    expect(vectors).toEqual([13])
  })

  it('is not available with CR0.TS', () => {
    const { vectors } = runGuest({
      code: [...setXcr0(3), ...XSAVE],
      special: { ...special, cr0: 0x8001_0033n | (1n << 3n) },
      registers,
    })
    expect(vectors).toEqual([7])
  })
})

describe.runIf(!isEmulated && offers('xsavec'))('extended state in the compacted format', () => {
  it('xsavec saves what is in use, and xrstor brings it back', () => {
    const ended = runGuest({
      code: [
        ...setXcr0(7),
        ...ONES_TO_XMM3,
        ...[...ask(6), ...XSAVEC],
        ...ZERO_XMM3,
        ...[...ask(6), ...XRSTOR],
        ...[0x0f, 0x11, 0x1e], // movups [rsi], xmm3
      ],
      special,
      registers,
    })
    expect(ended.view.getBigUint64(DATA + XCOMP_BV, true)).toBe((1n << 63n) | 6n)
    expect(ended.view.getUint8(DATA + XSTATE_BV) & 3).toBe(2)
    expect(bytesAt(ended, DATA + XMM3)).toEqual(ones)
    expect(bytesAt(ended, DATA + 0x1000)).toEqual(ones)
  })

  const pairs = [
    { name: 'xrstor and xsavec', save: XSAVEC, restore: XRSTOR_RSI, feature: 'xsavec' },
    { name: 'xrstors and xsaves', save: [0x0f, 0xc7, 0x2b], restore: [0x0f, 0xc7, 0x1e], feature: 'xsaves' },
  ] as const

  it.each(pairs.filter(({ feature }) => offers(feature)))(
    'is brought from memory, and there: $name',
    ({ save, restore }) => {
      // The area at RSI: AVX alone, at 576 in both formats.
      const ymm = Array.from({ length: 256 }, (_, i) => i)
      const ended = runGuest({
        code: [...setXcr0(7), ...ask(4), ...restore, ...ask(4), ...save],
        special,
        registers,
        memory: {
          [DATA + 0x1000 + XSTATE_BV]: [4],
          [DATA + 0x1000 + XCOMP_BV]: [4, 0, 0, 0, 0, 0, 0, 0x80],
          [DATA + 0x1000 + 576]: ymm,
        },
      })
      expect(ended.vectors).toEqual([])
      expect(ended.view.getUint8(DATA + XSTATE_BV) & 4).toBe(4)
      expect(bytesAt(ended, DATA + 576, 256)).toEqual(ymm)
    },
  )

  it('makes the upper halves of YMM registers initial where the area has them not', () => {
    const area = DATA + 0x1000
    const ended = runGuest({
      code: [
        ...[...setXcr0(7), ...ask(4), ...XRSTOR_RSI],
        ...[0x48, 0xc7, 0x86, 0, 2, 0, 0, 0, 0, 0, 0], // mov qword [rsi + 512], 0
        ...[...XRSTOR_RSI, ...XSAVE],
      ],
      special,
      registers,
      memory: {
        [area + XSTATE_BV]: [4],
        [area + XCOMP_BV]: [4, 0, 0, 0, 0, 0, 0, 0x80],
        [area + 576]: Array(256).fill(0x77),
        [DATA + 576]: Array(256).fill(0x55),
      },
    })
    expect(bytesAt(ended, DATA + 576, 256)).toEqual(Array(256).fill(0))
  })
})
