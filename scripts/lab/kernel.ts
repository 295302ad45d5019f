import { execFile } from 'node:child_process'
import { copyFile, mkdir, mkdtemp, readdir, readFile, rename, rm, writeFile } from 'node:fs/promises'
import { homedir } from 'node:os'
import { join } from 'node:path'
import { promisify } from 'node:util'

const run = promisify(execFile)

/** What the lab needs of a kernel package. */
export interface LabKernel {
  readonly version: string
  /** Path of the kernel image. */
  readonly image: string
  /** Paths of the modules, in the order in which they are loaded. */
  readonly modules: readonly string[]
}

/** In the order in which they depend on each other. */
const MODULES = ['virt/lib/irqbypass.ko', 'arch/x86/kvm/kvm.ko', 'arch/x86/kvm/kvm-amd.ko']
const META_PACKAGE = 'linux-image-cloud-amd64'

/** Where downloads stay. */
function cacheFolder(): string {
  return join(process.env.XDG_CACHE_HOME || join(homedir(), '.cache'), 'nodevisor-lab')
}

/** The kernel from an earlier download. */
export async function cachedKernel(): Promise<LabKernel | undefined> {
  const folders = await readdir(cacheFolder()).catch(() => [])
  const version = folders
    .filter((name) => !name.startsWith('.'))
    .sort()
    .at(-1)
  return version === undefined ? undefined : describe(version)
}

function describe(version: string): LabKernel {
  const folder = join(cacheFolder(), version)
  return {
    version,
    image: join(folder, 'vmlinuz'),
    modules: MODULES.map((module) => join(folder, module.replace(/.*\//, ''))),
  }
}

/**
 * Downloads Debian's kernel for virtual machines, without installing it, and keeps the few files that are needed.
 *
 * @param say - is told what is being done
 */
export async function downloadKernel(signal: AbortSignal, say: (text: string) => void): Promise<LabKernel> {
  await mkdir(cacheFolder(), { recursive: true })
  // On the same file system, so that it can be renamed into place when it is complete.
  const folder = await mkdtemp(join(cacheFolder(), '.download-'))
  try {
    let name = await packageName(signal)
    if (name === undefined) {
      say('updating the package lists (apt-get update)')
      await run('apt-get', ['update', '-qq'], { signal })
      name = await packageName(signal)
    }
    if (name === undefined)
      throw new Error(`There is no package ${META_PACKAGE}: the lab needs Debian's package lists.`)
    say(`downloading ${name}`)
    await run('apt-get', ['download', '-qq', name], { cwd: folder, signal })
    const [file] = (await readdir(folder)).filter((entry) => entry.endsWith('.deb'))
    const unpacked = join(folder, 'unpacked')
    await run('dpkg', ['-x', join(folder, file!), unpacked], { signal })

    const [version] = await readdir(join(unpacked, 'lib/modules'))
    const complete = join(folder, 'complete')
    await mkdir(complete)
    await copyFile(join(unpacked, 'boot', `vmlinuz-${version}`), join(complete, 'vmlinuz'))
    for (const module of MODULES) {
      const source = join(unpacked, 'lib/modules', version!, 'kernel', module)
      await writeFile(join(complete, module.replace(/.*\//, '')), await readModule(source, signal))
    }
    await rename(complete, join(cacheFolder(), version!))
    return describe(version!)
  } finally {
    await rm(folder, { recursive: true, force: true })
  }
}

async function packageName(signal: AbortSignal): Promise<string | undefined> {
  const { stdout } = await run('apt-cache', ['depends', META_PACKAGE], { signal }).catch(() => ({
    stdout: '',
  }))
  return /Depends: (linux-image-\d\S*)/.exec(stdout)?.[1]
}

/** A module's bytes; since Debian 13 they are compressed. */
async function readModule(path: string, signal: AbortSignal): Promise<Uint8Array> {
  try {
    return await readFile(path)
  } catch {
    const { stdout } = await run('xz', ['-dc', `${path}.xz`], {
      encoding: 'buffer',
      maxBuffer: 2 ** 26,
      signal,
    })
    return stdout
  }
}
