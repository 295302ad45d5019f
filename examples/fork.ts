import { VirtualMachine } from 'nodevisor'

// mov al, 1; out 0xf4, al: ready. Then mov al, bl; add al, al; out 0x80, al; hlt
const kernel = Uint8Array.of(0xb0, 1, 0xe6, 0xf4, 0x88, 0xd8, 0x00, 0xc0, 0xe6, 0x80, 0xf4)
await using vm = await VirtualMachine.create({ kernel })
await vm.run()
await using ready = await vm.snapshot()

for (const [index, copy] of (await ready.spawn(3)).entries()) {
  copy.vcpus[0]!.registers.rbx = BigInt(20 + index)
  await copy.run()
  console.log(`copy ${index} says ${copy.postCodes.at(-1)}`)
  await copy.close()
}
