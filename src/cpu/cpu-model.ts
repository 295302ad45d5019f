import { closest } from 'fastest-levenshtein'
import { invalidArgument, NodevisorError } from '../errors.js'
import type { CpuidEntry } from '../kvm/cpuid.js'
import type { HostKind } from '../kvm/host.js'
import { withNeeds, withoutOrphans } from './dependencies.js'
import {
  bitsOf,
  type CpuFeature,
  type CpuFeatureName,
  FEATURE_BITS,
  FEATURE_REGISTERS,
  featuresOf,
  findEntry,
  findFeature,
} from './features.js'
import { baselineOf, type CpuBaseline, type CpuModelName, checkModel } from './models.js'
import type { ShownCpuid } from './shown-cpuid.js'
import {
  apicIdOf,
  type CpuTopology,
  checkTopology,
  MAX_XAPIC_ID,
  TOPOLOGY_KEYS,
  topologyEntries,
} from './topology.js'

/** The processor a guest sees: a model and what differs from it. See `docs/cpu.md`. */
export interface CpuOptions extends Partial<CpuTopology> {
  /** Where to start from: `host` unless given. */
  readonly model?: CpuModelName
  /** Features to add (`true`) or to take away (`false`, with all that need them). */
  readonly features?: Readonly<Partial<Record<CpuFeatureName, boolean>>>
}

/** What decides beside the options: the host's KVM, and what the machine has of it. */
export interface CpuHost {
  readonly kind: HostKind
  /** Whether KVM emulates local APICs for this machine: KVM_CREATE_IRQCHIP or KVM_CAP_SPLIT_IRQCHIP. */
  readonly apicInKernel: boolean
  /** KVM_CAP_TSC_DEADLINE_TIMER. */
  readonly tscDeadline: boolean
  /** For a KVM that shows other features than it is told to (PVM): what was measured of it. */
  readonly shown?: ShownCpuid | undefined
}

/** A processor, ready for KVM_SET_CPUID2. */
export interface ResolvedCpu {
  readonly model: CpuModelName
  readonly topology: CpuTopology
  /** Names of the features that the guest sees, sorted. */
  readonly features: readonly CpuFeature[]
  /** What the host's KVM shows though it was to be hidden, or hides though it was asked for; sorted. */
  readonly ignored: readonly CpuFeature[]
  /**
   * CPUID of a vCPU, 0 to the number of vCPUs less one.
   *
   * @throws `ERR_INVALID_ARGUMENT` for a vCPU that there is not
   */
  entriesFor(index: number): CpuidEntry[]
  /**
   * The vCPU's APIC id, which KVM_CREATE_VCPU takes as its id. Not always `index`: 3 cores leave out every
   * 4th.
   */
  apicId(index: number): number
}

const CPU_KEYS = ['model', 'features', ...TOPOLOGY_KEYS] as const

const LEAF_MAX_BASIC = 0
const LEAF_FEATURES = 1
const LEAF_STRUCTURED_FEATURES = 7
const LEAF_STATE = 0xd
const LEAF_KVM_SIGNATURE = 0x4000_0000
const LEAF_KVM_LAST = 0x4fff_ffff
const LEAF_MAX_EXTENDED = 0x8000_0000
const LEAF_AMD_FEATURES = 0x8000_0001
const AMD_CACHE_TOPOLOGY_LEAVES: readonly number[] = [0x8000_001d, 0x8000_001e]

/** The leaves of a baseline: of the others no feature of it needs one, and hosts differ in them. */
const BASELINE_LEAVES: ReadonlySet<number> = new Set([
  ...[0, 1, 2, 4, 6, 7, 0xb, 0xd, 0x1f],
  ...[0x4000_0000, 0x4000_0001],
  ...[0, 1, 2, 3, 4, 5, 6, 7, 8, 0x1d, 0x1e, 0x21].map((leaf) => 0x8000_0000 + leaf),
])

/** Bits of 0x8000_0001 EDX in which AMD repeats leaf 1 EDX (AMD APM vol. 3, E.4.2). */
const AMD_REPEATED_BITS = 0x0183_f3ff

/** "AuthenticAMD" and "HygonGenuine": EBX of leaf 0. */
const AMD_VENDORS: readonly number[] = [0x6874_7541, 0x6f67_7948]

/** What follows from cores and threads, and is not for choice. */
const TOPOLOGY_FEATURES: readonly CpuFeature[] = ['ht', 'cmp_legacy']

