import type { MemoryImage } from '../memory/machine-ram.js'
import type { BlockBackend } from '../virtio/block-backend.js'
import type { Hardware } from './hardware.js'
import type { MachineState } from './machine-state.js'
import type { ExecutionMode } from './options.js'

/** A machine at a moment: all that a copy of it is made from. */
export interface SavedMachine {
  readonly hardware: Hardware
  readonly execution: ExecutionMode
  readonly state: MachineState
  readonly memory: MemoryImage
  /** Opens disks that are as they were at that moment. */
  openDisks(): Promise<readonly BlockBackend[]>
}
