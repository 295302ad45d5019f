import { describe, expect, it } from 'vitest'
import { loadFlat } from '../../src/boot/flat.js'
import { bootOptions, errorOf, faultsOf, MIB, pattern, segmentNamed, textModule } from '../helpers/images.js'

const IMAGE = pattern(512)

describe('a flat image in real mode', () => {
  it('starts at 0000:7C00, as a BIOS starts a boot sector, unless told otherwise', () => {
    const image = loadFlat(IMAGE, bootOptions())
    expect(image).toMatchObject({ format: 'flat', mode: 'real', entry: 0x7c00 })
    expect(segmentNamed(image, 'the kernel')).toMatchObject({ address: 0x7c00, bytes: IMAGE, size: 512 })
    const { registers, specialRegisters } = image.state
    expect(specialRegisters.cs).toMatchObject({ selector: 0, base: 0n, limit: 0xffff })
    expect(registers).toEqual({ rip: 0x7c00n, rsp: 0x7c00n, rflags: 2n })
    expect(specialRegisters.ss.selector).toBe(0)
    expect(specialRegisters.idt).toEqual({ base: 0n, limit: 0x3ff })
    expect(specialRegisters.cr0 & 0x8000_0001n).toBe(0n)
  })

  it.each([
    [0x0, 0x0, 0x0],
    [0x500, 0x0, 0x500],
    [0xffff, 0x0, 0xffff],
    [0x1_0000, 0x1000, 0x0],
    [0x2_1234, 0x2123, 0x4],
    [0xf_ffff, 0xffff, 0xf],
  ])('at %d starts with CS:IP that lead there', (at, cs, ip) => {
    const image = loadFlat(pattern(1), bootOptions({ at }))
    expect(image.entry).toBe(at)
    expect(image.state.registers.rip).toBe(BigInt(ip))
    expect(image.state.specialRegisters.cs).toMatchObject({ selector: cs, base: BigInt(cs * 16) })
    expect(faultsOf(image, 16 * MIB)).toEqual([])
  })

  it('has a stack of at least 1 KiB elsewhere when the image covers the usual place', () => {
    const image = loadFlat(pattern(0x1_0000), bootOptions({ at: 0x500 }))
    const stack = segmentNamed(image, 'stack')
    expect(stack).toMatchObject({ address: 0x1_0500, size: 0x400 })
    const { ss } = image.state.specialRegisters
    const { rsp } = image.state.registers
    expect(rsp).toBeLessThanOrEqual(0xffffn)
    expect(ss.base + rsp!).toBe(BigInt(stack.address + stack.size))
    expect(faultsOf(image, 16 * MIB)).toEqual([])
  })

  it('starts in a machine of one page', () => {
    const image = loadFlat(pattern(16), bootOptions({ at: 0, memorySize: 4096 }))
    expect(faultsOf(image, 4096)).toEqual([])
  })

  it('reports that there is no room when the image leaves none for a stack', () => {
    const error = errorOf(() => loadFlat(pattern(0xa0000), bootOptions({ at: 0, memorySize: 0xa0000 })))
    expect(error.code).toBe('ERR_BOOT_NO_ROOM')
  })

  it('must begin and end below 1 MiB', () => {
    expect(errorOf(() => loadFlat(IMAGE, bootOptions({ at: 0x10_0000 }))).code).toBe('ERR_INVALID_ARGUMENT')
    expect(errorOf(() => loadFlat(IMAGE, bootOptions({ at: 0xf_ff00 }))).code).toBe('ERR_IMAGE_TOO_LARGE')
    expect(loadFlat(IMAGE, bootOptions({ at: 0xf_fe00 })).entry).toBe(0xf_fe00)
  })

  it('takes no command line and no modules', () => {
    const cmdline = errorOf(() => loadFlat(IMAGE, bootOptions({ cmdline: 'x' })))
    expect(cmdline).toMatchObject({ code: 'ERR_INVALID_ARGUMENT', argument: 'cmdline' })
    const modules = errorOf(() => loadFlat(IMAGE, bootOptions({ modules: [textModule('', '')] })))
    expect(modules).toMatchObject({ code: 'ERR_INVALID_ARGUMENT', argument: 'modules' })
  })
})

describe.each(['protected', 'long'] as const)('a flat image in %s mode', (mode) => {
  it('starts at 1 MiB unless told otherwise', () => {
    const image = loadFlat(IMAGE, bootOptions({ mode }))
    expect(image).toMatchObject({ format: 'flat', mode, entry: 0x10_0000 })
    expect(image.state.registers.rip).toBe(0x10_0000n)
    expect(segmentNamed(image, 'the kernel').bytes).toBe(IMAGE)
    expect(faultsOf(image, 16 * MIB)).toEqual([])
  })

  it.each([0, 0x1000, 0x7c00, 0x9_0000, 0xa_0000, 0xff_fe00])('starts at %d', (at) => {
    const image = loadFlat(IMAGE, bootOptions({ mode, at }))
    expect(image.state.registers.rip).toBe(BigInt(at))
    expect(faultsOf(image, 16 * MIB)).toEqual([])
  })

  it('26: refuses an image that ends past RAM', () => {
    const error = errorOf(() => loadFlat(IMAGE, bootOptions({ mode, at: 16 * MIB - 511 })))
    expect(error.code).toBe('ERR_IMAGE_TOO_LARGE')
    expect(error.message).toContain('at least 17 MiB')
  })

  it.each([-1, 0.5, Number.NaN, 2 ** 53, 2 ** 64])('31: refuses the address %d', (at) => {
    const error = errorOf(() => loadFlat(IMAGE, bootOptions({ mode, at })))
    expect(error).toMatchObject({ code: 'ERR_INVALID_ARGUMENT', argument: 'at', received: at })
  })
})

it('refuses an address above 4 GiB for a flat image in protected mode, and takes it in long mode', () => {
  const options = { memorySize: 0x1_0000_0000, at: 0x1_0000_0000 }
  const error = errorOf(() => loadFlat(IMAGE, bootOptions({ ...options, mode: 'protected' })))
  expect(error.code).toBe('ERR_INVALID_ARGUMENT')
  const image = loadFlat(IMAGE, bootOptions({ ...options, mode: 'long' }))
  expect(image.state.registers.rip).toBe(0x1_0000_0000n)
  expect(faultsOf(image, options.memorySize)).toEqual([])
})
