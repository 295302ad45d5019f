import type { Bus, Mapping } from '../bus/bus.js'
import type { Vcpu } from '../kvm/vcpu.js'
import type { CoalescedZone, Vm } from '../kvm/vm.js'

/** Writes that a posted range takes as exits before KVM is asked to collect them: small guests never pay for it. */
const WRITES_BEFORE_ZONE = 64
/** How late a collected write may be when the guest exits for nothing else, in milliseconds. */
const DRAIN_INTERVAL = 5

const PAGE_SIZE = 4096
// struct kvm_coalesced_mmio_ring (linux/kvm.h), in 32-bit words.
const RING_FIRST = 0
const RING_LAST = 1
const RING_HEADER_SIZE = 8
// struct kvm_coalesced_mmio: phys_addr, len, pio, data[8].
const ENTRY_SIZE = 24
const ENTRY_LENGTH = 8
const ENTRY_PIO = 12
const ENTRY_DATA = 16
const RING_ENTRIES = Math.floor((PAGE_SIZE - RING_HEADER_SIZE) / ENTRY_SIZE)

/**
 * Writes that KVM collects in a ring instead of leaving the guest for each (KVM_CAP_COALESCED_MMIO and _PIO).
 *
 * A posted range becomes a zone of KVM's once the guest has proved chatty there. The ring is emptied in order before
 * any other exit is handled, so a device sees the same sequence as without.
 */
export class PostedWrites {
  /** Writes taken from the ring so far. */
  count = 0
  readonly #vm: Vm
  readonly #ports: Bus
  readonly #mmio: Bus
  readonly #ring: DataView
  readonly #indices: Uint32Array
  /** Ranges that proved chatty. */
  readonly #zones: CoalescedZone[] = []
  readonly #onError: (error: unknown) => void
  #timer: NodeJS.Timeout | undefined
  /** The zones are KVM's at the moment. */
  #enabled = true
  #running = false
  #draining = false

  /**
   * @param vcpu - any of the machine's: they share one ring
   * @param ringPage - the value of KVM_CAP_COALESCED_MMIO: which page of `kvmRun` is the ring, or 0
   * @param onError - a device failed while the ring was emptied by the timer
   */
  constructor(
    vm: Vm,
    vcpu: Vcpu,
    ringPage: number,
    ports: Bus,
    mmio: Bus,
    onError: (error: unknown) => void,
  ) {
    this.#vm = vm
    this.#ports = ports
    this.#mmio = mmio
    this.#onError = onError
    const { buffer } = vcpu.kvmRun
    this.#ring = new DataView(buffer, ringPage * PAGE_SIZE, PAGE_SIZE)
    this.#indices = new Uint32Array(buffer, ringPage * PAGE_SIZE, 2)
    if (ringPage === 0) return
    for (const bus of [ports, mmio])
      bus.onPosted(WRITES_BEFORE_ZONE, (mapping) => this.#register(bus, mapping))
  }

  /** Whether KVM may have collected something. */
  get active(): boolean {
    return this.#zones.length > 0
  }

  /** A run starts. @param allowed - false while stepping, where every write has to be an exit */
  start(allowed: boolean): void {
    this.#running = true
    if (allowed !== this.#enabled) {
      for (const zone of this.#zones) {
        if (allowed) this.#vm.registerCoalesced(zone)
        else this.#vm.unregisterCoalesced(zone)
      }
    }
    this.#enabled = allowed
    this.#updateTimer()
  }

  /** A run has ended: nothing stays behind in the ring. */
  stop(): void {
    this.#running = false
    this.#updateTimer()
    this.drain()
  }

  /** Gives what KVM collected to the devices, in order. */
  drain(): void {
    // A device that is written to may end up here again.
    if (this.#zones.length === 0 || this.#draining || this.#indices.length === 0) return
    this.#draining = true
    try {
      const indices = this.#indices
      let first = Atomics.load(indices, RING_FIRST)
      while (first !== Atomics.load(indices, RING_LAST)) {
        const entry = RING_HEADER_SIZE + (first % RING_ENTRIES) * ENTRY_SIZE
        const size = Math.min(this.#ring.getUint32(entry + ENTRY_LENGTH, true), 8)
        const bus = this.#ring.getUint32(entry + ENTRY_PIO, true) !== 0 ? this.#ports : this.#mmio
        const address = this.#ring.getUint32(entry, true) + this.#ring.getUint32(entry + 4, true) * 2 ** 32
        this.count++
        try {
          bus.writeFrom(this.#ring, entry + ENTRY_DATA, address, size)
        } finally {
          first = (first + 1) % RING_ENTRIES
          Atomics.store(indices, RING_FIRST, first)
        }
      }
    } finally {
      this.#draining = false
    }
  }

  #register(bus: Bus, { range }: Mapping): void {
    const zone = { address: range.base, size: range.length, pio: bus === this.#ports }
    if (this.#enabled) this.#vm.registerCoalesced(zone)
    this.#zones.push(zone)
    this.#updateTimer()
  }

  #updateTimer(): void {
    const wanted = this.#running && this.#enabled && this.#zones.length > 0
    if (wanted && this.#timer === undefined) {
      this.#timer = setInterval(() => {
        try {
          this.drain()
        } catch (error) {
          this.#onError(error)
        }
      }, DRAIN_INTERVAL)
    } else if (!wanted) {
      clearInterval(this.#timer)
      this.#timer = undefined
    }
  }
}
