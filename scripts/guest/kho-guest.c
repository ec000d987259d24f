// SPDX-License-Identifier: GPL-2.0
/*
 * What a shell cannot do in the guest: live update sessions and kexec.
 *
 *   preserve SESSION DIR   memfd 0 = DIR/manifest, memfd N = DIR/N
 *   whole SESSION DIR      the same; writes where the pages are to DIR/frames
 *   scatter SESSION DIR [PAGES]
 *                          that, with gaps between the pages, small ones or of
 *                          so many, and one page more
 *   donate DIR PAGES       take so many empty pages; writes where to DIR/frames
 *   try PAGES              preserve so many pages, print the error that makes
 *   waiting DIR            what /proc/kpageflags says of the memory there
 *   owned DIR              what page owner says of it
 *   retrieve SESSION       take the session back, print what it holds
 *   renew SESSION          the same, then preserve the same files anew
 *   stress ROUNDS          preserve and unpreserve from two tasks at once
 *   soak SEED HOP          one hop of a long chain, see soak.c
 *   fail-before IMAGE INITRD ARGS, fail-after
 *                          allocations that fail, see fail.c
 *   load IMAGE INITRD ARGS load the next kernel; load-crash: the one for a panic
 *   kexec                  start it
 *
 * The manifest has one line per file.  preserve, whole, scatter, donate, renew, soak and
 * fail-before leave a process behind that holds sessions open, for closing them gives them up.
 */
#define _GNU_SOURCE
#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>
#include <linux/kexec.h>
#include "luo.h"

#define MAX_FILES	1024
#define PAGE		4096
/* In /proc/kpageflags: reserved, and the head and the tails of a folio. */
#define WAITING		0x100018000UL
#define LARGE_GAP	((240 << 20) / PAGE)

static int fds[MAX_FILES + 1];
static char buffer[1 << 20];

static void write_all(int fd, const char *data, size_t len)
{
	while (len) {
		ssize_t n = write(fd, data, len);

		if (n <= 0)
			err(1, "memfd");
		data += n;
		len -= n;
	}
}

/* Takes memory that will be free again. */
static void leave_gap(int gaps, long pages)
{
	off_t end = lseek(gaps, 0, SEEK_END);

	if (fallocate(gaps, 0, end, pages * PAGE))
		err(1, "gap");
}

/* As much as lies between two pages that will not be free, if it is the same. */
static long even_gap;

static long small_gap(void)
{
	return even_gap ?: 1 + random() % 7;
}

/* gaps: a file for the memory that is to lie between the pages, or -1. */
static int load_file(const char *dir, const char *name, int gaps)
{
	char path[4096];
	int in, out;
	ssize_t n;

	snprintf(path, sizeof(path), "%s/%s", dir, name);
	in = open(path, O_RDONLY);
	out = memfd_create(name, 0);
	if (in < 0 || out < 0)
		err(1, "%s", path);
	while ((n = read(in, buffer, sizeof(buffer))) > 0) {
		for (ssize_t i = 0; gaps >= 0 && i < n; i += PAGE) {
			write_all(out, buffer + i, n - i < PAGE ? n - i : PAGE);
			leave_gap(gaps, small_gap());
		}
		if (gaps < 0)
			write_all(out, buffer, n);
	}
	if (n < 0)
		err(1, "%s", path);
	close(in);
	return out;
}

/* Prints "file TOKEN SIZE SHA-256" of what is in the memfd right now. */
static void print_file(int fd, int token)
{
	char cmd[80], sum[65] = "";
	struct stat st;
	FILE *pipe;

	if (fstat(fd, &st))
		err(1, "file %d", token);
	snprintf(cmd, sizeof(cmd), "sha256sum /proc/%d/fd/%d", getpid(), fd);
	pipe = popen(cmd, "r");
	if (!pipe || fscanf(pipe, "%64s", sum) != 1 || pclose(pipe))
		errx(1, "file %d: no hash", token);
	printf("file %d %lld %s\n", token, (long long)st.st_size, sum);
}

