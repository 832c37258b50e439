"""Put the project's folder on the path, keep torch to one thread (the tests' networks are tiny), leave out slow tests."""

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]
torch.set_num_threads(1)


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes long; run with `python -m pytest -m slow`")
    config.addinivalue_line("markers", "alone: slow, and measures time or memory, so it wants the machine to itself")


def pytest_collection_modifyitems(config, items):
    if not config.option.markexpr:
        skipped = [item for item in items if "slow" in item.keywords]
        config.hook.pytest_deselected(items=skipped)
        items[:] = [item for item in items if item not in skipped]


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture
def text():
    """Builds the text of B captions of L tokens, the last `padding` of them padding, as CLIP would give it."""
    def make(B=2, L=6, width=16, d=8, padding=0, vocab=50):
        mask = torch.arange(L).expand(B, L) < L - padding
        return {"tokens": torch.randint(vocab, (B, L)), "states": torch.randn(B, L, width), "z_t": torch.randn(B, d), "mask": mask}
    return make
