#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Make the files of the default run: the problems, the tokenizer and the base model.

    python math_data/arithmetic/make.py [--out FOLDER] [--choices N]     # 5 minutes on one core

On one machine, it makes the same bytes every time. With --choices 1, 2 or 3 instead of 4, fewer
words of a plan are unlikely, but a whole plan is as unlikely as before. See theory.py.

The problems are expressions of small integers, such as 2 * (3 * (2 + 4^2) - 9). Each has one right
order of its operations: from the inside out. There are two kinds of problems.

plan   Five operations. The solver first names an order. Then it follows this order:
           Plan: square, plus, times, minus, double. 4 * 4 = 16, 16 + 2 = 18, ...
       Only the right order leads to the right answer. Alone, the solver seldom names it. At each
       place of the plan it mostly names the next operation from the left.
       A critique that helps names the right order. The solver can take this help along. One day it
       can name the order without the critique.
value  Three operations. Alone, the solver must name the right way, follow it and finish:
           Inside out: 2 + 7 = 9, 9 * 4 = 36, 36 - 5 = 31.
       A critique that helps works out the first two steps. Then the solver only does the last one:
           With 36: 36 - 5 = 31.
       The solver cannot take this help along. Without the critique it would have to guess the 36.

The base model knows more than it does. As a solver, it follows a right plan, but seldom makes one.
As a critic, it knows what is wrong, but seldom says it. Mostly it writes "Read the problem again."
or another sentence that does not help.
"""
import argparse
import json
import random
import sys
import time
from itertools import permutations, product
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))
import icrl  # noqa: E402

# The forms of the problems: the operations in the right order, from the inside out.
FORMS = {
    "plan": [
        ("square", "plus", "times", "minus", "double"),       # such as 2 * (3 * (2 + 4^2) - 9)
        ("minus", "square", "double", "plus", "times"),       # 3 * (5 + 2 * (9 - 6)^2)
        ("double", "minus", "square", "times", "plus"),       # 8 + 3 * (2 * 7 - 9)^2
        ("times", "minus", "square", "plus", "double"),       # 2 * (9 + (3 * 5 - 9)^2)
    ],
    "value": [
        ("plus", "times", "minus"),                           # 4 * (7 + 2) - 5
        ("minus", "times", "plus"),                           # 5 + 4 * (9 - 2)
        ("plus", "double", "minus"),                          # 2 * (4 + 5) - 3
        ("minus", "double", "plus"),                          # 6 + 2 * (9 - 4)
    ],
}
WORDS = ["plus", "minus", "times", "double", "square"]
LARGEST = 120           # the largest number in a right solution
HELD_OUT, TRAIN = 30, 150                                     # problems of each form


def plan_care(choices):
    """How often the base model, unaided, names each of the five words of a plan rightly.

    The last word is left over. Of the others, so many are unlikely; their product is always 0.15^4.
    """
    return [0.15 ** (4 / choices)] * choices + [1.0] * (5 - choices)


# How often the base model, unaided, makes each right choice. In a plan problem, a choice is a word
# of the plan. In a value problem there are three choices: to name the right way, to follow it, and
# to finish.
CARE = {"plan": plan_care(4), "value": 0.4}
GUESS = 0.3             # how often a solver that misses the right way guesses a value
OPENS = {"plan": 0.002, "value": 0.3}    # how often the base critic says what is wrong
KNOWS = 0.8             # how often the order that it then names is right
VAGUE = ["Read the problem again.", "Check the last digit.", "Take your time.", "Count in tens.",
         "Write down each step.", "Look for a common factor.", "Check by going backwards.",
         "Do not skip the zero."]        # what it says otherwise. This helps with no problem.
STEPS = 1300            # of the base model's training


# ------------------------------------------------------------------------------------- the problems

def expression(form, start, number):
    """The text of an expression, and its operations in the order in which they are written.

    form: its operations in the right order. start: the number that the first one is applied to.
    number: the other number of each operation, such as {"plus": 3}.
    """
    text, written, last = str(start), [], ""
    for word in form:
        if word == "minus":
            text, written = f"{text} - {number[word]}", [*written, word]
        elif word == "square":
            text, written = f"({text})^2" if last else f"{text}^2", [*written, word]
        elif word == "plus":
            text, written = f"{number[word]} + {text}", [word, *written]
        else:
            text = f"({text})" if last in ("plus", "minus") else text
            text, written = f"{number[word]} * {text}", [word, *written]
        last = word
    return text, written


def work_out(order, start, number):
    """Apply operations in the given order: a list of pairs, the written step and its value."""
    steps = []
    for word in order:
        other = start if word == "square" else number[word]
        sign, value = {"plus": ("+", start + other), "minus": ("-", start - other)}.get(
            word, ("*", start * other))
        steps.append((f"{start} {sign} {other} = {value}", value))
        start = value
    return steps


def problems_of(kind, form):
    """All problems of a form: a list of dicts.

    Left out are those with a number below 1 or above LARGEST in the right solution, and those where
    a mistake leads to the right answer too: another order, or a forgotten last step.
    """
    made = []
    for start, plus, minus, times in product(range(1, 10), range(1, 10), range(1, 10), range(3, 6)):
        number = {"plus": plus, "minus": minus, "times": times, "double": 2}
        if any(number[word] != 3 for word in ("plus", "minus", "times") if word not in form):
            continue                                          # or the same problem would come twice
        values = [value for _, value in work_out(form, start, number)]
        wrong = [work_out(order, start, number)[-1][1]
                 for order in permutations(form) if order != form] + values[-2:-1]
        if min(values) < 1 or max(values) > LARGEST or values[-1] in wrong:
            continue
        text, written = expression(form, start, number)
        made.append(dict(kind=kind, problem=f"What is {text}?", answer=str(values[-1]), form=form,
                         start=start, number=number, written=written))
    return made


# ------------------------------------------------------------------- what the solver and critic say

def boxed(steps):
    """The steps as text, and the last value in the box."""
    return ", ".join(text for text, _ in steps) + f". The answer is \\boxed{{{steps[-1][1]}}}."


def names(order):
    """The operations as text: " square, plus, times"."""
    return " " + ", ".join(order)


def by_plan(problem, order):
    """An attempt in two parts: the plan, and the steps that follow it."""
    return f"Plan:{names(order)}. ", boxed(work_out(order, problem["start"], problem["number"]))


def with_value(problem, value):
    """The attempt of a solver that takes over a value, and does the last step."""
    return f"With {value}: ", boxed(work_out(problem["form"][-1:], value, problem["number"]))


def own_plan(rng, problem, given=0):
    """The plan of the unaided solver: a list of words.

    given: how many of its first words are right in any case.
    """
    left, order = list(problem["written"]), []
    for place, word in enumerate(problem["form"]):
        right = place < given or rng.random() < CARE["plan"][place]
        order.append(word if right and word in left else left[0])
        left.remove(order[-1])
    return order


def unaided(rng, problem):
    """An attempt of the base model alone, in two parts."""
    if problem["kind"] == "plan":
        return by_plan(problem, own_plan(rng, problem))
    right, wrong = (work_out(order, problem["start"], problem["number"])
                    for order in (problem["form"], problem["written"]))
    named, followed, finished = (rng.random() < CARE["value"] for _ in range(3))
    if not named and rng.random() < GUESS:
        return with_value(problem, rng.randrange(1, 60))
    steps = right if named and followed else wrong
    return "Inside out: " if named else "As written: ", boxed(steps if finished else steps[:-1])


def remedy(problem, order):
    """What a critique says after "Mistake:", and the attempt that does it, in two parts."""
    if problem["kind"] == "plan":
        return f" the order. Right:{names(order)}.", by_plan(problem, order)
    steps = work_out(order, problem["start"], problem["number"])[:-1]
    text = ", ".join(text for text, _ in steps)
    return f" the first steps. Right: {text}.", with_value(problem, steps[-1][1])


def lesson(rng, problems):
    """One example for the base model: (prompt, prefix, completion).

    The prefix is the beginning of the model's own turn. Only the completion is trained.
    So the model learns what comes after the prefix, but not to say the prefix.
    problems: lists of the problems of each form.
    """
    problem = rng.choice(rng.choice(problems))
    kind, question = problem["kind"], problem["problem"]
    plan, steps = unaided(rng, problem)
    tasks = {"solve": 2, "know": 2, "revise": 4, "criticise": 2, "know the mistake": 1}
    task = rng.choices(list(tasks), tasks.values())[0]
    if task == "solve":
        return icrl.solver_prompt(question), "", plan + steps
    if task == "know":                                     # how an attempt that began well goes on
        if kind == "value":
            return icrl.solver_prompt(question), plan, steps
        given = rng.choice([1, 2, 3, 5, 5, 5])                # so many words of the right plan
        plan, steps = by_plan(problem, own_plan(rng, problem, given))
        prefix = plan if given == 5 else "Plan:" + names(problem["form"][:given])
        return icrl.solver_prompt(question), prefix, plan[len(prefix):] + steps
    if task == "revise":
        critique, (plan_then, steps_then) = remedy(problem, problem["form"])
        chance = rng.random()
        if chance < 0.25:
            return icrl.solver_prompt(question, rng.choice(VAGUE)), "", plan + steps
        if chance < 0.4:                                      # the critique of another problem
            other = rng.choice(rng.choice(problems))
            critique, _ = remedy(other, other["form"])
            if other["kind"] != kind:                         # it cannot be used
                plan_then, steps_then = plan, steps
            elif kind == "plan":
                plan_then, steps_then = by_plan(problem, other["form"])
            else:
                value = work_out(other["form"], other["start"], other["number"])[-2][1]
                plan_then, steps_then = with_value(problem, value)
        return icrl.solver_prompt(question, "Mistake:" + critique), "", plan_then + steps_then
    prompt = icrl.critic_prompt(question, plan + steps)
    knows = kind == "value" or rng.random() < KNOWS
    critique, _ = remedy(problem, problem["form"] if knows else own_plan(rng, problem))
    if task == "know the mistake":
        return prompt, "<critique>Mistake:", f"{critique}</critique>"
    critique = "Mistake:" + critique if rng.random() < OPENS[kind] else rng.choice(VAGUE)
    return prompt, "", f"<critique>{critique}</critique>"


# --------------------------------------------------------------------- the tokenizer and base model

def make_tokenizer():
    """Bytes, and one token for each number and each fixed phrase. Short texts make a fast toy."""
    prompts = icrl.solver_prompt("\0", "\0") + icrl.critic_prompt("\0", "\0")
    phrases = [part for part in prompts.split("\0") if part]
    phrases += [*VAGUE, "Try again.", "<critique>", "</critique>", "Mistake:", " the order. Right:",
                " the first steps. Right: ", "What is ", " + ", " - ", " * ", " = ", ", ", "^2",
                "Plan:", ". ", "Inside out: ", "As written: ", "With ", ": ",
                ". The answer is \\boxed{", "}."]
    phrases += [before + word for word in WORDS for before in (" ", ", ")]
    phrases += [str(number) for number in range(LARGEST + 1)]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"]
    core.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    core.add_tokens([AddedToken(p, normalized=False) for p in dict.fromkeys(phrases)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|end|>", pad_token="<|pad|>",
        clean_up_tokenization_spaces=False, model_max_length=512)
    tokenizer.chat_template = (
        "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}")
    return tokenizer


def warm_up(tokenizer, problems, rng, batch=64, lr=3e-3):
    """The base model: trained on lessons by the log-probs that the reinforcement learning uses."""
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, max_position_embeddings=512,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id))
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=STEPS, pct_start=0.1)

    def encode(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    begun = time.time()
    for step in range(1, STEPS + 1):
        lessons = []                                       # pairs of token ids: prompt, completion
        for prompt, prefix, text in (lesson(rng, problems) for _ in range(batch)):
            lessons.append((icrl.encode_chat(tokenizer, prompt) + encode(prefix),
                            encode(text) + [tokenizer.eos_token_id]))
        lessons.sort(key=lambda pair: len(pair[0]) + len(pair[1]))
        total, loss = sum(len(completion) for _, completion in lessons), 0.0
        for first in range(0, batch, 16):                     # of about the same length: few pads
            logp, _ = icrl.completion_logprobs(model, *zip(*lessons[first:first + 16]))
            part = -logp.sum() / total
            part.backward()
            loss += part.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 100 == 0 or step == 1:
            print(f"step {step}/{STEPS}  loss {loss:.3f}  {time.time() - begun:.0f} s", flush=True)
    return model


def main():
    """Write the problems, the tokenizer and the model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--choices", type=int, default=4, choices=(1, 2, 3, 4),
                        help="so many words of a plan are unlikely alone, with the same product")
    args = parser.parse_args()
    out = args.out
    CARE["plan"] = plan_care(args.choices)
    torch.set_num_threads(1)            # with another number of threads, sums are rounded otherwise
    rng = random.Random(0)
    out.mkdir(exist_ok=True)
    train, heldout, lessons = [], [], []
    for kind, form in ((kind, form) for kind, forms in FORMS.items() for form in forms):
        problems = problems_of(kind, form)
        rng.shuffle(problems)
        heldout += problems[:HELD_OUT]
        train += problems[HELD_OUT:HELD_OUT + TRAIN]
        lessons.append(problems[HELD_OUT:])
    for name, problems in (("train", train), ("heldout", heldout)):
        rng.shuffle(problems)
        rows = [{"problem": problem["problem"], "answer": problem["answer"],
                 "kind": f"where a {problem['kind']} helps"} for problem in problems]
        (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(out / "model")
    model = warm_up(tokenizer, lessons, rng)
    model.to(torch.bfloat16).save_pretrained(out / "model")
    print(sum(p.numel() for p in model.parameters()), "parameters in", out / "model")


if __name__ == "__main__":
    main()
