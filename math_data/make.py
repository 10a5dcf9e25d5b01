#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Make everything in this folder: problems, tokenizers and base models of the two worlds.

    python math_data/make.py [FOLDER]   # half an hour on one CPU core; the same files every time on one machine

A world is integer arithmetic of several kinds. The base model holds a misconception about each kind: it works left to
right, drops brackets, doubles instead of squaring, and so on. It also knows the right method, but unaided it seldom
takes it (CARE). As a critic it helps three times in ten (REMEDY_RATE, WORKED_RATE), and there are two ways to help.
A remedy names the right method, and a solver that is told takes it: help that can be taken along. A worked value does
the hard part of the problem, and the solver uses it without any working of its own: help that helps once only.

In the world of the default run, in this folder, the help is remedies, for one kind also worked values. In the world
of the folder `hints`, whose three kinds take more working, it is worked values only, and remedies have no effect.
"""
import json
import random
import sys
import time
from itertools import product
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import icrl  # noqa: E402

REMEDY = {
    "order": "Multiply before you add.",
    "bracket": "Work out the brackets first.",
    "square": "A square is a number times itself.",
    "sign": "Below zero, keep the minus sign.",
    "product": "Split the number into tens and ones.",
    "pair": "Work out both products first.",
}
# A right solution takes three right turns: name the right method, follow it, and finish rather than forget the last
# step. How often the base model, unaided, takes each of them:
CARE = {"order": 0.9, "bracket": 0.5, "square": 0.07, "sign": 0.06, "product": 0.05, "pair": 0.05,
        "big product": 0.4, "two products": 0.4, "square and product": 0.4}
# How often the base critic writes the right remedy, and how often the worked value; otherwise it writes a remedy for
# another kind.
REMEDY_RATE = {"order": 0.3, "bracket": 0.3, "square": 0.3, "sign": 0.3, "product": 0.2, "pair": 0.3}
WORKED_RATE = {"product": 0.25, "big product": 0.3, "two products": 0.3, "square and product": 0.3}
# By folder: the kinds, the numbers of held-out and of training problems of each, and the steps of the warm-up.
WORLDS = {".": (list(REMEDY), 40, 400, 2000),
          "hints": (["big product", "two products", "square and product"], 80, 800, 1500)}


def value(step):
    a, op, b = step.split(" ")
    return {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[op]


def written(steps):
    return ", ".join(f"{step} = {value(step)}" for step in steps)


def solution(method, steps):
    """The method's name, the steps 'a op b' worked out, and the last value in the box."""
    return f"{method}: {written(steps)}. The answer is \\boxed{{{value(steps[-1])}}}."


