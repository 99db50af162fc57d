"""A small language model with low-rank adapters on a base of its own, and lines of Macbeth for it."""

import json
from pathlib import Path

from cutlayer import algorithms
from cutlayer.datasets.shakespeare import _plays

LENGTH = 20
LAYERS = {"n_layer": 2, "n_embd": 16, "n_head": 2, "n_positions": LENGTH, "vocab_size": 257}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def prepare(folder: Path) -> tuple[str, ...]:
    """Write what runs need into a folder; their keys."""
    write(folder)
    return text_keys(folder)


def write(folder: Path) -> None:
    """Write texts and a GPT-2 of two blocks 16 wide."""
    import torch
    import transformers

    lines = [line for line in _plays()["Macbeth", "Macbeth"].splitlines() if len(line) > LENGTH]
    for name, chosen in (("train", lines[:72]), ("test", lines[72:96])):
        rows = [{"prompt": f"{name} {i}: ", "completion": line[: 6 + i % LENGTH]} for i, line in enumerate(chosen)]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with torch.random.fork_rng():
        torch.manual_seed(7)
        config = transformers.AutoConfig.for_model("gpt2", **LAYERS, **NO_DROPOUT, bos_token_id=0, eos_token_id=0)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder / "base")


def text_keys(folder: Path) -> tuple[str, ...]:
    """The keys of a run on what was written."""
    return (
        *("dataset=jsonl", f"dataset.root={folder}", f"dataset.options.length={LENGTH}", "dataset.distribution=iid"),
        *("model=huggingface/gpt2", f"model.base={folder / 'base'}", "model.lora.targets=[c_attn,c_fc,lm_head]"),
        *("model.lora.r=4", "num_clients=3", "batch_size=8", "rounds=2", "eval_interval=1", "threads=1"),
    )


def cut(name: str) -> tuple[str, ...]:
    """Where a method cuts this model: after the first block, or before and behind the second."""
    if not algorithms.get(name).layout.cut:
        return ()
    three = "tail" in algorithms.get(name).layout.whole
    return ("model.cut=[transformer.h.0,transformer.h.1]" if three else "model.cut=transformer.h.0",)


def rate(name: str) -> tuple[str, ...]:
    """At which a method learns it in two rounds."""
    return ("optimizer=sgd", "lr=0.1") if name == "scaffold" else ("lr=0.05",)
