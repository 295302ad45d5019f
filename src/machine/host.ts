import { type CpuOptions, type ResolvedCpu, resolveCpu } from '../cpu/cpu-model.js'
import type { CpuModelName } from '../cpu/models.js'
import { measureShownCpuid, type ShownCpuid } from '../cpu/shown-cpuid.js'
import type { CpuidEntry } from '../kvm/cpuid.js'
import { type HostKind, inspectHost } from '../kvm/host.js'
import { Kvm } from '../kvm/kvm.js'
import type { Vcpu } from '../kvm/vcpu.js'
import { readableMsrs, type VcpuParts } from '../kvm/vcpu-snapshot.js'
import type { Vm } from '../kvm/vm.js'

/** What a machine's processors are made from. */
export type CpuChoice = CpuModelName | CpuOptions | undefined

/** Bytes of the area of KVM_GET_XSAVE. */
const MIN_XSAVE_SIZE = 4096

/** What all machines of an environment share: `/dev/kvm` and what it says. */
export class Host {
  readonly kvm = new Kvm()
  readonly maxVcpus = Math.max(1, this.kvm.checkExtension('MAX_VCPUS'))
  readonly hasSplitIrqchip = this.kvm.checkExtension('SPLIT_IRQCHIP') > 0
  /** The page of `kvm_run` with the ring of posted writes; 0 where KVM has none for ports. */
  readonly ringPage =
    this.kvm.checkExtension('COALESCED_PIO') > 0 ? this.kvm.checkExtension('COALESCED_MMIO') : 0
  readonly kind: HostKind
  /** The processor's own name. */
  readonly processor: string
  readonly #hasTscDeadline = this.kvm.checkExtension('TSC_DEADLINE_TIMER') > 0
  readonly #cpuid: readonly CpuidEntry[] = this.kvm.getSupportedCpuid()
  readonly #defaults = new Map<string, ResolvedCpu>()
  readonly #vcpuParts = new Map<string, VcpuParts>()
  #shown: ShownCpuid | undefined

  constructor() {
    const { kind, processor } = inspectHost()
    this.kind = kind ?? 'hardware'
    this.processor = processor
  }

  /**
   * The CPUID of a machine's vCPUs.
   *
   * @throws as {@link resolveCpu}
   */
  cpu(choice: CpuChoice, cpus: number, apicInKernel: boolean): ResolvedCpu {
    if (choice !== undefined) return this.#resolve(choice, cpus, apicInKernel, this.#shownCpuid)
    // Nothing is hidden, so what KVM shows instead does not matter; and most machines are alike.
    const key = `${cpus} ${apicInKernel}`
    const known = this.#defaults.get(key) ?? this.#resolve(undefined, cpus, apicInKernel, undefined)
    this.#defaults.set(key, known)
    return known
  }

  /** The same, with what the guest will really see: on a PVM host that has to be measured, once, for milliseconds. */
  describeCpu(choice: CpuChoice, cpus: number, apicInKernel: boolean): ResolvedCpu {
    return this.#resolve(choice, cpus, apicInKernel, this.#shownCpuid)
  }

  /**
   * What of a vCPU there is to keep. It is looked for once for all machines whose processors were chosen alike.
   *
   * @param vcpu - of such a machine, with its CPUID
   */
  vcpuParts(vm: Vm, vcpu: Vcpu, choice: CpuChoice, apicInKernel: boolean): VcpuParts {
    const key = choice === undefined ? `${apicInKernel}` : JSON.stringify([choice, apicInKernel])
    const known = this.#vcpuParts.get(key)
    if (known !== undefined) return known
    const parts = {
      msrs: readableMsrs(vcpu, this.kvm.getMsrIndexList()),
      xsaveSize: Math.max(MIN_XSAVE_SIZE, vm.checkExtension('XSAVE2')),
      hasXcrs: vm.checkExtension('XCRS') > 0,
      hasLapic: apicInKernel,
      hasOwnTsc: this.kind !== 'pvm',
      wantsIdleTss: this.kind === 'emulated',
    }
    this.#vcpuParts.set(key, parts)
    return parts
  }

  #resolve(
    choice: CpuChoice,
    cpus: number,
    apicInKernel: boolean,
    shown: ShownCpuid | undefined,
  ): ResolvedCpu {
    const host = { kind: this.kind, apicInKernel, tscDeadline: this.#hasTscDeadline, shown }
    return resolveCpu(choice, this.#cpuid, cpus, host)
  }

  get #shownCpuid(): ShownCpuid | undefined {
    if (this.kind !== 'pvm') return undefined
    this.#shown ??= measureShownCpuid(this.kvm)
    return this.#shown
  }
}

let host: Host | undefined

/**
 * The host, opened with the first machine.
 *
 * @throws `ERR_KVM_NOT_FOUND`, `ERR_KVM_PERMISSION`, `ERR_ADDON_LOAD`
 */
export function openHost(): Host {
  host ??= new Host()
  return host
}
