import { describe, expect, it } from 'vitest'
import { Pic } from '../../src/devices/pic.js'
import { Uart } from '../../src/devices/serial.js'
import { IrqLines } from '../../src/interrupts/irq-lines.js'
import { guestWith, hostOf, RecordingBackend } from '../devices/guest.js'

const [DATA, IER, IIR, FCR] = [0x3f8, 0x3f9, 0x3fa, 0x3fa] as const
const VECTOR = 0x24

/** A serial port on line 4 of a PIC, whose lines are edge-triggered, and a guest that lets interrupts in. */
function setUp() {
  const pic = new Pic({ onInterrupt() {} })
  const lines = new IrqLines(24, (gsi, asserted) => pic.setInput(gsi, asserted))
  const backend = new RecordingBackend()
  const uart = new Uart({ backend })
  uart.attach(hostOf({ interrupt: lines.line(uart.irq) }))
  const guest = guestWith(pic, uart)
  guest.outb(0x20, 0x11)
  for (const word of [0x20, 0x04, 0x01]) guest.outb(0x21, word)
  /** Calls a handler for each interrupt, with an EOI behind it. Returns how many came. */
  const serve = (handler: () => void) => {
    let count = 0
    for (; pic.pending && count < 100; count++) {
      expect(pic.acknowledge()).toBe(VECTOR)
      handler()
      guest.outb(0x20, 0x20)
    }
    return count
  }
  const receive = (text: string) => backend.guest.receive(new TextEncoder().encode(text))
  return { backend, receive, serve, ...guest }
}

describe('a driver of the serial port', () => {
  it('that sends a byte with each interrupt, and does not look at IIR, sends all', () => {
    const { backend, outb, serve } = setUp()
    const text = [...Buffer.from('Hello')]
    outb(IER, 0x02)
    const count = serve(() => {
      const byte = text.shift()
      if (byte === undefined) outb(IER, 0)
      else outb(DATA, byte)
    })
    expect([backend.text, count]).toEqual(['Hello', 6])
  })

  it('that looks at IIR gets one interrupt for each byte, too', () => {
    const { backend, inb, outb, serve } = setUp()
    const text = [...Buffer.from('Hello')]
    outb(IER, 0x02)
    const count = serve(() => {
      expect(inb(IIR)).toBe(0x02)
      const byte = text.shift()
      if (byte !== undefined) outb(DATA, byte)
    })
    expect([backend.text, count]).toEqual(['Hello', 6])
  })

  it('that reads a byte with each interrupt reads all, without FIFOs, however fast they come', () => {
    const { inb, outb, receive, serve } = setUp()
    outb(IER, 0x01)
    receive('Hello')
    let text = ''
    const count = serve(() => {
      text += String.fromCharCode(inb(DATA))
    })
    expect([text, count]).toEqual(['Hello', 5])
  })

  it('that reads until nothing is there gets one interrupt for what is in the FIFO', () => {
    const { inb, outb, receive, serve } = setUp()
    outb(FCR, 0xc1)
    outb(IER, 0x01)
    receive('Hello')
    let text = ''
    const count = serve(() => {
      while ((inb(0x3fd) & 0x01) !== 0) text += String.fromCharCode(inb(DATA))
    })
    expect([text, count]).toEqual(['Hello', 1])
    receive('!')
    expect(serve(() => inb(DATA))).toBe(1)
  })
})
