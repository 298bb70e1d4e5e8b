from __future__ import annotations

from collections.abc import Callable

from llmopt.artifacts.manifest import Action
from llmopt.pipeline.explain import difference, nearest_difference

MakeAction = Callable[..., Action]


def test_each_field_that_differs_is_a_line(action: MakeAction) -> None:
    after = action(settings={"bits": 3, "seed": 0}, deps={"torch": "2.14.0"})
    assert difference(action(), after) == ("deps.torch: 2.13.0 -> 2.14.0", "settings.bits: 4 -> 3")


def test_a_field_that_only_one_has_is_told(action: MakeAction) -> None:
    assert difference(action(), action(settings={"bits": 4})) == ("settings.seed: 0 -> (none)",)


def test_the_nearest_action_is_the_one_with_fewest_differences(action: MakeAction) -> None:
    far = action(settings={"bits": 8, "seed": 5}, op_version=2)
    near = action(settings={"bits": 4, "seed": 5})
    assert nearest_difference(action(), [far, near]) == ("settings.seed: 5 -> 0",)


def test_long_digests_are_cut(action: MakeAction) -> None:
    (line,) = difference(action(), action(code="sha256:" + "d" * 64))
    assert line == "code: sha256:cccccccccccc... -> sha256:dddddddddddd..."


def test_without_any_such_action_it_says_so(action: MakeAction) -> None:
    assert nearest_difference(action(), []) == ("no result of `quantize.gptq` is in the store",)
