#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
r"""ICRL on many GPUs: icrl.py's sessions and equations in TRL's GRPOTrainer.

Beside requirements.txt, this needs TRL: pip install trl peft. It was run with TRL 1.16.0, transformers 5.24.0,
accelerate 1.15.0, datasets 5.2.0 and peft 0.21.2. results/ENGINES.md says what was run and what was not.

    python math_data/icrl_trl.py                                           one process, the small model
    accelerate launch --num_processes 2 math_data/icrl_trl.py              two processes, each with its own GPU
    torchrun --nproc_per_node 2 math_data/icrl_trl.py --use_cpu            two processes without a GPU
    accelerate launch --num_processes 8 math_data/icrl_trl.py --model_name_or_path Qwen/Qwen3-4B-Instruct-2507 \
        --data train.jsonl --learning_rate 1e-6 --bf16 --gradient_checkpointing --max_completion_length 1024 \
        --max_critique 512 --per_device_train_batch_size 2 --gradient_accumulation_steps 8

From icrl.py come Algorithm 1, the prompts, the answer checker and the equations. From TRL and accelerate come the
processes (DDP; FSDP or DeepSpeed by `accelerate config`), the sampling (by transformers or, with --use_vllm, by vLLM),
LoRA (--use_peft), logging and checkpoints. The flags are those of TRL's GRPOConfig and ModelConfig. TRL's own loss,
rewards and evaluation are not used.

In a step, each process runs per_device_train_batch_size * gradient_accumulation_steps sessions, all sessions of a
problem on the same process. A session has up to 2 K - 1 turns. So a forward pass of the update holds up to 2 K - 1
times per_device_train_batch_size rows. To measure the trained model on held-out problems, run
python icrl.py --steps 0 --model runs/trl --heldout FILE. (A LoRA adapter must be merged into its model first.)

Two things differ from icrl.py. A step in which every advantage is 0 still moves the weights a little, by the momentum
of AdamW. And with transformers, a batch is sampled until its longest completion ends, which is slower.
"""
import dataclasses
import math
import sys
from pathlib import Path
from typing import Literal
from unittest import mock

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from transformers.hf_argparser import HfArg
from trl import GRPOConfig, GRPOTrainer, ModelConfig, TrlParser, get_peft_config, get_quantization_config
from trl.trainer.utils import pad

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import icrl  # noqa: E402


@dataclasses.dataclass
class ICRLConfig(GRPOConfig):
    """TRL's settings and four of icrl.py's. TRL has its own names for others: num_generations is G, for example."""
    data: str = HfArg(default=icrl.Config.data, help="training problems (JSONL)")
    method: Literal["icrl", "grpo"] = HfArg(default="icrl", help="grpo: one attempt per session and no critic")
    rounds: int = HfArg(default=2, help="attempts per session at most (K)")
    max_critique: int = HfArg(default=48, help="tokens per critique at most")
    # TRL's own settings, with the values that icrl.py has for the small model.
    output_dir: str = "runs/trl"
    per_device_train_batch_size: int = 32
    gradient_accumulation_steps: int = 4
    max_steps: int = 50
    max_completion_length: int = 48
    learning_rate: float = 4e-4
    lr_scheduler_type: str = "constant"
    adam_beta2: float = 0.98
    weight_decay: float = 0.1
    epsilon_high: float = 0.28
    bf16: bool = False
    gradient_checkpointing: bool = False
    disable_dropout: bool = True                    # with dropout, rho would not be 1 before the first step
    logging_steps: float = 1
    ddp_find_unused_parameters: bool = False
    report_to: str = "none"


