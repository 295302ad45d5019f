import { existsSync, mkdtempSync, readFileSync, rmSync, symlinkSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { dirname, join } from 'node:path'
import { describe, expect, it, onTestFinished } from 'vitest'
import { FileDisk, MemoryDisk, type NodevisorError, VirtualMachine } from '../../src/index.js'
import { FRAME } from '../../src/migration/protocol.js'
import { makeImage, pattern } from '../backends/disks.js'
import { RUN_LIMIT } from '../helpers/limits.js'
import { boot, errorWith } from '../machine/boot.js'
import { bootVirtio, expectWritten, ONE_REQUEST, offerChain, SECTOR } from '../machine/virtio-guest.js'
import { duplexPair, move, openFiles, watchedPair } from './machines.js'

const SUCCESS = { reason: 'debug-exit', code: 16 }

function image(): { readonly path: string; readonly folder: string; readonly before: Uint8Array } {
  const before = pattern(256 * SECTOR)
  const path = makeImage(before)
  return { path, folder: dirname(path), before }
}

/** Moves a machine whose guest writes to its disk at each line that it prints. */
async function moveAtEachLine(first: VirtualMachine, folder: string): Promise<VirtualMachine[]> {
  const machines = [first]
  for (;;) {
    const vm = machines.at(-1)!
    const run = vm.run({ timeout: RUN_LIMIT })
    const said = await Promise.race([vm.serial.waitFor('\n').catch(() => undefined), run])
    if (said !== undefined && typeof said === 'object' && 'reason' in said) {
      expect(said).toMatchObject(SUCCESS)
      return machines
    }
    const other = await move(vm, { diskFolders: [folder] })
    const result = await run
    machines.push(other)
    await vm.close()
    // The guest had come to its end before.
    if (result.reason !== 'migrated') {
      expect(result).toMatchObject(SUCCESS)
      return machines
    }
  }
}

describe('the disks of a machine that is moved', () => {
  it.each(['none', 'split', 'full'] as const)(
    'are handed over while they are written: irqchip %s',
    async (irqchip) => {
      const { path, folder, before } = image()
      const words = irqchip === 'none' ? 'block' : 'block irq'
      const vm = await bootVirtio(words, { disks: [path], irqchip })
      const machines = await moveAtEachLine(vm, folder)
      expect(machines.length).toBeGreaterThan(3)
      await machines.at(-1)!.close()
      expectWritten(before, readFileSync(path))
    },
  )

  it('may be overlays that are kept', async () => {
    const { path, folder, before } = image()
    const overlay = join(folder, 'changes')
    const vm = await bootVirtio('block', { disks: [{ file: path, overlay }] })
    const machines = await moveAtEachLine(vm, folder)
    expect(machines.length).toBeGreaterThan(3)
    await machines.at(-1)!.close()
    expect(readFileSync(path).equals(before)).toBe(true)
    const copy = await VirtualMachine.create({
      kernel: { image: ONE_REQUEST, mode: 'long' },
      disks: [{ file: path, overlay }],
    })
    await copy.close()
  })

  it('are locked by the one that has the machine, and by nobody else', async () => {
    const { path, folder } = image()
    const vm = await bootVirtio('block', { disks: [path] })
    await expect(FileDisk.open({ path })).rejects.toEqual(errorWith('ERR_DISK_IN_USE'))
    const other = await move(vm, { diskFolders: [folder] })
    await expect(FileDisk.open({ path })).rejects.toEqual(errorWith('ERR_DISK_IN_USE'))
    await vm.close()
    await expect(FileDisk.open({ path })).rejects.toEqual(errorWith('ERR_DISK_IN_USE'))
    await other.close()
    const disk = await FileDisk.open({ path })
    await disk.close()
  })

  it('are the old ones where the move fails, at whatever frame', async () => {
    const { path, folder, before } = image()
    const vm = await bootVirtio('block', { disks: [path] })
    const files = openFiles()
    for (let end = 0, over = false; !over; end++) {
      let seen = 0
      const [here, there] = watchedPair(({ type }) => {
        if (type === FRAME.GO) over = true
        return over || seen++ === end ? 'cut' : 'pass'
      })
      const [received, moved] = await Promise.allSettled([
        VirtualMachine.receive(there, { diskFolders: [folder] }),
        vm.migrate(here),
      ])
      expect([received.status, moved.status]).toEqual(['rejected', 'rejected'])
      expect(end).toBeLessThan(60)
    }
    vm.resume()
    expect(openFiles() - files).toBeLessThanOrEqual(1)
    expect(await vm.run({ timeout: RUN_LIMIT })).toMatchObject(SUCCESS)
    await vm.close()
    expectWritten(before, readFileSync(path))
  })

  it('keep a machine from going on here that runs there', async () => {
    const { path, folder } = image()
    const vm = await bootVirtio('block', { disks: [path] })
    const [here, there] = watchedPair(({ type }) => (type === FRAME.RUNNING ? 'cut' : 'pass'))
    const [received, moved] = await Promise.allSettled([
      VirtualMachine.receive(there, { diskFolders: [folder] }),
      vm.migrate(here),
    ])
    expect(moved).toMatchObject({ reason: { uncertain: true } })
    const other = (received as PromiseFulfilledResult<VirtualMachine>).value
    onTestFinished(() => other.close())
    expect(() => vm.resume()).toThrow(errorWith('ERR_DISK_IN_USE', 'is in use'))
    expect(await other.run({ timeout: RUN_LIMIT })).toMatchObject(SUCCESS)
    await other.close()
    // It has closed them, but written to them before.
    expect(() => vm.resume()).toThrow(errorWith('ERR_DISK_IN_USE', 'was written'))
    await expect(vm.run()).rejects.toEqual(errorWith('ERR_RUNNING', 'resume()'))
  })

  it('are not served by either side while the machine is on its way', async () => {
    const { path, folder, before } = image()
    const kernel = { image: ONE_REQUEST, mode: 'long' } as const
    const vm = await boot(kernel, { disks: [path] })
    // A request that the guest has made but not told of yet.
    vm.memory.write(0x20_3000, Uint8Array.from([1, 0, 0, 0, 0, 0, 0, 0, 3]))
    vm.memory.write(0x21_0000, new Uint8Array(SECTOR).fill(0xee))
    offerChain(vm, [
      { address: 0x20_3000, length: 16 },
      { address: 0x21_0000, length: SECTOR },
      { address: 0x20_4000, length: 1, flags: 2 },
    ])
    const seen: boolean[] = []
    const unwritten = () => readFileSync(path).equals(before)
    const [here, there] = watchedPair(() => {
      seen.push(unwritten())
      return 'pass'
    })
    const [other] = await Promise.all([
      VirtualMachine.receive(there, { diskFolders: [folder] }),
      vm.migrate(here),
    ])
    onTestFinished(() => other.close())
    expect(seen.every((isUnwritten) => isUnwritten)).toBe(true)
    expect(await other.run({ timeout: RUN_LIMIT })).toMatchObject({ reason: 'debug-exit', code: 1 })
    expect(readFileSync(path)[3 * SECTOR]).toBe(0xee)
  })

  it.each([
    ['no folder is named', {}, /diskFolders/],
    [
      'they are in another folder',
      { diskFolders: [mkdtempSync(join(tmpdir(), 'nodevisor-other-'))] },
      /one of the diskFolders/,
    ],
    ['other disks are of another size', { disks: [{ memory: 512 }] }, /512/],
    ['other disks are fewer', { disks: [] }, /as many disks/],
  ])('are refused where %s, and the machine goes on', async (_name, options, message) => {
    for (const folder of (options as { diskFolders?: string[] }).diskFolders ?? []) {
      onTestFinished(() => rmSync(folder, { recursive: true, force: true }))
    }
    const { path, before } = image()
    const vm = await bootVirtio('block', { disks: [path] })
    const [here, there] = duplexPair()
    const [received, moved] = await Promise.allSettled([
      VirtualMachine.receive(there, options),
      vm.migrate(here),
    ])
    expect(received).toMatchObject({
      status: 'rejected',
      reason: { message: expect.stringMatching(message) },
    })
    expect(moved).toMatchObject({ status: 'rejected', reason: { remoteCode: 'ERR_SNAPSHOT_MISMATCH' } })
    expect(await vm.run({ timeout: RUN_LIMIT })).toMatchObject(SUCCESS)
    await vm.close()
    expectWritten(before, readFileSync(path))
  })

  it('may not be reached by a link out of the folder', async () => {
    const { path } = image()
    const folder = mkdtempSync(join(tmpdir(), 'nodevisor-links-'))
    onTestFinished(() => rmSync(folder, { recursive: true }))
    const link = join(folder, 'disk')
    symlinkSync(path, link)
    const vm = await bootVirtio('block', { disks: [link] })
    const [here, there] = duplexPair()
    const [received] = await Promise.allSettled([
      VirtualMachine.receive(there, { diskFolders: [folder] }),
      vm.migrate(here),
    ])
    expect(received).toMatchObject({ reason: { cause: { code: 'ERR_SNAPSHOT_MISMATCH' } } })
  })

  it('are not made anew where an overlay is missing', async () => {
    const { path, folder } = image()
    const overlay = join(folder, 'changes')
    const vm = await bootVirtio('block', { disks: [{ file: path, overlay }] })
    rmSync(overlay)
    const [here, there] = duplexPair()
    const [received, moved] = await Promise.allSettled([
      VirtualMachine.receive(there, { diskFolders: [folder] }),
      vm.migrate(here),
    ])
    expect(received).toMatchObject({ reason: { cause: { code: 'ERR_DISK_OPEN' } } })
    expect((moved as PromiseRejectedResult).reason as NodevisorError).toMatchObject({
      remoteCode: 'ERR_DISK_OPEN',
    })
    expect(existsSync(overlay)).toBe(false)
  })

  it('that are another file of that name are refused', async () => {
    const { path, folder, before } = image()
    const vm = await bootVirtio('block', { disks: [path] })
    // As on another host: the same name, another file.
    rmSync(path)
    writeFileSync(path, before)
    const [here, there] = duplexPair()
    const [received, moved] = await Promise.allSettled([
      VirtualMachine.receive(there, { diskFolders: [folder] }),
      vm.migrate(here),
    ])
    expect(received).toMatchObject({ reason: { cause: { code: 'ERR_SNAPSHOT_MISMATCH' } } })
    expect(moved.status).toBe('rejected')
    expect(await vm.run({ timeout: RUN_LIMIT })).toMatchObject(SUCCESS)
  })

  it('in memory are refused, unless the receiver has others', async () => {
    const contents = pattern(256 * SECTOR)
    const vm = await bootVirtio('block', { disks: [{ memory: contents }] })
    const [here, there] = duplexPair()
    const [received] = await Promise.allSettled([
      VirtualMachine.receive(there, { diskFolders: ['/'] }),
      vm.migrate(here),
    ])
    expect(received).toMatchObject({ reason: { message: expect.stringContaining("kind 'memory'") } })
    const backend = new MemoryDisk({ bytes: contents })
    const other = await move(vm, { disks: [{ backend }] })
    expect(await other.run({ timeout: RUN_LIMIT })).toMatchObject(SUCCESS)
  })

  it('of which a snapshot has a view stay', async () => {
    const { path, folder } = image()
    const vm = await bootVirtio('block', { disks: [path] })
    const snapshot = await vm.snapshot()
    await expect(vm.migrate(duplexPair()[0])).rejects.toEqual(errorWith('ERR_MIGRATION_FAILED', 'snapshot'))
    await snapshot.close()
    const other = await move(vm, { diskFolders: [folder] })
    expect(await other.run({ timeout: RUN_LIMIT })).toMatchObject(SUCCESS)
  })
})
