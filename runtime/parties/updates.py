"""Steps of a party's optimizer that are replayed, with the backward passes that lead to them (``compile``).

Autograd finds the way from a loss to the parts as ever; the gradients of a part whose passes are recorded stay in the
memory of the recording, and the optimizer's step is recorded on that memory: so a step asks a GPU for two graphs of a
part, and not for each parameter's gradient and step. What is not certain to give the same is computed as ever:

- gradients that come to a parameter by more than one way, or add to what it holds;
- parameters with hooks, optimizers of several parts at once, of other parts than those passed through;
- an optimizer's first steps, and the first ones after its rate, or another option, has changed;
- one that keeps numbers, reads values, or makes what it keeps anew: nothing of it is recorded, which is said once.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import increment_version

from cutlayer.runtime.parties.graphs import HeldPasses, PassRecorder, ReplayedForward, ReplayedPass
from cutlayer.runtime.parties.recording import explained, generators
from cutlayer.runtime.parties.steps import (
    RecordedStep,
    StateInPlace,
    StepState,
    kept_by,
    options_of,
    parameters_of,
    recordable,
)

Closure = Callable[[], object]
_Optimizers = Sequence[torch.optim.Optimizer]
_NODES = 100  # of a graph of autograd's, beside recorded passes, that are looked at
_STEPS = 4  # recordings of steps along the gradients of the same passes
_AFTER = 2  # calls of a closure before it is recorded


class ReplayedSteps:
    """The steps of optimizers, one of each part, that are stepped together.

    Args:
        recorder: of the run's parts.
    """

    def __init__(self, recorder: PassRecorder, optimizers: _Optimizers) -> None:
        self._recorder, self._optimizers = recorder, optimizers
        self._before: list[Any] = [None] * len(optimizers)
        self._due: list[tuple[int, Any]] = []
        self._closures: dict[Closure, int | _RecordedClosure] = {}
        self._given_up = any(_way(optimizer) in recorder.refused for optimizer in optimizers)

    def update(self, outputs: Sequence[Tensor], along: Sequence[Tensor | None]) -> bool:
        """A step down outputs, whose parameters hold no gradients; False where nothing has been done.

        Args:
            along: a gradient for each output, or None for a loss.
        """
        self._due = []
        found = None if self._given_up else _reached(outputs)
        pairs = None if found is None else self._pairs(*found)
        if found is None or pairs is None:
            return False
        steps = [self._step(number, node) for number, node in enumerate(pairs)]
        if any(step is None for step in steps):
            return False
        for node in found[0]:
            node.turn.only_row = True
        learning = [_learning(node) for node in pairs]
        torch.autograd.backward([*outputs], [*along], inputs=[*(each[0] for each in learning), *found[1]])
        for node, step, learnt in zip(pairs, steps, learning, strict=True):
            replayed: ReplayedForward = node.replayed
            gradients = replayed.gradients(node.recording.passes.row.clone(), node.recording.learning)
            for parameter, gradient in zip(replayed.parameters, gradients, strict=True):
                parameter.grad = gradient
            assert step is not None
            step.replay()
            increment_version(learnt)
        return True

    def _pairs(self, nodes: Sequence[Any], leaves: Sequence[Tensor]) -> list[Any] | None:
        """For each optimizer the passes that lead to its parameters, and to no other's; None where that is not so.

        A gradient may go to another place too, such as smashed data that came from elsewhere.
        """
        parameters = [parameters_of(optimizer) for optimizer in self._optimizers]
        found: list[Any] = []
        for own in parameters:
            node = next((node for node in nodes if _same(node.replayed.parameters, own)), None)
            if node is None or not any(node.recording.learning):
                return None
            found.append(node)
        others = [node for node in nodes if node not in found]
        several = len({id(node.recording) for node in nodes}) < len(nodes) or len({*found}) < len(found)
        if several or any(any(node.recording.learning) for node in others):
            return None
        if not all(node.recording.holds(node.turn) and node.replayed.in_place for node in nodes):
            return None
        known = {id(parameter) for node in nodes for parameter in node.replayed.parameters}
        if any(id(leaf) in known for leaf in leaves) or any(_watched(each) for own in parameters for each in own):
            return None
        return found

    def _step(self, number: int, node: Any) -> RecordedStep | None:
        """The recorded step of an optimizer along the gradients of some passes."""
        optimizer, recording = self._optimizers[number], node.recording
        options = options_of(optimizer)
        for step in recording.steps:
            if step.options == options and step.state.take(optimizer):
                return step
        kept = kept_by(optimizer)
        before, self._before[number] = self._before[number], (options, kept)
        # Its first step may be another one than those that follow: by then it keeps what it keeps.
        if options is not None and kept is not None and before == (options, kept):
            self._due.append((number, node))
        return None

    def settle(self) -> None:
        """Record what was found to be due, once the step has been computed: nobody waits for the parameters then."""
        while self._due and not self._given_up:
            number, node = self._due.pop()
            optimizer, recording = self._optimizers[number], node.recording
            try:
                self._record(optimizer, node.replayed, recording)
            except Exception as error:  # of whatever the optimizer is: then it computes as ever
                self._recorder.refused.add(_way(optimizer))
                self._give_up(f"cannot be recorded ({explained(error)})")

    def _record(self, optimizer: torch.optim.Optimizer, replayed: ReplayedForward, recording: HeldPasses) -> None:
        options, kept = options_of(optimizer), kept_by(optimizer)
        if options is None or kept is None:
            return
        state = next((state for state in replayed.states if state.take(optimizer)), None)
        if state is None:
            state = StepState(optimizer, kept)
            replayed.states.append(state)
        row = recording.passes.row
        with recordable([optimizer]):
            for parameter, gradient in zip(
                replayed.parameters, replayed.gradients(row, recording.learning), strict=True
            ):
                parameter.grad = gradient
            replay, _ = self._recorder.stream_of_steps(row.device).record(optimizer.step)
        del recording.steps[: -_STEPS + 1]
        recording.steps.append(RecordedStep(options, state, replay))

    def follow(self, closure: Closure, step: Callable[[], None]) -> None:
        """A step along the gradients that a closure gives, which computes the same on the same memory each time.

        Args:
            step: takes it, along the gradients that parameters hold.
        """

        def work() -> None:
            self._recorder.waits = True
            try:
                closure()
            finally:
                self._recorder.waits = False
            step()

        known = self._closures.get(closure, 0)
        if self._given_up:
            work()
        elif isinstance(known, _RecordedClosure) and known.holds(self._optimizers):
            known.replay()
        else:
            self._compute(closure, work, 0 if isinstance(known, _RecordedClosure) else known)

    def _compute(self, closure: Closure, work: Callable[[], None], calls: int) -> None:
        """Compute a closure and the step, and where they have settled replay them from then on."""
        device = parameters_of(self._optimizers[0])[0].device
        stream, now = self._recorder.stream_of_steps(device), [(options_of(o), kept_by(o)) for o in self._optimizers]
        settled = calls >= _AFTER and now == self._before and not any(None in each for each in now)
        self._before, self._closures[closure] = now, calls + 1
        if settled:
            try:
                with recordable(self._optimizers):
                    replay, gradients = stream.record(lambda: self._graded(work))
            except Exception as error:  # of whatever is in it: then it computes as ever
                self._give_up(f"cannot be recorded ({explained(error)})")
            else:
                self._closures[closure] = recorded = _RecordedClosure(self._optimizers, replay, gradients)
                recorded.replay()
                return
        drawing = generators(device)
        states = [generator.get_state() for generator in drawing]
        stream.run(work)
        if any(not torch.equal(g.get_state(), state) for g, state in zip(drawing, states, strict=True)):
            self._give_up("draws random numbers")

    def _graded(self, work: Callable[[], None]) -> list[Tensor | None]:
        work()
        return [parameter.grad for optimizer in self._optimizers for parameter in parameters_of(optimizer)]

    def _give_up(self, reason: str) -> None:
        self._given_up = True
        names = " and ".join(sorted({type(each).__name__.lower() for each in self._optimizers}))
        self._recorder.say(f"compile: a step of {names} {reason}, and is computed operation by operation")


class _RecordedClosure:
    """A closure and the step along its gradients, recorded.

    Args:
        gradients: what parameters hold afterwards.
    """

    def __init__(self, optimizers: _Optimizers, replay: Callable[[], None], gradients: Sequence[Tensor | None]) -> None:
        self._replay, self._gradients = replay, gradients
        self._parameters = [parameter for each in optimizers for parameter in parameters_of(each)]
        self._addresses = self._now()
        self._options = [options_of(each) for each in optimizers]
        self._states = [StateInPlace(each) for each in optimizers]

    def _now(self) -> list[tuple[int, bool]]:
        return [(parameter.data_ptr(), parameter.requires_grad) for parameter in self._parameters]

    def holds(self, optimizers: _Optimizers) -> bool:
        """Whether the same would be computed on the same memory."""
        return (
            [options_of(each) for each in optimizers] == self._options
            and all(state.still(each) for state, each in zip(self._states, optimizers, strict=True))
            and self._now() == self._addresses
        )

    def replay(self) -> None:
        self._replay()
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient
        increment_version(self._parameters)


def _reached(outputs: Sequence[Tensor]) -> tuple[list[Any], list[Tensor]] | None:
    """The recorded passes that a backward pass goes through, and the leaves that it ends at beside their parameters.

    None where there are none, or what is between them is too much to look at, or of one knows not what.
    """
    replays: list[Any] = []
    leaves: list[Tensor] = []
    seen: set[Any] = set()
    waiting: list[Any] = [output.grad_fn for output in outputs]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if isinstance(node, ReplayedPass._backward_cls):  # pyright: ignore
            replays.append(node)
            waiting.append(node.next_functions[0][0])  # the input's; the others are the parameters'
        elif hasattr(node, "variable"):
            leaves.append(node.variable)
        elif isinstance(node, BackwardCFunction) or len(seen) > _NODES:
            return None
        else:
            waiting += [each for each, _ in node.next_functions]
    return (replays, leaves) if replays else None


def _way(optimizer: torch.optim.Optimizer) -> Hashable:
    """An optimizer's kind, and how it takes its steps."""
    return type(optimizer), *(optimizer.param_groups[0].get(way) for way in ("fused", "foreach", "capturable"))


def _same(parameters: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return len(parameters) == len(others) and all(a is b for a, b in zip(parameters, others, strict=True))


def _watched(parameter: Tensor) -> bool:
    """Whether a hook of a parameter is to see its gradient."""
    return bool(parameter._backward_hooks or parameter._post_accumulate_grad_hooks)  # pyright: ignore


def _learning(node: Any) -> list[Tensor]:
    pairs = zip(node.replayed.parameters, node.recording.learning, strict=True)
    return [parameter for parameter, learns in pairs if learns]
