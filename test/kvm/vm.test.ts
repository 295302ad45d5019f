import { describe, expect, it, onTestFinished } from 'vitest'
import {
  EventFd,
  GUEST_DEBUG,
  GuestRam,
  type IrqfdOptions,
  Kvm,
  MEMORY_FLAGS,
  type Vcpu,
  type Vm,
} from '../../src/kvm/index.js'
import { closedError, ENTRY, failureOf, makeMetal, nextExit, outputUntil, RAM_SIZE } from './metal.js'

/** A VM without anything in it. */
function makeVm(): Vm {
  const kvm = new Kvm()
  const vm = kvm.createVm()
  kvm.close()
  onTestFinished(() => vm.close())
  return vm
}

function makeEventFd(): EventFd {
  const eventFd = new EventFd()
  onTestFinished(() => eventFd.close())
  return eventFd
}

describe('a VM', () => {
  it('checks extensions and enables capabilities', () => {
    const vm = makeVm()
    expect(vm.checkExtension('IRQCHIP')).toBe(1)
    vm.enableCap('EXCEPTION_PAYLOAD', [1n])
    expect(() => vm.enableCap(60_000)).toThrow(failureOf('KVM_ENABLE_CAP', 'EINVAL'))
    expect(() => vm.enableCap('NONE' as never)).toThrow(
      expect.objectContaining({ code: 'ERR_INVALID_ARGUMENT' }),
    )
  })

  it('outlives the Kvm it came from', () => {
    expect(makeVm().createVcpu(0).getRegs().rip).toBe(0xfff0n)
  })

  it('takes the addresses that VT-x needs, before there are vCPUs', () => {
    const vm = makeVm()
    vm.setIdentityMapAddr(0xfffb_c000)
    vm.setTssAddr(0xfffb_d000)
    vm.setBootCpuId(1)
    const vcpu = vm.createVcpu(0)
    expect(() => vm.setBootCpuId(0)).toThrow(failureOf('KVM_SET_BOOT_CPU_ID', 'EBUSY'))
    vcpu.close()
  })

  it('refuses a second vCPU of the same id, and ids beyond its limit', () => {
    const vm = makeVm()
    const first = vm.createVcpu(0)
    expect(() => vm.createVcpu(0)).toThrow(failureOf('KVM_CREATE_VCPU', 'EEXIST'))
    expect(() => vm.createVcpu(1e6)).toThrow(failureOf('KVM_CREATE_VCPU', 'EINVAL'))
    first.close()
  })

  it('has a clock, which is set and got', () => {
    const vm = makeVm()
    const clock = vm.getClock()
    expect(clock).toHaveLength(48)
    const view = new DataView(clock.buffer)
    const now = view.getBigUint64(0, true) + 10n ** 12n
    view.setBigUint64(0, now, true)
    view.setUint32(8, 0, true) // no flags
    vm.setClock(clock)
    expect(new DataView(vm.getClock().buffer).getBigUint64(0, true)).toBeGreaterThanOrEqual(now)
  })

  it('34: throws ERR_CLOSED from every method after close(), which may be called twice', () => {
    const vm = makeVm()
    const ram = new GuestRam({ size: 4096 })
    const eventFd = makeEventFd()
    vm.close()
    vm.close()
    for (const call of [
      () => vm.checkExtension('IRQCHIP'),
      () => vm.enableCap('EXCEPTION_PAYLOAD'),
      () => vm.setUserMemoryRegion({ slot: 0, guestAddress: 0, size: 4096, ram }),
      () => vm.getDirtyLog(0, new Uint8Array(8)),
      () => vm.clearDirtyLog(0, 0, 64, new Uint8Array(8)),
      () => vm.setTssAddr(0),
      () => vm.setIdentityMapAddr(0),
      () => vm.setBootCpuId(0),
      () => vm.createVcpu(0),
      () => vm.createIrqchip(),
      () => vm.getIrqchip(0),
      () => vm.setIrqchip(new Uint8Array(520)),
      () => vm.createPit2(),
      () => vm.getPit2(),
      () => vm.setPit2(new Uint8Array(112)),
      () => vm.irqLine(0, true),
      () => vm.setGsiRouting([]),
      () => vm.signalMsi(0, 0),
      () => vm.irqfd({ eventFd, gsi: 0 }),
      () => vm.ioeventfd({ eventFd, address: 0, length: 1 }),
      () => vm.registerCoalesced({ address: 0, size: 1, pio: true }),
      () => vm.unregisterCoalesced({ address: 0, size: 1, pio: true }),
      () => vm.getClock(),
      () => vm.setClock(new Uint8Array(48)),
    ]) {
      expect(call).toThrow(closedError)
    }
    ram.close()
  })
})

