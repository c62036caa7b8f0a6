/* A program that checks itself, for tests that disturb it: MODE is what its thread does, "thread-MODE" the same in a
 * second thread while the first waits in epoll. For each line of standard input it answers "ok", or what is wrong. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <immintrin.h>
#include <linux/futex.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/rseq.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static const char *mode, *wrong;
static int word, set;
static sigset_t mask;
static char signal_stack[1 << 16];

static void bad(const char *what) { if (!wrong) wrong = what; }

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}

static void answer(void)
{
    char line[64];
    sigset_t blocked;
    stack_t stack;
    pthread_sigmask(SIG_SETMASK, NULL, &blocked);
    if (memcmp(&blocked, &mask, 8))
        bad("other signals are blocked");
    sigaltstack(NULL, &stack);
    if (stack.ss_sp != signal_stack || stack.ss_size != sizeof signal_stack)
        bad("another signal stack");
    if ((_mm_getcsr() & ~0x3fu) != 0x3f80)
        bad("another rounding mode");
    ssize_t got = read(0, line, sizeof line);
    if (got == 0)
        exit(0);
    if (got > 0)
        dprintf(1, "%s\n", wrong ? wrong : "ok");
}

/* Every register that a compiler leaves free, over many instructions. */
static uint64_t compute(uint64_t seed)
{
    uint64_t sum = 0, rounds = 200000;
    uint64_t r[8] = {seed, 2, 3, 5, 7, 11, 13, 17};
    double v[4] = {1, 2, 3, 4}, w[4];
    __asm__ volatile(
        "vmovupd (%[v]), %%ymm7\n"
        "vmovapd %%ymm7, %%ymm13\n"
        "mov (%[r]), %%r8\n mov 8(%[r]), %%r9\n mov 16(%[r]), %%r10\n mov 24(%[r]), %%r11\n"
        "mov 32(%[r]), %%r12\n mov 40(%[r]), %%r13\n mov 48(%[r]), %%r14\n mov 56(%[r]), %%rcx\n"
        "1: add %%r9, %%r8\n rol $7, %%r8\n xor %%r10, %%r8\n add %%r8, %%r11\n rol $13, %%r11\n"
        "xor %%r11, %%r12\n add %%r12, %%r13\n xor %%r13, %%r14\n rol $3, %%r14\n add %%r14, %%rcx\n"
        "xor %%rcx, %%rax\n add %%r8, %%rax\n"
        /* what lies below the stack pointer is this function's */
        "mov %%rax, -8(%%rsp)\n mov %%rcx, -128(%%rsp)\n"
        "vaddpd %%ymm13, %%ymm7, %%ymm7\n"
        "xor -8(%%rsp), %%rax\n jnz 2f\n mov -8(%%rsp), %%rax\n"
        "cmp -128(%%rsp), %%rcx\n jne 2f\n"
        "dec %[n]\n jnz 1b\n jmp 3f\n"
        "2: mov $1, %%rax\n"
        "3: vmovupd %%ymm7, (%[w])\n"
        : "+a"(sum), [n] "+d"(rounds)
        : [r] "S"(r), [v] "D"(v), [w] "b"(w)
        : "r8", "r9", "r10", "r11", "r12", "r13", "r14", "rcx", "xmm7", "xmm13", "memory", "cc");
    for (int i = 0; i < 4; i++)
        if (w[i] != v[i] * 200001)
            bad("vector registers changed");
    return sum;
}

static volatile unsigned long signals;

static void handler(int number)
{
    (void)number;
    signals++;
}

/* A signal every 300 us. */
static void signal_often(void)
{
    struct sigaction action = {.sa_handler = handler, .sa_flags = SA_RESTART};
    struct itimerval every = {{0, 300}, {0, 300}};
    sigaction(SIGALRM, &action, NULL);
    setitimer(ITIMER_REAL, &every, NULL);
}

/* A restartable sequence of some 100 us. Whoever moves the thread elsewhere within it has the kernel forget it (it takes
 * the pointer back), and the thread would go on in it all the same. */
