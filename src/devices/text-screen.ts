import type { AccessSize, Device, DeviceHost, DeviceState, PortRange } from '../bus/device.js'
import type { GuestMemory } from '../memory/guest-memory.js'
import { TEXT_SCREEN_SIZE, TEXT_SCREEN_START } from '../memory/layout.js'
import { CODE_PAGE_437 } from './code-page-437.js'
import { StateReader } from './state.js'

// IBM PS/2 Hardware Interface Technical Reference, "Video Subsystem": CRT controller registers;
// http://www.osdever.net/FreeVGA/vga/crtcreg.htm

/** CRT controller address register; data is the port after it. */
export const CRTC_ADDRESS_PORT = 0x3d4
/** Input status register 1. */
export const INPUT_STATUS_PORT = 0x3da

const CRTC_REGION = 0
const CRTC_ADDRESS_OFFSET = 0

const CURSOR_START = 0x0a
const START_ADDRESS_HIGH = 0x0c
const START_ADDRESS_LOW = 0x0d
const CURSOR_LOCATION_HIGH = 0x0e
const CURSOR_LOCATION_LOW = 0x0f
/** Cursor off, in the cursor start register. */
const CURSOR_START_CD = 0x20

/** The CRTC registers of mode 3: 80×25, 16-line characters. */
const MODE_3 = [
  0x5f, 0x4f, 0x50, 0x82, 0x55, 0x81, 0xbf, 0x1f, 0x00, 0x4f, 0x0d, 0x0e, 0x00, 0x00, 0x00, 0x00, 0x9c, 0x8e,
  0x8f, 0x28, 0x1f, 0x96, 0xb9, 0xa3, 0xff,
] as const
const CRTC_REGISTERS = MODE_3.length

/** The display is blanked: horizontal or vertical retrace. */
const STATUS_DISPLAY_DISABLED = 0x01
const STATUS_VERTICAL_RETRACE = 0x08

const COLUMNS = 80
const ROWS = 25
/** Two bytes: the character, then its attribute. */
const CELL_BYTES = 2
/** Cells in video memory, a power of two; what runs past the end goes on at the start. */
const MEMORY_CELLS = TEXT_SCREEN_SIZE / CELL_BYTES

const BLANK = ' '
const BLINK = 0x80
const BLACK = 0
/** ANSI numbers red 1 and blue 4, the adapter the other way round. */
const ANSI_COLORS = [0, 4, 2, 6, 1, 5, 3, 7] as const

/** One character on the screen. */
export interface ScreenCell {
  /** As Unicode; blanks are spaces. */
  readonly char: string
  /** 0 to 15: black, blue, green, cyan, red, magenta, brown, light grey, then the same bright. */
  readonly foreground: number
  /** 0 to 7, as {@link ScreenCell.foreground}. */
  readonly background: number
  readonly blink: boolean
}

/** Where the cursor is, counted from 0. */
export interface ScreenCursor {
  /** May be 25 or more when the guest put the cursor off the screen; it is not visible then. */
  readonly row: number
  readonly column: number
  readonly visible: boolean
}

/**
 * The text screen of a VGA adapter: 80×25 characters.
 *
 * The cells lie in guest RAM at 0xb8000, so that a guest writes them at the speed of memory, without an exit;
 * they are read only when someone looks. The ports hold the cursor, the start address and the retrace bits,
 * which differ in every read, so that a guest which waits for either never waits long.
 *
 * Once the machine is closed, looking at the screen throws `ERR_CLOSED`.
 */
export class TextScreen implements Device {
  readonly name = 'text-screen'
  readonly ports: readonly PortRange[] = [
    { base: CRTC_ADDRESS_PORT, length: 2 },
    { base: INPUT_STATUS_PORT, length: 1 },
  ]
  readonly maxAccessSize = 1

  #memory: GuestMemory | undefined
  readonly #registers = Uint8Array.from(MODE_3)
  #index = 0
  #status = 0

  attach(host: DeviceHost): void {
    this.#memory = host.memory
  }

  /** What a reader would see: 25 lines without trailing blanks, without trailing empty lines. */
  text(): string {
    return this.lines()
      .map((line) => line.trimEnd())
      .join('\n')
      .trimEnd()
  }

