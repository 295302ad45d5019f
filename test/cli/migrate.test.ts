import { type ChildProcess, execFileSync, spawn } from 'node:child_process'
import { existsSync, mkdtempSync, rmSync, statSync, writeFileSync } from 'node:fs'
import { connect } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { describe, expect, it, onTestFinished } from 'vitest'

const COMMAND = new URL('../../dist/cli/main.js', import.meta.url).pathname
const GUESTS = new URL('../../build/guests/', import.meta.url).pathname

interface Started {
  readonly child: ChildProcess
  readonly ended: Promise<{
    readonly status: number | null
    readonly stdout: string
    readonly stderr: string
  }>
  /** Waits for something on standard output or error. */
  said(pattern: RegExp): Promise<RegExpExecArray>
}

function start(...args: readonly string[]): Started {
  const child = spawn(process.execPath, [COMMAND, ...args], { stdio: ['pipe', 'pipe', 'pipe'] })
  onTestFinished(() => void child.kill('SIGKILL'))
  const text = { stdout: '', stderr: '' }
  const waiters = new Set<() => void>()
  for (const name of ['stdout', 'stderr'] as const) {
    child[name].on('data', (bytes) => {
      text[name] += bytes
      for (const look of [...waiters]) look()
    })
  }
  const ended = new Promise<number | null>((resolve) => child.on('close', resolve))
  return {
    child,
    ended: ended.then((status) => ({ status, ...text })),
    said: (pattern) =>
      new Promise((resolve, reject) => {
        const look = () => {
          const match = pattern.exec(text.stdout) ?? pattern.exec(text.stderr)
          if (match === null) return
          waiters.delete(look)
          resolve(match)
        }
        waiters.add(look)
        look()
        void ended.then(() => reject(new Error(`It ended without ${pattern}: ${text.stdout}${text.stderr}`)))
      }),
  }
}

function folder(): string {
  const path = mkdtempSync(join(tmpdir(), 'nodevisor-move-'))
  onTestFinished(() => rmSync(path, { recursive: true, force: true }))
  return path
}

async function waiting(receiver: Started): Promise<string> {
  return (await receiver.said(/waiting for a machine at (\S+)/))[1]!
}

