import { type ChildProcess, spawn, spawnSync } from 'node:child_process'
import { mkdtempSync, readFileSync, rmSync, truncateSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterAll, beforeAll, describe, expect, it } from 'vitest'
import { onEmulated } from '../helpers/guests.js'

const COMMAND = new URL('../../dist/cli/main.js', import.meta.url).pathname
const GUESTS = new URL('../../build/guests/', import.meta.url).pathname

interface Finished {
  readonly status: number | null
  readonly stdout: string
  readonly stderr: string
}

function start(args: readonly string[]): ChildProcess {
  return spawn(process.execPath, [COMMAND, ...args], { stdio: ['pipe', 'pipe', 'pipe'] })
}

function finish(child: ChildProcess): Promise<Finished> {
  const text = { stdout: '', stderr: '' }
  child.stdout!.on('data', (bytes) => {
    text.stdout += bytes
  })
  child.stderr!.on('data', (bytes) => {
    text.stderr += bytes
  })
  return new Promise((resolve, reject) => {
    child.on('error', reject)
    child.on('close', (status) => resolve({ status, ...text }))
  })
}

/** Runs the command to its end. */
function nodevisor(args: readonly string[], input = ''): Promise<Finished> {
  const child = start(args)
  child.stdin!.end(input)
  return finish(child)
}

let folder: string
beforeAll(() => {
  folder = mkdtempSync(join(tmpdir(), 'nodevisor-cli-'))
})
afterAll(() => {
  rmSync(folder, { recursive: true })
})

/** A real-mode image, as a file. */
function image(name: string, ...code: number[]): string {
  const path = join(folder, name)
  writeFileSync(path, Uint8Array.from(code))
  return path
}

