import { execFileSync } from 'node:child_process'
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir, totalmem } from 'node:os'
import { join } from 'node:path'
import { pathToFileURL } from 'node:url'
import { afterAll, beforeAll, describe, expect, it } from 'vitest'
import { inspectHost, VirtualMachine, type VirtualMachineOptions } from '../../src/index.js'
import { debugExit, HLT, program, UD2 } from '../helpers/code.js'
import { imageOf } from '../helpers/guests.js'
import { collectGarbage } from '../helpers/memory.js'
import { boot, errorWith } from './boot.js'

const KERNEL = program(debugExit(7))
const LINUX = readFileSync(imageOf({ image: 'hello-linux.elf' }))

let folder: string
let kernelFile: string
beforeAll(() => {
  folder = mkdtempSync(join(tmpdir(), 'nodevisor-create-'))
  kernelFile = join(folder, 'kernel.bin')
  writeFileSync(kernelFile, KERNEL)
})
afterAll(() => rmSync(folder, { recursive: true }))

/** Options as a JavaScript program may pass them. */
const create = (options: unknown) => VirtualMachine.create(options as VirtualMachineOptions)

describe('VirtualMachine.create', () => {
  it.each([
    ['a path', () => kernelFile],
    ['a file: URL', () => pathToFileURL(kernelFile)],
    ['a Uint8Array', () => KERNEL],
    ['a Buffer', () => Buffer.from(KERNEL)],
    ['an object with a path', () => ({ image: kernelFile })],
    ['an object with bytes and format', () => ({ image: KERNEL, format: 'flat' as const })],
  ])('takes the kernel as %s', async (_how, kernel) => {
    const vm = await boot(kernel())
    expect(await vm.run()).toMatchObject({ reason: 'debug-exit', code: 7 })
  })

  it('keeps neither the kernel nor what goes with it in memory', async () => {
    const references: WeakRef<Uint8Array>[] = []
    const bytes = (content: Uint8Array) => {
      const copy = Uint8Array.from(content)
      references.push(new WeakRef(copy))
      return copy
    }
    const kernel = () => ({ image: bytes(LINUX), initrd: bytes(KERNEL) })
    const vm = await boot(kernel(), { memory: '64M', console: true, disks: [{ memory: '1M' }] })
    // What is held until the end of a turn of the loop is free after another one.
    await new Promise((resolve) => setImmediate(resolve))
    collectGarbage()
    expect(references.map((reference) => reference.deref())).toEqual([undefined, undefined])
    expect(vm.boot.format).toBe('linux')
  })

  it('says what was booted', async () => {
    expect((await boot(KERNEL)).boot).toEqual({ format: 'flat', mode: 'real', entry: 0x7c00 })
    const vm = await boot({ image: program(UD2), mode: 'long', at: 0x20_0000 })
    expect(vm.boot).toEqual({ format: 'flat', mode: 'long', entry: 0x20_0000 })
  })

  it('loads the image where it was told to', async () => {
    const vm = await boot({ image: KERNEL, at: 0x1000 })
    expect(vm.memory.read(0x1000, KERNEL.length)).toEqual(KERNEL)
    expect(await vm.run()).toMatchObject({ code: 7 })
  })

  it.each([
    [4096 * 20, 4096 * 20],
    ['80K', 80 * 1024],
    ['80k', 80 * 1024],
    ['2M', 2 ** 21],
    ['2MiB', 2 ** 21],
    ['2 mb', 2 ** 21],
    ['1.5M', 1.5 * 2 ** 20],
    ['1048576', 2 ** 20],
    [' 1M ', 2 ** 20],
  ])('takes %j as memory', async (memory, size) => {
    const vm = await boot(KERNEL, { memory })
    expect(vm.memory.contains(0, size)).toBe(true)
    expect(vm.memory.contains(size)).toBe(false)
  })

  it('gives 64 MiB unless told otherwise', async () => {
    const vm = await VirtualMachine.create({ kernel: KERNEL })
    expect(vm.memory.size).toBe(64 * 2 ** 20)
    await vm.close()
  })

  it('has as many vCPUs as it was told, and one unless told', async () => {
    expect((await boot(KERNEL)).vcpus).toHaveLength(1)
    const vm = await boot(KERNEL, { cpus: 3 })
    expect(vm.vcpus.map(({ index, state }) => [index, state])).toEqual([
      [0, 'runnable'],
      [1, 'parked'],
      [2, 'parked'],
    ])
  })

  it('says everything about what was booted before it runs', async () => {
    const vm = await boot(program(HLT))
    expect(vm.running).toBe(false)
    expect(vm.serial.output).toBe('')
    expect(vm.debugConsole.output).toBe('')
    expect(vm.postCodes).toEqual([])
    expect(vm.statistics).toMatchObject({
      unclaimedPorts: { reads: 0, writes: 0 },
      unclaimedMmio: { reads: 0, writes: 0 },
      serialDroppedBytes: 0,
    })
  })
})

