import { describe, expect, it } from 'vitest'
import type { Device, StepOptions, StepResult, VirtualMachine } from '../../src/index.js'
import {
  debugExit,
  flat,
  HLT,
  inb,
  long,
  movAl,
  movAx,
  movCx,
  movDi,
  movDx,
  movSi,
  outb,
  print,
  program,
  repeat,
  SPIN,
  UD2,
} from '../helpers/code.js'
import { boot, EXECUTIONS, errorWith } from './boot.js'

/** Answers its port with 0x21, 0x22, … */
function counter(): Device {
  let value = 0x20
  return { name: 'counter', ports: { base: 0x10, length: 1 }, read: () => ++value }
}

/** An exit as one line: `out 80 [5]`. */
function describeStep({ exit, result }: StepResult): string {
  const end = result === undefined ? '' : ` -> ${result.reason}`
  if (exit === undefined) return `nothing${end}`
  if (exit.kind === 'io') return `${exit.direction} ${exit.port.toString(16)} [${exit.data}]${end}`
  if (exit.kind === 'mmio') return `${exit.direction} ${exit.address.toString(16)} [${exit.data}]${end}`
  return `${exit.kind}${end}`
}

/** Steps until one ends the run. */
async function stepToEnd(vm: VirtualMachine): Promise<StepResult[]> {
  const steps: StepResult[] = []
  do steps.push(await vm.step())
  while (steps.at(-1)!.result === undefined)
  return steps
}

