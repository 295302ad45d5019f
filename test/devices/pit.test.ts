import fc from 'fast-check'
import { describe, expect, it } from 'vitest'
import { Pit } from '../../src/devices/pit.js'
import { CountingLine, FakeClock, guestWith, hostOf } from './guest.js'

const [COUNTER_0, COUNTER_1, CONTROL, PORT_B] = [0x40, 0x41, 0x43, 0x61] as const
const GATE_2 = 0x01
const OUT_2 = 0x20
/** ns; the clock of a PC is 315/22 MHz, of which this is a twelfth. */
const TICK = 1e9 / (315e6 / 22 / 12)
const MS = 1e6
const SECOND = 1e9

/** A control word: low byte, then high byte. */
const word = (counter: number, mode: number, bcd = false) => (counter << 6) | 0x30 | (mode << 1) | Number(bcd)
const latch = (counter: number) => counter << 6
/** Status and count of one counter. */
const readBack = (counter: number) => 0xc0 | (2 << counter)

function setUp() {
  const device = new Pit()
  const line = new CountingLine()
  const clock = new FakeClock()
  device.attach(hostOf({ interrupt: line, clock }))
  const guest = guestWith(device)
  const { inb, outb } = guest
  let ticks = 0
  let passed = 0
  /** Lets ticks pass since a count was written or the gate moved, and a little: rounding loses none. */
  const tick = (count = 1) => {
    ticks += count
    const time = Math.ceil(ticks * TICK) + 1
    clock.advance(time - passed)
    passed = time
  }
  const sync = () => {
    ticks = 0
    passed = 0
  }
  const write = (counter: number, count: number) => {
    sync()
    outb(COUNTER_0 + counter, count & 0xff)
    outb(COUNTER_0 + counter, count >> 8)
  }
  const program = (counter: number, mode: number, count: number, bcd = false) => {
    outb(CONTROL, word(counter, mode, bcd))
    write(counter, count)
  }
  const read = (counter: number) => inb(COUNTER_0 + counter) | (inb(COUNTER_0 + counter) << 8)
  const count = (counter: number) => {
    outb(CONTROL, latch(counter))
    return read(counter)
  }
  const status = (counter: number) => {
    outb(CONTROL, 0xe0 | (2 << counter))
    return inb(COUNTER_0 + counter)
  }
  const out = (counter: number) => (status(counter) & 0x80) !== 0
  const gate = (up: boolean) => {
    sync()
    outb(PORT_B, up ? GATE_2 : 0)
  }
  return { device, line, clock, tick, write, program, read, count, status, out, gate, ...guest }
}

type Machine = ReturnType<typeof setUp>

/** What the data sheet says of each mode, tick by tick: the counting element, and OUT. */
function* counting(mode: number, initial: number, modulus: number) {
  let count = initial
  let out = mode !== 0
  if (mode === 1) out = false
  if (mode === 3 && initial % 2 === 1) count--
  for (let strobed = false; ; ) {
    yield { count: count % modulus, out }
    if (mode === 2) {
      count = count === 1 ? initial : count - 1
      out = count !== 1
    } else if (mode === 3) {
      const isOdd = initial % 2 === 1
      // The high half of an odd count takes one tick more: 0 is counted, too.
      const last = isOdd && out ? 0 : 2
      if (count === last) {
        count = initial - Number(isOdd)
        out = !out
      } else count -= 2
    } else {
      count = (count + modulus - 1) % modulus
      if (mode < 2) out ||= count === 0
      else out = count !== 0 || strobed
      strobed ||= count === 0
    }
  }
}

const toBcd = (value: number) => Number.parseInt(String(value), 16)

