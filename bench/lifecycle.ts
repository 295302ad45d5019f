/** What a machine costs from its creation to its end. */

import { writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { type ExecutionMode, type KernelOptions, VirtualMachine } from '../dist/index.js'
import { FIRMWARE_ADDRESS, firmware, halt } from './guests.js'
import { type Context, guestPath, interleave, time } from './lib.js'
import { qemuVersion, runQemu } from './qemu.js'
import { compare, type Row } from './report.js'

export const title = 'create, run and close a machine'

const MACHINES = 20
/** A Multiboot kernel that prints a few lines. */
const MULTIBOOT = guestPath('hello-protected.elf')

export async function run(context: Context): Promise<Row[]> {
  const { c, inline, threads } = await interleave(context.rounds(15), {
    c: () => context.baseline('lifecycle', MACHINES),
    inline: () => timeMachines('inline', { image: halt() }),
    threads: () => timeMachines('threads', { image: halt() }),
  })
  const program = { unit: 'ns', peer: 'C, same ioctls', theirs: c, bound: { max: 3 } } as const
  return [
    compare({ ...program, what: 'to hlt, 128 MiB, inline', ours: inline }),
    compare({ ...program, what: 'to hlt, 128 MiB, threads', ours: threads }),
    ...(await compareWithQemu(context)),
  ]
}

async function compareWithQemu(context: Context): Promise<Row[]> {
  const path = join(context.directory, 'firmware.bin')
  writeFileSync(path, firmware())
  const small = await besideQemu(context.rounds(9), { image: firmware(), at: FIRMWARE_ADDRESS }, [
    ...['-M', 'microvm', '-bios', path],
  ])
  const multiboot = await besideQemu(context.rounds(3), { image: MULTIBOOT }, [
    ...['-M', 'pc', '-kernel', MULTIBOOT],
  ])
  const faster = { unit: 'ns', kind: 'faster', bound: { min: 20 } } as const
  return [
    compare({
      ...faster,
      ...small,
      what: 'to debug-exit, smallest image',
      peer: 'QEMU, microvm, as its firmware',
    }),
    compare({ ...faster, ...multiboot, what: 'to debug-exit, Multiboot kernel', peer: 'QEMU, pc, -kernel' }),
  ]
}

/** Nanoseconds for a machine with `kernel`, and for QEMU with `args`. */
async function besideQemu(rounds: number, kernel: KernelOptions, args: readonly string[]) {
  const ours = () => timeMachines('auto', kernel)
  if (qemuVersion === undefined) return { ...(await interleave(rounds, { ours })), theirs: [] }
  return interleave(rounds, { ours, theirs: () => time(() => runQemu(0x10, ...args)) })
}

/** Nanoseconds for one machine. */
async function timeMachines(execution: ExecutionMode, kernel: KernelOptions): Promise<number> {
  const total = await time(async () => {
    for (let i = 0; i < MACHINES; i++) {
      const vm = await VirtualMachine.create({ kernel, memory: '128M', execution })
      const { reason } = await vm.run()
      await vm.close()
      if (reason !== 'halt' && reason !== 'debug-exit') throw new Error(`The machine ended with ${reason}`)
    }
  })
  return total / MACHINES
}
