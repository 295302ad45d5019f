import { expect, it } from 'vitest'
import { AcpiPm } from '../../src/devices/acpi-pm.js'
import { VmGeneration } from '../../src/devices/vm-generation.js'
import { errorOf } from '../helpers/images.js'
import { CountingLine, guestMemory, guestWith, hostOf } from './guest.js'

const ADDRESS = 0xe0030
const GPE_STATUS = 0x620
const GPE_ENABLE = 0x621
const GENERATION = 0x01

function setUp() {
  const memory = guestMemory()
  const acpiPm = new AcpiPm({ onPowerOff() {} })
  const line = new CountingLine()
  acpiPm.attach(hostOf({ memory, interrupt: line }))
  const generation = new VmGeneration({ memory, address: ADDRESS, acpiPm })
  return { memory, line, generation, ...guestWith(acpiPm) }
}

it('a new generation has an ID of its own, and nothing else in memory changes', () => {
  const { memory, generation } = setUp()
  memory.fill(0xe0000, 0x100, 0xaa)
  const ids = Array.from({ length: 5 }, () => {
    generation.renew()
    return Buffer.from(memory.read(ADDRESS, 16)).toString('hex')
  })
  expect(new Set(ids).size).toBe(5)
  expect(memory.read(0xe0000, 0x30).every((byte) => byte === 0xaa)).toBe(true)
  expect(memory.read(ADDRESS + 16, 0xc0).every((byte) => byte === 0xaa)).toBe(true)
})

it('the guest is interrupted when the new ID is there, once for each', () => {
  const { memory, line, generation, inb, outb } = setUp()
  const id = Uint8Array.from({ length: 16 }, (_, index) => index + 1)
  outb(GPE_ENABLE, GENERATION)
  const seen: Uint8Array[] = []
  line.setLevel = (asserted) => {
    if (asserted) seen.push(memory.read(ADDRESS, 16))
  }
  generation.renew(id)
  expect([seen, inb(GPE_STATUS)]).toEqual([[id], GENERATION])
  outb(GPE_STATUS, GENERATION)
  generation.renew()
  expect(seen).toHaveLength(2)
})

it('a guest that is not yet listening finds out later', () => {
  const { line, generation, inb, outb } = setUp()
  generation.renew()
  expect([line.asserted, inb(GPE_STATUS)]).toEqual([false, GENERATION])
  outb(GPE_ENABLE, GENERATION)
  expect(line.asserted).toBe(true)
})

it.each([0, 15, 17])('an ID of %d bytes is none, and changes nothing', (length) => {
  const { memory, generation, inb } = setUp()
  expect(errorOf(() => generation.renew(new Uint8Array(length).fill(1)))).toMatchObject({
    code: 'ERR_INVALID_ARGUMENT',
    argument: 'id',
  })
  expect([memory.read(ADDRESS, 17), inb(GPE_STATUS)]).toEqual([new Uint8Array(17), 0])
})