describe('the options', () => {
  it.each([
    [undefined, 'an object for options'],
    [null, 'an object for options'],
    ['kernel.elf', 'an object for options'],
    [[], 'an object for options'],
    [{}, 'a path, a Uint8Array or \\{ image, … \\} for kernel but received undefined'],
    [{ kernel: 5 }, 'for kernel but received 5'],
    [{ kernel: {} }, 'for kernel.image but received undefined'],
    [{ kernel: { image: [1, 2] } }, 'for kernel.image but received an array of 2'],
    [{ kernel: new Uint16Array(2) }, 'for kernel but received Uint16Array'],
    [{ kernel: new ArrayBuffer(2) }, 'for kernel but received an object of ArrayBuffer'],
    [{ kernel: { image: KERNEL, cmdline: 5 } }, 'a string for kernel.cmdline'],
    [{ kernel: { image: KERNEL, modules: 'm' } }, 'an array .* for kernel.modules'],
    [{ kernel: { image: KERNEL, modules: [5] } }, 'for kernel.modules\\[0\\]'],
    [{ kernel: { image: KERNEL, modules: [{ image: 5 }] } }, 'for kernel.modules\\[0\\].image'],
    [
      { kernel: { image: KERNEL, modules: [{ image: KERNEL, cmdline: 5 }] } },
      'for kernel.modules\\[0\\].cmdline',
    ],
    [{ kernel: { image: KERNEL, mode: 'reel' } }, "'real'"],
    [{ kernel: { image: KERNEL, format: 'elv' } }, "'elf'"],
    [{ kernel: { image: KERNEL, at: -1 } }, 'for at'],
    [{ kernel: { image: KERNEL, at: '0x7c00' } }, 'for at'],
    [{ kernel: KERNEL, memory: {} }, 'for memory'],
    [{ kernel: KERNEL, execution: 'thread' }, "did you mean 'threads'"],
    [{ kernel: KERNEL, execution: 5 }, 'for execution but received 5'],
    [{ kernel: KERNEL, hugePages: '4M' }, "'2M', '1G' for hugePages"],
    [{ kernel: KERNEL, devices: {} }, 'an array of devices for devices'],
    [{ kernel: KERNEL, devices: [null] }, 'for device but received null'],
    [{ kernel: KERNEL, devices: [{ name: 'x' }] }, 'at least one range'],
    [{ kernel: KERNEL, devices: [{ ports: { base: 1, length: 1 } }] }, 'for device.name'],
    [{ kernel: KERNEL, devices: [{ name: 'x', ports: { base: 0x10000, length: 1 } }] }, 'for base of ports'],
    [{ kernel: KERNEL, devices: [{ name: 'x', ports: { base: 0xffff, length: 2 } }] }, 'for length of ports'],
  ])('%# are refused with ERR_INVALID_ARGUMENT that says what is expected', async (options, message) => {
    await expect(create(options)).rejects.toEqual(errorWith('ERR_INVALID_ARGUMENT', message))
  })

  it.each([
    [{ kernel: KERNEL, memroy: '64M' }, "'memroy'; did you mean 'memory'"],
    [{ kernel: KERNEL, cpuss: 2 }, "'cpuss'; did you mean 'cpus'"],
    [{ kernel: { image: KERNEL, module: [] } }, "'module'; did you mean 'modules'"],
    [{ kernel: { image: KERNEL, modules: [{ image: KERNEL, cmdlin: '' }] } }, "did you mean 'cmdline'"],
  ])('%# with an unknown key name the nearest', async (options, message) => {
    await expect(create(options)).rejects.toEqual(errorWith('ERR_UNKNOWN_OPTION', message))
  })

  it('have the facts of what is wrong as fields of the error', async () => {
    const error = await create({ kernel: KERNEL, cpus: 0 }).catch((reason) => reason)
    expect(error).toMatchObject({ argument: 'cpus', received: 0 })
  })
})

