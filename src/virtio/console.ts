import type { DeviceState } from '../bus/device.js'
import { StateReader } from '../devices/state.js'
import { invalidArgument } from '../errors.js'
import { LaterTurn, MAX_SERVICE } from './service.js'
import type { VirtioDevice, VirtioDriver, VirtioQueueOptions } from './virtio-device.js'
import { type Virtqueue, VirtqueueError } from './virtqueue.js'

// VIRTIO 1.2, 5.3: Console Device
const VIRTIO_ID_CONSOLE = 3

// 5.3.2: Virtqueues; those of port 0, of control messages, and then two of each other port
const RECEIVEQ_PORT0 = 0
const CONTROL_RECEIVEQ = 2
const RECEIVEQ_PORT1 = 4

// 5.3.3: Feature bits
/** The configuration has the size of the console. */
export const VIRTIO_CONSOLE_F_SIZE = 1n << 0n
/** There are control messages, and may be more ports than one. */
export const VIRTIO_CONSOLE_F_MULTIPORT = 1n << 1n
/** The configuration has a field that takes characters, without any queue. */
export const VIRTIO_CONSOLE_F_EMERG_WRITE = 1n << 2n

// 5.3.4: struct virtio_console_config { le16 cols; le16 rows; le32 max_nr_ports; le32 emerg_wr; }
const CONFIG_SIZE = 12
const CONFIG_COLS = 0
const CONFIG_ROWS = 2
const CONFIG_MAX_NR_PORTS = 4
const CONFIG_EMERG_WR = 8

// 5.3.6.2: struct virtio_console_control { le32 id; le16 event; le16 value; }
const CONTROL_SIZE = 8
const CONTROL_EVENT = 4
const CONTROL_VALUE = 6
const VIRTIO_CONSOLE_DEVICE_READY = 0
const VIRTIO_CONSOLE_DEVICE_ADD = 1
const VIRTIO_CONSOLE_PORT_READY = 3
const VIRTIO_CONSOLE_CONSOLE_PORT = 4
const VIRTIO_CONSOLE_RESIZE = 5
const VIRTIO_CONSOLE_PORT_OPEN = 6
const VIRTIO_CONSOLE_PORT_NAME = 7

/** What a port's guest is told, in this order. */
const MESSAGES = [
  VIRTIO_CONSOLE_DEVICE_ADD,
  VIRTIO_CONSOLE_PORT_NAME,
  VIRTIO_CONSOLE_CONSOLE_PORT,
  VIRTIO_CONSOLE_RESIZE,
  VIRTIO_CONSOLE_PORT_OPEN,
] as const
type Message = (typeof MESSAGES)[number]
const ALL_MESSAGES = MESSAGES.reduce((bits, message) => bits | bit(message), 0)

const MAX_PORTS = 31
/** In bytes; names become those of files. */
const MAX_NAME = 255
const MAX_SIZE = 0xffff
const DEFAULT_SIZE = { columns: 80, rows: 25 }
/** Most bytes moved at a time, between two looks at the other side and at the clock. */
const MAX_PIECE = 64 * 1024

/** How much text a console shows. */
export interface ConsoleSize {
  /** Characters in a line: 1 to 65535. */
  readonly columns: number
  /** Lines: 1 to 65535. */
  readonly rows: number
}

/** The guest's end of a port, for a {@link ConsoleBackend}. */
export interface ConsoleGuest {
  /**
   * Sends bytes to the guest.
   *
   * @returns how many were taken, from the first on; once there is room for the others,
   *   {@link ConsoleBackend.receiveReady} is called. A port that the guest has not opened takes none.
   */
  receive(bytes: Uint8Array): number
  /** {@link ConsoleBackend.ready} has become true. May be called when nothing changed. */
  transmitReady(): void
  /** {@link ConsoleBackend.open} has changed. May be called when it has not. */
  openChanged(): void
  /** Tells the size of the console, if the port is one. @throws `ERR_INVALID_ARGUMENT` */
  resize(size: ConsoleSize): void
}

