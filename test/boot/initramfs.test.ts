import { execFileSync, spawnSync } from 'node:child_process'
import {
  chmodSync,
  existsSync,
  lstatSync,
  mkdirSync,
  mkdtempSync,
  readFileSync,
  readlinkSync,
  rmSync,
  symlinkSync,
  truncateSync,
  writeFileSync,
} from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { pathToFileURL } from 'node:url'
import { gunzipSync } from 'node:zlib'
import fc from 'fast-check'
import { afterAll, beforeAll, describe, expect, it } from 'vitest'
import { type InitramfsOptions, type InitramfsSource, initramfs } from '../../src/index.js'
import { errorWith } from '../machine/boot.js'

let folder: string
beforeAll(() => {
  folder = mkdtempSync(join(tmpdir(), 'nodevisor-initramfs-'))
  mkdirSync(join(folder, 'root/bin'), { recursive: true })
  mkdirSync(join(folder, 'root/empty'))
  writeFileSync(join(folder, 'root/bin/tool'), 'a tool')
  chmodSync(join(folder, 'root/bin/tool'), 0o750)
  writeFileSync(join(folder, 'root/notes'), '')
  chmodSync(join(folder, 'root/notes'), 0o640)
  symlinkSync('/nowhere/else', join(folder, 'root/link'))
})
afterAll(() => rmSync(folder, { recursive: true }))

const host = (path: string) => join(folder, path)

/** An entry as an archive has it. */
interface Entry {
  readonly name: string
  readonly mode: number
  readonly content: string
  readonly device: readonly number[]
  readonly inode: number
}

/** Reads an archive field by field; fails for what the format does not allow. */
function entriesOf(archive: Uint8Array): Entry[] {
  const text = Buffer.from(archive)
  const entries: Entry[] = []
  for (let at = 0; ; ) {
    expect(at % 4).toBe(0)
    expect(text.toString('latin1', at, at + 6)).toBe('070701')
    const fields = Array.from({ length: 13 }, (_, index) => {
      const digits = text.toString('latin1', at + 6 + index * 8, at + 14 + index * 8)
      expect(digits).toMatch(/^[0-9a-f]{8}$/)
      return Number.parseInt(digits, 16)
    })
    const [inode, mode, uid, gid, , mtime, size, major, minor, rdevMajor, rdevMinor, nameSize, check] = fields
    expect([uid, gid, mtime, major, minor, check]).toEqual([0, 0, 0, 0, 0, 0])
    const nameEnd = at + 110 + nameSize! - 1
    expect(text[nameEnd]).toBe(0)
    const name = text.toString('utf8', at + 110, nameEnd)
    const start = (nameEnd + 4) & ~3
    at = (start + size! + 3) & ~3
    if (name === 'TRAILER!!!') {
      expect(archive.length % 512).toBe(0)
      expect(text.subarray(at).every((byte) => byte === 0)).toBe(true)
      return entries
    }
    const content = text.toString('utf8', start, start + size!)
    entries.push({ name, mode: mode!, content, device: [rdevMajor!, rdevMinor!], inode: inode! })
  }
}

/** Name, mode and content of each entry, in the order of the archive. */
async function listOf(source: InitramfsSource, options?: InitramfsOptions) {
  return entriesOf(await initramfs(source, options)).map(({ name, mode, content }) => [
    name,
    mode.toString(8),
    content,
  ])
}

