import type { VirtioDevice } from '../../src/virtio/virtio-device.js'
import {
  encode,
  linked,
  REGISTERS,
  STATUS,
  VIRTQ_DESC_F_INDIRECT,
  VIRTQ_DESC_F_NEXT,
  VIRTQ_DESC_F_WRITE,
  VirtioDriver,
} from '../helpers/virtio-driver.js'
import { DATA_START, FuzzMemory, REGION_SIZE, TABLES_END, TABLES_START } from './memory.js'
import { Random } from './random.js'
import { expectNoFailures, type FuzzTarget, untilTrue } from './target.js'

const QUEUE_SIZE = 16
/** Between the rings of one queue and those of the next. */
const QUEUE_STRIDE = 0x400
const MAX_QUEUES = TABLES_START / QUEUE_STRIDE
const MAX_TABLE = 16
/** As much time as any request needs, in ns. */
const LONG = 10e9

/** A request as a driver that keeps to the rules sends it, before the fuzzer has its way with it. */
export interface FuzzRequest {
  readonly queue: number
  /** What the device reads. */
  readonly out: Uint8Array
  /** Room for what it writes, in bytes: a few hundred at most. */
  readonly room: number
}

/** A device to be fuzzed, and what there is to do with it. */
export interface FuzzedDevice {
  readonly device: VirtioDevice
  /** Queues whose requests are all answered, without anything from the host's side but time. */
  readonly answers: readonly number[]
  request(random: Random): FuzzRequest
  /** Something happens on the host's side: input, a backend that is done. */
  act?(random: Random): void
  /** All that is under way is to come to its end. */
  settle?(): void
}

/** A device behind a driver that sends mostly good requests, in pieces of any size, and damages some. */
class DeviceRun {
  readonly #memory: FuzzMemory
  readonly #fuzzed: FuzzedDevice
  readonly #driver: VirtioDriver
  /** What the device may write into, as it was described since the last reset. */
  #writable: { readonly index: number; readonly length: number }[] = []

  constructor(memory: FuzzMemory, fuzzed: FuzzedDevice) {
    this.#memory = memory
    memory.clear()
    this.#fuzzed = fuzzed
    this.#driver = new VirtioDriver(fuzzed.device, { memory: memory.memory })
  }

  get #queues(): number {
    return Math.min(this.#fuzzed.device.queues.length, MAX_QUEUES)
  }

