"""/openapi.json: valid, and every field in it is read by the host it describes."""

import pytest
from openapi_spec_validator import validate

from backends.errors import RequestError
from backends.model_table import read_table
from hosts.http.decode import Accepted, read_request
from hosts.http.schema import openapi
from hosts.launch.settings import Settings
from tests.checkpoints import NAMES

EVERYTHING = Settings.from_values(
    {"compel": "true", "control_net": "/c", "ip_adapter": '{"/i": 1}', "lora_dir": "/"}
)

LISTS = ("sigmas", "timesteps")
"""Their range is the scheduler's."""


@pytest.mark.parametrize("name", NAMES)
def test_schema_of_every_type_is_valid_and_has_its_defaults(name):
    spec = read_table()[name]
    document = openapi(spec, Settings.from_values({"height": "64"}))
    validate(document)
    fields = document["components"]["schemas"]["Request"]["properties"]
    assert fields["height"]["default"] == 64 and fields["width"]["default"] == spec.width
    assert all("description" in facts for facts in fields.values())
    assert ("num_frames" in fields) == (spec.output == "video")
    assert (
        "lora" not in fields
        and "control_image" not in fields
        and "control_guidance_end" not in fields
    )
    assert f"Multiples of {spec.size_multiple}." in fields["width"]["description"]


@pytest.mark.parametrize("name", NAMES)
def test_every_field_has_a_description_a_type_a_default_and_every_number_a_range(name):
    fields = openapi(read_table()[name], EVERYTHING)["components"]["schemas"]["Request"][
        "properties"
    ]
    for field, facts in fields.items():
        assert facts["description"] and "default" in facts, field
        kinds = facts.get("anyOf", [facts])
        assert all("type" in kind for kind in kinds), field
        for number in [
            each
            for kind in kinds
            for each in (kind, kind.get("items", {}))
            if each.get("type") in ("integer", "number")
        ]:
            assert field in LISTS or number["minimum"] < number["maximum"], field
    numbers = {
        "seed",
        "num_inference_steps",
        "guidance_scale",
        "height",
        "width",
        "controlnet_conditioning_scale",
    }
    assert numbers <= set(fields)
    assert ("strength" in fields) == ("init_image" in fields)
    assert ("motion_bucket_id" in fields) == (name == "svd")
    assert ("decode_chunk_size" in fields) == (name in ("svd", "ad"))


def test_schema_says_how_many_images_a_field_takes():
    def kinds(name):
        schemas = openapi(read_table()[name], EVERYTHING)["components"]["schemas"]
        return {kind["type"]: kind for kind in schemas["Request"]["properties"]["image"]["anyOf"]}

    assert kinds("flux2")["array"]["maxItems"] == 10
    assert "array" not in kinds("svd")


@pytest.mark.parametrize("name", ["sdxl", "svd"])
def test_every_field_of_the_schema_is_read(name):
    """A value of no possible kind is refused; a field that nobody reads would be ignored."""
    spec = read_table()[name]
    fields = openapi(spec, EVERYTHING)["components"]["schemas"]["Request"]["properties"]
    accepted = Accepted.by(EVERYTHING)
    for field in fields:
        with pytest.raises(RequestError):
            read_request({field: [["nonsense"]]}, spec=spec, accepted=accepted)
            pytest.fail(f"{field} is not read")
