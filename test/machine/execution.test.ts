import { connect, createServer, type Socket } from 'node:net'
import { describe, expect, it, onTestFinished } from 'vitest'
import type { Device, ExecutionMode, VirtualMachine } from '../../src/index.js'
import {
  COUNT,
  debugExit,
  ECHO,
  flat,
  forever,
  HLT,
  inb,
  movAl,
  movAx,
  outb,
  print,
  program,
  repeat,
  SPIN,
  storeAl,
  UD2,
} from '../helpers/code.js'
import { boot, EXECUTIONS, errorWith, until, vcpuThreads } from './boot.js'

/** Waits until the byte at 0x600 is not 0, then ends with it: mov al, [0x600]; test al, al; jz; out 0xf4, al. */
const WAIT_THEN_EXIT = [0xa0, 0x00, 0x06, 0x84, 0xc0, 0x74, 0xf9, 0xe6, 0xf4]

describe('several machines at once', () => {
  it.each<ExecutionMode[]>([
    ['auto', 'auto'],
    ['inline', 'inline'],
    ['threads', 'threads'],
    ['inline', 'threads'],
    ['auto', 'inline', 'threads', 'auto'],
  ])('run side by side and each ends by itself: %s %s', async (...executions) => {
    const machines = await Promise.all(
      executions.map((execution) => boot(program(print('up'), WAIT_THEN_EXIT), { execution })),
    )
    const runs = machines.map((vm) => vm.run())
    // All of them get to their loop, though none ends.
    await Promise.all(machines.map((vm) => vm.serial.waitFor('up')))
    expect(machines.map(({ running }) => running)).toEqual(machines.map(() => true))
    for (const [i, vm] of machines.entries()) {
      vm.memory.writeUint8(0x600, i + 1)
      expect(await runs[i]).toMatchObject({ reason: 'debug-exit', code: i + 1 })
    }
  })

  it('talk to the host at the same time, in both ways of execution', async () => {
    const machines = await Promise.all(
      [...EXECUTIONS, ...EXECUTIONS].map((execution) => boot(program(ECHO), { execution })),
    )
    const runs = machines.map((vm) => vm.run())
    for (let round = 0; round < 5; round++) {
      for (const [i, vm] of machines.entries()) vm.serial.write(`${i} says ${round}\n`)
      for (const [i, vm] of machines.entries()) {
        expect((await vm.serial.waitFor('\n')).before).toBe(`${i} says ${round}`)
      }
    }
    for (const vm of machines) vm.serial.write(Buffer.of(0))
    for (const run of runs) expect(await run).toMatchObject({ reason: 'debug-exit' })
  })

  it('in auto take one native thread for each but the first', async () => {
    const machines = await Promise.all([1, 2, 3].map(() => boot(program(print('up'), SPIN))))
    const runs = machines.map((vm) => vm.run())
    await Promise.all(machines.map((vm) => vm.serial.waitFor('up')))
    expect(vcpuThreads()).toBe(2)
    for (const vm of machines) vm.stop()
    await Promise.all(runs)
    // The kernel takes a moment to take them off the list.
    await until(() => vcpuThreads() === 0)
  })

  it('in auto take the JavaScript thread again once it is free', async () => {
    for (let i = 0; i < 3; i++) {
      const vm = await boot(program(print('up'), SPIN))
      const run = vm.run()
      await vm.serial.waitFor('up')
      expect(vcpuThreads()).toBe(0)
      vm.stop()
      await run
    }
  })

  it('in auto with several vCPUs, and in threads, take a thread for each vCPU that runs', async () => {
    const image = program(print('up'), SPIN)
    const smp = await boot(image, { cpus: 3, irqchip: 'none' })
    smp.vcpus[1]!.start({ rip: 0x7c00n })
    const single = await boot(image, { execution: 'threads' })
    const runs = [smp.run(), single.run()]
    await until(() => smp.serial.output.length === 4 && single.serial.output === 'up')
    expect(vcpuThreads()).toBe(3)
    smp.stop()
    single.stop()
    await Promise.all(runs)
    await until(() => vcpuThreads() === 0)
  })

  it('end in any order, also when one is closed while others run', async () => {
    const machines = await Promise.all(
      [...EXECUTIONS, ...EXECUTIONS].map((execution) => boot(program(SPIN), { execution })),
    )
    const runs = machines.map((vm) => vm.run())
    for (const i of [2, 0, 3, 1]) {
      await machines[i]!.close()
      expect(await runs[i]).toMatchObject({ reason: 'stopped', by: 'close' })
      expect(machines.filter((vm) => vm.running)).not.toContain(machines[i])
    }
  })
})

