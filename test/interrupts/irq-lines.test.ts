import fc from 'fast-check'
import { describe, expect, it } from 'vitest'
import { unconnectedLine } from '../../src/interrupts/interrupt-line.js'
import { IrqLines } from '../../src/interrupts/irq-lines.js'

function setUp() {
  const events: [number, boolean][] = []
  const lines = new IrqLines(24, (gsi, asserted) => events.push([gsi, asserted]))
  return { lines, events }
}

describe('a wire', () => {
  it('carries a trigger as an edge: up and down', () => {
    const { lines, events } = setUp()
    lines.line(4).trigger()
    expect(events).toEqual([
      [4, true],
      [4, false],
    ])
  })

  it('carries a level, and no level twice', () => {
    const { lines, events } = setUp()
    const line = lines.line(23)
    for (const asserted of [false, true, true, false, false]) line.setLevel(asserted)
    expect(events).toEqual([
      [23, true],
      [23, false],
    ])
  })

  it('that is shared is up as long as one of its devices holds it', () => {
    const { lines, events } = setUp()
    const [first, second] = [lines.line(10), lines.line(10)]
    first.setLevel(true)
    second.setLevel(true)
    first.setLevel(false)
    expect(events).toEqual([[10, true]])
    second.setLevel(false)
    expect(events).toEqual([
      [10, true],
      [10, false],
    ])
  })

  it('that is held up stays up through a trigger', () => {
    const { lines, events } = setUp()
    lines.line(10).setLevel(true)
    lines.line(10).trigger()
    expect(events).toEqual([[10, true]])
  })

  it('is apart from the others', () => {
    const { lines, events } = setUp()
    lines.line(10).setLevel(true)
    lines.line(11).trigger()
    expect(events).toEqual([
      [10, true],
      [11, true],
      [11, false],
    ])
    expect(lines.count).toBe(24)
  })

  it('whatever its devices do, is up exactly when one holds it, and changes with every event', () => {
    const step = fc.record({ source: fc.nat(2), action: fc.constantFrom('up', 'down', 'trigger') })
    fc.assert(
      fc.property(fc.array(step), (steps) => {
        const { lines, events } = setUp()
        const sources = [0, 1, 2].map(() => ({ line: lines.line(5), held: false }))
        let edges = 0
        for (const { source, action } of steps) {
          const device = sources[source]!
          const before = sources.some(({ held }) => held)
          if (action === 'trigger') device.line.trigger()
          else {
            device.held = action === 'up'
            device.line.setLevel(device.held)
          }
          const after = sources.some(({ held }) => held)
          if (!before && (after || action === 'trigger')) edges++
          expect(events.at(-1)?.[1] ?? false).toBe(after)
        }
        expect(events.map(([, asserted]) => asserted)).toEqual(events.map((_, i) => i % 2 === 0))
        expect(events.filter(([, asserted]) => asserted)).toHaveLength(edges)
      }),
    )
  })
})

it('the line that leads nowhere takes both', () => {
  unconnectedLine.trigger()
  unconnectedLine.setLevel(true)
})
