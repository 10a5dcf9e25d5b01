#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""ICRL in one file: a language model learns from its own critique (arXiv 2605.15224).

One model plays two roles. Only the prompt tells them apart. The solver attempts a problem q (also
called query). If the attempt fails, the critic (the same weights) writes a critique c of it. The
solver then tries again with c in its prompt. This second attempt y is called a revision. All of
this together is a session. A rollout is all sessions of a step, G for each problem. Then one
policy-gradient step trains both roles. Equations are numbered as in the paper.

    Eq. 3   A critique earns 1 if the revision is right. Otherwise it earns what the revision
            gained over the attempt.
    Eq. 4   A revision is trained as if the solver had seen q alone. Each of its tokens y_t has
            the weight w_t = pi_old(y_t | q, y_<t) / pi_old(y_t | q, c, y_<t), at most 2. A token
            that only c made likely gets a small weight. pi_old is the model that sampled.
    Eq. 5   An advantage A is a reward, normalised among the outputs of the same role on the same
            problem.
    Eq. 6   J = mean of w_t min(rho_t A, clip(rho_t) A), where rho_t = pi / pi_old. Both are
            without c in the prompt.

With --method grpo there is no critic. What is left is GRPO without a KL term.

    python icrl.py                          trains the small model that comes with this file
    python icrl.py --preset qwen3 --data train.jsonl --heldout test.jsonl       trains Qwen3-4B

Read from top to bottom: settings, equations, prompts, sampling, sessions, update. That is the
whole method. Training, evaluation, the problem files, the answer checker and the command line
follow. The word "Paper:" marks where this file departs from the paper, or what it does where the
paper leaves a choice open.
"""
import dataclasses
import datetime
import decimal
import json
import math
import operator
import random
import re
import sys
from decimal import Decimal
from pathlib import Path
from typing import Literal

import torch
import transformers
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

WORLD = Path(__file__).resolve().parent / "math_data/arithmetic"


class UsageError(ValueError):
    """The user asked for something that cannot be done. The message says what is wrong."""


# -------------------------------------------------------------------------------------- settings

def flag(default, text):
    """A field of Config: its default, and its text in --help."""
    return dataclasses.field(default=default, metadata={"help": text})


@dataclasses.dataclass
class Config:
    """All settings of a run. Each field is also a command-line flag."""
    preset: Literal["tiny", "qwen3"] = flag("tiny", "defaults for the small model, or for Qwen3")
    resume: str = flag("", "go on with the run in this folder, with its settings")
    out: str = flag("", "folder of the run, must be new; empty: runs/ and the time")
    model: str = flag(f"{WORLD}/model", "Hugging Face model: a name or a folder")
    data: str = flag(f"{WORLD}/train.jsonl", "training problems (JSONL)")
    heldout: str = flag(f"{WORLD}/heldout.jsonl", "problems for the evaluation (JSONL)")
    device: str = flag("cuda" if torch.cuda.is_available() else "cpu", "cuda, cpu or mps")
    seed: int = flag(0, "seed of all random draws")
    # sessions
    method: Literal["icrl", "grpo"] = flag("icrl", "grpo: one attempt a session, no critic")
    queries: int = flag(16, "problems (queries) per step")
    samples: int = flag(8, "sessions per problem (G)")
    rounds: int = flag(2, "attempts per session at most (K)")
    max_response: int = flag(48, "tokens per attempt at most")
    max_critique: int = flag(48, "tokens per critique at most")
    temperature: float = flag(1.0, "above 0; used for sampling and for every log-prob")
    # update
    steps: int = flag(50, "training steps; 0: only evaluate --model on --heldout")
    inner_steps: int = flag(1, "optimiser steps per rollout; with 1, rho is always 1")
    lr: float = flag(3e-4, "learning rate (constant)")
    # memory
    sample_batch: int = flag(256, "completions sampled at a time")
    micro_tokens: int = flag(1024, "tokens per forward pass of the update")
    bf16: bool = flag(False, "use bfloat16, with float32 weights in CPU memory")
    checkpointing: bool = flag(False, "recompute activations in the backward pass")
    # evaluation
    eval_every: int = flag(25, "steps between evaluations and checkpoints")
    eval_samples: int = flag(1, "attempts per problem in an evaluation")


# Paper: the settings of qwen3 are the paper's, except for the lengths (2048 and 1024 there) and
# the number of steps (300 there). So a run has at most a sixth of the paper's tokens.
PRESETS = {"tiny": {}, "qwen3": dict(
    model="Qwen/Qwen3-4B-Instruct-2507", lr=1e-6, steps=100, max_response=1024, max_critique=512,
    bf16=True, checkpointing=True, sample_batch=32, micro_tokens=4096, eval_every=10)}
# What --resume may change. (With another sample_batch or device, other samples are drawn.)
MAY_CHANGE = {"resume", "device", "steps", "sample_batch", "micro_tokens", "eval_every"}


# --------------------------------------------------------------------------------- the equations

def critic_reward(before, after):
    """Eq. 3: the reward of a critique, from the rewards of the attempts before and after it.

    before, after: floats. If rewards are 0 or 1 and only failures are criticised, this is simply
    `after`.
    """
    return 1.0 if after == 1.0 else after - before


def calibration_ratio(logp_free, logp_guided, w_max=2.0):
    """Eq. 4: the weight w_t = pi_old(y_t | q, y_<t) / pi_old(y_t | q, c, y_<t), at most w_max.

    logp_free, logp_guided: (B, T) float log-probs of the same revisions. "Free" means without the
    critique in the prompt, "guided" means with it. Both come from the weights that sampled.
    Returns (B, T), without a gradient. Only for revisions: every other token has weight 1.
    """
    return (logp_free - logp_guided).detach().exp().clamp(max=w_max)


def role_advantages(rewards, groups, delta=1e-6):
    """Eq. 5: A_i = (r_i - mean) / (std + delta), with the mean and std of the group of i.

    rewards: B floats. groups: B keys, for ICRL (problem, role). Returns (B,) float32.
    Paper: the kind of std is left open; here it divides by n - 1. A group of one, or of equal
    rewards, gives exactly 0. Without this rule, rounding noise divided by delta would be a signal.
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
    """Eq. 6, to be maximised: J = mean of w_t min(rho_t A, clip(rho_t, 0.8, 1.28) A).

    logp: (B, T) float log-probs by the current weights. logp_old: by the weights that sampled.
    Both are without the critique in the prompt. advantages: (B,). weights: (B, T), w_t of Eq. 4
    for revisions and 1 otherwise. mask: (B, T), 1 on real tokens and 0 on padding. Returns a
    scalar.
    Paper: Eq. 6 has one expectation over samples and tokens. Here the mean is over the tokens of
    each sample, and then over the B samples. This, and the two bounds of the clipping, are those
    of the authors' code.
    """
    rho = (logp - logp_old.detach()).exp()
    A = advantages[:, None]
    # The weight stands outside the clip. Inside, it would change which tokens are clipped.
    J = weights.detach() * torch.min(rho * A, rho.clamp(1 - clip_low, 1 + clip_high) * A)
    return ((J * mask).sum(1) / mask.sum(1).clamp(min=1)).mean()


