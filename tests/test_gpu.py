"""tests/gpu.py on a CPU with tiny sizes: whatever would fail there by a slip would cost minutes of a GPU."""
import json
import subprocess
from types import SimpleNamespace

import gpu

TINY = SimpleNamespace(device="cpu", tiny=True, against=[], parts=None, profile="mnsp")


def lines_of(capfd):
    return [json.loads(line) for line in capfd.readouterr().out.splitlines()]


def test_the_cheap_parts_pass(monkeypatch, capfd):
    """A part that falls at a name that was changed, or that checks nothing."""
    parts = {part: limit for part, limit in gpu.PARTS.items() if part in (gpu.losses, gpu.readings, gpu.read)}
    monkeypatch.setattr(gpu, "PARTS", parts)
    failed = gpu.run_parts(TINY)
    lines = lines_of(capfd)
    assert failed == [], lines
    checks = [line["check"] for line in lines if "check" in line]
    assert checks == ["losses", "bfloat16"] * 4 + ["readings"] * 3
    assert [line["words"] for line in lines if "speed" in line] == [4, 4]


def planted_error(args):
    gpu.show(speed="before the error")
    raise ValueError("planted")


def planted_check(args):
    gpu.check("planted", False)


def planted_hang(args):
    """Hangs, and so does what it has started."""
    subprocess.run(["sleep", "60"])


def sound(args):
    gpu.check("sound", True)


def test_a_part_that_fails_takes_no_other_with_it(monkeypatch, capfd):
    """Figures that are lost with the part that fails after them, a failure that is passed over, a part that
    holds the device for ever."""
    parts = {planted_error: 20, planted_check: 20, planted_hang: 0.5, sound: 20}
    monkeypatch.setattr(gpu, "PARTS", parts)
    assert gpu.run_parts(TINY) == ["planted_error", "planted_check", "planted_hang"]
    lines = lines_of(capfd)
    assert dict(speed="before the error") in lines
    assert dict(part="planted_error", failed="ValueError: planted") in lines
    assert dict(part="planted_hang", failed="not ready after 0.5 s") in lines
    assert dict(check="sound", ok=True) in lines


def test_late_parts_are_left_out(monkeypatch, capfd):
    """More minutes than were promised."""
    monkeypatch.setattr(gpu, "PARTS", {sound: 20})
    monkeypatch.setattr(gpu, "SECONDS", 0)
    assert gpu.run_parts(TINY) == ["sound"]
    assert lines_of(capfd) == [dict(part="sound", failed="left out: the others took 0 s")]


def test_dearest_kernels(capfd):
    """A table that does not name what a step spends its time on."""
    gpu.profile(TINY)
    lines = lines_of(capfd)
    times = [line["ms"] for line in lines]
    assert len(times) == 20 and times == sorted(times, reverse=True)
    assert sum(line["share"] for line in lines) > 0.5
