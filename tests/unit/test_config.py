"""YAML files, `key=value` overrides, models by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_dist.commands.config import find_model, model_names, override, read_yaml, resolve_models
from moe_dist.errors import ConfigError
from moe_dist.model.spec import MoESpec

MODEL = {"name": "one", "hidden": 128, "intermediate": 128, "num_experts": 4, "top_k": 2}


class TestReadYaml:
    def test_reads_a_mapping(self, tmp_path: Path):
        path = tmp_path / "experiment.yaml"
        path.write_text("worlds: [1, 2]\nray: {cpus_per_rank: 0.5}\n")
        assert read_yaml(path) == {"worlds": [1, 2], "ray": {"cpus_per_rank": 0.5}}

    @pytest.mark.parametrize(
        ("text", "rule"),
        [
            ("a: [1, 2", "no valid YAML"),
            ("- a\n- b\n", "holds a list"),
            ("", "holds nothing"),
            ("just text", "holds a single value"),
        ],
    )
    def test_anything_else_is_refused_by_name(self, tmp_path: Path, text, rule):
        path = tmp_path / "bad.yaml"
        path.write_text(text)
        with pytest.raises(ConfigError, match=rule) as raised:
            read_yaml(path)
        assert raised.value.value == str(path)
        assert "\n" not in str(raised.value)

    def test_a_missing_file_and_a_directory(self, tmp_path: Path):
        with pytest.raises(ConfigError, match="can't be read: No such file"):
            read_yaml(tmp_path / "nothing.yaml")
        with pytest.raises(ConfigError, match="can't be read: is a folder"):
            read_yaml(tmp_path)

    def test_yaml_can_not_make_objects(self, tmp_path: Path):
        path = tmp_path / "evil.yaml"
        path.write_text("a: !!python/object/apply:os.getcwd []\n")
        with pytest.raises(ConfigError, match="no valid YAML"):
            read_yaml(path)


class TestOverride:
    @pytest.mark.parametrize(
        ("assignment", "expected"),
        [
            ("iters=8", {"iters": 8}),
            ("check=false", {"check": False}),
            ("tokens=[1, 2]", {"tokens": [1, 2]}),
            ("tokens=[1,2]", {"tokens": [1, 2]}),
            ("model.quant=none", {"model": {"quant": "none"}}),
            ("a.b.c=1", {"a": {"b": {"c": 1}}}),
            ("payload=", {"payload": None}),
            ("source.checkpoint=/a=b", {"source": {"checkpoint": "/a=b"}}),
            ("skews=[zipf:1.2, hot:2]", {"skews": ["zipf:1.2", "hot:2"]}),
        ],
    )
    def test_values_are_yaml_and_dots_nest(self, assignment, expected):
        assert override({}, [assignment]) == expected

    def test_they_go_over_the_files_keys_and_other_keys_stay(self):
        given = {"iters": 1, "ray": {"address": "here", "strategy": "PACK"}}
        changed = override(given, ["iters=3", "ray.address=there", "ray.cpus_per_rank=1"])
        assert changed == {"iters": 3, "ray": {"address": "there", "strategy": "PACK", "cpus_per_rank": 1}}
        assert given == {"iters": 1, "ray": {"address": "here", "strategy": "PACK"}}  # not written through

    @pytest.mark.parametrize(
        ("first", "second"),
        [("seed=1", "seed=2"), ("seed=1", "seed=1"), ("model.quant=none", "model={hidden: 128}"), ("a={}", "a.b.c=1")],
    )
    def test_a_key_that_is_given_twice_is_refused(self, first, second):
        for one, other in ((first, second), (second, first)):
            with pytest.raises(ConfigError, match="each key once") as raised:
                override({}, [one, "x=1", other])
            assert raised.value.value == other
            assert one in raised.value.rule

    @pytest.mark.parametrize("assignment", ["iters", "=8", "a: b", "a.=1", ".a=1", "a..b=1"])
    def test_what_is_no_assignment(self, assignment):
        with pytest.raises(ConfigError, match="not an assignment") as raised:
            override({}, [assignment])
        assert raised.value.value == assignment

    def test_values_and_sections_are_not_mixed_up(self):
        with pytest.raises(ConfigError, match="iters is a value, not a section"):
            override({"iters": 1}, ["iters.a=2"])
        with pytest.raises(ConfigError, match="no valid YAML"):
            override({}, ["tokens=[1"])


class TestModels:
    def test_every_shipped_model_loads_under_its_name(self):
        names = model_names()
        assert {"tiny", "DeepSeek-V3", "Qwen3-30B-A3B"} <= set(names)
        for name in names:
            assert find_model(name).name == name
            assert find_model(name.upper()) == find_model(name)

    def test_an_unknown_name_lists_the_legal_ones(self):
        with pytest.raises(ConfigError, match="no model of this name") as raised:
            find_model("nosuch")
        for name in model_names():
            assert name in str(raised.value)

    def test_a_file_of_ones_own(self, tmp_path: Path, monkeypatch):
        (tmp_path / "mine.yaml").write_text("name: mine\nhidden: 64\nintermediate: 64\nnum_experts: 2\ntop_k: 1\n")
        assert find_model(str(tmp_path / "mine.yaml")).hidden == 64
        with pytest.raises(ConfigError, match="can't be read"):
            find_model(str(tmp_path / "other.yaml"))
        folder = tmp_path / "configs" / "models"
        folder.mkdir(parents=True)
        (tmp_path / "mine.yaml").rename(folder / "tiny.yaml")
        monkeypatch.chdir(tmp_path)
        assert find_model("tiny").name == "mine"  # the working directory's comes first
        assert find_model("DeepSeek-V3").num_experts == 256  # the shipped ones stay

    def test_names_and_sections_become_specs(self):
        resolved = resolve_models({"models": ["tiny", MODEL], "iters": 3})
        assert resolved["iters"] == 3
        assert resolved["models"] == (find_model("tiny"), MoESpec(**MODEL))

    def test_a_model_section_changes_every_model(self):
        resolved = resolve_models({"models": ["tiny", MODEL], "model": {"quant": "none", "top_k": 1}})
        assert "model" not in resolved
        assert [(spec.name, spec.quant, spec.top_k) for spec in resolved["models"]] == [
            ("tiny", "none", 1),
            ("one", "none", 1),
        ]

    def test_changes_are_checked(self):
        with pytest.raises(ConfigError, match=r"model\.quant = 'int4'"):
            resolve_models({"models": ["tiny"], "model": {"quant": "int4"}})
        with pytest.raises(ConfigError, match=r"model\.hiden.*unknown key"):
            resolve_models({"models": ["tiny"], "model": {"hiden": 8}})

    @pytest.mark.parametrize(
        ("config", "field"), [({"models": "tiny"}, "experiment.models"), ({"models": [], "model": "tiny"}, "model")]
    )
    def test_the_wrong_kind_of_value(self, config, field):
        with pytest.raises(ConfigError) as raised:
            resolve_models(config)
        assert raised.value.field == field

    @pytest.mark.parametrize("model", [3, None, ["tiny"]])
    def test_a_model_that_is_neither_name_nor_section(self, model):
        with pytest.raises(ConfigError):
            resolve_models({"models": [model]})
