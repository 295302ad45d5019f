import { once } from 'node:events'
import { Writable } from 'node:stream'
import { pipeline } from 'node:stream/promises'
import { describe, expect, it } from 'vitest'
import { VirtualMachine, type VirtualMachineOptions } from '../../src/index.js'
import { debugExit, HLT, program } from '../helpers/code.js'
import { times } from '../helpers/guests.js'
import { RUN_LIMIT } from '../helpers/limits.js'
import { boot, EXECUTIONS, errorWith, until } from './boot.js'
import {
  bootVirtio,
  consoleLines,
  linesOf,
  MACHINES,
  offerChain,
  QueueNotify,
  SUCCESS,
  startQueue,
  writeRegister,
} from './virtio-guest.js'

const KIB = 1024
/** What `bench-console` sends: lines of 64 bytes. */
const LINE = `${'x'.repeat(63)}\n`

/** Options as a JavaScript program may pass them. */
const create = (console: unknown) =>
  VirtualMachine.create({
    kernel: { image: program(HLT), mode: 'long' },
    memory: '4M',
    console,
  } as VirtualMachineOptions)

const turn = () => new Promise((resolve) => setImmediate(resolve))

describe.each(MACHINES)('the console, with irqchip %s, %s,', (irqchip, execution, wait) => {
  const machine = { irqchip, execution }

  it('talks both ways', async () => {
    const vm = await bootVirtio(`${wait} ports=1 echo`, { ...machine, console: true })
    const run = vm.run({ timeout: RUN_LIMIT })
    let sent = 0
    for (const line of ['hello\n', '\n', 'üµ世\n', `${'long '.repeat(80)}\n`]) {
      vm.console.write(line)
      expect((await vm.console.waitFor('\n')).before).toBe(line.slice(0, -1))
      sent += Buffer.byteLength(line)
    }
    vm.console.write('quit\n')
    expect(await run).toMatchObject(SUCCESS)
    expect(vm.serial.output).toBe(`console 0 port 0: echoed ${sent} bytes\ndone\n`)
  })

  it('brings all that is written at once, in order', async () => {
    const vm = await bootVirtio(`${wait} ports=1 echo`, { ...machine, console: true })
    const lines = Array.from({ length: 500 }, (_, i) => `line ${i} ${'.'.repeat(i % 40)}\n`)
    // Before the run, all at once: the guest has room for 2 KiB.
    for (const line of lines) vm.console.write(line)
    vm.console.write('quit\n')
    expect(await linesOf(vm)).toEqual([`console 0 port 0: echoed ${lines.join('').length} bytes`])
    expect(vm.console.output).toBe(lines.join(''))
  })

  it('gives a slow reader all that a fast guest sends', async () => {
    const vm = await bootVirtio(`${wait} ports=1 bench-console=256K,4K,8`, { ...machine, console: true })
    let received = ''
    const slow = new Writable({
      highWaterMark: 1,
      async write(chunk: Buffer, _encoding, done) {
        received += chunk
        for (let i = 0; i < 10; i++) await turn()
        done()
      },
    })
    const reading = pipeline(vm.console, slow)
    expect(await vm.run({ timeout: RUN_LIMIT })).toMatchObject(SUCCESS)
    await vm.close()
    await reading
    expect(received === LINE.repeat(4 * KIB)).toBe(true)
    expect(vm.console.droppedBytes).toBe(0)
  })

  it('holds a guest back that outruns its reader, who loses nothing', async () => {
    const vm = await bootVirtio(`${wait} ports=1 bench-console=2M,64K,8`, { ...machine, console: true })
    let received = 0
    let reading = false
    // Whoever listens for `readable` is a reader, also while it does not read.
    vm.console.on('readable', () => {
      while (reading) {
        const chunk: Buffer | null = vm.console.read()
        if (chunk === null) return
        received += chunk.length
      }
    })
    const run = vm.run({ timeout: RUN_LIMIT })
    await once(vm.console, 'readable')
    // As far as it gets, or until it has had many turns for nothing.
    for (let still = 0, last = 0; still < 50 && vm.running; still++) {
      const sent = vm.console.output.length + vm.console.droppedBytes
      if (sent !== last) still = 0
      last = sent
      await turn()
    }
    expect({ running: vm.running, dropped: vm.console.droppedBytes }).toEqual({ running: true, dropped: 0 })
    reading = true
    vm.console.emit('readable')
    expect(await run).toMatchObject(SUCCESS)
    await until(() => received === 2048 * KIB)
    expect(vm.console.droppedBytes).toBe(0)
  })

  it('keeps the last MiB where nobody listens, and does not hold the guest up', async () => {
    const vm = await bootVirtio(`${wait} ports=1 bench-console=1280K,64K`, { ...machine, console: true })
    expect(await vm.run({ timeout: RUN_LIMIT })).toMatchObject(SUCCESS)
    expect(vm.console.output === LINE.repeat(16 * KIB)).toBe(true)
    expect(vm.console.droppedBytes).toBe(256 * KIB)
  })

  it('tells the guest of its size, at the start and whenever it changes', async () => {
    const size = { columns: 120, rows: 40 }
    const vm = await bootVirtio(`${wait} ports=1 console echo`, { ...machine, console: { size } })
    const run = vm.run({ timeout: RUN_LIMIT })
    await vm.serial.waitFor('console 0 port 0: open, console, 120x40\n')
    for (const [columns, rows] of [
      [100, 30],
      [1, 65535],
    ] as const) {
      vm.console.resize({ columns, rows })
      await vm.serial.waitFor(`console 0 port 0: open, console, ${columns}x${rows}\n`)
    }
    vm.console.write('quit\n')
    expect(await run).toMatchObject(SUCCESS)
  })

  it('has further ports, which guests find by their names', async () => {
    const ports = ['org.example.agent', 'log']
    const vm = await bootVirtio(`${wait} ports=3 console echo=1`, { ...machine, console: { ports } })
    const [agent, log] = ports.map((name) => vm.consolePort(name))
    const events: string[] = []
    for (const port of [vm.console, agent!, log!]) {
      port.on('guestOpen', () => events.push(`${port.name} open`))
      port.on('guestClose', () => events.push(`${port.name} closed`))
      expect(port.guestOpen).toBe(false)
    }
    const run = vm.run({ timeout: RUN_LIMIT })
    agent!.write('to the agent\n')
    expect((await agent!.waitFor('to the agent\n')).before).toBe('hello from port 1\n')
    expect([vm.console.guestOpen, agent!.guestOpen, log!.guestOpen]).toEqual([true, true, true])
    agent!.write('quit\n')
    expect(await run).toMatchObject(SUCCESS)
    expect(vm.serial.output.split('\n')).toEqual([
      ...consoleLines(ports),
      'console 0 port 1: echoed 13 bytes',
      'done',
      '',
    ])
    expect(vm.console.output).toBe('hello from port 0\n')
    expect(log!.output).toBe('hello from port 2\n')
    await vm.close()
    await until(() => events.length === 6)
    expect(events.slice(0, 3).sort()).toEqual(['log open', 'org.example.agent open', 'undefined open'])
    expect(events.slice(3).sort()).toEqual(['log closed', 'org.example.agent closed', 'undefined closed'])
  })

  it('tells the guest when its end of a port is closed', async () => {
    const vm = await bootVirtio(`${wait} ports=2 echo`, { ...machine, console: { ports: ['agent'] } })
    const run = vm.run({ timeout: RUN_LIMIT })
    vm.console.write('up\n')
    await vm.console.waitFor('up\n')
    vm.consolePort('agent').destroy()
    await vm.serial.waitFor('console 0 port 1: closed, named agent\n')
    vm.console.write('quit\n')
    expect(await run).toMatchObject(SUCCESS)
  })
})

