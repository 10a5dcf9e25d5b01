"""Tests of compare.py and arms.py: the arms and the statistics by hand, and small real runs.

    python -m pytest math_data/test_compare.py
"""
import copy
import csv
import math

import numpy as np
import pytest
import torch

pytest.importorskip("scipy")
import arms  # noqa: E402
import compare  # noqa: E402
import theory  # noqa: E402
from compare import icrl  # noqa: E402

CONFIG = icrl.parse("--queries 4 --samples 2 --steps 2".split())
PROBLEMS = [{"problem": f"What is {n} + 1?", "answer": "never", "kind": ""} for n in (2, 3)]


@pytest.fixture(scope="module")
def model_and_tokenizer():
    return icrl.load_model(CONFIG.model, CONFIG)


def turns_of_arm(name, model_and_tokenizer):
    """First attempts, critiques and revisions of an arm: three lists."""
    torch.manual_seed(0)
    with arms.replaced(arms.ARMS[name].replace):
        turns = icrl.rollout(*model_and_tokenizer, PROBLEMS, CONFIG)
    return [[t for t in turns if t.part == part] for part in ("first", "critique", "revision")]


# ------------------------------------------------------------------------ functions of the arms

def test_weights_by_hand():
    free = torch.tensor([[0.5, 0.2], [0.4, 0.4]]).log()
    guided = torch.tensor([[0.25, 0.8], [0.1, 0.2]]).log()
    assert arms.no_ratio(free, guided).flatten().tolist() == [1, 1, 1, 1]
    # 2 * 0.25 is 0.5, and 4 * 2 is above the cap of 2.
    assert arms.sequence_ratio(free, guided).flatten().tolist() == pytest.approx([0.5, 0.5, 2, 2])
    shaped = [0.5 / 0.6, 0.2 / 0.3, 0.8, 0.8]
    assert arms.shaped_weight(free, guided).flatten().tolist() == pytest.approx(shaped)
    assert arms.drop_unlikely(torch.tensor([[-4.9, -5.1]]), None).tolist() == [[1, 0]]


def test_groups_of_pooled_and_role_round():
    def groups(name):
        with arms.replaced(arms.ARMS[name].replace):
            return [icrl.Turn(3, 0, part, [], [], [], "", False).group
                    for part in ("first", "critique", "revision")]

    assert groups("pooled") == [3, 3, 3]
    assert groups("role_round") == [(3, "first"), (3, "critique"), (3, "revision")]
    assert groups("icrl") == [(3, "solver"), (3, "critic"), (3, "solver")]


def test_official_advantages_by_hand():
    def advantages(part, rewards):
        return arms.official_advantages(rewards, [(0, part)] * len(rewards)).tolist()

    # Eight failures and the added 1: the mean is 1/9, the std 1/3.
    assert advantages("first", [0.0] * 8) == pytest.approx([-1 / 3] * 8, abs=1e-5)
    assert advantages("first", [1.0] * 4) == [0.0] * 4
    for part in ("critique", "revision"):
        assert advantages(part, [0.5] * 4) == [0.0] * 4                 # no success
        assert advantages(part, [1.0, 0, 0, 0]) == [0.0] * 4            # a mean below 0.3
        a = math.sqrt(3) / 2                                            # mean 1/2, variance 1/3
        assert advantages(part, [1.0, 0, 0]) == pytest.approx([a, -a, -a], abs=1e-5)


def test_official_critic_sees_the_box_only():
    prompt = arms.boxed_answer_only("2 + 3?", r"First I add. \boxed{6}")
    assert prompt == icrl.critic_prompt("2 + 3?", r"\boxed{6}")
    assert arms.boxed_answer_only("2 + 3?", "I add.") == icrl.critic_prompt("2 + 3?", "")


def test_gspo_has_one_ratio_for_a_sample_and_weighs_single_tokens():
    logp = torch.tensor([[-1.0, -2.0], [-1.0, 0.0]], requires_grad=True)
    logp_old = torch.tensor([[-1.2, -1.9], [-2.0, 0.0]])
    mask = torch.tensor([[1.0, 1.0], [1.0, 0.0]])
    w = torch.tensor([[1.0, 0.5], [1.0, 1.0]])
    J = arms.gspo_objective(logp, logp_old, torch.tensor([2.0, 1.0]), w, mask)
    rho = math.exp((0.2 - 0.1) / 2)             # of the first sample; the second has 1.28
    assert J.item() == pytest.approx((0.75 * 2 * rho + 1.28) / 2)
    J.backward()
    assert logp.grad.flatten().tolist() == pytest.approx([rho / 2, rho / 4, 0, 0])


