// An instruction that not every processor has, unasked.
#include <immintrin.h>
#include <stdio.h>

int main(void)
{
    volatile float numbers[8] = {1, 2, 3, 4, 5, 6, 7, 8};
    __m256 all = _mm256_loadu_ps((const float *)numbers);
    _mm256_storeu_ps((float *)numbers, _mm256_add_ps(all, all));
    printf("%g\n", numbers[7]);
    return 0;
}
