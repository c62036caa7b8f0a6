// Users and groups: who may become whom, what files and children get of it, who may be signalled, how nice, what personality.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/fsuid.h>
#include <sys/personality.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

static unsigned seed;

static int number(void)
{
    static const int some[] = {-1, 0, 0, 7, 8, 9, 9};
    seed = seed * 1103515245 + 12345;
    return some[seed / 65536 % 7];
}

static void show(long result)
{
    unsigned r, e, s, rg, eg, sg;
    getresuid(&r, &e, &s), getresgid(&rg, &eg, &sg);
    printf(" %ld %s: %d %d %d %d, %d %d %d %d\n", result, result < 0 ? strerrorname_np(errno) : "", r, e, s,
           setfsuid(-1), rg, eg, sg, setfsgid(-1));
    errno = 0;
}

static void change(int step)
{
    static const long calls[] = {SYS_setuid, SYS_setgid, SYS_setreuid, SYS_setregid, SYS_setresuid, SYS_setresgid,
                                 SYS_setfsuid, SYS_setfsgid};
    seed = seed * 1103515245 + 12345;
    int which = seed / 65536 % 8, a = number(), b = number(), c = number();
    printf("%ld(%d, %d, %d)", calls[which], a, b, c);
    show(syscall(calls[which], a, b, c));
}

static void said(const char *what, long result)
{
    printf("%s: %ld %s\n", what, result, result < 0 ? strerrorname_np(errno) : "");
    errno = 0;
}

static void groups(void)
{
    gid_t some[3] = {9, 7, 8}, none = -1, found[3] = {0};
    said("more groups", setgroups(3, some));
    said("how many", getgroups(0, found));
    said("no room", getgroups(2, found));
    said("below zero", getgroups(-1, found));
    said("all", getgroups(3, found));
    printf("%d %d %d\n", found[0], found[1], found[2]);
    said("none", setgroups(1, &none));
    said("too many", syscall(SYS_setgroups, 65537, some));
}

static void priorities(void)
{
    said("nicer", setpriority(PRIO_PROCESS, 0, 5));
    said("is", getpriority(PRIO_PROCESS, 0));
    said("nicest", setpriority(PRIO_PROCESS, getpid(), 100));
    said("is", syscall(SYS_getpriority, PRIO_PROCESS, 0));
    said("of nobody", setpriority(PRIO_PROCESS, 9999, 5));
    said("another kind", setpriority(7, 0, 5));
    said("of a group", setpriority(PRIO_PGRP, 0, 6));
    said("of another user's", getpriority(PRIO_USER, 4711));
}

static void as_another(void)
{
    struct stat found;
    siginfo_t info = {.si_code = SI_QUEUE};
    pid_t root = fork();
    if (!root)
        pause();
    said("it becomes another", setresuid(7, 7, 7));
    said("kill", kill(root, 0));
    said("tgkill", syscall(SYS_tgkill, root, root, 0));
    said("queue", syscall(SYS_rt_sigqueueinfo, root, 0, &info));
    said("itself", kill(getpid(), 0));
    said("more groups", setgroups(0, 0));
    said("less nice", setpriority(PRIO_PROCESS, 0, 1));
    said("another's", setpriority(PRIO_PROCESS, root, 19));
    pid_t child = fork();
    if (!child)
        _exit(getuid());
    int status;
    waitpid(child, &status, 0);
    printf("a child is %d\n", WEXITSTATUS(status));
    exit(0);
}

static void personas(void)
{
    said("usual", personality(-1));
    said("without chance", personality(ADDR_NO_RANDOMIZE));
    said("is", personality(-1));
    fflush(stdout);
    if (!fork()) {
        said("a child's", personality(0));
        said("no more", personality(-1));
        exit(0);
    }
    wait(0);
    said("and here", personality(-1));
}

static void files(void)
{
    struct stat found;
    umask(0);
    mkdir("/tmp/owners", 0777);
    chdir("/tmp/owners");       // what is above is not for everybody
    setfsgid(8), setfsuid(7);
    close(open("file", O_CREAT | O_RDWR, 0600));
    symlink("file", "link");
    mkdir("directory", 0700);
    setfsuid(0), setfsgid(0);
    const char *names[] = {"file", "link", "directory"};
    for (int i = 0; i < 3; i++) {
        lstat(names[i], &found);
        printf("%s %d %d\n", names[i], found.st_uid, found.st_gid);
        remove(names[i]);
    }
    rmdir("/tmp/owners");
}

int main(void)
{
    for (int round = 0; round < 60; round++) {
        fflush(stdout);
        if (!fork()) {
            seed = round;
            for (int step = 0; step < 6; step++)
                change(step);
            exit(0);
        }
        wait(0);
    }
    void (*parts[])(void) = {groups, priorities, personas, files, as_another};
    for (int i = 0; i < 5; i++) {
        fflush(stdout);
        if (!fork()) {
            setpgid(0, 0);
            parts[i]();
            exit(0);
        }
        wait(0);
    }
    return 0;
}
