# SPDX-License-Identifier: MIT
"""icrl_trl.py: on the same turns, TRL's step is icrl.py's step, on one process and on two.

As a script, this file is one of the two processes of the test with two.
"""
import copy
import os
import subprocess
import sys
from unittest import mock

import pytest
import torch
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM, TrainerCallback

pytest.importorskip("trl")
import icrl_trl  # noqa: E402
from icrl_trl import icrl  # noqa: E402

torch.set_num_threads(1)                                      # faster for models this small
TOKENIZER = AutoTokenizer.from_pretrained(icrl.Config.model)
EOS = TOKENIZER.eos_token_id
LEARNING_RATE, TEMPERATURE = 0.2, 0.8


def tiny_model():
    """A random Qwen3 with a policy far from uniform, so that prompts matter and mistakes show."""
    torch.manual_seed(0)
    return Qwen3ForCausalLM(Qwen3Config(
        vocab_size=len(TOKENIZER), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=512, tie_word_embeddings=False,
        initializer_range=0.25, bos_token_id=None, eos_token_id=EOS, pad_token_id=TOKENIZER.pad_token_id))


def some_turns(method, queries=(0, 1, 2)):
    """17 turns of 3 problems (with grpo, 9), or those of some of the problems.

    Problem 0 has two critiques, one of them good. Problem 1 has two bad ones. All attempts at problem 2 are right.
    """
    turns = []
    for query, outcomes in enumerate([["01", "1", "00"], ["00", "00", "1"], ["1", "1", "1"]]):
        for session, rewards in enumerate(outcomes):
            def turn(part, messages, free_messages, reward):
                text = f"{part} {query} " + "so " * session
                prompt, free_prompt = (icrl.encode_chat(TOKENIZER, m) for m in (messages, free_messages))
                completion = TOKENIZER(text)["input_ids"] + [EOS]
                turns.append(icrl.Turn(query, 3 * query + session, part, prompt, free_prompt, completion, text, False,
                                       float(reward)))

            problem, tip = f"What is {query} + 1?", f"Tip {session}: count."
            free = icrl.solver_messages(problem)
            turn("first", free, free, rewards[0])
            if len(rewards) == 2 and method == "icrl":
                critic = icrl.critic_messages(problem, turns[-1].text)
                turn("critique", critic, critic, rewards[1])
                turn("revision", icrl.solver_messages(problem, tip), free, rewards[1])
    return [turn for turn in turns if turn.query in queries]


def gradient_of(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()]).clone()


class Recorder(TrainerCallback):
    """Keeps the gradient of every optimiser step."""

    def __init__(self):
        self.gradients = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients.append(gradient_of(model))


def two_steps_of_trl(folder, method, **replacements):
    """Two optimiser steps on one rollout, by SGD: what is logged, and the gradients. Functions of icrl are replaced."""
    model, recorder = tiny_model(), Recorder()
    args = icrl_trl.ICRLConfig(
        str(folder), use_cpu=True, save_strategy="no", disable_tqdm=True, method=method, num_generations=3,
        per_device_train_batch_size=3, gradient_accumulation_steps=2, num_iterations=2, max_steps=2, max_grad_norm=0.0,
        learning_rate=LEARNING_RATE, temperature=TEMPERATURE, max_completion_length=4, max_critique=4)
    problems = [{"problem": f"What is {i}?", "answer": "1"} for i in range(8)]
    trainer = icrl_trl.ICRLTrainer(
        model, args, problems, processing_class=TOKENIZER, callbacks=[recorder],
        optimizers=(torch.optim.SGD(model.parameters(), LEARNING_RATE), None))
    with mock.patch.multiple(icrl, **replacements):
        trainer.train()
    return [row for row in trainer.state.log_history if "loss" in row], recorder.gradients


def two_steps_of_icrl(method):
    """The same two steps by icrl.update: the mean objective and the gradients of both."""
    model, gradients = tiny_model(), []

    def optimizer_step(model, optimizer):
        gradients.append(gradient_of(model))
        optimizer.step()
        optimizer.zero_grad()
        return 1.0

    config = icrl.Config(method=method, inner_steps=2, device="cpu", temperature=TEMPERATURE)
    with mock.patch.object(icrl, "optimizer_step", optimizer_step):
        stats = icrl.update(model, torch.optim.SGD(model.parameters(), LEARNING_RATE), some_turns(method), config)
    return stats, gradients


