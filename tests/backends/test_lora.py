"""Low-rank adapters: which layers, how they are computed, trained, mixed and merged."""

import math
import warnings

import keras
import numpy as np
import pytest
from keras import ops

from gemma_keras import GemmaBackbone, registry
from gemma_keras.lora_config import LoraConfig, matches
from gemma_keras.projection import adapted_layers

TEXTS = ["The cat sat on the mat", "A dog came by and asked"] * 2
IDS = np.arange(3, 33).reshape(2, 15)


def logits(lm):
    return ops.convert_to_numpy(lm({"token_ids": IDS}))


def shake(lm, name="default", seed=5):
    """Give the factors of an adapter values of an update that is felt."""
    random = np.random.default_rng(seed)
    for layer in lm.backbone.adapters.layers(name).values():
        factors = layer.adapters[name]
        for variable in (factors.a, factors.b):
            variable.assign(0.2 * random.normal(size=variable.shape))
        if factors.magnitude is not None:
            factor = 1 + 0.3 * random.normal(size=factors.magnitude.shape)
            factors.magnitude.assign(ops.convert_to_numpy(factors.magnitude) * factor)


def numpy(x):
    return ops.convert_to_numpy(x).astype("float64")


def test_gemma_2b_has_as_many_trainable_parameters_as_with_peft():
    config = registry.architectures()["gemma_2b"]
    # PEFT's own figure for rank 4 on q_proj and v_proj.
    assert LoraConfig(rank=4).num_parameters(config) == 460_800


def test_the_count_is_that_of_a_model(new_lm):
    lm = new_lm()
    options = {"targets": ["all-linear", "token_embedding"], "dora": True}
    lm.enable_lora(3, rank_pattern={"key": 5}, **options)
    found = sum(math.prod(v.shape) for v in lm.trainable_variables)
    assert found == lm.adapters["default"].num_parameters(lm.config)


@pytest.mark.parametrize(
    ("targets", "count"),
    [
        (None, 4),
        ("all-linear", 14),
        (["q_proj", "o_proj"], 4),
        ("decoder_block_[0-1]/.*", 14),
        (["decoder_block_1/ffw_linear", r".*/attention/key/kernel"], 3),
        (["embed_tokens", "up_proj"], 3),
        ([".*"], 15),
    ],
)
def test_targets_are_names_or_patterns(config, targets, count):
    lora = LoraConfig(rank=2, targets=targets)
    paths = [path.rsplit("/", 1)[0] for path in config.weight_shapes()]
    paths = [path for path in paths if not path.endswith(("norm", "normalization"))]
    assert sum(lora.adapts(path) for path in paths) == count
    lora.check_layers(paths)


def test_a_name_is_not_a_part_of_a_name():
    assert not matches("query", "decoder_block_0/attention/query_norm")
    assert not matches("decoder_block_1", "decoder_block_1/ffw_linear")
    assert not matches("decoder_block_1/.*", "decoder_block_11/ffw_linear")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank must be a positive integer"),
        ({"rank": True}, "rank must be a positive integer"),
        ({"alpha": float("nan")}, "alpha must be a positive number"),
        ({"dropout": 1.0}, "dropout must be a number from 0 to below 1"),
        ({"targets": []}, "at least one layer"),
        ({"targets": "(query"}, "no regular expression"),
        ({"targets": ["query", "quary"]}, "No projection is called quary"),
        ({"init": "pissa"}, "init must be one of default, gaussian, he_uniform"),
        ({"dora": 1}, "dora must be true or false"),
        ({"rank_pattern": {"query": 0}}, "rank_pattern"),
        ({"name": "a.b"}, "letters, digits"),
    ],
)
def test_what_makes_no_adapter_is_refused(lm, options, message):
    with pytest.raises(ValueError, match=message):
        lm.enable_lora(**{"rank": 2, **options})
    assert lm.adapters == {}
    assert len(lm.trainable_variables) == len(lm.variables)


def test_ranks_and_alphas_may_differ_by_layer(new_lm):
    lm = new_lm()
    lm.enable_lora(
        4,
        alpha=6,
        rank_pattern={"decoder_block_0/.*": 2, "q_proj": 3},
        alpha_pattern={"value": 12},
        rslora=True,
    )
    first, second = (block.attention for block in lm.backbone.blocks[:2])
    found = [x.adapters["default"] for x in (first.query, second.query, second.value)]
    assert [x.rank for x in found] == [2, 3, 4]
    scales = [6 / math.sqrt(2), 6 / math.sqrt(3), 12 / math.sqrt(4)]
    assert [x.scale for x in found] == pytest.approx(scales)


