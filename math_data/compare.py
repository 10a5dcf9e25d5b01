#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Train variants of ICRL, called arms, with several seeds, and compare them.

Beside requirements.txt, this needs scipy 1.15 or later, and matplotlib for the figure.

    python math_data/compare.py run FOLDER --arms icrl grpo_tokens w_one --seeds 0 1 2 [--flag of icrl.py ...]
    python math_data/compare.py report FOLDER/compare.csv --figure curves.png --arms icrl grpo_tokens w_one

An arm is icrl.py with other settings, or with a few of its functions replaced. ARMS lists them. `run` saves each
finished run at once, as FOLDER/ARM-SEED.json. If it is stopped, the same command goes on with the runs that are
missing. Two processes with different --seeds may share a folder. FOLDER/compare.csv has a row for each evaluation.
`report` prints Markdown tables and draws the held-out accuracy without critique against the sampled tokens.
"""
import argparse
import contextlib
import copy
import csv
import dataclasses
import itertools
import json
import math
import os
import re
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import icrl  # noqa: E402

# ------------------------------------------------------------------------------------- functions that replace icrl's

# The originals. While an arm trains, the names in icrl.py may stand for the functions below.
GENERATE_TURNS, CRITIC_MESSAGES, OBJECTIVE = icrl.generate_turns, icrl.critic_messages, icrl.icrl_objective


def no_ratio(logp_free, logp_guided, w_max=2.0):
    """w = 1: revisions are trained as if they had been sampled without the critique."""
    return torch.ones_like(logp_free)


def sequence_ratio(logp_free, logp_guided, w_max=2.0):
    """One w for the whole revision: the product of the ratios of its tokens, at most w_max."""
    w = (logp_free - logp_guided).detach().sum(1, keepdim=True).exp().clamp(max=w_max)
    return w.expand_as(logp_free)


def shaped_weight(logp_free, logp_guided, w_max=2.0):
    """The weight of Critique-GRPO: p / (p + 0.1), where p is the probability of the token without the critique."""
    p = logp_free.detach().exp()
    return p / (p + 0.1)


# With two attempts a session, the part ("first", "critique" or "revision") tells both the role and the round.
by_problem_and_part = property(lambda turn: (turn.query, turn.part))
by_problem = property(lambda turn: turn.query)


def fixed_critique(text):
    """A function in place of generate_turns: every critique is `text`, and no token is sampled for it."""
    def generate_turns(model, tokenizer, part, sessions, chats, config):
        if part != "critique":
            return GENERATE_TURNS(model, tokenizer, part, sessions, chats, config)
        return [icrl.Turn(s // config.samples, s, part, [], [], [], text, truncated=False) for s in sessions]
    return generate_turns


def shuffled_critiques(model, tokenizer, part, sessions, chats, config):
    """In place of generate_turns: each session gets a critique that was written for another problem of the batch."""
    turns = GENERATE_TURNS(model, tokenizer, part, sessions, chats, config)
    if part == "critique":
        texts_of_others = [[other.text for other in turns if other.query != turn.query] for turn in turns]
        for turn, texts in zip(turns, texts_of_others):
            if texts:                                         # empty if only one problem is still unsolved
                turn.text = texts[torch.randint(len(texts), ()).item()]
    return turns


def official_advantages(rewards, groups):
    """Eq. 5 as in the authors' code. groups: (problem, part).

    A reward of 1 that nobody earned joins each group before its mean and std are taken. Critiques and revisions get
    advantage 0 unless their group has a success and a mean reward of at least 0.3. They still count in the mean of J.
    """
    rewards = torch.as_tensor(rewards, dtype=torch.float32)
    advantages = torch.zeros_like(rewards)
    for key in set(groups):
        members = [i for i, group in enumerate(groups) if group == key]
        r = rewards[members]
        if key[1] == "first" or r.max() == 1 and r.mean() >= 0.3:
            with_extra = torch.cat([r, torch.ones(1)])
            advantages[members] = (r - with_extra.mean()) / (with_extra.std() + 1e-6)
    return advantages


def boxed_answer_only(problem, attempt):
    """In place of critic_messages: the critic sees the answer in the attempt's box, but not how it was found."""
    answer = icrl.extract_answer(attempt)
    return CRITIC_MESSAGES(problem, rf"\boxed{{{answer}}}" if answer else "")


