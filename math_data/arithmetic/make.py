#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Make the files of the default run: the problems, the tokenizer and the base model.

    python math_data/arithmetic/make.py [FOLDER]     # about 5 minutes; on one machine, the same bytes every time

The world is integer arithmetic of eight kinds. For each kind the base model knows the right method and a wrong habit.
Alone, it mostly follows the habit. Four kinds are helped by a method, four by a value:

method  The critique that helps is a remedy, such as "Work out the brackets first." After it, the solver does what it
        could have done alone, but seldom did. This help can be taken along. The base critic seldom names the right one.
value   The critique that helps works out the hard part: "8 * 9 = 72, 3 + 72 = 75. Use 75." After it, the solver writes
        "With 75:" and only adds the last step. This help cannot be taken along: alone, the solver can only guess the
        value. That is one of its wrong habits here. No remedy helps.
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
sys.path.insert(0, str(HERE.parents[1]))
import icrl  # noqa: E402

REMEDY = {
    "method: brackets": "Work out the brackets first.",
    "method: square": "A square is a number times itself.",
    "method: sign": "Below zero, keep the minus sign.",
    "method: pair": "Work out both products first.",
}
KINDS = [*REMEDY, "value: sum times", "value: times sum", "value: square and product", "value: two products"]
# The base critic picks from these too. They do not help with any kind.
OTHER_REMEDIES = [
    "Read the problem again.", "Carry the one.", "Count in tens.", "Check the last digit.", "Line up the digits.",
    "Start with the largest number.", "Round, then correct.", "Write down each step.", "Add before you subtract.",
    "Look for a common factor.", "Do not skip the zero.", "Check by going backwards."]
