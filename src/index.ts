/**
 * Virtual machines on KVM, from Node.js.
 *
 * @module
 */
export type { ConsolePort } from './backends/console-port.js'
export type { DebugOutput } from './backends/debug-output.js'
export type { FileIdentity } from './backends/disk-file.js'
export { FileDisk, type FileDiskOptions } from './backends/file-disk.js'
export type {
  AgentOptions,
  ExecOptions,
  ExecResult,
  GuestAgent,
  GuestExit,
  GuestProcess,
  ReadFileOptions,
  SpawnOptions,
  WriteFileOptions,
} from './backends/guest-agent.js'
export type { GuestPort } from './backends/guest-port.js'
export { MemoryDisk, type MemoryDiskOptions } from './backends/memory-disk.js'
export type { OutputMatch, WaitOptions } from './backends/output-waiters.js'
export { OverlayDisk, type OverlayDiskOptions } from './backends/overlay-disk.js'
export type { SerialPort } from './backends/serial-port.js'
export { type CpuMode, IMAGE_FORMATS, type ImageFormat, type NamedImageFormat } from './boot/index.js'
export {
  type InitramfsEntry,
  type InitramfsOptions,
  type InitramfsSource,
  initramfs,
} from './boot/initramfs.js'
export type { UnclaimedAccesses } from './bus/bus.js'
export type {
  AccessSize,
  Device,
  DeviceHost,
  DeviceState,
  Doorbell,
  MmioRange,
  PortRange,
  Range,
} from './bus/device.js'
export type { CpuOptions } from './cpu/cpu-model.js'
export type { CpuFeature, CpuFeatureName } from './cpu/features.js'
export { CPU_BASELINES, CPU_MODELS, type CpuModelName } from './cpu/models.js'
export type { CpuTopology } from './cpu/topology.js'
export type { ScreenCell, ScreenCursor, TextScreen } from './devices/text-screen.js'
export { ERROR_CODES, type ErrorCode, type ErrorFacts, NodevisorError } from './errors.js'
export type { InterruptLine } from './interrupts/interrupt-line.js'
export type { Clock, Timer } from './interrupts/timer.js'
export type { VcpuExit } from './kvm/exits.js'
export { type HostInfo, type HostKind, inspectHost } from './kvm/host.js'
export type { DescriptorTable, Registers, Segment, SpecialRegisters } from './kvm/registers.js'
export type { CopyOptions } from './machine/copy-options.js'
export type { ExitRecord } from './machine/exit-log.js'
export type { BootInfo } from './machine/hardware.js'
export type { Irqchip } from './machine/interrupts.js'
export type {
  ConsoleOptions,
  DiskOptions,
  ExecutionMode,
  ImageSource,
  KernelOptions,
  ModuleOptions,
  VirtualMachineOptions,
} from './machine/options.js'
export type { PendingException, ProcessorMode, RunReport, VcpuReport } from './machine/report.js'
export type { ExitCounts, Outcome, Reason, RunFacts, RunResult } from './machine/result.js'
export { Snapshot } from './machine/snapshot.js'
export type { CheckpointOptions, SnapshotFileOptions } from './machine/snapshot-files.js'
export type { VirtualCpu, VirtualCpuState } from './machine/virtual-cpu.js'
export {
  type CpuInfo,
  type MachineStatistics,
  type MigrateOptions,
  type ReceiveOptions,
  type RunOptions,
  type StepOptions,
  type StepResult,
  type VirtioDeviceInfo,
  VirtualMachine,
} from './machine/virtual-machine.js'
export type { GuestMemory } from './memory/guest-memory.js'
export type { MigrationTarget } from './migration/connect.js'
export type { MigrationProgress, MigrationResult } from './migration/send.js'
export type { SnapshotProgress } from './snapshot/memory-file.js'
export type { SnapshotInfo } from './snapshot/snapshot-folder.js'
export type { BlockBackend } from './virtio/block-backend.js'
export type { ConsoleSize } from './virtio/console.js'
export type { DescriptorChain, ScatterList } from './virtio/descriptor-chain.js'
export type { VirtioEntropyOptions } from './virtio/entropy.js'
export type { VirtioDevice, VirtioDriver, VirtioQueueOptions } from './virtio/virtio-device.js'
export type { VirtioStatistics } from './virtio/virtio-function.js'
export type { Virtqueue } from './virtio/virtqueue.js'
