import { createServer, type Server, type Socket } from 'node:net'
import { type ExecutionMode, type ReceiveOptions, VirtualMachine } from '../index.js'
import type { ListenAddress } from './arguments.js'
import { readTls } from './control.js'
import { EXIT_STATUS } from './exit-status.js'
import { type TlsCommandOptions, tlsFiles } from './migrate-command.js'
import { hasConsole, runMachine } from './run-command.js'
import { say } from './say.js'

/** The options of `nodevisor receive`, as the command line gives them. */
export interface ReceiveCommandOptions extends TlsCommandOptions {
  readonly execution?: string
  readonly diskFolder?: readonly string[]
  readonly control?: string
}

/** `nodevisor receive HOST:PORT`: waits for a machine, and runs it. @returns the exit status */
export async function receiveCommand(
  address: ListenAddress,
  options: ReceiveCommandOptions,
): Promise<number> {
  let vm: VirtualMachine | undefined
  try {
    const received = receiveOptions(options)
    vm = await waitForMachine(address, received)
    return await runMachine(vm, {
      console: hasConsole(vm),
      ...(options.control === undefined ? {} : { control: options.control }),
    })
  } catch (error) {
    say(error instanceof Error ? error.message : String(error))
    return EXIT_STATUS.usage
  } finally {
    await vm?.close()
  }
}

function receiveOptions(options: ReceiveCommandOptions): ReceiveOptions {
  const { execution, diskFolder } = options
  const files = tlsFiles(options)
  // Whoever names certificates that are known wants no other.
  const known = files?.ca === undefined ? {} : { requestCert: true, rejectUnauthorized: true }
  return {
    ...(execution === undefined ? {} : { execution: execution as ExecutionMode }),
    ...(diskFolder === undefined ? {} : { diskFolders: diskFolder }),
    ...(files === undefined ? {} : { tls: { ...readTls(files), ...known } }),
  }
}

/** Takes connections, one at a time, until one of them has brought a machine. */
async function waitForMachine(
  { host, port }: ListenAddress,
  options: ReceiveOptions,
): Promise<VirtualMachine> {
  const server = createServer()
  server.maxConnections = 1
  await new Promise<void>((resolve, reject) => {
    server.once('error', reject)
    server.listen(port, host, resolve)
  })
  const {
    address,
    port: actual,
    family,
  } = server.address() as {
    address: string
    port: number
    family: string
  }
  say(`waiting for a machine at ${family === 'IPv6' ? `[${address}]` : address}:${actual}`)
  try {
    for (;;) {
      const socket = await nextConnection(server)
      try {
        return await VirtualMachine.receive(socket, options)
      } catch (error) {
        socket.destroy()
        say(error instanceof Error ? error.message : String(error))
      }
    }
  } finally {
    server.close()
  }
}

function nextConnection(server: Server): Promise<Socket> {
  return new Promise((resolve, reject) => {
    server.once('connection', resolve)
    server.once('error', reject)
  })
}
