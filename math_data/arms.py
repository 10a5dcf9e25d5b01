# SPDX-License-Identifier: MIT
"""The arms that compare.py compares: what each of them changes in icrl.py.

An arm has other settings, or it replaces a few functions of icrl.py by those below.
"""
import dataclasses
import itertools
import math
import sys
from pathlib import Path
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import icrl  # noqa: E402

# ------------------------------------------------------------- functions that replace icrl's

# The originals. While an arm trains, the names in icrl.py may stand for the functions below.
CRITIC_PROMPT = icrl.critic_prompt
GENERATE_TURNS = icrl.generate_turns
OBJECTIVE = icrl.icrl_objective
ROLLOUT = icrl.rollout


def no_ratio(logp_free, logp_guided):
    """w = 1: revisions are trained as if they had been sampled without the critique."""
    return torch.ones_like(logp_free)


def sequence_ratio(logp_free, logp_guided):
    """One w for the whole revision: the product of the ratios of its tokens, at most 2."""
    log_w = (logp_free - logp_guided).detach().sum(1, keepdim=True)
    return log_w.exp().clamp(max=2).expand_as(logp_free)


def shaped_weight(logp_free, logp_guided):
    """The weight of Critique-GRPO: p / (p + 0.1), with p the probability without the critique."""
    p = logp_free.detach().exp()
    return p / (p + 0.1)


def drop_unlikely(logp_free, logp_guided):
    """The rule of RLTF (arXiv 2602.02482): w is 0 where log p without critique is below -5."""
    return (logp_free.detach() >= -5).float()


class PooledTurn(icrl.Turn):
    """Both roles of a problem are in one group."""
    group = property(lambda turn: turn.query)


class ByRoundTurn(icrl.Turn):
    """Groups by round, too. With two attempts a session, the part tells both role and round."""
    group = property(lambda turn: (turn.query, turn.part))


