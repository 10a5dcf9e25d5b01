#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Train variants of ICRL, called arms, with several seeds, and compare them.

    python math_data/compare.py run FOLDER --arms icrl grpo_tokens --seeds 0 1 2 [--flag ...]
    python math_data/compare.py report FOLDER/compare.csv --figure curves.png

An arm is icrl.py with other settings, or with a few of its functions replaced: see arms.py.
Further flags of `run` are those of icrl.py. They hold for all arms, before an arm's own settings.

`run` saves each finished run at once, as FOLDER/ARM-SEED.json. If it is stopped, the same command
goes on with the runs that are missing. Two processes with different --seeds may share a folder.
FOLDER/compare.csv has a row for each evaluation. `report` prints Markdown tables and draws the
held-out accuracy over tokens and over CPU seconds.

Beside requirements.txt, this needs scipy 1.15 or later, and matplotlib for the figure.
"""
import argparse
import copy
import csv
import dataclasses
import itertools
import json
import math
import os
import random
import re
import sys
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import icrl  # noqa: E402
from arms import ARMS, GENERATE_TURNS, PRIMARY, ROLLOUT, fixed_critique, replaced  # noqa: E402

# In the figure: the arms and their labels.
DRAWN = {"icrl": "ICRL", "grpo_tokens": "GRPO, equal tokens", "frozen": "critic is not trained",
         "w_one": "w = 1", "grpo_seconds": "GRPO, equal CPU seconds"}


# ------------------------------------------------------------------------------------ training

def train(arm, config, budget):
    """Train one arm, as icrl.train does. Returns rows (dicts), one for each evaluation.

    budget: the run ends with the step that spends as many steps, tokens or seconds (arm.until).
    Seconds are CPU seconds of this process in training steps; evaluations do not count.
    """
    problems = icrl.load_problems(config.data)
    heldout = icrl.load_problems(config.heldout)
    random.Random(config.seed).shuffle(problems)
    model, tokenizer = icrl.load_model(config.model, config)
    icrl.check_context(model, tokenizer, problems + heldout, config)
    optimizer = icrl.make_optimizer(model, config)
    base = copy.deepcopy(model)
    critic = base if arm.base_critic else None
    spent = {"step": 0, "tokens": 0, "seconds": 0.0}
    updates = []                                            # since the last evaluation
    with replaced(arm.replace):
        rows = [{**spent, **evaluate(model, base, tokenizer, heldout, config)}]
        while spent[arm.until] < budget:
            start = time.process_time()
            spent["step"] += 1
            torch.manual_seed(1_000_003 * config.seed + spent["step"])
            places = range((spent["step"] - 1) * config.queries, spent["step"] * config.queries)
            batch = [problems[place % len(problems)] for place in places]
            turns = icrl.rollout(model, tokenizer, batch, config, critic)
            trained = [turn for turn in turns if turn.part != "critique" or arm.train_critic]
            updates.append(icrl.update(model, optimizer, trained, config))
            spent["tokens"] += sum(len(turn.completion) for turn in turns)
            spent["seconds"] += time.process_time() - start
            if spent[arm.until] >= budget or spent["step"] % config.eval_every == 0:
                rows.append({**spent, **evaluate(model, base, tokenizer, heldout, config)})
                for name in ("w_mean", "w_capped"):
                    values = [update[name] for update in updates]
                    rows[-1][name] = icrl.mean(value for value in values if value is not None)
                updates = []
        # The failures of the base solver. Before training, the current critic is the base critic.
        turns = second_tries(base, tokenizer, heldout, config, model)
    for name in ("fixed", "tokens per fix"):
        rows[-1][f"base solver: {name}, base critic"] = rows[0][f"{name}, current critic"]
        rows[-1][f"base solver: {name}, current critic"] = fixes(turns)[name]
    return rows


def evaluate(model, base, tokenizer, problems, config):
    """Accuracy, with the draws of icrl.evaluate, and what three critics are worth to the solver.

    They are the current one (the solver's own weights), the base model, and none, which means a
    plain second attempt. So all arms are measured alike.
    """
    turns = second_tries(model, tokenizer, problems, config, model)
    first = [turn for turn in turns if turn.part == "first"]
    figures = {"accuracy": icrl.mean(turn.reward for turn in first)}
    for kind in sorted({problem["kind"] for problem in problems}):
        rewards = [turn.reward for turn in first if problems[turn.query]["kind"] == kind]
        figures[f"accuracy {kind}"] = icrl.mean(rewards)
    solved = {turn.session for turn in turns if turn.part != "critique" and turn.reward == 1}
    figures["after one critique"] = len(solved) / len(first)
    figures["states answer"] = icrl.mean(
        states_answer(icrl.extract_critique(turn.text), problems[turn.query]["answer"])
        for turn in turns if turn.part == "critique")
    for name, critic in {"current": model, "base": base, "no": None}.items():
        if critic is not model:
            turns = second_tries(model, tokenizer, problems, config, critic, first)
        for figure, value in fixes(turns).items():
            figures[f"{figure}, {name} critic"] = value
    return figures


def second_tries(solver, tokenizer, problems, config, critic, first=()):
    """First attempts, and a critique and a revision of each failure: a list of Turns.

    critic: a model, or None for a plain second attempt. first: the first attempts (Turns), if
    there are some already. The random draws are the same at every call, and so for all critics.
    """
    config = dataclasses.replace(config, method="icrl", rounds=2, samples=config.eval_samples)
    generate = GENERATE_TURNS if critic else fixed_critique("")

    def generate_turns(model, tokenizer, part, *rest):
        if part == "first" and first:
            return first
        if part == "critique":
            torch.manual_seed(config.seed + 1000)
        return generate(model, tokenizer, part, *rest)

    torch.manual_seed(config.seed)
    with replaced({"generate_turns": generate_turns}):
        return ROLLOUT(solver, tokenizer, problems, config, critic)


def fixes(turns):
    """The share of failures that are fixed, and the critique tokens spent for each of these."""
    fixed = sum(turn.reward == 1 for turn in turns if turn.part == "revision")
    failures = sum(turn.reward < 1 for turn in turns if turn.part == "first")
    tokens = sum(len(turn.completion) for turn in turns if turn.part == "critique")
    return {"fixed": fixed / failures if failures else None,
            "tokens per fix": tokens / fixed if tokens and fixed else None}


def states_answer(critique, answer):
    """Whether a number or a box in a critique is the right answer."""
    numbers = re.findall(r"-?\d[\d.,/]*\d|-?\d", critique)
    stated = {icrl.extract_answer(critique) or "", *numbers}
    return any(icrl.is_correct(rf"\boxed{{{value}}}", answer) for value in stated)


def run(folder, arms, seeds, flags):
    """Train each arm with each seed, unless that is done. flags: those of icrl.py."""
    torch.set_num_threads(1)                                # as icrl.train does
    folder.mkdir(parents=True, exist_ok=True)
    # In the order of ARMS, icrl comes first. Others need its tokens and seconds.
    arms = [name for name in ARMS if name in arms]
    for seed, name in itertools.product(seeds, arms):
        arm = ARMS[name]
        done = folder / f"{name}-{seed}.json"
        own = [text for flag, value in arm.settings.items() for text in (f"--{flag}", str(value))]
        config = icrl.parse([*own, *flags, "--seed", str(seed), "--out", "none"])
        budget = config.steps
        if arm.until != "step":
            icrl_run = folder / f"icrl-{seed}.json"
            if not icrl_run.exists():
                raise icrl.UsageError(f"{name} spends what icrl spent: run icrl-{seed} first")
            budget = json.loads(icrl_run.read_text())["rows"][-1][arm.until]
        if not done.exists():
            rows = train(arm, config, budget)
            result = {"arm": name, "seed": seed, "settings": vars(config), "rows": rows}
            unfinished = done.with_suffix(".unfinished")    # a crash leaves no part of a file
            unfinished.write_text(json.dumps(result))
            unfinished.replace(done)
            print(f"{name}-{seed}: accuracy {rows[-1]['accuracy']:.2f}, "
                  f"{rows[-1]['seconds']:.0f} CPU seconds", flush=True)
        before = json.loads(done.read_text())["settings"]
        other = [f"--{flag}" for flag, value in vars(config).items() if before.get(flag) != value]
        if other:
            raise icrl.UsageError(f"{done} was run with another {', '.join(other)}")
        write_csv(folder)


def write_csv(folder):
    """Write compare.csv from all finished runs in the folder, those of other processes too."""
    runs = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    runs.sort(key=lambda run: (list(ARMS).index(run["arm"]), run["seed"]))
    rows = []
    for finished in runs:
        for row in finished["rows"]:
            figures = {name: round(value, 5) if value else value for name, value in row.items()}
            rows.append({"arm": finished["arm"], "seed": finished["seed"], **figures})
    columns = dict.fromkeys(name for row in rows for name in row)
    unfinished = folder / f"compare.{os.getpid()}"
    with open(unfinished, "w", newline="") as file:
        writer = csv.DictWriter(file, list(columns), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    unfinished.replace(folder / "compare.csv")


# ---------------------------------------------------------------------------------- statistics

def half_width(values):
    """Half the 95% interval of a mean, by Student's t. nan for fewer than four values."""
    if len(values) < 4:
        return math.nan
    return stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)


