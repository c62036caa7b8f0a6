// Threads: creation, mutexes, condition variables, thread-local storage, atomics between vCPU processes.
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t turned = PTHREAD_COND_INITIALIZER;
static pthread_barrier_t barrier;
static long locked, turn;
static atomic_long atomic;
static __thread long mine;

static void *work(void *argument)
{
    long id = (long)argument;
    pthread_barrier_wait(&barrier);
    for (int i = 0; i < 20000; i++) {
        pthread_mutex_lock(&mutex);
        locked++;
        mine++;
        pthread_mutex_unlock(&mutex);
        atomic_fetch_add(&atomic, 1);
    }
    for (int i = 0; i < 100; i++) {
        pthread_mutex_lock(&mutex);
        while (turn != id)
            pthread_cond_wait(&turned, &mutex);
        turn = (turn + 1) % 3;
        pthread_cond_broadcast(&turned);
        pthread_mutex_unlock(&mutex);
    }
    return (void *)mine;
}

int main(void)
{
    for (int round = 0; round < 3; round++) {
        pthread_t threads[3];
        pthread_barrier_init(&barrier, 0, 3);
        for (long i = 0; i < 3; i++)
            if (pthread_create(&threads[i], 0, work, (void *)i))
                return 1;
        for (int i = 0; i < 3; i++) {
            void *result;
            pthread_join(threads[i], &result);
            printf("%ld\n", (long)result);
        }
        printf("round %d: %ld %ld\n", round, locked, (long)atomic);
    }
    return 0;
}
