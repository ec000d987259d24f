// SPDX-License-Identifier: GPL-2.0
/*
 * The host of the virtual machine (VM) in "make vm": the first process of each of its kernels.
 *
 * It runs QEMU with memory that is a memfd, reads what the VM prints, and takes it through a
 * kexec: the memory is preserved while the VM runs; then the VM is stopped, the state of its
 * devices goes to a second memfd, and the time of each step and the last output to a third one.
 * The first process of the next kernel takes all three back and lets the VM go on.
 *
 * The kernel's command line says what to do:
 *
 *   kho_stage=N        this is the Nth kernel
 *   kho_stages=N       so many in all
 *   kho_vm_mem=N       memory of the VM, in MiB
 *   kho_vm_flip=N      the Nth kernel changes one bit of that
 *
 * A directory that is shared over 9p has the next kernel (kernel.N), the initramfs, the common
 * part of the command line, and takes the lines of the result.
 */
#define _GNU_SOURCE
#include <err.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/reboot.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>
#include "luo.h"

#define PAGE		4096UL
/* Seconds without a line from the VM that are too many even on a busy machine. */
#define SILENCE		600
/* The VM prints a line whenever it has done so many pages. */
#define LINE_PAGES	256
/* So many lines are waited for before a kexec, and shown; of later ones, one in so many. */
#define LINES		4
#define SHOWN_EACH	16
/* It may go through its memory so many times between two ticks. */
#define MOST_ROUNDS	20

/* Descriptors that are out of the way of others, and that QEMU inherits. */
enum { RAM_FD = 100, STATE_FD, INFO_FD, NEW_STATE_FD, QMP_FD };
/* The files of the session. */
enum { RAM_TOKEN, STATE_TOKEN, INFO_TOKEN };

/* Moments, as the time stamp counter says, which goes on through a kexec. */
enum {
	PRESERVE, PRESERVED, STOP, STOPPED, STATE, GONE, SAVED,
	INIT, RETRIEVED, ANSWERS, LOADED, RUNNING, FIRST, MOMENTS
};

static const char * const moments[MOMENTS] = {
	"preserve", "preserved", "stop", "stopped", "state", "gone", "saved",
	"init", "retrieved", "answers", "loaded", "running", "first",
};

/* What the next kernel has to know; one page. */
struct info {
	unsigned long at[MOMENTS];
	/* Where the VM has its pages, and how many of them are done. */
	unsigned long first, pages, count;
	/* What was printed since the last end of a line. */
	char partial[256];
};

static struct info *info;
/* The line that has begun. */
static char partial[256];
static unsigned long stage, stages, mem, flip;
/* What the timer of the VM has counted. */
static unsigned long tick;
static int session, output, qmp;
static pid_t qemu;

static unsigned long now(void)
{
	return __builtin_ia32_rdtsc();
}

static unsigned long argument(const char *name)
{
	const char *text = getenv(name);

	return text ? strtoul(text, NULL, 0) : 0;
}

static int result = -1;

/* One line for the user of "make vm", and one in the log. */
static void report(const char *format, ...)
{
	char line[512];
	va_list args;
	int len;

	/* Mounted with the first line, so not while the VM stands still. */
	if (result < 0) {
		const char *path = "/mnt/result";
		int flags = O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC;

		/* Another process may have done that. */
		if (access("/mnt/initrd", F_OK))
			mount("kho", "/mnt", "9p", 0, "trans=virtio,version=9p2000.L,msize=262144");
		result = open(path, flags, 0644);
	}
	len = snprintf(line, sizeof(line), "%lu ", stage);
	va_start(args, format);
	len += vsnprintf(line + len, sizeof(line) - len, format, args);
	va_end(args);
	if (len > (int)sizeof(line) - 2)
		len = sizeof(line) - 2;
	line[len] = '\n';
	if (write(result, line, len + 1) != len + 1)
		warn("result");
	printf("GUEST %.*s", len + 1, line);
}

/*
 * Reports a step, and what the counter was when the host of this guest took note of it.  Two of
 * these give the rate of the counter; what the kernel measures may be wrong on a busy host.
 */
