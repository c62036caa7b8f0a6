# pingpong: the vCPUs take turns, in the order of their indices, with the wait and wake hypercalls. The
# token, a u32 in the first usable page of the first slot, counts the turns taken; it is the turn of
# vCPU token % vCPUs.

    .include "guest.inc"

    .equ    PARAM_TURNS, 0              # per vCPU

    .equ    EVERYBODY, 0x7fffffff

    START
    FIRST_SLOT %edx, %rdx
    mov     SLOT_USABLE_START(%rdx), %rbx
    cmp     SLOT_USABLE_END(%rdx), %rbx
    jb      .Lpage
    EXIT    EXIT_NO_PAGES
.Lpage:
    PARAM   PARAM_TURNS, %rbp
    mov     %r14d, %r12d                # the token at this vCPU's next turn
.Lturn:
    test    %rbp, %rbp
    jz      .Ldone
.Llook:
    mov     (%rbx), %esi
    cmp     %r12d, %esi
    je      .Lmine
    mov     %rbx, %rdi
    HYPERCALL HYPERCALL_WAIT            # while the token is still ESI
    jmp     .Llook
.Lmine:
    incl    (%rbx)                      # nobody else writes now
    mov     %rbx, %rdi
    mov     $EVERYBODY, %esi
    HYPERCALL HYPERCALL_WAKE
    add     %r13d, %r12d
    dec     %rbp
    jmp     .Lturn
.Ldone:
    EXIT    EXIT_OK