describe('counters', () => {
  it.each([0, 2, 3, 4])('count as the data sheet says, in mode %i', (mode) => {
    fc.assert(
      fc.property(fc.integer({ min: 2, max: 60 }), fc.boolean(), (initial, bcd) => {
        const { count, out, program, tick } = setUp()
        program(1, mode, bcd ? toBcd(initial) : initial, bcd)
        const model = counting(mode, initial, bcd ? 10_000 : 0x1_0000)
        for (let i = 0; i < 200; i++) {
          const expected = model.next().value!
          expect([count(1), out(1)], `tick ${i}`).toEqual([
            bcd ? toBcd(expected.count) : expected.count,
            expected.out,
          ])
          tick()
        }
      }),
      { numRuns: 30 },
    )
  })

  it.each([1, 5])('count from a rising gate on as the data sheet says, in mode %i', (mode) => {
    const { count, gate, out, program, tick } = setUp()
    program(2, mode, 5)
    tick(10)
    expect(out(2), 'not triggered').toBe(true)
    gate(true)
    const model = counting(mode, 5, 0x1_0000)
    for (let i = 0; i < 20; i++) {
      const expected = model.next().value!
      expect([count(2), out(2)], `tick ${i}`).toEqual([expected.count, expected.out])
      // The level of the gate is nothing to them.
      if (i === 2) gate(false)
      tick()
    }
  })

  it('count by a direct formula after any time', () => {
    fc.assert(
      fc.property(
        fc.constantFrom(0, 2, 3, 4),
        fc.integer({ min: 2, max: 0x1_0000 }),
        fc.nat(10_000_000),
        (mode, initial, ticks) => {
          const { count, program, tick } = setUp()
          program(1, mode, initial & 0xffff)
          tick(ticks)
          const rest = ticks % initial
          const high = Math.ceil(initial / 2)
          const expected = {
            0: initial - ticks,
            2: initial - rest,
            3: 2 * (Math.floor(initial / 2) - (rest < high ? rest : rest - high)),
            4: initial - ticks,
          }[mode]!
          expect(count(1)).toBe(((expected % 0x1_0000) + 0x1_0000) % 0x1_0000)
        },
      ),
    )
  })

  it('0 is the largest count', () => {
    const { count, program, tick } = setUp()
    program(1, 2, 0)
    tick(0x1_0000 - 1)
    expect(count(1)).toBe(1)
    tick()
    expect(count(1)).toBe(0)
    program(1, 2, 0, true)
    tick()
    expect(count(1)).toBe(0x9999)
  })

  it('modes 6 and 7 are 2 and 3', () => {
    const { outb, status } = setUp()
    outb(CONTROL, word(1, 6))
    expect(status(1) & 0x0e).toBe(4)
    outb(CONTROL, word(1, 7))
    expect(status(1) & 0x0e).toBe(6)
  })

  it('one byte alone sets the other to 0', () => {
    const { count, inb, outb, tick } = setUp()
    outb(CONTROL, 0x54) // counter 1, low byte, mode 2
    outb(COUNTER_1, 0x12)
    expect([inb(COUNTER_1), inb(COUNTER_1)]).toEqual([0x12, 0x12])
    outb(CONTROL, 0x64) // high byte
    outb(COUNTER_1, 0x12)
    tick()
    expect(inb(COUNTER_1)).toBe(0x11)
    outb(CONTROL, word(1, 2))
    expect(count(1), 'nothing was written').toBe(0)
  })

  it('writing the first byte stops mode 0 and lowers OUT', () => {
    const { out, outb, program, tick, write } = setUp()
    program(1, 0, 10)
    tick(20)
    expect(out(1)).toBe(true)
    outb(COUNTER_1, 5)
    tick(20)
    expect(out(1)).toBe(false)
    outb(COUNTER_1, 0)
    tick(5)
    expect(out(1)).toBe(true)
    write(1, 3)
    expect(out(1)).toBe(false)
  })
})

