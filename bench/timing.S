/*
 * Measures interrupts in cycles of the TSC: 64 KiB that start at their first byte (0xf0000), or at a PC's reset vector
 * when they are a PC's firmware, so that QEMU can run the same file.
 *
 * With one processor: PIT one-shots of 1 ms, from writing the count to the handler, and then the time that TICKS
 * periodic interrupts at 1000 Hz take. With several: the round trip of an inter-processor interrupt. Each result goes to
 * the debug console (port 0xe9) as a line: a letter, and the number in 16 hexadecimal digits.
 */
#define ONE_SHOTS 200
#define TICKS 500
#define ROUND_TRIPS 500
/* 10 ms */
#define IDLE_COUNT 11932
/* 1 ms */
#define PIT_COUNT 1193

#define DONE 0x500
#define AP_UP 0x502
#define COUNT 0x504
#define T0 0x510
#define T1 0x518
#define SUM 0x520

#define VECTOR_PIT 0x20
#define VECTOR_BACK 0x30
#define VECTOR_FORTH 0x31

#define IA32_APIC_BASE 0x1b
#define X2APIC_EOI 0x80b
#define X2APIC_SVR 0x80f
#define X2APIC_ICR 0x830
#define X2APIC_LVT_LINT0 0x835

.code16
/* Vectors from 0x20 on, and only the timer. */
.macro INIT_PIC
	movb $0x11, %al
	outb %al, $0x20
	movb $VECTOR_PIT, %al
	outb %al, $0x21
	movb $4, %al
	outb %al, $0x21
	movb $1, %al
	outb %al, $0x21
	movb $0xfe, %al
	outb %al, $0x21
.endm
.macro PERIODIC count
	movb $0x34, %al
	outb %al, $0x43
	movb $(\count & 0xff), %al
	outb %al, $0x40
	movb $(\count >> 8), %al
	outb %al, $0x40
.endm

.text
.globl _start
_start:
	cli
	cld
	xorw %ax, %ax
	movw %ax, %ds
	movw %ax, %es
	movw %ax, %ss
	movw $0x7000, %sp
	movw $on_pit, 4 * VECTOR_PIT
	movw %cs, 4 * VECTOR_PIT + 2
	movw $on_back, 4 * VECTOR_BACK
	movw %cs, 4 * VECTOR_BACK + 2
	movw $on_forth, 4 * VECTOR_FORTH
	movw %cs, 4 * VECTOR_FORTH + 2

	/* fw_cfg: how many processors there are. */
	movw $0x510, %dx
	movw $5, %ax
	outw %ax, %dx
	incw %dx
	inb %dx, %al
	cmpb $1, %al
	ja round_trips

	/* LINT0 takes the PIC's interrupts, as firmware would leave it. */
	call enable_apic
	movl $X2APIC_LVT_LINT0, %ecx
	movl $0x700, %eax
	xorl %edx, %edx
	wrmsr

	INIT_PIC

	movw $ONE_SHOTS, %cx
one_shot:
	movb $0, DONE
	movb $0x30, %al
	outb %al, $0x43
	movb $(PIT_COUNT & 0xff), %al
	outb %al, $0x40
	movb $(PIT_COUNT >> 8), %al
	rdtsc
	movl %eax, T0
	movl %edx, T0 + 4
	movb $(PIT_COUNT >> 8), %al
	outb %al, $0x40
1:	sti
	hlt
	cli
	cmpb $0, DONE
	je 1b
	call add_difference
	decw %cx
	jnz one_shot
	movb $'P', %bl
	call print_sum

	movl $0, SUM
	movl $0, SUM + 4
	movw $0, COUNT
	PERIODIC PIT_COUNT
	rdtsc
	movl %eax, T0
	movl %edx, T0 + 4
1:	sti
	hlt
	cli
	cmpw $TICKS, COUNT
	jb 1b
	call add_difference
	movb $'T', %bl
	call print_sum
	jmp end

