/** Exceptions by vector (Intel SDM vol. 3A, "Exception and Interrupt Vectors"). */
export const DEBUG_EXCEPTION = 1
export const BREAKPOINT = 3
export const OVERFLOW = 4
export const BOUND_RANGE_EXCEEDED = 5
export const INVALID_OPCODE = 6
export const DEVICE_NOT_AVAILABLE = 7
export const SEGMENT_NOT_PRESENT = 11
export const STACK_FAULT = 12
export const GENERAL_PROTECTION = 13
export const PAGE_FAULT = 14
export const FLOATING_POINT_ERROR = 16

/**
 * Thrown where an instruction ends in a fault: the guest's business, not the caller's. It never leaves this folder.
 *
 * A fault leaves the registers as they were and `rip` at the instruction.
 */
export class GuestFault {
  readonly vector: number
  /** `undefined` for the exceptions that push none. */
  readonly errorCode: number | undefined
  /** The address that a page fault puts into CR2. */
  readonly cr2: bigint | undefined

  constructor(vector: number, errorCode?: number, cr2?: bigint) {
    this.vector = vector
    this.errorCode = errorCode
    this.cr2 = cr2
  }
}

/** Thrown where an instruction cannot be finished. It never leaves this folder; nothing of the guest has changed. */
export class Refusal {
  readonly why: string

  constructor(why: string) {
    this.why = why
  }
}

/** #UD. */
export const invalidOpcode = () => new GuestFault(INVALID_OPCODE)

/** #GP. @param errorCode - the selector or gate that is at fault, if one is */
export const generalProtection = (errorCode = 0) => new GuestFault(GENERAL_PROTECTION, errorCode)
