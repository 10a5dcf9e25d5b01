#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""What a training step costs: next to TRL on a CPU, or with large models on a GPU.

    python math_data/bench.py trl [--pairs 5]                       first: pip install trl==1.16.0
    python math_data/bench.py gpu [--shapes 0.6B 1.7B 4B 8B] [flags of icrl.py]

trl   A step of GRPO, by icrl.py and by TRL's GRPOTrainer with plain `generate`. Both sides have
      the same small model with random weights, the same 64 prompts and rewards drawn from the
      same range. Each token ends its completion with a chance of 1.3%, so that lengths differ;
      256 is the limit. Micro-batches of both sides hold 8 completions of full length. The sides
      take turns. What counts is CPU seconds of one thread for each sampled token. What else TRL
      does in a step, such as the entropies that it logs, counts as its update. A row for each step
      is added to results/trl.csv.
gpu   A step of icrl.py with --preset qwen3, for models of Qwen3's shapes with random weights:
      nothing is downloaded. No attempt is right, every completion has full length, and no group
      is flat. A real step is shorter. A row for each shape is added to results/gpu.csv. On a CPU
      this works, too, but it is slow.
"""
import argparse
import csv
import dataclasses
import random
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import torch
import transformers
from transformers import Qwen3Config, Qwen3ForCausalLM

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import icrl  # noqa: E402

TOKENIZER = transformers.AutoTokenizer.from_pretrained(icrl.Config.model)
# Width, layers, width of the MLP, heads, key-value heads, size of a head, vocabulary.
SHAPES = {
    "small": (128, 4, 341, 2, 2, 64, len(TOKENIZER)),
    "0.6B": (1024, 28, 3072, 16, 8, 128, 151_936),
    "1.7B": (2048, 28, 6144, 16, 8, 128, 151_936),
    "4B": (2560, 36, 9728, 32, 8, 128, 151_936),
    "8B": (4096, 36, 12288, 32, 8, 128, 151_936),
}


def random_model(shape):
    width, layers, mlp, heads, kv_heads, size, vocabulary = SHAPES[shape]
    return Qwen3ForCausalLM(Qwen3Config(
        hidden_size=width, num_hidden_layers=layers, intermediate_size=mlp, vocab_size=vocabulary,
        num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=size,
        tie_word_embeddings=shape != "8B", max_position_embeddings=40_960))


def mark(device):
    """The time in seconds, and the peak of the memory in GB, on a GPU since the last mark.

    On a CPU the time is that of the process.
    """
    if device != "cuda":
        return time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    torch.cuda.synchronize()                        # the GPU may still be at work
    peak = torch.cuda.max_memory_allocated() / 1e9
    torch.cuda.reset_peak_memory_stats()
    return time.perf_counter(), peak


def add_row(name, row):
    """Add a row (a dict) to a CSV in results/."""
    with open(HERE / "results" / name, "a", newline="") as file:
        writer = csv.DictWriter(file, row, lineterminator="\n")
        if file.tell() == 0:
            writer.writeheader()
        writer.writerow(row)


def icrl_step(model, optimizer, problems, config):
    """One training step: its seconds, its peaks of memory and its sampled tokens."""
    start, _ = mark(config.device)
    turns = icrl.rollout(model, TOKENIZER, problems, config)
    sampled, sampling_peak = mark(config.device)
    icrl.update(model, optimizer, turns, config)
    updated, update_peak = mark(config.device)
    return {"tokens": sum(len(turn.completion) for turn in turns),
            "sampling_s": sampled - start, "update_s": updated - sampled,
            "sampling_GB": sampling_peak, "update_GB": update_peak}


# ------------------------------------------------------------------------------------------- trl

def ragged_model():
    """The small model. Four of its 304 tokens end a completion."""
    torch.manual_seed(0)
    model = random_model("small")
    model.generation_config.eos_token_id = [TOKENIZER.eos_token_id, 1, 2, 3]
    return model


def trl_step(problems, config, micro, seed):
    """The same as icrl_step, by TRL."""
    import datasets
    import trl
    rows = [{"prompt": [{"role": "user", "content": icrl.solver_prompt(p["problem"])}]}
            for p in problems]
    with tempfile.TemporaryDirectory() as folder:
        args = trl.GRPOConfig(
            folder, use_cpu=True, bf16=False, gradient_checkpointing=False, max_steps=1, top_k=0,
            per_device_train_batch_size=micro, num_generations=config.samples, beta=0.0,
            gradient_accumulation_steps=len(problems) * config.samples // micro,
            loss_type="grpo", max_completion_length=config.max_response, shuffle_dataset=False,
            report_to="none", save_strategy="no", logging_strategy="no", seed=seed)
        trainer = trl.GRPOTrainer(
            ragged_model(), lambda completions, **_: [random.random() for _ in completions], args,
            datasets.Dataset.from_list(rows), processing_class=TOKENIZER)
        generate, marks, tokens = trainer._generate_single_turn, [], []

        def timed(*args, **more):
            marks.append(time.process_time())
            completions, logprobs = generate(*args, **more)
            marks.append(time.process_time())
            tokens.extend(map(len, completions))
            return completions, logprobs

        trainer._generate_single_turn = timed
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
        marks.append(time.process_time())
    start, sampled, end = marks
    return {"tokens": sum(tokens), "sampling_s": sampled - start, "update_s": end - sampled}


def against_trl(pairs):
    """Print the seconds for each token of icrl.py and of TRL, and their ratios."""
    torch.set_num_threads(1)
    micro = 8                                       # rows of full length, with their prompts
    config = icrl.Config(method="grpo", device="cpu", samples=8, max_response=256,
                         micro_tokens=micro * 300)
    problems = icrl.load_problems(config.data)[:8]
    rows = []
    for pair in range(pairs + 1):
        model = ragged_model()
        torch.manual_seed(pair)
        with mock.patch.object(icrl, "outcome_reward", lambda *_: random.random()):
            ours = icrl_step(model, icrl.make_optimizer(model, config), problems, config)
        theirs = trl_step(problems, config, micro, pair)
        for program, figures in (("icrl.py", ours), ("TRL", theirs)):
            row = {"pair": pair, "program": program, "tokens": figures["tokens"]}
            for part in ("sampling", "update"):     # CPU milliseconds for each token
                row[part] = round(1e3 * figures[f"{part}_s"] / row["tokens"], 4)
            row["step"] = round(row["sampling"] + row["update"], 4)
            print(row, flush=True)
            if pair > 0:                            # the first pair warms up
                rows.append(row)
                add_row("trl.csv", row)
    print("\nicrl.py / TRL, median and range over the pairs")
    for part in ("sampling", "update", "step"):
        ratios = [ours[part] / theirs[part] for ours, theirs in zip(rows[::2], rows[1::2])]
        print(f"{part:10} {statistics.median(ratios):.2f}"
              f"   ({min(ratios):.2f} to {max(ratios):.2f})")


# ------------------------------------------------------------------------------------------- gpu

def gpu_row(shape, config):
    """Measure a step with a model of this shape. Returns a row of gpu.csv."""
    with torch.device(config.device):               # random weights are faster to draw there
        model = random_model(shape).cpu()
    if config.checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    problems = icrl.load_problems(config.data)[:config.queries]
    optimizer = icrl.make_optimizer(model, config)
    # Most ids are unknown to the small tokenizer. In the critic's prompt, a letter stands for each.
    stand_ins = dict(outcome_reward=lambda *_: random.random(),
                     visible_text=lambda tokenizer, prompt, completion: "x" * len(completion))
    try:
        with mock.patch.multiple(icrl, **stand_ins):
            short = dataclasses.replace(config, max_response=80, max_critique=80)
            icrl_step(model, optimizer, problems[:1], short)        # warms up
            figures = icrl_step(model, optimizer, problems, config)
    except torch.OutOfMemoryError:
        figures = {"tokens": "out of memory"}
    device = torch.cuda.get_device_name() if config.device == "cuda" else config.device
    settings = "queries samples max_response max_critique sample_batch micro_tokens".split()
    return {"device": device, "shape": shape, "parameters": model.num_parameters(),
            **{name: getattr(config, name) for name in settings},
            **dict.fromkeys(("tokens", "sampling_s", "update_s", "sampling_GB", "update_GB")),
            **figures}


def on_gpu(shapes, config):
    """Add a row for each shape to results/gpu.csv, and print it."""
    for shape in shapes:
        row = gpu_row(shape, config)
        print(row, flush=True)
        add_row("gpu.csv", row)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("trl", "gpu"))
    parser.add_argument("--pairs", type=int, default=5, help="of trl")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["0.6B", "1.7B", "4B", "8B"])
    args, flags = parser.parse_known_args(argv)
    transformers.logging.set_verbosity_error()
    if args.command == "trl":
        against_trl(args.pairs)
    else:
        on_gpu(args.shapes, icrl.parse(["--preset", "qwen3", *flags]))


if __name__ == "__main__":
    main()
