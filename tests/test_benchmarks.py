# SPDX-License-Identifier: Apache-2.0
"""The benchmarks say what they find: rounds, targets, cold files, the checkpoint, the page of figures."""

from __future__ import annotations

import importlib
import json
import mmap
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).parents[1]
NAMES = (
    "measure", "chart", "report", "pagecache", "inside", "make_checkpoint", "memory_group", "loading",
)  # fmt: skip


@pytest.fixture
def bench(monkeypatch):
    """The modules of benchmarks/, which import each other by their bare names."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in NAMES})
    for name in NAMES:
        sys.modules.pop(name, None)


@pytest.fixture
def small(bench, monkeypatch):
    """Shapes of a few kilobytes."""
    sizes = {"_D_MODEL": 16, "_D_FF": 32, "_D_KV": 4, "_HEADS": 2, "_INNER": 8, "_VOCAB": 128}
    for name, size in sizes.items():
        monkeypatch.setattr(bench.make_checkpoint, name, size)
    return bench.make_checkpoint


# -- rounds and targets ----------------------------------------------------------------------------


def answers(*numbers: float):
    """A stand-in for a process: each call prints the next number as `total_s`."""
    left = list(numbers)

    def run(command, environment):
        return subprocess.CompletedProcess(command, 0, json.dumps({"total_s": left.pop(0)}), "")

    return run


def test_ratios_are_taken_round_by_round_and_warm_ups_left_out(bench):
    m = bench.measure
    sides = {
        "ours": m.Side("", within=answers(99, 1, 2, 9)),
        "peer": m.Side("", within=answers(99, 2, 8, 9)),
    }
    found = m.compare("x", sides, [m.Target("half", "total_s", most=0.5, against="peer")], runs=3)
    assert found.figures["ours"]["total_s"] == m.Figure(2, 1, 9)
    assert found.figures["peer"]["total_s"] == m.Figure(8, 2, 9)
    # The medians' ratio is 0.25; that of the rounds 0.5, 0.25 and 1 is 0.5.
    assert found.ratios == {"peer": {"total_s": 0.5}}
    assert [(v.found, v.is_met) for v in found.verdicts] == [(0.5, True)]


def test_targets_are_missed_and_not_measured(bench):
    m = bench.measure
    targets = [
        m.Target("quick", "total_s", most=1.0),
        m.Target("slow", "total_s", least=3.0),
        m.Target("exact", "total_s", most=2.0, least=2.0),
        m.Target("no such side", "total_s", most=1.0, against="nobody"),
        m.Target("no such figure", "other_s", most=1.0),
    ]
    found = m.compare("x", {"ours": m.Side("", within=answers(2))}, targets, runs=1, warmups=0)
    assert [v.is_met for v in found.verdicts] == [False, False, True, None, None]


def test_no_side_always_comes_after_the_same_one(bench):
    names = ["a", "b", "c", "d"]
    for count in (2, 3, 4):
        orders = [bench.measure.order(names[:count], index) for index in range(6)]
        assert orders[0] == names[:count] and all(sorted(one) == orders[0] for one in orders)
        before = {tuple(one[i : i + 2]) for one in orders for i in range(count - 1)}
        assert len(before) >= count * (count - 1) * 0.8


def test_a_program_runs_in_a_process_of_its_own_after_its_preparation(bench):
    m, called = bench.measure, []
    program = "import json, os; print('noise'); print(json.dumps(dict(pid=os.getpid(), total_s=3.0)))"
    sides = {
        "ours": m.Side(program, before=lambda: called.append("ours")),
        "twice": m.Side(lambda found: f"print('{{\"total_s\": {found['ours']['total_s'] * 2}}}')"),
    }
    found = m.compare("x", sides, runs=2, warmups=1)
    assert called == ["ours"] * 3
    assert found.figures["ours"]["pid"].least != found.figures["ours"]["pid"].most
    assert found.figures["twice"]["total_s"].median == 6.0


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/stat")
def test_what_others_take_of_the_processors_is_noticed(bench):
    spin = "import time; end = time.monotonic() + {}\nwhile time.monotonic() < end: pass"
    before = bench.measure._clocks()
    assert bench.measure._disturbance(before, before) is None
    subprocess.run([sys.executable, "-c", spin.format(1.0)], check=True)
    alone = bench.measure._disturbance(before, bench.measure._clocks())
    other = subprocess.Popen([sys.executable, "-c", spin.format(3.0)])
    before = bench.measure._clocks()
    while (now := bench.measure._clocks())[0] - before[0] < 1.2:
        pass
    disturbed = bench.measure._disturbance(before, now)
    # What we waited for is ours; what still runs is not. Others may be at work, so no upper bounds.
    assert alone is not None and disturbed is not None and disturbed > 0.2
    other.wait()


def test_a_failure_ends_the_benchmark_or_is_a_finding(bench):
    m = bench.measure
    with pytest.raises(SystemExit, match=r"(?s)'ours' failed.*ZeroDivisionError"):
        m.compare("x", {"ours": "1 / 0"}, runs=1, warmups=0)
    target = m.Target("quick", "total_s", most=1.0)
    killed = m.Side("import os; os.kill(os.getpid(), 9)", may_fail=True)
    found = m.compare("x", {"ours": killed, "peer": "print('{}')"}, [target], runs=1, warmups=0)
    assert found.failures == {"ours": "killed by the system"}
    assert [(v.found, v.is_met) for v in found.verdicts] == [(None, False)]


def test_results_of_other_rows_are_kept_on_the_same_machine_only(bench, tmp_path, monkeypatch):
    m, file = bench.measure, tmp_path / "results" / "latest.json"
    first = m.compare("first", {"ours": m.Side("", within=answers(1))}, runs=1, warmups=0)
    second = m.compare("second", {"ours": m.Side("", within=answers(2))}, runs=1, warmups=0)
    again = m.compare("first", {"ours": m.Side("", within=answers(3))}, runs=1, warmups=0)
    m.write([first, second], file)
    assert m.write([again], file) == [again, second]
    assert [m.read(entry) for entry in json.loads(file.read_text())["results"]] == [again, second]
    monkeypatch.setattr(m, "machine", lambda: {"cpu": "another"})
    assert m.write([first], file) == [first]


# -- cold and warm -----------------------------------------------------------------------------------

linux = pytest.mark.skipif(sys.platform != "linux", reason="asks Linux about its page cache")


@linux
def test_files_are_evicted_warmed_and_looked_at(bench, tmp_path):
    file, empty = tmp_path / "weights", tmp_path / "empty"
    file.write_bytes(b"x" * (3 << 20))
    empty.touch()
    assert bench.pagecache.resident(file) == 1.0
    try:
        bench.pagecache.evict([file, empty])
    except SystemExit:
        pytest.skip("the folder for temporary files is in memory")
    assert bench.pagecache.resident(file) <= bench.pagecache.MOST_RESIDENT
    bench.pagecache.warm([file])
    assert bench.pagecache.resident(file) == 1.0


@linux
def test_files_that_stay_in_memory_are_not_called_cold(bench, tmp_path):
    file = tmp_path / "weights"
    file.write_bytes(b"x" * (1 << 20))
    # The kernel keeps pages that a process has mapped.
    with open(file, "rb") as stream, mmap.mmap(stream.fileno(), 0, prot=mmap.PROT_READ) as view:
        assert sum(view[:: mmap.PAGESIZE]) > 0
        with pytest.raises(SystemExit, match=r"nothing can be measured cold: \{'weights': 1\.0\}"):
            bench.pagecache.evict([file])


# -- the checkpoint ----------------------------------------------------------------------------------


def test_the_large_checkpoint_has_the_shape_that_the_figures_are_about(bench):
    whole = bench.make_checkpoint.tensors(24)
    assert len(whole) == len({tensor.key for tensor in whole}) == 557
    assert sum(tensor.nbytes for tensor in whole) == 5_567_918_080
    shards = [sum(tensor.nbytes for tensor in shard) for shard in bench.make_checkpoint.split(whole)]
    assert len(shards) == 3 and max(shards) < 1.1 * min(shards)


def test_the_checkpoint_is_a_t5_and_made_once(small, tmp_path):
    from safetensors.torch import load_file

    from pretrained import T5ForConditionalGeneration

    made = small.checkpoint(2, tmp_path)
    stamps = {file: file.stat().st_mtime_ns for file in made.iterdir()}
    assert small.checkpoint(2, tmp_path) == made
    assert stamps == {file: file.stat().st_mtime_ns for file in made.iterdir()}
    model, info = T5ForConditionalGeneration.from_pretrained(made, dtype="auto", output_loading_info=True)
    assert not any(info.values()) and model.dtype == torch.bfloat16
    stored = {key: value for file in made.glob("*.safetensors") for key, value in load_file(file).items()}
    assert list(stored) and all(torch.equal(model.state_dict()[key], stored[key]) for key in stored)
    assert 0.7 < stored["shared.weight"].float().std() < 1.3
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[5, 6]]), decoder_input_ids=torch.tensor([[0]])).logits
    assert logits.isfinite().all()


def test_a_checkpoint_that_is_not_whole_is_made_again(small, tmp_path):
    made = small.checkpoint(1, tmp_path)
    shard = sorted(made.glob("*.safetensors"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    assert small.checkpoint(1, tmp_path) == made and shard.read_bytes() == whole
    (made / "model.safetensors.index.json").unlink()
    shard.write_bytes(bytes(len(whole)))
    small.checkpoint(1, tmp_path)
    assert shard.read_bytes() == whole


def test_a_full_disk_is_said_before_anything_is_written(small, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10**6))
    with pytest.raises(SystemExit, match=r"t5-1-layers: 0\.0 GB and 1 GB to spare are needed, 0\.0 free"):
        small.checkpoint(1, tmp_path)
    assert not list(tmp_path.rglob("*.safetensors"))


# -- the measured programs ---------------------------------------------------------------------------


@linux
@pytest.mark.slow
def test_the_programs_measure_what_the_rows_show(bench, small, tmp_path):
    at = bench.loading.Setting(small.checkpoint(2, tmp_path), is_quick=True)
    program = at.model(
        "pretrained", "dtype='bfloat16', device_map={'': 'cpu', 'encoder.block': 'disk'}", "again=2"
    )
    side = bench.measure.Side(program, at.warm)
    plain = bench.measure.Side(at.reading(True), at.warm)
    found = bench.measure.compare("x", {"ours": side, "read": plain}, runs=1, warmups=0)
    ours = {name: figure.median for name, figure in found.figures["ours"].items()}
    assert 0 < ours["load_s"] < ours["total_s"] == pytest.approx(ours["load_s"] + ours["forward_s"])
    assert ours["again_s"] > 0
    encoder = [t for t in small.tensors(2) if t.key.startswith("encoder.block")]
    assert ours["disk_bytes"] == sum(t.nbytes for t in encoder)
    assert ours["model_bytes"] == sum(t.nbytes for t in small.tensors(2))
    assert ours["peak_bytes"] > ours["before_bytes"] > 0
    assert found.ratios["read"]["total_s"] > 1


def test_every_target_names_a_figure_that_the_programs_give(bench, monkeypatch, tmp_path):
    given = {
        "load_s", "forward_s", "total_s", "peak_bytes", "above_model_bytes", "again_s", "again_memory_bytes",
        "disk_bytes",
    }  # fmt: skip

    def check(claim, sides, targets, **_):
        assert targets, claim
        for target in targets:
            assert target.figure in given and (target.of or target.figure) in given, claim
            assert target.against is None or target.against in sides, claim
        for side in sides.values():
            program = getattr(side, "program", side)
            compile(
                program if isinstance(program, str) else program({"ours": dict.fromkeys(given, 1.0)}),
                "",
                "exec",
            )
        return bench.measure.Comparison(claim)

    (tmp_path / "model.safetensors").write_bytes(bytes(100))
    monkeypatch.setattr(bench.loading, "compare", check)
    monkeypatch.setattr(bench.loading, "limited", lambda nbytes: answers())
    monkeypatch.setattr(bench.loading, "checkpoint", lambda layers: tmp_path)
    rows = bench.loading.run()
    assert len({row.claim for row in rows}) == len(bench.loading.CASES)
    with pytest.raises(SystemExit, match="no such row: hot; there are warm, cold"):
        bench.loading.run(["hot"])


def test_without_a_memory_group_nothing_is_measured_and_that_is_said(bench, monkeypatch, tmp_path):
    monkeypatch.setattr(bench.loading, "limited", lambda nbytes: None)
    found = bench.loading.limited_memory(bench.loading.Setting(tmp_path, is_quick=True))
    assert not found.figures and found.note.startswith("Not measured: ")


@linux
def test_a_memory_group_kills_what_takes_more_than_its_limit(bench):
    run = bench.memory_group.limited(100 << 20)
    if run is None:
        pytest.skip("no memory group can be made here")
    environment = {"PATH": "/usr/bin:/bin"}
    small, large = (
        f"b = bytearray({n} << 20); b[::4096] = b'x' * len(b[::4096]); print(1)" for n in (10, 300)
    )
    assert run([sys.executable, "-c", small], environment).stdout == "1\n"
    assert run([sys.executable, "-c", large], environment).returncode in (-9, 137)


# -- the page and the picture ------------------------------------------------------------------------


def made_up(bench):
    m = bench.measure
    figures = {
        "ours": {"total_s": m.Figure(2.0, 1.5, 2.5), "peak_bytes": m.Figure(1e9, 1e9, 1e9)},
        "transformers": {"total_s": m.Figure(1.0, 1.0, 1.0)},
    }
    verdicts = [m.Verdict("half of <peer>", "total_s", "transformers", 2.0, 0.5, None, False)]
    failures = {"other": "killed by the system"}
    ratios = {"transformers": {"total_s": 2.0}}
    return m.Comparison("a & b", figures, ratios, verdicts, failures, 3, "2020-01-02 03:04", 1.26, "A note.")


def test_the_page_says_where_we_lose(bench):
    text = bench.report.render({"cpu": "one"}, [made_up(bench)])
    assert "Measured 2020-01-02 (UTC) on: cpu one." in text
    assert "- **a & b.** Missed: half of <peer> (2.00x; the bound is 0.50x)." in text
    assert "- **a & b.** Behind transformers: together 2.00x." in text
    assert "| ours | 2.00 s [1.50 to 2.50 s] | 1.00 GB |" in text
    assert "| transformers | 1.00 s |  |" in text and "| other | killed by the system | |" in text
    assert "A note." in text
    assert "**The machine was not quiet**: other work took 1.3 cores meanwhile" in text
    page = bench.report.put(f"above\n{bench.report.BEGIN}\nold\n{bench.report.END}\nbelow\n", text)
    assert page.startswith("above\n") and page.endswith("\nbelow\n") and "old" not in page and text in page
    with pytest.raises(SystemExit, match="lacks its markers"):
        bench.report.put("nothing", text)


def test_the_picture_has_each_side_and_each_bound(bench, tmp_path):
    bench.chart.draw([made_up(bench)], tmp_path / "x.svg")
    root = ET.parse(tmp_path / "x.svg").getroot()
    texts = [part for node in root.iter("{http://www.w3.org/2000/svg}text") for part in node.itertext()]
    assert ", measured beside other work" in texts
    assert {"a & b", "ours", "transformers", "other", "2.00 s", "killed by the system"} <= set(texts)
    bounds = [node for node in root.iter() if node.get("stroke") == bench.chart._BOUND]
    assert len(bounds) == 1


def test_the_page_and_the_picture_agree_with_the_committed_results(bench, tmp_path):
    machine, results = bench.report.load(bench.report.RESULTS)
    page = bench.report.PAGE.read_text(encoding="utf-8")
    assert bench.report.put(page, bench.report.render(machine, results)) == page
    bench.chart.draw(results, tmp_path / "latest.svg")
    drawn = bench.report.RESULTS.with_suffix(".svg").read_text(encoding="utf-8")
    assert (tmp_path / "latest.svg").read_text(encoding="utf-8") == drawn
