import { once } from 'node:events'
import { PassThrough, Writable } from 'node:stream'
import { text } from 'node:stream/consumers'
import { finished, pipeline } from 'node:stream/promises'
import { afterEach, describe, expect, it, vi } from 'vitest'
import { SerialPort } from '../../src/backends/serial-port.js'
import { Uart } from '../../src/devices/serial.js'
import { guestWith } from '../devices/guest.js'

const MIB = 1024 * 1024
const LSR = 0x3fd
const THR = 0x3f8
const THRE = 0x20

/** A machine's serial port, and a guest at its other end. */
function setUp() {
  const serial = new SerialPort()
  const uart = new Uart({ backend: serial })
  const { inb, outb } = guestWith(uart)
  return {
    serial,
    uart,
    /** Sends as a careless guest does. */
    print(output: string | Uint8Array) {
      for (const byte of typeof output === 'string' ? Buffer.from(output) : output) outb(THR, byte)
    },
    /** Sends as a driver does, and says how many bytes it got rid of. */
    printPolitely(output: Uint8Array) {
      let sent = 0
      while (sent < output.length && (inb(LSR) & THRE) !== 0) outb(THR, output[sent++]!)
      return sent
    },
    /** Reads what has arrived. */
    scan() {
      let input = ''
      while ((inb(LSR) & 1) !== 0) input += String.fromCharCode(inb(THR))
      return input
    },
  }
}

/** What runs after the code that is on the stack: ticks, promises, and one turn of the event loop. */
const turn = () => new Promise((resolve) => setImmediate(resolve))

afterEach(() => {
  vi.useRealTimers()
})

describe('output', () => {
  it('can be read as a stream, in chunks, not byte by byte', async () => {
    const { serial, print } = setUp()
    const chunks: Buffer[] = []
    serial.on('data', (chunk) => chunks.push(chunk))
    await turn()
    print('Hello, ')
    print('world')
    expect(chunks, 'no listener runs inside an exit').toEqual([])
    await turn()
    expect(chunks.map(String)).toEqual(['Hello, world'])
    print('!')
    await turn()
    expect(chunks.map(String)).toEqual(['Hello, world', '!'])
  })

  it('from before anybody listened is not lost', async () => {
    const { serial, print } = setUp()
    print('early ')
    await turn()
    const chunks: Buffer[] = []
    serial.on('data', (chunk) => chunks.push(chunk))
    print('late')
    await turn()
    expect(Buffer.concat(chunks).toString()).toBe('early late')
  })

  it('can be iterated over, until the machine is closed', async () => {
    const { serial, print } = setUp()
    const all = text(serial)
    print('one ')
    await turn()
    print('two')
    serial.close('the machine was closed')
    expect(await all).toBe('one two')
  })

  it('can be piped, and the pipe ends with the machine', async () => {
    const { serial, print } = setUp()
    const target = new PassThrough()
    const done = pipeline(serial, target)
    print('x'.repeat(200_000))
    serial.close('the machine was closed')
    const [output] = await Promise.all([text(target), done])
    expect(output).toHaveLength(200_000)
  })

  it('is there as text, at once, whoever reads the stream', async () => {
    const { serial, print } = setUp()
    serial.resume()
    print('temperature: 20 °')
    expect(serial.output).toBe('temperature: 20 °')
    await turn()
    expect(serial.output).toBe('temperature: 20 °')
  })

  it('of a read() without listeners is what there is', async () => {
    const { serial, print } = setUp()
    print('abc')
    await turn()
    expect(String(serial.read())).toBe('abc')
    expect(serial.read()).toBeNull()
  })

  it('32: an exception in a listener is not thrown into the device', async () => {
    const { serial, print } = setUp()
    const uncaught = new Promise((resolve) => process.setUncaughtExceptionCaptureCallback(resolve))
    serial.on('data', () => {
      throw new Error('listener')
    })
    await turn()
    print('x')
    expect(await uncaught).toMatchObject({ message: 'listener' })
    process.setUncaughtExceptionCaptureCallback(null)
  })
})

