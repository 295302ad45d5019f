/** The example guests: how each is started, and what it must do. For whoever runs all of them. */

import { existsSync, readdirSync, readFileSync } from 'node:fs'
import type { CpuMode, NamedImageFormat, VirtualMachineOptions } from '../src/index.js'

const GUESTS = new URL('./', import.meta.url)
const IMAGES = new URL('../build/guests/', import.meta.url)

/** `expected.json` of a guest, see guests/README.md. */
export interface ExpectedGuest {
  readonly image: string
  readonly format: NamedImageFormat
  readonly mode: CpuMode
  readonly at?: number
  readonly memorySize?: number
  readonly cmdline?: string
  readonly modules?: readonly { readonly text: string; readonly cmdline: string }[]
  readonly initrd?: string
  readonly input?: string
  /** Options of the machine: virtio devices. */
  readonly disks?: readonly { readonly memory: string; readonly serial?: string; readonly queues?: number }[]
  readonly console?: { readonly ports: readonly string[] }
  readonly rng?: boolean
  readonly device?: { readonly port: number; readonly reads: number[]; readonly writes: number[] }
  readonly serial?: string
  readonly serialPattern?: string
  readonly screen?: readonly string[]
  readonly cursor?: { readonly row: number; readonly column: number }
  readonly postCodes?: readonly number[]
  readonly result: { readonly reason: string; readonly code?: number }
}

/** Every guest: its name and what it must do. Folders without `expected.json` are no guests. */
export function expectedGuests(): { readonly name: string; readonly expected: ExpectedGuest }[] {
  return readdirSync(GUESTS, { withFileTypes: true })
    .filter((entry) => entry.isDirectory() && existsSync(new URL(`${entry.name}/expected.json`, GUESTS)))
    .map(({ name }) => ({
      name,
      expected: JSON.parse(readFileSync(new URL(`${name}/expected.json`, GUESTS), 'utf8')) as ExpectedGuest,
    }))
}

/** Where the build put a guest's image. */
export function imageOf(expected: Pick<ExpectedGuest, 'image'>): string {
  return new URL(expected.image, IMAGES).pathname
}

/** The options that a guest wants to be started with. */
export function optionsFor(
  expected: ExpectedGuest,
): Pick<VirtualMachineOptions, 'kernel' | 'memory' | 'disks' | 'console' | 'rng'> {
  const { format, mode, at, memorySize, cmdline, modules, initrd, disks, console, rng } = expected
  return {
    kernel: {
      image: imageOf(expected),
      format,
      ...(format === 'flat' ? { mode } : {}),
      ...(at === undefined ? {} : { at }),
      ...(cmdline === undefined ? {} : { cmdline }),
      ...(modules === undefined
        ? {}
        : {
            modules: modules.map((module) => ({ image: Buffer.from(module.text), cmdline: module.cmdline })),
          }),
      ...(initrd === undefined ? {} : { initrd: Buffer.from(initrd) }),
    },
    memory: memorySize ?? '16M',
    ...(disks === undefined ? {} : { disks }),
    ...(console === undefined ? {} : { console }),
    ...(rng === undefined ? {} : { rng }),
  }
}
