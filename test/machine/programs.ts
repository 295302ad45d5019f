import { type ChildProcess, spawn } from 'node:child_process'
import { Worker } from 'node:worker_threads'
import { onTestFinished } from 'vitest'

/** How a program ended. */
export interface Ended {
  readonly code: number | null
  readonly signal: NodeJS.Signals | null
  readonly stdout: string
  readonly stderr: string
}

const urlOf = (name: string) => new URL(`./programs/${name}.mjs`, import.meta.url)

/** Starts a program of `programs/` in a process of its own. */
export function startProgram(
  name: string,
  args: readonly string[],
  nodeFlags: readonly string[] = [],
): ChildProcess {
  const child = spawn(process.execPath, [...nodeFlags, urlOf(name).pathname, ...args], { stdio: 'pipe' })
  onTestFinished(() => void child.kill('SIGKILL'))
  return child
}

/** Waits for its end. */
export async function ended(child: ChildProcess): Promise<Ended> {
  let stdout = ''
  let stderr = ''
  child.stdout!.on('data', (chunk) => {
    stdout += chunk
  })
  child.stderr!.on('data', (chunk) => {
    stderr += chunk
  })
  return new Promise((resolve, reject) => {
    child.once('error', reject)
    child.once('close', (code, signal) => resolve({ code, signal, stdout, stderr }))
  })
}

/** Both. */
export function runProgram(
  name: string,
  args: readonly string[],
  nodeFlags?: readonly string[],
): Promise<Ended> {
  return ended(startProgram(name, args, nodeFlags))
}

/** Starts `programs/worker.mjs`. */
export function startWorker(workerData: {
  readonly code: Uint8Array
  readonly machines?: number
  readonly options?: object
  readonly close?: boolean
}): Worker {
  return new Worker(urlOf('worker'), { workerData: { ...workerData, code: [...workerData.code] } })
}
