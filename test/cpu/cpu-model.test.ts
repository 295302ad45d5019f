import fc from 'fast-check'
import { describe, expect, it } from 'vitest'
import { type CpuOptions, resolveCpu } from '../../src/cpu/cpu-model.js'
import { FEATURE_NEEDS, withNeeds } from '../../src/cpu/dependencies.js'
import { type CpuFeature, FEATURE_REGISTERS, findEntry } from '../../src/cpu/features.js'
import { CPU_BASELINES, CPU_MODELS, type CpuModelName } from '../../src/cpu/models.js'
import { ALL_FEATURES, HARDWARE, namesIn, register, supportedBy, type Vendor } from './hosts.js'

const intel = supportedBy('intel')
const amd = supportedBy('amd')
const resolve = (options: unknown, supported = intel, host = HARDWARE) =>
  resolveCpu(options, supported, 1, host)
const failure = (code: string, message: RegExp, facts: object = {}) =>
  expect.objectContaining({
    name: 'NodevisorError',
    code,
    message: expect.stringMatching(message),
    ...facts,
  })

describe('the CPU model host', () => {
  it('is all that KVM offers, and the default', () => {
    const expected = ALL_FEATURES.filter((name) => name !== 'ht' && name !== 'cmp_legacy').sort()
    for (const options of ['host', undefined, {}, { model: 'host' }, { features: {} }]) {
      const cpu = resolve(options)
      expect(cpu).toMatchObject({ model: 'host', features: expected, ignored: [] })
    }
  })

  it('keeps what nodevisor does not know', () => {
    const supported = intel.map((entry) =>
      entry.function === 7 && entry.index === 1 ? { ...entry, edx: entry.edx | 1 } : entry,
    )
    const entries = resolve('host', supported).entriesFor(0)
    expect(register(entries, 7, 'edx', 1)! & 1).toBe(1)
    expect(register(entries, 7, 'edx', 2)).toBe(0x3f)
    expect(register(entries, 0xa, 'eax')).toBe(0x0830_0802)
    expect(register(entries, 0, 'eax')).toBe(0x20)
  })

  it('has the bits that KVM leaves to its user', () => {
    const bare = supportedBy('intel', ['x2apic', 'tsc_deadline_timer', 'hypervisor', 'apic'])
    const local: CpuFeature[] = ['apic', 'hypervisor', 'tsc_deadline_timer', 'x2apic']
    const among = (host: object) =>
      resolve('host', bare, { ...HARDWARE, ...host }).features.filter((name) => local.includes(name))
    expect(among({})).toEqual(local)
    expect(among({ tscDeadline: false })).toEqual(['apic', 'hypervisor', 'x2apic'])
    expect(among({ apicInKernel: false })).toEqual(['hypervisor'])
  })

  it('has without a local APIC in the kernel nothing that works with one', () => {
    const { features } = resolve('host', intel, { ...HARDWARE, apicInKernel: false })
    const lost = ALL_FEATURES.filter((name) => !features.includes(name) && name !== 'ht').sort()
    expect(lost).toEqual([
      'apic',
      'arat',
      'cmp_legacy',
      'extapic',
      'kvm_async_pf_int',
      'kvm_msi_ext_dest_id',
      'kvm_pv_eoi',
      'kvm_pv_ipi',
      'kvm_pv_sched_yield',
      'kvm_pv_unhalt',
      'tsc_deadline_timer',
      'x2apic',
    ])
  })

  it('offers no hypercall on PVM, at which a kernel would hang', () => {
    const { features } = resolve('host', intel, { ...HARDWARE, kind: 'pvm' })
    expect(features).toContain('kvm_clock')
    for (const name of ['kvm_pv_ipi', 'kvm_pv_unhalt', 'kvm_pv_sched_yield', 'kvm_map_gpa_range'] as const) {
      expect(features).not.toContain(name)
    }
  })
})

