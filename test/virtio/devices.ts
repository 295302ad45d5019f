/** Small virtio devices, for tests of what all devices have in common. */

import type { DescriptorChain } from '../../src/virtio/descriptor-chain.js'
import type { VirtioDevice, VirtioDriver, VirtioQueueOptions } from '../../src/virtio/virtio-device.js'

/** A type that the specification reserves for none: nobody's driver is taken in. */
const DEVICE_TYPE = 0x3f
/** The longest request that is answered in full, in bytes. */
const MAX_REQUEST = 65536

type DeviceParts = Omit<Partial<VirtioDevice>, 'queues'>

/** A device with the queues given. */
export function deviceWith(queues: readonly VirtioQueueOptions[], parts: DeviceParts = {}): VirtioDevice {
  return { name: 'tested', deviceType: DEVICE_TYPE, queues, ...parts }
}

/** What {@link answer} makes of a request: every bit turned round, so that bytes tell where they have been. */
export function invert(bytes: Uint8Array): Uint8Array {
  return bytes.map((byte) => byte ^ 0xff)
}

/** Answers a request with its own bytes, {@link invert}ed, as far as there is room. @returns bytes written */
export function answer(chain: DescriptorChain): number {
  return chain.write(invert(chain.read(MAX_REQUEST)))
}

/** A device that answers each request at once. */
export function answeringDevice({
  maxSize = 256,
  queues = 1,
  ...parts
}: AnsweringOptions = {}): VirtioDevice {
  return deviceWith(
    Array.from({ length: queues }, () => ({ maxSize, handle: answer })),
    parts,
  )
}

export interface AnsweringOptions extends DeviceParts {
  readonly maxSize?: number
  /** How many. */
  readonly queues?: number
}

/** A request that is under way in a {@link HoldingDevice}. */
export interface HeldRequest {
  readonly chain: DescriptorChain
  /** Answers it. */
  finish(): void
  /** Ends it as it is. @param written - what the device says that it wrote */
  settle(written: number): void
  fail(error: unknown): void
}

/** A device that keeps its requests until a test says what becomes of them. */
export class HoldingDevice implements VirtioDevice {
  readonly name = 'tested'
  readonly deviceType = DEVICE_TYPE
  readonly queues: readonly VirtioQueueOptions[]
  /** In the order in which they came. */
  readonly held: HeldRequest[] = []
  /** How many there were. */
  taken = 0
  driver: VirtioDriver | undefined
  resets = 0

  constructor({ maxSize = 256, queues = 1 } = {}) {
    const handle = (chain: DescriptorChain) =>
      new Promise<number>((settle, fail) => {
        this.taken++
        this.held.push({ chain, settle, fail, finish: () => settle(answer(chain)) })
      })
    this.queues = Array.from({ length: queues }, () => ({ maxSize, handle }))
  }

  start(driver: VirtioDriver): void {
    this.driver = driver
  }

  reset(): void {
    this.resets++
  }

  /** Answers all that are held. */
  finishAll(): void {
    for (const request of this.held.splice(0)) request.finish()
  }
}

/** Bytes that differ from one to the next, and from those of another `seed`. */
export function pattern(length: number, seed = 0): Uint8Array {
  return Uint8Array.from({ length }, (_, i) => (i * 7 + seed * 13 + (i >> 8)) & 0xff)
}