/** The host's end of a port. Its methods must not throw: that would stop the machine. */
export interface ConsoleBackend {
  /** Called once, by the {@link VirtioConsole} that is made with this backend. */
  connect(guest: ConsoleGuest): void
  /**
   * Takes bytes from the guest. They are in guest memory, and only there until this returns.
   *
   * Emergency writes come also while it is not {@link ConsoleBackend.ready}: bounding them is the backend's.
   */
  transmit(bytes: Uint8Array): void
  /** False holds the guest back: what it sends stays in its queue. It is asked every 64 KiB. */
  readonly ready: boolean
  /** Whether somebody is there, for the guest to know. */
  readonly open: boolean
  /** There is room again, after {@link ConsoleGuest.receive} took less than it was given. */
  receiveReady(): void
  /** The guest has opened its end, or closed it, or gone. */
  setGuestOpen(open: boolean): void
}

/** A port of a {@link VirtioConsole}. */
export interface ConsolePortOptions {
  /** What the guest calls it (`/dev/virtio-ports/NAME` in Linux): 1 to 255 bytes of UTF-8, with no `/`. */
  readonly name?: string
  /** A console (`/dev/hvc*` in Linux) and not just a channel. Port 0 always is. */
  readonly console?: boolean
  readonly backend: ConsoleBackend
}

/** How to make a {@link VirtioConsole}. */
export interface VirtioConsoleOptions {
  /** 1 to 31. To a driver without VIRTIO_CONSOLE_F_MULTIPORT there is only the first. */
  readonly ports: readonly ConsolePortOptions[]
  /** That of port 0: 80×25 unless given. */
  readonly size?: ConsoleSize
}

/**
 * A virtio console (VIRTIO 1.2, 5.3): consoles, and other channels of bytes, between guest and host.
 *
 * Neither side outruns the other: what the guest sends stays in its queue while the host's end is not ready,
 * and input stays at the host's end until the guest has opened the port and given buffers for it. Of what the
 * guest is still to be told there is one flag for each port and kind of message, however often it asks.
 */
export class VirtioConsole implements VirtioDevice {
  readonly name = 'console'
  readonly deviceType = VIRTIO_ID_CONSOLE
  readonly features = VIRTIO_CONSOLE_F_SIZE | VIRTIO_CONSOLE_F_MULTIPORT | VIRTIO_CONSOLE_F_EMERG_WRITE
  readonly queues: readonly VirtioQueueOptions[]
  readonly config = new Uint8Array(CONFIG_SIZE)
  readonly #config = new DataView(this.config.buffer)
  readonly #ports: readonly Port[]
  #driver: VirtioDriver | undefined

