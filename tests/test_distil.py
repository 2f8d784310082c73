"""Distillation on distributions: the loss is the published one, the student nears the teacher, resume is exact."""

import pytest
import torch
import torch.nn.functional as F

from core import storage
from core.data.vocabulary import GPT2_VOCAB_SIZE
from core.data.vocabulary import read as read_vocabulary
from core.errors import ConfigError
from core.settings.model import ModelConfig
from tests import corpus, launching, tuning
from tests.later import Later
from trainer.model.gpt import GPT
from trainer.model.loss import divergence_and_cross_entropy
from trainer.stages.distil import Distillation, Teacher, open_teacher

MODULE = "trainer.train"
STUDENT = ["--model.layers=1", "--model.heads=2", "--model.width=16", "--model.context=64"]
FLAGS = [*STUDENT, *tuning.BATCH, *tuning.QUIET, "--train.steps=10", "--train.eval_every=0", "--train.eval_tokens=256"]
# Each token costs two softmaxes over the vocabulary.
FLAGS += ["--checkpoint.every_steps=2", "--batch.tokens_per_step=128", "--batch.micro_batch_size=1"]
FLAGS += ["--optimizer.lr=3e-2"]
CPU = torch.device("cpu")
transformers = Later("transformers")


def flags_of(base: tuple[str, str], run_url: str, *more: str) -> list[str]:
    return [
        "--stage=distil",
        f"--data.url={base[0]}",
        f"--teacher.weights={base[1]}",
        f"--run.url={run_url}",
        *FLAGS,
        *more,
    ]


@pytest.fixture(scope="module")
def straight(pretrained, tmp_path_factory) -> str:
    """A run that nothing interrupted."""
    run_url = str(tmp_path_factory.mktemp("distil") / "straight")
    tuning.run_alone(MODULE, *flags_of(pretrained, run_url))
    return run_url


def test_the_student_nears_the_teacher(straight):
    found = launching.metrics(straight, "eval")
    assert found[10]["val_divergence"] < 0.7 * found[0]["val_divergence"]
    assert found[10]["val_loss"] < found[0]["val_loss"] - 1
    assert tuning.stage_in_report(straight) == ("distil", 1)


@pytest.mark.slow
def test_killed_it_resumes_to_the_bit(pretrained, straight, tmp_path):
    killed = str(tmp_path / "killed")
    process = tuning.start_alone(MODULE, *flags_of(pretrained, killed))
    tuning.kill_after(process, killed, 4)
    assert launching.completed(killed)[0] < 10
    assert "resumed from step" in tuning.run_alone(MODULE, *flags_of(pretrained, killed))
    assert launching.tensors(killed, 10) == launching.tensors(straight, 10)
    found = [launching.metrics(url, "eval")[10] | {"time": 0} for url in (killed, straight)]
    assert found[0] == found[1]
    assert tuning.stage_in_report(killed) == ("distil", 2)


@pytest.mark.slow
def test_two_ranks_from_a_start(pretrained, tmp_path):
    """The teacher's own weights as a start: hardly anything to learn from it, on any number of ranks."""
    alone, together = str(tmp_path / "alone"), str(tmp_path / "together")
    same = [*tuning.MODEL, f"--start.weights={pretrained[1]}", "--train.steps=4", "--optimizer.lr=1e-4"]
    tuning.run_alone(MODULE, *flags_of(pretrained, alone, *same))
    process = launching.start(2, *flags_of(pretrained, together, *same), module=MODULE, base=())
    code, output = launching.finish(process)
    assert code == 0, output
    assert launching.tensors(alone, 4) == launching.tensors(together, 4)
    assert launching.metrics(alone, "eval")[0]["val_divergence"] == pytest.approx(0, abs=1e-5)


