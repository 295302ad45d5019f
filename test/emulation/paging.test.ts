import { describe, expect, it } from 'vitest'
import { flatSegment, specialRegisters, taskSegment } from '../../src/boot/processor.js'
import { GuestFault, Refusal } from '../../src/emulation/outcome.js'
import { type Access, translate } from '../../src/emulation/paging.js'
import type { SpecialRegisters } from '../../src/kvm/index.js'
import { GuestMemory } from '../../src/memory/guest-memory.js'

// Intel SDM vol. 3A, "4-Level Paging and 5-Level Paging" and "Page-Fault Exceptions".
const [P, W, U, PS] = [1n, 2n, 4n, 0x80n]
const NX = 1n << 63n
const CR0_PE_PG = 0x8000_0001n
const CR0_WP = 1n << 16n
const CR4_LA57 = 1n << 12n
const CR4_SMEP = 1n << 20n
const CR4_SMAP = 1n << 21n
const EFER_LONG = 0x500n
const EFER_NXE = 1n << 11n

const [PML4, PDPT, DIRECTORY, TABLE, PML5] = [0x1000, 0x2000, 0x3000, 0x4000, 0x5000]
const PAGE = 0x8000
const ADDRESS = 0x1234n

const supervisor: Access = { kind: 'read', user: false, overridesSmap: false }
const user: Access = { ...supervisor, user: true }
const write: Access = { ...supervisor, kind: 'write' }
const fetch: Access = { ...supervisor, kind: 'fetch' }

interface Setup {
  /** Flags of the entries. */
  readonly pml4?: bigint
  readonly directory?: bigint
  readonly page?: bigint
  readonly registers?: Partial<SpecialRegisters>
}

/** The page at 0x1000 leads to 0x8000. */
function setUp({ pml4 = P | W | U, directory = P | W | U, page = P | W | U, registers = {} }: Setup = {}) {
  const memory = new GuestMemory([{ start: 0, buffer: new ArrayBuffer(0x1_0000) }])
  memory.writeBigUint64(PML5, BigInt(PML4) | P | W | U)
  memory.writeBigUint64(PML4, BigInt(PDPT) | pml4)
  memory.writeBigUint64(PDPT, BigInt(DIRECTORY) | P | W | U)
  memory.writeBigUint64(DIRECTORY, BigInt(TABLE) | directory)
  memory.writeBigUint64(TABLE + 8, BigInt(PAGE) | page)
  const data = flatSegment(0x10, 'data')
  const special = specialRegisters({
    cs: flatSegment(8, 'code64'),
    data,
    ss: data,
    tr: taskSegment(0x18, 0, 0x67),
    gdt: { base: 0n, limit: 0 },
    idt: { base: 0n, limit: 0 },
    cr0: CR0_PE_PG,
    cr3: BigInt(PML4),
    cr4: 0x20n,
    efer: EFER_LONG,
  })
  const walk = (address: bigint, access: Access) =>
    translate(memory, { ...special, ...registers }, address, access)
  return { memory, walk }
}

/** The error code of the page fault that an access makes; `undefined` for none. */
function errorOf(setup: Setup, access: Access): number | undefined {
  try {
    setUp(setup).walk(ADDRESS, access)
    return undefined
  } catch (error) {
    expect(error).toBeInstanceOf(GuestFault)
    expect(error).toMatchObject({ vector: 14, cr2: ADDRESS })
    return (error as GuestFault).errorCode
  }
}

describe('the walk of page tables', () => {
  it('finds the page, and keeps the offset', () => {
    expect(setUp().walk(ADDRESS, supervisor)).toBe(0x8234)
  })

  it('takes an address for what it is without paging', () => {
    expect(setUp({ registers: { cr0: 1n } }).walk(0x1_2345n, supervisor)).toBe(0x1_2345)
  })

  it('finds a page of 2 MiB', () => {
    const { memory, walk } = setUp()
    memory.writeBigUint64(DIRECTORY, 0x60_0000n | P | PS)
    expect(walk(ADDRESS, supervisor)).toBe(0x60_1234)
  })

  it('finds a page of 1 GiB', () => {
    const { memory, walk } = setUp()
    memory.writeBigUint64(PDPT, 0x8000_0000n | P | PS)
    expect(walk(ADDRESS, supervisor)).toBe(0x8000_1234)
  })

  it('has five levels with CR4.LA57', () => {
    const registers = { cr3: BigInt(PML5), cr4: CR4_LA57 }
    expect(setUp({ registers }).walk(ADDRESS, supervisor)).toBe(0x8234)
  })

  it.each<[string, Setup, Access, number | undefined]>([
    ['of no page', { page: 0n }, supervisor, 0],
    ['of no page, at level 3', { page: 0n }, user, 4],
    ['of no page table', { directory: 0n }, write, 2],
    ['of a page of the supervisor, at level 3', { page: P }, user, 5],
    ['of a directory of the supervisor, at level 3', { directory: P | W }, user, 5],
    ['that writes a read-only page', { page: P | U, registers: { cr0: CR0_PE_PG | CR0_WP } }, write, 3],
    ['that writes a read-only page, without CR0.WP', { page: P | U }, write, undefined],
    ['that writes a read-only page, at level 3', { page: P | U }, { ...user, kind: 'write' }, 7],
    ['with reserved bits: a PML4 entry that is a page', { pml4: P | PS }, supervisor, 9],
    ['with reserved bits: NX without EFER.NXE', { page: P | NX }, supervisor, 9],
    [
      'of code that may not be executed',
      { page: P | NX, registers: { efer: EFER_LONG | EFER_NXE } },
      fetch,
      17,
    ],
    [
      'of data on such a page',
      { page: P | NX, registers: { efer: EFER_LONG | EFER_NXE } },
      supervisor,
      undefined,
    ],
    ['of code on a page of the user, with SMEP', { registers: { cr4: CR4_SMEP } }, fetch, 1],
    ['of data on a page of the user, with SMAP', { registers: { cr4: CR4_SMAP } }, supervisor, 1],
    [
      'of the same, with AC set',
      { registers: { cr4: CR4_SMAP } },
      { ...supervisor, overridesSmap: true },
      undefined,
    ],
  ])('makes of an access %s the error code %4$s', (_, setup, access, error) => {
    expect(errorOf(setup, access)).toBe(error)
  })

  it('sets accessed bits on the way, and the dirty bit for a write', () => {
    const { memory, walk } = setUp()
    walk(ADDRESS, supervisor)
    expect([PML4, PDPT, DIRECTORY, TABLE + 8].map((at) => memory.readUint8(at) & 0x60)).toEqual(
      Array(4).fill(0x20),
    )
    walk(ADDRESS, write)
    expect([PML4, PDPT, DIRECTORY, TABLE + 8].map((at) => memory.readUint8(at) & 0x60)).toEqual([
      0x20, 0x20, 0x20, 0x60,
    ])
  })

  it('refuses page tables outside RAM', () => {
    const { memory, walk } = setUp()
    memory.writeBigUint64(DIRECTORY, 0xf_ffff_ffff_f000n | P)
    expect(() => walk(ADDRESS, supervisor)).toThrow(expect.any(Refusal))
    expect(() => setUp({ registers: { cr3: 0xfee0_0000n } }).walk(ADDRESS, supervisor)).toThrow(
      Refusal as never,
    )
  })

  it('refuses paging outside long mode', () => {
    expect(() => setUp({ registers: { efer: 0n } }).walk(ADDRESS, supervisor)).toThrow(expect.any(Refusal))
  })
})
