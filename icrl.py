#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""ICRL in one file: a model learns from its own critique, and then no longer needs it (arXiv 2605.15224).

One language model plays two roles, told apart by their prompts alone.
  1. The solver attempts a problem. If it fails, the critic (same weights) writes a critique of the attempt, and the
     solver tries afresh with the critique in its prompt: a session of at most K attempts (Algorithm 1).
  2. The critic is paid by what its critique did for the solver                                           (Eq. 3).
  3. A guided revision trains the solver *as if it had never seen the critique*; a token that only the critique made
     likely counts little: w_t = pi(y_t | q) / pi(y_t | q, c)                                             (Eq. 4).
  4. Advantages are normalised per (problem, role), so that critics compete with critics                  (Eq. 5).
  5. One clipped policy-gradient step moves both roles at once                                            (Eq. 6).
With --method grpo the critic is off and what is left is plain GRPO, without a KL term: read ICRL as the difference.

Where this file departs from the paper or fills what that leaves open, and why:
  a. The default model is a 0.43 M parameter toy that ships with the code, so that the method can be watched on a
     laptop; its learning rate and lengths suit it. --preset qwen3 has the paper's hyper-parameters.
  b. Sampling is Hugging Face `generate`, not an inference server: slower, but one set of weights samples and scores.
     Every log-prob is computed by `completion_logprobs`; between sampler and scorer there is only rounding.
  c. Group statistics use the unbiased standard deviation, and groups of one or of equal rewards give exactly 0
     (the paper leaves both open).
  d. Eq. 6 is averaged over each sample's tokens and then over samples; the paper writes one expectation over both.
  e. A batch in which no group has an advantage takes no step: AdamW would move the weights all the same.
What the authors' released code does differently from their paper is listed in the README.

