import fc from 'fast-check'
import { describe, expect, it } from 'vitest'
import { AcpiPm } from '../../src/devices/acpi-pm.js'
import { CountingLine, FakeClock, guestWith, hostOf } from './guest.js'

const STATUS = 0x600
const ENABLE = 0x602
const CONTROL = 0x604
const TIMER = 0x608
const GPE_STATUS = 0x620
const GPE_ENABLE = 0x621
const TMR = 0x0001
const PWRBTN = 0x0100
const SECOND = 1e9
const HZ = 3_579_545
/** A little more than the timer takes until its most significant bit changes, in ns. */
const HALF_WRAP = Math.ceil((2 ** 31 * SECOND) / HZ)

function setUp() {
  let offs = 0
  const device = new AcpiPm({ onPowerOff: () => offs++ })
  const line = new CountingLine()
  const clock = new FakeClock()
  device.attach(hostOf({ interrupt: line, clock }))
  return { device, line, clock, offs: () => offs, ...guestWith(device) }
}

function restored(from: AcpiPm) {
  const copy = setUp()
  copy.device.restoreState(structuredClone(from.saveState()))
  return copy
}

describe('soft-off', () => {
  it('happens as small kernels ask for it', () => {
    const { offs, outw } = setUp()
    outw(CONTROL, 0x2000)
    expect(offs()).toBe(1)
  })

  it('happens with every SLP_TYP, and never without SLP_EN', () => {
    const { offs, outw } = setUp()
    for (let type = 0; type < 8; type++) outw(CONTROL, 0x2000 | (type << 10))
    expect(offs()).toBe(8)
    outw(CONTROL, 0xdfff)
    expect(offs()).toBe(8)
  })

  it('10: byte and wider accesses reach the same bits', () => {
    const { offs, outb, outl, outw } = setUp()
    outb(CONTROL, 0xff)
    outw(CONTROL + 1, 0x20df)
    expect(offs()).toBe(0)
    outb(CONTROL + 1, 0x20)
    outl(CONTROL, 0x0000_2000)
    outl(CONTROL - 2, 0x2000_0000)
    outw(CONTROL - 1, 0x2000)
    expect(offs(), 'the last one only touches the low byte').toBe(3)
  })

  it('PM1 control reads back what is kept, with SCI_EN always set: there is no hand-over', () => {
    const { inb, inl, inw, outb, outw } = setUp()
    expect(inw(CONTROL)).toBe(0x0001)
    outw(CONTROL, 0xffff & ~0x2000)
    expect([inw(CONTROL), inb(CONTROL), inb(CONTROL + 1)]).toEqual([0x1c03, 0x03, 0x1c])
    outb(CONTROL + 1, 0x04)
    expect(inw(CONTROL)).toBe(0x0403)
    expect(inl(CONTROL), 'the ports behind it are free').toBe(0xffff_0403)
    outw(CONTROL, 0)
    expect(inw(CONTROL)).toBe(0x0001)
  })
})

