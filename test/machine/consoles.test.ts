import { describe, expect, it } from 'vitest'
import {
  debugExit,
  ECHO,
  HLT,
  IN_AX_DX,
  IN_EAX_DX,
  inb,
  movAx,
  movCx,
  movDi,
  movDx,
  movEax,
  movSi,
  OUT_DX_AX,
  OUT_DX_EAX,
  outb,
  outPort,
  print,
  program,
  SPIN,
  storeAl,
  storeAx,
  storeEax,
} from '../helpers/code.js'
import { boot, EXECUTIONS, errorWith } from './boot.js'

const REP_OUTSB = [0xf3, 0x6e]
const REP_OUTSW = [0xf3, 0x6f]
const REP_INSB = [0xf3, 0x6c]
const REP_INSD = [0xf3, 0x66, 0x6d]

describe.each(EXECUTIONS)('the serial port (%s)', (execution) => {
  it('gives what the guest prints, as text, as a stream and to those who wait', async () => {
    const vm = await boot(program(print('one\ntwo\n'), HLT), { execution })
    const chunks: string[] = []
    vm.serial.on('data', (chunk: Buffer) => chunks.push(chunk.toString()))
    const wait = vm.serial.waitFor(/t(w)o/)
    await vm.run()
    expect(await wait).toMatchObject({ text: 'two', before: 'one\n', groups: ['w'] })
    expect(vm.serial.output).toBe('one\ntwo\n')
    await new Promise((resolve) => setImmediate(resolve))
    expect(chunks.join('')).toBe('one\ntwo\n')
  })

  it('talks both ways while the guest runs', async () => {
    const vm = await boot(program(ECHO), { execution })
    const run = vm.run()
    for (const line of ['hello\n', 'guest\n', '\u00fc\u4e16\n']) {
      vm.serial.write(line)
      expect((await vm.serial.waitFor('\n')).before).toBe(line.trim())
    }
    expect(vm.running).toBe(true)
    vm.serial.write(Buffer.of(0))
    expect(await run).toMatchObject({ reason: 'debug-exit', code: 0 })
  })

  it('keeps input until the guest takes it, also what came before the run', async () => {
    const vm = await boot(program(ECHO), { execution })
    const text = 'x'.repeat(3000)
    vm.serial.write(text)
    vm.serial.write(Buffer.of(0))
    await vm.run()
    expect(vm.serial.output).toBe(text)
  })

  it('rejects a wait when the run ends, and not one that is met by its last output', async () => {
    const vm = await boot(program(print('almost'), HLT), { execution })
    const met = vm.serial.waitFor('almost')
    const vain = vm.serial.waitFor('never')
    await vm.run()
    expect((await met).text).toBe('almost')
    await expect(vain).rejects.toEqual(errorWith('ERR_SERIAL_ENDED', 'the guest halted .*"almost"'))
  })

  it('rejects a wait in time with ERR_TIMEOUT while the guest runs on', async () => {
    const vm = await boot(program(print('here'), SPIN), { execution })
    const run = vm.run()
    await vm.serial.waitFor('here')
    await expect(vm.serial.waitFor('there', { timeout: 30 })).rejects.toEqual(
      errorWith('ERR_TIMEOUT', '"here"'),
    )
    expect(vm.running).toBe(true)
    vm.stop()
    await run
  })

  it('is held back for a slow reader without losing a byte', async () => {
    // A driver that looks at THRE: next: in al, dx(0x3fd); test al, 0x20; jz next; out 0x3f8, bl; inc bx; jnz next
    const image = program(
      [0xbb, 0x00, 0xfc], // mov bx, -1024: so many bytes
      movDx(0x3fd),
      [0xec, 0xa8, 0x20, 0x74, 0xfb],
      movDx(0x3f8),
      [0x88, 0xd8, 0xee, 0x43, 0x75, 0xef],
      HLT,
    )
    const vm = await boot(image, { execution })
    const bytes: number[] = []
    const reading = (async () => {
      for await (const chunk of vm.serial) bytes.push(...(chunk as Buffer))
    })()
    expect(await vm.run()).toMatchObject({ reason: 'halt' })
    await vm.close()
    await reading
    expect(bytes).toEqual(Array.from({ length: 1024 }, (_, i) => i & 0xff))
    expect(vm.statistics.serialDroppedBytes).toBe(0)
  })

  it('24: prints what rep outsb sends, more than fits into one exit', async () => {
    const vm = await boot(program(movDx(0x3f8), movCx(5000), movSi(0x1000), REP_OUTSB, HLT), { execution })
    const text = Array.from({ length: 5000 }, (_, i) => String.fromCharCode(0x20 + (i % 95))).join('')
    vm.memory.write(0x1000, Buffer.from(text))
    await vm.run()
    expect(vm.serial.output).toBe(text)
    expect(vm.vcpus[0]!.registers).toMatchObject({ rcx: 0n, rsi: 0x1000n + 5000n })
  })

  it('24: fills memory with what rep insb takes, and zeros where nothing has come', async () => {
    const vm = await boot(program(movDx(0x3f8), movCx(3000), movDi(0x1000), REP_INSB, HLT), { execution })
    vm.memory.fill(0x1000, 3001, 0xaa)
    vm.serial.write('abc')
    await vm.run()
    expect(Buffer.from(vm.memory.read(0x1000, 3)).toString()).toBe('abc')
    expect(Buffer.from(vm.memory.read(0x1003, 2997)).every((byte) => byte === 0)).toBe(true)
    expect(vm.memory.readUint8(0x1000 + 3000)).toBe(0xaa)
    expect(vm.vcpus[0]!.registers).toMatchObject({ rcx: 0n, rdi: 0x1000n + 3000n })
  })

  it('24: takes wider accesses as accesses to the registers behind one another', async () => {
    const image = program(
      outPort(0x3fb, 0x80), // DLAB: the next two registers are the divisor
      movDx(0x3f8),
      movAx(0x1234),
      OUT_DX_AX,
      IN_AX_DX,
      storeAx(0x600),
      movDx(0x3fc), // MCR, LSR (ignored), MSR (ignored), SCR
      movEax(0x5500_0003),
      OUT_DX_EAX,
      IN_EAX_DX,
      storeEax(0x604),
      outPort(0x3fb, 0x03),
      movDx(0x3f8),
      movAx(0x0041), // THR and IER
      OUT_DX_AX,
      HLT,
    )
    const vm = await boot(image, { execution })
    await vm.run()
    expect(vm.memory.readUint16(0x600)).toBe(0x1234)
    expect([vm.memory.readUint8(0x604), vm.memory.readUint8(0x607)]).toEqual([0x03, 0x55])
    expect(vm.serial.output).toBe('A')
  })

  it('24: survives rep outsw and rep insd, which make no sense there', async () => {
    const image = program(
      movDx(0x3f8),
      movCx(300),
      movSi(0x1000),
      REP_OUTSW,
      movCx(300),
      movDi(0x2000),
      REP_INSD,
      debugExit(1),
    )
    const vm = await boot(image, { execution })
    expect(await vm.run()).toMatchObject({ reason: 'debug-exit', code: 1 })
    expect(vm.serial.output).toBe('\0'.repeat(300))
  })
})

