import { invalidArgument, NodevisorError } from '../errors.js'
import type { CopyOptions } from './copy-options.js'
import type { SavedMachine } from './saved-machine.js'
import type { VirtualMachine } from './virtual-machine.js'

/** Makes a machine of what was saved. */
export type MachineMaker = (saved: SavedMachine, options: CopyOptions) => Promise<VirtualMachine>

/**
 * A machine at a moment, in memory: `vm.snapshot()` gives one. Copies share its pages until they write to them.
 *
 * It takes no memory but for the pages that its machine has written since; {@link close} gives that back.
 */
export class Snapshot {
  /** @internal */
  readonly saved: SavedMachine
  readonly #make: MachineMaker
  readonly #onClose: () => Promise<void>
  #closing: Promise<void> | undefined

  /** @internal */
  constructor(saved: SavedMachine, make: MachineMaker, onClose: () => Promise<void>) {
    this.saved = saved
    this.#make = make
    this.#onClose = onClose
  }

  /** Bytes of the machine's RAM. */
  get memorySize(): number {
    return this.saved.hardware.memorySize
  }

  /**
   * Makes machines that go on from here, each with memory, disks and devices of its own. None of them runs yet.
   *
   * @param count - how many; all of them are made, or none
   * @param options - as of {@link VirtualMachine.restore}; a function gives them for each
   * @throws `ERR_CLOSED`, and as {@link VirtualMachine.restore}
   */
  async spawn(
    count = 1,
    options: CopyOptions | ((index: number) => CopyOptions) = {},
  ): Promise<VirtualMachine[]> {
    if (!Number.isInteger(count) || count < 0)
      throw invalidArgument('count', 'an integer of at least 0', count)
    const machines: VirtualMachine[] = []
    try {
      for (let index = 0; index < count; index++) {
        machines.push(await this.copy(typeof options === 'function' ? options(index) : options))
      }
    } catch (error) {
      await Promise.allSettled(machines.map((machine) => machine.close()))
      throw error
    }
    return machines
  }

  /** One machine that goes on from here. @internal */
  copy(options: CopyOptions): Promise<VirtualMachine> {
    this.checkOpen()
    return this.#make(this.saved, options)
  }

  /** @internal */
  checkOpen(): void {
    if (this.#closing === undefined) return
    throw new NodevisorError('ERR_CLOSED', 'Expected an open snapshot but it was closed; take another')
  }

  /** Gives its memory back. Machines that were made from it live on. */
  close(): Promise<void> {
    this.#closing ??= this.#onClose()
    return this.#closing
  }

  /** {@link close}, for `await using`. */
  [Symbol.asyncDispose](): Promise<void> {
    return this.close()
  }
}
