#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""When does it pay to train the critic? ICRL without a language model, in a table of logits.

A right answer needs n choices. Alone, the solver makes each of them with probability p, so that
it is right with p^n. A helpful critique raises p to g. The critic is helpful with probability c.
 1. A revision is right with about c g^n, and Eq. 4 multiplies the gradient of each of its choices
    by p / g. What is left of it, divided by that of a first attempt, is c (g / p)^(n - 1).
 2. With n = 1 that is c, at most 1: the weight takes back all that the critique gave.
 3. With n > 1 it grows with n, because the weight of a choice does not count the choices before
    it. This bias is what lets the solver learn from critiques at all.
 4. Adam and Eq. 5 forget the size of a gradient. Its absence matters. So a frozen critic does as
    well as a trained one if it helps a few times a step, or if luck is enough (large p^n).
 5. Training the critic pays if c is small and can grow: here by a habit that all kinds of problems
    share, and that is learnt in easy kinds, where it is paid. And n must be more than one.

    python math_data/theory.py [1.csv 2.csv 3.csv 4.csv --figure theory.png]

prints the accuracy alone after training, for n at equal p^n. If there are CSVs of real runs, it
prints the same from them. The CSV of n choices comes from

    python math_data/arithmetic/make.py --choices N --out WORLD
    python math_data/compare.py run FOLDER --arms icrl frozen --model WORLD/model

Beside requirements.txt, this needs scipy, and matplotlib for the figure.
"""
import argparse
from collections import defaultdict

import numpy as np
from compare import cell, ends, half_width, print_table, read_runs

KINDS = 8           # each has choices of its own; the first half is hard, the others are easy
HARD_RIGHT = 0.15**4            # p^n before training, as in arithmetic/make.py
HARD_C = 0.002                  # how often a critique helps before training
EASY_RIGHT = 0.1
EASY_C = 0.3
SEEDS = 16
QUERIES = 16
SAMPLES = 8
HELPED = 0.95       # g
LEARNING_RATE = 0.25


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def logit(p):
    return np.log(p / (1 - p))


def advantages(rewards):
    """Eq. 5 for one group."""
    rewards = np.array(rewards)
    return (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-6)


def attempt(logits, help_, rng):
    """Make the n choices, up to the first wrong one. Returns (reward, w * gradient of log p)."""
    gradient = np.zeros(len(logits))
    for i, x in enumerate(logits):
        alone = sigmoid(x)
        p = sigmoid(x + help_)
        right = rng.random() < p
        w = alone / p if right else (1 - alone) / (1 - p)       # Eq. 4
        gradient[i] = min(w, 2) * (right - alone)
        if not right:
            return 0.0, gradient / (i + 1)                      # Eq. 6: the mean over choices
    return 1.0, gradient / len(logits)


def train(arm, n, seed, own_scale=False, steps=50):
    """Train with a trained critic (arm "icrl") or a frozen one ("frozen"), n choices a problem.

    own_scale: whether Adam divides the gradient of each logit by its own size. In a network the
    logits share weights, so by default it divides all of them by their common size.
    Returns the accuracy without critique on hard kinds at the end.
    """
    rng = np.random.default_rng(seed)
    hard = np.arange(KINDS) < KINDS / 2
    start = logit(np.where(hard, HARD_RIGHT, EASY_RIGHT) ** (1 / n))
    solver = np.repeat(start[:, None], n, axis=1)
    help_ = logit(HELPED) - start
    critic = np.append(logit(np.where(hard, HARD_C, EASY_C)), 0.0)    # the last one is shared
    frozen = critic.copy()
    weights = [solver, critic]
    first, second = ([np.zeros_like(x) for x in weights] for _ in range(2))     # Adam's moments
    for step in range(1, steps + 1):
        gradients = [np.zeros_like(x) for x in weights]
        for kind in rng.integers(KINDS, size=QUERIES):
            attempts, critiques = [], []
            for _ in range(SAMPLES):
                attempts.append(attempt(solver[kind], 0.0, rng))
                if attempts[-1][0] == 1:
                    continue
                logits = frozen if arm == "frozen" else critic
                helps = sigmoid(logits[kind] + logits[-1])
                helpful = rng.random() < helps
                attempts.append(attempt(solver[kind], help_[kind] * helpful, rng))
                critiques.append((attempts[-1][0], helpful - helps))
            for A, (_, gradient) in zip(advantages([r for r, _ in attempts]), attempts):
                gradients[0][kind] += A * gradient
            if arm == "icrl" and len(critiques) > 1:
                for A, (_, gradient) in zip(advantages([r for r, _ in critiques]), critiques):
                    gradients[1][[kind, -1]] += A * gradient
        second = [0.98 * v + 0.02 * x**2 for v, x in zip(second, gradients)]
        common = np.mean([v.mean() for v in second])
        for x, moment, v, gradient in zip(weights, first, second, gradients):
            moment *= 0.9
            moment += 0.1 * gradient
            scale = np.sqrt((v if own_scale else common) / (1 - 0.98**step)) + 1e-9
            x += LEARNING_RATE * moment / (1 - 0.9**step) / scale
    return sigmoid(solver[hard]).prod(1).mean()


def draw(gains, image):
    """Draw icrl minus frozen over n. gains: {label: {n: differences of the seeds}}."""
    from matplotlib import pyplot
    pyplot.style.use("petroff10")
    figure, panel = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for label, by_n in gains.items():
        mean = [gain.mean() for gain in by_n.values()]
        half = [half_width(gain) for gain in by_n.values()]
        panel.errorbar(list(by_n), mean, half, marker="o", capsize=4, label=label)
    panel.set(xlabel="n, the choices that are unlikely alone", ylabel="icrl minus frozen critic",
              xticks=range(1, 6))
    panel.axhline(0, color="grey", linewidth=0.8)
    panel.grid(alpha=0.3)
    figure.legend(loc="outside upper center", ncols=3, title="mean and 95% interval")
    figure.savefig(image, dpi=90)


def simulated(n, own_scale):
    """The accuracies of icrl and of frozen after training: two arrays, over seeds."""
    return [np.array([train(arm, n, seed, own_scale) for seed in range(SEEDS)])
            for arm in ("icrl", "frozen")]


def measured(path):
    """The same for plan problems, from a CSV of compare.py."""
    runs = read_runs(path)
    seeds = sorted(runs["frozen"])
    return [ends(runs[arm], "accuracy where a plan helps", seeds) for arm in ("icrl", "frozen")]


def main(argv=None):
    """Print the means of icrl, of frozen and of their difference, with half the 95% intervals."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("csv", nargs="*", help="of compare.py: with 1 choice, with 2, and so on")
    parser.add_argument("--figure", help="draw into this file")
    args = parser.parse_args(argv)
    gains, rows = defaultdict(dict), []
    for n in range(1, 6):
        pairs = {"simulation, common scale": simulated(n, False),
                 "simulation, own scales": simulated(n, True)}
        if n <= len(args.csv):
            pairs["runs"] = measured(args.csv[n - 1])
        for label, (icrl, frozen) in pairs.items():
            gains[label][n] = icrl - frozen
            rows.append([str(n), label, cell(icrl), cell(frozen), cell(icrl - frozen, "+")])
    print_table(["n", "", "icrl", "frozen", "icrl minus frozen"], rows)
    if args.figure:
        draw(gains, args.figure)


if __name__ == "__main__":
    main()