/* Number of lines in the manifest. */
static int count_files(int manifest)
{
	off_t pos = 0;
	int count = 0;
	ssize_t n;

	while ((n = pread(manifest, buffer, sizeof(buffer), pos)) > 0) {
		for (ssize_t i = 0; i < n; i++)
			count += buffer[i] == '\n';
		pos += n;
	}
	if (n < 0 || count >= MAX_FILES)
		errx(1, "bad manifest");
	return count;
}

void hold(void)
{
	fflush(stdout);
	if (fork())
		return;
	setsid();
	/* A reader of our output waits for its last writer. */
	for (int fd = 0; fd < 3; fd++)
		close(fd);
	for (;;)
		pause();
}

static int preserve_files(const char *name, int count)
{
	int session = session_open(LIVEUPDATE_IOCTL_CREATE_SESSION, name);

	for (int i = 0; i <= count; i++)
		preserve_fd(session, fds[i], i);
	return session;
}

/* Loads the files.  With gaps, each from another processor, and so its node. */
static int load_files(const char *dir, int gaps)
{
	long cpus = sysconf(_SC_NPROCESSORS_ONLN);
	char file[16];
	int count;

	fds[0] = load_file(dir, "manifest", -1);
	count = count_files(fds[0]);
	for (int i = 1; i <= count; i++) {
		cpu_set_t cpu;

		CPU_ZERO(&cpu);
		CPU_SET((i - 1) % cpus, &cpu);
		if (gaps >= 0 && sched_setaffinity(0, sizeof(cpu), &cpu))
			err(1, "processor");
		/* The first file lies low, the last one above this. */
		if (gaps >= 0 && i == count && !even_gap)
			leave_gap(gaps, LARGE_GAP);
		snprintf(file, sizeof(file), "%d", i);
		fds[i] = load_file(dir, file, gaps);
	}
	for (int i = 0; i <= count; i++)
		print_file(fds[i], i);
	return count;
}

static void preserve(const char *name, const char *dir)
{
	preserve_files(name, load_files(dir, -1));
	hold();
}

/* Prints what the kernel says to preserving so many pages. */
static void try_preserve(long pages)
{
	int session = session_open(LIVEUPDATE_IOCTL_CREATE_SESSION, "try");
	int fd = memfd_create("try", 0);

	if (ftruncate(fd, pages * PAGE) || fallocate(fd, 0, 0, pages * PAGE))
		err(1, "%ld pages", pages);
	if (!try_preserve_fd(session, fd, 0))
		errno = 0;
	printf("tried %ld pages: %d %s\n", pages, errno, strerror(errno));
}

/* Opens a file of frame numbers. */
static FILE *open_frames(const char *dir, const char *mode)
{
	char path[4096];
	FILE *frames;

	snprintf(path, sizeof(path), "%s/frames", dir);
	frames = fopen(path, mode);
	if (!frames)
		err(1, "%s", path);
	return frames;
}

static unsigned long read_entry(int fd, unsigned long index)
{
	unsigned long entry;

	if (pread(fd, &entry, sizeof(entry), index * sizeof(entry)) !=
	    sizeof(entry))
		err(1, "entry %lu", index);
	return entry;
}

/* Writes the frame of each page of a memfd. */
static void write_frames(int fd, FILE *frames)
{
	int map = open("/proc/self/pagemap", O_RDONLY);
	struct stat st;
	char *mem;

	if (map < 0 || fstat(fd, &st))
		err(1, "frames");
	mem = mmap(NULL, st.st_size, PROT_READ, MAP_SHARED | MAP_POPULATE, fd, 0);
	if (st.st_size && mem == MAP_FAILED)
		err(1, "frames");
	for (off_t i = 0; i < st.st_size; i += PAGE) {
		unsigned long entry = read_entry(map, (unsigned long)(mem + i) / PAGE);

		if (!(entry >> 63))
			errx(1, "page %lld has no frame", (long long)i / PAGE);
		fprintf(frames, "%lu\n", entry & ((1UL << 55) - 1));
	}
	if (st.st_size)
		munmap(mem, st.st_size);
	close(map);
}

