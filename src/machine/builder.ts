import { ConsolePort } from '../backends/console-port.js'
import { DebugOutput } from '../backends/debug-output.js'
import { AGENT_PORT_NAME, GuestAgent } from '../backends/guest-agent.js'
import { SerialPort } from '../backends/serial-port.js'
import { type BootImage, detectFormat, loadImage, type NamedImageFormat } from '../boot/index.js'
import { unpackPayload } from '../boot/linux-payload.js'
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
import { finishInstruction } from '../emulation/index.js'
import { hex, invalidArgument, NodevisorError } from '../errors.js'
import { checkFirmwareRoom, placeFirmwareTables } from '../firmware/index.js'
import { unconnectedLine } from '../interrupts/interrupt-line.js'
import { TimerFds } from '../interrupts/timer.js'
import { REGISTER_NAMES, type Registers } from '../kvm/registers.js'
import type { Vcpu } from '../kvm/vcpu.js'
import type { Vm } from '../kvm/vm.js'
import { GuestMemory, type MappedRegion } from '../memory/guest-memory.js'
import { GuestRam } from '../memory/guest-ram.js'
import {
  BASE_MEMORY_SIZE,
  HIGH_MEMORY_START,
  KVM_IDENTITY_MAP_ADDRESS,
  KVM_TSS_ADDRESS,
  LOW_MEMORY_END,
  type RamRegion,
  ramRegions,
} from '../memory/layout.js'
import { VirtioBlock } from '../virtio/block.js'
import type { BlockBackend } from '../virtio/block-backend.js'
import { VirtioConsole } from '../virtio/console.js'
import { VirtioEntropy } from '../virtio/entropy.js'
import type { VirtioDevice } from '../virtio/virtio-device.js'
import type { VirtioMmio } from '../virtio/virtio-mmio.js'
import { openDisks } from './disks.js'
import { Dispatcher } from './dispatcher.js'
import { Doorbells } from './doorbells.js'
import { yieldToLoop } from './execution.js'
import { type Host, openHost } from './host.js'
import { readImage, readInitrd, readModules } from './image-files.js'
import { createInterrupts, type Interrupts, type Irqchip } from './interrupts.js'
import type { CheckedOptions, DiskOptions, KernelOptions } from './options.js'
import { PostedWrites } from './posted-writes.js'
import { describeForFirmware, placeVirtioDevices, virtioParameters } from './virtio-devices.js'

/** Everything a machine is made of, ready to run. */
export interface MachineParts {
  readonly boot: Pick<BootImage, 'format' | 'mode' | 'entry'>
  /** What the guest sees of its processors. */
  readonly cpu: ResolvedCpu
  readonly memory: GuestMemory
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
  readonly virtio: readonly VirtioMmio[]
  /** Ports of the virtio console, the console itself first; empty without one. */
  readonly consolePorts: readonly ConsolePort[]
  /** The agent in the guest; undefined without a port for it. */
  readonly agent: GuestAgent | undefined
  /** Gives everything back to the host. @param why - a clause for those who still wait */
  close(why: string): Promise<void>
}

/** Bit 1 of RFLAGS is always set (Intel SDM vol. 1, 3.4.3). */
const RFLAGS_RESERVED = 2n

/** The one place that knows what a machine is made of: checked options in, a machine at its reset vector out. */
export async function buildMachine(options: CheckedOptions): Promise<MachineParts> {
  for (const device of options.devices) checkDevice(device)
  const host = openHost()
  const backends = await openDisks(options.disks)
  try {
    return await buildWithDisks(options, host, backends)
  } catch (error) {
    await closeDisks(backends)
    throw error
  }
}

async function closeDisks(backends: readonly BlockBackend[]): Promise<void> {
  await Promise.allSettled(backends.map(async (backend) => backend.close()))
}

