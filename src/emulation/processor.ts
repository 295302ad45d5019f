import { hex } from '../errors.js'
import type { Registers, Segment, SpecialRegisters } from '../kvm/registers.js'
import type { Vcpu } from '../kvm/vcpu.js'
import type { GuestMemory } from '../memory/guest-memory.js'
import type { CodeSize, Instruction, SegmentName } from './decode.js'
import { FpuArea } from './fpu-area.js'
import {
  DEBUG_EXCEPTION,
  GuestFault,
  generalProtection,
  invalidOpcode,
  Refusal,
  STACK_FAULT,
} from './outcome.js'
import { type Access, CR4_LA57, EFER_LMA, translate, withinPage } from './paging.js'

/** The general-purpose registers in the order in which instructions number them. */
export const REGISTERS = [
  'rax',
  'rcx',
  'rdx',
  'rbx',
  'rsp',
  'rbp',
  'rsi',
  'rdi',
  'r8',
  'r9',
  'r10',
  'r11',
  'r12',
  'r13',
  'r14',
  'r15',
] as const satisfies readonly (keyof Registers)[]

/** EFLAGS (Intel SDM vol. 1, "EFLAGS Register"). */
export const FLAGS = {
  CF: 1n << 0n,
  PF: 1n << 2n,
  AF: 1n << 4n,
  ZF: 1n << 6n,
  SF: 1n << 7n,
  TF: 1n << 8n,
  IF: 1n << 9n,
  DF: 1n << 10n,
  OF: 1n << 11n,
  IOPL: 3n << 12n,
  NT: 1n << 14n,
  RF: 1n << 16n,
  VM: 1n << 17n,
  AC: 1n << 18n,
  VIF: 1n << 19n,
  VIP: 1n << 20n,
  ID: 1n << 21n,
} as const

const CR0_PE = 1n << 0n

/** Segment types ("Code- and Data-Segment Descriptor Types"). */
const TYPE_CODE = 8
const TYPE_READABLE_OR_WRITABLE = 2
const TYPE_EXPAND_DOWN = 4

/** DR6: a single step. */
const DR6_BS = 1n << 14n

/** What comes of an instruction besides registers and memory: it goes into the guest with the next entry. */
export type Event =
  /** `int n`, `int3`, `into`: through the gate, with the address of the next instruction. */
  | { readonly kind: 'software-interrupt'; readonly vector: number }
  /** `int1`: a trap, which no gate's privilege level stops. */
  | { readonly kind: 'trap'; readonly vector: number }

/** A far pointer to memory: what an address means before segmentation. */
export interface Pointer {
  readonly segment: SegmentName
  readonly offset: bigint
}

/**
 * A vCPU while one instruction of its is being finished.
 *
 * Registers are working copies, which {@link commit} puts in place; memory is the guest's. An instruction therefore
 * first reads and checks, and writes memory last.
 */
export class Processor {
  readonly vcpu: Vcpu
  readonly memory: GuestMemory
  readonly registers: Registers
  readonly special: SpecialRegisters
  readonly #original: Registers
  #specialChanged = false
  #fpu: FpuArea | undefined
  #event: Event | undefined
  #nmiUnmasked = false

