import { describe, expect, it } from 'vitest'
import {
  CODE_SELECTOR,
  DATA,
  DATA_SELECTOR,
  isEmulated,
  isPvm,
  type Mode,
  offers,
  PAGE_TABLE,
  READ_ONLY_SELECTOR,
  runGuest,
  STACK,
  USER_DATA,
} from './guest.js'

/** `pushfq; pop rax`. */
const FLAGS_TO_RAX = [0x9c, 0x58]
const AC = 1n << 18n
const ZF = 1n << 6n

describe.skipIf(isEmulated)('an instruction about the processor', () => {
  it.runIf(offers('smap'))('stac and clac set and clear the AC flag', () => {
    const { registers } = runGuest({ code: [0x0f, 0x01, 0xcb, ...FLAGS_TO_RAX, 0x0f, 0x01, 0xca] })
    expect(registers.rax & AC).toBe(AC)
    expect(registers.rflags & AC).toBe(0n)
  })

  it.runIf(offers('rdtscp'))('rdtscp reads a counter that goes on, and IA32_TSC_AUX', () => {
    // rdtscp; mov esi, eax; mov edi, edx; rdtscp
    const rdtscp = [0x0f, 0x01, 0xf9]
    const { registers } = runGuest({
      code: [...rdtscp, 0x89, 0xc6, 0x89, 0xd7, ...rdtscp],
      prepare: ({ vcpu }) => vcpu.setMsrs([{ index: 0xc000_0103, value: 0x1234n }]),
    })
    const { rax, rdx, rsi, rdi, rcx } = registers
    expect(((rdx << 32n) | rax) > ((rdi << 32n) | rsi)).toBe(true)
    expect(rcx).toBe(0x1234n)
  })

  it('rdpru is invalid', () => {
    expect(runGuest({ code: [0x0f, 0x01, 0xfd] }).vectors).toEqual([6])
  })

  it('ud1 is invalid', () => {
    expect(runGuest({ code: [0x0f, 0xb9, 0xc3] }).vectors).toEqual([6])
  })

  it.runIf(offers('clwb'))('clwb does nothing, but for a page that is not there', () => {
    const clwb = { code: [0x66, 0x0f, 0xae, 0x33], registers: { rbx: BigInt(DATA) } }
    expect(runGuest(clwb).vectors).toEqual([])
    const prepare = ({ view }: { view: DataView }) =>
      view.setUint32(PAGE_TABLE + (DATA / 0x1000) * 8, 0, true)
    expect(runGuest({ ...clwb, prepare }).vectors).toEqual([14])
  })

  it('monitor and mwait do nothing', () => {
    const { vectors, registers } = runGuest({ code: [0x0f, 0x01, 0xc8, 0x0f, 0x01, 0xc9] })
    expect(vectors).toEqual([])
    expect(registers.rip).toBe(0x1007n)
  })
})

describe.runIf(!isEmulated && offers('invpcid'))('invpcid', () => {
  const INVPCID = [0x66, 0x48, 0x0f, 0x38, 0x82, 0x03] // invpcid rax, [rbx]

  it.each([
    [0, 0n, 0n],
    [1, 0n, 0n],
    [2, 0n, 0n],
    [3, 0n, 0n],
  ])('of type %i makes a page be looked up again', (type, pcid, address) => {
    const { registers } = runGuest({
      // mov rcx, [0xd000]; the entry of its page to 0xe000; invpcid; mov rdx, [0xd000]
      code: [
        ...[0x48, 0x8b, 0x0c, 0x25, 0x00, 0xd0, 0, 0],
        ...[0x48, 0xc7, 0x04, 0x25, 0x68, 0x50, 0, 0, 0x07, 0xe0, 0, 0],
        ...INVPCID,
        ...[0x48, 0x8b, 0x14, 0x25, 0x00, 0xd0, 0, 0],
      ],
      registers: { rax: BigInt(type), rbx: BigInt(DATA + 0x100) },
      memory: { [DATA]: [1], 57344: [2] },
      prepare: ({ view }) => {
        view.setBigUint64(DATA + 0x100, pcid, true)
        view.setBigUint64(DATA + 0x108, address, true)
      },
    })
    expect(registers).toMatchObject({ rcx: 1n, rdx: 2n, rip: 0x1023n })
  })

  it.each([
    ['an unknown type', 4n, 0n, 0n],
    ['reserved bits', 0n, 0x1000n, 0n],
    ['a PCID without CR4.PCIDE', 1n, 1n, 0n],
    ['an address that is not canonical', 0n, 0n, 0x8000_0000_0000n],
  ])('raises #GP for %s', (_, rax, pcid, address) => {
    const { vectors } = runGuest({
      code: INVPCID,
      registers: { rax, rbx: BigInt(DATA) },
      prepare: ({ view }) => {
        view.setBigUint64(DATA, pcid, true)
        view.setBigUint64(DATA + 8, address, true)
      },
    })
    expect(vectors).toEqual([13])
  })
})

