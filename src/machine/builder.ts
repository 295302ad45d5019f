import { DebugOutput } from '../backends/debug-output.js'
import { SerialPort } from '../backends/serial-port.js'
import { type BootImage, loadImage } from '../boot/index.js'
import { attachDevice, checkDevice } from '../bus/attach-device.js'
import { Bus } from '../bus/bus.js'
import type { Device } from '../bus/device.js'
import { AcpiPm } from '../devices/acpi-pm.js'
import { DebugConsole } from '../devices/debug-console.js'
import { DebugExit } from '../devices/debug-exit.js'
import { FwCfg } from '../devices/fw-cfg.js'
import { KeyboardController } from '../devices/keyboard-controller.js'
import { PostCode } from '../devices/post-code.js'
import { ResetControl } from '../devices/reset-control.js'
import { Rtc } from '../devices/rtc.js'
import { Uart } from '../devices/serial.js'
import { TextScreen } from '../devices/text-screen.js'
import { hex, invalidArgument, NodevisorError } from '../errors.js'
import { checkFirmwareRoom, type FirmwareTables, placeFirmwareTables } from '../firmware/index.js'
import { unconnectedLine } from '../interrupts/interrupt-line.js'
import { TimerFds } from '../interrupts/timer.js'
import { type CpuidEntry, encodeCpuid } from '../kvm/cpuid.js'
import { Kvm } from '../kvm/kvm.js'
import { REGISTER_NAMES, type Registers } from '../kvm/registers.js'
import type { Vcpu } from '../kvm/vcpu.js'
import type { Vm } from '../kvm/vm.js'
import { GuestMemory, type MappedRegion } from '../memory/guest-memory.js'
import { GuestRam } from '../memory/guest-ram.js'
import {
  HIGH_MEMORY_START,
  KVM_IDENTITY_MAP_ADDRESS,
  KVM_TSS_ADDRESS,
  type RamRegion,
  ramRegions,
} from '../memory/layout.js'
import { Dispatcher } from './dispatcher.js'
import { readImage, readModules } from './image-files.js'
import { createInterrupts, type Interrupts, type Irqchip } from './interrupts.js'
import type { CheckedOptions } from './options.js'
import { PostedWrites } from './posted-writes.js'

/** Everything a machine is made of, ready to run. */
export interface MachineParts {
  readonly boot: BootImage
  readonly memory: GuestMemory
  readonly vcpus: readonly Vcpu[]
  readonly ports: Bus
  readonly mmio: Bus
  readonly interrupts: Interrupts
  readonly clock: TimerFds
  readonly posted: PostedWrites
  readonly dispatcher: Dispatcher
  readonly serial: SerialPort
  readonly debugConsole: DebugOutput
  readonly screen: TextScreen
  readonly postCode: PostCode
  readonly acpiPm: AcpiPm
  /** Gives everything back to the host. @param why - a clause for those who still wait */
  close(why: string): void
}

/** Bit 1 of RFLAGS is always set (Intel SDM vol. 1, 3.4.3). */
const RFLAGS_RESERVED = 2n

/** What all machines of an environment share: `/dev/kvm` and what it says. */
interface Host {
  readonly kvm: Kvm
  readonly maxVcpus: number
  readonly ringPage: number
  readonly hasSplitIrqchip: boolean
  readonly cpuid: readonly CpuidEntry[]
}

let host: Host | undefined

function openHost(): Host {
  if (host === undefined) {
    const kvm = new Kvm()
    const ringPage = kvm.checkExtension('COALESCED_PIO') > 0 ? kvm.checkExtension('COALESCED_MMIO') : 0
    host = {
      kvm,
      maxVcpus: Math.max(1, kvm.checkExtension('MAX_VCPUS')),
      ringPage,
      hasSplitIrqchip: kvm.checkExtension('SPLIT_IRQCHIP') > 0,
      cpuid: kvm.getSupportedCpuid(),
    }
  }
  return host
}