describe('an initramfs', () => {
  it('is, byte for byte, what the format says', async () => {
    const header = (
      inode: number,
      mode: string,
      links: number,
      size: number,
      device: string,
      nameSize: number,
    ) =>
      [
        '070701',
        `0000000${inode}`,
        mode.padStart(8, '0'),
        '0'.repeat(16),
        `0000000${links}`,
        '0'.repeat(8),
        `0000000${size}`,
        '0'.repeat(16),
        device,
        `0000000${nameSize.toString(16)}`,
        '0'.repeat(8),
      ].join('')
    const none = '0'.repeat(16)
    const expected = [
      `${header(1, '41ed', 2, 0, none, 4)}dev\0\0\0`,
      `${header(2, '2180', 1, 0, '0000000500000001', 12)}dev/console\0\0\0`,
      `${header(3, '81ed', 1, 7, none, 5)}init\0\0#!/bin/\0`,
      `${header(0, '0', 1, 0, none, 11)}TRAILER!!!\0\0\0\0`,
    ].join('')
    const archive = await initramfs({ '/init': '#!/bin/', '/dev/console': { device: [5, 1] } })
    expect(Buffer.from(archive).toString('latin1')).toBe(
      expected.padEnd(512 * Math.ceil(expected.length / 512), '\0'),
    )
  })

  it('has each kind of entry, sorted, with the folders that they need before them', async () => {
    const source: InitramfsSource = {
      '/init': { content: 'plain', mode: 0o700 },
      '/etc/motd': 'welcome',
      '/etc-more': Buffer.from('\x7fELF and more'),
      '/bin/sh': { link: 'tool' },
      '/bin/tool': { file: host('root/bin/tool') },
      '/bin/other': { file: pathToFileURL(host('root/bin/tool')), mode: 0o4755 },
      '/dev/vda': { device: [254, 300], type: 'block', mode: 0o660 },
      '/proc/': { folder: true, mode: 0o555 },
    }
    expect(await listOf(source)).toEqual([
      ['bin', '40755', ''],
      ['bin/other', '104755', 'a tool'],
      ['bin/sh', '120777', 'tool'],
      ['bin/tool', '100750', 'a tool'],
      ['dev', '40755', ''],
      ['dev/vda', '60660', ''],
      ['etc', '40755', ''],
      ['etc-more', '100755', '\x7fELF and more'],
      ['etc/motd', '100644', 'welcome'],
      ['init', '100700', 'plain'],
      ['proc', '40555', ''],
    ])
    const device = entriesOf(await initramfs(source)).find(({ name }) => name === 'dev/vda')
    expect(device!.device).toEqual([254, 300])
  })

  it('counts its inodes, and is the same in whatever order it was described', async () => {
    const files = { '/a': '1', '/c/d': '2', '/b': { link: 'a' } } as const
    const archive = await initramfs(files)
    expect(entriesOf(archive).map(({ inode }) => inode)).toEqual([1, 2, 3, 4])
    const reversed = Object.fromEntries(Object.entries(files).reverse()) as InitramfsSource
    expect(Buffer.from(await initramfs(reversed)).equals(archive)).toBe(true)
  })

  it('is packed with gzip if told so, the same each time', async () => {
    const [once, twice] = [
      await initramfs({ '/a': 'x' }, { gzip: true }),
      await initramfs({ '/a': 'x' }, { gzip: true }),
    ]
    expect(Buffer.from(once).equals(twice)).toBe(true)
    expect(gunzipSync(once).equals(await initramfs({ '/a': 'x' }))).toBe(true)
  })

  it('without files is empty, and still an archive', async () => {
    expect(await listOf({})).toEqual([])
  })

  it('is made of a folder, with its permissions and its links as they are', async () => {
    const expected = [
      ['bin', lstatSync(host('root/bin')).mode.toString(8), ''],
      ['bin/tool', '100750', 'a tool'],
      ['empty', lstatSync(host('root/empty')).mode.toString(8), ''],
      ['link', '120777', '/nowhere/else'],
      ['notes', '100640', ''],
    ]
    expect(await listOf({ folder: host('root') })).toEqual(expected)
    expect(await listOf({ folder: pathToFileURL(host('root/')) })).toEqual(expected)
    expect(await listOf({ '/': { folder: host('root') } })).toEqual(expected)
  })

  it('has what is named by its path in place of what a folder has there', async () => {
    const list = await listOf({
      '/usr/notes': 'mine',
      '/usr/bin': { folder: host('root/empty') },
      '/usr': { folder: host('root') },
      '/usr/bin/tool': { link: 'x' },
    })
    expect(list).toContainEqual(['usr/notes', '100644', 'mine'])
    expect(list).toContainEqual(['usr/bin', '40755', ''])
    expect(list).toContainEqual(['usr/bin/tool', '120777', 'x'])
    expect(list).toContainEqual(['usr/link', '120777', '/nowhere/else'])
  })

  it('is made of a list of files, at the same paths', async () => {
    expect((await listOf([host('root/bin/tool')])).at(-1)).toEqual([
      host('root/bin/tool').slice(1),
      '100750',
      'a tool',
    ])
  })
})

