import type { AccessSize } from '../../src/bus/device.js'
import type { DescriptorChain } from '../../src/virtio/descriptor-chain.js'
import type { VirtioDevice, VirtioDriver as VirtioDriverOfDevice } from '../../src/virtio/virtio-device.js'
import type { Virtqueue } from '../../src/virtio/virtqueue.js'
import { REGISTERS, STATUS, VirtioDriver } from '../helpers/virtio-driver.js'
import { answer } from '../virtio/devices.js'
import { DATA_START, FuzzMemory, REGION_SIZE } from './memory.js'
import { Random } from './random.js'
import { expectEqual, expectNoFailures, type FuzzTarget, untilTrue } from './target.js'

const OFFSETS = Object.values(REGISTERS)
const QUEUES = 3
const MAX_SIZE = 16
const QUEUE_REGISTERS = [
  REGISTERS.QueueSel,
  REGISTERS.QueueNum,
  REGISTERS.QueueReady,
  REGISTERS.QueueDescLow,
  REGISTERS.QueueDescHigh,
  REGISTERS.QueueDriverLow,
  REGISTERS.QueueDriverHigh,
  REGISTERS.QueueDeviceLow,
  REGISTERS.QueueDeviceHigh,
] as const

/** Each bit is only there with those before it (VIRTIO 1.2, 3.1.1). */
const STEPS = [STATUS.ACKNOWLEDGE, STATUS.DRIVER, STATUS.FEATURES_OK, STATUS.DRIVER_OK] as const

/** A request that takes longer. */
interface Held {
  readonly chain: DescriptorChain
  readonly resolve: (written: number) => void
}

interface Part {
  readonly index: number
  readonly length: number
}

/** A device under accesses of any kind to its registers, among them those of a good driver. */
class TransportRun {
  readonly #memory: FuzzMemory
  readonly #driver: VirtioDriver
  readonly #held: Held[] = []
  /** Used rings of the queues that are in use. */
  #rings: readonly Part[] = []
  /** How the queues were set up when the driver was ready. */
  #setups = ''
  #started: VirtioDriverOfDevice | undefined

  constructor(memory: FuzzMemory) {
    this.#memory = memory
    memory.clear()
    this.#driver = new VirtioDriver(this.#device(), { memory: memory.memory })
  }

  #device(): VirtioDevice {
    const accepted = (chain: DescriptorChain): number => {
      const written = answer(chain)
      this.#accept(chain)
      return written
    }
    const config = new Uint8Array(12)
    return {
      name: 'fuzzed',
      deviceType: 0x3f,
      features: 0b101n,
      config,
      queues: [
        { maxSize: MAX_SIZE, handle: accepted },
        {
          maxSize: MAX_SIZE,
          handle: (chain) => new Promise((resolve) => this.#held.push({ chain, resolve })),
        },
        {
          maxSize: MAX_SIZE,
          available(queue: Virtqueue) {
            for (let chain = queue.pop(); chain !== undefined; chain = queue.pop()) {
              queue.push(chain, accepted(chain))
            }
            queue.notify()
            queue.wantNotifications()
          },
        },
      ],
      writeConfig: (offset, value) => {
        config[offset] = value
        this.#started?.configChanged()
      },
      start: (driver) => {
        this.#started = driver
        this.#rings = this.#usedRings()
        this.#setups = this.#describeSetups()
      },
      reset: () => {
        this.#started = undefined
        this.#rings = []
      },
      saveState: () => ({ lamp: 'on' }),
    }
  }

  async run(operations: readonly number[]): Promise<void> {
    for (const operation of operations) {
      await this.#operate(new Random(operation))
      this.#check()
    }
    while (this.#held.length > 0) await this.#finish(new Random(0))
    this.#driver.status = 0
    await untilTrue(() => this.#driver.status === 0, 'the device to be reset')
  }

  async #operate(random: Random): Promise<void> {
    const sort = random.below(100)
    if (sort < 20) this.#write(random, random.pick(OFFSETS), 4)
    else if (sort < 40) this.#write(random, random.pick(QUEUE_REGISTERS), 4)
    else if (sort < 50) this.#write(random, random.below(0x1000), random.pick([1, 2, 4]))
    else if (sort < 60) this.#readOne(random)
    else if (sort < 68) this.#nextStep()
    else if (sort < 73) this.#initialize(random)
    else if (sort < 85) this.#notify(random)
    else if (sort < 90) await this.#finish(random)
    else if (sort < 97) this.#writeMemory(random)
    else if (sort === 97) this.#started?.configChanged()
    else if (sort === 98) this.#saveAndRestore()
    else this.#started?.needsReset('it is time')
  }

  #write(random: Random, offset: number, size: AccessSize): void {
    const before = this.#driver.status
    const value = registerValue(random) % 256 ** size
    this.#driver.write(offset, value, size)
    const isReset = offset === REGISTERS.Status && size === 4 && (value & 0xff) === 0
    // Between a reset and the end of the requests of before it, the status is of neither.
    if (!isReset && before !== STATUS.DEVICE_NEEDS_RESET) {
      expectEqual(this.#driver.status & before, before, 'what is left of the status')
    }
  }

  #readOne(random: Random): void {
    const offset = random.oneIn(2) ? random.pick(OFFSETS) : random.below(0x1000)
    const value = this.#driver.read(offset, random.pick([1, 2, 4]))
    if (!Number.isInteger(value) || value < 0 || value > 0xffff_ffff) {
      throw new Error(`Expected 32 bits at ${offset} but read ${value}`)
    }
  }

