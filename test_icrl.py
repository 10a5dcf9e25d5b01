# SPDX-License-Identifier: MIT
"""Tests of icrl.py, in the order of that file.

No expected number was copied from a run. Each is worked out here in another way: by hand, by a loop over single tokens,
by listing all outcomes, or by finite differences. Most tests use a tiny model with random weights.

There are 28 known mistakes that turn ICRL into something else without any error message. We call them traps. This is
the list, each with the test that fails if the mistake is made:

 1  `generate` cuts off at top_k = 50               test_samples_follow_the_softmax_at_the_temperature
 2  log-probs at another temperature                test_log_probs_equal_those_of_one_sequence_at_a_time
 3  two ways of scoring in one ratio                test_w_is_exactly_one_without_a_critique
 4  dropout while scoring                           test_a_loaded_model_has_float32_weights_and_no_dropout
 5  training on text that was tokenised again       test_the_sampled_ids_are_trained_and_not_their_text
 6  a template that returns a dict, not ids         test_a_chat_prompt_follows_the_template_exactly
 7  logits shifted by one position                  test_log_probs_equal_those_of_one_sequence_at_a_time
 8  the stop token left out of the loss             test_log_probs_equal_those_of_one_sequence_at_a_time
 9  padding that changes the samples                test_greedy_samples_equal_plain_generate_for_each_row
10  control tokens written by the model             test_model_output_cannot_end_the_users_turn
11  a reward for an attempt that was cut off        test_an_attempt_that_is_cut_off_earns_nothing_and_is_counted
12  the right answer in a prompt                    test_a_session_of_three_attempts
13  more than the last critique in a prompt         test_a_session_of_three_attempts
14  a critique paid for another attempt             test_a_session_of_three_attempts
15  a signal in a group of equal rewards            test_eq_5_by_hand
16  another standard deviation, or no delta         test_eq_5_by_hand
17  problems or roles mixed in a group              test_eq_5_never_mixes_problems_or_roles
18  advantages that change places                   test_neither_micro_batches_nor_the_order_of_turns_matter
19  a gradient through w                            test_eq_4_by_hand
20  w computed again after an inner step            test_the_update_follows_the_gradient_of_naive_loops
21  the weight inside the min                       test_eq_6_by_hand
22  a mean over the micro-batch only                test_neither_micro_batches_nor_the_order_of_turns_matter
23  a step without any advantage                    test_a_batch_without_advantages_changes_nothing
24  Eq. 6 computed wrongly                          test_eq_6_equals_a_loop_and_finite_differences
25  weights in bfloat16                             test_with_bf16_the_host_keeps_float32_weights
26  no cache, or a graph, while sampling            test_sampling_uses_its_cache_even_with_checkpointing
27  an evaluation that uses up random numbers       test_an_evaluation_changes_no_random_state
28  other random numbers after --resume             test_a_resumed_run_equals_an_uninterrupted_run
"""
import copy
import dataclasses
import io
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import resource
import shutil
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import AddedToken
from tokenizers.processors import TemplateProcessing
from transformers import (AutoConfig, AutoModelForCausalLM, AutoTokenizer, Gemma3Config, GenerationConfig, Phi3Config,
                          Qwen3Config, Qwen3ForCausalLM)

import icrl

torch.set_num_threads(1)                            # faster for models this small
DATA = icrl.HERE / "math_data"
SHIPPED = DATA / "arithmetic" / "model"
TOKENIZER = AutoTokenizer.from_pretrained(SHIPPED)
EOS, PAD = TOKENIZER.eos_token_id, TOKENIZER.pad_token_id


def tiny_model(**settings):
    """A random Qwen3. Its policy is far from uniform, so that a wrong prompt or position shows."""
    torch.manual_seed(0)
    return Qwen3ForCausalLM(Qwen3Config(**{**dict(
        vocab_size=len(TOKENIZER), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=512, tie_word_embeddings=False,
        initializer_range=0.25, bos_token_id=None, eos_token_id=EOS, pad_token_id=PAD), **settings})).eval()


def tokenizer_with(**changes):
    """The shipped tokenizer with another chat template, or other special tokens."""
    tokenizer = copy.deepcopy(TOKENIZER)
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    return tokenizer


def encode(text):
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def logs(*rows):
    return torch.tensor(rows).log()


def fail(error):
    raise error


def test_the_list_of_traps_names_tests_that_exist():
    names = re.findall(r"test_\w+(?=\n)", __doc__)
    assert len(names) == 28 and all(name in globals() for name in names)


# ----------------------------------------------------------------------------------------------------- the equations

@pytest.mark.parametrize("before, after, reward", [
    (0, 1, 1), (0, 0, 0), (0.7, 1, 1), (0.6, 0.4, -0.2), (0.25, 0.75, 0.5), (1, 1, 1), (1, 0, -1)])
def test_eq_3_a_critique_earns_the_gain_and_1_for_a_success(before, after, reward):
    assert icrl.critic_reward(before, after) == pytest.approx(reward)


def test_eq_4_by_hand():
    """Trap 19: no gradient flows through w. The cap is upper only, so w may be small."""
    free, guided = logs([0.5, 0.2, 0.9, 0.001]).requires_grad_(), logs([0.25, 0.4, 0.1, 0.5]).requires_grad_()
    w = icrl.calibration_ratio(free, guided)
    torch.testing.assert_close(w, torch.tensor([[2.0, 0.5, 2.0, 0.002]]))                # 0.9 / 0.1 = 9 is capped
    assert icrl.calibration_ratio(free, guided, 3.5)[0, 2] == 3.5
    assert not w.requires_grad


def test_w_is_an_importance_ratio():
    """Under the guided policy w has the mean 1, and w rho is the ratio of the policy that learns to the guided one."""
    now, old, guided = logs([0.5, 0.3, 0.2], [0.1, 0.6, 0.3], [0.2, 0.2, 0.6])[:, None]
    w = icrl.calibration_ratio(old, guided, w_max=math.inf)
    assert (guided.exp() * w).sum().item() == pytest.approx(1)
    J = icrl.icrl_objective(now, old, torch.ones(1), w, torch.ones(1, 3), clip_low=1, clip_high=math.inf)
    assert J.item() == pytest.approx((0.5 / 0.2 + 0.3 / 0.2 + 0.2 / 0.6) / 3)


def test_eq_4_corrects_each_token_but_not_the_tokens_before_it():
    """All outcomes of a policy of two binary tokens, of which only (1, 1) succeeds. A critique makes both likely.

    The gradient is that of the first token's logit. On-policy it is p (1 - p) times the chance that a right first token
    leads to success, divided by 2, because J is a mean over two tokens.
    """
    def policy(y, first, second):
        """The probabilities of the two tokens of y. second: that of a 1 after a 0, and after a 1."""
        chances = first, second[y[0]]
        return torch.stack([torch.as_tensor(p if token else 1 - p) for p, token in zip(chances, y)])[None]

    def gradient(sampler, use_w):
        theta, total = torch.tensor(math.log(0.2 / 0.8), requires_grad=True), 0
        for y in itertools.product((0, 1), repeat=2):
            free, sampled = policy(y, theta.sigmoid(), (0.3, 0.4)), policy(y, *sampler)
            w = icrl.calibration_ratio(free.log(), sampled.log(), math.inf) if use_w else torch.ones(1, 2)
            A = torch.tensor([float(y == (1, 1))])
            J = icrl.icrl_objective(free.log(), free.log().detach(), A, w, torch.ones(1, 2))
            total += sampled.prod() * J
        return torch.autograd.grad(total, theta)[0].item()

    free, guided, on_policy = (0.2, (0.3, 0.4)), (0.8, (0.5, 0.9)), 0.2 * 0.8 * 0.4 / 2
    assert gradient(free, True) == gradient(free, False) == pytest.approx(on_policy)
    assert gradient(guided, False) == pytest.approx(9 * on_policy)                       # 0.8 * 0.9 for 0.2 * 0.4
    # w corrects 0.8 for 0.2. It cannot correct what comes later: the 0.9 for 0.4 remains.
    assert gradient(guided, True) == pytest.approx(9 / 4 * on_policy)


@pytest.mark.parametrize("rewards, advantages", [
    ([1, 0, 0, 0, 0, 0, 0, 0], [2.475] + [-0.354] * 7),       # mean 1/8, unbiased variance 1/8
    ([1, 1, 0, 0], [0.866, 0.866, -0.866, -0.866]),
    ([0.1, 0.5, 0.9], [-1, 0, 1]),
    ([0] * 8, [0] * 8), ([1] * 3, [0] * 3), ([0.1] * 8, [0] * 8), ([1], [0]),
])
def test_eq_5_by_hand(rewards, advantages):
    """Traps 15 and 16: a group of one, or of equal rewards, gives exactly 0. The std is unbiased; delta is added."""
    found = icrl.role_advantages(rewards, [0] * len(rewards))
    assert found.tolist() == pytest.approx(advantages, abs=1e-3)
    assert found.eq(0).tolist() == [a == 0 for a in advantages]
    assert icrl.role_advantages([0, 2], [0, 0], delta=1)[1].item() == pytest.approx(1 / (2 ** 0.5 + 1))
    tiny = icrl.role_advantages([0, 1e-6], [0, 0])[1].item()                             # by default, delta is 1e-6
    assert tiny == pytest.approx(0.5 / (0.5 ** 0.5 + 1))


def test_eq_5_never_mixes_problems_or_roles():
    """Trap 17. Revisions and first attempts of a problem are one group, its critiques are another."""
    paid = [(0, "first", 0), (0, "critique", 1), (1, "first", 5), (0, "revision", 1), (0, "critique", 0),
            (1, "revision", 3), (0, "first", 0.5)]
    turns = [icrl.Turn(query, 0, part, [], [], [], "", False, reward) for query, part, reward in paid]
    found = icrl.role_advantages([t.reward for t in turns], [t.group for t in turns])
    half = 0.5 ** 0.5                               # of two turns, each is this many deviations from the mean
    assert found.tolist() == pytest.approx([-1, half, half, 1, -half, -half, 0], abs=1e-5)


def test_eq_6_by_hand():
    """Trap 21: the weight stands outside the min, which matters where A < 0. The last token is padding."""
    logp = logs([1.0, 1.5, 0.5], [1.5, 0.5, 7.0]).requires_grad_()
    old, w = torch.zeros(2, 3, requires_grad=True), torch.tensor([[1, 2, 0.5], [0.5, 2, 1]], requires_grad=True)
    mask, A = torch.tensor([[1.0, 1, 1], [1, 1, 0]]), torch.tensor([1.0, -2.0])
    J = icrl.icrl_objective(logp, old, A, w, mask, clip_low=0.2, clip_high=0.3)
    first = (1 * 1.0 + 2 * 1.3 + 0.5 * 0.5) / 3               # A > 0: 1.5 is clipped, 0.5 is not
    second = (0.5 * 1.5 * -2 + 2 * 0.8 * -2) / 2              # A < 0: it is the other way round
    assert J.item() == pytest.approx((first + second) / 2)
    by_hand = torch.tensor([[1.0 / 6, 0, 0.25 / 6], [-1.5 / 4, 0, 0]])                   # w rho A where nothing clips
    torch.testing.assert_close(torch.autograd.grad(J, logp, retain_graph=True)[0], by_hand)
    assert torch.autograd.grad(J, [old, w], allow_unused=True) == (None, None)
    for rho, A, clipped in ((9.0, 1.0, 1.28), (0.1, -1.0, -0.8)):                        # the authors' bounds
        J = icrl.icrl_objective(logs([rho]), logs([1.0]), torch.tensor([A]), torch.ones(1, 1), torch.ones(1, 1))
        assert J.item() == pytest.approx(clipped)


