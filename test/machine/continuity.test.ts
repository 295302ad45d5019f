import { readFileSync } from 'node:fs'
import { beforeAll, describe, expect, it, onTestFinished } from 'vitest'
import { VirtualMachine, type VirtualMachineOptions } from '../../src/index.js'
import { EchoHashDevice } from '../helpers/echo-hash-device.js'
import { imageOf, onEmulated, onPvm } from '../helpers/guests.js'
import { MACHINES, SUCCESS } from '../helpers/interrupts.js'
import { RUN_LIMIT } from '../helpers/limits.js'
import { boot, EXECUTIONS } from './boot.js'

const IMAGE = imageOf({ image: 'continuity.elf' })

function bootContinuity(cmdline: string, options: Partial<VirtualMachineOptions>): Promise<VirtualMachine> {
  return boot({ image: IMAGE, cmdline }, options)
}

/** All that the guest prints. */
function outputWith(hash: string): string {
  const progress = Array.from({ length: 10 }, (_, tenth) => `progress ${(tenth + 1) * 10}\n`).join('')
  return `continuity: started\n${progress}hash ${hash}\n`
}

/** The answer of one processor to `rounds=50` alone. */
const WITHOUT_INTERRUPTS = '12c7c77d85445a83'

describe.each(MACHINES)('with irqchip %s, %s,', (irqchip, execution) => {
  it.each([
    [1, 'pit', 'a0ec71fe74dfde62'],
    [2, 'pit', '457ded1cc04cbe33'],
    [4, 'pit', '5b11d42e643d40d0'],
    [1, 'lapic', 'a55e2d02d80170a4'],
    [2, 'lapic', 'f6e7e89f6e9c44bc'],
    [4, 'lapic', '4e6249b7b0647adc'],
  ])('%d processors with the ticks of the %s give the one answer', async (cpus, timer, hash) => {
    const device = new EchoHashDevice()
    const cmdline = `cpus=${cpus} rounds=50 ticks=10 timer=${timer} device=1`
    const vm = await bootContinuity(cmdline, { irqchip, execution, cpus, devices: [device] })
    expect(await vm.run({ timeout: RUN_LIMIT })).toMatchObject(SUCCESS)
    expect(vm.serial.output).toBe(outputWith(hash))
    expect(device.accesses).toBe(16)
  })

  it.each([
    [1, WITHOUT_INTERRUPTS],
    [2, '5d838dc6f830fc84'],
  ])('%d processors that end with cli; hlt give the one answer', async (cpus, hash) => {
    const vm = await bootContinuity(`cpus=${cpus} rounds=50 halt=1`, { irqchip, execution, cpus })
    expect(await vm.run({ timeout: RUN_LIMIT })).toMatchObject({ reason: 'halt' })
    expect(vm.serial.output).toBe(outputWith(hash))
  })
})

it.each(EXECUTIONS)('without an irqchip the guest gives the one answer (%s)', async (execution) => {
  const vm = await bootContinuity('rounds=50', { irqchip: 'none', execution })
  expect(await vm.run({ timeout: RUN_LIMIT })).toMatchObject(SUCCESS)
  expect(vm.serial.output).toBe(outputWith(WITHOUT_INTERRUPTS))
})

/** Where the guest's inner loop is, in memory. */
function innerLoop(): { readonly start: bigint; readonly end: bigint } {
  const LOAD_ADDRESS = 0x10_0000
  const image = readFileSync(IMAGE)
  const segmentOffset = Number(image.readBigUInt64LE(Number(image.readBigUInt64LE(32)) + 8))
  const at = (code: readonly number[]) => {
    const offset = image.indexOf(Buffer.from(code))
    expect(offset).toBeGreaterThan(0)
    return BigInt(LOAD_ADDRESS + offset - segmentOffset)
  }
  return {
    start: at([0x4c, 0x11, 0xf8, 0x48, 0x13, 0x04, 0x0f]), // adc %r15, %rax; adc (%rdi, %rcx), %rax
    end: at([0x0f, 0xb7, 0xc9, 0x48, 0xff, 0xce]), // movzwl %cx, %ecx; dec %rsi
  }
}

/** Enough that most time goes there. */
const LOOP_ROUNDS = onEmulated ? 100 : 2500

function loopOptions(device: EchoHashDevice): VirtualMachineOptions {
  const cmdline = `rounds=${LOOP_ROUNDS} ticks=2 timer=lapic device=1`
  return {
    kernel: { image: IMAGE, cmdline },
    memory: '4M',
    irqchip: 'split',
    execution: 'inline',
    devices: [device],
  }
}

/** A machine that was stopped somewhere in the inner loop. */
async function stoppedInLoop(device: EchoHashDevice): Promise<VirtualMachine> {
  const { start, end } = innerLoop()
  const vm = await VirtualMachine.create(loopOptions(device))
  onTestFinished(() => vm.close())
  const running = vm.run({ timeout: RUN_LIMIT })
  await vm.serial.waitFor('progress 10\n')
  vm.stop()
  expect(await running).toMatchObject({ reason: 'stopped' })
  for (;;) {
    const { rip } = vm.vcpus[0]!.registers
    if (rip >= start && rip < end) return vm
    expect(await vm.run({ timeout: 1 })).toMatchObject({ reason: 'stopped' })
  }
}

type Change = readonly [string, (vm: VirtualMachine, device: EchoHashDevice) => void]

/** Inverts a bit of the XSAVE area, whose first 512 bytes are those of FXSAVE. */
function inXsave(name: string, byte: number, mask = 1): Change {
  return [
    name,
    ({ vcpus }) => {
      const area = vcpus[0]!.unsafeVcpu.getXsave()
      area[byte]! ^= mask
      vcpus[0]!.unsafeVcpu.setXsave(area)
    },
  ]
}