/** What the guest would use by VMCALL, at which a kernel on PVM hangs. */
const HYPERCALL_FEATURES: ReadonlySet<CpuFeature> = new Set([
  'kvm_map_gpa_range',
  'kvm_pv_ipi',
  'kvm_pv_sched_yield',
  'kvm_pv_unhalt',
])

/**
 * Makes the CPUID of a machine's vCPUs from what the user wants and what KVM can do.
 *
 * @param options what the user gave: a model's name, {@link CpuOptions} or nothing, for `host`
 * @param supported KVM_GET_SUPPORTED_CPUID
 * @param cpus the number of vCPUs
 * @throws `ERR_INVALID_ARGUMENT` for unknown names, contradictions and topologies that do not fit;
 *   `ERR_UNKNOWN_OPTION`; `ERR_KVM_UNSUPPORTED`, with `missing`, for features that this host does not offer
 */
export function resolveCpu(
  options: unknown,
  supported: readonly CpuidEntry[],
  cpus: number,
  host: CpuHost,
): ResolvedCpu {
  if (!Number.isInteger(cpus) || cpus < 1) throw invalidArgument('cpus', 'an integer of at least 1', cpus)
  const { model, features, topology } = checkCpuOptions(options, cpus)
  const baseline = baselineOf(model)
  const isAmd = AMD_VENDORS.includes(findEntry(supported, LEAF_MAX_BASIC)?.ebx ?? 0)

  const wanted = chooseFeatures(model, features, offeredFeatures(supported, host), host)
  const hasSeveral = topology.cores * topology.threads > 1
  if (hasSeveral) wanted.add('ht')
  if (hasSeveral && isAmd) wanted.add('cmp_legacy')

  const asked = withFeatures(supported, wanted, baseline)
  const shown = host.shown === undefined ? asked : asShown(asked, host.shown)
  const seen = featuresOf(shown)
  const related = withRelatedLeaves(shown, seen, isAmd)
  // A KVM that does not hide features does not hide their state either.
  const common = host.shown === undefined ? withStateLeaves(related, seen) : related
  checkApicIds(topology, cpus, seen, host)

  return {
    model,
    topology,
    features: [...seen].sort(),
    ignored: FEATURE_BITS.map(({ name }) => name)
      .filter((name) => seen.has(name) !== wanted.has(name) && isChosen(name, baseline, features))
      .sort(),
    entriesFor(index) {
      checkIndex(index, cpus)
      return withMaxLeaves(topologyEntries(common, topology, index, isAmd), baseline !== undefined)
    },
    apicId(index) {
      checkIndex(index, cpus)
      return apicIdOf(topology, index)
    },
  }
}

type Choices = ReadonlyMap<CpuFeature, boolean>

/** Checks what the user gave. */
function checkCpuOptions(
  options: unknown,
  cpus: number,
): { model: CpuModelName; features: Choices; topology: CpuTopology } {
  if (options === undefined || typeof options === 'string') {
    return {
      model: options === undefined ? 'host' : checkModel('cpu', options),
      features: new Map(),
      topology: checkTopology({}, cpus),
    }
  }
  checkPlainObject('cpu', options, "a model's name or { model, features, sockets, cores, threads }")
  for (const key of Object.keys(options)) {
    if ((CPU_KEYS as readonly string[]).includes(key)) continue
    throw new NodevisorError(
      'ERR_UNKNOWN_OPTION',
      `Expected only ${CPU_KEYS.join(', ')} in cpu but received '${key}'; did you mean ` +
        `'${closest(key, [...CPU_KEYS])}'?`,
      { argument: 'cpu', received: key },
    )
  }
  return {
    model: options.model === undefined ? 'host' : checkModel('cpu.model', options.model),
    features: checkFeatures(options.features),
    topology: checkTopology(options, cpus),
  }
}

function checkPlainObject(
  name: string,
  value: unknown,
  expected: string,
): asserts value is Record<string, unknown> {
  if (typeof value !== 'object' || value === null || Array.isArray(value) || ArrayBuffer.isView(value)) {
    throw invalidArgument(name, expected, value)
  }
}

