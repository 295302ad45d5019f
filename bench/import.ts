/** How long a program waits for the package. */

import { execFile } from 'node:child_process'
import { promisify } from 'node:util'
import { type Context, interleave, PACKAGE, time } from './lib.js'
import type { Figure, Row } from './report.js'

export const title = 'import'

const IMPORT = `
  const start = performance.now()
  const { VirtualMachine } = await import(${JSON.stringify(PACKAGE)})
  const imported = performance.now()`
const REPORT_IMPORT = `${IMPORT}
  console.log(imported - start)`
const REPORT_CREATE = `${IMPORT}
  const vm = await VirtualMachine.create({ kernel: Uint8Array.of(0xf4) })
  console.log(performance.now() - imported)
  await vm.close()`

export async function run(context: Context): Promise<Row[]> {
  const { start, imported, created } = await interleave(context.rounds(20), {
    start: () => time(() => node('')),
    imported: async () => Number(await node(REPORT_IMPORT)) * 1e6,
    created: async () => Number(await node(REPORT_CREATE)) * 1e6,
  })
  return [
    { what: 'import of nodevisor, fresh process', ours: ns(imported), bound: { max: 30e6 } },
    { what: 'first machine: addon, /dev/kvm, create', ours: ns(created) },
    { what: 'for scale: node starts and ends', ours: ns(start) },
  ]
}

function ns(value: number): Figure {
  return { value, unit: 'ns' }
}

/** Runs a program in a process without anything of ours in it, and gives what it prints. */
async function node(program: string): Promise<string> {
  const { NODE_OPTIONS: _, ...env } = process.env
  const { stdout } = await promisify(execFile)(process.execPath, ['--input-type=module', '-e', program], {
    env,
  })
  return stdout
}
