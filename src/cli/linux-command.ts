import { access, mkdtemp, readFile, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { basename, join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { type InitramfsEntry, initramfs, inspectHost } from '../index.js'
import type { Making } from './debian-packages.js'
import { EXIT_STATUS } from './exit-status.js'
import {
  cachedKernel,
  findBusybox,
  type KernelName,
  LINUX_FOLDER,
  type LinuxKernel,
  makeKernel,
} from './linux-kernels.js'
import { runCommand } from './run-command.js'

/** The options of `nodevisor linux`, as the command line gives them. */
export interface LinuxCommandOptions {
  readonly kernel: KernelName
  readonly memory: string
  readonly cpus: number
  readonly disk?: readonly string[]
  readonly cmdline?: string
  readonly timeout?: number
}

/** The program that runs other programs for the host, where the project has been built with it. */
const AGENT = new URL('../../build/guests/agent', import.meta.url)
/** What a stock kernel needs to get to user space where KVM emulates its code: see docs/linux.md. */
export const PVM_PARAMETERS =
  'nosmap noxsave clearcpuid=cx16,smap,popcnt tsc=reliable no_timer_check lpj=1000000'
/** A panic ends the run. */
const PARAMETERS = 'panic=-1'

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

function say(text: string): void {
  process.stderr.write(`nodevisor: ${text}\n`)
}

/** Makes kernel and initramfs. @returns an exit status if that failed, which has been said */
async function prepare(name: KernelName, initrd: string): Promise<LinuxKernel | number> {
  const stop = new AbortController()
  const abort = () => stop.abort()
  const signals = ['SIGINT', 'SIGTERM', 'SIGHUP'] as const
  for (const signal of signals) process.on(signal, abort)
  const progress = new ProgressLine()
  const making: Making = { signal: stop.signal, say: (text) => progress.show(text) }
  try {
    const kernel = (await cachedKernel(name)) ?? (await makeKernel(name, making))
    await writeFile(initrd, await makeInitramfs(kernel, await findBusybox(making)))
    return kernel
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

/** What is being done: on a terminal in one line that changes, elsewhere a line for each thing, but not each file. */
class ProgressLine {
  #shown = ''

  show(text: string): void {
    if (process.stderr.isTTY) {
      process.stderr.write(`\r\x1b[K${text.slice(0, (process.stderr.columns || 80) - 1)}`)
    } else if (subject(text) !== subject(this.#shown)) {
      say(subject(text))
    }
    this.#shown = text
  }

  end(): void {
    if (this.#shown !== '' && process.stderr.isTTY) process.stderr.write('\r\x1b[K')
    this.#shown = ''
  }
}

function subject(text: string): string {
  return text.replace(/:.*/, '')
}

/** The first root file system: busybox, the modules, and our /init. */
export async function makeInitramfs(kernel: LinuxKernel, busybox: string): Promise<Uint8Array> {
  const agent = fileURLToPath(AGENT)
  const hasAgent = await access(agent).then(
    () => true,
    () => false,
  )
  const filesIn = (folder: string, files: readonly string[]) =>
    Object.fromEntries(
      files.map((file): [string, InitramfsEntry] => [`/${folder}/${basename(file)}`, { file }]),
    )
  return await initramfs({
    '/init': await readFile(new URL('init', LINUX_FOLDER)),
    '/bin/busybox': { file: busybox, mode: 0o755 },
    '/dev/console': { device: [5, 1], mode: 0o600 },
    '/dev/null': { device: [1, 3], mode: 0o666 },
    ...filesIn('modules', kernel.modules),
    ...filesIn('bin', kernel.programs),
    ...(hasAgent ? { '/bin/agent': { file: agent, mode: 0o755 } } : {}),
  })
}

function boot(
  kernel: LinuxKernel,
  initrd: string,
  options: LinuxCommandOptions,
  isPvm: boolean,
): Promise<number> {
  const { memory, cpus, disk, timeout, cmdline = '' } = options
  const chosen = [...cmdline.matchAll(/(?:^|\s)console=(\w+)/g)].at(-1)?.[1]
  // Debian's console driver is a module: where no user space loads it, there is the serial port only.
  const console = chosen ?? (isPvm && kernel.name === 'debian' ? 'ttyS0' : 'hvc0')
  const parameters = [
    ...(chosen === undefined ? [`console=${console}`] : []),
    PARAMETERS,
    ...(isPvm ? [PVM_PARAMETERS] : []),
    ...(cmdline === '' ? [] : [cmdline]),
  ]
  return runCommand(kernel.image, {
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
