// Ends the process while a guest runs: `node exit-while-running.mjs EXECUTION HOW`.
import { VirtualMachine } from '../../../dist/index.js'

const [execution, how] = process.argv.slice(2)
const ends = {
  timer: () => setTimeout(() => process.exit(7), 10),
  immediate: () => setImmediate(() => process.exit(7)),
  exception: () =>
    setTimeout(() => {
      throw new Error('uncaught')
    }, 10),
  device: () => {},
  listener: (vm) => vm.serial.on('data', () => process.exit(7)),
  exitHandler: (vm) => {
    process.on('exit', () => {
      vm.stop()
      vm.close()
      process.exitCode = 7
    })
    setTimeout(() => process.exit(7), 10)
  },
}
const device = {
  name: 'exit',
  ports: { base: 0x10, length: 1 },
  write() {
    if (how === 'device') process.exit(7)
  },
}
const vm = await VirtualMachine.create({
  // out 0x10, al; mov dx, 0x3f8; mov al, '!'; out dx, al; jmp $
  kernel: Uint8Array.of(0xe6, 0x10, 0xba, 0xf8, 0x03, 0xb0, 0x21, 0xee, 0xeb, 0xfe),
  memory: '1M',
  execution,
  devices: [device],
})
ends[how](vm)
const idle = await VirtualMachine.create({ kernel: Uint8Array.of(0xf4), memory: '1M' })
const result = await vm.run()
console.log(`not reached: ${result.reason}, ${idle.running}`)
