"""The recipes that come with the library: each is one, and the published ones have the published figures."""

import subprocess
import sys

import pytest
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file

from gligen_xl.cli import train as command
from gligen_xl.cli.common import Parser
from gligen_xl.recipes import accelerate_names, find_recipe, recipe_names
from gligen_xl.train.known_bases import PUBLISHED


def recipe(name, *words):
    config, _ = command.parse(Parser(prog="train", default_env=False), [name, *words])
    return config


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_is_a_run(name):
    config = recipe(name)
    assert config.out.startswith("runs/")
    assert config.samples % config.batch_size == 0
    assert config.model in PUBLISHED or config.model == "shapes"


def test_no_two_recipes_share_a_folder():
    folders = [recipe(name).out for name in recipe_names()]
    assert len(set(folders)) == len(folders)


# Steps, batch, pixels, GPUs, samples that a GPU sees at a time: of GLIGEN-XL's two stages, and IGLIGEN's.
@pytest.mark.parametrize(
    ("name", "steps", "batch", "pixels", "gpus", "at_a_time"),
    [
        ("sdxl-512", 500_000, 64, 512, 8, 8),
        ("sdxl-1024", 100_000, 32, 1024, 8, 1),
        ("sd15-512", 500_000, 32, 512, 4, 8),
        ("sd21-512", 500_000, 32, 512, 4, 8),
    ],
)
def test_published_recipes_have_the_published_figures(name, steps, batch, pixels, gpus, at_a_time):
    config = recipe(name)
    assert (config.samples // batch, config.batch_size, config.resolution) == (steps, batch, pixels)
    assert (config.micro_batch or batch // gpus) == at_a_time
    options, augmentation = config.optimization, config.augmentation
    assert (options.optimizer, options.learning_rate, options.beta1, options.beta2) == ("adamw", 5e-5, 0.9, 0.999)
    assert (options.weight_decay, options.max_grad_norm, options.decay_share) == (0, 1, 0)
    assert options.warmup_samples == 1000 * batch
    assert options.attention_weight == 0
    assert (augmentation.drop_grounding, augmentation.drop_caption) == (0.1, 0.5)
    assert (augmentation.min_score, augmentation.slots) == (0.25, 32)
    assert config.precision == "fp16"
    assert config.adapter.starts_fresh
    assert (config.adapter.blocks, config.adapter.every, config.adapter.grounding_logit_bias) == ("all", 1, 0)


def test_the_second_stage_begins_where_the_first_one_ends():
    first, second = recipe("sdxl-512"), recipe("sdxl-1024")
    assert second.init_adapter == f"{first.out}/adapter"
    assert second.model == first.model
    assert first.init_adapter is None


def test_finetuning_begins_from_a_published_adapter_and_is_gentle():
    config = recipe("finetune")
    assert config.init_adapter == "jiuntian/gligen-xl-1024"
    assert config.optimization.learning_rate < recipe("sdxl-1024").optimization.learning_rate
    assert config.optimization.optimizer == "adamw8bit"
    assert config.samples <= 100_000


def test_flags_go_over_the_recipe():
    config = recipe("sdxl-512", "--optimization.learning_rate", "1e-4", "--data", "mine", "--resolution", "null")
    assert (config.optimization.learning_rate, config.data, config.resolution) == (1e-4, "mine", None)
    assert config.samples == 32_000_000


@pytest.mark.parametrize("name", accelerate_names())
def test_accelerate_reads_its_configurations(name):
    settings = load_config_from_file(str(find_recipe(name)))
    assert isinstance(settings, ClusterConfig)
    assert settings.distributed_type == "MULTI_GPU"
    assert settings.num_processes % settings.num_machines == 0
    assert settings.mixed_precision == "no"  # the recipe's counts


def test_a_recipe_is_found_by_name_outside_of_python(tmp_path):
    def find(*words):
        command = [sys.executable, "-m", "gligen_xl.recipes", *words]
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)

    assert find("accelerate/gpus").stdout.strip() == str(find_recipe("accelerate/gpus"))
    assert find().stdout.split() == [*recipe_names(), *accelerate_names()]
    refused = find("none-such")
    assert refused.returncode == 2
    assert "there is no recipe 'none-such'" in refused.stderr


def test_a_configuration_of_accelerate_is_no_recipe():
    with pytest.raises(ValueError, match="compute_environment"):
        recipe("accelerate/gpus")
