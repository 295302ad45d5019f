import { deviceTarget } from './device.js'
import { blockDevice, consoleDevice, entropyDevice } from './devices.js'
import { queueTarget } from './queue.js'
import type { FuzzTarget } from './target.js'
import { transportTarget } from './transport.js'

/** What can be fuzzed, by name. */
export const TARGETS: Readonly<Record<string, () => FuzzTarget>> = {
  queue: queueTarget,
  transport: transportTarget,
  block: () => deviceTarget(blockDevice),
  console: () => deviceTarget(consoleDevice),
  entropy: () => deviceTarget(entropyDevice),
}
