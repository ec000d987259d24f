// SPDX-License-Identifier: GPL-2.0
/*
 * The only program of a guest of the benchmark: static, so that no other file
 * is needed on any architecture, and no host takes part.
 *
 * Where the initramfs has /next, that kernel is loaded with /next.initrd and
 * /next.cmdline and started; else the guest ends.  With kho_memfd=BYTES the
 * first kernel preserves a memfd of that size in a live update session, and the
 * second one retrieves it.  kho_huge: of huge pages.
 */
#define _GNU_SOURCE
#include <err.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/syscall.h>
#include <unistd.h>
#include <linux/kexec.h>
#include <linux/liveupdate.h>

#define SESSION	"kho-bench"
#define PAGE	4096UL
#define MAGIC	0x6b686f2d6d656d66ULL	/* "kho-memf" */

/* The kernel's get_cycles(). */
static unsigned long long ticks(void)
{
#ifdef __x86_64__
	return __builtin_ia32_rdtsc();
#else
	unsigned long long value;

	asm volatile("isb; mrs %0, cntvct_el0" : "=r" (value));
	return value;
#endif
}

static void report(const char *what, unsigned long long taken, unsigned long count)
{
	printf("kho_bench: %s %llu %lu\n", what, taken, count);
	fflush(stdout);
}

static void end(int how)
{
	fflush(stdout);
	sync();
	reboot(how);
	for (;;)
		pause();
}

static void fail(const char *what)
{
	printf("kho_bench: FAILED: %s: %m\n", what);
	end(RB_POWER_OFF);
}

static int session(unsigned long request)
{
	/* Same layout as struct liveupdate_ioctl_retrieve_session. */
	struct liveupdate_ioctl_create_session arg = {
		.size = sizeof(arg), .name = SESSION,
	};
	int luo = open("/dev/liveupdate", O_RDWR);

	if (luo < 0 || ioctl(luo, request, &arg))
		fail("session");
	close(luo);
	return arg.fd;
}

static unsigned long long *map(int fd, size_t size)
{
	void *start = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);

	if (start == MAP_FAILED)
		fail("mmap");
	return start;
}

static void preserve(size_t size, int huge)
{
	struct liveupdate_session_preserve_fd arg = { .size = sizeof(arg) };
	int sfd = session(LIVEUPDATE_IOCTL_CREATE_SESSION);
	unsigned long long start, *data;
	int shmem;

	if (huge) {
		shmem = open("/sys/kernel/mm/transparent_hugepage/shmem_enabled", O_WRONLY);
		if (shmem < 0 || write(shmem, "always", 6) != 6)
			fail("shmem_enabled");
		close(shmem);
	}
	arg.fd = memfd_create("bench", 0);
	if (arg.fd < 0 || ftruncate(arg.fd, size))
		fail("memfd");
	data = map(arg.fd, size);
	for (size_t at = 0; at < size; at += PAGE)
		data[at / sizeof(*data)] = MAGIC ^ at;
	munmap(data, size);

	start = ticks();
	if (ioctl(sfd, LIVEUPDATE_SESSION_PRESERVE_FD, &arg))
		fail("preserve");
	report("memfd_preserve", ticks() - start, size / PAGE);
}

static void retrieve(size_t size)
{
	struct liveupdate_session_retrieve_fd arg = { .size = sizeof(arg) };
	struct liveupdate_session_finish finish = { .size = sizeof(finish) };
	int sfd = session(LIVEUPDATE_IOCTL_RETRIEVE_SESSION);
	unsigned long long start, *data;

	start = ticks();
	if (ioctl(sfd, LIVEUPDATE_SESSION_RETRIEVE_FD, &arg))
		fail("retrieve");
	report("memfd_retrieve", ticks() - start, size / PAGE);
	data = map(arg.fd, size);
	for (size_t at = 0; at < size; at += PAGE)
		if (data[at / sizeof(*data)] != (MAGIC ^ at))
			fail("content");
	if (ioctl(sfd, LIVEUPDATE_SESSION_FINISH, &finish))
		fail("finish");
}

/* What is in a small file, without the line's end. */
static char *contents(const char *path)
{
	static char text[4096];
	int fd = open(path, O_RDONLY);
	ssize_t n = fd < 0 ? -1 : read(fd, text, sizeof(text) - 1);

	if (n < 0)
		fail(path);
	close(fd);
	text[n] = 0;
	text[strcspn(text, "\n")] = 0;
	return text;
}

static void next_kernel(int image)
{
	int initrd = open("/next.initrd", O_RDONLY);
	char *args = contents("/next.cmdline");

	if (syscall(SYS_kexec_file_load, image, initrd, strlen(args) + 1, args, 0UL))
		fail("kexec_file_load");
	end(RB_KEXEC);
}

int main(void)
{
	int next = open("/next", O_RDONLY);
	const char *memfd;

	if (mount("proc", "/proc", "proc", 0, NULL) ||
	    mount("sysfs", "/sys", "sysfs", 0, NULL) ||
	    (mount("devtmpfs", "/dev", "devtmpfs", 0, NULL) && access("/dev/null", F_OK)))
		fail("mount");
	memfd = strstr(contents("/proc/cmdline"), "kho_memfd=");
	if (memfd) {
		size_t size = strtoull(memfd + strlen("kho_memfd="), NULL, 10);

		if (next >= 0)
			preserve(size, !!strstr(memfd, "kho_huge"));
		else
			retrieve(size);
		report("memfd_done", 0, 0);
	}
	if (next >= 0)
		next_kernel(next);
	end(RB_POWER_OFF);
}
