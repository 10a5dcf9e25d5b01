#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""ICRL in one file: a model learns from its own critique, and then no longer needs it (arXiv 2605.15224).

One language model plays two roles, told apart by their prompts alone.
  1. The solver attempts a problem. If it fails, the critic (same weights) writes a critique of the attempt, and the
     solver tries afresh with the critique in its prompt: a session of at most K attempts (Algorithm 1).
  2. The critic is paid by what its critique did for the solver                                           (Eq. 3).
  3. A guided revision trains the solver *as if it had never seen the critique*; each of its tokens counts by how
     likely the unaided solver was to write it, w_t = pi(y_t | q) / pi(y_t | q, c)                        (Eq. 4).
  4. Advantages are normalised per (problem, role), so that critics compete with critics                  (Eq. 5).
  5. One clipped policy-gradient step moves both roles at once                                            (Eq. 6).
With --method grpo the critic is off and what is left is plain GRPO: read ICRL as the difference.

Where this file departs from the paper, why, and the switch:
  a. The default model is a 0.43 M parameter toy that ships with the code, so that the method can be watched on a
     laptop; its learning rate and lengths suit it. --preset qwen3 has the paper's hyper-parameters.
  b. Sampling is Hugging Face `generate`, not an inference server: slower, but one set of weights samples and scores.
     Every log-prob is computed by `completion_logprobs`; between sampler and scorer there is only rounding.
  c. Group statistics use the unbiased standard deviation, and groups of one or of equal rewards give exactly 0
     (the paper leaves both open).
  d. Eq. 6 is averaged over each sample's tokens and then over samples; the paper writes one expectation over both.
What the authors' released code does differently from their paper is listed in the README.
"""
import argparse
import csv
import dataclasses
import itertools
import json
import random
import re
import shutil
import sys
import time
from collections import defaultdict
from fractions import Fraction
from itertools import accumulate, pairwise
from operator import add, mul, sub, truediv
from pathlib import Path

import numpy as np
import torch
from mpmath import fp                                         # comes with torch, by way of sympy
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, GenerationConfig
from transformers.utils import logging as hf_logging

HERE = Path(__file__).resolve().parent


class UsageError(ValueError):
    """What the user asked for cannot be done; the message says what is wrong, where, and what to do."""


# ---------------------------------------------------------------------------------------------------- configuration

def flag(default, help, choices=None, low=None):
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices, "low": low})


@dataclasses.dataclass
class Config:
    """Every setting of a run; each field is a command-line flag of the same name."""
    preset: str = flag("tiny", "settings to start from; other flags override them", ("tiny", "qwen3"))
    model: str = flag(str(HERE / "math_data" / "model"), "Hugging Face model, a name or a folder")
    data: str = flag(str(HERE / "math_data" / "train.jsonl"), "training problems (JSONL)")
    heldout: str = flag(str(HERE / "math_data" / "heldout.jsonl"), "evaluation problems (JSONL)")
    out: str = flag("", "run folder; empty: runs/ and the time")
    seed: int = flag(0, "seed of everything random", low=0)
    device: str = flag("auto", "cpu, cuda, ...; auto: the GPU if there is one")

    method: str = flag("icrl", "grpo is the same without a critic, K = 1", ("icrl", "grpo"))
    critic: str = flag("trained", "the model; frozen: the model as it was; placebo: nobody, it says 'Try again.'; "
                       "retry: nobody, just a second try; shuffled: the model, its critique of another problem",
                       ("trained", "frozen", "placebo", "retry", "shuffled"))
    weight: str = flag("token", "of a revision's tokens: w_t of Eq. 4; 1; sequence: one ratio for all; shaped: "
                       "Critique-GRPO's p / (p + 0.1)", ("token", "one", "sequence", "shaped"))
    groups: str = flag("role", "rewards are compared within problem and role (Eq. 5); also round; only problem",
                       ("role", "role_round", "pooled"))

    queries: int = flag(16, "problems per step", low=1)
    samples: int = flag(8, "sessions per problem (G)", low=1)
    rounds: int = flag(2, "attempts per session at most (K)", low=1)
    max_response: int = flag(48, "tokens per attempt at most", low=1)
    max_critique: int = flag(48, "tokens per critique at most", low=1)
    temperature: float = flag(1.0, "of sampling and of every log-prob", low=1e-3)
    thinking: bool = flag(False, "let a hybrid model think before it answers or criticises")

    steps: int = flag(65, "training steps", low=1)
    token_limit: int = flag(0, "stop after so many generated tokens (0: no limit)", low=0)
    inner_steps: int = flag(1, "optimiser steps per rollout; from the second on, rho is not 1", low=1)
    lr: float = flag(3e-4, "learning rate, constant", low=0.0)
    weight_decay: float = flag(0.0, "of AdamW", low=0.0)
    grad_clip: float = flag(1.0, "largest gradient norm", low=0.0)
    clip_low: float = flag(0.2, "with A < 0, rho below 1 - clip_low has no gradient", low=0.0)
    clip_high: float = flag(0.2, "with A > 0, rho above 1 + clip_high has no gradient", low=0.0)
    w_max: float = flag(2.0, "cap of the calibration ratio w", low=0.0)
    sample_batch: int = flag(256, "completions generated at a time; fewer need less memory for the cache", low=1)
    micro_tokens: int = flag(1024, "tokens per forward pass of the update; fewer need less memory", low=1)
    bf16: bool = flag(False, "compute in bfloat16; weights and optimiser stay float32")
    checkpointing: bool = flag(False, "recompute activations in the backward pass: less memory, slower")

    eval_every: int = flag(40, "steps between evaluations (0: before and after only)", low=0)
    eval_problems: int = flag(240, "problems per evaluation at most", low=1)
    eval_samples: int = flag(1, "sessions per problem in an evaluation", low=1)
    show_every: int = flag(15, "steps between printed sessions (0: none)", low=0)
    save_every: int = flag(25, "steps between checkpoints (0: none)", low=0)


PRESETS = {
    "tiny": {},                                                       # what stands above
    "qwen3": dict(model="Qwen/Qwen3-4B-Instruct-2507", lr=1e-6, weight_decay=0.1, clip_high=0.28, steps=300,
                  max_response=2048, max_critique=1024, bf16=True, checkpointing=True, sample_batch=32,
                  micro_tokens=8192, eval_every=10, show_every=1, save_every=50),     # 16 problems x 8 sessions above
}


# --------------------------------------------------------------------------------------------------- answer checking
#
# The answer checker: find the box, bring both answers to one spelling, compare them part by part.
#
# Two formulas are equal if their values are: rational numbers exactly, all others to ten digits. Variables
# get the same random values on both sides, three times over. Nothing is handed to Python or sympy to run:
# the small parser at the end reads the notation below, and what it cannot read is compared as text.

# What has several spellings, by the one that is used below. Signs that one answer carries and another leaves
# out ($, %, degrees) are spelled as nothing, like the commands that only change the looks.
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
FUNCTIONS = {name: getattr(fp, name.replace("arc", "a")) for name in (
    "sqrt exp ln log sin cos tan cot sec csc sinh cosh tanh arcsin arccos arctan".split())}
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

    What follows a `</think>` comes first; a box among the thoughts counts only if there is none behind them.
    """
    thoughts, _, rest = text.rpartition("</think>")
    return _last_box(rest) or _last_box(thoughts)


