// prctl(2) and how threads are scheduled: what is kept, what children have of it, who gets orphans, who hears of a parent's end.
#define _GNU_SOURCE
#include <errno.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

static void said(const char *what, long result)
{
    printf("%s: %ld %s\n", what, result, result < 0 ? strerrorname_np(errno) : "");
    errno = 0;
}

static void all(const char *whose)
{
    int number = -1, reaper = -1;
    prctl(PR_GET_PDEATHSIG, &number), prctl(PR_GET_CHILD_SUBREAPER, &reaper);
    printf("%s %d %d, %d %d %d %d\n", whose, number, reaper, prctl(PR_GET_DUMPABLE), prctl(PR_GET_KEEPCAPS),
           prctl(PR_GET_TIMERSLACK), prctl(PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0));
    fflush(stdout);
}

static void scheduled(void)
{
    struct sched_param wanted = {0}, found = {-1};
    for (int policy = -1; policy < 8; policy++)
        for (wanted.sched_priority = -1; wanted.sched_priority <= 100; wanted.sched_priority += 50) {
            int result = sched_setscheduler(0, policy, &wanted);
            sched_getparam(0, &found);
            printf("%d %d: %d %s, %d %d\n", policy, wanted.sched_priority, result,
                   result < 0 ? strerrorname_np(errno) : "", sched_getscheduler(0), found.sched_priority);
        }
    wanted.sched_priority = 7;
    said("first in", sched_setscheduler(0, SCHED_FIFO | SCHED_RESET_ON_FORK, &wanted));
    wanted.sched_priority = 9;
    said("more", sched_setparam(0, &wanted));
    fflush(stdout);
    if (!fork()) {
        sched_getparam(0, &found);
        printf("a child %d %d\n", sched_getscheduler(0), found.sched_priority);
        exit(0);
    }
    wait(0);
    said("is", sched_getscheduler(0));
    said("of nobody", sched_getscheduler(99999));
    said("below nobody", sched_getscheduler(-1));
    said("none", sched_setparam(0, 0));
    wanted.sched_priority = 0;
    said("usual", sched_setscheduler(0, SCHED_OTHER, &wanted));
    cpu_set_t none;
    CPU_ZERO(&none);
    said("no processor", sched_setaffinity(0, sizeof none, &none));
    said("nobody's", sched_getaffinity(99999, sizeof none, &none));
    if (setuid(7))
        return;
    wanted.sched_priority = 1;
    said("not for all", sched_setscheduler(0, SCHED_FIFO, &wanted));
}

int main(int count, char **arguments)
{
    if (count > 1) {
        all("another program");
        return 0;
    }
    all("at first");
    said("signal", prctl(PR_SET_PDEATHSIG, SIGTERM));
    said("no signal", prctl(PR_SET_PDEATHSIG, 65));
    said("not dumpable", prctl(PR_SET_DUMPABLE, 0));
    said("dumpable 2", prctl(PR_SET_DUMPABLE, 2));
    said("keep", prctl(PR_SET_KEEPCAPS, 1));
    said("keep 2", prctl(PR_SET_KEEPCAPS, 2));
    said("slack", prctl(PR_SET_TIMERSLACK, 70000));
    said("privileges 0", prctl(PR_SET_NO_NEW_PRIVS, 0, 0, 0, 0));
    said("privileges", prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0));
    said("privileges, and more", prctl(PR_SET_NO_NEW_PRIVS, 1, 1, 0, 0));
    said("reaper", prctl(PR_SET_CHILD_SUBREAPER, 1));
    said("bound", prctl(PR_CAPBSET_READ, 0));
    said("no such", prctl(PR_CAPBSET_READ, 999));
    said("nothing", prctl(999, 0));
    all("then");
    if (!fork()) {
        all("a child");
        execl("/bin/settings", "settings", "again", (char *)0);
        _exit(1);
    }
    wait(0);
    said("slack as usual", prctl(PR_SET_TIMERSLACK, 0));
    all("in the end");

    int ends[2], status;
    pipe(ends);
    fflush(stdout);
    pid_t child = fork();
    if (!child) {
        if (!fork()) {
            prctl(PR_SET_PDEATHSIG, SIGUSR1);
            write(ends[1], "x", 1);
            for (;;)
                pause();
        }
        char c;
        read(ends[0], &c, 1);
        _exit(0);
    }
    waitpid(child, &status, 0);
    printf("an orphan is ours: %d", wait(&status) > 0);
    printf(", ended by %d\n", WTERMSIG(status));
    scheduled();
    return 0;
}