def all_problems():
    """Every problem of every kind: dicts with the problem, its answer, and the solutions that the base model knows.

    `right`; `habit`: by the misconception; `slip`: names the right method and does not follow it; `unfinished`: forgets
    the last step. For the kinds in WORKED_RATE also `hint`, the critique that does the hard part, and `leaning`, the
    solution that leans on it.
    """
    made = []

    def add(kind, text, method, right, habit, wrong):
        problem = dict(kind=kind, problem=f"What is {text}?", answer=str(value(right[-1])),
                       right=solution(method, right), habit=solution(habit, wrong), slip=solution(method, wrong),
                       unfinished=solution(method, right[:-1]))
        if kind in WORKED_RATE:
            worked = value(right[-2])
            problem["hint"] = f"{written(right[:-1])}. Use {worked}."
            problem["leaning"] = solution(f"With {worked}", right[-1:])
        if value(right[-1]) not in (value(wrong[-1]), value(right[-2])):     # or a mistake would be right by accident
            made.append(problem)

    digit = range(2, 10)
    for a, b, c in product(range(2, 31), digit, digit):
        add("order", f"{a} + {b} * {c}", "Multiply first", [f"{b} * {c}", f"{a} + {b * c}"],
            "Left to right", [f"{a} + {b}", f"{a + b} * {c}"])
    for b, c, rest in product(range(2, 16), range(2, 16), range(1, 31)):
        a = b + c + rest
        add("bracket", f"{a} - ({b} + {c})", "Brackets first", [f"{b} + {c}", f"{a} - {b + c}"],
            "Drop the brackets", [f"{a} - {b}", f"{a - b} + {c}"])
    for a, b in product(range(3, 13), range(2, 61)):
        add("square", f"{a}^2 + {b}", "Square it", [f"{a} * {a}", f"{a * a} + {b}"],
            "Double it", [f"2 * {a}", f"{2 * a} + {b}"])
    for a, more, c in product(range(2, 20), range(2, 20), range(2, 20)):
        add("sign", f"{a} - {a + more} + {c}", "Keep the sign", [f"{a} - {a + more}", f"{-more} + {c}"],
            "Swap them", [f"{a + more} - {a}", f"{more} + {c}"])
    for kind, most in (("product", 30), ("big product", 100)):
        for a, b, c in product(range(12, most), range(3, 10), range(2, 21)):
            tens, ones = a // 10 * 10, a % 10
            if ones:
                add(kind, f"{a} * {b} + {c}", "Split the tens",
                    [f"{tens} * {b}", f"{ones} * {b}", f"{tens * b} + {ones * b}", f"{a * b} + {c}"], "Digit by digit",
                    [f"{tens // 10} * {b}", f"{ones} * {b}", f"{tens // 10 * b} + {ones * b}",
                     f"{(tens // 10 + ones) * b} + {c}"])
    for a, b, c, d in product(digit, digit, digit, digit):
        if a * b > max(c * d, c):
            add("pair", f"{a} * {b} - {c} * {d}", "Products first", [f"{a} * {b}", f"{c} * {d}", f"{a * b} - {c * d}"],
                "Left to right", [f"{a} * {b}", f"{a * b} - {c}", f"{a * b - c} * {d}"])
    for a, b, c, d, e in product(digit, digit, digit, digit, range(2, 21, 6)):
        add("two products", f"{a} * {b} + {c} * {d} - {e}", "Products first",
            [f"{a} * {b}", f"{c} * {d}", f"{a * b} + {c * d}", f"{a * b + c * d} - {e}"], "Left to right",
            [f"{a} * {b}", f"{a * b} + {c}", f"{a * b + c} * {d}", f"{(a * b + c) * d} - {e}"])
    for a, b, c, d in product(range(3, 13), digit, digit, range(2, 21)):
        add("square and product", f"{a}^2 + {b} * {c} - {d}", "Square it",
            [f"{a} * {a}", f"{b} * {c}", f"{a * a} + {b * c}", f"{a * a + b * c} - {d}"], "Double it",
            [f"2 * {a}", f"{b} * {c}", f"{2 * a} + {b * c}", f"{2 * a + b * c} - {d}"])
    return made


def split(rng, kinds, held_out, train_size):
    """(train, heldout, rest): lists of problems that share none, by construction."""
    train, heldout, rest = [], [], []
    problems = all_problems()
    for kind in kinds:
        mine = [p for p in problems if p["kind"] == kind]
        rng.shuffle(mine)
        heldout += mine[:held_out]
        train += mine[held_out:held_out + train_size]
        rest += mine[held_out + train_size:]
    return train, heldout, rest


