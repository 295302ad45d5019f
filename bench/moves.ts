/** What it takes to move a running machine to another process. */

import { type MigrationResult, VirtualMachine } from '../dist/index.js'
import { busyWriter } from './guests.js'
import { type Context, sleep, startProcess } from './lib.js'
import type { ReceivedReport } from './receiving-process.js'
import { alone, type Row } from './report.js'

const MIB = 2 ** 20

export async function moves(context: Context): Promise<Row[]> {
  const receiver = startProcess('receiving-process.ts')
  try {
    const { port } = await receiver.message<{ port: number }>()
    const samples: (MigrationResult & ReceivedReport)[] = []
    for (let round = 0; round <= context.rounds(5); round++) {
      const [moved, received] = await Promise.all([move(port), receiver.message<ReceivedReport>()])
      if (round > 0) samples.push({ ...moved, ...received })
    }
    const pauses = samples.map(({ pause }) => pause)
    return [
      alone('move over loopback, 256 MiB: longest pause of the guest', 'ns', pauses, { max: 50e6 }),
      alone(
        'the same, as migrate() says',
        'ns',
        samples.map(({ downtimeMs }) => downtimeMs * 1e6),
      ),
      alone(
        'from calling migrate() to its end',
        'ns',
        samples.map(({ durationMs }) => durationMs * 1e6),
      ),
      alone(
        'memory sent in a second of that',
        'bytes',
        samples.map(({ bytes, durationMs }) => (bytes / durationMs) * 1000),
      ),
    ]
  } finally {
    receiver.child.disconnect()
    await receiver.exit
  }
}

/** Moves a machine that writes 1 MiB for ever, and has written half of its memory. */
async function move(port: number): Promise<MigrationResult> {
  const vm = await VirtualMachine.create({
    kernel: { image: busyWriter(), mode: 'long' },
    memory: '256M',
    // So that the guest has a processor of its own: it goes on while JavaScript sends.
    execution: 'threads',
  })
  try {
    vm.memory.fill(16 * MIB, 128 * MIB, 0x55)
    const running = vm.run()
    await sleep(50)
    const result = await vm.migrate({ host: '127.0.0.1', port })
    await running
    return result
  } finally {
    await vm.close()
  }
}
