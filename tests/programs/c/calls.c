// The same calls again and again.
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <unistd.h>

int main(void)
{
    char text[64];
    puts("ready");
    fflush(stdout);
    for (;;) {
        int file = open("/tmp/written", O_CREAT | O_RDWR | O_TRUNC, 0640);
        write(file, "hello\n", 6);
        lseek(file, 0, SEEK_SET);
        read(file, text, sizeof(text));
        close(file);
        open("/nowhere/at all", O_RDONLY);
        close(77);
        usleep(10000);
    }
}
