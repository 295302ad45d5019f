import { invalidArgument, NodevisorError } from '../errors.js'
import type { CpuidEntry } from '../kvm/cpuid.js'

/** How vCPUs form a machine: their product is the number of vCPUs. */
export interface CpuTopology {
  /** Packages. */
  readonly sockets: number
  /** Cores of a package. */
  readonly cores: number
  /** Threads of a core. */
  readonly threads: number
}

/** The names of {@link CpuTopology}. */
export const TOPOLOGY_KEYS = ['sockets', 'cores', 'threads'] as const

/**
 * Completes a topology. What is not given is one; but one of them has to make up the number of vCPUs: the
 * cores, or else the sockets, or else the threads.
 *
 * @throws `ERR_INVALID_ARGUMENT` for what is no count, or where the product is not `cpus`
 */
export function checkTopology(given: Partial<Record<keyof CpuTopology, unknown>>, cpus: number): CpuTopology {
  for (const key of TOPOLOGY_KEYS) {
    const count = given[key]
    if (count === undefined || (Number.isInteger(count) && (count as number) >= 1)) continue
    throw invalidArgument(`cpu.${key}`, 'an integer of at least 1', count)
  }
  const { sockets = 1, cores = 1, threads = 1 } = given as Partial<CpuTopology>
  const product = sockets * cores * threads
  const topology = { sockets, cores, threads }
  const free = (['cores', 'sockets', 'threads'] as const).find((key) => given[key] === undefined)
  if (free !== undefined) topology[free] = cpus / product
  if (Number.isInteger(cpus / product) && (free !== undefined || product === cpus)) return topology
  const counts = TOPOLOGY_KEYS.filter((key) => given[key] !== undefined)
  const names = counts.map((key) => `cpu.${key}`).join(' * ')
  const values = counts.map((key) => given[key]).join(' * ')
  throw new NodevisorError(
    'ERR_INVALID_ARGUMENT',
    `Expected ${names} to ${free === undefined ? 'be' : 'divide'} the number of vCPUs, ${cpus}, but ` +
      `received ${values}; change ${counts.length > 1 ? 'them' : 'it'}, or cpus`,
    { argument: 'cpu', received: given, cpus },
  )
}

/** Bits that `count` ids take. */
function bitsFor(count: number): number {
  return count > 1 ? 32 - Math.clz32(count - 1) : 0
}

/** Bits of an APIC id below the package's number, and below the core's. */
function apicIdBits({ cores, threads }: CpuTopology): { thread: number; package: number } {
  const thread = bitsFor(threads)
  return { thread, package: bitsFor(cores) + thread }
}

/**
 * The APIC id of a vCPU: package, core and thread, each in a field of as many bits as it needs (Intel SDM
 * vol. 3, "Hierarchical ID of Logical Processors"). Counts that are no powers of two leave ids out.
 */
export function apicIdOf(topology: CpuTopology, index: number): number {
  const { cores, threads } = topology
  const bits = apicIdBits(topology)
  const core = Math.floor(index / threads) % cores
  return (
    Math.floor(index / (cores * threads)) * 2 ** bits.package + core * 2 ** bits.thread + (index % threads)
  )
}

/** The last APIC id without x2APIC: 0xff is everyone (Intel SDM vol. 3, "Local APIC ID"). */
export const MAX_XAPIC_ID = 0xfe

const LEAF_FEATURES = 1
const LEAF_CACHES = 4
const LEAF_TOPOLOGY = 0xb
const LEAF_TOPOLOGY_V2 = 0x1f
const LEAF_AMD_SIZES = 0x8000_0008
const LEAF_AMD_CACHES = 0x8000_001d
const LEAF_AMD_TOPOLOGY = 0x8000_001e
const LEAF_AMD_TOPOLOGY_V2 = 0x8000_0026

const KVM_CPUID_FLAG_SIGNIFCANT_INDEX = 1

/** Level types of leaves 0BH and 1FH. */
const LEVEL_INVALID = 0
const LEVEL_THREAD = 1
const LEVEL_CORE = 2

const CACHE_TYPE_MASK = 0x1f
const LAST_LEVEL = 3

