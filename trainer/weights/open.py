"""Opens a trained model by name, for evaluation, generation, export and fine-tuning.

    trained = open_weights("s3://bucket/runs/first", device)                             # a run's newest checkpoint
    trained = open_weights("s3://bucket/runs/first/checkpoints/step-00001000", device)   # one checkpoint
    trained = open_weights("s3://bucket/runs/first/checkpoints/best", device)     # the lowest validation loss
    trained = open_weights("gpt2", device)      # a public model, also hf:OWNER/NAME, or a folder in that format

Reads the weights without the optimizer's state. Checks the checksums of a checkpoint's files.
"""

import contextlib
import functools
import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from core import storage
from core.data import chat_template
from core.data.vocabulary import FILE_NAME as VOCABULARY_FILE
from core.data.vocabulary import Vocabulary
from core.data.vocabulary import read as read_vocabulary
from core.errors import CheckpointError, ConfigError, ObjectNotFound, one_line
from core.run.folder import RunFolder, step_name
from core.run.reader import Detail, read_run
from core.settings.loader import from_dict, to_dict
from core.settings.model import ModelConfig, parameters
from trainer.checkpoint import layout
from trainer.checkpoint.blocks import parse_key
from trainer.checkpoint.load import read_blocks
from trainer.model import lora
from trainer.model.gpt import GPT
from trainer.weights import folder as public
from trainer.weights import huggingface

READERS = 8
_BEST = re.compile(r"^(?P<run>.*)/checkpoints/best/?$")
_STEP = re.compile(r"^(?P<run>.*)/checkpoints/(?P<name>step-(?P<step>\d{8,}))/?$")


@dataclass(frozen=True)
class TrainedModel:
    """A model with its weights and their origin: a run's step, or a `folder` in Hugging Face's format.

    `state` is the checkpoint's data other than tensors.
    """

    name: str
    model: GPT
    run_url: str | None
    step: int | None
    state: Mapping[str, Any]
    folder: str | None = None

    @property
    def data_url(self) -> str | None:
        """The dataset that the model was trained on."""
        return self.state.get("config", {}).get("data", {}).get("url")

    @property
    def encoding(self):
        """The tiktoken encoding of the model's vocabulary. Raises the errors of `vocabulary`."""
        return self.vocabulary.encoding()

    @functools.cached_property
    def vocabulary(self) -> Vocabulary:
        """The vocabulary at VOCAB_URL, else the one in the run's folder, beside the model's data or its weights.

        Raises ConfigError if there is none, DataError for a vocabulary other than GPT-2's.
        """
        return vocabulary_at(self.name, [self.run_url, self.data_url], self.folder)


def vocabulary_at(name: str, homes: Sequence[str | None], folder: str | None = None) -> Vocabulary:
    """The vocabulary of the model `name` (see TrainedModel.vocabulary): from VOCAB_URL, from one of the `homes`, which
    are URLs of runs or data, or from the model's `folder`."""
    places = [os.environ.get("VOCAB_URL"), *(home and storage.join(home, VOCABULARY_FILE) for home in homes)]
    for uri in filter(None, places):
        try:
            return read_vocabulary(uri)
        except ObjectNotFound:
            continue
    if folder:
        with contextlib.suppress(ObjectNotFound):
            return public.vocabulary_of(folder)
        places.append(storage.join(folder, public.TOKENIZER))
    raise ConfigError(
        f"{name}: its vocabulary is not at {', '.join(filter(None, places)) or 'any known place'}; "
        "set VOCAB_URL to OpenAI's vocab.bpe or to tokenizer/gpt2.tiktoken of a prepared data set"
    )


def look_up(where: str) -> tuple[str, Mapping[str, Any]]:
    """The pair (name, state) of a model.

    The name always refers to the same weights. For a run, it is the name of the newest checkpoint.
    """
    public.refuse_file(where)
    if public.is_public(where) or public.is_folder(where):
        return where, {"config": {"model": to_dict(public.read_config(public.resolve(where))[1])}}
    run_url, manifest = _checkpoint(where)
    return layout.folder_of(run_url, manifest.step), manifest.state


def open_weights(where: str, device: torch.device, above: tuple[str, ...] = ()) -> TrainedModel:
    """Opens the model of a run, a checkpoint, a folder in Hugging Face's format or a public name.

    `above` are the checkpoints whose adapters belong to this model, to detect a cycle. Raises CheckpointError for
    weights that are missing, damaged, or of another architecture or vocabulary.
    """
    public.refuse_file(where)
    if public.is_public(where) or public.is_folder(where):
        return _open_folder(where, device)
    run_url, manifest = _checkpoint(where)
    state, place = manifest.state, layout.folder_of(run_url, manifest.step)
    config = _config_of(state, place)
    if "lora" in state:
        model = _opened_start(state, place, above, device)
        _check_base(model, state, place)
        _attach(model, state["lora"], place)
        _fill(lora.adapters(model), run_url, manifest)
        lora.merge(model)
    else:
        _check_size(config, sum(file.bytes for file in manifest.files), place)
        model = _empty(config, device)
        _fill(dict(model.named_parameters()), run_url, manifest)
    model.eval()
    return TrainedModel(f"{run_url} step {manifest.step}", model, run_url, manifest.step, state)


def _config_of(state: Mapping[str, Any], place: str) -> ModelConfig:
    try:
        return from_dict(ModelConfig, state["config"]["model"], place)
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{place}: its manifest does not describe the model ({one_line(error)})") from error


