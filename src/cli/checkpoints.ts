import { renameSync, writeFileSync } from 'node:fs'
import { readFile } from 'node:fs/promises'
import { join } from 'node:path'
import { NodevisorError, type VirtualMachine } from '../index.js'
import type { CheckpointOption } from './arguments.js'
import { say } from './say.js'

/** What else is in a folder of checkpoints, for `nodevisor resume`: `{"every":5000}`, in milliseconds. */
const OPTIONS = 'options'

/** Takes the first checkpoint of a machine, before it runs, and notes in the folder how often others follow. */
export async function takeFirst(vm: VirtualMachine, { dir, every }: CheckpointOption): Promise<void> {
  // When the folder is ours, and before there is something to go on from: that needs it.
  await vm.checkpoint(dir, { onProgress: () => noteEvery(dir, every) })
}

/** Notes how often checkpoints are taken in a folder. */
export function noteEvery(dir: string, every: number): void {
  const path = join(dir, OPTIONS)
  try {
    writeFileSync(`${path}.new`, `${JSON.stringify({ every })}\n`)
    renameSync(`${path}.new`, path)
  } catch (cause) {
    throw new NodevisorError('ERR_SNAPSHOT_WRITE', `'${path}' could not be written: ${messageOf(cause)}`, {
      path,
      cause,
    })
  }
}

/** How often checkpoints were taken in a folder, in ms. */
export async function readEvery(dir: string): Promise<number> {
  const path = join(dir, OPTIONS)
  try {
    const { every } = JSON.parse(await readFile(path, 'utf8')) as { every: unknown }
    if (typeof every === 'number' && every > 0 && every < 2 ** 31) return every
    throw new Error(`Expected the milliseconds between checkpoints but it has ${every}`)
  } catch (cause) {
    throw new NodevisorError(
      'ERR_SNAPSHOT_READ',
      `'${path}' does not say how often checkpoints are taken (${messageOf(cause)}): say it with --every`,
      { path, cause },
    )
  }
}

/** Takes checkpoints of a machine that runs, each some time after the one before was done. */
export class Checkpoints {
  readonly #vm: VirtualMachine
  readonly #option: CheckpointOption
  #timer: NodeJS.Timeout | undefined
  #taking: Promise<void> | undefined
  readonly #over = new AbortController()

  constructor(vm: VirtualMachine, option: CheckpointOption) {
    this.#vm = vm
    this.#option = option
    this.#wait()
  }

  /** Gives up the one under way: it may be of the machine as it ended. Resolves when that is done. */
  async stop(): Promise<void> {
    this.#over.abort()
    clearTimeout(this.#timer)
    await this.#taking
  }

  #wait(): void {
    this.#timer = setTimeout(() => {
      this.#taking = this.#take()
    }, this.#option.every)
  }

  async #take(): Promise<void> {
    const { signal } = this.#over
    try {
      await this.#vm.checkpoint(this.#option.dir, { signal })
    } catch (error) {
      if (!signal.aborted) say(`no checkpoint: ${messageOf(error)}`)
    }
    if (!signal.aborted) this.#wait()
  }
}

function messageOf(error: unknown): string {
  return error instanceof Error ? error.message : String(error)
}
