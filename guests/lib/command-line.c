// The words of a kernel's command line, and what it prints about them.

#include "command-line.h"
#include "debug-exit.h"
#include "serial.h"

enum { WORD_SIZE = 16 };
static const char *rest_of_command_line;

void set_command_line(const char *line) { rest_of_command_line = line; }

const char *next_word(void) {
  static char word[WORD_SIZE];
  int length = 0;
  while (*rest_of_command_line == ' ') rest_of_command_line++;
  while (*rest_of_command_line && *rest_of_command_line != ' ') {
    if (length < WORD_SIZE - 1) word[length++] = *rest_of_command_line;
    rest_of_command_line++;
  }
  word[length] = 0;
  return word;
}

unsigned number_of(const char *word) {
  unsigned number = 0;
  for (; *word; word++) number = number * 10 + (*word - '0');
  return number;
}

unsigned next_number(void) { return number_of(next_word()); }

bool same(const char *left, const char *right) {
  while (*left && *left == *right) left++, right++;
  return *left == *right;
}

void print_result(const char *name, unsigned long count, const char *what) {
  serial_print(name);
  serial_print(" ");
  serial_print_number(count);
  serial_print(what);
  serial_print("\n");
}

void fail(const char *why, uint64_t number) {
  print_result(why, number, "");
  debug_exit(0);
}
