import type { BootSegment } from '../boot/boot-image.js'
import { hex, invalidArgument, NodevisorError } from '../errors.js'
import { BIOS_AREA_START, HIGH_MEMORY_START, MMIO_HOLE_END } from '../memory/layout.js'
import { IO_APIC_PINS } from '../wiring.js'
import { buildAcpi, FIRST_X2APIC_ID, MAX_VIRTIO_DEVICES } from './acpi.js'
import { RESERVED_PINS, type VirtioMmioDevice } from './interrupt-routing.js'
import { buildMpTable } from './mp-table.js'

export type { VirtioMmioDevice } from './interrupt-routing.js'

/** An OS looks for the MP floating pointer from here on, at each multiple of 16 (MP 1.4, 4). */
const MP_SEARCH_START = 0xf_0000
const MP_ALIGNMENT = 16
/** APIC ids are below it: all ones is every local APIC's. */
const APIC_ID_END = 0xffff_ffff

/** Guest memory that something has already, by name. */
export type OccupiedMemory = Pick<BootSegment, 'name' | 'address' | 'size'>

/** What the firmware tables describe. */
export interface FirmwareTableOptions {
  /** Number of vCPUs. */
  readonly cpus: number
  /** The APIC id of each vCPU, vCPU 0 first: 0, 1, 2, … unless given. */
  readonly apicIds?: readonly number[]
  readonly virtio: readonly VirtioMmioDevice[]
  /** Bytes of guest RAM. */
  readonly memorySize: number
}

/** The firmware tables as bytes at addresses. */
export interface FirmwareTables {
  /** In ascending order of addresses, in the BIOS area. */
  readonly segments: readonly BootSegment[]
  /** Address of the ACPI root pointer (RSDP). */
  readonly rsdp: number
  /** Address of the MP floating pointer. */
  readonly mpTable: number
  /** Address of the VM generation ID, 16 bytes, which are random and among the {@link segments}. */
  readonly generationId: number
}

/**
 * Places ACPI and MP tables in the BIOS area, where an OS looks for them when nothing says where they are.
 *
 * ACPI begins at 0xe0000; the MP table is the first thing that an OS comes to from 0xf0000 on, as looking for it takes
 * seconds on hosts that emulate kernel code. A memory map for the guest has to keep the whole area from 0xe0000 to 1 MiB
 * reserved.
 *
 * The tables say that interrupt n arrives at pin n of the I/O APIC, but for the timer's, which arrives at 2.
 *
 * @throws `ERR_BOOT_NO_ROOM` for RAM that ends below 1 MiB, and for tables larger than the area
 * @throws `ERR_INVALID_ARGUMENT` for vCPUs or devices that the tables cannot describe
 */
export function placeFirmwareTables(options: FirmwareTableOptions): FirmwareTables {
  const { virtio, memorySize } = options
  const apicIds = checkApicIds(options)
  checkVirtio(virtio)
  if (memorySize < HIGH_MEMORY_START) {
    throw noRoom(
      `Expected RAM up to 1 MiB for the firmware tables, which lie at its end, but the machine has ` +
        `${memorySize} bytes; give it at least 1 MiB`,
      { memorySize },
    )
  }
  const ioApicId = freeIoApicId(apicIds)
  const { tables, generationId } = buildAcpi({ address: BIOS_AREA_START, apicIds, ioApicId, virtio })
  const mp = buildMpTable({ apicIds, ioApicId, virtio })
  const last = tables.at(-1)!
  const acpiEnd = last.address + last.bytes.length
  const mpTable = Math.max(MP_SEARCH_START, Math.ceil(acpiEnd / MP_ALIGNMENT) * MP_ALIGNMENT)
  if (mpTable + mp.length > HIGH_MEMORY_START) {
    const size = mpTable + mp.length - BIOS_AREA_START
    throw noRoom(
      `Expected firmware tables of at most ${HIGH_MEMORY_START - BIOS_AREA_START} bytes but ` +
        `${apicIds.length} vCPUs and ${virtio.length} virtio devices need ${size}; use fewer`,
      { size, cpus: apicIds.length, virtio: virtio.length },
    )
  }
  const segments = [
    ...tables.map(({ name, address, bytes }) => ({
      name: `ACPI ${name}`,
      address,
      bytes,
      size: bytes.length,
    })),
    { name: 'MP table', address: mpTable, bytes: mp.bytesAt(mpTable), size: mp.length },
  ]
  return { segments, rsdp: BIOS_AREA_START, mpTable, generationId }
}

