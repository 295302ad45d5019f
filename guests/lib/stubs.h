# The stubs of all vectors.

#include "descriptors.h"

# A stub for each vector, of STUB_SIZE bytes: pushes what struct frame has, and goes to `entry`. The processor pushes
# an error code for these alone (Intel SDM vol. 3A, "Exception and Interrupt Reference"), and for none that `int n`
# raises.
        .macro STUBS error_codes, entry
        .set vector, 0
        .rept VECTORS
        .balign STUB_SIZE
        .set has_error_code, vector == 8 || (vector >= 10 && vector <= 14) || vector == 17 || vector == 21
        .if !(\error_codes && (has_error_code || vector == 29 || vector == 30))
        push $0
        .endif
        push $vector
        jmp \entry
        .set vector, vector + 1
        .endr
        .endm
