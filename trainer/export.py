"""Exports a trained model as a folder for other programs.

    python -m trainer.export s3://bucket/runs/first exported/first
    python -m trainer.export s3://bucket/runs/first/checkpoints/step-00001000 s3://bucket/models/first --dtype=bfloat16
    python -m trainer.export s3://bucket/runs/first exported/first --publish=hf:OWNER/NAME
    python -m trainer.export s3://bucket/runs/first exported/gguf --format=gguf --dtype=float16

Writes model.safetensors, config.json, generation_config.json, the tokenizer's files and README.md, a model card made
from the run's records. `transformers` loads the GPT-2 and Llama presets as its own classes; for other models the folder
includes a modelling file. The export removes the rows that pad the vocabulary. The folder must be empty.

If no model and folder are named, as on a rented machine, the model is RUN_URL, and the folder is
RUN_URL/exports/STEP-FORMAT-DTYPE. The time and dollars are then booked in a ledger below RUN_URL/exports. A second
start finishes an interrupted export.
"""

import json
import logging
import os
import tempfile
import time
from pathlib import Path

from core import storage, urls
from core.console import run_entry, set_up_logging
from core.errors import ConfigError
from core.exit_codes import CAPPED, OK, tell_launcher
from core.run.folder import RunFolder, step_name
from core.run.segment import Opening, SegmentLog, open_segment
from core.settings import loader
from core.settings.inference import ExportConfig

log = logging.getLogger("export")
USAGE = "python -m trainer.export RUN_OR_CHECKPOINT FOLDER [--setting=value ...]"


def main(arguments: list[str]) -> int:
    set_up_logging()
    if {"-h", "--help"} & set(arguments):
        print(loader.help_text(ExportConfig, USAGE))
        return OK
    names = [each for each in arguments if not each.startswith("--")]
    run_url = os.environ.get("RUN_URL", "")
    if len(names) != 2 and not (run_url and not names):
        raise ConfigError(f"give a model and a folder, not {len(names)} names: {USAGE}")
    where, target = names or (run_url, "")
    urls.check_model(where)
    urls.check(target)
    settings = loader.load(ExportConfig, [each for each in arguments if each.startswith("--")], os.environ)
    from trainer.weights import folder

    if target:
        folder.check_empty(target)
    folder.check_publishable(settings.publish)
    with _segment("" if target else run_url, settings) as segment:
        if segment.cap and time.time() >= segment.cap.latest():
            log.warning("%s: no export begins; give a larger max_usd", segment.cap.describe())
            segment.close("cap")
            tell_launcher(CAPPED)
            return CAPPED
        export(where, target, settings, segment)
    return OK


def export(where: str, target: str, settings: ExportConfig, segment: SegmentLog) -> None:
    """Store and publish the model. If `target` is empty, begin or continue an export in the model's run."""
    import torch

    from trainer.weights import folder
    from trainer.weights.open import open_weights

    with segment.phase("restore"):
        trained = open_weights(where, torch.device("cpu"))
    resumes = not target
    if resumes:
        name = f"{step_name(trained.step)}-{settings.format}-{settings.dtype}"
        target = storage.join(RunFolder(trained.run_url).exports, name)
    with tempfile.TemporaryDirectory() as scratch, segment.phase("export"):
        local = Path(scratch)
        write(local, trained, settings)
        folder.store(local, target, resumes)
        print(f"{trained.name} is in {target}: {', '.join(sorted(path.name for path in local.iterdir()))}")
        if settings.publish:
            print(f"published at {folder.publish(local, settings.publish, settings.private)}")


def _segment(run_url: str, settings: ExportConfig) -> SegmentLog:
    """The ledger of the exports of this run. If there is no run, a ledger that books nothing."""
    if not run_url:
        return SegmentLog()
    opening = Opening(
        stage="export",
        config={"export": loader.to_dict(settings)},
        identity={},
        packages=("torch", "obstore"),
        max_usd=settings.max_usd,
    )
    return open_segment(RunFolder(RunFolder(run_url).exports), opening)


def write(folder: Path, trained, settings: ExportConfig) -> None:
    """Writes all files into a local folder.

    Raises ConfigError if the vocabulary is missing or the format does not support the model.
    """
    import safetensors.torch

    from core.data import chat_template
    from trainer.evals import suite
    from trainer.weights import card, gguf, huggingface, tokenizer

    model, vocabulary = trained.model, trained.vocabulary
    template = chat_template.JINJA if chat_template.is_tuned(trained.state, trained.name) else ""
    tensors = dict(model.state_dict())
    file = None
    if settings.format == "gguf":
        name = (trained.run_url or trained.name).rstrip("/").rpartition("/")[2]
        file = f"{name}-{settings.dtype}.gguf"
        gguf.write(folder / file, model.config, tensors, vocabulary, settings.dtype, name, template)
    else:
        dtype = gguf.DTYPES[settings.dtype]
        weights = {name: values.to(dtype) for name, values in huggingface.to_hub(model.config, tensors).items()}
        safetensors.torch.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        for name, data in tokenizer.files(vocabulary, model.config.context, template).items():
            (folder / name).write_bytes(data)
        document = huggingface.document_of(model.config, settings.dtype)
        _write_json(folder / "config.json", document)
        special = {key: document[key] for key in ("bos_token_id", "eos_token_id")}
        _write_json(folder / "generation_config.json", special)
        if huggingface.kind_of(model.config) == huggingface.OWN:
            source = Path(__file__).parent / "weights" / f"{huggingface.OWN_MODULE}.py"
            (folder / source.name).write_bytes(source.read_bytes())
    evaluations = suite.read_results(suite.results_folder(trained, "")) if trained.run_url else []
    facts = card.gather(trained, evaluations)
    curve = card.draw_curve(folder / "loss.png", facts.train, facts.validation)
    (folder / "README.md").write_text(card.write(trained, facts, settings.dtype, curve, file), encoding="utf-8")


def _write_json(path: Path, document: dict) -> None:
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_entry(main)
