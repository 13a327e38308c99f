"""Paths and small models that several test files share."""

import os
import sys
from pathlib import Path

import pytest

slow = pytest.mark.skipif("SLOW" not in os.environ, reason="takes long; SLOW=1 runs it")
os.environ["HF_HUB_OFFLINE"] = "1"  # a name that is no folder is not looked up
if "BERT_DIR" not in os.environ:  # small models alone: more threads wait longer than they work
    os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def later(*values):
    """Values of a parametrised test that only SLOW=1 runs."""
    return pytest.param(*values, marks=slow)


@pytest.fixture(scope="session")
def root():
    """The repository."""
    return ROOT
