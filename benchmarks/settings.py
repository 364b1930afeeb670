"""The measured option sets by backend: name -> launch options for the backend's `make_plan`.

Each name is a row of the result. A setting that does not fit the number of ranks or the model is
reported with its refusal.
"""

from types import MappingProxyType

PATCHES = {"no_split_batch": True}
SEGMENTS = {"model_n": 2, "stride": 1}

SETTINGS = MappingProxyType(
    {
        "distrifuser": {
            "cfg_split": {},
            "full_sync": PATCHES | {"sync_mode": "full_sync"},
            "corrected_async_gn": PATCHES | {"sync_mode": "corrected_async_gn"},
            "corrected_plain": PATCHES | {"sync_mode": "corrected_async_gn", "extrapolate": False},
            "stale_gn": PATCHES | {"sync_mode": "stale_gn"},
            "sync_gn": PATCHES | {"sync_mode": "sync_gn"},
            "separate_gn": PATCHES | {"sync_mode": "separate_gn"},
            "no_sync": PATCHES | {"sync_mode": "no_sync"},
            "rotate": PATCHES | {"sync_mode": "rotate"},
            "naive_patch": PATCHES | {"parallelism": "naive_patch"},
            "tensor": PATCHES | {"parallelism": "tensor"},
        },
        "asyncdiff": {
            "cfg_split": {"use_cfg_parallel": True},
            "segments_2_1": SEGMENTS,
            "segments_2_1_plain": SEGMENTS | {"extrapolate": False},
            "segments_2_1_shifted": SEGMENTS | {"time_shift": True},
            "segments_2_1_shifted_extrapolated": SEGMENTS
            | {"time_shift": True, "extrapolate": True},
            "segments_2_2": SEGMENTS | {"stride": 2},
            "segments_3_1": SEGMENTS | {"model_n": 3},
            "cfg_and_segments": SEGMENTS | {"use_cfg_parallel": True},
        },
        "xdit": {
            "cfg": {"use_cfg_parallel": True},
            "ulysses": {"ulysses_degree": 2},
            "ring": {"ring_degree": 2},
            "pipefusion": {"pipefusion_parallel_degree": 2},
        },
    }
)
