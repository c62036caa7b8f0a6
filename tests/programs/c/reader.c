// Has the system write into its memory all the time, and writes itself too: into other pages.
#include <stdio.h>
#include <string.h>
#include <unistd.h>
#include <fcntl.h>

enum { PAGES = 256, PAGE = 4096 };
static char read_into[PAGES][PAGE] __attribute__((aligned(4096)));
static char written[PAGES][PAGE] __attribute__((aligned(4096)));

int main(void)
{
    int file = open("/tmp/numbers", O_RDWR | O_CREAT, 0600);
    puts("begun");
    fflush(stdout);
    for (long i = 1;; i++) {
        int page = i % PAGES;
        pwrite(file, &i, sizeof i, 0);
        pread(file, read_into[page], sizeof i, 0);
        memcpy(written[page], &i, sizeof i);
    }
}
