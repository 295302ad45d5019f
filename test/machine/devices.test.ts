import { describe, expect, it } from 'vitest'
import { type AccessSize, type Device, type DeviceHost, VirtualMachine } from '../../src/index.js'
import {
  debugExit,
  flat,
  forever,
  HLT,
  IN_AL_DX,
  IN_AX_DX,
  IN_EAX_DX,
  inb,
  loadAl,
  long,
  movAl,
  movAx,
  movDx,
  movEax,
  OUT_DX_AL,
  OUT_DX_AX,
  OUT_DX_EAX,
  outb,
  outPort,
  program,
  repeat,
  storeAl,
  storeAx,
  storeEax,
} from '../helpers/code.js'
import { boot, EXECUTIONS, errorWith } from './boot.js'

/** Notes every access; reads give `value`. */
class Recorder implements Device {
  readonly name: string = 'recorder'
  readonly accesses: (readonly [string, ...number[]])[] = []
  value = 0x1122_3344
  readonly ports?: NonNullable<Device['ports']>
  readonly mmio?: NonNullable<Device['mmio']>
  readonly maxAccessSize?: AccessSize

  constructor(claims: Pick<Device, 'ports' | 'mmio' | 'maxAccessSize'>) {
    Object.assign(this, claims)
  }

  read(offset: number, size: AccessSize, region: number): number {
    this.accesses.push(['read', offset, size, region])
    return this.value
  }

  write(offset: number, value: number, size: AccessSize, region: number): void {
    this.accesses.push(['write', offset, value, size, region])
  }
}

