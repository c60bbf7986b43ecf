"""Trajectories: experts that are killed, damaged or foreign, and unrolled students that fit in memory."""
import json
import shutil
import signal

import pytest
import torch

from ddrepro.core.files import DamagedFile
from ddrepro.core.seeding import keyed_normal
from ddrepro.data.registry import load_data
from ddrepro.distill.unroll import keyed_dropout, trajectory_loss, unroll
from ddrepro.nets.experts import Experts, Segments, Trajectories
from ddrepro.nets.networks import NetSpec
from ddrepro.nets.recipes import Recipe
from ddrepro.nets.training import training_loss
from ddrepro.nets.vectors import run_flat
from helpers import one_thread, run_script, snapshot_digests

QUICK = Recipe("quick expert", 1, 128, "sgd", rate=0.01, momentum=0.)
EPOCHS = 3

TRAIN = '''
import json, sys
from ddrepro.nets.networks import NetSpec
from ddrepro.data.registry import load_data
from ddrepro.nets.recipes import Recipe
from ddrepro.nets.experts import Experts
from helpers import die_at

job = json.loads(sys.argv[1])
die_at(job["nth"], job["moment"])
real = load_data("digits_av").restrict(["image"])
quick = Recipe("quick expert", 1, 128, "sgd", rate=0.01, momentum=0.)
experts = Experts(real, {"image": NetSpec(2, 4)}, job["root"], models=2, epochs=3, recipe=quick)
print(experts.open(progress=False).trained)
'''


@pytest.fixture(scope="module")
def real(): return load_data("digits_av").restrict(["image"])

@pytest.fixture(autouse=True)
def as_the_children_compute():
    with one_thread(): yield

def experts(real, root, **more):
    options = dict(specs={"image": NetSpec(2, 4)}, models=2, epochs=EPOCHS, recipe=QUICK) | more
    return Experts(real=real, root=root, **options)

def child(root, nth=0, moment=None):
    job = json.dumps(dict(root=str(root), nth=nth, moment=moment))
    return run_script(TRAIN, job)

@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    "The folder of a buffer that nobody disturbs"
    root = tmp_path_factory.mktemp("undisturbed")
    done = child(root)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "2" and len(snapshot_digests(root)) == 2 * (EPOCHS + 1)
    return root


@pytest.mark.parametrize("nth, moment, left", [(1, "half written", 2), (3, "just moved", 2), (6, "half written", 1)])
def test_killed_while_experts_train(undisturbed, tmp_path, nth, moment, left):
    "It goes on at the expert it was in, and every file ends in the same bits"
    assert child(tmp_path, nth, moment).returncode == -signal.SIGKILL
    assert len(snapshot_digests(tmp_path)) == (nth - 1 if moment == "half written" else nth)
    done = child(tmp_path)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == left and snapshot_digests(tmp_path) == snapshot_digests(undisturbed)


