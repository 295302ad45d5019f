import { describe, expect, it } from 'vitest'
import { DATA, DATA_SELECTOR, isEmulated, offers, PAGE_TABLE, runGuest, STACK } from './guest.js'

/** `popcnt rax, [rbx]`, or `eax, [ebx]`. */
const LOAD = [0xf3, 0x48, 0x0f, 0xb8, 0x03]
const LOAD_32 = [0xf3, 0x0f, 0xb8, 0x03]
/** `popcnt rax, [rbp]`: in the stack segment. */
const LOAD_STACK = [0xf3, 0x48, 0x0f, 0xb8, 0x45, 0x00]
/** `stmxcsr [rbx]`. */
const STORE = [0x0f, 0xae, 0x1b]

const PRESENT = 1
const WRITABLE = 2
const USER = 4
const ACCESSED = 0x20
const DIRTY = 0x40
const entryOf = (address: number) => PAGE_TABLE + (address / 0x1000) * 8

/** Where another page is mapped to. */
const FRAME = 0x2_0000

describe.runIf(!isEmulated && offers('popcnt'))('an operand in paged memory', () => {
  it('is found through the page tables, over the end of a page', () => {
    const { registers } = runGuest({
      code: LOAD,
      registers: { rbx: BigInt(DATA + 0xffc) },
      memory: { [DATA + 0xffc]: [1, 1, 1, 1], [FRAME]: [3, 3, 3, 3] },
      prepare: ({ view }) => view.setUint32(entryOf(DATA + 0x1000), FRAME | PRESENT, true),
    })
    expect(registers.rax).toBe(12n)
  })

  it.each([
    ['of a page that is not there: a read', LOAD, 0, 0],
    ['of a page that is not there: a write', STORE, 0, 2],
    ['of a read-only page: a write', STORE, PRESENT, 3],
  ])('%s raises #PF', (_, code, flags, error) => {
    const { vectors, special, view, registers } = runGuest({
      code,
      registers: { rbx: BigInt(DATA + 0x123) },
      prepare: ({ view }) => view.setUint32(entryOf(DATA), DATA | flags, true),
    })
    expect(vectors).toEqual([14])
    expect(special.cr2).toBe(BigInt(DATA + 0x123))
    expect(view.getBigUint64(Number(registers.rsp), true)).toBe(BigInt(error))
    expect(view.getBigUint64(Number(registers.rsp) + 8, true)).toBe(0x1000n)
  })

  it('of which the second page is not there raises #PF there, and nothing is written', () => {
    const { vectors, special, view } = runGuest({
      code: STORE,
      registers: { rbx: BigInt(DATA + 0xffe) },
      prepare: ({ view }) => view.setUint32(entryOf(DATA + 0x1000), 0, true),
    })
    expect(vectors).toEqual([14])
    expect(special.cr2).toBe(BigInt(DATA + 0x1000))
    expect(view.getUint16(DATA + 0xffe, true)).toBe(0)
  })

  it('may be written although its page is read-only, without CR0.WP', () => {
    const { vectors, view } = runGuest({
      code: STORE,
      special: { cr0: 0x8000_0033n },
      registers: { rbx: BigInt(DATA) },
      prepare: ({ view }) => view.setUint32(entryOf(DATA), DATA | PRESENT, true),
    })
    expect(vectors).toEqual([])
    expect(view.getUint32(DATA, true)).toBe(0x1f80)
  })

  it('leaves the accessed and the dirty bit', () => {
    const { view } = runGuest({
      // popcnt rax, [rbx]; stmxcsr [rbx + 0x1000]
      code: [...LOAD, 0x0f, 0xae, 0x9b, 0, 0x10, 0, 0],
      registers: { rbx: BigInt(DATA) },
    })
    const bits = (address: number) => view.getUint8(entryOf(address)) & (ACCESSED | DIRTY)
    expect(bits(DATA)).toBe(ACCESSED)
    expect(bits(DATA + 0x1000)).toBe(ACCESSED | DIRTY)
  })

  it.each([
    ['#GP', LOAD, 13],
    ['#SS, in the stack segment', LOAD_STACK, 12],
  ])('at an address that is not canonical raises %s', (_, code, vector) => {
    const address = 0x8000_0000_0000n
    expect(runGuest({ code, registers: { rbx: address, rbp: address } }).vectors).toEqual([vector])
  })

  it('is also found where the instruction itself lies on two pages', () => {
    // jmp 0x1ffe: the code is on the page of 0x1000, and on what is mapped behind it.
    const { registers } = runGuest({
      code: [0xe9, 0xf9, 0x0f, 0, 0],
      registers: { rbx: 0x7f00n, rdx: BigInt(DATA) },
      memory: { 8190: LOAD.slice(0, 2), [FRAME]: [0x0f, 0xb8, 0xc3, 0xf4] },
      prepare: ({ vcpu, view }) => {
        // The page tables are where CR3 says, whatever is mapped at their own addresses.
        view.setUint32(entryOf(0x2000), FRAME | PRESENT | WRITABLE | USER, true)
        expect(vcpu.translate(0x2000n).physicalAddress).toBe(BigInt(FRAME))
      },
    })
    expect(registers.rax).toBe(7n)
  })
})

describe.runIf(!isEmulated && offers('popcnt'))('an operand in a segment', () => {
  const flat = {
    base: 0n,
    limit: 0xffff_ffff,
    selector: DATA_SELECTOR,
    type: 3,
    present: true,
    dpl: 0,
    db: 1,
    s: 1,
    l: 0,
    g: 1,
    avl: 0,
    unusable: false,
  }

  it.each([
    ['past its limit', LOAD_32, { ds: { ...flat, limit: DATA + 2, g: 0 } }, 13],
    ['that is not writable', STORE, { ds: { ...flat, type: 1 } }, 13],
    ['that expands down, below its limit', LOAD_32, { ds: { ...flat, type: 7, limit: 0xffff, g: 0 } }, 13],
    [
      'for the stack, past its limit',
      [0xf3, 0x0f, 0xb8, 0x45, 0],
      { ss: { ...flat, limit: 0xcfff, g: 0 } },
      12,
    ],
    [
      'for the stack, within it',
      [0xf3, 0x0f, 0xb8, 0x45, 0],
      { ss: { ...flat, limit: 0xdfff, g: 0 } },
      undefined,
    ],
  ])('%s', (_, code, special, vector) => {
    const { vectors } = runGuest({
      mode: 'protected',
      code,
      special,
      registers: { rbx: BigInt(DATA), rbp: BigInt(DATA), rsp: BigInt(STACK) },
    })
    expect(vectors).toEqual(vector === undefined ? [] : [vector])
  })

  it('of real mode ends at 64 KiB', () => {
    const { vectors } = runGuest({
      mode: 'real',
      code: [0xf3, 0x0f, 0xb8, 0x07],
      registers: { rbx: 0xffffn },
    }) // [bx]
    expect(vectors).toEqual([13])
  })
})