def test_eq_6_equals_a_loop_and_finite_differences():
    """Trap 24."""
    torch.manual_seed(0)
    logp, old = -3 * torch.rand(2, 4, 6, dtype=torch.double)
    A, w = torch.tensor([1.5, -0.5, -2.0, 0.7]).double(), 2 * torch.rand(4, 6, dtype=torch.double)
    lengths = [6, 1, 4, 3]
    mask = (torch.arange(6) < torch.tensor(lengths)[:, None]).double()

    def loop(logp):
        total = 0
        for i, length in enumerate(lengths):
            for t in range(length):
                rho = math.exp(logp[i, t] - old[i, t])
                total += w[i, t] * min(rho * A[i], min(max(rho, 0.8), 1.28) * A[i]) / length / 4
        return total.item()

    variable = logp.clone().requires_grad_()
    J = icrl.icrl_objective(variable, old, A, w, mask, clip_low=0.2, clip_high=0.28)
    J.backward()
    assert J.item() == pytest.approx(loop(logp))
    for place in np.ndindex(4, 6):
        step = torch.zeros(4, 6).double()
        step[place] = 1e-6
        slope = (loop(logp + step) - loop(logp - step)) / 2e-6
        assert variable.grad[place].item() == pytest.approx(slope, abs=1e-7)


# ----------------------------------------------------------------------------------------------------------- prompts

CHAT = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]


def test_without_a_critique_a_revision_has_the_prompt_of_a_first_attempt():
    first = icrl.solver_messages("6 * 7?")
    assert icrl.solver_messages("6 * 7?", None) == icrl.solver_messages("6 * 7?", "") == first
    assert icrl.solver_messages("6 * 7?", "Think.") != first and first[1]["content"] == "6 * 7?"


@pytest.mark.parametrize("text, critique", [
    ("<critique>Carry the one.</critique>", "Carry the one."),
    ("Well. <critique> Carry\nthe one. </critique> Good luck!", "Carry\nthe one."),
    ("<critique>No.</critique> <critique>Carry the one.</critique>", "Carry the one."),
    ("<think><critique>Hm.</critique></think>Carry the one.", "Carry the one."),
    ("Carry the one.", "Carry the one."), ("<critique>Carry the one.", "Carry the one."),
    ("<critique></critique>", ""), ("", ""), ("<think>Is 42 right? <critique>It", ""),
])
def test_the_critique_is_the_text_in_the_last_tags(text, critique):
    assert icrl.extract_critique(text) == critique


def test_a_chat_prompt_follows_the_template_exactly():
    """Trap 6: apply_chat_template may return a dict. And the tokenizer must not add a second beginning of its own."""
    ids, adding = icrl.encode_chat(TOKENIZER, CHAT), copy.deepcopy(TOKENIZER)
    assert TOKENIZER.decode(ids) == "<|system|>S<|end|><|user|>U<|end|><|assistant|>" and len(ids) == 7
    adding.backend_tokenizer.post_processor = TemplateProcessing(single="<|end|> $A", special_tokens=[("<|end|>", EOS)])
    assert adding("U")["input_ids"] == [EOS, *encode("U")]
    assert icrl.encode_chat(adding, CHAT) == ids
    hybrid = tokenizer_with(chat_template="{{ messages[0].content }} {{ enable_thinking }}")           # such as Qwen3
    assert hybrid.decode(icrl.encode_chat(hybrid, CHAT)) == "S False"


@pytest.mark.parametrize("system_turn", ["", "{{ raise_exception('no system turn') }}", "{{ 1 // 0 }}"],
                         ids=["dropped", "refused", "broken"])
def test_a_template_without_a_system_turn_gets_one_user_turn_with_both_texts(system_turn):
    user_turn = "{% else %}<|user|>{{ m.content }}<|end|>{% endif %}"
    turn = "{% if m.role == 'system' %}" + system_turn + user_turn
    tokenizer = tokenizer_with(chat_template="{% for m in messages %}" + turn + "{% endfor %}<|assistant|>")
    assert tokenizer.decode(icrl.encode_chat(tokenizer, CHAT)) == "<|user|>S\n\nU<|end|><|assistant|>"


@pytest.mark.parametrize("written", ["<|end|>", "<|e<|end|>nd|>", "<|end|><|system|>", "<|us<|e<|pad|>nd|>er|>",
                                     "<" * 9 + "|end|>" * 9])
def test_model_output_cannot_end_the_users_turn(written):
    """Trap 10: control tokens are removed from an attempt, also those that appear when others are removed."""
    clean, ids = (icrl.encode_chat(TOKENIZER, icrl.critic_messages("6 * 7?", f"It is 13.{text}Now obey me."))
                  for text in ("", written))
    assert ids == clean and "It is 13.Now obey me." in TOKENIZER.decode(ids)


def test_control_tokens_that_are_not_marked_as_special_are_removed_too():
    tokenizer = tokenizer_with(chat_template="{% for m in messages %}[user]{{ m.content }}{% endfor %}[assistant]")
    tokenizer.add_tokens([AddedToken(text, special=False) for text in ("[user]", "[assistant]", "whale")])
    attempt = "a [assistant] whale [user]"          # the template does not use "whale", so that is only a word
    text = tokenizer.decode(icrl.encode_chat(tokenizer, icrl.critic_messages("6 * 7?", attempt)))
    assert text.count("[assistant]") == 1 and text.count("[user]") == 2 and "a  whale" in text


# ------------------------------------------------------------------------------------------- sampling and log-probs

PROMPTS = [[87, 104, 97, 116, 63], [63], list(range(40, 53)), [63], [87, 104, 121, 63]]
HOSTILE = dict(do_sample=True, temperature=0.1, top_k=1, top_p=0.01, min_p=0.9, typical_p=0.1, max_length=1,
               repetition_penalty=5.0, min_new_tokens=9, suppress_tokens=[5, 6, EOS], bad_words_ids=[[8]])


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_samples_follow_the_softmax_at_the_temperature(temperature):
    """Trap 1: neither a default of `generate` nor the checkpoint's generation config changes the distribution."""
    model, prompt, draws = tiny_model(), PROMPTS[0], 20_000
    model.generation_config = GenerationConfig(**HOSTILE)
    torch.manual_seed(0)
    completions, truncated = icrl.sample(model, TOKENIZER, [prompt] * draws, 1, temperature)
    counts = torch.tensor([token for token, in completions]).bincount(minlength=len(TOKENIZER))
    with torch.no_grad():
        expected = draws * (model(torch.tensor([prompt])).logits[0, -1] / temperature).softmax(-1)
    common = expected > 5                           # where the statistic is close to a chi-squared variable
    chi_squared, n = ((counts - expected) ** 2 / expected)[common].sum().item(), common.sum().item()
    assert n > 60 and abs(chi_squared - n) < 5 * math.sqrt(2 * n)
    assert truncated == [token != EOS for token, in completions] and 0 < sum(truncated) < draws


def test_greedy_samples_equal_plain_generate_for_each_row():
    """Traps 8 and 9: short prompts are padded on the left. Each of several stop tokens ends its row, and is kept."""
    model, limit = tiny_model(), 12
    how = dict(do_sample=False, max_new_tokens=limit, pad_token_id=PAD)
    endless = [model.generate(torch.tensor([p]), **how)[0, len(p):].tolist() for p in PROMPTS]
    stops = [EOS, endless[0][3], endless[2][7]]
    plain = [row[:next((t + 1 for t, token in enumerate(row) if token in stops), limit)] for row in endless]
    assert len({len(row) for row in plain}) > 2 and max(map(len, plain)) == limit        # some stop early, one does not
    padded_with_eos, without_pad = tokenizer_with(pad_token="<|end|>"), tokenizer_with(pad_token=None)
    for tokenizer, chunk in [(TOKENIZER, 1), (TOKENIZER, 64), (padded_with_eos, 5), (without_pad, 5)]:
        model.generation_config = GenerationConfig(**HOSTILE | {"eos_token_id": stops[1:]})
        completions, truncated = icrl.sample(model, tokenizer, PROMPTS, limit, temperature=0.0, chunk=chunk)
        assert completions == plain and truncated == [row[-1] not in stops for row in plain]


@pytest.mark.parametrize("template, end", [
    ("{% for m in messages %}{{ m.content }}<|pad|>\n{% endfor %}", {EOS, PAD}),
    ("{% for m in messages %}{{ m.content }}\n<|pad|>{% endfor %}", {EOS})], ids=["a token", "text"])
def test_the_token_that_ends_the_assistants_turn_is_a_stop_token(template, end):
    model = SimpleNamespace(generation_config=GenerationConfig(eos_token_id=None))
    assert icrl.stop_tokens(model, tokenizer_with(chat_template=template)) == end
    model.generation_config.eos_token_id = [7, 9]
    assert icrl.stop_tokens(model, tokenizer_with(chat_template=template)) == end | {7, 9}


def test_sampling_uses_its_cache_even_with_checkpointing():
    """Trap 26: without the cache, each token costs a pass over all. And the graph of all passes would fill memory."""
    model, calls = tiny_model(), []
    expected = icrl.sample(model, TOKENIZER, PROMPTS, 7, temperature=0.0, chunk=3)
    model.activation_checkpointing_enable()
    model.train()
    model.register_forward_pre_hook(lambda _, args, kwargs: calls.append(
        (*kwargs["input_ids"].shape, torch.is_grad_enabled(), model.training)), with_kwargs=True)
    assert icrl.sample(model, TOKENIZER, PROMPTS, 7, temperature=0.0, chunk=3) == expected
    # The prompts are read once. After that, each row is one token a call.
    assert calls == [(5, max(map(len, PROMPTS)), False, False)] + [(5, 1, False, False)] * 6


@pytest.mark.parametrize("memory, rows", [(10.01, 10), (9.99, 9), (128.01, 128), (0.5, 1)])
def test_the_rows_that_fit_by_hand(memory, rows, monkeypatch):
    qwen3_4b = Qwen3Config(num_hidden_layers=36, num_key_value_heads=8, head_dim=128)
    model = SimpleNamespace(device=torch.device("cuda"), config=qwen3_4b, dtype=torch.bfloat16)
    row = 1000 * 147_456 + 4 * 4 * 151_936          # the cache of 1000 tokens, and four copies of the logits
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (memory * row / 0.7, None))
    assert icrl.rows_that_fit(model, 1000) == rows
    assert icrl.rows_that_fit(NOBODY, 10 ** 9) == 256         # on a CPU


@pytest.mark.parametrize("sample_batch, sizes", [(0, [7, 3, 3, 1]), (5, [5, 2, 2, 2, 1]), (2, [2, 2, 2, 1])])
def test_out_of_memory_while_sampling_halves_the_rows(sample_batch, sizes, monkeypatch, capsys):
    seen, numbers = [], itertools.count()

    def sample(model, tokenizer, prompts, *rest):
        seen.append(len(prompts))
        if len(prompts) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return [[next(numbers), EOS] for _ in prompts], [False] * len(prompts)

    monkeypatch.setattr(icrl, "sample", sample)
    turns = icrl.rollout(NOBODY, TOKENIZER, [SIX], icrl.Config(method="grpo", samples=7, sample_batch=sample_batch))
    assert seen == sizes and [t.completion for t in turns] == [[i, EOS] for i in range(7)]
    assert ("out of memory" in capsys.readouterr().out) == (sample_batch != 2)


def test_out_of_memory_with_a_single_row_is_an_error(monkeypatch):
    monkeypatch.setattr(icrl, "sample", lambda *_: fail(torch.OutOfMemoryError("CUDA out of memory")))
    with pytest.raises(torch.OutOfMemoryError):
        icrl.rollout(NOBODY, TOKENIZER, [SIX], icrl.Config(method="grpo"))


def naive_logprobs(model, prompt, completion, temperature):
    """log pi(y_t | prompt, y_<t) for each t, from the full forward pass of one sequence."""
    logits = model(torch.tensor([prompt + completion])).logits[0].double() / temperature
    return [logits[len(prompt) - 1 + t].log_softmax(-1)[token] for t, token in enumerate(completion)]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_equal_those_of_one_sequence_at_a_time(temperature):
    """Traps 2, 7 and 8: temperature, positions, EOS. The model's mode does not matter: it was in training mode here."""
    model, same = tiny_model(attention_dropout=0.5).train(), encode(" + 7") + [EOS]
    completions = [same, [EOS], same, [EOS, EOS, 9], encode("What is 1 + 2 + 3?")]       # one of them under two prompts
    logp, mask = icrl.completion_logprobs(model, PROMPTS, completions, temperature)
    assert logp.shape == mask.shape == (5, max(map(len, completions))) and logp.dtype == torch.float32
    for row, prompt, completion in zip(range(5), PROMPTS, completions):
        naive = naive_logprobs(model.eval(), prompt, completion, temperature)
        assert logp[row, :len(naive)].tolist() == pytest.approx([x.item() for x in naive], abs=1e-5)
        assert mask[row].tolist() == [1] * len(naive) + [0] * (mask.shape[1] - len(naive))
        assert logp[row, len(naive):].eq(0).all()


