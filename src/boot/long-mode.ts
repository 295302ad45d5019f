import type { Registers } from '../kvm/registers.js'
import { MMIO_HOLE_END, PAGE_SIZE, ramRegions } from '../memory/layout.js'
import type { CpuState } from './boot-image.js'
import { CODE_SELECTOR, DATA_SELECTOR, placeDescriptors } from './descriptors.js'
import type { Handover } from './handover.js'
import { alignUp, type Placement, STRUCTURE_ZONES } from './placement.js'
import {
  CR0_ET,
  CR0_MP,
  CR0_NE,
  CR0_PE,
  CR0_PG,
  CR0_WP,
  CR4_OSFXSR,
  CR4_OSXMMEXCPT,
  CR4_PAE,
  EFER_LMA,
  EFER_LME,
  flatSegment,
  RFLAGS_RESERVED_1,
  specialRegisters,
} from './processor.js'
import { placeStack } from './stack.js'

/** From here on the last 2 GiB of virtual addresses are mapped to guest-physical 0: `-mcmodel=kernel`. */
export const HIGHER_HALF_START = 0xffff_ffff_8000_0000n

// Page-table entries (SDM vol. 3A, "4-Level Paging and 5-Level Paging").
const PTE_PRESENT = 1 << 0
const PTE_WRITABLE = 1 << 1
/** In a page directory: the entry maps 2 MiB. */
const PTE_PAGE_SIZE = 1 << 7

const ENTRIES = 512
const LARGE_PAGE_SIZE = 0x20_0000
/** What a page directory maps. */
const DIRECTORY_SIZE = ENTRIES * LARGE_PAGE_SIZE

/** The identity map ends here: it has the first 4 GiB and all RAM. */
function identityMapEnd(memorySize: number): number {
  const ramEnd = Math.max(...ramRegions(memorySize).map(({ start, size }) => start + size))
  return Math.max(alignUp(ramEnd, LARGE_PAGE_SIZE), MMIO_HOLE_END)
}

/**
 * Where a virtual address leads in the page tables that a kernel finds.
 *
 * @returns the guest-physical address; `undefined` where nothing is mapped
 */
export function bootTranslate(virtual: bigint, memorySize: number): bigint | undefined {
  if (virtual >= HIGHER_HALF_START) return virtual - HIGHER_HALF_START
  return virtual < BigInt(identityMapEnd(memorySize)) ? virtual : undefined
}

/**
 * Places page tables: the first 4 GiB and all RAM at their own addresses, and guest-physical 0 to 2 GiB at
 * {@link HIGHER_HALF_START}. Every page is of 2 MiB, writable, executable and the supervisor's.
 *
 * @returns the address of the PML4 table, for CR3
 */
function placePageTables(placement: Placement, memorySize: number): number {
  const mapEnd = identityMapEnd(memorySize)
  const directories = Math.ceil(mapEnd / DIRECTORY_SIZE)
  const pointerTables = Math.ceil(directories / ENTRIES)
  // Tables in memory: PML4; the last 512 GiB's pointer table; the identity map's pointer tables; directories.
  const higherHalfPointers = 1
  const firstPointerTable = 2
  const firstDirectory = firstPointerTable + pointerTables
  const size = (firstDirectory + directories) * PAGE_SIZE

  return placement.place({
    name: 'page tables',
    size,
    zones: STRUCTURE_ZONES,
    fill: (address) => {
      const bytes = new Uint8Array(size)
      const view = new DataView(bytes.buffer)
      const setEntry = (table: number, index: number, target: number, flags: number) => {
        const at = table * PAGE_SIZE + index * 8
        view.setUint32(at, ((target % 2 ** 32) | flags | PTE_PRESENT | PTE_WRITABLE) >>> 0, true)
        view.setUint32(at + 4, Math.floor(target / 2 ** 32), true)
      }
      const linkTable = (table: number, index: number, child: number) =>
        setEntry(table, index, address + child * PAGE_SIZE, 0)

      for (let n = 0; n < pointerTables; n++) linkTable(0, n, firstPointerTable + n)
      linkTable(0, ENTRIES - 1, higherHalfPointers)
      // The directories of the first 2 GiB serve twice.
      linkTable(higherHalfPointers, ENTRIES - 2, firstDirectory)
      linkTable(higherHalfPointers, ENTRIES - 1, firstDirectory + 1)
      // Pointer tables and directories follow one another, so entries can be counted across tables.
      for (let n = 0; n < directories; n++) linkTable(firstPointerTable, n, firstDirectory + n)
      for (let n = 0; n * LARGE_PAGE_SIZE < mapEnd; n++) {
        setEntry(firstDirectory, n, n * LARGE_PAGE_SIZE, PTE_PAGE_SIZE)
      }
      return bytes
    },
  })
}

/**
 * The state in which a 64-bit kernel starts: paging on, flat segments, interrupts off, no IDT, SSE enabled.
 *
 * Places page tables, descriptors and stack. EFER.NXE, EFER.SCE and every CR4 bit that a processor may lack
 * are left for the kernel to set.
 *
 * @param rip - virtual address of the first instruction
 * @param registers - general-purpose registers that a boot protocol sets
 * @param selectors - where a boot protocol wants the segments in the GDT
 */
export function longModeState(
  placement: Placement,
  memorySize: number,
  rip: bigint,
  registers: Partial<Registers>,
  selectors = { code: CODE_SELECTOR, data: DATA_SELECTOR },
): CpuState {
  const cr3 = placePageTables(placement, memorySize)
  const cs = flatSegment(selectors.code, 'code64')
  const data = flatSegment(selectors.data, 'data')
  const { gdt, tr, returnAddress } = placeDescriptors(placement, cs, data)
  const rsp = placeStack(placement, 8, [returnAddress])
  return {
    registers: { ...registers, rip, rsp: BigInt(rsp), rflags: RFLAGS_RESERVED_1 },
    specialRegisters: specialRegisters({
      cs,
      data,
      ss: { ...data },
      tr,
      gdt,
      idt: { base: 0n, limit: 0 },
      cr0: CR0_PE | CR0_MP | CR0_ET | CR0_NE | CR0_WP | CR0_PG,
      cr3: BigInt(cr3),
      cr4: CR4_PAE | CR4_OSFXSR | CR4_OSXMMEXCPT,
      efer: EFER_LME | EFER_LMA,
    }),
  }
}

/** The state for a kernel without a boot protocol of its own: what it is told is in RDI, RSI, RDX and RCX. */
export function longModeHandover(
  placement: Placement,
  memorySize: number,
  rip: bigint,
  handover: Handover,
): CpuState {
  return longModeState(placement, memorySize, rip, {
    rdi: BigInt(handover.memorySize),
    rsi: BigInt(handover.cmdline),
    rdx: BigInt(handover.modules),
    rcx: BigInt(handover.moduleCount),
  })
}
