#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""ICRL in one file: a language model learns from its own critique until it no longer needs it (arXiv 2605.15224).

One model plays two roles. Only the prompt tells them apart. The solver attempts a problem q. If the attempt fails, the
critic (the same weights) writes a critique c of it. The solver then tries again with c in its prompt. This second
attempt y is called a revision. One policy-gradient step then trains both roles. Equations are numbered as in the paper.

    Eq. 3   A critique earns 1 if the revision is right. Otherwise it earns what the revision gained over the attempt.
    Eq. 4   A revision is trained as if the solver had seen q alone. Each of its tokens y_t has the weight
            w_t = pi_old(y_t | q, y_<t) / pi_old(y_t | q, c, y_<t), at most 2. If only c made a token likely, it counts
            little. pi_old is the model that sampled.
    Eq. 5   An advantage A is a reward, normalised among the outputs of the same role on the same problem.
    Eq. 6   J = mean of w_t min(rho_t A, clip(rho_t) A). Here rho_t = pi / pi_old, both without c in the prompt.

With --method grpo there is no critic. What is left is GRPO without a KL term.

    python icrl.py                                                     trains the small model that comes with this file
    python icrl.py --preset qwen3 --data train.jsonl --heldout test.jsonl             trains Qwen3-4B on your problems

Read from top to bottom: settings, equations, prompts, sampling, sessions, update. That is the whole method. Training,
evaluation, the problem files, the answer checker and the command line follow. The word "Paper:" marks where this file
departs from the paper, or what it does where the paper leaves a choice open.
"""
import cmath
import dataclasses
import itertools
import json
import math
import random
import re
import sys
import time
from fractions import Fraction
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache, GenerationConfig, logging
from transformers.hf_argparser import HfArg, HfArgumentParser

HERE = Path(__file__).resolve().parent


class UsageError(ValueError):
    """The user asked for something that cannot be done. The message says what is wrong and where."""


# ---------------------------------------------------------------------------------------------------------- settings

@dataclasses.dataclass
class Config:
    """All settings of a run. Each field is also a command-line flag."""
    preset: Literal["tiny", "qwen3"] = HfArg(default="tiny", help="defaults for the small model, or for Qwen3")
    resume: str = HfArg(default="", help="continue the run in this folder; its settings are the defaults")
    out: str = HfArg(default="", help="folder of the run; empty: a new folder in runs/; not for --resume")
    model: str = HfArg(default=f"{HERE}/math_data/arithmetic/model", help="Hugging Face model: a name or a folder")
    data: str = HfArg(default=f"{HERE}/math_data/arithmetic/train.jsonl", help="training problems (JSONL)")
    heldout: str = HfArg(default=f"{HERE}/math_data/arithmetic/heldout.jsonl", help="evaluation problems (JSONL)")
    device: Literal["cuda", "cpu", "mps"] = HfArg(default="cuda" if torch.cuda.is_available() else "cpu")
    seed: int = HfArg(default=0, help="seed of all random draws")
    # sessions
    method: Literal["icrl", "grpo"] = HfArg(default="icrl", help="grpo: one attempt per session and no critic")
    queries: int = HfArg(default=16, help="problems (queries) per step")
    samples: int = HfArg(default=8, help="sessions per problem (G)")
    rounds: int = HfArg(default=2, help="attempts per session at most (K)")
    max_response: int = HfArg(default=48, help="tokens per attempt at most")
    max_critique: int = HfArg(default=48, help="tokens per critique at most")
    temperature: float = HfArg(default=1.0, help="used for sampling and for every log-prob")
    # update
    steps: int = HfArg(default=50, help="training steps; 0: only evaluate --model on --heldout")
    inner_steps: int = HfArg(default=1, help="optimiser steps per rollout; with 1, nothing is clipped")
    lr: float = HfArg(default=3e-4, help="learning rate (constant)")
    # memory
    sample_batch: int = HfArg(default=0, help="completions sampled at a time; 0: as many as fit (on a CPU, 256)")
    micro_tokens: int = HfArg(default=1024, help="tokens per forward pass of the update")
    bf16: bool = HfArg(default=False, help="compute in bfloat16; keep float32 weights and AdamW in CPU memory")
    checkpointing: bool = HfArg(default=False, help="recompute activations in the backward pass to save memory")
    # evaluation
    eval_every: int = HfArg(default=25, help="steps between evaluations; 0: only before and after training")
    eval_problems: int = HfArg(default=240, help="held-out problems per evaluation at most")
    eval_samples: int = HfArg(default=1, help="sessions per problem in an evaluation (k)")
    save_every: int = HfArg(default=10, help="steps between checkpoints; 0: only at the end")


# Paper: these are its settings, except for the lengths (2048 and 1024 there) and the steps (300 there). With the values
# here, a run takes one night. What is not named here is as in Config.
PRESETS = {"tiny": {}, "qwen3": dict(
    model="Qwen/Qwen3-4B-Instruct-2507", lr=1e-6, steps=100, max_response=1024, max_critique=512, bf16=True,
    checkpointing=True, micro_tokens=4096, eval_every=20, eval_problems=128)}
MAY_BE_0 = "seed steps lr sample_batch eval_every save_every".split()


def check(config):
    """Raise UsageError for settings that are out of range, or with which nothing could be learnt."""
    for name, value in vars(config).items():
        if type(value) in (int, float) and not (0 <= value <= 2**32 and (value > 0 or name in MAY_BE_0)):
            raise UsageError(f"--{name} {value} is out of range: it must be positive{' or 0' * (name in MAY_BE_0)}")
    if config.steps and (config.samples == 1 or config.method == "icrl" and config.rounds == 1):
        raise UsageError("training needs --samples 2 or more and, with a critic, --rounds 2 or more")
    if config.steps and (config.data == Config.data) != (config.heldout == Config.heldout):
        raise UsageError("--data and --heldout belong together: give both, or none for the problems of this project")
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch finds no GPU; leave this flag out, or install torch with CUDA")


# ----------------------------------------------------------------------------------------------------- the equations

def critic_reward(before, after):
    """Eq. 3: the reward of a critique, from the rewards (floats) of the attempts before and after it.

    If rewards are 0 or 1 and only failures are criticised, this is simply `after`.
    """
    return 1.0 if after == 1.0 else after - before


def calibration_ratio(logp_free, logp_guided, w_max=2.0):
    """Eq. 4: the weight w_t = pi_old(y_t | q, y_<t) / pi_old(y_t | q, c, y_<t), at most w_max. It has no gradient.

    logp_free, logp_guided: (B, T) float log-probs of the same revisions. "Free" means without the critique in the
    prompt, "guided" means with it. Both come from the model weights that sampled. Returns (B, T). Only for revisions:
    every other token has weight 1.
    """
    return (logp_free - logp_guided).detach().exp().clamp(max=w_max)


def role_advantages(rewards, groups, delta=1e-6):
    """Eq. 5: A_i = (r_i - mean) / (std + delta), with the mean and std of the group that i belongs to.

    rewards: B floats. groups: B keys, for ICRL (problem, role). Returns (B,) float32.
    Paper: the kind of std is left open; here it divides by n - 1. A group of one, or of equal rewards, gives exactly
    0. Without this rule rounding noise, divided by delta, would look like a signal.
    """
    rewards = torch.as_tensor(rewards, dtype=torch.float32)
    advantages = torch.zeros_like(rewards)
    for key in set(groups):
        members = [i for i, group in enumerate(groups) if group == key]
        r = rewards[members]
        if r.min() < r.max():
            advantages[members] = (r - r.mean()) / (r.std() + delta)
    return advantages


def icrl_objective(logp, logp_old, advantages, weights, mask, clip_low=0.2, clip_high=0.28):
    """Eq. 6, to be maximised: J = mean of w_t min(rho_t A, clip(rho_t, 1 - clip_low, 1 + clip_high) A).

    logp: (B, T) float log-probs by the current weights. logp_old: by the weights that sampled. Both are without the
    critique in the prompt. advantages: (B,). weights: (B, T), w_t of Eq. 4 for revisions and 1 otherwise. mask: (B, T),
    1 on real tokens and 0 on padding. Returns a scalar.
    Paper: Eq. 6 has one expectation over samples and tokens. Here the mean is over the tokens of each sample, and then
    over the B samples. This, and the two bounds of the clipping, are those of the authors' code.
    """
    rho = (logp - logp_old.detach()).exp()
    A = advantages[:, None]
    # The weight stands outside the min. Inside, it would change which tokens are clipped.
    J = weights.detach() * torch.min(rho * A, rho.clamp(1 - clip_low, 1 + clip_high) * A)
    return ((J * mask).sum(1) / mask.sum(1).clamp(min=1)).mean()


# ----------------------------------------------------------------------------------------------------------- prompts

SOLVER_SYSTEM = r"Solve the problem step by step and put the final answer in \boxed{}."
CRITIC_SYSTEM = (
    "You see a problem and a failed attempt. Name the most valuable mistake and give short, reusable tips for a fresh "
    "attempt. Never state the final answer. Write the tips between <critique> and </critique>.")


def solver_messages(problem, critique=""):
    """Chat messages that ask for an attempt at `problem`, with the latest critique if there is one.

    A revision is a fresh attempt. Its prompt holds no failed attempt, no older critique and no reward. Without a
    critique (empty or None) these are the messages of a first attempt. Revisions are trained under those too.
    Paper: an empty critique is not mentioned. Here the revision is then a plain second attempt.
    """
    tips = f"\n\nTips from the critic of an earlier attempt:\n{critique}" if critique else ""
    return [{"role": "system", "content": SOLVER_SYSTEM}, {"role": "user", "content": problem + tips}]


def critic_messages(problem, attempt):
    """Chat messages that ask for a critique of a failed attempt. The right answer is not given to the critic."""
    return [{"role": "system", "content": CRITIC_SYSTEM},
            {"role": "user", "content": f"Problem:\n{problem}\n\nFailed attempt:\n{attempt}"}]


def extract_critique(text):
    """The text in the last <critique> tags, or all of it if there are no tags. Thoughts up to </think> are left out."""
    text = text.rpartition("</think>")[2].partition("<think>")[0]
    return text.rpartition("<critique>")[2].partition("</critique>")[0].strip()


def encode_chat(tokenizer, messages):
    """Token ids (a list) of a chat prompt, from a system and a user message. It ends where the assistant begins.

    An attempt or a critique is model output that stands in a user's turn. So every control token, such as <|im_end|>,
    is removed from it first: it could end the turn. Removing one can put another together, hence the loop. A model that
    can switch its thinking off, such as Qwen3, does so.
    """
    control = "|".join(re.escape(token.content) for token in tokenizer.added_tokens_decoder.values()
                       if token.special or (token.content.strip() and token.content in tokenizer.get_chat_template()))

    def clean(text):
        while control and re.search(control, text):
            text = re.sub(control, "", text)
        return text

    messages = [{**message, "content": clean(message["content"])} for message in messages]
    system, user = (message["content"] for message in messages)
    options = dict(tokenize=False, add_generation_prompt=True, enable_thinking=False)
    try:
        text = tokenizer.apply_chat_template(messages, **options)
    except Exception:                               # some templates refuse a system turn, each with its own error
        text = ""
    if system not in text:                          # and some drop it without an error
        text = tokenizer.apply_chat_template([{"role": "user", "content": f"{system}\n\n{user}"}], **options)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


# ------------------------------------------------------------------------------------------- sampling and log-probs

def stop_tokens(model, tokenizer):
    """The set of token ids that end a completion.

    These are the EOS ids of the tokenizer and of the checkpoint, and the token that ends the assistant's turn in the
    chat template. The last one differs from EOS in some base models: without it, answers would never end.
    """
    eos = model.generation_config.eos_token_id
    chat = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "zebra"}]
    after = tokenizer.apply_chat_template(chat, tokenize=False).rpartition("zebra")[2]
    ends = [i for i, t in tokenizer.added_tokens_decoder.items() if t.special and after.startswith(t.content)]
    return {*ends, tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])} - {None}


def rows_that_fit(model, tokens):
    """How many rows of `tokens` tokens can be sampled at once: as many as fill 70% of the free memory of the GPU.

    A row needs its key-value cache (Qwen3-4B in bfloat16: 147,456 bytes a token) and about four copies of its logits
    in float32. On other devices it is always 256.
    """
    if model.device.type != "cuda":
        return 256
    torch.cuda.empty_cache()
    config = model.config.get_text_config()
    heads = config.to_dict().get("num_key_value_heads") or config.num_attention_heads
    size = config.to_dict().get("head_dim") or config.hidden_size // config.num_attention_heads
    cache = 2 * config.num_hidden_layers * heads * size * model.dtype.itemsize        # keys and values of a token
    return max(1, int(0.7 * torch.cuda.mem_get_info(model.device)[0] / (tokens * cache + 16 * config.vocab_size)))


@torch.no_grad()
def sample(model, tokenizer, prompts, max_new_tokens, temperature=1.0, chunk=16):
    """Sample one completion for each prompt with Hugging Face `generate`. Temperature 0 is greedy.

    prompts: lists of token ids, none empty. Returns (completions, truncated). Completions are lists of token ids up to
    and including the first stop token. truncated: a bool for each, True if it has no stop token within max_new_tokens.

    All prompts form one batch. `generate` makes `chunk` tokens per call and continues from its cache. Between two calls
    the finished rows leave the batch, so that short completions do not wait for long ones.
    """
    stops = stop_tokens(model, tokenizer)
    pad, width = min(stops), max(map(len, prompts))           # padding is masked, so any id will do
    ids = torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts], device=model.device)      # (B, width)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    # `generate` follows the generation config of the checkpoint (Qwen3: top_k 20). The policy that samples
    # would not be the policy that is scored. So that config is replaced, also in the model that is saved.
    how = dict(do_sample=True, temperature=temperature, top_k=0, top_p=1.0) if temperature else dict(do_sample=False)
    model.generation_config = GenerationConfig(**how, eos_token_id=sorted(stops), pad_token_id=pad)
    model.eval()
    cache, live, completions = DynamicCache(config=model.config), list(range(len(prompts))), [[]] * len(prompts)
    while live:
        tokens_left = width + max_new_tokens - ids.shape[1]
        # `cache` is called past_key_values in transformers before 5.24.
        ids = model.generate(ids, attention_mask=mask, cache=cache, max_new_tokens=min(chunk, tokens_left))
        mask = torch.nn.functional.pad(mask, (0, ids.shape[1] - mask.shape[1]), value=1)
        unfinished = []
        for row, tokens in enumerate(ids[:, width:].tolist()):
            end = next((t + 1 for t, token in enumerate(tokens) if token in stops), None)
            completions[live[row]] = tokens[:end]             # all of them if there is no stop token yet
            if end is None and len(tokens) < max_new_tokens:
                unfinished.append(row)
        keep = torch.tensor(unfinished, dtype=torch.long, device=ids.device)
        live, ids, mask = [live[row] for row in unfinished], ids[keep], mask[keep]
        cache.reorder_cache(keep)                             # keeps the rows that stay
    return completions, [completion[-1] not in stops for completion in completions]


def completion_logprobs(model, prompts, completions, temperature=1.0):
    """log pi(y_t | prompt, y_<t) of every completion token, at `temperature`. Differentiable.

    prompts, completions: B lists of token ids, none empty. Pass the ids that were sampled, not re-tokenised text.
    Returns (logp, mask), both (B, T) float32, where T is the length of the longest completion. On padding both are 0.

    No attention mask is needed: the padding is on the right, and causal attention does not look there.
    """
    rows = [torch.tensor([*prompt, *completion]) for prompt, completion in zip(prompts, completions)]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(model.device)                # (B, L)
    first = torch.tensor([[len(prompt)] for prompt in prompts], device=ids.device)                # (B, 1)
    length = torch.tensor([[len(completion)] for completion in completions], device=ids.device)
    position = torch.arange(ids.shape[1], device=ids.device)
    predicts = (position >= first - 1) & (position < first - 1 + length)     # (B, L): logits at t - 1 predict token t
    mask = position[:int(length.max())] < length                             # (B, T)

    # Evaluation mode, because dropout would change the log-probs. Only the layers that recompute their activations need
    # training mode: Hugging Face recomputes in no other mode.
    for module in model.modules():
        module.training = getattr(module, "gradient_checkpointing", False)
    # The output layer makes 151,936 numbers for each position of Qwen3. That is the memory peak of the update. This
    # hook passes it only the positions that predict a completion token: (B, L, H) becomes (N, H), in any architecture.
    with model.get_output_embeddings().register_forward_pre_hook(lambda head, inputs: (inputs[0][predicts],)):
        logits = model(input_ids=ids, use_cache=False).logits.float() / temperature               # (N, vocabulary)
    # The roll puts token t at position t - 1, beside the logits that predict it.
    logp = -torch.nn.functional.cross_entropy(logits, ids.roll(-1, dims=1)[predicts], reduction="none")
    # `predicts` and `mask` mark the same tokens in the same order, row by row.
    return torch.zeros(mask.shape, device=ids.device).masked_scatter(mask, logp), mask.float()


# -------------------------------------------------------------------------------------------- sessions (Algorithm 1)

@dataclasses.dataclass
class Turn:
    """One generation: a first attempt, a critique or a revision."""
    query: int              # number of the problem in the batch
    session: int            # number of the session in the batch
    part: str               # "first", "critique" or "revision"
    prompt: list            # token ids under which it was sampled
    free_prompt: list       # token ids under which it is trained; for a revision, the prompt without the critique
    completion: list        # the token ids that were sampled
    text: str
    truncated: bool         # cut off at the length limit
    reward: float = 0.0
    advantage: float = 0.0

    @property
    def group(self):
        """The group of Eq. 5. Revisions are compared with first attempts, because both are trained under q alone."""
        return (self.query, "critic" if self.part == "critique" else "solver")


def outcome_reward(text, problem, truncated):
    """The reward of an attempt, in [0, 1]; 1 means solved. An attempt that was cut off earns 0."""
    return 0.0 if truncated else float(is_correct(text, problem["answer"]))


def generate_turns(model, tokenizer, part, sessions, chats, config):
    """Sample the next turn of each session: a list of Turns, still without rewards.

    sessions: their numbers in the batch. chats: the messages that each of them is prompted with.
    """
    prompts = [encode_chat(tokenizer, chat) for chat in chats]
    limit = config.max_critique if part == "critique" else config.max_response
    rows = config.sample_batch or rows_that_fit(model, max(map(len, prompts), default=0) + limit)
    sampled = []                                              # pairs: a completion, and whether it is truncated
    while len(sampled) < len(prompts):
        batch = prompts[len(sampled):len(sampled) + rows]
        try:
            sampled += zip(*sample(model, tokenizer, batch, limit, config.temperature))
        except torch.OutOfMemoryError:
            config.sample_batch = rows = len(batch) // 2      # from now on; other random draws, but the run goes on
            if rows == 0:
                raise
            tqdm.write(f"out of memory while sampling {len(batch)} rows; going on with {rows} at a time")
    texts = tokenizer.batch_decode([completion for completion, _ in sampled], skip_special_tokens=True)
    # Session s works on problem s // G. For a revision, `rollout` then replaces the second prompt, free_prompt.
    return [Turn(s // config.samples, s, part, prompt, prompt, completion, text, truncated)
            for s, prompt, (completion, truncated), text in zip(sessions, prompts, sampled, texts)]


def rollout(model, tokenizer, problems, config, critic=None, gated=True):
    """Algorithm 1: G sessions (config.samples) of at most K attempts (config.rounds) on each problem.

    problems: dicts with "problem" and "answer". critic: another model that writes the critiques; by default `model`.
    With gated=False, right attempts are criticised too. Returns a list of Turns with their rewards, session by session.
    """
    problem_of = [problem for problem in problems for _ in range(config.samples)]      # of each session
    sessions = [[] for _ in problem_of]                                                # the turns of each session
    for number in range(1 if config.method == "grpo" else config.rounds):
        # The sessions that go on: not begun, not solved, or (with gated=False) all.
        live = [s for s, turns in enumerate(sessions) if not turns or turns[-1].reward != 1.0 or not gated]
        part, critiques = ("first" if number == 0 else "revision"), [None] * len(live)
        if part == "revision":
            chats = [critic_messages(problem_of[s]["problem"], sessions[s][-1].text) for s in live]
            critiques = generate_turns(critic or model, tokenizer, "critique", live, chats, config)
        tips = [critique and extract_critique(critique.text) for critique in critiques]
        chats = [solver_messages(problem_of[s]["problem"], tip) for s, tip in zip(live, tips)]
        attempts = generate_turns(model, tokenizer, part, live, chats, config)
        for s, critique, attempt in zip(live, critiques, attempts):
            attempt.reward = outcome_reward(attempt.text, problem_of[s], attempt.truncated)
            if part == "revision":
                critique.reward = critic_reward(sessions[s][-1].reward, attempt.reward)
                attempt.free_prompt = sessions[s][0].prompt   # the problem alone
                sessions[s].append(critique)
            sessions[s].append(attempt)
    return [turn for turns in sessions for turn in turns]


# -------------------------------------------------------------------------------------------------------- the update

def make_optimizer(model, config):
    """Move `model` to its device and return AdamW over its weights.

    With --bf16 the device holds bfloat16 weights and float32 gradients, 6 bytes a parameter instead of 16. AdamW works
    on float32 copies of the weights in CPU memory: in bfloat16, steps as small as 1e-6 would be rounded away.
    """
    weights = list(model.parameters())
    if config.bf16:
        # A GPU reads pinned memory faster. It is one block, because torch rounds each block up to a power of two.
        sizes = [w.numel() for w in weights]
        block = torch.empty(sum(sizes), dtype=torch.float32, pin_memory=config.device == "cuda").split(sizes)
        weights = [torch.nn.Parameter(part.view_as(w).copy_(w.detach())) for part, w in zip(block, weights)]
        for w in model.parameters():                # only the weights: the buffers of RoPE need all their bits
            w.data = w.data.to(torch.bfloat16)
            w.grad_dtype = torch.float32            # the gradients of micro-batches are added up in float32
    model.to(config.device)
    torch.backends.cuda.enable_cudnn_sdp(False)     # cuDNN's attention would compile anew for each length of the cache
    if config.bf16 and config.device == "cpu":
        model.set_attn_implementation("eager")      # on a CPU, torch's fused attention is slow in bfloat16
    # Paper: it does not give the betas and the weight decay. These are those of the authors' code.
    return torch.optim.AdamW(weights, lr=config.lr, betas=(0.9, 0.98), weight_decay=0.1, fused=True)


def optimizer_step(model, optimizer, grad_clip=1.0):
    """Clip the gradients, take a step and clear them. Returns their norm before clipping; if not finite, no step.

    Paper: it does not give grad_clip. This is the value of the authors' code.
    """
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip).item()
    if math.isfinite(norm):
        # A master is the float32 copy of a weight, in CPU memory. Without --bf16 it is the weight itself.
        pairs = list(zip(model.parameters(), optimizer.param_groups[0]["params"]))
        for weight, master in pairs:
            master.grad = None if weight.grad is None else weight.grad.to(master)
        optimizer.step()
        for weight, master in pairs:
            weight.data.copy_(master.data, non_blocking=weight.is_cuda)
    model.zero_grad()                               # a master's gradient stays until the next step replaces it
    return norm


def micro_batches(turns, budget):
    """Split `turns`, longest first, into lists of at most `budget` tokens with padding. A longer turn is alone."""
    turns, batches = sorted(turns, key=lambda t: -len(t.prompt) - len(t.completion)), []
    while turns:
        rows = max(1, budget // (len(turns[0].prompt) + len(turns[0].completion)))
        batches.append(turns[:rows])
        turns = turns[rows:]
    return batches


def update(model, optimizer, turns, config):
    """Take the optimiser step(s) of one rollout on Eq. 6. Returns a dict of figures to log (see the README)."""
    for turn, A in zip(turns, role_advantages([t.reward for t in turns], [t.group for t in turns]).tolist()):
        turn.advantage = A
    # A turn with advantage 0 has no gradient. It is left out here, but it counts in the mean over all samples.
    # Paper: it does not say what to do if all advantages are 0. Here there is no step, because AdamW would still move
    # the weights, by its momentum and by weight decay.
    active = [turn for turn in turns if turn.advantage != 0]
    # A micro-batch holds turns of one part. So w is computed for a whole micro-batch, or not at all.
    batches = [batch for part in ("first", "critique", "revision")
               for batch in micro_batches([t for t in active if t.part == part], config.micro_tokens)]
    stats = {"flat": 1 - len(active) / len(turns), "objective": 0.0, "grad_norm": 0.0}

    at_rollout, ratios = [], []                     # (log pi_old, w) of each micro-batch; w of all tokens of revisions
    for inner in range(config.inner_steps if active else 0):
        for index, batch in enumerate(batches):
            sampled = [t.completion for t in batch]
            logp, mask = completion_logprobs(model, [t.free_prompt for t in batch], sampled, config.temperature)
            if inner == 0:
                # No weight has moved yet, so this pass gives log pi_old too, and the numerator of w. The denominator
                # comes from the same kind of pass, not from the sampler: in bfloat16 the two would differ.
                w = torch.ones_like(logp)
                if batch[0].part == "revision":
                    with torch.no_grad():
                        guided, _ = completion_logprobs(model, [t.prompt for t in batch], sampled, config.temperature)
                    w = calibration_ratio(logp, guided)
                    ratios += w[mask.bool()].tolist()
                at_rollout.append((logp.detach(), w))
            logp_old, w = at_rollout[index]
            A = torch.tensor([turn.advantage for turn in batch], device=logp.device)
            # icrl_objective is a mean over this micro-batch. The factor makes it a part of the mean over all turns, so
            # that the gradients of the micro-batches add up to exactly the gradient of the whole batch.
            J = icrl_objective(logp, logp_old, A, w, mask) * len(batch) / len(turns)
            (-J).backward()
            stats["objective"] += J.item() / config.inner_steps
        stats["grad_norm"] = optimizer_step(model, optimizer)
    if not math.isfinite(stats["objective"] + stats["grad_norm"]):
        stats.update(grad_norm=None, objective=None)
    return {**stats, "w_mean": mean(ratios)}


# ---------------------------------------------------------------------------------------------------------- training

def load_model(name, config):
    """Load a Hugging Face checkpoint: (model, tokenizer). The model is float32, in CPU memory, without dropout.

    Raises UsageError for a model with which sampling or training would go wrong.
    """
    try:
        if hasattr(AutoConfig.from_pretrained(name), "quantization_config") or list(Path(name).glob("adapter_*")):
            raise ValueError("it is quantised or a LoRA adapter, and cannot be trained here; use the full model")
        tokenizer = AutoTokenizer.from_pretrained(name)
        model, report = AutoModelForCausalLM.from_pretrained(
            name, dtype=torch.float32, use_safetensors=True, output_loading_info=True)
        if report["missing_keys"] or not all(weight.isfinite().all() for weight in model.parameters()):
            raise ValueError("some of its weights are missing or not finite")
        check_model(model, tokenizer)
        if config.checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
    except Exception as error:                      # a damaged folder can raise anything
        raise UsageError(f"cannot use the model {name!r}: {' '.join(str(error).split())[:300]}") from error
    for part in (model.config, model.config.get_text_config(), *model.modules()):
        for attribute, value in list(vars(part).items()):
            # With dropout, rho would not be 1 before the first step.
            if isinstance(value, float) and "drop" in attribute:
                setattr(part, attribute, 0.0)
    return model, tokenizer


def check_model(model, tokenizer):
    """Raise ValueError if prompts or samples of this model would be wrong. "zebra" is a word that is easy to find."""
    prompt, stops = encode_chat(tokenizer, critic_messages("zebra", "quokka")), stop_tokens(model, tokenizer)
    known = model.get_input_embeddings().num_embeddings
    if not stops or "zebra" not in tokenizer.decode(prompt) or max(*prompt, *stops) >= known:
        raise ValueError("its tokenizer loses text, has no end-of-sequence token, or makes ids beyond the embeddings")
    # Read the second half of the prompt at once. Then read it as `sample` does: row 0 is the whole prompt, row 1 is its
    # second half behind padding. Read both up to their last token, drop row 0, and read the last token of row 1. A
    # model that keeps no key-value cache, or looks at padding or at later tokens, gives other logits. Its samples would
    # be wrong without any message.
    half, ids, cache = len(prompt) // 2, torch.tensor([prompt, prompt]), DynamicCache(config=model.config)
    mask = (torch.arange(len(prompt)) >= torch.tensor([[0], [half]])).long()
    one = GenerationConfig(max_new_tokens=1, output_logits=True, return_dict_in_generate=True, pad_token_id=prompt[0])
    with torch.no_grad():
        at_once = model.eval()(input_ids=ids[1:, half:], use_cache=False).logits[0, -1]
        model.generate(ids[:, :-1], attention_mask=mask[:, :-1], cache=cache, generation_config=one)
        cache.reorder_cache(torch.tensor([1]))
        in_parts = model.generate(ids[1:], attention_mask=mask[1:], cache=cache, generation_config=one).logits[0][0]
    if cache.get_seq_length() != len(prompt) or (at_once - in_parts).abs().max() > 1e-3 * at_once.abs().max():
        raise ValueError("it cannot continue from a key-value cache; use a causal model with attention")


def check_context(model, tokenizer, problems, config):
    """Raise UsageError, before anything is sampled, if one of the longest problems does not fit in the context."""
    settings = model.config.get_text_config()
    context, rope = (getattr(settings, name, None) for name in ("max_position_embeddings", "rope_parameters"))
    # With longrope, beyond this length a row would depend on the other rows of its batch.
    if rope and rope.get("rope_type") == "longrope":
        context = rope["original_max_position_embeddings"]
    for problem in sorted((p["problem"] for p in problems), key=len)[-8:]:
        # The longest input is the critic's: it reads the problem and an attempt, and then writes.
        prompt = encode_chat(tokenizer, critic_messages(problem, ""))
        if context and len(prompt) + config.max_response + config.max_critique > context:
            raise UsageError(f"{problem[:40]!r} may need more than the model's {context} tokens; lower --max_response")


def problems_of_step(problems, step, config):
    """The problems of a step (from 1). Each epoch has its own order, which depends only on the seed."""
    places = [divmod(i, len(problems)) for i in range((step - 1) * config.queries, step * config.queries)]
    order = {epoch: np.random.default_rng([config.seed, epoch]).permutation(len(problems)) for epoch, _ in places}
    return [problems[order[epoch][i]] for epoch, i in places]


def mean(values):
    """The mean as a float, or None if there are no values: a 0 would look like a result."""
    values = list(values)
    return float(sum(values) / len(values)) if values else None


MEASURES = {"reward": lambda t: t.reward, "tokens": lambda t: len(t.completion), "truncated": lambda t: t.truncated}


def rollout_stats(turns):
    """Mean reward, mean length and share cut off, of first attempts, critiques and revisions: {"first_reward": ...}."""
    return {f"{part}_{name}": mean(measure(t) for t in turns if t.part == part)
            for part in ("first", "critique", "revision") for name, measure in MEASURES.items()}


def session_lines(turns, problems, step):
    """The turns as text: a line of JSON for each."""
    return "".join(json.dumps({
        "step": step, "problem": problems[t.query]["problem"], "session": t.session, "part": t.part, "text": t.text,
        "reward": t.reward, "truncated": t.truncated}) + "\n" for t in turns)


def show_sessions(turns, problems):
    """Print one session for each kind of problem: one in which a critique helped, if there is one."""
    best_last = sorted(turns, key=lambda t: (t.part == "critique", t.reward))
    chosen = {str(problems[t.query].get("kind")): t.session for t in best_last}             # the last one of each kind
    for t in (t for t in turns if t.session in chosen.values()):
        problem = f"\n  problem   {problems[t.query]['problem']}\n" if t.part == "first" else ""
        tqdm.write(f"{problem}  {t.part:9} {t.text.strip()}  -> reward {t.reward:g}")


def save(run, model, tokenizer, optimizer, state):
    """Save the model in run/model (bfloat16 with --bf16), and in run/checkpoint.pt what --resume needs.

    A crash leaves the old checkpoint as it was.
    """
    weights = [weight.detach() for weight in optimizer.param_groups[0]["params"]]      # float32, with --bf16 too
    try:
        model.save_pretrained(run / "model")
        tokenizer.save_pretrained(run / "model")
        torch.save({"weights": weights, "optimizer": optimizer.state_dict(), "state": state}, run / "unfinished.pt")
    except Exception as error:                      # torch and safetensors have their own errors for a full disk
        raise UsageError(f"cannot save a checkpoint in {run} (is the disk full?): {error}") from error
    (run / "unfinished.pt").replace(run / "checkpoint.pt")


def restore(run, model, optimizer):
    """Load the weights and the optimiser's state from run/checkpoint.pt. Returns the state of the run."""
    try:
        saved = torch.load(run / "checkpoint.pt", map_location="cpu", weights_only=True)
        # The settings of AdamW, such as --lr, are those of this run. Only its moments come from the checkpoint.
        optimizer.load_state_dict({**saved["optimizer"], "param_groups": optimizer.state_dict()["param_groups"]})
        targets = [*model.parameters(), *optimizer.param_groups[0]["params"]]          # the same without --bf16
        for target, tensor in zip(targets, saved["weights"] * 2, strict=True):
            target.data.copy_(tensor)
        return saved["state"]
    except Exception as error:                      # a damaged file can raise anything
        raise UsageError(f"{run / 'checkpoint.pt'} is damaged, or of another model: {error}") from error


