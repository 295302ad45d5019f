import { readdirSync, readFileSync } from 'node:fs'
import { expect, onTestFinished } from 'vitest'
import { type ErrorCode, VirtualMachine, type VirtualMachineOptions } from '../../src/index.js'

/** Both ways of execution, for tests that hold in each. */
export const EXECUTIONS = ['inline', 'threads'] as const

/** A machine that is closed when the test is over. */
export async function boot(
  kernel: VirtualMachineOptions['kernel'],
  options: Partial<VirtualMachineOptions> = {},
): Promise<VirtualMachine> {
  const vm = await VirtualMachine.create({ memory: '4M', kernel, ...options })
  onTestFinished(() => vm.close())
  return vm
}

/** Expects a NodevisorError with that code, whose message matches. */
export function errorWith(code: ErrorCode, message: RegExp | string = '') {
  return expect.objectContaining({
    name: 'NodevisorError',
    code,
    message: expect.stringMatching(message),
  })
}

/** Turns of the event loop until something holds. Only the test's own time-out ends it. */
export async function until(condition: () => boolean): Promise<void> {
  while (!condition()) await new Promise((resolve) => setTimeout(resolve, 1))
}

/** How many vCPU threads this process has. */
export function vcpuThreads(): number {
  const comm = (task: string) => {
    try {
      return readFileSync(`/proc/self/task/${task}/comm`, 'utf8')
    } catch {
      return '' // It has ended meanwhile.
    }
  }
  return readdirSync('/proc/self/task').filter((task) => comm(task) === 'nodevisor-vcpu\n').length
}