function checkFeatures(given: unknown): Choices {
  const choices = new Map<CpuFeature, boolean>()
  if (given === undefined) return choices
  checkPlainObject('cpu.features', given, 'an object of feature names and booleans')
  for (const [spelling, choice] of Object.entries(given)) {
    const name = findFeature(spelling)
    if (choice === undefined) continue
    if (typeof choice !== 'boolean')
      throw invalidArgument(`cpu.features['${spelling}']`, 'true or false', choice)
    if (TOPOLOGY_FEATURES.includes(name)) {
      throw new NodevisorError(
        'ERR_INVALID_ARGUMENT',
        `Expected no ${name} in cpu.features: it follows from cpu.cores and cpu.threads; give those instead`,
        { argument: 'cpu.features', received: spelling },
      )
    }
    if (choices.has(name) && choices.get(name) !== choice) {
      throw new NodevisorError(
        'ERR_INVALID_ARGUMENT',
        `Expected one choice for ${name} in cpu.features but '${spelling}' is another name of it, ` +
          'with another value',
        { argument: 'cpu.features', received: spelling },
      )
    }
    choices.set(name, choice)
  }
  return choices
}

/**
 * What a guest can be given. KVM_GET_SUPPORTED_CPUID (Linux, Documentation/virt/kvm/api.rst, 4.46 and 9.1)
 * knows neither whether this machine has a local APIC in the kernel, without which x2apic and
 * tsc_deadline_timer do not work, nor, before Linux 6.15, the second of them at all.
 */
function offeredFeatures(supported: readonly CpuidEntry[], host: CpuHost): Set<CpuFeature> {
  const offered = featuresOf(supported)
  if (host.shown !== undefined) {
    const { least, most } = host.shown
    const can = featuresOf(most)
    for (const name of offered) if (!can.has(name)) offered.delete(name)
    for (const name of featuresOf(least)) offered.add(name)
  }
  const decided: readonly (readonly [CpuFeature, boolean])[] = [
    ['hypervisor', true],
    ['apic', host.apicInKernel],
    ['x2apic', host.apicInKernel],
    ['tsc_deadline_timer', host.apicInKernel && host.tscDeadline],
  ]
  for (const [name, isThere] of decided) {
    if (isThere) offered.add(name)
    else offered.delete(name)
  }
  for (const name of TOPOLOGY_FEATURES) offered.delete(name)
  if (host.kind === 'pvm') for (const name of HYPERCALL_FEATURES) offered.delete(name)
  return offered
}

/** The model's features, with those the user adds and without those the user takes away. */
function chooseFeatures(
  model: CpuModelName,
  choices: Choices,
  offered: ReadonlySet<CpuFeature>,
  host: CpuHost,
): Set<CpuFeature> {
  const baseline = baselineOf(model)
  const added = [...choices.keys()].filter((name) => choices.get(name) === true)
  const isRemoved = (name: CpuFeature) => [...withNeeds(name)].some((need) => choices.get(need) === false)

  for (const name of added) {
    const needs = [...withNeeds(name)].filter((need) => choices.get(need) === false)
    if (needs.length > 0)
      throw contradiction(name, needs, 'which cpu.features takes away; drop one of the two')
  }
  checkOffered(added, offered, host, 'cpu.features')
  const required = baseline?.requires.filter((name) => !isRemoved(name)) ?? []
  checkOffered(required, offered, host, `the CPU model '${model}'`)

  const modelled = baseline === undefined ? offered : [...required, ...baseline.allows]
  const wanted = withoutOrphans(
    [...modelled, ...added].filter((name) => offered.has(name) && choices.get(name) !== false),
  )
  for (const name of added) {
    if (wanted.has(name)) continue
    const needs = [...withNeeds(name)].filter((need) => need !== name && !wanted.has(need))
    throw contradiction(
      name,
      needs,
      `which '${model}' does not have here; add that too, or choose another model`,
    )
  }
  return wanted
}

function contradiction(name: CpuFeature, needs: readonly CpuFeature[], why: string): NodevisorError {
  return new NodevisorError(
    'ERR_INVALID_ARGUMENT',
    `Expected ${name} in cpu.features with all that it needs but received it without ` +
      `${needs.join(', ')}, ${why}`,
    { argument: 'cpu.features', received: name, needs },
  )
}

function checkOffered(
  names: readonly CpuFeature[],
  offered: ReadonlySet<CpuFeature>,
  { apicInKernel }: CpuHost,
  wantedBy: string,
): void {
  const missing = names.filter((name) => !offered.has(name))
  if (missing.length === 0) return
  const needsApic = !apicInKernel && missing.some((name) => withNeeds(name).has('apic'))
  throw new NodevisorError(
    'ERR_KVM_UNSUPPORTED',
    `Expected this host's KVM to offer what ${wantedBy} asks for, but it lacks ` +
      `${missing.join(', ')}; leave that out` +
      (needsApic ? ', or give the machine a local APIC in the kernel' : ', or use a lower model'),
    { argument: 'cpu', missing },
  )
}

