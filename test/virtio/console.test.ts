import fc from 'fast-check'
import { beforeEach, describe, expect, it, vi } from 'vitest'
import type { DeviceState } from '../../src/bus/device.js'
import {
  type ConsoleBackend,
  type ConsoleGuest,
  type ConsolePortOptions,
  type ConsoleSize,
  VIRTIO_CONSOLE_F_EMERG_WRITE,
  VIRTIO_CONSOLE_F_MULTIPORT,
  VIRTIO_CONSOLE_F_SIZE,
  VirtioConsole,
} from '../../src/virtio/console.js'
import { VIRTIO_F_EVENT_IDX } from '../../src/virtio/features.js'
import {
  encode,
  eventually,
  linked,
  REGISTERS,
  STATUS,
  VIRTQ_DESC_F_INDIRECT,
  VIRTQ_DESC_F_WRITE,
  VirtioDriver,
  type VirtioDriverOptions,
} from '../helpers/virtio-driver.js'

const [RECEIVEQ, TRANSMITQ, CONTROL_RECEIVEQ, CONTROL_TRANSMITQ, RECEIVEQ_1, TRANSMITQ_1] = [0, 1, 2, 3, 4, 5]
const EVENTS = [
  'DEVICE_READY',
  'DEVICE_ADD',
  'DEVICE_REMOVE',
  'PORT_READY',
  'CONSOLE_PORT',
  'RESIZE',
  'PORT_OPEN',
  'PORT_NAME',
]

// Queues are served for a certain time and then in another turn: in here that takes none,
beforeEach(() => {
  vi.spyOn(performance, 'now').mockReturnValue(0)
})

/** or a tenth of what there is with each look at the clock. */
function letTimePass() {
  let now = 0
  vi.spyOn(performance, 'now').mockImplementation(() => {
    now += 0.1
    return now
  })
}

/** The host's end of a port, with a will of its own. */
class Host implements ConsoleBackend {
  guest!: ConsoleGuest
  received: Buffer[] = []
  receivedBytes = 0
  /** Bytes that it takes before it is not ready any more. */
  room = Number.POSITIVE_INFINITY
  open = true
  guestOpen: boolean[] = []
  #input: Uint8Array = Buffer.alloc(0)

  connect(guest: ConsoleGuest): void {
    this.guest = guest
  }
  transmit(bytes: Uint8Array): void {
    this.receivedBytes += bytes.length
    this.room -= bytes.length
    if (this.receivedBytes < 2 ** 20) this.received.push(Buffer.from(bytes))
  }
  get ready(): boolean {
    return this.room > 0
  }
  receiveReady(): void {
    this.#input = this.#input.subarray(this.guest.receive(this.#input))
  }
  setGuestOpen(open: boolean): void {
    this.guestOpen.push(open)
  }

  get text(): string {
    return Buffer.concat(this.received).toString()
  }
  /** Bytes that the guest has not taken. */
  get left(): number {
    return this.#input.length
  }
  send(bytes: Uint8Array | string): void {
    this.#input = Buffer.concat([this.#input, Buffer.from(bytes)])
    this.receiveReady()
  }
  makeRoom(bytes = Number.POSITIVE_INFINITY): void {
    this.room = bytes
    this.guest.transmitReady()
  }
}

type Port = Omit<ConsolePortOptions, 'backend'>

interface SetUpOptions extends VirtioDriverOptions {
  readonly ports?: readonly Port[]
  readonly size?: ConsoleSize
  readonly multiport?: boolean
  /** Feature bits that are not accepted. */
  readonly without?: bigint
  readonly sizes?: readonly number[]
  readonly initialize?: boolean
}

function setUp({
  ports = [{}],
  size,
  multiport = true,
  without = 0n,
  sizes,
  initialize = true,
  ...options
}: SetUpOptions = {}) {
  const hosts = ports.map(() => new Host())
  const device = new VirtioConsole({
    ports: ports.map((port, index) => ({ ...port, backend: hosts[index]! })),
    ...(size === undefined ? {} : { size }),
  })
  const driver = new VirtioDriver(device, options)
  const features = driver.offered & ~without & ~(multiport ? 0n : VIRTIO_CONSOLE_F_MULTIPORT)
  const start = () => driver.initialize({ features, ...(sizes === undefined ? {} : { sizes }) })
  if (initialize) start()
  return { device, driver, start, hosts, host: hosts[0]!, ...guestOf(driver) }
}

/** What a guest does with its driver. */
function guestOf(driver: VirtioDriver) {
  const offer = (index: number, ...lengths: number[]) => {
    for (const length of lengths) driver.queue(index).add([{ length }])
    driver.queue(index).kick()
  }
  return {
    /** Gives room for input. */
    offer,
    /** What came, buffer by buffer. */
    input: (index = RECEIVEQ) =>
      driver
        .queue(index)
        .used()
        .map(({ data }) => Buffer.from(data).toString()),
    print: (output: string | Uint8Array, index = TRANSMITQ) =>
      driver.request(index, [{ bytes: Buffer.from(output) }]),
    control: (event: string, value = 1, id = 0) =>
      driver.request(CONTROL_TRANSMITQ, [{ bytes: message(id, EVENTS.indexOf(event), value) }]),
    /** Control messages that came, as text. */
    messages: () =>
      driver
        .queue(CONTROL_RECEIVEQ)
        .used()
        .map(({ data }) => describeMessage(data)),
    offerControl: (count = 8) => offer(CONTROL_RECEIVEQ, ...new Array<number>(count).fill(64)),
  }
}

