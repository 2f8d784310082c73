"""A trained model as a folder that others can use.

    python -m trainer.export s3://bucket/runs/first exported/first
    python -m trainer.export s3://bucket/runs/first/checkpoints/step-00001000 s3://bucket/models/first --dtype=bfloat16
    python -m trainer.export s3://bucket/runs/first exported/first --publish=hf:OWNER/NAME
    python -m trainer.export s3://bucket/runs/first exported/gguf --format=gguf --dtype=float16

Writes model.safetensors, config.json, generation_config.json, the tokenizer's files and README.md, a model card out of
the run's records; GPT-2 and Llama presets load in `transformers` as what they are, others by a small modelling file
that goes with them. Rows that pad the vocabulary are cut off. The folder must be new.
"""

import json
import logging
import os
import tempfile
from pathlib import Path

from core import urls
from core.console import run_entry, set_up_logging
from core.errors import ConfigError
from core.settings import loader
from trainer.weights.settings import ExportConfig

log = logging.getLogger("export")
USAGE = "python -m trainer.export RUN_OR_CHECKPOINT FOLDER [--setting=value ...]"


def main(arguments: list[str]) -> None:
    set_up_logging()
    if {"-h", "--help"} & set(arguments):
        print(loader.help_text(ExportConfig, USAGE))
        return
    names = [each for each in arguments if not each.startswith("--")]
    if len(names) != 2:
        raise ConfigError(f"give a model and a folder, not {len(names)} names: {USAGE}")
    where, target = names
    urls.check_model(where)
    urls.check(target)
    settings = loader.load(ExportConfig, [each for each in arguments if each.startswith("--")], os.environ)
    import torch

    from trainer.weights import publish
    from trainer.weights.open import open_weights

    publish.check_empty(target)
    publish.check(settings.publish)
    opened = open_weights(where, torch.device("cpu"))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write(folder, opened, settings)
        publish.store(folder, target)
        print(f"{opened.name} is in {target}: {', '.join(sorted(path.name for path in folder.iterdir()))}")
        if settings.publish:
            print(f"published at {publish.publish(folder, settings.publish, settings.private)}")


def write(folder: Path, opened, settings: ExportConfig) -> None:
    """All files, into a local folder. Raises ConfigError where the vocabulary is missing or the format cannot be."""
    import safetensors.torch

    from trainer.data import chat_template
    from trainer.weights import card, curve, gguf_file, huggingface, tokenizer

    model, vocabulary = opened.model, opened.vocabulary
    template = chat_template.JINJA if chat_template.is_tuned(opened.state, opened.name) else ""
    tensors = dict(model.state_dict())
    file = None
    if settings.format == "gguf":
        name = (opened.run_url or opened.name).rstrip("/").rpartition("/")[2]
        file = f"{name}-{settings.dtype}.gguf"
        gguf_file.write(folder / file, model.config, tensors, vocabulary, settings.dtype, name, template)
    else:
        dtype = gguf_file.DTYPES[settings.dtype]
        weights = {name: values.to(dtype) for name, values in huggingface.to_hub(model.config, tensors).items()}
        safetensors.torch.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        for name, data in tokenizer.files(vocabulary, model.config.context, template).items():
            (folder / name).write_bytes(data)
        document = huggingface.document_of(model.config, settings.dtype)
        ends = {key: document[key] for key in ("bos_token_id", "eos_token_id")}
        _put(folder / "config.json", document)
        _put(folder / "generation_config.json", ends)
        if huggingface.kind_of(model.config) == huggingface.OWN:
            source = Path(__file__).parent / "weights" / f"{huggingface.OWN_MODULE}.py"
            (folder / source.name).write_bytes(source.read_bytes())
    facts = card.gather(opened)
    picture = curve.draw(folder / "loss.png", facts.train, facts.held_out)
    (folder / "README.md").write_text(card.write(opened, facts, settings.dtype, picture, file), encoding="utf-8")


def _put(path: Path, document: dict) -> None:
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_entry(main)
