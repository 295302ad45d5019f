import { existsSync } from 'node:fs'
import { describe, expect, it } from 'vitest'
import { inspectHost } from '../../src/index.js'
import { CAPABILITIES, Kvm } from '../../src/kvm/index.js'

describe('inspectHost', () => {
  it('says that machines can be created here, and with what', () => {
    const host = inspectHost()
    expect(host).toMatchObject({ usable: true, problem: undefined, apiVersion: 12 })
    expect(host.processor).not.toBe('')
    expect(Object.keys(host.capabilities!)).toEqual(Object.keys(CAPABILITIES))
    const kvm = new Kvm()
    expect(host.capabilities!.NR_MEMSLOTS).toBe(kvm.checkExtension('NR_MEMSLOTS'))
    kvm.close()
  })

  it('says what kind this host is', () => {
    const { kind, module, hypervisor } = inspectHost()
    if (existsSync('/sys/module/kvm_pvm'))
      expect({ kind, module }).toEqual({ kind: 'pvm', module: 'kvm_pvm' })
    else if (hypervisor === 'TCGTCGTCGTCG')
      expect({ kind, module }).toEqual({ kind: 'emulated', module: 'kvm_amd' })
    else expect(kind).toBe('hardware')
  })

  it('says what is wrong with a missing device, and never throws', () => {
    expect(inspectHost('/dev/missing')).toMatchObject({
      usable: false,
      kind: undefined,
      apiVersion: undefined,
      capabilities: undefined,
      problem: { code: 'ERR_KVM_NOT_FOUND', message: expect.stringContaining('modprobe') },
    })
  })

  it.each(['/dev', '/dev/null', '/proc/cpuinfo', ''])('says that %j is no KVM', (path) => {
    const { usable, problem } = inspectHost(path)
    expect(usable).toBe(false)
    expect(problem?.code).toMatch(/^ERR_(SYSCALL|KVM_NOT_FOUND|KVM_PERMISSION)$/)
    expect(problem?.message).not.toBe('')
  })
})
