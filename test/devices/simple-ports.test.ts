import { describe, expect, it } from 'vitest'
import { DebugConsole } from '../../src/devices/debug-console.js'
import { DebugExit } from '../../src/devices/debug-exit.js'
import { PostCode } from '../../src/devices/post-code.js'
import { ResetControl } from '../../src/devices/reset-control.js'
import { SystemControl } from '../../src/devices/system-control.js'
import { guestWith } from './guest.js'

describe('debug-exit', () => {
  function setUp() {
    const values: number[] = []
    const device = new DebugExit({ onExit: (value) => values.push(value) })
    return { device, values, ...guestWith(device) }
  }

  it('gives the value written, of any size, to any of its ports', () => {
    const { values, outb, outw, outl } = setUp()
    outb(0xf4, 0x10)
    outl(0xf4, 0xdead_beef)
    outw(0xf5, 0x1234)
    outb(0xf7, 0)
    expect(values).toEqual([0x10, 0xdead_beef, 0x1234, 0])
  })

  it('10: accesses across its edges give only the part that is its own', () => {
    const { values, outl } = setUp()
    outl(0xf2, 0x4433_2211)
    outl(0xf6, 0x4433_2211)
    expect(values).toEqual([0x4433, 0x2211])
  })

  it('reads as 0 and has no state', () => {
    const { device, inb, inl } = setUp()
    expect([inb(0xf4), inl(0xf4)]).toEqual([0, 0])
    expect(device.saveState()).toBeNull()
    device.restoreState()
  })

  it('can be at another port', () => {
    const values: number[] = []
    guestWith(new DebugExit({ onExit: (value) => values.push(value), port: 0x501 })).outb(0x501, 3)
    expect(values).toEqual([3])
  })
})

describe('post-code', () => {
  it('keeps the codes, and reads as the last', () => {
    const device = new PostCode()
    const { inb, outb } = guestWith(device)
    expect([device.codes, inb(0x80)]).toEqual([[], 0])
    outb(0x80, 0x11)
    outb(0x80, 0xaa)
    expect([device.codes, inb(0x80)]).toEqual([[0x11, 0xaa], 0xaa])
  })

  it('23: keeps the last 64 of a flood', () => {
    const device = new PostCode()
    const { outb } = guestWith(device)
    for (let i = 0; i < 100_000; i++) outb(0x80, i & 0xff)
    expect(device.codes).toHaveLength(64)
    expect(device.codes.at(-1)).toBe(99_999 & 0xff)
  })

  it('is posted', () => {
    expect(new PostCode().ports).toMatchObject({ posted: true })
  })

  it('its state comes back exactly', () => {
    const device = new PostCode()
    const { outb } = guestWith(device)
    for (let i = 0; i < 70; i++) outb(0x80, i)
    const copy = new PostCode()
    copy.restoreState(structuredClone(device.saveState()))
    expect(copy.codes).toEqual(device.codes)
    expect(() => copy.restoreState({ codes: new Uint8Array(65) })).toThrow('codes')
    expect(() => copy.restoreState([])).toThrow('the state of post-code')
  })
})

describe('debug-console', () => {
  it('is detected by reading 0xe9, and passes bytes on', () => {
    const sent: number[] = []
    const device = new DebugConsole({ backend: { transmit: (byte) => sent.push(byte) } })
    const { inb, outb, outw } = guestWith(device)
    expect(inb(0xe9)).toBe(0xe9)
    outb(0xe9, 0x41)
    outw(0xe9, 0x4342)
    expect(sent, 'the high byte belongs to the next port').toEqual([0x41, 0x42])
    expect(device.ports).toMatchObject({ base: 0xe9, length: 1, posted: true })
    expect(device.saveState()).toBeNull()
    device.restoreState()
  })
})

describe('system-control', () => {
  it('resets by bit 0, and keeps bit 1 alone', () => {
    let resets = 0
    const { inb, outb } = guestWith(new SystemControl({ onReset: () => resets++ }))
    expect(inb(0x92)).toBe(0x02)
    outb(0x92, 0xfc)
    expect([inb(0x92), resets]).toEqual([0x00, 0])
    outb(0x92, 0x03)
    expect([inb(0x92), resets]).toEqual([0x02, 1])
  })
})

describe('reset-control', () => {
  function setUp() {
    let resets = 0
    const device = new ResetControl({ onReset: () => resets++ })
    return { device, resets: () => resets, ...guestWith(device) }
  }

  it('resets as Linux does it', () => {
    const { resets, inb, outb } = setUp()
    const value = inb(0xcf9) & ~0x06
    outb(0xcf9, value | 0x02)
    expect([resets(), inb(0xcf9)]).toEqual([0, 0x02])
    outb(0xcf9, value | 0x06)
    expect([resets(), inb(0xcf9)]).toEqual([1, 0x02])
  })

  it('SYS_RST alone does not reset, RST_CPU alone does', () => {
    const { resets, outb } = setUp()
    outb(0xcf9, 0x0a)
    expect(resets()).toBe(0)
    outb(0xcf9, 0x04)
    expect(resets()).toBe(1)
  })

  it('a probe for PCI does not reset, and finds nothing', () => {
    const { resets, inb, inl, outb, outl, outw } = setUp()
    outb(0xcfb, 0x01)
    outl(0xcf8, 0x8000_ffff)
    expect(inl(0xcf8)).toBe(0xffff_ffff)
    outb(0xcf8, 0)
    outb(0xcfa, 0)
    expect([inb(0xcf8), inb(0xcfa)]).toEqual([0xff, 0xff])
    for (const port of [0xcf7, 0xcf8, 0xcf9, 0xcfa]) outw(port, 0xffff)
    for (const port of [0xcf6, 0xcf7, 0xcf9, 0xcfa]) outl(port, 0xffff_ffff)
    expect(resets()).toBe(0)
  })

  it('its state comes back exactly', () => {
    const { device, outb } = setUp()
    outb(0xcf9, 0x02)
    const copy = setUp()
    copy.device.restoreState(structuredClone(device.saveState()))
    expect(copy.inb(0xcf9)).toBe(0x02)
    expect(() => copy.device.restoreState({ register: 256 })).toThrow('register')
  })
})
