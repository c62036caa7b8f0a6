// A thread writes to a page all the time while another one unmaps it: from then on it faults, at the right address, and
// nothing of what it wrote is in memory that is touched later.
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

#define PAGES 64

static volatile long *place;
static atomic_int writes, faults;
static void *seen;
static sigjmp_buf out;

static void on_fault(int number, siginfo_t *info, void *context)
{
    seen = info->si_addr;
    siglongjmp(out, 1);
}

static void *write_on(void *argument)
{
    if (sigsetjmp(out, 1) == 0) {
        for (;;) {
            (*place)++;
            atomic_store(&writes, 1);
        }
    }
    atomic_store(&faults, 1);
    return 0;
}

int main(void)
{
    struct sigaction action = {.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO};
    sigaction(SIGSEGV, &action, 0);
    int right = 0, changed = 0;
    for (int round = 0; round < 10; round++) {
        unsigned char *page = mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        unsigned char *other = mmap(0, PAGES * 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        place = (volatile long *)(page + 8 * round);
        atomic_store(&writes, 0);
        atomic_store(&faults, 0);
        pthread_t thread;
        pthread_create(&thread, 0, write_on, 0);
        while (!atomic_load(&writes))
            ;
        if (round % 2) {
            munmap(page, 4096);
        } else {
            mprotect(page, 4096, PROT_READ);        // and that it keeps its rights to nothing else
            long was = *place;
            for (int i = 0; i < 1000; i++)
                changed += *place != was;
        }
        memset(other, round, PAGES * 4096);
        pthread_join(thread, 0);
        for (int i = 0; i < PAGES * 4096; i++)
            changed += other[i] != round;
        right += seen == (void *)place;
        munmap(other, PAGES * 4096);
        if (round % 2 == 0)
            munmap(page, 4096);
    }
    printf("%d right, %d changed\n", right, changed);
    return 0;
}