How to read it: configuration, prompts, sampling, sessions, equations and update are the method. Training,
evaluation and comparison run and measure it. Problems, the answer checker and the command line come last.
"""
import argparse
import cmath
import contextlib
import csv
import dataclasses
import functools
import itertools
import json
import math
import random
import re
import shutil
import signal
import sys
import time
from collections import defaultdict
from fractions import Fraction
from operator import add, mul, sub, truediv
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, GenerationConfig
from transformers.utils import logging as hf_logging

HERE = Path(__file__).resolve().parent


class UsageError(ValueError):
    """What the user asked for cannot be done; the message says what is wrong, where, and what to do."""


# ---------------------------------------------------------------------------------------------------- configuration

def flag(default, help, choices=None, low=None, resumes=False):
    """A field of Config; low is the least allowed value, and `resumes` lets --resume change it."""
    return dataclasses.field(default=default, metadata=dict(help=help, choices=choices, low=low, resumes=resumes))


@dataclasses.dataclass
class Config:
    """Every setting of a run; each field is a command-line flag of the same name."""
    preset: str = flag("tiny", "settings to start from; other flags override them", ("tiny", "hints", "qwen3"))
    model: str = flag(str(HERE / "math_data" / "model"), "Hugging Face model, a name or a folder")
    data: str = flag(str(HERE / "math_data" / "train.jsonl"), "problems (JSONL) to train on; of eval: to measure")
    heldout: str = flag(str(HERE / "math_data" / "heldout.jsonl"), "evaluation problems (JSONL)")
    examples: str = flag("", "problems with a worked `solution` (JSONL), shown to the solver as earlier turns of the "
                         "chat; for a model that does not keep to the form of an answer by itself")
    out: str = flag("", "run folder; empty: runs/ and the time")
    seed: int = flag(0, "seed of everything random", low=0)
    device: str = flag("auto", "cpu, cuda, ...; auto: the GPU if there is one", resumes=True)

    method: str = flag("icrl", "grpo is the same without a critic, K = 1", ("icrl", "grpo"))
    critic: str = flag("trained", "who criticises: the model itself; frozen: the model before training; placebo: "
                       "nobody, each critique is 'Try again.'; retry: nobody, just a second try; shuffled: the model, "
                       "but each session gets the critique of another problem; of eval: any model, by its name",
                       ("trained", "frozen", "placebo", "retry", "shuffled"))
    weight: str = flag("token", "of a revision's tokens: w_t of Eq. 4; one: 1; sequence: one ratio for all of them; "
                       "shaped: Critique-GRPO's p / (p + 0.1)", ("token", "one", "sequence", "shaped"))
    groups: str = flag("role", "whose rewards are compared: same problem and role (Eq. 5); role_round: and round; "
                       "pooled: same problem", ("role", "role_round", "pooled"))

    queries: int = flag(16, "problems per step", low=1)
    samples: int = flag(8, "sessions per problem (G)", low=1)
    rounds: int = flag(2, "attempts per session at most (K)", low=1)
    max_response: int = flag(48, "tokens per attempt at most", low=1)
    max_critique: int = flag(48, "tokens per critique at most", low=1)
    temperature: float = flag(1.0, "of sampling and of every log-prob", low=1e-3)
    thinking: bool = flag(False, "let a hybrid model think before it answers or criticises")

    steps: int = flag(65, "training steps", low=1, resumes=True)
    token_limit: int = flag(0, "stop after so many generated tokens (0: no limit)", low=0)
    inner_steps: int = flag(1, "optimiser steps per rollout; from the second on, rho is not 1", low=1)
    lr: float = flag(3e-4, "learning rate, constant", low=0.0)
    weight_decay: float = flag(0.0, "of AdamW", low=0.0)
    grad_clip: float = flag(1.0, "largest gradient norm; inf: any", low=1e-6)
    clip_low: float = flag(0.2, "with A < 0, rho below 1 - clip_low has no gradient", low=0.0)
    clip_high: float = flag(0.2, "with A > 0, rho above 1 + clip_high has no gradient", low=0.0)
    w_max: float = flag(2.0, "cap of the calibration ratio w", low=0.0)
    sample_batch: int = flag(256, "completions generated at a time; fewer need less memory, and draw other samples",
                             low=1, resumes=True)
    micro_tokens: int = flag(1024, "tokens per forward pass of the update; fewer need less memory", low=1, resumes=True)
    bf16: bool = flag(False, "compute in bfloat16; weights and optimiser stay float32")
    checkpointing: bool = flag(False, "recompute activations in the backward pass: less memory, slower", resumes=True)
    optimizer_on: str = flag("device", "cpu: weights in float32 and AdamW's state stay in the memory of the host; less "
                             "memory on the GPU, slower", ("device", "cpu"), resumes=True)

    eval_every: int = flag(13, "steps between evaluations (0: before and after only)", low=0)
    eval_problems: int = flag(240, "problems per evaluation at most", low=1)
    eval_samples: int = flag(1, "sessions per problem in an evaluation (k)", low=1)
    show_every: int = flag(15, "steps between printed sessions (0: none)", low=0, resumes=True)
    save_every: int = flag(25, "steps between checkpoints (0: at the end only)", low=0, resumes=True)


PRESETS = {
    "tiny": {},                                               # the defaults of Config
    "hints": dict(model=f"{HERE}/math_data/hints/model", data=f"{HERE}/math_data/hints/train.jsonl",
                  heldout=f"{HERE}/math_data/hints/heldout.jsonl"),            # critiques hand over a value, no method
    "qwen3": dict(model="Qwen/Qwen3-4B-Instruct-2507", lr=1e-6, weight_decay=0.1, clip_high=0.28, steps=300,
                  max_response=2048, max_critique=1024, bf16=True, checkpointing=True, sample_batch=32,
                  micro_tokens=8192, optimizer_on="cpu", eval_every=10, show_every=1, save_every=50),
    # 16 problems x 8 sessions, K = 2, temperature 1 and w_max 2 are the paper's too. A model of 0.1 B parameters needs
    # --examples and a lower temperature to find any answer, and its critiques put next to nothing right (README).
}


# ---------------------------------------------------------------------------------------------------------- prompts

SOLVER_SYSTEM = r"Solve the problem step by step and put the final answer in \boxed{}."
CRITIC_SYSTEM = (
    "You see a problem and a failed attempt. Name the most valuable mistake and give short, reusable tips "
    "for a fresh attempt. Never state the final answer. Write the tips between <critique> and </critique>.")


def solver_messages(problem, critique=None, examples=()):
    """Chat messages for an attempt at `problem`, with the latest critique if there is one.

    A revision is a fresh attempt: it sees neither the failed attempt nor older critiques nor a reward. Without a
    critique (None or empty) the messages are, to the byte, those of a first attempt; these are also the ones under
    which a revision is trained. examples: problems with a `solution`, which come first, as turns of the same chat.
    """
    tips = f"\n\nTips from the critic of an earlier attempt:\n{critique}" if critique else ""
    shown = [{"role": role, "content": example[field]} for example in examples
             for role, field in (("user", "problem"), ("assistant", "solution"))]
    return [{"role": "system", "content": SOLVER_SYSTEM}, *shown, {"role": "user", "content": problem + tips}]


def critic_messages(problem, attempt):
    """Chat messages that ask for a critique of a failed attempt; the gold answer is not among the arguments."""
    return [{"role": "system", "content": CRITIC_SYSTEM},
            {"role": "user", "content": f"Problem:\n{problem}\n\nFailed attempt:\n{attempt}"}]


def extract_critique(text):
    """The critique in what the critic wrote: the text in the last <critique> tags, or all of it without tags."""
    text = text.rpartition("</think>")[2].partition("<think>")[0]            # no thoughts, nor one that was cut off
    return text.rpartition("<critique>")[2].partition("</critique>")[0].strip()


def encode_chat(tokenizer, messages, thinking=False):
    """Token ids of a chat prompt that ends where the assistant's turn begins.

    Contents are data. An attempt or a critique is model output inside a user's turn, so whatever spells a control
    token (<|im_end|>; those that the tokenizer calls special) is taken out of it, again and again: taking one out can
    put another together.
    """
    control = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]

    def clean(text):
        while any(token in text for token in control):
            for token in control:
                text = text.replace(token, "")
        return text

    messages = [{**message, "content": clean(message["content"])} for message in messages]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, enable_thinking=thinking)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


# --------------------------------------------------------------------------------------------------------- sampling

def autocast(model, config):
    """Compute in bfloat16 where --bf16 asks for it."""
    return torch.autocast(model.device.type, torch.bfloat16, enabled=config.bf16)


def stop_tokens(model, tokenizer):
    """The ids that end a completion: the tokenizer's EOS and any that the checkpoint's generation config adds."""
    ids = model.generation_config.eos_token_id
    ids = ids if isinstance(ids, (list, tuple)) else [ids]
    return {i for i in [*ids, tokenizer.eos_token_id] if i is not None}


@torch.no_grad()
def sample(model, tokenizer, prompts, max_new_tokens, temperature=1.0, chunk=16):
    """One completion per prompt by Hugging Face `generate`; temperature 0 is greedy.

    prompts: lists of token ids, none empty, at least one. Returns (completions, truncated): token-id lists up to and
    including the first stop token, and a bool each for having reached `max_new_tokens` without one.

    All prompts are one batch. Three things keep it cheap: equal prompts are read once and their cache is copied;
    `generate` makes `chunk` tokens a call and goes on from the cache; rows that have ended are dropped between calls.
    """
    context = getattr(model.config, "max_position_embeddings", math.inf)
    if max(map(len, prompts)) + max_new_tokens > context:
        raise UsageError(f"a prompt of {max(map(len, prompts))} tokens and {max_new_tokens} new ones do not fit in the "
                         f"model's context of {context}")
    stops = stop_tokens(model, tokenizer)
    # Which id pads does not matter: the prompts are masked, and a completion is cut at its first stop.
    settings = GenerationConfig(do_sample=temperature > 0, temperature=temperature or 1.0, top_k=0, top_p=1.0,
                                min_p=None, repetition_penalty=1.0, eos_token_id=sorted(stops), pad_token_id=min(stops))
    # `generate` fills what we leave unset from the checkpoint's generation config (Qwen3: top_k 20, top_p 0.95), and
    # the policy that is sampled would not be the one that is scored. So that config is set aside for the call.
    of_checkpoint, model.generation_config = model.generation_config, GenerationConfig()
    was_training = model.training
    model.eval()                                    # no dropout; and gradient checkpointing would disable the cache
    try:
        unique = list(dict.fromkeys(map(tuple, prompts)))
        width = max(map(len, unique))                                                     # padded on the left
        ids = torch.tensor([[settings.pad_token_id] * (width - len(p)) + list(p) for p in unique], device=model.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in unique], device=model.device)
        cache = DynamicCache(config=model.config)
        if width > 1:                               # all but the last token, with which `generate` begins
            model(input_ids=ids[:, :-1], attention_mask=mask[:, :-1], past_key_values=cache, use_cache=True,
                  position_ids=(mask.cumsum(1) - 1).clamp(min=0)[:, :-1], logits_to_keep=1)
        row_of = {prompt: row for row, prompt in enumerate(unique)}
        rows = torch.tensor([row_of[tuple(p)] for p in prompts], device=model.device)
        live, completions = list(range(len(prompts))), [[]] * len(prompts)
        while live:
            cache.reorder_cache(rows)               # which may drop and repeat rows
            ids, mask = ids[rows], mask[rows]
            settings.max_new_tokens = min(chunk, width + max_new_tokens - ids.shape[1])
            ids = model.generate(ids, attention_mask=mask, past_key_values=cache, generation_config=settings)
            mask = torch.cat([mask, mask.new_ones(len(ids), ids.shape[1] - mask.shape[1])], dim=1)
            keep = []                               # rows without an end; the others may hold padding, and leave
            for row, completion in enumerate(ids[:, width:].tolist()):
                end = next((t + 1 for t, token in enumerate(completion) if token in stops), None)
                completions[live[row]] = completion[:end]
                if end is None and len(completion) < max_new_tokens:
                    keep.append(row)
            live, rows = [live[row] for row in keep], torch.tensor(keep, device=model.device)
    finally:
        model.generation_config = of_checkpoint
        model.train(was_training)
    return completions, [completion[-1] not in stops for completion in completions]


def completion_logprobs(model, prompts, completions, temperature=1.0):
    """log pi(y_t | prompt, y_<t) of every completion token, at `temperature`.

    prompts, completions: B > 0 lists of token ids, none empty; the ids as they were sampled, never re-tokenised.
    temperature: above 0. Returns (logp, mask), both (B, T) float32 with T the longest completion, 0 on the padding;
    differentiable. Leaves the model in eval mode, but for layers under gradient checkpointing (see load_model).

    No attention mask is needed: padding stands on the right, where causal attention does not look. So any id pads.
    """
    rows = [torch.tensor([*prompt, *completion]) for prompt, completion in zip(prompts, completions)]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(model.device)                # (B, L)
    first = torch.tensor([[len(prompt)] for prompt in prompts], device=ids.device)                # (B, 1)
    length = torch.tensor([[len(completion)] for completion in completions], device=ids.device)
    position = torch.arange(ids.shape[1], device=ids.device)
    predicts = (position >= first - 1) & (position < first - 1 + length)     # (B, L): logits at t - 1 predict token t
    mask = position[:int(length.max())] < length                             # (B, T)

    # The head turns a position into as many numbers as there are words (151,936 for Qwen3): the memory peak of the
    # update. This hook lets it see only the positions that predict a completion token, (B, L, H) -> (N, H), in any
    # architecture and before whatever that does to its logits.
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda head, inputs: (inputs[0][predicts],))
    # With dropout rho would not be 1 before the first step, hence eval mode. But Hugging Face recomputes a layer's
    # activations only if the layer itself is in training mode.
    model.eval()
    for module in model.modules():
        module.training = bool(getattr(module, "gradient_checkpointing", False))
    try:
        logits = model(input_ids=ids, use_cache=False).logits.float() / temperature        # (N, vocabulary)
    finally:
        hook.remove()
    logp = -torch.nn.functional.cross_entropy(logits, ids.roll(-1, dims=1)[predicts], reduction="none")
    # predicts and mask name the same tokens in the same order, row by row.
    return torch.zeros(mask.shape, device=ids.device).masked_scatter(mask, logp), mask.float()


# ------------------------------------------------------------------------------------------- sessions (Algorithm 1)

@dataclasses.dataclass
class Turn:
    """One generation: an attempt of the solver, or a critique."""
    query: int              # number of the problem in the batch
    session: int            # number of the session in the batch
    round: int              # 1 to K
    role: str               # "solver" or "critic"
    prompt: list            # token ids under which it was sampled
    free_prompt: list       # token ids under which it is trained: a revision's do without the critique
    completion: list        # the token ids that were sampled
    text: str
    truncated: bool
    reward: float = 0.0

    @property
    def guided(self):
        """Whether it was sampled under a critique."""
        return self.prompt != self.free_prompt

    @property
    def part(self):
        """What it is in its session."""
        return "critique" if self.role == "critic" else "first" if self.round == 1 else "revision"


def outcome_reward(text, problem, truncated):
    """r(tau) in [0, 1] of an attempt at `problem`, an object of the data. What was cut off at its limit earns 0.

    1 is solved: it ends the session and pays the critic 1. Another task changes this function, the two system prompts
    and, where answers are not mathematics, load_problems, which wants one that fits in a box, and states_answer.
    """
    return 0.0 if truncated else float(is_correct(text, problem["answer"]))


FIXED_CRITIQUE = {"placebo": "Try again.", "retry": ""}


def rollout(model, tokenizer, problems, config, critic=None, gated=True, first=None):
    """Algorithm 1: config.samples (G) independent sessions of at most K rounds on each problem.

    problems: dicts with `problem` and `answer`. critic: (model, tokenizer), by default the solver's own. For
    evaluation, gated=False has right attempts criticised too, and `first` are Turns of an earlier rollout, taken as
    first attempts in place of new ones. Returns Turns with their rewards; a critique's is that of Eq. 3.
    """
    samples, rounds = config.samples, 1 if config.method == "grpo" else config.rounds
    solver, critic, examples = (model, tokenizer), critic or (model, tokenizer), load_examples(config)

    def encode(messages, tokenizer=tokenizer):
        return encode_chat(tokenizer, messages, config.thinking)

    def generate(role, round, sessions, prompts):
        who, limit = (solver, config.max_response) if role == "solver" else (critic, config.max_critique)
        free_prompts = [free[session // samples] for session in sessions] if role == "solver" else prompts
        completions, truncated = [], []
        for i in range(0, len(prompts), config.sample_batch):
            # Inference mode is faster, but not in bfloat16: there autocast would cast every weight for every token.
            with torch.inference_mode(not config.bf16), autocast(who[0], config):
                more = sample(*who, prompts[i:i + config.sample_batch], limit, config.temperature)
            completions, truncated = completions + more[0], truncated + more[1]
        texts = who[1].batch_decode(completions, skip_special_tokens=True)
        if who[1].decode(prompts[0][-8:]).rstrip().endswith("<think>"):     # so the template ends every prompt
            texts = [f"<think>{text}" for text in texts]
        return [Turn(session // samples, session, round, role, *rest)
                for session, *rest in zip(sessions, prompts, free_prompts, completions, texts, truncated)]

    free = [encode(solver_messages(problem["problem"], None, examples)) for problem in problems]
    turns, reward, critique, tips = [], {}, {}, {}           # the last three: the latest of each session
    live = list(range(len(problems) * samples)) if first is None else [turn.session for turn in first]
    for round in range(1, rounds + 1):
        prompts = [encode(solver_messages(problems[s // samples]["problem"], tips[s], examples)) if tips.get(s)
                   else free[s // samples] for s in live]
        attempts = first if round == 1 and first is not None else generate("solver", round, live, prompts)
        for turn in attempts:
            turn.reward = outcome_reward(turn.text, problems[turn.query], turn.truncated)
            if turn.session in critique:
                critique[turn.session].reward = critic_reward(reward[turn.session], turn.reward)
            reward[turn.session] = turn.reward
        turns += attempts
        attempts = [turn for turn in attempts if turn.reward != 1.0 or not gated]
        live = [turn.session for turn in attempts]
        if round == rounds or not live:                      # the last attempt gets no critique
            break
        if config.critic in FIXED_CRITIQUE:
            tips = dict.fromkeys(live, FIXED_CRITIQUE[config.critic])
            continue
        prompts = [encode(critic_messages(problems[turn.query]["problem"], turn.text), critic[1]) for turn in attempts]
        critiques = generate("critic", round, live, prompts)
        turns += critiques
        critique = {turn.session: turn for turn in critiques}
        source = critique
        # Shuffled: the critique of another problem, if there is one. Rewards stay with the session; nobody is trained
        # on them, for only a critic that is "trained" is.
        if config.critic == "shuffled":
            others = [[o for o in critiques if o.query != turn.query] or [turn] for turn in critiques]
            source = {s: other[torch.randint(len(other), ()).item()] for s, other in zip(live, others)}
        tips = {s: extract_critique(source[s].text) for s in live}
    return turns


# ---------------------------------------------------------------------------------------------------- the equations

def critic_reward(before, after):
    """Eq. 3: what a critique earns, from the rewards (floats) of the attempts before and after it.

    With rewards of 0 or 1 and only failures criticised it is just `after`; the difference is for partial rewards.
    Nothing is deducted for a critique that states the answer: `leaks` counts them.
    """
    return 1.0 if after == 1.0 else after - before


def role_advantages(rewards, groups, delta=1e-6):
    """Eq. 5: A_i = (r_i - mean) / (std + delta) within each group, std unbiased.

    rewards: (B,) floats; groups: B keys, for ICRL (problem, role), compared by value (so no tensors). Returns (B,)
    float32. A group of one or of equal rewards gives exactly 0: there, rounding noise over delta would pass for a
    signal.
    """
    rewards = torch.as_tensor(rewards, dtype=torch.float32)
    members, advantages = defaultdict(list), torch.zeros_like(rewards)
    for i, key in enumerate(groups):
        members[key].append(i)
    for index in members.values():
        r = rewards[index]
        if r.min() < r.max():
            advantages[index] = (r - r.mean()) / (r.std() + delta)
    return advantages


def calibration_ratio(logp_free, logp_guided, w_max=2.0):
    """Eq. 4: w_t = pi(y_t | q, y_<t) / pi(y_t | q, c, y_<t), at most w_max, a constant for the gradient.

    logp_free, logp_guided: (B, T) float32 log-probs of the same revisions, both under the weights that sampled. Returns
    (B, T), to be masked where there is padding. For revisions only: the caller gives other samples weight 1.
    """
    return (logp_free - logp_guided).detach().exp().clamp(max=w_max)


def sequence_ratio(logp_free, logp_guided, w_max=2.0):
    """In place of Eq. 4: one ratio for the revision, the product over its tokens (padding: 0). Biased by its cap."""
    logp_free, logp_guided = (logp.sum(1, keepdim=True).expand_as(logp) for logp in (logp_free, logp_guided))
    return calibration_ratio(logp_free, logp_guided, w_max)


def shaped_weight(logp_free, logp_guided, w_max=2.0):
    """In place of Eq. 4: Critique-GRPO's p / (p + 0.1), p = pi(y_t | q, y_<t)."""
    p = logp_free.detach().exp()
    return p / (p + 0.1)


