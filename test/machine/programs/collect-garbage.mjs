// Collects garbage as often as it can, while guests run that nobody holds any more:
// `node --expose-gc collect-garbage.mjs EXECUTION ROUNDS`.
import { readFileSync } from 'node:fs'
import { VirtualMachine } from '../../../dist/index.js'

const [execution, rounds] = process.argv.slice(2)

class Collector {
  name = 'collector'
  ports = { base: 0x10, length: 1 }
  read() {
    globalThis.gc()
    return 5
  }
  write() {
    globalThis.gc()
  }
}

// mov cx, ROUNDS; next: in al, 0x10; out 0x10, al; out 0xe9, al; loop next; out 0xf4, al
const kernel = () =>
  Uint8Array.of(0xb9, Number(rounds), 0x00, 0xe4, 0x10, 0xe6, 0x10, 0xe6, 0xe9, 0xe2, 0xf8, 0xe6, 0xf4)
const create = () =>
  VirtualMachine.create({ kernel: kernel(), memory: '1M', execution, devices: [new Collector()] })

// The promise alone is held.
const runs = []
for (let i = 0; i < 3; i++) runs.push((await create()).run())
// A view alone, of a machine that ran and of one that did not.
const views = []
for (const run of [true, false]) {
  const vm = await create()
  if (run) await vm.run()
  views.push(vm.memory.view(0x7c00, 3))
}
// Nothing at all.
for (let i = 0; i < 3; i++) await create()

const results = await Promise.all(runs)
for (let i = 0; i < 10; i++) {
  globalThis.gc()
  await new Promise((resolve) => setTimeout(resolve, 1))
}
const maps = readFileSync('/proc/self/maps', 'utf8')
console.log(
  JSON.stringify({
    results: results.map(({ code }) => code),
    views: views.map((view) => [...view]),
    vcpus: maps.match(/kvm-vcpu/g)?.length ?? 0,
    rams: maps.match(/nodevisor-ram/g)?.length ?? 0,
  }),
)