describe('the gate of counter 2', () => {
  it.each([0, 4])('holds the count while it is down, in mode %i', (mode) => {
    const { count, gate, program, tick } = setUp()
    program(2, mode, 100)
    tick(10)
    expect(count(2)).toBe(100)
    gate(true)
    tick(30)
    gate(false)
    tick(1000)
    expect(count(2)).toBe(70)
    gate(true)
    tick(20)
    expect(count(2)).toBe(50)
  })

  it.each([2, 3])(
    'starts the count again as it rises, and holds OUT up while it is down, in mode %i',
    (mode) => {
      const { count, gate, out, program, tick } = setUp()
      gate(true)
      program(2, mode, 100)
      tick(99)
      expect(out(2)).toBe(false)
      gate(false)
      expect(out(2)).toBe(true)
      tick(7)
      gate(true)
      expect(count(2)).toBe(100)
      tick(2)
      expect(count(2)).toBe(mode === 2 ? 98 : 96)
    },
  )

  it('loads what was written during a one-shot only when it rises again', () => {
    const { count, gate, out, program, status, tick, write } = setUp()
    program(2, 1, 100)
    gate(true)
    tick(10)
    write(2, 50)
    expect([count(2), status(2) & 0x40], 'null count').toEqual([90, 0x40])
    tick(90)
    expect(out(2)).toBe(true)
    gate(false)
    gate(true)
    expect([count(2), status(2) & 0x40, out(2)]).toEqual([50, 0, false])
  })
})

describe('reading', () => {
  it('a latched count stays until both bytes were read, and is not latched twice', () => {
    const { count, outb, program, read, tick } = setUp()
    program(1, 2, 0x1234)
    outb(CONTROL, latch(1))
    tick(0x100)
    outb(CONTROL, latch(1))
    expect(read(1)).toBe(0x1234)
    expect(read(1)).toBe(0x1134)
    expect(count(1)).toBe(0x1134)
  })

  it('without a latch goes byte by byte, low and high in turn', () => {
    const { inb, program, tick } = setUp()
    program(1, 2, 0x1234)
    expect(inb(COUNTER_1)).toBe(0x34)
    tick(0x100)
    expect([inb(COUNTER_1), inb(COUNTER_1)]).toEqual([0x11, 0x34])
  })

  it('read-back gives the status first, then the count; of several counters at once', () => {
    const { outb, program, inb, read, tick } = setUp()
    program(0, 2, 0x2000)
    program(1, 3, 0x1000, true)
    outb(CONTROL, readBack(0) | readBack(1))
    tick(100)
    expect([inb(COUNTER_0), read(0)]).toEqual([0xb4, 0x2000])
    expect([inb(COUNTER_1), read(1)]).toEqual([0xb7, 0x1000])
    expect(read(0)).toBe(0x2000 - 100)
    outb(CONTROL, 0xd2) // count of counter 0 alone
    expect(read(0)).toBe(0x2000 - 100)
  })

  it('a status is not latched twice', () => {
    const { inb, outb, program, tick } = setUp()
    program(1, 0, 5)
    outb(CONTROL, 0xe4)
    tick(10)
    outb(CONTROL, 0xe4)
    expect(inb(COUNTER_1)).toBe(0x30)
  })

  it('the status tells of a count that was not written yet', () => {
    const { outb, status, write } = setUp()
    outb(CONTROL, word(1, 2))
    expect(status(1)).toBe(0xf4)
    write(1, 5)
    expect(status(1)).toBe(0xb4)
  })

  it('a control word forgets what was latched or half written', () => {
    const { count, outb, program, read, write } = setUp()
    program(1, 2, 0x1234)
    outb(CONTROL, readBack(1))
    outb(COUNTER_1, 0x99)
    outb(CONTROL, word(1, 2))
    write(1, 0x5678)
    expect([read(1), count(1)]).toEqual([0x5678, 0x5678])
  })

  it('the control word register gives all ones', () => {
    expect(setUp().inb(CONTROL)).toBe(0xff)
  })
})

