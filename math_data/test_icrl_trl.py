# SPDX-License-Identifier: MIT
"""icrl_trl.py: on the same turns, TRL's step is icrl.py's step, on one process and on two.

As a script, this file is one of the two processes of the tests with two.
"""
import copy
import os
import subprocess
import sys
from unittest import mock

import pytest
import torch
from transformers import AutoTokenizer, GenerationConfig, Qwen3Config, Qwen3ForCausalLM

pytest.importorskip("trl")
import icrl_trl  # noqa: E402
from icrl_trl import icrl  # noqa: E402

torch.set_num_threads(1)                            # faster for models this small
TOKENIZER = AutoTokenizer.from_pretrained(icrl.Config.model)
EOS = TOKENIZER.eos_token_id
LEARNING_RATE, TEMPERATURE = 0.2, 0.8


def tiny_model():
    """A random Qwen3 whose policy is far from uniform, so that prompts matter."""
    torch.manual_seed(0)
    return Qwen3ForCausalLM(Qwen3Config(
        vocab_size=len(TOKENIZER), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, max_position_embeddings=512,
        attention_dropout=0.5, tie_word_embeddings=False, initializer_range=0.25,
        bos_token_id=None, eos_token_id=EOS, pad_token_id=TOKENIZER.pad_token_id))


def make_trainer(folder, model, optimizers=(None, None), **settings):
    """A trainer with two micro-batches of three sessions."""
    args = icrl_trl.ICRLConfig(
        str(folder), use_cpu=True, save_strategy="no", disable_tqdm=True, num_generations=3,
        per_device_train_batch_size=3, gradient_accumulation_steps=2, **settings)
    return icrl_trl.ICRLTrainer(model, args, [{"problem": "1 + 1?", "answer": "2"}] * 8,
                                processing_class=TOKENIZER, optimizers=optimizers)


def recording_sgd(model):
    """SGD over the weights of `model`, and a list that gets the gradients of each of its steps."""
    sgd, steps = torch.optim.SGD(model.parameters(), LEARNING_RATE), []
    sgd.register_step_pre_hook(lambda *_: steps.append(
        {name: copy.deepcopy(weight.grad) for name, weight in model.named_parameters()}))
    return sgd, steps


def some_turns(method, queries=(0, 1, 2)):
    """17 turns of 3 problems (with grpo, 9), or those of some of the problems.

    Problem 0 has two critiques, one of them good. Problem 1 has two bad ones. All attempts at
    problem 2 are right. "01": the first attempt is wrong, and the critique helps.
    """
    turns = []

    def add(query, session, part, prompt, free, reward):
        text = f"{part} {query} " + "so " * session
        ids, free_ids = icrl.encode_chat(TOKENIZER, prompt), icrl.encode_chat(TOKENIZER, free)
        completion = TOKENIZER(text)["input_ids"] + [EOS]
        turns.append(icrl.Turn(query, 3 * query + session, part, ids, free_ids, completion, text,
                               False, float(reward)))

    for query, outcomes in enumerate([["01", "1", "00"], ["00", "00", "1"], ["1", "1", "1"]]):
        problem = f"What is {query} + 1?"
        free, critic = icrl.solver_prompt(problem), icrl.critic_prompt(problem, "It is 7.")
        for session, rewards in enumerate(outcomes):
            add(query, session, "first", free, free, rewards[0])
            if len(rewards) == 2 and method == "icrl":
                guided = icrl.solver_prompt(problem, f"Tip {session}: count.")
                add(query, session, "critique", critic, critic, rewards[1])
                add(query, session, "revision", guided, free, rewards[1])
    return [turn for turn in turns if turn.query in queries]


def two_steps_of_trl(folder, method, **replacements):
    """Two steps on one rollout: what is logged, and the gradients. Functions of icrl are replaced.
    """
    model = tiny_model()
    sgd, gradients = recording_sgd(model)
    trainer = make_trainer(
        folder, model, (sgd, None), method=method, num_iterations=2, max_steps=2,
        learning_rate=LEARNING_RATE, temperature=TEMPERATURE, max_completion_length=4)
    with mock.patch.multiple(icrl, **replacements):
        trainer.train()
    return [row for row in trainer.state.log_history if "loss" in row], gradients


def two_steps_of_icrl(method):
    """The same two steps by icrl.update: its figures, and the gradients."""
    model = tiny_model()
    sgd, gradients = recording_sgd(model)
    config = icrl.Config(method=method, inner_steps=2, device="cpu", temperature=TEMPERATURE)
    return icrl.update(model, sgd, some_turns(method), config), gradients


def assert_close(gradients, expected):
    for ours, theirs in zip(gradients, expected, strict=True):
        for name in theirs:
            assert theirs[name].abs().max() > 1e-4
            torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", ["icrl", "grpo"])
