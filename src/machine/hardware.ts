import type { CpuMode, ImageFormat } from '../boot/boot-image.js'
import type { Device } from '../bus/device.js'
import type { CpuidEntry } from '../kvm/cpuid.js'
import type { BlockBackend } from '../virtio/block-backend.js'
import type { VirtioDevice } from '../virtio/virtio-device.js'
import type { CpuChoice } from './host.js'
import type { Irqchip } from './interrupts.js'
import type { ConsoleOptions, DiskOptions } from './options.js'

/** What was booted. */
export interface BootInfo {
  readonly format: ImageFormat
  /** The mode of the first instruction. */
  readonly mode: CpuMode
  /** Guest-physical address of the first instruction. */
  readonly entry: number
}

/**
 * What a machine consists of, but for what is in its memory, registers and devices: plain data, and the same for all
 * copies of a machine.
 */
export interface Hardware {
  readonly boot: BootInfo
  /** Bytes of RAM. */
  readonly memorySize: number
  readonly hugePages: '2M' | '1G' | undefined
  /** What was asked for as a processor, … */
  readonly cpu: CpuChoice
  /** … the CPUID that came of it, for each vCPU, … */
  readonly cpuid: readonly (readonly CpuidEntry[])[]
  /** … and the id of each vCPU's local APIC, which KVM takes for the vCPU's own. */
  readonly apicIds: readonly number[]
  readonly irqchip: Irqchip
  /** Guest-physical address of the VM generation ID; undefined without firmware tables. */
  readonly generationId: number | undefined
  /** The kernel's command line, as fw_cfg shows it. */
  readonly cmdline: string
  readonly fwCfgFiles: ReadonlyMap<string, Uint8Array>
  readonly disks: readonly Pick<DiskOptions, 'serial' | 'queues'>[]
  readonly console: ConsoleOptions | undefined
  readonly agent: boolean
  readonly rng: { readonly bytesPerSecond?: number } | undefined
}

/** What a machine is connected to: it belongs to this process, and each copy needs its own. */
export interface Attachments {
  /** Opened, one for each of {@link Hardware.disks}. */
  readonly disks: readonly BlockBackend[]
  readonly devices: readonly Device[]
  readonly virtio: readonly VirtioDevice[]
  /** Where virtio-rng has its bytes from. */
  readonly rngSource: ((bytes: Uint8Array) => void) | undefined
}
