import { describe, expect, it } from 'vitest'
import type { RunReport, RunResult } from '../../src/index.js'
import type { MmioExit } from '../../src/kvm/exits.js'
import { ExitLog } from '../../src/machine/exit-log.js'
import { modeOf } from '../../src/machine/report.js'
import {
  type Code,
  debugExit,
  dword,
  flat,
  HLT,
  inb,
  long,
  outb,
  program,
  qword,
  SPIN,
  UD2,
} from '../helpers/code.js'
import { onEmulated, onPvm } from '../helpers/guests.js'
import { RUN_LIMIT } from '../helpers/limits.js'
import { boot, EXECUTIONS } from './boot.js'

/** Where no RAM is: nothing can be executed there. */
const NOWHERE = 0xd000_0000
/** Where flat images of protected and long mode start. */
const START = 0x10_0000
/** Jumps to where no RAM is, in protected and long mode: the run fails. */
const LEAVE: Code = [...flat.movEbx(NOWHERE), ...flat.JMP_EBX]

function reportOf(result: RunResult): RunReport {
  expect(result.report).toBeDefined()
  return result.report!
}

describe.each(EXECUTIONS)('the report (%s)', (execution) => {
  it('25: of a triple fault in long mode has the processor as it was, or says it was reset', async () => {
    const vm = await boot({ image: program(flat.movEax(42), UD2), mode: 'long' }, { execution })
    const result = await vm.run()
    expect(result.reason).toBe('shutdown')
    const report = reportOf(result)
    const [cpu] = report.vcpus
    expect([report.vcpu, report.vcpus.length, cpu!.vcpu]).toEqual([0, 1, 0])
    if (onPvm || onEmulated) expect(cpu!.wasReset).toBe(onEmulated)
    if (cpu!.wasReset) {
      expect(cpu).toMatchObject({ mode: 'real', registers: { rip: 0xfff0n } })
      expect(cpu!.code).toHaveLength(0)
    } else {
      expect(cpu).toMatchObject({ mode: 'long', registers: { rip: BigInt(START + 5), rax: 42n } })
      expect([...cpu!.code.slice(0, 2)]).toEqual(UD2)
      expect(cpu!.code).toHaveLength(16)
    }
    expect(report.lastExits.at(-1)).toEqual({ vcpu: 0, kind: 'shutdown' })
  })

  it.skipIf(onPvm)(
    '25: of a triple fault in real mode does the same (PVM: ignores the limit of the table)',
    async () => {
      // lidt [0x7d00], which is a limit of 0
      const vm = await boot(program([0x0f, 0x01, 0x1e, 0x00, 0x7d], UD2), { execution })
      const result = await vm.run()
      expect(result).toMatchObject({ reason: 'shutdown', vcpu: 0 })
      const [cpu] = reportOf(result).vcpus
      if (onEmulated) expect(cpu!.wasReset).toBe(true)
      expect(cpu).toMatchObject({ mode: 'real', registers: { rip: cpu!.wasReset ? 0xfff0n : 0x7c05n } })
    },
  )

  it('25: of an exception whose handler is where no memory is shows that place', async () => {
    const vm = await boot({ image: program(UD2), mode: 'long' }, { execution })
    const [cpu] = vm.vcpus
    const idt = 0x20_0000
    const { selector } = cpu!.specialRegisters.cs
    // A 64-bit interrupt gate for #UD (Intel SDM vol. 3A, "64-Bit Mode IDT").
    vm.memory.write(
      idt + 6 * 16,
      Uint8Array.from([0, 0, selector, 0, 0, 0x8e, 0x00, 0xd0, ...dword(0), ...dword(0)]),
    )
    cpu!.specialRegisters = { idt: { base: BigInt(idt), limit: 0xfff } }
    const result = await vm.run()
    expect(result).toMatchObject({ reason: 'failed', error: { code: 'ERR_GUEST_EMULATION' } })
    const report = reportOf(result)
    expect(report).toMatchObject({
      vcpu: 0,
      vcpus: [
        {
          state: 'runnable',
          mode: 'long',
          registers: { rip: BigInt(NOWHERE) },
          specialRegisters: { idt: { base: BigInt(idt) } },
          wasReset: false,
        },
      ],
      lastExits: [{ vcpu: 0, kind: 'internal-error' }],
    })
    expect(report.vcpus[0]!.code).toHaveLength(0)
    // What the processor pushed: where the exception came from.
    expect(vm.memory.readBigUint64(Number(report.vcpus[0]!.registers.rsp))).toBe(BigInt(START))
  })

  it.each([
    ['real', 0x7c00],
    ['protected', START],
    ['long', START],
  ] as const)('25: of a timeout shows what the guest was doing, in %s mode', async (mode, start) => {
    const vm = await boot({ image: program(SPIN, [0x90]), mode }, { execution })
    const result = await vm.run({ timeout: 5 })
    expect(result).toMatchObject({ reason: 'stopped', by: 'timeout' })
    const report = reportOf(result)
    expect(report).toMatchObject({
      vcpu: undefined,
      vcpus: [
        {
          vcpu: 0,
          state: 'runnable',
          mode,
          registers: { rip: BigInt(start) },
          specialRegisters: { cs: expect.any(Object) },
          exception: undefined,
          wasReset: false,
        },
      ],
      lastExits: [],
    })
    expect([...report.vcpus[0]!.code.slice(0, 3)]).toEqual([...SPIN, 0x90])
  })

  it.each([
    ['halts', program(HLT), {}],
    ['writes to debug-exit', program(debugExit(1)), {}],
    ['asks for a reset', program(outb(0x64, 0xfe), SPIN), {}],
    ['is aborted', program(SPIN), { signal: AbortSignal.abort() }],
  ])('is none where the guest %s', async (_what, kernel, options) => {
    const vm = await boot(kernel, { execution })
    expect(await vm.run(options)).not.toHaveProperty('report')
  })

  it('has the vCPU that it ended on first, then the others that were started', async () => {
    const vm = await boot(
      { image: program(SPIN, UD2), mode: 'long' },
      { execution, cpus: 4, irqchip: 'none' },
    )
    const run = vm.run()
    vm.vcpus[3]!.start({ rip: BigInt(START) })
    vm.vcpus[2]!.start({ rip: BigInt(START + SPIN.length) })
    const result = await run
    expect(result).toMatchObject({ reason: 'shutdown', vcpu: 2 })
    const { vcpu, vcpus } = reportOf(result)
    expect([vcpu, ...vcpus.map((cpu) => cpu.vcpu)]).toEqual([2, 2, 0, 3])
  })
})

