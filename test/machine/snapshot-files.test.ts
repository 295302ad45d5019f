import { cpSync, readdirSync, readFileSync, truncateSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { describe, expect, it, onTestFinished } from 'vitest'
import {
  type CopyOptions,
  type SnapshotProgress,
  VirtualMachine,
  type VirtualMachineOptions,
} from '../../src/index.js'
import { decodeState, encodeState, type SnapshotRecord } from '../../src/snapshot/state-file.js'
import { makeImage } from '../backends/disks.js'
import { type Code, debugExit, HLT, program } from '../helpers/code.js'
import { makeFolder } from '../helpers/folders.js'
import { onPvm } from '../helpers/guests.js'
import { RUN_LIMIT } from '../helpers/limits.js'
import { boot, EXECUTIONS, errorWith } from './boot.js'
import { SECTOR } from './virtio-guest.js'

const VALUE = 0x6000
/** Counts at {@link VALUE}, says so, and goes on with that in the next run. */
const COUNT_FOR_EVER: Code = [0xff, 0x06, 0x00, 0x60, ...debugExit(1), 0xeb, 0xf6]

async function run(vm: VirtualMachine): Promise<number> {
  expect(await vm.run({ timeout: RUN_LIMIT })).toMatchObject({ reason: 'debug-exit', code: 1 })
  return vm.memory.readUint16(VALUE)
}

async function restore(path: string, options?: CopyOptions): Promise<VirtualMachine> {
  const vm = await VirtualMachine.restore(path, options)
  onTestFinished(() => vm.close())
  return vm
}

const counting = (options: Partial<VirtualMachineOptions> = {}) =>
  boot({ image: program(COUNT_FOR_EVER) }, options)

/** Writes a state again, with a right checksum. */
function change(path: string, edit: (record: SnapshotRecord) => object): void {
  const file = join(path, 'state')
  const record = decodeState(readFileSync(file))
  writeFileSync(file, encodeState({ ...record, ...edit(record) }))
}

describe.each(['none', 'full', 'split'] as const)('with irqchip %s, a snapshot in a folder', (irqchip) => {
  it.each(EXECUTIONS)('is what machines go on from, each for itself (%s)', async (execution) => {
    const vm = await counting({ irqchip, execution, memory: '16M' })
    await run(vm)
    vm.memory.write(0x80_0000, Buffer.from('before'))
    const path = join(makeFolder(), 'snapshot')
    const progress: SnapshotProgress[] = []
    const info = await vm.snapshot(path, { onProgress: (step) => progress.push(step) })
    expect(info.path).toBe(path)
    expect(readdirSync(path).sort()).toEqual(['memory', 'state'])
    expect(progress.at(-1)!.done).toBe(progress.at(-1)!.total)
    vm.memory.write(0x80_0000, Buffer.from('parent'))
    expect(await run(vm)).toBe(2)
    await vm.close()

    const first = await restore(path)
    const second = await restore(path)
    expect([await run(first), await run(first), await run(second)]).toEqual([2, 3, 2])
    expect(Buffer.from(first.memory.read(0x80_0000, 6)).toString()).toBe('before')
    expect([first.irqchip, first.boot]).toEqual([irqchip, vm.boot])
  })
})

describe('a snapshot in a folder', () => {
  it('may have only what has changed', async () => {
    const vm = await counting({ memory: '16M' })
    const folder = makeFolder()
    await expect(vm.snapshot(join(folder, '0'), { incremental: true })).rejects.toEqual(
      errorWith('ERR_INVALID_ARGUMENT', /incremental/),
    )
    await vm.snapshot(join(folder, '0'))
    for (let i = 1; i <= 3; i++) {
      vm.memory.fill(0x10_0000 * i, 0x1000, i)
      expect(await run(vm)).toBe(i)
      const { pages } = await vm.snapshot(join(folder, `${i}`), { incremental: true })
      // The page of the counter, and the one that was filled.
      expect(pages).toBe(2)
      // Children keep what is behind their memory from being changed.
      if (i === 2) onTestFinished(await vm.fork().then((child) => () => child.close()))
    }
    for (let i = 0; i <= 3; i++) {
      const copy = await restore(join(folder, `${i}`))
      expect(copy.memory.readUint16(VALUE)).toBe(i)
      expect([1, 2, 3].map((n) => copy.memory.readUint8(0x10_0000 * n))).toEqual(
        [1, 2, 3].map((n) => (n <= i ? n : 0)),
      )
      expect(await run(copy)).toBe(i + 1)
      await copy.snapshot(join(folder, `${i} and on`), { incremental: true })
      expect((await restore(join(folder, `${i} and on`))).memory.readUint16(VALUE)).toBe(i + 1)
    }
  })

  it('that could not be written leaves what has changed to the next one', async () => {
    const vm = await counting()
    const folder = makeFolder()
    await vm.snapshot(join(folder, '0'))
    await run(vm)
    await expect(vm.snapshot(join(folder, 'no', 'such'), { incremental: true })).rejects.toEqual(
      errorWith('ERR_SNAPSHOT_WRITE', /no/),
    )
    const aborted = vm.snapshot(join(folder, 'never'), { incremental: true, signal: AbortSignal.abort() })
    await expect(aborted).rejects.toEqual(errorWith('ERR_SNAPSHOT_WRITE'))
    await vm.snapshot(join(folder, '1'), { incremental: true })
    expect(readdirSync(folder).sort()).toEqual(['0', '1'])
    expect((await restore(join(folder, '1'))).memory.readUint16(VALUE)).toBe(1)
  })

  it('of a machine that returned to an earlier one has that', async () => {
    const vm = await counting()
    const folder = makeFolder()
    const snapshot = await vm.snapshot()
    onTestFinished(() => snapshot.close())
    await run(vm)
    await vm.snapshot(join(folder, '1'))
    await run(vm)
    await vm.reset(snapshot)
    await vm.snapshot(join(folder, '2'), { incremental: true })
    expect((await restore(join(folder, '2'))).memory.readUint16(VALUE)).toBe(0)
  })

  it('is refused on another kind of host, or one that lacks what the guest was shown', async () => {
    const vm = await counting()
    const path = join(makeFolder(), 'snapshot')
    await vm.snapshot(path)
    const other = onPvm ? 'hardware' : 'pvm'
    change(path, ({ host }) => ({ host: { ...host, kind: other } }))
    await expect(restore(path)).rejects.toEqual(errorWith('ERR_SNAPSHOT_HOST', new RegExp(other)))
  })

  it('with other devices is refused', async () => {
    const vm = await counting({ irqchip: 'split' })
    const path = join(makeFolder(), 'snapshot')
    await vm.snapshot(path)
    const device = { name: 'mine', ports: { base: 0x10, length: 1 }, read: () => 0 }
    await expect(restore(path, { devices: [device] })).rejects.toEqual(
      errorWith('ERR_SNAPSHOT_MISMATCH', /mine is new/),
    )
    change(path, ({ state }) => ({ state: { ...state, devices: state.devices.slice(1) } }))
    await expect(restore(path)).rejects.toEqual(errorWith('ERR_SNAPSHOT_MISMATCH', /is new/))
  })

  it('29: every state that decodes makes a machine, or a typed error', async () => {
    const vm = await counting({ irqchip: 'full' })
    const folder = makeFolder()
    await vm.snapshot(join(folder, 'good'))
    const openBefore = readdirSync('/proc/self/fd').length
    const structs = ['regs', 'sregs', 'xsave', 'xcrs', 'lapic', 'msrs', 'events', 'debugRegs'] as const
    for (const struct of structs) {
      for (const byte of [0x00, 0x5a, 0xff]) {
        const path = join(folder, `${struct} ${byte}`)
        cpSync(join(folder, 'good'), path, { recursive: true })
        change(path, ({ state }) => {
          const [cpu] = state.vcpus
          const bytes = cpu![struct].map((value, index) =>
            // Of MSRs the values, not the indices: those have to be in the order of the host's.
            struct === 'msrs' && index % 16 < 8 ? value : byte,
          )
          return { state: { ...state, vcpus: [{ ...cpu!, [struct]: bytes }] } }
        })
        try {
          const copy = await VirtualMachine.restore(path)
          const { reason } = await copy.run({ timeout: 20 })
          expect(reason).toMatch(/./)
          await copy.close()
        } catch (error) {
          expect(error).toEqual(errorWith('ERR_SNAPSHOT_STATE'))
        }
      }
    }
    expect(readdirSync('/proc/self/fd').length).toBe(openBefore)
  })

  it('29: truncated memory is refused', async () => {
    const vm = await counting()
    const path = join(makeFolder(), 'snapshot')
    await vm.snapshot(path)
    truncateSync(join(path, 'memory'), 0x1000)
    await expect(restore(path)).rejects.toEqual(errorWith('ERR_SNAPSHOT_DAMAGED'))
  })
})

describe('the disks of a snapshot in a folder', () => {
  const text = (bytes: Uint8Array) => Buffer.from(bytes).toString('latin1', 0, 8)

  it('that are files are opened again, unless they have changed', async () => {
    const bytes = Buffer.alloc(8 * SECTOR, 'a')
    const image = makeImage(bytes)
    const vm = await boot({ image: program(HLT) }, { disks: [{ file: image }] })
    const path = join(makeFolder(), 'snapshot')
    await vm.snapshot(path)
    await expect(restore(path)).rejects.toEqual(errorWith('ERR_DISK_IN_USE'))
    await vm.close()
    const copy = await restore(path)
    expect(copy.virtioDevices.map(({ name }) => name)).toEqual(['disk0'])
    await copy.close()
    const lying = await restore(path, { disks: 'overlay' })
    await lying.close()
    writeFileSync(image, Buffer.alloc(8 * SECTOR, 'b'))
    await expect(restore(path)).rejects.toEqual(errorWith('ERR_SNAPSHOT_MISMATCH', /written since/))
    await (await restore(path, { disks: [{ file: image }] })).close()
    await expect(restore(path, { disks: [] })).rejects.toEqual(errorWith('ERR_SNAPSHOT_MISMATCH'))
  })

  it('that are in memory, or discarded, come with it', async () => {
    const image = makeImage(Buffer.alloc(8 * SECTOR, 'file'))
    const disks = [{ memory: Buffer.alloc(8 * SECTOR, 'memo') }, { file: image, overlay: true }]
    const vm = await boot({ image: program(HLT) }, { disks })
    const path = join(makeFolder(), 'snapshot')
    await vm.snapshot(path)
    await vm.close()
    expect(readdirSync(path).sort()).toEqual(['disk0.raw', 'disk1.raw', 'memory', 'state'])
    expect(text(readFileSync(join(path, 'disk0.raw')))).toBe('memomemo')
    expect(text(readFileSync(join(path, 'disk1.raw')))).toBe('filefile')
    await Promise.all([restore(path), restore(path)])
    change(path, ({ disks: [disk, ...others] }) => ({
      disks: [{ ...disk!, file: '../../etc/passwd' }, ...others],
    }))
    await expect(restore(path)).rejects.toEqual(errorWith('ERR_SNAPSHOT_DAMAGED'))
  })
})
