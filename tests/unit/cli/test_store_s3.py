"""Stores, sources and destinations on S3, as a user sees them."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from servers import Answer, Proxy, Server, Slow
from servers.places import Place

from llmopt.cli.console import Console

Llmopt = Callable[..., Any]
RTN = ("--method", "rtn", "--group-size", 32)
DENIED = Answer(status=403, code="AccessDenied")


@pytest.fixture(autouse=True)
def homes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))


@pytest.fixture(scope="module")
def bucket(rclone: Server) -> str:
    return rclone.new_bucket()


@pytest.fixture
def new_place(rclone: Server, bucket: str, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Place]:
    """Empty prefixes of a bucket."""
    rclone.set_in(monkeypatch)
    return lambda: Place(url=f"s3://{bucket}/{os.urandom(6).hex()}", server=rclone)


@pytest.fixture
def place(new_place: Callable[[], Place]) -> Place:
    return new_place()


@pytest.fixture
def proxy(rclone: Server, place: Place, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """Between llmopt and rclone, from here on."""
    with Proxy(rclone) as between:
        between.server.set_in(monkeypatch)
        yield between


@pytest.fixture
def on_s3(place: Place, store: Path, llmopt: Llmopt, monkeypatch: pytest.MonkeyPatch) -> Place:
    """The store is there."""
    monkeypatch.setenv("LLMOPT_STORE", place.url)
    return place


@pytest.fixture
def model(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "model"))


def upload(place: Place, folder: Path) -> str:
    for file in folder.iterdir():
        place.write(file.name, file.read_bytes())
    return place.url


def another_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another"))


# -- a store on S3


def test_every_command_of_a_store_works_on_s3(
    llmopt: Llmopt,
    on_s3: Place,
    new_place: Callable[[], Place],
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = llmopt("quantize", tiny, *RTN, "--name", "best", "--json").json
    other = llmopt("quantize", tiny, *RTN, "--bits", 3, "--json").json["artifact"]
    another_machine(monkeypatch, tmp_path)
    assert llmopt("quantize", tiny, *RTN, "--json").json == {
        **made, "cached": True, "path": made["path"].replace("/cache/", "/another/"), "seconds": pytest.approx(0, abs=9)
    }  # fmt: skip
    listed = llmopt("store", "ls", "--json").json
    assert (listed["store"], {each["artifact"] for each in listed["artifacts"]}) == (
        on_s3.url,
        {made["artifact"], other},
    )
    assert llmopt("store", "show", "best", "--json").json["artifact"] == made["artifact"]
    assert llmopt("store", "show", "best", "--lineage").code == 0
    assert llmopt("store", "diff", "best", other, "--json").json["settings"] == {"bits": {"a": 4, "b": 3}}
    assert llmopt("store", "name", other, "three").out == f"three {other}\n"
    assert llmopt("store", "verify").out == "2 of 2 artifacts are whole\n"
    assert llmopt("store", "verify", "--sample", "10%").code == 0
    second, third = new_place(), new_place()
    assert llmopt("store", "push", "best", second.url, "--name", "best", "--json").json["bytes"] == made["bytes"]
    assert llmopt("store", "pull", "best", second.url, "--store", third.url, "--name", "b").code == 0
    assert llmopt("store", "ls", "--store", third.url, "--json").json["artifacts"][0]["names"] == ["b"]
    assert llmopt("store", "export", "best", tmp_path / "copy").code == 0
    assert llmopt("store", "export", "best", tmp_path / "layout", "--oci").code == 0
    fourth = new_place()
    assert llmopt("store", "import", tmp_path / "layout", "--store", fourth.url).out.endswith(f"{made['artifact']}\n")
    assert llmopt("store", "verify", "--store", fourth.url).out == "1 of 1 artifacts are whole\n"
    assert llmopt("reproduce", other, "--model", tiny).code == 0
    gone = llmopt("store", "gc", "--older-than", "0s", "--dry-run", "--json").json
    assert (gone["artifacts"], gone["kept"]) == ([], 2)


def test_what_is_damaged_on_s3_is_found_and_repaired_from_another_store(
    llmopt: Llmopt, on_s3: Place, new_place: Callable[[], Place], tiny: Path
) -> None:
    made = llmopt("quantize", tiny, *RTN, "--json").json["artifact"]
    second = new_place()
    llmopt("store", "push", made, second.url)
    blob = max(on_s3.keys("blobs/"), key=lambda key: len(on_s3.read(key)))
    data = on_s3.read(blob)
    files = llmopt("store", "show", made, "--json").json["manifest"]["files"]
    [damaged] = [file["path"] for file in files if blob.endswith(file["sha256"])]
    on_s3.write(blob, data[:-1] + bytes([data[-1] ^ 1]))
    ran = llmopt("store", "verify")
    assert ran.code == 4
    assert ran.out.splitlines() == [
        f"{made}: `{damaged}` has changed bytes",
        "0 of 1 artifacts are whole",
    ]
    ran = llmopt("store", "verify", "--repair-from", second.url)
    assert (ran.code, ran.out.splitlines()) == (0, [f"{made}: repaired", "1 of 1 artifacts are whole"])
    assert on_s3.read(blob) == data


def test_signing_on_another_machine_signs_what_is_on_s3(
    llmopt: Llmopt, on_s3: Place, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llmopt("store", "keygen", tmp_path / "key")
    llmopt("quantize", tiny, *RTN, "--name", "best")
    another_machine(monkeypatch, tmp_path)
    assert llmopt("store", "verify", "--require-signed-by", tmp_path / "key.pub").code == 4
    assert llmopt("store", "sign", "best", "--key", tmp_path / "key").code == 0
    ran = llmopt("store", "verify", "--require-signed-by", tmp_path / "key.pub")
    assert (ran.code, ran.out) == (0, "1 of 1 artifacts are whole and signed\n")


def test_doctor_names_the_bucket_and_the_cache(llmopt: Llmopt, on_s3: Place, tmp_path: Path) -> None:
    found = llmopt("doctor", "--json").json["store"]
    assert found["url"] == on_s3.url
    assert found["path"].startswith(str(tmp_path / "cache" / "llmopt" / "stores"))
    lines = llmopt("doctor").out.splitlines()
    at = lines.index(f"store        {on_s3.url}")
    assert lines[at + 1].startswith(f"             its cache here: {found['path']}, ")


def test_an_artifact_is_pushed_and_pulled_with_what_is_known_of_it(
    llmopt: Llmopt, place: Place, tiny: Path, tmp_path: Path
) -> None:
    made = llmopt("quantize", tiny, *RTN, "--json").json["artifact"]
    pushed = llmopt("store", "push", made, place.url, "--json").json
    assert pushed.keys() == {"artifact", "url", "name", "files", "bytes", "seconds"}
    assert llmopt("store", "push", made, place.url, "--json").json["bytes"] == 0
    fresh = tmp_path / "fresh"
    pulled = llmopt("store", "pull", made[7:15], place.url, "--store", fresh, "--out", tmp_path / "copy", "--json").json
    assert (pulled["artifact"], pulled["path"]) == (made, str(tmp_path / "copy"))
    assert (tmp_path / "copy" / "config.json").is_file()
    shown = llmopt("store", "show", made, "--store", fresh, "--json").json
    assert len(shown["attestations"]) == 1
    assert llmopt("quantize", tiny, *RTN, "--store", fresh, "--json").json["cached"]


def test_a_part_of_an_artifact_is_pulled_into_a_folder(
    llmopt: Llmopt, place: Place, tiny: Path, tmp_path: Path
) -> None:
    made = llmopt("quantize", tiny, *RTN, "--json").json["artifact"]
    llmopt("store", "push", made, place.url)
    out = tmp_path / "part"
    assert llmopt("store", "pull", made, place.url, "--include", "*config*.json", "--out", out).code == 0
    assert sorted(file.name for file in out.iterdir()) == [
        "config.json", "generation_config.json", "tokenizer_config.json"
    ]  # fmt: skip
    for more in ((), ("--out", place.url), ("--out", tmp_path / "x", "--name", "part")):
        ran = llmopt("store", "pull", made, place.url, "--include", "*.json", *more)
        assert (ran.code, ran.error.splitlines()[0]) == (
            2,
            "error: a part of an artifact goes into a folder, and is none itself",
        )


def test_progress_and_result_of_a_transfer_are_lines_of_json(llmopt: Llmopt, place: Place, tiny: Path) -> None:
    made = llmopt("quantize", tiny, *RTN, "--json").json["artifact"]
    ran = llmopt("store", "push", made, place.url, "--json-lines")
    events = [json.loads(line) for line in ran.out.splitlines()]
    assert [event["event"] for event in events] == ["progress", "result"]
    assert events[-1]["artifact"] == made
    assert ran.err == ""


# -- a shared cache


def test_ci_uses_what_a_colleague_built(
    llmopt: Llmopt, place: Place, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    colleague = llmopt(
        "quantize", tiny, *RTN, "--store", tmp_path / "mine", "--remote", place.url, "--push", "--json"
    ).json
    before = place.all()
    monkeypatch.setenv("LLMOPT_REMOTE", place.url)
    ran = llmopt("quantize", tiny, *RTN, "--store", tmp_path / "ci", "--json")
    assert (ran.json["cached"], ran.json["artifact"]) == (True, colleague["artifact"])
    engine = llmopt("compile", ran.json["artifact"], "--store", tmp_path / "ci", "--json").json
    assert not engine["cached"]
    assert place.all() == before
    monkeypatch.setenv("LLMOPT_PUSH", "1")
    assert llmopt("compile", ran.json["artifact"], "--store", tmp_path / "ci", "--json").json["cached"]
    assert llmopt("compile", colleague["artifact"], "--store", tmp_path / "third", "--json").json["cached"]


def test_a_cache_that_is_down_is_told_once_and_the_work_is_done(
    llmopt: Llmopt, place: Place, proxy: Proxy, tiny: Path
) -> None:
    proxy.fail(with_=DENIED, times=None)
    ran = llmopt("quantize", tiny, *RTN, "--remote", place.url, "--push", "--json")
    assert (ran.code, ran.json["cached"]) == (0, False)
    assert ran.err.count("going on without the shared cache") == 1


def test_a_store_that_is_down_is_an_error(llmopt: Llmopt, on_s3: Place, proxy: Proxy, tiny: Path) -> None:
    proxy.fail(with_=DENIED, times=None)
    ran = llmopt("quantize", tiny, *RTN, "--json")
    assert ran.code == 1
    assert "does not allow" in ran.json["error"]


def test_what_must_be_signed_and_is_not_is_made_here(
    llmopt: Llmopt, place: Place, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("ours", "theirs"):
        llmopt("store", "keygen", tmp_path / name)
    pushed = ("--store", tmp_path / "a", "--remote", place.url, "--push")
    llmopt("quantize", tiny, *RTN, *pushed, "--sign-key", tmp_path / "theirs")
    monkeypatch.setenv("LLMOPT_TRUST", str(tmp_path / "ours.pub"))
    ran = llmopt("quantize", tiny, *RTN, "--store", tmp_path / "b", "--remote", place.url, "--json")
    assert (ran.code, ran.json["cached"]) == (0, False)
    assert f"not used from `{place.url}`: the artifact `{ran.json['artifact']}` has no valid signature by" in ran.err
    pull = llmopt("store", "pull", ran.json["artifact"], place.url, "--store", tmp_path / "c")
    assert pull.code == 4
    monkeypatch.setenv("LLMOPT_TRUST", f"{tmp_path / 'ours.pub'}:{tmp_path / 'theirs.pub'}")
    assert llmopt("store", "pull", ran.json["artifact"], place.url, "--store", tmp_path / "c").code == 0
    assert llmopt("quantize", tiny, *RTN, "--store", tmp_path / "d", "--remote", place.url, "--json").json["cached"]


# -- sources and destinations


def test_a_checkpoint_on_s3_is_that_of_a_folder(llmopt: Llmopt, place: Place, model: Path, tmp_path: Path) -> None:
    (model / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    (model / "LICENSE").write_text("Apache License\nVersion 2.0, January 2004\n")
    made = llmopt("quantize", model, *RTN, "--json").json
    again = llmopt("quantize", upload(place, model), *RTN, "--json").json
    assert (again["cached"], again["action"], again["artifact"]) == (True, made["action"], made["artifact"])
    assert again["license"] == made["license"] == "apache-2.0"
    elsewhere = llmopt("quantize", f"{place.url}/", *RTN, "--store", tmp_path / "else", "--json").json
    assert (elsewhere["cached"], elsewhere["artifact"]) == (False, made["artifact"])


def test_the_second_read_of_a_checkpoint_fetches_nothing(
    llmopt: Llmopt, place: Place, proxy: Proxy, model: Path
) -> None:
    upload(place, model)
    llmopt("quantize", place.url, *RTN)
    proxy.forget()
    ran = llmopt("quantize", place.url, *RTN, "--json")
    assert ran.json["cached"]
    assert proxy.count() == proxy.count("GET") == 1
    assert "fetching" not in ran.err


def test_a_pipeline_of_prefixes(llmopt: Llmopt, place: Place, new_place: Callable[[], Place], model: Path) -> None:
    """Each stage reads what the last one wrote, and every artifact is that of the store."""
    quantized, engine, report = (new_place().url for _ in range(3))
    first = llmopt("quantize", upload(place, model), *RTN, "--out", quantized, "--json").json
    second = llmopt("compile", quantized, "--out", engine, "--json").json
    assert llmopt("compile", first["artifact"], "--json").json["artifact"] == second["artifact"]
    quality = ("eval", quantized, "--against", place.url, "--windows", 1, "--seq-len", 16)
    assert llmopt(*quality, "--out", report).code == 0
    load = ("--requests", 2, "--concurrency", 1, "--prompt-tokens", 4, "--output-tokens", 4, "--warmup", 0)
    assert llmopt("bench", engine, *load, "--tokenizer", quantized).code in (0, 6)
    assert llmopt("plan", quantized, "--hardware", "H100", "--json").code == 0
    checked = llmopt("quantize", place.url, "--check", quantized, "--json")
    assert checked.code == 0, checked.err


def test_writing_again_is_nothing_and_something_else_is_refused(
    llmopt: Llmopt, place: Place, proxy: Proxy, tiny: Path
) -> None:
    assert llmopt("quantize", tiny, *RTN, "--out", place.url).code == 0
    proxy.forget()
    assert llmopt("quantize", tiny, *RTN, "--out", place.url).code == 0
    assert proxy.count("PUT", "POST", "DELETE") == 0
    ran = llmopt("quantize", tiny, *RTN, "--bits", 3, "--out", place.url)
    assert (ran.code, "holds another artifact" in ran.error) == (2, True)


@pytest.mark.parametrize("command", [("quantize", *RTN), ("compile",), ("eval",)], ids=lambda command: command[0])
def test_a_prefix_that_is_not_empty_is_refused_before_any_work(
    llmopt: Llmopt, place: Place, tiny: Path, store: Path, command: tuple[object, ...]
) -> None:
    place.write("holiday.jpg", b"x")
    ran = llmopt(command[0], tiny, *command[1:], "--out", place.url, "--json")
    assert (ran.code, ran.json["error"]) == (2, f"`{place.url}` is not empty: it holds `holiday.jpg`")
    assert not store.exists()


def test_a_bench_refuses_the_prefix_of_an_earlier_one(llmopt: Llmopt, place: Place, tiny: Path) -> None:
    """It always gives another artifact."""
    llmopt("quantize", tiny, *RTN, "--out", place.url)
    ran = llmopt("bench", "no-such-engine", "--out", place.url)
    assert (ran.code, "is not empty" in ran.error) == (2, True)


def test_a_run_writes_each_stage_below_the_prefix_and_goes_on_after_a_kill(
    llmopt: Llmopt, place: Place, proxy: Proxy, tiny: Path, tmp_path: Path
) -> None:
    file = tmp_path / "pipeline.yaml"
    file.write_text(f"model: {tiny}\nquantize: {{method: rtn, group_size: 32}}\neval: {{windows: 1, seq_len: 16}}\n")
    proxy.fail(match=lambda request: request.method == "PUT" and "quantize/model.safe" in request.path, with_=DENIED)
    assert llmopt("run", file, "--out", place.url).code == 1
    half = llmopt("compile", f"{place.url}/quantize")
    assert (half.code, "is not complete" in half.error) == (1, True)
    assert llmopt("run", file, "--out", place.url).code == 0
    assert {key.partition("/")[0] for key in place.all()} == {"quantize", "eval"}
    assert llmopt("compile", f"{place.url}/quantize").code == 0


def test_a_licence_that_is_denied_is_refused_before_weights_are_fetched(
    llmopt: Llmopt, place: Place, proxy: Proxy, model: Path
) -> None:
    (model / "README.md").write_text("---\nlicense: llama3.1\n---\n")
    upload(place, model)
    for command in (("quantize", *RTN), ("compile",)):
        ran = llmopt(command[0], place.url, *command[1:], "--deny-license", "llama*")
        assert ran.code == 2
        assert ran.error.startswith(f"error: `{place.url}` has the licence `llama3.1` by its card, `README.md`, which")
    assert not [path for _, path, _, _ in proxy.log() if path.endswith((".safetensors", "config.json"))]
    assert llmopt("quantize", place.url, *RTN, "--deny-license", "unknown").code == 0


def test_a_checkpoint_without_a_licence_is_unknown(llmopt: Llmopt, place: Place, model: Path) -> None:
    ran = llmopt("quantize", upload(place, model), *RTN, "--deny-license", "unknown")
    assert (ran.code, "states no licence" in ran.error) == (2, True)


def test_an_artifact_inherits_its_licence_by_way_of_s3(
    llmopt: Llmopt, place: Place, new_place: Callable[[], Place], model: Path
) -> None:
    (model / "README.md").write_text("---\nlicense: gemma\n---\n")
    out = new_place().url
    llmopt("quantize", upload(place, model), *RTN, "--out", out)
    assert llmopt("compile", out, "--json").json["license"] == "gemma"
    assert llmopt("compile", out, "--deny-license", "gemma").code == 2
    assert llmopt("compile", out, "--deny-license", "unknown").code == 0


def test_pickles_are_refused_with_the_commands_that_convert_them(llmopt: Llmopt, place: Place, model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    ran = llmopt("quantize", upload(place, model), *RTN)
    assert ran.code == 1
    message, _, hint = ran.error.partition("\n\nhint: ")
    assert message == (
        f"error: `{place.url}` has its weights only as `pytorch_model.bin`, a pickle: it can hold code, and llmopt "
        "loads none"
    )
    assert hint.startswith(f"fetch them (`aws s3 sync {place.url} MODEL`) and convert them once: `python -c ")


def test_a_dishonest_manifest_exits_with_4(llmopt: Llmopt, place: Place, tiny: Path, tmp_path: Path) -> None:
    llmopt("quantize", tiny, *RTN, "--out", place.url)
    manifest = place.read("llmopt.json")
    place.write("llmopt.json", manifest.replace(b'"path":"config.json"', b'"path":"../evil"'))
    ran = llmopt("compile", place.url, "--json")
    assert (ran.code, "is not a plain relative path" in ran.json["error"]) == (4, True)
    assert not list(tmp_path.rglob("evil"))
    place.write("llmopt.json", manifest)
    place.write("config.json", b"{}")
    ran = llmopt("compile", place.url, "--store", tmp_path / "other")
    assert (ran.code, f"`{place.url}/config.json` is damaged" in ran.error) == (4, True)


def test_a_text_on_s3_calibrates_as_a_file_here_does(
    llmopt: Llmopt, place: Place, tiny: Path, text: Path, tmp_path: Path
) -> None:
    small = ("--method", "gptq", "--sweeps", 0, "--no-compensate", "--group-size", 32, "--samples", 2, "--seq-len", 16)
    here = tmp_path / "calib.txt"
    here.write_bytes(text.read_bytes()[:5000])
    place.write("calib.txt", here.read_bytes())
    made = llmopt("quantize", tiny, *small, "--calib", here, "--json").json
    again = llmopt("quantize", tiny, *small, "--calib", f"{place.url}/calib.txt", "--json").json
    assert (again["cached"], again["action"]) == (True, made["action"])
    ran = llmopt("quantize", tiny, *small, "--calib", f"{place.url}/none.txt")
    assert (ran.code, ran.error.splitlines()[0]) == (1, f"error: nothing lies at `{place.url}/none.txt`")


@pytest.mark.parametrize(
    ("command", "code", "said"),
    [
        (("eval", "{tiny}", "--text", "s3://b-b/x.txt"), 2, "a text is not read from S3"),
        (("quantize", "{tiny}", "--method", "rtn", "--adapter", "s3://b-b/x"), 2, "an adapter is not read from S3"),
        (("quantize", "s3:/b-b/x"), 2, "`s3:/b-b/x` is no address on S3"),
        (("quantize", "{tiny}", "--out", "S3://b-b/x"), 2, "`S3://b-b/x` is no address on S3"),
        (("quantize", "s3://B/x"), 2, "`s3://B/x` is not `s3://BUCKET/PREFIX`"),
        (("quantize", "{tiny}", "--push"), 2, "`--push` needs to know where to"),
        (("quantize", "{tiny}", "--verify", "ful"), 2, "`--verify` cannot be `ful`"),
        (("quantize", "{tiny}", "--store", "s3://b-b/x", "--remote", "s3://c-c/x"), 2, "goes with a store on this"),
        (("store", "probe", "/tmp"), 2, "`/tmp` is no place on S3"),
        (("store", "verify", "--sample", "0%"), 2, "`--sample 0%` is no share"),
        (("store", "gc", "--older-than", "soon"), 2, "`--older-than soon` is not a length of time"),
        (("store", "push", "x", "gs://b/x"), 1, "no artifact `x`"),
        (("store", "ls", "--stor", "x"), 2, "no such option `--stor`"),
        (("store", "pul", "x"), 2, "no such command `pul`"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)  # fmt: skip
def test_what_cannot_be_is_told_with_a_hint(
    llmopt: Llmopt, place: Place, tiny: Path, command: tuple[str, ...], code: int, said: str
) -> None:
    ran = llmopt(*(part.format(tiny=tiny) for part in command))
    assert (ran.code, said in ran.error.splitlines()[0]) == (code, True), ran.error
    assert ran.error.splitlines()[2].startswith("hint: ")


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("LLMOPT_CACHE_SIZE", "large", "`LLMOPT_CACHE_SIZE=large` is not a size"),
        ("LLMOPT_TRUST", "/no/key", "the key `/no/key` cannot be read"),
        ("LLMOPT_STORE", "s3://x", "`s3://x` is not `s3://BUCKET/PREFIX`"),
    ],
)
def test_a_variable_that_cannot_be_is_told(
    llmopt: Llmopt, on_s3: Place, monkeypatch: pytest.MonkeyPatch, name: str, value: str, said: str
) -> None:
    monkeypatch.setenv(name, value)
    ran = llmopt("store", "ls")
    assert (ran.code, said in ran.error) == (2, True), ran.error


def test_the_cache_has_the_size_of_the_environment(
    llmopt: Llmopt, on_s3: Place, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMOPT_CACHE_SIZE", "1KB")
    first = Path(llmopt("quantize", tiny, *RTN, "--json").json["path"])
    ran = llmopt("quantize", tiny, *RTN, "--bits", 3, "--json")
    assert "the cache was full: 1 artifacts left it" in ran.err
    assert (first.exists(), Path(ran.json["path"]).exists()) == (False, True)
    assert llmopt("quantize", tiny, *RTN, "--json").json["cached"]


# -- a terminal, and none


SLOWLY = """
import sys
from llmopt.cli.app import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_transfer_is_a_bar_on_a_terminal(
    llmopt: Llmopt, place: Place, proxy: Proxy, tiny: Path, on_a_terminal: Callable[..., tuple[str, str]]
) -> None:
    made = llmopt("quantize", tiny, *RTN, "--json").json["artifact"]
    proxy.fail(match=lambda request: request.method == "PUT", with_=Slow(request_bytes_per_s=150_000), times=None)
    out, sent = on_a_terminal(SLOWLY, "store", "push", made, place.url)
    assert out == f"{place.url} {made}\n"
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", sent)
    assert re.search(r"push +[━╸╺ ]+ [\d.]+ KiB/[\d.]+ KiB, [\d.]+ KiB/s", shown), shown
    assert f"pushing to {place.url}: " in shown


