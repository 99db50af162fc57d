"""The files that every run writes."""

from dataclasses import dataclass

from cutlayer.runtime.records.loggers import Logger, LoggerConfig, register


@register("csv")
class CsvLogger(Logger):
    """The run's own files (`metrics.csv`, `results.json`, ...). `Results` always writes them; this adds nothing."""

    @dataclass(frozen=True)
    class Config(LoggerConfig):
        name: str = "csv"
