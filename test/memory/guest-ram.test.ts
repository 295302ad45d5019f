import { fstatSync, readlinkSync, readSync } from 'node:fs'
import { describe, expect, it, onTestFinished } from 'vitest'
import { GuestRam, type GuestRamOptions } from '../../src/kvm/index.js'

function makeRam(size: number): GuestRam {
  const ram = new GuestRam({ size })
  onTestFinished(() => ram.close())
  return ram
}

describe('GuestRam', () => {
  it('is a memfd: whoever opens it sees what the guest sees', () => {
    const ram = makeRam(0x3000)
    expect(readlinkSync(`/proc/self/fd/${ram.fd}`)).toContain('memfd:nodevisor-ram')
    expect(fstatSync(ram.fd).size).toBe(0x3000)
    new Uint8Array(ram.buffer()).set([1, 2, 3], 0x1000)
    const bytes = Buffer.alloc(3)
    readSync(ram.fd, bytes, 0, 3, 0x1000)
    expect([...bytes]).toEqual([1, 2, 3])
  })

  it('gives its bytes in place, whole or in parts', () => {
    const ram = makeRam(0x2000)
    expect(ram.size).toBe(0x2000)
    expect(ram.buffer().byteLength).toBe(0x2000)
    expect(ram.buffer(0x1800).byteLength).toBe(0x800)
    new Uint8Array(ram.buffer(0x1000, 0x10))[5] = 42
    expect(new Uint8Array(ram.buffer())[0x1005]).toBe(42)
  })

  it('refuses parts that are not inside it', () => {
    const ram = makeRam(0x1000)
    expect(() => ram.buffer(0, 0x1001)).toThrow(RangeError)
    expect(() => ram.buffer(0x1001, 0)).toThrow(RangeError)
    expect(() => ram.buffer(0xfff, 2)).toThrow(RangeError)
    expect(() => ram.buffer(-1, 1)).toThrow(RangeError)
    expect(() => ram.buffer(2 ** 53, 1)).toThrow(RangeError)
    expect(ram.buffer(0x1000, 0).byteLength).toBe(0)
  })

  it('33: detaches all its buffers when it is closed, which may be done twice', () => {
    const ram = makeRam(0x1000)
    const whole = ram.buffer()
    const part = new Uint8Array(ram.buffer(0x10, 0x10))
    ram.close()
    ram.close()
    expect(whole.byteLength).toBe(0)
    expect(part.length).toBe(0)
    expect(part[0]).toBeUndefined()
    expect(() => ram.buffer()).toThrow(expect.objectContaining({ code: 'ERR_CLOSED' }))
    expect(() => ram.fd).toThrow(expect.objectContaining({ code: 'ERR_CLOSED' }))
  })

  it('27: refuses sizes that are none', () => {
    for (const size of [
      0,
      -4096,
      1,
      4097,
      4096.5,
      Number.NaN,
      Number.POSITIVE_INFINITY,
      2 ** 53,
      '4096',
      4096n,
    ]) {
      expect(() => new GuestRam({ size: size as number })).toThrow(
        expect.objectContaining({ code: 'ERR_INVALID_ARGUMENT' }),
      )
    }
  })

  it('27: is ERR_MEMORY_SIZE where the host cannot give that much', () => {
    expect(() => new GuestRam({ size: 2 ** 52 })).toThrow(
      expect.objectContaining({ code: 'ERR_MEMORY_SIZE', syscall: expect.stringMatching(/mmap|ftruncate/) }),
    )
  })

  it('is ERR_MEMORY_SIZE where there are no huge pages, and says where to reserve them', () => {
    // Nobody has that many.
    expect(() => new GuestRam({ size: 2 ** 40, hugePages: '1G' })).toThrow(
      expect.objectContaining({
        code: 'ERR_MEMORY_SIZE',
        message: expect.stringContaining('nr_hugepages'),
      }),
    )
  })

  it('refuses huge pages of another size', () => {
    expect(() => new GuestRam({ size: 2 ** 21, hugePages: '4K' } as unknown as GuestRamOptions)).toThrow(
      expect.objectContaining({ code: 'ERR_INVALID_ARGUMENT' }),
    )
  })
})
