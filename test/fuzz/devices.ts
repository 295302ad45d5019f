import { VirtioBlock } from '../../src/virtio/block.js'
import { type BlockBackend, SECTOR_SIZE } from '../../src/virtio/block-backend.js'
import { type ConsoleBackend, type ConsoleGuest, VirtioConsole } from '../../src/virtio/console.js'
import { VirtioEntropy } from '../../src/virtio/entropy.js'
import type { FuzzedDevice } from './device.js'
import type { Random } from './random.js'

const SECTORS = 8

/** A disk in memory that answers some requests at once, some later, and fails some. */
class FuzzedDisk implements BlockBackend {
  readonly size = SECTORS * SECTOR_SIZE
  readonly readOnly = false
  readonly #bytes = new Uint8Array(this.size)
  readonly #waiting: (() => void)[] = []
  #requests = 0
  /** What the device has asked for that is not there. */
  #wrong: string | undefined

  read(offset: number, buffers: readonly Uint8Array[]): Promise<void> | undefined {
    return this.#do(offset, length(buffers), () => {
      let at = offset
      for (const buffer of buffers) {
        buffer.set(this.#bytes.subarray(at, at + buffer.length))
        at += buffer.length
      }
    })
  }

  write(offset: number, buffers: readonly Uint8Array[]): Promise<void> | undefined {
    return this.#do(offset, length(buffers), () => {
      let at = offset
      for (const buffer of buffers) {
        this.#bytes.set(buffer, at)
        at += buffer.length
      }
    })
  }

  flush(): Promise<void> | undefined {
    return this.#do(0, 0, () => {})
  }

  discard(offset: number, size: number): Promise<void> | undefined {
    return this.#do(offset, size, () => {
      this.#bytes.fill(0xdd, offset, offset + size)
    })
  }

  writeZeroes(offset: number, size: number): Promise<void> | undefined {
    return this.#do(offset, size, () => {
      this.#bytes.fill(0, offset, offset + size)
    })
  }

  async close(): Promise<void> {}

  /** Ends one of the requests under way. */
  finish(which: number): void {
    if (this.#waiting.length > 0) this.#waiting.splice(which % this.#waiting.length, 1)[0]!()
  }

  finishAll(): void {
    if (this.#wrong !== undefined)
      throw new Error(`Expected requests within the disk, not for ${this.#wrong}`)
    for (const finish of this.#waiting.splice(0)) finish()
  }

  #do(offset: number, size: number, action: () => void): Promise<void> | undefined {
    const isWithin = offset >= 0 && size >= 0 && offset + size <= this.size
    if (!isWithin || offset % SECTOR_SIZE !== 0 || size % SECTOR_SIZE !== 0) {
      this.#wrong ??= `${size} bytes at ${offset}`
    }
    const sort = this.#requests++ % 4
    if (sort === 0) throw new Error('The disk is broken')
    if (sort === 1) {
      action()
      return undefined
    }
    return new Promise((resolve, reject) => {
      this.#waiting.push(() => {
        action()
        if (sort === 2) resolve()
        else reject(new Error('The disk is broken'))
      })
    })
  }
}

function length(buffers: readonly Uint8Array[]): number {
  return buffers.reduce((sum, buffer) => sum + buffer.length, 0)
}

/** Reads, writes, and all other requests of virtio-blk. */
export function blockDevice(): FuzzedDevice {
  const disk = new FuzzedDisk()
  return {
    device: new VirtioBlock({ backend: disk, queues: 2 }),
    answers: [0, 1],
    request(random) {
      const type = random.pick([0, 0, 0, 1, 1, 1, 4, 8, 11, 13, random.below(20), random.word()])
      const data = type === 11 || type === 13 ? segments(random) : random.bytes(type === 1 ? SECTOR_SIZE : 0)
      const out = Buffer.alloc(16 + data.length)
      out.writeUInt32LE(type, 0)
      writeSector(random, out, 8)
      out.set(data, 16)
      const room = type === 0 ? SECTOR_SIZE * random.below(3) : type === 8 ? 20 : 0
      return { queue: random.below(2), out, room: room + 1 }
    },
    act: (random) => disk.finish(random.word()),
    settle: () => disk.finishAll(),
  }
}

