import { expect, it } from 'vitest'
import type { Device } from '../../src/index.js'
import { expectedGuests, optionsFor } from '../helpers/guests.js'
import { RUN_LIMIT } from '../helpers/limits.js'
import { boot, EXECUTIONS, until } from './boot.js'

const CASES = expectedGuests().flatMap(({ name, expected }) =>
  EXECUTIONS.map((execution) => [name, execution, expected] as const),
)

it.each(CASES)(
  'the guest %s (%s) does exactly what its expected.json says',
  async (_name, execution, expected) => {
    const { kernel, ...options } = optionsFor(expected)
    const written: number[] = []
    const reads = [...(expected.device?.reads ?? [])]
    const devices: Device[] = expected.device
      ? [
          {
            name: 'expected',
            ports: { base: expected.device.port, length: 1 },
            read: () => reads.shift()!,
            write: (_offset, value) => written.push(value),
          },
        ]
      : []
    const vm = await boot(kernel, { ...options, execution, devices })
    if (expected.mode !== undefined)
      expect(vm.boot).toMatchObject({ mode: expected.mode, format: expected.format })
    const run = vm.run({ timeout: RUN_LIMIT })
    if (expected.input !== undefined) vm.serial.write(expected.input)
    if (expected.result.reason === 'stopped') {
      await until(() => vm.serial.output === expected.serial)
      vm.stop()
    }
    expect(await run).toMatchObject(expected.result)
    if (expected.serial !== undefined) expect(vm.serial.output).toBe(expected.serial)
    if (expected.serialPattern !== undefined) {
      expect(vm.serial.output).toMatch(new RegExp(expected.serialPattern))
    }
    if (expected.screen !== undefined) {
      expect(vm.screen.lines().map((line) => line.trimEnd())).toEqual(expected.screen)
    }
    if (expected.cursor !== undefined) expect(vm.screen.cursor).toMatchObject(expected.cursor)
    if (expected.postCodes !== undefined) expect(vm.postCodes).toEqual(expected.postCodes)
    expect(written).toEqual(expected.device?.writes ?? [])
    expect(reads).toEqual([])
  },
)
