import fc from 'fast-check'
import { describe, expect, it } from 'vitest'
import { type InterruptMessage, IoApic } from '../../src/devices/io-apic.js'
import { guestWith } from './guest.js'

const IOREGSEL = 0xfec0_0000
const IOWIN = 0xfec0_0010
const LEVEL = 1 << 15
const MASKED = 1 << 16
const REMOTE_IRR = 1 << 14
const LOGICAL = 1 << 11
const LOWEST_PRIORITY = 1 << 8
const SMI = 2 << 8
const NMI = 4 << 8
const INIT = 5 << 8
const EXTINT = 7 << 8
/** Trigger mode and assert, in the data of a message. */
const MSI_LEVEL = 0xc000

function setUp() {
  const sent: InterruptMessage[] = []
  const levels: (readonly (InterruptMessage | undefined)[])[] = []
  const device = new IoApic({
    deliver: (message) => sent.push(message),
    onLevelMessages: (messages) => levels.push(messages),
  })
  const { readl, writel, mmio } = guestWith(device)
  const get = (register: number) => {
    writel(IOREGSEL, register)
    return readl(IOWIN)
  }
  const set = (register: number, value: number) => {
    writel(IOREGSEL, register)
    writel(IOWIN, value >>> 0)
  }
  /** The lower half of an entry. */
  const program = (pin: number, entry: number) => set(0x10 + 2 * pin, entry)
  const entry = (pin: number) => get(0x10 + 2 * pin)
  /** The vectors that were sent since this was last asked. */
  const vectors = () => sent.splice(0).map(({ data }) => data & 0xff)
  return { device, sent, levels, get, set, program, entry, vectors, readl, writel, mmio }
}

describe('registers', () => {
  it('tell version 0x11 and 24 inputs, all masked', () => {
    const { get } = setUp()
    expect(get(1)).toBe(0x0017_0011)
    for (let pin = 0; pin < 24; pin++) {
      expect([get(0x10 + 2 * pin), get(0x11 + 2 * pin)]).toEqual([MASKED, 0])
    }
  })

  it('the id has four bits, and the arbitration id follows it', () => {
    const { get, set } = setUp()
    set(0, 0xffff_ffff)
    expect([get(0), get(2)]).toEqual([0x0f00_0000, 0x0f00_0000])
    set(2, 0)
    set(1, 0)
    expect([get(2), get(1)]).toEqual([0x0f00_0000, 0x0017_0011])
  })

  it('an entry keeps what can be written: no delivery status, no remote IRR', () => {
    const { get, set, program, entry } = setUp()
    program(23, 0xffff_ffff)
    set(0x3f, 0xabcd_ef01)
    expect([entry(23), get(0x3f)]).toEqual([0x1_afff, 0xabcd_ef01])
  })

  it('what does not exist reads as 0 and ignores writes', () => {
    const { get, set, readl, writel } = setUp()
    for (const register of [3, 0x0f, 0x40, 0xff]) {
      set(register, 0xffff_ffff)
      expect(get(register)).toBe(0)
    }
    writel(IOREGSEL + 4, 1)
    expect(readl(IOREGSEL)).toBe(0xff)
    expect(readl(IOREGSEL + 4)).toBe(0)
  })

  it('IOREGSEL has eight bits', () => {
    const { readl, writel } = setUp()
    writel(IOREGSEL, 0x1234_5601)
    expect([readl(IOREGSEL), readl(IOWIN)]).toEqual([1, 0x0017_0011])
  })
})

describe('a message', () => {
  it.each([
    ['fixed, to local APIC 3', 0x41, 3, 0xfee0_3000, 0x41],
    ['to all', 0x41, 0xff, 0xfeef_f000, 0x41],
    ['logical', 0x41 | LOGICAL, 0x80, 0xfee8_0004, 0x41],
    ['of lowest priority', 0x41 | LOWEST_PRIORITY, 1, 0xfee0_1000, 0x141],
    ['NMI', NMI, 0, 0xfee0_0000, 0x400],
    ['level-triggered', 0xfe | LEVEL, 2, 0xfee0_2000, 0xfe | MSI_LEVEL],
    ['low-active: as every input is asserted here', 0x41 | (1 << 13), 0, 0xfee0_0000, 0x41],
  ])('is made of the entry: %s', (_, low, destination, address, data) => {
    const { device, sent, set, program } = setUp()
    set(0x11 + 2 * 7, destination << 24)
    program(7, low)
    device.setInput(7, true)
    expect(sent).toEqual([{ address, data }])
  })

  it('ExtINT, which belongs to the 8259A, is not sent', () => {
    const { device, sent, program } = setUp()
    program(0, EXTINT)
    device.setInput(0, true)
    expect(sent).toEqual([])
  })
})

