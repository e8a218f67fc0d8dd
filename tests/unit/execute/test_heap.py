"""Freed memory is kept while a worker lives, and given back after."""

from __future__ import annotations

import json
import platform
import subprocess
import sys

import pytest

SCRIPT = """
import json, resource, sys
import psutil, torch
from disthess.execute.heap import KeptHeap

def round_of_blocks():
    blocks = [torch.ones(5 << 20) for _ in range(6)]
    del blocks

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

torch.set_num_threads(1)
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

BLOCKS = 6 * (5 << 20) * 4
PAGES = BLOCKS // 4096


def run(how: str) -> dict[str, int]:
    done = subprocess.run([sys.executable, "-c", SCRIPT, how], capture_output=True, text=True, check=True)
    found: dict[str, int] = json.loads(done.stdout)
    return found


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's heap is told to keep memory")
def test_kept_memory_is_not_faulted_in_again_and_goes_back() -> None:
    usual, kept = run("usual"), run("kept")
    assert usual["faults"] > 2 * PAGES
    assert 5 * kept["faults"] < usual["faults"]
    assert kept["held"] - kept["left"] > BLOCKS // 2
