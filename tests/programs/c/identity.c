// Descriptors that parent and child share, owners with large numbers, what arch_prctl(2) says.
#define _GNU_SOURCE
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

static int child(void *argument)
{
    close(9);
    return 3;
}

int main(void)
{
    char *stack = malloc(65536);
    struct stat found;
    unsigned long fs = 0;
    int status;

    dup2(1, 9);
    pid_t pid = clone(child, stack + 65536, CLONE_FILES | SIGCHLD, 0);
    waitpid(pid, &status, 0);
    printf("%d, closed there and here %d\n", WEXITSTATUS(status), lseek(9, 0, SEEK_CUR) == -1);
    syscall(SYS_arch_prctl, 0x1003, &fs);
    printf("fs %d\n", fs != 0);
    fclose(fopen("/tmp/owned", "w"));
    printf("%d", chown("/tmp/owned", 3000000000u, 4000000000u));
    stat("/tmp/owned", &found);
    printf(" %u %u\n", found.st_uid, found.st_gid);
    return 0;
}
