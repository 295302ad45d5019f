// What the parts of this kernel share.
#pragma once

#include "command-line.h"
#include "controllers.h"
#include "processors.h"

enum { RFLAGS_TF = 1 << 8, RFLAGS_AC = 1 << 18 };

// --- descriptors.c
void load_task(void);
// The IDT whose entries expect no error code, as `int n` pushes none.
void load_software_idt(void);
// Gives a vector a stack that the task state segment has no room for, or takes that back.
void break_stack_of(unsigned vector, bool broken);

// --- the tests
void test_pit(void);
void test_pit_ioapic(void);
void test_lapic_timer(void);
void test_rtc(void);
void test_level_pic(void);
void test_level_ioapic(void);
void test_device_pic(void);
void test_device_ioapic(void);
void test_serial(void);
void test_keyboard(void);
void test_storm_pic(void);
void test_storm_ioapic(void);
void test_external(void);
void test_message(void);
void test_nmi(void);
void test_nmi_from_host(void);
void test_exceptions(void);
void test_software_interrupts(void);
void test_processors(void);
void test_startup_twice(void);
void test_crash(void);
void test_halt(void);
