import { randomBytes } from 'node:crypto'
import { IO_APIC_ADDRESS, LOCAL_APIC_ADDRESS } from '../memory/layout.js'
import { GENERATION_GPE, SCI_IRQ } from '../wiring.js'
import {
  type Aml,
  device,
  eisaId,
  integer,
  interrupt,
  ioPorts,
  irq,
  memory32Fixed,
  method,
  name,
  notify,
  packageOf,
  resourceTemplate,
  scope,
  string,
} from './aml.js'
import {
  type InterruptRoute,
  interruptRoutes,
  isIdentity,
  isIsa,
  type VirtioMmioDevice,
} from './interrupt-routing.js'
import { checksum, OEM_ID, OEM_TABLE_ID, systemTable, TableFields } from './table.js'

// ACPI 6.5, chapter 5 "ACPI Software Programming Model"; registers: 4.8

/** FADT major version, minor version, and revisions of the other tables. */
const FADT_REVISION = 6
const FADT_MINOR_VERSION = 5
const MADT_REVISION = 6
const DSDT_REVISION = 2
const XSDT_REVISION = 1
const RSDT_REVISION = 1

const RSDP_LENGTH = 36
/** Bytes of the RSDP that ACPI 1.0 knew: they have a checksum of their own. */
const RSDP_V1_LENGTH = 20
const RSDP_REVISION = 2
const RSDP_CHECKSUM_OFFSET = 8
const RSDP_EXTENDED_CHECKSUM_OFFSET = 32

const FACS_LENGTH = 64
const FACS_ALIGNMENT = 64
const FACS_VERSION = 2
const TABLE_ALIGNMENT = 16

// Fixed hardware: 5.2.9 "Fixed ACPI Description Table"
const PM1A_EVT_BLK = 0x600
const PM1_EVT_LEN = 4
const PM1A_CNT_BLK = 0x604
const PM1_CNT_LEN = 2
const PM_TMR_BLK = 0x608
const PM_TMR_LEN = 4
const GPE0_BLK = 0x620
/** Half of it is status, half enable: 8 GPEs. */
const GPE0_BLK_LEN = 2
const RESET_REG = 0xcf9
/** SYS_RST and RST_CPU: a hard reset. */
const RESET_VALUE = 0x06
/** CMOS register of the century in the RTC. */
const CENTURY = 0x32
/** Latencies over 100 µs and 1000 µs say that there is no C2 and no C3. */
const P_LVL2_LAT_NONE = 101
const P_LVL3_LAT_NONE = 1001

const WBINVD = 1 << 0
const PROC_C1 = 1 << 2
/** There is no sleep button in the fixed hardware; PWR_BUTTON is 0: there is a power button. */
const SLP_BUTTON = 1 << 5
/** RTC alarms are not in the PM1 status. */
const FIX_RTC = 1 << 6
/** The PM timer has 32 bits. */
const TMR_VAL_EXT = 1 << 8
const RESET_REG_SUP = 1 << 10

const IAPC_LEGACY_DEVICES = 1 << 0
const IAPC_8042 = 1 << 1

// Interrupt controllers: 5.2.12 "Multiple APIC Description Table"
/** There are two 8259 PICs besides. */
const PCAT_COMPAT = 1
const LOCAL_APIC = { type: 0, length: 8 }
const IO_APIC = { type: 1, length: 12 }
const INTERRUPT_SOURCE_OVERRIDE = { type: 2, length: 10 }
const LOCAL_APIC_NMI = { type: 4, length: 6 }
const LOCAL_X2APIC = { type: 9, length: 16 }
const LOCAL_X2APIC_NMI = { type: 10, length: 12 }
const APIC_ENABLED = 1
/** From here on an APIC id needs an x2APIC entry: 255 is every local APIC's. */
export const FIRST_X2APIC_ID = 255
const ALL_PROCESSORS = 0xff
const ALL_X2APIC_PROCESSORS = 0xffff_ffff
const ISA_BUS = 0
const NMI_LINT = 1

// Fixed resources of the legacy devices
const SERIAL = { base: 0x3f8, length: 8, irq: 4 }
const RTC = { base: 0x70, length: 2, irq: 8 }
const KEYBOARD = { data: 0x60, command: 0x64, irq: 1 }