def no_weight(logp_free, logp_guided, w_max=2.0):
    """In place of Eq. 4: 1, as if the solver would have written the revision without critique."""
    return torch.ones_like(logp_free)


WEIGHTS = {"token": calibration_ratio, "one": no_weight, "sequence": sequence_ratio, "shaped": shaped_weight}


def icrl_objective(logp, logp_old, advantages, weights, mask, clip_low=0.2, clip_high=0.2):
    """Eq. 6, to be maximised: w_t min(rho_t A, clip(rho_t, 1 - clip_low, 1 + clip_high) A), rho_t = pi / pi_old.

    logp, logp_old: (B, T) float32, both under the critique-free prompt, now and at the rollout, finite on the padding
    too; weights, mask: (B, T); advantages: (B,). Returns the mean over each sample's tokens, then over the B samples.

    The weight stays outside the min: clipping w_t rho_t would let w decide what is clipped. And w is capped before it
    meets A: min(w A, w_max A) would pick the larger weight where A < 0.
    """
    rho = (logp - logp_old.detach()).exp()
    A = advantages[:, None]
    J = weights.detach() * torch.min(rho * A, rho.clamp(1 - clip_low, 1 + clip_high) * A)
    return ((J * mask).sum(1) / mask.sum(1).clamp(min=1)).mean()


# ------------------------------------------------------------------------------------------------------- the update

def group_key(turn, groups):
    """Whom a turn's reward is compared with. By role, revisions compete with first attempts: both train pi(. | q)."""
    return {"role": (turn.query, turn.role), "role_round": (turn.query, turn.role, turn.round),
            "pooled": turn.query}[groups]


def micro_batches(lengths, budget):
    """Split the indices of `lengths`, longest first, into lists within `budget` tokens when padded to their longest.

    What is over the budget by itself has a list of its own.
    """
    batches, longest = [], 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not batches or longest * (len(batches[-1]) + 1) > budget:
            batches.append([])
            longest = lengths[i]
        batches[-1].append(i)
    return batches


def place(model, config):
    """The model itself, moved to its device; its weights in bfloat16 if float32 ones are kept (see make_optimizer)."""
    auto = "cuda" if torch.cuda.is_available() else "cpu"
    if config.bf16 and config.optimizer_on == "cpu":          # not the buffers: RoPE's frequencies need all their bits
        for weight in model.parameters():
            weight.data = weight.data.to(torch.bfloat16)
            weight.grad_dtype = torch.float32                 # micro-batches are added up in it (torch 2.10 or later)
    try:
        model = model.to(auto if config.device == "auto" else config.device)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {config.device}: {str(error).splitlines()[0]}") from error
    if config.bf16 and model.device.type == "cpu":            # where torch's fused attention is slow in bfloat16
        model.set_attn_implementation("eager")
    return model


def make_optimizer(model, config):
    """AdamW over the weights of `model`, or over float32 copies of them in the memory of the host.

    With --optimizer_on cpu the device holds weights and gradients only, and with --bf16 the former in bfloat16: 6 bytes
    a parameter in place of 16. Moves `model` to the device.
    """
    weights = list(model.parameters())
    if config.optimizer_on == "cpu":
        weights = [torch.nn.Parameter(weight.detach().to("cpu", torch.float32, copy=True)) for weight in weights]
    place(model, config)
    # The betas are the authors', not AdamW's default.
    return torch.optim.AdamW(weights, lr=config.lr, betas=(0.9, 0.98), weight_decay=config.weight_decay,
                             fused=weights[0].is_cuda or None)       # unfused takes 4 bytes a parameter more there


def optimizer_step(model, optimizer, grad_clip):
    """Clip the gradients, step, and drop them. Returns their norm before clipping; without a finite one, no step.

    optimizer: of make_optimizer, with one group, of the model's weights or of copies of them in the same order.
    """
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip).item()
    if math.isfinite(norm):
        copies = [(weight, copy) for weight, copy in zip(model.parameters(), optimizer.param_groups[0]["params"])
                  if weight is not copy]
        for weight, copy in copies:
            copy.grad = None if weight.grad is None else weight.grad.to(copy)
        optimizer.step()
        with torch.no_grad():
            for weight, copy in copies:
                weight.copy_(copy)
                copy.grad = None
    model.zero_grad(set_to_none=True)
    return norm


def update(model, optimizer, turns, config):
    """The optimiser step(s) of one rollout, on Eq. 6. Returns a dict to log; the README says what each figure is."""
    turns = [t for t in turns if t.role == "solver" or config.critic == "trained"]
    groups = [group_key(t, config.groups) for t in turns]
    advantages = role_advantages([t.reward for t in turns], groups)
    # Without advantage there is no gradient: such turns are left out, but count in the mean over samples. If all are
    # flat there is no step at all, for AdamW would still move the weights, by momentum and weight decay.
    active = advantages.nonzero()[:, 0].tolist()
    stats = {"flat_groups": 1 - len({groups[i] for i in active}) / len(set(groups)), "objective": 0.0, "grad_norm": 0.0,
             "skipped": 0, "w_mean": None, "w_capped": None, "w_ess": None}

    def logprobs(indices, with_critique):
        prompts = [turns[i].prompt if with_critique else turns[i].free_prompt for i in indices]
        with autocast(model, config):
            return completion_logprobs(model, prompts, [turns[i].completion for i in indices], config.temperature)

    # By the length under `prompt`, which for a revision is the longer of its two.
    batches = [[active[i] for i in batch] for batch in
               micro_batches([len(turns[i].prompt) + len(turns[i].completion) for i in active], config.micro_tokens)]
    rollout_terms, ratios = [], []                            # of each micro-batch: (log pi_old, w); w of guided tokens
    for inner in range(config.inner_steps if active else 0):
        stats["objective"] = 0.0
        for number, batch in enumerate(batches):
            logp, mask = logprobs(batch, with_critique=False)
            if inner == 0:
                # Nothing has moved yet, so this pass is pi_old too, and the numerator of w. The denominator is scored
                # in the same way, not recorded while sampling: in bfloat16 two ways of computing a log-prob differ.
                old, weights = logp.detach(), torch.ones_like(logp)
                guided = [row for row, i in enumerate(batch) if turns[i].guided]
                if guided:
                    with torch.no_grad():
                        logp_guided, real = logprobs([batch[row] for row in guided], with_critique=True)
                    T = logp_guided.shape[1]
                    w = WEIGHTS[config.weight](old[guided, :T], logp_guided, config.w_max)
                    weights[guided, :T] = w
                    ratios.append(w[real.bool()])
                rollout_terms.append((old, weights))
            old, weights = rollout_terms[number]
            A = advantages[batch].to(logp.device)
            # icrl_objective divides by the samples of the micro-batch; with this factor it is by all samples, and the
            # gradients of the micro-batches add up to exactly that of the whole batch.
            share = len(batch) / len(turns)
            J = share * icrl_objective(logp, old, A, weights, mask, config.clip_low, config.clip_high)
            (-J).backward()
            stats["objective"] += J.item()
        norm = optimizer_step(model, optimizer, config.grad_clip)
        if math.isfinite(norm):
            stats["grad_norm"] = norm
        else:
            stats.update(skipped=stats["skipped"] + 1, objective=None)
    if ratios:
        w = torch.cat(ratios)
        stats.update(w_mean=w.mean().item(), w_capped=(w >= config.w_max).float().mean().item(),
                     w_ess=(w.mean() ** 2 / (w ** 2).mean().clamp(min=1e-30)).item())
    return stats


# --------------------------------------------------------------------------------------------------------- training

