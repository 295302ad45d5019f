import { freemem, totalmem } from 'node:os'
import { NodevisorError } from '../errors.js'
import { PAGE_SIZE } from '../memory/layout.js'
import { MachineRam } from '../memory/machine-ram.js'
import { decodeState, type SnapshotRecord } from '../snapshot/state-file.js'
import {
  brokenProtocol,
  type Connection,
  errorFrame,
  FRAME,
  type Frame,
  PROTOCOL_VERSION,
  receiveRecord,
} from './protocol.js'

/** What makes a machine of what is received. */
export interface MigrationReceiver<Machine extends { close(): Promise<void> }> {
  /** Throws where this machine cannot be had here. */
  check(record: SnapshotRecord): void
  /** Makes the machine, which does nothing yet. The memory is the machine's from then on. */
  build(record: SnapshotRecord, ram: MachineRam): Promise<Machine>
}

/**
 * Receives a machine that {@link sendMachine} sends. Nothing that comes is taken on trust.
 *
 * @throws `ERR_MIGRATION_FAILED`, and what `check` and `build` throw
 */
export async function receiveMachine<Machine extends { close(): Promise<void> }>(
  connection: Connection,
  receiver: MigrationReceiver<Machine>,
): Promise<Machine> {
  let ram: MachineRam | undefined
  let machine: Machine | undefined
  try {
    const hello = await expect(connection, FRAME.HELLO)
    const version = hello.payload.readUInt32LE(0)
    if (version !== PROTOCOL_VERSION)
      throw brokenProtocol(`version ${PROTOCOL_VERSION}`, `version ${version}`)
    const record = await decodeRecord(connection, await expect(connection, FRAME.RECORD))
    receiver.check(record)
    ram = makeRam(record)
    await connection.send({ type: FRAME.READY })
    const state = await decodeRecord(connection, await receivePages(connection, ram))
    checkSameMemory(record, state)
    receiver.check(state)
    machine = await receiver.build(state, ram)
    await connection.send({ type: FRAME.PREPARED })
    await expect(connection, FRAME.GO)
  } catch (error) {
    // The other side may go on with the disks once it knows.
    await machine?.close()
    ram?.close()
    await connection.send(errorFrame(error)).catch(() => {})
    await connection.end()
    throw error
  }
  // It is this side's, whether the other one hears of it or not.
  await connection.send({ type: FRAME.RUNNING }).catch(() => {})
  await connection.end()
  return machine
}

async function expect(connection: Connection, type: number): Promise<Frame> {
  const frame = await connection.receive()
  if (frame.type === type) return frame
  throw brokenProtocol(`a frame of kind ${type}`, `one of kind ${frame.type}`)
}

async function decodeRecord(connection: Connection, first: Frame): Promise<SnapshotRecord> {
  return decodeState(await receiveRecord(connection, first), 'the state of the machine')
}

function makeRam({ memory, hardware }: SnapshotRecord): MachineRam {
  // What it may take is known before any of it is there.
  const available = Math.min(totalmem(), freemem())
  if (memory.size > available) {
    throw new NodevisorError(
      'ERR_MEMORY_SIZE',
      `Expected a machine that fits into the ${Math.floor(available / 2 ** 20)} MiB of memory that are free here but ` +
        `it has ${Math.ceil(memory.size / 2 ** 20)}; close machines that are done, or move it elsewhere`,
      { memorySize: memory.size, available },
    )
  }
  return MachineRam.create({ size: memory.size, hugePages: hardware.hugePages })
}

/** Memory, up to the frame that is none of it. */
async function receivePages(connection: Connection, ram: MachineRam): Promise<Frame> {
  for (;;) {
    const frame = await connection.receive()
    const { type, payload } = frame
    if (type === FRAME.PAGES) {
      const bytes = payload.subarray(4)
      pagesOf(ram, payload.readUInt32LE(0), bytes.length / PAGE_SIZE).set(bytes)
    } else if (type === FRAME.ZERO) {
      pagesOf(ram, payload.readUInt32LE(0), payload.readUInt32LE(4)).fill(0)
    } else if (type === FRAME.STATE) {
      return frame
    } else {
      throw brokenProtocol('memory or the state', `a frame of kind ${type}`)
    }
  }
}

function pagesOf({ ram }: MachineRam, first: number, count: number): Uint8Array {
  const pages = ram.size / PAGE_SIZE
  if (count === 0 || first + count > pages) {
    throw brokenProtocol(`pages below ${pages}`, `${count} from ${first} on`)
  }
  return new Uint8Array(ram.buffer(first * PAGE_SIZE, count * PAGE_SIZE))
}

function checkSameMemory(record: SnapshotRecord, state: SnapshotRecord): void {
  const isSame =
    state.memory.size === record.memory.size && state.hardware.hugePages === record.hardware.hugePages
  if (!isSame) throw brokenProtocol('the state of the machine that was announced', 'that of another')
  if (state.parent !== undefined) throw brokenProtocol('a whole machine', 'changes')
}
