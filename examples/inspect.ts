import { VirtualMachine } from 'nodevisor'

await using vm = await VirtualMachine.create({ kernel: 'build/guests/screen.elf' })
await vm.run({ timeout: 5000 })

const [cpu] = vm.vcpus
console.log(vm.screen.text())
console.log('cell at 0xb8000:', vm.memory.readUint16(0xb8000).toString(16))
console.log('state:', cpu?.state, 'rip:', cpu?.registers.rip.toString(16))
