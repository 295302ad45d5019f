import { expect, it } from 'vitest'
import { ramRegions } from '../../src/memory/layout.js'

const GIB = 2 ** 30

it.each([
  [
    'a page and the text screen',
    4096,
    [
      { start: 0, size: 4096 },
      { start: 0xb8000, size: 0x8000 },
    ],
  ],
  [
    'all of the screen where RAM ends in front of it',
    0xb8000,
    [
      { start: 0, size: 0xb8000 },
      { start: 0xb8000, size: 0x8000 },
    ],
  ],
  [
    'the rest of the screen where RAM ends inside it',
    0xba000,
    [
      { start: 0, size: 0xba000 },
      { start: 0xba000, size: 0x6000 },
    ],
  ],
  ['one stretch up to 3 GiB', 3 * GIB, [{ start: 0, size: 3 * GIB }]],
  [
    'a second stretch at 4 GiB for what does not fit below 3 GiB',
    5 * GIB,
    [
      { start: 0, size: 3 * GIB },
      { start: 4 * GIB, size: 2 * GIB },
    ],
  ],
  [
    'a page above the hole',
    3 * GIB + 4096,
    [
      { start: 0, size: 3 * GIB },
      { start: 4 * GIB, size: 4096 },
    ],
  ],
])('RAM is %s', (_what, size, regions) => {
  expect(ramRegions(size)).toEqual(regions)
})