describe('an edge', () => {
  it('is sent each time that the input rises', () => {
    const { device, program, vectors } = setUp()
    program(4, 0x30)
    for (const asserted of [true, true, false, true, false]) device.setInput(4, asserted)
    expect(vectors()).toEqual([0x30, 0x30])
  })

  it('on a masked input is ignored, also when the mask is cleared', () => {
    const { device, program, vectors } = setUp()
    program(4, 0x30 | MASKED)
    device.setInput(4, true)
    program(4, 0x30)
    expect(vectors()).toEqual([])
    device.setInput(4, false)
    device.setInput(4, true)
    expect(vectors()).toEqual([0x30])
  })

  it('has no remote IRR and needs no end of interrupt', () => {
    const { device, entry, program, levels } = setUp()
    program(4, 0x30)
    device.setInput(4, true)
    expect([entry(4), levels]).toEqual([0x30, []])
  })
})

describe('a level', () => {
  it('is sent once, and again with the end of interrupt for as long as it is up', () => {
    const { device, entry, program, vectors } = setUp()
    program(9, 0x30 | LEVEL)
    device.setInput(9, true)
    device.setInput(9, true)
    expect([vectors(), entry(9)]).toEqual([[0x30], 0x30 | LEVEL | REMOTE_IRR])
    device.endOfInterrupt(0x31)
    expect(vectors()).toEqual([])
    device.endOfInterrupt(0x30)
    expect([vectors(), entry(9)]).toEqual([[0x30], 0x30 | LEVEL | REMOTE_IRR])
    device.setInput(9, false)
    device.endOfInterrupt(0x30)
    expect([vectors(), entry(9)]).toEqual([[], 0x30 | LEVEL])
  })

  it('that was down in between is not sent twice without an end of interrupt', () => {
    const { device, program, vectors } = setUp()
    program(9, 0x30 | LEVEL)
    for (const asserted of [true, false, true]) device.setInput(9, asserted)
    expect(vectors()).toEqual([0x30])
    device.endOfInterrupt(0x30)
    expect(vectors()).toEqual([0x30])
  })

  it('that came while it was masked is sent when the mask is cleared', () => {
    const { device, program, vectors } = setUp()
    program(9, 0x30 | LEVEL | MASKED)
    device.setInput(9, true)
    expect(vectors()).toEqual([])
    program(9, 0x30 | LEVEL)
    expect(vectors()).toEqual([0x30])
  })

  it('that is masked by its handler and ended comes again when it is unmasked', () => {
    const { device, levels, program, vectors } = setUp()
    program(9, 0x30 | LEVEL)
    device.setInput(9, true)
    program(9, 0x30 | LEVEL | MASKED)
    expect(levels.at(-1)?.[9], 'its end is still waited for').toEqual({
      address: 0xfee0_0000,
      data: 0x30 | MSI_LEVEL,
    })
    device.endOfInterrupt(0x30)
    expect(vectors()).toEqual([0x30])
    program(9, 0x30 | LEVEL)
    expect(vectors()).toEqual([0x30])
  })

  it('ends for all inputs that have the vector', () => {
    const { device, program, vectors } = setUp()
    for (const pin of [16, 17]) {
      program(pin, 0x30 | LEVEL)
      device.setInput(pin, true)
    }
    vectors()
    device.endOfInterrupt(0x30)
    expect(vectors()).toEqual([0x30, 0x30])
  })

  it('loses its remote IRR when the entry is made edge-triggered: an end by hand', () => {
    const { device, entry, program, vectors } = setUp()
    program(9, 0x30 | LEVEL)
    device.setInput(9, true)
    program(9, 0x30 | MASKED)
    expect(entry(9)).toBe(0x30 | MASKED)
    program(9, 0x30 | LEVEL)
    expect(vectors()).toEqual([0x30, 0x30])
  })

  it.each([
    ['NMI', NMI, 1],
    ['SMI', SMI, 1],
    ['INIT', INIT, 1],
    ['ExtINT', EXTINT, 0],
  ])('of delivery mode %s is an edge', (_, mode, count) => {
    const { device, entry, levels, program, sent, vectors } = setUp()
    program(9, mode | LEVEL)
    device.setInput(9, true)
    expect([sent.length, levels, entry(9)]).toEqual([count, [], mode | LEVEL])
    vectors()
    program(9, 0x30 | LEVEL)
    expect(vectors(), 'and does not block what the entry is made next').toEqual([0x30])
  })
})

