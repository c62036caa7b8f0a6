// Much memory that is touched and given back, again and again: the system clears it.
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

int main(void)
{
    long size = 40L << 20;
    for (int i = 1; i < 7; i++) {
        char *memory = mmap(0, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        memset(memory, i, size);
        int found = memory[size / 2];
        printf("%d %d\n", found, munmap(memory, size));
    }
    return 0;
}
