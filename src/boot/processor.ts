/**
 * What the loaders set in the processor: bits of registers, and segments.
 *
 * The sections named are of the Intel SDM, vol. 3A unless said otherwise, by title: their numbers change with
 * the edition.
 */

import type { DescriptorTable, Segment, SpecialRegisters } from '../kvm/registers.js'

/** CR0 ("Control Registers"): protected mode. */
export const CR0_PE = 1n << 0n
/** `wait` heeds CR0.TS, as "Configuring the x87 FPU Environment" has it where there is an FPU. */
export const CR0_MP = 1n << 1n
/** Always 1 on processors since the Pentium 4. */
export const CR0_ET = 1n << 4n
/** FPU errors raise #MF. VT-x requires it, and this machine has no IRQ 13 for the old way. */
export const CR0_NE = 1n << 5n
/** The supervisor, too, heeds read-only pages. */
export const CR0_WP = 1n << 16n
/** Paging. */
export const CR0_PG = 1n << 31n

/** CR4 ("Control Registers"): page-table entries of 64 bits. */
export const CR4_PAE = 1n << 5n
/** SSE instructions are enabled. */
export const CR4_OSFXSR = 1n << 9n
/** SSE errors raise #XM. */
export const CR4_OSXMMEXCPT = 1n << 10n

/** IA32_EFER ("Extended Feature Enable Register"): long mode is enabled … */
export const EFER_LME = 1n << 8n
/** … and active. */
export const EFER_LMA = 1n << 10n

/** RFLAGS with all flags clear: bit 1 is always 1 (vol. 1, "EFLAGS Register"). Interrupts are off. */
export const RFLAGS_RESERVED_1 = 1n << 1n

/** IA32_APIC_BASE after reset ("Local APIC Status and Location"): at 0xfee00000, enabled, this one boots. */
const APIC_BASE_RESET = 0xfee0_0900n

/** "Code- and Data-Segment Descriptor Types". VM entry wants the accessed bit set. */
const TYPE_DATA_READ_WRITE_ACCESSED = 0x3
const TYPE_CODE_EXECUTE_READ_ACCESSED = 0xb
/** "System Descriptor Types". */
const TYPE_LDT = 0x2
const TYPE_TSS_BUSY = 0xb

/** What the segments that loaders make have in common: present, privilege level 0. */
const SEGMENT = { present: true, dpl: 0, avl: 0, unusable: false } as const

/** A segment as real mode has it: 64 KiB from `selector` * 16 on. */
export function realModeSegment(selector: number, content: 'code' | 'data'): Segment {
  const type = content === 'code' ? TYPE_CODE_EXECUTE_READ_ACCESSED : TYPE_DATA_READ_WRITE_ACCESSED
  return { ...SEGMENT, base: BigInt(selector * 16), limit: 0xffff, selector, type, s: 1, db: 0, l: 0, g: 0 }
}

/** A segment over all of the 32-bit address space. Long mode looks at the code segment's `l` alone. */
export function flatSegment(selector: number, content: 'code32' | 'code64' | 'data'): Segment {
  const type = content === 'data' ? TYPE_DATA_READ_WRITE_ACCESSED : TYPE_CODE_EXECUTE_READ_ACCESSED
  const l = content === 'code64' ? 1 : 0
  return { ...SEGMENT, base: 0n, limit: 0xffff_ffff, selector, type, s: 1, db: 1 - l, l, g: 1 }
}

/** A task register. VT-x wants a busy TSS in it, whatever the mode. */
export function taskSegment(selector: number, base: number, limit: number): Segment {
  return { ...SEGMENT, base: BigInt(base), limit, selector, type: TYPE_TSS_BUSY, s: 0, db: 0, l: 0, g: 0 }
}

const NO_LDT: Segment = {
  ...SEGMENT,
  base: 0n,
  limit: 0,
  selector: 0,
  type: TYPE_LDT,
  present: false,
  s: 0,
  db: 0,
  l: 0,
  g: 0,
  unusable: true,
}

/** The part of the special registers in which the modes differ. */
export interface ModeRegisters {
  readonly cs: Segment
  /** For `ds`, `es`, `fs` and `gs`. */
  readonly data: Segment
  readonly ss: Segment
  readonly tr: Segment
  readonly gdt: DescriptorTable
  readonly idt: DescriptorTable
  readonly cr0: bigint
  readonly cr3: bigint
  readonly cr4: bigint
  readonly efer: bigint
}

/** All special registers: a mode's, and what is the same in every mode. */
export function specialRegisters({ data, ...mode }: ModeRegisters): SpecialRegisters {
  return {
    ...mode,
    ds: { ...data },
    es: { ...data },
    fs: { ...data },
    gs: { ...data },
    ldt: { ...NO_LDT },
    cr2: 0n,
    cr8: 0n,
    apicBase: APIC_BASE_RESET,
    interruptBitmap: [0n, 0n, 0n, 0n],
  }
}