describe('the messages to wait for the end of', () => {
  it('are told when vector, destination or trigger mode of a level change, and else not', () => {
    const { levels, program, set } = setUp()
    const changes = () => levels.splice(0).map((messages) => messages.filter(Boolean))
    program(5, 0x30 | LEVEL | MASKED)
    expect(changes()).toEqual([[{ address: 0xfee0_0000, data: 0x30 | MSI_LEVEL }]])
    program(5, 0x30 | LEVEL)
    program(5, 0x30 | LEVEL)
    set(0x11 + 2 * 5, 0x00ff_ffff)
    expect(changes()).toEqual([])
    set(0x11 + 2 * 5, 0x0200_0000)
    expect(changes()).toEqual([[{ address: 0xfee0_2000, data: 0x30 | MSI_LEVEL }]])
    program(5, 0x31 | LEVEL)
    expect(changes()).toEqual([[{ address: 0xfee0_2000, data: 0x31 | MSI_LEVEL }]])
    program(5, 0x31)
    expect(changes()).toEqual([[]])
    program(5, 0x32)
    set(0x11 + 2 * 5, 0)
    expect(changes()).toEqual([])
  })

  it('are waited for where they went, also when the entry changes before they are ended', () => {
    const { device, levels, set, program } = setUp()
    program(14, 0x84 | LEVEL)
    device.setInput(14, true)
    const [before] = levels.at(-1)!.slice(14)
    // The handler sends the next one to another processor.
    set(0x11 + 2 * 14, 1 << 24)
    expect(levels.at(-1)![24 + 14]).toEqual(before)
    expect(levels.at(-1)![14]).not.toEqual(before)
    device.setInput(14, false)
    device.endOfInterrupt(0x84)
    set(0x11 + 2 * 14, 0)
    expect(levels.at(-1)![24 + 14]).toBeUndefined()
  })

  it('are told before a level that is up is sent', () => {
    const order: string[] = []
    const device = new IoApic({
      deliver: () => order.push('sent'),
      onLevelMessages: () => order.push('told'),
    })
    const { writel } = guestWith(device)
    device.setInput(3, true)
    writel(IOREGSEL, 0x16)
    writel(IOWIN, 0x30 | LEVEL)
    expect(order).toEqual(['told', 'sent'])
  })
})