describe('floods', () => {
  it('23: a flood of serial output with no reader stays within 1 MiB', async () => {
    const { serial, print } = setUp()
    const flood = new Uint8Array(MIB).fill(0x61)
    const before = process.memoryUsage().arrayBuffers
    for (let i = 0; i < 8; i++) {
      print(flood)
      await turn()
    }
    print('the end')
    expect(serial.droppedBytes).toBe(7 * MIB + 7)
    expect(serial.output).toHaveLength(MIB)
    expect(serial.output.endsWith('the end')).toBe(true)
    expect(serial.readableLength).toBe(0)
    expect(process.memoryUsage().arrayBuffers - before).toBeLessThan(6 * MIB)

    serial.close('the machine was closed')
    expect((await text(serial)) === `${'a'.repeat(MIB - 7)}the end`, 'what was kept can be read').toBe(true)
    expect(serial.droppedBytes).toBe(7 * MIB + 7)
  })

  it('23: a reader that keeps up gets a flood whole, and the guest is never held back', async () => {
    const { serial, printPolitely } = setUp()
    let received = 0
    serial.on('data', (chunk) => {
      received += chunk.length
    })
    await turn()
    for (let i = 0; i < 100; i++) {
      expect(printPolitely(new Uint8Array(30_000))).toBe(30_000)
      await turn()
    }
    expect([received, serial.droppedBytes]).toEqual([3_000_000, 0])
  })

  it('23: a reader that does not keep up holds back a guest that looks at LSR; nothing is lost', async () => {
    const { serial, printPolitely } = setUp()
    const chunks: Buffer[] = []
    const slow = new Writable({
      highWaterMark: 1024,
      write(chunk, _encoding, done) {
        chunks.push(chunk)
        setImmediate(done)
      },
    })
    serial.pipe(slow)
    const output = Uint8Array.from({ length: 1_000_000 }, (_, i) => (i * 31) >> 3)
    let sent = 0
    let heldBack = 0
    while (sent < output.length) {
      sent += printPolitely(output.subarray(sent))
      if (sent < output.length) heldBack++
      await turn()
    }
    serial.close('the machine was closed')
    await finished(slow)
    expect(heldBack).toBeGreaterThan(5)
    expect(serial.droppedBytes).toBe(0)
    expect(Buffer.compare(Buffer.concat(chunks), output)).toBe(0)
  })

  it('23: a guest that does not look loses the oldest, and still not more than 1 MiB is kept', async () => {
    const { serial, print } = setUp()
    serial.on('data', () => {})
    serial.pause()
    for (let i = 0; i < 3; i++) {
      print(new Uint8Array(MIB))
      await turn()
    }
    expect(serial.droppedBytes).toBeGreaterThanOrEqual(2 * MIB - 200_000)
    expect(serial.output).toHaveLength(MIB)
    expect(serial.readableLength).toBeLessThan(200_000)
  })

  it('a guest that waits for the transmitter goes on when the reader does, or leaves', async () => {
    const { serial, uart, printPolitely } = setUp()
    const listener = () => {}
    serial.on('data', listener)
    serial.pause()
    const sent = printPolitely(new Uint8Array(MIB))
    expect(sent).toBe(64 * 1024)
    const resumed = vi.spyOn(uart, 'transmitReady')
    serial.resume()
    await turn()
    expect(resumed).toHaveBeenCalled()
    expect(serial.ready).toBe(true)

    serial.pause()
    printPolitely(new Uint8Array(MIB))
    expect(serial.ready).toBe(false)
    resumed.mockClear()
    serial.off('data', listener)
    expect([serial.ready, resumed.mock.calls.length > 0]).toEqual([true, true])
  })

  it('a port that its reader destroyed holds back nobody', () => {
    const { serial, print, printPolitely } = setUp()
    serial.on('data', () => {})
    serial.pause()
    serial.destroy()
    expect(printPolitely(new Uint8Array(MIB))).toBe(MIB)
    print('still kept')
    expect(serial.output.endsWith('still kept')).toBe(true)
  })
})