describe('memory slots', () => {
  it('show the guest parts of RAM, where they are told to', () => {
    const { vm, ram, vcpu, memory } = makeMetal({ code: [0xa0, 0x34, 0x52, 0xf4] }) // mov al, [0x5234]; hlt
    // Pages 0 to 4, and page 5 from somewhere else.
    vm.setUserMemoryRegion({ slot: 0, guestAddress: 0, size: 0 })
    vm.setUserMemoryRegion({ slot: 0, guestAddress: 0, size: 0x5000, ram })
    vm.setUserMemoryRegion({ slot: 1, guestAddress: 0x5000, size: 0x1000, ram, offset: 0x8_0000 })
    memory[0x8_0234] = 0x77
    expect(nextExit(vcpu)).toMatchObject({ kind: 'halt' })
    expect(vcpu.getRegs().rax).toBe(0x77n)
  })

  it('may be read-only: writes are exits', () => {
    const { vm, ram, vcpu, memory } = makeMetal({ code: [0xb0, 0x05, 0xa2, 0x00, 0x50, 0xf4] })
    vm.setUserMemoryRegion({ slot: 0, guestAddress: 0, size: 0 })
    vm.setUserMemoryRegion({ slot: 0, guestAddress: 0, size: 0x5000, ram })
    vm.setUserMemoryRegion({
      slot: 1,
      guestAddress: 0x5000,
      size: 0x1000,
      ram,
      offset: 0x5000,
      flags: MEMORY_FLAGS.READONLY,
    })
    expect(nextExit(vcpu)).toMatchObject({ kind: 'mmio', direction: 'write', address: 0x5000, size: 1 })
    expect(nextExit(vcpu)).toMatchObject({ kind: 'halt' })
    expect(memory[0x5000]).toBe(0)
  })

  it('are refused where they overlap, are not aligned, or are beyond the RAM', () => {
    const { vm, ram } = makeMetal()
    const refused = failureOf('KVM_SET_USER_MEMORY_REGION', 'EEXIST')
    expect(() => vm.setUserMemoryRegion({ slot: 1, guestAddress: 0, size: 4096, ram })).toThrow(refused)
    const invalid = failureOf('KVM_SET_USER_MEMORY_REGION', 'EINVAL')
    expect(() => vm.setUserMemoryRegion({ slot: 1, guestAddress: 2 ** 32 + 1, size: 4096, ram })).toThrow(
      invalid,
    )
    expect(() => vm.setUserMemoryRegion({ slot: 1, guestAddress: 2 ** 32, size: 4095, ram })).toThrow(invalid)
    for (const [size, offset] of [
      [RAM_SIZE + 4096, 0],
      [4096, RAM_SIZE],
      [8192, RAM_SIZE - 4096],
      [4096, -4096],
      [-4096, 0],
    ] as const) {
      expect(() => vm.setUserMemoryRegion({ slot: 1, guestAddress: 2 ** 32, size, ram, offset })).toThrow(
        RangeError,
      )
    }
    expect(() => vm.setUserMemoryRegion({ slot: 1, guestAddress: 0, size: 4096 })).toThrow(
      expect.objectContaining({ code: 'ERR_INVALID_ARGUMENT' }),
    )
  })

  it('keep RAM that was closed until they are gone', () => {
    const { ram, vcpu } = makeMetal({ code: [0xb0, 0x05, 0xe6, 0x11, 0xf4] })
    ram.close()
    expect(outputUntil(vcpu, 'halt')).toEqual([5])
    const { vm } = makeMetal()
    expect(() => vm.setUserMemoryRegion({ slot: 5, guestAddress: 2 ** 32, size: 4096, ram })).toThrow(
      closedError,
    )
  })

  it('log dirty pages', () => {
    // mov [0x5000], al; mov [0x6000], al; hlt; mov [0x6000], al; hlt
    const { vm, vcpu } = makeMetal({
      code: [0xa2, 0x00, 0x50, 0xa2, 0x00, 0x60, 0xf4, 0xa2, 0x00, 0x60, 0xf4],
      flags: MEMORY_FLAGS.LOG_DIRTY_PAGES,
    })
    const bitmap = new Uint8Array(RAM_SIZE / 4096 / 8)
    // Of the two pages alone: what else a processor writes (accessed bits, its own structures) is its affair.
    const written = () => bitmap[0]! & 0b0110_0000
    vm.getDirtyLog(0, bitmap)
    nextExit(vcpu)
    vm.getDirtyLog(0, bitmap)
    expect(written()).toBe(0b0110_0000)
    nextExit(vcpu)
    vm.getDirtyLog(0, bitmap)
    expect(written()).toBe(0b0100_0000)
    expect(bitmap.subarray(1).every((byte) => byte === 0)).toBe(true)
  })

  it('log dirty pages until they are cleared, where that is asked for', () => {
    const { vm, vcpu } = makeMetal({
      code: [0xa2, 0x00, 0x50, 0xf4],
      flags: MEMORY_FLAGS.LOG_DIRTY_PAGES,
      prepare: (vm) => vm.enableCap('MANUAL_DIRTY_LOG_PROTECT2', [1n]),
    })
    const bitmap = new Uint8Array(RAM_SIZE / 4096 / 8)
    nextExit(vcpu)
    for (let i = 0; i < 2; i++) {
      vm.getDirtyLog(0, bitmap)
      expect(bitmap[0]! & 0b0010_0000).toBe(0b0010_0000)
    }
    vm.clearDirtyLog(0, 0, 64, Uint8Array.of(0xff, 0, 0, 0, 0, 0, 0, 0))
    vm.getDirtyLog(0, bitmap)
    expect(bitmap[0]! & 0b0010_0000).toBe(0)
  })

  it('refuse bitmaps that KVM would write past the end of', () => {
    const { vm, ram } = makeMetal({ flags: MEMORY_FLAGS.LOG_DIRTY_PAGES })
    expect(() => vm.getDirtyLog(0, new Uint8Array(RAM_SIZE / 4096 / 8 - 1))).toThrow(RangeError)
    expect(() => vm.clearDirtyLog(0, 0, 64, new Uint8Array(7))).toThrow(RangeError)
    // KVM counts in words of 64 pages: one page needs 8 bytes.
    const { LOG_DIRTY_PAGES: flags } = MEMORY_FLAGS
    vm.setUserMemoryRegion({ slot: 1, guestAddress: 2 ** 32, size: 4096, ram, flags })
    expect(() => vm.getDirtyLog(1, new Uint8Array(1))).toThrow(RangeError)
    vm.getDirtyLog(1, new Uint8Array(8))
    expect(() => vm.clearDirtyLog(1, 0, 1, new Uint8Array(1))).toThrow(RangeError)
    expect(() => vm.getDirtyLog(7, new Uint8Array(8))).toThrow(failureOf('KVM_GET_DIRTY_LOG', 'ENOENT'))
  })
})

