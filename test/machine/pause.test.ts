import { randomBytes } from 'node:crypto'
import { describe, expect, it, vi } from 'vitest'
import type { Device } from '../../src/index.js'
import { type Code, debugExit, HLT, program, SPIN } from '../helpers/code.js'
import { imageOf, times } from '../helpers/guests.js'
import { RUN_LIMIT } from '../helpers/limits.js'
import { boot, EXECUTIONS, errorWith, until } from './boot.js'
import { bootVirtio, entropyLines, linesOf, ONE_REQUEST, offerChain } from './virtio-guest.js'

const COUNTER = 0x5000
/** `inc word [COUNTER]; jmp`: counts for ever. */
const COUNT: Code = [0xff, 0x06, 0x00, 0x50, 0xeb, 0xfa]

describe.each(EXECUTIONS)('pause(), %s,', (execution) => {
  const start = (code: Code, options: object = {}) =>
    boot({ image: program(code) }, { execution, ...options })

  it('lets the machine stand still, and resume() lets it go on', async () => {
    const vm = await start(COUNT)
    const running = vm.run({ timeout: RUN_LIMIT })
    await until(() => vm.memory.readUint16(COUNTER) > 0)
    await vm.pause()
    expect([vm.running, vm.paused]).toEqual([true, true])
    const counted = vm.memory.readUint16(COUNTER)
    expect(vm.vcpus[0]!.registers.rip).toBeGreaterThanOrEqual(0x7c00n)
    await new Promise((resolve) => setTimeout(resolve, 5))
    expect(vm.memory.readUint16(COUNTER)).toBe(counted)
    vm.resume()
    expect(vm.paused).toBe(false)
    await until(() => vm.memory.readUint16(COUNTER) !== counted)
    vm.stop()
    expect(await running).toMatchObject({ reason: 'stopped', by: 'stop' })
  })

  it('lets registers be changed meanwhile', async () => {
    const vm = await start(SPIN)
    const running = vm.run({ timeout: RUN_LIMIT })
    await vm.pause()
    vm.memory.write(0x6000, program(debugExit(7), HLT))
    vm.vcpus[0]!.registers = { rip: 0x6000n }
    vm.resume()
    expect(await running).toMatchObject({ reason: 'debug-exit', code: 7 })
  })

  it('completes an access before it resolves', async () => {
    let reads = 0
    const counter: Device = { name: 'counter', ports: { base: 0x10, length: 1 }, read: () => ++reads & 0xff }
    // in al, 0x10; mov [COUNTER], al; jmp
    const vm = await start([0xe4, 0x10, 0xa2, 0x00, 0x50, 0xeb, 0xf9], { devices: [counter] })
    const running = vm.run({ timeout: RUN_LIMIT })
    for (let i = 0; i < 20; i++) {
      await until(() => reads > 10 * i)
      await vm.pause()
      // Either the last value is in its register, or in memory by now.
      const al = Number(vm.vcpus[0]!.registers.rax & 0xffn)
      expect(al).toBe(reads & 0xff)
      vm.resume()
    }
    vm.stop()
    await running
  })

  it('twice is as once', async () => {
    const vm = await start(SPIN)
    const running = vm.run({ timeout: RUN_LIMIT })
    await Promise.all([vm.pause(), vm.pause()])
    await vm.pause()
    expect(vm.paused).toBe(true)
    vm.resume()
    vm.resume()
    expect(vm.paused).toBe(false)
    vm.stop()
    await running
  })

  it('of a machine that does not run does nothing', async () => {
    const vm = await start([...debugExit(1), ...HLT])
    await vm.pause()
    expect([vm.running, vm.paused]).toEqual([false, false])
    vm.resume()
    expect(await vm.run({ timeout: RUN_LIMIT })).toMatchObject({ code: 1 })
  })

  it('resolves where the guest ends meanwhile', async () => {
    const vm = await start([...debugExit(1), ...HLT])
    const running = vm.run({ timeout: RUN_LIMIT })
    await vm.pause()
    vm.resume()
    expect(await running).toMatchObject({ code: 1 })
    expect([vm.running, vm.paused]).toEqual([false, false])
  })

  it.each(['stop', 'abort', 'timeout', 'close'] as const)('ends with %s', async (by) => {
    const vm = await start(SPIN)
    const aborting = new AbortController()
    const running = vm.run(by === 'timeout' ? { timeout: 30 } : { signal: aborting.signal })
    await vm.pause()
    if (by === 'stop') vm.stop()
    if (by === 'abort') aborting.abort()
    if (by === 'close') await vm.close()
    expect(await running).toMatchObject({ reason: 'stopped', by })
    expect(vm.paused).toBe(false)
  })

  it('keeps the machine from being run or stepped', async () => {
    const vm = await start(SPIN)
    const running = vm.run({ timeout: RUN_LIMIT })
    await vm.pause()
    await expect(vm.run()).rejects.toEqual(errorWith('ERR_RUNNING'))
    await expect(vm.step()).rejects.toEqual(errorWith('ERR_RUNNING'))
    vm.stop()
    await running
    await vm.close()
    await expect(vm.pause()).rejects.toEqual(errorWith('ERR_CLOSED'))
    expect(() => vm.resume()).toThrow(errorWith('ERR_CLOSED'))
  })

  it.each(['full', 'split'] as const)('keeps the interrupts of timers (irqchip %s)', async (irqchip) => {
    const kernel = { image: imageOf({ image: 'interrupts.elf' }), cmdline: 'pit 200 20' }
    const vm = await boot(kernel, { irqchip, execution })
    const running = vm.run({ timeout: RUN_LIMIT })
    for (let i = 0; i < times(20); i++) {
      await vm.pause()
      vm.resume()
      await new Promise((resolve) => setTimeout(resolve, 3))
    }
    expect(await running).toMatchObject({ reason: 'debug-exit', code: 16 })
    expect(vm.serial.output).toBe('pit 20 ticks\n')
  })
})

