import { execFileSync, spawnSync } from 'node:child_process'
import {
  copyFileSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  rmSync,
  writeFileSync,
} from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import fc from 'fast-check'
import { afterAll, beforeAll, describe, expect, it } from 'vitest'
import { inspectHost } from '../../src/index.js'
import {
  cachedKernel,
  checkConfig,
  isStatic,
  type KernelName,
  kernelFolder,
  LINUX_FOLDER,
} from '../../src/linux/kernels.js'
import { readModules } from '../../src/linux/modules.js'
import { readyMadeInitramfs } from '../../src/linux/ready-made.js'

const COMMAND = new URL('../../dist/cli/main.js', import.meta.url).pathname
const GUESTS = new URL('../../build/guests/', import.meta.url).pathname
/** Says what a loader told it. */
const KERNEL = `${GUESTS}hello-linux.elf`
/** Any static program: nobody runs it. */
const PROGRAM = `${GUESTS}echo.elf`

let folder: string
let cacheBefore: string | undefined
beforeAll(() => {
  folder = mkdtempSync(join(tmpdir(), 'nodevisor-linux-test-'))
  cacheBefore = process.env.XDG_CACHE_HOME
  process.env.XDG_CACHE_HOME = join(folder, 'cache')
  mkdirSync(join(folder, 'bin'))
  copyFileSync(PROGRAM, join(folder, 'bin/busybox'))
})
afterAll(() => {
  if (cacheBefore === undefined) delete process.env.XDG_CACHE_HOME
  else process.env.XDG_CACHE_HOME = cacheBefore
  rmSync(folder, { recursive: true })
})

/** Puts a kernel where a made one would be. */
async function addKernel(name: KernelName, version: string): Promise<string> {
  const path = await kernelFolder(name, version)
  mkdirSync(path, { recursive: true })
  copyFileSync(KERNEL, join(path, name === 'tiny' ? 'vmlinux' : 'vmlinuz'))
  return path
}

/** Runs the command where there are no other programs than those in the test's folder. */
function nodevisor(args: readonly string[], environment: Readonly<Record<string, string>> = {}) {
  const { status, stdout, stderr } = spawnSync(process.execPath, [COMMAND, ...args], {
    encoding: 'utf8',
    input: '',
    env: { ...process.env, PATH: join(folder, 'bin'), ...environment },
  })
  return { status, stdout, stderr }
}