describe('27: memory sizes and processor counts', () => {
  it.each([
    Number.NaN,
    Number.POSITIVE_INFINITY,
    '64Q',
    '',
    'M',
    '-64M',
    '0x1000000',
    '1e9',
    '64 64M',
    true,
    null,
    64n,
    [],
  ])('memory %s is no size', async (memory) => {
    await expect(create({ kernel: KERNEL, memory })).rejects.toEqual(
      errorWith('ERR_INVALID_ARGUMENT', 'for memory'),
    )
  })

  it.each([
    0,
    -4096,
    1,
    4095,
    4097,
    2 ** 21 + 1,
    4096.5,
    '0M',
    '1K',
    '1.3K',
    '1000000',
    Number.MAX_SAFE_INTEGER,
    2 ** 53,
    Number.MAX_VALUE,
    '16T',
    '999999999999999999999G',
    totalmem() - (totalmem() % 4096) + 4096,
  ])('memory %j is none that a machine can have', async (memory) => {
    await expect(create({ kernel: KERNEL, memory })).rejects.toEqual(
      errorWith('ERR_MEMORY_SIZE', 'for memory'),
    )
  })

  it('one page of memory is a machine, though none for a kernel at 0x7c00', async () => {
    await expect(create({ kernel: KERNEL, memory: 4096 })).rejects.toEqual(errorWith('ERR_IMAGE_TOO_LARGE'))
    const vm = await boot({ image: KERNEL, at: 0x500 }, { memory: 4096 })
    expect(await vm.run()).toMatchObject({ code: 7 })
  })

  it.each([0, -1, 1.5, Number.NaN, Number.POSITIVE_INFINITY, '2', null, 2n])(
    'cpus %s are refused',
    async (cpus) => {
      await expect(create({ kernel: KERNEL, cpus })).rejects.toEqual(
        errorWith('ERR_INVALID_ARGUMENT', 'for cpus'),
      )
    },
  )

  it("more cpus than this host's KVM has are refused before any is made", async () => {
    const most = inspectHost().capabilities!.MAX_VCPUS
    for (const cpus of [most + 1, 1e9, 2 ** 53]) {
      await expect(create({ kernel: KERNEL, cpus })).rejects.toEqual(
        errorWith('ERR_INVALID_ARGUMENT', `at most ${most}`),
      )
    }
  })

  it('huge pages that nobody reserved are ERR_MEMORY_SIZE', async () => {
    await expect(create({ kernel: KERNEL, memory: '1G', hugePages: '1G' })).rejects.toEqual(
      errorWith('ERR_MEMORY_SIZE', 'huge pages'),
    )
  })
})

describe('27: image files', () => {
  const missing = () => join(folder, 'missing')

  it('a file that is missing is ERR_IMAGE_READ, with its path and the cause', async () => {
    await expect(create({ kernel: missing() })).rejects.toEqual(errorWith('ERR_IMAGE_READ', 'missing'))
    await expect(create({ kernel: missing() })).rejects.toMatchObject({
      path: missing(),
      cause: { code: 'ENOENT' },
    })
    await expect(create({ kernel: { image: KERNEL, modules: [missing()] } })).rejects.toEqual(
      errorWith('ERR_IMAGE_READ'),
    )
  })

  it('a path with a NUL, an empty path and a URL that is no file are typed errors', async () => {
    await expect(create({ kernel: 'a\0b' })).rejects.toEqual(errorWith('ERR_IMAGE_READ'))
    await expect(create({ kernel: '' })).rejects.toEqual(errorWith('ERR_IMAGE_READ'))
    for (const url of ['http://localhost/kernel', 'file://host/kernel', 'file:///a%2Fb']) {
      const error = errorWith('ERR_INVALID_ARGUMENT', `file: URL .* received '${url}'`)
      await expect(create({ kernel: new URL(url) })).rejects.toEqual(error)
      await expect(create({ kernel: { image: KERNEL, modules: [new URL(url)] } })).rejects.toEqual(error)
    }
  })

  it('a directory and a device are ERR_IMAGE_READ', async () => {
    await expect(create({ kernel: folder })).rejects.toEqual(errorWith('ERR_IMAGE_READ', 'regular file'))
    await expect(create({ kernel: '/dev/zero' })).rejects.toEqual(errorWith('ERR_IMAGE_READ', 'regular file'))
  })

  it('a FIFO that nobody writes to does not hang', async () => {
    const fifo = join(folder, 'fifo')
    execFileSync('sh', ['-c', 'mkfifo "$0" 2>/dev/null || busybox mkfifo "$0"', fifo])
    await expect(create({ kernel: fifo })).rejects.toEqual(errorWith('ERR_IMAGE_READ', 'regular file'))
  })

  it('an empty file and empty bytes are ERR_IMAGE_FORMAT', async () => {
    const empty = join(folder, 'empty')
    writeFileSync(empty, '')
    await expect(create({ kernel: empty })).rejects.toEqual(errorWith('ERR_IMAGE_FORMAT', 'empty'))
    await expect(create({ kernel: new Uint8Array() })).rejects.toEqual(errorWith('ERR_IMAGE_FORMAT', 'empty'))
  })
})
