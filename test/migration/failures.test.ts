import fc from 'fast-check'
import { describe, expect, it, onTestFinished } from 'vitest'
import { type NodevisorError, type RunResult, VirtualMachine } from '../../src/index.js'
import { Connection, FRAME, type Frame, PIECE_SIZE, recordFrames, u32 } from '../../src/migration/protocol.js'
import { decodeState, encodeState, type SnapshotRecord } from '../../src/snapshot/state-file.js'
import { EchoHashDevice } from '../helpers/echo-hash-device.js'
import { times } from '../helpers/guests.js'
import { RUN_LIMIT } from '../helpers/limits.js'
import { errorWith, vcpuThreads } from '../machine/boot.js'
import {
  answerOf,
  bootContinuity,
  duplexPair,
  type Fate,
  openFiles,
  type PassingFrame,
  watchedPair,
} from './machines.js'

const SUCCESS = { reason: 'debug-exit', code: 16 }
const FAILED = { status: 'rejected', reason: { code: 'ERR_MIGRATION_FAILED' } }

/** A guest that runs long enough for a test to disturb it, and its answer. */
const WORK = 'rounds=60000 device=1'
let answer: string | undefined

async function start(): Promise<{
  vm: VirtualMachine
  run: Promise<RunResult>
  expectAnswer(): Promise<void>
}> {
  const options = { execution: 'threads', irqchip: 'full' } as const
  if (answer === undefined) {
    const undisturbed = await bootContinuity(WORK, { ...options, devices: [new EchoHashDevice()] })
    expect(await undisturbed.run({ timeout: RUN_LIMIT })).toMatchObject(SUCCESS)
    answer = answerOf(undisturbed)
  }
  const vm = await bootContinuity(WORK, { ...options, devices: [new EchoHashDevice()] })
  const run = vm.run({ timeout: RUN_LIMIT })
  await vm.serial.waitFor('continuity: started')
  return {
    vm,
    run,
    async expectAnswer() {
      expect(await run).toMatchObject(SUCCESS)
      expect(answerOf(vm)).toBe(answer)
    },
  }
}

/** Tries to move a machine past somebody who decides about each frame. */
async function attempt(vm: VirtualMachine, decide: (frame: PassingFrame) => Fate) {
  const frames: PassingFrame[] = []
  const [here, there] = watchedPair((frame) => {
    frames.push(frame)
    return decide(frame)
  })
  const [received, moved] = await Promise.allSettled([
    VirtualMachine.receive(there, { devices: [new EchoHashDevice()] }),
    vm.migrate(here),
  ])
  expect([here.destroyed, there.destroyed]).toEqual([true, true])
  if (received.status === 'fulfilled') onTestFinished(() => received.value.close())
  return { received, moved, frames }
}

const reasonOf = (settled: PromiseSettledResult<unknown>) =>
  settled.status === 'rejected' ? (settled.reason as NodevisorError) : undefined

