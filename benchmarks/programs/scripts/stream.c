// STREAM's four kernels (copy, scale, add, triad); rates are not printed, so that two runs are equal.
#include <stdio.h>
#include <stdlib.h>

enum { N = 2 << 20, ROUNDS = 10 };
static double a[N], b[N], c[N];

int main(void)
{
    for (long i = 0; i < N; i++)
        a[i] = 1.0 + i % 7, b[i] = 2.0, c[i] = 0.0;
    for (int round = 0; round < ROUNDS; round++) {
        for (long i = 0; i < N; i++) c[i] = a[i];
        for (long i = 0; i < N; i++) b[i] = 3.0 * c[i];
        for (long i = 0; i < N; i++) c[i] = a[i] + b[i];
        for (long i = 0; i < N; i++) a[i] = (b[i] + 3.0 * c[i]) / 15.0;
    }
    double sums[3] = {0};
    for (long i = 0; i < N; i++)
        sums[0] += a[i], sums[1] += b[i], sums[2] += c[i];
    printf("%.6f %.6f %.6f\n", sums[0], sums[1], sums[2]);
    return 0;
}
