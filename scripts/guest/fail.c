// SPDX-License-Identifier: GPL-2.0
/*
 * Allocations that fail, one after the other: each call is made again and again, and the n-th
 * allocation of the n-th time fails, until the call needs no more than that.
 *
 *   before  in the first kernel: what preserves memory, and what loads an image
 *   after   in the second one: what restores the memory that "before" left for that
 */
#define _GNU_SOURCE
#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>
#include <linux/kexec.h>
#include "luo.h"

#define SUMMARY		"/sys/kernel/debug/kho/summary"
/* More than any of the calls takes that restore memory. */
#define SPARE		160
#define FINISHES	60
/* A load takes thousands, most of them for the image: so many of them fail, evenly spread. */
#define LOADS		60
#define SIZE		(300 << 10)

static int fail_nth, luo, session, file, image, initrd;
static const char *args;

static void arm(int nth)
{
	char text[16];
	int len = snprintf(text, sizeof(text), "%d", nth);

	if (pwrite(fail_nth, text, len, 0) != len)
		err(1, "fail-nth");
}

/* Returns how many allocations are left until one fails; from now on none does. */
static int armed(void)
{
	char text[16] = "";
	int saved = errno;

	if (pread(fail_nth, text, sizeof(text) - 1, 0) <= 0)
		err(1, "fail-nth");
	arm(0);
	errno = saved;
	return atoi(text);
}

/* Returns whether an allocation has failed since arm(). */
static int disarm(void)
{
	return armed() == 0;
}

static void set_up(void)
{
	static const char * const knobs[] = {
		"failslab/ignore-gfp-wait", "failslab/verbose", "fail_page_alloc/ignore-gfp-wait",
		"fail_page_alloc/ignore-gfp-highmem", "fail_page_alloc/min-order",
		"fail_page_alloc/verbose",
	};
	char name[96];

	for (size_t i = 0; i < sizeof(knobs) / sizeof(*knobs); i++) {
		snprintf(name, sizeof(name), "/sys/kernel/debug/%s", knobs[i]);
		put(name, "0");
	}
	fail_nth = open("/proc/thread-self/fail-nth", O_RDWR);
	luo = open("/dev/liveupdate", O_RDWR);
	if (fail_nth < 0 || luo < 0)
		err(1, "no fail-nth, or no LUO");
}

static int open_session(unsigned long request, const char *name)
{
	struct liveupdate_ioctl_create_session arg = { .size = sizeof(arg) };

	snprintf((char *)arg.name, sizeof(arg.name), "%s", name);
	return ioctl(luo, request, &arg) ? -1 : arg.fd;
}

static int create(void)
{
	session = open_session(LIVEUPDATE_IOCTL_CREATE_SESSION, "fail");
	return session < 0;
}

static void close_session(void)
{
	close(session);
}

static int preserve(void)
{
	return try_preserve_fd(session, file, 1);
}

/* Only with its session is a file given up. */
static void give_up(void)
{
	close(session);
	if (create())
		err(1, "session");
}

static int load(void)
{
	return syscall(SYS_kexec_file_load, image, initrd, strlen(args) + 1, args, 0UL);
}

static void unload(void)
{
	if (syscall(SYS_kexec_file_load, 0, 0, 0UL, NULL, KEXEC_FILE_UNLOAD))
		err(1, "unload");
}

/* How many allocations a call has. */
static int count(const char *name, int (*call)(void), void (*undo)(void))
{
	int left;

	arm(INT_MAX);
	if (call())
		err(1, "%s", name);
	left = armed();
	undo();
	return INT_MAX - left;
}

/* Makes a call until no allocation of its fails, or so many have. */
static void each(const char *name, int (*call)(void), void (*undo)(void), int most)
{
	int total = count(name, call, undo), failed = 0, worked = 0;
	long blocks = sum(SUMMARY, "out:");

	for (int nth = 1;; nth += 1 + total / most) {
		int result, fired;

		arm(nth);
		result = call();
		fired = disarm();
		if (result && !fired)
			err(1, "%s", name);
		if (result && errno != ENOMEM)
			printf("fail odd: %s, allocation %d: %s\n", name, nth, strerror(errno));
		if (!result)
			undo();
		if (sum(SUMMARY, "out:") != blocks)
			errx(1, "%s: allocation %d failed, and %ld blocks became %ld", name, nth,
			     blocks, sum(SUMMARY, "out:"));
		if (!fired)
			break;
		failed += !!result;
		worked += !result;
		/* Works as soon as there is memory. */
		if (call())
			err(1, "%s after allocation %d failed", name, nth);
		undo();
	}
	printf("fail %s: %d of %d allocations failed, %d times the call did, %d times not\n", name,
	       failed + worked, total, failed, worked);
}

