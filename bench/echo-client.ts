/** A process of its own, for responsiveness.ts: it sends a byte now and then, and times the answer. */

import { once } from 'node:events'
import { connect } from 'node:net'
import { sleep } from './lib.js'

const [port, milliseconds] = process.argv.slice(2).map(Number)
/** Between an answer and the next byte, in ms. */
const PAUSE = 3

const socket = connect(port!, '127.0.0.1')
socket.setNoDelay()
await once(socket, 'connect')
process.send!('ready')
await once(process, 'message')
const times: number[] = []
const end = performance.now() + milliseconds!
while (performance.now() < end) {
  await sleep(PAUSE)
  const start = performance.now()
  const answer = once(socket, 'data')
  socket.write('x')
  await answer
  times.push((performance.now() - start) * 1e6)
}
socket.destroy()
process.send!(times)
process.disconnect()
