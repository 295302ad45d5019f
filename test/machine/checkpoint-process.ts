// A process with a machine that takes checkpoints, until somebody ends it, or it ends itself at a step of its work with
// files.
import { createHash } from 'node:crypto'
import fs from 'node:fs'
import { syncBuiltinESMExports } from 'node:module'
import type { BlockBackend, DiskOptions, VirtualMachine } from '../../src/index.js'

const GUEST = new URL('../../build/guests/virtio.elf', import.meta.url).pathname

/** What to do: the argument of the process, as JSON. */
export interface CheckpointTask {
  readonly folder: string
  readonly disks: readonly DiskOptions[]
  /** What to be killed in; undefined: wait for it. */
  readonly dieIn?: 'checkpoint 2' | 'recover'
  /** Before which of its steps, the first being 1; none if there are fewer. */
  readonly step?: number
}

/** What the process says. */
export type CheckpointMessage =
  /** A checkpoint is begun of a machine that is like this. */
  | { readonly number: number; readonly moment: string }
  /** That was done, in so many steps. */
  | { readonly done: string; readonly steps: number }

/** All that a guest can see of its machine, but for time. */
export async function momentOf(vm: VirtualMachine): Promise<string> {
  const memory = vm.memory.read(0, vm.memory.size)
  // The generation ID, which says that it is a copy.
  memory.fill(0, 0xe0030, 0xe0040)
  const registers = vm.vcpus.map((vcpu) => vcpu.registers)
  await using snapshot = await vm.snapshot()
  const disks = await snapshot.saved.openDisks()
  try {
    const parts = { memory: hash(memory), registers, disks: await Promise.all(disks.map(hashDisk)) }
    return JSON.stringify(parts, (_key, value) =>
      typeof value === 'bigint' ? `0x${value.toString(16)}` : value,
    )
  } finally {
    await Promise.all(disks.map((disk) => disk.close()))
  }
}

async function hashDisk(disk: BlockBackend): Promise<string> {
  const bytes = new Uint8Array(disk.size)
  await disk.read(0, [bytes])
  return hash(bytes)
}

function hash(bytes: Uint8Array): string {
  return createHash('sha1').update(bytes).digest('hex')
}

/** Steps that change a folder. */
let steps = 0
/** Kills this process before the step with this number. */
let lastStep = Number.POSITIVE_INFINITY

function count(): void {
  steps++
  if (steps === lastStep) process.kill(process.pid, 'SIGKILL')
}

/** Counts what changes which files there are. */
function watchFiles(): void {
  const { mkdir, rename, rm, writeFile, open } = fs.promises
  const counted = <Arguments extends unknown[], Result>(call: (...args: Arguments) => Result) => {
    return (...args: Arguments) => {
      count()
      return call(...args)
    }
  }
  Object.assign(fs.promises, {
    mkdir: counted(mkdir),
    rename: counted(rename),
    rm: counted(rm),
    writeFile: counted(writeFile),
    open: (...args: Parameters<typeof open>) => {
      if (String(args[1]).startsWith('w')) count()
      return open(...args)
    },
  })
  syncBuiltinESMExports()
}

async function perform({ folder, disks, dieIn, step }: CheckpointTask): Promise<void> {
  const send = (message: CheckpointMessage) =>
    new Promise<void>((resolve) => process.send!(message, () => resolve()))
  watchFiles()
  const begin = (what: string) => {
    steps = 0
    lastStep = dieIn === what ? step! : Number.POSITIVE_INFINITY
  }
  // Much sooner ready than the sources.
  const built: typeof import('../../src/index.js') = await import('../../dist/index.js' as string)
  begin('recover')
  const isThere = fs.existsSync(`${folder}/current`)
  // A guest that writes its disks, and reads them again, for minutes.
  const kernel = { image: GUEST, cmdline: Array(500).fill('block').join(' reset ') }
  const vm = await (isThere
    ? built.VirtualMachine.recover(folder)
    : built.VirtualMachine.create({ kernel, memory: '8M', irqchip: 'full', disks }))
  if (isThere) await send({ done: 'recover', steps })
  void vm.run()
  for (let number = 1; ; number++) {
    begin(`checkpoint ${number}`)
    await vm.pause()
    await send({ number, moment: await momentOf(vm) })
    // It goes on while the checkpoint is written.
    const onProgress = () => vm.resume()
    await vm.checkpoint(folder, { onProgress })
    await send({ done: `checkpoint ${number}`, steps })
  }
}

if (process.send !== undefined && process.argv[2]?.startsWith('{')) await perform(JSON.parse(process.argv[2]))
