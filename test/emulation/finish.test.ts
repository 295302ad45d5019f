import * as fc from 'fast-check'
import { describe, expect, it } from 'vitest'
import { finishInstruction, nameInstruction } from '../../src/emulation/index.js'
import { INTEGER } from '../../src/emulation/integer.js'
import { INTERRUPTS } from '../../src/emulation/interrupts.js'
import { SSE } from '../../src/emulation/sse.js'
import { SYSTEM } from '../../src/emulation/system.js'
import { X87 } from '../../src/emulation/x87.js'
import { XSAVE } from '../../src/emulation/xsave.js'
import { GuestMemory } from '../../src/memory/guest-memory.js'
import { ENTRY } from '../kvm/metal.js'
import { DATA, isEmulated, isPvm, type Mode, makeGuest, STACK } from './guest.js'

describe('the name of an instruction', () => {
  it.each([
    ['popcnt', [0xf3, 0x0f, 0xb8, 0xc3], 64],
    ['popcnt', [0x66, 0xf3, 0x48, 0x0f, 0xb8, 0x84, 0x4b, 0, 0, 0, 0], 64],
    ['int', [0xcd, 0x80], 32],
    ['xsaveopt', [0x0f, 0xae, 0x33], 64],
    ['clwb', [0x66, 0x0f, 0xae, 0x33], 64],
    ['addsd', [0xf2, 0x0f, 0x58, 0xc1], 64],
    ['x87 arithmetic', [0xd8, 0xc1], 64],
    ['fld1', [0xd9, 0xe8], 16],
    // VEX, and what has its opcode in 32-bit code.
    [undefined, [0xc4, 0xe2, 0x60, 0xf2, 0xc1], 64],
    ['bound', [0x62, 0x03], 32],
    [undefined, [0x62, 0x03], 64],
    // Nothing, half of one, prefixes only, too long.
    [undefined, [], 64],
    [undefined, [0xf3, 0x0f], 64],
    [undefined, Array(15).fill(0x66), 64],
    [undefined, [...Array(14).fill(0x66), 0x0f, 0x77], 64],
    [undefined, [0x0f, 0x0e], 64],
  ] as const)('is %s', (name, bytes, codeSize) => {
    expect(nameInstruction(Uint8Array.from(bytes), codeSize)).toBe(name)
  })
})

describe.skipIf(isEmulated)('finishing an instruction', () => {
  it('that is known by name only is refused, and changes nothing', () => {
    const { vcpu, memory } = makeGuest({ code: [] })
    const before = vcpu.getRegs()
    expect(finishInstruction(vcpu, memory, Uint8Array.from([0xf2, 0x0f, 0x58, 0xc1]))).toEqual({
      finished: false,
      mnemonic: 'addsd',
      why: 'it is not known here',
    })
    expect(vcpu.getRegs()).toEqual(before)
  })

  it('that is not known at all is refused with its opcode', () => {
    const { vcpu, memory } = makeGuest({ code: [] })
    expect(finishInstruction(vcpu, memory, Uint8Array.from([0x0f, 0x38, 0xcc, 0xc1]))).toEqual({
      finished: false,
      mnemonic: undefined,
      why: 'opcode 0F 38 CC is not known here',
    })
  })

  it('reads the bytes that it was not given from memory', () => {
    const { vcpu, memory } = makeGuest({ code: [0xf3, 0x0f, 0xb8, 0xc3], registers: { rbx: 0xffn } })
    expect(finishInstruction(vcpu, memory, Uint8Array.from([0xf3]))).toMatchObject({ finished: true })
    expect(vcpu.getRegs()).toMatchObject({ rax: 8n, rip: BigInt(ENTRY + 4) })
  })

  it('clears RF behind it, and sets it for a fault', () => {
    const RF = 1n << 16n
    const { vcpu, memory } = makeGuest({ code: [], registers: { rbx: 1n << 47n, rflags: 2n | RF } })
    finishInstruction(vcpu, memory, Uint8Array.from([0xf3, 0x0f, 0xb8, 0xc3]))
    expect(vcpu.getRegs().rflags & RF).toBe(0n)
    finishInstruction(vcpu, memory, Uint8Array.from([0xf3, 0x0f, 0xb8, 0x03]))
    expect(vcpu.getRegs().rflags & RF).toBe(RF)
  })

  it('with an operand in the memory of a device is refused', () => {
    const { vcpu, memory } = makeGuest({ mode: 'protected', code: [], registers: { rbx: 0xfee0_0000n } })
    expect(finishInstruction(vcpu, memory, Uint8Array.from([0xf3, 0x0f, 0xb8, 0x03]))).toEqual({
      finished: false,
      mnemonic: 'popcnt',
      why: 'its operand at guest-physical 0xfee00000 is not RAM',
    })
  })

  it.runIf(isPvm)('ends the shadow of sti, and the exception that KVM queued', () => {
    const { vcpu, memory } = makeGuest({ code: [] })
    const events = vcpu.getVcpuEvents()
    vcpu.setVcpuEvents({
      ...events,
      exception: { ...events.exception, injected: true, nr: 6 },
      interrupt: { ...events.interrupt, shadow: 2 },
    })
    finishInstruction(vcpu, memory, Uint8Array.from([0xf3, 0x0f, 0xb8, 0xc3]))
    expect(vcpu.getVcpuEvents()).toMatchObject({ exception: { injected: false }, interrupt: { shadow: 0 } })
  })
})