describe.each(EXECUTIONS)('the other consoles (%s)', (execution) => {
  it('give POST codes, the last 64 of them, the oldest first', async () => {
    const codes = Array.from({ length: 70 }, (_, i) => i)
    const vm = await boot(program(...codes.map((code) => outb(0x80, code)), HLT), { execution })
    await vm.run()
    expect(vm.postCodes).toEqual(codes.slice(6))
  })

  it('give the debug console as text, as a stream and to those who wait', async () => {
    const vm = await boot(program(inb(0xe9), storeAl(0x600), print('debug\nme', 0xe9), SPIN), { execution })
    const run = vm.run()
    expect(await vm.debugConsole.waitFor('\n')).toMatchObject({ before: 'debug' })
    await vm.debugConsole.waitFor('me')
    expect(vm.debugConsole.output).toBe('debug\nme')
    // That is how a guest detects it.
    expect(vm.memory.readUint8(0x600)).toBe(0xe9)
    vm.stop()
    await run
    expect(vm.debugConsole.read()?.toString()).toBe('debug\nme')
  })

  it('give the text screen', async () => {
    const image = program(
      movAx(0xb800),
      [0x8e, 0xc0], // mov es, ax
      movAx(0x0748), // 'H', grey on black
      [0x26, 0xa3, 0x00, 0x00], // mov es:[0], ax
      movAx(0x0769),
      [0x26, 0xa3, 0x02, 0x00],
      HLT,
    )
    const vm = await boot(image, { execution })
    await vm.run()
    expect(vm.screen.text().split('\n')[0]).toMatch(/^Hi\s*$/)
    expect(vm.memory.readUint16(0xb8000)).toBe(0x0748)
  })
})
