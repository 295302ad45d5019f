import { GuestRam, Kvm } from 'nodevisor/kvm'

const kvm = new Kvm()
const vm = kvm.createVm()
const ram = new GuestRam({ size: 0x10000 })
vm.setUserMemoryRegion({ slot: 0, guestAddress: 0, size: ram.size, ram })
// mov al, 'K'; out 0xe9, al; hlt
new Uint8Array(ram.buffer()).set([0xb0, 0x4b, 0xe6, 0xe9, 0xf4], 0x1000)

const vcpu = vm.createVcpu(0)
const special = vcpu.getSregs()
vcpu.setSregs({ ...special, cs: { ...special.cs, base: 0n, selector: 0 } })
vcpu.setRegs({ ...vcpu.getRegs(), rip: 0x1000n, rflags: 2n })

for (;;) {
  const exit = vcpu.run()
  if (exit.kind === 'io') console.log(`port ${exit.port.toString(16)}: ${exit.data}`)
  else break
}
vcpu.close()
vm.close()
ram.close()
kvm.close()