describe('input', () => {
  it('reaches the guest, also what was written before there was one', async () => {
    const serial = new SerialPort()
    serial.write('early ')
    const uart = new Uart({ backend: serial })
    const { inb } = guestWith(uart)
    serial.write('late')
    await turn()
    let input = ''
    while ((inb(LSR) & 1) !== 0) input += String.fromCharCode(inb(THR))
    expect(input).toBe('early late')
  })

  it('is done when the guest has room for it, and everything arrives in order', async () => {
    const { serial, scan } = setUp()
    const input = Array.from({ length: 10_000 }, (_, i) => String.fromCharCode(0x20 + (i % 90))).join('')
    let done = false
    serial.write(input, () => {
      done = true
    })
    await turn()
    expect(done).toBe(false)
    expect(scan()).toBe(input)
    expect(done, 'no callback inside an exit').toBe(false)
    await turn()
    expect(done).toBe(true)
  })

  it('23: has the back-pressure of a stream', async () => {
    const { serial, scan } = setUp()
    let writes = 1
    while (serial.write(Buffer.alloc(1000, 'x'))) writes++
    expect(writes).toBeLessThan(30)
    const drained = once(serial, 'drain')
    let received = 0
    while (received < writes * 1000) {
      received += scan().length
      await turn()
    }
    await drained
    expect(received).toBe(writes * 1000)
  })

  it('that the guest never takes does not keep a closed port from finishing, and is no error', async () => {
    const { serial } = setUp()
    const errors: unknown[] = []
    serial.on('error', (error) => errors.push(error))
    const written = new Promise((resolve) => serial.write('x'.repeat(5000), resolve))
    serial.write('more')
    serial.close('the machine was closed')
    serial.resume()
    await Promise.all([written, finished(serial)])
    expect(errors).toEqual([])
  })

  it('that comes after the machine has ended goes nowhere, and is no error, read or not', async () => {
    const { serial, print } = setUp()
    const errors: unknown[] = []
    serial.on('error', (error) => errors.push(error))
    print('last words')
    serial.close('the machine was closed')
    serial.close('the machine was closed')
    await new Promise((resolve) => serial.write('late', resolve))
    await turn()
    expect(await text(serial)).toBe('last words')
    serial.write('later')
    await turn()
    serial.write('even later')
    await turn()
    expect(errors).toEqual([])
  })

  it('that ends the stream leaves the output open', async () => {
    const { serial, print, scan } = setUp()
    serial.end('bye')
    expect(scan()).toBe('bye')
    const all = text(serial)
    print('still here')
    await turn()
    serial.close('the machine was closed')
    expect(await all).toBe('still here')
  })

  it('that the guest never takes fails when the port is destroyed, without an error event', async () => {
    const { serial } = setUp()
    const written = new Promise((resolve) => serial.write('x'.repeat(5000), resolve))
    serial.destroy()
    expect(await written).toMatchObject({ code: 'ERR_CLOSED' })
  })

  it('from a pipe is unhooked when the machine is closed', async () => {
    const { serial, scan } = setUp()
    const source = new PassThrough()
    source.pipe(serial)
    source.write('a')
    await turn()
    expect(scan()).toBe('a')
    serial.resume()
    serial.close('the machine was closed')
    await turn()
    source.write('b')
    await turn()
    expect(source.listenerCount('data')).toBe(0)
    expect(serial.destroyed).toBe(true)
  })
})

