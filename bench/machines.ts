/** What idle machines cost, by the hundred. */

import { fork, spawn } from 'node:child_process'
import { once } from 'node:events'
import { writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { haltFirmware } from './guests.js'
import { type Context, median, sleep } from './lib.js'
import type { MachinesReport, Measurement } from './machines-process.js'
import { availableMemory, openFiles, processMemory, processorTime } from './proc.js'
import { qemuVersion, startQemu } from './qemu.js'
import { compare, type Figure, type Row } from './report.js'

export const title = 'idle machines'

const MACHINES = 300
/** QEMU needs a moment until its guest halts. */
const QEMU_START = 1000
const PROCESS = fileURLToPath(new URL('machines-process.ts', import.meta.url))

/** What one machine adds to a process. */
interface Share {
  readonly memory: number
  readonly hostMemory: number
  readonly files: number
}

export async function run(context: Context): Promise<Row[]> {
  const ours: MachinesReport[] = []
  const c: Share[] = []
  const qemu: (Share & { readonly idleTime: number })[] = []
  for (let round = 0; round < context.rounds(3); round++) {
    ours.push(await runOurs())
    c.push(await runBaseline(context))
    if (qemuVersion !== undefined) qemu.push(await runQemuProcess(context))
  }
  const of = (shares: readonly Share[], key: keyof Share) => median(shares.map((share) => share[key]))
  const created = ours.map(({ before, created }) => share(before, created))
  const halted = ours.map(({ before, halted }) => share(before, halted))
  const idle = median(ours.map((report) => report.halted.idleTime))
  const program = `C, ${MACHINES} halted`
  const emulator = 'QEMU, one process each'
  const peer = (key: keyof Share) => (qemu.length === 0 ? undefined : bytes(of(qemu, key)))
  const idleQemu = qemu.length === 0 ? undefined : ns(median(qemu.map(({ idleTime }) => idleTime)) * MACHINES)
  return [
    {
      what: `${MACHINES} in one process, all halted`,
      ours: { value: MACHINES, unit: 'count' },
      bound: { min: MACHINES },
    },
    compare(
      'memory of the process, each created',
      bytes(of(created, 'memory')),
      program,
      bytes(of(c, 'memory')),
    ),
    compare(
      'memory of the process, each halted',
      bytes(of(halted, 'memory')),
      program,
      bytes(of(c, 'memory')),
    ),
    compare('memory of the process, each halted', bytes(of(halted, 'memory')), emulator, peer('memory')),
    compare('… and of the kernel', bytes(of(halted, 'hostMemory')), program, bytes(of(c, 'hostMemory'))),
    compare('… and of the kernel', bytes(of(halted, 'hostMemory')), emulator, peer('hostMemory')),
    compare('open files, each', files(of(halted, 'files')), program, files(of(c, 'files'))),
    {
      what: 'files left open after all are closed',
      ours: files(median(ours.map(({ before, closed }) => closed.files - before.files))),
      bound: { max: 0 },
    },
    { what: `CPU time of ${MACHINES} halted, in 1 s`, ours: ns(idle), bound: { max: 5e6 } },
    compare(`CPU time of ${MACHINES} halted, in 1 s`, ns(idle), `${emulator}, × ${MACHINES}`, idleQemu),
  ]
}

function bytes(value: number): Figure {
  return { value, unit: 'bytes' }
}

function files(value: number): Figure {
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
  const child = fork(PROCESS, [String(MACHINES)], { execArgv: [...process.execArgv, '--expose-gc'] })
  const exit = once(child, 'exit')
  const [report] = await Promise.race([
    once(child, 'message'),
    exit.then(([status]) => {
      throw new Error(`Expected a report from ${PROCESS} but it ended with status ${status}`)
    }),
  ])
  await exit
  return report as MachinesReport
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

async function runQemuProcess(context: Context): Promise<Share & { readonly idleTime: number }> {
  const path = join(context.directory, 'halt.bin')
  writeFileSync(path, haltFirmware())
  const hostMemory = availableMemory()
  const child = startQemu('-M', 'microvm', '-bios', path)
  const exit = once(child, 'exit')
  try {
    await sleep(QEMU_START)
    const pid = child.pid!
    const before = processorTime(pid)
    await sleep(1000)
    return {
      memory: processMemory(pid),
      hostMemory: hostMemory - availableMemory(),
      files: openFiles(pid),
      idleTime: processorTime(pid) - before,
    }
  } finally {
    child.kill('SIGKILL')
    await exit
  }
}
