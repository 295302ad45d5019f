import type { Duplex } from 'node:stream'
import type { ConsolePort } from '../index.js'

/** Ctrl-], as telnet and virsh console have it: 0x1d, GS. */
const LEAVE = 0x1d

/** The terminal, or whatever stands for it, as the guest's serial port. */
export interface Terminal {
  /** Gives the terminal back as it was. */
  close(): void
}

/**
 * Connects standard input to a serial port or console. A terminal is put into raw mode: every key goes to the guest but Ctrl-],
 * which calls `leave`.
 */
export function connectInput(serial: Duplex, leave: () => void): Terminal {
  const input = process.stdin
  const raw = input.isTTY === true
  if (raw) {
    input.setRawMode(true)
    process.stderr.write('[Ctrl-] leaves]\r\n')
  }
  const receive = (bytes: Buffer) => {
    const end = raw ? bytes.indexOf(LEAVE) : -1
    const forGuest = end < 0 ? bytes : bytes.subarray(0, end)
    if (forGuest.length > 0 && !serial.write(forGuest)) {
      input.pause()
      serial.once('drain', resume)
    }
    if (end >= 0) leave()
  }
  const resume = () => {
    input.resume()
  }
  // A closed or unreadable standard input is a serial port on which nobody types.
  const ignore = () => {}
  input.on('data', receive)
  input.on('error', ignore)
  return {
    close() {
      input.off('data', receive)
      serial.off('drain', resume)
      if (raw) {
        input.setRawMode(false)
        process.stderr.write('\n')
      }
      input.pause()
      input.unref?.()
    },
  }
}

/** Tells the guest how large the terminal is, now and whenever that changes. Without a terminal it does nothing. */
export function followSize(console: ConsolePort): Terminal {
  const output = process.stdout
  const tell = () => {
    const { columns, rows } = output
    // A terminal on a serial line says 0: nobody knows.
    if (columns > 0 && rows > 0) console.resize({ columns, rows })
  }
  if (!output.isTTY) return { close() {} }
  tell()
  output.on('resize', tell)
  return {
    close() {
      output.off('resize', tell)
    },
  }
}