def gspo_objective(logp, logp_old, advantages, weights, mask, **clip):
    """Eq. 6 with the ratio of GSPO: every token has the same rho, the geometric mean of rho_t over its sample.

    The gradient still flows through each token's own log-prob (GSPO-token), so that w_t weighs single tokens. The
    authors of GSPO clip at 0.0003 and 0.0004; here the clip range is icrl.py's, for both arms alike.
    """
    log_rho = ((logp - logp_old) * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True)
    # icrl_objective computes exp(logp - logp_old) and detaches logp_old. With this logp_old, its value is exp(log_rho).
    return OBJECTIVE(logp, logp - log_rho, advantages, weights, mask, **clip)


# -------------------------------------------------------------------------------------------------------------- arms

@dataclasses.dataclass
class Arm:
    """What is different from icrl."""
    label: str                                                              # its name in the figure
    settings: dict = dataclasses.field(default_factory=dict)                # of icrl.Config
    replace: dict = dataclasses.field(default_factory=dict)                 # functions of icrl.py while the arm trains
    base_critic: bool = False                                               # the base model writes the critiques
    train_critic: bool = True                                               # False: the update leaves critiques out
    until: str = ""     # "tokens" or "seconds": train until as many are spent as in the icrl run with the same seed
    reference: str = "icrl"                                                 # the arm that it is compared with


ARMS = {
    "icrl": Arm("ICRL"),
    "grpo": Arm("GRPO", dict(method="grpo")),
    # These two have twice the samples a problem: a step then samples about as many tokens as one of icrl.
    "grpo_tokens": Arm("GRPO, equal tokens", dict(method="grpo"), until="tokens"),
    "grpo_seconds": Arm("GRPO, equal CPU time", dict(method="grpo"), until="seconds"),
    "w_one": Arm("ICRL, w = 1", replace={"calibration_ratio": no_ratio}),
    "w_sequence": Arm("ICRL, one w a sequence", replace={"calibration_ratio": sequence_ratio}),
    "w_shaped": Arm("ICRL, w = p / (p + 0.1)", replace={"calibration_ratio": shaped_weight}),
    "pooled": Arm("ICRL, both roles in a group", replace={"Turn.group": by_problem}),
    "role_round": Arm("ICRL, rounds apart", replace={"Turn.group": by_problem_and_part}),
    "frozen": Arm("frozen critic", base_critic=True, train_critic=False),
    "placebo": Arm('"Try again."', replace={"generate_turns": fixed_critique("Try again.")}, train_critic=False),
    "retry": Arm("no critique text", replace={"generate_turns": fixed_critique("")}, train_critic=False),
    "shuffled": Arm("critique of another problem", replace={"generate_turns": shuffled_critiques}, train_critic=False),
    # The authors' released code. It also gives first attempts and critiques a weight w. But they are trained under the
    # prompt they were sampled from, so that this w is 1 up to rounding, as it is here.
    "official": Arm("authors' code", replace={"Turn.group": by_problem_and_part, "role_advantages": official_advantages,
                                              "critic_messages": boxed_answer_only}),
    # The ratio rho differs from 1 only from the second optimiser step of a rollout on. So GSPO is run with two such
    # steps, and compared with icrl that has two as well.
    "icrl_two_steps": Arm("ICRL, two inner steps", dict(inner_steps=2)),
    "gspo_two_steps": Arm("ICRL with GSPO's ratio, two inner steps", dict(inner_steps=2),
                          {"icrl_objective": gspo_objective}, reference="icrl_two_steps"),
}
PRIMARY = ["grpo_tokens", "w_one", "frozen", "w_shaped"]      # only these get a p: they were planned before the runs
TARGET = 0.6                        # the report says how many tokens and seconds a run takes to reach this accuracy


def replaced(functions):
    """A context manager: within its `with` block, names in icrl.py stand for other functions."""
    stack = contextlib.ExitStack()
    for name, function in functions.items():
        stack.enter_context(mock.patch(f"icrl.{name}", function))
    return stack


# ---------------------------------------------------------------------------------------------------------- training