def load_model(name, config):
    """Model (float32, in the memory of the host) and tokenizer of a Hugging Face checkpoint."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model, found = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, use_safetensors=True,
                                                            output_loading_info=True)
        if found["missing_keys"]:                             # they would be random
            raise ValueError(f"it lacks weights, such as {min(found['missing_keys'])}")
        if not all(weight.isfinite().all() for weight in model.parameters()):
            raise ValueError("some of its weights are not finite")
        if not tokenizer.chat_template:
            raise ValueError("its tokenizer has no chat template; use an instruction-tuned model")
        if config.checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if "zebra" not in tokenizer.decode(encode_chat(tokenizer, solver_messages("zebra"), config.thinking)):
            raise ValueError("the problem is lost in its chat template or its tokenizer")
    except Exception as error:                                # a damaged folder can raise anything
        raise UsageError(f"cannot use the model {name!r}: {' '.join(str(error).split())[:300]}") from error
    if not stop_tokens(model, tokenizer):
        raise UsageError(f"the tokenizer of {name!r} has no end-of-sequence token; completions would never end")
    if len(tokenizer) > (size := model.get_input_embeddings().num_embeddings):
        raise UsageError(f"the tokenizer of {name!r} has {len(tokenizer)} tokens, but the model only {size}")
    for module in model.modules():                  # nn.Dropout calls it p, attention layers otherwise
        for name_of_dropout in ("p", "dropout", "attention_dropout"):
            if isinstance(getattr(module, name_of_dropout, None), float):
                setattr(module, name_of_dropout, 0.0)
    return model, tokenizer


def check_context(model, tokenizer, problems, config):
    """Refuse problems that are too long for the model, before any is sampled."""
    longest = max(problems, key=lambda p: len(tokenizer(p["problem"])["input_ids"]))["problem"]
    prompts = critic_messages(longest, ""), solver_messages(longest, None, load_examples(config))
    needed = max(len(encode_chat(tokenizer, p)) for p in prompts) + config.max_response + config.max_critique
    if needed > getattr(model.config, "max_position_embeddings", needed):
        raise UsageError(f"the problem {longest[:60]!r}... needs a context of {needed} tokens with --max_response and "
                         f"--max_critique, and the model has {model.config.max_position_embeddings}")


def problems_of_step(problems, step, config):
    """The problems of a step. Each epoch has an order of its own, which follows from the seed."""
    places = [divmod(i, len(problems)) for i in range((step - 1) * config.queries, step * config.queries)]
    order = {epoch: np.random.default_rng([config.seed, epoch]).permutation(len(problems)) for epoch, _ in places}
    return [problems[order[epoch][i]] for epoch, i in places]


def mean(values):
    """The mean, or None where there is nothing to average: a 0 would read like a result."""
    values = list(values)
    return sum(values) / len(values) if values else None


def rollout_stats(turns):
    """Number, mean reward, mean length and share truncated of first attempts, critiques and revisions."""
    stats = {}
    for part in ("first", "critique", "revision"):
        mine = [t for t in turns if t.part == part]
        stats |= {f"{part}_count": len(mine), f"{part}_reward": mean(t.reward for t in mine),
                  f"{part}_tokens": mean(len(t.completion) for t in mine),
                  f"{part}_truncated": mean(t.truncated for t in mine)}
    return stats


def show_step(bar, row, turns, problems, state, config):
    """Say how a step went: figures in the progress bar, now and then a session, and a warning if all was cut off.

    The session is the first that holds a critique, or else the first.
    """
    shown = {"unaided": row["first_reward"], "with critique": row["revision_reward"], "w": row["w_mean"],
             "held-out": state["after"]["pass@1"]}
    bar.set_postfix_str(", ".join(f"{name} {value:.2f}" for name, value in shown.items() if value is not None))
    if config.show_every and (row["step"] - 1) % config.show_every == 0:
        number = next((t.session for t in turns if t.role == "critic"), 0)
        session = [t for t in turns if t.session == number]
        problem = problems[session[0].query]
        tqdm.write("\n".join([f"one session of step {row['step']}:",
                              f"  problem   {problem['problem']}  (answer {problem['answer']})",
                              *(f"  {t.part:9} {t.text.strip()}  -> reward {t.reward:g}" for t in session)]))
    for part, name, limit in (("first", "attempt", "response"), ("critique", "critique", "critique")):
        if row[f"{part}_truncated"] == 1:
            tqdm.write(f"warning, step {row['step']}: every {name} was cut off; raise --max_{limit}")


def write_json(path, value):
    """Write under another name, then rename: a process killed meanwhile leaves no half of a file at `path`."""
    path.with_suffix(".new").write_text(json.dumps(value, indent=1))
    path.with_suffix(".new").replace(path)


def checkpoints(run):
    """The checkpoints in a run's folder, the latest last."""
    found = (path for path in Path(run).glob("checkpoint-*") if path.name[11:].isdigit())
    return sorted(found, key=lambda path: int(path.name[11:]))


def save(run, model, tokenizer, optimizer, state):
    """Write a checkpoint beside the last one, rename it into place, and only then remove the last one."""
    older, new = checkpoints(run), run / "unfinished"
    # Matched by memory address: the optimiser knows no names, and a tied weight has two in the state.
    float32 = {weight.data_ptr(): copy.detach()
               for weight, copy in zip(model.parameters(), optimizer.param_groups[0]["params"])}
    # Older versions of transformers refuse to save some generation configs, such as a temperature without sampling.
    of_checkpoint, model.generation_config = model.generation_config, GenerationConfig()
    try:
        shutil.rmtree(new, ignore_errors=True)
        model.save_pretrained(new, state_dict={name: float32.get(tensor.data_ptr(), tensor)
                                               for name, tensor in model.state_dict().items()})
        (new / "generation_config.json").write_text(of_checkpoint.to_json_string())
        tokenizer.save_pretrained(new)
        torch.save(optimizer.state_dict(), new / "optimizer.pt")
        write_json(new / "state.json", state)
        new.rename(run / f"checkpoint-{state['step']}")
    except (OSError, RuntimeError, SafetensorError) as error:         # torch and safetensors raise these on a full disk
        raise OSError(f"cannot save a checkpoint (is the disk full?): {error}") from error
    finally:
        model.generation_config = of_checkpoint
    for path in older:
        shutil.rmtree(path)


def log_sessions(file, turns, problems, **more):
    for t in turns:
        print(json.dumps({**more, "problem": problems[t.query]["problem"], "session": t.session, "part": t.part,
                          "round": t.round, "text": t.text, "reward": t.reward, "truncated": t.truncated}), file=file)


@contextlib.contextmanager
def catch_interrupt():
    """Yields a list that the first Ctrl-C fills, so that a step can be finished; a second one interrupts at once."""
    def ask(*_):
        signal.signal(signal.SIGINT, signal.default_int_handler)
        stop.append(True)
        tqdm.write("interrupted: finishing this step and saving it (Ctrl-C again stops at once)")

    stop, before = [], signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, ask)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


def start(config, resume):
    """What a run begins with, or goes on with: (model, tokenizer, optimizer, problems, heldout, state)."""
    check(config)
    if not config.out:
        raise UsageError("--out: a run needs a folder")
    run, saved = Path(config.out), checkpoints(config.out) if resume else []
    problems, heldout = load_problems(config.data), load_problems(config.heldout)
    if common := {p["problem"] for p in problems} & {p["problem"] for p in heldout}:
        raise UsageError(f"{len(common)} held-out problems are training problems too, such as {min(common)!r}")
    if not resume and run.is_dir() and {path.name for path in run.iterdir()} - {"config.new"}:
        raise UsageError(f"{run} is not empty: continue the run in it with --resume {run}, or choose another --out")
    model, tokenizer = load_model(str(saved[-1]) if saved else config.model, config)
    check_context(model, tokenizer, problems + heldout, config)
    optimizer = make_optimizer(model, config)
    run.mkdir(parents=True, exist_ok=True)
    write_json(run / "config.json", dataclasses.asdict(config))
    (run / "result.json").unlink(missing_ok=True)             # of fewer steps
    state = {"step": 0, "tokens": 0, "skipped_in_a_row": 0, "evaluated": 0, "seconds": 0.0, "bytes": (0, 0)}
    if saved:
        optimizer.load_state_dict(torch.load(saved[-1] / "optimizer.pt", map_location="cpu", weights_only=True))
        state = json.loads((saved[-1] / "state.json").read_text())
    return model, tokenizer, optimizer, problems, heldout, state


def train(config, resume=False):
    """Train as `config` says, into the folder config.out. Returns the figures of the final table.

    Ctrl-C has the step finished and saved before it raises KeyboardInterrupt; a second one raises at once.
    """
    began, run = time.time(), Path(config.out)
    model, tokenizer, optimizer, problems, heldout, state = start(config, resume)
    began -= state["seconds"]
    base = (place(load_model(config.model, config)[0], config), tokenizer) if config.critic == "frozen" else None
    if state["step"] == 0:
        state["before"] = state["after"] = evaluate(model, tokenizer, heldout, config, base)
        state["before_train"] = critique_free(model, tokenizer, problems, config)
    with (open(run / "metrics.jsonl", "a", buffering=1) as metrics, open(run / "sessions.jsonl", "a") as sessions,
          catch_interrupt() as stop):
        for file, size in zip((metrics, sessions), state["bytes"]):
            file.truncate(size)                               # a resumed run forgets what came after its checkpoint

        end = state["step"] if 0 < config.token_limit <= state["tokens"] else config.steps
        bar = tqdm(range(state["step"] + 1, end + 1), initial=state["step"], total=config.steps,
                   desc=config.method, dynamic_ncols=True)
        for step in bar:
            # Each step seeds itself: a resumed run needs no saved random state, and nothing that happens between two
            # steps, such as an evaluation, can change what follows. (The factor is a prime above any number of steps.)
            torch.manual_seed(1_000_003 * config.seed + step)
            batch, started = problems_of_step(problems, step, config), time.time()
            turns = rollout(model, tokenizer, batch, config, base)
            sampled = time.time()
            tokens = state["tokens"] + sum(len(t.completion) for t in turns)
            row = {"step": step, "tokens": tokens, **rollout_stats(turns),
                   **update(model, optimizer, turns, config),
                   "rollout_seconds": sampled - started, "update_seconds": time.time() - sampled}
            last = step == config.steps or 0 < config.token_limit <= tokens
            if last or config.eval_every and step % config.eval_every == 0:
                state["after"] = row["heldout"] = evaluate(model, tokenizer, heldout, config, base)
                state["evaluated"] = step
            print(json.dumps(row), file=metrics)
            log_sessions(sessions, turns, batch, step=step)
            state |= {"step": step, "tokens": tokens,
                      "skipped_in_a_row": state["skipped_in_a_row"] + 1 if row["skipped"] else 0,
                      "seconds": time.time() - began, "bytes": (metrics.tell(), sessions.tell())}
            show_step(bar, row, turns, batch, state, config)
            if state["skipped_in_a_row"] == 3:
                raise UsageError("the gradients of three steps in a row are not finite; their sessions are the last in "
                                 f"{run / 'sessions.jsonl'}; try a lower --lr, or --no-bf16, in a new --out")
            if last or stop or config.save_every and step % config.save_every == 0:
                save(run, model, tokenizer, optimizer, state)
            if stop:
                raise KeyboardInterrupt
            if last:
                break
    if state["evaluated"] < state["step"]:                    # resumed, with no more --steps than had been taken
        state["after"] = evaluate(model, tokenizer, heldout, config, base)
    after_train = critique_free(model, tokenizer, problems, config)
    del optimizer                                             # frees memory for the base model
    base = base or (place(load_model(config.model, config)[0], config), tokenizer)
    swap = critic_swap(base[0], model, tokenizer, heldout, config)
    result = {**state, "after_train": after_train, "swap": swap, "seconds": time.time() - began,
              "model": str(checkpoints(run)[-1])}
    write_json(run / "result.json", result)
    return result


