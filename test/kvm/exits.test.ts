import { describe, expect, it } from 'vitest'
import { systemError } from '../../src/binding.js'
import { copyExit, describeExit, ExitDecoder } from '../../src/kvm/exits.js'

/** `struct kvm_run` as KVM leaves it for an exit: the reason, then the union at offset 32. */
function kvmRun(reason: number, fill: (union: DataView) => void = () => {}): DataView {
  const run = new DataView(new ArrayBuffer(4096))
  run.setUint32(8, reason, true)
  fill(new DataView(run.buffer, 32))
  return run
}

const decode = (reason: number, fill?: (union: DataView) => void) =>
  new ExitDecoder(kvmRun(reason, fill)).decode(0)

describe('an exit is decoded', () => {
  it('of a port access', () => {
    const exit = decode(2, (union) => {
      union.setUint8(0, 1)
      union.setUint8(1, 2)
      union.setUint16(2, 0xcf8, true)
      union.setUint32(4, 3, true)
      union.setBigUint64(8, 0x200n, true)
    })
    expect(exit).toMatchObject({
      kind: 'io',
      direction: 'out',
      port: 0xcf8,
      size: 2,
      count: 3,
      dataOffset: 0x200,
    })
    expect(exit.kind === 'io' && exit.data).toHaveLength(6)
    expect(describeExit(exit)).toBe('out port 0xcf8, 3 × 2 bytes')
  })

  it('31: of a memory access above 4 GiB', () => {
    const exit = decode(6, (union) => {
      union.setBigUint64(0, 0x12_3456_7890n, true)
      union.setBigUint64(8, 0x55n, true)
      union.setUint32(16, 8, true)
      union.setUint8(20, 1)
    })
    expect(exit).toMatchObject({ kind: 'mmio', direction: 'write', address: 0x12_3456_7890, size: 8 })
    expect(describeExit(exit)).toBe('write 8 bytes at 0x1234567890')
  })

  it('31: of a memory access above 2^53, which is where no RAM and no device can be', () => {
    const exit = decode(6, (union) => union.setBigUint64(0, 2n ** 63n, true))
    expect(exit).toMatchObject({ kind: 'mmio', direction: 'read', address: 2 ** 63 })
  })

  it('of a debug exception', () => {
    const exit = decode(4, (union) => {
      union.setUint32(0, 1, true)
      union.setBigUint64(8, 0xffff_ffff_8000_0000n, true)
      union.setBigUint64(16, 0x4000n, true)
      union.setBigUint64(24, 0x400n, true)
    })
    expect(exit).toEqual({
      kind: 'debug',
      exception: 1,
      pc: 0xffff_ffff_8000_0000n,
      dr6: 0x4000n,
      dr7: 0x400n,
    })
    expect(describeExit(exit)).toBe('debug exception 1 at 0xffffffff80000000')
  })

  it('25: of an internal error with the bytes of the instruction', () => {
    const exit = decode(17, (union) => {
      union.setUint32(0, 1, true)
      union.setUint32(4, 4, true)
      union.setBigUint64(8, 1n, true)
      union.setUint8(16, 3)
      for (const [i, byte] of [0x0f, 0x01, 0xd0].entries()) union.setUint8(17 + i, byte)
    })
    expect(exit).toMatchObject({
      kind: 'internal-error',
      suberror: 1,
      instruction: Uint8Array.of(0x0f, 0x01, 0xd0),
    })
    expect(describeExit(exit)).toBe('KVM internal error 1 at the instruction bytes 0f 01 d0')
  })

  it('25: of an internal error whose counts are absurd, without reading beyond them', () => {
    const exit = decode(17, (union) => {
      union.setUint32(0, 1, true)
      union.setUint32(4, 0xffff_ffff, true)
      union.setBigUint64(8, 1n, true)
      union.setUint8(16, 255)
    })
    expect(exit.kind === 'internal-error' && exit.data).toHaveLength(16)
    expect(exit.kind === 'internal-error' && exit.instruction).toHaveLength(15)
    const without = decode(17, (union) => union.setUint32(0, 2, true))
    expect(without).toEqual({ kind: 'internal-error', suberror: 2, data: [], instruction: undefined })
    expect(describeExit(without)).toBe('KVM internal error 2')
  })

  it('of a failed entry', () => {
    const exit = decode(9, (union) => {
      union.setBigUint64(0, 0x8000_0021n, true)
      union.setUint32(8, 3, true)
    })
    expect(exit).toEqual({ kind: 'fail-entry', hardwareReason: 0x8000_0021n, cpu: 3 })
    expect(describeExit(exit)).toBe('entry failed for hardware reason 0x80000021')
  })

  it('of an end of interrupt', () => {
    const exit = decode(26, (union) => union.setUint8(0, 0x31))
    expect(exit).toEqual({ kind: 'ioapic-eoi', vector: 0x31 })
    expect(describeExit(exit)).toBe('end of interrupt 0x31')
  })

  it('of a system event and of MSR accesses', () => {
    expect(decode(24, (union) => union.setUint32(0, 2, true))).toEqual({ kind: 'system-event', type: 2 })
    const msr = (union: DataView) => {
      union.setUint32(12, 0x10, true)
      union.setBigUint64(16, 77n, true)
    }
    expect(decode(29, msr)).toEqual({ kind: 'rdmsr', index: 0x10, value: 77n })
    expect(decode(30, msr)).toEqual({ kind: 'wrmsr', index: 0x10, value: 77n })
    expect(describeExit(decode(30, msr))).toBe('wrmsr 0x10')
  })

  it.each([
    [3, 'hypercall'],
    [5, 'halt'],
    [7, 'irq-window-open'],
    [8, 'shutdown'],
    [10, 'signal'],
    [31, 'dirty-ring-full'],
    [0, 'other'],
    [12_345, 'other'],
  ])('25: of reason %i as %s, also where nobody knows it', (reason, kind) => {
    const exit = decode(reason)
    expect(exit).toEqual({ kind, reason })
    expect(describeExit(exit)).toBe(`${kind} (KVM exit reason ${reason})`)
  })

  it('30: of EINTR and EAGAIN, whatever is left in kvm_run', () => {
    const decoder = new ExitDecoder(kvmRun(5))
    expect(decoder.decode(4)).toMatchObject({ kind: 'interrupted' })
    expect(decoder.decode(11)).toMatchObject({ kind: 'again' })
    expect(decoder.decode(0)).toMatchObject({ kind: 'halt' })
  })
})

