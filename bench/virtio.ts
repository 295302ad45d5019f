/** Virtio devices, beside those of QEMU's microvm: the same guest, the same image file. */

import { createWriteStream } from 'node:fs'
import { open, readFile, truncate } from 'node:fs/promises'
import { join } from 'node:path'
import { finished } from 'node:stream/promises'
import { VirtualMachine } from '../dist/index.js'
import { type Context, guestPath, interleave, median } from './lib.js'
import { qemuVersion, runQemu } from './qemu.js'
import { compare, type Row } from './report.js'

export const title = 'virtio: disk, console, doorbells'

const NS_PER_MS = 1e6
const DONE = 0x10
const DISK_SIZE = 256 * 2 ** 20
const PIECE = 2 ** 20
const EDGES = 2000
/** Far above what a guest asks for here. */
const NO_LIMIT = 2 ** 40

/** One measurement of guests/virtio: its word, and a row for each line that it prints. */
interface Measurement {
  readonly words: string
  readonly rows: Readonly<Record<string, string>>
}

const MEASUREMENTS: readonly Measurement[] = [
  {
    words: 'bench-block-seq=1024,1',
    rows: { 'bench-block-seq-read': 'disk: 128 KiB read in order, 1 in flight' },
  },
  {
    words: 'bench-block-seq=1024,8',
    rows: { 'bench-block-seq-read': 'disk: 128 KiB read in order, 8 in flight' },
  },
  {
    words: 'bench-block-rand=2000,1',
    rows: {
      'bench-block-rand-read': 'disk: 4 KiB read anywhere, 1 in flight',
      'bench-block-rand-write': 'disk: 4 KiB written anywhere, 1 in flight',
    },
  },
  {
    words: 'bench-block-rand=4000,8',
    rows: {
      'bench-block-rand-read': 'disk: 4 KiB read anywhere, 8 in flight',
      'bench-block-rand-write': 'disk: 4 KiB written anywhere, 8 in flight',
    },
  },
  { words: 'bench-console=16M,64K', rows: { 'bench-console': 'console: 64 KiB written to a file' } },
  { words: 'bench-console=4M,4K', rows: { 'bench-console': 'console: 4 KiB written to a file' } },
  { words: 'bench-doorbell=2000', rows: { 'bench-doorbell': 'rng: 16 bytes, doorbell to used, polled' } },
  {
    words: 'irq bench-doorbell=2000',
    rows: { 'bench-doorbell': 'rng: 16 bytes, doorbell to used, interrupt' },
  },
]

/** Nanoseconds for a request, by the name of the line. */
type Times = Readonly<Record<string, number>>

/** What our own devices counted, for one request. */
interface Counts {
  readonly exits: number
  readonly doorbells: number
}

export async function run(context: Context): Promise<Row[]> {
  const disk = join(context.directory, 'disk.img')
  await makeDisk(disk)
  const rows: Row[] = []
  for (const { words, rows: names } of MEASUREMENTS) {
    const ours: Times[] = []
    const theirs: Times[] = []
    const counts: Counts[] = []
    let tscKhz = 0
    const contestants: Record<string, () => Promise<number>> = {
      async ours() {
        const result = await runOurs(context, disk, words)
        tscKhz = result.tscKhz
        ours.push(result.times)
        counts.push(result.counts)
        return 0
      },
    }
    if (qemuVersion !== undefined) {
      contestants.theirs = async () => {
        theirs.push(await runTheirs(context, disk, words, tscKhz))
        return 0
      }
    }
    await interleave(context.rounds(7), contestants)
    // The first round warms up.
    const values = (all: readonly Times[], name: string) => all.slice(1).map((times) => times[name]!)
    const count = (value: keyof Counts) => median(counts.map((entry) => entry[value])).toFixed(2)
    const shown = `; ${count('doorbells')} doorbells and ${count('exits')} exits a request`
    for (const [name, what] of Object.entries(names)) {
      rows.push(
        compare({
          what: what + shown,
          unit: 'ns',
          ours: values(ours, name),
          peer: 'QEMU microvm',
          theirs: values(theirs, name),
          bound: { max: 1.05 },
        }),
      )
    }
  }
  return [...rows, await edges(context)]
}

