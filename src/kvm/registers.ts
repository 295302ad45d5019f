/** General-purpose registers, `struct kvm_regs`. */
export interface Registers {
  rax: bigint
  rbx: bigint
  rcx: bigint
  rdx: bigint
  rsi: bigint
  rdi: bigint
  rsp: bigint
  rbp: bigint
  r8: bigint
  r9: bigint
  r10: bigint
  r11: bigint
  r12: bigint
  r13: bigint
  r14: bigint
  r15: bigint
  rip: bigint
  rflags: bigint
}

/** A segment register with its hidden part, `struct kvm_segment`. */
export interface Segment {
  base: bigint
  /** In bytes, whatever the granularity. */
  limit: number
  selector: number
  /** Descriptor type, 4 bits (Intel SDM vol. 3, 3.4.5.1 and 3.5). */
  type: number
  present: boolean
  /** Descriptor privilege level, 0 to 3. */
  dpl: number
  /** Default operation size: 1 for 32-bit code or stack. */
  db: number
  /** 1 for code and data, 0 for system descriptors (TSS, LDT). */
  s: number
  /** 1 for 64-bit code. */
  l: number
  /** Granularity: 1 when the limit counts pages. */
  g: number
  avl: number
  unusable: boolean
}

/** GDTR or IDTR, `struct kvm_dtable`. */
export interface DescriptorTable {
  base: bigint
  limit: number
}

/** Segment, table and control registers, `struct kvm_sregs`. */
export interface SpecialRegisters {
  cs: Segment
  ds: Segment
  es: Segment
  fs: Segment
  gs: Segment
  ss: Segment
  /** Task register. VT-x wants a busy TSS here whatever the mode. */
  tr: Segment
  ldt: Segment
  gdt: DescriptorTable
  idt: DescriptorTable
  cr0: bigint
  cr2: bigint
  cr3: bigint
  cr4: bigint
  cr8: bigint
  efer: bigint
  apicBase: bigint
  /** Pending external interrupts, 256 bits. Only without an in-kernel irqchip. */
  interruptBitmap: readonly [bigint, bigint, bigint, bigint]
}

/** Bytes of `struct kvm_regs`. */
export const REGS_SIZE = 144
/** Bytes of `struct kvm_sregs`. */
export const SREGS_SIZE = 312

/** The registers in the order of `struct kvm_regs`. */
export const REGISTER_NAMES = [
  'rax',
  'rbx',
  'rcx',
  'rdx',
  'rsi',
  'rdi',
  'rsp',
  'rbp',
  'r8',
  'r9',
  'r10',
  'r11',
  'r12',
  'r13',
  'r14',
  'r15',
  'rip',
  'rflags',
] as const satisfies readonly (keyof Registers)[]

const SEGMENTS = ['cs', 'ds', 'es', 'fs', 'gs', 'ss', 'tr', 'ldt'] as const
const SEGMENT_SIZE = 24
const TABLES = ['gdt', 'idt'] as const
const TABLE_SIZE = 16
const TABLES_OFFSET = SEGMENTS.length * SEGMENT_SIZE
const CONTROLS = ['cr0', 'cr2', 'cr3', 'cr4', 'cr8', 'efer', 'apicBase'] as const
const CONTROLS_OFFSET = TABLES_OFFSET + TABLES.length * TABLE_SIZE
const BITMAP_OFFSET = CONTROLS_OFFSET + CONTROLS.length * 8

/** Reads `struct kvm_regs`. */
export function decodeRegisters(view: DataView): Registers {
  const registers = {} as Registers
  REGISTER_NAMES.forEach((name, i) => {
    registers[name] = view.getBigUint64(i * 8, true)
  })
  return registers
}

/** Writes `struct kvm_regs`. */
export function encodeRegisters(view: DataView, registers: Registers): void {
  REGISTER_NAMES.forEach((name, i) => {
    view.setBigUint64(i * 8, registers[name], true)
  })
}

function decodeSegment(view: DataView, at: number): Segment {
  return {
    base: view.getBigUint64(at, true),
    limit: view.getUint32(at + 8, true),
    selector: view.getUint16(at + 12, true),
    type: view.getUint8(at + 14),
    present: view.getUint8(at + 15) !== 0,
    dpl: view.getUint8(at + 16),
    db: view.getUint8(at + 17),
    s: view.getUint8(at + 18),
    l: view.getUint8(at + 19),
    g: view.getUint8(at + 20),
    avl: view.getUint8(at + 21),
    unusable: view.getUint8(at + 22) !== 0,
  }
}

function encodeSegment(view: DataView, at: number, segment: Segment): void {
  view.setBigUint64(at, segment.base, true)
  view.setUint32(at + 8, segment.limit, true)
  view.setUint16(at + 12, segment.selector, true)
  view.setUint8(at + 14, segment.type)
  view.setUint8(at + 15, segment.present ? 1 : 0)
  view.setUint8(at + 16, segment.dpl)
  view.setUint8(at + 17, segment.db)
  view.setUint8(at + 18, segment.s)
  view.setUint8(at + 19, segment.l)
  view.setUint8(at + 20, segment.g)
  view.setUint8(at + 21, segment.avl)
  view.setUint8(at + 22, segment.unusable ? 1 : 0)
}

/** Reads `struct kvm_sregs`. */
export function decodeSpecialRegisters(view: DataView): SpecialRegisters {
  const special = {} as SpecialRegisters
  SEGMENTS.forEach((name, i) => {
    special[name] = decodeSegment(view, i * SEGMENT_SIZE)
  })
  TABLES.forEach((name, i) => {
    const at = TABLES_OFFSET + i * TABLE_SIZE
    special[name] = { base: view.getBigUint64(at, true), limit: view.getUint16(at + 8, true) }
  })
  CONTROLS.forEach((name, i) => {
    special[name] = view.getBigUint64(CONTROLS_OFFSET + i * 8, true)
  })
  special.interruptBitmap = [
    view.getBigUint64(BITMAP_OFFSET, true),
    view.getBigUint64(BITMAP_OFFSET + 8, true),
    view.getBigUint64(BITMAP_OFFSET + 16, true),
    view.getBigUint64(BITMAP_OFFSET + 24, true),
  ]
  return special
}

/** Writes `struct kvm_sregs`. */
export function encodeSpecialRegisters(view: DataView, special: SpecialRegisters): void {
  SEGMENTS.forEach((name, i) => {
    encodeSegment(view, i * SEGMENT_SIZE, special[name])
  })
  TABLES.forEach((name, i) => {
    const at = TABLES_OFFSET + i * TABLE_SIZE
    view.setBigUint64(at, special[name].base, true)
    view.setUint16(at + 8, special[name].limit, true)
  })
  CONTROLS.forEach((name, i) => {
    view.setBigUint64(CONTROLS_OFFSET + i * 8, special[name], true)
  })
  special.interruptBitmap.forEach((bits, i) => {
    view.setBigUint64(BITMAP_OFFSET + i * 8, bits, true)
  })
}