/** The one place that knows what a machine is made of: checked options in, a machine at its reset vector out. */
export async function buildMachine(options: CheckedOptions): Promise<MachineParts> {
  for (const device of options.devices) checkDevice(device)
  const { kvm, maxVcpus, ringPage, cpuid } = openHost()
  if (options.cpus > maxVcpus) {
    throw invalidArgument('cpus', `at most ${maxVcpus}, what this host's KVM can have,`, options.cpus)
  }
  const { kernel, memorySize } = options
  let tables: FirmwareTables | undefined
  const firmware = () => {
    const wanted = options.firmwareTables ?? (options.irqchip !== 'none' && memorySize >= HIGH_MEMORY_START)
    if (wanted) tables ??= placeFirmwareTables({ cpus: options.cpus, virtio: [], memorySize })
    return tables
  }
  const boot = loadImage(await readImage(kernel.image), {
    // Only protocols that operating systems boot by ask for them.
    get rsdp() {
      return firmware()?.segments.find(({ address }) => address === tables!.rsdp)?.bytes
    },
    get rsdpAddress() {
      return firmware()?.rsdp
    },
    memorySize,
    format: kernel.format,
    mode: kernel.mode,
    at: kernel.at,
    cmdline: kernel.cmdline ?? '',
    modules: await readModules(kernel),
  })
  const irqchip = chooseIrqchip(options, boot)
  if (irqchip !== 'none' || options.firmwareTables) firmware()
  if (tables !== undefined) checkFirmwareRoom(tables, boot.segments)

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
    const vm = kvm.createVm()
    closers.push(() => vm.close())
    // VT-x runs real mode with the help of these pages; elsewhere KVM ignores them.
    vm.setIdentityMapAddr(KVM_IDENTITY_MAP_ADDRESS)
    vm.setTssAddr(KVM_TSS_ADDRESS)
    const memory = new GuestMemory(mapRam(vm, ram, regions), () => ram.close())
    for (const { address, bytes } of [...boot.segments, ...(tables?.segments ?? [])]) {
      memory.write(address, bytes)
    }
    // After the memory slots: with a full irqchip each change of them costs milliseconds.
    const interrupts = createInterrupts(irqchip, vm)
    const clock = new TimerFds()
    closers.push(() => clock.close())

    const vcpus = Array.from({ length: options.cpus }, (_, id) => {
      const vcpu = vm.createVcpu(id)
      closers.push(() => vcpu.close())
      vcpu.native.setCpuid2(cpuidFor(cpuid, id))
      initialize(vcpu, boot)
      return vcpu
    })

    const ports = new Bus('port')
    const mmio = new Bus('mmio')
    const posted = new PostedWrites(vm, vcpus[0]!, ringPage, ports, mmio, (error) => dispatcher.fail(error))
    const dispatcher = new Dispatcher(ports, mmio, posted, (vector) => interrupts.endOfInterrupt(vector))
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
      new ResetControl({ onReset: () => dispatcher.end({ reason: 'reset', by: 'reset control' }) }),
      acpiPm,
      new FwCfg({
        memorySize,
        cpus: options.cpus,
        cmdline: kernel.cmdline ?? '',
        files: options.fwCfgFiles,
      }),
      new Rtc({ memorySize }),
      screen,
    ]
    for (const device of [...own, ...options.devices]) {
      attachDevice(device, ports, mmio)
      checkBesideRam(device, regions)
    }
    for (const device of [...own, ...options.devices]) {
      device.attach?.({
        memory,
        interrupt:
          device.irq === undefined
            ? unconnectedLine
            : (interrupts.lines?.line(device.irq) ?? unconnectedLine),
        clock,
        stop: () => dispatcher.end({ reason: 'stopped', by: 'device' }),
      })
    }
    return {
      boot,
      memory,
      vcpus,
      ports,
      mmio,
      interrupts,
      clock,
      posted,
      dispatcher,
      serial,
      debugConsole,
      screen,
      postCode,
      acpiPm,
      close(why) {
        interrupts.close()
        serial.close(why)
        debugConsole.close(why)
        memory.close()
        closeAll()
      },
    }
  } catch (error) {
    closeAll()
    throw error
  }
}

/** Operating systems look for interrupt controllers; small kernels end with `hlt`, which those would not let exit. */
function chooseIrqchip({ irqchip, cpus }: CheckedOptions, { format }: BootImage): Irqchip {
  const { hasSplitIrqchip } = openHost()
  if (irqchip === 'split' && !hasSplitIrqchip) {
    throw invalidArgument('irqchip', "'full' or 'none', since this host's KVM has no split irqchip,", irqchip)
  }
  if (irqchip !== 'auto') return irqchip
  if (cpus === 1 && (format === 'flat' || format === 'elf')) return 'none'
  return 'full'
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

const CPUID_LEAF_FEATURES = 1
const INITIAL_APIC_ID_SHIFT = 24

/** The host's CPUID as its KVM offers it, with the vCPU's own APIC id (Intel SDM vol. 2, CPUID leaf 01H). */
function cpuidFor(entries: readonly CpuidEntry[], id: number): Uint8Array {
  return encodeCpuid(
    entries.map((entry) =>
      entry.function === CPUID_LEAF_FEATURES
        ? { ...entry, ebx: ((entry.ebx & 0xff_ffff) | (id << INITIAL_APIC_ID_SHIFT)) >>> 0 }
        : entry,
    ),
  )
}

/** Bit 8 of IA32_APIC_BASE: the bootstrap processor (Intel SDM vol. 3, "Local APIC Status and Location"). */
const APIC_BASE_BSP = 1n << 8n

/** Every vCPU starts in the kernel's mode; only the first one runs. */
function initialize(vcpu: Vcpu, { state }: BootImage): void {
  const reset = Object.fromEntries(REGISTER_NAMES.map((name) => [name, 0n])) as unknown as Registers
  const { apicBase } = state.specialRegisters
  vcpu.setSregs({
    ...state.specialRegisters,
    apicBase: vcpu.id === 0 ? apicBase : apicBase & ~APIC_BASE_BSP,
  })
  vcpu.setRegs({ ...reset, rflags: RFLAGS_RESERVED, ...state.registers })
}

/** RAM hides a device behind it: the guest would never reach it. */
function checkBesideRam(device: Device, regions: readonly RamRegion[]): void {
  for (const { base, length } of checkDevice(device).mmio) {
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