describe.each(EXECUTIONS)("a device of the user's (%s)", (execution) => {
  it('may be a plain object that answers a port', async () => {
    const written: number[] = []
    const doubler: Device = {
      name: 'doubler',
      ports: { base: 0x10, length: 1 },
      read: () => (written.at(-1) ?? 0) * 2,
      write: (_offset, value) => written.push(value),
    }
    // The guest gives back what it reads.
    const vm = await boot(program(outb(0x10, 21), inb(0x10), [0xe6, 0xf4]), { execution, devices: [doubler] })
    expect(await vm.run()).toMatchObject({ reason: 'debug-exit', code: 42 })
    expect(written).toEqual([21])
  })

  it('may be an instance of a class, which keeps its `this`', async () => {
    class Counter implements Device {
      readonly name = 'counter'
      readonly ports = { base: 0x500, length: 1 }
      #count = 0
      read() {
        return ++this.#count
      }
    }
    const vm = await boot(program(movDx(0x500), IN_AL_DX, IN_AL_DX, IN_AL_DX, [0xe6, 0xf4]), {
      execution,
      devices: [new Counter()],
    })
    expect(await vm.run()).toMatchObject({ code: 3 })
  })

  it('sees offset, value and size of accesses of 1, 2 and 4 bytes to ports', async () => {
    const device = new Recorder({ ports: { base: 0x500, length: 8 } })
    const image = program(
      movEax(0xdead_beef),
      movDx(0x501),
      OUT_DX_AL,
      OUT_DX_AX,
      OUT_DX_EAX,
      IN_AL_DX,
      storeAl(0x600),
      IN_AX_DX,
      storeAx(0x604),
      IN_EAX_DX,
      storeEax(0x608),
      HLT,
    )
    const vm = await boot(image, { execution, devices: [device] })
    await vm.run()
    expect(device.accesses).toEqual([
      ['write', 1, 0xef, 1, 0],
      ['write', 1, 0xbeef, 2, 0],
      ['write', 1, 0xdead_beef, 4, 0],
      ['read', 1, 1, 0],
      ['read', 1, 2, 0],
      ['read', 1, 4, 0],
    ])
    expect(vm.memory.readUint8(0x600)).toBe(0x44)
    expect(vm.memory.readUint16(0x604)).toBe(0x3344)
    expect(vm.memory.readUint32(0x608)).toBe(0x1122_3344)
  })

  it('may be in memory at 0xd0000000, accessed with 1, 2, 4 and 8 bytes', async () => {
    const device = new Recorder({ mmio: { base: 0xd000_0000, length: 0x1000 } })
    const image = program(
      flat.movEbx(0xd000_0010),
      long.movRax(0x0123_4567_89ab_cdefn),
      flat.STORE_AL,
      flat.STORE_AX,
      flat.STORE_EAX,
      long.STORE_RAX,
      flat.LOAD_AL,
      flat.LOAD_AX,
      flat.LOAD_EAX,
      long.LOAD_RAX,
      HLT,
    )
    const vm = await boot({ image, mode: 'long' }, { execution, devices: [device] })
    expect(await vm.run()).toMatchObject({ reason: 'halt', exits: { io: 0, hlt: 1 } })
    expect(device.accesses).toEqual([
      ['write', 0x10, 0xef, 1, 0],
      ['write', 0x10, 0xcdef, 2, 0],
      ['write', 0x10, 0x89ab_cdef, 4, 0],
      ['write', 0x10, 0x89ab_cdef, 4, 0],
      ['write', 0x14, 0x0123_4567, 4, 0],
      ['read', 0x10, 1, 0],
      ['read', 0x10, 2, 0],
      ['read', 0x10, 4, 0],
      ['read', 0x10, 4, 0],
      ['read', 0x14, 4, 0],
    ])
    expect(vm.vcpus[0]!.registers.rax).toBe(0x1122_3344_1122_3344n)
  })

  it('takes accesses that straddle two pages in pieces, lowest address first', async () => {
    const device = new Recorder({ mmio: { base: 0xd000_0000, length: 0x2000 } })
    const image = program(
      flat.movEbx(0xd000_0ffd),
      long.movRax(0x0807_0605_0403_0201n),
      flat.STORE_EAX,
      long.STORE_RAX,
      HLT,
    )
    const vm = await boot({ image, mode: 'long' }, { execution, devices: [device] })
    await vm.run()
    const bytes: [number, number][] = []
    for (const [access, offset, value, size] of device.accesses as [string, number, number, number][]) {
      expect(access).toBe('write')
      for (let i = 0; i < size; i++) bytes.push([offset + i, (value >>> (8 * i)) & 0xff])
    }
    const stored = (length: number) => Array.from({ length }, (_, i) => [0xffd + i, i + 1])
    expect(bytes).toEqual([...stored(4), ...stored(8)])
  })

  it('counts its regions, ports before memory, each from offset 0', async () => {
    const device = new Recorder({
      ports: [
        { base: 0x500, length: 4 },
        { base: 0x20, length: 2 },
      ],
      mmio: [
        { base: 0xe000_0000, length: 0x10 },
        { base: 0xd000_0000, length: 0x10 },
      ],
    })
    const image = program(
      outb(0x21, 1),
      flat.movDx(0x502),
      OUT_DX_AL,
      flat.movEbx(0xd000_0004),
      flat.STORE_AL,
      flat.movEbx(0xe000_0008),
      flat.STORE_AL,
      HLT,
    )
    const vm = await boot({ image, mode: 'protected' }, { execution, devices: [device] })
    await vm.run()
    expect(device.accesses).toEqual([
      ['write', 1, 1, 1, 1],
      ['write', 2, 1, 1, 0],
      ['write', 4, 1, 1, 3],
      ['write', 8, 1, 1, 2],
    ])
  })

  it('gets wide accesses in pieces of the size it can take', async () => {
    const device = new Recorder({ ports: { base: 0x500, length: 4 }, maxAccessSize: 1 })
    device.value = 0xab
    const image = program(movEax(0x4433_2211), movDx(0x500), OUT_DX_EAX, IN_EAX_DX, HLT)
    const vm = await boot(image, { execution, devices: [device] })
    await vm.run()
    expect(device.accesses).toEqual([
      ['write', 0, 0x11, 1, 0],
      ['write', 1, 0x22, 1, 0],
      ['write', 2, 0x33, 1, 0],
      ['write', 3, 0x44, 1, 0],
      ['read', 0, 1, 0],
      ['read', 1, 1, 0],
      ['read', 2, 1, 0],
      ['read', 3, 1, 0],
    ])
    expect(vm.vcpus[0]!.registers.rax).toBe(0xabab_ababn)
  })

  it('reads as all ones without read, and ignores writes without write', async () => {
    const device = { name: 'mute', ports: { base: 0x10, length: 1 } }
    const vm = await boot(program(outb(0x10, 5), inb(0x10), [0xe6, 0xf4]), { execution, devices: [device] })
    expect(await vm.run()).toMatchObject({ code: 0xff })
    expect(vm.statistics.unclaimedPorts).toMatchObject({ reads: 0, writes: 0 })
  })

  it('is attached once, before the first instruction, and can use guest memory', async () => {
    const hosts: DeviceHost[] = []
    const device: Device = {
      name: 'dma',
      ports: { base: 0x10, length: 1 },
      attach: (host) => hosts.push(host),
      write(_offset, value) {
        hosts[0]!.memory.writeUint8(0x600, value + 1)
        // Without an interrupt controller the line leads nowhere.
        hosts[0]!.interrupt.trigger()
      },
    }
    const vm = await boot(program(outb(0x10, 41), loadAl(0x600), [0xe6, 0xf4]), {
      execution,
      devices: [device],
    })
    expect(hosts).toHaveLength(1)
    expect(await vm.run()).toMatchObject({ code: 42 })
    expect(hosts).toHaveLength(1)
  })

  it('can stop the run, once its access is done, and the machine goes on where it is', async () => {
    let host: DeviceHost | undefined
    const stopper: Device = {
      name: 'stopper',
      ports: { base: 0x10, length: 1 },
      attach(given) {
        host = given
      },
      read() {
        host!.stop()
        return 77
      },
    }
    const vm = await boot(program(inb(0x10), [0xe6, 0xf4]), { execution, devices: [stopper] })
    expect(await vm.run()).toMatchObject({ reason: 'stopped', by: 'device' })
    expect(vm.vcpus[0]!.registers).toMatchObject({ rax: 77n, rip: 0x7c02n })
    expect(await vm.run()).toMatchObject({ reason: 'debug-exit', code: 77 })
  })
})

