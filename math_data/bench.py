#!/usr/bin/env python3
"""What a step of icrl.py costs: next to TRL's GRPOTrainer on the same work, and as the work grows.

    python math_data/bench.py trl [--model FOLDER] [--pairs N] [--work NAME ...]         (needs: pip install trl)
    python math_data/bench.py scaling [--work NAME ...]

Both sides sample from the same weights (random ones, or those of --model), the same prompts, as many completions of
the same length, with rewards drawn from the same range, and take one AdamW step on GRPO's loss. TRL generates with
plain `generate`, as icrl.py does; what else its loop does in a step, such as the entropies that it logs, counts too.
"update" is icrl.py's update alone, of ragged completions and half of the groups flat, next to a plain one that pads
all to the longest. Figures are CPU seconds of one thread per step, and the peak of resident memory above that of the
loaded model (Linux). Each measurement is a process of its own, and the sides take turns, since machines are noisy.
Rows go to math_data/results/speed.csv and scaling.csv, in place of older ones of the same work.
"""
import argparse
import csv
import functools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false",
               "TRANSFORMERS_VERBOSITY": "error", "TRL_EXPERIMENTAL_SILENCE": "1"}
HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

# shape: of a random model, or "pretrained" (--model), or "embedded". fixed: completions have exactly `new` tokens; if
# not, each token of a random model ends them with a chance of 1%. trl_micro and micro_tokens: completions per forward
# pass there, tokens per forward pass here.
SMALL = dict(hidden=128, layers=4, vocabulary=298)
STEP = dict(shape=SMALL, prompts=8, samples=8, new=64, fixed=True, bf16=False, trl_micro=64, micro_tokens=1024, steps=5,
            warm=1, method="grpo", checkpointing=False, trl_checkpointing=False)
