import { describe, expect, it } from 'vitest'
import {
  type DescriptorChain,
  VirtualMachine as Machine,
  type VirtioDevice,
  type VirtualMachine,
  type VirtualMachineOptions,
} from '../../src/index.js'
import { findTables, parseAml, resources } from '../firmware/tables.js'
import { type Code, debugExit, dword, flat, HLT, inb, print, program, repeat, SPIN } from '../helpers/code.js'
import { imageOf, times } from '../helpers/guests.js'
import { RUN_LIMIT } from '../helpers/limits.js'
import { boot, EXECUTIONS, errorWith, until } from './boot.js'
import {
  blockLines,
  bootVirtio,
  consoleLines,
  DEVICE_STRIDE,
  entropyLines,
  FIRST_DEVICE,
  foreverLong,
  linesOf,
  MACHINES,
  offerChain,
  QueueNotify,
  RINGS,
  Status,
  SUCCESS,
  startQueue,
  VIRTQ_DESC_F_WRITE,
  virtioGuest,
  writeRegister,
} from './virtio-guest.js'

const MIB = 2 ** 20

// VIRTIO 1.2, 6: Reserved Feature Bits
const VIRTIO_F_INDIRECT_DESC = 1n << 28n
const VIRTIO_F_EVENT_IDX = 1n << 29n
const VIRTIO_F_VERSION_1 = 1n << 32n
/** ACKNOWLEDGE, DRIVER, FEATURES_OK, DRIVER_OK. */
const READY = 15

/** Options as a JavaScript program may pass them. */
const create = (options: object) =>
  Machine.create({ kernel: program(HLT), memory: '4M', ...options } as VirtualMachineOptions)

/** An entropy device whose queue is served by `handle`. */
function entropyBy(handle: (chain: DescriptorChain) => number | Promise<number>): VirtioDevice {
  return { name: 'mine', deviceType: 4, queues: [{ handle }] }
}

let filled = 0
/** Fills a request with bytes other than those of the last one. */
function fill(chain: DescriptorChain): number {
  filled = (filled % 255) + 1
  return chain.write(new Uint8Array(Math.min(chain.writable.length, 4096)).fill(filled))
}

