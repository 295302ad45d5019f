import { describe, expect, it } from 'vitest'
import { VirtualMachine, type VirtualMachineOptions } from '../../src/index.js'
import { HLT, program } from '../helpers/code.js'
import { boot, EXECUTIONS, errorWith } from './boot.js'

const AGENT_PORT = 'org.nodevisor.agent'
const KERNEL = { image: program(HLT), mode: 'long' } as const

describe('a machine with a port for an agent', () => {
  it('has a console, too, whose last port it is', async () => {
    const vm = await boot(KERNEL, { agent: true })
    expect(vm.consolePort(AGENT_PORT).name).toBe(AGENT_PORT)
    expect(vm.console.name).toBeUndefined()
    const both = await boot(KERNEL, { agent: true, console: { ports: ['log'] } })
    expect(both.consolePort('log').name).toBe('log')
    expect(both.consolePort(AGENT_PORT).name).toBe(AGENT_PORT)
  })

  it('needs no other port of that name', async () => {
    const options = { kernel: KERNEL, memory: '4M', agent: true, console: { ports: [AGENT_PORT] } }
    await expect(VirtualMachine.create(options)).rejects.toEqual(
      errorWith('ERR_INVALID_ARGUMENT', /name of port/),
    )
  })

  it('waits for one, and says what to look at when there is none', async () => {
    const vm = await boot(KERNEL, { agent: true })
    const missing = errorWith('ERR_AGENT_MISSING', /in the initramfs .* is vm\.run\(\) under way\?/)
    await expect(vm.exec('true', { agentTimeout: 1 })).rejects.toEqual(missing)
    await expect(vm.spawn('true', { agentTimeout: 1 }).exited).rejects.toEqual(missing)
    await expect(vm.readFile('/etc/passwd', { agentTimeout: 1 })).rejects.toEqual(missing)
    await expect(vm.writeFile('/tmp/x', 'x', { agentTimeout: 1 })).rejects.toEqual(missing)
    await expect(vm.agent.connected({ agentTimeout: 1 })).rejects.toEqual(missing)
  })

  it.each(EXECUTIONS)('ends what waits with the run (%s), and with the machine', async (execution) => {
    const vm = await boot(KERNEL, { agent: true, execution })
    const early = vm.exec('true')
    const expected = expect(early).rejects.toEqual(errorWith('ERR_AGENT_FAILED', /halt/))
    expect(await vm.run({ timeout: 15_000 })).toMatchObject({ reason: 'halt' })
    await expected
    const late = expect(vm.exec('true')).rejects.toEqual(errorWith('ERR_CLOSED', /the machine was closed/))
    await vm.close()
    await late
    await expect(vm.exec('true')).rejects.toEqual(errorWith('ERR_CLOSED'))
  })
})

describe('a machine without', () => {
  it('a port for an agent says how to get one', async () => {
    const vm = await boot(KERNEL, { console: true })
    const missing = errorWith('ERR_NO_DEVICE', /create it with \{ agent: true \}/)
    expect(() => vm.agent).toThrow(missing)
    expect(() => vm.spawn('true')).toThrow(missing)
    await expect(vm.exec('true')).rejects.toEqual(missing)
    await expect(vm.readFile('/x')).rejects.toEqual(missing)
    await expect(vm.writeFile('/x', '')).rejects.toEqual(missing)
  })
})

it('refuses what is no agent option', async () => {
  const options = { kernel: KERNEL, memory: '4M', agent: 'yes' } as unknown as VirtualMachineOptions
  await expect(VirtualMachine.create(options)).rejects.toEqual(
    errorWith('ERR_INVALID_ARGUMENT', /true or false for agent/),
  )
})
