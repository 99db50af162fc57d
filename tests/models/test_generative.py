"""Models of text as transformers' own: the same logits, and what its search finds with them."""

from itertools import pairwise
from typing import Any

import pytest
import torch

from cutlayer.datasets import DatasetInfo
from cutlayer.models import ModelConfig, build_model
from cutlayer.models.frozen import unshare
from cutlayer.models.generative import generative
from cutlayer.models.lora import LoraConfig
from cutlayer.runtime.ground.config import ConfigError
from cutlayer.runtime.scoring.completing import GenerateConfig, completions

transformers = pytest.importorskip("transformers", reason="the extra huggingface is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")  # of both libraries, which say what they change by themselves

INFO = DatasetInfo("made", 0, 0, 0, 3, tuple("abc"), task="causal_lm", outputs=40, length=24)
END = 39
GPT = ModelConfig("gpt", options={"hidden": 16, "heads": 2, "depth": 2, "dropout": 0.3})
LORA = LoraConfig(r=2, targets=("attention", "widen", "head"), dropout=0.3)
GPT2 = {"n_layer": 2, "n_embd": 16, "n_head": 2, "n_positions": 24}
LLAMA = {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2,
         "num_key_value_heads": 1, "max_position_embeddings": 24}  # fmt: skip
MODELS = {
    "gpt": GPT,
    "gpt with adapters": ModelConfig("gpt", options=GPT.options, lora=LORA),
    "gpt2": ModelConfig("huggingface/gpt2", cut="transformer.h.0", options=GPT2, lora=LoraConfig(r=2)),
    "gpt2 of more tokens": ModelConfig("huggingface/gpt2", cut="transformer.h.0", options={**GPT2, "vocab_size": 90}),
    "llama": ModelConfig("huggingface/llama", cut="model.layers.0", options=LLAMA),
}
PROMPTS = [[1, 2, 3, END], [4, END], [5, 6, 7, 8, 9, 10, END], [END], [11, 12, END], [3, 3, 3, 3, 3, 3, END]]
PLAIN = GenerateConfig(beams=1, no_repeat=0, tokens=9)


def built(name: str) -> torch.nn.Module:
    """A model in double precision whose likeliest tokens differ from place to place."""
    torch.manual_seed(5)
    model = build_model(MODELS[name], INFO)
    unshare(model)
    model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.4)
    return model


def transformer(name: str) -> Any:
    return generative(built(name), MODELS[name], INFO)


def generated(name: str, config: GenerateConfig, prompts: list[list[int]] = PROMPTS) -> list[list[int]]:
    return completions(transformer(name), prompts, config, end=END, positions=24)


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_the_model(name: str) -> None:
    ours, theirs = built(name), transformer(name)
    assert isinstance(theirs, transformers.PreTrainedModel)
    for length in (1, 7, 24):
        x = torch.randint(40, (2, length))
        with torch.no_grad():
            logits = theirs(x).logits
            torch.testing.assert_close(logits[..., :40], ours(x), rtol=1e-10, atol=1e-12)
        assert (logits[..., 40:] == float("-inf")).all()


@pytest.mark.parametrize("name", MODELS)
def test_one_beam_takes_the_likeliest_token_each_time(name: str) -> None:
    model = built(name)
    found = generated(name, PLAIN)
    for prompt, text in zip(PROMPTS, found, strict=True):
        tokens = [*prompt]
        while len(tokens) < len(prompt) + 9 and tokens[len(prompt) :][-1:] != [END]:
            with torch.no_grad():
                tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
        assert text == tokens[len(prompt) :]
    assert len({tuple(text) for text in found}) > 1


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("config", [PLAIN, GenerateConfig(beams=4, no_repeat=2, tokens=16)], ids=["1", "4"])
def test_a_text_is_the_same_in_any_batch(name: str, config: GenerateConfig) -> None:
    several = [generated(name, GenerateConfig(**{**vars(config), "batch_size": size})) for size in (1, 2, 4, 16)]
    assert all(found == several[0] for found in several)