describe('port B', () => {
  it('keeps four bits, and shows the output of counter 2', () => {
    const { inb, outb, program, tick } = setUp()
    outb(PORT_B, 0xff)
    expect(inb(PORT_B) & 0xcf).toBe(0x0f)
    program(2, 0, 10)
    expect(inb(PORT_B) & OUT_2).toBe(0)
    tick(10)
    expect(inb(PORT_B) & OUT_2).toBe(OUT_2)
  })

  it('bit 4 toggles with the refresh: every 15 µs', () => {
    const { clock, inb } = setUp()
    let toggles = 0
    let before = inb(PORT_B) & 0x10
    for (let i = 0; i < 1000; i++) {
      clock.advance(1000)
      const now = inb(PORT_B) & 0x10
      if (now !== before) toggles++
      before = now
    }
    expect(toggles).toBeGreaterThanOrEqual(66)
    expect(toggles).toBeLessThanOrEqual(67)
  })

  it('times 10 ms with counter 2 as kernels do that measure their TSC', () => {
    const { clock, inb, outb, program } = setUp()
    outb(PORT_B, (inb(PORT_B) & ~0x02) | GATE_2)
    program(2, 0, 11_931)
    let waited = 0
    while ((inb(PORT_B) & OUT_2) === 0) {
      clock.advance(10_000)
      waited += 10_000
    }
    expect(waited).toBe(10 * MS)
  })
})

describe('interrupts', () => {
  it.each([2, 3])('come with every cycle of counter 0, in mode %i', (mode) => {
    const { clock, line, program } = setUp()
    program(0, mode, 11_932)
    clock.advance(9.9 * MS)
    expect(line.count).toBe(0)
    clock.advance(0.2 * MS)
    expect(line.count).toBe(1)
    clock.advance(SECOND)
    expect(line.count).toBe(101)
    expect(line.asserted).toBe(false)
  })

  it.each([0, 4])('come once, in mode %i, and again with each new count', (mode) => {
    const { clock, line, program, write } = setUp()
    program(0, mode, 11_932)
    clock.advance(9 * MS)
    expect(line.count).toBe(0)
    clock.advance(SECOND)
    expect(line.count).toBe(1)
    write(0, 11_932)
    clock.advance(5 * MS)
    write(0, 11_932)
    clock.advance(9 * MS)
    expect(line.count).toBe(1)
    clock.advance(SECOND)
    expect(line.count).toBe(2)
  })

  it.each([1, 5])('do not come in mode %i: counter 0 has no gate to start it', (mode) => {
    const { clock, line, program } = setUp()
    program(0, mode, 100)
    clock.advance(SECOND)
    expect(line.count).toBe(0)
  })

  it('are those of counter 0 alone', () => {
    const { clock, gate, line, program } = setUp()
    gate(true)
    program(1, 2, 1000)
    program(2, 2, 1000)
    clock.advance(SECOND)
    expect(line.count).toBe(0)
  })

  it('end with a control word, and go on through latch commands', () => {
    const { clock, line, outb, program, count, status } = setUp()
    program(0, 2, 11_932)
    count(0)
    status(0)
    clock.advance(15 * MS)
    expect(line.count).toBe(1)
    outb(CONTROL, word(0, 2))
    clock.advance(SECOND)
    expect(line.count).toBe(1)
  })

  it('take the new period as soon as it is written', () => {
    const { clock, line, program, outb } = setUp()
    program(0, 2, 0)
    outb(COUNTER_0, 1193 & 0xff)
    clock.advance(10 * MS)
    expect(line.count, 'half a count changes nothing').toBe(0)
    outb(COUNTER_0, 1193 >> 8)
    clock.advance(10.5 * MS)
    expect(line.count).toBe(10)
  })

  it('16: come no more often than every 100 µs, however small the count', () => {
    for (const count of [1, 2, 50]) {
      const { clock, line, program } = setUp()
      program(0, 2, count)
      clock.advance(10 * MS)
      expect(line.count).toBe(100)
    }
  })

  it('that the host was late for are made up for, one between each two', () => {
    const { clock, line, program } = setUp()
    program(0, 2, 11_932)
    clock.jump(105 * MS)
    expect(line.count).toBe(1)
    clock.advance(50.5 * MS)
    expect(line.count).toBe(1 + 5 + 5)
    clock.advance(100 * MS)
    expect(line.count, 'all 25 of 255 ms').toBe(25)
    clock.advance(SECOND)
    expect(line.count).toBe(125)
  })

  it('16: that are made up for are bounded, and forgotten with a new count', () => {
    const { clock, line, program } = setUp()
    program(0, 2, 11_932)
    clock.jump(1000 * SECOND)
    clock.advance(100 * SECOND)
    expect(line.count).toBe(1 + 1000 + 10_000)
    clock.jump(SECOND)
    program(0, 2, 11_932)
    const before = line.count
    clock.advance(95 * MS)
    expect(line.count - before).toBe(9)
  })
})