def truncated(content): return content[:len(content) // 2]
def flipped(content): return content[:-3] + bytes([content[-3] ^ 1]) + content[-2:]
def flipped_in_the_header(content): return content[:60] + bytes([content[60] ^ 1]) + content[61:]
def foreign(content): return b"\x80\x04K\x01." * 50

@pytest.mark.parametrize("damage", [truncated, flipped, flipped_in_the_header, foreign])
def test_damaged_snapshot(real, undisturbed, tmp_path, capsys, damage):
    buffer = experts(real, tmp_path)
    shutil.copytree(undisturbed, tmp_path, dirs_exist_ok=True)
    file = buffer.trajectories.path(1, 2)
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(DamagedFile, match="expert001-epoch002"):
        Trajectories(buffer.trajectories.folder, buffer.trajectories.key).load(1, 2)
    assert buffer.open(progress=False).trained == 0
    buffer.load(1, 2)
    assert buffer.trained == 1 and snapshot_digests(tmp_path) == snapshot_digests(undisturbed)
    assert "training expert 1 again" in capsys.readouterr().out


def test_buffer_of_something_else_is_refused(real, undisturbed):
    folder = experts(real, undisturbed).trajectories.folder
    other = load_data("digits_av").restrict(["audio"])
    with pytest.raises(ValueError, match="another layout and specs .*width"):
        experts(real, None, folder=folder, specs={"image": NetSpec(2, 8)}).open()
    with pytest.raises(ValueError, match="another data and layout and specs"):
        experts(other, None, folder=folder, specs={"audio": NetSpec(3, 4)}).open()
    with pytest.raises(ValueError, match="another recipe"):
        experts(real, None, folder=folder, recipe=Recipe("quick expert", 1, 64, "sgd", rate=0.01, momentum=0.)).open()
    assert experts(real, None, folder=folder).open().trained == 0

def test_more_epochs_than_the_buffer_has(real, undisturbed):
    Segments(models=2, max_start=2, span=2, epochs=EPOCHS, seed=0)
    with pytest.raises(ValueError, match="needs experts trained for 4 epochs, and these have 3; use max_start up to 2"):
        Segments(models=2, max_start=3, span=2, epochs=EPOCHS, seed=0)
    with pytest.raises(ValueError, match="use max_start up to 0"):
        Segments(models=2, max_start=1, span=9, epochs=EPOCHS, seed=0)
    assert experts(real, undisturbed).open().trained == 0
    assert experts(real, undisturbed, epochs=EPOCHS + 1).trajectories.complete(0, EPOCHS + 1) is False


LABELS = torch.arange(8) % 4

def student(real, undisturbed):
    "(loss, start, target) of a convolutional student with keyed dropout, in float64"
    buffer = experts(real, undisturbed)
    net = buffer.net.double()
    def loss(vectors, inputs, step):
        image = keyed_dropout(inputs["image"], .1, 0, "test/dropout", step)
        return training_loss(run_flat(net, buffer.layout, vectors["parameters"], {"image": image}), LABELS)
    return loss, buffer.load(0, 0).double(), buffer.load(0, 2).double()

def gradients(loss, start, target, steps, **how):
    S = keyed_normal((8, 1, 32, 32), 0, "test/S").double().requires_grad_()
    rate = torch.tensor(.05, dtype=torch.float64, requires_grad=True)
    final = unroll(loss, {"parameters": start}, {"parameters": rate}, {"image": S}, steps, **how)
    return torch.autograd.grad(trajectory_loss(final["parameters"], start, target), [S, rate])

@pytest.mark.parametrize("graphs", [0, 1, 3])
def test_disk_equals_memory_bit_for_bit(real, undisturbed, tmp_path, graphs):
    problem = student(real, undisturbed)
    spilled = gradients(*problem, 5, graphs=graphs, spill=tmp_path / "new folder")
    for a, b in zip(gradients(*problem, 5, graphs=graphs), spilled): assert torch.equal(a, b)
    assert not list((tmp_path / "new folder").iterdir())

def test_kept_graphs_equal_rebuilt_ones(real, undisturbed):
    problem = student(real, undisturbed)
    for a, b in zip(gradients(*problem, 5, graphs=0), gradients(*problem, 5, graphs=5)):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-14)

def test_gradients_equal_finite_differences(real, undisturbed):
    "An independent check: no autograd beyond first derivatives"
    loss, start, target = student(real, undisturbed)
    way, S = (keyed_normal((8, 1, 32, 32), 0, stream).double() for stream in ("test/way", "test/S"))
    h = 1e-6

    def value(S, rate):
        theta = start
        for step in range(5):
            leaf = theta.detach().requires_grad_()
            theta = theta - rate * torch.autograd.grad(loss({"parameters": leaf}, {"image": S}, step), leaf)[0]
        return trajectory_loss(theta, start, target).item()
    of_S, of_rate = gradients(loss, start, target, 5)
    along_way = (value(S + h * way, .05) - value(S - h * way, .05)) / (2 * h)
    along_rate = (value(S, .05 + h) - value(S, .05 - h)) / (2 * h)
    assert along_way == pytest.approx((of_S * way).sum().item(), rel=1e-5)
    assert along_rate == pytest.approx(of_rate.item(), rel=1e-5)


PEAK = '''
import resource, sys, torch
from ddrepro.nets.networks import NetSpec
from ddrepro.core.seeding import keyed_normal
from ddrepro.nets.training import new_net, training_loss
from ddrepro.nets.vectors import flatten, layout_of, run_flat
from ddrepro.distill.unroll import trajectory_loss, unroll

torch.set_num_threads(1)
net = new_net({"image": NetSpec(3, 16)}, {"image": (3, 32, 32)}, 10, "linear", 0)
layout, start = layout_of(net), flatten(net)
labels = torch.arange(20) % 10
S = keyed_normal((20, 3, 32, 32), 0, "S").requires_grad_()
rate = torch.tensor(.01, requires_grad=True)
steps, spill = int(sys.argv[1]), sys.argv[2] or None

def loss(v, inputs, step): return training_loss(run_flat(net, layout, v["p"], {"image": inputs["image"]}), labels)
def memory(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

before = memory()
final = unroll(loss, {"p": start}, {"p": rate}, {"image": S}, steps, spill=spill)["p"]
trajectory_loss(final, start, start + .01).backward()
print((memory() - before) / 1024, start.nbytes / 2**20)
'''

@pytest.mark.parametrize("spilled", [False, True])
def test_memory_of_eighty_steps(tmp_path, spilled):
    "Peak memory (MiB) is at most 1.2 times that of five steps, and the snapshots"
    peak = {}
    for steps in (5, 80):
        done = run_script(PEAK, str(steps), str(tmp_path) if spilled else "")
        assert done.returncode == 0, done.stderr
        peak[steps], snapshot = map(float, done.stdout.split())
    assert peak[80] <= 1.2 * peak[5] + (2 if spilled else 80) * snapshot + 2      # 2 MiB of bookkeeping
