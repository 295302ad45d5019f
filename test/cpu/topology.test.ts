import fc from 'fast-check'
import { describe, expect, it } from 'vitest'
import { resolveCpu } from '../../src/cpu/cpu-model.js'
import { checkTopology } from '../../src/cpu/topology.js'
import { HARDWARE, leaf, register, supportedBy, type Vendor } from './hosts.js'

const intel = supportedBy('intel')
const amd = supportedBy('amd')
const hosts = { intel, amd }

describe('a topology', () => {
  it.each([
    [{}, 1, [1, 1, 1]],
    [{}, 4, [1, 4, 1]],
    [{ sockets: 2 }, 6, [2, 3, 1]],
    [{ threads: 2 }, 6, [1, 3, 2]],
    [{ cores: 2 }, 6, [3, 2, 1]],
    [{ cores: 3, sockets: 1 }, 6, [1, 3, 2]],
    [{ cores: 3, threads: 2 }, 12, [2, 3, 2]],
    [{ sockets: 2, threads: 2 }, 12, [2, 3, 2]],
    [{ sockets: 2, cores: 3, threads: 2 }, 12, [2, 3, 2]],
  ])('of %j for %i vCPUs is completed', (given, cpus, [sockets, cores, threads]) => {
    expect(checkTopology(given, cpus)).toEqual({ sockets, cores, threads })
  })

  it.each([
    [{ sockets: 2 }, 3, /cpu\.sockets to divide the number of vCPUs, 3, but received 2/],
    [{ cores: 8 }, 4, /cpu\.cores to divide the number of vCPUs, 4, but received 8/],
    [{ sockets: 2, cores: 2, threads: 2 }, 4, /cpu\.sockets \* .*be the number of vCPUs, 4, .* 2 \* 2 \* 2/],
    [{ sockets: 1, cores: 1, threads: 1 }, 2, /be the number of vCPUs, 2/],
    [{ cores: 0 }, 1, /integer of at least 1 for cpu\.cores but received 0/],
    [{ threads: 1.5 }, 3, /integer of at least 1 for cpu\.threads/],
    [{ sockets: '2' }, 2, /integer of at least 1 for cpu\.sockets/],
    [{ sockets: Number.NaN }, 2, /cpu\.sockets/],
  ])('of %j for %i vCPUs is refused', (given, cpus, message) => {
    expect(() => resolveCpu(given, intel, cpus, HARDWARE)).toThrow(
      expect.objectContaining({ code: 'ERR_INVALID_ARGUMENT', message: expect.stringMatching(message) }),
    )
  })

  it('is what a guest reads from its leaves, on every processor', () => {
    const count = fc.integer({ min: 1, max: 9 })
    fc.assert(
      fc.property(
        count,
        count,
        count,
        fc.constantFrom<Vendor>('intel', 'amd'),
        (sockets, cores, threads, vendor) => {
          const cpus = sockets * cores * threads
          const cpu = resolveCpu({ sockets, cores, threads }, hosts[vendor], cpus, HARDWARE)
          const seen = new Set<number>()
          for (let index = 0; index < cpus; index++) {
            const entries = cpu.entriesFor(index)
            const id = cpu.apicId(index)
            seen.add(id)
            const threadBits = register(entries, 0xb, 'eax', 0)!
            const packageBits = register(entries, 0xb, 'eax', 1)!
            expect(id >>> packageBits).toBe(Math.floor(index / (cores * threads)))
            expect((id & (2 ** packageBits - 1)) >>> threadBits).toBe(Math.floor(index / threads) % cores)
            expect(id & (2 ** threadBits - 1)).toBe(index % threads)
            expect(register(entries, 1, 'ebx')! >>> 24).toBe(id & 0xff)
            for (const subleaf of [0, 1, 2]) expect(register(entries, 0xb, 'edx', subleaf)).toBe(id)
            if (vendor === 'amd') expect(register(entries, 0x8000_001e, 'eax')).toBe(id)
          }
          expect(seen.size).toBe(cpus)
          expect(cpu.features.includes('ht')).toBe(cores * threads > 1)
          expect(cpu.features.includes('cmp_legacy')).toBe(vendor === 'amd' && cores * threads > 1)
        },
      ),
      { numRuns: 60 },
    )
  })

  it('shows on an Intel processor in leaves 1, 4, 0xb and 0x1f', () => {
    const cpu = resolveCpu({ sockets: 2, cores: 3, threads: 2 }, intel, 12, HARDWARE)
    const entries = cpu.entriesFor(11)
    // Package 1, core 2, thread 1: one bit for threads, two for cores.
    expect(cpu.apicId(11)).toBe(0b1101)
    // CLFLUSH of 8 quadwords, 8 ids of a package.
    expect(register(entries, 1, 'ebx')).toBe(0x0d08_0800)
    const caches = [0, 1, 2].map((subleaf) => register(entries, 4, 'eax', subleaf)!)
    expect(caches.map((eax) => (eax >>> 14) & 0xfff)).toEqual([1, 1, 7])
    expect(caches.map((eax) => eax >>> 26)).toEqual([3, 3, 3])
    expect(caches.map((eax) => eax & 0x3fff)).toEqual([0x121, 0x143, 0x163])
    expect(register(entries, 4, 'eax', 3)).toBe(0)
    for (const number of [0xb, 0x1f]) {
      const levels = entries.filter((entry) => entry.function === number)
      expect(levels).toEqual([
        leaf(number, { index: 0, eax: 1, ebx: 2, ecx: 0x100, edx: 13 }),
        leaf(number, { index: 1, eax: 3, ebx: 6, ecx: 0x201, edx: 13 }),
        leaf(number, { index: 2, eax: 0, ebx: 0, ecx: 2, edx: 13 }),
      ])
    }
    expect(register(entries, 0x8000_0008, 'ecx')).toBe(0)
  })

  it('shows on an AMD processor in leaves 1, 0xb, 0x80000008, 0x8000001d and 0x8000001e', () => {
    const entries = resolveCpu({ sockets: 2, cores: 3, threads: 2 }, amd, 12, HARDWARE).entriesFor(11)
    expect(register(entries, 1, 'ebx')).toBe(0x0d06_0800)
    expect(register(entries, 0xb, 'eax', 1)).toBe(3)
    expect(register(entries, 0x1f, 'eax')).toBeUndefined()
    // 6 threads of a package, 3 bits of the APIC id; what is above is the host's.
    expect(register(entries, 0x8000_0008, 'ecx')).toBe(0x1_3005)
    const caches = [0, 1, 2].map((subleaf) => register(entries, 0x8000_001d, 'eax', subleaf)!)
    expect(caches.map((eax) => eax >>> 14)).toEqual([1, 1, 5])
    expect(entries.find((entry) => entry.function === 0x8000_001e)).toEqual(
      leaf(0x8000_001e, { eax: 13, ebx: 0x106, ecx: 1 }),
    )
    expect(entries.some((entry) => entry.function === 0x8000_0026)).toBe(false)
  })

  it('is not the host’s: no leaf has its APIC id', () => {
    for (const supported of [intel, amd]) {
      const entries = resolveCpu('host', supported, 1, HARDWARE).entriesFor(0)
      expect(register(entries, 1, 'ebx')! >>> 16).toBe(1)
      for (const number of [0xb, 0x1f, 0x8000_001e]) expect(register(entries, number, 'edx') ?? 0).toBe(0)
    }
  })

  it('has APIC ids above 254 with x2apic only', () => {
    expect(resolveCpu({}, intel, 300, HARDWARE).apicId(299)).toBe(299)
    expect(register(resolveCpu({}, intel, 300, HARDWARE).entriesFor(299), 1, 'ebx')! >>> 24).toBe(299 & 0xff)
    expect(register(resolveCpu({}, intel, 300, HARDWARE).entriesFor(299), 0xb, 'edx')).toBe(299)
    const refused = (message: RegExp) =>
      expect.objectContaining({
        code: 'ERR_INVALID_ARGUMENT',
        lastApicId: 255,
        message: expect.stringMatching(message),
      })
    const off = { features: { x2apic: false } }
    expect(() => resolveCpu(off, intel, 256, HARDWARE)).toThrow(refused(/254 without x2apic.*add x2apic/))
    expect(() => resolveCpu('minimal', intel, 256, HARDWARE)).toThrow(refused(/add x2apic/))
    expect(() => resolveCpu('host', intel, 256, { ...HARDWARE, apicInKernel: false })).toThrow(
      refused(/local APIC in the kernel/),
    )
    expect(resolveCpu(off, intel, 255, HARDWARE).apicId(254)).toBe(254)
    // 3 cores take 4 ids: 192 vCPUs need ids up to 254, and 195 more than there are.
    expect(resolveCpu({ ...off, cores: 3 }, intel, 192, HARDWARE).apicId(191)).toBe(254)
    expect(() => resolveCpu({ ...off, cores: 3 }, intel, 195, HARDWARE)).toThrow(/254 without x2apic/)
  })

  it('has vCPUs from 0 to the last', () => {
    const cpu = resolveCpu('host', intel, 2, HARDWARE)
    for (const index of [-1, 2, 0.5, Number.NaN]) {
      expect(() => cpu.entriesFor(index)).toThrow(expect.objectContaining({ code: 'ERR_INVALID_ARGUMENT' }))
      expect(() => cpu.apicId(index)).toThrow(expect.objectContaining({ code: 'ERR_INVALID_ARGUMENT' }))
    }
    for (const cpus of [0, -1, 1.5, Number.NaN]) {
      expect(() => resolveCpu('host', intel, cpus, HARDWARE)).toThrow(/at least 1 for cpus/)
    }
  })
})
