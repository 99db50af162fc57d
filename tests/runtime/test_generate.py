"""Text from finished runs: what plain transformers and PEFT say, learnt texts word for word, files, mistakes."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from cutlayer import algorithms
from cutlayer import generate as command
from cutlayer.algorithms.mixins import TrainsAdapters
from cutlayer.runtime.after import generate as made
from cutlayer.runtime.after.generate import assemble, check_generation, earlier_generation, generated_folder
from cutlayer.runtime.after.prompts import text_line
from cutlayer.runtime.experiment import run
from cutlayer.runtime.ground.config import ConfigError
from cutlayer.runtime.ground.files import ADAPTERS, SUMMARY
from cutlayer.runtime.rounds.federation import Federation
from cutlayer.runtime.run_folder import RunFolder
from cutlayer.runtime.scoring.completing import GenerateConfig
from cutlayer.text_metrics import USUAL, score
from cutlayer.text_metrics.files import read_hypotheses, read_references
from tests.conftest import play
from tests.contract.test_text import settings, takes_text
from tests.places import SHARED

transformers = pytest.importorskip("transformers", reason="the extra huggingface is not installed")
peft = pytest.importorskip("peft", reason="the extra huggingface is not installed")
pytest.importorskip("sacrebleu", reason="the extra text is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")  # of both libraries, which say what they change by themselves

VALID = SHARED / "e2e" / "valid.txt"
TEXTS = {
    "a": ["sixty lazy dogs jump over boxes", "sixty lazy dogs jump over boxes !"],
    "bb": ["my brown fox would quickly hide"],
    "ccc": ["we heard nothing from that town"],
}
END = 256
GPT = ("model=gpt", "model.options={hidden:32,heads:4,depth:2}")
GPT2 = {"n_layer": 3, "n_embd": 16, "n_head": 2, "n_positions": 64}


def save_texts(folder: Path, name: str, texts: dict[str, list[str]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [{"prompt": prompt, "completion": each} for prompt, several in texts.items() for each in several]
    (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))


def finished(configure: Any, path: Path, *overrides: str) -> Path:
    config = configure("progress=none", "threads=1", *overrides)
    with RunFolder.claim(path, config.identity()) as folder:
        run(config, folder)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts to train and to test on, the same; and more texts to test on."""
    root = tmp_path_factory.mktemp("data")
    save_texts(root, "train.jsonl", {prompt: texts[:1] for prompt, texts in TEXTS.items()})
    save_texts(root, "test.jsonl", TEXTS)
    return root


def on(data: Path, *more: str) -> tuple[str, ...]:
    return (
        *(f"dataset.root={data}", "dataset=jsonl", "dataset.options.length=48", "dataset.distribution=iid"),
        *("dataset.min_samples=1", "num_clients=1", "batch_size=4", *more),
    )