static void report_step(const char *text)
{
	unsigned long before = now(), after;
	struct stat st;

	report("step %s", text);
	after = now();
	if (fstat(result, &st))
		err(1, "result");
	report("clock %lu %lld.%09ld", before + (after - before) / 2,
	       (long long)st.st_mtim.tv_sec, st.st_mtim.tv_nsec);
}

/* Moves a file to one of the descriptors above, in place of an old one. */
static void place(int fd, const char *name, int at)
{
	if (fd < 0 || dup2(fd, at) != at)
		err(1, "%s", name);
	close(fd);
}

/* Makes a page for the next kernel, which begins with what is known in this one. */
static void new_info(void)
{
	struct info *old = info;

	place(memfd_create("info", 0), "info", INFO_FD);
	if (ftruncate(INFO_FD, PAGE))
		err(1, "info");
	info = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, INFO_FD, 0);
	if (info == MAP_FAILED)
		err(1, "info");
	if (old) {
		*info = *old;
		munmap(old, PAGE);
	}
}

/* QEMU, and the protocol that it is controlled by. */

/* One line from QEMU's monitor. */
static const char *qmp_line(void)
{
	static char line[65536];
	size_t len = 0;

	do {
		if (len == sizeof(line) - 1 || read(qmp, line + len, 1) != 1)
			errx(1, "QEMU's monitor: %.*s", (int)len, line);
	} while (line[len++] != '\n');
	line[len] = 0;
	return line;
}

/* The answer to a command; there may be events before it. */
static const char *command(const char *what, const char *arguments)
{
	char text[256];
	const char *line;
	int len;

	len = snprintf(text, sizeof(text), "{'execute': '%s', 'arguments': {%s}}", what, arguments);
	if (write(qmp, text, len) != len)
		err(1, "QEMU's monitor");
	do {
		line = qmp_line();
		if (!strncmp(line, "{\"error\"", 8))
			errx(1, "QEMU: %.*s, to %s", (int)strcspn(line, "\r\n"), line, text);
	} while (strncmp(line, "{\"return\"", 9));
	return line;
}

/* Memory that is shared with a file stays there; the rest is what is written and read. */
static void prepare_migration(void)
{
	command("migrate-set-capabilities",
		"'capabilities': [{'capability': 'x-ignore-shared', 'state': true}]");
	command("migrate-set-parameters", "'mode': 'cpr-reboot'");
}

static void wait_for_migration(void)
{
	for (;;) {
		const char *answer = command("query-migrate", "");

		if (strstr(answer, "\"status\": \"completed\""))
			return;
		if (strstr(answer, "\"status\": \"failed\""))
			errx(1, "QEMU: %.*s", (int)strcspn(answer, "\r\n"), answer);
		usleep(1000);
	}
}

static void start_qemu(void)
{
	char memory[128], size[32];
	int sockets[2], pipes[2];

	if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, sockets) ||
	    pipe2(pipes, O_CLOEXEC))
		err(1, "sockets");
	snprintf(size, sizeof(size), "%luM", mem);
	snprintf(memory, sizeof(memory),
		 "memory-backend-file,id=ram,size=%s,share=on,mem-path=/proc/self/fd/100", size);
	place(memfd_create("state", 0), "state", NEW_STATE_FD);
	qemu = fork();
	if (!qemu) {
		int null = open("/dev/null", O_RDONLY);

		/* The first process reads errors until nobody can write any. */
		if (prctl(PR_SET_PDEATHSIG, SIGKILL) ||
		    dup2(sockets[1], QMP_FD) < 0 || dup2(pipes[1], 1) < 0 || dup2(null, 0) < 0)
			err(1, "qemu");
		execl("/bin/qemu", "qemu", "-accel", "tcg", "-cpu", "max", "-nodefaults",
		      "-no-user-config", "-display", "none", "-L", "/firmware", "-m", size,
		      "-object", memory, "-machine", "pc,memory-backend=ram", "-kernel", "/vm",
		      "-serial", "stdio", "-chardev", "socket,id=qmp,fd=104", "-mon",
		      "chardev=qmp,mode=control", stage > 1 ? "-incoming" : NULL, "defer", NULL);
		err(1, "qemu");
	}
	close(sockets[1]);
	close(pipes[1]);
	qmp = sockets[0];
	output = pipes[0];
	/* It greets first. */
	qmp_line();
	command("qmp_capabilities", "");
}

