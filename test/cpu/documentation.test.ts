import { readFileSync } from 'node:fs'
import { describe, expect, it } from 'vitest'
import { FEATURE_NEEDS } from '../../src/cpu/dependencies.js'
import { FEATURE_ALIASES, FEATURE_BITS } from '../../src/cpu/features.js'
import { baselineOf, CPU_MODELS } from '../../src/cpu/models.js'

const PAGE = readFileSync(new URL('../../docs/cpu.md', import.meta.url), 'utf8')
const code = (names: readonly string[]) => names.map((name) => `\`${name}\``).join(', ')

/** The rows of the table below a heading. */
function tableOf(heading: string): string[][] {
  const section = PAGE.split(/^## /m).find((text) => text.startsWith(`${heading}\n`))!
  const rows = section.split('\n').filter((line) => line.startsWith('| '))
  return rows.slice(2).map((row) => row.slice(2, -2).split(' | '))
}

describe('docs/cpu.md', () => {
  it('has every model, with what it is and what it requires', () => {
    expect(tableOf('Models')).toEqual(
      CPU_MODELS.map((model) => {
        const baseline = baselineOf(model)
        if (baseline === undefined) return [code([model]), expect.any(String), '']
        return [code([model]), baseline.summary, code([...baseline.requires].sort())]
      }),
    )
  })

  it('has every feature: its names, its bit, what it is and what it needs', () => {
    expect(tableOf('Features')).toEqual(
      FEATURE_BITS.map(({ name, leaf, subleaf, register, bit, meaning }) => {
        const aliases = Object.entries(FEATURE_ALIASES).flatMap(([alias, of]) => (of === name ? [alias] : []))
        return [
          code([name, ...aliases]),
          `${leaf.toString(16)}.${subleaf} ${register.toUpperCase()} ${bit}`,
          meaning,
          code(FEATURE_NEEDS[name] ?? []),
        ]
      }),
    )
  })

  it('has what the levels allow beside that', () => {
    const listed = /^What a level may have besides[^:]*:\n\n(.*?)\n\n/ms.exec(PAGE)![1]!
    const allows = baselineOf('x86-64-v1')!.allows
    expect([...listed.matchAll(/`([\w-]+)`/g)].map(([, name]) => name)).toEqual([...allows].sort())
  })
})