describe.each(EXECUTIONS)('what nobody claims (%s)', (execution) => {
  it('reads as all ones, ignores writes and is counted, on ports', async () => {
    const image = program(
      movDx(0x1000),
      movEax(0),
      IN_AL_DX,
      storeAl(0x600),
      IN_AX_DX,
      storeAx(0x602),
      IN_EAX_DX,
      storeEax(0x604),
      OUT_DX_AL,
      outPort(0x2000, 5),
      HLT,
    )
    const vm = await boot(image, { execution })
    expect(await vm.run()).toMatchObject({ reason: 'halt' })
    expect(vm.memory.readUint8(0x600)).toBe(0xff)
    expect(vm.memory.readUint16(0x602)).toBe(0xffff)
    expect(vm.memory.readUint32(0x604)).toBe(0xffff_ffff)
    expect(vm.statistics.unclaimedPorts).toEqual({
      reads: 3,
      writes: 2,
      addresses: [
        { address: 0x1000, reads: 3, writes: 1 },
        { address: 0x2000, reads: 0, writes: 1 },
      ],
      leftOut: 0,
    })
  })

  it('reads as all ones, ignores writes and is counted, in memory', async () => {
    const image = program(
      flat.movEbx(0xd000_0000),
      long.LOAD_RAX,
      long.STORE_RAX,
      flat.movEbx(0xfee0_0030),
      flat.LOAD_EAX,
      HLT,
    )
    const vm = await boot({ image, mode: 'long' }, { execution })
    await vm.run()
    expect(vm.vcpus[0]!.registers.rax).toBe(0xffff_ffffn)
    expect(vm.statistics.unclaimedMmio).toMatchObject({
      reads: 2,
      writes: 1,
      addresses: [
        { address: 0xd000_0000, reads: 1, writes: 1 },
        { address: 0xfee0_0030, reads: 1, writes: 0 },
      ],
    })
  })

  it('is remembered only up to a limit when a guest scans the ports', async () => {
    const vm = await boot(program(movDx(0x1000), repeat(1000, [...IN_AL_DX, 0x42]), HLT), { execution })
    await vm.run()
    const { addresses, leftOut, reads } = vm.statistics.unclaimedPorts
    expect({ reads, leftOut, listed: addresses.length }).toEqual({ reads: 1000, leftOut: 744, listed: 256 })
    expect(addresses.at(-1)).toEqual({ address: 0x10ff, reads: 1, writes: 0 })
  })
})

