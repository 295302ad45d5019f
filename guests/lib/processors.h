// Starting other processors: INIT and SIPI, from real mode to long mode.
#pragma once

#include "descriptors.h"

#define MAX_PROCESSORS 64
// Bytes of each one's stack: 4 KiB.
#define PROCESSOR_STACK_SHIFT 12

#ifndef __ASSEMBLER__
// By the id of the local APIC.
extern uint8_t processor_stacks[MAX_PROCESSORS << PROCESSOR_STACK_SHIFT];

// Starts the processor of that id with this one's page tables.
void start_processor(unsigned id);
// A SIPI alone.
void send_startup(unsigned id);
// The kernel's own: where a processor arrives, on its stack, with the GDT loaded. It does not return.
void processor_main(unsigned id);
#endif
