import { execFileSync } from 'node:child_process'
import { readFileSync } from 'node:fs'
import { createServer, type Server, type Socket } from 'node:net'
import { join } from 'node:path'
import { describe, expect, it, onTestFinished } from 'vitest'
import { type RunResult, VirtualMachine } from '../../src/index.js'
import { EchoHashDevice } from '../helpers/echo-hash-device.js'
import { makeFolder } from '../helpers/folders.js'
import { onEmulated } from '../helpers/guests.js'
import { RUN_LIMIT } from '../helpers/limits.js'
import { errorWith, vcpuThreads } from '../machine/boot.js'
import { answerOf, bootContinuity, duplexPair, move, openFiles, socketPair } from './machines.js'

const SUCCESS = { reason: 'debug-exit', code: 16 }

/** Lets a machine run for some ms, and moves it; then the next one, until the guest has come to its end. */
async function moveToAndFro(
  first: VirtualMachine,
  waits: readonly number[],
  devices: () => EchoHashDevice[] = () => [],
): Promise<{ readonly machines: VirtualMachine[]; readonly result: RunResult }> {
  const machines = [first]
  for (const wait of waits) {
    const vm = machines.at(-1)!
    const run = vm.run({ timeout: RUN_LIMIT })
    const ended = await Promise.race([run, new Promise<void>((resolve) => setTimeout(resolve, wait))])
    if (ended !== undefined) return { machines, result: ended }
    const other = await move(vm, { devices: devices() })
    const result = await run
    if (result.reason !== 'migrated') return { machines, result }
    machines.push(other)
    await vm.close()
  }
  return { machines, result: await machines.at(-1)!.run({ timeout: RUN_LIMIT }) }
}

/** Work that takes about as long everywhere. */
const rounds = (count: number) => (onEmulated ? Math.ceil(count / 50) : count)

const WAITS = Array.from({ length: onEmulated ? 5 : 20 }, (_, index) => (index * 7) % 13)

