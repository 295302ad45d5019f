import { execFileSync } from 'node:child_process'
import { existsSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { dirname, join } from 'node:path'
import { afterAll, describe, expect, it } from 'vitest'
import { ERROR_CODES } from '../../src/errors.js'

const ROOT = new URL('../../', import.meta.url).pathname
const read = (path: string) => readFileSync(join(ROOT, path), 'utf8')
const readme = read('README.md')

describe('the README', () => {
  const blocks = [...readme.matchAll(/<!-- (examples\/\S+) -->\n```\w+\n([\s\S]*?)```/g)]

  it.each(blocks.map(([, path, code]) => [path!, code!]))('prints %s as it is', (path, code) => {
    expect(code).toBe(read(path))
  })

  it('shows every example', () => {
    expect(blocks).toHaveLength(7)
  })

  it.each([
    'README.md',
    'docs/boot.md',
    'docs/linux.md',
    'docs/devices.md',
    'docs/disks.md',
    'docs/virtio.md',
    'docs/cpu.md',
    'docs/execution.md',
    'docs/hosts.md',
    'docs/interrupts.md',
    'docs/results.md',
    'docs/snapshots.md',
    'docs/cli.md',
  ])('and its pages link to files that exist: %s', (page) => {
    const links = [...read(page).matchAll(/\]\((?!https?:)([^)#]+)/g)].map(([, link]) => link!)
    for (const link of links) expect(existsSync(join(ROOT, dirname(page), link)), link).toBe(true)
  })
})

describe('the error table', () => {
  it('has every code, with its meaning', () => {
    const rows = [...read('docs/results.md').matchAll(/^\| `(ERR_\w+)` \| (.*) \|$/gm)].map(
      ([, code, text]) => [code, text],
    )
    expect(rows).toEqual(Object.entries(ERROR_CODES))
  })
})

const TSX = join(ROOT, 'node_modules/tsx/dist/cli.mjs')

describe('the examples', () => {
  const folder = mkdtempSync(join(tmpdir(), 'nodevisor-examples-'))
  afterAll(() => rmSync(folder, { recursive: true }))
  const run = (example: string) =>
    execFileSync(process.execPath, [TSX, join(ROOT, 'examples', example)], { cwd: ROOT, encoding: 'utf8' })

  const hasCompiler = existsSync('/usr/bin/gcc')
  it.skipIf(!hasCompiler)('counter.ts prints what the README says (needs gcc)', () => {
    const command = /^gcc .*$/m.exec(readme)![0].split(' ')
    writeFileSync(join(folder, 'counter.S'), read('examples/counter.S'))
    execFileSync(command[0]!, command.slice(1), { cwd: folder })
    // The program looks for its kernel in the current folder.
    const printed = execFileSync(process.execPath, [TSX, join(ROOT, 'examples/counter.ts')], {
      cwd: folder,
      encoding: 'utf8',
    })
    expect(readme).toContain(`\`\`\`\n${printed}\`\`\``)
  })

  it('talk.ts', () => {
    expect(run('talk.ts')).toBe("{ before: '', reason: 'debug-exit', exits: true }\n")
  })

  it('inspect.ts', () => {
    const printed = run('inspect.ts')
    expect(printed).toContain('Hello from the text screen')
    expect(printed).toMatch(/cell at 0xb8000: 1720\nstate: halted rip: [0-9a-f]+\n$/)
  })

  it('fork.ts', () => {
    expect(run('fork.ts')).toBe('copy 0 says 40\ncopy 1 says 42\ncopy 2 says 44\n')
  })

  it('step.ts', () => {
    expect(run('step.ts')).toBe(
      'debug: rip 7c02, al 42\nio: rip 7c04, al 42\ndebug: rip 7c06, al 43\nhalt: rip 7c07, al 43\n',
    )
  })

  it('dice.ts prints what docs/virtio.md says', () => {
    const page = read('docs/virtio.md')
    expect(page).toContain(`<!-- examples/dice.ts -->\n\`\`\`ts\n${read('examples/dice.ts')}\`\`\``)
    expect(page).toContain(`\`\`\`\n${run('dice.ts')}\`\`\``)
  })

  it('linux.test.ts is printed in docs/linux.md', () => {
    const example = read('examples/linux.test.ts')
    expect(read('docs/linux.md')).toContain(`<!-- examples/linux.test.ts -->\n\`\`\`ts\n${example}\`\`\``)
  })

  it('metal.ts', () => {
    expect(run('metal.ts')).toBe('port e9: 75\n')
  })
})