function message(id: number, event: number, value: number): Uint8Array {
  const bytes = new DataView(new ArrayBuffer(8))
  bytes.setUint32(0, id, true)
  bytes.setUint16(4, event, true)
  bytes.setUint16(6, value, true)
  return new Uint8Array(bytes.buffer)
}

function describeMessage(bytes: Uint8Array): string {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.length)
  const event = EVENTS[view.getUint16(4, true)]!
  const details = Buffer.from(bytes.subarray(8))
  const words = [event, view.getUint32(0, true), view.getUint16(6, true)]
  if (event === 'RESIZE') words.push(details.readUint16LE(0), details.readUint16LE(2))
  else if (details.length > 0) words.push(details.toString())
  return words.join(' ')
}

/** A guest whose port 0 is ready and open. */
async function openConsole(options: SetUpOptions = {}) {
  const console = setUp(options)
  console.offerControl(32)
  await console.control('DEVICE_READY')
  await console.control('PORT_READY')
  await console.control('PORT_OPEN')
  console.messages()
  return console
}

const turn = () => new Promise((resolve) => setImmediate(resolve))
const eventIdxOrNot = [
  { name: 'with EVENT_IDX', without: 0n },
  { name: 'without EVENT_IDX', without: VIRTIO_F_EVENT_IDX },
]

describe('a console without MULTIPORT', () => {
  it('is a line in both directions, open from the start', async () => {
    const { host, print, offer, input } = setUp({ multiport: false })
    expect(host.guestOpen).toEqual([true])
    await print('Hello, host')
    expect(host.text).toBe('Hello, host')
    offer(RECEIVEQ, 5, 100)
    host.send('Hello, guest')
    expect(input()).toEqual(['Hello', ', guest'])
  })

  it('takes output of several buffers, and tells that it wrote nothing', async () => {
    const { driver, host } = setUp({ multiport: false })
    const parts = ['one', ' and', ' two'].map((text) => ({ bytes: Buffer.from(text) }))
    expect((await driver.request(TRANSMITQ, [...parts, { length: 5 }])).length).toBe(0)
    expect(host.text).toBe('one and two')
  })

  it('has its size in the configuration space, and says when it changes', () => {
    const { device, driver } = setUp({ multiport: false, size: { columns: 132, rows: 43 } })
    expect([...driver.readConfig(0, 12)]).toEqual([132, 0, 43, 0, 1, 0, 0, 0, 0, 0, 0, 0])
    const generation = driver.read(REGISTERS.ConfigGeneration)
    device.resize({ columns: 300, rows: 50 })
    expect([...driver.readConfig(0, 4)]).toEqual([44, 1, 50, 0])
    expect([driver.interrupts, driver.acknowledge()]).toEqual([1, 2])
    expect(driver.read(REGISTERS.ConfigGeneration)).not.toBe(generation)
    device.resize({ columns: 300, rows: 50 })
    expect(driver.interrupts, 'nothing has changed').toBe(1)
  })

  it('is 80 by 25 unless it is told', () => {
    expect([...setUp().driver.readConfig(0, 4)]).toEqual([80, 0, 25, 0])
  })

  it('does not speak of its size to a driver that did not ask', () => {
    const { device, driver } = setUp({ multiport: false, without: VIRTIO_CONSOLE_F_SIZE })
    device.resize({ columns: 300, rows: 50 })
    expect(driver.interrupts).toBe(0)
  })

  it('has no control messages and no other ports', async () => {
    const { driver, hosts, print, control, offer, offerControl, messages, input } = setUp({
      multiport: false,
      ports: [{}, { name: 'other' }],
    })
    offerControl()
    await control('DEVICE_READY')
    await control('PORT_OPEN', 0)
    expect(messages()).toEqual([])
    driver.queue(TRANSMITQ_1).add([{ bytes: Buffer.from('lost') }])
    driver.queue(TRANSMITQ_1).kick()
    await print('port 0')
    offer(RECEIVEQ_1, 100)
    hosts[1]!.send('waits')
    expect([hosts[1]!.text, hosts[0]!.text, input(RECEIVEQ_1)]).toEqual(['', 'port 0', []])
    expect(hosts.map(({ guestOpen }) => guestOpen)).toEqual([[true], []])
  })
})

describe('emergency writes', () => {
  it('are output of port 0, of one character each, whatever the width', () => {
    const { driver, host } = setUp({ initialize: false })
    expect(driver.offered & VIRTIO_CONSOLE_F_EMERG_WRITE).not.toBe(0n)
    driver.status = STATUS.ACKNOWLEDGE | STATUS.DRIVER
    driver.write(REGISTERS.Config + 8, 0x41, 1)
    driver.write(REGISTERS.Config + 8, 0x1242, 2)
    driver.write(REGISTERS.Config + 8, 0xffff_ff43, 4)
    expect(host.text).toBe('ABC')
  })

  it('are nowhere else, and are not read back', () => {
    const { driver, host } = setUp()
    const before = driver.readConfig(0, 12)
    for (const offset of [0, 2, 4, 9, 10, 11, 12]) driver.write(REGISTERS.Config + offset, 0x41, 1)
    for (const offset of [0, 4, 12]) driver.write(REGISTERS.Config + offset, 0x41, 4)
    driver.write(REGISTERS.Config + 8, 0x41, 4)
    expect([host.text, ...driver.readConfig(0, 12)]).toEqual(['A', ...before])
  })
})

