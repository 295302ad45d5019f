import { resolve } from 'node:path'
import type { Duplex } from 'node:stream'
import { setImmediate as nextTurn } from 'node:timers/promises'
import type { ConnectionOptions, TlsOptions } from 'node:tls'
import type { ConsolePort } from '../backends/console-port.js'
import type { DebugOutput } from '../backends/debug-output.js'
import type {
  ExecOptions,
  ExecResult,
  GuestAgent,
  GuestProcess,
  ReadFileOptions,
  SpawnOptions,
  WriteFileOptions,
} from '../backends/guest-agent.js'
import type { SerialPort } from '../backends/serial-port.js'
import type { UnclaimedAccesses } from '../bus/bus.js'
import type { ResolvedCpu } from '../cpu/cpu-model.js'
import type { TextScreen } from '../devices/text-screen.js'
import { invalidArgument, NodevisorError, show } from '../errors.js'
import type { VcpuExit } from '../kvm/exits.js'
import { GUEST_DEBUG } from '../kvm/vcpu-state.js'
import type { GuestMemory } from '../memory/guest-memory.js'
import { MachineRam } from '../memory/machine-ram.js'
import { checkStream, checkTarget, connectTo, type MigrationTarget, secured } from '../migration/connect.js'
import {
  checkNotKept,
  describeDisks,
  openMovedDisks,
  reclaimDisks,
  reclaimDisksNow,
  releaseDisks,
} from '../migration/disks.js'
import { moveError, receiveError } from '../migration/errors.js'
import { Connection } from '../migration/protocol.js'
import { receiveMachine } from '../migration/receive.js'
import { checkReceived, checkSizes } from '../migration/record.js'
import {
  type MigrationProgress,
  type MigrationResult,
  type MigrationSource,
  sendMachine,
} from '../migration/send.js'
import { type SnapshotInfo, writeSnapshot } from '../snapshot/snapshot-folder.js'
import type { SnapshotParent } from '../snapshot/state-file.js'
import { VirtioBlock } from '../virtio/block.js'
import type { BlockBackend } from '../virtio/block-backend.js'
import type { VirtioStatistics } from '../virtio/virtio-function.js'
import type { VirtioMmio } from '../virtio/virtio-mmio.js'
import { buildCopy, buildMachine, type MachineParts } from './builder.js'
import { CheckpointFolder } from './checkpoint-folder.js'
import { type CopyOptions, checkCopyOptions } from './copy-options.js'
import { DiskRecording } from './disk-records.js'
import { openCopies, viewDisks } from './disk-views.js'
import { closeDisks, openDisks } from './disks.js'
import type { StepMode } from './dispatcher.js'
import { drainRequests } from './drain.js'
import { acquireExecution } from './execution.js'
import type { Attachments, BootInfo } from './hardware.js'
import type { Irqchip } from './interrupts.js'
import { restoreMachineState, saveMachineState } from './machine-state.js'
import { checkObject, checkOptions, type ExecutionMode, type VirtualMachineOptions } from './options.js'
import { linearRipOf } from './report.js'
import { canGoOn, describeOutcome, type Outcome, type RunResult } from './result.js'
import { Run, type RunEnd } from './run.js'
import type { SavedMachine } from './saved-machine.js'
import { Snapshot } from './snapshot.js'
import {
  type CheckpointOptions,
  checkCheckpointOptions,
  checkSnapshotFileOptions,
  checkSnapshotPath,
  describeHost,
  readSnapshotFolder,
  type SnapshotFileOptions,
} from './snapshot-files.js'
import { type CpuOwner, VirtualCpu } from './virtual-cpu.js'

/** How long a run may take. */
export interface RunOptions {
  /** Stops the run: reason `stopped`, by `abort` (or by `timeout`, for `AbortSignal.timeout`). */
  readonly signal?: AbortSignal
  /** Milliseconds after which the run is stopped: reason `stopped`, by `timeout`. */
  readonly timeout?: number
}

/** How far a step goes. */
export interface StepOptions extends RunOptions {
  /** Index of the vCPU that runs: the first that can unless given. */
  readonly vcpu?: number
}

/** How a machine is moved. */
export interface MigrateOptions {
  /** Gives it up: the machine goes on here, unless it is the other side's already. */
  readonly signal?: AbortSignal
  /** Called as memory is sent. */
  readonly onProgress?: (progress: MigrationProgress) => void
  /** To go through TLS: options of `tls.connect()`, such as `ca`, `cert` and `key`. */
  readonly tls?: ConnectionOptions
}

/** What a machine that is received needs of this process. */
export interface ReceiveOptions extends CopyOptions {
  /**
   * Folders in which the files of the machine's disks may be: the other side names them. None unless given, and then a
   * machine with disks is taken only with `disks`.
   */
  readonly diskFolders?: readonly string[]
  /** Gives it up, unless the machine is here already. */
  readonly signal?: AbortSignal
  /** To go through TLS: options of `tls.createServer()`, such as `cert` and `key`, and `ca` with `requestCert`. */
  readonly tls?: TlsOptions
}

/** Where a step ended. */
export interface StepResult {
  /** The vCPU that ran. */
  readonly vcpu: number
  /** The exit, with its data as it was after the device had handled it; undefined if the step was stopped before. */
  readonly exit: VcpuExit | undefined
  /** How the run ended, if this step ended it. */
  readonly result: RunResult | undefined
}