describe.skipIf(isEmulated).each<Mode>(['protected', 'long'])('about segments, in %s mode', (mode) => {
  const run = (code: number[], selector: number) => {
    const { registers } = runGuest({ mode, code, registers: { rax: 0x5555n, rbx: BigInt(selector) } })
    return { value: registers.rax, known: (registers.rflags & ZF) !== 0n }
  }
  const codeRights = mode === 'long' ? 0xaf_9b00n : 0xcf_9b00n

  it.each([
    ['code', CODE_SELECTOR, { value: codeRights, known: true }],
    ['data', DATA_SELECTOR, { value: 0xcf_9300n, known: true }],
    ['no segment', 0, { value: 0x5555n, known: false }],
    ['a selector past the GDT', 0x100, { value: 0x5555n, known: false }],
    ['data of level 3, asked for by it', USER_DATA, { value: 0xcf_f300n, known: true }],
    ['data of level 0, asked for by level 3', DATA_SELECTOR | 3, { value: 0x5555n, known: false }],
  ])('lar loads access rights: %s', (_, selector, expected) => {
    expect(run([0x0f, 0x02, 0xc3], selector)).toEqual(expected)
  })

  it.each([
    ['in pages', CODE_SELECTOR, { value: 0xffff_ffffn, known: true }],
    ['in bytes', READ_ONLY_SELECTOR, { value: 0x1234n, known: true }],
    ['of no segment', 0, { value: 0x5555n, known: false }],
  ])('lsl loads limits: %s', (_, selector, expected) => {
    expect(run([0x0f, 0x03, 0xc3], selector)).toEqual(expected)
  })

  it.each([
    ['code', CODE_SELECTOR, true, false],
    ['data', DATA_SELECTOR, true, true],
    ['read-only data', READ_ONLY_SELECTOR, true, false],
    ['no segment', 0, false, false],
    ['a TSS', 0x18, false, false],
  ])('verr and verw tell what may be read and written: %s', (_, selector, readable, writable) => {
    expect(run([0x0f, 0x00, 0xe3], selector).known).toBe(readable)
    expect(run([0x0f, 0x00, 0xeb], selector).known).toBe(writable)
  })
})

it.skipIf(isEmulated)('lar is invalid in real mode', () => {
  expect(runGuest({ mode: 'real', code: [0x0f, 0x02, 0xc3] }).vectors).toEqual([6])
})

it.runIf(isPvm)('rdrand in protected mode gives numbers that differ, and the carry flag', () => {
  // rdrand eax; mov ecx, eax; rdrand eax
  const { registers } = runGuest({
    mode: 'protected',
    code: [0x0f, 0xc7, 0xf0, 0x89, 0xc1, 0x0f, 0xc7, 0xf0],
    registers: { rsp: BigInt(STACK) },
  })
  expect(registers.rax).not.toBe(registers.rcx)
  expect(registers.rflags & 1n).toBe(1n)
})
