import fc from 'fast-check'
import { describe, expect, it } from 'vitest'
import { Uart } from '../../src/devices/serial.js'
import { CountingLine, guestWith, hostOf, RecordingBackend } from './guest.js'

const COM1 = 0x3f8
const [DATA, IER, IIR, LCR, MCR, LSR, MSR, SCR] = [0, 1, 2, 3, 4, 5, 6, 7].map((i) => COM1 + i) as [
  number,
  number,
  number,
  number,
  number,
  number,
  number,
  number,
]
const FCR = IIR

function setUp() {
  const backend = new RecordingBackend()
  const uart = new Uart({ backend })
  const line = new CountingLine()
  uart.attach(hostOf({ interrupt: line }))
  return { backend, uart, line, ...guestWith(uart) }
}

const bytes = (text: string) => new TextEncoder().encode(text)

describe('sending', () => {
  it('what a polling driver sends arrives, in order', () => {
    const { backend, inb, outb } = setUp()
    // Initialisation as OS tutorials have it.
    outb(IER, 0)
    outb(LCR, 0x80)
    outb(DATA, 3)
    outb(IER, 0)
    outb(LCR, 0x03)
    outb(FCR, 0xc7)
    outb(MCR, 0x0b)
    for (const byte of bytes('Hello\r\n')) {
      expect(inb(LSR) & 0x60).toBe(0x60)
      outb(DATA, byte)
    }
    expect(backend.text).toBe('Hello\r\n')
  })

  it('THRE and TEMT are clear while the backend is not ready, and set again when it is', () => {
    const { backend, inb, outb } = setUp()
    backend.ready = false
    expect(inb(LSR)).toBe(0)
    outb(DATA, 0x41)
    expect(backend.text, 'a guest that does not look is not held back').toBe('A')
    backend.ready = true
    expect(inb(LSR)).toBe(0x60)
  })

  it('only the first port is posted', () => {
    const { uart } = setUp()
    expect(uart.ports).toEqual([
      { base: 0x3f8, length: 1, posted: true },
      { base: 0x3f9, length: 7 },
    ])
  })

  it('the base and the name can be chosen', () => {
    const uart = new Uart({ backend: new RecordingBackend(), base: 0x2f8, name: 'COM2' })
    const { inb } = guestWith(uart)
    expect(uart.name).toBe('COM2')
    expect(inb(0x2fd)).toBe(0x60)
  })
})

describe('registers', () => {
  it('have their reset values', () => {
    const { inb } = setUp()
    expect([IER, IIR, LCR, MCR, LSR, MSR, SCR].map(inb)).toEqual([0, 1, 0, 0, 0x60, 0xb0, 0])
  })

  it('the divisor latch is behind DLAB and sends nothing', () => {
    const { backend, inb, outb } = setUp()
    outb(LCR, 0x83)
    expect([inb(DATA), inb(IER)]).toEqual([12, 0])
    outb(DATA, 0x34)
    outb(IER, 0x12)
    expect([inb(DATA), inb(IER)]).toEqual([0x34, 0x12])
    outb(LCR, 0x03)
    expect([inb(DATA), inb(IER)]).toEqual([0, 0])
    expect(backend.sent).toEqual([])
    outb(LCR, 0x83)
    expect([inb(DATA), inb(IER)]).toEqual([0x34, 0x12])
  })

  it('SCR and LCR keep eight bits, IER four, MCR five', () => {
    const { inb, outb } = setUp()
    for (const port of [SCR, IER, MCR, LCR]) outb(port, 0xff)
    expect([inb(SCR), inb(MCR), inb(LCR)]).toEqual([0xff, 0x1f, 0xff])
    outb(LCR, 0)
    expect(inb(IER)).toBe(0x0f)
  })

  it('LSR and MSR ignore writes', () => {
    const { inb, outb } = setUp()
    outb(LSR, 0x1f)
    outb(MSR, 0x0f)
    expect([inb(LSR), inb(MSR)]).toEqual([0x60, 0xb0])
  })

  it('IIR shows whether FIFOs are on, and FCR is not programmed without its bit 0', () => {
    const { inb, outb } = setUp()
    outb(FCR, 0xc1)
    expect(inb(IIR)).toBe(0xc1)
    outb(FCR, 0xc0)
    expect(inb(IIR)).toBe(0x01)
  })
})

