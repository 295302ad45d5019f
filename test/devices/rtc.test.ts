import fc from 'fast-check'
import { describe, expect, it } from 'vitest'
import { Rtc } from '../../src/devices/rtc.js'
import { CountingLine, FakeClock, guestWith, hostOf } from './guest.js'

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
    const { clock, get } = setUp({ time: NOON + 997 })
    expect(get(0x0a) & 0x80).toBe(0)
    expect(get(0)).toBe(0x59)
    clock.time += 2
    expect([get(2), get(0)]).toEqual([0x45, 0x59])
    clock.time += 10
    expect([get(2), get(0)]).toEqual([0x46, 0x00])
  })
})

it('UIP is set in the last milliseconds of each second, for guests that wait for it', () => {
  const { clock, get, set } = setUp({ time: NOON })
  const updating = () => (get(0x0a) & 0x80) !== 0
  const seen = Array.from({ length: 2000 }, () => {
    clock.time += 1
    return updating() ? clock.time % 1000 : undefined
  })
  expect(seen.filter((at) => at !== undefined)).toEqual([998, 999, 998, 999])
  // With SET there are no updates.
  set(0x0b, 0x82)
  clock.time += 998
  expect(updating()).toBe(false)
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

describe('interrupts', () => {
  const MS = 1e6
  const SECOND = 1e9
  const [IRQF, PF, AF, UF] = [0x80, 0x40, 0x20, 0x10] as const
  const [PIE, AIE, UIE] = [PF, AF, UF]
  const HOURS_24 = 0x02

  /** The guest's clock goes on with the machine's. */
  function setUpRunning(time = NOON) {
    const clock = new FakeClock()
    const start = clock.now()
    const device = new Rtc({ memorySize: MIB, now: () => time + Math.floor((clock.now() - start) / MS) })
    const line = new CountingLine()
    device.attach(hostOf({ interrupt: line, clock }))
    const guest = guestWith(device)
    const get = (register: number) => {
      guest.outb(0x70, register)
      return guest.inb(0x71)
    }
    const set = (register: number, value: number) => {
      guest.outb(0x70, register)
      guest.outb(0x71, value)
    }
    const flags = () => get(0x0c)
    const enable = (enables: number) => set(0x0b, HOURS_24 | enables)
    const alarm = (hours: number, minutes: number, seconds: number) => {
      set(5, hours)
      set(3, minutes)
      set(1, seconds)
    }
    /** Lets time pass as with a handler that reads register C, and counts its interrupts. */
    const serve = (nanoseconds: number) => {
      const before = line.count
      for (let passed = 0; passed < nanoseconds; passed += 50_000) {
        clock.advance(50_000)
        if (line.asserted) flags()
      }
      return line.count - before
    }
    return { device, clock, line, get, set, flags, enable, alarm, serve }
  }

  it('do not come unless they are enabled, but their flags tell', () => {
    const { clock, flags, line } = setUpRunning()
    flags()
    clock.advance(10 * MS)
    expect(flags()).toBe(PF)
    clock.advance(SECOND)
    expect([flags(), flags()]).toEqual([PF | UF, 0])
    expect(line.count).toBe(0)
  })

  it.each([
    ['periodic', PIE, PF, 10],
    ['update-ended', UIE, UF, 2000],
    ['alarm', AIE, AF, 2000],
  ])('%s: the line is up until register C was read', (_kind, enables, flag, ms) => {
    const { alarm, clock, enable, flags, line } = setUpRunning()
    alarm(0xff, 0xff, 0xff)
    flags()
    enable(enables)
    clock.advance(ms * MS)
    expect([line.asserted, line.count]).toEqual([true, 1])
    expect(flags() & (IRQF | flag)).toBe(IRQF | flag)
    expect([line.asserted, flags()]).toEqual([false, 0])
    clock.advance(ms * MS)
    expect([line.asserted, line.count]).toEqual([true, 2])
  })

  it.each([PIE, UIE, AIE])(
    'enabling one (%i) whose flag is set raises the line at once, disabling lowers it',
    (bit) => {
      const { alarm, clock, enable, line } = setUpRunning()
      alarm(0xff, 0xff, 0xff)
      clock.advance(2 * SECOND)
      enable(bit)
      expect(line.asserted).toBe(true)
      enable(0)
      expect(line.asserted).toBe(false)
    },
  )

  it.each([
    [1, 256],
    [2, 128],
    [3, 8192],
    [4, 4096],
    [6, 1024],
    [10, 64],
    [15, 2],
  ])('periodic: rate %i is %i Hz', (rate, hertz) => {
    const { enable, serve, set } = setUpRunning()
    enable(PIE)
    set(0x0a, 0x20 | rate)
    const seconds = hertz > 1000 ? 0.5 : 2
    const count = serve(seconds * SECOND)
    expect(Math.abs(count - seconds * hertz)).toBeLessThanOrEqual(1)
  })

  it('periodic: rate 0 is none, and a new rate counts from when it was set', () => {
    const { clock, enable, flags, line, set } = setUpRunning()
    set(0x0a, 0x20)
    flags()
    enable(PIE)
    clock.advance(10 * SECOND)
    expect([line.count, flags() & PF]).toEqual([0, 0])
    set(0x0a, 0x2f)
    clock.advance(499 * MS)
    expect(line.count).toBe(0)
    clock.advance(2 * MS)
    expect(line.count).toBe(1)
  })

  it('periodic: what had become due before the rate was changed is not forgotten', () => {
    const { clock, flags, set } = setUpRunning()
    flags()
    clock.advance(2 * MS)
    set(0x0a, 0x20)
    expect(flags()).toBe(PF)
  })

  it('update-ended: come as the second changes, also after a day without anybody looking', () => {
    const { clock, enable, flags, get, line } = setUpRunning(NOON + 300)
    clock.advance(86_400 * SECOND)
    flags()
    enable(UIE)
    clock.advance(699 * MS)
    expect(line.count).toBe(0)
    clock.advance(1 * MS)
    expect([line.count, get(0)]).toEqual([1, 0x00])
  })

  it('alarm: goes off at its time of day', () => {
    const { alarm, clock, enable, flags, get, line } = setUpRunning()
    alarm(0x13, 0x46, 0x05)
    flags()
    enable(AIE)
    clock.advance(5 * SECOND)
    expect(line.count).toBe(0)
    clock.advance(1 * SECOND)
    expect([line.count, get(0)]).toEqual([1, 0x05])
    flags()
    clock.advance(86_399 * SECOND)
    expect(line.count).toBe(1)
    clock.advance(1 * SECOND)
    expect(line.count).toBe(2)
  })

  it('alarm: parts from 0xc0 to 0xff agree with anything', () => {
    const { alarm, clock, enable, flags, line } = setUpRunning()
    alarm(0xc0, 0xff, 0x10)
    flags()
    enable(AIE)
    for (let i = 0; i < 120; i++) {
      clock.advance(SECOND)
      flags()
    }
    expect(line.count).toBe(2)
  })

  it('alarm: works in binary and with 12 hours', () => {
    const { alarm, clock, flags, line, set } = setUpRunning()
    set(0x0b, 0x04)
    alarm(0x80 | 2, 0, 0)
    flags()
    set(0x0b, 0x04 | AIE)
    clock.advance((14 * 60 + 1) * SECOND - 1 * MS)
    expect(line.count).toBe(0)
    clock.advance(1 * MS)
    expect(line.count).toBe(1)
  })

  it('alarm: is not that of a time which had passed when it was set', () => {
    const { alarm, clock, flags } = setUpRunning()
    clock.advance(3600 * SECOND)
    alarm(0x14, 0x00, 0x00)
    expect(flags() & AF).toBe(0)
  })

  it('alarm: of a time that passed unnoticed is told at the next look, in the format it was set in', () => {
    const { alarm, clock, flags, set } = setUpRunning()
    alarm(0x13, 0x50, 0x00)
    flags()
    clock.advance(3600 * SECOND)
    set(0x0b, 0x06)
    expect(flags() & AF).toBe(AF)
  })

  it('setting the time makes no alarm of the time in between', () => {
    const { alarm, clock, enable, flags, set } = setUpRunning()
    alarm(0x15, 0x00, 0x00)
    flags()
    enable(AIE)
    set(4, 0x16)
    clock.advance(10 * MS)
    expect(flags() & AF).toBe(0)
  })

  it('SET holds updates and alarms off, and clears the enable of the former', () => {
    const { alarm, clock, flags, get, line, set } = setUpRunning()
    alarm(0xff, 0xff, 0xff)
    flags()
    set(0x0b, 0x80 | UIE | AIE | HOURS_24)
    expect(get(0x0b)).toBe(0x80 | AIE | HOURS_24)
    clock.advance(10 * SECOND)
    expect([line.count, flags() & (AF | UF)]).toEqual([0, 0])
    set(0x0b, AIE | HOURS_24)
    clock.advance(2 * SECOND)
    expect(flags() & (AF | UF)).toBe(AF | UF)
  })

  it('of a state go on: the line is put where it was', () => {
    const { clock, device, enable } = setUpRunning()
    enable(PIE)
    clock.advance(10 * MS)
    const state = device.saveState()
    const copy = setUpRunning()
    copy.device.restoreState(structuredClone(state))
    expect([copy.line.asserted, copy.device.saveState()]).toEqual([true, state])
    expect(copy.flags()).toBe(IRQF | PF)
    copy.clock.advance(1 * MS)
    expect(copy.line.asserted).toBe(true)
  })

  it('of a state that has none lower the line', () => {
    const { clock, device, enable, line } = setUpRunning()
    const state = device.saveState()
    enable(PIE)
    clock.advance(10 * MS)
    device.restoreState(state)
    expect(line.asserted).toBe(false)
  })

  it('of any state and writes: the line is up exactly when a flag and its enable are', () => {
    const step = fc.oneof(
      fc.record({ register: fc.constantFrom(0, 1, 3, 4, 5, 0x0a, 0x0b, 0x0c), value: fc.nat(255) }),
      fc.record({ advance: fc.integer({ min: 1, max: 3 * SECOND }) }),
      fc.constant('read' as const),
    )
    fc.assert(
      fc.property(fc.array(step, { maxLength: 20 }), (steps) => {
        const { clock, device, flags, get, line, set } = setUpRunning()
        for (const next of steps) {
          if (next === 'read') flags()
          else if ('advance' in next) clock.advance(next.advance)
          else set(next.register, next.value)
          const { cmos } = device.saveState() as { cmos: Uint8Array }
          const pending = (cmos[0x0c]! & get(0x0b) & (PF | AF | UF)) !== 0
          expect([line.asserted, (cmos[0x0c]! & IRQF) !== 0]).toEqual([pending, pending])
        }
      }),
      { numRuns: 50 },
    )
  })
})