describe('doorbells', () => {
  it('reach an eventfd, and the event loop, without an exit', async () => {
    // out 0x10, al, three times; out 0x11, al; hlt
    const { vm, vcpu } = makeMetal({ code: [0xe6, 0x10, 0xe6, 0x10, 0xe6, 0x10, 0xe6, 0x11, 0xf4] })
    const eventFd = makeEventFd()
    vm.ioeventfd({ eventFd, address: 0x10, length: 1, pio: true })
    const signalled = new Promise((resolve) => eventFd.onSignal(resolve))
    expect(nextExit(vcpu)).toMatchObject({ kind: 'io', port: 0x11 })
    expect(await signalled).toBe(3)
    expect(eventFd.read()).toBe(0)
  })

  it('may ask for a value, and can be taken back', () => {
    // mov al, 5; out 0x10, al; mov al, 6; out 0x10, al; out 0x10, al; hlt
    const { vm, vcpu } = makeMetal({
      code: [0xb0, 0x05, 0xe6, 0x10, 0xb0, 0x06, 0xe6, 0x10, 0xe6, 0x10, 0xf4],
    })
    const eventFd = makeEventFd()
    const options = { eventFd, address: 0x10, length: 1, pio: true, datamatch: 6n }
    vm.ioeventfd(options)
    const exit = nextExit(vcpu)
    expect(exit).toMatchObject({ kind: 'io', port: 0x10 })
    if (exit.kind === 'io') expect([...exit.data]).toEqual([5])
    expect(nextExit(vcpu)).toMatchObject({ kind: 'halt' })
    expect(eventFd.read()).toBe(2)
    vm.ioeventfd({ ...options, deassign: true })
    expect(() => vm.ioeventfd({ ...options, deassign: true })).toThrow(failureOf('KVM_IOEVENTFD', 'ENOENT'))
  })

  it('may be in memory', () => {
    const { vm, vcpu, ram } = makeMetal({ code: [0xb8, 0x00, 0xc0, 0x8e, 0xd8, 0xa2, 0x10, 0x00, 0xf4] })
    vm.setUserMemoryRegion({ slot: 0, guestAddress: 0, size: 0 })
    vm.setUserMemoryRegion({ slot: 0, guestAddress: 0, size: 0xa_0000, ram })
    const eventFd = makeEventFd()
    vm.ioeventfd({ eventFd, address: 0xc_0010, length: 1 })
    expect(nextExit(vcpu)).toMatchObject({ kind: 'halt' })
    expect(eventFd.read()).toBe(1)
  })

  it('are refused on an eventfd that was closed', () => {
    const eventFd = makeEventFd()
    eventFd.close()
    expect(() => makeVm().ioeventfd({ eventFd, address: 0x10, length: 1, pio: true })).toThrow(closedError)
    expect(() => makeVm().irqfd({ eventFd, gsi: 1 })).toThrow(closedError)
  })
})

