/** A model-specific register and its value, `struct kvm_msr_entry`. */
export interface MsrEntry {
  readonly index: number
  readonly value: bigint
}

const ENTRY_SIZE = 16

/** Reads the first `count` of a list of `struct kvm_msr_entry`. */
export function decodeMsrs(bytes: Uint8Array, count: number): MsrEntry[] {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength)
  return Array.from({ length: count }, (_, i) => ({
    index: view.getUint32(i * ENTRY_SIZE, true),
    value: view.getBigUint64(i * ENTRY_SIZE + 8, true),
  }))
}

/** Writes a list of `struct kvm_msr_entry`. */
export function encodeMsrs(entries: readonly MsrEntry[]): Uint8Array {
  const bytes = new Uint8Array(entries.length * ENTRY_SIZE)
  const view = new DataView(bytes.buffer)
  entries.forEach(({ index, value }, i) => {
    view.setUint32(i * ENTRY_SIZE, index, true)
    view.setBigUint64(i * ENTRY_SIZE + 8, value, true)
  })
  return bytes
}