  /** 25 strings of 80 characters. */
  lines(): string[] {
    return this.cells().map((row) => row.map(({ char }) => char).join(''))
  }

  /** 25 rows of 80 cells. */
  cells(): ScreenCell[][] {
    const bytes = this.#memory?.read(TEXT_SCREEN_START, TEXT_SCREEN_SIZE) ?? new Uint8Array(TEXT_SCREEN_SIZE)
    const start = this.#register16(START_ADDRESS_HIGH, START_ADDRESS_LOW)
    return Array.from({ length: ROWS }, (_, row) =>
      Array.from({ length: COLUMNS }, (_, column) => {
        const at = ((start + row * COLUMNS + column) % MEMORY_CELLS) * CELL_BYTES
        const attribute = bytes[at + 1]!
        return {
          char: CODE_PAGE_437[bytes[at]!]!,
          foreground: attribute & 0x0f,
          background: (attribute >> 4) & 0x07,
          blink: (attribute & BLINK) !== 0,
        }
      }),
    )
  }

  /** As {@link TextScreen.text}, with colours as ANSI escape sequences (ECMA-48 SGR). */
  ansi(): string {
    const rows = this.cells().map(ansiLine)
    while (rows.at(-1) === '') rows.pop()
    return rows.join('\n')
  }

  get cursor(): ScreenCursor {
    const start = this.#register16(START_ADDRESS_HIGH, START_ADDRESS_LOW)
    const location = this.#register16(CURSOR_LOCATION_HIGH, CURSOR_LOCATION_LOW)
    const cell = (location - start + 0x1_0000) % MEMORY_CELLS
    const row = Math.floor(cell / COLUMNS)
    const hidden = (this.#registers[CURSOR_START]! & CURSOR_START_CD) !== 0
    return { row, column: cell % COLUMNS, visible: !hidden && row < ROWS }
  }

  read(offset: number, _size: AccessSize, region: number): number {
    if (region !== CRTC_REGION) {
      this.#status ^= STATUS_DISPLAY_DISABLED | STATUS_VERTICAL_RETRACE
      return this.#status
    }
    return offset === CRTC_ADDRESS_OFFSET ? this.#index : (this.#registers[this.#index] ?? 0)
  }

  write(offset: number, value: number, _size: AccessSize, region: number): void {
    if (region !== CRTC_REGION) return // the feature control register: nothing to control
    if (offset === CRTC_ADDRESS_OFFSET) this.#index = value
    else if (this.#index < CRTC_REGISTERS) this.#registers[this.#index] = value
  }

  /** The cells are guest RAM and not part of it. */
  saveState(): DeviceState {
    return { registers: this.#registers.slice(), index: this.#index, status: this.#status }
  }

  restoreState(state: DeviceState): void {
    const saved = new StateReader(this.name, state)
    const registers = saved.bytes('registers', CRTC_REGISTERS, CRTC_REGISTERS)
    const index = saved.byte('index')
    const status = saved.byte('status') & (STATUS_DISPLAY_DISABLED | STATUS_VERTICAL_RETRACE)
    this.#registers.set(registers)
    this.#index = index
    this.#status = status
  }

  #register16(high: number, low: number): number {
    return (this.#registers[high]! << 8) | this.#registers[low]!
  }
}

function ansiLine(cells: readonly ScreenCell[]): string {
  let end = cells.length
  while (end > 0 && cells[end - 1]!.char === BLANK && cells[end - 1]!.background === BLACK) end--
  let line = ''
  let style = ''
  for (const cell of cells.slice(0, end)) {
    const next = sgr(cell)
    if (next !== style) line += next
    style = next
    line += cell.char
  }
  return end === 0 ? '' : `${line}\x1b[0m`
}

function sgr({ foreground, background, blink }: ScreenCell): string {
  const color = ANSI_COLORS[(foreground & 7) as 0] + (foreground >= 8 ? 90 : 30)
  return `\x1b[0;${blink ? '5;' : ''}${color};${ANSI_COLORS[background as 0] + 40}m`
}
