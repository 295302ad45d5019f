import { execFileSync } from 'node:child_process'
import { existsSync, mkdtempSync, readdirSync, rmSync, statSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterAll, beforeAll, describe, expect, it } from 'vitest'

const ROOT = new URL('../../', import.meta.url).pathname

let folder: string
/** The empty project that the package is installed into. */
let project: string
let installed: string

function npm(cwd: string, ...args: string[]): string {
  return execFileSync('npm', [...args, '--no-audit', '--no-fund', '--loglevel=error'], {
    cwd,
    encoding: 'utf8',
  })
}

function node(...args: string[]): string {
  return execFileSync(process.execPath, args, { cwd: project, encoding: 'utf8' })
}

beforeAll(() => {
  folder = mkdtempSync(join(tmpdir(), 'nodevisor-package-'))
  project = join(folder, 'project')
  installed = join(project, 'node_modules/nodevisor')
  npm(ROOT, 'pack', '--pack-destination', folder)
  const archive = readdirSync(folder).find((name) => name.endsWith('.tgz'))!
  execFileSync('mkdir', [project])
  writeFileSync(
    join(project, 'package.json'),
    JSON.stringify({ name: 'empty', private: true, type: 'module' }),
  )
  npm(project, 'install', '--prefer-offline', join(folder, archive))
})

afterAll(() => rmSync(folder, { recursive: true, force: true }))

describe('the package, installed into an empty project', () => {
  it('has its prebuilt addon, and compiled nothing', () => {
    expect(existsSync(join(installed, 'prebuilds/nodevisor-linux-x64/node-napi-v8.node'))).toBe(true)
    expect(existsSync(join(installed, 'build'))).toBe(false)
  })

  it('has no tests, sources of guests or build folders in it', () => {
    expect(readdirSync(installed).sort()).toEqual([
      'CHANGELOG.md',
      'CMakeLists.txt',
      'LICENSE',
      'README.md',
      'dist',
      'docs',
      'guests',
      'native',
      'package.json',
      'prebuilds',
      'scripts',
    ])
    // What `nodevisor linux` makes its kernel and initramfs of.
    expect(readdirSync(join(installed, 'guests'))).toEqual(['linux'])
  })

  it('has the agent for Linux guests', () => {
    const program = "import { agentProgram } from 'nodevisor/linux'; console.log(agentProgram.pathname)"
    const path = node('--input-type=module', '--eval', program).trim()
    expect(path).toBe(join(installed, 'prebuilds/agent'))
    expect(statSync(path).mode & 0o111).toBe(0o111)
  })

  it('boots a machine by import', () => {
    writeFileSync(
      join(project, 'boot.js'),
      `import { VirtualMachine } from 'nodevisor'
       const kernel = Uint8Array.of(0xb0, 0x41, 0xba, 0xf8, 0x03, 0xee, 0xb0, 0x15, 0xe6, 0xf4)
       const vm = await VirtualMachine.create({ kernel })
       const { reason, code } = await vm.run({ timeout: 10000 })
       console.log(JSON.stringify({ reason, code, serial: vm.serial.output }))
       await vm.close()`,
    )
    expect(JSON.parse(node('boot.js'))).toEqual({ reason: 'debug-exit', code: 0x15, serial: 'A' })
  })

  it('gives the metal as nodevisor/kvm', () => {
    expect(
      node(
        '--input-type=module',
        '-e',
        "import { Kvm } from 'nodevisor/kvm'; console.log(new Kvm().apiVersion)",
      ),
    ).toBe('12\n')
  })

  it('has the command', () => {
    writeFileSync(join(project, 'exit.bin'), Uint8Array.of(0xb0, 0x15, 0xe6, 0xf4))
    const run = () =>
      execFileSync('npx', ['--no-install', 'nodevisor', 'run', 'exit.bin', '--json'], {
        cwd: project,
        encoding: 'utf8',
      })
    expect(run).toThrow(expect.objectContaining({ status: (0x15 << 1) | 1 }))
  })

  it('compiles the addon where the prebuilt one does not load', () => {
    const prebuilt = join(installed, 'prebuilds/nodevisor-linux-x64/node-napi-v8.node')
    writeFileSync(prebuilt, 'not a shared object')
    const size = statSync(prebuilt).size
    npm(project, 'rebuild', 'nodevisor')
    expect(statSync(prebuilt).size).toBe(size)
    expect(existsSync(join(installed, 'build/Release/nodevisor.node'))).toBe(true)
    expect(JSON.parse(node('boot.js'))).toMatchObject({ reason: 'debug-exit' })
  })
})