def _last_box(text):
    """Braces are paired from the end, in linear time, so that one never closed cannot swallow a later box."""
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
    gold = answer.strip() if isinstance(answer, str) else str(answer)
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
    depths = accumulate((char in "([{⟦") - (char in ")]}⟧") for char in text)
    cuts = [place for place, depth in enumerate(depths) if depth == 0 and text[place] in separators]
    return [text[start + 1:end] for start, end in pairwise([-1, *cuts, len(text)])]


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
        return base ** (exponent if len(str(base)) * abs(exponent) <= 1000 else fp.nan)
    return (complex(base) + 0) ** complex(exponent)           # + 0 turns an imaginary part of -0 into 0


# How strongly an operator binds to its left and its right. The space is the multiplication in 2x.
OPERATORS = {"=": (1, 1, sub), "+": (2, 2, add), "-": (2, 2, sub), "*": (3, 4, mul), "/": (3, 4, truediv),
             " ": (4, 4, mul), "^": (6, 5, _power)}
CLOSING = {"(": ")", "[": "]", "{": "}"}
CONSTANTS = {r"\pi": fp.pi, "e": fp.e, "i": 1j}


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
            base = rest.pop() and operand() if rest[-1] == "_" else fp.e                # \log_2 x
            exponent = rest.pop() and formula(5) if rest[-1] == "^" else Fraction(1)    # \sin^2 x
            argument = operand() if rest[-1] in CLOSING else formula(3)
            return _power(FUNCTIONS[token[1:]](complex(argument) + 0) / fp.ln(complex(base)), exponent)   # ln e = 1
        if token in CONSTANTS:
            return CONSTANTS[token]
        if re.fullmatch(VARIABLE, token):
            draw = random.Random(f"{re.sub('[{}]', '', token)} {trial}")
            return fp.rect(draw.uniform(1, 4), draw.uniform(0.1, 0.3))
        return Fraction(token)

    value = formula(0)
    if rest != [""]:
        raise ValueError
    return value


# --------------------------------------------------------------------------------------------------------- problems

def load_problems(path):
    """Problems from JSONL: an object a line with `problem` or `question`, and `answer` or `solution`.

    The answer may be the bare answer, a GSM8K solution (after '####') or a MATH solution (in its last box). Returns
    dicts with at least `problem` and `answer`. A line that cannot be used is an error that names file and line:
    training on half a data set without saying so would be worse.
    """
    problems = []
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")    # splitlines() would cut inside strings
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {path}: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UsageError(f"{path}, line {number}: not JSON: {error}") from error
        row = row if isinstance(row, dict) else {}
        problem, answer = row.get("problem", row.get("question")), row.get("answer", row.get("solution"))
        answer = str(answer) if isinstance(answer, (str, int, float)) else ""
        if "####" in answer:
            answer = answer.rpartition("####")[2]
        elif r"\boxed" in answer:
            answer = extract_answer(answer) or ""
        if not isinstance(problem, str) or not problem.strip() or not answer.strip():
            raise UsageError(f"{path}, line {number}: expected text under 'problem' or 'question' and an answer under "
                             "'answer' or 'solution'")
        problems.append({**row, "problem": problem, "answer": answer.strip()})
    if not problems:
        raise UsageError(f"{path} holds no problems")
    return problems


