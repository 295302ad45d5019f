import { type Device, VirtualMachine } from 'nodevisor'

class Counter implements Device {
  readonly name = 'counter'
  readonly ports = { base: 0x500, length: 1 }
  count = 0

  read(): number {
    this.count += 1
    return this.count
  }
}

const counter = new Counter()
await using vm = await VirtualMachine.create({ kernel: 'counter.elf', devices: [counter] })
const result = await vm.run({ timeout: 5000 })

console.log(`the guest says: ${vm.serial.output}`)
console.log(`it ended with ${result.reason}, the device was read ${counter.count} times`)
