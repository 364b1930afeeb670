"""The matrix as `--list --features` prints it."""

import json

from backends.model_table import FEATURES, read_table
from hosts.launch import support_matrix


def test_the_matrix_of_features_counts_its_cells():
    table = read_table()
    text = support_matrix.as_markdown(table, features=True)
    num_cells = sum(len(spec.backends) for spec in table.values()) * len(FEATURES)
    last = text.splitlines()[-1]
    assert last.endswith(f"{num_cells} cells in all")
    assert int(last.split()[0]) == sum(line.count(" tested |") for line in text.splitlines())
    assert "cells in all" not in support_matrix.as_markdown(table)


def test_classes_without_a_row_are_listed_with_their_fields_or_the_reason_against_them():
    table = read_table()
    found = support_matrix.classes_without_row(table)
    assert found["Flux3ModularPipeline"]["makes"] == "image"
    assert not found.keys() & {spec.pipeline for spec in table.values()}
    assert {"prompt", "image"} <= set(found["QwenImageLayeredPipeline"]["takes"])
    assert found["AllegroPipeline"]["makes"] == "video"
    assert "audios" in found["StableAudioPipeline"]["refused"]
    text = support_matrix.classes_as_markdown(table)
    assert all(line.count(" | ") == 2 for line in text.splitlines())
    assert json.loads(support_matrix.as_json(table, with_classes=True))["classes"].keys() == (
        found.keys()
    )