describe('a console with MULTIPORT', () => {
  const ports = [{ name: 'main' }, { name: 'agent' }, { console: true }]

  it('says which ports there are, and then what each is, as the driver asks', async () => {
    const { driver, control, offerControl, messages } = setUp({ ports, size: { columns: 120, rows: 40 } })
    expect([...driver.readConfig(4, 4)]).toEqual([3, 0, 0, 0])
    expect(driver.queueMax(7)).toBeGreaterThan(0)
    expect(driver.queueMax(8)).toBe(0)
    offerControl(16)
    expect(messages()).toEqual([])
    await control('DEVICE_READY')
    expect(messages()).toEqual(['DEVICE_ADD 0 1', 'DEVICE_ADD 1 1', 'DEVICE_ADD 2 1'])
    await control('PORT_READY', 1, 1)
    expect(messages()).toEqual(['PORT_NAME 1 1 agent', 'PORT_OPEN 1 1'])
    await control('PORT_READY', 1, 0)
    const opened = ['PORT_NAME 0 1 main', 'CONSOLE_PORT 0 1', 'RESIZE 0 1 120 40', 'PORT_OPEN 0 1']
    expect(messages()).toEqual(opened)
    await control('PORT_READY', 1, 2)
    expect(messages(), 'nobody said how large that is').toEqual(['CONSOLE_PORT 2 1', 'PORT_OPEN 2 1'])
    await control('DEVICE_READY')
    for (const index of ports.keys()) await control('PORT_READY', 1, index)
    expect(messages(), 'that it has been told').toEqual([])
  })

  it('says all that as the driver gives buffers for it, however late', async () => {
    const { control, offerControl, messages } = setUp({ ports })
    await control('DEVICE_READY')
    await control('PORT_READY', 1, 0)
    const all: string[] = []
    for (let i = 0; i < 9; i++) {
      offerControl(1)
      all.push(...messages())
    }
    expect(all).toEqual([
      'DEVICE_ADD 0 1',
      'PORT_NAME 0 1 main',
      'CONSOLE_PORT 0 1',
      'RESIZE 0 1 80 25',
      'PORT_OPEN 0 1',
      'DEVICE_ADD 1 1',
      'DEVICE_ADD 2 1',
    ])
  })

  it('says nothing to a driver that has failed', async () => {
    const { control, offerControl, messages } = setUp({ ports })
    offerControl()
    await control('DEVICE_READY', 0)
    expect(messages()).toEqual([])
    await control('PORT_READY', 1)
    await control('PORT_OPEN', 1)
    expect(messages(), 'it has not heard of the port yet').toEqual([])
    await control('DEVICE_READY')
    expect(messages()).toHaveLength(3)
    await control('PORT_READY', 0)
    expect(messages()).toEqual([])
  })

  it('carries the bytes of each port in queues of its own', async () => {
    const { driver, hosts, control, print, offer, offerControl, input } = setUp({ ports })
    offerControl(32)
    await control('DEVICE_READY')
    for (const [index, host] of hosts.entries()) {
      await control('PORT_READY', 1, index)
      await control('PORT_OPEN', 1, index)
      const receiveq = [0, 4, 6][index]!
      await print(`from ${index}`, receiveq + 1)
      offer(receiveq, 100)
      host.send(`to ${index}`)
      expect([host.text, input(receiveq)]).toEqual([`from ${index}`, [`to ${index}`]])
    }
    expect(driver.failures).toEqual([])
  })

  it('lets input wait until the guest has opened the port, and while it is closed', async () => {
    const { host, control, offer, input } = setUp()
    offer(RECEIVEQ, 10, 10, 10)
    host.send('first')
    await control('DEVICE_READY')
    await control('PORT_READY')
    expect([host.left, input()]).toEqual([5, []])
    await control('PORT_OPEN')
    expect([host.left, input()]).toEqual([0, ['first']])
    await control('PORT_OPEN', 0)
    host.send('second')
    expect([host.left, input()]).toEqual([6, []])
    await control('PORT_OPEN')
    expect(input()).toEqual(['second'])
    expect(host.guestOpen).toEqual([true, false, true])
  })

  it('tells of a new size by a message: once, if several come before there is room for it', async () => {
    const { device, driver, hosts, messages, offerControl } = await openConsole({ ports })
    device.resize({ columns: 100, rows: 30 })
    expect(messages()).toEqual(['RESIZE 0 1 100 30'])
    expect([...driver.readConfig(0, 4)]).toEqual([100, 0, 30, 0])
    expect(driver.acknowledge() & 2, 'no configuration interrupt').toBe(0)
    hosts[1]!.guest.resize({ columns: 10, rows: 10 })
    expect(messages(), 'that is no console').toEqual([])

    await driver.reset()
    const again = guestOf(driver.initialize())
    await again.control('DEVICE_READY')
    await again.control('PORT_READY')
    for (let columns = 1; columns <= 1000; columns++) device.resize({ columns, rows: 2 })
    offerControl(32)
    expect(messages().filter((text) => text.startsWith('RESIZE'))).toEqual(['RESIZE 0 1 1000 2'])
  })

  it('tells of the size of each console by itself', async () => {
    const { driver, hosts, control, messages } = await openConsole({ ports })
    hosts[2]!.guest.resize({ columns: 20, rows: 10 })
    expect(messages()).toEqual([])
    await control('PORT_READY', 1, 2)
    expect(messages()).toEqual(['CONSOLE_PORT 2 1', 'RESIZE 2 1 20 10', 'PORT_OPEN 2 1'])
    expect([...driver.readConfig(0, 4)], 'that of port 0').toEqual([80, 0, 25, 0])
  })

  it('tells when the host closes its end, unless it is open again by then', async () => {
    const { host, messages } = await openConsole()
    const set = (open: boolean) => {
      host.open = open
      host.guest.openChanged()
    }
    set(false)
    expect(messages()).toEqual(['PORT_OPEN 0 0'])
    set(false)
    expect(messages()).toEqual([])
    set(true)
    expect(messages()).toEqual(['PORT_OPEN 0 1'])

    const late = setUp()
    await late.control('DEVICE_READY')
    await late.control('PORT_READY')
    late.host.open = false
    late.host.guest.openChanged()
    late.offerControl(8)
    expect(late.messages()).toEqual(['DEVICE_ADD 0 1', 'CONSOLE_PORT 0 1', 'RESIZE 0 1 80 25'])
  })
})

