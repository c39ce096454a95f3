"""What processes do with freed memory, seen from outside: page faults and resident pages of a process of its own."""

import ctypes
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import heap

pytestmark = pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library has no mallopt: freed memory is its own affair"
)
MB = 1 << 20
BLOCK = 64 * MB
LOOP = f"""
import resource, ctypes
from experiments import heap
PAGE = resource.getpagesize()
C = ctypes.CDLL(None)
C.malloc.restype, C.malloc.argtypes, C.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]

def touch(times):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        block = C.malloc({BLOCK})
        ctypes.memset(block, 1, {BLOCK})
        C.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * PAGE
"""


def told(script: str) -> list[int]:
    """The numbers that `script` prints, run after LOOP."""
    done = subprocess.run([sys.executable, "-c", LOOP + script], capture_output=True, text=True, check=True)
    return [int(number) for number in done.stdout.split()]


def test_a_block_that_was_freed_is_not_mapped_anew_once_freed_memory_is_kept() -> None:
    before, kept, after = told("print(touch(8)); print(int(heap.keep_freed())); touch(1); print(touch(8))")
    pages = BLOCK // resource.getpagesize()
    assert kept == 1
    assert before > 4 * pages, "malloc keeps such blocks by itself here: the setting does nothing"
    assert after < pages // 4


def test_blocks_that_a_thread_frees_are_kept_as_well() -> None:
    script = """
import threading
heap.keep_freed()
found = []
def work():
    touch(1)
    found.append(touch(8))
thread = threading.Thread(target=work)
thread.start()
thread.join()
print(found[0])
"""
    assert told(script)[0] < BLOCK // resource.getpagesize() // 4


def test_memory_that_is_given_back_is_no_longer_resident() -> None:
    held, left = told("heap.keep_freed(); touch(1); print(resident()); heap.give_back(); print(resident())")
    assert held - left > BLOCK * 3 // 4


def test_a_subject_on_the_cpu_keeps_freed_memory(tiny_folder: Path) -> None:
    script = f"""
from experiments.spec import SubjectSpec
from experiments.subject import load
load(SubjectSpec(model={str(tiny_folder)!r}, dtype="float32"), "cpu")
touch(1)
print(touch(8))
"""
    assert told(script)[0] < BLOCK // resource.getpagesize() // 4


def test_without_the_settings_nothing_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda _: object())
    assert not heap.keep_freed()
    heap.give_back()


def test_a_worker_that_lets_go_of_its_subject_gives_the_memory_back(tiny_folder: Path) -> None:
    script = f"""
from experiments.spec import SubjectSpec
from orchestrator.workspace import Workspace
workspace = Workspace(threads=1)
workspace.engine(SubjectSpec(model={str(tiny_folder)!r}, dtype="float32"))
touch(1)
print(resident())
workspace.drop()
print(resident())
"""
    held, left = told(script)
    assert held - left > BLOCK * 3 // 4
