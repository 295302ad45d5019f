import { mkdtempSync, rmSync, truncateSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { describe, expect, it, onTestFinished } from 'vitest'
import type { DiskOptions } from '../../src/index.js'
import { BOOT_LIMIT, bootLinux, HAS_USER_SPACE, kernelNamed, programsArchive } from './linux.js'

const E2FSPROGS = ['mke2fs', 'e2fsck']

describe.runIf(HAS_USER_SPACE)('A disk of Linux', { timeout: BOOT_LIMIT }, () => {
  it.each(['raw', 'overlay'])('%s keeps a file of 64 MiB on ext4 over a reboot', async (kind) => {
    const folder = mkdtempSync(join(tmpdir(), 'nodevisor-linux-disk-'))
    onTestFinished(() => rmSync(folder, { recursive: true }))
    const file = join(folder, 'disk.img')
    writeFileSync(file, '')
    truncateSync(file, 128 << 20)
    const disk: DiskOptions = kind === 'raw' ? { file } : { file, overlay: join(folder, 'overlay') }
    const kernel = await kernelNamed(kind === 'raw' ? 'tiny' : 'debian')
    const more = await programsArchive(E2FSPROGS)
    const boot = () => bootLinux(kernel, { disks: [disk], more })
    const check = { check: true, timeout: BOOT_LIMIT }

    const first = await boot()
    await first.vm.exec(
      '/sbin/mke2fs -q -t ext4 /dev/vda && mkdir -p /mnt && mount -t ext4 /dev/vda /mnt',
      check,
    )
    await first.vm.exec('dd if=/dev/urandom of=/mnt/file bs=1M count=64', check)
    const written = (await first.vm.exec('sha256sum /mnt/file && umount /mnt', check)).stdout
    expect(written).toMatch(/^[0-9a-f]{64} {2}\/mnt\/file\n$/)
    const ended = first.vm.exec('reboot -f').catch(() => undefined)
    expect(await first.run).toMatchObject({ reason: 'reset' })
    await ended
    await first.vm.close()

    const second = await boot()
    const { stdout } = await second.vm.exec('mount -t ext4 /dev/vda /mnt && sha256sum /mnt/file', check)
    expect(stdout).toBe(written)
    expect((await second.vm.exec('umount /mnt && /sbin/e2fsck -fn /dev/vda', check)).stdout).toContain(
      '/dev/vda: 12/',
    )
    await second.vm.exec('sync', check)
    second.vm.stop()
    await second.run
  })
})