/* Writes where the pages of the files are, from the first to a last one. */
static void list_frames(const char *dir, int last)
{
	FILE *frames = open_frames(dir, "w");

	for (int i = 1; i <= last; i++)
		write_frames(fds[i], frames);
	if (fclose(frames))
		err(1, "frames");
}

/* Takes pages that are empty, outside scratch, and stay where they are. */
static void donate(const char *dir, long pages)
{
	int session = session_open(LIVEUPDATE_IOCTL_CREATE_SESSION, "donated");

	fds[1] = memfd_create("donated", 0);
	if (ftruncate(fds[1], pages * PAGE) || fallocate(fds[1], 0, 0, pages * PAGE))
		err(1, "donate");
	/* What is preserved is moved out of scratch, and not back again. */
	preserve_fd(session, fds[1], 0);
	close(session);
	list_frames(dir, 1);
	hold();
}

static void whole(const char *name, const char *dir)
{
	int count = load_files(dir, -1);

	preserve_files(name, count);
	list_frames(dir, count);
	hold();
}

static void scatter(const char *name, const char *dir, long gap)
{
	int gaps = memfd_create("gaps", 0);
	int count, session;

	even_gap = gap;
	count = load_files(dir, gaps);
	/* A page that the next kernel's user has no interest in. */
	fds[count + 1] = memfd_create("spare", 0);
	write_all(fds[count + 1], buffer, PAGE);
	leave_gap(gaps, small_gap());
	session = preserve_files(name, count);
	preserve_fd(session, fds[count + 1], count + 1);
	list_frames(dir, count + 1);
	/* Only now, or the session's own memory would fill the gaps. */
	close(gaps);
	hold();
}

/* Prints how many frames there are, and how many of them are free or in use. */
static void print_waiting(const char *dir)
{
	int flags = open("/proc/kpageflags", O_RDONLY);
	int counts = open("/proc/kpagecount", O_RDONLY);
	FILE *frames = open_frames(dir, "r");
	int total = 0, odd = 0;
	unsigned long frame;

	if (flags < 0 || counts < 0)
		err(1, "/proc/kpage*");
	for (; fscanf(frames, "%lu", &frame) == 1; total++)
		odd += (read_entry(flags, frame) & ~WAITING) ||
		       read_entry(counts, frame);
	printf("frames %d, %d not waiting\n", total, odd);
}

/* Prints of how many of these frames page owner has a record; asks for a few. */
static void print_owned(const char *dir)
{
	int owner = open("/sys/kernel/debug/page_owner", O_RDONLY);
	FILE *frames = open_frames(dir, "r");
	unsigned long frame, found;
	int total = 0, owned = 0;

	if (owner < 0)
		err(1, "page_owner");
	for (int i = 0; fscanf(frames, "%lu", &frame) == 1; i++) {
		const char *record;

		if (i % 64)
			continue;
		/* What is read is the first record from that frame on. */
		memset(buffer, 0, sizeof(buffer));
		if (pread(owner, buffer, 4096, frame) < 0)
			err(1, "page_owner");
		record = strstr(buffer, "PFN 0x");
		owned += record && sscanf(record, "PFN %lx", &found) == 1 &&
			 found == frame;
		total++;
	}
	printf("owned %d of %d\n", owned, total);
}

/* With kho_break set, the tests must notice the byte that changes here. */
static void break_file(int fd)
{
	char byte;

	if (pread(fd, &byte, 1, 0) != 1)
		return;
	byte ^= 1;
	if (pwrite(fd, &byte, 1, 0) != 1)
		err(1, "break");
}

static void retrieve(const char *name, int again)
{
	int session = session_open(LIVEUPDATE_IOCTL_RETRIEVE_SESSION, name);
	int count;

	fds[0] = retrieve_fd(session, 0);
	count = count_files(fds[0]);
	for (int i = 1; i <= count; i++)
		fds[i] = retrieve_fd(session, i);
	if (getenv("kho_break") && count)
		break_file(fds[1]);
	for (int i = 0; i <= count; i++)
		print_file(fds[i], i);
	session_finish(session);
	if (again) {
		preserve_files(name, count);
		hold();
	}
}

