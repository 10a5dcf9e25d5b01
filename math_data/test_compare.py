"""Tests of compare.py: the arms by hand arithmetic, the statistics, and small real runs.

    python -m pytest math_data/test_compare.py
"""
import copy
import csv
import itertools
import json
import math

import numpy as np
import pytest
import torch

pytest.importorskip("scipy")
import compare  # noqa: E402
from compare import icrl  # noqa: E402

SMALL = "--steps 2 --eval_every 1 --queries 4 --samples 2 --eval_problems 4".split()
CONFIG = icrl.parse(SMALL)


# --------------------------------------------------------------------------------------------- functions of the arms

def test_weights_by_hand():
    free, guided = torch.tensor([[0.5, 0.2], [0.4, 0.4]]).log(), torch.tensor([[0.25, 0.8], [0.1, 0.2]]).log()
    assert compare.no_ratio(free, guided).tolist() == [[1, 1], [1, 1]]
    w = compare.sequence_ratio(free, guided)             # 2 * 0.25 = 0.5, and 4 * 2 = 8, which is above 2
    torch.testing.assert_close(w, torch.tensor([[0.5, 0.5], [2.0, 2.0]]))
    w = compare.shaped_weight(free, guided)
    torch.testing.assert_close(w, torch.tensor([[0.5 / 0.6, 0.2 / 0.3], [0.8, 0.8]]))


def test_groups_of_pooled_and_role_round():
    turns = [icrl.Turn(3, 0, part, [], [], [], "", False) for part in ("first", "critique", "revision")]
    with compare.replaced(compare.ARMS["pooled"].replace):
        assert [turn.group for turn in turns] == [3, 3, 3]
    with compare.replaced(compare.ARMS["role_round"].replace):
        assert [turn.group for turn in turns] == [(3, "first"), (3, "critique"), (3, "revision")]
    assert turns[0].group == turns[2].group                   # and icrl.py is as before


def test_official_advantages_by_hand():
    def advantages(part, rewards):
        return compare.official_advantages(rewards, [(0, part)] * len(rewards)).tolist()

    # Eight failures and the added 1: the mean is 1/9, the unbiased std 1/3.
    assert advantages("first", [0.0] * 8) == pytest.approx([-1 / 3] * 8, abs=1e-5)
    # One success of eight: the mean is 2/9, the variance (7 * 4/81 + 2 * 49/81) / 8 = 7/36.
    std = math.sqrt(7 / 36)
    assert advantages("first", [1.0] + [0.0] * 7) == pytest.approx([7 / 9 / std] + [-2 / 9 / std] * 7, abs=1e-5)
    assert advantages("first", [1.0] * 4) == [0.0] * 4
    for part in ("critique", "revision"):
        assert advantages(part, [0.5] * 4) == [0.0] * 4                     # no success
        assert advantages(part, [1.0, 0, 0, 0]) == [0.0] * 4                # a mean below 0.3
        scale = math.sqrt(3) / 2                                            # the mean is 1/2, the variance 1/3
        assert advantages(part, [1.0, 0, 0]) == pytest.approx([scale, -scale, -scale], abs=1e-5)


def test_official_critic_sees_the_box_only():
    (_, chat) = compare.boxed_answer_only("2 + 3?", r"First I add. \boxed{6}")
    assert r"\boxed{6}" in chat["content"] and "First I add" not in chat["content"]
    assert "None" not in compare.boxed_answer_only("2 + 3?", "First I add.")[1]["content"]


