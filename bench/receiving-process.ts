/** A process of its own, for snapshots.ts: machines are moved here, one after the other, run a little and are closed. */

import { createServer } from 'node:net'
import { VirtualMachine } from '../dist/index.js'
import { sleep } from './lib.js'

/** What was found in a machine that was moved here. */
export interface ReceivedReport {
  /** Nanoseconds: the longest time in which the guest did nothing. */
  readonly pause: number
}

const server = createServer(async (socket) => {
  const vm = await VirtualMachine.receive(socket)
  const running = vm.run()
  await sleep(50)
  vm.stop()
  const { reason } = await running
  if (reason !== 'stopped') throw new Error(`Expected a guest that runs for ever but it ended with ${reason}`)
  const cycles = Number(vm.vcpus[0]!.registers.r9)
  const khz = vm.vcpus[0]!.unsafeVcpu.getTscKhz()
  await vm.close()
  process.send!({ pause: (cycles / khz) * 1e6 } satisfies ReceivedReport)
})
server.listen(0, '127.0.0.1', () => {
  const address = server.address()
  if (address === null || typeof address === 'string') throw new Error('Expected a port')
  process.send!({ port: address.port })
})
process.once('disconnect', () => server.close())
