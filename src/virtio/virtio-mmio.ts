import type { AccessSize, Device, DeviceHost, DeviceState, MmioRange } from '../bus/device.js'
import { StateReader } from '../devices/state.js'
import type { VirtioDevice } from './virtio-device.js'
import { VirtioFunction } from './virtio-function.js'

// VIRTIO 1.2, 4.2.2: MMIO Device Register Layout
const MagicValue = 0x000
const Version = 0x004
const DeviceID = 0x008
const VendorID = 0x00c
const DeviceFeatures = 0x010
const DeviceFeaturesSel = 0x014
const DriverFeatures = 0x020
const DriverFeaturesSel = 0x024
const QueueSel = 0x030
const QueueNumMax = 0x034
const QueueNum = 0x038
const QueueReady = 0x044
const QueueNotify = 0x050
const InterruptStatus = 0x060
const InterruptACK = 0x064
const Status = 0x070
/** QueueDescLow, QueueDescHigh, QueueDriverLow, QueueDriverHigh, QueueDeviceLow and QueueDeviceHigh. */
const QueueAddresses: readonly number[] = [0x080, 0x084, 0x090, 0x094, 0x0a0, 0x0a4]
const ConfigGeneration = 0x0fc
const Config = 0x100

/** "virt". */
const MAGIC = 0x74726976
const VERSION = 2
/** "NDVR", little-endian. */
const VENDOR = 0x5256444e

const INTERRUPT_USED_BUFFER = 1
const INTERRUPT_CONFIGURATION_CHANGE = 2

/** What is nowhere reads as all ones: of whole accesses as of registers, and of SHMLen for memory that is not there. */
const NOTHING = 0xffff_ffff
const REGISTER_SIZE = 4

/** Bytes of registers of one device. */
export const VIRTIO_MMIO_SIZE = 0x1000

/**
 * The virtio-mmio transport, version 2 (VIRTIO 1.2, 4.2): a virtio device as registers in memory.
 *
 * Control registers are of 32 bits, accessed as such; other accesses have no effect (4.2.2.2).
 */
export class VirtioMmio implements Device {
  readonly name: string
  readonly mmio: MmioRange
  readonly irq: number
  readonly function: VirtioFunction
  #host: DeviceHost | undefined
  #deviceFeaturesSel = 0
  #driverFeaturesSel = 0
  #queueSel = 0
  #interruptStatus = 0
  /** Take back what was asked of the host for the driver's doorbells. */
  #silencers: (() => void)[] = []

  /**
   * @param base - guest-physical address of the registers, a multiple of 4 KiB
   * @param irq - the line, by global system interrupt: an edge for each notification
   */
  constructor(device: VirtioDevice, base: number, irq: number) {
    this.function = new VirtioFunction(device)
    this.name = device.name
    this.mmio = { base, length: VIRTIO_MMIO_SIZE }
    this.irq = irq
  }

  attach(host: DeviceHost): void {
    this.#host = host
    this.function.attach({
      memory: host.memory,
      clock: host.clock,
      queueInterrupt: () => this.#interrupt(INTERRUPT_USED_BUFFER),
      configInterrupt: () => this.#interrupt(INTERRUPT_CONFIGURATION_CHANGE),
      started: (queues) => this.#hang(queues),
      stopped: () => this.#stopped(),
      yield: () => host.yield(),
      fail: (error) => host.fail(error),
    })
  }

  read(offset: number, size: AccessSize): number {
    if (offset >= Config) return this.#readConfig(offset, size)
    if (size !== REGISTER_SIZE || offset % REGISTER_SIZE !== 0) return NOTHING
    const setup = this.function.setup(this.#queueSel)
    switch (offset) {
      case MagicValue:
        return MAGIC
      case Version:
        return VERSION
      case DeviceID:
        return this.function.device.deviceType
      case VendorID:
        return VENDOR
      case DeviceFeatures:
        return Number((this.function.offered >> BigInt(32 * this.#deviceFeaturesSel)) & 0xffff_ffffn)
      case QueueNumMax:
        return setup?.maxSize ?? 0
      case QueueReady:
        return setup?.ready ? 1 : 0
      case InterruptStatus:
        return this.#interruptStatus
      case Status:
        return this.function.status
      case ConfigGeneration:
        return this.function.configGeneration
      default:
        return NOTHING
    }
  }

  write(offset: number, value: number, size: AccessSize): void {
    if (offset >= Config) {
      if (offset % size === 0) this.function.writeConfig(offset - Config, value, size)
      return
    }
    if (size !== REGISTER_SIZE || offset % REGISTER_SIZE !== 0) return
    switch (offset) {
      case DeviceFeaturesSel:
        // Beyond the last feature there are none, however far.
        this.#deviceFeaturesSel = Math.min(value, 4)
        break
      case DriverFeatures:
        this.function.writeFeatures(this.#driverFeaturesSel, value)
        break
      case DriverFeaturesSel:
        this.#driverFeaturesSel = value
        break
      case QueueSel:
        this.#queueSel = value
        break
      case QueueReady:
        this.function.writeReady(this.#queueSel, (value & 1) !== 0)
        break
      case QueueNotify:
        this.function.notify(value)
        break
      case InterruptACK:
        this.#interruptStatus &= ~value
        break
      case Status:
        this.function.writeStatus(value)
        break
      default:
        this.#writeSetup(offset, value)
    }
  }

  saveState(): DeviceState {
    return {
      deviceFeaturesSel: this.#deviceFeaturesSel,
      driverFeaturesSel: this.#driverFeaturesSel,
      queueSel: this.#queueSel,
      interruptStatus: this.#interruptStatus,
      function: this.function.saveState(),
    }
  }

  restoreState(state: DeviceState): void {
    const reader = new StateReader(this.name, state)
    const deviceFeaturesSel = reader.uint('deviceFeaturesSel', 4)
    const driverFeaturesSel = reader.uint('driverFeaturesSel', 0xffff_ffff)
    const queueSel = reader.uint('queueSel', 0xffff_ffff)
    const interruptStatus = reader.uint('interruptStatus', 3)
    this.function.restoreState(reader.value('function'))
    this.#deviceFeaturesSel = deviceFeaturesSel
    this.#driverFeaturesSel = driverFeaturesSel
    this.#queueSel = queueSel
    // Requests that waited may be served by now, and have set it.
    this.#interruptStatus |= interruptStatus
  }

  #readConfig(offset: number, size: AccessSize): number {
    if (offset % size !== 0) return NOTHING
    return this.function.readConfig(offset - Config, size) ?? NOTHING
  }

  #writeSetup(offset: number, value: number): void {
    const setup = this.function.changeableSetup(this.#queueSel)
    if (setup === undefined) return
    const half = QueueAddresses.indexOf(offset)
    if (offset === QueueNum) setup.size = value
    else if (half >= 0) setup.addresses[half] = value
  }

  /** The bit is there before the edge: the handler looks at it first (4.2.3.5). */
  #interrupt(cause: number): void {
    this.#interruptStatus |= cause
    this.#host!.interrupt.trigger()
  }

  #hang(queues: readonly number[]): void {
    this.#silencers = queues.map((queue) =>
      this.#host!.doorbell({ region: 0, offset: QueueNotify, size: REGISTER_SIZE, value: queue }, () =>
        this.function.notify(queue),
      ),
    )
  }

  #stopped(): void {
    this.#interruptStatus = 0
    for (const silence of this.#silencers.splice(0)) silence()
  }
}
