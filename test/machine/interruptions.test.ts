import { join } from 'node:path'
import { describe, expect, it, onTestFinished } from 'vitest'
import { VirtualMachine, type VirtualMachineOptions } from '../../src/index.js'
import { EchoHashDevice } from '../helpers/echo-hash-device.js'
import { makeFolder } from '../helpers/folders.js'
import { imageOf, onEmulated } from '../helpers/guests.js'
import { MACHINES, SUCCESS } from '../helpers/interrupts.js'
import { RUN_LIMIT } from '../helpers/limits.js'

/** What is done to a machine in the middle of its work. @returns the machine that goes on with it */
type Interruption = (vm: VirtualMachine) => Promise<VirtualMachine>

const copyOptions = () => ({ devices: [new EchoHashDevice()] })

const INTERRUPTIONS: Readonly<Record<string, Interruption>> = {
  async pause(vm) {
    await vm.pause()
    vm.resume()
    return vm
  },
  async snapshot(vm) {
    const snapshot = await vm.snapshot()
    await snapshot.close()
    return vm
  },
  async reset(vm) {
    const snapshot = await vm.snapshot()
    await turns(20)
    await vm.reset(snapshot)
    await snapshot.close()
    return vm
  },
  fork: (vm) => vm.fork(copyOptions()),
  async spawn(vm) {
    await using snapshot = await vm.snapshot()
    const [first, second] = await snapshot.spawn(2, copyOptions)
    await first!.close()
    return second!
  },
  async restore(vm) {
    const path = join(makeFolder(), 'snapshot')
    await vm.snapshot(path)
    return VirtualMachine.restore(path, copyOptions())
  },
  async restoreChanges(vm) {
    const folder = makeFolder()
    await vm.snapshot(join(folder, 'all'))
    await turns(5)
    await vm.snapshot(join(folder, 'changes'), { incremental: true })
    return VirtualMachine.restore(join(folder, 'changes'), copyOptions())
  },
}

/** Some turns of the event loop, in which the guest goes on. */
async function turns(count: number): Promise<void> {
  for (let i = 0; i < count; i++) await new Promise((resolve) => setTimeout(resolve, 0))
}

/** Numbers that are the same every time (mulberry32). */
function random(seed: number): (limit: number) => number {
  let state = seed
  return (limit) => {
    state = (state + 0x6d2b79f5) | 0
    let mixed = Math.imul(state ^ (state >>> 15), 1 | state)
    mixed = (mixed + Math.imul(mixed ^ (mixed >>> 7), 61 | mixed)) ^ mixed
    return ((mixed ^ (mixed >>> 14)) >>> 0) % limit
  }
}

interface Work {
  readonly options: VirtualMachineOptions
  /** The line that the guest ends with, undisturbed. */
  readonly answer: string
}

async function undisturbed(options: VirtualMachineOptions): Promise<Work> {
  await using vm = await VirtualMachine.create({ ...options, ...copyOptions() })
  expect(await vm.run({ timeout: RUN_LIMIT })).toMatchObject(SUCCESS)
  return { options, answer: answerOf(vm) }
}

function answerOf(vm: VirtualMachine): string {
  const { output } = vm.serial
  expect(output).toMatch(/^hash [0-9a-f]{16}$/m)
  return /^hash .*$/m.exec(output)![0]
}

/** Interrupts the work until it is done. @returns how often */
async function interrupt({ options, answer }: Work, seed: number): Promise<number> {
  const next = random(seed)
  const kinds = Object.keys(INTERRUPTIONS)
  let last = 'nothing'
  // vCPUs that share a thread take turns: each has to come to its own.
  const pause = options.execution === 'inline' ? 7 * options.cpus! : 7
  let vm = await VirtualMachine.create({ ...options, ...copyOptions() })
  const opened = [vm]
  onTestFinished(() => Promise.all(opened.map((machine) => machine.close())).then(() => {}))
  let count = 0
  for (;;) {
    let isOver = false
    const running = vm.run({ timeout: RUN_LIMIT }).finally(() => {
      isOver = true
    })
    let successor = vm
    while (!isOver && count < INTERRUPTIONS_EACH && successor === vm) {
      await new Promise((resolve) => setTimeout(resolve, next(pause)))
      if (isOver) break
      last = kinds[next(kinds.length)]!
      successor = await INTERRUPTIONS[last]!(vm)
      count++
    }
    if (successor !== vm) {
      opened.push(successor)
      await vm.close()
    }
    const result = await running
    if (result.reason === 'stopped' && result.by === 'close') {
      vm = successor
      continue
    }
    // With what was done and said last, should it have failed. A machine may end while it is copied.
    const said = `after ${last}: ${vm.serial.output.slice(-60)}`
    expect({ ...result, said }).toMatchObject({ ...SUCCESS, said: expect.stringContaining(answer) })
    return count
  }
}

const INTERRUPTIONS_EACH = 25
/** Work that is not done before most of them. */
const ROUNDS = onEmulated ? 200 : 8_000

describe.each(MACHINES)('with irqchip %s, %s,', (irqchip, execution) => {
  it.each([1, 2, 4])('%d processors give the same answer, however they are interrupted', async (cpus) => {
    const timer = cpus === 2 ? 'lapic' : 'pit'
    const cmdline = `cpus=${cpus} rounds=${ROUNDS} ticks=20 timer=${timer} device=1`
    const kernel = { image: imageOf({ image: 'continuity.elf' }), cmdline }
    const work = await undisturbed({ kernel, memory: '8M', irqchip, execution, cpus })
    expect(await interrupt(work, cpus)).toBeGreaterThan(0)
  })
})
