import { type ChildProcess, execFileSync, fork } from 'node:child_process'
import { once } from 'node:events'
import fs, { readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { describe, expect, it, onTestFinished, vi } from 'vitest'
import { binding } from '../../src/binding.js'
import { type DiskOptions, VirtualMachine, type VirtualMachineOptions } from '../../src/index.js'
import { makeImage, pattern } from '../backends/disks.js'
import { debugExit, program, SPIN } from '../helpers/code.js'
import { makeFolder } from '../helpers/folders.js'
import { imageOf, onEmulated } from '../helpers/guests.js'
import { SUCCESS } from '../helpers/interrupts.js'
import { RUN_LIMIT } from '../helpers/limits.js'
import { boot, errorWith, until } from './boot.js'
import { type CheckpointMessage, type CheckpointTask, momentOf } from './checkpoint-process.js'
import { bootVirtio } from './virtio-guest.js'

const PROCESS = new URL('./checkpoint-process.ts', import.meta.url)
const DISK_SIZE = 64 * 1024
const VALUE = 0x6000

/** A path where nothing is yet. */
const newFolder = () => join(makeFolder(), 'checkpoints')

async function recover(folder: string): Promise<VirtualMachine> {
  const vm = await VirtualMachine.recover(folder)
  onTestFinished(() => vm.close())
  return vm
}

const currentOf = (folder: string) => Number(readFileSync(join(folder, 'current'), 'utf8'))
/** What there is of snapshots and undo logs. */
const filesOf = (folder: string) => readdirSync(folder).filter((name) => /^\d/.test(name))
const logsOf = (folder: string) => readdirSync(join(folder, 'undo'))

/** A machine that counts in memory, one each run. */
const counting = (options: Partial<VirtualMachineOptions> = {}) =>
  boot({ image: program([0xff, 0x06, 0x00, 0x60], debugExit(1), [0xeb, 0xf6]) }, options)

async function count(vm: VirtualMachine): Promise<number> {
  expect(await vm.run({ timeout: RUN_LIMIT })).toMatchObject({ reason: 'debug-exit', code: 1 })
  return vm.memory.readUint16(VALUE)
}

describe('a machine that is recovered', () => {
  it('goes on where the last checkpoint was, again and again', async () => {
    const folder = newFolder()
    let vm = await counting()
    for (let i = 1; i <= 5; i++) {
      expect(await count(vm)).toBe(i)
      await vm.checkpoint(folder)
      expect(await count(vm)).toBe(i + 1)
      await vm.close()
      vm = await recover(folder)
    }
    expect(currentOf(folder)).toBe(5)
  })

  it('finds its disks as they were: images and overlays that are kept', async () => {
    const folder = newFolder()
    const bytes = pattern(DISK_SIZE)
    const [image, base] = [makeImage(bytes), makeImage(bytes)]
    const disks: DiskOptions[] = [{ file: image }, { file: base, overlay: join(makeFolder(), 'changes') }]
    const vm = await bootVirtio('block', { disks })
    const moment = await momentOf(vm)
    await vm.checkpoint(folder)
    expect(await vm.run({ timeout: RUN_LIMIT })).toMatchObject(SUCCESS)
    expect(await momentOf(vm)).not.toBe(moment)
    await vm.close()
    expect(readFileSync(image).equals(bytes)).toBe(false)
    for (let i = 0; i < 2; i++) {
      const again = await recover(folder)
      expect(readFileSync(image).equals(bytes)).toBe(true)
      expect(await momentOf(again)).toBe(moment)
      expect(await again.run({ timeout: RUN_LIMIT })).toMatchObject(SUCCESS)
      expect(again.serial.output).toBe(vm.serial.output)
      await again.close()
    }
  })

  it('finds disks that are in no file, in every checkpoint', async () => {
    const folder = newFolder()
    const bytes = pattern(DISK_SIZE)
    const disks: DiskOptions[] = [
      { memory: bytes.slice() },
      { memory: bytes.slice(), readOnly: true },
      { file: makeImage(bytes), overlay: true },
      { file: makeImage(bytes), readOnly: true },
    ]
    let vm = await bootVirtio('block reset block', { disks })
    const moment = await momentOf(vm)
    // The second one replaces the first.
    for (let i = 0; i < 20; i++) {
      await vm.checkpoint(folder)
      if (i % 5 > 0) continue
      await vm.close()
      vm = await recover(folder)
    }
    expect(filesOf(folder)).not.toContain('000001')
    expect(logsOf(folder)).toEqual([])
    expect(await momentOf(vm)).toBe(moment)
    expect(await vm.run({ timeout: RUN_LIMIT })).toMatchObject(SUCCESS)
    await vm.close()
    expect(await momentOf(await recover(folder))).toBe(moment)
  })

  it('takes its checkpoints on, as a copy that knows that it is one', async () => {
    const folder = newFolder()
    const first = await boot({ image: program(SPIN) }, { irqchip: 'full' })
    await first.checkpoint(folder)
    await first.close()
    const vm = await recover(folder)
    const id = (machine: VirtualMachine) => Buffer.from(machine.memory.read(0xe0030, 16)).toString('hex')
    const running = vm.run({ timeout: RUN_LIMIT })
    const { pages } = await vm.checkpoint(folder)
    // The changes only.
    expect(pages).toBeLessThan(10)
    vm.stop()
    await running
    const second = id(vm)
    await vm.close()
    expect(currentOf(folder)).toBe(2)
    expect(id(await recover(folder))).not.toBe(second)
  })
})

describe('a folder of checkpoints', () => {
  it('has the last chain only, and one undo log for each disk', async () => {
    const folder = newFolder()
    const vm = await counting({ disks: [{ file: makeImage(DISK_SIZE) }, { file: makeImage(DISK_SIZE) }] })
    vm.memory.fill(0x10_0000, 0x10_0000, 1)
    const pages: number[] = []
    for (let number = 1; number <= 18; number++) {
      await count(vm)
      pages.push((await vm.checkpoint(folder)).pages)
      expect(currentOf(folder)).toBe(number)
      const name = String(number).padStart(6, '0')
      expect(logsOf(folder).sort()).toEqual([`${name}-disk0`, `${name}-disk1`])
      expect(filesOf(folder)).toHaveLength(number <= 16 ? number : number - 16)
    }
    // 1 and 17 have all of memory.
    expect(pages.flatMap((count, index) => (count > 100 ? index + 1 : []))).toEqual([1, 17])
    expect(readdirSync(folder).sort()).toEqual(['000017', '000018', 'current', 'lock', 'undo'])
    await vm.close()
    expect(await count(await recover(folder))).toBe(19)
  })

  it('is full anew after a snapshot elsewhere, which has to be full itself', async () => {
    const folder = newFolder()
    const vm = await counting()
    await vm.checkpoint(folder)
    await count(vm)
    await expect(vm.snapshot(join(makeFolder(), 'a'), { incremental: true })).rejects.toEqual(
      errorWith('ERR_INVALID_ARGUMENT', /after a checkpoint/),
    )
    await vm.snapshot(join(makeFolder(), 'b'))
    await vm.checkpoint(folder)
    expect(filesOf(folder)).toEqual(['000002'])
    await vm.close()
    expect(await count(await recover(folder))).toBe(2)
  })

  it('is used by one at a time, and says by whom', async () => {
    const folder = newFolder()
    const [vm, other] = [await counting(), await counting()]
    const busy = new RegExp(`process ${process.pid} uses`)
    await vm.checkpoint(folder)
    await expect(other.checkpoint(folder)).rejects.toEqual(errorWith('ERR_SNAPSHOT_WRITE', busy))
    await expect(VirtualMachine.recover(folder)).rejects.toEqual(errorWith('ERR_SNAPSHOT_READ', busy))
    await vm.close()
    await expect(other.checkpoint(folder)).rejects.toEqual(
      errorWith('ERR_SNAPSHOT_WRITE', /another machine; recover/),
    )
    // It was refused, and can choose another one.
    await other.checkpoint(newFolder())
    await expect(other.checkpoint(folder)).rejects.toEqual(errorWith('ERR_INVALID_ARGUMENT', /folder/))
    await recover(folder)
  })

  it('has to be empty at first', async () => {
    const folder = makeFolder()
    writeFileSync(join(folder, 'letter.txt'), 'Dear')
    const vm = await counting()
    await expect(vm.checkpoint(folder)).rejects.toEqual(errorWith('ERR_SNAPSHOT_WRITE', /something in/))
    expect(readdirSync(folder)).toEqual(['letter.txt'])
    await expect(vm.checkpoint(join(folder, 'no', 'where'))).rejects.toEqual(
      errorWith('ERR_SNAPSHOT_WRITE', /ENOENT/),
    )
    expect(await count(vm)).toBe(1)
  })

  it.each([
    ['nothing', () => {}, 'ERR_SNAPSHOT_READ', /none that is whole/],
    ['no number', (path: string) => writeFileSync(path, 'one\n'), 'ERR_SNAPSHOT_DAMAGED', /number/],
    ['number 0', (path: string) => writeFileSync(path, '000000\n'), 'ERR_SNAPSHOT_DAMAGED', /number/],
    [
      'too much',
      (path: string) => writeFileSync(path, '000001\n'.repeat(99)),
      'ERR_SNAPSHOT_DAMAGED',
      /number/,
    ],
    [
      'a number that is not there',
      (path: string) => writeFileSync(path, '000007\n'),
      'ERR_SNAPSHOT_READ',
      /ENOENT/,
    ],
    ['a folder', (path: string) => fs.mkdirSync(path), 'ERR_SNAPSHOT_READ', /EISDIR/],
  ] as const)('with %s for current is refused', async (_what, write, code, message) => {
    const folder = newFolder()
    const vm = await counting()
    await vm.checkpoint(folder)
    await vm.close()
    const current = join(folder, 'current')
    rmSync(current)
    write(current)
    const before = readdirSync('/proc/self/fd').length
    await expect(VirtualMachine.recover(folder)).rejects.toEqual(errorWith(code, message))
    expect(readdirSync('/proc/self/fd')).toHaveLength(before)
  })

  it('whose undo log is missing or not whole is refused, and what is on the disk stays', async () => {
    const folder = newFolder()
    const image = makeImage(pattern(DISK_SIZE))
    const vm = await bootVirtio('block', { disks: [{ file: image }] })
    await vm.checkpoint(folder)
    expect(await vm.run({ timeout: RUN_LIMIT })).toMatchObject(SUCCESS)
    await vm.close()
    const after = readFileSync(image)
    const log = join(folder, 'undo', '000001-disk0')
    const bytes = readFileSync(log)
    bytes[100]! ^= 1
    writeFileSync(log, bytes)
    await expect(VirtualMachine.recover(folder)).rejects.toEqual(errorWith('ERR_DISK_FORMAT', /damaged/))
    rmSync(log)
    await expect(VirtualMachine.recover(folder)).rejects.toEqual(errorWith('ERR_DISK_OPEN', /000001-disk0/))
    expect(readFileSync(image).equals(after)).toBe(true)
  })

  it('takes no other disks, nor unknown options', async () => {
    const folder = newFolder()
    const vm = await counting()
    await vm.checkpoint(folder)
    await vm.close()
    await expect(VirtualMachine.recover(folder, { disks: [] } as object)).rejects.toEqual(
      errorWith('ERR_INVALID_ARGUMENT', /disks/),
    )
    await expect(VirtualMachine.recover(folder, { disk: [] } as object)).rejects.toEqual(
      errorWith('ERR_UNKNOWN_OPTION'),
    )
    await expect(vm.checkpoint(folder)).rejects.toEqual(errorWith('ERR_CLOSED'))
    await expect(vm.checkpoint(folder, { incremental: true } as object)).rejects.toEqual(
      errorWith('ERR_UNKNOWN_OPTION'),
    )
  })
})

describe('a checkpoint that fails', () => {
  /** Its disk has been written since the first checkpoint. */
  async function checkpointed(folder: string) {
    const bytes = pattern(DISK_SIZE)
    const image = makeImage(bytes)
    const vm = await bootVirtio('block', { disks: [{ file: image }] })
    const moment = await momentOf(vm)
    await vm.checkpoint(folder)
    return { vm, moment }
  }

  /** From now on undo logs can be begun, but nothing can be kept in them. */
  function failLogs(): void {
    const { writev } = fs
    onTestFinished(() => void vi.restoreAllMocks())
    vi.spyOn(binding().fileIo, 'pwritevNowait').mockReturnValue(-95)
    vi.spyOn(fs, 'writev').mockImplementation(((fd: number, ...rest: unknown[]) => {
      const callback = rest.at(-1) as (error: Error) => void
      if (fs.readlinkSync(`/proc/self/fd/${fd}`).includes('/undo/') && rest[1] !== 0)
        callback(new Error('no space'))
      else Reflect.apply(writev, fs, [fd, ...rest])
    }) as never)
  }

  it('leaves the machine and the one before as they were', async () => {
    const folder = newFolder()
    const { vm, moment } = await checkpointed(folder)
    const stop = new AbortController()
    const onProgress = () => stop.abort()
    const { rename } = fs.promises
    const failAt = (end: string) =>
      vi.spyOn(fs.promises, 'rename').mockImplementation(async (from, to) => {
        if (String(to).endsWith(end)) throw Object.assign(new Error('EIO: rename'), { code: 'EIO' })
        return rename(from, to)
      })
    onTestFinished(() => void vi.restoreAllMocks())
    const failures = [
      [/abort/, () => vm.checkpoint(folder, { onProgress, signal: stop.signal })],
      [/EIO/, () => failAt('current') && vm.checkpoint(folder)],
    ] as const
    for (const [message, take] of failures) {
      await expect(take()).rejects.toEqual(errorWith('ERR_SNAPSHOT_WRITE', message))
      expect([currentOf(folder), filesOf(folder), logsOf(folder)]).toEqual([1, ['000001'], ['000001-disk0']])
    }
    vi.restoreAllMocks()
    expect(await vm.run({ timeout: RUN_LIMIT })).toMatchObject(SUCCESS)
    await vm.close()
    const again = await recover(folder)
    expect(await momentOf(again)).toBe(moment)
    expect(await again.run({ timeout: RUN_LIMIT })).toMatchObject(SUCCESS)
    // It is full, as that failed which the changes are since.
    await again.checkpoint(folder)
    expect(filesOf(folder)).toEqual(['000001', '000002'])
  })

  it.skipIf(process.getuid!() !== 0)('for want of space does so, too', async () => {
    const mount = makeFolder()
    execFileSync('mount', ['-t', 'tmpfs', '-o', 'size=2m', 'tmpfs', mount])
    onTestFinished(() => void execFileSync('umount', [mount]))
    const folder = join(mount, 'checkpoints')
    const vm = await counting({ disks: [{ file: makeImage(DISK_SIZE) }] })
    expect(await count(vm)).toBe(1)
    await vm.checkpoint(folder)
    vm.memory.fill(0x20_0000, 0x20_0000, 0xff)
    await expect(vm.checkpoint(folder)).rejects.toEqual(
      errorWith('ERR_SNAPSHOT_WRITE', /ENOSPC.*free some space/),
    )
    expect(await count(vm)).toBe(2)
    expect([currentOf(folder), filesOf(folder), logsOf(folder)]).toEqual([1, ['000001'], ['000001-disk0']])
    vm.memory.fill(0x20_0000, 0x20_0000, 0)
    await vm.checkpoint(folder)
    await vm.close()
    // Of a file there even the holes take space when they are read.
    execFileSync('mount', ['-o', 'remount,size=16m', mount])
    const again = await recover(folder)
    expect(await count(again)).toBe(3)
    // Nothing can be mounted there still when it goes.
    await again.close()
  })

  it('for a disk that could not be kept is made good by the next one', async () => {
    const folder = newFolder()
    const { vm } = await checkpointed(folder)
    failLogs()
    expect(await vm.run({ timeout: RUN_LIMIT })).toMatchObject(SUCCESS)
    vi.restoreAllMocks()
    const moment = await momentOf(vm)
    await vm.checkpoint(folder)
    await vm.close()
    expect(await momentOf(await recover(folder))).toBe(moment)
  })

  it('as a disk could not be kept while it was written, does not count', async () => {
    const folder = newFolder()
    const cmdline = Array(500).fill('block').join(' reset ')
    const vm = await bootVirtio(cmdline, { disks: [{ file: makeImage(pattern(DISK_SIZE)) }] })
    await vm.checkpoint(folder)
    const running = vm.run({ timeout: RUN_LIMIT })
    const requests = () => vm.virtioDevices[0]!.statistics.requests
    failLogs()
    // When its files are written, and to be made durable.
    const { open } = fs.promises
    const opens = vi.spyOn(fs.promises, 'open').mockImplementation(async (...args) => {
      if (!String(args[0]).includes('/000002.')) return open(...args)
      opens.mockImplementation(open)
      const enough = requests() + 100
      await until(() => requests() > enough)
      return open(...args)
    })
    await expect(vm.checkpoint(folder)).rejects.toEqual(
      errorWith('ERR_SNAPSHOT_WRITE', /undo log .*incomplete/),
    )
    expect(currentOf(folder)).toBe(1)
    vi.restoreAllMocks()
    await vm.checkpoint(folder)
    vm.stop()
    expect(await running).toMatchObject({ by: 'stop' })
    await vm.close()
    await recover(folder)
  })

  it('of a machine that has ended is none', async () => {
    const folder = newFolder()
    const vm = await boot({ image: imageOf({ image: 'reset.bin' }) })
    await vm.run({ timeout: RUN_LIMIT })
    await expect(vm.checkpoint(folder)).rejects.toEqual(errorWith('ERR_ENDED'))
  })
})

it('a machine that is closed while checkpoints are under way leaves a folder that is whole, and no files open', async () => {
  // What stays open for all machines.
  await (await counting()).close()
  const before = readdirSync('/proc/self/fd').length
  const folder = newFolder()
  const vm = await boot({ image: program(SPIN) }, { disks: [{ file: makeImage(DISK_SIZE) }] })
  void vm.run({ timeout: RUN_LIMIT })
  await vm.checkpoint(folder)
  const taking = [0, 1, 2].map(() => vm.checkpoint(folder))
  const settled = Promise.allSettled(taking)
  await vm.close()
  await settled
  expect(readdirSync('/proc/self/fd')).toHaveLength(before)
  await (await VirtualMachine.recover(folder)).close()
  expect(readdirSync('/proc/self/fd')).toHaveLength(before)
})

describe('a process that is killed', () => {
  interface Killed {
    /** What the machine was when a checkpoint was begun, by its number. */
    readonly moments: ReadonlyMap<number, string>
    /** How many steps it took to do what it was to be killed in, if it was not. */
    readonly steps: number | undefined
  }

  /** Has a process do something until it dies, or has done what it was to be killed in. */
  async function kill(task: CheckpointTask): Promise<Killed> {
    const child: ChildProcess = fork(PROCESS, [JSON.stringify(task)], { execArgv: ['--import', 'tsx'] })
    onTestFinished(() => void child.kill('SIGKILL'))
    const exit = once(child, 'exit')
    const moments = new Map<number, string>()
    let steps: number | undefined
    child.on('message', (message: CheckpointMessage) => {
      if ('moment' in message) moments.set(message.number, message.moment)
      else if (message.done === task.dieIn) {
        steps = message.steps
        child.kill('SIGKILL')
      }
    })
    expect(await exit).toEqual([null, 'SIGKILL'])
    return { moments, steps }
  }

  const image = (): DiskOptions => ({ file: makeImage(pattern(DISK_SIZE)) })
  const overlay = () => ({ ...image(), overlay: join(makeFolder(), 'changes') })

  // Each kill takes a second or two; where all is slow, half a minute.
  const [most, few] = [onEmulated ? 4 : 3, onEmulated ? 5 : 3]

  it.each([
    ['an image', 1, most, image],
    ['an image', 2, most, image],
    ['an image', 3, most, image],
    ['an overlay', 2, few, overlay],
  ])('at any step of a checkpoint leaves it whole, or the one before (%s, from step %d)', async (...args) => {
    const [, first, stride, disk] = args
    const numbers: number[] = []
    for (let step = first, steps: number | undefined; steps === undefined; step += stride) {
      const folder = newFolder()
      const killed = await kill({ folder, disks: [disk()], dieIn: 'checkpoint 2', step })
      steps = killed.steps
      const number = currentOf(folder)
      numbers.push(number)
      const vm = await recover(folder)
      expect([step, await momentOf(vm)]).toEqual([step, killed.moments.get(number)])
      await vm.close()
    }
    // Log, folder, memory, state, their rename, current, its rename, and removing the old log.
    expect(numbers.length * stride).toBeGreaterThan(7)
    expect([numbers.at(0), numbers.at(-1)]).toEqual([1, 2])
    expect(numbers).toEqual(numbers.toSorted())
  })

  it.each([
    ['an image', image],
    ['an overlay', overlay],
  ])('at any step of its recovery can be recovered (%s)', async (_what, disk) => {
    const folder = newFolder()
    const task: CheckpointTask = { folder, disks: [disk()] }
    const killed = await kill({ ...task, dieIn: 'checkpoint 2', step: 5 })
    expect(currentOf(folder)).toBe(1)
    for (let step = 1, steps: number | undefined; steps === undefined; step += onEmulated ? 4 : 1) {
      steps = (await kill({ ...task, dieIn: 'recover', step })).steps
      expect(currentOf(folder)).toBe(1)
      const vm = await recover(folder)
      expect([step, await momentOf(vm)]).toEqual([step, killed.moments.get(1)])
      await vm.close()
    }
  })
})