describe.each(eventIdxOrNot)('back-pressure $name', ({ without }) => {
  it('leaves output in the queue while the host is not ready, and goes on when it is', async () => {
    const { driver, host } = setUp({ multiport: false, without })
    const queue = driver.queue(TRANSMITQ)
    host.room = 0
    for (const word of ['one ', 'two ', 'three']) queue.add([{ bytes: Buffer.from(word) }])
    queue.kick()
    await turn()
    expect([host.text, queue.usedIdx]).toEqual(['', 0])
    host.makeRoom(1)
    await turn()
    expect([host.text, queue.usedIdx]).toEqual(['one ', 1])
    host.makeRoom()
    await queue.settled()
    expect(host.text).toBe('one two three')
  })

  it('holds back in the middle of a chain, and sends each byte once', async () => {
    const { driver, host } = setUp({ multiport: false, without })
    const queue = driver.queue(TRANSMITQ)
    const output = Buffer.from(Uint8Array.from({ length: 200_000 }, (_, i) => (i * 31) >> 3))
    host.room = 1
    queue.add([output.subarray(0, 70_000), output.subarray(70_000)].map((bytes) => ({ bytes })))
    queue.kick()
    for (let held = 1; held <= 3; held++) {
      expect([host.receivedBytes, queue.usedIdx]).toEqual([held * 65536, 0])
      host.makeRoom(1)
      await turn()
    }
    await queue.settled()
    expect(Buffer.concat(host.received).equals(output)).toBe(true)
  })

  it('is not asked for by a host that is told too often that there is room', async () => {
    const { host, print } = setUp({ multiport: false, without })
    for (let i = 0; i < 100; i++) host.guest.transmitReady()
    await print('once')
    expect(host.text).toBe('once')
  })

  it('leaves input with the host while the guest has no room, and goes on when it has', () => {
    const { host, offer, input } = setUp({ multiport: false, without })
    host.send('0123456789')
    expect(host.left).toBe(10)
    offer(RECEIVEQ, 3)
    offer(RECEIVEQ, 3, 1)
    expect([host.left, input()]).toEqual([3, ['012', '345', '6']])
    offer(RECEIVEQ, 100)
    expect([host.left, input()]).toEqual([0, ['789']])
  })

  it('keeps all bytes in order, whatever the buffers and the pace of host and guest', async () => {
    letTimePass()
    const steps = fc.array(
      fc.oneof(
        fc.record({ print: fc.array(fc.uint8Array({ maxLength: 50 }), { minLength: 1, maxLength: 4 }) }),
        fc.record({ room: fc.constantFrom(0, 1, 40, 1000) }),
        fc.record({ send: fc.uint8Array({ minLength: 1, maxLength: 100 }) }),
        fc.record({ offer: fc.array(fc.integer({ min: 0, max: 40 }), { minLength: 1, maxLength: 4 }) }),
        fc.record({ turn: fc.constant(true) }),
      ),
      { maxLength: 40 },
    )
    await fc.assert(
      fc.asyncProperty(steps, async (script) => {
        const { driver, host } = setUp({ multiport: false, without, sizes: [128, 128] })
        const [sent, printed, read]: Uint8Array[][] = [[], [], []]
        const receive = () =>
          read!.push(
            ...driver
              .queue(RECEIVEQ)
              .used()
              .map(({ data }) => data),
          )
        for (const step of script) {
          if ('print' in step) {
            driver.queue(TRANSMITQ).used()
            if (driver.queue(TRANSMITQ).freeDescriptors < 4) continue
            driver.queue(TRANSMITQ).add(step.print.map((bytes) => ({ bytes })))
            driver.queue(TRANSMITQ).kick()
            printed!.push(...step.print)
          } else if ('room' in step) host.makeRoom(step.room)
          else if ('send' in step) {
            host.send(step.send)
            sent!.push(step.send)
          } else if ('offer' in step) {
            receive()
            if (driver.queue(RECEIVEQ).freeDescriptors < 4) continue
            for (const length of step.offer) driver.queue(RECEIVEQ).add([{ length }])
            driver.queue(RECEIVEQ).kick()
          } else await turn()
        }
        host.makeRoom()
        await driver.queue(TRANSMITQ).settled()
        while (host.left > 0) {
          receive()
          driver.queue(RECEIVEQ).add([{ length: 1000 }])
          driver.queue(RECEIVEQ).kick()
          await turn()
        }
        receive()
        expect(Buffer.concat(host.received).equals(Buffer.concat(printed!))).toBe(true)
        expect(Buffer.concat(read!).equals(Buffer.concat(sent!))).toBe(true)
        expect(driver.failures).toEqual([])
      }),
      { numRuns: 200 },
    )
  })
})

