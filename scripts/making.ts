import type { Making } from '../src/linux/debian-packages.js'

/** Shows in a task's line what is being made. A log need not have each file that is compiled. */
export function makingIn(task: { output: string }, signal: AbortSignal): Making {
  return {
    signal,
    say: (text) => {
      if (process.stdout.isTTY || !text.includes(':')) task.output = text
    },
  }
}