# --------------------------------------------------------------------------------------- prompts

# Paper: its instructions are a system turn. Here they stand in front of the problem, because the
# chat templates of some models refuse a system turn, or drop it.
SOLVER = r"Solve the problem step by step and put the final answer in \boxed{}."
CRITIC = ("You see a problem and a failed attempt. Name the most valuable mistake and give short, "
          "reusable tips for a fresh attempt. Never state the final answer. Write the tips between "
          "<critique> and </critique>.")


def solver_prompt(problem, critique=""):
    """The text that asks for an attempt at `problem`, with the latest critique if there is one.

    A revision is a fresh attempt: its prompt holds no failed attempt, no older critique and no
    reward. Without a critique this is the prompt of a first attempt. Revisions are trained under
    that one, too.
    Paper: it does not say what follows an empty critique. Here it is a plain second attempt.
    """
    tips = f"\n\nTips from the critic of an earlier attempt:\n{critique}" if critique else ""
    return f"{SOLVER}\n\nProblem:\n{problem}{tips}"


def critic_prompt(problem, attempt):
    """The text that asks for a critique of a failed attempt. It does not hold the right answer."""
    return f"{CRITIC}\n\nProblem:\n{problem}\n\nFailed attempt:\n{attempt}"


def extract_critique(text):
    """The text in the last <critique> tags, or all of it if there are no tags."""
    return text.rpartition("<critique>")[2].partition("</critique>")[0].strip()


def chat_text(tokenizer, prompt):
    """`prompt` as a user's turn, by the chat template. It ends where the assistant begins.

    A model that can switch its thinking off, such as Qwen3, does so. Some templates print the
    date. Here it is always the same one, so that a run can be repeated tomorrow.
    """
    date = "{% macro strftime_now(format) %}1 January 2026{% endmacro %}"
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], chat_template=date + tokenizer.get_chat_template(),
        tokenize=False, add_generation_prompt=True, enable_thinking=False)


def without_control_tokens(tokenizer, text):
    """`text` with a space in place of each control token, such as <|im_end|>.

    Control tokens are the special ones, and those that the chat template itself prints. Without
    the space, the texts before and after could join to a new one.
    """
    template = chat_text(tokenizer, "")
    for token in tokenizer.added_tokens_decoder.values():
        if token.special or (token.content.strip() and token.content in template):
            text = text.replace(token.content, " ")
    return text


def encode_chat(tokenizer, prompt):
    """Token ids (a list) of a prompt in the chat template.

    An attempt or a critique is model output that stands in a user's turn. A control token in it
    could end that turn, so it becomes a space.
    """
    text = chat_text(tokenizer, without_control_tokens(tokenizer, prompt))
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def visible_text(tokenizer, prompt, completion):
    """The text of a completion after its thoughts, without control tokens.

    prompt, completion: token ids. Thoughts stand between <think> and </think>. Some templates
    print <think> at the end of the prompt. What follows a <think> that never ends does not count.
    """
    opened = tokenizer.decode(prompt).rstrip().endswith("<think>")
    text = ("<think>" if opened else "") + tokenizer.decode(completion)
    text = text.rpartition("</think>")[2].partition("<think>")[0]
    return without_control_tokens(tokenizer, text).strip()


# ------------------------------------------------------------------------ sampling and log-probs

def stop_tokens(model, tokenizer):
    """The set of token ids that end a completion.

    These are the EOS ids of the tokenizer and of the checkpoint, and the token that ends the
    assistant's turn in the chat template. The last one differs from EOS in some base models.
    Without it, their answers would never end. What follows the answer "zebra" is that token.
    """
    eos = model.generation_config.eos_token_id
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "zebra"}]
    after = tokenizer.apply_chat_template(turns, tokenize=False).rpartition("zebra")[2].lstrip()
    ends = [i for i, t in tokenizer.added_tokens_decoder.items() if after.startswith(t.content)]
    return {*ends, tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])} - {None}


@torch.no_grad()
def sample(model, tokenizer, prompts, max_new_tokens, temperature=1.0, piece=64):
    """Sample one completion for each prompt with Hugging Face `generate`. Temperature 0 is greedy.

    prompts: lists of token ids, none empty. Returns (completions, truncated). Completions are
    lists of token ids up to and including the first stop token. truncated: a bool for each, True
    if it has no stop token within max_new_tokens.

    All prompts form one batch. Each call of `generate` adds at most `piece` tokens. Between two
    calls the finished rows leave the batch, so that short completions do not wait for long ones.
    The price is small: each call reads the unfinished rows again.
    """
    stops = stop_tokens(model, tokenizer)
    # The generation config of the checkpoint may cut the distribution (Qwen3: top_k 20). Then the
    # policy that samples is not the one that is scored. So it is replaced, also in what is saved.
    model.generation_config = transformers.GenerationConfig(
        do_sample=temperature > 0, temperature=temperature or 1.0, top_p=1.0,
        top_k=0 if temperature > 0 else None, eos_token_id=sorted(stops), pad_token_id=min(stops))
    model.eval()
    completions = [[] for _ in prompts]
    live = list(range(len(prompts)))            # the prompts whose completions have not ended
    tokens_left = max_new_tokens
    while live and tokens_left > 0:
        rows = [torch.tensor(prompts[i] + completions[i], device=model.device) for i in live]
        ids = pad_sequence(rows, batch_first=True, padding_value=-1, padding_side="left")  # (B, L)
        # Any id will do as padding, because it is masked.
        sampled = model.generate(ids.clamp(min=0), attention_mask=(ids >= 0).long(),
                                 max_new_tokens=min(piece, tokens_left))
        tokens_left -= piece
        for i, tokens in zip(live, sampled[:, ids.shape[1]:].tolist()):
            ends = [t + 1 for t, token in enumerate(tokens) if token in stops]
            completions[i] += tokens[:ends[0]] if ends else tokens
        live = [i for i in live if completions[i][-1] not in stops]
    return completions, [i in live for i in range(len(prompts))]