async function buildWithDisks(
  options: CheckedOptions,
  host: Host,
  backends: readonly BlockBackend[],
): Promise<MachineParts> {
  // What closures need of the options by names of its own: those live as long as the machine, and must not keep the
  // kernel and its initrd in memory with them.
  const { kernel, memorySize, cpus, disks, cpu: cpuOptions } = options
  if (cpus > host.maxVcpus) {
    throw invalidArgument('cpus', `at most ${host.maxVcpus}, what this host's KVM can have,`, cpus)
  }
  const image = await readImage(kernel.image)
  const modules = await readModules(kernel)
  const initrd = await readInitrd(kernel)
  const format = kernel.format ?? detectFormat(image)
  const payload = await unpackKernel(options, image, format)
  const irqchip = chooseIrqchip(options, format, host)
  const cpu = host.cpu(cpuOptions, cpus, irqchip !== 'none')
  const apicIds = Array.from({ length: cpus }, (_, index) => cpu.apicId(index))
  const consolePorts = makeConsolePorts(options)
  const console = makeConsole(options, consolePorts)
  const agent = options.agent ? new GuestAgent(consolePorts.at(-1)!) : undefined
  const virtio = placeVirtioDevices(
    [
      ...backends.map((backend, index) => makeDisk(disks[index]!, backend, index)),
      ...(console === undefined ? [] : [console]),
      ...(options.rng === undefined ? [] : [new VirtioEntropy(options.rng)]),
      ...options.virtio,
    ],
    options.devices,
  )
  const cmdline = [
    ...(kernel.cmdline === undefined ? [] : [kernel.cmdline]),
    ...(wantsVirtioParameters(kernel, format) ? virtioParameters(virtio) : []),
  ].join(' ')
  const tables = wantsTables(options, irqchip)
    ? placeFirmwareTables({ cpus, apicIds, virtio: describeForFirmware(virtio), memorySize })
    : undefined
  const boot = loadImage(image, {
    memorySize,
    format,
    mode: kernel.mode,
    at: kernel.at,
    cmdline,
    modules,
    initrd,
    payload,
    rsdp: tables?.segments.find(({ address }) => address === tables.rsdp)?.bytes,
    rsdpAddress: tables?.rsdp,
  })
  const { format: bootFormat, mode, entry, state } = boot
  if (tables !== undefined) checkFirmwareRoom(tables, boot.segments)
  if (mode === 'long' && !cpu.features.includes('lm')) {
    throw invalidArgument('cpu', "a processor with 'lm', as the kernel starts in long mode,", cpuOptions)
  }

  const closers: (() => void)[] = []
  const closeAll = () => {
    for (const close of closers.splice(0).reverse()) close()
  }
  try {
    const regions = ramRegions(memorySize)
    const ram = new GuestRam({
      size: regions.reduce((sum, { size }) => sum + size, 0),
      hugePages: options.hugePages,
    })
    closers.push(() => ram.close())
    const vm = host.kvm.createVm()
    closers.push(() => vm.close())
    // VT-x runs real mode with the help of these pages; elsewhere KVM ignores them.
    vm.setIdentityMapAddr(KVM_IDENTITY_MAP_ADDRESS)
    vm.setTssAddr(KVM_TSS_ADDRESS)
    const memory = new GuestMemory(mapRam(vm, ram, regions), () => ram.close())
    if (tables !== undefined) memory.writeUint16(BASE_MEMORY_SIZE, LOW_MEMORY_END / 1024)
    for (const { address, bytes } of [...boot.segments, ...(tables?.segments ?? [])]) {
      memory.write(address, bytes)
    }
    // After the memory slots: with a full irqchip each change of them costs milliseconds.
    const interrupts = createInterrupts(irqchip, vm, apicIds)
    const clock = new TimerFds((error) => dispatcher.fail(error))
    closers.push(() => clock.close())

    const vcpus = apicIds.map((apicId, index) => {
      // KVM takes the number of a vCPU for the id of its local APIC.
      const vcpu = vm.createVcpu(apicId)
      closers.push(() => vcpu.close())
      vcpu.setCpuid(cpu.entriesFor(index))
      initialize(vcpu, state, index === 0, irqchip !== 'none')
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
        files: options.fwCfgFiles,
      }),
      new Rtc({ memorySize }),
      screen,
    ]
    const attached = [...own, ...virtio, ...options.devices].map((device) => {
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
      boot: { format: bootFormat, mode, entry },
      get cpu() {
        return host.describeCpu(cpuOptions, cpus, irqchip !== 'none')
      },
      memory,
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
      virtio,
      consolePorts,
      agent,
      async close(why) {
        agent?.close(why)
        serial.close(why)
        debugConsole.close(why)
        for (const port of consolePorts) port.close(why)
        // Requests under way read and write guest memory.
        await closeDisks(backends)
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

function makeDisk({ serial, queues }: DiskOptions, backend: BlockBackend, index: number): VirtioDevice {
  return new VirtioBlock({
    backend,
    name: `disk${index}`,
    ...(serial === undefined ? {} : { serial }),
    ...(queues === undefined ? {} : { queues }),
  })
}

function makeConsolePorts(options: CheckedOptions): ConsolePort[] {
  if (options.console === undefined) return []
  const names = [...(options.console.ports ?? []), ...(options.agent ? [AGENT_PORT_NAME] : [])]
  return [new ConsolePort(), ...names.map((name) => new ConsolePort(name))]
}

function makeConsole(options: CheckedOptions, ports: readonly ConsolePort[]): VirtioConsole | undefined {
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

/** Operating systems look for interrupt controllers; small kernels end with `hlt`, which those would not let exit. */
function chooseIrqchip({ irqchip, cpus }: CheckedOptions, format: NamedImageFormat, host: Host): Irqchip {
  if (irqchip === 'split' && !host.hasSplitIrqchip) {
    throw invalidArgument('irqchip', "'full' or 'none', since this host's KVM has no split irqchip,", irqchip)
  }
  if (irqchip !== 'auto') return irqchip
  return cpus === 1 && SMALL_KERNEL_FORMATS.includes(format) ? 'none' : 'full'
}

/** What a bzImage unpacks to; undefined for one that unpacks itself, and for other images. */
async function unpackKernel(
  { kernel, memorySize }: CheckedOptions,
  image: Uint8Array,
  format: NamedImageFormat,
): Promise<Uint8Array | undefined> {
  if (format === 'bzimage')
    return kernel.unpack === false ? undefined : await unpackPayload(image, memorySize)
  if (kernel.unpack === undefined) return undefined
  throw invalidArgument(
    'kernel.unpack',
    `nothing for an image of format '${format}', which is not packed,`,
    kernel.unpack,
  )
}

/** Formats that no operating system's boot protocol goes with. */
const SMALL_KERNEL_FORMATS: readonly NamedImageFormat[] = ['flat', 'elf', 'elf32', 'elf64']

/** Real mode has no way to pass a command line: what nobody asked for must not be what create() refuses. */
function wantsVirtioParameters(kernel: KernelOptions, format: NamedImageFormat): boolean {
  return kernel.virtioParameters ?? !(format === 'flat' && (kernel.mode ?? 'real') === 'real')
}

function wantsTables({ firmwareTables, memorySize }: CheckedOptions, irqchip: Irqchip): boolean {
  return firmwareTables ?? (irqchip !== 'none' && memorySize >= HIGH_MEMORY_START)
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

/** Bit 8 of IA32_APIC_BASE: the bootstrap processor (Intel SDM vol. 3, "Local APIC Status and Location"). */
const APIC_BASE_BSP = 1n << 8n

/** Every vCPU starts in the kernel's mode, and without a local APIC only the first one runs. */
function initialize(vcpu: Vcpu, state: BootImage['state'], isFirst: boolean, hasLocalApic: boolean): void {
  const reset = Object.fromEntries(REGISTER_NAMES.map((name) => [name, 0n])) as unknown as Registers
  const { apicBase } = state.specialRegisters
  vcpu.setSregs({
    ...state.specialRegisters,
    // KVM shows the guest a local APIC (CPUID leaf 1, EDX bit 9) where this says that it is enabled.
    apicBase: hasLocalApic ? (isFirst ? apicBase : apicBase & ~APIC_BASE_BSP) : 0n,
  })
  vcpu.setRegs({ ...reset, rflags: RFLAGS_RESERVED, ...state.registers })
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
