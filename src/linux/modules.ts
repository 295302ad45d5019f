import { readdir, readFile } from 'node:fs/promises'
import { basename, join } from 'node:path'
import { gunzipSync } from 'node:zlib'
import { type Making, runProgram } from './debian-packages.js'

/** A kernel module, out of its package. */
export interface KernelModule {
  /** As Linux calls it: with underscores. */
  readonly name: string
  /** Its file in the package. */
  readonly path: string
  readonly content: Uint8Array
}

/** Compressed since Debian 13. */
const MODULE_FILE = /^(.+)\.ko(\.xz|\.gz)?$/

/**
 * Reads modules, and all that these depend on, in an order in which they can be loaded.
 *
 * A package has no `modules.dep`, which is made on installation; so dependencies are read where depmod reads them, too.
 *
 * @param folder - `/lib/modules/<version>` of the package
 * @param wanted - names; what the kernel itself has is left out
 * @throws an error if the package has one of them in neither way
 */
export async function readModules(
  folder: string,
  wanted: readonly string[],
  making: Pick<Making, 'signal'>,
): Promise<KernelModule[]> {
  const paths = new Map<string, string>()
  for (const entry of await readdir(folder, { recursive: true, withFileTypes: true })) {
    const match = MODULE_FILE.exec(entry.name)
    if (entry.isFile() && match !== null) paths.set(moduleName(match[1]!), join(entry.parentPath, entry.name))
  }
  const list = await readFile(join(folder, 'modules.builtin'), 'utf8')
  const builtIn = new Set(list.split('\n').map((line) => moduleName(line.replace(/\.ko$/, ''))))
  const loaded = new Map<string, KernelModule | undefined>()
  const add = async (name: string): Promise<void> => {
    // Also true of one that is being added: Linux has no cycles in here, and this must not hang if it had.
    if (loaded.has(name)) return
    loaded.set(name, undefined)
    const path = paths.get(name)
    if (path === undefined && builtIn.has(name)) return
    if (path === undefined)
      throw new Error(`Expected the kernel's package to have module ${name} but it has not`)
    const content = await readModule(path, making.signal)
    for (const dependency of dependenciesOf(content)) await add(dependency)
    // Behind its dependencies.
    loaded.delete(name)
    loaded.set(name, { name, path, content })
  }
  for (const name of wanted) await add(moduleName(name))
  return [...loaded.values()].filter((module) => module !== undefined)
}

/** File names have hyphens where the names of modules have underscores. */
function moduleName(name: string): string {
  return basename(name).replaceAll('-', '_')
}

/** The field `depends` of section `.modinfo`: texts that end with 0, as MODULE_INFO in linux/module.h makes them. */
function dependenciesOf(content: Uint8Array): string[] {
  const text = Buffer.from(content.buffer, content.byteOffset, content.length).toString('latin1')
  const [, names = ''] = /\0depends=([\w,-]*)\0/.exec(text) ?? []
  return names
    .split(',')
    .filter((name) => name !== '')
    .map(moduleName)
}

async function readModule(path: string, signal: AbortSignal): Promise<Uint8Array> {
  if (path.endsWith('.gz')) return gunzipSync(await readFile(path))
  if (!path.endsWith('.xz')) return await readFile(path)
  await runProgram('xz', ['--decompress', '--keep', '--force', path], { signal })
  return await readFile(path.slice(0, -'.xz'.length))
}
