import { accessSync, constants, existsSync, readFileSync } from 'node:fs'
import { binding } from '../binding.js'
import { type ErrorCode, NodevisorError } from '../errors.js'
import { CAPABILITIES, type CapabilityName } from './capabilities.js'
import { Kvm } from './kvm.js'

/**
 * What a host's KVM is:
 * - `hardware`: VT-x or AMD-V; all guest code runs natively.
 * - `pvm`: KVM without VT-x or AMD-V; 64-bit user-mode code runs natively, all kernel code is emulated.
 * - `emulated`: AMD-V in a machine that QEMU emulates; right in everything, native in nothing.
 */
export type HostKind = 'hardware' | 'pvm' | 'emulated'

/** What this host's KVM is and can do. */
export interface HostInfo {
  /** Whether machines can be created. */
  readonly usable: boolean
  /** Why not, and what to do about it; undefined when usable. */
  readonly problem: { readonly code: ErrorCode; readonly message: string } | undefined
  readonly kind: HostKind | undefined
  /** The KVM module at work: `kvm_intel`, `kvm_amd` or `kvm_pvm`; undefined where it cannot be told. */
  readonly module: string | undefined
  /** The processor's own name. */
  readonly processor: string
  /** The signature of the hypervisor that this host itself runs under, if any: `KVMKVMKVM`, `TCGTCGTCGTCG`, … */
  readonly hypervisor: string | undefined
  readonly apiVersion: number | undefined
  /** The number each KVM_CAP_* gives: 0 for what is not there. */
  readonly capabilities: Readonly<Record<CapabilityName, number>> | undefined
}

const MODULES = ['kvm_pvm', 'kvm_intel', 'kvm_amd'] as const
const CPUID_HYPERVISOR_BIT = 2 ** 31
const CPUID_HYPERVISOR_LEAF = 0x4000_0000

/** Looks at /dev/kvm and at what the kernel says of it. Never throws: what is wrong is in `problem`. */
export function inspectHost(path = '/dev/kvm'): HostInfo {
  const module = MODULES.find((name) => existsSync(`/sys/module/${name}`))
  const base = { module, processor: processorName() }
  try {
    const kvm = new Kvm(path)
    try {
      const capabilities = Object.fromEntries(
        Object.keys(CAPABILITIES).map((name) => [name, kvm.checkExtension(name as CapabilityName)]),
      ) as Record<CapabilityName, number>
      const hypervisor = hypervisorSignature()
      return {
        ...base,
        usable: true,
        problem: undefined,
        kind: kindOf(module, hypervisor, capabilities),
        hypervisor,
        apiVersion: kvm.apiVersion,
        capabilities,
      }
    } finally {
      kvm.close()
    }
  } catch (error) {
    const { code, message } = error instanceof NodevisorError ? error : unexpected(error)
    return {
      ...base,
      usable: false,
      problem: {
        code,
        message: code === 'ERR_KVM_NOT_FOUND' ? `${message}${moduleHint(module, path)}` : message,
      },
      kind: undefined,
      hypervisor: undefined,
      apiVersion: undefined,
      capabilities: undefined,
    }
  }
}

function kindOf(
  module: string | undefined,
  hypervisor: string | undefined,
  capabilities: Readonly<Record<CapabilityName, number>>,
): HostKind {
  // Where /sys is hidden, PVM shows by what it alone lacks.
  const lacksHardware =
    capabilities.NESTED_STATE === 0 &&
    capabilities.X86_SMM === 0 &&
    capabilities.GUEST_DEBUG_HW_BPS === 0 &&
    capabilities.TSC_CONTROL === 0
  if (module === 'kvm_pvm' || (module === undefined && lacksHardware)) return 'pvm'
  return hypervisor === 'TCGTCGTCGTCG' ? 'emulated' : 'hardware'
}

/** The processor's extension that `flags` of /proc/cpuinfo show says which module would be the right one. */
function moduleHint(module: string | undefined, path: string): string {
  if (module !== undefined) return `; the module ${module} is loaded, so ${path} may be hidden by a container`
  const flags = / (vmx|svm) /.exec(read('/proc/cpuinfo'))?.[1]
  if (flags === 'vmx') return '; this processor has VT-x: the module is kvm_intel'
  if (flags === 'svm') return '; this processor has AMD-V: the module is kvm_amd'
  return '; this processor shows neither VT-x nor AMD-V'
}

function hypervisorSignature(): string | undefined {
  const { hostCpuid } = binding()
  if ((hostCpuid(1, 0)[2] & CPUID_HYPERVISOR_BIT) === 0) return undefined
  const [, ebx, ecx, edx] = hostCpuid(CPUID_HYPERVISOR_LEAF, 0)
  const signature = Buffer.alloc(12)
  for (const [i, value] of [ebx, ecx, edx].entries()) signature.writeUInt32LE(value, i * 4)
  return signature.toString('latin1').replace(/\0+$/, '')
}

function processorName(): string {
  return /^model name\s*: (.*)$/m.exec(read('/proc/cpuinfo'))?.[1] ?? 'unknown'
}

function read(path: string): string {
  try {
    accessSync(path, constants.R_OK)
    return readFileSync(path, 'utf8')
  } catch {
    return ''
  }
}

function unexpected(error: unknown): { code: ErrorCode; message: string } {
  return { code: 'ERR_SYSCALL', message: error instanceof Error ? error.message : String(error) }
}