describe.each(MACHINES)('with irqchip %s, %s,', (irqchip, execution, wait) => {
  it.each([
    ['', 1],
    ['no-indirect', 2],
    ['no-event-idx', 4],
    ['no-indirect no-event-idx', 2],
  ])('a guest drives all devices at once (%s, %d queues)', async (features, queues) => {
    const vm = await bootVirtio(`${wait} ports=2 ${features}`, {
      irqchip,
      execution,
      disks: [{ memory: '64K' }, { memory: '1M', serial: 'second', queues }],
      console: { ports: ['org.example.log'] },
      rng: true,
    })
    const indirect = !features.includes('no-indirect')
    expect(await linesOf(vm)).toEqual([
      ...entropyLines(indirect),
      ...blockLines(0, { sectors: 128, indirect }),
      ...blockLines(1, { sectors: 2048, serial: 'second', queues, indirect }),
      ...consoleLines(['org.example.log']),
    ])
    expect(vm.console.output).toBe('hello from port 0\n')
    expect(vm.consolePort('org.example.log').output).toBe('hello from port 1\n')

    const devices = vm.virtioDevices
    expect(devices.map(({ name, deviceType, address }) => [name, deviceType, address])).toEqual([
      ['disk0', 2, FIRST_DEVICE],
      ['disk1', 2, FIRST_DEVICE + DEVICE_STRIDE],
      ['console', 3, FIRST_DEVICE + 2 * DEVICE_STRIDE],
      ['rng', 4, FIRST_DEVICE + 3 * DEVICE_STRIDE],
    ])
    expect(new Set(devices.map(({ irq }) => irq)).size).toBe(4)
    for (const { status, features: accepted, problem } of devices) {
      expect({ status, problem }).toEqual({ status: READY, problem: undefined })
      expect((accepted & VIRTIO_F_VERSION_1) !== 0n).toBe(true)
      expect((accepted & VIRTIO_F_INDIRECT_DESC) !== 0n).toBe(indirect)
      expect((accepted & VIRTIO_F_EVENT_IDX) !== 0n).toBe(!features.includes('no-event-idx'))
    }
    for (const { errors, lastError } of devices.slice(0, 2)) {
      expect({ errors, lastError }).toEqual({ errors: 0, lastError: undefined })
    }
    const { statistics } = devices[3]!
    expect(statistics.requests).toBe(indirect ? 4 : 3)
    expect(statistics.notifications).toBeGreaterThan(0)
    expect(statistics.notifications).toBeLessThanOrEqual(statistics.requests)
    expect(statistics.interrupts).toBeLessThanOrEqual(statistics.requests)
    if (wait !== '') expect(statistics.interrupts).toBeGreaterThan(0)
  })

  it('drivers reset their devices and start them anew', async () => {
    const vm = await bootVirtio(`${wait} ports=1 entropy block reset block entropy reset console`, {
      irqchip,
      execution,
      disks: [{ memory: '64K' }],
      console: true,
      rng: true,
    })
    expect(await linesOf(vm)).toEqual([
      ...entropyLines(),
      ...blockLines(0, { sectors: 128 }),
      ...blockLines(0, { sectors: 128 }),
      ...entropyLines(),
      ...consoleLines([]),
    ])
    // Those of before a reset count, too.
    expect(vm.virtioDevices[2]!.statistics.requests).toBe(8)
  })

  it('a guest whose run was stopped again and again does all of its work', async () => {
    const vm = await bootVirtio(`${wait} bench-doorbell=300 block`, {
      irqchip,
      execution,
      disks: [{ memory: '64K' }],
      rng: true,
    })
    for (;;) {
      const wanted = vm.virtioDevices[1]!.statistics.requests + 30
      const run = vm.run({ timeout: RUN_LIMIT })
      void until(() => !vm.running || vm.virtioDevices[1]!.statistics.requests >= wanted).then(() =>
        vm.stop(),
      )
      const result = await run
      if (result.reason !== 'stopped') {
        expect(result).toMatchObject(SUCCESS)
        break
      }
      expect(result).toMatchObject({ by: 'stop' })
    }
    expect(vm.serial.output.split('\n').slice(1, -2)).toEqual(blockLines(0, { sectors: 128 }))
    expect(vm.virtioDevices[1]!.statistics.requests).toBe(300)
  })

  it('what is done while the machine stands still is there when it runs on', async () => {
    const waiting: (() => void)[] = []
    const device = entropyBy((chain) => new Promise((done) => waiting.push(() => done(fill(chain)))))
    const vm = await bootVirtio(`${wait} entropy`, { irqchip, execution, virtio: [device] })
    for (let request = 0; request < 4; request++) {
      const run = vm.run({ timeout: RUN_LIMIT })
      await until(() => waiting.length === 1)
      vm.stop()
      expect(await run).toMatchObject({ reason: 'stopped' })
      waiting.pop()!()
      await new Promise((resolve) => setImmediate(resolve))
    }
    expect(await linesOf(vm)).toEqual(entropyLines())
  })

  it('a doorbell that rang in a run is heard in steps, and one of steps in a run', async () => {
    const vm = await bootVirtio(`${wait} bench-doorbell=20`, { irqchip, execution, rng: true })
    const requests = () => vm.virtioDevices[0]!.statistics.requests
    const run = vm.run({ timeout: RUN_LIMIT })
    await until(() => requests() > 0)
    vm.stop()
    await run
    const before = requests()
    // A guest that looks at the used ring makes no exits but doorbells.
    for (let steps = 0; requests() < Math.min(before + 3, 20) && steps < 50; steps++) {
      const { result } = await vm.step({ timeout: RUN_LIMIT })
      if (result !== undefined) break
    }
    expect(requests()).toBeGreaterThanOrEqual(Math.min(before + 3, 20))
    if (requests() < 20) expect((await vm.run({ timeout: RUN_LIMIT })).reason).toBe('debug-exit')
    expect(requests()).toBe(20)
  })
})