describe('a baseline', () => {
  const names = Object.keys(CPU_BASELINES) as (keyof typeof CPU_BASELINES)[]

  it.each(names)('%s has what it requires and allows, and nothing else of the richest host', (model) => {
    for (const supported of [intel, amd]) {
      const cpu = resolve(model, supported)
      const { requires, allows } = CPU_BASELINES[model]
      expect(cpu.features).toEqual([...requires, ...allows].sort())
      expect(cpu.ignored).toEqual([])
      const entries = cpu.entriesFor(0)
      expect(namesIn(entries)).toEqual(cpu.features)
      for (const { leaf, subleaf, register: name, known } of FEATURE_REGISTERS) {
        const repeated = leaf === 0x8000_0001 && name === 'edx' ? 0x0183_f3ff : 0
        expect((findEntry(entries, leaf, subleaf)?.[name] ?? 0) & ~known & ~repeated).toBe(0)
      }
      for (const number of [0xa, 0x8000_0026]) expect(register(entries, number, 'eax')).toBeUndefined()
      // The highest subleaf is 1: the host's second one has none of the features.
      if (model !== 'minimal') expect(register(entries, 7, 'eax')).toBe(1)
      expect(register(entries, 7, 'edx', 2)).toBeUndefined()
    }
  })

  it.each(names)('%s needs all that it requires: the host that lacks some is told which', (model) => {
    for (const name of CPU_BASELINES[model].requires) {
      expect(() => resolve(model, supportedBy('amd', [name]))).toThrow(
        failure('ERR_KVM_UNSUPPORTED', new RegExp(`'${model}' asks for, but it lacks ${name}; `), {
          missing: [name],
        }),
      )
    }
    const { allows } = CPU_BASELINES[model]
    const left = allows.filter((name) =>
      ['apic', 'hypervisor', 'x2apic', 'tsc_deadline_timer'].includes(name),
    )
    expect(resolve(model, supportedBy('amd', allows)).features).toEqual(
      // The timer needs the TSC, which is among what levels allow.
      [...CPU_BASELINES[model].requires, ...left]
        .filter((name) => name !== 'tsc_deadline_timer' || !(allows as readonly string[]).includes('tsc'))
        .sort(),
    )
  })

  // The list of System V ABI, AMD64 supplement, table "Micro-Architecture Levels"; OSFXSR and OSXSAVE are the kernel's.
  it.each([
    ['x86-64-v1', 'cmov cx8 fpu fxsr mmx syscall sse sse2'],
    ['x86-64-v2', 'cx16 lahf_lm popcnt pni sse4_1 sse4_2 ssse3'],
    ['x86-64-v3', 'avx avx2 bmi1 bmi2 f16c fma abm movbe'],
    ['x86-64-v4', 'avx512f avx512bw avx512cd avx512dq avx512vl'],
  ] as const)('%s has the features of its level and of those below', (model, list) => {
    const above = CPU_MODELS.filter((name) => name.startsWith('x86-64') && name < model) as CpuModelName[]
    for (const name of list.split(' ') as CpuFeature[]) {
      expect(resolve(model).features).toContain(name)
      for (const lower of above) expect(resolve(lower).features).not.toContain(name)
    }
  })

  it('minimal is the same on hosts of one maker, and has no clock of KVM, no leaf 7 and no XSAVE', () => {
    const rich = resolve('minimal').entriesFor(0)
    const poor = supportedBy('intel', ['avx', 'avx2', 'xsave', 'smep', 'kvm_clock', 'rdrand', 'x2apic'])
    expect(resolve('minimal', poor).entriesFor(0)).toEqual(rich)
    const leaves = rich.map((entry) => entry.function)
    for (const leaf of [7, 0xd, 0x4000_0000, 0x4000_0001]) expect(leaves).not.toContain(leaf)
    expect(register(rich, 0, 'eax')).toBe(0x1f)
    expect(register(rich, 0x8000_0000, 'eax')).toBe(0x8000_0021)
  })
})