def fixed_critique(text):
    """In place of generate_turns: each critique is `text`, and no token is sampled for it."""
    def generate_turns(model, tokenizer, part, sessions, prompts, config, free_prompts=None):
        if part != "critique":
            return GENERATE_TURNS(model, tokenizer, part, sessions, prompts, config, free_prompts)
        return [icrl.Turn(s // config.samples, s, part, [], [], [], text, False) for s in sessions]
    return generate_turns


def shuffled_critiques(model, tokenizer, part, *rest):
    """In place of generate_turns: a session gets the critique of another problem of the batch."""
    turns = GENERATE_TURNS(model, tokenizer, part, *rest)
    if part == "critique":
        original = [(turn.query, turn.text) for turn in turns]
        for turn in turns:
            others = [text for query, text in original if query != turn.query]
            if others:                          # there are none if one problem is left unsolved
                turn.text = others[torch.randint(len(others), ()).item()]
    return turns


def official_advantages(rewards, groups, delta=1e-6):
    """Eq. 5 as in the authors' code. groups: (problem, part).

    A reward of 1 that nobody earned joins each group before its mean and std are taken. Critiques
    and revisions get advantage 0 unless their group has a success and a mean reward of 0.3 or
    more. They still count in the mean of J.
    """
    rewards = torch.as_tensor(rewards, dtype=torch.float32)
    advantages = torch.zeros_like(rewards)
    for key in set(groups):
        members = [i for i, group in enumerate(groups) if group == key]
        r = rewards[members]
        if key[1] == "first" or (r.max() == 1 and r.mean() >= 0.3):
            with_extra = torch.cat([r, torch.ones(1)])
            advantages[members] = (r - with_extra.mean()) / (with_extra.std() + delta)
    return advantages


def boxed_answer_only(problem, attempt):
    """In place of critic_prompt: the critic sees the answer in the box, but not the way to it.

    It needs a base model whose critic was trained for that. To make one, assign this function to
    icrl.critic_prompt, and call main() of arithmetic/make.py.
    """
    answer = icrl.extract_answer(attempt)
    return CRITIC_PROMPT(problem, rf"\boxed{{{answer}}}" if answer else "")


def gspo_objective(logp, logp_old, advantages, weights, mask):
    """Eq. 6 with GSPO's ratio: rho is the geometric mean of rho_t over the sample, for each token.

    The gradient still flows through each token's own log-prob (GSPO-token), so that w_t weighs
    single tokens. GSPO clips at 0.0003 and 0.0004. Here the bounds are icrl.py's, as in the arm
    that it is compared with.
    """
    log_rho = ((logp - logp_old) * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True)
    # icrl_objective takes exp(logp - logp_old), without a gradient through logp_old. With the
    # logp_old that it gets here, the value is exp(log_rho).
    return OBJECTIVE(logp, logp - log_rho, advantages, weights, mask)


def pay_for_transfer(model, tokenizer, problems, config, critic=None):
    """In place of rollout: a critique earns less if the solver alone would not revise like this.

    The reward of Eq. 3 is multiplied by exp(min(d, 0) / 0.3), after HiLL (arXiv 2604.00698). d is
    the mean over the right revision's tokens of log p without minus log p with the critique.
    """
    turns = ROLLOUT(model, tokenizer, problems, config, critic)
    for critique, revision in itertools.pairwise(turns):        # each stands before its revision
        if revision.part == "revision" and revision.reward == 1:
            completion = [revision.completion]
            with torch.no_grad():
                free, guided = (
                    icrl.completion_logprobs(model, [prompt], completion, config.temperature)[0]
                    for prompt in (revision.free_prompt, revision.prompt))
            critique.reward *= math.exp(min((free - guided).mean().item(), 0) / 0.3)
    return turns


# ---------------------------------------------------------------------------------------- arms

@dataclasses.dataclass
class Arm:
    """What is different from icrl."""
    settings: dict = dataclasses.field(default_factory=dict)    # flags of icrl.py
    replace: dict = dataclasses.field(default_factory=dict)     # functions of icrl.py
    base_critic: bool = False       # the base model writes the critiques
    train_critic: bool = True       # False: the update leaves the critiques out
    until: str = "step"             # "tokens", "seconds": until as many as icrl with this seed
    reference: str = "icrl"         # the arm that it is compared with


# The best of three learning rates and three G for GRPO: see results/PLAN.md.
GRPO = {"method": "grpo", "samples": 32}
ARMS = {
    "icrl": Arm(),
    "grpo_tokens": Arm(GRPO, until="tokens"),
    "frozen": Arm(base_critic=True, train_critic=False),
    "shuffled": Arm(replace={"generate_turns": shuffled_critiques}, train_critic=False),
    "w_one": Arm(replace={"calibration_ratio": no_ratio}),
    "w_shaped": Arm(replace={"calibration_ratio": shaped_weight}),
    # Those above are the primary comparisons.
    "grpo": Arm({"method": "grpo"}),
    "grpo_seconds": Arm(GRPO, until="seconds"),
    "retry": Arm(replace={"generate_turns": fixed_critique("")}, train_critic=False),
    "placebo": Arm(replace={"generate_turns": fixed_critique("Try again.")}, train_critic=False),
    "untrained": Arm(train_critic=False),
    "w_sequence": Arm(replace={"calibration_ratio": sequence_ratio}),
    "drop_unlikely": Arm(replace={"calibration_ratio": drop_unlikely}),
    "pooled": Arm(replace={"Turn": PooledTurn}),
    "role_round": Arm(replace={"Turn": ByRoundTurn}),
    "official_advantages": Arm(
        replace={"Turn": ByRoundTurn, "role_advantages": official_advantages}),
    "official_view": Arm(replace={"critic_prompt": boxed_answer_only}),
    "paid_for_transfer": Arm(replace={"rollout": pay_for_transfer}),
    "three_rounds": Arm({"rounds": 3}),
    # rho differs from 1 only from the second optimiser step of a rollout on.
    "icrl_two_steps": Arm({"inner_steps": 2}),
    "gspo_two_steps": Arm({"inner_steps": 2}, {"icrl_objective": gspo_objective},
                          reference="icrl_two_steps"),
}
# Only these get a p: they were planned before the runs.
PRIMARY = ["grpo_tokens", "frozen", "shuffled", "w_one", "w_shaped"]


def replaced(functions):
    """A context manager: within its `with` block, names in icrl.py stand for other functions."""
    return mock.patch.dict(vars(icrl), functions)
