import type { Device, DeviceState } from '../bus/device.js'
import { IO_APIC_RANGE, IoApic } from '../devices/io-apic.js'
import { PIC_PORTS, Pic } from '../devices/pic.js'
import { PIT_PORTS, Pit } from '../devices/pit.js'
import { StateReader } from '../devices/state.js'
import { type ExternalInterrupts, VectorQueue } from '../interrupts/external-interrupts.js'
import { IrqLines } from '../interrupts/irq-lines.js'
import { type GsiRoute, IRQCHIP_SIZE, PIT_STATE2_SIZE, type Vm } from '../kvm/vm.js'
import { LOCAL_APIC_ADDRESS, PAGE_SIZE } from '../memory/layout.js'
import { CASCADE_IRQ, IO_APIC_PINS, ISA_IRQS, ioApicPin } from '../wiring.js'

/**
 * Where a machine's interrupt controllers are: `full` has all of them in KVM; `split` has the local APICs there and
 * PIC, IOAPIC and PIT as devices; `none` has none.
 */
export type Irqchip = 'full' | 'split' | 'none'

/** A machine's interrupt controllers, wherever they are. */
export interface Interrupts {
  readonly irqchip: Irqchip
  /** The wires that devices interrupt through; none without an irqchip. */
  readonly lines: IrqLines | undefined
  /** Controllers that are devices. */
  readonly devices: readonly Device[]
  /** What interrupts a vCPU past its local APIC. */
  externalOf(index: number): ExternalInterrupts | undefined
  /** Called when {@link externalOf} a vCPU begins to be pending: it may be in the guest. */
  onExternal: (index: number) => void
  /** A local APIC has ended a level-triggered interrupt. */
  endOfInterrupt(vector: number): void
  /** Interrupts a vCPU with a vector, from outside. */
  interrupt(index: number, apicId: number, vector: number): void
  /** What of the controllers is no device's state, as plain data. */
  saveState(): DeviceState
  /** Takes what {@link saveState} gave, once devices and local APICs have theirs. */
  restoreState(state: DeviceState): void
  /** From now on wires lead nowhere: the VM is about to be closed. */
  close(): void
}

/** KVM_IRQCHIP_*. */
const KVM_IRQCHIP_PIC_MASTER = 0
const KVM_IRQCHIP_PIC_SLAVE = 1
const KVM_IRQCHIP_IOAPIC = 2
const CHIPS = [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC] as const
/** What states are called in errors. */
const INTERRUPTS = 'the interrupt controllers'
const VECTORS = 256
/** vCPUs that may have vectors waiting. */
const MAX_QUEUES = 0xffff
const PIC_INPUTS = 8
/** KVM_PIT_SPEAKER_DUMMY: port 0x61 is KVM's, too. */
const KVM_PIT_SPEAKER_DUMMY = 1
/** Where INTR of the PIC goes. */
const BOOT_VCPU = 0
const MSI_DESTINATION_SHIFT = 12
/** The part of an id that a message has always had room for; the rest is in the upper half of its address. */
const XAPIC_ID_MASK = 0xff
const MAX_XAPIC_ID = 0xfe
/** KVM_X2APIC_API_USE_32BIT_IDS and _DISABLE_BROADCAST_QUIRK. */
const X2APIC_API_FLAGS = 3n

/** Makes the interrupt controllers of a VM that has no vCPU yet. @param apicIds - of the vCPUs to be */
export function createInterrupts(irqchip: Irqchip, vm: Vm, apicIds: readonly number[]): Interrupts {
  if (irqchip !== 'none' && apicIds.some((id) => id > MAX_XAPIC_ID)) {
    vm.enableCap('X2APIC_API', [X2APIC_API_FLAGS])
  }
  switch (irqchip) {
    case 'none':
      return new NoIrqchip()
    case 'full':
      return new FullIrqchip(vm)
    case 'split':
      return new SplitIrqchip(vm)
  }
}

/** An interrupt for one local APIC, as a message: fixed, edge-triggered. */
function signalVector(vm: Vm, apicId: number, vector: number): void {
  const low = (apicId & XAPIC_ID_MASK) << MSI_DESTINATION_SHIFT
  const high = (apicId & ~XAPIC_ID_MASK) * 2 ** 32
  vm.signalMsi(LOCAL_APIC_ADDRESS + low + high, vector)
}

class NoIrqchip implements Interrupts {
  readonly irqchip = 'none'
  readonly lines = undefined
  readonly devices: readonly Device[] = []
  onExternal: (index: number) => void = () => {}
  readonly #queues = new Map<number, VectorQueue>()

  externalOf(index: number): VectorQueue {
    const queue = this.#queues.get(index) ?? new VectorQueue()
    this.#queues.set(index, queue)
    return queue
  }

  endOfInterrupt(): void {}

  interrupt(index: number, _apicId: number, vector: number): void {
    this.externalOf(index).push(vector)
    this.onExternal(index)
  }

