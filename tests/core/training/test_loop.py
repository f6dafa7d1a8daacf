"""The loop: it learns, ends well however it ends, and goes on as if it had never stopped."""

import errno
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mochi_core.errors import TrainingError
from mochi_core.training import snapshot as snapshots
from mochi_core.training.loop import FINAL, LoopOptions, run
from mochi_core.training.metrics import NAME, read_metrics
from mochi_core.training.optimizer import OptimizerOptions

sys.path.insert(0, str(Path(__file__).parent))

from toy_training import ToyTask, options

TOY = Path(__file__).parent / "toy_training.py"


def losses(folder):
    return [(line["step"], line["loss"]) for line in read_metrics(folder)]


def final(folder):
    return (folder / f"{FINAL}.safetensors").read_bytes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A training of 30 steps that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    run(ToyTask(), options(), folder)
    return folder


def test_learns_and_leaves_its_files(whole):
    curve = [loss for _, loss in losses(whole)]
    assert len(curve) == 30 and sum(curve[-5:]) < 0.8 * sum(curve[:5])
    assert [path.name for path in snapshots.snapshots(whole)] == [
        "step_00000025.safetensors",
        "step_00000030.safetensors",
    ]
    assert (whole / "step_000005.safetensors").exists() and final(whole)


def test_each_step_takes_its_own_micro_batches(tmp_path):
    task = ToyTask()
    run(task, options(4, accumulation=3), tmp_path)
    assert task.seen == list(range(12))


