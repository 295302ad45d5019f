/** A process of its own, for snapshots.ts: it makes machines of one snapshot and says what they add to it. */

import { VirtualMachine } from '../dist/index.js'
import { endlessExits } from './guests.js'
import { sleep } from './lib.js'
import { openFiles, processMemory, slabMemory } from './proc.js'

/** What the process is at one moment. */
export interface ChildrenMeasurement {
  readonly memory: number
  readonly slab: number
  readonly files: number
}

/** The measurements of one process. */
export interface ChildrenReport {
  /** With the machine and its snapshot, and all code loaded and used. */
  readonly before: ChildrenMeasurement
  readonly made: ChildrenMeasurement
  /** Each has run to its first exit. */
  readonly ran: ChildrenMeasurement
  readonly closed: ChildrenMeasurement
}

const MIB = 2 ** 20
const count = Number(process.argv[2])

async function measure(): Promise<ChildrenMeasurement> {
  // What V8 could give back is not the machines'.
  for (let i = 0; i < 3; i++) {
    globalThis.gc?.()
    await sleep(50)
  }
  const { pid } = process
  return { memory: processMemory(pid), slab: slabMemory(), files: openFiles(pid) }
}

async function closeAll(machines: VirtualMachine[]): Promise<void> {
  for (const vm of machines.splice(0)) await vm.close()
}

const parent = await VirtualMachine.create({ kernel: endlessExits(), memory: '128M' })
parent.memory.fill(16 * MIB, 64 * MIB, 0x55)
await parent.run()
const snapshot = await parent.snapshot()
const warmup = await snapshot.spawn(20)
for (const vm of warmup) await vm.run()
await closeAll(warmup)

const before = await measure()
const machines = await snapshot.spawn(count)
const made = await measure()
for (const vm of machines) await vm.run()
const ran = await measure()
await closeAll(machines)
const closed = await measure()
await snapshot.close()
await parent.close()
process.send!({ before, made, ran, closed } satisfies ChildrenReport)
process.disconnect()
