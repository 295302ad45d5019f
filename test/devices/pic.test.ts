import fc from 'fast-check'
import { describe, expect, it } from 'vitest'
import { Pic } from '../../src/devices/pic.js'
import { guestWith } from './guest.js'

const MASTER = 0x20
const SLAVE = 0xa0
const ELCR = 0x4d0
const MASTER_BASE = 0x20
const SLAVE_BASE = 0x28

const ICW1 = 0x11
const ICW4 = 0x01
const AUTO_EOI = 0x02
const SPECIAL_FULLY_NESTED = 0x10
const EOI = 0x20
const SPECIFIC_EOI = 0x60
const ROTATE_EOI = 0xa0
const ROTATE_SPECIFIC_EOI = 0xe0
const SET_PRIORITY = 0xc0
const SET_ROTATE_AUTO_EOI = 0x80
const CLEAR_ROTATE_AUTO_EOI = 0x00
const POLL = 0x0c
const READ_IRR = 0x0a
const READ_ISR = 0x0b
const SET_SPECIAL_MASK = 0x68
const CLEAR_SPECIAL_MASK = 0x48

function setUp() {
  let interrupts = 0
  const pic = new Pic({ onInterrupt: () => interrupts++ })
  const guest = guestWith(pic)
  const initializeChip = (port: number, base: number, icw3: number, icw4: number) => {
    guest.outb(port, ICW1)
    for (const word of [base, icw3, icw4]) guest.outb(port + 1, word)
  }
  const initialize = ({ master = ICW4, slave = ICW4 } = {}) => {
    initializeChip(MASTER, MASTER_BASE, 0x04, master)
    initializeChip(SLAVE, SLAVE_BASE, 0x02, slave)
  }
  const pulse = (irq: number) => {
    pic.setInput(irq, true)
    pic.setInput(irq, false)
  }
  const readBy = (command: number) => (port: number) => {
    guest.outb(port, command)
    return guest.inb(port)
  }
  /** What the vCPU does as long as INTR is up and it lets interrupts in. */
  const take = () => (pic.pending ? pic.acknowledge() : undefined)
  return {
    pic,
    interrupts: () => interrupts,
    initialize,
    pulse,
    take,
    irr: readBy(READ_IRR),
    isr: readBy(READ_ISR),
    poll: readBy(POLL),
    ...guest,
  }
}

function initialized(icw4: { master?: number; slave?: number } = {}) {
  const machine = setUp()
  machine.initialize(icw4)
  return machine
}

const vectorOf = (irq: number) => (irq < 8 ? MASTER_BASE + irq : SLAVE_BASE + irq - 8)
const INPUTS = Array.from({ length: 16 }, (_, irq) => irq).filter((irq) => irq !== 2)

describe('initialisation', () => {
  it.each(INPUTS)('gives IRQ %i its vector', (irq) => {
    const { pulse, take } = initialized()
    pulse(irq)
    expect(take()).toBe(vectorOf(irq))
    expect(take()).toBeUndefined()
  })

  it('leaves every line unmasked, and ignores the lower three bits of ICW2', () => {
    const { inb, outb, pulse, take } = setUp()
    outb(MASTER, ICW1)
    for (const word of [0x47, 4, 1]) outb(MASTER + 1, word)
    expect(inb(MASTER + 1)).toBe(0)
    pulse(1)
    expect(take()).toBe(0x41)
  })

  it('has no ICW3 for a single chip, and no ICW4 unless ICW1 says so', () => {
    const { inb, outb } = setUp()
    outb(MASTER, 0x13)
    for (const word of [0x20, 1, 0x5a]) outb(MASTER + 1, word)
    expect(inb(MASTER + 1)).toBe(0x5a)
    outb(MASTER, 0x10)
    for (const word of [0x20, 4, 0xa5]) outb(MASTER + 1, word)
    expect(inb(MASTER + 1)).toBe(0xa5)
    outb(MASTER, 0x12)
    for (const word of [0x20, 0x3c]) outb(MASTER + 1, word)
    expect(inb(MASTER + 1)).toBe(0x3c)
  })

  it('forgets edges: a line that is up has to rise again', () => {
    const { pic, initialize, irr, pulse, take } = initialized()
    pulse(3)
    pic.setInput(4, true)
    initialize()
    expect([irr(MASTER), pic.pending]).toEqual([0, false])
    pic.setInput(4, true)
    expect(take()).toBeUndefined()
    pic.setInput(4, false)
    pic.setInput(4, true)
    expect(take()).toBe(vectorOf(4))
  })

  it('clears masks, what is in service, and modes that ICW4 does not ask for', () => {
    const { initialize, inb, isr, outb, pulse, take } = initialized({ master: ICW4 | AUTO_EOI })
    outb(MASTER + 1, 0xff)
    initialize()
    expect(inb(MASTER + 1)).toBe(0)
    pulse(1)
    take()
    expect(isr(MASTER)).toBe(0x02)
    initialize()
    expect(isr(MASTER)).toBe(0)
  })
})

