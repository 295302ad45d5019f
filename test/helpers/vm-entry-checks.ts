/**
 * What a processor checks before it enters a guest, as a table to be read beside the manual.
 *
 * Most rows are Intel SDM vol. 3C, "VM Entries", "Checks on the Guest State Area" (26.3.1 in older editions,
 * 27.3.1 in newer ones; the last number is the same). Read for what KVM makes of a state that userspace sets:
 *
 * - KVM adds CR4.VMXE itself and hides it.
 * - Real mode (CR0.PE = 0) runs as an unrestricted guest; where the processor has none, KVM runs it as
 *   virtual-8086, for which the segments must be real mode's own (row `kvm-real-mode`). The checks that
 *   "unrestricted guest" waives are therefore made in protected and long mode only.
 * - Checks on fields that userspace cannot set (reserved bits of access rights, VMCS controls) are left out.
 *
 * A few rows are AMD's (APM vol. 2, 15.5.1, "Canonicalization and Consistency Checks") and KVM's own.
 */

import type { CpuState } from '../../src/boot/boot-image.js'
import type { Segment, SpecialRegisters } from '../../src/kvm/registers.js'

/** What is checked. */
export interface EntryState {
  readonly special: SpecialRegisters
  readonly rip: bigint
  readonly rflags: bigint
}

/** A row: one requirement. */
export interface EntryCheck {
  readonly id: string
  readonly section: string
  readonly what: string
  /** Says how the state fails, if it does. */
  check(state: EntryState): string | undefined
}

type SegmentName = 'cs' | 'ss' | 'ds' | 'es' | 'fs' | 'gs'

const SEGMENTS: readonly SegmentName[] = ['cs', 'ss', 'ds', 'es', 'fs', 'gs']
const DATA_SEGMENTS: readonly SegmentName[] = ['ds', 'es', 'fs', 'gs']

const MSRS = '27.3.1.1 Guest Control Registers, Debug Registers, and MSRs'
const SEGMENT_REGISTERS = '27.3.1.2 Guest Segment Registers'
const TABLES = '27.3.1.3 Guest Descriptor-Table Registers'
const RIP_RFLAGS = '27.3.1.4 Guest RIP, RFLAGS, and SSP'
const AMD = 'APM vol. 2, 15.5.1'
const KVM = 'Linux, arch/x86/kvm'

const bit = (value: bigint, index: number) => ((value >> BigInt(index)) & 1n) === 1n
const protectedMode = ({ special }: EntryState) => bit(special.cr0, 0)
const paging = ({ special }: EntryState) => bit(special.cr0, 31)
/** The VM-entry control "IA-32e mode guest", which KVM sets from EFER.LMA. */
const ia32e = ({ special }: EntryState) => bit(special.efer, 10)
/** With 48-bit linear addresses. */
const canonical = (address: bigint) => BigInt.asUintN(64, BigInt.asIntN(48, address)) === address
const rpl = (segment: Segment) => segment.selector & 3
const above32 = (value: bigint) => value >> 32n !== 0n

function fails(condition: boolean, message: string): string | undefined {
  return condition ? message : undefined
}

/** The first failure among segment registers that are usable (CS always is). */
function eachUsable(
  { special }: EntryState,
  names: readonly SegmentName[],
  bad: (segment: Segment) => boolean,
): string | undefined {
  const name = names.find((name) => (name === 'cs' || !special[name].unusable) && bad(special[name]))
  return name === undefined
    ? undefined
    : `${name}: ${JSON.stringify(special[name], (_, value) => (typeof value === 'bigint' ? `0x${value.toString(16)}` : value))}`
}

/** Granularity: a limit that pages cannot express wants G = 0, one that bytes cannot express wants G = 1. */
function badGranularity({ limit, g }: Segment): boolean {
  return ((limit & 0xfff) !== 0xfff && g === 1) || (limit >>> 20 !== 0 && g === 0)
}