describe('a machine that is moved', () => {
  it.each([
    [1, 'none', 'inline', `rounds=${rounds(2_0000)}`],
    [1, 'none', 'threads', `rounds=${rounds(2_0000)}`],
    [1, 'full', 'threads', `rounds=${rounds(1_0000)} ticks=40 timer=pit`],
    [1, 'split', 'inline', `rounds=${rounds(1_0000)} ticks=40 timer=pit`],
    [2, 'full', 'threads', `rounds=${rounds(1_0000)} ticks=40 timer=lapic`],
    [2, 'split', 'threads', `rounds=${rounds(1_0000)} ticks=40 timer=pit`],
    [4, 'full', 'threads', `rounds=${rounds(6_000)} ticks=30 timer=pit`],
    [4, 'split', 'inline', `rounds=${rounds(3_000)} ticks=30 timer=lapic`],
  ] as const)(
    'to and fro goes on where it was: %i vCPUs, irqchip %s, %s',
    async (cpus, irqchip, execution, work) => {
      const words = `cpus=${cpus} ${work} device=1`
      const options = { cpus, irqchip, execution }
      const undisturbed = await bootContinuity(words, { ...options, devices: [new EchoHashDevice()] })
      expect(await undisturbed.run({ timeout: RUN_LIMIT })).toMatchObject(SUCCESS)
      const vm = await bootContinuity(words, { ...options, devices: [new EchoHashDevice()] })
      const { machines, result } = await moveToAndFro(vm, WAITS, () => [new EchoHashDevice()])
      expect(result, machines.map(({ serial }) => serial.output).join('|')).toMatchObject(SUCCESS)
      expect(machines.length).toBeGreaterThan(2)
      expect(answerOf(...machines)).toBe(answerOf(undisturbed))
    },
  )

  it('says what it took, and how far it is', async () => {
    const vm = await bootContinuity(`rounds=${rounds(5_0000)}`)
    const run = vm.run({ timeout: RUN_LIMIT })
    await vm.serial.waitFor('continuity: started')
    const [here, there] = await socketPair()
    const progress: unknown[] = []
    const [other, result] = await Promise.all([
      VirtualMachine.receive(there),
      vm.migrate(here, { onProgress: (step) => progress.push(step) }),
    ])
    onTestFinished(() => other.close())
    expect(await run).toMatchObject({ reason: 'migrated' })
    expect(progress[0]).toMatchObject({ round: 0, total: 16 * 2 ** 20 })
    const first = progress.filter((step) => (step as { round: number }).round === 0)
    expect(first.at(-1)).toEqual({ round: 0, done: 16 * 2 ** 20, total: 16 * 2 ** 20 })
    // Far less than all of its memory has anything in it.
    expect(result.bytes).toBeLessThan(8 * 2 ** 20)
    expect(result.downtimeMs).toBeLessThan(result.durationMs)
    expect(result.rounds).toBeLessThanOrEqual(30)
    await expect(vm.run()).rejects.toEqual(errorWith('ERR_ENDED', 'moved to another process'))
    await expect(vm.snapshot()).rejects.toEqual(errorWith('ERR_ENDED'))
  })

  it('may stand still: it is moved as it is', async () => {
    const vm = await bootContinuity('rounds=100')
    const other = await move(vm)
    await expect(vm.run()).rejects.toEqual(errorWith('ERR_ENDED'))
    expect(await other.run({ timeout: RUN_LIMIT })).toMatchObject(SUCCESS)
    answerOf(other)
  })

  it('may be paused', async () => {
    const vm = await bootContinuity(`rounds=${rounds(2_0000)}`)
    const run = vm.run({ timeout: RUN_LIMIT })
    await vm.serial.waitFor('continuity: started')
    await vm.pause()
    const other = await move(vm)
    expect(await run).toMatchObject({ reason: 'migrated' })
    expect(await other.run({ timeout: RUN_LIMIT })).toMatchObject(SUCCESS)
  })

  it('may be a copy, whose memory lies over what others use', async () => {
    const undisturbed = await bootContinuity(`rounds=${rounds(1_0000)}`)
    const run = undisturbed.run({ timeout: RUN_LIMIT })
    await undisturbed.serial.waitFor('progress 20')
    await using snapshot = await undisturbed.snapshot()
    const [copy] = (await snapshot.spawn()) as [VirtualMachine]
    await run
    const { machines, result } = await moveToAndFro(copy, [3, 3, 3])
    expect(result).toMatchObject(SUCCESS)
    expect(answerOf(...machines)).toBe(answerOf(undisturbed))
    await copy.close()
  })

  it('goes on in a snapshot that is taken while it is moved, too', async () => {
    const vm = await bootContinuity(`rounds=${rounds(4_0000)}`)
    const run = vm.run({ timeout: RUN_LIMIT })
    await vm.serial.waitFor('continuity: started')
    const moving = move(vm)
    await using snapshot = await vm.snapshot()
    const other = await moving
    await run
    const [copy] = (await snapshot.spawn()) as [VirtualMachine]
    onTestFinished(() => copy.close())
    for (const machine of [other, copy])
      expect(await machine.run({ timeout: RUN_LIMIT })).toMatchObject(SUCCESS)
    expect(answerOf(other)).toBe(answerOf(copy))
  })

  it('leaves nothing behind', async () => {
    const once = async () => {
      const vm = await bootContinuity(`rounds=${rounds(2_0000)}`, { cpus: 1, execution: 'threads' })
      const run = vm.run({ timeout: RUN_LIMIT })
      await vm.serial.waitFor('continuity: started')
      const other = await move(vm, {}, await socketPair())
      await run
      await vm.close()
      await other.close()
    }
    await once()
    const before = { files: openFiles(), threads: vcpuThreads() }
    for (let i = 0; i < 3; i++) await once()
    expect({ files: openFiles(), threads: vcpuThreads() }).toEqual(before)
  })
})

