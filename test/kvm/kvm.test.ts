import { chmodSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterAll, beforeAll, describe, expect, it, onTestFinished } from 'vitest'
import { CAPABILITIES, type CapabilityName, Kvm } from '../../src/kvm/index.js'
import { closedError, failureOf } from './metal.js'

let folder: string
beforeAll(() => {
  folder = mkdtempSync(join(tmpdir(), 'nodevisor-kvm-'))
})
afterAll(() => rmSync(folder, { recursive: true }))

function open(): Kvm {
  const kvm = new Kvm()
  onTestFinished(() => kvm.close())
  return kvm
}

describe('Kvm', () => {
  it('has API version 12', () => {
    expect(open().apiVersion).toBe(12)
  })

  it('checks extensions by name and by number', () => {
    const kvm = open()
    expect(kvm.checkExtension('USER_MEMORY')).toBe(1)
    expect(kvm.checkExtension(CAPABILITIES.USER_MEMORY)).toBe(1)
    expect(kvm.checkExtension(99_999)).toBe(0)
    expect(() => kvm.checkExtension('NOT_THERE' as CapabilityName)).toThrow(
      expect.objectContaining({ code: 'ERR_INVALID_ARGUMENT' }),
    )
  })

  it('knows each capability by one number', () => {
    const numbers = Object.values(CAPABILITIES)
    expect(new Set(numbers).size).toBe(numbers.length)
  })

  it('lists the CPUID that guests may have', () => {
    const entries = open().getSupportedCpuid()
    const vendor = entries.find((entry) => entry.function === 0)!
    const text = Buffer.alloc(12)
    for (const [i, word] of [vendor.ebx, vendor.edx, vendor.ecx].entries()) text.writeUInt32LE(word, i * 4)
    expect(text.toString()).toMatch(/^(GenuineIntel|AuthenticAMD|HygonGenuine|CentaurHauls)$/)
    expect(entries.find((entry) => entry.function === 1)).toBeDefined()
    // KVM's own leaf says so.
    expect(entries.find((entry) => entry.function === 0x4000_0000)).toMatchObject({ ebx: 0x4b4d_564b })
  })

  it('lists the CPUID that it emulates', () => {
    expect(Array.isArray(open().getEmulatedCpuid())).toBe(true)
  })

  it('lists MSRs, and reads those that are features', () => {
    const kvm = open()
    const all = kvm.getMsrIndexList()
    expect(all.length).toBeGreaterThan(5)
    expect(all).toContain(0x174) // IA32_SYSENTER_CS
    const features = [...kvm.getMsrFeatureIndexList()]
    const msrs = kvm.getMsrs(features.slice(0, 3))
    expect(msrs.map(({ index }) => index)).toEqual(features.slice(0, msrs.length))
    expect(kvm.getMsrs([])).toEqual([])
  })

  it('may be open several times', () => {
    const [first, second] = [open(), open()]
    first.close()
    expect(second.apiVersion).toBe(12)
  })

  it('34: throws ERR_CLOSED after close(), which may be called twice', () => {
    const kvm = open()
    kvm.close()
    kvm.close()
    expect(() => kvm.apiVersion).toThrow(closedError)
    expect(() => kvm.checkExtension('IRQCHIP')).toThrow(closedError)
    expect(() => kvm.createVm()).toThrow(closedError)
    expect(() => kvm.getSupportedCpuid()).toThrow(closedError)
    expect(() => kvm.getEmulatedCpuid()).toThrow(closedError)
    expect(() => kvm.getMsrIndexList()).toThrow(closedError)
    expect(() => kvm.getMsrFeatureIndexList()).toThrow(closedError)
    expect(() => kvm.getMsrs([1])).toThrow(closedError)
  })

  it('refuses a VM of a type that does not exist', () => {
    expect(() => open().createVm(12_345)).toThrow(failureOf('KVM_CREATE_VM', 'EINVAL'))
  })
})

describe('a /dev/kvm that is none', () => {
  it('is ERR_KVM_NOT_FOUND where it is missing, with what to do', () => {
    expect(() => new Kvm(join(folder, 'missing'))).toThrow(
      expect.objectContaining({
        code: 'ERR_KVM_NOT_FOUND',
        errno: 2,
        errnoName: 'ENOENT',
        message: expect.stringMatching(/modprobe/),
      }),
    )
  })

  it('is ERR_KVM_PERMISSION where this user may not open it, with the group to join', () => {
    const path = join(folder, 'private')
    writeFileSync(path, '')
    chmodSync(path, 0)
    chmodSync(folder, 0o755)
    const isRoot = process.geteuid!() === 0
    // Root may open everything: be somebody else for a moment.
    if (isRoot) process.seteuid!(65_534)
    try {
      expect(() => new Kvm(path)).toThrow(
        expect.objectContaining({
          code: 'ERR_KVM_PERMISSION',
          errnoName: 'EACCES',
          message: expect.stringContaining('usermod -aG kvm'),
        }),
      )
    } finally {
      if (isRoot) process.seteuid!(0)
    }
  })

  it('is ERR_SYSCALL where it is a directory', () => {
    expect(() => new Kvm(folder)).toThrow(
      expect.objectContaining({ code: 'ERR_SYSCALL', errnoName: 'EISDIR', errno: 21 }),
    )
  })

  it('is ERR_SYSCALL at the first ioctl where it is a file or another device', () => {
    const path = join(folder, 'file')
    writeFileSync(path, 'text')
    for (const other of [path, '/dev/null']) {
      const kvm = new Kvm(other)
      expect(() => kvm.apiVersion).toThrow(failureOf('KVM_GET_API_VERSION', 'ENOTTY'))
      expect(() => kvm.createVm()).toThrow(failureOf('KVM_GET_VCPU_MMAP_SIZE', 'ENOTTY'))
      kvm.close()
    }
  })

  it.each([5, null, {}, Buffer.from('/dev/kvm')])(
    'is ERR_INVALID_ARGUMENT where it is no path: %s',
    (path) => {
      expect(() => new Kvm(path as string)).toThrow(expect.objectContaining({ code: 'ERR_INVALID_ARGUMENT' }))
    },
  )
})
