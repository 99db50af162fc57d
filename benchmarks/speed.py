"""How fast a device is used: rounds against a bare loop, images a second against its measured matmul peak.

What `python -m benchmarks.gpu speed` measures, one part after the other until its time is over. The bare loop is
that of `benchmarks.round_time`, in one process with the platform, alternating; it computes in the same precision,
without `memory_format` and `compile`, so that below 1 the platform is faster than a plain loop. What fails is one line.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import timed
from benchmarks.round_time import Race
from cutlayer.datasets import Dataset
from cutlayer.runtime.ground.process import Arithmetic, prepare_process
from cutlayer.runtime.launching.hydra_support import load_config
from cutlayer.runtime.parties.blueprint import MEMORY_FORMATS
from cutlayer.runtime.parties.optim import make_optimizer
from cutlayer.runtime.parties.recording import STREAMS
from cutlayer.runtime.parties.steps import recordable
from cutlayer.runtime.rounds.federation import Federation
from cutlayer.runtime.rounds.setup import Setup, load_data

PAPER = ("fed_avg", "sl_single_server", "sl_multi_server", "cse_fsl", "fsl_sage")
PRECISIONS = ("fp32", "tf32", "bf16")
FAST = ("memory_format=channels_last", "compile=true")
Show = Callable[[str], None]


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Attributes:
        matmul: side of the matrices of the peak. model, steps, batch: of the two clients of the large network.
        clients: of the small network. stem: what makes the model one for small images, in MocoSFL.
        moco: clients of MocoSFL. images: training images of the paper's setting, of which a fifth is tested.
        repeats: measured rounds. rounds: of the paper's methods.
    """

    matmul: int = 8192
    steps: int = 20
    batch: int = 256
    clients: int = 50
    moco: int = 1000
    images: int = 50_000
    repeats: int = 7
    rounds: int = 20
    align_epochs: int = 100
    model: str = "resnet18"
    stem: tuple[str, ...] = ("model.options.stem=small",)


QUICK_SECONDS = 150.0
QUICK = Sizes(steps=10, repeats=3, rounds=3)
TINY = Sizes(
    64, steps=2, batch=4, clients=2, moco=3, images=40, repeats=1, rounds=2, align_epochs=2, model="resnet20", stem=()
)


class Stopwatch:
    """Parts of a measurement that end when the time is over.

    Args:
        seconds: in all.
    """

    def __init__(self, seconds: float, show: Show) -> None:
        self._end, self._show = time.monotonic() + seconds, show
        self.failed = 0

    def part(self, title: str, measure: Callable[[], str]) -> None:
        """Measure something and show it at once; what goes wrong is one line."""
        if time.monotonic() > self._end:
            self._show(f"{title}: no time left")
            return
        begun = time.monotonic()
        try:
            found = measure()
        except Exception as error:  # the others are measured all the same
            self.failed += 1
            found = f"FAILED, {type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
        self._show(f"{title}: {found}  [{time.monotonic() - begun:.0f} s]")
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def keys_of_machine(options: argparse.Namespace, precision: str) -> list[str]:
    """The keys of a run on the device, without a test in its rounds."""
    machine = (f"device={options.device}", f"precision={precision}", "rounds=1000000", "eval_interval=1000000")
    return [*machine, "progress=none", *options.set]


def images(train: int, test: int = 10) -> list[str]:
    """Synthetic images of CIFAR's shape."""
    sizes = {"n_train": train, "n_test": test, "channels": 3, "height": 32, "width": 32}
    return ["dataset=synthetic", *(f"dataset.options.{key}={value}" for key, value in sizes.items())]


def arrange(options: argparse.Namespace, precision: str, more: Sequence[str] = ()) -> torch.device:
    """Let the process compute in a precision, by any kernels where the keys say so."""
    device = torch.device(options.device)
    prepare_process(device, Arithmetic("deterministic=false" not in more, precision == "tf32"))
    return device


def matmul_peak(options: argparse.Namespace, sizes: Sizes, precision: str) -> float:
    """Operations a second of a square matrix product."""
    device, side = arrange(options, precision), sizes.matmul
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    torch.matmul(a, b)
    count = 10
    seconds = [timed(device, lambda: [a @ b for _ in range(count)])[0].wall / count for _ in range(3)]
    return 2 * side**3 / min(seconds)


def step_operations(federation: Federation, batch: int) -> int:
    """Floating-point operations of a training step of the whole model."""
    setup = federation.setup
    (model,) = setup.blueprint.parts(["model"]).values()
    x = torch.zeros(batch, *setup.dataset.info.shape, dtype=setup.blueprint.dtype, device=setup.device)
    y = torch.zeros(batch, dtype=torch.int64, device=setup.device)
    with FlopCounterMode(display=False) as counter:
        F.cross_entropy(model(x), y).backward()
    return counter.get_total_flops()