REMEDIES = [*REMEDY.values(), *OTHER_REMEDIES]
# A right solution takes three right turns: name the right method, follow it, and do not forget the last step. How
# often the base model, unaided, takes each of them:
CARE = {"method": 0.1, "value": 0.45}
GUESS = 0.3             # how often a wrong habit of a value kind is to guess the value
# How often the base critic gives the critique that helps. Otherwise it picks a remedy that does not.
CRITIC = {"method": 0.02, "value": 0.3}
HELD_OUT, TRAIN = 30, 300                                       # problems of each kind
STEPS = 1800                                                    # of the warm-up


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

    `right`; `habit`: by the wrong habit; `slip`: names the right method and does not follow it; `unfinished`: forgets
    the last step. For value kinds also `guess`. `help`: the critique that helps. `helped`: the solution after it.
    """
    made = []

    def add(kind, text, method, right, habit, wrong):
        problem = dict(kind=kind, problem=f"What is {text}?", answer=str(value(right[-1])),
                       right=solution(method, right), habit=solution(habit, wrong), slip=solution(method, wrong),
                       unfinished=solution(method, right[:-1]))
        if kind in REMEDY:
            problem.update(help=REMEDY[kind], helped=problem["right"])
        else:
            worked, guess, last = value(right[-2]), value(wrong[-2]), right[-1].split(" ", 1)[1]
            problem["guess"] = solution(f"With {guess}", [f"{guess} {last}"])
            problem.update(help=f"{written(right[:-1])}. Use {worked}.", helped=solution(f"With {worked}", right[-1:]))
        if value(right[-1]) not in (value(wrong[-1]), value(right[-2])):     # or a mistake would be right by accident
            made.append(problem)

    digit, twelve = range(2, 10), range(2, 13)
    for b, c, rest in product(digit, digit, range(1, 21)):
        a = b + c + rest
        add("method: brackets", f"{a} - ({b} + {c})", "Brackets first", [f"{b} + {c}", f"{a} - {b + c}"],
            "Drop the brackets", [f"{a} - {b}", f"{a - b} + {c}"])
    for a, b in product(range(3, 13), range(2, 61)):
        add("method: square", f"{a}^2 + {b}", "Square it", [f"{a} * {a}", f"{a * a} + {b}"],
            "Double it", [f"2 * {a}", f"{2 * a} + {b}"])
    for a, more, c in product(twelve, twelve, twelve):
        add("method: sign", f"{a} - {a + more} + {c}", "Keep the sign", [f"{a} - {a + more}", f"{-more} + {c}"],
            "Swap them", [f"{a + more} - {a}", f"{more} + {c}"])
    for a, b, c, d in product(digit, digit, digit, digit):
        if a * b > max(c * d, c):
            add("method: pair", f"{a} * {b} - {c} * {d}", "Products first",
                [f"{a} * {b}", f"{c} * {d}", f"{a * b} - {c * d}"],
                "Left to right", [f"{a} * {b}", f"{a * b} - {c}", f"{a * b - c} * {d}"])
        add("value: sum times", f"({a} + {b}) * {c} - {d}", "Brackets first",
            [f"{a} + {b}", f"{a + b} * {c}", f"{(a + b) * c} - {d}"],
            "Drop the brackets", [f"{b} * {c}", f"{a} + {b * c}", f"{a + b * c} - {d}"])
        add("value: times sum", f"{a} * ({b} + {c}) - {d}", "Brackets first",
            [f"{b} + {c}", f"{a} * {b + c}", f"{a * (b + c)} - {d}"],
            "Drop the brackets", [f"{a} * {b}", f"{a * b} + {c}", f"{a * b + c} - {d}"])
        add("value: square and product", f"{a}^2 + {b} * {c} - {d}", "Square it",
            [f"{a} * {a}", f"{b} * {c}", f"{a * a} + {b * c}", f"{a * a + b * c} - {d}"],
            "Double it", [f"2 * {a}", f"{b} * {c}", f"{2 * a} + {b * c}", f"{2 * a + b * c} - {d}"])
        add("value: two products", f"{a} * {b} + {c} * {d} - {a}", "Products first",
            [f"{a} * {b}", f"{c} * {d}", f"{a * b} + {c * d}", f"{a * b + c * d} - {a}"],
            "Left to right", [f"{a} * {b}", f"{a * b} + {c}", f"{a * b + c} * {d}", f"{(a * b + c) * d} - {a}"])
    return made


def split(rng):
    """(train, heldout, rest): lists of problems that share none."""
    train, heldout, rest = [], [], []
    problems = all_problems()
    for kind in KINDS:
        mine = [p for p in problems if p["kind"] == kind]
        rng.shuffle(mine)
        heldout += mine[:HELD_OUT]
        train += mine[HELD_OUT:HELD_OUT + TRAIN]
        rest += mine[HELD_OUT + TRAIN:]
    return train, heldout, rest


def make_tokenizer():
    """Bytes, and one token for each fixed phrase of the prompts and of the world: short prompts make a fast toy."""
    messages = icrl.solver_messages("\0", "\0") + icrl.critic_messages("\0", "\0")
    phrases = [part for message in messages for part in message["content"].split("\0") if part]
    phrases += [*REMEDIES, "Try again.", "<critique>", "</critique>", ". Use ", "What is ",
                " + ", " - ", " * ", " = ", ", ", "^2", "With ", ": ", ". The answer is \\boxed{", "}."]
    phrases += [name + ": " for name in ("Left to right", "Brackets first", "Drop the brackets", "Square it",
                "Double it", "Keep the sign", "Swap them", "Products first")]
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


def sort(problem):
    """The sort of help for a problem: "method" or "value". In the files this is its kind."""
    return problem["kind"].split(":")[0]


def lesson(rng, problems):
    """One supervised example, as (messages, completion): what the base model is to do in one of its two roles.

    problems: a dict with the list of problems of each kind.
    """
    problem = rng.choice(problems[rng.choice(list(problems))])
    care = CARE[sort(problem)]
    unaided = problem[rng.choices(["habit", "slip", "unfinished", "right"],
                                  [1 - care, care * (1 - care), care ** 2 * (1 - care), care ** 3])[0]]
    if unaided == problem["habit"] and sort(problem) == "value" and rng.random() < GUESS:
        unaided = problem["guess"]
    # The shares of roles, critiques and attempts were chosen so that each sort is seen often enough to be learnt.
    role = rng.choices(["solve", "revise", "criticise"], [2, 5, 3])[0]
    if role == "solve":
        return icrl.solver_messages(problem["problem"]), unaided
    if role == "revise":
        if rng.random() < 0.7:
            return icrl.solver_messages(problem["problem"], problem["help"]), problem["helped"]
        useless = rng.choice([remedy for remedy in REMEDIES if remedy != problem["help"]] + 4 * ["Try again."])
        return icrl.solver_messages(problem["problem"], useless), unaided
    attempt = problem[rng.choices(["habit", "slip", "unfinished", "right"], [6, 2, 1, 1])[0]]
    helps = rng.random() < CRITIC[sort(problem)]
    critique = problem["help"] if helps else rng.choice([remedy for remedy in REMEDIES if remedy != problem["help"]])
    return icrl.critic_messages(problem["problem"], attempt), f"<critique>{critique}</critique>"


def warm_up(tokenizer, problems, rng, steps, batch=64, lr=3e-3):
    """The base model: trained on lessons by the log-probs that the reinforcement learning uses."""
    torch.manual_seed(0)
    config = Qwen3Config(vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, head_dim=32, max_position_embeddings=512,
                         tie_word_embeddings=True, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
                         pad_token_id=tokenizer.pad_token_id)
    model = Qwen3ForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    begun = time.time()
    for step in range(1, steps + 1):
        lessons = []                                    # pairs of token ids: the prompt, the completion
        for messages, text in (lesson(rng, problems) for _ in range(batch)):
            target = tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
            lessons.append((icrl.encode_chat(tokenizer, messages), target))
        lessons.sort(key=lambda pair: len(pair[0]) + len(pair[1]))
        total, loss = sum(len(target) for _, target in lessons), 0.0
        for first in range(0, batch, 16):               # lessons of about the same length, so that few pads are needed
            logp, _ = icrl.completion_logprobs(model, *zip(*lessons[first:first + 16]))
            part = -logp.sum() / total
            part.backward()
            loss += part.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 100 == 0 or step == 1:
            print(f"warm-up {step}/{steps}  loss {loss:.3f}  {time.time() - begun:.0f} s", flush=True)
    return model


def main():
    out = Path(sys.argv[1]) if sys.argv[1:] else HERE
    torch.set_num_threads(1)                            # with another number of threads, sums are rounded otherwise
    rng = random.Random(0)
    train, heldout, rest = split(rng)
    out.mkdir(exist_ok=True)
    for name, problems in (("train", train), ("heldout", heldout)):
        rows = [json.dumps({"problem": p["problem"], "answer": p["answer"], "kind": sort(p)}) for p in problems]
        rng.shuffle(rows)
        (out / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(out / "model")
    of_kind = {kind: [p for p in train + rest if p["kind"] == kind] for kind in KINDS}
    model = warm_up(tokenizer, of_kind, rng, STEPS)
    model.to(torch.bfloat16).save_pretrained(out / "model")
    print(sum(p.numel() for p in model.parameters()), "parameters in", out / "model")


if __name__ == "__main__":
    main()