it('a copy of an exit stays as it is, data included', () => {
  const run = kvmRun(6, (union) => {
    union.setBigUint64(0, 0xd000_0000n, true)
    union.setUint8(8, 1)
    union.setUint32(16, 2, true)
  })
  const decoder = new ExitDecoder(run)
  const copy = copyExit(decoder.decode(0))
  run.setUint8(32 + 8, 99)
  run.setUint32(32, 5, true)
  decoder.decode(0)
  expect(copy).toMatchObject({ kind: 'mmio', address: 0xd000_0000, data: Uint8Array.of(1, 0) })
})

describe('the error of a system call', () => {
  it.each([
    ['KVM_RUN', 22, 'ERR_SYSCALL', 'KVM_RUN failed with EINVAL'],
    ['open(/dev/kvm)', 13, 'ERR_KVM_PERMISSION', 'group'],
    ['open(/dev/kvm)', 1, 'ERR_KVM_PERMISSION', 'group'],
    ['open(/dev/kvm)', 2, 'ERR_KVM_NOT_FOUND', 'modprobe'],
    ['open(/dev/kvm)', 19, 'ERR_KVM_NOT_FOUND', 'modprobe'],
    ['open(/dev/kvm)', 24, 'ERR_SYSCALL', 'ulimit -n'],
    ['mmap', 12, 'ERR_MEMORY_SIZE', 'ask for less'],
    ['ftruncate', 27, 'ERR_MEMORY_SIZE', 'ask for less'],
    ['pthread_create', 11, 'ERR_SYSCALL', 'another thread'],
    ['KVM_CREATE_VM', 24, 'ERR_SYSCALL', 'too many open files'],
    ['KVM_CREATE_VM', 16, 'ERR_SYSCALL', 'another hypervisor'],
    ['KVM_SET_BOOT_CPU_ID', 16, 'ERR_SYSCALL', 'failed with EBUSY'],
    ['ioctl(vcpu)', 16, 'ERR_RUNNING', 'stop the machine'],
  ])('%s with errno %i is %s and says what to do', (syscall, errno, code, message) => {
    expect(systemError(syscall, errno)).toMatchObject({
      name: 'NodevisorError',
      code,
      syscall,
      errno,
      errnoName: expect.stringMatching(/^E[A-Z]+$/),
      message: expect.stringContaining(message),
    })
  })

  it('with errno 0 is a use after close', () => {
    expect(systemError('Vcpu', 0)).toMatchObject({
      code: 'ERR_CLOSED',
      message: expect.stringContaining('Vcpu'),
    })
  })
})