def test_accumulated_gradient_is_the_mean(tmp_path):
    """Two micro-batches a step learn what one of twice the size does."""
    plain = OptimizerOptions(rate=1e-2, weight_decay=0, schedule="constant")

    class Both(ToyTask):
        def loss(self, index):
            first, second = super().loss(2 * index), super().loss(2 * index + 1)
            return type(first)((first.value + second.value) / 2)

    one, two = Both(), ToyTask()
    run(one, options(5, accumulation=1, optimizer=plain), tmp_path / "one")
    run(two, options(5, accumulation=2, optimizer=plain), tmp_path / "two")
    torch.testing.assert_close(one.trained[0].weight, two.trained[0].weight, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_interrupted_and_taken_up_is_bit_equal(name, tmp_path):
    own = options(20, optimizer=OptimizerOptions(name=name, rate=1e-2, warmup=3))
    run(ToyTask(), own, tmp_path / "whole")

    def stop(done):
        if done.step == 13:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(ToyTask(), own, tmp_path / "broken", stop)
    assert (tmp_path / "broken" / f"{FINAL}.safetensors").exists()
    run(ToyTask(), own, tmp_path / "broken")
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")
    assert final(tmp_path / "broken") == final(tmp_path / "whole")


def test_killed_and_taken_up_is_bit_equal(whole, tmp_path):
    """SIGKILL, twice, wherever it happens to hit."""
    for wanted in (7, 16):
        process = subprocess.Popen([sys.executable, str(TOY), str(tmp_path), "30"])
        deadline = time.monotonic() + 60
        while not (tmp_path / NAME).exists() or len((tmp_path / NAME).read_text().splitlines()) < wanted:
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (tmp_path / f"{FINAL}.safetensors").exists()
    assert snapshots.newest(tmp_path).step >= 5
    run(ToyTask(), options(), tmp_path)
    assert losses(tmp_path) == losses(whole)
    assert final(tmp_path) == final(whole)


def test_average_is_what_is_written_and_learning_goes_on_without_it(tmp_path):
    task = ToyTask()
    run(task, options(10), tmp_path)
    written = load_file(tmp_path / f"{FINAL}.safetensors")
    kept = snapshots.newest(tmp_path)
    torch.testing.assert_close(written["0.weight"], kept.part("average")["0.weight"], rtol=0, atol=0)
    assert torch.equal(task.trained[0].weight, kept.part("parameters")["0.weight"])
    assert not torch.equal(written["0.weight"], task.trained[0].weight)


def test_loss_that_is_no_number_names_its_clip_and_keeps_the_good_state(tmp_path):
    task = ToyTask(bad=(13,))
    with pytest.raises(TrainingError, match=r"step 7 is nan.*clip 13"):
        run(task, options(), tmp_path)
    kept = snapshots.newest(tmp_path)
    assert kept.step == 6
    assert all(torch.isfinite(parameter).all() for parameter in task.trained.parameters())
    assert torch.equal(kept.part("parameters")["0.weight"], task.trained[0].weight)
    run(ToyTask(), options(8), tmp_path / "other")  # and nothing of it is global


def test_gradient_that_is_no_number_stops_too(tmp_path):
    class Steep(ToyTask):
        def loss(self, index):
            loss = super().loss(index)
            root = (self.trained[0].bias * 0).abs().sum().sqrt()  # its slope is infinite
            return type(loss)(loss.value + root, loss.clips) if index == 4 else loss

    task = Steep()
    with pytest.raises(TrainingError, match="length of its gradient nan"):
        run(task, options(), tmp_path)
    assert snapshots.newest(tmp_path).step == 2


def test_memory_that_runs_out_in_an_update_leaves_the_snapshot_before_it(tmp_path, monkeypatch, caplog):
    """AdamW has changed some of the parameters by then, and not the others."""
    real = torch.optim.AdamW.step

    def torn(self, *rest):
        if float(self.state[self.param_groups[0]["params"][0]].get("step", 0)) == 7:
            with torch.no_grad():
                self.param_groups[0]["params"][0].add_(1)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, *rest)

    with monkeypatch.context() as context:
        context.setattr(torch.optim.AdamW, "step", torn)
        with pytest.raises(torch.OutOfMemoryError):
            run(ToyTask(), options(10), tmp_path / "torn")
    assert snapshots.newest(tmp_path / "torn").step == 5 and "Step 8 was broken off" in caplog.text
    run(ToyTask(), options(10), tmp_path / "torn")
    run(ToyTask(), options(10), tmp_path / "whole")
    assert losses(tmp_path / "torn") == losses(tmp_path / "whole")


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_signals_wait_for_the_update_and_for_the_saving(kind, tmp_path, monkeypatch):
    """One comes in the middle of an update, and again while it is saved."""
    step, write = torch.optim.AdamW.step, snapshots.write_safetensors

    def interrupted(self, *rest):
        done = step(self, *rest)
        if float(self.state[self.param_groups[0]["params"][0]]["step"]) == 7:
            signal.raise_signal(kind)
        return done

    def again(*rest):
        signal.raise_signal(kind)
        write(*rest)

    before = signal.signal(kind, signal.default_int_handler)
    try:
        with monkeypatch.context() as context:
            context.setattr(torch.optim.AdamW, "step", interrupted)
            context.setattr(snapshots, "write_safetensors", again)
            with pytest.raises(KeyboardInterrupt):
                run(ToyTask(), options(10, save_every=0), tmp_path)
        assert signal.getsignal(kind) is signal.default_int_handler
    finally:
        signal.signal(kind, before)
    assert snapshots.newest(tmp_path).step == 7 and final(tmp_path)


def test_nothing_learnt_leaves_nothing(tmp_path):
    """Whoever corrects the settings that failed at once can go on in that folder."""
    with pytest.raises(TrainingError, match="step 1 is nan"):
        run(ToyTask(bad=(0,)), options(), tmp_path)
    assert snapshots.newest(tmp_path) is None and not list(tmp_path.glob("final*"))
    run(ToyTask(), options(5), tmp_path)


def test_parts_that_a_crash_left_are_removed(tmp_path):
    (tmp_path / "snapshots").mkdir()
    (tmp_path / "snapshots" / ".step_00000003.safetensors.x7.part").write_bytes(b"half")
    run(ToyTask(), options(5), tmp_path)
    assert [path.name for path in (tmp_path / "snapshots").iterdir()] == ["step_00000005.safetensors"]


