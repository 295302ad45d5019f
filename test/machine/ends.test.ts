import { getEventListeners } from 'node:events'
import { describe, expect, it } from 'vitest'
import type { RunOptions, VirtualMachineOptions } from '../../src/index.js'
import {
  debugExit,
  flat,
  HLT,
  inb,
  movAl,
  movAx,
  movDx,
  movEax,
  OUT_DX_AX,
  outb,
  outPort,
  print,
  program,
  SPIN,
  UD2,
} from '../helpers/code.js'
import { onEmulated, onPvm } from '../helpers/guests.js'
import { RUN_LIMIT } from '../helpers/limits.js'
import { boot, EXECUTIONS, errorWith, until } from './boot.js'

/** Ways to end for good: the machine, and what its run gives. */
const FINAL: [string, VirtualMachineOptions['kernel'], object][] = [
  ['a triple fault', { image: program(UD2), mode: 'long' }, { reason: 'shutdown', vcpu: 0 }],
  ['0xfe to port 0x64', program(outb(0x64, 0xfe), SPIN), { reason: 'reset', by: 'keyboard controller' }],
  ['6 to port 0xcf9', program(outPort(0xcf9, 6), SPIN), { reason: 'reset', by: 'reset control' }],
  ['0x2000 to port 0x604', program(movDx(0x604), movAx(0x2000), OUT_DX_AX, SPIN), { reason: 'power-off' }],
  [
    'a jump to where no memory is',
    { image: program(flat.movEbx(0xd000_0000), flat.JMP_EBX), mode: 'protected' },
    { reason: 'failed', vcpu: 0, error: { code: 'ERR_GUEST_EMULATION' } },
  ],
]