describe('a machine whose move fails goes on as if nothing had been', () => {
  it.each(['cut', 'halve'] as const)(
    'where the connection ends (%s) at any frame before the last',
    async (fate) => {
      const { vm, run, expectAnswer } = await start()
      let count = 0
      for (let end = 0, over = false; !over && end < 60; end++) {
        let seen = 0
        const { received, moved } = await attempt(vm, ({ type }) => {
          // GO is where it becomes uncertain: see below.
          if (type === FRAME.GO) over = true
          return over || seen++ === end ? fate : 'pass'
        })
        if (over) {
          expect(reasonOf(moved)).toMatchObject({ code: 'ERR_MIGRATION_FAILED', uncertain: true })
          vm.resume()
        } else {
          expect([received, moved]).toMatchObject([FAILED, FAILED])
          expect(reasonOf(moved)).not.toHaveProperty('uncertain')
        }
        expect([vm.running, vm.paused]).toEqual([true, false])
        count++
      }
      expect(count).toBeGreaterThan(5)
      await Promise.race([run, Promise.resolve()])
      await expectAnswer()
    },
  )

  it('where the other side answers with garbage', async () => {
    const { vm, expectAnswer } = await start()
    const garbage = [
      Buffer.from('HTTP/1.1 400 Bad Request\r\n\r\n'),
      u32(0xffff_ffff, 0xffff_ffff),
      u32(FRAME.READY, 1),
      u32(FRAME.RUNNING, 0),
      u32(FRAME.PAGES, 4),
      Buffer.alloc(64),
    ]
    for (const bytes of garbage) {
      const { moved } = await attempt(vm, ({ from }) => (from === 'target' ? bytes : 'pass'))
      expect(moved).toMatchObject(FAILED)
    }
    await expectAnswer()
  })

  it('where the other side refuses, and says so', async () => {
    const { vm, expectAnswer } = await start()
    const [here, there] = duplexPair()
    const [received, moved] = await Promise.allSettled([VirtualMachine.receive(there), vm.migrate(here)])
    expect(reasonOf(received)).toMatchObject({ cause: { code: 'ERR_SNAPSHOT_MISMATCH' } })
    expect(reasonOf(moved)).toMatchObject({
      code: 'ERR_MIGRATION_FAILED',
      remoteCode: 'ERR_SNAPSHOT_MISMATCH',
      remoteMessage: expect.stringContaining('echo-hash'),
      message: expect.stringContaining('echo-hash'),
    })
    await expectAnswer()
  })

  it('where what the other side says is no text to be shown', async () => {
    const { vm, expectAnswer } = await start()
    const says = (text: string) => Buffer.concat([u32(FRAME.ERROR, text.length), Buffer.from(text)])
    for (const text of ['', '[]', 'null', '{"message":5}', '{"message":"\\u001b[2J","code":"\\u0000"}']) {
      const { moved } = await attempt(vm, ({ from }) => (from === 'target' ? says(text) : 'pass'))
      const reason = reasonOf(moved)!
      expect(reason.code).toBe('ERR_MIGRATION_FAILED')
      expect(reason.message).not.toMatch(/\p{C}/u)
    }
    await expectAnswer()
  })

  it('where it was given up', async () => {
    const { vm, expectAnswer } = await start()
    // At each frame in turn; after GO it is too late.
    for (let end = 0, over = false; !over && end < 60; end++) {
      const stop = new AbortController()
      let seen = 0
      const [here, there] = watchedPair(({ type }) => {
        if (type === FRAME.STATE) over = true
        if (over || seen++ === end) stop.abort(new Error('enough'))
        return 'pass'
      })
      const [received, moved] = await Promise.allSettled([
        VirtualMachine.receive(there, { devices: [new EchoHashDevice()] }),
        vm.migrate(here, { signal: stop.signal }),
      ])
      expect([received, moved]).toMatchObject([FAILED, FAILED])
      expect(reasonOf(moved)).toMatchObject({ cause: { message: 'enough' } })
    }
    await expectAnswer()
  })

  it('where the other side was closed, or gives up', async () => {
    const { vm, expectAnswer } = await start()
    const [here, there] = duplexPair()
    there.destroy()
    await expect(vm.migrate(here)).rejects.toEqual(errorWith('ERR_MIGRATION_FAILED'))
    const [here2, there2] = duplexPair()
    const stop = AbortSignal.abort(new Error('not now'))
    const [received, moved] = await Promise.allSettled([
      VirtualMachine.receive(there2, { signal: stop }),
      vm.migrate(here2),
    ])
    expect([received, moved]).toMatchObject([FAILED, FAILED])
    await expectAnswer()
  })

  it('where the host is of another kind', async () => {
    const { vm, expectAnswer } = await start()
    const { received, moved } = await attempt(vm, ({ type, bytes }) => {
      if (type !== FRAME.RECORD) return 'pass'
      const record = decodeState(bytes.subarray(8))
      const kind = record.host.kind === 'pvm' ? 'hardware' : 'pvm'
      const patched = encodeState({ ...record, host: { ...record.host, kind } })
      return Buffer.concat([u32(FRAME.RECORD, patched.length), patched])
    })
    expect([received, moved]).toMatchObject([FAILED, FAILED])
    expect(reasonOf(moved)).toMatchObject({ remoteCode: 'ERR_SNAPSHOT_HOST' })
    await expectAnswer()
  })

  it('and leaves nothing behind', async () => {
    const { vm, expectAnswer } = await start()
    const fail = (end: number) =>
      attempt(vm, ({ index, from }) => (from === 'source' && index === end ? 'cut' : 'pass'))
    await fail(3)
    const before = openFiles()
    for (let end = 0; end < 6; end++) expect((await fail(end)).moved).toMatchObject(FAILED)
    expect(openFiles()).toBe(before)
    expect(vcpuThreads()).toBeLessThanOrEqual(1)
    await expectAnswer()
  })
})

