"""Passes of a part that are recorded once and then replayed, so that a GPU need not be asked for each kernel.

What is replayed are the same kernels on the same memory: results are those of the part itself. A call that cannot be
replayed is computed as ever, and so is a part that cannot be recorded. What decides is what the part and the call do:

- A second forward pass before the first one's backward pass takes a second recording, or none.
- A gradient that is itself differentiated, and a backward pass whose forward pass was written over, are computed anew.
- Other shapes, types, precisions, or parameters that learn make another recording, of which there are not many.
- Evaluation, hooks, parameters or buffers put in the place of the part's, random numbers: no recording.
- Copies of a part have none.
"""

from __future__ import annotations

import logging
import types
import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from cutlayer.runtime.ground.config import ConfigError
from cutlayer.runtime.parties.recording import STREAMS, RecordingStream, explained, generators
from cutlayer.runtime.parties.steps import RecordedStep, StepState

log = logging.getLogger(__name__)
_C: Any = torch._C  # pyright: ignore[reportPrivateUsage]
_is_wrapped: Callable[[Tensor], bool] = _C._functorch.is_functorch_wrapped_tensor

_Run = Callable[[Tensor], Tensor]
WARM_UP = 3  # passes before a recording: libraries choose their kernels and take their memory then
_AFTER = 2  # calls of a kind that are computed as ever before one is recorded
_ATTEMPTS = 2  # at a recording of a part
_KINDS, _AT_ONCE, _IN_ALL = 4, 2, 16  # recordings: kinds of a part, of a kind at once, of all parts


class Passes:
    """A forward pass of a part and its backward pass, recorded; what they give is written over by the next ones.

    Args:
        stream: that they are recorded on, and nothing else, as feature maps wait for the backward pass.
        run: the forward pass. x: an input of the kind. parameters: which gradients go to, as far as they learn.

    Attributes:
        row: the gradients of the latest backward pass, as `joined_gradients`.
    """

    def __init__(self, stream: RecordingStream, run: _Run, x: Tensor, parameters: Sequence[Tensor]) -> None:
        self._x = x.detach().clone().requires_grad_(x.requires_grad)

        def warm_up() -> Tensor:
            output = run(self._x)
            gradient = torch.zeros_like(output)
            joined_gradients(output, self._x, parameters, gradient)
            return gradient

        for _ in range(WARM_UP):
            self._gradient = stream.run(warm_up)
        self._forward, output = stream.record(lambda: run(self._x), large=True)
        self._backward, (self._own, self.row) = stream.record(
            lambda: joined_gradients(output, self._x, parameters, self._gradient)
        )
        self._output = output.detach()

    def forward(self, x: Tensor) -> Tensor:
        """The output."""
        self._x.copy_(x)
        self._forward()
        return self._output

    def backward(self, gradient: Tensor) -> tuple[Tensor | None, Tensor]:
        """The gradients of the latest input, if it needs one, and of all parameters that learn, as `joined_gradients`.

        Called once at most after each forward pass.
        """
        self._gradient.copy_(gradient)
        self._backward()
        return self._own, self.row


def joined_gradients(
    output: Tensor, x: Tensor, parameters: Sequence[Tensor], gradient: Tensor
) -> tuple[Tensor | None, Tensor]:
    """The gradients of an input, None where it needs none, and of the parameters that learn, in one row.

    Raises:
        RuntimeError: the output does not depend on one of them, which would then have no gradient at all.
    """
    learning = [parameter for parameter in parameters if parameter.requires_grad]
    inputs = [x, *learning] if x.requires_grad else learning
    with torch.autocast(x.device.type, enabled=False):
        found = list(torch.autograd.grad(output, inputs, gradient))
    own = found.pop(0) if x.requires_grad else None
    rows = [_row(grad, like) for grad, like in zip(found, learning, strict=True)]
    return own, torch.cat(rows) if rows else x.new_empty(0)


def _row(gradient: Tensor, like: Tensor) -> Tensor:
    """The values in the order in which those of the parameter lie in memory."""
    if gradient.stride() != like.stride():
        gradient = torch.empty_like(like).copy_(gradient)
    return gradient.as_strided((like.numel(),), (1,))