describe('nodevisor migrate', () => {
  it('moves a machine to where nodevisor receive waits, and the terminal with it', async () => {
    const socket = join(folder(), 'control')
    const receiver = start('receive', '0')
    const machine = start('run', `${GUESTS}echo.elf`, '--control', socket)
    machine.child.stdin!.write('one\n')
    await machine.said(/one\n/)
    expect(statSync(socket).mode & 0o777).toBe(0o600)
    const mover = start('migrate', socket, await waiting(receiver))
    expect(await mover.ended).toMatchObject({
      status: 0,
      stderr: expect.stringMatching(/moved: .* MiB in .* s/),
    })
    expect(await machine.ended).toMatchObject({
      status: 0,
      stdout: 'ready\none\n',
      stderr: expect.stringContaining('goes on there'),
    })
    expect(existsSync(socket)).toBe(false)
    receiver.child.stdin!.end('two\nquit\n')
    expect(await receiver.ended).toMatchObject({ status: 1, stdout: 'two\nquit\nbye\n' })
  })

  it('goes through TLS, and further from there', async ({ skip }) => {
    const place = folder()
    const [key, cert] = [join(place, 'key.pem'), join(place, 'cert.pem')]
    const kind = ['-newkey', 'ec', '-pkeyopt', 'ec_paramgen_curve:prime256v1', '-nodes', '-days', '2']
    const name = ['-subj', '/CN=here', '-addext', 'subjectAltName=IP:127.0.0.1']
    try {
      execFileSync('openssl', ['req', '-x509', ...kind, '-keyout', key, '-out', cert, ...name], {
        stdio: 'pipe',
      })
    } catch {
      skip('needs openssl')
    }
    const tls = ['--tls-cert', cert, '--tls-key', key, '--tls-ca', cert]
    const [first, second] = [join(place, 'first'), join(place, 'second')]
    const machine = start('run', `${GUESTS}echo.elf`, '--control', first)
    await machine.said(/ready/)
    const receiver = start('receive', '127.0.0.1:0', '--control', second, ...tls)
    const address = await waiting(receiver)
    // Without certificates nobody gets in, and the machine goes on.
    expect((await start('migrate', first, address).ended).status).toBe(70)
    expect((await start('migrate', first, address, ...tls).ended).status).toBe(0)
    expect((await machine.ended).status).toBe(0)
    const last = start('receive', '0')
    expect((await start('migrate', second, await waiting(last)).ended).status).toBe(0)
    expect((await receiver.ended).status).toBe(0)
    last.child.stdin!.end('quit\n')
    expect(await last.ended).toMatchObject({ status: 1, stdout: 'quit\nbye\n' })
  })

  it('says why it could not, and the machine goes on', async () => {
    const socket = join(folder(), 'control')
    const machine = start('run', `${GUESTS}echo.elf`, '--control', socket)
    await machine.said(/ready/)
    const failed = async (...args: readonly string[]) =>
      (await start('migrate', ...args).ended) as { status: number; stderr: string }
    expect(await failed(socket, '127.0.0.1:1')).toMatchObject({
      status: 70,
      stderr: expect.stringContaining('ECONNREFUSED'),
    })
    expect(await failed(socket, 'nonsense')).toMatchObject({
      status: 70,
      stderr: expect.stringContaining("'host:port'"),
    })
    expect(await failed(socket, '127.0.0.1:1', '--tls-ca', '/nowhere')).toMatchObject({
      status: 70,
      stderr: expect.stringContaining('ENOENT'),
    })
    expect(await failed(socket, '--resume')).toMatchObject({ status: 0 })
    expect(await failed(socket)).toMatchObject({ status: 2, stderr: expect.stringContaining('HOST:PORT') })
    expect(await failed(`${socket}2`, '127.0.0.1:1')).toMatchObject({
      status: 2,
      stderr: expect.stringContaining('ENOENT'),
    })
    machine.child.stdin!.end('quit\n')
    expect((await machine.ended).status).toBe(1)
    expect(existsSync(socket)).toBe(false)
  })

  it('takes nothing but requests at its socket', async () => {
    const socket = join(folder(), 'control')
    const machine = start('run', `${GUESTS}echo.elf`, '--control', socket)
    await machine.said(/ready/)
    const ask = (bytes: string) =>
      new Promise<string>((resolve, reject) => {
        let text = ''
        const client = connect(socket, () => client.write(bytes))
        client.on('data', (chunk) => {
          text += chunk
        })
        client.on('error', reject).on('close', () => resolve(text))
      })
    const garbage = [
      'x\n',
      '[]\n',
      'null\n',
      '{"migrate":1}\n',
      '{"migrate":{"to":"a:1","tls":{"cert":5}}}\n',
      'x'.repeat(70_000),
    ]
    for (const bytes of garbage)
      expect(await ask(bytes)).toMatch(/^\{"error":\{"code":"ERR_INVALID_ARGUMENT"/)
    // One who asks for nothing does not keep it from ending.
    for (const bytes of ['', '{']) {
      const silent = connect(socket, () => silent.write(bytes))
      silent.on('error', () => {})
    }
    machine.child.stdin!.end('quit\n')
    expect((await machine.ended).status).toBe(1)
  })

  it('is refused a socket where something is', async () => {
    const path = join(folder(), 'file')
    writeFileSync(path, '')
    const { status, stderr } = await start('run', `${GUESTS}echo.elf`, '--control', path).ended
    expect({ status, stderr }).toEqual({ status: 2, stderr: expect.stringContaining('remove it') })
  })
})

describe('nodevisor receive', () => {
  it('waits on where what came was no machine', async () => {
    const receiver = start('receive', '0')
    const [host, port] = (await waiting(receiver)).split(':') as [string, string]
    connect(Number(port), host).end('GET / HTTP/1.1\r\n\r\n')
    await receiver.said(/is it a nodevisor/)
    const socket = join(folder(), 'control')
    const machine = start('run', `${GUESTS}echo.elf`, '--control', socket)
    await machine.said(/ready/)
    expect((await start('migrate', socket, `${host}:${port}`).ended).status).toBe(0)
    receiver.child.stdin!.end('quit\n')
    expect((await receiver.ended).status).toBe(1)
  })

  it.each([['nowhere'], ['127.0.0.1:99999'], ['127.0.0.1:x']])('refuses to listen at %s', async (address) => {
    expect((await start('receive', address).ended).status).toBe(2)
  })
})
