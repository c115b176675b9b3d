"""Whether a list is a sweep or a value is a matter of the setting's own type, whatever the other settings are."""

import pytest
from conftest import written

import methods
from harness.cells import expand
from harness.errors import UserError
from harness.spec import Entry

DEPENDENT = '''
from typing import Annotated, Any

import pydantic
from pydantic import Field

import methods


class Settings(methods.Settings):
    kind: str = "plain"
    layers: tuple[int, ...] | None = None
    rates: Annotated[list[float], Field(min_length=2)] = [0.5, 0.5]
    either: float | tuple[float, float] = 0.5
    needed: int
    named: tuple[int, ...] = Field((1,), alias="other_name")

    @pydantic.model_validator(mode="after")
    def _together(self):
        if self.layers and self.kind != "layered":
            raise ValueError("layers are for kind: layered")
        if self.kind == "layered" and not self.layers:
            raise ValueError("kind: layered needs layers")
        if len(self.rates) != 2 and self.kind != "rated":
            raise ValueError("other numbers of rates are for kind: rated")
        return self


@methods.register
class Dependent(methods.Method):
    """Settings that are valid together alone."""

    name = "dependent"
    Settings = Settings
'''


@pytest.fixture(scope="module", autouse=True)
def plug_in(tmp_path_factory):
    methods.load_plugin(written(tmp_path_factory.mktemp("plugin"), "dependent", DEPENDENT))


def rows(**settings):
    return [method.settings for _, method in expand(Entry(method="dependent", settings={"needed": 1} | settings))]


VALUES = {  # settings, and the number of rows
    "a list that another setting allows": ({"kind": "layered", "layers": [1, 2]}, 1),
    "a sweep of lists": ({"kind": "layered", "layers": [[1, 2], [3]]}, 2),
    "a constrained list that another setting allows": ({"kind": "rated", "rates": [0.1, 0.2, 0.3]}, 1),
    "a sweep of constrained lists": ({"rates": [[0.1, 0.2], [0.3, 0.4]]}, 2),
    "a number or a pair: two are a pair": ({"either": [0.1, 0.2]}, 1),
    "a number or a pair: three are a sweep": ({"either": [0.1, 0.2, 0.3]}, 3),
    "a setting that has no default": ({"needed": [1, 2, 3]}, 3),
    "by its other name": ({"other_name": [4, 5]}, 1),
    "both at once": ({"kind": "layered", "layers": [[1], [2]], "needed": [1, 2]}, 4),
}


@pytest.mark.parametrize(("settings", "count"), VALUES.values(), ids=VALUES)
def test_the_type_decides(settings, count):
    found = rows(**settings)
    assert len(found) == count
    if count == 1:
        (only,) = found
        assert all(
            list(getattr(only, "named" if key == "other_name" else key)) == value
            for key, value in settings.items()
            if isinstance(value, list)
        )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": [1, 2]}, "layers are for kind: layered"),
        ({"kind": []}, "kind: an empty list of values"),
        ({"rates": [0.5]}, "rates"),
        ({"rates": []}, "rates: an empty list of values"),
        ({"lairs": [1, 2]}, "unknown setting 'lairs'"),
    ],
)
def test_what_is_wrong_is_told_of_the_whole(settings, message):
    with pytest.raises(UserError, match=message):
        rows(**settings)


@pytest.mark.parametrize(
    ("method", "settings", "count"),
    [
        ("dynamicvit", {"pruning_loc": [3, 6, 9]}, 1),
        ("dynamicvit", {"pruning_loc": [[3, 6, 9], [2, 4]], "keep_rate": [0.5, 0.7]}, 4),
        ("svite", {"tau": [10, 0.1]}, 1),
        ("svite", {"pruning_type": "structured", "growth": ["gradient", "random"]}, 2),
        ("sttabt", {"variant": "topk", "ks": [0.2, 0.4]}, 2),
    ],
)
def test_settings_of_the_methods_here(method, settings, count):
    assert len(expand(Entry(method=method, settings=settings))) == count
