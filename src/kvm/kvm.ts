import { binding, type NativeKvm } from '../binding.js'
import { invalidArgument } from '../errors.js'
import type { CapabilityName } from './capabilities.js'
import { type CpuidEntry, decodeCpuid } from './cpuid.js'
import { decodeMsrs, encodeMsrs, type MsrEntry } from './msrs.js'
import { capabilityNumber, Vm } from './vm.js'

/**
 * `/dev/kvm`: the system ioctls, one method each (Linux, Documentation/virt/kvm/api.rst).
 *
 * @example
 * ```ts
 * const kvm = new Kvm()
 * const vm = kvm.createVm()
 * const ram = new GuestRam({ size: 0x10000 })
 * vm.setUserMemoryRegion({ slot: 0, guestAddress: 0, size: ram.size, ram })
 * const vcpu = vm.createVcpu(0)
 * ```
 */
export class Kvm {
  /** The addon's object. @internal */
  readonly native: NativeKvm

  /** @throws `ERR_KVM_NOT_FOUND`, `ERR_KVM_PERMISSION`, `ERR_ADDON_LOAD` */
  constructor(path = '/dev/kvm') {
    if (typeof path !== 'string') throw invalidArgument('path', 'a string', path)
    this.native = new (binding().Kvm)(path)
  }

  /** KVM_GET_API_VERSION: 12 on every kernel since 2007. */
  get apiVersion(): number {
    return this.native.apiVersion()
  }

  /** KVM_CHECK_EXTENSION. 0 means that there is no such thing. */
  checkExtension(capability: CapabilityName | number): number {
    return this.native.checkExtension(capabilityNumber(capability))
  }

  /** KVM_CREATE_VM. */
  createVm(type = 0): Vm {
    return new Vm(this.native.createVm(type))
  }

  /** KVM_GET_SUPPORTED_CPUID: what a guest may be told with {@link Vcpu.setCpuid}. */
  getSupportedCpuid(): CpuidEntry[] {
    return decodeCpuid(this.native.getSupportedCpuid())
  }

  /** KVM_GET_EMULATED_CPUID. */
  getEmulatedCpuid(): CpuidEntry[] {
    return decodeCpuid(this.native.getEmulatedCpuid())
  }

  /** KVM_GET_MSR_INDEX_LIST: the MSRs that a snapshot has to keep. */
  getMsrIndexList(): Uint32Array {
    return this.native.getMsrIndexList()
  }

  /** KVM_GET_MSR_FEATURE_INDEX_LIST. */
  getMsrFeatureIndexList(): Uint32Array {
    return this.native.getMsrFeatureIndexList()
  }

  /** KVM_GET_MSRS on /dev/kvm: the values of feature MSRs. */
  getMsrs(indices: readonly number[]): MsrEntry[] {
    const bytes = encodeMsrs(indices.map((index) => ({ index, value: 0n })))
    return decodeMsrs(bytes, this.native.getMsrs(bytes))
  }

  close(): void {
    this.native.close()
  }
}