describe('devices that claim what is taken', () => {
  const create = (...devices: Device[]) =>
    VirtualMachine.create({ kernel: program(HLT), memory: '1M', devices })
  const at = (name: string, base: number, length = 1): Device => ({ name, ports: { base, length } })
  const inMemory = (name: string, base: number, length: number): Device => ({ name, mmio: { base, length } })

  it.each([
    ['serial', 0x3f8],
    ['serial', 0x3ff],
    ['debug-exit', 0xf7],
    ['post-code', 0x80],
    ['debug-console', 0xe9],
    ['keyboard-controller', 0x64],
    ['system-control', 0x92],
    ['reset-control', 0xcf9],
    ['acpi-pm', 0x604],
    ['rtc', 0x71],
  ])('are refused where the machine has its own: %s', async (name, port) => {
    await expect(create(at('mine', port))).rejects.toEqual(
      errorWith('ERR_BUS_OVERLAP', `for mine but .*${name}.*`),
    )
  })

  it('are refused where they overlap each other or themselves', async () => {
    await expect(create(at('one', 0x500, 4), at('two', 0x503, 4))).rejects.toEqual(
      errorWith('ERR_BUS_OVERLAP', 'for two but one has ports 0x500 to 0x503'),
    )
    const twice = {
      name: 'twice',
      ports: [
        { base: 1, length: 2 },
        { base: 2, length: 1 },
      ],
    }
    await expect(create(twice)).rejects.toEqual(errorWith('ERR_BUS_OVERLAP', 'for twice but twice'))
    const [a, b] = [inMemory('a', 0xd000_0000, 0x1000), inMemory('b', 0xd000_0fff, 1)]
    await expect(create(a, b)).rejects.toEqual(errorWith('ERR_BUS_OVERLAP', 'for b but a'))
  })

  it('are refused where RAM is, with an address that is free', async () => {
    for (const device of [
      inMemory('low', 0, 0x1000),
      inMemory('edge', 0xf_ffff, 1),
      inMemory('across', 0xf_f000, 0x2000),
      inMemory('screen', 0xb_8000, 2),
    ]) {
      await expect(create(device)).rejects.toEqual(
        errorWith('ERR_BUS_OVERLAP', 'RAM is from 0x0 .*0xd0000000'),
      )
    }
  })

  it('are taken right beside RAM and beside each other', async () => {
    const vm = await create(
      inMemory('first', 0x10_0000, 0x1000),
      inMemory('second', 0x10_1000, 0x1000),
      at('third', 0x3f7),
      at('fourth', 0x400),
    )
    await vm.close()
  })

  it('leave nothing behind: the same devices fit into another machine', async () => {
    const device = at('mine', 0x500)
    await expect(create(device, at('other', 0x3f8))).rejects.toEqual(errorWith('ERR_BUS_OVERLAP'))
    const vm = await create(device)
    await vm.close()
  })

  it('reject create with the exception that attach threw', async () => {
    const cause = new Error('no')
    const device: Device = {
      ...at('mine', 0x500),
      attach() {
        throw cause
      },
    }
    await expect(create(device)).rejects.toBe(cause)
  })
})

