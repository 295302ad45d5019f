/** How fast user-mode code in a guest computes. */

import { type ExecutionMode, VirtualMachine } from '../dist/index.js'
import { type Context, guestPath, interleave } from './lib.js'
import { compare, type Row } from './report.js'

export const title = 'computing in user mode'

const ITERATIONS = 200_000_000

export async function run(context: Context): Promise<Row[]> {
  const { host, inline, threads } = await interleave(context.rounds(25), {
    host: () => context.baseline('loop', ITERATIONS),
    inline: () => timeGuest('inline'),
    threads: () => timeGuest('threads'),
  })
  const loop = {
    unit: 'cycles',
    kind: 'speed',
    peer: 'the host, same loop',
    theirs: host,
    bound: { min: 0.97 },
  } as const
  return [
    compare({ ...loop, what: 'a loop, inline', ours: inline }),
    compare({ ...loop, what: 'a loop, threads', ours: threads }),
  ]
}

/** Cycles of the TSC, which passes whether the guest runs or not: they are time. */
async function timeGuest(execution: ExecutionMode): Promise<number> {
  const kernel = { image: guestPath('user-mode.elf'), cmdline: String(ITERATIONS) }
  await using vm = await VirtualMachine.create({ kernel, execution })
  const report = vm.serial.waitFor(/cycles (\d+)\n/)
  await vm.run()
  return Number((await report).groups[0])
}
