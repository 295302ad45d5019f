/**
 * Measures nodevisor: `npm run bench -- [names…] [--quick] [--check] [--json FILE]`.
 *
 * Without names, all benchmarks run. `--check` gives exit code 1 if a bound is missed, `--quick` needs a fifth of the
 * time and gives figures for a first look.
 */

import { writeFileSync } from 'node:fs'
import { cpus, release } from 'node:os'
import { parseArgs } from 'node:util'
import { inspectHost } from '../dist/index.js'
import * as compute from './compute.js'
import * as exits from './exits.js'
import * as imports from './import.js'
import * as interrupts from './interrupts.js'
import { type Context, sleep, withContext } from './lib.js'
import * as lifecycle from './lifecycle.js'
import * as linux from './linux.js'
import * as machines from './machines.js'
import { qemuVersion } from './qemu.js'
import { judge, type Row, renderTable } from './report.js'
import * as responsiveness from './responsiveness.js'
import * as snapshots from './snapshots.js'
import * as virtio from './virtio.js'

/** The share of all processors that others may use without much effect. */
const BUSY = 0.1

interface Benchmark {
  readonly title: string
  run(context: Context): Promise<Row[]>
}

const BENCHMARKS: Readonly<Record<string, Benchmark>> = {
  exits,
  lifecycle,
  interrupts,
  virtio,
  linux,
  compute,
  import: imports,
  machines,
  responsiveness,
  snapshots,
}

const names = Object.keys(BENCHMARKS)

function usage(message: string): never {
  console.error(
    `bench: ${message}\nusage: npm run bench -- [${names.join('|')}]… [--quick] [--check] [--json FILE]`,
  )
  process.exit(2)
}

function parse() {
  try {
    return parseArgs({
      allowPositionals: true,
      options: { check: { type: 'boolean' }, json: { type: 'string' }, quick: { type: 'boolean' } },
    })
  } catch (error) {
    return usage((error as Error).message)
  }
}

/** The share of all processors that was used in half a second of waiting. */
async function busyness(): Promise<number> {
  const times = () => cpus().map(({ times }) => times)
  const idle = () => times().reduce((sum, { idle }) => sum + idle, 0)
  const all = () =>
    times().reduce((sum, { user, nice, sys, idle, irq }) => sum + user + nice + sys + idle + irq, 0)
  const before = { idle: idle(), all: all() }
  await sleep(500)
  return 1 - (idle() - before.idle) / Math.max(1, all() - before.all)
}

const { values, positionals } = parse()
const unknown = positionals.find((name) => !names.includes(name))
if (unknown !== undefined) usage(`Expected a benchmark's name but received '${unknown}'`)

const info = inspectHost()
if (info.problem !== undefined) {
  console.error(`bench: ${info.problem.message}`)
  process.exit(69)
}
const host = {
  kvm: info.kind,
  cpu: cpus()[0]?.model ?? 'unknown',
  cpus: cpus().length,
  kernel: release(),
  node: process.version,
  qemu: qemuVersion ?? null,
}
console.log(
  `KVM ${host.kvm}, ${host.cpus} × ${host.cpu}, Linux ${host.kernel}, Node.js ${host.node}, ${host.qemu ?? 'no QEMU'}`,
)

const load = await busyness()
if (load > BUSY) {
  const percent = Math.round(load * 100)
  console.log(
    `Others use ${percent} % of the processors: the figures below are noise, above all those in ms and µs.`,
  )
}

const results: { readonly benchmark: string; readonly rows: readonly Row[] }[] = []
await withContext(values.quick ?? false, async (context) => {
  for (const name of positionals.length > 0 ? positionals : names) {
    const { title, run } = BENCHMARKS[name]!
    console.log(`\n${name}: ${title}`)
    const rows = await run(context)
    console.log(renderTable(rows))
    results.push({ benchmark: name, rows })
  }
})

const judged = results.flatMap(({ benchmark, rows }) =>
  rows.map((row) => ({ benchmark, ...row, verdict: judge(row) })),
)
if (values.json !== undefined) {
  writeFileSync(values.json, `${JSON.stringify({ host, load, rows: judged }, undefined, 2)}\n`)
}
const missed = judged.filter(({ verdict }) => verdict === 'missed')
console.log(
  missed.length === 0 ? '\nNo bound is missed.' : `\nMissed: ${missed.map(({ what }) => what).join('; ')}`,
)
if (values.check && missed.length > 0) process.exitCode = 1