def test_on_one_process_loss_and_gradients_are_those_of_update(method, tmp_path):
    figures, expected = two_steps_of_icrl(method)
    log, gradients = two_steps_of_trl(tmp_path, method, rollout=lambda *_: some_turns(method))
    assert_close(gradients, expected)
    assert (log[0]["loss"] + log[1]["loss"]) / 2 == pytest.approx(-figures["objective"], abs=1e-5)
    # The weights have moved, so rho is not 1. And w is not 1.
    assert not torch.allclose(expected[0]["lm_head.weight"], expected[1]["lm_head.weight"])
    if method == "icrl":
        assert log[0]["w_mean"] == pytest.approx(figures["w_mean"], abs=1e-5)
        assert abs(figures["w_mean"] - 1) > 0.05


@pytest.mark.parametrize("scale, moves", [(1.0, True), (0.0, False), (float("nan"), False)])
def test_with_its_defaults_two_steps_give_the_weights_of_icrl(scale, moves, tmp_path):
    """Two steps: AdamW and clipping are the same. Without a finite gradient there is no step."""
    model, expected, config = tiny_model(), tiny_model(), icrl.Config(device="cpu")
    objective, start = icrl.icrl_objective, copy.deepcopy(model.state_dict())
    optimizer = icrl.make_optimizer(expected, config)
    with mock.patch.multiple(icrl, rollout=lambda *_: some_turns("icrl"),
                             icrl_objective=lambda *a: scale * objective(*a)):
        make_trainer(tmp_path, model, max_steps=2).train()
        for _ in range(2 if scale else 0):
            icrl.update(expected, optimizer, some_turns("icrl"), config)
    for name, weight in expected.state_dict().items():
        # A norm weight without its decay would be off by 3e-5.
        assert (model.state_dict()[name] - weight).abs().mean() < 1e-6
        assert torch.equal(weight, start[name]) != moves


def test_two_processes_give_the_gradients_of_one_and_stop_together(tmp_path):
    """One process has 10 turns, 7 with an advantage. The other one has 7, of which 5 have one."""
    rows, expected = two_steps_of_trl(tmp_path, "icrl", rollout=lambda *_: some_turns("icrl"))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    subprocess.run([*launch, __file__, str(tmp_path)], check=True, timeout=120)
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for _, gradients, _, message in results:
        assert_close(gradients, expected)
        assert "ran out of memory" in message
    log, _, uneven, _ = results[0]                  # process 0 logs
    assert [row["loss"] for row in log] == pytest.approx([row["loss"] for row in rows], abs=1e-5)
    # All attempts of one process are wrong, and all of the other right. None waits for ever.
    assert uneven[0]["first_reward"] == 0.5 and uneven[0]["revision_reward"] == 0


@pytest.mark.parametrize("hostile", [
    {"min_p": 0.9}, {"typical_p": 0.05}, {"top_k": 1}, {"top_p": 0.1}, {"num_beams": 2},
    {"suppress_tokens": [*range(250)]}, {"epsilon_cutoff": 0.1}, {"temperature": 0.01}])
def test_the_generation_config_of_a_checkpoint_changes_only_the_stop_tokens(hostile, tmp_path):
    model = tiny_model()
    model.generation_config = GenerationConfig(do_sample=True, eos_token_id=[EOS, 7], **hostile)
    trainer = make_trainer(tmp_path, model)
    trainer.calls = 0
    prompt = icrl.encode_chat(TOKENIZER, icrl.solver_prompt("1 + 1?"))
    completions, truncated = trainer.sample(None, TOKENIZER, [prompt] * 400, 5, None)
    assert len({completion[0] for completion in completions}) > 60
    assert 0 < sum(truncated) < 400
    for completion, cut_off in zip(completions, truncated):
        stops = [token in (EOS, 7) for token in completion]
        assert sum(stops[:-1]) == 0 and stops[-1] != cut_off and (stops[-1] or len(stops) == 5)


if __name__ == "__main__":
    folder, rank = sys.argv[1], int(os.environ["RANK"])
    # All attempts at problem 2 have advantage 0. They still count in the mean.
    turns = some_turns("icrl", queries=[(0, 2), (1,)][rank])
    log, gradients = two_steps_of_trl(folder, "icrl", rollout=lambda *_: turns)
    uneven, _ = two_steps_of_trl(folder, "icrl", outcome_reward=lambda *_: float(rank))
    trainer = make_trainer(folder, tiny_model(), max_steps=1)
    if rank == 1:
        trainer._generate_single_turn = mock.Mock(side_effect=torch.OutOfMemoryError)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        trainer.train()
    torch.save((log, gradients, uneven, str(caught.value)), f"{folder}/{rank}.pt")
