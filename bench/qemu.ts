/** QEMU as a peer, where it is installed. */

import { type ChildProcess, spawn, spawnSync } from 'node:child_process'
import { once } from 'node:events'
import { inspectHost } from '../dist/index.js'

const QEMU = 'qemu-system-x86_64'

export const DEBUG_EXIT_PORT = 0xf4

/** The first line of `--version`, or undefined where QEMU is not installed. */
export const qemuVersion: string | undefined = (() => {
  const { status, stdout } = spawnSync(QEMU, ['--version'], { encoding: 'utf8' })
  return status === 0 ? stdout.split('\n')[0] : undefined
})()

/** A machine with 128 MiB and debug-exit, and nothing else that can be left out. */
function qemuArguments(args: readonly string[]): string[] {
  // On PVM, QEMU stops at an MSR that goes with this feature.
  const cpu = inspectHost().kind === 'pvm' ? 'host,-arch-capabilities' : 'host'
  return [
    ...['-accel', 'kvm', '-cpu', cpu, '-m', '128', '-nodefaults', '-no-user-config', '-display', 'none'],
    ...['-device', `isa-debug-exit,iobase=${DEBUG_EXIT_PORT},iosize=4`],
    ...args,
  ]
}

/** Starts QEMU, its standard output ignored or to be read. Whoever does kills it. */
export function startQemu(output: 'ignore' | 'pipe', ...args: string[]): ChildProcess {
  return spawn(QEMU, qemuArguments(args), { stdio: ['ignore', output, 'inherit'] })
}

/** Runs QEMU until the guest writes `code` to debug-exit. */
export async function runQemu(code: number, ...args: string[]): Promise<void> {
  const [status] = await once(startQemu('ignore', ...args), 'exit')
  if (status !== ((code << 1) | 1)) {
    throw new Error(
      `Expected ${QEMU} ${args.join(' ')} to end with debug-exit ${code} but its status is ${status}`,
    )
  }
}
