"""What an accuracy is of: that of a classifier, of a kNN on features and of clients' own models do not compare."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from cutlayer.plotting.runs import Run

_OF_ALL = ("test_acc", "test_loss", "val_acc", "val_loss")
# Their model of all is what clients make models of their own from.
_STARTS = ("fed_babu", "per_fed_avg", "mhmd", "fsmkd")


def measured(run: Run, metric: str) -> str:
    """What a metric of a run is of: "kNN", "own models", "start of own models", or "" for a classifier of all.

    Where `test_acc` is on each client's share of the test set (`dataset.local_test=only`), methods of own models
    and of one are measured alike.
    """
    if metric.endswith(("acc", "loss")) or "acc/" in metric:
        if any(key.startswith("monitor.") for key in run.reported):
            return "kNN"
        if metric in _OF_ALL and run.get("dataset.local_test") != "only":
            if any(name.startswith("client_acc/") for name in run.metrics):
                return "own models"
            return "start of own models" if run.method in _STARTS else ""
    return ""


def competing(measures: Sequence[str]) -> Collection[str]:
    """Those among which the best may be named: classifiers of all where there is one, else what all are alike in."""
    kinds = set(measures)
    return kinds & {""} or (kinds if len(kinds) == 1 else ())


def marked(label: str, measure: str) -> str:
    """A name with what its metric is of, where that is no classifier of all."""
    return f"{label} ({measure})" if measure else label