def assert_close(gradients, expected):
    for ours, theirs in zip(gradients, expected, strict=True):
        assert theirs.abs().max() > 1e-3
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", ["icrl", "grpo"])
def test_on_one_process_loss_and_gradients_are_those_of_update(method, tmp_path):
    stats, expected = two_steps_of_icrl(method)
    log, gradients = two_steps_of_trl(tmp_path, method, rollout=lambda *_: some_turns(method))
    assert_close(gradients, expected)
    assert (log[0]["loss"] + log[1]["loss"]) / 2 == pytest.approx(-stats["objective"], abs=1e-5)
    assert (expected[0] - expected[1]).abs().max() > 1e-3     # the weights have moved, so rho is not 1
    if method == "icrl":                                      # and these turns do have weights
        with mock.patch.object(icrl, "calibration_ratio", lambda free, guided: torch.ones_like(free)):
            _, without_weights = two_steps_of_icrl(method)
        assert (expected[0] - without_weights[0]).abs().max() > 1e-3


def test_two_processes_give_the_loss_and_the_gradients_of_one(tmp_path):
    """One process has 10 turns, of which 7 have an advantage. The other one has 7, of which 5 have one."""
    expected_log, expected = two_steps_of_trl(tmp_path, "icrl", rollout=lambda *_: some_turns("icrl"))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    subprocess.run([*launch, __file__, str(tmp_path)], check=True, timeout=120)
    (log, gradients, uneven), (_, gradients_1, _) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert_close(gradients, expected)
    assert_close(gradients_1, expected)
    assert [row["loss"] for row in log] == pytest.approx([row["loss"] for row in expected_log], abs=1e-5)
    # In the second run, all attempts on one process are wrong and all on the other right. Neither waits for ever.
    assert uneven["first_reward"] == 0.5 and uneven["revision_reward"] == 0 and uneven["loss"] == 0


def test_training_on_the_default_world_raises_the_reward(tmp_path):
    """Measured: 0.13 before, and 0.38 in the last ten steps. With the wrong sign, the reward falls to about 0."""
    args = icrl_trl.ICRLConfig(str(tmp_path), use_cpu=True, save_strategy="no", disable_tqdm=True, max_steps=20,
                               gradient_accumulation_steps=2)
    problems = icrl.load_problems(args.data)
    trainer = icrl_trl.ICRLTrainer(icrl.Config.model, args, problems)
    heldout = icrl.load_problems(icrl.Config.heldout)
    before = icrl.evaluate(trainer.model, TOKENIZER, heldout, icrl.Config(device="cpu"))["pass@1"]
    trainer.train()
    rewards = [row["first_reward"] for row in trainer.state.log_history if "first_reward" in row]
    assert len(rewards) == 20 and before < 0.2
    assert sum(rewards[-10:]) / 10 > before + 0.1


def test_with_lora_a_step_moves_the_adapter_only(tmp_path):
    peft = pytest.importorskip("peft")
    args = icrl_trl.ICRLConfig(
        str(tmp_path), use_cpu=True, save_strategy="no", disable_tqdm=True, num_generations=3, max_steps=1,
        per_device_train_batch_size=3, gradient_accumulation_steps=2)
    problems = [{"problem": f"What is {i}?", "answer": "1"} for i in range(8)]
    trainer = icrl_trl.ICRLTrainer(tiny_model(), args, problems, processing_class=TOKENIZER,
                                   peft_config=peft.LoraConfig(target_modules=["q_proj", "v_proj"]))
    before = copy.deepcopy(trainer.model.state_dict())
    with mock.patch.object(icrl, "rollout", lambda *_: some_turns("icrl")):
        trainer.train()
    moved = {name for name, weight in trainer.model.state_dict().items() if not torch.equal(weight, before[name])}
    assert moved and all("lora_" in name for name in moved)


def test_sampling_ends_at_the_first_stop_token_or_at_the_limit(tmp_path):
    """TRL's own generation in place of icrl.sample: same prompts, same meaning of the result."""
    args = icrl_trl.ICRLConfig(str(tmp_path), use_cpu=True, max_completion_length=48)
    trainer = icrl_trl.ICRLTrainer(icrl.Config.model, args, [{"problem": "1 + 1?", "answer": "2"}] * 16)
    trainer.calls = 0
    prompts = [icrl.encode_chat(TOKENIZER, icrl.solver_messages(text)) for text in ("What is 3 * 4?", "What is 5 + 9?")]
    completions, truncated = trainer.sample(None, TOKENIZER, prompts, 48, None)
    assert truncated == [False, False] and all(c.index(EOS) == len(c) - 1 for c in completions)
    completions, truncated = trainer.sample(None, TOKENIZER, prompts, 2, None)
    assert truncated == [True, True] and [len(c) for c in completions] == [2, 2]


if __name__ == "__main__":
    folder, rank = sys.argv[1], int(os.environ["RANK"])
    # All attempts at problem 2 have advantage 0. They still count in the mean.
    turns = some_turns("icrl", queries=[(0, 2), (1,)][rank])
    log, gradients = two_steps_of_trl(folder, "icrl", rollout=lambda *_: turns)
    uneven, _ = two_steps_of_trl(folder, "icrl", outcome_reward=lambda *_: float(rank))
    torch.save((log, gradients, uneven[0] if uneven else None), f"{folder}/{rank}.pt")