describe('the moment of handing over', () => {
  it('leaves a machine paused where nobody knows whether it runs there; resume() lets it go on', async () => {
    const { vm, expectAnswer } = await start()
    const { received, moved } = await attempt(vm, ({ type }) => (type === FRAME.GO ? 'cut' : 'pass'))
    expect([received, moved]).toMatchObject([FAILED, FAILED])
    expect(reasonOf(moved)).toMatchObject({ uncertain: true, message: expect.stringContaining('resume()') })
    expect([vm.running, vm.paused]).toEqual([true, true])
    await expect(vm.snapshot()).rejects.toEqual(errorWith('ERR_RUNNING', 'resume()'))
    vm.resume()
    await expectAnswer()
  })

  it('gives the machine to the other side even where that cannot say so any more', async () => {
    const { vm, run } = await start()
    const { received, moved } = await attempt(vm, ({ type }) => (type === FRAME.RUNNING ? 'cut' : 'pass'))
    expect(reasonOf(moved)).toMatchObject({ uncertain: true })
    const other = (received as PromiseFulfilledResult<VirtualMachine>).value
    expect(await other.run({ timeout: RUN_LIMIT })).toMatchObject(SUCCESS)
    expect(answerOf(vm, other)).toBe(answer)
    await vm.close()
    expect(await run).toMatchObject({ reason: 'stopped', by: 'close' })
  })

  it('may be when a machine is stopped or closed: it is either here or there', async () => {
    for (const type of [FRAME.RECORD, FRAME.PAGES, FRAME.STATE, FRAME.GO]) {
      const { vm, run } = await start()
      const { received, moved } = await attempt(vm, (frame) => {
        if (frame.type === type) void vm.close()
        return 'pass'
      })
      expect(received.status).toBe(moved.status)
      expect((await run).reason).toMatch(/stopped|migrated/)
    }
  })

  it('is only once: a machine is moved by one at a time', async () => {
    const { vm, run } = await start()
    const [here, there] = duplexPair()
    const moved = vm.migrate(here)
    await expect(vm.migrate(duplexPair()[0])).rejects.toEqual(errorWith('ERR_RUNNING', 'being moved'))
    const other = await VirtualMachine.receive(there, { devices: [new EchoHashDevice()] })
    onTestFinished(() => other.close())
    await moved
    await run
  })
})

describe('what is received is not trusted', () => {
  /** The frames that a machine is sent in. */
  async function recorded(): Promise<Buffer[]> {
    const vm = await bootContinuity('rounds=100')
    const frames: Buffer[] = []
    const [here, there] = watchedPair(({ from, bytes }) => {
      if (from === 'source') frames.push(Buffer.from(bytes))
      return 'pass'
    })
    const [other] = await Promise.all([VirtualMachine.receive(there), vm.migrate(here)])
    await other.close()
    return frames
  }

  /** Sends bytes to a receiver, and lets it read what there is. */
  async function receive(bytes: Uint8Array): Promise<unknown> {
    const [here, there] = duplexPair()
    here.on('error', () => {}).resume()
    here.end(bytes)
    try {
      const vm = await VirtualMachine.receive(there)
      await vm.close()
      return undefined
    } catch (error) {
      return error
    } finally {
      here.destroy()
    }
  }

  it('takes what was recorded, as it is', async () => {
    expect(await receive(Buffer.concat(await recorded()))).toBe(undefined)
  })

  it('refuses anything else with a typed error', { timeout: 60_000 }, async () => {
    const frames = await recorded()
    const whole = Buffer.concat(frames)
    const before = openFiles()
    await fc.assert(
      fc.asyncProperty(
        fc.oneof(
          fc.uint8Array({ maxLength: 200 }),
          // Other frames in another order.
          fc
            .array(fc.integer({ min: 0, max: frames.length - 1 }), { maxLength: 12 })
            .map((order) => Buffer.concat(order.map((index) => frames[index]!))),
          // Cut off, or with some bytes changed: most of them are memory, which may be anything.
          fc
            .tuple(fc.integer({ min: 0, max: 40_000 }), fc.integer({ min: 1, max: 255 }))
            .map(([at, change]) => {
              const changed = Buffer.from(whole)
              changed[at % changed.length]! ^= change
              return changed
            }),
          fc.integer({ min: 0, max: whole.length - 1 }).map((length) => whole.subarray(0, length)),
        ),
        async (bytes) => {
          const error = await receive(bytes)
          if (error !== undefined) expect(error).toEqual(errorWith('ERR_MIGRATION_FAILED'))
        },
      ),
      { numRuns: times(150) },
    )
    expect(openFiles()).toBe(before)
  })

  const frame = (type: number, ...parts: Uint8Array[]) => {
    const payload = Buffer.concat(parts)
    return Buffer.concat([u32(type, payload.length), payload])
  }

  it.each([
    ['an unknown kind', [u32(99, 0)]],
    ['a kind of the other side', [u32(FRAME.READY, 0)]],
    ['a huge frame', [u32(FRAME.RECORD, 0xffff_ffff)]],
    ['another version', [frame(FRAME.HELLO, u32(2))]],
    ['a version that is missing', [u32(FRAME.HELLO, 0)]],
    ['an empty record', [frame(FRAME.HELLO, u32(1)), frame(FRAME.RECORD)]],
    [
      'a record without end',
      [frame(FRAME.HELLO, u32(1)), ...Array(70).fill(frame(FRAME.RECORD, new Uint8Array(PIECE_SIZE)))],
    ],
    [
      'a record in two kinds',
      [frame(FRAME.HELLO, u32(1)), frame(FRAME.RECORD, new Uint8Array(PIECE_SIZE)), frame(FRAME.STATE)],
    ],
  ])('refuses %s', async (_name, bytes) => {
    expect(await receive(Buffer.concat(bytes))).toEqual(errorWith('ERR_MIGRATION_FAILED'))
  })

  it.each([
    ['pages behind the last', (pages: number) => frame(FRAME.PAGES, u32(pages), new Uint8Array(4096))],
    [
      'pages that begin within it',
      (pages: number) => frame(FRAME.PAGES, u32(pages - 1), new Uint8Array(8192)),
    ],
    ['half a page', () => frame(FRAME.PAGES, u32(0), new Uint8Array(100))],
    ['no page', () => frame(FRAME.PAGES, u32(0))],
    ['zeros behind the last', (pages: number) => frame(FRAME.ZERO, u32(pages, 1))],
    ['far too many zeros', () => frame(FRAME.ZERO, u32(1, 0xffff_ffff))],
    ['no zeros', () => frame(FRAME.ZERO, u32(1, 0))],
    ['GO before the state', () => frame(FRAME.GO)],
  ])('refuses %s', async (_name, make) => {
    const [hello, record] = (await recorded()) as [Buffer, Buffer]
    const bytes = Buffer.concat([hello, record, make((16 * 2 ** 20) / 4096)])
    expect(await receive(bytes)).toEqual(errorWith('ERR_MIGRATION_FAILED'))
  })

  it.each([
    [
      'more memory than there is',
      ({ hardware, memory, ...rest }: SnapshotRecord) => ({
        ...rest,
        hardware: { ...hardware, memorySize: 2 ** 42 },
        memory: { ...memory, size: 2 ** 42 },
      }),
      'ERR_MEMORY_SIZE',
    ],
    [
      'features that this host lacks',
      ({ host, ...rest }: SnapshotRecord) => ({ ...rest, host: { ...host, features: ['no-such-thing'] } }),
      'ERR_SNAPSHOT_HOST',
    ],
    [
      'disks',
      ({ hardware, ...rest }: SnapshotRecord) => ({
        ...rest,
        hardware: { ...hardware, disks: [{}] },
        disks: [{ kind: 'file', path: '/etc/passwd', size: 512, modified: '0' }],
      }),
      'ERR_SNAPSHOT_MISMATCH',
    ],
  ])('refuses %s', async (_name, patch, code) => {
    const [hello, record] = (await recorded()) as [Buffer, Buffer]
    const patched = encodeState(patch(decodeState(record.subarray(8))) as SnapshotRecord)
    const frames = recordFrames(FRAME.RECORD, patched).map(({ parts }) => frame(FRAME.RECORD, ...parts!))
    expect(await receive(Buffer.concat([hello, ...frames]))).toMatchObject({
      code: 'ERR_MIGRATION_FAILED',
      cause: { code },
    })
  })
})