def sign_flip(differences):
    """Two-sided exact p of paired differences (numbers, at most about 20).

    Of all choices of their signs, this is the share whose mean is as far from 0 or farther. Sums
    that differ by less than 0.001 are equal: accuracies in a CSV are rounded.
    """
    signs = np.array(list(itertools.product((1, -1), repeat=len(differences))))
    return np.mean(abs(signs @ differences) > abs(sum(differences)) - 1e-3)


def holm(ps):
    """Correct n p values: the smallest is multiplied by n, the next by n - 1, and so on."""
    corrected = [0.0] * len(ps)
    largest = 0.0
    for rank, i in enumerate(np.argsort(ps)):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[i]))      # a larger p stays larger
        corrected[i] = largest
    return corrected


def crossings(x, y):
    """Where the line through the points (x, y) crosses 0."""
    points = itertools.pairwise(zip(x, y))
    return [x0 - y0 * (x1 - x0) / (y1 - y0) for (x0, y0), (x1, y1) in points if y0 * y1 < 0]


# -------------------------------------------------------------------------------------- report

def read_runs(path):
    """Read a CSV as {arm: {seed: rows}}. The rows of a run are its evaluations."""
    runs = defaultdict(lambda: defaultdict(list))
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            rows = runs[row.pop("arm")][int(row.pop("seed"))]
            rows.append({name: float(value or "nan") for name, value in row.items()})
    return dict(runs)