describe('an initramfs is refused, before anything is read, with', () => {
  it.each([
    ['a path without a slash', { init: 'x' }, /begin with '\/' for source but received 'init'/],
    ["a path with '..'", { '/a/../../b': 'x' }, /without '\.\.' and NUL/],
    ['a path with NUL', { '/a\0b': 'x' }, /without '\.\.' and NUL/],
    ['a path that ends the archive', { '/TRAILER!!!': 'x' }, /does not end the archive/],
    ['a path that Linux skips', { [`/${'x'.repeat(4096)}`]: 'x' }, /less than 4096 bytes/],
    ['the same path twice', { '/a': 'x', '//a/': 'y' }, /each path once/],
    ['a file for a root', { '/': 'x' }, /a folder for \//],
    ['a file below a file', { '/a': 'x', '/a/b/c': 'y' }, /folder at \/a, since there is \/a\/b/],
    ['nothing at a path', { '/a': undefined }, /\{ link \}.* for \/a but received undefined/],
    ['two kinds at a path', { '/a': { link: 'b', content: 'c' } }, /for \/a/],
    ['permissions of a link', { '/a': { link: 'b', mode: 0o777 } }, /only link for \/a but received 'mode'/],
    ['an unknown key', { '/a': { content: 'b', owner: 7 } }, /received 'owner'/],
    ['a mode with a file type', { '/a': { content: 'b', mode: 0o100644 } }, /0o7777/],
    ['a device with one number', { '/a': { device: [5] } }, /\[major, minor\]/],
    ['a device number that is too large', { '/a': { device: [5, 2 ** 20] } }, /\[major, minor\]/],
    ['an unknown type of device', { '/a': { device: [5, 1], type: 'pipe' } }, /'character' or 'block'/],
    ['an empty link', { '/a': { link: '' } }, /1 to 4095 bytes/],
    ['content that is a number', { '/a': { content: 7 } }, /text or a Uint8Array/],
    ['a URL of the web', { '/a': { file: new URL('http://localhost/x') } }, /file: URL/],
    ['a list with numbers', [7], /source\[0\]/],
    ['bytes', new Uint8Array(8), /for source/],
    ['null', null, /for source/],
  ])('%s', async (_, source, message) => {
    const refused = expect(initramfs(source as InitramfsSource)).rejects
    await refused.toMatchObject({ name: 'NodevisorError', message: expect.stringMatching(message) })
    await refused.toMatchObject({ code: expect.stringMatching(/^ERR_(INVALID_ARGUMENT|UNKNOWN_OPTION)$/) })
  })

  it.each([
    [{ gzip: 1 }, 'ERR_INVALID_ARGUMENT'],
    [{ maxSize: 0 }, 'ERR_INVALID_ARGUMENT'],
    [{ maxSize: 2 ** 31 }, 'ERR_INVALID_ARGUMENT'],
    [{ zip: true }, 'ERR_UNKNOWN_OPTION'],
  ] as const)('the options %o', async (options, code) => {
    await expect(initramfs({}, options as unknown as InitramfsOptions)).rejects.toEqual(errorWith(code))
  })
})

describe('an initramfs is refused with an error that names', () => {
  it.each([
    ['a file that is missing', () => ({ '/a': { file: host('missing') } }), /missing.*ENOENT/],
    ['a folder in place of a file', () => ({ '/a': { file: host('root') } }), /not a regular file/],
    ['a folder that is missing', () => ({ folder: host('missing') }), /missing.*ENOENT/],
    ['a device', () => ({ '/a': { file: '/dev/zero' } }), /\/dev\/zero.*not a regular file/],
  ])('%s', async (_, source, message) => {
    await expect(initramfs(source() as InitramfsSource)).rejects.toEqual(errorWith('ERR_IMAGE_READ', message))
  })

  it('a FIFO in a folder, without waiting for it', async () => {
    mkdirSync(host('pipes'))
    execFileSync('sh', ['-c', 'mkfifo "$0" 2>/dev/null || busybox mkfifo "$0"', host('pipes/fifo')])
    const refused = initramfs({ folder: host('pipes') })
    await expect(refused).rejects.toEqual(
      errorWith('ERR_IMAGE_READ', /fifo.*neither a file, a folder nor a link/),
    )
  })

  it('a limit that it is over, however it is reached', async () => {
    const content = 'x'.repeat(1000)
    for (const source of [{ '/a': content }, { '/a': 'x'.repeat(500), '/b': 'x'.repeat(500) }]) {
      await expect(initramfs(source, { maxSize: 1023 })).rejects.toEqual(
        errorWith('ERR_IMAGE_TOO_LARGE', /1023 bytes/),
      )
    }
    // Header, name and content; the trailer; up to a whole block.
    expect(await initramfs({ '/a': content }, { maxSize: 1536 })).toHaveLength(1536)
  })

  it('a file that is too large to be read', async () => {
    writeFileSync(host('huge'), '')
    truncateSync(host('huge'), 3 * 2 ** 30)
    const refused = initramfs({ '/huge': { file: host('huge') } })
    await expect(refused).rejects.toEqual(errorWith('ERR_IMAGE_TOO_LARGE', String(3 * 2 ** 30)))
  })
})

it('whatever is described is what the archive has', async () => {
  const name = fc.stringMatching(/^[a-zé .-]{1,6}$/).filter((text) => text !== '.' && text !== '..')
  const path = fc.array(name, { minLength: 1, maxLength: 3 }).map((names) => `/${names.join('/')}`)
  await fc.assert(
    fc.asyncProperty(fc.dictionary(path, fc.string({ maxLength: 40 })), async (files) => {
      const isFolder = (file: string) => Object.keys(files).some((other) => other.startsWith(`${file}/`))
      if (Object.keys(files).some(isFolder)) return
      const entries = entriesOf(await initramfs(files as InitramfsSource))
      const seen = new Set(['.'])
      for (const { name, mode } of entries) {
        expect(seen).toContain(name.includes('/') ? name.slice(0, name.lastIndexOf('/')) : '.')
        if ((mode & 0o170000) === 0o040000) seen.add(name)
      }
      const found = entries.filter(({ mode }) => (mode & 0o170000) === 0o100000)
      const utf8 = (text: string) => Buffer.from(text).toString()
      expect(Object.fromEntries(found.map(({ name, content }) => [`/${name}`, content]))).toEqual(
        Object.fromEntries(Object.entries(files).map(([file, content]) => [file, utf8(content)])),
      )
    }),
    { numRuns: 300 },
  )
})

describe.skipIf(spawnSync('cpio', ['--version']).status !== 0)('cpio (needs cpio)', () => {
  const source = () =>
    ({
      '/init': '#!/bin/sh\n',
      '/bin': { folder: host('root/bin') },
      '/bin/sh': { link: 'tool' },
      '/a/b/c': 'deep',
    }) as const

  it('lists an archive', async () => {
    const input = await initramfs(source())
    const listed = spawnSync('cpio', ['-it', '--quiet'], { input, encoding: 'utf8' })
    expect(listed.stderr).toBe('')
    expect(listed.stdout).toBe('a\na/b\na/b/c\nbin\nbin/sh\nbin/tool\ninit\n')
  })

  it('unpacks it', async () => {
    const cwd = host('unpacked')
    mkdirSync(cwd)
    const input = await initramfs(source())
    execFileSync('cpio', ['-i', '--quiet', '--no-preserve-owner'], { input, cwd })
    expect(readFileSync(join(cwd, 'a/b/c'), 'utf8')).toBe('deep')
    expect(readFileSync(join(cwd, 'bin/tool'), 'utf8')).toBe('a tool')
    expect(lstatSync(join(cwd, 'bin/tool')).mode & 0o777).toBe(0o750)
    expect(lstatSync(join(cwd, 'init')).mode & 0o777).toBe(0o755)
    expect(readlinkSync(join(cwd, 'bin/sh'))).toBe('tool')
    expect(existsSync(join(cwd, 'TRAILER!!!'))).toBe(false)
  })
})
