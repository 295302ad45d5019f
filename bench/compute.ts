/** How fast user-mode code in a guest computes. */

import { type ExecutionMode, VirtualMachine } from '../dist/index.js'
import { type Context, guestPath, interleave } from './lib.js'
import { compare, type Figure, type Row } from './report.js'

export const title = 'computing in user mode'

const ITERATIONS = 400_000_000

export async function run(context: Context): Promise<Row[]> {
  const loop = await interleave(context.rounds(9), {
    host: () => context.baseline('loop', ITERATIONS),
    inline: () => timeGuest('inline'),
    threads: () => timeGuest('threads'),
  })
  const host = 'the host, same loop'
  const bound = { min: 0.97 }
  return [
    compare('a loop, inline', cycles(loop.inline), host, cycles(loop.host), 'speed', bound),
    compare('a loop, threads', cycles(loop.threads), host, cycles(loop.host), 'speed', bound),
  ]
}

function cycles(value: number): Figure {
  return { value, unit: 'cycles' }
}

/** Cycles of the TSC, which passes whether the guest runs or not: they are time. */
async function timeGuest(execution: ExecutionMode): Promise<number> {
  const kernel = { image: guestPath('user-mode.elf'), cmdline: String(ITERATIONS) }
  await using vm = await VirtualMachine.create({ kernel, execution })
  const report = vm.serial.waitFor(/cycles (\d+)\n/)
  await vm.run()
  return Number((await report).groups[0])
}
