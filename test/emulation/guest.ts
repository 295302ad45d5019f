import { flatSegment, specialRegisters, taskSegment } from '../../src/boot/processor.js'
import { finishInstruction } from '../../src/emulation/index.js'
import { inspectHost, Kvm, type Registers, type SpecialRegisters, type Vcpu } from '../../src/kvm/index.js'
import { GuestMemory } from '../../src/memory/guest-memory.js'
import { ENTRY, makeMetal, nextExit, RAM_SIZE } from '../kvm/metal.js'

/** How a guest's code is read. */
export type Mode = 'real' | 'protected' | 'long'

export const CODE_SELECTOR = 0x08
export const DATA_SELECTOR = 0x10
const TSS_SELECTOR = 0x18
/** Of code and data at privilege level 3. */
export const USER_CODE = 0x2b
export const USER_DATA = 0x33
export const READ_ONLY_SELECTOR = 0x38

const PML4 = 0x2000
const PDPT = 0x3000
const PAGE_DIRECTORY = 0x4000
/** Maps the first 2 MiB, 4 KiB each. */
export const PAGE_TABLE = 0x5000
export const GDT = 0x6000
const GDT_LIMIT = 0x3f
const TSS = 0x6100
const TSS_SIZE = 0x68
export const IDT = 0x7000
/** Handlers of exceptions and interrupts: each writes its vector to that port, and halts. */
const HANDLERS = 0x8000
const HANDLER_SIZE = 0x10
export const STACK = 0xb000
/** Stack for privilege level 0, after code of level 3. */
export const KERNEL_STACK = 0xc000
/** Where tests have their data. */
export const DATA = 0xd000

const CR4_PAE = 1n << 5n
export const CR4_OSFXSR = 1n << 9n
const CR4_OSXMMEXCPT = 1n << 10n
export const CR4_OSXSAVE = 1n << 18n
const CR0_PROTECTED = 0x33n
const CR0_WP_PG = 0x8001_0000n
const EFER_LONG = 0x500n

const { kind } = inspectHost()
/** Whether KVM hands over what its emulator lacks. Elsewhere the processor executes it. */
export const isPvm = kind === 'pvm'
/** The processor is QEMU's, which checks no segment limits, alignment or reserved bits: nothing to compare with. */
export const isEmulated = kind === 'emulated'

const kvm = isPvm ? undefined : new Kvm()
const supported = kvm?.getSupportedCpuid()
kvm?.close()

/** Features that not every processor has: leaf and subleaf, register and bit of CPUID. */
const FEATURES = {
  cmpxchg16b: [1, 0, 'ecx', 13],
  sse42: [1, 0, 'ecx', 20],
  popcnt: [1, 0, 'ecx', 23],
  xsave: [1, 0, 'ecx', 26],
  invpcid: [7, 0, 'ebx', 10],
  adx: [7, 0, 'ebx', 19],
  smap: [7, 0, 'ebx', 20],
  clwb: [7, 0, 'ebx', 24],
  xsavec: [0xd, 1, 'eax', 1],
  xsaves: [0xd, 1, 'eax', 3],
  rdtscp: [0x8000_0001, 0, 'edx', 27],
} as const

/** Whether a guest can use a feature: on PVM always, elsewhere where the processor has it. */
export function offers(feature: keyof typeof FEATURES): boolean {
  const [leaf, subleaf, register, bit] = FEATURES[feature]
  const entry = supported?.find(({ function: number, index }) => number === leaf && index === subleaf)
  return isPvm || ((entry?.[register] ?? 0) & (1 << bit)) !== 0
}

/** A guest of a test. */
export interface GuestOptions {
  readonly mode?: Mode
  readonly code: readonly number[]
  readonly registers?: Partial<Registers>
  readonly special?: Partial<SpecialRegisters>
  /** Bytes at addresses. */
  readonly memory?: Readonly<Record<number, ArrayLike<number>>>
  /** What else has to be set up. */
  readonly prepare?: (guest: { vcpu: Vcpu; view: DataView }) => void
}

/** How it ended. */
export interface Ended {
  readonly registers: Registers
  readonly special: SpecialRegisters
  readonly vcpu: Vcpu
  readonly view: DataView
  readonly bytes: Uint8Array
  /** Exceptions and interrupts that arrived, by vector. */
  readonly vectors: number[]
  /** Mnemonics of what was finished for KVM. */
  readonly finished: string[]
}

function descriptor(limit: number, access: number, flags: number, base = 0): bigint {
  return (
    BigInt(limit & 0xffff) |
    (BigInt(base) << 16n) |
    (BigInt(access) << 40n) |
    (BigInt(limit >> 16) << 48n) |
    (BigInt(flags) << 52n)
  )
}

/** A gate of the IDT. @param type - 0xe for an interrupt gate, 0xf for a trap gate */
export function setGate(view: DataView, mode: Mode, vector: number, offset: number, access = 0x8e): void {
  const at = IDT + vector * (mode === 'long' ? 16 : 8)
  view.setUint16(at, offset, true)
  view.setUint16(at + 2, CODE_SELECTOR, true)
  view.setUint16(at + 4, access << 8, true)
}

