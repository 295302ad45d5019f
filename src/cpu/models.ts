import { closest } from 'fastest-levenshtein'
import { NodevisorError, show } from '../errors.js'
import type { CpuFeature } from './features.js'

/** A processor that a guest is to see, whatever the host's is. */
export interface CpuBaseline {
  /** What it is, in one line. */
  readonly summary: string
  /** What it always has: a host without one of them cannot run it. */
  readonly requires: readonly CpuFeature[]
  /** What it has besides where the host has it. */
  readonly allows: readonly CpuFeature[]
}

/** x86-64 psABI, "Micro-Architecture Levels", baseline; `lm` and `pae` are what 64-bit code runs by. */
const LEVEL_1: readonly CpuFeature[] = [
  'cmov',
  'cx8',
  'fpu',
  'fxsr',
  'lm',
  'mmx',
  'pae',
  'sse',
  'sse2',
  'syscall',
]
const LEVEL_2: readonly CpuFeature[] = [
  ...LEVEL_1,
  'cx16',
  'lahf_lm',
  'pni',
  'popcnt',
  'sse4_1',
  'sse4_2',
  'ssse3',
]
const LEVEL_3: readonly CpuFeature[] = [
  ...LEVEL_2,
  'abm',
  'avx',
  'avx2',
  'bmi1',
  'bmi2',
  'f16c',
  'fma',
  'movbe',
  'xsave',
]
const LEVEL_4: readonly CpuFeature[] = [...LEVEL_3, 'avx512bw', 'avx512cd', 'avx512dq', 'avx512f', 'avx512vl']

/** What a kernel uses and programs do not: the levels say nothing of it. */
const SYSTEM: readonly CpuFeature[] = [
  'apic',
  'arat',
  'clflush',
  'constant_tsc',
  'de',
  'fdp_excptn_only',
  'hypervisor',
  'invpcid',
  'mca',
  'mce',
  'msr',
  'mtrr',
  'nx',
  'pat',
  'pcid',
  'pdpe1gb',
  'pge',
  'pse',
  'pse36',
  'sep',
  'smap',
  'smep',
  'topoext',
  'tsc',
  'tsc_adjust',
  'tsc_deadline_timer',
  'umip',
  'vme',
  'x2apic',
  'zero_fcs_fds',
  // Against what processors do speculatively.
  'amd_psfd',
  'amd_ssb_no',
  'amd_ssbd',
  'arch_capabilities',
  'autoibrs',
  'btc_no',
  'flush_l1d',
  'ibpb',
  'ibpb_brtype',
  'ibpb_ret',
  'ibrs',
  'intel_stibp',
  'lfence_rdtsc',
  'md_clear',
  'no_nested_data_bp',
  'null_sel_clr_base',
  'sbpb',
  'spec_ctrl',
  'srso_no',
  'srso_user_kernel_no',
  'ssbd',
  'stibp',
  'stibp_always_on',
  'tsa_l1_no',
  'tsa_sq_no',
  'verw_clear',
  'virt_ssbd',
  // KVM's own.
  'kvm_async_pf',
  'kvm_async_pf_int',
  'kvm_clock',
  'kvm_clock_old',
  'kvm_clock_stable',
  'kvm_nopiodelay',
  'kvm_poll_control',
  'kvm_pv_eoi',
  'kvm_pv_ipi',
  'kvm_pv_sched_yield',
  'kvm_pv_tlb_flush',
  'kvm_pv_unhalt',
  'kvm_steal_time',
]

/** How the kernel saves what AVX adds to the registers. */
const STATE: readonly CpuFeature[] = ['xgetbv1', 'xsavec', 'xsaveopt', 'xsaves']

/** The models beside `host`. */
export const CPU_BASELINES = {
  'x86-64-v1': {
    summary: 'every x86-64 processor',
    requires: LEVEL_1,
    allows: SYSTEM,
  },
  'x86-64-v2': {
    summary: 'up to SSE4.2: Nehalem, Jaguar and later',
    requires: LEVEL_2,
    allows: SYSTEM,
  },
  'x86-64-v3': {
    summary: 'up to AVX2: Haswell, Zen and later',
    requires: LEVEL_3,
    allows: [...SYSTEM, ...STATE],
  },
  'x86-64-v4': {
    summary: 'with AVX-512: Skylake-SP, Zen 4 and later',
    requires: LEVEL_4,
    allows: [...SYSTEM, ...STATE],
  },
  minimal: {
    summary: 'what a 64-bit kernel needs, and nothing that differs between hosts',
    requires: [...LEVEL_1, 'msr', 'nx', 'pge', 'pse', 'tsc'],
    allows: ['apic'],
  },
} as const satisfies Readonly<Record<string, CpuBaseline>>

/** A processor's name: `host` for all that the host's KVM offers, or a baseline. */
export type CpuModelName = 'host' | keyof typeof CPU_BASELINES

/** Every model, `host` first. */
export const CPU_MODELS: readonly CpuModelName[] = [
  'host',
  ...(Object.keys(CPU_BASELINES) as (keyof typeof CPU_BASELINES)[]),
]

/** The baseline of a model; undefined for `host`. */
export function baselineOf(model: CpuModelName): CpuBaseline | undefined {
  return model === 'host' ? undefined : CPU_BASELINES[model]
}

/**
 * Checks a model's name.
 *
 * @throws `ERR_INVALID_ARGUMENT` that names the nearest one
 */
export function checkModel(argument: string, model: unknown): CpuModelName {
  if (CPU_MODELS.includes(model as CpuModelName)) return model as CpuModelName
  const nearest = typeof model === 'string' ? `; did you mean '${closest(model, [...CPU_MODELS])}'?` : ''
  throw new NodevisorError(
    'ERR_INVALID_ARGUMENT',
    `Expected one of ${CPU_MODELS.map((name) => `'${name}'`).join(', ')} for ${argument} but received ` +
      `${show(model)}${nearest}`,
    { argument, received: model },
  )
}
