// Runs guests while signals come: `node signals.mjs EXECUTION`. Prints 'ready', ends with 'quit' on its input, and
// prints what it saw.
import { VirtualMachine } from '../../../dist/index.js'

const [execution] = process.argv.slice(2)
let received = 0
process.on('SIGUSR2', () => {
  received++
})
// A guest that counts through all bytes without end, on the serial port:
// mov dx, 0x3f8; mov bl, 0; next: mov al, bl; out dx, al; inc bl; jmp next
const kernel = Uint8Array.of(0xba, 0xf8, 0x03, 0xb3, 0x00, 0x88, 0xd8, 0xee, 0xfe, 0xc3, 0xeb, 0xf9)
const stopped = new AbortController()
process.stdin.on('data', () => stopped.abort()).on('end', () => stopped.abort())

const machines = await Promise.all(
  [1, 2].map(() => VirtualMachine.create({ kernel, memory: '1M', execution })),
)
const wrong = machines.map(() => 0)
const total = machines.map(() => 0)
for (const [i, vm] of machines.entries()) {
  vm.serial.on('data', (chunk) => {
    for (const byte of chunk) if (byte !== (total[i]++ & 0xff)) wrong[i]++
  })
}
const runs = machines.map((vm) => vm.run({ signal: stopped.signal }))
console.log('ready')
let cycles = 0
// Ioctls of every kind meet signals too.
while (!stopped.signal.aborted) {
  const vm = await VirtualMachine.create({
    kernel: Uint8Array.of(0xb0, 0x01, 0xe6, 0xf4),
    memory: '1M',
    execution,
  })
  const { reason } = await vm.run()
  if (reason !== 'debug-exit') throw new Error(`ended with ${reason}`)
  await vm.close()
  cycles++
}
const results = await Promise.all(runs)
process.stdin.destroy()
console.log(
  JSON.stringify({
    reasons: results.map(({ reason }) => reason),
    wrong,
    progress: total.every((count) => count > 0) && cycles > 0,
    received: received > 0,
  }),
)
