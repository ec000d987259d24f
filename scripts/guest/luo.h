/* SPDX-License-Identifier: GPL-2.0 */
#ifndef KHO_GUEST_LUO_H
#define KHO_GUEST_LUO_H

#include <linux/liveupdate.h>

/* request: LIVEUPDATE_IOCTL_CREATE_SESSION or LIVEUPDATE_IOCTL_RETRIEVE_SESSION. */
int session_open(unsigned long request, const char *name);
int try_preserve_fd(int session, int fd, unsigned long token);
void preserve_fd(int session, int fd, unsigned long token);
int retrieve_fd(int session, unsigned long token);
/* Leaves a copy of this process that keeps its files open. */
void hold(void);
/* Closes the session as well. */
void session_finish(int session);
/* flags: of kexec_file_load(). */
void load_kernel(const char *image, const char *initrd, const char *args,
		 unsigned long flags);
/* fail.c; the arguments are those of load_kernel(). */
void fail_before(const char *image, const char *initrd, const char *args);
void fail_after(void);
/* soak.c: writes what this version of a file has, or compares it. */
void content(int fd, int file, long version, long size, int write);
/* The sum of the numbers that follow a word in a file. */
long sum(const char *name, const char *word);
long count_free(void);
long settled(long (*count)(void));
void put(const char *name, const char *text);
/* churn: what lets sessions come and go, returns 0 if all went well. */
void soak_hop(unsigned long seed, long hop, int (*churn)(int rounds));

#endif
