"""The matrix as `--list --features` prints it."""

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
