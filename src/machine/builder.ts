import { ConsolePort } from '../backends/console-port.js'
import { DebugOutput } from '../backends/debug-output.js'
import { AGENT_PORT_NAME, GuestAgent } from '../backends/guest-agent.js'
import { SerialPort } from '../backends/serial-port.js'
import { SharedDisk } from '../backends/shared-disk.js'
import { attachDevice, checkDevice, type DeviceRanges } from '../bus/attach-device.js'
import { Bus } from '../bus/bus.js'
import type { Device } from '../bus/device.js'
import type { ResolvedCpu } from '../cpu/cpu-model.js'
import { AcpiPm } from '../devices/acpi-pm.js'
import { DebugConsole } from '../devices/debug-console.js'
import { DebugExit } from '../devices/debug-exit.js'
import { FwCfg } from '../devices/fw-cfg.js'
import { KeyboardController } from '../devices/keyboard-controller.js'
import { PostCode } from '../devices/post-code.js'
import { ResetControl } from '../devices/reset-control.js'
import { Rtc } from '../devices/rtc.js'
import { Uart } from '../devices/serial.js'
import { SystemControl } from '../devices/system-control.js'
import { TextScreen } from '../devices/text-screen.js'
import { VmGeneration } from '../devices/vm-generation.js'
import { finishInstruction } from '../emulation/index.js'
import { hex, invalidArgument, NodevisorError } from '../errors.js'
import { unconnectedLine } from '../interrupts/interrupt-line.js'
import { TimerFds } from '../interrupts/timer.js'
import type { Vcpu } from '../kvm/vcpu.js'
import type { Vm } from '../kvm/vm.js'
import { GuestMemory, type MappedRegion } from '../memory/guest-memory.js'
import type { GuestRam } from '../memory/guest-ram.js'
import { KVM_IDENTITY_MAP_ADDRESS, KVM_TSS_ADDRESS, type RamRegion, ramRegions } from '../memory/layout.js'
import { MachineRam } from '../memory/machine-ram.js'
import { VirtioBlock } from '../virtio/block.js'
import type { BlockBackend } from '../virtio/block-backend.js'
import { VirtioConsole } from '../virtio/console.js'
import { VirtioEntropy } from '../virtio/entropy.js'
import type { VirtioDevice } from '../virtio/virtio-device.js'
import type { VirtioMmio } from '../virtio/virtio-mmio.js'
import { loadBootPlan, planBoot } from './boot-plan.js'
import { closeDisks, openDisks } from './disks.js'
import { Dispatcher } from './dispatcher.js'
import { Doorbells } from './doorbells.js'
import { yieldToLoop } from './execution.js'
import type { Attachments, Hardware } from './hardware.js'
import { type Host, openHost } from './host.js'
import { createInterrupts, type Interrupts } from './interrupts.js'
import type { CheckedOptions, DiskOptions } from './options.js'
import { PostedWrites } from './posted-writes.js'
import { placeVirtioDevices } from './virtio-devices.js'

/** Everything a machine is made of, ready to run. */
export interface MachineParts {
  readonly hardware: Hardware
  readonly host: Host
  /** What the guest sees of its processors. */
  readonly cpu: ResolvedCpu
  readonly ram: MachineRam
  readonly memory: GuestMemory
  readonly vm: Vm
  readonly vcpus: readonly Vcpu[]
  readonly ports: Bus
  readonly mmio: Bus
  readonly interrupts: Interrupts
  readonly clock: TimerFds
  readonly posted: PostedWrites
  readonly doorbells: Doorbells
  readonly dispatcher: Dispatcher
  readonly serial: SerialPort
  readonly debugConsole: DebugOutput
  readonly screen: TextScreen
  readonly postCode: PostCode
  readonly acpiPm: AcpiPm
  /** What tells a guest that it is another machine now; undefined without firmware tables. */
  readonly generation: VmGeneration | undefined
  /** The devices on the buses that have something to keep, in the order in which they were attached. */
  readonly statefulDevices: readonly Device[]
  readonly virtio: readonly VirtioMmio[]
  readonly disks: readonly SharedDisk[]
  /** Ports of the virtio console, the console itself first; empty without one. */
  readonly consolePorts: readonly ConsolePort[]
  /** The agent in the guest; undefined without a port for it. */
  readonly agent: GuestAgent | undefined
  /** Gives everything back to the host. @param why - a clause for those who still wait */
  close(why: string): Promise<void>
}

/** The one place that knows what a machine is made of: checked options in, a machine at its reset vector out. */
export async function buildMachine(options: CheckedOptions): Promise<MachineParts> {
  for (const device of options.devices) checkDevice(device)
  const host = openHost()
  const disks = await openDisks(options.disks)
  try {
    const { devices, virtio } = options
    const attachments = { disks, devices, virtio, rngSource: options.rng?.source }
    const virtioParts = makeVirtio(options, attachments)
    const plan = await planBoot(options, host, virtioParts.virtio)
    const { hardware } = plan
    const parts = assemble(hardware, attachments, virtioParts, host, () => {
      const { memorySize, hugePages } = hardware
      const size = ramRegions(memorySize).reduce((sum, region) => sum + region.size, 0)
      return MachineRam.create({ size, hugePages })
    })
    try {
      loadBootPlan(plan, parts.memory, parts.vcpus)
    } catch (error) {
      await parts.close('the machine could not be made')
      throw error
    }
    return parts
  } catch (error) {
    await closeDisks(disks)
    throw error
  }
}

