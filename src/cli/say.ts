/** Tells the user something, beside what the guest says. */
export function say(text: string): void {
  process.stderr.write(`nodevisor: ${text}\n`)
}
