import { expect, it } from 'vitest'
import { dword, program } from '../helpers/code.js'
import { IRQCHIPS } from '../helpers/interrupts.js'
import { RUN_LIMIT } from '../helpers/limits.js'
import { boot, EXECUTIONS } from './boot.js'

const cases = IRQCHIPS.flatMap((irqchip) => EXECUTIONS.map((execution) => [irqchip, execution] as const))

it.each(cases)(
  'an INIT for the boot processor ends the run as a reset (%s, %s)',
  async (irqchip, execution) => {
    // Long mode: mov ebx, 0xfee00000; mov dword [rbx + 0x300], INIT to self; jmp $
    const image = program(
      [0xbb, ...dword(0xfee0_0000)],
      [0xc7, 0x83, ...dword(0xf0), ...dword(0x1ff)],
      [0xc7, 0x83, ...dword(0x310), ...dword(0)],
      [0xc7, 0x83, ...dword(0x300), ...dword(0x4500)],
      [0xeb, 0xfe],
    )
    const vm = await boot({ image, mode: 'long' }, { irqchip, execution })
    // INIT leaves a boot processor at its reset vector at once.
    expect(await vm.run({ timeout: RUN_LIMIT })).toMatchObject({ reason: 'reset', by: 'INIT' })
  },
)
