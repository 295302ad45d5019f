/**
 * A process of its own, for machines.ts: a vCPU waits in KVM_RUN, on a thread of its own, for an interrupt that never
 * comes. It says what that costs, and has to be killed.
 */

import { Worker } from 'node:worker_threads'
import { Kvm } from '../dist/kvm/index.js'
import { ENTRY, halt } from './guests.js'
import { METAL_PACKAGE, sleep } from './lib.js'

/** With its interrupt controllers in the kernel, a vCPU does not leave KVM_RUN when it halts. */
const IOAPIC_PINS = 24n

const PROGRAM = `
const { parentPort } = require('node:worker_threads')
import(${JSON.stringify(METAL_PACKAGE)}).then(({ Kvm, GuestRam }) => {
  const vm = new Kvm().createVm()
  vm.enableCap('SPLIT_IRQCHIP', [${IOAPIC_PINS}n])
  const ram = new GuestRam({ size: 0x10000 })
  vm.setUserMemoryRegion({ slot: 0, guestAddress: 0, size: ram.size, ram })
  new Uint8Array(ram.buffer()).set([${halt()}], ${ENTRY})
  const vcpu = vm.createVcpu(0)
  const special = vcpu.getSregs()
  vcpu.setSregs({ ...special, cs: { ...special.cs, base: 0n, selector: 0 } })
  vcpu.setRegs({ ...vcpu.getRegs(), rip: ${ENTRY}n, rflags: 2n })
  parentPort.postMessage('running')
  parentPort.postMessage(vcpu.run().kind)
})`

/** Nanoseconds computed in one second of waiting; undefined where the host's KVM has no such controllers. */
async function measure(): Promise<number | undefined> {
  const kvm = new Kvm()
  const able = kvm.checkExtension('SPLIT_IRQCHIP') > 0
  kvm.close()
  if (!able) return undefined
  const messages: unknown[] = []
  const worker = new Worker(PROGRAM, { eval: true })
  worker.on('message', (message) => messages.push(message))
  await sleep(500)
  const start = process.cpuUsage()
  await sleep(1000)
  const { user, system } = process.cpuUsage(start)
  if (messages.join() !== 'running') throw new Error(`Expected the vCPU to wait but: ${messages.join(', ')}`)
  return (user + system) * 1000
}

process.send!({ idleTime: await measure() })