describe('an edge', () => {
  it('is latched, and interrupts once however long the line stays up', () => {
    const { pic, irr, outb, take } = initialized()
    pic.setInput(4, true)
    pic.setInput(4, true)
    expect(irr(MASTER)).toBe(0x10)
    expect(take()).toBe(vectorOf(4))
    outb(MASTER, EOI)
    expect([take(), irr(MASTER)]).toEqual([undefined, 0])
  })

  it('of a masked line waits until the mask is cleared', () => {
    const { interrupts, outb, pulse, take } = initialized()
    outb(MASTER + 1, 0x10)
    pulse(4)
    expect([take(), interrupts()]).toEqual([undefined, 0])
    outb(MASTER + 1, 0)
    expect([interrupts(), take()]).toEqual([1, vectorOf(4)])
  })

  it('on line 2, which the slave has, is none', () => {
    const { irr, pulse } = initialized()
    pulse(2)
    expect(irr(MASTER)).toBe(0)
  })
})

describe('a level (ELCR)', () => {
  it('interrupts again after the EOI as long as it is up', () => {
    const { pic, outb, take } = initialized()
    outb(ELCR + 1, 0x02)
    pic.setInput(9, true)
    for (let i = 0; i < 3; i++) {
      expect(take()).toBe(vectorOf(9))
      expect(take(), 'not while it is in service').toBeUndefined()
      outb(SLAVE, EOI)
      outb(MASTER, EOI)
    }
    pic.setInput(9, false)
    expect(take()).toBeUndefined()
  })

  it('that goes away before it was acknowledged does not interrupt', () => {
    const { pic, interrupts, irr, outb } = initialized()
    outb(ELCR, 0x20)
    outb(ELCR + 1, 0x08)
    for (const irq of [5, 11]) {
      pic.setInput(irq, true)
      expect(pic.pending).toBe(true)
      pic.setInput(irq, false)
      expect(pic.pending).toBe(false)
    }
    expect([interrupts(), irr(MASTER), irr(SLAVE)]).toEqual([2, 0, 0])
  })

  it('counts from when its line is made level-triggered', () => {
    const { pic, outb, take } = initialized()
    pic.setInput(5, true)
    expect(take()).toBe(vectorOf(5))
    outb(MASTER, EOI)
    expect(take()).toBeUndefined()
    outb(ELCR, 0x20)
    expect(take()).toBe(vectorOf(5))
  })

  it('cannot be had on lines 0, 1, 2, 8 and 13', () => {
    const { inb, outb, outw } = initialized()
    outb(ELCR, 0xff)
    outb(ELCR + 1, 0xff)
    expect([inb(ELCR), inb(ELCR + 1)]).toEqual([0xf8, 0xde])
    outw(ELCR, 0x0e38)
    expect([inb(ELCR), inb(ELCR + 1)]).toEqual([0x38, 0x0e])
  })
})