PRETRAINED = dict(STEP, shape="pretrained", prompts=4, samples=4, trl_micro=4, micro_tokens=440, steps=1)
AGAINST_TRL = {
    "start": STEP,
    "small, 64 tokens": STEP,
    "small, up to 256 tokens": dict(STEP, new=256, fixed=False, trl_micro=16),
    "update": dict(STEP, new=256, trl_micro=16),
    "pretrained": PRETRAINED,
    # TRL at its defaults
    "pretrained, bf16": dict(PRETRAINED, bf16=True, trl_checkpointing=True, trl_micro=8, micro_tokens=880),
    # as little memory as either can do with: one completion at a time
    "pretrained, least memory": dict(
        PRETRAINED, checkpointing=True, trl_checkpointing=True, trl_micro=1, micro_tokens=1),
}
SMOLLM2 = dict(hidden=576, layers=30, vocabulary=49152)
EMBEDDED = dict(STEP, shape="embedded", prompts=16, new=48, fixed=False)
SCALING = {
    **{f"samples {n}": dict(STEP, samples=n // 8) for n in (64, 256, 1024)},
    **{f"vocabulary {n}": dict(STEP, shape=dict(SMALL, vocabulary=n), steps=2)
       for n in (298, 10_000, 151_936)},
    **{f"length {n}": dict(PRETRAINED, shape=SMOLLM2, prompts=1, samples=2, new=n, warm=0)
       for n in (64, 256, 1024, 2048)},
    "embedded, grpo": EMBEDDED, "embedded, icrl": dict(EMBEDDED, method="icrl"),
}

REWARD = random.Random(0).random                              # so that no group is flat
OUTPUT = tempfile.TemporaryDirectory()                        # TRL's trainer wants a folder


def problems(number):
    draw = random.Random(0)
    return [{"problem": f"What is {draw.randint(100, 999)} + {draw.randint(100, 999)}?", "answer": "0"}
            for _ in range(number)]


def build(work, folder):
    """Save a random model of the shape, with the embedded tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    heads = work["shape"]["hidden"] // 64
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(HERE / "model")
    config.update(dict(
        hidden_size=work["shape"]["hidden"], num_hidden_layers=work["shape"]["layers"],
        layer_types=["full_attention"] * work["shape"]["layers"], intermediate_size=work["shape"]["hidden"] * 8 // 3,
        num_attention_heads=heads, num_key_value_heads=heads, head_dim=64, vocab_size=work["shape"]["vocabulary"],
        max_position_embeddings=4096))
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(HERE / "model").save_pretrained(folder)


def suppressed(work, tokenizer):
    """Tokens that both sides leave out: the end, or so many that it has a chance of 1%, all tokens being as likely."""
    end = tokenizer.eos_token_id
    return [end] if work["fixed"] else [token for token in range(99, len(tokenizer)) if token != end]


def icrl_step(work, folder):
    """Yields after loading, and then after each step what it took."""
    import icrl
    import torch
    config = icrl.Config(
        method=work["method"], samples=work["samples"], max_response=work["new"], max_critique=work["new"], lr=1e-5,
        bf16=work["bf16"], micro_tokens=work["micro_tokens"], checkpointing=work["checkpointing"], device="cpu")
    model, tokenizer = icrl.load_model(folder, config)
    asked, score, trained = problems(work["prompts"] * (work["steps"] + work["warm"])), icrl.completion_logprobs, []
    if work["shape"] == "embedded":
        asked = icrl.load_problems(config.data)
    else:
        icrl.GenerationConfig = functools.partial(icrl.GenerationConfig, suppress_tokens=suppressed(work, tokenizer))
        icrl.outcome_reward = lambda text, problem, truncated: REWARD()

    def counted(model, prompts, completions, temperature):
        trained.append(torch.is_grad_enabled() * sum(map(len, [*prompts, *completions])))
        return score(model, prompts, completions, temperature)

    icrl.completion_logprobs, optimizer = counted, icrl.make_optimizer(model, config)
    torch.manual_seed(0)
    yield sum(weight.sum() for weight in model.parameters())              # all of it has been in memory now
    for step in range(work["steps"] + work["warm"]):
        trained.clear()
        began = time.process_time()
        turns = icrl.rollout(model, tokenizer, asked[step * work["prompts"]:][:work["prompts"]], config)
        sampled = time.process_time()
        icrl.update(model, optimizer, turns, config)
        ended = time.process_time()
        yield {"cpu": ended - began, "sampling": sampled - began, "update": ended - sampled,
               "tokens": sum(len(t.completion) for t in turns), "trained": sum(trained)}


def trl_step(work, folder):
    """The same with TRL: its loop runs in `train`, so steps come out of a callback, all at the end."""
    import icrl
    import datasets
    import torch
    import trl
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    args = trl.GRPOConfig(
        OUTPUT.name, use_cpu=True, bf16=work["bf16"], gradient_checkpointing=work["trl_checkpointing"],
        per_device_train_batch_size=work["trl_micro"], num_generations=work["samples"], learning_rate=1e-5, beta=0.0,
        gradient_accumulation_steps=work["prompts"] * work["samples"] // work["trl_micro"], top_k=0, loss_type="grpo",
        max_completion_length=work["new"], max_steps=work["steps"] + work["warm"], lr_scheduler_type="constant", seed=0,
        report_to="none", save_strategy="no", disable_tqdm=True, shuffle_dataset=False,
        generation_kwargs={"suppress_tokens": suppressed(work, tokenizer)})
    asked = [{"prompt": icrl.solver_messages(problem["problem"])}
             for problem in problems(work["prompts"] * (work["steps"] + work["warm"]))]
    trainer = trl.GRPOTrainer(
        model, lambda completions, **_: [REWARD() for _ in completions], args,
        datasets.Dataset.from_list(asked), processing_class=tokenizer)
    generate, tokens, steps = trainer._generate_single_turn, [], []

    def counted(*args, **more):
        answer = generate(*args, **more)
        tokens.append(sum(map(len, answer[0])))
        return answer

    class Clock(TrainerCallback):
        def on_step_end(self, *_, **__):
            steps.append(time.process_time())

    trainer._generate_single_turn = counted
    trainer.add_callback(Clock())
    torch.manual_seed(0)
    yield sum(weight.sum() for weight in model.parameters())
    steps.append(time.process_time())
    trainer.train()
    for number, (begun, ended) in enumerate(zip(steps, steps[1:])):
        yield {"cpu": ended - begun, "tokens": tokens[number]}


def one_start(work, side, folder):
    """CPU seconds of the process until the first token is sampled."""
    prompt = "What is 1 + 1?"
    if side == "icrl":
        import icrl
        model, tokenizer = icrl.load_model(folder, icrl.Config(device="cpu"))
        icrl.sample(model, tokenizer, [tokenizer(prompt)["input_ids"]] * 8, 1)
    else:
        import datasets
        import trl
        from transformers import AutoModelForCausalLM, AutoTokenizer
        tokenizer, model = (kind.from_pretrained(folder) for kind in (AutoTokenizer, AutoModelForCausalLM))
        args = trl.GRPOConfig(OUTPUT.name, use_cpu=True, bf16=False, report_to="none", max_completion_length=1)
        trainer = trl.GRPOTrainer(model, lambda **_: 0, args, datasets.Dataset.from_list([{"prompt": ""}]),
                                  processing_class=tokenizer)
        trainer._generate_single_turn([tokenizer(prompt)["input_ids"]] * 8, None, {}, 8)
    return time.process_time()


def one_update(work, side, folder):
    """CPU seconds of an update of ragged completions, half of the groups flat; "padded" pads all to the longest."""
    import icrl
    import torch
    draw, config = random.Random(0), icrl.Config(method="grpo", lr=1e-5, device="cpu")
    model, tokenizer = icrl.load_model(folder, config)
    optimizer, size = icrl.make_optimizer(model, config), work["prompts"] * work["samples"]
    prompts = [icrl.encode_chat(tokenizer, icrl.solver_messages(p["problem"])) for p in problems(work["prompts"])]
    turns = []
    for i in range(size):
        group, length = i // work["samples"], min(work["new"], 1 + int(draw.expovariate(1 / 80)))
        completion = [draw.randrange(3, 50) for _ in range(work["new"] if i == 3 else length)]
        turns.append(icrl.Turn(group, i, 1, "solver", prompts[group], prompts[group], completion, "", False,
                               float(group % 2 and draw.random() < 0.5)))

    def padded():
        A = icrl.role_advantages([t.reward for t in turns], [t.query for t in turns])
        rows = [t.prompt + t.completion for t in turns]
        ids = torch.tensor([row + [0] * (max(map(len, rows)) - len(row)) for row in rows])
        mask = torch.zeros(ids.shape)
        for row, turn in zip(mask, turns):
            row[len(turn.prompt):len(turn.prompt) + len(turn.completion)] = 1
        for i in range(0, size, work["trl_micro"]):
            part = slice(i, i + work["trl_micro"])
            logits = model(ids[part], use_cache=False).logits[:, :-1]
            logp = logits.log_softmax(-1).gather(2, ids[part, 1:, None])[..., 0]
            J = icrl.icrl_objective(logp, logp, A[part], torch.ones_like(logp), mask[part, 1:])
            (-J * work["trl_micro"] / size).backward()
        icrl.optimizer_step(model, optimizer, 1.0)

    act, seconds = padded if side == "padded" else lambda: icrl.update(model, optimizer, turns, config), []
    for _ in range(work["steps"] + work["warm"]):
        began = time.process_time()
        act()
        seconds.append(time.process_time() - began)
    return statistics.median(seconds[work["warm"]:])


def resident(which):
    """MB of memory: VmRSS now, VmHWM at most."""
    return int(Path("/proc/self/status").read_text().partition(f"{which}:")[2].split()[0]) / 1024


def one(name, side, folder):
    """Measure one side of one piece of work, in this process; prints a JSON line of means over the steps."""
    work = {**AGAINST_TRL, **SCALING}[name]
    if name in ("start", "update"):
        print(json.dumps({"cpu": {"start": one_start, "update": one_update}[name](work, side, folder)}))
        return
    steps = (trl_step if side == "trl" else icrl_step)(work, folder)
    next(steps)
    Path("/proc/self/clear_refs").write_text("5")             # from here the peak grows from what is resident now
    loaded, steps = resident("VmRSS"), list(steps)[work["warm"]:]
    print(json.dumps({**{key: statistics.mean(row[key] for row in steps) for key in steps[0]},
                      "MB": resident("VmHWM") - loaded}))


def measure(path, works, sides, pairs, model):
    """Write a row for each work, pair and side, in place of older ones."""
    rows = list(csv.DictReader(open(path))) if path.exists() else []
    rows = [row for row in rows if row["work"] not in works]
    for pair in range(pairs):
        for name, work in works.items():
            with tempfile.TemporaryDirectory() as built:
                if isinstance(work["shape"], dict):
                    build(work, built)
                folder = {"pretrained": model, "embedded": str(HERE / "model")}.get(str(work["shape"]), built)
                for side in ("padded", "icrl") if name == "update" else sides:
                    run = subprocess.run(
                        [sys.executable, __file__, "one", "--work", name, "--side", side, "--model", folder],
                        capture_output=True, text=True)
                    if run.returncode:
                        sys.exit(f"bench.py: {name}, {side}:\n{run.stderr[-3000:]}")
                    rows.append({"work": name, "pair": pair, "side": side, **json.loads(run.stdout.splitlines()[-1])})
                    print(name, side, flush=True)
            with open(path, "w", newline="") as file:
                writer = csv.DictWriter(
                    file, ["work", "pair", "side", "cpu", "sampling", "update", "tokens", "trained", "MB"])
                writer.writeheader()
                writer.writerows(rows)


def against_trl(path):
    """Table of ratios, icrl.py over the other side: median and range over the pairs; per token where lengths differ."""
    rows = list(csv.DictReader(open(path)))
    print("| work | CPU, icrl.py / other side | other side, seconds | peak memory, icrl.py / other side | pairs |\n"
          "|---|---|---|---|---|")
    for name, work in AGAINST_TRL.items():
        ours, theirs = ([row for row in rows if row["work"] == name and (row["side"] == "icrl") == mine]
                        for mine in (True, False))
        if not ours:
            continue

        def ratios(key, per):
            return [float(a[key]) / float(b[key]) / (float(a["tokens"]) / float(b["tokens"]) if per else 1)
                    for a, b in zip(ours, theirs)]

        cpu, memory = ratios("cpu", not work["fixed"]), ratios("MB", False) if ours[0]["MB"] else []
        print(f"| {name} | {statistics.median(cpu):.2f} ({min(cpu):.2f} to {max(cpu):.2f}) "
              f"| {statistics.median(float(row['cpu']) for row in theirs):.3g} "
              f"| {f'{statistics.median(memory):.2f}' if memory else '-'} | {len(ours)} |")


def scaling(path):
    """Table of cost by size: CPU seconds and peak memory of a step."""
    columns = ["tokens", "trained", "cpu", "sampling", "update", "MB"]
    print(f"| work | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}")
    for row in csv.DictReader(open(path)):
        values = [float(row[key]) for key in columns]
        print(f"| {row['work']} | {' | '.join(f'{x:,.0f}' if x >= 100 else f'{x:.2g}' for x in values)} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("trl", "scaling", "one"))
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="the pretrained model")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--work", nargs="+", help="by default all")
    parser.add_argument("--side", help="of one")
    args = parser.parse_args()
    if args.command == "one":
        return one(args.work[0], args.side, args.model)
    against = args.command == "trl"
    table, path = (AGAINST_TRL, "speed.csv") if against else (SCALING, "scaling.csv")
    works = {name: table[name] for name in args.work or table}
    measure(HERE / "results" / path, works, ("trl", "icrl") if against else ("icrl",), args.pairs if against else 1,
            args.model)
    (against_trl if against else scaling)(HERE / "results" / path)


if __name__ == "__main__":
    main()