def test_critiques_that_are_not_the_critics(model_and_tokenizer):
    tokenizer = model_and_tokenizer[1]
    first, critiques, revisions = turns_of_arm("retry", model_and_tokenizer)
    assert [turn.prompt for turn in revisions] == [turn.prompt for turn in first]
    assert [turn.completion for turn in critiques] == [[]] * 4
    _, critiques, revisions = turns_of_arm("placebo", model_and_tokenizer)
    assert all("Try again." in tokenizer.decode(turn.prompt) for turn in revisions)
    assert [turn.completion for turn in critiques] == [[]] * 4
    _, critiques, _ = turns_of_arm("shuffled", model_and_tokenizer)
    for turn in critiques:
        others = [other for other in critiques if other.query != turn.query]
        assert turn.text in [icrl.visible_text(tokenizer, t.prompt, t.completion) for t in others]


def test_critic_is_paid_for_transfer(model_and_tokenizer, monkeypatch):
    model, tokenizer = model_and_tokenizer
    rewards = iter([0.0] * 4 + [1.0] * 4)           # every revision is right
    monkeypatch.setattr(icrl, "outcome_reward", lambda *args: next(rewards))
    _, critiques, revisions = turns_of_arm("paid_for_transfer", model_and_tokenizer)
    for critique, revision in zip(critiques, revisions, strict=True):
        free, guided = (icrl.completion_logprobs(model, [prompt], [revision.completion])[0].mean()
                        for prompt in (revision.free_prompt, revision.prompt))
        expected = math.exp(min((free - guided).item(), 0) / 0.3)
        assert critique.reward == pytest.approx(expected, abs=1e-5)
    assert min(critique.reward for critique in critiques) < 1


# ----------------------------------------------------------------------------------------- runs

@pytest.fixture
def command(tmp_path):
    """The start of a command with few and small steps, and thirty held-out problems."""
    lines = open(CONFIG.heldout).readlines()[:30]
    (tmp_path / "heldout.jsonl").write_text("".join(lines))
    return ["run", str(tmp_path / "runs"), "--heldout", str(tmp_path / "heldout.jsonl"),
            *"--steps 2 --eval_every 1 --queries 4 --samples 2 --device cpu".split()]


def rows_of(tmp_path, arm):
    with open(tmp_path / "runs/compare.csv") as file:
        return [row for row in csv.DictReader(file) if row["arm"] == arm]


def test_run_resume_and_report(command, tmp_path, monkeypatch, capsys):
    command += ["--arms", "grpo_tokens", "icrl", "--seeds", "5"]
    compare.main(command)
    rows = rows_of(tmp_path, "icrl")
    budget = int(rows[-1]["tokens"])
    spent = [int(row["tokens"]) for row in rows_of(tmp_path, "grpo_tokens")]
    assert spent[-1] >= budget > spent[-2]          # it stops with the first step that reaches it

    # The arm icrl trains and is measured as icrl.py does it.
    metrics = icrl.train(icrl.parse([*command[2:-5], "--seed", "5", "--out", f"{tmp_path}/icrl"]))
    assert budget == sum(row.get("tokens", 0) for row in metrics)
    w, accuracy = metrics[-1]["w_mean"], metrics[-1]["heldout"]["accuracy without critique"]
    assert rows[-1]["w_mean"] == ("" if w is None else str(round(w, 5)))
    assert rows[-1]["accuracy"] == str(round(accuracy, 5))
    for figure in ("fixed", "tokens per fix"):      # before training both critics are the same
        assert rows[0][f"{figure}, current critic"] == rows[0][f"{figure}, base critic"]

    # Finished runs are not trained again, and other settings are refused.
    monkeypatch.setattr(compare, "train", None)
    compare.main(command)
    with pytest.raises(SystemExit, match="--lr"):
        compare.main([*command, "--lr", "0.1"])
    compare.main(["report", f"{tmp_path}/runs/compare.csv", "--figure", f"{tmp_path}/curves.png"])
    assert "| grpo_tokens | icrl | 1 |" in capsys.readouterr().out
    assert (tmp_path / "curves.png").exists()


