# SPDX-License-Identifier: MIT
"""bench.py: its models have the sizes of Qwen3, and one row of `gpu` adds up."""
import csv

import bench
import icrl
import pytest
import torch


@pytest.mark.parametrize("shape, billions, without_embeddings", [
    ("0.6B", 0.6, 0.44), ("1.7B", 1.7, 1.4), ("4B", 4.0, 3.6), ("8B", 8.2, 6.95)])
def test_the_random_models_have_the_published_sizes(shape, billions, without_embeddings):
    with torch.device("meta"):                                # shapes without memory
        model = bench.random_model(shape)
    embeddings = {id(layer.weight): layer.weight.numel()
                  for layer in (model.get_input_embeddings(), model.get_output_embeddings())}
    assert model.num_parameters() / 1e9 == pytest.approx(billions, rel=0.02)
    assert (model.num_parameters() - sum(embeddings.values())) / 1e9 == pytest.approx(without_embeddings, rel=0.02)


def test_a_row_of_gpu(tmp_path, capsys):
    sample = icrl.sample
    bench.main(["gpu", "--shape", "tiny", "--steps", "1", "--results", str(tmp_path), "--device", "cpu",
                "--bf16", "False", "--queries", "2", "--samples", "3", "--max_response", "20", "--max_critique", "5",
                "--eval_problems", "2", "--eval_every", "20"])
    row, = csv.DictReader(open(tmp_path / "gpu.csv"))
    row = {key: float(value) for key, value in row.items() if key not in ("device", "shape", "torch")}
    # Each of the 6 sessions has a first attempt, a critique and a revision, all of full length.
    assert row["completions"] == 18 and row["batch"] == 6
    assert row["token_steps"] == 20 + 5 + 20 and row["tokens"] == 6 * row["token_steps"]
    # The critic's prompt holds an attempt of 20 tokens, and the prompt of a revision a critique of 5.
    attempts, critiques, revisions = 20 * 20 / 2, 5 * (20 + 5 / 2), 20 * (5 + 20 / 2)
    assert row["cache_reads"] > 6 * (attempts + critiques + revisions)
    assert row["trained"] > row["tokens"] and row["scored"] > 6 * (5 + 20)
    assert row["step"] == pytest.approx(row["sampling"] + row["update"]) and 0 < row["optimizer"] < row["update"]
    assert row["tokens_s"] == pytest.approx(row["tokens"] / row["sampling"])
    assert 0 < row["tokens_s"] < row["bound_tokens_s"] and 0 < row["update_share"] < 1
    assert row["hours_of_40_steps"] == pytest.approx((40 * row["step"] + 3 * row["evaluation"]) / 3600)
    assert 0.1 < row["sampling_GB"] <= row["update_GB"] <= row["optimizer_GB"] <= row["host_GB"]
    assert icrl.sample is sample and "bound_tokens_s" in capsys.readouterr().out
