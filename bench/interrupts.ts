/** Interrupts, timers and processors that wake each other. */

import { execFileSync } from 'node:child_process'
import { readFileSync } from 'node:fs'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { type Irqchip, VirtualMachine } from '../dist/index.js'
import { FIRMWARE_ADDRESS, firmware } from './guests.js'
import { type Context, interleave, sleep, time } from './lib.js'
import { qemuVersion, runQemu } from './qemu.js'
import { compare, type Row } from './report.js'

export const title = 'interrupts, timers, several processors'

/** What timing.S does how often. */
const ONE_SHOTS = 200
const TICKS = 500
const ROUND_TRIPS = 500
const NS_PER_MS = 1e6
const NS_PER_SECOND = 1e9
const IDLE_MS = 3000
const MACHINES = 20
/** What timing.S has before the code that waits. */
const IDLE_MARK = 'IDLE'

type Results = Readonly<Record<'P' | 'T' | 'I', number>>

export async function run(context: Context): Promise<Row[]> {
  const image = join(context.directory, 'timing.bin')
  const source = fileURLToPath(new URL('timing.S', import.meta.url))
  const flat = ['-Wl,--oformat=binary', '-Wl,-Ttext=0', '-Wl,--build-id=none']
  execFileSync(process.env.CC ?? 'cc', ['-m16', '-nostdlib', '-static', ...flat, '-o', image, source])
  const rows: Row[] = []
  for (const irqchip of ['full', 'split'] as const) {
    rows.push(...(await timers(context, image, irqchip)), await roundTrips(context, image, irqchip))
  }
  return [...rows, await idle(image), ...(await creation(context))]
}

async function timers(context: Context, image: string, irqchip: Irqchip): Promise<Row[]> {
  const { ours, theirs = [] } = await besideQemu(context.rounds(5), image, irqchip, 1)
  const latency = (results: readonly Results[]) => results.map(({ P }) => P / ONE_SHOTS - NS_PER_MS)
  const ticks = (results: readonly Results[]) => results.map(({ T }) => T / TICKS)
  return [
    compare({
      what: `PIT, 1 ms one-shot, beyond it to the handler, ${irqchip}`,
      unit: 'ns',
      ours: latency(ours),
      peer: `QEMU, kernel-irqchip=${QEMU_IRQCHIP[irqchip]}`,
      theirs: latency(theirs),
      ...(irqchip === 'full' ? { bound: { max: 1.5 } } : {}),
    }),
    compare({
      what: `PIT at 1000 Hz, a tick, ${irqchip}`,
      unit: 'ns',
      ours: ticks(ours),
      peer: `QEMU, kernel-irqchip=${QEMU_IRQCHIP[irqchip]}`,
      theirs: ticks(theirs),
      bound: { max: 1.05 },
    }),
  ]
}

async function roundTrips(context: Context, image: string, irqchip: Irqchip): Promise<Row> {
  const { ours, theirs = [] } = await besideQemu(context.rounds(9), image, irqchip, 2)
  const each = (results: readonly Results[]) => results.map(({ I }) => I / ROUND_TRIPS)
  return compare({
    what: `IPI, there and back, ${irqchip}`,
    unit: 'ns',
    ours: each(ours),
    peer: `QEMU, kernel-irqchip=${QEMU_IRQCHIP[irqchip]}`,
    theirs: each(theirs),
    bound: { max: 1.5 },
  })
}

/** What a second of a machine costs the host that does nothing but count the ticks of a PIT at 100 Hz. */
async function idle(image: string): Promise<Row> {
  const code = Buffer.from(readFileSync(image))
  await using vm = await VirtualMachine.create({
    kernel: { image: code.subarray(code.indexOf(IDLE_MARK) + IDLE_MARK.length), at: 0x7c00 },
    irqchip: 'full',
  })
  const before = process.cpuUsage()
  const result = await vm.run({ timeout: IDLE_MS })
  const { user, system } = process.cpuUsage(before)
  if (result.reason !== 'stopped') throw new Error(`The machine ended with ${result.reason}`)
  return {
    what: 'processor time of a second of waiting for a 100 Hz PIT, full',
    ours: { value: ((user + system) * 1000 * 1000) / IDLE_MS, unit: 'ns' },
    bound: { max: NS_PER_SECOND / 100 },
  }
}

/** What interrupt controllers add to a machine that does nothing, one after the other: the kernel closes them late. */
async function creation(context: Context): Promise<Row[]> {
  const { none, split, full } = await interleave(context.rounds(9), {
    none: () => timeMachines('none'),
    split: () => timeMachines('split'),
    full: () => timeMachines('full'),
  })
  const machine = { unit: 'ns', peer: 'none', theirs: none } as const
  return [
    compare({ ...machine, what: 'create, run, close: split', ours: split }),
    compare({ ...machine, what: 'create, run, close: full', ours: full }),
  ]
}

/** Nanoseconds for one machine. */
async function timeMachines(irqchip: Irqchip): Promise<number> {
  const total = await time(async () => {
    for (let i = 0; i < MACHINES; i++) {
      await using vm = await VirtualMachine.create({
        kernel: { image: firmware(), at: FIRMWARE_ADDRESS },
        memory: '128M',
        irqchip,
        firmwareTables: false,
      })
      await vm.run({ timeout: 10_000 })
    }
  })
  // What the last machines left for the kernel to do is not the next contestant's.
  await sleep(100)
  return total / MACHINES
}

const QEMU_IRQCHIP = { full: 'on', split: 'split', none: 'off' } as const

async function besideQemu(
  rounds: number,
  image: string,
  irqchip: Irqchip,
  cpus: number,
): Promise<{ ours: Results[]; theirs?: Results[] }> {
  const bytes = readFileSync(image)
  let tscKhz = 0
  const ours: Results[] = []
  const theirs: Results[] = []
  const runOurs = async () => {
    await using vm = await VirtualMachine.create({
      kernel: { image: bytes, at: FIRMWARE_ADDRESS },
      irqchip,
      cpus,
      firmwareTables: false,
    })
    tscKhz = vm.vcpus[0]!.unsafeVcpu.getTscKhz()
    const { reason } = await vm.run({ timeout: 60_000 })
    if (reason !== 'debug-exit') throw new Error(`The machine ended with ${reason}`)
    ours.push(parse(vm.debugConsole.output, tscKhz))
    return 0
  }
  const runTheirs = async () => {
    const output = `${image}.txt`
    await runQemu(
      0x10,
      ...['-M', `pc,kernel-irqchip=${QEMU_IRQCHIP[irqchip]}`, '-smp', `${cpus}`, '-bios', image],
      ...['-chardev', `file,id=output,path=${output}`, '-device', 'isa-debugcon,iobase=0xe9,chardev=output'],
    )
    theirs.push(parse(readFileSync(output, 'latin1'), tscKhz))
    return 0
  }
  const contestants: Record<string, () => Promise<number>> = { ours: runOurs }
  if (qemuVersion !== undefined) contestants.theirs = runTheirs
  await interleave(rounds, contestants)
  // The first round warms up.
  return { ours: ours.slice(1), ...(qemuVersion === undefined ? {} : { theirs: theirs.slice(1) }) }
}

/** Lines of a letter and cycles of the TSC, as nanoseconds. */
function parse(output: string, tscKhz: number): Results {
  const lines = output.split('\n').filter((line) => line !== '')
  return Object.fromEntries(
    lines.map((line) => [line[0], (Number(`0x${line.slice(1)}`) / tscKhz) * NS_PER_MS]),
  ) as Results
}