/* What the VM prints. */

/* Adds what comes next to a line that has begun; returns whether it is complete. */
static int read_output(void)
{
	size_t len = strlen(partial);
	char byte;

	alarm(SILENCE);
	while (read(output, &byte, 1) == 1) {
		if (byte == '\n')
			return 1;
		if (len < sizeof(partial) - 1)
			partial[len++] = byte;
		partial[len] = 0;
	}
	return 0;
}

/* Looks at a line that is complete. */
static void take_line(int show)
{
	unsigned long count;

	/* It says no more after that. */
	if (!strncmp(partial, "BAD exception", 13))
		errx(1, "the VM: %s", partial);
	if (!strncmp(partial, "BAD", 3)) {
		report("bad %s", partial);
	} else if (sscanf(partial, "count %lu: round %*u, tick %lu", &count, &tick) == 2) {
		if (count != info->count + LINE_PAGES)
			report("bad count: %lu, and then %lu", info->count, count);
		info->count = count;
		if (show)
			report("vm %s", partial);
	} else if (!info->count &&
		   sscanf(partial, "memory at 0x%lx, %lu", &info->first, &info->pages) == 2) {
		report("vm %s", partial);
	} else {
		report("bad line: %s", partial);
	}
	partial[0] = 0;
}

static void next_line(int show)
{
	if (!read_output())
		errx(1, "QEMU ended after count %lu", info->count);
	take_line(show);
}

/* Reads what was printed while nobody looked. */
static void catch_up(void)
{
	struct pollfd some = { .fd = output, .events = POLLIN };

	while (poll(&some, 1, 0) > 0)
		next_line(0);
}

/* Waits until so many pages more are done; of many lines only some are shown. */
static void watch(unsigned long pages)
{
	unsigned long end;

	catch_up();
	end = info->count + pages;
	for (unsigned long line = 0; info->count < end; line++)
		next_line(line < LINES || line % SHOWN_EACH == SHOWN_EACH - 1);
}

/* From one kernel to the next. */

static void load_next(void)
{
	char args[2048], image[32];
	int fd = open("/mnt/cmdline", O_RDONLY);
	ssize_t len = fd < 0 ? -1 : read(fd, args, sizeof(args) - 32);

	if (len < 0)
		err(1, "command line");
	close(fd);
	report("step loading the next kernel");
	snprintf(args + len, sizeof(args) - len, " kho_stage=%lu", stage + 1);
	snprintf(image, sizeof(image), "/mnt/kernel.%lu", stage + 1);
	load_kernel(image, "/mnt/initrd", args, 0);
}

static void preserve_memory(void)
{
	report_step("preserving the memory of the VM, which runs");
	new_info();
	session = session_open(LIVEUPDATE_IOCTL_CREATE_SESSION, "vm");
	info->at[PRESERVE] = now();
	preserve_fd(session, RAM_FD, RAM_TOKEN);
	info->at[PRESERVED] = now();
	watch(LINE_PAGES);
}

/* From here on, the VM stands still. */
static void leave(void)
{
	prepare_migration();
	report("step kexec");
	catch_up();
	info->at[STOP] = now();
	command("stop", "");
	info->at[STOPPED] = now();
	command("migrate", "'uri': 'file:/proc/self/fd/103'");
	wait_for_migration();
	info->at[STATE] = now();
	command("quit", "");
	/* What was still on its way, to the beginning of a line. */
	while (read_output())
		take_line(0);
	waitpid(qemu, NULL, 0);
	info->at[GONE] = now();
	memcpy(info->partial, partial, sizeof(partial));
	preserve_fd(session, NEW_STATE_FD, STATE_TOKEN);
	preserve_fd(session, INFO_FD, INFO_TOKEN);
	info->at[SAVED] = now();
	reboot(RB_KEXEC);
	err(1, "kexec");
}