def ends(of_arm, name, seeds=None):
    """A column of the last row of each run of an arm, as an array."""
    return np.array([of_arm[seed][-1][name] for seed in seeds or of_arm])


def curves(of_arm, axis, grid):
    """The accuracy of each run at the points `grid` of an axis. After its end it stays the same."""
    return np.array([np.interp(grid, [row[axis] for row in rows], [row["accuracy"] for row in rows])
                     for rows in of_arm.values()])


def cell(values, sign=""):
    """The mean of an array as text, with half its 95% interval. nan is left out."""
    values = values[np.isfinite(values)]
    if len(values) == 0:
        return "-"
    digits = 0 if abs(values.mean()) >= 100 else 3
    half = half_width(values)
    text = f"{values.mean():{sign},.{digits}f}"
    return text if math.isnan(half) else f"{text} ± {half:,.{digits}f}"


def print_table(head, rows):
    """Print a Markdown table."""
    for row in [[], head, ["---"] * len(head), *rows]:
        print(f"| {' | '.join(row)} |" if row else "")


def print_ends(runs, columns):
    """Print columns of the last evaluation, for each arm."""
    print_table(["at the end", "runs", *columns], [
        [arm, str(len(of_arm)), *(cell(ends(of_arm, name)) for name in columns)]
        for arm, of_arm in runs.items()])


def print_comparisons(runs, columns):
    """Print the last evaluation of each arm minus that of its reference, paired by seed."""
    differences = {}
    for arm, of_arm in runs.items():
        other = runs.get(ARMS[arm].reference, {})
        seeds = [seed for seed in of_arm if seed in other]
        if seeds and arm != ARMS[arm].reference:
            differences[arm] = {name: ends(of_arm, name, seeds) - ends(other, name, seeds)
                                for name in columns}
    tested = [arm for arm in PRIMARY if arm in differences]
    p = [sign_flip(differences[arm]["accuracy"]) for arm in tested]
    p_cells = {arm: [f"{raw:.5f}", f"{corrected:.5f}"]
               for arm, raw, corrected in zip(tested, p, holm(p))}
    print_table(["arm", "minus", "pairs", *columns, "p of accuracy", f"Holm of {len(tested)}"], [
        [arm, ARMS[arm].reference, str(len(values["accuracy"])),
         *(cell(values[name], "+") for name in columns), *p_cells.get(arm, ["", ""])]
        for arm, values in differences.items()])


