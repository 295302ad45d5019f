/** What it costs to save machines, to copy them, to put them back and to move them. */

import { execFile, spawn } from 'node:child_process'
import { once } from 'node:events'
import { writeFileSync } from 'node:fs'
import { open, rm } from 'node:fs/promises'
import { join } from 'node:path'
import { setImmediate as turn } from 'node:timers/promises'
import { promisify } from 'node:util'
import { VirtualMachine } from '../dist/index.js'
import type { ChildrenMeasurement, ChildrenReport } from './children-process.js'
import { endlessExits, pageWriter } from './guests.js'
import { type Context, compile, interleave, median, startProcess, time } from './lib.js'
import { moves } from './moves.js'
import { openFiles, processMemory, slabMemory } from './proc.js'
import { alone, compare, type Row, type Unit } from './report.js'

export const title = 'snapshots, copies, resets and moves'

const MIB = 2 ** 20
const PAGE_SIZE = 4096
const MEMORY = '128M'
/** What of 128 MiB was written. */
const WRITTEN = { start: 16 * MIB, size: 64 * MIB }
const IRQCHIPS = ['none', 'split', 'full'] as const
const CHILDREN = 200
const PEER = 'C, same ioctls'

type Irqchip = (typeof IRQCHIPS)[number]

/** The C program with its arguments: what it prints. */
type Program = (...args: (string | number)[]) => Promise<number[]>

/** Files that both sides use. */
interface Files {
  readonly exits: string
  readonly writer: string
  readonly program: string
}

export async function run(context: Context): Promise<Row[]> {
  const { directory } = context
  const files = {
    exits: join(directory, 'exits.bin'),
    writer: join(directory, 'writer.bin'),
    program: compile('snapshots.c', directory),
  }
  writeFileSync(files.exits, endlessExits())
  writeFileSync(files.writer, pageWriter())
  const execute = promisify(execFile)
  const program: Program = async (...args) => {
    const { stdout } = await execute(files.program, args.map(String))
    return stdout.trim().split(' ').map(Number)
  }
  const rows: Row[] = []
  for (const irqchip of IRQCHIPS) rows.push(...(await forks(context, irqchip, files, program)))
  for (const irqchip of IRQCHIPS) rows.push(await resets(context, irqchip, files, program))
  for (const irqchip of IRQCHIPS) rows.push(await restores(context, irqchip, files, program))
  rows.push(...(await children(context, files)))
  rows.push(...(await writes(context)))
  rows.push(...(await moves(context)))
  return rows
}

/** A machine that has written half of its memory and stands at its first debug-exit. */
async function createParent(kernel: Uint8Array, irqchip: Irqchip): Promise<VirtualMachine> {
  const vm = await VirtualMachine.create({ kernel, memory: MEMORY, irqchip })
  vm.memory.fill(WRITTEN.start, WRITTEN.size, 0x55)
  await runToExit(vm)
  await turn()
  return vm
}

/**
 * After this the event loop has to `turn`, outside of what is measured: inline, whoever awaits the end of a run goes on
 * within the slice in which the guest ran, which is using its vCPU.
 */
async function runToExit(vm: VirtualMachine): Promise<void> {
  const { reason } = await vm.run()
  if (reason !== 'debug-exit') throw new Error(`Expected debug-exit but the machine ended with ${reason}`)
}

/** Nanoseconds of a fork, … */
interface ForkTimes {
  /** … of the first of a machine, whose memory becomes the copies' too, … */
  readonly first: number
  /** … of the others, … */
  readonly fork: number
  /** … from calling `run` to the copy's first exit, … */
  readonly exit: number
  /** … and of closing the copy. */
  readonly close: number
}