function checkApicIds({ cpus, apicIds }: FirmwareTableOptions): readonly number[] {
  if (!Number.isInteger(cpus) || cpus < 1) throw invalidArgument('cpus', 'an integer of at least 1', cpus)
  if (apicIds === undefined) return Array.from({ length: cpus }, (_, id) => id)
  if (apicIds.length !== cpus) throw invalidArgument('apicIds', `one id for each of ${cpus} vCPUs`, apicIds)
  const seen = new Set<number>()
  for (const id of apicIds) {
    if (!Number.isInteger(id) || id < 0 || id >= APIC_ID_END || seen.has(id)) {
      throw invalidArgument('apicIds', `different integers from 0 to ${hex(APIC_ID_END - 1)}`, id)
    }
    seen.add(id)
  }
  return apicIds
}

function checkVirtio(virtio: readonly VirtioMmioDevice[]): void {
  if (virtio.length > MAX_VIRTIO_DEVICES) {
    throw invalidArgument('virtio', `at most ${MAX_VIRTIO_DEVICES} devices`, virtio)
  }
  const triggers = new Map<number, string>()
  virtio.forEach(({ address, size, gsi, trigger = 'edge' }, index) => {
    const argument = `virtio[${index}]`
    if (!Number.isInteger(address) || address < 0 || address >= MMIO_HOLE_END) {
      throw invalidArgument(`${argument}.address`, 'an address below 4 GiB', address)
    }
    if (!Number.isInteger(size) || size < 1 || address + size > MMIO_HOLE_END) {
      throw invalidArgument(`${argument}.size`, 'at least 1 byte, the last below 4 GiB,', size)
    }
    if (!Number.isInteger(gsi) || gsi < 0 || gsi >= IO_APIC_PINS || RESERVED_PINS.includes(gsi)) {
      const expected = `a pin of the I/O APIC below ${IO_APIC_PINS} that is not one of the machine's own`
      throw invalidArgument(`${argument}.gsi`, `${expected} (${RESERVED_PINS.join(', ')})`, gsi)
    }
    const other = triggers.get(gsi) ?? trigger
    if ((trigger !== 'edge' && trigger !== 'level') || other !== trigger) {
      const expected = "'edge' or 'level', the same for all devices on a pin,"
      throw invalidArgument(`${argument}.trigger`, expected, trigger)
    }
    triggers.set(gsi, trigger)
  })
}

/**
 * Above the vCPUs' ids where that fits into the tables' 8 bits; otherwise any that no vCPU has. Where they
 * have all of them it is 0: APICs that are not on an APIC bus may share an id with the I/O APIC.
 */
function freeIoApicId(apicIds: readonly number[]): number {
  const taken = new Set(apicIds)
  const above =
    1 + apicIds.reduce((highest, id) => (id < FIRST_X2APIC_ID ? Math.max(highest, id) : highest), -1)
  if (above < FIRST_X2APIC_ID) return above
  for (let id = 0; id < FIRST_X2APIC_ID; id++) if (!taken.has(id)) return id
  return 0
}

/**
 * Checks that the tables lie beside what else is in memory: a kernel's segments, which are known only when it was
 * loaded, which may need the tables' address.
 *
 * @throws `ERR_BOOT_NO_ROOM`
 */
export function checkFirmwareRoom({ segments }: FirmwareTables, occupied: readonly OccupiedMemory[]): void {
  for (const { name, address, size } of segments) {
    const other = occupied.find(
      (taken) => taken.address < address + size && address < taken.address + taken.size,
    )
    if (other === undefined) continue
    throw noRoom(
      `Expected free memory for the firmware tables from ${hex(BIOS_AREA_START)} to ` +
        `${hex(HIGH_MEMORY_START - 1)} but ${other.name} takes ${hex(other.size)} bytes at ` +
        `${hex(other.address)}, where the ${name} belongs; ` +
        'load it elsewhere',
      { segment: other.name, address: other.address, size: other.size, table: name },
    )
  }
}

function noRoom(message: string, facts: Record<string, unknown>): NodevisorError {
  return new NodevisorError('ERR_BOOT_NO_ROOM', `${message}, or do without (firmwareTables: false)`, facts)
}
