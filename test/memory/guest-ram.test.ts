import {
  closeSync,
  fstatSync,
  mkdtempSync,
  openSync,
  readFileSync,
  readlinkSync,
  readSync,
  rmSync,
  writeFileSync,
} from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
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

describe('copy-on-write RAM', () => {
  it('keeps what is written to itself, once it is frozen', () => {
    const ram = makeRam(0x10000)
    const bytes = new Uint8Array(ram.buffer())
    bytes[0x1000] = 1
    expect(ram.isCopyOnWrite).toBe(false)
    ram.freeze()
    ram.freeze()
    expect(ram.isCopyOnWrite).toBe(true)
    expect([...ram.privatePages()]).toEqual([])
    const copy = new GuestRam({ size: 0x10000, copyOnWriteOf: ram.fd })
    onTestFinished(() => copy.close())
    const copied = new Uint8Array(copy.buffer())
    bytes[0x1000] = 2
    bytes[0x2fff] = 3
    bytes[0xf000] = 4
    copied[0x5000] = 5
    expect([copied[0x1000], copied[0x2fff], bytes[0x5000]]).toEqual([1, 0, 0])
    expect([...ram.privatePages()]).toEqual([1, 2, 15, 1])
    expect([...copy.privatePages()]).toEqual([5, 1])
    ram.discard(Uint32Array.of(1, 1, 15, 1))
    expect([bytes[0x1000], bytes[0x2fff], bytes[0xf000]]).toEqual([1, 3, 0])
    expect([...ram.privatePages()]).toEqual([2, 1])
  })

  it('sees pages that a system call has written', () => {
    const ram = makeRam(0x4000)
    ram.freeze()
    const folder = mkdtempSync(join(tmpdir(), 'nodevisor-ram-'))
    onTestFinished(() => rmSync(folder, { recursive: true }))
    writeFileSync(join(folder, 'data'), 'hello')
    const fd = openSync(join(folder, 'data'), 'r')
    onTestFinished(() => closeSync(fd))
    readSync(fd, new Uint8Array(ram.buffer(0x3000, 5)))
    expect([...ram.privatePages()]).toEqual([3, 1])
  })

  it('reads as a file that it never writes', () => {
    const folder = mkdtempSync(join(tmpdir(), 'nodevisor-ram-'))
    onTestFinished(() => rmSync(folder, { recursive: true }))
    const path = join(folder, 'memory')
    writeFileSync(path, Buffer.alloc(0x2000, 7))
    const fd = openSync(path, 'r')
    const ram = new GuestRam({ size: 0x2000, copyOnWriteOf: fd })
    onTestFinished(() => ram.close())
    closeSync(fd)
    const bytes = new Uint8Array(ram.buffer())
    bytes[0] = 1
    expect([bytes[0], bytes[1], bytes[0x1fff]]).toEqual([1, 7, 7])
    expect(readFileSync(path)).toEqual(Buffer.alloc(0x2000, 7))
  })

  it('refuses pages that it does not have', () => {
    const ram = makeRam(0x2000)
    ram.freeze()
    expect(() => ram.discard(Uint32Array.of(1, 2))).toThrow(RangeError)
    expect(() => ram.discard(Uint32Array.of(0xffff_ffff, 1))).toThrow(RangeError)
  })
})