it.each(EXECUTIONS)(
  'a doorbell is an exit only where the vCPU has no thread of its own (%s)',
  async (execution) => {
    const requests = 200
    const vm = await bootVirtio(`bench-doorbell=${requests}`, { execution, irqchip: 'none', rng: true })
    const { exits } = await vm.run({ timeout: RUN_LIMIT })
    expect(vm.serial.output).toMatch(/^bench-doorbell requests=200 bytes=3200 .*\ndone\n$/)
    const { statistics } = vm.virtioDevices[0]!
    expect(statistics.requests).toBe(requests)
    if (execution === 'inline') {
      // A slow host may come back to the queue by itself before the driver has to notify it.
      expect(statistics.notifications).toBeGreaterThan(60)
      expect(statistics.notifications).toBeLessThanOrEqual(requests)
      expect(exits.mmio).toBeGreaterThan(statistics.notifications)
    } else {
      // To set the device up takes some.
      expect(exits.mmio).toBeLessThan(60)
      expect(statistics.notifications).toBeGreaterThan(0)
    }
  },
)

it('a machine with several vCPUs drives its devices from one of them', async () => {
  const vm = await bootVirtio('irq block entropy', {
    cpus: 2,
    disks: [{ memory: '64K', queues: 2 }],
    rng: true,
  })
  expect(await linesOf(vm)).toEqual([...blockLines(0, { sectors: 128, queues: 2 }), ...entropyLines()])
})

it('machines side by side, inline and in threads, drive devices of their own', async () => {
  const machines = await Promise.all(
    [...EXECUTIONS, ...EXECUTIONS].map((execution) =>
      bootVirtio('block entropy', { execution, irqchip: 'none', disks: [{ memory: '64K' }], rng: true }),
    ),
  )
  const expected = [...blockLines(0, { sectors: 128 }), ...entropyLines()]
  expect(await Promise.all(machines.map(linesOf))).toEqual(machines.map(() => expected))
})

describe('how a guest finds its devices', () => {
  const options = {
    disks: [{ memory: '64K' }, { memory: '64K' }],
    console: true,
    rng: true,
    virtio: [entropyBy(() => 0)],
  }

  it('is on the command line, behind the words of the user', async () => {
    const kernel = (words: object) => ({ image: imageOf({ image: 'hello-pvh.elf' }), ...words })
    const cmdline = async (words: object) => {
      const vm = await boot(kernel(words), { memory: '16M', ...options })
      // VIRTIO 1.2 has no word of it; PVH has the command line's address at offset 24 of its start info.
      const address = vm.memory.readUint32(Number(vm.vcpus[0]!.registers.rbx) + 24)
      if (address === 0) return ''
      const bytes = vm.memory.read(address, 512)
      return Buffer.from(bytes.subarray(0, bytes.indexOf(0))).toString()
    }
    const parameters = [
      'virtio_mmio.device=4K@0xfeb00000:5',
      'virtio_mmio.device=4K@0xfeb01000:10',
      'virtio_mmio.device=4K@0xfeb02000:11',
      'virtio_mmio.device=4K@0xfeb03000:16',
      'virtio_mmio.device=4K@0xfeb04000:17',
    ].join(' ')
    expect(await cmdline({ cmdline: 'quiet' })).toBe(`quiet ${parameters}`)
    expect(await cmdline({})).toBe(parameters)
    expect(await cmdline({ cmdline: 'quiet', virtioParameters: false })).toBe('quiet')
  })

  it('is in the DSDT, with addresses and lines as vm.virtioDevices has them', async () => {
    const taken = { name: 'other', irq: 10, ports: { base: 0x500, length: 1 } }
    const vm = await boot(
      { image: program(HLT), mode: 'long' },
      { irqchip: 'full', ...options, devices: [taken] },
    )
    const { dsdt } = findTables(Buffer.from(vm.memory.read(0, MIB)))
    const [scope] = parseAml(dsdt.bytes.subarray(36))
    const found = (scope![2] as ReturnType<typeof parseAml>)
      .map(([, , objects]) =>
        Object.fromEntries((objects as ReturnType<typeof parseAml>).map(([, name, data]) => [name, data])),
      )
      .filter(({ _HID }) => _HID === 'LNRO0005')
      .map(({ _CRS }) => {
        const [memory, interrupt] = resources(_CRS as Buffer)
        return [memory!.readUInt32LE(4), memory!.readUInt32LE(8), interrupt!.readUInt32LE(5)]
      })
    expect(found).toEqual(vm.virtioDevices.map(({ address, irq }) => [address, DEVICE_STRIDE, irq]))
    // The line of another device is nobody else's.
    expect(vm.virtioDevices.map(({ irq }) => irq)).toEqual([5, 11, 16, 17, 18])
  })
})