describe('notifications', () => {
  it('are not asked for buffers that nobody needs yet', () => {
    const { driver, host } = setUp({ multiport: false, without: VIRTIO_F_EVENT_IDX })
    const queue = driver.queue(RECEIVEQ)
    queue.add([{ length: 10 }])
    expect(queue.kick()).toBe(false)
    host.send('more than ten bytes')
    queue.add([{ length: 10 }])
    expect([queue.kick(), host.left]).toEqual([true, 0])
    queue.add([{ length: 10 }])
    expect(queue.kick()).toBe(false)
  })
})

/** Makes a chain available that has the same MiB again and again: 1 GiB. */
function addHugeChain(driver: VirtioDriver): void {
  const table = encode(
    linked(Array.from({ length: 1024 }, () => ({ address: 0x10_0000, length: 0x10_0000 }))),
  )
  const address = driver.allocate(table.length, 16)
  driver.memory.write(address, table)
  driver.queue(TRANSMITQ).addRaw([{ address, length: table.length, flags: VIRTQ_DESC_F_INDIRECT }])
}

describe('a hostile driver', () => {
  it('14: that asks again and again is told once', async () => {
    const ports = Array.from({ length: 31 }, (_, index) => ({ name: `port${index}` }))
    const { driver, offerControl, messages } = setUp({ ports })
    const queue = driver.queue(CONTROL_TRANSMITQ)
    for (let i = 0; i < 2000; i++) {
      queue.add([{ bytes: message(0, 0, 1) }])
      queue.add([{ bytes: message(i % 40, 3, 1) }])
      queue.add([{ bytes: message(i % 40, 6, i % 3) }])
      queue.kick()
      await queue.settled()
    }
    const all: string[] = []
    for (let came = ['']; came.length > 0; ) {
      offerControl(1)
      came = messages()
      all.push(...came)
    }
    expect(all).toHaveLength(31 * 3 + 2)
    expect(new Set(all).size).toBe(all.length)
  })

  it('16: with a chain of 1 GiB leaves time for others, and a reset ends it', async () => {
    letTimePass()
    const { driver, start, host, print } = setUp({ multiport: false })
    addHugeChain(driver)
    driver.notify(TRANSMITQ)
    const first = host.receivedBytes
    expect(first).toBeLessThan(2 ** 30)
    await turn()
    await turn()
    expect(host.receivedBytes).toBeGreaterThan(first)
    expect(host.receivedBytes).toBeLessThan(2 ** 30)
    await driver.reset()
    const before = host.receivedBytes
    await turn()
    expect(host.receivedBytes).toBe(before)
    start()
    host.received = []
    host.receivedBytes = 0
    await print('alive')
    expect(host.text).toBe('alive')
  })

  it('16: with a chain of 1 GiB to a host that is always ready again leaves time for others', async () => {
    letTimePass()
    const { driver, host } = setUp({ multiport: false })
    host.room = 0
    const transmit = host.transmit.bind(host)
    host.transmit = (bytes) => {
      transmit(bytes)
      process.nextTick(() => host.makeRoom(1))
    }
    addHugeChain(driver)
    driver.notify(TRANSMITQ)
    host.makeRoom(1)
    for (let i = 0; i < 10; i++) await turn()
    expect(host.receivedBytes).toBeGreaterThan(0)
    expect(host.receivedBytes).toBeLessThan(2 ** 30)
    await driver.reset()
  })

  it('16: with room for input without end leaves time for others', async () => {
    letTimePass()
    const { driver, host, offer, input } = setUp({ multiport: false })
    const text = 'input '.repeat(8)
    offer(RECEIVEQ, ...new Array<number>(48).fill(1))
    host.send(text)
    expect(host.left).toBeGreaterThan(0)
    driver.notify(RECEIVEQ)
    expect(host.left, 'nor does it take turns of its own').toBeGreaterThan(0)
    await eventually(() => host.left === 0)
    expect(input().join('')).toBe(text)
  })

  it('33: whose memory has gone is not looked for', async () => {
    letTimePass()
    const { device, driver, host } = setUp({ multiport: false })
    addHugeChain(driver)
    driver.notify(TRANSMITQ)
    const { receivedBytes } = host
    driver.memory.close()
    for (let turns = 0; turns < 3; turns++) await turn()
    host.send('input')
    host.makeRoom()
    device.resize({ columns: 1, rows: 1 })
    expect([host.receivedBytes, host.left, driver.failures]).toEqual([receivedBytes, 5, []])
  })

  it('is not heard with what is no message, or of no port', async () => {
    const { driver, host, messages, control } = await openConsole()
    const nonsense: Uint8Array[] = [
      new Uint8Array(0),
      message(0, 6, 0).subarray(0, 7),
      ...[1, 2, 4, 5, 7, 8, 0xffff].map((event) => message(0, event, 1)),
      ...[1, 31, 0x8000_0000, 0xffff_ffff].flatMap((id) => [message(id, 3, 1), message(id, 6, 0)]),
    ]
    for (const bytes of nonsense) await driver.request(CONTROL_TRANSMITQ, [{ bytes }])
    await driver.request(CONTROL_TRANSMITQ, [{ length: 8 }])
    expect([messages(), host.guestOpen, driver.failures]).toEqual([[], [true], []])
    await driver.request(CONTROL_TRANSMITQ, [
      { bytes: message(0, 6, 0).subarray(0, 3) },
      { bytes: message(0, 6, 0).subarray(3) },
      { bytes: new Uint8Array(5000) },
    ])
    expect(host.guestOpen, 'one in pieces, and longer than it need be').toEqual([true, false])
    await control('PORT_OPEN')
  })

  it('12: with buffers of no length or the wrong direction gets them back, and loses nothing', async () => {
    const { driver, host, offer, input } = setUp({ multiport: false })
    const queue = driver.queue(RECEIVEQ)
    host.send('input')
    queue.add([{ length: 0 }])
    queue.add([{ bytes: Buffer.from('wrong') }])
    queue.kick()
    expect(input()).toEqual(['', ''])
    offer(RECEIVEQ, 100)
    expect(input()).toEqual(['input'])
    expect((await driver.request(TRANSMITQ, [{ length: 100 }])).length).toBe(0)
    expect((await driver.request(TRANSMITQ, [{ bytes: new Uint8Array(0) }])).length).toBe(0)
    expect(host.receivedBytes).toBe(0)
  })

  it('12: with control buffers too short for their messages gets what fits', async () => {
    const { driver, control, offer, offerControl, messages } = setUp({ ports: [{ name: 'console' }] })
    await control('DEVICE_READY')
    offer(CONTROL_RECEIVEQ, 0)
    expect(driver.queue(CONTROL_RECEIVEQ).used()[0]!.length).toBe(0)
    offer(CONTROL_RECEIVEQ, 10, 3)
    await control('PORT_READY')
    const lengths = driver
      .queue(CONTROL_RECEIVEQ)
      .used()
      .map(({ length }) => length)
    expect(lengths).toEqual([10, 3])
    offerControl()
    expect(messages()).toEqual(['RESIZE 0 1 80 25', 'PORT_OPEN 0 1'])
  })

  it.each([
    ['no receive queue', [0, 64, 64, 64]],
    ['no transmit queue', [64, 0, 64, 64]],
    ['no control receive queue', [64, 64, 0, 64]],
    ['no control transmit queue', [64, 64, 64, 0]],
    ['no queues', [0, 0, 0, 0]],
    ['no control queues', [64, 64, 0, 0]],
  ])('with %s stops nothing but itself', async (_name, sizes) => {
    const { device, driver, host } = setUp({ sizes })
    const guest = guestOf(driver)
    if (sizes[3]! > 0) {
      for (const event of ['DEVICE_READY', 'PORT_READY', 'PORT_OPEN']) await guest.control(event)
    }
    if (sizes[1]! > 0) await guest.print('output')
    host.send('input')
    host.makeRoom()
    host.guest.openChanged()
    device.resize({ columns: 1, rows: 1 })
    for (let index = 0; index < 10; index++) driver.notify(index)
    await turn()
    expect(host.text).toBe(sizes[1]! > 0 ? 'output' : '')
    expect([driver.failures, driver.status]).toEqual([[], 15])
  })

  it.each([RECEIVEQ, CONTROL_RECEIVEQ])(
    '1: whose bad chain in queue %i is found when the host does something has to reset',
    async (index) => {
      const { device, driver, start, host, print, offer, input } = await openConsole()
      driver.queue(index).used()
      driver.queue(index).makeAvailable(999)
      if (index === CONTROL_RECEIVEQ) {
        offer(RECEIVEQ, 100)
        // Behind the good ones.
        for (let i = 0; i < 40; i++) device.resize({ columns: 2 + i, rows: 3 })
      }
      host.send('input')
      expect(driver.status & STATUS.DEVICE_NEEDS_RESET).toBe(STATUS.DEVICE_NEEDS_RESET)
      expect(driver.transport.function.problem).toContain('chain 999')
      expect(driver.acknowledge() & 2).toBe(2)
      host.send(' and more')
      host.makeRoom()
      device.resize({ columns: 9, rows: 9 })
      await turn()
      expect([host.left, driver.failures]).toEqual(['input and more'.length, []])

      await driver.reset()
      expect(host.guestOpen.at(-1)).toBe(false)
      start()
      const again = guestOf(driver)
      again.offerControl()
      offer(RECEIVEQ, 100)
      for (const event of ['DEVICE_READY', 'PORT_READY', 'PORT_OPEN']) await again.control(event)
      expect(input()).toEqual(['input and more'])
      await print('back')
      expect(host.text).toBe('back')
    },
  )

  it('1: whose bad chain is found when the host has room has to reset', async () => {
    const { driver, host } = setUp({ multiport: false })
    host.room = 0
    driver.queue(TRANSMITQ).addRaw([{ address: 0x5000_0000, length: 10 }])
    driver.notify(TRANSMITQ)
    expect(driver.status).toBe(15)
    host.makeRoom()
    await turn()
    expect(driver.status & STATUS.DEVICE_NEEDS_RESET).not.toBe(0)
    expect([driver.failures, host.receivedBytes]).toEqual([[], 0])
  })

  it('9: that resets while output and input wait starts anew', async () => {
    const { driver, start, host } = await openConsole()
    host.room = 1
    driver.queue(TRANSMITQ).add([{ bytes: new Uint8Array(100_000) }])
    driver.queue(TRANSMITQ).kick()
    host.send('waits')
    await driver.reset()
    host.makeRoom()
    await turn()
    expect([host.receivedBytes, host.left, host.guestOpen]).toEqual([65536, 5, [true, false]])
    start()
    const guest = guestOf(driver)
    guest.offerControl()
    await guest.control('DEVICE_READY')
    expect(guest.messages(), 'told from the start').toEqual(['DEVICE_ADD 0 1'])
    host.received = []
    await guest.print('whole')
    expect(host.text).toBe('whole')
  })

  it('that does anything at all fails alone', async () => {
    letTimePass()
    const descriptor = fc.record({
      address: fc.constantFrom(0, 0x8000, 0xf_fff0, 0x10_0000, 0x1f_ffff, 0x20_0000, 2 ** 32),
      length: fc.constantFrom(0, 1, 7, 8, 9, 16, 64, 4096, 0x10_0000, 0xffff_ffff),
      flags: fc.nat(7),
      next: fc.nat(5),
    })
    const step = fc.oneof(
      {
        weight: 6,
        arbitrary: fc.record({ queue: fc.nat(7), raw: fc.array(descriptor, { minLength: 1, maxLength: 4 }) }),
      },
      { weight: 4, arbitrary: fc.record({ event: fc.nat(8), id: fc.nat(3), value: fc.nat(2) }) },
      { weight: 2, arbitrary: fc.record({ queue: fc.nat(7), buffer: fc.nat(100) }) },
      { weight: 2, arbitrary: fc.record({ send: fc.uint8Array({ maxLength: 50 }) }) },
      { weight: 1, arbitrary: fc.record({ room: fc.constantFrom(0, 1, 1e9) }) },
      { weight: 1, arbitrary: fc.record({ config: fc.nat(16), value: fc.nat(255) }) },
      { weight: 1, arbitrary: fc.record({ reset: fc.constant(true) }) },
      { weight: 1, arbitrary: fc.record({ turn: fc.constant(true) }) },
    )
    await fc.assert(
      fc.asyncProperty(fc.array(step, { maxLength: 40 }), fc.boolean(), async (script, multiport) => {
        const { device, driver, start, hosts } = setUp({ ports: [{}, { name: 'a' }, {}], multiport })
        for (const action of script) {
          if ('raw' in action) {
            driver.queue(action.queue).addRaw(action.raw)
            driver.notify(action.queue)
          } else if ('event' in action) {
            const bytes = message(action.id, action.event, action.value)
            driver.memory.write(0x9000, bytes)
            driver.queue(CONTROL_TRANSMITQ).addRaw([{ address: 0x9000, length: 8 }], 10)
            driver.notify(CONTROL_TRANSMITQ)
          } else if ('buffer' in action) {
            const room = { address: 0xa000, length: action.buffer, flags: VIRTQ_DESC_F_WRITE }
            driver.queue(action.queue).addRaw([room], 20)
            driver.notify(action.queue)
          } else if ('send' in action) for (const host of hosts) host.send(action.send)
          else if ('room' in action) for (const host of hosts) host.makeRoom(action.room)
          else if ('config' in action) {
            driver.write(REGISTERS.Config + action.config, action.value, 1)
            device.resize({ columns: 1 + action.value, rows: 1 + action.config })
          } else if ('reset' in action) {
            await driver.reset()
            start()
          } else await turn()
        }
        await driver.reset()
        expect(driver.failures).toEqual([])
        const features = driver.offered & ~VIRTIO_CONSOLE_F_MULTIPORT
        const guest = guestOf(driver.initialize({ features }))
        hosts[0]!.received = []
        hosts[0]!.receivedBytes = 0
        hosts[0]!.makeRoom()
        await guest.print('still there')
        expect(hosts[0]!.text).toBe('still there')
      }),
      { numRuns: 300 },
    )
  })
})