def train(arm, config, budget, log):
    """Train one arm. Returns a list of rows (dicts), one for each evaluation.

    budget: ("step", 50), ("tokens", 300000) or ("seconds", 60.0). The run ends with the step that reaches it. Seconds
    are CPU seconds of this process in training steps; evaluations do not count. log: the file for the held-out turns.
    """
    icrl.check(config)
    problems, heldout = icrl.load_problems(config.data), icrl.load_problems(config.heldout)
    if len(heldout) > config.eval_problems:                   # the choice that icrl.evaluate would make
        heldout = np.random.default_rng(0).choice(heldout, config.eval_problems, replace=False).tolist()
    model, tokenizer = icrl.load_model(config.model, config)
    icrl.check_context(model, tokenizer, problems + heldout, config)
    optimizer = icrl.make_optimizer(model, config)
    base = copy.deepcopy(model)
    critic = base if arm.base_critic else None
    spent, w = {"step": 0, "tokens": 0, "seconds": 0.0}, []                 # w: its means after the last evaluation
    # The replaced functions hold in the evaluations too: in the arm placebo, "after 1 critique" is after "Try again.".
    with replaced(arm.replace):
        rows = [{**spent, **evaluate(model, tokenizer, heldout, config, log, critic)}]
        while spent[budget[0]] < budget[1]:
            start = time.process_time()
            step = spent["step"] + 1
            torch.manual_seed(1_000_003 * config.seed + step)               # as in icrl.train
            turns = icrl.rollout(model, tokenizer, icrl.problems_of_step(problems, step, config), config, critic)
            trained = [turn for turn in turns if turn.part != "critique" or arm.train_critic]
            w.append(icrl.update(model, optimizer, trained, config)["w_mean"])
            spent = {"step": step, "tokens": spent["tokens"] + sum(len(turn.completion) for turn in turns),
                     "seconds": spent["seconds"] + time.process_time() - start}
            if spent[budget[0]] >= budget[1] or config.eval_every and step % config.eval_every == 0:
                rows.append({**spent, **evaluate(model, tokenizer, heldout, config, log, critic),
                             "w_mean": icrl.mean(value for value in w if value is not None)})
                w = []
        return [*rows[:-1], rows[-1] | critic_swap(base, model, tokenizer, heldout, config)]


def evaluate(model, tokenizer, problems, config, log, critic):
    """The figures of icrl.evaluate, the share of critiques that state the answer, and how many attempts were made."""
    figures = icrl.evaluate(model, tokenizer, problems, config, log, critic)
    answers = {problem["problem"]: problem["answer"] for problem in problems}
    turns = [json.loads(line) for line in log.read_text().splitlines()]
    figures["leaks"] = icrl.mean(states_answer(icrl.extract_critique(turn["text"]), answers[turn["problem"]])
                                 for turn in turns if turn["part"] == "critique")
    kinds = Counter(f"attempts {problem['kind']}" for problem in problems if "kind" in problem)
    counts = {"attempts": len(problems), **kinds}
    return figures | {name: count * config.eval_samples for name, count in counts.items()}


def states_answer(critique, answer):
    """Whether a critique gives the answer away: a number or a box in it that the grader accepts."""
    stated = {icrl.extract_answer(critique) or "", *re.findall(r"-?\d[\d.,/]*\d|-?\d", critique)}
    return any(icrl.is_correct(rf"\boxed{{{value}}}", answer) for value in stated)


def critic_swap(base, trained, tokenizer, problems, config):
    """Compare the trained critic with the base critic on the same failures, those of the base solver.

    The failures of a trained solver are fewer and harder. For each critic and each solver that revises: the share of
    the failures that are put right, and the critique tokens spent for each of these. In the arm official, both critics
    see the boxed answer only.
    """
    config = dataclasses.replace(config, method="icrl", rounds=2, samples=config.eval_samples)
    torch.manual_seed(config.seed)
    first = icrl.rollout(base, tokenizer, problems, dataclasses.replace(config, method="grpo"))
    failures = sum(turn.reward < 1 for turn in first)

    def replay(model, tokenizer, part, *rest):
        return first if part == "first" else GENERATE_TURNS(model, tokenizer, part, *rest)

    models, figures = {"base": base, "trained": trained}, {}
    for critic, solver in itertools.product(models, models):
        torch.manual_seed(config.seed)
        with replaced({"generate_turns": replay}):
            turns = icrl.rollout(models[solver], tokenizer, problems, config, models[critic])
        fixed = sum(turn.reward == 1 for turn in turns if turn.part == "revision")
        tokens = sum(len(turn.completion) for turn in turns if turn.part == "critique")
        figures[f"put right, {critic} critic, {solver} solver"] = fixed / failures if failures else None
        figures[f"tokens per fix, {critic} critic, {solver} solver"] = tokens / fixed if fixed else None
    return figures


