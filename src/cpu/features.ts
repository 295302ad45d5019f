import { closest } from 'fastest-levenshtein'
import { NodevisorError, show } from '../errors.js'
import type { CpuidEntry } from '../kvm/cpuid.js'

/** A register that CPUID answers in. */
export type CpuidRegister = 'eax' | 'ebx' | 'ecx' | 'edx'

/** One register of flags: each feature's bit and what it is. */
interface FeatureGroup {
  readonly leaf: number
  readonly subleaf: number
  readonly register: CpuidRegister
  readonly features: Readonly<Record<string, readonly [bit: number, meaning: string]>>
}

/**
 * CPUID's flags under the names of Linux's /proc/cpuinfo, or QEMU's where Linux shows none (`kvm_…` for KVM's
 * own).
 *
 * Sources: Intel SDM vol. 2A, CPUID, "Information Returned by CPUID Instruction", for leaves below
 * 0x4000_0000; Linux, Documentation/virt/kvm/x86/cpuid.rst, for 0x4000_0001; AMD APM vol. 3, appendix E.4,
 * for 0x8000_0001 and up.
 *
 * Not here: `osxsave` and `ospke`, which repeat what the guest wrote to CR4, and the bits of 0x8000_0001 EDX
 * in which AMD repeats leaf 1.
 */
