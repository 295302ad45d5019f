import type { CpuHost } from '../../src/cpu/cpu-model.js'
import {
  type CpuFeature,
  FEATURE_BITS,
  FEATURE_REGISTERS,
  featuresOf,
  findEntry,
} from '../../src/cpu/features.js'
import type { CpuidEntry } from '../../src/kvm/cpuid.js'

/** What a host offers, made up for tests. */
export type Vendor = 'intel' | 'amd'

export const HARDWARE: CpuHost = { kind: 'hardware', apicInKernel: true, tscDeadline: true }

export const leaf = (number: number, registers: Partial<CpuidEntry> = {}): CpuidEntry => ({
  function: number,
  index: 0,
  flags: 'index' in registers ? 1 : 0,
  eax: 0,
  ebx: 0,
  ecx: 0,
  edx: 0,
  ...registers,
})

const VENDORS = {
  intel: { ebx: 0x756e_6547, edx: 0x4965_6e69, ecx: 0x6c65_746e },
  amd: { ebx: 0x6874_7541, edx: 0x6974_6e65, ecx: 0x444d_4163 },
}

const CACHE_EAX = { l1Data: 0x0000_0121, l2: 0x0000_0143, l3: 0x0000_0163 }

/** KVM_GET_SUPPORTED_CPUID of a host with every feature of the table but those; and with the host's own topology. */
export function supportedBy(vendor: Vendor, lacks: readonly CpuFeature[] = []): CpuidEntry[] {
  const entries = [
    leaf(0, { eax: vendor === 'intel' ? 0x20 : 0x10, ...VENDORS[vendor] }),
    leaf(1, { eax: 0x0005_0657, ebx: 0x2a40_0800 }),
    leaf(2, { eax: 0x0076_3001 }),
    ...Object.values(CACHE_EAX).map((eax, index) =>
      leaf(4, { index, eax: vendor === 'intel' ? eax | 0xffc0_0000 | (63 << 14) : 0, ebx: 0x01c0_003f }),
    ),
    leaf(4, { index: 3 }),
    leaf(6),
    leaf(7, { index: 0, eax: 2 }),
    leaf(7, { index: 1 }),
    leaf(7, { index: 2, edx: 0x3f }),
    leaf(0xa, { eax: 0x0830_0802 }),
    leaf(0xb, { index: 0, edx: 0x2a }),
    leaf(0xd, { index: 0, eax: 0x0006_02ff, ecx: 0x2b00 }),
    leaf(0xd, { index: 1, ecx: 0x1800 }),
    ...STATE.map(([index, length, offset]) => leaf(0xd, { index, eax: length, ebx: offset })),
    ...(vendor === 'intel' ? [leaf(0x1f, { index: 0, edx: 0x2a })] : []),
    leaf(0x4000_0000, { eax: 0x4000_0001, ebx: 0x4b4d_564b, ecx: 0x564b_4d56, edx: 0x4d }),
    leaf(0x4000_0001),
    leaf(0x8000_0000, { eax: vendor === 'amd' ? 0x8000_0026 : 0x8000_0021 }),
    leaf(0x8000_0001, { edx: vendor === 'amd' ? 0x0183_f3ff : 0 }),
    leaf(0x8000_0007),
    leaf(0x8000_0008, { eax: 0x3030, ecx: vendor === 'amd' ? 0x1_607f : 0 }),
    ...(vendor === 'amd'
      ? [
          ...Object.values(CACHE_EAX).map((eax, index) =>
            leaf(0x8000_001d, { index, eax: eax | (15 << 14) }),
          ),
          leaf(0x8000_001e, { eax: 0x2a, ebx: 0x115 }),
          leaf(0x8000_0026, { index: 0, edx: 0x2a }),
        ]
      : []),
    leaf(0x8000_0021),
  ]
  for (const { leaf: number, subleaf, register, features, known } of FEATURE_REGISTERS) {
    const entry = findEntry(entries, number, subleaf)!
    const missing = features
      .filter(({ name }) => lacks.includes(name))
      .reduce((bits, { bit }) => bits | (1 << bit), 0)
    entry[register] = (entry[register] | (known & ~missing)) >>> 0
  }
  return entries
}

/** Parts of the XSAVE area: number, length and offset in bytes. CET's two are supervisor state. */
const STATE = [
  [2, 256, 576],
  [3, 64, 960],
  [4, 64, 1024],
  [5, 64, 1088],
  [6, 512, 1152],
  [7, 1024, 1664],
  [9, 8, 2688],
  [11, 16, 0],
  [12, 24, 0],
  [17, 64, 2752],
  [18, 8192, 2816],
] as const

/** Every name of the table. */
export const ALL_FEATURES: readonly CpuFeature[] = FEATURE_BITS.map(({ name }) => name)

/** A register of a leaf. */
export function register(
  entries: readonly CpuidEntry[],
  number: number,
  name: 'eax' | 'ebx' | 'ecx' | 'edx',
  subleaf = 0,
): number | undefined {
  return findEntry(entries, number, subleaf)?.[name]
}

/** The names of the features in entries, sorted. */
export const namesIn = (entries: readonly CpuidEntry[]) => [...featuresOf(entries)].sort()
