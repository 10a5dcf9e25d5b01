#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
r"""ICRL on many GPUs: icrl.py's sessions and equations in TRL's GRPOTrainer.

Beside requirements.txt, this needs TRL: pip install trl==1.16.0 peft==0.21.2. The page
results/SPEED.md says what was run and what was not.

    python math_data/icrl_trl.py                                        one process
    torchrun --nproc_per_node 2 math_data/icrl_trl.py --use_cpu         two, without a GPU
    accelerate launch --num_processes 2 math_data/icrl_trl.py           two, each with its own GPU
    accelerate launch --num_processes 8 math_data/icrl_trl.py \
        --model_name_or_path Qwen/Qwen3-4B-Instruct-2507 --data train.jsonl --learning_rate 1e-6 \
        --bf16 --gradient_checkpointing --max_completion_length 1024 --max_critique 512 \
        --per_device_train_batch_size 2 --gradient_accumulation_steps 8

From icrl.py come Algorithm 1, the prompts, the answer checker, the equations and the log-probs.
From TRL and accelerate come the processes (DDP; FSDP or DeepSpeed by `accelerate config`), the
sampling (by transformers or, with --use_vllm, by vLLM), LoRA (--use_peft), logging and
checkpoints. The flags are those of TRL's GRPOConfig and ModelConfig. TRL's own loss, rewards and
evaluation are not used, nor are its flags for them.

In a step, each process runs per_device_train_batch_size * gradient_accumulation_steps sessions,
all sessions of a problem on the same process. A session has up to 2 K - 1 turns. So a forward
pass of the update holds up to 2 K - 1 times per_device_train_batch_size rows.

To check a model before training, and to measure it afterwards on held-out problems:
python icrl.py --steps 0 --model FOLDER --heldout FILE. (Merge a LoRA adapter into its model
first.)

Two things differ from icrl.py. A batch is sampled until its longest completion ends, which is
slower. And with --bf16, TRL keeps float32 weights on the device.
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
from transformers import GenerationConfig
from transformers.hf_argparser import HfArg
from trl import (GRPOConfig, GRPOTrainer, ModelConfig, TrlParser, get_peft_config,
                 get_quantization_config)

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import icrl  # noqa: E402


@dataclasses.dataclass
class ICRLConfig(GRPOConfig):
    """TRL's settings, and four of icrl.py's. TRL names others its own way: G is num_generations."""
    data: str = HfArg(default=icrl.Config.data, help="training problems (JSONL)")
    method: Literal["icrl", "grpo"] = HfArg(default="icrl", help="grpo: no critic")
    rounds: int = HfArg(default=icrl.Config.rounds, help="attempts per session at most (K)")
    max_critique: int = HfArg(default=icrl.Config.max_critique, help="tokens per critique at most")
    # TRL's own settings, with the values of icrl.py. Here, 128 sessions per step are 32 times 4.
    output_dir: str = "runs/trl"
    per_device_train_batch_size: int = 32
    gradient_accumulation_steps: int = 4
    max_steps: int = icrl.Config.steps
    max_completion_length: int = icrl.Config.max_response
    learning_rate: float = icrl.Config.lr
    lr_scheduler_type: str = "constant"
    adam_beta2: float = 0.98
    weight_decay: float = 0.1
    epsilon_high: float = 0.28
    bf16: bool = False
    gradient_checkpointing: bool = False
    logging_steps: float = 1
    ddp_find_unused_parameters: bool = False
    report_to: str = "none"


class ICRLTrainer(GRPOTrainer):
    """GRPOTrainer with sessions in place of single attempts, and Eq. 6 in place of its loss.

    problems: dicts with "problem" and "answer". kwargs: whatever else GRPOTrainer takes.
    """

    def __init__(self, model, args, problems, **kwargs):
        if args.steps_per_generation != args.gradient_accumulation_steps:
            raise ValueError("a rollout must train in one step: do not set steps_per_generation")
        sessions = args.per_device_train_batch_size * args.gradient_accumulation_steps
        if sessions % args.num_generations:
            raise ValueError(f"the {sessions} sessions of a process (per_device_train_batch_size * "
                             "gradient_accumulation_steps) must be a multiple of num_generations")
        rows = [{"prompt": p["problem"], "problem": p["problem"], "answer": p["answer"]}
                for p in problems]
        # TRL wants a reward function. The rewards come with the turns, so it is never called.
        super().__init__(model, icrl.outcome_reward, args, Dataset.from_list(rows), **kwargs)
        self.settings = icrl.Config(
            method=args.method, samples=args.num_generations,
            rounds=args.rounds if args.method == "icrl" else 1,
            max_response=args.max_completion_length, max_critique=args.max_critique,
            temperature=args.temperature, sample_batch=2**31)       # all live sessions at once
        icrl.check_context(self.model, self._tokenizer, problems, self.settings)
        # As in icrl.sample: nothing of the checkpoint's generation config may be left.
        self.eos_token_ids = sorted(icrl.stop_tokens(self.model, self._tokenizer))
        self.generation_config = self.model.generation_config = GenerationConfig(
            do_sample=True, temperature=args.temperature, top_k=0, top_p=1.0,
            eos_token_id=self.eos_token_ids, pad_token_id=self._tokenizer.pad_token_id)
        self.generation_kwargs = {}

    def get_decay_parameter_names(self, model):
        """As in icrl.py, all weights decay. By default, TRL leaves out norms and biases."""
        return [name for name, _ in model.named_parameters()]

    def _clip_grad_norm(self, model):
        """As in icrl.py, no step is taken if all advantages are 0 or the norm is not finite.

        AdamW skips weights that have no gradient.
        """
        norm = super()._clip_grad_norm(model)
        if norm == 0 or not math.isfinite(norm):
            model.zero_grad()
        return norm

    def sample(self, _, tokenizer, prompts, limit, temperature):
        """What icrl.sample does, by TRL, which has the model and the temperature already.

        vLLM, FSDP and DeepSpeed let the processes wait for each other, and vLLM takes equally many
        prompts from each. So a process that has fewer prompts than another one repeats its first
        prompt, and drops what comes of it.
        """
        self.calls += 1
        self.model.eval()
        self.generation_config.max_new_tokens = limit
        if self.use_vllm:
            self.vllm_generation.max_completion_length = limit
        repeats = max(gather_object([len(prompts)])) - len(prompts)
        batch = prompts + prompts[:1] * repeats
        sampled = None
        try:
            sampled, _ = self._generate_single_turn(batch, None, {}, num_generations=1)
        except torch.OutOfMemoryError as error:
            print(error, file=sys.stderr)
        # All processes stop together. One alone would leave the others waiting for its turns.
        if not all(gather_object([sampled is not None])):
            raise torch.OutOfMemoryError("a process ran out of memory while it sampled: "
                                         "lower --gradient_accumulation_steps")
        completions, truncated = [], []
        for tokens in sampled[:len(prompts)]:
            ends = [t + 1 for t, token in enumerate(tokens) if token in self.eos_token_ids]
            completions.append(list(tokens[:ends[0]] if ends else tokens))
            truncated.append(not ends)
        return completions, truncated

    def _generate_and_score_completions(self, inputs):
        """Algorithm 1 and Eq. 5. TRL calls this once per rollout, with each problem G times."""
        self.calls = 0
        problems = inputs[::self.num_generations]
        with mock.patch.object(icrl, "sample", self.sample):        # icrl.rollout calls this name
            turns = icrl.rollout(None, self._tokenizer, problems, self.settings)
        # A process whose attempts are all right asks for no more critiques and revisions. It
        # samples all the same, because the other processes may wait for it.
        while self.accelerator.num_processes > 1 and self.calls < 2 * self.settings.rounds - 1:
            critic = self.calls % 2 == 1
            limit = self.settings.max_critique if critic else self.settings.max_response
            self.sample(None, self._tokenizer, [turns[0].prompt], limit, None)
        # All sessions of a problem are here, so the groups of Eq. 5 are complete.
        advantages = icrl.role_advantages([t.reward for t in turns], [t.group for t in turns])
        for turn, A in zip(turns, advantages.tolist()):
            turn.advantage = A
        turns_of_all = gather_object(turns)
        for name, value in icrl.rollout_figures(turns_of_all).items():
            if value is not None:
                self._metrics["train"][name].append(value)
        prompts = [t.prompt for t in turns_of_all]
        self._logs["prompt"].extend(self._tokenizer.batch_decode(prompts))
        self._logs["completion"].extend(t.text for t in turns_of_all)
        self._logs["rewards"]["reward"].extend(t.reward for t in turns_of_all)
        self._logs["advantages"].extend(t.advantage for t in turns_of_all)
        # As in icrl.py, a turn with advantage 0 is left out, but it counts in the mean over all
        # samples. The processes then have different numbers of rows. Each is filled up with rows
        # of advantage 0, which do not count.
        active = [turn for turn in turns if turn.advantage != 0]
        passes = self.args.gradient_accumulation_steps
        rows = passes * math.ceil(max([1, *gather_object([len(active)])]) / passes)
        active += [dataclasses.replace(turns[0], advantage=0.0)] * (rows - len(active))
        A = torch.tensor([t.advantage for t in active], device=self.accelerator.device)
        # TRL splits all lists like the first tensor.
        return {"advantages": A, "turns": active, "samples": torch.tensor(len(turns_of_all))}

    def _compute_loss(self, model, inputs):
        """Eq. 4 and Eq. 6, for one of the micro-batches of a rollout."""
        turns, temperature = inputs["turns"], self.settings.temperature
        completions = [t.completion for t in turns]
        free = [t.free_prompt for t in turns]
        first = "weights" not in inputs     # with num_iterations above 1, the same dict comes again
        if first:
            # All rows take part, so that every process makes the same passes.
            guided = [t.prompt for t in turns]
            with torch.no_grad():
                logp_guided, _ = icrl.completion_logprobs(model, guided, completions, temperature)
        logp, mask = icrl.completion_logprobs(model, free, completions, temperature)
        if first:
            # No weight has moved since the rollout. Only revisions get a weight.
            revision = torch.tensor([[t.part == "revision"] for t in turns], device=logp.device)
            w = icrl.calibration_ratio(logp, logp_guided)
            inputs.update(weights=torch.where(revision, w, 1.0), logp_old=logp.detach())
            self._metrics["train"]["w_mean"].extend(w[revision & mask.bool()].tolist())
        J = icrl.icrl_objective(logp, inputs["logp_old"], inputs["advantages"], inputs["weights"],
                                mask, self.epsilon_low, self.epsilon_high)
        # J is the mean of these rows. Their sum, divided by the number of samples of all
        # processes, is their part of the mean over all samples. TRL adds up the micro-batches,
        # but averages over the processes.
        return -J * len(turns) * self.accelerator.num_processes / inputs["samples"]

    def training_step(self, *args):
        """A micro-batch. Sampling and icrl.completion_logprobs leave training mode: back to it."""
        loss = super().training_step(*args)
        self.model.train()
        return loss


def main():
    """Train as the command line says, and save the model in --output_dir."""
    args, model = TrlParser((ICRLConfig, ModelConfig)).parse_args_and_config()
    args.model_init_kwargs = {
        "dtype": model.dtype, "attn_implementation": model.attn_implementation,
        "revision": model.model_revision, **(args.model_init_kwargs or {})}
    trainer = ICRLTrainer(
        model.model_name_or_path or icrl.Config.model, args, icrl.load_problems(args.data),
        peft_config=get_peft_config(model), quantization_config=get_quantization_config(model))
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()


if __name__ == "__main__":
    main()
