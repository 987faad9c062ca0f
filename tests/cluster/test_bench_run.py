"""Rounds, comparisons, sweeps, the report, the file and the picture; and the command itself."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tandem.cluster.bench import plot, run, sweep
from tandem.cluster.bench.options import BenchOptions
from tandem.cluster.bench.report import Spread
from tandem.cluster.bench.run import bench, parse_servers
from tandem.cluster.cli import app
from tandem.common.errors import ConfigError, DeadlineExceeded
from tests.cluster.scripted_server import Json, ScriptedServer, Step, plain, serving

SMALL: dict[str, Any] = {"requests": 4, "input_len": 6, "output_len": 3, "warmup": 1, "concurrency": 2}


def small(**changes: Any) -> dict[str, Any]:
    return SMALL | changes


@pytest.fixture
def fast() -> Iterator[ScriptedServer]:
    with serving(partial(plain, first=0.01, gap=0.002)) as server:
        yield server


@pytest.fixture
def slow() -> Iterator[ScriptedServer]:
    with serving(partial(plain, first=0.2, gap=0.002)) as server:
        yield server


def measured(path: Path, **flags: Any) -> Json:
    assert bench(BenchOptions(save=path, **small(**flags))) == 0
    return json.loads(path.read_text())


def test_servers_get_the_same_prompts_in_turns_and_each_round_its_own(
    fast: ScriptedServer, slow: ScriptedServer, tmp_path: Path
) -> None:
    saved = measured(tmp_path / "x.json", servers=[f"a={fast.url}", f"b={slow.url}"], rounds=3)
    assert [(one["round"], one["server"]) for one in saved["runs"]] == [
        (0, "a"), (0, "b"), (1, "b"), (1, "a"), (2, "a"), (2, "b"),
    ]  # fmt: skip
    sent = [sorted(body["prompt"] for body in server.bodies) for server in (fast, slow)]
    assert sent[0] == sent[1]
    assert len({tuple(prompt) for prompt in sent[0]}) == 3 * (4 + 1)


def test_the_report_has_medians_spreads_and_ratios_of_each_round(
    fast: ScriptedServer, slow: ScriptedServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = measured(tmp_path / "x.json", servers=[f"a={fast.url}", f"b={slow.url}"], rounds=3)
    ttft = {
        name: {one["round"]: one["parts"]["all"]["ttft"]["p50"] for one in saved["runs"] if one["server"] == name}
        for name in "ab"
    }
    (row,) = (row for row in saved["comparison"] if row["measure"] == "TTFT p50 ms")
    for name, values in ttft.items():
        expected = {
            "median": statistics.median(values.values()),
            "min": min(values.values()),
            "max": max(values.values()),
        }
        assert row["values"][name] == expected
    ratios = [ttft["a"][number] / ttft["b"][number] for number in range(3)]
    assert row["ratios"]["b"] == {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}
    assert ratios[0] < 0.9  # 10 ms against 200 ms
    printed = capsys.readouterr().out
    assert "a / b" in printed and "TTFT p50 ms" in printed and "processor time an output token" in printed


def test_the_file_has_the_settings_the_versions_every_request_and_no_key(fast: ScriptedServer, tmp_path: Path) -> None:
    saved = measured(
        tmp_path / "x.json", servers=[fast.url], save_requests=True, api_key="secret", goodput=["ttft:9000"]
    )
    assert saved["options"]["requests"] == 4 and saved["versions"]["tandem"]
    assert saved["servers"] == [{"name": "server", "url": fast.url, "model": "scripted"}]
    (only,) = saved["runs"]
    assert only["parts"]["all"]["good_share"] == 1.0
    assert [request["counts"] for request in only["requests"]["all"]] == [[1, 1, 1]] * 4
    assert all(request["times"] == sorted(request["times"]) for request in only["requests"]["all"])
    assert "secret" not in (tmp_path / "x.json").read_text()
    assert "Bearer secret" in fast.heads[0]


def test_failed_requests_are_told_and_are_the_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def script(body: Json) -> Iterator[Step]:
        yield from (503, b"no room") if len(server.bodies) in (3, 5) else plain(body)

    with serving(script) as server:
        options = BenchOptions(servers=[server.url], save=tmp_path / "x.json", save_requests=True, **SMALL)
        assert bench(options) == 1
    (only,) = json.loads((tmp_path / "x.json").read_text())["runs"]
    assert only["parts"]["all"]["errors"] == {"HTTP 503": {"count": 2, "first": "no room"}}
    assert only["parts"]["all"]["requests"] == 4
    told = [request["failure"] and request["failure"]["kind"] for request in only["requests"]["all"]]
    assert (told.count("HTTP 503"), told.count(None)) == (2, 2)
    assert "2 of 4 failed: HTTP 503: no room" in capsys.readouterr().out


def test_nothing_but_failures_is_a_report_too(tmp_path: Path) -> None:
    def refuse(_: Json) -> Iterator[Step]:
        yield from (500, b"broken")

    with serving(refuse) as server:
        options = BenchOptions(servers=[server.url], plot=tmp_path / "x.svg", **small(warmup=0))
        assert bench(options) == 1


def test_what_was_measured_before_an_error_is_reported(
    fast: ScriptedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = run.measure, list[str]()

    def once(*arguments: Any) -> Any:
        calls.append("")
        if len(calls) > 1:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(run, "measure", once)
    with pytest.raises(KeyboardInterrupt):
        bench(BenchOptions(servers=[fast.url], save=tmp_path / "x.json", rounds=5, **SMALL))
    assert len(json.loads((tmp_path / "x.json").read_text())["runs"]) == 1


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["http://a", "http://b"], "NAME=URL"),
        (["a=http://a", "a=http://b"], "NAME=URL"),
        (["a=http://a", "b=http://a/"], "named twice"),
        (["=http://a", "b=http://b"], "NAME=URL"),
    ],
)
def test_servers_that_cannot_be_told_apart(arguments: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        parse_servers(arguments)


def test_servers() -> None:
    assert parse_servers(["http://h:1/?a=b"]) == {"server": "http://h:1/?a=b"}
    assert parse_servers(["a=http://h:1/", "b=https://g"]) == {"a": "http://h:1", "b": "https://g"}


def test_a_spread() -> None:
    assert Spread.of([3.0, None, 1.0, 10.0]) == Spread(3.0, 1.0, 10.0)
    assert Spread.of([None]) is None
    assert str(Spread(1234.56, 0.0123, 2e6)) == "1,235 (0.0123–2,000,000)"


# --------------------------------------------------------------------------------------------------------------- sweeps
@pytest.mark.parametrize(("suffix", "magic"), [("png", b"\x89PNG\r\n\x1a\n"), ("svg", b"<?xml")])
def test_a_curve_and_its_picture(fast: ScriptedServer, tmp_path: Path, suffix: str, magic: bytes) -> None:
    picture = tmp_path / f"curve.{suffix}"
    flags = small(concurrency=None, requests=6)
    saved = measured(tmp_path / "x.json", servers=[fast.url], sweep="concurrency=1,3", plot=picture, rounds=2, **flags)
    assert [(one["point"], one["round"]) for one in saved["runs"]] == [("1", 0), ("1", 1), ("3", 0), ("3", 1)]
    assert fast.most_active == 3
    assert len({tuple(body["prompt"]) for body in fast.bodies}) == 4 * (6 + 1)
    content = picture.read_bytes()
    assert content.startswith(magic) and len(content) > 5_000


def test_points_of_a_rate_sweep() -> None:
    found = sweep.points(BenchOptions(sweep="rate=0.5,2"))
    assert [(point.label, point.options.request_rate) for point in found] == [("0.5", 0.5), ("2", 2.0)]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("concurrency", "write concurrency="),
        ("speed=1", "write concurrency="),
        ("concurrency=1,,2", "write concurrency="),
        ("concurrency=0", "whole numbers"),
        ("concurrency=1.5", "whole numbers"),
        ("rate=fast", "above 0"),
        ("rate=0", "above 0"),
        ("workers=2", "xPyD"),
        ("workers=1p0d", "at least 1 decode"),
    ],
)
def test_sweeps_that_mean_nothing(text: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        sweep.points(BenchOptions(sweep=text))


def test_flags_of_an_open_loop_go_with_a_sweep_of_its_rate(fast: ScriptedServer, tmp_path: Path) -> None:
    flags = {"burstiness": float("inf"), "max_concurrency": 9, "concurrency": None}
    saved = measured(tmp_path / "x.json", servers=[fast.url], sweep="rate=50,100", **flags)
    assert [one["point"] for one in saved["runs"]] == ["50", "100"]
    assert saved["options"]["burstiness"] == "inf"


@pytest.mark.parametrize("flags", [{"goodput": ["speed:1"]}, {"extra_body": "{"}, {"rounds": 2, "trace": Path("x")}])
def test_what_cannot_be_read_is_told_before_anything_is_sent(fast: ScriptedServer, flags: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        bench(BenchOptions(servers=[fast.url], **small(**flags)))
    assert fast.bodies == []


def test_a_sweep_that_contradicts_the_load(fast: ScriptedServer) -> None:
    with pytest.raises(ConfigError, match="open one"):
        bench(BenchOptions(servers=[fast.url], sweep="rate=1,2", **SMALL))
    assert fast.bodies == []


def worker(role: str, state: str = "ready") -> Json:
    return {"role": role, "state": state}


def test_a_worker_sweep_scales_and_waits_until_the_router_has_them(
    fast: ScriptedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Any, str]] = []

    def scale(wanted: dict[str, int], target: Any, _: float) -> None:
        """The controller is content at once; the router knows the new workers one look later."""
        asked.append((wanted, target.url))
        sizes = [worker(role) for role, count in wanted.items() for _ in range(count)]
        pending = iter([[worker("decode"), worker("prefill", "draining")]])
        fast.next_status = lambda: {"workers": next(pending, sizes)}

    monkeypatch.setattr("tandem.cluster.scale.scale", scale)
    saved = measured(tmp_path / "x.json", servers=[fast.url], sweep="workers=1p1d,2p1d", plot=tmp_path / "x.png")
    assert asked == [({"prefill": 1, "decode": 1}, fast.url), ({"prefill": 2, "decode": 1}, fast.url)]
    assert [one["point"] for one in saved["runs"]] == ["1p1d", "2p1d"]
    assert fast.looks == 4


def test_a_pool_that_never_gets_ready(fast: ScriptedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tandem.cluster.scale.scale", lambda *_: None)
    monkeypatch.setattr(sweep, "SEEN_WITHIN", 0.0)
    with pytest.raises(DeadlineExceeded, match="still sees"):
        sweep.reach({"prefill": 1, "decode": 1}, fast.url, None)


def test_a_worker_sweep_has_one_server() -> None:
    with pytest.raises(ConfigError, match="name one server"):
        sweep.points(BenchOptions(servers=["a=http://a", "b=http://b"], sweep="workers=1p1d"))


def test_a_picture_without_matplotlib_is_refused_before_anything_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plot.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"tandem\[bench\]"):
        bench(BenchOptions(servers=["http://127.0.0.1:1"], plot=Path("x.png")))


# -------------------------------------------------------------------------------------------------------------- command
def test_the_command(fast: ScriptedServer) -> None:
    arguments = ["bench", f"a={fast.url}", "--num-prompts", "2", "--random-input-len", "5", "--output-len", "2"]
    result = CliRunner().invoke(app, [*arguments, "--goodput", "ttft:1000", "itl:50"])
    assert result.exit_code == 0, result.output
    assert "goodput" in result.output
    assert {len(body["prompt"]) for body in fast.bodies} == {5}


def test_nobody_there_is_told() -> None:
    result = CliRunner().invoke(app, ["bench", "http://127.0.0.1:1"])
    assert isinstance(result.exception, ConfigError)
    assert "no answer from http://127.0.0.1:1" in str(result.exception)
