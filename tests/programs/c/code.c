// Code that changes: by another thread, by itself, by a system call, behind mprotect, in a mapping made anew.
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

typedef int (*function)(void);
static unsigned char *memory;
static atomic_int turn;
static int wrong, expected;

static void put(unsigned char *at, int value)       // mov $value, %eax; ret
{
    unsigned char code[] = {0xB8, value, 0, 0, 0, 0xC3};
    memcpy(at, code, sizeof code);
}

static void *run(void *argument)
{
    for (int i = 1; i <= 40; i++) {
        while (atomic_load(&turn) != 2 * i - 1)
            ;
        wrong += ((function)memory)() != expected;
        atomic_store(&turn, 2 * i);
    }
    return 0;
}

int main(void)
{
    memory = mmap(0, 8192, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    unsigned char *page = memory + 4096;
    pthread_t thread;
    pthread_create(&thread, 0, run, 0);
    for (int i = 1; i <= 40; i++) {
        if (i % 10)
            put(memory, expected = i);
        else if (fork() == 0)       // until it is written to, the page cannot be written to
            _exit(0);
        else
            wait(0);
        atomic_store(&turn, 2 * i - 1);
        while (atomic_load(&turn) != 2 * i)
            ;
    }
    pthread_join(thread, 0);
    printf("by a thread: %d wrong\n", wrong);

    wrong = 0;
    for (int i = 0; i < 20; i++) {
        put(memory + 64, i);
        wrong += ((function)(memory + 64))() != i;
    }
    printf("by itself: %d wrong\n", wrong);

    int ends[2];
    wrong = pipe(ends);
    for (int i = 0; i < 20; i++) {
        unsigned char code[8];
        put(code, i);
        write(ends[1], code, 6);
        read(ends[0], memory + 128, 6);
        wrong += ((function)(memory + 128))() != i;
    }
    printf("by a call: %d wrong\n", wrong);

    wrong = 0;
    for (int i = 0; i < 20; i++) {
        mprotect(page, 4096, PROT_READ | PROT_WRITE);
        put(page, i);
        mprotect(page, 4096, PROT_READ | PROT_EXEC);
        wrong += ((function)page)() != i;
        mprotect(page, 4096, PROT_READ | PROT_WRITE | PROT_EXEC);
        put(page, i + 1);
        wrong += ((function)page)() != i + 1;
    }
    printf("with other rights: %d wrong\n", wrong);

    wrong = 0;
    for (int i = 0; i < 20; i++) {
        unsigned char *fresh = mmap(0, 4096, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        put(fresh, i);
        wrong += ((function)fresh)() != i;
        munmap(fresh, 4096);
    }
    printf("anew: %d wrong\n", wrong);
    return 0;
}