const FEATURE_GROUPS = [
  {
    leaf: 1,
    subleaf: 0,
    register: 'ecx',
    features: {
      pni: [0, 'SSE3'],
      pclmulqdq: [1, 'carry-less multiplication'],
      dtes64: [2, '64-bit debug store'],
      monitor: [3, 'MONITOR and MWAIT'],
      ds_cpl: [4, 'debug store by privilege level'],
      vmx: [5, 'VT-x'],
      smx: [6, 'safer mode extensions'],
      est: [7, 'Enhanced SpeedStep'],
      tm2: [8, 'thermal monitor 2'],
      ssse3: [9, 'SSSE3'],
      cid: [10, 'L1 context id'],
      sdbg: [11, 'silicon debug'],
      fma: [12, 'fused multiply-add'],
      cx16: [13, 'CMPXCHG16B'],
      xtpr: [14, 'task priority messages'],
      pdcm: [15, 'performance and debug capability MSR'],
      pcid: [17, 'process-context identifiers'],
      dca: [18, 'direct cache access'],
      sse4_1: [19, 'SSE4.1'],
      sse4_2: [20, 'SSE4.2'],
      x2apic: [21, 'x2APIC'],
      movbe: [22, 'MOVBE'],
      popcnt: [23, 'POPCNT'],
      tsc_deadline_timer: [24, 'local APIC timer with a TSC deadline'],
      aes: [25, 'AES instructions'],
      xsave: [26, 'XSAVE, XRSTOR, XSETBV, XGETBV'],
      avx: [28, 'AVX'],
      f16c: [29, '16-bit floating-point conversion'],
      rdrand: [30, 'RDRAND'],
      hypervisor: [31, 'runs in a hypervisor'],
    },
  },
  {
    leaf: 1,
    subleaf: 0,
    register: 'edx',
    features: {
      fpu: [0, 'x87 floating point'],
      vme: [1, 'virtual-8086 extensions'],
      de: [2, 'I/O breakpoints'],
      pse: [3, '4 MiB pages'],
      tsc: [4, 'RDTSC'],
      msr: [5, 'RDMSR and WRMSR'],
      pae: [6, 'physical-address extension'],
      mce: [7, 'machine-check exception'],
      cx8: [8, 'CMPXCHG8B'],
      apic: [9, 'local APIC'],
      sep: [11, 'SYSENTER and SYSEXIT'],
      mtrr: [12, 'memory-type range registers'],
      pge: [13, 'global pages'],
      mca: [14, 'machine-check architecture'],
      cmov: [15, 'conditional moves'],
      pat: [16, 'page attribute table'],
      pse36: [17, '36-bit page-size extension'],
      pn: [18, 'processor serial number'],
      clflush: [19, 'CLFLUSH'],
      dts: [21, 'debug store'],
      acpi: [22, 'thermal monitor and clock control'],
      mmx: [23, 'MMX'],
      fxsr: [24, 'FXSAVE and FXRSTOR'],
      sse: [25, 'SSE'],
      sse2: [26, 'SSE2'],
      ss: [27, 'self-snoop'],
      ht: [28, 'several logical processors in a package'],
      tm: [29, 'thermal monitor'],
      ia64: [30, 'IA-64 processor'],
      pbe: [31, 'pending break enable'],
    },
  },
  {
    leaf: 6,
    subleaf: 0,
    register: 'eax',
    features: { arat: [2, 'local APIC timer that always runs'] },
  },
  {
    leaf: 7,
    subleaf: 0,
    register: 'ebx',
    features: {
      fsgsbase: [0, 'RDFSBASE and its kin'],
      tsc_adjust: [1, 'IA32_TSC_ADJUST'],
      sgx: [2, 'software guard extensions'],
      bmi1: [3, 'bit manipulation 1'],
      hle: [4, 'hardware lock elision'],
      avx2: [5, 'AVX2'],
      fdp_excptn_only: [6, 'x87 data pointer kept for exceptions only'],
      smep: [7, 'supervisor-mode execution prevention'],
      bmi2: [8, 'bit manipulation 2'],
      erms: [9, 'fast REP MOVSB and STOSB'],
      invpcid: [10, 'INVPCID'],
      rtm: [11, 'restricted transactional memory'],
      cqm: [12, 'resource monitoring'],
      zero_fcs_fds: [13, 'x87 code and data selectors read 0'],
      mpx: [14, 'memory protection extensions'],
      rdt_a: [15, 'resource allocation'],
      avx512f: [16, 'AVX-512 foundation'],
      avx512dq: [17, 'AVX-512 doublewords and quadwords'],
      rdseed: [18, 'RDSEED'],
      adx: [19, 'ADCX and ADOX'],
      smap: [20, 'supervisor-mode access prevention'],
      avx512ifma: [21, 'AVX-512 integer multiply-add'],
      pcommit: [22, 'PCOMMIT'],
      clflushopt: [23, 'CLFLUSHOPT'],
      clwb: [24, 'CLWB'],
      intel_pt: [25, 'processor trace'],
      avx512pf: [26, 'AVX-512 prefetch'],
      avx512er: [27, 'AVX-512 exponentials and reciprocals'],
      avx512cd: [28, 'AVX-512 conflict detection'],
      sha_ni: [29, 'SHA-1 and SHA-256 instructions'],
      avx512bw: [30, 'AVX-512 bytes and words'],
      avx512vl: [31, 'AVX-512 for shorter vectors'],
    },
  },
  {
    leaf: 7,
    subleaf: 0,
    register: 'ecx',
    features: {
      prefetchwt1: [0, 'PREFETCHWT1'],
      avx512vbmi: [1, 'AVX-512 byte manipulation'],
      umip: [2, 'user-mode instruction prevention'],
      pku: [3, 'protection keys for user pages'],
      waitpkg: [5, 'UMONITOR, UMWAIT, TPAUSE'],
      avx512_vbmi2: [6, 'AVX-512 byte manipulation 2'],
      shstk: [7, 'shadow stacks'],
      gfni: [8, 'Galois field instructions'],
      vaes: [9, 'AES instructions on vectors'],
      vpclmulqdq: [10, 'carry-less multiplication of vectors'],
      avx512_vnni: [11, 'AVX-512 neural network instructions'],
      avx512_bitalg: [12, 'AVX-512 bit algorithms'],
      tme: [13, 'total memory encryption'],
      avx512_vpopcntdq: [14, 'AVX-512 population count'],
      la57: [16, '5-level paging'],
      rdpid: [22, 'RDPID'],
      kl: [23, 'key locker'],
      bus_lock_detect: [24, 'debug exception for bus locks'],
      cldemote: [25, 'CLDEMOTE'],
      movdiri: [27, 'MOVDIRI'],
      movdir64b: [28, 'MOVDIR64B'],
      enqcmd: [29, 'ENQCMD'],
      sgx_lc: [30, 'SGX launch configuration'],
      pks: [31, 'protection keys for supervisor pages'],
    },
  },
  {
    leaf: 7,
    subleaf: 0,
    register: 'edx',
    features: {
      sgx_keys: [1, 'SGX attestation services'],
      avx512_4vnniw: [2, 'AVX-512 neural network, 4 iterations'],
      avx512_4fmaps: [3, 'AVX-512 multiply-accumulate, 4 iterations'],
      fsrm: [4, 'fast short REP MOVSB'],
      uintr: [5, 'user interrupts'],
      avx512_vp2intersect: [8, 'AVX-512 intersection of vectors'],
      srbds_ctrl: [9, 'control of the SRBDS mitigation'],
      md_clear: [10, 'VERW clears processor buffers'],
      rtm_always_abort: [11, 'transactions always abort'],
      tsx_force_abort: [13, 'TSX_FORCE_ABORT MSR'],
      serialize: [14, 'SERIALIZE'],
      hybrid_cpu: [15, 'cores of several kinds'],
      tsxldtrk: [16, 'suspension of load tracking in transactions'],
      pconfig: [18, 'PCONFIG'],
      arch_lbr: [19, 'architectural last branch records'],
      ibt: [20, 'indirect branch tracking'],
      amx_bf16: [22, 'AMX bfloat16'],
      avx512_fp16: [23, 'AVX-512 half precision'],
      amx_tile: [24, 'AMX tiles'],
      amx_int8: [25, 'AMX 8-bit integers'],
      spec_ctrl: [26, 'IBRS and IBPB (Intel)'],
      intel_stibp: [27, 'STIBP (Intel)'],
      flush_l1d: [28, 'flush of the L1 data cache'],
      arch_capabilities: [29, 'IA32_ARCH_CAPABILITIES'],
      core_capability: [30, 'IA32_CORE_CAPABILITIES'],
      ssbd: [31, 'speculative store bypass disable (Intel)'],
    },
  },
  {
    leaf: 7,
    subleaf: 1,
    register: 'eax',
    features: {
      sha512: [0, 'SHA-512 instructions'],
      sm3: [1, 'SM3 instructions'],
      sm4: [2, 'SM4 instructions'],
      rao_int: [3, 'remote atomic operations'],
      avx_vnni: [4, 'AVX neural network instructions'],
      avx512_bf16: [5, 'AVX-512 bfloat16'],
      lass: [6, 'linear address space separation'],
      cmpccxadd: [7, 'CMPccXADD'],
      arch_perfmon_ext: [8, 'extended performance monitoring leaf'],
      fzrm: [10, 'fast REP MOVSB of length 0'],
      fsrs: [11, 'fast short REP STOSB'],
      fsrc: [12, 'fast short REP CMPSB and SCASB'],
      fred: [17, 'flexible return and event delivery'],
      lkgs: [18, 'LKGS'],
      wrmsrns: [19, 'WRMSRNS'],
      nmi_src: [20, 'sources of NMIs'],
      amx_fp16: [21, 'AMX half precision'],
      hreset: [22, 'HRESET'],
      avx_ifma: [23, 'AVX integer multiply-add'],
      lam: [26, 'linear address masking'],
      msrlist: [27, 'RDMSRLIST and WRMSRLIST'],
      movrs: [31, 'MOVRS'],
    },
  },
  {
    leaf: 7,
    subleaf: 1,
    register: 'edx',
    features: {
      avx_vnni_int8: [4, 'AVX neural network, 8-bit integers'],
      avx_ne_convert: [5, 'AVX conversions without exceptions'],
      amx_complex: [8, 'AMX complex numbers'],
      avx_vnni_int16: [10, 'AVX neural network, 16-bit integers'],
      prefetchiti: [14, 'prefetch of instructions'],
      avx10: [19, 'AVX10'],
    },
  },
  {
    leaf: 0xd,
    subleaf: 1,
    register: 'eax',
    features: {
      xsaveopt: [0, 'XSAVEOPT'],
      xsavec: [1, 'XSAVEC'],
      xgetbv1: [2, 'XGETBV with ECX 1'],
      xsaves: [3, 'XSAVES and XRSTORS'],
      xfd: [4, 'extended feature disable'],
    },
  },
  {
    leaf: 0x4000_0001,
    subleaf: 0,
    register: 'eax',
    features: {
      kvm_clock_old: [0, "KVM's clock, by its first MSRs"],
      kvm_nopiodelay: [1, 'no delays for port I/O'],
      kvm_mmu: [2, 'deprecated'],
      kvm_clock: [3, "KVM's clock"],
      kvm_async_pf: [4, 'asynchronous page faults'],
      kvm_steal_time: [5, 'time the host took'],
      kvm_pv_eoi: [6, 'end of interrupt without an exit'],
      kvm_pv_unhalt: [7, 'wake-up of another vCPU (hypercall)'],
      kvm_pv_tlb_flush: [9, 'TLB flush that spares idle vCPUs'],
      kvm_async_pf_vmexit: [10, 'asynchronous page faults as nested exits'],
      kvm_pv_ipi: [11, 'several IPIs at once (hypercall)'],
      kvm_poll_control: [12, 'control of polling in the host'],
      kvm_pv_sched_yield: [13, 'yield to another vCPU (hypercall)'],
      kvm_async_pf_int: [14, 'asynchronous page faults by interrupt'],
      kvm_msi_ext_dest_id: [15, '15-bit destinations of message-signalled interrupts'],
      kvm_map_gpa_range: [16, 'shared and private memory (hypercall)'],
      kvm_migration_control: [17, 'control of migration'],
      kvm_clock_stable: [24, "KVM's clock is the same on every vCPU"],
    },
  },
  {
    leaf: 0x8000_0001,
    subleaf: 0,
    register: 'ecx',
    features: {
      lahf_lm: [0, 'LAHF and SAHF in 64-bit mode'],
      cmp_legacy: [1, 'the processors of a package are cores (AMD)'],
      svm: [2, 'AMD-V'],
      extapic: [3, 'extended APIC registers'],
      cr8_legacy: [4, 'CR8 in 32-bit mode'],
      abm: [5, 'LZCNT'],
      sse4a: [6, 'SSE4A'],
      misalignsse: [7, 'SSE on misaligned operands'],
      '3dnowprefetch': [8, 'PREFETCHW'],
      osvw: [9, 'workarounds visible to the operating system'],
      ibs: [10, 'instruction-based sampling'],
      xop: [11, 'XOP'],
      skinit: [12, 'SKINIT and STGI'],
      wdt: [13, 'watchdog timer'],
      lwp: [15, 'lightweight profiling'],
      fma4: [16, 'fused multiply-add with 4 operands'],
      tce: [17, 'translation cache extension'],
      nodeid_msr: [19, 'node id MSR'],
      tbm: [21, 'trailing bit manipulation'],
      topoext: [22, 'topology leaves 0x8000001d and 0x8000001e'],
      perfctr_core: [23, 'core performance counters'],
      perfctr_nb: [24, 'northbridge performance counters'],
      bpext: [26, 'data breakpoint extension'],
      ptsc: [27, 'performance time-stamp counter'],
      perfctr_llc: [28, 'last-level cache performance counters'],
      mwaitx: [29, 'MONITORX and MWAITX'],
    },
  },
  {
    leaf: 0x8000_0001,
    subleaf: 0,
    register: 'edx',
    features: {
      syscall: [11, 'SYSCALL and SYSRET'],
      mp: [19, 'multiprocessing capable'],
      nx: [20, 'no-execute pages'],
      mmxext: [22, 'AMD extensions of MMX'],
      fxsr_opt: [25, 'fast FXSAVE and FXRSTOR'],
      pdpe1gb: [26, '1 GiB pages'],
      rdtscp: [27, 'RDTSCP'],
      lm: [29, 'long mode'],
      '3dnowext': [30, 'AMD extensions of 3DNow!'],
      '3dnow': [31, '3DNow!'],
    },
  },
  {
    leaf: 0x8000_0007,
    subleaf: 0,
    register: 'ebx',
    features: {
      overflow_recov: [0, 'recovery from machine-check overflow'],
      succor: [1, 'containment of uncorrectable errors'],
      smca: [3, 'scalable machine-check architecture'],
    },
  },
  {
    leaf: 0x8000_0007,
    subleaf: 0,
    register: 'edx',
    features: {
      hw_pstate: [7, 'hardware P-states'],
      constant_tsc: [8, 'TSC of one rate that never stops'],
      cpb: [9, 'core performance boost'],
    },
  },
  {
    leaf: 0x8000_0008,
    subleaf: 0,
    register: 'ebx',
    features: {
      clzero: [0, 'CLZERO'],
      irperf: [1, 'count of retired instructions'],
      xsaveerptr: [2, 'FXSAVE always keeps error pointers'],
      rdpru: [4, 'RDPRU'],
      wbnoinvd: [9, 'WBNOINVD'],
      ibpb: [12, 'IBPB (AMD)'],
      ibrs: [14, 'IBRS (AMD)'],
      stibp: [15, 'STIBP (AMD)'],
      stibp_always_on: [17, 'STIBP is best left on'],
      amd_ppin: [23, 'processor inventory number'],
      amd_ssbd: [24, 'speculative store bypass disable (AMD)'],
      virt_ssbd: [25, 'speculative store bypass disable by a virtual MSR'],
      amd_ssb_no: [26, 'no speculative store bypass'],
      cppc: [27, 'collaborative performance control'],
      amd_psfd: [28, 'predictive store forwarding disable'],
      btc_no: [29, 'no branch type confusion'],
      ibpb_ret: [30, 'IBPB clears return predictions'],
      brs: [31, 'branch sampling'],
    },
  },
  {
    leaf: 0x8000_0021,
    subleaf: 0,
    register: 'eax',
    features: {
      no_nested_data_bp: [0, 'no nested data breakpoints'],
      lfence_rdtsc: [2, 'LFENCE always serializes'],
      verw_clear: [5, 'VERW clears processor buffers (AMD)'],
      null_sel_clr_base: [6, 'a null selector clears the base'],
      autoibrs: [8, 'automatic IBRS'],
      prefetchi: [20, 'PREFETCHIT0 and PREFETCHIT1'],
      sbpb: [27, 'selective branch prediction barrier'],
      ibpb_brtype: [28, 'IBPB clears branch types'],
      srso_no: [29, 'no speculative return stack overflow'],
      srso_user_kernel_no: [30, 'none from user mode to the kernel'],
    },
  },
  {
    leaf: 0x8000_0021,
    subleaf: 0,
    register: 'ecx',
    features: {
      tsa_sq_no: [1, 'no transient scheduler attack on the store queue'],
      tsa_l1_no: [2, 'no transient scheduler attack on the L1 cache'],
    },
  },
] as const satisfies readonly FeatureGroup[]

