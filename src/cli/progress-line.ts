import { say } from './say.js'

/** What is being done: on a terminal in one line that changes, elsewhere a line for each thing, but not each file. */
export class ProgressLine {
  #shown = ''

  show(text: string): void {
    if (process.stderr.isTTY) {
      process.stderr.write(`\r\x1b[K${text.slice(0, (process.stderr.columns || 80) - 1)}`)
    } else if (subject(text) !== subject(this.#shown)) {
      say(subject(text))
    }
    this.#shown = text
  }

  end(): void {
    if (this.#shown !== '' && process.stderr.isTTY) process.stderr.write('\r\x1b[K')
    this.#shown = ''
  }
}

function subject(text: string): string {
  return text.replace(/:.*/, '')
}
