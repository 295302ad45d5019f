/** A process of its own, for machines.ts: it makes idle machines and says what it then is. */

import { type ExecutionMode, VirtualMachine } from '../dist/index.js'
import { halt } from './guests.js'
import { sleep } from './lib.js'
import { availableMemory, openFiles, processMemory } from './proc.js'

/** What the process is at one moment. */
export interface Measurement {
  readonly memory: number
  readonly hostMemory: number
  readonly files: number
  /** Nanoseconds computed in one second of doing nothing. */
  readonly idleTime: number
}

/** The measurements of one process. */
export interface MachinesReport {
  /** With no machine, but all code loaded and used. */
  readonly before: Measurement
  readonly created: Measurement
  readonly halted: Measurement
  readonly closed: Measurement
}

const count = Number(process.argv[2])

async function measure(): Promise<Measurement> {
  // What V8 could give back is not the machines'.
  for (let i = 0; i < 3; i++) {
    globalThis.gc?.()
    await sleep(50)
  }
  const start = process.cpuUsage()
  await sleep(1000)
  const { user, system } = process.cpuUsage(start)
  return {
    memory: processMemory(process.pid),
    hostMemory: availableMemory(),
    files: openFiles(process.pid),
    idleTime: (user + system) * 1000,
  }
}

/** @param index - every second machine has a thread */
async function create(index: number): Promise<VirtualMachine> {
  const execution: ExecutionMode = index % 2 === 0 ? 'inline' : 'threads'
  return VirtualMachine.create({ kernel: halt(), memory: '128M', execution })
}

async function runToHalt(vm: VirtualMachine): Promise<void> {
  const { reason } = await vm.run()
  if (reason !== 'halt') throw new Error(`Expected the machine to halt but it ended with ${reason}`)
}

for (let i = 0; i < 20; i++) {
  const vm = await create(i)
  await runToHalt(vm)
  await vm.close()
}
const before = await measure()
const machines: VirtualMachine[] = []
for (let i = 0; i < count; i++) machines.push(await create(i))
const created = await measure()
for (const vm of machines) await runToHalt(vm)
const halted = await measure()
for (const vm of machines.splice(0)) await vm.close()
const closed = await measure()
process.send!({ before, created, halted, closed } satisfies MachinesReport)
process.disconnect()