/**
 * CPUID with the topology and the place in it of one vCPU.
 *
 * - leaf 01H EBX: CLFLUSH size kept, logical processors of a package, initial APIC id (Intel SDM vol. 2A, CPUID)
 * - leaf 04H EAX (Intel): who shares a cache; first and second level belong to a core, the third to a package
 * - leaves 0BH and, for Intel processors that have it, 1FH: the levels of the APIC id
 * - leaf 8000_0008H ECX (AMD): threads of a package, bits of the APIC id (AMD APM vol. 3, E.4.7)
 * - leaves 8000_001DH and 8000_001EH (AMD, topology extensions): caches, core and node ids (E.4.15, E.4.16)
 *
 * The host's own topology (8000_0026H) is left out: Linux reads 0BH without it.
 */
export function topologyEntries(
  entries: readonly CpuidEntry[],
  topology: CpuTopology,
  index: number,
  isAmd: boolean,
): CpuidEntry[] {
  const { cores, threads } = topology
  const bits = apicIdBits(topology)
  const apicId = apicIdOf(topology, index)
  const perPackage = cores * threads

  const place = (entry: CpuidEntry): CpuidEntry => {
    switch (entry.function) {
      case LEAF_FEATURES: {
        const logical = Math.min(isAmd ? perPackage : 2 ** bits.package, 0xff)
        return { ...entry, ebx: ((entry.ebx & 0xffff) | (logical << 16) | ((apicId & 0xff) << 24)) >>> 0 }
      }
      case LEAF_CACHES: {
        if (isAmd || (entry.eax & CACHE_TYPE_MASK) === 0) return entry
        const sharing = 2 ** (levelOf(entry) < LAST_LEVEL ? bits.thread : bits.package)
        const coreIds = Math.min(2 ** (bits.package - bits.thread), 64)
        return { ...entry, eax: (withSharing(entry.eax, sharing) | ((coreIds - 1) << 26)) >>> 0 }
      }
      case LEAF_AMD_SIZES: {
        if (!isAmd) return entry
        const threadsField = Math.min(perPackage - 1, 0xff)
        return { ...entry, ecx: ((entry.ecx & ~0xf0ff) | threadsField | (bits.package << 12)) >>> 0 }
      }
      case LEAF_AMD_CACHES: {
        if ((entry.eax & CACHE_TYPE_MASK) === 0) return entry
        return { ...entry, eax: withSharing(entry.eax, levelOf(entry) < LAST_LEVEL ? threads : perPackage) }
      }
      case LEAF_AMD_TOPOLOGY: {
        const core = (apicId >>> bits.thread) & 0xff
        const node = Math.floor(index / perPackage) & 0xff
        return { ...entry, eax: apicId, ebx: core | (Math.min(threads - 1, 0xff) << 8), ecx: node, edx: 0 }
      }
      default:
        return entry
    }
  }

  const level = (leaf: number, subleaf: number, type: number, shift: number, count: number): CpuidEntry => ({
    function: leaf,
    index: subleaf,
    flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
    eax: shift,
    ebx: Math.min(count, 0xffff),
    ecx: subleaf | (type << 8),
    edx: apicId,
  })
  const levels = (leaf: number) => [
    level(leaf, 0, LEVEL_THREAD, bits.thread, threads),
    level(leaf, 1, LEVEL_CORE, bits.package, perPackage),
    level(leaf, 2, LEVEL_INVALID, 0, 0),
  ]
  const hasV2 = !isAmd && entries.some((entry) => entry.function === LEAF_TOPOLOGY_V2)
  const replaced = [LEAF_TOPOLOGY, LEAF_TOPOLOGY_V2, LEAF_AMD_TOPOLOGY_V2]
  return [
    ...entries.filter((entry) => !replaced.includes(entry.function)).map(place),
    ...levels(LEAF_TOPOLOGY),
    ...(hasV2 ? levels(LEAF_TOPOLOGY_V2) : []),
  ]
}

/** A cache's level: bits 7 to 5 of EAX of leaves 04H and 8000_001DH. */
function levelOf({ eax }: CpuidEntry): number {
  return (eax >>> 5) & 7
}

/** EAX of a cache that so many processors share; the field above, of leaf 04H, is cleared. */
function withSharing(eax: number, processors: number): number {
  return ((eax & 0x3fff) | ((Math.min(processors, 0x1000) - 1) << 14)) >>> 0
}
