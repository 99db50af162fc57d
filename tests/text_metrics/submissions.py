"""Our figures of what took part in the E2E challenge; by hand, with copies of its two repositories.

python -m tests.text_metrics.submissions E2E_DATASET E2E_EVAL [system ...]

E2E_DATASET is github.com/tuetschek/e2e-dataset, E2E_EVAL github.com/tuetschek/e2e-eval, of which the primary systems.
"""

import csv
import sys
from pathlib import Path

from cutlayer.runtime.ground.config import ConfigError
from cutlayer.text_metrics import TEXT_METRICS, check_metrics, score


def rows(path: Path) -> list[list[str]]:
    """The cells of a table without its heading, by tabs or commas."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        return list(csv.reader(file, delimiter="\t" if path.suffix == ".tsv" else ","))[1:]


def main(dataset: str, outputs: str, *systems: str) -> None:
    """Print a row of figures for each system."""
    references: dict[str, list[str]] = {}
    for meaning, text in rows(Path(dataset) / "testset_w_refs.csv"):
        references.setdefault(meaning, []).append(text.strip())
    names: list[str] = []
    for name in TEXT_METRICS.names():
        try:
            check_metrics([name])
            names.append(name)
        except ConfigError as error:
            print(error, file=sys.stderr)
    print("system", *names, sep="\t")
    for path in sorted((Path(outputs) / "system_outputs" / "primary").glob("*.tsv")):
        if not systems or path.stem in systems:
            said = rows(path)
            if not {meaning for meaning, _ in said} <= references.keys():
                print(f"{path.name} has meanings of its own, which the script refuses too", file=sys.stderr)
                continue
            found = score(names, [text.strip() for _, text in said], [references[meaning] for meaning, _ in said])
            print(path.stem, *(f"{found[name]:.4f}" for name in names), sep="\t", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
