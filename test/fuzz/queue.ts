import type { DescriptorChain } from '../../src/virtio/descriptor-chain.js'
import { VIRTIO_F_EVENT_IDX, VIRTIO_F_INDIRECT_DESC, VIRTIO_F_VERSION_1 } from '../../src/virtio/features.js'
import {
  REGISTERS,
  STATUS,
  VIRTQ_DESC_F_INDIRECT,
  VIRTQ_DESC_F_NEXT,
  VIRTQ_DESC_F_WRITE,
  VirtioDriver,
} from '../helpers/virtio-driver.js'
import { deviceWith } from '../virtio/devices.js'
import { type Address, DATA_START, FuzzMemory, REGION_SIZE, TABLES_END, TABLES_START } from './memory.js'
import { Malformed, type ModelChain, type ModelLayout, ModelQueue, type Stretch } from './queue-model.js'
import { Random } from './random.js'
import { expectEqual, expectNoFailures, type FuzzTarget, untilTrue } from './target.js'

const READY = STATUS.ACKNOWLEDGE | STATUS.DRIVER | STATUS.FEATURES_OK | STATUS.DRIVER_OK
const MAX_SIZE = 64
/** What the device looks at of a request, in bytes. */
const MAX_READ = 100
const MAX_WRITTEN = 300
/** What the device writes is some of these. */
const ANSWERS = new Random(1).bytes(2000)

interface Descriptor {
  readonly address: Address
  readonly length: number
  readonly flags: number
  readonly next: number
}

/** What the device does with a request. */
interface Plan {
  readonly length: number
  readonly answer: number
  readonly isLater: boolean
}

function planOf(nth: number): Plan {
  const random = new Random(nth)
  return {
    length: random.oneIn(4) ? 0 : random.below(MAX_WRITTEN),
    answer: random.below(ANSWERS.length - MAX_WRITTEN),
    isLater: random.oneIn(3),
  }
}

function digest(head: number, lengths: readonly [number, number], bytes: Uint8Array): number {
  let hash = head ^ Math.imul(lengths[0], 31) ^ Math.imul(lengths[1], 1009)
  for (const byte of bytes) hash = Math.imul(hash ^ byte, 0x0100_0193)
  return hash
}

/** A request that takes longer. */
interface Held {
  readonly plan: Plan
  readonly chain: DescriptorChain
  readonly resolve: (written: number) => void
}

interface ModelHeld {
  readonly plan: Plan
  readonly chain: ModelChain
  readonly queue: ModelQueue
}

/** A queue, beside a model of one in a copy of RAM: after every operation both have to be the same. */
class QueueRun {
  readonly #memory: FuzzMemory
  readonly #driver: VirtioDriver
  readonly #held: Held[] = []
  readonly #seen: number[] = []
  // What the model has come to.
  readonly #modelHeld: ModelHeld[] = []
  readonly #modelSeen: number[] = []
  #queue!: ModelQueue
  #status = 0
  #interrupts = 0

