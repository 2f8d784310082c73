"""Scores of several models side by side: as a table, as JSON and as a chart."""

import json
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from core.errors import ConfigError
from core.settings import loader
from core.settings.evaluation import EvaluateConfig
from trainer.evals import comparison

SCORES = {
    "first": {
        "perplexity": {"tokens": 1000, "loss": 3.4, "perplexity": 30.0},
        "hellaswag": {"items": 24, "accuracy": 0.25, "accuracy_stderr": 0.09, "accuracy_norm": 0.29},
    },
    "gpt2": {"perplexity": {"tokens": 1000, "loss": 3.3, "perplexity": 27.1}, "lm-eval:piqa": {"acc": 0.6}},
}


def test_a_panel_has_the_value_of_each_model():
    assert comparison.panels(SCORES) == {
        ("perplexity", "perplexity"): {"first": 30.0, "gpt2": 27.1},
        ("hellaswag", "accuracy"): {"first": 0.25},
        ("hellaswag", "accuracy_norm"): {"first": 0.29},
        ("lm-eval:piqa", "acc"): {"gpt2": 0.6},
    }
    assert comparison.panels({"a": {"other": {"f1": 0.5, "f1_stderr": 0.1}}}) == {("other", "f1"): {"a": 0.5}}


def test_json_and_chart_hold_the_scores(tmp_path: Path):
    pytest.importorskip("matplotlib")
    for ending in ("json", "svg", "png"):
        comparison.write(SCORES, str(tmp_path / f"scores.{ending}"))
    assert json.loads((tmp_path / "scores.json").read_text()) == SCORES
    assert ET.parse(tmp_path / "scores.svg").getroot().tag.endswith("svg")
    assert (tmp_path / "scores.png").read_bytes().startswith(b"\x89PNG")


def test_what_cannot_be_written_is_told_before_anything_is_measured(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"out: is 'scores.pdf', must end in \.json, \.svg, \.png"):
        loader.load(EvaluateConfig, ["--out=scores.pdf"], {})
    with pytest.raises(ConfigError, match="its folder does not exist; create it first"):
        comparison.check([str(tmp_path / "absent/scores.json")])
