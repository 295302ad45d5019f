import type { Doorbell, Range } from '../bus/device.js'
import { EventFd } from '../interrupts/event-fd.js'
import type { Vm } from '../kvm/vm.js'

interface Bell {
  readonly address: number
  readonly doorbell: Doorbell
  readonly pio: boolean
  readonly ring: () => void
  /** What KVM signals in place of an exit. */
  eventFd: EventFd | undefined
  unlisten: (() => void) | undefined
}

/**
 * Writes that only say that there is work: KVM signals an eventfd for them and the vCPU goes on (ioeventfd), where the
 * vCPU has a thread of its own. A vCPU on the JavaScript thread would have to leave the guest for the signal to be seen:
 * there the write is an exit like others, and served at once.
 */
export class Doorbells {
  readonly #vm: Vm
  readonly #onError: (error: unknown) => void
  readonly #bells = new Set<Bell>()
  /** The writes are to be signals at present. */
  #signalled = false
  #running = false

  /** @param onError - takes what a device throws */
  constructor(vm: Vm, onError: (error: unknown) => void) {
    this.#vm = vm
    this.#onError = onError
  }

  /** @param range - where the device has the doorbell's region. @param pio - in ports. @returns takes it away */
  add(range: Range, pio: boolean, doorbell: Doorbell, ring: () => void): () => void {
    const guarded = () => {
      try {
        ring()
      } catch (error) {
        this.#onError(error)
      }
    }
    const bell: Bell = {
      address: range.base + doorbell.offset,
      doorbell,
      pio,
      ring: guarded,
      eventFd: undefined,
      unlisten: undefined,
    }
    this.#bells.add(bell)
    if (this.#signalled) this.#hang(bell)
    return () => {
      if (this.#bells.delete(bell)) this.#remove(bell)
    }
  }

  /** A run starts. @param signalled - false where each write has to be an exit */
  start(signalled: boolean): void {
    this.#running = true
    this.#signalled = signalled
    for (const bell of this.#bells) {
      if (signalled) this.#hang(bell)
      else this.#remove(bell)
    }
  }

  /** A run has ended. Its last words are heard: a guest may ring and power off at once. */
  stop(): void {
    this.#running = false
    for (const bell of this.#bells) {
      this.#unlisten(bell)
      if (bell.eventFd !== undefined && bell.eventFd.read() > 0) bell.ring()
    }
  }

  close(): void {
    for (const bell of this.#bells) {
      this.#unlisten(bell)
      bell.eventFd?.close()
    }
    this.#bells.clear()
  }

  #hang(bell: Bell): void {
    if (bell.eventFd === undefined) {
      bell.eventFd = new EventFd()
      this.#vm.ioeventfd({ ...this.#placeOf(bell), eventFd: bell.eventFd })
    }
    if (this.#running) bell.unlisten ??= bell.eventFd.onSignal(bell.ring)
  }

  #remove(bell: Bell): void {
    const { eventFd } = bell
    if (eventFd === undefined) return
    this.#unlisten(bell)
    this.#vm.ioeventfd({ ...this.#placeOf(bell), eventFd, deassign: true })
    eventFd.close()
    bell.eventFd = undefined
  }

  #unlisten(bell: Bell): void {
    bell.unlisten?.()
    bell.unlisten = undefined
  }

  #placeOf({ address, doorbell: { size, value }, pio }: Bell) {
    return { address, length: size, datamatch: BigInt(value), pio }
  }
}