/**
 * Whether the user said something of a feature: by itself, by what it needs, or by a model that is not the
 * host.
 */
function isChosen(name: CpuFeature, baseline: CpuBaseline | undefined, choices: Choices): boolean {
  if (TOPOLOGY_FEATURES.includes(name)) return false
  return baseline !== undefined || [...withNeeds(name)].some((need) => choices.has(need))
}

/** The leaves of the model, with those features in them and no others that are in the table. */
function withFeatures(
  entries: readonly CpuidEntry[],
  wanted: ReadonlySet<CpuFeature>,
  baseline: CpuBaseline | undefined,
): CpuidEntry[] {
  const leaves =
    baseline === undefined
      ? entries
      : entries.filter(
          // Subleaf 2 has only controls of speculation, which a baseline does not know.
          ({ function: leaf, index }) =>
            BASELINE_LEAVES.has(leaf) && (leaf !== LEAF_STRUCTURED_FEATURES || index < 2),
        )
  const changed = leaves.map((entry) => {
    const copy = { ...entry }
    for (const { leaf, subleaf, register, features, known } of FEATURE_REGISTERS) {
      if (entry.function !== leaf || entry.index !== subleaf) continue
      const others = baseline === undefined ? entry[register] & ~known : 0
      copy[register] = (others | bitsOf(features.filter(({ name }) => wanted.has(name)))) >>> 0
    }
    if (baseline !== undefined && entry.function === LEAF_STRUCTURED_FEATURES) {
      if (entry.index === 0) copy.eax = Math.min(entry.eax, 1)
      else copy.ebx = copy.ecx = 0
    }
    return copy
  })
  // A leaf that is not there hides its features even where KVM would show them.
  const structured = changed.filter((entry) => entry.function === LEAF_STRUCTURED_FEATURES)
  const isEmpty = structured.every(({ index, eax, ebx, ecx, edx }) => {
    return (index === 0 ? ebx | ecx | edx : eax | ebx | ecx | edx) === 0
  })
  return isEmpty ? changed.filter((entry) => entry.function !== LEAF_STRUCTURED_FEATURES) : changed
}

/** The features as KVM will show them. */
function asShown(entries: readonly CpuidEntry[], { least, most }: ShownCpuid): CpuidEntry[] {
  return entries.map((entry) => {
    const copy = { ...entry }
    for (const { leaf, subleaf, register } of FEATURE_REGISTERS) {
      if (entry.function !== leaf || entry.index !== subleaf) continue
      const always = findEntry(least, leaf, subleaf)?.[register] ?? 0
      const ever = findEntry(most, leaf, subleaf)?.[register] ?? 0
      copy[register] = ((entry[register] & ever) | always) >>> 0
    }
    return copy
  })
}

/** What has to agree with the features: AMD's copies of them, the leaves that only some of them have. */
function withRelatedLeaves(
  entries: readonly CpuidEntry[],
  seen: ReadonlySet<CpuFeature>,
  isAmd: boolean,
): CpuidEntry[] {
  const repeated = isAmd ? (findEntry(entries, LEAF_FEATURES)?.edx ?? 0) & AMD_REPEATED_BITS : 0
  return entries.flatMap((entry) => {
    const leaf = entry.function
    if (leaf === LEAF_STATE) return seen.has('xsave') ? [entry] : []
    if (leaf >= LEAF_KVM_SIGNATURE && leaf <= LEAF_KVM_LAST) return seen.has('hypervisor') ? [entry] : []
    if (AMD_CACHE_TOPOLOGY_LEAVES.includes(leaf)) return seen.has('topoext') ? [entry] : []
    if (leaf === LEAF_AMD_FEATURES) {
      return [{ ...entry, edx: ((entry.edx & ~AMD_REPEATED_BITS) | repeated) >>> 0 }]
    }
    return [entry]
  })
}

