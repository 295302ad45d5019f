import { createHash } from 'node:crypto'
import { copyFile, mkdir, mkdtemp, readdir, readFile, rename, rm, writeFile } from 'node:fs/promises'
import { availableParallelism, homedir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { packageRoot } from '../package-root.js'
import {
  dependencyOf,
  findProgram,
  isThere,
  type Making,
  packageVersion,
  runProgram,
  unpackPackage,
} from './debian-packages.js'
import { readModules } from './modules.js'

/**
 * The kernels that there are ready-made: `tiny` is compiled, for machines of nodevisor's and nothing else; `debian` is
 * Debian's for virtual machines, as it is.
 */
export const KERNEL_NAMES = ['tiny', 'debian'] as const

export type KernelName = (typeof KERNEL_NAMES)[number]

/** A kernel that has been made. */
export interface LinuxKernel {
  readonly name: KernelName
  /** Of the package that it was made from. */
  readonly version: string
  /** Path of the image. */
  readonly image: string
  /** Paths of the modules that it needs, in the order in which they are loaded. */
  readonly modules: readonly string[]
  /** Paths of programs that go with it. */
  readonly programs: readonly string[]
}

/** What belongs to the ready-made Linux. */
export const LINUX_FOLDER = new URL('guests/linux/', packageRoot())

/** What the tiny kernel is made of, beside its source. */
const TINY_FILES = ['tiny.config', 'switch-off.S']
/** The tiny kernel's source, a series that has long-term support. */
const SOURCE_PACKAGE = 'linux-source-6.1'
const DEBIAN_PACKAGE = 'linux-image-cloud-amd64'
/** With what they depend on. ext4 asks for crc32c by the name of its algorithm, so nothing tells that it needs it. */
const DEBIAN_MODULES = ['virtio_mmio', 'virtio_console', 'virtio_blk', 'virtio-rng', 'crc32c_generic', 'ext4']

/** What compiling a kernel takes, with the Debian packages that have it. */
const BUILD_TOOLS: Readonly<Record<string, string>> = {
  gcc: 'build-essential',
  make: 'build-essential',
  flex: 'flex',
  bison: 'bison',
  bc: 'bc',
  lz4: 'lz4',
  xz: 'xz-utils',
}
const BUILD_HEADERS: Readonly<Record<string, string>> = {
  '/usr/include/gelf.h': 'libelf-dev',
}

const IMAGES: Readonly<Record<KernelName, string>> = { tiny: 'vmlinux', debian: 'vmlinuz' }

/** Where kernels stay. */
export function kernelCache(): string {
  return join(process.env.XDG_CACHE_HOME || join(homedir(), '.cache'), 'nodevisor', 'linux')
}

/** The newest kernel of a name that has been made in the way in which it would be made now. Asks nobody. */
export async function cachedKernel(name: KernelName): Promise<LinuxKernel | undefined> {
  const suffix = `-${await recipeOf(name)}`
  const versions = (await readdir(kernelCache()).catch(() => []))
    .filter((folder) => folder.startsWith(`${name}-`) && folder.endsWith(suffix))
    .map((folder) => folder.slice(name.length + 1, -suffix.length))
    .sort((a, b) => a.localeCompare(b, 'en', { numeric: true }))
  const newest = versions.at(-1)
  return newest === undefined ? undefined : await describe(name, newest)
}

/** Makes a kernel from the newest package, unless that has been done. */
export async function makeKernel(name: KernelName, making: Making): Promise<LinuxKernel> {
  const source =
    name === 'tiny' ? SOURCE_PACKAGE : await dependencyOf(DEBIAN_PACKAGE, /^linux-image-\d/, making)
  const version = await packageVersion(source, making)
  const folder = await kernelFolder(name, version)
  if (!(await isThere(folder))) {
    await inTemporaryFolder(async (work) => {
      const complete = join(work, 'complete')
      await mkdir(complete)
      if (name === 'tiny') await compileTiny(work, complete, making)
      else await takeDebian(source, work, complete, making)
      await putInPlace(complete, folder)
    })
  }
  return await describe(name, version)
}

/** A static busybox: this system's, or out of its package. @returns its path */
export async function findBusybox(making: Making): Promise<string> {
  const installed = await findProgram('busybox')
  if (installed !== undefined && isStatic(await readFile(installed))) return installed
  const cached = join(kernelCache(), 'busybox', 'busybox')
  if (!(await isThere(cached))) {
    await inTemporaryFolder(async (work) => {
      const unpacked = await unpackPackage('busybox-static', join(work, 'package'), making)
      const complete = join(work, 'complete')
      await mkdir(complete)
      const program = (await isThere(join(unpacked, 'bin/busybox'))) ? 'bin/busybox' : 'usr/bin/busybox'
      await copyFile(join(unpacked, program), join(complete, 'busybox'))
      await putInPlace(complete, join(kernelCache(), 'busybox'))
    })
  }
  return cached
}

// System V ABI, "Object Files", and its AMD64 supplement: the ELF header and program headers of a 64-bit file
const ELF_64 = Buffer.from('\x7fELF\x02', 'latin1')
const ELF_HEADER_SIZE = 64
const E_PHOFF = 32
const E_PHENTSIZE = 54
const E_PHNUM = 56
const PT_INTERP = 3

/** Whether an ELF file needs no program interpreter, so that it runs without libraries. */
export function isStatic(file: Uint8Array): boolean {
  if (!ELF_64.equals(file.subarray(0, ELF_64.length)) || file.length < ELF_HEADER_SIZE) return false
  const elf = new DataView(file.buffer, file.byteOffset, file.byteLength)
  const headers = Number(elf.getBigUint64(E_PHOFF, true))
  const size = elf.getUint16(E_PHENTSIZE, true)
  const count = elf.getUint16(E_PHNUM, true)
  return !Array.from({ length: count }, (_, index) => elf.getUint32(headers + index * size, true)).includes(
    PT_INTERP,
  )
}

/** Where a kernel made from a version of its package is, or would be. */
export async function kernelFolder(name: KernelName, version: string): Promise<string> {
  // Debian's versions may have an epoch with a colon, and never a slash.
  return join(kernelCache(), `${name}-${version.replaceAll(':', '_')}-${await recipeOf(name)}`)
}

/** A text that changes when the way in which a kernel is made does. */
async function recipeOf(name: KernelName): Promise<string> {
  const hash = createHash('sha256')
  if (name === 'debian') hash.update(DEBIAN_MODULES.join())
  else for (const file of TINY_FILES) hash.update(await readFile(new URL(file, LINUX_FOLDER)))
  return hash.digest('hex').slice(0, 12)
}

async function describe(name: KernelName, version: string): Promise<LinuxKernel> {
  const folder = await kernelFolder(name, version)
  const filesIn = async (kind: string) => {
    const files = await readdir(join(folder, kind)).catch(() => [])
    return files.sort().map((file) => join(folder, kind, file))
  }
  return {
    name,
    version,
    image: join(folder, IMAGES[name]),
    modules: await filesIn('modules'),
    programs: await filesIn('programs'),
  }
}

/** The folder is beside where the result goes, so that this can be renamed into place once it is complete. */
async function inTemporaryFolder(work: (folder: string) => Promise<void>): Promise<void> {
  await mkdir(kernelCache(), { recursive: true })
  await removeAbandoned()
  const folder = await mkdtemp(join(kernelCache(), `.making-${process.pid}-`))
  try {
    await work(folder)
  } finally {
    await rm(folder, { recursive: true, force: true })
  }
}

/** Removes what was begun by processes that were killed: the source of a kernel takes more than a gigabyte. */
async function removeAbandoned(): Promise<void> {
  for (const name of await readdir(kernelCache())) {
    const pid = /^\.making-(\d+)-/.exec(name)?.[1]
    if (pid === undefined || (await isThere(`/proc/${pid}`))) continue
    await rm(join(kernelCache(), name), { recursive: true, force: true })
  }
}

async function putInPlace(complete: string, folder: string): Promise<void> {
  try {
    await rename(complete, folder)
  } catch (error) {
    // Another process has made it in the meantime.
    if (!(await isThere(folder))) throw error
  }
}

async function compileTiny(work: string, complete: string, making: Making): Promise<void> {
  await provideTools(making)
  const unpacked = await unpackPackage(SOURCE_PACKAGE, join(work, 'package'), making)
  making.say('unpacking the source')
  const archive = join(unpacked, 'usr/src', `${SOURCE_PACKAGE}.tar.xz`)
  await runProgram('tar', ['-xf', archive, '-C', work], making)
  const tree = join(work, SOURCE_PACKAGE)

  making.say('configuring')
  const config = await readFile(new URL('tiny.config', LINUX_FOLDER), 'utf8')
  await writeFile(join(work, 'tiny.config'), config)
  const inTree = { cwd: tree, signal: making.signal }
  await runProgram('make', ['tinyconfig'], inTree)
  await runProgram('scripts/kconfig/merge_config.sh', ['-m', '.config', '../tiny.config'], inTree)
  await runProgram('make', ['olddefconfig'], inTree)
  checkConfig(config, await readFile(join(tree, '.config'), 'utf8'))

  const title = 'compiling, which takes a few minutes'
  making.say(title)
  const started = performance.now()
  let files = 0
  await runProgram('make', [`-j${availableParallelism()}`, 'vmlinux', 'bzImage'], {
    ...inTree,
    // What goes into /proc/version.
    environment: { KBUILD_BUILD_USER: 'nodevisor', KBUILD_BUILD_HOST: 'localhost' },
    onLine: (line) => {
      const source = /^ {2}(?:CC|AS) +(\S+)/.exec(line)?.[1]
      if (source === undefined) return
      const seconds = Math.round((performance.now() - started) / 1000)
      making.say(`${title}: ${++files} files, ${seconds} s, ${source}`)
    },
  })
  await copyFile(join(tree, 'vmlinux'), join(complete, 'vmlinux'))
  await copyFile(join(tree, 'arch/x86/boot/bzImage'), join(complete, 'bzImage'))
  await copyFile(join(tree, '.config'), join(complete, 'config'))

  await mkdir(join(complete, 'programs'))
  const source = fileURLToPath(new URL('switch-off.S', LINUX_FOLDER))
  const program = join(complete, 'programs/switch-off')
  await runProgram('gcc', ['-nostdlib', '-static', '-o', program, source], making)
}

/** Makes sure that nothing was dropped without a word, as happens to options whose dependencies are missing. */
export function checkConfig(wanted: string, taken: string): void {
  const lines = new Set(taken.split('\n'))
  const missing = wanted.split('\n').filter((line) => /^CONFIG_\w+=/.test(line) && !lines.has(line))
  if (missing.length === 0) return
  throw new Error(
    `Expected Linux to take all options of tiny.config but it did not take ${missing.join(', ')}`,
  )
}

/** Installs what compiling takes, or says what to install. */
async function provideTools(making: Making): Promise<void> {
  const packages = await missingTools()
  if (packages.length === 0) return
  if (process.getuid?.() !== 0) {
    const list = packages.join(' ')
    throw new Error(`Compiling a kernel needs programs that are not here; as root: apt-get install ${list}`)
  }
  making.say(`installing ${packages.join(', ')}`)
  await runProgram('apt-get', ['install', '-y', '-qq', '--no-install-recommends', ...packages], {
    signal: making.signal,
    environment: { DEBIAN_FRONTEND: 'noninteractive' },
  })
}

async function missingTools(): Promise<string[]> {
  const missing = new Set<string>()
  for (const [program, name] of Object.entries(BUILD_TOOLS)) {
    if ((await findProgram(program)) === undefined) missing.add(name)
  }
  for (const [header, name] of Object.entries(BUILD_HEADERS)) {
    if (!(await isThere(header))) missing.add(name)
  }
  return [...missing]
}

async function takeDebian(name: string, work: string, complete: string, making: Making): Promise<void> {
  const unpacked = await unpackPackage(name, join(work, 'package'), making)
  const [release] = await readdir(join(unpacked, 'lib/modules'))
  await copyFile(join(unpacked, 'boot', `vmlinuz-${release}`), join(complete, 'vmlinuz'))
  const modules = await readModules(join(unpacked, 'lib/modules', release!), DEBIAN_MODULES, making)
  await mkdir(join(complete, 'modules'))
  for (const [index, module] of modules.entries()) {
    const number = String(index).padStart(2, '0')
    await writeFile(join(complete, 'modules', `${number}-${module.name}.ko`), module.content)
  }
}