describe('receiving', () => {
  it('a polling driver gets the bytes in order, and DR goes with the last', () => {
    const { uart, inb } = setUp()
    expect(uart.receive(bytes('abc'))).toBe(3)
    for (const byte of bytes('abc')) {
      expect(inb(LSR) & 1).toBe(1)
      expect(inb(DATA)).toBe(byte)
    }
    expect(inb(LSR) & 1).toBe(0)
    expect(inb(DATA)).toBe(0)
  })

  it('input that came before the driver reset the FIFOs is not lost', () => {
    const { uart, inb, outb } = setUp()
    uart.receive(bytes('early'))
    outb(IER, 0)
    outb(FCR, 0xc7)
    expect([1, 2, 3, 4, 5].map(() => String.fromCharCode(inb(DATA))).join('')).toBe('early')
  })

  it('a reset of the FIFO discards what the guest could have read', () => {
    const { uart, inb, outb } = setUp()
    outb(FCR, 0x01)
    uart.receive(bytes('x'.repeat(20)))
    inb(LSR)
    outb(FCR, 0x03)
    let rest = 0
    while ((inb(LSR) & 1) !== 0) rest += inb(DATA) === 0x78 ? 1 : 100
    expect(rest).toBe(4)
  })

  it('takes what it has room for, and asks for more when half of it is gone', () => {
    const { uart, backend, inb } = setUp()
    expect(uart.receive(new Uint8Array(5000))).toBe(1024)
    expect(uart.receive(new Uint8Array(5000))).toBe(0)
    let reads = 0
    while (backend.roomCalls === 0) {
      inb(DATA)
      reads++
    }
    expect(reads).toBeGreaterThan(500)
    expect(reads).toBeLessThan(600)
    inb(DATA)
    expect(backend.roomCalls, 'it asks once').toBe(1)
    expect(uart.receive(new Uint8Array(5000))).toBeGreaterThan(400)
  })

  it('does not ask for more when nothing was refused', () => {
    const { uart, backend, inb } = setUp()
    expect(uart.receive(new Uint8Array(1024))).toBe(1024)
    for (let i = 0; i < 1100; i++) inb(DATA)
    expect(backend.roomCalls).toBe(0)
  })
})

describe('loopback', () => {
  it('what is sent is received, and the host sees nothing', () => {
    const { backend, uart, inb, outb } = setUp()
    outb(MCR, 0x1e)
    uart.receive(bytes('from the wire'))
    outb(DATA, 0xae)
    expect(inb(LSR)).toBe(0x61)
    expect(inb(DATA)).toBe(0xae)
    expect(inb(LSR), 'the wire is cut off').toBe(0x60)
    expect(backend.sent).toEqual([])
    outb(MCR, 0x0b)
    expect(inb(DATA)).toBe(0x66)
  })

  it('the modem outputs are the inputs: the test by which Linux finds a UART', () => {
    const { inb, outb } = setUp()
    outb(MCR, 0x10 | 0x0a)
    expect(inb(MSR) & 0xf0).toBe(0x90)
  })

  it('changes of the inputs are reported once', () => {
    const { inb, outb } = setUp()
    outb(MCR, 0x10 | 0x04)
    // CTS, DSR and DCD went, RI came: no trailing edge of RI.
    expect(inb(MSR)).toBe(0x40 | 0x0b)
    expect(inb(MSR)).toBe(0x40)
    outb(MCR, 0x10)
    expect(inb(MSR)).toBe(0x04)
  })

  it('the transmitter is ready whatever the backend is', () => {
    const { backend, inb, outb } = setUp()
    backend.ready = false
    outb(MCR, 0x10)
    expect(inb(LSR)).toBe(0x60)
  })

  it.each([
    ['with FIFOs the newest byte is lost', 0x01, 16, 16],
    ['without FIFOs the oldest byte is lost', 0x00, 1, 17],
  ])('an overrun is reported once; %s', (_, fcr, count, last) => {
    const { inb, outb } = setUp()
    outb(FCR, fcr)
    outb(MCR, 0x10)
    for (let i = 1; i <= 17; i++) outb(DATA, i)
    expect(inb(LSR)).toBe(0x63)
    expect(inb(LSR)).toBe(0x61)
    const received: number[] = []
    while ((inb(LSR) & 1) !== 0) received.push(inb(DATA))
    expect(received).toHaveLength(count)
    expect(received.at(-1)).toBe(last)
  })
})

