import { randomBytes } from 'node:crypto'
import { once } from 'node:events'
import { mkdtempSync, readFileSync, rmSync, statSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { Duplex, Readable } from 'node:stream'
import { text } from 'node:stream/consumers'
import fc from 'fast-check'
import { describe, expect, it, onTestFinished, vi } from 'vitest'
import { encodeFrame, FRAME, FrameReader, words } from '../../src/backends/agent-frames.js'
import { ConsolePort } from '../../src/backends/console-port.js'
import { AGENT_PORT_NAME, GuestAgent } from '../../src/backends/guest-agent.js'
import { eventually } from '../helpers/virtio-driver.js'
import { connectPort, hasAgent, setUp, startAgent } from './agent-process.js'

const MIB = 1024 * 1024

function errorWith(code: string, message: RegExp = /^/) {
  return expect.objectContaining({
    name: 'NodevisorError',
    code,
    message: expect.stringMatching(message),
  })
}

/** A folder that is there until the test is over. */
function folder(): string {
  const path = mkdtempSync(join(tmpdir(), 'nodevisor-agent-'))
  onTestFinished(() => rmSync(path, { recursive: true, force: true }))
  return path
}

/** Whether a process is there that has not ended. */
function isRunning(pid: number): boolean {
  try {
    return !/^\d+ \(.*\) Z/s.test(readFileSync(`/proc/${pid}/stat`, 'utf8'))
  } catch {
    return false
  }
}

describe.skipIf(!hasAgent)('exec (needs a static C library)', () => {
  it('gives output, error output and status', async () => {
    const { agent } = setUp()
    expect(await agent.exec('echo out; echo err >&2; exit 3')).toEqual({
      stdout: 'out\n',
      stderr: 'err\n',
      exitCode: 3,
      signal: null,
      timedOut: false,
      truncated: false,
    })
  })

  it('takes a program and its arguments as they are, and finds it in PATH', async () => {
    const { agent } = setUp()
    const { stdout } = await agent.exec(['printf', '%s|', 'a b', '$HOME', '', "'ü'"])
    expect(stdout).toBe("a b|$HOME||'ü'|")
  })

  it('gives variables and a folder, and unsets variables', async () => {
    const { agent } = setUp()
    const env = { MINE: 'a=b c', EMPTY: '', PATH: undefined }
    const { stdout } = await agent.exec(['/usr/bin/env'], { env, cwd: '/' })
    expect(stdout.split('\n').filter((line) => !/^(_|SHLVL|PWD|OLDPWD)=/.test(line))).toEqual([
      'GIVEN=by the agent',
      'MINE=a=b c',
      'EMPTY=',
      '',
    ])
    expect((await agent.exec('pwd', { cwd: '/usr/bin/..' })).stdout).toBe('/usr\n')
    expect((await agent.exec('env', { env: { GIVEN: undefined } })).stdout).not.toContain('GIVEN')
  })

  it('has a PATH where the agent has none', async () => {
    const { agent } = setUp({})
    expect(await agent.exec(['true'])).toMatchObject({ exitCode: 0 })
  })

  it.each([
    ['text', 'grüße'],
    ['bytes', Buffer.from('grüße')],
    ['a stream', Readable.from([Buffer.from('grü'), 'ße'])],
    ['nothing', ''],
  ])('sends input: %s', async (_what, input) => {
    const { agent } = setUp()
    const { stdout } = await agent.exec('cat', { input })
    expect(stdout).toBe(input === '' ? '' : 'grüße')
  })

  it('brings megabytes there and back, unchanged', async () => {
    const { agent } = setUp()
    const input = randomBytes(5 * MIB)
    const { stdout } = await agent.exec('cat', { input, encoding: 'buffer' })
    expect(stdout.equals(input)).toBe(true)
  })

  it('keeps as much output as is wanted, and says that there was more', async () => {
    const { agent } = setUp()
    const result = await agent.exec('head -c 3000000 /dev/zero | tr "\\0" x; echo >&2', { maxOutput: 5 })
    expect(result).toMatchObject({ stdout: 'xxxxx', stderr: '\n', truncated: true, exitCode: 0 })
  })

  it('tells which signal ended a program', async () => {
    const { agent } = setUp()
    expect(await agent.exec('kill -SEGV $$')).toMatchObject({ exitCode: null, signal: 'SIGSEGV' })
  })

  it('kills a program, and what it has started, when its time is over', async () => {
    const { agent } = setUp()
    const command = 'sleep 1000 & echo $!; wait'
    const result = await agent.exec(command, { timeout: 300 })
    expect(result).toMatchObject({ exitCode: null, signal: 'SIGKILL', timedOut: true })
    await eventually(() => !isRunning(Number(result.stdout)))
  })

  it('ends with ERR_ABORTED at once, and the program soon after', async () => {
    const { agent } = setUp()
    const controller = new AbortController()
    const program = agent.spawn('echo $$; exec sleep 1000', { signal: controller.signal })
    const [pid] = await once(program.stdout, 'data')
    controller.abort(new Error('enough'))
    await expect(program.exited).rejects.toMatchObject({ code: 'ERR_ABORTED', cause: new Error('enough') })
    await eventually(() => !isRunning(Number(pid)))
    await expect(agent.exec('true', { signal: controller.signal })).rejects.toEqual(errorWith('ERR_ABORTED'))
  })

  it('does not wait for what a program leaves behind', async () => {
    const { agent } = setUp()
    const { stdout } = await agent.exec('sleep 1000 & echo $!')
    process.kill(Number(stdout), 'SIGKILL')
  })

  it('ends although the program reads none of its input', async () => {
    const { agent } = setUp()
    async function* endless() {
      for (;;) yield Buffer.alloc(65536)
    }
    expect(await agent.exec('exit 5', { input: endless() })).toMatchObject({ exitCode: 5 })
  })

  it('kills the program when its input fails', async () => {
    const { agent } = setUp()
    async function* failing() {
      yield Buffer.from('some')
      throw new Error('no more')
    }
    await expect(agent.exec('cat', { input: failing() })).rejects.toMatchObject({
      code: 'ERR_EXEC_FAILED',
      cause: new Error('no more'),
    })
  })

  it('throws where check is set, with what is known', async () => {
    const { agent } = setUp()
    expect(await agent.exec('exit 0', { check: true })).toMatchObject({ exitCode: 0 })
    const failed = agent.exec('echo no such luck >&2; exit 4', { check: true })
    await expect(failed).rejects.toEqual(
      errorWith('ERR_EXEC_FAILED', /exited with 4; stderr: 'no such luck'/),
    )
    await expect(failed).rejects.toMatchObject({ exitCode: 4, stderr: 'no such luck\n' })
  })

  it('says why a program could not be started', async () => {
    const { agent } = setUp()
    await expect(agent.exec(['/no/such/program'])).rejects.toMatchObject({
      code: 'ERR_EXEC_FAILED',
      errnoName: 'ENOENT',
      message: expect.stringContaining("'/no/such/program'"),
    })
    await expect(agent.exec('true', { cwd: '/etc/passwd' })).rejects.toMatchObject({ errnoName: 'ENOTDIR' })
    await expect(agent.exec(['/'])).rejects.toMatchObject({ errnoName: 'EACCES' })
  })

  it('runs more at a time than the agent has channels', async () => {
    const { agent } = setUp()
    const results = await Promise.all(
      Array.from({ length: 150 }, (_, i) => agent.exec(['echo', `${i}`], { input: 'x' })),
    )
    expect(results.map(({ stdout }) => stdout)).toEqual(results.map((_, i) => `${i}\n`))
  })

  it.each([
    ['nothing', [], {}, 'ERR_INVALID_ARGUMENT', /for command/],
    ['a zero byte', ['a\0b'], {}, 'ERR_INVALID_ARGUMENT', /for command/],
    ['too much', ['x'.repeat(70_000)], {}, 'ERR_INVALID_ARGUMENT', /at most 65536 bytes/],
    ['a variable that is none', ['x'], { env: { 'A=B': '' } }, 'ERR_INVALID_ARGUMENT', /names without '='/],
    ['a number for a variable', ['x'], { env: { A: 5 } }, 'ERR_INVALID_ARGUMENT', /text for env.A/],
    ['an unknown encoding', ['x'], { encoding: 'utf9' }, 'ERR_INVALID_ARGUMENT', /'buffer', for encoding/],
    ['a key misspelt', ['x'], { timeOut: 5 }, 'ERR_UNKNOWN_OPTION', /did you mean 'timeout'/],
    ['a negative time', ['x'], { timeout: -1 }, 'ERR_INVALID_ARGUMENT', /milliseconds/],
    ['a number for input', ['x'], { input: 5 }, 'ERR_INVALID_ARGUMENT', /for input/],
  ] as const)('refuses %s', async (_what, command, options, code, message) => {
    const { agent } = setUp()
    await expect(agent.exec(command, options as object)).rejects.toEqual(errorWith(code, message))
  })
})

describe.skipIf(!hasAgent)('spawn (needs a static C library)', () => {
  it('talks with a program line by line', async () => {
    const { agent } = setUp()
    const program = agent.spawn('while read line; do echo "<$line>"; done; echo bye >&2')
    for (const line of ['one', 'two']) {
      program.stdin.write(`${line}\n`)
      expect(String((await once(program.stdout, 'data'))[0])).toBe(`<${line}>\n`)
    }
    program.stdin.end()
    expect(await text(program.stderr)).toBe('bye\n')
    expect(await program.exited).toEqual({ exitCode: 0, signal: null, timedOut: false })
  })

  it('sends signals by name and number', async () => {
    const { agent } = setUp()
    const program = agent.spawn('trap "echo usr1" USR1; echo ready; while :; do read x || sleep 0.05; done')
    const output = text(program.stdout)
    await once(program.stdout, 'data')
    program.kill('SIGUSR1')
    program.kill(9)
    expect(await program.exited).toMatchObject({ exitCode: null, signal: 'SIGKILL' })
    program.kill()
    expect(() => program.kill(65)).toThrow(errorWith('ERR_INVALID_ARGUMENT', /1 to 64/))
    expect(() => program.kill('SIGNONE' as 'SIGTERM')).toThrow(errorWith('ERR_INVALID_ARGUMENT'))
    await output
  })

  it('holds a program back whose output nobody reads, and nobody else', async () => {
    const { agent } = setUp()
    const program = agent.spawn('yes')
    expect((await agent.exec('echo still here')).stdout).toBe('still here\n')
    await once(program.stdout, 'readable')
    expect(program.stdout.readableLength).toBeLessThanOrEqual(256 * 1024)
    program.kill()
    program.stdout.resume()
    expect(await program.exited).toMatchObject({ signal: 'SIGTERM' })
  })

  it('holds whoever writes back, when the program does not read', async () => {
    const { agent } = setUp()
    const program = agent.spawn('sleep 1000')
    let written = 0
    const endless = new Readable({
      read() {
        written += 65536
        this.push(Buffer.alloc(65536))
      },
    })
    endless.pipe(program.stdin)
    await agent.exec('true')
    await agent.exec('true')
    expect(written).toBeLessThan(MIB)
    endless.unpipe()
    program.kill()
    await program.exited
  })

  it('ends a program whose reader has gone, not itself', async () => {
    const { agent } = setUp()
    const program = agent.spawn('head -c 2000000 /dev/zero; echo done >&2')
    program.stdout.destroy()
    expect(await text(program.stderr)).toBe('done\n')
    expect(await program.exited).toMatchObject({ exitCode: 0 })
  })
})

describe.skipIf(!hasAgent)('files (need a static C library)', () => {
  it('are written and read, in pieces, with their mode', async () => {
    const { agent } = setUp()
    const path = join(folder(), 'file')
    const content = randomBytes(3 * MIB)
    await agent.writeFile(path, content, { mode: 0o751 })
    expect(readFileSync(path).equals(content)).toBe(true)
    expect(statSync(path).mode & 0o7777).toBe(0o751)
    expect((await agent.readFile(path)).equals(content)).toBe(true)
    await agent.writeFile(path, Readable.from(['much ', 'shorter']))
    expect(String(await agent.readFile(path))).toBe('much shorter')
    await agent.writeFile(path, '')
    expect(await agent.readFile(path)).toHaveLength(0)
    expect(statSync(path).mode & 0o7777).toBe(0o751)
  })

  it('without a size, such as those of /proc, are read', async () => {
    const { agent } = setUp()
    expect(String(await agent.readFile('/proc/version'))).toBe(readFileSync('/proc/version', 'utf8'))
  })

  it('that cannot be read or written say why', async () => {
    const { agent } = setUp()
    const path = join(folder(), 'none', 'file')
    const missing = errorWith('ERR_GUEST_FILE', /ENOENT/)
    await expect(agent.readFile(path)).rejects.toEqual(missing)
    await expect(agent.writeFile(path, 'x')).rejects.toEqual(missing)
    await expect(agent.readFile('/')).rejects.toMatchObject({ errnoName: 'EISDIR', path: '/' })
    await expect(agent.writeFile('/dev/full', 'x')).rejects.toMatchObject({ errnoName: 'ENOSPC' })
    await expect(agent.readFile('')).rejects.toEqual(errorWith('ERR_INVALID_ARGUMENT'))
    await expect(agent.writeFile('/x', '', { mode: 0o10000 })).rejects.toEqual(
      errorWith('ERR_INVALID_ARGUMENT'),
    )
    await expect(agent.writeFile('/x', 5 as never)).rejects.toEqual(errorWith('ERR_INVALID_ARGUMENT'))
  })

  it('without end are cut off by name, and do not keep anything busy', async () => {
    const { agent } = setUp()
    await expect(agent.readFile('/dev/zero', { maxSize: MIB })).rejects.toEqual(
      errorWith('ERR_GUEST_FILE', /at most 1048576 bytes .* set maxSize/),
    )
    for (let i = 0; i < 70; i++) {
      await expect(agent.readFile('/dev/zero', { maxSize: 10 })).rejects.toThrow('set maxSize')
    }
    expect(await agent.exec('true')).toMatchObject({ exitCode: 0 })
  })
})

describe.skipIf(!hasAgent)('the connection (needs a static C library)', () => {
  it('is waited for, with a time-out that says what to do', async () => {
    const agent = new GuestAgent(new ConsolePort(AGENT_PORT_NAME))
    await expect(agent.exec('true', { agentTimeout: 1 })).rejects.toEqual(
      errorWith('ERR_AGENT_MISSING', /in the initramfs and started by init/),
    )
  })

  it('comes about when the agent starts late', async () => {
    const port = new ConsolePort(AGENT_PORT_NAME)
    const agent = new GuestAgent(port)
    const late = agent.exec('echo here')
    await expect(agent.connected({ agentTimeout: 1 })).rejects.toEqual(errorWith('ERR_AGENT_MISSING'))
    startAgent(port)
    expect((await late).stdout).toBe('here\n')
  })

  it('that breaks is an error of what was running, and another agent serves what comes then', async () => {
    const { agent, port, child } = setUp()
    const program = agent.spawn('echo $$; exec sleep 1000')
    const [pid] = await once(program.stdout, 'data')
    child.kill('SIGKILL')
    await expect(program.exited).rejects.toEqual(errorWith('ERR_AGENT_FAILED', /did it crash/))
    startAgent(port)
    expect((await agent.exec('echo again')).stdout).toBe('again\n')
    process.kill(Number(pid), 'SIGKILL')
  })

  it('survives a new host in the middle of everything: the agent kills what the old one ran', async () => {
    const first = setUp()
    const program = first.agent.spawn('echo $$; exec yes')
    const [pid] = await once(program.stdout, 'data')
    // The old host has sent a part of a frame, and bytes of the agent's are under way.
    first.socket.write(encodeFrame(FRAME.SPAWN, 7, Buffer.alloc(1000)).subarray(0, 500))
    first.port.removeAllListeners()
    first.socket.removeAllListeners('data')
    const port = new ConsolePort(AGENT_PORT_NAME)
    const agent = new GuestAgent(port)
    connectPort(port, first.socket)
    expect((await agent.exec('echo anew')).stdout).toBe('anew\n')
    await eventually(() => !isRunning(Number(parseInt(String(pid), 10))))
  })

  it('ends with the agent, which kills what it runs', async () => {
    const { agent, child, socket } = setUp()
    const program = agent.spawn('echo $$; exec sleep 1000')
    const [pid] = await once(program.stdout, 'data')
    const exit = once(child, 'exit')
    socket.destroy()
    expect(await exit).toEqual([0, null])
    await eventually(() => !isRunning(Number(pid)))
  })

  it('ends with the run, and with the machine', async () => {
    const { agent } = setUp()
    const program = agent.spawn('sleep 1000')
    await agent.connected()
    agent.endOfRun('the run ended with halt')
    await expect(program.exited).rejects.toEqual(errorWith('ERR_AGENT_FAILED', /the run ended with halt/))
    expect((await agent.exec('echo next run')).stdout).toBe('next run\n')
    const last = agent.exec('sleep 1000')
    agent.close('the machine was closed')
    await expect(last).rejects.toEqual(errorWith('ERR_CLOSED', /the machine was closed/))
    await expect(agent.exec('true')).rejects.toEqual(errorWith('ERR_CLOSED'))
  })
})

/** Bytes that, taken for a path, name nothing outside the agent's folder. */
function garbage(maxLength: number) {
  return fc.uint8Array({ maxLength }).map((bytes) => bytes.map((byte) => (byte === 0x2f ? 0x2e : byte)))
}

describe.skipIf(!hasAgent)('the agent (needs a static C library)', () => {
  it('survives garbage, and serves who comes after it', async () => {
    const { agent, socket, child } = setUp()
    await fc.assert(
      fc.asyncProperty(
        fc.array(
          fc.oneof(
            garbage(200),
            fc
              .tuple(fc.nat(12), fc.nat(3), garbage(40))
              .map(([type, channel, payload]) => encodeFrame(type, channel, payload)),
          ),
          { maxLength: 5 },
        ),
        async (pieces) => {
          await agent.connected()
          for (const piece of pieces) socket.write(piece)
          agent.endOfRun('the test goes on')
          expect((await agent.exec(['echo', 'alive'])).stdout).toBe('alive\n')
        },
      ),
      { numRuns: 60 },
    )
    expect(child.exitCode).toBeNull()
  })

  it('says what was wrong with a frame', async () => {
    const { agent, socket } = setUp()
    const program = agent.spawn('sleep 1000')
    await agent.exec('true')
    socket.write(encodeFrame(99, 1))
    await expect(program.exited).rejects.toEqual(errorWith('ERR_AGENT_FAILED', /there is no such frame/))
  })
})

const turn = () => new Promise((resolve) => setImmediate(resolve))

/**
 * An agent that a test plays itself: says hello, then sends what it likes as soon as a channel is opened. A deaf one
 * reads nothing after that.
 */
function hostileAgent(send: (channel: number) => readonly Buffer[], { version = 1, deaf = false } = {}) {
  const port = new ConsolePort(AGENT_PORT_NAME)
  const agent = new GuestAgent(port)
  const reader = new FrameReader()
  const opened = { channel: 0 }
  const received = new Map<number, number>()
  const socket = new Duplex({
    read() {},
    write(bytes: Buffer, _encoding, done) {
      for (const frame of reader.read(bytes)) {
        const { type, channel, payload } = frame!
        received.set(type, (received.get(type) ?? 0) + 1)
        if (type === FRAME.HELLO) {
          const token = payload.subarray(16, 32)
          this.push(
            Buffer.concat([
              randomBytes(50),
              encodeFrame(FRAME.HELLO, 0, payload.subarray(0, 16), token, words(version)),
            ]),
          )
        }
        if (![FRAME.SPAWN, FRAME.READ, FRAME.WRITE].some((opening) => opening === type)) continue
        opened.channel = channel
        for (const piece of send(channel)) this.push(piece)
      }
      if (!deaf || opened.channel === 0) done()
    },
  })
  connectPort(port, socket, deaf ? 1024 : undefined)
  onTestFinished(() => agent.close('the test is over'))
  return { agent, port, socket, received, opened }
}

describe('a hostile agent', () => {
  const out = (channel: number, length: number) => encodeFrame(FRAME.STDOUT, channel, Buffer.alloc(length))

  it.each([
    ['a frame that is none', (id: number) => [encodeFrame(77, id)], /a frame of type 77$/],
    ['a channel that is not open', (id: number) => [out(id + 1, 1)], /which is not open/],
    ['a frame too long', () => [Buffer.from('04ffffff00000000', 'hex')], /too long/],
    [
      'more output than it may',
      (id: number) => Array.from({ length: 9 }, () => out(id, 32768)),
      /more output/,
    ],
    ['output without bytes', (id: number) => [out(id, 0)], /without bytes/],
    ['a short EXIT', (id: number) => [encodeFrame(FRAME.EXIT, id, words(0))], /EXIT of 4 bytes/],
    [
      'a status that is none',
      (id: number) => [encodeFrame(FRAME.EXIT, id, words(0, 256))],
      /kind 0 with 256/,
    ],
    ['a signal that is none', (id: number) => [encodeFrame(FRAME.EXIT, id, words(1, 0))], /kind 1 with 0/],
    ['an end that is none', (id: number) => [encodeFrame(FRAME.EXIT, id, words(3, 1))], /kind 3 with 1/],
    ['credit for its own', (id: number) => [encodeFrame(FRAME.CREDIT, id, words(1, 1))], /credit/],
    ['no credit', (id: number) => [encodeFrame(FRAME.CREDIT, id, words(0, 0))], /credit of 0/],
    [
      'credit without end',
      (id: number) => Array.from({ length: 2 }, () => encodeFrame(FRAME.CREDIT, id, words(0, 2 ** 30))),
      /credit of 1073741824/,
    ],
    ['an EXIT twice', (id: number) => [0, 1].map(() => encodeFrame(FRAME.EXIT, id, words(0, 0))), undefined],
    ['another HELLO', () => [encodeFrame(FRAME.HELLO, 0, Buffer.alloc(36))], /type 1 for channel 0/],
    [
      'a fault with escapes',
      () => [encodeFrame(FRAME.FAULT, 0, Buffer.from('\x1b[2J'))],
      /it says: '\?\[2J'/,
    ],
  ] as const)('that sends %s loses its connection', async (_what, send, message) => {
    const { agent } = hostileAgent(send)
    const program = agent.spawn('x')
    if (message === undefined) expect(await program.exited).toMatchObject({ exitCode: 0 })
    else await expect(program.exited).rejects.toEqual(errorWith('ERR_AGENT_FAILED', message))
    // The next call begins another.
    const next = agent.spawn('x')
    if (message !== undefined)
      await expect(next.exited).rejects.toEqual(errorWith('ERR_AGENT_FAILED', message))
  })

  it('of another version is told to be built anew', async () => {
    const { agent } = hostileAgent(() => [], { version: 2 })
    await expect(agent.connected()).rejects.toEqual(
      errorWith('ERR_AGENT_FAILED', /is of version 2; build it anew/),
    )
  })

  it('that sends anything at all fails, or does not: nothing else happens', async () => {
    await fc.assert(
      fc.asyncProperty(
        fc.array(fc.oneof(fc.uint8Array({ maxLength: 100 }), frames()), { maxLength: 10 }),
        async (pieces) => {
          const { agent, port } = hostileAgent((id) => [
            ...pieces.map((piece) => Buffer.from(piece)),
            encodeFrame(FRAME.EXIT, id, words(0, 7)),
          ])
          const ended = agent.exec('x', { input: 'y'.repeat(100_000) }).catch((error: unknown) => error)
          const stopped = setTimeout(() => agent.close('it said nothing'), 50)
          const end = (await ended) as { code?: string }
          clearTimeout(stopped)
          expect(['ERR_AGENT_FAILED', 'ERR_EXEC_FAILED', 'ERR_CLOSED', undefined]).toContain(end.code)
          expect(port.destroyed).toBe(false)
        },
      ),
      { numRuns: 100 },
    )
  })

  it('23: that sends a byte at a time does not cost more than the bytes', async () => {
    const { agent } = hostileAgent((id) => [Buffer.concat(new Array(200_000).fill(out(id, 1)))])
    const program = agent.spawn('x')
    const lengths: number[] = []
    // The first look is for what is there by then: each frame on its own.
    await agent.connected()
    await turn()
    program.stdout.on('data', (chunk: Buffer) => lengths.push(chunk.length))
    await eventually(() => lengths.reduce((sum, length) => sum + length, 0) === 200_000)
    expect(lengths.length).toBeLessThan(50)
  })

  it('23: that reads nothing is given no credit without end', async () => {
    const { agent, port, socket, opened } = hostileAgent(() => [], { deaf: true })
    const program = agent.spawn('x')
    program.stdout.resume()
    const failed = expect(program.exited).rejects.toEqual(errorWith('ERR_AGENT_FAILED', /more output/))
    await eventually(() => opened.channel > 0)
    let over = false
    program.exited.catch(() => {
      over = true
    })
    // No more at once than the window: it is the credit for what was read that must come to an end.
    for (let sent = 0; sent < 512 * MIB && !over; sent += 128 * 1024) {
      for (let i = 0; i < 4; i++) socket.push(out(opened.channel, 32768))
      await turn()
      expect(port.writableLength).toBeLessThan(32 * 1024)
    }
    await failed
  })

  it('that does not end a program when it is killed is not waited for', async () => {
    vi.useFakeTimers({ toFake: ['setTimeout', 'clearTimeout'] })
    onTestFinished(() => {
      vi.useRealTimers()
    })
    const { agent, received, opened } = hostileAgent(() => [])
    const program = agent.spawn('x', { timeout: 100 })
    const given = expect(program.exited).rejects.toEqual(errorWith('ERR_TIMEOUT', /when it was killed/))
    while (opened.channel === 0) await turn()
    vi.advanceTimersByTime(100)
    while (!received.has(FRAME.KILL)) await turn()
    vi.advanceTimersByTime(10_000)
    await given
  })
})

function frames() {
  return fc
    .tuple(fc.nat(12), fc.nat(2), fc.uint8Array({ maxLength: 40 }))
    .map(([type, channel, payload]) => encodeFrame(type, channel, payload))
}

it('frames are put together from any pieces', () => {
  fc.assert(
    fc.property(
      fc.array(fc.uint8Array({ maxLength: 300 }), { maxLength: 6 }),
      fc.integer({ min: 1, max: 50 }),
      (payloads, step) => {
        const bytes = Buffer.concat(
          payloads.map((payload, index) => encodeFrame(FRAME.STDIN, index, payload)),
        )
        const reader = new FrameReader()
        const found: Buffer[] = []
        for (let at = 0; at < bytes.length; at += step) {
          for (const frame of reader.read(bytes.subarray(at, at + step)))
            found.push(Buffer.from(frame!.payload))
        }
        expect(found).toEqual(payloads.map((payload) => Buffer.from(payload)))
      },
    ),
  )
})
