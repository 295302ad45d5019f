import type { Device } from '../bus/device.js'
import { NodevisorError } from '../errors.js'
import type { CheckedCopyOptions } from '../machine/copy-options.js'
import { openHost } from '../machine/host.js'
import { checkHost } from '../snapshot/snapshot-folder.js'
import type { SnapshotRecord } from '../snapshot/state-file.js'
import type { BlockBackend } from '../virtio/block-backend.js'
import { checkDisks } from './disks.js'

/**
 * Refuses a machine that cannot be had here, as far as that shows before it is made.
 *
 * @throws `ERR_SNAPSHOT_HOST`, `ERR_SNAPSHOT_MISMATCH`
 */
export function checkReceived(
  record: SnapshotRecord,
  { devices, virtio, disks }: CheckedCopyOptions,
  diskFolders: readonly string[],
): void {
  const { hardware, state } = record
  const host = openHost()
  const { features } = host.describeCpu(undefined, hardware.apicIds.length, hardware.irqchip !== 'none')
  checkHost(record, { kind: host.kind, features })
  checkLast(
    state.devices.map(({ name }) => name),
    [...virtio.map(({ name }) => name), ...devices.filter(hasState).map(({ name }) => name)],
  )
  if (typeof disks !== 'object') checkDisks(record.disks, diskFolders)
}

/**
 * Refuses disks that are not as large as the machine's.
 *
 * @throws `ERR_SNAPSHOT_MISMATCH`
 */
export function checkSizes(record: SnapshotRecord, disks: readonly BlockBackend[]): void {
  for (const [index, { size }] of disks.entries()) {
    const expected = record.disks[index]!.diskSize
    if (size === expected) continue
    throw new NodevisorError(
      'ERR_SNAPSHOT_MISMATCH',
      `Expected ${String(expected)} bytes, as the machine has them, for disk${index} but it has ${size}`,
      { disk: index, expected, received: size },
    )
  }
}

/** A user's own devices are a machine's last ones. */
function checkLast(names: readonly string[], own: readonly string[]): void {
  const last = names.slice(names.length - own.length)
  if (own.length <= names.length && own.every((name, index) => name === last[index])) return
  throw new NodevisorError(
    'ERR_SNAPSHOT_MISMATCH',
    `Expected the devices that the machine has (${names.join(', ')}) but received ${own.join(', ')} for the last of them`,
    { expected: names, received: own },
  )
}

function hasState({ read, write, saveState }: Device): boolean {
  return read !== undefined || write !== undefined || saveState !== undefined
}