describe('interrupts', () => {
  it('received data interrupts once, until it is read', () => {
    const { uart, line, inb, outb } = setUp()
    outb(IER, 0x01)
    uart.receive(bytes('a'))
    uart.receive(bytes('b'))
    expect(line.count).toBe(1)
    expect(inb(IIR)).toBe(0x04)
    expect(inb(DATA)).toBe(0x61)
    expect(inb(IIR)).toBe(0x04)
    expect(inb(DATA)).toBe(0x62)
    expect(inb(IIR)).toBe(0x01)
    uart.receive(bytes('c'))
    expect(line.count).toBe(3)
  })

  it.each([
    [0x01, 1],
    [0x41, 4],
    [0x81, 8],
    [0xc1, 14],
  ])('with FCR %i the trigger level is %i; less than that times out', (fcr, level) => {
    const { uart, inb, outb } = setUp()
    outb(FCR, fcr)
    outb(IER, 0x01)
    uart.receive(new Uint8Array(level))
    expect(inb(IIR)).toBe(0xc4)
    inb(DATA)
    expect(inb(IIR)).toBe(level === 1 ? 0xc1 : 0xcc)
  })

  it('the empty transmitter interrupts when it is enabled and after each byte, until IIR is read', () => {
    const { line, inb, outb } = setUp()
    outb(IER, 0x02)
    expect(line.count).toBe(1)
    expect(inb(IIR)).toBe(0x02)
    expect(inb(IIR)).toBe(0x01)
    outb(DATA, 0x41)
    expect(line.count).toBe(2)
    expect(inb(IIR)).toBe(0x02)
    // As Linux tests for the bug of UARTs that forget it.
    outb(IER, 0)
    outb(IER, 0x02)
    expect(inb(IIR)).toBe(0x02)
  })

  it('the empty transmitter interrupts when the backend has become ready', () => {
    const { backend, uart, line, inb, outb } = setUp()
    outb(IER, 0x02)
    inb(IIR)
    backend.ready = false
    outb(DATA, 0x41)
    expect([line.count, inb(IIR)]).toEqual([1, 0x01])
    uart.transmitReady()
    expect(line.count, 'it is not ready yet').toBe(1)
    backend.ready = true
    uart.transmitReady()
    uart.transmitReady()
    expect(line.count).toBe(2)
    expect(inb(IIR)).toBe(0x02)
  })

  it('are identified in the order of their priority', () => {
    const { inb, outb } = setUp()
    outb(MCR, 0x10)
    outb(IER, 0x0f)
    outb(DATA, 1)
    outb(DATA, 2)
    expect(inb(IIR)).toBe(0x06)
    inb(LSR)
    expect(inb(IIR)).toBe(0x04)
    inb(DATA)
    expect(inb(IIR)).toBe(0x02)
    expect(inb(IIR)).toBe(0x00)
    inb(MSR)
    expect(inb(IIR)).toBe(0x01)
  })

  it('that are not enabled do not trigger the line', () => {
    const { uart, line, inb, outb } = setUp()
    uart.receive(bytes('a'))
    outb(DATA, 1)
    outb(MCR, 0x10)
    inb(LSR)
    expect([line.count, inb(IIR)]).toEqual([0, 0x01])
  })
})

