/** Kernels that say what a boot protocol told them, on the host's KVM. */

import { readFileSync } from 'node:fs'
import { describe, expect, it } from 'vitest'
import type { VirtualMachineOptions } from '../../src/index.js'
import { imageOf } from '../helpers/guests.js'
import { concat } from '../helpers/images.js'
import { RUN_LIMIT } from '../helpers/limits.js'
import { boot } from '../machine/boot.js'
import { makeMultiboot2Header } from './protocols.js'

type Kernel = Exclude<VirtualMachineOptions['kernel'], string | URL | Uint8Array>

/** Runs a kernel to its end; what it printed, line by line. */
async function linesOf(kernel: Kernel, format: string, memory: number | string = '16M') {
  const vm = await boot(kernel, { memory })
  expect(vm.boot).toMatchObject({ format, mode: 'protected' })
  expect(await vm.run({ timeout: RUN_LIMIT })).toMatchObject({ reason: 'debug-exit', code: 16 })
  return vm.serial.output.trimEnd().split('\n')
}

const MULTIBOOT2 = imageOf({ image: 'hello-multiboot2.elf' })
const PVH = imageOf({ image: 'hello-pvh.elf' })

describe.each([
  ['Multiboot 2', 'multiboot2', MULTIBOOT2],
  ['PVH', 'pvh', PVH],
])('a %s kernel that names no format', (_, format, image) => {
  it('is started by its protocol, with an empty command line and no modules', async () => {
    const lines = await linesOf({ image }, format)
    expect(lines).toContain('command line: ')
    expect(lines.filter((line) => line.startsWith('module'))).toEqual([])
  })

  it('reads a long command line and many modules', async () => {
    const cmdline = 'word '.repeat(200)
    const modules = Array.from({ length: 20 }, (_, index) => ({
      image: Buffer.from(`text ${index}`),
      cmdline: `name ${index}`,
    }))
    const lines = await linesOf({ image, cmdline, modules }, format)
    expect(lines).toContain(`command line: ${cmdline}`)
    expect(lines.filter((line) => line.startsWith('module'))).toEqual(
      modules.map((_, index) => `module name ${index}: text ${index}`),
    )
  })

  it('reads how many entries the memory map has', async () => {
    expect(await linesOf({ image }, format, '2M')).toContain('memory map: 4 entries')
    expect(await linesOf({ image }, format, '64M')).toContain('memory map: 4 entries')
  })
})

it('a Multiboot 2 kernel with an address tag runs where it says', async () => {
  // Sends EAX, then the type of the first tag (mov eax, [ebx + 8]), byte by byte, and ends the machine.
  const setPort = [0x66, 0xba, 0xf8, 0x03]
  const sendEax = [0xee, ...[1, 2, 3].flatMap(() => [0xc1, 0xe8, 8, 0xee])]
  const program = [...setPort, ...sendEax, 0x8b, 0x43, 8, ...sendEax, 0xb8, 16, 0, 0, 0, 0xe7, 0xf4, 0xf4]
  const tags = [
    { type: 2, fields: [0x20_0000, 0x20_0000, 0, 0] },
    { type: 3, fields: [0x20_0040] },
  ]
  const image = concat(makeMultiboot2Header({ tags }), Uint8Array.from(program))
  const vm = await boot({ image }, { memory: '4M' })
  const sent: Buffer[] = []
  vm.serial.on('data', (bytes: Buffer) => sent.push(bytes))
  expect(await vm.run({ timeout: RUN_LIMIT })).toMatchObject({ reason: 'debug-exit', code: 16 })
  expect([...Buffer.concat(sent)]).toEqual([0x89, 0x62, 0xd7, 0x36, 1, 0, 0, 0])
})

it('the PVH guest is started at the entry point of its note, not at that of the file', async () => {
  const image = new Uint8Array(readFileSync(PVH))
  new DataView(image.buffer).setUint32(24, 0, true)
  expect(await linesOf({ image }, 'pvh')).toContain('magic: 0x336ec578')
})
