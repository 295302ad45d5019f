/**
 * Every error that nodevisor throws on purpose, in one table.
 *
 * Match on {@link NodevisorError.code}, not on the class or the message.
 */
export const ERROR_CODES = {
  ERR_INVALID_ARGUMENT: 'An option or argument has the wrong type or is out of range.',
  ERR_UNKNOWN_OPTION: 'An options object has a key that does not exist; the nearest one is named.',
  ERR_KVM_NOT_FOUND: 'There is no /dev/kvm: no hardware support, or the kvm module is not loaded.',
  ERR_KVM_PERMISSION: '/dev/kvm exists, but this user may not open it.',
  ERR_KVM_UNSUPPORTED: "This host's KVM lacks something that was asked for.",
  ERR_SYSCALL: 'A system call failed; `syscall`, `errno` and `errnoName` say which and how.',
  ERR_ADDON_LOAD: 'The native addon could not be loaded.',
  ERR_CLOSED: 'The machine, vCPU, memory or disk was closed before this call.',
  ERR_RUNNING: 'Not possible while the machine runs; stop it first.',
  ERR_ENDED: 'The machine has ended for good (reset, power-off, shutdown or failure).',
  ERR_OUT_OF_RANGE: 'A guest-physical address or length lies outside guest memory.',
  ERR_MEMORY_SIZE: 'The memory size is not one a machine can have on this host.',
  ERR_BUS_OVERLAP: 'Two devices claim the same port or address.',
  ERR_DEVICE_FAILED: 'A device threw an exception while it handled an access; `cause` has it.',
  ERR_IMAGE_READ: 'A kernel, module or initrd, or a file for an initramfs, could not be read.',
  ERR_IMAGE_FORMAT: 'The kernel image is not of the format it was named or detected as.',
  ERR_IMAGE_TRUNCATED: 'The kernel image ends before its headers say it does.',
  ERR_IMAGE_TOO_LARGE:
    'A kernel, its modules or its initrd do not fit into guest memory, or an image is over 2 GiB.',
  ERR_BOOT_NO_ROOM: 'No free memory is left for the structures a boot protocol needs.',
  ERR_NO_DEVICE: 'The machine was created without this device.',
  ERR_DISK_OPEN: 'A disk image could not be opened or created; `cause` says why.',
  ERR_DISK_FORMAT: 'A disk image does not have the size or the header that it has to have.',
  ERR_DISK_IN_USE: 'Another machine or program has the disk image open.',
  ERR_DISK_IO: 'A request to a disk image failed; `cause` says why.',
  ERR_AGENT_MISSING:
    'No agent answered in the guest in time: it is not in the initramfs, or was not started.',
  ERR_AGENT_FAILED: 'The agent in the guest went away, or broke its protocol.',
  ERR_EXEC_FAILED: 'A program in the guest could not be started, or failed where `check` was set.',
  ERR_GUEST_FILE: 'A file in the guest could not be read or written; `errnoName` says why.',
  ERR_SNAPSHOT_READ: 'A snapshot could not be read; `cause` says why.',
  ERR_SNAPSHOT_WRITE:
    'A snapshot could not be written: there is none now where it was to be; `cause` says why.',
  ERR_SNAPSHOT_DAMAGED: 'A snapshot is not whole: its checksum or its files are not what they have to be.',
  ERR_SNAPSHOT_VERSION: 'A snapshot is of another version of the format.',
  ERR_SNAPSHOT_HOST:
    'A snapshot is of another kind of host, or of one with processor features that this one lacks.',
  ERR_SNAPSHOT_MISMATCH:
    'A snapshot does not go with the devices, disks or machine that it is to be restored with.',
  ERR_SNAPSHOT_STATE: 'A snapshot has a state that KVM or a device refuses.',
  ERR_MIGRATION_FAILED:
    'A machine could not be moved: it goes on where it was, unless `uncertain` says that nobody knows.',
  ERR_LINUX_UNAVAILABLE: 'The ready-made Linux is not there and could not be made.',
  ERR_GUEST_EMULATION: 'KVM could not emulate an instruction of the guest.',
  ERR_GUEST_ENTRY: 'The processor refused to enter the guest with this vCPU state.',
  ERR_GUEST_EXIT: 'The guest caused an exit that this machine does not handle.',
  ERR_SERIAL_ENDED: 'The serial port or console ended before what was waited for arrived.',
  ERR_TIMEOUT: 'What was waited for did not happen in time.',
  ERR_ABORTED: 'An AbortSignal ended the wait.',
} as const

/** One of the codes of {@link ERROR_CODES}. */
export type ErrorCode = keyof typeof ERROR_CODES

/** Facts of an error: they become fields of it. */
export interface ErrorFacts {
  readonly cause?: unknown
  readonly [fact: string]: unknown
}

/** An error of nodevisor: `code` says what, the message what to do, the facts are fields. */
export class NodevisorError extends Error {
  override readonly name = 'NodevisorError'
  readonly code: ErrorCode
  readonly [fact: string]: unknown

  constructor(code: ErrorCode, message: string, facts: ErrorFacts = {}) {
    const { cause, ...fields } = facts
    super(message, cause === undefined ? undefined : { cause })
    this.code = code
    Object.assign(this, fields)
  }
}

/** A value as it reads in an error message: short, on one line. */
export function show(value: unknown): string {
  if (typeof value === 'string') {
    return value.length > 60 ? `'${value.slice(0, 57)}...'` : `'${value}'`
  }
  if (typeof value === 'bigint') return `${value}n`
  if (typeof value === 'function') return 'a function'
  if (Array.isArray(value)) return `an array of ${value.length}`
  if (ArrayBuffer.isView(value)) return `${value.constructor.name} of ${value.byteLength} bytes`
  if (typeof value === 'object' && value !== null)
    return `an object of ${value.constructor?.name ?? 'no class'}`
  return String(value)
}

/** A number as hexadecimal text, as addresses and ports are written. */
export function hex(value: number | bigint): string {
  return `0x${value.toString(16)}`
}

/** The error for an argument that is not what it has to be. */
export function invalidArgument(name: string, expected: string, received: unknown): NodevisorError {
  return new NodevisorError(
    'ERR_INVALID_ARGUMENT',
    `Expected ${expected} for ${name} but received ${show(received)}`,
    { argument: name, received },
  )
}