describe('a connection', () => {
  it('is given up where the other side says nothing for too long', async () => {
    const [here, there] = duplexPair()
    const connection = new Connection(here, 50)
    await expect(connection.receive()).rejects.toEqual(errorWith('ERR_MIGRATION_FAILED', '0.05 s'))
    there.destroy()
    connection.close()
  })

  it('is given up where the other side does not read', async () => {
    const [here, there] = duplexPair()
    const connection = new Connection(here, 50)
    const send = async () => {
      for (;;) await connection.send({ type: FRAME.RECORD, parts: [new Uint8Array(PIECE_SIZE)] })
    }
    await expect(send()).rejects.toEqual(errorWith('ERR_MIGRATION_FAILED', '0.05 s'))
    there.destroy()
    connection.close()
  })

  it('takes frames in any pieces', async () => {
    const [here, there] = duplexPair()
    const connection = new Connection(there)
    const bytes = Buffer.concat([
      u32(FRAME.ZERO, 8),
      u32(5, 6),
      u32(FRAME.GO, 0),
      u32(FRAME.HELLO, 4),
      u32(1),
    ])
    void (async () => {
      for (const byte of bytes) await new Promise((resolve) => here.write(Uint8Array.of(byte), resolve))
    })()
    const frames: Frame[] = []
    for (let i = 0; i < 3; i++) frames.push(await connection.receive())
    expect(frames.map(({ type, payload }) => [type, [...payload]])).toEqual([
      [FRAME.ZERO, [5, 0, 0, 0, 6, 0, 0, 0]],
      [FRAME.GO, []],
      [FRAME.HELLO, [1, 0, 0, 0]],
    ])
    connection.close()
    here.destroy()
  })
})