describe.each(EXECUTIONS)('the end of the console (%s)', (execution) => {
  it('comes with the end of the machine: readers end, and what is written goes nowhere', async () => {
    const vm = await bootVirtio('ports=1 console', {
      execution,
      irqchip: 'none',
      console: { ports: ['agent'] },
    })
    const chunks: Buffer[] = []
    vm.console.on('data', (chunk: Buffer) => chunks.push(chunk))
    vm.consolePort('agent').resume()
    const end = Promise.all([once(vm.console, 'end'), once(vm.consolePort('agent'), 'end')])
    expect(await vm.run({ timeout: RUN_LIMIT })).toMatchObject(SUCCESS)
    await vm.close()
    vm.console.write('too late\n')
    await end
    expect(Buffer.concat(chunks).toString()).toBe('hello from port 0\n')
    expect(vm.console.output).toBe('hello from port 0\n')
  })

  it('loses nothing that a guest sent just before its own', async () => {
    const TRANSMITQ = 1
    const code = program(startQueue(TRANSMITQ), writeRegister(QueueNotify, TRANSMITQ), debugExit(1))
    for (let i = 0; i < times(20); i++) {
      const vm = await boot({ image: code, mode: 'long' }, { execution, console: true })
      vm.memory.write(0x30_0000, Buffer.from('last words'))
      offerChain(vm, [{ address: 0x30_0000, length: 10 }])
      expect(await vm.run({ timeout: RUN_LIMIT })).toMatchObject({ reason: 'debug-exit', code: 1 })
      expect(vm.console.output).toBe('last words')
      await vm.close()
    }
  })

  it('of a run rejects those who wait in vain, and not those who do not', async () => {
    const vm = await bootVirtio('ports=1 console', { execution, irqchip: 'none', console: true })
    const met = vm.console.waitFor(/port (\d)/)
    const vain = vm.console.waitFor('never')
    await Promise.all([
      expect(vain).rejects.toEqual(errorWith('ERR_SERIAL_ENDED', /console/)),
      expect(vm.run({ timeout: RUN_LIMIT })).resolves.toMatchObject(SUCCESS),
    ])
    expect(await met).toMatchObject({ text: 'port 0', groups: ['0'] })
  })

  it('leaves input that no guest took without an error', async () => {
    const vm = await boot({ image: program(HLT), mode: 'long' }, { execution, console: true })
    vm.console.write('nobody reads this\n')
    expect(await vm.run()).toMatchObject({ reason: 'halt' })
    await vm.close()
    expect(vm.console.output).toBe('')
  })
})