describe('state', () => {
  it('goes on in the middle of a handshake, of output and of input', async () => {
    const ports = [{ name: 'main' }, { name: 'agent' }]
    const { device, driver, host, control, messages, offer } = await openConsole({
      ports,
      size: { columns: 90, rows: 20 },
    })
    const queue = driver.queue(TRANSMITQ)
    const output = Buffer.from(Uint8Array.from({ length: 100_000 }, (_, i) => (i * 31) >> 3))
    host.room = 1
    queue.add([{ bytes: output }])
    queue.kick()
    expect(host.receivedBytes).toBe(65536)
    offer(RECEIVEQ, 100)
    messages()
    // Of the control buffers all are gone after this, so that a message waits.
    while (driver.queue(CONTROL_RECEIVEQ).inFlight > 0) {
      device.resize({ columns: 1 + driver.queue(CONTROL_RECEIVEQ).inFlight, rows: 5 })
      messages()
    }
    device.resize({ columns: 70, rows: 7 })
    await control('PORT_READY', 1, 1)
    const state: DeviceState = structuredClone(driver.transport.saveState())

    const other = setUp({ ports, memory: driver.memory, initialize: false })
    other.host.room = 0
    other.driver.transport.restoreState(state)
    expect(other.driver.transport.saveState()).toEqual(state)
    expect(other.hosts.map(({ guestOpen }) => guestOpen)).toEqual([[true], []])
    expect([...other.driver.readConfig(0, 4)]).toEqual([70, 0, 7, 0])
    other.host.makeRoom()
    await eventually(() => other.host.receivedBytes === 100_000 - 65536)
    expect(Buffer.concat([...host.received, ...other.host.received]).equals(output)).toBe(true)
    other.host.send('input')
    expect(queue.used()).toHaveLength(1)
    expect(Buffer.from(driver.queue(RECEIVEQ).used()[0]!.data).toString()).toBe('input')
    for (let i = 0; i < 8; i++) driver.queue(CONTROL_RECEIVEQ).add([{ length: 64 }])
    other.driver.notify(CONTROL_RECEIVEQ)
    expect(messages()).toEqual(['RESIZE 0 1 70 7', 'PORT_NAME 1 1 agent', 'PORT_OPEN 1 1'])
  })

  it('tells the guest of a host that is not there any more', async () => {
    const { driver, messages } = await openConsole()
    const state = structuredClone(driver.transport.saveState())
    const other = setUp({ memory: driver.memory, initialize: false })
    other.host.open = false
    other.driver.transport.restoreState(state)
    expect(messages()).toEqual(['PORT_OPEN 0 0'])
  })

  it.each([
    ['nothing', null],
    ['no ports', {}],
    ['another number of ports', { ports: [] }],
    ['a port of something else', { ports: [5] }],
    ['a field too few', { ports: [{ columns: 5 }] }],
  ])('of %s is refused', (_name, state) => {
    const { device } = setUp()
    expect(() => device.restoreState(state as DeviceState)).toThrowError(
      expect.objectContaining({ code: 'ERR_INVALID_ARGUMENT' }),
    )
  })

  it('29: from somebody else may hold anything, and harms nobody', async () => {
    const { device } = setUp({ initialize: false })
    const [port] = (device.saveState() as { ports: object[] }).ports
    const word = fc.oneof(fc.nat(300), fc.constantFrom(-1, 0.5, 2 ** 32, Number.MAX_SAFE_INTEGER))
    const field = fc.oneof(fc.boolean(), word)
    const state = fc.record(Object.fromEntries(Object.keys(port!).map((key) => [key, field])))
    const plausible = fc.record({
      ...Object.fromEntries(['columns', 'rows', 'pending', 'transmitted'].map((key) => [key, fc.nat(250)])),
      ...Object.fromEntries(['added', 'ready', 'guestOpen', 'hostOpen'].map((key) => [key, fc.boolean()])),
    })
    await fc.assert(
      fc.asyncProperty(fc.oneof(state, plausible), async (saved) => {
        const target = setUp({ initialize: false })
        try {
          target.device.restoreState({ ports: [saved] } as DeviceState)
        } catch (error) {
          expect(error).toMatchObject({ code: 'ERR_INVALID_ARGUMENT' })
        }
        target.start()
        target.offerControl()
        await target.print('a'.repeat(300))
        await target.control('PORT_READY')
        expect(target.driver.failures).toEqual([])
      }),
      { numRuns: 200 },
    )
  })
})

