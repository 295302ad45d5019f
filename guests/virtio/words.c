// The words of the command line.

#include "kernel.h"

bool next_word(const char *line, struct word *word) {
  while (*line == ' ') line++;
  *word = (struct word){.text = line};
  while (*line && *line != ' ' && *line != '=') line++;
  word->end = line;
  if (*line == '=') word->arguments = ++line;
  while (*line && *line != ' ') line++;
  word->rest = line;
  return *word->text != 0;
}

bool word_is(const struct word *word, const char *name) {
  const char *text = word->text;
  while (text < word->end && *text == *name) text++, name++;
  return text == word->end && !*name;
}

static unsigned digit_of(char character) {
  if (character >= '0' && character <= '9') return character - '0';
  character |= 'a' - 'A';
  return character >= 'a' && character <= 'f' ? character - 'a' + 10u : UINT32_MAX;
}

bool parse_number(const char **text, uint64_t *number) {
  const char *at = *text;
  unsigned base = 10;
  if (at[0] == '0' && at[1] == 'x') at += 2, base = 16;
  const char *digits = at;
  uint64_t value = 0;
  for (unsigned digit; (digit = digit_of(*at)) < base; at++) value = value * base + digit;
  if (at == digits) return false;
  unsigned shift = *at == 'K' ? 10 : *at == 'M' ? 20 : *at == 'G' ? 30 : 0;
  *number = value << shift;
  *text = at + (shift != 0);
  return true;
}

unsigned parse_arguments(const struct word *word, uint64_t numbers[MAX_ARGUMENTS]) {
  const char *text = word->arguments;
  unsigned count = 0;
  if (!text) return 0;
  do {
    if (count == MAX_ARGUMENTS || !parse_number(&text, &numbers[count++])) {
      fail("up to %u numbers, with commas between them, expected behind = but got %s", MAX_ARGUMENTS, text);
    }
  } while (*text++ == ',');
  return count;
}
