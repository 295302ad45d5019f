import { expect, onTestFinished } from 'vitest'
import { GuestRam, Kvm, type Vcpu, type VcpuExit, type Vm } from '../../src/kvm/index.js'

/** A VM with one vCPU in real mode and 1 MiB of RAM, without a machine around it. */
export interface Metal {
  readonly kvm: Kvm
  readonly vm: Vm
  readonly ram: GuestRam
  readonly vcpu: Vcpu
  /** RAM, in place. */
  readonly memory: Uint8Array
}

export interface MetalOptions {
  /** Code at 0x1000. */
  readonly code?: readonly number[] | Uint8Array
  /** What has to be done before there are vCPUs. */
  readonly prepare?: (vm: Vm) => void
  /** Flags of the memory slot. */
  readonly flags?: number
}

export const RAM_SIZE = 0x10_0000
export const ENTRY = 0x1000

/** Makes it; all of it is closed when the test is over. */
export function makeMetal({ code = [0xf4], prepare, flags = 0 }: MetalOptions = {}): Metal {
  const kvm = new Kvm()
  const vm = kvm.createVm()
  const ram = new GuestRam({ size: RAM_SIZE })
  vm.setTssAddr(0xfffb_d000)
  prepare?.(vm)
  vm.setUserMemoryRegion({ slot: 0, guestAddress: 0, size: RAM_SIZE, ram, flags })
  const memory = new Uint8Array(ram.buffer())
  memory.set(code, ENTRY)
  const vcpu = vm.createVcpu(0)
  onTestFinished(() => {
    vcpu.close()
    vm.close()
    ram.close()
    kvm.close()
  })
  const sregs = vcpu.getSregs()
  vcpu.setSregs({ ...sregs, cs: { ...sregs.cs, base: 0n, selector: 0 } })
  vcpu.setRegs({ ...vcpu.getRegs(), rip: BigInt(ENTRY), rsp: 0x8000n, rflags: 2n })
  return { kvm, vm, ram, vcpu, memory }
}

/** Runs to the next exit that the guest made. */
export function nextExit(vcpu: Vcpu): VcpuExit {
  for (;;) {
    const exit = vcpu.run()
    if (exit.kind !== 'interrupted' && exit.kind !== 'again') return exit
  }
}

/** Runs up to an exit of that kind; all the others are writes to ports, whose bytes it gives. */
export function outputUntil(vcpu: Vcpu, kind: VcpuExit['kind']): number[] {
  const bytes: number[] = []
  for (;;) {
    const exit = nextExit(vcpu)
    if (exit.kind === kind) return bytes
    if (exit.kind !== 'io' || exit.direction !== 'out') expect(exit).toMatchObject({ kind })
    else bytes.push(...exit.data)
  }
}

/** Expects the error of a system call. */
export function failureOf(syscall: string, errnoName: string) {
  return expect.objectContaining({
    name: 'NodevisorError',
    code: 'ERR_SYSCALL',
    syscall,
    errnoName,
    errno: expect.any(Number),
    message: expect.stringContaining(errnoName),
  })
}

export const closedError = expect.objectContaining({ name: 'NodevisorError', code: 'ERR_CLOSED' })
