import type { CpuState } from './boot-image.js'
import type { Placement } from './placement.js'
import {
  CR0_ET,
  CR0_NE,
  RFLAGS_RESERVED_1,
  realModeSegment,
  specialRegisters,
  taskSegment,
} from './processor.js'
import { placeRealModeStack } from './stack.js'

/** Below here addresses are written 0000:offset, as a BIOS enters a boot sector (0000:7C00). */
const FIRST_64_KIB = 0x10000
/** Limit of the interrupt vector table: 256 vectors of 4 bytes. */
const IVT_LIMIT = 0x3ff

/**
 * The state in which a real-mode image starts.
 *
 * CS:IP is 0000:`entry` below 64 KiB; above, CS is `entry` / 16 and IP what remains. All data segments begin
 * at 0. The stack ends at 0000:7C00 unless the image is there.
 */
export function realModeState(placement: Placement, entry: number): CpuState {
  const cs = entry < FIRST_64_KIB ? 0 : entry >> 4
  const { ss, sp } = placeRealModeStack(placement)
  return {
    registers: { rip: BigInt(entry - cs * 16), rsp: BigInt(sp), rflags: RFLAGS_RESERVED_1 },
    specialRegisters: specialRegisters({
      cs: realModeSegment(cs, 'code'),
      data: realModeSegment(0, 'data'),
      ss: realModeSegment(ss, 'data'),
      // As after reset (SDM vol. 3A, "Processor State After Reset").
      tr: taskSegment(0, 0, 0xffff),
      gdt: { base: 0n, limit: 0xffff },
      idt: { base: 0n, limit: IVT_LIMIT },
      cr0: CR0_ET | CR0_NE,
      cr3: 0n,
      cr4: 0n,
      efer: 0n,
    }),
  }
}
