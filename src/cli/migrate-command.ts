import { resolve } from 'node:path'
import type { MigrationProgress } from '../index.js'
import { ask, type TlsFiles } from './control.js'
import { EXIT_STATUS } from './exit-status.js'
import { ProgressLine } from './progress-line.js'
import { say } from './say.js'

/** The options of `nodevisor migrate` and `nodevisor receive` for TLS, as the command line gives them. */
export interface TlsCommandOptions {
  readonly tlsCert?: string
  readonly tlsKey?: string
  readonly tlsCa?: string
}

/** The files that the options name; undefined for no TLS. */
export function tlsFiles({ tlsCert, tlsKey, tlsCa }: TlsCommandOptions): TlsFiles | undefined {
  const files = Object.entries({ cert: tlsCert, key: tlsKey, ca: tlsCa })
    .filter(([, file]) => file !== undefined)
    // The machine's process may be in another folder.
    .map(([name, file]) => [name, resolve(file!)])
  return files.length === 0 ? undefined : Object.fromEntries(files)
}

/** `nodevisor migrate SOCKET [HOST:PORT]`: moves a machine that runs, or lets it go on. @returns the exit status */
export async function migrateCommand(
  path: string,
  to: string | undefined,
  options: TlsCommandOptions & { readonly resume?: boolean },
): Promise<number> {
  if ((to === undefined) !== (options.resume === true)) {
    say('either HOST:PORT or --resume is needed')
    return EXIT_STATUS.usage
  }
  const tls = tlsFiles(options)
  const progress = new ProgressLine()
  try {
    const answer = await ask(
      path,
      to === undefined ? { resume: true } : { migrate: { to, ...(tls === undefined ? {} : { tls }) } },
      (step) => progress.show(progressText(step)),
    )
    progress.end()
    if (answer === undefined) say('the machine left without an answer')
    else if ('error' in answer) say(answer.error.message)
    else if (answer.result !== null) {
      const { bytes, durationMs, downtimeMs } = answer.result
      const took = `${mebibytes(bytes)} in ${(durationMs / 1000).toFixed(1)} s`
      say(`moved: ${took}, of which it stood still for ${downtimeMs.toFixed(0)} ms`)
    }
    return answer !== undefined && 'result' in answer ? EXIT_STATUS.ok : EXIT_STATUS.failed
  } catch (error) {
    progress.end()
    say(`no machine can be told at ${path}: ${error instanceof Error ? error.message : error}`)
    return EXIT_STATUS.usage
  }
}

const BAR_WIDTH = 30

function progressText({ round, done, total }: MigrationProgress): string {
  const filled = total === 0 ? BAR_WIDTH : Math.floor((done / total) * BAR_WIDTH)
  const what = round === 0 ? 'memory' : `changes, round ${round}`
  return `${what}: ${'#'.repeat(filled)}${'-'.repeat(BAR_WIDTH - filled)} ${mebibytes(done)} of ${mebibytes(total)}`
}

function mebibytes(bytes: number): string {
  return `${(bytes / 2 ** 20).toFixed(1)} MiB`
}