describe('state', () => {
  const busy = () => {
    const machine = setUp()
    machine.program(9, 0x30 | LEVEL)
    machine.program(10, 0x31 | LEVEL | MASKED)
    machine.program(4, 0x32)
    for (const pin of [9, 10, 4, 23]) machine.device.setInput(pin, true)
    machine.set(0, 0x0200_0000)
    return machine
  }

  it('is plain data, comes back exactly, and tells what to wait for', () => {
    const { device, levels } = busy()
    const state = device.saveState()
    expect(JSON.parse(JSON.stringify(state))).toEqual(state)
    const copy = setUp()
    copy.device.restoreState(structuredClone(state))
    expect(copy.device.saveState()).toEqual(state)
    expect(copy.levels).toHaveLength(1)
    expect(copy.levels[0]!.slice(0, 24)).toEqual(levels.at(-1)!.slice(0, 24))
    expect(copy.levels[0]![24 + 9], 'sent, and not ended').toEqual(levels.at(-1)![9])
    expect(copy.vectors(), 'the level has been sent, the edge too').toEqual([])
    copy.device.endOfInterrupt(0x30)
    expect(copy.vectors()).toEqual([0x30])
  })

  it('29: a state that it cannot have is refused, and nothing is changed', () => {
    const { device } = busy()
    const state = device.saveState() as object
    const bad = [
      { select: 256 },
      { id: 0x1000_0000 },
      { lines: 2 ** 24 },
      { low: new Array(23).fill(0) },
      { low: new Array(24).fill(-1) },
      { high: new Array(24).fill(0.5) },
      { high: 'x'.repeat(24) },
    ]
    for (const change of bad) {
      expect(() => device.restoreState({ ...state, ...change } as never)).toThrow(Object.keys(change)[0])
      expect(device.saveState()).toEqual(state)
    }
  })

  it('29: entries have no bits that a guest could not have put there', () => {
    const { device, entry } = setUp()
    const low = new Array(24).fill(0xffff_ffff)
    low[1] = 0x30 | REMOTE_IRR
    low[2] = 0x30 | REMOTE_IRR | LEVEL
    device.restoreState({ ...(device.saveState() as object), low })
    expect([0, 1, 2].map(entry)).toEqual([0x1_afff, 0x30, 0x30 | REMOTE_IRR | LEVEL])
  })
})

describe('any guest', () => {
  it('never gets a masked input or a level twice without its end, and loses no level that stays up', () => {
    const PINS = 3
    const pin = fc.nat(PINS - 1)
    const command = fc.oneof(
      { weight: 3, arbitrary: fc.record({ kind: fc.constant('line' as const), pin, up: fc.boolean() }) },
      {
        weight: 3,
        arbitrary: fc.record({
          kind: fc.constant('entry' as const),
          pin,
          level: fc.boolean(),
          masked: fc.boolean(),
          lowest: fc.boolean(),
        }),
      },
      { weight: 3, arbitrary: fc.record({ kind: fc.constant('end' as const), pin }) },
      {
        weight: 1,
        arbitrary: fc.record({ kind: fc.constant('destination' as const), pin, to: fc.nat(255) }),
      },
    )
    fc.assert(
      fc.property(fc.array(command, { maxLength: 60 }), (commands) => {
        const { device, entry, levels, program, set, sent } = setUp()
        const model = Array.from({ length: PINS }, () => ({
          up: false,
          level: false,
          masked: true,
          /** Sent, and not ended. */
          inService: false,
        }))
        // A vector for each pin, so that a message tells where it comes from.
        const vectorOf = (index: number) => 0x40 + index
        for (const step of commands) {
          const state = model[step.pin]!
          const rises = step.kind === 'line' && step.up && !state.up
          if (step.kind === 'line') {
            state.up = step.up
            device.setInput(step.pin, step.up)
          } else if (step.kind === 'entry') {
            const { level, masked, lowest } = step
            Object.assign(state, { level, masked })
            if (!level) state.inService = false
            const flags = (level ? LEVEL : 0) | (masked ? MASKED : 0) | (lowest ? LOWEST_PRIORITY : 0)
            program(step.pin, vectorOf(step.pin) | flags)
          } else if (step.kind === 'end') {
            // KVM tells of those ends alone that it was asked for.
            const waited = levels.at(-1)?.[step.pin] !== undefined
            expect(waited || !state.inService).toBe(true)
            state.inService = false
            if (waited) device.endOfInterrupt(vectorOf(step.pin))
          } else {
            set(0x11 + 2 * step.pin, step.to << 24)
          }

          const counts = new Array<number>(PINS).fill(0)
          for (const { data } of sent.splice(0)) counts[(data & 0xff) - 0x40]!++
          model.forEach((input, index) => {
            const edge = index === step.pin && rises && !input.level && !input.masked
            const due = input.level && input.up && !input.masked && !input.inService
            expect(counts[index]).toBe(Number(edge || due))
            if (due) input.inService = true
            expect((entry(index) & REMOTE_IRR) !== 0).toBe(input.inService)
          })
        }
      }),
    )
  })
})
