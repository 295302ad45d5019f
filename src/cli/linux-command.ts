import { mkdtemp, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { inspectHost } from '../index.js'
import type { KernelName } from '../linux/kernels.js'
import { PARAMETERS, PVM_PARAMETERS, type ReadyMadeLinux, readyMadeLinux } from '../linux/ready-made.js'
import { EXIT_STATUS } from './exit-status.js'
import { ProgressLine } from './progress-line.js'
import { runCommand } from './run-command.js'
import { say } from './say.js'

/** The options of `nodevisor linux`, as the command line gives them. */
export interface LinuxCommandOptions {
  readonly kernel: KernelName
  readonly memory: string
  readonly cpus: number
  readonly disk?: readonly string[]
  readonly cmdline?: string
  readonly timeout?: number
}

/** `nodevisor linux`: boots a ready-made Linux to a shell, and makes what of it there is not. @returns the exit status */
export async function linuxCommand(options: LinuxCommandOptions): Promise<number> {
  const host = inspectHost()
  if (!host.usable) {
    say(host.problem?.message ?? 'KVM is not usable')
    return EXIT_STATUS.unavailable
  }
  const isPvm = host.kind === 'pvm'
  if (isPvm) {
    say(
      "this host's KVM is PVM: Linux boots slowly, and its user space does not run, as system calls do not enter " +
        'the kernel. It goes as far as starting /init; Ctrl-] leaves.',
    )
  }
  if (options.kernel === 'tiny' && options.cpus > 1) {
    say('the tiny kernel uses one processor only; --kernel debian uses all')
  }
  const folder = await mkdtemp(join(tmpdir(), 'nodevisor-linux-'))
  try {
    const prepared = await prepare(options.kernel, join(folder, 'initrd'))
    if (typeof prepared === 'number') return prepared
    return await boot(prepared, join(folder, 'initrd'), options, isPvm)
  } finally {
    await rm(folder, { recursive: true, force: true })
  }
}

/** Makes kernel and initramfs. @returns an exit status if that failed, which has been said */
async function prepare(name: KernelName, initrd: string): Promise<ReadyMadeLinux | number> {
  const stop = new AbortController()
  const abort = () => stop.abort()
  const signals = ['SIGINT', 'SIGTERM', 'SIGHUP'] as const
  for (const signal of signals) process.on(signal, abort)
  const progress = new ProgressLine()
  try {
    const linux = await readyMadeLinux(name, {
      signal: stop.signal,
      onProgress: (text) => progress.show(text),
    })
    await writeFile(initrd, linux.kernel.initrd)
    return linux
  } catch (error) {
    progress.end()
    if (stop.signal.aborted) {
      say('left')
      return EXIT_STATUS.interrupted
    }
    say(error instanceof Error ? error.message : String(error))
    return EXIT_STATUS.unavailable
  } finally {
    progress.end()
    for (const signal of signals) process.off(signal, abort)
  }
}

function boot(
  linux: ReadyMadeLinux,
  initrd: string,
  options: LinuxCommandOptions,
  isPvm: boolean,
): Promise<number> {
  const { memory, cpus, disk, timeout, cmdline = '' } = options
  const chosen = [...cmdline.matchAll(/(?:^|\s)console=(\w+)/g)].at(-1)?.[1]
  // Debian's console driver is a module: where no user space loads it, there is the serial port only.
  const console = chosen ?? (isPvm && linux.name === 'debian' ? 'ttyS0' : 'hvc0')
  const parameters = [
    ...(chosen === undefined ? [`console=${console}`] : []),
    PARAMETERS,
    ...(isPvm ? [PVM_PARAMETERS] : []),
    ...(cmdline === '' ? [] : [cmdline]),
  ]
  return runCommand(linux.kernel.image, {
    memory,
    cpus,
    cmdline: parameters.join(' '),
    initrd: [initrd],
    unpack: true,
    execution: 'auto',
    irqchip: 'auto',
    console: console.startsWith('hvc'),
    rng: true,
    ...(disk === undefined ? {} : { disk }),
    ...(timeout === undefined ? {} : { timeout }),
  })
}