/** Another machine of the same hardware, with memory of its own. Its vCPUs and devices have no state yet. */
export function buildCopy(
  hardware: Hardware,
  attachments: Attachments,
  makeRam: () => MachineRam,
): MachineParts {
  for (const device of attachments.devices) checkDevice(device)
  const virtioParts = makeVirtio(hardware, attachments)
  return assemble(hardware, attachments, virtioParts, openHost(), makeRam)
}

/** The virtio devices and what is behind them. */
type VirtioParts = Pick<MachineParts, 'disks' | 'virtio' | 'consolePorts' | 'agent'>

function makeVirtio(
  options: Pick<Hardware, 'disks' | 'console' | 'agent' | 'rng'>,
  attachments: Attachments,
): VirtioParts {
  const consolePorts = makeConsolePorts(options)
  const console = makeConsole(options, consolePorts)
  const { rngSource: source } = attachments
  const disks = attachments.disks.map((disk) => new SharedDisk(disk))
  const devices = [
    ...disks.map((backend, index) => makeDisk(options.disks[index]!, backend, index)),
    ...(console === undefined ? [] : [console]),
    ...(options.rng === undefined
      ? []
      : [new VirtioEntropy({ ...options.rng, ...(source === undefined ? {} : { source }) })]),
    ...attachments.virtio,
  ]
  return {
    disks,
    virtio: placeVirtioDevices(devices, attachments.devices),
    consolePorts,
    agent: options.agent ? new GuestAgent(consolePorts.at(-1)!) : undefined,
  }
}

function assemble(
  hardware: Hardware,
  attachments: Attachments,
  { disks, virtio, consolePorts, agent }: VirtioParts,
  host: Host,
  makeRam: () => MachineRam,
): MachineParts {
  const { memorySize, irqchip, apicIds, cpuid, cmdline, fwCfgFiles } = hardware
  const cpus = apicIds.length
  const closers: (() => void)[] = []
  const closeAll = () => {
    for (const close of closers.splice(0).reverse()) close()
  }
  try {
    const ram = makeRam()
    closers.push(() => ram.close())
    const vm = host.kvm.createVm()
    closers.push(() => vm.close())
    // VT-x runs real mode with the help of these pages; elsewhere KVM ignores them.
    vm.setIdentityMapAddr(KVM_IDENTITY_MAP_ADDRESS)
    vm.setTssAddr(KVM_TSS_ADDRESS)
    const regions = ramRegions(memorySize)
    const memory = new GuestMemory(mapRam(vm, ram.ram, regions), () => ram.close())
    // After the memory slots: with a full irqchip each change of them costs milliseconds.
    const interrupts = createInterrupts(irqchip, vm, apicIds)
    const clock = new TimerFds((error) => dispatcher.fail(error))
    closers.push(() => clock.close())

    const vcpus = apicIds.map((apicId, index) => {
      // KVM takes the number of a vCPU for the id of its local APIC.
      const vcpu = vm.createVcpu(apicId)
      closers.push(() => vcpu.close())
      vcpu.setCpuid(cpuid[index]!)
      return vcpu
    })

    const ports = new Bus('port')
    const mmio = new Bus('mmio')
    const posted = new PostedWrites(vm, vcpus[0]!, host.ringPage, ports, mmio, (error) =>
      dispatcher.fail(error),
    )
    const doorbells = new Doorbells(vm, (error) => dispatcher.fail(error))
    closers.push(() => doorbells.close())
    const dispatcher = new Dispatcher({
      ports,
      mmio,
      posted,
      endOfInterrupt: (vector) => interrupts.endOfInterrupt(vector),
      finish: host.kind === 'pvm' ? (vcpu, bytes) => finishInstruction(vcpu, memory, bytes) : undefined,
    })
    const serial = new SerialPort()
    const debugConsole = new DebugOutput()
    const screen = new TextScreen()
    const postCode = new PostCode()
    const acpiPm = new AcpiPm({ onPowerOff: () => dispatcher.end({ reason: 'power-off' }) })
    const { generationId: address } = hardware
    const generation = address === undefined ? undefined : new VmGeneration({ memory, address, acpiPm })
    const own: Device[] = [
      ...interrupts.devices,
      new Uart({ backend: serial }),
      new DebugExit({ onExit: (code) => dispatcher.end({ reason: 'debug-exit', code }) }),
      postCode,
      new DebugConsole({ backend: debugConsole }),
      new KeyboardController({
        onReset: () => dispatcher.end({ reason: 'reset', by: 'keyboard controller' }),
      }),
      new SystemControl({ onReset: () => dispatcher.end({ reason: 'reset', by: 'system control' }) }),
      new ResetControl({ onReset: () => dispatcher.end({ reason: 'reset', by: 'reset control' }) }),
      acpiPm,
      new FwCfg({
        memorySize,
        cpus,
        cmdline,
        files: fwCfgFiles,
      }),
      new Rtc({ memorySize }),
      screen,
    ]
    const attached = [...own, ...virtio, ...attachments.devices].map((device) => {
      const ranges = attachDevice(device, ports, mmio)
      checkBesideRam(device, ranges, regions)
      return { device, ranges }
    })
    for (const { device, ranges } of attached) {
      device.attach?.({
        memory,
        interrupt:
          device.irq === undefined
            ? unconnectedLine
            : (interrupts.lines?.line(device.irq) ?? unconnectedLine),
        clock,
        doorbell: (doorbell, ring) => {
          const range = [...ranges.ports, ...ranges.mmio][doorbell.region]
          if (range === undefined) {
            throw invalidArgument(`doorbell.region of ${device.name}`, 'a claimed range', doorbell.region)
          }
          return doorbells.add(range, doorbell.region < ranges.ports.length, doorbell, ring)
        },
        yield: yieldToLoop,
        fail: (error) => dispatcher.fail(error),
        stop: () => dispatcher.end({ reason: 'stopped', by: 'device' }),
      })
    }
    return {
      hardware,
      host,
      get cpu() {
        return host.describeCpu(hardware.cpu, cpus, irqchip !== 'none')
      },
      ram,
      memory,
      vm,
      vcpus,
      ports,
      mmio,
      interrupts,
      clock,
      posted,
      doorbells,
      dispatcher,
      serial,
      debugConsole,
      screen,
      postCode,
      acpiPm,
      generation,
      statefulDevices: attached.map(({ device }) => device).filter(hasState),
      virtio,
      disks,
      consolePorts,
      agent,
      async close(why) {
        agent?.close(why)
        serial.close(why)
        debugConsole.close(why)
        for (const port of consolePorts) port.close(why)
        // Requests under way read and write guest memory.
        await closeDisks(disks)
        interrupts.close()
        memory.close()
        closeAll()
      },
    }
  } catch (error) {
    closeAll()
    throw error
  }
}

