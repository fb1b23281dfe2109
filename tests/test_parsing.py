"""Options from files and arguments: the dataclasses they become, and the errors."""

from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from recurrent_depth.building import OptionError, build
from recurrent_depth.help import help_text, usage
from recurrent_depth.parsing import field_texts, parse_options


@dataclass(frozen=True)
class Engine:
    """An engine.

    Args:
        power: in kW, above 0.
        fuel: what it burns.
    """

    power: float = 50.0
    fuel: Literal["petrol", "wood"] = "petrol"

    def __post_init__(self) -> None:
        if not self.power > 0:
            raise ValueError(f"power is {self.power}; it must be above 0")


@dataclass(frozen=True)
class Wheel:
    """A wheel.

    Args:
        size: in cm.
    """

    size: int


@dataclass(frozen=True)
class Drive:
    """Exactly one kind.

    Args:
        engine: with fuel.
        pedals: without.
    """

    engine: Engine | None = None
    pedals: Wheel | None = None


@dataclass(frozen=True)
class Car:
    """A car.

    It has no wings.

    Args:
        name: painted on it, for example "Speedy".
        doors, seats: how many
            there are.
        engine: the engine.
        drive: what moves it.
        wheels: one mapping each, as {size: 40}.
        gears: ratios, for example 1,2,4.
        range: lowest and highest speed.
        colours: their names.
        slogans: painted on the doors.
        fast: it is fast.
        owner: null for nobody.
        limits: by road, as {town: 50}.
        extra: anything.
        tags: words and numbers.
    """

    name: str
    doors: int = 4
    seats: int = 5
    engine: Engine = field(default_factory=Engine)
    drive: Drive | None = None
    wheels: list[Wheel] = field(default_factory=list)
    gears: tuple[int, ...] = (1, 2, 4)
    range: tuple[float, float] = (0.0, 1.0)
    colours: list[str] = field(default_factory=list)
    slogans: list[str] = field(default_factory=list, metadata={"literal": True})
    fast: bool = False
    owner: str | None = None
    limits: dict[str, float] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    tags: dict[str, int | str | bool | None] = field(default_factory=dict)


def parse(*arguments):
    return parse_options(Car, ["--name", "x", *arguments])


TEXTS = [
    "1",
    "true",
    "null",
    "a, b",
    "a: b",
    "# heading",
    '"quoted"',
    "it's",
    "{x}",
    "[x]",
    "-5",
    "1e3",
    "",
    " ",
    "a=b",
    "é\n",
]


@pytest.mark.parametrize("text", TEXTS)
def test_text_stays_as_it_was_typed(text):
    assert parse_options(Car, ["--name", text]).name == text
    assert parse_options(Car, [f"--name={text}"]).name == text
    assert type(parse_options(Car, ["--name", text]).name) is str


@pytest.mark.parametrize("text", TEXTS)
def test_list_of_texts_takes_one_text_for_each_option(text):
    assert parse("--slogans", text, f"--slogans={text}").slogans == [text, text]


@pytest.mark.parametrize(
    ("arguments", "gears"),
    [
        (["--gears", "1,4,8"], (1, 4, 8)),
        (["--gears=1,4,8"], (1, 4, 8)),
        (["--gears", "[1, 4, 8]"], (1, 4, 8)),
        (["--gears", " 1 , 4,8, "], (1, 4, 8)),
        (["--gears", "1,4", "--gears", "8"], (1, 4, 8)),
        (["--gears", "7"], (7,)),
        (["--gears", ""], ()),
    ],
)
def test_list_is_split_at_commas_or_repeated(arguments, gears):
    assert parse(*arguments).gears == gears


def test_list_of_names_and_pair_are_split_at_commas():
    car = parse("--colours", "red,dark blue", "--range", "0.5,2", "--wheels", "{size: 1}", "--wheels", "[{size: 2}]")
    assert (car.colours, car.range, car.wheels) == (["red", "dark blue"], (0.5, 2.0), [Wheel(1), Wheel(2)])


@pytest.mark.parametrize(
    ("text", "value"), [("1e3", 1e3), ("1e-5", 1e-5), ("2", 2.0), (".inf", float("inf")), ("inf", float("inf"))]
)
def test_number_may_be_written_as_in_yaml_and_as_in_python(text, value, tmp_path):
    assert parse("--engine.power", text).engine.power == value
    (tmp_path / "car.yaml").write_text(f"name: x\nengine: {{power: {text}}}\n")
    assert parse_options(Car, ["--config", str(tmp_path / "car.yaml")]).engine.power == value


@pytest.mark.parametrize(("text", "value"), [("3", 3), ("3.0", 3), ("1e2", 100), ("-1", -1)])
def test_whole_number_may_be_written_as_a_power_of_ten(text, value):
    assert parse("--doors", text).doors == value


