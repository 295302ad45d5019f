import { NodevisorError } from '../errors.js'
import type { Vcpu } from '../kvm/vcpu.js'
import type { GuestMemory } from '../memory/guest-memory.js'
import { type CodeSize, Decoder, type Instruction, type InstructionTable } from './decode.js'
import { INTEGER } from './integer.js'
import { INTERRUPTS } from './interrupts.js'
import { NAMES } from './names.js'
import { GuestFault, Refusal } from './outcome.js'
import { Processor } from './processor.js'
import { SSE } from './sse.js'
import { SYSTEM } from './system.js'
import { X87 } from './x87.js'
import { XSAVE } from './xsave.js'

/** What came of {@link finishInstruction}. */
export type FinishResult =
  /** The guest can be entered again: behind the instruction, or on its way into a handler of its own. */
  | { readonly finished: true; readonly mnemonic: string }
  /** Nothing of the guest has changed. */
  | {
      readonly finished: false
      /** `undefined` where the instruction is not known at all. */
      readonly mnemonic: string | undefined
      /** Half a sentence, for an error message. */
      readonly why: string
    }

/** All forms. The files have the instructions by group; those that come first go before general names. */
const INSTRUCTIONS: InstructionTable = {
  ...NAMES,
  ...INTERRUPTS,
  ...INTEGER,
  ...SYSTEM,
  ...X87,
  ...SSE,
  ...XSAVE,
}

/**
 * Executes the instruction at which KVM gave up (KVM_EXIT_INTERNAL_ERROR, KVM_INTERNAL_ERROR_EMULATION), so that the
 * guest can be entered again.
 *
 * A host without VT-x or AMD-V (KVM on PVM) emulates all code of privilege level 0, and its emulator lacks
 * instructions. What the instruction would do on a processor, faults included, the guest finds done: in registers and
 * memory, and as exceptions and interrupts that KVM delivers with the next entry. Features that CPUID does not list are
 * there nonetheless; the guest's `cpuid` on such a host may list them.
 *
 * Not atomic towards other vCPUs: `cmpxchg16b`. Limited to RAM: an operand in a device's memory is refused. What is
 * written to page tables that are in use, KVM does not notice: it shadows them, and sees the guest's own writes only.
 *
 * @param vcpu - not running, its last exit the one that handed over the instruction
 * @param memory - the guest's RAM
 * @param bytes - the instruction from its first byte on, with whatever follows it; more is read from memory if needed
 * @throws `ERR_CLOSED`, `ERR_RUNNING`; for nothing that a guest does
 */
export function finishInstruction(vcpu: Vcpu, memory: GuestMemory, bytes: Uint8Array): FinishResult {
  const cpu = new Processor(vcpu, memory)
  let instruction: Instruction | undefined
  try {
    try {
      instruction = new Decoder(cpu.codeSize, (index) => bytes[index] ?? cpu.fetch(index)).decode(
        INSTRUCTIONS,
      )
      const { name, run } = instruction.form
      if (run === undefined) return { finished: false, mnemonic: name, why: 'it is not known here' }
      cpu.skip(instruction)
      run(cpu, instruction)
      cpu.commit()
      return { finished: true, mnemonic: name }
    } catch (error) {
      if (!(error instanceof GuestFault)) throw error
      cpu.fault(error)
      return { finished: true, mnemonic: instruction?.form.name ?? 'an instruction that is not valid' }
    }
  } catch (error) {
    const mnemonic = instruction?.form.name
    if (error instanceof Refusal) return { finished: false, mnemonic, why: error.why }
    // KVM refuses the state that the instruction leads to.
    if (error instanceof NodevisorError && error.code === 'ERR_SYSCALL') {
      return { finished: false, mnemonic, why: error.message }
    }
    throw error
  }
}

/**
 * The mnemonic of the instruction that `bytes` begin with.
 *
 * @param codeSize - 16 or 32 as CS says, or 64 in 64-bit mode
 * @returns `undefined` for one that is not known, or not whole
 */
export function nameInstruction(bytes: Uint8Array, codeSize: CodeSize): string | undefined {
  const byteAt = (index: number) => {
    const byte = bytes[index]
    if (byte === undefined) throw new Refusal('its bytes end')
    return byte
  }
  try {
    return new Decoder(codeSize, byteAt).decode(INSTRUCTIONS).form.name
  } catch (error) {
    if (error instanceof Refusal || error instanceof GuestFault) return undefined
    throw error
  }
}
