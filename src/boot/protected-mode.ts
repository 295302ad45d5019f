import { hex } from '../errors.js'
import type { Registers } from '../kvm/registers.js'
import { MMIO_HOLE_END } from '../memory/layout.js'
import type { CpuState } from './boot-image.js'
import { CODE_SELECTOR, DATA_SELECTOR, placeDescriptors } from './descriptors.js'
import type { Handover } from './handover.js'
import { formatError } from './image-reading.js'
import type { Placement } from './placement.js'
import { CR0_ET, CR0_NE, CR0_PE, flatSegment, RFLAGS_RESERVED_1, specialRegisters } from './processor.js'
import { placeStack } from './stack.js'

/** How a boot protocol's start in protected mode differs from this machine's own. */
export interface ProtectedModeOptions {
  /** What lies on the stack above the return address. */
  readonly stackArguments?: readonly number[]
  /** CR0, PE among its bits. */
  readonly cr0?: bigint
  /** What TR has as the address of the TSS, if not that of the TSS which was placed. */
  readonly tssBase?: number
}

/**
 * The state in which a 32-bit kernel starts: flat segments of 4 GiB, paging off, interrupts off, no IDT.
 *
 * Places descriptors and stack.
 *
 * @param entry - guest-physical address of the first instruction
 * @param registers - general-purpose registers that a boot protocol sets
 */
export function protectedModeState(
  placement: Placement,
  entry: number,
  registers: Partial<Registers>,
  { stackArguments = [], cr0 = CR0_PE | CR0_ET | CR0_NE, tssBase }: ProtectedModeOptions = {},
): CpuState {
  const cs = flatSegment(CODE_SELECTOR, 'code32')
  const data = flatSegment(DATA_SELECTOR, 'data')
  const { gdt, tr, returnAddress } = placeDescriptors(placement, cs, data, tssBase)
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
      cr0,
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
    { stackArguments: [memorySize, cmdline, modules, moduleCount] },
  )
}

/**
 * An image's entry point as a number, which 32-bit code can jump to.
 *
 * @param protocol - who starts kernels in 32-bit mode, for the error message
 * @param field - where the image has its entry point
 * @throws `ERR_IMAGE_FORMAT` for one at or above 4 GiB
 */
export function protectedModeEntry(entry: bigint, protocol: string, field: string): number {
  if (entry < MMIO_HOLE_END) return Number(entry)
  throw formatError(
    `an entry point below 4 GiB, since ${protocol} starts in 32-bit mode`,
    hex(entry),
    "link the kernel lower, or name it 'elf64'",
    { field, entry },
  )
}

/**
 * Checks that an entry point lies in the kernel, which is all that has been placed so far.
 *
 * @param field - where the image has its entry point
 * @param remedy - what a user can do about it, for the error message
 * @throws `ERR_IMAGE_FORMAT`
 */
export function checkEntryInKernel(entry: number, placement: Placement, field: string, remedy: string): void {
  if (placement.segments.some(({ address, size }) => entry >= address && entry < address + size)) return
  throw formatError(`${field} in the kernel`, hex(entry), remedy, { field, received: entry })
}