# ------------------------------------------------------------------------------------------------------- evaluation

def evaluation_config(config, **changes):
    """`config` for an evaluation, the same for every method: one critique of each attempt; then `changes`."""
    config = dataclasses.replace(config, method="icrl", critic="trained", rounds=2, samples=config.eval_samples)
    return dataclasses.replace(config, **changes)


@contextlib.contextmanager
def fixed_draws(model, seed):
    """The same random draws every time, so that only the weights differ; outside, none is consumed."""
    with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def evaluate(model, tokenizer, problems, config, critic=None):
    """What the solver can do without critique, and what one critique does for it: means of `outcomes` by name.

    Every attempt is criticised here, right ones too. critic: as in rollout, so by default the model itself, whatever
    it was trained with. Consumes no training randomness.
    """
    problems = problems[:config.eval_problems]
    with fixed_draws(model, config.seed):
        turns = rollout(model, tokenizer, problems, evaluation_config(config), critic, gated=False)
    return {"greedy": critique_free(model, tokenizer, problems, config, temperature=0.0, samples=1),
            **{name: mean(value for _, value in pairs) for name, pairs in outcomes(turns, problems).items()}}


def critique_free(model, tokenizer, problems, config, **changes):
    """Mean reward of attempts without critique, under `config` with `changes`."""
    config = evaluation_config(config, rounds=1, **changes)
    with fixed_draws(model, config.seed):
        return mean(t.reward for t in rollout(model, tokenizer, problems[:config.eval_problems], config))


def states_answer(critique, answer):
    """Whether the critique gives the answer away: a number or a box in it that the grader accepts."""
    stated = {extract_answer(critique) or "", *re.findall(r"-?\d[\d.,/]*\d|-?\d", critique)}
    return any(is_correct(rf"\boxed{{{value}}}", answer) for value in stated)


def outcomes(turns, problems):
    """Figures of one rollout with K = 2 and gated=False: {name: [(problem's number, value), ...]}.

    `after_gated` counts a right first attempt as right whatever its revision says, as if an oracle had stopped the
    session; such results are usually reported so. `after_ungated` counts the revision. (The critic's prompt calls every
    attempt failed, right ones too.) These and pass@ are mean rewards; "right" elsewhere is a reward of exactly 1.
    """
    first, critique, after = ([t for t in turns if t.part == part] for part in ("first", "critique", "revision"))
    reward, revised = (np.array([t.reward for t in part]) for part in (first, after))
    right, fixed, everywhere = reward == 1, revised == 1, np.ones(len(first), bool)
    leaks = np.array([states_answer(extract_critique(t.text), problems[t.query]["answer"]) for t in critique], bool)
    kinds = np.array(["" if (kind := problems[t.query].get("kind")) is None else str(kind) for t in first])
    best = defaultdict(float)
    for t in first:
        best[t.query] = max(best[t.query], t.reward)

    def over(values, where=everywhere):
        return [(t.query, float(value)) for t, value, counts in zip(first, values, where) if counts]

    return {
        "pass@1": over(reward),
        **({"pass@k": list(best.items())} if len(best) < len(first) else {}),
        "after_gated": over(np.maximum(reward, revised)),
        "after_ungated": over(revised),
        "wrong_to_right": over(fixed, ~right),
        "right_to_wrong": over(~fixed, right),
        "leaks": over(leaks),
        "fixed_if_leaked": over(fixed, leaks & ~right),
        "fixed_if_not": over(fixed, ~leaks & ~right),
        "attempt_tokens": over([len(t.completion) for t in first]),
        "critique_tokens": over([len(t.completion) for t in critique]),
        "truncated": [(t.query, float(t.truncated)) for t in turns],
        **{f"pass@1 {kind}": over(reward, kinds == kind) for kind in sorted({*kinds} - {""})},
    }


def critic_swap(base, trained, tokenizer, problems, config):
    """Critics compared on the same failures, those of the base solver: a trained solver's are fewer and harder.

    Returns, for each critic and each solver that revises, the share of the failures put right and the critique tokens
    spent for each of these: {"trained critic, base solver": {"fixed": 0.8, "tokens_per_fix": 12.0}, ...}.
    """
    problems = problems[:config.eval_problems]
    models, figures = {"base": base, "trained": trained}, {}
    with fixed_draws(base, config.seed):
        attempts = rollout(base, tokenizer, problems, evaluation_config(config, rounds=1))
        failures = [t for t in attempts if t.reward < 1]
        for critic, solver in itertools.product(models, models):
            turns = rollout(models[solver], tokenizer, problems, evaluation_config(config), (models[critic], tokenizer),
                            first=failures)
            fixed = sum(t.reward == 1 for t in turns if t.part == "revision")
            tokens = sum(len(t.completion) for t in turns if t.role == "critic")
            figures[f"{critic} critic, {solver} solver"] = {"fixed": fixed / len(failures) if failures else None,
                                                            "tokens_per_fix": tokens / fixed if fixed else None}
    return figures


def clustered(pairs):
    """Mean of (problem, value) pairs, and half its 95% interval over problems: those of a problem are one cluster."""
    sums = defaultdict(lambda: np.zeros(2))
    for problem, value in pairs:
        sums[problem] += value, 1
    totals, counts = np.array(list(sums.values())).T
    ratio, n = totals.sum() / counts.sum(), len(counts)
    residuals = totals - ratio * counts
    return ratio, 1.96 * (n / (n - 1) * (residuals ** 2).sum()) ** 0.5 / counts.sum() if n > 1 else math.nan


def evaluate_file(config):
    """Evaluate config.model on config.data, with the model config.critic as critic; k = config.eval_samples.

    Writes every response to responses.jsonl and the figures to figures.json, in config.out, and prints a table.
    """
    out, problems = Path(config.out), load_problems(config.data)[:config.eval_problems]
    if (out / "responses.jsonl").exists():
        raise UsageError(f"{out / 'responses.jsonl'} is there already; choose another --out")
    solver = load_model(config.model, config)
    critic = solver if config.critic == "trained" else load_model(config.critic, config)
    for model, tokenizer in (solver, critic):
        check_context(model, tokenizer, problems, config)
        place(model, config)
    out.mkdir(parents=True, exist_ok=True)
    with fixed_draws(solver[0], config.seed):
        turns = rollout(*solver, problems, evaluation_config(config), critic, gated=False)
    with open(out / "responses.jsonl", "w") as file:
        log_sessions(file, turns, problems)
    figures = {name: clustered(pairs) for name, pairs in outcomes(turns, problems).items() if pairs}
    write_json(out / "figures.json", figures)
    print(f"{len(problems)} problems, {config.eval_samples} sessions each; the interval is 95%, over problems")
    print_figures({"mean": {name: value for name, (value, _) in figures.items()},
                   "+-": {name: half for name, (_, half) in figures.items()}})
    print(f"every response is in {out / 'responses.jsonl'}")


# -------------------------------------------------------------------------------------------------------- comparison

ARMS = {"icrl": {}, "grpo": dict(method="grpo"), "grpo_tokens": dict(method="grpo"),
        "w_one": dict(weight="one"), "w_sequence": dict(weight="sequence"), "w_shaped": dict(weight="shaped"),
        "pooled": dict(groups="pooled"), "role_round": dict(groups="role_round"), "frozen": dict(critic="frozen"),
        "placebo": dict(critic="placebo"), "retry": dict(critic="retry"), "shuffled": dict(critic="shuffled")}


