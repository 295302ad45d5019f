// Compiles the addon (and, in the repository, the example guests) with cmake-js. Plain Node.js without
// dependencies of its own: it runs while the package is being installed.
import { spawnSync } from 'node:child_process'
import { accessSync, constants, existsSync, readFileSync, realpathSync } from 'node:fs'
import { createRequire } from 'node:module'
import { delimiter, join } from 'node:path'
import { fileURLToPath } from 'node:url'

export const ROOT = realpathSync(fileURLToPath(new URL('..', import.meta.url)))

/** The repository, as opposed to an installed package: only there are guests. */
export const IN_REPOSITORY = existsSync(join(ROOT, 'guests/CMakeLists.txt'))

/** A failure that a person can do something about: the message is all there is to print. */
export class BuildError extends Error {}

/**
 * Runs a command to its end without showing what it prints.
 *
 * @param {readonly string[]} command
 * @param {{ cwd?: string, env?: NodeJS.ProcessEnv }} [options]
 * @throws {BuildError} with all the output, if it fails
 */
export function runQuietly([program = '', ...args], { cwd = ROOT, env = process.env } = {}) {
  const { status, signal, error, stdout, stderr } = spawnSync(program, args, {
    cwd,
    env,
    encoding: 'utf8',
    stdio: ['ignore', 'pipe', 'pipe'],
    maxBuffer: 2 ** 28,
  })
  if (status === 0) return stdout
  const how = error?.message ?? (signal === null ? `status ${status}` : signal)
  throw new BuildError(`${stdout ?? ''}${stderr ?? ''}\n${[program, ...args].join(' ')} failed: ${how}`)
}

/** @param {readonly string[]} names of programs that will do */
function isInstalled(...names) {
  const folders = (process.env.PATH ?? '').split(delimiter).filter((folder) => folder !== '')
  return names.some((name) =>
    (name.includes('/') ? [name] : folders.map((folder) => join(folder, name))).some((path) => {
      try {
        accessSync(path, constants.X_OK)
        return true
      } catch {
        return false
      }
    }),
  )
}

/** @throws {BuildError} that says what to install */
function checkTools() {
  const missing = [
    isInstalled('cmake') ? [] : ['cmake'],
    isInstalled('g++', 'clang++') ? [] : ['a C++ compiler'],
    isInstalled('ninja', 'make') ? [] : ['make'],
  ].flat()
  if (missing.length === 0) return
  throw new BuildError(
    `Compiling the addon of nodevisor needs ${missing.join(' and ')}, not found on this machine. Install with\n` +
      '  apt-get install cmake g++ make      (Debian, Ubuntu)\n' +
      '  dnf install cmake gcc-c++ make      (Fedora, RHEL)\n' +
      (IN_REPOSITORY ? '' : 'and then run "npm rebuild nodevisor".\n'),
  )
}

/** A build folder that was configured for another place: a moved or copied checkout. */
function isForeign(/** @type {string} */ folder) {
  const cache = join(ROOT, folder, 'CMakeCache.txt')
  if (!existsSync(cache)) return false
  const home = /^CMAKE_HOME_DIRECTORY:INTERNAL=(.*)$/m.exec(readFileSync(cache, 'utf8'))?.[1]
  return home !== ROOT
}

/**
 * Compiles what is stale, by CMake's own reckoning.
 *
 * @param {{ folder?: string, define?: Record<string, string> }} [options] where to build, and CMake's variables
 * @throws {BuildError}
 */
export function compileNative({ folder = 'build', define = {} } = {}) {
  checkTools()
  const cmakeJs = createRequire(import.meta.url).resolve('cmake-js/bin/cmake-js')
  const definitions = { NODEVISOR_GUESTS: IN_REPOSITORY ? 'ON' : 'OFF', ...define }
  const args = [
    '--out',
    folder,
    ...Object.entries(definitions).map(([name, value]) => `--CD${name}=${value}`),
  ]
  const cmakeJsRun = (/** @type {string} */ verb) => runQuietly([process.execPath, cmakeJs, verb, ...args])
  if (isForeign(folder)) cmakeJsRun('clean')
  cmakeJsRun('build')
}