# ---------------------------------------------------------------------------------------------------------- prompts

SOLVER_SYSTEM = r"Solve the problem step by step and put the final answer in \boxed{}."
CRITIC_SYSTEM = (
    "You see a problem and a failed attempt. Name the most valuable mistake and give short, reusable tips "
    "for a fresh attempt. Never state the final answer. Write the tips between <critique> and </critique>.")


def solver_messages(problem, critique=None):
    """Chat messages for an attempt at `problem`, with the latest critique if there is one.

    A revision is a fresh attempt: it sees neither the failed attempt nor older critiques nor a reward. Without a
    critique (None or empty) the messages are, to the byte, those of a first attempt; these are also the ones under
    which a revision is trained.
    """
    tips = f"\n\nTips from the critic of an earlier attempt:\n{critique}" if critique else ""
    return [{"role": "system", "content": SOLVER_SYSTEM}, {"role": "user", "content": problem + tips}]


def critic_messages(problem, attempt):
    """Chat messages that ask for a critique of a failed attempt; the gold answer is not among the arguments."""
    return [{"role": "system", "content": CRITIC_SYSTEM},
            {"role": "user", "content": f"Problem:\n{problem}\n\nFailed attempt:\n{attempt}"}]


def extract_critique(text):
    """The critique in what the critic wrote: between its last tags, or everything where the tags are missing."""
    return text.rpartition("</think>")[2].rpartition("<critique>")[2].partition("</critique>")[0].strip()


def encode_chat(tokenizer, messages, thinking=False):
    """Token ids of a chat prompt that ends where the assistant's turn begins.

    Contents are data. An attempt or a critique is model output inside a user's turn, so whatever spells a control
    token (<|im_end|>) is taken out of it, again and again: taking one out can put another together.
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

def stop_tokens(model, tokenizer):
    """The ids that end a completion: the tokenizer's EOS and any that the checkpoint's generation config adds."""
    ids = model.generation_config.eos_token_id
    ids = ids if isinstance(ids, (list, tuple)) else [ids]
    return {i for i in [*ids, tokenizer.eos_token_id] if i is not None}


def pad_token(tokenizer):
    # Which id pads does not matter, even if it is EOS: lengths are known, so padding is told apart by position.
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


@torch.inference_mode()
def sample(model, tokenizer, prompts, max_new_tokens, temperature=1.0, chunk=16):
    """One completion per prompt by Hugging Face `generate`; temperature 0 is greedy.

    prompts: list of token-id lists. Returns (completions, truncated): token-id lists up to and including the first
    stop token, and a bool each for having reached `max_new_tokens` without one.

    The batch is one, and three things keep it cheap: equal prompts are read once and their cache is repeated;
    `generate` is called for `chunk` tokens at a time on a continued cache; rows that have ended leave in between.
    """
    stops = stop_tokens(model, tokenizer)
    settings = GenerationConfig(do_sample=temperature > 0, temperature=temperature or 1.0, top_k=0, top_p=1.0,
                                min_p=None, repetition_penalty=1.0, eos_token_id=sorted(stops),
                                pad_token_id=pad_token(tokenizer))
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
        place = {prompt: row for row, prompt in enumerate(unique)}
        rows = torch.tensor([place[tuple(p)] for p in prompts], device=model.device)
        live, completions = list(range(len(prompts))), [[]] * len(prompts)
        while live:
            cache.batch_select_indices(rows)
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


def completion_logprobs(model, prompts, completions, temperature=1.0, pad_token_id=0):
    """log pi(y_t | prompt, y_<t) of every completion token, at `temperature`.

    prompts, completions: B lists of token ids, none empty; the ids as they were sampled, never re-tokenised. Returns
    (logp, mask), both (B, T) float32 with T the longest completion, 0 on the padding; differentiable. Leaves the model
    in the mode in which it scores.

    No attention mask is needed: padding stands on the right, where causal attention does not look.
    """
    rows = [torch.tensor([*prompt, *completion]) for prompt, completion in zip(prompts, completions)]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad_token_id).to(model.device)  # (B, L)
    first = torch.tensor([[len(prompt)] for prompt in prompts], device=ids.device)                # (B, 1)
    length = torch.tensor([[len(completion)] for completion in completions], device=ids.device)
    place = torch.arange(ids.shape[1], device=ids.device)
    predicts = (place >= first - 1) & (place < first - 1 + length)     # (B, L): the logits at t - 1 predict token t
    mask = place[:int(length.max())] < length                          # (B, T)

    # The head turns a position into as many numbers as there are words (151,936 for Qwen3): the memory peak of the
    # update. This hook lets it see only the positions that predict a completion token, (B, L, H) -> (N, H), in any
    # architecture and before whatever that does to its logits.
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda head, inputs: (inputs[0][predicts],))
    # Dropout would make rho differ from 1 before the first step, so this is eval mode, except that Hugging Face
    # recomputes activations only in training mode (load_model sets dropout to 0).
    model.train(any(getattr(module, "gradient_checkpointing", False) for module in model.modules()))
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
        return self.prompt != self.free_prompt

    @property
    def part(self):
        return "critique" if self.role == "critic" else "first" if self.round == 1 else "revision"


def outcome_reward(text, answer, truncated):
    """r(tau) in [0, 1], the one place to change for another task. What was cut off at its length limit earns 0."""
    return 0.0 if truncated else float(is_correct(text, answer))


FIXED_CRITIQUE = {"placebo": "Try again.", "retry": ""}


def rollout(model, tokenizer, problems, config, critic=None, samples=None, gated=True):
    """Algorithm 1: `samples` (G) independent sessions of at most K rounds on each problem.

    critic: the model that criticises, if not `model` itself. gated=False, for evaluation, has right attempts
    criticised as well. Returns Turns with their rewards; a critique's is that of Eq. 3.
    """
    samples, rounds = samples or config.samples, 1 if config.method == "grpo" else config.rounds

    def encode(messages):
        return encode_chat(tokenizer, messages, config.thinking)

    def generate(who, role, round, sessions, prompts, free_prompts, limit):
        completions, truncated = [], []
        for i in range(0, len(prompts), config.sample_batch):
            with autocast(who, config):
                more = sample(who, tokenizer, prompts[i:i + config.sample_batch], limit, config.temperature)
            completions, truncated = completions + more[0], truncated + more[1]
        texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
        return [Turn(session // samples, session, round, role, *rest)
                for session, *rest in zip(sessions, prompts, free_prompts, completions, texts, truncated)]

    free = [encode(solver_messages(problem["problem"])) for problem in problems]
    turns, reward, critique, tips = [], {}, {}, {}           # the last three: the latest of each session
    live = list(range(len(problems) * samples))
    for round in range(1, rounds + 1):
        prompts = [encode(solver_messages(problems[s // samples]["problem"], tips[s])) if tips.get(s)
                   else free[s // samples] for s in live]
        attempts = generate(model, "solver", round, live, prompts, [free[s // samples] for s in live],
                            config.max_response)
        for turn in attempts:
            turn.reward = outcome_reward(turn.text, problems[turn.query]["answer"], turn.truncated)
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
        prompts = [encode(critic_messages(problems[turn.query]["problem"], turn.text)) for turn in attempts]
        critiques = generate(critic or model, "critic", round, live, prompts, prompts, config.max_critique)
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
    """Eq. 3: what a critique earns, from the rewards of the attempts before and after it. Success pays exactly 1."""
    return 1.0 if after == 1.0 else after - before


def role_advantages(rewards, groups, delta=1e-6):
    """Eq. 5: A_i = (r_i - mean) / (std + delta) within each group, std unbiased.

    rewards: (B,) floats; groups: B hashable keys, for ICRL (problem, role). Returns (B,) float32. A group of one or of
    equal rewards gives exactly 0: there, rounding noise over delta would pass for a signal.
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


