#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0
"""fd-store.py file|process: a service that puts something into systemd's fd store, starts the
next kernel, and finds it there again: a file, or the image that CRIU made of a process."""
import hashlib
import os
import socket
import subprocess
import sys
import time

PATTERN = b"".join(hashlib.sha256(page.to_bytes(8, "little")).digest() * 128 for page in range(2048))
IMAGE, COUNT = "/run/image", "/count"
COUNTER = f"""
import os, time
ballast = bytearray(os.urandom(1 << 20))
digest, number = hash(bytes(ballast)), 0
while hash(bytes(ballast)) == digest:
    number += 1
    with open("{COUNT}.new", "w") as file:
        print(os.getpid(), number, file=file)
    os.rename("{COUNT}.new", "{COUNT}")
    time.sleep(0.1)
"""


def report(text):
    with open("/result", "a") as result:
        print(2 if second else 1, text, file=result)


def end(how):
    report("done")
    os.sync()
    subprocess.run(["systemctl", "--no-block", how], check=True)


def criu(verb, *args):
    if subprocess.run(["criu", verb, "-D", IMAGE, "-o", "/criu.log", "-v4", *args]).returncode:
        with open("/criu.log") as file:
            errors = [line.strip() for line in file if "Error" in line]
        report(f"failed: criu {verb}: {' '.join(errors)}")
        end("poweroff")
        sys.exit(1)


def count():
    with open(COUNT) as file:
        return [int(word) for word in file.read().split()]


def content():
    """What is to be kept."""
    if sys.argv[1] == "file":
        return PATTERN
    os.mkdir(IMAGE)
    # The process is to get its number again, which no other may have by then.
    with open("/proc/sys/kernel/ns_last_pid", "w") as file:
        file.write("20000")
    process = subprocess.Popen([sys.executable, "-c", COUNTER], start_new_session=True, cwd="/",
                               stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not os.path.exists(COUNT) or count()[1] < 5:
        time.sleep(0.1)
    criu("dump", "-t", str(process.pid))
    report(f"counted {count()[1]}")
    return subprocess.run(["tar", "-C", IMAGE, "-c", "."], stdout=subprocess.PIPE, check=True).stdout


def came_back(kept):
    if sys.argv[1] == "file":
        return kept == PATTERN
    pid, number = count()
    os.mkdir(IMAGE)
    subprocess.run(["tar", "-C", IMAGE, "-x"], input=kept, check=True)
    criu("restore", "-d")
    for _ in range(600):
        if count() > [pid, number + 5]:
            break
        time.sleep(0.1)
    report(f"counted {count()[1]}")
    return count() > [pid, number + 5]


with open("/proc/cmdline") as file:
    line = file.read().strip()
second = "kho_second" in line
if not second:
    fd = os.memfd_create("kept")
    os.write(fd, content())
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.connect(os.environ["NOTIFY_SOCKET"].replace("@", "\0"))
        socket.send_fds(systemd, [b"FDSTORE=1\nFDNAME=kept"], [fd])
    subprocess.run(["kexec", "-s", "-l", "/boot/next", f"--append={line} kho_second"], check=True)
    end("kexec")
elif os.environ.get("LISTEN_FDNAMES") != "kept":
    report("failed: systemd has nothing")
    end("poweroff")
else:
    # What systemd passes begins at 3.
    size = os.fstat(3).st_size
    report("whole" if came_back(os.pread(3, size, 0)) else "failed: it is not what it was")
    end("poweroff")
