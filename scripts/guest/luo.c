// SPDX-License-Identifier: GPL-2.0
/* Live update sessions and kexec; whatever fails ends the program. */
#include <err.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>
#include <linux/kexec.h>
#include "luo.h"

int session_open(unsigned long request, const char *name)
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

int try_preserve_fd(int session, int fd, unsigned long token)
{
	struct liveupdate_session_preserve_fd arg = {
		.size = sizeof(arg), .fd = fd, .token = token,
	};

	return ioctl(session, LIVEUPDATE_SESSION_PRESERVE_FD, &arg);
}

void preserve_fd(int session, int fd, unsigned long token)
{
	if (try_preserve_fd(session, fd, token))
		err(1, "preserve file %lu", token);
}

int retrieve_fd(int session, unsigned long token)
{
	struct liveupdate_session_retrieve_fd arg = {
		.size = sizeof(arg), .token = token,
	};

	if (ioctl(session, LIVEUPDATE_SESSION_RETRIEVE_FD, &arg))
		err(1, "retrieve file %lu", token);
	return arg.fd;
}

void session_finish(int session)
{
	struct liveupdate_session_finish arg = { .size = sizeof(arg) };

	if (ioctl(session, LIVEUPDATE_SESSION_FINISH, &arg))
		err(1, "finish");
	close(session);
}

void load_kernel(const char *image, const char *initrd, const char *args,
		 unsigned long flags)
{
	int image_fd = open(image, O_RDONLY);
	int initrd_fd = open(initrd, O_RDONLY);

	if (image_fd < 0 || initrd_fd < 0)
		err(1, "%s, %s", image, initrd);
	if (syscall(SYS_kexec_file_load, image_fd, initrd_fd, strlen(args) + 1,
		    args, flags))
		err(1, "kexec_file_load");
	close(image_fd);
	close(initrd_fd);
}
