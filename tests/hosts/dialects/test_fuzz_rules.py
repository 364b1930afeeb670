"""Bodies of mixed valid and senseless fields to every dialect: never a 5xx, and no traceback.

FUZZ_EXAMPLES sets the number of bodies for each (default 120).
"""

import base64
import io
import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.checkpoints import sample_image
from tests.hosts.application import encode_file
from tests.hosts.dialects.reading import ReadingHost
from tests.hosts.dialects.test_rules import PATHS, PUBLISHED, body

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "120"))
IMAGE = encode_file(sample_image(16))
TYPES = {"/v1/videos": "svd"}
fuzz = settings(
    max_examples=EXAMPLES,
    database=None,
    deadline=None,
    derandomize="FUZZ_EXAMPLES" not in os.environ,
    suppress_health_check=list(HealthCheck),
)


def image_file(kind):
    buffer = io.BytesIO()
    Image.new("RGBA" if kind == "PNG" else "RGB", (9, 5), "red").save(buffer, format=kind)
    return base64.b64encode(buffer.getvalue()).decode()


words = st.sampled_from(
    ["a red car", "", "<lora:x:1>", "(a:1.2)", "\ud83d", "a\u0000", "64x64", "100x1", "auto", "png",
     "url", "true", "0", "-1", "1e9", "Karras", "Euler a", "euler", "none", '{"scheduler": 5}',
     "/etc/passwd", "data:image/png;base64,AAAA", "gASV", "k05VTVBZ", "x" * 3000,
     IMAGE, IMAGE[:60], image_file("PNG"), image_file("JPEG"), image_file("WEBP")]
)  # fmt: skip
numbers = st.sampled_from(
    [0, 1, 2, 3, 5, 8, 64, 72, -1, 0.5, 1.5, 7.0, 1e308, float("nan"), float("inf"), 10**400,
     2**63 - 1, 2**63, 2**64, True, False, None]
)  # fmt: skip
values = st.recursive(
    st.one_of(words, numbers),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from(["args", "image", "controlnet", "enabled", "sd_vae", "a", "image_url",
                             "scheduler", "CLIP_stop_at_last_layers", "x.safetensors"]),
            inner,
            max_size=3,
        ),
    ),
    max_leaves=6,
)  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
def test_no_fields_break_a_dialect(path, caplog):
    names = sorted(PUBLISHED[path][1])
    fields = st.dictionaries(st.sampled_from([*names, "strict", "unheard_of"]), values, max_size=5)
    with ReadingHost(type=TYPES.get(path, "sdxl"), max_steps=100) as host:

        @fuzz
        @given(fields)
        def send(given):
            answer = host.post(path, body(path, **given))
            assert answer.status_code < 500, answer.get_data(as_text=True)
            answer.close()

        send()
    assert "Traceback" not in caplog.text