describe.each(EXECUTIONS)('step (%s)', (execution) => {
  it('goes from exit to exit, each with its data', async () => {
    const image = program(
      movAl(1),
      outb(0x80, 5),
      inb(0x10),
      [0x40], // inc ax
      inb(0x10),
      [0xe7, 0x80], // out 0x80, ax
      HLT,
    )
    const vm = await boot(image, { execution, devices: [counter()] })
    const steps = await stepToEnd(vm)
    expect(steps.map(describeStep)).toEqual([
      'out 80 [5]',
      'in 10 [33]',
      'in 10 [34]',
      'out 80 [34,0]',
      'halt -> halt',
    ])
    expect(steps.every(({ vcpu }) => vcpu === 0)).toBe(true)
    expect(vm.postCodes[0]).toBe(5)
  })

  it('has handled the exit: registers and memory are what the next instruction finds', async () => {
    const vm = await boot(program(inb(0x10), outb(0x80, 9), HLT), { execution, devices: [counter()] })
    await vm.step()
    expect(vm.vcpus[0]!.registers).toMatchObject({ rip: 0x7c02n, rax: 0x21n })
    await vm.step()
    expect(vm.vcpus[0]!.registers.rip).toBe(0x7c06n)
    expect(vm.postCodes).toEqual([9])
  })

  it('lets registers be changed between two exits', async () => {
    const vm = await boot(program(inb(0x10), [0xe6, 0xf4]), { execution, devices: [counter()] })
    await vm.step()
    vm.vcpus[0]!.registers.rax = 99n
    expect(await vm.step()).toMatchObject({ result: { reason: 'debug-exit', code: 99 } })
  })

  it('gives an exit that stays as it is when the machine goes on', async () => {
    const vm = await boot(program(outb(0x80, 1), outb(0x80, 2), HLT), { execution })
    const first = await vm.step()
    await vm.step()
    expect(describeStep(first)).toBe('out 80 [1]')
    await vm.close()
    expect(describeStep(first)).toBe('out 80 [1]')
  })

  it('shows accesses to memory, in the pieces in which KVM makes them', async () => {
    const image = program(
      flat.movEbx(0xd000_0ffc),
      long.movRax(0x0807_0605_0403_0201n),
      long.STORE_RAX,
      long.LOAD_RAX,
      HLT,
    )
    const vm = await boot({ image, mode: 'long' }, { execution })
    expect((await stepToEnd(vm)).map(describeStep)).toEqual([
      'write d0000ffc [1,2,3,4]',
      'write d0001000 [5,6,7,8]',
      'read d0000ffc [255,255,255,255]',
      'read d0001000 [255,255,255,255]',
      'halt -> halt',
    ])
    expect(vm.vcpus[0]!.registers.rax).toBe(2n ** 64n - 1n)
  })

  it('and then run goes on from there', async () => {
    const vm = await boot(program(outb(0x80, 1), inb(0x10), [0xe6, 0x80], debugExit(3)), {
      execution,
      devices: [counter()],
    })
    await vm.step()
    await vm.step()
    const result = await vm.run()
    expect(result).toMatchObject({ reason: 'debug-exit', code: 3, exits: { io: 2 } })
    expect(vm.postCodes).toEqual([1, 0x21])
  })

  it('goes on after a run that was stopped in the middle', async () => {
    const vm = await boot(program(SPIN, outb(0x80, 1), HLT), { execution })
    await vm.run({ timeout: 5 })
    vm.vcpus[0]!.registers.rip = 0x7c02n
    expect(describeStep(await vm.step())).toBe('out 80 [1]')
  })

  it('in the middle of an instruction that makes several accesses is finished by run', async () => {
    const written: number[] = []
    const device: Device = {
      name: 'taker',
      ports: { base: 0x10, length: 1 },
      write: (_offset, value) => written.push(value),
    }
    const image = program(movDx(0x10), movCx(4), movSi(0x7c00 + 12), [0xf3, 0x6e], HLT, [1, 2, 3, 4])
    const vm = await boot(image, { execution, devices: [device] })
    await vm.step()
    expect(await vm.run()).toMatchObject({ reason: 'halt' })
    expect(written).toEqual([1, 2, 3, 4])
  })

  it('tells how the run ended when it did', async () => {
    const shutdown = await boot({ image: program(UD2), mode: 'long' }, { execution })
    expect(describeStep(await shutdown.step())).toBe('shutdown -> shutdown')
    await expect(shutdown.step()).rejects.toEqual(errorWith('ERR_ENDED'))

    const reset = await boot(program(outb(0x64, 0xfe)), { execution })
    expect(describeStep(await reset.step())).toBe('out 64 [254] -> reset')

    const failing = await boot(program(outb(0x10, 1)), {
      execution,
      devices: [
        {
          name: 'faulty',
          ports: { base: 0x10, length: 1 },
          write() {
            throw new Error('no')
          },
        },
      ],
    })
    const step = await failing.step()
    expect(describeStep(step)).toBe('out 10 [1] -> failed')
    expect(step.result).toMatchObject({ error: { code: 'ERR_DEVICE_FAILED' } })
  })

  it('goes on behind hlt, and over it again', async () => {
    const vm = await boot(program(HLT, HLT, outb(0x80, 1), HLT), { execution })
    expect(describeStep(await vm.step())).toBe('halt -> halt')
    expect(describeStep(await vm.step())).toBe('halt -> halt')
    expect(describeStep(await vm.step())).toBe('out 80 [1]')
  })

  it('without an exit in time ends with neither, stopped', async () => {
    const vm = await boot(program(SPIN), { execution })
    const { exit, result } = await vm.step({ timeout: 5 })
    expect(exit).toBeUndefined()
    expect(result).toMatchObject({ reason: 'stopped', by: 'timeout' })
    expect(await vm.step({ signal: AbortSignal.abort() })).toMatchObject({
      exit: undefined,
      result: { reason: 'stopped', by: 'abort' },
    })
  })

  it('can be stopped by close', async () => {
    const vm = await boot(program(SPIN), { execution })
    const step = vm.step()
    await vm.close()
    expect(await step).toMatchObject({ exit: undefined, result: { reason: 'stopped', by: 'close' } })
  })

  it.each([
    [{ vcpu: 1 }, 'ERR_INVALID_ARGUMENT', 'an index from 0 to 0 for vcpu'],
    [{ vcpu: -1 }, 'ERR_INVALID_ARGUMENT', 'for vcpu'],
    [{ vcpu: '0x' }, 'ERR_INVALID_ARGUMENT', 'for vcpu'],
    [{ vcup: 0 }, 'ERR_UNKNOWN_OPTION', "did you mean 'vcpu'"],
    [{ timeout: -1 }, 'ERR_INVALID_ARGUMENT', 'for timeout'],
  ] as const)('refuses %j', async (options, code, message) => {
    const vm = await boot(program(HLT), { execution })
    const error = errorWith(code, message)
    await expect(vm.step(options as unknown as StepOptions)).rejects.toEqual(error)
    await expect(vm.stepInstruction(options as unknown as StepOptions)).rejects.toEqual(error)
    expect(await vm.run()).toMatchObject({ reason: 'halt' })
  })

  it('takes the vCPU it is told to, and no other moves', async () => {
    const image = program(outb(0x80, 1), HLT, [0, 0, 0], outb(0x80, 2), HLT)
    const vm = await boot(image, { execution, cpus: 2, irqchip: 'none' })
    await expect(vm.step({ vcpu: 1 })).rejects.toEqual(errorWith('ERR_INVALID_ARGUMENT', 'that was started'))
    vm.vcpus[1]!.start({ rip: 0x7c08n })
    expect(describeStep(await vm.step({ vcpu: 1 }))).toBe('out 80 [2]')
    expect(vm.vcpus[0]!.registers.rip).toBe(0x7c00n)
    // The other one can still run, so this is not the end.
    expect(describeStep(await vm.step({ vcpu: 1 }))).toBe('halt')
    expect(describeStep(await vm.step())).toBe('out 80 [1]')
    expect(describeStep(await vm.step())).toBe('halt -> halt')
  })
})

