"""Models between our form and others': every preset's choices through `transformers`, GGUF and back."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch

from core.errors import CheckpointError, ConfigError, DataError, StorageError
from core.settings import loader
from core.settings.inference import Sampling
from core.settings.model import ModelConfig
from core.settings.training import PretrainConfig
from tests import launching, models
from tests.rare import fast_only
from trainer import export, import_weights
from trainer.inference.engine import Engine, GenerationRequest
from trainer.weights import folder, huggingface
from trainer.weights.open import look_up, open_weights

transformers = pytest.importorskip("transformers", reason="needs the extra `hub`: pip install transformers")
CPU = torch.device("cpu")
# The other presets are the first one in other sizes.
NAMES = "gpt2-124m gpt2-163m-untied gpt2-270m llama-416m speedrun-162m".split()
TEXT = "The naïve dog's 3 puppies: \n\n\n  don't know 🙂 what [they] want…   "


def small(preset: Path) -> ModelConfig:
    """A preset's choices at another size."""
    made = loader.load(PretrainConfig, [str(preset), "--run.url=r", "--data.url=d"], {}).model
    sizes = {"layers": 2, "heads": 2, "width": 32, "context": 64, "mlp_width": 80 if made.mlp_width else 0}
    return dataclasses.replace(made, **sizes)


@pytest.fixture(scope="module")
def data_url(tmp_path_factory, vocab_bpe) -> str:
    return models.prepare_data(tmp_path_factory.mktemp("data"), vocab_bpe)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory) -> Path:
    """A GPT-2 as `transformers` stores it, with merges beside it."""
    path = tmp_path_factory.mktemp("public") / "gpt2"
    torch.manual_seed(0)
    shape = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=64, initializer_range=0.2)
    transformers.GPT2LMHeadModel(shape).eval().save_pretrained(path)
    return path


def test_all_presets_but_these_are_gpt2():
    others = [path for path in Path("trainer/configs").glob("*.yaml") if path.stem not in NAMES]
    assert len(others) > 3
    assert {huggingface.kind_of(small(path)) for path in others} == {"gpt2"}


def exported(run_url: str, target: Path, *flags: str) -> Path:
    export.main([run_url, str(target), *flags])
    return target


def loaded(path: Path, **options):
    return transformers.AutoModelForCausalLM.from_pretrained(path, **options).eval()


