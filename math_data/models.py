#!/usr/bin/env python3
"""Which architectures of transformers can icrl.py train? Each is built tiny, with random weights, and checked.

    python math_data/models.py                     all, in about two minutes; renews the end of results/MODELS.md
    python math_data/models.py qwen3 gemma3        only these; writes nothing

A model passes if icrl.load_model accepts it and all of this holds:
  samples      Greedy samples of a batch of prompts of unlike length equal those of plain `generate`, one by one.
  same policy  Each sampled token is the most likely one in a single pass over its text. So the policy that samples is
               the policy that is scored.
  log-probs    Those of a padded batch equal those of one text at a time, to 1e-4. This holds with and without
               --checkpointing, although all dropout rates in the config are 0.5: load_model removes them.
  gradients    They are the same with and without --checkpointing.
  context      icrl.check_context accepts 512 tokens, the limit in the config, and refuses 513.
"""
import os
import sys
import tempfile
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}
HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import icrl

PAGE, MARK = HERE / "results/MODELS.md", "<!-- The rest is written by math_data/models.py. -->\n"
TOKENIZER = AutoTokenizer.from_pretrained(HERE / "arithmetic/model")
STOPS = [*range(0, 256, 12), 257]                   # many ids end a completion, so that rows end at unlike times

# A config takes those of these sizes that it knows. The weights are larger than usual, so that every layer counts.
# The sliding window is shorter than most prompts.
SIZES = dict(
    vocab_size=298, max_position_embeddings=512, pad_token_id=256, bos_token_id=257, eos_token_id=257,
    initializer_range=0.3, hidden_size=32, intermediate_size=48, ffn_dim=48, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, rotary_dim=8, sliding_window=24, window_size=24, attention_chunk_size=24,
    vocab_size_per_layer_input=298, hidden_size_per_layer_input=8, laurel_rank=8,
    # mixtures of experts
    num_experts=4, num_local_experts=4, n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1, n_group=1,
    topk_group=1, moe_intermediate_size=16, shared_expert_intermediate_size=16, shared_intermediate_size=16,
    moe_shared_expert_intermediate_size=16, dense_intermediate_size=16, expert_ffn_hidden_size=16, ffn_hidden_size=48,
    # attention of low rank, sparse attention
    q_lora_rank=16, kv_lora_rank=16, o_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, o_groups=2,
    index_n_heads=2, index_head_dim=8, index_topk=512, index_block_size=8,
    # state-space and linear layers
    mamba_n_heads=4, mamba_num_heads=4, n_mamba_heads=4, mamba_head_dim=16, mamba_d_ssm=64, mamba_d_state=8, n_groups=2,
    mamba_n_groups=2, mamba_ngroups=2, ssm_state_size=8, state_size=8, mamba_chunk_size=8, chunk_size=8,
    linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8, linear_head_dim=8,
    linear_num_heads=4)
VISION = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, depth=1, num_heads=2)
CONV, LINEAR, SLIDING = (dict(layer_types=[kind, "full_attention"] * 2)
                         for kind in ("conv", "linear_attention", "sliding_attention"))
GEMMA4 = dict(SLIDING, global_head_dim=8)
WINDOW = dict(use_sliding_window=True, max_window_layers=2, sliding_window=24)
ZAMBA = dict(layers_block_type=["linear_attention", "linear_attention", "hybrid", "hybrid"])
ROPE = dict(rope_theta=1e4, original_max_position_embeddings=128)
# What some need besides. A key is a model type of transformers; after a comma it says which variant this is.
SPECIAL = {
    "bailing_hybrid": dict(layer_group_size=2), "bamba": dict(attn_layer_indices=[1, 3]),
    "bert, is_decoder": dict(is_decoder=True), "deepseek_v32, past index_topk": dict(index_topk=16),
    "falcon, alibi": dict(alibi=True), "falcon, new": dict(new_decoder_architecture=True, num_kv_heads=2),
    "gemma3": SLIDING, "gemma3_text": SLIDING, "gemma3n_text": dict(SLIDING, num_kv_shared_layers=2),
    "gemma4": GEMMA4, "gemma4_text": GEMMA4, "gemma4_unified_text": GEMMA4, "granitemoehybrid": LINEAR,
    "gpt_neo": dict(attention_types=[[["global", "local"], 2]]), "hrm_text": dict(initializer_range=0.1),
    "jamba": dict(attn_layer_period=2, attn_layer_offset=1), "kimi_linear": LINEAR, "lfm2": CONV, "lfm2_moe": CONV,
    "longcat_flash": dict(num_layers=2, zero_expert_num=2), "mamba2": dict(num_heads=4, head_dim=16),
    "ministral": SLIDING, "nemotron_h, time_step_min 0.1": dict(time_step_min=0.1),
    "phi3, longrope": dict(original_max_position_embeddings=512, max_position_embeddings=2048, rope_parameters=dict(
        ROPE, rope_type="longrope", short_factor=[1.0] * 4, long_factor=[4.0] * 4)),
    "qwen2, sliding": WINDOW, "qwen3, sliding": WINDOW, "smollm3, sliding": WINDOW,
    "qwen3, yarn": dict(rope_parameters=dict(ROPE, rope_type="yarn", factor=4.0)), "xlnet": dict(d_head=8),
    "zamba": ZAMBA, "zamba2": ZAMBA, "zamba2, time_step_min 0.1": dict(ZAMBA, time_step_min=0.1),
    "zaya": dict(num_experts_per_tok=1),
}
# Most of these are parts of models that read images, sound or the output of an encoder.
NOT_TRIED = """bart bigbird_pegasus blenderbot blenderbot-small blt cohere_compass_text cpmant dbrx dots3_note
    dots3_note_text emu3 gemma3n gemma4_assistant gemma4_unified gemma4_unified_assistant git got_ocr2 inkling_text
    inkling2_loop_text inkling2_text marian mbart mllama moss_transcribe_diarize musicgen musicgen_melody mvp pegasus
    phi4_multimodal plbart prophetnet qwen4_exp qwen4_exp_text reformer roc_bert trocr whisper xmod""".split()


