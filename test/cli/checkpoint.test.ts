import { type ChildProcess, spawn } from 'node:child_process'
import { once } from 'node:events'
import { existsSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { describe, expect, it, onTestFinished } from 'vitest'
import { makeFolder } from '../helpers/folders.js'
import { onEmulated } from '../helpers/guests.js'

const COMMAND = new URL('../../dist/cli/main.js', import.meta.url).pathname
const GUESTS = new URL('../../build/guests/', import.meta.url).pathname
const DISK_SIZE = 64 * 1024

/** The command, under way. */
class Nodevisor {
  stdout = ''
  stderr = ''
  readonly #child: ChildProcess
  readonly #exit: Promise<unknown[]>

  constructor(args: readonly string[]) {
    this.#child = spawn(process.execPath, [COMMAND, ...args], { stdio: ['ignore', 'pipe', 'pipe'] })
    onTestFinished(() => void this.#child.kill('SIGKILL'))
    this.#child.stdout!.on('data', (bytes) => {
      this.stdout += bytes
    })
    this.#child.stderr!.on('data', (bytes) => {
      this.stderr += bytes
    })
    this.#exit = once(this.#child, 'close')
  }

  get isOver(): boolean {
    return this.#child.exitCode !== null || this.#child.signalCode !== null
  }

  /** Waits for its end. */
  async end(): Promise<{ readonly status: number | null; readonly stdout: string; readonly stderr: string }> {
    const [status] = await this.#exit
    return { status: status as number | null, stdout: this.stdout, stderr: this.stderr }
  }

  /** Kills it, and waits for that. @returns whether it had not come to its end */
  async kill(signal: NodeJS.Signals = 'SIGKILL'): Promise<boolean> {
    this.#child.kill(signal)
    await this.#exit
    return this.#child.signalCode === signal
  }
}

/** Of the last checkpoint that is whole: 0 without one. */
function currentOf(folder: string): number {
  const path = join(folder, 'current')
  return existsSync(path) ? Number(readFileSync(path, 'utf8')) : 0
}

/** Waits until so many checkpoints were taken, or it is over. */
async function checkpoints(command: Nodevisor, folder: string, count: number): Promise<void> {
  const last = currentOf(folder) + count
  while (!command.isOver && currentOf(folder) < last) await new Promise((resolve) => setTimeout(resolve, 1))
}

/**
 * Runs a machine that is killed again and again, each time soon after some checkpoints, until it comes to its end.
 *
 * @returns all that it printed, and how often it was killed
 */
async function runThroughKills(args: readonly string[], kills: number) {
  const folder = join(makeFolder(), 'checkpoints')
  let command = new Nodevisor([...args, '--checkpoint', `every=100ms,dir=${folder}`])
  let printed = ''
  let killed = 0
  for (; killed < kills; killed++) {
    await checkpoints(command, folder, killed === 0 ? 1 : 1 + (killed % 3))
    // At no particular moment of the next one.
    await new Promise((resolve) => setTimeout(resolve, (killed * 37) % 130))
    if (!(await command.kill())) break
    printed += command.stdout
    expect(command.stderr).toBe('')
    command = new Nodevisor(['resume', folder])
  }
  const { status, stdout, stderr } = await command.end()
  return { status, stderr, printed: printed + stdout, killed }
}

const KILLS = 4

/** Every third case in the lab, where a command takes many seconds to start, and this kills it again and again. */
function sample<Case>(cases: readonly Case[]): readonly Case[] {
  return onEmulated ? cases.filter((_, index) => index % 3 === 0) : cases
}

describe('a machine whose process is killed', () => {
  it.each(
    sample([
      ['inline', 1, ['--irqchip', 'split']],
      ['threads', 1, ['--irqchip', 'full']],
      ['threads', 2, ['--irqchip', 'full']],
      ['inline', 2, ['--irqchip', 'split']],
      ['threads', 4, ['--irqchip', 'split']],
    ] as const),
  )('goes on to the one answer (%s, %d processors)', async (execution, cpus, options) => {
    const rounds = onEmulated ? 800 : Math.round(60_000 / cpus)
    const cmdline = `cpus=${cpus} rounds=${rounds} ticks=20 timer=lapic`
    const args = ['run', `${GUESTS}continuity.elf`, '--memory', '8M', '--cmdline', cmdline, ...options]
    const command = [...args, '--cpus', `${cpus}`, '--execution', execution]
    const undisturbed = await new Nodevisor(command).end()
    expect(undisturbed.status).toBe(33)
    const [answer] = /^hash .*$/m.exec(undisturbed.stdout)!
    const { status, stderr, printed, killed } = await runThroughKills(command, KILLS)
    expect({ status, stderr }).toEqual({ status: 33, stderr: '' })
    expect(printed.trimEnd().split('\n').at(-1)).toBe(answer)
    expect(killed).toBeGreaterThan(1)
  })

  it.each(
    sample([
      ['an overlay that is kept', (path: string) => `${path},overlay=${path}.changes`],
      ['an image', (path: string) => path],
      ['an overlay that is not', (path: string) => `${path},overlay`],
    ]),
  )('finds what it has written to %s', async (_what, disk) => {
    const path = join(makeFolder(), 'disk.img')
    writeFileSync(path, Buffer.alloc(DISK_SIZE))
    const cmdline = Array(onEmulated ? 40 : 24)
      .fill('block')
      .join(' reset ')
    const args = ['run', `${GUESTS}virtio.elf`, '--memory', '8M', '--cmdline', cmdline, '--disk', disk(path)]
    const { status, stderr, printed, killed } = await runThroughKills(args, KILLS)
    expect({ status, stderr, failed: /FAILED.*/.exec(printed)?.[0] }).toEqual({ status: 33, stderr: '' })
    expect(printed.endsWith('done\n')).toBe(true)
    expect(killed).toBeGreaterThan(1)
  })
})