def train(config):
    """Train as `config` says, in the folder config.out. Returns the state of the run, with its evaluations.

    A run may be stopped at any moment. With --resume it continues from its last checkpoint. On a CPU the result then
    equals that of an uninterrupted run, bit for bit.
    """
    check(config)
    run = Path(config.out)
    if run.exists() and any(run.iterdir()) and not config.resume:
        raise UsageError(f"{run} is not empty; continue that run with --resume {run}, or choose another --out")
    problems, heldout = load_problems(config.data) if config.steps else [], load_problems(config.heldout)
    if {p["problem"] for p in problems} & {p["problem"] for p in heldout}:
        raise UsageError(f"some problems of {config.heldout} are in {config.data} too; remove them from one of the two")
    model, tokenizer = load_model(config.model, config)
    check_context(model, tokenizer, problems + heldout, config)
    optimizer = make_optimizer(model, config)
    if config.device == "cpu" and model.num_parameters() < 10**7:
        torch.set_num_threads(1)                    # with small matrices, several threads mostly wait for each other
    state = restore(run, model, optimizer) if (run / "checkpoint.pt").exists() else dict(step=0, tokens=0, bytes=(0, 0))
    run.mkdir(parents=True, exist_ok=True)
    (run / "config.json").write_text(json.dumps(dataclasses.asdict(config), indent=1))
    if "before" not in state:
        state["before"] = evaluate(model, tokenizer, heldout, config, run / "heldout-0.jsonl")
    with open(run / "metrics.jsonl", "a") as metrics, open(run / "sessions.jsonl", "a") as sessions:
        for file, size in zip((metrics, sessions), state["bytes"]):
            file.truncate(min(size, file.tell()))   # a resumed run repeats what came after its checkpoint
        bar = tqdm(range(state["step"] + 1, config.steps + 1), desc=str(run), total=config.steps, initial=state["step"])
        for step in bar:
            # Each step has its own seed. So a resumed run needs no saved random state, and an evaluation between two
            # steps changes nothing. (The factor is a prime, larger than any number of steps.)
            torch.manual_seed(1_000_003 * config.seed + step)
            batch = problems_of_step(problems, step, config)
            turns = rollout(model, tokenizer, batch, config)
            tokens = state["tokens"] + sum(len(t.completion) for t in turns)
            row = {"step": step, "tokens": tokens, **rollout_stats(turns), **update(model, optimizer, turns, config)}
            bar.set_postfix({name: row[name] for name in ("first_reward", "revision_reward") if row[name] is not None})
            if step == config.steps or config.eval_every and step % config.eval_every == 0:
                state["after"] = evaluate(model, tokenizer, heldout, config, run / f"heldout-{step}.jsonl")
                row["heldout"] = state["after"]
                tqdm.write(f"step {step}: accuracy {row['heldout']['pass@1']:.2f}; training sessions of this step:")
                show_sessions(turns, batch)
            print(json.dumps(row), file=metrics, flush=True)
            sessions.write(session_lines(turns, batch, step))
            state |= {"step": step, "tokens": tokens, "bytes": (metrics.tell(), sessions.tell())}
            if step == config.steps or config.save_every and step % config.save_every == 0:
                save(run, model, tokenizer, optimizer, state)
    return state


