// SPDX-License-Identifier: GPL-2.0
/*
 * One hop of "make soak": takes the files back that the last kernel preserved, checks each
 * byte, releases some, changes some, adds some, and preserves them again.
 *
 * What there is, in which session, and each byte, follow from the seed and the numbers of the
 * hop, the file and the page: nothing that was handed over says what is right.
 */
#define _GNU_SOURCE
#include <err.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>
#include "luo.h"

#define PAGE		4096L
#define FILES		128
#define SESSIONS	12
/* The largest file has less than so many bytes, as a power of 2. */
#define LARGEST		24
/* Rounds of sessions that come and go while those of the hop are filled. */
#define CHURN		4
/* Memory that is never overwritten, for other programs ... */
#define LEFT		(48L << 20)
/*
 * ... and what is given back for files. The first hop writes some 45 MiB, in huge pages twice as
 * much, and half of what is free may be scratch, which slab cannot use.
 */
#define ROOM		(144L << 20)
/* Two readings in a row that differ by no more pages than this agree. */
#define AGREE		32
#define READINGS	100

/* What becomes of a file: it stays, is written anew, is closed, is not even taken back. */
enum fate { KEEP, CHANGE, RELEASE, DISCARD };

static struct file {
	/* The hop that wrote it, or 0 if there is none. */
	long version;
	long size;
	int fd;
} files[FILES];

static unsigned long seed;
static unsigned long words[256 * PAGE / sizeof(long)];
static unsigned long found[256 * PAGE / sizeof(long)];

/* A number that three others choose, as splitmix64. */
static unsigned long choose(unsigned long a, unsigned long b, unsigned long c)
{
	unsigned long x = seed;

	for (int i = 0; i < 3; i++) {
		x += 0x9e3779b97f4a7c15 + (i == 0 ? a : i == 1 ? b : c);
		x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9;
		x = (x ^ x >> 27) * 0x94d049bb133111eb;
		x ^= x >> 31;
	}
	return x;
}

/* What a hop does to a file that there is. */
static enum fate fate(long hop, int file)
{
	int choice = choose(hop, file, 0) % 8;

	return choice > DISCARD ? KEEP : choice;
}

/* Notes what a hop does to a file; returns whether that writes it. */
static int plan(long hop, int file)
{
	struct file *it = &files[file];
	unsigned long choice = choose(hop, file, 1);

	if (it->version && fate(hop, file) >= RELEASE) {
		it->version = 0;
	} else if (it->version ? fate(hop, file) == CHANGE : choice & 1) {
		it->version = hop;
		it->size = choice >> 16 & ((1UL << (choice >> 8) % (LARGEST + 1)) - 1);
		return 1;
	}
	return 0;
}

/* The session that a hop puts a file into. */
static int session_of(long hop, int file)
{
	return choose(hop, file, 2) % (1 + choose(hop, 0, 3) % SESSIONS);
}

static void session_name(char *name, long hop, int session)
{
	snprintf(name, LIVEUPDATE_SESSION_NAME_LENGTH, "soak-%ld-%d", hop, session);
}

static void fill(int file, long version, long page, unsigned long *to)
{
	unsigned long x = choose(file, version, page);

	for (size_t i = 0; i < PAGE / sizeof(*to); i++) {
		x = x * 6364136223846793005 + 1442695040888963407;
		to[i] = x;
	}
}

void content(int fd, int file, long version, long size, int write)
{
	for (long at = 0; at < size; at += sizeof(words)) {
		long len = size - at < (long)sizeof(words) ? size - at : (long)sizeof(words);

		for (long i = 0; i < len; i += PAGE)
			fill(file, version, (at + i) / PAGE, words + i / sizeof(long));
		if (write && pwrite(fd, words, len, at) != len)
			err(1, "file %d", file);
		if (write)
			continue;
		if (pread(fd, found, len, at) != len)
			err(1, "file %d", file);
		for (long i = 0; memcmp(words, found, len) && i < len; i++)
			if (((char *)words)[i] != ((char *)found)[i])
				errx(1, "file %d of hop %ld differs at byte %ld of %ld", file,
				     version, at + i, size);
	}
}

