import { VirtualMachine } from 'nodevisor'

// mov al, 42; out 0x80, al; inc al; hlt: a real-mode program as bytes
const kernel = Uint8Array.of(0xb0, 42, 0xe6, 0x80, 0xfe, 0xc0, 0xf4)
await using vm = await VirtualMachine.create({ kernel })

for (;;) {
  const { exit, result } = await vm.stepInstruction()
  const { rip, rax } = vm.vcpus[0]!.registers
  console.log(`${exit?.kind}: rip ${rip.toString(16)}, al ${rax & 0xffn}`)
  if (result) break
}