describe.each(EXECUTIONS)("a user's virtio device (%s)", (execution) => {
  it.each([
    ['at once', (chain: DescriptorChain) => fill(chain)],
    [
      'later',
      (chain: DescriptorChain) => new Promise<number>((done) => setImmediate(() => done(fill(chain)))),
    ],
  ])('serves a driver, and answers %s', async (_when, handle) => {
    const vm = await bootVirtio('irq entropy', { execution, virtio: [entropyBy(handle)] })
    expect(await linesOf(vm)).toEqual(entropyLines())
    expect(vm.virtioDevices).toMatchObject([
      { name: 'mine', deviceType: 4, status: READY, statistics: { requests: 4 } },
    ])
    expect(vm.virtioDevices[0]).not.toHaveProperty('errors')
  })

  it('may take chains by pop and give them back by push', async () => {
    let offered = 0
    const vm = await bootVirtio('irq entropy', {
      execution,
      virtio: [
        {
          name: 'collector',
          deviceType: 4,
          queues: [
            {
              available(queue) {
                offered++
                do {
                  for (let chain = queue.pop(); chain !== undefined; chain = queue.pop()) {
                    queue.push(chain, fill(chain))
                  }
                } while (!queue.wantNotifications())
                queue.notify()
              },
            },
          ],
        },
      ],
    })
    expect(await linesOf(vm)).toEqual(entropyLines())
    expect(offered).toBeGreaterThan(0)
  })

  const cause = new Error('no dice')
  it.each([
    [
      'throws',
      () => {
        throw cause
      },
    ],
    ['rejects', () => Promise.reject(cause)],
    ['rejects later', () => new Promise<number>((_, reject) => setImmediate(() => reject(cause)))],
  ])('that %s ends the run of its machine, and of no other', async (_how, handle) => {
    const other = await bootVirtio('echo ports=1', { execution, irqchip: 'none', console: true })
    const otherRun = other.run({ timeout: RUN_LIMIT })
    other.console.write('before\n')
    await other.console.waitFor('before\n')
    const vm = await bootVirtio('entropy', { execution, virtio: [entropyBy(handle)] })
    const result = await vm.run({ timeout: RUN_LIMIT })
    expect(result).toMatchObject({
      reason: 'failed',
      error: errorWith('ERR_DEVICE_FAILED', /virtio device mine .*no dice/),
    })
    expect(result.reason === 'failed' && result.error).toMatchObject({ cause, device: 'mine' })
    await expect(vm.run()).rejects.toEqual(errorWith('ERR_ENDED'))
    other.console.write('after\nquit\n')
    await other.console.waitFor('after\n')
    expect(await otherRun).toMatchObject(SUCCESS)
  })

  it.each([
    ['nothing', undefined],
    ['text', '64'],
    ['more than there was room for', 65],
    ['less than nothing', -1],
    ['a fraction', 0.5],
    ['a promise of nothing', Promise.resolve(undefined)],
  ])('whose handle returns %s ends the run', async (_what, written) => {
    const vm = await bootVirtio('entropy', { execution, virtio: [entropyBy(() => written as number)] })
    expect(await vm.run({ timeout: RUN_LIMIT })).toMatchObject({
      reason: 'failed',
      error: { code: 'ERR_DEVICE_FAILED', cause: { code: 'ERR_INVALID_ARGUMENT' } },
    })
  })

  it.each([
    ['resolves', (chain: DescriptorChain) => fill(chain)],
    [
      'rejects',
      () => {
        throw cause
      },
    ],
  ])('whose request %s only after the machine has closed does no harm', async (_how, answer) => {
    let finish = () => {}
    const device = entropyBy(
      (chain) =>
        new Promise((done, failed) => {
          finish = () => {
            try {
              done(answer(chain))
            } catch (error) {
              failed(error)
            }
          }
        }),
    )
    const idle = finish
    const vm = await bootVirtio('entropy', { execution, virtio: [device] })
    const run = vm.run({ timeout: RUN_LIMIT })
    await until(() => finish !== idle)
    await vm.close()
    expect(await run).toMatchObject({ reason: 'stopped', by: 'close' })
    finish()
    // An exception that nobody takes would come by then, and end the test.
    await new Promise((resolve) => setImmediate(resolve))
    expect(vm.virtioDevices[0]!.statistics.requests).toBe(1)
  })
})

