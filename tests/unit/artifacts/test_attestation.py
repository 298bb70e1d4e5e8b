"""What is known of a run is kept beside the artifact and changes nothing in it."""

from __future__ import annotations

import base64
import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from llmopt.artifacts import Action, Manifest, Store, attest, canonical_json
from llmopt.artifacts.attestation import git_commit

Put = Callable[..., Manifest]
MakeAction = Callable[..., Action]


def test_a_statement_names_the_artifact_its_action_and_the_run(
    put: Put, make_action: MakeAction, tmp_path: Path
) -> None:
    inputs = {"model": "sha256:" + "0" * 64, "server": "http://localhost:8000"}
    made = put(action=make_action(inputs=inputs))
    found = attest(made, started=0, finished=61.5, command=["llmopt", "run"], attempt=2, folder=tmp_path)
    assert json.loads(canonical_json(found)) == found
    statement = json.loads(json.dumps(found))
    assert statement["_type"] == "https://in-toto.io/Statement/v1"
    assert statement["predicateType"] == "https://slsa.dev/provenance/v1"
    subjects = {subject["name"]: subject["digest"]["sha256"] for subject in statement["subject"]}
    assert subjects == {"llmopt.json": made.hex, **{entry.path: entry.sha256 for entry in made.files}}
    definition = statement["predicate"]["buildDefinition"]
    assert definition["externalParameters"]["settings"] == {"bits": 4, "symmetric": True}
    assert definition["resolvedDependencies"] == [
        {"name": "model", "digest": {"sha256": "0" * 64}},
        {"name": "server", "uri": "http://localhost:8000"},
        {"uri": "pkg:pypi/torch@2.13.0"},
    ]
    run = statement["predicate"]["runDetails"]["metadata"]
    assert (run["startedOn"], run["finishedOn"]) == ("1970-01-01T00:00:00Z", "1970-01-01T00:01:01Z")
    assert (run["llmopt_command"], run["llmopt_attempt"], run["llmopt_commit"]) == (["llmopt", "run"], 2, None)
    assert run["llmopt_host"]
    assert run["llmopt_user"]


def test_what_it_was_made_of_is_named_as_others_name_it(put: Put, make_action: MakeAction) -> None:
    commit = "0123456789" * 4
    inputs = {
        "model_source": f"hf:Org/Name@{commit}",
        "calibration_source": f"hf:datasets/org/rows@{commit}",
        "server": "HTTP://me:Pass@Localhost:8000/V1",
    }
    deps = {"tensorrt_llm": "1.2.1", "torch": "2.13.0+cpu", "python": "3.12.3", "cuda": "13.0"}
    statement = json.loads(json.dumps(attest(put(action=make_action(inputs=inputs, deps=deps)), started=0, finished=1)))
    found = statement["predicate"]["buildDefinition"]["resolvedDependencies"]
    assert {(one.get("name"), one["uri"]) for one in found} == {
        ("model_source", f"pkg:huggingface/Org/Name@{commit}"),
        ("calibration_source", f"hf:datasets/org/rows@{commit}"),
        ("server", "http://me:Pass@localhost:8000/V1"),
        (None, "pkg:pypi/tensorrt-llm@1.2.1"),
        (None, "pkg:pypi/torch@2.13.0%2Bcpu"),
        (None, "pkg:generic/python@3.12.3"),
        (None, "pkg:generic/cuda@13.0"),
    }
    assert [one["digest"] for one in found if "digest" in one] == [{"gitCommit": commit}] * 2


def test_every_run_is_kept_and_none_changes_the_artifact(store: Store, put: Put, make_action: MakeAction) -> None:
    action = make_action()
    plain = put(action=action)
    for start in (1, 2):
        made = put(action=action, attestation=lambda m, start=start: attest(m, started=start, finished=9))
        assert made.id == plain.id
    starts = [json.dumps(statement) for statement in store.attestations(plain.id)]
    assert ["00:00:01Z" in starts[0], "00:00:02Z" in starts[1]] == [True, True]
    assert store.verify(plain.id) == []


def test_a_log_is_beside_the_artifact_and_only_its_end_where_it_is_long(put: Put) -> None:
    statement = json.loads(
        json.dumps(attest(put(), started=0, finished=1, byproducts={"build.log": "x" * 2**21 + "y"}))
    )
    (found,) = statement["predicate"]["runDetails"]["byproducts"]
    text = base64.b64decode(found["content"]).decode()
    assert (found["name"], len(text), text[-2:]) == ("build.log", 2**20, "xy")


def test_an_imported_artifact_has_a_statement_too(put: Put) -> None:
    statement = json.loads(json.dumps(attest(put(), started=0, finished=1)))
    definition = statement["predicate"]["buildDefinition"]
    assert definition == {"buildType": "urn:llmopt:import:1", "externalParameters": {"kind": "model"}}


class TestTheCommit:
    @pytest.fixture
    def checkout(self, tmp_path: Path) -> Path:
        folder = tmp_path / "checkout"
        folder.mkdir()
        self.git(folder, "init", "--quiet", "--initial-branch=main")
        self.git(folder, "commit", "--quiet", "--allow-empty", "--message=one")
        return folder

    @staticmethod
    def git(folder: Path, *command: str) -> str:
        author = ["-c", "user.name=x", "-c", "user.email=x@example.org", "-c", "commit.gpgsign=false"]
        done = subprocess.run(["git", *author, *command], cwd=folder, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    def test_is_that_of_the_branch(self, checkout: Path) -> None:
        (checkout / "a" / "b").mkdir(parents=True)
        assert git_commit(checkout / "a" / "b") == self.git(checkout, "rev-parse", "HEAD")

    def test_is_found_when_it_is_packed(self, checkout: Path) -> None:
        self.git(checkout, "pack-refs", "--all")
        assert git_commit(checkout) == self.git(checkout, "rev-parse", "HEAD")

    def test_is_found_without_a_branch(self, checkout: Path) -> None:
        self.git(checkout, "checkout", "--quiet", "--detach")
        assert git_commit(checkout) == self.git(checkout, "rev-parse", "HEAD")

    def test_is_that_of_a_work_tree_of_its_own(self, checkout: Path, tmp_path: Path) -> None:
        self.git(checkout, "worktree", "add", "--quiet", "-b", "side", str(tmp_path / "side"))
        self.git(tmp_path / "side", "commit", "--quiet", "--allow-empty", "--message=two")
        assert git_commit(tmp_path / "side") == self.git(tmp_path / "side", "rev-parse", "HEAD")
        assert git_commit(tmp_path / "side") != git_commit(checkout)

    def test_is_none_before_the_first_and_outside(self, tmp_path: Path) -> None:
        self.git(tmp_path, "init", "--quiet")
        assert git_commit(tmp_path) is None
        (tmp_path / ".git" / "HEAD").write_bytes(b"\xff\xfe")
        assert git_commit(tmp_path) is None