def test_an_arm_without_a_trained_critic(command, tmp_path, monkeypatch):
    trained, critics = [], []
    update, rollout = icrl.update, icrl.rollout
    monkeypatch.setattr(icrl, "update", lambda *args: trained.extend(args[2]) or update(*args))
    monkeypatch.setattr(icrl, "rollout", lambda *args: critics.append(args[4]) or rollout(*args))
    compare.main([*command, "--arms", "frozen", "untrained", "--seeds", "6", "--steps", "1"])
    assert {turn.part for turn in trained} == {"first", "revision"}
    assert critics[0] is not None and critics[1] is None


def test_critics_are_compared_on_the_same_failures(model_and_tokenizer, monkeypatch):
    model, tokenizer = model_and_tokenizer
    broken, shown, prompt = copy.deepcopy(model), [], icrl.critic_prompt
    torch.nn.init.zeros_(broken.get_output_embeddings().weight)             # random tokens
    monkeypatch.setattr(icrl, "critic_prompt", lambda *args: shown.append(args) or prompt(*args))
    problems = icrl.load_problems(CONFIG.heldout)[:20]
    compare.evaluate(model, broken, tokenizer, problems, CONFIG)
    n = len(shown) // 3                             # the critics: current, base and none
    assert n > 1 and shown == 3 * shown[:n]
    turns = compare.second_tries(broken, tokenizer, problems, CONFIG, model)
    assert compare.fixes(turns) == {"fixed": 0, "tokens per fix": None}


def test_states_answer():
    assert compare.states_answer("The sum is 1,234.", "1234")
    assert not compare.states_answer("Multiply 12 by 3 first.", "36")


# ----------------------------------------------------------------------------------- statistics

def test_sign_flip():
    # Of the eight choices, +++ and --- are as far from 0, and those with only the 1 turned are not.
    assert compare.sign_flip(np.array([1.0, 2, 3])) == 2 / 8
    assert compare.sign_flip(np.array([-1.0, 2, 3])) == 4 / 8
    assert compare.sign_flip(np.arange(1.0, 17.0)) == 2 / 2**16


def test_holm_by_hand():
    assert compare.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert compare.holm([0.6, 0.9]) == [1.0, 1.0]


def test_crossings_by_hand():
    assert compare.crossings([0, 10, 20, 30], [0, -1, 1, -3]) == pytest.approx([15, 22.5])


def test_curves_interpolate_and_keep_their_end():
    rows = [{"tokens": 0, "accuracy": 0.1}, {"tokens": 100, "accuracy": 0.5}]
    assert compare.curves({7: rows}, "tokens", [50, 200]).tolist() == [[pytest.approx(0.3), 0.5]]


def test_cells():
    assert compare.cell(np.array([1.0, 2, 3, 4, 5])) == "3.000 ± 1.963"
    assert compare.cell(np.array([1.0, 2, math.nan])) == "1.500"


# ------------------------------------------------------------------------------------- theory.py

def test_the_gradient_of_a_revision_in_the_simulation():
    """By hand: one choice, right with 0.2 alone and 0.8 with help."""
    logits, help_ = np.array([theory.logit(0.2)]), theory.logit(0.8) - theory.logit(0.2)
    gradients = {}
    for seed in range(20):
        reward, gradient = theory.attempt(logits, help_, np.random.default_rng(seed))
        gradients[reward] = gradient[0]
    # w = 0.2 / 0.8 if it is right. If it is wrong, w = 0.8 / 0.2 is capped at 2.
    assert gradients == {1.0: pytest.approx(0.25 * 0.8), 0.0: pytest.approx(2 * -0.2)}


def test_theory_prints_the_runs_beside_the_simulation(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(theory, "train", lambda arm, n, seed, own_scale: n / 10 + own_scale / 100)
    path, figure = tmp_path / "1.csv", tmp_path / "figure.png"
    lines = ["arm,seed,accuracy where a plan helps"]
    for seed in range(4):
        lines += [f"icrl,{seed},{0.7 + seed / 100}", f"frozen,{seed},{0.4 + seed / 100}"]
    path.write_text("\n".join(lines))
    theory.main([str(path), "--figure", str(figure)])
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[3:]]
    assert [row[0][2:] for row in rows] == list("11122334455")
    assert rows[2][1] == "runs"
    assert [text[:6] for text in rows[2][2:]] == ["0.715 ", "0.415 ", "+0.300"]
    assert rows[4][1:3] == ["simulation, own scales", "0.210 ± 0.000"]
    assert figure.stat().st_size > 1000
