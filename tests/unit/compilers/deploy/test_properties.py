"""Java's own class is the judge where there is a `java`; the rules by example everywhere."""

from __future__ import annotations

import random
import shutil
import subprocess
from pathlib import Path

import pytest

from llmopt.compilers.deploy import properties
from llmopt.errors import Exit, SettingsError

JUDGE = """
import java.io.*;
import java.nio.charset.StandardCharsets;
import java.util.*;

public class Judge {
    static String hex(String text) {
        return HexFormat.of().formatHex(text.getBytes(StandardCharsets.UTF_16BE));
    }

    public static void main(String[] files) throws Exception {
        for (String file : files) {
            Properties found = new Properties();
            StringBuilder line = new StringBuilder();
            try (Reader reader = new FileReader(file, StandardCharsets.UTF_8)) {
                found.load(reader);
                TreeMap<String, String> sorted = new TreeMap<>();
                for (String key : found.stringPropertyNames()) {
                    sorted.put(hex(key), hex(found.getProperty(key)));
                }
                sorted.forEach((key, value) -> line.append(key + "=" + value + ";"));
            } catch (IllegalArgumentException error) {
                line.append("malformed");
            }
            System.out.println(line);
        }
    }
}
"""
PIECES = (*"ab=:#! \t\f\\\n\r", "\\u0041", "\\n", "\\u00g1", "option.x", "\\\n", "é")


def parsed(text: str) -> dict[str, str]:
    return {entry.key: entry.value for entry in properties.parse(text, file="f")}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a=b", {"a": "b"}),
        ("  a  =  b  ", {"a": "b  "}),
        ("a b", {"a": "b"}),
        ("a:b=c", {"a": "b=c"}),
        ("a", {"a": ""}),
        ("# a=b\n! c=d\n\n", {}),
        ("a=1\\\n   2", {"a": "12"}),
        ("a=1\\\\\nb=2", {"a": "1\\", "b": "2"}),
        ("# comment \\\na=b", {"a": "b"}),
        ("a\\=b=c", {"a=b": "c"}),
        ("a=\\u00e9\\t\\z", {"a": "é\tz"}),
        ("a=1\r\nb=2\rc=3", {"a": "1", "b": "2", "c": "3"}),
        ('option.x={"a": 1, "b": "c=d"}', {"option.x": '{"a": 1, "b": "c=d"}'}),
    ],
)
def test_files_are_read_by_javas_rules(text: str, expected: dict[str, str]) -> None:
    assert parsed(text) == expected


def test_an_entry_knows_the_line_that_it_begins_on() -> None:
    assert [entry.line for entry in properties.parse("# c\n\na=1\\\n2\nb=3\n", file="f")] == [3, 5]


def test_a_key_given_twice_is_an_error_that_names_both_lines() -> None:
    with pytest.raises(SettingsError) as caught:
        properties.parse("a=1\nb=2\na=3\n", file="serving.properties")
    assert caught.value.message == "serving.properties:3: `a` is given twice"
    assert caught.value.hint == "remove it here or on line 1"
    assert caught.value.code == Exit.USAGE


@pytest.mark.parametrize("value", ["a\\b", "a\nb", " a", "a ", "é"])
def test_a_value_that_readers_would_not_agree_on_is_not_written(value: str) -> None:
    with pytest.raises(SettingsError, match="cannot be written"):
        properties.write({"option.x": value})


def test_what_is_written_reads_back_by_java_and_by_lmis_partition_script() -> None:
    values = {"engine": "Python", "option.x": '{"a": [1, 2]}', "option.y": "s3://b/c=d:e/", "option.z": ""}
    text = properties.write(values, comments=["one", "two"])
    assert parsed(text) == values
    # djl-serving 0.33, serving/docker/partition/utils.py: lines split at the first `=`.
    plain = dict(line.split("=", 1) for line in text.splitlines() if not line.startswith("#"))
    assert plain == values


@pytest.mark.skipif(shutil.which("java") is None, reason="no java to judge by")
def test_java_reads_every_odd_file_alike(tmp_path: Path) -> None:
    chance = random.Random(7)
    files, expected = [], []
    for number in range(400):
        text = "".join(chance.choice(PIECES) for _ in range(chance.randrange(25)))
        try:
            found = {_hex(key): _hex(value) for key, value in parsed(text).items()}
            said = "".join(f"{key}={value};" for key, value in sorted(found.items()))
        except SettingsError as error:
            if "twice" in error.message:
                continue
            said = "malformed"
        file = tmp_path / f"{number}.properties"
        file.write_bytes(text.encode())
        files.append(file)
        expected.append((text, said))
    assert len(files) > 300
    (tmp_path / "Judge.java").write_text(JUDGE)
    judged = subprocess.run(
        ["java", tmp_path / "Judge.java", *files], capture_output=True, text=True, timeout=120, check=True
    ).stdout.splitlines()
    assert [(text, line) for (text, _), line in zip(expected, judged, strict=True)] == expected


def _hex(text: str) -> str:
    return text.encode("utf-16-be").hex()