function enterMode(vcpu: Vcpu, mode: Exclude<Mode, 'real'>, special: Partial<SpecialRegisters>): void {
  const long = mode === 'long'
  const data = flatSegment(DATA_SELECTOR, 'data')
  const state = specialRegisters({
    cs: flatSegment(CODE_SELECTOR, long ? 'code64' : 'code32'),
    data,
    ss: { ...data },
    tr: taskSegment(TSS_SELECTOR, TSS, TSS_SIZE - 1),
    gdt: { base: BigInt(GDT), limit: GDT_LIMIT },
    idt: { base: BigInt(IDT), limit: 256 * (long ? 16 : 8) - 1 },
    cr0: CR0_PROTECTED | (long ? CR0_WP_PG : 0n),
    cr3: long ? BigInt(PML4) : 0n,
    cr4: CR4_OSFXSR | CR4_OSXMMEXCPT | (long ? CR4_PAE : 0n),
    efer: long ? EFER_LONG : 0n,
  })
  vcpu.setSregs({ ...state, ...special })
}

/** Makes a vCPU in a mode, at its first instruction. */
export function makeGuest({ mode = 'long', code, registers, special, memory, prepare }: GuestOptions) {
  const { vcpu, kvm, memory: bytes } = makeMetal({ code: [...code, 0xf4] })
  const view = new DataView(bytes.buffer)
  vcpu.setCpuid(kvm.getSupportedCpuid())
  view.setBigUint64(PML4, BigInt(PDPT | 7), true)
  view.setBigUint64(PDPT, BigInt(PAGE_DIRECTORY | 7), true)
  view.setBigUint64(PAGE_DIRECTORY, BigInt(PAGE_TABLE | 7), true)
  for (let page = 0; page < RAM_SIZE; page += 0x1000) {
    view.setBigUint64(PAGE_TABLE + page / 512, BigInt(page | 7), true)
  }
  const codeFlags = mode === 'long' ? 0xa : 0xc
  const gdt = [
    0n,
    descriptor(0xf_ffff, 0x9b, codeFlags),
    descriptor(0xf_ffff, 0x93, 0xc),
    descriptor(TSS_SIZE - 1, 0x8b, 0, TSS),
    0n, // the TSS's upper half in long mode
    descriptor(0xf_ffff, 0xfb, codeFlags),
    descriptor(0xf_ffff, 0xf3, 0xc),
    descriptor(0x1234, 0x91, 4),
  ]
  for (const [i, entry] of gdt.entries()) view.setBigUint64(GDT + i * 8, entry, true)
  view.setUint32(TSS + 4, KERNEL_STACK, true)
  if (mode === 'protected') view.setUint16(TSS + 8, DATA_SELECTOR, true)
  view.setUint16(TSS + TSS_SIZE - 2, TSS_SIZE, true)
  for (let vector = 0; vector < 256; vector++) {
    const handler = HANDLERS + vector * HANDLER_SIZE
    bytes.set([0xe6, vector, 0xf4], handler) // out vector, al; hlt
    if (mode === 'real') view.setUint32(vector * 4, handler, true)
    else setGate(view, mode, vector, handler)
  }
  for (const [address, content] of Object.entries(memory ?? {})) bytes.set(content, Number(address))
  if (mode !== 'real') enterMode(vcpu, mode, special ?? {})
  vcpu.setRegs({ ...vcpu.getRegs(), rsp: BigInt(STACK), rip: BigInt(ENTRY), rflags: 2n, ...registers })
  prepare?.({ vcpu, view })
  return { vcpu, view, bytes, memory: new GuestMemory([{ start: 0, buffer: bytes.buffer as ArrayBuffer }]) }
}

/** Enough for every program here, on every host. */
const MAX_EXITS = 100

/** Runs a program to its `hlt`, or to that of an exception's handler, and finishes whatever KVM hands over. */
export function runGuest(options: GuestOptions): Ended {
  const { vcpu, view, bytes, memory } = makeGuest(options)
  const vectors: number[] = []
  const finished: string[] = []
  for (let exits = 0; exits < MAX_EXITS; exits++) {
    const exit = nextExit(vcpu)
    if (exit.kind === 'halt') {
      return {
        registers: vcpu.getRegs(),
        special: vcpu.getSregs(),
        vcpu,
        view,
        bytes,
        vectors,
        finished,
      }
    }
    if (exit.kind === 'io' && exit.direction === 'out') {
      vectors.push(exit.port)
    } else if (exit.kind === 'internal-error' && exit.instruction !== undefined) {
      const result = finishInstruction(vcpu, memory, exit.instruction)
      if (!result.finished) throw new Error(`${result.mnemonic ?? 'unknown instruction'}: ${result.why}`)
      finished.push(result.mnemonic)
    } else {
      throw new Error(`Unexpected exit ${exit.kind} at ${vcpu.getRegs().rip.toString(16)}`)
    }
  }
  throw new Error('The guest does not end')
}
