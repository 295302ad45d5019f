import { spawn } from 'node:child_process'
import { access, mkdir, readdir } from 'node:fs/promises'
import { delimiter, join } from 'node:path'
import { createInterface } from 'node:readline'

/** What goes with something that takes a while. */
export interface Making {
  /** Stops it. */
  readonly signal: AbortSignal
  /** Is told what is being done. */
  say(text: string): void
}

/** How many lines of a program that fails are shown. */
const LINES_SHOWN = 30

/** How to run a program. */
export interface ProgramOptions {
  readonly cwd?: string
  readonly environment?: Readonly<Record<string, string>>
  readonly signal: AbortSignal
  /** Is told each line of standard output, which is kept only if this is missing. */
  readonly onLine?: (line: string) => void
}

/**
 * Runs a program to its end.
 *
 * @returns its standard output
 * @throws an error with the last lines of what it said, if it fails
 */
export async function runProgram(
  program: string,
  args: readonly string[],
  options: ProgramOptions,
): Promise<string> {
  const { cwd, environment, signal, onLine } = options
  const child = spawn(program, args, {
    ...(cwd === undefined ? {} : { cwd }),
    // What is looked for in its output is English.
    env: { ...process.env, LC_ALL: 'C', ...environment },
    stdio: ['ignore', 'pipe', 'pipe'],
    signal,
  })
  const output: string[] = []
  const tail: string[] = []
  const listen = (stream: NodeJS.ReadableStream, onEach: (line: string) => void) =>
    createInterface({ input: stream }).on('line', (line) => {
      if (tail.push(line) > LINES_SHOWN) tail.shift()
      onEach(line)
    })
  listen(child.stdout, onLine ?? ((line) => output.push(`${line}\n`)))
  listen(child.stderr, () => {})
  const status = await new Promise<number | string | null>((resolve, reject) => {
    let aborted: Error | undefined
    child.on('error', (error) => {
      // One that is being killed still writes files: whoever removes these has to wait for its end.
      if (child.pid === undefined) reject(error)
      else aborted = error
    })
    child.on('close', (code, killedBy) =>
      aborted === undefined ? resolve(code ?? killedBy) : reject(aborted),
    )
  })
  if (status !== 0) {
    throw new Error(`${program} ${args.join(' ')} failed (${status}):\n${tail.join('\n')}`)
  }
  return output.join('')
}

/** Path of a program that is in PATH. */
export async function findProgram(name: string): Promise<string | undefined> {
  for (const folder of (process.env.PATH ?? '').split(delimiter)) {
    const path = join(folder, name)
    if (folder !== '' && (await isThere(path))) return path
  }
  return undefined
}

export async function isThere(path: string | URL): Promise<boolean> {
  return access(path).then(
    () => true,
    () => false,
  )
}

/** The version of a Debian package that would be downloaded. */
export async function packageVersion(name: string, making: Making): Promise<string> {
  return await askPackageLists(name, making, async () => {
    const shown = await runProgram('apt-cache', ['show', '--no-all-versions', name], making)
    return /^Version: (.*)$/m.exec(shown)?.[1]
  })
}

/** The package that a package without content stands for: the newest kernel, for instance. */
export async function dependencyOf(name: string, pattern: RegExp, making: Making): Promise<string> {
  return await askPackageLists(name, making, async () => {
    const shown = await runProgram('apt-cache', ['depends', name], making)
    return [...shown.matchAll(/Depends: (\S+)/g)]
      .map(([, found]) => found!)
      .find((found) => pattern.test(found))
  })
}

/** Asks once more with new package lists where the old ones, or none, do not have it. */
async function askPackageLists(
  name: string,
  making: Making,
  ask: () => Promise<string | undefined>,
): Promise<string> {
  if ((await findProgram('apt-cache')) === undefined) {
    throw new Error(`Expected apt-get, to download Debian's package ${name}, but there is none here`)
  }
  const asked = () =>
    ask().catch((error) => {
      if (making.signal.aborted) throw error
      return undefined
    })
  const known = await asked()
  if (known !== undefined) return known
  making.say('updating the package lists (apt-get update)')
  await runProgram('apt-get', ['update', '-qq'], making)
  const found = await asked()
  if (found === undefined) throw new Error(`Expected Debian's package lists to have ${name} but they do not`)
  return found
}

/**
 * Downloads a Debian package and unpacks it, without installing it.
 *
 * @param folder - where there is room for both; the caller removes it
 * @returns the folder that stands for the root of the file system
 */
export async function unpackPackage(name: string, folder: string, making: Making): Promise<string> {
  making.say(`downloading ${name}`)
  await mkdir(folder, { recursive: true })
  await runProgram('apt-get', ['download', '-qq', name], { ...making, cwd: folder })
  const file = (await readdir(folder)).find((entry) => entry.endsWith('.deb'))
  making.say(`unpacking ${name}`)
  const unpacked = join(folder, 'unpacked')
  await runProgram('dpkg', ['-x', join(folder, file!), unpacked], making)
  return unpacked
}