def test_gspo_has_one_ratio_for_a_sample_and_weighs_single_tokens():
    logp = torch.tensor([[-1.0, -2.0], [-1.0, 0.0]], requires_grad=True)
    logp_old, mask = torch.tensor([[-1.2, -1.9], [-2.0, 0.0]]), torch.tensor([[1.0, 1.0], [1.0, 0.0]])
    w = torch.tensor([[1.0, 0.5], [1.0, 1.0]])
    J = compare.gspo_objective(logp, logp_old, torch.tensor([2.0, 1.0]), w, mask, clip_low=0.2, clip_high=0.2)
    rho = math.exp((0.2 - 0.1) / 2)                           # of the first sample; the second is clipped at 1.2
    assert J.item() == pytest.approx(((1.0 + 0.5) / 2 * 2 * rho + 1.2) / 2)
    J.backward()
    assert logp.grad.flatten().tolist() == pytest.approx([rho / 2, rho / 4, 0, 0])


@pytest.mark.parametrize("arm", ["placebo", "retry", "shuffled"])
def test_critiques_that_are_not_the_critics(arm):
    model, tokenizer = icrl.load_model(CONFIG.model, CONFIG)
    problems = [{"problem": f"What is {n} + 1?", "answer": "impossible"} for n in (2, 3)]
    torch.manual_seed(0)
    with compare.replaced(compare.ARMS[arm].replace):
        turns = icrl.rollout(model, tokenizer, problems, CONFIG)
    critiques, revisions = ([turn for turn in turns if turn.part == part] for part in ("critique", "revision"))
    assert len(critiques) == len(revisions) == 4
    for critique, revision in zip(critiques, revisions):
        if arm == "retry":
            assert revision.prompt == revision.free_prompt and critique.completion == []
        elif arm == "placebo":
            assert "Try again." in tokenizer.decode(revision.prompt) and critique.completion == []
        else:
            others = [turn.completion for turn in critiques if turn.query != critique.query]
            assert critique.text in tokenizer.batch_decode(others, skip_special_tokens=True)


# -------------------------------------------------------------------------------------------------------------- runs

def rows_of(folder):
    with open(folder / "compare.csv") as file:
        return list(csv.DictReader(file))