describe('nodevisor run', () => {
  it('gives (v << 1) | 1 for a debug-exit value v', async () => {
    const path = image('exit.bin', 0xb0, 0x15, 0xe6, 0xf4)
    expect((await nodevisor(['run', path])).status).toBe((0x15 << 1) | 1)
  })

  it('gives 0 for halt, and nothing else on the terminal', async () => {
    const path = image('halt.bin', 0xf4)
    expect(await nodevisor(['run', path])).toEqual({ status: 0, stdout: '', stderr: '' })
  })

  it('gives 70 for a triple fault, and says where', async () => {
    const { status, stderr } = await nodevisor(['run', `${GUESTS}crash.elf`])
    expect(status).toBe(70)
    expect(stderr).toMatch(/vCPU 0 shut down: a triple fault .* rip 0x[0-9a-f]+/)
    expect(stderr).toMatch(/^vCPU 0: \w+, \w+ mode/m)
    expect(stderr).toMatch(/^ +rax [0-9a-f]{16} +rbx [0-9a-f]{16}/m)
    expect(stderr).toMatch(/^ {2}code at rip: /m)
    expect(stderr).toMatch(/^last exits:\n {2}vCPU 0: /m)
  })

  it('shows the last accesses of a guest that was stopped, with their values', async () => {
    // mov al, 0x2a; out 0x10, al; jmp $
    const path = image('out.bin', 0xb0, 0x2a, 0xe6, 0x10, 0xeb, 0xfe)
    const { status, stderr } = await nodevisor(['run', path, '--timeout', onEmulated ? '8s' : '400ms'])
    expect(status).toBe(124)
    expect(stderr).toContain('vCPU 0: runnable, real mode')
    expect(stderr).toContain('code at rip: eb fe')
    expect(stderr).toContain('vCPU 0: out port 0x10, 1 byte: 0x2a')
  })

  it('gives the guest the processor, files and interrupt controllers that were asked for', async () => {
    // Long mode: the bytes of file opt/x to the serial port (fw_cfg, key 0x21), then debug-exit.
    const path = image(
      'fw-cfg.bin',
      ...[0xba, 0x10, 0x05, 0, 0, 0xb8, 0x21, 0, 0, 0, 0x66, 0xef],
      ...[0, 1].flatMap(() => [0xba, 0x11, 0x05, 0, 0, 0xec, 0xba, 0xf8, 0x03, 0, 0, 0xee]),
      ...[0xb0, 0, 0xe6, 0xf4],
    )
    const file = join(folder, 'x.txt')
    writeFileSync(file, 'hi')
    const options = [
      '--mode',
      'long',
      '--cpu',
      'host,-rdseed',
      '--irqchip',
      'split',
      '--fw-cfg',
      `opt/x=${file}`,
    ]
    expect(await nodevisor(['run', path, ...options])).toMatchObject({ status: 1, stdout: 'hi' })
  })

  it.each([
    [['--cpu', 'hots'], /did you mean 'host'/],
    [['--cpu', 'host,avx'], /\+name or -name/],
    [['--irqchip', 'ful'], /did you mean 'full'/],
    [['--fw-cfg', 'opt/x'], /name=file/],
    [['--fw-cfg', 'opt/x=/nowhere/at/all'], /ENOENT/],
  ])('refuses %j with what would be right', async (options, message) => {
    const { status, stderr } = await nodevisor(['run', image('any.bin', 0xf4), ...options])
    expect(status).toBe(2)
    expect(stderr).toMatch(message)
  })

  it('gives 124 when the time is over', async () => {
    const { status, stdout, stderr } = await nodevisor([
      'run',
      `${GUESTS}spin.elf`,
      '--timeout',
      onEmulated ? '8s' : '400ms',
    ])
    expect({ status, stdout }).toEqual({ status: 124, stdout: 'spinning\n' })
    expect(stderr).toContain('timed out after')
  })

  it('connects standard input and output to the serial port', async () => {
    const { status, stdout } = await nodevisor(['run', `${GUESTS}echo.elf`], 'one\ntwo\nquit\n')
    expect({ status, stdout }).toEqual({ status: 1, stdout: 'ready\none\ntwo\nquit\nbye\n' })
  })

  it('writes the serial output to a file', async () => {
    const file = join(folder, 'serial.log')
    const { status, stdout } = await nodevisor(['run', `${GUESTS}hello-long.elf`, '--serial', file])
    expect({ status, stdout }).toEqual({ status: 33, stdout: '' })
    expect(readFileSync(file, 'utf8')).toBe('Hello from long mode\n')
  })

  it('prints nothing of the serial port with --serial none', async () => {
    const { stdout } = await nodevisor(['run', `${GUESTS}hello-long.elf`, '--serial', 'none'])
    expect(stdout).toBe('')
  })

  it('prints the text screen with --screen', async () => {
    const { status, stdout } = await nodevisor(['run', `${GUESTS}screen.elf`, '--screen'])
    expect(status).toBe(0)
    expect(stdout).toContain('║      Hello from the text screen      ║')
  })

  it('prints exits and times to standard error with --stats', async () => {
    const path = image('stats.bin', 0xe4, 0x42, 0xb0, 1, 0xe6, 0xf4)
    const { stdout, stderr } = await nodevisor(['run', path, '--stats'])
    expect(stdout).toBe('')
    expect(stderr).toMatch(/ended by: +debug-exit, value 1\n/)
    expect(stderr).toMatch(/exits: +2 io(, \d+ interrupted)?\n/)
    expect(stderr).toMatch(/unclaimed ports: +1 reads, 0 writes \(0x42\)\n/)
  })

  it.each(['inline', 'threads'])('prints one JSON object on one line, running %s', async (execution) => {
    const module = join(folder, 'module.txt')
    writeFileSync(module, 'text of the module\n')
    const args = ['run', `${GUESTS}hello-protected.elf`, '--json', '--cmdline', 'a b', '--module', module]
    const { status, stdout } = await nodevisor([...args, '--execution', execution, '--memory', '32M'])
    expect(status).toBe(33)
    expect(stdout.endsWith('}\n')).toBe(true)
    const report = JSON.parse(stdout)
    expect(report).toMatchObject({
      reason: 'debug-exit',
      code: 16,
      format: 'multiboot',
      mode: 'protected',
      serial: `Hello from protected mode\nmemory: 32 MiB\ncommand line: a b\nmodule ${module}: text of the module\n\n`,
      screen: '',
      exits: { hlt: 0, shutdown: 0 },
    })
    expect(report.durationMs).toBeGreaterThan(0)
    expect(report.exits.io + report.exits.posted).toBeGreaterThan(200)
  })

  it('names the reason and the registers in JSON when the guest shut down', async () => {
    const { status, stdout } = await nodevisor(['run', `${GUESTS}crash.elf`, '--json'])
    expect(status).toBe(70)
    expect(JSON.parse(stdout)).toMatchObject({
      reason: 'shutdown',
      code: null,
      vcpu: 0,
      registers: { rip: expect.stringMatching(/^0x/) },
    })
  })

  it('loads a flat image where --at says, in the mode of --mode', async () => {
    const path = image('flat.bin', 0xf4)
    const { stdout } = await nodevisor(['run', path, '--mode', 'long', '--at', '0x200000', '--json'])
    expect(JSON.parse(stdout)).toMatchObject({ reason: 'halt', format: 'flat', mode: 'long' })
  })

  it('gives 130 on SIGTERM, once the guest has said that it runs', async () => {
    const child = start(['run', `${GUESTS}spin.elf`])
    let said = ''
    child.stdout!.on('data', (bytes) => {
      said += bytes
      if (said === 'spinning\n') child.kill('SIGTERM')
    })
    const { status, stdout } = await finish(child)
    expect({ status, stdout }).toEqual({ status: 130, stdout: 'spinning\n' })
  })

  it('survives a reader that goes away', async () => {
    const child = start(['run', `${GUESTS}spin.elf`, '--timeout', '5s'])
    child.stdout!.destroy()
    const { status } = await finish(child)
    expect([124, 130]).toContain(status)
  })
})

