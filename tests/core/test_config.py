"""Settings: presets, files, pairs, and errors that name the setting to change."""

import pytest

from sgcd_core.config import PRESETS, SgcdConfig, load_config
from sgcd_core.errors import CODES, ConfigError, InputError, SgcdError


def test_every_preset_is_valid_and_paper_has_the_authors_numbers():
    for name in PRESETS:
        assert load_config(name).preset == name
    paper = load_config("paper")
    assert paper.network.channels == (32, 64, 256, 256)
    assert (paper.schedule.timesteps, paper.schedule.beta_start, paper.schedule.beta_end) == (
        1000, 0.0015, 0.0195,
    )  # fmt: skip
    assert (paper.record.bins, paper.record.decay) == (100, 0.2)
    assert (paper.global_stage.learning_rate, paper.target_stage.learning_rate) == (1e-4, 1e-6)
    assert (paper.global_stage.epochs, paper.target_stage.epochs) == (300, 30)
    assert (paper.target_sampler.invert_steps, paper.target_sampler.steps) == (35, 25)


def test_later_sources_win(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("global_stage:\n  steps: 7\n  batch_size: 3\nseed: 4\n")
    config = load_config("tiny", file, ["global_stage.steps=9"])
    assert (config.global_stage.steps, config.global_stage.batch_size, config.seed) == (9, 3, 4)


@pytest.mark.parametrize(
    ("pairs", "code", "named"),
    [
        (["global_stage.stepz=3"], "CONFIG-KEY", "global_stage.stepz"),
        (["global_stage.steps=zero"], "CONFIG-VALUE", "global_stage.steps"),
        (["global_stage.steps=0"], "CONFIG-VALUE", "global_stage.steps"),
        (["condition.content_channel=false"], "CONFIG-VALUE", "residual"),
        (["prepare.shape=[47, 56, 48]"], "CONFIG-VALUE", "prepare.shape"),
        (["target_sampler.t_start=1000"], "CONFIG-VALUE", "target_sampler.t_start"),
        (["steps"], "CONFIG-KEY", "key=value"),
        (["prepare.mm=["], "CONFIG-VALUE", "prepare.mm"),
        (["prepare.mm=2026-99-99"], "CONFIG-VALUE", "prepare.mm"),
        (["preset=[tiny]"], "CONFIG-VALUE", "preset"),
    ],
)
def test_a_wrong_setting_is_named(pairs, code, named):
    with pytest.raises(ConfigError) as caught:
        load_config(settings=pairs)
    assert caught.value.code == code
    assert named in str(caught.value)
    assert caught.value.exit_code == 78


def test_a_damaged_file_is_a_clear_error(tmp_path):
    for content in (b"\xff\xfe\x00", b"a: [1", b"- 1\n- 2\n", b"seed: 2026-99-99\n"):
        file = tmp_path / "bad.yaml"
        file.write_bytes(content)
        with pytest.raises(ConfigError) as caught:
            load_config(file=file)
        assert caught.value.code == "CONFIG-FILE"


def test_digest_changes_with_any_setting_and_with_nothing_else():
    assert SgcdConfig().digest() == load_config().digest()
    assert load_config(settings=["seed=1"]).digest() != SgcdConfig().digest()


def test_settings_cannot_be_changed_after_checking():
    with pytest.raises(ValueError, match="frozen"):
        SgcdConfig().seed = 3


def test_errors_survive_pickling_and_refuse_unlisted_codes():
    import pickle

    error = InputError("what", code="SCAN-EMPTY", where="s3://x/y", hint="do this")
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.code, copy.exit_code) == (str(error), "SCAN-EMPTY", 65)
    with pytest.raises(KeyError):
        SgcdError("what", code="NOT-A-CODE")
    assert all(text.endswith(".") for text in CODES.values())