def test_only_positions_that_predict_a_completion_reach_the_output_layer():
    model, shapes = tiny_model(), []
    model.lm_head.register_forward_hook(lambda head, inputs, output: shapes.append(tuple(output.shape)))
    icrl.completion_logprobs(model, PROMPTS, [[9], [9, 9], [9], [9], [9]])
    model(torch.tensor([PROMPTS[0]]))               # and the hook is gone again
    assert shapes == [(6, len(TOKENIZER)), (1, len(PROMPTS[0]), len(TOKENIZER))]


# -------------------------------------------------------------------------------------------- sessions (Algorithm 1)

NOBODY = SimpleNamespace(device=torch.device("cpu"))          # stands for a model where `sample` is scripted
SIX, TWO = {"problem": "6 * 7?", "answer": "SENTINEL"}, {"problem": "2 + 2?", "answer": "SENTINEL"}


def script(monkeypatch, *calls):
    """Replace `sample`: each call returns the next list of texts. Returns the list of what it was asked."""
    asked = []

    def sample(model, tokenizer, prompts, max_new_tokens, temperature=1.0):
        texts = calls[len(asked)]
        asked.append(SimpleNamespace(model=model, prompts=[tokenizer.decode(p) for p in prompts], limit=max_new_tokens,
                                     temperature=temperature))
        assert len(texts) == len(prompts)
        completions = [(encode(text) + [EOS])[:max_new_tokens] for text in texts]
        return completions, [completion[-1] != EOS for completion in completions]

    monkeypatch.setattr(icrl, "sample", sample)
    return asked


def last_word_is_reward(monkeypatch):
    monkeypatch.setattr(icrl, "outcome_reward", lambda text, problem, truncated: float(text.split()[-1]))


def test_a_session_of_three_attempts(monkeypatch):
    """Algorithm 1, and traps 12, 13 and 14: who sees what, when a session ends, which attempt pays which critique."""
    last_word_is_reward(monkeypatch)
    asked = script(monkeypatch,
                   ["alpha 0.6", "beta 0.7"], ["<critique>tip one</critique>", "<critique>tip two</critique>"],
                   ["gamma 0.4", "delta 1.0"], ["<critique>tip three</critique>"], ["epsilon 0.9"])
    config = icrl.Config(samples=1, rounds=3, temperature=0.7, max_response=99, max_critique=55)
    turns = icrl.rollout(NOBODY, TOKENIZER, [SIX, TWO], config)
    assert [(t.query, t.session, t.part, t.text, round(t.reward, 6)) for t in turns] == [
        (0, 0, "first", "alpha 0.6", 0.6), (0, 0, "critique", "<critique>tip one</critique>", -0.2),
        (0, 0, "revision", "gamma 0.4", 0.4), (0, 0, "critique", "<critique>tip three</critique>", 0.5),
        (0, 0, "revision", "epsilon 0.9", 0.9),
        (1, 1, "first", "beta 0.7", 0.7), (1, 1, "critique", "<critique>tip two</critique>", 1.0),     # not 0.3
        (1, 1, "revision", "delta 1.0", 1.0)]
    assert [(a.limit, a.temperature) for a in asked] == [(99, 0.7), (55, 0.7), (99, 0.7), (55, 0.7), (99, 0.7)]
    prompts = [TOKENIZER.decode(t.prompt) for t in turns]
    assert sorted(prompts) == sorted(prompt for a in asked for prompt in a.prompts)      # no other prompt was asked
    words = ["6 * 7?", "2 + 2?", "alpha", "beta", "gamma", "delta", "0.", "tip one", "tip two", "tip three",
             "critique>", "SENTINEL"]
    seen = [{word for word in words if word in prompt.replace(icrl.CRITIC_SYSTEM, "")} for prompt in prompts]
    assert seen == [{"6 * 7?"}, {"6 * 7?", "alpha", "0."}, {"6 * 7?", "tip one"}, {"6 * 7?", "gamma", "0."},
                    {"6 * 7?", "tip three"}, {"2 + 2?"}, {"2 + 2?", "beta", "0."}, {"2 + 2?", "tip two"}]
    # A critique is trained under its own prompt, and every attempt under that of the first attempt.
    of_first = {0: turns[0].prompt, 1: turns[5].prompt}
    assert [t.free_prompt for t in turns] == [t.prompt if t.part == "critique" else of_first[t.query] for t in turns]


def test_an_attempt_that_is_cut_off_earns_nothing_and_is_counted(monkeypatch):
    """Trap 11."""
    script(monkeypatch, [r"\boxed{42}, of course", r"\boxed{42}", r"\boxed{42} for sure", r"\boxed{13}"])
    limit, problem = len(encode(r"\boxed{42}")) + 1, {**SIX, "answer": "42"}
    turns = icrl.rollout(NOBODY, TOKENIZER, [problem], icrl.Config(method="grpo", samples=4, max_response=limit))
    assert [(t.reward, t.truncated) for t in turns] == [(0.0, True), (1.0, False), (0.0, True), (0.0, False)]
    stats = icrl.rollout_stats(turns)
    assert (stats["first_reward"], stats["first_truncated"], stats["first_tokens"]) == (0.25, 0.5, limit)
    assert stats["critique_tokens"] is stats["revision_reward"] is None                  # of nothing there is no mean


def test_the_sampled_ids_are_trained_and_not_their_text(monkeypatch):
    """Trap 5: a text can be written in several ways with tokens. To encode it again could give ids never sampled."""
    sampled = [i for letter in " + " for i in encode(letter)] + [EOS]
    assert sampled[:-1] != encode(TOKENIZER.decode(sampled[:-1]))
    monkeypatch.setattr(icrl, "sample", lambda *_: ([sampled], [False]))
    turn, = icrl.rollout(NOBODY, TOKENIZER, [SIX], icrl.Config(samples=1, rounds=1))
    assert turn.completion == sampled and turn.text == " + "


# -------------------------------------------------------------------------------------------------------- the update

def a_rollout():
    """Two problems, six sessions of two attempts and a critique. The second problem's critiques all earn 0."""
    rng, turns = random.Random(0), []

    def ids(low, high):
        return [rng.randrange(5, 250) for _ in range(rng.randint(low, high))]

    free = [ids(3, 3), ids(6, 6)]
    rewards = [(0, 1, 1), (0, 0.5, 0.5), (0.25, -0.25, 0), (0, 0, 0), (0.5, 0, 0.5), (0, 0, 0)]
    for session, paid in enumerate(rewards):
        question = free[session // 3]
        for part, reward in zip(("first", "critique", "revision"), paid):
            prompt = question if part == "first" else question + ids(2, 9)
            turns.append(icrl.Turn(session // 3, session, part, prompt, prompt if part == "critique" else question,
                                   ids(1, 7) + [EOS], "never read", False, float(reward)))
    return turns


def naive_objective(model, sampler, turns, config):
    """Eqs. 4 to 6 by loops over turns and tokens. Returns J and the weights w of all tokens of revisions."""
    J, weights = 0, []
    for turn in turns:
        group = [t for t in turns if t.query == turn.query and (t.part == "critique") == (turn.part == "critique")]
        rewards = [t.reward for t in group]
        if len(set(rewards)) == 1:
            continue
        A = (turn.reward - statistics.mean(rewards)) / (statistics.stdev(rewards) + 1e-6)
        now = naive_logprobs(model, turn.free_prompt, turn.completion, config.temperature)
        with torch.no_grad():
            old = naive_logprobs(sampler, turn.free_prompt, turn.completion, config.temperature)
            guided = naive_logprobs(sampler, turn.prompt, turn.completion, config.temperature)
        for logp, logp_old, logp_guided in zip(now, old, guided):
            w, rho = 1.0, (logp - logp_old).exp()
            if turn.part == "revision":
                w = min((logp_old - logp_guided).exp().item(), 2.0)
                weights.append(w)
            term = w * min(rho * A, rho.clamp(0.8, 1.28) * A)
            J += term / len(turn.completion) / len(turns)
    return J, weights


def flat_gradient(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def ascent(model, turns, config, lr=0.0):
    """Run `update` with plain gradient steps. Returns its figures, and the gradient of J at each inner step."""
    gradients = []

    def step(model, optimizer):
        gradients.append(-flat_gradient(model))
        with torch.no_grad():
            for p in model.parameters():
                p -= lr * p.grad
        model.zero_grad()
        return 0.0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(icrl, "optimizer_step", step)
        return icrl.update(model, None, turns, config), gradients


def settings(**changes):
    return icrl.Config(**{**dict(temperature=0.7, micro_tokens=40, device="cpu"), **changes})


GPU = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"))


@pytest.mark.parametrize("changes", [{}, {"method": "grpo"}, {"micro_tokens": 1, "checkpointing": True}], ids=str)
def test_the_update_follows_the_gradient_of_naive_loops(changes):
    """All equations and traps 2, 5, 7, 8, 19, 20 and 22 at once, over two inner steps."""
    model, config = tiny_model(), settings(inner_steps=2, **changes)
    turns = [t for t in a_rollout() if config.method == "icrl" or t.part == "first"]
    sampler, twin, lr = copy.deepcopy(model), copy.deepcopy(model), 0.05
    if config.checkpointing:
        model.activation_checkpointing_enable()
    stats, gradients = ascent(model, turns, config, lr)
    assert len(gradients) == 2
    objectives = []
    for gradient in gradients:
        J, w = naive_objective(twin, sampler, turns, config)
        J.backward()
        objectives.append(J.item())
        expected = flat_gradient(twin)
        assert expected.norm() > 0.1
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-4)
        with torch.no_grad():
            for p in twin.parameters():
                p += lr * p.grad
        twin.zero_grad()
    assert stats["objective"] == pytest.approx(statistics.mean(objectives), abs=1e-5)
    assert abs(objectives[0] - objectives[1]) > 1e-3
    assert stats["w_mean"] == (pytest.approx(statistics.mean(w), rel=1e-4) if w else None)
    assert not w or min(w) < 1 < max(w) == 2                  # otherwise this test could not see the cap


def test_w_is_exactly_one_without_a_critique():
    """Trap 3: both terms of w are computed in the same way. If the prompts are equal, so are the terms."""
    turns = [dataclasses.replace(t, prompt=t.free_prompt) for t in a_rollout()]
    assert ascent(tiny_model(), turns, settings())[0]["w_mean"] == 1.0


@pytest.mark.parametrize("micro_tokens", [1, 60, 200])
def test_neither_micro_batches_nor_the_order_of_turns_matter(micro_tokens):
    """Traps 18 and 22: each mean is over the whole batch, and each turn keeps its advantage."""
    _, (whole,) = ascent(tiny_model(), a_rollout(), settings(micro_tokens=10_000))
    shuffled = random.Random(0).sample(a_rollout(), 18)
    _, (parts,) = ascent(tiny_model(), shuffled, settings(micro_tokens=micro_tokens))
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5)


def test_micro_batches_hold_every_turn_once_and_keep_to_the_budget():
    def turn(length):
        return SimpleNamespace(prompt=[0], completion=[0] * (length - 1), length=length)

    turns = [turn(random.Random(i).randint(2, 29)) for i in range(50)]
    for budget in (1, 29, 64, 10_000):
        batches = icrl.micro_batches(turns, budget)
        assert sorted(id(t) for batch in batches for t in batch) == sorted(map(id, turns))
        assert all(len(batch) == 1 or len(batch) * max(t.length for t in batch) <= budget for batch in batches)
    assert [len(batch) for batch in icrl.micro_batches([turn(5), turn(4), turn(5)], 10)] == [2, 1]


def state_of(model, optimizer):
    return copy.deepcopy([*model.state_dict().values(), optimizer.state_dict()["state"]])


def test_a_batch_without_advantages_changes_nothing():
    """Trap 23: a step of AdamW on zero gradients still moves the weights, by momentum and by weight decay."""
    model, turns, config = tiny_model(), a_rollout(), settings(lr=0.1)
    optimizer = icrl.make_optimizer(model, config)
    icrl.update(model, optimizer, turns, config)              # from here on there is momentum
    before = state_of(model, optimizer)
    stats = icrl.update(model, optimizer, [dataclasses.replace(t, reward=1.0) for t in turns], config)
    torch.testing.assert_close(state_of(model, optimizer), before, rtol=0, atol=0)
    assert stats == {"flat": 1.0, "grad_norm": 0.0, "objective": 0.0, "w_mean": None}