@pytest.mark.parametrize("name", fast_only(NAMES, {"gpt2-124m", "speedrun-162m"}))
def test_an_export_gives_the_same_logits_and_the_same_text(name: str, tmp_path, data_url):
    choices = small(Path(f"trainer/configs/{name}.yaml"))
    model = models.make_run(str(tmp_path / "run"), data_url, choices)
    path = exported(str(tmp_path / "run"), tmp_path / "out")
    other = loaded(path, trust_remote_code=True)
    kinds = {"llama-416m": "llama", "gpt2-163m-untied": "own", "gpt2-270m": "own", "speedrun-162m": "own"}
    expected = {"llama": "LlamaForCausalLM", "own": huggingface.OWN_CLASS}.get(kinds.get(name), "GPT2LMHeadModel")
    assert type(other).__name__ == expected
    tokens = torch.randint(0, 50257, (3, 64), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours, theirs = model(tokens)[..., :50257], other(tokens).logits
        loss = other(tokens, labels=tokens).loss
    assert theirs.shape == ours.shape
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)
    mean = torch.nn.functional.cross_entropy(ours[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    torch.testing.assert_close(loss, mean, rtol=1e-4, atol=1e-4)
    opened = open_weights(str(tmp_path / "run"), CPU)
    prompt = opened.encoding.encode_ordinary("The dog runs")
    engine = Engine(opened.model, opened.encoding, CPU)
    [answer] = engine.complete([GenerationRequest(prompt, Sampling(temperature=0, max_tokens=20))])
    written = other.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False)[0, len(prompt) :].tolist()
    assert [token.id for token in answer.tokens] == [token for token in written if token != 50256]


def test_the_modelling_file_takes_padded_batches_and_documents(tmp_path, data_url):
    choices = dataclasses.replace(
        small(Path("trainer/configs/speedrun-162m.yaml")),
        document_mask=True,
        value_skip=True,
        embedding_skip=True,
        position="learned",
    )
    model = models.make_run(str(tmp_path / "run"), data_url, choices)
    other = loaded(exported(str(tmp_path / "run"), tmp_path / "out"), trust_remote_code=True)
    tokens = torch.randint(0, 50256, (2, 30), generator=torch.Generator().manual_seed(1))
    tokens[0, 11] = 50256
    with torch.no_grad():
        torch.testing.assert_close(other(tokens).logits, model(tokens)[..., :50257], rtol=1e-4, atol=1e-4)
        shorter = tokens[1:, 8:]
        padded = torch.cat([torch.full((1, 8), 50256), shorter], 1)
        mask = torch.ones_like(padded)
        mask[:, :8] = 0
        logits = other(padded, attention_mask=mask).logits[:, 8:]
        torch.testing.assert_close(logits, other(shorter).logits, rtol=1e-4, atol=1e-4)
        # And token by token, with what was computed before.
        past, pieces = None, []
        for position in range(padded.shape[1]):
            step = other(padded[:, position : position + 1], mask[:, : position + 1], past, use_cache=True)
            past = step.past_key_values
            pieces.append(step.logits)
        torch.testing.assert_close(torch.cat(pieces, 1)[:, 8:], logits, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="65 tokens, the model's context is 64"):
        other(torch.zeros(1, 65, dtype=torch.long))


def test_import_and_export_are_inverses_bit_by_bit(gpt2: Path, tmp_path, data_url, capsys):
    run_url = str(tmp_path / "run")
    import_weights.main([str(gpt2), run_url, f"--data.url={data_url}"])
    assert "--model.context=64" in capsys.readouterr().out
    before = safetensors.torch.load_file(gpt2 / "model.safetensors")
    after = safetensors.torch.load_file(exported(run_url, tmp_path / "out") / "model.safetensors")
    before.pop("lm_head.weight", None)
    assert sorted(before) == sorted(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    # And what was exported opens like any other, and goes out again as it came.
    again = safetensors.torch.load_file(exported(str(tmp_path / "out"), tmp_path / "again") / "model.safetensors")
    assert all(torch.equal(before[name], again[name]) for name in before)


@pytest.mark.parametrize(
    ("tied", "bias"),
    [
        (True, False),
        (False, True),
        pytest.param(True, True, marks=pytest.mark.slow),
        pytest.param(False, False, marks=pytest.mark.slow),
    ],
)
def test_llama_comes_and_goes_bit_by_bit(tmp_path, data_url, vocab_bpe, monkeypatch, tied: bool, bias: bool):
    monkeypatch.setenv("VOCAB_URL", str(vocab_bpe))
    torch.manual_seed(0)
    shape = transformers.LlamaConfig(
        vocab_size=50257,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        attention_bias=bias,
        mlp_bias=bias,
        rope_theta=500.0,
    )
    theirs = transformers.LlamaForCausalLM(shape).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.2)
    theirs.save_pretrained(tmp_path / "llama")
    ours = open_weights(str(tmp_path / "llama"), CPU)
    tokens = torch.randint(0, 50257, (2, 64))
    with torch.no_grad():
        torch.testing.assert_close(ours.model(tokens), theirs(tokens).logits, rtol=1e-4, atol=1e-4)
    out = exported(str(tmp_path / "llama"), tmp_path / "out")
    before, after = (safetensors.torch.load_file(path / "model.safetensors") for path in (tmp_path / "llama", out))
    assert sorted(before) == sorted(after)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.slow
def test_a_gguf_file_holds_the_weights(tmp_path, data_url):
    gguf = pytest.importorskip("gguf", reason="needs the extra `hub`: pip install gguf")
    model = models.make_run(str(tmp_path / "run"), data_url)
    path = exported(str(tmp_path / "run"), tmp_path / "out", "--format=gguf", "--dtype=float16")
    reader = gguf.GGUFReader(path / "run-float16.gguf")
    stored = {tensor.name: tensor.data for tensor in reader.tensors}
    assert len(stored) == 4 + 2 * 12
    embedding = model.wte.weight.detach()[:50257].half().numpy()
    assert (stored["token_embd.weight"] == embedding).all()
    assert (stored["blk.1.ffn_up.weight"] == model.h[1].mlp.c_fc.weight.detach().half().numpy()).all()
    assert (stored["blk.1.attn_qkv.bias"] == model.h[1].attn.c_attn.bias.detach().numpy()).all()
    assert reader.fields["gpt2.context_length"].contents() == 64
    assert reader.fields["tokenizer.ggml.tokens"].contents(-1) == "<|endoftext|>"


@pytest.mark.slow
@pytest.mark.parametrize("stem", ["gpt2-124m", "llama-416m"])
def test_gguf_read_by_transformers_gives_the_same_logits(stem: str, tmp_path, data_url):
    for library in ("gguf", "accelerate"):
        pytest.importorskip(library, reason=f"pip install {library}")
    # transformers takes any GPT-2 in this format for one of 1024 positions.
    choices = dataclasses.replace(small(Path(f"trainer/configs/{stem}.yaml")), context=1024)
    model = models.make_run(str(tmp_path / "run"), data_url, choices)
    path = exported(str(tmp_path / "run"), tmp_path / "out", "--format=gguf")
    other = loaded(path, gguf_file="run-float32.gguf")
    tokens = torch.randint(0, 50257, (2, 64))
    with torch.no_grad():
        torch.testing.assert_close(other(tokens).logits, model(tokens)[..., :50257], rtol=1e-4, atol=1e-4)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path, gguf_file="run-float32.gguf")
    assert tokenizer(TEXT).input_ids == open_weights(str(tmp_path / "run"), CPU).encoding.encode_ordinary(TEXT)
    half = exported(str(tmp_path / "run"), tmp_path / "half", "--format=gguf", "--dtype=bfloat16")
    with torch.no_grad():
        rounded = loaded(half, gguf_file="run-bfloat16.gguf")(tokens).logits
    assert 0 < (rounded - other(tokens).logits).abs().max() < 1


