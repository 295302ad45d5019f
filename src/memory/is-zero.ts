/** Compared a piece at a time: most bytes that are not zero differ soon. */
const ZEROS = new Uint8Array(4096)

/** Whether all bytes are 0. */
export function isZero(bytes: Uint8Array): boolean {
  for (let at = 0; at < bytes.length; at += ZEROS.length) {
    const piece = bytes.subarray(at, at + ZEROS.length)
    if (Buffer.compare(piece, ZEROS.subarray(0, piece.length)) !== 0) return false
  }
  return true
}
