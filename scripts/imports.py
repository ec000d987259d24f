# SPDX-License-Identifier: GPL-2.0
"""Prints which of the files kho*.rs uses which, the lowest first; fails if that is a circle."""
import graphlib
import re
import sys
from pathlib import Path

# In "use", in a path, or in a list with braces: super::kho_word, crate::{kho_key, kho_word::Word}.
PATH = re.compile(r"\b(?:super|crate)::(?:\{([^;]*?)\};|(\w+))")


def uses(text):
    text = re.sub(r"//.*", "", text)
    for listed, name in PATH.findall(text):
        yield from re.findall(r"\w+", listed) if listed else [name]


def main(top):
    files = {path.stem: path.read_text() for path in Path(top).glob("kho*.rs")}
    root = files.pop("kho")
    # Its constants are what a file is compiled for, which is another machine on the host.
    things = set(re.findall(r"\b(?:fn|static|struct|enum|trait|type|macro_rules!) (\w+)", root))
    graph = {"kho": set(re.findall(r"^mod (\w+);", root, re.M)) & files.keys()}
    for name, text in files.items():
        graph[name] = {used if used in files else "kho" for used in uses(text) if used in files or used in things}
        graph[name].discard(name)
    try:
        for name in graphlib.TopologicalSorter(graph).static_order():
            print(f"{name}: {' '.join(sorted(graph[name]))}")
    except graphlib.CycleError as circle:
        sys.exit(f"a circle: {' -> '.join(reversed(circle.args[1]))}")


main(sys.argv[1])