  /** Vectors that wait, for each vCPU. */
  saveState(): DeviceState {
    return { queues: [...this.#queues].map(([index, queue]) => ({ index, waiting: queue.waiting })) }
  }

  restoreState(state: DeviceState): void {
    const saved = new StateReader(INTERRUPTS, state)
    const queues = saved.objects('queues', MAX_QUEUES).map((queue) => ({
      index: queue.uint('index', MAX_QUEUES),
      waiting: queue.uintsUpTo('waiting', VECTORS, VECTORS - 1),
    }))
    for (const queue of this.#queues.values()) queue.clear()
    for (const { index, waiting } of queues) for (const vector of waiting) this.externalOf(index).push(vector)
  }

  close(): void {}
}

/** What KVM answers itself: no other device may be there, and no access gets here. */
const LOCAL_APIC: Device = { name: 'local-apic', mmio: { base: LOCAL_APIC_ADDRESS, length: PAGE_SIZE } }

class FullIrqchip implements Interrupts {
  readonly irqchip = 'full'
  readonly lines: IrqLines
  readonly devices: readonly Device[] = [
    LOCAL_APIC,
    { name: 'pic', ports: PIC_PORTS },
    { name: 'io-apic', mmio: IO_APIC_RANGE },
    { name: 'pit', ports: PIT_PORTS },
  ]
  onExternal: (index: number) => void = () => {}
  readonly #vm: Vm
  #closed = false

  constructor(vm: Vm) {
    this.#vm = vm
    vm.createIrqchip()
    vm.setGsiRouting(pcRoutes())
    vm.createPit2(KVM_PIT_SPEAKER_DUMMY)
    this.lines = new IrqLines(IO_APIC_PINS, (gsi, asserted) => {
      if (!this.#closed) vm.irqLine(gsi, asserted)
    })
  }

  externalOf(): undefined {}

  endOfInterrupt(): void {}

  interrupt(_index: number, apicId: number, vector: number): void {
    signalVector(this.#vm, apicId, vector)
  }

  saveState(): DeviceState {
    return { chips: CHIPS.map((chip) => this.#vm.getIrqchip(chip)), pit: this.#vm.getPit2() }
  }

  restoreState(state: DeviceState): void {
    const saved = new StateReader(INTERRUPTS, state)
    const pit = saved.bytes('pit', PIT_STATE2_SIZE, PIT_STATE2_SIZE)
    const chips = saved.byteLists('chips', CHIPS.length, IRQCHIP_SIZE)
    for (const [index, chip] of chips.entries()) {
      // Which chip it is the struct says itself.
      new DataView(chip.buffer).setUint32(0, CHIPS[index]!, true)
      this.#vm.setIrqchip(chip)
    }
    this.#vm.setPit2(pit)
  }

  close(): void {
    this.#closed = true
  }
}

/** KVM's own routes have the PIT on input 0 of the IOAPIC; on a PC it is on input 2, and 2 is no line. */
function pcRoutes(): GsiRoute[] {
  return Array.from({ length: IO_APIC_PINS }, (_, gsi): GsiRoute[] => {
    if (gsi === CASCADE_IRQ) return []
    const ioApic = { gsi, irqchip: KVM_IRQCHIP_IOAPIC, pin: ioApicPin(gsi) }
    if (gsi >= ISA_IRQS) return [ioApic]
    const chip = gsi < PIC_INPUTS ? KVM_IRQCHIP_PIC_MASTER : KVM_IRQCHIP_PIC_SLAVE
    return [{ gsi, irqchip: chip, pin: gsi % PIC_INPUTS }, ioApic]
  }).flat()
}

/** A level-triggered input, and the message that it is. */
interface MessageRoute {
  readonly gsi: number
  readonly address: number
  readonly data: number
}

function isSame(one: readonly MessageRoute[], other: readonly MessageRoute[]): boolean {
  return (
    one.length === other.length &&
    one.every(({ gsi, address, data }, index) => {
      const route = other[index]!
      return gsi === route.gsi && address === route.address && data === route.data
    })
  )
}

class SplitIrqchip implements Interrupts {
  readonly irqchip = 'split'
  readonly lines: IrqLines
  readonly devices: readonly Device[]
  onExternal: (index: number) => void = () => {}
  readonly #vm: Vm
  readonly #pic: Pic
  readonly #ioApic: IoApic
  /** What KVM has been told of. */
  #routes: readonly MessageRoute[] = []
  #closed = false

  constructor(vm: Vm) {
    this.#vm = vm
    // As many routes as the IOAPIC may wait for: for each input what it sends, and what it has sent.
    vm.enableCap('SPLIT_IRQCHIP', [BigInt(2 * IO_APIC_PINS)])
    const pic = new Pic({ onInterrupt: () => this.onExternal(BOOT_VCPU) })
    const ioApic = new IoApic({
      deliver: ({ address, data }) => {
        if (!this.#closed) vm.signalMsi(address, data)
      },
      // KVM tells of ends of interrupt for the vectors of routed, level-triggered messages alone.
      onLevelMessages: (messages) => {
        const routes = messages.flatMap((message, gsi) =>
          message === undefined ? [] : [{ gsi, ...message }],
        )
        // KVM waits a while before it takes new ones.
        if (this.#closed || isSame(routes, this.#routes)) return
        vm.setGsiRouting(routes)
        this.#routes = routes
      },
    })
    this.lines = new IrqLines(IO_APIC_PINS, (gsi, asserted) => {
      if (gsi < ISA_IRQS) pic.setInput(gsi, asserted)
      ioApic.setInput(ioApicPin(gsi), asserted)
    })
    this.#pic = pic
    this.#ioApic = ioApic
    this.devices = [LOCAL_APIC, pic, ioApic, new Pit()]
  }

  externalOf(index: number): ExternalInterrupts | undefined {
    return index === BOOT_VCPU ? this.#pic : undefined
  }

  endOfInterrupt(vector: number): void {
    this.#ioApic.endOfInterrupt(vector)
  }

  interrupt(_index: number, apicId: number, vector: number): void {
    signalVector(this.#vm, apicId, vector)
  }

  /** PIC, IOAPIC and PIT are devices. */
  saveState(): DeviceState {
    return null
  }

  restoreState(): void {}

  close(): void {
    this.#closed = true
  }
}