@pytest.mark.parametrize(
    ("arguments", "fast"),
    [
        (["--fast"], True),
        (["--fast", "true"], True),
        (["--fast=false"], False),
        (["--fast", "True"], True),
        (["--fast", "--doors", "2"], True),
    ],
)
def test_flag_needs_no_value(arguments, fast):
    assert parse(*arguments).fast is fast


def test_mapping_is_yaml_or_one_option_for_each_key():
    assert parse("--limits", "{town: 50, a-b: 1}").limits == {"town": 50.0, "a-b": 1.0}
    assert parse("--limits.town", "50", "--limits.a-b", "1").limits == {"town": 50.0, "a-b": 1.0}
    extra = parse("--extra.temperature", "0.2", "--extra.stop", "[a, b]", "--extra.on", "true").extra
    assert extra == {"temperature": 0.2, "stop": ["a", "b"], "on": True}


def test_value_of_several_scalar_types_is_what_yaml_says():
    assert parse("--tags.a", "1", "--tags.b", "one", "--tags.c", "true", "--tags.d", "null").tags == {
        "a": 1, "b": "one", "c": True, "d": None,
    }  # fmt: skip
    with pytest.raises(OptionError, match=r"tags\.a is \[1\]; it must be one of int, str, bool"):
        parse("--tags.a", "[1]")


def test_choice_between_dataclasses_must_be_a_section():
    @dataclass(frozen=True)
    class Untagged:
        """Not allowed."""

        part: Engine | Wheel

    with pytest.raises(TypeError, match="optional field for each"):
        parse_options(Untagged, [])


def test_null_is_no_value_where_a_value_may_be_missing():
    assert parse("--owner", "Ann", "--owner", "null").owner is None
    assert parse("--drive.engine.power", "3", "--drive", "null").drive is None


FILE = """
name: file
doors: 2
engine: {power: 7, fuel: wood}
drive: {engine: {power: 9, fuel: wood}}
colours: [red]
limits: {town: 50}
"""


@pytest.fixture
def config(tmp_path):
    (tmp_path / "car.yaml").write_text(FILE)
    return str(tmp_path / "car.yaml")


@pytest.mark.parametrize("form", ["--config FILE", "--config=FILE"])
@pytest.mark.parametrize("first", [True, False])
def test_argument_changes_one_field_of_a_file(form, first, config):
    file = form.replace("FILE", config).split()
    changes = [
        "--engine.power=8",
        "--drive.engine.power",
        "10",
        "--doors",
        "3",
        "--colours",
        "blue",
        "--limits.road",
        "90",
    ]
    car = parse_options(Car, [*file, *changes] if first else [*changes, *file])
    assert car.name == "file"
    assert car.doors == 3
    assert car.engine == Engine(8.0, "wood")
    assert car.drive == Drive(engine=Engine(10.0, "wood"))
    assert car.colours == ["blue"]
    assert car.limits == {"town": 50.0, "road": 90.0}


def test_later_file_changes_single_fields_of_an_earlier_one(config, tmp_path):
    (tmp_path / "more.yaml").write_text("engine: {power: 1}\n")
    car = parse_options(Car, ["--config", config, "--config", str(tmp_path / "more.yaml")])
    assert (car.doors, car.engine) == (2, Engine(1.0, "wood"))


def test_section_may_be_a_file_beside_the_one_that_names_it(tmp_path, monkeypatch):
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "engine.yaml").write_text("fuel: wood\n")
    (tmp_path / "car.yaml").write_text("name: x\nengine: parts/engine.yaml\ndrive: {engine: parts/engine.yaml}\n")
    car = parse_options(Car, ["--config", str(tmp_path / "car.yaml"), "--engine.power", "2"])
    assert (car.engine, car.drive) == (Engine(2.0, "wood"), Drive(engine=Engine(50.0, "wood")))
    monkeypatch.chdir(tmp_path / "parts")
    for order in (
        ["--engine", "engine.yaml", "--engine.power", "3"],
        ["--engine.power", "3", "--engine", "engine.yaml"],
    ):
        assert parse(*order).engine == Engine(3.0, "wood")
    assert parse("--engine", "{power: 4, fuel: wood}").engine == Engine(4.0, "wood")


