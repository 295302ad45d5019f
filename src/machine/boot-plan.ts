import type { BootImage, BootSegment } from '../boot/boot-image.js'
import { detectFormat, loadImage, type NamedImageFormat } from '../boot/index.js'
import { unpackPayload } from '../boot/linux-payload.js'
import { invalidArgument } from '../errors.js'
import { checkFirmwareRoom, placeFirmwareTables } from '../firmware/index.js'
import { REGISTER_NAMES, type Registers } from '../kvm/registers.js'
import type { Vcpu } from '../kvm/vcpu.js'
import type { GuestMemory } from '../memory/guest-memory.js'
import { BASE_MEMORY_SIZE, HIGH_MEMORY_START, LOW_MEMORY_END } from '../memory/layout.js'
import type { VirtioMmio } from '../virtio/virtio-mmio.js'
import type { Hardware } from './hardware.js'
import type { Host } from './host.js'
import { readImage, readInitrd, readModules } from './image-files.js'
import type { Irqchip } from './interrupts.js'
import type { CheckedOptions, KernelOptions } from './options.js'
import { describeForFirmware, virtioParameters } from './virtio-devices.js'

/** What has to be in a machine for its kernel to start. */
export interface BootPlan {
  readonly hardware: Hardware
  /** What goes into memory. */
  readonly segments: readonly BootSegment[]
  /** Whether there are firmware tables. */
  readonly hasTables: boolean
  /** The registers of each vCPU. */
  readonly state: BootImage['state']
}

/** Reads a kernel, and decides what machine it gets. */
export async function planBoot(
  options: CheckedOptions,
  host: Host,
  virtio: readonly VirtioMmio[],
): Promise<BootPlan> {
  const { kernel, memorySize, cpus, cpu: cpuOptions } = options
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
  const indices = Array.from({ length: cpus }, (_, index) => index)
  const apicIds = indices.map((index) => cpu.apicId(index))
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
  if (tables !== undefined) checkFirmwareRoom(tables, boot.segments)
  if (boot.mode === 'long' && !cpu.features.includes('lm')) {
    throw invalidArgument('cpu', "a processor with 'lm', as the kernel starts in long mode,", cpuOptions)
  }
  return {
    hardware: {
      boot: { format: boot.format, mode: boot.mode, entry: boot.entry },
      memorySize,
      hugePages: options.hugePages,
      cpu: cpuOptions,
      cpuid: indices.map((index) => cpu.entriesFor(index)),
      apicIds,
      irqchip,
      generationId: tables?.generationId,
      cmdline,
      fwCfgFiles: options.fwCfgFiles,
      disks: options.disks.map(({ serial, queues }) => ({
        ...(serial === undefined ? {} : { serial }),
        ...(queues === undefined ? {} : { queues }),
      })),
      console: options.console,
      agent: options.agent,
      rng: options.rng === undefined ? undefined : rateOf(options.rng),
    },
    segments: [...boot.segments, ...(tables?.segments ?? [])],
    hasTables: tables !== undefined,
    state: boot.state,
  }
}

/** Puts the kernel into memory, and all vCPUs at its first instruction. Without a local APIC only the first one runs. */
export function loadBootPlan(plan: BootPlan, memory: GuestMemory, vcpus: readonly Vcpu[]): void {
  const { hardware, segments, hasTables, state } = plan
  if (hasTables) memory.writeUint16(BASE_MEMORY_SIZE, LOW_MEMORY_END / 1024)
  for (const { address, bytes } of segments) memory.write(address, bytes)
  for (const [index, vcpu] of vcpus.entries()) {
    initialize(vcpu, state, index === 0, hardware.irqchip !== 'none')
  }
}

function rateOf({ bytesPerSecond }: { readonly bytesPerSecond?: number }): Hardware['rng'] {
  return bytesPerSecond === undefined ? {} : { bytesPerSecond }
}

/** Operating systems look for interrupt controllers; small kernels end with `hlt`, which those would not let exit. */
function chooseIrqchip({ irqchip, cpus }: CheckedOptions, format: NamedImageFormat, host: Host): Irqchip {
  if (irqchip === 'split' && !host.hasSplitIrqchip) {
    throw invalidArgument('irqchip', "'full' or 'none', since this host's KVM has no split irqchip,", irqchip)
  }
  if (irqchip !== 'auto') return irqchip
  return cpus === 1 && SMALL_KERNEL_FORMATS.includes(format) ? 'none' : 'full'
}

/** Formats that no operating system's boot protocol goes with. */
const SMALL_KERNEL_FORMATS: readonly NamedImageFormat[] = ['flat', 'elf', 'elf32', 'elf64']

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

/** Real mode has no way to pass a command line: what nobody asked for must not be what create() refuses. */
function wantsVirtioParameters(kernel: KernelOptions, format: NamedImageFormat): boolean {
  return kernel.virtioParameters ?? !(format === 'flat' && (kernel.mode ?? 'real') === 'real')
}

function wantsTables({ firmwareTables, memorySize }: CheckedOptions, irqchip: Irqchip): boolean {
  return firmwareTables ?? (irqchip !== 'none' && memorySize >= HIGH_MEMORY_START)
}

/** Bit 1 of RFLAGS is always set (Intel SDM vol. 1, 3.4.3). */
const RFLAGS_RESERVED = 2n

/** Bit 8 of IA32_APIC_BASE: the bootstrap processor (Intel SDM vol. 3, "Local APIC Status and Location"). */
const APIC_BASE_BSP = 1n << 8n

/** Every vCPU starts in the kernel's mode. */
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