// "Virtual Machine Generation ID", Microsoft, August 2012: 16 random bytes, 8-byte aligned, in memory that is not the OS's
const GENERATION_ID_SIZE = 16
/** By which an OS finds the device; _HID is the hypervisor's own. */
const GENERATION_CID = 'VM_Gen_Counter'
/** What the device is told when there is a new one. */
const GENERATION_CHANGED = 0x80

/** How many virtio-mmio devices have a name in the DSDT: `V` and three hexadecimal digits. */
export const MAX_VIRTIO_DEVICES = 0x1000

/** What the tables describe. */
export interface AcpiOptions {
  /** Guest-physical address of the first table, the RSDP; a multiple of 64. Below 4 GiB, as all are. */
  readonly address: number
  /** The APIC id of each vCPU, vCPU 0 first. */
  readonly apicIds: readonly number[]
  readonly ioApicId: number
  /** Its devices follow the machine's own in the DSDT. */
  readonly virtio: readonly VirtioMmioDevice[]
}

/** A table in guest memory. */
export interface PlacedTable {
  /** As the specification abbreviates it: `MADT`, not its signature `APIC`. */
  readonly name: string
  readonly address: number
  readonly bytes: Uint8Array
}

/** What a machine's ACPI consists of. */
export interface Acpi {
  /** In ascending order of addresses, the RSDP first. */
  readonly tables: readonly PlacedTable[]
  /** Address of the VM generation ID, which is one of the `tables`: no table, but what the DSDT leads to. */
  readonly generationId: number
}

/** Builds the ACPI tables of a machine and lays them out one behind the other. */
export function buildAcpi({ address, apicIds, ioApicId, virtio }: AcpiOptions): Acpi {
  const placed: PlacedTable[] = []
  let next = address + RSDP_LENGTH
  const place = (name: string, bytes: Uint8Array, alignment = TABLE_ALIGNMENT): number => {
    const at = Math.ceil(next / alignment) * alignment
    next = at + bytes.length
    placed.push({ name, address: at, bytes })
    return at
  }
  const generationId = place('generation ID', randomBytes(GENERATION_ID_SIZE))
  const facs = place('FACS', buildFacs(), FACS_ALIGNMENT)
  const dsdt = place('DSDT', buildDsdt(virtio, generationId))
  const tables = [
    place('FADT', buildFadt(facs, dsdt)),
    place('MADT', buildMadt(apicIds, ioApicId, interruptRoutes(virtio))),
  ]
  const rsdt = place('RSDT', buildRsdt(tables))
  const xsdt = place('XSDT', buildXsdt(tables))
  return { tables: [{ name: 'RSDP', address, bytes: buildRsdp(rsdt, xsdt) }, ...placed], generationId }
}

/** 5.2.5.3 "Root System Description Pointer (RSDP) Structure" */
function buildRsdp(rsdt: number, xsdt: number): Uint8Array {
  const rsdp = new TableFields()
    .text('RSD PTR ')
    .uint8(0) // checksum
    .text(OEM_ID)
    .uint8(RSDP_REVISION)
    .uint32(rsdt)
    .uint32(RSDP_LENGTH)
    .uint64(xsdt)
    .uint8(0) // extended checksum
    .zeros(3)
    .toBytes()
  rsdp[RSDP_CHECKSUM_OFFSET] = checksum(rsdp.subarray(0, RSDP_V1_LENGTH))
  rsdp[RSDP_EXTENDED_CHECKSUM_OFFSET] = checksum(rsdp)
  return rsdp
}

/** 5.2.7 "Root System Description Table (RSDT)": for kernels that only know ACPI 1.0 */
function buildRsdt(tables: readonly number[]): Uint8Array {
  const fields = new TableFields()
  for (const table of tables) fields.uint32(table)
  return systemTable('RSDT', RSDT_REVISION, fields)
}

/** 5.2.8 "Extended System Description Table (XSDT)" */
function buildXsdt(tables: readonly number[]): Uint8Array {
  const fields = new TableFields()
  for (const table of tables) fields.uint64(table)
  return systemTable('XSDT', XSDT_REVISION, fields)
}