# -------------------------------------------------------------------------------------------------------- evaluation

def interval(means):
    """The 95% interval (low, high) of the mean of `means`, an array with one mean in [0, 1] per problem.

    With one sample per problem this is Wilson's interval. It has a width even if all means are 0, or all are 1.
    """
    n, z = len(means), 1.96
    middle, half = mean(means) + z**2 / (2 * n), z * math.sqrt(means.var() / n + z**2 / (4 * n**2))
    return (middle - half) / (1 + z**2 / n), (middle + half) / (1 + z**2 / n)


def evaluate(model, tokenizer, problems, config, log=None, critic=None):
    """Measure what the solver can do without critique, and what critiques add. Returns a dict of figures.

    Here right attempts are criticised too, although the critic's prompt calls them failed. log: a file for all turns.
    critic: another model for the critiques. The problems and the random draws are the same at every call, and no
    randomness of the training is used up.
    """
    if len(problems) > config.eval_problems:        # not the first ones: a file may be ordered by subject
        problems = np.random.default_rng(0).choice(problems, config.eval_problems, replace=False).tolist()
    config = dataclasses.replace(config, method="icrl", rounds=max(2, config.rounds), samples=config.eval_samples)
    with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(config.seed)
        turns = rollout(model, tokenizer, problems, config, critic, gated=False)
    if log:
        log.write_text(session_lines(turns, problems, None))
    # With gated=False each session has exactly K attempts: (K, sessions).
    rewards = np.array([t.reward for t in turns if t.part != "critique"]).reshape(-1, config.rounds).T
    first, second, by_query = rewards[0], rewards[1], rewards[0].reshape(len(problems), -1)
    low, high = interval(by_query.mean(1))
    # With k = 1, pass@k is pass@1: the same key and the same value.
    figures = {f"pass@{config.samples}": mean(by_query.max(1)), "pass@1": mean(first), "95% from": low, "95% to": high,
               "put right": mean(second[first < 1] == 1), "put wrong": mean(second[first == 1] < 1)}
    kinds = np.array([str(problems[t.query].get("kind") or "") for t in turns if t.part == "first"])
    by_kind = {f"pass@1 {kind}": mean(first[kinds == kind]) for kind in sorted({*kinds} - {""})}
    for round_number in range(1, config.rounds):    # a right attempt would end the session, so it stays right
        first = np.where(first == 1, first, rewards[round_number])
        figures[f"after {round_number} critique"] = mean(first)
    lengths = {name: value for name, value in rollout_stats(turns).items() if name.endswith(("tokens", "truncated"))}
    return figures | lengths | by_kind