def test_other_settings_are_named(whole):
    with pytest.raises(TrainingError, match=r"loop\.optimizer\.rate was 0\.01 and is 0\.02"):
        run(ToyTask(), options(optimizer=OptimizerOptions(rate=2e-2, warmup=3)), whole)
    with pytest.raises(TrainingError, match=r"task\.data\.rate was 1 and is 2"):
        run(ToyTask(rate=2), options(), whole)


def test_how_often_things_are_saved_may_change(whole, tmp_path):
    run(ToyTask(), options(30, save_every=0, keep=5), tmp_path)
    assert final(tmp_path) == final(whole)
    assert [path.name for path in snapshots.snapshots(tmp_path)] == ["step_00000030.safetensors"]


def test_full_disk_leaves_the_older_snapshot_whole(tmp_path, monkeypatch):
    run(ToyTask(), options(5), tmp_path / "small")
    real = snapshots.write_safetensors

    def full(path, *rest):
        if path.name == "step_00000010.safetensors":
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, *rest)

    monkeypatch.setattr(snapshots, "write_safetensors", full)
    with pytest.raises(OSError, match="No space left"):
        run(ToyTask(), options(), tmp_path)
    monkeypatch.undo()
    assert [path.name for path in snapshots.snapshots(tmp_path)] == ["step_00000005.safetensors"]
    assert snapshots.newest(tmp_path).step == 5
    run(ToyTask(), options(), tmp_path)
    assert losses(tmp_path)[-1][0] == 30


def test_damaged_snapshot_is_refused_with_a_remedy(tmp_path):
    run(ToyTask(), options(5), tmp_path)
    (path,) = snapshots.snapshots(tmp_path)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(TrainingError, match="Remove it to go on from the one before"):
        run(ToyTask(), options(), tmp_path)


def test_metrics_of_lost_steps_are_taken_out(tmp_path):
    run(ToyTask(), options(5), tmp_path)
    with (tmp_path / NAME).open("a") as file:
        file.write(json.dumps({"step": 6, "loss": 1}) + '\n{"step": 7, "lo')
    run(ToyTask(), options(5), tmp_path)
    assert [step for step, _ in losses(tmp_path)] == [1, 2, 3, 4, 5]


def test_samples_and_watch(tmp_path):
    seen = []
    run(ToyTask(), options(6, sample_every=3), tmp_path, seen.append)
    assert [done.step for done in seen] == [1, 2, 3, 4, 5, 6]
    assert [done.step for done in seen if done.sample] == [3, 6]
    assert seen[2].sample.read_text()
    assert all(done.rate > 0 and done.grad_norm > 0 for done in seen)


def test_gradients_are_clipped(tmp_path):
    seen = []
    tight = OptimizerOptions(name="adamw", rate=1e-2)
    task = ToyTask()
    before = {name: parameter.detach().clone() for name, parameter in task.trained.named_parameters()}
    got = {}
    real = torch.optim.AdamW.step

    def watched(self, *rest):
        got["norm"] = torch.nn.utils.get_total_norm([p.grad for g in self.param_groups for p in g["params"]]).item()
        return real(self, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", watched)
        run(task, options(1, grad_clip=1e-3, optimizer=tight), tmp_path, seen.append)
    assert got["norm"] == pytest.approx(1e-3, rel=1e-3) and seen[0].grad_norm > 1e-2
    assert not torch.equal(before["0.weight"], task.trained[0].weight)


@pytest.mark.parametrize(
    "name, value",
    [("steps", 0), ("accumulation", 0), ("grad_clip", -1.0), ("ema", 1.0), ("keep", 0), ("save_every", -1)],
)
def test_options_that_cannot_be(name, value):
    with pytest.raises(TrainingError, match=f"{name} is {value}"):
        LoopOptions(**{"steps": 10, name: value})
