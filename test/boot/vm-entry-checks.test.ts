import { describe, expect, it } from 'vitest'
import { loadImage } from '../../src/boot/index.js'
import { bootOptions, pattern } from '../helpers/images.js'
import {
  type EntryState,
  entryStateOf,
  failedEntryChecks,
  VM_ENTRY_CHECKS,
} from '../helpers/vm-entry-checks.js'

type Mode = 'real' | 'protected' | 'long'

/** A state that passes, to be broken. */
function goodState(mode: Mode): EntryState {
  return structuredClone(entryStateOf(loadImage(pattern(64), bootOptions({ mode })).state))
}

const usableLdt = (state: EntryState) =>
  Object.assign(state.special.ldt, { unusable: false, present: true, type: 2, s: 0, limit: 0xfff, g: 0 })

/** For each row, a good state's mode and changes each of which the row must find. */
const BREAK: Record<string, [Mode, ...((state: EntryState) => unknown)[]]> = {
  'cr0-fixed': ['real', ({ special }) => (special.cr0 &= ~0x20n)],
  'cr0-reserved': [
    'long',
    ({ special }) => (special.cr0 |= 1n << 32n),
    ({ special }) => (special.cr0 |= 1n << 6n),
  ],
  'cr0-pg-pe': ['real', ({ special }) => (special.cr0 |= 1n << 31n)],
  'cr0-nw-cd': ['protected', ({ special }) => (special.cr0 |= 1n << 29n)],
  'cr4-reserved': ['long', ({ special }) => (special.cr4 |= 1n << 17n)],
  'ia32e-paging': [
    'long',
    ({ special }) => (special.cr4 &= ~0x20n),
    ({ special }) => (special.cr0 &= ~(1n << 31n)),
  ],
  'cr3-width': [
    'long',
    ({ special }) => (special.cr3 |= 1n << 52n),
    ({ special }) => (special.cr3 |= 1n << 36n),
    ({ special }) => (special.cr3 |= 1n),
  ],
  'efer-reserved': ['protected', ({ special }) => (special.efer |= 1n << 12n)],
  'efer-lma-lme': ['long', ({ special }) => (special.efer &= ~0x100n)],
  'tr-ti': ['protected', ({ special }) => (special.tr.selector |= 4)],
  'ldtr-ti': ['long', (state) => Object.assign(usableLdt(state), { selector: 4 })],
  'ss-rpl-cs-rpl': ['protected', ({ special }) => (special.ss.selector |= 3)],
  'base-canonical': [
    'long',
    ({ special }) => (special.fs.base = 0x8000_0000_0000n),
    ({ special }) => (special.gs.base = 0x1234_0000_0000_0000n),
    ({ special }) => (special.tr.base = 0x8000_0000_0000n),
    (state) => Object.assign(usableLdt(state), { base: 0x8000_0000_0000n }),
  ],
  'base-32-bit': [
    'long',
    ({ special }) => (special.cs.base = 1n << 32n),
    ({ special }) => (special.ss.base = 1n << 32n),
    ({ special }) => (special.ds.base = 1n << 32n),
    ({ special }) => (special.es.base = 1n << 32n),
  ],
  'cs-type': ['protected', ({ special }) => (special.cs.type = 10), ({ special }) => (special.cs.type = 3)],
  'ss-type': ['protected', ({ special }) => (special.ss.type = 2), ({ special }) => (special.ss.type = 1)],
  'data-type': [
    'protected',
    ({ special }) => (special.ds.type = 2),
    ({ special }) => (special.es.type = 9),
    ({ special }) => (special.fs.type = 0),
    ({ special }) => (special.gs.type = 13),
  ],
  'segment-s': ['real', ({ special }) => (special.cs.s = 0), ({ special }) => (special.gs.s = 0)],
  'cs-dpl': [
    'protected',
    ({ special }) => (special.cs.dpl = 3),
    ({ special }) => Object.assign(special.cs, { type: 15, dpl: 1 }),
    ({ special }) => Object.assign(special.cs, { type: 3, dpl: 1 }),
  ],
  'ss-dpl': [
    'protected',
    ({ special }) => (special.ss.dpl = 3),
    (state) => {
      state.special.cr0 &= ~1n
      state.special.ss.dpl = 3
    },
  ],
  'data-dpl': ['long', ({ special }) => (special.fs.selector |= 3)],
  'segment-present': ['long', ({ special }) => (special.cs.present = false)],
  'cs-db': ['long', ({ special }) => (special.cs.db = 1)],
  'segment-granularity': [
    'protected',
    ({ special }) => (special.cs.g = 0),
    ({ special }) => (special.ds.limit = 0xffff_f000),
  ],
  'tr-type': [
    'long',
    ({ special }) => (special.tr.type = 3),
    ({ special }) => (special.tr.type = 9),
    ({ special }) => (special.tr.s = 1),
    ({ special }) => (special.tr.present = false),
    ({ special }) => (special.tr.unusable = true),
  ],
  'tr-granularity': ['long', ({ special }) => (special.tr.g = 1)],
  'tr-limit': ['long', ({ special }) => (special.tr.limit = 0x66)],
  ldtr: [
    'long',
    (state) => Object.assign(usableLdt(state), { type: 0 }),
    (state) => Object.assign(usableLdt(state), { s: 1 }),
    (state) => Object.assign(usableLdt(state), { present: false }),
    (state) => Object.assign(usableLdt(state), { limit: 0, g: 1 }),
  ],
  'table-base': [
    'protected',
    ({ special }) => (special.gdt.base = 1n << 63n),
    ({ special }) => (special.idt.base = 1n << 47n),
  ],
  'table-limit': [
    'real',
    ({ special }) => (special.gdt.limit = 0x1_0000),
    ({ special }) => (special.idt.limit = 0x1_0000),
  ],
  rip: ['protected', (state) => Object.assign(state, { rip: 1n << 32n })],
  'rflags-reserved': [
    'real',
    (state) => Object.assign(state, { rflags: 0n }),
    (state) => Object.assign(state, { rflags: 0xan }),
    (state) => Object.assign(state, { rflags: 2n | (1n << 22n) }),
  ],
  'rflags-vm': ['real', (state) => Object.assign(state, { rflags: 0x2_0002n })],
  'kvm-sregs': [
    'real',
    ({ special }) => (special.efer |= 0x400n),
    ({ special }) => (special.cs.l = 1),
    (state) => {
      state.special.efer |= 0x100n
      state.special.cr0 |= 0x8000_0001n
    },
  ],
  'kvm-real-mode': [
    'real',
    ({ special }) => (special.cs.base = 0xffff_0000n),
    ({ special }) => (special.ds.limit = 0xffff_ffff),
    ({ special }) => (special.es.db = 1),
    ({ special }) => (special.fs.g = 1),
    ({ special }) => (special.ss.type = 7),
    ({ special }) => (special.gs.type = 11),
  ],
  'kvm-apic-base': [
    'long',
    ({ special }) => (special.apicBase |= 0x400n),
    ({ special }) => (special.apicBase = 0n),
  ],
}