def _is_dense(tensor: Tensor) -> bool:
    steps = (stride * (size - 1) for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.numel() == 1 + sum(steps)


def is_recordable(parameters: Sequence[Tensor]) -> bool:
    """Whether the gradients of these parameters can be one row."""
    return bool(parameters) and len({each.dtype for each in parameters}) == 1 and all(map(_is_dense, parameters))


class PassRecorder:
    """Lets parts replay their passes, and optimizers their steps.

    Args:
        make_stream: that one recording after another is made on, on a device.

    Attributes:
        waits: parts compute by themselves for now, as inside of work that is recorded with them.
        refused: optimizers whose steps could not be recorded.
    """

    def __init__(self, make_stream: Callable[[torch.device], RecordingStream]) -> None:
        self._make_stream = make_stream
        self._made: weakref.WeakSet[Passes] = weakref.WeakSet()
        self._said: set[str] = set()
        self._steps: RecordingStream | None = None
        self.waits, self.refused = False, set[Hashable]()

    def __reduce__(self) -> Any:
        return PassRecorder, (self._make_stream,)  # recordings are of one process

    @classmethod
    def on(cls, device: torch.device) -> PassRecorder:
        """The recorder of a device.

        Raises:
            ConfigError: it has none.
        """
        if device.type not in STREAMS:
            expected = "false on a processor, as what is recorded are a GPU's kernels"
            raise ConfigError("compile", True, expected)
        return cls(STREAMS[device.type])

    def attach(self, part: nn.Module) -> None:
        """Let a part that is fresh replay its passes, where it can be recorded."""
        if not isinstance(part.forward, ReplayedForward) and is_recordable([*part.parameters()]):
            part.forward = ReplayedForward(part, self)

    def say(self, text: str) -> None:
        """Warn of something, once."""
        if text not in self._said:
            self._said.add(text)
            log.warning(text)

    def record(self, run: _Run, x: Tensor, parameters: Sequence[Tensor]) -> Passes | None:
        """The passes; None where there are enough of them."""
        if len(self._made) >= _IN_ALL:
            return None
        passes = Passes(self._make_stream(x.device), run, x, parameters)
        self._made.add(passes)
        return passes

    def stream_of_steps(self, device: torch.device) -> RecordingStream:
        """The one that all steps are recorded on."""
        if self._steps is None:
            self._steps = self._make_stream(device)
        return self._steps


class Turn:
    """A forward pass whose backward pass may come, as long as anyone holds it.

    Attributes:
        only_row: the parameters' gradients are left in the row of the passes, and nobody else is given them.
    """

    __slots__ = ("__weakref__", "only_row")

    def __init__(self) -> None:
        self.only_row = False


class HeldPasses:
    """Passes and whose turn it is with them.

    Attributes:
        learning: of each parameter, whether it learns in these passes. steps: that go along their gradients.
    """

    def __init__(self, passes: Passes, learning: tuple[bool, ...]) -> None:
        self.passes, self.learning = passes, learning
        self.steps: list[RecordedStep] = []
        self._turn: weakref.ref[Turn] | None = None

    @property
    def busy(self) -> bool:
        """Whether the backward pass of the latest forward pass may still come."""
        return self._turn is not None and self._turn() is not None

    def begin(self) -> Turn:
        turn = Turn()
        self._turn = weakref.ref(turn)
        return turn

    def holds(self, turn: Turn) -> bool:
        """Whether what a turn's backward pass needs is still there."""
        return self._turn is not None and self._turn() is turn

    def end(self) -> None:
        self._turn = None


class ReplayedForward:
    """The forward pass of a part: replayed where that gives the same, else the part's own.

    Args:
        recorder: of all parts of a run.
    """

    def __init__(self, part: nn.Module, recorder: PassRecorder) -> None:
        self._part, self._recorder = part, recorder
        self._own = type(part).forward
        self.parameters = [*part.parameters()]
        self._addresses = [parameter.data_ptr() for parameter in self.parameters]
        self._layout = [(parameter.numel(), parameter.shape, parameter.stride()) for parameter in self.parameters]
        self._modules = modules = [*part.modules()]
        places = _dicts(modules, "_parameters", "_buffers")
        self._bound = [(place, name, tensor) for place in places for name, tensor in place.items()]
        self._hooks = _dicts(modules, *(f"_{when}_hooks" for when in ("forward", "forward_pre", "backward")))
        self._hooks += _dicts(modules, "_backward_pre_hooks")
        self._seen: dict[Hashable, int] = {}
        self._recordings: dict[Hashable, list[HeldPasses]] = {}
        self.states: list[StepState] = []
        self._given_up, self._failed = False, 0

    def __deepcopy__(self, memo: Mapping[int, Any]) -> Any:
        """A copy of the part computes by itself."""
        return types.MethodType(self._own, memo[id(self._part)])

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        found = self.replay(inputs[0], self.parameters) if len(inputs) == 1 and not named else None
        return self._own(self._part, *inputs, **named) if found is None else found

    def replay(self, x: Any, parameters: Sequence[Tensor]) -> Tensor | None:
        """The replayed output for an input; None where it has to be computed.

        Args:
            parameters: which gradients go to: the part's, or others in the same memory.
        """
        recording = self._free(x) if self._is_plain(x) else None
        return None if recording is None else cast(Tensor, ReplayedPass.apply(self, recording, x, *parameters))

    def _is_plain(self, x: object) -> bool:
        """Whether a call is one of training, of the part as it is, with nobody looking on."""
        return (
            type(x) is Tensor
            and not (self._given_up or self._recorder.waits)
            and torch.is_grad_enabled()
            and self._part.training
            and all(place.get(name) is tensor for place, name, tensor in self._bound)
            and not any(self._hooks)
            and self.in_place
            # Casts of weights that are kept would be those of the moment of recording.
            and not (torch.is_autocast_enabled(x.device.type) and torch.is_autocast_cache_enabled())
            and not _is_wrapped(x)
        )

    @property
    def in_place(self) -> bool:
        """Whether the parameters are in the memory that they were in."""
        return [parameter.data_ptr() for parameter in self.parameters] == self._addresses

    def _free(self, x: Tensor) -> HeldPasses | None:
        """A recording of such a call that is not in use."""
        learning = tuple(parameter.requires_grad for parameter in self.parameters)
        if not (x.requires_grad or any(learning)):
            return None
        modes = tuple(module.training for module in self._modules)
        kind = (x.shape, x.stride(), x.dtype, x.requires_grad, learning, modes, _autocast(x))
        recordings = self._recordings.get(kind)
        if recordings is None:
            self._seen[kind] = self._seen.get(kind, 0) + 1
            if self._seen[kind] <= _AFTER or len(self._recordings) == _KINDS:
                return None
            recordings = self._recordings[kind] = []
        for recording in recordings:
            if not recording.busy:
                return recording
        if len(recordings) < _AT_ONCE:
            passes = self._recorded(x)
            if passes is not None:
                recordings.append(HeldPasses(passes, learning))
                return recordings[-1]
        return None

    def _recorded(self, x: Tensor) -> Passes | None:
        """A new recording of such a call, which leaves no trace; None where there can be none."""
        buffers = [(buffer, buffer.clone()) for buffer in self._part.buffers()]
        drawing = generators(x.device)
        states = [generator.get_state() for generator in drawing]
        try:
            passes = self._recorder.record(lambda x: self._own(self._part, x), x, self.parameters)
            drew = any(not torch.equal(g.get_state(), s) for g, s in zip(drawing, states, strict=True))
            reason = "draws random numbers" if drew else None
        except Exception as error:  # of whatever is in the part: then it computes as ever
            passes, reason = None, f"cannot be recorded ({explained(error)})"
            self._failed += 1
        for buffer, before in buffers:
            buffer.data.copy_(before)  # `data`, as another pass may wait for its backward pass and has noted no change
        for generator, state in zip(drawing, states, strict=True):
            generator.set_state(state)
        if reason is not None:
            # Once more, as what a library does when it is first used may be what cannot be recorded.
            self._given_up = passes is not None or self._failed == _ATTEMPTS
            if self._given_up:
                self._recorder.say(f"compile: a part {reason}, and computes without graphs")
            return None
        return passes

    def gradients(self, joined: Tensor, learning: Sequence[bool]) -> list[Tensor | None]:
        """The parameters' gradients, views of a row; None of those that did not learn."""
        found: list[Tensor | None] = []
        start = 0
        for learns, (size, shape, stride) in zip(learning, self._layout, strict=True):
            found.append(joined.as_strided(shape, stride, start) if learns else None)
            start += size if learns else 0
        return found

    def anew(self, x: Tensor, gradient: Tensor, how: tuple[bool, torch.dtype]) -> list[Any]:
        """The gradients of an input and the parameters, from a forward pass of their own, which moves no statistics."""
        differentiable = torch.is_grad_enabled()
        self._given_up |= differentiable  # this part's gradients are differentiated: the next call is its own
        state = {name: buffer.clone() for name, buffer in self._part.named_buffers()}
        enabled, dtype = how
        with torch.enable_grad():
            with torch.autocast(x.device.type, dtype, enabled=enabled, cache_enabled=False):
                output = functional_call(self._part, state, (x,))
            needed = [each for each in (x, *self.parameters) if each.requires_grad]
            found = iter(torch.autograd.grad(output, needed, gradient, create_graph=differentiable))
        return [next(found) if each.requires_grad else None for each in (x, *self.parameters)]


class ReplayedPass(torch.autograd.Function):
    """A replayed forward pass in a graph of torch's."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensor:
        replayed, recording, x, *parameters = given
        ctx.replayed, ctx.recording, ctx.turn = replayed, recording, recording.begin()
        ctx.how, ctx.versions = _autocast(x), [parameter._version for parameter in parameters]
        ctx.save_for_backward(x)
        return recording.passes.forward(x).clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (gradient,) = gradients
        replayed: ReplayedForward = ctx.replayed
        if any(p._version != v for p, v in zip(replayed.parameters, ctx.versions, strict=True)):
            raise RuntimeError("a parameter was modified by an inplace operation since the forward pass that needs it")
        if torch.is_grad_enabled() or not ctx.recording.holds(ctx.turn):
            (x,) = ctx.saved_tensors
            return None, None, *replayed.anew(x, gradient, ctx.how)
        own, joined = ctx.recording.passes.backward(gradient)
        ctx.recording.end()
        learning = ctx.recording.learning
        of_parameters = [None] * len(learning) if ctx.turn.only_row else replayed.gradients(joined.clone(), learning)
        return None, None, None if own is None else own.clone(), *of_parameters


def _dicts(modules: Sequence[nn.Module], *names: str) -> list[dict[str, Any]]:
    """What torch keeps of modules under these names, to be looked at in each call without the time of an attribute."""
    return [getattr(module, name) for module in modules for name in names]


def _autocast(x: Tensor) -> tuple[bool, torch.dtype]:
    return torch.is_autocast_enabled(x.device.type), torch.get_autocast_dtype(x.device.type)
