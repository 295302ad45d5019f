/**
 * Guests of a few instructions, assembled by hand. Real mode at 0x7c00 unless a comment says otherwise; put together
 * with {@link program}.
 */

/** Machine code. */
export type Code = readonly number[]

/** An image of the parts, one after the other. */
export function program(...parts: Code[]): Uint8Array {
  return Uint8Array.from(parts.flat())
}

const low = (value: number) => value & 0xff
const high = (value: number) => (value >> 8) & 0xff
/** Four bytes, little-endian. */
export const dword = (value: number): Code => [0, 8, 16, 24].map((shift) => (value >>> shift) & 0xff)

/** `hlt`, in every mode. */
export const HLT: Code = [0xf4]
/** `jmp $`, in every mode: a guest that spins. */
export const SPIN: Code = [0xeb, 0xfe]
/** `ud2`, in every mode. In long mode, where no interrupt table is loaded: a triple fault. */
export const UD2: Code = [0x0f, 0x0b]

/** `mov al, value`, in every mode. */
export const movAl = (value: number): Code => [0xb0, value]
/** `mov al, value; out port, al`, in every mode; the port is below 0x100. */
export const outb = (port: number, value: number): Code => [0xb0, value, 0xe6, port]
/** `in al, port`, in every mode; the port is below 0x100. */
export const inb = (port: number): Code => [0xe4, port]
/** A write to the debug-exit port, in every mode. */
export const debugExit = (code: number): Code => outb(0xf4, code)

/** `mov dx, port`. */
export const movDx = (port: number): Code => [0xba, low(port), high(port)]
/** `mov cx, value`. */
export const movCx = (value: number): Code => [0xb9, low(value), high(value)]
/** `mov si, value`. */
export const movSi = (value: number): Code => [0xbe, low(value), high(value)]
/** `mov di, value`. */
export const movDi = (value: number): Code => [0xbf, low(value), high(value)]
/** `mov ax, value`. */
export const movAx = (value: number): Code => [0xb8, low(value), high(value)]
/** `mov eax, value`. */
export const movEax = (value: number): Code => [0x66, 0xb8, ...dword(value)]

/** `out dx, al`, in every mode. */
export const OUT_DX_AL: Code = [0xee]
/** `out dx, ax`. */
export const OUT_DX_AX: Code = [0xef]
/** `out dx, eax`. */
export const OUT_DX_EAX: Code = [0x66, 0xef]
/** `in al, dx`, in every mode. */
export const IN_AL_DX: Code = [0xec]
/** `in ax, dx`. */
export const IN_AX_DX: Code = [0xed]
/** `in eax, dx`. */
export const IN_EAX_DX: Code = [0x66, 0xed]

/** `mov [address], al`: a byte of the first 64 KiB. */
export const storeAl = (address: number): Code => [0xa2, low(address), high(address)]
/** `mov [address], ax`. */
export const storeAx = (address: number): Code => [0xa3, low(address), high(address)]
/** `mov [address], eax`. */
export const storeEax = (address: number): Code => [0x66, 0xa3, low(address), high(address)]
/** `mov al, [address]`. */
export const loadAl = (address: number): Code => [0xa0, low(address), high(address)]

/** `mov dx, port; mov al, value; out dx, al`: any port. */
export const outPort = (port: number, value: number): Code => [...movDx(port), ...movAl(value), ...OUT_DX_AL]

/** Writes text to a port, byte by byte: the serial port unless given. */
export const print = (text: string, port = 0x3f8): Code => [
  ...movDx(port),
  ...[...Buffer.from(text)].flatMap((byte) => [...movAl(byte), ...OUT_DX_AL]),
]

/** `body`, without end: `jmp` back to its start. */
export const forever = (body: Code): Code => [...body, 0xe9, ...relative(-(body.length + 3))]

/** `body`, `count` times: `mov cx, count` before it, `dec cx; jnz` to its start after it. */
export const repeat = (count: number, body: Code): Code => [
  ...movCx(count),
  ...body,
  0x49, // dec cx
  0x0f, // jnz near
  0x85,
  ...relative(-(body.length + 5)),
]

const relative = (offset: number): Code => [low(offset), high(offset)]

/** Serial echo: what comes in goes out, without end. 0 ends the machine with debug-exit 0. */
export const ECHO: Code = [
  ...movDx(0x3fd), // wait: line status
  0xec, //            in al, dx
  0xa8, //            test al, 1: has something come?
  0x01,
  0x74, //            jz wait
  0xf8,
  ...movDx(0x3f8),
  0xec, //            in al, dx
  0x84, //            test al, al
  0xc0,
  0x74, //            jz end
  0x03,
  0xee, //            out dx, al
  0xeb, //            jmp wait
  0xed,
  0xe6, // end:       out 0xf4, al
  0xf4,
]

/** Counts in the byte at 0x500, without end: a guest whose progress the host can see. */
export const COUNT: Code = [
  0xfe, // inc byte [0x500]
  0x06,
  0x00,
  0x05,
  0xeb, // jmp to it
  0xfa,
]

/** 32-bit protected or 64-bit long mode. */
export const flat = {
  /** `mov edx, port`. */
  movDx: (port: number): Code => [0xba, ...dword(port)],
  /** `mov eax, value`. */
  movEax: (value: number): Code => [0xb8, ...dword(value)],
  /** `mov ebx, value`. */
  movEbx: (value: number): Code => [0xbb, ...dword(value)],
  /** `mov [ebx], al`; `rbx` in long mode. */
  STORE_AL: [0x88, 0x03] as Code,
  /** `mov [ebx], ax`. */
  STORE_AX: [0x66, 0x89, 0x03] as Code,
  /** `mov [ebx], eax`. */
  STORE_EAX: [0x89, 0x03] as Code,
  /** `mov al, [ebx]`. */
  LOAD_AL: [0x8a, 0x03] as Code,
  /** `mov ax, [ebx]`. */
  LOAD_AX: [0x66, 0x8b, 0x03] as Code,
  /** `mov eax, [ebx]`. */
  LOAD_EAX: [0x8b, 0x03] as Code,
  /** `jmp ebx`; `rbx` in long mode. */
  JMP_EBX: [0xff, 0xe3] as Code,
}

/** 64-bit long mode. */
export const long = {
  /** `mov rax, value`. */
  movRax: (value: bigint): Code => [0x48, 0xb8, ...qword(value)],
  /** `mov [rbx], rax`. */
  STORE_RAX: [0x48, 0x89, 0x03] as Code,
  /** `mov rax, [rbx]`. */
  LOAD_RAX: [0x48, 0x8b, 0x03] as Code,
}

/** Eight bytes, little-endian. */
export const qword = (value: bigint): Code =>
  Array.from({ length: 8 }, (_, i) => Number((value >> BigInt(8 * i)) & 0xffn))
