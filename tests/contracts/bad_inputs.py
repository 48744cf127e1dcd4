"""What users get wrong, and what each message has to teach them.

``must`` holds the words of the lesson: what was given, what is allowed, what to type instead.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lm_calib_plugin
from lm_calib_plugin.recipe import Recipe
from lm_calib_plugin.runtime import Runtime


@dataclass(frozen=True)
class Case:
    """Something a user may do, the argument at fault, and words the message must hold."""

    name: str
    do: Callable[[], Any]
    argument: str
    must: tuple[str, ...]


def recipe(**given: Any) -> Callable[[], Any]:
    """Arguments as the harness hands them over."""
    return lambda: Recipe.from_model_args(given)


def wanda(**given: Any) -> Callable[[], Any]:
    return recipe(**{"method": "wanda", "sparsity": 0.5, **given})


def made(**given: Any) -> Callable[[], Any]:
    """What the harness does before it loads a model."""
    return lambda: Recipe(**given).make_method()


def gptq(**given: Any) -> Callable[[], Any]:
    return recipe(**{"method": "gptq", **given})


def yaml_file(text: str | bytes, **typed: Any) -> Callable[[], Any]:
    """A recipe file of this content in the current folder, and arguments typed beside it."""

    def do() -> Any:
        Path("recipe.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
        return Recipe.from_model_args({"recipe": "recipe.yaml", **typed})

    return do


def calibration(expression: str) -> Callable[[], Any]:
    """Check an expression as far as it goes without data and model."""

    def do() -> Any:
        from lm_calib_plugin.calibration import validate_calibration

        validate_calibration(Recipe(method="wanda", sparsity=0.5, calibration=expression))

    return do


def stored(expression: str, sequences: int = 3, **given: Any) -> Callable[[], Any]:
    """Use the set of a folder `my-set`, made here, as the harness does before it loads a model."""

    def do() -> Any:
        from lm_calib_plugin.calibration import CalibrationSet, validate_calibration

        CalibrationSet.of([[1, 2, 3]] * sequences, seqlen=3).save("my-set")
        Path("texts").mkdir()
        Path("texts/a.txt").write_text("a")
        validate_calibration(Recipe(method="wanda", sparsity=0.5, calibration=expression, **given))

    return do


def mixture(expression: str, **given: Any) -> Callable[[], Any]:
    """Check a mixture as the harness does before it loads a model."""

    def do() -> Any:
        from lm_calib_plugin.calibration import CalibrationSet
        from lm_calib_plugin.checks import check_calibration

        CalibrationSet.of([[1, 2, 3]] * 3, seqlen=3).save("my-set")
        fields = {"method": "wanda", "sparsity": 0.5, **given}
        check_calibration(Recipe(**fields, calibration=expression))

    return do


def preflight(
    sets: dict[str, str] | None = None, domains: dict[str, str] | None = None, **given: Any
) -> Callable[[], Any]:
    """Ask a preflight that is refused before a model is loaded."""

    def do() -> Any:
        from lm_calib_plugin.preflight.question import Question, checked_recipes

        asked = Recipe(**{"method": "wanda", "sparsity": 0.5, **given})
        plain = {"web": "random"}
        checked_recipes(
            Question(asked, plain if sets is None else sets, plain if domains is None else domains)
        )

    return do


def samples(text: str) -> Callable[[], Any]:
    """Compare answers in a file of this content with themselves."""

    def do() -> Any:
        Path("samples_t.jsonl").write_text(text)
        return command("inspect", "answers", "samples_t.jsonl", "samples_t.jsonl")()

    return do


def finished_set(*words: str) -> Callable[[], Any]:
    """Type a command for a model that is calibrated with a set in the folder ``made``."""

    def do() -> Any:
        from lm_calib_plugin import CalibrationSet

        CalibrationSet.of([[1, 2, 3]], seqlen=3).save("made")
        return command(*words, "--sparsity", "0.5", "--calibration", "set:made")()

    return do


def layer(shape: tuple[int, int], **given: Any) -> Callable[[], Any]:
    """Check a layer against a recipe, as the engine does before it reads any data."""

    def do() -> Any:
        made = Recipe(**given)
        method = made.make_method()
        method.check_layer("model.layers.0.mlp.down_proj", shape)

    return do


def compressed(architecture: str, **given: Any) -> Callable[[], Any]:
    """Compress a tiny model, with 3 sequences where the method uses data."""

    def do() -> Any:
        from lm_calib_plugin.calibration import CalibrationSet
        from lm_calib_plugin.compression import compress
        from tests.tiny import make_model

        made = Recipe(**{"group_size": 16, **given})
        data = CalibrationSet.of([[5, 6, 7, 8] * 2] * 3, seqlen=8) if made.terms else None
        compress(make_model(architecture), None, made, Runtime(progress=False), data)

    return do


def unmapped(**given: Any) -> Callable[[], Any]:
    """Compress a tiny model of an architecture that no transform knows."""

    def do() -> Any:
        import transformers

        from lm_calib_plugin.compression import compress

        size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 97}
        config = transformers.StableLmConfig(**size, **heads)
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        compress(model, None, Recipe(**{"group_size": 16, **given}), Runtime(progress=False))

    return do


def loaded_as(model_class: str, **given: Any) -> Callable[[], Any]:
    """Ask a model of the harness; the kind of method is looked at before anything is loaded."""

    def do() -> Any:
        from lm_calib_plugin.harness import models

        getattr(models, model_class)(pretrained="nowhere", **given)

    return do


def packed(number: str, bits: int, group_size: int, name: str) -> Callable[[], Any]:
    """Ask for kernels, inputs in the same numbers, on a CPU whatever this machine has."""

    def do() -> Any:
        from lm_calib_plugin.execution import Activation, check_execution
        from lm_calib_plugin.execution.facts import Device

        inputs, device = Activation(number, bits), Device("cpu", None, vnni=True)
        check_execution(number, bits, group_size, activation=inputs, device=device, name=name)

    return do


def command(*arguments: str) -> Callable[[], Any]:
    """A command line, with its errors as they are raised."""

    def do() -> Any:
        from lm_calib_plugin.cli import app

        return app(list(arguments), standalone_mode=False)

    return do


_SUMMARY = """{"config": {"compression": {"key": "k", "report_sha256": "0", "recipe": {},
"report_file": "/there/layers-00-00.json"}}}"""


def results_of(text: str, name: str, *arguments: str) -> Callable[[], Any]:
    """Look at the layers of a file of this content in the current folder."""

    def do() -> Any:
        Path(name).write_text(text)
        return command("inspect", "layers", name, *arguments)()

    return do


def observed_by_hand() -> Any:
    """Static ranges of a number that has none, as code may ask for them."""
    from lm_calib_plugin.quantization.activations import ActivationSpec

    ActivationSpec("mxfp4", 4, dynamic=False)


CASES = [
    # --- names
    Case(
        "unknown_argument", wanda(nsample=8), "nsample", ("did you mean `nsamples`?", "ls options")
    ),
    Case("unknown_argument_far_off", wanda(xyzzy=8), "xyzzy", ("unknown", "lm-calib ls options")),
    Case(
        "method_missing",
        recipe(sparsity=0.5),
        "method",
        ("missing", "wanda", "gptq", "method=wanda"),
    ),
    Case(
        "method_typo",
        recipe(method="wnada", sparsity=0.5),
        "method",
        (
            "no method `wnada`",
            "did you mean `wanda`?",
            "installed: magnitude, wanda, ria, sparsegpt, ",
        ),
    ),
    Case("method_far_off", recipe(method="exl2"), "method", ("no method `exl2`", "installed: ")),
    Case(
        "option_of_another_method",
        wanda(bits=4),
        "bits",
        ("not an option of method `wanda`", "sparsity, pattern, group", "drop `bits`"),
    ),
    Case(
        "stage_typo", wanda(refine="swop"), "refine", ("no refinement part `swop`", "installed: ")
    ),
    Case(
        "stage_option_typo",
        wanda(allocation="owl?lamda=0.1"),
        "allocation",
        ("`lamda` is not an option of `owl`", "did you mean `lambda`?", "its options: m, lambda"),
    ),
    Case(
        "stage_option_of_a_part_without",
        wanda(score="ria?m=1"),
        "score",
        ("`m` is not an option of `ria`", "its options: none"),
    ),
    Case(
        "stage_option_twice",
        wanda(allocation="owl?m=3&m=5"),
        "allocation",
        ("got m twice", "every option once"),
    ),
    Case(
        "stage_option_no_number",
        made(method="owl", sparsity=0.5, allocation="owl?m=many"),
        "allocation=m",
        ("got 'many'", "a number is needed"),
    ),
    Case(
        "stage_option_out_of_range",
        made(method="owl", sparsity=0.5, allocation="owl?m=-1"),
        "allocation",
        ("got m=-1", "m >= 0"),
    ),
    Case(
        "stage_without_name",
        wanda(allocation={"m": 3}),
        "allocation",
        ("got {'m': 3}", "the `name` of the part"),
    ),
    Case("group_typo", wanda(group="rows"), "group", ("got 'rows'", "did you mean `row`?")),
    Case(
        "list_without_fractions",
        made(method="wanda", allocation="list"),
        "allocation",
        ("`list` without fractions", "list?fractions="),
    ),
    Case(
        "list_with_a_percentage",
        made(method="wanda", allocation="list?fractions=50+60"),
        "allocation",
        ("got 50 in fractions", "0 <= s < 1"),
    ),
    Case("damp_of_a_method_without", wanda(damp=0.1), "damp", ("`wanda`", "drop `damp`")),
    Case(
        "sparsity_of_a_quantizer",
        gptq(sparsity=0.5),
        "sparsity",
        ("`gptq`", "bits", "drop `sparsity`"),
    ),
    # --- strength of pruning
    Case(
        "sparsity_missing",
        recipe(method="wanda"),
        "sparsity",
        ("0 <= s < 1", "sparsity=0.5", "pattern=2:4"),
    ),
    Case(
        "sparsity_percent",
        wanda(sparsity=50),
        "sparsity",
        ("got 50", "fraction removed, 0 <= s < 1", "for 50 % write 0.5"),
    ),
    Case("sparsity_one", wanda(sparsity=1.0), "sparsity", ("remove every weight", "below 1")),
    Case("sparsity_negative", wanda(sparsity=-0.1), "sparsity", ("got -0.1", "0 <= s < 1")),
    Case("sparsity_beyond_percent", wanda(sparsity=500), "sparsity", ("got 500", "0 <= s < 1")),
    Case("sparsity_text", wanda(sparsity="half"), "sparsity", ("'half'", "0 <= s < 1")),
    Case("sparsity_percent_sign", wanda(sparsity="50%"), "sparsity", ("'50%'", "0 <= s < 1")),
    Case("sparsity_boolean", wanda(sparsity=True), "sparsity", ("True", "0 <= s < 1")),
    Case("sparsity_nan", wanda(sparsity=float("nan")), "sparsity", ("nan", "0 <= s < 1")),
    Case("sparsity_infinite", wanda(sparsity=float("inf")), "sparsity", ("inf", "0 <= s < 1")),
    Case(
        "pattern_turned_around",
        recipe(method="wanda", pattern="4:2"),
        "pattern",
        ("got 4:2", "keeps N of every M", "did you mean 2:4?"),
    ),
    Case(
        "pattern_keeps_all",
        recipe(method="wanda", pattern="4:4"),
        "pattern",
        ("got 4:4", "0 < N < M", "2:4"),
    ),
    Case(
        "pattern_keeps_none",
        recipe(method="wanda", pattern="0:4"),
        "pattern",
        ("got 0:4", "0 < N < M", "2:4"),
    ),
    Case(
        "pattern_text",
        recipe(method="wanda", pattern="two-four"),
        "pattern",
        ("'two-four'", "unstructured", "2:4"),
    ),
    Case(
        "pattern_against_sparsity",
        recipe(method="wanda", pattern="2:4", sparsity=0.7),
        "pattern",
        ("2:4 fixes sparsity at 0.5", "0.7", "drop `sparsity`"),
    ),
    Case(
        "pattern_on_a_layer",
        layer((8, 50), method="wanda", pattern="2:4"),
        "pattern",
        (
            "model.layers.0.mlp.down_proj has 50 inputs",
            "not divisible by 4",
            "ignore=",
            "unstructured",
        ),
    ),
    Case(
        "compat_unknown",
        wanda(compat="refrence"),
        "compat",
        ("did you mean `reference`?", "allowed: reference"),
    ),
    # --- strength of quantization
    Case("bits_one", gptq(bits=1), "bits", ("got 1", "2-8", "16")),
    Case("bits_nine", gptq(bits=9), "bits", ("got 9", "2-8")),
    Case("bits_fraction", gptq(bits=1.58), "bits", ("got 1.58", "2-8 bits")),
    Case("bits_boolean", gptq(bits=True), "bits", ("got True", "2-8 bits")),
    Case("group_size_zero", gptq(group_size=0), "group_size", ("got 0", "-1")),
    Case(
        "group_size_on_a_layer",
        layer((64, 4096), method="gptq", group_size=100),
        "group_size",
        ("100 does not divide the 4096 inputs", "down_proj", "64", "128", "-1", "group_size="),
    ),
    Case(
        "group_size_on_an_odd_layer",
        layer((64, 50), method="rtn"),
        "group_size",
        ("128 does not divide the 50 inputs", "group_size=-1"),
    ),
    Case("damp_negative", gptq(damp=-1), "damp", ("got -1", ">= 0", "0.01")),
    Case("damp_text", gptq(damp="lots"), "damp", ("'lots'", ">= 0", "auto")),
    Case("bits_zero", gptq(bits=0), "bits", ("got 0", "2-8", "16")),
    Case("bits_text", gptq(bits="four"), "bits", ("'four'", "2-8", "16")),
    # --- a width for every layer
    Case(
        "bits_auto_alone",
        gptq(bits="auto"),
        "bits",
        ("got auto", "2 <= B <= 16", "scales and zero points counted", "bits=auto:3.25"),
    ),
    Case("bits_auto_too_small", gptq(bits="auto:1.5"), "bits", ("auto:1.5", "2 <= B", "auto:3.25")),
    Case("bits_auto_text", gptq(bits="auto:few"), "bits", ("auto:few", "2 <= B", "auto:3.25")),
    Case(
        "bits_auto_below_what_is_possible",
        compressed("llama", method="gptq", bits="auto:3", group_size=8, heldout=0.5),
        "bits",
        ("got auto:3", "2 bits in every layer need 6 bits", "B >= 6", "bits=auto:6.25"),
    ),
    Case(
        "bits_auto_without_data",
        recipe(method="rtn", bits="auto:4", calibration="none"),
        "calibration",
        ("bits=auto:4 needs calibration data", "calibration=self"),
    ),
    Case(
        "bits_auto_nothing_held_out",
        gptq(bits="auto:4", heldout=0),
        "heldout",
        ("got 0, but bits=auto:4 chooses", "above 0", "heldout=0.1"),
    ),
    Case(
        "bits_auto_of_a_joint_method",
        recipe(method="wanda+gptq", sparsity=0.5, bits="auto:4"),
        "bits",
        ("got auto:4 with method `wanda+gptq`", "quantization methods", "bits=4"),
    ),
    Case(
        "bits_auto_with_every_layer_named",
        compressed("llama", method="rtn", bits="auto:6", heldout=0.5, overrides={"*": {"bits": 8}}),
        "overrides",
        ("no layer is left for bits=auto", "drop a pattern"),
    ),
    # --- schemes
    Case(
        "scheme_typo",
        gptq(scheme="W4A17"),
        "scheme",
        ("'W4A17'", "did you mean `W4A16`?", "NVFP4", "bits, group_size, act_bits"),
    ),
    Case(
        "scheme_against_bits",
        gptq(scheme="W4A16", bits=3),
        "bits",
        ("got 3, but scheme=W4A16 has bits=4", "drop `bits`", "replace scheme=W4A16"),
    ),
    Case(
        "scheme_against_bits_auto",
        gptq(scheme="W4A16", bits="auto:3.25"),
        "bits",
        ("got auto:3.25, but scheme=W4A16 has bits=4", "drop `bits`"),
    ),
    Case(
        "scheme_against_act_bits",
        gptq(scheme="W4A16", act_bits=8),
        "act_bits",
        ("got 8, but scheme=W4A16 has act_bits=16", "drop `act_bits`"),
    ),
    Case(
        "scheme_against_act_dynamic",
        gptq(scheme="W8A8", act_dynamic=False),
        "act_dynamic",
        ("got false, but scheme=W8A8 has act_dynamic=true", "use scheme=W8A8_static"),
    ),
    Case(
        "scheme_against_group_size",
        gptq(scheme="NVFP4", group_size=32),
        "group_size",
        ("got 32, but scheme=NVFP4 has group_size=16", "drop `group_size`"),
    ),
    Case(
        "scheme_against_symmetric",
        gptq(scheme="FP8", symmetric=False),
        "symmetric",
        ("got false, but scheme=FP8 has symmetric=true", "drop `symmetric`"),
    ),
    Case(
        "scheme_nvfp4_on_a_layer",
        layer((64, 172), method="rtn", scheme="NVFP4"),
        "scheme",
        ("NVFP4 has groups of 16", "172 inputs of layer model.layers.0.mlp.down_proj", "ignore="),
    ),
    Case(
        "scheme_mxfp4_on_a_layer",
        layer((64, 48), method="rtn", scheme="MXFP4"),
        "scheme",
        ("MXFP4 has groups of 32", "48 inputs of layer", "multiples of 32", "ignore=down_proj"),
    ),
    Case(
        "scheme_static_mxfp4",
        recipe(method="rtn", scheme="MXFP4", act_dynamic=False),
        "act_dynamic",
        ("got false, but scheme=MXFP4 has act_dynamic=true",),
    ),
    Case(
        "static_mxfp4_by_hand",
        observed_by_hand,
        "act_dynamic",
        ("got false for mxfp4", "from the values of a block", "act_dynamic=true"),
    ),
    Case(
        "scheme_static_without_data",
        recipe(method="rtn", scheme="W8A8_static", calibration="none"),
        "calibration",
        ("scheme=W8A8_static needs calibration data", "calibration=self"),
    ),
    # --- activations and cached values
    Case("act_bits_one", gptq(act_bits=1), "act_bits", ("got 1", "2-8 bits", "16")),
    Case("act_bits_32", gptq(act_bits=32), "act_bits", ("got 32", "2-8 bits", "16")),
    Case("kv_bits_nine", gptq(kv_bits=9), "kv_bits", ("got 9", "2-8 bits", "16")),
    Case(
        "act_bits_of_a_pruning_method",
        wanda(act_bits=8),
        "act_bits",
        ("not an option of method `wanda`", "drop `act_bits`"),
    ),
    Case(
        "act_bits_of_fused_experts",
        compressed("mixtral", method="rtn", act_bits=8),
        "act_bits",
        ("experts.0.gate_up_proj is part of MixtralExperts", "ignore=*experts*"),
    ),
    Case(
        "act_dynamic_without_act_bits",
        gptq(act_dynamic=False),
        "act_dynamic",
        ("no activation is quantized", "add act_bits=8", "drop `act_dynamic`"),
    ),
    Case(
        "act_dynamic_text",
        gptq(act_bits=8, act_dynamic="often"),
        "act_dynamic",
        ("'often'", "true or false"),
    ),
    Case(
        "observer_of_dynamic_activations",
        gptq(scheme="W8A8", observer="mse"),
        "observer",
        ("no range of an activation is calibrated", "act_dynamic=false", "W8A8_static"),
    ),
    Case(
        "observer_typo",
        gptq(scheme="W8A8_static", observer="precentile"),
        "observer",
        ("no observer part `precentile`", "did you mean `percentile`?", "minmax, percentile, mse"),
    ),
    Case(
        "observer_percentage",
        made(method="rtn", scheme="W8A8_static", observer="percentile?q=101"),
        "observer",
        ("got q=101", "0 < q <= 100", "percentile?q=99.9"),
    ),
    Case(
        "observer_without_first_tokens_twice",
        gptq(scheme="W8A8_static", observer="minmax?first=no", exclude_first_token=True),
        "observer",
        ("minmax?first=no beside exclude_first_token=true", "left out already", "observer=minmax"),
    ),
    Case(
        "kv_bits_of_falcon",
        compressed("falcon", method="rtn", kv_bits=4),
        "kv_bits",
        ("can not be reached in FalconDecoderLayer", "attention interface", "leave kv_bits out"),
    ),
    Case(
        "kv_bits_of_bloom",
        compressed("bloom", method="rtn", kv_bits=4),
        "kv_bits",
        ("can not be reached in BloomBlock", "leave kv_bits out"),
    ),
    # --- transforms
    Case(
        "transform_typo",
        gptq(transform="rotaton"),
        "transform",
        ("no transform part `rotaton`", "did you mean `rotation`?", "awq, smoothquant, rotation"),
    ),
    Case(
        "rotation_option_typo",
        gptq(transform="rotation?sed=1"),
        "transform",
        ("`sed` is not an option of `rotation`", "did you mean `seed`?", "seed, r2"),
    ),
    Case(
        "rotation_flag_text",
        made(method="rtn", transform="rotation?r2=maybe"),
        "transform=r2",
        ("'maybe'", "true or false"),
    ),
    Case(
        "rotation_seed_negative",
        made(method="rtn", transform="rotation?seed=-1"),
        "transform",
        ("got seed=-1", "seed >= 0"),
    ),
    Case(
        "rotation_of_gpt2",
        compressed("gpt2", method="rotation"),
        "transform",
        (
            "GPT2LMHeadModel (gpt2) can not be rotated",
            "llama",
            "transform=awq, smoothquant or none",
        ),
    ),
    Case(
        "awq_of_an_architecture_without_a_map",
        unmapped(method="awq"),
        "transform",
        ("not known for StableLmForCausalLM (stablelm)", "llama", "transform=none"),
    ),
    Case(
        "alpha_out_of_range",
        made(method="smoothquant", transform="smoothquant?alpha=1.5"),
        "transform",
        ("got alpha=1.5", "0 to 1, or auto"),
    ),
    Case(
        "alpha_text",
        made(method="smoothquant", transform="smoothquant?alpha=much"),
        "transform=alpha",
        ("'much'", "0 to 1, or auto"),
    ),
    # --- roundings
    Case(
        "rounding_none",
        gptq(rounding=None),
        "rounding",
        ("no rounding part `none`", "installed: rtn, gptq"),
    ),
    Case(
        "damp_auto_nothing_held_out",
        gptq(damp="auto", heldout=0),
        "heldout",
        ("got 0, but damp=auto chooses", "above 0", "heldout=0.1"),
    ),
    Case(
        "damp_auto_too_few_sequences",
        compressed("llama", method="gptq", damp="auto"),
        "heldout",
        ("0.1 of 3 sequences is less than one", "nsamples=20", "heldout=0.5"),
    ),
    Case(
        "damp_auto_of_a_pruning_method",
        recipe(method="sparsegpt", sparsity=0.5, damp="auto"),
        "damp",
        ("got auto with method `sparsegpt`", "a number", "damp=0.01"),
    ),
    Case(
        "gptq_heldout_nothing_held_out",
        recipe(method="gptq_heldout", heldout=0),
        "heldout",
        ("got 0, but `gptq_heldout` chooses", "heldout=0.1"),
    ),
    Case(
        "rounding_heldout_nothing_held_out",
        recipe(method="rtn", rounding="gptq_heldout", heldout=0),
        "heldout",
        ("got 0, but rounding=gptq_heldout chooses", "heldout=0.1"),
    ),
    Case(
        "joint_heldout_too_few_sequences",
        compressed("llama", method="wanda+gptq_heldout", sparsity=0.5),
        "heldout",
        ("0.1 of 3 sequences is less than one", "`wanda+gptq_heldout`", "nsamples=20"),
    ),
    Case(
        "hqq_symmetric",
        made(method="hqq", symmetric=True),
        "symmetric",
        ("hqq fits zero points", "symmetric=false"),
    ),
    Case(
        "hqq_with_fp8",
        made(method="hqq", scheme="FP8"),
        "rounding",
        ("hqq fits zero points, and fp8 has none", "symmetric=false", "rounding=rtn"),
    ),
    Case(
        "autoround_with_fp8",
        made(method="autoround", scheme="FP8"),
        "rounding",
        ("offsets of integer levels, and fp8 has none", "bits=4", "rounding=gptq"),
    ),
    Case(
        "autoround_of_fused_experts",
        compressed("mixtral", method="autoround"),
        "rounding",
        ("one of several experts in one tensor", "ignore=*experts*", "rounding=gptq"),
    ),
    Case(
        "correction_of_rtn",
        recipe(method="rtn", correction=0.3),
        "correction",
        ("not an option of method `rtn`", "drop `correction`"),
    ),
    Case(
        "act_order_of_rtn",
        recipe(method="rtn", act_order=True),
        "act_order",
        ("not an option of method `rtn`", "drop `act_order`"),
    ),
    Case(
        "act_order_of_another_rounding",
        gptq(rounding="rtn", act_order=True),
        "act_order",
        ("not an option of method `gptq` with rounding=rtn", "drop `act_order`"),
    ),
    Case(
        "true_sequential_in_a_dense_model",
        gptq(true_sequential=True, propagate="dense"),
        "true_sequential",
        ("beside propagate=dense", "propagate=compressed", "drop one"),
    ),
    Case(
        "correction_without_a_gram_matrix",
        made(method="wanda+rtn", sparsity=0.5, correction=0.3),
        "correction",
        ("not an option of method `wanda+rtn`", "drop `correction`"),
    ),
    # --- layers with options of their own
    Case(
        "overrides_text",
        gptq(overrides="*down_proj=4"),
        "overrides",
        ("'*down_proj=4'", "name patterns", '{"*down_proj": {"bits": 4}}'),
    ),
    Case("overrides_empty", gptq(overrides={}), "overrides", ("got {}", "name patterns")),
    Case(
        "overrides_without_options",
        gptq(overrides={"*down_proj": 4}),
        "overrides",
        ("got 4 for '*down_proj'", '{"bits": 4}'),
    ),
    Case(
        "overrides_option_typo",
        gptq(overrides={"*down_proj": {"bit": 4}}),
        "overrides",
        ("got `bit` for '*down_proj'", "did you mean `bits`?", "bits, group_size, symmetric"),
    ),
    Case(
        "overrides_bad_value",
        gptq(overrides={"*down_proj": {"bits": 9}}),
        "overrides",
        ("'*down_proj': bits: got 9", "2-8 bits, or 16"),
    ),
    Case(
        "overrides_against_a_format",
        gptq(scheme="FP8", overrides={"*down_proj": {"bits": 4}}),
        "overrides",
        ("bits=4 for '*down_proj' with scheme=FP8", "fixes `bits`", "bits=16"),
    ),
    Case(
        "overrides_of_a_pruning_method",
        wanda(overrides={"*down_proj": {"bits": 4}}),
        "overrides",
        ("`wanda` has no bits to override", "allocation=list", "drop `overrides`"),
    ),
    Case(
        "overrides_that_match_nothing",
        compressed("llama", method="rtn", overrides={"*donw_proj": {"bits": 8}}),
        "overrides",
        ("`*donw_proj` matched 0 of 21 layers", "did you mean `down_proj`?", "names: q_proj"),
    ),
    Case(
        "overrides_group_that_does_not_divide",
        compressed("llama", method="rtn", overrides={"*down_proj": {"group_size": 20}}),
        "group_size",
        ("20 does not divide the 48 inputs of layer model.layers.0.mlp.down_proj", "48, 16, 8, -1"),
    ),
    # --- pruning and quantization together
    Case(
        "joint_turned_around",
        recipe(method="gptq+wanda", sparsity=0.5),
        "method",
        ("gptq (quantization), wanda (pruning)", "did you mean wanda+gptq?"),
    ),
    Case(
        "joint_of_two_quantizers",
        recipe(method="rtn+gptq"),
        "method",
        ("rtn (quantization), gptq (quantization)", "PRUNING+QUANTIZATION", "sparsegpt+gptq"),
    ),
    Case(
        "joint_of_whole_parts",
        recipe(method="shortgpt+gptq", blocks=1),
        "method",
        ("shortgpt (pruning)", "two methods that work on weights", "sparsegpt+gptq"),
    ),
    Case(
        "joint_with_a_name_missing",
        recipe(method="wanda+", sparsity=0.5),
        "method",
        ("got 'wanda+'", "PRUNING+QUANTIZATION", "sparsegpt+gptq"),
    ),
    Case(
        "joint_with_hqq",
        made(method="wanda+hqq", sparsity=0.5),
        "method",
        ("`hqq` does not leave removed weights at zero", "rtn, gptq, gptq_heldout"),
    ),
    Case(
        "joint_without_strength",
        recipe(method="wanda+gptq"),
        "sparsity",
        ("missing", "sparsity=0.5", "pattern=2:4"),
    ),
    Case(
        "quantizer_as_calib_pruned",
        loaded_as("CalibPruned", method="gptq"),
        "method",
        ("`gptq` is a quantization method", "use --model calib_quantized"),
    ),
    Case(
        "joint_as_calib_pruned",
        loaded_as("CalibPruned", method="wanda+gptq", sparsity=0.5),
        "method",
        ("`wanda+gptq` prunes and quantizes", "use --model calib."),
    ),
    Case(
        "joint_as_calib_quantized",
        loaded_as("CalibQuantized", method="wanda+gptq", sparsity=0.5),
        "method",
        ("`wanda+gptq` prunes and quantizes", "use --model calib."),
    ),
    # --- kernels
    Case(
        "execution_typo",
        gptq(execution="pakced"),
        "execution",
        ("'pakced'", "did you mean `packed`?", "simulated, packed"),
    ),
    Case(
        "packed_fp8_on_a_cpu",
        packed("fp8", 8, -1, "scheme=FP8"),
        "execution",
        ("scheme=FP8 on a CPU", "needs a CUDA device", "packed here: scheme=W8A8", "simulated"),
    ),
    Case(
        "packed_without_a_kernel",
        packed("nvfp4", 4, 16, "scheme=NVFP4"),
        "execution",
        ("no kernel multiplies such numbers", "packed here: ", "use execution=simulated"),
    ),
    Case(
        "packed_with_an_unstructured_mask",
        wanda(execution="packed"),
        "execution",
        ("packed with method `wanda`", "pruned 2:4", "drop `execution`", "add pattern=2:4"),
    ),
    Case(
        "packed_with_another_pattern",
        recipe(method="wanda", pattern="4:8", execution="packed"),
        "execution",
        ("`wanda` and pattern=4:8", "pruned 2:4"),
    ),
    Case("symmetric_text", gptq(symmetric="maybe"), "symmetric", ("'maybe'", "true or false")),
    Case("act_order_number", gptq(act_order=2), "act_order", ("got 2", "true or false")),
    # --- amount of data
    Case("nsamples_zero", wanda(nsamples=0), "nsamples", ("got 0", "whole number >= 1")),
    Case("nsamples_negative", wanda(nsamples=-3), "nsamples", ("got -3", "whole number >= 1")),
    Case("nsamples_fraction", wanda(nsamples=1.5), "nsamples", ("got 1.5", "whole number >= 1")),
    Case("nsamples_boolean", wanda(nsamples=True), "nsamples", ("True", "whole number >= 1")),
    Case("nsamples_text", wanda(nsamples="many"), "nsamples", ("'many'", "whole number >= 1")),
    Case("nsamples_list", wanda(nsamples=[1, 2]), "nsamples", ("[1, 2]", "whole number >= 1")),
    Case("seqlen_zero", wanda(seqlen=0), "seqlen", ("got 0", "whole number >= 1")),
    Case("calib_seed_fraction", wanda(calib_seed=0.5), "calib_seed", ("0.5", "whole number")),
    Case("heldout_too_large", wanda(heldout=0.9), "heldout", ("got 0.9", "0 to 0.5")),
    Case("heldout_nan", wanda(heldout=float("nan")), "heldout", ("nan", "number")),
    Case(
        "pack_unknown", wanda(pack="conact"), "pack", ("did you mean `concat`?", "longdoc", "pad")
    ),
    Case(
        "propagate_unknown",
        wanda(propagate="pruned"),
        "propagate",
        ("'pruned'", "compressed, dense"),
    ),
    # --- source of data
    Case(
        "no_data_for_a_method_that_needs_it",
        wanda(calibration="none"),
        "calibration",
        ("`wanda` needs calibration data", "magnitude, rtn", "calibration=self"),
    ),
    Case(
        "source_typo",
        wanda(calibration="wikitxt2"),
        "calibration",
        ("no source `wikitxt2`", "did you mean `wikitext2`?", "self", "file", "none"),
    ),
    Case(
        "source_far_off",
        wanda(calibration="mybooks"),
        "calibration",
        ("no source `mybooks`", "file", "c4"),
    ),
    Case(
        "source_without_argument",
        wanda(calibration="file"),
        "calibration",
        ("`file` needs", "file:PATH"),
    ),
    Case(
        "task_without_name", wanda(calibration="task"), "calibration", ("`task` needs", "task:NAME")
    ),
    Case(
        "hub_without_name", wanda(calibration="hf:"), "calibration", ("`hf` needs", "hf:ORG/NAME")
    ),
    Case(
        "corpus_with_argument",
        wanda(calibration="c4:de"),
        "calibration",
        ("`c4` takes no argument", "`de`", "hf:allenai/c4"),
    ),
    Case(
        "weight_zero",
        wanda(calibration="c4*0+self*1"),
        "calibration",
        ("'0'", "positive", "c4*0.5+self*0.5"),
    ),
    Case(
        "weight_negative",
        wanda(calibration="c4*-1+self"),
        "calibration",
        ("'c4*-1'", "positive", "c4*0.5+self*0.5"),
    ),
    Case(
        "weight_text",
        wanda(calibration="c4*half"),
        "calibration",
        ("`c4*half`", "positive", "c4*0.5"),
    ),
    Case(
        "weight_first",
        wanda(calibration="0.5*c4+0.5*self"),
        "calibration",
        ("`0.5*c4`", "SOURCE*WEIGHT"),
    ),
    Case(
        "weight_with_two_points",
        wanda(calibration="c4*1.2.3"),
        "calibration",
        ("'1.2.3'", "positive"),
    ),
    Case(
        "weight_in_a_list",
        wanda(calibration=[{"source": "c4", "weight": "much"}]),
        "calibration",
        ("'much'", "positive"),
    ),
    Case(
        "weight_boolean",
        wanda(calibration=[{"source": "c4", "weight": True}]),
        "calibration",
        ("True", "positive"),
    ),
    Case(
        "weights_do_not_sum_to_one",
        wanda(calibration="c4*3+self*1"),
        "calibration",
        ("weights sum to 4", "fractions of the sequences", "type c4*0.75+self*0.25"),
    ),
    Case(
        "weight_of_one_source_only",
        wanda(calibration="c4*0.25+self"),
        "calibration",
        ("`self` has no weight", "equal shares", "type c4*0.25+self*0.75"),
    ),
    Case(
        "parenthesis_not_closed",
        wanda(calibration="null:shuffle(c4"),
        "calibration",
        ("'null:shuffle(c4'", "every `(` needs its `)`", '{"source": "file:PATH"}'),
    ),
    Case(
        "parentheses_empty",
        wanda(calibration="null:shuffle()"),
        "calibration",
        ("nothing stands inside", "`null:shuffle()`", "null:shuffle(c4)"),
    ),
    Case(
        "parentheses_of_a_source_that_takes_none",
        wanda(calibration="c4(self)"),
        "calibration",
        ("`c4` takes no source inside parentheses", "null"),
    ),
    Case(
        "text_after_parentheses",
        wanda(calibration="null:shuffle(c4)x"),
        "calibration",
        ("`null:shuffle(c4)x`", "?options and *weight"),
    ),
    Case(
        "commas_in_place_of_plus",
        wanda(calibration="c4,self"),
        "calibration",
        ("`c4,self`", "joined by +"),
    ),
    Case(
        "language_missing",
        wanda(calibration="lang"),
        "calibration",
        ("`lang` needs a language", "`fr`", "lang:fr"),
    ),
    Case(
        "language_of_another_shape",
        wanda(calibration="flores:fr"),
        "calibration",
        ("got `fr`", "`fra_Latn`", "flores:fra_Latn"),
    ),
    Case("term_empty", wanda(calibration="c4+"), "calibration", ("no name", "c4")),
    Case(
        "source_option_without_value",
        wanda(calibration="self?temperature"),
        "calibration",
        ("`temperature`", "no value", "key=value", "self?temperature=0.8"),
    ),
    Case(
        "list_entry_without_source",
        wanda(calibration=[{"weight": 1}]),
        "calibration",
        ("needs a `source`", "{source: c4"),
    ),
    Case("list_empty", wanda(calibration=[]), "calibration", ("got []", "calibration=self")),
    Case("calibration_number", wanda(calibration=4), "calibration", ("got 4", "calibration=self")),
    Case(
        "calibration_boolean",
        wanda(calibration=False),
        "calibration",
        ("False", "calibration=self"),
    ),
    Case(
        "calibration_broken_json",
        wanda(calibration='[{"source": "c4"'),
        "calibration",
        ("not JSON", '[{"source": "c4"'),
    ),
    # --- text of the model itself
    Case(
        "self_variant_typo",
        calibration("self:bso"),
        "calibration",
        ("no variant `bso`", "did you mean `bos`?", "self:prefix, self:bos, self:chat"),
    ),
    Case(
        "self_option_of_another_variant",
        calibration("self:bos?top_k=50"),
        "calibration",
        ("`self:bos` has no option `top_k`", "its options: ", "ramp"),
    ),
    Case(
        "self_choice_unknown",
        calibration("self:bos?eos=stop"),
        "calibration",
        ("`eos` of `self:bos`: got 'stop'", "restart, suppress", "self:bos?eos=restart"),
    ),
    Case(
        "self_paper_contradicted",
        calibration("self:prefix?mode=paper&dedup=1"),
        "calibration",
        ("mode=paper writes with dedup=0, got 1", "drop `dedup`, or drop `mode`"),
    ),
    Case(
        "self_prompts_missing",
        calibration("self:chat?prompts=mine.txt"),
        "calibration",
        ("prompts=mine.txt: no such file", "a .txt with one text a line"),
    ),
    # --- layers
    Case(
        "targets_empty",
        recipe(method="wanda", sparsity=0.5, targets=[]),
        "targets",
        ("got []", "*q_proj"),
    ),
    Case(
        "targets_blank_part",
        wanda(targets="*q_proj++*mlp*"),
        "targets",
        ("*q_proj++*mlp*", "joined by +"),
    ),
    Case("targets_number", wanda(targets=3), "targets", ("got 3", "name patterns")),
    Case("ignore_blank_part", wanda(ignore=["*q_proj", ""]), "ignore", ("''", "name patterns")),
    Case(
        "blocks_missing",
        recipe(method="shortgpt"),
        "blocks",
        ("missing", "blocks=N", "sparsity=S", "method=shortgpt,blocks=2"),
    ),
    Case(
        "blocks_beside_sparsity",
        recipe(method="depth_l2", blocks=2, sparsity=0.2),
        "blocks",
        ("given beside `sparsity`", "method=depth_l2,blocks=2"),
    ),
    Case(
        "blocks_as_a_path",
        recipe(method="shortgpt", blocks="model.layers"),
        "blocks",
        ("got 'model.layers'", "how many", "block_path=model.layers"),
    ),
    Case(
        "blocks_negative",
        recipe(method="shortgpt", blocks=-1),
        "blocks",
        ("got -1",),
    ),
    Case(
        "blocks_of_a_method_of_layers",
        wanda(blocks=2),
        "blocks",
        ("not an option of method `wanda`", "drop `blocks`"),
    ),
    Case(
        "sublayer_typo",
        recipe(method="shortgpt", blocks=1, sublayer="atention"),
        "sublayer",
        ("did you mean `attention`?", "block, attention, mlp"),
    ),
    Case(
        "sublayer_of_a_run_of_blocks",
        recipe(method="angular", blocks=1, sublayer="mlp"),
        "sublayer",
        ("not an option of method `angular`",),
    ),
    Case(
        "greedy_of_a_distance",
        recipe(method="depth_l1", blocks=1, greedy=True),
        "greedy",
        ("not an option of method `depth_l1`",),
    ),
    Case(
        "targets_of_a_method_of_models",
        recipe(method="shortgpt", blocks=1, targets="*mlp*"),
        "targets",
        ("`shortgpt` does not choose among layers", "drop `targets`"),
    ),
    Case(
        "update_of_layers_for_a_method_of_models",
        recipe(method="shortgpt", blocks=1, update="obs"),
        "update",
        ("`obs` does not go with method `shortgpt`", "none, mean, lowrank"),
    ),
    Case(
        "update_of_models_for_a_method_of_layers",
        wanda(update="mean"),
        "update",
        ("`mean` does not go with method `wanda`", "single weights", "obs"),
    ),
    Case(
        "update_of_a_method_without",
        recipe(method="flap", sparsity=0.2, update="mean"),
        "update",
        ("not an option of method `flap`",),
    ),
    Case(
        "lowrank_without_rank",
        lambda: Recipe(method="shortgpt", blocks=1, update="lowrank?rank=0").make_method(),
        "update",
        ("got rank=0", "rank >= 1"),
    ),
    Case(
        "flap_without_strength",
        recipe(method="flap"),
        "sparsity",
        ("missing", "for instance sparsity=0.5"),
    ),
    Case(
        "mixture_for_a_method_of_models",
        mixture("minimax(c4+self)", method="shortgpt", sparsity=None, blocks=1),
        "method",
        ("`shortgpt` takes whole parts out", "layers one by one", "wanda or sparsegpt"),
    ),
    Case(
        "block_path_number",
        wanda(block_path=3),
        "block_path",
        ("got 3", "block_path=model.layers"),
    ),
    Case("untie_text", wanda(untie="perhaps"), "untie", ("'perhaps'", "true or false")),
    Case(
        "schema_version_newer",
        wanda(schema_version=2),
        "schema_version",
        ("got 2", "reads version 1"),
    ),
    # --- recipe files
    Case(
        "file_missing", recipe(recipe="nowhere.yaml"), "recipe", ("no file 'nowhere.yaml'", "YAML")
    ),
    Case("file_not_a_path", recipe(recipe=7), "recipe", ("got 7", "path", "YAML")),
    Case("file_empty", yaml_file(""), "recipe", ("recipe.yaml", "name: value", "method: wanda")),
    Case(
        "file_with_a_list", yaml_file("- method: wanda\n"), "recipe", ("recipe.yaml", "name: value")
    ),
    Case(
        "file_not_text", yaml_file(b"\x80\x04\x95\xff\xfe"), "recipe", ("recipe.yaml", "not text")
    ),
    Case(
        "file_with_a_null_byte",
        yaml_file(b"method: wan\x00da\n"),
        "recipe",
        ("recipe.yaml", "not text"),
    ),
    Case(
        "file_with_a_tab",
        yaml_file("method: wanda\nsparsity:\t0.5\n\tpattern: 2:4\n"),
        "recipe",
        ("recipe.yaml, line 2", "spaces"),
    ),
    Case(
        "file_with_a_key_twice",
        yaml_file("method: wanda\nsparsity: 0.5\n\nsparsity: 0.6\n"),
        "recipe",
        ("recipe.yaml, line 4", "`sparsity` stands twice"),
    ),
    Case(
        "file_with_an_unclosed_bracket",
        yaml_file("method: wanda\nignore: [a, b\n"),
        "recipe",
        ("recipe.yaml, line 3", "name: value"),
    ),
    Case(
        "file_with_a_template",
        yaml_file("method: wanda\nsparsity: {{ s }}\n"),
        "recipe",
        ("recipe.yaml, line 2", "plain text"),
    ),
    Case(
        "file_with_code",
        yaml_file("method: !!python/object/apply:os.getcwd []\n"),
        "recipe",
        ("recipe.yaml, line 1", "python/object"),
    ),
    Case(
        "file_with_two_documents",
        yaml_file("method: wanda\n---\nmethod: rtn\n"),
        "recipe",
        ("recipe.yaml, line 2", "document"),
    ),
    Case(
        "file_with_an_unknown_name",
        yaml_file("method: wanda\nsparsity: 0.5\nnsample: 8\n"),
        "nsample",
        ("recipe.yaml, line 3", "did you mean `nsamples`?", "lm-calib ls options"),
    ),
    Case(
        "file_with_a_bad_value",
        yaml_file("method: wanda\nsparsity: 50\n"),
        "sparsity",
        ("recipe.yaml, line 2", "for 50 % write 0.5"),
    ),
    Case(
        "file_of_a_newer_schema",
        yaml_file("schema_version: 2\nmethod: wanda\nsparsity: 0.5\n"),
        "schema_version",
        ("recipe.yaml, line 1", "got 2", "reads version 1"),
    ),
    Case(
        "file_without_data",
        yaml_file("method: wanda\nsparsity: 0.5\ncalibration: none\n"),
        "calibration",
        ("recipe.yaml, line 3", "`wanda` needs calibration data"),
    ),
    Case(
        "file_against_argument",
        yaml_file("method: wanda\nsparsity: 0.5\n", sparsity=0.6),
        "sparsity",
        ("0.6", "0.5 in recipe.yaml", "choose one"),
    ),
    # --- folds
    Case("fold_unknown", wanda(fold="juge"), "fold", ("'juge'", "did you mean `judge`?", "choose")),
    # --- sets
    Case("set_unnamed", stored("set"), "calibration", ("set:DIR", "lm-calib calibrate")),
    Case(
        "set_missing",
        stored("set:mine"),
        "calibration",
        ("no folder 'mine'", "set:DIR", "lm-calib calibrate self --pretrained MODEL --out mine"),
    ),
    Case(
        "set_of_texts",
        stored("set:texts"),
        "calibration",
        ("'texts' holds no calibration.json", "there: a.txt", "file:PATH"),
    ),
    Case(
        "set_too_small",
        stored("set:my-set", nsamples=4),
        "nsamples",
        ("holds 3 sequences", "asks 4", "drop it to use the whole set"),
    ),
    Case(
        "set_too_small_for_its_share",
        stored("set:my-set*0.5+random*0.5"),
        "nsamples",
        ("holds 3 sequences", "asks 64", "lower nsamples"),
    ),
    # --- mixtures
    Case(
        "mixture_of_too_few_sources",
        mixture("tasa(random+null:ascii)"),
        "calibration",
        ("has 2 sources", "`tasa` takes 3 or more", "tasa(c4+self+code)"),
    ),
    Case(
        "mixture_with_a_source_twice",
        mixture("minimax(random+random)"),
        "calibration",
        ("names `random` twice", "every source once", "minimax(c4+self)"),
    ),
    Case(
        "mixture_with_an_argument",
        mixture("minimax:fast(random+null:ascii)"),
        "calibration",
        ("got the argument 'fast'", "sources inside parentheses", "minimax(c4+self)"),
    ),
    Case(
        "mixture_with_weights",
        mixture("minimax(random*0.7+null:ascii*0.3)"),
        "calibration",
        ("got weights", "finds the shares by itself", "type minimax(random+null:ascii)"),
    ),
    Case(
        "mixture_of_a_finished_set",
        mixture("minimax(set:my-set+random)"),
        "calibration",
        ("set:my-set", "no documents left to judge it by", "the source that the set was made of"),
    ),
    Case(
        "mixture_without_use",
        mixture("minimax(random+null:ascii)", method="magnitude"),
        "calibration",
        ("magnitude, which uses no data", "such as wanda", "drop `calibration`"),
    ),
    Case(
        "mixture_in_one_fold",
        mixture("minimax(random+null:ascii)", fold="judge"),
        "fold",
        ("'judge'", "judges on `validate` by itself", "drop `fold`"),
    ),
    Case(
        "cross_of_one_sequence",
        mixture("cross(random+null:ascii)", nsamples=1),
        "nsamples",
        ("got 1", "half of them from each source", "nsamples=128"),
    ),
    Case(
        "cross_of_one_source_alone",
        mixture("cross(random+null:ascii)?lambda=1"),
        "calibration",
        ("`lambda` of `cross(A+B)`", "a number > 0 and < 1", "cross(A+B)?lambda=0.5"),
    ),
    # --- preflight
    Case(
        "preflight_without_data",
        preflight(method="magnitude"),
        "method",
        ("`magnitude` uses no calibration data", "wanda, sparsegpt or gptq"),
    ),
    Case(
        "preflight_with_a_calibration",
        preflight(calibration="random"),
        "calibration",
        ("the recipe names random", "--set NAME=EXPR", "drop `calibration`"),
    ),
    Case(
        "preflight_with_a_fold",
        preflight(fold="judge"),
        "fold",
        ("'judge'", "drawn from `choose` and judged on `judge`", "drop `fold`"),
    ),
    Case(
        "preflight_without_sets",
        preflight(sets={}),
        "set",
        ("none given", "--set NAME=EXPR", "--set web=c4"),
    ),
    Case(
        "preflight_without_domains",
        preflight(domains={}),
        "domain",
        ("none given", "--domain NAME=EXPR", "--domain code=file:code.txt"),
    ),
    Case(
        "preflight_with_a_mixture_as_domain",
        preflight(domains={"web": "minimax(random+null:ascii)"}),
        "domain",
        ("web=minimax(random+null:ascii) is a mixture", "a sum of sources", "--domain web=file"),
    ),
    Case(
        "preflight_with_a_set_as_domain",
        preflight(domains={"web": "set:my-set"}),
        "domain",
        ("web=set:my-set is a finished set", "no set has seen", "--domain web=file:web.txt"),
    ),
    # --- selection
    Case(
        "select_unknown",
        wanda(select="kmean"),
        "select",
        ("'kmean'", "did you mean `kmeans`?", "gram_dopt"),
    ),
    Case(
        "pool_too_small",
        wanda(select="kmeans", nsamples=16, pool=8),
        "pool",
        ("got 8", "nsamples=16", "pool=128"),
    ),
    Case("pool_text", wanda(pool="large"), "pool", ("'large'", "whole number >= 1")),
    Case(
        "select_target_missing",
        wanda(select="centroid"),
        "select_target",
        ("missing", "`centroid`", "select_target=task:arc_easy"),
    ),
    Case(
        "select_target_of_a_selector_without",
        wanda(select="kmeans", select_target="random"),
        "select_target",
        ("select=kmeans", "centroid, grad_match", "drop `select_target`"),
    ),
    Case(
        "select_target_none",
        wanda(select="centroid", select_target="none"),
        "select_target",
        ("'none'", "a source of text", "task:arc_easy"),
    ),
    Case(
        "select_target_typo",
        wanda(select="centroid", select_target="slef"),
        "select_target",
        ("slef", "did you mean `self`?"),
    ),
    # --- packing
    Case("icl_examples_zero", wanda(pack="icl", icl_examples=0), "icl_examples", ("got 0", ">= 1")),
    Case(
        "icl_examples_of_another_packing",
        wanda(pack="pad", icl_examples=3),
        "icl_examples",
        ("pack=pad", "add pack=icl"),
    ),
    Case(
        "chat_template_text",
        wanda(chat_template="llama"),
        "chat_template",
        ("'llama'", "true or false"),
    ),
    # --- run time
    Case(
        "cache_number",
        lambda: Runtime(cache=3),  # type: ignore[arg-type]
        "cache",
        ("got 3", "true, false or a folder", "cache=true"),
    ),
    Case(
        "on_leak_typo",
        lambda: Runtime(on_leak="erorr"),
        "on_leak",
        ("'erorr'", "did you mean `error`?", "warn, error, ignore"),
    ),
    Case(
        "batch_size_zero",
        lambda: Runtime(calib_batch_size=0),
        "calib_batch_size",
        ("got 0", ">= 1"),
    ),
    Case(
        "batch_size_text",
        lambda: Runtime(calib_batch_size="large"),
        "calib_batch_size",
        ("'large'", "whole number >= 1"),
    ),
    Case(
        "progress_text", lambda: Runtime(progress="fancy"), "progress", ("'fancy'", "true or false")
    ),  # type: ignore[arg-type]
    Case("split_text", lambda: Runtime(split="auto"), "split", ("'auto'", "true or false")),  # type: ignore[arg-type]
    Case(
        "divergence_text",
        lambda: Runtime(divergence="js"),  # type: ignore[arg-type]
        "divergence",
        ("'js'", "true or false"),
    ),
    # --- classes of Optimum and configurations of transformers
    Case(
        "on_load_wrong_kind",
        lambda: lm_calib_plugin.CalibPruneConfig(method="gptq", bits=4),
        "method",
        ("`gptq` quantizes", "use CalibQuantConfig"),
    ),
    Case(
        "on_load_export_dir",
        lambda: lm_calib_plugin.CalibPruneConfig(method="wanda", sparsity=0.5, export_dir="x"),
        "export_dir",
        ("belongs to an evaluation or an export", "drop `export_dir`"),
    ),
    Case(
        "calib_config_format",
        lambda: lm_calib_plugin.CalibConfig(method="rtn", export_format="densee"),
        "export_format",
        ("'densee'", "did you mean `dense`?"),
    ),
    Case(
        "calib_config_missing",
        lambda: lm_calib_plugin.CalibConfig.from_pretrained("."),
        "calib_config",
        ("no calib_config.json in `.`", "every export write one"),
    ),
    Case(
        "quantizer_given_a_pruning_method",
        lambda: lm_calib_plugin.CalibQuantizer.from_pretrained("m").quantize(
            method="wanda", sparsity=0.5
        ),
        "method",
        ("`wanda` prunes", "use CalibPruner.from_pretrained(MODEL).prune"),
    ),
    Case(
        "pruner_option_without_folder",
        lambda: lm_calib_plugin.CalibPruner.from_pretrained("m").prune(
            method="wanda", sparsity=0.5, overwrite=True
        ),
        "overwrite",
        ("without save_dir", "give save_dir="),
    ),
    Case(
        "not_an_export",
        lambda: lm_calib_plugin.CalibModelForCausalLM.from_pretrained("."),
        "model",
        ("`.` is no exported folder", "AutoModelForCausalLM.from_pretrained('.')"),
    ),
    Case(
        "dtype_typo",
        command("export", "out", "--model", "m", "--method", "rtn", "--dtype", "flot16"),
        "dtype",
        ("got 'flot16'", "did you mean `float16`?", "allowed: auto, bfloat16"),
    ),
    Case(
        "recipe_named_by_a_configuration",
        lambda: lm_calib_plugin.CalibConfig.from_dict({"recipe": "/some/file.yaml"}),
        "recipe",
        ("a configuration holds '/some/file.yaml'", "nothing is read from other files"),
    ),
    Case(
        "divergence_of_one_model",
        command("inspect", "divergence", "--model", "m"),
        "compressed",
        ("neither a recipe and --compressed", "--method wanda", "--compressed DIR"),
    ),
    Case(
        "divergence_without_text",
        command("inspect", "divergence", "--model", "m", "--compressed", "other"),
        "text",
        ("missing", "the text to compare the two models on", "--text c4"),
    ),
    Case(
        "divergence_of_a_method_without_data",
        command(
            "inspect", "divergence", "--model", "m", "--method", "magnitude", "--sparsity", "0.5"
        ),
        "text",
        ("`magnitude` uses no calibration text", "--text c4"),
    ),
    Case(
        "divergence_on_its_own_finished_set",
        finished_set("inspect", "divergence", "--model", "m", "--method", "wanda"),
        "text",
        ("set:made is a finished set", "not calibrated with", "--text c4"),
    ),
    Case(
        "divergence_fold_typo",
        command(
            *("inspect", "divergence", "--model", "m", "--compressed", "other"),
            *("--text", "random", "--text-fold", "juge"),
        ),
        "text-fold",
        ("'juge'", "did you mean `judge`?"),
    ),
    Case(
        "answers_of_no_samples",
        command("inspect", "answers", ".", "."),
        "DENSE",
        (". is no file of samples", "--log_samples --output_path DIR"),
    ),
    Case(
        "answers_damaged",
        samples('{"doc_id": 0, "arguments": []'),
        "DENSE",
        ("samples_t.jsonl, line 1, is no sample of lm_eval", "evaluate again with --log_samples"),
    ),
    Case(
        "answers_without_choice",
        samples('{"doc_id": 0, "arguments": [["q", "a"]], "resps": [[["-1", "False"]]]}'),
        "COMPRESSED",
        ("no item of t can be compared: 1 no choice between answers", "multiple-choice tasks"),
    ),
    Case(
        "inspect_no_export",
        command("inspect", "."),
        "folder",
        ("holds no calib_files.json", "lm-calib export makes one"),
    ),
    Case(
        "inspect_one_set_twice",
        command(
            "inspect",
            "activations",
            "--pretrained",
            "m",
            "--calibration",
            "random",
            "--against",
            "null:ascii,random",
        ),
        "against",
        ("random is named twice", "every set once"),
    ),
    Case(
        "inspect_no_room_for_grams",
        command(
            "inspect",
            "activations",
            "--pretrained",
            "m",
            "--calibration",
            "random",
            "--gram-memory",
            "0",
        ),
        "gram_memory",
        ("got 0", "GiB of memory, more than 0", "--no-gram"),
    ),
    Case(
        "inspect_layers_no_run",
        command("inspect", "layers", "."),
        "run",
        ("holds no run", "a results file of lm_eval", "an exported folder"),
    ),
    Case(
        "inspect_layers_dense_results",
        results_of("{}", "results_1.json"),
        "run",
        ("holds no config.compression", "--model calib"),
    ),
    Case(
        "inspect_layers_no_report",
        results_of(_SUMMARY, "results_1.json"),
        "run",
        ("the report of the layers is not there", "copy it beside results_1.json"),
    ),
    Case(
        "inspect_layers_no_recipe",
        results_of('{"key": "k", "layers": []}', "my.json", "--pretrained", "m"),
        "run",
        ("does not say how they were made", "--compressed DIR", "--no-propagation"),
    ),
    Case(
        "inspect_layers_no_model",
        results_of('{"key": "k", "layers": []}', "my.json", "--propagation"),
        "pretrained",
        ("does not say where its dense model is", "--no-propagation"),
    ),
    Case(
        "sensitivity_to_nothing",
        command("inspect", "sensitivity", "--model", "m", "--text", "random"),
        "method",
        ("asks what a recipe does", "--method rtn --bits 3", "--probe depth"),
    ),
    Case(
        "sensitivity_probe_typo",
        command("inspect", "sensitivity", "--model", "m", "--text", "random", "--probe", "noises"),
        "probe",
        ("did you mean `noise`?", "allowed: groups, blocks, noise, depth"),
    ),
    Case(
        "depth_of_a_recipe",
        command(
            "inspect",
            "sensitivity",
            "--model",
            "m",
            "--text",
            "random",
            "--probe",
            "depth",
            "--method",
            "rtn",
        ),
        "method",
        ("ranked in the dense model", "drop the recipe"),
    ),
    Case(
        "unpack_no_archive",
        command("unpack", ".", "../out-of-unpack"),
        "folder",
        ("holds no calib_archive.json", "lm-calib pack makes one"),
    ),
    Case(
        "pack_over_a_folder",
        command("pack", ".", "."),
        "archive",
        ("exists", "name another one"),
    ),
]