/** What stands for KVM's own devices on the buses has no state. */
function hasState(device: Device): boolean {
  return device.read !== undefined || device.write !== undefined || device.saveState !== undefined
}

function makeDisk(
  { serial, queues }: Pick<DiskOptions, 'serial' | 'queues'>,
  backend: BlockBackend,
  index: number,
): VirtioDevice {
  return new VirtioBlock({
    backend,
    name: `disk${index}`,
    ...(serial === undefined ? {} : { serial }),
    ...(queues === undefined ? {} : { queues }),
  })
}

function makeConsolePorts(options: Pick<Hardware, 'console' | 'agent'>): ConsolePort[] {
  if (options.console === undefined) return []
  const names = [...(options.console.ports ?? []), ...(options.agent ? [AGENT_PORT_NAME] : [])]
  return [new ConsolePort(), ...names.map((name) => new ConsolePort(name))]
}

function makeConsole(
  options: Pick<Hardware, 'console'>,
  ports: readonly ConsolePort[],
): VirtioConsole | undefined {
  if (options.console === undefined) return undefined
  const { size } = options.console
  return new VirtioConsole({
    ports: ports.map((backend, index) => ({
      backend,
      console: index === 0,
      ...(backend.name === undefined ? {} : { name: backend.name }),
    })),
    ...(size === undefined ? {} : { size }),
  })
}

/** Gives the VM a slot for each stretch of RAM, and GuestMemory the same bytes. */
function mapRam(vm: Vm, ram: GuestRam, regions: readonly RamRegion[]): MappedRegion[] {
  const mapped: MappedRegion[] = []
  let offset = 0
  regions.forEach(({ start, size }, slot) => {
    vm.setUserMemoryRegion({ slot, guestAddress: start, size, ram, offset })
    const ramOffset = offset
    mapped.push({ start, size, map: (from, length) => ram.buffer(ramOffset + from, length) })
    offset += size
  })
  return mapped
}

/** RAM hides a device behind it: the guest would never reach it. */
function checkBesideRam(device: Device, { mmio }: DeviceRanges, regions: readonly RamRegion[]): void {
  for (const { base, length } of mmio) {
    const region = regions.find(({ start, size }) => base < start + size && start < base + length)
    if (region === undefined) continue
    throw new NodevisorError(
      'ERR_BUS_OVERLAP',
      `Expected the addresses ${hex(base)} to ${hex(base + length - 1)} of ${device.name} to lie outside RAM but RAM is ` +
        `from ${hex(region.start)} to ${hex(region.start + region.size - 1)}; move the device, for example to 0xd0000000`,
      { device: device.name, range: { base, length }, ram: region },
    )
  }
}
