"""Models of llama.cpp's files as bases, against the same weights in transformers."""

import shutil
from pathlib import Path

import pytest
import torch

from cutlayer.datasets import DatasetInfo
from cutlayer.models import ModelConfig, build_model
from cutlayer.models.pretrained import base_hash, base_identity
from cutlayer.runtime.ground.config import ConfigError

transformers = pytest.importorskip("transformers", reason="the extra huggingface is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")

INFO = DatasetInfo("made", 0, 0, 0, 3, tuple("abc"), task="causal_lm", outputs=40, length=20)
LLAMA = {"num_hidden_layers": 3, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2,
         "num_key_value_heads": 1, "max_position_embeddings": 24}  # fmt: skip


def save_gguf(file: Path, state: dict[str, torch.Tensor]) -> None:
    """Write a Llama's weights as llama.cpp has them: other names, and the rows of queries and keys in pairs."""
    gguf = pytest.importorskip("gguf", reason="the extra gguf is not installed")
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(LLAMA["num_hidden_layers"])
    writer.add_context_length(LLAMA["max_position_embeddings"])
    writer.add_embedding_length(LLAMA["hidden_size"])
    writer.add_feed_forward_length(LLAMA["intermediate_size"])
    writer.add_head_count(LLAMA["num_attention_heads"])
    writer.add_head_count_kv(LLAMA["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(40)
    inner = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"}
    inner |= {"self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up"}
    inner |= {"mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    outer = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    for name, tensor in state.items():
        module = name.removesuffix(".weight")
        if module not in outer:
            number, _, module = module.removeprefix("model.layers.").partition(".")
            heads = {"attn_q": LLAMA["num_attention_heads"], "attn_k": LLAMA["num_key_value_heads"]}
            if inner[module] in heads:
                tensor = tensor.view(heads[inner[module]], 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
            outer[module := f"{number}.{module}"] = f"blk.{number}.{inner[module]}"
        writer.add_tensor(f"{outer[module]}.weight", tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_is_a_base(tmp_path: Path) -> None:
    torch.manual_seed(3)
    settings = transformers.AutoConfig.for_model("llama", **LLAMA, vocab_size=40, rms_norm_eps=1e-6)
    plain = transformers.AutoModelForCausalLM.from_config(settings).eval()
    save_gguf(tmp_path / "made.gguf", plain.state_dict())
    model = build_model(ModelConfig("huggingface/llama", base=tmp_path / "made.gguf"), INFO).eval()
    x = torch.randint(40, (2, 9))
    assert torch.equal(model(x), plain(x).logits)
    renamed = shutil.copy(tmp_path / "made.gguf", tmp_path / "renamed.gguf")
    assert base_identity(renamed) == base_identity(tmp_path / "made.gguf") == base_hash(Path(renamed))
    (tmp_path / "made.gguf").write_bytes(b"GGUF and no more")
    with pytest.raises(ConfigError, match=r"model\.base=.*expected weights that transformers can read"):
        build_model(ModelConfig("huggingface/llama", base=tmp_path / "made.gguf", options={"use_cache": True}), INFO)
