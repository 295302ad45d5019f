/** What idle machines cost, by the hundred. */

import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { haltFirmware } from './guests.js'
import { type Context, median, sleep, startProcess } from './lib.js'
import type { MachinesReport, Measurement } from './machines-process.js'
import { availableMemory, openFiles, processMemory, processorTime } from './proc.js'
import { qemuVersion, startQemu } from './qemu.js'
import { compare, type Figure, type Row, type Unit } from './report.js'

export const title = 'idle machines'

const MACHINES = 300
/** QEMU needs a moment until its guest halts. */
const QEMU_START = 1000

/** What one machine adds. */
interface Share {
  readonly memory: number
  readonly hostMemory: number
  readonly files: number
}

export async function run(context: Context): Promise<Row[]> {
  const ours: MachinesReport[] = []
  const c: Share[] = []
  const waiting: (number | undefined)[] = []
  const qemu: QemuReport[] = []
  for (let round = 0; round < context.rounds(3); round++) {
    ours.push(await runOurs())
    c.push(await runBaseline(context))
    waiting.push(await runWaiting())
    if (qemuVersion !== undefined) qemu.push(await runQemuProcess(context))
  }
  const created = ours.map(({ before, created }) => share(before, created))
  const halted = ours.map(({ before, halted }) => share(before, halted))
  const program = (what: string, unit: Unit, shares: readonly Share[], key: keyof Share) =>
    compare({
      what,
      unit,
      ours: shares.map((share) => share[key]),
      peer: 'C, same ioctls',
      theirs: c.map((share) => share[key]),
    })
  const idle = (key: keyof MachinesReport) => ns(median(ours.map((report) => report[key].idleTime)))
  const waited = waiting.filter((time) => time !== undefined)
  const left = median(ours.map(({ before, closed }) => closed.files - before.files))
  const most = { max: 5e6 }
  return [
    { what: 'in one process', ours: count(MACHINES), bound: { min: MACHINES } },
    program('memory, created', 'bytes', created, 'memory'),
    program('memory, halted', 'bytes', halted, 'memory'),
    compare({
      what: 'memory, halted',
      unit: 'bytes',
      ours: halted.map(({ memory }) => memory),
      kind: 'less',
      peer: 'QEMU, a process each',
      theirs: qemu.map(({ memory }) => memory),
    }),
    program('memory of the host, halted', 'bytes', halted, 'hostMemory'),
    program('open files', 'count', halted, 'files'),
    { what: 'open files, after all are closed', ours: count(left), bound: { max: 0 } },
    {
      what: `CPU time in 1 s, ${MACHINES} halted`,
      ours: idle('halted'),
      peer: { name: 'the process before', figure: idle('before') },
      bound: most,
    },
    {
      what: `CPU time in 1 s, ${MACHINES} halted`,
      ours: idle('halted'),
      peer: {
        name: 'QEMU, one halted',
        ...(qemu.length === 0 ? {} : { figure: ns(median(qemu.map(({ idleTime }) => idleTime))) }),
      },
    },
    ...(waited.length === 0
      ? []
      : [{ what: 'CPU time in 1 s, a vCPU waits in KVM', ours: ns(median(waited)), bound: most }]),
  ]
}

function count(value: number): Figure {
  return { value, unit: 'count' }
}

function ns(value: number): Figure {
  return { value, unit: 'ns' }
}

function share(before: Omit<Measurement, 'idleTime'>, after: Omit<Measurement, 'idleTime'>): Share {
  return {
    memory: (after.memory - before.memory) / MACHINES,
    hostMemory: (before.hostMemory - after.hostMemory) / MACHINES,
    files: (after.files - before.files) / MACHINES,
  }
}

async function runOurs(): Promise<MachinesReport> {
  const process = startProcess('machines-process.ts', [MACHINES], ['--expose-gc'])
  const report = await process.message<MachinesReport>()
  await process.exit
  return report
}

/** Nanoseconds computed while a vCPU waits in the kernel. */
async function runWaiting(): Promise<number | undefined> {
  const process = startProcess('waiting-process.ts')
  const { idleTime } = await process.message<{ idleTime?: number }>()
  process.child.kill('SIGKILL')
  await process.exit
  return idleTime
}

/** The C program's process with no machine is too small to matter, so it is not started for that. */
async function runBaseline(context: Context): Promise<Share> {
  const hostMemory = availableMemory()
  const child = spawn(context.baselinePath, ['machines', String(MACHINES)], {
    stdio: ['pipe', 'pipe', 'inherit'],
  })
  try {
    await once(child.stdout, 'data')
    const pid = child.pid!
    const after = { memory: processMemory(pid), hostMemory: availableMemory(), files: openFiles(pid) }
    // Standard input, output and error, and /dev/kvm.
    return share({ memory: 0, hostMemory, files: 4 }, after)
  } finally {
    child.stdin.end()
    await once(child, 'exit')
  }
}

interface QemuReport {
  readonly memory: number
  readonly idleTime: number
}

async function runQemuProcess(context: Context): Promise<QemuReport> {
  const path = join(context.directory, 'halt.bin')
  writeFileSync(path, haltFirmware())
  const child = startQemu('ignore', '-M', 'microvm', '-bios', path)
  const exit = once(child, 'exit')
  try {
    await sleep(QEMU_START)
    const pid = child.pid!
    const before = processorTime(pid)
    await sleep(1000)
    return { memory: processMemory(pid), idleTime: processorTime(pid) - before }
  } finally {
    child.kill('SIGKILL')
    await exit
  }
}