def race(keys: Sequence[str], plain: Sequence[str], repeats: int) -> tuple[float, float, float]:
    """Seconds of a round of the platform, and of the bare loop, medians; and how far their weights are apart."""
    config = load_config([*keys])
    data = load_data(config)
    platform, bare = Federation(config, dataset=data), Federation(load_config([*plain]), dataset=data)
    both = Race(platform, bare=bare)
    for _ in range(2):  # recordings are made in the first two
        both.round(platform_first=True)
    rounds = [both.round(platform_first=index % 2 == 0) for index in range(repeats)]
    ours = statistics.median(ours.wall for ours, _, _ in rounds)
    theirs = statistics.median(theirs.wall for _, theirs, _ in rounds)
    return ours, theirs, max(apart for _, _, apart in rounds)


def resnet(options: argparse.Namespace, sizes: Sizes, precision: str, more: Sequence[str], peak: float) -> str:
    """FedAvg with ResNet-18: the platform over the bare loop, images a second, share of the peak."""
    arrange(options, precision, more)
    clients, each = 2, sizes.steps * sizes.batch
    setting = ["algorithm=fed_avg", f"model={sizes.model}", f"num_clients={clients}", f"batch_size={sizes.batch}"]
    setting += [*images(clients * each), "dataset.augment=crop_flip", "optimizer=sgd", "optimizer.momentum=0.9"]
    plain = [*setting, *keys_of_machine(options, precision)]
    ours, theirs, apart = race([*plain, *more], plain, sizes.repeats)
    operations = step_operations(Federation(load_config(plain)), sizes.batch)
    steps = clients * sizes.steps
    rate, share = steps * sizes.batch / ours, steps * operations / ours / peak
    return (
        f"{1e3 * ours / steps:.2f} ms a step, bare {1e3 * theirs / steps:.2f}, ratio {ours / theirs:.2f}, "
        f"{rate:,.0f} images/s, {share:.0%} of the peak, weights apart {apart:.0e}"
    )


def whole_step(options: argparse.Namespace, sizes: Sizes, precision: str, more: Sequence[str]) -> str:
    """A whole step of a bare loop as one graph, the images at hand: what no round can fall below."""
    device = arrange(options, precision, more)
    if device.type not in STREAMS:
        return "no graphs on this device"
    keys = ["algorithm=fed_avg", f"model={sizes.model}", *images(20), "optimizer=sgd", "optimizer.momentum=0.9"]
    setup = Setup(load_config([*keys, *keys_of_machine(options, precision), *more]))
    (model,) = setup.blueprint.parts(["model"]).values()
    optimizer = make_optimizer(setup.config.optimizer_for("model"), model.parameters())
    x = torch.zeros(sizes.batch, *setup.dataset.info.shape, device=device)
    x = x.contiguous(memory_format=MEMORY_FORMATS[setup.config.memory_format])
    y = torch.zeros(sizes.batch, dtype=torch.int64, device=device)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with setup.blueprint.autocast():
            loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()

    stream = STREAMS[device.type](device)
    for _ in range(3):
        stream.run(step)
    with recordable([optimizer]):
        replay, _ = stream.record(step, large=True)
    seconds = [timed(device, lambda: [replay() for _ in range(sizes.steps)])[0].wall for _ in range(sizes.repeats)]
    return f"{1e3 * statistics.median(seconds) / sizes.steps:.2f} ms a step"


def small(options: argparse.Namespace, sizes: Sizes, more: Sequence[str]) -> str:
    """FedAvg with the network of two convolutions and many clients of 50 images, batch 10."""
    arrange(options, "fp32", more)
    setting = ["algorithm=fed_avg", "model=cnn2", f"num_clients={sizes.clients}", "batch_size=10", "optimizer=sgd"]
    plain = [*setting, *images(50 * sizes.clients), *keys_of_machine(options, "fp32")]
    ours, theirs, apart = race([*plain, *more], plain, sizes.repeats)
    ratio = f"ratio {ours / theirs:.2f}, {theirs / ours:.1f} times its speed, weights apart {apart:.0e}"
    return f"{1e3 * ours:.1f} ms a round, bare {1e3 * theirs:.1f}, {ratio}"


def alignment(options: argparse.Namespace, sizes: Sizes, more: Sequence[str]) -> str:
    """FSL-SAGE's alignment: what a client's takes, by rounds with and without its passes over the buffer."""
    arrange(options, "fp32", more)
    setting = ["algorithm=fsl_sage", f"model={sizes.model}", "num_clients=2", f"batch_size={sizes.batch}", *more]
    setting += [*images(2 * 5 * sizes.batch), *keys_of_machine(options, "fp32"), "algorithm.align_interval=1"]
    seconds: list[float] = []
    for epochs in (sizes.align_epochs, 1):
        run = Federation(load_config([*setting, f"algorithm.align_epochs={epochs}"]))
        run.step()
        seconds.append(min(timed(run.setup.device, run.step)[0].wall for _ in range(2)))
    whole = (seconds[0] - seconds[1]) / 2
    return f"{1e3 * whole:.0f} ms a client, {1e3 * whole / (sizes.align_epochs - 1):.2f} ms a pass"