describe.each(EXECUTIONS)('a run (%s)', (execution) => {
  it('ends with debug-exit and the value that the guest wrote, of any size', async () => {
    const vm = await boot(program(debugExit(0xab), movEax(0x1234_5678), [0xe7, 0xf4], [0x66, 0xe7, 0xf4]), {
      execution,
    })
    expect(await vm.run()).toMatchObject({ reason: 'debug-exit', code: 0xab })
    expect(await vm.run()).toMatchObject({ reason: 'debug-exit', code: 0x5678 })
    expect(await vm.run()).toMatchObject({ reason: 'debug-exit', code: 0x1234_5678 })
  })

  it('ends with halt, and goes on behind the hlt with the next run', async () => {
    const vm = await boot(program(HLT, movAl(1), HLT, debugExit(2)), { execution })
    expect(await vm.run()).toMatchObject({ reason: 'halt', exits: { hlt: 1 } })
    expect(vm.vcpus[0]!.state).toBe('halted')
    expect(vm.vcpus[0]!.registers.rip).toBe(0x7c01n)
    expect(await vm.run()).toMatchObject({ reason: 'halt', exits: { hlt: 1 } })
    expect(vm.vcpus[0]!.registers.rax).toBe(1n)
    expect(await vm.run()).toMatchObject({ reason: 'debug-exit', code: 2, exits: { io: 1, hlt: 0 } })
  })

  it.each(FINAL)('ends for good with %s', async (_how, kernel, expected) => {
    const vm = await boot(kernel, { execution })
    expect(await vm.run()).toMatchObject(expected)
    expect(vm.running).toBe(false)
    const error = errorWith('ERR_ENDED', 'create another')
    await expect(vm.run()).rejects.toEqual(error)
    await expect(vm.run()).rejects.toMatchObject({ outcome: expected })
    await expect(vm.step()).rejects.toEqual(error)
    await expect(vm.stepInstruction()).rejects.toEqual(error)
    // What is left of it can be looked at.
    expect(vm.vcpus[0]!.registers.rip).toBeTypeOf('bigint')
    expect(vm.memory.readUint8(0)).toBe(0)
  })

  it('25: gives the registers of a triple fault', async () => {
    const vm = await boot({ image: program(flat.movEax(42), UD2), mode: 'long' }, { execution })
    expect(await vm.run()).toMatchObject({ reason: 'shutdown', registers: { rax: expect.any(BigInt) } })
  })

  it('25: fails with the instruction bytes and registers where KVM cannot emulate', async () => {
    const vm = await boot(
      { image: program(flat.movEbx(0xd000_0000), flat.JMP_EBX), mode: 'long' },
      { execution },
    )
    const result = await vm.run()
    expect(result).toMatchObject({
      reason: 'failed',
      vcpu: 0,
      error: {
        code: 'ERR_GUEST_EMULATION',
        suberror: 1,
        registers: { rip: 0xd000_0000n },
        message: expect.stringContaining('rip 0xd0000000'),
      },
    })
  })

  it("25: executes an instruction that PVM's emulator lacks", async () => {
    // fldz
    const vm = await boot(program([0xd9, 0xee], HLT), { execution })
    expect(await vm.run()).toMatchObject({ reason: 'halt', exits: { finished: onPvm ? 1 : 0 } })
  })

  it.runIf(onPvm)('25: names the instruction that cannot be executed on PVM', async () => {
    // vaddps ymm0, ymm0, ymm0
    const vm = await boot({ image: program([0xc5, 0xfc, 0x58, 0xc0], HLT), mode: 'long' }, { execution })
    expect(await vm.run()).toMatchObject({
      reason: 'failed',
      error: {
        code: 'ERR_GUEST_EMULATION',
        mode: 'long',
        message: expect.stringMatching(/c5 fc 58 c0 f4.* rip 0x100000, long mode/),
      },
    })
  })

  it('25: ends where a guest halts with interrupts off', async () => {
    const vm = await boot(program([0xfa], HLT), { execution })
    expect(await vm.run()).toMatchObject({ reason: 'halt' })
  })

  it('25: fails with ERR_GUEST_EXIT for an exit that nobody asked for', async () => {
    const vm = await boot(program(SPIN), { execution })
    // Single-stepping behind the machine's back.
    vm.vcpus[0]!.unsafeVcpu.setGuestDebug({ control: 3 })
    expect(await vm.run()).toMatchObject({
      reason: 'failed',
      error: { code: 'ERR_GUEST_EXIT', exit: { kind: 'debug', pc: 0x7c00n } },
    })
  })

  it('25: is stopped by its timeout when the guest loops without end, and can go on', async () => {
    const vm = await boot(program(SPIN), { execution })
    for (const timeout of [0, 1, 20]) {
      expect(await vm.run({ timeout })).toMatchObject({ reason: 'stopped', by: 'timeout' })
    }
    expect(vm.vcpus[0]!.registers.rip).toBe(0x7c00n)
    vm.vcpus[0]!.registers.rip = 0x7c02n
    vm.memory.write(0x7c02, program(debugExit(1)))
    expect(await vm.run({ timeout: RUN_LIMIT })).toMatchObject({ reason: 'debug-exit', code: 1 })
  })

  it('is stopped by its timeout when the guest exits without end', async () => {
    // next: out 0x80, al; jmp next
    const vm = await boot(program([0xe6, 0x80, 0xeb, 0xfc]), { execution })
    const result = await vm.run({ timeout: onEmulated ? 5000 : 50 })
    expect(result).toMatchObject({ reason: 'stopped', by: 'timeout' })
    expect(result.exits.io).toBeGreaterThan(0)
    expect(vm.postCodes).toHaveLength(64)
  })

  it('is stopped at once by a signal that was aborted before, without an instruction executed', async () => {
    const vm = await boot(program(movAl(1), debugExit(1)), { execution })
    const cause = new Error('changed my mind')
    const result = await vm.run({ signal: AbortSignal.abort(cause) })
    expect(result).toMatchObject({ reason: 'stopped', by: 'abort', cause })
    expect(vm.vcpus[0]!.registers).toMatchObject({ rip: 0x7c00n, rax: 0n })
    expect(result.exits).toMatchObject({ io: 0, hlt: 0 })
  })

  it('is stopped by a signal that is aborted during it', async () => {
    const vm = await boot(program(SPIN), { execution })
    const controller = new AbortController()
    const run = vm.run({ signal: controller.signal })
    setTimeout(() => controller.abort('enough'), 5)
    expect(await run).toMatchObject({ reason: 'stopped', by: 'abort', cause: 'enough' })
  })

  it('is stopped by an AbortSignal.timeout as by a timeout', async () => {
    const vm = await boot(program(SPIN), { execution })
    expect(await vm.run({ signal: AbortSignal.timeout(5) })).toMatchObject({
      reason: 'stopped',
      by: 'timeout',
      cause: { name: 'TimeoutError' },
    })
  })

  it('leaves no listener on the signal and no timer behind', async () => {
    const vm = await boot(program(HLT, HLT, SPIN), { execution })
    const { signal } = new AbortController()
    await vm.run({ signal, timeout: 2 ** 31 - 1 })
    await vm.step({ signal, timeout: 2 ** 31 - 1 })
    expect(getEventListeners(signal, 'abort')).toHaveLength(0)
    await vm.run({ signal, timeout: 5 })
    expect(getEventListeners(signal, 'abort')).toHaveLength(0)
    expect(process.getActiveResourcesInfo().filter((name) => name === 'Timeout').length).toBeLessThan(3)
  })

  it('is not ended by a signal that is aborted after it', async () => {
    const vm = await boot(program(HLT, HLT), { execution })
    const controller = new AbortController()
    await vm.run({ signal: controller.signal })
    controller.abort()
    expect(await vm.run()).toMatchObject({ reason: 'halt' })
  })

  it('is ended by stop(), which does nothing without a run', async () => {
    const vm = await boot(program(SPIN), { execution })
    vm.stop()
    for (let i = 0; i < 3; i++) {
      const run = vm.run()
      expect(vm.running).toBe(true)
      setTimeout(() => vm.stop(), i)
      expect(await run).toMatchObject({ reason: 'stopped', by: 'stop' })
      expect(vm.running).toBe(false)
      vm.stop()
    }
  })

  it('is ended by stop() in the same turn, before the guest was entered', async () => {
    const vm = await boot(program(SPIN), { execution })
    const run = vm.run()
    vm.stop()
    expect(await run).toMatchObject({ reason: 'stopped', by: 'stop' })
  })

  it('is ended by close(), which waits for it', async () => {
    const vm = await boot(program(SPIN), { execution })
    const run = vm.run()
    let closed = false
    const close = vm.close().then(() => {
      closed = true
    })
    expect(await run).toMatchObject({ reason: 'stopped', by: 'close' })
    await close
    expect(closed).toBe(true)
    await expect(vm.run()).rejects.toEqual(errorWith('ERR_CLOSED'))
  })

  it('keeps the first of two reasons to end', async () => {
    const vm = await boot(program(SPIN), { execution })
    const run = vm.run({ timeout: 50 })
    vm.stop()
    void vm.close()
    expect(await run).toMatchObject({ reason: 'stopped', by: 'stop' })
  })

  it('counts its exits by kind and tells how long it took', async () => {
    const image = program(
      flat.movDx(0x3f8),
      movAl(0x61),
      [0xee, 0xee], // out dx, al, twice
      inb(0x80),
      flat.movEbx(0xd000_0000),
      flat.LOAD_AL,
      HLT,
    )
    const vm = await boot({ image, mode: 'protected' }, { execution })
    const result = await vm.run()
    expect(result.exits).toEqual({
      io: 3,
      mmio: 1,
      hlt: 1,
      shutdown: 0,
      debug: 0,
      interrupted: expect.any(Number),
      other: 0,
      finished: 0,
      posted: 0,
    })
    expect(result.durationMs).toBeGreaterThan(0)
    expect(result.firstOutputMs).toBeGreaterThan(0)
    expect(result.firstOutputMs).toBeLessThanOrEqual(result.durationMs)
  })

  it('has firstOutputMs only if the first output came in it', async () => {
    const vm = await boot(program(HLT, print('a'), HLT, print('b'), HLT), { execution })
    expect(await vm.run()).not.toHaveProperty('firstOutputMs')
    expect(await vm.run()).toHaveProperty('firstOutputMs')
    expect(await vm.run()).not.toHaveProperty('firstOutputMs')
    expect(vm.serial.output).toBe('ab')
  })

  it('34: rejects a second run, and a step, with ERR_RUNNING, and goes on itself', async () => {
    const vm = await boot(program(SPIN), { execution })
    const run = vm.run()
    const error = errorWith('ERR_RUNNING')
    await expect(vm.run()).rejects.toEqual(error)
    await expect(vm.step()).rejects.toEqual(error)
    await expect(vm.stepInstruction()).rejects.toEqual(error)
    expect(vm.running).toBe(true)
    vm.stop()
    expect(await run).toMatchObject({ reason: 'stopped', by: 'stop' })
  })
})