describe('options', () => {
  const backend = new Host()
  it.each([
    ['no ports', { ports: [] }, 'ports'],
    ['too many ports', { ports: new Array(32).fill({ backend }) }, 'ports'],
    ['ports that are none', { ports: 5 }, 'ports'],
    ['a first port that is no console', { ports: [{ backend, console: false }] }, 'console of port 0'],
    ['an empty name', { ports: [{ backend, name: '' }] }, 'name of port 0'],
    ['a name that is no file name', { ports: [{ backend }, { backend, name: 'a/b' }] }, 'name of port 1'],
    ['a name with a NUL', { ports: [{ backend, name: 'a\0' }] }, 'name of port 0'],
    ['a name that is no text', { ports: [{ backend, name: 5 }] }, 'name of port 0'],
    ['a name too long', { ports: [{ backend, name: 'ä'.repeat(128) }] }, 'name of port 0'],
    ['two of a name', { ports: ['a', 'a'].map((name) => ({ backend, name })) }, 'name of port 1'],
    ['no columns', { ports: [{ backend }], size: { columns: 0, rows: 1 } }, 'columns'],
    ['half a row', { ports: [{ backend }], size: { columns: 1, rows: 0.5 } }, 'rows'],
    ['too many rows', { ports: [{ backend }], size: { columns: 1, rows: 65536 } }, 'rows'],
    ['a size that is none', { ports: [{ backend }], size: 5 }, 'size'],
  ])('with %s are refused', (_name, options, argument) => {
    expect(() => new VirtioConsole(options as never)).toThrowError(
      expect.objectContaining({ code: 'ERR_INVALID_ARGUMENT', argument }),
    )
  })

  it('with 31 ports are fine', () => {
    const { driver } = setUp({ ports: new Array(31).fill({}), initialize: false })
    expect([driver.queueMax(63) > 0, driver.queueMax(64)]).toEqual([true, 0])
  })
})
