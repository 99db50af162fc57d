"""The tables, against a recomputation with pandas and a strict reading of what was written."""

import json
import math
import re
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from hypothesis import given, settings
from hypothesis import strategies as st

from cutlayer.plotting.curves import default_target, make_curves
from cutlayer.plotting.figures import Options
from cutlayer.plotting.figures.axes import label_of, measured_label
from cutlayer.plotting.runs import Run, find_runs
from cutlayer.plotting.tables import TABLE_COLUMNS, as_csv, as_latex, as_markdown, table_cells, table_rows
from tests.plotting.conftest import WriteRun, config_of
from tests.plotting.making import make_run


def run_of(method: str, values: list[float | None], step: int, metric: str = "test_acc", **keys: Any) -> Run:
    """A run with the given values of a metric that sends `step` bytes a round, a tenth of them labels."""
    count = range(1, len(values) + 1)
    results: dict[str, Any] = {
        "rounds": list(count),
        **{name: [0.5] * len(values) for name in ("test_acc", "test_loss", "train_loss")},
        "comm_load": [step * number for number in count],
        "traffic": {"up/smashed/y": [step // 10 * number for number in count]},
        "finished": True,
    }
    if metric in results:
        results[metric] = values
    else:
        results["metrics"] = {metric: values}
    return Run(Path(method) / str(keys), config_of(method, **keys), results)


def rows_of(runs: list[Run], **options: Any) -> list[dict[str, Any]]:
    metric = options.get("metric", "test_acc")
    curves = make_curves(runs, metric, options.get("without_fields", ()))
    return table_rows(curves, Options(**options))


values = st.lists(st.floats(0, 1) | st.none(), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(
    seeds=st.lists(st.tuples(values, st.integers(10, 1000)), min_size=1, max_size=4),
    target=st.floats(0.01, 0.99),
    budget=st.integers(1, 8000),
    metric=st.sampled_from(["test_acc", "test_loss"]),
    labels=st.booleans(),
)
def test_rows_agree_with_pandas(
    seeds: list[tuple[list[float | None], int]], target: float, budget: int, metric: str, labels: bool
) -> None:
    runs = [run_of("sl", each, step, metric, seed=seed) for seed, (each, step) in enumerate(seeds)]
    without = () if labels else ("y",)
    (row,) = rows_of(runs, metric=metric, target=target, budget=float(budget), without_fields=without)
    less = metric == "test_loss"
    finals, bests, within, totals, reached = [], [], [], [], []
    for each, step in seeds:
        sent = step if labels else step - step // 10
        frame = pd.DataFrame({"value": pd.array(each, dtype="Float64").to_numpy(float, na_value=math.nan)})
        frame["bytes"] = sent * (frame.index + 1)
        finals.append(frame["value"].iloc[-1])
        bests.append(frame["value"].min() if less else frame["value"].max())
        totals.append(frame["bytes"].iloc[-1])
        cheap = frame[frame["bytes"] <= budget]["value"]
        within += [] if cheap.empty or math.isnan(cheap.iloc[-1]) else [cheap.iloc[-1]]
        good = frame[(frame["value"] <= target) if less else (frame["value"] >= target)]
        reached += [] if good.empty else [good["bytes"].iloc[0]]
    for name, expected in (
        *(("final", finals), ("best", bests), ("comm_load_bytes", totals)),
        *(("at_budget", within), ("bytes_to_target", reached)),
    ):
        if expected:
            np.testing.assert_allclose(row[name], np.mean(expected), rtol=1e-12)
            np.testing.assert_allclose(row[f"{name}_std"], np.std(expected), rtol=1e-9, atol=1e-12)
        else:
            assert row[name] is row[f"{name}_std"] is None
    assert (row["seeds"], row["target_seeds"], row["at_budget_seeds"]) == (len(seeds), len(reached), len(within))
    assert row["rounds"] == min(len(each) for each, _ in seeds)


def test_csv_keeps_every_digit() -> None:
    rows = rows_of([run_of("sl", [1 / 3], 7), run_of("local_only", [2 / 3], 0)], target=0.5, budget=7.0)
    table = pd.read_csv(StringIO(as_csv(rows)))
    assert tuple(table.columns) == TABLE_COLUMNS
    assert table.set_index("method")["final"].to_dict() == {"sl": 1 / 3, "local_only": 2 / 3}
    assert table.set_index("method")["bytes_to_target"].isna().to_dict() == {"sl": True, "local_only": False}


def cells_of(runs: list[Run], **options: Any) -> dict[str, dict[str, str]]:
    """Cells of the Markdown table by the name of the row and the head of the column."""
    text = as_markdown(rows_of(runs, **options), Options(**options))
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    return {line[0]: dict(zip(lines[0], line, strict=True)) for line in lines[2:]}


def test_the_best_of_each_column_is_bold() -> None:
    runs = [
        *(run_of("fsl_sage", [0.5, accuracy], 1_000_000, seed=seed) for seed, accuracy in enumerate((0.8, 0.9))),
        run_of("fed_avg", [0.7, 0.86], 10_000_000),
        run_of("centralized", [0.9, 0.99], 0),
    ]
    cells = cells_of(runs, target=0.6, budget=2e6, title="T")
    assert cells["FSL-SAGE"] == {
        "method": "FSL-SAGE",
        "seeds": "2",
        "rounds": "2",
        "final (%)": "85.00 ± 5.00",
        "best (%)": "85.00 ± 5.00",
        "at 2.00 MB (%)": "85.00 ± 5.00",
        "communication": "2.00 MB",
        "bytes to 60%": "**2.00 MB**",
    }
    assert cells["FedAvg"]["final (%)"] == cells["FedAvg"]["best (%)"] == "**86.00**"
    assert cells["FedAvg"]["at 2.00 MB (%)"] == "-"
    assert cells["FedAvg"]["bytes to 60%"] == "10.0 MB"
    # A reference that sends nothing does not compete.
    assert cells["Centralized"]["final (%)"] == "99.00"
    assert cells["Centralized"]["communication"] == cells["Centralized"]["bytes to 60%"] == "none"


def test_of_a_loss_less_is_better() -> None:
    runs = [run_of("sl", [2.0, 0.5], 1000, "test_loss"), run_of("fed_avg", [1.0, 0.75], 1000, "test_loss")]
    options = {"metric": "test_loss", "target": 1.0, "budget": 1000.0}
    cells = cells_of(runs, **options)
    assert (cells["SL"]["final"], cells["FedAvg"]["final"]) == ("**0.5**", "0.75")
    assert (cells["SL"]["at 1.00 kB"], cells["FedAvg"]["at 1.00 kB"]) == ("2", "**1**")
    assert (cells["SL"]["bytes to 1"], cells["FedAvg"]["bytes to 1"]) == ("2.00 kB", "**1.00 kB**")
    assert "less is better" in as_markdown(rows_of(runs, **options), Options(**options))


def test_rows_that_read_the_same_are_equally_good() -> None:
    runs = [run_of("sl", [0.81231], 9), run_of("fed_avg", [0.81232], 9), run_of("cse_fsl", [0.7], 9)]
    cells = cells_of(runs)
    assert [cells[name]["final (%)"] for name in ("SL", "FedAvg", "CSE-FSL")] == ["**81.23**", "**81.23**", "70.00"]
    assert "**" not in as_markdown(rows_of(runs[:2]), Options()).replace("Bold", "")


def test_a_part_of_the_seeds_is_reported_and_does_not_compete() -> None:
    runs = [run_of("sl", [0.1, accuracy], 1000, seed=seed) for seed, accuracy in enumerate((0.9, 0.2))]
    runs += [run_of("fed_avg", [0.1, 0.9], 5000), run_of("cse_fsl", [None, None], 1000)]
    cells = cells_of(runs, target=0.5)
    assert cells["SL"]["bytes to 50%"] == "2.00 kB (1 of 2 seeds)"
    assert cells["FedAvg"]["bytes to 50%"] == "10.0 kB"
    assert cells["CSE-FSL"]["final (%)"] == "not finite"
    assert cells["CSE-FSL"]["bytes to 50%"] == "not reached"


def test_spread_of_bytes_has_the_unit_of_their_mean() -> None:
    runs = [run_of("sl", [0.9], step, seed=step) for step in (9_000_000, 11_000_000)]
    assert cells_of(runs)["SL"]["communication"] == "10.0 ± 1.0 MB"


def test_a_metric_that_is_not_measured_each_time_has_its_last_measurement() -> None:
    runs = [
        run_of("sl", [None, 0.25, None], 100, "local_acc/mean"),
        run_of("fed_avg", [0.5, None, None], 100, "local_acc/mean"),
    ]
    cells = cells_of(runs, metric="local_acc/mean", budget=100.0)
    assert (cells["SL"]["final (%)"], cells["FedAvg"]["final (%)"]) == ("25.00", "**50.00**")
    assert (cells["SL"]["at 100 B (%)"], cells["FedAvg"]["at 100 B (%)"]) == ("-", "50.00")


def parse_latex(text: str) -> list[list[str]]:
    """The rows of a `tabular`, after a strict check of everything that LaTeX would stumble over."""
    body = "\n".join(line for line in text.splitlines() if not line.startswith("%"))
    assert all(ord(character) < 0x250 and character not in "\t\x01\x02" for character in body)
    depth = 0
    for found in re.finditer(r"\\.|[{}]", body):
        depth += {"{": 1, "}": -1}.get(found[0], 0)
        assert depth >= 0
    assert depth == 0
    opened = re.findall(r"\\begin\{(\w+)\}", body)
    assert opened == list(reversed(re.findall(r"\\end\{(\w+)\}", body))) == ["table", "tabular"]
    (columns,) = re.findall(r"\\begin\{tabular\}\{([lr]+)\}", body)
    inner = body.split(f"{{{columns}}}")[1].split("\\end{tabular}")[0]
    rules = re.findall(r"\\(?:top|mid|bottom)rule", inner)
    assert rules == ["\\toprule", "\\midrule", "\\bottomrule"]
    rows = [row.strip() for row in re.sub(r"\\(?:top|mid|bottom)rule", "", inner).split("\\\\\n")]
    assert rows.pop() == ""
    cells = [re.split(r"(?<!\\)&", row) for row in rows]
    assert {len(row) for row in cells} == {len(columns)}
    assert len(re.findall(r"(?<!\\)\$", inner)) % 2 == 0
    for cell in (cell for row in cells for cell in row):
        plain = re.sub(r"\$\\(?:alpha|pm)\$|\\text\w+\{\}|\\[&%$#_{},]", "", cell.replace("\\textbf{", "{"))
        assert not set(plain) & set("\\&%$#_^~<>|"), cell
    return [[cell.strip() for cell in row] for row in cells]


def test_latex_holds_the_same_as_markdown() -> None:
    runs = [run_of("fsl_sage", [0.5, 0.8 + seed / 10], 1_000_000, seed=seed) for seed in (0, 1)]
    runs.append(run_of("a_b", [0.7, 0.86], 10_000_000))
    options = Options(title="50% & more", target=0.6, budget=2e6)
    rows = rows_of(runs, target=0.6, budget=2e6)
    text = as_latex(rows, options)
    heads, *cells = parse_latex(text)
    assert heads == [
        "method",
        "seeds",
        "rounds",
        r"final (\%)",
        r"best (\%)",
        r"at 2.00\,MB (\%)",
        "communication",
        r"bytes to 60\%",
    ]
    assert cells[0] == ["a\\_b", "1", "2", r"\textbf{86.00}", r"\textbf{86.00}", "-", r"20.0\,MB", r"10.0\,MB"]
    assert cells[1][3:] == [r"85.00 $\pm$ 5.00"] * 3 + [r"2.00\,MB", r"\textbf{2.00\,MB}"]
    assert "\\caption{50\\% \\& more. Test accuracy" in text


@settings(max_examples=80, deadline=None)
@given(
    method=st.text(st.sampled_from("ab &%$#_{}\\~^<>|\N{GREEK SMALL LETTER ALPHA}±"), min_size=1, max_size=12),
    title=st.text(st.sampled_from("ab &%$#_{}\\~^<>|\N{GREEK SMALL LETTER ALPHA}"), max_size=12),
)
def test_no_text_breaks_latex_or_markdown(method: str, title: str) -> None:
    runs = [run_of(method, [0.5], 10), run_of("sl", [0.25], 10)]
    rows = rows_of(runs)
    assert len(parse_latex(as_latex(rows, Options(title=title)))) == 3
    lines = [line for line in as_markdown(rows, Options()).splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {7}


def test_cells_are_the_same_in_every_format() -> None:
    rows = rows_of([run_of("sl", [0.5], 10), run_of("fed_avg", [0.25], 10)])
    _, cells = table_cells(rows, Options(), bold=lambda text: f"<{text}>")
    assert [row[3] for row in cells] == ["25.00", "<50.00>"]


def test_a_table_of_written_runs(write_run: WriteRun, tmp_path: Path) -> None:
    for seed in (0, 1):
        write_run("fed_avg", seed=seed)
    path = write_run("centralized", sent=0) / "results.json"
    assert json.loads(path.read_text())["comm_load"][-1] == 0
    curves = make_curves(find_runs(tmp_path / "saves").runs)
    rows = {row["method"]: row for row in table_rows(curves, Options(target=0.5, budget=10_000.0))}
    accuracy = 0.9 * (1 - math.exp(-2))
    np.testing.assert_allclose(rows["fed_avg"]["at_budget"], accuracy + 0.005)
    np.testing.assert_allclose(rows["centralized"]["at_budget"], rows["centralized"]["final"])
    assert rows["fed_avg"]["bytes_to_target"] == 4500
    assert rows["centralized"]["bytes_to_target"] == 0


def test_what_was_measured_in_other_ways_is_marked_and_never_the_best(tmp_path: Path) -> None:
    plain = {"metrics": {"local_acc/mean": [0.5, 0.6]}}
    own = {"metrics": {"client_acc/mean": [0.9, 0.99], "local_acc/mean": [0.9, 0.99]}}
    runs = [
        make_run(tmp_path / "avg", "fed_avg", accuracy=(0.5, 0.8)),
        make_run(tmp_path / "prox", "fed_prox", accuracy=(0.5, 0.7), results=plain),
        make_run(tmp_path / "babu", "fed_babu", accuracy=(0.5, 0.85)),
        make_run(tmp_path / "ditto", "ditto", accuracy=(0.5, 0.99), results=own),
        make_run(tmp_path / "moco", "moco_sfl", accuracy=(0.5, 0.95), results={"setting": ["lr", "monitor.k"]}),
    ]
    curves = make_curves(runs)
    assert default_target(curves) == 0.76  # of FedAvg
    rows = table_rows(curves, Options())
    assert {row["method"]: row["measured"] for row in rows} == {
        "fed_avg": "",
        "fed_prox": "",
        "fed_babu": "start of own models",
        "ditto": "own models",
        "moco_sfl": "kNN",
    }
    text = as_markdown(rows, Options())
    assert re.findall(r"\*\*(\d[^*]*)\*\*", text) == ["80.00", "80.00"]
    assert "| MocoSFL (kNN) |" in text
    assert "kNN: accuracy of a nearest-neighbour classifier" in text
    assert measured_label(curves[0]) == "Ditto (own models)"
    assert label_of(curves[0]) == "Ditto"
    # Alike they compete, two kinds of them do not.
    other = make_run(tmp_path / "fl", "fl_moco", accuracy=(0.5, 0.94), results={"setting": ["lr", "monitor.k"]})
    assert "**95.00**" in as_markdown(table_rows(make_curves([runs[4], other]), Options()), Options())
    assert "**" not in as_markdown(table_rows(make_curves(runs[3:]), Options()), Options())
    # On clients' own shares of the test set own models and one for all are measured alike.
    local = make_curves([runs[1], runs[3]], "local_acc/mean")
    table = as_markdown(table_rows(local, Options(metric="local_acc/mean")), Options(metric="local_acc/mean"))
    assert "**99.00**" in table
    assert "own models" not in table
