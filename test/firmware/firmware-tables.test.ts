import fc from 'fast-check'
import { describe, expect, it } from 'vitest'
import { AcpiPm } from '../../src/devices/acpi-pm.js'
import { KeyboardController } from '../../src/devices/keyboard-controller.js'
import { ResetControl } from '../../src/devices/reset-control.js'
import { Rtc } from '../../src/devices/rtc.js'
import { VmGeneration } from '../../src/devices/vm-generation.js'
import {
  checkFirmwareRoom,
  type FirmwareTableOptions,
  placeFirmwareTables,
  type VirtioMmioDevice,
} from '../../src/firmware/index.js'
import { guestMemory, guestWith, hostOf } from '../devices/guest.js'
import { errorOf } from '../helpers/images.js'
import {
  type AmlData,
  eisaText,
  findMpTable,
  findTables,
  lowMemory,
  madtEntries,
  parseAml,
  resources,
  sum,
} from './tables.js'

const MIB = 2 ** 20
const BLK: VirtioMmioDevice = { address: 0xd000_0000, size: 0x1000, gsi: 5 }
const NET: VirtioMmioDevice = { address: 0xd000_1000, size: 0x1000, gsi: 17, trigger: 'level' }

const place = (options: Partial<FirmwareTableOptions> = {}) =>
  placeFirmwareTables({ cpus: 1, virtio: [], memorySize: 64 * MIB, ...options })
const tables = (options: Partial<FirmwareTableOptions> = {}) => findTables(lowMemory(place(options)))
const mpTable = (options: Partial<FirmwareTableOptions> = {}) => findMpTable(lowMemory(place(options)))

/** APIC ids of vCPUs, in any order, some with holes. */
const apicIds = fc.oneof(
  fc.integer({ min: 1, max: 1024 }).map((cpus) => Array.from({ length: cpus }, (_, id) => id)),
  fc.uniqueArray(fc.nat(1100), { minLength: 1, maxLength: 300 }),
)
const virtio = fc.array(
  fc
    .record({
      address: fc.integer({ min: 0xc000, max: 0xfebf }).map((page) => page * 0x1_0000),
      size: fc.integer({ min: 1, max: 0x1_0000 }),
      gsi: fc.constantFrom(3, 5, 6, 7, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23),
    })
    // Devices on a pin have to agree.
    .map((device) => ({ ...device, trigger: device.gsi % 3 === 0 ? ('level' as const) : ('edge' as const) })),
  { maxLength: 40 },
)

