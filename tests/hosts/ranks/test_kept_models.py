"""Models that are not in use leave main memory when others need it, the ones used longest ago
first.
"""

import gc
import weakref

import pytest

from hosts.launch.settings import Settings
from hosts.launch.start_plan import plan_start
from hosts.ranks import kept_models
from hosts.ranks.kept_models import KeptModels
from tests.backends.features import TABLE, loaded
from tests.checkpoints import checkpoint

NAMES = ("first", "second", "third")


@pytest.fixture(scope="module")
def start():
    values = {"checkpoint": str(checkpoint("sd1")), "height": 64, "width": 64}
    return plan_start(Settings.from_values(values), TABLE, num_gpus=0, num_ranks=1)


def keep(kept, start):
    """Let the models be used and kept in turn, and return their denoisers, which are gone when
    nothing else holds them.
    """
    found = {}
    for name in NAMES:
        pipeline = loaded(TABLE["sd1"], height=64, width=64)
        found[name] = weakref.ref(pipeline.pipe.unet)
        kept.make_room(start.weight_bytes)
        kept.put(name, start, pipeline)
        del pipeline
    gc.collect()
    return found


@pytest.mark.parametrize(("num_copies", "left"), [(3, NAMES), (2, NAMES[1:]), (1, NAMES[2:])])
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_models_beyond_the_limit_are_unloaded(start, num_copies, left, num_ranks):
    """Each rank has a copy."""
    limit = num_copies * num_ranks * start.weight_bytes
    kept = KeptModels(num_ranks=num_ranks, limit_bytes=limit)
    denoisers = keep(kept, start)
    assert [name for name, one in denoisers.items() if one() is not None] == [*left]
    assert [name for name in NAMES if kept.take(name) is not None] == [*left]


def test_model_that_was_used_again_stays_longer(start):
    kept = KeptModels(limit_bytes=3 * start.weight_bytes)
    keep(kept, start)
    again = kept.take("first")
    kept.put("first", again.start, again.pipeline)
    assert kept.make_room(start.weight_bytes)
    assert [name for name in NAMES if kept.take(name) is not None] == ["first", "third"]


def test_models_are_unloaded_while_memory_is_short(start, monkeypatch, caplog):
    kept = KeptModels()
    denoisers = keep(kept, start)
    assert all(one() is not None for one in denoisers.values())
    monkeypatch.setattr(kept_models, "SPARE", 2.0)  # more than there is
    caplog.set_level("INFO")
    assert not kept.make_room(start.weight_bytes, is_used=True)
    gc.collect()
    assert not any(one() is not None for one in denoisers.values())
    assert caplog.text.count("is unloaded to free main memory") == 3