describe('waitFor', () => {
  it('finds what comes later', async () => {
    const { serial, print } = setUp()
    const match = serial.waitFor('login: ')
    print('Welcome\nlog')
    await turn()
    print('in: ')
    expect(await match).toEqual({ text: 'login: ', before: 'Welcome\n', groups: [], namedGroups: {} })
  })

  it('finds what came before the call, and goes on behind each match', async () => {
    const { serial, print } = setUp()
    print('one $ two $ three')
    expect(await serial.waitFor('$')).toMatchObject({ before: 'one ' })
    expect(await serial.waitFor('$')).toMatchObject({ before: ' two ' })
    const third = serial.waitFor('$')
    await turn()
    print(' $')
    expect(await third).toMatchObject({ before: ' three ' })
  })

  it('does not depend on anybody reading the stream, and does not take from it', async () => {
    const { serial, print } = setUp()
    print('abc')
    await serial.waitFor('abc')
    serial.close('the machine was closed')
    expect(await text(serial)).toBe('abc')
    expect(await serial.waitFor('abc').catch((error) => error.code)).toBe('ERR_SERIAL_ENDED')
  })

  it('takes regular expressions, with groups, over the boundaries of chunks', async () => {
    const { serial, print } = setUp()
    const match = serial.waitFor(/version (?<major>\d+)\.(\d+)(-rc)?\n/)
    for (const char of 'Linux version 6.1\nnext') {
      print(char)
      await turn()
    }
    expect(await match).toEqual({
      text: 'version 6.1\n',
      before: 'Linux ',
      groups: ['6', '1', undefined],
      namedGroups: { major: '6' },
    })
    expect(await serial.waitFor(/n\w+/)).toMatchObject({ text: 'next', before: '' })
  })

  it.each(['g', 'y', 'gy', 'gi', 'yu', 'dgs'])(
    'flags %s do not carry over from one call to the next',
    async (flags) => {
      const { serial, print } = setUp()
      const pattern = new RegExp('ok', flags)
      pattern.lastIndex = 5
      print('.......ok ok ok')
      for (let i = 0; i < 3; i++) expect(await serial.waitFor(pattern)).toMatchObject({ text: 'ok' })
      expect(pattern.lastIndex, "the caller's object is not touched").toBe(5)
    },
  )

  it('^ is the end of the previous match, with flag m also the start of a line, and nothing else', async () => {
    const { serial, print } = setUp()
    const anchored = serial.waitFor(/^b/)
    const line = serial.waitFor(/^b/m)
    // More than the window in which a search begins anew, so that it begins inside of this.
    for (let i = 0; i < 100; i++) {
      print('ab'.repeat(1024))
      await turn()
    }
    print('\nb')
    expect((await line).before).toHaveLength(204_801)
    print('b')
    await turn()
    serial.endOfRun('the run ended')
    await expect(anchored).rejects.toThrow('the run ended')
    expect(await serial.waitFor(/^b/)).toMatchObject({ before: '' })
  })

  it('reads UTF-8, cut anywhere, and goes on behind the right byte', async () => {
    const { serial, print } = setUp()
    const match = serial.waitFor(/✓+ (\S+)!/)
    for (const byte of Buffer.from('é✓✓ fährt🚀!🚀 and')) {
      print(Uint8Array.of(byte))
      await turn()
    }
    expect(await match).toMatchObject({ text: '✓✓ fährt🚀!', before: 'é', groups: ['fährt🚀'] })
    expect(await serial.waitFor(' and')).toMatchObject({ before: '🚀' })
  })

  it('does not stumble over what is not UTF-8', async () => {
    const { serial, print } = setUp()
    print(Uint8Array.of(0xc3, 0xff, 0x80, 0x41, 0xe2, 0x42, 0xf0, 0x9f, 0x43))
    expect(await serial.waitFor(/A/)).toMatchObject({ before: '\ufffd\ufffd\ufffd' })
    expect(await serial.waitFor('B')).toMatchObject({ before: '\ufffd' })
    expect(await serial.waitFor(/C/)).toMatchObject({ before: '\ufffd' })
  })

  it('calls that overlap each count from where they began', async () => {
    const { serial, print } = setUp()
    const waits = Promise.all([serial.waitFor('b'), serial.waitFor(/a/), serial.waitFor('b')])
    print('abc')
    expect((await waits).map(({ text }) => text)).toEqual(['b', 'a', 'b'])
    expect(await serial.waitFor('c')).toMatchObject({ before: '' })
  })

  it('ends after the timeout, with the end of the output', async () => {
    vi.useFakeTimers()
    const { serial, print } = setUp()
    print(`${'x'.repeat(1000)}\x1b[1mKernel panic\n`)
    const match = serial.waitFor('login:', { timeout: 1500 })
    const failure = expect(match).rejects.toMatchObject({
      code: 'ERR_TIMEOUT',
      timeout: 1500,
      pattern: 'login:',
      message: expect.stringMatching(
        /^Expected 'login:' on the serial port but it did not come within 1500 ms; output ends with "x{183}\\u001b\[1mKernel panic\\n"$/,
      ),
    })
    vi.advanceTimersByTime(1500)
    await failure
    expect(vi.getTimerCount()).toBe(0)
    const silent = setUp().serial.waitFor(/a/, { timeout: 1 })
    vi.advanceTimersByTime(1)
    await expect(silent).rejects.toThrow(
      'Expected /a/ on the serial port but it did not come within 1 ms; there was no output',
    )
  })

  it('leaves no timer and no listener behind', async () => {
    vi.useFakeTimers()
    const { serial, print } = setUp()
    const { signal } = new AbortController()
    const added = vi.spyOn(signal, 'addEventListener')
    const removed = vi.spyOn(signal, 'removeEventListener')
    const match = serial.waitFor('x', { timeout: 1000, signal })
    print('x')
    vi.runAllTicks()
    await match
    expect(vi.getTimerCount()).toBe(0)
    expect(added.mock.calls.length).toBe(1)
    expect(removed.mock.calls).toEqual(added.mock.calls)
  })

  it('can be aborted, before and while it waits', async () => {
    const { serial } = setUp()
    const reason = new Error('enough')
    await expect(serial.waitFor('x', { signal: AbortSignal.abort(reason) })).rejects.toMatchObject({
      code: 'ERR_ABORTED',
      cause: reason,
    })
    const controller = new AbortController()
    const match = serial.waitFor('x', { signal: controller.signal })
    controller.abort(reason)
    await expect(match).rejects.toMatchObject({ code: 'ERR_ABORTED', cause: reason })
  })

  it('ends with the run, and a later run can go on', async () => {
    const { serial, print } = setUp()
    const lost = serial.waitFor('never')
    const found = serial.waitFor('last words')
    print('last words')
    serial.endOfRun('the run ended with halt')
    await expect(lost).rejects.toMatchObject({
      code: 'ERR_SERIAL_ENDED',
      message: `Expected 'never' on the serial port but the run ended with halt before it came; output ends with "last words"`,
    })
    expect(await found).toMatchObject({ text: 'last words' })
    const again = serial.waitFor('more')
    print('more')
    expect(await again).toMatchObject({ before: '' })
  })

  it('after the port was closed finds what is there, and ends at once otherwise', async () => {
    const { serial, print } = setUp()
    print('ready')
    serial.close('the machine was closed')
    serial.close('closed again')
    expect(await serial.waitFor('ready')).toMatchObject({ text: 'ready' })
    await expect(serial.waitFor('more')).rejects.toThrow('but the machine was closed before it came')
  })

  it('that fails before anybody awaits it does not end the process', async () => {
    const { serial } = setUp()
    const match = serial.waitFor('x')
    serial.endOfRun('the run ended')
    // vitest fails a run in which a rejection goes unhandled.
    await turn()
    await expect(match).rejects.toMatchObject({ code: 'ERR_SERIAL_ENDED' })
  })

  it.each([
    ['', undefined, 'pattern'],
    [5, undefined, 'pattern'],
    [undefined, undefined, 'pattern'],
    ['x', 5, 'options'],
    ['x', null, 'options'],
    ['x', { timeout: -1 }, 'timeout'],
    ['x', { timeout: Number.NaN }, 'timeout'],
    ['x', { timeout: 2 ** 31 }, 'timeout'],
    ['x', { timeout: '5' }, 'timeout'],
    ['x', { signal: new AbortController() }, 'signal'],
  ])('refuses waitFor(%o, %o)', async (pattern, options, argument) => {
    await expect(setUp().serial.waitFor(pattern as never, options as never)).rejects.toMatchObject({
      code: 'ERR_INVALID_ARGUMENT',
      argument,
    })
  })

  it('23: a flood in small pieces is searched without searching everything again', async () => {
    const { serial, print } = setUp()
    const searched = vi.spyOn(RegExp.prototype, 'exec')
    const match = serial.waitFor(/the (end)$/)
    for (let i = 0; i < 512; i++) {
      print('0123456789abcdef'.repeat(128))
      await turn()
    }
    print('the end')
    expect(await match).toMatchObject({ text: 'the end' })
    const lengths = searched.mock.calls.map(([text]) => text.length)
    searched.mockRestore()
    expect(lengths.length).toBeGreaterThan(500)
    expect(Math.max(...lengths)).toBeLessThanOrEqual(64 * 1024 + 2048)
  })

  it('23: what the flood has pushed out is not found, what is left is', async () => {
    const { serial, print } = setUp()
    print('early')
    print(new Uint8Array(MIB).fill(0x2e))
    print('late')
    expect((await serial.waitFor('late')).before).toHaveLength(MIB - 4)
    const early = serial.waitFor('early')
    serial.endOfRun('the run ended')
    await expect(early).rejects.toMatchObject({ code: 'ERR_SERIAL_ENDED' })
  })
})