describe('nodevisor linux', () => {
  it('boots the kernel that there is, with an initramfs and the parameters given', async () => {
    await addKernel('tiny', '6.1.9-1')
    const args = ['linux', '--cmdline', 'console=ttyS0 mine=1', '--memory', '32M', '--timeout', '60s']
    const { status, stdout } = nodevisor(args)
    expect(status).toBe(33)
    expect(stdout).toMatch(/^command line: panic=-1 .*console=ttyS0 mine=1/m)
    expect(Number(/^initrd: (\d+) bytes/m.exec(stdout)?.[1])).toBeGreaterThan(readFileSync(INIT).length)
  })

  it('gives the terminal to the virtio console, unless told otherwise', async () => {
    await addKernel('tiny', '6.1.9-1')
    // What this kernel says on the serial port is not for the terminal then.
    expect(nodevisor(['linux', '--memory', '32M', '--timeout', '60s'])).toMatchObject({
      status: 33,
      stdout: '',
    })
  })

  it('says where user space does not run, and that one processor is all that the tiny kernel has', async () => {
    await addKernel('tiny', '6.1.9-1')
    const { stderr } = nodevisor(['linux', '--cpus', '2', '--memory', '32M', '--timeout', '60s'])
    expect(stderr.includes('user space does not run')).toBe(inspectHost().kind === 'pvm')
    expect(stderr).toContain('--kernel debian uses all')
  })

  it('says what it needs where it can make nothing, with status 69', () => {
    const { status, stderr } = nodevisor(['linux'], { XDG_CACHE_HOME: join(folder, 'empty') })
    expect(status).toBe(69)
    expect(stderr).toMatch(/Expected apt-get, to download Debian's package linux-source-/)
    expect(stderr).not.toMatch(/^\s+at /m)
  })

  it('refuses a kernel that there is not, with those that there are', () => {
    const { status, stderr } = nodevisor(['linux', '--kernel', 'tyny'])
    expect(status).toBe(2)
    expect(stderr).toContain('tiny, debian')
  })

  it('leaves nothing in the temporary folder', async () => {
    await addKernel('tiny', '6.1.9-1')
    const temporary = join(folder, 'temporary')
    mkdirSync(temporary)
    const args = ['linux', '--memory', '32M', '--timeout', '60s']
    expect(nodevisor(args, { TMPDIR: temporary }).status).toBe(33)
    expect(readdirSync(temporary)).toEqual([])
  })
})

describe('the kernels that have been made', () => {
  it('are used newest first', async () => {
    for (const version of ['6.1.9-2', '6.1.10-1', '6.1.2-1']) await addKernel('debian', version)
    expect(await cachedKernel('debian')).toMatchObject({ name: 'debian', version: '6.1.10-1' })
  })

  it('are not used when they were made in another way', async () => {
    process.env.XDG_CACHE_HOME = join(folder, 'other')
    const path = await addKernel('tiny', '6.1.11-1')
    rmSync(path, { recursive: true })
    mkdirSync(path.replace(/-\w+$/, '-0123456789ab'), { recursive: true })
    expect(await cachedKernel('tiny')).toBeUndefined()
    process.env.XDG_CACHE_HOME = join(folder, 'cache')
  })
})

const INIT = new URL('init', LINUX_FOLDER)

/** The contents of an archive in the newc format by name, see the kernel's buffer-format.rst. */
function filesOf(archive: Buffer): Map<string, Buffer> {
  const files = new Map<string, Buffer>()
  const aligned = (offset: number) => (offset + 3) & ~3
  for (let at = 0; at < archive.length; ) {
    const field = (index: number) =>
      Number.parseInt(archive.toString('latin1', at + 6 + 8 * index, at + 14 + 8 * index), 16)
    const [size, nameSize] = [field(6), field(11)]
    const name = archive.toString('latin1', at + 110, at + 110 + nameSize - 1)
    if (name === 'TRAILER!!!') break
    const start = aligned(at + 110 + nameSize)
    files.set(name, archive.subarray(start, start + size))
    at = aligned(start + size)
  }
  return files
}

describe('the initramfs', () => {
  it('has /init, busybox and the modules, named in the order in which they are loaded', async () => {
    const path = join(folder, '00-first.ko')
    writeFileSync(path, 'the first module')
    const kernel = { name: 'debian', version: '1', image: KERNEL, modules: [path], programs: [] } as const
    const files = filesOf(Buffer.from(await readyMadeInitramfs(kernel, PROGRAM)))
    expect(files.get('init')).toEqual(readFileSync(INIT))
    expect(files.get('bin/busybox')).toEqual(readFileSync(PROGRAM))
    expect(files.get('modules/00-first.ko')?.toString()).toBe('the first module')
  })

  it('begins with a script that a shell can read', () => {
    execFileSync('/bin/sh', ['-n', INIT.pathname])
  })
})

describe('modules', () => {
  /** Modules that depend only on those before them, some written with hyphens. */
  const graphs = fc
    .array(fc.array(fc.nat(20), { maxLength: 4 }), { minLength: 1, maxLength: 20 })
    .map((lists) => lists.map((list, index) => [...new Set(list.filter((other) => other < index))]))

  it('come once each, behind all that they depend on', async () => {
    await fc.assert(
      fc.asyncProperty(graphs, fc.array(fc.nat(19), { minLength: 1, maxLength: 5 }), async (graph, picks) => {
        const release = mkdtempSync(join(folder, 'modules-'))
        writeFileSync(join(release, 'modules.builtin'), 'kernel/lib/crc-built_in.ko\n')
        for (const [index, dependencies] of graph.entries()) {
          const depends = dependencies.map((other) => `a_module${other}`).join()
          writeFileSync(
            join(release, `a-module${index}.ko`),
            `\x7fELF\0license=GPL\0depends=${depends}\0rest`,
          )
        }
        const wanted = picks.map((pick) => `a-module${pick % graph.length}`)
        const modules = await readModules(release, [...wanted, 'crc_built-in'], { signal: never })
        const names = modules.map(({ name }) => name)
        expect(new Set(names).size).toBe(names.length)
        expect(names).toEqual(expect.arrayContaining(wanted.map((name) => name.replace('-', '_'))))
        for (const [position, name] of names.entries()) {
          const dependencies = graph[Number(name.slice('a_module'.length))]!
          expect(names.slice(0, position)).toEqual(
            expect.arrayContaining(dependencies.map((other) => `a_module${other}`)),
          )
        }
      }),
      { numRuns: 30 },
    )
  })

  it('that there are not are named', async () => {
    const release = mkdtempSync(join(folder, 'modules-'))
    writeFileSync(join(release, 'modules.builtin'), '')
    await expect(readModules(release, ['virtio-rng'], { signal: never })).rejects.toThrow('virtio_rng')
  })

  const never = new AbortController().signal
})

describe('making the tiny kernel', () => {
  it('notices options that Linux dropped', () => {
    const wanted = 'CONFIG_A=y\n# CONFIG_B is not set\nCONFIG_C="text"\nCONFIG_D=y\n'
    expect(() => checkConfig(wanted, 'CONFIG_A=y\nCONFIG_C="other"\n')).toThrow('CONFIG_C="text", CONFIG_D=y')
    expect(() => checkConfig(wanted, 'CONFIG_A=y\nCONFIG_C="text"\nCONFIG_D=y\n')).not.toThrow()
  })

  it('tells programs that need libraries from those that do not', () => {
    expect(isStatic(readFileSync(process.execPath))).toBe(false)
    expect(isStatic(readFileSync(KERNEL))).toBe(true)
    expect(isStatic(Buffer.from('#!/bin/sh\n'))).toBe(false)
  })
})