# ---------------------------------------------------------------------------------------------------------- problems

def problem_and_answer(row):
    """The problem and its answer, two strings, in a row of a data file. Raises ValueError if it has none."""
    row = {k.lower(): v for k, v in {**row, **(row.get("reward_model") or {})}.items() if v not in (None, "")}
    problem = row.get("problem", row.get("question", row.get("prompt", "")))
    problem = problem[-1]["content"] if isinstance(problem, list) else problem         # of a chat: the last turn
    answers = row.get("answer", row.get("final_answer", row.get("solution", row.get("ground_truth", ""))))
    answers = answers if isinstance(answers, list) else [answers]
    if not all(type(value) in (str, int, float) for value in answers):
        raise ValueError(f"the answer {answers} is neither text nor a number")
    answer = ", ".join(map(str, answers)).rpartition("####")[2].strip()                # GSM8K: behind the mark
    answer = (extract_answer(answer) or "") if "boxed" in answer else answer           # MATH: in the last box
    if not problem.strip() or not is_correct(rf"\boxed{{{answer}}}", answer):
        raise ValueError(f"no problem, or no answer that fits in a box, under the keys {', '.join(row)}")
    json.dumps([problem, *answers], allow_nan=False, ensure_ascii=False).encode()      # NaN and lone surrogates raise
    return problem.strip(), answer