@pytest.fixture(scope="module")
def learnt(configure: Any, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that knows its texts by heart."""
    path = tmp_path_factory.mktemp("learnt") / "run"
    return finished(configure, path, *on(data, *GPT, "algorithm=fed_avg", "rounds=1", "local_epochs=150", "lr=0.01"))


def setting(**values: Any) -> GenerateConfig:
    return GenerateConfig(**values).settled("bytes")


def test_texts_that_are_known_by_heart_are_said(learnt: Path, data: Path, capsys: Any) -> None:
    assert command.main([str(learnt), f"dataset.root={data}", "progress=auto"]) == 0
    folder = generated_folder(learnt, setting())
    hypotheses, references = (read(folder / name) for read, name in READERS)
    assert hypotheses == [texts[0] for texts in TEXTS.values()]
    assert references == [*TEXTS.values()]
    found = earlier_generation(learnt, setting())
    assert found is not None
    assert found.metrics == score(USUAL, hypotheses, references)
    assert [found.metrics[name] for name in ("bleu", "rouge_l", "cider")] == pytest.approx([1, 1, 10])
    assert (found.prompts, found.references, found.cut_references, found.unfinished) == (3, 4, 0, 0)
    assert found.mean_tokens == sum(map(len, hypotheses)) / 3
    assert score(["bleu"], hypotheses, references[1:] + references[:1])["bleu"] < 0.05
    shown = capsys.readouterr().out
    assert all(f"{value:.4f}" in shown for value in found.metrics.values())


READERS = ((read_hypotheses, "outputs.txt"), (read_references, "references.txt"))


def test_the_same_again_has_the_same_bits_and_changes_nothing_else(learnt: Path, data: Path) -> None:
    arguments = [str(learnt), f"dataset.root={data}", "generate.beams=3", "generate.tokens=12", "progress=none"]
    before = contents(learnt)
    assert command.main(arguments) == 0
    first = contents(learnt)
    assert {name: first[name] for name in before} == before
    assert {Path(name).name for name in first.keys() - before.keys()} == {"outputs.txt", "references.txt", SUMMARY}
    assert command.main(arguments) == 0
    assert contents(learnt) == first
    assert command.main([*arguments, "generate.batch_size=1"]) == 0
    assert contents(learnt) == first
    found = earlier_generation(learnt, setting(beams=3, tokens=12))
    assert found is not None
    assert (found.unfinished, found.mean_tokens, found.beams) == (3, 12, 3)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_some_prompts_are_evenly_spaced(learnt: Path, data: Path) -> None:
    assert command.main([str(learnt), f"dataset.root={data}", "generate.prompts=2", "progress=none"]) == 0
    folder = generated_folder(learnt, setting(prompts=2))
    assert read_hypotheses(folder / "outputs.txt") == [TEXTS["a"][0], TEXTS["bb"][0]]
    assert command.main([str(learnt), f"dataset.root={data}", "generate.prompts=1", "progress=none"]) == 0
    folder = generated_folder(learnt, setting(prompts=1))
    assert read_references(folder / "references.txt", 1) == [TEXTS["a"]]


def test_a_text_of_ones_own_is_gone_on_with(learnt: Path, data: Path, capsys: Any) -> None:
    before = contents(learnt)
    assert command.main([str(learnt), f"dataset.root={data}", "generate.prompt=ccc"]) == 0
    assert capsys.readouterr().out == f"fed_avg gpt jsonl-iid:\nccc{TEXTS['ccc'][0]}\n"
    assert contents(learnt) == before


# ---------------------------------------------------------------------- plain transformers


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as transformers writes it, whose texts differ from prompt to prompt."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(7)
    config = transformers.AutoConfig.for_model("gpt2", **GPT2, vocab_size=257, bos_token_id=0, eos_token_id=0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("method", "train"),
    [("fed_avg", "both"), ("sl_single_server", "both"), ("sl_multi_server", "B"), ("sl_u_shape", "both")],
)
@pytest.mark.parametrize("no_repeat", [0, 2])
def test_texts_are_those_of_plain_transformers_with_the_runs_adapters(
    configure: Any, data: Path, base: Path, tmp_path: Path, method: str, train: str, no_repeat: int
) -> None:
    """Token for token; each prompt by itself, as plain PEFT is given it."""
    cut = "[transformer.h.0,transformer.h.1]" if method == "sl_u_shape" else "transformer.h.0"
    named = (f"dataset.root={data}", "model=huggingface/gpt2", f"model.base={base}")
    options = (f"model.cut={cut}", f"model.lora={{r:2,train:{train}}}", "lr=0.3", "rounds=1")
    path = finished(configure, tmp_path / "run", f"algorithm={method}", *on(data), *named, *options)
    keys = (f"generate.no_repeat={no_repeat}", "generate.beams=4", "generate.tokens=20", "generate.batch_size=1")
    assert command.main([str(path), *named, *keys, "generate.metrics=[rouge_l]", "progress=none"]) == 0
    found = read_hypotheses(generated_folder(path, setting(no_repeat=no_repeat, beams=4, tokens=20)) / "outputs.txt")
    plain = transformers.AutoModelForCausalLM.from_pretrained(base)
    untuned = [said(plain, prompt, no_repeat) for prompt in TEXTS]
    plain = peft.PeftModel.from_pretrained(plain, path / ADAPTERS).eval()
    expected = [said(plain, prompt, no_repeat) for prompt in TEXTS]
    assert found == expected
    assert len({*found}) == 3
    assert expected != untuned, "the adapters have learnt"


def said(model: Any, prompt: str, no_repeat: int) -> str:
    """What transformers' own generate gives; of a prompt's embeddings it counts no n-grams of the prompt."""
    tokens = torch.tensor([[*prompt.encode(), END]])
    embedded = model.get_input_embeddings()(tokens).detach()
    options = {"num_beams": 4, "length_penalty": 0.8, "max_new_tokens": 20, "no_repeat_ngram_size": no_repeat}
    options |= {"eos_token_id": END, "pad_token_id": END, "do_sample": False}
    found = model.generate(inputs_embeds=embedded, attention_mask=torch.ones_like(tokens), **options)[0].tolist()
    if not no_repeat:
        assert found == model.generate(tokens, **options)[0, tokens.shape[1] :].tolist()
    return text_line(bytes(token for token in found if token < END).decode(errors="replace"))


# ---------------------------------------------------------------------- the model of a run


@pytest.mark.parametrize("name", [name for name in algorithms.names() if takes_text(name)])
@pytest.mark.parametrize("more", [(), ("model.lora={r:2,targets:[attention,widen,head],train:B}", "precision=fp64")])
def test_a_runs_parts_are_put_together(configure: Any, name: str, more: tuple[str, ...]) -> None:
    if issubclass(algorithms.get(name), TrainsAdapters):
        more = tuple(key.replace("train:B", "train:both") for key in more)
    federation = play(Federation(configure(*settings(name), *more, "rounds=1")))
    x = torch.randint(200, (2, 11), generator=torch.Generator().manual_seed(0))
    if not federation.one_model:
        with pytest.raises(ConfigError, match=f"algorithm.name={name}: expected a method with one model for all"):
            check_generation(federation, GenerateConfig())
        return
    made = assemble(federation, GenerateConfig()).eval()
    parts = federation.setup.blueprint.parts(federation.setup.algorithm.layout.whole)
    for part, state in zip(parts.values(), federation.learnt.client_states(0).values(), strict=True):
        part.load_state_dict(dict(state))
    with torch.no_grad():
        expected = x
        for part in parts.values():
            expected = part.eval()(expected)
        assert torch.equal(made(x), expected)


def test_the_best_weights_are_those_of_the_best_round(configure: Any, data: Path, tmp_path: Path) -> None:
    """With a rate that is far too high later ones are worse."""
    keys = on(data, *GPT, "algorithm=fed_avg", "rounds=6", "local_epochs=20", "lr=0.01", "eval_interval=1")
    spoiled = ("scheduler=step", "scheduler.step_size=4", "scheduler.gamma=100.0")
    path = finished(configure, tmp_path / "run", *keys, *spoiled, "generate.start=best")
    arguments = [str(path), f"dataset.root={data}", "generate.metrics=[rouge_l]", "progress=none"]
    assert command.main([*arguments, "generate.start=best"]) == 0
    assert command.main([*arguments, "generate.start=final"]) == 0
    best, final = (earlier_generation(path, setting(start=start, metrics=("rouge_l",))) for start in ("best", "final"))
    assert best is not None
    assert final is not None
    assert best.round < final.round == 6
    assert best.metrics["rouge_l"] > final.metrics["rouge_l"] + 0.1


def test_a_run_may_end_with_it(configure: Any, data: Path, tmp_path: Path, caplog: Any) -> None:
    caplog.set_level("INFO")
    keys = on(data, *GPT, "algorithm=sl_multi_server", "rounds=2", "lr=0.01", "progress=lines")
    path = finished(configure, tmp_path / "run", *keys, "generate.after=true", "generate.beams=3")
    first = contents(generated_folder(path, setting(beams=3)))
    found = earlier_generation(path, setting(beams=3))
    assert found is not None
    assert found.round == 2
    (row,) = [line for line in caplog.text.splitlines() if " rouge_l " in line]
    assert f"{found.metrics['rouge_l']:.4f}" in row
    (generated_folder(path, setting(beams=3)) / SUMMARY).unlink()
    assert earlier_generation(path, setting(beams=3)) is None
    assert command.main([str(path), f"dataset.root={data}"]) == 0
    assert contents(generated_folder(path, setting(beams=3))) == first


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        (("algorithm=fed_avg", "generate.after=true"), "a run on text; that of digits is classification"),
        ((*settings("local_only"), "generate.after=true"), "a method with one model for all clients"),
        ((*settings("fed_avg"), "generate.after=true"), "as those of shakespeare have no prompts"),
    ],
)
def test_what_cannot_be_generated_is_said_before_training(
    configure: Any, tmp_path: Path, keys: tuple[str, ...], line: str
) -> None:
    with pytest.raises(ConfigError, match=line):
        finished(configure, tmp_path / "run", *keys, "rounds=10000")


@pytest.mark.skipif(not VALID.is_file(), reason="the published data are not on every machine")
def test_on_e2e_there_is_a_text_for_each_meaning(configure: Any, tmp_path: Path) -> None:
    options = "dataset.options={train:valid,test:null,length:400,test_fraction:0.05}"
    model = ("model=gpt", "model.options={hidden:8,heads:2,depth:2}", "dataset.fraction=0.01", "num_clients=2")
    root = f"dataset.root={VALID.parents[1]}"
    path = finished(configure, tmp_path / "run", "algorithm=sl_single_server", "dataset=e2e", root, options, *model)
    keys = ("generate.prompts=7", "generate.beams=2", "generate.tokens=5")
    assert command.main([str(path), root, *keys, "progress=none"]) == 0
    folder = generated_folder(path, setting(prompts=7, beams=2, tokens=5))
    meanings: dict[str, list[str]] = {}
    for line in VALID.read_text(encoding="utf-8").splitlines():
        meaning, _, sentence = line.partition("||")
        meanings.setdefault(meaning, []).append(text_line(sentence))
    references = read_references(folder / "references.txt")
    assert len(references) == len(read_hypotheses(folder / "outputs.txt")) == 7
    assert all(group in meanings.values() for group in references)


# ---------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["generate.beams=2"], "name the folder of a run"),
        (["RUN", "generate.beams=0"], "generate.beams=0: expected an integer >= 1"),
        (["RUN", "generate.beam=2"], "did you mean generate.beams"),
        (["RUN", "generate.metrics=[blue]"], "generate.metrics=blue: expected a registered text metric; did you mean"),
        (["RUN", "generate.start=first"], "generate.start=first: expected one of the choices"),
        (["RUN", "generate.after=true"], "key=generate.after: expected one that may be set for a run that is over"),
        (["RUN", "generate.start=best"], "generate.start=best: expected final, as this run was begun without"),
        (["RUN", "probe.k=3"], "key=probe.k: expected one that may be set"),
        (
            ["RUN", "generate.prompt=" + 48 * "x"],
            "than the model has positions, 48; there is a prompt of 49",
        ),
    ],
)
def test_mistakes_are_reported_in_one_line(
    configure: Any, learnt: Path, data: Path, capsys: Any, arguments: list[str], line: str
) -> None:
    before = contents(learnt)
    root = f"dataset.root={data}"
    assert command.main([str(learnt) if text == "RUN" else text for text in [*arguments, root]]) == 1
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert line in error
    assert contents(learnt) == before


def test_a_run_on_images_and_texts_without_prompts_are_refused(configure: Any, tmp_path: Path, capsys: Any) -> None:
    path = finished(configure, tmp_path / "digits", "algorithm=fed_avg", "rounds=1")
    assert command.main([str(path)]) == 1
    assert "dataset.name: a run on text; that of digits is classification" in capsys.readouterr().err
    path = finished(configure, tmp_path / "play", *settings("fed_avg"), "rounds=1")
    assert command.main([str(path)]) == 1
    error = capsys.readouterr().err
    assert "generate.prompt=null: expected the beginning of a text, as those of shakespeare have no prompts" in error
    assert len(error.splitlines()) == 1
    assert command.main([str(path), "generate.prompt=To be, or", "generate.tokens=3", "generate.beams=2"]) == 0
    assert capsys.readouterr().out.split(":\n")[1].startswith("To be, or")


def test_a_metric_without_its_package_is_said_before_text_is_generated(
    learnt: Path, data: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None)
    monkeypatch.setattr(made, "completions", None)
    before = contents(learnt)
    assert command.main([str(learnt), f"dataset.root={data}", "generate.beams=9"]) == 1
    assert "metrics: BLEU and NIST need sacrebleu: pip install" in capsys.readouterr().err
    assert contents(learnt) == before


def test_what_fails_leaves_nothing(learnt: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(learnt)

    def full(path: Path, content: str) -> None:
        if path.name == SUMMARY:
            raise OSError(28, "No space left on device")
        path.write_text(content)

    monkeypatch.setattr(made, "replace_file", full)
    with pytest.raises(OSError, match="No space left"):
        command.main([str(learnt), f"dataset.root={data}", "generate.beams=8"])
    assert contents(learnt) == before
    assert not generated_folder(learnt, setting(beams=8)).exists()


@pytest.mark.parametrize(("length", "lost"), [(31, None), (20, "2 of 3 test texts lack the beginning of their prompt")])
def test_texts_that_do_not_fit_are_counted_or_refused(
    configure: Any, tmp_path: Path, capsys: Any, caplog: Any, length: int, lost: str | None
) -> None:
    texts = {20 * "a": ["short", "longer than it may be"], 25 * "b": ["short"]}
    for name in ("train.jsonl", "test.jsonl"):
        save_texts(tmp_path, name, texts if name == "test.jsonl" or length == 31 else {"c": ["d", "e"]})
    keys = on(tmp_path, *GPT, "algorithm=fed_avg", "rounds=1", f"dataset.options.length={length}")
    path = finished(configure, tmp_path / "run", *keys)
    status = command.main([str(path), f"dataset.root={tmp_path}", "generate.beams=2", "progress=none"])
    assert status == (0 if lost is None else 1)
    if lost is not None:
        error = f"dataset.options.length={length}: expected a length that prompts fit in; "
        assert error + "3 of 3 test texts lack the beginning of their prompt" in capsys.readouterr().err
        return
    found = earlier_generation(path, setting(beams=2))
    assert found is not None
    assert (found.prompts, found.references, found.cut_references) == (2, 3, 1)
    assert "1 references lack their end" in caplog.text
