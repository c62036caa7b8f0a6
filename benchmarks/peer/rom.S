# The peer's firmware: the loop of the sample guest `sequential` under QEMU, without an operating system.
#
# The first vCPU enters at the reset vector; the others, woken by it, at offset 0 of this ROM, which a PC also
# shows at 0xf0000. Each goes to 64-bit mode with all memory identity-mapped and runs its loop at CPL 3, as the
# sample guests do. Page tables, descriptors and the frame for the way to CPL 3 are constants in this ROM, with
# their accessed and dirty bits set: the guest writes no memory but the pages that it is to dirty.
#
# Parameters, put into RAM at PARAMS by QEMU's loader device, 32 bytes a vCPU:
#   0   address of the first page to write
#   8   pages; 0: halt at once
#   16  pauses after each write
#   24  after a first pass without pauses: 0 walk for ever, 1 halt (this first pass is at
#       CPL 0, and of a multiple of eight pages)

    .include "guest.inc"

    .equ    PARAMS,         0x1000
    .equ    APIC_SVR,       0xfee000f0
    .equ    APIC_ICR,       0xfee00300
    .equ    ICR_INIT,       0x000c4500      # to all but self
    .equ    ICR_STARTUP,    0x000c46f0      # at page 0xf0
    .equ    MSR_APIC_BASE,  0x1b
    .equ    MSR_EFER,       0xc0000080
    .equ    SEL_CODE32,     0x08
    .equ    SEL_DATA,       0x10
    .equ    SEL_CODE64,     0x18
    .equ    SEL_USER_DATA,  0x20 | 3
    .equ    SEL_USER_CODE,  0x28 | 3
    .equ    TABLE,          0x27            # present, writable, user, accessed
    .equ    LARGE_PAGE,     0xe7            # the same, dirty, 2 MiB

    .text
    .code16
    .globl  rom
rom:
    cli
    cld
    lgdtl   %cs:(gdtr - rom)
    mov     %cr0, %eax
    or      $1, %al
    mov     %eax, %cr0
    ljmpl   $SEL_CODE32, $start32

    .code32
start32:
    mov     $SEL_DATA, %eax
    mov     %eax, %ds
    mov     %eax, %es
    mov     %eax, %ss
    mov     $MSR_APIC_BASE, %ecx
    rdmsr
    test    $0x100, %eax                    # the first vCPU?
    jz      long_mode
    orl     $0x100, APIC_SVR
    movl    $ICR_INIT, APIC_ICR
    mov     $2, %edx                        # the second is for a vCPU that missed the first
wake:
    mov     $10000, %ecx
1:  dec     %ecx
    jnz     1b
    movl    $ICR_STARTUP, APIC_ICR
    dec     %edx
    jnz     wake

long_mode:
    mov     %cr4, %eax
    or      $0x20, %eax                     # PAE
    mov     %eax, %cr4
    mov     $pml4, %eax
    mov     %eax, %cr3
    mov     $MSR_EFER, %ecx
    rdmsr
    or      $0x100, %eax                    # LME
    wrmsr
    mov     %cr0, %eax
    or      $0x80000000, %eax               # PG
    mov     %eax, %cr0
    ljmp    $SEL_CODE64, $start64

    .code64
start64:
    mov     $1, %eax
    cpuid
    shr     $24, %ebx                       # APIC id
    shl     $5, %ebx
    mov     PARAMS(%rbx), %r12              # first page
    mov     PARAMS + 8(%rbx), %rbp          # pages
    mov     PARAMS + 16(%rbx), %r14         # pauses
    mov     PARAMS + 24(%rbx), %r15         # afterwards
    test    %rbp, %rbp
    jz      halt
    mov     $1 << PAGE_SHIFT, %esi
    xor     %r13d, %r13d
    test    %r15, %r15
    jz      to_user
    mov     %r12, %rdi
    mov     %rbp, %rcx
    shr     $3, %rcx
1:                                          # few instructions: nested KVM may emulate each of them
    .irp    page, 0, 1, 2, 3, 4, 5, 6, 7
    incq    (\page << PAGE_SHIFT)(%rdi)
    .endr
    add     $8 << PAGE_SHIFT, %rdi
    dec     %rcx
    jnz     1b
halt:
    hlt
    jmp     halt

to_user:
    mov     $SEL_USER_DATA, %eax
    mov     %eax, %ds
    mov     %eax, %es
    mov     $user_frame, %esp
    iretq

user:
    mov     %r12, %rdi
    mov     %rbp, %rcx
    WRITE_PAGES
    mov     %r14, %r13                      # pauses from the second pass on
    jmp     user

    .p2align 3
user_frame:
    .quad   user, SEL_USER_CODE, 0x3002, 0, SEL_USER_DATA    # IOPL 3, no interrupts

gdt:
    .quad   0
    .quad   0x00cf9b000000ffff              # 32-bit code
    .quad   0x00cf93000000ffff              # data
    .quad   0x00af9b000000ffff              # 64-bit code
    .quad   0x00cff3000000ffff              # data, CPL 3
    .quad   0x00affb000000ffff              # 64-bit code, CPL 3
gdtr:
    .word   . - gdt - 1
    .long   gdt

    .p2align 12
pml4:
    .quad   pdpt + TABLE
    .p2align 12
pdpt:
    .irp    number, 0, 1, 2, 3
    .quad   directories + (\number << 12) + TABLE
    .endr
    .p2align 12
directories:
    .set    address, 0
    .rept   4 * 512
    .quad   address + LARGE_PAGE
    .set    address, address + (2 << 20)
    .endr

    .org    0xfff0
    .code16
    jmp     rom
    .org    0x10000
