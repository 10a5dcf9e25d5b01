#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""What a training step of icrl.py costs, in seconds and in memory.

    python math_data/bench.py gpu [--shape 0.6B 1.7B 4B 8B] [--steps 2] [flags of icrl.py]
    python math_data/bench.py trl [--model FOLDER] [--pairs N] [--work NAME ...]                (first: pip install trl)
    python math_data/bench.py scaling [--work NAME ...]

Only `trl` needs packages that icrl.py does not need: TRL and what comes with it. Memory is read as Linux gives it.

gpu      A model of Qwen3's shape with random weights, so nothing is downloaded. The settings are those of
         `--preset qwen3`. Every completion has full length, no attempt is right and no group is flat. A real step
         is shorter, unless its problems are long. On a CPU it runs in float32, and its seconds are CPU seconds.
trl      A step of GRPO, by icrl.py and by TRL's GRPOTrainer with plain `generate`. Both sides have the same weights,
         the same problems, as many completions, rewards drawn from the same range, and micro-batches of the same size.
         What else TRL does in a step, such as the entropies that it logs, counts too.
scaling  A step of icrl.py, as the work grows.

`trl` and `scaling` count CPU seconds of one thread. Each measurement is a process of its own, and the two sides take
turns, because machines are noisy. If there are several steps, the first one warms up and does not count. The rows go to
gpu.csv, speed.csv and scaling.csv in math_data/results/ (or --results), in place of older rows of the same work.
"""
import argparse
import csv
import json
import os
import random
import statistics
import string
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import icrl  # noqa: E402

ONE_THREAD = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}
REWARD = random.Random(0).random                    # always below 1, and never the same
CHARACTERS = string.ascii_letters + string.digits + string.punctuation

# Width, layers, width of the MLP, heads, key-value heads, size of a head, vocabulary; and whether the input and the
# output embeddings are the same weights.
SHAPES = {
    "tiny": (64, 2, 128, 2, 1, 32, 1_000, True),
    "0.6B": (1024, 28, 3072, 16, 8, 128, 151_936, True),
    "1.7B": (2048, 28, 6144, 16, 8, 128, 151_936, True),
    "4B": (2560, 36, 9728, 32, 8, 128, 151_936, True),
    "8B": (4096, 36, 12288, 32, 8, 128, 151_936, False),
    "SmolLM2": (576, 30, 1536, 9, 9, 64, 49_152, True),
    **{f"small, {n}": (128, 4, 341, 2, 2, 64, n, True) for n in (298, 10_000, 151_936)},
}

# shape: of a random model, or "pretrained" (--model), or "arithmetic" (the default model, with its own rewards).
# ends: a completion may end early, at each token with a chance of about 1%. Otherwise all have full length.
# micro: completions of full length in a forward pass of the update, on both sides. Other keys: settings of icrl.py.
STEP = dict(shape="small, 298", ends=False, micro=16, trl_checkpointing=False, method="grpo", lr=1e-5, steps=6,
            queries=8, samples=8, max_response=64)
PRETRAINED = dict(STEP, shape="pretrained", queries=4, samples=4, micro=4, steps=2)
ARITHMETIC = dict(STEP, shape="arithmetic", queries=16, max_response=48)
AGAINST_TRL = {
    "small, 64 tokens": STEP,
    "small, up to 256 tokens": dict(STEP, max_response=256, micro=8, ends=True),
    "update": dict(STEP, max_response=256, micro=8),
    "pretrained": PRETRAINED,
    "pretrained, bf16": dict(PRETRAINED, bf16=True, micro=8, trl_checkpointing=True),          # the defaults of TRL
    "pretrained, least memory": dict(PRETRAINED, micro=1, checkpointing=True, trl_checkpointing=True),
}
SCALING = {
    **{f"samples {n}": dict(STEP, samples=n // 8) for n in (64, 256, 1024)},
    **{f"vocabulary {n}": dict(STEP, shape=f"small, {n}", steps=3) for n in (298, 10_000, 151_936)},
    **{f"length {n}": dict(STEP, shape="SmolLM2", queries=1, samples=2, micro=1, steps=1, max_response=n)
       for n in (64, 256, 1024, 2048)},
    "arithmetic, grpo": ARITHMETIC, "arithmetic, icrl": dict(ARITHMETIC, method="icrl"),
}


# ------------------------------------------------------------------------------------------------ a step of icrl.py

def random_model(shape):
    width, layers, mlp, heads, kv_heads, size, vocabulary, tied = SHAPES[shape]
    return AutoModelForCausalLM.from_config(Qwen3Config(
        hidden_size=width, num_hidden_layers=layers, intermediate_size=mlp, num_attention_heads=heads,
        num_key_value_heads=kv_heads, head_dim=size, vocab_size=vocabulary, tie_word_embeddings=tied,
        max_position_embeddings=40_960), dtype=torch.float32)


def load(shape, config, ends):
    """The model and the tokenizer. Only single characters can be sampled, and the end where `ends` is true.

    The tokenizer of the small model has few ids. All others could not be read as text. They are not left out of the
    model, because their logits take time and memory; they only become too small to be sampled.
    """
    tokenizer = AutoTokenizer.from_pretrained(config.model if shape == "pretrained" else icrl.Config.model)
    if shape in SHAPES:
        with torch.device(config.device):
            model = random_model(shape)
    else:
        model, _ = icrl.load_model(config.model, config)
    if shape != "arithmetic":
        tokens = tokenizer.convert_tokens_to_ids(list(CHARACTERS)) + [tokenizer.eos_token_id] * ends
        bias = torch.full([model.config.vocab_size], -1e4, device=model.device)
        bias[tokens] = 0
        model.get_output_embeddings().register_forward_hook(lambda head, inputs, logits: logits.add_(bias))
    if config.checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    return model, tokenizer


def resident(which):
    """Memory of this process in GB: VmRSS is that of now, VmHWM the peak."""
    return int(Path("/proc/self/status").read_text().partition(f"{which}:")[2].split()[0]) * 1024 / 1e9


def mark(device):
    """The time in seconds, and the peak of the GPU's memory in GB since the last mark.

    On a CPU: CPU seconds, and the peak of the process's memory so far.
    """
    if device != "cuda":
        return time.process_time(), resident("VmHWM")
    torch.cuda.synchronize()                        # the GPU may still be at work
    peak = torch.cuda.max_memory_allocated() / 1e9
    torch.cuda.reset_peak_memory_stats()
    return time.perf_counter(), peak


def averages(rows):
    counted = rows[1:] or rows                      # the first one warms up
    return {key: statistics.mean(row[key] for row in counted) for key in counted[0]}


def icrl_steps(model, tokenizer, config, steps, random_rewards=True):
    """Train. Returns a dict for each step: its seconds, its tokens and the peaks of memory."""
    problems, optimizer, rows = icrl.load_problems(config.data), icrl.make_optimizer(model, config), []
    sample, logprobs, optimizer_step = icrl.sample, icrl.completion_logprobs, icrl.optimizer_step

    def counted_sample(model, tokenizer, prompts, *settings):
        completions, truncated = sample(model, tokenizer, prompts, *settings)
        width, new = max(map(len, prompts)), max(map(len, completions))
        row["batch"] = max(row["batch"], len(prompts))
        row["token_steps"] += new
        row["cache_reads"] += len(prompts) * new * (width + new / 2)           # a token reads all before it
        return completions, truncated

    def counted_logprobs(model, prompts, completions, temperature):
        row["trained" if torch.is_grad_enabled() else "scored"] += sum(map(len, [*prompts, *completions]))
        return logprobs(model, prompts, completions, temperature)

    def timed_optimizer_step(*settings):
        marks.append(mark(config.device))
        norm = optimizer_step(*settings)
        marks.append(mark(config.device))
        return norm

    spies = dict(sample=counted_sample, completion_logprobs=counted_logprobs, optimizer_step=timed_optimizer_step)
    if random_rewards:
        spies["outcome_reward"] = lambda text, problem, truncated: REWARD()
    with mock.patch.multiple(icrl, **spies):
        for step in range(1, steps + 1):
            row = dict.fromkeys(("batch", "token_steps", "cache_reads", "trained", "scored"), 0)
            marks = [mark(config.device)]
            turns = icrl.rollout(model, tokenizer, icrl.problems_of_step(problems, step, config), config)
            marks.append(mark(config.device))
            icrl.update(model, optimizer, turns, config)
            marks.append(mark(config.device))
            # The marks: begin, after sampling, before and after each optimiser step, and end.
            at, peaks = zip(*marks)
            rows.append({
                "step": at[-1] - at[0], "sampling": at[1] - at[0], "update": at[-1] - at[1],
                "optimizer": sum(at[3:-1:2]) - sum(at[2:-1:2]), "sampling_GB": peaks[1], "update_GB": max(peaks[2::2]),
                "optimizer_GB": max(peaks[3::2], default=0), "completions": len(turns),
                "tokens": sum(len(t.completion) for t in turns), **row})
    return rows


# -------------------------------------------------------------------------------------------------------------- gpu

def rate(amount, act, device):
    """The amount of work in a call, divided by the seconds of the shortest of ten calls."""
    seconds = []
    for _ in range(10):
        began, _ = mark(device)
        act()
        seconds.append(mark(device)[0] - began)
    return amount / min(seconds)


def gpu_row(shape, steps, config):
    """Measure one shape. Returns a row of gpu.csv.

    bound_tokens_s: what sampling would reach if a token step took only the time to read the weights and the cache.
    update_share: FLOP/s of the forward and backward passes, divided by those of a large matrix product. A trained token
    counts 6 FLOP a parameter (8 if activations are recomputed), one that is only scored 2. Attention is left out.
    """
    device, large = config.device, config.device == "cuda"
    source = torch.ones(2**28 if large else 2**24, device=device)
    target, size = torch.empty_like(source), 8192 if large else 512
    copied = rate(2 * source.nbytes, lambda: target.copy_(source), device)                # bytes a second
    matrix = torch.randn(size, size, device=device).to(torch.bfloat16 if config.bf16 else torch.float32)
    multiplied = rate(2 * size**3, lambda: matrix @ matrix, device)                        # FLOP a second
    del source, target, matrix

    model, tokenizer = load(shape, config, ends=False)
    took = averages(icrl_steps(model, tokenizer, config, steps))
    began, _ = mark(device)
    icrl.evaluate(model, tokenizer, icrl.load_problems(config.heldout), config)
    evaluation = mark(device)[0] - began

    _, layers, _, _, kv_heads, head, _, tied = SHAPES[shape]
    used = model.num_parameters()
    if not tied:
        used -= model.get_input_embeddings().weight.numel()                    # a token needs only one row of these
    read = took["token_steps"] * used + took["cache_reads"] * 2 * layers * kv_heads * head
    flop = used * (took["trained"] * (8 if config.checkpointing else 6) + took["scored"] * 2)
    passes = took["update"] - took["optimizer"]
    evaluations = 2 + (39 // config.eval_every if config.eval_every else 0)    # before, within and after 40 steps
    return {
        "device": torch.cuda.get_device_name() if large else device, "shape": shape, "torch": torch.__version__,
        "parameters": model.num_parameters(), "max_response": config.max_response, "max_critique": config.max_critique,
        "copy_GB_s": copied / 1e9, "matmul_TFLOP_s": multiplied / 1e12, **took, "host_GB": resident("VmHWM"),
        "rows_s": took["completions"] / took["sampling"], "tokens_s": took["tokens"] / took["sampling"],
        "bound_tokens_s": took["tokens"] * copied / (read * model.dtype.itemsize),
        "token_step_ms": 1e3 * took["sampling"] / took["token_steps"],
        "update_tokens_s": took["trained"] / passes, "update_share": flop / passes / multiplied,
        "evaluation": evaluation, "hours_of_40_steps": (40 * took["step"] + evaluations * evaluation) / 3600}


# -------------------------------------------------------------------------------------------------- trl and scaling

def trl_steps(model, tokenizer, config, work, problems):
    """The same as icrl_steps, by TRL."""
    import datasets
    import trl
    tokenizer.padding_side, output = "left", tempfile.TemporaryDirectory()
    args = trl.GRPOConfig(
        output.name, use_cpu=True, bf16=config.bf16, gradient_checkpointing=work["trl_checkpointing"],
        per_device_train_batch_size=work["micro"], num_generations=config.samples, learning_rate=config.lr, beta=0.0,
        gradient_accumulation_steps=config.queries * config.samples // work["micro"], top_k=0, loss_type="grpo",
        max_completion_length=config.max_response, max_steps=config.steps, lr_scheduler_type="constant", seed=0,
        report_to="none", save_strategy="no", disable_tqdm=True, shuffle_dataset=False)
    trainer = trl.GRPOTrainer(
        model, lambda completions, **_: [REWARD() for _ in completions], args,
        datasets.Dataset.from_list([{"prompt": icrl.solver_messages(p["problem"])} for p in problems]),
        processing_class=tokenizer)
    generate, begins, tokens = trainer._generate_single_turn, [], []

    def counted(*args, **more):
        begins.append(time.process_time())          # a step begins when it samples
        answer = generate(*args, **more)
        tokens.append(sum(map(len, answer[0])))
        return answer

    trainer._generate_single_turn = counted
    trainer.train()
    begins.append(time.process_time())
    return [{"step": begins[i + 1] - begins[i], "tokens": tokens[i]} for i in range(config.steps)]


def update_steps(model, config, prompts, micro, padded):
    """Updates on completions of different length, with half of the groups flat.

    padded: a plain update instead of icrl.py's. It leaves none out, and pads all to the longest.
    """
    optimizer, longest, turns, rows = icrl.make_optimizer(model, config), config.max_response, [], []
    for i in range(config.queries * config.samples):
        group = i // config.samples
        completion = [1] * (longest if i == 3 else min(longest, 1 + int(random.expovariate(1 / 80))))
        reward = float(group % 2 and REWARD() < 0.5)
        turns.append(icrl.Turn(group, i, "first", prompts[group], prompts[group], completion, "", False, reward))

    def padded_update():
        advantages = icrl.role_advantages([t.reward for t in turns], [t.group for t in turns])
        for numbers in torch.arange(len(turns)).split(micro):
            part = [turns[i] for i in numbers]
            completions = [t.completion + [0] * (longest - len(t.completion)) for t in part]
            logp, _ = icrl.completion_logprobs(model, [t.prompt for t in part], completions)
            mask = torch.arange(longest) < torch.tensor([[len(t.completion)] for t in part])
            J = icrl.icrl_objective(logp, logp, advantages[numbers], torch.ones_like(logp), mask)
            (-J * len(part) / len(turns)).backward()
        icrl.optimizer_step(model, optimizer)

    for _ in range(config.steps):
        began = time.process_time()
        padded_update() if padded else icrl.update(model, optimizer, turns, config)
        rows.append({"step": time.process_time() - began})
    return rows


def one(name, side, folder):
    """Measure one side of one piece of work in this process. Prints a line of JSON."""
    work = {**AGAINST_TRL, **SCALING}[name]
    config = icrl.Config(model=folder, **{key: work[key] for key in work if hasattr(icrl.Config, key)})
    torch.manual_seed(0)
    random.seed(0)
    model, tokenizer = load(work["shape"], config, work["ends"])
    known = icrl.load_problems(config.data)
    problems = [p for step in range(config.steps) for p in icrl.problems_of_step(known, step + 1, config)]
    prompts = [icrl.encode_chat(tokenizer, icrl.solver_messages(p["problem"])) for p in problems]
    config.micro_tokens = work["micro"] * (max(map(len, prompts)) + config.max_response)
    if side == "trl":
        import trl.trainer.grpo_trainer  # noqa: F401 - now, because its code is not memory of the step
    loaded = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")   # from here the peak grows from what is resident now
    if name == "update":
        rows = update_steps(model, config, prompts, work["micro"], side == "padded")
    elif side == "trl":
        rows = trl_steps(model, tokenizer, config, work, problems)
    else:
        rows = icrl_steps(model, tokenizer, config, config.steps, work["shape"] != "arithmetic")
    print(json.dumps({"micro": work["micro"], "peak_GB": resident("VmHWM") - loaded, **averages(rows)}))


def measure(path, works, sides, pairs, model):
    """Write a row for each pair, work and side, in place of older rows of these works."""
    replace_rows(path, [], lambda row: row["work"] in works)
    for pair in range(pairs):
        for name, work in works.items():
            for side in ("padded", "icrl") if name == "update" else sides:
                folder = model if work["shape"] == "pretrained" else icrl.Config.model
                run = subprocess.run(
                    [sys.executable, __file__, "one", "--work", name, "--side", side, "--model", folder],
                    capture_output=True, text=True, env=os.environ | ONE_THREAD)
                if run.returncode:
                    sys.exit(f"bench.py: {name}, {side}:\n{run.stderr[-3000:]}")
                took = json.loads(run.stdout.splitlines()[-1])
                replace_rows(path, [{"work": name, "pair": pair, "side": side, **took}])
                print(f"{name}, {side}:", *(f"{key} {short(value)}," for key, value in took.items()), flush=True)


# ---------------------------------------------------------------------------------------------------------- results

def replace_rows(path, new, old=lambda row: False):
    """Add rows to a CSV, and drop those for which old(row) is true."""
    kept = [row for row in csv.DictReader(open(path)) if not old(row)] if path.exists() else []
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in kept + new for key in row)))
        writer.writeheader()
        writer.writerows(kept + new)


def short(value):
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}"


def print_ratios(path, works):
    """Print icrl.py over the other side: median and range over the pairs; seconds per token if lengths differ."""
    print("| work | micro-batch of both sides | CPU time, icrl.py / other | peak memory above the model, "
          "icrl.py / other | pairs |\n|---|---|---|---|---|")
    rows = list(csv.DictReader(open(path)))
    for name, work in works.items():
        ours, theirs = ([row for row in rows if row["work"] == name and (row["side"] == "icrl") == mine]
                        for mine in (True, False))
        seconds, memory = ([float(a[key]) / float(b[key]) for a, b in zip(ours, theirs)]
                           for key in ("step", "peak_GB"))
        if work["ends"]:
            seconds = [ratio * float(b["tokens"]) / float(a["tokens"]) for ratio, a, b in zip(seconds, ours, theirs)]
        cells = (f"{statistics.median(x):.2f} ({min(x):.2f} to {max(x):.2f})" for x in (seconds, memory))
        print("|", name, "|", work["micro"], "completions |", " | ".join(cells), "|", len(ours), "|")
    print("\nA micro-batch is what one forward pass of the update takes: on both sides so many completions of full\n"
          "length. With bf16, icrl.py recomputes nothing, and keeps bfloat16 weights beside the float32 ones. TRL has\n"
          "only float32 weights, and recomputes activations. The other side of `update` is not TRL but a plain update.")


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("command", choices=("gpu", "trl", "scaling", "one"))
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["0.6B", "1.7B", "4B", "8B"])
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="the pretrained model")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--work", nargs="+", help="default: all")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder of the CSV files")
    args, flags = parser.parse_known_args(argv)
    if flags and args.command != "gpu":
        parser.error(f"unknown: {' '.join(flags)}")
    if args.command == "gpu" and len(args.shape) > 1:
        for shape in args.shape:                    # in a process of its own, because torch keeps the memory of the last
            subprocess.run([sys.executable, __file__, "gpu", "--shape", shape, "--steps", str(args.steps),
                            "--results", str(args.results), *flags], check=True)
    elif args.command == "gpu":
        shape, = args.shape
        config = icrl.parse(["--preset", "qwen3", "--bf16", str(torch.cuda.is_available()), *flags])
        row = gpu_row(shape, args.steps, config)
        replace_rows(args.results / "gpu.csv", [row],
                     lambda old: (old["device"], old["shape"]) == (row["device"], row["shape"]))
        for key, value in row.items():
            print(f"{key:20} {value if isinstance(value, str) else short(value)}", flush=True)
    elif args.command == "trl":
        works, path = {name: AGAINST_TRL[name] for name in args.work or AGAINST_TRL}, args.results / "speed.csv"
        measure(path, works, ("trl", "icrl"), args.pairs, args.model)
        print_ratios(path, works)
    elif args.command == "scaling":
        measure(args.results / "scaling.csv", {name: SCALING[name] for name in args.work or SCALING}, ["icrl"], 1, "")
    else:
        one(args.work[0], args.side, args.model)


if __name__ == "__main__":
    main()