def calibration_ratio(logp_free, logp_guided, guided, w_max=2.0):
    """Eq. 4: w_t = pi(y_t | q, y_<t) / pi(y_t | q, c, y_<t), at most w_max, a constant for the gradient.

    logp_free, logp_guided: (B, T) float32, both under the weights that sampled; guided: (B,) bool marks the revisions.
    Returns (B, T); rows that are not guided are exactly 1.
    """
    ratio = (logp_free - logp_guided).detach().exp().clamp(max=w_max)
    return torch.where(guided[:, None], ratio, torch.ones_like(ratio))


def icrl_objective(logp, logp_old, advantages, weights, mask, clip_low=0.2, clip_high=0.2):
    """Eq. 6, to be maximised: w_t min(rho_t A, clip(rho_t, 1 - clip_low, 1 + clip_high) A), rho_t = pi / pi_old.

    logp, logp_old: (B, T) float32, both under the critique-free prompt, now and at the rollout; weights, mask: (B, T);
    advantages: (B,). Returns the mean over each sample's tokens, then over the B samples. The weight multiplies the
    min. Clipping w_t rho_t in place of rho_t would clip by w too, and min(w x, w_max x) would cap nothing where x < 0.
    """
    rho = (logp - logp_old.detach()).exp()
    A = advantages[:, None]
    J = weights.detach() * torch.min(rho * A, rho.clamp(1 - clip_low, 1 + clip_high) * A)
    return ((J * mask).sum(1) / mask.sum(1).clamp(min=1)).mean()


def sequence_ratio(logp_free, logp_guided, guided, w_max=2.0):
    """In place of Eq. 4: one ratio for the revision, the product over its tokens. Unbiased only without a cap."""
    log_ratio = (logp_free - logp_guided).sum(1, keepdim=True).expand_as(logp_free)
    return calibration_ratio(log_ratio, torch.zeros_like(log_ratio), guided, w_max)


def shaped_weight(logp_free, logp_guided, guided, w_max=2.0):
    """In place of Eq. 4: Critique-GRPO's p / (p + 0.1), p = pi(y_t | q, y_<t)."""
    p = logp_free.detach().exp()
    return torch.where(guided[:, None], p / (p + 0.1), torch.ones_like(p))


def no_weight(logp_free, logp_guided, guided, w_max=2.0):
    """In place of Eq. 4: 1, as if the solver would have written the revision without critique."""
    return torch.ones_like(logp_free)


