import type { Device, DeviceState } from '../bus/device.js'
import { NodevisorError } from '../errors.js'
import { restoreVcpu, saveVcpu, type VcpuParts, type VcpuSnapshot } from '../kvm/vcpu-snapshot.js'
import { CLOCK_DATA_SIZE } from '../kvm/vm.js'
import type { MachineParts } from './builder.js'
import type { VirtualCpu, VirtualCpuState } from './virtual-cpu.js'

/** What a machine was doing at a moment, but for its memory and what its disks have. */
export interface MachineState {
  /** Of the wall clock, in ms since 1970. */
  readonly time: number
  readonly vcpus: readonly (VcpuSnapshot & { readonly state: VirtualCpuState })[]
  /** ns of KVM's clock, which guests read as kvmclock. */
  readonly clock: bigint
  readonly interrupts: DeviceState
  /** Of each device on the buses, in their order. */
  readonly devices: readonly NamedState[]
}

/** A device's state. */
export interface NamedState {
  readonly name: string
  readonly state: DeviceState
}

const NS_PER_MS = 1e6

/**
 * Reads the state of a machine whose vCPUs are out of the guest, with no device request under way.
 *
 * @throws `ERR_SNAPSHOT_MISMATCH` for a device that cannot save its state
 */
export function saveMachineState(parts: MachineParts, cpus: readonly VirtualCpu[]): MachineState {
  const what = vcpuPartsOf(parts)
  return {
    time: Date.now(),
    vcpus: cpus.map((cpu) => ({ state: cpu.state, ...saveVcpu(cpu.unsafeVcpu, what) })),
    clock: clockOf(parts.vm.getClock()).getBigUint64(0, true),
    devices: parts.statefulDevices.map((device) => ({ name: device.name, state: saveDevice(device) })),
    interrupts: parts.interrupts.saveState(),
  }
}

/**
 * Puts a machine of the same hardware into a state.
 *
 * Devices come first: they put levels on their lines, which the interrupt controllers would act on. Local APICs are the
 * vCPUs', and the controllers behind them come last, as what they have pending is for the APICs.
 *
 * @throws `ERR_SNAPSHOT_MISMATCH` for other devices, `ERR_SNAPSHOT_STATE` for what a device or KVM refuses
 */
export function restoreMachineState(
  parts: MachineParts,
  cpus: readonly VirtualCpu[],
  state: MachineState,
): void {
  const devices = parts.statefulDevices
  checkSameDevices(devices, state.devices)
  const { lines } = parts.interrupts
  const elapsed = Math.max(0, Date.now() - state.time) * NS_PER_MS
  lines?.deferEdges()
  for (const device of parts.virtio) device.function.suspend()
  try {
    for (const [index, device] of devices.entries()) device.restoreState!(state.devices[index]!.state)
    const what = vcpuPartsOf(parts)
    for (const [index, cpu] of cpus.entries()) {
      const saved = state.vcpus[index]!
      restoreVcpu(cpu.unsafeVcpu, saved, what, elapsed)
      cpu.restored(saved.state)
    }
    parts.interrupts.restoreState(state.interrupts)
    const clock = clockOf(new Uint8Array(CLOCK_DATA_SIZE))
    clock.setBigUint64(0, BigInt.asUintN(64, state.clock + BigInt(elapsed)), true)
    parts.vm.setClock(new Uint8Array(clock.buffer))
  } catch (error) {
    throw refusedState(error)
  } finally {
    lines?.releaseEdges()
    for (const device of parts.virtio) device.function.resume()
  }
}

/** Tells guests that use kvmclock that they stood still: else their watchdogs bark. */
export function tellPaused(cpus: readonly VirtualCpu[]): void {
  for (const { unsafeVcpu } of cpus) {
    try {
      unsafeVcpu.kvmclockCtrl()
    } catch (error) {
      // EINVAL: this guest has no kvmclock.
      if (!(error instanceof NodevisorError) || error.errnoName !== 'EINVAL') throw error
    }
  }
}

function saveDevice(device: Device): DeviceState {
  if (device.saveState !== undefined && device.restoreState !== undefined) return device.saveState()
  throw new NodevisorError(
    'ERR_SNAPSHOT_MISMATCH',
    `Expected devices that can save their state but ${device.name} has no ` +
      `${device.saveState === undefined ? 'saveState' : 'restoreState'}(); give it one`,
    { device: device.name },
  )
}

function checkSameDevices(devices: readonly Device[], states: readonly NamedState[]): void {
  const isSame = devices.length === states.length
  if (isSame && devices.every(({ name }, index) => name === states[index]!.name)) return
  const names = devices.map(({ name }) => name)
  const saved = states.map(({ name }) => name)
  const missing = saved.filter((name) => !names.includes(name))
  const added = names.filter((name) => !saved.includes(name))
  const difference = [
    ...missing.map((name) => `${name} is missing`),
    ...added.map((name) => `${name} is new`),
  ].join(', ')
  throw new NodevisorError(
    'ERR_SNAPSHOT_MISMATCH',
    `Expected the devices that the snapshot has (${saved.join(', ')}) but ` +
      `${difference || 'their order is another'}; pass your own as devices and virtio`,
    { expected: saved, received: names },
  )
}

function refusedState(error: unknown): NodevisorError {
  if (error instanceof NodevisorError && error.code.startsWith('ERR_SNAPSHOT')) return error
  const why = error instanceof Error ? error.message : String(error)
  return new NodevisorError(
    'ERR_SNAPSHOT_STATE',
    `Expected a state that this machine can have but received another: ${why}`,
    { cause: error },
  )
}

function clockOf(struct: Uint8Array): DataView {
  return new DataView(struct.buffer, struct.byteOffset, struct.byteLength)
}

function vcpuPartsOf({ host, vm, vcpus, interrupts, hardware }: MachineParts): VcpuParts {
  return host.vcpuParts(vm, vcpus[0]!, hardware.cpu, interrupts.irqchip !== 'none')
}
