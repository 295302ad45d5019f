import type { Registers } from '../kvm/registers.js'
import type { CpuState } from './boot-image.js'
import { CODE_SELECTOR, DATA_SELECTOR, placeDescriptors } from './descriptors.js'
import type { Handover } from './handover.js'
import type { Placement } from './placement.js'
import { CR0_ET, CR0_NE, CR0_PE, flatSegment, RFLAGS_RESERVED_1, specialRegisters } from './processor.js'
import { placeStack } from './stack.js'

/**
 * The state in which a 32-bit kernel starts: flat segments of 4 GiB, paging off, interrupts off, no IDT.
 *
 * Places descriptors and stack.
 *
 * @param entry - guest-physical address of the first instruction
 * @param registers - general-purpose registers that a boot protocol sets
 * @param stackArguments - what lies on the stack above the return address
 */
export function protectedModeState(
  placement: Placement,
  entry: number,
  registers: Partial<Registers>,
  stackArguments: readonly number[] = [],
): CpuState {
  const cs = flatSegment(CODE_SELECTOR, 'code32')
  const data = flatSegment(DATA_SELECTOR, 'data')
  const { gdt, tr, returnAddress } = placeDescriptors(placement, cs, data)
  const esp = placeStack(placement, 4, [returnAddress, ...stackArguments])
  return {
    registers: { ...registers, rip: BigInt(entry), rsp: BigInt(esp), rflags: RFLAGS_RESERVED_1 },
    specialRegisters: specialRegisters({
      cs,
      data,
      ss: { ...data },
      tr,
      gdt,
      idt: { base: 0n, limit: 0 },
      cr0: CR0_PE | CR0_ET | CR0_NE,
      cr3: 0n,
      cr4: 0n,
      efer: 0n,
    }),
  }
}

/**
 * The state for a kernel without a boot protocol of its own: what it is told is both on the stack, where the
 * i386 ABI has a function's arguments, and in EDI, ESI, EDX and ECX, as in long mode.
 */
export function protectedModeHandover(placement: Placement, entry: number, handover: Handover): CpuState {
  const { memorySize, cmdline, modules, moduleCount } = handover
  return protectedModeState(
    placement,
    entry,
    { rdi: BigInt(memorySize), rsi: BigInt(cmdline), rdx: BigInt(modules), rcx: BigInt(moduleCount) },
    [memorySize, cmdline, modules, moduleCount],
  )
}