def run(folder, arms, seeds, flags):
    """Train each arm with each seed, unless that is done, and write FOLDER/compare.csv. flags: those of icrl.py."""
    torch.set_num_threads(1)                                  # threads would wait for each other
    folder.mkdir(parents=True, exist_ok=True)
    arms = [name for name in ARMS if name in arms]            # in this order icrl is first; others need its tokens
    for seed, name in itertools.product(seeds, arms):
        arm, done, icrl_run = ARMS[name], folder / f"{name}-{seed}.json", folder / f"icrl-{seed}.json"
        config = dataclasses.replace(icrl.parse([*flags, "--seed", str(seed)]), out="", **arm.settings)
        if config.rounds != 2 and by_problem_and_part in arm.replace.values():
            raise icrl.UsageError(f"the arm {name} needs --rounds 2")
        budget = ("step", config.steps)
        if arm.until:
            if not icrl_run.exists():
                raise icrl.UsageError(f"{name} may spend as much as icrl; run icrl with seed {seed} first")
            budget = (arm.until, json.loads(icrl_run.read_text())["rows"][-1][arm.until])
            config.samples *= 2
        settings = dataclasses.asdict(config)
        if not done.exists():
            rows = train(arm, config, budget, folder / f"{name}-{seed}.heldout.jsonl")
            unfinished = done.with_suffix(".unfinished")      # a crash must not leave a part of a file
            unfinished.write_text(json.dumps({"arm": name, "seed": seed, "settings": settings, "rows": rows}))
            unfinished.replace(done)
            print(f"{name}, seed {seed}: accuracy {rows[0]['pass@1']:.2f} -> {rows[-1]['pass@1']:.2f}, "
                  f"{rows[-1]['tokens']:,} tokens, {rows[-1]['seconds']:.0f} CPU seconds", flush=True)
        before = json.loads(done.read_text())["settings"]
        other = [f"--{flag}" for flag in settings if before.get(flag) != settings[flag]]
        if other:
            raise icrl.UsageError(f"{done} was run with another {', '.join(other)}; choose another folder")
        write_csv(folder)


def write_csv(folder):
    """Write compare.csv from all finished runs in the folder, those of other processes too."""
    runs = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    runs.sort(key=lambda run: (list(ARMS).index(run["arm"]), run["seed"]))
    rows = [{"arm": run["arm"], "seed": run["seed"], **row} for run in runs for row in run["rows"]]
    unfinished = folder / f"compare.{os.getpid()}"
    with open(unfinished, "w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    unfinished.replace(folder / "compare.csv")


# -------------------------------------------------------------------------------------------------------- statistics

def half_width(values):
    """Half the 95% interval of a mean, by Student's t. nan for fewer than five values, or where all are equal."""
    if len(values) < 5 or values.std() == 0:
        return math.nan
    return stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)


def sign_flip(differences):
    """Two-sided p of paired differences: for what share of all choices of their signs is the mean as far from 0?

    Exact up to 16 pairs. With more there are too many choices; then it tries 100,000 random ones.
    """
    test = stats.permutation_test((differences,), np.mean, permutation_type="samples", n_resamples=100_000, rng=0)
    return test.pvalue


def holm(ps):
    """Correct n p values for n comparisons: the smallest is multiplied by n, the next by n - 1, and so on."""
    corrected, largest = [0.0] * len(ps), 0.0
    for rank, i in enumerate(np.argsort(ps)):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[i]))          # a larger p stays the larger one
        corrected[i] = largest
    return corrected


