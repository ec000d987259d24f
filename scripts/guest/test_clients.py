# SPDX-License-Identifier: GPL-2.0
"""Programs that know nothing of these tests, and hand over what they have with KHO."""
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from . import qemu as g
from .qemu import spoilt
from .test_kexec import C, R, expect

UNIT = """[Service]
Type=oneshot
RemainAfterExit=yes
NotifyAccess=all
FileDescriptorStoreMax=4
FileDescriptorStorePreserve={preserve}
ExecStart=/usr/bin/python3 /fd-store.py {what}
"""
BOOT = "root=kho rootfstype=9p rootflags=trans=virtio,version=9p2000.L,msize=262144 rw " \
    "init=/lib/systemd/systemd systemd.unit=multi-user.target"


def through_systemd(log, kernel, what):
    """A service hands over something with the fd store of systemd, which is init."""
    with tempfile.TemporaryDirectory(prefix="systemd-", dir=g.WORK) as work:
        root = Path(work, "root")
        subprocess.run(["cp", "-a", g.CACHE / "systemd/root", root], check=True)
        shutil.copyfile(g.image(kernel), root / "boot/next")
        shutil.copyfile(g.GUEST / "fd-store.py", root / "fd-store.py")
        units = root / "etc/systemd/system"
        (units / "fd-store.service").write_text(UNIT.format(what=what, preserve=spoilt("yes", "no")))
        (units / "multi-user.target.wants").mkdir(exist_ok=True)
        os.symlink("../fd-store.service", units / "multi-user.target.wants/fd-store.service")
        done = g.qemu(log, kernel, None, f"kho=on liveupdate=on {BOOT}", share=root, smp=2, timeout=900)
        done.expect(2)
        expect("not whole", done.reported(2, "whole"))
    return done


@pytest.mark.long
@pytest.mark.parametrize("kernel", [R, C], ids=["rust", "c"])
def test_systemd(log, note, kernel):
    """R -> R, C -> C by "systemctl kexec": what a service has in its fd store comes back to it"""
    done = through_systemd(log, kernel, "file")
    note(re.search(r"systemd \d+\S*", done.expect_line(2, r"systemd \d+\S* running"))[0])


@pytest.mark.long
@pytest.mark.parametrize("kernel", [R, C], ids=["rust", "c"])
def test_criu(log, note, kernel):
    """R -> R, C -> C: a process goes on from the image that CRIU made of it, which systemd keeps"""
    done = through_systemd(log, kernel, "process")
    first, last = (done.reported(stage, "counted")[0] for stage in (1, 2))
    note(f"a process counted to {first}, and on to {last}")
