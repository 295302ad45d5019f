import { text } from 'node:stream/consumers'
import { describe, expect, it } from 'vitest'
import { DebugOutput } from '../../src/backends/debug-output.js'
import { DebugConsole } from '../../src/devices/debug-console.js'
import { guestWith } from '../devices/guest.js'

function setUp() {
  const debug = new DebugOutput()
  const { outb } = guestWith(new DebugConsole({ backend: debug }))
  const print = (output: string | Uint8Array) => {
    for (const byte of Buffer.from(output)) outb(0xe9, byte)
  }
  return { debug, print }
}

describe('DebugOutput', () => {
  it('has what the guest wrote as text and as a stream', async () => {
    const { debug, print } = setUp()
    print('debug ')
    const all = text(debug)
    print('output')
    expect(debug.output).toBe('debug output')
    debug.close('the machine was closed')
    expect(await all).toBe('debug output')
  })

  it('can be waited for, and names itself in errors', async () => {
    const { debug, print } = setUp()
    const match = debug.waitFor(/o+/)
    print('foo bar')
    expect(await match).toMatchObject({ text: 'oo', before: 'f' })
    const lost = debug.waitFor('baz')
    debug.endOfRun('the run ended with halt')
    await expect(lost).rejects.toThrow(
      `Expected 'baz' on the debug console but the run ended with halt before it came; output ends with "foo bar"`,
    )
  })

  it('23: a flood with no reader stays within 1 MiB', async () => {
    const { debug, print } = setUp()
    print(new Uint8Array(3 * 1024 * 1024))
    print('the end')
    expect(debug.droppedBytes).toBe(2 * 1024 * 1024 + 7)
    expect(debug.output).toHaveLength(1024 * 1024)
    debug.close('the machine was closed')
    expect((await text(debug)).endsWith('the end')).toBe(true)
  })

  it('23: a flood with a reader that stopped reading stays within 1 MiB', async () => {
    const { debug, print } = setUp()
    debug.on('data', () => {})
    debug.pause()
    for (let i = 0; i < 3; i++) {
      print(new Uint8Array(1024 * 1024))
      await new Promise(setImmediate)
    }
    expect(debug.droppedBytes + debug.readableLength).toBeGreaterThanOrEqual(2 * 1024 * 1024)
    expect(debug.readableLength).toBeLessThan(200_000)
  })
})
