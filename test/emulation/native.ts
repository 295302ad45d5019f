import { flatSegment } from '../../src/boot/processor.js'
import type { InstructionTable } from '../../src/emulation/decode.js'
import { finishInstruction } from '../../src/emulation/index.js'
import type { Registers } from '../../src/kvm/index.js'
import { ENTRY, nextExit } from '../kvm/metal.js'
import { DATA, type GuestOptions, makeGuest, STACK, USER_CODE, USER_DATA } from './guest.js'

/** Bytes at {@link DATA} that are compared. */
const DATA_SIZE = 64

/** More than any host's KVM_CAP_XSAVE2. */
const XSAVE_SIZE = 0x4000
// In the XSAVE area (Intel SDM vol. 1, "XSAVE Area").
const MXCSR = 24
const ST0 = 32
const XMM0 = 160
const XSTATE_BV = 512
const XSTATE_X87_SSE = 3

/** What a program starts with. */
export interface Input {
  readonly registers: Partial<Registers>
  /** XMM0 to XMM15. */
  readonly xmm: Uint8Array
  readonly data: Uint8Array
}

/** What a program leaves, as far as programs can tell. */
export interface Output {
  readonly vector: number
  readonly registers: Omit<Registers, 'rsp' | 'rip'>
  readonly rip: bigint
  readonly x87: {
    readonly control: number
    readonly status: number
    readonly tags: number
    readonly stack: Uint8Array
  }
  readonly xmm: Uint8Array
  readonly mxcsr: number
  readonly data: Uint8Array
}

/**
 * A vCPU for one program, which ends in `int3` or in an exception.
 *
 * Code of privilege level 3 runs on the processor itself, on every host. At level 0, a PVM host hands over what its
 * emulator lacks: so the processor says what is to be expected.
 */
export function makeRunner(level: 0 | 3, code: readonly number[], special: GuestOptions['special'] = {}) {
  const user = {
    cs: { ...flatSegment(USER_CODE, 'code64'), dpl: 3 },
    ss: { ...flatSegment(USER_DATA, 'data'), dpl: 3 },
  }
  const guest = makeGuest({ code: [...code, 0xcc], special: { ...special, ...(level === 3 ? user : {}) } })
  const { vcpu, memory, bytes, view } = guest
  const start = vcpu.getSregs()
  const fresh = vcpu.getRegs()
  const area = vcpu.getXsave(XSAVE_SIZE)
  // KVM_SET_FPU does not say that the registers are in use: they would be initial again in the guest.
  area[XSTATE_BV]! |= XSTATE_X87_SSE
  return ({ registers, xmm, data }: Input): Output => {
    vcpu.setSregs(start)
    area.set(xmm, XMM0)
    vcpu.setXsave(area)
    bytes.set(data, DATA)
    vcpu.setRegs({ ...fresh, ...registers, rip: BigInt(ENTRY), rsp: BigInt(STACK) })
    for (;;) {
      const exit = nextExit(vcpu)
      if (exit.kind === 'internal-error' && exit.instruction !== undefined) {
        const result = finishInstruction(vcpu, memory, exit.instruction)
        if (!result.finished) throw new Error(`${result.mnemonic ?? 'unknown instruction'}: ${result.why}`)
      } else if (exit.kind === 'io') {
        // In the handler of an exception: registers are as they were, and its frame is on the stack.
        const vector = exit.port
        vcpu.complete()
        const { rsp, rip: _, ...rest } = vcpu.getRegs()
        const frame = Number(rsp) + (vector === 13 ? 8 : 0)
        // KVM_GET_FPU has no MXCSR.
        const after = vcpu.getXsave(XSAVE_SIZE)
        const words = new DataView(after.buffer)
        return {
          vector,
          registers: { ...rest, rflags: view.getBigUint64(frame + 16, true) },
          rip: view.getBigUint64(frame, true),
          x87: {
            control: words.getUint16(0, true),
            status: words.getUint16(2, true),
            tags: words.getUint8(4),
            stack: after.slice(ST0, XMM0),
          },
          xmm: after.slice(XMM0, XMM0 + 256),
          mxcsr: words.getUint32(MXCSR, true),
          data: bytes.slice(DATA, DATA + DATA_SIZE),
        }
      } else {
        throw new Error(`Unexpected exit ${exit.kind}`)
      }
    }
  }
}

/**
 * The code of an instruction form, by the manual's notation: with register operands 0 and 1, or with memory at RBX.
 *
 * @param rex - a REX prefix, or 0. With REX.B memory is at R11, with the other registers the numbers become 8 and 9
 */
export function encode(
  key: string,
  table: InstructionTable,
  operand: 'r' | 'm',
  rex: number,
  immediate: number,
) {
  const parts = key.split(' ')
  const prefix = ['66', 'F2', 'F3'].includes(parts[0]!) ? [Number.parseInt(parts[0]!, 16)] : []
  const opcode = parts.filter((part) => /^[0-9A-F]{2}$/.test(part)).map((part) => Number.parseInt(part, 16))
  const extension = Number(/\/(\d)/.exec(key)?.[1] ?? 0)
  const modrm = (operand === 'r' ? 0xc1 : 0x03) | (extension << 3)
  return [
    ...prefix,
    ...(rex === 0 ? [] : [rex]),
    ...opcode.slice(prefix.length),
    modrm,
    ...(table[key]!.immediate === undefined ? [] : [immediate]),
  ]
}
