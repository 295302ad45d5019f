/** Linux from power-on, beside QEMU's microvm: the same kernel, the same command line. */

import { once } from 'node:events'
import { inspectHost, VirtualMachine } from '../dist/index.js'
import { cachedKernel } from '../src/linux/kernels.js'
import { PARAMETERS, PVM_PARAMETERS } from '../src/linux/ready-made.js'
import { type Context, interleave } from './lib.js'
import { qemuVersion, startQemu } from './qemu.js'
import { compare, type Row } from './report.js'

export const title = 'Linux: from power-on'

/**
 * How far: to the first process; on PVM, where QEMU's guests end in the kernel's test of its `int3`, to the last line
 * before that.
 */
const MARKS = { process: 'Run /init as init process', selfTest: 'x86/fpu: ' } as const

/** QEMU stays where its guest cannot go on. In ms. */
const QEMU_LIMIT = 120_000

export async function run(context: Context): Promise<Row[]> {
  const kernel = await cachedKernel('tiny')
  if (kernel === undefined) {
    console.error('bench: there is no kernel, so that linux is left out; npm run linux:kernel makes one')
    return []
  }
  const isPvm = inspectHost().kind === 'pvm'
  const mark = isPvm ? MARKS.selfTest : MARKS.process
  const cmdline = ['earlyprintk=ttyS0', 'console=ttyS0', PARAMETERS, ...(isPvm ? [PVM_PARAMETERS] : [])].join(
    ' ',
  )

  const ours = async () => {
    const start = performance.now()
    const vm = await VirtualMachine.create({ kernel: { image: kernel.image, cmdline }, memory: '128M' })
    const ended = vm.run()
    await vm.serial.waitFor(mark)
    const duration = performance.now() - start
    vm.stop()
    await ended
    await vm.close()
    return duration * 1e6
  }
  const theirs = async () => {
    const start = performance.now()
    const qemu = startQemu(
      'pipe',
      ...['-M', 'microvm,pit=on,pic=on,rtc=on,isa-serial=on', '-serial', 'stdio'],
      ...['-kernel', kernel.image, '-append', cmdline],
    )
    const timer = setTimeout(() => qemu.kill('SIGKILL'), QEMU_LIMIT)
    let output = ''
    for await (const chunk of qemu.stdout!) {
      output += chunk
      if (output.includes(mark)) break
    }
    const duration = performance.now() - start
    clearTimeout(timer)
    const exit = once(qemu, 'exit')
    qemu.kill('SIGKILL')
    await exit
    if (!output.includes(mark))
      throw new Error(`Expected QEMU's guest to say '${mark}' but it said: ${output}`)
    return duration * 1e6
  }
  const contestants = qemuVersion === undefined ? { ours } : { ours, theirs }
  const samples = await interleave<'ours' | 'theirs'>(context.rounds(5), contestants as never)
  return [
    compare({
      what: `the tiny kernel, to '${mark}'`,
      unit: 'ns',
      ours: samples.ours,
      peer: `QEMU's microvm`,
      theirs: samples.theirs ?? [],
      bound: { max: 1.05 },
    }),
  ]
}
