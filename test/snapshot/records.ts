import { createHash } from 'node:crypto'
import { onTestFinished } from 'vitest'
import type { DeviceState } from '../../src/bus/device.js'
import { VCPU_OPTIONAL_STRUCT_SIZES, VCPU_STRUCT_SIZES } from '../../src/kvm/vcpu-snapshot.js'
import type { MachineState } from '../../src/machine/machine-state.js'
import { MachineRam, type MemoryImage } from '../../src/memory/machine-ram.js'
import type { SnapshotFacts } from '../../src/snapshot/snapshot-folder.js'
import type { SnapshotRecord } from '../../src/snapshot/state-file.js'
import { pattern } from '../backends/disks.js'

export const PAGE = 4096
/** Bytes of the machine's RAM that records are of. */
export const MEMORY_SIZE = 4 * 2 ** 20

/** RAM of so many bytes, closed after the test. */
export function makeRam(size = MEMORY_SIZE): { readonly ram: MachineRam; readonly bytes: Uint8Array } {
  const ram = MachineRam.create({ size })
  onTestFinished(() => ram.close())
  return { ram, bytes: new Uint8Array(ram.ram.buffer()) }
}

/** The same image, closed after the test. */
export function closing(image: MemoryImage): MemoryImage {
  onTestFinished(() => image.close())
  return image
}

/** What a machine made of an image has in its RAM. */
export function bytesOf(image: MemoryImage): Uint8Array {
  const ram = MachineRam.from(image)
  try {
    return new Uint8Array(ram.ram.buffer()).slice()
  } finally {
    ram.close()
  }
}

function vcpu(seed: number): MachineState['vcpus'][number] {
  return {
    state: seed === 0 ? 'runnable' : 'parked',
    mpState: seed === 0 ? 0 : 1,
    regs: pattern(VCPU_STRUCT_SIZES.regs, seed),
    sregs: pattern(VCPU_STRUCT_SIZES.sregs, seed),
    debugRegs: pattern(VCPU_STRUCT_SIZES.debugRegs, seed),
    xsave: pattern(4096, seed),
    xcrs: pattern(VCPU_OPTIONAL_STRUCT_SIZES.xcrs, seed),
    lapic: pattern(VCPU_OPTIONAL_STRUCT_SIZES.lapic, seed),
    msrs: pattern(16 * 100, seed),
    events: pattern(VCPU_STRUCT_SIZES.events, seed),
  }
}

const leaf = { function: 0x8000_0001, index: 0, flags: 0, eax: 1, ebx: 0xffff_ffff, ecx: 3, edx: 4 }

/** What there is to say of a machine with two vCPUs, and these states of its devices. */
export function makeFacts(states: readonly DeviceState[] = [{ a: 1 }, null]): SnapshotFacts {
  return {
    host: { kind: 'hardware', processor: 'A processor', features: ['sse2', 'avx2'] },
    hardware: {
      boot: { format: 'linux', mode: 'long', entry: 0x100_0200 },
      memorySize: MEMORY_SIZE,
      hugePages: undefined,
      cpu: { model: 'host', features: { avx512f: false, 'sse4-1': true }, cores: 2 },
      cpuid: [[leaf], [leaf, { ...leaf, function: 1 }]],
      apicIds: [0, 1],
      irqchip: 'full',
      generationId: 0xe_1000,
      cmdline: 'console=ttyS0 “quoted”\n',
      fwCfgFiles: new Map([
        ['opt/b', pattern(10)],
        ['opt/a', new Uint8Array()],
      ]),
      disks: [{ serial: 'root', queues: 2 }, {}],
      console: { ports: ['org.agent'], size: { columns: 80, rows: 25 } },
      agent: true,
      rng: { bytesPerSecond: 1000 },
    },
    execution: 'auto',
    state: {
      time: 1_700_000_000_123,
      vcpus: [vcpu(0), vcpu(1)],
      clock: 0xffff_ffff_ffff_fffen,
      interrupts: { pit: pattern(112) },
      devices: states.map((state, index) => ({ name: `device ${index}`, state })),
    },
  }
}

/** A record of a full snapshot of that machine. */
export function makeRecord(states?: readonly DeviceState[]): SnapshotRecord {
  return {
    id: '01234567-89ab-4cde-8f01-23456789abcd',
    created: '2026-01-02T03:04:05.678Z',
    nodevisor: '1.2.3',
    ...makeFacts(states),
    disks: [
      { kind: 'file', path: '/disk.img' },
      { kind: 'copy', sectors: 8 },
    ],
    memory: { size: MEMORY_SIZE, pages: 'all' },
  }
}

/** A state file with this in it, and a right first line. */
export function seal(json: string | Uint8Array): Uint8Array {
  const body = Buffer.from(json)
  const checksum = createHash('sha256').update(body).digest('hex')
  return Buffer.concat([Buffer.from(`nodevisor snapshot 1 sha256:${checksum} ${body.length}\n`), body])
}

/** The text in a state file. */
export function jsonOf(file: Uint8Array): string {
  const text = Buffer.from(file).toString()
  return text.slice(text.indexOf('\n') + 1)
}
