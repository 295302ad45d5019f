import { spawnSync } from 'node:child_process'
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterAll, beforeAll, describe, expect, it } from 'vitest'
import { placeFirmwareTables, type VirtioMmioDevice } from '../../src/firmware/index.js'

const hasIasl = spawnSync('iasl', ['-v'], { timeout: 10_000 }).status === 0

const VIRTIO: VirtioMmioDevice[] = [
  { address: 0xd000_0000, size: 0x1000, gsi: 5 },
  { address: 0xd000_1000, size: 0x1000, gsi: 10, trigger: 'level' },
  { address: 0xd000_2000, size: 0x200, gsi: 16 },
  { address: 0xfeb0_0000, size: 0x1_0000, gsi: 16 },
]

/** Offsets that the compiler fills in by itself: the checksum, and who made the table. */
const HEADER_BYTES_OF_THE_COMPILER = [9, 28, 29, 30, 31, 32, 33, 34, 35]

// Debian and Ubuntu: acpica-tools; Fedora: acpica-tools; Arch: acpica.
describe.skipIf(!hasIasl)('iasl, ACPI’s reference compiler (skipped where it is not installed)', () => {
  let directory: string
  beforeAll(() => {
    directory = mkdtempSync(join(tmpdir(), 'nodevisor-iasl-'))
  })
  afterAll(() => rmSync(directory, { recursive: true }))

  const iasl = (...args: string[]) => {
    const { status, stdout, stderr } = spawnSync('iasl', args, {
      cwd: directory,
      timeout: 15_000,
      encoding: 'utf8',
    })
    return { status, output: stdout + stderr }
  }

  const sizes = [
    ['one vCPU', { cpus: 1, virtio: [] }],
    ['four vCPUs and four devices', { cpus: 4, virtio: VIRTIO }],
    ['1024 vCPUs and many devices', { cpus: 1024, virtio: manyDevices(600) }],
  ] as const
  // It does not read an RSDP by itself.
  const names = ['FACS', 'DSDT', 'FADT', 'MADT', 'RSDT', 'XSDT']

  it.each(sizes.flatMap(([size, options]) => names.map((name) => [name, size, options] as const)))(
    'takes the %s of %s apart and puts it together again without a warning',
    (name, size, options) => {
      const { segments } = placeFirmwareTables({ ...options, memorySize: 2 ** 26 })
      const { bytes } = segments.find((segment) => segment.name === `ACPI ${name}`)!
      const file = `${name}-${size.replaceAll(' ', '-')}`
      writeFileSync(join(directory, `${file}.dat`), bytes)
      const apart = iasl('-d', `${file}.dat`)
      expect(apart.status, apart.output).toBe(0)
      expect(apart.output).not.toMatch(/warning|error|incorrect|invalid/i)
      const together = iasl('-on', '-p', `${file}.aml`, `${file}.dsl`)
      expect(together.status, together.output).toBe(0)
      expect(together.output).toMatch(/0 Errors, 0 Warnings, 0 Remarks|Table Input:/)
      expect(together.output).not.toMatch(/[1-9]\d* (Errors|Warnings)/)
      expect(withoutCompiler(readFileSync(join(directory, `${file}.aml`)), name)).toEqual(
        withoutCompiler(bytes, name),
      )
    },
  )
})

function manyDevices(count: number): VirtioMmioDevice[] {
  return Array.from({ length: count }, (_, i) => ({
    address: 0xd000_0000 + i * 0x1000,
    size: 0x1000,
    gsi: 16 + (i % 8),
  }))
}

function withoutCompiler(table: Uint8Array, name: string): Uint8Array {
  const bytes = table.slice()
  if (name !== 'FACS') for (const at of HEADER_BYTES_OF_THE_COMPILER) bytes[at] = 0
  return Uint8Array.from(bytes)
}