  async run(operations: readonly number[]): Promise<void> {
    await this.#start(this.#driver.offered)
    for (const operation of operations) {
      await this.#operate(new Random(operation))
      this.#check()
    }
    // Whatever there was before, a good driver is served well.
    await this.#start(this.#driver.offered)
    for (let i = 0; i < 3; i++) this.#add(new Random(i), true)
    const answered = () => {
      for (let queue = 0; queue < this.#queues; queue++) this.#driver.notify(queue)
      this.#fuzzed.settle?.()
      this.#driver.clock.advance(LONG)
      return this.#fuzzed.answers.every((queue) => this.#used(queue) === this.#available(queue))
    }
    await untilTrue(answered, 'good requests to be answered')
    this.#check()
    await this.#reset()
  }

  async #operate(random: Random): Promise<void> {
    const sort = random.below(400)
    if (sort < 180) this.#add(random)
    else if (sort < 280) this.#driver.notify(random.below(this.#queues))
    else if (sort < 320) this.#fuzzed.act?.(random)
    else if (sort < 350) this.#driver.clock.advance(random.below(5_000_000))
    else if (sort < 360) await new Promise(setImmediate)
    else if (sort < 370) await undefined
    else if (sort < 380) this.#accessConfig(random)
    else if (sort < 392) this.#rewrite(random)
    else if (sort < 395) this.#damageRings(random)
    else if (sort < 396 || (this.#driver.status & STATUS.DEVICE_NEEDS_RESET) !== 0) {
      await this.#start(this.#driver.offered & ~BigInt(random.below(0x1_0000)))
    }
  }

  #add(random: Random, good = false): void {
    const request = this.#fuzzed.request(random)
    const queue = good ? this.#fuzzed.answers[random.below(this.#fuzzed.answers.length)]! : request.queue
    const at = queue * QUEUE_STRIDE
    const driver = at + 16 * QUEUE_SIZE
    const availIdx = this.#available(queue)
    if (((availIdx - this.#used(queue)) & 0xffff) >= QUEUE_SIZE) return
    let { out, room } = request
    if (!good && random.oneIn(16)) {
      out = out.slice(0, random.below(out.length + 1))
      if (out.length > 0 && random.oneIn(2)) out[random.below(out.length)] = random.word()
      room = random.oneIn(2) ? random.below(room + 1) : random.below(400)
    }
    const chain = [
      ...this.#cut(random, out.length).map(({ offset, length }) => {
        const buffer = this.#place(random, length, good)
        this.#memory.write(buffer.index, out.subarray(offset, offset + length))
        return { address: buffer.address, length, flags: 0 }
      }),
      ...this.#cut(random, room).map(({ length }) => {
        const { index, address } = this.#place(random, length, good)
        if (length > 0) this.#writable.push({ index, length })
        return { address, length, flags: VIRTQ_DESC_F_WRITE }
      }),
    ]
    if (chain.length === 0) return
    if (!good && random.oneIn(200)) {
      const which = random.below(chain.length)
      const { low, high } = FuzzMemory.wrongAddress(random, 0)
      chain[which] = {
        ...chain[which]!,
        address: low + high * 2 ** 32,
        length: 1 + random.below(0xffff_ffff),
      }
    }
    const head = good ? (availIdx * 8) % QUEUE_SIZE : random.below(QUEUE_SIZE)
    if (random.oneIn(2) && head + chain.length <= QUEUE_SIZE) {
      this.#memory.write(at + 16 * head, encode(linked(chain, head)))
    } else {
      const table = TABLES_START + 16 * random.below((TABLES_END - TABLES_START) / 16 - MAX_TABLE)
      this.#memory.write(table, encode(linked(chain)))
      const entry = { address: table, length: 16 * chain.length, flags: VIRTQ_DESC_F_INDIRECT }
      this.#memory.write(at + 16 * head, encode([entry]))
    }
    this.#memory.write16(driver + 4 + 2 * (availIdx % QUEUE_SIZE), head)
    this.#memory.write16(driver + 2, (availIdx + 1) & 0xffff)
    if (good) this.#driver.notify(queue)
  }

  /** Cuts so many bytes into up to three pieces, some of them of no bytes. */
  #cut(random: Random, length: number): { offset: number; length: number }[] {
    if (length === 0) return random.oneIn(8) ? [{ offset: 0, length: 0 }] : []
    const cuts = [random.below(length + 1), random.below(length + 1)]
      .slice(random.below(3))
      .sort((a, b) => a - b)
    return [0, ...cuts].map((offset, i) => ({ offset, length: (cuts[i] ?? length) - offset }))
  }

  /** Memory for a buffer, which never is that of rings or tables: those are the queue's matter. */
  #place(random: Random, length: number, good: boolean): { index: number; address: number } {
    const address = FuzzMemory.address(random, length)
    const index = FuzzMemory.indexOf(address, Math.max(length, 1))
    if (!good && index >= DATA_START) return { index, address: address.low + address.high * 2 ** 32 }
    const low = DATA_START + random.below(REGION_SIZE)
    return { index: low, address: low }
  }

  #accessConfig(random: Random): void {
    const offset = REGISTERS.Config + random.below(80)
    const size = random.pick([1, 2, 4] as const)
    if (random.oneIn(2)) this.#driver.read(offset, size)
    else this.#driver.write(offset, random.word() % 256 ** size, size)
  }

  /** Another vCPU writes what a device may be looking at. */
  #rewrite(random: Random): void {
    const bytes = random.bytes(random.below(64))
    this.#memory.write(DATA_START + random.below(2 * REGION_SIZE - DATA_START - 64), bytes)
  }

  #damageRings(random: Random): void {
    const at = random.below(this.#queues) * QUEUE_STRIDE
    const driver = at + 16 * QUEUE_SIZE
    if (random.oneIn(2)) this.#memory.write16(driver + 2 * random.below(QUEUE_SIZE + 3), random.below(65_536))
    else {
      const descriptor = at + 16 * random.below(QUEUE_SIZE)
      // Its flags: no other room to write than what was described.
      const flags = this.#memory.expected.getUint16(descriptor + 12, true)
      const changed = random.oneIn(2) ? VIRTQ_DESC_F_NEXT : VIRTQ_DESC_F_INDIRECT
      this.#memory.write16(descriptor + 12, flags ^ changed)
      if (random.oneIn(2)) this.#memory.write16(descriptor + 14, random.below(2 * QUEUE_SIZE))
    }
  }

  async #reset(): Promise<void> {
    this.#driver.status = 0
    const isReset = () => {
      this.#fuzzed.settle?.()
      this.#driver.clock.advance(LONG)
      return this.#driver.status === 0
    }
    await untilTrue(isReset, 'the device to be reset')
    this.#check()
    this.#writable = []
  }

  async #start(features: bigint): Promise<void> {
    await this.#reset()
    this.#memory.write(0, new Uint8Array(TABLES_START))
    this.#driver.negotiate(features)
    for (let queue = 0; queue < this.#queues; queue++) {
      const at = queue * QUEUE_STRIDE
      this.#driver.writeQueue(queue, {
        size: QUEUE_SIZE,
        descriptors: at,
        driver: at + 16 * QUEUE_SIZE,
        device: usedRing(queue),
      })
    }
    this.#driver.driverOk()
  }

  #available(queue: number): number {
    return this.#memory.expected.getUint16(queue * QUEUE_STRIDE + 16 * QUEUE_SIZE + 2, true)
  }

  #used(queue: number): number {
    this.#memory.accept(usedRing(queue), 6 + 8 * QUEUE_SIZE)
    return this.#memory.expected.getUint16(usedRing(queue) + 2, true)
  }

  #check(): void {
    expectNoFailures(this.#driver.failures)
    let areIdle = true
    for (let queue = 0; queue < this.#queues; queue++) {
      areIdle = this.#used(queue) === this.#available(queue) && areIdle
    }
    for (const { index, length } of this.#writable) this.#memory.accept(index, length)
    this.#memory.check()
    if (areIdle) this.#writable = []
  }
}

function usedRing(queue: number): number {
  return queue * QUEUE_STRIDE + 16 * QUEUE_SIZE + 0x40
}

/** A device, made anew for every run. */
export function deviceTarget(make: () => FuzzedDevice): FuzzTarget {
  const memory = new FuzzMemory()
  return { run: (operations) => new DeviceRun(memory, make()).run(operations) }
}