@pytest.mark.parametrize("init", ["default", "gaussian", "he_uniform"])
def test_how_the_first_factor_begins(new_lm, init):
    lm = new_lm()
    lm.enable_lora(8, targets="all-linear", init=init)
    layer = lm.backbone.blocks[0].attention.attention_output
    rows = [
        x.adapters["default"].a
        for x in adapted_layers(lm.backbone).values()
        if x.path.endswith("attention_output")
    ]
    a = np.concatenate([numpy(x) for x in rows])
    assert a.shape == (2 * 60, 8)
    bound = {"default": 1 / math.sqrt(60), "he_uniform": math.sqrt(6 / 60)}.get(init)
    if bound is None:
        assert a.std() == pytest.approx(1 / 8, rel=0.1)
    else:
        assert 0.98 * bound < np.abs(a).max() <= bound * 1.0001
        assert a.std() == pytest.approx(bound / math.sqrt(3), rel=0.1)
    assert not numpy(layer.adapters["default"].b).any()


def test_dora_is_the_formula_of_the_paper(new_lm):
    lm = new_lm()
    before = logits(lm)
    lm.enable_lora(3, alpha=5, targets="all-linear", dora=True)
    np.testing.assert_allclose(logits(lm), before, atol=2e-5)
    shake(lm)
    for layer in adapted_layers(lm.backbone).values():
        if "default" not in layer.adapters:
            continue
        factors = layer.adapters["default"]
        a, b, magnitude = map(numpy, (factors.a, factors.b, factors.magnitude))
        direction = numpy(layer.kernel) + 5 / 3 * a @ b
        weight = magnitude * direction / np.linalg.norm(direction, axis=0)
        x = np.random.default_rng(0).normal(size=(3, len(a)))
        found = layer(ops.convert_to_tensor(x.astype("float32")))
        np.testing.assert_allclose(numpy(found), x @ weight, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(numpy(layer.merged_weight()), weight, atol=1e-5)


def gradients(lm, variables, backend):
    """Of the sum of squares of the logits."""

    def loss():
        return ops.sum(ops.square(lm({"token_ids": IDS}))) / 1000

    if backend == "torch":
        lm.zero_grad()
        loss().backward()
        return [v.value.grad.cpu().numpy() for v in variables]
    if backend == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            value = loss()
        return [g.numpy() for g in tape.gradient(value, [v.value for v in variables])]
    import jax

    def of(values):
        scope = keras.StatelessScope(list(zip(variables, values, strict=True)))
        with scope:
            return loss()

    return [np.asarray(g) for g in jax.grad(of)([v.value for v in variables])]


def test_doras_norm_counts_as_a_constant(new_lm, backend):
    """The gradient is that of a plain update with its columns scaled by numbers."""
    lm, fixed = new_lm(), new_lm()
    for model in (lm, fixed):
        model.enable_lora(2, targets=["ffw_linear"], dora=True)
        shake(model)
    for layer in fixed.backbone.adapters.layers("default").values():
        gain = layer.gain(layer.adapters["default"])
        layer.gain = lambda _, gain=gain: gain
    found = gradients(
        lm, [v for v in lm.trainable_variables if "magn" not in v.path], backend
    )
    constant = [v for v in fixed.trainable_variables if "magn" not in v.path]
    expected = gradients(fixed, constant, backend)
    for one, two in zip(found, expected, strict=True):
        scale = np.abs(two).max()
        assert scale > 1e-3
        np.testing.assert_allclose(one, two, atol=1e-4 * scale)


def test_the_embeddings_update_is_no_heads(new_lm):
    lm = new_lm()
    hidden = np.random.default_rng(1).normal(size=(2, 24)).astype("float32")
    head = ops.convert_to_numpy(lm.backbone.logits(ops.convert_to_tensor(hidden)))
    lm.enable_lora(3, alpha=6, targets="token_embedding")
    shake(lm)
    table = lm.backbone.token_embedding
    a, b = (numpy(v) for v in lm.trainable_variables)
    rows = numpy(table.lookup(ops.convert_to_tensor(IDS)))
    np.testing.assert_allclose(rows, (numpy(table.weight) + 2 * a @ b)[IDS], atol=1e-5)
    again = ops.convert_to_numpy(lm.backbone.logits(ops.convert_to_tensor(hidden)))
    np.testing.assert_array_equal(again, head)


def test_weights_without_an_adapter_leave_one_that_can_learn(new_lm, tmp_path):
    lm = new_lm()
    lm.save_weights(tmp_path / "plain.weights.h5")
    expected = logits(lm)
    lm.enable_lora(2, targets=["token_embedding", "query"], dora=True)
    shake(lm)
    lm.load_weights(tmp_path / "plain.weights.h5")
    np.testing.assert_allclose(logits(lm), expected, atol=2e-5)
    for layer in lm.backbone.adapters.layers("default").values():
        factors = layer.adapters["default"]
        assert numpy(factors.a).any() != numpy(factors.b).any()


def test_a_directory_that_does_not_fit_changes_nothing(two, new_lm, tmp_path):
    two.save_adapter(tmp_path / "two")
    lm = new_lm()
    lm.load_adapter(tmp_path / "two", name="mine")
    np.testing.assert_array_equal(logits(lm), logits(two))
    state, before = lm.backbone.adapters.state, logits(lm)
    with pytest.raises(ValueError, match="already has LoRA"):
        lm.load_adapter(tmp_path / "two", name="mine")
    file = tmp_path / "two" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors.*cut short"):
        lm.load_adapter(tmp_path / "two", name="other")
    assert lm.backbone.adapters.state == state
    np.testing.assert_array_equal(logits(lm), before)


# Dropout


def test_dropout_drops_in_training_alone_and_by_seed(new_lm):
    lm = new_lm()
    lm.enable_lora(2, dropout=0.4, targets="all-linear")
    shake(lm)
    generator = lm.backbone.seed_generator
    start = ops.convert_to_numpy(generator.state)
    still = logits(lm)
    np.testing.assert_array_equal(logits(lm), still)

    def trained():
        return ops.convert_to_numpy(lm({"token_ids": IDS}, training=True))

    first, second = trained(), trained()
    assert np.abs(first - still).max() > 0.01
    assert np.abs(first - second).max() > 0.01
    generator.state.assign(start)
    np.testing.assert_array_equal(trained(), first)


def test_dropout_keeps_the_mean_and_is_another_in_each_layer(new_lm):
    lm = new_lm()
    lm.enable_lora(2, dropout=0.25, targets=["query", "value"])
    noise = lm.backbone.draw_noise(True)
    ones = ops.ones((500, 24))
    seen = []
    for layer in (
        lm.backbone.blocks[0].attention.query,
        lm.backbone.blocks[1].attention.query,
    ):
        factors = layer.adapters["default"]
        factors.a.assign(np.eye(24, 2))
        factors.b.assign(np.eye(2, 60))
        kept = numpy(factors.update(ones, noise))[:, :2]
        assert set(np.unique(kept.round(4))) == {0.0, 1.3333}
        assert kept.mean() == pytest.approx(1, abs=0.06)
        seen.append(kept)
    assert (seen[0] != seen[1]).any()


def losses(lm, epochs):
    options = {"batch_size": 2, "shuffle": False, "verbose": 0}
    return lm.fit(TEXTS, epochs=epochs, **options).history["loss"]


def with_dropout(new_lm, **options):
    lm = new_lm()
    lm.enable_lora(2, dropout=0.3, targets=["query", "ffw_linear"])
    if keras.backend.backend() == "tensorflow":
        # XLA would spend ten seconds on each of these.
        options = {"jit_compile": False, **options}
    lm.compile(optimizer=keras.optimizers.Adam(0.02), **options)
    return lm


def test_training_with_dropout_is_resumed_as_it_would_have_gone_on(new_lm, tmp_path):
    lm = with_dropout(new_lm)
    first = losses(lm, 1)
    lm.save(tmp_path / "half.keras")
    expected = losses(lm, 2)
    assert expected[-1] < first[0]
    resumed = keras.models.load_model(tmp_path / "half.keras")
    # All of the state came along, the noise's too.
    assert losses(resumed, 2) == pytest.approx(expected, rel=1e-6)


def test_blocks_that_are_computed_twice_drop_the_same(new_lm, backend):
    eager = {"run_eagerly": True} if backend == "tensorflow" else {}
    expected = losses(with_dropout(new_lm, **eager), 2)
    found = losses(with_dropout(new_lm, remat=True, **eager), 2)
    # A second mask in the backward pass would show in the second loss.
    assert found == pytest.approx(expected, rel=1e-5)


# Several adapters


@pytest.fixture
def two(new_lm):
    """A model with the adapters `one` and `two`, the second in use."""
    lm = new_lm()
    lm.enable_lora(2, alpha=3, name="one")
    shake(lm, "one", 1)
    lm.enable_lora(3, targets=["value", "ffw_linear"], name="two")
    shake(lm, "two", 2)
    return lm


def test_adapters_are_switched_summed_and_put_aside(two):
    assert list(two.adapters) == ["one", "two"]
    assert two.active_adapters == ("two",)
    assert len({v.path for v in two.variables}) == len(two.variables)
    second = logits(two)
    assert all("/two/lora_" in v.path for v in two.trainable_variables)
    two.set_adapter("one")
    first = logits(two)
    assert all("/one/lora_" in v.path for v in two.trainable_variables)
    with two.disable_adapter():
        plain = logits(two)
    np.testing.assert_array_equal(logits(two), first)
    two.set_adapter(["one", "two"])
    both = logits(two)
    two.set_adapter(None)
    np.testing.assert_array_equal(logits(two), plain)
    assert two.trainable_variables == []
    for a, b in ((first, second), (first, plain), (second, plain), (both, first)):
        assert np.abs(a - b).max() > 0.01
    two.set_adapter("two")
    two.delete_adapter("one")
    np.testing.assert_array_equal(logits(two), second)


def test_a_combination_is_the_weighted_sum(two):
    layer = two.backbone.blocks[0].attention.value
    one, other = (layer.adapters[name].delta() for name in ("one", "two"))
    expected = 0.7 * numpy(one) - 0.4 * numpy(other)
    two.combine_adapters({"one": 0.7, "two": -0.4}, name="mix")
    assert two.active_adapters == ("mix",)
    np.testing.assert_allclose(
        numpy(layer.adapters["mix"].delta()), expected, atol=1e-5
    )
    ranks = {
        p: x.adapters["mix"].rank
        for p, x in two.backbone.adapters.layers("mix").items()
    }
    assert ranks["decoder_block_0/attention/value"] == 5
    assert ranks["decoder_block_0/attention/query"] == 2
    assert ranks["decoder_block_0/ffw_linear"] == 3
    sum_of = {"one": 1, "two": 1}
    two.combine_adapters(sum_of, name="sum")
    found = logits(two)
    two.set_adapter(["one", "two"])
    np.testing.assert_allclose(found, logits(two), atol=1e-4)


def test_generation_follows_the_adapter_in_use(two):
    def answer():
        settings = {"max_new_tokens": 4, "stop_token_ids": (), "return_log_probs": True}
        return np.array(two.generate("The cat", **settings).log_probs)

    first = answer()
    with two.disable_adapter():
        plain = answer()
    assert np.abs(first - plain).max() > 0.01
    np.testing.assert_array_equal(answer(), first)
    two.merge_adapter()
    np.testing.assert_allclose(answer(), first, atol=1e-4)
    two.unmerge_adapter()
    two.set_adapter(None)
    np.testing.assert_array_equal(answer(), plain)


def test_evaluate_follows_the_adapter_in_use(two):
    def loss():
        return two.evaluate(TEXTS, batch_size=4, verbose=0)[0]

    second = loss()
    two.set_adapter("one")
    first = loss()
    with two.disable_adapter():
        plain = loss()
    two.set_adapter("two")
    assert loss() == pytest.approx(second, rel=1e-6)
    assert len({round(x, 4) for x in (first, second, plain)}) == 3


def test_training_changes_the_adapter_in_use_alone(two):
    two.set_adapter("one")
    before = {v.path: numpy(v) for v in two.backbone.variables}
    jit = False if keras.backend.backend() == "tensorflow" else "auto"
    two.compile(optimizer=keras.optimizers.Adam(0.01), jit_compile=jit)
    two.fit(TEXTS, batch_size=4, verbose=0)
    changed = {
        v.path for v in two.backbone.variables if (numpy(v) != before[v.path]).any()
    }
    assert changed
    assert all("/one/lora_" in path for path in changed)
    two.set_adapter("two")
    with pytest.raises(ValueError, match="call compile again"):
        two.fit(TEXTS, batch_size=4, verbose=0)


def test_the_last_adapter_leaves_a_plain_model(two):
    for name in ("one", "two"):
        two.delete_adapter(name)
    assert len(two.trainable_variables) == len(two.variables)
    assert two.adapters == {}
    assert two.backbone.get_config()["lora"] is None


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (
            lambda lm: lm.set_adapter("three"),
            "no adapter called 'three'; there is one, two",
        ),
        (lambda lm: lm.set_adapter(["one", "one"]), "named twice"),
        (lambda lm: lm.delete_adapter("three"), "no adapter called"),
        (lambda lm: lm.enable_lora(2, name="one"), "already has LoRA enabled under"),
        (lambda lm: lm.combine_adapters({}, name="x"), "at least one adapter"),
        (
            lambda lm: lm.combine_adapters({"one": np.nan}, name="x"),
            "weight of one is nan",
        ),
        (lambda lm: lm.combine_adapters({"one": 1}, name="two"), "already has LoRA"),
        (lambda lm: lm.unmerge_adapter(), "No adapter is merged"),
    ],
)
def test_mistakes_with_names_change_nothing(two, act, message):
    before, state = logits(two), two.backbone.adapters.state
    with pytest.raises(ValueError, match=message):
        act(two)
    assert two.backbone.adapters.state == state
    np.testing.assert_array_equal(logits(two), before)


