/** The guest `virtio`, what it prints, and drivers of a few instructions. */

import { expect } from 'vitest'
import type { VirtualMachine, VirtualMachineOptions } from '../../src/index.js'
import { type Code, debugExit, dword, flat, program } from '../helpers/code.js'
import { imageOf } from '../helpers/guests.js'
import { RUN_LIMIT } from '../helpers/limits.js'
import { boot as bootMachine, EXECUTIONS } from './boot.js'

/** Every kind of machine: `irqchip`, `execution`, and the guest's word for how it waits. */
export const MACHINES = (['none', 'full', 'split'] as const).flatMap((irqchip) =>
  EXECUTIONS.map((execution) => [irqchip, execution, irqchip === 'none' ? '' : 'irq'] as const),
)

export const SECTOR = 512

/** How the guest ends when all went well. */
export const SUCCESS = { reason: 'debug-exit', code: 16 }

/** The guest's kernel options for words of its README. */
export function virtioGuest(cmdline: string): { readonly image: string; readonly cmdline: string } {
  return { image: imageOf({ image: 'virtio.elf' }), cmdline }
}

/** A machine with the guest, that is closed when the test is over. */
export function bootVirtio(
  cmdline: string,
  options: Partial<VirtualMachineOptions> = {},
): Promise<VirtualMachine> {
  return bootMachine(virtioGuest(cmdline), { memory: '16M', ...options })
}

/** Runs the guest to its end. @returns the lines it printed, without `done` */
export async function linesOf(vm: VirtualMachine): Promise<string[]> {
  const result = await vm.run({ timeout: RUN_LIMIT })
  const lines = vm.serial.output.split('\n')
  // With what it said, should it have failed.
  expect({ ...result, said: lines.slice(-2) }).toMatchObject({ ...SUCCESS, said: ['done', ''] })
  return lines.slice(0, -2)
}

export interface ExpectedDisk {
  readonly sectors: number
  readonly queues?: number
  readonly serial?: string
  /** The first 16 characters on it, if they are printed. */
  readonly begin?: string
  readonly readOnly?: boolean
  /** The driver uses indirect descriptors: yes unless given. */
  readonly indirect?: boolean
  /** The disk offers discard and write zeroes: yes unless given. */
  readonly clears?: boolean
}

/** What the word `block` prints of a disk. */
export function blockLines(number: number, disk: ExpectedDisk): string[] {
  const { sectors, queues = 1, serial = '', begin, readOnly = false, indirect = true, clears = true } = disk
  const plural = queues === 1 ? 'queue' : 'queues'
  const lines = [
    `${sectors} sectors, blocks of 512 bytes, ${queues} ${plural}${readOnly ? ', read-only' : ''}`,
    `id ${serial}`,
    ...(begin === undefined ? [] : [`begins with ${begin}`]),
  ]
  if (!readOnly) {
    lines.push('write and read ok', 'scattered descriptors ok', 'header and data together ok')
    if (indirect) lines.push('indirect descriptors ok')
    lines.push('8 in flight ok')
    if (clears) lines.push('discard ok', 'write zeroes ok')
  }
  lines.push('flush ok', 'errors ok')
  if (queues > 1) lines.push(`${queues} queues ok`)
  return lines.map((line) => `block ${number}: ${line}`)
}

/** What the word `entropy` prints. */
export function entropyLines(indirect = true): string[] {
  return [
    'entropy: 64 bytes, 64 bytes, different',
    'entropy: 3 descriptors ok',
    ...(indirect ? ['entropy: indirect descriptors ok'] : []),
  ]
}

/** What the word `console` prints: a line for each port. */
export function consoleLines(names: readonly string[], size = '80x25'): string[] {
  return [
    `console 0 port 0: open, console, ${size}`,
    ...names.map((name, index) => `console 0 port ${index + 1}: open, named ${name}`),
  ]
}

/** What the guest writes into a sector. */
export function sectorPattern(sector: number): Uint8Array {
  return Uint8Array.from({ length: SECTOR }, (_, i) => (7 * sector + i) % 251)
}

/**
 * The sectors that the word `block` has written, by a disk's bytes before and after it. Fails if one has anything but what
 * was there, the guest's pattern or, where the guest made it so, zeros.
 */
export function writtenSectors(before: Uint8Array, after: Uint8Array): number[] {
  expect(after.length).toBe(before.length)
  const written: number[] = []
  for (let sector = 0; sector * SECTOR < after.length; sector++) {
    const [old, now] = [before, after].map((bytes) =>
      Buffer.from(bytes.buffer, bytes.byteOffset + sector * SECTOR, SECTOR),
    )
    if (now!.equals(old!)) continue
    const wanted = sector === CLEARED_SECTOR ? Buffer.alloc(SECTOR) : sectorPattern(sector)
    if (!now!.equals(wanted)) expect([sector, [...now!]]).toEqual([sector, [...wanted]])
    written.push(sector)
  }
  return written
}

/** Made zero at last. */
const CLEARED_SECTOR = 8

