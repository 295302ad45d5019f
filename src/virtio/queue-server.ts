import { invalidArgument } from '../errors.js'
import type { DescriptorChain } from './descriptor-chain.js'
import { LaterTurn, MAX_SERVICE } from './service.js'
import type { Virtqueue } from './virtqueue.js'

/** Serves a request. @returns bytes written */
export type RequestHandler = (chain: DescriptorChain) => number | Promise<number>

/** What a {@link QueueServer} tells. */
export interface QueueServerHost {
  /** Whether requests may be taken at the moment. */
  readonly open: boolean
  /** The driver broke a rule, or the device failed. */
  failed(error: unknown): void
  /** The driver has reset the device, and the last request of before that is done. */
  drained(): void
  /** A request is under way: it may be done soon. */
  yield(): void
}

/** Takes a queue's chains to the device's `handle`, and gives them back when it is done. */
export class QueueServer {
  readonly queue: Virtqueue
  /** Chains that were taken so far. */
  requests = 0
  readonly #handle: RequestHandler
  readonly #host: QueueServerHost
  #serving = false
  /** All descriptors are out: the next one that comes back goes on. */
  #full = false
  readonly #rest = new LaterTurn(() => this.serve())

  constructor(queue: Virtqueue, handle: RequestHandler, host: QueueServerHost) {
    this.queue = queue
    this.#handle = handle
    this.#host = host
  }

  /** Takes all there is, or what there is time for; the rest comes in another turn of the event loop. */
  serve(): void {
    // A device's handler may end up here again.
    if (this.#serving || this.#rest.pending || !this.#host.open) return
    this.#serving = true
    try {
      this.#takeAll()
    } catch (error) {
      this.#host.failed(error)
    } finally {
      this.#serving = false
    }
  }

  #takeAll(): void {
    const { queue } = this
    const end = performance.now() + MAX_SERVICE
    do {
      queue.suppressNotifications()
      for (let chain = queue.pop(); chain !== undefined; chain = queue.pop()) {
        this.#start(chain)
        if (!this.#host.open) return
        if (performance.now() < end) continue
        queue.notify()
        this.#rest.schedule()
        return
      }
      queue.notify()
      this.#full = queue.inFlight >= queue.size
      if (this.#full) return
    } while (!queue.wantNotifications())
  }

  #start(chain: DescriptorChain): void {
    this.requests++
    const written = this.#handle(chain)
    if (typeof written === 'number') {
      this.queue.push(chain, checkWritten(written, chain))
      return
    }
    if (!(written instanceof Promise))
      throw invalidArgument('handle', 'a number or a promise of one', written)
    this.#host.yield()
    written.then(
      (bytes) => this.#finish(chain, bytes),
      (error) => {
        this.queue.push(chain, 0)
        this.#host.failed(error)
      },
    )
  }

  #finish(chain: DescriptorChain, bytes: number): void {
    const { queue } = this
    try {
      queue.push(chain, checkWritten(bytes, chain))
      queue.notify()
    } catch (error) {
      this.#host.failed(error)
      return
    }
    if (queue.dead && queue.inFlight === 0) this.#host.drained()
    else if (this.#full) this.serve()
  }
}

function checkWritten(bytes: unknown, { writable }: DescriptorChain): number {
  if (typeof bytes === 'number' && Number.isInteger(bytes) && bytes >= 0 && bytes <= writable.length)
    return bytes
  const expected = `the bytes that were written, 0 to ${writable.length}, from handle`
  throw invalidArgument('its result', expected, bytes)
}
