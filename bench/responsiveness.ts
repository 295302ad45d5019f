/** Whether timers and sockets of the same process stay on time while a guest runs on the JavaScript thread. */

import { once } from 'node:events'
import { type AddressInfo, createServer } from 'node:net'
import { type KernelOptions, VirtualMachine } from '../dist/index.js'
import { COUNTED_PORT, endlessOuts } from './guests.js'
import { type Context, guestPath, median, percentile, startProcess } from './lib.js'
import type { Figure, Row } from './report.js'

export const title = 'timers and sockets beside a guest, inline'

/** Of one measurement, in ms. */
const DURATION = 1500
const TIMER = 10
const BOUND = { max: 5e6 }

const NO_GUEST = 'no guest'
/** What runs meanwhile. */
const GUESTS: Readonly<Record<string, KernelOptions | undefined>> = {
  [NO_GUEST]: undefined,
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
  const samples = new Map<string, Lateness[]>(Object.keys(GUESTS).map((name) => [name, []]))
  for (let round = 0; round < context.rounds(5); round++) {
    for (const [name, kernel] of Object.entries(GUESTS)) {
      samples.get(name)!.push(await measureBeside(kernel))
    }
  }
  const rows = (what: string, key: keyof Lateness, worst: number): Row[] => {
    const figure = (name: string): Figure => {
      const of = (percent: number) =>
        median(samples.get(name)!.map((sample) => percentile(sample[key], percent)))
      return { value: of(worst), unit: 'ns', also: { p50: of(50) } }
    }
    const peer = { name: NO_GUEST, figure: figure(NO_GUEST) }
    return Object.keys(GUESTS)
      .filter((name) => name !== NO_GUEST)
      .map((name) => ({ what: `${what}: ${name}`, ours: figure(name), peer, bound: BOUND }))
  }
  return [...rows(`timer of ${TIMER} ms, latest`, 'timers', 100), ...rows('TCP echo, p99', 'echoes', 99)]
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
  const { port } = server.address() as AddressInfo
  // Another process: its bytes come when this one is not prepared for them.
  const client = startProcess('echo-client.ts', [port, DURATION])
  await client.message()
  const timers: number[] = []
  let armed = performance.now()
  let timer = setTimeout(function late() {
    const now = performance.now()
    timers.push(Math.max(0, now - armed - TIMER) * 1e6)
    armed = now
    timer = setTimeout(late, TIMER)
  }, TIMER)
  client.child.send('go')
  const echoes = await client.message<number[]>()
  clearTimeout(timer)
  await client.exit
  server.close()
  return { timers, echoes }
}
