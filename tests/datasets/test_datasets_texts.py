"""Texts: blocks and cuts, batches, and that losses of tokens depend on none of them."""

import hashlib
import pickle
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from cutlayer.datasets.text_source import TextSource, TokenStore
from cutlayer.datasets.texts import MappedTokens, Texts, blocks, concatenated, cut_off, token_dtype

CPU = torch.device("cpu")
SIZE = 11  # tokens that there are
IGNORED = -100


@st.composite
def written(draw: st.DrawFn) -> list[tuple[list[int], int]]:
    """Texts of at least two tokens, each with how many of them are given."""
    texts = draw(st.lists(st.lists(st.integers(0, SIZE - 1), min_size=2, max_size=30), min_size=1, max_size=6))
    return [(text, draw(st.integers(0, len(text) - 1))) for text in texts]


def arrays(texts: list[tuple[list[int], int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    return *concatenated([text for text, _ in texts], SIZE), np.array([prompt for _, prompt in texts], dtype=np.int64)


def source_of(texts: Texts, *, resident: bool = True) -> TextSource:
    labels = torch.zeros(len(texts), dtype=torch.int64)
    return TextSource(texts, TokenStore(texts.tokens, CPU, resident=resident), labels, None, CPU)


def bigrams(texts: list[tuple[list[int], int]]) -> Tensor:
    """How often each token follows each one that is not given, int64 [SIZE, SIZE], counted text by text."""
    counts = torch.zeros(SIZE, SIZE, dtype=torch.int64)
    for text, prompt in texts:
        for at, (one, other) in enumerate(pairwise(text), 1):
            counts[one, other] += at >= prompt
    return counts


def predicted(source: TextSource, batch_size: int, seed: int | None = None) -> Tensor:
    """The same of all batches of a source: what a model of context one can lose at any of them."""
    counts = torch.zeros(SIZE, SIZE, dtype=torch.int64)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    indices = torch.arange(len(source))
    for x, y in source.batches(indices, batch_size=batch_size, shuffle=seed is not None, generator=generator):
        assert x.shape == y.shape
        assert x.dtype == y.dtype == torch.int64
        assert (y != IGNORED).any(1).all(), "each sample has something to predict"
        used = y != IGNORED
        counts.index_put_((x[used], y[used]), torch.ones(int(used.sum()), dtype=torch.int64), accumulate=True)
    return counts


@given(texts=written(), length=st.integers(1, 40), batch_size=st.integers(1, 9), seed=st.integers(0, 3))
def test_blocks_of_any_length_predict_each_token_once(
    texts: list[tuple[list[int], int]], length: int, batch_size: int, seed: int
) -> None:
    made, owner = blocks(*arrays(texts), length)
    source = source_of(made)
    assert source.shape == (length,)
    assert torch.equal(predicted(source, batch_size, seed), bigrams(texts))
    assert made.predicted == int(bigrams(texts).sum())
    for index, text in enumerate(owner.tolist()):
        start = int(made.starts[index])
        whole = concatenated([text for text, _ in texts], SIZE)
        assert whole[1][text] <= start
        assert start + made.lengths[index] <= whole[1][text] + whole[2][text], "a block is of one text"


@given(texts=written(), length=st.integers(1, 40))
def test_what_is_cut_off_leaves_as_much_as_fits_and_something_to_predict(
    texts: list[tuple[list[int], int]], length: int
) -> None:
    made, cut = cut_off(*arrays(texts), length)
    lost = 0
    for index, (text, prompt) in enumerate(texts):
        given, left = made.prompt(index), made.completion(index)
        if prompt <= length:
            assert given + left == text[: length + 1]
            assert given == text[:prompt]
        else:
            assert left == text[prompt:][:length]
            assert given == text[:prompt][-(length + 1 - len(left)) :]
            assert given, "something to predict from"
            lost += 1
        assert left
    assert cut.texts == sum(len(text) > length + 1 for text, _ in texts)
    assert cut.prompts == lost
    assert cut.longest == max(len(text) for text, _ in texts) - 1


@given(texts=written(), batch_size=st.integers(1, 9), seed=st.integers(0, 3))
def test_padding_and_order_leave_the_losses_of_tokens_as_they_are(
    texts: list[tuple[list[int], int]], batch_size: int, seed: int
) -> None:
    source = source_of(cut_off(*arrays(texts), 40)[0])
    assert torch.equal(predicted(source, batch_size, seed), bigrams(texts))
    for x, y in source.batches(torch.arange(len(texts)), batch_size=batch_size):
        longest = int((x.new_tensor(range(1, x.shape[1] + 1)) * (y != IGNORED).any(0)).max())
        assert longest == x.shape[1], "a batch is as long as its longest text"


class LooksBack(nn.Module):
    """Logits of the next token by all of those before."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.recur = nn.Embedding(SIZE, 5), nn.GRU(5, 6, batch_first=True)
        self.head = nn.Linear(6, SIZE)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.recur(self.embed(x))[0])


@settings(max_examples=30)
@given(texts=written(), batch_size=st.integers(2, 9), seed=st.integers(0, 3))
def test_a_model_that_looks_back_needs_no_mask(texts: list[tuple[list[int], int]], batch_size: int, seed: int) -> None:
    torch.manual_seed(seed)
    model, source = LooksBack().double().requires_grad_(False), source_of(cut_off(*arrays(texts), 40)[0])
    alone = 0.0
    for text, prompt in texts:
        losses = functional.cross_entropy(model(torch.tensor([text[:-1]]))[0], torch.tensor(text[1:]), reduction="none")
        alone += float(losses[max(prompt, 1) - 1 :].sum())
    together = sum(
        float(functional.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="sum"))
        for x, y in source.batches(torch.arange(len(texts)), batch_size=batch_size)
    )
    assert together == pytest.approx(alone, abs=1e-9)


@given(texts=written(), seed=st.integers(0, 3))
def test_what_is_taken_and_its_targets_are_a_batch(texts: list[tuple[list[int], int]], seed: int) -> None:
    source = source_of(cut_off(*arrays(texts), 40)[0])
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed))
    ((x, y),) = source.batches(order, batch_size=len(order))
    (taken,) = source.take(order, [{}])
    assert torch.equal(taken, x)
    assert torch.equal(source.targets[order], y)
    assert (x[y == IGNORED] < SIZE).all()
    one, other = source.take(order, [{}, {}])
    assert torch.equal(one, other)


def in_a_file(folder: Path, texts: Texts) -> Texts:
    """The same texts, with their tokens in a file that is mapped."""
    texts.tokens.tofile(folder / "tokens")
    mapped = MappedTokens.open(folder / "tokens", texts.tokens.dtype, len(texts.tokens))
    return Texts(mapped, texts.starts, texts.lengths, texts.prompts, texts.length)


def digest(source: TextSource) -> str:
    found = hashlib.sha256()
    generator = torch.Generator().manual_seed(0)
    for pair in source.batches(torch.arange(len(source)), batch_size=7, epochs=2, shuffle=True, generator=generator):
        for each in pair:
            found.update(each.numpy().tobytes())
    return found.hexdigest()


def test_batches_are_the_same_wherever_the_tokens_are(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    texts = [(rng.integers(0, SIZE, rng.integers(2, 60)).tolist(), 1) for _ in range(50)]
    made, _ = blocks(*arrays(texts), 16)
    mapped = in_a_file(tmp_path, made)
    resident, streamed = source_of(mapped), source_of(mapped, resident=False)
    expected = digest(source_of(made))
    again = pickle.dumps(streamed)
    assert np.array(made.tokens).tobytes() not in again, "the file is opened again"
    assert np.array_equal(pickle.loads(pickle.dumps(mapped.tokens[3:9])), made.tokens[3:9])
    assert {digest(each) for each in (resident, streamed, pickle.loads(again))} == {expected}
    assert made.sum() == mapped.sum()


def test_a_subset_is_of_the_same_tokens() -> None:
    texts = [([1, 2, 3], 1), ([4, 5], 0), ([6, 7, 8, 9], 2)]
    made, _ = cut_off(*arrays(texts), 9)
    chosen = made.subset(np.array([2, 0]))
    assert chosen.tokens is made.tokens
    assert [chosen.prompt(i) + chosen.completion(i) for i in range(2)] == [[6, 7, 8, 9], [1, 2, 3]]
    assert chosen.predicted == 4


@pytest.mark.parametrize("change", ["token", "prompt", "length"])
def test_the_sum_tells_texts_apart(change: str) -> None:
    texts = [([1, 2, 3], 1), ([4, 5, 6], 0)]
    before = cut_off(*arrays(texts), 9)[0].sum()
    texts[1] = {"token": ([4, 5, 7], 0), "prompt": ([4, 5, 6], 2), "length": ([4, 5], 0)}[change]
    assert cut_off(*arrays(texts), 9)[0].sum() != before


@pytest.mark.parametrize(("size", "name"), [(256, "uint8"), (257, "uint16"), (65_536, "uint16"), (65_537, "int32")])
def test_tokens_take_the_smallest_integers_that_hold_them(size: int, name: str) -> None:
    assert token_dtype(size) == np.dtype(name)
    assert np.iinfo(token_dtype(size)).max >= size - 1


def test_texts_are_not_images() -> None:
    source = source_of(cut_off(*arrays([([1, 2], 0)]), 3)[0])
    assert source.repeated(3) is source
    assert source.in_format(torch.channels_last) is source
    with pytest.raises(TypeError, match="no pixels"):
        source.pixels(torch.zeros(1, 1))
    with pytest.raises(ValueError, match="augmentation"):
        source.take(torch.tensor([0]), [{"mirrored": torch.tensor([True])}])
    with pytest.raises(ValueError, match="need a generator"):
        next(source.batches(torch.tensor([0]), batch_size=1, shuffle=True))


def test_tokens_that_are_on_a_device_are_read_the_same() -> None:
    tokens = np.arange(300, dtype=np.uint16)
    places = torch.tensor([[0, 299, 7], [1, 1, 2]])
    store = TokenStore(tokens, CPU, resident=True)
    expected = store.read(places)
    assert torch.equal(expected, places)
    store._tokens = torch.from_numpy(tokens.astype(np.int32))  # pyright: ignore[reportPrivateUsage]  as on a GPU
    assert torch.equal(store.read(places), expected)
    assert store.read(places).dtype == torch.int64
