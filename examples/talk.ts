import { VirtualMachine } from 'nodevisor'

await using vm = await VirtualMachine.create({ kernel: 'build/guests/echo.elf', memory: '16M' })
const run = vm.run({ signal: AbortSignal.timeout(5000) })

await vm.serial.waitFor('ready\n')
vm.serial.write('hello\n')
const { before } = await vm.serial.waitFor(/hello/, { timeout: 2000 })
vm.serial.write('quit\n')

const result = await run
console.log({ before, reason: result.reason, exits: result.exits.io > 0 })
