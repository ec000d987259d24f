// SPDX-License-Identifier: GPL-2.0
/*
 * What a shell cannot do in the guest: live update sessions and kexec.
 *
 *   preserve SESSION DIR   memfd 0 = DIR/manifest, memfd N = DIR/N
 *   retrieve SESSION       take the session back, print what it holds
 *   renew SESSION          the same, then preserve the same files anew
 *   stress ROUNDS          preserve and unpreserve from two tasks at once
 *   load IMAGE INITRD ARGS load the next kernel
 *   kexec                  start it
 *
 * The manifest has one line per file.  preserve and renew leave a process
 * behind that holds the session open, for closing it gives it up.
 */
#define _GNU_SOURCE
#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>
#include <linux/kexec.h>
#include <linux/liveupdate.h>

#define MAX_FILES	1024

static int fds[MAX_FILES];
static char buffer[1 << 20];

static int session_open(unsigned long request, const char *name)
{
	/* Same layout as struct liveupdate_ioctl_retrieve_session. */
	struct liveupdate_ioctl_create_session arg = { .size = sizeof(arg) };
	int luo = open("/dev/liveupdate", O_RDWR);

	if (luo < 0)
		err(1, "/dev/liveupdate");
	snprintf((char *)arg.name, sizeof(arg.name), "%s", name);
	if (ioctl(luo, request, &arg))
		err(1, "session %s", name);
	close(luo);
	return arg.fd;
}

static void preserve_fd(int session, int fd, unsigned long token)
{
	struct liveupdate_session_preserve_fd arg = {
		.size = sizeof(arg), .fd = fd, .token = token,
	};

	if (ioctl(session, LIVEUPDATE_SESSION_PRESERVE_FD, &arg))
		err(1, "preserve file %lu", token);
}

static int retrieve_fd(int session, unsigned long token)
{
	struct liveupdate_session_retrieve_fd arg = {
		.size = sizeof(arg), .token = token,
	};

	if (ioctl(session, LIVEUPDATE_SESSION_RETRIEVE_FD, &arg))
		err(1, "retrieve file %lu", token);
	return arg.fd;
}

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

static int load_file(const char *dir, const char *name)
{
	char path[4096];
	int in, out;
	ssize_t n;

	snprintf(path, sizeof(path), "%s/%s", dir, name);
	in = open(path, O_RDONLY);
	out = memfd_create(name, 0);
	if (in < 0 || out < 0)
		err(1, "%s", path);
	while ((n = read(in, buffer, sizeof(buffer))) > 0)
		write_all(out, buffer, n);
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

/* Leaves a copy of this process that keeps its files open. */
static void hold(void)
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

static void preserve_files(const char *name, int count)
{
	int session = session_open(LIVEUPDATE_IOCTL_CREATE_SESSION, name);

	for (int i = 0; i <= count; i++)
		preserve_fd(session, fds[i], i);
	hold();
}

static void preserve(const char *name, const char *dir)
{
	char file[16];
	int count;

	fds[0] = load_file(dir, "manifest");
	count = count_files(fds[0]);
	for (int i = 1; i <= count; i++) {
		snprintf(file, sizeof(file), "%d", i);
		fds[i] = load_file(dir, file);
	}
	for (int i = 0; i <= count; i++)
		print_file(fds[i], i);
	preserve_files(name, count);
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
	struct liveupdate_session_finish finish = { .size = sizeof(finish) };
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
	if (ioctl(session, LIVEUPDATE_SESSION_FINISH, &finish))
		err(1, "finish %s", name);
	close(session);
	if (again)
		preserve_files(name, count);
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

static void load(const char *image, const char *initrd, const char *args)
{
	int image_fd = open(image, O_RDONLY);
	int initrd_fd = open(initrd, O_RDONLY);

	if (image_fd < 0 || initrd_fd < 0)
		err(1, "%s, %s", image, initrd);
	if (syscall(SYS_kexec_file_load, image_fd, initrd_fd, strlen(args) + 1,
		    args, 0UL))
		err(1, "kexec_file_load");
}

int main(int argc, char *argv[])
{
	const char *cmd = argc > 1 ? argv[1] : "";

	if (!strcmp(cmd, "preserve") && argc == 4)
		preserve(argv[2], argv[3]);
	else if (!strcmp(cmd, "retrieve") && argc == 3)
		retrieve(argv[2], 0);
	else if (!strcmp(cmd, "renew") && argc == 3)
		retrieve(argv[2], 1);
	else if (!strcmp(cmd, "stress") && argc == 3)
		return stress(atoi(argv[2]));
	else if (!strcmp(cmd, "load") && argc == 5)
		load(argv[2], argv[3], argv[4]);
	else if (!strcmp(cmd, "kexec") && argc == 2)
		reboot(RB_KEXEC);
	else
		errx(1, "usage: see the source");
	return 0;
}