describe('state', () => {
  const restored = (from: Machine): Machine => {
    const copy = setUp()
    copy.device.restoreState(structuredClone(from.device.saveState()))
    return copy
  }

  it('is plain data and comes back exactly, also on a host that has just been started', () => {
    const original = setUp()
    original.gate(true)
    original.program(0, 2, 11_932)
    original.program(1, 3, 0x4321, true)
    original.program(2, 0, 0)
    // Longer than the clock of the copy has run.
    original.clock.advance(10 * SECOND + 3 * MS)
    original.outb(CONTROL, readBack(1))
    original.outb(COUNTER_1, 0x12)
    const state = original.device.saveState()
    expect(JSON.parse(JSON.stringify(state))).toEqual(state)
    const copy = restored(original)
    expect(copy.device.saveState()).toEqual(state)
    const rest = ({ clock, count, inb, line, out, read }: Machine) => {
      const before = line.count
      clock.advance(50 * MS)
      return [
        line.count - before,
        inb(COUNTER_1),
        read(1),
        count(0),
        count(1),
        count(2),
        out(1),
        inb(PORT_B) & OUT_2,
      ]
    }
    expect(rest(copy)).toEqual(rest(original))
  })

  it('goes on with a one-shot, and with interrupts to be made up for', () => {
    const oneShot = setUp()
    oneShot.program(0, 0, 11_932)
    oneShot.clock.advance(4 * MS)
    const copy = restored(oneShot)
    copy.clock.advance(5 * MS)
    expect(copy.line.count).toBe(0)
    copy.clock.advance(2 * MS)
    expect(copy.line.count).toBe(1)

    const late = setUp()
    late.program(0, 2, 11_932)
    late.clock.jump(42 * MS)
    const second = restored(late)
    second.clock.advance(100 * MS)
    expect(second.line.count).toBe(10 + 3)
  })

  it('a machine that counted for a year can be saved and restored', () => {
    const original = setUp()
    original.program(1, 2, 1000)
    original.clock.advance(366 * 86_400 * SECOND)
    const copy = restored(original)
    expect(copy.count(1)).toBe(original.count(1))
  })

  it('29: a state that it cannot have is refused, and nothing is changed', () => {
    const { device, program } = setUp()
    program(0, 2, 11_932)
    const state = device.saveState() as { counters: object[] }
    const counter = (change: object) => ({
      counters: [state.counters[0], state.counters[1], { ...state.counters[2], ...change }],
    })
    const bad = [
      { portB: 16 },
      { late: 1001 },
      { counters: [] },
      counter({ mode: 6 }),
      counter({ access: 0 }),
      counter({ initial: 0x1_0001 }),
      counter({ bcd: true, written: 10_001 }),
      counter({ elapsed: -1 }),
      counter({ elapsed: Number.POSITIVE_INFINITY }),
      counter({ latched: 0x1_0000 }),
      counter({ gate: 1 }),
    ]
    for (const change of bad) {
      expect(() => device.restoreState({ ...state, ...change } as never)).toThrow(/of the state of/)
      expect(device.saveState()).toEqual(state)
    }
  })
})