describe('coalesced zones', () => {
  it('collect writes in the ring behind kvm_run', () => {
    // mov al, 7; out 0x10, al; out 0x10, al; out 0x11, al; hlt
    const { kvm, vm, vcpu } = makeMetal({ code: [0xb0, 0x07, 0xe6, 0x10, 0xe6, 0x10, 0xe6, 0x11, 0xf4] })
    const zone = { address: 0x10, size: 1, pio: true }
    vm.registerCoalesced(zone)
    expect(nextExit(vcpu)).toMatchObject({ kind: 'io', port: 0x11 })
    // struct kvm_coalesced_mmio_ring: first, last, then entries of phys_addr, len, pio, data.
    const ring = kvm.checkExtension('COALESCED_MMIO') * 4096
    const { kvmRun } = vcpu
    expect([kvmRun.getUint32(ring, true), kvmRun.getUint32(ring + 4, true)]).toEqual([0, 2])
    expect(kvmRun.getBigUint64(ring + 8, true)).toBe(0x10n)
    expect([kvmRun.getUint32(ring + 16, true), kvmRun.getUint32(ring + 20, true)]).toEqual([1, 1])
    expect(kvmRun.getUint8(ring + 24)).toBe(7)
    vm.unregisterCoalesced(zone)
    vcpu.setRegs({ ...vcpu.getRegs(), rip: BigInt(ENTRY) })
    expect(nextExit(vcpu)).toMatchObject({ kind: 'io', port: 0x10 })
  })
})

/** Switches interrupts on and loops; the handler, at +0x10, writes 9 to port 0xe9. */
const INTERRUPTED = [0xfb, 0xeb, 0xfe, ...Array(13).fill(0x90), 0xb0, 0x09, 0xe6, 0xe9, 0xeb, 0xfe]

/** Points a vector of the real-mode table to the handler. */
function setVector(memory: Uint8Array, vector: number): void {
  new DataView(memory.buffer).setUint32(vector * 4, ENTRY + 0x10, true)
}

