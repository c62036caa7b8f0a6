// One program, run natively and in a machine: what a thread of it does takes how long. Prints "name nanoseconds".
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/futex.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static uint64_t now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1000000000ull + time.tv_nsec;
}

static int compare(const void *a, const void *b)
{
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return x < y ? -1 : x > y;
}

static uint64_t values[100000];

static void say(const char *name, int count)
{
    qsort(values, count, sizeof *values, compare);
    printf("%s %lu\n", name, values[count / 2]);
    fflush(stdout);
}

#define MEASURE(name, count, call)                  \
    do {                                            \
        for (int i = 0; i < (count); i++) {         \
            uint64_t began = now();                 \
            call;                                   \
            values[i] = now() - began;              \
        }                                           \
        say(name, count);                           \
    } while (0)

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t turned = PTHREAD_COND_INITIALIZER;
static int turn, rounds;

static void *take_turns(void *argument)
{
    int mine = argument != 0;
    uint64_t before = now();
    for (int i = 0; i < rounds; i++) {
        pthread_mutex_lock(&mutex);
        while (turn != mine)
            pthread_cond_wait(&turned, &mutex);
        turn = !mine;
        pthread_cond_signal(&turned);
        pthread_mutex_unlock(&mutex);
        if (mine) {     // once there and back
            uint64_t after = now();
            values[i] = (after - before) / 2;
            before = after;
        }
    }
    return 0;
}

static void *nothing(void *argument) { return argument; }

int main(int argc, char **argv)
{
    int scale = argc > 1 ? atoi(argv[1]) : 10;
    int calls = 200 * scale;
    static char buffer[65536];
    static int word;

    // Code without system calls: a triad over arrays beyond the caches, random updates, arithmetic.
    size_t size = 4 << 20;
    double *a = malloc(size * 8), *b = malloc(size * 8), *c = malloc(size * 8);
    for (size_t i = 0; i < size; i++)
        a[i] = b[i] = c[i] = i;
    MEASURE("triad", scale, for (size_t j = 0; j < size; j++) a[j] = b[j] + 3.0 * c[j]);
    uint64_t *table = (uint64_t *)a, random = 88172645463325252ull;
    MEASURE("updates", scale, for (int j = 0; j < 2000000; j++) {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        table[random & (size - 1)] ^= random;
    });
    volatile double sum = 0;
    MEASURE("arithmetic", scale, for (int j = 0; j < 10000000; j++) sum += j * 0.5);

    MEASURE("clock", calls, now());
    MEASURE("futex_wake", calls, syscall(SYS_futex, &word, FUTEX_WAKE, 1, 0, 0, 0));
    MEASURE("getppid", calls, syscall(SYS_getppid));
    int file = open("/tmp/benchmark", O_RDWR | O_CREAT | O_TRUNC, 0600);
    write(file, buffer, sizeof buffer);
    MEASURE("read_4k", calls, pread(file, buffer, 4096, 0));
    MEASURE("write_4k", calls, pwrite(file, buffer, 4096, 0));

    rounds = 50 * scale;
    pthread_t one, two;
    pthread_create(&one, 0, take_turns, 0);
    pthread_create(&two, 0, take_turns, &word);
    pthread_join(one, 0);
    pthread_join(two, 0);
    say("hand_over", rounds);
    MEASURE("thread", 2 * scale, {
        pthread_t thread;
        pthread_create(&thread, 0, nothing, 0);
        pthread_join(thread, 0);
    });
    MEASURE("fork", scale, {
        pid_t child = fork();
        if (!child)
            _exit(0);
        waitpid(child, 0, 0);
    });
    size_t bytes = 16 << 20;
    MEASURE("first_touch_page", scale, {
        char *memory = mmap(0, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        for (size_t at = 0; at < bytes; at += 4096)
            memory[at] = 1;
        munmap(memory, bytes);
    });
    return 0;
}