/** The table. */
export const VM_ENTRY_CHECKS: readonly EntryCheck[] = [
  {
    id: 'cr0-fixed',
    section: MSRS,
    what: 'CR0.NE is 1 (fixed in VMX operation; PE and PG are waived for unrestricted guests)',
    check: ({ special }) => fails(!bit(special.cr0, 5), 'NE is 0'),
  },
  {
    id: 'cr0-reserved',
    section: `${MSRS}; ${AMD}`,
    what: 'CR0 has no reserved bit set: only PE, MP, EM, TS, ET, NE, WP, AM, NW, CD, PG exist',
    check: ({ special }) => fails((special.cr0 & ~0xe005_003fn) !== 0n, `CR0 ${special.cr0}`),
  },
  {
    id: 'cr0-pg-pe',
    section: MSRS,
    what: 'CR0.PE is 1 if CR0.PG is 1',
    check: (state) => fails(paging(state) && !protectedMode(state), 'PG without PE'),
  },
  {
    id: 'cr0-nw-cd',
    section: AMD,
    what: 'CR0.NW is 0 if CR0.CD is 0',
    check: ({ special }) => fails(bit(special.cr0, 29) && !bit(special.cr0, 30), 'NW without CD'),
  },
  {
    id: 'cr4-reserved',
    section: MSRS,
    what: 'CR4 has no bit set but those every x86-64 processor has: VME to OSXMMEXCPT',
    check: ({ special }) => fails((special.cr4 & ~0x7ffn) !== 0n, `CR4 ${special.cr4}`),
  },
  {
    id: 'ia32e-paging',
    section: MSRS,
    what: 'CR0.PG and CR4.PAE are 1 in IA-32e mode',
    check: (state) =>
      fails(ia32e(state) && !(paging(state) && bit(state.special.cr4, 5)), 'LMA without PG and PAE'),
  },
  {
    id: 'cr3-width',
    section: MSRS,
    what: 'CR3 has no bit set beyond the physical-address width (36 at least), nor below bit 12 (no PCID)',
    check: ({ special }) => fails((special.cr3 & ~0xf_ffff_f000n) !== 0n, `CR3 ${special.cr3}`),
  },
  {
    id: 'efer-reserved',
    section: MSRS,
    what: 'IA32_EFER has no bit set but SCE, LME, LMA, NXE',
    check: ({ special }) => fails((special.efer & ~0xd01n) !== 0n, `EFER ${special.efer}`),
  },
  {
    id: 'efer-lma-lme',
    section: MSRS,
    what: 'EFER.LMA equals EFER.LME if CR0.PG is 1',
    check: (state) => fails(paging(state) && ia32e(state) !== bit(state.special.efer, 8), 'LMA is not LME'),
  },
  {
    id: 'tr-ti',
    section: SEGMENT_REGISTERS,
    what: 'TR selects from the GDT: TI (bit 2) is 0',
    check: ({ special }) => fails((special.tr.selector & 4) !== 0, `selector ${special.tr.selector}`),
  },
  {
    id: 'ldtr-ti',
    section: SEGMENT_REGISTERS,
    what: 'LDTR, if usable, selects from the GDT',
    check: ({ special: { ldt } }) => fails(!ldt.unusable && (ldt.selector & 4) !== 0, `${ldt.selector}`),
  },
  {
    id: 'ss-rpl-cs-rpl',
    section: SEGMENT_REGISTERS,
    what: "SS's RPL equals CS's (unless unrestricted)",
    check: (state) =>
      fails(protectedMode(state) && rpl(state.special.ss) !== rpl(state.special.cs), 'RPLs differ'),
  },
  {
    id: 'base-canonical',
    section: SEGMENT_REGISTERS,
    what: 'The bases of TR, FS, GS and a usable LDTR are canonical',
    check: ({ special: { tr, fs, gs, ldt } }) =>
      fails(
        [tr, fs, gs, ...(ldt.unusable ? [] : [ldt])].some(({ base }) => !canonical(base)),
        'not canonical',
      ),
  },
  {
    id: 'base-32-bit',
    section: SEGMENT_REGISTERS,
    what: 'Bits 63:32 of the bases of CS and of usable SS, DS and ES are 0',
    check: (state) => eachUsable(state, ['cs', 'ss', 'ds', 'es'], ({ base }) => above32(base)),
  },
  {
    id: 'cs-type',
    section: SEGMENT_REGISTERS,
    what: 'CS is an accessed code segment: type 9, 11, 13 or 15 (or 3, if unrestricted)',
    check: (state) => {
      const types = protectedMode(state) ? [9, 11, 13, 15] : [3, 9, 11, 13, 15]
      return fails(!types.includes(state.special.cs.type), `type ${state.special.cs.type}`)
    },
  },
  {
    id: 'ss-type',
    section: SEGMENT_REGISTERS,
    what: 'SS, if usable, is an accessed read/write data segment: type 3 or 7',
    check: (state) => eachUsable(state, ['ss'], ({ type }) => type !== 3 && type !== 7),
  },
  {
    id: 'data-type',
    section: SEGMENT_REGISTERS,
    what: 'DS, ES, FS, GS, if usable, are accessed, and readable if code',
    check: (state) =>
      eachUsable(
        state,
        DATA_SEGMENTS,
        ({ type }) => (type & 1) === 0 || ((type & 8) !== 0 && (type & 2) === 0),
      ),
  },
  {
    id: 'segment-s',
    section: SEGMENT_REGISTERS,
    what: 'S is 1 (code or data)',
    check: (state) => eachUsable(state, SEGMENTS, ({ s }) => s !== 1),
  },
  {
    id: 'cs-dpl',
    section: SEGMENT_REGISTERS,
    what: "CS's DPL is 0 for type 3, SS's for 9 and 11, at most SS's for 13 and 15",
    check: ({ special: { cs, ss } }) => {
      if (cs.type === 3) return fails(cs.dpl !== 0, 'DPL is not 0')
      return fails(cs.type < 12 ? cs.dpl !== ss.dpl : cs.dpl > ss.dpl, `CS ${cs.dpl}, SS ${ss.dpl}`)
    },
  },
  {
    id: 'ss-dpl',
    section: SEGMENT_REGISTERS,
    what: "SS's DPL equals its RPL (unless unrestricted), and is 0 in real mode or if CS is of type 3",
    check: (state) => {
      const { cs, ss } = state.special
      if (protectedMode(state) && ss.dpl !== rpl(ss)) return 'DPL is not RPL'
      return fails((!protectedMode(state) || cs.type === 3) && ss.dpl !== 0, 'DPL is not 0')
    },
  },
  {
    id: 'data-dpl',
    section: SEGMENT_REGISTERS,
    what: 'The DPL of DS, ES, FS, GS is at least the RPL, unless conforming code (or unrestricted)',
    check: (state) =>
      protectedMode(state)
        ? eachUsable(state, DATA_SEGMENTS, (segment) => segment.type < 12 && segment.dpl < rpl(segment))
        : undefined,
  },
  {
    id: 'segment-present',
    section: SEGMENT_REGISTERS,
    what: 'P is 1',
    check: (state) => eachUsable(state, SEGMENTS, ({ present }) => !present),
  },
  {
    id: 'cs-db',
    section: `${SEGMENT_REGISTERS}; ${AMD}`,
    what: "CS's D/B is 0 if it is 64-bit code in IA-32e mode",
    check: (state) =>
      fails(ia32e(state) && state.special.cs.l === 1 && state.special.cs.db === 1, 'D and L are both 1'),
  },
  {
    id: 'segment-granularity',
    section: SEGMENT_REGISTERS,
    what: 'G fits the limit',
    check: (state) => eachUsable(state, SEGMENTS, badGranularity),
  },
  {
    id: 'tr-type',
    section: SEGMENT_REGISTERS,
    what: 'TR is a busy TSS: type 11, or 3 (16-bit) outside IA-32e mode; a system segment, present, usable',
    check: (state) => {
      const { tr } = state.special
      const types = ia32e(state) ? [11] : [3, 11]
      return fails(
        !types.includes(tr.type) || tr.s !== 0 || !tr.present || tr.unusable,
        `type ${tr.type}, s ${tr.s}, present ${tr.present}, unusable ${tr.unusable}`,
      )
    },
  },
  {
    id: 'tr-granularity',
    section: SEGMENT_REGISTERS,
    what: "TR's G fits the limit",
    check: ({ special: { tr } }) => fails(badGranularity(tr), `limit ${tr.limit}, g ${tr.g}`),
  },
  {
    id: 'tr-limit',
    section: 'SDM vol. 3A, "Task-State Segment (TSS)"',
    what: 'The TSS is whole: a limit of at least 0x67 (0x2b for a 16-bit one)',
    check: ({ special: { tr } }) => fails(tr.limit < (tr.type === 3 ? 0x2b : 0x67), `limit ${tr.limit}`),
  },
  {
    id: 'ldtr',
    section: SEGMENT_REGISTERS,
    what: 'LDTR, if usable, is an LDT: type 2, a system segment, present, G fits the limit',
    check: ({ special: { ldt } }) =>
      fails(
        !ldt.unusable && (ldt.type !== 2 || ldt.s !== 0 || !ldt.present || badGranularity(ldt)),
        `type ${ldt.type}`,
      ),
  },
  {
    id: 'table-base',
    section: TABLES,
    what: 'The bases of GDTR and IDTR are canonical',
    check: ({ special: { gdt, idt } }) =>
      fails(!canonical(gdt.base) || !canonical(idt.base), `${gdt.base}, ${idt.base}`),
  },
  {
    id: 'table-limit',
    section: TABLES,
    what: 'Bits 31:16 of the limits of GDTR and IDTR are 0',
    check: ({ special: { gdt, idt } }) =>
      fails(gdt.limit > 0xffff || idt.limit > 0xffff, `${gdt.limit}, ${idt.limit}`),
  },
  {
    id: 'rip',
    section: RIP_RFLAGS,
    what: 'RIP has 32 bits outside 64-bit code, and is canonical in it',
    check: (state) => {
      const longCode = ia32e(state) && state.special.cs.l === 1
      return fails(longCode ? !canonical(state.rip) : above32(state.rip), `RIP ${state.rip}`)
    },
  },
  {
    id: 'rflags-reserved',
    section: RIP_RFLAGS,
    what: 'RFLAGS bits 63:22, 15, 5 and 3 are 0, and bit 1 is 1',
    check: ({ rflags }) =>
      fails((rflags & ~0x3f_7fd7n) !== 0n || !bit(rflags, 1), `RFLAGS ${rflags.toString(16)}`),
  },
  {
    id: 'rflags-vm',
    section: RIP_RFLAGS,
    what: 'RFLAGS.VM is 0 in IA-32e and in real mode',
    check: (state) => fails(bit(state.rflags, 17) && (ia32e(state) || !protectedMode(state)), 'VM is 1'),
  },
  {
    id: 'kvm-sregs',
    section: `${KVM}/x86.c, kvm_is_valid_sregs()`,
    what: 'EFER.LME with CR0.PG wants LMA and PAE; without them neither LMA nor CS.L may be 1',
    check: (state) => {
      const { special } = state
      if (bit(special.efer, 8) && paging(state)) {
        return fails(!ia32e(state) || !bit(special.cr4, 5), 'long mode without LMA or PAE')
      }
      return fails(ia32e(state) || special.cs.l === 1, 'LMA or CS.L outside long mode')
    },
  },
  {
    id: 'kvm-real-mode',
    section: `${KVM}/vmx/vmx.c, rmode_segment_valid(); ${SEGMENT_REGISTERS}, virtual-8086`,
    what: 'In real mode a segment has base = selector * 16, limit 0xffff, 16 bits, and is writable but for CS',
    check: (state) =>
      protectedMode(state)
        ? undefined
        : (eachUsable(
            state,
            SEGMENTS,
            ({ base, selector, limit, db, l, g, avl }) =>
              base !== BigInt(selector * 16) || limit !== 0xffff || (db | l | g | avl) !== 0,
          ) ?? eachUsable(state, [...DATA_SEGMENTS, 'ss'], ({ type }) => type !== 3)),
  },
  {
    id: 'kvm-apic-base',
    section: `${KVM}/lapic.c, kvm_apic_set_base(); SDM vol. 3A, "Local APIC Status and Location"`,
    what: 'IA32_APIC_BASE is on a page, enabled, not x2APIC, with only BSP besides',
    check: ({ special }) => fails((special.apicBase & ~0xf_ffff_f100n) !== 0x800n, `${special.apicBase}`),
  },
]

/** What {@link VM_ENTRY_CHECKS} checks, of a vCPU state. Registers that are not named are 0. */
export function entryStateOf({ registers, specialRegisters }: CpuState): EntryState {
  return { special: specialRegisters, rip: registers.rip ?? 0n, rflags: registers.rflags ?? 2n }
}

/** The failures of a state, each as `id: how`. Empty for a state that a processor enters. */
export function failedEntryChecks(state: EntryState): string[] {
  return VM_ENTRY_CHECKS.flatMap(({ id, check }) => {
    const failure = check(state)
    return failure === undefined ? [] : [`${id}: ${failure}`]
  })
}
