# hello: each vCPU prints "hello from vCPU N of M", N from 0.

    .include "guest.inc"

    .equ    PARAM_LINES, 0              # per vCPU

    START
    PARAM   PARAM_LINES, %rbx
    test    %rbx, %rbx
    jz      .Ldone
.Lline:
    PUT_TEXT hello
    PUT_NUMBER %r14
    PUT_TEXT of
    PUT_NUMBER %r13
    PUT_CHAR $'\n'
    dec     %rbx
    jnz     .Lline
.Ldone:
    EXIT    EXIT_OK

    .section .rodata
hello:
    .asciz  "hello from vCPU "
of:
    .asciz  " of "
