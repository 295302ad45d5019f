import type { AccessSize, DeviceState } from '../bus/device.js'
import { StateReader } from '../devices/state.js'
import { hex, invalidArgument, NodevisorError } from '../errors.js'
import type { Clock } from '../interrupts/timer.js'
import type { GuestMemory } from '../memory/guest-memory.js'
import { COMMON_FEATURES, isDeviceFeature, VIRTIO_F_EVENT_IDX, VIRTIO_F_VERSION_1 } from './features.js'
import { QueueServer } from './queue-server.js'
import type { VirtioDevice } from './virtio-device.js'
import { MAX_QUEUE_SIZE, type QueueLayout, queueParts, Virtqueue, VirtqueueError } from './virtqueue.js'

// VIRTIO 1.2, 2.1: Device Status Field
export const ACKNOWLEDGE = 1
export const DRIVER = 2
export const DRIVER_OK = 4
export const FEATURES_OK = 8
export const DEVICE_NEEDS_RESET = 64
export const FAILED = 128

/** In the order in which a driver sets them (3.1.1). */
const STEPS = [ACKNOWLEDGE, DRIVER, FEATURES_OK, DRIVER_OK] as const

const DEFAULT_QUEUE_SIZE = 256
const MAX_QUEUES = 1024
/** Halves of the addresses of a queue's three parts. */
const ADDRESSES = 6

/** What a {@link VirtioFunction} needs of its transport. */
export interface VirtioTransport {
  readonly memory: GuestMemory
  readonly clock: Clock
  /** Sends a used buffer notification. */
  queueInterrupt(): void
  /** Sends a configuration change notification. */
  configInterrupt(): void
  /** The driver is ready: from now on it notifies the queues with these indices. */
  started(queues: readonly number[]): void
  /** The driver has reset the device. */
  stopped(): void
  /** As that of a device's host. */
  yield(): void
  /** Ends the machine's run because of an exception. */
  fail(error: unknown): void
}

/** A queue as the driver sets it up. */
export interface QueueSetup {
  readonly maxSize: number
  size: number
  ready: boolean
  /** Of Descriptor Area, Driver Area and Device Area, the low and the high 32 bits each. */
  readonly addresses: number[]
}

/** What a virtio device has done since it was made. */
export interface VirtioStatistics {
  /** Notifications from the driver. */
  readonly notifications: number
  /** Chains taken of queues that have a handler. */
  readonly requests: number
  /** Used buffer notifications sent. */
  readonly interrupts: number
}

/**
 * What all virtio devices have in common, whatever the transport: the status field, feature negotiation, queues and
 * their service (VIRTIO 1.2, 2 and 3). The transport maps it to registers.
 *
 * What a driver may not do has no effect: status bits out of order are not set, features and queues do not change once
 * they are settled.
 */
export class VirtioFunction {
  readonly device: VirtioDevice
  readonly offered: bigint
  /** Goes up with each change of the configuration space. */
  configGeneration = 0
  /** Which rule the driver broke, when the device needs a reset. */
  problem: string | undefined
  #status = 0
  #negotiated = 0n
  #setups: QueueSetup[]
  #queues: (Virtqueue | undefined)[] = []
  #servers: (QueueServer | undefined)[] = []
  /** Queues of before the last reset, with requests under way that may still write into guest memory. */
  #draining: Virtqueue[] = []
  #transport: VirtioTransport | undefined
  /** How often {@link suspend} was called without {@link resume}. */
  #suspensions = 0
  #notifications = 0
  #requests = 0
  #interrupts = 0

  /** @throws `ERR_INVALID_ARGUMENT` for an object that is no virtio device: a user's may come from JavaScript */
  constructor(device: VirtioDevice) {
    checkVirtioDevice(device)
    this.device = device
    this.offered = (device.features ?? 0n) | COMMON_FEATURES
    this.#setups = this.#freshSetups()
  }

  /** Called once, before the guest's first instruction. */
  attach(transport: VirtioTransport): void {
    this.#transport = transport
  }

  get statistics(): VirtioStatistics {
    const running = this.#servers.reduce((sum, server) => sum + (server?.requests ?? 0), 0)
    return {
      notifications: this.#notifications,
      requests: this.#requests + running,
      interrupts: this.#interrupts,
    }
  }