describe('the power button', () => {
  it('raises the SCI until the guest clears its status', () => {
    const { device, line, inw, outw } = setUp()
    outw(ENABLE, PWRBTN)
    expect(line.asserted).toBe(false)
    device.pressPowerButton()
    expect([line.asserted, inw(STATUS)]).toEqual([true, PWRBTN])
    outw(STATUS, 0)
    outw(STATUS, 0xffff & ~PWRBTN)
    expect(line.asserted, 'only a 1 clears').toBe(true)
    outw(STATUS, PWRBTN)
    expect([line.asserted, inw(STATUS), inw(ENABLE)]).toEqual([false, 0, PWRBTN])
  })

  it('waits for a guest that enables it later', () => {
    const { device, line, inw, outb } = setUp()
    device.pressPowerButton()
    expect([line.asserted, inw(STATUS)]).toEqual([false, PWRBTN])
    outb(ENABLE + 1, PWRBTN >> 8)
    expect(line.asserted).toBe(true)
    outb(ENABLE + 1, 0)
    expect(line.asserted).toBe(false)
  })

  it('is one interrupt, however often it is pressed before the guest serves it', () => {
    const { device, line, outw } = setUp()
    outw(ENABLE, PWRBTN)
    for (let i = 0; i < 5; i++) device.pressPowerButton()
    expect(line.count).toBe(1)
    outw(STATUS, PWRBTN)
    device.pressPowerButton()
    expect(line.count).toBe(2)
  })

  it('status and enable are one register of four bytes to a wide access', () => {
    const { device, inl, outl } = setUp()
    outl(STATUS, PWRBTN * 0x1_0000)
    device.pressPowerButton()
    expect(inl(STATUS)).toBe(0x0100_0100)
    outl(STATUS, 0xffff_ffff)
    expect(inl(STATUS), 'enables: timer, global lock, power button').toBe(0x0121_0000)
  })

  it('survives a snapshot, pressed and enabled, with the line up', () => {
    const { device, outw } = setUp()
    outw(ENABLE, PWRBTN)
    outw(CONTROL, 0x0400)
    device.pressPowerButton()
    const copy = restored(device)
    expect(copy.line.asserted).toBe(true)
    expect([copy.inw(STATUS), copy.inw(ENABLE), copy.inw(CONTROL)]).toEqual([PWRBTN, PWRBTN, 0x0401])
    for (const key of ['status', 'enable', 'control', 'timer', 'gpeStatus', 'gpeEnable']) {
      const state = { ...(device.saveState() as object), [key]: 2 ** 32 }
      expect(() => copy.device.restoreState(state)).toThrow(`${key} of the state of acpi-pm`)
    }
    const state = {
      status: 0xffff,
      enable: 0xffff,
      control: 0xffff,
      timer: 0,
      gpeStatus: 0,
      gpeEnable: 0,
    }
    copy.device.restoreState(state)
    expect(copy.inl(STATUS), 'only bits that a guest could have set').toBe(0x0121_0101)
    expect(copy.inw(CONTROL)).toBe(0x1c03)
  })
})

describe('general-purpose events', () => {
  it('raise the SCI until the guest clears their status', () => {
    const { device, line, inb, outb } = setUp()
    outb(GPE_ENABLE, 0x01)
    device.raiseGpe(0)
    expect([line.asserted, inb(GPE_STATUS), inb(GPE_ENABLE)]).toEqual([true, 0x01, 0x01])
    outb(GPE_STATUS, 0xfe)
    expect(line.asserted, 'only a 1 clears').toBe(true)
    outb(GPE_STATUS, 0x01)
    expect([line.asserted, inb(GPE_STATUS), inb(GPE_ENABLE)]).toEqual([false, 0, 0x01])
    device.raiseGpe(0)
    expect(line.count).toBe(2)
  })

  it('wait for a guest that enables them later, each by its own bit', () => {
    const { device, line, inb, outb } = setUp()
    device.raiseGpe(0)
    device.raiseGpe(7)
    outb(GPE_ENABLE, 0x7e)
    expect([line.asserted, inb(GPE_STATUS)]).toEqual([false, 0x81])
    outb(GPE_ENABLE, 0x80)
    expect(line.asserted).toBe(true)
    outb(GPE_STATUS, 0x80)
    expect([line.asserted, inb(GPE_STATUS)]).toEqual([false, 0x01])
  })

  it('share the SCI with the power button: it is up until both are served', () => {
    const { device, line, outb, outw } = setUp()
    outw(ENABLE, PWRBTN)
    outb(GPE_ENABLE, 0x01)
    device.raiseGpe(0)
    device.pressPowerButton()
    outw(STATUS, PWRBTN)
    expect(line.asserted).toBe(true)
    outb(GPE_STATUS, 0x01)
    expect([line.asserted, line.count]).toEqual([false, 1])
  })

  it('have a register of two bytes to a wide access', () => {
    const { device, inl, inw, outw } = setUp()
    outw(GPE_STATUS, 0x0100)
    device.raiseGpe(0)
    expect(inw(GPE_STATUS)).toBe(0x0101)
    expect(inl(GPE_STATUS), 'the ports behind it are free').toBe(0xffff_0101)
    outw(GPE_STATUS, 0x0001)
    expect(inw(GPE_STATUS)).toBe(0)
  })

  it('survive a snapshot, raised and enabled, with the line up', () => {
    const { device, outb } = setUp()
    outb(GPE_ENABLE, 0x03)
    device.raiseGpe(1)
    const copy = restored(device)
    expect([copy.line.asserted, copy.inb(GPE_STATUS), copy.inb(GPE_ENABLE)]).toEqual([true, 0x02, 0x03])
  })
})