type NamesIn<Group> = Group extends { readonly features: infer Features } ? keyof Features & string : never

/** A feature's name: Linux's, as /proc/cpuinfo of the guest shows it. */
export type CpuFeature = NamesIn<(typeof FEATURE_GROUPS)[number]>

/** Other names in use: QEMU's, Intel's, and those of further flags that Linux shows for the same bit. */
export const FEATURE_ALIASES = {
  amd_no_ssb: 'amd_ssb_no',
  auto_ibrs: 'autoibrs',
  avx512bitalg: 'avx512_bitalg',
  avx512vbmi2: 'avx512_vbmi2',
  avx512vnni: 'avx512_vnni',
  cr8legacy: 'cr8_legacy',
  ds: 'dts',
  invtsc: 'constant_tsc',
  kvmclock: 'kvm_clock',
  kvmclock_stable_bit: 'kvm_clock_stable',
  kvm_asyncpf: 'kvm_async_pf',
  kvm_asyncpf_int: 'kvm_async_pf_int',
  kvm_asyncpf_vmexit: 'kvm_async_pf_vmexit',
  lzcnt: 'abm',
  nonstop_tsc: 'constant_tsc',
  sgxlc: 'sgx_lc',
  sse3: 'pni',
  tsc_deadline: 'tsc_deadline_timer',
  tsx_ldtrk: 'tsxldtrk',
  user_shstk: 'shstk',
} as const satisfies Readonly<Record<string, CpuFeature>>