def test_gguf_knows_only_two_architectures(tmp_path, data_url):
    models.make_run(str(tmp_path / "run"), data_url, dataclasses.replace(models.SMALL, mlp="relu2"))
    with pytest.raises(ConfigError, match="GGUF's readers support GPT-2 and Llama, this model is neither"):
        exported(str(tmp_path / "run"), tmp_path / "out", "--format=gguf")
    assert not (tmp_path / "out").exists()


def test_the_tokenizer_loads_offline_and_is_openais(tmp_path, data_url, vocab_bpe):
    models.make_run(str(tmp_path / "run"), data_url)
    path = exported(str(tmp_path / "run"), tmp_path / "out", "--dtype=bfloat16")
    assert (path / "merges.txt").read_bytes() == vocab_bpe.read_bytes()
    assert json.loads((path / "vocab.json").read_text()) == json.loads((vocab_bpe.parent / "encoder.json").read_text())
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    encoding = open_weights(str(tmp_path / "run"), CPU).encoding
    assert tokenizer(TEXT).input_ids == encoding.encode_ordinary(TEXT)
    assert tokenizer.decode(encoding.encode_ordinary(TEXT)) == TEXT
    assert tokenizer("a<|endoftext|>").input_ids[-1] == tokenizer.eos_token_id == 50256
    assert loaded(path).dtype == torch.bfloat16
    # tokenizer.json alone is enough to come back.
    (path / "merges.txt").unlink()
    assert folder.vocabulary_of(str(path)).ranks == open_weights(str(tmp_path / "run"), CPU).vocabulary.ranks


