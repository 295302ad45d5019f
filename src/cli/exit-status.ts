import type { ErrorCode, Outcome } from '../index.js'

/** Exit statuses of the command (sysexits.h where it has one; 124 as timeout(1), 128 + n as a shell). */
export const EXIT_STATUS = {
  ok: 0,
  usage: 2,
  unavailable: 69,
  failed: 70,
  timeout: 124,
  interrupted: 130,
} as const

/** The status for how a run ended. A debug-exit value v gives (v << 1) | 1, as QEMU's isa-debug-exit does. */
export function statusOfOutcome(outcome: Outcome): number {
  switch (outcome.reason) {
    case 'debug-exit':
      return ((outcome.code << 1) | 1) & 0xff
    case 'halt':
    case 'power-off':
    case 'reset':
    case 'migrated':
      return EXIT_STATUS.ok
    case 'stopped':
      return outcome.by === 'timeout' ? EXIT_STATUS.timeout : EXIT_STATUS.interrupted
    case 'shutdown':
    case 'failed':
      return EXIT_STATUS.failed
  }
}

/** The status for an error that came before the guest's first instruction. */
export function statusOfError(code: ErrorCode | undefined): number {
  switch (code) {
    case 'ERR_KVM_NOT_FOUND':
    case 'ERR_KVM_PERMISSION':
    case 'ERR_KVM_UNSUPPORTED':
    case 'ERR_ADDON_LOAD':
      return EXIT_STATUS.unavailable
    case 'ERR_INVALID_ARGUMENT':
    case 'ERR_UNKNOWN_OPTION':
    case 'ERR_MEMORY_SIZE':
    case 'ERR_BOOT_NO_ROOM':
    case 'ERR_IMAGE_READ':
    case 'ERR_IMAGE_FORMAT':
    case 'ERR_IMAGE_TRUNCATED':
    case 'ERR_IMAGE_TOO_LARGE':
    case 'ERR_DISK_OPEN':
    case 'ERR_DISK_FORMAT':
    case 'ERR_DISK_IN_USE':
    case 'ERR_SNAPSHOT_READ':
    case 'ERR_SNAPSHOT_WRITE':
    case 'ERR_SNAPSHOT_DAMAGED':
    case 'ERR_SNAPSHOT_VERSION':
    case 'ERR_SNAPSHOT_HOST':
    case 'ERR_SNAPSHOT_MISMATCH':
      return EXIT_STATUS.usage
    default:
      return EXIT_STATUS.failed
  }
}
