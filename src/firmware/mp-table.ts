import { IO_APIC_ADDRESS, LOCAL_APIC_ADDRESS } from '../memory/layout.js'
import { interruptRoutes, type VirtioMmioDevice } from './interrupt-routing.js'
import { checksum, OEM_TABLE_ID, TableFields } from './table.js'

// Intel MultiProcessor Specification, version 1.4, May 1997, chapter 4 "MP Configuration Table"

const SPEC_REVISION = 4

const FLOATING_POINTER_LENGTH = 16
/** Length of the floating pointer, in paragraphs of 16 bytes. */
const FLOATING_POINTER_PARAGRAPHS = 1
const FLOATING_POINTER_CHECKSUM_OFFSET = 10
const CONFIGURATION_HEADER_LENGTH = 44
const CONFIGURATION_CHECKSUM_OFFSET = 7
/** Twelve characters. */
const PRODUCT_ID = 'NODEVISOR   '

const PROCESSOR = 0
const BUS = 1
const IO_APIC = 2
const IO_INTERRUPT = 3
const LOCAL_INTERRUPT = 4

const LOCAL_APIC_VERSION = 0x14
const CPU_ENABLED = 1
const CPU_BOOTSTRAP = 2
/** Family 6; kernels take the true signature from CPUID. */
const CPU_SIGNATURE = 0x600
const FEATURE_FPU = 1 << 0
const FEATURE_APIC = 1 << 9

const ISA_BUS = 0
const IO_APIC_VERSION = 0x11
const IO_APIC_ENABLED = 1

const INTERRUPT_INT = 0
const INTERRUPT_NMI = 1
const INTERRUPT_EXTINT = 3
const CONFORMS = 0
const EXTINT_LINT = 0
const NMI_LINT = 1
const ALL_LOCAL_APICS = 0xff

/** Local APIC ids have 8 bits here, and 255 is every local APIC's. */
const MAX_APIC_ID = 254

/** What the tables describe. */
export interface MpOptions {
  /** The APIC id of each vCPU, vCPU 0 first. Those above 254 do not fit, and are left out. */
  readonly apicIds: readonly number[]
  readonly ioApicId: number
  readonly virtio: readonly VirtioMmioDevice[]
}

/** The tables, but for their address. */
export interface MpTable {
  /** Bytes of the floating pointer and of the configuration table behind it. */
  readonly length: number
  /** @param address - guest-physical address of the floating pointer, a multiple of 16 */
  bytesAt(address: number): Uint8Array
}

/** Builds the MP floating pointer and, right behind it, the configuration table. */
export function buildMpTable(options: MpOptions): MpTable {
  const configuration = buildConfiguration(options)
  return {
    length: FLOATING_POINTER_LENGTH + configuration.length,
    bytesAt: (address) =>
      new TableFields()
        .bytes(buildFloatingPointer(address + FLOATING_POINTER_LENGTH))
        .bytes(configuration)
        .toBytes(),
  }
}

/** 4.1 "MP Floating Pointer Structure" */
function buildFloatingPointer(configuration: number): Uint8Array {
  const pointer = new TableFields()
    .text('_MP_')
    .uint32(configuration)
    .uint8(FLOATING_POINTER_PARAGRAPHS)
    .uint8(SPEC_REVISION)
    .uint8(0) // checksum
    // Feature bytes: there is a configuration table, and no IMCR: the mode is Virtual Wire.
    .zeros(5)
    .toBytes()
  pointer[FLOATING_POINTER_CHECKSUM_OFFSET] = checksum(pointer)
  return pointer
}

/** 4.2 "MP Configuration Table Header" and 4.3 "Base MP Configuration Table Entries", in order of type */
function buildConfiguration({ apicIds, ioApicId, virtio }: MpOptions): Uint8Array {
  const entries = new TableFields()
  let count = 0
  const entry = (type: number) => {
    count++
    return entries.uint8(type)
  }
  const bootstrap = apicIds[0]!
  for (const id of apicIds) {
    if (id > MAX_APIC_ID) continue
    entry(PROCESSOR)
      .uint8(id)
      .uint8(LOCAL_APIC_VERSION)
      .uint8(CPU_ENABLED | (id === bootstrap ? CPU_BOOTSTRAP : 0))
      .uint32(CPU_SIGNATURE)
      .uint32(FEATURE_FPU | FEATURE_APIC)
      .zeros(8)
  }
  entry(BUS).uint8(ISA_BUS).text('ISA   ')
  entry(IO_APIC).uint8(ioApicId).uint8(IO_APIC_VERSION).uint8(IO_APIC_ENABLED).uint32(IO_APIC_ADDRESS)
  for (const { irq, pin, flags } of interruptRoutes(virtio)) {
    entry(IO_INTERRUPT)
      .uint8(INTERRUPT_INT)
      .uint16(flags)
      .uint8(ISA_BUS)
      .uint8(irq)
      .uint8(ioApicId)
      .uint8(pin)
  }
  const localInterrupt = (type: number, apicId: number, lint: number) =>
    entry(LOCAL_INTERRUPT)
      .uint8(type)
      .uint16(CONFORMS)
      .uint8(ISA_BUS)
      .uint8(0) // source bus IRQ
      .uint8(apicId)
      .uint8(lint)
  localInterrupt(INTERRUPT_EXTINT, Math.min(bootstrap, ALL_LOCAL_APICS), EXTINT_LINT)
  localInterrupt(INTERRUPT_NMI, ALL_LOCAL_APICS, NMI_LINT)

  const configuration = new TableFields()
    .text('PCMP')
    .uint16(CONFIGURATION_HEADER_LENGTH + entries.length)
    .uint8(SPEC_REVISION)
    .uint8(0) // checksum
    .text(OEM_TABLE_ID)
    .text(PRODUCT_ID)
    .uint32(0) // OEM table pointer
    .uint16(0) // OEM table size
    .uint16(count)
    .uint32(LOCAL_APIC_ADDRESS)
    .uint16(0) // extended table length
    .uint8(0) // extended table checksum
    .uint8(0) // reserved
    .bytes(entries.toBytes())
    .toBytes()
  configuration[CONFIGURATION_CHECKSUM_OFFSET] = checksum(configuration)
  return configuration
}
