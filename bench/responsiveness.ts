/** Whether timers and sockets of the same process stay on time while a guest runs on the JavaScript thread. */

import { fork } from 'node:child_process'
import { once } from 'node:events'
import { type AddressInfo, createServer, type Server } from 'node:net'
import { fileURLToPath } from 'node:url'
import { type KernelOptions, VirtualMachine } from '../dist/index.js'
import { COUNTED_PORT, endlessOuts } from './guests.js'
import { type Context, guestPath, median, percentile } from './lib.js'
import type { Figure, Row } from './report.js'

export const title = 'timers and sockets beside a guest, inline'

const CLIENT = fileURLToPath(new URL('echo-client.ts', import.meta.url))
/** Of one measurement, in ms. */
const DURATION = 1500
const TIMER = 10
const BOUND = { max: 5e6 }

/** What runs meanwhile. */
const GUESTS: Readonly<Record<string, KernelOptions | undefined>> = {
  'no guest': undefined,
  'a guest jumps on the spot': { image: guestPath('spin.elf') },
  'a guest computes in user mode': { image: guestPath('user-mode.elf'), cmdline: String(10 ** 15) },
  'a guest does out for ever': { image: endlessOuts() },
}

/** Nanoseconds: how late timers were, and how long echoes took. */
interface Lateness {
  readonly timers: readonly number[]
  readonly echoes: readonly number[]
}

export async function run(context: Context): Promise<Row[]> {
  const names = Object.keys(GUESTS)
  const samples = new Map<string, Lateness[]>(names.map((name) => [name, []]))
  for (let round = 0; round < context.rounds(5); round++) {
    for (const name of names) samples.get(name)!.push(await measureBeside(GUESTS[name]))
  }
  const rows = (what: string, key: keyof Lateness, worst: number, label: string): Row[] =>
    names.map((name) => {
      const of = (percent: number) =>
        median(samples.get(name)!.map((sample) => percentile(sample[key], percent)))
      const ours: Figure = { value: of(worst), unit: 'ns', also: { p50: of(50) } }
      return {
        what: `${what}, ${label}: ${name}`,
        ours,
        ...(GUESTS[name] === undefined ? {} : { bound: BOUND }),
      }
    })
  return [
    ...rows(`timer of ${TIMER} ms, late`, 'timers', 100, 'max'),
    ...rows('TCP echo', 'echoes', 99, 'p99'),
  ]
}

async function measureBeside(kernel: KernelOptions | undefined): Promise<Lateness> {
  if (kernel === undefined) return measure()
  await using vm = await VirtualMachine.create({
    kernel,
    execution: 'inline',
    devices: [{ name: 'sink', ports: { base: COUNTED_PORT, length: 1 } }],
  })
  const result = vm.run()
  const lateness = await measure()
  vm.stop()
  const { reason } = await result
  if (reason !== 'stopped') throw new Error(`Expected the guest to run until it is stopped: ${reason}`)
  return lateness
}

async function measure(): Promise<Lateness> {
  const server = createServer((socket) => socket.setNoDelay().pipe(socket))
  server.listen(0, '127.0.0.1')
  await once(server, 'listening')
  const client = measureEchoes(server)
  const timers: number[] = []
  let armed = performance.now()
  let timer = setTimeout(function late() {
    const now = performance.now()
    timers.push(Math.max(0, now - armed - TIMER) * 1e6)
    armed = now
    timer = setTimeout(late, TIMER)
  }, TIMER)
  const echoes = await client
  clearTimeout(timer)
  server.close()
  return { timers, echoes }
}

/** The client is another process: a byte comes when this one is not prepared for it. */
async function measureEchoes(server: Server): Promise<number[]> {
  const { port } = server.address() as AddressInfo
  const child = fork(CLIENT, [String(port), String(DURATION)])
  const exit = once(child, 'exit')
  const [times] = await once(child, 'message')
  await exit
  return times as number[]
}