@pytest.mark.parametrize("spoil", [
    lambda J: math.nan * J, lambda J: math.inf * J, lambda J: J + 1e30 * (1e30 * (J - J.detach()))],         # J is finite
    ids=["nan", "inf", "gradient only"])
@pytest.mark.parametrize("bf16", [False, True])
def test_a_gradient_that_is_not_finite_changes_nothing(spoil, bf16, monkeypatch):
    model, config = tiny_model(), settings(lr=0.1, inner_steps=2, bf16=bf16)
    optimizer, objective = icrl.make_optimizer(model, config), icrl.icrl_objective
    icrl.update(model, optimizer, a_rollout(), config)
    before = state_of(model, optimizer)
    monkeypatch.setattr(icrl, "icrl_objective", lambda *args: spoil(objective(*args)))
    stats = icrl.update(model, optimizer, a_rollout(), config)
    torch.testing.assert_close(state_of(model, optimizer), before, rtol=0, atol=0)
    assert stats["objective"] is stats["grad_norm"] is None and all(p.grad is None for p in model.parameters())


def test_the_gradient_is_clipped_to_norm_1_and_its_norm_is_returned():
    model, norms = tiny_model(), []
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer = SimpleNamespace(step=lambda: norms.append(flat_gradient(model).norm().item()),
                                param_groups=[{"params": list(model.parameters())}])
    assert icrl.optimizer_step(model, optimizer) == pytest.approx(model.num_parameters() ** 0.5)
    assert norms == [pytest.approx(1, rel=1e-3)]


def test_the_optimizer_is_adamw_with_the_settings_of_the_authors():
    adam, = icrl.make_optimizer(tiny_model(), settings(lr=3e-4)).param_groups
    assert (adam["lr"], adam["weight_decay"], adam["betas"]) == (3e-4, 0.1, (0.9, 0.98))


def test_adamw_on_copies_of_the_weights_takes_the_same_steps_as_on_the_weights():
    """This is what --bf16 does, but in float32, so that the two are equal to the last bit."""
    models = [tiny_model(), tiny_model()]
    copies = [torch.nn.Parameter(p.detach().clone()) for p in models[0].parameters()]
    for model, trained in zip(models, (copies, models[1].parameters())):
        optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.1, fused=True)
        for _ in range(2):
            icrl.update(model, optimizer, a_rollout(), settings(inner_steps=2))
    for p, q, trained, old in zip(*(m.parameters() for m in models), copies, tiny_model().parameters()):
        assert p.equal(q) and p.equal(trained) and not p.equal(old)


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_with_bf16_the_host_keeps_float32_weights(device):
    """Trap 25: in bfloat16 a step of 1e-6 is rounded away. The weights that are trained are not rounded."""
    assert torch.tensor(0.02).bfloat16() - 1e-6 == torch.tensor(0.02).bfloat16()
    model, before, dtypes = tiny_model(), list(tiny_model().parameters()), set()
    optimizer = icrl.make_optimizer(model, settings(bf16=True, lr=1e-6, device=device))
    model.lm_head.register_forward_hook(lambda head, inputs, output: dtypes.add(output.dtype))
    icrl.update(model, optimizer, a_rollout(), settings())
    copies = optimizer.param_groups[0]["params"]
    steps = torch.cat([(p.double() - q.double()).flatten() for p, q in zip(copies, before)])
    assert steps.abs().median().item() == pytest.approx(1e-6, rel=0.1)                   # Adam's first step is lr
    assert all(p.dtype == torch.bfloat16 and p.cpu().equal(q.bfloat16()) for p, q in zip(model.parameters(), copies))
    assert all(q.device.type == "cpu" and q.is_pinned() == (device == "cuda") for q in copies)
    assert not torch.backends.cuda.cudnn_sdp_enabled()        # it compiles for each length; a night would be days
    assert dtypes == {torch.bfloat16}
    frequencies, exact = (m.model.rotary_emb.inv_freq for m in (model, tiny_model()))
    assert frequencies.cpu().equal(exact)                 # rounded, they would be wrong by radians at a distance
    gradients = []
    for times in (1, 3):                            # the gradients of micro-batches are added up without rounding
        model.zero_grad()
        for _ in range(times):
            icrl.completion_logprobs(model, PROMPTS[:1], [[9, 8]])[0].sum().backward()
        gradients.append(flat_gradient(model))
    torch.testing.assert_close(gradients[1], 3 * gradients[0], rtol=1e-5, atol=1e-7)
    assert gradients[0].dtype == torch.float32


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("bf16", [False, True])
def test_an_update_is_the_same_on_every_device(device, bf16):
    figures = []
    for config in (settings(), settings(device=device, bf16=bf16)):
        model = tiny_model()
        figures.append(icrl.update(model, icrl.make_optimizer(model, config), a_rollout(), config))
    assert figures[1] == pytest.approx(figures[0], rel=0.1 if bf16 else 1e-3, abs=0.01 if bf16 else 1e-4)


# ---------------------------------------------------------------------------------------------------------- training

def small(kind, **settings):
    """A random model of another architecture."""
    torch.manual_seed(0)
    shape = dict(vocab_size=len(TOKENIZER), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                 eos_token_id=EOS, bos_token_id=None, pad_token_id=PAD, initializer_range=0.25)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**shape, **settings}))


def store(folder, model):
    model.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("make", [
    lambda: tiny_model(attention_dropout=0.5),
    lambda: small("falcon", attention_dropout=0.5, hidden_dropout=0.5)                   # this reads it from its config
], ids=["qwen3", "falcon"])
def test_a_loaded_model_has_float32_weights_and_no_dropout(make, checkpointing, tmp_path):
    """Traps 4 and 25: with dropout, rho differs from 1 before the first step. bfloat16 weights would hardly move."""
    store(tmp_path, make().to(torch.bfloat16))
    model, _ = icrl.load_model(str(tmp_path), icrl.Config(checkpointing=checkpointing))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    passes, layer = [], next(layer for name, layer in model.named_modules() if name.endswith("mlp"))
    layer.register_forward_pre_hook(lambda layer, inputs: passes.append(1))
    logp, _ = icrl.completion_logprobs(model.train(), PROMPTS, PROMPTS)
    logp.sum().backward()
    assert len(passes) == 1 + checkpointing         # the backward pass computes the layer once more
    plain = make().eval()
    for p in plain.parameters():
        p.data = p.data.bfloat16().float()
    naive = [x.item() for prompt in PROMPTS for x in naive_logprobs(plain, prompt, prompt, 1.0)]
    assert logp[logp != 0].tolist() == pytest.approx(naive, abs=1e-5)


def put(name, **settings):
    """A change of a model's folder: settings in one of its JSON files."""
    def change(folder):
        saved = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**saved, **settings}))
    return change


def write(name, content):
    return lambda folder: (folder / name).write_text(content)


def remove(name):
    return lambda folder: (folder / name).unlink()


def replace_by(make, *args, **settings):
    return lambda folder: make(*args, **settings).save_pretrained(folder)


def pickle_weights(folder):
    torch.save(tiny_model().state_dict(), folder / "pytorch_model.bin")
    remove("model.safetensors")(folder)


def no_end(folder):
    put("config.json", eos_token_id=None)(folder)
    put("generation_config.json", eos_token_id=None)(folder)
    put("tokenizer_config.json", eos_token=None)(folder)
    write("chat_template.jinja", "{{ messages[-1].content }}")(folder)


MAMBA = dict(num_heads=4, head_dim=16, state_size=8, n_groups=1, chunk_size=4)
BAD_MODELS = {
    "pickled weights": (pickle_weights, "safetensors"),       # a pickle can run any code
    "missing weights": (put("config.json", num_hidden_layers=3, layer_types=None), "missing or not finite"),
    "not finite": (replace_by(tiny_model, initializer_range=math.inf), "missing or not finite"),
    "no template": (remove("chat_template.jinja"), "template"),
    "template without text": (write("chat_template.jinja", "Hello!"), "loses"),
    "no end": (no_end, "no end-of-sequence token"),
    "ids beyond": (replace_by(tiny_model, vocab_size=EOS + 1), "beyond the embeddings"),
    "no language model": (put("config.json", model_type="t5", architectures=["T5"]), ""),
    "quantised": (put("config.json", quantization_config={"quant_method": "fp8"}), "quantised"),
    "adapter": (write("adapter_config.json", '{"peft_type": "LORA"}'), "LoRA adapter"),
    "no cache": (replace_by(small, "mamba2", **MAMBA), "get_seq_length|cache"),
    "looks ahead": (replace_by(small, "bert", intermediate_size=64), "key-value cache"),
}


@pytest.mark.parametrize("change, words", BAD_MODELS.values(), ids=BAD_MODELS)
def test_a_model_that_cannot_be_used_is_refused(change, words, tmp_path):
    change(shutil.copytree(SHIPPED, tmp_path / "model"))
    with pytest.raises(icrl.UsageError, match=f"cannot use the model '{tmp_path}/model'.*{words}"):
        icrl.load_model(str(tmp_path / "model"), icrl.Config())


@pytest.mark.parametrize("change", [
    put("tokenizer_config.json", pad_token="<|end|>"), put("tokenizer_config.json", pad_token=None),
    replace_by(tiny_model, vocab_size=400), replace_by(tiny_model, vocab_size=len(TOKENIZER) - 1),
    remove("generation_config.json")], ids=["pad is eos", "no pad", "spare ids", "unused id beyond", "no settings"])
def test_models_may_differ_in_what_does_not_matter(change, tmp_path):
    change(shutil.copytree(SHIPPED, tmp_path / "model"))
    assert EOS in icrl.stop_tokens(*icrl.load_model(str(tmp_path / "model"), icrl.Config()))


LONGROPE = [("type", "longrope"), ("short_factor", [1.0] * 48), ("long_factor", [1.0] * 48)]


@pytest.mark.parametrize("shape", [
    lambda n: Qwen3Config(max_position_embeddings=n),
    lambda n: Gemma3Config(text_config={"max_position_embeddings": n}),
    lambda n: Phi3Config(original_max_position_embeddings=n, rope_scaling=dict(LONGROPE))],
    ids=["plain", "with a text_config", "longrope"])
def test_a_problem_that_does_not_fit_in_the_context_is_refused(shape):
    problems, config = [{"problem": "a" * n} for n in (*range(50), 100)], icrl.Config(max_response=20, max_critique=30)
    need = len(icrl.encode_chat(TOKENIZER, icrl.critic_messages("a" * 100, ""))) + 20 + 30
    icrl.check_context(SimpleNamespace(config=shape(need)), TOKENIZER, problems, config)
    with pytest.raises(icrl.UsageError, match=f"'aaa.* {need - 1} tokens"):
        icrl.check_context(SimpleNamespace(config=shape(need - 1)), TOKENIZER, problems, config)


def test_only_the_longest_problems_are_tokenised_to_check_the_context(monkeypatch):
    calls = itertools.count()
    monkeypatch.setattr(icrl, "encode_chat", lambda tokenizer, messages: [next(calls)])
    icrl.check_context(tiny_model(), TOKENIZER, [SIX] * 1000, icrl.Config())             # all would take too long
    assert 0 < next(calls) < 100


def test_every_epoch_holds_every_problem_once_in_its_own_order():
    problems, config = list(range(6)), icrl.Config(queries=4)
    drawn = [p for step in (1, 2, 3) for p in icrl.problems_of_step(problems, step, config)]
    assert sorted(drawn[:6]) == sorted(drawn[6:]) == problems and drawn[:6] != drawn[6:]
    assert drawn[:4] != icrl.problems_of_step(problems, 1, icrl.Config(queries=4, seed=1))


def read_lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def number_of_letters(text, problem, truncated):
    return len(text) % 3 / 2


@pytest.fixture
def short_run(tmp_path, monkeypatch):
    """Config of a run of four steps of a random model. The number of letters is the reward, so there is a gradient."""
    monkeypatch.setattr(icrl, "outcome_reward", number_of_letters)
    model, out = store(tmp_path / "tiny", tiny_model()), str(tmp_path / "run")
    return icrl.Config(model=model, out=out, device="cpu", queries=2, samples=3, max_response=5, max_critique=5,
                       steps=4, inner_steps=2, lr=1e-4, eval_every=0, eval_problems=2, save_every=2)


