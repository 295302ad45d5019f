import { readdirSync, readFileSync } from 'node:fs'
import { describe, expect, it, onTestFinished } from 'vitest'
import type { Device, DeviceState, Snapshot, VirtualMachine, VirtualMachineOptions } from '../../src/index.js'
import { makeImage } from '../backends/disks.js'
import { type Code, debugExit, HLT, inb, program, SPIN } from '../helpers/code.js'
import { imageOf, onEmulated } from '../helpers/guests.js'
import { RUN_LIMIT } from '../helpers/limits.js'
import { boot, EXECUTIONS, errorWith, until } from './boot.js'

const MIB = 2 ** 20
const VALUE = 0x6000
/** `inc word [VALUE]`. */
const INCREMENT: Code = [0xff, 0x06, 0x00, 0x60]
/** Counts, says so, and goes on with that in the next run. */
const COUNT_FOR_EVER: Code = [...INCREMENT, ...debugExit(1), 0xeb, 0xf6]

async function snapshotOf(vm: VirtualMachine): Promise<Snapshot> {
  const snapshot = await vm.snapshot()
  onTestFinished(() => snapshot.close())
  return snapshot
}

async function spawn(snapshot: Snapshot, ...args: Parameters<Snapshot['spawn']>): Promise<VirtualMachine[]> {
  const machines = await snapshot.spawn(...args)
  onTestFinished(() => Promise.all(machines.map((machine) => machine.close())).then(() => {}))
  return machines
}

const counted = (vm: VirtualMachine) => vm.memory.readUint16(VALUE)

async function run(vm: VirtualMachine): Promise<number> {
  expect(await vm.run({ timeout: RUN_LIMIT })).toMatchObject({ reason: 'debug-exit', code: 1 })
  return counted(vm)
}

describe.each(EXECUTIONS)('%s, a snapshot', (execution) => {
  const counting = (options: Partial<VirtualMachineOptions> = {}) =>
    boot({ image: program(COUNT_FOR_EVER) }, { execution, ...options })

  it.each(['none', 'full', 'split'] as const)(
    'is what machines go on from, each for itself (irqchip %s)',
    async (irqchip) => {
      const vm = await counting({ irqchip, memory: '16M' })
      await run(vm)
      vm.memory.write(8 * MIB, Buffer.from('before'))
      const snapshot = await snapshotOf(vm)
      expect(snapshot.memorySize).toBe(16 * MIB)
      vm.memory.write(8 * MIB, Buffer.from('parent'))
      expect([await run(vm), await run(vm)]).toEqual([2, 3])

      const [first, second] = await spawn(snapshot, 2)
      expect(first!.vcpus[0]!.registers.rip).toBe(second!.vcpus[0]!.registers.rip)
      first!.memory.write(8 * MIB, Buffer.from('child!'))
      expect(await run(first!)).toBe(2)
      expect([counted(vm), counted(first!), counted(second!)]).toEqual([3, 2, 1])
      const texts = [vm, first!, second!].map(({ memory }) => Buffer.from(memory.read(8 * MIB, 6)).toString())
      expect(texts).toEqual(['parent', 'child!', 'before'])
      expect([first!.boot, first!.irqchip]).toEqual([vm.boot, irqchip])
    },
  )

  it('of a machine that has changed since the last one has the changes', async () => {
    const vm = await counting()
    const snapshots = []
    for (let i = 0; i < 4; i++) {
      snapshots.push(await snapshotOf(vm))
      await run(vm)
    }
    for (const [index, snapshot] of snapshots.entries()) {
      const [copy] = await spawn(snapshot)
      expect(counted(copy!)).toBe(index)
      expect(await run(copy!)).toBe(index + 1)
    }
    // Those that are gone are no longer in the way.
    await Promise.all(snapshots.map((snapshot) => snapshot.close()))
    const last = await snapshotOf(vm)
    expect(counted((await spawn(last))[0]!)).toBe(4)
  })

  it('outlives its machine, and machines outlive it', async () => {
    const vm = await counting()
    await run(vm)
    const snapshot = await vm.snapshot()
    await vm.close()
    const [child] = await spawn(snapshot)
    const grandchild = await child!.fork()
    onTestFinished(() => grandchild.close())
    await snapshot.close()
    await child!.close()
    expect(await run(grandchild)).toBe(2)
    await expect(snapshot.spawn()).rejects.toEqual(errorWith('ERR_CLOSED'))
  })

  it('is what a machine returns to, however often', async () => {
    const vm = await counting()
    await run(vm)
    vm.memory.writeUint8(0x10_0000, 1)
    const snapshot = await snapshotOf(vm)
    for (let i = 0; i < 5; i++) {
      expect([await run(vm), await run(vm)]).toEqual([2, 3])
      vm.memory.fill(0x10_0000, 0x4000, i)
      vm.vcpus[0]!.registers = { rbx: 5n }
      await vm.reset(snapshot)
      expect(counted(vm)).toBe(1)
      expect([...vm.memory.read(0x10_0000, 2)]).toEqual([1, 0])
      expect(vm.vcpus[0]!.registers.rbx).toBe(0n)
    }
    const [child] = await spawn(snapshot)
    await run(child!)
    await child!.reset(snapshot)
    expect(await run(child!)).toBe(2)
  })

  it('is what a machine returns to that was taken of a copy', async () => {
    const vm = await counting()
    const child = await vm.fork()
    onTestFinished(() => child.close())
    await run(child)
    const snapshot = await snapshotOf(child)
    for (let i = 0; i < 3; i++) {
      expect([await run(child), await run(child)]).toEqual([2, 3])
      await child.reset(snapshot)
    }
    expect(counted(child)).toBe(1)
    await child.reset(snapshot)
    expect(await run(child)).toBe(2)
  })

  it('brings back a machine that had ended', async () => {
    const vm = await boot({ image: imageOf({ image: 'crash.elf' }) }, { execution })
    const snapshot = await snapshotOf(vm)
    for (let i = 0; i < 2; i++) {
      expect(await vm.run({ timeout: RUN_LIMIT })).toMatchObject({ reason: 'shutdown' })
      await expect(vm.run()).rejects.toEqual(errorWith('ERR_ENDED'))
      await vm.reset(snapshot)
    }
  })

  it('is taken, and returned to, while the machine runs', async () => {
    const vm = await boot({ image: program(INCREMENT, SPIN) }, { execution })
    const running = vm.run({ timeout: RUN_LIMIT })
    await until(() => counted(vm) === 1)
    const snapshot = await snapshotOf(vm)
    expect(vm.paused).toBe(false)
    vm.memory.writeUint16(VALUE, 77)
    await vm.reset(snapshot)
    expect(counted(vm)).toBe(1)
    expect(vm.running).toBe(true)
    vm.stop()
    expect(await running).toMatchObject({ reason: 'stopped', by: 'stop' })
  })

  it('of a paused machine leaves it paused', async () => {
    const vm = await boot({ image: program(SPIN) }, { execution })
    const running = vm.run({ timeout: RUN_LIMIT })
    await vm.pause()
    await vm.reset(await snapshotOf(vm))
    expect(vm.paused).toBe(true)
    vm.stop()
    await running
  })
})

