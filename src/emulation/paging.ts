import { hex } from '../errors.js'
import type { SpecialRegisters } from '../kvm/registers.js'
import type { GuestMemory } from '../memory/guest-memory.js'
import { PAGE_SIZE } from '../memory/layout.js'
import { GuestFault, PAGE_FAULT, Refusal } from './outcome.js'

/** What is done to memory, and by whom. */
export interface Access {
  readonly kind: 'read' | 'write' | 'fetch'
  /** At CPL 3, and not to a table of the processor's. */
  readonly user: boolean
  /** RFLAGS.AC is set and the access is the program's own: SMAP lets it pass. */
  readonly overridesSmap: boolean
}

// CR0, CR4, EFER ("Control Registers"; this and what follows: Intel SDM vol. 3A).
export const CR0_WP = 1n << 16n
export const CR0_PG = 1n << 31n
export const CR4_LA57 = 1n << 12n
const CR4_SMEP = 1n << 20n
const CR4_SMAP = 1n << 21n
export const EFER_LMA = 1n << 10n
const EFER_NXE = 1n << 11n

// Page-table entries ("4-Level Paging and 5-Level Paging").
const PTE_PRESENT = 1n << 0n
const PTE_WRITABLE = 1n << 1n
const PTE_USER = 1n << 2n
const PTE_ACCESSED = 1 << 5
const PTE_DIRTY = 1 << 6
const PTE_PAGE_SIZE = 1n << 7n
const PTE_EXECUTE_DISABLE = 1n << 63n
const PTE_ADDRESS = 0x000f_ffff_ffff_f000n

// Error code of a page fault ("Page-Fault Exceptions").
const PF_PRESENT = 1 << 0
const PF_WRITE = 1 << 1
const PF_USER = 1 << 2
const PF_RESERVED = 1 << 3
const PF_FETCH = 1 << 4

/**
 * Walks the guest's page tables as the processor does, which KVM_TRANSLATE does not: it ignores permissions.
 *
 * Sets the accessed bits on the way, and for a write the dirty bit.
 *
 * @returns the guest-physical address, which need not be RAM
 * @throws {@link GuestFault} #PF
 */
export function translate(
  memory: GuestMemory,
  special: SpecialRegisters,
  linear: bigint,
  access: Access,
): number {
  if ((special.cr0 & CR0_PG) === 0n) return Number(linear)
  if ((special.efer & EFER_LMA) === 0n) throw new Refusal('the guest has paging on outside long mode')
  const executeDisable = (special.efer & EFER_NXE) !== 0n
  const fault = (flags: number) => {
    const kind = access.kind === 'write' ? PF_WRITE : access.kind === 'fetch' && executeDisable ? PF_FETCH : 0
    return new GuestFault(PAGE_FAULT, flags | kind | (access.user ? PF_USER : 0), linear)
  }

  let writable = true
  let userPage = true
  let executable = true
  let table = Number(special.cr3 & PTE_ADDRESS)
  for (let level = (special.cr4 & CR4_LA57) !== 0n ? 5 : 4; ; level--) {
    const shift = 12n + 9n * BigInt(level - 1)
    const address = table + Number((linear >> shift) & 0x1ffn) * 8
    if (!memory.contains(address, 8)) throw new Refusal(`its page table at ${hex(address)} is not RAM`)
    const entry = memory.readBigUint64(address)
    if ((entry & PTE_PRESENT) === 0n) throw fault(0)
    if ((entry & PTE_PAGE_SIZE) !== 0n && level > 3) throw fault(PF_PRESENT | PF_RESERVED)
    if ((entry & PTE_EXECUTE_DISABLE) !== 0n) {
      if (!executeDisable) throw fault(PF_PRESENT | PF_RESERVED)
      executable = false
    }
    writable &&= (entry & PTE_WRITABLE) !== 0n
    userPage &&= (entry & PTE_USER) !== 0n
    const isPage = level === 1 || (entry & PTE_PAGE_SIZE) !== 0n
    if (isPage && !permits({ writable, userPage, executable }, special, access)) throw fault(PF_PRESENT)
    const bits = PTE_ACCESSED | (isPage && access.kind === 'write' ? PTE_DIRTY : 0)
    // Atomically: another vCPU may change the entry.
    if ((Number(entry & 0xffn) & bits) !== bits) Atomics.or(memory.view(address, 1), 0, bits)
    if (isPage) {
      const offsetMask = (1n << shift) - 1n
      return Number((entry & PTE_ADDRESS & ~offsetMask) | (linear & offsetMask))
    }
    table = Number(entry & PTE_ADDRESS)
  }
}

interface Permissions {
  readonly writable: boolean
  readonly userPage: boolean
  readonly executable: boolean
}

/** "Determination of Access Rights". */
function permits(page: Permissions, { cr0, cr4 }: SpecialRegisters, access: Access): boolean {
  if (access.user && !page.userPage) return false
  if (access.kind === 'fetch') {
    return page.executable && !(page.userPage && !access.user && (cr4 & CR4_SMEP) !== 0n)
  }
  if (!access.user && page.userPage && (cr4 & CR4_SMAP) !== 0n && !access.overridesSmap) return false
  return access.kind === 'read' || page.writable || (!access.user && (cr0 & CR0_WP) === 0n)
}

/** Bytes from `linear` to the end of its page, at most `length`. */
export function withinPage(linear: bigint, length: number): number {
  return Math.min(length, PAGE_SIZE - Number(linear & BigInt(PAGE_SIZE - 1)))
}