describe('priority', () => {
  it('is that of the line: a higher one interrupts a handler, others wait for its EOI', () => {
    const { outb, pulse, take } = initialized()
    pulse(4)
    expect(take()).toBe(vectorOf(4))
    for (const irq of [4, 5]) pulse(irq)
    expect(take()).toBeUndefined()
    pulse(1)
    expect(take()).toBe(vectorOf(1))
    outb(MASTER, EOI)
    expect(take(), '4 is in service').toBeUndefined()
    outb(MASTER, EOI)
    expect(take()).toBe(vectorOf(4))
    outb(MASTER, EOI)
    expect(take()).toBe(vectorOf(5))
  })

  it('of the slave is that of line 2', () => {
    const { outb, pulse, take } = initialized()
    for (const irq of [3, 15, 8, 1]) pulse(irq)
    expect([take(), take()]).toEqual([vectorOf(1), undefined])
    outb(MASTER, EOI)
    expect([take(), take()]).toEqual([vectorOf(8), undefined])
    outb(SLAVE, EOI)
    expect(take(), 'the master has line 2 in service').toBeUndefined()
    outb(MASTER, EOI)
    expect([take(), take()]).toEqual([vectorOf(15), undefined])
    for (const port of [SLAVE, MASTER]) outb(port, EOI)
    expect(take()).toBe(vectorOf(3))
  })

  it('specific EOI ends the line it names', () => {
    const { isr, outb, pulse, take } = initialized()
    for (const irq of [6, 3]) {
      pulse(irq)
      take()
    }
    outb(MASTER, SPECIFIC_EOI | 6)
    expect(isr(MASTER)).toBe(0x08)
    outb(MASTER, EOI)
    expect(isr(MASTER)).toBe(0)
  })

  it('rotates with EOI: the line that was served comes last', () => {
    const { outb, pulse, take } = initialized()
    pulse(4)
    take()
    outb(MASTER, ROTATE_EOI)
    for (const irq of [0, 4, 5]) pulse(irq)
    const served = []
    for (let i = 0; i < 3; i++) {
      served.push(take())
      outb(MASTER, EOI)
    }
    expect(served).toEqual([5, 0, 4].map(vectorOf))
  })

  it.each([
    ['set priority', SET_PRIORITY | 4],
    ['rotate on specific EOI', ROTATE_SPECIFIC_EOI | 4],
  ])('is rotated by %s', (_, command) => {
    const { outb, pulse, take } = initialized()
    outb(MASTER, command)
    for (const irq of [4, 3, 7]) pulse(irq)
    expect([take(), take()]).toEqual([vectorOf(7), undefined])
    outb(MASTER, EOI)
    expect(take()).toBe(vectorOf(3))
  })

  it('EOI with nothing in service changes nothing', () => {
    const { outb, pulse, take } = initialized()
    for (const command of [EOI, ROTATE_EOI, 0x40]) outb(MASTER, command)
    for (const irq of [7, 0]) pulse(irq)
    expect(take()).toBe(vectorOf(0))
  })
})

describe('automatic EOI', () => {
  it('has nothing in service after the acknowledge', () => {
    const { isr, pulse, take } = initialized({ master: ICW4 | AUTO_EOI })
    for (const irq of [3, 4]) pulse(irq)
    expect([take(), isr(MASTER), take(), take()]).toEqual([vectorOf(3), 0, vectorOf(4), undefined])
  })

  it('of the slave loses none of two requests at once', () => {
    const { pulse, take } = initialized({ master: ICW4 | AUTO_EOI, slave: ICW4 | AUTO_EOI })
    for (const irq of [12, 9, 15]) pulse(irq)
    expect([take(), take(), take(), take()]).toEqual([...[9, 12, 15].map(vectorOf), undefined])
  })

  it('rotates when told so', () => {
    const { outb, pulse, take } = initialized({ master: ICW4 | AUTO_EOI })
    outb(MASTER, SET_ROTATE_AUTO_EOI)
    pulse(1)
    take()
    for (const irq of [0, 1, 3]) pulse(irq)
    expect([take(), take(), take()]).toEqual([3, 0, 1].map(vectorOf))
    outb(MASTER, CLEAR_ROTATE_AUTO_EOI)
    for (const irq of [0, 3]) pulse(irq)
    take()
    pulse(3)
    expect(take(), '3 comes before 0 since 1 was served last').toBe(vectorOf(3))
  })
})

describe('special mask mode', () => {
  it('lets all others through while a line is in service and masked', () => {
    const { outb, pulse, take } = initialized()
    pulse(3)
    take()
    outb(MASTER + 1, 0x08)
    pulse(6)
    expect(take()).toBeUndefined()
    outb(MASTER, SET_SPECIAL_MASK)
    expect(take()).toBe(vectorOf(6))
    outb(MASTER, SPECIFIC_EOI | 6)
    outb(MASTER, CLEAR_SPECIAL_MASK)
    pulse(5)
    expect(take()).toBeUndefined()
  })

  it('non-specific EOI passes over what is masked', () => {
    const { isr, outb, pulse, take } = initialized()
    pulse(3)
    take()
    outb(MASTER + 1, 0x08)
    outb(MASTER, SET_SPECIAL_MASK)
    pulse(6)
    take()
    outb(MASTER, EOI)
    expect(isr(MASTER)).toBe(0x08)
    outb(MASTER, EOI)
    expect(isr(MASTER)).toBe(0x08)
  })
})

