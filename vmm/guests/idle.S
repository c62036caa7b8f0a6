# idle: sleeps, writes nothing.

    .include "guest.inc"

    .equ    PARAM_MILLISECONDS, 0       # 0: for ever

    .equ    SLICE, 50                   # milliseconds; time spent paused ends at most one slice

    START
    PARAM   PARAM_MILLISECONDS, %rbx
    test    %rbx, %rbx
    jnz     .Lsleep
    dec     %rbx                        # 2^64 - 1 milliseconds
.Lsleep:
    mov     $SLICE, %eax
    cmp     %rax, %rbx
    cmovb   %rbx, %rax
    sub     %rax, %rbx
    imul    $1000, %rax, %rdi           # microseconds
    HYPERCALL HYPERCALL_SLEEP
    test    %rbx, %rbx
    jnz     .Lsleep
    EXIT    EXIT_OK