def completion_logprobs(model, prompts, completions, temperature=1.0):
    """log pi(y_t | prompt, y_<t) of every completion token, at `temperature`. Differentiable.

    prompts, completions: B lists of token ids, none empty. Pass the ids that were sampled, not
    their text. Returns (logp, mask), both (B, T) float32, where T is the length of the longest
    completion. On padding both are 0.
    """
    # No dropout. But layers recompute their activations in training mode only.
    for module in model.modules():
        module.training = getattr(module, "gradient_checkpointing", False)
    rows = [torch.tensor([*p, *c], device=model.device) for p, c in zip(prompts, completions)]
    # The padding is on the right. Causal attention does not look there, so no mask is needed.
    ids = pad_sequence(rows, batch_first=True)                      # (B, L)
    logits = model(input_ids=ids, use_cache=False).logits           # (B, L, V)
    logp = []
    for row, scores, prompt in zip(rows, logits, prompts):
        # The scores at t - 1 predict token t. Those of the prompt are not made float32: with
        # V = 151,936 (Qwen3), they would be the largest tensor of the update.
        scores = scores[len(prompt) - 1:len(row) - 1].float() / temperature     # (T, V)
        targets = row[len(prompt):]                                             # (T,)
        # Cross-entropy is minus the log-prob.
        logp.append(-torch.nn.functional.cross_entropy(scores, targets, reduction="none"))
    mask = [torch.ones_like(row) for row in logp]
    return pad_sequence(logp, batch_first=True), pad_sequence(mask, batch_first=True)


# ------------------------------------------------------------------------ sessions (Algorithm 1)

@dataclasses.dataclass
class Turn:
    """One output of the model: a first attempt, a critique or a revision.

    query, session      the numbers of the problem and of the session in the batch
    part                "first", "critique" or "revision"
    prompt              token ids under which it was sampled
    free_prompt         token ids under which it is trained: without a critique
    completion          the token ids that were sampled
    text                what they say
    truncated           whether it was cut off at the length limit
    reward, advantage   of Eq. 3 or the answer checker; of Eq. 5, set by `update`
    weights             w of each token, set by `update`; empty if the advantage is 0
    """
    query: int
    session: int
    part: str
    prompt: list
    free_prompt: list
    completion: list
    text: str
    truncated: bool
    reward: float = 0.0
    advantage: float = 0.0
    weights: tuple = ()

    @property
    def group(self):
        """The group of Eq. 5. Revisions join first attempts: both are trained under q alone."""
        return (self.query, "critic" if self.part == "critique" else "solver")


def outcome_reward(text, problem, truncated):
    """The reward of an attempt: 1 if it is right and complete, else 0.

    To train on another task, replace this function. Rewards may be anything in [0, 1]; 1 means
    solved.
    """
    return 0.0 if truncated else float(is_correct(text, problem["answer"]))


