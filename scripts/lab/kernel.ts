import { copyFile, mkdir, mkdtemp, readdir, rename, rm, writeFile } from 'node:fs/promises'
import { homedir } from 'node:os'
import { basename, join } from 'node:path'
import { dependencyOf, unpackPackage } from '../../src/linux/debian-packages.js'
import { readModules } from '../../src/linux/modules.js'

/** What the lab needs of a kernel package. */
export interface LabKernel {
  readonly version: string
  /** Path of the kernel image. */
  readonly image: string
  /** Paths of the modules, in the order in which they are loaded. */
  readonly modules: readonly string[]
}

/** In the order in which they depend on each other. */
const MODULES = ['irqbypass', 'kvm', 'kvm-amd']
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
    modules: MODULES.map((module) => join(folder, `${module}.ko`)),
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
    const making = { signal, say }
    const name = await dependencyOf(META_PACKAGE, /^linux-image-\d/, making)
    const unpacked = await unpackPackage(name, join(folder, 'package'), making)

    const [version] = await readdir(join(unpacked, 'lib/modules'))
    const complete = join(folder, 'complete')
    await mkdir(complete)
    await copyFile(join(unpacked, 'boot', `vmlinuz-${version}`), join(complete, 'vmlinuz'))
    for (const module of await readModules(join(unpacked, 'lib/modules', version!), MODULES, making)) {
      await writeFile(join(complete, basename(module.path).replace(/\.ko.*/, '.ko')), module.content)
    }
    await rename(complete, join(cacheFolder(), version!))
    return describe(version!)
  } finally {
    await rm(folder, { recursive: true, force: true })
  }
}
