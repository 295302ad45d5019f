// Makes the repository ready to run: installs packages, compiles the addon, the guests and the TypeScript, as far
// as that is stale. `npm start`, `npm test` and the others begin with it, so it also runs in a fresh clone and
// needs nothing but Node.js. Logs are shown only of what fails.
import { createHash } from 'node:crypto'
import { existsSync, mkdirSync, readdirSync, readFileSync, rmSync, statSync, writeFileSync } from 'node:fs'
import { createRequire } from 'node:module'
import { tmpdir } from 'node:os'
import { join, relative } from 'node:path'
import { BuildError, compileNative, ROOT, runQuietly } from './native-build.js'

/** As `engines` in package.json. */
const MINIMUM_NODE = { major: 20, minor: 17 }

/** A text that changes when a file below these paths is added, removed or changed. */
function fingerprint(/** @type {readonly string[]} */ paths) {
  const hash = createHash('sha256')
  for (const path of paths) {
    const absolute = join(ROOT, path)
    const isFolder = statSync(absolute).isDirectory()
    const files = isFolder ? filesBelow(absolute).map((file) => join(absolute, file)) : [absolute]
    for (const file of files) {
      const { size, mtimeMs } = statSync(file)
      hash.update(`${relative(ROOT, file)} ${size} ${mtimeMs}\n`)
    }
  }
  return hash.digest('hex')
}

/** Paths of all files below a folder, relative to it, in order. */
function filesBelow(/** @type {string} */ folder) {
  return readdirSync(folder, { recursive: true, withFileTypes: true })
    .filter((entry) => entry.isFile())
    .map((entry) => relative(folder, join(entry.parentPath, entry.name)))
    .sort()
}

/** @returns {any} */
function readJson(/** @type {string} */ path) {
  return existsSync(path) ? JSON.parse(readFileSync(path, 'utf8')) : undefined
}

/** Whether node_modules has what package-lock.json wants; packages for other systems may be missing. */
function packagesAreInstalled() {
  const wanted = readJson(join(ROOT, 'package-lock.json')).packages
  const installed = readJson(join(ROOT, 'node_modules/.package-lock.json'))?.packages ?? {}
  return Object.entries(wanted).every(([path, { version, optional }]) => {
    if (path === '') return true
    return installed[path] === undefined ? optional === true : installed[path].version === version
  })
}

function installPackages() {
  const npm = process.env.npm_execpath
  // The scripts of packages are of no use here, and the project's own is the next step.
  const args = ['ci', '--ignore-scripts', '--no-audit', '--no-fund', '--loglevel=error']
  runQuietly(npm?.endsWith('.js') ? [process.execPath, npm, ...args] : ['npm', ...args])
}

/** Something that is built, with what it is built from. */
class Product {
  /**
   * @param {string} name
   * @param {readonly string[]} inputs files and folders
   * @param {() => readonly string[]} outputs files; all, or enough to tell
   * @param {() => void} build
   */
  constructor(name, inputs, outputs, build) {
    this.inputs = inputs
    this.outputs = outputs
    this.build = build
    this.stamp = join(ROOT, 'build', `.${name}-stamp`)
  }

  get isFresh() {
    return (
      existsSync(this.stamp) &&
      this.outputs().every((file) => existsSync(join(ROOT, file))) &&
      readFileSync(this.stamp, 'utf8') === fingerprint(this.inputs)
    )
  }

  make() {
    // What changes in the meantime makes it stale again.
    const stamp = fingerprint(this.inputs)
    rmSync(this.stamp, { force: true })
    this.build()
    writeFileSync(this.stamp, stamp)
  }
}

const native = new Product(
  'native',
  ['native', 'guests', 'CMakeLists.txt', 'package-lock.json'],
  () => ['build/Release/nodevisor.node', ...guestImages()],
  compileNative,
)

const dist = new Product(
  'dist',
  ['src', 'tsconfig.json', 'package-lock.json'],
  () => ['dist/index.js', 'dist/kvm/index.js', 'dist/linux/index.js', 'dist/cli/main.js'],
  compileTypeScript,
)

