import type { CpuFeature } from './features.js'

/**
 * What a feature is of no use without: Linux's table (arch/x86/kernel/cpu/cpuid-deps.c), what the Intel SDM
 * makes software check before it uses an instruction (vol. 1, chapters 14 to 18), and, for KVM's own, what
 * they work with (Linux, Documentation/virt/kvm/x86/cpuid.rst).
 */
export const FEATURE_NEEDS: Readonly<Partial<Record<CpuFeature, readonly CpuFeature[]>>> = {
  '3dnow': ['mmx'],
  '3dnowext': ['3dnow'],
  aes: ['sse2'],
  amx_bf16: ['amx_tile'],
  amx_complex: ['amx_tile'],
  amx_fp16: ['amx_tile'],
  amx_int8: ['amx_tile'],
  amx_tile: ['xfd'],
  arat: ['apic'],
  avx: ['xsave', 'sse2'],
  avx10: ['avx2'],
  avx2: ['avx'],
  avx512_4fmaps: ['avx512f'],
  avx512_4vnniw: ['avx512f'],
  avx512_bf16: ['avx512vl'],
  avx512_bitalg: ['avx512vl'],
  avx512_fp16: ['avx512bw', 'avx512vl'],
  avx512_vbmi2: ['avx512vl'],
  avx512_vnni: ['avx512vl'],
  avx512_vp2intersect: ['avx512vl'],
  avx512_vpopcntdq: ['avx512f'],
  avx512bw: ['avx512f'],
  avx512cd: ['avx512f'],
  avx512dq: ['avx512f'],
  avx512er: ['avx512f'],
  avx512f: ['avx2'],
  avx512ifma: ['avx512f'],
  avx512pf: ['avx512f'],
  avx512vbmi: ['avx512f'],
  avx512vl: ['avx512f'],
  avx_ifma: ['avx2'],
  avx_ne_convert: ['avx2'],
  avx_vnni: ['avx2'],
  avx_vnni_int16: ['avx2'],
  avx_vnni_int8: ['avx2'],
  constant_tsc: ['tsc'],
  ds_cpl: ['dts'],
  dtes64: ['dts'],
  enqcmd: ['xsaves'],
  extapic: ['apic'],
  f16c: ['avx'],
  fma: ['avx'],
  fma4: ['avx'],
  fred: ['lkgs'],
  fxsr: ['fpu'],
  fxsr_opt: ['fxsr'],
  gfni: ['sse2'],
  ibt: ['xsaves'],
  kvm_async_pf: ['hypervisor'],
  kvm_async_pf_int: ['kvm_async_pf', 'apic'],
  kvm_async_pf_vmexit: ['kvm_async_pf'],
  kvm_clock: ['hypervisor'],
  // The same clock: with kvm_clock alone taken away, Linux would use it by the first MSRs.
  kvm_clock_old: ['kvm_clock'],
  kvm_clock_stable: ['kvm_clock'],
  kvm_map_gpa_range: ['hypervisor'],
  kvm_migration_control: ['hypervisor'],
  kvm_mmu: ['hypervisor'],
  kvm_msi_ext_dest_id: ['hypervisor', 'apic'],
  kvm_nopiodelay: ['hypervisor'],
  kvm_poll_control: ['hypervisor'],
  kvm_pv_eoi: ['hypervisor', 'apic'],
  kvm_pv_ipi: ['hypervisor', 'apic'],
  kvm_pv_sched_yield: ['hypervisor', 'apic'],
  // The guest learns which vCPUs are idle from its steal time records.
  kvm_pv_tlb_flush: ['kvm_steal_time'],
  kvm_pv_unhalt: ['hypervisor', 'apic'],
  kvm_steal_time: ['hypervisor'],
  la57: ['lm'],
  lm: ['pae'],
  lwp: ['xsave'],
  misalignsse: ['sse'],
  mmx: ['fpu'],
  mmxext: ['mmx'],
  mpx: ['xsave'],
  nx: ['pae'],
  pcid: ['lm'],
  pclmulqdq: ['sse2'],
  pdpe1gb: ['lm'],
  pku: ['xsave'],
  pni: ['sse2'],
  rdtscp: ['tsc'],
  sgx_keys: ['sgx'],
  sgx_lc: ['sgx'],
  sha512: ['avx2'],
  sha_ni: ['sse2'],
  shstk: ['xsaves'],
  skinit: ['svm'],
  sm3: ['avx'],
  sm4: ['avx2'],
  sse: ['fxsr'],
  sse2: ['sse'],
  sse4_1: ['sse2'],
  sse4_2: ['sse2'],
  sse4a: ['pni'],
  ssse3: ['sse2'],
  tsc_adjust: ['tsc'],
  tsc_deadline_timer: ['apic', 'tsc'],
  tsxldtrk: ['rtm'],
  vaes: ['avx', 'aes'],
  vpclmulqdq: ['avx', 'pclmulqdq'],
  x2apic: ['apic'],
  xfd: ['xsaves', 'xgetbv1'],
  xgetbv1: ['xsave'],
  xop: ['avx'],
  xsave: ['fxsr'],
  xsavec: ['xsave'],
  xsaveopt: ['xsave'],
  xsaves: ['xsave'],
}

/** The features of a set that have in it all they need, and whose needs have so too. */
export function withoutOrphans(features: Iterable<CpuFeature>): Set<CpuFeature> {
  const kept = new Set(features)
  for (;;) {
    const orphans = [...kept].filter((feature) => FEATURE_NEEDS[feature]?.some((need) => !kept.has(need)))
    if (orphans.length === 0) return kept
    for (const orphan of orphans) kept.delete(orphan)
  }
}

/** Every feature that another one needs, directly or not, and it itself. */
export function withNeeds(feature: CpuFeature): Set<CpuFeature> {
  const needs = new Set([feature])
  for (const need of needs) for (const next of FEATURE_NEEDS[need] ?? []) needs.add(next)
  return needs
}
