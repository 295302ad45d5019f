/** Memory and processor time of processes, as Linux counts them. */

import { readdirSync, readFileSync } from 'node:fs'

/** Bytes of a process: each shared page counts for its share (PSS). */
export function processMemory(pid: number): number {
  return kibibytes(readFileSync(`/proc/${pid}/smaps_rollup`, 'utf8'), 'Pss')
}

/** Bytes that the whole host still has for programs. What KVM allocates in the kernel is missing from it, too. */
export function availableMemory(): number {
  return kibibytes(readFileSync('/proc/meminfo', 'utf8'), 'MemAvailable')
}

/** Bytes that the kernel has allocated for its own structures, by Linux's slab allocator: the whole host's. */
export function slabMemory(): number {
  return kibibytes(readFileSync('/proc/meminfo', 'utf8'), 'Slab')
}

export function openFiles(pid: number): number {
  return readdirSync(`/proc/${pid}/fd`).length
}

/** Nanoseconds that a process has computed, all its threads together. */
export function processorTime(pid: number): number {
  return readdirSync(`/proc/${pid}/task`)
    .map((task) => Number(readFileSync(`/proc/${pid}/task/${task}/schedstat`, 'utf8').split(' ')[0]))
    .reduce((sum, time) => sum + time, 0)
}

function kibibytes(text: string, field: string): number {
  const match = new RegExp(`^${field}:\\s+(\\d+) kB$`, 'm').exec(text)
  if (match === null) throw new Error(`Expected a line ${field}`)
  return Number(match[1]) * 1024
}
