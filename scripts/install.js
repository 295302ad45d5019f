// npm's `install` script. In an installed package it compiles the addon only where the prebuilt one does not
// load; in the repository it compiles addon and guests.
import { spawnSync } from 'node:child_process'
import { createRequire } from 'node:module'
import { join } from 'node:path'
import { BuildError, compileNative, IN_REPOSITORY, ROOT } from './native-build.js'

const require = createRequire(import.meta.url)

/** Why there is no addon that works here, or undefined if there is one. */
function whatIsWrong() {
  if (process.env.npm_config_build_from_source) return 'a build from source was asked for'
  const addon = require('pkg-prebuilds').resolve(ROOT, require('./binding-options.cjs'), false, false)
  if (addon === null) return 'there is no prebuilt addon for this system'
  // In a process of its own: what was built for another processor may not just throw.
  const probe = spawnSync(process.execPath, ['-e', 'require(process.argv[1])', addon], { encoding: 'utf8' })
  if (probe.status === 0) return undefined
  const reason = /^Error: (.*)$/m.exec(probe.stderr)?.[1] ?? probe.signal ?? `status ${probe.status}`
  return `the prebuilt addon does not load here (${reason.replaceAll(join(ROOT, '/'), '')})`
}

try {
  if (IN_REPOSITORY) {
    compileNative()
  } else {
    const reason = whatIsWrong()
    if (reason !== undefined) {
      console.log(`nodevisor: ${reason}; compiling it`)
      compileNative()
    }
  }
} catch (error) {
  if (!(error instanceof BuildError)) throw error
  console.error(error.message)
  process.exitCode = 1
}