def build(name, folder):
    """Save a tiny model of this architecture, with random weights and dropout, in `folder`."""
    torch.manual_seed(0)
    kind = name.partition(",")[0]
    default = AutoConfig.for_model(kind)
    text = default.get_text_config()
    known = {**text.attribute_map, **text.to_dict()}
    sizes = {key: value for key, value in SIZES.items() if key in known}
    if "kv_lora_rank" in known:
        sizes["num_key_value_heads"] = 4            # attention of low rank has as many of both
    if known.get("sliding_window") is None:
        sizes.pop("sliding_window", None)           # by default it is off
    sizes |= SPECIAL.get(name, {})
    config = AutoConfig.for_model(kind, **(sizes if text is default else dict(text_config=sizes, vision_config=VISION)))
    for part in (config, config.get_text_config()):
        for attribute, value in list(vars(part).items()):
            if "drop" in attribute and isinstance(value, float) and kind != "diffllama":      # which forbids dropout
                setattr(part, attribute, 0.5)
    model = AutoModelForCausalLM.from_config(config)
    model.generation_config.eos_token_id = STOPS
    model.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)


def fits(model, length):
    """Say whether icrl.check_context accepts a session of `length` tokens."""
    prompt = icrl.encode_chat(TOKENIZER, icrl.critic_messages("1 + 1", ""))
    config = icrl.Config(max_critique=1, max_response=length - 1 - len(prompt))
    try:
        icrl.check_context(model, TOKENIZER, [{"problem": "1 + 1"}], config)
        return True
    except icrl.UsageError:
        return False


def check(folder):
    """Check the model in `folder`. Returns the result in words."""
    try:
        model, _ = icrl.load_model(folder, icrl.Config())
    except icrl.UsageError as error:
        return "refused: " + str(error).partition(": ")[2]
    draws = torch.Generator().manual_seed(1)
    prompts = [torch.randint(0, 256, (length,), generator=draws).tolist() for length in (2, 17, 40, 41, 90, 5, 33, 64)]
    completions, _ = icrl.sample(model, TOKENIZER, prompts, 24, temperature=0, chunk=5)
    different = unlikely = 0
    one_by_one = []
    for prompt, completion in zip(prompts, completions):
        ids, text = torch.tensor([prompt]), torch.tensor([prompt + completion])
        plain = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=24)
        different += plain[0, len(prompt):].tolist() != completion
        with torch.no_grad():
            logp = model(input_ids=text, use_cache=False).logits[0, len(prompt) - 1:-1].log_softmax(-1)
        one_by_one.append(logp[range(len(completion)), completion])
        unlikely += bool((logp.max(-1).values > one_by_one[-1] + 1e-3).any())
    wrong, gradients = [], []
    if different:
        wrong.append(f"{different} of 8 samples differ from `generate`")
    if unlikely:
        wrong.append(f"{unlikely} of 8 samples are not what a single pass over the text would choose")
    limited = hasattr(model.config.get_text_config(), "max_position_embeddings")
    if limited and (not fits(model, 512) or fits(model, 513)):
        wrong.append("the limit of its context is not seen")
    for checkpointing in (False, True)[:1 + model.supports_gradient_checkpointing]:
        model, _ = icrl.load_model(folder, icrl.Config(checkpointing=checkpointing))
        logp, _ = icrl.completion_logprobs(model, prompts, completions)
        logp.mean().backward()
        gradients.append(torch.cat([w.grad.flatten() for w in model.parameters() if w.grad is not None]))
        error = max((row[:len(one)] - one).abs().max().item() for row, one in zip(logp, one_by_one))
        if not error < 1e-4:
            wrong.append(f"log-probs off by {error:.2g}" + " with --checkpointing" * checkpointing)
    if len(gradients[0]) != len(gradients[-1]) or (gradients[0] - gradients[-1]).norm() > 1e-3 * gradients[0].norm():
        wrong.append("other gradients with --checkpointing")
    if wrong:
        return "wrong: " + "; ".join(wrong)
    return "passes" if len(gradients) == 2 else "passes; it cannot do --checkpointing"


def main(names):
    transformers.utils.logging.set_verbosity(transformers.utils.logging.CRITICAL)
    transformers.utils.logging.disable_progress_bar()
    results = {}
    for name in names or sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *SPECIAL} - {*NOT_TRIED}):
        with tempfile.TemporaryDirectory() as folder:
            build(name, folder)
            results[name] = check(folder)
        print(f"{name:32} {results[name]}", flush=True)
    passing = [name for name, result in results.items() if result == "passes"]
    versions = f"transformers {transformers.__version__}, torch {torch.__version__}, Python {sys.version.split()[0]}"
    text = (f"Tried: {len(results)} ({versions}).\n\n**{len(passing)} pass:** {'; '.join(passing)}.\n\n"
            "| the others | result |\n|---|---|\n")
    text += "".join(f"| {name} | {result} |\n" for name, result in results.items() if name not in passing)
    text += f"\nNot tried: {', '.join(NOT_TRIED)}.\n"
    if not names:
        PAGE.write_text(PAGE.read_text().partition(MARK)[0] + MARK + "\n" + text)


if __name__ == "__main__":
    main(sys.argv[1:])