def make_tokenizer():
    """Bytes, and one token for each fixed phrase of the prompts and of the world: short prompts make a fast toy."""
    messages = icrl.solver_messages("\0", "\0") + icrl.critic_messages("\0", "\0")
    phrases = [part for message in messages for part in message["content"].split("\0") if part]
    phrases += [*REMEDY.values(), icrl.FIXED_CRITIQUE["placebo"], "<critique>", "</critique>", ". Use ", "What is ",
                " + ", " - ", " * ", " = ", ", ", "^2", "With ", ": ", ". The answer is \\boxed{", "}."]
    phrases += [name + ": " for name in ("Multiply first", "Left to right", "Brackets first", "Drop the brackets",
                "Square it", "Double it", "Keep the sign", "Swap them", "Split the tens", "Digit by digit",
                "Products first")]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(t, special=True, normalized=False)
                             for t in ("<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")])
    core.add_tokens([AddedToken(p, normalized=False) for p in dict.fromkeys(phrases)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>", pad_token="<|pad|>",
                                        clean_up_tokenization_spaces=False, model_max_length=512)
    tokenizer.chat_template = ("{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>"
                               "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}")
    return tokenizer


def lesson(rng, problems):
    """One supervised example, as (messages, completion): what the base model is to do in one of its two roles."""
    problem = rng.choice(problems)
    kind, care = problem["kind"], CARE[problem["kind"]]
    unaided = problem[rng.choices(["habit", "slip", "unfinished", "right"],
                                  [1 - care, care * (1 - care), care ** 2 * (1 - care), care ** 3])[0]]
    other = REMEDY[rng.choice([k for k in REMEDY if k != kind])]
    remedy, remedies, worked = REMEDY.get(kind), REMEDY_RATE.get(kind, 0), WORKED_RATE.get(kind, 0)
    # The shares of roles, critiques and attempts were chosen so that each sort is seen often enough to be learnt.
    role = rng.choices(["solve", "revise", "criticise"], [4, 4, 3])[0]
    if role == "solve":
        return icrl.solver_messages(problem["problem"]), unaided
    if role == "revise":
        useless = rng.choice([other, other, other, icrl.FIXED_CRITIQUE["placebo"]])
        critique, completion = rng.choices(
            [(remedy, problem["right"]), (problem.get("hint"), problem.get("leaning")), (useless, unaided)],
            [0.5 if remedies else 0, 0.2 if worked else 0, 0.3])[0]
        return icrl.solver_messages(problem["problem"], critique), completion
    attempt = problem[rng.choices(["habit", "slip", "unfinished", "right"], [6, 2, 1, 1])[0]]
    critique = rng.choices([remedy, problem.get("hint"), other], [remedies, worked, 1 - remedies - worked])[0]
    return icrl.critic_messages(problem["problem"], attempt), f"<critique>{critique}</critique>"


def warm_up(tokenizer, problems, rng, steps, batch=128, lr=3e-3):
    """The base model: trained on lessons by the log-probs that the reinforcement learning uses."""
    torch.manual_seed(0)
    config = Qwen3Config(vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, head_dim=32, max_position_embeddings=512,
                         tie_word_embeddings=True, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
                         pad_token_id=tokenizer.pad_token_id)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = Qwen3ForCausalLM(config).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    begun = time.time()
    for step in range(1, steps + 1):
        lessons = [lesson(rng, problems) for _ in range(batch)]
        prompts = [icrl.encode_chat(tokenizer, messages) for messages, _ in lessons]
        targets = [tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
                   for _, text in lessons]
        logp, mask = icrl.completion_logprobs(model, prompts, targets)
        loss = -logp.sum() / mask.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 100 == 0 or step == 1:
            print(f"warm-up {step}/{steps}  loss {loss.item():.3f}  {time.time() - begun:.0f} s", flush=True)
    return model.cpu()


def main():
    for folder in sys.argv[1:] or WORLDS:
        kinds, held_out, train_size, steps = WORLDS[folder]
        rng, out = random.Random(0), HERE / folder
        train, heldout, rest = split(rng, kinds, held_out, train_size)
        out.mkdir(exist_ok=True)
        for name, problems in (("train", train), ("heldout", heldout)):
            rows = [json.dumps({key: p[key] for key in ("problem", "answer", "kind")}) for p in problems]
            rng.shuffle(rows)
            (out / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
        tokenizer = make_tokenizer()
        tokenizer.save_pretrained(out / "model")
        model = warm_up(tokenizer, train + rest, rng, steps)
        model.to(torch.bfloat16).save_pretrained(out / "model")
        print(sum(p.numel() for p in model.parameters()), "parameters in", out / "model")


if __name__ == "__main__":
    main()