describe.each(EXECUTIONS)('several vCPUs (%s)', (execution) => {
  it('share memory, and only the first runs until another is started', async () => {
    // vCPU 1, at 0x7c20: mov al, 42; mov [0x600], al; hlt
    const image = new Uint8Array(0x40)
    image.set(program(WAIT_THEN_EXIT))
    image.set(program(movAl(42), storeAl(0x600), HLT), 0x20)
    const vm = await boot(image, { execution, cpus: 2, irqchip: 'none' })
    expect(await vm.run({ timeout: 20 })).toMatchObject({ reason: 'stopped' })
    expect(vm.vcpus[1]!.state).toBe('parked')
    vm.vcpus[1]!.start({ rip: 0x7c20n })
    expect(vm.vcpus[1]!.state).toBe('runnable')
    expect(await vm.run()).toMatchObject({ reason: 'debug-exit', code: 42 })
  })

  it('can be started while the machine runs', async () => {
    const image = new Uint8Array(0x40)
    image.set(program(print('up'), WAIT_THEN_EXIT))
    image.set(program(movAl(42), storeAl(0x600), HLT), 0x20)
    const vm = await boot(image, { execution, cpus: 3, irqchip: 'none' })
    const run = vm.run()
    await vm.serial.waitFor('up')
    vm.vcpus[2]!.start({ rip: 0x7c20n, rsp: 0x7000n })
    expect(await run).toMatchObject({ reason: 'debug-exit', code: 42 })
    expect(vm.vcpus.map(({ state }) => state)).toEqual(['runnable', 'parked', expect.any(String)])
  })

  it('can be started by a device in the middle of an exit', async () => {
    const image = new Uint8Array(0x40)
    image.set(program(outb(0x10, 1), WAIT_THEN_EXIT))
    image.set(program(movAl(43), storeAl(0x600), HLT), 0x20)
    const starter: Device = {
      name: 'starter',
      ports: { base: 0x10, length: 1 },
      write: (_offset, index) => vm.vcpus[index]!.start({ rip: 0x7c20n }),
    }
    const vm: VirtualMachine = await boot(image, { execution, cpus: 2, irqchip: 'none', devices: [starter] })
    expect(await vm.run()).toMatchObject({ reason: 'debug-exit', code: 43 })
  })

  it('have registers of their own', async () => {
    const vm = await boot(program([0x40], HLT), { execution, cpus: 3, irqchip: 'none' })
    vm.vcpus[1]!.start({ rip: 0x7c00n, rax: 10n })
    vm.vcpus[2]!.start({ rip: 0x7c00n, rax: 20n })
    expect(await vm.run()).toMatchObject({ reason: 'halt', exits: { hlt: 3 } })
    expect(vm.vcpus.map(({ registers }) => registers.rax)).toEqual([1n, 11n, 21n])
    expect(vm.vcpus.map(({ state }) => state)).toEqual(['halted', 'halted', 'halted'])
  })

  it('start in the mode that the kernel started in', async () => {
    const image = program(flat.movEax(0x1234_5678), HLT)
    const vm = await boot({ image, mode: 'long' }, { execution, cpus: 2, irqchip: 'none' })
    vm.vcpus[1]!.start({ rip: 0x10_0000n })
    expect(await vm.run()).toMatchObject({ reason: 'halt' })
    expect(vm.vcpus[1]!.registers.rax).toBe(0x1234_5678n)
    expect(vm.vcpus[1]!.specialRegisters.cs.l).toBe(1)
  })

  it('end the run with halt only when the last one has halted', async () => {
    const image = new Uint8Array(0x40)
    image.set(program(HLT))
    image.set(program(repeat(500, outb(0x10, 5)), HLT), 0x20)
    const vm = await boot(image, { execution, cpus: 2, irqchip: 'none' })
    vm.vcpus[1]!.start({ rip: 0x7c20n })
    expect(await vm.run()).toMatchObject({ reason: 'halt', exits: { io: 500, hlt: 2 } })
  })

  it('go on together behind their hlt with the next run', async () => {
    const vm = await boot(program(HLT, [0x40], HLT), { execution, cpus: 2, irqchip: 'none' })
    vm.vcpus[1]!.start({ rip: 0x7c00n })
    await vm.run()
    await vm.run()
    expect(vm.vcpus.map(({ registers }) => registers.rax)).toEqual([1n, 1n])
  })

  it('can be started again after hlt, somewhere else', async () => {
    const image = new Uint8Array(0x40)
    image.set(program(HLT))
    image.set(program(debugExit(5)), 0x20)
    const vm = await boot(image, { execution, cpus: 2, irqchip: 'none' })
    vm.vcpus[1]!.start({ rip: 0x7c00n })
    await vm.run()
    vm.vcpus[1]!.start({ rip: 0x7c20n })
    expect(await vm.run()).toMatchObject({ reason: 'debug-exit', code: 5 })
  })

  it('are all taken out of the guest when one ends the run', async () => {
    const image = new Uint8Array(0x40)
    image.set(program(SPIN))
    image.set(program(print('x'), debugExit(6)), 0x20)
    const vm = await boot(image, { execution, cpus: 4, irqchip: 'none' })
    vm.vcpus[1]!.start({ rip: 0x7c00n })
    vm.vcpus[2]!.start({ rip: 0x7c00n })
    vm.vcpus[3]!.start({ rip: 0x7c20n })
    expect(await vm.run()).toMatchObject({ reason: 'debug-exit', code: 6 })
    expect(vm.vcpus[1]!.registers.rip).toBe(0x7c00n)
    expect(vm.running).toBe(false)
  })

  it('end the machine when one fails, which the result names', async () => {
    const image = new Uint8Array(0x40)
    image.set(program(SPIN))
    const vm = await boot({ image, mode: 'long' }, { execution, cpus: 3, irqchip: 'none' })
    vm.memory.write(0x10_0020, program(flat.movEbx(0xd000_0000), flat.JMP_EBX))
    vm.vcpus[2]!.start({ rip: 0x10_0020n })
    expect(await vm.run()).toMatchObject({
      reason: 'failed',
      vcpu: 2,
      error: { code: 'ERR_GUEST_EMULATION' },
    })
    await expect(vm.run()).rejects.toEqual(errorWith('ERR_ENDED'))
  })

  it('end the machine when one makes a triple fault, which the result names', async () => {
    const vm = await boot(
      { image: program(SPIN, UD2), mode: 'long' },
      { execution, cpus: 2, irqchip: 'none' },
    )
    vm.vcpus[1]!.start({ rip: 0x10_0002n })
    expect(await vm.run()).toMatchObject({ reason: 'shutdown', vcpu: 1 })
  })

  it('cannot be started twice, and refuse registers that are none', async () => {
    const vm = await boot(program(HLT), { execution, cpus: 2, irqchip: 'none' })
    expect(() => vm.vcpus[0]!.start()).toThrow(errorWith('ERR_RUNNING', 'vCPU 0 is runnable'))
    expect(() => vm.vcpus[1]!.start({ rip: 5 as unknown as bigint })).toThrow(
      errorWith('ERR_INVALID_ARGUMENT', 'write 5n'),
    )
    expect(() => vm.vcpus[1]!.start({ ripp: 5n } as object)).toThrow(errorWith('ERR_UNKNOWN_OPTION'))
    expect(vm.vcpus[1]!.state).toBe('parked')
    vm.vcpus[1]!.start({ rip: 0x7c00n })
    expect(() => vm.vcpus[1]!.start()).toThrow(errorWith('ERR_RUNNING', 'vCPU 1 is runnable'))
  })

  it('each see their posted writes arrive in order', async () => {
    // vCPU 0 counts from 0 to 127 again and again, vCPU 1 from 128 to 255.
    const image = new Uint8Array(0x40)
    image.set(program(movAl(0x00), repeat(2000, [0xe6, 0xe9, 0xfe, 0xc0, 0x24, 0x7f]), HLT))
    image.set(program(movAl(0x80), repeat(2000, [0xe6, 0xe9, 0xfe, 0xc0, 0x0c, 0x80]), HLT), 0x20)
    const vm = await boot(image, { execution, cpus: 2, irqchip: 'none' })
    vm.vcpus[1]!.start({ rip: 0x7c20n })
    const chunks: Buffer[] = []
    vm.debugConsole.on('data', (chunk: Buffer) => chunks.push(chunk))
    expect(await vm.run()).toMatchObject({ reason: 'halt' })
    await vm.close()
    await new Promise((resolve) => vm.debugConsole.once('end', resolve))
    const bytes = [...Buffer.concat(chunks)]
    const counted = Array.from({ length: 2000 }, (_, i) => i & 0x7f)
    expect(bytes.filter((byte) => byte < 0x80)).toEqual(counted)
    expect(bytes.filter((byte) => byte >= 0x80)).toEqual(counted.map((value) => value | 0x80))
  })
})

