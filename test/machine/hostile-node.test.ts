import { readdirSync } from 'node:fs'
import { describe, expect, it } from 'vitest'
import { type Device, type RunResult, VirtualMachine } from '../../src/index.js'
import { debugExit, ECHO, HLT, inb, movAl, outb, print, program, repeat, SPIN } from '../helpers/code.js'
import { onEmulated, times } from '../helpers/guests.js'
import { boot, EXECUTIONS, errorWith, until, vcpuThreads } from './boot.js'
import { ended, runProgram, startProgram, startWorker } from './programs.js'

/** Takes threads out of KVM_RUN, where the program uses no real-time signals itself. */
const SIGRTMAX = 64

/** A device that does something when port 0x10 is written to, or read. */
function callback(action: () => unknown): Device {
  return {
    name: 'callback',
    ports: { base: 0x10, length: 1 },
    read() {
      action()
      return 5
    },
    write() {
      action()
    },
  }
}

describe.each(EXECUTIONS)('34: calls from inside a device (%s)', (execution) => {
  it('to close() end the run and then the machine', async () => {
    const closing: Promise<void>[] = []
    const vm: VirtualMachine = await boot(program(outb(0x10, 1), debugExit(1)), {
      execution,
      devices: [callback(() => closing.push(vm.close(), vm.close()))],
    })
    expect(await vm.run()).toMatchObject({ reason: 'stopped', by: 'close', exits: { io: 1 } })
    await Promise.all(closing)
    expect(() => vm.memory.readUint8(0)).toThrow(errorWith('ERR_CLOSED'))
    await expect(vm.run()).rejects.toEqual(errorWith('ERR_CLOSED'))
  })

  it('to close() in every kind of step too', async () => {
    for (const step of ['step', 'stepInstruction'] as const) {
      const vm: VirtualMachine = await boot(program(inb(0x10), HLT), {
        execution,
        devices: [callback(() => void vm.close())],
      })
      expect(await vm[step]()).toMatchObject({
        exit: { kind: 'io' },
        result: { reason: 'stopped', by: 'close' },
      })
    }
  })

  it('to stop() end the run when the access is done, and the machine goes on behind it', async () => {
    const vm: VirtualMachine = await boot(program(inb(0x10), [0xe6, 0xf4]), {
      execution,
      devices: [callback(() => vm.stop())],
    })
    expect(await vm.run()).toMatchObject({ reason: 'stopped', by: 'stop' })
    expect(vm.vcpus[0]!.registers).toMatchObject({ rip: 0x7c02n, rax: 5n })
    expect(await vm.run()).toMatchObject({ reason: 'debug-exit', code: 5 })
  })

  it('to run(), step() and registers are refused with ERR_RUNNING, and the run goes on', async () => {
    const refused: unknown[] = []
    const vm: VirtualMachine = await boot(program(outb(0x10, 1), debugExit(1)), {
      execution,
      devices: [
        callback(() => {
          for (const call of [() => vm.run(), () => vm.step(), () => vm.stepInstruction()]) {
            refused.push(call().catch((error: unknown) => error))
          }
          try {
            void vm.vcpus[0]!.registers.rip
          } catch (error) {
            refused.push(error)
          }
        }),
      ],
    })
    expect(await vm.run()).toMatchObject({ reason: 'debug-exit', code: 1 })
    expect(await Promise.all(refused)).toEqual(Array(4).fill(errorWith('ERR_RUNNING')))
  })

  it.each(EXECUTIONS)('to create and run another machine (%s) work', async (inner) => {
    const results: Promise<RunResult>[] = []
    const device = callback(() => {
      results.push(
        boot(program(repeat(10, inb(0x10)), debugExit(2)), { execution: inner }).then((vm) => vm.run()),
      )
    })
    const vm = await boot(program(outb(0x10, 1), outb(0x10, 1), debugExit(1)), {
      execution,
      devices: [device],
    })
    expect(await vm.run()).toMatchObject({ reason: 'debug-exit', code: 1 })
    for (const result of results) expect(await result).toMatchObject({ reason: 'debug-exit', code: 2 })
    expect(results).toHaveLength(2)
  })

  it.each(EXECUTIONS)('to run and stop a machine (%s) that was there before work', async (inner) => {
    const other = await boot(program(SPIN), { execution: inner })
    let run: Promise<RunResult> | undefined
    const device = callback(() => {
      if (run === undefined) run = other.run()
      else other.stop()
    })
    const vm = await boot(program(outb(0x10, 1), repeat(10, inb(0x20)), outb(0x10, 2), debugExit(1)), {
      execution,
      devices: [device],
    })
    expect(await vm.run()).toMatchObject({ reason: 'debug-exit' })
    expect(await run).toMatchObject({ reason: 'stopped', by: 'stop' })
  })

  it('to close another machine that runs work', async () => {
    const others = await Promise.all(EXECUTIONS.map((way) => boot(program(SPIN), { execution: way })))
    const runs = others.map((other) => other.run())
    const vm = await boot(program(outb(0x10, 1), debugExit(1)), {
      execution,
      devices: [
        callback(() => {
          for (const other of others) void other.close()
        }),
      ],
    })
    expect(await vm.run()).toMatchObject({ reason: 'debug-exit' })
    for (const run of runs) expect(await run).toMatchObject({ reason: 'stopped', by: 'close' })
  })

  it('35: to abort the signal end the run when the access is done, by abort', async () => {
    const controller = new AbortController()
    const vm = await boot(program(inb(0x10), debugExit(1)), {
      execution,
      devices: [callback(() => controller.abort('from inside'))],
    })
    const { signal } = controller
    expect(await vm.run({ signal })).toMatchObject({ reason: 'stopped', by: 'abort', cause: 'from inside' })
    expect(vm.vcpus[0]!.registers).toMatchObject({ rip: 0x7c02n, rax: 5n })
  })

  it('35: that throw after close() still close', async () => {
    const vm: VirtualMachine = await boot(program(outb(0x10, 1), debugExit(1)), {
      execution,
      devices: [
        callback(() => {
          void vm.close()
          throw new Error('and this')
        }),
      ],
    })
    expect(await vm.run()).toMatchObject({ reason: 'stopped', by: 'close' })
    await vm.close()
  })

  it('35: to close() from a posted write lose nothing that came before', async () => {
    const written: number[] = []
    const device: Device = {
      name: 'posted',
      ports: { base: 0x10, length: 1, posted: true },
      write(_offset, value) {
        written.push(value)
        if (written.length === 150) void vm.close()
      },
    }
    const vm: VirtualMachine = await boot(program(movAl(0), repeat(2000, [0xe6, 0x10, 0xfe, 0xc0])), {
      execution,
      devices: [device],
    })
    expect(await vm.run()).toMatchObject({ reason: 'stopped', by: 'close' })
    await vm.close()
    expect(written.slice(0, 150)).toEqual(Array.from({ length: 150 }, (_, i) => i & 0xff))
    expect(written).toEqual(Array.from({ length: written.length }, (_, i) => i & 0xff))
  })
})