describe('nodevisor run, with virtio devices,', () => {
  const GUEST = `${GUESTS}virtio.elf`
  const BEGIN = 'this is a disk!!'

  /** An image of 64 KiB, as a file. */
  function disk(name: string): { readonly path: string; readonly before: Buffer } {
    const before = Buffer.alloc(64 * 1024)
    before.write(BEGIN)
    const path = join(folder, name)
    writeFileSync(path, before)
    return { path, before }
  }

  const isChanged = ({ path, before }: ReturnType<typeof disk>) => !readFileSync(path).equals(before)

  it('gives the guest disks: to write, read only, with overlays that last and that do not', async () => {
    const [raw, readOnly, base, thrown, odd] = ['raw', 'ro.img', 'base', 'thrown', 'with,comma,rot'].map(disk)
    const overlay = join(folder, 'changes')
    const { status, stdout, stderr } = await nodevisor([
      ...['run', GUEST, '--cmdline', 'block'],
      ...['--disk', raw!.path, '--disk', `${readOnly!.path},ro`],
      ...['--disk', `${base!.path},overlay=${overlay}`, '--disk', `${thrown!.path},overlay`],
      ...['--disk', `${odd!.path},ro,overlay`],
    ])
    expect({ status, stderr }).toEqual({ status: 33, stderr: '' })
    const shown = stdout.split('\n').filter((line) => line.includes('sectors'))
    expect(shown).toEqual(
      ['', ', read-only', '', '', ', read-only'].map(
        (suffix, number) => `block ${number}: 128 sectors, blocks of 512 bytes, 1 queue${suffix}`,
      ),
    )
    expect(stdout.split(BEGIN)).toHaveLength(6)
    expect([raw, readOnly, base, thrown, odd].map((image) => isChanged(image!))).toEqual([
      true,
      false,
      false,
      false,
      false,
    ])
    expect(readFileSync(overlay).subarray(0, 17).toString()).toBe('nodevisor overlay')
  })

  it('connects standard input and output to the console, and no longer to the serial port', async () => {
    const args = ['run', GUEST, '--cmdline', 'ports=1 echo', '--console']
    const { status, stdout, stderr } = await nodevisor(args, 'one\ntwo\nquit\n')
    expect({ status, stdout, stderr }).toEqual({ status: 33, stdout: 'one\ntwo\n', stderr: '' })
  })

  it('prints the serial port beside the console where it is asked to', async () => {
    const args = ['run', GUEST, '--cmdline', 'ports=1 echo', '--console', '--serial', 'stdio']
    const { status, stdout } = await nodevisor(args, 'one\nquit\n')
    expect(status).toBe(33)
    expect(stdout.split('\n').sort()).toEqual(['', 'console 0 port 0: echoed 4 bytes', 'done', 'one'])
  })

  it('loses nothing of a console that says a lot', async () => {
    const args = ['run', GUEST, '--cmdline', 'ports=1 bench-console=512K,64K', '--console']
    const { status, stdout } = await nodevisor(args)
    expect(status).toBe(33)
    expect(stdout === `${'x'.repeat(63)}\n`.repeat(8192)).toBe(true)
  })

  it('gives the guest random numbers with --rng', async () => {
    const { status, stdout } = await nodevisor(['run', GUEST, '--cmdline', 'entropy', '--rng'])
    expect(status).toBe(33)
    expect(stdout).toContain('entropy: 64 bytes, 64 bytes, different\n')
  })

  it('has console and devices in JSON', async () => {
    const { path } = disk('json.img')
    const cmdline = ['--cmdline', 'ports=1 block console entropy']
    const args = ['run', GUEST, ...cmdline, '--disk', path, '--console', '--rng', '--json']
    const { status, stdout } = await nodevisor(args)
    expect(status).toBe(33)
    const report = JSON.parse(stdout)
    expect(report).toMatchObject({ reason: 'debug-exit', code: 16, console: 'hello from port 0\n' })
    expect(report.serial).toMatch(/^block 0: 128 sectors.*\ndone\n$/s)
    expect(report.virtioDevices).toMatchObject([
      { name: 'disk0', deviceType: 2, address: 0xfeb0_0000, irq: 5, status: 15, errors: 0 },
      { name: 'console', deviceType: 3, address: 0xfeb0_1000, status: 15 },
      {
        name: 'rng',
        deviceType: 4,
        features: expect.stringMatching(/^0x1\d{8}$/),
        statistics: { requests: 4 },
      },
    ])
  })

  it('has null for the console, and no devices, in JSON where there are none', async () => {
    const { stdout } = await nodevisor(['run', image('none.bin', 0xf4), '--json'])
    expect(JSON.parse(stdout)).toMatchObject({ console: null, virtioDevices: [] })
  })

  it('says on standard error which requests failed, and why', async () => {
    const { path } = disk('cut.img')
    const child = start([
      'run',
      GUEST,
      '--cmdline',
      'ports=1 echo bench-block-rand=1',
      '--disk',
      path,
      '--console',
    ])
    child.stdout!.once('data', () => {
      truncateSync(path, 0)
      child.stdin!.end('quit\n')
    })
    child.stdin!.write('up\n')
    const { status, stderr } = await finish(child)
    expect(status).toBe(3)
    expect(stderr).toMatch(/^nodevisor: disk0: [1-9]\d* requests failed, the last one with: .*cut\.img/m)
  })

  it.each([
    ['a disk that is not there', ['--disk', '/nowhere/disk.img'], /disk\.img.*ENOENT|ENOENT.*disk\.img/],
    ['a folder as disk', ['--disk', '/tmp'], /\/tmp/],
    ['a disk of an odd size', ['--disk', GUEST], /truncate -s \d+/],
    ['no disk', ['--disk', ''], /file\[,ro\]\[,overlay\[=file\]\] for --disk/],
    ['a word without a disk', ['--disk', ',ro'], /--disk|,ro/],
  ])('refuses %s with status 2, before the guest starts', async (_what, options, message) => {
    const { status, stdout, stderr } = await nodevisor(['run', GUEST, ...options])
    expect({ status, stdout }).toEqual({ status: 2, stdout: '' })
    expect(stderr).toMatch(message)
    expect(stderr).not.toMatch(/^\s+at /m)
  })

  it('refuses a disk that is in use with status 2', async () => {
    const { path } = disk('used.img')
    const { status, stderr } = await nodevisor(['run', GUEST, '--disk', path, '--disk', path])
    expect(status).toBe(2)
    expect(stderr).toMatch(/used\.img/)
  })
})