function guestImages() {
  return filesBelow(join(ROOT, 'guests'))
    .filter((file) => file.endsWith('/expected.json'))
    .map((file) => `build/guests/${readJson(join(ROOT, 'guests', file)).image}`)
}

/** What people import and run; everything else is bundled into chunks that these share. */
const ENTRIES = ['index', 'kvm/index', 'linux/index', 'cli/main']

function compileTypeScript() {
  rmSync(join(ROOT, 'dist'), { recursive: true, force: true })
  runQuietly([process.execPath, join(ROOT, 'node_modules/typescript/bin/tsc'), '--pretty', 'false'])
  // A few files instead of seventy: most of the time that an import takes is spent on finding and opening them.
  // By its interface: its command is JavaScript or machine code, depending on whether its install script ran.
  const esbuild = /** @type {typeof import('esbuild')} */ (createRequire(import.meta.url)('esbuild'))
  esbuild.buildSync({
    entryPoints: ENTRIES.map((entry) => join(ROOT, 'src', `${entry}.ts`)),
    outbase: join(ROOT, 'src'),
    outdir: join(ROOT, 'dist'),
    bundle: true,
    splitting: true,
    format: 'esm',
    platform: 'node',
    target: 'node20',
    packages: 'external',
    sourcemap: true,
    logLevel: 'warning',
  })
}

/** Says what takes time, and how much it took. */
function step(/** @type {string} */ title, /** @type {() => void} */ action) {
  const start = performance.now()
  process.stdout.write(`${title} … `)
  try {
    action()
  } catch (error) {
    process.stdout.write('failed\n')
    throw error
  }
  process.stdout.write(`${((performance.now() - start) / 1000).toFixed(1)} s\n`)
}

/** Waits until no other process prepares this folder, then keeps others waiting until this one ends. */
async function lock() {
  const path = join(
    tmpdir(),
    `nodevisor-prepare-${createHash('sha256').update(ROOT).digest('hex').slice(0, 16)}`,
  )
  for (let waited = false; ; waited = true) {
    try {
      writeFileSync(path, String(process.pid), { flag: 'wx' })
      process.on('exit', () => rmSync(path, { force: true }))
      return
    } catch (error) {
      if (/** @type {NodeJS.ErrnoException} */ (error).code !== 'EEXIST') throw error
    }
    if (!isAlive(path)) rmSync(path, { force: true })
    else if (!waited) console.log('waiting for another build of this folder …')
    await new Promise((resolve) => setTimeout(resolve, 200))
  }
}

/** Whether the process that wrote its id into a file still lives. */
function isAlive(/** @type {string} */ path) {
  try {
    const pid = Number(readFileSync(path, 'utf8'))
    // Written a moment ago, and not yet filled.
    if (pid === 0) return Date.now() - statSync(path).mtimeMs < 2000
    process.kill(pid, 0)
    return true
  } catch (error) {
    return /** @type {NodeJS.ErrnoException} */ (error).code === 'EPERM'
  }
}

async function prepare() {
  const [major = 0, minor = 0] = process.versions.node.split('.').map(Number)
  if (major < MINIMUM_NODE.major || (major === MINIMUM_NODE.major && minor < MINIMUM_NODE.minor)) {
    throw new BuildError(
      `nodevisor needs Node.js ${MINIMUM_NODE.major}.${MINIMUM_NODE.minor} or newer; this is ${process.version}.`,
    )
  }
  await lock()
  if (!packagesAreInstalled()) step('installing packages (npm ci)', installPackages)
  mkdirSync(join(ROOT, 'build'), { recursive: true })
  if (!native.isFresh) step('compiling the addon and the guests (cmake)', () => native.make())
  if (!dist.isFresh) step('compiling TypeScript (tsc)', () => dist.make())
}

try {
  await prepare()
} catch (error) {
  if (!(error instanceof BuildError)) throw error
  console.error(error.message)
  process.exit(1)
}
