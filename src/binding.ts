import { createRequire } from 'node:module'
import { fileURLToPath } from 'node:url'
import { getSystemErrorName } from 'node:util'
import { type ErrorCode, NodevisorError } from './errors.js'
import { packageRoot } from './package-root.js'

/** `/dev/kvm`, see native/kvm.cc. Structs are passed as the bytes of the kernel's own layout. */
export interface NativeKvm {
  apiVersion(): number
  checkExtension(capability: number): number
  createVm(type: number): NativeVm
  getSupportedCpuid(): Uint8Array
  getEmulatedCpuid(): Uint8Array
  getMsrIndexList(): Uint32Array
  getMsrFeatureIndexList(): Uint32Array
  getMsrs(entries: Uint8Array): number
  close(): void
}

/** A VM, see native/vm.cc. */
export interface NativeVm {
  checkExtension(capability: number): number
  enableCap(struct: Uint8Array): void
  setUserMemoryRegion(
    slot: number,
    flags: number,
    guestAddress: number,
    size: number,
    ram: NativeGuestRam | undefined,
    offset: number,
  ): void
  getDirtyLog(slot: number, bitmap: Uint8Array): void
  clearDirtyLog(slot: number, firstPage: number, pages: number, bitmap: Uint8Array): void
  setTssAddr(address: number): void
  setIdentityMapAddr(address: number): void
  setBootCpuId(id: number): void
  createVcpu(id: number): NativeVcpu
  createIrqchip(): void
  getIrqchip(struct: Uint8Array): void
  setIrqchip(struct: Uint8Array): void
  createPit2(flags: number): void
  getPit2(struct: Uint8Array): void
  setPit2(struct: Uint8Array): void
  irqLine(gsi: number, level: number): void
  setGsiRouting(entries: Uint8Array): void
  signalMsi(struct: Uint8Array): number
  irqfd(fd: number, gsi: number, flags: number, resampleFd: number): void
  ioeventfd(fd: number, address: number, length: number, flags: number, datamatch: bigint): void
  coalescedZone(register: boolean, address: number, size: number, pio: boolean): void
  getClock(struct: Uint8Array): void
  setClock(struct: Uint8Array): void
  close(): void
}

/** A vCPU, see native/vcpu.cc. */
export interface NativeVcpu {
  kvmRun(): ArrayBuffer
  run(): number
  complete(): number
  close(): void
  getRegs(struct: Uint8Array): void
  setRegs(struct: Uint8Array): void
  getSregs(struct: Uint8Array): void
  setSregs(struct: Uint8Array): void
  getFpu(struct: Uint8Array): void
  setFpu(struct: Uint8Array): void
  getXsave(area: Uint8Array): void
  setXsave(area: Uint8Array): void
  getXcrs(struct: Uint8Array): void
  setXcrs(struct: Uint8Array): void
  getMsrs(entries: Uint8Array): number
  setMsrs(entries: Uint8Array): number
  getCpuid2(): Uint8Array
  setCpuid2(entries: Uint8Array): void
  getMpState(): number
  setMpState(state: number): void
  getVcpuEvents(struct: Uint8Array): void
  setVcpuEvents(struct: Uint8Array): void
  getDebugRegs(struct: Uint8Array): void
  setDebugRegs(struct: Uint8Array): void
  setGuestDebug(struct: Uint8Array): void
  getLapic(struct: Uint8Array): void
  setLapic(struct: Uint8Array): void
  interrupt(vector: number): void
  nmi(): void
  translate(struct: Uint8Array): void
  getTscKhz(): number
  setTscKhz(khz: number): void
  kvmclockCtrl(): void
  enableCap(struct: Uint8Array): void
}

/** RAM, see native/guest_ram.cc. */
export interface NativeGuestRam {
  fd(): number
  buffer(offset: number, length: number): ArrayBuffer
  copyOnWrite(): void
  privatePages(): Uint32Array
  discard(runs: Uint32Array): void
  close(): void
}

/** An eventfd, see native/event_fd.cc. */
export interface NativeEventFd {
  fd(): number
  signal(): void
  read(): number
  listen(callback: () => void): void
  unlisten(): void
  close(): void
}

/** A timerfd, see native/timer_fd.cc. Times are nanoseconds. */
export interface NativeTimerFd {
  arm(delay: number, interval: number): void
  read(): number
  listen(callback: () => void): void
  unlisten(): void
  close(): void
}

/** Slices on the JavaScript thread, see native/inline_loop.cc. */
export interface NativeInlineLoop {
  start(): void
  stop(): void
  target(vcpu: NativeVcpu): boolean
  limit(milliseconds: number): void
  linger(): void
  control(): ArrayBuffer
}

/** A vCPU on its own thread, see native/vcpu_thread.cc. */
export interface NativeVcpuThread {
  resume(): void
  kick(): void
  stop(): void
}

/**
 * System calls on files, see native/file_io.cc. Each returns what the call does, and -errno where it fails.
 * A file descriptor has to stay open until the call is done.
 */
