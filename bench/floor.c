/* The floor under `job_start_spawner`: the same system calls as hostd's spawner and its child, in C.
 *
 *   floor COUNT JOBS_DIR CGROUPS SECCOMP_BPF PLAN INIT|- PROGRAM KEEP_MASK
 *
 * Runs PROGRAM COUNT times, one after another, each in a fresh root, cgroups and namespaces, and prints the
 * milliseconds per run. PLAN has one mount step a line, tab-separated, "-" for none, "@JOB@" for the job's directory:
 *   mount source target fstype flags data | mkdir target mode | symlink to target | mknod target mode major minor
 *   file target mode | mask target | cover target | umount target
 * CGROUPS has one directory a line, and after it file and value of each limit of a job, all tab-separated.
 * Written for the benchmark only; follows hostd/runtime/child.py and root.py call by call.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <linux/capability.h>
#include <linux/filter.h>
#include <linux/openat2.h>
#include <linux/sched.h>
#include <linux/seccomp.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <net/if.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define MUST(call) do { if ((long)(call) < 0) { fprintf(stderr, "floor:%d: %s: %s\n", __LINE__, #call, strerror(errno)); _exit(127); } } while (0)
enum { STEPS = 200, FIELDS = 6 };

static char *steps[STEPS][FIELDS];
static int step_count;
static char job[512], root_dir[600];
static int root_fd = -1, empty_fd = -1;
static const char *inside; /* the directory below the root that we are in: proc, sys and dev are ours once mounted */
static struct sock_fprog filter;
enum { GROUPS = 4, GROUP_FIELDS = 7 };
static char *groups[GROUPS][GROUP_FIELDS]; /* directory, then file and value of up to three limits */
static int group_count;
/* chown dac_override fowner fsetid kill setgid setuid setpcap net_bind_service sys_chroot setfcap: the default set */
static unsigned long long keep;

static const char *filled(const char *text, char *buffer, size_t size) {
    if (!text || !strcmp(text, "-")) return NULL;
    const char *at;
    size_t used = 0;
    while ((at = strstr(text, "@JOB@"))) {
        used += snprintf(buffer + used, size - used, "%.*s%s", (int)(at - text), text, job);
        text = at + 5;
    }
    snprintf(buffer + used, size - used, "%s", text);
    return buffer;
}

static int open_in_root(const char *path, int flags) {
    struct open_how how = {.flags = flags | O_CLOEXEC, .resolve = RESOLVE_IN_ROOT};
    return syscall(SYS_openat2, root_fd, path, &how, sizeof how);
}

static int parent_of(const char *target, const char **name) {
    char directory[512];
    const char *slash = strrchr(target, '/');
    snprintf(directory, sizeof directory, "%.*s", (int)(slash - target), target);
    *name = slash + 1;
    return open_in_root(*directory ? directory : "/", O_PATH | O_DIRECTORY);
}

static const char *go_where_ours(const char *target) {
    static const char *tops[] = {"/proc", "/sys", "/dev"};
    for (int i = 0; i < 3; i++) {
        size_t length = strlen(tops[i]);
        if (strncmp(target, tops[i], length) || target[length] != '/') continue;
        if (inside != tops[i]) {
            int fd;
            MUST(fd = open_in_root(tops[i], O_PATH | O_DIRECTORY));
            MUST(fchdir(fd));
            close(fd);
            inside = tops[i];
        }
        return target + length + 1;
    }
    return NULL;
}

/* How to name what `target` means inside the root; `path` is room for it, and has to be closed if *fd >= 0. */
static const char *at(const char *target, char *path, int *fd) {
    const char *name = go_where_ours(target);
    *fd = -1;
    if (name) return name;
    MUST(*fd = open_in_root(target, O_PATH));
    sprintf(path, "/proc/self/fd/%d", *fd);
    return path;
}