def test_empty_file_holds_no_options(tmp_path):
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert parse("--config", str(tmp_path / "empty.yaml")) == Car("x")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--door", "3"], "unknown option --door; did you mean --doors?"),
        (["--engine.pover", "3"], "unknown option --engine.pover; did you mean --engine.power?"),
        (["--fuel", "wood"], "unknown option --fuel; did you mean --engine.fuel?"),
        (["--drive.engine.fule", "wood"], "unknown option --drive.engine.fule; did you mean --drive.engine.fuel?"),
        (["--wings", "2"], "unknown option --wings"),
        (["--doors.left", "2"], "unknown option --doors.left"),
        (["--engine", "{pover: 3}"], "unknown option engine.pover; did you mean engine.power?"),
        (["--wheels", "{size: 1}", "--wheels", "{radius: 1}"], "unknown option wheels[1].radius; known are size"),
        (["--doors", "two"], "doors is 'two'; it must be a whole number"),
        (["--doors", "2.5"], "doors is '2.5'; it must be a whole number"),
        (["--engine.power", "much"], "engine.power is 'much'; it must be a number"),
        (["--engine.power", "nan"], "engine.power is 'nan'; it must be a number"),
        (["--engine.power", "-1"], "engine.power is -1.0; it must be above 0"),
        (["--drive.engine.power", "0"], "drive.engine.power is 0.0; it must be above 0"),
        (["--engine.fuel", "coal"], "engine.fuel is 'coal'; it must be one of petrol, wood"),
        (["--fast", "maybe"], "fast is 'maybe'; it must be true or false"),
        (["--gears", "1,x"], "gears[1] is 'x'; it must be a whole number"),
        (["--range", "1,2,3"], "it must be a list of 2 entries"),
        (["--limits", "50"], "limits is 50; it must be a mapping"),
        (["--limits.town", "slow"], "limits.town is 'slow'; it must be a number"),
        (["--colours", "[1, 2]"], "colours[0] is 1; it must be text: put it in quotes"),
        (["--doors"], "--doors needs a value"),
        (["--doors", "--fast"], "--doors needs a value"),
        (["fast"], "'fast' is not an option"),
        (["-f"], "'-f' is not an option"),
    ],
)  # fmt: skip
def test_wrong_argument_names_the_option_and_what_is_allowed(arguments, message):
    with pytest.raises(OptionError) as caught:
        parse(*arguments)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("name: 5", "name is 5; it must be text: put it in quotes"),
        ("name: no", "name is False; it must be text"),
        ("name: x\ndoors: true", "doors is True; it must be a whole number"),
        ("name: x\ndoors: null", "doors is None; it must be a whole number"),
        ("name: x\ngears: 1,2", "gears is '1,2'; it must be a list, as [first, second]"),
        ("name: x\ncolours: {a: b}", "colours is {'a': 'b'}; it must be a list"),
        ("name: x\nengine: 5", "engine is 5; it must be a mapping with the fields power, fuel"),
        ("name: x\nengine: nowhere.yaml", "engine: 'nowhere.yaml' does not exist"),
        ("name: x\nwheels: [40]", "wheels[0] is 40; it must be a mapping with the fields size"),
        ("name: x\nwheels: [{}]", "wheels[0].size is required"),
        ("name: x\nwheel: []", "unknown option wheel; did you mean wheels?"),
        ("name: x\n5: 6", "unknown option 5"),
        ("doors: 3", "name is required"),
        ("name: x\nextra: &a {b: {c: *a}}", "extra.b.c.b contains itself"),
    ],
)  # fmt: skip
def test_wrong_value_in_a_file_names_the_option_and_what_is_allowed(content, message, tmp_path):
    (tmp_path / "car.yaml").write_text(content)
    with pytest.raises(OptionError) as caught:
        parse_options(Car, ["--config", str(tmp_path / "car.yaml")])
    assert message in str(caught.value)


def test_build_names_the_place_of_a_fault():
    assert build(Engine, {"power": 3}) == Engine(3.0)
    with pytest.raises(OptionError, match=r"stage burn\.power is -1"):
        build(Engine, {"power": -1}, "stage burn")


def test_texts_of_fields_come_from_the_docstrings_of_class_and_base():
    @dataclass(frozen=True)
    class Van(Car):
        """A van.

        Args:
            load: in kg.
            engine: a strong one.
        """

        load: int = 0

    found = field_texts(Van)
    assert (found["load"], found["engine"], found["owner"]) == ("in kg.", "a strong one.", "null for nobody.")
    assert found["doors"] == found["seats"] == "how many there are."


def test_help_explains_every_option_with_type_and_default(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    text = " ".join(help_text("drive", Car, "drive --name Speedy").split())
    for expected in (
        "A car.",
        "It has no wings.",
        "drive --name Speedy",
        '--name TEXT painted on it, for example "Speedy" (required)',
        "--doors INT how many there are (default: 4)",
        "--engine.power NUMBER in kW, above 0 (default: 50.0)",
        "--drive.engine.fuel petrol|wood what it burns (default: petrol)",
        "--gears INT,INT,... ratios, for example 1,2,4 (default: 1,2,4)",
        "--slogans TEXT painted on the doors (give the option once for each text)",
        "--fast true|false it is fast (default: false)",
        "--owner TEXT null for nobody (default: null)",
    ):
        assert expected in text
    assert usage("drive", Car) == "drive --name TEXT [--config FILE] [--OPTION VALUE ...]"