describe.each(EXECUTIONS)('posted writes (%s)', (execution) => {
  it('reach the console in order, thousands of them, mostly without an exit', async () => {
    // next: out 0xe9, al; inc al; without end up to cx
    const vm = await boot(program(movAl(0), repeat(5000, [0xe6, 0xe9, 0xfe, 0xc0]), HLT), { execution })
    const received: Buffer[] = []
    vm.debugConsole.on('data', (chunk: Buffer) => received.push(chunk))
    const { exits } = await vm.run()
    await vm.close()
    await new Promise((resolve) => vm.debugConsole.once('end', resolve))
    const bytes = Buffer.concat(received)
    expect(bytes.equals(Buffer.from(Array.from({ length: 5000 }, (_, i) => i & 0xff)))).toBe(true)
    expect(exits.posted + exits.io).toBe(5000)
    expect(exits.posted).toBeGreaterThan(4000)
  })

  it('keep their place among other accesses', async () => {
    const written: number[] = []
    const device: Device = {
      name: 'orders',
      ports: [
        { base: 0x10, length: 1, posted: true },
        { base: 0x11, length: 1 },
      ],
      write: (_offset, value, _size, region) => written.push(region * 1000 + value),
      read: () => written.push(-1) & 0,
    }
    // Five posted writes, one that is not, a read; 300 times.
    const image = program(
      repeat(300, [
        ...outb(0x10, 1),
        ...outb(0x10, 2),
        ...outb(0x10, 3),
        ...outb(0x11, 4),
        ...outb(0x10, 5),
        ...inb(0x11),
      ]),
      outb(0x10, 6),
      HLT,
    )
    const vm = await boot(image, { execution, devices: [device] })
    const { exits } = await vm.run()
    expect(written).toEqual([...Array.from({ length: 300 }, () => [1, 2, 3, 1004, 5, -1]).flat(), 6])
    expect(exits.posted).toBeGreaterThan(0)
    expect(exits.posted + exits.io).toBe(300 * 6 + 1)
  })

  it('are there to the last when the machine ends', async () => {
    const vm = await boot(program(repeat(1000, outb(0xe9, 0x41)), outb(0xe9, 0x42), debugExit(1)), {
      execution,
    })
    await vm.run()
    expect(vm.debugConsole.output).toBe(`${'A'.repeat(1000)}B`)
  })

  it('of the serial port keep the order with its other registers', async () => {
    // 'a', scratch register, 'b', 300 times: scratch is not posted.
    const body = [
      ...movDx(0x3f8),
      ...movAl(0x61),
      0xee,
      ...movDx(0x3ff),
      0xee,
      ...movDx(0x3f8),
      ...movAl(0x62),
      0xee,
    ]
    const vm = await boot(program(repeat(300, body), HLT), { execution })
    const { exits } = await vm.run()
    expect(vm.serial.output).toBe('ab'.repeat(300))
    expect(exits.posted).toBeGreaterThan(0)
  })

  it('are exits again when stepping, and posted again in the next run', async () => {
    const image = program(
      repeat(200, outb(0xe9, 0x41)),
      HLT,
      outb(0xe9, 0x42),
      outb(0xe9, 0x43),
      repeat(100, outb(0xe9, 0x44)),
      HLT,
    )
    const vm = await boot(image, { execution })
    const first = await vm.run()
    expect(first.exits.posted).toBeGreaterThan(100)
    expect(describeStep(await vm.step())).toBe('out e9 [66]')
    expect(describeStep(await vm.step())).toBe('out e9 [67]')
    expect(describeStep(await vm.step())).toBe('out e9 [68]')
    const last = await vm.run()
    expect(last.exits).toMatchObject({ io: 0, posted: 99 })
    expect(vm.debugConsole.output).toBe(`${'A'.repeat(200)}BC${'D'.repeat(100)}`)
  })

  it('are not collected for a guest that makes few', async () => {
    const vm = await boot(program(print('hello'), HLT), { execution })
    expect((await vm.run()).exits).toMatchObject({ io: 5, posted: 0 })
  })

  it('that make a device throw are noticed though the guest does not exit', async () => {
    let count = 0
    const device: Device = {
      name: 'faulty',
      ports: { base: 0x10, length: 1, posted: true },
      write() {
        if (++count === 80) throw new Error('no')
      },
    }
    const vm = await boot(program(repeat(100, outb(0x10, 1)), SPIN), { execution, devices: [device] })
    expect(await vm.run()).toMatchObject({ reason: 'failed', error: { code: 'ERR_DEVICE_FAILED' } })
  })
})

