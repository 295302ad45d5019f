/** The ready-made Linux as tests boot it. */
import { realpath } from 'node:fs/promises'
import { onTestFinished } from 'vitest'
import {
  type InitramfsEntry,
  initramfs,
  inspectHost,
  type RunResult,
  VirtualMachine,
  type VirtualMachineOptions,
} from '../../src/index.js'
import { findProgram, runProgram } from '../../src/linux/debian-packages.js'
import { cachedKernel, findBusybox, type KernelName, type LinuxKernel } from '../../src/linux/kernels.js'
import { readyMadeInitramfs } from '../../src/linux/ready-made.js'

/** On PVM no system call enters the kernel: Linux goes as far as its first process. */
export const HAS_USER_SPACE = inspectHost().kind !== 'pvm'

/** What vitest gives a test that boots Linux, in ms. */
export const BOOT_LIMIT = 200_000

/** What the shell says when it is ready for a line. */
export const PROMPT = '# '

/** Lists the libraries of a program, also where there is no `ldd`. */
const LOADER = '/lib64/ld-linux-x86-64.so.2'
const NOBODY = { signal: new AbortController().signal, say: () => undefined }

/** A kernel that `npm run linux:kernel` has made. */
export async function kernelNamed(name: KernelName): Promise<LinuxKernel> {
  const kernel = await cachedKernel(name)
  if (kernel === undefined) throw new Error(`There is no kernel: npm run linux:kernel -- ${name}`)
  return kernel
}

/** The initramfs of `nodevisor linux`. */
export async function initrdOf(kernel: LinuxKernel): Promise<Uint8Array> {
  return await readyMadeInitramfs(kernel, await findBusybox(NOBODY))
}

/** An archive with programs of this system's, in `/sbin`, and the libraries that they need. */
export async function programsArchive(names: readonly string[]): Promise<Uint8Array> {
  const entries: Record<string, InitramfsEntry> = {}
  for (const name of names) {
    const program = await findProgram(name)
    if (program === undefined) throw new Error(`${name} is not here: apt-get install e2fsprogs`)
    entries[`/sbin/${name}`] = { file: await realpath(program), mode: 0o755 }
    const listed = await runProgram(LOADER, ['--list', program], NOBODY)
    for (const library of listed.match(/\/\S+\.so\S*/g) ?? []) {
      entries[library] = { file: await realpath(library), mode: 0o755 }
    }
  }
  return await initramfs(entries)
}

/** A running Linux. */
export interface RunningLinux {
  readonly vm: VirtualMachine
  /** How it ends. */
  readonly run: Promise<RunResult>
}

/** Boots the ready-made Linux, with a console and the agent; it is closed when the test is over. */
export async function bootLinux(
  kernel: LinuxKernel,
  options: Partial<VirtualMachineOptions> & { readonly cmdline?: string; readonly more?: Uint8Array } = {},
): Promise<RunningLinux> {
  const { cmdline = '', more, ...rest } = options
  const initrd = await initrdOf(kernel)
  const vm = await VirtualMachine.create({
    kernel: {
      image: kernel.image,
      initrd: more === undefined ? initrd : [initrd, more],
      cmdline: `console=hvc0 panic=-1 ${cmdline}`,
    },
    memory: '256M',
    console: true,
    rng: true,
    agent: true,
    ...rest,
  })
  onTestFinished(() => vm.close())
  return { vm, run: vm.run() }
}

/** Types a line, once the shell asks for one. @returns what came before the prompt */
export async function type(vm: VirtualMachine, line: string): Promise<string> {
  const { before } = await vm.console.waitFor(PROMPT)
  vm.console.write(`${line}\n`)
  return before
}
