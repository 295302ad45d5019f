import { readFileSync } from 'node:fs'
import fc from 'fast-check'
import { describe, expect, it } from 'vitest'
import type { DeviceState } from '../../src/bus/device.js'
import { NodevisorError } from '../../src/errors.js'
import { decodeState, encodeState, type SnapshotRecord } from '../../src/snapshot/state-file.js'
import { withCode } from '../backends/disks.js'
import { jsonOf, MEMORY_SIZE, makeRecord, seal } from './records.js'

const file = Buffer.from(encodeState(makeRecord()))
const headerEnd = file.indexOf('\n')
const header = file.subarray(0, headerEnd).toString()
const body = file.subarray(headerEnd + 1)

const notUtf8 = Buffer.from(body)
notUtf8[body.indexOf('A processor')] = 0xff

const withHeader = (line: string, rest: Uint8Array = body) => Buffer.concat([Buffer.from(line), rest])
const damaged = (message?: RegExp) => withCode('ERR_SNAPSHOT_DAMAGED', message)

/** Whether it is refused as files are; throws if it is refused in any other way. */
function isRefused(bytes: Uint8Array): boolean {
  try {
    decodeState(bytes)
    return false
  } catch (error) {
    const { code } = error as NodevisorError
    if (error instanceof NodevisorError && /^ERR_SNAPSHOT_(DAMAGED|VERSION)$/.test(code)) return true
    throw error
  }
}

/** The record as JSON, with one value in it replaced; undefined takes it away. */
function withValue(path: string, value: unknown): Uint8Array {
  const json = JSON.parse(jsonOf(file)) as Record<string, unknown>
  const keys = path.split('.')
  const last = keys.pop()!
  const holder = keys.reduce((object, key) => object[key] as Record<string, unknown>, json)
  holder[last] = value
  return seal(JSON.stringify(json))
}

const deviceState = fc.letrec<{ state: DeviceState; key: string }>((tie) => ({
  key: fc.oneof(
    fc.string({ unit: 'binary', maxLength: 8 }),
    fc.constantFrom('base64', ':base64', '::base64', '__proto__', 'constructor', '1', ''),
  ),
  state: fc.oneof(
    { maxDepth: 5, withCrossShrink: true },
    fc.constantFrom(null, true, false),
    fc.integer(),
    fc.double({ noNaN: true, noDefaultInfinity: true }).map((number) => number + 0),
    fc.string({ unit: 'binary' }),
    fc.uint8Array({ maxLength: 40 }),
    fc.array(tie('state'), { maxLength: 5 }),
    fc.dictionary(tie('key'), tie('state'), { maxKeys: 5, noNullPrototype: true }),
  ),
})).state