describe('the code of a report', () => {
  it('is at the code segment, which has a base in real mode', async () => {
    const vm = await boot(program(HLT, SPIN, [0x12, 0x34]))
    const { cs } = vm.vcpus[0]!.specialRegisters
    vm.vcpus[0]!.specialRegisters = { cs: { ...cs, selector: 0x07c0, base: 0x7c00n } }
    vm.vcpus[0]!.registers.rip = 1n
    const { vcpus } = reportOf(await vm.run({ timeout: 5 }))
    expect(vcpus[0]!.registers.rip).toBe(1n)
    expect([...vcpus[0]!.code.slice(0, 4)]).toEqual([...SPIN, 0x12, 0x34])
  })

  it('ends where the memory ends', async () => {
    const end = 0x40_0000
    const vm = await boot(program(SPIN))
    vm.memory.write(end - 3, program(SPIN, [0x99]))
    const { cs } = vm.vcpus[0]!.specialRegisters
    // The only real-mode segments that reach there have a base that no selector can say.
    vm.vcpus[0]!.specialRegisters = { cs: { ...cs, base: BigInt(end - 0x100) } }
    vm.vcpus[0]!.registers.rip = 0xfdn
    const { vcpus } = reportOf(await vm.run({ timeout: 5 }))
    expect([...vcpus[0]!.code]).toEqual([...SPIN, 0x99])
  })

  it('stays when the machine is closed, or changes its memory', async () => {
    const vm = await boot(program(SPIN))
    const { vcpus } = reportOf(await vm.run({ timeout: 5 }))
    vm.memory.write(0x7c00, program(HLT, HLT))
    await vm.close()
    expect([...vcpus[0]!.code.slice(0, 2)]).toEqual(SPIN)
  })
})