/* Changes a bit that the VM will come to soon. */
static void flip_bit(void)
{
	off_t at = info->first + (info->count + 300) % info->pages * PAGE + 1000;
	char byte;

	if (pread(RAM_FD, &byte, 1, at) != 1)
		err(1, "flip");
	byte ^= 0x10;
	if (pwrite(RAM_FD, &byte, 1, at) != 1)
		err(1, "flip");
	report("flipped 0x%llx", (unsigned long long)at);
}

static void go_on(unsigned long init)
{
	unsigned long last;

	session = session_open(LIVEUPDATE_IOCTL_RETRIEVE_SESSION, "vm");
	place(retrieve_fd(session, INFO_TOKEN), "info", INFO_FD);
	place(retrieve_fd(session, STATE_TOKEN), "state", STATE_FD);
	place(retrieve_fd(session, RAM_TOKEN), "memory", RAM_FD);
	info = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, INFO_FD, 0);
	if (info == MAP_FAILED)
		err(1, "info");
	info->at[INIT] = init;
	info->at[RETRIEVED] = now();
	memcpy(partial, info->partial, sizeof(partial));
	last = info->count;
	if (flip == stage)
		flip_bit();
	start_qemu();
	info->at[ANSWERS] = now();
	prepare_migration();
	command("migrate-incoming", "'uri': 'file:/proc/self/fd/101'");
	wait_for_migration();
	info->at[LOADED] = now();
	command("cont", "");
	info->at[RUNNING] = now();
	if (!read_output())
		errx(1, "QEMU ended after count %lu", info->count);
	info->at[FIRST] = now();
	report("step going on from count %lu", last);
	take_line(1);
	for (int i = 0; i < MOMENTS; i++)
		report("moment %s %lu", moments[i], info->at[i]);
	session_finish(session);
}

static void begin(void)
{
	new_info();
	place(memfd_create("memory", 0), "memory", RAM_FD);
	if (ftruncate(RAM_FD, mem << 20))
		err(1, "memory");
	report_step("starting the VM");
	start_qemu();
}

static void run(unsigned long init)
{
	unsigned long start;

	if (stage == 1)
		begin();
	else
		go_on(init);
	if (stage < stages) {
		watch(LINES * LINE_PAGES);
		load_next();
		preserve_memory();
		leave();
	}
	/* All of its memory has to be what it was, and its timer has to go on. */
	report("step the VM checks all of its memory");
	start = tick;
	watch(info->pages);
	for (int i = 0; tick == start && i < MOST_ROUNDS; i++)
		watch(info->pages);
	if (tick == start)
		report("bad timer: tick %lu, again and again", tick);
}

int main(void)
{
	unsigned long init = now();
	char line[256], last[256] = "it ended";
	FILE *errors;
	int pipes[2], status;
	pid_t child;

	stage = argument("kho_stage");
	stages = argument("kho_stages");
	mem = argument("kho_vm_mem");
	flip = argument("kho_vm_flip");
	setvbuf(stdout, NULL, _IOLBF, 0);
	if (mount("proc", "/proc", "proc", 0, NULL) || mount("dev", "/dev", "devtmpfs", 0, NULL) ||
	    pipe2(pipes, O_CLOEXEC))
		err(1, "init");
	/* The first process has to stay, whatever fails, to say so. */
	child = fork();
	if (!child) {
		dup2(pipes[1], 2);
		run(init);
		report("done");
		exit(0);
	}
	close(pipes[1]);
	errors = fdopen(pipes[0], "r");
	while (fgets(line, sizeof(line), errors)) {
		printf("%s", line);
		line[strcspn(line, "\n")] = 0;
		snprintf(last, sizeof(last), "%s", line);
	}
	waitpid(child, &status, 0);
	if (WIFSIGNALED(status) && WTERMSIG(status) == SIGALRM)
		snprintf(last, sizeof(last), "no line from the VM for %d seconds", SILENCE);
	if (status) {
		report("%s", last);
		report("failed");
	}
	reboot(RB_POWER_OFF);
	return 1;
}
