import type { CpuidEntry } from '../kvm/cpuid.js'
import type { Kvm } from '../kvm/kvm.js'
import { FEATURE_REGISTERS } from './features.js'

/**
 * What a KVM shows of the features it is told to show. VT-x and AMD-V show all and nothing else; PVM cannot
 * hide what user code finds on the processor anyway, nor show what its emulator lacks.
 */
export interface ShownCpuid {
  /** What is shown when no feature was asked for. */
  readonly least: readonly CpuidEntry[]
  /** What is shown when all were. */
  readonly most: readonly CpuidEntry[]
}

const APIC_BASE_ENABLE = 1n << 11n

/**
 * Measures it: KVM_GET_CPUID2 gives what KVM made of KVM_SET_CPUID2. Takes a VM with a vCPU, which is closed
 * again.
 *
 * @throws `ERR_SYSCALL`
 */
export function measureShownCpuid(kvm: Kvm): ShownCpuid {
  const supported = kvm.getSupportedCpuid()
  const vm = kvm.createVm()
  try {
    const vcpu = vm.createVcpu(0)
    try {
      const shownFor = (bits: number, apicBase: bigint) => {
        vcpu.setCpuid(withFeatureBits(supported, bits))
        // The apic bit is neither shown nor hidden: it follows this.
        vcpu.setSregs({ ...vcpu.getSregs(), apicBase })
        return vcpu.getCpuid()
      }
      return { least: shownFor(0, 0n), most: shownFor(0xffff_ffff, APIC_BASE_ENABLE) }
    } finally {
      vcpu.close()
    }
  } finally {
    vm.close()
  }
}

function withFeatureBits(entries: readonly CpuidEntry[], bits: number): CpuidEntry[] {
  return entries.map((entry) => {
    const changed = { ...entry }
    for (const { leaf, subleaf, register } of FEATURE_REGISTERS) {
      if (entry.function === leaf && entry.index === subleaf) changed[register] = bits
    }
    return changed
  })
}