const MODES: Mode[] = ['real', 'protected', 'long']
/** RAM, as the finisher is given it: less than the guest's, so that there is something outside. */
const RAM_END = 0x8_0000

/** The opcode bytes of every form that is known. */
const opcodes = Object.keys({ ...INTEGER, ...INTERRUPTS, ...SSE, ...SYSTEM, ...X87, ...XSAVE }).map((key) =>
  key.split(' ').flatMap((part) => (/^[0-9A-F]{2}$/.test(part) ? [Number.parseInt(part, 16)] : [])),
)
const byte = fc.integer({ min: 0, max: 255 })
const tail = fc.array(byte, { minLength: 0, maxLength: 14 })
const code = fc.oneof(
  tail,
  fc
    .tuple(
      fc.array(fc.constantFrom(0x66, 0x67, 0xf2, 0xf3, 0x2e, 0x64, 0xf0, 0x48, 0x4f), { maxLength: 3 }),
      fc.constantFrom(...opcodes),
      tail,
    )
    .map((parts) => parts.flat()),
)
/** An address in RAM, at its end, outside, or anything. */
const pointer = fc.oneof(
  fc.integer({ min: DATA, max: DATA + 0x2000 }).map(BigInt),
  fc.constantFrom(0n, BigInt(RAM_END - 4), 0xfee0_0000n, 0xffff_fffen, 2n ** 47n - 4n, 2n ** 64n - 4n),
  fc.bigInt({ min: 0n, max: 2n ** 64n - 1n }),
)

/** Tables of the processor's, of which even a refused instruction may set accessed bits. */
const TABLES_START = 0x2000
const TABLES_END = 0x7000

describe.skipIf(isEmulated).each(MODES)('whatever a guest executes in %s mode', (mode) => {
  it('finishing it throws nothing, and changes nothing where it is refused or outside RAM', () => {
    const { vcpu, bytes } = makeGuest({ mode, code: [] })
    const memory = new GuestMemory([{ start: 0, buffer: bytes.buffer.slice(0, RAM_END) as ArrayBuffer }])
    const pristine = memory.read(0, RAM_END)
    const start = { registers: vcpu.getRegs(), special: vcpu.getSregs(), xsave: vcpu.getXsave(0x4000) }
    const events = vcpu.getVcpuEvents()
    const values = fc.record({
      rax: pointer,
      rbx: pointer,
      rcx: pointer,
      rdx: pointer,
      rsi: pointer,
      rdi: pointer,
      rbp: pointer,
      rsp: fc.oneof(fc.constant(BigInt(STACK)), pointer),
    })
    fc.assert(
      fc.property(code, values, fc.bigInt({ min: 0n, max: 2n ** 20n }), (list, registers, rflags) => {
        // Virtual-8086 mode is entered by tasks and `iret` alone.
        const before = {
          ...start.registers,
          ...registers,
          rip: BigInt(ENTRY),
          rflags: (rflags & ~(1n << 17n)) | 2n,
        }
        memory.write(0, pristine)
        vcpu.setSregs(start.special)
        vcpu.setXsave(start.xsave)
        vcpu.setRegs(before)
        vcpu.setVcpuEvents(events)
        const begun = vcpu.getRegs()
        const result = finishInstruction(vcpu, memory, Uint8Array.from(list))
        if (result.finished) {
          expect(result.mnemonic).not.toBe('')
          return
        }
        expect(result.why).not.toBe('')
        expect(vcpu.getRegs()).toEqual(begun)
        expect(vcpu.getSregs()).toEqual(start.special)
        for (const [from, to] of [
          [0, TABLES_START],
          [TABLES_END, RAM_END],
        ] as const) {
          expect(Buffer.compare(memory.read(from, to - from), pristine.subarray(from, to))).toBe(0)
        }
      }),
      { numRuns: 400, endOnFailure: true },
    )
  })
})