describe.each(EXECUTIONS)('34: calls from inside a listener (%s)', (execution) => {
  it('for serial data may close the machine', async () => {
    const vm = await boot(program(print('x'), SPIN), { execution })
    const closed = new Promise<void>((resolve) => vm.serial.once('data', () => resolve(vm.close())))
    expect(await vm.run()).toMatchObject({ reason: 'stopped', by: 'close' })
    await closed
  })

  it('for serial data may answer, stop and run again', async () => {
    const vm = await boot(program(ECHO), { execution })
    const refused: unknown[] = []
    vm.serial.once('data', () => {
      void vm.run().catch((error: unknown) => refused.push(error))
      vm.stop()
    })
    vm.serial.write('a')
    expect(await vm.run()).toMatchObject({ reason: 'stopped', by: 'stop' })
    expect(refused).toEqual([errorWith('ERR_RUNNING')])
    vm.serial.write(Buffer.of(0))
    expect(await vm.run()).toMatchObject({ reason: 'debug-exit', code: 0 })
  })

  it('for abort may close the machine', async () => {
    const vm = await boot(program(SPIN), { execution })
    const controller = new AbortController()
    controller.signal.addEventListener('abort', () => void vm.close())
    const run = vm.run({ signal: controller.signal })
    setTimeout(() => controller.abort(), 1)
    expect(await run).toMatchObject({ reason: 'stopped' })
    await vm.close()
  })

  it('at the end of a run may run again at once, many times', async () => {
    const vm = await boot(program([0x40, 0xf4, 0xeb, 0xfc]), { execution })
    for (let i = 1; i <= 50; i++) {
      expect(await vm.run()).toMatchObject({ reason: 'halt' })
      expect(vm.vcpus[0]!.registers.rax).toBe(BigInt(i))
    }
  })

  it('may start and stop without a turn of the loop in between', async () => {
    const vm = await boot(program(SPIN), { execution })
    for (let i = 0; i < 50; i++) {
      const run = vm.run()
      vm.stop()
      expect(await run).toMatchObject({ reason: 'stopped' })
    }
  })
})

