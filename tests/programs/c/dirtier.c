// Threads with names, each of which writes to so many pages of its own again and again: heap, stack, anonymous, a file;
// and to some always the same. It says where they are.
#define _GNU_SOURCE
#include <alloca.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <sys/mman.h>
#include <unistd.h>

#define PAGE 4096L

struct work {
    const char *name;
    long pages;
    int step;
    volatile char *at;
};

static void *dirty(void *given)
{
    struct work *work = given;
    pthread_setname_np(pthread_self(), work->name);
    for (char value = 1; work->pages; value += work->step) {
        for (long page = 0; page < work->pages; page++)
            work->at[page * PAGE] = value;
        usleep(20000);
    }
    for (;;)
        pause();
}

int main(void)
{
    int file = open("/tmp/dirtied", O_CREAT | O_RDWR, 0600);
    struct work work[] = {{"heap", 40, 1}, {"anonymous", 300, 1}, {"file", 20, 1}, {"idle"}, {"same", 50}, {"stack", 100, 1}};
    pthread_t thread;
    ftruncate(file, 20 * PAGE);
    work[0].at = sbrk(41 * PAGE);
    work[0].at += -(long)work[0].at & (PAGE - 1);
    work[1].at = mmap(0, 300 * PAGE, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    work[2].at = mmap(0, 20 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    work[4].at = mmap(0, 50 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    work[5].at = alloca(100 * PAGE);
    for (int i = 0; i < 6; i++)
        printf("%s %lx %ld\n", work[i].name, (unsigned long)work[i].at, work[i].pages);
    fflush(stdout);
    for (int i = 0; i < 5; i++)
        pthread_create(&thread, 0, dirty, &work[i]);
    dirty(&work[5]);
}