  /**
   * The status field. After a reset it is 0 only once no request of before can write into guest memory any more (2.4.1),
   * and until then DEVICE_NEEDS_RESET, which drivers that do not wait for the 0 do not mind.
   */
  get status(): number {
    if (this.#status !== 0) return this.#status
    return this.#isDraining ? DEVICE_NEEDS_RESET : 0
  }

  /** The driver writes the status field: 0 resets; otherwise it can only add bits, in order (2.1.1, 3.1.1). */
  writeStatus(value: number): void {
    if (value === 0) {
      this.reset()
      return
    }
    if ((value & FAILED) !== 0) this.#status |= FAILED
    for (const step of STEPS) {
      if ((this.#status & step) !== 0) continue
      if ((value & step) === 0 || !this.#allows(step)) return
      this.#status |= step
      if (step === DRIVER_OK) this.#start()
    }
  }

  get negotiated(): bigint {
    return this.#negotiated
  }

  /** The driver accepts features: 32 bits of them. @param select - which 32 */
  writeFeatures(select: number, value: number): void {
    if ((this.#status & (DRIVER | FEATURES_OK)) !== DRIVER || select > 3) return
    const shift = BigInt(32 * select)
    this.#negotiated = (this.#negotiated & ~(0xffff_ffffn << shift)) | (BigInt(value) << shift)
  }

  /** A queue as it is set up; undefined where there is none. */
  setup(index: number): Readonly<QueueSetup> | undefined {
    return this.#setups[index]
  }

  /** The same to be changed, while the driver may do that: between FEATURES_OK and DRIVER_OK, and not while ready. */
  changeableSetup(index: number): QueueSetup | undefined {
    if ((this.#status & (FEATURES_OK | DRIVER_OK)) !== FEATURES_OK) return undefined
    const setup = this.#setups[index]
    return setup?.ready === false ? setup : undefined
  }

  /** The driver says that a queue is set up, or takes that back before it is ready itself (4.2.3.2). */
  writeReady(index: number, ready: boolean): void {
    if ((this.#status & (FEATURES_OK | DRIVER_OK)) !== FEATURES_OK) return
    const setup = this.#setups[index]
    if (setup !== undefined) setup.ready = ready && this.#isValid(setup)
  }

  /** The driver has made chains available in a queue. */
  notify(index: number): void {
    this.#notifications++
    this.#serve(index)
  }

  #serve(index: number): void {
    if (!this.#open) return
    const queue = this.#queues[index]
    if (queue === undefined) return
    const server = this.#servers[index]
    if (server !== undefined) server.serve()
    else this.#guard(() => this.device.queues[index]!.available?.(queue))
  }

  /** The driver reads the configuration space; undefined outside it. */
  readConfig(offset: number, size: AccessSize): number | undefined {
    const { config } = this.device
    if (config === undefined || offset + size > config.length) return undefined
    let value = 0
    for (let i = size - 1; i >= 0; i--) value = value * 256 + config[offset + i]!
    return value
  }

  /** The driver writes the configuration space, which it may do at any time (5.3.4 has a use for that). */
  writeConfig(offset: number, value: number, size: AccessSize): void {
    const { config } = this.device
    if (config === undefined || offset + size > config.length) return
    this.device.writeConfig?.(offset, value, size)
  }

  /** Back to how it was before the driver came (2.4). */
  reset(): void {
    const wasStarted = (this.#status & DRIVER_OK) !== 0
    this.#requests = this.statistics.requests
    for (const [index, queue] of this.#queues.entries()) {
      if (queue === undefined) continue
      queue.kill()
      // A device that takes buffers by itself lets go of them in reset().
      if (queue.inFlight > 0 && this.#servers[index] !== undefined) this.#draining.push(queue)
    }
    this.#queues = []
    this.#servers = []
    this.#setups = this.#freshSetups()
    this.#status = 0
    this.#negotiated = 0n
    this.problem = undefined
    if (wasStarted) this.device.reset?.()
    this.#transport?.stopped()
  }

  /** From now on no request is taken from a queue. Those under way go on. */
  suspend(): void {
    this.#suspensions++
  }

  /** Takes one {@link suspend} back. What the driver has made available meanwhile is served after the last. */
  resume(): void {
    this.#suspensions--
    if (this.#suspensions === 0) this.#serveAll()
  }

  /** Whether requests are under way. */
  get busy(): boolean {
    return this.#isDraining || this.#queues.some((queue) => queue !== undefined && queue.inFlight > 0)
  }

  /** Plain data, to be made again from. @throws `ERR_RUNNING` while it is {@link busy} */
  saveState(): DeviceState {
    if (this.busy) {
      throw new NodevisorError(
        'ERR_RUNNING',
        `Expected ${this.device.name} without requests under way; wait until they are done`,
      )
    }
    return {
      status: this.#status,
      negotiated: hex(this.#negotiated),
      configGeneration: this.configGeneration,
      queues: this.#setups.map(({ size, ready, addresses }, index) => {
        const { nextAvail, nextUsed } = this.#queues[index]?.state ?? { nextAvail: 0, nextUsed: 0 }
        return { size, ready, addresses: [...addresses], nextAvail, nextUsed }
      }),
      device: this.device.saveState?.() ?? null,
    }
  }

  restoreState(state: DeviceState): void {
    const { name } = this.device
    const reader = new StateReader(name, state)
    const status = reader.uint('status', 0xff)
    const negotiated = reader.bits('negotiated', 128)
    const configGeneration = reader.uint('configGeneration', 0xffff_ffff)
    const queues = reader.list('queues', this.#setups.length).map((queue) => {
      const fields = new StateReader(name, queue)
      return {
        // As the driver wrote it: what it may be is looked at when the queue is to be ready.
        size: fields.uint('size', 0xffff_ffff),
        ready: fields.boolean('ready'),
        addresses: fields.uints('addresses', ADDRESSES, 0xffff_ffff),
        nextAvail: fields.uint('nextAvail', 0xffff),
        nextUsed: fields.uint('nextUsed', 0xffff),
      }
    })
    this.reset()
    this.device.restoreState?.(reader.value('device'))
    this.configGeneration = configGeneration
    this.#negotiated = negotiated
    this.#setups = queues.map(({ size, ready, addresses }, index) => {
      const setup = { maxSize: this.#setups[index]!.maxSize, size, ready, addresses }
      return { ...setup, ready: ready && this.#isValid(setup) }
    })
    this.#status = status
    if ((status & DRIVER_OK) !== 0) this.#start(queues)
  }

  /**
   * Whether queues are served: not before the requests of before a reset are done. A driver need not wait for that, but
   * one that resets the device again and again would have any number of them under way.
   */
  get #open(): boolean {
    const isReady = (this.#status & (DRIVER_OK | DEVICE_NEEDS_RESET | FAILED)) === DRIVER_OK
    return isReady && this.#suspensions === 0 && !this.#isDraining
  }

  get #isDraining(): boolean {
    if (this.#draining.length > 0) this.#draining = this.#draining.filter(({ inFlight }) => inFlight > 0)
    return this.#draining.length > 0
  }

  #allows(step: number): boolean {
    if (step !== FEATURES_OK) return true
    return (this.#negotiated & ~this.offered) === 0n && (this.#negotiated & VIRTIO_F_VERSION_1) !== 0n
  }

  #freshSetups(): QueueSetup[] {
    return this.device.queues.map(({ maxSize = DEFAULT_QUEUE_SIZE }) => ({
      maxSize,
      size: 0,
      ready: false,
      addresses: new Array<number>(ADDRESSES).fill(0),
    }))
  }

  /** A queue that the device can use: its parts aligned, apart, and each in one stretch of RAM. */
  #isValid(setup: QueueSetup): boolean {
    const { size, maxSize } = setup
    if (size < 1 || size > maxSize || (size & (size - 1)) !== 0) return false
    const memory = this.#transport!.memory
    const parts = queueParts(layoutOf(setup))
    const inOneRegion = ({ address, length }: { address: number; length: number }) =>
      memory.regions.some(({ start, size }) => address >= start && address + length <= start + size)
    return parts.every(
      (part, index) =>
        part.address % part.alignment === 0 &&
        inOneRegion(part) &&
        parts
          .slice(index + 1)
          .every(
            (other) =>
              part.address + part.length <= other.address || other.address + other.length <= part.address,
          ),
    )
  }

  /** DRIVER_OK was set. */
  #start(states: readonly { readonly nextAvail: number; readonly nextUsed: number }[] = []): void {
    const transport = this.#transport!
    const eventIdx = (this.#negotiated & VIRTIO_F_EVENT_IDX) !== 0n
    const interrupt = () => {
      this.#interrupts++
      transport.queueInterrupt()
    }
    this.#queues = this.#setups.map((setup, index) =>
      setup.ready
        ? new Virtqueue(transport.memory, index, layoutOf(setup), eventIdx, interrupt, states[index])
        : undefined,
    )
    const isOpen = () => this.#open
    const host = {
      get open() {
        return isOpen()
      },
      failed: (error: unknown) => this.#failed(error),
      drained: () => this.#serveAll(),
      yield: () => transport.yield(),
    }
    this.#servers = this.#queues.map((queue, index) => {
      const { device } = this
      const { handle } = device.queues[index]!
      if (queue === undefined || handle === undefined) return undefined
      return new QueueServer(queue, (chain) => handle.call(device.queues[index], chain), host)
    })
    const ready = this.#queues.flatMap((queue, index) => (queue === undefined ? [] : [index]))
    transport.started(ready)
    const queues = this.#queues
    this.#guard(() => {
      this.device.start?.({
        features: this.#negotiated,
        queues,
        clock: transport.clock,
        yield: () => transport.yield(),
        configChanged: () => {
          // A device may know of the reset later.
          if (queues === this.#queues) this.#configChanged()
        },
        needsReset: (why) => {
          if (queues === this.#queues) this.#needsReset(why)
        },
      })
    })
    // Buffers may be available before the driver is ready, and not all drivers notify of them again.
    this.#serveAll()
  }

  #serveAll(): void {
    for (const index of this.#queues.keys()) this.#serve(index)
  }

  #configChanged(): void {
    this.configGeneration = (this.configGeneration + 1) >>> 0
    this.#transport!.configInterrupt()
  }

  #needsReset(why: string): void {
    if ((this.#status & DEVICE_NEEDS_RESET) !== 0) return
    this.problem = why
    this.#status |= DEVICE_NEEDS_RESET
    // 2.1.2: the driver is told if it is there.
    if ((this.#status & DRIVER_OK) !== 0) this.#configChanged()
  }

  #guard(action: () => void): void {
    try {
      action()
    } catch (error) {
      this.#failed(error)
    }
  }

  #failed(error: unknown): void {
    if (error instanceof VirtqueueError) {
      this.#needsReset(error.message)
      return
    }
    const text = error instanceof Error ? error.message : String(error)
    this.#transport!.fail(
      new NodevisorError(
        'ERR_DEVICE_FAILED',
        `Expected no exception from the virtio device ${this.device.name} but received: ${text}`,
        { device: this.device.name, cause: error },
      ),
    )
  }
}

function layoutOf({ size, addresses }: QueueSetup): QueueLayout {
  const address = (low: number) => addresses[low]! + addresses[low + 1]! * 2 ** 32
  return { size, descriptors: address(0), driver: address(2), device: address(4) }
}

function checkVirtioDevice(device: unknown): asserts device is VirtioDevice {
  if (typeof device !== 'object' || device === null) {
    throw invalidArgument('virtio device', 'an object with a name, a deviceType and queues', device)
  }
  const { name, deviceType, features = 0n, queues, config } = device as Partial<VirtioDevice>
  if (typeof name !== 'string' || name === '') {
    throw invalidArgument('name of a virtio device', 'a non-empty string', name)
  }
  if (!Number.isInteger(deviceType) || deviceType! < 1 || deviceType! > 0xffff_ffff) {
    throw invalidArgument(`deviceType of ${name}`, 'an integer of at least 1', deviceType)
  }
  if (typeof features !== 'bigint' || !onlyDeviceFeatures(features)) {
    throw invalidArgument(`features of ${name}`, 'a bigint of bits 0 to 23 and 50 to 127', features)
  }
  if (config !== undefined && !(config instanceof Uint8Array)) {
    throw invalidArgument(`config of ${name}`, 'a Uint8Array', config)
  }
  if (!Array.isArray(queues) || queues.length < 1 || queues.length > MAX_QUEUES) {
    throw invalidArgument(`queues of ${name}`, `an array of 1 to ${MAX_QUEUES}`, queues)
  }
  for (const [index, queue] of queues.entries()) {
    const { maxSize = DEFAULT_QUEUE_SIZE, handle, available } = queue ?? {}
    const isSize = Number.isInteger(maxSize) && maxSize >= 1 && maxSize <= MAX_QUEUE_SIZE
    if (!isSize || (maxSize & (maxSize - 1)) !== 0) {
      throw invalidArgument(`maxSize of queue ${index} of ${name}`, 'a power of two up to 32768', maxSize)
    }
    if ((typeof handle === 'function') === (typeof available === 'function')) {
      throw invalidArgument(`queue ${index} of ${name}`, 'either handle or available, a function,', handle)
    }
  }
}

function onlyDeviceFeatures(features: bigint): boolean {
  if (features < 0n) return false
  for (let bit = 0, rest = features; rest > 0n; bit++, rest >>= 1n) {
    if ((rest & 1n) !== 0n && !isDeviceFeature(bit)) return false
  }
  return true
}
