import { createHash, randomBytes } from 'node:crypto'
import { once } from 'node:events'
import { Writable } from 'node:stream'
import { text } from 'node:stream/consumers'
import { finished } from 'node:stream/promises'
import fc from 'fast-check'
import { describe, expect, it } from 'vitest'
import { ConsolePort } from '../../src/backends/console-port.js'
import { OUTPUT_KEPT, OutputLog } from '../../src/backends/output-log.js'
import { VIRTIO_CONSOLE_F_MULTIPORT, VirtioConsole } from '../../src/virtio/console.js'
import { VIRTIO_F_EVENT_IDX } from '../../src/virtio/features.js'
import { encode, eventually, linked, VIRTQ_DESC_F_INDIRECT, VirtioDriver } from '../helpers/virtio-driver.js'

const MIB = 1024 * 1024
const [RECEIVEQ, TRANSMITQ, CONTROL_RECEIVEQ, CONTROL_TRANSMITQ] = [0, 1, 2, 3]
const [DEVICE_READY, PORT_READY, PORT_OPEN] = [0, 3, 6]

interface SetUpOptions {
  readonly port?: ConsolePort
  readonly multiport?: boolean
  readonly eventIdx?: boolean
}

/** A console's port, and a guest at its other end. */
function setUp({ port = new ConsolePort(), multiport = false, eventIdx = true }: SetUpOptions = {}) {
  const device = new VirtioConsole({
    ports: [{ backend: port, ...(port.name === undefined ? {} : { name: port.name }) }],
  })
  const driver = new VirtioDriver(device)
  const without = (multiport ? 0n : VIRTIO_CONSOLE_F_MULTIPORT) | (eventIdx ? 0n : VIRTIO_F_EVENT_IDX)
  driver.initialize({ features: driver.offered & ~without })
  const transmitq = driver.queue(TRANSMITQ)
  const receiveq = driver.queue(RECEIVEQ)
  return {
    port,
    driver,
    transmitq,
    /** Sends as drivers do: waits until the host has taken it. */
    print: (output: string | Uint8Array) => driver.request(TRANSMITQ, [{ bytes: Buffer.from(output) }]),
    /** Sends what the host takes, and says how many bytes that was. */
    async printPolitely(output: Uint8Array) {
      let sent = 0
      for (const turns = { left: 20 }; turns.left > 0 && sent < output.length; turns.left--) {
        if (transmitq.inFlight === 0) transmitq.add([{ bytes: output.subarray(sent, sent + 16384) }])
        transmitq.kick()
        await turn()
        if (transmitq.used().length > 0) {
          sent += Math.min(16384, output.length - sent)
          turns.left = 20
        }
      }
      return sent
    },
    /** Gives room for input, and reads what came. */
    scan(room = 4096) {
      receiveq.add([{ length: room }])
      receiveq.kick()
      return Buffer.concat(receiveq.used().map(({ data }) => data))
    },
    async control(event: number, value = 1) {
      const bytes = new Uint8Array(Uint16Array.of(0, 0, event, value).buffer)
      await driver.request(CONTROL_TRANSMITQ, [{ bytes }])
    },
    /** Events and values of the control messages that came since the last call. */
    messages() {
      const queue = driver.queue(CONTROL_RECEIVEQ)
      while (queue.freeDescriptors > 0) queue.add([{ length: 64 }])
      queue.kick()
      return queue.used().map(({ data }) => [4, 6].map((offset) => Buffer.from(data).readUint16LE(offset)))
    },
  }
}

const turn = () => new Promise((resolve) => setImmediate(resolve))
const hash = (bytes: Uint8Array) => createHash('sha256').update(bytes).digest('hex')