describe('ACPI tables', () => {
  it('are found where an OS looks, from the root pointer on, both ways', () => {
    const placed = place()
    const { rsdp, rsdpAddress, xsdt, rsdt, addresses, rsdtAddresses } = findTables(lowMemory(placed))
    expect([rsdpAddress, placed.rsdp]).toEqual([0xe0000, 0xe0000])
    expect([rsdp[15], rsdp.readUInt32LE(20), sum(rsdp.subarray(0, 20)), sum(rsdp)]).toEqual([2, 36, 0, 0])
    expect([xsdt.signature, rsdt.signature]).toEqual(['XSDT', 'RSDT'])
    expect(addresses).toHaveLength(2)
    expect(rsdtAddresses).toEqual(addresses)
  })

  it('are whole, aligned and apart, for every number of vCPUs and devices', () => {
    fc.assert(
      fc.property(apicIds, virtio, (apicIds, virtio) => {
        const placed = place({ cpus: apicIds.length, apicIds, virtio })
        let end = 0xe0000
        for (const { address, bytes, size } of placed.segments) {
          expect(size).toBe(bytes.length)
          expect(address % 16).toBe(0)
          expect(address).toBeGreaterThanOrEqual(end)
          end = address + size
        }
        expect(end).toBeLessThanOrEqual(MIB)
        const { xsdt, rsdt, fadt, madt, dsdt, facs } = findTables(lowMemory(placed))
        for (const table of [xsdt, rsdt, fadt, madt, dsdt]) {
          expect(table, table.signature).toMatchObject({ sum: 0, oemId: 'NODEVI' })
        }
        expect([facs.toString('latin1', 0, 4), facs.readUInt32LE(4), facs[32]]).toEqual(['FACS', 64, 2])
        expect(facs.byteOffset % 64).toBe(0)
      }),
      { numRuns: 30 },
    )
  })

  it('have nothing to hand over: ACPI is on from the start', () => {
    const { bytes, revision } = tables().fadt
    expect([revision, bytes.length, bytes[131]]).toEqual([6, 276, 5])
    expect([bytes.readUInt32LE(48), ...bytes.subarray(52, 56)], 'SMI_CMD').toEqual([0, 0, 0, 0, 0])
    expect([bytes.readUInt32LE(84), bytes[93], bytes[94]], 'GPE1').toEqual([0, 0, 0])
  })

  it('say that there are legacy devices, a fixed power button, a 32-bit timer and a reset register', () => {
    const { bytes } = tables().fadt
    expect(bytes.readUInt16LE(109), 'IAPC_BOOT_ARCH').toBe(0b11)
    // WBINVD, PROC_C1, SLP_BUTTON (none), FIX_RTC (no wake), TMR_VAL_EXT, RESET_REG_SUP
    expect(bytes.readUInt32LE(112)).toBe((1 << 0) | (1 << 2) | (1 << 5) | (1 << 6) | (1 << 8) | (1 << 10))
    expect(bytes.readUInt16LE(96)).toBeGreaterThan(100)
    expect(bytes.readUInt16LE(98)).toBeGreaterThan(1000)
  })

  it('name the same registers in both forms, those that the machine has', () => {
    const { bytes, address } = tables().fadt
    expect(address).toBeLessThan(MIB)
    const register = (at: number) => ({
      space: bytes[at],
      bits: bytes[at + 1],
      access: bytes[at + 3],
      port: Number(bytes.readBigUInt64LE(at + 4)),
    })
    const pm = new AcpiPm({ onPowerOff() {} })
    const [event, control, timer, gpe0] = pm.ports
    expect(bytes.readUInt16LE(46), 'SCI_INT').toBe(pm.irq)
    for (const [range, narrow, length, wide, access] of [
      [event!, 56, 88, 148, 2],
      [control!, 64, 89, 172, 2],
      [timer!, 76, 91, 208, 3],
      [gpe0!, 80, 92, 220, 1],
    ] as const) {
      expect([bytes.readUInt32LE(narrow), bytes[length]]).toEqual([range.base, range.length])
      expect(register(wide)).toEqual({ space: 1, bits: 8 * range.length, access, port: range.base })
    }
    expect([bytes.readUInt32LE(40), Number(bytes.readBigUInt64LE(140))], 'DSDT').toEqual(
      Array(2).fill(tables().dsdt.address),
    )
  })

  it('lead to the devices: writing what they say resets, powers off, and finds the century', () => {
    const events: string[] = []
    const pm = new AcpiPm({ onPowerOff: () => events.push('off') })
    pm.attach(hostOf())
    const reset = new ResetControl({ onReset: () => events.push('reset') })
    const rtc = new Rtc({ memorySize: MIB, now: () => Date.UTC(2024, 0) })
    const { outb, outw, inb } = guestWith(pm, reset, rtc)
    const { fadt, dsdt } = tables()
    outb(Number(fadt.bytes.readBigUInt64LE(120)), fadt.bytes[128]!)
    const s5 = parseAml(dsdt.bytes.subarray(36)).find(([, name]) => name === '\\_S5_')!
    expect(s5).toEqual(['Name', '\\_S5_', [0, 0, 0, 0]])
    outw(fadt.bytes.readUInt32LE(64), ((s5[2] as number[])[0]! << 10) | 0x2000)
    expect(events).toEqual(['reset', 'off'])
    outb(0x70, fadt.bytes[108]!)
    expect(inb(0x71)).toBe(0x20)
  })

  it('list every vCPU once, by x2APIC entries from id 255 on', () => {
    fc.assert(
      fc.property(apicIds, (apicIds) => {
        const { bytes } = tables({ cpus: apicIds.length, apicIds }).madt
        expect([bytes.readUInt32LE(36), bytes.readUInt32LE(40)]).toEqual([0xfee0_0000, 1])
        const found = madtEntries(bytes).flatMap(({ type, bytes }) => {
          if (type === 0) return [{ type, id: bytes[3]!, uid: bytes[2]!, flags: bytes.readUInt32LE(4) }]
          if (type !== 9) return []
          return [
            { type, id: bytes.readUInt32LE(4), uid: bytes.readUInt32LE(12), flags: bytes.readUInt32LE(8) },
          ]
        })
        expect(found).toEqual(apicIds.map((id) => ({ type: id < 255 ? 0 : 9, id, uid: id, flags: 1 })))
      }),
      { numRuns: 30 },
    )
  })

  it('list the I/O APIC, the two interrupts that are not as on ISA, and NMI on LINT1 of all', () => {
    const others = (options: Partial<FirmwareTableOptions>) =>
      madtEntries(tables(options).madt.bytes)
        .filter(({ type }) => type !== 0 && type !== 9)
        .map(({ bytes }) => bytes.toString('hex'))
    const ioApic = (id: string) => `010c${id}000000c0fe00000000`
    const timer = '020a0000020000000000'
    const sci = '020a0009090000000d00'
    const nmi = '0406ff000001'
    expect(others({ cpus: 2 })).toEqual([ioApic('02'), timer, sci, nmi])
    expect(others({ cpus: 256 }), 'every 8-bit id is taken').toEqual([
      ioApic('00'),
      timer,
      sci,
      nmi,
      '0a0c0000ffffffff01000000',
    ])
    expect(others({ apicIds: [254] }), 'there is room below').toContain(ioApic('00'))
    const level = { ...NET, gsi: 10 }
    expect(others({ virtio: [BLK, level] }), 'a level is not as on ISA').toContain('020a000a0a0000000d00')
    expect(others({ virtio: [BLK, NET] }), 'an edge is; above 15 there is no ISA').toEqual([
      ioApic('01'),
      timer,
      sci,
      nmi,
    ])
  })

  it('describe the legacy devices at their ports and interrupts', () => {
    const [scope] = parseAml(tables().dsdt.bytes.subarray(36))
    expect(scope!.slice(0, 2)).toEqual(['Scope', '\\_SB_'])
    const found = devicesOf(tables().dsdt.bytes).map(({ _HID, _CRS }) => [
      eisaText(_HID!),
      ...resources(_CRS!).map((descriptor) => descriptor.toString('hex')),
    ])
    const keyboard = new KeyboardController({ onReset() {} })
    expect(keyboard.ports.map(({ base }) => base)).toEqual([0x60, 0x64])
    expect(found).toEqual([
      ['PNP0501', '4701f803f8030108', '221000', '7900'],
      ['PNP0B00', '4701700070000102', '220001', '7900'],
      ['PNP0303', '4701600060000101', '4701640064000101', '220200', '7900'],
    ])
  })

  it('lead to the VM generation ID: random, aligned, and no other address for more vCPUs and devices', () => {
    const placed = place()
    const { segments, generationId } = placed
    const [{ path, ADDR }] = generationsOf(tables().dsdt.bytes) as [AmlDevice]
    expect([path, ADDR]).toEqual(['VGEN', [generationId, 0]])
    expect(generationId % 8).toBe(0)
    const { bytes } = segments.find(({ address }) => address === generationId)!
    expect(bytes).toHaveLength(16)
    expect(lowMemory(place()).subarray(generationId, generationId + 16)).not.toEqual(Buffer.from(bytes))
    expect(place({ cpus: 200, virtio: [BLK, NET] }).generationId).toBe(generationId)
  })

  it('say what is to be done when it changes: the event that is raised then notifies the device', () => {
    const { dsdt, fadt } = tables()
    const pm = new AcpiPm({ onPowerOff() {} })
    const { inb } = guestWith(pm)
    new VmGeneration({ memory: guestMemory(), address: 0xe0000, acpiPm: pm }).renew()
    const gpe = Math.log2(inb(fadt.bytes.readUInt32LE(80)))
    const method = `_E${gpe.toString(16).padStart(2, '0').toUpperCase()}`
    expect(parseAml(dsdt.bytes.subarray(36))).toContainEqual([
      'Scope',
      '\\_GPE',
      [['Method', method, [['Notify', '\\_SB_.VGEN', 0x80]]]],
    ])
  })

  it('describe every virtio-mmio device', () => {
    fc.assert(
      fc.property(virtio, (virtio) => {
        const found = devicesOf(tables({ virtio }).dsdt.bytes).slice(3)
        expect(new Set(found.map(({ path }) => path)).size).toBe(virtio.length)
        expect(
          found.map(({ _HID, _UID, _CRS }) => {
            const [memory, interrupt, end, ...rest] = resources(_CRS!)
            expect([memory!.subarray(0, 4).toString('hex'), end!.toString('hex'), rest.length]).toEqual([
              '86090001',
              '7900',
              0,
            ])
            expect(interrupt!.subarray(0, 3).toString('hex')).toBe('890600')
            return {
              id: _HID,
              index: _UID,
              address: memory!.readUInt32LE(4),
              size: memory!.readUInt32LE(8),
              gsi: interrupt!.readUInt32LE(5),
              flags: interrupt![3],
            }
          }),
        ).toEqual(
          virtio.map(({ address, size, gsi, trigger }, index) => ({
            id: 'LNRO0005',
            index,
            address,
            size,
            gsi,
            // Consumer; edge; shared.
            flags:
              1 |
              (trigger === 'edge' ? 2 : 0) |
              (virtio.filter((other) => other.gsi === gsi).length > 1 ? 8 : 0),
          })),
        )
      }),
      { numRuns: 50 },
    )
  })
})