  constructor(memory: FuzzMemory) {
    this.#memory = memory
    memory.clear()
    const device = deviceWith([{ maxSize: MAX_SIZE, handle: (chain) => this.#handle(chain) }])
    this.#driver = new VirtioDriver(device, { memory: memory.memory })
  }

  async run(operations: readonly number[]): Promise<void> {
    this.#start(new Random(operations.length))
    for (const operation of operations) {
      const random = new Random(operation)
      if (this.#status !== READY) this.#start(random)
      else await this.#operate(random)
      this.#check()
    }
    await this.#end()
  }

  async #operate(random: Random): Promise<void> {
    const { layout } = this.#queue
    const sort = random.below(200)
    if (sort < 90) this.#add(random)
    else if (sort < 140) this.#notify(random.oneIn(2))
    else if (sort < 180) await this.#finish(random)
    else if (sort < 186) this.#memory.write16(layout.driver, random.below(2))
    else if (sort < 192) {
      const usedIdx = this.#memory.expected.getUint16(layout.device + 2, true)
      this.#memory.write16(layout.driver + 4 + 2 * layout.size, (usedIdx + random.below(8) - 2) & 0xffff)
    } else if (sort < 198) {
      const bytes = random.bytes(random.below(200))
      this.#memory.write(DATA_START + random.below(2 * REGION_SIZE - DATA_START - bytes.length), bytes)
    } else if (sort === 198) this.#damage(random)
    else this.#start(random)
  }

  /** Makes a chain available: a good one, but for a rare descriptor. */
  #add(random: Random): void {
    const { layout, room } = this.#queue
    // One too many is for damage().
    if (room === 0) {
      this.#notify(false)
      return
    }
    const { size, descriptors, driver } = layout
    const isIndirect = random.oneIn(3)
    const direct = Math.min(size, isIndirect ? 1 + random.below(2) : 1 + random.below(5))
    const inTable = isIndirect ? 1 + random.below(8) : 0
    const count = direct - (isIndirect ? 1 : 0) + inTable
    const readable = random.below(count + 1)
    const head = random.below(size)
    const table = TABLES_START + random.below(TABLES_END - TABLES_START - 16 * inTable)
    let nth = 0
    for (let i = 0; i < direct; i++) {
      const at = descriptors + 16 * ((head + i) % size)
      const isLast = i === direct - 1
      if (isLast && isIndirect) {
        const address = { low: table, high: 0 }
        this.#descriptor(
          random,
          at,
          { address, length: 16 * inTable, flags: VIRTQ_DESC_F_INDIRECT, next: 0 },
          size,
        )
      } else {
        this.#buffer(random, at, nth++ >= readable, isLast ? -1 : (head + i + 1) % size, size)
      }
    }
    for (let i = 0; i < inTable; i++) {
      this.#buffer(random, table + 16 * i, nth++ >= readable, i === inTable - 1 ? -1 : i + 1, inTable)
    }
    const availIdx = this.#memory.expected.getUint16(driver + 2, true)
    this.#memory.write16(driver + 4 + 2 * (availIdx % size), head)
    this.#memory.write16(driver + 2, (availIdx + 1) & 0xffff)
  }

  /** @param next - below 0 for none */
  #buffer(random: Random, at: number, isWritable: boolean, next: number, tableSize: number): void {
    const length = random.pick([0, random.below(64), random.below(64), random.below(600)])
    const flags = (isWritable ? VIRTQ_DESC_F_WRITE : 0) | (next >= 0 ? VIRTQ_DESC_F_NEXT : 0)
    const address = FuzzMemory.address(random, length)
    this.#descriptor(random, at, { address, length, flags, next: Math.max(next, 0) }, tableSize)
  }

