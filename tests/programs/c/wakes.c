// Futexes that are waited on and woken at the same time: a wake-up that is lost would be waited for without end. Words
// that lie at the same place of their pages, one that is mapped twice, waiters that are put on another queue, and calls
// that are refused.
#define _GNU_SOURCE
#include <errno.h>
#include <linux/futex.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

enum { TURNS = 3000, WAKES = 200, MOVES = 50, PAGE = 4096 };

static long futex(void *word, int operation, unsigned value, long timeout, void *second, unsigned third)
{
    return syscall(SYS_futex, word, operation, value, timeout, second, third);
}

// Whose turn it is goes to and fro: each sleeps until it is its own, at any moment of the other's wake-up.
struct pair {
    atomic_uint *turn[2];       // the same word, as each of the two has it mapped
    int private;
    long slept[2];
};

struct side {
    struct pair *pair;
    unsigned mine;
};

static void *take_turns(void *argument)
{
    struct side *side = argument;
    atomic_uint *turn = side->pair->turn[side->mine];
    for (int i = 0; i < TURNS; i++) {
        for (unsigned now; (now = atomic_load(turn)) != side->mine;)
            side->pair->slept[side->mine] += futex(turn, FUTEX_WAIT | side->pair->private, now, 0, 0, 0) == 0;
        atomic_store(turn, !side->mine);
        futex(turn, FUTEX_WAKE | side->pair->private, 1, 0, 0, 0);
    }
    return 0;
}

static void pairs(void)
{
    static char pages[2 * PAGE] __attribute__((aligned(4096)));
    struct pair of[2] = {{.private = FUTEX_PRIVATE_FLAG}, {.private = 0}};
    struct side sides[4];
    pthread_t threads[4];
    for (int i = 0; i < 4; i++) {
        of[i / 2].turn[i % 2] = (atomic_uint *)(pages + i / 2 * PAGE + 64);
        sides[i] = (struct side){&of[i / 2], i % 2};
        pthread_create(&threads[i], 0, take_turns, &sides[i]);
    }
    for (int i = 0; i < 4; i++)
        pthread_join(threads[i], 0);
    printf("two pairs: turns %u %u\n", *of[0].turn[0], *of[1].turn[0]);
}

static void processes(void)
{
    int file = memfd_create("word", 0);
    ftruncate(file, PAGE);
    struct pair pair = {.private = 0};
    for (int i = 0; i < 2; i++)
        pair.turn[i] = mmap(0, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0) + 1024;
    struct side sides[2] = {{&pair, 0}, {&pair, 1}};
    pid_t child = fork();
    take_turns(&sides[child == 0]);
    if (!child)
        _exit(0);
    waitpid(child, 0, 0);
    printf("two processes, one word mapped twice: %d, turn %u\n", pair.turn[0] != pair.turn[1], *pair.turn[0]);
}

static atomic_uint word, other, woken;

static void *wait_once(void *argument)
{
    while (futex(&word, FUTEX_WAIT, 0, 0, 0, 0))
        ;       // EINTR
    atomic_fetch_add(&woken, 1);
    return 0;
}

// The word stays what it is: only who is woken goes on.
static void wakes(void)
{
    long count = 0;
    for (int i = 0; i < WAKES; i++) {
        pthread_t thread;
        pthread_create(&thread, 0, wait_once, 0);
        long found;
        while (!(found = futex(&word, FUTEX_WAKE, 1, 0, 0, 0)))
            ;
        count += found;
        pthread_join(thread, 0);
    }
    printf("woken %ld, gone on %u\n", count, woken);
}

static void moves(void)
{
    long moved = 0, found = 0;
    for (int i = 0; i < MOVES; i++) {
        pthread_t threads[2];
        for (int at = 0; at < 2; at++)
            pthread_create(&threads[at], 0, wait_once, 0);
        for (long there = 0; there < 2; there += futex(&word, FUTEX_CMP_REQUEUE, 0, 2, &other, 0))
            ;
        moved += 2;
        // Whose wait is interrupted and taken up again (by a pause) is where it was at first, as after a signal.
        for (long before = found; found < before + 2;)
            found += futex(&other, FUTEX_WAKE, 1, 0, 0, 0) + futex(&word, FUTEX_WAKE, 1, 0, 0, 0);
        for (int at = 0; at < 2; at++)
            pthread_join(threads[at], 0);
    }
    printf("moved %ld, woken %ld\n", moved, found);
}

static void refused(void)
{
    char *gone = mmap(0, PAGE, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    char *fresh = mmap(0, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    munmap(gone, PAGE);
    char *places[] = {(char *)&word, (char *)&word + 1, fresh, gone, (char *)0xffff800000000000};
    int operations[] = {FUTEX_WAKE, FUTEX_WAKE_PRIVATE, FUTEX_WAKE_BITSET, FUTEX_WAKE | FUTEX_CLOCK_REALTIME};
    for (int at = 0; at < 5; at++)
        for (int how = 0; how < 4; how++) {
            if (at == 3 && how == 1)
                continue;       // it is not looked at: 0 there, and here EFAULT
            errno = 0;
            long result = futex(places[at], operations[how], 1, 0, 0, how == 2 ? 1 : 0);
            printf("%d %d: %ld %s\n", at, how, result, errno ? strerror(errno) : "");
        }
}

int main(void)
{
    setvbuf(stdout, 0, _IOLBF, 0);
    refused();
    wakes();
    pairs();
    processes();
    moves();
    return 0;
}
