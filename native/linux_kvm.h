// linux/kvm.h, right in C++. Some releases of the kernel's headers declare flexible arrays behind an empty struct,
// whose size is 0 in C but 1 in C++: the structs, and the ioctl numbers made of their sizes, would be wrong.
#pragma once

#include <linux/stddef.h>
#undef __DECLARE_FLEX_ARRAY
#define __DECLARE_FLEX_ARRAY(TYPE, NAME) TYPE NAME[0]
#include <linux/kvm.h>

static_assert(sizeof(kvm_cpuid2) == 8, "struct kvm_cpuid2");
static_assert(sizeof(kvm_msrs) == 8, "struct kvm_msrs");
static_assert(sizeof(kvm_msr_list) == 4, "struct kvm_msr_list");
static_assert(sizeof(kvm_irq_routing) == 8, "struct kvm_irq_routing");
static_assert(sizeof(kvm_xsave) == 4096, "struct kvm_xsave");
