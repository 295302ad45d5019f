import { describe, expect, it } from 'vitest'
import { KeyboardController } from '../../src/devices/keyboard-controller.js'
import { CountingLine, guestWith, hostOf } from './guest.js'

function setUp() {
  let resets = 0
  const device = new KeyboardController({ onReset: () => resets++ })
  const line = new CountingLine()
  device.attach(hostOf({ interrupt: line }))
  const guest = guestWith(device)
  const command = (value: number) => guest.outb(0x64, value)
  const reply = () => {
    expect(guest.inb(0x64) & 1, 'output buffer full').toBe(1)
    return guest.inb(0x60)
  }
  return { device, line, resets: () => resets, command, reply, ...guest }
}

describe('keyboard-controller', () => {
  it('passes the tests a driver makes', () => {
    const { command, reply, inb } = setUp()
    expect(inb(0x64) & 0x03, 'both buffers empty').toBe(0)
    command(0xaa)
    expect(reply()).toBe(0x55)
    command(0xab)
    expect(reply()).toBe(0)
    expect(inb(0x64) & 0x07, 'output buffer empty, system flag').toBe(0x04)
  })

  it('keeps the command byte, and its bits for the interfaces', () => {
    const { command, reply, inb, outb } = setUp()
    command(0x60)
    expect(inb(0x64) & 0x08, 'last write was a command').toBe(0x08)
    outb(0x60, 0x40)
    expect(inb(0x64) & 0x0c, 'last write was data, no system flag').toBe(0)
    const bits: [number, number][] = [
      [0xad, 0x50],
      [0xa7, 0x70],
      [0xae, 0x60],
      [0xa8, 0x40],
    ]
    for (const [code, expected] of bits) {
      command(code)
      command(0x20)
      expect(reply()).toBe(expected)
    }
  })

  it('resets the machine with command 0xfe, and every pulse of line 0', () => {
    const { command, resets } = setUp()
    command(0xfe)
    expect(resets()).toBe(1)
    command(0xf0)
    expect(resets()).toBe(2)
    command(0xff)
    command(0xf1)
    expect(resets()).toBe(2)
  })

  it('opens A20 and resets through the output port', () => {
    const { device, command, reply, resets, outb } = setUp()
    command(0xd0)
    expect(reply()).toBe(0xcf)
    command(0xd1)
    outb(0x60, 0xdd)
    expect([device.a20, resets()]).toEqual([false, 0])
    command(0xd1)
    outb(0x60, 0xdf)
    expect(device.a20).toBe(true)
    command(0xd0)
    expect(reply()).toBe(0xdf)
    command(0xd1)
    outb(0x60, 0xfe)
    expect(resets()).toBe(1)
  })

  it('a byte for the keyboard times out, for there is none', () => {
    const { command, reply, inb, outb } = setUp()
    command(0xad)
    outb(0x60, 0xff)
    expect(inb(0x64) & 0x41).toBe(0x41)
    expect(reply()).toBe(0xfe)
    expect(inb(0x64) & 0x41).toBe(0)
    command(0x20)
    expect(reply() & 0x10, 'the interface is on again').toBe(0)
  })

  it('replies interrupt when the command byte says so', () => {
    const { command, line, outb } = setUp()
    command(0xaa)
    expect(line.count).toBe(0)
    command(0x60)
    outb(0x60, 0x45)
    command(0xaa)
    expect(line.count).toBe(1)
  })

  it('a command takes one byte of data; the next is for the keyboard', () => {
    const { command, reply, outb } = setUp()
    command(0x60)
    outb(0x60, 0x40)
    outb(0x60, 0x41)
    expect(reply()).toBe(0xfe)
    command(0x20)
    expect(reply()).toBe(0x40)
  })

  it('a new command cancels one that waits for data', () => {
    const { command, reply, resets, outb } = setUp()
    command(0xd1)
    command(0x20)
    expect(reply()).toBe(0x44)
    outb(0x60, 0x00)
    expect(resets()).toBe(0)
  })

  it('its state comes back exactly, in the middle of a command too', () => {
    const { device, command, outb } = setUp()
    command(0x60)
    outb(0x60, 0x61)
    command(0xaa)
    command(0xd1)
    const state = device.saveState()
    const copy = setUp()
    copy.device.restoreState(structuredClone(state))
    expect(copy.device.saveState()).toEqual(state)
    expect(copy.reply()).toBe(0x55)
    copy.outb(0x60, 0x01)
    expect(copy.device.a20).toBe(false)
  })

  it('29: a state that it cannot have is refused and changes nothing', () => {
    const { device } = setUp()
    const before = device.saveState()
    expect(() => device.restoreState({ ...(before as object), pending: 256, output: 3 })).toThrow('pending')
    expect(device.saveState()).toEqual(before)
  })
})
