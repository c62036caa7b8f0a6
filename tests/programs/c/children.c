// What wait(2) and its like tell of children, process groups, and what is asked of those that are not there.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <limits.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static void said(const char *what, long result)
{
    printf("%s: %s\n", what, result < 0 ? strerrorname_np(errno) : "done");
    errno = 0;
}

static pid_t child(int seconds)
{
    fflush(0);
    pid_t pid = fork();
    if (!pid) {
        sleep(seconds);
        _exit(3);
    }
    return pid;
}

static int nothing(void *argument) { return 7; }

static void clones(void)
{
    static char stack[65536];
    siginfo_t info;
    int status;
    pid_t pid = clone(nothing, stack + sizeof stack, SIGUSR2, 0);
    said("wait4 for it", wait4(pid, &status, 0, 0));
    memset(&info, 0x55, sizeof info);
    said("waitid __WALL", waitid(P_PID, pid, &info, WEXITED | WNOWAIT | __WALL));
    printf("signal %d code %d status %d, rest %x\n", info.si_signo, info.si_code, info.si_status,
           ((unsigned char *)&info)[100]);
    pid_t sibling = clone(nothing, stack + sizeof stack, CLONE_PARENT | SIGCHLD, 0);
    said("a sibling is no child", waitpid(sibling, &status, 0));
    printf("__WCLONE %d\n", waitpid(-1, &status, __WCLONE) == pid);
    printf("%x\n", status);
}

static void usage(void)
{
    struct rusage used;
    int status;
    fflush(0);
    pid_t pid = fork();
    if (!pid) {
        while (clock() < CLOCKS_PER_SEC / 5)
            ;
        _exit(0);
    }
    wait4(pid, &status, 0, &used);
    printf("it took its time: %d\n", used.ru_utime.tv_sec * 1000000 + used.ru_utime.tv_usec
           + used.ru_stime.tv_sec * 1000000 + used.ru_stime.tv_usec > 100000);
}

static void groups(void)
{
    pid_t pid = child(100);
    said("its group is itself", setpgid(pid, pid));
    said("group of another", setpgid(0, pid));
    said("group of none", setpgid(pid, 9999));
    said("group below zero", setpgid(0, -1));
    said("of none", setpgid(9999, 0));
    said("of its parent's parent", setpgid(getppid() ? getppid() : 9999, 0));
    said("back", setpgid(0, getpgid(pid)));
    said("a leader's session", setsid());
    kill(pid, SIGKILL);
    said("group of a zombie", getpgid(pid) == pid ? 0 : -1);
    waitpid(pid, 0, 0);

    int done[2], go[2];
    pipe(done), pipe(go);
    fflush(0);
    pid = fork();
    if (!pid) {
        char c;
        setsid();
        write(done[1], "x", 1);
        read(go[0], &c, 1);
        _exit(0);
    }
    char c;
    read(done[0], &c, 1);
    said("of another session", setpgid(pid, pid));
    write(go[1], "x", 1);
    waitpid(pid, 0, 0);

    int end[2];
    pipe2(end, O_CLOEXEC);
    fflush(0);
    pid = fork();
    if (!pid) {
        execl("/bin/children", "children", "sleep", (char *)0);
        _exit(1);
    }
    close(end[1]);
    read(end[0], &c, 1);
    said("of another program", setpgid(pid, pid));
    kill(pid, SIGKILL);
    waitpid(pid, 0, 0);
}

static volatile pid_t number;

static void *other(void *argument)
{
    number = gettid();
    pause();
    return 0;
}

static void signalled(void)
{
    pthread_t thread;
    pthread_create(&thread, 0, other, 0);
    while (!number)
        usleep(1000);
    siginfo_t none = {.si_code = SI_QUEUE};
    said("kill by a thread's number", kill(number, 0));
    said("queued by it", syscall(SYS_rt_sigqueueinfo, number, 0, &none));

    siginfo_t info = {.si_code = SI_QUEUE, .si_signo = SIGUSR1};
    pid_t pid = child(100);
    said("tgkill 0", syscall(SYS_tgkill, 0, pid, 0));
    said("tgkill -1", syscall(SYS_tgkill, pid, -1, 0));
    said("tkill -1", syscall(SYS_tkill, -1, 0));
    said("tgkill of another", syscall(SYS_tgkill, getpid(), pid, 0));
    said("queue 0", syscall(SYS_rt_sigqueueinfo, pid, 0, &info));
    info.si_code = SI_USER;
    said("as kill", syscall(SYS_rt_sigqueueinfo, pid, 0, &info));
    info.si_code = SI_TKILL;
    said("as tkill", syscall(SYS_rt_sigqueueinfo, pid, 0, &info));
    said("as tkill, itself", syscall(SYS_rt_sigqueueinfo, getpid(), 0, &info));
    kill(pid, SIGKILL);
    waitpid(pid, 0, 0);
}

int main(int count, char **arguments)
{
    siginfo_t info;
    if (count > 1) {
        sleep(100);
        return 0;
    }
    if (fork()) {   // not the first process, of which nothing is asked
        int children = 0;
        while (wait(0) > 0)
            children++;
        printf("%d children\n", children);
        return 0;
    }
    setpgid(0, 0);
    signal(SIGUSR2, SIG_IGN);
    said("no children", wait(0));
    pid_t pid = child(0);
    said("least number", wait4(INT_MIN, 0, 0, 0));
    said("unknown options", waitid(P_ALL, 0, &info, WEXITED | 0x100));
    said("no options", waitid(P_ALL, 0, &info, 0));
    said("P_PID 0", waitid(P_PID, 0, &info, WEXITED));
    said("P_PID below zero", waitid(P_PID, -1, &info, WEXITED));
    said("P_PGID below zero", waitid(P_PGID, -1, &info, WEXITED));
    said("another kind", waitid(17, 0, &info, WEXITED));
    said("P_PID", waitid(P_PID, pid, &info, WEXITED));
    clones();
    usage();
    groups();
    signalled();
    return 0;
}