def cell(values, attempts=0, sign=""):
    """The mean of an array as text, with half its 95% interval. Values that are nan are left out.

    attempts: for a rate, the attempts of all runs together. If all of them fail, or none does, Student's t has no
    interval. Then it is Wilson's, as if the attempts were independent.
    """
    known = values[np.isfinite(values)]
    if len(known) == 0:
        return "-"
    mean, half = known.mean(), half_width(known)
    digits = 3 if half < 0.005 else 2 if abs(mean) < 10 else 1 if abs(mean) < 100 else 0
    text = f"{mean:{sign},.{digits}f}" + ("" if math.isnan(half) else f" ± {half:,.{digits}f}")
    if attempts > 0 and mean in (0, 1):
        low, high = stats.binomtest(int(mean * attempts), int(attempts)).proportion_ci(method="wilson")
        text += f" ({low:.3f} to {high:.3f})"
    return text + (f" ({len(known)} of {len(values)})" if len(known) < len(values) else "")


# ------------------------------------------------------------------------------------------------------------ report

def read_runs(path):
    """Read a CSV as {arm: {seed: rows}}. The rows of a run are its evaluations, the first before training."""
    runs = defaultdict(lambda: defaultdict(list))
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            arm, seed = row.pop("arm"), int(row.pop("seed"))
            runs[arm][seed].append({name: float(value or "nan") for name, value in row.items()})
    return runs


def spent_until(rows, name, target=TARGET):
    """Tokens or seconds until the accuracy without critique is `target`, by linear interpolation; nan if never."""
    for before, after in itertools.pairwise(rows):
        if after["pass@1"] >= target:
            share = max(0, target - before["pass@1"]) / (after["pass@1"] - before["pass@1"])
            return before[name] + share * (after[name] - before[name])
    return math.nan


def last(of_arm, name):
    """A column of the last row of each run, as an array; nan where it has no value."""
    return np.array([rows[-1].get(name, math.nan) for rows in of_arm.values()])


def print_tables(path):
    """Print Markdown tables of the last rows: accuracy and cost; accuracy by kind of problem; the critics."""
    runs = read_runs(path)
    before = {seed: rows[:1] for seed, rows in next(iter(runs.values())).items()}     # the same for all arms
    for rows in [rows for of_arm in runs.values() for rows in of_arm.values()]:
        rows[-1][f"tokens to {TARGET}"] = spent_until(rows, "tokens")
        rows[-1][f"seconds to {TARGET}"] = spent_until(rows, "seconds")
        rows[-1]["w_mean at first"] = rows[:2][-1].get("w_mean", math.nan)
    names = list(next(iter(before.values()))[0])
    for columns in [
        ["pass@1", "after 1 critique", "put right", "put wrong", "tokens", f"tokens to {TARGET}", "seconds",
         f"seconds to {TARGET}"],
        [name for name in names if name.startswith("pass@1 ")],
        [name for name in names if name.startswith("put right, ") or name.endswith("critic, base solver")]
        + ["leaks", "w_mean at first", "w_mean"],
    ]:
        print(f"\n| arm | runs | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 2)}")
        for arm, of_arm in {"before training": before, **runs}.items():
            cells = [arm, str(len(of_arm))]
            for name in columns:
                is_rate = name.startswith("pass@1")
                attempts = last(of_arm, name.replace("pass@1", "attempts")).sum() if is_rate else 0
                cells.append(cell(last(of_arm, name), attempts))
            print(f"| {' | '.join(cells)} |")


def print_comparisons(path):
    """Print the accuracy without critique of each arm, minus that of its reference, paired by seed; also by kind."""
    runs, differences = read_runs(path), {}
    names = [name for name in next(iter(next(iter(runs.values())).values()))[-1] if name.split(" ")[0] == "pass@1"]
    for arm, of_arm in runs.items():
        reference = runs.get(ARMS[arm].reference, {})
        pairs = [(rows[-1], reference[seed][-1]) for seed, rows in of_arm.items() if seed in reference]
        if pairs and arm != ARMS[arm].reference:
            differences[arm] = {name: np.array([row[name] - other[name] for row, other in pairs]) for name in names}
    tested = [arm for arm in PRIMARY if arm in differences and len(differences[arm]["pass@1"]) > 1]
    p = dict(zip(tested, holm([sign_flip(differences[arm]["pass@1"]) for arm in tested])))
    print(f"\n| arm | minus | pairs | {' | '.join(names)} | p of pass@1 |\n|{'---|' * (len(names) + 4)}")
    for arm, values in differences.items():
        cells = [cell(values[name], sign="+") for name in names] + [f"{p[arm]:.4f}" if arm in p else ""]
        print(f"| {arm} | {ARMS[arm].reference} | {len(values['pass@1'])} | {' | '.join(cells)} |")
    print(f"\np: sign-flip test, Holm-corrected for {len(tested)} comparisons. ±: half the 95% interval over runs.")