function inLapic(name: string, offset: number, byte: number): Change {
  return [
    name,
    ({ vcpus }) => {
      const registers = vcpus[0]!.unsafeVcpu.getLapic()
      registers[offset]! = byte
      vcpus[0]!.unsafeVcpu.setLapic(registers)
    },
  ]
}

const GENERAL_REGISTERS = [
  ...(['rax', 'rbx', 'rcx', 'rdx', 'rsi', 'rdi', 'rbp', 'rsp', 'r8', 'r9', 'r10', 'r11', 'r12'] as const),
  ...(['r13', 'r14', 'r15'] as const),
]
const MSRS = {
  'FS base': 0xc0000100,
  'GS base': 0xc0000101,
  'kernel GS base': 0xc0000102,
  STAR: 0xc0000081,
  LSTAR: 0xc0000082,
  CSTAR: 0xc0000083,
  SFMASK: 0xc0000084,
  SYSENTER_CS: 0x174,
  SYSENTER_ESP: 0x175,
  SYSENTER_EIP: 0x176,
  PAT: 0x277,
  'MTRR base 7': 0x20e,
  // KVM on PVM has no RDTSCP for guests.
  ...(onPvm ? {} : { TSC_AUX: 0xc0000103 }),
}
const USER_PAGE = 0x1000

const AVX_CHANGES: readonly Change[] = [
  ['XCR0', ({ vcpus }) => vcpus[0]!.unsafeVcpu.setXcrs([{ xcr: 0, value: 1n }])],
  inXsave('the upper half of YMM0', 576),
  inXsave('the upper half of YMM15', 576 + 255),
]

const CHANGES: readonly Change[] = [
  ...GENERAL_REGISTERS.map((name): Change => {
    // 16 is the distance of two cells in the worker's memory, where pointers lead.
    return [name, ({ vcpus }) => (vcpus[0]!.registers = { [name]: vcpus[0]!.registers[name] ^ 16n })]
  }),
  ['the carry flag', ({ vcpus }) => (vcpus[0]!.registers = { rflags: vcpus[0]!.registers.rflags ^ 1n })],
  inXsave('the rounding of the FPU', 1, 0x08),
  inXsave('the top of the FPU stack', 3, 0x08),
  inXsave('the rounding of SSE', 25, 0x20),
  ...[0, 3, 7].map((n) => inXsave(`ST${n}`, 32 + 16 * n + 6)),
  ...[0, 7, 13, 14, 15].map((n) => inXsave(`XMM${n}`, 160 + 16 * n + 13)),
  ...Object.entries(MSRS).map(([name, index]): Change => {
    return [
      name,
      ({ vcpus }) => {
        const [entry] = vcpus[0]!.unsafeVcpu.getMsrs([index])
        expect(vcpus[0]!.unsafeVcpu.setMsrs([{ index, value: entry!.value ^ 0x100_0000n }])).toBe(1)
      },
    ]
  }),
  // QEMU's processor does not tell KVM that a guest has enabled AVX.
  ...(onEmulated ? [] : AVX_CHANGES),
  ['CR2', ({ vcpus }) => (vcpus[0]!.specialRegisters = { cr2: 0n })],
  ...[0, 1, 2, 3].map((n): Change => {
    return [
      `DR${n}`,
      ({ vcpus }) => {
        const registers = vcpus[0]!.unsafeVcpu.getDebugRegs()
        const db = registers.db.map((address, i) => (i === n ? 0n : address)) as [
          bigint,
          bigint,
          bigint,
          bigint,
        ]
        vcpus[0]!.unsafeVcpu.setDebugRegs({ ...registers, db })
      },
    ]
  }),
  [
    'DR6',
    ({ vcpus: [cpu] }) =>
      cpu!.unsafeVcpu.setDebugRegs({ ...cpu!.unsafeVcpu.getDebugRegs(), dr6: 0xffff0ff0n }),
  ],
  [
    'DR7',
    ({ vcpus: [cpu] }) => cpu!.unsafeVcpu.setDebugRegs({ ...cpu!.unsafeVcpu.getDebugRegs(), dr7: 0x400n }),
  ],
  inLapic('LAPIC TPR', 0x80, 0),
  inLapic('LAPIC LDR', 0xd3, 0),
  inLapic('LAPIC SVR', 0xf0, 0xfe),
  inLapic('LAPIC LINT0', 0x352, 1),
  ["a page of the worker's memory", (vm) => vm.memory.fill(Number(vm.vcpus[0]!.registers.rdi), USER_PAGE)],
  ['the device', (_vm, device) => device.restoreState({ accesses: 0, hash: 1 })],
]

describe('the guest notices', () => {
  let undisturbed: string
  beforeAll(async () => {
    const device = new EchoHashDevice()
    await using vm = await VirtualMachine.create(loopOptions(device))
    expect(await vm.run({ timeout: RUN_LIMIT })).toMatchObject(SUCCESS)
    undisturbed = vm.serial.output
  })

  it('nothing when nothing was changed', async () => {
    const vm = await stoppedInLoop(new EchoHashDevice())
    expect(await vm.run({ timeout: RUN_LIMIT })).toMatchObject(SUCCESS)
    expect(vm.serial.output).toBe(undisturbed)
  })

  it.each(CHANGES)('a change of %s', async (_name, change) => {
    const device = new EchoHashDevice()
    const vm = await stoppedInLoop(device)
    change(vm, device)
    await vm.run({ timeout: RUN_LIMIT })
    expect(vm.serial.output).not.toBe(undisturbed)
  })
})
