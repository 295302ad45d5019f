import type { Device } from '../bus/device.js'
import { invalidArgument } from '../errors.js'
import type { VirtioDevice } from '../virtio/virtio-device.js'
import { checkDisk, checkExecution, checkObject, type DiskOptions, type ExecutionMode } from './options.js'

/** What a copy of a machine needs that a snapshot cannot hold, or that shall be other than it was. */
export interface CopyOptions {
  /** Where KVM_RUN runs: as in the machine that was saved, unless given. */
  readonly execution?: ExecutionMode
  /** Devices of yours, in the order in which the machine had them. Their states are put into them. */
  readonly devices?: readonly Device[]
  /** Virtio devices of yours, likewise. */
  readonly virtio?: readonly VirtioDevice[]
  /**
   * Other disks, in place of all that the machine had: as large as those. `'overlay'` has them lie over those, so that
   * writes last as long as the machine: those of a snapshot in memory always do.
   */
  readonly disks?: 'overlay' | readonly (string | URL | Uint8Array | DiskOptions)[]
  /** Where virtio-rng has its bytes from: the host's cryptographic generator unless given. */
  readonly rngSource?: (bytes: Uint8Array) => void
}

/** The same after the checks. */
export interface CheckedCopyOptions {
  readonly execution: ExecutionMode | undefined
  readonly devices: readonly Device[]
  readonly virtio: readonly VirtioDevice[]
  readonly disks: 'overlay' | readonly DiskOptions[] | undefined
  readonly rngSource: ((bytes: Uint8Array) => void) | undefined
}

const COPY_KEYS = ['execution', 'devices', 'virtio', 'disks', 'rngSource'] as const

/** Checks what a user passed; nothing has been touched when this throws. */
export function checkCopyOptions(options: CopyOptions): CheckedCopyOptions {
  checkObject('options', options, COPY_KEYS)
  const { execution, devices = [], virtio = [], disks, rngSource } = options
  if (execution !== undefined) checkExecution(execution)
  if (!Array.isArray(devices)) throw invalidArgument('devices', 'an array of devices', devices)
  if (!Array.isArray(virtio)) throw invalidArgument('virtio', 'an array of virtio devices', virtio)
  if (disks !== undefined && disks !== 'overlay' && !Array.isArray(disks)) {
    throw invalidArgument('disks', "'overlay' or an array of paths or { file, … }", disks)
  }
  if (rngSource !== undefined && typeof rngSource !== 'function') {
    throw invalidArgument('rngSource', 'a function', rngSource)
  }
  return {
    execution,
    devices,
    virtio,
    disks: typeof disks === 'string' ? disks : disks?.map(checkDisk),
    rngSource,
  }
}