interface AmlDevice {
  readonly path: string
  readonly _HID?: AmlData
  readonly _CID?: AmlData
  readonly _UID?: AmlData
  readonly _CRS?: Buffer
  readonly ADDR?: AmlData
}

/** Found as Linux and Windows do. */
function generationsOf(dsdt: Buffer): AmlDevice[] {
  return allDevicesOf(dsdt).filter(({ _CID }) => _CID === 'VM_Gen_Counter')
}

/** All devices but that of the VM generation ID. */
function devicesOf(dsdt: Buffer): AmlDevice[] {
  return allDevicesOf(dsdt).filter(({ _CID }) => _CID === undefined)
}

function allDevicesOf(dsdt: Buffer): AmlDevice[] {
  const [scope] = parseAml(dsdt.subarray(36))
  return (scope![2] as ReturnType<typeof parseAml>).map(([operator, path, names]) => {
    expect(operator).toBe('Device')
    const objects = Object.fromEntries(
      (names as ReturnType<typeof parseAml>).map(([, name, data]) => [name, data]),
    )
    return { path: path as string, ...objects }
  })
}

describe('the MP table', () => {
  it('is found where an OS looks, and whole, for every number of vCPUs', () => {
    fc.assert(
      fc.property(apicIds, virtio, (apicIds, virtio) => {
        const placed = place({ cpus: apicIds.length, apicIds, virtio })
        const { pointer, pointerAddress, table, entries } = findMpTable(lowMemory(placed))
        expect(pointerAddress).toBe(placed.mpTable)
        expect([pointer[8], pointer[9], pointer[11], sum(pointer)]).toEqual([1, 4, 0, 0])
        expect([table.toString('latin1', 0, 4), table[6], sum(table)]).toEqual(['PCMP', 4, 0])
        expect([table.readUInt16LE(34), table.readUInt32LE(36)]).toEqual([entries.length, 0xfee0_0000])
        const types = entries.map((entry) => entry[0]!)
        expect(types).toEqual([...types].sort())
      }),
      { numRuns: 30 },
    )
  })

  it('lists the vCPUs that fit, the first as bootstrap processor', () => {
    const processors = mpTable({ cpus: 1024 }).ofType(0)
    expect(processors.map((entry) => entry[1])).toEqual(Array.from({ length: 255 }, (_, id) => id))
    expect(processors.map((entry) => entry[3])).toEqual([3, ...Array(254).fill(1)])
    expect(processors[0]!.readUInt32LE(8), 'FPU and APIC').toBe(0x201)
    const mixed = mpTable({ cpus: 3, apicIds: [7, 300, 2] }).ofType(0)
    expect(mixed.map((entry) => [entry[1], entry[3]])).toEqual([
      [7, 3],
      [2, 1],
    ])
  })

  it('has the ISA bus, the I/O APIC with the id that ACPI says, and its interrupts', () => {
    const { ofType } = mpTable({ cpus: 3, virtio: [BLK, NET] })
    expect(ofType(1).map((entry) => entry.toString('hex'))).toEqual(['0100495341202020'])
    expect(ofType(2).map((entry) => entry.toString('hex'))).toEqual(['020311010000c0fe'])
    const interrupts = ofType(3).map((entry) => ({
      type: entry[1],
      flags: entry.readUInt16LE(2),
      bus: entry[4],
      irq: entry[5],
      ioApic: entry[6],
      pin: entry[7],
    }))
    expect(interrupts).toEqual(
      [0, 1, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 17].map((irq) => ({
        type: 0,
        flags: irq === 9 || irq === 17 ? 0x0d : 0,
        bus: 0,
        irq,
        ioApic: 3,
        pin: irq === 0 ? 2 : irq,
      })),
    )
  })

  it('has ExtINT on LINT0 of the first vCPU and NMI on LINT1 of all', () => {
    expect(
      mpTable({ cpus: 2, apicIds: [4, 1] })
        .ofType(4)
        .map((entry) => entry.toString('hex')),
    ).toEqual(['0403000000000400', '040100000000ff01'])
    const bootstrapTooHigh = mpTable({ apicIds: [300] })
    expect(bootstrapTooHigh.ofType(4)[0]![6]).toBe(0xff)
  })
})

