import { NodevisorError } from '../errors.js'
import type { MachineParts } from './builder.js'

/** How long device requests may take, in ms, before a machine is said not to be able to stand still. */
const DRAIN_LIMIT = 10_000
/** Turns of the event loop before it is looked at less often. */
const QUICK_TURNS = 100

/**
 * Waits until no request of a virtio device is under way. The vCPUs have to be out of the guest.
 *
 * @throws `ERR_TIMEOUT` after ten seconds
 */
export async function drainRequests({
  virtio,
  clock,
}: Pick<MachineParts, 'virtio' | 'clock'>): Promise<void> {
  const isBusy = () => virtio.some((device) => device.function.busy)
  if (!isBusy()) return
  const end = performance.now() + DRAIN_LIMIT
  // Some wait for a timer.
  clock.start()
  try {
    for (let turns = 0; isBusy(); turns++) {
      if (performance.now() > end) throw notDrained(virtio)
      await new Promise<void>((resolve) => {
        if (turns < QUICK_TURNS) setImmediate(resolve)
        else setTimeout(resolve, 1)
      })
    }
  } finally {
    clock.stop()
  }
}

function notDrained(virtio: MachineParts['virtio']): NodevisorError {
  const names = virtio.filter((device) => device.function.busy).map(({ name }) => name)
  return new NodevisorError(
    'ERR_TIMEOUT',
    `Expected the requests of ${names.join(' and ')} to be done within ${DRAIN_LIMIT / 1000} s but they are not; a device ` +
      'that has no use for a buffer yet should leave it in its queue',
    { devices: names, timeout: DRAIN_LIMIT },
  )
}