def test_a_dora_is_used_alone(two):
    two.enable_lora(2, name="three", dora=True)
    with pytest.raises(ValueError, match="three is a DoRA"):
        two.set_adapter(["one", "three"])
    with pytest.raises(ValueError, match="three is a DoRA"):
        two.combine_adapters({"one": 1, "three": 1}, name="four")
    assert two.active_adapters == ("three",)


# Merging


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dora", [False, True])
def test_merging_gives_the_same_logits_and_is_undone_exactly(new_lm, dtype, dora):
    lm = new_lm(dtype=dtype)
    lm.enable_lora(3, targets=["all-linear", "token_embedding"], dora=dora)
    shake(lm)
    expected = logits(lm)
    before = {v.path: numpy(v) for v in lm.backbone.variables}
    lm.merge_adapter()
    changed = {
        v.path for v in lm.backbone.variables if (numpy(v) != before[v.path]).any()
    }
    assert changed == {p for p in lm.config.weight_shapes() if p.endswith("kernel")}
    if dtype == "float32":
        np.testing.assert_allclose(logits(lm), expected, atol=1e-4)
    lm.unmerge_adapter()
    for variable in lm.backbone.variables:
        np.testing.assert_array_equal(numpy(variable), before[variable.path])
    np.testing.assert_array_equal(logits(lm), expected)


