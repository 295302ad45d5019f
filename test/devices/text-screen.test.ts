import fc from 'fast-check'
import { describe, expect, it } from 'vitest'
import { TextScreen } from '../../src/devices/text-screen.js'
import { TEXT_SCREEN_SIZE, TEXT_SCREEN_START } from '../../src/memory/layout.js'
import { guestMemory, guestWith, hostOf } from './guest.js'

function setUp(memorySize?: number) {
  const screen = new TextScreen()
  const memory = guestMemory(memorySize)
  screen.attach(hostOf({ memory }))
  const guest = guestWith(screen)
  const crtc = (register: number, value: number) => {
    guest.outb(0x3d4, register)
    guest.outb(0x3d5, value)
  }
  const print = (row: number, column: number, text: string, attribute = 0x07) => {
    ;[...text].forEach((char, i) => {
      const at = TEXT_SCREEN_START + (row * 80 + column + i) * 2
      memory.writeUint8(at, char.charCodeAt(0))
      memory.writeUint8(at + 1, attribute)
    })
  }
  return { screen, memory, crtc, print, ...guest }
}

describe('what is on the screen', () => {
  it('is nothing at first, attached or not', () => {
    for (const screen of [new TextScreen(), setUp().screen]) {
      expect(screen.text()).toBe('')
      expect(screen.ansi()).toBe('')
      expect(screen.lines()).toEqual(Array(25).fill(' '.repeat(80)))
    }
  })

  it('is text without trailing blanks and lines', () => {
    const { screen, print } = setUp()
    print(1, 2, 'Hello, world!   ')
    print(3, 0, 'x'.repeat(80))
    print(5, 0, '    ')
    expect(screen.text()).toBe(`\n  Hello, world!\n\n${'x'.repeat(80)}`)
  })

  it('is 25 lines of 80 characters', () => {
    const { screen, print } = setUp()
    print(24, 79, '!')
    expect(screen.lines()).toHaveLength(25)
    expect(screen.lines().every((line) => line.length === 80)).toBe(true)
    expect(screen.lines()[24]).toBe(`${' '.repeat(79)}!`)
  })

  it('is code page 437; 0, 0x20 and 0xff are blank', () => {
    const { screen, print } = setUp()
    print(0, 0, 'A\x00B\x20C\xffD')
    print(1, 0, '\xc9\xcd\xbb\x01\x7f\xe1\xfe')
    expect(screen.text()).toBe('A B C D\n╔═╗☺⌂ß■')
  })

  it('has colours', () => {
    const { screen, print } = setUp()
    print(0, 0, 'a', 0x1f)
    print(0, 1, 'b', 0x84)
    expect(screen.cells()[0]?.slice(0, 3)).toEqual([
      { char: 'a', foreground: 15, background: 1, blink: false },
      { char: 'b', foreground: 4, background: 0, blink: true },
      { char: ' ', foreground: 0, background: 0, blink: false },
    ])
    expect(screen.cells()).toHaveLength(25)
  })

  it('has colours as ANSI escape sequences, changed only where they change', () => {
    const { screen, print } = setUp()
    print(0, 0, 'ab', 0x1f)
    print(0, 2, 'c', 0x84)
    print(2, 0, 'd  ', 0x07)
    print(4, 0, ' ', 0x40)
    print(5, 0, ' ', 0x07)
    expect(screen.ansi()).toBe(
      '\x1b[0;97;44mab\x1b[0;5;31;40mc\x1b[0m\n\n\x1b[0;37;40md\x1b[0m\n\n\x1b[0;30;41m \x1b[0m',
    )
  })

  it('begins at the start address, and wraps at the end of video memory', () => {
    const { screen, crtc, memory, print } = setUp()
    print(1, 0, 'second')
    crtc(0x0d, 80)
    expect(screen.text()).toBe('second')
    crtc(0x0c, 0x3f)
    crtc(0x0d, 0xff)
    memory.writeUint8(TEXT_SCREEN_START + TEXT_SCREEN_SIZE - 2, 0x41)
    memory.writeUint8(TEXT_SCREEN_START, 0x42)
    expect(screen.text().startsWith('AB')).toBe(true)
  })

  it('is there in a machine with less memory than the screen has address', () => {
    const { screen, print } = setUp(64 * 1024)
    print(0, 0, 'small')
    expect(screen.text()).toBe('small')
  })

  it('33: is an error once the machine is closed', () => {
    const { screen, memory } = setUp()
    memory.close()
    for (const look of [
      () => screen.text(),
      () => screen.lines(),
      () => screen.cells(),
      () => screen.ansi(),
    ]) {
      expect(look).toThrow(expect.objectContaining({ code: 'ERR_CLOSED' }))
    }
  })
})

describe('the cursor', () => {
  it('is where its registers say, relative to the start of the screen', () => {
    const { screen, crtc, outw } = setUp()
    expect(screen.cursor).toEqual({ row: 0, column: 0, visible: true })
    outw(0x3d4, 0x020e)
    outw(0x3d4, 0x2f0f)
    expect(screen.cursor).toEqual({ row: 6, column: 0x22f - 480, visible: true })
    crtc(0x0d, 80)
    expect(screen.cursor.row).toBe(5)
  })

  it('is hidden by bit 5 of cursor start, or off the screen', () => {
    const { screen, crtc } = setUp()
    crtc(0x0a, 0x20)
    expect(screen.cursor.visible).toBe(false)
    crtc(0x0a, 0x00)
    crtc(0x0e, 2000 >> 8)
    crtc(0x0f, 2000 & 0xff)
    expect(screen.cursor).toEqual({ row: 25, column: 0, visible: false })
    crtc(0x0e, 0xff)
    crtc(0x0c, 0xff)
    expect(screen.cursor.row).toBeLessThan(205)
  })
})

describe('registers', () => {
  it('all 25 can be written and read; those beyond read as 0', () => {
    const { crtc, inb, outb } = setUp()
    for (let i = 0; i < 256; i++) crtc(i, i ^ 0xff)
    for (let i = 0; i < 256; i++) {
      outb(0x3d4, i)
      expect([inb(0x3d4), inb(0x3d5)]).toEqual([i, i < 25 ? i ^ 0xff : 0])
    }
  })

  it('waiting for a retrace to begin or to end does not take long', () => {
    const { inb, outb } = setUp()
    const seen = new Set([inb(0x3da) & 0x09, inb(0x3da) & 0x09])
    expect(seen).toEqual(new Set([0, 0x09]))
    outb(0x3da, 0xff)
  })

  it('their state comes back exactly', () => {
    const { screen, crtc, inb } = setUp()
    crtc(0x0f, 77)
    inb(0x3da)
    const state = screen.saveState()
    const copy = setUp()
    copy.screen.restoreState(structuredClone(state))
    expect(copy.screen.saveState()).toEqual(state)
    expect(copy.screen.cursor.column).toBe(77)
    expect(() => copy.screen.restoreState({ ...(state as object), registers: new Uint8Array(24) })).toThrow(
      'registers',
    )
  })

  it('whatever they hold, the screen can be shown', () => {
    fc.assert(
      fc.property(fc.uint8Array({ minLength: 25, maxLength: 25 }), (registers) => {
        const { screen, crtc } = setUp()
        registers.forEach((value, i) => {
          crtc(i, value)
        })
        expect(screen.lines().every((line) => line.length === 80)).toBe(true)
        expect(screen.cursor.column).toBeLessThan(80)
      }),
      { numRuns: 20 },
    )
  })
})
