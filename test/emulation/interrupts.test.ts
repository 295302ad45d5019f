import { describe, expect, it } from 'vitest'
import {
  CODE_SELECTOR,
  DATA,
  DATA_SELECTOR,
  type Ended,
  IDT,
  isEmulated,
  isPvm,
  KERNEL_STACK,
  type Mode,
  runGuest,
  STACK,
  setGate,
  USER_CODE,
  USER_DATA,
} from './guest.js'

/** What tests put there themselves. */
const HANDLER = 0xa000
const ELSEWHERE = 0x1100
const HLT = 0xf4
const INT_80 = [0xcd, 0x80]
const FLAG_IF = 1n << 9n
const FLAG_TF = 1n << 8n

const push32 = (value: number) => [
  0x68,
  value & 0xff,
  (value >> 8) & 0xff,
  (value >> 16) & 0xff,
  value >>> 24,
]

/** The words of the frame that a handler finds, as it halts. */
function frame({ view, registers }: Ended, mode: Mode, words: number): bigint[] {
  return Array.from({ length: words }, (_, i) =>
    mode === 'long'
      ? view.getBigUint64(Number(registers.rsp) + i * 8, true)
      : BigInt(view.getUint32(Number(registers.rsp) + i * 4, true)),
  )
}

describe.skipIf(isEmulated).each<Mode>(['protected', 'long'])('in %s mode', (mode) => {
  it('int n calls its handler, which finds the address behind it, and returns there', () => {
    // inc eax; iret (iretq)
    const handler = mode === 'long' ? [0xff, 0xc0, 0x48, 0xcf] : [0x40, 0xcf]
    const ended = runGuest({
      mode,
      // int 0x80; mov ecx, 7; int 0x80
      code: [...INT_80, 0xb9, 7, 0, 0, 0, ...INT_80],
      registers: { rflags: 2n | FLAG_IF },
      memory: { [HANDLER]: handler },
      prepare: ({ view }) => setGate(view, mode, 0x80, HANDLER),
    })
    expect(ended.registers).toMatchObject({ rax: 2n, rcx: 7n, rsp: BigInt(STACK), rip: 0x100an })
    expect(ended.registers.rflags & FLAG_IF).toBe(FLAG_IF)
    if (isPvm) {
      const both = ['int', 'iret', 'int', 'iret']
      expect(ended.finished).toEqual(mode === 'long' ? ['int', 'int'] : both)
    }
  })

  it.each([
    ['int n', INT_80, 0x80, 2],
    ['int3', [0xcc], 3, 1],
    ['int1', [0xf1], 1, 1],
  ])('%s pushes flags, CS and the address behind it', (_, code, vector, length) => {
    const ended = runGuest({ mode, code, registers: { rflags: 2n | FLAG_IF } })
    expect(ended.vectors).toEqual([vector])
    expect(frame(ended, mode, 3)).toEqual([0x1000n + BigInt(length), BigInt(CODE_SELECTOR), 2n | FLAG_IF])
    // Through an interrupt gate.
    expect(ended.registers.rflags & FLAG_IF).toBe(0n)
  })

  it('int n leaves interrupts on through a trap gate', () => {
    const ended = runGuest({
      mode,
      code: INT_80,
      registers: { rflags: 2n | FLAG_IF },
      memory: { [HANDLER]: [HLT] },
      prepare: ({ view }) => setGate(view, mode, 0x80, HANDLER, 0x8f),
    })
    expect(ended.registers.rip).toBe(BigInt(HANDLER + 1))
    expect(ended.registers.rflags & FLAG_IF).toBe(FLAG_IF)
  })

  it.each([
    ['that the IDT has not', 13, { limit: 0x80 * 8 - 1 }, 0x8e],
    ['that is not present', 11, {}, 0x0e],
    ['that is none', 13, {}, 0x82],
  ])('int n through a gate %s raises %i at the instruction', (_, vector, table, access) => {
    const ended = runGuest({
      mode,
      code: INT_80,
      prepare: ({ vcpu, view }) => {
        setGate(view, mode, 0x80, HANDLER, access)
        const sregs = vcpu.getSregs()
        vcpu.setSregs({ ...sregs, idt: { ...sregs.idt, ...table } })
      },
    })
    expect(ended.vectors).toEqual([vector])
    expect(frame(ended, mode, 2)).toEqual([0x80n * 8n + 2n, 0x1000n])
  })

  it('a single step over a finished instruction traps behind it', () => {
    const ended = runGuest({ mode, code: [0x0f, 0x00, 0xe0, 0x90], registers: { rflags: 2n | FLAG_TF } }) // verr ax
    expect(ended.vectors).toEqual([1])
    expect(frame(ended, mode, 1)).toEqual([0x1003n])
    expect(ended.vcpu.getDebugRegs().dr6 & 0x4000n).toBe(0x4000n)
  })
})

describe.skipIf(isEmulated)('into', () => {
  // mov al, …; add al, 1; into
  const code = (value: number) => [0xb0, value, 0x04, 0x01, 0xce]

  it('interrupts after an overflow', () => {
    const ended = runGuest({ mode: 'protected', code: code(0x7f) })
    expect(ended.vectors).toEqual([4])
    expect(frame(ended, 'protected', 1)).toEqual([0x1005n])
  })

  it('does nothing without', () => {
    expect(runGuest({ mode: 'protected', code: code(0x7e) }).vectors).toEqual([])
  })

  it('is invalid in long mode', () => {
    expect(runGuest({ mode: 'long', code: [0xce] }).vectors).toEqual([6])
  })
})