describe('bad usage ends with status 2', () => {
  it.each([
    ['no image', ['run'], "missing required argument 'image'"],
    ['an option misspelt', ['run', 'x', '--memroy', '1M'], 'Did you mean --memory?'],
    ['a command misspelt', ['rnu', 'x'], 'Did you mean run?'],
    ['a file that is not there', ['run', '/nonexistent/kernel.elf'], 'ENOENT'],
    ['a folder as image', ['run', '/'], 'Expected a regular file'],
    ['a format that is none', ['run', `${GUESTS}spin.elf`, '--format', 'efl'], "did you mean 'elf'"],
    ['a mode that is none', ['run', `${GUESTS}spin.elf`, '--mode', 'reel'], "did you mean 'real'"],
    ['a size that is none', ['run', `${GUESTS}spin.elf`, '--memory', '64Q'], "received '64Q'"],
    ['no memory', ['run', `${GUESTS}spin.elf`, '--memory', '0'], 'a multiple of 4 KiB'],
    ['no processor', ['run', `${GUESTS}spin.elf`, '--cpus', '0'], 'an integer of at least 1 for cpus'],
    ['half a processor', ['run', `${GUESTS}spin.elf`, '--cpus', '1.5'], "received '1.5'"],
    [
      'too many processors',
      ['run', `${GUESTS}spin.elf`, '--cpus', '100000'],
      "what this host's KVM can have",
    ],
    ['a time that is none', ['run', `${GUESTS}spin.elf`, '--timeout', 'soon'], "received 'soon'"],
    [
      'an execution that is none',
      ['run', `${GUESTS}spin.elf`, '--execution', 'thread'],
      "did you mean 'threads'",
    ],
    ['a file that cannot be written', ['run', `${GUESTS}spin.elf`, '--serial', '/nonexistent/log'], 'ENOENT'],
    ['an ELF named as multiboot', ['run', `${GUESTS}spin.elf`, '--format', 'multiboot'], 'Multiboot'],
  ])('%s', async (_what, args, message) => {
    const { status, stdout, stderr } = await nodevisor(args)
    expect({ status, stdout }).toEqual({ status: 2, stdout: '' })
    expect(stderr).toContain(message)
    expect(stderr).not.toMatch(/^\s+at /m)
  })
})

describe('nodevisor info', () => {
  it('says that KVM is usable, and of which kind', async () => {
    const { status, stdout } = await nodevisor(['info'])
    expect(status).toBe(0)
    expect(stdout).toMatch(/^KVM: +usable$/m)
    expect(stdout).toMatch(/^API version: +12$/m)
  })

  it('prints the same as JSON', async () => {
    const { stdout } = await nodevisor(['info', '--json'])
    expect(JSON.parse(stdout)).toMatchObject({
      usable: true,
      apiVersion: 12,
      capabilities: { USER_MEMORY: 1 },
    })
  })
})

it('says nothing of a reader that has gone', () => {
  const { status, stderr } = spawnSync('/bin/sh', ['-c', `'${process.execPath}' '${COMMAND}' --help | :`], {
    encoding: 'utf8',
  })
  expect({ status, stderr }).toEqual({ status: 0, stderr: '' })
})