describe.each(EXECUTIONS)('32: an exception in a device (%s)', (execution) => {
  const failing = (failure: () => never): Device => ({
    name: 'faulty',
    ports: { base: 0x10, length: 2 },
    mmio: { base: 0xd000_0000, length: 0x1000 },
    read: failure,
    write: failure,
  })

  it('stops the machine with ERR_DEVICE_FAILED, the facts of the access and the cause', async () => {
    const cause = new RangeError('out of paper')
    const device = failing(() => {
      throw cause
    })
    const vm = await boot(program(outb(0x11, 5), HLT), { execution, devices: [device] })
    const result = await vm.run()
    expect(result).toMatchObject({ reason: 'failed', vcpu: 0, exits: { io: 1, hlt: 0 } })
    expect((result as { error: unknown }).error).toMatchObject({
      code: 'ERR_DEVICE_FAILED',
      cause,
      device: 'faulty',
      bus: 'port',
      access: 'write',
      address: 0x11,
      offset: 1,
      size: 1,
      value: 5,
      message: expect.stringMatching(/faulty\.write for 1 byte at port 0x11 .*RangeError: out of paper/),
    })
    await expect(vm.run()).rejects.toEqual(errorWith('ERR_ENDED', 'out of paper'))
  })

  it.each([
    ['a read from a port', program(inb(0x10)), 'real'],
    ['a read from memory', program(flat.movEbx(0xd000_0000), flat.LOAD_EAX), 'protected'],
    ['a write to memory', program(flat.movEbx(0xd000_0000), flat.STORE_AL), 'protected'],
  ] as const)('is caught in %s', async (_access, image, mode) => {
    const device = failing(() => {
      throw new Error('no')
    })
    const vm = await boot({ image, mode }, { execution, devices: [device] })
    expect(await vm.run()).toMatchObject({
      reason: 'failed',
      error: { code: 'ERR_DEVICE_FAILED', cause: { message: 'no' } },
    })
  })

  it.each([undefined, null, 'text', 5, { message: 'like an error' }])('may be %j', async (thrown) => {
    const device = failing(() => {
      throw thrown
    })
    const vm = await boot(program(outb(0x10, 5), HLT), { execution, devices: [device] })
    const result = await vm.run()
    expect(result).toMatchObject({ reason: 'failed', error: { code: 'ERR_DEVICE_FAILED' } })
    expect((result as { error: { cause: unknown } }).error.cause).toEqual(thrown)
  })

  it.each([
    ['undefined', () => undefined],
    ['null', () => null],
    ['NaN', () => Number.NaN],
    ['a fraction', () => 0.5],
    ['text', () => '1'],
    ['a bigint', () => 1n],
    ['an object', () => ({})],
    ['a promise', () => Promise.resolve(1)],
    ['a promise that is rejected', () => Promise.reject(new Error('no'))],
  ])('is what a read is that gives %s', async (_what, read) => {
    const device: Device = { name: 'odd', ports: { base: 0x10, length: 1 }, read: read as () => number }
    const vm = await boot(program(inb(0x10), HLT), { execution, devices: [device] })
    expect(await vm.run()).toMatchObject({
      reason: 'failed',
      error: {
        code: 'ERR_DEVICE_FAILED',
        message: expect.stringContaining('Expected a number from odd.read'),
      },
    })
  })

  it('is what an asynchronous write is, and its rejection does not end the process', async () => {
    const device: Device = {
      name: 'async',
      ports: { base: 0x10, length: 1 },
      write: (async () => {
        throw new Error('later')
      }) as () => void,
    }
    const vm = await boot(program(outb(0x10, 5), HLT), { execution, devices: [device] })
    expect(await vm.run()).toMatchObject({
      reason: 'failed',
      error: { code: 'ERR_DEVICE_FAILED', message: expect.stringContaining('synchronous') },
    })
  })

  it('stops no other machine', async () => {
    const device = failing(() => {
      throw new Error('no')
    })
    // The healthy ones wait until the host lets them go.
    const waits = program(loadAl(0x600), [0x84, 0xc0, 0x74, 0xf9, 0xe6, 0xf4])
    const healthy = await Promise.all(EXECUTIONS.map((way) => boot(waits, { execution: way })))
    const runs = healthy.map((vm) => vm.run())
    const faulty = await boot(program(outb(0x10, 5)), { execution, devices: [device] })
    expect(await faulty.run()).toMatchObject({ reason: 'failed' })
    for (const vm of healthy) {
      expect(vm.running).toBe(true)
      vm.memory.writeUint8(0x600, 9)
    }
    for (const run of runs) expect(await run).toMatchObject({ reason: 'debug-exit', code: 9 })
  })
})