def load_problems(path):
    """Read problems from a JSONL file: a list of dicts with at least "problem" and "answer", both strings.

    A line has its text under "problem", "question" or "prompt", and its answer under "answer", "final_answer",
    "solution" or "ground_truth": the bare answer, a list of answers, a GSM8K solution (after "####") or a MATH solution
    (in its last box). Exact repeats are dropped. Any other line that cannot be used is an error, because to train on a
    part of the file without a word would be worse. Raises UsageError with the numbers of the first bad lines.
    """
    problems, bad, repeats = {}, [], 0
    text = Path(path).read_text(encoding="utf-8-sig", errors="surrogateescape")
    lines = enumerate(text.split("\n"), 1)                    # splitlines() would also split inside strings
    for number, line in ((number, line) for number, line in lines if line.strip()):
        try:
            row = json.loads(line)
            problem, answer = problem_and_answer(row)
            if problems.get(problem, {"answer": answer})["answer"] != answer:
                raise ValueError("the same problem has another answer further up")
            repeats += problem in problems
            problems[problem] = {**row, "problem": problem, "answer": answer}
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            bad.append(f"line {number}: {error}")
    if bad or not problems:
        raise UsageError(f"{path}: {len(bad)} lines cannot be used ({'; '.join(bad[:3]) or 'the file is empty'}). Each "
                         'line must be one object, such as {"problem": "1 + 1?", "answer": "2"}')
    if repeats:
        print(f"{path}: {repeats} lines repeat an earlier problem and its answer; each is used once")
    return list(problems.values())


# --------------------------------------------------------------------------------------------------- answer checking
#
# is_correct finds the box of a response and compares its content with the gold answer in three stages:
#   1. normalise      bring both to one spelling: \dfrac34 and \frac{3}{4}, 1,234 and 1234, 8 cm and 8\text{cm}.
#   2. same           take lists, equations, intervals and tuples apart and compare them piece by piece.
#   3. Formula        compute what is left. Two formulas are equal if their values are, with the same three random
#                     values for each variable on both sides.
# Nothing is handed to Python or sympy to run. What Formula cannot read is compared as text.
# Some rules are policies: other checkers decide otherwise. They are marked "Policy".