describe('special fully nested mode', () => {
  it('lets a higher request of the slave interrupt a lower one, and no lower line of the master', () => {
    const { outb, pulse, take } = initialized({ master: ICW4 | SPECIAL_FULLY_NESTED })
    pulse(12)
    expect(take()).toBe(vectorOf(12))
    pulse(3)
    expect(take()).toBeUndefined()
    pulse(13)
    expect(take()).toBeUndefined()
    pulse(9)
    expect(take()).toBe(vectorOf(9))
    outb(SLAVE, EOI)
    outb(SLAVE, EOI)
    expect(take(), '13 is next').toBe(vectorOf(13))
  })

  it('without it the slave waits for the EOI of the master', () => {
    const { outb, pulse, take } = initialized()
    pulse(12)
    take()
    pulse(9)
    expect(take()).toBeUndefined()
    outb(MASTER, EOI)
    expect(take()).toBe(vectorOf(9))
  })
})

describe('poll', () => {
  it('acknowledges the first request, of each chip by itself', () => {
    const { pic, isr, poll, pulse } = initialized()
    for (const irq of [14, 10]) pulse(irq)
    expect([poll(MASTER), isr(MASTER)]).toEqual([0x82, 0x04])
    expect([poll(SLAVE), isr(SLAVE)]).toEqual([0x82, 0x04])
    expect(pic.pending).toBe(false)
    expect([poll(MASTER), poll(SLAVE)]).toEqual([0, 0])
  })

  it('is for one read only, at either address', () => {
    const { inb, outb, pulse } = initialized()
    outb(MASTER + 1, 0x5a & ~0x08)
    pulse(3)
    outb(MASTER, POLL)
    expect([inb(MASTER + 1), inb(MASTER + 1)]).toEqual([0x83, 0x52])
  })

  it('lets the next request of a slave with automatic EOI reach the master', () => {
    const { poll, pulse, take } = initialized({ slave: ICW4 | AUTO_EOI })
    for (const irq of [9, 10]) pulse(irq)
    expect(poll(SLAVE)).toBe(0x81)
    expect(take()).toBe(vectorOf(10))
  })
})

describe('INTR', () => {
  it('calls once as it rises', () => {
    const { interrupts, pulse, take } = initialized()
    for (const irq of [3, 3, 1, 9]) pulse(irq)
    expect(interrupts()).toBe(1)
    take()
    pulse(0)
    expect(interrupts()).toBe(2)
  })

  it('falls when the only request is masked, of either chip', () => {
    const { pic, outb, pulse } = initialized()
    for (const [irq, port] of [
      [4, MASTER],
      [12, SLAVE],
    ] as const) {
      pulse(irq)
      outb(port + 1, 0x10)
      expect(pic.pending).toBe(false)
      outb(port + 1, 0)
      expect(pic.pending).toBe(true)
      pic.acknowledge()
      for (const chip of [SLAVE, MASTER]) outb(chip, EOI)
    }
  })

  it('acknowledged too late gives the spurious interrupt 7, which is not in service', () => {
    const { pic, isr, outb, pulse } = initialized()
    pulse(4)
    outb(MASTER + 1, 0x10)
    expect([pic.acknowledge(), isr(MASTER), isr(SLAVE)]).toEqual([MASTER_BASE + 7, 0, 0])
  })
})

describe('state', () => {
  const busy = () => {
    const machine = initialized({ master: ICW4 | SPECIAL_FULLY_NESTED })
    const { outb, pulse, pic, take } = machine
    outb(ELCR, 0x20)
    pulse(12)
    take()
    for (const irq of [9, 4]) pulse(irq)
    pic.setInput(5, true)
    outb(MASTER, SET_PRIORITY | 2)
    outb(SLAVE + 1, 0x40)
    return machine
  }

  it('is plain data, comes back exactly, and interrupts if an interrupt was pending', () => {
    const original = busy()
    const state = original.pic.saveState()
    expect(JSON.parse(JSON.stringify(state))).toEqual(state)
    const copy = setUp()
    copy.pic.restoreState(structuredClone(state))
    expect(copy.pic.saveState()).toEqual(state)
    expect([copy.interrupts(), copy.pic.pending]).toEqual([1, true])
    const rest = ({ outb, take }: ReturnType<typeof setUp>) =>
      Array.from({ length: 6 }, () => {
        const vector = take()
        for (const port of [SLAVE, MASTER]) outb(port, EOI)
        return vector
      })
    expect(rest(copy)).toEqual(rest(original))
  })

  it('29: a state that it cannot have is refused, and nothing is changed', () => {
    const { pic } = busy()
    const state = pic.saveState() as { master: object; slave: object }
    const refused = [
      null,
      {},
      { ...state, slave: null },
      { ...state, slave: { ...state.slave, top: 8 } },
      { ...state, master: { ...state.master, irr: 256 } },
      { ...state, master: { ...state.master, expected: 5 } },
    ]
    for (const value of refused) {
      expect(() => pic.restoreState(value as never)).toThrow(/state of the (master|slave) of pic/)
      expect(pic.saveState()).toEqual(state)
    }
  })

  it('29: edge-triggered lines stay so', () => {
    const { pic, inb } = setUp()
    const state = pic.saveState() as { master: object; slave: object }
    pic.restoreState({ master: { ...state.master, elcr: 0xff }, slave: { ...state.slave, elcr: 0xff } })
    expect([inb(ELCR), inb(ELCR + 1)]).toEqual([0xf8, 0xde])
  })
})

