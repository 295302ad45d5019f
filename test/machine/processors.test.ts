import { describe, expect, it } from 'vitest'
import { VirtualMachine } from '../../src/index.js'
import { onEmulated } from '../helpers/guests.js'
import { bootInterrupts, interruptsGuest, MACHINES, SUCCESS } from '../helpers/interrupts.js'
import { RUN_LIMIT } from '../helpers/limits.js'
import { errorWith } from './boot.js'

/** What the guest prints with that many processors, if no increment and no IPI was lost. */
function answerOf(cpus: number): string {
  return `up ${cpus}\ncount ${cpus * 100}\nipis ${cpus - 1}\nbroadcast ${cpus - 1}\n`
}

describe.each(MACHINES)('with irqchip %s, %s,', (irqchip, execution) => {
  it.each([1, 2, 4])('a guest starts %d processors, which count and call each other', async (cpus) => {
    const vm = await bootInterrupts(`smp ${cpus}`, { irqchip, execution, cpus })
    expect(await vm.run({ timeout: RUN_LIMIT })).toMatchObject(SUCCESS)
    expect(vm.serial.output).toBe(answerOf(cpus))
  })

  it.skipIf(onEmulated)('a guest starts 16 processors, which count and call each other', async () => {
    const vm = await bootInterrupts('smp 16', { irqchip, execution, cpus: 16 })
    expect(await vm.run({ timeout: RUN_LIMIT })).toMatchObject(SUCCESS)
    expect(vm.serial.output).toBe(answerOf(16))
  })

  it('processors that the guest does not start stay parked', async () => {
    const vm = await bootInterrupts('smp 2', { irqchip, execution, cpus: 4 })
    expect(await vm.run({ timeout: RUN_LIMIT })).toMatchObject(SUCCESS)
    expect(vm.serial.output).toBe(answerOf(2))
    expect(vm.vcpus.slice(2).map(({ state }) => state)).toEqual(['parked', 'parked'])
  })

  it('a SIPI to a processor that runs is ignored', async () => {
    const vm = await bootInterrupts('sipi 2', { irqchip, execution, cpus: 2 })
    expect(await vm.run({ timeout: RUN_LIMIT })).toMatchObject(SUCCESS)
    expect(vm.serial.output).toBe('starts 1\n')
  })

  it.each([1, 2])('a triple fault of processor %d ends the machine', async (vcpu) => {
    const vm = await bootInterrupts(`crash 3 ${vcpu}`, { irqchip, execution, cpus: 3 })
    expect(await vm.run({ timeout: RUN_LIMIT })).toMatchObject({ reason: 'shutdown', vcpu })
    expect(vm.serial.output).toBe(`crash ${vcpu}\n`)
  })

  it.each([
    [1, 1],
    [2, 2],
    [4, 4],
    [2, 3],
  ])('cli; hlt on %d processors, all that run of %d, ends the run', async (running, cpus) => {
    const vm = await bootInterrupts(`halt ${running}`, { irqchip, execution, cpus })
    expect(await vm.run({ timeout: RUN_LIMIT })).toMatchObject({ reason: 'halt' })
    expect(vm.serial.output).toBe(`halt ${running}\n`)
    expect(vm.vcpus.map(({ state }) => state)).toEqual(
      Array.from({ length: cpus }, (_, index) => (index < running ? 'halted' : 'parked')),
    )
  })
})

it('a machine with several processors has interrupt controllers unless told otherwise', async () => {
  const vm = await bootInterrupts('smp 2', { cpus: 2 })
  expect(vm.irqchip).not.toBe('none')
  expect(await vm.run({ timeout: RUN_LIMIT })).toMatchObject(SUCCESS)
  expect(vm.serial.output).toBe(answerOf(2))
})

it.each([0, -1, 1.5, Number.NaN, 100_000, '2'])('%s processors are refused', async (cpus) => {
  const kernel = interruptsGuest('halt 1')
  await expect(VirtualMachine.create({ kernel, cpus: cpus as number })).rejects.toThrow(
    errorWith('ERR_INVALID_ARGUMENT', /for cpus/),
  )
})
