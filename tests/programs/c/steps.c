// Computes with integers and with floating-point numbers in two threads and a child, and says how far it is.
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

#define WORDS (1 << 18)

static unsigned words[WORDS];
static double sums[2];
static pthread_barrier_t barrier;
static int steps;

static void *compute(void *argument)
{
    long half = (long)argument;
    for (int step = 0; step < steps; step++) {
        for (int i = half * WORDS / 2; i < (half + 1) * WORDS / 2; i += 31) {
            words[i] = words[i] * 1664525 + 1013904223 + step;
            sums[half] += 1.0 / (1 + words[i] % 1000);
        }
        pthread_barrier_wait(&barrier);
        if (half == 0) {
            printf("step %d\n", step);
            fflush(stdout);
            usleep(15000);
        }
    }
    return 0;
}

int main(int count, char **arguments)
{
    steps = atoi(arguments[1]);
    pthread_t threads[2];
    pthread_barrier_init(&barrier, 0, 2);
    for (long i = 0; i < 2; i++)
        pthread_create(&threads[i], 0, compute, (void *)i);
    for (int i = 0; i < 2; i++)
        pthread_join(threads[i], 0);
    unsigned sum = 0;
    for (int i = 0; i < WORDS; i++)
        sum = sum * 31 + words[i];
    if (fork() == 0)
        exit(sum % 200);
    int status;
    wait(&status);
    printf("%u %.17g %.17g %d\n", sum, sums[0], sums[1], WEXITSTATUS(status));
    return 3;
}
