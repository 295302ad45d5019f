/** Images of Linux kernels, with fields that may lie. */

import { execFileSync, spawnSync } from 'node:child_process'
import { gzipSync } from 'node:zlib'
import { parseElf } from '../../src/boot/elf.js'
import { concat, makeElf, pattern } from '../helpers/images.js'
import { makeNote, padded, words } from './protocols.js'

/** The note that makes an ELF file a Linux `vmlinux`. */
export const LINUX_NOTE = makeNote('Linux', 0x100, new TextEncoder().encode('salt\0'))

/** A `vmlinux` at 16 MiB that has nothing but a pattern. */
export function makeVmlinux(
  options: { readonly size?: number; readonly notes?: Uint8Array } = {},
): Uint8Array {
  const { size = 400, notes = LINUX_NOTE } = options
  return makeElf(64, {
    segments: [
      { paddr: 0x100_0000n, vaddr: 0xffff_ffff_8100_0000n, bytes: pattern(size), memsz: 0x2_0000n },
      ...(notes.length === 0 ? [] : [{ type: 4, paddr: 0n, bytes: notes }]),
    ],
    entry: 0x100_0000n,
  })
}

/** A bzImage. Fields left out are true. */
export interface BzImageSpec {
  /** Behind it comes what is needed for a whole number of paragraphs. */
  readonly code?: Uint8Array
  readonly payload?: Uint8Array
  readonly setupSects?: number
  readonly syssize?: number
  readonly bootFlag?: number
  readonly jump?: number
  readonly magic?: number
  readonly version?: number
  readonly loadflags?: number
  readonly xloadflags?: number
  readonly cmdlineSize?: number
  readonly initrdAddrMax?: number
  readonly payloadOffset?: number
  readonly payloadLength?: number
  readonly prefAddress?: bigint
  readonly initSize?: number
}

/** Makes a bzImage: two sectors, code, payload. */
export function makeBzImage(spec: BzImageSpec = {}): Uint8Array {
  const { payload = new Uint8Array(0), code = payload.length === 0 ? pattern(0x400) : pattern(0x220) } = spec
  const kernel = padded(concat(code, payload), 16)
  const setup = new Uint8Array(2 * 512)
  const view = new DataView(setup.buffer)
  view.setUint8(0x1f1, spec.setupSects ?? 1)
  view.setUint32(0x1f4, spec.syssize ?? kernel.length / 16, true)
  view.setUint16(0x1fe, spec.bootFlag ?? 0xaa55, true)
  view.setUint16(0x200, 0xeb | ((spec.jump ?? 0x6a) << 8), true)
  view.setUint32(0x202, spec.magic ?? 0x5372_6448, true)
  view.setUint16(0x206, spec.version ?? 0x20f, true)
  view.setUint8(0x211, spec.loadflags ?? 1)
  view.setUint32(0x22c, spec.initrdAddrMax ?? 0x7fff_ffff, true)
  view.setUint16(0x236, spec.xloadflags ?? 0x7f, true)
  view.setUint32(0x238, spec.cmdlineSize ?? 2047, true)
  view.setUint32(0x248, spec.payloadOffset ?? (payload.length === 0 ? 0 : code.length), true)
  view.setUint32(0x24c, spec.payloadLength ?? payload.length, true)
  view.setBigUint64(0x258, spec.prefAddress ?? 0x100_0000n, true)
  view.setUint32(0x260, spec.initSize ?? 0x10_0000, true)
  return concat(setup, kernel)
}

/** Behind what is packed, as the kernel's build has it. */
const withSize = (packed: Uint8Array, size: number) => concat(packed, words(size))

/** A block of literals alone: LZ4 that needs no compressor. */
function storeLz4(bytes: Uint8Array): Uint8Array {
  const extra = bytes.length - 15
  const lengths = extra < 0 ? [] : [...Array<number>(Math.floor(extra / 255)).fill(255), extra % 255]
  const block = concat(Uint8Array.of(Math.min(bytes.length, 15) << 4, ...lengths), bytes)
  return concat(words(0x184c_2102, block.length), block)
}

const has = (program: string) => spawnSync(program, ['--version']).status === 0
const pipe = (program: string, args: readonly string[]) => (input: Uint8Array) =>
  new Uint8Array(execFileSync(program, args, { input, maxBuffer: 2 ** 28, stdio: ['pipe', 'pipe', 'pipe'] }))

/** A way to pack, and whether the program for it is installed here. */
export interface Packer {
  readonly name: string
  readonly available: boolean
  pack(bytes: Uint8Array): Uint8Array
}

/** Packs as the kernel's build does (scripts/Makefile.lib), for each compression that is unpacked on the host. */
export const PACKERS: readonly Packer[] = [
  { name: 'gzip', available: true, pack: (bytes) => new Uint8Array(gzipSync(bytes, { level: 9 })) },
  { name: 'stored LZ4', available: true, pack: (bytes) => withSize(storeLz4(bytes), bytes.length) },
  ...(
    [
      ['lz4', 'lz4', ['-l', '-9', '-c']],
      ['zstd', 'zstd', ['-q', '-19', '-c']],
      ['xz', 'xz', ['--check=crc32', '--x86', '--lzma2=dict=1MiB', '-c']],
      ['xz in blocks', 'xz', ['--check=none', '--block-size=1000', '--lzma2=lc=1,lp=2,pb=0', '-c']],
    ] as const
  ).map(([name, program, args]) => ({
    name: `${name} (needs ${program})`,
    available: has(program),
    pack: (bytes: Uint8Array) => withSize(pipe(program, args)(bytes), bytes.length),
  })),
]

/** A bzImage that needs not be unpacked: at its 64-bit entry point it jumps to where an ELF kernel starts. */
export function makeSelfUnpacked(elf: Uint8Array): Uint8Array {
  const { segments, virtualEntry } = parseElf(elf)
  const start = Math.min(...segments.map(({ address }) => Number(address)))
  const end = Math.max(...segments.map(({ address, bytes }) => Number(address) + bytes.length))
  const loadAddress = start - 0x1000
  const code = new Uint8Array(end - loadAddress)
  code[0x200] = 0xe9 // jmp
  new DataView(code.buffer).setInt32(0x201, Number(virtualEntry) - (loadAddress + 0x205), true)
  for (const { address, bytes } of segments) code.set(bytes, Number(address) - loadAddress)
  return makeBzImage({ code, prefAddress: BigInt(loadAddress), initSize: 0x10_0000 })
}
