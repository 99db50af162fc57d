"""The dataset section of the configuration refuses what it cannot use, in one line."""

from typing import Any

import pytest

from cutlayer.datasets import DatasetConfig
from cutlayer.runtime.ground.config import ConfigError, build


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "mnits"}, r"dataset\.name=mnits: expected a registered dataset; did you mean .*mnist"),
        ({"name": "synthetic", "options": {"n_trian": 3}}, r"dataset\.options\.n_trian: no such key.*n_train"),
        ({"name": "synthetic", "options": {"classes": 0}}, r"dataset\.options\.classes=0: expected an integer >= 1"),
        ({"name": "mnist", "options": {"size": 3}}, r"dataset\.options\.size: no such key"),
        ({"name": "digits", "alpha": 0.0}, r"dataset\.alpha=0\.0: expected a finite number > 0"),
        ({"name": "digits", "augment": "mixup"}, r"dataset\.augment=mixup.*crop_flip"),
        ({"name": "digits", "validation": 1.0}, r"dataset\.validation=1\.0"),
        ({"name": "digits", "client_samples": 0}, r"dataset\.client_samples=0: expected null or an integer >= 1"),
        ({"name": "digits", "fraction": 0}, r"dataset\.fraction=0"),
        ({"name": "digits", "fraction": 1.5}, r"dataset\.fraction=1\.5"),
        ({"name": "image_folder", "options": {"resize": 9}}, r"dataset\.options\.resize=9"),
    ],
)
def test_wrong_configuration_is_one_clear_line(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        build(DatasetConfig, values, "dataset")
    assert "\n" not in str(caught.value)