/** What a machine has counted in its life. */
export interface MachineStatistics {
  /** Accesses to ports that nobody claims: they read as all ones. */
  readonly unclaimedPorts: UnclaimedAccesses
  /** Accesses to addresses where neither RAM nor a device is: they read as all ones. */
  readonly unclaimedMmio: UnclaimedAccesses
  /** Bytes of serial output that were lost because nobody read them. */
  readonly serialDroppedBytes: number
}

/** A virtio device as its driver left it. */
export interface VirtioDeviceInfo {
  readonly name: string
  /** VIRTIO 1.2, 5: 2 for a disk, 3 for a console, 4 for rng. */
  readonly deviceType: number
  /** Guest-physical address of its virtio-mmio registers. */
  readonly address: number
  readonly irq: number
  /** The status field: 4 (DRIVER_OK) is set where a driver has it, 64 where it needs a reset. */
  readonly status: number
  /** Features that the driver accepted. */
  readonly features: bigint
  /** Which rule the driver broke, where the device needs a reset. */
  readonly problem?: string
  /** Of a disk: requests that failed on the host. */
  readonly errors?: number
  /** Of a disk: why the last of them did. */
  readonly lastError?: unknown
  readonly statistics: VirtioStatistics
}

/** The processors of a machine, see `docs/cpu.md`. */
export type CpuInfo = Pick<ResolvedCpu, 'model' | 'topology' | 'features' | 'ignored'>

/** A machine on its way to another process. */
interface Move {
  readonly stop: AbortController
  /** Whether it runs here meanwhile, does nothing any more, or nobody knows where it runs. */
  phase: 'copying' | 'leaving' | 'unsure'
  /** Settles with the attempt. */
  over: Promise<void>
}

const MIGRATE_KEYS = ['signal', 'onProgress', 'tls'] as const
const RUN_KEYS = ['signal', 'timeout'] as const
const STEP_KEYS = [...RUN_KEYS, 'vcpu'] as const
const MAX_TIMEOUT = 2 ** 31 - 1
const HLT = 0xf4

/**
 * A machine: processors, memory and devices around a kernel.
 *
 * @example
 * ```ts
 * await using vm = await VirtualMachine.create({ kernel: 'hello.elf' })
 * vm.serial.pipe(process.stdout)
 * const result = await vm.run({ timeout: 5000 })
 * console.log(result.reason)
 * ```
 */
export class VirtualMachine {
  /** The first serial port (COM1), a stream in both directions. */
  readonly serial: SerialPort
  /** The text screen. */
  readonly screen: TextScreen
  /** What the guest writes to port 0xe9, a readable stream. */
  readonly debugConsole: DebugOutput
  /** Guest-physical memory. */
  readonly memory: GuestMemory
  /** The processors, while the machine stands still. */
  readonly vcpus: readonly VirtualCpu[]
  /** What was booted. */
  readonly boot: BootInfo
  /** Where the interrupt controllers are. */
  readonly irqchip: Irqchip
  readonly #parts: MachineParts
  readonly #execution: ExecutionMode
  #run: Run | undefined
  /** The run that {@link pause} holds. */
  #paused: Run | undefined
  /** The last snapshot that this machine was written to, or came from. */
  #lastWritten: SnapshotParent | undefined
  /** Where {@link checkpoint} takes them, once it has. */
  #checkpoints: CheckpointFolder | undefined
  /** Settles when no snapshot is being written. */
  #writing: Promise<void> = Promise.resolve()
  #ended: Outcome | undefined
  #move: Move | undefined
  #closing: Promise<void> | undefined

  private constructor(parts: MachineParts, execution: ExecutionMode) {
    this.#parts = parts
    this.#execution = execution
    this.serial = parts.serial
    this.screen = parts.screen
    this.debugConsole = parts.debugConsole
    this.memory = parts.memory
    this.boot = parts.hardware.boot
    const { interrupts } = parts
    const owner: CpuOwner = {
      checkStopped: () => this.#checkStopped(),
      cpuStarted: (cpu) => this.#run?.started(cpu),
      interrupt: (cpu, vector) => {
        this.#checkOpen()
        interrupts.interrupt(cpu.index, cpu.unsafeVcpu.id, vector)
      },
      externalOf: (index) => interrupts.externalOf(index),
      hasLocalApic: interrupts.irqchip !== 'none',
    }
    this.vcpus = parts.vcpus.map((vcpu, index) => new VirtualCpu(owner, index, vcpu))
    interrupts.onExternal = (index) => this.#run?.interrupt(this.vcpus[index]!)
    this.irqchip = interrupts.irqchip
  }

  /**
   * Makes a machine with its kernel loaded, at the kernel's first instruction.
   *
   * @throws `ERR_INVALID_ARGUMENT`, `ERR_UNKNOWN_OPTION`, `ERR_MEMORY_SIZE`, `ERR_BUS_OVERLAP`
   * @throws `ERR_IMAGE_*`, `ERR_BOOT_NO_ROOM`
   * @throws `ERR_KVM_NOT_FOUND`, `ERR_KVM_PERMISSION`, `ERR_ADDON_LOAD`, `ERR_SYSCALL`
   */
  static async create(options: VirtualMachineOptions): Promise<VirtualMachine> {
    const checked = checkOptions(options)
    return new VirtualMachine(await buildMachine(checked), checked.execution)
  }

