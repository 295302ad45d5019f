import { execFileSync } from 'node:child_process'
import { lstatSync, readdirSync, readFileSync, readlinkSync, realpathSync } from 'node:fs'
import { join } from 'node:path'
import { Initramfs } from './initramfs.js'
import type { LabKernel } from './kernel.js'

/** Where the project is in the lab. */
export const LAB_ROOT = '/nodevisor'

/** The home of its user. */
export const LAB_HOME = '/root'

/** What only some tests need. */
export interface LabExtras {
  /** Folders of this system, by their paths in the lab. */
  readonly folders?: Readonly<Record<string, string>>
  /** Names of programs of this system. */
  readonly programs?: readonly string[]
}

/** What the tests, and what they test, need of node_modules. */
const PACKAGES = [
  'vitest',
  'tsx',
  'fast-check',
  'commander',
  'fastest-levenshtein',
  'pkg-prebuilds',
  'zstddec',
]
/** Dependencies of those that are never loaded here: vite's CSS transformer, 10 MB. */
const LEFT_OUT = ['lightningcss']
/** Types and source maps in node_modules. */
const NOT_RUN = /\.(d\.[cm]?ts|map|md|flow)$/
/** Files and folders of the repository that stay at home. */
const NOT_TAKEN = ['.git', '.ci', 'node_modules', 'build', 'prebuilds', 'coverage', 'docs/api', 'native']

interface LockedPackage {
  readonly dependencies?: Readonly<Record<string, string>>
  readonly optionalDependencies?: Readonly<Record<string, string>>
}

/**
 * Writes the lab's file system: busybox, Node.js with its libraries, the modules of KVM and this project, built.
 *
 * @param root - the repository
 * @param init - the shell script that is process 1
 * @param extras - what only some tests need
 * @returns what is in it, for a person
 */
export function packLab(
  path: string,
  root: string,
  kernel: LabKernel,
  init: string,
  { folders = {}, programs = [] }: LabExtras = {},
): string {
  using archive = new Initramfs(path)
  archive.file('/init', `#!/bin/busybox sh\n${init}`, 0o755)
  for (const folder of ['/proc', '/sys', '/dev', '/tmp', LAB_HOME, '/etc', '/usr/bin']) archive.folder(folder)
  archive.file('/etc/passwd', 'root:x:0:0:root:/root:/bin/sh\n')
  archive.file('/etc/hosts', '127.0.0.1 localhost\n')
  for (const module of kernel.modules) archive.copy(`/modules/${module.replace(/.*\//, '')}`, module)

  const busybox = findProgram('busybox')!
  archive.copy('/bin/busybox', busybox, 0o755)
  archive.link('/bin/sh', 'busybox')
  archive.link('/usr/bin/env', '/bin/busybox')
  archive.copy('/usr/bin/node', process.execPath, 0o755)
  const binaries = [busybox, process.execPath]

  const take = (folder: string, skip: (relative: string) => boolean) => {
    for (const file of filesBelow(join(root, folder), folder, skip)) {
      const source = join(root, file)
      const status = lstatSync(source)
      if (status.isSymbolicLink()) archive.link(`${LAB_ROOT}/${file}`, readlinkSync(source))
      else archive.copy(`${LAB_ROOT}/${file}`, source, status.mode & 0o777)
      if (file.endsWith('.node')) binaries.push(source)
    }
  }
  take('', (file) => NOT_TAKEN.includes(file))
  take('build/Release', () => false)
  take('build/guests', (file) => !/\/guests\/(agent$|[^/]*\.(elf|bin)$)/.test(file))
  for (const folder of packageFolders(root)) {
    take(folder, (file) => NOT_RUN.test(file) || file === `${folder}/node_modules`)
  }
  for (const [folder, source] of Object.entries(folders)) {
    for (const file of filesBelow(source, '', () => false)) {
      archive.copy(`${folder}/${file}`, join(source, file), lstatSync(join(source, file)).mode & 0o777)
    }
  }
  for (const name of programs) {
    const program = findProgram(name)!
    archive.copy(`/bin/${name}`, program, 0o755)
    binaries.push(program)
  }
  for (const library of new Set(binaries.flatMap(librariesOf)))
    archive.copy(library, realpathSync(library), 0o755)
  archive.finish()
  return `${archive.count} files, ${Math.round(archive.size / 2 ** 20)} MiB`
}

/** Path of a program that is in PATH. */
export function findProgram(name: string): string | undefined {
  try {
    return realpathSync(execFileSync('/bin/sh', ['-c', `command -v ${name}`], { encoding: 'utf8' }).trim())
  } catch {
    return undefined
  }
}

/** Paths of all files below a folder, each with `prefix` before it. */
function* filesBelow(folder: string, prefix: string, skip: (path: string) => boolean): Generator<string> {
  for (const entry of readdirSync(folder, { withFileTypes: true })) {
    const path = prefix === '' ? entry.name : `${prefix}/${entry.name}`
    if (entry.isDirectory()) {
      if (!skip(path)) yield* filesBelow(join(folder, entry.name), path, skip)
    } else if ((entry.isFile() || entry.isSymbolicLink()) && !skip(path)) {
      yield path
    }
  }
}

/** Folders in node_modules of {@link PACKAGES} and all they depend on, as the lock file has them. */
function packageFolders(root: string): string[] {
  const lock = JSON.parse(readFileSync(join(root, 'node_modules/.package-lock.json'), 'utf8')) as {
    packages: Record<string, LockedPackage>
  }
  const folders = new Set<string>()
  const add = (name: string, from: string) => {
    if (LEFT_OUT.includes(name)) return
    // As Node.js looks for it: in the dependent's own node_modules, then in those around it.
    for (let at = from; ; at = at.slice(0, Math.max(0, at.lastIndexOf('/node_modules/')))) {
      const folder = at === '' ? `node_modules/${name}` : `${at}/node_modules/${name}`
      const found = lock.packages[folder]
      if (found !== undefined) {
        if (folders.has(folder)) return
        folders.add(folder)
        const needs = { ...found.dependencies, ...found.optionalDependencies }
        for (const needed of Object.keys(needs)) add(needed, folder)
        return
      }
      // An optional package for another system.
      if (at === '') return
    }
  }
  for (const name of PACKAGES) add(name, '')
  return [...folders]
}

/** Paths of the shared libraries that a binary is linked with, the loader included. */
function librariesOf(binary: string): string[] {
  try {
    const listed = execFileSync('ldd', [binary], { encoding: 'utf8', stdio: ['ignore', 'pipe', 'ignore'] })
    return listed.match(/\/\S+\.so\S*/g) ?? []
  } catch {
    // Statically linked.
    return []
  }
}