/** Programs the first PIC as every PC kernel does: vectors from 0x20 on, all unmasked. */
const PIC_SETUP = [
  [0x20, 0x11],
  [0x21, 0x20],
  [0x21, 0x04],
  [0x21, 0x01],
  [0x21, 0x00],
].flatMap(([port, value]) => [0xb0, value!, 0xe6, port!])

describe('interrupts', () => {
  /** Interrupt chips in the kernel, and a guest that has set them up and waits. */
  function withIrqchip() {
    const metal = makeMetal({
      code: INTERRUPTED,
      prepare: (vm) => vm.createIrqchip(),
    })
    setVector(metal.memory, 0x21)
    // It ends with a jump to the code above.
    const setup = 0x2000
    metal.memory.set([...PIC_SETUP, 0xea, 0x00, 0x10, 0x00, 0x00], setup)
    metal.vcpu.setRegs({ ...metal.vcpu.getRegs(), rip: BigInt(setup) })
    return metal
  }

  /** Runs the setup alone: it makes the PIC forget what was raised before. */
  function untilSetUp(vcpu: Vcpu): void {
    vcpu.setGuestDebug({ control: GUEST_DEBUG.ENABLE | GUEST_DEBUG.SINGLESTEP })
    while (vcpu.getRegs().rip !== BigInt(ENTRY)) nextExit(vcpu)
    vcpu.setGuestDebug({ control: 0 })
  }

  it('are raised on a line of the chips in the kernel', () => {
    const { vm, vcpu } = withIrqchip()
    untilSetUp(vcpu)
    vm.irqLine(1, true)
    vm.irqLine(1, false)
    expect(nextExit(vcpu)).toMatchObject({ kind: 'io', port: 0xe9 })
  })

  it('are raised by an eventfd (irqfd), which can be taken back', () => {
    const { vm, vcpu } = withIrqchip()
    const eventFd = makeEventFd()
    const options: IrqfdOptions = { eventFd, gsi: 1 }
    vm.irqfd(options)
    untilSetUp(vcpu)
    eventFd.signal()
    expect(nextExit(vcpu)).toMatchObject({ kind: 'io', port: 0xe9 })
    vm.irqfd({ ...options, deassign: true })
    eventFd.signal()
    expect(eventFd.read()).toBe(1)
  })

  it('of a level-triggered line signal another eventfd when they are acknowledged', () => {
    const { vm } = withIrqchip()
    const [eventFd, resample] = [makeEventFd(), makeEventFd()]
    vm.irqfd({ eventFd, gsi: 5, resample })
    vm.irqfd({ eventFd, gsi: 5, resample, deassign: true })
  })

  it('have chips whose state is got and set', () => {
    const { vm } = withIrqchip()
    for (const chip of [0, 1, 2]) {
      const state = vm.getIrqchip(chip)
      expect(state).toHaveLength(520)
      expect(new DataView(state.buffer).getUint32(0, true)).toBe(chip)
      vm.setIrqchip(state)
      expect(vm.getIrqchip(chip)).toEqual(state)
    }
    expect(() => vm.getIrqchip(3)).toThrow(failureOf('KVM_GET_IRQCHIP', 'EINVAL'))
  })

  it('have a timer chip whose state is got and set', () => {
    const { vm } = withIrqchip()
    expect(() => vm.getPit2()).toThrow(failureOf('KVM_GET_PIT2', 'ENXIO'))
    vm.createPit2(1)
    const state = vm.getPit2()
    expect(state).toHaveLength(112)
    new DataView(state.buffer).setUint32(2 * 24, 0x1234, true) // the count of channel 2
    vm.setPit2(state)
    expect(new DataView(vm.getPit2().buffer).getUint32(2 * 24, true)).toBe(0x1234)
    expect(() => vm.createPit2()).toThrow(failureOf('KVM_CREATE_PIT2', 'EEXIST'))
  })

  it('cannot be had without chips, nor chips twice', () => {
    const vm = makeVm()
    expect(() => vm.irqLine(1, true)).toThrow(failureOf('KVM_IRQ_LINE', 'ENXIO'))
    expect(() => vm.getIrqchip(0)).toThrow(failureOf('KVM_GET_IRQCHIP', 'ENXIO'))
    vm.createIrqchip()
    expect(() => vm.createIrqchip()).toThrow(failureOf('KVM_CREATE_IRQCHIP', 'EEXIST'))
  })

  /** Only the local APIC in the kernel, switched on. */
  function withLocalApic() {
    const metal = makeMetal({
      code: INTERRUPTED,
      prepare: (vm) => vm.enableCap('SPLIT_IRQCHIP', [24n]),
    })
    setVector(metal.memory, 0x40)
    const lapic = metal.vcpu.getLapic()
    // Spurious interrupt vector register: vector 0xff, APIC software enabled.
    new DataView(lapic.buffer).setUint32(0xf0, 0x1ff, true)
    metal.vcpu.setLapic(lapic)
    return metal
  }

  it('have a local APIC whose registers are got and set', () => {
    const { vcpu } = withLocalApic()
    const lapic = vcpu.getLapic()
    expect(lapic).toHaveLength(1024)
    expect(new DataView(lapic.buffer).getUint32(0xf0, true)).toBe(0x1ff)
    expect(() => vcpu.setLapic(new Uint8Array(1023))).toThrow(RangeError)
    expect(() => makeMetal().vcpu.getLapic()).toThrow(failureOf('KVM_GET_LAPIC', 'EINVAL'))
  })

  it('arrive as messages (MSI)', () => {
    const { vm, vcpu } = withLocalApic()
    expect(vm.signalMsi(0xfee0_0000, 0x40)).toBe(1)
    expect(nextExit(vcpu)).toMatchObject({ kind: 'io', port: 0xe9 })
  })

  it('are routed from an eventfd to a message', () => {
    const { vm, vcpu } = withLocalApic()
    vm.setGsiRouting([{ gsi: 30, address: 0xfee0_0000, data: 0x40 }])
    const eventFd = makeEventFd()
    vm.irqfd({ eventFd, gsi: 30 })
    eventFd.signal()
    expect(nextExit(vcpu)).toMatchObject({ kind: 'io', port: 0xe9 })
    // There is no IOAPIC of KVM's here.
    expect(() => vm.setGsiRouting([{ gsi: 3, irqchip: 2, pin: 99 }])).toThrow(
      failureOf('KVM_SET_GSI_ROUTING', 'EINVAL'),
    )
  })
})