def test_the_loss_in_chunks_is_that_of_whole_logits():
    generator = torch.Generator().manual_seed(1)
    rows, classes = 300, 50304
    student = torch.randn(rows, 8, generator=generator, requires_grad=True)
    head = torch.randn(classes, 8, generator=generator).mul(0.3).requires_grad_()
    teacher, teacher_head = torch.randn(rows, 12, generator=generator), torch.randn(classes, 12, generator=generator)
    targets = torch.randint(0, GPT2_VOCAB_SIZE, (rows,), generator=generator)
    parts = divergence_and_cross_entropy(student, head, 5.0, teacher, teacher_head, 0.0, targets, 2.0)
    (3 * parts[0] + parts[1]).backward()
    found = [each.grad.clone() for each in (student, head)]
    student.grad = head.grad = None
    logits = torch.tanh(student @ head.T / 5.0) * 5.0
    log_p, log_q = ((each[:, :GPT2_VOCAB_SIZE] / 2.0).log_softmax(1) for each in (teacher @ teacher_head.T, logits))
    divergence = (log_p.exp() * (log_p - log_q)).sum(1).mean()
    cross_entropy = F.cross_entropy(logits, targets)
    torch.testing.assert_close(parts, torch.stack([divergence, cross_entropy]), rtol=1e-5, atol=1e-5)
    (3 * divergence + cross_entropy).backward()
    for ours, theirs in zip(found, (student.grad, head.grad), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)


def test_the_mixture_is_hintons():
    config = ModelConfig(layers=1, heads=2, width=16, context=16, padded_vocab_size=50304)
    student, teacher = GPT(config), GPT(config)
    student.initialise(1)
    teacher.initialise(2)
    taught = Teacher("t", 16, teacher.head, 0.0, teacher, False)
    tokens = torch.arange(34).reshape(2, 17)
    loss = Distillation(student, 1.0, taught, temperature=2.0, kl_weight=0.25)(tokens)
    with torch.no_grad():
        s, t = (model(tokens[:, :-1])[..., :GPT2_VOCAB_SIZE] / 2.0 for model in (student, teacher))
        soft = F.kl_div(s.log_softmax(-1), t.softmax(-1), reduction="none").sum(-1).mean()
        hard = student(tokens[:, :-1], tokens[:, 1:])
    torch.testing.assert_close(loss.detach(), 0.25 * 4.0 * soft + 0.75 * hard)
    loss.backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())


@pytest.fixture(scope="module")
def foreign(tmp_path_factory) -> str:
    """A GPT-2 that `transformers` made, with OpenAI's tokenizer."""
    from tokenizers import ByteLevelBPETokenizer

    folder = tmp_path_factory.mktemp("foreign")
    data = corpus.vocab_bpe().parent
    bpe = ByteLevelBPETokenizer.from_file(str(data / "encoder.json"), str(data / "vocab.bpe"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer).save_pretrained(folder)
    torch.manual_seed(1)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_head=2, n_embd=16, n_positions=64))
    model.save_pretrained(folder)
    return str(folder)


def test_a_teacher_of_transformers_gives_its_own_logits(foreign, vocab_bpe):
    encoding = read_vocabulary(str(vocab_bpe)).encoding()
    tokens = torch.arange(100, 140)[None]
    expected = transformers.GPT2LMHeadModel.from_pretrained(foreign).eval()(input_ids=tokens).logits
    for name in (foreign, f"transformers:{foreign}"):  # opened as ours, and run by transformers
        teacher = open_teacher(name, encoding, CPU)
        logits = teacher.hidden(tokens) @ teacher.head.T
        torch.testing.assert_close(logits, expected.detach(), rtol=1e-4, atol=1e-5)
        assert teacher.context == 64


def test_a_teacher_of_another_vocabulary_is_refused(foreign, vocab_bpe, tmp_path):
    encoding = read_vocabulary(str(vocab_bpe)).encoding()
    small = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_layer=1, n_head=2, n_embd=16, n_positions=64, vocab_size=1000)
    )
    small.save_pretrained(tmp_path)
    for info in storage.list_objects(foreign):
        if "token" in info.name:
            (tmp_path / info.name).write_bytes(storage.read_bytes(info.uri))
    with pytest.raises(ConfigError, match=r"has another vocabulary than GPT-2's \(1000 tokens"):
        open_teacher(f"transformers:{tmp_path}", encoding, CPU)


def test_bad_input_is_one_sentence(pretrained, tmp_path):
    run_url = str(tmp_path / "run")

    def refused(*more: str) -> str:
        return tuning.refused(MODULE, *flags_of(pretrained, run_url, *more))

    assert "teacher.weights: is empty" in refused("--teacher.weights=")
    assert "the student's is 128; set model.context to at most that" in refused("--model.context=128")
    assert "has model.layers = 2, this config has 1" in refused(f"--start.weights={pretrained[1]}")
    assert not storage.list_objects(run_url)