WEIGHTS = {"token": calibration_ratio, "one": no_weight, "sequence": sequence_ratio, "shaped": shaped_weight}


# ------------------------------------------------------------------------------------------------------- the update

def autocast(model, config):
    return torch.autocast(model.device.type, torch.bfloat16, enabled=config.bf16)


def group_key(turn, groups):
    """Whom a turn's reward is compared with."""
    return {"role": (turn.query, turn.role), "role_round": (turn.query, turn.role, turn.round),
            "pooled": turn.query}[groups]


def micro_batches(lengths, budget):
    """Split the indices of `lengths` into lists of similar length, each within `budget` when padded to its longest."""
    batches, longest = [], 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not batches or longest * (len(batches[-1]) + 1) > budget:
            batches.append([])
            longest = lengths[i]
        batches[-1].append(i)
    return batches


def update(model, optimizer, turns, config, pad_token_id=0):
    """The optimiser step(s) of one rollout, on Eq. 6. Returns what there is to log."""
    turns = [t for t in turns if t.role == "solver" or config.critic == "trained"]
    groups = [group_key(t, config.groups) for t in turns]
    advantages = role_advantages([t.reward for t in turns], groups)
    # Without advantage there is no gradient: such turns are left out, but count in the mean over samples. If all are
    # flat there is no step at all, for AdamW would still move the weights, by momentum and weight decay.
    active = advantages.nonzero()[:, 0].tolist()
    stats = {"flat_groups": 1 - len({groups[i] for i in active}) / len(set(groups)), "objective": 0.0, "grad_norm": 0.0,
             "w_mean": 1.0, "w_capped": 0.0, "w_ess": 1.0}

    def logprobs(indices, with_critique):
        prompts = [turns[i].prompt if with_critique else turns[i].free_prompt for i in indices]
        with autocast(model, config):
            return completion_logprobs(model, prompts, [turns[i].completion for i in indices], config.temperature,
                                       pad_token_id)

    batches = [[active[i] for i in batch] for batch in
               micro_batches([len(turns[i].prompt) + len(turns[i].completion) for i in active], config.micro_tokens)]
    rollout_terms, ratios = [], []                            # of each micro-batch, under the weights that sampled
    for inner in range(config.inner_steps if active else 0):
        stats["objective"] = 0.0
        for number, batch in enumerate(batches):
            logp, mask = logprobs(batch, with_critique=False)
            if inner == 0:
                # Nothing has moved yet, so this pass is pi_old too, and the numerator of w. The denominator is scored
                # in the same way, not recorded while sampling: in bfloat16 two ways of computing a log-prob differ.
                old, logp_guided = logp.detach(), logp.detach().clone()
                guided = torch.tensor([turns[i].guided for i in batch], device=logp.device)
                if guided.any():
                    with torch.no_grad():
                        scored, _ = logprobs([i for i in batch if turns[i].guided], with_critique=True)
                    logp_guided[guided, :scored.shape[1]] = scored
                weights = WEIGHTS[config.weight](old, logp_guided, guided, config.w_max)
                rollout_terms.append((old, weights))
                ratios.append(weights[guided][mask[guided].bool()])
            old, weights = rollout_terms[number]
            A = advantages[batch].to(logp.device)
            # Every sample's mean is its own, so with the share of all samples as factor the gradients of the
            # micro-batches add up to exactly that of the whole batch.
            share = len(batch) / len(turns)
            J = share * icrl_objective(logp, old, A, weights, mask, config.clip_low, config.clip_high)
            (-J).backward()
            stats["objective"] += J.item()
        stats["grad_norm"] = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip).item()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    w = torch.cat(ratios) if ratios else torch.zeros(0)
    if len(w):
        stats.update(w_mean=w.mean().item(), w_capped=(w >= config.w_max).float().mean().item(),
                     w_ess=(w.sum() ** 2 / (len(w) * (w ** 2).sum()).clamp(min=1e-30)).item())
    return stats


# ------------------------------------------------------------------------------------------------------- evaluation

def mean(values):
    values = list(values)
    return sum(values) / len(values) if values else 0.0


def evaluate(model, tokenizer, problems, config, critic=None):
    """What the solver can do without critique, and what one critique does for it; floats by name.

    Every attempt is criticised here, right ones too. `after_gated` keeps the right ones, as if an oracle had said so,
    which is how such results are usually reported; `after_ungated` takes what comes out after the critique, for
    better or worse (the critic's prompt then calls a right attempt failed, as in training). critic: as in rollout, so
    by default the model itself, whatever it was trained with. Consumes no training randomness.
    """
    config = dataclasses.replace(config, method="icrl", critic="trained", rounds=2)
    problems = problems[:config.eval_problems]
    with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(config.seed)              # the same draws every time: only the weights differ
        turns = rollout(model, tokenizer, problems, config, critic, samples=config.eval_samples, gated=False)
        greedy = rollout(model, tokenizer, problems, dataclasses.replace(config, rounds=1, temperature=0.0), samples=1)
    first = {t.session: t.reward for t in turns if t.part == "first"}
    after = {t.session: t.reward for t in turns if t.part == "revision"}
    critiques = [t for t in turns if t.role == "critic"]
    kinds = [problem.get("kind") for problem in problems]
    return {
        "pass@1": mean(first.values()),
        "greedy": mean(t.reward for t in greedy),
        "after_gated": mean(max(first[s], after[s]) for s in first),
        "after_ungated": mean(after.values()),
        "wrong_to_right": mean(after[s] == 1 for s in first if first[s] < 1),
        "right_to_wrong": mean(after[s] < 1 for s in first if first[s] == 1),
        "critique_tokens": mean(len(t.completion) for t in critiques),
        "leaks": mean(states_answer(t.text, problems[t.query]["answer"]) for t in critiques),
        "truncated": mean(t.truncated for t in turns),
        **{f"pass@1 {kind}": mean(first[t.session] for t in turns if t.part == "first" and kinds[t.query] == kind)
           for kind in sorted({*kinds} - {None})},
    }