/* Adds up the numbers behind either of two words. */
static long sum2(const char *name, const char *word, const char *other)
{
	FILE *file = fopen(name, "r");
	char text[64];
	long all = 0, one;

	if (!file)
		err(1, "%s", name);
	while (fscanf(file, "%63s", text) == 1)
		if ((!strcmp(text, word) || !strcmp(text, other)) && fscanf(file, "%ld", &one) == 1)
			all += one;
	fclose(file);
	return all;
}

long sum(const char *name, const char *word)
{
	return sum2(name, word, word);
}

/* How many pages are free, in the buddy allocator or on the lists of a CPU. */
long count_free(void)
{
	return sum2("/proc/zoneinfo", "nr_free_pages", "count:");
}

/*
 * What a count of pages is when two readings agree. For some milliseconds thousands are on
 * their way from a CPU's lists to the buddy allocator, isolated by kcompactd, or behind the end
 * of a file in a huge page that is being split: one reading may miss them or count them twice.
 */
long settled(long (*count)(void))
{
	long last = -1, now = -1;

	for (int reading = 0; reading < READINGS; reading++) {
		last = now;
		now = count();
		if (last >= 0 && labs(now - last) <= AGREE)
			return now;
		usleep(10000);
	}
	errx(1, "a count of pages does not settle: %ld, then %ld", last, now);
}

void put(const char *name, const char *text)
{
	int fd = open(name, O_WRONLY);

	if (fd < 0 || write(fd, text, strlen(text)) < 0)
		err(1, "%s", name);
	close(fd);
}

/* How large the folios are that memfds get. */
static void choose_orders(long hop)
{
	static const char * const policies[] = { "never", "within_size", "always", "advise" };
	char name[96];

	put("/sys/kernel/mm/transparent_hugepage/shmem_enabled", policies[choose(hop, 0, 4) % 3]);
	for (int order = 2; order <= 9; order++) {
		snprintf(name, sizeof(name),
			 "/sys/kernel/mm/transparent_hugepage/hugepages-%ldkB/shmem_enabled",
			 (PAGE << order) >> 10);
		put(name, order == 9 ? "inherit" : policies[choose(hop, order, 4) % 3]);
	}
}

/* Leaves a task behind that has overwritten nearly all free memory, and keeps most of it. */
static pid_t press(void)
{
	long size = (sum("/proc/meminfo", "MemAvailable:") << 10) - LEFT;
	int ready[2];
	pid_t child;
	char *mem;

	if (pipe(ready))
		err(1, "memory pressure");
	child = fork();
	if (child < 0)
		err(1, "memory pressure");
	if (!child) {
		/* If a byte differs, that is the end of the hop, and the output. */
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		mem = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		if (mem == MAP_FAILED)
			err(1, "%ld bytes", size);
		memset(mem, 0x55, size);
		munmap(mem, ROOM);
		if (write(ready[1], "", 1) != 1)
			err(1, "memory pressure");
		for (;;)
			pause();
	}
	close(ready[1]);
	if (read(ready[0], &ready[1], 1) != 1)
		errx(1, "no memory pressure");
	close(ready[0]);
	return child;
}

/* Takes back what the last hop preserved, but for what is discarded. */
static void retrieve(long last)
{
	char name[LIVEUPDATE_SESSION_NAME_LENGTH];
	int sessions = 1 + choose(last, 0, 3) % SESSIONS;
	unsigned long taken = 0, bytes = 0, discarded = 0;

	for (int s = 0; s < sessions; s++) {
		int session;

		session_name(name, last, s);
		session = session_open(LIVEUPDATE_IOCTL_RETRIEVE_SESSION, name);
		for (int i = 0; i < FILES; i++) {
			struct file *it = &files[i];
			struct stat st;

			if (!it->version || session_of(last, i) != s)
				continue;
			if (fate(last + 1, i) == DISCARD) {
				discarded++;
				continue;
			}
			it->fd = retrieve_fd(session, i);
			if (fstat(it->fd, &st) || st.st_size != it->size)
				errx(1, "file %d has %ld bytes, not %ld",
				     i, (long)st.st_size, it->size);
			if (getenv("kho_break") && it->size &&
			    pwrite(it->fd, "", 1, it->size / 2) != 1)
				err(1, "break");
			content(it->fd, i, it->version, it->size, 0);
			taken++;
			bytes += it->size;
		}
		session_finish(session);
	}
	printf("soak verified %lu files, %lu bytes, in %d sessions; %lu files discarded\n",
	       taken, bytes, sessions, discarded);
}

