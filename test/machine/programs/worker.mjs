// A worker that runs machines until somebody ends it. Posts 'running' once their guests do, and their results if they
// end by themselves.
import { parentPort, workerData } from 'node:worker_threads'
import { VirtualMachine } from '../../../dist/index.js'

/** Image, as numbers; how many machines; and the options of each. */
const { code, machines = 1, options = {}, close = false } = workerData
const image = Uint8Array.from(code)

let up = 0
const started = () => {
  if (++up === machines) parentPort.postMessage('running')
}
const results = await Promise.all(
  Array.from({ length: machines }, async () => {
    const vm = await VirtualMachine.create({ kernel: image, memory: '1M', ...options })
    for (const cpu of vm.vcpus.slice(1)) cpu.start({ rip: 0x7c00n })
    vm.serial.waitFor('!').then(started, () => {})
    const result = await vm.run()
    if (close) await vm.close()
    return { reason: result.reason, code: result.code, serial: vm.serial.output }
  }),
)
parentPort.postMessage(results)