describe('the options of a run', () => {
  it.each([
    [null, 'ERR_INVALID_ARGUMENT', 'run options'],
    [5, 'ERR_INVALID_ARGUMENT', 'run options'],
    [{ timeout: -1 }, 'ERR_INVALID_ARGUMENT', 'for timeout but received -1'],
    [{ timeout: Number.NaN }, 'ERR_INVALID_ARGUMENT', 'for timeout'],
    [{ timeout: Number.POSITIVE_INFINITY }, 'ERR_INVALID_ARGUMENT', 'for timeout'],
    [{ timeout: 2 ** 31 }, 'ERR_INVALID_ARGUMENT', 'for timeout'],
    [{ timeout: '5s' }, 'ERR_INVALID_ARGUMENT', "for timeout but received '5s'"],
    [{ signal: {} }, 'ERR_INVALID_ARGUMENT', 'an AbortSignal for signal'],
    [{ signal: new AbortController() }, 'ERR_INVALID_ARGUMENT', 'an object of AbortController'],
    [{ timeuot: 5 }, 'ERR_UNKNOWN_OPTION', "did you mean 'timeout'"],
    [{ vcpu: 0 }, 'ERR_UNKNOWN_OPTION', "received 'vcpu'"],
  ] as const)('%# are refused, and the machine can still run', async (options, code, message) => {
    const vm = await boot(program(HLT))
    await expect(vm.run(options as RunOptions)).rejects.toEqual(errorWith(code, message))
    expect(vm.running).toBe(false)
    expect(await vm.run()).toMatchObject({ reason: 'halt' })
  })
})

