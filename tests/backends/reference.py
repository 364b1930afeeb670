"""What all ranks compare with, computed by one of them: references need no second opinion, and the
cores are few.
"""

from collections.abc import Callable
from typing import Any

import torch.distributed as dist


def from_rank_zero(compute: Callable[[], Any]) -> Any:
    """What rank 0 computes, on all ranks. Every rank calls this alike; `compute` must need no other
    rank.
    """
    box = [compute() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(box)
    return box[0]