async function forks(context: Context, irqchip: Irqchip, { exits }: Files, program: Program): Promise<Row[]> {
  // Closing takes long with a full irqchip.
  const count = irqchip === 'full' ? 5 : 20
  const { c, ours } = await interleave<'c' | 'ours', ForkTimes>(context.rounds(7), {
    c: async () => {
      const [first, fork, exit, close] = await program('fork', irqchip, exits, count)
      return { first: first!, fork: fork!, exit: exit!, close: close! }
    },
    ours: () => timeForks(irqchip, count),
  })
  const row = (what: string, key: keyof ForkTimes, bound?: Row['bound']) =>
    compare({
      what: `${what}, ${irqchip}`,
      unit: 'ns',
      ours: ours.map((times) => times[key]),
      peer: PEER,
      theirs: c.map((times) => times[key]),
      ...(bound === undefined ? {} : { bound }),
    })
  return [
    row('fork, 128 MiB', 'fork', irqchip === 'full' ? { max: 1.3 } : { max: 1.5e6, of: 'figure' }),
    row('the first fork of a machine', 'first'),
    row("a fork's first exit", 'exit'),
    row('closing a fork', 'close'),
  ]
}

async function timeForks(irqchip: Irqchip, count: number): Promise<ForkTimes> {
  const parent = await createParent(endlessExits(), irqchip)
  const samples = { fork: [] as number[], exit: [] as number[], close: [] as number[] }
  try {
    for (let i = 0; i <= count; i++) {
      let child: VirtualMachine | undefined
      samples.fork.push(
        await time(async () => {
          child = await parent.fork()
        }),
      )
      samples.exit.push(await time(() => runToExit(child!)))
      await turn()
      samples.close.push(await time(() => child!.close()))
    }
  } finally {
    await parent.close()
  }
  const [first, ...others] = samples.fork
  return {
    first: first!,
    fork: median(others),
    exit: median(samples.exit.slice(1)),
    close: median(samples.close.slice(1)),
  }
}

async function resets(context: Context, irqchip: Irqchip, { writer }: Files, program: Program): Promise<Row> {
  const count = 500
  const { c, ours } = await interleave(context.rounds(7), {
    c: async () => (await program('reset', irqchip, writer, count))[0]!,
    ours: () => timeResets(irqchip, count),
  })
  return compare({
    what: `reset, 16 pages written, ${irqchip}`,
    unit: 'ns',
    ours,
    peer: PEER,
    theirs: c,
    bound: { max: 150e3, of: 'figure' },
  })
}

async function timeResets(irqchip: Irqchip, count: number): Promise<number> {
  const vm = await createParent(pageWriter(), irqchip)
  try {
    const snapshot = await vm.snapshot()
    const times: number[] = []
    for (let i = 0; i < count; i++) {
      await runToExit(vm)
      await turn()
      times.push(await time(() => vm.reset(snapshot)))
    }
    await snapshot.close()
    return median(times)
  } finally {
    await vm.close()
  }
}

async function restores(
  context: Context,
  irqchip: Irqchip,
  { exits }: Files,
  program: Program,
): Promise<Row> {
  const count = irqchip === 'full' ? 5 : 20
  const path = join(context.directory, `snapshot-${irqchip}`)
  const vm = await createParent(endlessExits(), irqchip)
  await vm.snapshot(path)
  await vm.close()
  const { c, ours } = await interleave(context.rounds(7), {
    c: async () => (await program('restore', irqchip, exits, count, join(path, 'memory')))[0]!,
    ours: () => timeRestores(path, count),
  })
  await rm(path, { recursive: true })
  return compare({
    what: `restore from a file, to the first exit, ${irqchip}`,
    unit: 'ns',
    ours,
    peer: PEER,
    theirs: c,
    bound: { max: 6e6, of: 'figure' },
  })
}

async function timeRestores(path: string, count: number): Promise<number> {
  const times: number[] = []
  for (let i = 0; i < count; i++) {
    let vm: VirtualMachine | undefined
    times.push(
      await time(async () => {
        vm = await VirtualMachine.restore(path)
        await runToExit(vm)
      }),
    )
    await turn()
    await vm!.close()
  }
  return median(times)
}