round_trips:
	call enable_apic
	xorl %edx, %edx
	movl $X2APIC_ICR, %ecx
	movl $0xc4500, %eax		/* INIT, all but this one */
	wrmsr
	movl $0xc46f1, %eax		/* SIPI to 0xf1000 */
	wrmsr
1:	pause
	cmpb $0, AP_UP
	je 1b
	movw $ROUND_TRIPS, %si
round_trip:
	movb $0, DONE
	rdtsc
	movl %eax, T0
	movl %edx, T0 + 4
	movl $X2APIC_ICR, %ecx
	movl $1, %edx			/* to APIC id 1 */
	movl $(0x4000 | VECTOR_FORTH), %eax
	wrmsr
1:	sti
	hlt
	cli
	cmpb $0, DONE
	je 1b
	call add_difference
	decw %si
	jnz round_trip
	movb $'I', %bl
	call print_sum
end:
	movb $0x10, %al
	outb %al, $0xf4
	cli
	hlt

on_pit:
	pushl %eax
	pushl %edx
	rdtsc
	movl %eax, T1
	movl %edx, T1 + 4
	movb $1, DONE
	incw COUNT
	movb $0x20, %al
	outb %al, $0x20
	popl %edx
	popl %eax
	iret

on_back:
	pushl %eax
	pushl %ecx
	pushl %edx
	rdtsc
	movl %eax, T1
	movl %edx, T1 + 4
	movb $1, DONE
	call end_of_interrupt
	popl %edx
	popl %ecx
	popl %eax
	iret

on_forth:
	call end_of_interrupt
	movl $X2APIC_ICR, %ecx
	xorl %edx, %edx			/* to APIC id 0 */
	movl $(0x4000 | VECTOR_BACK), %eax
	wrmsr
	iret

end_of_interrupt:
	movl $X2APIC_EOI, %ecx
	xorl %eax, %eax
	xorl %edx, %edx
	wrmsr
	ret

enable_apic:
	movl $IA32_APIC_BASE, %ecx
	rdmsr
	orl $0xc00, %eax
	wrmsr
	movl $X2APIC_SVR, %ecx
	movl $0x1ff, %eax
	xorl %edx, %edx
	wrmsr
	ret

/* SUM += T1 - T0 */
add_difference:
	movl T1, %eax
	movl T1 + 4, %edx
	subl T0, %eax
	sbbl T0 + 4, %edx
	addl %eax, SUM
	adcl %edx, SUM + 4
	ret

/* The letter in bl, and SUM. */
print_sum:
	movb %bl, %al
	outb %al, $0xe9
	movl SUM + 4, %eax
	call print_hex
	movl SUM, %eax
	call print_hex
	movb $'\n', %al
	outb %al, $0xe9
	ret

print_hex:
	movw $8, %di
1:	roll $4, %eax
	movl %eax, %edx
	andb $0xf, %al
	addb $'0', %al
	cmpb $'9', %al
	jbe 2f
	addb $('a' - '9' - 1), %al
2:	outb %al, $0xe9
	movl %edx, %eax
	decw %di
	jnz 1b
	ret

	.org 0x1000
ap:
	cli
	ljmp $0xf000, $ap_main
ap_main:
	xorw %ax, %ax
	movw %ax, %ds
	movw %ax, %ss
	movw $0x6000, %sp
	call enable_apic
	movb $1, AP_UP
1:	sti
	hlt
	jmp 1b

	.org 0x2000
	.ascii "IDLE"
idle:
/* Run at 0x7c00: waits for the PIT at 100 Hz, for ever. */
	cli
	xorw %ax, %ax
	movw %ax, %ds
	movw %ax, %ss
	movw $0x7000, %sp
	movw $(0x7c00 + on_idle_tick - idle), 4 * VECTOR_PIT
	movw $0, 4 * VECTOR_PIT + 2
	INIT_PIC
	PERIODIC IDLE_COUNT
	sti
1:	hlt
	jmp 1b
on_idle_tick:
	pushw %ax
	movb $0x20, %al
	outb %al, $0x20
	popw %ax
	iret

	.org 0xfff0
	ljmp $0xf000, $0
	.org 0xffff
	.byte 0
