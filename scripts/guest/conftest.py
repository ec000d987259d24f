# SPDX-License-Identifier: GPL-2.0
"""How pytest runs the tests of guests: what it finds is printed as KTAP, and no test shares a log."""
import os
import re

import pytest

from . import qemu as g


def name_of(nodeid):
    """As on the command line: scatter-4-cpus for test_scatter[4-cpus]."""
    return re.sub(r"[^\w.+]+|_", "-", nodeid.split("::")[-1].removeprefix("test_")).strip("-")


class Ktap:
    number = 0
    # Kinds of damage that cost what they should, and in how many handovers.
    kinds, handovers = set(), 0

    def plan(self, count):
        if not self.number:
            print(f"KTAP version 1\n1..{count}", flush=True)
            self.number = 1

    def pytest_collection_finish(self, session):
        if not session.config.getoption("numprocesses"):
            self.plan(len(session.items))

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids):
        self.plan(len(ids))

    def pytest_collectreport(self, report):
        if report.failed:
            print(f"# {report.nodeid}: {report.longreprtext}".replace("\n", "\n# "), flush=True)

    def pytest_runtest_logreport(self, report):
        if report.when != "call" and report.passed:
            return
        notes = dict(report.user_properties)
        if report.passed and "kinds" in notes:
            self.kinds.update(notes["kinds"])
            self.handovers += 1
        text = notes.get("note", "")
        expected = hasattr(report, "wasxfail")
        crash = getattr(report.longrepr, "reprcrash", None)
        said = crash.message.removeprefix("guest.qemu.Fail: ") if crash else report.longreprtext
        if report.failed:
            # Only what no test expects needs a traceback.
            if not crash or said == crash.message:
                print("# " + report.longreprtext.replace("\n", "\n# "))
            text = f"{said} (log: {notes.get('log')})"
        elif expected:
            text = f"noticed: {said}"
        elif report.skipped:
            text = f"SKIP {report.longrepr[2]}"
        status = "not ok" if report.failed else "ok"
        text = " ".join(text.split()).replace("#", "")
        print(f"{status} {self.number} {name_of(report.nodeid)}{text and f' # {text}'}", flush=True)
        self.number += 1


    def pytest_sessionfinish(self):
        if self.handovers:
            print(f"# {len(self.kinds)} kinds of damage in {self.handovers} handovers, each as expected", flush=True)


def pytest_configure(config):
    config.addinivalue_line("markers", "rare: run only when it is named")
    config.addinivalue_line("markers", "long: run only when it is named, or with KHO_ALL=1")
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Ktap())


def pytest_itemcollected(item):
    item.extra_keyword_matches.add(name_of(item.nodeid))


def pytest_collection_modifyitems(config, items):
    named = config.getoption("keyword")
    left_out = ["rare"] if os.environ.get("KHO_ALL") else ["rare", "long"]
    items[:] = [item for item in items
                if not any(map(item.get_closest_marker, left_out)) or name_of(item.nodeid) in named]
    if os.environ.get("KHO_BREAK"):
        for item in items:
            item.add_marker(pytest.mark.xfail(strict=True))


@pytest.fixture
def log(request, record_property):
    """The file that gets what all kernels of the test say."""
    path = g.CACHE / "log/qemu" / f"{name_of(request.node.nodeid)}.log"
    record_property("log", str(path))
    g.WORK.mkdir(exist_ok=True)
    return path


@pytest.fixture
def note(record_property):
    """Says more of a test that passed than that it did."""
    return lambda text: record_property("note", text)