static void carry_out(char **f) {
    char path[64], source[4096], data[4096];
    const char *name;
    int fd;
    if (!strcmp(f[0], "mount")) {
        unsigned long flags = strtoul(f[4], NULL, 10);
        const char *from = filled(f[1], source, sizeof source), *options = filled(f[5], data, sizeof data);
        const char *type = strcmp(f[3], "-") ? f[3] : NULL;
        if (root_fd < 0) {
            MUST(mount(from, root_dir, type, flags, options));
            MUST(root_fd = open(root_dir, O_PATH | O_DIRECTORY | O_CLOEXEC));
            return;
        }
        int is_bind = (flags & MS_BIND) && !(flags & MS_REMOUNT);
        const char *to = at(f[2], path, &fd);
        MUST(mount(is_bind && !from ? to : from, to, type, flags, options));
        if (fd >= 0) close(fd);
        unsigned long per_mount = flags & (MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC);
        if (is_bind && per_mount) {
            to = at(f[2], path, &fd);
            MUST(mount(NULL, to, NULL, MS_REMOUNT | MS_BIND | per_mount, NULL));
            if (fd >= 0) close(fd);
        }
    } else if (!strcmp(f[0], "umount")) {
        MUST(umount2(at(f[1], path, &fd), MNT_DETACH));
        if (fd >= 0) close(fd);
    } else if (!strcmp(f[0], "cover")) {
        const char *to = at(f[1], path, &fd);
        if (empty_fd >= 0) {
            sprintf(source, "/proc/self/fd/%d", empty_fd);
            MUST(mount(source, to, NULL, MS_BIND, NULL));
        } else {
            MUST(mount("tmpfs", to, "tmpfs", MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC, "size=0,nr_inodes=1"));
            MUST(empty_fd = open_in_root(f[1], O_PATH | O_DIRECTORY));
        }
        if (fd >= 0) close(fd);
    } else if (!strcmp(f[0], "mask")) {
        static char null[64];
        if (!*null) {
            MUST(fd = open_in_root("/dev/null", O_PATH));
            sprintf(null, "/proc/self/fd/%d", fd);
        }
        MUST(mount(null, at(f[1], path, &fd), NULL, MS_BIND, NULL));
        if (fd >= 0) close(fd);
    } else if (!strcmp(f[0], "symlink")) {
        fd = AT_FDCWD;
        if (!(name = go_where_ours(f[2])) || strchr(name, '/')) MUST(fd = parent_of(f[2], &name));
        symlinkat(f[1], fd, name);
        if (fd >= 0) close(fd);
    } else {
        if (!strcmp(f[0], "file") && (fd = open_in_root(f[1], O_PATH)) >= 0) { close(fd); return; }
        fd = AT_FDCWD;
        if (!(name = go_where_ours(f[1])) || strchr(name, '/')) MUST(fd = parent_of(f[1], &name));
        if (!strcmp(f[0], "mkdir")) mkdirat(fd, name, strtoul(f[2], NULL, 10));
        else if (!strcmp(f[0], "mknod")) {
            mode_t mode = strtoul(f[2], NULL, 10);
            MUST(mknodat(fd, name, mode | ((mode & S_IFMT) ? 0 : S_IFCHR), makedev(atoi(f[3]), atoi(f[4]))));
        } else {
            int made;
            unlinkat(fd, name, 0);
            MUST(made = openat(fd, name, O_CREAT | O_EXCL | O_WRONLY | O_CLOEXEC, strtoul(f[2] ? f[2] : "420", NULL, 10)));
            close(made);
        }
        if (fd >= 0) close(fd);
    }
}

static void write_file(const char *path, const char *text) {
    int fd;
    MUST(fd = open(path, O_WRONLY | O_CLOEXEC));
    MUST(write(fd, text, strlen(text)));
    close(fd);
}

static void child(const char *id, const char *init, char *program) {
    char path[1024];
    MUST(setsid());
    umask(0);
    for (int i = 0; i < group_count; i++) {
        snprintf(path, sizeof path, "%s/%s/tasks", groups[i][0], id);
        if (access(path, F_OK)) snprintf(path, sizeof path, "%s/%s/cgroup.procs", groups[i][0], id); /* v2 */
        write_file(path, "0");
    }
    MUST(unshare(CLONE_NEWNS | CLONE_NEWNET | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWCGROUP));
    write_file("/proc/sys/net/ipv4/ip_unprivileged_port_start", "0");
    write_file("/proc/sys/net/ipv4/ping_group_range", "0 2147483647");
    int probe = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    struct ifreq lo = {.ifr_name = "lo", .ifr_flags = IFF_UP};
    MUST(ioctl(probe, SIOCSIFFLAGS, &lo));
    close(probe);
    MUST(mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL));
    MUST(sethostname(id, strlen(id)));
    for (int i = 0; i < step_count; i++) carry_out(steps[i]);
    MUST(fchdir(root_fd));
    MUST(syscall(SYS_pivot_root, ".", "."));
    MUST(umount2(".", MNT_DETACH));
    MUST(chdir("/"));
    int null = open("/dev/null", O_RDWR);
    dup2(null, 0);
    struct rlimit files;
    getrlimit(RLIMIT_NOFILE, &files);
    if (files.rlim_max > 10000) files.rlim_max = 10000;
    files.rlim_cur = files.rlim_max;
    MUST(setrlimit(RLIMIT_NOFILE, &files));
    umask(022);
    for (int number = 0; number <= 40; number++)
        if (!(keep >> number & 1)) prctl(PR_CAPBSET_DROP, number, 0, 0, 0);
    gid_t none = 0;
    MUST(setgroups(1, &none));
    MUST(setresgid(0, 0, 0));
    MUST(setresuid(0, 0, 0));
    struct __user_cap_header_struct header = {_LINUX_CAPABILITY_VERSION_3, 0};
    struct __user_cap_data_struct caps[2] = {{keep, keep, 0}, {keep >> 32, keep >> 32, 0}};
    MUST(syscall(SYS_capset, &header, caps));
    MUST(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0));
    MUST(syscall(SYS_close_range, 3, ~0U, 4 /* CLOEXEC */));
    MUST(syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &filter));
    char *env[] = {"PATH=/bin", NULL};
    char *with_init[] = {(char *)init, "--", program, NULL}, *bare[] = {program, NULL};
    if (init) execve(init, with_init, env);
    else execve(program, bare, env);
    MUST(-1);
}