def states_answer(critique, answer):
    """Whether the critique gives the answer away: a number or a box in it that the grader accepts."""
    stated = {extract_answer(critique) or "", *re.findall(r"-?\d[\d.,/]*\d|-?\d", critique)}
    return any(is_correct(rf"\boxed{{{value}}}", answer) for value in stated)


# --------------------------------------------------------------------------------------------------------- training

def load_model(name, config):
    """Model (float32) and tokenizer of a Hugging Face checkpoint."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot load a model from {name!r}: {str(error).strip()[:200]}") from error
    if not tokenizer.chat_template:
        raise UsageError(f"the tokenizer of {name!r} has no chat template; use an instruction-tuned model")
    if tokenizer.eos_token_id is None:
        raise UsageError(f"the tokenizer of {name!r} has no end-of-sequence token; completions would never end")
    for module in model.modules():                  # nn.Dropout calls it p, attention layers otherwise
        for name_of_dropout in ("p", "dropout", "attention_dropout"):
            if isinstance(getattr(module, name_of_dropout, None), float):
                setattr(module, name_of_dropout, 0.0)
    if config.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    auto = "cuda" if torch.cuda.is_available() else "cpu"
    return model.to(auto if config.device == "auto" else config.device), tokenizer


def problems_of_step(problems, step, config):
    """The problems of a step. Each epoch has an order of its own, which follows from the seed."""
    places = [divmod(i, len(problems)) for i in range((step - 1) * config.queries, step * config.queries)]
    order = {epoch: np.random.default_rng([config.seed, epoch]).permutation(len(problems)) for epoch, _ in places}
    return [problems[order[epoch][i]] for epoch, i in places]


def rollout_stats(turns):
    """Number, mean reward, mean length and share truncated of first attempts, critiques and revisions."""
    stats = {}
    for part in ("first", "critique", "revision"):
        mine = [t for t in turns if t.part == part]
        stats |= {f"{part}_count": len(mine), f"{part}_reward": mean(t.reward for t in mine),
                  f"{part}_tokens": mean(len(t.completion) for t in mine),
                  f"{part}_truncated": mean(t.truncated for t in mine)}
    return stats


def show_session(turns, problems):
    """One session as text: the first that holds a critique, or else the first."""
    shown = next((t.session for t in turns if t.role == "critic"), 0)
    session = [t for t in turns if t.session == shown]
    problem = problems[session[0].query]
    return "\n".join([f"  problem   {problem['problem']}  (answer {problem['answer']})",
                      *(f"  {t.part:9} {t.text.strip()}  -> reward {t.reward:g}" for t in session)])


def save(folder, model, tokenizer, optimizer, state):
    """Write a checkpoint beside the last one, rename it into place, and only then remove the last one."""
    older = list(folder.glob("checkpoint-*"))
    new = folder / "unfinished"
    shutil.rmtree(new, ignore_errors=True)
    model.save_pretrained(new)
    tokenizer.save_pretrained(new)
    torch.save(optimizer.state_dict(), new / "optimizer.pt")
    (new / "state.json").write_text(json.dumps(state))
    new.rename(folder / f"checkpoint-{state['step']}")
    for path in older:
        shutil.rmtree(path)


def train(config, resume=False):
    """Train as `config` says, into the folder config.out. Returns the figures of the final table."""
    out, begun = Path(config.out or time.strftime("runs/%Y%m%d-%H%M%S")), time.time()
    problems, heldout = load_problems(config.data), load_problems(config.heldout)
    if common := {p["problem"] for p in problems} & {p["problem"] for p in heldout}:
        raise UsageError(f"{len(common)} held-out problems are training problems too, such as {common.pop()!r}")
    checkpoints = sorted(out.glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
    if not resume and (checkpoints or (out / "result.json").exists()):
        raise UsageError(f"{out} holds a run already: continue it with --resume {out}, or choose another --out")
    if resume and not checkpoints:
        raise UsageError(f"{out} holds no checkpoint to resume from")
    model, tokenizer = load_model(str(checkpoints[-1]) if resume else config.model, config)
    base = load_model(config.model, config)[0] if config.critic == "frozen" else None
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, betas=(0.9, 0.98), weight_decay=config.weight_decay)
    state = {"step": 0, "tokens": 0}
    if resume:
        optimizer.load_state_dict(torch.load(checkpoints[-1] / "optimizer.pt", weights_only=True))
        state = json.loads((checkpoints[-1] / "state.json").read_text())
    else:
        out.mkdir(parents=True, exist_ok=True)
        (out / "config.json").write_text(json.dumps(dataclasses.asdict(config), indent=1))
        state["before"] = state["after"] = evaluate(model, tokenizer, heldout, config, base)
        state["before_train"] = evaluate(model, tokenizer, problems, config, base)
    with open(out / "metrics.jsonl", "a", buffering=1) as metrics, open(out / "sessions.jsonl", "a") as sessions:
        for file in (metrics, sessions):                      # a resumed run forgets what came after its checkpoint
            file.truncate(state.get(Path(file.name).name, 0))

        bar = tqdm(range(state["step"] + 1, config.steps + 1), initial=state["step"], total=config.steps,
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
                   **update(model, optimizer, turns, config, pad_token(tokenizer)),
                   "rollout_seconds": sampled - started, "update_seconds": time.time() - sampled}
            last = step == config.steps or 0 < config.token_limit <= tokens
            if last or config.eval_every and step % config.eval_every == 0:
                state["after"] = row["heldout"] = evaluate(model, tokenizer, heldout, config, base)
            print(json.dumps(row), file=metrics)
            for t in turns:
                print(json.dumps({"step": step, "problem": batch[t.query]["problem"], "session": t.session,
                                  "part": t.part, "round": t.round, "text": t.text, "reward": t.reward,
                                  "truncated": t.truncated}), file=sessions)
            state |= {"step": step, "tokens": tokens, "metrics.jsonl": metrics.tell(),
                      "sessions.jsonl": sessions.tell()}
            bar.set_postfix_str(f"unaided {row['first_reward']:.2f}, with critique {row['revision_reward']:.2f}, "
                                f"held-out {state['after']['pass@1']:.2f}, w {row['w_mean']:.2f}")
            if config.show_every and (step - 1) % config.show_every == 0:
                tqdm.write(f"one session of step {step}:\n{show_session(turns, batch)}")
            if not last and config.save_every and step % config.save_every == 0:
                save(out, model, tokenizer, optimizer, state)
            if last:
                break
    model.save_pretrained(out / "model")
    tokenizer.save_pretrained(out / "model")
    after_train = evaluate(model, tokenizer, problems, config, base)
    # The trained solver's failures are not the base solver's, so the critics are compared on the latter's.
    del optimizer                                             # its state makes room for the base model
    swap = evaluate(load_model(config.model, config)[0], tokenizer, heldout, config, critic=model)
    result = {**state, "after_train": after_train, "swap": swap, "seconds": time.time() - begun, "out": str(out)}
    (out / "result.json").write_text(json.dumps(result))
    return result


# -------------------------------------------------------------------------------------------------------- comparison

ARMS = {"icrl": {}, "grpo": dict(method="grpo"), "grpo_tokens": dict(method="grpo"),
        "w_one": dict(weight="one"), "w_sequence": dict(weight="sequence"), "w_shaped": dict(weight="shaped"),
        "pooled": dict(groups="pooled"), "role_round": dict(groups="role_round"), "frozen": dict(critic="frozen"),
        "placebo": dict(critic="placebo"), "retry": dict(critic="retry"), "shuffled": dict(critic="shuffled")}


def compare(config, arms, seeds):
    """Train each arm with each seed into config.out/ARM-SEED, write config.out/compare.csv and print the comparison.

    Finished runs are not repeated, interrupted ones are resumed. The first arm is the reference. `grpo_tokens` has
    twice the samples and stops at as many generated tokens as `icrl` took with its seed.
    """
    if "grpo_tokens" in arms and "icrl" not in arms[:arms.index("grpo_tokens")]:
        raise UsageError("--arms: name icrl before grpo_tokens, which may spend as many tokens as icrl did")
    folder, rows = Path(config.out or "runs/compare"), []
    for seed, arm in itertools.product(seeds, arms):
        run = folder / f"{arm}-{seed}"
        settings = dataclasses.replace(config, out=str(run), seed=seed, **ARMS[arm])
        if arm == "grpo_tokens":
            spent = json.loads((folder / f"icrl-{seed}" / "result.json").read_text())["tokens"]
            settings = dataclasses.replace(settings, samples=2 * config.samples, token_limit=spent,
                                           steps=100 * config.steps)
        if not (run / "result.json").exists():
            train(settings, resume=any(run.glob("checkpoint-*")))
        result = json.loads((run / "result.json").read_text())
        metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        rows.append({"arm": arm, "seed": seed, "step": 0, "tokens": 0, **result["before"]})
        rows += [{"arm": arm, "seed": seed, "step": m["step"], "tokens": m["tokens"], **m["heldout"],
                  "w_mean": m["w_mean"]} for m in metrics if "heldout" in m]
        rows[-1] |= {"base_wrong_to_right": result["swap"]["wrong_to_right"], "seconds": result["seconds"]}
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with open(folder / "compare.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    print_comparison(folder / "compare.csv")


def print_comparison(path):
    """Each arm's last evaluation, mean and 95% interval over seeds; difference to the first arm, paired by seed."""
    last = {(row["arm"], row["seed"]): row for row in csv.DictReader(open(path, newline=""))}
    arms = list(dict.fromkeys(arm for arm, _ in last))

    def values(arm, column):
        return np.array([float(row[column]) for (name, _), row in last.items() if name == arm])

    print(f"| arm | tokens | critique-free | minus {arms[0]} | p | after a critique | critic success, base failures |")
    print("|---|---|---|---|---|---|---|")
    for arm in arms:
        difference = values(arm, "pass@1") - values(arms[0], "pass@1")
        print(f"| {arm} | {values(arm, 'tokens').mean() / 1000:.0f}k | {interval(values(arm, 'pass@1'))} | "
              f"{interval(difference)} | {sign_flip(difference):.3f} | {interval(values(arm, 'after_gated'))} | "
              f"{interval(values(arm, 'base_wrong_to_right'))} |")


