// Creates, runs and closes machines, and prints what the process holds after some and after all of them:
// `node --expose-gc cycles.mjs EXECUTION COUNT`.
import { readdirSync, readFileSync } from 'node:fs'
import { VirtualMachine } from '../../../dist/index.js'

const [execution, count] = process.argv.slice(2)
// mov cx, 100; next: out 0xe9, al; loop next; mov al, 1; out 0xf4, al
const kernel = Uint8Array.of(0xb9, 0x64, 0x00, 0xe6, 0xe9, 0xe2, 0xfc, 0xb0, 0x01, 0xe6, 0xf4)

async function cycle(i) {
  const vm = await VirtualMachine.create({ kernel, memory: '1M', execution, cpus: 1 + (i % 2) })
  const view = vm.memory.view(0x7c00, 1)
  if (i % 2 === 1) vm.vcpus[1].start({ rip: 0x7c00n })
  const { reason } = await vm.run()
  if (reason !== 'debug-exit') throw new Error(`ended with ${reason}`)
  await vm.close()
  if (view.length !== 0) throw new Error('the view outlived its machine')
}

async function held() {
  // Finalizers run when the loop has turned.
  for (let i = 0; i < 5; i++) {
    globalThis.gc()
    await new Promise((resolve) => setTimeout(resolve, 10))
  }
  return {
    fds: readdirSync('/proc/self/fd').length,
    threads: readdirSync('/proc/self/task').length,
    mappings: readFileSync('/proc/self/maps', 'utf8').split('\n').length,
    kvmFds: readFileSync('/proc/self/maps', 'utf8').match(/kvm-vcpu|nodevisor-ram/g)?.length ?? 0,
  }
}

// The heap grows to its size first.
for (let i = 0; i < Number(count) / 2; i++) await cycle(i)
const before = await held()
for (let i = 0; i < Number(count); i++) await cycle(i)
console.log(JSON.stringify({ before, after: await held() }))