  /** Writes a descriptor, now and then a damaged one. @param tableSize - descriptors in its table */
  #descriptor(random: Random, at: number, good: Descriptor, tableSize: number): void {
    const { address, length, flags, next } = random.oneIn(150) ? damaged(random, good, tableSize) : good
    this.#memory.writeDescriptor(at, address, length, flags, next)
  }

  /** Writes where a driver has no business, or what it must not. */
  #damage(random: Random): void {
    const { room, layout } = this.#queue
    const { size, descriptors, driver, device } = layout
    const slot = random.below(size)
    const value = random.below(65_536)
    const kind = random.below(6)
    if (kind === 0) this.#memory.write16(driver + 2, value)
    else if (kind === 1) {
      // As far as it may go, or a little more.
      const availIdx = this.#memory.expected.getUint16(driver + 2, true)
      this.#memory.write16(driver + 2, (availIdx + room + random.below(3)) & 0xffff)
    } else if (kind === 2) this.#memory.write16(driver + 4 + 2 * slot, size + random.below(3) - 1)
    else if (kind === 3) this.#memory.write16(driver + 4 + 2 * slot, value)
    else if (kind === 4) this.#memory.write16(descriptors + 16 * slot + 2 * random.below(8), value)
    else this.#memory.write16(device + 2 * random.below(3 + 4 * size), value)
  }

  #notify(byDoorbell: boolean): void {
    if (byDoorbell) this.#driver.doorbells[0]!.ring()
    else this.#driver.write(REGISTERS.QueueNotify, 0)
    this.#modelServe()
  }

  /** Lets the device end a request that takes longer. */
  async #finish(random: Random): Promise<void> {
    if (this.#held.length !== this.#modelHeld.length)
      throw new Error('Expected as many requests as the model has')
    if (this.#held.length === 0) return
    const which = random.below(this.#held.length)
    const [{ chain, plan, resolve }] = this.#held.splice(which, 1) as [Held]
    resolve(chain.write(answerOf(plan, chain.writable.length)))
    // The promise is settled, then looked at.
    await undefined
    await undefined
    this.#modelFinish(which)
  }

  /** Resets the device, and makes it ready in another way. */
  #start(random: Random): void {
    const driver = this.#driver
    driver.status = 0
    const size = random.pick([1, 2, 4, 8, 16, MAX_SIZE])
    const layout: ModelLayout = {
      size,
      descriptors: 16 * random.below(64),
      driver: 0x800 + 2 * random.below(128),
      device: 0x1000 + 4 * random.below(128),
    }
    this.#memory.write(0, new Uint8Array(TABLES_START))
    const eventIdx = random.oneIn(2)
    const others = random.oneIn(2) ? VIRTIO_F_INDIRECT_DESC : 0n
    driver.negotiate(VIRTIO_F_VERSION_1 | others | (eventIdx ? VIRTIO_F_EVENT_IDX : 0n))
    driver.writeQueue(0, layout)
    driver.driverOk()
    this.#status = READY
    this.#queue = new ModelQueue(this.#memory, layout, eventIdx, {
      handle: (chain) => this.#modelHandle(chain),
      interrupt: () => {
        this.#interrupts++
      },
    })
    this.#modelServe()
  }

  #handle(chain: DescriptorChain): number | Promise<number> {
    const plan = planOf(this.#seen.length)
    const { readable, writable } = chain
    this.#seen.push(digest(chain.head, [readable.length, writable.length], chain.read(MAX_READ)))
    if (!plan.isLater) return chain.write(answerOf(plan, writable.length))
    return new Promise((resolve) => this.#held.push({ plan, chain, resolve }))
  }

  #modelServe(): void {
    // Requests of before a reset come to their end first.
    if (this.#status !== READY || this.#modelHeld.some(({ queue }) => queue !== this.#queue)) return
    try {
      this.#queue.serve()
    } catch (error) {
      if (!(error instanceof Malformed)) throw error
      this.#status |= STATUS.DEVICE_NEEDS_RESET
      this.#interrupts++
    }
  }

  #modelHandle(chain: ModelChain): number | undefined {
    const plan = planOf(this.#modelSeen.length)
    const { head, readable, writable } = chain
    const lengths = [sum(readable), sum(writable)] as const
    const bytes = new Uint8Array(Math.min(lengths[0], MAX_READ))
    let done = 0
    for (const { index, length } of readable) {
      const size = Math.min(length, bytes.length - done)
      bytes.set(this.#memory.expectedBytes.subarray(index, index + size), done)
      done += size
    }
    this.#modelSeen.push(digest(head, lengths, bytes))
    if (!plan.isLater) return this.#modelWrite(chain, plan)
    this.#modelHeld.push({ plan, chain, queue: this.#queue })
    return undefined
  }

  #modelWrite({ writable }: ModelChain, plan: Plan): number {
    const bytes = answerOf(plan, sum(writable))
    let done = 0
    for (const { index, length } of writable) {
      const size = Math.min(length, bytes.length - done)
      this.#memory.expectedBytes.set(bytes.subarray(done, done + size), index)
      done += size
    }
    return done
  }

  #modelFinish(which: number): void {
    const [{ chain, plan, queue }] = this.#modelHeld.splice(which, 1) as [ModelHeld]
    const written = this.#modelWrite(chain, plan)
    // What is left of a reset goes nowhere; the last of it lets the queue be served.
    if (queue !== this.#queue || queue.finish(chain, written)) this.#modelServe()
  }

  #check(): void {
    expectNoFailures(this.#driver.failures)
    expectEqual(this.#driver.status, this.#status, 'the status')
    expectEqual(this.#driver.interrupts, this.#interrupts, 'the number of interrupts')
    expectEqual(this.#seen.length, this.#modelSeen.length, 'the number of requests')
    const last = this.#seen.length - 1
    expectEqual(this.#seen[last], this.#modelSeen[last], 'what the device saw of the last request')
    this.#memory.check()
  }

  async #end(): Promise<void> {
    while (this.#held.length > 0) {
      await this.#finish(new Random(0))
      this.#check()
    }
    this.#driver.status = 0
    await untilTrue(() => this.#driver.status === 0, 'the device to be reset')
  }
}

function damaged(random: Random, good: Descriptor, tableSize: number): Descriptor {
  switch (random.below(6)) {
    case 0:
      return { ...good, address: FuzzMemory.wrongAddress(random, random.below(32)) }
    case 1:
      return { ...good, length: random.pick([0, 1, 17, 0xffff_fff0, 0xffff_ffff, random.word()]) }
    case 2:
      return { ...good, flags: random.below(random.oneIn(2) ? 8 : 65_536) }
    case 3:
      return { ...good, next: random.below(65_536) }
    case 4:
      return { ...good, flags: good.flags | VIRTQ_DESC_F_NEXT, next: tableSize + random.below(3) - 1 }
    default: {
      // A table in a table, or one that is as long as it may be, or longer.
      const length = 16 * random.pick([1, 2, 1023, 1024, 1025])
      return { ...good, address: { low: TABLES_START, high: 0 }, length, flags: VIRTQ_DESC_F_INDIRECT }
    }
  }
}

function answerOf({ length, answer }: Plan, room: number): Uint8Array {
  return ANSWERS.subarray(answer, answer + Math.min(length, room))
}

function sum(stretches: readonly Stretch[]): number {
  return stretches.reduce((total, { length }) => total + length, 0)
}

/** The queue alone: mostly good chains, over all of RAM and its edges, with rare damage everywhere. */
export function queueTarget(): FuzzTarget {
  const memory = new FuzzMemory()
  return { run: (operations) => new QueueRun(memory).run(operations) }
}