describe('a snapshot', () => {
  it('that is not one is refused, and so is that of another machine', async () => {
    const vm = await boot({ image: program(HLT) })
    const other = await boot({ image: program(HLT) })
    await expect(vm.reset(await snapshotOf(other))).rejects.toEqual(
      errorWith('ERR_SNAPSHOT_MISMATCH', /of another/),
    )
    await expect(vm.reset({} as Snapshot)).rejects.toEqual(errorWith('ERR_INVALID_ARGUMENT', /a Snapshot/))
    const snapshot = await vm.snapshot()
    await expect(snapshot.spawn(-1)).rejects.toEqual(errorWith('ERR_INVALID_ARGUMENT', /count/))
    await expect(snapshot.spawn(1, { disk: [] } as object)).rejects.toEqual(
      errorWith('ERR_UNKNOWN_OPTION', /disks/),
    )
    await snapshot.close()
    await expect(vm.reset(snapshot)).rejects.toEqual(errorWith('ERR_CLOSED'))
    await vm.close()
    await expect(vm.snapshot()).rejects.toEqual(errorWith('ERR_CLOSED'))
  })

  it('of a machine that has ended is refused', async () => {
    const vm = await boot({ image: imageOf({ image: 'reset.bin' }) })
    expect(await vm.run({ timeout: RUN_LIMIT })).toMatchObject({ reason: 'reset' })
    await expect(vm.snapshot()).rejects.toEqual(errorWith('ERR_ENDED'))
  })

  it('has the states of your devices, which a copy gets in devices of its own', async () => {
    class Counter implements Device {
      readonly name = 'counter'
      readonly ports = { base: 0x10, length: 1 }
      reads = 0
      read = () => ++this.reads
      saveState = (): DeviceState => this.reads
      restoreState(state: DeviceState): void {
        this.reads = state as number
      }
    }
    const counter = new Counter()
    const vm = await boot({ image: program(inb(0x10), debugExit(1), inb(0x10), HLT) }, { devices: [counter] })
    await run(vm)
    const snapshot = await snapshotOf(vm)
    const copied = new Counter()
    const [copy] = await spawn(snapshot, 1, { devices: [copied] })
    expect(await copy!.run({ timeout: RUN_LIMIT })).toMatchObject({ reason: 'halt' })
    expect(copy!.vcpus[0]!.registers.rax & 0xffn).toBe(2n)
    expect([counter.reads, copied.reads]).toEqual([1, 2])
    await expect(snapshot.spawn()).rejects.toEqual(errorWith('ERR_SNAPSHOT_MISMATCH', /counter is missing/))
    const mute = { name: 'mute', ports: { base: 0x11, length: 1 }, read: () => 0 }
    await expect(snapshot.spawn(1, { devices: [copied, mute] })).rejects.toEqual(
      errorWith('ERR_SNAPSHOT_MISMATCH', /mute is new/),
    )
    const other = await boot({ image: program(HLT) }, { devices: [mute] })
    await expect(other.snapshot()).rejects.toEqual(
      errorWith('ERR_SNAPSHOT_MISMATCH', /mute has no saveState/),
    )
  })

  it('a state that a device refuses makes no machine', async () => {
    const files = () => readdirSync('/proc/self/fd').length
    const vm = await boot({ image: program(HLT) }, { irqchip: 'full' })
    const snapshot = await snapshotOf(vm)
    const { saved } = snapshot
    const devices = saved.state.devices.map((device) =>
      device.name === 'rtc' ? { ...device, state: { index: 'what' } } : device,
    )
    Object.assign(saved.state, { devices })
    const before = files()
    await expect(snapshot.spawn()).rejects.toEqual(errorWith('ERR_SNAPSHOT_STATE', /rtc/))
    expect(files()).toBe(before)
  })

  it('tells its copies that they are copies: each has a generation ID of its own', async () => {
    const vm = await boot({ image: program(COUNT_FOR_EVER) }, { irqchip: 'split', memory: '4M' })
    const snapshot = await snapshotOf(vm)
    const id = ({ memory }: VirtualMachine) => Buffer.from(memory.read(0xe0030, 16)).toString('hex')
    const machines = await spawn(snapshot, 3)
    const before = id(vm)
    await vm.reset(snapshot)
    expect(new Set([before, id(vm), ...machines.map(id)]).size).toBe(5)
  })

  it('copies see the disk as it was, and keep their writes to themselves', async () => {
    const bytes = Buffer.alloc(64 * 1024, 'a')
    const path = makeImage(bytes)
    const vm = await boot(
      { image: program(HLT) },
      { disks: [{ file: path }, { memory: Buffer.from(bytes) }] },
    )
    const snapshot = await snapshotOf(vm)
    const [first, second] = await spawn(snapshot, 2)
    expect(first!.virtioDevices.map(({ name }) => name)).toEqual(['disk0', 'disk1'])
    await expect(spawn(snapshot, 1, { disks: [] })).rejects.toEqual(
      errorWith('ERR_SNAPSHOT_MISMATCH', /as many disks/),
    )
    await Promise.all([vm.close(), first!.close(), second!.close()])
    expect(readFileSync(path).equals(bytes)).toBe(true)
  })
})

it('a thousand forks of one machine do what they like, unseen by the others', async () => {
  const count = onEmulated ? 200 : 1000
  // mov [VALUE + 2], bx; inc word [VALUE]; debug-exit
  const vm = await boot({ image: program(debugExit(1), [0x89, 0x1e, 0x02, 0x60], INCREMENT, debugExit(1)) })
  await run(vm)
  vm.memory.writeUint16(VALUE, 100)
  const snapshot = await snapshotOf(vm)
  const machines = await spawn(snapshot, count, { execution: 'inline' })
  for (const [index, machine] of machines.entries()) {
    machine.vcpus[0]!.registers = { rbx: BigInt(index) }
    machine.memory.writeUint16(VALUE, index)
  }
  for (const [index, machine] of machines.entries()) expect(await run(machine)).toBe(index + 1)
  for (const [index, machine] of machines.entries()) {
    expect([counted(machine), machine.memory.readUint16(VALUE + 2)]).toEqual([index + 1, index])
  }
  expect([counted(vm), vm.memory.readUint16(VALUE + 2)]).toEqual([100, 0])
})
