// Sends back every byte it receives on the serial port, until a line "quit" or Ctrl-D.

#include "debug-exit.h"
#include "serial.h"

static const char quit[] = "quit";
enum { QUIT_LENGTH = sizeof(quit) - 1, CTRL_D = 0x04 };

void _start(void) {
  serial_print("ready\n");

  int column = 0;   // bytes in this line so far
  int matched = 0;  // how many of them are the beginning of "quit"
  for (;;) {
    char byte = serial_read();
    if (byte == CTRL_D) break;
    serial_write(byte);
    if (byte == '\n' || byte == '\r') {  // a terminal in raw mode sends \r for Enter
      if (matched == QUIT_LENGTH && column == QUIT_LENGTH) break;
      column = matched = 0;
    } else {
      if (column == matched && matched < QUIT_LENGTH && byte == quit[matched]) matched++;
      column++;
    }
  }

  serial_print("bye\n");
  debug_exit(0);
}