describe.each(EXECUTIONS)('33: the end of a worker in the middle of run() (%s)', (execution) => {
  const GUESTS: [string, Uint8Array, object][] = [
    ['spins', program(print('!'), SPIN), {}],
    ['exits without end', program(print('!'), [0xe4, 0x10, 0xeb, 0xfc]), {}],
    ['makes posted writes without end', program(print('!'), [0xe6, 0xe9, 0xeb, 0xfc]), {}],
    ['has several vCPUs', program(print('!'), SPIN), { cpus: 3 }],
  ]

  it.each(GUESTS)('whose guest %s leaves the process as it was', async (_what, code, options) => {
    const fds = () => readdirSync('/proc/self/fd').length
    const cycle = async (delay: number) => {
      const worker = startWorker({ code, machines: 2, options: { execution, ...options } })
      await new Promise((resolve, reject) => {
        worker.once('message', resolve)
        worker.once('error', reject)
      })
      await new Promise((resolve) => setTimeout(resolve, delay))
      expect(await worker.terminate()).toBe(1)
    }
    await cycle(0)
    await until(() => vcpuThreads() === 0)
    const before = fds()
    for (let i = 0; i < times(10); i++) await cycle(i % 3)
    await until(() => vcpuThreads() === 0)
    expect(fds()).toBeLessThanOrEqual(before)
  })

  it('that was just started, whatever it was doing, leaves the process as it was', async () => {
    for (let i = 0; i < times(10); i++) {
      const worker = startWorker({ code: program(SPIN), machines: 2, options: { execution } })
      await new Promise((resolve) => worker.once('online', resolve))
      await new Promise((resolve) => setTimeout(resolve, 4 * i))
      await worker.terminate()
    }
    await until(() => vcpuThreads() === 0)
  })

  it('does not disturb a machine of the main thread', async () => {
    const vm = await boot(program(ECHO), { execution })
    const run = vm.run()
    for (let i = 0; i < 3; i++) {
      const worker = startWorker({ code: program(print('!'), SPIN), options: { execution } })
      await new Promise((resolve) => worker.once('message', resolve))
      await worker.terminate()
      vm.serial.write(`${i}\n`)
      expect((await vm.serial.waitFor('\n')).before).toBe(`${i}`)
    }
    vm.serial.write(Buffer.of(0))
    expect(await run).toMatchObject({ reason: 'debug-exit' })
  })
})