  /** @throws `ERR_INVALID_ARGUMENT` */
  constructor({ ports, size = DEFAULT_SIZE }: VirtioConsoleOptions) {
    checkPorts(ports)
    const host: PortHost = {
      guard: (action) => this.#guard(action),
      tell: () => this.#tell(),
      yield: () => this.#driver?.yield(),
      resized: (index, newSize) => this.#resized(index, newSize),
    }
    this.#config.setUint32(CONFIG_MAX_NR_PORTS, ports.length, true)
    this.#ports = ports.map((port, index) => new Port(port, index, host))
    const [first, ...others] = this.#ports.map((port) => port.queues)
    this.queues = [
      ...first!,
      { available: () => this.#tell() },
      {
        handle: (chain) => {
          this.#control(chain.read(CONTROL_SIZE))
          return 0
        },
      },
      ...others.flat(),
    ]
    this.resize(size)
    // Last: a backend may have input.
    for (const [index, { backend }] of ports.entries()) backend.connect(this.#ports[index]!)
  }

  /** Tells the guest how large port 0 is. @throws `ERR_INVALID_ARGUMENT` */
  resize(size: ConsoleSize): void {
    this.#ports[0]!.resize(size)
  }

  /** An emergency write (5.3.4): the low byte is a character, whatever state driver and queues are in. */
  writeConfig(offset: number, value: number): void {
    if (offset === CONFIG_EMERG_WR) this.#ports[0]!.backend.transmit(Uint8Array.of(value & 0xff))
  }

  start(driver: VirtioDriver): void {
    this.#driver = driver
    // Notifications are wanted once there is something to be told.
    driver.queues[CONTROL_RECEIVEQ]?.suppressNotifications()
    const sized = (driver.features & VIRTIO_CONSOLE_F_SIZE) !== 0n
    for (const port of this.#multiport ? this.#ports : this.#ports.slice(0, 1)) {
      const receiveq = port.index === 0 ? RECEIVEQ_PORT0 : RECEIVEQ_PORT1 + 2 * (port.index - 1)
      const [input, output] = driver.queues.slice(receiveq, receiveq + 2)
      port.start(input, output, { sized, multiport: this.#multiport })
    }
  }

  reset(): void {
    this.#driver = undefined
    for (const port of this.#ports) port.reset()
  }

  saveState(): DeviceState {
    return { ports: this.#ports.map((port) => port.saveState()) }
  }

  restoreState(state: DeviceState): void {
    const ports = new StateReader(this.name, state).list('ports', this.#ports.length)
    const restore = ports.map((saved, index) => this.#ports[index]!.restorer(saved, this.name))
    for (const apply of restore) apply()
  }

  get #multiport(): boolean {
    return ((this.#driver?.features ?? 0n) & VIRTIO_CONSOLE_F_MULTIPORT) !== 0n
  }

  /** A control message of the driver's (5.3.6.2). What makes no sense is ignored. */
  #control(bytes: Uint8Array): void {
    if (!this.#multiport || bytes.length < CONTROL_SIZE) return
    const message = new DataView(bytes.buffer, bytes.byteOffset, bytes.length)
    const id = message.getUint32(0, true)
    const event = message.getUint16(CONTROL_EVENT, true)
    const isTrue = message.getUint16(CONTROL_VALUE, true) !== 0
    if (event === VIRTIO_CONSOLE_DEVICE_READY && isTrue) for (const port of this.#ports) port.add()
    else if (event === VIRTIO_CONSOLE_PORT_READY && isTrue) this.#ports[id]?.guestReady()
    else if (event === VIRTIO_CONSOLE_PORT_OPEN) this.#ports[id]?.guestOpened(isTrue)
    this.#tell()
  }

  /** Tells the driver all there is to tell, or what it has buffers for. */
  #tell(): void {
    const queue = this.#driver?.queues[CONTROL_RECEIVEQ]
    if (queue === undefined || !this.#multiport) return
    this.#guard(() => {
      for (const port of this.#ports) if (!tellOf(port, queue)) return
      queue.suppressNotifications()
    })
    queue.notify()
  }

  #resized(index: number, { columns, rows }: ConsoleSize): void {
    if (index !== 0) return
    this.#config.setUint16(CONFIG_COLS, columns, true)
    this.#config.setUint16(CONFIG_ROWS, rows, true)
    const driver = this.#driver
    // With MULTIPORT there is a message for that, and drivers look at nothing else.
    if (driver === undefined || this.#multiport) return
    if ((driver.features & VIRTIO_CONSOLE_F_SIZE) !== 0n) driver.configChanged()
  }

  /** Uses queues, also when it is the host's side that calls: where nobody else knows what a driver did. */
  #guard(action: () => void): void {
    try {
      action()
    } catch (error) {
      if (!(error instanceof VirtqueueError)) throw error
      const driver = this.#driver
      this.#driver = undefined
      for (const port of this.#ports) port.stop()
      driver?.needsReset(error.message)
    }
  }
}

/** Tells the driver what there is to tell of a port. @returns false when it has no buffers left for that */
function tellOf(port: Port, queue: Virtqueue): boolean {
  for (let message = port.nextMessage; message !== undefined; message = port.nextMessage) {
    let chain = queue.pop()
    // There may be one by the time that it is asked for.
    if (chain === undefined && !queue.wantNotifications()) chain = queue.pop()
    if (chain === undefined) return false
    queue.push(chain, chain.write(port.take(message)))
  }
  return true
}

/** What a {@link Port} needs of its console. */
interface PortHost {
  guard(action: () => void): void
  /** A port may have a message. */
  tell(): void
  /** The event loop shall turn. */
  yield(): void
  resized(index: number, size: ConsoleSize): void
}

/** One port: two queues and a backend. */
class Port implements ConsoleGuest {
  readonly index: number
  readonly backend: ConsoleBackend
  readonly queues: readonly VirtioQueueOptions[]
  /** In UTF-8; empty for none. */
  readonly #name: Uint8Array
  readonly #isConsole: boolean
  readonly #host: PortHost
  #receiveq: Virtqueue | undefined
  #transmitq: Virtqueue | undefined
  #multiport = false
  #sized = false
  /** 0 while the size is not known. */
  #columns = 0
  #rows = 0
  /** The driver knows of the port, or is about to be told. */
  #added = false
  /** The driver has answered that. */
  #ready = false
  #guestOpen = false
  /** What the driver knows of {@link ConsoleBackend.open}. */
  #hostOpen = false
  /** Messages that the driver is to get, by bits. */
  #pending = 0
  /** Bytes of the first chain in the transmit queue that were sent before the backend had enough. */
  #transmitted = 0
  /** The backend has had enough for now. */
  #held = false
  readonly #transmitLater = new LaterTurn(() => this.#transmit())
  /** The backend has bytes that the driver had no room for. */
  #backendWaits = false
  readonly #receiveLater = new LaterTurn(() => this.#callForInput())

  constructor({ name = '', console = false, backend }: ConsolePortOptions, index: number, host: PortHost) {
    this.index = index
    this.backend = backend
    this.queues = [{ available: () => this.#callForInput() }, { available: () => this.#transmit() }]
    this.#name = Buffer.from(name)
    this.#isConsole = console || index === 0
    this.#host = host
  }

  start(
    receiveq: Virtqueue | undefined,
    transmitq: Virtqueue | undefined,
    { sized, multiport }: { readonly sized: boolean; readonly multiport: boolean },
  ): void {
    this.#receiveq = receiveq
    this.#transmitq = transmitq
    this.#sized = sized
    this.#multiport = multiport
    // Notifications are wanted once there is input without room.
    receiveq?.suppressNotifications()
    if (!multiport) this.#setGuestOpen(true)
    this.#compareOpen()
  }

  /** The driver broke a rule: queues are not touched any more. */
  stop(): void {
    this.#receiveq = undefined
    this.#transmitq = undefined
  }

  reset(): void {
    this.stop()
    this.#multiport = false
    this.#added = false
    this.#ready = false
    this.#hostOpen = false
    this.#pending = 0
    this.#transmitted = 0
    this.#held = false
    this.#setGuestOpen(false)
  }

  /** The driver wants to know of the ports. */
  add(): void {
    // "The device MUST NOT specify a port which exists" (5.3.6.2.1).
    if (this.#added) return
    this.#added = true
    this.#pending |= bit(VIRTIO_CONSOLE_DEVICE_ADD)
  }

  /** The driver has made what it needs for the port. */
  guestReady(): void {
    if (!this.#added || this.#ready) return
    this.#ready = true
    if (this.#name.length > 0) this.#pending |= bit(VIRTIO_CONSOLE_PORT_NAME)
    if (this.#isConsole) this.#pending |= bit(VIRTIO_CONSOLE_CONSOLE_PORT)
    if (this.#columns > 0) this.#pendResize()
    this.#compareOpen()
  }

  guestOpened(open: boolean): void {
    // Also before it is ready: programs in the guest may be as fast as its driver.
    if (this.#added) this.#setGuestOpen(open)
  }

  receive(bytes: Uint8Array): number {
    const queue = this.#receiveq
    this.#backendWaits = bytes.length > 0
    if (queue === undefined || !this.#guestOpen) return 0
    let taken = 0
    this.#host.guard(() => {
      const end = performance.now() + MAX_SERVICE
      while (taken < bytes.length) {
        const chain = queue.pop()
        if (chain !== undefined) {
          const written = chain.write(bytes.subarray(taken, taken + MAX_PIECE))
          queue.push(chain, written)
          taken += written
        } else if (queue.wantNotifications()) break
        if (performance.now() < end) continue
        this.#receiveLater.schedule()
        break
      }
      this.#backendWaits = taken < bytes.length
      if (!this.#backendWaits) queue.suppressNotifications()
      queue.notify()
    })
    return taken
  }

  transmitReady(): void {
    // In a turn of its own: a reader that is as fast as the guest would leave no time for anything else.
    if (this.#held) this.#transmitLater.schedule()
  }

  openChanged(): void {
    this.#compareOpen()
    this.#host.tell()
  }

  resize(size: ConsoleSize): void {
    const { columns, rows } = checkConsoleSize(size)
    if (columns === this.#columns && rows === this.#rows) return
    this.#columns = columns
    this.#rows = rows
    this.#host.resized(this.index, size)
    if (!this.#ready) return
    this.#pendResize()
    this.#host.tell()
  }

  /** What the driver is to be told next of this port. */
  get nextMessage(): Message | undefined {
    return MESSAGES.find((message) => (this.#pending & bit(message)) !== 0)
  }

  /** The message, as it is now; it then counts as told. */
  take(message: Message): Uint8Array {
    this.#pending &= ~bit(message)
    // Linux ignores VIRTIO_CONSOLE_CONSOLE_PORT without a value, of which the specification says nothing.
    let value = 1
    let details: Uint8Array = new Uint8Array(0)
    if (message === VIRTIO_CONSOLE_PORT_OPEN) {
      this.#hostOpen = this.backend.open
      value = this.#hostOpen ? 1 : 0
    } else if (message === VIRTIO_CONSOLE_PORT_NAME) {
      details = this.#name
    } else if (message === VIRTIO_CONSOLE_RESIZE) {
      // struct virtio_console_resize; Linux before 2025 took the rows for the first.
      details = new Uint8Array(Uint16Array.of(this.#columns, this.#rows).buffer)
    }
    const bytes = new Uint8Array(CONTROL_SIZE + details.length)
    const control = new DataView(bytes.buffer)
    control.setUint32(0, this.index, true)
    control.setUint16(CONTROL_EVENT, message, true)
    control.setUint16(CONTROL_VALUE, value, true)
    bytes.set(details, CONTROL_SIZE)
    return bytes
  }

  saveState(): DeviceState {
    return {
      columns: this.#columns,
      rows: this.#rows,
      added: this.#added,
      ready: this.#ready,
      guestOpen: this.#guestOpen,
      hostOpen: this.#hostOpen,
      pending: this.#pending,
      transmitted: this.#transmitted,
    }
  }

  /** Checks a saved state. @returns takes it */
  restorer(state: DeviceState, device: string): () => void {
    const saved = new StateReader(device, state)
    const columns = saved.uint('columns', MAX_SIZE)
    const rows = saved.uint('rows', MAX_SIZE)
    const added = saved.boolean('added')
    const ready = saved.boolean('ready')
    const guestOpen = saved.boolean('guestOpen')
    const hostOpen = saved.boolean('hostOpen')
    const pending = saved.uint('pending', ALL_MESSAGES) & ALL_MESSAGES
    const transmitted = saved.uint('transmitted', Number.MAX_SAFE_INTEGER)
    return () => {
      this.#columns = columns
      this.#rows = rows
      this.#host.resized(this.index, { columns, rows })
      this.#added = added
      this.#ready = ready
      this.#setGuestOpen(guestOpen)
      this.#hostOpen = hostOpen
      this.#pending = pending
      this.#transmitted = transmitted
    }
  }

  #setGuestOpen(open: boolean): void {
    if (open === this.#guestOpen) return
    this.#guestOpen = open
    this.backend.setGuestOpen(open)
    this.#callForInput()
  }

  /** The driver is told if the host's end is open now, unless it knows. */
  #compareOpen(): void {
    const known = !this.#ready || this.backend.open === this.#hostOpen
    if (known) this.#pending &= ~bit(VIRTIO_CONSOLE_PORT_OPEN)
    else this.#pending |= bit(VIRTIO_CONSOLE_PORT_OPEN)
  }

  #pendResize(): void {
    if (this.#isConsole && this.#sized && this.#multiport) this.#pending |= bit(VIRTIO_CONSOLE_RESIZE)
  }

  /** The backend then calls {@link Port.receive}. */
  #callForInput(): void {
    if (this.#backendWaits && this.#guestOpen && !this.#receiveLater.pending) this.backend.receiveReady()
  }

  /** Sends what the driver has, or what there is time for; the rest comes in another turn of the loop. */
  #transmit(): void {
    const queue = this.#transmitq
    if (queue === undefined || this.#transmitLater.pending) return
    this.#host.guard(() => {
      this.#held = this.#transmitFrom(queue)
      queue.notify()
    })
  }

  /** @returns whether the backend is to say when to go on */
  #transmitFrom(queue: Virtqueue): boolean {
    const end = performance.now() + MAX_SERVICE
    queue.suppressNotifications()
    while (this.backend.ready) {
      if (!this.#transmitPiece(queue)) {
        if (queue.wantNotifications()) return false
        queue.suppressNotifications()
      }
      if (performance.now() < end) continue
      this.#transmitLater.schedule()
      return false
    }
    // Whoever reads has to have a turn before there is room.
    this.#host.yield()
    return true
  }

  /**
   * Sends some of the first chain, or what is left of it. One that was not sent in full goes back into the
   * queue: the queue alone has all that is under way, also for who saves its state.
   *
   * @returns false if there is none
   */
  #transmitPiece(queue: Virtqueue): boolean {
    const chain = queue.pop()
    if (chain === undefined) return false
    for (const view of chain.readable.views(this.#transmitted, MAX_PIECE)) {
      this.backend.transmit(view)
      this.#transmitted += view.length
    }
    if (this.#transmitted < chain.readable.length) {
      queue.unpop()
    } else {
      this.#transmitted = 0
      queue.push(chain, 0)
    }
    return true
  }
}

/** A size that a console can have. @throws `ERR_INVALID_ARGUMENT` */
export function checkConsoleSize(size: ConsoleSize): ConsoleSize {
  if (typeof size !== 'object' || size === null) {
    throw invalidArgument('size', 'an object with columns and rows', size)
  }
  const { columns, rows } = size
  for (const [name, count] of Object.entries({ columns, rows })) {
    if (Number.isInteger(count) && count >= 1 && count <= MAX_SIZE) continue
    throw invalidArgument(name, `an integer from 1 to ${MAX_SIZE}`, count)
  }
  return { columns, rows }
}

function checkPorts(ports: readonly ConsolePortOptions[]): void {
  if (!Array.isArray(ports) || ports.length < 1 || ports.length > MAX_PORTS) {
    throw invalidArgument('ports', `an array of 1 to ${MAX_PORTS} ports`, ports)
  }
  const names = new Set<string>()
  for (const [index, { name, console }] of ports.entries()) {
    if (index === 0 && console === false) {
      throw invalidArgument('console of port 0', 'true, for the first port always is one,', console)
    }
    if (name === undefined) continue
    const isName = typeof name === 'string' && name !== '' && !/[/\0]/.test(name)
    if (!isName || Buffer.byteLength(name) > MAX_NAME || names.has(name)) {
      const expected = `1 to ${MAX_NAME} bytes of text with no '/', other than of the ports before it,`
      throw invalidArgument(`name of port ${index}`, expected, name)
    }
    names.add(name)
  }
}

function bit(message: number): number {
  return 1 << message
}
