import { type DescriptorChain, type VirtioDevice, VirtualMachine } from 'nodevisor'

/** An entropy device whose random numbers are the same each time. */
class Dice implements VirtioDevice {
  readonly name = 'dice'
  readonly deviceType = 4 // VIRTIO 1.2, 5.4: Entropy Device
  readonly queues = [{ handle: (chain: DescriptorChain) => this.roll(chain) }]
  #seed: number

  constructor(seed: number) {
    this.#seed = seed
  }

  roll(chain: DescriptorChain): number {
    const dice = new Uint8Array(Math.min(chain.writable.length, 4096))
    for (let i = 0; i < dice.length; i++) {
      this.#seed = (Math.imul(this.#seed, 1664525) + 1013904223) >>> 0
      dice[i] = 1 + ((this.#seed >>> 16) % 6)
    }
    return chain.write(dice)
  }
}

await using vm = await VirtualMachine.create({
  kernel: { image: 'build/guests/virtio.elf', cmdline: 'entropy' },
  virtio: [new Dice(6)],
})
const { reason } = await vm.run({ timeout: 5000 })
const [dice] = vm.virtioDevices
console.log(`${vm.serial.output}${reason}, ${dice?.statistics.requests} requests`)