/** Expects that the word `block` has written a disk of so many sectors as it does. */
export function expectWritten(before: Uint8Array, after: Uint8Array): void {
  const written = writtenSectors(before, after)
  const zero = before
    .subarray(CLEARED_SECTOR * SECTOR, (CLEARED_SECTOR + 1) * SECTOR)
    .every((byte) => byte === 0)
  const fixed = [1, 2, 3, 4, 5, 6, 7, ...(zero ? [] : [CLEARED_SECTOR]), 9]
  expect(written.slice(0, fixed.length)).toEqual(fixed)
  // 8 in flight, and the last one.
  expect(written.slice(fixed.length)).toHaveLength(9)
  expect(written.at(-1)).toBe(after.length / SECTOR - 1)
}

// --- Drivers of a few instructions, in long mode

/** Where the first virtio device has its registers, and the next one after it. */
export const FIRST_DEVICE = 0xfeb0_0000
export const DEVICE_STRIDE = 0x1000

// VIRTIO 1.2, 4.2.2: MMIO Device Register Layout
export const DriverFeatures = 0x020
export const DriverFeaturesSel = 0x024
export const QueueSel = 0x030
export const QueueNum = 0x038
export const QueueReady = 0x044
export const QueueNotify = 0x050
export const Status = 0x070
export const QueueDescLow = 0x080
export const QueueDriverLow = 0x090
export const QueueDeviceLow = 0x0a0

export const VIRTQ_DESC_F_NEXT = 1
export const VIRTQ_DESC_F_WRITE = 2

/** Where {@link startQueue} has the rings of a queue: above the kernel, in a machine of 4 MiB. */
export const RINGS = { descriptors: 0x20_0000, avail: 0x20_1000, used: 0x20_2000, size: 64 } as const

/** `mov [device + register], value`. */
export const writeRegister = (register: number, value: number, device = FIRST_DEVICE): Code => [
  ...flat.movEbx(device + register),
  ...flat.movEax(value),
  ...flat.STORE_EAX,
]

/** Makes a device ready, with one queue at {@link RINGS}. */
export const startQueue = (queue = 0, device = FIRST_DEVICE): Code =>
  (
    [
      [Status, 1],
      [Status, 3],
      [DriverFeaturesSel, 1],
      [DriverFeatures, 1], // VIRTIO_F_VERSION_1
      [Status, 11],
      [QueueSel, queue],
      [QueueNum, RINGS.size],
      [QueueDescLow, RINGS.descriptors],
      [QueueDriverLow, RINGS.avail],
      [QueueDeviceLow, RINGS.used],
      [QueueReady, 1],
      [Status, 15],
    ] as const
  ).flatMap(([register, value]) => [...writeRegister(register, value, device)])

/** `body`, without end, in long mode: `jmp` back to its start. */
export const foreverLong = (body: Code): Code => [...body, 0xe9, ...dword(-(body.length + 5))]

/** Waits until something was used in the queue of {@link RINGS}: mov ax, [rbx]; test ax, ax; jz back. */
export const WAIT_FOR_USED: Code = [
  ...flat.movEbx(RINGS.used + 2),
  ...flat.LOAD_AX,
  ...[0x66, 0x85, 0xc0, 0x74, 0xf8],
]

/** Offers the chain at descriptor 0, notifies, and ends with debug-exit once it was used. */
export const ONE_REQUEST = program(startQueue(), writeRegister(QueueNotify, 0), WAIT_FOR_USED, debugExit(1))

interface Descriptor {
  readonly address: number
  readonly length: number
  readonly flags?: number
}

/** Writes a chain into the queue of {@link RINGS}, from descriptor 0 on, and makes it available. */
export function offerChain(vm: VirtualMachine, chain: readonly Descriptor[]): void {
  chain.forEach(({ address, length, flags = 0 }, index) => {
    const at = RINGS.descriptors + 16 * index
    const isLast = index === chain.length - 1
    vm.memory.writeUint32(at, address)
    vm.memory.writeUint32(at + 8, length)
    vm.memory.writeUint16(at + 12, flags | (isLast ? 0 : VIRTQ_DESC_F_NEXT))
    vm.memory.writeUint16(at + 14, isLast ? 0 : index + 1)
  })
  vm.memory.writeUint16(RINGS.avail + 2, 1)
}

const HEADER = 0x20_3000
const DATA = 0x21_0000
const STATUS = 0x20_4000

/** Has a guest read sectors of its first disk. @returns the bytes, and the status of the request */
export async function readDisk(
  options: Partial<VirtualMachineOptions>,
  sector: number,
  count: number,
): Promise<{ readonly status: number; readonly bytes: Uint8Array }> {
  const vm = await bootMachine({ image: ONE_REQUEST, mode: 'long' }, options)
  vm.memory.write(HEADER, new Uint8Array(16))
  vm.memory.writeUint32(HEADER + 8, sector)
  vm.memory.writeUint8(STATUS, 0xff)
  offerChain(vm, [
    { address: HEADER, length: 16 },
    { address: DATA, length: count * SECTOR, flags: VIRTQ_DESC_F_WRITE },
    { address: STATUS, length: 1, flags: VIRTQ_DESC_F_WRITE },
  ])
  expect(await vm.run({ timeout: RUN_LIMIT })).toMatchObject({ reason: 'debug-exit', code: 1 })
  const answer = { status: vm.memory.readUint8(STATUS), bytes: vm.memory.read(DATA, count * SECTOR) }
  await vm.close()
  return answer
}
