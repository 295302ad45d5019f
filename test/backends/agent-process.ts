/** The agent of Linux guests as a process of the host, with a console port between it and the tests. */

import { type ChildProcess, spawn } from 'node:child_process'
import { existsSync, mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import type { Duplex } from 'node:stream'
import { onTestFinished } from 'vitest'
import { ConsolePort } from '../../src/backends/console-port.js'
import { AGENT_PORT_NAME, GuestAgent } from '../../src/backends/guest-agent.js'

export const AGENT = new URL('../../build/guests/agent', import.meta.url).pathname
/** It is only built where there is a static C library. */
export const hasAgent = existsSync(AGENT)

const MOST_INPUT = 64 * 1024
/** As much as a virtio console moves at a time. */
const MOST_PIECE = 64 * 1024

/** What a virtio console is to its port: hands bytes on, and holds both sides back. */
export function connectPort(port: ConsolePort, socket: Duplex, mostInput = MOST_INPUT): void {
  let held: Buffer[] = []
  const transmit = () => {
    while (held.length > 0 && port.ready) port.transmit(held.shift()!)
    if (held.length === 0) socket.resume()
  }
  port.connect({
    receive(bytes) {
      const taken = Math.min(bytes.length, mostInput - socket.writableLength)
      if (taken <= 0 || socket.destroyed) return 0
      socket.write(Buffer.from(bytes.subarray(0, taken)), () => port.receiveReady())
      return taken
    },
    transmitReady: () => setImmediate(transmit),
    openChanged() {},
    resize() {},
  })
  socket.on('data', (bytes: Buffer) => {
    for (let at = 0; at < bytes.length; at += MOST_PIECE) held.push(bytes.subarray(at, at + MOST_PIECE))
    if (!port.ready) socket.pause()
    else transmit()
  })
  socket.on('error', () => {})
  socket.on('close', () => {
    held = []
    port.setGuestOpen(false)
  })
  port.setGuestOpen(true)
}

/** Starts an agent, in a folder of its own. Both are gone when the test is over. */
export function startAgent(
  port: ConsolePort,
  env: NodeJS.ProcessEnv = { PATH: process.env.PATH, GIVEN: 'by the agent' },
): { readonly child: ChildProcess; readonly socket: Duplex } {
  const cwd = mkdtempSync(join(tmpdir(), 'nodevisor-agent-'))
  const child = spawn(AGENT, ['--fd', '3'], { stdio: ['ignore', 'ignore', 'inherit', 'pipe'], cwd, env })
  const socket = child.stdio[3] as Duplex
  connectPort(port, socket)
  onTestFinished(() => {
    socket.destroy()
    child.kill('SIGKILL')
    rmSync(cwd, { recursive: true, force: true })
  })
  return { child, socket }
}

/** The host's side, and an agent at the other end. */
export function setUp(env?: NodeJS.ProcessEnv) {
  const port = new ConsolePort(AGENT_PORT_NAME)
  const agent = new GuestAgent(port)
  return { port, agent, ...startAgent(port, env) }
}