describe('a state file', () => {
  it('gives back what was put into it', () => {
    expect(decodeState(encodeState(makeRecord()))).toEqual(makeRecord())
  })

  it('gives back a snapshot that has only the changes', () => {
    const record: SnapshotRecord = {
      ...makeRecord(),
      memory: { size: MEMORY_SIZE, pages: Uint32Array.of(0, 1, 7, 3, 1023, 1) },
      parent: { path: '../before', id: '00000000-0000-4000-8000-000000000000' },
    }
    expect(decodeState(encodeState(record))).toEqual(record)
  })

  it('gives back a machine with no more than there has to be', () => {
    const full = makeRecord()
    const { hardware, state } = full
    const vcpus = [{ ...state.vcpus[0]!, lapic: new Uint8Array(), xcrs: new Uint8Array() }]
    const record: SnapshotRecord = {
      ...full,
      hardware: {
        ...hardware,
        ...{ cpu: undefined, cpuid: [[]], apicIds: [0], irqchip: 'none', generationId: undefined, disks: [] },
        ...{ console: undefined, agent: false, rng: undefined, fwCfgFiles: new Map(), cmdline: '' },
      },
      state: { ...state, vcpus, devices: [] },
      disks: [],
    }
    expect(decodeState(encodeState(record))).toEqual(record)
  })

  it('gives back whatever devices say', () => {
    fc.assert(
      fc.property(fc.array(deviceState, { maxLength: 4 }), (states) => {
        expect(decodeState(encodeState(makeRecord(states))).state.devices.map(({ state }) => state)).toEqual(
          states,
        )
      }),
    )
  })

  it('can be read by people, and by whatever reads JSON', () => {
    expect(header).toMatch(/^nodevisor snapshot 1 sha256:[0-9a-f]{64} \d+$/)
    expect(body.toString()).toMatch(/^\{\n "id": "01234567-/)
    expect(JSON.parse(body.toString())).toMatchObject({
      hardware: { fwCfgFiles: [{ name: 'opt/b' }, { name: 'opt/a', bytes: { base64: '' } }] },
      state: { clock: '0xfffffffffffffffe', vcpus: [{ state: 'runnable' }, {}] },
      memory: { size: MEMORY_SIZE, pages: 'all' },
    })
  })

  it('begins as docs/snapshots.md says', () => {
    const page = readFileSync(new URL('../../docs/snapshots.md', import.meta.url), 'utf8')
    const example = /```\n(nodevisor snapshot 1 sha256:[0-9a-f]{64} [\s\S]*?)…\n```/.exec(page)![1]!
    expect(example.split('\n').length).toBeGreaterThan(10)
    expect(file.toString().slice(0, example.length)).toBe(example)
  })

  it.each([
    ['a number that is none', Number.NaN],
    ['a function', () => {}],
    ['an object of a class', new Date(0)],
    ['other numbers than bytes', new Uint16Array(1)],
    ['a bigint', 1n],
    ['a list with a gap', [undefined]],
  ])('cannot have %s, and says where', (_, state) => {
    expect(() => encodeState(makeRecord([{ fine: 1, wrong: state } as unknown as DeviceState]))).toThrow(
      withCode('ERR_SNAPSHOT_WRITE', /plain data .* for snapshot\.state\.devices\[0\]\.state\.wrong/),
    )
  })

  it('cannot have what contains itself', () => {
    const state: Record<string, DeviceState> = {}
    state.self = state
    expect(() => encodeState(makeRecord([state]))).toThrow(withCode('ERR_SNAPSHOT_WRITE', /levels deep/))
  })

  it('cannot have more than is read again', () => {
    expect(() => encodeState(makeRecord([new Uint8Array(2 ** 25)]))).toThrow(
      withCode('ERR_SNAPSHOT_WRITE', /at most 32 MiB/),
    )
  })
})

describe('a state file that something has happened to', () => {
  it.each([
    ['all bits', 0xff],
    ['the lowest bit', 1],
    ['the bit of upper case', 0x20],
  ])('is refused if %s of any byte changed', (_, mask) => {
    for (let index = 0; index < file.length; index++) {
      const changed = Buffer.from(file)
      changed[index]! ^= mask
      expect(isRefused(changed), `byte ${index}`).toBe(true)
    }
  })

  it('is refused if it ends early, wherever that is', () => {
    for (let length = 0; length < file.length; length += 97) {
      expect(isRefused(file.subarray(0, length)), `${length} bytes`).toBe(true)
    }
    expect(() => decodeState(file.subarray(0, -1), 'a/state')).toThrow(
      damaged(/'a\/state' is damaged: expected \d+ bytes after its first line but received \d+/),
    )
  })

  it.each([
    ['bytes behind it', withHeader(`${header}\n`, Buffer.concat([body, Buffer.from('\n')]))],
    ['a length with a zero in front', withHeader(header.replace(/ (\d+)$/, ' 0$1\n'))],
    [
      'a checksum in upper case',
      withHeader(`${header.replace(/[0-9a-f]{64}/, (hex) => hex.toUpperCase())}\n`),
    ],
    ['no newline', withHeader(header)],
    ['a newline of DOS', withHeader(`${header}\r\n`)],
    ['two spaces', withHeader(`${header.replace(' sha', '  sha')}\n`)],
    ['version 0', withHeader(`${header.replace('snapshot 1', 'snapshot 0')}\n`)],
    ['version 01', withHeader(`${header.replace('snapshot 1', 'snapshot 01')}\n`)],
    ['no header', body],
    ['no bytes', Buffer.alloc(0)],
    ['no JSON in it', seal('{')],
    ['a byte order mark', seal(`\ufeff${body}`)],
    ['UTF-8 that is none', seal(notUtf8)],
    ['another value in it', seal('null')],
    ['lists without end in one another', seal('['.repeat(1e6) + ']'.repeat(1e6))],
  ])('is refused with %s', (_, bytes) => {
    expect(() => decodeState(bytes)).toThrow(damaged())
  })

  it('says which version it is of, and which can be read', () => {
    const future = withHeader(`${header.replace('snapshot 1 sha256', 'snapshot 27 blake3')}\n`)
    expect(() => decodeState(future)).toThrow(
      withCode('ERR_SNAPSHOT_VERSION', /Expected a snapshot of version 1 but 'state' is of version 27/),
    )
  })
})

describe('a state file that somebody has made up', () => {
  const long = 'x'.repeat(100)
  it.each<[path: string, value: unknown]>([
    ['id', undefined],
    ['id', '01234567-89AB-4cde-8f01-23456789abcd'],
    ['created', 'yesterday'],
    ['created', '2026-01-02'],
    ['nodevisor', ''],
    ['unheard', 1],
    ['host.kind', 'other'],
    ['host.features', [1]],
    ['hardware.boot.format', 'toString'],
    ['hardware.boot.mode', 'unreal'],
    ['hardware.boot.entry', -1],
    ['hardware.memorySize', MEMORY_SIZE + 1],
    ['hardware.memorySize', 0],
    ['hardware.memorySize', 2 ** 60],
    ['hardware.hugePages', '3M'],
    ['hardware.cpu', 'no such model'],
    ['hardware.cpu', { features: { [long]: true } }],
    ['hardware.cpu', { features: { sse2: 1 } }],
    ['hardware.cpu', { cores: 0 }],
    ['hardware.cpu', null],
    ['hardware.cpuid', [[]]],
    ['hardware.cpuid.0.0.eax', 2 ** 32],
    ['hardware.cpuid.0.0.eax', 0.5],
    ['hardware.cpuid.0', Array.from({ length: 257 }, () => 0)],
    ['hardware.apicIds', [1, 1]],
    ['hardware.apicIds', []],
    ['hardware.apicIds', [0, 2 ** 32 - 1]],
    ['hardware.irqchip', 'none'],
    ['hardware.irqchip', 'half'],
    ['hardware.generationId', MEMORY_SIZE - 15],
    ['hardware.generationId', '0x1000'],
    ['hardware.cmdline', 1],
    [
      'hardware.fwCfgFiles',
      [
        { name: 'etc/acpi/tables', bytes: { base64: '' } },
        { name: long, bytes: 0 },
      ],
    ],
    ['hardware.fwCfgFiles.1.name', 'opt/b'],
    ['hardware.fwCfgFiles.1.name', 'x'.repeat(60)],
    ['hardware.fwCfgFiles.1.bytes', 'text'],
    ['hardware.fwCfgFiles.1.bytes', { base64: 'A' }],
    ['hardware.fwCfgFiles.1.bytes', { base64: '', more: 1 }],
    ['hardware.disks', [{}]],
    ['hardware.disks.0.queues', 17],
    ['hardware.disks.0.serial', 'x'.repeat(21)],
    ['hardware.console', null],
    ['hardware.console', undefined],
    ['hardware.console.ports', ['a', 'a']],
    ['hardware.console.ports', ['a/b']],
    ['hardware.console.size.rows', 0],
    ['hardware.agent', 'yes'],
    ['hardware.rng.bytesPerSecond', 0],
    ['hardware.rng.source', 'a function'],
    ['execution', 'elsewhere'],
    ['state.time', -1],
    ['state.clock', '0x10000000000000000'],
    ['state.clock', '0x01'],
    ['state.clock', 5],
    ['state.vcpus', []],
    ['state.vcpus.0.state', 'asleep'],
    ['state.vcpus.0.mpState', 5],
    ['state.vcpus.0.regs', { base64: 'AAAA' }],
    ['state.vcpus.0.xsave', { base64: 'AAAA' }],
    ['state.vcpus.0.lapic', { base64: '' }],
    ['state.vcpus.0.msrs', { base64: 'AAAA' }],
    ['state.vcpus.0.msrs', { base64: Buffer.alloc(16 * 8193).toString('base64') }],
    ['state.interrupts', undefined],
    ['state.devices.0.name', undefined],
    ['state.devices.0.state', undefined],
    ['state.devices.0.state', { base64: 'no base64!' }],
    ['disks.0', 'file'],
    ['disks.0.kind', 1],
    ['disks', []],
    ['memory.size', MEMORY_SIZE * 2],
    ['memory.pages', 'some'],
    ['memory.pages', []],
    ['parent', { path: '..', id: '01234567-89ab-4cde-8f01-23456789abcd' }],
  ])('is refused with another %s: %j', (path, value) => {
    expect(() => decodeState(withValue(path, value))).toThrow(damaged())
  })

  it.each([
    [
      'that overlap',
      [
        [0, 2],
        [1, 1],
      ],
    ],
    [
      'that descend',
      [
        [5, 1],
        [0, 1],
      ],
    ],
    ['of no pages', [[0, 0]]],
    ['that are half a pair', [[0]]],
    ['that are three numbers', [[0, 1, 2]]],
    ['that are longer than memory', [[MEMORY_SIZE / 4096, 1]]],
    ['with fractions', [[0.5, 1]]],
  ])('is refused with runs of pages %s', (_, pages) => {
    const json = JSON.parse(jsonOf(file))
    const parent = { path: '..', id: json.id }
    const size = MEMORY_SIZE
    const withRuns = (runs: unknown) =>
      seal(JSON.stringify({ ...json, parent, memory: { size, pages: runs } }))
    expect(isRefused(withRuns([[0, 1]]))).toBe(false)
    expect(() => decodeState(withRuns(pages))).toThrow(damaged())
  })

  it('is refused with numbers beyond all', () => {
    const json = jsonOf(file).replace('"a": 1', '"a": 1e999')
    expect(json).toContain('1e999')
    expect(() => decodeState(seal(json))).toThrow(damaged(/finite/))
  })

  it('leads to no other error, whatever is in there', () => {
    const json = JSON.parse(jsonOf(file))
    const places: (readonly string[])[] = []
    const collect = (value: unknown, path: readonly string[]) => {
      if (path.length > 0) places.push(path)
      if (typeof value !== 'object' || value === null) return
      for (const [key, part] of Object.entries(value)) collect(part, [...path, key])
    }
    collect(json, [])
    const change = fc.record({
      path: fc.constantFrom(...places),
      value: fc.oneof(
        fc.jsonValue(),
        fc.constantFrom(
          undefined,
          0,
          -1,
          1,
          2 ** 31,
          2 ** 32,
          2 ** 53,
          '',
          'all',
          '0x0',
          [],
          {},
          { base64: '' },
        ),
        fc.integer(),
      ),
      key: fc.option(fc.constantFrom('__proto__', 'base64', 'other', '0'), { nil: undefined }),
    })
    fc.assert(
      fc.property(fc.array(change, { minLength: 1, maxLength: 3 }), (changes) => {
        const changed = structuredClone(json)
        for (const { path, value, key } of changes) {
          const keys = key === undefined ? path : [...path, key]
          let holder = changed
          for (const part of keys.slice(0, -1)) holder = holder?.[part]
          if (typeof holder !== 'object' || holder === null) continue
          Object.defineProperty(holder, keys.at(-1)!, {
            value,
            enumerable: true,
            configurable: true,
            writable: true,
          })
        }
        isRefused(seal(JSON.stringify(changed)))
      }),
      { numRuns: 1000 },
    )
  })
})
