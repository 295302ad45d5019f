// Draws on the VGA text screen: 80x25 cells of two bytes, a CP437 character and a colour, at 0xb8000.

#include "ports.h"

enum {
  COLUMNS = 80,
  ROWS = 25,
  SCREEN = 0xb8000,
  CRTC_INDEX = 0x3d4,  // the CRT controller: write a register's number here...
  CRTC_DATA = 0x3d5,   // ...and its value there
  CURSOR_HIGH = 0x0e,
  CURSOR_LOW = 0x0f,
};

// A colour is background * 16 + foreground.
enum { BLUE = 1, GREY = 7, BRIGHT_CYAN = 11, YELLOW = 14, WHITE = 15 };
#define ON_BLUE(foreground) (BLUE << 4 | (foreground))

// The box-drawing characters of code page 437.
enum {
  TOP_LEFT = 0xc9, TOP_RIGHT = 0xbb, BOTTOM_LEFT = 0xc8, BOTTOM_RIGHT = 0xbc,
  HORIZONTAL = 0xcd, VERTICAL = 0xba, FULL_BLOCK = 0xdb,
};

static uint16_t *cell(int row, int column) {
  return (uint16_t *)SCREEN + row * COLUMNS + column;
}

// One instruction for many cells: a guest that is emulated pays for each instruction it runs.
static void fill(uint16_t *to, uint32_t count, uint8_t character, uint8_t colour) {
  __asm__ volatile("rep stosw" : "+D"(to), "+c"(count) : "a"(colour << 8 | character) : "memory");
}

static void print(int row, int column, const char *text, uint8_t colour) {
  for (uint16_t *to = cell(row, column); *text; text++) *to++ = colour << 8 | (uint8_t)*text;
}

static void box(int top, int left, int height, int width, uint8_t colour) {
  int bottom = top + height - 1, right = left + width - 1;
  fill(cell(top, left), width, HORIZONTAL, colour);
  fill(cell(bottom, left), width, HORIZONTAL, colour);
  for (int row = top + 1; row < bottom; row++) {
    fill(cell(row, left), 1, VERTICAL, colour);
    fill(cell(row, right), 1, VERTICAL, colour);
  }
  fill(cell(top, left), 1, TOP_LEFT, colour);
  fill(cell(top, right), 1, TOP_RIGHT, colour);
  fill(cell(bottom, left), 1, BOTTOM_LEFT, colour);
  fill(cell(bottom, right), 1, BOTTOM_RIGHT, colour);
}

static void set_crtc(uint8_t index, uint8_t value) {
  outb(CRTC_INDEX, index);
  outb(CRTC_DATA, value);
}

static void set_cursor(int row, int column) {
  uint16_t position = row * COLUMNS + column;
  set_crtc(CURSOR_HIGH, position >> 8);
  set_crtc(CURSOR_LOW, position);
}

void main(void) {
  fill(cell(0, 0), COLUMNS * ROWS, ' ', ON_BLUE(GREY));
  box(8, 20, 8, 40, ON_BLUE(BRIGHT_CYAN));
  print(10, 27, "Hello from the text screen", ON_BLUE(YELLOW));
  for (int colour = 0; colour < 16; colour++) fill(cell(12, 24 + 2 * colour), 2, FULL_BLOCK, ON_BLUE(colour));
  print(13, 24, "ready>", ON_BLUE(WHITE));
  set_cursor(13, 31);
}
