"""Freed memory is kept while a worker lives, and given back after."""

from __future__ import annotations

import json
import platform
import resource
import subprocess
import sys

import pytest

SCRIPT = """
import ctypes, json, resource, sys
import psutil
from disthess.execute.heap import KeptHeap

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p

def round_of_blocks():
    blocks = [libc.malloc(1 << 20) for _ in range(128)]
    for block in blocks:
        ctypes.memset(block, 1, 1 << 20)
    for block in blocks:
        libc.free(ctypes.c_void_p(block))

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

round_of_blocks()
heap = KeptHeap() if sys.argv[1] == "kept" else None
round_of_blocks()
before = faults()
for _ in range(5):
    round_of_blocks()
found = {"faults": faults() - before, "held": psutil.Process().memory_info().rss}
if heap is not None:
    heap.restore()
print(json.dumps({**found, "left": psutil.Process().memory_info().rss}))
"""

BLOCKS = 128 << 20
PAGES = BLOCKS // resource.getpagesize()


def run(how: str) -> dict[str, int]:
    done = subprocess.run([sys.executable, "-c", SCRIPT, how], capture_output=True, text=True, check=True)
    found: dict[str, int] = json.loads(done.stdout)
    return found


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's heap is told to keep memory")
def test_kept_memory_is_not_faulted_in_again_and_goes_back() -> None:
    usual, kept = run("usual"), run("kept")
    assert usual["faults"] > 4 * PAGES
    assert kept["faults"] < PAGES // 10
    assert kept["held"] - kept["left"] > BLOCKS // 2


LARGE = """
import ctypes, json, resource, sys
from disthess.execute.heap import KeptHeap

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p

def faults_of_a_block():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = libc.malloc(64 << 20)
    ctypes.memset(block, 1, 64 << 20)
    libc.free(ctypes.c_void_p(block))
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

inner, outer = KeptHeap(), KeptHeap(large=True)
faults_of_a_block()
inner.restore()
kept = faults_of_a_block()
outer.restore()
outer.restore()
print(json.dumps({"kept": kept, "usual": faults_of_a_block()}))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's heap is told to keep memory")
def test_large_blocks_are_kept_as_long_as_one_of_several_asks_for_it() -> None:
    done = subprocess.run([sys.executable, "-c", LARGE], capture_output=True, text=True, check=True)
    found, pages = json.loads(done.stdout), (64 << 20) // resource.getpagesize()
    assert found["kept"] < pages // 10
    assert found["usual"] > pages // 2
