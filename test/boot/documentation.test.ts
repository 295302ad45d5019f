import { execFileSync, spawnSync } from 'node:child_process'
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterAll, beforeAll, describe, expect, it } from 'vitest'
import { loadImage } from '../../src/boot/index.js'
import { bootOptions, faultsOf, MIB, peekText } from '../helpers/images.js'

const PAGE = readFileSync(new URL('../../docs/boot.md', import.meta.url), 'utf8')
const hasCompiler = spawnSync('gcc', ['--version']).status === 0

const blocks = (language: string) =>
  [...PAGE.matchAll(new RegExp(`^\`\`\`${language}\\n(.*?)^\`\`\``, 'gms'))].map(([, text]) => text!)

describe.skipIf(!hasCompiler)('the kernel in docs/boot.md', () => {
  let directory: string

  beforeAll(() => {
    directory = mkdtempSync(join(tmpdir(), 'nodevisor-boot-'))
    writeFileSync(join(directory, 'hello.S'), blocks('asm')[0]!)
    writeFileSync(join(directory, 'kernel.ld'), blocks('text')[0]!)
  })
  afterAll(() => rmSync(directory, { recursive: true }))

  it.each([
    ['with as and ld', 0, 'hello.elf', 0x40_1000n],
    ['with gcc alone', 1, 'hello.elf', 0x40_1000n],
    ['for the higher half', 2, 'kernel.elf', 0xffff_ffff_8010_0000n],
  ])('can be built %s, and starts in long mode with its command line', (_, block, output, rip) => {
    execFileSync('sh', ['-ec', blocks('sh')[block]!], { cwd: directory, stdio: 'pipe' })
    const kernel = readFileSync(join(directory, output))
    rmSync(join(directory, output))
    const image = loadImage(kernel, bootOptions({ cmdline: 'hello' }))
    expect(image).toMatchObject({ format: 'elf', mode: 'long' })
    expect(image.state.registers.rip).toBe(rip)
    expect(peekText(image, Number(image.state.registers.rsi))).toBe('hello')
    expect(faultsOf(image, 16 * MIB)).toEqual([])
  })
})
