import * as fc from 'fast-check'
import { describe, expect, it } from 'vitest'
import { DATA, isEmulated, isPvm, offers, runGuest } from './guest.js'
import { makeRunner } from './native.js'

const uint64 = fc.oneof(
  fc.constantFrom(0n, 1n, 2n ** 63n, 2n ** 64n - 1n),
  fc.bigInt({ min: 0n, max: 2n ** 64n - 1n }),
)
const flags = fc.integer({ min: 0, max: 63 }).map((bits) =>
  // CF, PF, AF, ZF, SF, OF
  [0, 2, 4, 6, 7, 11].reduce((rflags, at, i) => rflags | (BigInt((bits >> i) & 1) << BigInt(at)), 2n),
)

describe.runIf(isPvm)(
  'an integer instruction at privilege level 0 does what the processor does at level 3',
  () => {
    it.each([
      ['popcnt eax, ebx', [0xf3, 0x0f, 0xb8, 0xc3]],
      ['popcnt rax, [rsi]', [0xf3, 0x48, 0x0f, 0xb8, 0x06]],
      ['popcnt ax, bx', [0x66, 0xf3, 0x0f, 0xb8, 0xc3]],
      ['crc32 eax, bh', [0xf2, 0x0f, 0x38, 0xf0, 0xc7]],
      ['crc32 eax, dil', [0xf2, 0x40, 0x0f, 0x38, 0xf0, 0xc7]],
      ['crc32 eax, byte [rsi]', [0xf2, 0x0f, 0x38, 0xf0, 0x06]],
      ['crc32 eax, word [rsi]', [0x66, 0xf2, 0x0f, 0x38, 0xf1, 0x06]],
      ['crc32 eax, ebx', [0xf2, 0x0f, 0x38, 0xf1, 0xc3]],
      ['crc32 rax, rbx', [0xf2, 0x48, 0x0f, 0x38, 0xf1, 0xc3]],
      ['adcx rax, rbx', [0x66, 0x48, 0x0f, 0x38, 0xf6, 0xc3]],
      ['adcx eax, [rsi]', [0x66, 0x0f, 0x38, 0xf6, 0x06]],
      ['adox eax, ebx', [0xf3, 0x0f, 0x38, 0xf6, 0xc3]],
      ['lock cmpxchg16b [rsi]', [0xf0, 0x48, 0x0f, 0xc7, 0x0e]],
    ])('%s', (_, code) => {
      const [emulated, native] = [makeRunner(0, code), makeRunner(3, code)]
      const values = fc.record({
        rax: uint64,
        rbx: uint64,
        rcx: uint64,
        rdx: uint64,
        rdi: uint64,
        rflags: flags,
      })
      fc.assert(
        fc.property(values, uint64, fc.boolean(), (registers, word, matches) => {
          const data = new Uint8Array(64)
          const view = new DataView(data.buffer)
          view.setBigUint64(0, matches ? registers.rax : word, true)
          view.setBigUint64(8, matches ? registers.rdx : word, true)
          const input = { registers: { ...registers, rsi: BigInt(DATA) }, xmm: new Uint8Array(256), data }
          expect(emulated(input)).toEqual(native(input))
        }),
        { numRuns: 30, endOnFailure: true },
      )
    })
  },
)

const POPCNT_AX = [0xf3, 0x0f, 0xb8]
/** Seven bits set. */
const SEVEN = [0x7f, 0, 0, 0, 0, 0, 0, 0]