describe('their place', () => {
  it('holds 1024 vCPUs and a hundred devices, and even 4096 vCPUs', () => {
    const virtio = Array.from({ length: 100 }, (_, i) => ({ ...BLK, address: BLK.address + i * 0x1000 }))
    for (const options of [{ cpus: 1024, virtio }, { cpus: 4096 }]) {
      const { segments } = place(options)
      expect(segments[0]!.address).toBe(0xe0000)
      const last = segments.at(-1)!
      expect(last.address).toBeGreaterThanOrEqual(0xf0000)
      expect(last.address + last.size).toBeLessThanOrEqual(MIB)
    }
  })

  it('is where an OS looks first', () => {
    const { rsdp, mpTable } = place({ cpus: 4 })
    expect([rsdp, mpTable]).toEqual([0xe0000, 0xf0000])
  })

  it('needs RAM up to 1 MiB', () => {
    expect(place({ memorySize: MIB }).segments).toHaveLength(9)
    const error = errorOf(() => place({ memorySize: MIB - 4096 }))
    expect(error).toMatchObject({ code: 'ERR_BOOT_NO_ROOM', memorySize: MIB - 4096 })
    expect(error.message).toMatch(/at least 1 MiB, or do without \(firmwareTables: false\)$/)
  })

  it('has an end: too many vCPUs and devices get an error', () => {
    const error = errorOf(() => place({ cpus: 8192 }))
    expect(error).toMatchObject({ code: 'ERR_BOOT_NO_ROOM', cpus: 8192, virtio: 0 })
    expect(error.message).toMatch(
      /at most 131072 bytes but 8192 vCPUs and 0 virtio devices need \d{6}; use fewer/,
    )
    const many = Array.from({ length: 4096 }, () => BLK)
    expect(errorOf(() => place({ virtio: many }))).toMatchObject({ code: 'ERR_BOOT_NO_ROOM' })
    expect(errorOf(() => place({ virtio: [...many, BLK] }))).toMatchObject({ code: 'ERR_INVALID_ARGUMENT' })
  })

  it('may not be taken: the error names who took it and what to do', () => {
    const { segments } = place()
    const kernel = (address: number, size: number) => ({ name: 'kernel', address, size })
    for (const { address, size } of segments) {
      const free = [kernel(address - 1, 1), kernel(address + size, 1)].filter(
        (taken) => !segments.some((s) => s.address <= taken.address && taken.address < s.address + s.size),
      )
      for (const taken of free) expect(() => checkFirmwareRoom(place(), [taken])).not.toThrow()
      for (const taken of [kernel(address, 1), kernel(address + size - 1, 1), kernel(0, address + 1)]) {
        const error = errorOf(() => checkFirmwareRoom(place(), [kernel(MIB, MIB), taken]))
        expect(error).toMatchObject({ code: 'ERR_BOOT_NO_ROOM', segment: 'kernel', address: taken.address })
        expect(error.message).toMatch(
          /kernel takes .*; load it elsewhere, or do without \(firmwareTables: false\)$/,
        )
      }
    }
  })
})

