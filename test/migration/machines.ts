/** Machines that are moved in tests, and what lies between the two sides. */

import { readdirSync } from 'node:fs'
import { connect, createServer, type Socket } from 'node:net'
import { Duplex } from 'node:stream'
import { expect, onTestFinished } from 'vitest'
import { type ReceiveOptions, VirtualMachine, type VirtualMachineOptions } from '../../src/index.js'
import { imageOf } from '../helpers/guests.js'
import { boot } from '../machine/boot.js'

/** Two ends: what is written to one is read from the other. */
export function duplexPair(): [Duplex, Duplex] {
  const ends: Duplex[] = []
  const wake: ((() => void) | undefined)[] = [undefined, undefined]
  for (const side of [0, 1]) {
    const other = () => ends[1 - side]!
    ends.push(
      new Duplex({
        read() {
          const resume = wake[side]
          wake[side] = undefined
          resume?.()
        },
        write(chunk, _encoding, callback) {
          if (other().destroyed) callback(new Error('the other end is closed'))
          else if (other().push(chunk)) callback()
          else wake[1 - side] = callback
        },
        final(callback) {
          if (!other().destroyed) other().push(null)
          callback()
        },
        destroy(error, callback) {
          const resume = wake[1 - side]
          wake[1 - side] = undefined
          resume?.()
          if (!other().destroyed) setImmediate(() => other().destroy())
          callback(error)
        },
      }),
    )
  }
  return ends as [Duplex, Duplex]
}

/** What becomes of a frame: it goes on, the connection ends before it or in its middle, or other bytes go on. */
export type Fate = 'pass' | 'cut' | 'halve' | Uint8Array

export interface PassingFrame {
  readonly from: 'source' | 'target'
  /** Of those from that side, counted from 0. */
  readonly index: number
  readonly type: number
  readonly bytes: Buffer
}

/** As {@link duplexPair}, with somebody in between who decides about each frame. */
export function watchedPair(decide: (frame: PassingFrame) => Fate): [Duplex, Duplex] {
  const [source, sourcesPeer] = duplexPair()
  const [target, targetsPeer] = duplexPair()
  const cut = () => {
    sourcesPeer.destroy()
    targetsPeer.destroy()
  }
  const pump = async (from: 'source' | 'target', input: Duplex, output: Duplex) => {
    let waiting = Buffer.alloc(0)
    let index = 0
    for await (const chunk of input) {
      waiting = Buffer.concat([waiting, chunk as Buffer])
      while (waiting.length >= 8 && waiting.length >= 8 + waiting.readUInt32LE(4)) {
        const bytes = waiting.subarray(0, 8 + waiting.readUInt32LE(4))
        waiting = waiting.subarray(bytes.length)
        const fate = decide({ from, index: index++, type: bytes.readUInt32LE(0), bytes })
        if (fate === 'cut') return cut()
        if (fate === 'halve') return void output.write(bytes.subarray(0, bytes.length >> 1), cut)
        if (!output.write(fate === 'pass' ? bytes : fate)) {
          await new Promise<void>((resolve) => output.once('drain', resolve).once('close', resolve))
        }
      }
    }
    output.end()
  }
  for (const end of [source, target, sourcesPeer, targetsPeer]) end.on('error', () => {})
  void pump('source', sourcesPeer, targetsPeer).catch(cut)
  void pump('target', targetsPeer, sourcesPeer).catch(cut)
  return [source, target]
}

/** The two ends of a connection through the loopback device. */
export async function socketPair(): Promise<[Socket, Socket]> {
  const server = createServer()
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve))
  const { port } = server.address() as { port: number }
  const accepted = new Promise<Socket>((resolve) => server.once('connection', resolve))
  const one = connect(port, '127.0.0.1')
  const other = await accepted
  server.close()
  return [one, other]
}

/** Moves a machine through a pair of streams. */
export async function move(
  vm: VirtualMachine,
  options: ReceiveOptions = {},
  pair: readonly [Duplex, Duplex] = duplexPair(),
): Promise<VirtualMachine> {
  const [received] = await Promise.all([VirtualMachine.receive(pair[1], options), vm.migrate(pair[0])])
  onTestFinished(() => received.close())
  return received
}

/** A machine with the guest that notices any interruption. */
export function bootContinuity(
  words: string,
  options: Partial<VirtualMachineOptions> = {},
): Promise<VirtualMachine> {
  return boot({ image: imageOf({ image: 'continuity.elf' }), cmdline: words }, { memory: '16M', ...options })
}

export const openFiles = () => readdirSync('/proc/self/fd').length

/** The line with the guest's answer, of what it said to machines one after the other. */
export function answerOf(...vms: readonly VirtualMachine[]): string {
  const said = vms.map((vm) => vm.serial.output).join('')
  const answer = /^hash ([0-9a-f]{16})$/im.exec(said)?.[1]
  expect(answer, said).toBeDefined()
  return answer!
}
