// What a system call leaves of a thread: all registers but rax, rcx and r11, its flags and the red zone, while signals
// come and go. Each signal is handled once, and a call that one has come before is not lost.
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <unistd.h>

enum { CALLS = 5000, SIGNALS = 300 };

static _Thread_local long handled;
static atomic_long taken, alarms, wrong;
static atomic_int over;

static void handle(int number)
{
    int error = errno;
    handled++;
    syscall(SYS_getppid);       // a call of its own, in the middle of another's way
    atomic_fetch_add(number == SIGUSR1 ? &taken : &alarms, 1);
    errno = error;
}

// In: rdi what the registers hold, rsi the number of the call, rdx where to put them behind it (18 words).
void one_call(uint64_t seed, long number, uint64_t *found);
__asm__(
    ".globl one_call\n"
    "one_call:\n"
    "  push %rbx; push %rbp; push %r12; push %r13; push %r14; push %r15; push %rdx\n"
    "  lea 1(%rdi), %rbx; lea 2(%rdi), %rbp; lea 3(%rdi), %r8; lea 4(%rdi), %r9; lea 5(%rdi), %r10\n"
    "  lea 6(%rdi), %r12; lea 7(%rdi), %r13; lea 8(%rdi), %r14; lea 9(%rdi), %r15\n"
    "  mov %rdi, -8(%rsp); mov %rdi, -128(%rsp)\n"      // the red zone
    "  mov %rsi, %rax; lea 10(%rdi), %rdx; lea 11(%rdi), %rsi\n"
    "  movd %rdi, %xmm7\n"
    "  mov $0x7fffffff, %r11d; add $1, %r11d; std\n"    // overflow, sign, adjust, parity; direction
    "  syscall\n"
    "1: mov %rax, -16(%rsp)\n"                          // flags: without a push, which would hit the red zone
    "  mov (%rsp), %rax\n"
    "  mov %rbx, 8(%rax); mov %rbp, 16(%rax); mov %r8, 24(%rax); mov %r9, 32(%rax); mov %r10, 40(%rax)\n"
    "  mov %r12, 48(%rax); mov %r13, 56(%rax); mov %r14, 64(%rax); mov %r15, 72(%rax); mov %rdx, 80(%rax)\n"
    "  mov %rsi, 88(%rax); mov %rdi, 0(%rax)\n"
    "  mov -8(%rsp), %rbx; mov %rbx, 96(%rax); mov -128(%rsp), %rbx; mov %rbx, 104(%rax)\n"
    "  mov -16(%rsp), %rbx; mov %rbx, 112(%rax); movq %xmm7, %rbx; mov %rbx, 120(%rax)\n"
    "  mov %rsp, %rbx; lea -256(%rsp), %rsp; pushf; pop %rbp; mov %rbx, %rsp; mov %rbp, 128(%rax)\n"
    "  lea 1b(%rip), %rbx; sub %rcx, %rbx; mov %rbx, 136(%rax)\n"   // rcx: where it has gone on
    "  cld; pop %rdx; pop %r15; pop %r14; pop %r13; pop %r12; pop %rbp; pop %rbx; ret\n");

static void *calls(void *argument)
{
    uint64_t found[18];
    for (long i = 0; i < CALLS || !over; i++) {
        uint64_t seed = 0x123456789abull * (i + 1) | 0x80000000;      // no descriptor
        long number = i & 1 ? SYS_getppid : SYS_close;
        one_call(seed, number, found);
        int bad = found[0] != seed;
        for (int at = 1; at < 10; at++)
            bad |= found[at] != seed + at;
        bad |= found[10] != seed + 10 || found[11] != seed + 11 || found[12] != seed || found[13] != seed;
        bad |= found[14] != (i & 1 ? (uint64_t)getppid() : (uint64_t)-EBADF) || found[15] != seed;
        bad |= (found[16] & 0xcd5) != 0xc94;            // OF DF SF AF PF
        if (bad || found[17])
            atomic_fetch_add(&wrong, 1);
    }
    return 0;
}

int main(void)
{
    struct sigaction action = {.sa_handler = handle, .sa_flags = SA_RESTART};
    sigaction(SIGUSR1, &action, 0);
    sigaction(SIGALRM, &action, 0);
    pthread_t thread;
    pthread_create(&thread, 0, calls, 0);
    struct itimerval often = {{0, 1000}, {0, 1000}}, never = {{0, 0}, {0, 0}};
    setitimer(ITIMER_REAL, &often, 0);
    for (int i = 0; i < SIGNALS; i++) {
        long before = taken;
        pthread_kill(thread, SIGUSR1);
        while (taken == before)
            sched_yield();
    }
    setitimer(ITIMER_REAL, &never, 0);
    over = 1;
    pthread_join(thread, 0);
    printf("%ld signals, %ld wrong, alarms: %d\n", (long)taken, (long)wrong, alarms > 0);
    return 0;
}
