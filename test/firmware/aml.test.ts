import fc from 'fast-check'
import { describe, expect, it } from 'vitest'
import {
  device,
  eisaId,
  integer,
  interrupt,
  ioPorts,
  irq,
  memory32Fixed,
  method,
  name,
  notify,
  packageOf,
  pkgLength,
  resourceTemplate,
  scope,
  string,
} from '../../src/firmware/aml.js'
import { errorOf } from '../helpers/images.js'
import { eisaText, parseAml } from './tables.js'

const hexOf = (aml: Uint8Array) => Buffer.from(aml).toString('hex')

describe('AML', () => {
  // As iasl compiles them.
  it.each([
    ['an integer of a bit', integer(0), '00'],
    ['an integer of a bit', integer(1), '01'],
    ['an integer of a byte', integer(0xff), '0aff'],
    ['an integer of a word', integer(0x100), '0b0001'],
    ['an integer of a doubleword', integer(0xdead_beef), '0cefbeadde'],
    ['a string', string('AB'), '0d414200'],
    ['an EISA id', eisaId('PNP0501'), '0c41d00501'],
    ['an EISA id', eisaId('PNP0C0F'), '0c41d00c0f'],
    ['a name in the root', name('\\_S5', integer(0)), '085c5f53355f00'],
    ['a package', packageOf(integer(0), integer(5)), '120502000a05'],
    ['a scope', scope('\\_SB', name('A', integer(1))), '100c5c5f53425f08415f5f5f01'],
    ['a device', device('COM1'), '5b8205434f4d31'],
    ['an empty method', method('_E00'), '14065f45303000'],
    ['a notification', notify('VGEN', 0x80), '865647454e0a80'],
    ['a path from the root', notify('\\_SB.VGEN', 0), '865c2e5f53425f5647454e00'],
    ['an empty resource template', resourceTemplate(), '11050a027900'],
    ['an IO descriptor', ioPorts(0x3f8, 8), '4701f803f8030108'],
    ['an IRQ descriptor', irq(4), '221000'],
    ['a memory descriptor', memory32Fixed(0xd000_0000, 0x200), '86090001000000d000020000'],
    ['an edge', interrupt({ gsi: 5, trigger: 'edge', shared: false }), '890600030105000000'],
    ['a shared level', interrupt({ gsi: 17, trigger: 'level', shared: true }), '890600090111000000'],
  ])('has %s in the bytes of the specification', (_what, aml, bytes) => {
    expect(hexOf(aml)).toBe(bytes)
  })

  it.each([
    [0, '01'],
    [62, '3f'],
    [63, '4104'],
    [0xffd, '4fff'],
    [0xffe, '810001'],
    [0xf_fffc, '8fffff'],
    [0xf_fffd, 'c1000001'],
    [0xfff_fffb, 'cfffffff'],
  ])('says how long %d bytes are, with the length itself', (size, bytes) => {
    expect(hexOf(pkgLength(size))).toBe(bytes)
  })

  it('has no package of 2^28 bytes', () => {
    expect(errorOf(() => pkgLength(0xfff_fffc)).message).toContain('at most 268435455 bytes')
  })

  it('is read back as it was written', () => {
    const segment = fc.stringMatching(/^[A-Z_][A-Z0-9_]{0,3}$/)
    fc.assert(
      fc.property(
        fc.array(fc.tuple(segment, fc.nat(0xffff_ffff), fc.stringMatching(/^[ -~]{0,300}$/)), {
          maxLength: 40,
        }),
        (list) => {
          const terms = list.map(([path, value, text]) =>
            device(path, name(path, packageOf(integer(value), string(text)))),
          )
          const padded = (path: string) => path.padEnd(4, '_')
          expect(parseAml(Buffer.from(scope('\\_SB', ...terms)))).toEqual([
            [
              'Scope',
              '\\_SB_',
              list.map(([path, value, text]) => [
                'Device',
                padded(path),
                [['Name', padded(path), [value, text]]],
              ]),
            ],
          ])
        },
      ),
    )
  })

  it('has every EISA id', () => {
    fc.assert(
      fc.property(fc.stringMatching(/^[A-Z]{3}[0-9A-F]{4}$/), (id) => {
        const [[, , data]] = parseAml(Buffer.from(name('A', eisaId(id)))) as [['Name', string, number]]
        expect(eisaText(data)).toBe(id)
      }),
    )
  })

  it.each([
    ['an integer', () => integer(-1)],
    ['an integer', () => integer(2 ** 32)],
    ['an integer', () => integer(0.5)],
    ['a string', () => string('ü')],
    ['a string', () => string('a\0')],
    ['an EISA id', () => eisaId('PNP050')],
    ['an EISA id', () => eisaId('pnp0501')],
    ['a name', () => name('TOOLONG', integer(0))],
    ['a name', () => name('1ST', integer(0))],
    ['a name', () => name('', integer(0))],
    ['a name', () => notify('_SB.', 0)],
    ['a name', () => notify('A.B.C', 0)],
  ])('refuses %s that it cannot have', (_what, make) => {
    expect(errorOf(make)).toMatchObject({ code: 'ERR_INVALID_ARGUMENT' })
  })
})