def changed(path: Path, target: Path, **values) -> str:
    shutil.copytree(path, target)
    document = json.loads((target / "config.json").read_text()) | values
    (target / "config.json").write_text(json.dumps({k: v for k, v in document.items() if v != "absent"}))
    return str(target)


def test_what_is_another_model_is_refused_by_name(gpt2: Path, tmp_path):
    def refused(**values) -> str:
        target = tmp_path / str(len(list(tmp_path.iterdir())))
        with pytest.raises(CheckpointError) as caught:
            open_weights(changed(gpt2, target, **values), CPU)
        assert str(target) in str(caught.value)
        return str(caught.value)

    assert "model_type is 'gpt_neox'; only gpt2, llama, pretrain_launcher can be read" in refused(model_type="gpt_neox")
    assert "vocab_size is 32000, GPT-2's vocabulary has 50257" in refused(vocab_size=32000)
    assert 'activation_function is "relu"' in refused(activation_function="relu")
    assert "has no 'n_layer'" in refused(n_layer="absent")
    assert "h.2.attn.c_attn.bias" in refused(n_layer=3)
    assert "holds h.1.attn.c_attn.bias, which a model of its config.json does not have" in refused(n_layer=1)
    assert "wpe.weight is [64, 32], its config.json asks for [80, 32]" in refused(n_positions=80)
    assert "heads: is 5, must divide the width 32" in refused(n_head=5)


