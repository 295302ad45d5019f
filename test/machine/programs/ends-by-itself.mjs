// Only the machine keeps the process alive; when it has ended, nothing does, though it is not closed.
import { VirtualMachine } from '../../../dist/index.js'

const [execution] = process.argv.slice(2)
const options = { memory: '1M', execution }
const idle = await VirtualMachine.create({ kernel: Uint8Array.of(0xf4), ...options })
// mov cx, 2000; next: in al, 0x10; loop next; mov al, 5; out 0xf4, al
const kernel = Uint8Array.of(0xb9, 0xd0, 0x07, 0xe4, 0x10, 0xe2, 0xfc, 0xb0, 0x05, 0xe6, 0xf4)
const vm = await VirtualMachine.create({ kernel, ...options })
vm.run().then(({ reason, code }) => console.log(`${reason} ${code}, idle: ${!idle.running}`))
