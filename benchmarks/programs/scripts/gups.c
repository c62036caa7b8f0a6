// Random updates of a table (HPCC RandomAccess), atomic ones by two threads: applied twice, they leave it as it was.
#include <omp.h>
#include <stdint.h>
#include <stdio.h>

enum { BITS = 20 };       // 8 MiB: each vCPU dirties fewer pages than its ring has entries
static uint64_t table[1 << BITS];

static void update(int rounds)
{
    #pragma omp parallel num_threads(2)
    {
        uint64_t x = 0x123456789abcdefULL * (omp_get_thread_num() + 1);
        for (long i = 0; i < (long)rounds << BITS; i++) {
            x = x << 1 ^ (x >> 63 ? 7 : 0);
            __atomic_fetch_xor(&table[x >> (64 - BITS)], x, __ATOMIC_RELAXED);
        }
    }
}

int main(void)
{
    for (uint64_t i = 0; i < 1 << BITS; i++)
        table[i] = i;
    update(8);
    uint64_t sum = 0, wrong = 0;
    for (uint64_t i = 0; i < 1 << BITS; i++)
        sum += table[i] * (i | 1);
    update(8);
    for (uint64_t i = 0; i < 1 << BITS; i++)
        wrong += table[i] != i;
    printf("%016lx, %lu wrong\n", sum, wrong);
    return wrong != 0;
}