  /**
   * Makes a machine of a snapshot: it goes on where the other one was, once {@link run} is called. Its memory is that of
   * the snapshot until it writes to it. The guest's clocks have gone on in the meantime, and it is told that it is a copy
   * (VM generation ID), so that it makes new random seeds.
   *
   * A snapshot in a folder may say which files its disks are: restore only what you trust, or pass `disks`. The folder
   * has to stay as it is while there are machines of it.
   *
   * @param snapshot - one in memory, or the path of a folder
   * @throws `ERR_SNAPSHOT_*`, `ERR_CLOSED`, and as {@link create} for options
   */
  static async restore(
    snapshot: Snapshot | string | URL,
    options: CopyOptions = {},
  ): Promise<VirtualMachine> {
    if (snapshot instanceof Snapshot) return snapshot.copy(options)
    const path = checkSnapshotPath(snapshot)
    const overlay = checkCopyOptions(options).disks === 'overlay'
    const { saved, parent, close } = await readSnapshotFolder(path, { overlay, unchanged: true })
    try {
      const machine = await VirtualMachine.#copy(saved, options)
      machine.#lastWritten = parent
      return machine
    } finally {
      close()
    }
  }

  /**
   * Makes a machine of the last checkpoint in a folder: it goes on where the other one was then, once {@link run} is
   * called, and its disks are as they were then. It takes its checkpoints in the same folder, and can be recovered itself
   * from now on. The process of the other one has to have ended, or to have closed it. See `docs/snapshots.md`.
   *
   * @param folder - what {@link checkpoint} was given. Recover only what you trust: it says which files the disks are
   * @param options - but `disks`: checkpoints belong to the disks that the machine had
   * @throws `ERR_SNAPSHOT_*`, `ERR_DISK_*`, and as {@link create} for options
   */
  static async recover(
    folder: string | URL,
    options: Omit<CopyOptions, 'disks'> = {},
  ): Promise<VirtualMachine> {
    const { disks } = checkCopyOptions(options)
    if (disks !== undefined) throw invalidArgument('disks', 'nothing: recover() needs those it had,', disks)
    const checkpoints = await CheckpointFolder.open(checkSnapshotPath(folder))
    try {
      const { saved, parent, close } = await checkpoints.read()
      try {
        const machine = await VirtualMachine.#copy(saved, options)
        try {
          await checkpoints.goOn(machine.#parts.disks)
        } catch (error) {
          await machine.close()
          throw error
        }
        machine.#lastWritten = parent
        machine.#checkpoints = checkpoints
        return machine
      } finally {
        close()
      }
    } catch (error) {
      await checkpoints.close()
      throw error
    }
  }

  static async #copy(saved: SavedMachine, options: CopyOptions): Promise<VirtualMachine> {
    const { execution, devices, virtio, disks: otherDisks, rngSource } = checkCopyOptions(options)
    const disks = typeof otherDisks === 'object' ? await openDisks(otherDisks) : await saved.openDisks()
    const machine = await VirtualMachine.#assemble(
      saved,
      { disks, devices, virtio, rngSource },
      execution ?? saved.execution,
      () => MachineRam.from(saved.memory),
    )
    try {
      machine.#parts.generation?.renew()
    } catch (error) {
      await machine.close()
      throw error
    }
    return machine
  }

  /**
   * Receives a machine that another process moves here by {@link migrate}: it stands still where it was there, and
   * {@link run} lets it go on. The other side may be anyone who can connect: let those in whom you trust to run guests
   * here, by a connection of TLS with `requestCert`, say.
   *
   * @param from - a connection, or any other stream of bytes; it is closed in the end
   * @throws `ERR_MIGRATION_FAILED`, with the `cause`: then the machine goes on at the other side.
   *   `ERR_INVALID_ARGUMENT`, `ERR_UNKNOWN_OPTION`
   */
  static async receive(from: Duplex, options: ReceiveOptions = {}): Promise<VirtualMachine> {
    checkStream('from', from)
    const { tls, diskFolders = [], signal = new AbortController().signal, ...copyOptions } = options
    const checked = checkCopyOptions(copyOptions)
    checkSignal(signal)
    if (!Array.isArray(diskFolders)) throw invalidArgument('diskFolders', 'an array of paths', diskFolders)
    let abort: (() => void) | undefined
    try {
      const connection = new Connection(await secured(from, tls, signal))
      abort = () => connection.fail(signal.reason)
      if (signal.aborted) abort()
      signal.addEventListener('abort', abort)
      const machine = await receiveMachine(connection, {
        check: (record) => checkReceived(record, checked, diskFolders),
        build: async (record, ram) => {
          const { devices, virtio, rngSource, disks: otherDisks, execution = record.execution } = checked
          const disks =
            typeof otherDisks === 'object'
              ? await openDisks(otherDisks)
              : await openMovedDisks(record.disks, diskFolders, otherDisks === 'overlay')
          const attachments = { disks, devices, virtio, rngSource }
          return VirtualMachine.#assemble(
            record,
            attachments,
            execution,
            () => ram,
            (parts) => {
              checkSizes(record, disks)
              // The other side may go on yet: not a byte is to be written to disks.
              for (const device of parts.virtio) device.function.suspend()
            },
          )
        },
      })
      for (const device of machine.#parts.virtio) device.function.resume()
      return machine
    } catch (error) {
      throw receiveError(error)
    } finally {
      if (abort !== undefined) signal.removeEventListener('abort', abort)
    }
  }

  /** A machine that is as another one was. The attachments are its own, also where this fails. */
  static async #assemble(
    saved: Pick<SavedMachine, 'hardware' | 'state'>,
    attachments: Attachments,
    execution: ExecutionMode,
    makeRam: () => MachineRam,
    prepare: (parts: MachineParts) => void = () => {},
  ): Promise<VirtualMachine> {
    let parts: MachineParts
    try {
      checkSameDisks(saved, attachments.disks)
      parts = buildCopy(saved.hardware, attachments, makeRam)
    } catch (error) {
      await closeDisks(attachments.disks)
      throw error
    }
    const machine = new VirtualMachine(parts, execution)
    try {
      prepare(parts)
      restoreMachineState(parts, machine.vcpus, saved.state)
    } catch (error) {
      await machine.close()
      throw error
    }
    return machine
  }

  /** What the guest sees of its processors, and what of the `cpu` option this host's KVM does not honour. */
  get cpu(): CpuInfo {
    const { model, topology, features, ignored } = this.#parts.cpu
    return { model, topology, features, ignored }
  }

  /** Whether a run or a step is under way, also while that is paused. */
  get running(): boolean {
    return this.#run !== undefined
  }

  /** Whether {@link pause} holds the run. */
  get paused(): boolean {
    return this.#paused !== undefined && this.#paused === this.#run
  }

  /**
   * The virtio console, a stream in both directions: a Linux guest's `hvc0`.
   *
   * @throws `ERR_NO_DEVICE` where the machine was created without `console`
   */
  get console(): ConsolePort {
    const [port] = this.#parts.consolePorts
    if (port !== undefined) return port
    throw new NodevisorError(
      'ERR_NO_DEVICE',
      'Expected a machine with a virtio console; create it with { console: true }',
    )
  }

  /**
   * A further port of the virtio console, as named by `console.ports`.
   *
   * @throws `ERR_NO_DEVICE` where there is none of that name
   */
  consolePort(name: string): ConsolePort {
    const named = this.#parts.consolePorts.slice(1)
    const port = named.find((candidate) => candidate.name === name)
    if (port !== undefined) return port
    const names = named.map(({ name }) => `'${name}'`).join(', ')
    throw new NodevisorError(
      'ERR_NO_DEVICE',
      `Expected the name of a console port (${names || 'there are none: name them in console.ports'}) but received ` +
        show(name),
      { port: name },
    )
  }

  /**
   * The agent in a Linux guest, which runs programs and moves files.
   *
   * @throws `ERR_NO_DEVICE` where the machine was created without `agent`
   */
  get agent(): GuestAgent {
    if (this.#parts.agent !== undefined) return this.#parts.agent
    throw new NodevisorError(
      'ERR_NO_DEVICE',
      'Expected a machine with a port for an agent in the guest; create it with { agent: true }',
    )
  }

  /**
   * Runs a program in a Linux guest, to its end: {@link GuestAgent.exec}. It needs the agent in there, and
   * {@link run} under way.
   *
   * @example
   * const { stdout, exitCode } = await vm.exec('uname -a')
   */
  exec(
    command: string | readonly string[],
    options: ExecOptions & { readonly encoding: 'buffer' },
  ): Promise<ExecResult<Buffer>>
  exec(command: string | readonly string[], options?: ExecOptions): Promise<ExecResult>
  async exec(
    command: string | readonly string[],
    options?: ExecOptions,
  ): Promise<ExecResult<string | Buffer>> {
    return this.agent.exec(command, options)
  }

  /** Starts a program in a Linux guest, and gives its streams: {@link GuestAgent.spawn}. */
  spawn(command: string | readonly string[], options?: SpawnOptions): GuestProcess {
    return this.agent.spawn(command, options)
  }

  /** Reads a file in a Linux guest: {@link GuestAgent.readFile}. */
  async readFile(path: string, options?: ReadFileOptions): Promise<Buffer> {
    return this.agent.readFile(path, options)
  }

  /** Writes a file in a Linux guest: {@link GuestAgent.writeFile}. */
  async writeFile(
    path: string,
    data: string | Uint8Array | AsyncIterable<string | Uint8Array>,
    options?: WriteFileOptions,
  ): Promise<void> {
    return this.agent.writeFile(path, data, options)
  }

  /** The virtio devices, in the order of their addresses: disks, console, rng, your own. */
  get virtioDevices(): readonly VirtioDeviceInfo[] {
    return this.#parts.virtio.map(describeVirtio)
  }

  /** The last 64 values the guest wrote to port 0x80, the oldest first. */
  get postCodes(): readonly number[] {
    return this.#parts.postCode.codes
  }

  get statistics(): MachineStatistics {
    return {
      unclaimedPorts: this.#parts.ports.unclaimed,
      unclaimedMmio: this.#parts.mmio.unclaimed,
      serialDroppedBytes: this.serial.droppedBytes,
    }
  }

  /**
   * Runs the guest until something ends it. Always resolves with a typed result once it has begun.
   *
   * A machine that halted, was stopped or wrote to debug-exit can run on with another call.
   *
   * @throws `ERR_RUNNING`, `ERR_ENDED`, `ERR_CLOSED`, `ERR_INVALID_ARGUMENT`
   */
  async run(options: RunOptions = {}): Promise<RunResult> {
    checkObject('run options', options, RUN_KEYS)
    const { outcome, run } = await this.#start('run', options, this.vcpus)
    return this.#finish(outcome!, run)
  }

  /**
   * Runs one vCPU to its next exit, and handles that.
   *
   * @throws as {@link run}
   */
  async step(options: StepOptions = {}): Promise<StepResult> {
    return this.#step('exit', options)
  }

  /**
   * Runs one vCPU for one instruction. The exit is of kind `debug`, or that of the access the instruction made.
   *
   * @throws as {@link run}; `ERR_SYSCALL` where the host's KVM cannot single-step
   */
  async stepInstruction(options: StepOptions = {}): Promise<StepResult> {
    return this.#step('instruction', options)
  }

  /**
   * Presses the power button, as ACPI has it: an operating system then shuts down, if it wants to. Has an effect only
   * where the guest has ACPI's interrupt enabled.
   *
   * @throws `ERR_CLOSED`
   */
  pressPowerButton(): void {
    this.#checkOpen()
    this.#parts.acpiPm.pressPowerButton()
  }

  /**
   * Lets the run under way stand still: every vCPU is out of the guest, at an instruction boundary, and every device
   * request is done. Registers can be read and set meanwhile. The run goes on with {@link resume}; its `timeout` and
   * `signal` count on. A machine that does not run stands still already.
   *
   * @throws `ERR_TIMEOUT` where a device request is not done in ten seconds: then the run goes on. `ERR_CLOSED`
   */
  async pause(): Promise<void> {
    this.#checkOpen()
    const run = this.#run
    if (run === undefined || this.#paused === run) return run?.hold().then(() => run.letGo())
    this.#paused = run
    try {
      await run.hold()
    } catch (error) {
      this.#paused = undefined
      throw error
    }
  }

  /**
   * Lets a run that {@link pause} holds go on. Without one, nothing happens. After a {@link migrate} of which nobody knows
   * how it ended, it says that the machine does not run at the other side.
   *
   * @throws `ERR_CLOSED`; `ERR_DISK_IN_USE` where it does run there
   */
  resume(): void {
    this.#checkOpen()
    if (this.#move?.phase === 'unsure') {
      reclaimDisksNow(this.#parts.disks)
      this.#stay()
    }
    const run = this.#paused
    this.#paused = undefined
    if (run !== undefined && run === this.#run) run.letGo()
  }

  /**
   * The machine as it is now, in memory. It may run: then it stands still for a moment.
   *
   * @throws `ERR_ENDED`, `ERR_CLOSED`, `ERR_TIMEOUT` as {@link pause}, `ERR_SNAPSHOT_MISMATCH` for a device that cannot
   *   save its state
   */
  snapshot(): Promise<Snapshot>
  /**
   * The machine as it is now, in a folder, from which {@link restore} makes machines. It may run: then it stands still
   * for a moment, and goes on while its memory is written. See `docs/snapshots.md`.
   *
   * @param path - of a folder that does not exist; it is there once it is whole
   * @throws `ERR_SNAPSHOT_WRITE`, and as above
   */
  snapshot(path: string | URL, options?: SnapshotFileOptions): Promise<SnapshotInfo>
  async snapshot(path?: string | URL, options: SnapshotFileOptions = {}): Promise<Snapshot | SnapshotInfo> {
    if (path === undefined) return this.#snapshotInMemory()
    checkSnapshotFileOptions(options)
    const checked = checkSnapshotPath(path)
    return this.#afterWriting(() => this.#write(checked, options))
  }

  /**
   * Takes a checkpoint: should this process be killed, {@link recover} makes a machine that goes on from here, and its
   * disks are again as they are now. It may run: then it stands still for a moment, and goes on while what has changed
   * since the last checkpoint is written. It replaces that one once it is whole. See `docs/snapshots.md`.
   *
   * @param folder - the same each time. At first it is empty, or none: then it is made
   * @throws `ERR_SNAPSHOT_WRITE`: the last checkpoint still counts, and the machine goes on; and as {@link snapshot}
   */
  async checkpoint(folder: string | URL, options: CheckpointOptions = {}): Promise<SnapshotInfo> {
    checkCheckpointOptions(options)
    const path = checkSnapshotPath(folder)
    return this.#afterWriting(() => this.#checkpoint(path, options))
  }

  async #checkpoint(path: string, options: CheckpointOptions): Promise<SnapshotInfo> {
    this.#checkOpen()
    const checkpoints = this.#checkpoints ?? (await CheckpointFolder.create(path))
    if (checkpoints.path !== resolve(path)) {
      throw invalidArgument('folder', `'${checkpoints.path}', where this machine's checkpoints are,`, path)
    }
    try {
      const info = await checkpoints.add({
        disks: this.#parts.disks,
        lastWritten: this.#lastWritten?.path,
        signal: options.signal,
        write: (to, incremental, onStill) => this.#write(to, { ...options, incremental }, onStill),
      })
      this.#checkpoints = checkpoints
      return info
    } catch (error) {
      if (this.#checkpoints === undefined) await checkpoints.close()
      throw error
    }
  }

  #snapshotInMemory(): Promise<Snapshot> {
    return this.#whileStill(async () => {
      this.#checkCanSave()
      const views = await viewDisks(this.#parts.disks)
      try {
        const saved = { ...this.#save(), openDisks: () => openCopies(views) }
        return new Snapshot(saved, VirtualMachine.#copy, async () => {
          saved.memory.close()
          await closeDisks(views)
        })
      } catch (error) {
        await closeDisks(views)
        throw error
      }
    })
  }

  /** Does something when the snapshots are written that are being written now: one after the other. */
  #afterWriting<Result>(action: () => Promise<Result>): Promise<Result> {
    const done = this.#writing.then(action)
    this.#writing = done.then(
      () => {},
      () => {},
    )
    return done
  }

  /** Writes a snapshot. @param onStill - for a checkpoint: called at the moment that it is of */
  async #write(
    path: string,
    { incremental = false, onProgress, signal }: SnapshotFileOptions,
    onStill?: () => Promise<void>,
  ): Promise<SnapshotInfo> {
    const { ram, disks } = this.#parts
    const parent = this.#lastWritten
    if (incremental && parent === undefined) {
      throw invalidArgument('incremental', 'false for the first snapshot that a machine is written to', true)
    }
    if (incremental && onStill === undefined && this.#checkpoints?.has(parent!.path)) {
      throw invalidArgument('incremental', 'false after a checkpoint, which the next ones replace,', true)
    }
    const { recording, saved, pages } = await this.#whileStill(async () => {
      this.#checkCanSave()
      const begun = await DiskRecording.begin(disks)
      try {
        await onStill?.()
        return { recording: begun, saved: this.#save(), pages: ram.takeChanges() }
      } catch (error) {
        await begun.close()
        throw error
      }
    })
    try {
      const { hardware, execution, state } = saved
      const facts = { host: describeHost(this.#parts), hardware, execution, state }
      const info = await writeSnapshot(path, facts, saved.memory, {
        onProgress,
        signal,
        changes: incremental ? { pages, parent: parent! } : undefined,
        writeDisks: (folder) => recording.write(folder),
      })
      this.#lastWritten = { path: info.path, id: info.id }
      return info
    } catch (error) {
      // They are still to be written.
      ram.addChanges(pages)
      throw error
    } finally {
      saved.memory.close()
      await recording.close()
    }
  }

  /**
   * Another machine that goes on from here, as {@link Snapshot.spawn} makes it. This one goes on as it did.
   *
   * @throws as {@link snapshot} and {@link restore}
   */
  async fork(options: CopyOptions = {}): Promise<VirtualMachine> {
    await using snapshot = await this.snapshot()
    return await snapshot.copy(options)
  }

  /**
   * Puts this machine back to where it was, or where the one was that it was made from. Only the pages that it has
   * written since are undone. A run under way goes on from there; a machine that had ended can run again.
   *
   * Disks are not put back: see `docs/snapshots.md`.
   *
   * @throws `ERR_SNAPSHOT_MISMATCH` for a snapshot of another machine, `ERR_CLOSED`, `ERR_TIMEOUT` as {@link pause}
   */
  async reset(snapshot: Snapshot): Promise<void> {
    if (!(snapshot instanceof Snapshot)) throw invalidArgument('snapshot', 'a Snapshot', snapshot)
    snapshot.checkOpen()
    // Its disks are another's.
    if (this.#ended?.reason === 'migrated') this.#checkNotEnded()
    await this.#whileStill(() => {
      const { ram, generation } = this.#parts
      const { memory, state } = snapshot.saved
      if (!ram.canRestore(memory)) throw otherMachine()
      ram.restore(memory)
      restoreMachineState(this.#parts, this.vcpus, state)
      generation?.renew()
      this.#ended = undefined
      this.#parts.agent?.endOfRun('the machine was reset')
    })
    // Ports that the guest had open were closed and opened again: whoever listens hears of it before anything else.
    if (this.#parts.consolePorts.length > 0) await nextTurn()
  }

  /**
   * Moves this machine to another process, perhaps on another host, which calls {@link receive}. The guest runs on while
   * its memory is sent, and stands still only for the last of it. Then the run under way ends: reason `migrated`.
   *
   * Disks have to be in files that both sides can open; they are handed over. See `docs/snapshots.md`.
   *
   * @param to - `'host:port'`, `{ host, port }`, or a stream of bytes whose other end is received from; it is closed in
   *   the end
   * @throws `ERR_MIGRATION_FAILED` where that did not work: the machine goes on as if nothing had been. Where it has
   *   `uncertain: true` the connection was lost at the very moment of handing over: the machine is then paused, and
   *   {@link resume} lets it go on here, if it does not run at the other side
   * @throws `ERR_INVALID_ARGUMENT`, `ERR_RUNNING` while it is being moved, `ERR_ENDED`, `ERR_CLOSED`
   */
  async migrate(to: MigrationTarget, options: MigrateOptions = {}): Promise<MigrationResult> {
    checkObject('migrate options', options, MIGRATE_KEYS)
    const { signal, onProgress } = options
    const target = checkTarget(to)
    if (signal !== undefined) checkSignal(signal)
    if (onProgress !== undefined && typeof onProgress !== 'function') {
      throw invalidArgument('onProgress', 'a function', onProgress)
    }
    this.#checkOpen()
    this.#checkNotEnded()
    if (this.#move !== undefined) throw isMoved()
    checkNotKept(this.#parts.disks)
    const move: Move = { stop: new AbortController(), phase: 'copying', over: Promise.resolve() }
    this.#move = move
    const moving = this.#migrate(move, target, options)
    move.over = moving.then(
      () => {},
      () => {},
    )
    return moving
  }

  async #migrate(
    move: Move,
    target: ReturnType<typeof checkTarget>,
    { signal, tls, onProgress = () => {} }: MigrateOptions,
  ): Promise<MigrationResult> {
    const stop = AbortSignal.any([move.stop.signal, ...(signal === undefined ? [] : [signal])])
    let connection: Connection | undefined
    try {
      connection = new Connection(await connectTo(target, tls, stop))
      return await sendMachine(connection, this.#migrationSource(move), onProgress, stop)
    } catch (error) {
      throw moveError(error, move.phase === 'unsure')
    } finally {
      connection?.close()
      if (this.#move === move && move.phase !== 'unsure') this.#move = undefined
    }
  }

  /** What of this machine is needed to send it. */
  #migrationSource(move: Move): MigrationSource {
    const { hardware, ram, disks, virtio } = this.#parts
    const host = describeHost(this.#parts)
    const unsure = () => {
      move.phase = 'unsure'
      const run = this.#run
      if (run === undefined || this.#paused === run) return
      this.#paused = run
      void run.hold()
    }
    return {
      ram,
      whileStill: (action) => this.#whileStill(action),
      save: () => {
        this.#checkCanSave()
        const state = saveMachineState(this.#parts, this.vcpus)
        return { host, hardware, execution: this.#execution, state }
      },
      describeDisks: () => describeDisks(disks),
      leave: async () => {
        move.phase = 'leaving'
        for (const device of virtio) device.function.suspend()
        const records = await describeDisks(disks)
        checkNotKept(disks)
        releaseDisks(disks)
        return records
      },
      stays: async () => {
        try {
          await reclaimDisks(disks)
        } catch (error) {
          unsure()
          throw error
        }
        this.#stay()
      },
      left: () => {
        move.phase = 'copying'
        this.#ended = { reason: 'migrated' }
        this.#run?.end(this.#ended)
      },
      unsure,
    }
  }

  /** It has not been moved. */
  #stay(): void {
    this.#move = undefined
    for (const device of this.#parts.virtio) device.function.resume()
  }

  /** Ends the run under way: reason `stopped`. Without one, nothing happens. */
  stop(): void {
    this.#run?.end({ reason: 'stopped', by: 'stop' })
  }

  /**
   * Ends the run under way, then gives everything back to the host: vCPUs, memory, threads. Views of guest memory are
   * empty from then on, and other calls throw `ERR_CLOSED`. May be called twice.
   */
  close(): Promise<void> {
    this.#closing ??= this.#close()
    return this.#closing
  }

  /** {@link close}, for `await using`. */
  [Symbol.asyncDispose](): Promise<void> {
    return this.close()
  }

  async #close(): Promise<void> {
    const move = this.#move
    move?.stop.abort(new NodevisorError('ERR_CLOSED', 'the machine was closed'))
    const run = this.#run
    if (run !== undefined) {
      run.end({ reason: 'stopped', by: 'close' })
      await run.over
    }
    await move?.over
    try {
      await this.#parts.close('the machine was closed')
    } finally {
      await this.#writing
      await this.#checkpoints?.close()
    }
  }

  async #step(mode: Exclude<StepMode, 'run'>, options: StepOptions): Promise<StepResult> {
    checkObject('step options', options, STEP_KEYS)
    const cpu = this.#cpuToStep(options.vcpu)
    const before = mode === 'instruction' ? this.#beginInstruction(cpu) : undefined
    let started: RunEnd & { readonly run: Run }
    try {
      started = await this.#start(mode, options, [cpu])
    } finally {
      if (before !== undefined && this.#closing === undefined) cpu.unsafeVcpu.setGuestDebug({ control: 0 })
    }
    const { run, stepped } = started
    let { outcome } = started
    let exit = stepped
    if (before !== undefined && exit?.kind === 'debug' && before.isHlt && before.rip + 1n === exit.pc) {
      // Single-stepped, `hlt` ends in a debug exit on some hosts instead of a halt.
      exit = { kind: 'halt', reason: 5 }
      cpu.halted()
      outcome ??= { reason: 'halt' }
    }
    const result = outcome === undefined ? undefined : this.#finish(outcome, run)
    return { vcpu: cpu.index, exit, result }
  }

  #cpuToStep(index: number | undefined): VirtualCpu {
    if (index === undefined) {
      return this.vcpus.find(({ state }) => state === 'runnable') ?? this.vcpus[0]!
    }
    const cpu = this.vcpus[index]
    if (cpu === undefined) throw invalidArgument('vcpu', `an index from 0 to ${this.vcpus.length - 1}`, index)
    if (cpu.state === 'parked') throw invalidArgument('vcpu', 'a vCPU that was started', index)
    return cpu
  }

  #beginInstruction(cpu: VirtualCpu): { readonly rip: bigint; readonly isHlt: boolean } {
    this.#checkCanRun()
    const vcpu = cpu.unsafeVcpu
    const rip = linearRipOf(vcpu)
    const { valid, physicalAddress } = vcpu.translate(rip)
    const address = Number(physicalAddress)
    const isHlt = valid && this.memory.contains(address) && this.memory.readUint8(address) === HLT
    vcpu.setGuestDebug({ control: GUEST_DEBUG.ENABLE | GUEST_DEBUG.SINGLESTEP })
    return { rip, isHlt }
  }

  /** Runs vCPUs until the dispatcher says that it is enough. */
  async #start(
    mode: StepMode,
    options: RunOptions,
    cpus: readonly VirtualCpu[],
  ): Promise<RunEnd & { readonly run: Run }> {
    const { signal, timeout } = options
    if (signal !== undefined) checkSignal(signal)
    if (timeout !== undefined && !(Number.isFinite(timeout) && timeout >= 0 && timeout <= MAX_TIMEOUT)) {
      throw invalidArgument('timeout', `a number of milliseconds from 0 to ${MAX_TIMEOUT}`, timeout)
    }
    this.#checkCanRun()
    const execution = acquireExecution(this.#execution, this.vcpus.length)
    const run = new Run(this.#parts, execution, mode, this.vcpus)
    this.#run = run
    const abort = () => run.end(stoppedBy(signal!))
    let timer: NodeJS.Timeout | undefined
    try {
      if (signal?.aborted) abort()
      signal?.addEventListener('abort', abort, { once: true })
      if (timeout !== undefined) {
        timer = setTimeout(() => run.end({ reason: 'stopped', by: 'timeout' }), timeout)
      }
      for (const cpu of cpus) cpu.wake()
      for (const cpu of cpus) if (cpu.canEnter) run.add(cpu)
      return { ...(await run.over), run }
    } finally {
      clearTimeout(timer)
      signal?.removeEventListener('abort', abort)
      this.#run = undefined
      run.release()
    }
  }

  /** Does something while the machine stands still, then lets it go on. */
  async #whileStill<Result>(action: () => Result | Promise<Result>): Promise<Result> {
    for (;;) {
      this.#checkOpen()
      const run = this.#run
      const letGo =
        run === undefined ? await this.#holdDevices() : await run.hold().then(() => () => run.letGo())
      try {
        // One that ended meanwhile, or has begun.
        if (this.#run !== run) continue
        this.#checkOpen()
        this.#checkHere()
        return await action()
      } finally {
        letGo()
      }
    }
  }

  /** Of a machine that does not run: its devices may have something left to do. @returns lets them go on */
  async #holdDevices(): Promise<() => void> {
    const { virtio } = this.#parts
    for (const device of virtio) device.function.suspend()
    const letGo = () => {
      for (const device of virtio) device.function.resume()
    }
    try {
      await drainRequests(this.#parts)
      return letGo
    } catch (error) {
      letGo()
      throw error
    }
  }

  /** All of the machine but its disks, at this moment: nothing else comes in between. */
  #save(): Omit<SavedMachine, 'openDisks'> {
    const { hardware, ram } = this.#parts
    const state = saveMachineState(this.#parts, this.vcpus)
    return { hardware, execution: this.#execution, state, memory: ram.capture() }
  }

  #checkCanSave(): void {
    this.#checkNotEnded()
    const cpu = this.vcpus.find(({ hasPending }) => hasPending)
    if (cpu === undefined) return
    throw new NodevisorError(
      'ERR_RUNNING',
      `Expected a machine between two instructions but vCPU ${cpu.index} is within one that makes several accesses; run on`,
      { vcpu: cpu.index },
    )
  }

  #finish(outcome: Outcome, run: Run): RunResult {
    if (!canGoOn(outcome)) this.#ended = outcome
    const why = describeOutcome(outcome)
    this.serial.endOfRun(why)
    for (const port of this.#parts.consolePorts) port.endOfRun(why)
    this.#parts.agent?.endOfRun(why)
    const { counts } = this.#parts.dispatcher
    const firstOutput = this.serial.firstOutputTime
    return {
      ...outcome,
      exits: { ...counts, posted: this.#parts.posted.count - run.postedBefore },
      durationMs: run.endTime - run.startTime,
      ...(firstOutput !== undefined && firstOutput >= run.startTime
        ? { firstOutputMs: firstOutput - run.startTime }
        : {}),
      ...(run.report === undefined ? {} : { report: run.report }),
    }
  }

  #checkOpen(): void {
    if (this.#closing !== undefined) {
      throw new NodevisorError('ERR_CLOSED', 'Expected an open machine but it was closed; create another')
    }
  }

  #checkStopped(): void {
    this.#checkOpen()
    if (this.#run !== undefined && !this.#run.isStill) throw runs()
  }

  #checkCanRun(): void {
    this.#checkOpen()
    if (this.#run !== undefined) throw runs()
    this.#checkHere()
    this.#checkNotEnded()
  }

  /** Throws where it is, or may be, another process's. */
  #checkHere(): void {
    if (this.#move?.phase === 'leaving') throw isMoved()
    if (this.#move?.phase !== 'unsure') return
    throw new NodevisorError(
      'ERR_RUNNING',
      'Expected a machine that is here but it may run where it was to be moved; if it does not, resume() it first',
    )
  }

  #checkNotEnded(): void {
    if (this.#ended !== undefined) {
      throw new NodevisorError(
        'ERR_ENDED',
        `Expected a machine that can go on but ${describeOutcome(this.#ended)}; create another`,
        { outcome: this.#ended },
      )
    }
  }
}

function runs(): NodevisorError {
  return new NodevisorError(
    'ERR_RUNNING',
    'Expected a machine that stands still but it runs; await run(), or stop or pause it first',
  )
}

function isMoved(): NodevisorError {
  return new NodevisorError(
    'ERR_RUNNING',
    'Not possible while the machine is being moved; await migrate() first',
  )
}

function checkSignal(signal: unknown): void {
  if (!(signal instanceof AbortSignal)) throw invalidArgument('signal', 'an AbortSignal', signal)
}

function otherMachine(): NodevisorError {
  return new NodevisorError(
    'ERR_SNAPSHOT_MISMATCH',
    'Expected a snapshot of this machine, or the one it was made from, but received that of another; ' +
      'VirtualMachine.restore() makes a machine of any',
  )
}

function checkSameDisks({ hardware }: Pick<SavedMachine, 'hardware'>, disks: readonly BlockBackend[]): void {
  if (disks.length === hardware.disks.length) return
  throw new NodevisorError(
    'ERR_SNAPSHOT_MISMATCH',
    `Expected as many disks as the snapshot has (${hardware.disks.length}) but received ${disks.length}`,
    { expected: hardware.disks.length, received: disks.length },
  )
}

function describeVirtio({ name, mmio, irq, function: virtio }: VirtioMmio): VirtioDeviceInfo {
  const { device, problem } = virtio
  return {
    name,
    deviceType: device.deviceType,
    address: mmio.base,
    irq,
    status: virtio.status,
    features: virtio.negotiated,
    ...(problem === undefined ? {} : { problem }),
    ...(device instanceof VirtioBlock ? { errors: device.errors, lastError: device.lastError } : {}),
    statistics: virtio.statistics,
  }
}

function stoppedBy(signal: AbortSignal): Outcome {
  const cause: unknown = signal.reason
  const timedOut = cause instanceof Error && cause.name === 'TimeoutError'
  return { reason: 'stopped', by: timedOut ? 'timeout' : 'abort', cause }
}
