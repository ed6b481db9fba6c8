"""What a spectral method says that a dense matrix takes is what the process then takes at most."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CHILD = """
import json, sys
import torch
from devec.core.block import Block
from devec.core.layout import Layout
from devec.core.lazy import LazyDelta
from devec.methods import registry

torch.set_num_threads(1)
METHODS = {
    "tsv-m": {}, "tsv-c": {"task": "A"}, "iso-c": {}, "iso-cts": {}, "star": {}, "knots": {},
    "wudi": {"steps": 2}, "lines": {"blocks": 2, "beta": 0.5, "alpha": 0.5, "inner": "iso-c"},
}

def status(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))

def block(n, m):
    def reader(seed):
        g = torch.Generator().manual_seed(seed)
        noise = torch.randn(1, m, generator=g)  # rows are made on request and kept nowhere
        return lambda a, b: torch.sin(torch.arange(a, b)[:, None] * noise) * 1e-3
    deltas = tuple(LazyDelta((n, m), torch.float32, reader(i)) for i in range(4))
    return Block("h.0.w", Layout((n, m)), tuple("ABCD"), deltas)

found = {}
for name, given in METHODS.items():
    method = registry.get("merge", name)
    method.call(block(96, 64), **given)  # what a library sets up on its first call is not the method's
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = status("VmRSS")
    method.call(block(640, 512), **given)
    found[name] = (status("VmHWM") - before, method.working_bytes((640, 512), 4, given))
print(json.dumps(found))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux to reset the peak")
def test_methods_stay_within_what_they_say() -> None:
    given_back = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # else the next method reuses what one has freed
    run = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, check=True, env=given_back)
    slack = 6 << 20  # the allocator's and the libraries' own, at most
    for name, (taken, stated) in json.loads(run.stdout).items():
        assert taken <= stated + slack, f"{name} took {taken >> 20} MiB and said {stated >> 20}"
        assert stated <= 5 * (taken + slack), f"{name} took {taken >> 20} MiB and said {stated >> 20}"