static void sequence(void)
{
    uint64_t *current = (uint64_t *)((char *)__builtin_thread_pointer() + __rseq_offset + 8);
    int gone = 0;
    __asm__ volatile(
        ".pushsection sequences, \"aw\"\n .balign 32\n 9: .long 0, 0\n .quad 1f, 2f - 1f, 4f\n .popsection\n"
        "leaq 9b(%%rip), %%rax\n movq %%rax, (%[current])\n"
        "1: movl $200000, %%ecx\n 5: decl %%ecx\n jnz 5b\n cmpq %%rax, (%[current])\n jne 6f\n 2: jmp 3f\n"
        ".byte 0x0f, 0xb9, 0x3d\n .long 0x53053053\n 4: jmp 3f\n"   /* the kernel comes here when it is preempted */
        "6: movl $1, %[gone]\n 3: movq $0, (%[current])\n"
        : [gone] "+r"(gone) : [current] "r"(current) : "rax", "rcx", "memory", "cc");
    if (gone)
        bad("it was moved on within a restartable sequence");
}

static void wait_for_input(int timeout)
{
    struct pollfd in = {0, POLLIN, 0};
    if (poll(&in, 1, timeout) == 1)
        answer();
}

static void *work(void *unused)
{
    (void)unused;
    stack_t stack = {.ss_sp = signal_stack, .ss_size = sizeof signal_stack};
    sigaltstack(&stack, NULL);
    sigemptyset(&mask);
    sigaddset(&mask, SIGUSR2);
    sigaddset(&mask, SIGWINCH);
    pthread_sigmask(SIG_SETMASK, &mask, NULL);
    _mm_setcsr(0x3f80);
    uint64_t known = compute(1);
    dprintf(1, "ready\n");
    if (!strcmp(mode, "signals"))
        signal_often();
    if (!strcmp(mode, "compute") || !strcmp(mode, "signals"))
        for (;;) {
            unsigned long before = signals;
            for (int i = 0; i < 10; i++)
                if (compute(1) != known)
                    bad("computed wrongly");
            if (signals == before && !strcmp(mode, "signals"))
                bad("no signals come");
            wait_for_input(0);
        }
    if (!strcmp(mode, "sequence"))
        for (;;) {
            for (int i = 0; i < 20; i++) {
                sequence();
                for (volatile int j = 0; j < 100000; j++)
                    ;
            }
            wait_for_input(0);
        }
    if (!strcmp(mode, "poll"))
        for (;;)
            wait_for_input(-1);
    if (!strcmp(mode, "epoll")) {
        struct epoll_event event = {.events = EPOLLIN};
        epoll_ctl(set, EPOLL_CTL_ADD, 0, &event);
        for (;;)
            if (epoll_wait(set, &event, 1, -1) == 1)
                answer();
    }
    if (!strcmp(mode, "sleep"))
        for (;;) {
            struct timespec length = {0, 30000000}, rest = {0, 0};
            double began = now();
            int failed = nanosleep(&length, &rest);
            if (failed && errno != EINTR)
                bad("the sleep failed");
            if (now() - began + (failed ? rest.tv_nsec / 1e9 : 0) < 0.0299)
                bad("slept too short");
            wait_for_input(0);
        }
    if (!strcmp(mode, "futex"))
        for (;;) {
            syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, 0, NULL, NULL, 0);
            if (__atomic_exchange_n(&word, 0, __ATOMIC_SEQ_CST))
                answer();
        }
    bad("no such mode");
    answer();
    return NULL;
}

/* Waits in epoll, and wakes who waits in a futex. */
static _Noreturn void *attend(void *unused)
{
    (void)unused;
    struct epoll_event event = {.events = EPOLLIN | EPOLLET};
    if (!strcmp(mode, "futex"))
        epoll_ctl(set, EPOLL_CTL_ADD, 0, &event);
    for (;;)
        if (epoll_wait(set, &event, 1, -1) == 1) {
            __atomic_store_n(&word, 1, __ATOMIC_SEQ_CST);
            syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0);
        }
}

int main(int argc, char **argv)
{
    pthread_t other;
    int second = argc > 1 && !strncmp(argv[1], "thread-", 7);
    mode = argc > 1 ? argv[1] + (second ? 7 : 0) : "";
    set = epoll_create1(0);
    if (second) {
        pthread_create(&other, NULL, work, NULL);
        attend(NULL);
    }
    if (!strcmp(mode, "futex"))
        pthread_create(&other, NULL, attend, NULL);
    work(NULL);
}