describe('output', () => {
  it('is there as text, as a stream, and to be waited for', async () => {
    const { port, print } = setUp()
    const match = port.waitFor(/(\w+) login: /)
    const all = text(port)
    await print('Linux\nalpine login: ')
    expect(port.output).toBe('Linux\nalpine login: ')
    expect(await match).toMatchObject({ groups: ['alpine'], before: 'Linux\n' })
    port.close('the machine was closed')
    expect(await all).toBe('Linux\nalpine login: ')
  })

  it('that does not come is missed by name', async () => {
    const lost = setUp({ port: new ConsolePort('agent') }).port.waitFor('pong', { timeout: 1 })
    await expect(lost).rejects.toThrow("Expected 'pong' on the console port 'agent' but it did not come")
    const { port } = setUp()
    const waits = port.waitFor('x')
    port.endOfRun('the run ended with halt')
    await expect(waits).rejects.toMatchObject({
      code: 'ERR_SERIAL_ENDED',
      message: "Expected 'x' on the console but the run ended with halt before it came; there was no output",
    })
  })

  it('is a copy, which the guest cannot change any more', async () => {
    const { port, driver, transmitq } = setUp()
    const address = driver.allocate(8)
    transmitq.add([{ bytes: Buffer.from('original'), address }])
    transmitq.kick()
    await transmitq.settled()
    driver.memory.write(address, Buffer.from('tampered'))
    expect(port.output).toBe('original')
    expect(String(port.read())).toBe('original')
  })

  it.each([true, false])('of some MiB arrives whole, with EVENT_IDX %s', async (eventIdx) => {
    const { port, transmitq } = setUp({ eventIdx })
    const output = randomBytes(5 * MIB)
    const received: Buffer[] = []
    port.on('data', (chunk) => received.push(chunk))
    await turn()
    for (let sent = 0; sent < output.length; ) {
      transmitq.used()
      for (; transmitq.freeDescriptors > 0 && sent < output.length; sent += 10_000) {
        transmitq.add([{ bytes: output.subarray(sent, sent + 10_000) }])
      }
      transmitq.kick()
      await transmitq.settled()
    }
    await eventually(() => received.reduce((sum, { length }) => sum + length, 0) === output.length)
    expect(hash(Buffer.concat(received))).toBe(hash(output))
    expect(port.droppedBytes).toBe(0)
  })

  it('23: that nobody reads is kept up to 1 MiB', async () => {
    const { port, print } = setUp()
    for (let i = 0; i < 30; i++) await print(new Uint8Array(100_000).fill(0x61))
    await print('the end')
    expect(port.output).toHaveLength(MIB)
    expect(port.output.endsWith('the end')).toBe(true)
    expect(port.droppedBytes).toBe(3_000_007 - MIB)
    expect(port.readableLength).toBe(0)
    port.close('the machine was closed')
    expect((await text(port)).length).toBe(MIB)
  })

  it('23: that somebody reads slowly holds the guest back, and is not lost', async () => {
    const { port, printPolitely } = setUp()
    const chunks: Buffer[] = []
    let goOn = () => {}
    const slow = new Writable({
      highWaterMark: 1024,
      write(chunk, _encoding, done) {
        chunks.push(chunk)
        goOn = done
      },
    })
    port.pipe(slow)
    const output = randomBytes(2_500_000)
    let sent = await printPolitely(output)
    expect(sent, 'half a MiB each in the log, in the streams and under way').toBeLessThan(2_000_000)
    while (sent < output.length) {
      goOn()
      await turn()
      sent += await printPolitely(output.subarray(sent))
    }
    port.close('the machine was closed')
    while (!slow.writableFinished) {
      goOn()
      await turn()
    }
    expect([port.droppedBytes, hash(Buffer.concat(chunks))]).toEqual([0, hash(output)])
  })

  it('16: that is read as fast as it comes leaves time for others', async () => {
    const { port, driver, transmitq } = setUp()
    let received = 0
    port.on('data', (chunk) => {
      received += chunk.length
    })
    // The same MiB again and again: 1 GiB.
    const table = encode(linked(new Array(1024).fill({ address: MIB, length: MIB })))
    const address = driver.allocate(table.length, 16)
    driver.memory.write(address, table)
    transmitq.addRaw([{ address, length: table.length, flags: VIRTQ_DESC_F_INDIRECT }])
    driver.notify(TRANSMITQ)
    for (let turns = 0; turns < 10; turns++) await turn()
    expect(received).toBeGreaterThan(0)
    expect(received).toBeLessThan(1024 * MIB)
    await driver.reset()
  })

  it('goes on when the reader has gone', async () => {
    const { port, printPolitely } = setUp()
    const listener = () => {}
    port.on('data', listener)
    port.pause()
    expect(await printPolitely(new Uint8Array(MIB))).toBeLessThan(600_000)
    port.off('data', listener)
    expect(await printPolitely(new Uint8Array(MIB))).toBe(MIB)
    port.on('data', listener)
    port.pause()
    expect(await printPolitely(new Uint8Array(MIB))).toBeLessThan(600_000)
    port.destroy()
    expect(await printPolitely(new Uint8Array(MIB))).toBe(MIB)
  })
})

describe('input', () => {
  it('reaches the guest, also what was written before there was one', async () => {
    const port = new ConsolePort()
    port.write('early ')
    const { scan } = setUp({ port })
    port.write('late')
    expect(String(scan())).toBe('early ')
    await turn()
    expect(String(scan())).toBe('late')
  })

  it('has the back-pressure of a stream, and arrives whole', async () => {
    const { port, scan } = setUp()
    const input = randomBytes(300_000)
    let written = 0
    const write = () => {
      written += 10_000
      return port.write(input.subarray(written - 10_000, written))
    }
    while (write());
    expect(written).toBeLessThan(40_000)
    const received: Buffer[] = []
    const drained = once(port, 'drain')
    let length = 0
    for (let drains = 0; length < input.length; ) {
      const bytes = scan()
      received.push(bytes)
      length += bytes.length
      await turn()
      if (port.writableLength > 0) continue
      if (drains++ === 0) await drained
      while (written < input.length && write());
    }
    expect(hash(Buffer.concat(received))).toBe(hash(input))
  })

  it('waits for a guest that has not opened the port, and then until it is closed', async () => {
    const { port, control, scan } = setUp({ multiport: true })
    let done = false
    port.write('ls\n', () => {
      done = true
    })
    await control(DEVICE_READY)
    await control(PORT_READY)
    expect([scan().length, done]).toEqual([0, false])
    await control(PORT_OPEN)
    expect(String(scan())).toBe('ls\n')
    await turn()
    expect(done).toBe(true)
  })

  it('that the guest never takes does not keep a closed port from finishing, and is no error', async () => {
    const { port } = setUp()
    const written = new Promise((resolve) => port.write('x', resolve))
    port.close('the machine was closed')
    port.resume()
    await Promise.all([written, finished(port)])
  })

  it('to a port that was destroyed says so', async () => {
    const { port } = setUp({ port: new ConsolePort('agent') })
    const written = new Promise((resolve) => port.write('x', resolve))
    port.destroy()
    expect(await written).toMatchObject({
      code: 'ERR_CLOSED',
      message: expect.stringContaining("the console port 'agent'"),
    })
  })
})

