"""Work on a Ray cluster: two nodes on this machine give the bytes of one process, also where one is killed."""

import importlib.util
import os
import shutil
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
from folder_state import read_bytes, read_stamps
from made_images import encode

from helpers.export import predict_folder
from helpers.packing import ImageError, load_packed_study, pack_study
from helpers.packing.image_stream import ImageFiles
from helpers.runtime.cluster import map_tasks
from helpers.runtime.settings import ROOT
from helpers.study import draw_image, find_study_duplicates, load_study
from helpers.xvision import (
    build_backbone,
    load_cohort,
    load_trained_backbone,
    write_feature_cache,
)

pytestmark = pytest.mark.slow
needs_ray = pytest.mark.skipif(
    not importlib.util.find_spec("ray"), reason="needs Ray: pip install -r requirements/cluster.txt"
)
SETTINGS = {"split_name": "official", "side": 16, "shard_images": 4}
UNREADABLE = ("00000005_000.png", "00000021_000.png")


def start_node(start, **options):
    """Starts a node with one core. Ray allows it 30 s, which a busy machine may need more of."""
    for attempt in range(3):
        try:
            return start(num_cpus=1, include_dashboard=False, **options)
        except Exception:
            if attempt == 2:
                raise


@pytest.fixture(scope="module")
def cluster():
    """A cluster of two nodes of one core; `kill` kills the second one as soon as a worker there has a task."""
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_task_oom_retries": "1"}
    import ray
    from ray.cluster_utils import Cluster

    cluster = start_node(lambda **options: Cluster(initialize_head=True, head_node_args=options))
    second = start_node(cluster.add_node)
    raylet = psutil.Process(second.all_processes["raylet"][0].process.pid)

    def kill():
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if any(process.name().startswith("ray::_work") for process in raylet.children(recursive=True)):
                cluster.remove_node(second, allow_graceful=False)
                return
            time.sleep(0.01)

    names = {"address": cluster.address, "add_node": cluster.add_node}
    yield SimpleNamespace(**names, kill=kill, is_killed=lambda: not raylet.is_running())
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture(scope="module")
def noise(make_images, tmp_path_factory):
    """Rows and paths of 45 images at 20 pixels, two of them unreadable; never written to."""
    rows, paths = make_images(tmp_path_factory.mktemp("cluster") / "images", train=25, val=11, test=9, side=20)
    for name in UNREADABLE:
        paths[name].write_bytes(b"<html>")
    return rows, paths


@pytest.fixture(scope="module")
def alone(noise, tmp_path_factory):
    """`noise` packed by one process; never written to."""
    return pack_study(*noise, tmp_path_factory.mktemp("alone"), **SETTINGS)


# In this process


def count_up(start):
    """The function of a call that counts its tasks: one that reads ahead, as packing does."""
    return lambda tasks: (start + number for number in list(tasks))


def test_without_a_cluster_tasks_go_through_one_call_and_ray_is_not_imported():
    assert list(map_tasks(count_up, range(3), 10)) == [10, 11, 12]
    code = "import sys; from helpers.runtime import cluster; print(sum(cluster.map_tasks(lambda: list, 'a'*0)))"
    code += "; assert 'ray' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT / "notebooks", check=True)


def test_without_ray_a_cluster_is_refused_with_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(RuntimeError, match=r"CLUSTER needs Ray: `pip install -r requirements/cluster.txt` here"):
        list(map_tasks(count_up, range(3), 10, cluster="auto"))


# On two nodes


@needs_ray
def test_a_cluster_that_is_not_there_is_refused_with_the_remedy():
    with pytest.raises(RuntimeError, match=r"CLUSTER is 'auto', but no Ray cluster answers there .*ray start --head"):
        list(map_tasks(count_up, range(3), 10, cluster="auto"))


@needs_ray
def test_a_node_killed_while_packing_costs_nothing_and_a_second_call_writes_nothing(cluster, noise, alone, tmp_path):
    killer = threading.Thread(target=cluster.kill)
    killer.start()
    packed = pack_study(*noise, tmp_path / "packed", cluster=cluster.address, **SETTINGS)
    killer.join()
    assert cluster.is_killed(), "no worker of the second node had a task"
    assert sorted(entry["image"] for entry in packed.excluded) == sorted(UNREADABLE)
    assert read_bytes(packed.folder) == read_bytes(alone.folder)
    before = read_stamps(packed.folder)
    pack_study(*noise, packed.folder, cluster=cluster.address, **SETTINGS)
    assert read_stamps(packed.folder) == before


@needs_ray
def test_images_that_workers_cannot_see_are_not_taken_for_unreadable(cluster, noise, tmp_path, monkeypatch):
    monkeypatch.setattr(ImageFiles, "read_one", lambda *_: object())  # here they can be read
    with pytest.raises(
        RuntimeError, match=r"0000.*\.png can be read here, but not on all machines .*a disk that they share"
    ):
        pack_study(*noise, tmp_path / "packed", cluster=cluster.address, **SETTINGS)
    assert not (tmp_path / "packed" / "manifest.json").exists()


