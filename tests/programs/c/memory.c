// Memory: fork and copy on write, shared mappings, protection, files that are mapped, mremap, reservations.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <setjmp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#define PAGES 300
#define SIZE (PAGES * 4096L)
static sigjmp_buf back;

static void jump(int number) { siglongjmp(back, number); }

static unsigned long sum(const unsigned char *from, long size)
{
    unsigned long found = 5381;
    for (long i = 0; i < size; i++)
        found = found * 33 + from[i];
    return found;
}

static int faults(volatile char *at, int write)
{
    int number = sigsetjmp(back, 1);
    if (!number) {
        if (write)
            *at = 1;
        else
            (void)*at;
    }
    return number;
}

int main(void)
{
    signal(SIGSEGV, jump);
    signal(SIGBUS, jump);
    unsigned char *own = mmap(0, SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    unsigned char *shared = mmap(0, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    for (long i = 0; i < SIZE; i++)
        own[i] = i * 7;
    int status;
    for (int round = 0; round < 3; round++) {
        pid_t child = fork();
        if (!child) {
            for (long i = 0; i < SIZE; i += 4096)
                own[i] += 1 + round;
            shared[round] = 100 + round;
            pid_t grandchild = fork();
            if (!grandchild) {
                own[5] = 9;
                _exit(sum(own, SIZE) % 251);
            }
            waitpid(grandchild, &status, 0);
            printf("grandchild %d\n", WEXITSTATUS(status));
            fflush(stdout);
            _exit(sum(own, SIZE) % 241);
        }
        for (long i = 1; i < SIZE; i += 8192)
            own[i] += 3;
        waitpid(child, &status, 0);
        printf("round %d: child %d, here %lu, shared %d\n", round, WEXITSTATUS(status), sum(own, SIZE), shared[round]);
        fflush(stdout);
    }
    mprotect(own, 8192, PROT_READ);
    printf("read only: %d %d %d\n", faults((char *)own, 0), faults((char *)own, 1), faults((char *)own + 8192, 1));
    mprotect(own, 4096, PROT_NONE);
    printf("none: %d\n", faults((char *)own, 0));
    mprotect(own, 8192, PROT_READ | PROT_WRITE);
    printf("back: %d %d\n", faults((char *)own, 1), own[1]);
    munmap(own + 4096, 4096);
    printf("hole: %d\n", faults((char *)own + 4096, 0));
    own = mremap(own + 8192, SIZE - 8192, 2 * SIZE, MREMAP_MAYMOVE);
    printf("moved: %lu %d\n", sum(own, SIZE - 8192), own[2 * SIZE - 1]);
    madvise(own, 4096 * 10, MADV_DONTNEED);
    printf("unneeded: %d %d\n", own[4096 * 9], own[4096 * 10]);

    char *reserved = mmap(0, 4L << 30, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    printf("reserved: %d, %d\n", reserved != MAP_FAILED, faults(reserved, 0));
    mprotect(reserved + (1L << 30), 4096, PROT_READ | PROT_WRITE);
    reserved[1L << 30] = 5;
    printf("used: %d\n", reserved[1L << 30]);
    errno = 0;
    printf("too much: %d %s\n", mmap(0, 1L << 46, 3, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) == MAP_FAILED, strerror(errno));

    int file = open("/tmp/mapped", O_RDWR | O_CREAT | O_TRUNC, 0600);
    char text[5000];
    memset(text, 'a', sizeof text);
    write(file, text, sizeof text);
    char *one = mmap(0, 12288, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    char *two = mmap(0, 12288, PROT_READ | PROT_WRITE, MAP_PRIVATE, file, 0);
    printf("file: %c %c %d\n", one[0], two[4999], one[5000]);
    two[1] = 'p';
    one[0] = 's';
    pread(file, text, 2, 0);
    printf("written: %c%c %c%c\n", text[0], text[1], one[1], two[1]);
    printf("beyond: %d\n", faults(one + 8192, 0));
    pwrite(file, "w", 1, 4000);
    printf("seen: %c\n", one[4000]);

    char *heap = sbrk(0);
    sbrk(1 << 20);
    memset(heap, 3, 1 << 20);
    sbrk(-(1 << 20));
    printf("heap: %d\n", faults(heap + (1 << 19), 0));
    void *(*code)(void) = mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    memcpy(code, "\xb8\x2a\0\0\0\xc3", 6);
    mprotect(code, 4096, PROT_READ | PROT_EXEC);
    printf("code: %d\n", ((int (*)(void))code)());

    // What is asked of the system about it.
    own = mmap(0, 3 * 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    own[0] = 1, own[4096] = 2, own[8192] = 3;
    printf("at fork: %d %d\n", madvise(own, 4096, MADV_WIPEONFORK), madvise(own + 8192, 4096, MADV_DONTFORK));
    fflush(stdout);
    pid_t child = fork();
    if (!child) {
        printf("a child has %d %d, without %d\n", own[0], own[4096], faults((char *)own + 8192, 0));
        own[0] = 7;
        fflush(stdout);
        if (!(child = fork()))
            printf("and its own %d\n", own[0]), exit(0);
        waitpid(child, 0, 0);
        exit(0);
    }
    waitpid(child, 0, 0);
    printf("here it is %d %d %d\n", own[0], own[4096], own[8192]);
    printf("removed: %d", madvise(one, 4096, MADV_REMOVE));
    pread(file, text, 2, 0);
    printf(" %d %d\n", text[0], one[0]);
    int reading = open("/tmp/mapped", O_RDONLY);
    char *read_only = mmap(0, 8192, PROT_READ, MAP_SHARED, reading, 0);
    errno = 0;
    printf("writable: %d", mprotect(read_only + 4096, 4096, PROT_READ | PROT_WRITE));
    printf(" %s\n", strerror(errno));
    return 0;
}