describe('nodevisor run --checkpoint', () => {
  const forEver = (folder: string, every = '100ms') =>
    new Nodevisor([
      'run',
      `${GUESTS}spin.elf`,
      '--memory',
      '8M',
      '--checkpoint',
      `every=${every},dir=${folder}`,
    ])

  it('has the first one before the guest says anything, and none of the end', async () => {
    const folder = join(makeFolder(), 'checkpoints')
    const args = ['run', `${GUESTS}hello-long.elf`, '--checkpoint', `every=1h,dir=${folder}`]
    const first = await new Nodevisor(args).end()
    expect(first).toEqual({ status: 33, stdout: 'Hello from long mode\n', stderr: '' })
    expect(currentOf(folder)).toBe(1)
    expect(await new Nodevisor(['resume', folder]).end()).toEqual(first)
  })

  it('leaves a folder to go on from when it is left by a signal', async () => {
    const folder = join(makeFolder(), 'checkpoints')
    const command = forEver(folder)
    await checkpoints(command, folder, 3)
    await command.kill('SIGTERM')
    expect(await command.end()).toEqual({ status: 130, stdout: 'spinning\n', stderr: 'nodevisor: left\n' })
    const resumed = new Nodevisor(['resume', folder, '--every', '200ms', '--execution', 'inline'])
    await checkpoints(resumed, folder, 2)
    expect(await resumed.kill()).toBe(true)
    expect(JSON.parse(readFileSync(join(folder, 'options'), 'utf8'))).toEqual({ every: 200 })
    const { status } = await new Nodevisor(['resume', folder, '--timeout', '300ms']).end()
    expect(status).toBe(124)
  })

  it('goes on where one fails, and says so once for each', async () => {
    const folder = join(makeFolder(), 'checkpoints')
    const command = forEver(folder)
    await checkpoints(command, folder, 2)
    const undo = join(folder, 'undo')
    rmSync(undo, { recursive: true })
    const said = () => command.stderr.split('\n').length - 1
    while (said() < 2) await new Promise((resolve) => setTimeout(resolve, 1))
    const last = currentOf(folder)
    await command.kill()
    const line = /^nodevisor: no checkpoint: .*000\d+.* \(ENOENT: .*$/
    expect(command.stderr.trimEnd().split('\n')).toEqual(Array(said()).fill(expect.stringMatching(line)))
    expect(currentOf(folder)).toBe(last)
  })

  it('has a folder for itself', async () => {
    const folder = join(makeFolder(), 'checkpoints')
    const command = forEver(folder, '1h')
    await checkpoints(command, folder, 1)
    const [other, resumed] = await Promise.all([
      forEver(folder).end(),
      new Nodevisor(['resume', folder]).end(),
    ])
    expect(other).toEqual({ status: 2, stdout: '', stderr: expect.stringMatching(/process \d+ uses/) })
    expect(resumed).toEqual({ status: 2, stdout: '', stderr: expect.stringMatching(/process \d+ uses/) })
    await command.kill()
    const { status, stderr } = await forEver(folder).end()
    expect([status, stderr]).toEqual([2, expect.stringMatching(/another machine/)])
  })

  it.each([
    ['every=5s', /every=TIME,dir=DIR/],
    ['dir=x,every=5s', /every=TIME,dir=DIR/],
    ['every=soon,dir=x', /duration/],
    ['every=99ms,dir=x', /at least 100ms/],
    ['every=5s,dir=', /every=TIME,dir=DIR/],
    ['every=5s,dir=/nowhere/at/all', /ENOENT/],
  ])('refuses %s with status 2', async (option, message) => {
    const args = ['run', `${GUESTS}spin.elf`, '--checkpoint', option]
    const { status, stdout, stderr } = await new Nodevisor(args).end()
    expect({ status, stdout }).toEqual({ status: 2, stdout: '' })
    expect(stderr).toMatch(message)
    expect(stderr).not.toMatch(/^\s+at /m)
  })
})

describe('nodevisor resume', () => {
  it.each([
    ['a folder that is not there', ['/nowhere/at/all'], /none that is whole/],
    ['a folder without checkpoints', [GUESTS], /none that is whole/],
    ['no folder', [], /missing required argument 'folder'/],
    ['a time that is none', ['x', '--every', '1ms'], /at least 100ms/],
    ['an execution that is none', ['x', '--execution', 'thread'], /did you mean 'threads'/],
  ])('refuses %s with status 2', async (_what, args, message) => {
    const { status, stdout, stderr } = await new Nodevisor(['resume', ...args]).end()
    expect({ status, stdout }).toEqual({ status: 2, stdout: '' })
    expect(stderr).toMatch(message)
    expect(stderr).not.toMatch(/^\s+at /m)
  })

  it('wants to know how often, where nothing says so', async () => {
    const folder = join(makeFolder(), 'checkpoints')
    const args = ['run', `${GUESTS}hello-long.elf`, '--checkpoint', `every=1h,dir=${folder}`]
    await new Nodevisor(args).end()
    for (const content of ['', '{"every":"x"}']) {
      writeFileSync(join(folder, 'options'), content)
      const { status, stderr } = await new Nodevisor(['resume', folder]).end()
      expect([status, stderr]).toEqual([2, expect.stringMatching(/say it with --every/)])
    }
    expect(await new Nodevisor(['resume', folder, '--every', '1h']).end()).toMatchObject({ status: 33 })
  })
})
