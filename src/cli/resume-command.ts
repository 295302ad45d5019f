import { type ExecutionMode, VirtualMachine } from '../index.js'
import { noteEvery, readEvery } from './checkpoints.js'
import { hasConsole, type RunMachineOptions, runMachine, sayWhy } from './run-command.js'

/** The options of `nodevisor resume`, as the command line gives them. */
export interface ResumeCommandOptions extends Omit<RunMachineOptions, 'console' | 'checkpoint'> {
  readonly every?: number
  readonly execution?: string
}

/** `nodevisor resume FOLDER`: goes on from the last checkpoint, and takes others. @returns the exit status */
export async function resumeCommand(dir: string, options: ResumeCommandOptions): Promise<number> {
  const { execution } = options
  let vm: VirtualMachine | undefined
  try {
    // What the command line allows more than the type is refused by recover(), with the choices.
    const copyOptions = execution === undefined ? {} : { execution: execution as ExecutionMode }
    vm = await VirtualMachine.recover(dir, copyOptions)
    const every = options.every ?? (await readEvery(dir))
    if (options.every !== undefined) noteEvery(dir, every)
    return await runMachine(vm, { ...options, console: hasConsole(vm), checkpoint: { every, dir } })
  } catch (error) {
    return sayWhy(error)
  } finally {
    await vm?.close()
  }
}