/* Sessions of this task's own, filled and given up again, again and again. */
static void stress_task(int task, int rounds)
{
	char name[LIVEUPDATE_SESSION_NAME_LENGTH];
	int luo = 0;

	srandom(task);
	for (int round = 0; round < rounds; round++) {
		int sessions[2];

		for (int i = 0; i < 2; i++) {
			struct liveupdate_ioctl_create_session arg = {
				.size = sizeof(arg),
			};

			snprintf(name, sizeof(name), "stress-%d-%d", task, i);
			memcpy(arg.name, name, sizeof(name));
			if (ioctl(luo, LIVEUPDATE_IOCTL_CREATE_SESSION, &arg))
				err(1, "session %s", name);
			sessions[i] = arg.fd;
		}
		for (int i = 0; i < 8; i++) {
			int fd = memfd_create(name, 0);

			write_all(fd, buffer, random() % (sizeof(buffer) / 4));
			preserve_fd(sessions[i % 2], fd, i);
			close(fd);
		}
		close(sessions[round % 2]);
		close(sessions[!(round % 2)]);
	}
	printf("stress: task %d did %d rounds\n", task, rounds);
	fflush(stdout);
	_exit(0);
}

static int stress(int rounds)
{
	int failed = 0, status;

	/* Only one open of the device is allowed: the tasks inherit it. */
	close(0);
	if (open("/dev/liveupdate", O_RDWR) != 0)
		err(1, "/dev/liveupdate");
	for (int task = 1; task <= 2; task++)
		if (!fork())
			stress_task(task, rounds);
	while (wait(&status) > 0)
		failed |= status;
	return !!failed;
}

int main(int argc, char *argv[])
{
	const char *cmd = argc > 1 ? argv[1] : "";

	if (!strcmp(cmd, "preserve") && argc == 4)
		preserve(argv[2], argv[3]);
	else if (!strcmp(cmd, "whole") && argc == 4)
		whole(argv[2], argv[3]);
	else if (!strcmp(cmd, "scatter") && (argc == 4 || argc == 5))
		scatter(argv[2], argv[3], argc == 5 ? atol(argv[4]) : 0);
	else if (!strcmp(cmd, "donate") && argc == 4)
		donate(argv[2], atol(argv[3]));
	else if (!strcmp(cmd, "try") && argc == 3)
		try_preserve(atol(argv[2]));
	else if (!strcmp(cmd, "owned") && argc == 3)
		print_owned(argv[2]);
	else if (!strcmp(cmd, "waiting") && argc == 3)
		print_waiting(argv[2]);
	else if (!strcmp(cmd, "retrieve") && argc == 3)
		retrieve(argv[2], 0);
	else if (!strcmp(cmd, "renew") && argc == 3)
		retrieve(argv[2], 1);
	else if (!strcmp(cmd, "stress") && argc == 3)
		return stress(atoi(argv[2]));
	else if (!strcmp(cmd, "soak") && argc == 4)
		soak_hop(strtoul(argv[2], NULL, 0), atol(argv[3]), stress);
	else if (!strcmp(cmd, "fail-before") && argc == 5)
		fail_before(argv[2], argv[3], argv[4]);
	else if (!strcmp(cmd, "fail-after") && argc == 2)
		fail_after();
	else if (!strcmp(cmd, "load") && argc == 5)
		load_kernel(argv[2], argv[3], argv[4], 0);
	else if (!strcmp(cmd, "load-crash") && argc == 5)
		load_kernel(argv[2], argv[3], argv[4], KEXEC_FILE_ON_CRASH);
	else if (!strcmp(cmd, "kexec") && argc == 2)
		reboot(RB_KEXEC);
	else
		errx(1, "usage: see the source");
	return 0;
}
