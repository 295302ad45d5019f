import { describe, expect, it } from 'vitest'
import { type CpuHost, resolveCpu } from '../../src/cpu/cpu-model.js'
import { featuresOf } from '../../src/cpu/features.js'
import { CPU_MODELS } from '../../src/cpu/models.js'
import { measureShownCpuid } from '../../src/cpu/shown-cpuid.js'
import { type CpuidEntry, inspectHost, Kvm } from '../../src/kvm/index.js'
import { dword, OUT_DX_AL } from '../helpers/code.js'
import { makeMetal, nextExit } from '../kvm/metal.js'
import { register } from './hosts.js'

const { kind, capabilities } = inspectHost()
const isPvm = kind === 'pvm'
const kvm = new Kvm()
const supported = kvm.getSupportedCpuid()
const shown = isPvm ? measureShownCpuid(kvm) : undefined
kvm.close()

/** Of the machine that {@link readByGuest} makes: no interrupt controller in the kernel, unless asked for. */
const host = (apicInKernel = false): CpuHost => ({
  kind: kind!,
  apicInKernel,
  tscDeadline: capabilities!.TSC_DEADLINE_TIMER > 0,
  shown,
})

const RESULTS = 0x4000
const REGISTERS = ['eax', 'ebx', 'ecx', 'edx'] as const

/** In real mode: `cpuid` with EAX and ECX, and its four registers to memory. */
const cpuidTo = (address: number, { function: leaf, index }: CpuidEntry) => [
  ...[0x66, 0xb8, ...dword(leaf)], // mov eax, leaf
  ...[0x66, 0xb9, ...dword(index)], // mov ecx, index
  ...[0x0f, 0xa2], // cpuid
  ...[0x66, 0xa3, address & 0xff, address >> 8], // mov [address], eax
  ...[0x1e, 0x0e, 0x16].flatMap((modrm, i) => {
    const place = address + 4 * (i + 1)
    return [0x66, 0x89, modrm, place & 0xff, place >> 8] // mov [address + 4 …], ebx, ecx, edx
  }),
]

const APIC_BASE_ENABLED = 0xfee0_0900n

/** What the kernel of a guest reads with `cpuid`: of the entries that its vCPU was given, or of others. */
function readByGuest(entries: readonly CpuidEntry[], apicInKernel = false, asked = entries): CpuidEntry[] {
  const reads = asked.flatMap((entry, i) => cpuidTo(RESULTS + 16 * i, entry))
  const { vcpu, memory } = makeMetal({
    code: [...reads, ...OUT_DX_AL],
    prepare: (vm) => {
      if (apicInKernel) vm.enableCap('SPLIT_IRQCHIP', [24n])
    },
  })
  vcpu.setCpuid(entries)
  // KVM shows the apic bit as this says.
  const apicBase = featuresOf(entries).has('apic') ? APIC_BASE_ENABLED : 0n
  vcpu.setSregs({ ...vcpu.getSregs(), apicBase })
  expect(nextExit(vcpu).kind).toBe('io')
  const results = new DataView(memory.buffer, memory.byteOffset + RESULTS)
  return asked.map((entry, i) => ({
    ...entry,
    ...Object.fromEntries(REGISTERS.map((name, j) => [name, results.getUint32(16 * i + 4 * j, true)])),
  }))
}

/** Without the sizes of the XSAVE area in use, which KVM computes when the guest asks. */
const comparable = (entries: readonly CpuidEntry[]) =>
  entries.map((entry) => (entry.function === 0xd && entry.index < 2 ? { ...entry, ebx: 0 } : entry))