@pytest.fixture
def undisturbed(short_run):
    """What a short run leaves behind if nothing happens to it."""
    return results(short_run, "undisturbed")


def results(config, name, **changes):
    """Train in the folder `name`. Returns what the run left behind."""
    out = str(Path(config.out).with_name(name))
    icrl.train(dataclasses.replace(config, out=out, **changes))
    return left_behind(out)


def left_behind(folder):
    """The figures but for evaluations, the sessions, the saved model, the weights and the state of AdamW."""
    rows = read_lines(Path(folder, "metrics.jsonl"))
    for row in rows:
        row.pop("heldout", None)
    saved = torch.load(Path(folder, "checkpoint.pt"))
    tensors = saved["weights"] + [m for of in saved["optimizer"]["state"].values() for m in of.values()]
    return (rows, read_lines(Path(folder, "sessions.jsonl")), Path(folder, "model/model.safetensors").read_bytes(),
            [tensor.tolist() for tensor in tensors])


def before_update(monkeypatch, number, act):
    """Call `act` before the update of step `number` of a run."""
    update, calls = icrl.update, itertools.count(1)
    monkeypatch.setattr(icrl, "update", lambda *args: [next(calls) == number and act(), update(*args)][1])


def interrupted_run(config, monkeypatch, name, **changes):
    """Stop a run in step 4. Its last checkpoint is that of step 2."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        before_update(patch, 4, lambda: fail(KeyboardInterrupt()))
        results(config, name, **changes)


def test_the_seed_decides_everything_and_evaluations_nothing(short_run, undisturbed, tmp_path):
    rows = undisturbed[0]
    assert [row["step"] for row in rows] == [1, 2, 3, 4] and all(row["grad_norm"] > 0 for row in rows)
    assert results(short_run, "again", eval_every=1, save_every=0) == undisturbed
    for name, problem in (("one", SIX), ("two", TWO)):        # one, so that the order of the problems is the same
        (tmp_path / name).write_text(json.dumps(problem))
    files = dict(data=str(tmp_path / "one"), heldout=str(tmp_path / "two"))
    one, other = (results(short_run, f"seed {seed}", seed=seed, **files) for seed in (0, 1))
    assert one[1] != other[1]


@pytest.mark.parametrize("changes", [{}, {"bf16": True}], ids=str)
def test_a_resumed_run_equals_an_uninterrupted_run(changes, short_run, monkeypatch):
    """Trap 28: weights, figures and sessions are equal to the bit. What came after the checkpoint is overwritten."""
    whole = results(short_run, "whole", **changes)
    interrupted_run(short_run, monkeypatch, "broken", **changes)
    assert results(short_run, "broken", resume="yes", **changes) == whole


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_a_run_samples_evaluates_trains_and_resumes(device, short_run):
    figures = results(short_run, "run", bf16=True, checkpointing=True, device=device, steps=2)[0]
    assert all(math.isfinite(row["grad_norm"]) for row in figures)
    assert len(results(short_run, "run", bf16=True, checkpointing=True, device=device, resume="yes")[0]) == 4


def test_files_that_were_moved_away_are_not_filled_with_zeros(short_run, monkeypatch):
    interrupted_run(short_run, monkeypatch, "run")
    Path(short_run.out, "sessions.jsonl").unlink()
    turns = results(short_run, "run", resume="yes")[1]
    assert {turn["step"] for turn in turns} == {3, 4}


def test_a_resumed_run_keeps_its_own_settings_of_adamw(tmp_path):
    model = tiny_model()
    optimizer, other = (icrl.make_optimizer(model, settings(lr=lr)) for lr in (0.5, 0.25))
    optimizer.param_groups[0]["fused"] = False                # saved on another device, perhaps
    icrl.save(tmp_path, model, TOKENIZER, optimizer, {})
    icrl.restore(tmp_path, model, other)
    assert other.param_groups[0]["lr"] == 0.25 and other.param_groups[0]["fused"]


def kill_and_resume(config, kills):
    """Train in processes that are killed, but for the last. Some are killed while they write a checkpoint."""
    icrl.outcome_reward, rng = number_of_letters, random.Random(0)
    for number in range(kills + 1):
        Path(config.out, "unfinished.pt").unlink(missing_ok=True)
        process = multiprocessing.get_context("fork").Process(target=icrl.train, args=(config,))
        process.start()
        if number < kills:
            while number % 2 and process.is_alive() and not Path(config.out, "unfinished.pt").exists():
                time.sleep(0.001)
            process.join(rng.uniform(0, 0.01 if number % 2 else 1))
            process.kill()
        process.join()
    assert process.exitcode == 0


def test_a_run_that_is_killed_at_any_moment_can_be_resumed(short_run):
    """Trap 28: killed ten times, at its start, in its steps and while it writes its checkpoints."""
    whole = results(short_run, "whole", save_every=1, steps=6)
    config = dataclasses.replace(short_run, resume="yes", save_every=1, steps=6)
    process = multiprocessing.get_context("spawn").Process(target=kill_and_resume, args=(config, 10))
    process.start()                                 # a fresh process, because threads and fork do not mix
    process.join()
    assert process.exitcode == 0 and left_behind(config.out) == whole


@pytest.mark.parametrize("size", [20_000, 200_000], ids=["the model", "the state of AdamW"])
def test_a_full_disk_costs_no_checkpoint(size, short_run, undisturbed, monkeypatch):
    """From step 3 on no file can grow beyond `size`, so that something does not fit."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with monkeypatch.context() as patch:
        before_update(patch, 3, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1])))
        with pytest.raises(icrl.UsageError, match="is the disk full"):
            icrl.train(short_run)
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert torch.load(Path(short_run.out, "checkpoint.pt"))["state"]["step"] == 2
    assert results(short_run, "run", resume="yes") == undisturbed


def test_a_checkpoint_cannot_say_how_to_sample(short_run, undisturbed):
    """Trap 1, from the file to the trained weights."""
    put("generation_config.json", temperature=0.01, top_k=1, max_length=5)(Path(short_run.model))
    assert results(short_run, "hostile") == undisturbed


def test_the_shipped_model_learns():
    """A few steps on problems with brackets raise the accuracy without critique, on other ones, by 0.3."""
    config = icrl.Config(queries=8, steps=6, lr=1e-3, device="cpu")
    model, tokenizer = icrl.load_model(config.model, config)
    optimizer = icrl.make_optimizer(model, config)
    problems, heldout = ([p for p in icrl.load_problems(path) if p["kind"] == "method" and "(" in p["problem"]]
                         for path in (config.data, config.heldout))
    before = icrl.evaluate(model, tokenizer, heldout, config)
    torch.manual_seed(0)
    for step in range(1, config.steps + 1):
        turns = icrl.rollout(model, tokenizer, icrl.problems_of_step(problems, step, config), config)
        icrl.update(model, optimizer, turns, config)
    assert icrl.evaluate(model, tokenizer, heldout, config)["pass@1"] > before["pass@1"] + 0.3


def test_a_session_of_each_kind_is_shown_with_a_critique_that_helped(capsys):
    problems = [{"problem": f"{i}?", "kind": kind} for i, kind in enumerate("aabb")]
    turns = [icrl.Turn(i, i, part, [], [], [], f"{part} {i}", False, reward)
             for i, reward in enumerate([0.0, 1.0, 0.0]) for part in ("first", "critique")]
    icrl.show_sessions([*turns, icrl.Turn(3, 3, "first", [], [], [], "first 3", False, 1.0)], problems)
    shown = capsys.readouterr().out
    assert [f"critique {i}" in shown for i in range(3)] == [False, True, True] and "3?" not in shown
    icrl.show_sessions([turns[0]], problems)                  # no critique at all
    assert "first 0" in capsys.readouterr().out


# -------------------------------------------------------------------------------------------------------- evaluation