describe('closing', () => {
  it('34: may be done twice, at once or later, and by `await using`', async () => {
    const vm = await boot(program(HLT))
    await Promise.all([vm.close(), vm.close()])
    await vm.close()
    await vm[Symbol.asyncDispose]()
  })

  it('34: makes every later call ERR_CLOSED, and never a crash', async () => {
    const vm = await boot(program(print('x'), HLT))
    await vm.run()
    await vm.close()
    const error = errorWith('ERR_CLOSED')
    await expect(vm.run()).rejects.toEqual(error)
    await expect(vm.step()).rejects.toEqual(error)
    await expect(vm.stepInstruction()).rejects.toEqual(error)
    expect(() => vm.memory.readUint8(0)).toThrow(error)
    expect(() => vm.screen.text()).toThrow(error)
    vm.stop()
    vm.serial.write('into the void')
    // What was there before can still be read.
    expect(vm.serial.output).toBe('x')
    expect(vm.running).toBe(false)
    expect(vm.statistics.unclaimedPorts.reads).toBe(0)
    expect(vm.postCodes).toEqual([])
    await expect(vm.serial.waitFor('y')).rejects.toEqual(errorWith('ERR_SERIAL_ENDED'))
  })

  it('33: empties the views of guest memory', async () => {
    const vm = await boot(program(HLT))
    const view = vm.memory.view(0, 0x1000)
    const far = vm.memory.view(0x20_0000, 0x1000)
    const wide = vm.memory.view(0x8_0000, 0x20_0000)
    const copy = vm.memory.read(0x7c00, 1)
    await vm.close()
    expect([view.length, far.length, wide.length]).toEqual([0, 0, 0])
    expect(view[0]).toBeUndefined()
    view[0] = 1
    expect([...copy]).toEqual([0xf4])
  })

  it('ends the serial stream behind what it still has to give', async () => {
    const vm = await boot(program(print('bye'), HLT))
    await vm.run()
    await vm.close()
    const chunks: Buffer[] = []
    for await (const chunk of vm.serial) chunks.push(chunk as Buffer)
    expect(Buffer.concat(chunks).toString()).toBe('bye')
  })

  it('works for a machine that never ran, and for one that failed', async () => {
    await (await boot(program(HLT))).close()
    const vm = await boot(program(outb(0x10, 0)), {
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
    await vm.run()
    await vm.close()
  })

  it('does not wait for anything but the run', async () => {
    const vm = await boot(program(SPIN))
    const run = vm.run()
    const wait = vm.serial.waitFor('never')
    let turns = 0
    await until(() => ++turns > 2)
    await vm.close()
    expect(await run).toMatchObject({ by: 'close' })
    await expect(wait).rejects.toEqual(errorWith('ERR_SERIAL_ENDED'))
  })
})