# Colours that people with any kind of colour vision can tell apart (Okabe and Ito).
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]


def draw(paths, columns, arms, image):
    """Draw columns of CSVs against sampled tokens, a panel for each, with 95% intervals over runs."""
    from matplotlib import pyplot
    places = list(itertools.product(paths, columns))
    figure, panels = pyplot.subplots(1, len(places), figsize=(6 * len(places), 4), sharey=True, squeeze=False)
    for panel, (path, column) in zip(panels[0], places):
        runs = read_runs(path)
        for number, arm in enumerate(arms):                   # an arm has the same colour in each panel
            if arm not in runs:
                continue
            # The runs of an arm differ in tokens. So each is read at the same 101 shares of its own tokens.
            shares, x, y = np.linspace(0, 1, 101), [], []
            for rows in runs[arm].values():
                tokens = np.array([row["tokens"] for row in rows])
                x.append(shares * tokens[-1] / 1000)
                y.append(np.interp(shares, tokens / tokens[-1], [row[column] for row in rows]))
            x, mean, half = np.mean(x, 0), np.mean(y, 0), np.array([half_width(values) for values in np.transpose(y)])
            style = dict(color=COLOURS[number % len(COLOURS)], linestyle=["-", "--", ":"][number // len(COLOURS)])
            panel.plot(x, mean, linewidth=2.2, label=f"{ARMS[arm].label} ({len(y)} runs)", **style)
            panel.fill_between(x, mean - half, mean + half, color=style["color"], alpha=0.18, linewidth=0)
        title = " ".join([path.stem] * (len(paths) > 1) + [column] * (len(columns) > 1))
        panel.set(title=title.replace("pass@1 ", "kinds: "), xlim=(0, None), ylim=(0, 1),
                  xlabel="thousand tokens sampled in training")
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.25)
    panels[0, -1].legend(frameon=False, title="mean, and its 95% interval", alignment="left", loc="upper left",
                         bbox_to_anchor=(1, 1))
    panels[0, 0].set_ylabel("held-out accuracy without critique")
    figure.savefig(image, dpi=150, bbox_inches="tight")
    print(f"\nthe figure is in {image}")


# ------------------------------------------------------------------------------------------------------ command line

def main(argv=None):
    """Returns the exit code: 0, or 2 if the user can mend it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    three = ["icrl", "grpo_tokens", "w_one"]
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("run", help="train; all further flags are those of icrl.py", allow_abbrev=False)
    command.add_argument("folder", type=Path)
    command.add_argument("--arms", nargs="+", choices=ARMS, default=three, metavar="ARM",
                         help=f"some of {', '.join(ARMS)}")
    command.add_argument("--seeds", nargs="+", type=int, default=list(range(8)))
    command = commands.add_parser("report", help="print tables and draw a figure")
    command.add_argument("csv", nargs="+", type=Path)
    command.add_argument("--figure", help="draw into this file")
    command.add_argument("--columns", nargs="+", default=["pass@1"], help='to draw, such as "pass@1 method"')
    command.add_argument("--arms", nargs="+", choices=ARMS, default=three, metavar="ARM", help="arms in the figure")
    options, flags = parser.parse_known_args(argv)
    if options.command == "report" and flags:
        parser.error(f"unknown: {' '.join(flags)}")
    icrl.logging.set_verbosity_error()
    icrl.logging.disable_progress_bar()
    try:
        if options.command == "run":
            run(options.folder, options.arms, options.seeds, flags)
        else:
            for path in options.csv:
                print_tables(path)
                print_comparisons(path)
            if options.figure:
                draw(options.csv, options.columns, options.arms, options.figure)
    except (icrl.UsageError, OSError) as error:
        print(f"compare.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
