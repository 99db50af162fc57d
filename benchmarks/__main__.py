"""`python -m benchmarks`: one line for each benchmark."""

from __future__ import annotations

BENCHMARKS = {
    "round_time": "wall time of a round against a bare PyTorch loop that does the same arithmetic on the same batches",
    "workers": "rounds with several workers against those of one process in the same time, to the same bits",
    "peers": "rounds against those of pfl and of Flower in the same time, each installed in an environment of its own",
    "step": "what surrounds a step: a question to the server and its answer, and a step whose kernels are recorded",
    "kernels": "steps of a bare loop with channels_last, in bf16 and with fused optimizers against torch's defaults",
    "alignment": "steps of FSL-SAGE's alignment against the plain double backward pass from the same weights",
    "memory": "peak resident memory with 1,000 and with 100,000 clients, 50 of them in each round",
    "cohort": "time of a round of 100 clients of whom 10 take part against a round of 10 clients",
    "allocator": "time of a round with freed memory kept in the process against the C library's own setting",
    "traffic": "bytes of a round in closed form, for the five methods of the FSL-SAGE paper",
    "checkpoint": "seconds of a checkpoint with 10,000 clients' rows against a file for each row",
    "evaluation": "share of a round's wall time that evaluation takes",
    "network": "a step's round trip over gRPC against a bare echo of its bytes, and the server's memory by clients",
    "gpu": "every method on a GPU as on a processor, how fast it is, and FSL-SAGE's paper for a given time",
    "sweep": "a sweep with two jobs at a time against one at a time, and what the start of a job takes",
    "plotting": "time to read, average and draw 2,000 saved runs of 200 rounds",
}


def main() -> None:
    """List the benchmarks."""
    for name, measures in BENCHMARKS.items():
        print(f"python -m benchmarks.{name:<11} {measures}")
    print("Each takes --help.")


if __name__ == "__main__":
    main()