/** struct virtio_blk_discard_write_zeroes (VIRTIO 1.2, 5.2.6). */
function segments(random: Random): Uint8Array {
  const bytes = Buffer.alloc(16 * (1 + random.below(3)))
  for (let at = 0; at < bytes.length; at += 16) {
    writeSector(random, bytes, at)
    bytes.writeUInt32LE(random.oneIn(16) ? random.word() : random.below(SECTORS), at + 8)
    bytes.writeUInt32LE(random.oneIn(16) ? random.word() : random.below(2), at + 12)
  }
  return bytes
}

function writeSector(random: Random, bytes: Buffer, at: number): void {
  const sort = random.below(20)
  const sector = BigInt(random.below(SECTORS + 1))
  if (sort === 0) bytes.writeBigUInt64LE(2n ** 55n - sector, at)
  else if (sort === 1) bytes.writeBigUInt64LE(2n ** 64n - 1n - sector, at)
  else bytes.writeBigUInt64LE(sector, at)
}

/** A host's end of a port that is full now and then, and has input when it is told to. */
class FuzzedPort implements ConsoleBackend {
  ready = true
  open = true
  guest!: ConsoleGuest
  #input = new Uint8Array(0)

  connect(guest: ConsoleGuest): void {
    this.guest = guest
  }

  transmit(): void {}

  receiveReady(): void {
    this.send(new Uint8Array(0))
  }

  setGuestOpen(): void {}

  send(bytes: Uint8Array): void {
    // No more than a user types: what the guest does not take is lost.
    const input = Buffer.concat([this.#input, bytes]).subarray(0, 1000)
    this.#input = input.subarray(this.guest.receive(input))
  }
}

/** Three ports, with control messages. */
export function consoleDevice(): FuzzedDevice {
  const ports = [new FuzzedPort(), new FuzzedPort(), new FuzzedPort()] as const
  const device = new VirtioConsole({
    ports: ports.map((backend, index) => ({ backend, name: `port${index}`, console: index !== 1 })),
  })
  const ready = (port: FuzzedPort, isReady: boolean) => {
    port.ready = isReady
    if (isReady) port.guest.transmitReady()
  }
  return {
    device,
    answers: [1, 3, 5, 7],
    request(random) {
      const queue = random.below(8)
      if (queue === 3) {
        const out = Buffer.alloc(8)
        out.writeUInt32LE(random.oneIn(16) ? random.word() : random.below(4), 0)
        out.writeUInt16LE(random.below(9), 4)
        out.writeUInt16LE(random.oneIn(16) ? random.below(65_536) : random.below(2), 6)
        return { queue, out, room: 0 }
      }
      if (queue % 2 === 0) return { queue, out: new Uint8Array(0), room: random.below(200) }
      return { queue, out: random.bytes(random.below(200)), room: 0 }
    },
    act(random) {
      const port = random.pick(ports)
      const sort = random.below(5)
      if (sort < 2) port.send(random.bytes(random.below(300)))
      else if (sort === 2) ready(port, random.oneIn(2))
      else if (sort === 3) port.guest.resize({ columns: 1 + random.below(200), rows: 1 + random.below(100) })
      else {
        port.open = random.oneIn(2)
        port.guest.openChanged()
      }
    },
    settle() {
      for (const port of ports) ready(port, true)
    },
  }
}

/** Requests for more than there is at the time, and for nothing. */
export function entropyDevice(): FuzzedDevice {
  return {
    device: new VirtioEntropy({ source: (bytes) => void bytes.fill(0x5a), bytesPerSecond: 20_000 }),
    answers: [0],
    request: (random) => ({
      queue: 0,
      out: random.bytes(random.oneIn(4) ? random.below(32) : 0),
      room: random.below(600),
    }),
  }
}