  constructor(vcpu: Vcpu, memory: GuestMemory) {
    this.vcpu = vcpu
    this.memory = memory
    this.#original = vcpu.getRegs()
    this.registers = { ...this.#original }
    this.special = vcpu.getSregs()
  }

  /** Protected mode, which long mode is too. */
  get protectedMode(): boolean {
    return (this.special.cr0 & CR0_PE) !== 0n
  }

  /** Virtual-8086 mode. */
  get virtual8086(): boolean {
    return this.protectedMode && this.flag('VM')
  }

  /** IA-32e mode, that is 64-bit or compatibility mode. */
  get longMode(): boolean {
    return (this.special.efer & EFER_LMA) !== 0n
  }

  /** Current privilege level. As KVM has it: SS's, which is 0 also before the first far jump in protected mode. */
  get cpl(): number {
    if (!this.protectedMode) return 0
    return this.virtual8086 ? 3 : this.special.ss.dpl
  }

  get codeSize(): CodeSize {
    if (!this.protectedMode || this.virtual8086) return 16
    if (this.longMode && this.special.cs.l === 1) return 64
    return this.special.cs.db === 1 ? 32 : 16
  }

  /** FPU and SSE state. Whatever is changed there is put in place. */
  get fpu(): FpuArea {
    this.#fpu ??= new FpuArea(this.vcpu)
    return this.#fpu
  }

  /** XCR0: which components of extended state are enabled. */
  xcr0(): bigint {
    return this.vcpu.getXcrs().find(({ xcr }) => xcr === 0)?.value ?? 1n
  }

  flag(name: keyof typeof FLAGS): boolean {
    return (this.registers.rflags & FLAGS[name]) !== 0n
  }

  /** Sets and clears flags; those not named stay. */
  setFlags(flags: Partial<Record<keyof typeof FLAGS, boolean>>): void {
    for (const [name, value] of Object.entries(flags) as [keyof typeof FLAGS, boolean][]) {
      if (value) this.registers.rflags |= FLAGS[name]
      else this.registers.rflags &= ~FLAGS[name]
    }
  }

  /** Sets some of the special registers. */
  setSpecial(values: Partial<SpecialRegisters>): void {
    Object.assign(this.special, values)
    this.#specialChanged = true
  }

  /** The value of a general-purpose register. @param size - bytes, 2 to 8 */
  register(number: number, size: number): bigint {
    return BigInt.asUintN(size * 8, this.registers[REGISTERS[number]!])
  }

  /** Writes a general-purpose register: 4 bytes clear the upper half, 2 bytes leave the rest as it is. */
  setRegister(number: number, size: number, value: bigint): void {
    const name = REGISTERS[number]!
    const bits = BigInt.asUintN(size * 8, value)
    this.registers[name] = size >= 4 ? bits : ((this.registers[name] >> 16n) << 16n) | bits
  }

  /** A byte register, of which AH, CH, DH and BH are numbered 4 to 7 where there is no REX prefix. */
  byteRegister(number: number, rex: boolean): bigint {
    const high = !rex && number >= 4
    return (this.registers[REGISTERS[high ? number - 4 : number]!] >> (high ? 8n : 0n)) & 0xffn
  }

  /** Where the memory operand is. #UD where it is a register. @param displacement - bytes into it */
  address(instruction: Instruction, displacement = 0): Pointer {
    const { memory, addressSize } = instruction
    if (memory === undefined) throw invalidOpcode()
    let offset = memory.displacement + BigInt(displacement)
    // Which is behind the instruction by now.
    if (memory.base === 'rip') offset += this.registers.rip
    else if (memory.base !== undefined) offset += this.register(memory.base, 8)
    if (memory.index !== undefined) offset += this.register(memory.index, 8) * BigInt(memory.scale)
    return { segment: memory.segment, offset: BigInt.asUintN(addressSize * 8, offset) }
  }

  /** The operand that ModRM.rm names: a register, or memory. @param size - bytes, 2 to 8 */
  readRm(instruction: Instruction, size: number): bigint {
    const { rm } = instruction
    if (rm !== undefined) return this.register(rm, size)
    return littleEndian(this.read(this.address(instruction), size))
  }

  /** Writes the operand that ModRM.rm names. */
  writeRm(instruction: Instruction, size: number, value: bigint): void {
    const { rm } = instruction
    if (rm !== undefined) this.setRegister(rm, size, value)
    else this.write(this.address(instruction), toBytes(value, size))
  }

  /** A copy of `size` bytes of memory. */
  read(pointer: Pointer, size: number): Uint8Array {
    return this.#copy(this.linear(pointer, size, 'read'), size, this.#access('read'))
  }

  /** Writes memory. All of it, or nothing where a page faults. */
  write(pointer: Pointer, bytes: Uint8Array): void {
    let done = 0
    for (const { address, length } of this.probe(pointer, bytes.length, 'write')) {
      this.memory.write(address, bytes.subarray(done, done + length))
      done += length
    }
  }

  /** Makes the faults of an access, without it. @returns where the bytes are in guest-physical memory */
  probe(pointer: Pointer, size: number, kind: 'read' | 'write'): PhysicalRange[] {
    return this.#physical(this.linear(pointer, size, kind), size, this.#access(kind))
  }

  /** Reads a table of the processor's (GDT, IDT, TSS): at CPL 0, whatever the program's. */
  readTable(linear: bigint, size: number): Uint8Array {
    return this.#copy(linear, size, { kind: 'read', user: false, overridesSmap: false })
  }

  /** Writes one byte of a table of the processor's. */
  writeTable(linear: bigint, byte: number): void {
    const [range] = this.#physical(linear, 1, { kind: 'write', user: false, overridesSmap: false })
    this.memory.writeUint8(range!.address, byte)
  }

  /** A byte of the code, `index` bytes from `rip` on. */
  fetch(index: number): number {
    const mask = this.codeSize === 64 ? 64 : 32
    const linear = BigInt.asUintN(mask, this.#codeBase + this.registers.rip + BigInt(index))
    return this.#copy(linear, 1, { ...this.#access('read'), kind: 'fetch' })[0]!
  }

  /** Whether an address is canonical: what 64-bit mode has for a segment limit. */
  canonical(linear: bigint): boolean {
    const bits = (this.special.cr4 & CR4_LA57) !== 0n ? 57 : 48
    return BigInt.asUintN(64, BigInt.asIntN(bits, linear)) === linear
  }

  /** What the guest gets with the next entry, besides the state it finds. */
  raise(event: Event): void {
    this.#event = event
  }

  /** NMIs may come again: `iret` was executed. */
  unmaskNmi(): void {
    this.#nmiUnmasked = true
  }

  /** Moves `rip` behind the instruction, before it is executed: a fault takes it back. */
  skip({ length }: Instruction): void {
    const next = this.registers.rip + BigInt(length)
    this.registers.rip = BigInt.asUintN(this.codeSize === 64 ? 64 : 32, next)
  }

  /** Puts everything in place. */
  commit(): void {
    const { vcpu } = this
    const singleStep = (this.#original.rflags & FLAGS.TF) !== 0n && this.#event === undefined
    // What KVM may refuse goes first: nothing has changed then.
    if (this.#specialChanged) vcpu.setSregs(this.special)
    this.#fpu?.commit()
    vcpu.setRegs({ ...this.registers, rflags: this.registers.rflags & ~FLAGS.RF })
    if (singleStep) {
      const debug = vcpu.getDebugRegs()
      vcpu.setDebugRegs({ ...debug, dr6: debug.dr6 | DR6_BS })
    }
    this.#setEvents(singleStep ? { kind: 'trap', vector: DEBUG_EXCEPTION } : this.#event)
  }

  /** Gives the guest the fault that the instruction ended in: nothing else of it happens. */
  fault({ vector, errorCode, cr2 }: GuestFault): void {
    const { vcpu } = this
    // Pushed with the flags: a breakpoint at the instruction does not strike twice (SDM vol. 3B, "RF flag").
    vcpu.setRegs({ ...this.#original, rflags: this.#original.rflags | FLAGS.RF })
    if (cr2 !== undefined) vcpu.setSregs({ ...vcpu.getSregs(), cr2 })
    this.#setEvents({ kind: 'fault', vector, errorCode: this.protectedMode ? errorCode : undefined })
  }

  #setEvents(
    event: Event | { kind: 'fault'; vector: number; errorCode: number | undefined } | undefined,
  ): void {
    const { vcpu } = this
    const events = vcpu.getVcpuEvents()
    // KVM has queued an invalid-opcode exception where it gave up, or it has not: that depends on its version.
    let exception = { injected: false, nr: 0, hasErrorCode: false, pending: false, errorCode: 0 }
    // No instruction but `sti` and `mov ss` keeps interrupts off behind it.
    let interrupt = { ...events.interrupt, shadow: 0 }
    if (event?.kind === 'software-interrupt') {
      interrupt = { injected: true, nr: event.vector, soft: true, shadow: 0 }
    } else if (event !== undefined) {
      const errorCode = event.kind === 'fault' ? event.errorCode : undefined
      exception = {
        injected: true,
        nr: event.vector,
        hasErrorCode: errorCode !== undefined,
        pending: false,
        errorCode: errorCode ?? 0,
      }
    }
    const nmi = this.#nmiUnmasked ? { ...events.nmi, masked: false } : events.nmi
    vcpu.setVcpuEvents({ ...events, exception, interrupt, nmi })
  }

  get #codeBase(): bigint {
    return this.codeSize === 64 ? 0n : this.special.cs.base
  }

  #access(kind: 'read' | 'write'): Access {
    return { kind, user: this.cpl === 3, overridesSmap: this.flag('AC') }
  }

  /** Segmentation, with its checks ("Limit Checking", "Type Checking"). @returns the linear address */
  linear({ segment: name, offset }: Pointer, size: number, kind: 'read' | 'write'): bigint {
    const segment = this.special[name]
    const fault = () => (name === 'ss' ? new GuestFault(STACK_FAULT, 0) : generalProtection())
    if (this.codeSize === 64) {
      const base = name === 'fs' || name === 'gs' ? segment.base : 0n
      const linear = BigInt.asUintN(64, base + offset)
      if (!this.canonical(linear) || !this.canonical(BigInt.asUintN(64, linear + BigInt(size - 1)))) {
        throw fault()
      }
      return linear
    }
    if (this.protectedMode && !this.virtual8086 && !allows(segment, kind)) throw fault()
    const last = offset + BigInt(size - 1)
    const expandDown = (segment.type & (TYPE_CODE | TYPE_EXPAND_DOWN)) === TYPE_EXPAND_DOWN
    const lowest = expandDown ? BigInt(segment.limit) + 1n : 0n
    const highest = expandDown ? (segment.db === 1 ? 0xffff_ffffn : 0xffffn) : BigInt(segment.limit)
    if (offset < lowest || last > highest) throw fault()
    return BigInt.asUintN(32, segment.base + offset)
  }

  #physical(linear: bigint, size: number, access: Access): PhysicalRange[] {
    const ranges: PhysicalRange[] = []
    for (let done = 0; done < size; ) {
      const at = BigInt.asUintN(this.longMode ? 64 : 32, linear + BigInt(done))
      const length = withinPage(at, size - done)
      const address = translate(this.memory, this.special, at, access)
      if (!this.memory.contains(address, length)) {
        throw new Refusal(`its operand at guest-physical ${hex(address)} is not RAM`)
      }
      ranges.push({ address, length })
      done += length
    }
    return ranges
  }

  #copy(linear: bigint, size: number, access: Access): Uint8Array {
    const bytes = new Uint8Array(size)
    let done = 0
    for (const { address, length } of this.#physical(linear, size, access)) {
      bytes.set(this.memory.read(address, length), done)
      done += length
    }
    return bytes
  }
}

/** Bytes that follow one another in guest-physical memory, all of them RAM. */
export interface PhysicalRange {
  readonly address: number
  readonly length: number
}

function allows(segment: Segment, kind: 'read' | 'write'): boolean {
  if (segment.unusable || !segment.present) return false
  const isCode = (segment.type & TYPE_CODE) !== 0
  const readableOrWritable = (segment.type & TYPE_READABLE_OR_WRITABLE) !== 0
  return kind === 'read' ? !isCode || readableOrWritable : !isCode && readableOrWritable
}

/** A number from its bytes. */
export function littleEndian(bytes: Uint8Array): bigint {
  return bytes.reduceRight((value, byte) => (value << 8n) | BigInt(byte), 0n)
}

/** A number as `size` bytes. */
export function toBytes(value: bigint, size: number): Uint8Array {
  return Uint8Array.from({ length: size }, (_, i) => Number((value >> BigInt(8 * i)) & 0xffn))
}