def compare(config, arms, seeds):
    """Train each arm with each seed into config.out/ARM-SEED, write config.out/compare.csv and print the comparison.

    Finished runs are not repeated, interrupted ones are resumed. The first arm is the reference. `grpo_tokens` has
    twice the samples and stops at as many generated tokens as `icrl` took with its seed. The CSV has a row for each
    evaluation; w_* are means over the steps since the one before, and the last row of a run holds the critic swap.
    """
    if "grpo_tokens" in arms and "icrl" not in arms[:arms.index("grpo_tokens")]:
        raise UsageError("--arms: name icrl before grpo_tokens, which may spend as many tokens as icrl did")
    if len({*arms}) < len(arms) or len({*seeds}) < len(seeds) or min(seeds) < 0:
        raise UsageError("--arms and --seeds: each only once, and no seed below 0")
    if config.samples == 1 and {"grpo", "role_round"} & {*arms}:
        raise UsageError("--samples 1 leaves the arms grpo and role_round nothing to compare a reward with")
    if own := [f"--{name}" for name in ("method", "critic", "weight", "groups", "seed")
               if getattr(config, name) != getattr(Config, name)]:
        raise UsageError(f"to compare, --arms and --seeds say what differs; leave out {', '.join(own)}")
    folder, rows = Path(config.out), []
    for seed, arm in itertools.product(seeds, arms):
        run = folder / f"{arm}-{seed}"
        settings = dataclasses.replace(config, out=str(run), seed=seed, **ARMS[arm])
        if arm == "grpo_tokens":
            spent = json.loads((folder / f"icrl-{seed}" / "result.json").read_text())["tokens"]
            settings = dataclasses.replace(settings, samples=2 * config.samples, token_limit=spent,
                                           steps=100 * config.steps)         # more than the tokens can last
        before = json.loads((run / "config.json").read_text()) if (run / "config.json").exists() else {}
        if other := [f"--{f.name}" for f in dataclasses.fields(Config) if f.name == "steps" or not f.metadata["resumes"]
                     if before.get(f.name, getattr(settings, f.name)) != getattr(settings, f.name)]:
            raise UsageError(f"{run} was run with another {', '.join(other)}; choose another --out")
        if not (run / "result.json").exists():
            train(settings, resume=run.exists())
        rows += [{"arm": arm, "seed": seed, **row} for row in evaluations(run)]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with open(folder / "compare.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    print_comparison(folder / "compare.csv")


def evaluations(run):
    """The evaluations of a finished run, a row each; w_* are means over the steps since the one before."""
    result, since = json.loads((run / "result.json").read_text()), []
    rows = [{"step": 0, "tokens": 0, **result["before"]}]
    for line in (run / "metrics.jsonl").read_text().splitlines():
        step = json.loads(line)
        since.append(step)
        if "heldout" in step:
            w = {name: mean(s[name] for s in since if s[name] is not None) for name in ("w_mean", "w_capped", "w_ess")}
            rows.append({"step": step["step"], "tokens": step["tokens"], **step["heldout"], **w})
            since = []
    swap = {f"{key}, {who}": value for who, figures in result["swap"].items() for key, value in figures.items()}
    rows[-1] |= {**swap, "seconds": result["seconds"]}
    return rows


def read_runs(path):
    """A CSV of `compare` as {arm: [run of each seed]}; a run is a list of rows, empty fields are nan."""
    runs = defaultdict(list)
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            row = {key: value if key == "arm" else float(value or "nan") for key, value in row.items()}
            if row["step"] == 0:
                runs[row["arm"]].append([])
            runs[row["arm"]][-1].append(row)
    return runs


def tokens_until(run, accuracy):
    """Thousands of training tokens until critique-free `accuracy`, interpolated between evaluations; inf if never."""
    if run[0]["pass@1"] >= accuracy:
        return 0.0
    for before, after in itertools.pairwise(run):
        if after["pass@1"] >= accuracy:
            share = (accuracy - before["pass@1"]) / (after["pass@1"] - before["pass@1"])
            return (before["tokens"] + share * (after["tokens"] - before["tokens"])) / 1000
    return float("inf")


# What is reported of a run (rows of its evaluations, the first before training), in two tables.
MEASURES = [{
    "critique-free": lambda run: run[-1]["pass@1"],
    "after a critique": lambda run: run[-1]["after_gated"],
    "k tokens": lambda run: run[-1]["tokens"] / 1000,
    "k tokens to 0.8": lambda run: tokens_until(run, 0.8),
    "internalised": lambda run: (run[-1]["pass@1"] - run[0]["pass@1"]) / (
        run[0]["after_gated"] - run[0]["pass@1"] or math.nan),
    "right to wrong": lambda run: run[-1]["right_to_wrong"],
}, {
    "base solver fixes": lambda run: run[-1]["fixed, trained critic, base solver"],
    "tokens per fix": lambda run: run[-1]["tokens_per_fix, trained critic, base solver"],
    "trained solver, base critic": lambda run: run[-1]["fixed, base critic, trained solver"],
    "both trained": lambda run: run[-1]["fixed, trained critic, trained solver"],
    "leaks": lambda run: run[-1]["leaks"],
    "fixed if leaked": lambda run: run[-1]["fixed_if_leaked"],
    "fixed if not": lambda run: run[-1]["fixed_if_not"],
    "w at first": lambda run: run[1]["w_mean"],
    "w at last": lambda run: run[-1]["w_mean"],
    "at the cap": lambda run: run[-1]["w_capped"],
    "ESS": lambda run: run[-1]["w_ess"],
}]


def print_comparison(path):
    """Tables of each arm's last evaluation: mean and 95% interval over seeds, differences to the first arm by seed."""
    runs = read_runs(path)
    reference, *_ = runs
    for number, measures in enumerate(MEASURES):
        titles = ["arm", *measures]
        titles[2:2] = [f"minus {reference}", "p", "detectable"] * (number == 0)
        print(f"\n| {' | '.join(titles)} |\n|{'---|' * len(titles)}")
        for arm, mine in runs.items():
            cells = [arm, *(interval(np.array([measure(run) for run in mine])) for measure in measures.values())]
            if number == 0:
                difference = np.array([run[-1]["pass@1"] - other[-1]["pass@1"]
                                       for run, other in zip(mine, runs[reference])])
                cells[2:2] = ["", "", ""] if arm == reference else [
                    interval(difference), f"{sign_flip(difference):.3f}", f"{detectable(difference):.2f}"]
            print(f"| {' | '.join(cells)} |")


@functools.cache
def t_quantile(p, n):
    """Quantile of Student's t with n - 1 degrees of freedom, from a million fixed draws: good to 1%."""
    return np.quantile(np.random.default_rng(0).standard_t(n - 1, 10 ** 6), p)


def half_interval(values):
    """Half the 95% interval of a mean, by Student's t; nan for a single value."""
    return t_quantile(0.975, len(values)) * values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else math.nan


def interval(values):
    """'mean +- half the 95% interval' as text; where values are missing it says of how many runs."""
    known = values[np.isfinite(values)]
    if len(known) == 0:
        return "-"
    digits = 0 if abs(known).max() >= 100 else 1 if abs(known).max() >= 10 else 2
    half = f" +- {half_interval(known):.{digits}f}" if len(known) > 1 else ""
    missing = f" ({len(known)} of {len(values)})" if len(known) < len(values) else ""
    return f"{known.mean():.{digits}f}{half}{missing}"


def detectable(differences):
    """The smallest true difference that as many seeds would have shown (p < 0.05) four times in five."""
    n = len(differences)
    return (t_quantile(0.975, n) + t_quantile(0.8, n)) * differences.std(ddof=1) / n ** 0.5 if n > 1 else math.nan


def sign_flip(differences):
    """Exact two-sided p-value of paired differences: how many ways of flipping their signs give as large a sum."""
    signs = np.array(list(itertools.product((1, -1), repeat=len(differences))))
    return np.mean(np.abs(signs @ differences) >= abs(differences.sum()) - 1e-12)


def plot(paths, image):
    """Draw critique-free accuracy against generated tokens, a panel for each CSV: means, and the last 95% interval."""
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise UsageError("drawing needs matplotlib: pip install matplotlib") from error
    figure, panels = pyplot.subplots(1, len(paths), figsize=(6 * len(paths), 4.5), sharey=True, squeeze=False)
    for panel, path in zip(panels[0], paths):
        for arm, runs in read_runs(path).items():
            curves = np.array([[(row["tokens"] / 1000, row["pass@1"]) for row in run[:min(map(len, runs))]]
                               for run in runs])                                # (seeds, evaluations, 2)
            x, y = curves.mean(0).T
            half = half_interval(curves[:, -1, 1])
            style = dict(color="black", lw=3) if arm == "icrl" else dict(color=f"C{[*ARMS, arm].index(arm) % 10}")
            panel.plot(x, y, "--" if arm.startswith("grpo") else "-", label=arm, **style)
            panel.errorbar(x[-1], y[-1], half, capsize=3, **style)
        panel.set(title=Path(path).stem, xlabel="thousand tokens generated in training", ylim=(0, 1))
    panels[0, 0].set_ylabel("critique-free held-out accuracy")
    lines = {line.get_label(): line for panel in panels[0] for line in panel.get_lines()
             if not line.get_label().startswith("_")}
    panels[0, -1].legend(lines.values(), lines.keys(), frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(image, dpi=130, bbox_inches="tight")
    print(f"\nthe figure is in {image}")


# --------------------------------------------------------------------------------------------------------- problems

def load_problems(path):
    """Problems from JSONL: an object a line with `problem` or `question`, and `answer`, `final_answer` or `solution`.

    The answer may be the bare answer, a list of answers, a GSM8K solution (after '####') or a MATH solution (in its
    last box). Returns dicts with at least `problem` and `answer`. A line that cannot be used is an error that names
    file and line: training on half a data set without saying so would be worse.
    """
    problems, seen = [], {}
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")    # splitlines() would cut inside strings
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {path}: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            json.dumps(row, ensure_ascii=False).encode()      # half a surrogate pair is no text
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{path}, line {number}: not JSON: {error}") from error
        row = {key.lower(): value for key, value in row.items()} if isinstance(row, dict) else {}
        problem = row.get("problem", row.get("question"))
        answer = row.get("answer", row.get("final_answer", row.get("solution")))
        answer = ", ".join(map(str, answer)) if isinstance(answer, list) else answer
        answer = str(answer) if isinstance(answer, (str, int, float)) else ""
        if "####" in answer:
            answer = answer.rpartition("####")[2]
        elif r"\boxed" in answer:
            answer = extract_answer(answer) or ""
        if not isinstance(problem, str) or not problem.strip() or not is_correct(rf"\boxed{{{answer}}}", answer):
            raise UsageError(f"{path}, line {number}: expected text under 'problem' or 'question' and an answer that "
                             "fits in a box under 'answer', 'final_answer' or 'solution'")
        if seen.setdefault(problem, number) != number:
            raise UsageError(f"{path}, line {number}: the same problem as in line {seen[problem]}")
        problems.append({**row, "problem": problem, "answer": answer.strip()})
    if not problems:
        raise UsageError(f"{path} holds no problems")
    return problems


def load_examples(config):
    """The problems of --examples, each with a worked `solution`; none by default."""
    examples = load_problems(config.examples) if config.examples else []
    for example in examples:
        if not isinstance(example.get("solution"), str):
            raise UsageError(f"{config.examples}: {example['problem'][:60]!r} has no text under 'solution'")
    return examples


# --------------------------------------------------------------------------------------------------- answer checking
#
# (To copy it, take all from here to "command line", and what it imports: cmath, itertools, math, random, re, Fraction,
# operator.)
#
# Find the box, bring both answers to one spelling, compare them part by part.
#
# Two formulas are equal if their values are: rational numbers exactly, all others to ten digits. Variables
# get the same random values on both sides, three times over. Nothing is handed to Python or sympy to run:
# the small parser at the end reads the notation below, and what it cannot read is compared as text.

# The spelling that is used below, and the others that it replaces. Signs that an answer may carry or leave out ($, %,
# degrees) are replaced by nothing, like the commands that only change the looks.
SPELLING = {spelling: form for form, spellings in {
    "": r"\left \right \big \Big \bigl \bigr \displaystyle \, \; \: \! \( \) $ \$ % \% ° ^° ^\circ ^{\circ}",
    r"\text": r"\mbox \textbf \textit \textrm \mathrm \mathbf \operatorname \boxed", "{": r"\{", "}": r"\}",
    r"\frac": r"\dfrac \tfrac \cfrac", r"\frac12": "½", r"\sqrt ": "√", r"\pi ": "π", "^2": "²", "^": "**",
    "*": r"\cdot \times × ·", "/": r"\div ÷", "-": "− –", "±": r"\pm", "∓": r"\mp", " ": r"\ ~ \quad \qquad",
    "<": r"\lt", ">": r"\gt", "≤": r"\le \leq", "≥": r"\ge \geq", "≈": r"\approx", "∈": r"\in", "∪": r"\cup",
    "∞": r"\infty", "'": r"\prime", "(": r"\langle", ")": r"\rangle", ",": "{,} &", ";": r"\\",
    "⟦": r"\begin{matrix} \begin{pmatrix} \begin{bmatrix}", "⟧": r"\end{matrix} \end{pmatrix} \end{bmatrix}",
}.items() for spelling in spellings.split()}
SPELLED = r"\\(?:begin|end)\{\w*\}|\^\{\\circ *\}|\^(?:\\circ|°)|\\! *|\\[A-Za-z]+|\{,\}|\*\*|\\?[^A-Za-z0-9]"

UNITS = "cm|km|inches|feet|miles|units|kg|grams|dollars|cents|percent\\w*|pct|degrees|hours|days|weeks|years"
GREEK = "alpha|beta|gamma|delta|epsilon|zeta|eta|theta|kappa|lambda|mu|nu|xi|rho|sigma|tau|phi|chi|psi|omega"
FUNCTIONS = {**{name: getattr(cmath, name.replace("arc", "a")) for name in (
    "sqrt exp log sin cos tan sinh cosh tanh arcsin arccos arctan".split())}, "ln": cmath.log,
    "cot": lambda z: 1 / cmath.tan(z), "sec": lambda z: 1 / cmath.cos(z), "csc": lambda z: 1 / cmath.sin(z)}
NUMBER = r"(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]{1,3}(?![0-9]))?"
VARIABLE = rf"(?:[A-Za-z∞]|\\(?i:(?:var)?(?:{GREEK}))(?![A-Za-z]))(?:_(?:\{{[^{{}}]*\}}|\w))?'*"
LABEL = rf"(?:(?:{VARIABLE}|[A-Z]+|[A-Za-z]{{3,}})(?:\([\w,\\]+\))?|\([a-z,]+\))"  # x, f(x), AB, Area, (p,q)

REWRITES = [(re.compile(pattern), new) for pattern, new in [
    (r"(?<!\\)\\\\(?=[a-z]{3})", r"\\"),                                          # \\frac, escaped twice
    (SPELLED, lambda m: SPELLING.get(m[0].replace(" ", ""), m[0])),
    (r"[, ]*(?:\\text *\{[, ]*(?:and|or)[, ]*\}|\b(?:and|or)\b)", ","),
    (rf"(?<=[0-9}}]) *((?:square |cubic )?(?:{UNITS})\b)", r"\\text{\1}"),     # 8 cm
    # 1,234 is a number, but (1,234) is a pair and 1, 234 a list.
    (r"(?<![0-9,.(\[])(?<![(\[]-)[0-9]{1,3}(?:,[0-9]{3})+(?!,?[0-9])", lambda m: m[0].replace(",", "")),
    (r" +(?![A-Za-z0-9])|(?<![A-Za-z0-9]) +", ""),                                # but 1 2 is not 12
    (rf"(?<![\\A-Za-z])(?:np\.)?(pi|{'|'.join(FUNCTIONS)})(?![A-Za-z])", r"\\\1"),           # sqrt(2)
    (r"\\(sin|cos|tan)\^(?:\{-1\}|-1)", r"\\arc\1"),
    (r"\\(frac|sqrt) ?([0-9])", r"\\\1{\2}"),                                     # \frac12
    (r"\\sqrt\[([0-9n])\]\{((?:[^{}]|\{[^{}]*\})*)\}", r"{\2}^{1/\1}"),                   # \sqrt[3]{2}
    # A mixed number, as 1\frac{1}{2} and 1 1/2, is a sum.
    (r"(?<![0-9.^_/])([0-9]+)(\\frac\{[0-9]+\}(?:[0-9]|\{[0-9]+\})| [0-9]+/[0-9]+)", r"(\1+\2)"),
]]


def extract_answer(text: str) -> str | None:
    r"""The content of the last `\boxed{...}` that is closed and not empty, or None without one.

    A box among the thoughts of a thinking model counts only if there is none behind them. Braces are paired from the
    end, in linear time, so that one never closed cannot swallow a later box.
    """
    ends, text = [], text[:text.rfind("}") + 1][-50_000:]     # no answer is longer, and no reward may take seconds
    for brace in reversed(list(re.finditer(r"\\?\\(?:boxed|fbox)\s*\{|\\[\\{}]|[{}]", text))):
        if brace[0] == "}":
            ends.append(brace.start())
        elif brace[0].endswith("{") and brace[0] != r"\{" and ends:
            start, end = brace.end(), ends.pop()
            if brace[0] != "{" and text[start:end].strip():
                return text[start:end].strip()
    return None


def is_correct(response: str, answer: str) -> bool:
    r"""Say whether the boxed answer of `response` is equal to the gold `answer`; no box is wrong.

    Rational numbers, decimals among them, must be equal exactly, other values to a relative 1e-10. Only where
    the gold answer is a decimal of three or more digits does a value count that rounds to it. A list or a set
    may come in any order; a tuple, an interval or a matrix may not. A name (x = 5), a unit or the base of a
    number (204_5) may be missing on one side, but two that differ are wrong. Words ignore case.
    """
    gold = answer.strip()
    if len(re.findall(r"\\boxed", gold)) == 1:                   # a gold answer may come in its own box
        gold = extract_answer(gold) or gold
    boxed = extract_answer(response)
    if boxed is None or boxed == gold or max(len(boxed), len(gold)) > 400:    # too long to be worth parsing
        return boxed == gold
    return _same(_normalise(gold), _normalise(boxed))


def _normalise(text):
    text = " ".join(text.split())
    for pattern, new in REWRITES:
        text = pattern.sub(new, text)
    return re.sub(r"(?<=[0-9}])≈.*", "", text).strip(" ,;:").rstrip(".")       # 1/3 \approx 0.33 is 1/3


def _split(text, separators):
    """Split `text` at the separators that stand outside all brackets."""
    depths = itertools.accumulate((char in "([{⟦") - (char in ")]}⟧") for char in text)
    cuts = [i for i, depth in enumerate(depths) if depth == 0 and text[i] in separators]
    return [text[start + 1:end] for start, end in itertools.pairwise([-1, *cuts, len(text)])]


def _items(text):
    """The answers in a list, a set or a union; a plus-minus makes two."""
    if text[:1] == "{" and _split(text, "}") == [text[:-1], ""]:
        text = text[1:-1]
    return [item.strip().translate({ord("±"): sign, ord("∓"): "+-"[sign == "+"]})
            for item in _split(text, ",;∪") for sign in ("+-" if "±" in item else "+")]


def _same(gold, pred):
    """Compare two answers, or two parts of answers, by what they are made of."""
    golds, preds = _items(gold), _items(pred)
    if gold == pred or len(golds) != len(preds):
        return gold == pred
    if len(golds) > 1:
        return all(sum(_same(item, gold) for gold in golds) == sum(_same(item, pred) for pred in preds)
                   for item in golds)
    # k = 2 + 3 = 5 says k = 5, and an inequality is an interval.
    gold, pred = (_as_interval(re.sub("=.*=", "=", text)) for text in (golds[0], preds[0]))
    if "∈" in gold and "∈" in pred:
        return all(map(_same, gold.split("∈"), pred.split("∈")))
    if "=" in gold and "=" in pred:
        return _same_value(gold, pred) or all(map(_same, gold.split("="), pred.split("=")))
    bare = [re.sub(rf"^(?:{LABEL})?[=≈∈]", "", text) for text in (gold, pred)]
    if bare != [gold, pred]:
        return _same(*bare)
    golds, preds = _split(gold[1:-1], ",;"), _split(pred[1:-1], ",;")
    if len(golds) > 1:                                        # a tuple, an interval or a matrix
        form, pred_form = ([text[:1], text[-1:], text.count(";")] for text in (gold, pred))
        return form == pred_form and len(golds) == len(preds) and all(map(_same, golds, preds))
    (gold, gold_unit), (pred, pred_unit) = _take_unit(gold), _take_unit(pred)
    return "=" not in gold + pred and gold_unit in ("", pred_unit or gold_unit) and _same_value(gold, pred)


def _as_interval(text):
    """3<x≤4 is x∈(3,4], and 5≤x is x∈[5,∞)."""
    parts = re.split("([<>≤≥])", text)
    if ">" in parts or "≥" in parts:
        parts = [part.translate({ord(">"): "<", ord("≥"): "≤"}) for part in reversed(parts)]
    if len(parts) == 3:
        parts = ["-∞", "<", *parts] if re.fullmatch(VARIABLE, parts[0]) else [*parts, "<", "∞"]
    if len(parts) != 5 or not re.fullmatch(VARIABLE, parts[2]):
        return text
    low, opening, name, closing, high = parts
    return f"{name}∈{'(['[opening == '≤']}{low},{high}{')]'[closing == '≤']}"


def _take_unit(text):
    r"""12\text{cm} is ("12", "cm"). The base of a number, as in 204_5, counts as its unit."""
    unit = r"\\text\{(?![ei]\})[A-Za-z ./]+\}(?:\^\{?-?[0-9]\}?)?"
    end = re.search(rf"(?<=[A-Za-z0-9)}}\]])(?:{unit})+$|(?<=[0-9])_\{{?[0-9]+\}}?$|$", text).start()
    return text[:end], re.sub(r"\\text|[ {}]|s\}", "", text[end:])


def _same_value(gold, pred):
    gold, pred = (re.sub(r"\\text\{([^{}]*)\}", r"\1", text) for text in (gold, pred))
    if re.fullmatch(r"\(?[A-Za-z]\)?|(?i:no)|[A-Za-z ]{3,}", gold):   # the letter of a choice, or words
        return gold.strip("()").casefold() == pred.strip("()").casefold()
    try:
        golds, preds = ([_value(text, trial) for trial in range(3)] for text in (gold, pred))
        if "=" in gold:                                       # left minus right, up to a factor
            golds, preds = ([value / values[0] for value in values] for values in (golds, preds))
        decimal = re.fullmatch(r"-?(?=[0.]*[1-9](?:\.?[0-9]){2})[0-9]*\.([0-9]+)(e[-+]?[0-9]+)?", gold)
        tolerance = Fraction(f"0.{'0' * len(decimal[1])}5{decimal[2] or ''}") if decimal else 0
        return all(abs(x - y) <= max(tolerance, 0 if isinstance(x - y, Fraction) else 1e-10 * abs(x))
                   for x, y in zip(golds, preds))
    except (ValueError, ArithmeticError, RecursionError):     # one of the two has no value
        return gold == pred


def _power(base, exponent):
    if isinstance(base, Fraction) and isinstance(exponent, Fraction) and exponent.denominator == 1:
        # 9^{9^9} would fill the memory. "Not a number" is equal to nothing.
        return base ** (exponent if len(str(base)) * abs(exponent) <= 1000 else math.nan)
    return (complex(base) + 0) ** complex(exponent)           # + 0 turns an imaginary part of -0 into 0


# How strongly an operator binds to its left and its right. The space is the multiplication in 2x.
OPERATORS = {"=": (1, 1, sub), "+": (2, 2, add), "-": (2, 2, sub), "*": (3, 4, mul), "/": (3, 4, truediv),
             " ": (4, 4, mul), "^": (6, 5, _power)}
CLOSING = {"(": ")", "[": "]", "{": "}"}
CONSTANTS = {r"\pi": math.pi, "e": math.e, "i": 1j}


def _value(text, trial):
    """Evaluate a formula by precedence climbing; a variable's value depends on its name and `trial` only."""
    rest = ["", *reversed(re.findall(rf"{NUMBER}|{VARIABLE}|\\[A-Za-z]+|\S", text))]    # the next is last

    def formula(level):
        value = operand()
        while True:
            # 2x is a product, but in \sin x \cos x the next function ends the argument.
            implicit = re.match(r"[A-Za-z∞({[\\]", rest[-1]) and (level != 3 or rest[-1][1:] not in FUNCTIONS)
            left, right, function = OPERATORS.get(" " if implicit else rest[-1], (0, 0, None))
            if left <= level:
                return value
            if not implicit:
                rest.pop()
            value = function(value, formula(right))

    def operand():
        token = rest.pop()
        if token in ("+", "-"):
            return formula(5) if token == "+" else -formula(5)
        if token in CLOSING:
            value = formula(0)
            if rest.pop() != CLOSING[token]:
                raise ValueError
            return value
        if token == r"\frac":
            return operand() / operand()
        if token[1:] in FUNCTIONS:
            base = rest.pop() and operand() if rest[-1] == "_" else math.e                # \log_2 x
            exponent = rest.pop() and formula(5) if rest[-1] == "^" else Fraction(1)    # \sin^2 x
            argument = operand() if rest[-1] in CLOSING else formula(3)
            return _power(FUNCTIONS[token[1:]](complex(argument) + 0) / cmath.log(complex(base)), exponent)   # ln e = 1
        if token in CONSTANTS:
            return CONSTANTS[token]
        if re.fullmatch(VARIABLE, token):
            draw = random.Random(f"{re.sub('[{}]', '', token)} {trial}")
            return cmath.rect(draw.uniform(1, 4), draw.uniform(0.1, 0.3))
        return Fraction(token)

    value = formula(0)
    if rest != [""]:
        raise ValueError
    return value


# ----------------------------------------------------------------------------------------------------- command line

TITLES = {"pass@1": "critique-free accuracy, sampled", "greedy": "critique-free accuracy, greedy",
          "pass@k": "critique-free, any of k samples right",
          "after_gated": "accuracy after one critique of wrong attempts",
          "after_ungated": "accuracy after one critique, right ones too",
          "wrong_to_right": "critic success (wrong attempts put right)",
          "fixed": "  of the base solver's wrong attempts", "tokens_per_fix": "  critique tokens for each of these",
          "right_to_wrong": "right attempts put wrong by a critique", "leaks": "critiques that state the answer",
          "attempt_tokens": "tokens per attempt", "critique_tokens": "tokens per critique",
          "truncated": "cut off at the length limit"}


def print_figures(columns):
    """Columns of figures by name, under their headings."""
    print(f"\n{'':50}", *(f"{heading:>7}" for heading in columns))
    kinds = {name: f"critique-free accuracy: {name[7:]}" for figures in columns.values() for name in figures
             if name.startswith("pass@1 ")}
    for name, title in {**TITLES, **kinds, "train": "critique-free accuracy on training problems"}.items():
        if values := [figures[name] for figures in columns.values() if name in figures]:
            digits = 1 if "tokens" in name else 3
            print(f"{title:50}", *(f"{'-' if value is None else format(value, f'.{digits}f'):>7}" for value in values))


def print_result(result):
    columns = {when: {**result[when], "train": result[f"{when}_train"],
                      **result["swap"][f"{critic} critic, base solver"]}
               for when, critic in (("before", "base"), ("after", "trained"))}
    print_figures(columns)
    print(f"{result['tokens']:,} tokens generated in {result['step']} steps, {result['seconds']:.0f} seconds in all; "
          f"the model is in {result['model']}")


EVAL_FLAGS = ("preset model data examples out seed device critic max_response max_critique temperature thinking "
              "sample_batch bf16 eval_problems eval_samples").split()


def parse(argv):
    """The command line as (config, options): what is a setting of a run, and what is not."""
    parser = argparse.ArgumentParser(prog="icrl.py", description=__doc__.split("\n\n")[0], allow_abbrev=False,
                                     usage="icrl.py [train | compare | plot CSV ... | eval] [--flag value ...]")
    argv = list(sys.argv[1:] if argv is None else argv)
    command = argv.pop(0) if argv and argv[0] in ("train", "compare", "plot", "eval") else "train"
    own = parser.add_argument_group("what to do: train one run; compare several arms with several seeds (compare "
                                    "--help); draw what was compared; or evaluate --model on --data")
    if command == "train":
        own.add_argument("--resume", metavar="RUN", help="continue the run in this folder, with its own settings")
    if command == "compare":
        own.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM",
                         help=f"the first is the reference [{' '.join(ARMS)}]")
        own.add_argument("--seeds", nargs="+", type=int, default=list(range(8)), metavar="N", help="[0 ... 7]")
    if command == "plot":
        parser.add_argument("csv", nargs="+")
    settings = parser.add_argument_group("settings of a run")
    for f in dataclasses.fields(Config):
        if command == "plot" or command == "eval" and f.name not in EVAL_FLAGS:
            continue
        kind = {"type": f.type, "metavar": f.type.__name__}
        if f.type is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        elif f.metadata["choices"] and (command, f.name) != ("eval", "critic"):
            kind = {"choices": f.metadata["choices"]}
        settings.add_argument(f"--{f.name}", *["--k"] * (f.name == "eval_samples"), default=argparse.SUPPRESS, **kind,
                              help=f"{f.metadata['help']} [{f.default}]".replace(f"{HERE}/", ""))
    options = parser.parse_args(argv, argparse.Namespace(command=command, resume=None))
    given = {f.name: vars(options)[f.name] for f in dataclasses.fields(Config) if f.name in options}
    if options.resume:
        if fixed := [f"--{f.name}" for f in dataclasses.fields(Config)
                     if f.name in given and not f.metadata["resumes"]]:
            raise UsageError(f"--resume keeps the settings of the run; leave out {', '.join(fixed)}")
        try:
            saved = json.loads((Path(options.resume) / "config.json").read_text())
            config = Config(**{**saved, **given, "out": options.resume})
            check(config)
        except (OSError, ValueError, TypeError) as error:
            raise UsageError(f"cannot resume {options.resume}: {error}") from error
    else:
        if command != "eval" and ("data" in given) != ("heldout" in given):
            raise UsageError("give both --data and --heldout; the one that is missing would be the toy's arithmetic")
        config = Config(**{**PRESETS[given.get("preset", "tiny")], **given})
        config.out = config.out or (f"runs/compare-{config.preset}" if command == "compare"
                                    else time.strftime("runs/%Y%m%d-%H%M%S"))
        if command == "eval":
            config.data = given.get("data", config.heldout)
            config.eval_problems = given.get("eval_problems", sys.maxsize)
        check(config, command)
    return config, options


def check(config, command=None):
    """Refuse settings that are out of range; for a command also those that would silently do nothing.

    (The arms of `compare` may hold some of these: all have the same settings but for what an arm is about.)
    """
    for f in dataclasses.fields(Config):
        low, choices, value = f.metadata["low"], f.metadata["choices"], getattr(config, f.name)
        known = not choices or value in choices
        if (command, f.name) == ("eval", "critic"):           # the model itself, or another by its name
            known = value not in choices[1:]
        if not known or not isinstance(value, (float, int) if f.type is float else f.type):
            raise UsageError(f"--{f.name} cannot be {value!r}")
        if low is not None and not value >= low:
            raise UsageError(f"--{f.name} must be at least {low}, not {value}")
    if config.method == "icrl" and config.rounds == 1:
        raise UsageError("--rounds 1 leaves no room for a critique; that is --method grpo")
    if config.samples == 1 and (config.method == "grpo" or config.groups == "role_round"):
        raise UsageError("--samples 1 leaves nothing to compare a reward with, and nothing would be learnt")
    for reason, applies, names in [
            ("--method grpo has no critiques", config.method == "grpo", "critic weight groups w_max rounds"),
            ("--critic retry has no critiques", config.critic == "retry", "weight w_max"),
            (f"--weight {config.weight} has no cap", config.weight in ("one", "shaped"), "w_max")]:
        idle = [f"--{name}" for name in names.split() if getattr(config, name) != getattr(Config, name)]
        if command and applies and idle:
            raise UsageError(f"{reason}; leave out {', '.join(idle)}")


def main(argv=None):
    """The command line; returns the exit code: 0, 2 with one sentence for what the user can mend, 130 on Ctrl-C."""
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    config = None
    try:
        config, options = parse(argv)
        if options.command == "plot":
            try:
                for path in options.csv:
                    print_comparison(path)
            except (LookupError, TypeError, ValueError) as error:
                raise UsageError(f"{path} is not a table that compare has written: {error!r}") from error
            plot(options.csv, Path(options.csv[0]).with_suffix(".png"))
        elif options.command == "compare":
            compare(config, options.arms, options.seeds)
        elif options.command == "eval":
            evaluate_file(config)
        else:
            print_result(train(config, resume=options.resume is not None))
        return 0
    except UsageError as error:                               # to go on would end in the same way
        message, code, config = str(error), 2, None
    except OSError as error:
        message, code = str(error), 2
    except torch.OutOfMemoryError:
        message, code = ("out of GPU memory: lower --sample_batch (sampling) or --micro_tokens (update), or add "
                         "--checkpointing or --optimizer_on cpu"), 2
    except KeyboardInterrupt:
        message, code = "interrupted", 130
    if config and options.command == "train" and checkpoints(config.out):
        message += f"; {checkpoints(config.out)[-1]} is saved: continue with  python icrl.py --resume {config.out}"
    print(f"icrl.py: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