# 1. The spelling that is used below, and other spellings of it. Commands that only change the looks are replaced by
# nothing. Policy: so are the signs % and °, which an answer may carry or leave out. But 35% is not 0.35.
SPELLINGS = {
    "": r"\left \right \big \Big \bigl \bigr \displaystyle \mathbf \, \; \: \! \( \) \[ \] $ % \% ° ^° ^\circ ^{\circ}",
    r"\text": r"\mbox \textbf \textrm \textnormal \mathrm \operatorname \boxed", " ": r"~ \quad \qquad", "{": r"\{",
    r"\frac": r"\dfrac \tfrac \cfrac", r"\frac12": "½", r"\frac34": "¾", r"\binom": r"\dbinom \tbinom", "$": r"\$ € £",
    r"\sqrt ": "√", r"\sqrt[3]": "∛", "^": "**", "^2": "²", "^3": "³", r"\pi ": "π", r"\theta ": "θ", "'": r"\prime",
    "*": r"\cdot \times × ·", "/": r"\div ÷", "-": "− –", "±": r"\pm", "∓": r"\mp", "…": r"\ldots \cdots \dots ...",
    "<": r"\lt", ">": r"\gt", "≤": r"\le \leq \leqslant <=", "≥": r"\ge \geq \geqslant >=", "≠": r"\ne \neq",
    "=": r"\equiv ≡", "≈": r"\approx", "∈": r"\in", "∪": r"\cup", "∖": r"\setminus", "∞": r"\infty", "ℝ": r"\mathbb{R}",
    "∅": r"\emptyset \varnothing", "}": r"\}", "(": r"\langle", ")": r"\rangle \rfloor \rceil", ",": "{,} &",
    r"\floor(": r"\lfloor", r"\ceil(": r"\lceil", "|": r"\lvert \rvert \mid", ";": r"\\ \\\\", "inch": "inches"}
SPELLING = {other: form for form, others in SPELLINGS.items() for other in others.split()}
SPELLING |= {chr(code + 0xFEE0): chr(code) for code in range(ord("!"), ord("~") + 1)}           # full width, as in １２
OTHER = "|".join(re.escape(other) + (r"(?![A-Za-z])" if other[-1].isalpha() else "")
                 for other in sorted(SPELLING, key=len, reverse=True))                          # the longest first


def unknown(name):
    """A random number that depends on the name only."""
    draw = random.Random(name)
    return cmath.rect(draw.uniform(1, 4), draw.uniform(0.1, 0.3))


def floor(z):
    """The floor of a real number. For a variable it is some other random number."""
    return unknown(f"floor {z:.6g}") if z.imag else math.floor(z.real + 1e-9)


FUNCTIONS = {name: getattr(cmath, name) for name in "sqrt exp log sin cos tan sinh cosh tanh".split()}
FUNCTIONS |= {"ln": cmath.log, "arcsin": cmath.asin, "arccos": cmath.acos, "arctan": cmath.atan, "abs": abs,
              "cot": lambda z: 1 / cmath.tan(z), "sec": lambda z: 1 / cmath.cos(z), "csc": lambda z: 1 / cmath.sin(z),
              "floor": floor, "ceil": lambda z: -floor(-z)}
# The parts of a formula, and what has a name: x, x_1, \phi', \dot{x}; a LABEL is also f(x), AB, Area or (p,q).
CONSTANTS = {r"\pi": math.pi, "e": math.e, "i": 1j, "∞": math.inf}
GREEK = "alpha|beta|gamma|delta|epsilon|zeta|eta|theta|kappa|lambda|mu|nu|xi|rho|sigma|tau|phi|chi|psi|omega|hbar|ell"
NUMBER = r"(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]{1,3}(?![0-9]))?"
VARIABLE = rf"(?:\\dot(?:\{{\w\}}| ?\w)|[A-Za-z…]|\\(?i:(?:var)?(?:{GREEK}))(?![A-Za-z]))(?:_(?:\{{[^{{}}]*\}}|\w))?'*"
LABEL = rf"(?:(?:\\Delta ?)?(?:{VARIABLE}|[A-Z]+|[A-Za-z]{{3,}})(?:\([\w,\\]+\))?|\([a-z][\w,{{}}…]*\))"
# What stands between two braces, with one more pair of braces inside.
NESTED = r"((?:[^{}]|\{[^{}]*\})*)"
# Two units that differ are wrong. Policy: any other noun after a number is taken for what is counted, and is not
# compared: 30 apples is 30. The words of NO_UNIT change the number, so an answer with one is never that number.
UNITS = r"(?:(?:second|minute|hour|day|week|month|year|dollar|cent|unit|mile|\w*meter)s?|[ckm]m|[km]g|fe*t|inch|[ap]m)"
NO_UNIT = "(?:ten|hundred|thousand)(?:ths?)?|[a-z]+illion|dozen|half|thirds?|quarters?|squared|more|less|wrong|not?"

REWRITES = [(re.compile(pattern), new) for pattern, new in [
    # \\frac, escaped twice; the space \ ; a matrix is ⟦1,2;3,4⟧.
    (r"(?<!\\)\\\\(?=[a-z]{3})", r"\\"), (r"(?<!\\)\\ ", " "), (r"\\! +", ""), (r"\\circ +\}", r"\\circ}"),
    (r"\\begin\{(?:array\} *\{[^{}]*|[pb]?matrix|cases)\}", "⟦"), (r"\\end\{(?:array|[pb]?matrix|cases)\}", "⟧"),
    (OTHER, lambda match: SPELLING[match[0]]), (r"(?<=[0-9])\^?\{?(?:\\text *\{)?(?:st|nd|rd|th)\b\}*", ""),
    # 3 \text{ and } 4 is a list; f(x)=1 \text{ for all } x is f(x)=1; 12^{\text{th}} is 12.
    (r"[, ]*(?:\\text *\{[, ]*(?:and|or)[, ]*\}|\b(?:and|or)\b)", ","),
    (r"[, ]*(?:\\text *\{ *)?\bfor (?:all|any|every|each)\b[^,;]*", ""),
    # Units become \text: 4:30 p.m.; \frac{\text{m}}{\text{s}}; 8 cm; 30 apples; \$5. Policy: mod 5 is a unit, too.
    (r" *\\text *", r"\\text"), (r"\(? *\\?[pb]?mod *\{?([0-9a-z]+)\}? *\)?", r"\\text{mod\1}"),
    (r"\\frac\{\\text\{([^{}]+)\}\}\{\\text\{([^{}]+)\}\}", r"\\text{\1/\2}"),
    (rf"\\text\{{ *([ei]) *\}}|(?<![0-9A-Za-z)}}\]/*])\\text\{{{NESTED}\}}", r" \1\2"),           # but \text{12 feet}
    (r"(?i)(?<=[0-9]) *(?:\\text\{ *)?([ap])\.? ?m\b\.?(?: *\})?", r"\\text{\1m}"),
    (rf"(?:(?<=[0-9}}])| )({UNITS}\b|(?<=[0-9)}}] )[a-z]{{3,}}[a-z ]*)", r"\\text{\1}"),
    # 1,234 is a number, but (1,234) is a pair and 1, 234 a list.
    (r"(?<![0-9,.(\[{])(?<![(\[{]-)[0-9]{1,3}(?:,[0-9]{3})+(?!,?[0-9])", lambda match: match[0].replace(",", "")),
    (r"\$ *([0-9]*\.?[0-9]+)", r"\1\\text{dollars}"), (r"\$", ""),
    # 2^6 3^5 is a product. Other spaces go, but 1 2 is not 12.
    (r"(\^[0-9]+ |\^\{[0-9]+\} ?|[!)] ?)(?=[0-9])", r"\1*"), (r" +(?![A-Za-z0-9])|(?<![A-Za-z0-9]) +", ""),
    # There are no brackets around a matrix. Elsewhere (1;2) is (1,2).
    (r"[,;]+(?=[,;⟧])|[(\[](?=⟦)|(?<=⟧)[)\]]", ""), (r";(?![^⟦⟧]*⟧)", ","), (r"(?<=[0-9}])≈.*", ""),
    # A factor before a matrix goes into its cells.
    (r"([^⟦⟧,;=]+)⟦([^⟦⟧]*)⟧", lambda m: "⟦" + re.sub("[^,;]+", lambda cell: f"{m[1]}({cell[0]})", m[2]) + "⟧"),
    # sqrt(2), \sin^{-1} x, \frac12, \sqrt[3]{2}, |x|, {a \over b}
    (rf"(?<![\\A-Za-z])(?:np\.)?(pi|{'|'.join(FUNCTIONS)})(?![A-Za-z])", r"\\\1"),
    (r"\\(sin|cos|tan)\^(?:\{-1\}|-1)", r"\\arc\1"), (r"\\(frac|sqrt|binom) ?([0-9])", r"\\\1{\2}"),
    (rf"\\sqrt\[([0-9n])\](\{{{NESTED}\}}|\w)", r"{\2^{1/\1}}"), (r"\|([^|]+)\|", r"\\abs(\1)"),
    (rf"\{{{NESTED}\\over{NESTED}\}}", r"\\frac{\1}{\2}"), (rf"\{{{NESTED}\\choose{NESTED}\}}", r"\\binom{\1}{\2}"),
    # A mixed number, such as 1\frac{1}{2} or 1 1/2, is a sum, and so is 0.9\overline{6}. 1/3 \approx 0.33 is 1/3.
    (r"(?<![0-9.^_/])([0-9]+)(\\frac\{[0-9]+\}(?:[0-9]|\{[0-9]+\})| [0-9]+/[0-9]+)", r"(\1+\2)"),
    (r"(\d*\.)(\d*)\\overline\{(\d+)\}", lambda m: f"({m[1]}{m[2]}0+{m[3]}/{'9' * len(m[3])}{'0' * len(m[2])})"),
    # Sets of real numbers become inequalities and intervals: {x|x<1}, -x>-1, |x|>8, |x|<8, x≠4, ℝ∖{4}, ℝ∖{4,5}.
    (r"\{[a-z](?:∈ℝ)?[|:]([^{}]*)\}|^[a-z]∈(?=\{)", r"\1"), (r"^-([a-z])([<>≤≥])(.+)", r"-(\3)\2\1"),
    (r"^\\abs\(([a-z])\)([>≥])(.+)", r"\1\2\3∪-(\3)\2\1"), (r"^\\abs\(([a-z])\)([<≤])(.+)", r"-(\3)\2\1\2\3"),
    (r"^(?:[a-z]≠|(?:[a-z]∈)?ℝ∖)([^{},≠]+|\{[^{},]+\})$", r"(-∞,\1)∪(\1,∞)"), ("^(?:[a-z]∈)?ℝ\\.?$", "(-∞,∞)"),
    (r"^(?:[a-z]∈)?ℝ∖\{([^{},]+),([^{},]+)\}\.?$", r"(-∞,\1)∪(\1,\2)∪(\2,∞)")]]