def interval(values):
    """'mean +- half' with half the width of the 95% interval of Student's t, as text."""
    t = np.quantile(np.random.default_rng(0).standard_t(max(len(values) - 1, 1), 10 ** 6), 0.975)
    half = t * values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return f"{values.mean():.2f} +- {half:.2f}"


def sign_flip(differences):
    """Exact two-sided p-value of paired differences: how many ways of flipping their signs give as large a sum."""
    signs = np.array(list(itertools.product((1, -1), repeat=len(differences))))
    return np.mean(np.abs(signs @ differences) >= abs(differences.sum()) - 1e-12)


# ----------------------------------------------------------------------------------------------------- command line

def print_table(result):
    print(f"\n{'held-out problems':50}{'before':>8}{'after':>8}")
    for title, key, before, after in [
            ("critique-free accuracy, sampled", "pass@1", "before", "after"),
            ("critique-free accuracy, greedy", "greedy", "before", "after"),
            ("accuracy after one critique of wrong attempts", "after_gated", "before", "after"),
            ("accuracy after one critique, right ones too", "after_ungated", "before", "after"),
            ("critic success (wrong attempts put right)", "wrong_to_right", "before", "after"),
            ("  the same, on the base solver's wrong attempts", "wrong_to_right", "before", "swap"),
            ("right attempts put wrong by a critique", "right_to_wrong", "before", "after"),
            ("critiques that state the answer", "leaks", "before", "after"),
            ("tokens per critique", "critique_tokens", "before", "after"),
            ("on training problems: critique-free, sampled", "pass@1", "before_train", "after_train")]:
        digits = 1 if key == "critique_tokens" else 3
        print(f"{title:50}{result[before][key]:8.{digits}f}{result[after][key]:8.{digits}f}")
    print(f"{result['tokens']:,} tokens generated in {result['step']} steps, {result['seconds']:.0f} seconds in all; "
          f"model and logs are in {result['out']}")