def _opened_start(state: Mapping[str, Any], place: str, above: tuple[str, ...], device: torch.device) -> GPT:
    """The model that the adapters of the checkpoint at `place` belong to."""
    start = state.get("start")
    if not isinstance(start, str) or place in above:
        raise CheckpointError(f"{place}: its adapters belong to {start!r}, which is not another model")
    return open_weights(start, device, (*above, place)).model


def _attach(model: GPT, settings: Any, place: str) -> None:
    try:
        lora.attach(model, **settings)
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        raise CheckpointError(f"{place}: its adapters do not fit the model ({one_line(error)})") from error


def _check_size(config: ModelConfig, size: int, place: str) -> None:
    """Called before memory is allocated. Raises CheckpointError for a model that files of `size` bytes cannot hold."""
    if parameters(config) > size:
        raise CheckpointError(
            f"{place}: describes a model of {parameters(config):,} parameters, which its files of {size:,} bytes do "
            "not hold; it is damaged or was changed"
        )


def _checkpoint(where: str) -> tuple[str, layout.CheckpointManifest]:
    """The run's URL, and the manifest of its newest complete checkpoint or of the checkpoint that `where` names."""
    if best := _BEST.match(where):
        where = _best(best["run"])
    match = _STEP.match(where)
    run_url = match["run"] if match else where.rstrip("/")
    found = layout.stored(run_url) if match else layout.restorable(run_url)
    steps = [int(match["step"])] if match else [step for step, names in found.items() if layout.MARKER in names]
    if not steps or layout.MARKER not in found.get(steps[0], {}):
        wanted = match["name"] if match else "complete checkpoint"
        there = ", ".join(step_name(step) for step, names in found.items() if layout.MARKER in names)
        raise CheckpointError(f"{run_url}: has no {wanted}; complete ones: {there or 'none'}")
    return run_url, layout.read_manifest(run_url, steps[0], found[steps[0]])


def _best(run_url: str) -> str:
    """The URL of the complete checkpoint with the lowest validation loss.

    Raises CheckpointError if no checkpoint has a loss.
    """
    complete = layout.complete_steps(run_url)
    has_metrics = bool(complete and RunFolder(run_url).segment_numbers())
    points = read_run(run_url, Detail.ALL).points("eval") if has_metrics else []
    losses = {point.step: point.values["val_loss"] for point in points if point.step in complete}
    if not losses:
        there = ", ".join(map(step_name, complete))
        raise CheckpointError(f"{run_url}: has no checkpoint with a validation loss; complete ones: {there or 'none'}")
    return layout.folder_of(run_url, min(losses, key=losses.get))


def _check_base(model: GPT, state: Mapping[str, Any], where: str) -> None:
    found = lora.digest(lora.base(model))
    if found != state["start_digest"]:
        raise CheckpointError(
            f"{where}: its adapters belong to weights with the checksum {state['start_digest']}, but "
            f"{state['start']} has {found}; restore the weights that the adapters were trained on"
        )


def _empty(config: ModelConfig, device: torch.device) -> GPT:
    with torch.device("meta"):
        model = GPT(config)
    return model.to_empty(device=device)


def _open_folder(where: str, device: torch.device) -> TrainedModel:
    place = public.resolve(where)
    kind, config = public.read_config(place)
    tensors = huggingface.from_hub(kind, config, public.read_tensors(place), place)
    _check_size(config, sum(each.numel() * each.element_size() for each in tensors.values()), place)
    model = _empty(config, device)
    _fill_whole(model, tensors, place)
    model.eval()
    state: dict[str, Any] = {"config": {"model": to_dict(config)}}
    if public.chat_template_of(place) == chat_template.JINJA:  # chat can render no other template
        state[chat_template.STATE_KEY] = chat_template.NAME
    return TrainedModel(where, model, None, None, state, place)


@torch.no_grad()
def _fill_whole(model: GPT, tensors: Mapping[str, torch.Tensor], place: str) -> None:
    parameters = dict(model.named_parameters())
    for name in sorted({*parameters, *tensors}):
        if name not in tensors:
            raise CheckpointError(f"{place}: its weights lack {name}; copy the model again")
        if name not in parameters:
            raise CheckpointError(f"{place}: holds {name}, which a model of its config.json does not have")
        if parameters[name].shape != tensors[name].shape:
            stored, wanted = list(tensors[name].shape), list(parameters[name].shape)
            raise CheckpointError(f"{place}: {name} is {stored}, its config.json asks for {wanted}")
        parameters[name].copy_(tensors[name])


@torch.no_grad()
def _fill(parameters: Mapping[str, torch.Tensor], run_url: str, manifest: layout.CheckpointManifest) -> None:
    missing = {name: parameter.shape[0] for name, parameter in parameters.items()}
    folder = layout.folder_of(run_url, manifest.step)

    def read(file: layout.PayloadFile) -> dict[str, torch.Tensor]:
        blocks = read_blocks(folder, file)
        # Copy the blocks. A block is a view and would keep the whole file in memory, including the optimizer's state.
        return {key: values.clone() for key, values in blocks.items() if key.startswith("model.")}

    with ThreadPoolExecutor(READERS) as pool:
        for blocks in pool.map(read, manifest.files):
            for key, values in blocks.items():
                try:
                    name, start, stop = parse_key(key.removeprefix("model."))
                except ValueError as error:
                    raise CheckpointError(f"{folder}: {error}") from error
                if name not in parameters or parameters[name][start:stop].shape != values.shape or start >= stop:
                    raise CheckpointError(f"{folder}: {key} matches no weight of this model in name and row shape")
                parameters[name][start:stop].copy_(values)
                missing[name] -= stop - start
    lacking = [name for name, rows in missing.items() if rows]
    if lacking:
        raise CheckpointError(f"{folder}: lacks rows of {', '.join(lacking[:3])}")