describe('the table of VM-entry checks', () => {
  it('has rows with ids of their own', () => {
    const ids = VM_ENTRY_CHECKS.map(({ id }) => id)
    expect(new Set(ids).size).toBe(ids.length)
    expect(Object.keys(BREAK).sort()).toEqual(ids.toSorted())
  })

  it.each(['real', 'protected', 'long'] as const)(
    'passes the state that a flat image in %s mode starts in',
    (mode) => {
      expect(failedEntryChecks(goodState(mode))).toEqual([])
    },
  )

  it.each(VM_ENTRY_CHECKS)(
    'fails in row $id for a state in which it does not hold: $what',
    ({ id, check }) => {
      const [mode, ...changes] = BREAK[id]!
      expect(check(goodState(mode))).toBeUndefined()
      for (const change of changes) {
        const state = goodState(mode)
        change(state)
        expect(check(state), change.toString()).toBeTypeOf('string')
      }
    },
  )

  it('holds RIP to canonical addresses in 64-bit code', () => {
    const row = VM_ENTRY_CHECKS.find(({ id }) => id === 'rip')!
    expect(row.check({ ...goodState('long'), rip: 0x8000_0000_0000n })).toBeTypeOf('string')
    expect(row.check({ ...goodState('long'), rip: 0xffff_ffff_8010_0000n })).toBeUndefined()
  })
})