class ICRLTrainer(GRPOTrainer):
    """GRPOTrainer with sessions in place of single attempts, and Eq. 6 in place of its loss.

    problems: dicts with "problem" and "answer". kwargs: whatever else GRPOTrainer takes.
    """

    def __init__(self, model, args, problems, **kwargs):
        if args.steps_per_generation != args.gradient_accumulation_steps:
            raise ValueError("all turns of a rollout must train in one step: do not set steps_per_generation")
        if args.per_device_train_batch_size * args.gradient_accumulation_steps % args.num_generations:
            raise ValueError("per_device_train_batch_size * gradient_accumulation_steps must be a multiple of "
                             "num_generations: all sessions of a problem run on one process")
        rows = [{"prompt": p["problem"], "problem": p["problem"], "answer": p["answer"]} for p in problems]
        # TRL wants a reward function, but the rewards come with the turns: this one is never called.
        super().__init__(model, icrl.outcome_reward, args, Dataset.from_list(rows), **kwargs)
        self.settings = icrl.Config(
            method=args.method, samples=args.num_generations, rounds=args.rounds if args.method == "icrl" else 1,
            max_response=args.max_completion_length, max_critique=args.max_critique, temperature=args.temperature,
            sample_batch=2**31)                     # one call of `sample` for all live sessions
        icrl.check(self.settings)
        self.eos_token_ids = sorted(icrl.stop_tokens(self.model, self._tokenizer))

    def sample(self, _, tokenizer, prompts, limit, temperature):
        """What icrl.sample does, with the engine that TRL is set to. TRL has the model and the temperature already.

        vLLM, FSDP and DeepSpeed let the processes wait for each other, and vLLM takes equally many prompts from each.
        So a process with fewer prompts than another one repeats its first prompt, and drops what comes of it.
        """
        self.calls += 1
        if self.use_vllm:
            self.vllm_generation.max_completion_length = limit
        else:
            self.generation_config.max_new_tokens = limit
            self.generation_config.eos_token_id = self.eos_token_ids
        repeats = max(gather_object([len(prompts)])) - len(prompts)
        sampled, _ = self._generate_single_turn(prompts + prompts[:1] * repeats, None, {}, num_generations=1)
        completions, truncated = [], []
        for tokens in sampled[:len(prompts)]:
            end = next((t + 1 for t, token in enumerate(tokens) if token in self.eos_token_ids), None)
            completions.append(list(tokens[:end]))
            truncated.append(end is None)
        return completions, truncated

    def _generate_and_score_completions(self, inputs):
        """Algorithm 1 and Eq. 5. TRL calls this once per rollout, with each problem num_generations times in a row."""
        self.calls = 0
        with mock.patch.object(icrl, "sample", self.sample):  # icrl.rollout calls it under this name
            turns = icrl.rollout(None, self._tokenizer, inputs[::self.num_generations], self.settings)
        # A process whose attempts are all right asks for no more critiques and revisions. It samples all the same,
        # because the other processes may wait for it.
        while self.accelerator.num_processes > 1 and self.calls < 2 * self.settings.rounds - 1:
            limit = self.settings.max_critique if self.calls % 2 == 1 else self.settings.max_response
            self.sample(None, self._tokenizer, [turns[0].prompt], limit, None)
        # All sessions of a problem are here, so the groups of Eq. 5 are complete.
        advantages = icrl.role_advantages([t.reward for t in turns], [t.group for t in turns])
        for turn, A in zip(turns, advantages.tolist()):
            turn.advantage = A
        turns_of_all = gather_object(turns)
        for name, value in icrl.rollout_stats(turns_of_all).items():
            if value is not None:
                self._metrics["train"][name].append(value)
        self._logs["prompt"].extend(self._tokenizer.batch_decode([t.prompt for t in turns_of_all]))
        self._logs["completion"].extend(t.text for t in turns_of_all)
        self._logs["rewards"]["reward"].extend(t.reward for t in turns_of_all)
        self._logs["advantages"].extend(t.advantage for t in turns_of_all)
        # As in icrl.py, a turn with advantage 0 is left out, but it counts in the mean over all samples. The processes
        # then have different numbers of rows. Each is filled up with rows of advantage 0, which do not count.
        active = [turn for turn in turns if turn.advantage != 0]
        passes = self.args.gradient_accumulation_steps
        rows = passes * math.ceil(max([1, *gather_object([len(active)])]) / passes)
        active += [dataclasses.replace(turns[0], advantage=0.0)] * (rows - len(active))
        return {"advantages": torch.tensor([t.advantage for t in active], device=self.accelerator.device),
                "turns": active, "samples": torch.tensor(len(turns_of_all))}

    def log_probs(self, model, prompts, completions):
        """What icrl.completion_logprobs does, by TRL's forward pass."""
        ids, masks = [], []
        for side, rows in ("left", prompts), ("right", completions):
            rows = [torch.tensor(row, device=self.accelerator.device) for row in rows]
            ids.append(pad(rows, self._tokenizer.pad_token_id, side))
            masks.append(pad([torch.ones_like(row) for row in rows], 0, side))
        longest = ids[1].shape[1]
        logp, _, _ = self._get_per_token_logps_and_entropies(model, torch.cat(ids, 1), torch.cat(masks, 1), longest)
        return logp.float() * masks[1], masks[1].float()

    def _compute_loss(self, model, inputs):
        """Eq. 4 and Eq. 6, for one of the micro-batches of a rollout."""
        turns, completions = inputs["turns"], [t.completion for t in inputs["turns"]]
        first = "weights" not in inputs             # with num_iterations above 1, TRL passes the same dict again
        if first:
            with torch.no_grad():
                logp_guided, _ = self.log_probs(model, [t.prompt for t in turns], completions)
        logp, mask = self.log_probs(model, [t.free_prompt for t in turns], completions)
        if first:
            # No weight has moved since the rollout. Both terms of w come from this forward pass and not from the
            # sampler, whose log-probs may differ (vLLM's do). All rows take part, so that every process makes the same
            # passes, but only revisions get a weight.
            is_revision = torch.tensor([[t.part == "revision"] for t in turns], device=logp.device)
            ratio = icrl.calibration_ratio(logp, logp_guided)
            inputs.update(weights=torch.where(is_revision, ratio, 1.0), logp_old=logp.detach())
            w = gather_object(ratio[is_revision & mask.bool()].tolist())
            if w:
                self._metrics["train"]["w_mean"].append(sum(w) / len(w))
        J = icrl.icrl_objective(logp, inputs["logp_old"], inputs["advantages"], inputs["weights"], mask,
                                self.epsilon_low, self.epsilon_high)
        # J is the mean of these rows. Their sum, divided by the number of samples of all processes, is their part of
        # the mean over all samples. TRL adds up the micro-batches, but averages over the processes.
        return -J * len(turns) * self.accelerator.num_processes / inputs["samples"]


def main():
    """Train as the command line says, and save the model in --output_dir."""
    args, model = TrlParser((ICRLConfig, ModelConfig)).parse_args_and_config()
    args.model_init_kwargs = {"dtype": model.dtype, "attn_implementation": model.attn_implementation,
                              "revision": model.model_revision, **(args.model_init_kwargs or {})}
    trainer = ICRLTrainer(model.model_name_or_path or icrl.Config.model, args, icrl.load_problems(args.data),
                          peft_config=get_peft_config(model), quantization_config=get_quantization_config(model))
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()


if __name__ == "__main__":
    main()