describe.skipIf(isEmulated)('iret in protected mode', () => {
  it('goes on elsewhere, with other flags', () => {
    const ended = runGuest({
      mode: 'protected',
      code: [...push32(0xad7), ...push32(CODE_SELECTOR), ...push32(ELSEWHERE), 0xcf],
      memory: { [ELSEWHERE]: [HLT] },
    })
    expect(ended.registers).toMatchObject({
      rip: BigInt(ELSEWHERE + 1),
      rsp: BigInt(STACK),
      rflags: 0xad7n,
    })
  })

  it('uses all of ESP', () => {
    const stack = 0x8_0000
    const ended = runGuest({
      mode: 'protected',
      code: [...push32(2), ...push32(CODE_SELECTOR), ...push32(ELSEWHERE), 0xcf],
      registers: { rsp: BigInt(stack) },
      memory: { [ELSEWHERE]: [HLT] },
    })
    expect(ended.registers).toMatchObject({ rip: BigInt(ELSEWHERE + 1), rsp: BigInt(stack) })
  })

  it('of 16 bits leaves the upper half of the flags as it is', () => {
    const ended = runGuest({
      mode: 'protected',
      // o16 push 0x8d7; o16 push 8; o16 push 0x1100; o16 iret
      code: [0x66, 0x68, 0xd7, 0x08, 0x66, 0x6a, 0x08, 0x66, 0x68, 0x00, 0x11, 0x66, 0xcf],
      registers: { rflags: 0x20_0002n },
      memory: { [ELSEWHERE]: [HLT] },
    })
    expect(ended.registers).toMatchObject({
      rip: BigInt(ELSEWHERE + 1),
      rsp: BigInt(STACK),
      rflags: 0x20_08d7n,
    })
  })

  it.each([
    ['iret', [...push32(2), ...push32(USER_CODE), ...push32(ELSEWHERE), 0xcf]],
    ['retf', [...push32(USER_CODE), ...push32(ELSEWHERE), 0xcb]],
  ])('%s enters privilege level 3, with its own stack and data segments', (_, code) => {
    const ended = runGuest({
      mode: 'protected',
      code: [...push32(USER_DATA), ...push32(DATA), ...code],
      // push eax; hlt, which only level 0 may
      memory: { [ELSEWHERE]: [0x50, HLT] },
      registers: { rax: 0x1234n },
    })
    expect(ended.vectors).toEqual([13])
    const [error, rip, cs, , rsp, ss] = frame(ended, 'protected', 6)
    expect({ error, rip, cs, rsp, ss }).toEqual({
      error: 0n,
      rip: BigInt(ELSEWHERE + 1),
      cs: BigInt(USER_CODE),
      rsp: BigInt(DATA - 4),
      ss: BigInt(USER_DATA),
    })
    expect(ended.registers.rsp).toBe(BigInt(KERNEL_STACK - 24))
    expect(ended.view.getUint32(DATA - 4, true)).toBe(0x1234)
    // The segments of level 0 were taken from it.
    expect(ended.special.ds.selector).toBe(0)
  })

  it('retf n drops arguments of both stacks', () => {
    const ended = runGuest({
      mode: 'protected',
      code: [
        ...push32(USER_DATA),
        ...push32(DATA - 16),
        ...push32(0),
        ...push32(0),
        ...push32(USER_CODE),
        ...push32(ELSEWHERE),
        0xca, // retf 8
        8,
        0,
      ],
      memory: { [ELSEWHERE]: [HLT] },
    })
    expect(frame(ended, 'protected', 5)[4]).toBe(BigInt(DATA - 8))
  })

  it.each([
    ['the null selector', 0, 13, 0],
    ['a selector past the GDT', 0x100, 13, 0x100],
    ['a data segment', DATA_SELECTOR, 13, DATA_SELECTOR],
    ['an RPL that its DPL is not', CODE_SELECTOR | 3, 13, CODE_SELECTOR],
  ])('to %s raises an exception at the instruction', (_, selector, vector, error) => {
    const ended = runGuest({
      mode: 'protected',
      code: [...push32(2), ...push32(selector), ...push32(ELSEWHERE), 0xcf],
    })
    expect(ended.vectors).toEqual([vector])
    expect(frame(ended, 'protected', 2)).toEqual([BigInt(error), 0x100fn])
    expect(ended.registers.rsp).toBe(BigInt(STACK - 12 - 16))
  })

  it('past the limit of CS raises #GP', () => {
    const ended = runGuest({
      mode: 'protected',
      code: [...push32(2), ...push32(CODE_SELECTOR), ...push32(0x20_0000), 0xcf],
      // A limit of 1 MiB - 1, in bytes.
      prepare: ({ view }) => view.setUint8(0x6000 + CODE_SELECTOR + 6, 0x4f),
    })
    expect(ended.vectors).toEqual([13])
  })

  it('marks the segment as accessed', () => {
    const ended = runGuest({
      mode: 'protected',
      code: [...push32(2), ...push32(CODE_SELECTOR), ...push32(ELSEWHERE), 0xcf],
      memory: { [ELSEWHERE]: [HLT] },
      prepare: ({ view }) => view.setUint8(0x6000 + CODE_SELECTOR + 5, 0x9a),
    })
    expect(ended.view.getUint8(0x6000 + CODE_SELECTOR + 5)).toBe(0x9b)
  })
})

it.runIf(isPvm)('a software interrupt through a 16-bit gate or a task gate is refused', () => {
  for (const access of [0x86, 0x85]) {
    const run = () =>
      runGuest({
        mode: 'protected',
        code: INT_80,
        prepare: ({ view }) => view.setUint8(IDT + 0x80 * 8 + 5, access),
      })
    expect(run).toThrow(/^int: it leads to a (16-bit|task) gate/)
  }
})
