/** One CPUID leaf, `struct kvm_cpuid_entry2`. */
export interface CpuidEntry {
  /** EAX before the instruction: the leaf. */
  function: number
  /** ECX before the instruction: the subleaf, where `flags` says that it matters. */
  index: number
  /** KVM_CPUID_FLAG_*; 1: the index is significant. */
  flags: number
  eax: number
  ebx: number
  ecx: number
  edx: number
}

const ENTRY_SIZE = 40
const FIELDS = ['function', 'index', 'flags', 'eax', 'ebx', 'ecx', 'edx'] as const

/** Reads a list of `struct kvm_cpuid_entry2`. */
export function decodeCpuid(bytes: Uint8Array): CpuidEntry[] {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength)
  return Array.from({ length: bytes.length / ENTRY_SIZE }, (_, i) => {
    const entry = {} as CpuidEntry
    FIELDS.forEach((field, j) => {
      entry[field] = view.getUint32(i * ENTRY_SIZE + j * 4, true)
    })
    return entry
  })
}

/** Writes a list of `struct kvm_cpuid_entry2`. */
export function encodeCpuid(entries: readonly CpuidEntry[]): Uint8Array {
  const bytes = new Uint8Array(entries.length * ENTRY_SIZE)
  const view = new DataView(bytes.buffer)
  entries.forEach((entry, i) => {
    FIELDS.forEach((field, j) => {
      view.setUint32(i * ENTRY_SIZE + j * 4, entry[field], true)
    })
  })
  return bytes
}