static void once(int number, const char *jobs, const char *init, char *program) {
    char id[64], path[1024];
    int out[2], err[2];
    snprintf(id, sizeof id, "c%d", number);
    snprintf(job, sizeof job, "%s/%s", jobs, id);
    snprintf(root_dir, sizeof root_dir, "%s/root", job);
    const char *parts[] = {"", "/upper", "/work", "/root"};
    for (int i = 0; i < 4; i++) {
        snprintf(path, sizeof path, "%s%s", job, parts[i]);
        MUST(mkdir(path, 0755));
    }
    for (int i = 0; i < group_count; i++) {
        snprintf(path, sizeof path, "%s/%s", groups[i][0], id);
        MUST(mkdir(path, 0755));
        for (int f = 1; f + 1 < GROUP_FIELDS && groups[i][f + 1]; f += 2) {
            snprintf(path, sizeof path, "%s/%s/%s", groups[i][0], id, groups[i][f]);
            write_file(path, groups[i][f + 1]);
        }
    }
    MUST(pipe2(out, O_CLOEXEC));
    MUST(pipe2(err, O_CLOEXEC));
    root_fd = empty_fd = -1;
    inside = NULL;
    int pidfd = -1, status;
    struct clone_args how = {.flags = CLONE_NEWPID | CLONE_PIDFD, .exit_signal = SIGCHLD, .pidfd = (unsigned long)&pidfd};
    long pid = syscall(SYS_clone3, &how, sizeof how);
    MUST(pid);
    if (pid == 0) {
        dup2(out[1], 1);
        dup2(err[1], 2);
        child(id, init, program);
    }
    close(out[1]);
    close(err[1]);
    MUST(waitpid(pid, &status, 0));
    if (status) {
        char said[500] = "";
        if (read(err[0], said, sizeof said - 1) < 0) said[0] = 0;
        fprintf(stderr, "floor: the child ended with %x: %s\n", status, said);
        exit(1);
    }
    close(out[0]);
    close(err[0]);
    close(pidfd);
    for (int i = 0; i < group_count; i++) {
        snprintf(path, sizeof path, "%s/%s", groups[i][0], id);
        MUST(rmdir(path));
    }
    char command[700];  /* the upper's few entries: what nftw would remove, without a shell */
    snprintf(command, sizeof command, "%s", job);
    extern int remove_tree(const char *);
    remove_tree(command);
}

#include <ftw.h>
static int remove_one(const char *path, const struct stat *info, int kind, struct FTW *where) {
    (void)info, (void)kind, (void)where;
    return remove(path);
}
int remove_tree(const char *path) { return nftw(path, remove_one, 16, FTW_DEPTH | FTW_PHYS); }

static void read_text(const char *path, char *buffer, size_t size) {
    FILE *file = fopen(path, "r");
    size_t got = file ? fread(buffer, 1, size - 1, file) : 0;
    if (!got) { fprintf(stderr, "floor: %s: nothing to read\n", path); exit(1); }
    fclose(file);
    buffer[got] = 0;
}

int main(int argc, char **argv) {
    if (argc != 9) { fprintf(stderr, "usage: floor COUNT JOBS_DIR CGROUPS SECCOMP_BPF PLAN INIT|- PROGRAM KEEP_MASK\n"); return 64; }
    static char plan[64 * 1024], wanted[4096], bpf[64 * 1024];
    read_text(argv[5], plan, sizeof plan);
    for (char *line = strtok(plan, "\n"); line; line = strtok(NULL, "\n"), step_count++) {
        for (int i = 0; i < FIELDS && line; i++) steps[step_count][i] = strsep(&line, "\t");
    }
    read_text(argv[3], wanted, sizeof wanted);
    for (char *line = strtok(wanted, "\n"); line; line = strtok(NULL, "\n"), group_count++) {
        for (int i = 0; i < GROUP_FIELDS && line; i++) groups[group_count][i] = strsep(&line, "\t");
    }
    FILE *file = fopen(argv[4], "r");
    filter.len = fread(bpf, 1, sizeof bpf, file) / sizeof(struct sock_filter);
    filter.filter = (struct sock_filter *)bpf;
    fclose(file);
    keep = strtoull(argv[8], NULL, 10);
    struct timespec begin, end;
    int count = atoi(argv[1]);
    clock_gettime(CLOCK_MONOTONIC, &begin);
    for (int i = 0; i < count; i++) once(i, argv[2], strcmp(argv[6], "-") ? argv[6] : NULL, argv[7]);
    clock_gettime(CLOCK_MONOTONIC, &end);
    printf("%.4f\n", ((end.tv_sec - begin.tv_sec) * 1e3 + (end.tv_nsec - begin.tv_nsec) / 1e6) / count);
    return 0;
}
