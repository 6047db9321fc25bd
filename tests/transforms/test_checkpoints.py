"""A run that is saved with orbax and goes on in another process has the curve of one that never stopped."""

import json
import subprocess
import sys

import orbax.checkpoint
import pytest

from tests.source import ROOT
from tests.transforms import resumed


@pytest.fixture(scope="module")
def curves(tmp_path_factory):
    """The losses of every run before the checkpoint, after it, and after it in the new process."""
    folder = tmp_path_factory.mktemp("checkpoints") / "half"
    carry, before = resumed.curves(resumed.start(), resumed.HALF)
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder, carry)
    after = resumed.curves(carry, resumed.STEPS - resumed.HALF)[1]
    command = [sys.executable, "-W", "error", "-m", "tests.transforms.resumed", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return before, after, json.loads(done.stdout)


@pytest.mark.parametrize("name", resumed.OPTIMISERS)
def test_restored_in_a_new_process_it_has_the_same_curve_to_the_last_bit(name, curves):
    before, after, restored = (part[name] for part in curves)
    assert restored == after
    assert len(set(before + after)) == resumed.STEPS  # the run has moved at every step