describe('the exception of a report', () => {
  /** A timeout before the guest's first instruction. */
  const AT_ONCE = { signal: AbortSignal.abort(new DOMException('too late', 'TimeoutError')) }

  it.each([
    [14, true, 5, { vector: 14, name: '#PF', errorCode: 5 }],
    [13, true, 0, { vector: 13, name: '#GP', errorCode: 0 }],
    [6, false, 0, { vector: 6, name: '#UD', errorCode: undefined }],
    [19, false, 0, { vector: 19, name: '#XM', errorCode: undefined }],
  ])('is the one that is under way: %i', async (nr, hasErrorCode, errorCode, expected) => {
    const vm = await boot({ image: program(SPIN), mode: 'long' })
    const vcpu = vm.vcpus[0]!.unsafeVcpu
    const events = vcpu.getVcpuEvents()
    vcpu.setVcpuEvents({
      ...events,
      exception: { injected: true, pending: false, nr, hasErrorCode, errorCode },
    })
    const result = await vm.run(AT_ONCE)
    expect(result).toMatchObject({ reason: 'stopped', by: 'timeout' })
    expect(reportOf(result).vcpus[0]!.exception).toEqual(expected)
  })
})

describe('the last exits', () => {
  it('tell what each access did, of every width, the oldest first', async () => {
    let value = 0x7f
    const vm = await boot(
      {
        image: program(
          flat.movEax(0x8765_43f1),
          [0xe6, 0x10], // out 0x10, al
          [0x66, 0xe7, 0x10], // out 0x10, ax
          [0xe7, 0x10], // out 0x10, eax
          inb(0x10),
          [0x66, 0xe5, 0x10], // in ax, 0x10
          [0xe5, 0x10], // in eax, 0x10
          flat.movEbx(NOWHERE + 8),
          long.movRax(0x1122_3344_f566_7788n),
          flat.STORE_AL,
          flat.STORE_AX,
          flat.STORE_EAX,
          long.STORE_RAX,
          flat.LOAD_AL,
          flat.LOAD_EAX,
          long.LOAD_RAX,
          LEAVE,
        ),
        mode: 'long',
      },
      {
        devices: [
          { name: 'ports', ports: { base: 0x10, length: 4 }, read: () => 0x8000_0000 + ++value },
          {
            name: 'registers',
            mmio: { base: NOWHERE + 8, length: 8 },
            read: (offset) => 0xfeed_0000 + offset,
          },
        ],
      },
    )
    const result = await vm.run()
    expect(result.reason).toBe('failed')
    const io = { vcpu: 0, kind: 'io', address: 0x10 }
    const mmio = { vcpu: 0, kind: 'mmio', address: NOWHERE + 8 }
    expect(reportOf(result).lastExits).toEqual([
      { ...io, direction: 'out', size: 1, value: 0xf1 },
      { ...io, direction: 'out', size: 2, value: 0x43f1 },
      { ...io, direction: 'out', size: 4, value: 0x8765_43f1 },
      { ...io, direction: 'in', size: 1, value: 0x80 },
      { ...io, direction: 'in', size: 2, value: 0x81 },
      { ...io, direction: 'in', size: 4, value: 0x8000_0082 },
      { ...mmio, direction: 'write', size: 1, value: 0x88 },
      { ...mmio, direction: 'write', size: 2, value: 0x7788 },
      { ...mmio, direction: 'write', size: 4, value: 0xf566_7788 },
      { ...mmio, direction: 'write', size: 8, value: 0xf566_7788 },
      { ...mmio, direction: 'read', size: 1, value: 0x00 },
      { ...mmio, direction: 'read', size: 4, value: 0xfeed_0000 },
      { ...mmio, direction: 'read', size: 8, value: 0xfeed_0000 },
      { vcpu: 0, kind: 'internal-error' },
    ])
  })

  it('23: are 64, of all runs, without those that the host caused', async () => {
    const writes = Array.from({ length: 100 }, (_, i) => outb(0x10, i))
    const vm = await boot({
      image: program(...writes, HLT, outb(0x10, 200), LEAVE),
      mode: 'protected',
    })
    expect(await vm.run({ timeout: RUN_LIMIT })).toMatchObject({ reason: 'halt' })
    const { lastExits } = reportOf(await vm.run({ timeout: RUN_LIMIT }))
    expect(lastExits).toHaveLength(64)
    expect(lastExits.map(({ kind, value }) => value ?? kind)).toEqual([
      ...Array.from({ length: 61 }, (_, i) => 39 + i),
      'halt',
      200,
      'internal-error',
    ])
  })

  it('have the access that made a device fail', async () => {
    const vm = await boot(program(outb(0x10, 7), HLT), {
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
    const result = await vm.run()
    expect(result).toMatchObject({ reason: 'failed', vcpu: 0, error: { code: 'ERR_DEVICE_FAILED' } })
    expect(reportOf(result).lastExits).toEqual([
      { vcpu: 0, kind: 'io', direction: 'out', address: 0x10, size: 1, value: 7 },
    ])
  })

  it('have the first value of a string instruction', async () => {
    let next = 0x20
    const vm = await boot(
      {
        image: program(
          flat.movDx(0x10),
          [0xbf, ...dword(0x20_0000)], // mov edi, 0x200000
          [0xb9, ...dword(4)], // mov ecx, 4
          [0xfc, 0xf3, 0x6c], // cld; rep insb
          LEAVE,
        ),
        mode: 'protected',
      },
      { devices: [{ name: 'counter', ports: { base: 0x10, length: 1 }, read: () => ++next }] },
    )
    const { lastExits } = reportOf(await vm.run())
    expect(lastExits[0]).toEqual({
      vcpu: 0,
      kind: 'io',
      direction: 'in',
      address: 0x10,
      size: 1,
      value: 0x21,
    })
    expect([...vm.memory.read(0x20_0000, 4)]).toEqual([0x21, 0x22, 0x23, 0x24])
  })

  it('have no more of a value than its bytes: accesses across a page come in pieces of any size', () => {
    const log = new ExitLog()
    const run = new DataView(Uint8Array.from(qword(0xffee_ddcc_bbaa_9988n)).buffer)
    const data = new Uint8Array(run.buffer)
    for (const size of [1, 2, 3, 4, 5, 6, 7, 8]) {
      const exit = { kind: 'mmio', direction: 'read', address: NOWHERE, size, dataOffset: 0, data }
      log.record(1, exit as MmioExit, run)
    }
    expect(log.records.map(({ value }) => value)).toEqual([
      0x88,
      0x9988,
      0xaa_9988,
      ...new Array<number>(5).fill(0xbbaa_9988),
    ])
    expect(log.records[2]).toEqual({
      vcpu: 1,
      kind: 'mmio',
      direction: 'read',
      address: NOWHERE,
      size: 3,
      value: 0xaa_9988,
    })
  })
})

describe('modeOf', () => {
  const PE = 1n
  const LMA = 1n << 10n
  const VM = 1n << 17n
  it.each([
    ['real', 0n, 0n, 0n, 0],
    ['real', VM, 0n, LMA, 1],
    ['protected', 2n, PE, 0n, 0],
    ['protected', 2n, PE, 0n, 1],
    ['virtual-8086', VM, PE, 0n, 0],
    ['compatibility', 2n, PE, LMA, 0],
    ['compatibility', VM, PE, LMA, 0],
    ['long', 2n, PE, LMA, 1],
  ])('%s: RFLAGS %i, CR0 %i, EFER %i, CS.L %i', (mode, rflags, cr0, efer, l) => {
    expect(modeOf({ rflags } as never, { cr0, efer, cs: { l } } as never)).toBe(mode)
  })
})