  /** What a driver does next that keeps to the rules. */
  #nextStep(): void {
    const { status } = this.#driver
    const step = STEPS.find((bit) => (status & bit) === 0)
    if (step === STATUS.FEATURES_OK) this.#driver.negotiate()
    else this.#driver.status = status | (step ?? 0)
  }

  #initialize(random: Random): void {
    const driver = this.#driver
    driver.status = 0
    driver.negotiate()
    for (let index = 0; index < QUEUES; index++) {
      const start = 0x800 * index + 16 * random.below(16)
      this.#memory.write(start, new Uint8Array(0x700))
      const places = [start, start + 0x200, start + 0x400] as [number, number, number]
      if (random.oneIn(4)) places[random.below(3)] = start + random.below(0x600)
      const [descriptors, ring, device] = places
      driver.writeQueue(index, { size: random.pick([1, 2, 8, MAX_SIZE]), descriptors, driver: ring, device })
    }
    if (!random.oneIn(8)) driver.driverOk()
  }

  #notify(random: Random): void {
    const { doorbells } = this.#driver
    if (doorbells.length > 0 && random.oneIn(2)) random.pick(doorbells).ring()
    else this.#driver.write(REGISTERS.QueueNotify, random.below(QUEUES + 1))
  }

  async #finish(random: Random): Promise<void> {
    if (this.#held.length === 0) return
    const [{ chain, resolve }] = this.#held.splice(random.below(this.#held.length), 1) as [Held]
    resolve(answer(chain))
    this.#accept(chain)
    await undefined
    await undefined
  }

  /** Chains, now and then: rings are anywhere in the first part of RAM. */
  #writeMemory(random: Random): void {
    const queue = random.below(QUEUES)
    const setup = this.#driver.transport.function.setup(queue)!
    const [descriptors, driver] = [setup.addresses[0]!, setup.addresses[2]!]
    if (setup.ready && setup.addresses[1] === 0 && setup.addresses[3] === 0) {
      const head = random.below(setup.size)
      const address = FuzzMemory.address(random, 64)
      this.#memory.writeDescriptor(
        descriptors + 16 * head,
        address,
        64,
        random.below(3),
        random.below(MAX_SIZE),
      )
      const availIdx = this.#memory.expected.getUint16(driver + 2, true)
      this.#memory.write16(driver + 4 + 2 * (availIdx % setup.size), head)
      this.#memory.write16(driver + 2, (availIdx + 1) & 0xffff)
    } else {
      this.#memory.write(random.below(2 * REGION_SIZE - 64), random.bytes(64))
    }
  }

  #saveAndRestore(): void {
    const { transport } = this.#driver
    try {
      transport.restoreState(structuredClone(transport.saveState()))
    } catch (error) {
      if ((error as { code?: string }).code !== 'ERR_RUNNING') throw error
    }
  }

  /** @throws for a queue that is ready but must not be (2.7) */
  #usedRings(): Part[] {
    const { function: virtio } = this.#driver.transport
    return Array.from({ length: QUEUES }, (_, index) => virtio.setup(index)!)
      .filter(({ ready }) => ready)
      .map(({ size, addresses }) => {
        const part = (at: number, length: number, alignment: number): Part => {
          const address = { low: addresses[at]!, high: addresses[at + 1]! }
          const index = FuzzMemory.indexOf(address, length)
          if (index < 0 || address.low % alignment !== 0)
            throw new Error('Expected a ring in RAM, and aligned')
          return { index, length }
        }
        const parts = [part(0, 16 * size, 16), part(2, 6 + 2 * size, 2), part(4, 6 + 8 * size, 4)] as const
        const inOrder = [...parts].sort((a, b) => a.index - b.index)
        for (const [i, { index, length }] of inOrder.entries()) {
          if (index + length > (inOrder[i + 1]?.index ?? Number.POSITIVE_INFINITY)) {
            throw new Error('Expected rings that do not overlap')
          }
        }
        return parts[2]
      })
  }

  #describeSetups(): string {
    const { function: virtio } = this.#driver.transport
    return [0, 1, 2].map((index) => Object.values(virtio.setup(index)!).join()).join(';')
  }

  /** The device has written into a chain. */
  #accept({ writable }: DescriptorChain): void {
    for (const view of writable.views()) this.#memory.accept(this.#memory.indexOfView(view), view.length)
  }

  #check(): void {
    const driver = this.#driver
    expectNoFailures(driver.failures)
    const { status } = driver
    const steps = STEPS.map((bit) => (status & bit) !== 0)
    expectEqual(steps.lastIndexOf(true) + 1, steps.filter(Boolean).length, 'the number of steps')
    expectEqual(driver.interruptStatus & ~3, 0, 'unknown causes of interrupts')
    const isReady = (status & STATUS.DRIVER_OK) !== 0
    expectEqual(this.#started !== undefined, isReady, 'whether the device is started')
    if (isReady) expectEqual(this.#describeSetups(), this.#setups, 'the set-up of queues')
    expectEqual(driver.doorbells.length, isReady ? this.#rings.length : 0, 'the number of doorbells')
    for (const { index, length } of this.#rings) this.#memory.accept(index, length)
    this.#memory.check()
  }
}

function registerValue(random: Random): number {
  switch (random.below(8)) {
    case 0:
      return 0
    case 1:
      return 2 ** random.below(32)
    case 2:
      return random.pick([0xffff_ffff, 0x7fff_ffff, 0x8000_0000, 65_535, 65_536])
    case 3:
      return random.word()
    case 4:
      return 16 * random.below(0x900)
    case 5:
      return DATA_START + 4 * random.below(0x2000)
    default:
      return random.below(20)
  }
}

/** The registers of virtio-mmio, with a small device behind them. */
export function transportTarget(): FuzzTarget {
  const memory = new FuzzMemory()
  return { run: (operations) => new TransportRun(memory).run(operations) }
}