describe('the package', () => {
  it.each(EXECUTIONS)(
    '33: works in two workers and the main thread at the same time (%s)',
    async (execution) => {
      const code = program(print('!'), repeat(500, inb(0x10)), debugExit(3))
      const workers = [1, 2].map(() =>
        startWorker({ code, machines: 2, options: { execution }, close: true }),
      )
      const ends = workers.map(async (worker) => {
        const messages: unknown[] = []
        worker.on('message', (message) => messages.push(message))
        const exitCode = await new Promise((resolve, reject) => {
          worker.once('exit', resolve)
          worker.once('error', reject)
        })
        return { exitCode, last: messages.at(-1) }
      })
      const vm = await boot(code, { execution })
      expect(await vm.run()).toMatchObject({ reason: 'debug-exit', code: 3 })
      const result = { reason: 'debug-exit', code: 3, serial: '!' }
      for (const end of ends) expect(await end).toEqual({ exitCode: 0, last: [result, result] })
    },
  )

  it.each(EXECUTIONS)(
    'keeps the process alive while a machine runs, and no longer (%s)',
    async (execution) => {
      expect(await runProgram('ends-by-itself', [execution])).toEqual({
        code: 0,
        signal: null,
        stdout: 'debug-exit 5, idle: true\n',
        stderr: '',
      })
    },
  )

  it.each(
    EXECUTIONS.flatMap((execution) =>
      ['timer', 'immediate', 'device', 'listener', 'exitHandler'].map((how) => [how, execution] as const),
    ),
  )('33: lets the process exit in the middle of run(), from a %s (%s)', async (how, execution) => {
    expect(await runProgram('exit-while-running', [execution, how])).toEqual({
      code: 7,
      signal: null,
      stdout: '',
      stderr: '',
    })
  })

  it.each(EXECUTIONS)(
    '33: lets an uncaught exception end the process in the middle of run() (%s)',
    async (execution) => {
      const { code, signal, stderr } = await runProgram('exit-while-running', [execution, 'exception'])
      expect({ code, signal }).toEqual({ code: 1, signal: null })
      expect(stderr).toContain('Error: uncaught')
    },
  )

  it.each(EXECUTIONS)(
    '33: survives garbage collections while guests run that nobody holds (%s)',
    async (execution) => {
      const rounds = times(20)
      const { stdout, ...end } = await runProgram(
        'collect-garbage',
        [execution, `${rounds}`],
        ['--expose-gc'],
      )
      expect(end).toEqual({ code: 0, signal: null, stderr: '' })
      const { vcpus, rams, ...rest } = JSON.parse(stdout)
      expect(rest).toEqual({
        results: [5, 5, 5],
        views: [
          [0xb9, rounds, 0x00],
          [0xb9, rounds, 0x00],
        ],
      })
      // Of the machines, none of which was closed, two are held, by views of their memory.
      expect(rams).toBe(2)
      expect(vcpus).toBeLessThanOrEqual(2)
    },
  )

  it.each(EXECUTIONS)(
    'gives everything back: fds, threads and mappings after many machines (%s)',
    async (execution) => {
      const count = times(200)
      const { stdout, ...end } = await runProgram('cycles', [execution, `${count}`], ['--expose-gc'])
      expect(end).toEqual({ code: 0, signal: null, stderr: '' })
      const { before, after } = JSON.parse(stdout)
      expect(after.kvmFds).toBe(before.kvmFds)
      expect(after.fds).toBeLessThanOrEqual(before.fds + 1)
      expect(after.threads).toBeLessThanOrEqual(before.threads + 1)
      // The heap of V8 has mappings too.
      expect(after.mappings).toBeLessThan(before.mappings + count / 2)
    },
  )

  it.each(EXECUTIONS)('30: runs on through a storm of signals (%s)', async (execution) => {
    const child = startProgram('signals', [execution])
    const end = ended(child)
    await new Promise((resolve) => child.stdout!.once('data', resolve))
    // Its own handler's, and the real-time signals that take threads out of KVM_RUN, at any moment.
    for (let i = 0; i < times(1000); i++) {
      process.kill(child.pid!, 'SIGUSR2')
      process.kill(child.pid!, SIGRTMAX)
      if (i % 10 === 0) await new Promise((resolve) => setTimeout(resolve, 1))
    }
    child.stdin!.write('quit\n')
    const { stdout, ...rest } = await end
    expect(rest).toEqual({ code: 0, signal: null, stderr: '' })
    expect(JSON.parse(stdout.split('\n')[1]!)).toEqual({
      reasons: ['stopped', 'stopped'],
      wrong: [0, 0],
      // The storm may be over before a slow host has got to a first byte.
      progress: onEmulated ? expect.any(Boolean) : true,
      received: true,
    })
  })
})

describe.each(EXECUTIONS)('30: signals to the own process (%s)', (execution) => {
  it('end no run and lose no exit', async () => {
    const listener = () => {}
    process.on('SIGUSR2', listener)
    try {
      const written: number[] = []
      const device: Device = {
        name: 'writer',
        ports: { base: 0x10, length: 1 },
        write(_offset, value) {
          written.push(value)
          process.kill(process.pid, 'SIGUSR2')
        },
      }
      const vm = await boot(program(movAl(0), repeat(500, [0xe6, 0x10, 0xfe, 0xc0]), debugExit(1)), {
        execution,
        devices: [device],
      })
      expect(await vm.run()).toMatchObject({ reason: 'debug-exit', exits: { io: 501 } })
      expect(written).toEqual(Array.from({ length: 500 }, (_, i) => i & 0xff))
    } finally {
      process.off('SIGUSR2', listener)
    }
  })
})

it('34: machines may be created at the same time and closed before they are used', async () => {
  const machines = await Promise.all(
    Array.from({ length: 20 }, () => VirtualMachine.create({ kernel: program(HLT), memory: '1M' })),
  )
  const runs = machines.slice(0, 10).map((vm) => vm.run())
  await Promise.all(machines.map((vm) => vm.close()))
  for (const run of runs) expect((await run).reason).toMatch(/halt|stopped/)
})