def test_beams_find_likelier_texts() -> None:
    """Of texts of one length, and none of them ends: those of most beams have the highest probability."""
    model = built("gpt")
    config = GenerateConfig(length_penalty=0.0, no_repeat=0, tokens=4)
    found = [generated("gpt", GenerateConfig(**{**vars(config), "beams": beams})) for beams in (1, 200)]

    def probability(prompt: list[int], text: list[int]) -> float:
        with torch.no_grad():
            logs = model(torch.tensor([prompt + text]))[0].log_softmax(-1)
        return float(sum(logs[len(prompt) + at - 1, token] for at, token in enumerate(text)))

    pairs = [[probability(*each) for each in zip(PROMPTS, texts, strict=True)] for texts in found]
    assert all(most >= one - 1e-9 for one, most in zip(*pairs, strict=True))
    assert max(most - one for one, most in zip(*pairs, strict=True)) > 0.01


def test_no_ngram_is_repeated_but_one_of_the_prompt_may_be() -> None:
    prompts = [[*prompt[:-1], *prompt] for prompt in PROMPTS]
    free, bound = (generated("gpt", GenerateConfig(beams=3, no_repeat=n, tokens=12), prompts) for n in (0, 2))
    assert any(repeats(text) for text in free)
    assert not any(repeats(text) for text in bound)
    # A model that says the likeliest token again and again: the prompt has it too, and it still comes once.
    plain = generated("gpt", GenerateConfig(beams=1, no_repeat=0, tokens=1), prompts)
    again = [[*prompt[:-1], first[0], END] for prompt, first in zip(prompts, plain, strict=True)]
    free, bound = (generated("gpt", GenerateConfig(beams=1, no_repeat=n, tokens=1), again) for n in (0, 1))
    assert free == bound


def repeats(text: list[int]) -> bool:
    pairs = [*pairwise(text)]
    return len({*pairs}) < len(pairs)


def test_texts_end_at_the_models_last_position_and_none_is_shorter_for_another() -> None:
    prompts = [[*range(20), END], [*range(15), END], [1, END], [2, 3, END]]
    config = GenerateConfig(beams=2, no_repeat=0, tokens=12)
    found = generated("gpt", config, prompts)
    assert all(len(prompt) + len(text) <= 24 for prompt, text in zip(prompts, found, strict=True))
    assert found == [generated("gpt", config, [prompt])[0] for prompt in prompts]
    assert len(found[2]) == 12 or found[2][-1] == END


def test_a_bases_own_ways_to_generate_are_left_out() -> None:
    """Such as a penalty that its folder says, which would change figures without a word."""
    model = built("gpt2")
    model.generation_config = transformers.GenerationConfig(repetition_penalty=9.0, suppress_tokens=[*range(20)])
    found = completions(generative(model, MODELS["gpt2"], INFO), PROMPTS, PLAIN, end=END, positions=24)
    assert found == generated("gpt2", PLAIN)


def test_other_models_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.name=mlp: expected gpt or huggingface/<type>, with which"):
        generative(torch.nn.Identity(), ModelConfig("mlp"), INFO)


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"beams": 0}, "beams=0: expected an integer >= 1"),
        ({"batch_size": 0}, "batch_size=0: expected an integer >= 1"),
        ({"tokens": 0}, "tokens=0: expected auto, or an integer >= 1"),
        ({"no_repeat": -1}, "no_repeat=-1: expected auto, or an integer >= 0"),
        ({"prompts": 0}, "prompts=0: expected an integer >= 1, or null"),
        ({"length_penalty": float("inf")}, "length_penalty=inf: expected a finite number"),
        ({"prompt": ""}, "prompt='': expected a text"),
        ({"metrics": ("blue",)}, "metrics=blue: expected a registered text metric; did you mean bleu?"),
    ],
)
def test_values_out_of_range_are_refused(values: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        GenerateConfig(**values)
    assert str(caught.value).startswith(line)


def test_what_follows_from_the_tokenizer() -> None:
    both = [GenerateConfig().settled(name) for name in ("bytes", "gpt2")]
    assert [(each.no_repeat, each.tokens) for each in both] == [(0, 256), (4, 64)]
    given = GenerateConfig(no_repeat=3, tokens=7)
    assert given.settled("bytes") == given
    assert len({each.setting for each in (*both, given, GenerateConfig(prompts=3).settled("gpt2"))}) == 4