static void account(const char *when)
{
	sync();
	put("/proc/sys/vm/drop_caches", "3");
	/* Empty nodes go a second later. */
	sleep(2);
	printf("fail pages %s %ld, %ld nodes\n", when, settled(count_free), sum(SUMMARY, "nodes:"));
}

static int new_file(int number)
{
	int fd = memfd_create("fail", 0);

	if (fd < 0)
		err(1, "memfd");
	content(fd, number, 1, SIZE, 1);
	return fd;
}

/* Reading it from the host would take allocations of its own. */
static int copy(const char *path)
{
	int from = open(path, O_RDONLY), to = memfd_create("copy", 0);
	struct stat st;

	if (from < 0 || to < 0 || fstat(from, &st) ||
	    sendfile(to, from, NULL, st.st_size) != st.st_size)
		err(1, "%s", path);
	close(from);
	return to;
}

void fail_before(const char *its_image, const char *its_initrd, const char *its_args)
{
	char name[LIVEUPDATE_SESSION_NAME_LENGTH];

	set_up();
	account("before");
	each("create session", create, close_session, INT_MAX);
	file = new_file(0);
	create();
	each("preserve", preserve, give_up, INT_MAX);
	close_session();
	close(file);
	image = copy(its_image);
	initrd = copy(its_initrd);
	args = its_args;
	each("load", load, unload, LOADS);
	close(image);
	close(initrd);
	account("after");
	session = open_session(LIVEUPDATE_IOCTL_CREATE_SESSION, "retrieve");
	for (int i = 0; i < SPARE; i++)
		preserve_fd(session, new_file(i), i);
	for (int i = 0; i < FINISHES; i++) {
		snprintf(name, sizeof(name), "finish-%d", i);
		preserve_fd(open_session(LIVEUPDATE_IOCTL_CREATE_SESSION, name), new_file(i), 0);
	}
	close(luo);
	hold();
}

/* The n-th call has its n-th allocation fail, until one has no so many; then none. */
static int next(int *nth, int fired)
{
	*nth = fired && *nth ? *nth + 1 : 0;
	return *nth;
}

void fail_after(void)
{
	struct liveupdate_session_finish finish = { .size = sizeof(finish) };
	int nth = 1, fired = 1, failed = 0, worked = 0, fds[SPARE], count = 0;
	char name[LIVEUPDATE_SESSION_NAME_LENGTH];

	set_up();
	account("before");
	for (; fired; nth++) {
		arm(nth);
		session = open_session(LIVEUPDATE_IOCTL_RETRIEVE_SESSION, "retrieve");
		fired = disarm();
		if (session >= 0)
			break;
		failed++;
	}
	if (session < 0)
		err(1, "retrieve session");
	printf("fail retrieve session: %d allocations failed, each time the call did\n", failed);
	failed = 0;
	nth = 1;
	fired = 1;
	for (int i = 0; i < SPARE; i++) {
		struct liveupdate_session_retrieve_fd arg = { .size = sizeof(arg), .token = i };
		int result;

		arm(nth);
		result = ioctl(session, LIVEUPDATE_SESSION_RETRIEVE_FD, &arg);
		fired = disarm() && nth;
		if (result && !fired)
			err(1, "retrieve file %d", i);
		failed += !!result;
		worked += !result && fired;
		if (!result) {
			content(arg.fd, i, 1, SIZE, 0);
			fds[count++] = arg.fd;
		}
		next(&nth, fired);
	}
	if (fired)
		errx(1, "not all allocations have failed");
	printf("fail retrieve: %d allocations failed, %d times the call did, %d times not\n",
	       failed + worked, failed, worked);
	session_finish(session);
	while (count)
		close(fds[--count]);
	worked = 0;
	nth = 1;
	fired = 1;
	for (int i = 0; i < FINISHES; i++) {
		snprintf(name, sizeof(name), "finish-%d", i);
		session = open_session(LIVEUPDATE_IOCTL_RETRIEVE_SESSION, name);
		arm(nth);
		if (session < 0 || ioctl(session, LIVEUPDATE_SESSION_FINISH, &finish))
			err(1, "%s", name);
		fired = disarm() && nth;
		worked += fired;
		next(&nth, fired);
		close(session);
	}
	if (fired)
		errx(1, "not all allocations have failed");
	printf("fail finish: %d allocations failed, and the call never\n", worked);
	account("after");
	close(luo);
}