def closing_boxes(text):
    """The contents of the boxes in the last sentence that has a box. Empty boxes are skipped.

    If the last box is never closed, there is no answer. Text between two boxes such as "no, wait" ends the sentence.
    """
    # The end of the text is enough: no reward may take seconds. TeX reads \boxed 7 as \boxed{7}.
    text = re.sub(r"(\\boxed|\\fbox)\s*([0-9]|[A-Za-z]\b)", r"\1{\2}", text.rstrip()[-50_000:])
    boxes = []
    for piece in reversed(re.split(r"\\(?:boxed|fbox)\s*\{", text)[1:]):
        end = closing_brace(piece)
        if end is None or boxes and re.search(r"[.!?:]\s|\n\s*\n|\b(?:no|not|wait|but|so|thus)\b", piece[end:]):
            break
        if piece[:end].strip():
            boxes.insert(0, piece[:end].strip())
    return boxes


def closing_brace(text):
    r"""The position of the brace that closes one before `text`, or None. The braces \{ and \} do not count."""
    depths = itertools.accumulate((char == "{") - (char == "}") for char in re.sub(r"\\[\\{}]", "  ", text))
    return next((position for position, depth in enumerate(depths) if depth < 0), None)


def extract_answer(text: str) -> str | None:
    r"""The content of the last `\boxed{...}` or `\fbox{...}` that is not empty.

    Returns None if there is none, or if the last box is never closed.
    """
    return (closing_boxes(text) or [None])[-1]


def is_correct(response: str, answer: str) -> bool:
    r"""Say whether the boxed answer of `response` is equal to the gold `answer`.

    Box: the last one counts. If the gold answer is a list of n, the n boxes of the last sentence are its items.
    Numbers: rational numbers and decimals must be equal exactly, other values to a relative 1e-10. An infinite or
    undefined value is equal to nothing.
    Rounding: if the gold answer is a decimal of three or more digits, a value that rounds to it is right. But two
    decimal places are exact, because they may be money: 12.504 is not 12.50. Policy: if the gold answer is no decimal,
    its decimal of six or more digits is right: 0.333333 for 1/3.
    Order: a list or a set may come in any order. A tuple, an interval or a matrix may not.
    Names and units: a name (x = 5, m+n = 5), a unit (cm, dollars, PM) or the base of a number (204_5) may be missing
    on one side. Two that differ are wrong.
    Words ignore case.

    Never raises. If the response or the answer is None, a float or a list, it is wrong. An int answer is its text.
    """
    if not isinstance(response, str) or not isinstance(answer, (str, int)):
        return False
    boxes = closing_boxes(response)
    gold = ",".join(closing_boxes(str(answer))) or str(answer).strip()        # a gold answer may come in boxes, too
    if not boxes or len(gold) > 400:                          # over 400 characters only the same text is right
        return boxes[-1:] == [gold]
    boxed = ",".join(boxes) if 1 < len(boxes) == len(items(normalise(gold))) else boxes[-1]
    return boxed == gold or len(boxed) <= 400 and same(normalise(gold), normalise(boxed))


def normalise(text):
    text = " ".join(text.split())
    for pattern, new in REWRITES:
        text = pattern.sub(new, text)
    return text.replace("+∞", "∞").strip(" ,;:").rstrip(".")


def split(text, separator):
    """Split `text` at the separators that stand outside all brackets."""
    depths = itertools.accumulate((char in "([{⟦") - (char in ")]}⟧") for char in text)
    return "".join("\0" if depth == 0 and char in separator else char for char, depth in zip(text, depths)).split("\0")


def items(text):
    """The answers in a list, a set or a union; a plus-minus makes two of one."""
    if text.startswith("{") and split(text, "}") == [text[:-1], ""]:          # {1,2}, but not {1}/{2}
        text = text[1:-1]
    return [item.replace("±", sign).replace("∓", "-" if sign == "+" else "+").strip()
            for item in split(text, ",∪") for sign in ("+-" if "±" in item else "+")]


def same(gold, pred):
    """2. Compare two normalised answers, or two parts of answers."""
    golds, preds = items(gold), items(pred)
    if len(golds) == len(preds) == 1:
        return golds == preds or same_item(golds[0], preds[0])
    # A list, in any order: whatever it names comes as often on either side. A longer list must have the same text.
    return gold == pred or len(golds) == len(preds) <= 20 and all(
        sum(same(item, gold) for gold in golds) == sum(same(item, pred) for pred in preds) for item in golds)


def same_item(gold, pred):
    # p = 2 * 3 = 6 says p = 6, and an inequality is an interval.
    gold, pred = (as_interval(re.sub("=.*=", "=", text)) for text in (gold, pred))
    for sign in "∈=:":                                                        # with a name on both sides, both count
        if sign in gold and sign in pred:
            golds, preds = gold.split(sign), pred.split(sign)
            same_parts = len(golds) == len(preds) and all(map(same, golds, preds))
            return same_parts or "=" in gold and same_value(gold, pred)       # 2x = 12 and x = 6
    bare = [without_name(text) for text in (gold, pred)]
    if bare != [gold, pred]:                                                  # with a name on one side, it does not
        return same(*bare)
    golds, preds = split(gold[1:-1], ",;"), split(pred[1:-1], ",;")
    if len(golds) > 1:                                                        # a tuple, an interval or a matrix
        form, pred_form = ([text[:1], [row.count(",") for row in text.split(";")], text[-1:]] for text in (gold, pred))
        return form == pred_form and len(golds) == len(preds) and all(map(same, golds, preds))
    (gold, unit), (pred, pred_unit) = take_unit(gold), take_unit(pred)
    same_unit = not unit or not pred_unit or unit == pred_unit
    return same_unit and "=" not in gold + pred and same_value(gold, pred)


def without_name(text):
    """5 for x=5, 5=x, AB=5 and, as a policy, for m+n=5. But 2x+y=5 and x+y=0 are equations and stay as they are."""
    text = re.sub(rf"^(?!{LABEL}=)([^=]+)=({LABEL})$", r"\2=\1", text)
    return re.sub(rf"^(?:(?:{LABEL})?[=≈∈]|[^0-9=]+=(?!-?0$)(?=(?:[^A-Za-z\\]|\\[a-z]+)+$))", "", text)