describe.runIf(!isEmulated && offers('popcnt'))('a memory operand is found', () => {
  it.each([
    ['[rbx + rcx * 4 - 8] in FS', [0x64, 0xf3, 0x48, 0x0f, 0xb8, 0x44, 0x8b, 0xf8], { rbx: 0x10n, rcx: 2n }],
    [
      '[ebx + r9d * 2 + 0x2000], wrapped',
      [0x67, 0xf3, 0x42, 0x0f, 0xb8, 0x84, 0x4b, 0, 0x20, 0, 0],
      {
        rbx: 0xffff_ffff_ffff_d000n,
        r9: 0x7000n,
      },
    ],
    ['[0xd000]', [...POPCNT_AX, 0x04, 0x25, 0, 0xd0, 0, 0], {}],
    // The instruction is 8 bytes long: 0x1008 + 0xbff8.
    ['[rip + 0xbff8]', [...POPCNT_AX, 0x05, 0xf8, 0xbf, 0, 0], {}],
    ['[r13 + 0x10]', [0xf3, 0x41, 0x0f, 0xb8, 0x45, 0x10], { r13: BigInt(DATA - 0x10) }],
    ['[r12]', [0xf3, 0x41, 0x0f, 0xb8, 0x04, 0x24], { r12: BigInt(DATA) }],
  ] as const)('in long mode: %s', (_, code, registers) => {
    const address = _.endsWith('FS') ? DATA + 0x10 : DATA
    const { registers: ended } = runGuest({
      code,
      registers: { rax: 2n ** 64n - 1n, ...registers },
      memory: { [address]: SEVEN },
      prepare: ({ vcpu }) => {
        const sregs = vcpu.getSregs()
        vcpu.setSregs({ ...sregs, fs: { ...sregs.fs, base: BigInt(DATA) } })
      },
    })
    expect(ended.rax).toBe(7n)
  })

  it.each([
    ['[ebx + ecx * 2 + 4]', [...POPCNT_AX, 0x44, 0x4b, 0x04], { rbx: 0xc000n, rcx: 0x7fen }],
    ['[ebp + 8]', [...POPCNT_AX, 0x45, 0x08], { rbp: BigInt(DATA - 8) }],
    ['[bx + si + 2]', [0x67, ...POPCNT_AX, 0x40, 0x02], { rbx: 0xc000n, rsi: 0xffen }],
    ['[bp + di - 2]', [0x67, ...POPCNT_AX, 0x43, 0xfe], { rbp: 0xf_c000n, rdi: 0x1002n }],
    ['[word 0xd000]', [0x67, ...POPCNT_AX, 0x06, 0x00, 0xd0], {}],
    ['[dword 0xd000]', [...POPCNT_AX, 0x05, 0, 0xd0, 0, 0], {}],
    ['es:[ebx]', [0x26, ...POPCNT_AX, 0x03], { rbx: BigInt(DATA) }],
  ])('in protected mode: %s', (_, code, registers) => {
    // In ES or SS as in DS.
    const { registers: ended } = runGuest({
      mode: 'protected',
      code,
      registers,
      memory: { [DATA]: SEVEN.slice(0, 4).concat(0xff) },
    })
    expect(ended.rax).toBe(7n)
  })

  it('in real mode: [bx + si + 2] in DS, with 32 bits; [bp + 2] in SS, with 16', () => {
    const code = [0x66, ...POPCNT_AX, 0x40, 0x02, 0xf3, 0x0f, 0xb8, 0x4e, 0x02]
    const { registers, finished } = runGuest({
      mode: 'real',
      code,
      registers: { rax: 0xffff_ffffn, rbx: 0x1000n, rsi: 0x100n, rbp: 0x2000n, rcx: 0xffff_ffffn },
      memory: { 57602: [1, 1, 1, 1, 1], 61442: [0, 3, 0xff] },
      prepare: ({ vcpu }) => {
        const sregs = vcpu.getSregs()
        const segment = { ...sregs.ds, base: BigInt(DATA), selector: DATA >> 4 }
        vcpu.setSregs({ ...sregs, ds: segment, ss: segment })
      },
    })
    expect(registers.rax).toBe(4n)
    expect(registers.rcx).toBe(0xffff_0002n)
    if (isPvm) expect(finished).toEqual(['popcnt', 'popcnt'])
  })
})

describe.skipIf(isEmulated)('decimal arithmetic in real mode', () => {
  it.each([
    // mov al, …; add al, …; daa: SDM vol. 2A, "DAA - Decimal Adjust AL After Addition", example
    ['daa: 79 + 35 = 114', [0xb0, 0x79, 0x04, 0x35, 0x27], 0x14n, 1n],
    ['daa: 12 + 34 = 46', [0xb0, 0x12, 0x04, 0x34, 0x27], 0x46n, 0n],
    ['daa: 08 + 08 = 16', [0xb0, 0x08, 0x04, 0x08, 0x27], 0x16n, 0n],
    ['aaa: 8 + 7 = 15', [0xb8, 0x08, 0x00, 0x04, 0x07, 0x37], 0x105n, 1n],
    ['aaa: 2 + 3 = 5', [0xb8, 0x02, 0x00, 0x04, 0x03, 0x37], 0x005n, 0n],
    // mov ax, 0x205; sub al, 9; aas
    ['aas: 25 - 9 = 16', [0xb8, 0x05, 0x02, 0x2c, 0x09, 0x3f], 0x106n, 1n],
  ])('%s', (_, code, ax, carry) => {
    const { registers } = runGuest({ mode: 'real', code })
    expect(registers.rax & 0xffffn).toBe(ax)
    expect(registers.rflags & 1n).toBe(carry)
  })
})

describe.skipIf(isEmulated)('in protected mode', () => {
  it('arpl raises a selector to the privilege level of another', () => {
    // arpl ax, bx; setz cl; arpl ax, bx; setz ch
    const code = [0x63, 0xd8, 0x0f, 0x94, 0xc1, 0x63, 0xd8, 0x0f, 0x94, 0xc5]
    const { registers } = runGuest({ mode: 'protected', code, registers: { rax: 0x11n, rbx: 0x23n } })
    expect(registers.rax).toBe(0x13n)
    expect(registers.rcx).toBe(0x0001n)
  })

  it.each([
    [5, undefined],
    [-3, undefined],
    [6, 5],
    [-4, 5],
  ])('bound with the index %i of -3 to 5 raises: %s', (index, vector) => {
    const { vectors } = runGuest({
      mode: 'protected',
      code: [0x62, 0x03], // bound eax, [ebx]
      registers: { rax: BigInt.asUintN(32, BigInt(index)), rbx: BigInt(DATA) },
      memory: { [DATA]: [0xfd, 0xff, 0xff, 0xff, 5, 0, 0, 0] },
    })
    expect(vectors).toEqual(vector === undefined ? [] : [vector])
  })
})

describe.skipIf(isEmulated)('a locked instruction', () => {
  it.runIf(offers('popcnt'))('that may not be is invalid: lock popcnt', () => {
    expect(runGuest({ code: [0xf0, 0xf3, 0x0f, 0xb8, 0x03] }).vectors).toEqual([6])
  })

  it.runIf(offers('cmpxchg16b'))('needs its operand aligned: lock cmpxchg16b', () => {
    const ended = runGuest({ code: [0xf0, 0x48, 0x0f, 0xc7, 0x0e], registers: { rsi: BigInt(DATA + 8) } })
    expect(ended.vectors).toEqual([13])
  })
})