describe('virtio devices of the wrong shape are refused', () => {
  const good = entropyBy(() => 0)
  it.each([
    ['no array', { ...good }, 'an array of virtio devices for virtio'],
    ['nothing', [undefined], 'an object with a name, a deviceType and queues'],
    ['a number', [5], 'an object with a name, a deviceType and queues'],
    ['no name', [{ ...good, name: '' }], 'a non-empty string'],
    ['type 0', [{ ...good, deviceType: 0 }], 'deviceType of mine'],
    ['no type', [{ ...good, deviceType: undefined }], 'deviceType of mine'],
    ['a number for features', [{ ...good, features: 1 }], 'features of mine'],
    ["the transport's features", [{ ...good, features: 1n << 32n }], 'bits 0 to 23 and 50 to 127'],
    ['an array for config', [{ ...good, config: [1] }], 'a Uint8Array for config of mine'],
    ['no queues', [{ ...good, queues: [] }], 'queues of mine'],
    ['a queue without a handler', [{ ...good, queues: [{}] }], 'either handle or available'],
    ['a queue of both kinds', [{ ...good, queues: [{ handle: () => 0, available() {} }] }], 'either handle'],
    ['a queue of 3', [{ ...good, queues: [{ maxSize: 3, handle: () => 0 }] }], 'a power of two'],
  ])('%s', async (_what, virtio, message) => {
    await expect(create({ virtio })).rejects.toEqual(errorWith('ERR_INVALID_ARGUMENT', message))
  })
})

describe('virtio options', () => {
  it.each([
    [{ rng: 'yes' }, 'ERR_INVALID_ARGUMENT', /true, false or \{ source, bytesPerSecond \} for rng/],
    [{ rng: { bytesPersecond: 1 } }, 'ERR_UNKNOWN_OPTION', /did you mean 'bytesPerSecond'/],
    [{ rng: { bytesPerSecond: 0 } }, 'ERR_INVALID_ARGUMENT', /at least 1 for bytesPerSecond/],
    [{ rng: { source: 4 } }, 'ERR_INVALID_ARGUMENT', /a function for source/],
    [{ rgn: true }, 'ERR_UNKNOWN_OPTION', /did you mean 'rng'/],
    [
      { kernel: { image: program(HLT), virtioParameters: 'no' } },
      'ERR_INVALID_ARGUMENT',
      /true or false for kernel.virtioParameters/,
    ],
    [
      { virtio: Array.from({ length: 12 }, () => entropyBy(() => 0)) },
      'ERR_INVALID_ARGUMENT',
      /at most 11 virtio devices .* received 12/,
    ],
    [
      { devices: [{ name: 'mine', mmio: { base: FIRST_DEVICE + 0x800, length: 4 } }], rng: true },
      'ERR_BUS_OVERLAP',
      /rng/,
    ],
  ] as const)('%j are refused: %s', async (options, code, message) => {
    await expect(create(options)).rejects.toEqual(errorWith(code, message))
  })

  it('a program in real mode has virtio devices, too, though it gets no command line', async () => {
    const vm = await boot(program(debugExit(1)), { rng: true })
    expect(await vm.run()).toMatchObject({ reason: 'debug-exit', code: 1 })
    expect(vm.virtioDevices).toMatchObject([{ name: 'rng', status: 0 }])
    await expect(
      create({ kernel: { image: program(HLT), virtioParameters: true }, rng: true }),
    ).rejects.toEqual(errorWith('ERR_INVALID_ARGUMENT', /no command line .* in real mode/))
  })

  it("the source of random numbers may be the user's", async () => {
    const vm = await bootVirtio('entropy', { rng: { source: (bytes) => bytes.fill(++filled) } })
    expect(await linesOf(vm)).toEqual(entropyLines())
  })
})