describe.each(CPU_MODELS)('a guest with the CPU model %s', (model) => {
  it.each([false, true])(
    'reads the CPUID that it was given (local APIC in the kernel: %s)',
    (apicInKernel) => {
      let cpu: ReturnType<typeof resolveCpu>
      try {
        cpu = resolveCpu(model, supported, 1, host(apicInKernel))
      } catch (error) {
        // A level above this processor: what it lacks is indeed not offered.
        expect(model).toMatch(/^x86-64-v[234]$/)
        expect(error).toMatchObject({ code: 'ERR_KVM_UNSUPPORTED', missing: expect.any(Array) })
        const offered = featuresOf(supported)
        for (const name of (error as { missing: [] }).missing) expect(offered).not.toContain(name)
        return
      }
      const entries = cpu.entriesFor(0)
      const read = readByGuest(entries, apicInKernel)
      expect(comparable(read)).toEqual(comparable(entries))
      expect([...featuresOf(read)].sort()).toEqual(cpu.features)
      expect(cpu.features.includes('apic')).toBe(apicInKernel)
    },
  )
})

describe('a guest', () => {
  it('finds its place in a machine of 2 packages of 3 cores of 2 threads', () => {
    const cpu = resolveCpu({ sockets: 2, cores: 3, threads: 2 }, supported, 12, host())
    const read = readByGuest(cpu.entriesFor(11))
    expect(register(read, 1, 'ebx')! >>> 24).toBe(13)
    expect([0, 1, 2].map((subleaf) => register(read, 0xb, 'eax', subleaf))).toEqual([1, 3, 0])
    expect([0, 1, 2].map((subleaf) => register(read, 0xb, 'edx', subleaf))).toEqual([13, 13, 13])
  })

  it('does not see features that were taken away, in leaves that every KVM lets be changed', () => {
    const features = { x2apic: false, cx16: false, nx: false, lahf_lm: false, kvm_clock: false }
    const cpu = resolveCpu({ features }, supported, 1, host(true))
    expect(cpu.ignored).toEqual([])
    const seen = featuresOf(readByGuest(cpu.entriesFor(0), true))
    for (const name of Object.keys(features)) expect([...seen]).not.toContain(name)
  })

  it('sees nothing of leaf 7 when no feature of it is wanted', () => {
    const entries = resolveCpu('minimal', supported, 1, host()).entriesFor(0)
    const leaf7 = { function: 7, index: 0, flags: 1, eax: 0, ebx: 0, ecx: 0, edx: 0 }
    expect(readByGuest(entries, false, [leaf7])).toEqual([leaf7])
  })

  it.skipIf(isPvm)('does not see features of any leaf that were taken away', () => {
    const cpu = resolveCpu({ features: { popcnt: false, sse4_2: false, smep: false } }, supported, 1, host())
    expect(cpu.ignored).toEqual([])
    const seen = featuresOf(readByGuest(cpu.entriesFor(0)))
    for (const name of ['popcnt', 'sse4_2', 'smep'] as const) expect([...seen]).not.toContain(name)
  })

  // PVM cannot hide what user code finds on the processor: leaf 1 ECX and EDX, and all of leaves 7 and 0xd.
  it.runIf(isPvm)('sees on PVM what was taken away of leaves 1 and 7, and ignored says so', () => {
    const features = { clflush: false, rdrand: false, smep: false, fsgsbase: false, x2apic: false }
    const cpu = resolveCpu({ features }, supported, 1, host(true))
    const seen = featuresOf(readByGuest(cpu.entriesFor(0), true))
    const visible = Object.keys(features).filter((name) => (seen as ReadonlySet<string>).has(name))
    expect(visible).toContain('clflush')
    expect(visible).not.toContain('x2apic')
    expect(cpu.ignored).toEqual(visible.sort())
  })
})

describe.runIf(isPvm)('PVM', () => {
  it('shows what it shows of leaves 1, 7 and 0xd, and follows in all others', () => {
    const fixed = new Set<number>()
    for (const least of shown!.least) {
      const most = shown!.most.find(
        (entry) => entry.function === least.function && entry.index === least.index,
      )!
      // Sizes and topology are not features.
      for (const name of featuresOf([least])) expect(featuresOf([most])).toContain(name)
      if (featuresOf([least]).size > 0) fixed.add(least.function)
    }
    expect([...fixed].sort((a, b) => a - b)).toEqual([1, 7, 0xd])
  })
})
