// Address spaces one after the other, on the same vCPUs, each with page tables of another shape.
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

enum { CHILDREN = 40, PLACES = 24, PAGE = 4096 };

static uint64_t state = 1;

static unsigned next(unsigned most)
{
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (state >> 33) % most;
}

// Among so many at each level: few, and the shapes are much alike; many, and no table is where one was before.
static int child(int number, unsigned many)
{
    volatile uint64_t *places[PLACES];
    int count = 0;
    for (int i = 0; i < PLACES; i++) {
        uintptr_t address = (uintptr_t)(2 + next(many)) << 39 | (uintptr_t)next(many) << 30 | (uintptr_t)next(many) << 21
                            | (uintptr_t)next(8) << 16;
        void *found = mmap((void *)address, 2 * PAGE, PROT_READ | PROT_WRITE,
                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
        if (found == MAP_FAILED)
            continue;
        places[count] = found;
        if (places[count][0] || places[count][PAGE / 8])
            return 1;
        places[count][0] = number << 8 | count;
        places[count][PAGE / 8] = ~(uint64_t)(number << 8 | count);
        count++;
    }
    for (int i = 0; i < count; i++)
        if (places[i][0] != (number << 8 | i) || places[i][PAGE / 8] != ~(uint64_t)(number << 8 | i))
            return 2;
    return 0;
}

int main(void)
{
    int wrong = 0;
    for (int i = 0; i < CHILDREN; i++) {
        state = i + 1;
        pid_t two[2];
        for (int j = 0; j < 1 + i % 2; j++)
            if (!(two[j] = fork()))
                _exit(child(2 * i + j, i < CHILDREN / 4 ? 3 : 60));
        for (int j = 0; j < 1 + i % 2; j++) {
            int status;
            waitpid(two[j], &status, 0);
            wrong += status != 0;
        }
    }
    printf("%d wrong\n", wrong);
    return 0;
}