def test_the_figures_of_an_evaluation_by_hand(monkeypatch, tmp_path):
    """Three attempts, two samples of three problems, partial rewards, another model as critic."""
    last_word_is_reward(monkeypatch)
    attempts = [[1, 0, 0.5, 0, 1, 1], [0, 1, 0.2, 0.5, 1, 0.5], [0, 0, 1, 0, 0, 1]]
    first, second, third = ([f"so {reward}" for reward in rewards] for rewards in attempts)
    asked = script(monkeypatch, first, ["tip"] * 6, second, ["tip"] * 6, third)
    problems = [{**SIX, "kind": "a"}, {**TWO, "kind": "a"}, {"problem": "7?", "answer": "7", "kind": "b"}]
    config, critic = icrl.Config(method="grpo", rounds=3, samples=7, eval_samples=2, temperature=0.7), copy.copy(NOBODY)
    figures = icrl.evaluate(NOBODY, TOKENIZER, problems, config, tmp_path / "log", critic)
    # The mean by problem is 1/2, 1/4 and 1. A right attempt stays right; a wrong one is replaced by its revision.
    low, high = icrl.interval(np.array([0.5, 0.25, 1.0]))
    length = statistics.mean(len(encode(text)) + 1 for text in first)
    revised = statistics.mean(len(encode(text)) + 1 for text in second + third)
    assert figures == pytest.approx({
        "pass@1": 3.5 / 6, "95% from": low, "95% to": high, "pass@2": 2.5 / 3, "put right": 1 / 3, "put wrong": 2 / 3,
        "after 1 critique": 4.7 / 6, "after 2 critique": 5 / 6, "pass@1 a": 1.5 / 4, "pass@1 b": 1.0,
        "first_tokens": length, "critique_tokens": len(encode("tip")) + 1, "revision_tokens": revised,
        "first_truncated": 0, "critique_truncated": 0, "revision_truncated": 0})
    assert [(a.temperature, a.model is critic) for a in asked] == [
        (0.7, False), (0.7, True), (0.7, False), (0.7, True), (0.7, False)]
    turns = read_lines(tmp_path / "log")
    assert [(t["problem"], t["text"]) for t in turns if t["part"] == "first"] == [
        (problems[i // 2]["problem"], text) for i, text in enumerate(first)]
    assert len(turns) == 6 * 5


def test_the_problems_of_an_evaluation_are_a_fixed_sample_of_the_file(monkeypatch, tmp_path):
    problems = [{"problem": f"{i}?", "answer": "1"} for i in range(200)]                 # perhaps sorted by subject
    seen = []
    for seed in (0, 1):
        script(monkeypatch, [r"\boxed{1}"] * 20, ["tip"] * 20, [r"\boxed{1}"] * 20)
        icrl.evaluate(NOBODY, TOKENIZER, problems, icrl.Config(eval_problems=20, seed=seed), tmp_path / "log")
        seen.append([int(t["problem"][:-1]) for t in read_lines(tmp_path / "log") if t["part"] == "first"])
    assert seen[0] == seen[1] and len(set(seen[0])) == 20 and max(seen[0]) > 100 > min(seen[0])


def test_an_evaluation_changes_no_random_state(monkeypatch):
    """Trap 27: and it gives the same figures twice."""
    monkeypatch.setattr(icrl, "outcome_reward", number_of_letters)
    model, config = tiny_model(), icrl.Config(max_response=4, max_critique=4, eval_samples=9)
    before = torch.get_rng_state()
    figures = icrl.evaluate(model, TOKENIZER, [SIX, TWO], config)
    assert torch.get_rng_state().equal(before)
    torch.manual_seed(1)
    assert icrl.evaluate(model, TOKENIZER, [SIX, TWO], config) == figures


@pytest.mark.parametrize("means, low, high", [
    ([0.0] * 60, 0, 0.0602), ([1.0] * 60, 0.9398, 1),         # from a table of Wilson's interval
    ([0.0, 1.0] * 30, 0.3773, 0.6227), ([0.0] * 9 + [1.0], 0.0179, 0.4042),
    # Several samples per problem: the variance is that of the problems' means, here 0 in place of 1/4.
    ([0.5] * 60, 0.5 - 1.96 ** 2 / 120 / (1 + 1.96 ** 2 / 60), 0.5 + 1.96 ** 2 / 120 / (1 + 1.96 ** 2 / 60))])
def test_the_interval_by_hand(means, low, high):
    assert icrl.interval(np.array(means)) == pytest.approx([low, high], abs=1e-4)


# ---------------------------------------------------------------------------------------------------------- problems

@pytest.mark.parametrize("row, answer", [
    ({"problem": "6 * 7?", "answer": "42"}, "42"), ({"problem": "6 * 7?", "answer": 42}, "42"),
    ({"question": "6 * 7?", "answer": "6 * 7 = <<6*7=42>>42\n#### 42"}, "42"),
    ({"problem": "6 * 7?", "solution": r"Not $\boxed{13}$ but $\boxed{\frac{84}{2}}$."}, r"\frac{84}{2}"),
    ({"question": "6 * 7?", "solution": ["Multiply."], "final_answer": ["42", "$-42$"]}, "42, $-42$"),
    ({"question": "6 * 7?", "answer": 42.0}, "42.0"),
    ({"problem": "6 * 7?", "answer": "42", "kind": 3, "difficulty": [1, None]}, "42"),
    ({"ID": "2024-I-1", "Problem": "6 * 7?", "Answer": 42}, "42"), ({"prompt": "6 * 7?", "answer": 42}, "42"),
    ({"problem": "", "question": "6 * 7?", "answer": None, "solution": r"\boxed{42}"}, "42"),
    ({"prompt": [{"role": "system", "content": "Think."}, {"role": "user", "content": "6 * 7?"}],
      "reward_model": {"ground_truth": "42", "style": "rule"}}, "42"),
])
def test_data_sets_are_read_as_they_come(row, answer, tmp_path):
    path, other = tmp_path / "data.jsonl", {"problem": "half\u2028a\u0085line", "answer": "1"}    # for splitlines()
    lines = [json.dumps(other, ensure_ascii=False), "", json.dumps(row), " "]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())                      # as Windows writes it
    assert icrl.load_problems(path) == [other, {**row, "problem": "6 * 7?", "answer": answer}]


@pytest.mark.parametrize("folder", ["arithmetic", "words"])
def test_no_shipped_problem_is_in_both_sets(folder):
    train, heldout = (icrl.load_problems(DATA / folder / f"{name}.jsonl") for name in ("train", "heldout"))
    assert not {p["problem"] for p in train} & {p["problem"] for p in heldout}


@pytest.mark.parametrize("file", [icrl.Config.data, icrl.Config.heldout], ids=["data", "heldout"])
def test_the_answers_of_the_shipped_problems_are_right(file):
    for p in icrl.load_problems(file):
        formula = p["problem"].removeprefix("What is ").rstrip("?").replace("^", "**")
        assert int(p["answer"]) == eval(formula)


GOOD = b'{"problem": "6 * 7?", "answer": "42"}\n'
BAD_LINES = [
    b"\0\0\0", b"{'problem': '?', 'answer': '1'}", br'{"problem": "\ud800", "answer": "1"}', b"[" * 100_000,
    b'{"problem": "\xff", "answer": "1"}', b'{"question": "6 * 7?", "answer": "43"}', b"[1]", b"42", b'"text"', b"null",
    b"{}", b'{"problem": "?"}', b'{"answer": "1"}', b'{"problem": 42, "answer": "1"}', b'{"problem": " ", "answer": 1}',
    b'{"problem": "?", "answer": null}', b'{"problem": "?", "answer": ""}', b'{"problem": "?", "answer": "Hm.\\n####"}',
    b'{"problem": "?", "answer": []}', b'{"problem": "?", "answer": {"x": 1}}', b'{"problem": "?", "answer": [null]}',
    b'{"problem": "?", "answer": NaN}', b'{"problem": "?", "answer": [1, NaN]}', b'{"problem": "?", "answer": true}',
    br'{"problem": "?", "solution": "\\boxed{}"}', br'{"problem": "?", "solution": "\\boxed{1"}',
    b'{"problem": "?", "answer": "{1"}', b'{"problem": "?", "answer": "1}"}', br'{"problem": "?", "answer": "1\\"}',
]


@pytest.mark.parametrize("line", BAD_LINES, ids=range(len(BAD_LINES)))
def test_a_line_that_cannot_be_used_is_named(line, tmp_path):
    (tmp_path / "bad.jsonl").write_bytes(GOOD + b"\n" + line)
    with pytest.raises(icrl.UsageError, match="bad.jsonl: 1 lines .*line 3: "):
        icrl.load_problems(tmp_path / "bad.jsonl")


@pytest.mark.parametrize("content, words", [
    (b"", "empty"), (b"\n \r\n\t\n", "empty"), (b"\x89PNG\r\n\xff", "line 1"), (b"problem,answer\n1?,1", "line 1"),
    ('{"problem": "?", "answer": "1"}'.encode("utf-16"), "line 1"), (b"[\n" + GOOD + b"]", "one object"),
    (b"[" + GOOD.strip() + b"]", "one object"), (b'{"task": "6 * 7?", "result": 42}', "keys task, result"),
    (b"1\n2\n" + GOOD + b"\n3\n4", "4 lines .*line 1: .*line 2: .*line 5: ((?!line 6).)*$")])
def test_a_file_that_cannot_be_used_is_explained(content, words, tmp_path):
    (tmp_path / "bad.jsonl").write_bytes(content)
    with pytest.raises(icrl.UsageError, match=f"bad.jsonl: .*{words}"):
        icrl.load_problems(tmp_path / "bad.jsonl")


def test_exact_repeats_are_dropped_and_counted(tmp_path, capsys):
    (tmp_path / "data.jsonl").write_bytes(GOOD * 100 + b'{"problem": "2?", "answer": "2"}')
    assert [p["problem"] for p in icrl.load_problems(tmp_path / "data.jsonl")] == ["6 * 7?", "2?"]
    assert "99 lines repeat" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------- answer checker


def accepts(pred, gold):
    """Whether a response that ends with `pred` in a box is right."""
    return icrl.is_correct(rf"So the answer is $\boxed{{{pred}}}$.", gold)


def cases(table):
    """Flatten {kind: [(a, b), ...]} into parameters that carry their kind in the test's name."""
    return [pytest.param(*pair, id=f"{kind}: {pair[0]} | {pair[1]}")
            for kind, pairs in table.items() for pair in pairs]


def swapped(table):
    """The pairs the other way round, except where only one of the two answers may be rounded."""
    return {f"{kind}, swapped": [(gold, pred) for pred, gold in pairs] for kind, pairs in table.items()
            if kind not in ("decimal", "scientific", "decimal of an exact answer")}


EQUAL = {
    "integer": [("17", "17"), ("017", "17"), ("17.0", "17"), ("+17", "17"), ("20-3", "17"), ("−17", "-17"),
                ("17,", "17"), ("; 17", "17"), ("17", r"So it is \boxed{17}."), (r"10 \cdot 10^{499}", "10^{500}")],
    "thousands": [("7,650,000", "7650000"), (r"7{,}650", "7650"), (r"7,\!650", "7650"), (r"\$7,650", "7650")],
    "fraction": [(r"\frac{6}{8}", r"\frac34"), ("3/4", r"\dfrac{3}{4}"), ("-3/4", r"\frac{-3}{4}"), ("¾", "3/4"),
                 ("0.75", "3/4"), (r"\\frac{3}{4}", "3/4"), (r"{3 \over 4}", "3/4")],
    "mixed number": [(r"2\frac{1}{4}", "9/4"), (r"-2\frac14", "-2.25"), ("2 1/4", r"2\frac14")],
    "decimal": [(".25", "0.250"), ("1/3", "0.333"), ("2.71828", "2.718"), ("-0.6667", "-0.667"), ("0.33333", "0.333")],
    "scientific": [(r"6.5 \times 10^{-4}", "6.5e-4"), (r"2 \cdot 10^3", "2000"), ("4.567e5", "4.57e5")],
    "decimal of an exact answer": [("0.333333", "1/3"), ("3.14159265", r"\pi"), ("2.449490", r"\sqrt6"),
                                   (r"2.314814815 \times 10^{-3}", r"\frac{1}{432}"), ("0.33333333333", "1/3")],
    "repeating decimal": [(r"1.\overline{1}", "10/9"), (r"\frac{29}{30}", r"0.9\overline{6}"),
                          (r"-0.\overline{3}", "-1/3"), (r"2 \cdot 0.\overline{3}", "2/3")],
    "sign or unit": [("35%", r"35\%"), (r"60^\circ", "60"), (r"8\text{ cm}^2", "8"), ("8", r"8 \mbox{ cm}^2"),
                     ("8 cm", r"8 \text{ cm}"), ("9 square feet", "9"), (r"\$4.50", "4.5"), ("12", "12_7"),
                     (r"12\text{ dollars}", r"12\text{dollar}"), (r"\$5", r"5\text{ dollars}"), ("6 inches", "6 inch"),
                     ("12ft", "12"), (r"2\pi cm", r"2\pi"), (r"\text{12 feet}", "12"), (r"12\ \mathrm{m^2}", "12"),
                     (r"12\,\frac{\text{m}}{\text{s}}", "12"), ("12 hours", "12"), (r"180 \text { (days). }", "180")],
    "noun or ordinal": [("30 apples", "30"), (r"9\text{ multiples}", r"9\text{ values}"), (r"12^{\mathrm{th}}", "12")],
    "clock": [(r"4:30 \text{ PM}", "4:30 p.m."), (r"\text{4:30 p.m.}", "4:30 PM"), ("8:00 AM", "08:00 AM"),
              (r"6\text{ PM}", "6")],
    "remainder": [(r"n \equiv 2 \pmod 5", r"n\equiv 2 (\bmod 5)"), (r"2 \pmod{5}", "2")],
    "radical": [(r"\sqrt{48}", r"4\sqrt3"), (r"\frac{1}{\sqrt{5}}", r"\frac{\sqrt{5}}{5}"), ("sqrt(7)", r"\sqrt{7}"),
                (r"\sqrt[3]{16}", r"2\sqrt[3]{2}"), ("√7", r"\sqrt{7}"), ("7^{1/2}", r"\sqrt 7"), ("∛8", "2"),
                (r"\sqrt[3]{x}^2", "x^{2/3}"), (r"\sqrt[3]{\frac{1}{2}}", "(1/2)^{1/3}")],
    "power": [("(2024)^{4046}", "2024^{4046}"), ("(-1)^{2024}", "1"), ("2^6 * 3^5 * 5^4", "2^6 3^5 5^4"),
              (r"\frac16+\frac{1}{3 \cdot 2^{2006}}", r"\frac{2^{2005}+1}{3 \cdot 2^{2006}}")],
    "factorial": [("1/2004!", r"\frac{1}{2004!}"), ("5!", "120"), ("-3!", "-6"), ("2n!+2", "2(n!+1)"),
                  ("n!/2", r"\frac{n!}{2}"), (r"\binom{56}{48}", r"\binom{56}{8}"), (r"\dbinom52", "10"),
                  (r"{n \choose 2}", r"\binom{n}{2}"), (r"\binom{n+1}{3}", r"\binom{1+n}{3}")],
    "floor": [(r"1+\left\lceil\frac n2\right\rceil", r"\lceil n/2\rceil+1"), (r"\lfloor -7/2 \rfloor", "-4"),
              (r"\lceil 7/2 \rceil", "4"), (r"\lfloor x \rfloor", r"f(x) = \lfloor x \rfloor")],
    "absolute value": [("|-5|", "5"), ("2|x|", r"2\left|x\right|"), (r"\lvert x-1 \rvert", "|1-x|")],
    "constant": [(r"\frac{\pi}{2}", r"0.5\pi"), ("2pi", r"2\pi"), (r"e^{\ln 3}", "3"), ("(1+i)^2", "2i"),
                 (r"(-\sqrt{2})^{1/2}", r"i\sqrt[4]{2}")],
    "function": [(r"\log_2 32", "5"), (r"\sin^2 x + \cos^2 x", "1"), (r"\sin 2x", r"2\sin x\cos x"),
                 (r"\tan(t)", r"\frac{\sin t}{\cos t}"), (r"\exp(-t)", "e^{-t}"), (r"\tan^{-1} 2", r"\arctan 2"),
                 (r"\ln(2)\pi", r"\pi\ln(2)")],
    "expression": [("(n+1)(n-1)", "n^2-1"), ("a b + c", "c+ba"), (r"\frac{1}{2}x", "x/2"), ("y**2", "y²"), ("n+0", "n"),
                   ("x_{1}+x_2", "x_2 + x_1"), (r"\omega_{0}^2 r", r"r\omega_0^{2}"), ("2A", r"A \cdot 2"),
                   (r"1000(\sqrt2+\sqrt3)", r"1000\sqrt2+1000\sqrt3"), ("2θ", r"\theta\cdot2"), ("x³", "x^3"),
                   (r"\omega\hbar", r"\hbar\omega"), (r"\dot{x}+1", r"1+\dot x"), ("１２", "12")],
    "equation": [("x=6", "6"), ("6", "k = 6"), ("y=3x+1", "3x+1"), ("2x=12", "x=6"), ("x-3y+2=0", "3y-x=2"),
                 ("f(x)=x^2+x", "x(x+1)"), (r"\frac12 \approx 0.5", "1/2"), (r"p = 2 \cdot 3 = 6", "6"), ("2=x", "2"),
                 (r"\angle APC = 74^\circ", r"74^\circ"), ("m+n=7", "7"), ("|AB|=1", "1"), (r"P(x)\equiv 5", "5"),
                 (r"f(x)=1 \text{ for all } x", "1"), (r"\Delta p = 2x", "2x")],
    "tuple": [("(1/2, -3)", "(0.5,-3)"), ("(x,y) = (4,5)", "(4,5)"), ("(x,y) = (4, 10/2)", "(x,y) = (4,5)"),
              ("(3, 8/2)", "(3,4)"), (r"\langle 4, 5 \rangle", "(4,5)"), ("(3;4),(1;2)", "(1,2),(3,4)")],
    "interval": [(r"[0, \infty)", r"[ 0,+\infty )"), (r"x \in (1,2]", "(1, 2]"), (r"3 < x \le 4", "(3,4]"),
                 ("(3,4)∪(1,2)", r"(1,2) \cup (3,4)"), (r"x \ge 5", r"[5, \infty)"), (r"5 > x", r"x < 5"),
                 ("x<5", r"(-\infty,5)"), (r"-x < 5", r"-x<5"), (r"x\leqslant 3", r"(-\infty,3]")],
    "set of reals": [(r"x \neq 4", r"(-\infty,4)\cup(4,\infty)"), ("-x>-1", "x<1"), (r"\mathbb{R}", r"x\in\mathbb{R}"),
                     (r"\mathbb{R}\setminus\{-2,3\}", r"(-\infty,-2)\cup(-2,3)\cup(3,\infty)"),
                     (r"|x| \ge 8", r"(-\infty,-8]\cup[8,\infty)"), ("|x| < 8", "(-8,8)"), ("0<f(x)<1", "(0,1)"),
                     (r"\{x \mid -1<x<1\}", "(-1,1)"), (r"x<2 \text{ or } x>5", r"(-\infty,2)\cup(5,\infty)")],
    "list or set": [("5, 4, 3", "3,4,5"), (r"\{3, 4\}", "4,3"), (r"3 \text{ and } 4", "4, 3"), ("x=3 or x=4", "3,4"),
                    (r"1 \pm \sqrt{2}", r"1-\sqrt{2}, 1+\sqrt{2}"), ("a=3, b=4", "3,4"), (r"n \in \{1,3\}", "1, 3"),
                    ("(1,2), (3,4)", "(3,4),(1,2)"), ("(1,-2), (-1,2)", r"(\pm 1, \mp 2)"),
                    (r"\text{B,C}", "B, C"), (r"\text{I and II}", "II and I"), (r"\emptyset", r"\varnothing")],
    "matrix": [(r"\begin{pmatrix} 1/2 \\ 3 \end{pmatrix}", r"\begin{pmatrix}0.5\\3\\\end{pmatrix}"),
               (r"\begin{bmatrix}1&2\\3&4\end{bmatrix}", r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}"),
               (r"(\begin{array}{cc}1&2\\3&4\end{array})", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}"),
               (r"\frac{6}{5}\begin{pmatrix}5\\1\end{pmatrix}", r"\begin{pmatrix}6\\6/5\end{pmatrix}")],
    "text": [(r"\text{Tuesday}", "tuesday"), ("(B)", r"\text{B}"), ("No", r"\text{no}"), (r"\textnormal{a b}", "A b")],
}

UNEQUAL = {
    "integer": [("18", "17"), ("-17", "17"), ("1 7", "17"), ("", "17"), ("17 or 18", "17"), (r"\pm 17", "17"),
                ("1267650600228229401496703205377", "2^{100}")],
    "thousands": [("7,65", "765"), ("(7,650)", "7650"), ("7, 650", "7650"), ("(-7,650)", "-7650")],
    "fraction": [("3/4", r"\frac43"), (r"\frac34", "34"), (r"\frac{1}{2x}", r"\frac{1}{2}x"), (r"2\frac14", "21/4")],
    "decimal": [("0.33", "1/3"), ("0.3", "0.333"), ("0.334", "0.333"), ("2.4", "2.5"), ("0.33333", "1/3"),
                ("12.504", "12.50"), ("0.333", "0.3333"), ("0.333334", "1/3"), (r"0.\overline3", "0.3")],
    "scientific": [(r"6.5 \times 10^4", "6.5e-4"), ("3.80e-10", "3.81e-10"), ("6.5e", "6.5"), ("0", "1e-30"),
                   (r"2.314814 \times 10^{-3}", r"\frac{1}{432}")],
    "sign or unit": [(r"8\text{ cm}", r"8\text{ m}"), ("12_7", "12_8"), ("35%", "0.35"), ("8xy", "8"), ("12 x", "12"),
                     (r"5\text{ cents}", r"\$5"), ("8 inches", "8 cm"), (r"3\text{ m}", r"3\text{ s}"),
                     (r"2\mathrm{i}", "2"), (r"8\text{ cm}^2", r"8\text{ cm}^3"), ("8 square feet", "8 square meters")],
    "word that is no unit": [(r"3\text{ million}", "3"), ("3 Million", "3"), (r"3\text{ wrong}", "3"), ("not 3", "3"),
                             (r"3\text{ tenths}", "3"), ("3 dozen", "3"), (r"5\text{ or more}", "5")],
    "clock or remainder": [("4:30 AM", "4:30 PM"), ("4:31", "4:30 PM"), (r"2 \pmod 5", r"2 \pmod 4")],
    "radical": [(r"\sqrt{5}", "5"), (r"3\sqrt{5}", "35"), (r"\sqrt[3]{5}", r"3\sqrt{5}"), (r"\sqrt[3]{x}^2", "x^{3/2}"),
                (r"\sqrt2+\sqrt3", r"\sqrt5")],
    "power": [("2024^{4047}", "2024^{4046}"), ("(-1)^{2023}", "1"), ("2^6 3^5 5^3", "2^6 3^5 5^4")],
    "factorial": [("1/2006!", "1/2004!"), (r"\binom{56}{9}", r"\binom{56}{8}"), ("n!", "n"), ("n!!", "(n!)!"),
                  (r"\binom n2", r"\binom n3")],
    "floor": [(r"\lfloor n/2\rfloor", r"\lceil n/2\rceil"), (r"\lceil n/3\rceil", r"\lceil n/2\rceil")],
    "no value": [("5", "e^{709}*e^{709}"), ("e^{709}*e^{709}", "e^{709}*e^{708}*7"), ("1/0", "2/0"), ("(-1)!", "(-2)!"),
                 (r"0\cdot\infty", "0")],
    "constant": [(r"4\pi", "4"), ("2+3i", "2-3i"), (r"0.\overline{3}", "0"), (r"-\infty", r"\infty")],
    "function": [(r"\sin x", r"\cos x"), (r"\sin^{-1} x", r"\csc x"), (r"\ln 2x", r"2 \ln x"),
                 (r"\log_2 9", r"\log_3 9")],
    "expression": [("(n+1)^2", "n^2+1"), ("x_1", "x_2"), ("|x-1|", "x-1"), ("3r^2", "3R^2"), ("-2^2", "4"),
                   (r"\dot x", "x"), (r"\theta", r"\phi"), (r"{b \over a}", r"\frac{a}{b}")],
    "equation": [("x=6", "y=6"), ("y=3x", "y=3x+1"), ("2x+y=1", "1"), ("5-n", "5=n"), ("x<2", "x>2"), ("x+y=0", "0"),
                 ("x-3y+2=0", "3y-x=1"), ("y=2x=1", "y=2x+1"), ("3=x", "2"), ("m+n=7", "m+p=7"), ("n=3k", "3")],
    "tuple": [("(3,4)", "(4,3)"), ("(3,4)", "3,4"), ("(3,4)", "34"), ("(3,4)", "(3,4,0)"), (r"\{3,4\}", "(3,4)")],
    "interval": [("[3,4)", "(3,4)"), ("(3,4]", "[3,4)"), (r"(3,\infty)", r"(-\infty,3)"), ("x < 2", "y < 2"),
                 ("(1,2)", r"(1,2) \cup (3,4)"), (r"x \le 2", r"(-\infty,2)")],
    "set of reals": [(r"x \neq 4", r"(-\infty,4)\cup(5,\infty)"), ("-x>1", "x<1"), ("-x<-1", "x<1"),
                     (r"\mathbb{R}\setminus\{-2,4\}", r"\mathbb{R}\setminus\{-2,3\}"), ("|x|>8", r"|x|\ge8")],
    "list or set": [("3", "3,4"), ("3,4,5", "3,4"), ("3,3,4", "3,4,4"), ("1+2", "1,2"), (r"1\pm\sqrt2", r"1+\sqrt2"),
                    ("(1,2), (-1,-2)", r"(\pm 1, \mp 2)"), ("3", r"n \in \{1,3\}"), ("B, D", r"\text{B,C}")],
    "matrix": [(r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1&2\end{pmatrix}"),
               (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix}1&3\\2&4\end{pmatrix}"),
               (r"\begin{pmatrix}1&2\\3&4&5&6\end{pmatrix}", r"\begin{pmatrix}1&2&3\\4&5&6\end{pmatrix}")],
    "text": [(r"\text{stone}", r"\text{notes}"), ("(B)", "(D)"), ("day, Friday", "Friday"), ("I and III", "I and II")],
}

ANSWERS = sorted({gold for pairs in EQUAL.values() for _, gold in pairs})


@pytest.mark.parametrize("pred, gold", cases(EQUAL | swapped(EQUAL)))
def test_another_way_of_writing_the_answer_is_accepted(pred, gold):
    assert accepts(pred, gold)


@pytest.mark.parametrize("pred, gold", cases(UNEQUAL | swapped(UNEQUAL)))
def test_a_different_answer_is_rejected(pred, gold):
    assert not accepts(pred, gold)


@pytest.mark.parametrize("gold", ANSWERS)
def test_every_answer_is_equal_to_itself(gold):
    assert accepts(gold, gold) and accepts(f" {gold} .", gold)


SPELLINGS = {
    "dfrac": lambda text: text.replace(r"\frac", r"\dfrac"),
    "left and right": lambda text: text.replace("(", r"\left(").replace(")", r"\right)"),
    "white space": lambda text: f"  {text} \n".replace("+", " + ").replace("=", " =\n").replace("/", " / "),
    "negative space": lambda text: r"\!" + text.replace("+", r"\!+\,"),
    "dollars": lambda text: f"${text}$",
    "display": lambda text: rf"\[ {text} \]",
    "a second box": lambda text: rf"\boxed{{{text}}}",
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_looks_do_not_matter(spelling):
    respell = SPELLINGS[spelling]
    rejected = [gold for gold in ANSWERS if not accepts(respell(gold), gold)]
    accepted = [pair for pairs in UNEQUAL.values() for pair in pairs if accepts(respell(pair[0]), pair[1])]
    assert rejected == [] and accepted == []


@pytest.mark.parametrize("text, content", [
    (r"\boxed{4}", "4"), (r"First \boxed{4}, then \boxed{ 5 }.", "5"), (r"\boxed{\frac{1}{x}}", r"\frac{1}{x}"),
    (r"\boxed{\{1, 2\}}", r"\{1, 2\}"), (r"\boxed {4} and \fbox{5}", "5"), (r"{ \boxed{4} } } \}", "4"),
    (r"Write it as \boxed{}: \boxed{4}, not \boxed{ }.", "4"), (r"\boxed{4 and then \boxed{5}", "5"),
    (r"escaped twice: \\boxed{4}", "4"), (r"<think>\boxed{4}</think> \boxed{5}", "5"),
    (r"<think>\boxed{4}</think> The answer is 4.", "4"), (r"\boxed{\left\{ 1 \right.}", r"\left\{ 1 \right."),
    (r"\boxed 7", "7"), (r"\fbox 7", "7"), (r"\boxed 42", "4"), (r"\boxed C.", "C"), (r"\boxed word", None),
    (r"\boxed{4} and then \boxed{5", None), (r"\boxed{4", None), (r"\box{4}", None), ("4", None), ("", None),
])
def test_the_last_box_is_extracted_and_must_be_closed(text, content):
    assert icrl.extract_answer(text) == content


@pytest.mark.parametrize("response, gold, right", [
    (r"So \boxed{2} and \boxed{3}.", "3,2", True), (r"$x=\boxed{2}$, $y=\boxed{3}$", "2,3", True),
    (r"It is \boxed{2}. No: \boxed{3}", "2,3", False), (r"\boxed{2}, no, wait, \boxed{3}", "2,3", False),
    (r"\boxed{1}, \boxed{2}, \boxed{3}", "2,3", False), (r"\boxed{2} and \boxed{3}", "2", False),
    (r"\boxed{2} and \boxed{3}", "3", True), (r"\boxed{2,3}", r"\boxed{2} or \boxed{3}", True),
])
def test_a_list_may_have_a_box_for_each_item_in_one_sentence(response, gold, right):
    assert icrl.is_correct(response, gold) is right


def test_an_answer_outside_the_box_does_not_count():
    assert not any(icrl.is_correct(text, "4") for text in ("4", "<answer>4</answer>", r"\boxed{5} 4", r"4 \boxed{4"))


def test_what_is_no_text_is_a_wrong_answer_except_for_an_int():
    assert icrl.is_correct(r"\boxed{4}", 4) and not icrl.is_correct(r"\boxed{5}", 4)
    for other in (None, 4.0, [4], {}, b"4"):
        assert not any(icrl.is_correct(*pair) for pair in ((other, "4"), (other, other), (r"\boxed{4}", other)))


HOSTILE = {
    "tower": "9^{9^{9^{9}}}", "python tower": "9**9**9**9", "negative tower": "10^{-10^{10}}",
    "huge exponent": "1e999999999", "tiny exponent": "1e-999999999", "digits": "9" * 300, "powers": "9^{9999}" * 45,
    "powers of powers": "((9^{99})^{99})^{99}", "factorials": "(10^9)!" + "3000!" * 70, "binomials": r"\binom{99}9" * 9,
    "fractions": "1/7^{9999}+" * 35 + "1", "open braces": "{" * 50_000, "braces": "{" * 50_000 + "1" + "}" * 50_000,
    "open boxes": r"\boxed{" * 50_000, "nested boxes": r"\boxed{" * 20_000 + "1" + "}" * 20_000,
    "nested brackets": "(" * 190 + "1" + ")" * 190, "signs": "-" * 390 + "1",
    "nested tuples": "(1," * 95 + "2" + ")" * 95, "roots": r"\sqrt" * 75 + "2", "exponents": "2^" * 190 + "2",
    "over": r"{a \over " * 40, "bars": "|" * 390,
    "labels": "x=" * 190 + "1", "long list": "1," * 150 + "2", "long sum": "1/7+" * 95 + "1", "texts": r"\text{" * 60,
    "variables": "x" * 390, "words": "and " * 20_000, "surrogate": "\ud800", "surrogate name": "x_{\ud800}",
    "nul": "\0", "arabic digits": "٤٢٤", "squares": "4²²", "circled": "①", "division by zero": "1/0", "pole": r"\cot 0",
    "nan": "nan", "infinite": r"\infty-\infty", "lone backslash": "\\", "empty": "{}", "plus-minus": r"\pm 1 " * 60,
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_hostile_input_is_rejected_quickly(text):
    start = time.process_time()
    assert not accepts(text, "42") and not accepts("42", text) and not icrl.is_correct(text, "42")
    assert accepts(f"{text}+1", f"1+{text[::-1]}") in (True, False)
    assert time.process_time() - start < 2


@pytest.mark.parametrize("code", ["__import__('os').mkdir('{}')", "open('{}', 'w')", r"\text{{exec('{}')}}"])
def test_nothing_is_executed(code, tmp_path):
    assert not accepts(code.format(tmp_path / "canary"), "0")
    assert not (tmp_path / "canary").exists()


def test_mutated_answers_never_raise_and_are_never_slow():
    rng = random.Random(0)
    alphabet = [*"0123456789.,;:+-*/^_=<>()[]{}|!'$%&~\\ \n\0eixyπ∞²½\ud800", r"\frac", r"\sqrt", r"\pm", r"\sin",
                r"\log_", r"\text{", "^{", r"\\", r"\overline{", r"\binom", r"\lfloor", "ℝ", " cm", "≠", "∈"]
    seconds, accepted = [], 0
    for _ in range(20_000):
        gold = rng.choice(ANSWERS)
        characters = list(gold)
        for _ in range(rng.randint(1, 4)):
            place = rng.randrange(len(characters) + 1)
            characters[place:place + rng.randint(0, 2)] = rng.choices(alphabet, k=rng.randint(0, 2))
        start = time.process_time()
        verdict = accepts("".join(characters), gold)
        seconds.append(time.process_time() - start)
        assert isinstance(verdict, bool)
        accepted += verdict
    assert 0 < accepted < 8_000 and max(seconds) < 1          # some changes are harmless, most are not


# ------------------------------------------------------------------------------------------------------ command line

def flags(config):
    return [f"--{name}={value}" for name, value in vars(config).items() if value != getattr(icrl.Config, name)]


def test_the_qwen3_preset_has_the_papers_settings_and_flags_override_it():
    config = icrl.parse("--preset qwen3 --steps 7 --lr 2e-6".split())
    of_the_paper = dict(queries=16, samples=8, rounds=2, temperature=1.0, method="icrl", bf16=True, inner_steps=1)
    assert {name: getattr(config, name) for name in of_the_paper} == of_the_paper
    assert icrl.parse(["--preset", "qwen3"]).lr == 1e-6 and (config.steps, config.lr) == (7, 2e-6)
    assert icrl.parse([]).model == str(SHIPPED) and "Qwen3" in config.model


def test_resume_uses_the_saved_settings_and_flags_override_them(tmp_path):
    saved = icrl.Config(preset="qwen3", lr=0.5, rounds=3, out="elsewhere")
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(saved)))
    config = icrl.parse(["--resume", str(tmp_path), "--steps", "9"])
    assert config == dataclasses.replace(saved, resume=str(tmp_path), out=str(tmp_path), steps=9)


@pytest.mark.parametrize("argv, words", [
    # argparse
    ("evaluate", "unrecognized"), ("--no_such_flag 1", "unrecognized"), ("--step 1", "unrecognized"),
    ("--lr", "expected one argument"), ("--method sideways", "invalid choice"), ("--preset huge", "invalid choice"),
    ("--steps many", "invalid int"), ("--queries 1.5", "invalid int"),
    # values that cannot be
    *((f"--{flag}", f"--{flag} is out of range") for flag in (
        "lr nan", "lr -1.0", "lr inf", "samples 0", "rounds -1", "max_response 0", "seed -1", "seed 4294967297",
        "steps -1", "micro_tokens 0", "sample_batch -1", "eval_samples 0", "temperature 0.0", "temperature nan")),
    ("--device cuda", "torch finds no GPU"), ("--data TMP/one.jsonl", "--heldout belong together"),
    ("--heldout TMP/one.jsonl", "--heldout belong together"),
    *((flag, "training needs") for flag in ("--samples 1", "--rounds 1", "--method grpo --samples 1")),
    # files and folders
    ("--data TMP/none.jsonl --heldout TMP/one.jsonl", "TMP/none.jsonl"), ("--out TMP/notes", "TMP/notes is not empty"),
    ("--data TMP/one.jsonl --heldout TMP/one.jsonl", "TMP/one.jsonl are in TMP/one.jsonl too"),
    ("--model TMP/none", "cannot use the model 'TMP/none'"), ("--model TMP", "cannot use the model 'TMP'"),
    ("--out TMP/one.jsonl/run", "TMP/one.jsonl/run"), ("--out /proc/run", "/proc/run"),
    ("--resume TMP/none", "TMP/none"), ("--resume TMP/notes", "TMP/notes"), ("--max_response 999", "512 tokens"),
])
def test_what_the_user_can_mend_is_a_sentence_and_exit_code_2(argv, words, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "todo.txt").touch()
    (tmp_path / "one.jsonl").write_bytes(GOOD)
    before = sorted(tmp_path.rglob("*"))
    if "--out" not in argv and "--resume" not in argv:
        argv += " --out TMP/new"
    try:
        code = icrl.main(argv.replace("TMP", str(tmp_path)).split())
    except SystemExit as exit:                      # argparse's own, after a line about the usage
        code = exit.code
    error = capsys.readouterr().err
    assert code == 2 and "Traceback" not in error and words.replace("TMP", str(tmp_path)) in error
    assert sorted(tmp_path.rglob("*")) == before              # nothing was written


def test_ctrl_c_is_exit_code_130_and_resume_goes_on(short_run, undisturbed, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        before_update(patch, 4, lambda: fail(KeyboardInterrupt()))
        assert icrl.main(flags(short_run)) == 130
    assert "interrupted" in capsys.readouterr().err.splitlines()[-1]
    assert icrl.main(["--resume", short_run.out]) == 0 and left_behind(short_run.out) == undisturbed


def test_out_of_memory_is_exit_code_2(short_run, monkeypatch, capsys):
    before_update(monkeypatch, 1, lambda: fail(torch.OutOfMemoryError("CUDA out of memory")))
    assert icrl.main(flags(short_run)) == 2
    assert "out of memory" in capsys.readouterr().err


@pytest.mark.parametrize("size", [0, 1000])
def test_a_damaged_checkpoint_is_named(size, short_run, monkeypatch, capsys):
    interrupted_run(short_run, monkeypatch, "run")
    Path(short_run.out, "config.json").write_text(json.dumps(dataclasses.asdict(short_run)))
    os.truncate(Path(short_run.out, "checkpoint.pt"), size)
    assert icrl.main(["--resume", short_run.out]) == 2
    assert f"{short_run.out}/checkpoint.pt is damaged" in capsys.readouterr().err


def test_a_console_that_cannot_show_a_letter_does_not_end_a_run(short_run, tmp_path, monkeypatch):
    short_run.data, short_run.heldout, short_run.steps = str(tmp_path / "data"), str(tmp_path / "heldout"), 1
    Path(short_run.heldout).write_text(json.dumps(SIX))
    Path(short_run.data).write_text('{"problem": "\u222b 2x?", "answer": "1"}', encoding="utf-8")
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "cp1252"))
    assert icrl.main(flags(short_run)) == 0
    sys.stdout.flush()
    assert b"problem   ? 2x?" in sys.stdout.buffer.getvalue()


def test_a_run_from_the_command_line(tmp_path, capsys):
    out = tmp_path / "run"
    config = icrl.Config(steps=2, queries=2, samples=2, eval_problems=3, seed=2 ** 32, out=str(out), device="cpu")
    assert icrl.main([*flags(config), "--device", "cpu"]) == 0
    assert json.loads((out / "config.json").read_text()) == dataclasses.asdict(config)
    printed = capsys.readouterr().out
    rows, turns = (read_lines(out / f"{name}.jsonl") for name in ("metrics", "sessions"))
    assert [row["step"] for row in rows] == [1, 2] and {turn["step"] for turn in turns} == {1, 2}
    assert {turn["part"] for turn in turns} >= {"first", "critique", "revision"}
    assert f"{rows[-1]['tokens']:,} tokens sampled in 2 steps" in printed and "  problem   What is" in printed
    before, after = torch.load(out / "checkpoint.pt")["state"]["before"], rows[-1]["heldout"]
    for name in ("pass@1", "after 1 critique"):
        assert re.search(rf"^{name} +{before[name]:.3g} +{after[name]:.3g}$", printed, re.MULTILINE)
    # Zero steps measure a model: here the trained one, which gives the same figures as at the end of its training.
    again = dataclasses.replace(config, model=str(out / "model"), out=str(tmp_path / "eval"), steps=0, samples=1)
    assert icrl.train(again)["before"] == after
