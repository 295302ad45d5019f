/** What a machine costs from its creation to its end. */

import { writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { type ExecutionMode, type KernelOptions, VirtualMachine } from '../dist/index.js'
import { FIRMWARE_ADDRESS, firmware, halt } from './guests.js'
import { type Context, guestPath, interleave, time } from './lib.js'
import { qemuVersion, runQemu } from './qemu.js'
import { compare, type Figure, type Row } from './report.js'

export const title = 'create, run and close a machine'

const MACHINES = 20
/** A Multiboot kernel that prints a few lines. */
const MULTIBOOT = guestPath('hello-protected.elf')

export async function run(context: Context): Promise<Row[]> {
  const hlt = await interleave(context.rounds(15), {
    c: () => context.baseline('lifecycle', MACHINES),
    inline: () => timeMachines('inline', { image: halt() }),
    threads: () => timeMachines('threads', { image: halt() }),
  })
  const program = 'C, same ioctls'
  const bound = { max: 3 }
  const rows = [
    compare('to hlt, 128 MiB, inline', ns(hlt.inline), program, ns(hlt.c), 'times', bound),
    compare('to hlt, 128 MiB, threads', ns(hlt.threads), program, ns(hlt.c), 'times', bound),
  ]
  return [...rows, ...(await compareWithQemu(context))]
}

async function compareWithQemu(context: Context): Promise<Row[]> {
  const path = join(context.directory, 'firmware.bin')
  writeFileSync(path, firmware())
  const image = { image: firmware(), at: FIRMWARE_ADDRESS }
  const smallest = 'QEMU, microvm, as its firmware'
  const usual = 'QEMU, pc, -kernel'
  const bound = { min: 20 }
  const ours = {
    image: () => timeMachines('auto', image),
    multiboot: () => timeMachines('auto', { image: MULTIBOOT }),
  }
  if (qemuVersion === undefined) {
    const { image, multiboot } = await interleave(context.rounds(9), ours)
    return [
      compare('to debug-exit, smallest image', ns(image), smallest, undefined, 'faster', bound),
      compare('to debug-exit, Multiboot kernel', ns(multiboot), usual, undefined, 'faster', bound),
    ]
  }
  const small = await interleave(context.rounds(9), {
    ours: ours.image,
    qemu: () => time(() => runQemu(0x10, '-M', 'microvm', '-bios', path)),
  })
  const multiboot = await interleave(context.rounds(2), {
    ours: ours.multiboot,
    qemu: () => time(() => runQemu(0x10, '-M', 'pc', '-kernel', MULTIBOOT)),
  })
  return [
    compare('to debug-exit, smallest image', ns(small.ours), smallest, ns(small.qemu), 'faster', bound),
    compare(
      'to debug-exit, Multiboot kernel',
      ns(multiboot.ours),
      usual,
      ns(multiboot.qemu),
      'faster',
      bound,
    ),
  ]
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

function ns(value: number): Figure {
  return { value, unit: 'ns' }
}