def as_interval(text):
    """3<x≤4 is x∈(3,4], and 5≤x is x∈[5,∞)."""
    parts = re.split("([<>≤≥])", text)
    if ">" in parts or "≥" in parts:                                          # read from the right, they are < and ≤
        parts = [{">": "<", "≥": "≤"}.get(part, part) for part in reversed(parts)]
    if len(parts) == 3:
        parts = ["-∞", "<", *parts] if re.fullmatch(LABEL, parts[0]) else [*parts, "<", "∞"]
    if len(parts) != 5 or not re.fullmatch(LABEL, parts[2]):
        return text
    low, opening, name, closing, high = parts
    return name + "∈" + ("[" if opening == "≤" else "(") + low + "," + high + ("]" if closing == "≤" else ")")


def take_unit(text):
    r"""12\text{cm} is ("12", "cm"). The base of a number, as in 204_5, counts as its unit. 30 apples is ("30", "")."""
    unit = rf"[*/]?\\text\{{(?![^{{}}]*(?:,|\b(?i:{NO_UNIT})\b)){NESTED}\}}(?:\^\{{?-?[0-9]\}}?)?"
    end = re.search(rf"(?<=[A-Za-z0-9)}}\]!])(?:{unit})+$|(?<=[0-9])_\{{?[0-9]+\}}?$|$", text).start()
    unit = re.sub(r"\\text|[{}().]|(?<=\w\w)s\W*$", "", text[end:]).strip().lower()
    return text[:end], unit if re.fullmatch(rf"{UNITS}|(?:square|cubic|sq).*|.{{1,3}}|.*[0-9/*].*", unit) else ""


def same_value(gold, pred):
    """3. Compare two formulas or words."""
    gold, pred = (re.sub(r"\\text\{([^{}]*)\}", r"\1", text) for text in (gold, pred))
    if all(re.fullmatch(r"\(?[A-Za-z]\)?|(?i:no)|[A-Za-z ]{3,}", text) for text in (gold, pred)):   # letters or words
        return gold.strip("()").casefold() == pred.strip("()").casefold()
    try:
        golds, preds = (re.sub("=(.*)", r"-(\1)", text) for text in (gold, pred))
        golds, preds = ([Formula(text, trial).value() for trial in range(3)] for text in (golds, preds))
        if "=" in gold:                                       # left minus right, up to a factor
            golds, preds = ([value / values[0] for value in values] for values in (golds, preds))
        exact = all(isinstance(value, Fraction) for value in golds + preds)
        limits = [max(rounding(gold, pred), 0 if exact else 1e-10 * abs(x)) for x in golds]
        return all(abs(x - y) <= limit < math.inf for x, y, limit in zip(golds, preds, limits))
    except (ValueError, ArithmeticError, RecursionError):     # one of the two has no value
        return gold == pred


def rounding(gold, pred):
    """Half a unit in the last place of a gold decimal of three digits, else of a predicted one of six, else 0."""
    for text, digits in (gold, 3), (pred, 6):
        decimal = re.fullmatch(r"-?([0-9]*)\.([0-9]+)(?:(?:e|\*10\^)\{?([-+]?[0-9]{1,3})\}?)?(?<!\.[0-9]{2})", text)
        if decimal and len((decimal[1] + decimal[2]).lstrip("0")) >= digits:
            return Fraction(10) ** (int(decimal[3] or 0) - len(decimal[2])) / 2
    return 0


class Formula:
    """The value of a formula, by recursive descent. A variable's value depends on its name and on `trial` only."""
    CLOSING = {"(": ")", "[": "]", "{": "}"}

    def __init__(self, text, trial):
        self.tokens = [*re.findall(rf"{NUMBER}|{VARIABLE}|\\[A-Za-z]+|!+|\S", text), ""]
        self.trial, self.bits = trial, 100_000                # the powers in a formula may have so many bits in all

    def accept(self, *tokens):
        """Take the next token if it is one of these."""
        return self.tokens.pop(0) if self.tokens[0] in tokens else None

    def value(self, end=""):
        """The value of what stands before the token `end`. An empty token ends the formula."""
        value = self.sum()
        if self.tokens.pop(0) != end:
            raise ValueError
        return value

    def sum(self):
        value = self.product()
        while self.tokens[0] in ("+", "-"):                   # `factor` reads the sign
            value = value + self.product()
        return value

    def product(self, of_function=False):
        r"""Factors with a sign between them or, as in 2x, without. \sin 2x \cos x is \sin(2x) \cos x."""
        value = self.factor()
        while True:
            sign = None if of_function else self.accept("*", "/")
            ends = of_function and self.tokens[0][1:] in FUNCTIONS
            if not sign and (ends or not re.match(r"[A-Za-z∞…({[\\]", self.tokens[0])):
                return value
            value = value / self.factor() if sign == "/" else value * self.factor()

    def factor(self):                                         # -2^2 is -4, and 2^3^2 is 2^9
        if self.tokens[0] in ("+", "-"):
            return self.factor() if self.tokens.pop(0) == "+" else -self.factor()
        value = self.operand()
        while self.accept("!"):
            value = self.factorial(value)
        return self.power(value, self.factor()) if self.accept("^") else value

    def power(self, base, exponent):
        if isinstance(base, Fraction) and isinstance(exponent, Fraction) and exponent.denominator == 1:
            self.bits -= abs(exponent) * (base.numerator.bit_length() + base.denominator.bit_length() - 1)
            # 9^{9^9} would fill the memory. "Not a number" is equal to nothing.
            return base ** (exponent if self.bits > 0 else math.nan)
        return (complex(base) + 0) ** complex(exponent)       # + 0 turns an imaginary part of -0 into 0

    def factorial(self, z):
        """z!, exact for a natural number. For a variable it is some other random number."""
        self.bits -= 12 * abs(z)
        natural = isinstance(z, Fraction) and z.denominator == 1 and z >= 0 and self.bits > 0
        return Fraction(math.factorial(int(z))) if natural else unknown(f"factorial {complex(z):.6g}")

    def operand(self):
        token = self.tokens.pop(0)
        if token in self.CLOSING:
            return self.value(self.CLOSING[token])
        if token in (r"\frac", r"\binom"):
            n, k = self.operand(), self.operand()
            return n / k if token == r"\frac" else self.factorial(n) / self.factorial(k) / self.factorial(n - k)
        if token[1:] in FUNCTIONS:
            base = complex(self.operand()) if self.accept("_") else math.e                             # \log_2 x
            exponent = self.factor() if self.accept("^") else Fraction(1)                       # \sin^2 x
            argument = self.operand() if self.tokens[0] in self.CLOSING else self.product(of_function=True)
            return self.power(FUNCTIONS[token[1:]](complex(argument) + 0) / cmath.log(base), exponent)
        if token in CONSTANTS:
            return CONSTANTS[token]
        if re.fullmatch(VARIABLE, token):
            return unknown(f"{re.sub('[{ }]', '', token)} {self.trial}")
        return Fraction(token)


# ------------------------------------------------------------------------------------------------------ command line

def parse(argv=None):
    """Read the command line into a Config. A preset, or the run to resume, sets the defaults of all other flags."""
    parser = HfArgumentParser(Config, allow_abbrev=False, usage="icrl.py [--flag value ...]")
    given, _ = parser.parse_known_args(argv)
    parser.set_defaults(**PRESETS[given.preset])
    if given.resume:
        parser.set_defaults(**json.loads((Path(given.resume) / "config.json").read_text()))
    config = Config(**vars(parser.parse_args(argv)))
    config.out = config.resume or config.out or time.strftime(f"runs/%Y%m%d-%H%M%S-{config.method}-{config.seed}")
    return config


def main(argv=None):
    """Train, and print the figures before and after. Returns the exit code: 0, 2 for an error, 130 after Ctrl-C."""
    sys.stdout.reconfigure(errors="replace")        # a console that cannot show a letter must not end a run
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        config = parse(argv)
        state = train(config)
    except (UsageError, OSError, json.JSONDecodeError, torch.OutOfMemoryError, KeyboardInterrupt) as error:
        print(f"icrl.py: {str(error) or 'interrupted'}", file=sys.stderr)
        return 130 if isinstance(error, KeyboardInterrupt) else 2
    columns = {when: state[when] for when in ("before", "after") if when in state}
    print(f"{'':32}", *(f"{when:>8}" for when in columns))
    for name in state.get("after", state["before"]):
        cells = ["-" if figures.get(name) is None else f"{figures[name]:.3g}" for figures in columns.values()]
        print(f"{name:32}", *(f"{cell:>8}" for cell in cells))
    print(f"{state['tokens']:,} tokens sampled in {state['step']} steps; the run is in {config.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
