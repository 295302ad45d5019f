import fc from 'fast-check'
import { describe, expect, it } from 'vitest'
import { Rtc } from '../../src/devices/rtc.js'
import { guestWith } from './guest.js'

const KIB = 1024
const MIB = 1024 * KIB
const GIB = 1024 * MIB
/** A Thursday. */
const NOON = Date.UTC(2024, 1, 29, 13, 45, 59)

function setUp({ time = NOON, memorySize = 128 * MIB } = {}) {
  const clock = { time }
  const device = new Rtc({ memorySize, now: () => clock.time })
  const guest = guestWith(device)
  const get = (register: number) => {
    guest.outb(0x70, register)
    return guest.inb(0x71)
  }
  const set = (register: number, value: number) => {
    guest.outb(0x70, register)
    guest.outb(0x71, value)
  }
  const read = () => [0x32, 9, 8, 7, 4, 2, 0, 6].map(get)
  return { device, clock, get, set, read, ...guest }
}

describe('time', () => {
  it('is BCD and of 24 hours from the start', () => {
    const { get, read } = setUp()
    expect(read()).toEqual([0x20, 0x24, 0x02, 0x29, 0x13, 0x45, 0x59, 5])
    expect(get(0x0b)).toBe(0x02)
  })

  it('is binary when register B says so', () => {
    const { set, read } = setUp()
    set(0x0b, 0x06)
    expect(read()).toEqual([20, 24, 2, 29, 13, 45, 59, 5])
  })

  it.each([
    [0, 0x12, 12],
    [1, 0x01, 1],
    [11, 0x11, 11],
    [12, 0x92, 0x8c],
    [13, 0x81, 0x81],
    [23, 0x91, 0x8b],
  ])('of 12 hours shows %i h as %i (BCD) and %i (binary)', (hour, bcd, binary) => {
    const { get, set } = setUp({ time: Date.UTC(2024, 0, 1, hour) })
    set(0x0b, 0x00)
    expect(get(4)).toBe(bcd)
    set(0x0b, 0x04)
    expect(get(4)).toBe(binary)
  })

  it('goes on with the clock of the host', () => {
    const { clock, read } = setUp()
    clock.time += 1000
    expect(read().slice(4, 7)).toEqual([0x13, 0x46, 0x00])
    clock.time += 11 * 3600_000
    expect(read()).toEqual([0x20, 0x24, 0x03, 0x01, 0x00, 0x46, 0x00, 6])
  })

  it('stands still shortly after UIP was seen clear, so that the registers belong together', () => {
    const { clock, get } = setUp({ time: NOON + 999 })
    expect(get(0x0a) & 0x80).toBe(0)
    expect(get(0)).toBe(0x59)
    clock.time += 1
    expect([get(2), get(0)]).toEqual([0x45, 0x59])
    clock.time += 10
    expect([get(2), get(0)]).toEqual([0x46, 0x00])
  })
})

describe('setting the time', () => {
  it('as drivers do: SET, the registers, go', () => {
    const { clock, get, set, read } = setUp()
    set(0x0b, get(0x0b) | 0x80)
    const values: [number, number][] = [
      [0x32, 0x19],
      [9, 0x99],
      [8, 0x12],
      [7, 0x31],
      [4, 0x23],
      [2, 0x59],
      [0, 0x58],
    ]
    for (const [register, value] of values) set(register, value)
    clock.time += 5000
    expect(get(0), 'it stands still while SET is 1').toBe(0x58)
    set(0x0b, 0x02)
    expect(read()).toEqual([0x19, 0x99, 0x12, 0x31, 0x23, 0x59, 0x58, 6])
    clock.time += 2000
    expect(read()).toEqual([0x20, 0x00, 0x01, 0x01, 0x00, 0x00, 0x00, 7])
  })

  it('what is not set stays', () => {
    const { set, read } = setUp()
    set(0x0b, 0x82)
    set(2, 0x10)
    set(0x0b, 0x02)
    expect(read()).toEqual([0x20, 0x24, 0x02, 0x29, 0x13, 0x10, 0x59, 5])
  })

  it('without SET a register takes effect at once', () => {
    const { clock, get, set } = setUp()
    set(4, 0x07)
    clock.time += 1000
    expect([get(4), get(2), get(0)]).toEqual([0x07, 0x46, 0x00])
  })

  it('in 12 hours, PM', () => {
    const { get, set } = setUp()
    set(0x0b, 0x80)
    set(4, 0x80 | 0x11)
    set(0x0b, 0x00)
    set(0x0b, 0x02)
    expect(get(4)).toBe(0x23)
  })

  it('of the guest does not touch the host, and years before 1970 work', () => {
    const { get, set } = setUp()
    set(0x32, 0x00)
    set(9, 0x01)
    expect([get(0x32), get(9)]).toEqual([0x00, 0x01])
  })
})