def parse(argv):
    """The command line as (config, options): what is a setting of a run, and what is not."""
    parser = argparse.ArgumentParser(prog="icrl.py", description=__doc__.split("\n\n")[0], allow_abbrev=False,
                                     usage="icrl.py [train | compare] [--flag value ...]")
    own = parser.add_argument_group("what to do: train one run, or compare several arms with several seeds")
    own.add_argument("--resume", metavar="RUN", help="continue the run in this folder, with its own settings")
    own.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM",
                     help=f"to compare, the first is the reference [{' '.join(ARMS)}]")
    own.add_argument("--seeds", nargs="+", type=int, default=list(range(8)), metavar="N", help="to compare [0 ... 7]")
    settings = parser.add_argument_group("settings of a run")
    for f in dataclasses.fields(Config):
        kind = {"type": f.type, "metavar": f.type.__name__}
        if f.type is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        elif f.metadata["choices"]:
            kind = {"choices": f.metadata["choices"]}
        settings.add_argument(f"--{f.name}", default=argparse.SUPPRESS, **kind,
                              help=f"{f.metadata['help']} [{f.default}]".replace(f"{HERE}/", ""))
    argv = list(sys.argv[1:] if argv is None else argv)
    command = argv.pop(0) if argv[:1] in (["train"], ["compare"]) else "train"
    options = parser.parse_args(argv, argparse.Namespace(command=command))
    given = {f.name: vars(options)[f.name] for f in dataclasses.fields(Config) if f.name in options}
    if options.resume:
        if given or command != "train":
            raise UsageError("--resume keeps the settings of the run; leave out "
                             + (", ".join(f"--{name}" for name in given) or command))
        try:
            saved = json.loads((Path(options.resume) / "config.json").read_text())
            return Config(**{**saved, "out": options.resume}), options
        except (OSError, ValueError, TypeError) as error:
            raise UsageError(f"cannot resume {options.resume}: {error}") from error
    config = Config(**{**PRESETS[given.get("preset", "tiny")], **given})
    for f in dataclasses.fields(Config):
        low = f.metadata["low"]
        if low is not None and not getattr(config, f.name) >= low:
            raise UsageError(f"--{f.name} must be at least {low}, not {getattr(config, f.name)}")
    return config, options


def main(argv=None):
    """The command line; returns the exit code: 0, or 2 with one sentence on stderr for what the user can mend."""
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        config, options = parse(argv)
        if options.command == "compare":
            compare(config, options.arms, options.seeds)
        else:
            print_table(train(config, resume=options.resume is not None))
    except UsageError as error:
        print(f"icrl.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