/** A chip as the data sheet explains it: lists of inputs, and an order of priority. */
class ModelChip {
  order = [0, 1, 2, 3, 4, 5, 6, 7]
  requests = new Set<number>()
  inService = new Set<number>()
  masked = new Set<number>()

  get next(): number | undefined {
    for (const input of this.order) {
      if (this.inService.has(input)) return undefined
      if (this.requests.has(input) && !this.masked.has(input)) return input
    }
    return undefined
  }

  take(): number {
    const input = this.next!
    this.requests.delete(input)
    this.inService.add(input)
    return input
  }

  /** Lowest priority for an input. */
  rotate(input: number): void {
    while (this.order[7] !== input) this.order.push(this.order.shift()!)
  }

  end(rotate: boolean): void {
    const input = this.order.find((candidate) => this.inService.has(candidate))
    if (input === undefined) return
    this.inService.delete(input)
    if (rotate) this.rotate(input)
  }
}

class ModelPic {
  readonly master = new ModelChip()
  readonly slave = new ModelChip()
  #slaveInt = false

  update(): void {
    const slaveInt = this.slave.next !== undefined
    if (slaveInt && !this.#slaveInt) this.master.requests.add(2)
    if (!slaveInt) this.master.requests.delete(2)
    this.#slaveInt = slaveInt
  }

  take(): number | undefined {
    if (this.master.next === undefined) return undefined
    const input = this.master.take()
    return input === 2 ? SLAVE_BASE + this.slave.take() : MASTER_BASE + input
  }
}

const bits = (inputs: Set<number>) => [...inputs].reduce((sum, input) => sum | (1 << input), 0)

describe('any guest', () => {
  it('gets what a model of the priorities says', () => {
    const chip = fc.constantFrom('master' as const, 'slave' as const)
    const level = fc.nat(7)
    const command = fc.oneof(
      {
        weight: 5,
        arbitrary: fc.record({ kind: fc.constant('pulse' as const), irq: fc.constantFrom(...INPUTS) }),
      },
      { weight: 4, arbitrary: fc.record({ kind: fc.constant('take' as const) }) },
      { weight: 3, arbitrary: fc.record({ kind: fc.constant('end' as const), chip, rotate: fc.boolean() }) },
      { weight: 1, arbitrary: fc.record({ kind: fc.constant('mask' as const), chip, value: fc.nat(255) }) },
      { weight: 1, arbitrary: fc.record({ kind: fc.constant('specific' as const), chip, level }) },
      { weight: 1, arbitrary: fc.record({ kind: fc.constant('priority' as const), chip, level }) },
    )
    fc.assert(
      fc.property(fc.array(command, { maxLength: 60 }), (commands) => {
        const { inb, irr, isr, outb, pic, pulse, take } = initialized()
        const model = new ModelPic()
        const ports = { master: MASTER, slave: SLAVE }
        for (const step of commands) {
          switch (step.kind) {
            case 'pulse':
              pulse(step.irq)
              model[step.irq < 8 ? 'master' : 'slave'].requests.add(step.irq % 8)
              break
            case 'take':
              expect(take()).toBe(model.take())
              break
            case 'end':
              outb(ports[step.chip], step.rotate ? ROTATE_EOI : EOI)
              model[step.chip].end(step.rotate)
              break
            case 'mask':
              outb(ports[step.chip] + 1, step.value)
              model[step.chip].masked = new Set([0, 1, 2, 3, 4, 5, 6, 7].filter((i) => step.value & (1 << i)))
              break
            case 'specific':
              outb(ports[step.chip], SPECIFIC_EOI | step.level)
              model[step.chip].inService.delete(step.level)
              break
            case 'priority':
              outb(ports[step.chip], SET_PRIORITY | step.level)
              model[step.chip].rotate(step.level)
          }
          model.update()
          expect(pic.pending).toBe(model.master.next !== undefined)
          for (const name of ['master', 'slave'] as const) {
            const { requests, inService, masked } = model[name]
            const port = ports[name]
            expect([irr(port), isr(port), inb(port + 1)]).toEqual([requests, inService, masked].map(bits))
          }
        }
      }),
    )
  })
})