def test_without_a_terminal_a_transfer_says_a_line_every_five_seconds(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from llmopt.artifacts.remote import meter

    now = [0.0]
    monkeypatch.setattr(meter.time, "monotonic", lambda: now[0])
    console = Console()
    one = meter.Meter(console.progress, "push", "pushing")
    one.expect(121, 121 << 20)
    for second in range(1, 121):
        now[0] = second / 10
        one.add(1 << 20, files=1)
    lines = capfd.readouterr().err.splitlines()
    assert lines == [
        "pushing: 50.0 MiB of 121.0 MiB, 50 of 121 files, 10.0 MiB/s, 7 s left",
        "pushing: 100.0 MiB of 121.0 MiB, 100 of 121 files, 10.0 MiB/s, 2 s left",
    ]


def test_ctrl_c_ends_a_transfer_at_once_and_the_next_one_goes_on(
    llmopt: Llmopt, place: Place, proxy: Proxy, tiny: Path
) -> None:
    made = llmopt("quantize", tiny, *RTN, "--json").json["artifact"]
    slow = Slow(request_bytes_per_s=20_000)
    proxy.fail(match=lambda request: request.method == "PUT" and "/blobs/" in request.path, with_=slow, times=None)
    command = [sys.executable, "-m", "llmopt", "store", "push", made, place.url]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not any(method == "PUT" and "/blobs/" in path for method, path, _, _ in proxy.log()):
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert not place.keys("manifests/")
    proxy.heal()
    assert llmopt("store", "push", made, place.url).code == 0
    assert llmopt("store", "verify", "--store", place.url).code == 0


# -- what is loaded


HEAVY = ("obstore", "botocore", "urllib3", "cryptography", "concurrent.futures", "xxhash", "rich", "torch", "yaml")


@pytest.mark.parametrize(
    ("command", "allowed"),
    [
        (("--help",), ()),
        (("store", "push", "--help"), ()),
        (("quantize", "{tiny}", "--method", "rtn", "--group-size", "32"), ()),
        (("store", "ls"), ()),
    ],
    ids=lambda value: " ".join(value[:3]) if value and isinstance(value[0], str) else None,
)
def test_what_needs_no_s3_loads_none_of_it(
    llmopt: Llmopt, place: Place, tiny: Path, command: tuple[str, ...], allowed: tuple[str, ...]
) -> None:
    llmopt("quantize", tiny, *RTN)
    llmopt("quantize", tiny, *RTN)
    code = (
        "import sys\n"
        "from llmopt.cli.app import main\n"
        "code = main(sys.argv[1:])\n"
        f"print('LOADED', *(name for name in {HEAVY!r} if name in sys.modules), file=sys.stderr)\n"
        "sys.exit(code)\n"
    )
    arguments = [part.format(tiny=tiny) for part in command]
    ran = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr.splitlines()[-1].split() == ["LOADED", *allowed]
