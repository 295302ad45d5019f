/** How long a program waits for the package. */

import { execFile } from 'node:child_process'
import { writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { promisify } from 'node:util'
import { type Context, interleave, median, PACKAGE, time } from './lib.js'
import type { Figure, Row } from './report.js'

export const title = 'import'

const IMPORT = `
const start = performance.now()
const { VirtualMachine } = await import(${JSON.stringify(PACKAGE)})
const imported = performance.now()
`
const REPORT_IMPORT = `${IMPORT}
console.log(imported - start)
`
const REPORT_CREATE = `${IMPORT}
const vm = await VirtualMachine.create({ kernel: Uint8Array.of(0xf4) })
console.log(performance.now() - imported)
await vm.close()
`

export async function run(context: Context): Promise<Row[]> {
  const program = (name: string, text: string) => {
    const path = join(context.directory, `${name}.mjs`)
    writeFileSync(path, text)
    return path
  }
  const empty = program('empty', '')
  const importing = program('import', REPORT_IMPORT)
  const creating = program('create', REPORT_CREATE)
  const { start, imported, created } = await interleave(context.rounds(20), {
    start: () => time(() => node(empty)),
    imported: async () => Number(await node(importing)) * 1e6,
    created: async () => Number(await node(creating)) * 1e6,
  })
  const scale = { name: 'node, start to end of an empty program', figure: ns(median(start)) }
  return [
    {
      what: 'import of nodevisor, fresh process',
      ours: ns(median(imported)),
      peer: scale,
      bound: { max: 30e6 },
    },
    { what: 'first machine: addon, /dev/kvm, create', ours: ns(median(created)), peer: scale },
  ]
}

function ns(value: number): Figure {
  return { value, unit: 'ns' }
}

/** Runs a program in a process without anything of ours in it, and gives what it prints. */
async function node(program: string): Promise<string> {
  const { NODE_OPTIONS: _, ...env } = process.env
  const { stdout } = await promisify(execFile)(process.execPath, [program], { env })
  return stdout
}