describe('state', () => {
  it('is plain data and comes back exactly', () => {
    const { uart, backend, outb } = setUp()
    outb(LCR, 0x80)
    outb(DATA, 1)
    outb(IER, 2)
    outb(LCR, 0x03)
    outb(FCR, 0x81)
    outb(IER, 0x0f)
    outb(MCR, 0x1f)
    outb(SCR, 0x5a)
    for (let i = 0; i < 20; i++) outb(DATA, i)
    backend.ready = false
    outb(MCR, 0x0b)
    outb(DATA, 1)
    uart.receive(new Uint8Array(100).fill(7))
    const state = uart.saveState()
    expect(structuredClone(state)).toEqual(state)

    const copy = setUp()
    copy.backend.ready = false
    copy.uart.restoreState(structuredClone(state))
    expect(copy.uart.saveState()).toEqual(state)
    const received = Array.from({ length: 120 }, () => copy.inb(DATA))
    expect(received.slice(0, 16)).toEqual(Array.from({ length: 16 }, (_, i) => i))
    expect(received.slice(16)).toEqual([...Array(100).fill(7), 0, 0, 0, 0])
  })

  it('restored with a backend that is ready lets a waiting guest go on', () => {
    const { uart, backend, outb } = setUp()
    outb(IER, 0x02)
    backend.ready = false
    outb(DATA, 1)
    const copy = setUp()
    copy.uart.restoreState(uart.saveState())
    expect(copy.line.count).toBe(1)
  })

  it.each([
    [null, 'the state of serial'],
    [{}, 'fcr of the state of serial'],
    [{ fifo: new Uint8Array(17) }, 'fifo'],
    [{ fcr: 0, fifo: new Uint8Array(2) }, 'fifo'],
    [{ wire: new Uint8Array(1025) }, 'wire'],
    [{ mcr: 0x20 }, 'mcr'],
    [{ ier: -1 }, 'ier'],
    [{ divisor: 0x1_0000 }, 'divisor'],
    [{ intr: 1 }, 'intr'],
  ])('29: a state that no UART can have is refused: %o', (change, what) => {
    const { uart, outb } = setUp()
    outb(FCR, 1)
    const before = uart.saveState() as object
    const state = change === null || Object.keys(change).length === 0 ? change : { ...before, ...change }
    expect(() => uart.restoreState(state)).toThrow(
      expect.objectContaining({ code: 'ERR_INVALID_ARGUMENT', message: expect.stringContaining(what) }),
    )
    expect(uart.saveState()).toEqual(before)
  })
})

describe('hostile guests', () => {
  it('24: UART survives every register at every width', () => {
    const { bus, inb } = setUp()
    const view = new DataView(new ArrayBuffer(8))
    for (let value = 0; value < 256; value += 5) {
      for (let port = COM1 - 4; port < COM1 + 9; port++) {
        for (const size of [1, 2, 3, 4, 5, 6, 7, 8]) {
          for (let i = 0; i < 8; i++) view.setUint8(i, value + i)
          bus.writeFrom(view, 0, port, size)
          bus.readInto(view, 0, port, size)
        }
      }
    }
    expect(inb(LSR)).toBeLessThan(0x100)
  })

  it('24: rep outsb and rep insb of any count lose nothing and take no room', () => {
    const { uart, backend, inb, outb } = setUp()
    for (let i = 0; i < 100_000; i++) outb(DATA, i & 0xff)
    expect(backend.sent).toHaveLength(100_000)
    uart.receive(bytes('end'))
    const read = Array.from({ length: 1000 }, () => inb(DATA))
    expect(read.slice(0, 4)).toEqual([...bytes('end'), 0])
  })

  it('23: a flood of input that the guest does not read stays within the queue', () => {
    const { uart } = setUp()
    let taken = 0
    for (let i = 0; i < 100; i++) taken += uart.receive(new Uint8Array(65536))
    expect(taken).toBe(1024)
  })

  it('an interrupt is pending exactly when IIR says so, whatever happened before', () => {
    const operations = fc.array(
      fc.oneof(
        fc.record({ port: fc.integer({ min: COM1, max: COM1 + 7 }), value: fc.nat(255) }),
        fc.record({ port: fc.integer({ min: COM1, max: COM1 + 7 }) }),
        fc.record({ input: fc.uint8Array({ maxLength: 40 }) }),
        fc.record({ ready: fc.boolean() }),
      ),
      { maxLength: 60 },
    )
    fc.assert(
      fc.property(operations, (sequence) => {
        const { uart, backend, line, inb, outb } = setUp()
        let high = false
        let edges = 0
        for (const operation of sequence as {
          port?: number
          value?: number
          input?: Uint8Array
          ready?: boolean
        }[]) {
          if (operation.input !== undefined) uart.receive(operation.input)
          else if (operation.ready !== undefined) {
            backend.ready = operation.ready
            uart.transmitReady()
          } else if (operation.value !== undefined) outb(operation.port!, operation.value)
          else inb(operation.port!)
          const { intr } = uart.saveState() as { intr: boolean }
          const copy = setUp()
          copy.backend.ready = backend.ready
          copy.uart.restoreState(uart.saveState())
          expect((copy.inb(IIR) & 1) === 0).toBe(intr)
          if (intr && !high) edges++
          high = intr
          // An access may end one interrupt and begin another: then there is an edge in between.
          expect(line.count).toBeGreaterThanOrEqual(edges)
        }
      }),
    )
  })
})