describe('the power management timer', () => {
  it('begins at 0 and counts 3579545 times a second', () => {
    const { clock, inl } = setUp()
    expect(inl(TIMER)).toBe(0)
    clock.advance(SECOND)
    expect(inl(TIMER)).toBe(HZ)
    clock.advance(1000)
    expect(inl(TIMER)).toBe(HZ + 3)
  })

  it('has 32 bits and begins again after the last', () => {
    const { clock, inl } = setUp()
    clock.advance(2 * HALF_WRAP)
    expect(inl(TIMER)).toBeLessThan(8)
    clock.advance(1000 * SECOND)
    expect(inl(TIMER)).toBeGreaterThanOrEqual(1000 * HZ)
  })

  it('never goes back, and is where the clock is, however time passes', () => {
    fc.assert(
      fc.property(fc.array(fc.integer({ min: 0, max: 1e9 })), (steps) => {
        const { clock, inl } = setUp()
        let [last, total] = [0, 0]
        for (const step of steps) {
          clock.advance(step)
          total += step
          const value = inl(TIMER)
          expect(value).toBeGreaterThanOrEqual(last)
          expect(Math.abs(value - (total * HZ) / SECOND)).toBeLessThanOrEqual(1)
          last = value
        }
      }),
    )
  })

  it('ignores writes, and reads byte by byte', () => {
    const { clock, inb, inw, outl } = setUp()
    clock.advance(1000 * SECOND)
    outl(TIMER, 0)
    const bytes = [0, 1, 2, 3].map((offset) => inb(TIMER + offset))
    expect(Buffer.from(bytes).readUInt32LE()).toBe(1000 * HZ)
    expect(inw(TIMER + 2)).toBe((1000 * HZ) >>> 16)
  })

  it('goes on in a snapshot where it was, whatever the new clock says', () => {
    const { device, clock } = setUp()
    clock.advance(123_456_789)
    const ticks = guestWith(device).inl(TIMER)
    const copy = restored(device)
    expect(copy.inl(TIMER)).toBe(ticks)
    copy.clock.advance(SECOND)
    expect(copy.inl(TIMER)).toBe(ticks + HZ)
  })

  it('interrupts at each change of its highest bit, once that is enabled', () => {
    const { clock, line, inw, outw } = setUp()
    outw(ENABLE, TMR)
    clock.advance(HALF_WRAP - 1000)
    expect([line.count, inw(STATUS)]).toEqual([0, 0])
    clock.advance(2000)
    expect([line.asserted, inw(STATUS)]).toEqual([true, TMR])
    outw(STATUS, TMR)
    expect([line.asserted, inw(STATUS)]).toEqual([false, 0])
    clock.advance(HALF_WRAP)
    expect([line.count, inw(STATUS)]).toEqual([2, TMR])
  })

  it('tells of the change without being enabled, also in a snapshot', () => {
    const { device, clock, line, inw } = setUp()
    clock.advance(HALF_WRAP)
    expect([inw(STATUS), line.count]).toEqual([TMR, 0])
    const copy = restored(device)
    expect(copy.inw(STATUS)).toBe(TMR)
    copy.outw(STATUS, TMR)
    expect(copy.inw(STATUS)).toBe(0)
  })
})