/**
 * 5.2.9 "Fixed ACPI Description Table (FADT)". Without SMI_CMD the machine is in ACPI mode from the start:
 * there is nothing to hand over.
 */
function buildFadt(facs: number, dsdt: number): Uint8Array {
  const fields = new TableFields()
    .uint32(facs)
    .uint32(dsdt)
    .uint8(0) // reserved
    .uint8(0) // Preferred_PM_Profile: unspecified
    .uint16(SCI_IRQ)
    .uint32(0) // SMI_CMD
    .zeros(4) // ACPI_ENABLE, ACPI_DISABLE, S4BIOS_REQ, PSTATE_CNT
    .uint32(PM1A_EVT_BLK)
    .uint32(0) // PM1b_EVT_BLK
    .uint32(PM1A_CNT_BLK)
    .uint32(0) // PM1b_CNT_BLK
    .uint32(0) // PM2_CNT_BLK
    .uint32(PM_TMR_BLK)
    .uint32(GPE0_BLK)
    .uint32(0) // GPE1_BLK
    .uint8(PM1_EVT_LEN)
    .uint8(PM1_CNT_LEN)
    .uint8(0) // PM2_CNT_LEN
    .uint8(PM_TMR_LEN)
    .uint8(GPE0_BLK_LEN)
    .zeros(3) // GPE1_BLK_LEN, GPE1_BASE, CST_CNT
    .uint16(P_LVL2_LAT_NONE)
    .uint16(P_LVL3_LAT_NONE)
    .zeros(6) // FLUSH_SIZE, FLUSH_STRIDE, DUTY_OFFSET, DUTY_WIDTH
    .uint8(0) // DAY_ALRM
    .uint8(0) // MON_ALRM
    .uint8(CENTURY)
    .uint16(IAPC_LEGACY_DEVICES | IAPC_8042)
    .uint8(0) // reserved
    .uint32(WBINVD | PROC_C1 | SLP_BUTTON | FIX_RTC | TMR_VAL_EXT | RESET_REG_SUP)
    .portAddress({ port: RESET_REG, length: 1, accessSize: 1 })
    .uint8(RESET_VALUE)
    .uint16(0) // ARM_BOOT_ARCH
    .uint8(FADT_MINOR_VERSION)
    .uint64(0) // X_FIRMWARE_CTRL: only one of the two may be given
    .uint64(dsdt) // X_DSDT
    .portAddress({ port: PM1A_EVT_BLK, length: PM1_EVT_LEN, accessSize: 2 })
    .zeros(12) // X_PM1b_EVT_BLK
    .portAddress({ port: PM1A_CNT_BLK, length: PM1_CNT_LEN, accessSize: 2 })
    .zeros(12) // X_PM1b_CNT_BLK
    .zeros(12) // X_PM2_CNT_BLK
    .portAddress({ port: PM_TMR_BLK, length: PM_TMR_LEN, accessSize: 4 })
    .portAddress({ port: GPE0_BLK, length: GPE0_BLK_LEN, accessSize: 1 })
    .zeros(12) // X_GPE1_BLK
    .zeros(2 * 12) // SLEEP_CONTROL_REG, SLEEP_STATUS_REG
    .text(OEM_TABLE_ID) // Hypervisor Vendor Identity
  return systemTable('FACP', FADT_REVISION, fields)
}

/** 5.2.10 "Firmware ACPI Control Structure (FACS)": no header, no checksum; the guest writes into it. */
function buildFacs(): Uint8Array {
  return new TableFields()
    .text('FACS')
    .uint32(FACS_LENGTH)
    .zeros(24) // Hardware_Signature, waking vectors, Global_Lock, Flags
    .uint8(FACS_VERSION)
    .zeros(FACS_LENGTH - 33)
    .toBytes()
}

