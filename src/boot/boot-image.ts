import type { Registers, SpecialRegisters } from '../kvm/registers.js'

/** The processor mode a guest starts in. */
export type CpuMode = 'real' | 'protected' | 'long'

/** Image formats that can be booted. */
export type ImageFormat = 'flat' | 'elf' | 'multiboot' | 'multiboot2' | 'pvh' | 'bzimage' | 'linux'

/** Bytes that a loader wants at a guest-physical address. */
export interface BootSegment {
  /** What this is, for error messages: `kernel`, `page tables`, `module 0`, … */
  readonly name: string
  readonly address: number
  readonly bytes: Uint8Array
  /** Bytes of memory it takes; what `bytes` does not fill is zero. Never less than `bytes.length`. */
  readonly size: number
}

/** How a vCPU starts. Registers not named are 0, but for bit 1 of RFLAGS. */
export interface CpuState {
  readonly registers: Partial<Registers>
  readonly specialRegisters: SpecialRegisters
}

/** A module: a file handed to the guest beside the kernel. */
export interface BootModule {
  readonly bytes: Uint8Array
  /** The text the guest finds beside it. */
  readonly cmdline: string
}

/** What a loader is told. */
export interface BootOptions {
  /** Bytes of guest RAM, from address 0 on (with a hole below 4 GiB, see `memory/layout.ts`). */
  readonly memorySize: number
  readonly cmdline: string
  readonly modules: readonly BootModule[]
  /** Linux's initramfs, which PVH hands over as its first module; none when undefined. */
  readonly initrd?: Uint8Array | undefined
  /** What a bzImage's payload unpacks to; when undefined, the bzImage unpacks itself in the guest. */
  readonly payload?: Uint8Array | undefined
  /** Load address of a flat image; the mode's default when undefined. */
  readonly at: number | undefined
  /** Mode of a flat image; `real` when undefined. Any other format knows its own. */
  readonly mode: CpuMode | undefined
  /** The ACPI 2.0 Root System Description Pointer, for protocols that hand over a copy; none if undefined. */
  readonly rsdp?: Uint8Array | undefined
  /** Its guest-physical address, for protocols that hand over that; none when undefined. */
  readonly rsdpAddress?: number | undefined
}

/** What every loader makes of an image: bytes at addresses and a vCPU state. */
export interface BootImage {
  readonly format: ImageFormat
  readonly mode: CpuMode
  /** Guest-physical address of the first instruction. */
  readonly entry: number
  /** None overlaps another, and all lie in RAM. */
  readonly segments: readonly BootSegment[]
  readonly state: CpuState
}