def print_by_step(runs, name):
    """Print the mean of a column at each evaluation of the first arm's runs."""
    steps = [row["step"] for row in next(iter(next(iter(runs.values())).values()))]
    rows = []
    for arm, of_arm in runs.items():
        at_steps = [[row[name] for rows in of_arm.values() for row in rows if row["step"] == step]
                    for step in steps]
        rows.append([arm, *(cell(np.array(values)) for values in at_steps)])
    print_table([name, *(f"step {step:.0f}" for step in steps)], rows)


def print_crossings(runs, arm, axis):
    """Print where the mean curves of icrl and another arm cross, and the largest leads."""
    seeds = [seed for seed in runs["icrl"] if seed in runs[arm]]
    pair = [{seed: runs[name][seed] for seed in seeds} for name in ("icrl", arm)]
    grid = np.linspace(0, min(ends(of_arm, axis).mean() for of_arm in pair), 1001)
    lead = curves(pair[0], axis, grid) - curves(pair[1], axis, grid)
    mean = lead.mean(0)
    best, worst = mean.argmax(), mean.argmin()
    crossed = ", ".join(f"{x:,.1f}" for x in crossings(grid, mean)) or "no point"
    print(f"\nicrl minus {arm} to {grid[-1]:,.0f} {axis}, {len(seeds)} pairs: they cross at "
          f"{crossed}; highest {cell(lead[:, best], '+')} at {grid[best]:,.1f}; "
          f"lowest {cell(lead[:, worst], '+')} at {grid[worst]:,.1f}")


def report(path, image):
    """Print all tables of a CSV, and draw its curves."""
    runs = read_runs(path)
    names = list(next(iter(next(iter(runs.values())).values()))[0])
    accuracies = [name for name in names if name.startswith("accuracy")]
    print_ends(runs, [*accuracies, "after one critique", "states answer", "tokens", "seconds"])
    print_comparisons(runs, accuracies)
    print_ends(runs, [name for name in names if "fixed, " in name])
    print_ends(runs, [name for name in names if "tokens per fix, " in name])
    for name in ["accuracy", "w_mean", "w_capped", *(n for n in names if n.startswith("fixed, "))]:
        print_by_step(runs, name)
    for arm, axis in itertools.product(["grpo_tokens", "grpo_seconds"], ["tokens", "seconds"]):
        if arm in runs and "icrl" in runs:
            print_crossings(runs, arm, axis)
    if image:
        draw({arm: runs[arm] for arm in DRAWN if arm in runs}, image)


def draw(runs, image):
    """Draw accuracy over tokens and over CPU seconds, with 95% intervals over runs."""
    from matplotlib import pyplot
    pyplot.style.use("petroff10")
    figure, panels = pyplot.subplots(1, 2, figsize=(12, 4.5), sharey=True, layout="constrained")
    for panel, axis, unit in zip(panels, ["tokens", "seconds"], ["tokens", "CPU seconds"]):
        for arm, of_arm in runs.items():
            grid = np.linspace(0, ends(of_arm, axis).mean(), 101)
            y = curves(of_arm, axis, grid)
            mean = y.mean(0)
            half = np.array([half_width(values) for values in y.T])
            panel.plot(grid, mean, label=f"{DRAWN[arm]} ({len(y)} runs)")
            panel.fill_between(grid, mean - half, mean + half, alpha=0.2)
        panel.set(xlim=(0, None), ylim=(0, 1), xlabel=f"{unit} spent in training")
        panel.locator_params(axis="x", nbins=5)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("held-out accuracy without critique")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=3,
                  title="mean and 95% interval")
    figure.savefig(image, dpi=90)


# -------------------------------------------------------------------------------- command line

def main(argv=None):
    """Run or report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("run", help="further flags are icrl.py's", allow_abbrev=False)
    command.add_argument("folder", type=Path)
    command.add_argument("--arms", nargs="+", choices=ARMS, default=["icrl", *PRIMARY])
    command.add_argument("--seeds", nargs="+", type=int, default=range(16))
    command = commands.add_parser("report", help="print tables and draw a figure")
    command.add_argument("csv", type=Path)
    command.add_argument("--figure", help="draw into this file")
    options, flags = parser.parse_known_args(argv)
    icrl.transformers.logging.set_verbosity_error()
    icrl.transformers.logging.disable_progress_bar()
    try:
        if options.command == "run":
            run(options.folder, options.arms, options.seeds, ["--eval_every", "10", *flags])
        else:
            report(options.csv, options.figure)
    except (icrl.UsageError, OSError) as error:
        sys.exit(f"compare.py: {error}")


if __name__ == "__main__":
    main()