describe('a machine without', () => {
  it('a console says how to get one', async () => {
    const vm = await boot(program(HLT))
    expect(() => vm.console).toThrow(errorWith('ERR_NO_DEVICE', /create it with \{ console: true \}/))
    expect(() => vm.consolePort('x')).toThrow(errorWith('ERR_NO_DEVICE', /name them in console.ports/))
    const none = await boot(program(HLT), { console: false })
    expect(() => none.console).toThrow(errorWith('ERR_NO_DEVICE'))
  })

  it('a port of that name names those that it has', async () => {
    const vm = await boot({ image: program(HLT), mode: 'long' }, { console: { ports: ['agent', 'log'] } })
    expect(() => vm.consolePort('agnet')).toThrow(
      errorWith('ERR_NO_DEVICE', /'agent', 'log'.* received 'agnet'/),
    )
    expect(vm.consolePort('log').name).toBe('log')
  })
})

describe('wrong options are refused', () => {
  it.each([
    ['text', 'yes', 'ERR_INVALID_ARGUMENT', /true, false or \{ ports, size \} for console/],
    ['a key misspelt', { port: ['x'] }, 'ERR_UNKNOWN_OPTION', /did you mean 'ports'/],
    ['a port', { ports: 'x' }, 'ERR_INVALID_ARGUMENT', /an array of names for console.ports/],
    [
      'a port twice',
      { ports: ['x', 'x'] },
      'ERR_INVALID_ARGUMENT',
      /no other port has for console.ports\[1\]/,
    ],
    ['a port without a name', { ports: ['x', ''] }, 'ERR_INVALID_ARGUMENT', /console.ports\[1\]/],
    ['a number for a port', { ports: [5] }, 'ERR_INVALID_ARGUMENT', /console.ports\[0\]/],
    ['a path for a port', { ports: ['../x'] }, 'ERR_INVALID_ARGUMENT', /with no '\/'/],
    ['a long name', { ports: ['ü'.repeat(1000)] }, 'ERR_INVALID_ARGUMENT', /bytes of text/],
    [
      'too many ports',
      { ports: Array.from({ length: 1000 }, (_, i) => `p${i}`) },
      'ERR_INVALID_ARGUMENT',
      /ports/,
    ],
    ['a number for the size', { size: 80 }, 'ERR_INVALID_ARGUMENT', /\{ columns, rows \} for console.size/],
    ['a size misspelt', { size: { column: 80, rows: 25 } }, 'ERR_UNKNOWN_OPTION', /did you mean 'columns'/],
    ['no columns', { size: { columns: 0, rows: 25 } }, 'ERR_INVALID_ARGUMENT', /1 to 65535 for columns/],
    ['no rows', { size: { columns: 80 } }, 'ERR_INVALID_ARGUMENT', /1 to 65535 for rows/],
  ] as const)('%s', async (_what, options, code, message) => {
    await expect(create(options)).rejects.toEqual(errorWith(code, message))
  })

  it('a size that no console has', async () => {
    const vm = await boot({ image: program(HLT), mode: 'long' }, { console: true })
    for (const size of [
      { columns: 0, rows: 1 },
      { columns: 1, rows: 65536 },
      { columns: 1.5, rows: 1 },
    ]) {
      expect(() => vm.console.resize(size)).toThrow(errorWith('ERR_INVALID_ARGUMENT', /1 to 65535/))
    }
  })
})