def test_damaged_folders_are_refused_by_name(gpt2: Path, tmp_path):
    cut = Path(changed(gpt2, tmp_path / "cut"))
    whole = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"cut/model.safetensors: cut off or damaged"):
        open_weights(str(cut), CPU)
    (cut / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model.safetensors: not found; copy the model again"):
        open_weights(str(cut), CPU)
    (cut / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"its pytorch_model.bin is a pickle, which is not loaded"):
        open_weights(str(cut), CPU)
    (cut / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config.json: not valid JSON"):
        open_weights(str(cut), CPU)


def test_weights_in_several_files(gpt2: Path, tmp_path):
    parts = Path(changed(gpt2, tmp_path / "parts"))
    tensors = safetensors.torch.load_file(parts / "model.safetensors")
    (parts / "model.safetensors").unlink()
    names = sorted(tensors)
    index = {}
    for number, chosen in enumerate((names[:9], names[9:])):
        file = f"model-{number}.safetensors"
        safetensors.torch.save_file({name: tensors[name] for name in chosen}, parts / file)
        index |= dict.fromkeys(chosen, file)
    (parts / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    one, many = (open_weights(str(path), CPU).model.state_dict() for path in (gpt2, parts))
    assert all(torch.equal(one[name], many[name]) for name in one)


def test_a_missing_or_foreign_tokenizer_is_refused(gpt2: Path, tmp_path):
    without = changed(gpt2, tmp_path / "without")
    with pytest.raises(ConfigError, match=r"its vocabulary is not at .*without/tokenizer.json; set VOCAB_URL"):
        _ = open_weights(without, CPU).encoding
    foreign = Path(changed(gpt2, tmp_path / "foreign"))
    (foreign / "merges.txt").write_text("#version: 0.2\nh e\nhe l\n")
    with pytest.raises(DataError, match=r"foreign/merges.txt: 258 ranks with checksum"):
        _ = open_weights(str(foreign), CPU).encoding


def test_names_of_public_models(monkeypatch):
    assert folder.is_public("gpt2-xl")
    assert folder.is_public("hf:EleutherAI/pythia-70m@step1")
    assert not folder.is_public("runs/gpt2")
    with pytest.raises(ConfigError, match=r"hf:a/b/c: not of the form hf:OWNER/NAME"):
        folder.resolve("hf:a/b/c")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(StorageError, match=r"hf:owner/absent: the Hub cannot be reached, and it was not downloaded"):
        folder.resolve("hf:owner/absent")


def test_import_refuses_what_would_be_another_model_or_overwrite_a_run(gpt2: Path, tmp_path, data_url):
    run_url = str(tmp_path / "run")
    with pytest.raises(ConfigError, match=r"model.layers is 3, the weights of .* have 2; leave it out"):
        import_weights.main([str(gpt2), run_url, f"--data.url={data_url}", "--model.layers=3"])
    import_weights.main([str(gpt2), run_url, f"--data.url={data_url}", "--model.dropout=0.1"])
    assert open_weights(run_url, CPU).state["config"]["model"]["dropout"] == 0.1
    with pytest.raises(Exception, match=r"run: holds objects already"):
        import_weights.main([str(gpt2), run_url, f"--data.url={data_url}"])


def test_training_goes_on_from_imported_weights(tmp_path, data_url):
    shape = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=32)
    transformers.GPT2LMHeadModel(shape).save_pretrained(tmp_path / "public")
    flags = [flag for flag in launching.TINY if not flag.startswith("--model.")]
    flags += ["--train.steps=3", "--train.seed=7", f"--data.url={data_url}"]
    run_url = str(tmp_path / "run")
    import_weights.main([str(tmp_path / "public"), run_url, *flags])
    output = launching.train(1, *flags, "--model.padded_vocab_size=50257", f"--run.url={run_url}")
    assert "resumed from step 0" in output
    before, after = (open_weights(where, CPU).model.wte.weight for where in (str(tmp_path / "public"), run_url))
    assert 0 < (after - before).abs().max() < 0.1, "three steps away from where it began"


def other_writers(tensors: dict[str, torch.Tensor], embedding: str) -> dict[str, dict[str, torch.Tensor]]:
    """The same tied weights as other programs name them."""
    tensors = {name: values for name, values in tensors.items() if name != "lm_head.weight"}
    head = {name: values for name, values in tensors.items() if name != embedding}
    head["lm_head.weight"] = tensors[embedding]
    return {
        "head only": head,
        "both": {**tensors, "lm_head.weight": tensors[embedding].clone()},
        "compiled": {f"_orig_mod.{name}": values for name, values in head.items()},
        "compiled in DDP": {f"module._orig_mod.{name}": values for name, values in tensors.items()},
    }


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_weights_open_under_the_names_of_other_writers(kind: str, tmp_path, data_url):
    base = ModelConfig(layers=2, heads=2, width=32, context=64)
    more = {"norm": "rmsnorm", "position": "rope", "mlp": "swiglu", "bias": False} if kind == "llama" else {}
    models.make_run(str(tmp_path / "run"), data_url, dataclasses.replace(base, **more))
    folder = exported(str(tmp_path / "run"), tmp_path / "out")
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    embedding = {"gpt2": "transformer.wte.weight", "llama": "model.embed_tokens.weight"}[kind]
    expected = open_weights(str(folder), CPU).model.state_dict()
    forms = other_writers(tensors, embedding)
    prefix = embedding.partition(".")[0] + "."
    forms["without head"] = {name.removeprefix(prefix): values for name, values in tensors.items()}
    for form, named in forms.items():
        safetensors.torch.save_file(named, folder / "model.safetensors")
        found = open_weights(str(folder), CPU).model.state_dict()
        assert found.keys() == expected.keys(), form
        assert all(torch.equal(found[name], expected[name]) for name in expected), form


def test_a_pickle_is_refused_by_name(tmp_path):
    (tmp_path / "out").mkdir()
    torch.save({"model": {}}, tmp_path / "out" / "ckpt.pt")
    for where in (tmp_path / "out", tmp_path / "out" / "ckpt.pt"):
        for use in (lambda name: open_weights(name, CPU), look_up):
            with pytest.raises(CheckpointError, match=r"out/ckpt.pt: is a pickle, .* model.save_pretrained\(FOLDER\)"):
                use(str(where))
    with pytest.raises(CheckpointError, match=r"model\.safetensors: is a file; give its folder"):
        open_weights(str(tmp_path / "model.safetensors"), CPU)