/** Parts of the XSAVE area and the features they are for (Intel SDM vol. 1, 13.1; AMD APM vol. 2, 11.5.2). */
const STATE_COMPONENTS: ReadonlyMap<number, readonly CpuFeature[]> = new Map<number, readonly CpuFeature[]>([
  [2, ['avx']],
  [3, ['mpx']],
  [4, ['mpx']],
  [5, ['avx512f']],
  [6, ['avx512f']],
  [7, ['avx512f']],
  [8, ['intel_pt']],
  [9, ['pku']],
  [10, ['enqcmd']],
  [11, ['shstk', 'ibt']],
  [12, ['shstk', 'ibt']],
  [14, ['uintr']],
  [15, ['arch_lbr']],
  [17, ['amx_tile']],
  [18, ['amx_tile']],
  [62, ['lwp']],
])

/** The legacy region and the header of an XSAVE area, in bytes (Intel SDM vol. 1, 13.4). */
const XSAVE_AREA_START = 576

/** Leaf 0DH without the state of features that are not there (Intel SDM vol. 2A, CPUID, leaf 0DH). */
function withStateLeaves(entries: readonly CpuidEntry[], seen: ReadonlySet<CpuFeature>): CpuidEntry[] {
  const isState = (entry: CpuidEntry) => entry.function === LEAF_STATE
  const isKept = (component: number) =>
    STATE_COMPONENTS.get(component)?.some((feature) => seen.has(feature)) ?? true
  const keptBits = (bits: number, first: number) => {
    let kept = bits
    for (const component of STATE_COMPONENTS.keys()) {
      const bit = component - first
      if (bit >= 0 && bit < 32 && !isKept(component)) kept &= ~(1 << bit)
    }
    return kept >>> 0
  }
  const kept = entries.filter((entry) => !isState(entry) || entry.index < 2 || isKept(entry.index))
  const state = findEntry(entries, LEAF_STATE)
  const low = keptBits(state?.eax ?? 0, 0)
  const high = keptBits(state?.edx ?? 0, 32)
  const inXcr0 = (component: number) =>
    ((component < 32 ? low >>> component : high >>> (component - 32)) & 1) === 1
  const size = kept
    .filter((entry) => isState(entry) && entry.index >= 2 && inXcr0(entry.index))
    .reduce((end, { eax: length, ebx: offset }) => Math.max(end, offset + length), XSAVE_AREA_START)
  return kept.map((entry) => {
    if (!isState(entry)) return entry
    if (entry.index === 0) return { ...entry, eax: low, edx: high, ecx: size }
    if (entry.index !== 1) return entry
    const hasXsaves = seen.has('xsaves')
    return {
      ...entry,
      ecx: hasXsaves ? keptBits(entry.ecx, 0) : 0,
      edx: hasXsaves ? keptBits(entry.edx, 32) : 0,
    }
  })
}

/**
 * The highest leaf of each range; the host's own where that is higher, unless hosts shall not differ in it.
 */
function withMaxLeaves(entries: readonly CpuidEntry[], isBaseline: boolean): CpuidEntry[] {
  const highest = (from: number, to: number) =>
    Math.max(...entries.map((entry) => entry.function).filter((leaf) => leaf >= from && leaf <= to))
  return entries.map((entry) => {
    const leaf = entry.function
    if (leaf !== LEAF_MAX_BASIC && leaf !== LEAF_MAX_EXTENDED) return entry
    const last = highest(leaf, leaf + 0xffff)
    return { ...entry, eax: isBaseline ? last : Math.max(entry.eax, last) }
  })
}

function checkApicIds(
  topology: CpuTopology,
  cpus: number,
  seen: ReadonlySet<CpuFeature>,
  host: CpuHost,
): void {
  const last = apicIdOf(topology, cpus - 1)
  if (last <= MAX_XAPIC_ID || seen.has('x2apic')) return
  const { sockets, cores, threads } = topology
  throw new NodevisorError(
    'ERR_INVALID_ARGUMENT',
    `Expected APIC ids of at most ${MAX_XAPIC_ID} without x2apic but ${cpus} vCPUs in ` +
      `${sockets} sockets, ${cores} cores and ${threads} threads need ids up to ${last}; ` +
      (host.apicInKernel
        ? "add x2apic to cpu.features, use the model 'host' or fewer vCPUs"
        : 'give the machine a local APIC in the kernel or fewer vCPUs'),
    { argument: 'cpus', received: cpus, topology, lastApicId: last },
  )
}

function checkIndex(index: number, cpus: number): void {
  if (Number.isInteger(index) && index >= 0 && index < cpus) return
  throw invalidArgument('index', `a vCPU from 0 to ${cpus - 1}`, index)
}