describe.each(EXECUTIONS)('a posted device (%s)', (execution) => {
  it('gets every write in order, also where it throws in the middle', async () => {
    const written: number[] = []
    const device: Device = {
      name: 'posted',
      ports: { base: 0x10, length: 1, posted: true },
      write(_offset, value) {
        if (written.length === 1000) throw new Error('full')
        written.push(value)
      },
    }
    // next: inc al; out 0x10, al; jmp next
    const vm = await boot(program(movAl(0xff), forever([0xfe, 0xc0, 0xe6, 0x10])), {
      execution,
      devices: [device],
    })
    const result = await vm.run()
    expect(result).toMatchObject({ reason: 'failed', error: { code: 'ERR_DEVICE_FAILED' } })
    expect(written).toEqual(Array.from({ length: 1000 }, (_, i) => i & 0xff))
    expect(result.exits.posted).toBeGreaterThan(0)
  })

  it('in memory gets every write in order too', async () => {
    const written: number[] = []
    const device: Device = {
      name: 'posted',
      mmio: { base: 0xd000_0000, length: 0x10, posted: true },
      write: (offset, value) => written.push(offset, value),
    }
    // mov ecx, 1000; next: mov [ebx + 4], cx; loop next
    const image = program(
      flat.movEbx(0xd000_0000),
      [0xb9, 0xe8, 0x03, 0x00, 0x00],
      [0x66, 0x89, 0x4b, 0x04],
      [0xe2, 0xfa],
      HLT,
    )
    const vm = await boot({ image, mode: 'protected' }, { execution, devices: [device] })
    const { exits } = await vm.run()
    expect(written).toEqual(Array.from({ length: 1000 }, (_, i) => [4, 1000 - i]).flat())
    expect(exits.posted).toBeGreaterThan(0)
    expect(exits.posted + exits.mmio).toBe(1000)
  })

  it('gets its writes soon when the guest makes no other exit', async () => {
    let count = 0
    const device: Device = {
      name: 'posted',
      ports: { base: 0x10, length: 1, posted: true },
      write: () => count++,
    }
    // 100 writes, then a loop without end
    const image = program(movAx(100), [0xe6, 0x10, 0x48, 0x75, 0xfb], [0xeb, 0xfe])
    const vm = await boot(image, { execution, devices: [device] })
    const run = vm.run()
    while (count < 100) await new Promise((resolve) => setTimeout(resolve, 1))
    vm.stop()
    expect(await run).toMatchObject({ reason: 'stopped' })
    expect(count).toBe(100)
  })
})

it('a machine may have 100 devices', async () => {
  const devices = Array.from(
    { length: 100 },
    (_, i) => new Recorder({ ports: { base: 0x1000 + i, length: 1 } }),
  )
  const vm = await boot(program(outPort(0x1000, 1), outPort(0x1063, 2), debugExit(0)), { devices })
  await vm.run()
  expect(devices.map(({ accesses }) => accesses.length)).toEqual([1, ...Array(98).fill(0), 1])
})
