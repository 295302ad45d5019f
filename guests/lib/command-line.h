// The words of a kernel's command line, and what it prints about them.
#pragma once

#include <stdbool.h>
#include <stdint.h>

// What next_word() starts with.
void set_command_line(const char *line);
// The next word; an empty one at the end.
const char *next_word(void);
unsigned number_of(const char *word);
unsigned next_number(void);
bool same(const char *left, const char *right);
// A line: `name count` and what follows.
void print_result(const char *name, unsigned long count, const char *what);
// Ends the machine with a failure.
__attribute__((noreturn)) void fail(const char *why, uint64_t number);