/* Changes the files as a hop does. */
static void change(long hop)
{
	for (int i = 0; i < FILES; i++) {
		struct file *it = &files[i];
		int was = it->version != 0;

		if (was && fate(hop, i) == RELEASE)
			close(it->fd);
		if (plan(hop, i)) {
			if (!was)
				it->fd = memfd_create("soak", 0);
			if (it->fd < 0 || ftruncate(it->fd, it->size))
				err(1, "file %d", i);
			content(it->fd, i, it->version, it->size, 1);
		}
	}
}

/* How many pages the files have. */
static long count_pages(void)
{
	long pages = 0;
	struct stat st;

	for (int i = 0; i < FILES; i++) {
		if (files[i].version && fstat(files[i].fd, &st))
			err(1, "file %d", i);
		pages += files[i].version ? st.st_blocks * 512 / PAGE : 0;
	}
	return pages;
}

static long count_free_and_held(void)
{
	return count_free() + count_pages();
}

/* Preserves the files, from all processors at once, while other sessions come and go. */
static void preserve(long hop, int (*churn)(int rounds))
{
	int sessions = 1 + choose(hop, 0, 3) % SESSIONS, cpus = sysconf(_SC_NPROCESSORS_ONLN);
	char name[LIVEUPDATE_SESSION_NAME_LENGTH];
	int fds[SESSIONS], failed = 0, status;

	for (int s = 0; s < sessions; s++) {
		session_name(name, hop, s);
		fds[s] = session_open(LIVEUPDATE_IOCTL_CREATE_SESSION, name);
	}
	fflush(stdout);
	if (!fork())
		_exit(churn(CHURN));
	for (int task = 0; task < cpus; task++) {
		cpu_set_t cpu;

		if (fork())
			continue;
		CPU_ZERO(&cpu);
		CPU_SET(task, &cpu);
		if (sched_setaffinity(0, sizeof(cpu), &cpu))
			err(1, "processor");
		for (int i = 0; i < FILES; i++)
			if (files[i].version && session_of(hop, i) % cpus == task)
				preserve_fd(fds[session_of(hop, i)], files[i].fd, i);
		_exit(0);
	}
	while (wait(&status) > 0)
		failed |= status;
	if (failed)
		errx(1, "a task failed");
}

/* With kho_leak set each hop hands over a MiB more that nobody knows of. */
static void leak(long hop)
{
	int session, fd = memfd_create("leak", 0);

	if (hop > 1) {
		session = session_open(LIVEUPDATE_IOCTL_RETRIEVE_SESSION, "leak");
		fd = retrieve_fd(session, 0);
		session_finish(session);
	}
	if (fallocate(fd, 0, 0, hop << 20))
		err(1, "leak");
	preserve_fd(session_open(LIVEUPDATE_IOCTL_CREATE_SESSION, "leak"), fd, 0);
}

void soak_hop(unsigned long its_seed, long hop, int (*churn)(int rounds))
{
	pid_t pressure;
	long held, cpus = sysconf(_SC_NPROCESSORS_ONLN);

	seed = its_seed;
	for (long past = 1; past < hop; past++)
		for (int i = 0; i < FILES; i++)
			plan(past, i);
	pressure = press();
	if (hop > 1)
		retrieve(hop - 1);
	choose_orders(hop);
	change(hop);
	kill(pressure, SIGKILL);
	waitpid(pressure, NULL, 0);
	if (getenv("kho_leak"))
		leak(hop);
	sync();
	/* What huge pages have behind the end of a file may go with the caches. */
	put("/proc/sys/vm/drop_caches", "3");
	printf("soak pages %ld in all, %ld free or in files\n",
	       sum("/proc/meminfo", "MemTotal:") / (PAGE >> 10), settled(count_free_and_held));
	held = count_pages();
	preserve(hop, churn);
	printf("soak preserved %ld pages from %ld processors\n", held, cpus);
	hold();
}
