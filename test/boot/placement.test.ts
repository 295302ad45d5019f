import { describe, expect, it } from 'vitest'
import { MODULE_ZONES, Placement, STRUCTURE_ZONES } from '../../src/boot/placement.js'
import { errorOf, MIB } from '../helpers/images.js'

const segment = (address: number, size: number, name = `at ${address.toString(16)}`) => ({
  name,
  address: BigInt(address),
  bytes: new Uint8Array(0),
  size: BigInt(size),
})

const structure = { name: 'structure', zones: STRUCTURE_ZONES }

describe('a placement', () => {
  it('puts structures into low memory, after the first page, one behind the other', () => {
    const placement = new Placement(MIB)
    expect(placement.place({ ...structure, size: 1 })).toBe(0x1000)
    expect(placement.place({ ...structure, size: 0x1001 })).toBe(0x2000)
    expect(placement.place({ ...structure, size: 1 })).toBe(0x4000)
  })

  it('heeds an alignment', () => {
    const placement = new Placement(MIB)
    placement.claim([segment(0x1000, 3)], '')
    expect(placement.place({ ...structure, size: 1, alignment: 16 })).toBe(0x1010)
  })

  it('fills a gap between segments of the image, and leaves one that is too small', () => {
    const placement = new Placement(16 * MIB)
    placement.claim([segment(0x9000, 0x1000), segment(0, 0x4000), segment(0x5000, 0x1000)], '')
    expect(placement.place({ ...structure, size: 0x2000 })).toBe(0x6000)
    expect(placement.place({ ...structure, size: 0x1000 })).toBe(0x4000)
    expect(placement.place({ ...structure, size: 0x1000 })).toBe(0x8000)
    expect(placement.segments.map(({ address }) => address)).toEqual([
      0, 0x4000, 0x5000, 0x6000, 0x8000, 0x9000,
    ])
  })

  it('gives what it places its address to fill its bytes with', () => {
    const placement = new Placement(MIB)
    const fill = (address: number) => Uint8Array.of(address >> 12)
    placement.place({ ...structure, size: 1, fill })
    placement.place({ ...structure, size: 1, fill })
    expect(placement.segments.map(({ bytes }) => [...bytes])).toEqual([[1], [2]])
  })

  it('goes above 1 MiB when low memory is taken, and never into the area of the adapters', () => {
    const placement = new Placement(16 * MIB)
    placement.claim([segment(0x1000, 0x9e000)], '')
    expect(placement.place({ ...structure, size: 0x2000 })).toBe(0x10_0000)
    expect(placement.place({ ...structure, size: 0x1000 })).toBe(0x9f000)
  })

  it('puts modules above 1 MiB, and into low memory when there is nothing above', () => {
    const module = { name: 'module', zones: MODULE_ZONES, size: 0x3000 }
    expect(new Placement(16 * MIB).place(module)).toBe(0x10_0000)
    expect(new Placement(MIB).place(module)).toBe(0x1000)
  })

  it('uses all of low memory, and then reports that there is no room', () => {
    const placement = new Placement(0xa0000)
    expect(placement.place({ ...structure, size: 0x9f000 })).toBe(0x1000)
    const error = errorOf(() => placement.place({ ...structure, size: 1 }))
    expect(error.code).toBe('ERR_BOOT_NO_ROOM')
    expect(error).toMatchObject({ structure: 'structure', size: 1, memorySize: 0xa0000 })
  })

  it('never puts anything above 4 GiB, where 32-bit code does not reach', () => {
    const placement = new Placement(0x1_4000_0000)
    placement.claim([segment(0, 0xc000_0000)], '')
    expect(errorOf(() => placement.place({ ...structure, size: 1 })).code).toBe('ERR_BOOT_NO_ROOM')
  })

  it('lets an image have any RAM: the first page, the area of the adapters, above 4 GiB', () => {
    const placement = new Placement(0x1_0000_0000)
    placement.claim([segment(0x1_0000_0000, 0x4000_0000), segment(0xa0000, 0x60000), segment(0, 16)], '')
    expect(placement.segments).toHaveLength(3)
  })

  it('takes the screen of a machine without 1 MiB for no RAM', () => {
    expect(errorOf(() => new Placement(0xa0000).claim([segment(0xb8000, 16)], '')).code).toBe(
      'ERR_IMAGE_TOO_LARGE',
    )
  })

  it.each([
    ['past the end of RAM', 16 * MIB, 1],
    ['across the end of RAM', 16 * MIB - 1, 2],
    ['in the MMIO hole', 0xc000_0000, 1],
  ])('refuses a segment %s', (_, address, size) => {
    const error = errorOf(() => new Placement(16 * MIB).claim([segment(address, size)], 'link it lower'))
    expect(error.code).toBe('ERR_IMAGE_TOO_LARGE')
    expect(error.message).toContain('link it lower')
    expect(error).toMatchObject({ address: BigInt(address), size: BigInt(size), memorySize: 16 * MIB })
  })

  it('says how much memory a segment would need, unless no memory helps', () => {
    const message = (address: number) =>
      errorOf(() => new Placement(16 * MIB).claim([segment(address, 1)], 'link it lower')).message
    expect(message(128 * MIB)).toContain('at least 129 MiB')
    expect(message(0xc000_0000)).not.toContain('MiB')
  })

  it('refuses a segment across the MMIO hole of a machine that has RAM on both sides', () => {
    const placement = new Placement(0x1_0000_0000)
    expect(errorOf(() => placement.claim([segment(0xbfff_f000, 0x4000_2000)], '')).code).toBe(
      'ERR_IMAGE_TOO_LARGE',
    )
  })

  it('refuses segments that overlap by one byte, in whatever order they come', () => {
    const error = errorOf(() =>
      new Placement(MIB).claim([segment(0x3000, 16, 'b'), segment(0x2000, 0x1001, 'a')], ''),
    )
    expect(error.code).toBe('ERR_IMAGE_FORMAT')
    expect(error).toMatchObject({ segment: 'a', overlaps: 'b', address: 0x3000 })
    new Placement(MIB).claim([segment(0x3000, 16), segment(0x2000, 0x1000)], '')
  })

  it.each([0, 4095, 4097, -4096, 0.5, Number.NaN, 2 ** 47, 2 ** 60])(
    '27: refuses %d bytes of memory',
    (memorySize) => {
      const error = errorOf(() => new Placement(memorySize))
      expect(error.code).toBe('ERR_MEMORY_SIZE')
      expect(error.memorySize).toBe(memorySize)
    },
  )
})
