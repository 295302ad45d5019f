// `npm run linux:kernel`: makes the kernel that `nodevisor linux` boots, unless it is there, and prints its path.
// `npm run linux:kernel -- debian` gets Debian's in place of the tiny one.
import { Listr } from 'listr2'
import { KERNEL_NAMES, type KernelName, type LinuxKernel, makeKernel } from '../src/linux/kernels.js'
import { makingIn } from './making.js'

async function main(name = 'tiny'): Promise<number> {
  if (!KERNEL_NAMES.includes(name as KernelName)) {
    console.error(`Expected ${KERNEL_NAMES.join(' or ')} but received ${name}`)
    return 2
  }
  const stop = new AbortController()
  // Each time: a second one must not end this before everything has been removed.
  for (const signal of ['SIGINT', 'SIGTERM'] as const) process.on(signal, () => stop.abort())
  const tasks = new Listr<{ kernel?: LinuxKernel }>({
    title: `making the kernel '${name}'`,
    task: async (state, task) => {
      const kernel = await makeKernel(name as KernelName, makingIn(task, stop.signal))
      state.kernel = kernel
      task.title = `kernel '${name}' from ${kernel.version}`
    },
  })
  try {
    const { kernel } = await tasks.run({})
    console.log(kernel!.image)
    return 0
  } catch {
    // The display says what it was.
    return 1
  }
}

process.exitCode = await main(process.argv[2])