type Dashed<Name extends string> = Name extends `${infer Head}_${infer Tail}`
  ? `${Head}-${Dashed<Tail>}`
  : Name
type Spelling = CpuFeature | keyof typeof FEATURE_ALIASES

/** What a feature may be called: its name, another name in use, and both with `-` for `_`. */
export type CpuFeatureName = Spelling | Dashed<Spelling>

/** Where CPUID shows a feature. */
export interface FeatureBit {
  readonly name: CpuFeature
  readonly leaf: number
  readonly subleaf: number
  readonly register: CpuidRegister
  readonly bit: number
  readonly meaning: string
}

/** Every feature, in the order of the leaves. */
export const FEATURE_BITS: readonly FeatureBit[] = FEATURE_GROUPS.flatMap(
  ({ leaf, subleaf, register, features }: FeatureGroup) =>
    Object.entries(features).map(([name, [bit, meaning]]) => ({
      name: name as CpuFeature,
      leaf,
      subleaf,
      register,
      bit,
      meaning,
    })),
)

const names = new Map<string, CpuFeature>([
  ...FEATURE_BITS.map(({ name }) => [name, name] as const),
  ...Object.entries(FEATURE_ALIASES),
])

/**
 * The feature of that name, however it is spelt: `-` and `.` stand for `_`.
 *
 * @throws `ERR_INVALID_ARGUMENT` that names the nearest one
 */