describe.each(EXECUTIONS)('stepInstruction (%s)', (execution) => {
  const registersOf = (vm: VirtualMachine) => {
    const { rip, rax, rcx } = vm.vcpus[0]!.registers
    return [Number(rip) - 0x7c00, Number(rax), Number(rcx)]
  }

  it('executes one instruction after the other', async () => {
    const image = program(movAx(5), [0x40], movCx(2), [0x01, 0xc8], [0xe2, 0xfc], HLT)
    const vm = await boot(image, { execution })
    const seen: unknown[] = []
    for (let i = 0; i < 8; i++) {
      const step = await vm.stepInstruction()
      seen.push([describeStep(step), ...registersOf(vm)])
    }
    expect(seen).toEqual([
      ['debug', 3, 5, 0], // mov ax, 5
      ['debug', 4, 6, 0], // inc ax
      ['debug', 7, 6, 2], // mov cx, 2
      ['debug', 9, 8, 2], // add ax, cx
      ['debug', 7, 8, 1], // loop, taken
      ['debug', 9, 9, 1], // add ax, cx
      ['debug', 11, 9, 0], // loop, not taken
      ['halt -> halt', 12, 9, 0],
    ])
  })

  it('executes port accesses, with their exits, and stops behind each', async () => {
    const image = program(outb(0x80, 7), inb(0x10), [0x40], inb(0x10), debugExit(1))
    const vm = await boot(image, { execution, devices: [counter()] })
    const seen: unknown[] = []
    for (let i = 0; i < 7; i++) {
      const step = await vm.stepInstruction()
      seen.push([describeStep(step), ...registersOf(vm).slice(0, 2)])
    }
    expect(seen).toEqual([
      ['debug', 2, 7],
      ['out 80 [7]', 4, 7],
      ['in 10 [33]', 6, 0x21],
      ['debug', 7, 0x22],
      ['in 10 [34]', 9, 0x22],
      ['debug', 11, 1],
      ['out f4 [1] -> debug-exit', 13, 1],
    ])
  })

  it('goes on behind hlt', async () => {
    const vm = await boot(program(HLT, [0x40], HLT), { execution })
    expect(describeStep(await vm.stepInstruction())).toBe('halt -> halt')
    expect(vm.vcpus[0]!.state).toBe('halted')
    expect(describeStep(await vm.stepInstruction())).toBe('debug')
    expect(registersOf(vm)).toEqual([2, 1, 0])
    expect(describeStep(await vm.stepInstruction())).toBe('halt -> halt')
  })

  it('shows each access of a rep outsb, and gets behind it', async () => {
    const image = program(movDx(0x80), movCx(3), movSi(0x7c00 + 12), [0xf3, 0x6e], HLT, [1, 2, 3])
    const vm = await boot(image, { execution })
    const seen: string[] = []
    do seen.push(describeStep(await vm.stepInstruction()))
    while (!seen.at(-1)!.startsWith('halt') && seen.length < 20)
    expect(seen.filter((step) => step.startsWith('out'))).toEqual(['out 80 [1]', 'out 80 [2]', 'out 80 [3]'])
    expect(vm.postCodes).toEqual([1, 2, 3])
    expect(registersOf(vm)).toEqual([12, 0, 0])
  })

  it('fills memory from a port with rep insb', async () => {
    const image = program(movDx(0x10), movCx(3), movDi(0x600), [0xf3, 0x6c], HLT)
    const vm = await boot(image, { execution, devices: [counter()] })
    let steps = 0
    while ((await vm.stepInstruction()).result === undefined && steps < 20) steps++
    expect([...vm.memory.read(0x600, 4)]).toEqual([0x21, 0x22, 0x23, 0])
  })

  it('and step and run can take turns', async () => {
    const image = program(movAx(1), outb(0x80, 2), [0x40], [0x40], outb(0x80, 3), HLT, debugExit(4))
    const vm = await boot(image, { execution })
    expect(describeStep(await vm.stepInstruction())).toBe('debug')
    expect(describeStep(await vm.step())).toBe('out 80 [2]')
    expect(describeStep(await vm.stepInstruction())).toBe('debug')
    expect(registersOf(vm).slice(0, 2)).toEqual([8, 3])
    expect(await vm.run()).toMatchObject({ reason: 'halt', exits: { io: 1, debug: 0 } })
    expect(await vm.run()).toMatchObject({ reason: 'debug-exit', code: 4 })
  })

  it('works in protected and long mode', async () => {
    for (const mode of ['protected', 'long'] as const) {
      const vm = await boot({ image: program(flat.movEax(7), HLT), mode }, { execution })
      expect(describeStep(await vm.stepInstruction())).toBe('debug')
      expect(vm.vcpus[0]!.registers).toMatchObject({ rip: 0x10_0005n, rax: 7n })
      expect(describeStep(await vm.stepInstruction())).toBe('halt -> halt')
    }
  })

  it('ends with a triple fault that the instruction made', async () => {
    const vm = await boot({ image: program(UD2), mode: 'long' }, { execution })
    expect((await vm.stepInstruction()).result).toMatchObject({ reason: 'shutdown' })
  })

  it('leaves no single-stepping behind when it was stopped or refused', async () => {
    const vm = await boot(program(movAl(1), movAl(2), HLT), { execution })
    await vm.stepInstruction({ signal: AbortSignal.abort() })
    await expect(vm.stepInstruction({ timeout: -1 })).rejects.toEqual(errorWith('ERR_INVALID_ARGUMENT'))
    expect(await vm.run()).toMatchObject({ reason: 'halt', exits: { debug: 0 } })
  })
})