describe('while a guest runs inline, the event loop turns', () => {
  /** What a guest may do without end. */
  const ENDLESS: [string, number[], Device[]][] = [
    ['spins', [...SPIN], []],
    ['writes to a device', [...forever(outb(0x80, 5))], []],
    ['reads a device', [...forever(inb(0x80))], []],
    ['makes posted writes', [...forever(outb(0xe9, 5))], []],
    ['prints', [...forever(print('x'))], []],
  ]

  async function echoServer(): Promise<Socket> {
    const server = createServer((socket) => socket.pipe(socket))
    await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve))
    const { port } = server.address() as { port: number }
    const socket = connect(port, '127.0.0.1')
    await new Promise((resolve) => socket.once('connect', resolve))
    onTestFinished(() => {
      socket.destroy()
      server.close()
    })
    return socket
  }

  async function roundTrips(socket: Socket, count: number): Promise<string[]> {
    const answers: string[] = []
    for (let i = 0; i < count; i++) {
      const answer = new Promise<Buffer>((resolve) => socket.once('data', resolve))
      socket.write(`ping ${i}`)
      answers.push((await answer).toString())
    }
    return answers
  }

  async function timers(count: number): Promise<number> {
    let fired = 0
    while (fired < count) {
      await new Promise((resolve) => setTimeout(resolve, 2))
      fired++
    }
    return fired
  }

  it.each(ENDLESS)(
    'though it %s: timers, sockets, immediates and promises all get their turn',
    async (_what, code) => {
      const vm = await boot(program(code), { execution: 'inline' })
      const socket = await echoServer()
      const run = vm.run()
      const immediates = (async () => {
        for (let i = 0; i < 20; i++) await new Promise((resolve) => setImmediate(resolve))
        return 20
      })()
      const results = await Promise.all([roundTrips(socket, 20), timers(20), immediates])
      expect(results).toEqual([Array.from({ length: 20 }, (_, i) => `ping ${i}`), 20, 20])
      expect(vm.running).toBe(true)
      vm.stop()
      expect(await run).toMatchObject({ reason: 'stopped', by: 'stop' })
    },
  )

  it('and several guests share the thread', async () => {
    const machines = await Promise.all(
      Array.from({ length: 3 }, () => boot(program(COUNT), { execution: 'inline' })),
    )
    const runs = machines.map((vm) => vm.run())
    for (const vm of machines) {
      const before = vm.memory.readUint8(0x500)
      await until(() => vm.memory.readUint8(0x500) !== before)
    }
    expect(await timers(5)).toBe(5)
    for (const vm of machines) vm.stop()
    await Promise.all(runs)
  })

  it('and a loop that is always busy lets the guest run', async () => {
    const vm = await boot(program(repeat(5, outb(0x80, 1)), debugExit(1)), { execution: 'inline' })
    let busy = true
    const spin = () => {
      if (busy) setImmediate(spin)
    }
    spin()
    const run = vm.run()
    expect(await run).toMatchObject({ reason: 'debug-exit', code: 1 })
    busy = false
  })

  it('and a guest in a thread ends the slice of one that spins inline', async () => {
    const spinning = await boot(program(SPIN), { execution: 'inline' })
    const spin = spinning.run()
    const vm = await boot(program(repeat(50, inb(0x80)), movAx(7), [0xe6, 0xf4]), { execution: 'threads' })
    expect(await vm.run()).toMatchObject({ reason: 'debug-exit', code: 7 })
    expect(spinning.running).toBe(true)
    spinning.stop()
    await spin
  })

  it('and what a device starts in an exit is done: a timer, a promise, a tick', async () => {
    const done: string[] = []
    const device: Device = {
      name: 'starter',
      ports: { base: 0x10, length: 1 },
      write() {
        setTimeout(() => done.push('timer'), 1)
        setImmediate(() => done.push('immediate'))
        process.nextTick(() => done.push('tick'))
        void Promise.resolve().then(() => done.push('promise'))
      },
    }
    const vm = await boot(program(outb(0x10, 1), SPIN), { execution: 'inline', devices: [device] })
    const run = vm.run()
    await until(() => done.length === 4)
    expect(done.toSorted()).toEqual(['immediate', 'promise', 'tick', 'timer'])
    vm.stop()
    await run
  })
})
