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
