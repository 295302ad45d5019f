/** What every kind of disk does with requests, whatever they do. */

import { invalidArgument, NodevisorError } from '../errors.js'
import { SECTOR_SIZE } from '../virtio/block-backend.js'

/** What a request to a disk returns: a promise that settles when it is done, undefined if it is already. */
export type Request = Promise<void> | undefined

/** Checks what a disk's user has to: a mistake there must not reach beyond the disk. */
export function checkRange(size: number, offset: number, length: number): void {
  if (!Number.isSafeInteger(offset) || offset < 0 || offset % SECTOR_SIZE !== 0 || offset > size) {
    throw invalidArgument('offset', `a multiple of ${SECTOR_SIZE} within the disk of ${size} bytes`, offset)
  }
  if (!Number.isSafeInteger(length) || length < 0 || length % SECTOR_SIZE !== 0 || length > size - offset) {
    throw invalidArgument(
      'length',
      `a multiple of ${SECTOR_SIZE} that ends within the disk of ${size} bytes`,
      length,
    )
  }
}

/** The error for a request to a disk that was closed. */
export function closedError(): NodevisorError {
  return new NodevisorError('ERR_CLOSED', 'Expected an open disk but it was closed')
}

/** Starts a request of somebody else's disk, which may throw where it should reject. */
export function begin(request: () => Request): Request {
  try {
    return request()
  } catch (error) {
    return Promise.reject(error)
  }
}

/**
 * Done when all are, failed if one has: a request is not over, and its buffers still in use, as long as a part of it
 * is under way.
 */
export function settle(requests: readonly Promise<void>[]): Request {
  if (requests.length === 0) return undefined
  return Promise.allSettled(requests).then((results) => {
    for (const result of results) if (result.status === 'rejected') throw result.reason
  })
}

/** The requests of a disk that are under way, and whether it takes more. */
export class Requests {
  #count = 0
  #closed = false
  #drained: (() => void) | undefined

  /** Starts a request and counts it until it is done. Rejects with `ERR_CLOSED` after {@link close}. */
  start(request: () => Request): Request {
    if (this.#closed) return Promise.reject(closedError())
    const promise = request()
    if (promise === undefined) return undefined
    this.#count += 1
    return promise.finally(() => {
      this.#count -= 1
      if (this.#count === 0) this.#drained?.()
    })
  }

  /** Takes no more requests, and waits for those under way. */
  close(): Request {
    this.#closed = true
    if (this.#count === 0) return undefined
    return new Promise((resolve) => {
      this.#drained = resolve
    })
  }
}

/**
 * Flushes, one at a time. Those asked for while one is under way share the next: the one under way may have begun
 * before what they are to cover was written.
 */
export class Flushes {
  readonly #flush: () => Promise<void>
  #current: Promise<void> | undefined
  #next: Promise<void> | undefined

  constructor(flush: () => Promise<void>) {
    this.#flush = flush
  }

  /** A flush that begins now, or later. */
  request(): Promise<void> {
    if (this.#current === undefined) return this.#begin()
    this.#next ??= this.#current.then(
      () => this.#begin(),
      () => this.#begin(),
    )
    return this.#next
  }

  #begin(): Promise<void> {
    this.#next = undefined
    this.#current = this.#flush().finally(() => {
      // Where one waits it begins right after this, and nothing may begin in between.
      if (this.#next === undefined) this.#current = undefined
    })
    return this.#current
  }
}