describe.each(EXECUTIONS)('while a hostile guest runs (%s)', (execution) => {
  /** mov eax, 1; next: imul eax, 1664525; add eax, 1013904223; mov [rbx + rcx], eax; add ecx, 4; and ecx, 0x3fff */
  const GARBAGE = [
    ...flat.movEbx(FIRST_DEVICE),
    ...flat.movEax(1),
    ...[0x31, 0xc9],
    ...foreverLong([
      ...[0x69, 0xc0, ...dword(1664525), 0x05, ...dword(1013904223)],
      ...[0x89, 0x04, 0x0b, 0x83, 0xc1, 0x04, 0x81, 0xe1, ...dword(0x3fff)],
    ]),
  ]
  /** Always has as many chains in the queue as it may: add ax, size; then the doorbell. */
  const storm = (device: number, queue = 0) => [
    ...startQueue(queue, FIRST_DEVICE + device * DEVICE_STRIDE),
    ...foreverLong([
      ...flat.movEbx(RINGS.used + 2),
      ...flat.LOAD_AX,
      ...[0x66, 0x83, 0xc0, RINGS.size],
      ...flat.movEbx(RINGS.avail + 2),
      ...flat.STORE_AX,
      ...writeRegister(QueueNotify, queue, FIRST_DEVICE + device * DEVICE_STRIDE),
    ]),
  ]
  /** Makes the device ready and resets it, without end. */
  const RESETS = foreverLong([...startQueue(), ...writeRegister(QueueNotify, 0), ...writeRegister(Status, 0)])

  it.each<[string, Code, number | undefined, number]>([
    [
      'rings the doorbell of a device that is not ready',
      foreverLong(writeRegister(QueueNotify, 0)),
      undefined,
      0,
    ],
    ['writes garbage into all registers of all devices', GARBAGE, undefined, 0],
    ['asks a disk for more and more', storm(0), 0, VIRTQ_DESC_F_WRITE],
    ['sends more and more to its console', storm(1, 1), 1, 0],
    ['asks for random numbers more and more', storm(2), 2, VIRTQ_DESC_F_WRITE],
    ['starts and resets a disk', RESETS, 0, VIRTQ_DESC_F_WRITE],
  ])(
    'that %s, the event loop turns, others run, and it can be stopped',
    async (_what, code, asked, flags) => {
      const vm = await boot(
        { image: program(code), mode: 'long' },
        { execution, irqchip: 'split', disks: [{ memory: '1M' }], console: true, rng: true },
      )
      // All entries of the ring are this chain.
      offerChain(vm, [{ address: 0x30_0000, length: 0x8_0000, flags }])
      let turns = 0
      const interval = setInterval(() => turns++, 1)
      const run = vm.run({ timeout: RUN_LIMIT })
      await until(() => turns >= 20)
      const other = await boot(program(print('up'), repeat(20, inb(0x10)), debugExit(3)), { execution })
      expect(await other.run({ timeout: RUN_LIMIT })).toMatchObject({ reason: 'debug-exit', code: 3 })
      // What it does is no mistake, and gets done.
      if (asked !== undefined) {
        await until(() => {
          const { statistics, name } = vm.virtioDevices[asked]!
          return (name === 'console' ? vm.console.output.length : statistics.requests) > 2 * RINGS.size
        })
        expect(vm.virtioDevices[asked]!.problem).toBe(undefined)
      }
      expect(vm.running).toBe(true)
      vm.stop()
      expect(await run).toMatchObject({ reason: 'stopped', by: 'stop' })
      clearInterval(interval)
      await vm.close()
    },
  )

  it('that breaks a rule, vm.virtioDevices says which, and the guest spins on', async () => {
    const code = program(startQueue(), writeRegister(QueueNotify, 0), SPIN)
    const vm = await boot({ image: code, mode: 'long' }, { execution, irqchip: 'none', rng: true })
    offerChain(vm, [{ address: 0xd000_0000, length: 16, flags: VIRTQ_DESC_F_WRITE }])
    const run = vm.run({ timeout: RUN_LIMIT })
    await until(() => vm.virtioDevices[0]!.problem !== undefined)
    vm.stop()
    await run
    expect(vm.virtioDevices[0]).toMatchObject({
      problem: expect.stringContaining('16 bytes at 0xd0000000'),
      status: READY | 64,
    })
  })
})

it('the guest runs as often as one likes, and gives everything back', async () => {
  for (let i = 0; i < times(10); i++) {
    await using vm: VirtualMachine = await Machine.create({
      kernel: virtioGuest('entropy'),
      memory: '16M',
      irqchip: 'split',
      rng: true,
    })
    expect(await linesOf(vm)).toEqual(entropyLines())
  }
})
