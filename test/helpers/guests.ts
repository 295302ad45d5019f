/** The example guests as the tests use them, and what the tests have to know of the host. */

import { readdirSync, readFileSync } from 'node:fs'
import {
  type CpuMode,
  inspectHost,
  type NamedImageFormat,
  type VirtualMachineOptions,
} from '../../src/index.js'

/** What the host's KVM is: some tests can only run on some kinds. */
export const HOST_KIND = inspectHost().kind
/** All code at CPL 0 is emulated, by an emulator that lacks instructions. */
export const onPvm = HOST_KIND === 'pvm'
/** The host's own processor is emulated, and slow. */
export const onEmulated = HOST_KIND === 'emulated'

/** How often to repeat something: a tenth of it where all is slow. */
export function times(count: number): number {
  return onEmulated ? Math.ceil(count / 10) : count
}

const GUESTS = new URL('../../guests/', import.meta.url)
const IMAGES = new URL('../../build/guests/', import.meta.url)

/** `expected.json` of a guest, see guests/README.md. */
export interface ExpectedGuest {
  readonly image: string
  readonly format: NamedImageFormat
  readonly mode: CpuMode
  readonly at?: number
  readonly memorySize?: number
  readonly cmdline?: string
  readonly modules?: readonly { readonly text: string; readonly cmdline: string }[]
  readonly input?: string
  readonly device?: { readonly port: number; readonly reads: number[]; readonly writes: number[] }
  readonly serial?: string
  readonly serialPattern?: string
  readonly screen?: readonly string[]
  readonly cursor?: { readonly row: number; readonly column: number }
  readonly postCodes?: readonly number[]
  readonly result: { readonly reason: string; readonly code?: number }
}

/** Every guest: its name and what it must do. */
export function expectedGuests(): { readonly name: string; readonly expected: ExpectedGuest }[] {
  return readdirSync(GUESTS, { withFileTypes: true })
    .filter((entry) => entry.isDirectory() && entry.name !== 'lib')
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
export function optionsFor(expected: ExpectedGuest): VirtualMachineOptions {
  const { format, mode, at, memorySize, cmdline, modules } = expected
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
    },
    memory: memorySize ?? '16M',
  }
}
