"""Compare a vLLM server, in a process of its own, with the trainer's forward pass. Weights travel over gloo."""

import os
import socket
import subprocess
import sys
import time

import pytest
import torch

from bae.commands import train
from bae.rollout.vllm import server_engine as vllm_server
from bae.rollout.vllm.server_engine import VllmServerEngine
from tests.rollout.test_vllm import DEVICE, PROMPTS, gap, generated, make_policy, needs_vllm, sample, trained
from tests.support import ROOT, call

pytestmark = [
    needs_vllm,
    pytest.mark.slow,
    pytest.mark.skipif(DEVICE != "cpu", reason="gloo is for vLLM's CPU build"),
]
WEIGHTS = [
    "--weight-transfer-config",
    '{"backend": "gloo"}',
    "--worker-extension-cls",
    "tests.support.vllm_gloo.Extension",
]


class Running:
    """Run a server for CPUs that knows the tests' gloo transport."""

    def __init__(self, folder, *options):
        make_policy().save(folder / "served")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.log = folder / "log"
        place = ["--model", str(folder / "served"), "--host", "127.0.0.1", "--port", str(port)]
        small = ["--max-model-len", "64", "--kv-cache-memory-bytes", "100000000", "--enforce-eager",
                 "--no-enable-chunked-prefill"]  # fmt: skip
        with self.log.open("w") as log:
            self.job = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "vllm.entrypoints.openai.api_server",
                    *place,
                    *small,
                    "--dtype",
                    "float32",
                    *options,
                ],
                cwd=ROOT,  # where it finds tests.support.vllm_gloo
                env=os.environ | {"VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1"},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            self._wait(port)
        except BaseException:
            self.stop()
            raise

    def _wait(self, port):
        for _ in range(240):
            assert self.job.poll() is None, self.log.read_text()
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    return
            time.sleep(0.5)
        raise AssertionError(self.log.read_text())

    def stop(self):
        """Kill it at once, with the processes that it has started."""
        if self.job.poll() is None:
            os.killpg(self.job.pid, 9)
            self.job.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    running = Running(tmp_path_factory.mktemp("server"), "--logprobs-mode", "processed_logprobs", *WEIGHTS)
    yield running
    running.stop()


def make_engine(server, **options):
    from tests.support.vllm_gloo import server_engine

    return server_engine(url=server.url, **options)


def change(policy):
    with torch.no_grad():
        for weight in policy.model.parameters():
            weight += 0.05 * torch.randn_like(weight)


def test_it_samples_from_the_weights_as_they_are(server):
    policy = make_policy()
    change(policy)  # not what the server was started with
    engine = make_engine(server)
    before = sample(engine, policy)
    assert gap(policy.model, before) < 1e-3  # 1e-6
    change(policy)
    assert gap(policy.model, before) > 0.1
    told = {}
    after = sample(engine, policy, temperature=0.7, on_finished=lambda n, *rest: told.setdefault(n, rest))
    assert gap(policy.model, after, 0.7) < 1e-3
    assert not after.completion_ids.equal(before.completion_ids)
    for n in range(12):
        assert told[n] == (after.completion_ids[n][after.completion_mask[n]].tolist(), bool(after.ended[n]))
    greedy = sample(engine, policy, group_size=1, temperature=0)
    for prompt, row, mask in zip(PROMPTS, greedy.completion_ids, greedy.completion_mask, strict=True):
        assert row[mask].tolist() == generated(policy, prompt)


def test_keys_decide_the_draws_whoever_asks(server):
    policy = make_policy()
    engine = make_engine(server)
    whole = sample(engine, policy)
    again = sample(make_engine(server), policy)  # a second trainer, which sends its weights anew
    assert whole.completion_ids.equal(again.completion_ids)
    assert not whole.completion_ids.equal(sample(engine, policy, keys=[(1, 0, i) for i in range(3)]).completion_ids)
    alone = sample(engine, policy, prompts=PROMPTS[1:2], keys=[(0, 0, 1)], group_size=2)
    for n in range(2):
        ids = alone.completion_ids[n][alone.completion_mask[n]]
        assert ids.equal(whole.completion_ids[4 + n][whole.completion_mask[4 + n]])


def test_the_end_of_sequence_is_the_callers(server):
    policy = make_policy()
    engine = make_engine(server)
    eos = int(sample(engine, policy).completion_ids[0, 2])
    samples = sample(engine, policy, group_size=16, eos=eos)
    assert samples.ended.any() and not samples.ended.all()
    for row, mask, ended in zip(samples.completion_ids, samples.completion_mask, samples.ended, strict=True):
        length = int(mask.sum())
        assert (row[:length] == eos).sum() == ended
        assert row[length - 1] == eos if ended else length == 12


def test_two_processes_train_like_one(server, tmp_path):
    remote = [
        "rollout=vllm_server",
        f"rollout.url={server.url}",
        "rollout._target_=tests.support.vllm_gloo.server_engine",
    ]
    trained(tmp_path, *remote)
    one, both = trained(tmp_path, *remote, "strategy=ddp", "strategy.accelerator=cpu", "strategy.devices=2")
    for metric in ("train/reward/correctness", "train/entropy", "train/grad_norm", "val/accuracy"):
        assert both.data.metrics[metric] == pytest.approx(one.data.metrics[metric], abs=1e-4), metric


def test_another_model_is_refused(server, monkeypatch):
    with pytest.raises(ValueError, match="serves "):
        make_engine(server, served_model="another")
    other = make_policy("qwen2")
    engine = make_engine(server)
    with pytest.raises(ValueError, match="the server has another model than the policy"):
        sample(engine, other)
    # Where the configuration of the server is out of reach, the weights do not fit.
    monkeypatch.setattr(vllm_server, "_check_same_model", lambda *_: None)
    with pytest.raises(ConnectionError, match="refused update_weights"):
        sample(engine, other)


def test_a_prompt_that_does_not_fit_is_refused(server):
    with pytest.raises(ValueError, match="more than the 64"):
        sample(make_engine(server), make_policy(), limit=60)


def test_a_server_that_dies_is_one_sentence(tmp_path):
    running = Running(tmp_path, "--logprobs-mode", "processed_logprobs", *WEIGHTS)
    try:
        policy = make_policy()
        engine = make_engine(running)
        with pytest.raises(ConnectionError, match=r"no vLLM server answers there .* at v1/completions"):
            sample(engine, policy, group_size=64, on_finished=lambda *_: running.stop())
        change(policy)
        with pytest.raises(ConnectionError, match="no vLLM server answers there"):
            sample(engine, policy)
    finally:
        running.stop()


def test_a_server_that_was_started_otherwise_is_refused(tmp_path):
    running = Running(tmp_path, "--logprobs-mode", "processed_logprobs")
    try:
        with pytest.raises(ValueError, match="takes no weights over nccl"):
            VllmServerEngine(running.url)
    finally:
        running.stop()


def test_no_server_is_one_sentence_before_anything_is_trained(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        call(train, tmp_path, "rollout=vllm_server", "rollout.url=http://127.0.0.1:9")
    assert str(ended.value).startswith("bae-train: ") and "no vLLM server answers there" in str(ended.value)


def test_a_server_that_says_nothing_is_one_sentence():
    with socket.create_server(("127.0.0.1", 0)) as mute:
        port = mute.getsockname()[1]
        with pytest.raises(ConnectionError, match=r"took more than 0.5 s over v1/models"):
            VllmServerEngine(f"http://127.0.0.1:{port}", timeout=0.5)