def test_run_resume_and_report(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    command = ["run", str(tmp_path), "--arms", "grpo_tokens", "icrl", "--seeds", "5", *SMALL]
    assert compare.main(command) == 0
    rows = rows_of(tmp_path)
    icrl_rows, grpo_rows = ([row for row in rows if row["arm"] == arm] for arm in ("icrl", "grpo_tokens"))
    budget = int(icrl_rows[-1]["tokens"])                     # GRPO stops with the first step that reaches it
    assert int(grpo_rows[-1]["tokens"]) >= budget > int(grpo_rows[-2]["tokens"])
    assert json.loads((tmp_path / "grpo_tokens-5.json").read_text())["settings"]["samples"] == 4
    assert icrl_rows[-1]["put right, trained critic, base solver"] and float(icrl_rows[-1]["seconds"]) > 0

    # The arm icrl trains as icrl.py does.
    state = icrl.train(icrl.parse([*SMALL, "--seed", "5", "--out", str(tmp_path / "icrl.py")]))
    for name, value in {"tokens": state["tokens"], **state["after"]}.items():
        assert icrl_rows[-1][name] == ("" if value is None else str(value))

    # Finished runs are not trained again, and other settings are refused.
    monkeypatch.setattr(compare, "train", None)
    assert compare.main(command) == 0 and rows_of(tmp_path) == rows
    assert compare.main([*command, "--lr", "0.1"]) == 2 and "--lr" in capsys.readouterr().err

    assert compare.main(["report", str(tmp_path / "compare.csv"), "--figure", str(tmp_path / "curves.png")]) == 0
    assert "| grpo_tokens | icrl | 1 |" in capsys.readouterr().out and (tmp_path / "curves.png").exists()


def test_frozen_critic_is_not_trained_and_another_seed_joins_the_csv(tmp_path, monkeypatch):
    (tmp_path / "icrl-5.json").write_text('{"arm": "icrl", "seed": 5, "settings": {}, "rows": [{"step": 0}]}')
    trained, pairs, update, rollout = [], [], icrl.update, icrl.rollout     # pairs: solver and critic of each rollout
    monkeypatch.setattr(icrl, "update", lambda *args: trained.extend(args[2]) or update(*args))
    monkeypatch.setattr(icrl, "rollout", lambda *args, **more: pairs.append(args[0::4]) or rollout(*args, **more))
    assert compare.main(["run", str(tmp_path), "--arms", "frozen", "--seeds", "6", *SMALL, "--steps", "1"]) == 0
    assert {turn.part for turn in trained} == {"first", "revision"}
    model, base = pairs[0]
    assert model is not base and pairs == [(model, base)] * 3 + [(base,), (base, base), (model, base), (base, model),
                                                                 (model, model)]
    assert [(row["arm"], row["seed"], row["step"]) for row in rows_of(tmp_path)] == [
        ("icrl", "5", "0"), ("frozen", "6", "0"), ("frozen", "6", "1")]


def test_critic_swap_shows_all_critics_the_failures_of_the_base_solver(monkeypatch):
    base, tokenizer = icrl.load_model(CONFIG.model, CONFIG)
    trained, shown, messages = copy.deepcopy(base), [], icrl.critic_messages
    torch.nn.init.zeros_(trained.get_output_embeddings().weight)            # writes random tokens
    monkeypatch.setattr(icrl, "critic_messages", lambda *args: shown.append(args) or messages(*args))
    figures = compare.critic_swap(base, trained, tokenizer, icrl.load_problems(CONFIG.heldout)[:12], CONFIG)
    n = len(shown) // 4
    assert n > 1 and shown == 4 * shown[:n]
    fixed = figures["put right, base critic, base solver"] * n
    tokens = figures["tokens per fix, base critic, base solver"] * fixed
    assert fixed == pytest.approx(round(fixed)) and fixed > 0 and tokens == pytest.approx(round(tokens))
    assert figures["put right, base critic, trained solver"] == 0
    assert figures["tokens per fix, base critic, trained solver"] is None


def test_states_answer():
    assert compare.states_answer("The sum is 1,234.", "1234") and compare.states_answer(r"\boxed{x+1}", "1+x")
    assert not compare.states_answer("Multiply 12 by 3 first.", "36")


# -------------------------------------------------------------------------------------------------------- statistics

def test_sign_flip_against_all_choices_of_signs():
    differences = np.array([0.3, -0.1, 0.25, 0.2, 0.02])
    means = [np.mean(differences * signs) for signs in itertools.product((1, -1), repeat=5)]
    p = np.mean([abs(mean) > abs(differences.mean()) - 1e-9 for mean in means])
    assert compare.sign_flip(differences) == pytest.approx(p)
    assert compare.sign_flip(np.arange(1.0, 9.0)) == pytest.approx(2 / 256)


def test_holm_by_hand():
    assert compare.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert compare.holm([0.6, 0.9]) == [1.0, 1.0] and compare.holm([]) == []


def test_cells():
    assert compare.cell(np.array([1.0, 2, 3, 4, 5])) == "3.00 ± 1.96"        # 2.776 * sqrt(2.5 / 5)
    assert compare.cell(np.array([1.0, 2, 3, 4])) == "2.50"                  # too few runs for an interval
    assert compare.cell(np.array([1.0, math.nan])) == "1.00 (1 of 2)"
    assert compare.cell(np.array([math.nan])) == "-"
    assert compare.cell(np.zeros(8), attempts=60) == "0.00 (0.000 to 0.060)"  # Wilson: z^2 / (n + z^2)
    assert compare.cell(np.ones(2), attempts=60) == "1.00 (0.940 to 1.000)"


def test_spent_until_interpolates():
    rows = [{"tokens": tokens, "pass@1": accuracy} for tokens, accuracy in [(0, 0.1), (100, 0.5), (200, 0.9)]]
    assert compare.spent_until(rows, "tokens", 0.8) == pytest.approx(175)
    assert compare.spent_until(rows, "tokens", 0.05) == 0 and math.isnan(compare.spent_until(rows, "tokens", 0.95))
