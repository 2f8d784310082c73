"""The ranks of a job that cannot meet say so once; two jobs share a machine."""

import pytest
import torch.distributed as dist

from core.errors import ConfigError
from tests import corpus, launching
from trainer.distributed import process_group
from trainer.distributed.process_group import PeerFailed


@pytest.fixture
def as_rank(monkeypatch: pytest.MonkeyPatch):
    """This process as one of two ranks of a node, which never meet."""

    def refuse(*_: object, **__: object) -> None:
        raise dist.DistStoreError("timed out after 600000ms waiting for clients")

    def become(rank: int) -> None:
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
        for name, value in (names | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": 29500}).items():
            monkeypatch.setenv(name, str(value))

    monkeypatch.setattr(dist, "rendezvous", refuse)
    monkeypatch.setattr(process_group, "SAYING_SECONDS", 0.0)
    return become


def test_ranks_that_do_not_meet_say_it_once_per_node(as_rank):
    as_rank(0)
    with pytest.raises(
        ConfigError, match=r"the 2 ranks could not meet at 10\.0\.0\.1:29500 \(.*timed out after"
    ) as said:
        process_group.start("cpu")
    assert "\n" not in str(said.value)
    as_rank(1)
    with pytest.raises(PeerFailed):
        process_group.start("cpu")


@pytest.mark.parametrize(("gpus", "speaker"), [(0, 0), (1, 1)])
def test_what_is_wrong_on_some_ranks_is_said_by_the_first_of_them(as_rank, monkeypatch, gpus: int, speaker: int):
    """One GPU for two ranks: rank 0 could start."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpus > 0)
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    monkeypatch.setattr("torch.cuda.set_device", lambda device: None)
    said = []
    for rank in range(2):
        as_rank(rank)
        with pytest.raises((ConfigError, PeerFailed)) as caught:
            process_group.start("cuda", "device")
        said += [(rank, str(caught.value))] if "GPU" in str(caught.value) else []
    [(rank, sentence)] = said
    assert rank == speaker
    wanted = "start torchrun with --nproc-per-node=1" if gpus else "device is cuda, but torch sees no GPU; check"
    assert wanted in sentence


def test_a_device_that_no_rank_has_is_one_sentence(tmp_path):
    started = launching.start(2, f"--data.url={tmp_path}", f"--run.url={tmp_path / 'run'}", "--train.device=cuda")
    code, output = launching.finish(started)
    assert code != 0
    assert output.count("error: ") == 1, output
    assert (
        "train.device is cuda, but torch sees no GPU; check nvidia-smi and the driver, or set train.device=cpu"
        in output
    )


@pytest.mark.slow
def test_two_jobs_on_one_machine_share_their_cache_and_nothing_else(bucket, tmp_path, vocab_bpe, monkeypatch):
    """Started together from one token set, with the folder for shards that both choose by default."""
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    data = f"{bucket}/set"
    corpus.prepare_set(corpus.write_parquet(tmp_path / "source", [corpus.speeches(12)]), data, vocab_bpe)
    flags = (f"--data.url={data}", "--train.steps=6", "--checkpoint.every_steps=3")
    runs = [str(tmp_path / name) for name in ("one", "two")]
    jobs = [launching.start(2, *flags, f"--run.url={run}") for run in runs]
    for job in jobs:
        code, output = launching.finish(job)
        assert code == 0, output
    assert launching.tensors(runs[0], 6) == launching.tensors(runs[1], 6)