describe('features', () => {
  it.each([
    ['avx', ['avx2', 'fma', 'f16c', 'avx512f', 'avx512vl', 'avx512_bf16', 'vaes', 'xop', 'sm4', 'avx_vnni']],
    ['xsave', ['avx', 'avx2', 'xsaves', 'pku', 'amx_tile', 'amx_int8', 'shstk', 'mpx']],
    ['avx512vl', ['avx512_vnni', 'avx512_bf16']],
    ['apic', ['x2apic', 'tsc_deadline_timer', 'kvm_pv_eoi']],
    ['hypervisor', ['kvm_clock', 'kvm_clock_old', 'kvm_steal_time', 'kvm_pv_tlb_flush']],
    ['kvm_clock', ['kvm_clock_old', 'kvm_clock_stable']],
    ['lm', ['pdpe1gb', 'la57', 'pcid']],
  ] as const)('taken away take what needs them along: %s', (name, dependants) => {
    const { features, entriesFor } = resolve({ features: { [name]: false } })
    for (const gone of [name, ...dependants]) expect(features).not.toContain(gone)
    const all = resolve('host').features
    const expected = all.filter((other) => !withNeeds(other).has(name))
    expect(features).toEqual(expected)
    expect(namesIn(entriesFor(0))).toEqual(expected)
  })

  it('added to a baseline are there, beside its own', () => {
    const base = resolve('x86-64-v2').features
    const { features } = resolve({ model: 'x86-64-v2', features: { aes: true, rdrand: true, smap: true } })
    expect(features).toEqual([...base, 'aes', 'rdrand'].sort())
  })

  it('taken away from a baseline are no longer required', () => {
    const supported = supportedBy('intel', ['avx', 'avx2', 'fma', 'f16c'])
    const options: CpuOptions = { model: 'x86-64-v3', features: { avx: false } }
    expect(resolve(options, supported).features).toContain('bmi2')
    expect(() => resolve('x86-64-v3', supported)).toThrow(
      failure('ERR_KVM_UNSUPPORTED', /avx, avx2, f16c, fma/),
    )
  })

  it('are called by any of their names', () => {
    const options: CpuOptions = { features: { 'tsc-deadline': false, lzcnt: false, 'sse4-2': false } }
    const { features } = resolve(options)
    for (const name of ['tsc_deadline_timer', 'abm', 'sse4_2'] as const) expect(features).not.toContain(name)
  })

  it('that the host lacks are named', () => {
    const supported = supportedBy('intel', ['avx512f', 'la57'])
    expect(() => resolve({ features: { avx512f: true, avx2: true, la57: true } }, supported)).toThrow(
      failure('ERR_KVM_UNSUPPORTED', /lacks avx512f, la57;/, { missing: ['avx512f', 'la57'] }),
    )
    expect(() =>
      resolve({ features: { x2apic: true } }, intel, { ...HARDWARE, apicInKernel: false }),
    ).toThrow(failure('ERR_KVM_UNSUPPORTED', /lacks x2apic; .*local APIC in the kernel/))
  })

  it.each([
    [
      { features: { avx: false, avx2: true } },
      /avx2 .* without avx, which cpu\.features takes away/,
      ['avx'],
    ],
    [{ features: { fxsr: false, avx512vl: true } }, /avx512vl .* without fxsr/, ['fxsr']],
    [
      { model: 'x86-64-v2', features: { avx2: true } },
      /without avx, xsave, which 'x86-64-v2'/,
      ['avx', 'xsave'],
    ],
    [{ model: 'minimal', features: { kvm_clock: true } }, /without hypervisor/, ['hypervisor']],
  ])('that contradict each other are refused: %j', (options, message, needs) => {
    expect(() => resolve(options)).toThrow(failure('ERR_INVALID_ARGUMENT', message, { needs }))
  })

  it.each([
    ['hots', /Expected one of 'host', 'x86-64-v1'.* for cpu but received 'hots'; did you mean 'host'\?/],
    [{ model: 'x86-64-v5' }, /for cpu\.model but received 'x86-64-v5'; did you mean 'x86-64-v1'\?/],
    [{ model: 7 }, /for cpu\.model but received 7/],
    [{ model: 'toString' }, /for cpu\.model/],
    [null, /a model's name or \{ model, .* for cpu but received null/],
    [7, /for cpu but received 7/],
    [['host'], /for cpu but received an array of 1/],
    [{ features: ['avx'] }, /an object of feature names and booleans for cpu\.features/],
    [{ features: { avx: 1 } }, /true or false for cpu\.features\['avx'\] but received 1/],
    [{ features: { avxx: true } }, /received 'avxx'; did you mean 'avx'\?/],
    [{ features: { ht: true } }, /follows from cpu\.cores and cpu\.threads/],
    [{ features: { abm: true, lzcnt: false } }, /'lzcnt' is another name/],
  ])('and models are checked: %j', (options, message) => {
    expect(() => resolve(options)).toThrow(failure('ERR_INVALID_ARGUMENT', message))
  })

  it('are an option that is spelt so', () => {
    expect(() => resolve({ feature: {} })).toThrow(
      failure('ERR_UNKNOWN_OPTION', /received 'feature'; did you mean 'features'\?/),
    )
  })

  it('in any combination give CPUID that agrees with itself, or a typed error', () => {
    const choices = fc.dictionary(fc.constantFrom(...ALL_FEATURES), fc.boolean(), { maxKeys: 12 })
    const models = fc.constantFrom(...CPU_MODELS)
    let resolved = 0
    fc.assert(
      fc.property(
        models,
        choices,
        fc.constantFrom<Vendor>('intel', 'amd'),
        fc.subarray([...ALL_FEATURES], { maxLength: 30 }),
        fc.boolean(),
        (model, features, vendor, lacks, apicInKernel) => {
          let cpu: ReturnType<typeof resolveCpu>
          const supported = supportedBy(vendor, lacks)
          try {
            cpu = resolveCpu({ model, features }, supported, 2, { ...HARDWARE, apicInKernel })
          } catch (error) {
            expect(error).toMatchObject({
              name: 'NodevisorError',
              code: expect.stringMatching('ERR_INVALID_ARGUMENT|ERR_KVM_UNSUPPORTED'),
            })
            return
          }
          resolved++
          const seen = new Set(cpu.features)
          for (const name of seen) {
            for (const need of FEATURE_NEEDS[name] ?? [])
              expect(seen, `${name} needs ${need}`).toContain(need)
          }
          for (const [name, choice] of Object.entries(features)) {
            expect(seen.has(name as CpuFeature), name).toBe(choice)
          }
          const entries = cpu.entriesFor(1)
          expect(namesIn(entries)).toEqual(cpu.features)
          expectRelatedLeaves(entries, seen, vendor)
        },
      ),
      { numRuns: 300 },
    )
    expect(resolved).toBeGreaterThan(20)
  })

  function expectRelatedLeaves(
    entries: ReturnType<ReturnType<typeof resolveCpu>['entriesFor']>,
    seen: ReadonlySet<CpuFeature>,
    vendor: Vendor,
  ) {
    const repeated = register(entries, 0x8000_0001, 'edx')! & 0x0183_f3ff
    expect(repeated).toBe(vendor === 'amd' ? register(entries, 1, 'edx')! & 0x0183_f3ff : 0)
    const hasState = (component: number) => ((register(entries, 0xd, 'eax') ?? 0) >>> component) & 1
    expect(hasState(0)).toBe(Number(seen.has('xsave')))
    expect(hasState(2)).toBe(Number(seen.has('avx')))
    expect(hasState(6)).toBe(Number(seen.has('avx512f')))
    expect(hasState(9)).toBe(Number(seen.has('pku')))
    expect(hasState(18)).toBe(Number(seen.has('amx_tile')))
    const sizes = entries.filter(({ function: leaf, index }) => leaf === 0xd && index >= 2)
    const end = Math.max(576, ...sizes.map(({ eax, ebx }) => (ebx === 0 ? 0 : eax + ebx)))
    if (seen.has('xsave')) expect(register(entries, 0xd, 'ecx')).toBe(end)
    for (const { index } of sizes.filter(({ ebx }) => ebx > 0)) expect(hasState(index)).toBe(1)
    const hasCet = seen.has('xsaves') && (seen.has('shstk') || seen.has('ibt'))
    expect((register(entries, 0xd, 'ecx', 1) ?? 0) === 0x1800).toBe(hasCet)
    expect(entries.some((entry) => entry.function === 0x4000_0000)).toBe(seen.has('hypervisor'))
    const keys = entries.map(({ function: leaf, index }) => `${leaf}.${index}`)
    expect(new Set(keys).size).toBe(keys.length)
    // KVM_MAX_CPUID_ENTRIES
    expect(keys.length).toBeLessThanOrEqual(256)
    const basic = entries.map((entry) => entry.function).filter((leaf) => leaf < 0x4000_0000)
    expect(Math.max(...basic)).toBeLessThanOrEqual(register(entries, 0, 'eax')!)
    for (const entry of entries) {
      for (const value of Object.values(entry)) expect(value).toBe(value >>> 0)
    }
  }
})

describe('a KVM that shows other features than it is told to', () => {
  // As PVM does: leaf 7 is fixed, AVX cannot be hidden, and CMPXCHG16B not be shown.
  const fixed = (entries: typeof intel, ecx: number) =>
    entries.map((entry) => {
      if (entry.function === 1) return { ...entry, ecx }
      return entry.function === 7 && entry.index === 0 ? { ...entry, ebx: 1 << 5, ecx: 0, edx: 0 } : entry
    })
  const shown = {
    least: fixed(supportedBy('intel', ALL_FEATURES), ((1 << 28) | (1 << 26)) >>> 0),
    most: fixed(intel, ~(1 << 13) >>> 0),
  }
  const host = { ...HARDWARE, kind: 'pvm', shown } as const

  it('is believed: its features are those that it shows', () => {
    const cpu = resolve('host', intel, host)
    expect(cpu.features).toContain('avx2')
    for (const name of ['cx16', 'avx512f', 'umip'] as const) expect(cpu.features).not.toContain(name)
    expect(cpu.ignored).toEqual([])
    expect(namesIn(cpu.entriesFor(0))).toEqual(cpu.features)
  })

  it('says what it does not hide', () => {
    const cpu = resolve({ features: { avx: false, aes: false } }, intel, host)
    expect(cpu.ignored).toEqual(['avx', 'avx2'])
    expect(cpu.features).toContain('avx')
    expect(cpu.features).not.toContain('aes')
    // The state of AVX goes with its bit.
    expect(register(cpu.entriesFor(0), 0xd, 'eax')! & 4).toBe(4)
  })

  it('does not offer what it cannot show', () => {
    expect(() => resolve({ features: { cx16: true } }, intel, host)).toThrow(
      failure('ERR_KVM_UNSUPPORTED', /lacks cx16/),
    )
  })

  it('has leaf 7 hidden by leaving it out', () => {
    const cpu = resolve('minimal', intel, host)
    expect(cpu.features).not.toContain('avx2')
    expect(cpu.ignored).toEqual(expect.arrayContaining(['avx', 'xsave']))
    expect(cpu.ignored).not.toContain('avx2')
  })
})