def test_merging_for_good_leaves_a_plain_model(two):
    expected, count = logits(two), len(two.config.weight_shapes())
    two.merge_adapter(discard=True)
    assert two.adapters == {}
    assert len(two.backbone.variables) == count
    np.testing.assert_allclose(logits(two), expected, atol=1e-4)


def test_what_would_go_wrong_while_merged_is_refused(two, tmp_path):
    two.save_weights(tmp_path / "two.weights.h5")
    two.merge_adapter()
    for act in (
        two.merge_adapter,
        lambda: two.set_adapter("one"),
        lambda: two.delete_adapter("one"),
        lambda: two.enable_lora(2),
        lambda: two.load_weights(tmp_path / "two.weights.h5"),
        lambda: two.fit(TEXTS, verbose=0),
    ):
        with pytest.raises(ValueError, match="unmerge_adapter"):
            act()


def test_files_of_a_merged_model_hold_it_unmerged(new_lm, two, tmp_path):
    expected = logits(two)
    two.merge_adapter()
    two.save(tmp_path / "two.keras")
    again = keras.models.load_model(tmp_path / "two.keras")
    np.testing.assert_array_equal(logits(again), expected)


def test_several_adapters_survive_a_keras_file(two, tmp_path):
    two.enable_lora(2, name="three", targets="token_embedding")
    shake(two, "three", 3)
    two.set_adapter(["one", "three"])
    expected = logits(two)
    two.save(tmp_path / "two.keras")
    again = keras.models.load_model(tmp_path / "two.keras")
    assert again.adapters == two.adapters
    assert again.active_adapters == ("one", "three")
    np.testing.assert_array_equal(logits(again), expected)
    clone = GemmaBackbone.from_config(two.backbone.get_config())
    assert [v.path for v in clone.variables] == [v.path for v in two.backbone.variables]


def test_presets_hold_what_is_in_use_and_say_what_is_left_out(two, tmp_path):
    from gemma_keras import GemmaCausalLM

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        two.save_to_preset(tmp_path / "preset")
    said = [str(warning.message) for warning in caught]
    # The other is about its pattern of layers, which KerasHub does not have.
    assert ["KerasHub" in text for text in said].count(True) == 1
    assert "Adapters that are not in use are left out: one." in said
    again = GemmaCausalLM.from_preset(tmp_path / "preset")
    np.testing.assert_allclose(logits(again), logits(two), atol=2e-5)


def test_a_preset_cannot_hold_an_update_of_the_embedding(new_lm, tmp_path):
    lm = new_lm()
    lm.enable_lora(2, targets="token_embedding")
    with pytest.raises(ValueError, match="the output head is the same table"):
        lm.save_to_preset(tmp_path / "preset")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="cannot be merged for good"):
        lm.merge_adapter(discard=True)