def generate_turns(model, tokenizer, part, sessions, prompts, config, free_prompts=None):
    """Sample the next turn of each session: a list of Turns, still without rewards.

    sessions: their numbers in the batch. prompts: for each of them, the text to sample from.
    free_prompts: for each of them, the token ids to train under; None: those of its prompt.
    """
    prompts = [encode_chat(tokenizer, prompt) for prompt in prompts]
    limit = config.max_critique if part == "critique" else config.max_response
    completions, truncated = [], []
    for start in range(0, len(prompts), config.sample_batch):
        batch = prompts[start:start + config.sample_batch]
        sampled, cut_off = sample(model, tokenizer, batch, limit, config.temperature)
        completions += sampled
        truncated += cut_off
    texts = [visible_text(tokenizer, p, c) for p, c in zip(prompts, completions)]
    columns = zip(sessions, prompts, free_prompts or prompts, completions, texts, truncated)
    # Problem q has the sessions q * G to q * G + G - 1. `rest` follows the fields of Turn.
    return [Turn(s // config.samples, s, part, *rest) for s, *rest in columns]


def rollout(model, tokenizer, problems, config, critic=None):
    """Algorithm 1: G sessions (config.samples) of at most K attempts (config.rounds) a problem.

    problems: dicts with "problem" and "answer". critic: another model that writes the critiques,
    with the same tokenizer; by default it is `model`. Returns a list of Turns with their rewards,
    session by session.
    """
    texts = [problem["problem"] for problem in problems for _ in range(config.samples)]

    def attempt(part, numbers, critiques, free_prompts=None):
        """Sample an attempt in each of these sessions, and reward it."""
        prompts = [solver_prompt(texts[s], critique) for s, critique in zip(numbers, critiques)]
        turns = generate_turns(model, tokenizer, part, numbers, prompts, config, free_prompts)
        for turn in turns:
            turn.reward = outcome_reward(turn.text, problems[turn.query], turn.truncated)
        return turns

    sessions = [[turn] for turn in attempt("first", range(len(texts)), [""] * len(texts))]
    for _ in range(config.rounds - 1 if config.method == "icrl" else 0):
        live = [s for s, turns in enumerate(sessions) if turns[-1].reward != 1.0]
        prompts = [critic_prompt(texts[s], sessions[s][-1].text) for s in live]
        critiques = generate_turns(critic or model, tokenizer, "critique", live, prompts, config)
        tips = [extract_critique(critique.text) for critique in critiques]
        # A revision is trained under the prompt of the session's first attempt.
        revisions = attempt("revision", live, tips, [sessions[s][0].prompt for s in live])
        for s, critique, revision in zip(live, critiques, revisions):
            critique.reward = critic_reward(sessions[s][-1].reward, revision.reward)
            sessions[s] += [critique, revision]
    return [turn for session in sessions for turn in session]


# ------------------------------------------------------------------------------------ the update

def make_optimizer(model, config):
    """Move `model` to its device and return AdamW over its weights.

    With --bf16 the device holds bfloat16 weights and float32 gradients, 6 bytes a parameter
    instead of 16. AdamW works on float32 copies of the weights in CPU memory (the masters): in
    bfloat16, steps as small as 1e-6 would be rounded away.
    """
    masters = list(model.parameters())
    if config.bf16:
        masters = [torch.nn.Parameter(weight.detach().clone()) for weight in masters]
        # Only the weights become bfloat16. Rounded buffers of RoPE would move the positions.
        for weight in model.parameters():
            weight.data = weight.data.bfloat16()
            # The gradients of micro-batches are added up. In bfloat16 the sum would be rounded.
            weight.grad_dtype = torch.float32
    model.to(config.device)
    # cuDNN's attention would compile anew for each length of the text.
    torch.backends.cuda.enable_cudnn_sdp(False)
    # Paper: it does not give the betas and the weight decay. These are the authors' code's.
    return torch.optim.AdamW(masters, config.lr, betas=(0.9, 0.98), weight_decay=0.1, fused=True)


def optimizer_step(model, optimizer, grad_clip=1.0):
    """Clip the gradients, take a step and clear them. Returns their norm before clipping.

    If the norm is not finite, no step is taken.
    Paper: it does not give grad_clip. This is the value of the authors' code.
    """
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip).item()
    if math.isfinite(norm):
        # Without --bf16 the masters are the weights themselves.
        masters = optimizer.param_groups[0]["params"]
        for weight, master in zip(model.parameters(), masters):
            master.grad = None if weight.grad is None else weight.grad.to(master)
        optimizer.step()
        for weight, master in zip(model.parameters(), masters):
            weight.data.copy_(master.data)
    model.zero_grad()
    return norm


def micro_batches(turns, budget):
    """Yield all `turns`, in lists of turns of about the same length.

    With its padding, a list has at most `budget` tokens. A longer turn is alone.
    """
    turns = sorted(turns, key=lambda t: -len(t.prompt + t.completion))
    while turns:
        rows = max(1, budget // len(turns[0].prompt + turns[0].completion))
        yield turns[:rows]
        turns = turns[rows:]


def token_weights(model, batch, logp_free, config):
    """The weights (B, T) of a micro-batch: w of Eq. 4 for revisions, and 1 for all other turns.

    batch: Turns of one part. logp_free: (B, T), their log-probs without a critique. The log-probs
    with it come from the same kind of pass and not from `generate`: in bfloat16 the two differ.
    """
    w = torch.ones_like(logp_free)
    if batch[0].part == "revision":
        prompts, completions = [t.prompt for t in batch], [t.completion for t in batch]
        with torch.no_grad():
            logp_guided, _ = completion_logprobs(model, prompts, completions, config.temperature)
        w = calibration_ratio(logp_free, logp_guided)
    for turn, row in zip(batch, w.tolist()):
        turn.weights = row[:len(turn.completion)]
    return w


def update(model, optimizer, turns, config):
    """Take the optimiser step(s) of one rollout on Eq. 6. Returns a dict of figures to log."""
    advantages = role_advantages([t.reward for t in turns], [t.group for t in turns])
    for turn, advantage in zip(turns, advantages.tolist()):
        turn.advantage = advantage
    # A turn with advantage 0 has no gradient. It is left out, but it counts in the mean over all.
    # Paper: it does not say what to do if all advantages are 0. Here there is no step, because
    # AdamW would still move the weights, by its momentum and by weight decay.
    active = [turn for turn in turns if turn.advantage != 0]
    batches = []        # lists of turns of one part: only revisions need a second pass
    for part in ("first", "critique", "revision"):
        batches += micro_batches([t for t in active if t.part == part], config.micro_tokens)
    # flat: the share of turns with advantage 0.
    figures = {"flat": 1 - len(active) / len(turns), "objective": 0.0, "grad_norm": 0.0}
    at_rollout = []                             # (log pi_old, w) of each micro-batch
    for inner in range(config.inner_steps if active else 0):
        for number, batch in enumerate(batches):
            prompts, completions = [t.free_prompt for t in batch], [t.completion for t in batch]
            logp, mask = completion_logprobs(model, prompts, completions, config.temperature)
            if inner == 0:
                # No weight has moved yet, so this pass gives log pi_old, too.
                at_rollout.append((logp.detach(), token_weights(model, batch, logp, config)))
            logp_old, w = at_rollout[number]
            A = torch.tensor([turn.advantage for turn in batch], device=logp.device)
            # icrl_objective is a mean over this micro-batch. The factor makes it a part of the
            # mean over all turns. So the gradients of the micro-batches add up to exactly the
            # gradient of the whole batch.
            J = icrl_objective(logp, logp_old, A, w, mask) * len(batch) / len(turns)
            (-J).backward()
            figures["objective"] += J.item() / config.inner_steps
        figures["grad_norm"] = optimizer_step(model, optimizer)
    ratios = [w for turn in active if turn.part == "revision" for w in turn.weights]
    return {**figures, "w_mean": mean(ratios), "w_capped": mean(w == 2.0 for w in ratios)}


# -------------------------------------------------------------------------------------- training

def train(config):
    """Train as `config` says. Returns the rows of metrics.jsonl: step 0, and one for each step.

    A run may be stopped at any moment. With --resume it goes on from its last checkpoint. On a
    CPU the result then equals that of an uninterrupted run, bit for bit.
    """
    run, problems, heldout, model, tokenizer, optimizer, metrics = prepare(config)
    for step in tqdm(range(len(metrics), config.steps + 1), desc=str(run)):
        # Each step has its own seed. So a resumed run needs no saved random state, and an
        # evaluation between two steps changes nothing. The factor is larger than any number of
        # steps.
        torch.manual_seed(1_000_003 * config.seed + step)
        places = range((step - 1) * config.queries, step * config.queries)
        batch = [problems[place % len(problems)] for place in places]

        turns = rollout(model, tokenizer, batch, config)
        figures = update(model, optimizer, turns, config)
        metrics.append({"step": step, **rollout_figures(turns), **figures})

        write_turns(run / f"{step}-training.jsonl", turns, batch)
        if step == config.steps or step % config.eval_every == 0:
            show_sessions(turns, batch, tokenizer)
            log = run / f"{step}-heldout.jsonl"
            metrics[-1]["heldout"] = evaluate(model, tokenizer, heldout, config, log)
            save(run, model, tokenizer, optimizer, metrics)
        write_json(run / "metrics.jsonl", metrics)
    return metrics


def prepare(config):
    """Load all that `train` needs. For a new run, measure the accuracy before training."""
    if config.device == "cpu" and config.model == Config.model:
        # With matrices as small as these, more threads wait for each other.
        torch.set_num_threads(1)
    problems, heldout = load_problems(config.data), load_problems(config.heldout)
    random.Random(config.seed).shuffle(problems)            # the order of every epoch
    if {p["problem"] for p in problems} & {p["problem"] for p in heldout}:
        raise UsageError("--data and --heldout share problems")
    model, tokenizer = load_model(config.model, config)
    check_context(model, tokenizer, problems + heldout, config)
    optimizer = make_optimizer(model, config)
    run = Path(config.resume or config.out)
    run.mkdir(parents=True, exist_ok=config.resume != "")   # two runs never share a folder
    write_json(run / "config.json", [vars(config)])
    if (run / "checkpoint.pt").exists():
        metrics = restore(run, model, optimizer)
    else:
        before = evaluate(model, tokenizer, heldout, config, run / "0-heldout.jsonl")
        tqdm.write(f"before training: accuracy {before['accuracy without critique']:.2f}")
        metrics = [{"step": 0, "heldout": before}]
        write_json(run / "metrics.jsonl", metrics)
    return run, problems, heldout, model, tokenizer, optimizer, metrics


# Models whose samples and log-probs differ, but too little for the test in load_model to see it
# (transformers 5.24).
UNFIT = {"zamba2", "nemotron_h", "recurrent_gemma"}


def load_model(name, config):
    """Load a Hugging Face checkpoint: (model, tokenizer). The model is float32, in CPU memory.

    Raises UsageError for a model with which sampling or training would go wrong. It does not see
    that Phi-3 changes its positions beyond its original context.
    """
    tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        name, dtype=torch.float32, use_safetensors=True, output_loading_info=True)
    if report["missing_keys"] or getattr(model.config, "quantization_config", None):
        raise UsageError(f"{name}: weights are missing or quantised; use the full model")
    # Some checkpoints ask for further outputs. They cost memory, and `save` would fail.
    for switch in ("output_attentions", "output_hidden_states", "output_router_logits"):
        setattr(model.config.get_text_config(), switch, False)
    if config.checkpointing:
        model.activation_checkpointing_enable()
    if not tokenizer.chat_template:
        raise UsageError("this model has no chat template; use its instruct version")
    # Prompts must not lose text.
    line = "3 + 4 = 7\n\\boxed{x y}"
    prompts = [encode_chat(tokenizer, line * n) for n in range(1, 9)]
    if line not in tokenizer.decode(prompts[0]):
        raise UsageError("the tokenizer or chat template of this model changes the problem")
    if min(stop_tokens(model, tokenizer), default=-1) < 0:
        raise UsageError("this model has no valid token for the end of a text (eos_token_id)")
    # Samples must be what the log-probs say, also for prompts of unlike lengths in one batch. At
    # temperature 0.01, the most likely token has a log-prob near 0. One below -5 shows that the
    # model looks at the padding or at later tokens, or that some dropout cannot be switched off.
    completions, _ = sample(model, tokenizer, prompts, max_new_tokens=20, temperature=0)
    logp, _ = completion_logprobs(model, prompts, completions, temperature=0.01)
    if not logp.min() > -5 or model.config.model_type in UNFIT:
        raise UsageError("this model does not sample what its log-probs say (or it has dropout)")
    return model, tokenizer


def check_context(model, tokenizer, problems, config):
    """Raise UsageError, before anything is sampled, if a problem does not fit in the context."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    longest = max((p["problem"] for p in problems), key=lambda text: len(text.encode()))
    # The longest input is the critic's: it reads the problem and an attempt, and then writes.
    prompt = encode_chat(tokenizer, critic_prompt(longest, ""))
    if len(prompt) + config.max_response + config.max_critique > context:
        raise UsageError(f"{longest[:40]!r} does not fit in {context} tokens; lower --max_response")


def save(run, model, tokenizer, optimizer, metrics):
    """Save the model in run/model, and in run/checkpoint.pt what --resume needs."""
    model.save_pretrained(run / "model")
    tokenizer.save_pretrained(run / "model")
    masters = optimizer.param_groups[0]["params"]
    saved = {"masters": masters, "optimizer": optimizer.state_dict(), "metrics": metrics}
    torch.save(saved, run / "unfinished.pt")
    # A crash before this line leaves the old checkpoint as it was.
    (run / "unfinished.pt").replace(run / "checkpoint.pt")


def restore(run, model, optimizer):
    """Go back to the last checkpoint of a run. Returns its metrics."""
    saved = torch.load(run / "checkpoint.pt", map_location="cpu", weights_only=True)
    for weights in (model.parameters(), optimizer.param_groups[0]["params"]):
        for weight, value in zip(weights, saved["masters"]):
            weight.data.copy_(value)
    optimizer.load_state_dict(saved["optimizer"])
    return saved["metrics"]


def mean(values):
    """The mean as a float, or None if there are no values: a 0 would look like a result."""
    values = list(values)
    return float(sum(values) / len(values)) if values else None


def rollout_figures(turns):
    """Tokens of a rollout, and the mean reward and the share cut off of its three parts."""
    figures = {"tokens": sum(len(turn.completion) for turn in turns)}
    for part in ("first", "critique", "revision"):
        of_part = [turn for turn in turns if turn.part == part]
        figures[f"{part}_reward"] = mean(turn.reward for turn in of_part)
        figures[f"{part}_truncated"] = mean(turn.truncated for turn in of_part)
    return figures


def write_json(path, rows):
    """Write a line of JSON for each row."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_turns(path, turns, problems):
    """Write a line of JSON for each turn."""
    write_json(path, [
        {"problem": problems[turn.query]["problem"], "session": turn.session, "part": turn.part,
         "text": turn.text, "reward": turn.reward, "truncated": turn.truncated} for turn in turns])


def show_sessions(turns, problems, tokenizer):
    """Print a session for each kind of problem: one in which a critique helped, if there is one."""
    tqdm.write("\nOne session of each kind. «Tokens» in these marks have w < 0.1.")
    for kind in sorted({problem["kind"] for problem in problems}):
        of_kind = [turn for turn in turns if problems[turn.query]["kind"] == kind]
        shown = max(of_kind, key=lambda t: t.part == "critique" and t.reward > 0)
        tqdm.write(f"\n  problem   {problems[shown.query]['problem']}")
        for t in of_kind:
            if t.session == shown.session:
                tqdm.write(f"  {t.part:9} {marked_text(t, tokenizer)}  -> reward {t.reward:g}")


def marked_text(turn, tokenizer):
    """The text of a turn. Its tokens with w below 0.1 stand between « and »."""
    pieces = [tokenizer.decode(token, skip_special_tokens=True) for token in turn.completion]
    for t, w in enumerate(turn.weights):
        if w < 0.1 and pieces[t]:
            pieces[t] = f"«{pieces[t]}»"
    return "".join(pieces).replace("»«", "").strip()


# ------------------------------------------------------------------------------------ evaluation

def evaluate(model, tokenizer, problems, config, log=None, critic=None):
    """Measure what the solver can do without critique, and what a critique adds.

    Returns a dict of figures. log: a file for all turns. critic: another model for the critiques.
    The random draws are the same at every call. An attempt is right if it earns 1.
    """
    torch.manual_seed(config.seed)
    config = dataclasses.replace(config, method="icrl", rounds=2, samples=config.eval_samples)
    turns = rollout(model, tokenizer, problems, config, critic)
    if log:
        write_turns(log, turns, problems)
    first = [turn for turn in turns if turn.part == "first"]
    fixed = [turn.reward == 1 for turn in turns if turn.part == "revision"]
    accuracy = mean(turn.reward == 1 for turn in first)
    figures = {"accuracy without critique": accuracy}
    for kind in sorted({problem["kind"] for problem in problems} - {""}):
        of_kind = [turn for turn in first if problems[turn.query]["kind"] == kind]
        figures[kind] = mean(turn.reward == 1 for turn in of_kind)
    figures["accuracy after one critique"] = accuracy + sum(fixed) / len(first)
    figures["wrong answers that a critique fixes"] = mean(fixed)
    figures["interval"] = interval(accuracy, len(problems))
    return figures


def interval(p, n, z=1.96):
    """Wilson's 95% interval (low, high) of a share p of n problems. It has a width at 0 and 1 too.

    With several attempts per problem it is wider than need be.
    """
    middle = p + z**2 / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return (middle - half) / (1 + z**2 / n), (middle + half) / (1 + z**2 / n)


# -------------------------------------------------------------------------------------- problems

def load_problems(path):
    """Read problems from a JSONL file: a list of dicts with "problem", "answer" and "kind".

    The text is under "problem" or "question". The answer is under "answer" or "solution": bare, a
    list, behind "####" (GSM8K), or in the last box (MATH). Exact repeats are dropped. Any other
    line that cannot be used is an error, because to train on a part of the file without a word
    would be worse. Raises UsageError with the number of the line.
    """
    problems = {}
    lines = Path(path).read_text(encoding="utf-8-sig").rstrip().split("\n")
    for number, line in enumerate(lines, 1):
        try:
            problem = read_problem(json.loads(line))
            if problems.setdefault(problem["problem"], problem)["answer"] != problem["answer"]:
                raise ValueError("the same problem has another answer further up")
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise UsageError(f"{path}, line {number}: {error!r}. A line must be like "
                             '{"problem": "1 + 1?", "answer": "2"}') from error
    return list(problems.values())


def read_problem(row):
    """The problem, its answer and its kind, three strings, in a row of a data file."""
    problem = row["problem"] if "problem" in row else row["question"]
    answer = row["answer"] if "answer" in row else row["solution"]
    if str(answer).startswith('["'):
        answer = json.loads(answer)             # some data sets have a list as text
    if isinstance(answer, list):
        answer = ", ".join(answer)
    answer = str(answer).rpartition("####")[2].strip()
    if r"\boxed" in answer:
        answer = extract_answer(answer) or ""
    # No model can give a sentence, "A. 5" or what is not equal to itself.
    words = re.findall("[A-Za-z]{2,}", re.sub(r"\\[A-Za-z]+|\{[a-z]*\}", " ", answer))
    labelled = re.match(r"\(?[A-F][.):]+ *[^\s.,)]", answer)
    if labelled or len(words) > 5 or not is_correct(rf"\boxed{{{answer}}}", answer):
        raise ValueError(f"no model can give the answer {answer!r}")
    return {"problem": problem.strip(), "answer": answer, "kind": str(row.get("kind", ""))}


# ------------------------------------------------------------------------------- answer checking
#
# is_correct compares the last box of a response with the gold answer, in three steps:
#   1. normalise   Bring both to one spelling: \dfrac12 is \frac1{2}, and 1,234 is 1234.
#   2. same        Take lists, names, tuples and units apart.
#   3. compute     Compute what is left. Two formulas are equal if their values are, when each
#                  variable has the same random value in both.
# What cannot be computed is compared as text. Nothing is handed to Python or sympy to run.
# A checker that accepts a wrong answer trains the model to give it. So only words that are listed
# below may be missing: 5 cm is 5, but 3 million is not 3.

# The spelling that we keep, and those that become it. A matrix is ⟦(1,2),(3,4)⟧, a set ⦃1,2⦄.
SPELLINGS = {
    "": r"\left \right \displaystyle", " ": r"\( \) \[ \] $ % \% ~ \, \; \quad", "),(": r"\\",
    "⟦(": r"\begin{pmatrix} \begin{bmatrix} \begin{matrix}", "⦃": r"\{", "⦄": r"\}", "$": r"\$",
    ")⟧": r"\end{pmatrix} \end{bmatrix} \end{matrix}", r"\frac": r"\dfrac \tfrac \cfrac",
    r"\text": r"\mathrm \mbox \textbf", "*": r"\cdot \times ×", "^": "**", r"\pi ": "π", "^2": "²",
    "-": "− –", ",": "{,} & ;", "=": r"\in", "≤": r"\le \leq", "≥": r"\ge \geq", "≠": r"\ne \neq",
    "±": r"\pm", "∪": r"\cup", "∞": r"\infty", "°": r"\circ", r"\sqrt ": "√", r"\frac12": "½"}
OURS = {other: ours for ours, others in SPELLINGS.items() for other in others.split()}
# What is looked up there: a command or a sign.
SIGN = r"\\(?:begin|end)\{[a-z]*\}|\\[A-Za-z]+|\\.|\*\*|\{,\}|[^A-Za-z0-9 ]"

# A variable is x, a_1, \omega or R_{max}. A name is a variable, f(x) or (x,y), and then =.
GREEK = "pi|alpha|beta|gamma|delta|epsilon|eta|theta|lambda|mu|nu|rho|sigma|tau|phi|psi|omega|hbar"
VARIABLE = rf"(?:[A-Za-z]|\\(?i:{GREEK})(?![A-Za-z]))(?:_[A-Za-z0-9]|_\{{[^{{}}]*\}})?'*"
NAME = rf"(?:^|(?<=,))(?:{VARIABLE}|(?:{VARIABLE})?\({VARIABLE}(?:,{VARIABLE})*\))="
# A unit may be missing on one side. Two different units make two different answers.
UNITS = ("mm|cm|km|kg|ft|inch|inches|feet|mile|mph|(?:centi|kilo)?(?:meter|gram)|pound|second|"
         "minute|hour|day|week|month|year|dollar|cent|percent|degree|unit|point|way|people|student")
UNIT = rf"(?:(?<=[0-9)}}])| )(?:(?:square |sq |cubic |per |/)?(?:{UNITS})s?(?:\^[23])? ?)+$"

# What to find, and what to put in its place, in this order.
REWRITES = [
    # sqrt(2) is \sqrt(2). Some models escape \\frac twice. Then other spellings become ours.
    (r"(?<![\\A-Za-z])(sqrt|pi|ln|sin|cos|tan)(?![A-Za-z])", r"\\\1"),
    (r"(?<!\\)\\\\(?=[a-z]{3})", r"\\"), (SIGN, lambda match: OURS.get(match[0], match[0])),
    # Degrees may be left out. 8\text{cm} is 8 cm.
    (r"\^\{ *° *\}|\^?°|\\(?= )", " "), (r"\\! ?", ""), (r"\\text *\{([^{}]*)\}", r" \1 "),
    # 1,234 is a number. But (1,234) is a pair, and 1, 234 a list.
    (r"(?<![\d,.(\[{⦃])(?<![(\[⦃]-)\d{1,3}(,\d{3})+(?![\d,])", lambda m: m[0].replace(",", "")),
    # \frac12 is \frac1{2}. 1\frac{1}{2} and 1 1/2 are sums.
    (r"(\\frac *(?:\d|\{[^{}]*\})|\\sqrt) *(\d)", r"\1{\2}"),
    (r"(?<![\w.}^/])(\d+)( *\\frac(?:\d|\{\d+\})\{\d+\}| \d+/\d+)", r"(\1+\2)"),
    # x^{2} is x^2. Spaces have a meaning only between letters and digits.
    (r"([_^])\{ *(\w) *\}", r"\1\2"), (r"\s*([^A-Za-z0-9\s])\s*", r"\1"),
    # $5 is 5 dollars. A set needs no brackets, and a capital letter none: (A) is A.
    (r"\+?(∞|(?i:infinity))", "∞"), (r"\$(\d+(\.\d+)?)", r"\1 dollars"),
    (r"^(.*=)?(?:⦃([^⦃⦄]*)⦄|\{([^{}]*)\}|\(([A-Z])\))$", r"\1\2\3\4"),
    # 1±2 are two answers, and so is 3 and 4. But x>1 and x<3 is not x>1 or x<3.
    (r"^([^,±]*)±([^,±]*)$", r"\1+\2,\1-\2"), (r",? ?\b(and|or)\b ?(?=[^<>≤≥≠]*$)", ",")]

# The pieces of a formula. 2e3 and 1.5e-7 are numbers, but 2e-1 is twice the number e, minus 1.
# Words, and calls such as f(2x) or I(0), stay in one piece: they cannot be computed.
TOKEN = (rf"[A-Za-z]{{4,}}|[fghuFGHPUXY]'?\(|{VARIABLE}\(\w+\)|{VARIABLE}|\\sqrt(?:\[\d\])?|"
         r"\d*\.\d+(?:e-?\d{1,2})?|\d+e\d{1,2}|\d+|\\[A-Za-z]+|\S")
# How strongly a sign binds, and what it does.
SIGNS = {"+": (1, operator.add), "-": (1, operator.sub), "*": (2, operator.mul),
         "/": (2, operator.truediv), "^": (3, operator.pow)}
# We compute with 200 digits. Sizes under 1e-75 or above 1e75 raise an exception (0 does not). So
# no summand is too small to be seen, and 9^{9^9} cannot fill the memory.
PRECISE = decimal.Context(prec=200, Emin=-75, Emax=75, traps=[
    decimal.InvalidOperation, decimal.DivisionByZero, decimal.Overflow, decimal.Subnormal])


def extract_answer(text: str) -> str | None:
    r"""The content of the last \boxed{...}. None if there is none, or if it is never closed."""
    _, box, rest = text.replace(r"\boxed {", r"\boxed{").rpartition(r"\boxed{")
    depth = 1
    # The braces \{ and \} do not count. A box of more than 5,000 characters is no answer.
    for end, char in enumerate(re.sub(r"\\[{}]", "  ", rest[:5000])):
        depth += {"{": 1, "}": -1}.get(char, 0)
        if box and depth == 0:
            return rest[:end].strip()


def is_correct(response: str, answer: str) -> bool:
    r"""Say whether the content of the last \boxed{...} of `response` is equal to `answer`.

    It never raises. None, a float or a list is wrong, and an int stands for its text. Other
    checkers decide otherwise in some cases. These are our policies:
      - The value counts, not the form: 2/6 is 1/3. So a formula that is copied from the problem
        without solving it is right, if its value is the answer. Every checker by value does this.
      - A decimal is exact: 0.33 is not 1/3. Only from 160 equal digits on, we see no difference.
      - A variable stands for a positive number: \sqrt{x^2} is x. The letters e, i and \pi count as
        variables, too: \pi is not 3.14, and i^2 is not -1.
      - Functions such as \sin and \ln are compared as text, and so is a number above 1e75.
      - A list or a set may come in another order, if both spell its parts alike. A tuple, an
        interval or a matrix may not.
      - A name (x=5), a unit (5 cm) or one of the signs % and ° may be missing on either side. But
        35% is not 0.35, and \cos 30° is \cos 30. A base (204_5) may be missing in the response.
      - Words ignore case, and so do the letters A to E. Other letters do not.
    """
    if not isinstance(response, str) or not isinstance(answer, (str, int)):
        return False
    try:
        gold, pred = str(answer), extract_answer(response) or ""
        short = len(gold + pred) < 300          # a longer one must be the same text
        return gold == pred != "" or short and same(normalise(gold), normalise(pred))
    except (ValueError, RecursionError):        # an int of 5,000 digits; too many brackets
        return False


def normalise(text):
    """`text` in our spelling."""
    for pattern, new in REWRITES:
        text = re.sub(pattern, new, text)
    return " ".join(text.split()).strip(",:").rstrip(" .")


def split(text):
    """The parts of `text` between the commas that stand outside all brackets."""
    marked, depth = "", 0
    for char in text:
        depth += (char in "([{⟦⦃") - (char in ")]}⟧⦄")
        marked += "\0" if char == "," and depth == 0 else char
    return marked.split("\0")


def same(gold, pred):
    """Say whether two answers of any kind are equal."""
    # The name x may be missing in x=5 or in x=1,x=2.
    if len(set(re.findall(NAME, f"{gold},{pred}"))) == 1:
        gold, pred = re.sub(NAME, "", gold), re.sub(NAME, "", pred)
    # A list may come in any order. But x=1, y=2 is 1, 2, and not 2, 1.
    golds, preds = split(gold), split(pred)
    any_order = ("=" in gold) == ("=" in pred)
    # A tuple, an interval or a matrix may not.
    if len(golds) == len(preds) == 1 and gold[:1] + gold[-1:] == pred[:1] + pred[-1:]:
        golds, preds, any_order = split(gold[1:-1]), split(pred[1:-1]), False
    if len(golds) == len(preds) == 1:
        return gold == pred != "" or same_value(gold, pred)
    return any_order and same_parts(sorted(golds), sorted(preds)) or same_parts(golds, preds)


def same_parts(golds, preds):
    """Say whether the parts of two answers are equal, one by one."""
    return len(golds) == len(preds) and all(map(same, golds, preds))


def same_value(gold, pred):
    """Say whether two formulas have the same value, or two words differ in case only."""
    if re.fullmatch("[A-Za-z ]+", gold + pred):
        return (len(gold) > 2 or gold in tuple("ABCDE")) and gold.casefold() == pred.casefold()
    # Only one side may leave its unit out, and only the prediction its base, as in 204_5.
    if not re.search(UNIT, pred):
        gold = re.sub(UNIT + r"|(?<=\d)_(?:\d|\{\d+\})$", "", gold)
    elif not re.search(UNIT, gold):
        pred = re.sub(UNIT, "", pred)
    try:
        gold_value, pred_value = value_of(gold), value_of(pred)
        return abs(gold_value - pred_value) <= abs(gold_value) * Decimal("1e-160")
    except (ValueError, ArithmeticError, IndexError):
        return False                            # one of them cannot be computed


def value_of(text):
    """The value of a formula. What cannot be computed raises an exception."""
    tokens = re.findall(TOKEN, text) + [""]             # the empty token is the end
    with decimal.localcontext(PRECISE):
        value = compute(tokens)
    if tokens != [""] or not value.is_finite():
        raise ValueError("two numbers without a sign, a bracket too many, or 0^{-1}")
    return value


def compute(tokens, bond=0):
    """Take a formula from the start of `tokens`, and return its value.

    It stops at a sign that is not stronger than `bond`. So 0 reads a sum, 1 a product, 2 a power,
    and 3 a number, a letter or a bracket.
    """
    token = tokens.pop(0)
    if token in ("+", "-"):
        value = SIGNS[token][1](0, compute(tokens, 2))          # -2^2 is 0-2^2
    elif token in ("(", "{"):
        value = compute(tokens)
        if tokens.pop(0) not in (")", "}"):
            raise ValueError("a bracket is not closed")
    elif token == r"\frac":
        value = compute(tokens, 3) / compute(tokens, 3)
    elif token.startswith(r"\sqrt"):
        value = compute(tokens, 3) ** (1 / Decimal(token[6:-1] or 2))       # as in \sqrt[3]
    elif re.fullmatch(VARIABLE, token):
        # The value depends on the name only, so it is the same on both sides.
        value = Decimal(random.Random(token).uniform(1, 2))
    else:
        value = +Decimal(token)         # This raises an exception if it is no number.
    while True:
        sign = "*" if re.match(r"[({\\A-Za-z]", tokens[0]) else tokens[0]   # 2x is 2*x
        strength, function = SIGNS.get(sign, (0, None))
        if strength <= bond:
            return value
        if sign == tokens[0]:
            tokens.pop(0)
        value = function(value, compute(tokens, 2 if sign == "^" else strength))


# ---------------------------------------------------------------------------------- command line

def parse(argv=None):
    """Read the command line. A preset, or the run to resume, sets the defaults of all flags."""
    parser = transformers.HfArgumentParser(Config, allow_abbrev=False, usage="icrl.py [--flag ...]")
    given, _ = parser.parse_known_args(argv)
    saved = PRESETS[given.preset]
    if given.resume:
        saved = json.loads((Path(given.resume) / "config.json").read_text())
        if saved.keys() != vars(given).keys():
            raise UsageError(f"{given.resume} was made by another version of this program")
    parser.set_defaults(**saved)
    config = Config(**vars(parser.parse_args(argv)))
    changed = {name for name in saved if getattr(config, name) != saved[name]} - MAY_CHANGE
    if config.resume and changed:
        raise UsageError(f"a run that is resumed keeps its {', '.join(sorted(changed))}")
    if config.device not in ("cpu", str(torch.accelerator.current_accelerator(True))):
        raise UsageError(f"--device {config.device}: torch finds no such device here")
    config.out = config.out or f"runs/{datetime.datetime.now():%Y%m%d-%H%M%S-%f}"
    return config


def print_table(before, after):
    """Print the figures of two evaluations, and the interval of the last accuracy."""
    note = "   ({:.2f} to {:.2f})".format(*after["interval"])
    print(f"\n{'':38} before   after")
    for name in before:
        if name != "interval":
            cells = ["-" if row[name] is None else f"{row[name]:.2f}" for row in (before, after)]
            print(f"{name:38} {cells[0]:>6}  {cells[1]:>6}{note}")
            note = ""                           # it belongs to the first line


def main(argv=None):
    """Train, and print the figures before and after."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    # A console may lack a letter. A notebook has another kind of output.
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")
    try:
        config = parse(argv)
        metrics = train(config)
    except (UsageError, OSError, torch.OutOfMemoryError) as error:
        sys.exit(f"icrl.py: {error}")
    print_table(metrics[0]["heldout"], metrics[-1]["heldout"])
    if config.preset == "tiny" and config.method == "icrl":
        print("\nto compare: python icrl.py --method grpo")


if __name__ == "__main__":
    main()