/** 5.2.12 "Multiple APIC Description Table (MADT)". A processor's UID is its APIC id. */
function buildMadt(
  apicIds: readonly number[],
  ioApicId: number,
  routes: readonly InterruptRoute[],
): Uint8Array {
  const fields = new TableFields().uint32(LOCAL_APIC_ADDRESS).uint32(PCAT_COMPAT)
  const entry = ({ type, length }: { type: number; length: number }) => fields.uint8(type).uint8(length)
  for (const id of apicIds) {
    if (id < FIRST_X2APIC_ID) entry(LOCAL_APIC).uint8(id).uint8(id).uint32(APIC_ENABLED)
    else entry(LOCAL_X2APIC).zeros(2).uint32(id).uint32(APIC_ENABLED).uint32(id)
  }
  entry(IO_APIC).uint8(ioApicId).zeros(1).uint32(IO_APIC_ADDRESS).uint32(0)
  for (const route of routes) {
    if (!isIsa(route) || isIdentity(route)) continue
    entry(INTERRUPT_SOURCE_OVERRIDE).uint8(ISA_BUS).uint8(route.irq).uint32(route.pin).uint16(route.flags)
  }
  entry(LOCAL_APIC_NMI).uint8(ALL_PROCESSORS).uint16(0).uint8(NMI_LINT)
  if (apicIds.some((id) => id >= FIRST_X2APIC_ID)) {
    entry(LOCAL_X2APIC_NMI).uint16(0).uint32(ALL_X2APIC_PROCESSORS).uint8(NMI_LINT).zeros(3)
  }
  return systemTable('APIC', MADT_REVISION, fields)
}

/** 5.2.11.1 "Differentiated System Description Table": the devices that no bus enumerates, their event, and soft-off. */
function buildDsdt(virtio: readonly VirtioMmioDevice[], generationId: number): Uint8Array {
  const zero = integer(0)
  const aml = new TableFields()
    .bytes(
      scope(
        '\\_SB',
        device(
          'COM1',
          name('_HID', eisaId('PNP0501')), // 16550A-compatible COM port
          name('_UID', integer(1)),
          name('_CRS', resourceTemplate(ioPorts(SERIAL.base, SERIAL.length), irq(SERIAL.irq))),
        ),
        device(
          'RTC',
          name('_HID', eisaId('PNP0B00')), // AT real-time clock
          name('_CRS', resourceTemplate(ioPorts(RTC.base, RTC.length), irq(RTC.irq))),
        ),
        device(
          'KBD',
          name('_HID', eisaId('PNP0303')), // IBM enhanced keyboard, PS/2
          name(
            '_CRS',
            resourceTemplate(ioPorts(KEYBOARD.data, 1), ioPorts(KEYBOARD.command, 1), irq(KEYBOARD.irq)),
          ),
        ),
        device(
          'VGEN',
          name('_HID', string('NDVR0001')),
          name('_CID', string(GENERATION_CID)),
          name('_DDN', string(GENERATION_CID)),
          name('ADDR', packageOf(integer(generationId), zero)), // its lower and its upper half
        ),
        ...virtio.map((device, index) => virtioDevice(device, index, virtio)),
      ),
    )
    // `E`: edge-triggered, so that an OS clears the event before it reads the ID, and misses no later one
    .bytes(
      scope('\\_GPE', method(`_E${hexDigits(GENERATION_GPE, 2)}`, notify('\\_SB.VGEN', GENERATION_CHANGED))),
    )
    // SLP_TYPa, SLP_TYPb and two reserved values (7.4.2.6)
    .bytes(name('\\_S5', packageOf(zero, zero, zero, zero)))
  return systemTable('DSDT', DSDT_REVISION, aml)
}

function virtioDevice(
  { address, size, gsi, trigger = 'edge' }: VirtioMmioDevice,
  index: number,
  all: readonly VirtioMmioDevice[],
): Aml {
  const shared = all.some((other, at) => at !== index && other.gsi === gsi)
  return device(
    `V${hexDigits(index, 3)}`,
    name('_HID', string('LNRO0005')), // virtio-mmio, by Linux's virtio_mmio driver and by QEMU
    name('_UID', integer(index)),
    name('_CRS', resourceTemplate(memory32Fixed(address, size), interrupt({ gsi, trigger, shared }))),
  )
}

function hexDigits(value: number, count: number): string {
  return value.toString(16).toUpperCase().padStart(count, '0')
}