describe('the guest', () => {
  it('is told, and tells, who has opened the port', async () => {
    const { port, control, messages } = setUp({ multiport: true, port: new ConsolePort('agent') })
    const events: string[] = []
    port.on('guestOpen', () => events.push(`open ${port.guestOpen}`))
    port.on('guestClose', () => events.push(`close ${port.guestOpen}`))
    await control(DEVICE_READY)
    await control(PORT_READY)
    expect(messages().at(-1)).toEqual([PORT_OPEN, 1])
    expect(port.guestOpen).toBe(false)
    await control(PORT_OPEN)
    expect(port.guestOpen).toBe(true)
    await turn()
    await control(PORT_OPEN, 0)
    await turn()
    expect(events).toEqual(['open true', 'close false'])
    port.destroy()
    expect(messages()).toEqual([[PORT_OPEN, 0]])
  })

  it('23: that opens and closes without end makes no more than two events of it', async () => {
    const port = new ConsolePort()
    const events: string[] = []
    port.on('guestOpen', () => events.push('open'))
    port.on('guestClose', () => events.push('close'))
    const flap = () => {
      for (let i = 0; i < 1000; i++) {
        port.setGuestOpen(true)
        port.setGuestOpen(false)
      }
    }
    flap()
    expect(events, 'not inside an exit').toEqual([])
    await turn()
    expect(events).toEqual(['open', 'close'])
    port.setGuestOpen(true)
    await turn()
    flap()
    port.setGuestOpen(true)
    await turn()
    expect(events.slice(2), 'who came back is told of').toEqual(['open', 'close', 'open'])
    port.close('the machine was closed')
    await turn()
    expect(events.slice(5)).toEqual(['close'])
  })

  it('is open from the start without MULTIPORT, and gone after a reset', async () => {
    const { port, driver } = setUp()
    expect(port.guestOpen).toBe(true)
    await driver.reset()
    expect(port.guestOpen).toBe(false)
  })

  it('is told of the size, also of one from before there was a guest', () => {
    const port = new ConsolePort()
    port.resize({ columns: 100, rows: 40 })
    const { driver } = setUp({ port })
    expect([...driver.readConfig(0, 4)]).toEqual([100, 0, 40, 0])
    port.resize({ columns: 50, rows: 20 })
    expect([...driver.readConfig(0, 4)]).toEqual([50, 0, 20, 0])
    expect(driver.acknowledge()).toBe(2)
    port.close('the machine was closed')
    port.resize({ columns: 51, rows: 20 })
    expect(driver.acknowledge(), 'nobody is there').toBe(0)
  })

  it.each([
    [undefined, 'size'],
    [{ columns: 80 }, 'rows'],
    [{ columns: -1, rows: 25 }, 'columns'],
  ])('has no size of %o', (size, argument) => {
    expect(() => new ConsolePort().resize(size as never)).toThrowError(
      expect.objectContaining({ code: 'ERR_INVALID_ARGUMENT', argument }),
    )
  })
})

describe('OutputLog.appendAll', () => {
  it('does what append does for each byte', () => {
    const pieces = fc.array(
      fc.oneof(
        fc.nat(40),
        fc.constantFrom(1023, 1024, 1025, 70_000, OUTPUT_KEPT - 1, OUTPUT_KEPT, OUTPUT_KEPT + 1, 2_500_000),
      ),
      { maxLength: 6 },
    )
    fc.assert(
      fc.property(pieces, (lengths) => {
        const log = new OutputLog()
        let printed = Buffer.alloc(0)
        for (const [index, length] of lengths.entries()) {
          const bytes = Buffer.from(Uint8Array.from({ length }, (_, i) => (i * 7 + index) & 0xff))
          if (length < 10) for (const byte of bytes) log.append(byte)
          else log.appendAll(bytes)
          printed = Buffer.concat([printed, bytes])
          bytes.fill(0)
        }
        const kept = printed.subarray(Math.max(0, printed.length - OUTPUT_KEPT))
        expect([log.start, log.end]).toEqual([printed.length - kept.length, printed.length])
        expect(log.bytes(0).equals(kept)).toBe(true)
      }),
      { numRuns: 40 },
    )
  })
})