describe('addresses', () => {
  async function listen(): Promise<{ readonly port: number; accept(): Promise<Socket> }> {
    const server: Server = createServer()
    await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve))
    onTestFinished(() => void server.close())
    const { port } = server.address() as { port: number }
    return { port, accept: () => new Promise((resolve) => server.once('connection', resolve)) }
  }

  it('are host:port, or an object', async () => {
    for (const form of ['text', 'object'] as const) {
      const vm = await bootContinuity('rounds=100')
      const { port, accept } = await listen()
      const received = accept().then((socket) => VirtualMachine.receive(socket))
      await vm.migrate(form === 'text' ? `127.0.0.1:${port}` : { host: '127.0.0.1', port })
      const other = await received
      onTestFinished(() => other.close())
      expect(await other.run({ timeout: RUN_LIMIT })).toMatchObject(SUCCESS)
    }
  })

  it.each([['nowhere'], ['host:0'], ['host:65536'], [{ host: 'x' }], [undefined], [5], [':80']])(
    'are refused where they are none: %j',
    async (to) => {
      const vm = await bootContinuity('rounds=100')
      await expect(vm.migrate(to as string)).rejects.toEqual(errorWith('ERR_INVALID_ARGUMENT', /for to /))
    },
  )

  it('where nobody listens are an error, and the machine goes on', async () => {
    const vm = await bootContinuity('rounds=100')
    await expect(vm.migrate('127.0.0.1:1')).rejects.toEqual(errorWith('ERR_MIGRATION_FAILED', 'ECONNREFUSED'))
    expect(await vm.run({ timeout: RUN_LIMIT })).toMatchObject(SUCCESS)
  })
})

const hasOpenssl = (() => {
  try {
    execFileSync('openssl', ['version'])
    return true
  } catch {
    return false
  }
})()

describe.skipIf(!hasOpenssl)('TLS (needs openssl)', () => {
  function certificate(name: string): { readonly key: Buffer; readonly cert: Buffer } {
    const folder = makeFolder()
    const [key, cert] = [join(folder, 'key.pem'), join(folder, 'cert.pem')]
    const subject = ['-subj', `/CN=${name}`, '-addext', `subjectAltName=DNS:${name}`]
    const kind = ['-newkey', 'ec', '-pkeyopt', 'ec_paramgen_curve:prime256v1', '-nodes', '-days', '2']
    execFileSync('openssl', ['req', '-x509', ...kind, '-keyout', key, '-out', cert, ...subject], {
      stdio: 'pipe',
    })
    return { key: readFileSync(key), cert: readFileSync(cert) }
  }

  it.each(['sockets', 'streams'])('lets a machine through, with both sides known: %s', async (kind) => {
    const [source, target] = [certificate('source'), certificate('target')]
    const [here, there] = kind === 'sockets' ? await socketPair() : duplexPair()
    const vm = await bootContinuity(`rounds=${rounds(1_0000)}`)
    const run = vm.run({ timeout: RUN_LIMIT })
    await vm.serial.waitFor('continuity: started')
    const [other] = await Promise.all([
      VirtualMachine.receive(there, {
        tls: { ...target, ca: source.cert, requestCert: true, rejectUnauthorized: true },
      }),
      vm.migrate(here, { tls: { ...source, ca: target.cert, servername: 'target' } }),
    ])
    onTestFinished(() => other.close())
    await run
    expect(await other.run({ timeout: RUN_LIMIT })).toMatchObject(SUCCESS)
    expect([here.destroyed, there.destroyed]).toEqual([true, true])
  })

  it.each(['source', 'target'])('lets none through where the %s is not known', async (unknown) => {
    const [source, target, stranger] = [certificate('source'), certificate('target'), certificate('stranger')]
    const [here, there] = await socketPair()
    const vm = await bootContinuity('rounds=100')
    const received = VirtualMachine.receive(there, {
      tls: {
        ...target,
        ca: unknown === 'source' ? stranger.cert : source.cert,
        requestCert: true,
        rejectUnauthorized: true,
      },
    })
    const moved = vm.migrate(here, {
      tls: { ...source, ca: unknown === 'target' ? stranger.cert : target.cert, servername: 'target' },
    })
    const [there_, here_] = await Promise.allSettled([received, moved])
    expect([there_, here_]).toMatchObject([
      { status: 'rejected', reason: { code: 'ERR_MIGRATION_FAILED' } },
      { status: 'rejected', reason: { code: 'ERR_MIGRATION_FAILED' } },
    ])
    expect(await vm.run({ timeout: RUN_LIMIT })).toMatchObject(SUCCESS)
  })
})
