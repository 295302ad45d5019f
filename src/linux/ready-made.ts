import { existsSync } from 'node:fs'
import { readFile } from 'node:fs/promises'
import { basename } from 'node:path'
import { type InitramfsEntry, initramfs } from '../boot/initramfs.js'
import { invalidArgument, NodevisorError } from '../errors.js'
import { inspectHost } from '../kvm/host.js'
import { packageRoot } from '../package-root.js'
import { isThere, type Making } from './debian-packages.js'
import {
  cachedKernel,
  findBusybox,
  KERNEL_NAMES,
  type KernelName,
  LINUX_FOLDER,
  type LinuxKernel,
  makeKernel,
} from './kernels.js'

/**
 * The program that runs other programs for the host, see `vm.exec()`: statically linked, for an initramfs of one's own.
 * Not there where it was built without a static C library.
 */
export const agentProgram = findAgent()

/** Built here, or else with the package. */
function findAgent(): URL {
  const built = new URL('build/guests/agent', packageRoot())
  const shipped = new URL('prebuilds/agent', packageRoot())
  return existsSync(shipped) && !existsSync(built) ? shipped : built
}

/** A panic ends the run. */
export const PARAMETERS = 'panic=-1'
/** What a stock kernel needs to get to user space where KVM emulates its code: see docs/linux.md. */
export const PVM_PARAMETERS =
  'nosmap noxsave clearcpuid=cx16,smap,popcnt tsc=reliable no_timer_check lpj=1000000'

/** Options of {@link readyMadeLinux}. */
export interface ReadyMadeLinuxOptions {
  /** Leaves it, if the kernel is still being made: `ERR_ABORTED`. */
  readonly signal?: AbortSignal
  /** Is told what is being done, where that takes a while. */
  readonly onProgress?: (text: string) => void
}

/** A Linux that can be booted. */
export interface ReadyMadeLinux {
  readonly name: KernelName
  /** Of the Debian package that the kernel was made from. */
  readonly version: string
  /**
   * The `kernel` option of `VirtualMachine.create()`: the kernel's path; an initramfs that starts a shell on the console,
   * and the agent; a command line for a virtio console, which ends the run on a panic, with what PVM hosts need added there.
   */
  readonly kernel: { readonly image: string; readonly initrd: Uint8Array; readonly cmdline: string }
}

/**
 * A Linux with busybox, which is made the first time: `'tiny'` is compiled in about 4 minutes and starts quickest,
 * `'debian'` is Debian's kernel for virtual machines. Give the machine 256 MiB, `console: true` and, to run programs in it,
 * `agent: true`.
 *
 * @throws `ERR_LINUX_UNAVAILABLE`: it is not there and could not be made; the message says what is missing
 * @throws `ERR_ABORTED`, `ERR_INVALID_ARGUMENT`
 */
export async function readyMadeLinux(
  name: KernelName = 'tiny',
  options: ReadyMadeLinuxOptions = {},
): Promise<ReadyMadeLinux> {
  if (!KERNEL_NAMES.includes(name)) throw invalidArgument('name', `'${KERNEL_NAMES.join("' or '")}'`, name)
  const { signal = new AbortController().signal, onProgress } = options
  const making: Making = { signal, say: (text) => onProgress?.(text) }
  try {
    const made = (await cachedKernel(name)) ?? (await makeKernel(name, making))
    const initrd = await readyMadeInitramfs(made, await findBusybox(making))
    const isPvm = inspectHost().kind === 'pvm'
    const cmdline = ['console=hvc0', PARAMETERS, ...(isPvm ? [PVM_PARAMETERS] : [])].join(' ')
    return { name, version: made.version, kernel: { image: made.image, initrd, cmdline } }
  } catch (cause) {
    if (signal.aborted) throw new NodevisorError('ERR_ABORTED', 'Linux was not made: aborted', { cause })
    const message = cause instanceof Error ? cause.message : String(cause)
    throw new NodevisorError('ERR_LINUX_UNAVAILABLE', message, { cause })
  }
}

/** The first root file system: busybox, the modules, the agent and our /init. */
export async function readyMadeInitramfs(kernel: LinuxKernel, busybox: string): Promise<Uint8Array> {
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
    ...((await isThere(agentProgram)) ? { '/bin/agent': { file: agentProgram, mode: 0o755 } } : {}),
  })
}