async function children(context: Context, { program, exits }: Files): Promise<Row[]> {
  const ours: ChildrenReport[] = []
  const c: ChildrenMeasurement[] = []
  for (let round = 0; round < context.rounds(3); round++) {
    ours.push(await runChildren())
    c.push(await runBaselineChildren(program, exits))
  }
  const row = (what: string, key: keyof ChildrenMeasurement, unit: Unit, bound?: Row['bound']): Row => ({
    ...alone(
      what,
      unit,
      ours.map(({ before, made }) => (made[key] - before[key]) / CHILDREN),
      bound,
    ),
    peer: { name: PEER, figure: { value: median(c.map((measurement) => measurement[key])), unit } },
  })
  const left = ours.map(({ before, closed }) => closed.files - before.files)
  return [
    row(`each of ${CHILDREN} copies: memory of the process`, 'memory', 'bytes', { max: 300 * 1024 }),
    row("each of them: the kernel's own structures", 'slab', 'bytes'),
    row('each of them: open files', 'files', 'count'),
    alone(
      'each of them, after its first exit: memory of the process',
      'bytes',
      ours.map(({ before, ran }) => (ran.memory - before.memory) / CHILDREN),
    ),
    alone('open files, after all are closed', 'count', left, { max: 0 }),
  ]
}

async function runChildren(): Promise<ChildrenReport> {
  const process = startProcess('children-process.ts', [CHILDREN], ['--expose-gc'])
  const report = await process.message<ChildrenReport>()
  await process.exit
  return report
}

/** What each machine of the C program adds. */
async function runBaselineChildren(program: string, exits: string): Promise<ChildrenMeasurement> {
  const child = spawn(program, ['children', 'none', exits, String(CHILDREN)], {
    stdio: ['pipe', 'pipe', 'inherit'],
  })
  const exit = once(child, 'exit')
  const measure = () => ({
    memory: processMemory(child.pid!),
    slab: slabMemory(),
    files: openFiles(child.pid!),
  })
  try {
    await once(child.stdout, 'data')
    const before = measure()
    const ready = once(child.stdout, 'data')
    child.stdin.write('\n')
    await ready
    const after = measure()
    return {
      memory: (after.memory - before.memory) / CHILDREN,
      slab: (after.slab - before.slab) / CHILDREN,
      files: (after.files - before.files) / CHILDREN,
    }
  } finally {
    child.stdin.end()
    await exit
  }
}

async function writes(context: Context): Promise<Row[]> {
  const vm = await VirtualMachine.create({ kernel: endlessExits(), memory: '1G' })
  const path = (name: string) => join(context.directory, name)
  try {
    vm.memory.fill(0, 512 * MIB, 0x55)
    vm.memory.write(0x7c00, endlessExits())
    await runToExit(vm)
    const original = path('original')
    await vm.snapshot(original)
    // What has run for a while has all of it mapped.
    for (let at = 0; at < 512 * MIB; at += PAGE_SIZE) vm.memory.readUint8(at)
    let taken = 0
    const { incremental } = await interleave(context.rounds(25), {
      incremental: () => time(() => vm.snapshot(path(`changes-${taken++}`), { incremental: true })),
    })
    const { ours, cp } = await interleave(context.rounds(2), {
      ours: async () => {
        const duration = await time(() => vm.snapshot(path('full')))
        await rm(path('full'), { recursive: true })
        return duration
      },
      cp: async () => {
        const duration = await time(() => copySparse(join(original, 'memory'), path('copy')))
        await rm(path('copy'))
        return duration
      },
    })
    return [
      compare({
        what: 'full snapshot to a file, 1 GiB, half of it written',
        unit: 'ns',
        ours,
        peer: 'cp --sparse=always, and sync',
        theirs: cp,
      }),
      alone('incremental snapshot of the same, nothing changed', 'ns', incremental, { max: 50e6 }),
    ]
  } finally {
    await vm.close()
    await rm(path('original'), { recursive: true, force: true })
  }
}

async function copySparse(from: string, to: string): Promise<void> {
  await promisify(execFile)('cp', ['--sparse=always', from, to])
  const file = await open(to)
  await file.datasync()
  await file.close()
}