describe('what they cannot describe is refused', () => {
  it.each([
    ['cpus', { cpus: 0 }],
    ['cpus', { cpus: 1.5 }],
    ['apicIds', { cpus: 2, apicIds: [0] }],
    ['apicIds', { cpus: 2, apicIds: [1, 1] }],
    ['apicIds', { apicIds: [-1] }],
    ['apicIds', { apicIds: [0xffff_ffff] }],
    ['virtio[0].address', { virtio: [{ ...BLK, address: 2 ** 32 }] }],
    ['virtio[0].address', { virtio: [{ ...BLK, address: -1 }] }],
    ['virtio[0].size', { virtio: [{ ...BLK, size: 0 }] }],
    ['virtio[1].size', { virtio: [NET, { ...BLK, address: 0xffff_ffff, size: 2 }] }],
    ['virtio[0].gsi', { virtio: [{ ...BLK, gsi: 24 }] }],
    ['virtio[0].gsi', { virtio: [{ ...BLK, gsi: -1 }] }],
    ...[0, 1, 2, 4, 8, 9].map((gsi) => ['virtio[0].gsi', { virtio: [{ ...BLK, gsi }] }] as const),
    ['virtio[1].trigger', { virtio: [BLK, { ...BLK, trigger: 'level' as const }] }],
    ['virtio[0].trigger', { virtio: [{ ...BLK, trigger: 'both' as 'edge' }] }],
  ] as const)('%s: %o', (argument, options) => {
    expect(errorOf(() => place(options as Partial<FirmwareTableOptions>))).toMatchObject({
      code: 'ERR_INVALID_ARGUMENT',
      argument,
    })
  })
})