export function findFeature(name: string): CpuFeature {
  const feature = names.get(name.toLowerCase().replace(/[-.]/g, '_'))
  if (feature !== undefined) return feature
  throw new NodevisorError(
    'ERR_INVALID_ARGUMENT',
    `Expected names of CPU features in cpu.features but received ${show(name)}; did you mean ` +
      `'${closest(name, [...names.keys()])}'?`,
    { argument: 'cpu.features', received: name },
  )
}

/** A register in which CPUID shows features, and which of its bits are features. */
export interface FeatureRegister {
  readonly leaf: number
  readonly subleaf: number
  readonly register: CpuidRegister
  readonly features: readonly FeatureBit[]
  /** The bits that are in the table. */
  readonly known: number
}

/** Every register of {@link FEATURE_BITS}. */
export const FEATURE_REGISTERS: readonly FeatureRegister[] = FEATURE_GROUPS.map(
  ({ leaf, subleaf, register }: FeatureGroup) => {
    const features = FEATURE_BITS.filter(
      (feature) => feature.leaf === leaf && feature.subleaf === subleaf && feature.register === register,
    )
    return { leaf, subleaf, register, features, known: bitsOf(features) }
  },
)

/** The bits of those features, as a number without sign. */
export function bitsOf(features: readonly FeatureBit[]): number {
  return features.reduce((bits, { bit }) => (bits | (1 << bit)) >>> 0, 0)
}

/** The entry of a leaf and subleaf. */
export function findEntry(entries: readonly CpuidEntry[], leaf: number, subleaf = 0): CpuidEntry | undefined {
  return entries.find((entry) => entry.function === leaf && entry.index === subleaf)
}

/** The features that entries of CPUID show. */
export function featuresOf(entries: readonly CpuidEntry[]): Set<CpuFeature> {
  return new Set(
    FEATURE_REGISTERS.flatMap(({ leaf, subleaf, register, features }) => {
      const bits = findEntry(entries, leaf, subleaf)?.[register] ?? 0
      return features.filter(({ bit }) => ((bits >>> bit) & 1) === 1).map(({ name }) => name)
    }),
  )
}