def moco(options: argparse.Namespace, sizes: Sizes) -> str:
    """MocoSFL with a thousand clients of one image a step: what a round of one step takes."""
    arrange(options, "fp32")
    part = ["model.cut=relu", "model.client_norm=group", "model.client.optimizer.keep=round"]
    method = ["algorithm.client_copy=shared", "optimizer=sgd", "batch_size=1"]
    model = [f"model={sizes.model}", *sizes.stem]
    setting = ["algorithm=moco_sfl", *method, *model, *part, f"num_clients={sizes.moco}", "dataset.augment=moco"]
    run = Federation(load_config([*setting, *images(10 * sizes.moco), *keys_of_machine(options, "fp32")]))
    run.step()
    seconds = [timed(run.setup.device, run.step)[0].wall for _ in range(sizes.repeats)]
    return f"{1e3 * statistics.median(seconds):.0f} ms a round of {sizes.moco} clients"


def paper(options: argparse.Namespace, sizes: Sizes, name: str, more: Sequence[str], held: list[Dataset]) -> str:
    """Rounds of a method in the paper's setting, tests included, and what 200 would take.

    Args:
        held: the data, once a method has loaded them.
    """
    keys = ["experiment=fsl_sage/cifar10_iid", f"algorithm={name}", f"model={sizes.model}"]
    keys += [*images(sizes.images, sizes.images // 5), "dataset.augment=crop_flip", "dataset.normalize=imagenet"]
    keys += [f"batch_size={sizes.batch}", f"device={options.device}", "progress=none", *more, *options.set]
    config = load_config(keys)
    prepare_process(torch.device(options.device), config.arithmetic)
    held[:] = held or [load_data(config)]
    run = Federation(config, dataset=held[0])
    cold = timed(run.setup.device, run.step)[0].wall
    run.step()  # recordings are made in the first two
    seconds = [timed(run.setup.device, run.step)[0].wall for _ in range(sizes.rounds)]
    usual, interval = statistics.median(seconds), getattr(config.algorithm, "align_interval", None)
    shown = f"{usual:.3f} s a round, the first {cold:.2f}"
    if interval is None:
        return f"{shown}, {usual * 200 / 60:.1f} min for 200"
    aligned = [each for index, each in enumerate(seconds, 2) if index % interval == 0] or [cold]
    extra = (statistics.mean(aligned) - usual) / interval
    return f"{shown}, aligned {statistics.mean(aligned):.2f}, {(usual + extra) * 200 / 60:.1f} min for 200"


def variants(quick: bool) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Ways to compute, by name."""
    yield "eager", ()
    if not quick:
        yield "channels_last", FAST[:1]
    yield "compile", FAST[1:]
    yield "compile, channels_last", FAST
    if not quick:
        yield "the same, any kernels", (*FAST, "deterministic=false")


def speed(options: argparse.Namespace, show: Show, sizes: Sizes | None = None) -> int:
    """Measure everything; the number of parts that failed."""
    sizes = sizes or (QUICK if options.quick else Sizes())
    watch = Stopwatch(min(options.seconds, QUICK_SECONDS) if options.quick else options.seconds, show)
    peaks, held = dict[str, float](), list[Dataset]()

    def peak(precision: str) -> str:
        peaks[precision] = matmul_peak(options, sizes, precision)
        return f"{peaks[precision] / 1e12:.2f} TFLOP/s"

    for precision in PRECISIONS:
        watch.part(f"matmul of {sizes.matmul}, {precision}", lambda p=precision: peak(p))
    for way, more in variants(options.quick):
        watch.part(f"two convolutions, {sizes.clients} clients, {way}", lambda m=more: small(options, sizes, m))
    together = (f"cohort.together={sizes.clients}",)
    for way, more in (("together", ()), ("together, compile", FAST[1:])):
        watch.part(
            f"two convolutions, {sizes.clients} clients, {way}", lambda m=more: small(options, sizes, together + m)
        )
    for precision in reversed(PRECISIONS):
        for way, more in variants(options.quick):
            title, of = f"{sizes.model}, batch {sizes.batch}, {precision}, {way}", peaks.get(precision, float("nan"))
            watch.part(title, lambda p=precision, m=more, of=of: resnet(options, sizes, p, m, of))
        title = f"{sizes.model}, batch {sizes.batch}, {precision}, a bare step as one graph, channels_last"
        watch.part(title, lambda p=precision: whole_step(options, sizes, p, FAST[:1]))
    for way, more in (("eager", ()), ("compile", FAST[1:])):
        watch.part(f"FSL-SAGE's alignment, {way}", lambda m=more: alignment(options, sizes, m))
    watch.part("MocoSFL", lambda: moco(options, sizes))
    for precision in ("bf16",) if options.quick else ("bf16", "tf32"):
        for name in PAPER:
            keys = (f"precision={precision}", *FAST)
            title = f"the paper's setting, {' '.join(keys)}, {name}"
            watch.part(title, lambda n=name, k=keys: paper(options, sizes, n, k, held))
    return watch.failed
