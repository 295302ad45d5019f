import fc from 'fast-check'
import { describe, expect, it } from 'vitest'
import { FEATURE_NEEDS, withNeeds, withoutOrphans } from '../../src/cpu/dependencies.js'
import { FEATURE_ALIASES, FEATURE_BITS, FEATURE_REGISTERS, findFeature } from '../../src/cpu/features.js'
import { CPU_BASELINES } from '../../src/cpu/models.js'
import { ALL_FEATURES } from './hosts.js'

describe('the table of CPU features', () => {
  it('has each name and each bit once', () => {
    const places = FEATURE_BITS.map(({ leaf, subleaf, register, bit }) =>
      [leaf, subleaf, register, bit].join(),
    )
    expect(new Set(places).size).toBe(FEATURE_BITS.length)
    expect(new Set(ALL_FEATURES).size).toBe(FEATURE_BITS.length)
    for (const { bit } of FEATURE_BITS) expect(bit).toBeGreaterThanOrEqual(0)
    for (const { bit } of FEATURE_BITS) expect(bit).toBeLessThan(32)
  })

  it('has every bit of leaf 1 that the manual names, but OSXSAVE and the reserved ones', () => {
    const known = (register: string) =>
      FEATURE_REGISTERS.find((group) => group.leaf === 1 && group.register === register)!.known
    expect(known('ecx')).toBe((0xffff_ffff & ~((1 << 16) | (1 << 27))) >>> 0)
    expect(known('edx')).toBe((0xffff_ffff & ~((1 << 10) | (1 << 20))) >>> 0)
  })

  // From the manuals, not from the table: leaf, subleaf, register, bit.
  it.each([
    ['sse4_2', [1, 0, 'ecx', 20]],
    ['x2apic', [1, 0, 'ecx', 21]],
    ['hypervisor', [1, 0, 'ecx', 31]],
    ['apic', [1, 0, 'edx', 9]],
    ['avx2', [7, 0, 'ebx', 5]],
    ['avx512f', [7, 0, 'ebx', 16]],
    ['smap', [7, 0, 'ebx', 20]],
    ['la57', [7, 0, 'ecx', 16]],
    ['amx_tile', [7, 0, 'edx', 24]],
    ['avx_vnni', [7, 1, 'eax', 4]],
    ['xsaves', [0xd, 1, 'eax', 3]],
    ['kvm_clock', [0x4000_0001, 0, 'eax', 3]],
    ['kvm_pv_eoi', [0x4000_0001, 0, 'eax', 6]],
    ['lahf_lm', [0x8000_0001, 0, 'ecx', 0]],
    ['topoext', [0x8000_0001, 0, 'ecx', 22]],
    ['nx', [0x8000_0001, 0, 'edx', 20]],
    ['lm', [0x8000_0001, 0, 'edx', 29]],
    ['constant_tsc', [0x8000_0007, 0, 'edx', 8]],
    ['ibpb', [0x8000_0008, 0, 'ebx', 12]],
  ])('knows where %s is', (name, place) => {
    const { leaf, subleaf, register, bit } = FEATURE_BITS.find((feature) => feature.name === name)!
    expect([leaf, subleaf, register, bit]).toEqual(place)
  })

  it('is read by every name in use', () => {
    for (const name of ALL_FEATURES) {
      expect(findFeature(name)).toBe(name)
      expect(findFeature(name.replaceAll('_', '-'))).toBe(name)
    }
    for (const [alias, name] of Object.entries(FEATURE_ALIASES)) expect(findFeature(alias)).toBe(name)
    expect(findFeature('tsc-deadline')).toBe('tsc_deadline_timer')
    expect(findFeature('SSE4.2')).toBe('sse4_2')
    expect(findFeature('lahf-lm')).toBe('lahf_lm')
  })

  it.each([
    ['avx3', 'avx'],
    ['x2apci', 'x2apic'],
    ['__proto__', undefined],
    ['constructor', undefined],
    ['', undefined],
  ])('knows no %j, and names the nearest', (name, nearest) => {
    expect(() => findFeature(name)).toThrow(
      expect.objectContaining({
        code: 'ERR_INVALID_ARGUMENT',
        message: expect.stringContaining(nearest === undefined ? 'did you mean' : `'${nearest}`),
      }),
    )
  })
})

describe('what features need', () => {
  it('is nothing that needs them', () => {
    for (const [name, needs] of Object.entries(FEATURE_NEEDS)) {
      for (const need of needs) expect([...withNeeds(need)]).not.toContain(name)
    }
  })

  it('is in every baseline that has them', () => {
    for (const { requires } of Object.values(CPU_BASELINES)) {
      expect([...withoutOrphans(requires)].sort()).toEqual([...requires].sort())
    }
    for (const { requires, allows } of Object.values(CPU_BASELINES)) {
      expect(withoutOrphans([...requires, ...allows]).size).toBe(requires.length + allows.length)
    }
  })

  it('is kept, or they are not, and no more is taken away', () => {
    fc.assert(
      fc.property(fc.subarray([...ALL_FEATURES]), (names) => {
        const kept = withoutOrphans(names)
        for (const name of names) {
          expect(kept.has(name)).toBe([...withNeeds(name)].every((need) => names.includes(need)))
        }
      }),
    )
  })
})