export interface NativeFileIo {
  /** preadv2 with RWF_NOWAIT, of up to 1024 buffers: bytes. */
  preadvNowait(fd: number, buffers: readonly Uint8Array[], offset: number): number
  /** pwritev2 with RWF_NOWAIT, of up to 1024 buffers: bytes. */
  pwritevNowait(fd: number, buffers: readonly Uint8Array[], offset: number): number
  /** In a thread of libuv's pool. */
  fallocate(fd: number, mode: number, offset: number, length: number): Promise<number>
  /** An open file description lock on the whole file: -EAGAIN if somebody else has one that excludes it. */
  lock(fd: number, exclusive: boolean): number
  /** Takes such a lock back. */
  unlock(fd: number): number
  /** BLKGETSIZE64: bytes. */
  blockDeviceSize(fd: number): number
  /** lseek with SEEK_DATA: where data begins, at `offset` or after it; -ENXIO if there is none up to the end. */
  seekData(fd: number, offset: number): number
  /** lseek with SEEK_HOLE: where a hole begins, at `offset` or after it; the file's end is one. */
  seekHole(fd: number, offset: number): number
}

/** The native addon: ioctls and threads, no policy. */
export interface Binding {
  readonly Kvm: new (path: string) => NativeKvm
  readonly GuestRam: new (size: number, hugePageSize: number, file: number) => NativeGuestRam
  readonly EventFd: new () => NativeEventFd
  readonly TimerFd: new () => NativeTimerFd
  readonly InlineLoop: new (slice: () => void) => NativeInlineLoop
  readonly VcpuThread: new (vcpu: NativeVcpu, onExit: (errno: number) => void) => NativeVcpuThread
  readonly fileIo: NativeFileIo
  setErrorFactory(factory: (syscall: string, errno: number) => Error): void
  hostCpuid(leaf: number, subleaf: number): [eax: number, ebx: number, ecx: number, edx: number]
}

let loaded: Binding | undefined

/**
 * The addon, loaded on first use so that importing the package stays quick.
 *
 * @throws `ERR_ADDON_LOAD` with the loader's error as `cause`
 */
export function binding(): Binding {
  if (loaded === undefined) {
    const require = createRequire(import.meta.url)
    const root = packageRoot()
    try {
      loaded = require('pkg-prebuilds/bindings')(
        fileURLToPath(root),
        require(fileURLToPath(new URL('scripts/binding-options.cjs', root))),
      ) as Binding
    } catch (cause) {
      throw new NodevisorError(
        'ERR_ADDON_LOAD',
        `Expected the native addon of nodevisor to load but it did not: run "npm rebuild nodevisor", which compiles it ` +
          `with the system's C++ compiler and cmake (${cause instanceof Error ? cause.message.split('\n')[0] : cause})`,
        { cause },
      )
    }
    loaded.setErrorFactory(systemError)
  }
  return loaded
}

/** The error of a failed system call, as the addon throws it. `errno` 0 stands for a use after close. */
export function systemError(syscall: string, errno: number): NodevisorError {
  if (errno === 0) {
    return new NodevisorError('ERR_CLOSED', `Expected an open ${syscall} but it was closed`)
  }
  const errnoName = getSystemErrorName(-errno)
  const [code, message] = explain(syscall, errnoName)
  return new NodevisorError(code, message, { syscall, errno, errnoName })
}

function explain(syscall: string, errnoName: string): [ErrorCode, string] {
  if (syscall === 'open(/dev/kvm)') {
    if (errnoName === 'EACCES' || errnoName === 'EPERM') {
      return [
        'ERR_KVM_PERMISSION',
        `This user may not open /dev/kvm (${errnoName}): join the group that owns it ("sudo usermod -aG kvm $USER", ` +
          'then log in again), or run where /dev/kvm is passed through',
      ]
    }
    if (errnoName === 'ENOENT' || errnoName === 'ENODEV' || errnoName === 'ENXIO') {
      return [
        'ERR_KVM_NOT_FOUND',
        `There is no working /dev/kvm (${errnoName}): enable virtualisation in the firmware and load the module ` +
          '("sudo modprobe kvm_intel" or "kvm_amd"); in a virtual machine, nested virtualisation has to be on; ' +
          'in a container, pass the device through ("--device /dev/kvm")',
      ]
    }
  }
  // The addon's own names: KVM says EBUSY for reasons of its own.
  if (syscall === 'ioctl(vcpu)' || syscall === 'resume(vcpu)') {
    return ['ERR_RUNNING', 'Not possible while the vCPU runs; stop the machine first']
  }
  if (syscall === 'KVM_CREATE_VM' && errnoName === 'EBUSY') {
    return [
      'ERR_SYSCALL',
      'KVM_CREATE_VM failed with EBUSY: another hypervisor has the processor; stop its machines first',
    ]
  }
  if (syscall === 'mmap' || syscall === 'memfd_create' || syscall === 'ftruncate') {
    return [
      'ERR_MEMORY_SIZE',
      `The host cannot give the guest its memory (${syscall}: ${errnoName}): ask for less, or reserve huge pages in ` +
        '/proc/sys/vm/nr_hugepages if you asked for those',
    ]
  }
  if (syscall === 'pthread_create') {
    return [
      'ERR_SYSCALL',
      `The host cannot start another thread (${errnoName}): close machines that are done`,
    ]
  }
  if (errnoName === 'EMFILE' || errnoName === 'ENFILE') {
    return [
      'ERR_SYSCALL',
      `${syscall} failed: too many open files; close machines that are done or raise "ulimit -n"`,
    ]
  }
  return ['ERR_SYSCALL', `${syscall} failed with ${errnoName}`]
}