describe('other registers', () => {
  it('A keeps all but UIP, C reads as 0, D says that the RAM is valid', () => {
    const { get, set } = setUp()
    expect([0x0a, 0x0c, 0x0d].map(get)).toEqual([0x26, 0, 0x80])
    for (const register of [0x0a, 0x0c, 0x0d]) set(register, 0xff)
    expect([0x0a, 0x0c, 0x0d].map(get)).toEqual([0x7f, 0, 0x80])
  })

  it('alarms are stored', () => {
    const { get, set } = setUp()
    for (const register of [1, 3, 5]) set(register, 0xc0 + register)
    expect([1, 3, 5].map(get)).toEqual([0xc1, 0xc3, 0xc5])
  })

  it('the rest of the 128 bytes is memory', () => {
    const { get, set } = setUp()
    for (let i = 0x0e; i < 0x80; i++) if (i !== 0x32) set(i, i ^ 0x5a)
    for (let i = 0x0e; i < 0x80; i++) if (i !== 0x32) expect(get(i)).toBe(i ^ 0x5a)
  })

  it('bit 7 of the index masks the NMI and is not part of it; the index cannot be read', () => {
    const { device, get, inb } = setUp()
    expect(get(0x8d)).toBe(0x80)
    expect([device.nmiDisabled, inb(0x70)]).toEqual([true, 0xff])
    get(0x0d)
    expect(device.nmiDisabled).toBe(false)
  })

  it('10: one 16-bit write is index and data', () => {
    const { get, outw } = setUp()
    outw(0x70, 0x7735)
    expect(get(0x35)).toBe(0x77)
  })

  it.each([
    [512 * KIB, { 21: 512, 23: 0, 48: 0, 52: 0, 91: 0 }],
    [1 * MIB, { 21: 640, 23: 0, 48: 0, 52: 0, 91: 0 }],
    [16 * MIB, { 21: 640, 23: 15 * KIB, 48: 15 * KIB, 52: 0, 91: 0 }],
    [128 * MIB, { 21: 640, 23: 0xffff, 48: 0xffff, 52: 112 * 16, 91: 0 }],
    [3 * GIB, { 21: 640, 23: 0xffff, 48: 0xffff, 52: 3056 * 16, 91: 0 }],
    [8 * GIB, { 21: 640, 23: 0xffff, 48: 0xffff, 52: 3056 * 16, 91: 5 * KIB * 16 }],
  ])('tell the memory size: %i bytes', (memorySize, expected) => {
    const { get } = setUp({ memorySize })
    for (const [register, value] of Object.entries(expected)) {
      expect(get(+register) | (get(+register + 1) << 8), `register ${register}`).toBe(value & 0xffff)
    }
    expect(get(0x5d)).toBe(expected[0x5b] >> 16)
  })
})

describe('state', () => {
  it('comes back exactly, and the clock goes on where the guest set it', () => {
    const { device, clock, set } = setUp()
    set(9, 0x30)
    set(0x40, 0x99)
    set(0x0b, 0x06)
    const state = device.saveState()
    const copy = setUp({ time: clock.time })
    copy.device.restoreState(structuredClone(state))
    expect(copy.device.saveState()).toEqual(state)
    expect(copy.get(9)).toBe(30)
    expect(copy.get(0x40)).toBe(0x99)
  })

  it('29: a state that it cannot have is refused', () => {
    const { device } = setUp()
    const state = device.saveState() as object
    for (const change of [
      { offset: 1e300 },
      { offset: Number.NaN },
      { cmos: new Uint8Array(127) },
      { index: 128 },
    ]) {
      expect(() => device.restoreState({ ...state, ...change })).toThrow(Object.keys(change)[0])
    }
  })

  it('29: with an offset beyond the end of time reads still give bytes', () => {
    const { device, read } = setUp()
    device.restoreState({ ...(device.saveState() as object), offset: 8_640_000_000_000_000 })
    for (const value of read()) expect(value).toBeLessThan(256)
  })
})

describe('hostile guests', () => {
  it('any values in the clock registers leave a clock that can be read and set', () => {
    const writes = fc.array(fc.tuple(fc.constantFrom(0, 2, 4, 6, 7, 8, 9, 0x32, 0x0b), fc.nat(255)), {
      maxLength: 30,
    })
    fc.assert(
      fc.property(writes, (sequence) => {
        const { get, set, read } = setUp()
        for (const [register, value] of sequence) {
          set(register, value)
          for (const byte of read()) expect(byte >= 0 && byte <= 255 && Number.isInteger(byte)).toBe(true)
        }
        set(0x0b, 0x82)
        const time: [number, number][] = [
          [0x32, 0x20],
          [9, 0x24],
          [8, 0x02],
          [7, 0x29],
          [4, 0x13],
          [2, 0x45],
          [0, 0x59],
        ]
        for (const [register, value] of time) set(register, value)
        set(0x0b, 0x02)
        expect(read()).toEqual([0x20, 0x24, 0x02, 0x29, 0x13, 0x45, 0x59, 5])
        expect(get(0x0d)).toBe(0x80)
      }),
    )
  })

  it('every time that a guest sets is the time it then reads, in every format', () => {
    fc.assert(
      fc.property(
        fc.date({ min: new Date(0), max: new Date(Date.UTC(9999, 11, 31)), noInvalidDate: true }),
        fc.constantFrom(0, 2, 4, 6),
        (date, format) => {
          const source = setUp({ time: Math.floor(date.getTime() / 1000) * 1000 })
          source.set(0x0b, format)
          const target = setUp()
          target.set(0x0b, 0x80 | format)
          for (const register of [0, 2, 4, 7, 8, 9, 0x32]) target.set(register, source.get(register))
          target.set(0x0b, format)
          expect(target.read()).toEqual(source.read())
        },
      ),
    )
  })
})
