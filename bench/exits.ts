/** What one exit costs: a guest that does nothing but `out`. */

import { writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { type Device, type ExecutionMode, VirtualMachine } from '../dist/index.js'
import { GuestRam, Kvm } from '../dist/kvm/index.js'
import { COUNTED_PORT, countedOuts, ENTRY, OUTS_PER_TURN } from './guests.js'
import { type Context, interleave } from './lib.js'
import { DEBUG_EXIT_PORT } from './qemu.js'
import { compare, type Row } from './report.js'

export const title = 'one exit'

const WRITES = 32 * 300
const POSTED_WRITES = WRITES * 8

export async function run(context: Context): Promise<Row[]> {
  const path = join(context.directory, 'outs.bin')
  writeFileSync(path, countedOuts())
  const metal = new Metal(countedOuts())
  const inline = await Machine.create('inline')
  const threads = await Machine.create('threads')
  const postedInline = await Machine.create('inline', true)
  const postedThreads = await Machine.create('threads', true)
  const machines = [inline, threads, postedInline, postedThreads]
  try {
    const exit = await interleave(context.rounds(25), {
      c: () => context.baseline('out', path, WRITES / OUTS_PER_TURN),
      metal: () => metal.run(WRITES),
      inline: () => inline.run(WRITES),
      threads: () => threads.run(WRITES),
    })
    const posted = await interleave(context.rounds(15), {
      c: () => context.baseline('posted', path, POSTED_WRITES / OUTS_PER_TURN),
      inline: () => postedInline.run(POSTED_WRITES),
      threads: () => postedThreads.run(POSTED_WRITES),
    })
    const out = { unit: 'ns', peer: 'C, KVM_RUN loop', theirs: exit.c } as const
    const write = { unit: 'ns', peer: 'C, coalesced PIO', theirs: posted.c } as const
    return [
      compare({ ...out, what: 'one out, inline', ours: exit.inline, bound: { max: 1.1 } }),
      compare({ ...out, what: 'one out, threads', ours: exit.threads, bound: { max: 2 } }),
      compare({ ...out, what: 'one out, vcpu.run() of nodevisor/kvm', ours: exit.metal }),
      compare({ ...write, what: 'one posted write, inline', ours: posted.inline }),
      compare({ ...write, what: 'one posted write, threads', ours: posted.threads }),
    ]
  } finally {
    for (const machine of machines) await machine.close()
    metal.close()
  }
}

/** A device of the user's that looks at every byte. */
class Counter implements Device {
  readonly name = 'counter'
  readonly ports
  writes = 0
  last = 0

  constructor(posted: boolean) {
    this.ports = { base: COUNTED_PORT, length: 1, posted }
  }

  write(_offset: number, value: number): void {
    this.writes++
    this.last = value
  }
}

/** The guest in a VirtualMachine. */
class Machine {
  readonly #vm: VirtualMachine
  readonly #counter: Counter

  private constructor(vm: VirtualMachine, counter: Counter) {
    this.#vm = vm
    this.#counter = counter
  }

  static async create(execution: ExecutionMode, posted = false): Promise<Machine> {
    const counter = new Counter(posted)
    const kernel = { image: countedOuts(), format: 'flat', at: ENTRY } as const
    return new Machine(await VirtualMachine.create({ kernel, execution, devices: [counter] }), counter)
  }

  /** Nanoseconds a write. */
  async run(writes: number): Promise<number> {
    this.#counter.writes = 0
    this.#vm.vcpus[0]!.registers = { rip: BigInt(ENTRY), rcx: BigInt(writes / OUTS_PER_TURN) }
    const result = await this.#vm.run()
    if (result.reason !== 'debug-exit' || this.#counter.writes !== writes) {
      throw new Error(`Expected ${writes} writes but counted ${this.#counter.writes}: ${result.reason}`)
    }
    return (result.durationMs * 1e6) / writes
  }

  close(): Promise<void> {
    return this.#vm.close()
  }
}

/** The guest with `nodevisor/kvm`, and a loop of our own. */
class Metal {
  readonly #kvm = new Kvm()
  readonly #vm = this.#kvm.createVm()
  readonly #ram = new GuestRam({ size: 0x10000 })
  readonly #vcpu

  constructor(image: Uint8Array) {
    this.#vm.setUserMemoryRegion({ slot: 0, guestAddress: 0, size: this.#ram.size, ram: this.#ram })
    new Uint8Array(this.#ram.buffer()).set(image, ENTRY)
    this.#vcpu = this.#vm.createVcpu(0)
    const special = this.#vcpu.getSregs()
    this.#vcpu.setSregs({ ...special, cs: { ...special.cs, base: 0n, selector: 0 } })
  }

  /** Nanoseconds a write. */
  run(writes: number): number {
    const vcpu = this.#vcpu
    const counter = new Counter(false)
    vcpu.setRegs({ ...vcpu.getRegs(), rip: BigInt(ENTRY), rcx: BigInt(writes / OUTS_PER_TURN), rflags: 2n })
    const start = process.hrtime.bigint()
    for (;;) {
      const exit = vcpu.run()
      if (exit.kind === 'interrupted') continue
      if (exit.kind !== 'io') throw new Error(`Expected a write but KVM exited with ${exit.kind}`)
      if (exit.port === DEBUG_EXIT_PORT) break
      counter.write(0, vcpu.kvmRun.getUint8(exit.dataOffset))
    }
    const end = process.hrtime.bigint()
    if (counter.writes !== writes) throw new Error(`Expected ${writes} writes but counted ${counter.writes}`)
    return Number(end - start) / writes
  }

  close(): void {
    this.#vcpu.close()
    this.#vm.close()
    this.#ram.close()
    this.#kvm.close()
  }
}