describe('an eventfd', () => {
  it('counts its signals until it is read', () => {
    const eventFd = makeEventFd()
    expect(eventFd.fd).toBeGreaterThan(2)
    expect(eventFd.read()).toBe(0)
    eventFd.signal()
    eventFd.signal()
    expect(eventFd.read()).toBe(2)
    expect(eventFd.read()).toBe(0)
  })

  it('calls its listener with the count, until that ends', async () => {
    const eventFd = makeEventFd()
    const counts: number[] = []
    const stop = eventFd.onSignal((count) => counts.push(count))
    eventFd.signal()
    eventFd.signal()
    while (counts.length === 0) await new Promise((resolve) => setImmediate(resolve))
    eventFd.signal()
    while (counts.length === 1) await new Promise((resolve) => setImmediate(resolve))
    stop()
    stop()
    eventFd.signal()
    for (let i = 0; i < 5; i++) await new Promise((resolve) => setImmediate(resolve))
    expect(counts).toEqual([2, 1])
  })

  it('34: may be closed in its own listener, and twice', async () => {
    const eventFd = makeEventFd()
    const called = new Promise<number>((resolve) => {
      eventFd.onSignal((count) => {
        eventFd.close()
        eventFd.close()
        resolve(count)
      })
    })
    eventFd.signal()
    expect(await called).toBe(1)
    expect(() => eventFd.fd).toThrow(closedError)
    expect(() => eventFd.signal()).toThrow(closedError)
    expect(() => eventFd.read()).toThrow(closedError)
    expect(() => eventFd.onSignal(() => {})).toThrow(closedError)
  })

  it('34: takes another listener in place of the first', async () => {
    const eventFd = makeEventFd()
    eventFd.onSignal(() => expect.unreachable('the first listener'))
    const called = new Promise((resolve) => eventFd.onSignal(resolve))
    eventFd.signal()
    expect(await called).toBe(1)
  })
})