@needs_ray
def test_copies_are_found_as_by_one_process(cluster, packed, tmp_path, monkeypatch):
    monkeypatch.setattr("helpers.study.duplicates.MAX_DISTANCE", 110)  # at which different images of a study are near
    found = []
    for name, options in (("here", {}), ("there", {"cluster": cluster.address})):
        study = load_packed_study(shutil.copytree(packed.folder, tmp_path / name))
        found.append(find_study_duplicates(study, **options))
    assert len(found[0]) and found[0].equals(found[1])
    assert (tmp_path / "here" / "duplicates.json").read_bytes() == (tmp_path / "there" / "duplicates.json").read_bytes()


@needs_ray
def test_features_are_those_of_one_process(cluster, phantom_dir, packed, tiny_run, tmp_path):
    of_files, of_study = load_cohort(load_study(phantom_dir)), load_cohort(packed)
    vgg16 = build_backbone("VGG16", side=32, layer="block2_pool")
    for cohort, backbone in ((of_files, vgg16), (of_study, load_trained_backbone(tiny_run))):
        folders = [tmp_path / cohort.name / name for name in ("here", "there")]
        one = write_feature_cache(cohort, backbone, folders[0], batch_size=4)
        two = write_feature_cache(cohort, backbone, folders[1], batch_size=4, cluster=cluster.address)
        assert one.features.any() and np.array_equal(one.features, two.features)
        assert one.facts["codes_sha256"] == two.facts["codes_sha256"]


@needs_ray
def test_an_error_of_a_task_is_the_one_of_this_process(cluster, phantom_dir, tmp_path):
    study = shutil.copytree(phantom_dir, tmp_path / "study")
    cohort = load_cohort(load_study(study))
    path = study / "images" / cohort.rows["image"].iloc[-1]
    path.write_bytes(path.read_bytes()[:-60])
    backbone = build_backbone("VGG16", side=32, layer="block1_pool")
    with pytest.raises(ImageError, match=f"{path.name} cannot be decoded"):
        write_feature_cache(cohort, backbone, tmp_path / "features", cluster=cluster.address)


@needs_ray
def test_a_folder_is_predicted_as_by_one_process_and_once(cluster, tiny_model, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(10):
        (folder / f"{number}.png").write_bytes(encode(np.roll(draw_image(number % 3, size=96)[0], number, 1)))
    (folder / "notes.txt").write_bytes(b"Dear")
    (tmp_path / "one").mkdir(), (tmp_path / "two").mkdir()
    one = predict_folder(tiny_model, folder, tmp_path / "one" / "out.csv", batch_size=4)
    two = predict_folder(tiny_model, folder, tmp_path / "two" / "out.csv", batch_size=4, cluster=cluster.address)
    assert (one.predicted, two.predicted) == (10, 10) and two.unreadable.equals(one.unreadable)
    assert read_bytes(tmp_path / "two") == read_bytes(tmp_path / "one")
    again = predict_folder(tiny_model, folder, two.out, batch_size=4, cluster=cluster.address)
    assert (again.predicted, again.earlier) == (0, 10) and read_bytes(tmp_path / "two") == read_bytes(tmp_path / "one")


# Without memory


@needs_ray
def test_a_worker_without_memory_is_reported_in_a_sentence(cluster):
    def take_memory():  # sent as it is, since workers cannot import this module
        return lambda tasks: [np.ones(2**60, "uint8") for _ in tasks]

    with pytest.raises(
        RuntimeError, match=r"A worker had too little memory for task 1 .*Give its machines more memory"
    ):
        list(map_tasks(take_memory, range(3), cluster=cluster.address))


@needs_ray
def test_a_machine_whose_memory_is_full_is_reported_in_a_sentence(cluster, tmp_path):
    """On a node that Ray takes for full, whose workers it ends; the others are busy meanwhile."""
    import ray

    def prepare():
        return lambda tasks: [time.sleep(25) for _ in tasks]

    assert list(map_tasks(lambda: list, range(3), cluster=cluster.address)) == [0, 1, 2]
    stay_busy = ray.remote(num_cpus=1)(lambda name: (tmp_path / name).touch() or time.sleep(120))
    busy = [stay_busy.remote(f"busy-{number}") for number in range(int(ray.cluster_resources()["CPU"]))]
    while len(list(tmp_path.iterdir())) < len(busy):
        time.sleep(0.01)
    full = {"RAY_memory_usage_threshold": "0.001", "RAY_memory_monitor_refresh_ms": "50"}
    start_node(cluster.add_node, env_vars=full)
    with pytest.raises(RuntimeError, match=r"A machine's memory was full each time that task 1 .*Give its machines"):
        list(map_tasks(prepare, range(3), cluster=cluster.address))
    for reference in busy:
        ray.cancel(reference, force=True)