describe('pause() and devices', () => {
  it('waits until their requests are done', async () => {
    let isUnderWay = false
    const vm = await bootVirtio('irq entropy', {
      irqchip: 'split',
      virtio: [
        {
          name: 'slow',
          deviceType: 4,
          queues: [
            {
              handle: async (chain) => {
                isUnderWay = true
                await new Promise((resolve) => setTimeout(resolve, 20))
                chain.write(randomBytes(chain.writable.length))
                isUnderWay = false
                return chain.writable.length
              },
            },
          ],
        },
      ],
    })
    const lines = linesOf(vm)
    await until(() => isUnderWay)
    await vm.pause()
    expect(isUnderWay).toBe(false)
    vm.resume()
    expect(await lines).toEqual(entropyLines())
  })

  it('goes on where one never is', async () => {
    const vm = await boot(
      { image: ONE_REQUEST, mode: 'long' },
      {
        memory: '4M',
        virtio: [{ name: 'never', deviceType: 4, queues: [{ handle: () => new Promise<number>(() => {}) }] }],
      },
    )
    offerChain(vm, [{ address: 0x20_3000, length: 16, flags: 2 }])
    const running = vm.run({ timeout: RUN_LIMIT })
    await until(() => vm.virtioDevices[0]!.statistics.requests > 0)
    const { now } = performance
    let ahead = 0
    vi.spyOn(performance, 'now').mockImplementation(() => now.call(performance) + ahead)
    const paused = vm.pause()
    await new Promise((resolve) => setTimeout(resolve, 10))
    ahead = 20_000
    await expect(paused).rejects.toEqual(errorWith('ERR_TIMEOUT', /never/))
    vi.restoreAllMocks()
    expect([vm.running, vm.paused]).toEqual([true, false])
    vm.stop()
    await running
  })
})