/** Why interrupts of ours do not go by irqfd: what both cost in C. */
async function edges(context: Context): Promise<Row> {
  const { irqfd, line } = await interleave(context.rounds(5), {
    line: () => context.baseline('line', EDGES),
    irqfd: () => context.baseline('irqfd', EDGES),
  })
  return compare({
    what: 'in C: an edge by KVM_IRQ_LINE, to the handler',
    unit: 'ns',
    ours: line,
    peer: 'by irqfd',
    theirs: irqfd,
  })
}

/** A file without holes, all of it in the page cache. */
async function makeDisk(path: string): Promise<void> {
  const file = await open(path, 'w')
  const piece = Buffer.alloc(PIECE)
  for (let at = 0; at < DISK_SIZE; at += PIECE) {
    piece.writeUInt32LE(at, 0)
    await file.write(piece)
  }
  await file.sync()
  await file.close()
}

async function runOurs(
  context: Context,
  disk: string,
  words: string,
): Promise<{ times: Times; counts: Counts; tscKhz: number }> {
  const output = createWriteStream(join(context.directory, 'console.txt'))
  const vm = await VirtualMachine.create({
    kernel: { image: guestPath('virtio.elf'), cmdline: `${words} ports=1` },
    memory: '128M',
    disks: [disk],
    console: true,
    rng: { bytesPerSecond: NO_LIMIT },
  })
  vm.console.pipe(output)
  const tscKhz = vm.vcpus[0]!.unsafeVcpu.getTscKhz()
  const result = await vm.run({ timeout: 60_000 })
  if (result.reason !== 'debug-exit' || result.code !== DONE) {
    throw new Error(`Expected the guest to be done but got ${result.reason}: ${vm.serial.output}`)
  }
  const { times, requests } = parse(vm.serial.output, tscKhz)
  const doorbells = vm.virtioDevices.reduce((sum, { statistics }) => sum + statistics.notifications, 0)
  const counts = { exits: result.exits.mmio / requests, doorbells: doorbells / requests }
  await vm.close()
  await finished(output)
  return { times, counts, tscKhz }
}

async function runTheirs(context: Context, disk: string, words: string, tscKhz: number): Promise<Times> {
  const serial = join(context.directory, 'serial.txt')
  const output = join(context.directory, 'console-qemu.txt')
  await truncate(serial).catch(() => {})
  await runQemu(
    DONE,
    ...['-M', 'microvm,acpi=off,pit=on,pic=on,rtc=off,isa-serial=off,auto-kernel-cmdline=on'],
    ...['-global', 'virtio-mmio.force-legacy=false'],
    ...['-chardev', `file,id=serial,path=${serial}`, '-device', 'isa-serial,chardev=serial'],
    ...['-drive', `if=none,id=disk,file=${disk},format=raw`, '-device', 'virtio-blk-device,drive=disk'],
    ...['-device', 'virtio-serial-device', '-chardev', `file,id=console,path=${output}`],
    ...['-device', 'virtconsole,chardev=console', '-device', 'virtio-rng-device'],
    ...['-kernel', guestPath('virtio.elf'), '-append', `${words} ports=1`],
  )
  return parse(await readFile(serial, 'utf8'), tscKhz).times
}

/** Lines as `bench-doorbell requests=2000 bytes=32000 cycles=123`. */
function parse(output: string, tscKhz: number): { times: Times; requests: number } {
  const lines = [...output.matchAll(/^(bench-\S+) requests=(\d+) bytes=\d+ cycles=(\d+)$/gm)]
  const times = lines.map(([, name, requests, cycles]) => {
    return [name!, ((Number(cycles) / tscKhz) * NS_PER_MS) / Number(requests)] as const
  })
  return {
    times: Object.fromEntries(times),
    requests: lines.reduce((sum, [, , requests]) => sum + Number(requests), 0),
  }
}
